//! Copies between targets: by moving what one repository holds into another, never by reading the VM.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tidemark_dedup::{RepoError, Repository, WriteStats};
use uuid::Uuid;

use crate::backup::millis;
use crate::error::{ExportError, Result, check};
use crate::exporter::Exporter;
use crate::model::{Events, TargetResult};
use crate::point::parse_facts;
use crate::report::{Amounts, Reporter};

/// What a catch-up did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Restore points copied, oldest first, and what each took.
    pub copied: Vec<(Uuid, WriteStats)>,
    /// Restore points that were there already.
    pub present: usize,
    /// Restore points that could not be read from the source, and why.
    pub unreadable: Vec<String>,
}

impl Exporter<'_> {
    /// Copies the restore points that `from` has and `to` has not: of one VM, or of all. Oldest first,
    /// so that a cancelled or failed catch-up leaves what it did and goes on from there next time.
    pub fn copy_points(
        &self,
        from: &str,
        to: &str,
        vm: Option<&str>,
        events: Events<'_>,
        cancel: &AtomicBool,
    ) -> Result<CopyReport> {
        let reporter = Reporter::new(events);
        if from == to {
            return Err(ExportError::Invalid(format!("{from} cannot be copied to itself")));
        }
        let source = self.repository(from)?;
        let target = self.repository(to)?;
        let there = target.points(None).map_err(ExportError::on(to))?;
        let there: HashSet<Uuid> = there.into_iter().flatten().map(|m| m.point).collect();
        let mut report = CopyReport::default();
        for manifest in source.points(None).map_err(ExportError::on(from))? {
            check(cancel)?;
            let manifest = match manifest {
                Ok(manifest) => manifest,
                Err(e) => {
                    report.unreadable.push(e.to_string());
                    continue;
                }
            };
            if let Some(vm) = vm
                && !parse_facts(from, &manifest).is_ok_and(|facts| facts.vm.name == vm)
            {
                continue;
            }
            if there.contains(&manifest.point) {
                report.present += 1;
                continue;
            }
            reporter.step(format!("copy {} to {to}", manifest.point));
            let stats = copy_point(&source, &target, to, manifest.point, &reporter, cancel)?;
            report.copied.push((manifest.point, stats.unwrap_or_default()));
        }
        Ok(report)
    }

    /// One copy of a run. Its failure is the target's, not the restore point's.
    pub(crate) fn copy_one(
        &self,
        from: &str,
        to: &str,
        point: Uuid,
        reporter: &Reporter<'_>,
        cancel: &AtomicBool,
    ) -> TargetResult {
        let begun = Instant::now();
        reporter.step(format!("copy to {to}"));
        let result = check(cancel).and_then(|()| {
            let source = self.repository(from)?;
            let target = self.repository(to)?;
            copy_point(&source, &target, to, point, reporter, cancel)
        });
        let (stats, error) = match result {
            Ok(stats) => (stats.unwrap_or_default(), None),
            Err(ExportError::Cancelled) => (WriteStats::default(), Some("cancelled".to_owned())),
            Err(e) => (WriteStats::default(), Some(e.to_string())),
        };
        if let Some(error) = &error {
            reporter.note(format!("the copy to {to} failed: {error}"));
        }
        TargetResult {
            target: to.to_owned(),
            read_bytes: stats.read_bytes,
            new_bytes: stats.new_bytes,
            stored_bytes: stats.stored_bytes,
            millis: millis(begun),
            error,
        }
    }
}

/// Copies a restore point; `None`: it is there already.
fn copy_point(
    source: &Repository,
    target: &Repository,
    to: &str,
    point: Uuid,
    reporter: &Reporter<'_>,
    cancel: &AtomicBool,
) -> Result<Option<WriteStats>> {
    let progress = |done, total| {
        reporter.progress(Amounts { done, total, ..Amounts::default() });
    };
    match target.copy_from(source, point, &progress, cancel) {
        Ok(stats) => Ok(Some(stats)),
        // Somebody else copied it meanwhile: a restore point keeps its id, so it is the same one.
        Err(RepoError::AlreadyExists { .. }) => Ok(None),
        Err(e) => Err(ExportError::on(to)(e)),
    }
}
