//! Reading and writing an open file.
//!
//! A block's state changes under the write lock of its stripe, its content is read and written under
//! the read lock, so payload I/O of different places runs side by side. Changes of the block table and
//! of sector bitmaps happen in memory at once, inside one short critical section (`pending`), and reach
//! the file with the next flush:
//!
//! | killed | state of a new block |
//! |---|---|
//! | before it is acknowledged | there or not: reads as before (parent or zeros), the file may have an unreferenced place that the next open reuses |
//! | acknowledged, before the flush's log entry is durable | after the death of the process alone: there, by the pending file; after a power cut as before |
//! | after it | there, with all its payload: payload was synced before the entry was written |

mod commit;
mod compact;
mod place;
mod resize;
mod write;

pub use compact::{CompactPlan, CompactProgress};

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use uuid::Uuid;

use super::bat::{Bat, Shape, Space};
use super::bitmap::{PAGE_SECTORS, PAGES_PER_CHUNK, Pending};
use super::journal::Journal;
use super::layout::Regions;
use super::log::ReplayPlan;
use super::metadata::Metadata;
use super::open::{self, Opened, Reader, read_zero_filled};
use super::pending_file::{Beside, Change, Identity, PendingFile, Place, pending_path};
use super::storage::{self, Storage};
use super::{Access, BlockState, CreateOptions, Kind, Presence, Properties, create};
use crate::block::BlockRange;
use crate::error::{DiskError, Result};

/// Block locks; blocks share them by number.
const STRIPES: usize = 256;

/// One open VHDX file. All methods are safe to call from many threads; per-block locks make each
/// block's state change atomic against reads and writes of that block.
pub struct Vhdx {
    path: PathBuf,
    storage: Box<dyn Storage>,
    access: RwLock<Access>,
    regions: Regions,
    metadata: RwLock<Metadata>,
    shape: Shape,
    kind: Kind,
    bat: Bat,
    stripes: Vec<RwLock<()>>,
    pending: RwLock<Pending>,
    space: Mutex<Space>,
    file_len: Mutex<u64>,
    journal: Mutex<Journal>,
    replay: Option<ReplayPlan>,
    /// A killed writer left changes in the pending file.
    recovered: bool,
    /// Payload was written since the last sync began.
    unsynced: AtomicBool,
    /// A sync or metadata write failed: what is on disk is unknown, nothing more may be promised.
    failed: AtomicBool,
    /// A fault that crash tests must notice.
    #[cfg(test)]
    pub(crate) reuse_early: bool,
}

impl Vhdx {
    /// Creates a new file, durable when this returns; fails if `path` exists.
    pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
        create::create(path, options)
    }

    /// Opens a file under a lock that lives as long as this value (exclusive for writing, shared for
    /// reading).
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let file = storage::open(path, access)?;
        let identity = Identity::of(&file).map_err(|e| DiskError::io("examine", path, e))?;
        if identity.is_none() {
            let disk = path.display();
            tracing::warn!(%disk, "no boot id: the death of the writer will be like a power cut");
        }
        let place: Box<dyn Place> = Box::new(Beside(pending_path(path)));
        Self::from_parts(path, Box::new(file), identity.map(|i| (place, i)), access)
    }

    /// Opens what lies in `storage`, without a pending file; `path` is for messages.
    #[cfg(test)]
    pub(crate) fn from_storage(
        path: &Path,
        storage: Box<dyn Storage>,
        access: Access,
    ) -> Result<Self> {
        Self::from_parts(path, storage, None, access)
    }

    /// Opens what lies in `storage`, with what a killed writer left in the pending file.
    ///
    /// Killed in it: the log is replayed again and the pending file is applied again, until it is
    /// removed, and then all of it has been committed.
    pub(crate) fn from_parts(
        path: &Path,
        storage: Box<dyn Storage>,
        beside: Option<(Box<dyn Place>, Identity)>,
        access: Access,
    ) -> Result<Self> {
        let guid = Uuid::new_v4();
        let source = beside.as_ref().map(|(place, identity)| (&**place, *identity));
        let Opened { mut journal, regions, metadata, shape, bat, space, file_len, replay, changes } =
            open::open(path, &*storage, source, access, guid)?;
        if access == Access::ReadWrite {
            if super::repair::mend_region_tables(path, &*storage)? {
                tracing::warn!(disk = %path.display(), "a torn region table was written anew");
            }
            // Before the first change of any kind, as the format demands.
            journal.set_header(&*storage, |h| h.file_write_guid = guid)?;
        }
        let recovered = !changes.is_empty();
        let disk = Self {
            path: path.to_owned(),
            storage,
            access: RwLock::new(access),
            regions,
            kind: metadata.kind,
            metadata: RwLock::new(metadata),
            shape,
            bat,
            stripes: (0..STRIPES).map(|_| RwLock::new(())).collect(),
            pending: RwLock::new(Pending::default()),
            space: Mutex::new(space),
            file_len: Mutex::new(file_len),
            journal: Mutex::new(journal),
            replay,
            unsynced: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            recovered,
            #[cfg(test)]
            reuse_early: false,
        };
        disk.take_over(&changes)?;
        if let (Access::ReadWrite, Some((place, identity))) = (access, beside) {
            place.remove().map_err(disk.io("remove the pending file of"))?;
            disk.pending.write().file = Some(PendingFile::new(place, identity, guid));
        }
        Ok(disk)
    }

    /// Takes the changes of a killed writer over, durably with write access, otherwise in memory.
    fn take_over(&self, changes: &[Change]) -> Result<()> {
        for change in changes {
            if let Change::Sectors { first, .. } = change {
                self.load_bitmap(first / self.shape.sectors_per_block())?;
            }
        }
        self.apply(&mut self.pending.write(), changes);
        if self.recovered && *self.access.read() == Access::ReadWrite {
            // Payload first, as always: it is in the page cache, and perhaps only there.
            self.flush_pending()?;
        }
        Ok(())
    }

    /// Makes every flush take several log entries.
    #[cfg(test)]
    pub(crate) fn limit_log_entries(&self, pages: usize) {
        self.journal.lock().page_limit = pages;
    }

    /// Ends as the death of the process does: nothing more is written.
    #[cfg(test)]
    pub(crate) fn abandon(self) {
        self.failed.store(true, Ordering::Release);
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file is, with its current GUIDs.
    pub fn properties(&self) -> Properties {
        let header = self.journal.lock().header().clone();
        let metadata = self.metadata.read();
        Properties {
            geometry: metadata.geometry,
            block_size: metadata.block_size,
            kind: metadata.kind,
            disk_id: metadata.disk_id,
            file_write_guid: header.file_write_guid,
            data_write_guid: header.data_write_guid,
            parent: metadata.parent.clone(),
        }
    }

    /// Number of payload blocks.
    pub fn blocks(&self) -> u64 {
        self.shape.blocks
    }

    /// Whether a writable open will replay the log.
    pub fn needs_replay(&self) -> bool {
        self.replay.is_some()
    }

    /// Whether the open found changes that a killed writer had acknowledged and not committed. They are
    /// there: in memory only after a read-only open.
    pub fn has_recovered(&self) -> bool {
        self.recovered
    }

    /// Makes what any process wrote to the file durable as far as the page cache holds it.
    pub(crate) fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(self.io("sync"))
    }

    /// The state of payload block `index`.
    pub fn block_state(&self, index: u64) -> BlockState {
        self.bat.payload(&self.shape, index).state
    }

    fn stripe(&self, block: u64) -> &RwLock<()> {
        &self.stripes[(block % STRIPES as u64) as usize]
    }

    fn io(&self, op: &'static str) -> impl Fn(std::io::Error) -> DiskError + '_ {
        move |e| DiskError::io(op, &self.path, e)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let sector = self.shape.sector;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.shape.size);
        if !inside || !offset.is_multiple_of(sector) || !len.is_multiple_of(sector) {
            return Err(DiskError::OutOfRange { offset, len });
        }
        Ok(())
    }

    /// Held by everything that writes: [`Vhdx::freeze`] waits for it.
    fn writable(&self) -> Result<RwLockReadGuard<'_, Access>> {
        let access = self.access.read();
        if *access == Access::ReadOnly {
            return Err(DiskError::ReadOnly { path: self.path.clone() });
        }
        self.check_failed()?;
        Ok(access)
    }

    fn check_failed(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(DiskError::State(format!(
                "{}: an earlier write of metadata failed; close the disk and open it again",
                self.path.display()
            )));
        }
        Ok(())
    }

    /// After a failed sync or header write it is unknown what is on disk, and a later sync may well
    /// succeed without the lost pages: no more promises. The pending file goes too: payload that it
    /// points at may be lost. The next open finds what the last good flush left.
    fn or_fail<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|_| {
            self.failed.store(true, Ordering::Release);
            if let Some(mut file) = self.pending.write().file.take()
                && let Err(error) = file.discard()
            {
                tracing::error!(disk = %self.path.display(), %error, "pending file not removed");
            }
        })
    }

    /// The parts of a range, one per block: block, offset in the block, offset in the range, length.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, u64, u64)> {
        let block_size = self.shape.block_size;
        let mut at = offset;
        std::iter::from_fn(move || {
            let left = offset + len - at;
            (left > 0).then(|| {
                let (block, within) = (at / block_size, at % block_size);
                let n = left.min(block_size - within);
                let piece = (block, within, at - offset, n);
                at += n;
                piece
            })
        })
    }

    /// Reads what this file holds of the range into `buf` (zeros included) and returns the sub-ranges
    /// it does not hold, which the caller reads from the parent. `buf` is untouched there.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<Vec<BlockRange>> {
        self.check_range(offset, buf.len() as u64)?;
        let mut absent: Vec<BlockRange> = Vec::new();
        for (block, within, at, n) in self.pieces(offset, buf.len() as u64) {
            let piece = &mut buf[at as usize..(at + n) as usize];
            let _guard = self.stripe(block).read();
            let payload = self.bat.payload(&self.shape, block);
            match payload.state {
                BlockState::NotPresent if self.kind == Kind::Differencing => {
                    push_range(&mut absent, offset + at..offset + at + n);
                }
                BlockState::NotPresent | BlockState::Zero => piece.fill(0),
                BlockState::Full => self.read_payload(piece, payload.offset + within)?,
                BlockState::Partial => {
                    let begin = block * self.shape.block_size;
                    for (run, present) in self.runs(block, within, n)? {
                        if present {
                            let from = (run.start - begin - within) as usize;
                            let to = (run.end - begin - within) as usize;
                            self.read_payload(
                                &mut piece[from..to],
                                payload.offset + run.start - begin,
                            )?;
                        } else {
                            push_range(&mut absent, run);
                        }
                    }
                }
            }
        }
        Ok(absent)
    }

    fn read_payload(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let read = match self.replay {
            // The replay grows the file in memory only.
            Some(_) => read_zero_filled(&*self.storage, buf, offset),
            None => self.storage.read_exact_at(buf, offset),
        };
        read.map_err(self.io("read"))
    }

    /// Runs of a partial block's range, as byte ranges of the disk, and whether this file holds them.
    fn runs(&self, block: u64, within: u64, len: u64) -> Result<Vec<(BlockRange, bool)>> {
        self.load_bitmap(block)?;
        let sector = self.shape.sector;
        let begin = block * self.shape.block_size + within;
        let runs = self.pending.read().runs(begin / sector..(begin + len) / sector);
        Ok(runs.into_iter().map(|(r, p)| (r.start * sector..r.end * sector, p)).collect())
    }

    /// Sectors of a block, as the bitmaps number them.
    fn sectors(&self, block: u64) -> std::ops::Range<u64> {
        let n = self.shape.sectors_per_block();
        block * n..(block + 1) * n
    }

    /// Brings a block's bitmap pages into memory.
    fn load_bitmap(&self, block: u64) -> Result<()> {
        let sectors = self.sectors(block);
        for page in sectors.start / PAGE_SECTORS..sectors.end.div_ceil(PAGE_SECTORS) {
            if self.pending.read().has_page(page) {
                continue;
            }
            let mut bytes = Box::new([0; 4096]);
            if let Some(offset) = self.bitmap_page_offset(page) {
                let reader = Reader {
                    path: &self.path,
                    storage: &*self.storage,
                    replay: self.replay.as_ref(),
                };
                bytes.copy_from_slice(&reader.read(offset, 4096)?);
            }
            self.pending.write().insert_page(page, bytes);
        }
        Ok(())
    }

    /// Where a bitmap page lies in the file, if its chunk has a bitmap.
    fn bitmap_page_offset(&self, page: u64) -> Option<u64> {
        let block = page / PAGES_PER_CHUNK * self.shape.chunk_ratio;
        let bitmap = self.bat.bitmap(&self.shape, block)?;
        Some(bitmap + page % PAGES_PER_CHUNK * 4096)
    }

    /// What this file itself holds of the range: in order, without gaps, neighbours differ.
    pub fn presence(&self, offset: u64, len: u64) -> Result<Vec<(BlockRange, Presence)>> {
        self.check_range(offset, len)?;
        let mut found: Vec<(BlockRange, Presence)> = Vec::new();
        let mut push = |range: BlockRange, presence| match found.last_mut() {
            Some((last, p)) if *p == presence => last.end = range.end,
            _ => found.push((range, presence)),
        };
        for (block, within, at, n) in self.pieces(offset, len) {
            let range = offset + at..offset + at + n;
            let _guard = self.stripe(block).read();
            match self.bat.payload(&self.shape, block).state {
                BlockState::NotPresent => push(range, Presence::Absent),
                BlockState::Zero => push(range, Presence::Zero),
                BlockState::Full => push(range, Presence::Data),
                BlockState::Partial => {
                    for (run, present) in self.runs(block, within, n)? {
                        push(run, if present { Presence::Data } else { Presence::Absent });
                    }
                }
            }
        }
        Ok(found)
    }
}

impl Drop for Vhdx {
    fn drop(&mut self) {
        if *self.access.get_mut() == Access::ReadWrite && !*self.failed.get_mut() {
            // Best effort: without it the next open replays the log, and unflushed writes are lost as
            // after a power cut.
            let _ = self.clean();
        }
    }
}

/// Appends a range, joined to the last one where they touch.
fn push_range(ranges: &mut Vec<BlockRange>, range: BlockRange) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
