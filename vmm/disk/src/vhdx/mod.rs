//! One VHDX or AVHDX file: format, log, block allocation. docs/formats/vhdx.md says what is written
//! and what is accepted.

mod bat;
mod bitmap;
mod check;
pub(crate) mod create;
mod image;
mod journal;
mod layout;
mod locator;
mod log;
mod metadata;
mod open;
mod pending_file;
mod repair;
pub(crate) mod storage;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use uuid::Uuid;

use crate::block::Geometry;

pub use check::{CheckReport, check};
pub use image::{CompactPlan, CompactProgress, Vhdx};
pub(crate) use pending_file::pending_path;
pub use repair::repair;

/// The block size for a new disk. Small blocks keep an AVHDX of scattered writes and its merge small;
/// from 4 TiB on they grow so that the block table in memory stays within 16 MiB.
pub fn default_block_size(size: u64) -> u32 {
    const MIB: u32 = 1 << 20;
    match size >> 40 {
        0..4 => 2 * MIB,
        4..16 => 8 * MIB,
        _ => 32 * MIB,
    }
}

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
    /// Makes the file a differencing disk.
    pub parent: Option<ParentLink>,
}

/// The parent of a file to be created.
#[derive(Debug, Clone)]
pub struct ParentLink {
    /// Path of the parent file, in the child's folder unless every open is to be told the folder.
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
