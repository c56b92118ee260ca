//! One VHDX or AVHDX file: format, log, block allocation.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::block::{BlockRange, Geometry};
use crate::error::Result;

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Shared lock; the log is replayed in memory, nothing is written.
    ReadOnly,
    /// Exclusive lock; the log is replayed into the file.
    ReadWrite,
}

/// The layout of a VHDX file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All blocks allocated at creation.
    Fixed,
    /// Blocks allocated on first write.
    Dynamic,
    /// Holds only what differs from a parent.
    Differencing,
}

/// The parent as a child records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentLocator {
    /// The parent's DataWriteGuid when the child was made.
    pub linkage: Uuid,
    /// The parent's DataWriteGuid a running merge is about to set.
    pub linkage2: Option<Uuid>,
    /// `.\name` form, relative to the child's directory.
    pub relative_path: Option<String>,
    /// `\\?\Volume{…}\` form.
    pub volume_path: Option<String>,
    /// `\\?\` form.
    pub absolute_path: Option<String>,
}

/// What a new file should be.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of the logical sector, up to 64 TiB.
    pub size: u64,
    /// 1 MiB to 256 MiB, a power of two.
    pub block_size: u32,
    /// 512 or 4096.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
    /// Allocate everything at once.
    pub fixed: bool,
    /// The Virtual Disk ID; a random one when `None`. A child takes its parent's.
    pub disk_id: Option<Uuid>,
    /// Makes the file a differencing disk: the parent, in the same directory.
    pub parent: Option<ParentLink>,
}

/// The parent of a file to be created.
#[derive(Debug, Clone)]
pub struct ParentLink {
    /// Path of the parent file; must lie in the child's directory.
    pub path: PathBuf,
    /// The parent's DataWriteGuid.
    pub data_write_guid: Uuid,
}

/// What a file is; fixed while it is open but for the GUIDs.
#[derive(Debug, Clone)]
pub struct Properties {
    /// Size and sector sizes.
    pub geometry: Geometry,
    /// Block size in bytes.
    pub block_size: u32,
    /// Layout.
    pub kind: Kind,
    /// Virtual Disk ID: the lineage key shared by a whole chain.
    pub disk_id: Uuid,
    /// Changes with every writable open.
    pub file_write_guid: Uuid,
    /// Changes before the first user-visible change after an open.
    pub data_write_guid: Uuid,
    /// Present in differencing files.
    pub parent: Option<ParentLocator>,
}

/// What one block of a file says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// Nothing here: ask the parent (or zeros, without one).
    NotPresent,
    /// Reads as zeros.
    Zero,
    /// All sectors are in this file.
    Full,
    /// Some sectors are in this file, others in the parent.
    Partial,
}

/// What a range of one file says of itself, at sector granularity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Ask the parent.
    Absent,
    /// Reads as zeros.
    Zero,
    /// Stored in this file.
    Data,
}

/// One open VHDX file. All methods are safe to call from many threads; per-block locks make each
/// block's state change atomic against reads and writes of that block.
pub struct Vhdx {
    _private: (),
}

impl Vhdx {
    /// Creates a new file, durable when this returns; fails if `path` exists.
    pub fn create(_path: &Path, _options: &CreateOptions) -> Result<()> {
        todo!()
    }

    /// Opens a file under an OFD lock (exclusive for writing, shared for reading).
    pub fn open(_path: &Path, _access: Access) -> Result<Self> {
        todo!()
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        todo!()
    }

    /// What the file is, with its current GUIDs.
    pub fn properties(&self) -> Properties {
        todo!()
    }

    /// The state of payload block `index`.
    pub fn block_state(&self, _index: u64) -> BlockState {
        todo!()
    }

    /// Reads what this file holds of the range into `buf` (zeros included) and returns the sub-ranges
    /// it does not hold, which the caller reads from the parent. `buf` is untouched there.
    pub fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<Vec<BlockRange>> {
        todo!()
    }

    /// Writes; allocates blocks (partial ones in a differencing file) as needed. No sync.
    pub fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        todo!()
    }

    /// Makes the range read as zeros; whole blocks become ZERO and free their space.
    pub fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<()> {
        todo!()
    }

    /// Makes completed writes and their metadata durable: at most two syncs.
    pub fn flush(&self) -> Result<()> {
        todo!()
    }

    /// What this file itself holds of the range: in order, without gaps, neighbours differ.
    pub fn presence(&self, _offset: u64, _len: u64) -> Result<Vec<(BlockRange, Presence)>> {
        todo!()
    }

    /// Merge only: sets the blocks to NOT_PRESENT, durable when this returns. Their content must
    /// already be durable in the parent, or guest data is lost.
    pub fn release_blocks(&self, _indices: &[u64]) -> Result<()> {
        todo!()
    }

    /// Sets a new DataWriteGuid in both headers, durable when this returns. The caller has announced
    /// it in the tracking files and, during a merge, in the child's `linkage2`.
    pub fn set_data_write_guid(&self, _guid: Uuid) -> Result<()> {
        todo!()
    }

    /// Rewrites the parent locator through the log, durable when this returns.
    pub fn set_parent(&self, _locator: &ParentLocator) -> Result<()> {
        todo!()
    }

    /// Flushes and empties the log, so that tools which do not replay logs read the file right.
    pub fn make_clean(&self) -> Result<()> {
        todo!()
    }
}
