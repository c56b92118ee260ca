//! A disk in memory and helpers for the tests of the server and the client.

mod concurrency;
mod hostile;
mod protocol;
mod tools;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};
use tempfile::TempDir;

use super::Server;
use crate::block::{Block, Extent, ExtentKind, Geometry};
use crate::error::{DiskError, Result};

/// A disk in memory that knows which sectors were written, can be made to fail, and can hold writes.
pub(super) struct MemDisk {
    data: RwLock<Vec<u8>>,
    kinds: Mutex<Vec<ExtentKind>>,
    sector: u32,
    pub(super) read_only: bool,
    pub(super) flushes: AtomicU64,
    /// The unmap permission of the last zeroing.
    pub(super) last_unmap: AtomicBool,
    pub(super) fail_with: Mutex<Option<rustix::io::Errno>>,
    pub(super) panic_on_flush: AtomicBool,
    held: Mutex<bool>,
    released: Condvar,
}

impl MemDisk {
    pub(super) fn new(size: usize, sector: u32) -> Self {
        Self {
            data: RwLock::new(vec![0; size]),
            kinds: Mutex::new(vec![ExtentKind::Hole; size / sector as usize]),
            sector,
            read_only: false,
            flushes: AtomicU64::new(0),
            last_unmap: AtomicBool::new(false),
            fail_with: Mutex::new(None),
            panic_on_flush: AtomicBool::new(false),
            held: Mutex::new(false),
            released: Condvar::new(),
        }
    }

    pub(super) fn filled(content: &[u8], sector: u32) -> Self {
        let disk = Self::new(content.len(), sector);
        disk.write_at(0, content).unwrap();
        disk
    }

    pub(super) fn content(&self) -> Vec<u8> {
        self.data.read().clone()
    }

    /// Makes writes wait, or lets them go on.
    pub(super) fn hold_writes(&self, hold: bool) {
        *self.held.lock() = hold;
        self.released.notify_all();
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        if let Some(errno) = *self.fail_with.lock() {
            return Err(DiskError::io("write", "memory".as_ref(), errno.into()));
        }
        let sector = u64::from(self.sector);
        let inside = offset + len <= self.data.read().len() as u64;
        if inside && offset.is_multiple_of(sector) && len.is_multiple_of(sector) {
            Ok(())
        } else {
            Err(DiskError::OutOfRange { offset, len })
        }
    }

    fn set_kind(&self, offset: u64, len: u64, kind: ExtentKind) {
        let sector = u64::from(self.sector);
        let range = (offset / sector) as usize..((offset + len) / sector) as usize;
        self.kinds.lock()[range].fill(kind);
    }
}

impl Block for MemDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.data.read().len() as u64,
            logical_sector: self.sector,
            physical_sector: 4096,
        }
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.data.read()[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        let mut held = self.held.lock();
        while *held {
            self.released.wait(&mut held);
        }
        drop(held);
        self.data.write()[offset as usize..][..buf.len()].copy_from_slice(buf);
        self.set_kind(offset, buf.len() as u64, ExtentKind::Data);
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        assert!(!self.panic_on_flush.load(Ordering::Relaxed), "a bug in the disk");
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.check(offset, len)?;
        self.last_unmap.store(may_unmap, Ordering::Relaxed);
        self.data.write()[offset as usize..][..len as usize].fill(0);
        self.set_kind(offset, len, ExtentKind::Zero);
        Ok(())
    }
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check(offset, len)?;
        let sector = u64::from(self.sector);
        let mut extents: Vec<Extent> = Vec::new();
        for (index, &kind) in self.kinds.lock().iter().enumerate() {
            let at = index as u64 * sector;
            if at < offset || at >= offset + len {
                continue;
            }
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len += sector,
                _ => extents.push(Extent { offset: at, len: sector, kind }),
            }
        }
        Ok(extents)
    }
}

/// A server with one export named `disk`, in a directory of its own.
pub(super) struct Fixture {
    pub(super) dir: TempDir,
    pub(super) socket: PathBuf,
    pub(super) server: Server,
    pub(super) disk: Arc<MemDisk>,
}

impl Fixture {
    pub(super) fn new(disk: MemDisk) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("nbd.sock");
        let disk = Arc::new(disk);
        let server = Server::bind(&socket).unwrap();
        server.add_export("disk", disk.clone());
        Self { dir, socket, server, disk }
    }

    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    /// A file of the fixture's directory.
    pub(super) fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

/// Waits until `done`; a test that waits in vain fails instead of hanging.
pub(super) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A small seeded generator (splitmix64); tests print nothing but stay the same on every run.
pub(super) struct Seeded(pub(super) u64);

impl Seeded {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

/// Content with data, zeros and data again.
pub(super) fn patterned(size: usize, seed: u64) -> Vec<u8> {
    let mut content = Seeded(seed).bytes(size);
    content[size / 4..size / 2].fill(0);
    content
}
