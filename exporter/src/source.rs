//! A restore point's disks and files, read from the targets that hold it: the first that gives a
//! piece, verified, is believed; damage or silence of one target is made good by the next. As long as
//! there is another one, a target is asked once; only when all have failed are they asked with the
//! patience of their stores.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use tidemark_dedup::{DiskReader, DiskRoot, Manifest, RepoError, Repository};
use uuid::Uuid;

use crate::backup::MAX_BOOT_FILE;
use crate::error::{ExportError, Result};
use crate::exporter::Exporter;
use crate::model::PointFacts;
use crate::pipeline::{self, Piece};
use crate::plan::{PIECE, Step};
use crate::point::{is_boot_file, parse_facts};
use crate::report::Reporter;

/// How much is read piece by piece after a stream has failed: as much as it may have read ahead, so
/// that it does not begin again before the bad place.
const REPAIR: u64 = 64 * 1024 * 1024;

/// Threads that fetch single pieces: an object store answers one request slowly and many at once well.
const READERS: usize = 8;

/// Notes of one disk; a target with a thousand damaged chunks needs no thousand lines.
const MAX_NOTES: usize = 16;

/// A restore point on the targets that hold it.
pub(crate) struct PointSource {
    pub(crate) point: Uuid,
    pub(crate) manifest: Manifest,
    pub(crate) facts: PointFacts,
    copies: Vec<Copy>,
}

struct Copy {
    target: String,
    repository: Repository,
    manifest: Manifest,
}

impl Exporter<'_> {
    /// Opens a restore point for reading; notes every target that cannot help.
    pub(crate) fn open_source(
        &self,
        point: &str,
        target: Option<&str>,
        reporter: &Reporter<'_>,
    ) -> Result<PointSource> {
        let (found, unread) = self.locate(point, target)?;
        for (_, e) in unread {
            reporter.note(format!("not asked for the restore point: {e}"));
        }
        for note in self.take_notes() {
            reporter.note(note);
        }
        let id = found.manifest.point;
        let mut copies: Vec<Copy> = Vec::new();
        let mut failed = None;
        for target in found.targets {
            match self.open_copy(&target, id, &found.manifest) {
                Ok(copy) => copies.push(copy),
                Err(e) => {
                    reporter.note(format!("{target} cannot be read from: {e}"));
                    failed.get_or_insert(e);
                }
            }
        }
        let Some(first) = copies.first() else {
            return Err(failed.unwrap_or_else(|| ExportError::NoSuchPoint(id.to_string())));
        };
        let facts = parse_facts(&first.target, &first.manifest)?;
        Ok(PointSource { point: id, manifest: first.manifest.clone(), facts, copies })
    }

    fn open_copy(&self, target: &str, id: Uuid, expected: &Manifest) -> Result<Copy> {
        let repository = self.repository(target)?;
        let manifest = repository.point(id).map_err(ExportError::on(target))?;
        if shape(&manifest) != shape(expected) {
            return Err(ExportError::Facts {
                point: id.to_string(),
                target: target.to_owned(),
                what: "its disks differ from those of the other targets".to_owned(),
            });
        }
        Ok(Copy { target: target.to_owned(), repository, manifest })
    }
}

/// What copies of one restore point must agree in; chunk ids differ, every repository has its key.
fn shape(manifest: &Manifest) -> Vec<(&str, u64)> {
    let disks = manifest.disks.iter().map(|d| (d.name.as_str(), d.root.size));
    disks.chain(manifest.files.iter().map(|f| (f.name.as_str(), f.root.size))).collect()
}

impl PointSource {
    /// A disk for reading.
    pub(crate) fn disk(&self, name: &str) -> Result<DiskSource> {
        let root = |m: &Manifest| m.disks.iter().find(|d| d.name == name).map(|d| d.root.clone());
        self.open(name, root).ok_or_else(|| {
            let names: Vec<_> = self.manifest.disks.iter().map(|d| d.name.as_str()).collect();
            ExportError::Invalid(format!(
                "restore point {} has no disk {name}; it has {}",
                self.point,
                names.join(", ")
            ))
        })
    }

    fn open(&self, name: &str, root: impl Fn(&Manifest) -> Option<DiskRoot>) -> Option<DiskSource> {
        let size = root(&self.manifest)?.size;
        let copies = self.copies.iter().filter_map(|copy| {
            Some(Reader {
                target: copy.target.clone(),
                repository: copy.repository.clone(),
                root: root(&copy.manifest)?,
                once: Mutex::default(),
                patient: Mutex::default(),
            })
        });
        Some(DiskSource {
            name: name.to_owned(),
            size,
            readers: copies.collect(),
            preferred: AtomicUsize::new(0),
            notes: Mutex::default(),
        })
    }

    /// The boot files: names and contents.
    pub(crate) fn boot_files(&self, reporter: &Reporter<'_>) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        for file in &self.manifest.files {
            let Some(name) = is_boot_file(&file.name) else { continue };
            let root =
                |m: &Manifest| m.files.iter().find(|f| f.name == file.name).map(|f| f.root.clone());
            let Some(source) = self.open(&file.name, root) else { continue };
            if source.size > MAX_BOOT_FILE {
                return Err(ExportError::Invalid(format!(
                    "boot file {name} has {} bytes, more than is ever backed up",
                    source.size
                )));
            }
            let mut content = vec![0; source.size as usize];
            let mut at = 0;
            for piece in content.chunks_mut(PIECE as usize) {
                source.read_at(at, piece)?;
                at += piece.len() as u64;
            }
            source.tell(reporter);
            files.push((name.to_owned(), content));
        }
        Ok(files)
    }
}

/// One disk or file of a restore point, on every target that holds it. Shared between threads.
pub(crate) struct DiskSource {
    name: String,
    pub(crate) size: u64,
    readers: Vec<Reader>,
    /// The reader asked first: moves on when a target falls silent.
    preferred: AtomicUsize,
    notes: Mutex<Vec<String>>,
}

struct Reader {
    target: String,
    repository: Repository,
    root: DiskRoot,
    /// Opened when first needed: a target that is never asked need not answer.
    once: Opened,
    patient: Opened,
}

type Opened = Mutex<Option<Arc<DiskReader>>>;

impl Reader {
    fn get(&self, patient: bool) -> tidemark_dedup::Result<Arc<DiskReader>> {
        let mut open = if patient { &self.patient } else { &self.once }.lock();
        if let Some(reader) = open.as_ref() {
            return Ok(reader.clone());
        }
        let reader = Arc::new(match patient {
            true => self.repository.open_disk(&self.root)?,
            false => self.repository.open_disk_once(&self.root)?,
        });
        *open = Some(reader.clone());
        Ok(reader)
    }
}

/// Whether it is one piece that is bad. Otherwise the target is: its time-out would be the price of
/// every further piece.
fn is_damage(error: &RepoError) -> bool {
    matches!(error, RepoError::Damaged { .. } | RepoError::Missing { .. })
}

/// How far a stream came.
enum Streamed {
    All,
    /// To a piece that this target does not have intact, or to the silence of the last target.
    Stuck,
    /// To the silence of a target; the next one is preferred now.
    NextTarget,
}

impl DiskSource {
    /// Where it is read from, for messages.
    pub(crate) fn describe(&self) -> String {
        let targets: Vec<_> = self.readers.iter().map(|r| r.target.as_str()).collect();
        format!("{} on {}", self.name, targets.join(", "))
    }

    /// Fills `buf` with verified content.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len();
        self.attempt(&format!("{len} bytes at {offset}"), |reader| reader.read_at(offset, buf))
    }

    /// Ranges that hold data.
    pub(crate) fn data_ranges(&self, range: &Range<u64>) -> Result<Vec<Range<u64>>> {
        self.attempt(&format!("the map at {}", range.start), |r| r.data_ranges(range.clone()))
    }

    /// Asks target after target until one gives what is wanted; where all fail, those that were silent
    /// once more, with patience.
    fn attempt<T>(
        &self,
        what: &str,
        mut ask: impl FnMut(&DiskReader) -> tidemark_dedup::Result<T>,
    ) -> Result<T> {
        let first = self.preferred.load(Ordering::Relaxed);
        let count = self.readers.len();
        let mut failures: BTreeMap<usize, RepoError> = BTreeMap::new();
        for turn in 0..2 * count {
            let (index, patient) = ((first + turn) % count, turn >= count || count == 1);
            let Some(reader) = self.readers.get(index) else { continue };
            if failures.get(&index).is_some_and(|e| is_damage(e) || count == 1) {
                continue;
            }
            match reader.get(patient).and_then(|open| ask(&open)) {
                Ok(value) => return Ok(value),
                Err(RepoError::Cancelled) => return Err(ExportError::Cancelled),
                Err(e) => {
                    self.note(format!("{}: {what} of {}: {e}", reader.target, self.name));
                    self.move_on(index, &e);
                    failures.insert(index, e);
                }
            }
        }
        let mut failures: Vec<_> = failures
            .into_iter()
            .filter_map(|(index, e)| Some((&self.readers.get(index)?.target, e)))
            .collect();
        if failures.len() == 1
            && let Some((target, source)) = failures.pop()
        {
            return Err(ExportError::on(target)(source));
        }
        let failures: Vec<_> =
            failures.iter().map(|(target, e)| format!("{target}: {e}")).collect();
        Err(ExportError::NoGoodCopy {
            what: format!("{what} of {}", self.name),
            failures: failures.join("; "),
        })
    }

    /// Prefers the next target if this one fell silent.
    fn move_on(&self, index: usize, error: &RepoError) {
        if !is_damage(error) {
            let next = (index + 1) % self.readers.len();
            let order = Ordering::Relaxed;
            self.preferred.compare_exchange(index, next, order, order).ok();
        }
    }

    fn note(&self, text: String) {
        tracing::warn!("{text}");
        let mut notes = self.notes.lock();
        if notes.len() < MAX_NOTES {
            notes.push(text);
        }
    }

    /// Tells what went wrong and was made good since the last call.
    pub(crate) fn tell(&self, reporter: &Reporter<'_>) {
        for note in std::mem::take(&mut *self.notes.lock()) {
            reporter.note(note);
        }
    }

    /// Hands the whole disk's data over in ascending order, verified; what is left out is zeros.
    pub(crate) fn for_each(
        &self,
        cancel: &AtomicBool,
        each: &mut dyn FnMut(u64, Bytes) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        let mut silent = 0;
        while at < self.size {
            let begun = at;
            match self.stream(&mut at, cancel, each)? {
                Streamed::All => return Ok(()),
                // Not round and round: each target gets one chance to go on from here.
                Streamed::NextTarget if at > begun || silent + 1 < self.readers.len() => {
                    silent = if at > begun { 1 } else { silent + 1 };
                    continue;
                }
                Streamed::NextTarget | Streamed::Stuck => silent = 0,
            }
            // Something between here and the end of the read-ahead is damaged or out of reach: this
            // much piece by piece, each from whoever has it, and then on as before.
            let end = self.size.min(at.saturating_add(REPAIR));
            let fetch = |offset: u64, buffer: &mut [u8]| self.read_at(offset, buffer);
            pipeline::run(self.steps(at..end), READERS, &fetch, cancel, |piece| match piece {
                Piece::Data { offset, data } => each(offset, data),
                Piece::Zero(_) => Ok(()),
            })?;
            at = end;
        }
        Ok(())
    }

    /// Streams from the preferred target as far as it gives good data.
    fn stream(
        &self,
        at: &mut u64,
        cancel: &AtomicBool,
        each: &mut dyn FnMut(u64, Bytes) -> Result<()>,
    ) -> Result<Streamed> {
        let count = self.readers.len();
        let index = self.preferred.load(Ordering::Relaxed) % count.max(1);
        let Some(reader) = self.readers.get(index) else { return Ok(Streamed::Stuck) };
        let mut failed = None;
        let result = reader.get(count == 1).and_then(|open| {
            open.for_each(*at..self.size, cancel, &mut |offset, data| {
                let end = offset + data.len() as u64;
                each(offset, data).map_err(|e| {
                    failed = Some(e);
                    RepoError::Cancelled
                })?;
                *at = end;
                Ok(())
            })
        });
        match (result, failed) {
            (_, Some(e)) => Err(e),
            (Ok(()), None) => Ok(Streamed::All),
            (Err(RepoError::Cancelled), None) => Err(ExportError::Cancelled),
            (Err(e), None) if is_damage(&e) || count == 1 => {
                tracing::debug!("{} at {at}: {e}", reader.target);
                Ok(Streamed::Stuck)
            }
            (Err(e), None) => {
                self.note(format!("{}: {} from {at} on: {e}", reader.target, self.name));
                self.move_on(index, &e);
                Ok(Streamed::NextTarget)
            }
        }
    }

    /// The pieces of a range to read: stored data only, what lies between is zeros.
    fn steps(&self, range: Range<u64>) -> impl Iterator<Item = Result<Step>> + Send + '_ {
        let (ranges, failed) = match self.data_ranges(&range) {
            Ok(ranges) => (ranges, None),
            Err(e) => (Vec::new(), Some(Err(e))),
        };
        failed.into_iter().chain(ranges.into_iter().flat_map(pieces).map(Ok))
    }
}

/// Cuts a range at piece boundaries.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Step> + Send {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min((at / PIECE + 1) * PIECE);
        let piece = (at < range.end).then_some(Step::Read(at..end));
        at = end;
        piece
    })
}

#[cfg(test)]
mod tests;
