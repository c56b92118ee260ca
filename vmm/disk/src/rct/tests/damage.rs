//! Damaged, truncated, swapped and stale tracking files: a superset or an explicit loss, never less.

use uuid::Uuid;

use super::recorder::{Name, World};
use super::{GRANULES, LINEAGE, Random, SIZE, flags, identity};
use crate::GRANULE;
use crate::rct::layout::PAGE;
use crate::rct::rules::Rules;
use crate::rct::{Continuity, DiskIdentity, RctId, Tracker};

/// A disk with two seals and writes after each, left clean or as by a crash.
struct Subject {
    world: World,
    ids: Vec<(RctId, Vec<u64>)>,
}

impl Subject {
    fn new(clean: bool) -> Self {
        let mut random = Random(if clean { 1 } else { 2 });
        let world = World::new(random.uuid());
        crate::rct::pair::create(&world, &identity(world.guid()), 1, 0).unwrap();
        let mut subject = Self { world, ids: Vec::new() };
        for session in 0..2 {
            let tracker = subject.open(random.uuid());
            for granule in [3, 500, 1019, 1020, 2047] {
                subject.write(&tracker, granule + session, random.next());
                tracker.flush_map().unwrap();
            }
            subject.ids.push((tracker.seal().unwrap(), subject.world.content()));
            subject.write(&tracker, 700 + session, random.next());
            subject.write(&tracker, 1500, random.next());
            if clean || session == 0 {
                tracker.close_clean().unwrap();
            }
        }
        subject
    }

    fn open(&self, next: Uuid) -> Tracker {
        let found = identity(self.world.guid());
        let opened = Tracker::open_in(&self.world, &found, next, 1, Rules::default()).unwrap();
        assert_eq!(opened.1, Continuity::Kept);
        self.world.set_guid(next);
        opened.0
    }

    fn write(&self, tracker: &Tracker, granule: u64, value: u64) {
        let granule = granule.min(GRANULES - 1);
        let _guard = tracker.before_write(granule * GRANULE, GRANULE).unwrap();
        self.world.write_granule(granule, value);
    }

    /// Every id is answered with a superset or not at all, in both ways to open. Returns how many
    /// were answered.
    fn check(&self, world: &World, what: &str) -> usize {
        let found = identity(world.guid());
        let mut answered = 0;
        if let Ok(tracker) = Tracker::open_read_only_in(world, &found) {
            self.check_tracker(&tracker, world, what);
        }
        let (tracker, continuity) =
            Tracker::open_in(world, &found, Uuid::from_u128(1), 1, Rules::default()).unwrap();
        answered += self.check_tracker(&tracker, world, what);
        assert!(answered == 0 || continuity == Continuity::Kept, "{what}");
        answered
    }

    fn check_tracker(&self, tracker: &Tracker, world: &World, what: &str) -> usize {
        let content = world.content();
        let known = self.ids.iter().filter(|(id, _)| tracker.knows(id));
        known
            .map(|(id, then)| {
                let changed = tracker.changed_after(id.epoch, 0..SIZE).unwrap();
                let changed = flags(&changed, GRANULES);
                let missed = (0..GRANULES as usize).find(|&g| content[g] != then[g] && !changed[g]);
                assert_eq!(missed, None, "{what}: since epoch {}", id.epoch);
            })
            .count()
    }
}

fn subjects() -> [Subject; 2] {
    [Subject::new(true), Subject::new(false)]
}

#[test]
fn a_flipped_bit_anywhere_never_hides_a_change() {
    for subject in subjects() {
        assert_eq!(subject.check(&subject.world.copy(), "undamaged"), 2);
        for file in [Name::Rct, Name::Mrt] {
            let bytes = subject.world.bytes(file);
            let mut random = Random(7);
            for at in (0..bytes.len()).step_by(PAGE) {
                // The head of each page, and somewhere in the rest.
                for bit in [0, 64, 8 * 70 + 1, random.below(8 * PAGE as u64) as usize] {
                    let mut damaged = bytes.clone();
                    damaged[at + bit / 8] ^= 1 << (bit % 8);
                    let world = subject.world.copy();
                    world.put_bytes(file, Some(damaged));
                    let answered = subject.check(&world, &format!("{file:?} page {at} bit {bit}"));
                    // One header, one map page or one bitmap page never costs the older id.
                    assert!(answered >= 1, "{file:?} page {at} bit {bit}");
                }
            }
        }
    }
}

#[test]
fn both_headers_bad_is_an_explicit_loss() {
    for subject in subjects() {
        for file in [Name::Rct, Name::Mrt] {
            let mut bytes = subject.world.bytes(file);
            bytes[20] ^= 1;
            bytes[PAGE + 20] ^= 1;
            let world = subject.world.copy();
            world.put_bytes(file, Some(bytes));
            assert_eq!(subject.check(&world, "headers"), 0);
        }
    }
}

#[test]
fn truncated_grown_and_missing_files_are_an_explicit_loss() {
    for subject in subjects() {
        for file in [Name::Rct, Name::Mrt] {
            let bytes = subject.world.bytes(file);
            let lengths = [0, 1, PAGE, 2 * PAGE, bytes.len() / 2, bytes.len() - 1];
            let cut = lengths.map(|len| Some(bytes[..len].to_vec()));
            let grown = Some([bytes.as_slice(), &[0]].concat());
            for damaged in cut.into_iter().chain([grown, None]) {
                let what = format!("{file:?} {:?}", damaged.as_ref().map(Vec::len));
                let world = subject.world.copy();
                world.put_bytes(file, damaged);
                assert_eq!(subject.check(&world, &what), 0, "{what}");
            }
        }
    }
}

#[test]
fn files_swapped_between_disks_are_an_explicit_loss() {
    let [one, other] = subjects();
    for files in [&[Name::Rct][..], &[Name::Mrt], &[Name::Rct, Name::Mrt]] {
        let world = one.world.copy();
        for &file in files {
            world.put_bytes(file, Some(other.world.bytes(file)));
        }
        assert_eq!(one.check(&world, &format!("{files:?}")), 0);
    }
}

#[test]
fn pages_of_another_pair_count_as_changed() {
    let [one, other] = subjects();
    let (mut bytes, foreign) = (one.world.bytes(Name::Rct), other.world.bytes(Name::Rct));
    bytes[2 * PAGE..].copy_from_slice(&foreign[2 * PAGE..]);
    let world = one.world.copy();
    world.put_bytes(Name::Rct, Some(bytes));
    let tracker = Tracker::open_read_only_in(&world, &identity(world.guid())).unwrap();
    assert_eq!(tracker.changed_after(u32::MAX - 1, 0..SIZE).unwrap(), [0..SIZE]);
    one.check(&world, "pages");
}

/// Older copies of one file or of both, put back beside the disk as it is now.
#[test]
fn stale_files_are_an_explicit_loss() {
    let subject = Subject::new(true);
    let old: Vec<_> = [Name::Rct, Name::Mrt].map(|f| (f, subject.world.bytes(f))).into();
    let tracker = subject.open(Uuid::from_u128(0x51));
    subject.write(&tracker, 42, 42);
    drop(tracker);
    for files in [&old[..1], &old[1..], &old[..]] {
        let world = subject.world.copy();
        for (file, bytes) in files {
            world.put_bytes(*file, Some(bytes.clone()));
        }
        assert_eq!(subject.check(&world, "stale"), 0);
    }
}

#[test]
fn arbitrary_bytes_as_tracking_files_do_no_harm() {
    let mut random = Random(99);
    let subject = Subject::new(false);
    for round in 0..200 {
        let world = subject.world.copy();
        for file in [Name::Rct, Name::Mrt] {
            let mut bytes = subject.world.bytes(file);
            for _ in 0..random.below(40) {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] = random.next() as u8;
            }
            world.put_bytes(file, Some(bytes));
        }
        subject.check(&world, &format!("round {round}"));
    }
}

/// A header with a right checksum is still not believed blindly.
#[test]
fn forged_headers_are_bounded() {
    use crate::rct::header::{RctHeader, Record};
    let subject = Subject::new(true);
    let page: [u8; PAGE] = subject.world.bytes(Name::Rct)[..PAGE].try_into().unwrap();
    let honest = RctHeader::decode(&page).unwrap();
    let forge = |change: &dyn Fn(&mut RctHeader)| {
        let mut header = honest.clone();
        header.sequence += 10;
        change(&mut header);
        let world = subject.world.copy();
        let mut bytes = subject.world.bytes(Name::Rct);
        bytes[..PAGE].copy_from_slice(&header.encode());
        bytes[PAGE..2 * PAGE].copy_from_slice(&header.encode());
        world.put_bytes(Name::Rct, Some(bytes));
        let found =
            DiskIdentity { lineage: LINEAGE, size: header.size, data_write_guid: world.guid() };
        Tracker::open_read_only_in(&world, &found).is_ok()
    };
    assert!(forge(&|_| {}));
    assert!(!forge(&|h| h.size = u64::MAX));
    assert!(!forge(&|h| h.granule = 4096));
    assert!(!forge(&|h| h.granule = 0));
    assert!(!forge(&|h| h.sequence = u64::MAX));
    assert!(!forge(&|h| h.epoch = u32::MAX));
    assert!(!forge(&|h| h.epoch = 1));
    assert!(!forge(&|h| h.session = Uuid::nil()));
}
