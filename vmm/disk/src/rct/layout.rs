//! Where granules, pages and regions lie. Pure arithmetic; everything here is bounded by
//! [`MAX_DISK`].

use std::ops::Range;

use crate::GRANULE;

/// Size of a header, a map page and a bitmap page.
pub(super) const PAGE: usize = 4096;
/// Bytes in front of a page's payload: CRC, page number, write counter.
pub(super) const PAGE_HEAD: usize = 16;
/// Epochs in one map page.
pub(super) const ENTRIES: u64 = ((PAGE - PAGE_HEAD) / 4) as u64;
/// Headers A and B come first in both files.
pub(super) const HEADERS: u64 = 2;
/// Largest virtual disk, the VHDX limit.
pub(super) const MAX_DISK: u64 = 64 << 40;
/// Up to here a granule has [`GRANULE`] bytes; beyond it grows so that a map stays within 1 GiB.
const MAX_DISK_AT_SMALLEST_GRANULE: u64 = 16 << 40;
/// Granules of a file are a power of two between [`GRANULE`] and this.
const MAX_GRANULE: u64 = 1 << 20;
/// Smallest region of the write-intent bitmap: what one first touch costs after a crash.
const MIN_REGION: u64 = 16 << 20;
/// Most regions a bitmap holds.
const MAX_REGIONS: u64 = 1 << 19;
/// Bitmap pages in an `.mrt`: 16 hold [`MAX_REGIONS`] bits, one more makes up for the page heads.
pub(super) const BITMAP_PAGES: usize = 17;
/// Bytes of bitmap in one page.
pub(super) const BITMAP_BYTES: usize = PAGE - PAGE_HEAD;
/// Length of every `.mrt`.
pub(super) const MRT_LEN: u64 = (HEADERS + BITMAP_PAGES as u64) * PAGE as u64;

const _: () = assert!(ENTRIES == 1020);
const _: () = assert!(MRT_LEN == 77_824);
const _: () = assert!((BITMAP_PAGES * BITMAP_BYTES * 8) as u64 >= MAX_REGIONS);
// A granule must lie inside one region: the in-flight count of the region then covers it.
const _: () = assert!(MAX_GRANULE <= MIN_REGION);

/// The arithmetic of one disk's tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    size: u64,
    granule: u64,
    region: u64,
}

impl Layout {
    /// The layout a new pair of a disk of `size` bytes gets; `None` beyond [`MAX_DISK`].
    pub(super) fn for_size(size: u64) -> Option<Self> {
        let scale = size.div_ceil(MAX_DISK_AT_SMALLEST_GRANULE).max(1).next_power_of_two();
        Self::new(size, GRANULE * scale)
    }

    /// The layout that a header names; `None` when this version does not read it.
    pub(super) fn new(size: u64, granule: u64) -> Option<Self> {
        let granule_ok = granule.is_power_of_two() && (GRANULE..=MAX_GRANULE).contains(&granule);
        (size <= MAX_DISK && granule_ok).then(|| {
            let region = size.div_ceil(MAX_REGIONS).next_power_of_two().max(MIN_REGION);
            Self { size, granule, region }
        })
    }

    pub(super) fn size(self) -> u64 {
        self.size
    }

    pub(super) fn granule(self) -> u64 {
        self.granule
    }

    pub(super) fn granules(self) -> u64 {
        self.size.div_ceil(self.granule)
    }

    /// Map pages of the `.rct`.
    pub(super) fn pages(self) -> u64 {
        self.granules().div_ceil(ENTRIES)
    }

    pub(super) fn regions(self) -> u64 {
        self.size.div_ceil(self.region)
    }

    pub(super) fn rct_len(self) -> u64 {
        (HEADERS + self.pages()) * PAGE as u64
    }

    /// Whether a request lies inside the disk.
    pub(super) fn contains(self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// Granules that the byte range (inside the disk) touches.
    pub(super) fn granules_of(self, offset: u64, len: u64) -> Range<u64> {
        span(offset, len, self.granule)
    }

    /// Regions that the byte range (inside the disk) touches.
    pub(super) fn regions_of(self, offset: u64, len: u64) -> Range<u64> {
        span(offset, len, self.region)
    }

    /// Granules of one region; they may lie in two map pages.
    pub(super) fn region_granules(self, region: u64) -> Range<u64> {
        let start = region * self.region;
        let end = (start + self.region).min(self.size);
        start / self.granule..end.div_ceil(self.granule)
    }
}

fn span(offset: u64, len: u64, unit: u64) -> Range<u64> {
    if len == 0 { 0..0 } else { offset / unit..(offset + len).div_ceil(unit) }
}

/// File offset of a map page or bitmap page.
pub(super) fn page_offset(page: u64) -> u64 {
    (HEADERS + page) * PAGE as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const TIB: u64 = 1 << 40;

    #[test]
    fn regions_never_exceed_the_bitmap_and_the_map_stays_within_a_gibibyte() {
        for size in [0, 1, 512, GIB, 8 * TIB, 8 * TIB + 512, 16 * TIB, 17 * TIB, 40 * TIB, 64 * TIB]
        {
            let layout = Layout::for_size(size).unwrap();
            assert!(layout.regions() <= MAX_REGIONS, "{size}");
            assert!(layout.granules() * 4 <= GIB, "{size}");
            assert!(layout.region.is_multiple_of(layout.granule));
        }
        assert_eq!(Layout::for_size(64 * TIB).unwrap().region, 128 << 20);
        assert_eq!(Layout::for_size(TIB).unwrap().granule, GRANULE);
        assert!(Layout::for_size(64 * TIB + 1).is_none());
    }

    #[test]
    fn regions_and_granules_cover_the_disk_exactly() {
        for size in [512, (16 << 20) + 512, 100 << 20, 3 * GIB + 4096] {
            let layout = Layout::for_size(size).unwrap();
            let mut next = 0;
            for region in 0..layout.regions() {
                let granules = layout.region_granules(region);
                assert_eq!(granules.start, next);
                next = granules.end;
            }
            assert_eq!(next, layout.granules());
            assert_eq!(layout.granules_of(0, size), 0..layout.granules());
            assert_eq!(layout.regions_of(size - 1, 1).end, layout.regions());
        }
    }

    #[test]
    fn only_granules_between_64_kib_and_1_mib_are_read() {
        for granule in [0, 1, 4096, GRANULE - 1, 3 * GRANULE, 2 << 20] {
            assert!(Layout::new(GIB, granule).is_none(), "{granule}");
        }
        assert!(Layout::new(GIB, 1 << 20).is_some());
    }
}
