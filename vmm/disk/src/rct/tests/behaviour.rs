//! The tracker on real files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use uuid::Uuid;

use super::{LINEAGE, SIZE, identity};
use crate::GRANULE;
use crate::error::DiskError;
use crate::rct::header::{EPOCH_LIMIT, MAX_IDS, RctHeader, Record};
use crate::rct::{Continuity, DiskIdentity, RctId, Tracker, pair_paths};

const TIB: u64 = 1 << 40;

struct Disk {
    _folder: TempDir,
    path: PathBuf,
    identity: DiskIdentity,
}

impl Disk {
    fn new() -> Self {
        Self::sized(SIZE)
    }

    fn sized(size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.vhdx");
        let identity = DiskIdentity { size, ..identity(Uuid::new_v4()) };
        Tracker::create(&path, &identity, 1).unwrap();
        Self { _folder: folder, path, identity }
    }

    /// Opens, and plays the disk that takes the new GUID.
    fn open(&mut self) -> (Tracker, Continuity) {
        let next = Uuid::new_v4();
        let opened = Tracker::open(&self.path, &self.identity, next).unwrap();
        self.identity.data_write_guid = next;
        opened
    }

    fn kept(&mut self) -> Tracker {
        let (tracker, continuity) = self.open();
        assert_eq!(continuity, Continuity::Kept);
        tracker
    }

    fn why_lost(&mut self) -> String {
        let (tracker, continuity) = self.open();
        assert_eq!(tracker.sealed_ids(), []);
        assert_eq!(tracker.changed_after(tracker.epoch() - 1, 0..SIZE).unwrap(), [0..SIZE]);
        match continuity {
            Continuity::Lost(why) => why,
            Continuity::Kept => panic!("kept"),
        }
    }
}

fn write(tracker: &Tracker, granule: u64) {
    tracker.before_write(granule * GRANULE, 512).unwrap();
}

fn changed(tracker: &Tracker, id: &RctId) -> Vec<u64> {
    let ranges = tracker.changed_after(id.epoch, 0..tracker.size()).unwrap();
    ranges.into_iter().flat_map(|r| r.start / GRANULE..r.end.div_ceil(GRANULE)).collect()
}

#[test]
fn a_query_returns_what_was_written_since_the_seal_and_nothing_else() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    write(&tracker, 3);
    let first = tracker.seal().unwrap();
    write(&tracker, 5);
    write(&tracker, 1019);
    let second = tracker.seal().unwrap();
    write(&tracker, 1020);
    assert_eq!(changed(&tracker, &first), [5, 1019, 1020]);
    assert_eq!(changed(&tracker, &second), [1020]);
    tracker.close_clean().unwrap();

    let frozen = Tracker::open_read_only(&disk.path, &disk.identity).unwrap();
    assert_eq!(changed(&frozen, &first), [5, 1019, 1020]);
    assert_eq!(frozen.sealed_ids(), [first.clone(), second.clone()]);
    assert!(matches!(frozen.before_write(0, 512), Err(DiskError::ReadOnly { .. })));
    assert!(matches!(frozen.seal(), Err(DiskError::ReadOnly { .. })));
    drop(frozen);

    let tracker = disk.kept();
    write(&tracker, 7);
    assert_eq!(changed(&tracker, &second), [7, 1020]);
    assert_eq!(first.to_string().parse::<RctId>().unwrap(), first);
}

#[test]
fn an_unclean_end_marks_the_touched_regions_and_only_them() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    write(&tracker, 300);
    drop(tracker);
    let whole_region: Vec<u64> = (256..512).collect();
    let frozen = Tracker::open_read_only(&disk.path, &disk.identity).unwrap();
    assert_eq!(changed(&frozen, &id), whole_region);
    let tracker = disk.kept();
    assert_eq!(changed(&tracker, &id), whole_region);
}

#[test]
fn idle_regions_cost_nothing_after_a_crash() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    write(&tracker, 300);
    for _ in 0..3 {
        tracker.flush_map().unwrap();
    }
    write(&tracker, 0);
    drop(tracker);
    let expected: Vec<u64> = (0..256).chain([300]).collect();
    assert_eq!(changed(&disk.kept(), &id), expected);
}

#[test]
fn a_foreign_writer_invalidates_every_id() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    tracker.close_clean().unwrap();
    disk.identity.data_write_guid = Uuid::new_v4();
    let Err(refused) = Tracker::open_read_only(&disk.path, &disk.identity) else {
        panic!("opened")
    };
    assert!(refused.to_string().contains("changed by another program"), "{refused}");
    assert!(disk.why_lost().contains("changed by another program"));
    assert!(!disk.kept().knows(&id));
}

#[test]
fn an_old_copy_of_the_disk_is_not_taken_for_the_disk() {
    let mut disk = Disk::new();
    let old = disk.identity;
    let tracker = disk.kept();
    write(&tracker, 9);
    let _id = tracker.seal().unwrap();
    drop(tracker);
    // The copy from before the write carries the GUID that was current when the session began.
    disk.identity = old;
    assert!(disk.why_lost().contains("changed by another program"));
}

#[test]
fn a_session_without_writes_accepts_the_disk_with_either_guid() {
    let mut disk = Disk::new();
    let old = disk.identity;
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    tracker.close_clean().unwrap();
    disk.identity = old;
    assert!(disk.kept().knows(&id));
}

#[test]
fn a_missing_file_of_the_pair_is_made_anew() {
    for missing in 0..2 {
        let mut disk = Disk::new();
        let tracker = disk.kept();
        tracker.seal().unwrap();
        let epoch = tracker.epoch();
        tracker.close_clean().unwrap();
        let (rct, mrt) = pair_paths(&disk.path);
        fs::remove_file([&rct, &mrt][missing]).unwrap();
        assert!(Tracker::open_read_only(&disk.path, &disk.identity).is_err());
        assert!(disk.why_lost().contains("is missing"));
        // Where the old epoch could be read, the new pair continues behind it.
        assert!(missing == 0 || disk.kept().epoch() > epoch);
    }
}

#[test]
fn a_pair_made_anew_starts_behind_the_parent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("child.avhdx");
    let (tracker, continuity) =
        Tracker::open_above(&path, &identity(Uuid::new_v4()), Uuid::new_v4(), 77).unwrap();
    assert!(matches!(continuity, Continuity::Lost(_)));
    assert_eq!(tracker.epoch(), 77);
}

#[test]
fn a_disk_of_another_size_or_identity_is_refused() {
    for (change, why) in [(0, "another disk"), (1, "resized")] {
        let mut disk = Disk::new();
        if change == 0 {
            disk.identity.lineage = Uuid::new_v4();
        } else {
            disk.identity.size += 1 << 20;
        }
        let (_, continuity) = disk.open();
        assert!(matches!(&continuity, Continuity::Lost(w) if w.contains(why)), "{continuity:?}");
    }
}

#[test]
fn links_and_fifos_in_place_of_the_pair_are_replaced_not_followed() {
    let mut disk = Disk::new();
    let (rct, mrt) = pair_paths(&disk.path);
    let outside = disk.path.with_file_name("precious");
    fs::write(&outside, b"precious").unwrap();
    fs::remove_file(&rct).unwrap();
    std::os::unix::fs::symlink(&outside, &rct).unwrap();
    fs::remove_file(&mrt).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &mrt, rustix::fs::Mode::RUSR).unwrap();
    let why = disk.why_lost();
    assert!(why.contains("is missing"), "{why}");
    assert_eq!(fs::read(outside).unwrap(), b"precious");
    drop(disk.kept());
}

#[test]
fn the_epoch_never_wraps() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    tracker.raise_epoch(u32::MAX - 2).unwrap();
    assert!(tracker.raise_epoch(u32::MAX).is_err());
    assert!(tracker.before_merge_write(0, 512, u32::MAX).is_err());
    assert!(tracker.seal().unwrap_err().to_string().contains("last epoch"));
    assert_eq!(tracker.epoch(), u32::MAX - 2);
    tracker.close_clean().unwrap();
    assert!(Tracker::open_read_only(&disk.path, &disk.identity).is_err());
    assert!(disk.why_lost().contains("last epoch"));
    let tracker = disk.kept();
    assert!(tracker.epoch() < EPOCH_LIMIT && !tracker.knows(&id));
}

#[test]
fn the_newest_ids_are_kept() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let ids: Vec<RctId> = (0..MAX_IDS + 3).map(|_| tracker.seal().unwrap()).collect();
    assert_eq!(tracker.sealed_ids(), ids[3..]);
    tracker.forget(&ids[10]).unwrap();
    tracker.close_clean().unwrap();
    let tracker = disk.kept();
    assert!(!tracker.knows(&ids[2]) && !tracker.knows(&ids[10]) && tracker.knows(&ids[11]));
}

#[test]
fn an_id_is_known_only_with_its_own_epoch_seal_and_lineage() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    assert!(tracker.knows(&id));
    assert!(!tracker.knows(&RctId { epoch: id.epoch + 1, ..id.clone() }));
    assert!(!tracker.knows(&RctId { seal: Uuid::new_v4(), ..id.clone() }));
    assert!(!tracker.knows(&RctId { lineage: Uuid::new_v4(), ..id }));
}

#[test]
fn a_merge_keeps_the_ids_of_both_and_survives_a_crash() {
    let mut parent = Disk::new();
    let tracker = parent.kept();
    let below = tracker.seal().unwrap();
    tracker.close_clean().unwrap();
    let mut child = Disk::new();
    Tracker::create(&child.path, &child.identity, tracker.epoch() + 1).unwrap();
    let top = child.kept();
    write(&top, 1);
    let above = top.seal().unwrap();
    write(&top, 2);

    let into = parent.kept();
    into.raise_epoch(top.epoch()).unwrap();
    for (granule, epoch) in [(1, above.epoch), (2, top.epoch())] {
        into.before_merge_write(granule * GRANULE, GRANULE, epoch).unwrap();
    }
    into.adopt_ids(&top.sealed_ids()).unwrap();
    assert_eq!(changed(&into, &below), [1, 2]);
    assert_eq!(changed(&into, &above), [2]);
    drop(into);
    let recovered = parent.kept();
    assert_eq!(recovered.sealed_ids(), [below.clone(), above.clone()]);
    for id in [below, above] {
        assert!(changed(&recovered, &id).ends_with(&(2..256).collect::<Vec<_>>()));
    }
}

#[test]
fn a_merge_from_a_child_whose_tracking_was_lost_hides_nothing() {
    let mut parent = Disk::new();
    let tracker = parent.kept();
    for _ in 0..5 {
        tracker.seal().unwrap();
    }
    let id = tracker.seal().unwrap();
    tracker.close_clean().unwrap();
    let into = parent.kept();
    into.before_merge_write(GRANULE, GRANULE, 1).unwrap();
    // Epoch 0 protects the region and marks nothing.
    into.before_merge_write(9 * GRANULE, GRANULE, 0).unwrap();
    assert_eq!(changed(&into, &id), [1]);
    drop(into);
    assert_eq!(changed(&parent.kept(), &id), (0..256).collect::<Vec<_>>());
}

#[test]
fn ids_of_another_disk_are_not_adopted() {
    let mut disk = Disk::new();
    let foreign = RctId { lineage: Uuid::new_v4(), epoch: 1, seal: Uuid::new_v4() };
    assert!(disk.kept().adopt_ids(&[foreign]).is_err());
}

#[test]
fn seal_and_close_refuse_writes_in_flight() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    let guard = tracker.before_write(0, 512).unwrap();
    assert!(tracker.seal().is_err());
    assert!(tracker.close_clean().is_err());
    drop(guard);
    tracker.seal().unwrap();
    tracker.close_clean().unwrap();
    assert!(matches!(tracker.before_write(0, 512), Err(DiskError::State(_))));
    assert!(tracker.seal().is_err() && tracker.flush_map().is_err());
}

#[test]
fn requests_outside_the_disk_are_refused() {
    let mut disk = Disk::new();
    let tracker = disk.kept();
    for (offset, len) in [(SIZE, 1), (u64::MAX, 2), (0, SIZE + 1), (SIZE - 1, 2)] {
        assert!(matches!(tracker.before_write(offset, len), Err(DiskError::OutOfRange { .. })));
    }
    assert!(tracker.changed_after(0, 0..SIZE + 1).is_err());
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 5..3;
    assert!(tracker.changed_after(0, reversed).is_err());
    assert_eq!(tracker.changed_after(0, SIZE..SIZE).unwrap(), []);
    drop(tracker.before_write(SIZE, 0).unwrap());
}

#[test]
fn paged_queries_return_what_one_query_returns() {
    let mut disk = Disk::sized(SIZE + 512);
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    for granule in (0..2048).filter(|g| g % 7 == 0 || (1000..1100).contains(g)) {
        write(&tracker, granule);
    }
    tracker.before_write(SIZE, 512).unwrap();
    let whole = changed(&tracker, &id);
    assert_eq!(whole.last(), Some(&2048));
    for step in [512, GRANULE, 3 * GRANULE + 512, 5 << 20] {
        let mut paged = Vec::new();
        let mut at = 0;
        while at < SIZE + 512 {
            let end = (at + step).min(SIZE + 512);
            let ranges = tracker.changed_after(id.epoch, at..end).unwrap();
            paged.extend(
                ranges.into_iter().flat_map(|r| r.start / GRANULE..r.end.div_ceil(GRANULE)),
            );
            at = end;
        }
        paged.dedup();
        assert_eq!(paged, whole, "step {step}");
    }
    // Clipped to the disk, aligned otherwise.
    assert_eq!(tracker.changed_after(id.epoch, SIZE..SIZE + 512).unwrap(), [SIZE..SIZE + 512]);
}

#[test]
fn a_sparse_tebibyte_costs_little_until_it_is_written() {
    let mut disk = Disk::sized(TIB);
    let (rct, mrt) = pair_paths(&disk.path);
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
    assert!(blocks(&rct) <= 64 << 10, "{}", blocks(&rct));
    assert_eq!(fs::metadata(&mrt).unwrap().len(), 77_824);
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    tracker.before_write(TIB - 512, 512).unwrap();
    tracker.before_write(0, 512).unwrap();
    tracker.close_clean().unwrap();
    assert!(blocks(&rct) <= 128 << 10, "{}", blocks(&rct));
    let frozen = Tracker::open_read_only(&disk.path, &disk.identity).unwrap();
    assert_eq!(changed(&frozen, &id), [0, TIB / GRANULE - 1]);
}

#[test]
fn the_largest_disk_is_tracked() {
    let mut disk = Disk::sized(64 * TIB);
    let tracker = disk.kept();
    let id = tracker.seal().unwrap();
    tracker.before_write(64 * TIB - 512, 512).unwrap();
    let changed = tracker.changed_after(id.epoch, 63 * TIB..64 * TIB).unwrap();
    assert_eq!(changed, [64 * TIB - 4 * GRANULE..64 * TIB]);
}

#[test]
fn an_interrupted_creation_leaves_nothing_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    fs::write(folder.path().join("disk.vhdx.rct.new"), b"half").unwrap();
    Tracker::create(&path, &identity(Uuid::nil()), 1).unwrap();
    Tracker::open_read_only(&path, &identity(Uuid::nil())).unwrap();
    assert!(!folder.path().join("disk.vhdx.rct.new").exists());
}

#[test]
fn the_header_is_stored_as_documented() {
    let header = RctHeader {
        sequence: 7,
        lineage: LINEAGE,
        tracking: Uuid::from_u128(2),
        size: SIZE,
        granule: GRANULE,
        epoch: 5,
        base: 0,
        clean: true,
        session: Uuid::from_u128(3),
        prev: Uuid::from_u128(4),
        next: Uuid::from_u128(5),
        ids: Vec::new(),
    };
    let page = header.encode();
    assert_eq!(&page[..8], b"TDMKRCT\0");
    assert_eq!(&page[12..16], 1_u32.to_le_bytes());
    assert_eq!(&page[24..40], LINEAGE.as_bytes());
    assert_eq!(&page[68..72], 5_u32.to_le_bytes());
    assert_eq!(&page[76..80], 2_u32.to_le_bytes());
    assert_eq!(RctHeader::decode(&page).unwrap(), header);
}
