//! A disk and its pair in memory, with a log of every write and sync, from which the states that a
//! crash at any moment may leave are made.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::{GRANULES, Random};
use crate::rct::media::{Media, Store, Which};

/// The three files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Rct,
    Mrt,
    Disk,
}

/// The disk holds 8 bytes per granule, and behind them its DataWriteGuid.
const GUID_AT: u64 = GRANULES * 8;
/// What a device writes at once.
const SECTOR: u64 = 512;

#[derive(Clone)]
enum Op {
    Write {
        file: Name,
        offset: u64,
        data: Vec<u8>,
    },
    /// Writes to `file` logged before `upto` are durable now.
    Sync {
        file: Name,
        upto: usize,
    },
    /// The write at this place of the log is durable now.
    SyncOne(usize),
    /// A sync failed, and with it the kernel forgot the writes before `upto`.
    SyncFailed {
        file: Name,
        upto: usize,
    },
    /// A whole new file, atomically.
    Replace {
        file: Name,
        data: Vec<u8>,
    },
}

#[derive(Clone, Default)]
struct Files {
    data: [Vec<u8>; 3],
    present: [bool; 3],
}

#[derive(Default)]
struct Inner {
    /// Before the first operation.
    start: Files,
    now: Files,
    ops: Vec<Op>,
    /// Syncs until the next one of a file fails.
    fail_sync: [Option<u32>; 3],
    failures: usize,
    /// Many threads are at work: a sync lets them in between. Otherwise it does not, for on a busy
    /// machine giving the processor away costs milliseconds.
    raced: bool,
}

/// The shared, recorded files.
#[derive(Clone, Default)]
pub(super) struct World(Arc<Mutex<Inner>>);

impl World {
    /// A disk of zeros without a pair.
    pub(super) fn new(guid: Uuid) -> Self {
        let world = Self::default();
        {
            let mut inner = world.0.lock();
            let mut disk = vec![0; GUID_AT as usize];
            disk.extend_from_slice(guid.as_bytes());
            inner.now.data[2] = disk;
            inner.now.present[2] = true;
            inner.start = inner.now.clone();
        }
        world
    }

    /// Operations logged so far.
    pub(super) fn len(&self) -> usize {
        self.0.lock().ops.len()
    }

    /// Syncs of a whole file so far.
    pub(super) fn syncs(&self, name: Name) -> usize {
        let inner = self.0.lock();
        inner.ops.iter().filter(|op| matches!(op, Op::Sync { file, .. } if *file == name)).count()
    }

    pub(super) fn race(&self) {
        self.0.lock().raced = true;
    }

    pub(super) fn fail_sync(&self, file: Name, after: u32) {
        self.0.lock().fail_sync[file as usize] = Some(after);
    }

    /// Failures that were planned and have been met.
    pub(super) fn failures(&self) -> usize {
        self.0.lock().failures
    }

    pub(super) fn write(&self, file: Name, offset: u64, data: &[u8]) {
        let mut inner = self.0.lock();
        put(&mut inner.now.data[file as usize], offset, data);
        inner.ops.push(Op::Write { file, offset, data: data.to_owned() });
    }

    fn write_durable(&self, file: Name, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut inner = self.0.lock();
        put(&mut inner.now.data[file as usize], offset, data);
        let index = inner.ops.len();
        inner.ops.push(Op::Write { file, offset, data: data.to_owned() });
        if inner.sync_fails(file) {
            // Whether it has reached the disk is open.
            return Err(io::Error::from_raw_os_error(5));
        }
        inner.ops.push(Op::SyncOne(index));
        Ok(())
    }

    pub(super) fn sync(&self, file: Name) -> io::Result<()> {
        let (upto, raced) = (self.len(), self.0.lock().raced);
        // Others may write meanwhile; this sync does not speak for them.
        if raced {
            std::thread::yield_now();
        }
        let mut inner = self.0.lock();
        if inner.sync_fails(file) {
            inner.ops.push(Op::SyncFailed { file, upto });
            return Err(io::Error::from_raw_os_error(5));
        }
        inner.ops.push(Op::Sync { file, upto });
        Ok(())
    }

    pub(super) fn write_granule(&self, granule: u64, value: u64) {
        self.write(Name::Disk, granule * 8, &value.to_le_bytes());
    }

    pub(super) fn set_guid(&self, guid: Uuid) {
        self.write(Name::Disk, GUID_AT, guid.as_bytes());
        self.sync(Name::Disk).unwrap();
    }

    pub(super) fn guid(&self) -> Uuid {
        let inner = self.0.lock();
        Uuid::from_slice(&inner.now.data[2][GUID_AT as usize..]).unwrap()
    }

    /// The granules' values.
    pub(super) fn content(&self) -> Vec<u64> {
        let inner = self.0.lock();
        let granules = inner.now.data[2][..GUID_AT as usize].chunks_exact(8);
        granules.map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub(super) fn bytes(&self, file: Name) -> Vec<u8> {
        self.0.lock().now.data[file as usize].clone()
    }

    /// Puts other bytes in a file's place, outside the log; `None` removes it.
    pub(super) fn put_bytes(&self, file: Name, bytes: Option<Vec<u8>>) {
        let mut inner = self.0.lock();
        inner.now.present[file as usize] = bytes.is_some();
        inner.now.data[file as usize] = bytes.unwrap_or_default();
    }

    /// The same files with an empty log.
    pub(super) fn copy(&self) -> Self {
        let now = self.0.lock().now.clone();
        Self(Arc::new(Mutex::new(Inner { start: now.clone(), now, ..Inner::default() })))
    }

    /// The files after a kill of the process at `at`: everything is there to read, and what was not
    /// synced still is not.
    pub(super) fn killed(&self, at: usize) -> Self {
        let whole = self.crash(at, &[], &mut |_, _| Fate::Whole);
        let now = whole.0.lock().now.clone();
        let inner = self.0.lock();
        let (start, ops) = (inner.start.clone(), inner.ops[..at].to_vec());
        Self(Arc::new(Mutex::new(Inner { start, now, ops, ..Inner::default() })))
    }

    /// Writes before `at` that a crash at `at` may lose.
    pub(super) fn unsynced(&self, at: usize) -> Vec<usize> {
        let inner = self.0.lock();
        let ops = &inner.ops[..at];
        let mut open = Vec::new();
        for (i, op) in ops.iter().enumerate() {
            if let Op::Write { file, .. } = op
                && !inner.durable(i, *file, at)
            {
                open.push(i);
            }
        }
        open
    }

    /// What a crash at `at` leaves when `fate` decides on each of the `open`, unsynced writes (ascending).
    pub(super) fn crash(
        &self,
        at: usize,
        open: &[usize],
        fate: &mut dyn FnMut(usize, Name) -> Fate,
    ) -> Self {
        let inner = self.0.lock();
        let mut files = inner.start.clone();
        for (i, op) in inner.ops[..at].iter().enumerate() {
            match op {
                Op::Replace { file, data } => {
                    files.data[*file as usize].clone_from(data);
                    files.present[*file as usize] = true;
                }
                Op::Write { file, offset, data } => {
                    let target = &mut files.data[*file as usize];
                    let kept =
                        if open.binary_search(&i).is_ok() { fate(i, *file) } else { Fate::Whole };
                    kept.apply(target, *offset, data);
                }
                _ => {}
            }
        }
        drop(inner);
        Self(Arc::new(Mutex::new(Inner { start: files.clone(), now: files, ..Inner::default() })))
    }

    /// The operation at `index`, for reports.
    pub(super) fn describe(&self, index: usize) -> String {
        match &self.0.lock().ops[index] {
            Op::Write { file, offset, data } => format!("write {file:?} {offset}+{}", data.len()),
            Op::Sync { file, .. } => format!("sync {file:?}"),
            Op::SyncOne(i) => format!("sync of write {i}"),
            Op::SyncFailed { file, .. } => format!("failed sync {file:?}"),
            Op::Replace { file, .. } => format!("replace {file:?}"),
        }
    }
}

impl Inner {
    fn sync_fails(&mut self, file: Name) -> bool {
        let left = &mut self.fail_sync[file as usize];
        match left {
            Some(0) => {
                *left = None;
                self.failures += 1;
                true
            }
            Some(n) => {
                *n -= 1;
                false
            }
            None => false,
        }
    }

    /// Whether a sync before `at` has made the write at `index` durable; the first sync to cover it
    /// decides.
    fn durable(&self, index: usize, name: Name, at: usize) -> bool {
        for op in &self.ops[index..at] {
            match op {
                Op::Sync { file, upto } if *file == name && index < *upto => return true,
                Op::SyncFailed { file, upto } if *file == name && index < *upto => return false,
                Op::SyncOne(i) if *i == index => return true,
                Op::Replace { file, .. } if *file == name => return true,
                _ => {}
            }
        }
        false
    }
}

/// What a crash makes of a write.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    Lost,
    Whole,
    /// Only the sectors with their bit set (by number, repeating) arrived.
    Torn(u64),
}

impl Fate {
    pub(super) fn random(random: &mut Random) -> Self {
        match random.below(8) {
            0..3 => Self::Lost,
            3..6 => Self::Whole,
            _ => Self::Torn(random.next()),
        }
    }

    fn apply(self, target: &mut Vec<u8>, offset: u64, data: &[u8]) {
        let Self::Torn(sectors) = self else {
            if matches!(self, Self::Whole) {
                put(target, offset, data);
            }
            return;
        };
        for (i, part) in (0..).zip(data.chunks(SECTOR as usize)) {
            if sectors & (1 << (i % 64)) != 0 {
                put(target, offset + i * SECTOR, part);
            }
        }
    }
}

fn put(target: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let end = offset as usize + data.len();
    if target.len() < end {
        target.resize(end, 0);
    }
    target[offset as usize..end].copy_from_slice(data);
}

struct RecordedFile {
    world: World,
    name: Name,
}

fn name(which: Which) -> Name {
    match which {
        Which::Rct => Name::Rct,
        Which::Mrt => Name::Mrt,
    }
}

impl Store for World {
    fn path(&self, which: Which) -> &Path {
        match which {
            Which::Rct => Path::new("disk.vhdx.rct"),
            Which::Mrt => Path::new("disk.vhdx.mrt"),
        }
    }

    fn open(&self, which: Which, _write: bool) -> io::Result<Option<Box<dyn Media>>> {
        let name = name(which);
        let present = self.0.lock().now.present[name as usize];
        Ok(present.then(|| Box::new(RecordedFile { world: self.clone(), name }) as Box<dyn Media>))
    }

    fn replace(&self, which: Which, len: u64, head: &[u8]) -> io::Result<()> {
        let mut data = head.to_owned();
        data.resize(len as usize, 0);
        let mut inner = self.0.lock();
        let file = name(which);
        inner.now.data[file as usize].clone_from(&data);
        inner.now.present[file as usize] = true;
        inner.ops.push(Op::Replace { file, data });
        Ok(())
    }
}

impl Media for RecordedFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.world.0.lock().now.data[self.name as usize].len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.world.0.lock();
        let data = &inner.now.data[self.name as usize];
        let found = data.get(offset as usize..offset as usize + buf.len());
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.world.write(self.name, offset, buf);
        Ok(())
    }

    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.world.write_durable(self.name, offset, buf)
    }

    fn sync(&self) -> io::Result<()> {
        self.world.sync(self.name)
    }
}

#[test]
fn recorder_loses_only_what_was_not_synced() {
    let world = World::new(Uuid::nil());
    world.write_granule(1, 10);
    world.sync(Name::Disk).unwrap();
    world.write_granule(2, 20);
    let after = |at, fate| {
        let content = world.crash(at, &world.unsynced(at), &mut |_, _| fate).content();
        (content[1], content[2])
    };
    assert_eq!(after(3, Fate::Lost), (10, 0));
    assert_eq!(after(3, Fate::Whole), (10, 20));
    assert_eq!(after(1, Fate::Lost), (0, 0));
}

#[test]
fn recorder_forgets_writes_after_a_failed_sync() {
    let world = World::new(Uuid::nil());
    world.write_granule(1, 10);
    world.fail_sync(Name::Disk, 0);
    world.sync(Name::Disk).unwrap_err();
    world.sync(Name::Disk).unwrap();
    assert_eq!(world.unsynced(world.len()).len(), 1);
    assert_eq!(world.failures(), 1);
}
