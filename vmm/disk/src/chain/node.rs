//! One file of an open chain, with its tracking.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::rules::{Rule, Rules};
use crate::block::BlockRange;
use crate::error::{DiskError, Result};
use crate::rct::{Continuity, DiskIdentity, Tracker};
use crate::vhdx::{Access, BlockState, Presence, Properties, Vhdx};

/// Shared lock; nobody writes the file.
const FROZEN: u8 = 0;
/// Exclusive lock; written by guests or by a merge.
const LIVE: u8 = 1;
/// Exclusive lock still, but nobody writes any more: waits to be closed clean and shared.
const RETIRED: u8 = 2;

/// Tracking of a file.
enum Tracking {
    /// Opened for writing.
    Writing(Box<Tracker>),
    /// Of a frozen file, opened at the first question; the reason where it cannot answer.
    Asked(OnceLock<std::result::Result<Box<Tracker>, String>>),
}

/// One file of an open chain.
/// How long a file that leaves the chain is waited for while a flush still has it.
const LAST_FLUSH: Duration = Duration::from_secs(10);

pub(super) struct Node {
    /// Shared with flushes that began before the file left the chain.
    pub(super) vhdx: Arc<Vhdx>,
    pub(super) size: u64,
    pub(super) block_size: u64,
    tracking: Tracking,
    /// A writing tracker was closed clean: it still answers, but takes no more writes.
    tracking_closed: AtomicBool,
    state: AtomicU8,
}

/// What a write puts into a range.
#[derive(Clone, Copy)]
pub(super) enum Payload<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// That many zeros.
    Zeros(u64),
}

impl<'a> Payload<'a> {
    pub(super) fn len(self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len) => len,
        }
    }

    /// The part from `from` to `to`, both relative to the payload and inside it.
    pub(super) fn slice(self, from: u64, to: u64) -> Payload<'a> {
        match self {
            Self::Data(data) => Payload::Data(&data[from as usize..to as usize]),
            Self::Zeros(_) => Payload::Zeros(to - from),
        }
    }
}

impl Node {
    /// Wraps a file opened with `access`; its tracking is opened when it is needed.
    pub(super) fn new(vhdx: Vhdx, access: Access) -> Self {
        let properties = vhdx.properties();
        let state = if access == Access::ReadWrite { LIVE } else { FROZEN };
        Self {
            size: properties.geometry.size,
            block_size: u64::from(properties.block_size),
            vhdx: Arc::new(vhdx),
            tracking: Tracking::Asked(OnceLock::new()),
            tracking_closed: AtomicBool::new(false),
            state: AtomicU8::new(state),
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.vhdx.path()
    }

    pub(super) fn properties(&self) -> Properties {
        self.vhdx.properties()
    }

    /// Whether this is the file `path` names; all files of a chain lie in one directory.
    pub(super) fn is(&self, path: &Path) -> bool {
        path.file_name().is_some() && self.path().file_name() == path.file_name()
    }

    pub(super) fn name(&self) -> &OsStr {
        self.path().file_name().unwrap_or_default()
    }

    /// Payload blocks of the file.
    pub(super) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size)
    }

    /// Whether no block holds anything: all is asked of the parent.
    pub(super) fn is_empty(&self) -> bool {
        (0..self.blocks()).all(|b| self.vhdx.block_state(b) == BlockState::NotPresent)
    }

    /// The sub-ranges of a range that the file holds, zeros included.
    pub(super) fn present(&self, range: &BlockRange) -> Result<Vec<(BlockRange, Presence)>> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return Ok(Vec::new());
        }
        let mut parts = self.vhdx.presence(range.start, end - range.start)?;
        parts.retain(|(_, presence)| *presence != Presence::Absent);
        Ok(parts)
    }

    /// Writes without tracking: the caller has done that.
    pub(super) fn put(&self, offset: u64, payload: Payload<'_>) -> Result<()> {
        match payload {
            Payload::Data(data) => self.vhdx.write_at(offset, data),
            Payload::Zeros(len) => self.vhdx.write_zeroes(offset, len),
        }
    }

    fn identity(&self) -> DiskIdentity {
        let properties = self.vhdx.properties();
        DiskIdentity {
            lineage: properties.disk_id,
            size: properties.geometry.size,
            data_write_guid: properties.data_write_guid,
        }
    }

    /// Opens the pair for a session of writes under the DataWriteGuid `next`, which it announces: rule
    /// `AnnounceBeforeGuid`.
    /// The caller sets `next` in the file after that and writes only then: a kill in between leaves
    /// the old GUID, which the pair still knows.
    pub(super) fn open_tracking(
        &self,
        next: Uuid,
        min_epoch: u32,
    ) -> Result<(Box<Tracker>, Continuity)> {
        let identity = self.identity();
        if !Rules::of(self.path()).obey(Rule::AnnounceBeforeGuid) {
            self.vhdx.set_data_write_guid(next)?;
        }
        let (tracker, continuity) = Tracker::open_above(self.path(), &identity, next, min_epoch)?;
        if tracker.epoch() < min_epoch {
            tracker.raise_epoch(min_epoch)?;
        }
        Ok((Box::new(tracker), continuity))
    }

    pub(super) fn set_tracking(&mut self, tracker: Box<Tracker>) {
        self.tracking = Tracking::Writing(tracker);
        self.tracking_closed = AtomicBool::new(false);
    }

    /// The tracker of a file that is being written.
    pub(super) fn writing(&self) -> Result<&Tracker> {
        match &self.tracking {
            Tracking::Writing(tracker) => Ok(tracker),
            Tracking::Asked(_) => Err(DiskError::ReadOnly { path: self.path().to_owned() }),
        }
    }

    /// Whether the pair is open for writes.
    pub(super) fn has_open_tracker(&self) -> bool {
        matches!(self.tracking, Tracking::Writing(_))
            && !self.tracking_closed.load(Ordering::Acquire)
    }

    /// The tracker to ask, or why there is none.
    pub(super) fn tracker(&self) -> std::result::Result<&Tracker, &str> {
        match &self.tracking {
            Tracking::Writing(tracker) => Ok(tracker),
            Tracking::Asked(cell) => cell
                .get_or_init(|| {
                    Tracker::open_read_only(self.path(), &self.identity())
                        .map(Box::new)
                        .map_err(|e| e.to_string())
                })
                .as_ref()
                .map(|tracker| &**tracker)
                .map_err(String::as_str),
        }
    }

    /// Whether the file is locked exclusively and may be written.
    pub(super) fn is_claimed(&self) -> bool {
        self.state.load(Ordering::Acquire) != FROZEN
    }

    /// Whether the file is being written.
    pub(super) fn is_live(&self) -> bool {
        self.state.load(Ordering::Acquire) == LIVE
    }

    /// Says that nobody writes the file any more; [`Node::settle`] then closes it clean.
    pub(super) fn retire(&self) {
        let _ = self.state.compare_exchange(LIVE, RETIRED, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The file, for [`flush`], if it may hold writes that are not durable.
    pub(super) fn unflushed(&self) -> Option<Arc<Vhdx>> {
        self.is_claimed().then(|| self.vhdx.clone())
    }

    /// Waits until nobody else has the file, so that dropping this node lets go of its lock. Nobody
    /// new comes: the caller holds a pause.
    pub(super) fn wait_for_flushes(&self) {
        let end = Instant::now() + LAST_FLUSH;
        while Arc::strong_count(&self.vhdx) > 1 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes a file back that was to be closed, and is still locked exclusively.
    pub(super) fn revive(&self) {
        let _ = self.state.compare_exchange(RETIRED, LIVE, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Closes a retired file clean and shares it with readers in other processes. A kill before the
    /// end leaves a file with a log to replay and tracking to recover: both only cost time.
    pub(super) fn settle(&self) -> Result<()> {
        if self.state.load(Ordering::Acquire) != RETIRED {
            return Ok(());
        }
        if self.has_open_tracker() {
            self.writing()?.close_clean()?;
            self.tracking_closed.store(true, Ordering::Release);
        }
        self.vhdx.freeze()?;
        self.state.store(FROZEN, Ordering::Release);
        Ok(())
    }
}

/// Makes writes durable, also those to a file that is no longer written but not settled yet.
pub(super) fn flush(vhdx: &Vhdx) -> Result<()> {
    match vhdx.flush() {
        // Settled meanwhile, and so flushed.
        Err(DiskError::ReadOnly { .. }) => Ok(()),
        other => other,
    }
}
