//! Reading and writing an open file.
//!
//! A block's state changes under the write lock of its stripe, its content is read and written under
//! the read lock, so payload I/O of different places runs side by side. Changes of the block table and
//! of sector bitmaps happen in memory at once, inside one short critical section (`pending`), and reach
//! the file with the next flush:
//!
//! | killed | state of a new block |
//! |---|---|
//! | before the flush's log entry is durable | not there: reads as before (parent or zeros), the file has an unreferenced place that the next open reuses |
//! | after it | there, with all its payload: payload was synced before the entry was written |

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use uuid::Uuid;

use super::bat::{BITMAP_BLOCK, Bat, Payload, Place, Shape, Space};
use super::bitmap::{PAGE_SECTORS, PAGES_PER_CHUNK, Pending};
use super::journal::Journal;
use super::layout::Regions;
use super::log::{ReplayPlan, Update};
use super::metadata::{self, Metadata};
use super::open::{self, Opened, Reader, read_zero_filled};
use super::storage::{self, Storage, write_zeros};
use super::{Access, BlockState, CreateOptions, Kind, ParentLocator, Presence, Properties, create};
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
        Self::from_storage(path, Box::new(file), access)
    }

    /// Opens what lies in `storage`; `path` is for messages.
    pub(crate) fn from_storage(
        path: &Path,
        storage: Box<dyn Storage>,
        access: Access,
    ) -> Result<Self> {
        let Opened { mut journal, regions, metadata, shape, bat, space, file_len, replay } =
            open::open(path, &*storage, access)?;
        if access == Access::ReadWrite {
            // Before the first change of any kind, as the format demands.
            journal.set_header(&*storage, |h| h.file_write_guid = Uuid::new_v4())?;
        }
        Ok(Self {
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
            #[cfg(test)]
            reuse_early: false,
        })
    }

    /// Makes every flush take several log entries.
    #[cfg(test)]
    pub(crate) fn limit_log_entries(&self, pages: usize) {
        self.journal.lock().page_limit = pages;
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
    /// succeed without the lost pages: no more promises.
    fn or_fail<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|_| self.failed.store(true, Ordering::Release))
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

    /// Writes; allocates blocks (partial ones in a differencing file) as needed. No sync.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _writable = self.writable()?;
        self.check_range(offset, buf.len() as u64)?;
        for (block, within, at, n) in self.pieces(offset, buf.len() as u64) {
            self.write_block(block, within, &buf[at as usize..(at + n) as usize])?;
        }
        Ok(())
    }

    fn write_block(&self, block: u64, within: u64, data: &[u8]) -> Result<()> {
        {
            let _guard = self.stripe(block).read();
            let payload = self.bat.payload(&self.shape, block);
            let in_place = match payload.state {
                BlockState::Full => true,
                BlockState::Partial => {
                    self.runs(block, within, data.len() as u64)?.iter().all(|(_, present)| *present)
                }
                _ => false,
            };
            if in_place {
                return self.write_payload(data, payload.offset + within);
            }
        }
        let _guard = self.stripe(block).write();
        // Another thread may have been faster.
        let payload = self.bat.payload(&self.shape, block);
        match payload.state {
            BlockState::Full => self.write_payload(data, payload.offset + within),
            BlockState::Partial => {
                self.write_payload(data, payload.offset + within)?;
                self.mark_present(block, within, data.len() as u64, payload);
                Ok(())
            }
            BlockState::Zero => self.allocate_full(block, within, data),
            BlockState::NotPresent if self.kind != Kind::Differencing => {
                self.allocate_full(block, within, data)
            }
            BlockState::NotPresent if data.len() as u64 == self.shape.block_size => {
                self.allocate_full(block, within, data)
            }
            BlockState::NotPresent => self.allocate_partial(block, within, data),
        }
    }

    fn write_payload(&self, data: &[u8], offset: u64) -> Result<()> {
        let written = self.storage.write_all_at(data, offset).map_err(self.io("write"));
        // After the write: a flush that begins once this write has completed must see it.
        self.unsynced.store(true, Ordering::Release);
        written
    }

    /// A place for a block, inside the file.
    fn place(&self) -> Result<Place> {
        let place = self.space.lock().take_block();
        let made = self.grow(place.offset + self.shape.block_size);
        made.inspect_err(|_| self.space.lock().give_back(place.offset))?;
        Ok(place)
    }

    fn grow(&self, end: u64) -> Result<()> {
        let mut len = self.file_len.lock();
        if end > *len {
            self.storage.set_len(end).map_err(self.io("extend"))?;
            *len = end;
        }
        Ok(())
    }

    /// A new block whose other sectors read as zeros.
    fn allocate_full(&self, block: u64, within: u64, data: &[u8]) -> Result<()> {
        let place = self.place()?;
        let whole = data.len() as u64 == self.shape.block_size;
        let cleared = if place.used && !whole {
            self.storage
                .punch(place.offset, self.shape.block_size)
                .map_err(self.io("clear a block of"))
        } else {
            Ok(())
        };
        let written = cleared.and_then(|()| self.write_payload(data, place.offset + within));
        written.inspect_err(|_| self.space.lock().give_back(place.offset))?;
        let mut pending = self.pending.write();
        let payload = Payload { state: BlockState::Full, offset: place.offset };
        self.set_payload(&mut pending, block, payload);
        Ok(())
    }

    /// A new block that holds only the written sectors.
    fn allocate_partial(&self, block: u64, within: u64, data: &[u8]) -> Result<()> {
        if self.pending.read().released.contains(&block) {
            // The file's table may still give the block's old place as partial. A flush that takes
            // several log entries would put the new bits beside it, and a kill between them leaves
            // sectors that were never written.
            self.flush_pending()?;
        }
        self.load_bitmap(block)?;
        let bitmap = match self.bat.bitmap(&self.shape, block) {
            Some(_) => None,
            None => Some(self.allocate_bitmap()?),
        };
        let place = self.place()?;
        let written = self.write_payload(data, place.offset + within);
        written.inspect_err(|_| self.space.lock().give_back(place.offset))?;
        let mut pending = self.pending.write();
        if let Some(offset) = bitmap
            && self.bat.bitmap(&self.shape, block).is_none()
        {
            self.bat.set_bitmap(&self.shape, block, offset);
            pending.dirty_bat.insert(self.shape.bitmap_index(block) / 512);
        }
        // Bits of an earlier life of this block may still be set.
        pending.set(self.sectors(block), false);
        drop(pending);
        self.mark_present(
            block,
            within,
            data.len() as u64,
            Payload { state: BlockState::Partial, offset: place.offset },
        );
        Ok(())
    }

    /// A sector bitmap block at the end of the file, all zero. If another thread gives the chunk one at
    /// the same time, this one stays unused until the next open.
    fn allocate_bitmap(&self) -> Result<u64> {
        let place = self.space.lock().take_end(BITMAP_BLOCK);
        self.grow(place.offset + BITMAP_BLOCK)?;
        self.storage.reserve(place.offset, BITMAP_BLOCK).map_err(self.io("extend"))?;
        Ok(place.offset)
    }

    /// Records that the sectors are in this file; a block that has them all becomes full. The block's
    /// stripe is held for writing and the data has been written: a flush in between logs either none
    /// of it or all of it.
    fn mark_present(&self, block: u64, within: u64, len: u64, payload: Payload) {
        let sector = self.shape.sector;
        let first = (block * self.shape.block_size + within) / sector;
        let mut pending = self.pending.write();
        pending.set(first..first + len / sector, true);
        let full = pending.all(self.sectors(block));
        let state = if full { BlockState::Full } else { BlockState::Partial };
        if self.bat.payload(&self.shape, block) != (Payload { state, ..payload }) {
            self.set_payload(&mut pending, block, Payload { state, ..payload });
        }
    }

    fn set_payload(&self, pending: &mut Pending, block: u64, payload: Payload) {
        self.bat.set_payload(&self.shape, block, payload);
        pending.dirty_bat.insert(self.shape.payload_index(block) / 512);
    }

    /// Makes the range read as zeros; whole blocks become ZERO and free their space.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let _writable = self.writable()?;
        self.check_range(offset, len)?;
        for (block, within, _, n) in self.pieces(offset, len) {
            let start = block * self.shape.block_size;
            let whole = n == self.shape.block_size.min(self.shape.size - start);
            if whole && self.kind != Kind::Fixed {
                self.zero_block(block);
            } else {
                self.zero_part(block, within, n)?;
            }
        }
        Ok(())
    }

    fn zero_block(&self, block: u64) {
        let _guard = self.stripe(block).write();
        let payload = self.bat.payload(&self.shape, block);
        match payload.state {
            BlockState::Zero => return,
            BlockState::NotPresent if self.kind != Kind::Differencing => return,
            _ => {}
        }
        let mut pending = self.pending.write();
        // In a differencing file never NOT_PRESENT: that would bring the parent's data back.
        self.set_payload(&mut pending, block, Payload { state: BlockState::Zero, offset: 0 });
        self.free_later(&mut pending, payload);
    }

    /// A block has left its place, which may be used again when the log says so.
    fn free_later(&self, pending: &mut Pending, payload: Payload) {
        if !matches!(payload.state, BlockState::Full | BlockState::Partial) {
            return;
        }
        #[cfg(test)]
        if self.reuse_early {
            return self.space.lock().give_back(payload.offset);
        }
        pending.freed.push(payload.offset);
    }

    fn zero_part(&self, block: u64, within: u64, len: u64) -> Result<()> {
        {
            let _guard = self.stripe(block).read();
            let payload = self.bat.payload(&self.shape, block);
            match payload.state {
                BlockState::Zero => return Ok(()),
                BlockState::NotPresent if self.kind != Kind::Differencing => return Ok(()),
                BlockState::Full => {
                    let zeroed = write_zeros(&*self.storage, payload.offset + within, len);
                    self.unsynced.store(true, Ordering::Release);
                    return zeroed.map_err(self.io("write"));
                }
                _ => {}
            }
        }
        let zeros = vec![0; len.min(1 << 20) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len() as u64);
            self.write_block(block, within + done, &zeros[..n as usize])?;
            done += n;
        }
        Ok(())
    }

    /// Makes completed writes and their metadata durable: at most two syncs (two more at the first new
    /// block after an open).
    pub fn flush(&self) -> Result<()> {
        let _writable = self.writable()?;
        self.flush_pending()
    }

    fn flush_pending(&self) -> Result<()> {
        // Held throughout: a flush that finds nothing to do must still wait for the one that does it,
        // and share its failure.
        let mut journal = self.journal.lock();
        self.check_failed()?;
        let (updates, freed) = self.take_pending();
        if !self.unsynced.swap(false, Ordering::AcqRel) && updates.is_empty() {
            return Ok(());
        }
        self.sync_and_commit(&mut journal, &updates)?;
        // Only now does no durable table entry point at these places any more.
        let mut space = self.space.lock();
        freed.into_iter().for_each(|offset| space.give_back(offset));
        Ok(())
    }

    /// Syncs payload, and the pages that the commit before put in place; then commits.
    fn sync_and_commit(&self, journal: &mut Journal, updates: &[Update]) -> Result<()> {
        let stable = self.storage.len().map_err(self.io("examine"))?;
        let done = self.storage.sync().map_err(self.io("sync")).and_then(|()| {
            let end = self.space.lock().end();
            journal.commit(&*self.storage, updates, stable, end)
        });
        self.or_fail(done)
    }

    /// The metadata pages to log, in an order that holds should they need several log entries. Bitmaps
    /// come before the table: a block's bits are there before the table points at it (a block becomes
    /// partial only from NOT_PRESENT, in which state nobody looks at its bits). The table goes
    /// backwards: a chunk's bitmap entry follows its blocks', and no partial block may lack it.
    fn take_pending(&self) -> (Vec<Update>, Vec<u64>) {
        let mut pending = self.pending.write();
        pending.released.clear();
        let bitmaps = std::mem::take(&mut pending.dirty_bitmap);
        let tables = std::mem::take(&mut pending.dirty_bat);
        let mut updates = Vec::with_capacity(bitmaps.len() + tables.len());
        for number in bitmaps {
            if let (Some(offset), Some(page)) =
                (self.bitmap_page_offset(number), pending.page(number))
            {
                updates.push(Update::Data { offset, page: Box::new(*page) });
            }
        }
        for number in tables.into_iter().rev() {
            let offset = self.regions.bat.offset + number * 4096;
            updates.push(Update::Data { offset, page: self.bat.page(number) });
        }
        (updates, std::mem::take(&mut pending.freed))
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

    /// Merge only: sets the blocks to NOT_PRESENT, durable when this returns. Their content must
    /// already be durable in the parent, or guest data is lost.
    pub fn release_blocks(&self, indices: &[u64]) -> Result<()> {
        let _writable = self.writable()?;
        for &block in indices {
            let _guard = self.stripe(block).write();
            let payload = self.bat.payload(&self.shape, block);
            let mut pending = self.pending.write();
            self.set_payload(
                &mut pending,
                block,
                Payload { state: BlockState::NotPresent, offset: 0 },
            );
            pending.released.insert(block);
            self.free_later(&mut pending, payload);
        }
        self.flush_pending()
    }

    /// Sets a new DataWriteGuid in both headers, durable when this returns. The caller has announced
    /// it in the tracking files and, during a merge, in the child's `linkage2`.
    pub fn set_data_write_guid(&self, guid: Uuid) -> Result<()> {
        let _writable = self.writable()?;
        let mut journal = self.journal.lock();
        self.check_failed()?;
        self.or_fail(journal.set_header(&*self.storage, |h| h.data_write_guid = guid))
    }

    /// Rewrites the parent locator through the log, durable when this returns.
    pub fn set_parent(&self, locator: &ParentLocator) -> Result<()> {
        let _writable = self.writable()?;
        self.flush_pending()?;
        let mut journal = self.journal.lock();
        self.check_failed()?;
        let bad = |what: String| DiskError::corrupt(&self.path, what);
        let region = self.regions.metadata;
        let reader = Reader { path: &self.path, storage: &*self.storage, replay: None };
        let mut bytes = reader.read(region.offset, region.len as usize)?;
        let old = bytes.clone();
        metadata::replace_locator(&mut bytes, locator).map_err(bad)?;
        let updates: Vec<_> = bytes
            .chunks_exact(4096)
            .zip(old.chunks_exact(4096))
            .enumerate()
            .filter(|(_, (new, old))| new != old)
            .map(|(i, (new, _))| {
                let mut page = Box::new([0; 4096]);
                page.copy_from_slice(new);
                Update::Data { offset: region.offset + i as u64 * 4096, page }
            })
            .collect();
        if !journal.fits(&updates) {
            return Err(DiskError::State(format!(
                "{}: the log is too small for the parent locator",
                self.path.display()
            )));
        }
        self.sync_and_commit(&mut journal, &updates)?;
        self.metadata.write().parent = Some(locator.clone());
        Ok(())
    }

    /// Flushes and empties the log, so that tools which do not replay logs read the file right.
    pub fn make_clean(&self) -> Result<()> {
        let _writable = self.writable()?;
        self.clean()
    }

    fn clean(&self) -> Result<()> {
        self.flush_pending()?;
        let mut journal = self.journal.lock();
        self.check_failed()?;
        let synced = self.storage.sync().map_err(self.io("sync"));
        self.or_fail(synced.and_then(|()| journal.close_log(&*self.storage)))
    }

    /// Ends writing: clean, read-only from now on, the lock shared with other readers.
    pub fn freeze(&self) -> Result<()> {
        drop(self.writable()?);
        // Waits for writes on their way; later ones are refused.
        let mut access = self.access.write();
        self.clean()?;
        *access = Access::ReadOnly;
        match self.storage.lock(Access::ReadOnly).map_err(self.io("lock"))? {
            true => Ok(()),
            // Changing a lock lets go of it for a moment.
            false => Err(DiskError::Busy { path: self.path.clone() }),
        }
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
