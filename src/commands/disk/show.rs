//! Looking at disk files.

use std::path::{Path, PathBuf};

use serde_json::json;
use tidemark_disk::chain::Chain;
use tidemark_disk::vhdx::{self, Access, CheckReport, Kind, ParentLocator, Properties, Vhdx};
use tidemark_disk::{DiskError, Extent, ExtentKind};

use super::{open_any, vm_of};
use crate::cli::FileArgs;
use crate::context::Context;
use crate::failure::{Code, Failure, Result};
use crate::output::{human, table};

/// Length and space taken on the host.
fn on_host(file: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(file).map_or((0, 0), |m| (m.len(), m.blocks() * 512))
}

/// The chain's files, base first, or why it does not open.
fn chain_of(args: &FileArgs) -> std::result::Result<Chain, DiskError> {
    Chain::open_among(&args.file, Access::ReadOnly, &args.parents_in)
}

fn recorded_path(locator: &ParentLocator) -> Option<String> {
    let paths = [&locator.relative_path, &locator.absolute_path, &locator.volume_path];
    paths.into_iter().flatten().next().cloned()
}

/// `tidemark disk info`
pub(super) fn info(context: &Context, args: &FileArgs) -> Result {
    let file = &args.file;
    let disk = Vhdx::open(file, Access::ReadOnly)?;
    let p = disk.properties();
    let replay = disk.needs_replay();
    drop(disk);
    let parent = p.parent.as_ref().and_then(recorded_path);
    let (length, allocated) = on_host(file);
    let chain = chain_of(args);
    let files: Option<Vec<PathBuf>> = chain.as_ref().ok().map(Chain::files);
    let problem = chain.as_ref().err().map(ToString::to_string);
    let seal = chain.as_ref().ok().and_then(Chain::last_seal);
    let document = json!({
        "file": file,
        "kind": kind(&p),
        "size": p.geometry.size,
        "file_length": length,
        "file_allocated": allocated,
        "block_size": p.block_size,
        "logical_sector": p.geometry.logical_sector,
        "physical_sector": p.geometry.physical_sector,
        "disk_id": p.disk_id,
        "data_write_guid": p.data_write_guid,
        "file_write_guid": p.file_write_guid,
        "parent": parent,
        "parent_linkage": p.parent.as_ref().map(|l| l.linkage),
        "chain": files,
        "chain_problem": problem,
        "last_rct_id": seal.as_ref().map(ToString::to_string),
        "vm": vm_of(file),
        "log_replay_needed": replay,
    });
    context.output.result(&document, || {
        let mut rows = vec![
            ("kind", kind(&p).to_owned()),
            ("virtual size", format!("{} ({} bytes)", human(p.geometry.size), p.geometry.size)),
            ("file", format!("{} long, {} on the host", human(length), human(allocated))),
            ("block size", human(u64::from(p.block_size))),
            (
                "sectors",
                format!(
                    "{} logical, {} physical",
                    p.geometry.logical_sector, p.geometry.physical_sector
                ),
            ),
            ("disk id", p.disk_id.to_string()),
            ("data write id", p.data_write_guid.to_string()),
        ];
        rows.extend(parent.map(|parent| ("parent", parent)));
        for (i, file) in files.iter().flatten().rev().enumerate().skip(1) {
            rows.push((if i == 1 { "rests on" } else { "" }, file.display().to_string()));
        }
        rows.extend(problem.map(|problem| ("chain", format!("does not open: {problem}"))));
        rows.extend(seal.map(|id| ("last RCT id", id.to_string())));
        rows.extend(vm_of(file).map(|vm| ("VM", vm)));
        if replay {
            rows.push(("log", "to be replayed at the next writable open".to_owned()));
        }
        table(&["", ""], rows.into_iter().map(|(n, v)| vec![n.to_owned(), v]))
    });
    Ok(())
}

fn kind(properties: &Properties) -> &'static str {
    match properties.kind {
        Kind::Fixed => "fixed",
        Kind::Dynamic => "dynamic",
        Kind::Differencing => "differencing",
    }
}

/// `tidemark disk check`
pub(super) fn check(context: &Context, args: &FileArgs, repair: bool) -> Result {
    let file = &args.file;
    let repaired = if repair { vhdx::repair(file)? } else { Vec::new() };
    let mut report: CheckReport = vhdx::check(file)?;
    let mut code = Code::Damaged;
    if report.problems.is_empty() {
        match chain_of(args) {
            Ok(chain) => {
                report.notes.retain(|note| !note.contains("its parent was not checked"));
                let files = chain.files();
                drop(chain);
                for parent in files.iter().rev().skip(1) {
                    let below = vhdx::check(parent)?;
                    let named = |what| format!("{}: {what}", parent.display());
                    report.problems.extend(below.problems.into_iter().map(named));
                    report.repairable.extend(below.repairable.into_iter().map(named));
                }
            }
            Err(e) => {
                if matches!(e, DiskError::ParentMissing { .. }) {
                    code = Code::NotFound;
                }
                report.problems.push(e.to_string());
            }
        }
    }
    let mut document = serde_json::to_value(&report).unwrap_or_default();
    document["repaired"] = json!(repaired);
    context.output.result(&document, || {
        let mut text = format!(
            "{} of {} blocks present, {} partial, {} zero",
            report.present_blocks, report.blocks, report.partial_blocks, report.zero_blocks
        );
        for done in &repaired {
            text += &format!("\nrepaired: {done}");
        }
        for what in &report.repairable {
            text += &format!("\nrepairable: {what}; `disk check --repair` mends it");
        }
        for note in &report.notes {
            text += &format!("\nnote: {note}");
        }
        if report.problems.is_empty() {
            text += "\nno problems found";
        }
        text
    });
    if report.problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        code,
        format!("{} is damaged: {}", file.display(), report.problems.join("; ")),
    ))
}

/// `tidemark disk map`
pub(super) fn map(context: &Context, args: &FileArgs) -> Result {
    let disk = open_any(&args.file, &args.parents_in)?;
    let extents = disk.extents(0, disk.geometry().size)?;
    let document: Vec<_> = extents
        .iter()
        .map(|e| json!({"offset": e.offset, "length": e.len, "kind": name(e)}))
        .collect();
    context.output.result(&document, || {
        table(
            &["OFFSET", "LENGTH", "KIND"],
            extents
                .iter()
                .map(|e| vec![e.offset.to_string(), e.len.to_string(), name(e).to_owned()]),
        )
    });
    Ok(())
}

fn name(extent: &Extent) -> &'static str {
    match extent.kind {
        ExtentKind::Data => "data",
        ExtentKind::Zero => "zero",
        ExtentKind::Hole => "hole",
    }
}
