//! What a server offers under one name, and byte-granular access to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::proto::flag;
use crate::block::{Block, BlockRange};
use crate::error::Result;

/// Answers `tidemark:changed-since:<rct id>`: the ranges that may differ from the content at the id.
pub type ChangedRanges = Box<dyn Fn(&str) -> Result<Vec<BlockRange>> + Send + Sync>;

/// A disk to serve.
pub struct Export {
    pub(super) name: String,
    pub(super) disk: Arc<dyn Block>,
    pub(super) changed: Option<ChangedRanges>,
}

impl Export {
    /// Serves `disk` under `name`.
    pub fn new(name: impl Into<String>, disk: Arc<dyn Block>) -> Self {
        Self { name: name.into(), disk, changed: None }
    }

    /// Offers `tidemark:changed-since:<rct id>` as a metadata context. Only taken up for read-only
    /// disks: a client asks once, and on a moving disk the answer would be stale when it reads.
    #[must_use]
    pub fn with_changed_ranges(mut self, provider: ChangedRanges) -> Self {
        self.changed = Some(provider);
        self
    }
}

/// Bytes moved for clients of one export since it was added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes read.
    pub read: u64,
    /// Bytes written, zeroing and discards not counted.
    pub written: u64,
}

/// An export in service.
pub(super) struct Served {
    pub(super) export: Export,
    /// Whole-sector writers share it; a read-modify-write of part of a sector holds it alone, so that
    /// it cannot put back bytes another writer has just replaced.
    sectors: RwLock<()>,
    read: AtomicU64,
    written: AtomicU64,
    last_warning: Mutex<Option<Instant>>,
}

/// The least time between two logged errors of one export: a guest can cause errors at will.
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

impl Served {
    pub(super) fn new(export: Export) -> Self {
        Self {
            export,
            sectors: RwLock::new(()),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            last_warning: Mutex::new(None),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.disk().geometry().size
    }

    pub(super) fn disk(&self) -> &dyn Block {
        &*self.export.disk
    }

    /// Bytes of a logical sector, the least that the disk reads and writes.
    pub(super) fn sector(&self) -> u64 {
        u64::from(self.disk().geometry().logical_sector.max(1))
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            read: self.read.load(Ordering::Relaxed),
            written: self.written.load(Ordering::Relaxed),
        }
    }

    /// Whether `tidemark:changed-since` may be asked for.
    pub(super) fn changed_provider(&self) -> Option<&ChangedRanges> {
        self.export.changed.as_ref().filter(|_| self.disk().read_only())
    }

    /// Transmission flags. Flush is global to a disk, so a flush on one connection covers writes
    /// completed on all: CAN_MULTI_CONN holds.
    pub(super) fn flags(&self, structured: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::CAN_MULTI_CONN;
        if structured {
            flags |= flag::SEND_DF;
        }
        if self.disk().read_only() {
            flags | flag::READ_ONLY
        } else {
            flags | flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES
        }
    }

    /// Logs a failed request, at most once a second.
    pub(super) fn warn(&self, what: &str, offset: u64, len: u32, error: &crate::DiskError) {
        let mut last = self.last_warning.lock();
        if last.is_none_or(|at| at.elapsed() >= WARNING_INTERVAL) {
            *last = Some(Instant::now());
            tracing::warn!(disk = %self.export.name, offset, len, %error, "{what} failed");
        }
    }

    /// Reads any byte range inside the disk.
    pub(super) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let wide = self.widen(offset, len as u64);
        let mut data = vec![0; (wide.end - wide.start) as usize];
        self.disk().read_at(wide.start, &mut data)?;
        data.drain(..(offset - wide.start) as usize);
        data.truncate(len);
        self.read.fetch_add(len as u64, Ordering::Relaxed);
        Ok(data)
    }

    /// Writes any byte range inside the disk.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        if self.aligned(offset, data.len() as u64) {
            let _shared = self.sectors.read();
            self.disk().write_at(offset, data)?;
        } else {
            let _alone = self.sectors.write();
            self.patch(offset, data)?;
        }
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Zeroes any byte range inside the disk.
    pub(super) fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        if self.aligned(offset, len) {
            let _shared = self.sectors.read();
            return self.disk().write_zeroes(offset, len, may_unmap);
        }
        let _alone = self.sectors.write();
        let inner = self.narrow(offset, len);
        if inner.is_empty() {
            // No whole sector inside: fewer than two sectors' bytes.
            return self.patch(offset, &vec![0; len as usize]);
        }
        self.patch(offset, &vec![0; (inner.start - offset) as usize])?;
        self.disk().write_zeroes(inner.start, inner.end - inner.start, may_unmap)?;
        self.patch(inner.end, &vec![0; (offset + len - inner.end) as usize])
    }

    /// Discards the whole sectors inside the range; the rest keeps its content, as TRIM allows.
    pub(super) fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let inner = self.narrow(offset, len);
        if inner.is_empty() {
            return Ok(());
        }
        let _shared = self.sectors.read();
        self.disk().discard(inner.start, inner.end - inner.start)
    }

    /// Read-modify-write of the sectors the range touches. The caller holds `sectors` alone.
    fn patch(&self, offset: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let sector = self.sector() as usize;
        let wide = self.widen(offset, data.len() as u64);
        let mut whole = vec![0; (wide.end - wide.start) as usize];
        let last = whole.len() - sector;
        self.disk().read_at(wide.start, &mut whole[..sector])?;
        if last > 0 {
            self.disk().read_at(wide.start + last as u64, &mut whole[last..])?;
        }
        let at = (offset - wide.start) as usize;
        whole[at..at + data.len()].copy_from_slice(data);
        self.disk().write_at(wide.start, &whole)
    }

    fn aligned(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.sector()) && len.is_multiple_of(self.sector())
    }

    /// The range grown to whole sectors; inside the disk, whose size is a multiple of the sector.
    pub(super) fn widen(&self, offset: u64, len: u64) -> BlockRange {
        let sector = self.sector();
        offset / sector * sector..(offset + len).next_multiple_of(sector)
    }

    /// The whole sectors inside the range.
    fn narrow(&self, offset: u64, len: u64) -> BlockRange {
        let sector = self.sector();
        offset.next_multiple_of(sector)..(offset + len) / sector * sector
    }
}
