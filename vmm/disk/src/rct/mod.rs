//! Resilient change tracking of one disk file: `.rct` (epochs per granule) and `.mrt` (write-intent
//! bitmap), with the write order that keeps "changed since" a superset of the truth after any crash.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::block::BlockRange;
use crate::error::{DiskError, Result};

/// A sealed moment of a disk that one can ask "changed since?". Text form:
/// `rct:<lineage>:<epoch>:<seal>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct RctId {
    /// The disk's Virtual Disk ID.
    pub lineage: Uuid,
    /// The epoch that the seal ended.
    pub epoch: u32,
    /// Random, unique to this seal.
    pub seal: Uuid,
}

impl fmt::Display for RctId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rct:{}:{:08x}:{}", self.lineage, self.epoch, self.seal)
    }
}

impl FromStr for RctId {
    type Err = DiskError;

    fn from_str(s: &str) -> Result<Self> {
        let bad = || DiskError::UnknownRctId { id: s.to_owned(), why: "not an RCT id".to_owned() };
        let mut parts = s.split(':');
        let (Some("rct"), Some(lineage), Some(epoch), Some(seal), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        Ok(Self {
            lineage: lineage.parse().map_err(|_| bad())?,
            epoch: u32::from_str_radix(epoch, 16).map_err(|_| bad())?,
            seal: seal.parse().map_err(|_| bad())?,
        })
    }
}

impl From<RctId> for String {
    fn from(id: RctId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for RctId {
    type Error = DiskError;

    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

/// What the tracking files must agree with in their disk file.
#[derive(Debug, Clone, Copy)]
pub struct DiskIdentity {
    /// Virtual Disk ID.
    pub lineage: Uuid,
    /// Virtual size in bytes.
    pub size: u64,
    /// The file's DataWriteGuid as found.
    pub data_write_guid: Uuid,
}

/// Whether ids sealed before this open can still be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Continuity {
    /// Sealed ids stand.
    Kept,
    /// All earlier ids are gone; the reason is for the run's record.
    Lost(String),
}

/// The pair of tracking files of one disk file.
pub struct Tracker {
    _private: (),
}

/// Paths of the pair that belongs to a disk file: `<disk>.rct`, `<disk>.mrt`.
pub fn pair_paths(disk: &Path) -> (PathBuf, PathBuf) {
    let with = |suffix: &str| {
        let mut name = disk.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    (with(".rct"), with(".mrt"))
}

impl Tracker {
    /// Creates the pair of a new disk file, state CLEAN, first epoch `epoch` (1 for a new lineage; the
    /// parent's epoch + 1 for a child). Durable when this returns; replaces an existing pair.
    pub fn create(_disk: &Path, _identity: &DiskIdentity, _epoch: u32) -> Result<()> {
        todo!()
    }

    /// Opens the pair for writing and announces `next` as the DataWriteGuid that the caller is about
    /// to set in the disk file. A missing, foreign or damaged pair is made anew and says so; an
    /// unclean one is recovered from the MRT.
    pub fn open(_disk: &Path, _identity: &DiskIdentity, _next: Uuid) -> Result<(Self, Continuity)> {
        todo!()
    }

    /// Opens the pair of a frozen disk for queries only.
    pub fn open_read_only(_disk: &Path, _identity: &DiskIdentity) -> Result<Self> {
        todo!()
    }

    /// The current epoch.
    pub fn epoch(&self) -> u32 {
        todo!()
    }

    /// Must return before the write is issued: sets and syncs the MRT bits of the range where needed,
    /// then marks its granules with the current epoch. Hold the guard until the write has completed.
    pub fn before_write(&self, _offset: u64, _len: u64) -> Result<WriteGuard<'_>> {
        todo!()
    }

    /// Merge only: like `before_write`, but marks with `epoch` where that is later than what stands.
    pub fn before_merge_write(&self, _offset: u64, _len: u64, _epoch: u32) -> Result<WriteGuard<'_>> {
        todo!()
    }

    /// Raises the current epoch to at least `epoch` (a merge brings the child's), durable on return.
    pub fn raise_epoch(&self, _epoch: u32) -> Result<()> {
        todo!()
    }

    /// Ends the current epoch under a new id. Call with I/O drained and the disk flushed; one 4 KiB
    /// sync.
    pub fn seal(&self) -> Result<RctId> {
        todo!()
    }

    /// Announces another DataWriteGuid before the caller sets it in the disk file.
    pub fn announce(&self, _next: Uuid) -> Result<()> {
        todo!()
    }

    /// Sealed ids that can be answered, oldest first.
    pub fn sealed_ids(&self) -> Vec<RctId> {
        todo!()
    }

    /// Takes over sealed ids (of a child that is being merged in), durable on return.
    pub fn adopt_ids(&self, _ids: &[RctId]) -> Result<()> {
        todo!()
    }

    /// Drops an id.
    pub fn forget(&self, _id: &RctId) -> Result<()> {
        todo!()
    }

    /// Whether `id` is in this pair's table.
    pub fn knows(&self, _id: &RctId) -> bool {
        todo!()
    }

    /// Granules of `range` marked later than `epoch`, as merged byte ranges clipped to the disk.
    pub fn changed_after(&self, _epoch: u32, _range: BlockRange) -> Result<Vec<BlockRange>> {
        todo!()
    }

    /// Writes dirty pages, syncs, and then clears MRT bits of idle regions. The owner calls it every
    /// 30 s.
    pub fn flush_map(&self) -> Result<()> {
        todo!()
    }

    /// Flushes the map and marks the pair CLEAN. Further writes need a new `open`.
    pub fn close_clean(&self) -> Result<()> {
        todo!()
    }
}

/// Keeps a region's MRT bits set while a write is in flight.
pub struct WriteGuard<'a> {
    _tracker: &'a Tracker,
}
