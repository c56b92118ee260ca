//! The epoch of every granule's last write: pages in memory where they were touched, in the `.rct`
//! otherwise.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use uuid::Uuid;

use super::header::read_u32;
use super::layout::{ENTRIES, Layout, PAGE, PAGE_HEAD, page_offset};
use super::media::Handle;
use super::rules::{Rule, Rules};
use crate::block::BlockRange;
use crate::error::Result;

/// Pages written or read in one go: 256 KiB.
const BATCH: u64 = 64;
/// First touches of pages that may load at once.
const LOADERS: usize = 16;
/// What every granule of a page that cannot be trusted counts as.
const CHANGED: u32 = u32::MAX;

/// A page in memory: 4 KiB, never dropped while the pair is open. Only touched pages get here, so the
/// bound is 64 MiB per TiB of disk that was written to.
struct Page {
    epochs: Box<[AtomicU32]>,
    /// Holds a mark that the file may not have.
    dirty: AtomicBool,
}

/// The map of one `.rct`.
pub(super) struct EpochMap {
    file: Arc<Handle>,
    layout: Layout,
    tracking: Uuid,
    base: u32,
    pages: Vec<OnceLock<Page>>,
    loaders: [Mutex<()>; LOADERS],
    /// Every page whose `dirty` is set, perhaps twice.
    dirty: Mutex<Vec<u64>>,
    /// Counts page writes; tells an older copy of a page from a newer one when a file is examined.
    lsn: AtomicU64,
    rules: Rules,
}

impl EpochMap {
    pub(super) fn new(
        file: Arc<Handle>,
        layout: Layout,
        tracking: Uuid,
        base: u32,
        lsn: u64,
        rules: Rules,
    ) -> Self {
        Self {
            file,
            layout,
            tracking,
            base,
            pages: (0..layout.pages()).map(|_| OnceLock::new()).collect(),
            loaders: Default::default(),
            dirty: Mutex::default(),
            lsn: AtomicU64::new(lsn),
            rules,
        }
    }

    /// Marks granules with `epoch` where they stand earlier. In memory only: the regions' bits must
    /// be durable, and in use by the caller, until a flush has taken the marks along.
    pub(super) fn mark(&self, granules: Range<u64>, epoch: u32) {
        for (number, span) in by_page(granules) {
            let page = self.page(number, epoch);
            let mut changed = false;
            for entry in &page.epochs[span] {
                // One that stands was set by a write that is either flushed or still holds the bit
                // of this region: the page is dirty, or about to be, before that bit can go.
                if entry.load(Ordering::Relaxed) < epoch {
                    entry.fetch_max(epoch, Ordering::Relaxed);
                    changed = true;
                }
            }
            if changed {
                self.note_dirty(page, number);
            }
        }
    }

    /// Marks granules whose regions' bits are about to be cleared by recovery: rule
    /// `RewriteWhatWasFound`.
    pub(super) fn mark_anew(&self, granules: Range<u64>, epoch: u32) {
        self.mark(granules.clone(), epoch);
        if self.rules.obey(Rule::RewriteWhatWasFound) {
            for (number, _) in by_page(granules) {
                self.note_dirty(self.page(number, epoch), number);
            }
        }
    }

    /// Puts a page on the list of the next flush; call it after the marks were set.
    fn note_dirty(&self, page: &Page, number: u64) {
        // A read-modify-write: it comes either before the flush that takes the flag, which then sees
        // the marks, or after it and finds the flag down.
        if page.dirty.fetch_or(false, Ordering::AcqRel) {
            return;
        }
        // Flag and list change together: were the flag up before the page is on the list, another
        // write could rely on it, end, and lose its region's bit to a flush that missed the page.
        let mut list = self.dirty.lock();
        if !page.dirty.swap(true, Ordering::AcqRel) {
            list.push(number);
        }
    }

    /// The page in memory; read on first touch. One that is damaged or unreadable counts as changed
    /// entirely, now: in `epoch`.
    fn page(&self, number: u64, epoch: u32) -> &Page {
        let slot = &self.pages[number as usize];
        if let Some(page) = slot.get() {
            return page;
        }
        let _loading = self.loaders[number as usize % LOADERS].lock();
        slot.get_or_init(|| {
            let mut bytes = [0; PAGE];
            let stored = match self.file.read(&mut bytes, page_offset(number)) {
                Ok(()) => decode(&bytes, self.tracking, number),
                Err(_) => Stored::Bad,
            };
            if matches!(stored, Stored::Bad) {
                tracing::warn!(file = %self.file.path().display(), page = number,
                    "page of the change map is damaged; all its granules count as changed");
            }
            let epochs = (0..ENTRIES as usize).map(|i| match stored {
                Stored::Never => 0,
                Stored::Bad => epoch,
                Stored::Epochs => entry(&bytes, i),
            });
            Page { epochs: epochs.map(AtomicU32::new).collect(), dirty: AtomicBool::new(false) }
        })
    }

    /// Writes the dirty pages and syncs. On error every page stays dirty: after a failed sync the
    /// kernel may have dropped what it held, so all must be written again. One caller at a time.
    /// `before` is the rule on whose behalf: what may happen once this has returned.
    pub(super) fn flush(&self, before: Rule) -> Result<()> {
        let mut numbers = std::mem::take(&mut *self.dirty.lock());
        if numbers.is_empty() {
            return Ok(());
        }
        numbers.sort_unstable();
        numbers.dedup();
        let result = self.write_pages(&numbers).and_then(|()| self.sync(before));
        if result.is_err() {
            let mut list = self.dirty.lock();
            for &number in &numbers {
                if let Some(page) = self.pages[number as usize].get() {
                    page.dirty.store(true, Ordering::Release);
                }
            }
            list.append(&mut numbers);
        }
        result
    }

    fn sync(&self, before: Rule) -> Result<()> {
        if self.rules.obey(before) { self.file.sync() } else { Ok(()) }
    }

    /// A kill in here leaves some pages new, some old, one torn; the bits of their regions are still
    /// set.
    fn write_pages(&self, numbers: &[u64]) -> Result<()> {
        let lsn = self.lsn.fetch_add(1, Ordering::Relaxed) + 1;
        let mut rest = numbers;
        if !self.rules.obey(Rule::EveryPageBeforeClear) {
            rest = &rest[..1];
        }
        let mut buffer = Vec::new();
        while let Some(&first) = rest.first() {
            let run = (0..BATCH).zip(rest).take_while(|&(i, &n)| n == first + i).count();
            buffer.clear();
            for &number in &rest[..run] {
                self.encode(number, lsn, &mut buffer);
            }
            self.file.write(&buffer, page_offset(first))?;
            rest = &rest[run..];
        }
        Ok(())
    }

    fn encode(&self, number: u64, lsn: u64, buffer: &mut Vec<u8>) {
        let Some(page) = self.pages[number as usize].get() else { return };
        // Before the copy: a mark that the copy misses sets the flag again.
        page.dirty.swap(false, Ordering::AcqRel);
        let start = buffer.len();
        buffer.extend_from_slice(&[0; PAGE]);
        let out = &mut buffer[start..];
        for (bytes, epoch) in out[PAGE_HEAD..].chunks_exact_mut(4).zip(&page.epochs) {
            bytes.copy_from_slice(&epoch.load(Ordering::Relaxed).to_le_bytes());
        }
        seal_page(out, self.tracking, number, lsn);
    }

    /// Granules of `range` (inside the disk) that stand later than `epoch`, merged, clipped to the
    /// disk.
    pub(super) fn changed_after(&self, epoch: u32, range: &BlockRange) -> Vec<BlockRange> {
        let granules = self.layout.granules_of(range.start, range.end - range.start);
        let mut found = Ranges::new(self.layout);
        let mut reader = Reader::new(self);
        for (number, span) in by_page(granules) {
            let first = number * ENTRIES;
            let changed = |value: u32| value.max(self.base) > epoch;
            let mut each = |i: usize, value: u32| {
                if changed(value) {
                    found.add(first + i as u64);
                }
            };
            if let Some(page) = self.pages[number as usize].get() {
                span.for_each(|i| each(i, page.epochs[i].load(Ordering::Relaxed)));
                continue;
            }
            match reader.page(number) {
                (Stored::Epochs, bytes) => span.for_each(|i| each(i, entry(bytes, i))),
                (Stored::Never, _) => span.for_each(|i| each(i, 0)),
                (Stored::Bad, _) => span.for_each(|i| each(i, CHANGED)),
            }
        }
        found.done
    }
}

/// Reads pages in order without keeping them.
struct Reader<'a> {
    map: &'a EpochMap,
    first: u64,
    bytes: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(map: &'a EpochMap) -> Self {
        Self { map, first: 0, bytes: Vec::new() }
    }

    fn page(&mut self, number: u64) -> (Stored, &[u8]) {
        let held = self.bytes.len() / PAGE;
        if number < self.first || number >= self.first + held as u64 {
            self.fill(number);
        }
        let at = (number - self.first) as usize * PAGE;
        match self.bytes.get(at..at + PAGE) {
            Some(bytes) => (decode(bytes, self.map.tracking, number), bytes),
            None => (Stored::Bad, &[]),
        }
    }

    fn fill(&mut self, number: u64) {
        self.first = number;
        let pages = BATCH.min(self.map.layout.pages() - number);
        self.bytes.resize(pages as usize * PAGE, 0);
        if self.map.file.read(&mut self.bytes, page_offset(number)).is_ok() {
            return;
        }
        // One bad sector must not cost the whole batch.
        self.bytes.truncate(PAGE);
        if let Err(e) = self.map.file.read(&mut self.bytes, page_offset(number)) {
            tracing::warn!(file = %self.map.file.path().display(), page = number, error = %e,
                "page of the change map cannot be read; all its granules count as changed");
            self.bytes.clear();
        }
    }
}

/// What the file says of a page.
#[derive(Clone, Copy)]
enum Stored {
    /// A hole: nothing was ever marked.
    Never,
    /// Valid.
    Epochs,
    /// Torn, damaged, or another pair's.
    Bad,
}

fn decode(bytes: &[u8], tracking: Uuid, number: u64) -> Stored {
    // Holes first, and by their head: a large disk's map is mostly holes.
    if bytes[..PAGE_HEAD].iter().all(|&b| b == 0) && bytes.iter().all(|&b| b == 0) {
        return Stored::Never;
    }
    let valid =
        read_u32(bytes, 0) == page_crc(bytes, tracking) && u64::from(read_u32(bytes, 4)) == number;
    if valid { Stored::Epochs } else { Stored::Bad }
}

/// Fills in a page's head. Shared with the bitmap pages of the `.mrt`.
pub(super) fn seal_page(page: &mut [u8], tracking: Uuid, number: u64, lsn: u64) {
    // Page numbers fit: a map has at most 2^20 + 2^10 pages.
    page[4..8].copy_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
    page[8..16].copy_from_slice(&lsn.to_le_bytes());
    let crc = page_crc(page, tracking);
    page[..4].copy_from_slice(&crc.to_le_bytes());
}

/// CRC-32C over the tracking GUID and the page behind the CRC: a page of another pair never passes.
pub(super) fn page_crc(page: &[u8], tracking: Uuid) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(tracking.as_bytes()), &page[4..])
}

fn entry(page: &[u8], index: usize) -> u32 {
    read_u32(page, PAGE_HEAD + 4 * index)
}

/// Cuts granules into page numbers and entries of the page.
fn by_page(granules: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let pages = if granules.is_empty() {
        0..0
    } else {
        granules.start / ENTRIES..granules.end.div_ceil(ENTRIES)
    };
    pages.map(move |page| {
        let start = granules.start.max(page * ENTRIES) - page * ENTRIES;
        let end = granules.end.min((page + 1) * ENTRIES) - page * ENTRIES;
        (page, start as usize..end as usize)
    })
}

/// Merges neighbouring granules into byte ranges.
struct Ranges {
    layout: Layout,
    done: Vec<BlockRange>,
}

impl Ranges {
    fn new(layout: Layout) -> Self {
        Self { layout, done: Vec::new() }
    }

    fn add(&mut self, granule: u64) {
        let start = granule * self.layout.granule();
        let end = (start + self.layout.granule()).min(self.layout.size());
        match self.done.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.done.push(start..end),
        }
    }
}
