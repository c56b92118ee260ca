//! `tidemark demo`: the main job on a real VM. Build a VM, back it up to two targets while it works,
//! change data, back up again, lose everything but the off-site copy, restore from that, compare.

mod guest;
mod steps;

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use tidemark_exporter::BackupReport;

use crate::cli::DemoArgs;
use crate::context::Context;
use crate::failure::{Code, Failure, Result};
use crate::output::{human, millis, seconds, table};

/// A line of the demo's table.
#[derive(Debug, Serialize)]
struct Row {
    step: String,
    millis: u64,
    read_bytes: Option<u64>,
    new_bytes: Option<u64>,
    stored_bytes: Option<u64>,
    pause_us: Option<u64>,
    freeze_us: Option<u64>,
}

/// Collects the table and says what is going on.
struct Story<'a> {
    context: &'a Context,
    begun: Instant,
    rows: Vec<Row>,
}

impl<'a> Story<'a> {
    fn new(context: &'a Context) -> Self {
        Self { context, begun: Instant::now(), rows: Vec::new() }
    }

    /// Runs a step and notes how long it took.
    fn step<T>(&mut self, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.context.cancel.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(Failure::new(Code::Cancelled, "cancelled"));
        }
        self.context.output.note(&format!("[{:>3} s] {name}", self.begun.elapsed().as_secs()));
        let start = Instant::now();
        let done = work().map_err(|f| Failure::new(f.code, format!("{name}: {f}")))?;
        self.rows.push(Row {
            step: name.to_owned(),
            millis: start.elapsed().as_millis() as u64,
            read_bytes: None,
            new_bytes: None,
            stored_bytes: None,
            pause_us: None,
            freeze_us: None,
        });
        Ok(done)
    }

    /// Adds a backup's lines: one per target, and the merge.
    fn backup(&mut self, name: &str, report: &BackupReport) {
        self.rows.pop();
        for (i, target) in report.targets.iter().enumerate() {
            self.rows.push(Row {
                step: if i == 0 {
                    format!("{name} to {}", target.target)
                } else {
                    format!("copy to {}", target.target)
                },
                millis: target.millis,
                read_bytes: Some(target.read_bytes),
                new_bytes: Some(target.new_bytes),
                stored_bytes: Some(target.stored_bytes),
                pause_us: (i == 0).then_some(report.checkpoint.pause_us),
                freeze_us: (i == 0).then_some(report.checkpoint.freeze_us),
            });
        }
        self.rows.push(Row {
            step: "merge the checkpoint".to_owned(),
            millis: report.merge_millis,
            read_bytes: None,
            new_bytes: None,
            stored_bytes: None,
            pause_us: None,
            freeze_us: None,
        });
    }

    fn print(&self) {
        let bytes = |b: Option<u64>| b.map(human).unwrap_or_default();
        let ms = |us: Option<u64>| us.map(millis).unwrap_or_default();
        self.context.output.result(&self.rows, || {
            table(
                &["STEP", "SECONDS", "READ", "NEW", "STORED", "PAUSE ms", "FREEZE ms"],
                self.rows.iter().map(|r| {
                    vec![
                        r.step.clone(),
                        seconds(r.millis),
                        bytes(r.read_bytes),
                        bytes(r.new_bytes),
                        bytes(r.stored_bytes),
                        ms(r.pause_us),
                        ms(r.freeze_us),
                    ]
                }),
            ) + "\n\nThe restored VM holds the same data as the one that was deleted."
        });
    }
}

/// Runs the demo.
pub(crate) fn run(context: &Context, args: &DemoArgs) -> Result {
    let folder = Folder::new(args.keep)?;
    let mut story = Story::new(context);
    let done = steps::run(context, args, &folder.path, &mut story);
    if args.keep {
        context.output.note(&format!("kept {}", folder.path.display()));
    }
    done?;
    story.print();
    Ok(())
}

/// The demo's folder; short, because sockets live in it.
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    fn new(keep: bool) -> Result<Self> {
        let name = format!("tidemark-demo-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path)
            .map_err(|e| Failure::new(Code::Failed, format!("create {}: {e}", path.display())))?;
        Ok(Self { path, keep })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
