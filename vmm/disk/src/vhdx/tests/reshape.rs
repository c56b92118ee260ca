//! Resizing and compacting: what the disk reads as before and after, and at every point at which a
//! kill may come. The file system may have kept any part of what was written after the last sync.

use super::recorder::{Event, Image, Recorder};
use super::*;
use crate::vhdx::create::create_in;
use crate::vhdx::layout::{Header, checksum, put};

const MIB: u64 = 1 << 20;
/// The last block is cut.
const SIZE: u64 = 12 * MIB + 3 * 512;
/// Disks that are to shrink have nothing behind it.
const LIMIT: u64 = 8 * MIB;
/// Of very large disks only the beginning is looked at.
const SMALL: u64 = 2 * MIB;

/// Small pseudo-random numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn open(file: &Recorder, access: Access) -> crate::Result<Vhdx> {
    Vhdx::from_storage(Path::new("/d/test.avhdx"), Box::new(file.clone()), access)
}

/// A file in memory.
fn new_file(size: u64, block: u32, kind: Kind) -> Recorder {
    let file = Recorder::default();
    let parent = ParentLink { path: "/d/base.vhdx".into(), data_write_guid: Uuid::from_u128(1) };
    let o = CreateOptions {
        block_size: block,
        fixed: kind == Kind::Fixed,
        parent: (kind == Kind::Differencing).then_some(parent),
        ..options(size)
    };
    create_in(Path::new("/d/test.avhdx"), &file, &o).unwrap();
    file
}

/// What the file itself says, up to `size`: `None` where it asks the parent.
type Content = Vec<(u64, Option<Vec<u8>>)>;

/// The content in sectors' runs, with whatever does not differ from zeros left out in a base.
fn content(disk: &Vhdx, until: u64) -> Content {
    let differencing = disk.properties().kind == Kind::Differencing;
    let mut found = Vec::new();
    let until = until.min(disk.properties().geometry.size);
    let mut at = 0;
    while at < until {
        let n = (until - at).min(64 << 10);
        let mut buf = vec![0; n as usize];
        let absent = disk.read_at(at, &mut buf).unwrap();
        let whole = at..at + n;
        match absent[..] {
            [] if differencing || buf.iter().any(|b| *b != 0) => found.push((at, Some(buf))),
            [ref one] if *one == whole => {}
            _ => {
                found.push((at, Some(buf)));
                found.extend(absent.iter().map(|r| (r.start, None)));
            }
        }
        at += n;
    }
    found
}

/// Behind `from` there is nothing but zeros, or nothing at all.
fn assert_zero_behind(disk: &Vhdx, from: u64, what: &str) {
    let size = disk.properties().geometry.size;
    let mut at = from;
    while at < size {
        let n = (size - at).min(1 << 20);
        let mut buf = vec![0; n as usize];
        disk.read_at(at, &mut buf).unwrap();
        assert!(buf.iter().all(|b| *b == 0), "{what}: something at {at}");
        at += n;
    }
}

/// Blocks with data, parts, zeros and holes all over the disk; freed places in between, and in the end
/// nothing behind `limit`.
fn fill(disk: &Vhdx, seed: u64, limit: u64) {
    let mut numbers = Numbers(seed);
    let block = u64::from(disk.properties().block_size);
    for _ in 0..30 {
        let at = numbers.below(limit / 512) * 512;
        let longest = [8, 300, 2 * block / 512][numbers.below(3) as usize];
        let len = ((1 + numbers.below(longest)) * 512).min(limit - at);
        match numbers.below(4) {
            0 => disk.write_zeroes(at / block * block, block.min(limit - at / block * block)),
            1 => disk.write_at(at, &vec![0; len as usize]),
            _ => disk.write_at(at, &pattern(numbers.below(1 << 30), len as usize)),
        }
        .unwrap();
        if numbers.below(3) == 0 {
            disk.flush().unwrap();
        }
    }
}

/// States that a kill after some of the events may leave.
fn kills(start: &Image, events: &[Event], seed: u64, look: impl FnMut(usize, &Image)) {
    kills_without(start, events, seed, |_| false, |_| true, look);
}

/// The same for a program that lacks the syncs before events of some kind.
fn kills_without(
    start: &Image,
    events: &[Event],
    seed: u64,
    unsafe_before: impl Fn(&Event) -> bool,
    wanted: impl Fn(usize) -> bool,
    mut look: impl FnMut(usize, &Image),
) {
    let mut numbers = Numbers(seed);
    let mut durable = start.clone();
    let mut unsynced: Vec<&Event> = Vec::new();
    for k in 0..=events.len() {
        let ways = if wanted(k) { 0..4 } else { 0..0 };
        for way in ways {
            let mut image = durable.clone();
            for event in &unsynced {
                match (way, numbers.below(3)) {
                    (0, _) | (2, 0) => image.apply(event),
                    (1, _) | (2, 1) => {}
                    _ => image.apply_torn(event, || numbers.below(2) == 0),
                }
            }
            look(k, &image);
            if unsynced.is_empty() {
                break;
            }
        }
        match events.get(k) {
            Some(Event::Sync) if events.get(k + 1).is_some_and(&unsafe_before) => {}
            Some(Event::Sync) => unsynced.drain(..).for_each(|event| durable.apply(event)),
            Some(event) => unsynced.push(event),
            None => {}
        }
    }
}

/// Runs an operation on a file and looks at every state that a kill in it leaves: the file opens, its
/// size is the old or the new one, it reads the same, and the operation done again ends well.
fn survives(start: &Image, seed: u64, what: &str, operation: impl Fn(&mut Vhdx)) {
    let before = open(&Recorder::new(start.clone()), Access::ReadOnly).unwrap();
    let old_size = before.properties().geometry.size;
    let file = Recorder::new(start.clone());
    let mut disk = open(&file, Access::ReadWrite).unwrap();
    operation(&mut disk);
    let new_size = disk.properties().geometry.size;
    drop(disk);
    let expected = content(&before, old_size.min(new_size));
    let after = open(&Recorder::new(file.image()), Access::ReadOnly).unwrap();
    assert!(content(&after, old_size.min(new_size)) == expected, "{what}: afterwards");
    assert_zero_behind(&after, old_size, what);
    if kind_of(&before) == Kind::Differencing && new_size > old_size {
        // "Ask the parent", not zeros of its own: nothing was written there.
        assert!(
            after
                .presence(old_size, new_size - old_size)
                .unwrap()
                .iter()
                .all(|(r, p)| { *p == Presence::Absent || r.start / MIB == old_size / MIB })
        );
    }
    let mut states = 0;
    let mut numbers = Numbers(seed);
    kills(start, &file.events(), seed, |k, image| {
        states += 1;
        let at = format!("{what}, killed at event {k}, state {states}");
        let found = open(&Recorder::new(image.clone()), Access::ReadOnly)
            .unwrap_or_else(|e| panic!("{at}: {e}"));
        let size = found.properties().geometry.size;
        assert!(size == old_size || size == new_size, "{at}: {size}");
        assert!(content(&found, old_size.min(new_size)) == expected, "{at}: another content");
        assert_zero_behind(&found, old_size, &at);
        assert_eq!(found.properties().disk_id, before.properties().disk_id);
        if numbers.below(12) > 0 {
            return;
        }
        let again = Recorder::new(image.clone());
        let mut disk = open(&again, Access::ReadWrite).unwrap();
        operation(&mut disk);
        assert!(content(&disk, old_size.min(new_size)) == expected, "{at}: done again");
        assert_zero_behind(&disk, old_size, &at);
        // Space that is free is really free.
        let block = u64::from(disk.properties().block_size);
        let tail = new_size / block * block;
        if tail > 0 {
            disk.write_at(tail - block, &pattern(9, block as usize)).unwrap();
        }
        drop(disk);
        let disk = open(&again, Access::ReadOnly).unwrap();
        assert!(
            content(&disk, tail.saturating_sub(block))
                == content(&after, tail.saturating_sub(block))
        );
    });
    assert!(states > 10, "{what}: {states} states");
}

fn kind_of(disk: &Vhdx) -> Kind {
    disk.properties().kind
}

const KINDS: [Kind; 3] = [Kind::Dynamic, Kind::Fixed, Kind::Differencing];

fn filled(size: u64, limit: u64, kind: Kind, seed: u64) -> Image {
    let file = new_file(size, 1 << 20, kind);
    let disk = open(&file, Access::ReadWrite).unwrap();
    fill(&disk, seed, limit);
    drop(disk);
    file.image()
}

#[test]
fn growing_survives_every_kill() {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let start = filled(SIZE, SIZE, kind, seed as u64);
        survives(&start, 1, &format!("grow {kind:?}"), |disk| disk.resize(21 * MIB + 512).unwrap());
    }
}

#[test]
fn growing_moves_a_block_table_without_room_and_survives_every_kill() {
    // As long as a differencing disk of 124 GiB in blocks of 1 MiB needs, and no longer: 1 MiB.
    let size = (129 << 30) + 4096;
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let start = filled(124 << 30, SMALL, kind, seed as u64);
        let file = Recorder::new(start.clone());
        let mut disk = open(&file, Access::ReadWrite).unwrap();
        let before = content(&disk, SMALL);
        disk.resize(size).unwrap();
        drop(disk);
        let events = file.events();
        let tables = |image: &Image| image.to_bytes(320 << 10)[192 << 10..].to_vec();
        assert!(tables(&start) != tables(&file.image()), "the table has moved");
        // The last block of all can be used, and so can the old table's place.
        let disk = open(&file, Access::ReadWrite).unwrap();
        assert!(content(&disk, SMALL) == before);
        for at in [size - 4096, 123 << 30, 122 << 30] {
            disk.write_at(at, &pattern(at, 4096)).unwrap();
        }
        drop(disk);
        let disk = open(&file, Access::ReadOnly).unwrap();
        for at in [size - 4096, 123 << 30, 122 << 30] {
            let mut found = vec![0; 4096];
            disk.read_at(at, &mut found).unwrap();
            assert!(found == pattern(at, 4096));
        }
        assert!(content(&disk, SMALL) == before);
        let mut states = 0;
        kills(&start, &events, 7, |k, image| {
            states += 1;
            let disk = open(&Recorder::new(image.clone()), Access::ReadOnly)
                .unwrap_or_else(|e| panic!("{kind:?}, killed at {k}: {e}"));
            assert!(content(&disk, SMALL) == before, "{kind:?}, killed at {k}");
        });
        assert!(states > 20, "{states}");
    }
}

#[test]
fn shrinking_survives_every_kill() {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let start = filled(SIZE + 9 * MIB, LIMIT, kind, seed as u64);
        let least = open(&Recorder::new(start.clone()), Access::ReadOnly).unwrap().least_size();
        let least = least.unwrap();
        assert!(least <= LIMIT && least > 5 * MIB, "{least}");
        survives(&start, 1, &format!("shrink {kind:?}"), |disk| disk.resize(least).unwrap());
    }
}

#[test]
fn shrinking_says_how_far_it_can_go_and_changes_nothing_else() {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let start = filled(SIZE, LIMIT, kind, seed as u64);
        let file = Recorder::new(start);
        let mut disk = open(&file, Access::ReadWrite).unwrap();
        let (least, begun) = (disk.least_size().unwrap(), file.now());
        let said = disk.resize(least - 512).unwrap_err().to_string();
        assert!(said.contains(&format!("data up to {least}")), "{said}");
        for size in [0, 100, (64 << 40) + 512] {
            assert!(disk.resize(size).is_err());
        }
        assert_eq!(file.now(), begun);
    }
}

#[test]
fn shrinking_gives_back_what_grew_and_a_grown_disk_shows_nothing_old() {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let start = filled(SIZE, LIMIT, kind, seed as u64);
        let file = Recorder::new(start);
        let mut disk = open(&file, Access::ReadWrite).unwrap();
        let before = content(&disk, LIMIT);
        for _ in 0..3 {
            disk.resize(30 * MIB).unwrap();
            disk.write_at(LIMIT, &pattern(1, 20 << 20)).unwrap();
            disk.write_zeroes(LIMIT, 22 * MIB).unwrap();
            disk.flush().unwrap();
            disk.resize(LIMIT + 512).unwrap();
        }
        disk.resize(SIZE).unwrap();
        assert!(content(&disk, LIMIT) == before);
        assert_zero_behind(&disk, LIMIT, "after three rounds");
    }
}

#[test]
fn junk_that_another_writer_left_behind_the_end_is_never_shown() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let file = new_file(MIB + 512, 1 << 20, kind);
        let disk = open(&file, Access::ReadWrite).unwrap();
        disk.write_at(MIB, &pattern(1, 512)).unwrap();
        drop(disk);
        let mut bytes = file.image().to_bytes(file.image().len() as usize);
        let at = bytes.chunks(512).position(|w| w == pattern(1, 512)).unwrap() * 512;
        bytes[at + 512..at + (1 << 20)].fill(0x66);
        // Entries behind the size: nobody looks at them.
        let table = 6 << 20;
        put(&mut bytes, table + 8 * 5, &u64::MAX.to_le_bytes());
        let file = Recorder::new(Image::from_bytes(&bytes));
        let mut disk = open(&file, Access::ReadWrite).unwrap();
        disk.resize(9 * MIB).unwrap();
        drop(disk);
        let disk = open(&file, Access::ReadOnly).unwrap();
        let mut found = vec![1; 9 << 20];
        assert!(disk.read_at(0, &mut found).unwrap().is_empty());
        assert!(found[1 << 20..][..512] == pattern(1, 512));
        assert!(found[(1 << 20) + 512..].iter().all(|b| *b == 0));
    }
}

#[test]
fn compacting_survives_every_kill() {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let start = filled(SIZE, SIZE, kind, seed as u64 + 3);
        survives(&start, 2, &format!("compact {kind:?}"), |disk| {
            let guid = disk.properties().data_write_guid;
            let go = std::sync::atomic::AtomicBool::new(false);
            let plan = disk.compact_plan(true, &|_| (), &go).unwrap();
            assert_eq!(disk.compact(true, &|_| (), &go).unwrap(), plan);
            assert_eq!(disk.properties().data_write_guid, guid);
        });
    }
}

#[test]
fn compacting_leaves_nothing_that_could_go() {
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let file = new_file(20 * MIB, 1 << 20, kind);
        let mut disk = open(&file, Access::ReadWrite).unwrap();
        disk.write_at(0, &pattern(1, 20 << 20)).unwrap();
        disk.flush().unwrap();
        disk.write_at(MIB, &vec![0; 9 << 20]).unwrap();
        disk.write_zeroes(12 * MIB, 4 * MIB).unwrap();
        disk.flush().unwrap();
        let go = std::sync::atomic::AtomicBool::new(false);
        let done = disk.compact(true, &|_| (), &go).unwrap();
        assert_eq!((done.zero_blocks, done.empty_blocks), (9, 0));
        // Seven blocks of twenty behind log, metadata and table.
        assert_eq!(done.length_after, (7 + 7) * MIB);
        assert_eq!(file.image().len(), done.length_after);
        assert_eq!(disk.block_state(3), BlockState::Zero);
        let again = disk.compact(true, &|_| (), &go).unwrap();
        assert_eq!((again.moved, again.length_before), (0, again.length_after));
        // Without a look for zeros only free places count.
        disk.write_at(2 * MIB, &vec![0; 1 << 20]).unwrap();
        disk.flush().unwrap();
        assert_eq!(disk.compact(false, &|_| (), &go).unwrap().length_after, 15 * MIB);
    }
}

#[test]
fn cancelled_compacting_leaves_a_right_file() {
    let start = filled(SIZE, SIZE, Kind::Dynamic, 11);
    let before = open(&Recorder::new(start.clone()), Access::ReadOnly).unwrap();
    for after in [1, 3, 25, 30] {
        let file = Recorder::new(start.clone());
        let mut disk = open(&file, Access::ReadWrite).unwrap();
        let (calls, stop) = (std::cell::Cell::new(0), std::sync::atomic::AtomicBool::new(false));
        let count = |_| {
            calls.set(calls.get() + 1);
            stop.store(calls.get() >= after, std::sync::atomic::Ordering::Relaxed);
        };
        let done = disk.compact(true, &count, &stop);
        assert!(matches!(done, Err(crate::DiskError::Cancelled) | Ok(_)));
        disk.write_at(0, &pattern(1, 512)).unwrap();
        disk.write_at(0, &vec![0; 512]).unwrap();
        drop(disk);
        let disk = open(&file, Access::ReadOnly).unwrap();
        let tail = |disk: &Vhdx| {
            content(disk, SIZE).into_iter().filter(|(at, _)| *at >= MIB).collect::<Vec<_>>()
        };
        assert!(tail(&disk) == tail(&before), "cancelled after {after}");
    }
}

#[test]
fn regions_of_other_makers_stay_where_they_are() {
    let file = new_file(124 << 30, 1 << 20, Kind::Dynamic);
    let at = file.image().len();
    let mut bytes = file.image().to_bytes(at as usize + (1 << 20));
    bytes[at as usize..].fill(0x77);
    let table = 192 << 10;
    for copy in [table, table + (64 << 10)] {
        put(&mut bytes, copy + 8, &3u32.to_le_bytes());
        put(&mut bytes, copy + 16 + 64, &[9; 16]);
        put(&mut bytes, copy + 32 + 64, &at.to_le_bytes());
        put(&mut bytes, copy + 40 + 64, &(1u32 << 20).to_le_bytes());
        let crc = checksum(&bytes[copy..copy + (64 << 10)]);
        put(&mut bytes, copy + 4, &crc.to_le_bytes());
    }
    let file = Recorder::new(Image::from_bytes(&bytes));
    let mut disk = open(&file, Access::ReadWrite).unwrap();
    disk.write_at(0, &pattern(1, 3 << 20)).unwrap();
    disk.resize(129 << 30).unwrap();
    assert!(file.image().len() > at + (1 << 20) + (4 << 20), "the table has moved");
    disk.compact(true, &|_| (), &std::sync::atomic::AtomicBool::new(false)).unwrap();
    drop(disk);
    let after = file.image().to_bytes(at as usize + (1 << 20));
    assert!(after[at as usize..].iter().all(|b| *b == 0x77));
    assert_eq!(&after[table + 16 + 64..][..32], &bytes[table + 16 + 64..][..32]);
    let disk = open(&file, Access::ReadOnly).unwrap();
    assert!(read_chain(&[&disk], 0, 3 << 20) == pattern(1, 3 << 20));
}

#[test]
fn torn_copies_are_made_whole_by_a_writable_open() {
    let whole = new_file(SIZE, 1 << 20, Kind::Dynamic).image();
    let bytes = whole.to_bytes(7 << 20);
    for torn in [64 << 10, 128 << 10, 192 << 10, 256 << 10] {
        let mut b = bytes.clone();
        b[torn + 30] ^= 1;
        let file = Recorder::new(Image::from_bytes(&b));
        drop(open(&file, Access::ReadOnly).unwrap());
        assert_eq!(file.now(), 0);
        drop(open(&file, Access::ReadWrite).unwrap());
        let after = file.image().to_bytes(7 << 20);
        assert!([64 << 10, 128 << 10].iter().all(|at| Header::parse(&after[*at..]).is_some()));
        assert!(after[192 << 10..256 << 10] == bytes[192 << 10..256 << 10], "{torn}");
        assert!(after[256 << 10..320 << 10] == bytes[256 << 10..320 << 10], "{torn}");
    }
}

/// The kills must find what is not in order; otherwise the tests above prove nothing.
#[test]
fn missing_syncs_are_noticed() {
    let is_log =
        |e: &Event| matches!(e, Event::Write { offset, .. } if (MIB..5 * MIB).contains(offset));
    let is_header = |e: &Event| matches!(e, Event::Write { offset, .. } if *offset < MIB);
    let is_cut = |e: &Event| matches!(e, Event::SetLen(_));
    // States after a log entry was written, or after anything else, that are not right.
    let wrong = |start: &Image,
                 operation: &dyn Fn(&mut Vhdx),
                 after_log: bool,
                 unsafe_before: &dyn Fn(&Event) -> bool| {
        let before = open(&Recorder::new(start.clone()), Access::ReadOnly).unwrap();
        let size = before.properties().geometry.size;
        let until = if size > SIZE { SMALL } else { size };
        let expected = content(&before, until);
        let file = Recorder::new(start.clone());
        operation(&mut open(&file, Access::ReadWrite).unwrap());
        let events = file.events();
        let mut wrong = 0;
        for seed in 0..if after_log { 8 } else { 3 } {
            let wanted =
                |k: usize| !after_log || k.checked_sub(1).is_some_and(|k| is_log(&events[k]));
            kills_without(start, &events, seed, unsafe_before, wanted, |_, image| {
                let found = open(&Recorder::new(image.clone()), Access::ReadOnly);
                let right = found.is_ok_and(|disk| content(&disk, until) == expected);
                wrong += usize::from(!right);
            });
        }
        wrong
    };
    // Blocks of zeros in front: giving their places up begins the log, then others move there.
    let file = new_file(SIZE, 1 << 20, Kind::Dynamic);
    let disk = open(&file, Access::ReadWrite).unwrap();
    disk.write_at(0, &pattern(4, 12 << 20)).unwrap();
    disk.write_at(MIB, &vec![0; 4 << 20]).unwrap();
    drop(disk);
    let start = file.image();
    let go = std::sync::atomic::AtomicBool::new(false);
    let compact = |disk: &mut Vhdx| {
        disk.compact(true, &|_| (), &go).unwrap();
    };
    assert_eq!(wrong(&start, &compact, false, &|_| false), 0);
    // Copies of moved blocks, before the table names them.
    assert!(wrong(&start, &compact, true, &is_log) > 0);
    // The log's entry and what it put in place, before headers and the file's length change.
    assert!(wrong(&start, &compact, false, &|e| is_header(e) || is_cut(e)) > 0);
    let start = filled(124 << 30, SMALL, Kind::Dynamic, 4);
    let grow = |disk: &mut Vhdx| {
        // Begins the log (the first one may end it again, to cut the file's unused end off): only
        // then does an entry count without a header.
        disk.resize((124 << 30) + MIB).unwrap();
        disk.resize((124 << 30) + 2 * MIB).unwrap();
        disk.resize(129 << 30).unwrap();
    };
    assert_eq!(wrong(&start, &grow, true, &|_| false), 0);
    // The new table, before the regions name it.
    assert!(wrong(&start, &grow, true, &is_log) > 0);
}
