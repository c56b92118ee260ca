//! Sector bitmaps of a differencing file, in pages of 4 KiB, loaded as they are needed.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use super::pending_file::PendingFile;

/// Sectors that one page covers.
pub(crate) const PAGE_SECTORS: u64 = 4096 * 8;
/// Pages of one sector bitmap block.
pub(crate) const PAGES_PER_CHUNK: u64 = 256;

/// Metadata that is newer in memory than in the file.
#[derive(Default)]
pub(crate) struct Pending {
    /// Bitmap pages in memory, by sector / `PAGE_SECTORS`.
    pages: HashMap<u64, Box<[u8; 4096]>>,
    /// Bitmap pages to be logged.
    pub(crate) dirty_bitmap: BTreeSet<u64>,
    /// Pages of the block table to be logged.
    pub(crate) dirty_bat: BTreeSet<u64>,
    /// Places that become free when the log says so.
    pub(crate) freed: Vec<u64>,
    /// Blocks set to NOT_PRESENT since the last flush began.
    pub(crate) released: BTreeSet<u64>,
    /// Where the same changes outlive this process.
    pub(crate) file: Option<PendingFile>,
}

impl Pending {
    pub(crate) fn has_page(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    /// Takes a page read from the file, unless a newer one is here.
    pub(crate) fn insert_page(&mut self, page: u64, bytes: Box<[u8; 4096]>) {
        self.pages.entry(page).or_insert(bytes);
    }

    pub(crate) fn page(&self, page: u64) -> Option<&[u8; 4096]> {
        self.pages.get(&page).map(|b| &**b)
    }

    /// Sets or clears the bits of a sector range and marks their pages dirty.
    pub(crate) fn set(&mut self, sectors: Range<u64>, value: bool) {
        let mut sector = sectors.start;
        while sector < sectors.end {
            let number = sector / PAGE_SECTORS;
            let end = sectors.end.min((number + 1) * PAGE_SECTORS);
            let page = self.pages.entry(number).or_insert_with(|| Box::new([0; 4096]));
            while sector < end {
                let bit = sector % PAGE_SECTORS;
                if bit.is_multiple_of(8) && end - sector >= 8 {
                    page[(bit / 8) as usize] = if value { 0xff } else { 0 };
                    sector += 8;
                } else {
                    let mask = 1 << (bit % 8);
                    let byte = &mut page[(bit / 8) as usize];
                    *byte = if value { *byte | mask } else { *byte & !mask };
                    sector += 1;
                }
            }
            self.dirty_bitmap.insert(number);
        }
    }

    /// Whether all bits of the range are set.
    pub(crate) fn all(&self, sectors: Range<u64>) -> bool {
        self.next_change(sectors.start, sectors.end, true) == sectors.end
    }

    /// Runs of equal bits.
    pub(crate) fn runs(&self, sectors: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut runs = Vec::new();
        let (mut at, mut value) = (sectors.start, false);
        while at < sectors.end {
            let end = self.next_change(at, sectors.end, value);
            if end > at {
                runs.push((at..end, value));
            }
            (at, value) = (end, !value);
        }
        runs
    }

    /// The first sector from `at` whose bit is not `value`, or `end`. A page that is not here has no bits.
    fn next_change(&self, mut at: u64, end: u64, value: bool) -> u64 {
        let same = if value { 0xff } else { 0 };
        while at < end {
            let page = self.pages.get(&(at / PAGE_SECTORS));
            let page_end = end.min((at / PAGE_SECTORS + 1) * PAGE_SECTORS);
            let Some(page) = page else {
                if value {
                    return at;
                }
                at = page_end;
                continue;
            };
            while at < page_end {
                let bit = at % PAGE_SECTORS;
                let byte = page[(bit / 8) as usize];
                if bit.is_multiple_of(8) && byte == same {
                    at += 8;
                } else if (byte >> (bit % 8) & 1 == 1) == value {
                    at += 1;
                } else {
                    return at;
                }
            }
            // A whole byte may reach over the end of the range.
            at = at.min(page_end);
        }
        end
    }
}
