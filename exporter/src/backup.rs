//! The backup run: checkpoint → restore point on the first target → merge → copies.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use jiff::Timestamp;
use tidemark_dedup::{
    DiskRoot, Manifest, PointDisk, PointFile, PointWriter, RepoError, Repository, WriteStats,
};
use tidemark_disk::DiskError;
use tidemark_disk::rct::RctId;
use tidemark_engine::{
    CheckpointPurpose, CheckpointRecord, CheckpointRequest, CheckpointType, Consistency,
    OpenCheckpointDisk, VmConfig, VmSession,
};
use uuid::Uuid;

use crate::error::{ExportError, Result, check};
use crate::exporter::Exporter;
use crate::model::{
    BackupReport, BackupRequest, Events, FACTS_VERSION, PointFacts, ReadMode, TargetResult,
};
use crate::pipeline::{self, Piece};
use crate::plan::{Areas, ChunkSet, Steps, bytes_to_read};
use crate::point::{boot_file_name, parse_facts};
use crate::report::{Amounts, Reporter};
use crate::runs::{self, RunRecord};

/// Threads that read a checkpoint's disk ahead of the writer.
const READERS: usize = 2;

/// Largest boot file kept with a restore point; it is in memory while it is stored.
pub(crate) const MAX_BOOT_FILE: u64 = 128 * 1024 * 1024;

/// Changed ranges asked for at once.
const CHANGES_AT_ONCE: usize = 1 << 16;

/// A disk of the checkpoint and what will be read of it.
struct PlannedDisk {
    open: OpenCheckpointDisk,
    mode: ReadMode,
    areas: Areas,
    base: Option<DiskRoot>,
}

/// The restore point that a run may build on.
struct Base {
    manifest: Manifest,
    facts: PointFacts,
}

/// What was written to the first target.
struct Written {
    manifest: Manifest,
    disks: Vec<(String, ReadMode)>,
    read_bytes: u64,
    millis: u64,
}

impl Exporter<'_> {
    /// Runs a backup. Cancelled or failed before the restore point is committed, it leaves neither a
    /// restore point nor a checkpoint; after that the report tells what was not done.
    pub fn backup(
        &self,
        request: &BackupRequest,
        events: Events<'_>,
        cancel: &AtomicBool,
    ) -> Result<BackupReport> {
        let started = Timestamp::now();
        let reporter = Reporter::new(events);
        let result = self.run_backup(request, &reporter, cancel);
        let record = RunRecord::new(&request.vm, started, &result);
        // The restore point is what counts; a full data directory must not hide it.
        if let Err(e) = runs::append(self.engine.data_dir(), &record) {
            reporter.note(format!("the run could not be recorded: {e}"));
        }
        result
    }

    fn run_backup(
        &self,
        request: &BackupRequest,
        reporter: &Reporter<'_>,
        cancel: &AtomicBool,
    ) -> Result<BackupReport> {
        let begun = Instant::now();
        let targets = self.run_targets(request)?;
        let mut session = self.engine.session(&request.vm)?;
        // Before the checkpoint: a wrong passphrase or a missing bucket should cost the guest nothing.
        let (name, repository) = self.open_first(&targets, reporter)?;
        let base = find_base(&name, &repository, session.config().id)?;
        let config = session.config().clone();
        check(cancel)?;

        reporter.step("checkpoint");
        let checkpoint = session.create_checkpoint(&checkpoint_request(request))?;
        note_consistency(&checkpoint, reporter);
        let run =
            PointRun { request, target: &name, repository: &repository, config, reporter, cancel };
        let written = run.write(&session, &checkpoint, base.as_ref().map_err(String::as_str));
        // On every path, and before the copies: they do not need the VM, and its guest should not
        // run on a longer chain than it must. A kill before or in the merge leaves a checkpoint of
        // purpose `Backup`, which the next session merges away.
        let merge_begun = Instant::now();
        let merge_error = merge(&mut session, &checkpoint, reporter);
        let merge_millis = millis(merge_begun);
        let written = written?;
        drop(session);

        let first = written.result(&name);
        let mut results = vec![first];
        for target in &targets[1..] {
            results.push(self.copy_one(&name, target, written.manifest.point, reporter, cancel));
        }
        Ok(BackupReport {
            point: written.manifest.point,
            vm: request.vm.clone(),
            disks: written.disks,
            checkpoint,
            targets: results,
            merge_millis,
            millis: millis(begun),
            merge_error,
            notes: reporter.notes(),
        })
    }

    /// The run's targets in order, each once.
    fn run_targets(&self, request: &BackupRequest) -> Result<Vec<String>> {
        let mut names = Vec::new();
        if request.targets.is_empty() {
            let mut all = self.targets()?;
            // The quickest way off the VM first; copies follow from there.
            all.sort_by_key(|target| !target.is_local());
            names.extend(all.into_iter().map(|target| target.name));
        }
        for name in &request.targets {
            if !names.contains(name) {
                self.files.get(name)?;
                names.push(name.clone());
            }
        }
        if names.is_empty() {
            return Err(ExportError::Invalid(
                "there is no target to back up to; add one with `tidemark target add`".to_owned(),
            ));
        }
        Ok(names)
    }

    /// Opens the run's repositories. The first must open; a copy's target may come back until it is
    /// its turn, so its failure is only told.
    fn open_first(
        &self,
        targets: &[String],
        reporter: &Reporter<'_>,
    ) -> Result<(String, Repository)> {
        reporter.step("open targets");
        let first = self.repository(&targets[0]);
        for name in &targets[1..] {
            if first.is_ok()
                && let Err(e) = self.repository(name)
            {
                reporter.note(format!("{name} cannot be opened now: {e}"));
            }
        }
        for note in self.take_notes() {
            reporter.note(note);
        }
        Ok((targets[0].clone(), first?))
    }
}

fn checkpoint_request(request: &BackupRequest) -> CheckpointRequest {
    CheckpointRequest {
        name: None,
        checkpoint_type: CheckpointType::Production,
        quiesce: request.quiesce,
        freeze_deadline: request.freeze_deadline,
        purpose: CheckpointPurpose::Backup,
    }
}

fn note_consistency(checkpoint: &CheckpointRecord, reporter: &Reporter<'_>) {
    if let Consistency::Crash { reason } = &checkpoint.consistency {
        reporter.note(format!("the restore point is only crash-consistent: {reason}"));
    }
}

/// Merges the run's checkpoint away; gives why not, if not. Not cancelled with the run: a cancelled
/// run shall not leave a checkpoint either.
fn merge(
    session: &mut VmSession<'_>,
    checkpoint: &CheckpointRecord,
    reporter: &Reporter<'_>,
) -> Option<String> {
    reporter.step("merge");
    let progress = |_: &str, done, total| {
        reporter.progress(Amounts { done, total, ..Amounts::default() });
    };
    let id = checkpoint.id.to_string();
    let error = session.delete_checkpoint(&id, &progress, &AtomicBool::new(false)).err()?;
    let text = format!(
        "checkpoint {} could not be merged away ({error}); the next operation on the VM tries again",
        checkpoint.name
    );
    reporter.note(&text);
    Some(text)
}

/// The newest restore point of the VM on the target, or why none can be built upon.
fn find_base(
    target: &str,
    repository: &Repository,
    vm: Uuid,
) -> Result<std::result::Result<Base, String>> {
    let Some(manifest) = repository.latest(vm).map_err(ExportError::on(target))? else {
        return Ok(Err(format!("first backup of this VM to {target}")));
    };
    Ok(match parse_facts(target, &manifest) {
        Ok(facts) => Ok(Base { manifest, facts }),
        Err(e) => Err(e.to_string()),
    })
}

/// Writing one restore point from a checkpoint to the first target.
struct PointRun<'r> {
    request: &'r BackupRequest,
    target: &'r str,
    repository: &'r Repository,
    /// The VM as it was before the run's own checkpoint.
    config: VmConfig,
    reporter: &'r Reporter<'r>,
    cancel: &'r AtomicBool,
}

impl PointRun<'_> {
    fn write(
        &self,
        session: &VmSession<'_>,
        checkpoint: &CheckpointRecord,
        base: std::result::Result<&Base, &str>,
    ) -> Result<Written> {
        let base = if self.request.full { Err("asked for") } else { base };
        let first = self.attempt(session, checkpoint, base);
        // A base that cannot be read must not make every further run fail: build on nothing instead.
        let Err(ExportError::Target {
            source: source @ (RepoError::Damaged { .. } | RepoError::Missing { .. }),
            ..
        }) = &first
        else {
            return first;
        };
        if base.is_err() {
            return first;
        }
        let reason = format!("the last restore point on {} cannot be read: {source}", self.target);
        self.attempt(session, checkpoint, Err(&reason))
    }

    fn attempt(
        &self,
        session: &VmSession<'_>,
        checkpoint: &CheckpointRecord,
        base: std::result::Result<&Base, &str>,
    ) -> Result<Written> {
        let begun = Instant::now();
        check(self.cancel)?;
        let mut disks = Vec::new();
        for open in session.open_checkpoint(checkpoint.id)? {
            disks.push(self.plan(open, base)?);
        }
        let mut writer = self.repository.begin(self.request.compression).map_err(self.on())?;
        let (roots, read_bytes) = self.write_disks(&mut writer, &disks)?;
        let files = self.write_files(&mut writer, session)?;
        let modes: Vec<_> = disks.iter().map(|d| (d.open.name.clone(), d.mode.clone())).collect();
        let parent = base.ok().map(|b| b.manifest.point);
        let facts = self.facts(checkpoint, &disks, &modes, parent)?;
        // The last moment to turn back: the commit makes the restore point visible.
        check(self.cancel)?;
        self.reporter.step("commit");
        let manifest = writer
            .commit(Manifest {
                point: Uuid::new_v4(),
                group: self.config.id,
                created: checkpoint.created.clone(),
                disks: roots,
                files,
                stats: WriteStats::default(),
                facts,
            })
            .map_err(self.on())?;
        Ok(Written { manifest, disks: modes, read_bytes, millis: millis(begun) })
    }

    fn on(&self) -> impl FnOnce(RepoError) -> ExportError + '_ {
        ExportError::on(self.target)
    }

    /// Decides what of a disk is read.
    fn plan(
        &self,
        open: OpenCheckpointDisk,
        base: std::result::Result<&Base, &str>,
    ) -> Result<PlannedDisk> {
        match base.map_err(str::to_owned).and_then(|base| changed(&open, base)) {
            Ok((since, root, areas)) => {
                let mode = ReadMode::Incremental { since };
                Ok(PlannedDisk { open, mode, areas, base: Some(root) })
            }
            Err(reason) => {
                self.reporter.note(format!("{} is read in full: {reason}", open.name));
                let mode = ReadMode::Full { reason };
                Ok(PlannedDisk { open, mode, areas: Areas::Whole, base: None })
            }
        }
    }

    fn write_disks(
        &self,
        writer: &mut PointWriter,
        disks: &[PlannedDisk],
    ) -> Result<(Vec<PointDisk>, u64)> {
        let mut total = 0;
        for disk in disks {
            check(self.cancel)?;
            total += bytes_to_read(disk.open.disk.as_ref(), &disk.areas)?;
        }
        let read = AtomicU64::new(0);
        let mut done = Amounts { total, ..Amounts::default() };
        let mut roots = Vec::new();
        for disk in disks {
            self.reporter.step(format!("read {}", disk.open.name));
            let root = self.write_disk(writer, disk, &read, &mut done)?;
            roots.push(PointDisk { name: disk.open.name.clone(), root });
        }
        self.reporter.progress_now(done);
        Ok((roots, read.into_inner()))
    }

    fn write_disk(
        &self,
        writer: &mut PointWriter,
        planned: &PlannedDisk,
        read: &AtomicU64,
        done: &mut Amounts,
    ) -> Result<DiskRoot> {
        let disk = planned.open.disk.as_ref();
        let size = disk.geometry().size;
        let mut out = writer.disk(size, planned.base.as_ref()).map_err(self.on())?;
        let fetch = |offset: u64, buffer: &mut [u8]| {
            disk.read_at(offset, buffer)?;
            read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            Ok(())
        };
        let steps = Steps::new(disk, &planned.areas);
        pipeline::run(steps, READERS, &fetch, self.cancel, |piece| {
            match piece {
                Piece::Data { offset, data } => {
                    done.done += data.len() as u64;
                    out.write(offset, data).map_err(self.on())?;
                }
                Piece::Zero(range) => out.zero(range).map_err(self.on())?,
            }
            let stats = out.stats();
            (done.new_bytes, done.stored_bytes) = (stats.new_bytes, stats.stored_bytes);
            self.reporter.progress(*done);
            Ok(())
        })?;
        out.finish().map_err(self.on())
    }

    /// Kernel and initial RAM disk.
    fn write_files(
        &self,
        writer: &mut PointWriter,
        session: &VmSession<'_>,
    ) -> Result<Vec<PointFile>> {
        let mut files = Vec::new();
        for (name, path) in session.boot_files() {
            check(self.cancel)?;
            let content = read_boot_file(&path)?;
            files.push(writer.file(&boot_file_name(&name), &content).map_err(self.on())?);
        }
        Ok(files)
    }

    fn facts(
        &self,
        checkpoint: &CheckpointRecord,
        disks: &[PlannedDisk],
        modes: &[(String, ReadMode)],
        parent: Option<Uuid>,
    ) -> Result<serde_json::Value> {
        let sectors = disks.iter().map(|d| {
            let geometry = d.open.disk.geometry();
            (d.open.name.clone(), geometry.logical_sector, geometry.physical_sector)
        });
        let facts = PointFacts {
            version: FACTS_VERSION,
            vm: self.config.clone(),
            checkpoint: checkpoint.clone(),
            disks: modes.to_vec(),
            sectors: sectors.collect(),
            parent,
        };
        serde_json::to_value(facts)
            .map_err(|e| ExportError::Invalid(format!("the restore point's facts: {e}")))
    }
}

impl Written {
    fn result(&self, target: &str) -> TargetResult {
        TargetResult {
            target: target.to_owned(),
            read_bytes: self.read_bytes,
            new_bytes: self.manifest.stats.new_bytes,
            stored_bytes: self.manifest.stats.stored_bytes,
            millis: self.millis,
            error: None,
        }
    }
}

/// The base of a disk and its areas changed since, or the reason for a full read.
fn changed(
    open: &OpenCheckpointDisk,
    base: &Base,
) -> std::result::Result<(Uuid, DiskRoot, Areas), String> {
    let point = base.manifest.point;
    let stored = base.manifest.disks.iter().find(|d| d.name == open.name);
    let sealed = base.facts.checkpoint.disks.iter().find(|d| d.name == open.name);
    let (Some(stored), Some(sealed)) = (stored, sealed) else {
        return Err(format!("the disk is not part of restore point {point}"));
    };
    let size = open.disk.geometry().size;
    if stored.root.size != size {
        return Err(format!("its size changed from {} to {size} bytes", stored.root.size));
    }
    match changed_chunks(open, &sealed.rct_id, size) {
        Ok(chunks) => Ok((point, stored.root.clone(), Areas::Changed(chunks))),
        Err(DiskError::UnknownRctId { why, .. }) => Err(format!("change tracking: {why}")),
        // Whatever else is wrong with the tracking files, the disk itself may still be read.
        Err(e) => Err(format!("change tracking cannot be used: {e}")),
    }
}

/// Asked for in pages, so that memory does not grow with the number of changes.
fn changed_chunks(
    open: &OpenCheckpointDisk,
    id: &RctId,
    size: u64,
) -> std::result::Result<ChunkSet, DiskError> {
    let mut chunks = ChunkSet::new(size);
    let mut next = Some(0);
    while let Some(from) = next {
        let page = open.changed_since_from(id, from, CHANGES_AT_ONCE)?;
        page.ranges.iter().for_each(|range| chunks.add(range));
        next = page.next;
    }
    Ok(chunks)
}

fn read_boot_file(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let file = std::fs::File::open(path).map_err(ExportError::io("open", path))?;
    let mut content = Vec::new();
    file.take(MAX_BOOT_FILE + 1)
        .read_to_end(&mut content)
        .map_err(ExportError::io("read", path))?;
    if content.len() as u64 > MAX_BOOT_FILE {
        return Err(ExportError::Invalid(format!(
            "boot file {} is larger than {} MiB",
            path.display(),
            MAX_BOOT_FILE >> 20
        )));
    }
    Ok(content)
}

pub(crate) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
