//! A disk chain: the files from base to leaf as one virtual disk, with tracking, the switch to a new
//! leaf, and the online merge of a child into its parent.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use uuid::Uuid;

use crate::block::{Block, BlockRange, Extent, Geometry};
use crate::error::Result;
use crate::rct::{Continuity, RctId};
use crate::vhdx::{Access, Properties};

/// Progress of a merge, in bytes of the child's data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes moved so far.
    pub done: u64,
    /// Bytes to move, as far as known.
    pub total: u64,
}

/// An open disk chain.
pub struct Chain {
    _private: (),
}

/// A stop of all I/O on a chain: while it lives, new requests wait and none is in flight.
pub struct Pause<'a> {
    _chain: &'a Chain,
}

impl Chain {
    /// Opens the chain that ends in `leaf`. Parents are looked up in the leaf's directory only, by the
    /// base name of their recorded paths, and their identity is checked. `ReadWrite` locks the leaf
    /// exclusively and opens its tracking; the parents are shared read-only.
    pub fn open(_leaf: &Path, _access: Access) -> Result<Self> {
        todo!()
    }

    /// The chain's files, base first.
    pub fn files(&self) -> Vec<PathBuf> {
        todo!()
    }

    /// Properties of the leaf.
    pub fn properties(&self) -> Properties {
        todo!()
    }

    /// Whether tracking survived the last open of the leaf, and if not, why.
    pub fn continuity(&self) -> Continuity {
        todo!()
    }

    /// Creates `leaf` as an empty child of the current leaf, with its tracking pair; nothing uses it
    /// yet. Durable on return; done outside any pause.
    pub fn prepare_leaf(&self, _leaf: &Path) -> Result<()> {
        todo!()
    }

    /// Waits for requests in flight and holds new ones back until the guard is dropped.
    pub fn pause(&self) -> Pause<'_> {
        todo!()
    }

    /// With I/O paused: flush, seal the current leaf under a new id, close it clean, and make the
    /// prepared `leaf` the one that is written. On error the old leaf stays in use.
    pub fn switch_leaf(&self, _pause: &Pause<'_>, _leaf: &Path) -> Result<RctId> {
        todo!()
    }

    /// Folds the file `child` of this chain into its parent, under guest I/O, and drops it from the
    /// chain; the caller records the new chain and then deletes the file. Restartable: called again
    /// after a crash it goes on. `child` may be the leaf or any file above the base.
    pub fn merge(
        &self,
        _child: &Path,
        _progress: &dyn Fn(MergeProgress),
        _cancel: &AtomicBool,
    ) -> Result<()> {
        todo!()
    }

    /// Ranges that may differ from the content at `id`, as of this chain's leaf: granule aligned,
    /// merged, clipped to the disk. Fails with `UnknownRctId` where only a full read is safe.
    pub fn changed_since(&self, _id: &RctId) -> Result<Vec<BlockRange>> {
        todo!()
    }

    /// The id that the leaf was last sealed under, for a chain opened at a checkpoint.
    pub fn last_seal(&self) -> Option<RctId> {
        todo!()
    }

    /// Periodic housekeeping of tracking (the owner calls it every 30 s).
    pub fn flush_map(&self) -> Result<()> {
        todo!()
    }

    /// Flush and clean close of leaf and tracking. Requests after it fail.
    pub fn close(&self) -> Result<()> {
        todo!()
    }

    /// The lineage key.
    pub fn lineage(&self) -> Uuid {
        todo!()
    }
}

impl Block for Chain {
    fn geometry(&self) -> Geometry {
        todo!()
    }
    fn read_only(&self) -> bool {
        todo!()
    }
    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        todo!()
    }
    fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        todo!()
    }
    fn flush(&self) -> Result<()> {
        todo!()
    }
    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        todo!()
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _may_unmap: bool) -> Result<()> {
        todo!()
    }
    fn extents(&self, _offset: u64, _len: u64) -> Result<Vec<Extent>> {
        todo!()
    }
}
