//! The pair of a disk that gets another virtual size.

use std::path::Path;

use super::header::{MrtHeader, RctHeader, read_u32};
use super::intent::empty_pages;
use super::layout::{ENTRIES, Layout, PAGE, PAGE_HEAD, page_offset};
use super::map::{page_crc, seal_page};
use super::media::{FileStore, Handle, Media, Store, Which};
use super::pair::{self, Pair, Unusable};
use super::{Continuity, DiskIdentity};
use crate::error::{DiskError, Result};
use crate::fs::{self, How};
use crate::vhdx::storage::Storage;

/// Makes the pair of a disk file fit another virtual size. The pair is closed and CLEAN, and
/// `identity` says what the disk was when it was closed; the disk file itself has the new size
/// already. Sealed ids stand: what was added counts as changed for each of them, what was cut off is
/// dropped. Where they cannot stand (the pair is missing or does not fit, or the new size needs other
/// granules) the pair is made anew and the answer says why.
///
/// Both files name the size and each has one possible length for it, so a kill anywhere in here
/// leaves a pair that does not agree with itself or with the disk: the next open makes it anew and
/// answers for no id. Never does it answer wrongly.
pub fn resize(disk: &Path, identity: &DiskIdentity, size: u64) -> Result<Continuity> {
    let store = FileStore::new(disk);
    let after = DiskIdentity { size, ..*identity };
    let (why, epoch) = match Pair::load(&store, identity, true) {
        Ok(pair) if pair.unclean() => ("it was not closed".to_owned(), pair.header.record.epoch),
        Ok(pair) => {
            let epoch = pair.header.record.epoch;
            match Layout::for_size(size) {
                Some(new) if new.granule() == pair.layout.granule() => {
                    refit(&store, pair, new)?;
                    return Ok(Continuity::Kept);
                }
                _ => ("the new size needs tracking of another grain".to_owned(), epoch),
            }
        }
        Err(Unusable::Lost { why, epoch }) => (why, epoch),
        Err(Unusable::Error(e)) => return Err(e),
    };
    // Nothing is known of the granules: all count as written in the first epoch.
    pair::create(&store, &after, epoch + 1, epoch + 1)?;
    Ok(Continuity::Lost(why))
}

fn refit(store: &FileStore, pair: Pair, new: Layout) -> Result<()> {
    let Pair { rct, mrt, mut header, mut mrt_header, layout: old, .. } = pair;
    // From the first byte that was not there before, widened to its granule; a last granule that was
    // cut grows.
    let first = old.size() / old.granule();
    if new.size() > old.size() {
        set_len(store, new.rct_len())?;
        let page_after = new.granules().div_ceil(ENTRIES);
        let epoch = header.record.epoch;
        for number in first / ENTRIES..page_after {
            mark_page(&rct, &header.record, number, first.max(number * ENTRIES), epoch)?;
        }
        rct.sync()?;
    } else {
        set_len(store, new.rct_len())?;
    }
    // CLEAN: no bit of it counts, and it has as many pages for every size.
    mrt.write(&empty_pages(header.record.tracking), page_offset(0))?;
    mrt.sync()?;
    let record = MrtHeader { size: new.size(), ..mrt_header.record.clone() };
    mrt_header.write_both(&mrt, &record)?;
    let record = RctHeader { size: new.size(), ..header.record.clone() };
    header.write_both(&rct, &record)
}

/// Marks a page's granules from `first` on.
fn mark_page(rct: &Handle, header: &RctHeader, number: u64, first: u64, epoch: u32) -> Result<()> {
    let mut page = [0; PAGE];
    let at = page_offset(number);
    rct.read(&mut page, at).map_err(|e| DiskError::io("read", rct.path(), e))?;
    let hole = page.iter().all(|b| *b == 0);
    let valid = read_u32(&page, 0) == page_crc(&page, header.tracking)
        && u64::from(read_u32(&page, 4)) == number;
    // A damaged page counts as changed entirely, and must go on doing so.
    let from = if hole || valid { (first - number * ENTRIES) as usize } else { 0 };
    for entry in page[PAGE_HEAD..].chunks_exact_mut(4).skip(from) {
        entry.copy_from_slice(&epoch.to_le_bytes());
    }
    seal_page(&mut page, header.tracking, number, (header.sequence + 1) << 32);
    rct.write(&page, at)
}

fn set_len(store: &FileStore, len: u64) -> Result<()> {
    let path = store.path(Which::Rct);
    fs::open(path, How { write: true, create: None, flags: 0 })
        .and_then(|file| Storage::set_len(&file, len).and_then(|()| Media::sync(&file)))
        .map_err(|e| DiskError::io("resize", path, e))
}

/// Makes the pair of a disk file that became another disk, or whose content was exchanged: no id of
/// the old pair is ever answered again.
pub fn start_anew(disk: &Path, identity: &DiskIdentity) -> Result<()> {
    let store = FileStore::new(disk);
    let epoch = match Pair::load(&store, identity, false) {
        Ok(pair) => pair.header.record.epoch,
        Err(Unusable::Lost { epoch, .. }) => epoch,
        Err(Unusable::Error(e)) => return Err(e),
    };
    pair::create(&store, identity, epoch + 1, epoch + 1)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // answers are lists of ranges
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::GRANULE;
    use crate::rct::Tracker;

    const GIB: u64 = 1 << 30;

    fn identity(size: u64, guid: u128) -> DiskIdentity {
        DiskIdentity { lineage: Uuid::from_u128(7), size, data_write_guid: Uuid::from_u128(guid) }
    }

    /// A disk with two ids and a write after each.
    fn tracked(disk: &Path, size: u64) -> [crate::rct::RctId; 2] {
        Tracker::create(disk, &identity(size, 1), 1).unwrap();
        let (tracker, _) = Tracker::open(disk, &identity(size, 1), Uuid::from_u128(2)).unwrap();
        let first = tracker.seal().unwrap();
        drop(tracker.before_write(0, 512).unwrap());
        let second = tracker.seal().unwrap();
        drop(tracker.before_write(4 * GRANULE, 512).unwrap());
        tracker.close_clean().unwrap();
        [first, second]
    }

    #[test]
    fn grown_space_counts_as_changed_for_every_id() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.vhdx");
        // The old end lies inside a granule; the new size takes further pages and regions.
        let old = 70 * GRANULE + 512;
        let ids = tracked(&disk, old);
        assert_eq!(resize(&disk, &identity(old, 2), GIB).unwrap(), Continuity::Kept);
        let new = identity(GIB, 2);
        let (tracker, continuity) = Tracker::open(&disk, &new, Uuid::from_u128(3)).unwrap();
        assert_eq!(continuity, Continuity::Kept);
        assert_eq!(tracker.sealed_ids(), ids);
        let changed = |id: &crate::rct::RctId| tracker.changed_after(id.epoch, 0..GIB).unwrap();
        let tail = 70 * GRANULE..GIB;
        let later = 4 * GRANULE..5 * GRANULE;
        assert_eq!(changed(&ids[0]), [0..GRANULE, later.clone(), tail.clone()]);
        assert_eq!(changed(&ids[1]), [later, tail]);
    }

    #[test]
    fn what_is_cut_off_and_added_again_counts_as_changed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.vhdx");
        let ids = tracked(&disk, GIB);
        let small = 10 * GRANULE;
        assert_eq!(resize(&disk, &identity(GIB, 2), small).unwrap(), Continuity::Kept);
        let tracker = Tracker::open_read_only(&disk, &identity(small, 2)).unwrap();
        assert_eq!(
            tracker.changed_after(ids[1].epoch, 0..small).unwrap(),
            [4 * GRANULE..5 * GRANULE]
        );
        drop(tracker);
        assert_eq!(resize(&disk, &identity(small, 2), GIB).unwrap(), Continuity::Kept);
        let tracker = Tracker::open_read_only(&disk, &identity(GIB, 2)).unwrap();
        assert_eq!(
            tracker.changed_after(ids[1].epoch, 0..GIB).unwrap(),
            [4 * GRANULE..5 * GRANULE, small..GIB]
        );
    }

    #[test]
    fn a_damaged_page_stays_changed_entirely() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.vhdx");
        let ids = tracked(&disk, 70 * GRANULE);
        let rct = crate::rct::pair_paths(&disk).0;
        let mut bytes = std::fs::read(&rct).unwrap();
        bytes[2 * PAGE + 100] ^= 1;
        std::fs::write(&rct, bytes).unwrap();
        resize(&disk, &identity(70 * GRANULE, 2), 80 * GRANULE).unwrap();
        let tracker = Tracker::open_read_only(&disk, &identity(80 * GRANULE, 2)).unwrap();
        assert_eq!(
            tracker.changed_after(ids[1].epoch, 0..80 * GRANULE).unwrap(),
            [0..80 * GRANULE]
        );
    }

    #[test]
    fn other_granules_and_foreign_pairs_answer_for_no_id() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.vhdx");
        let id = tracked(&disk, GIB)[1].clone();
        let lost = |from: DiskIdentity, to: u64| {
            let Continuity::Lost(_) = resize(&disk, &from, to).unwrap() else {
                panic!("kept");
            };
            let to = DiskIdentity { size: to, ..from };
            let tracker = Tracker::open_read_only(&disk, &to).unwrap();
            assert!(!tracker.knows(&id));
            assert_eq!(tracker.changed_after(id.epoch, 0..GIB).unwrap(), [0..GIB]);
        };
        lost(identity(GIB, 2), 17 << 40);
        tracked(&disk, GIB);
        lost(identity(GIB, 99), 2 * GIB);
    }
}
