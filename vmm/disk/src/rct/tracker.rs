//! The tracker of one open disk file: what calls what, in which order.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use uuid::Uuid;

use super::header::{EPOCH_END, EPOCH_LIMIT, MAX_IDS, RctHeader, Sealed, Slots};
use super::intent::{WriteIntent, empty_pages};
use super::layout::{Layout, page_offset};
use super::map::EpochMap;
use super::media::{FileStore, Handle, Store};
use super::pair::{self, Pair, Unusable};
use super::rules::{Rule, Rules};
use super::{Continuity, DiskIdentity, RctId};
use crate::block::BlockRange;
use crate::error::{DiskError, Result};

const WRITABLE: u8 = 0;
const READ_ONLY: u8 = 1;
const CLOSED: u8 = 2;

/// The pair of tracking files of one disk file.
///
/// Dropped without [`Tracker::close_clean`] it leaves what a crash leaves; the next open recovers.
pub struct Tracker {
    lineage: Uuid,
    layout: Layout,
    rct: Arc<Handle>,
    pub(super) map: EpochMap,
    intent: WriteIntent,
    header: Mutex<Slots<RctHeader>>,
    /// The header's epoch, for the hot path.
    epoch: AtomicU32,
    /// A write was let through since `next` was announced: the disk carries it.
    written: AtomicBool,
    mode: AtomicU8,
    /// One map flush at a time.
    flushing: Mutex<()>,
    rules: Rules,
}

impl Tracker {
    /// Creates the pair of a new disk file, state CLEAN, first epoch `epoch` (1 for a new lineage; the
    /// parent's epoch + 1 for a child). Durable when this returns; replaces an existing pair.
    pub fn create(disk: &Path, identity: &DiskIdentity, epoch: u32) -> Result<()> {
        pair::create(&FileStore::new(disk), identity, epoch, 0)
    }

    /// Opens the pair for writing and announces `next` as the DataWriteGuid that the caller is about
    /// to set in the disk file. A missing, foreign or damaged pair is made anew and says so; an
    /// unclean one is recovered from the MRT.
    pub fn open(disk: &Path, identity: &DiskIdentity, next: Uuid) -> Result<(Self, Continuity)> {
        Self::open_above(disk, identity, next, 1)
    }

    /// Like [`Tracker::open`]; a pair that has to be made anew starts at `min_epoch` or later. For a
    /// child that is the parent's epoch + 1: its marks must be later than every id below it, or a
    /// merge would hide its changes from them.
    pub fn open_above(
        disk: &Path,
        identity: &DiskIdentity,
        next: Uuid,
        min_epoch: u32,
    ) -> Result<(Self, Continuity)> {
        Self::open_in(&FileStore::new(disk), identity, next, min_epoch, Rules::of(disk))
    }

    /// Opens the pair of a frozen disk for queries only. A pair that cannot answer any query is an
    /// [`DiskError::UnknownRctId`] that says why. Nothing is written.
    pub fn open_read_only(disk: &Path, identity: &DiskIdentity) -> Result<Self> {
        Self::open_read_only_in(&FileStore::new(disk), identity)
    }

    pub(super) fn open_in(
        store: &dyn Store,
        identity: &DiskIdentity,
        next: Uuid,
        min_epoch: u32,
        rules: Rules,
    ) -> Result<(Self, Continuity)> {
        let (pair, continuity) = load_or_create(store, identity, min_epoch)?;
        let recovered = pair.unclean();
        let tracker = Self::begin_session(pair, identity, next, rules)?;
        tracing::debug!(disk = %identity.lineage, epoch = tracker.epoch(), recovered, ?continuity,
            "change tracking open");
        Ok((tracker, continuity))
    }

    pub(super) fn open_read_only_in(store: &dyn Store, identity: &DiskIdentity) -> Result<Self> {
        let pair = Pair::load(store, identity, false).map_err(|e| match e {
            Unusable::Lost { why, .. } => {
                DiskError::UnknownRctId { id: format!("disk {}", identity.lineage), why }
            }
            Unusable::Error(e) => e,
        })?;
        let unclean = pair.unclean();
        let tracker = Self::new(
            pair.layout,
            pair.header,
            pair.rct,
            Arc::clone(&pair.mrt),
            READ_ONLY,
            Rules::default(),
        );
        if unclean {
            tracker.mark_regions(pair.bits.regions(pair.layout.regions()));
        }
        Ok(tracker)
    }

    fn new(
        layout: Layout,
        header: Slots<RctHeader>,
        rct: Arc<Handle>,
        mrt: Arc<Handle>,
        mode: u8,
        rules: Rules,
    ) -> Self {
        let RctHeader { lineage, tracking, epoch, base, sequence, .. } = header.record;
        let regions = if mode == WRITABLE { layout.regions() } else { 0 };
        let lsn = sequence << 32;
        Self {
            lineage,
            layout,
            map: EpochMap::new(Arc::clone(&rct), layout, tracking, base, lsn, rules),
            rct,
            intent: WriteIntent::new(mrt, tracking, regions, rules),
            header: Mutex::new(header),
            epoch: AtomicU32::new(epoch),
            written: AtomicBool::new(false),
            mode: AtomicU8::new(mode),
            flushing: Mutex::default(),
            rules,
        }
    }

    /// Recovers what the last session left and announces this one. Until the header says OPEN under
    /// the new session, a kill leaves the state that was found, and all of this is done again.
    fn begin_session(
        pair: Pair,
        identity: &DiskIdentity,
        next: Uuid,
        rules: Rules,
    ) -> Result<Self> {
        let regions: Vec<u64> = pair.bits.regions(pair.layout.regions()).collect();
        let unclean = pair.unclean();
        let Pair { rct, mrt, header, mut mrt_header, layout, .. } = pair;
        let tracking = header.record.tracking;
        if rules.obey(Rule::SyncWhatWasFound) {
            rct.sync()?;
            mrt.sync()?;
        }
        let tracker = Self::new(layout, header, rct, Arc::clone(&mrt), WRITABLE, rules);
        if unclean {
            tracker.mark_regions(regions.iter().copied());
            tracker.map.flush(Rule::RecoveryBeforeClear)?;
        }
        if !regions.is_empty() {
            mrt.write(&empty_pages(tracking), page_offset(0))?;
        }
        // The .mrt learns of the session first: an .mrt that does not know the .rct's session is then
        // always an older copy, and is not believed.
        let session = Uuid::new_v4();
        let mut record = mrt_header.record.clone();
        record.prev_session = tracker.header.lock().record.session;
        record.session = session;
        mrt_header.write_both(&mrt, &record)?;
        tracker.announce_open(identity, next, session)?;
        Ok(tracker)
    }

    /// Rules `OpenBeforeWrites` and `AnnounceBeforeGuid`: durable before the caller may set `next` in
    /// the disk and issue writes.
    fn announce_open(&self, identity: &DiskIdentity, next: Uuid, session: Uuid) -> Result<()> {
        let mut header = self.header.lock();
        let mut record = header.record.clone();
        record.prev = identity.data_write_guid;
        record.next = next;
        record.clean = false;
        record.session = session;
        if !self.rules.obey(Rule::OpenBeforeWrites) {
            record.clean = true;
        }
        header.write_both(&self.rct, &record)
    }

    fn mark_regions(&self, regions: impl Iterator<Item = u64>) {
        let epoch = self.epoch();
        for region in regions {
            self.map.mark_anew(self.layout.region_granules(region), epoch);
        }
    }

    /// Virtual size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.layout.size()
    }

    /// The current epoch.
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Must return before the write is issued: sets and syncs the MRT bits of the range where needed,
    /// then marks its granules with the current epoch. Hold the guard until the write has completed.
    ///
    /// A failure means that the write must not be issued; nothing is lost by trying again.
    pub fn before_write(&self, offset: u64, len: u64) -> Result<WriteGuard<'_>> {
        let guard = self.enter(offset, len)?;
        self.map.mark(self.layout.granules_of(offset, len), self.epoch());
        Ok(guard)
    }

    /// Merge only: like `before_write`, but marks with `epoch`, the child's mark, where that is later
    /// than what stands; 0 marks nothing and only keeps the regions' bits. The current epoch follows
    /// where it is behind.
    pub fn before_merge_write(&self, offset: u64, len: u64, epoch: u32) -> Result<WriteGuard<'_>> {
        if epoch == 0 {
            return self.enter(offset, len);
        }
        // A child starts behind its parent's ids. An earlier mark comes from tracking that was lost and
        // made anew, and would hide the change from them.
        let last_id = self.header.lock().record.ids.last().map_or(0, |id| id.epoch);
        let epoch = epoch.max(last_id.saturating_add(1));
        // Else a crash would mark the region with an epoch before that of the merged ids.
        if epoch > self.epoch() {
            self.raise_epoch(epoch)?;
        }
        let guard = self.enter(offset, len)?;
        self.map.mark(self.layout.granules_of(offset, len), epoch);
        Ok(guard)
    }

    /// Rule `BitBeforeWrite`, and the count that rule `InFlightKeepsBit` rests on.
    pub(super) fn enter(&self, offset: u64, len: u64) -> Result<WriteGuard<'_>> {
        if !self.layout.contains(offset, len) {
            return Err(DiskError::OutOfRange { offset, len });
        }
        self.writable()?;
        let regions = self.layout.regions_of(offset, len);
        let durable = self.intent.enter(regions.clone());
        let guard = WriteGuard { tracker: self, regions };
        // Again: a close that did not see this write in flight has been seen by it now.
        self.writable()?;
        if !durable {
            self.intent.make_durable(guard.regions.clone())?;
        }
        if !self.written.load(Ordering::Relaxed) {
            self.written.store(true, Ordering::Release);
        }
        Ok(guard)
    }

    fn writable(&self) -> Result<()> {
        match self.mode.load(Ordering::SeqCst) {
            WRITABLE => Ok(()),
            READ_ONLY => Err(DiskError::ReadOnly { path: self.rct.path().to_owned() }),
            _ => Err(DiskError::State(format!("{} is closed", self.rct.path().display()))),
        }
    }

    /// Raises the current epoch to at least `epoch` (a merge brings the child's), durable on return.
    pub fn raise_epoch(&self, epoch: u32) -> Result<()> {
        self.update(|record| {
            record.epoch = record.epoch.max(epoch);
            Ok(())
        })
    }

    /// Ends the current epoch under a new id. Call with I/O drained and the disk flushed; one 4 KiB
    /// sync. A kill before it is durable leaves the old epoch and no id.
    pub fn seal(&self) -> Result<RctId> {
        self.writable()?;
        // Such a write would be marked with the ended epoch and land after it.
        if self.intent.any_in_flight() {
            return Err(DiskError::State(
                "change tracking sealed with writes in flight".to_owned(),
            ));
        }
        let seal = Uuid::new_v4();
        let mut epoch = 0;
        self.update(|record| {
            epoch = record.epoch;
            record.ids.push(Sealed { seal, epoch, time: unix_time() });
            record.epoch += 1;
            drop_oldest(&mut record.ids);
            Ok(())
        })?;
        Ok(RctId { lineage: self.lineage, epoch, seal })
    }

    /// Announces another DataWriteGuid before the caller sets it in the disk file. The one announced
    /// before must be in the disk by now.
    pub fn announce(&self, next: Uuid) -> Result<()> {
        let mut header = self.header.lock();
        self.writable()?;
        let mut record = header.record.clone();
        record.prev = record.next;
        record.next = next;
        let written = self.written.swap(false, Ordering::AcqRel);
        let result = header.write(&self.rct, record);
        if result.is_err() && written {
            self.written.store(true, Ordering::Release);
        }
        result
    }

    /// Sealed ids that can be answered, oldest first.
    pub fn sealed_ids(&self) -> Vec<RctId> {
        let header = self.header.lock();
        header.record.ids.iter().map(|id| self.id(*id)).collect()
    }

    fn id(&self, sealed: Sealed) -> RctId {
        RctId { lineage: self.lineage, epoch: sealed.epoch, seal: sealed.seal }
    }

    /// Takes over sealed ids (of a child that is being merged in), durable on return. The child's
    /// marks must have been merged before; the current epoch moves behind the latest id.
    pub fn adopt_ids(&self, ids: &[RctId]) -> Result<()> {
        if let Some(foreign) = ids.iter().find(|id| id.lineage != self.lineage) {
            let why = format!("it was sealed on another disk than {}", self.lineage);
            return Err(DiskError::UnknownRctId { id: foreign.to_string(), why });
        }
        self.update(|record| {
            for id in ids {
                record.epoch = record.epoch.max(id.epoch.saturating_add(1));
                if record.ids.iter().all(|known| known.seal != id.seal) {
                    record.ids.push(Sealed { seal: id.seal, epoch: id.epoch, time: unix_time() });
                }
            }
            record.ids.sort_by_key(|id| id.epoch);
            drop_oldest(&mut record.ids);
            Ok(())
        })
    }

    /// Drops an id.
    pub fn forget(&self, id: &RctId) -> Result<()> {
        if !self.knows(id) {
            return Ok(());
        }
        self.update(|record| {
            record.ids.retain(|known| known.seal != id.seal);
            Ok(())
        })
    }

    /// Whether `id` is in this pair's table.
    pub fn knows(&self, id: &RctId) -> bool {
        let matches = |known: &Sealed| known.seal == id.seal && known.epoch == id.epoch;
        id.lineage == self.lineage && self.header.lock().record.ids.iter().any(matches)
    }

    /// Changes the header, durably. A record that does not differ is not written.
    fn update(&self, change: impl FnOnce(&mut RctHeader) -> Result<()>) -> Result<()> {
        let mut header = self.header.lock();
        self.writable()?;
        let mut record = header.record.clone();
        change(&mut record)?;
        if record == header.record {
            return Ok(());
        }
        self.put(&mut header, record)
    }

    /// Rules `SealIsDurable` and `SealEndsEpoch`: ids and epoch go to the disk in one page.
    fn put(&self, header: &mut Slots<RctHeader>, mut record: RctHeader) -> Result<()> {
        if record.epoch >= EPOCH_END {
            return Err(DiskError::State(format!(
                "{} has reached the last epoch; stop and start the VM to begin new tracking",
                self.rct.path().display()
            )));
        }
        // Writes have been made under `next`, so the disk carries it. A disk with `prev` that turns up
        // later is an old copy, and lacks what the ids know of.
        if self.written.load(Ordering::Acquire) {
            record.prev = record.next;
        }
        let epoch = record.epoch;
        if !self.rules.obey(Rule::SealEndsEpoch) {
            record.epoch = header.record.epoch;
        }
        let written = if self.rules.obey(Rule::SealIsDurable) {
            header.write(&self.rct, record)
        } else {
            header.record = record;
            Ok(())
        };
        // Also on failure: the new record may have reached the disk, and marks must be later than
        // the ids in it.
        header.record.epoch = epoch;
        self.epoch.store(epoch, Ordering::Release);
        written
    }

    /// Granules of `range` marked later than `epoch`, as merged byte ranges clipped to the disk. A
    /// page of the map that is damaged counts as changed entirely.
    pub fn changed_after(&self, epoch: u32, range: BlockRange) -> Result<Vec<BlockRange>> {
        let Some(len) = range.end.checked_sub(range.start) else {
            return Err(DiskError::OutOfRange { offset: range.start, len: 0 });
        };
        if !self.layout.contains(range.start, len) {
            return Err(DiskError::OutOfRange { offset: range.start, len });
        }
        Ok(self.map.changed_after(epoch, &range))
    }

    /// Writes dirty pages, syncs, and then clears MRT bits of idle regions. The owner calls it every
    /// 30 s, and best once just before it blocks I/O for a seal.
    ///
    /// A kill at any point leaves bits that are set once too often. On error nothing was cleared that
    /// is not durable, and the next call tries again.
    pub fn flush_map(&self) -> Result<()> {
        let _one = self.flushing.lock();
        self.writable()?;
        // First: a write that enters from here on keeps its region's bit.
        let idle = self.intent.begin_window();
        self.map.flush(Rule::PagesBeforeClear)?;
        self.intent.clear(&idle)
    }

    /// Flushes the map and marks the pair CLEAN. Further writes need a new `open`.
    ///
    /// A kill before the header is durable leaves OPEN and what recovery needs. On error the pair
    /// stays open where that is safe, and is closed like by a crash where CLEAN may stand in the file.
    pub fn close_clean(&self) -> Result<()> {
        let _one = self.flushing.lock();
        self.writable()?;
        self.mode.store(CLOSED, Ordering::SeqCst);
        let flushed = self.flush_last();
        if flushed.is_err() {
            self.mode.store(WRITABLE, Ordering::SeqCst);
            return flushed;
        }
        // From here on no write may be let in again, even if this fails.
        let mut header = self.header.lock();
        let mut record = header.record.clone();
        record.clean = true;
        self.put(&mut header, record)
    }

    /// Rule `PagesBeforeClean`.
    fn flush_last(&self) -> Result<()> {
        if self.intent.any_in_flight() {
            return Err(DiskError::State(
                "change tracking closed with writes in flight".to_owned(),
            ));
        }
        self.map.flush(Rule::PagesBeforeClean)
    }
}

fn drop_oldest(ids: &mut Vec<Sealed>) {
    ids.drain(..ids.len().saturating_sub(MAX_IDS));
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The pair as it is, or a new one and why.
fn load_or_create(
    store: &dyn Store,
    identity: &DiskIdentity,
    min_epoch: u32,
) -> Result<(Pair, Continuity)> {
    let (why, last) = match Pair::load(store, identity, true) {
        Ok(pair) => return Ok((pair, Continuity::Kept)),
        Err(Unusable::Lost { why, epoch }) => (why, epoch),
        Err(Unusable::Error(e)) => return Err(e),
    };
    tracing::warn!(disk = %identity.lineage, why, "change tracking starts anew");
    // All granules count as written in the first epoch: nothing is known of them.
    let epoch = (last + 1).max(min_epoch).max(1);
    let epoch = if epoch < EPOCH_LIMIT { epoch } else { 1 };
    pair::create(store, identity, epoch, epoch)?;
    match Pair::load(store, identity, true) {
        Ok(pair) => Ok((pair, Continuity::Lost(why))),
        Err(Unusable::Lost { why, .. }) => Err(DiskError::State(format!(
            "change tracking was made anew and cannot be read back: {why}"
        ))),
        Err(Unusable::Error(e)) => Err(e),
    }
}

/// Keeps a region's MRT bits set while a write is in flight.
pub struct WriteGuard<'a> {
    tracker: &'a Tracker,
    regions: Range<u64>,
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        self.tracker.intent.leave(self.regions.clone());
    }
}
