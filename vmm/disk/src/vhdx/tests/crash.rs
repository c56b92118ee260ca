//! Kills at every point of a file's life. The file system may have kept any part of what was written
//! after the last sync, torn at disk sectors. Whatever it kept: the file opens; what was flushed is
//! there, or something written later; nothing is where it was never written.

mod deaths;
mod kills;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use self::kills::Kills;
use super::recorder::{Event, Image, Recorder};
use super::*;
use crate::vhdx::create::create_in;
use crate::vhdx::storage::Storage;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = MIB;
const PER_BLOCK: u64 = BLOCK / 512;
/// The last block is cut.
const SIZE: u64 = 599 * MIB + 64 * 512;
/// The blocks in use: they lie on two pages of the table, apart from that of the bitmap's entry, and on
/// four pages of the bitmap. Sectors are counted through them.
const HOT: [u64; 6] = [0, 1, 17, 520, 521, 599];

/// What a sector holds: the parent's content, zeros, the data of a write, or what was never written.
type Value = u64;
const ABSENT: Value = 0;
const ZERO: Value = 1;
const GARBAGE: Value = u64::MAX;

/// Small pseudo-random numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    /// First sector, sectors; both counted through the hot blocks.
    Write(u64, u64),
    Zero(u64, u64),
    Flush,
    /// Gives two of the hot blocks up.
    Release(usize, usize),
    Parent,
    Guid,
    Reopen,
}

fn random_op(numbers: &mut Numbers, differencing: bool) -> Op {
    let hot = numbers.below(HOT.len() as u64);
    let sectors = sectors_of(hot);
    // Few places, so that writes meet; at both ends of a block.
    let start = numbers.pick(&[0, 1, 5, 9, 60, sectors - 9, sectors - 1]);
    let len = numbers.pick(&[1, 3, 8, 24]).min(sectors - start);
    match numbers.below(20) {
        0..8 => Op::Write(hot * PER_BLOCK + start, len),
        8 => Op::Write(hot * PER_BLOCK, sectors),
        // From one block into the next.
        9 => Op::Write(numbers.pick(&[0, 3]) * PER_BLOCK + PER_BLOCK - 4, 9),
        10 => Op::Zero(hot * PER_BLOCK + start, len),
        11 | 12 => Op::Zero(hot * PER_BLOCK, sectors),
        13 => Op::Release(hot as usize, numbers.below(HOT.len() as u64) as usize),
        14 if differencing => Op::Parent,
        15 => Op::Guid,
        16 if numbers.below(2) == 0 => Op::Reopen,
        _ => Op::Flush,
    }
}

fn sectors_of(hot: u64) -> u64 {
    (SIZE - HOT[hot as usize] * BLOCK).min(BLOCK) / 512
}

/// Where a sector counted through the hot blocks lies on the disk.
fn place(sector: u64) -> u64 {
    HOT[(sector / PER_BLOCK) as usize] * BLOCK + sector % PER_BLOCK * 512
}

fn sector_data(value: Value, sector: u64) -> Vec<u8> {
    let mut unit = value.to_le_bytes().to_vec();
    unit.extend(place(sector).to_le_bytes());
    unit.repeat(32)
}

fn value_of(data: &[u8], sector: u64) -> Value {
    let (value, at) = (data[..8].try_into().unwrap(), data[8..16].try_into().unwrap());
    let (value, at) = (u64::from_le_bytes(value), u64::from_le_bytes(at));
    match (value, at) {
        // All units are the same.
        _ if data[16..] != data[..496] => GARBAGE,
        (0, 0) => ZERO,
        (2.., at) if at == place(sector) => value,
        _ => GARBAGE,
    }
}

/// Everything in the hot blocks.
fn values(disk: &Vhdx) -> Vec<Value> {
    let mut found = Vec::with_capacity(HOT.len() * PER_BLOCK as usize);
    for hot in 0..HOT.len() as u64 {
        let (begin, sectors) = (HOT[hot as usize] * BLOCK, sectors_of(hot));
        let mut data = vec![0xee; (sectors * 512) as usize];
        let absent = disk.read_at(begin, &mut data).unwrap();
        let first = found.len() as u64;
        found.extend(
            data.chunks_exact(512).zip(first..).map(|(sector, number)| value_of(sector, number)),
        );
        for range in absent {
            let from = (range.start - begin) / 512 + first;
            let to = (range.end - begin) / 512 + first;
            found[from as usize..to as usize].fill(ABSENT);
        }
        found.resize(((hot + 1) * PER_BLOCK) as usize, ABSENT);
    }
    found
}

/// A change of the disk and when it began, in events of the file.
struct Change {
    begin: usize,
    sectors: Range<u64>,
    value: Value,
}

/// A value that is durable when its setting ends.
struct Setting {
    begin: usize,
    end: usize,
    value: Uuid,
}

/// One life of a file, from an image on.
struct Life {
    start: Image,
    recorder: Recorder,
    /// `None` only while it is being opened again.
    disk: Option<Vhdx>,
    differencing: bool,
    fault: Fault,
    pages_per_entry: usize,
    next: Value,
    values: Vec<Value>,
    changes: Vec<Change>,
    /// Ends of flushes, and the number of changes that they made durable.
    flushes: Vec<(usize, usize)>,
    guids: Vec<Setting>,
    parents: Vec<Setting>,
}

/// What is broken on purpose: the test has to find it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// No sync of the payload before the log entry.
    LostPayloadSync,
    /// Pages in place may be lost after the entry that held them has been superseded.
    LostPageSync,
    /// Places are used again before the log says that they are free.
    EarlyReuse,
}

fn new_file(differencing: bool) -> Image {
    let file = Recorder::default();
    let parent = ParentLink { path: "/d/base.vhdx".into(), data_write_guid: Uuid::from_u128(1) };
    let o = CreateOptions { parent: differencing.then_some(parent), ..options(SIZE) };
    create_in(Path::new("/d/test.avhdx"), &file, &o).unwrap();
    file.image()
}

fn open(file: &Recorder, access: Access) -> crate::Result<Vhdx> {
    Vhdx::from_storage(Path::new("/d/test.avhdx"), Box::new(file.clone()), access)
}

impl Life {
    fn new(start: Image, fault: Fault, pages_per_entry: usize, next: Value) -> Self {
        let recorder = Recorder::new(start.clone());
        let before = open(&recorder, Access::ReadOnly).unwrap();
        let p = before.properties();
        let known = |value| vec![Setting { begin: 0, end: 0, value }];
        let mut life = Self {
            start,
            recorder,
            disk: None,
            differencing: p.kind == Kind::Differencing,
            fault,
            pages_per_entry,
            next,
            values: values(&before),
            changes: Vec::new(),
            flushes: vec![(0, 0)],
            guids: known(p.data_write_guid),
            parents: known(p.parent.map_or(Uuid::nil(), |l| l.linkage)),
        };
        life.reopen();
        life
    }

    fn reopen(&mut self) {
        drop(self.disk.take());
        self.flushes.push((self.recorder.now(), self.changes.len()));
        let mut disk = open(&self.recorder, Access::ReadWrite).unwrap();
        disk.limit_log_entries(self.pages_per_entry);
        disk.reuse_early = self.fault == Fault::EarlyReuse;
        self.disk = Some(disk);
    }

    fn changed(&mut self, begin: usize, sectors: Range<u64>, value: Value) {
        // Without a parent, absent is zero.
        let value = if value == ABSENT && !self.differencing { ZERO } else { value };
        self.changes.push(Change { begin, sectors, value });
    }

    fn run(&mut self, op: Op) {
        let begin = self.recorder.now();
        let disk = self.disk.as_ref().unwrap();
        match op {
            Op::Write(first, n) => {
                self.next += 1;
                let value = self.next;
                let data: Vec<u8> =
                    (first..first + n).flat_map(|s| sector_data(value, s)).collect();
                disk.write_at(place(first), &data).unwrap();
                self.changed(begin, first..first + n, value);
            }
            Op::Zero(first, n) => {
                disk.write_zeroes(place(first), n * 512).unwrap();
                self.changed(begin, first..first + n, ZERO);
            }
            Op::Flush => {
                disk.flush().unwrap();
                self.flushes.push((self.recorder.now(), self.changes.len()));
            }
            Op::Release(a, b) => {
                disk.release_blocks(&[HOT[a], HOT[b]]).unwrap();
                for hot in [a as u64, b as u64] {
                    let first = hot * PER_BLOCK;
                    self.changed(begin, first..first + sectors_of(hot), ABSENT);
                }
                self.flushes.push((self.recorder.now(), self.changes.len()));
            }
            Op::Parent => {
                let value = Uuid::from_u128(self.parents.len() as u128 + 1000);
                let locator = ParentLocator {
                    linkage: value,
                    linkage2: None,
                    relative_path: Some(".\\".to_owned() + &"p".repeat(self.parents.len() * 700)),
                    volume_path: None,
                    absolute_path: None,
                };
                disk.set_parent(&locator).unwrap();
                let end = self.recorder.now();
                self.parents.push(Setting { begin, end, value });
                self.flushes.push((end, self.changes.len()));
            }
            Op::Guid => {
                let value = Uuid::from_u128(self.guids.len() as u128 + 2000);
                disk.set_data_write_guid(value).unwrap();
                self.guids.push(Setting { begin, end: self.recorder.now(), value });
            }
            Op::Reopen => self.reopen(),
        }
    }
}

/// Three lives of one file, each from a state that a kill in the one before left. Gives the number of
/// states looked at.
fn lives(seed: u64, differencing: bool, fault: Fault, entry: usize) -> Result<usize, String> {
    let mut numbers = Numbers(seed);
    let mut image = new_file(differencing);
    let mut states = 0;
    for life_number in 0..3u64 {
        let mut life = Life::new(image, fault, entry, 1 + (life_number << 32));
        let mut said = Vec::new();
        while said.len() < 25 {
            let op = random_op(&mut numbers, differencing);
            // The locator's pages need one entry.
            if entry == usize::MAX || !matches!(op, Op::Parent) {
                life.run(op);
                said.push(op);
            }
        }
        life.reopen();
        let mut kills = Kills::new(&life, seed);
        kills.all().map_err(|e| format!("seed {seed}, life {life_number} of {said:?}: {e}"))?;
        states += kills.states;
        image = kills.survivor.unwrap();
    }
    Ok(states)
}

fn survive(seeds: Range<u64>, differencing: bool, entry: usize) {
    for seed in seeds {
        let states =
            lives(seed, differencing, Fault::None, entry).unwrap_or_else(|e| panic!("{e}"));
        assert!(states > 500, "only {states} states");
    }
}

#[test]
fn a_size_that_another_thread_sets_during_a_flush_is_not_promised() {
    let mut life = Life::new(new_file(true), Fault::None, usize::MAX, 1);
    // The first entry counts only with the header that names it; take the second.
    life.run(Op::Write(0, 8));
    life.run(Op::Flush);
    life.run(Op::Write(PER_BLOCK, 8));
    life.recorder.extend_after_sync(64 * MIB);
    life.run(Op::Flush);
    for seed in 0..20 {
        Kills::new(&life, seed).all().unwrap();
    }
}

#[test]
fn dynamic_file_survives_every_kill() {
    survive(0..3, false, usize::MAX);
}

#[test]
fn differencing_file_survives_every_kill() {
    survive(10..13, true, usize::MAX);
}

#[test]
fn flushes_of_several_log_entries_survive_every_kill() {
    survive(20..22, true, 1);
    survive(22..23, true, 2);
}

/// The kills must find each fault; otherwise the tests above prove nothing.
fn is_found(fault: Fault, differencing: bool) {
    assert!((0..6).any(|seed| lives(seed, differencing, fault, usize::MAX).is_err()));
}

#[test]
fn payload_that_is_not_synced_before_its_entry_is_noticed() {
    is_found(Fault::LostPayloadSync, false);
    is_found(Fault::LostPayloadSync, true);
}

#[test]
fn pages_that_are_not_synced_before_their_entry_is_superseded_are_noticed() {
    is_found(Fault::LostPageSync, true);
}

#[test]
fn places_that_are_used_again_too_early_are_noticed() {
    is_found(Fault::EarlyReuse, false);
    is_found(Fault::EarlyReuse, true);
}
