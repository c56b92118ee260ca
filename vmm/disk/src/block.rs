//! The one interface of a virtual disk, whatever lies behind it.

use crate::error::Result;

/// A half-open byte range of a virtual disk.
pub type BlockRange = std::ops::Range<u64>;

/// Size and sector sizes of a virtual disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Virtual size; a multiple of `logical_sector`.
    pub size: u64,
    /// 512 or 4096. Requests are aligned to it.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
}

/// What a range reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored data; may still happen to be zero.
    Data,
    /// Reads as zeros and is known to, because it was zeroed or discarded.
    Zero,
    /// Never written in any file of the chain; reads as zeros.
    Hole,
}

/// A range of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// What the range reads as.
    pub kind: ExtentKind,
}

/// A virtual disk. Every method takes `&self` and may be called from many threads at once; requests
/// must be aligned to the logical sector and lie inside the disk, or they fail with
/// [`crate::DiskError::OutOfRange`].
pub trait Block: Send + Sync {
    /// Size and sector sizes.
    fn geometry(&self) -> Geometry;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// Writes `buf` at `offset`; durable only after the next [`Block::flush`].
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;
    /// Makes every completed write durable.
    fn flush(&self) -> Result<()>;
    /// Gives the range up; it reads as zeros afterwards.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;
    /// Makes the range read as zeros; `may_unmap` allows freeing its space.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()>;
    /// The extents that cover the range, in order, without gaps; neighbours differ in kind.
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>>;
}
