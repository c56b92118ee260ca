//! Resilient change tracking of one disk file: `.rct` (epochs per granule) and `.mrt` (write-intent
//! bitmap), with the write order that keeps "changed since" a superset of the truth after any crash.
//!
//! The order, each step durable before the next (`rules.rs` names the bug behind each):
//!
//! ```text
//! open    recover → .mrt: new session → .rct: {prev, next, OPEN} → disk: next → writes
//! write   region bit (.mrt) → mark in memory → write to the disk
//! flush   map pages (.rct) → clear bits of idle regions (.mrt, not synced)
//! seal    I/O drained, disk flushed → .rct: id and next epoch → I/O
//! close   map pages (.rct) → .rct: CLEAN
//! ```
//!
//! Formats and the proof: `docs/formats/rct.md`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{DiskError, Result};

mod header;
mod intent;
mod layout;
mod map;
mod media;
mod pair;
mod resize;
mod rules;
mod tracker;

#[cfg(test)]
pub(crate) use media::Media;
pub use resize::{resize, start_anew};
#[cfg(test)]
pub(crate) use rules::Rule;
pub use tracker::{Tracker, WriteGuard};

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

/// Paths of the pair that belongs to a disk file: `<disk>.rct`, `<disk>.mrt`.
pub fn pair_paths(disk: &Path) -> (PathBuf, PathBuf) {
    let with = |suffix: &str| {
        let mut name = disk.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    (with(".rct"), with(".mrt"))
}

/// The name under which a file of the pair is made before it takes its place; a kill in between leaves
/// it.
pub(crate) fn unfinished_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests;
