//! `tidemark backup …`

use std::process::ExitCode;

use serde_json::json;
use tidemark_dedup::{Compression, VerifyReport};
use tidemark_exporter::{BackupReport, BackupRequest, Exporter, FoundPoint, ReadMode};

use super::checkpoint::{consistency, quiesce_mode};
use crate::cli::{BackupCommand, Effort};
use crate::context::Context;
use crate::failure::{Code, Failure, Result};
use crate::output::{human, millis, seconds, table};

/// Runs a backup command.
pub(crate) fn run(context: &Context, command: BackupCommand) -> Result<ExitCode> {
    let engine = context.engine()?;
    let exporter = context.exporter(&engine);
    match command {
        BackupCommand::Run { vm, target, full, compression, quiesce } => {
            let request = BackupRequest {
                vm,
                targets: target,
                full,
                quiesce: quiesce_mode(quiesce.quiesce),
                freeze_deadline: quiesce.deadline(),
                compression: effort(compression),
            };
            let progress = context.output.progress();
            let report =
                exporter.backup(&request, &|event| progress.event(&event), &context.cancel);
            progress.finish();
            let report = report?;
            context.output.result(&report, || describe_run(&report));
            Ok(if !report.complete() {
                ExitCode::from(Code::Partial as u8)
            } else {
                ExitCode::SUCCESS
            })
        }
        BackupCommand::List { vm } => list(context, &exporter, vm.as_deref()),
        BackupCommand::Show { point } => {
            let found = exporter.find(&point, None)?;
            context.output.result(&point_json(&found), || describe_point(&found));
            Ok(ExitCode::SUCCESS)
        }
        BackupCommand::Verify { point, all, quick } => {
            let points = if all {
                exporter.list(None)?.0
            } else {
                vec![exporter.find(point.as_deref().unwrap_or_default(), None)?]
            };
            verify(context, &exporter, &points, !quick)
        }
    }
}

fn effort(effort: Effort) -> Compression {
    match effort {
        Effort::Fast => Compression::Fast,
        Effort::Default => Compression::Default,
        Effort::Better => Compression::Better,
    }
}

fn describe_run(report: &BackupReport) -> String {
    let mut text = format!(
        "restore point {}\n{}; frozen {} ms, disk I/O held {} ms\n",
        report.point,
        consistency(&report.checkpoint.consistency),
        millis(report.checkpoint.freeze_us),
        millis(report.checkpoint.pause_us)
    );
    for (disk, mode) in &report.disks {
        text += &match mode {
            ReadMode::Full { reason } => format!("{disk}: full read ({reason})\n"),
            ReadMode::Incremental { since } => format!("{disk}: changes since {since}\n"),
        };
    }
    text += &table(
        &["TARGET", "READ", "NEW", "STORED", "SECONDS", ""],
        report.targets.iter().map(|t| {
            vec![
                t.target.clone(),
                human(t.read_bytes),
                human(t.new_bytes),
                human(t.stored_bytes),
                seconds(t.millis),
                t.error.clone().map(|e| format!("failed: {e}")).unwrap_or_default(),
            ]
        }),
    );
    text
}

fn list(context: &Context, exporter: &Exporter<'_>, vm: Option<&str>) -> Result<ExitCode> {
    let (points, failed) = exporter.list(vm)?;
    for (target, error) in &failed {
        context.output.note(&format!("target {target} could not be listed: {error}"));
    }
    let result = json!({
        "points": points.iter().map(point_json).collect::<Vec<_>>(),
        "unreadable": failed.iter().map(|(t, e)| json!({"target": t, "error": e.to_string()})).collect::<Vec<_>>(),
    });
    context.output.result(&result, || {
        if points.is_empty() {
            return "no restore points".to_owned();
        }
        table(
            &["POINT", "VM", "CREATED", "SIZE", "CONSISTENCY", "TARGETS"],
            points.iter().map(|p| {
                vec![
                    p.manifest.point.to_string(),
                    p.facts.vm.name.clone(),
                    p.manifest.created.clone(),
                    human(p.manifest.disks.iter().map(|d| d.root.size).sum()),
                    consistency(&p.facts.checkpoint.consistency),
                    p.targets.join(" "),
                ]
            }),
        )
    });
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(Code::Partial as u8) })
}

fn point_json(found: &FoundPoint) -> serde_json::Value {
    json!({"point": found.manifest.point, "vm": found.facts.vm.name, "targets": found.targets, "manifest": found.manifest})
}

fn describe_point(found: &FoundPoint) -> String {
    let m = &found.manifest;
    let mut rows = vec![
        vec!["point".to_owned(), m.point.to_string()],
        vec!["VM".to_owned(), found.facts.vm.name.clone()],
        vec!["created".to_owned(), m.created.clone()],
        vec!["consistency".to_owned(), consistency(&found.facts.checkpoint.consistency)],
        vec!["targets".to_owned(), found.targets.join(" ")],
    ];
    rows.extend(m.disks.iter().map(|d| vec![d.name.clone(), human(d.root.size)]));
    rows.extend(m.files.iter().map(|f| vec![f.name.clone(), human(f.root.size)]));
    rows.push(vec![
        "cost".to_owned(),
        format!(
            "read {}, new {}, stored {}",
            human(m.stats.read_bytes),
            human(m.stats.new_bytes),
            human(m.stats.stored_bytes)
        ),
    ]);
    table(&["", ""], rows)
}

fn verify(
    context: &Context,
    exporter: &Exporter<'_>,
    points: &[FoundPoint],
    read_data: bool,
) -> Result<ExitCode> {
    let progress = context.output.progress();
    let mut results: Vec<(String, String, VerifyReport)> = Vec::new();
    for found in points {
        for target in &found.targets {
            let what = format!("verify {} on {target}", found.manifest.point);
            let report = exporter
                .repository(target)?
                .verify(
                    found.manifest.point,
                    read_data,
                    &|done, total| progress.engine(&what, done, total),
                    &context.cancel,
                )
                .inspect_err(|_| progress.finish())?;
            results.push((found.manifest.point.to_string(), target.clone(), report));
        }
    }
    progress.finish();
    let damaged = results.iter().map(|(_, _, r)| r.damage.len()).sum::<usize>();
    let document: Vec<_> = results
        .iter()
        .map(|(point, target, report)| json!({"point": point, "target": target, "report": report}))
        .collect();
    context.output.result(&document, || {
        let mut text = table(
            &["POINT", "TARGET", "CHUNKS", "CHECKED", "RESULT"],
            results.iter().map(|(point, target, r)| {
                vec![
                    point.clone(),
                    target.clone(),
                    r.chunks.to_string(),
                    human(r.bytes),
                    if r.damage.is_empty() { "good".to_owned() } else { "DAMAGED".to_owned() },
                ]
            }),
        );
        for (_, target, report) in &results {
            for damage in &report.damage {
                text += &format!("\n{target}: {damage}");
            }
        }
        text
    });
    if damaged > 0 {
        return Err(Failure::new(
            Code::Damaged,
            format!(
                "{damaged} damaged places; restore from another target, and back up with --full"
            ),
        ));
    }
    Ok(ExitCode::SUCCESS)
}
