//! The write-intent bitmap of the `.mrt`: which regions may have been written without their marks
//! being durable yet.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex, MutexGuard};
use uuid::Uuid;

use super::header::read_u32;
use super::layout::{BITMAP_BYTES, BITMAP_PAGES, PAGE, PAGE_HEAD, page_offset};
use super::map::{page_crc, seal_page};
use super::media::Handle;
use super::rules::{Rule, Rules};
use crate::error::{DiskError, Result};

/// The region's bit is durable in the file.
const DURABLE: u32 = 1 << 31;
/// A write entered since the last flush window began.
const TOUCHED: u32 = 1 << 30;
/// Windows without a write, up to [`IDLE_WINDOWS`].
const IDLE_UNIT: u32 = 1 << 24;
const IDLE: u32 = 3 * IDLE_UNIT;
/// Windows without a write after which a bit is cleared. Fewer and a steady writer pays a sync per
/// window and region; more and a crash re-reads more.
const IDLE_WINDOWS: u32 = 2;
/// Writes between their first step and their end.
const IN_FLIGHT: u32 = IDLE_UNIT - 1;

/// The bitmap of one open `.mrt`. One word per region holds everything that decides whether its bit
/// may be cleared, so that a write's entry and a clear exclude each other by one atomic operation.
pub(super) struct WriteIntent {
    file: Arc<Handle>,
    tracking: Uuid,
    words: Vec<AtomicU32>,
    commit: Mutex<Commit>,
    settled: Condvar,
    lsn: AtomicU64,
    rules: Rules,
}

/// The bitmap as it should be in the file, and who is writing it.
struct Commit {
    bitmap: Box<[u8]>,
    /// Pages, one bit each, that the next group writes.
    pages: u32,
    /// Someone writes pages. All writes to the file happen under it: an older image that lands after
    /// a newer one would take a durable bit away.
    busy: bool,
    /// First touches that wait for the next sync.
    group: Arc<Group>,
}

/// First touches that one sync serves, and how it went.
#[derive(Default)]
struct Group {
    outcome: OnceLock<std::result::Result<(), Failure>>,
}

/// An error that many waiters share.
struct Failure {
    op: &'static str,
    kind: io::ErrorKind,
    os: Option<i32>,
}

/// The bits found in a file.
pub(super) struct FoundBits {
    bitmap: Box<[u8]>,
}

impl FoundBits {
    /// Reads the bitmap; all bits of a page that is damaged or unreadable count as set.
    pub(super) fn read(file: &Handle, tracking: Uuid) -> Self {
        let mut bitmap = vec![0; BITMAP_PAGES * BITMAP_BYTES].into_boxed_slice();
        for (number, bits) in (0..).zip(bitmap.chunks_exact_mut(BITMAP_BYTES)) {
            let mut page = [0; PAGE];
            let valid = file.read(&mut page, page_offset(number)).is_ok()
                && read_u32(&page, 0) == page_crc(&page, tracking)
                && u64::from(read_u32(&page, 4)) == number;
            if valid {
                bits.copy_from_slice(&page[PAGE_HEAD..]);
            } else {
                bits.fill(0xFF);
            }
        }
        Self { bitmap }
    }

    /// The set regions of a disk with `regions`.
    pub(super) fn regions(&self, regions: u64) -> impl Iterator<Item = u64> {
        (0..regions).filter(|&r| self.bitmap[(r / 8) as usize] & (1 << (r % 8)) != 0)
    }
}

/// The bitmap pages of a file without a set bit.
pub(super) fn empty_pages(tracking: Uuid) -> Vec<u8> {
    let mut pages = vec![0; BITMAP_PAGES * PAGE];
    for (number, page) in (0..).zip(pages.chunks_exact_mut(PAGE)) {
        seal_page(page, tracking, number, 0);
    }
    pages
}

impl WriteIntent {
    /// The bitmap of a session that begins: no bit is set, whatever the file holds.
    pub(super) fn new(file: Arc<Handle>, tracking: Uuid, regions: u64, rules: Rules) -> Self {
        Self {
            file,
            tracking,
            words: (0..regions).map(|_| AtomicU32::new(0)).collect(),
            commit: Mutex::new(Commit {
                bitmap: vec![0; BITMAP_PAGES * BITMAP_BYTES].into_boxed_slice(),
                pages: 0,
                busy: false,
                group: Arc::default(),
            }),
            settled: Condvar::new(),
            lsn: AtomicU64::new(0),
            rules,
        }
    }

    fn of(&self, regions: Range<u64>) -> &[AtomicU32] {
        &self.words[regions.start as usize..regions.end as usize]
    }

    /// Counts a write in; from here to `leave` no bit of its regions is cleared. Returns whether all
    /// of them are durable: then nothing else is needed, and no lock was taken.
    pub(super) fn enter(&self, regions: Range<u64>) -> bool {
        let mut durable = true;
        for word in self.of(regions) {
            let before = word.fetch_add(1, Ordering::AcqRel);
            if before & TOUCHED == 0 {
                word.fetch_or(TOUCHED, Ordering::AcqRel);
            }
            durable &= before & DURABLE != 0;
        }
        durable
    }

    /// Counts a write out.
    pub(super) fn leave(&self, regions: Range<u64>) {
        for word in self.of(regions) {
            // Releases the write's marks to the flush that finds it gone.
            word.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Whether any write is between `enter` and `leave`.
    pub(super) fn any_in_flight(&self) -> bool {
        self.words.iter().any(|word| word.load(Ordering::Acquire) & IN_FLIGHT != 0)
    }

    /// Sets the bits of regions that the caller has entered and returns when they are durable. First
    /// touches that come while a sync runs share the next one.
    pub(super) fn make_durable(&self, regions: Range<u64>) -> Result<()> {
        let mut commit = self.commit.lock();
        let missing = |r: &u64| self.words[*r as usize].load(Ordering::Acquire) & DURABLE == 0;
        let missing: Vec<u64> = regions.filter(missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        for &region in &missing {
            commit.bitmap[(region / 8) as usize] |= 1 << (region % 8);
            commit.pages |= 1 << page_of(region);
        }
        let group = Arc::clone(&commit.group);
        loop {
            match group.outcome.get() {
                Some(Ok(())) => break,
                Some(Err(failure)) => return Err(failure.error(&self.file)),
                None if commit.busy => self.settled.wait(&mut commit),
                // Nobody writes, so this group is the one that still collects: lead it.
                None => self.lead(&mut commit),
            }
        }
        drop(commit);
        for region in missing {
            // This write has been counted in since before the bit was set: it cannot have gone.
            self.words[region as usize].fetch_or(DURABLE, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Writes and syncs for the group that collects now. A kill in here leaves some of the new bits
    /// set: their writes were never issued, and their regions are read once too often.
    fn lead(&self, commit: &mut MutexGuard<'_, Commit>) {
        let group = std::mem::take(&mut commit.group);
        let pages = std::mem::take(&mut commit.pages);
        let result = self.write_pages(commit, pages, true);
        if result.is_err() {
            // The kernel may have dropped the pages after a failed sync: write them all again.
            commit.pages |= pages;
        }
        let _ = group.outcome.set(result);
    }

    /// Begins a flush window: returns the regions whose bits may go once the map is durable.
    pub(super) fn begin_window(&self) -> Vec<u64> {
        let busy = self.busy();
        let mut idle = Vec::new();
        for (region, word) in (0..).zip(&self.words) {
            let aged = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| match w {
                w if w & DURABLE == 0 => None,
                w if w & busy != 0 => Some(w & !(TOUCHED | IDLE)),
                w if w & IDLE >= IDLE_WINDOWS * IDLE_UNIT => None,
                w => Some(w + IDLE_UNIT),
            });
            let (Ok(before) | Err(before)) = aged;
            let quiet = before & busy == 0;
            if before & DURABLE != 0 && quiet && before & IDLE >= (IDLE_WINDOWS - 1) * IDLE_UNIT {
                idle.push(region);
            }
        }
        idle
    }

    /// Clears the bits of `regions` that no write has entered since their window began. The map must
    /// be durable. No sync: a bit that stays set in the file costs a re-read, nothing else.
    pub(super) fn clear(&self, regions: &[u64]) -> Result<()> {
        if regions.is_empty() {
            return Ok(());
        }
        let mut commit = self.commit.lock();
        while commit.busy {
            self.settled.wait(&mut commit);
        }
        let mut pages = 0;
        for &region in regions {
            if self.take_bit(region) {
                commit.bitmap[(region / 8) as usize] &= !(1 << (region % 8));
                pages |= 1 << page_of(region);
            }
        }
        let result = self.write_pages(&mut commit, pages, false);
        result.map_err(|failure| failure.error(&self.file))
    }

    /// What keeps a region's bit: rule `InFlightKeepsBit`.
    fn busy(&self) -> u32 {
        if self.rules.obey(Rule::InFlightKeepsBit) { TOUCHED | IN_FLIGHT } else { 0 }
    }

    /// Makes a region's bit count as not durable, unless a write has entered since the window began.
    fn take_bit(&self, region: u64) -> bool {
        let busy = self.busy();
        let after = |w: u32| {
            if self.rules.obey(Rule::ClearedBitIsGone) { w & !(DURABLE | IDLE) } else { w }
        };
        self.words[region as usize]
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| {
                (w & DURABLE != 0 && w & busy == 0).then(|| after(w))
            })
            .is_ok()
    }

    /// Writes an image of `pages` as they are now, with the lock released meanwhile.
    fn write_pages(
        &self,
        commit: &mut MutexGuard<'_, Commit>,
        pages: u32,
        sync: bool,
    ) -> std::result::Result<(), Failure> {
        let lsn = self.lsn.fetch_add(1, Ordering::Relaxed) + 1;
        let numbers = (0..BITMAP_PAGES).filter(|n| pages & (1 << n) != 0);
        let image: Vec<(u64, [u8; PAGE])> = numbers
            .map(|n| {
                let mut page = [0; PAGE];
                let bits = &commit.bitmap[n * BITMAP_BYTES..(n + 1) * BITMAP_BYTES];
                page[PAGE_HEAD..].copy_from_slice(bits);
                seal_page(&mut page, self.tracking, n as u64, lsn);
                (n as u64, page)
            })
            .collect();
        commit.busy = true;
        let result = MutexGuard::unlocked(commit, || {
            for (number, page) in &image {
                self.file.write(page, page_offset(*number))?;
            }
            if sync && self.rules.obey(Rule::BitBeforeWrite) { self.file.sync() } else { Ok(()) }
        });
        commit.busy = false;
        self.settled.notify_all();
        result.map_err(|e| Failure::new(&e))
    }
}

fn page_of(region: u64) -> u64 {
    region / (BITMAP_BYTES as u64 * 8)
}

impl Failure {
    fn new(error: &DiskError) -> Self {
        match error {
            DiskError::Io { op, source, .. } => {
                Self { op, kind: source.kind(), os: source.raw_os_error() }
            }
            _ => Self { op: "write", kind: io::ErrorKind::Other, os: None },
        }
    }

    fn error(&self, file: &Handle) -> DiskError {
        let source = self.os.map_or_else(|| self.kind.into(), io::Error::from_raw_os_error);
        DiskError::io(self.op, file.path(), source)
    }
}
