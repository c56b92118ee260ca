//! A disk chain: the files from base to leaf as one virtual disk, with tracking, the switch to a new
//! leaf, and the online merge of a child into its parent.
//!
//! # What a kill leaves
//!
//! L is the leaf, X a new leaf, P a parent, C the child that is folded into it, G the child of C. A
//! GUID is a DataWriteGuid. "Opens at" names the file to pass to [`Chain::open`].
//!
//! Opening L for writing:
//!
//! | killed after | state | opens at |
//! |---|---|---|
//! | tracking announces N | L has its old GUID, which the pair knows as `prev` | L |
//! | L has N | pair open, nothing written: recovery marks nothing | L |
//!
//! Checkpoint:
//!
//! | killed after | state | opens at |
//! |---|---|---|
//! | X created, in any stage | X is empty or cut off; opening L moves its GUID on, X is stale: delete it | L |
//! | L sealed | L holds an id that nobody was told: harmless | L or X |
//! | switch | X may hold writes. [`Chain::open`] refuses to write L while X holds data | X |
//! | L synced and closed clean | as before; only now is anyone told the id | X |
//!
//! Merge of C into P, at every point readable at C (or the leaf above it), never at P before its end:
//!
//! | killed after | state |
//! |---|---|
//! | P's tracking announces N | P has its old GUID; C names it |
//! | C names N as `linkage2` | both GUIDs of P are valid for C |
//! | P has N | C accepts P by `linkage2`; a further merge names N as `linkage` and N' as `linkage2` first |
//! | blocks copied | C still has them, P has the same or older content nobody reads |
//! | P flushed, blocks released in C | P has them, durably |
//! | all moved, ids adopted | C is empty: reads the same at C and, if C was the leaf, at P |
//! | (leaf) P is written | same; opening P anew moves its GUID on: C is stale, and empty: delete it |
//! | (middle) G names P | the chain has left C behind, which is empty: delete it |
//!
//! Guest writes during the merge of a leaf go to C where C holds the block and straight to P where it
//! does not, so that one pass ends with C empty. Writes to blocks that are just being copied go to
//! both. They are tracked in both pairs: C's pair alone answers for C's ids until the end.

mod changes;
mod files;
mod io;
mod merge;
mod mover;
mod node;
mod offline;
mod open;
mod rules;
mod switch;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use uuid::Uuid;

use crate::block::Geometry;
use crate::error::{DiskError, Result};
use crate::rct::{Continuity, RctId};
use crate::vhdx::{Access, Properties};
use merge::LeafMerge;
use node::Node;
use rules::Rules;

pub use changes::ChangedPage;
pub use files::delete_disk_files;
pub use offline::{
    Forked, MergeDown, Resized, compact, fork, merge_down, resize, set_disk_id, set_parent,
};
#[cfg(test)]
pub(crate) use rules::Rule;

/// Progress of a merge, in bytes of the child's data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes moved so far.
    pub done: u64,
    /// Bytes to move, as far as known.
    pub total: u64,
}

/// An open disk chain.
///
/// Dropping it closes it; [`Chain::close`] does the same and says what failed.
pub struct Chain {
    folder: PathBuf,
    access: Access,
    geometry: Geometry,
    lineage: Uuid,
    continuity: Mutex<Continuity>,
    /// Held shared by every request while it runs, exclusively by a pause. Always taken before
    /// `layout`.
    gate: RwLock<()>,
    /// Written only under a pause.
    layout: RwLock<Layout>,
    /// A new leaf that is ready for the switch.
    /// Innermost lock: no other is taken under it.
    prepared: Mutex<Option<Node>>,
    /// One `settle` at a time.
    settling: Mutex<()>,
    /// Held by what changes the chain for longer than a pause: a merge, the close.
    changing: Mutex<()>,
    rules: Rules,
    #[cfg(test)]
    hook: tests::Hook,
    /// Called between the first and the second half of a flush.
    #[cfg(test)]
    flushing: tests::Hook,
}

/// The files of a chain and what happens to them.
struct Layout {
    /// Base first; empty once closed.
    nodes: Vec<Node>,
    /// Set while the leaf is being merged into its parent.
    merge: Option<LeafMerge>,
    /// Set once requests can no longer be served.
    ended: Option<Ended>,
}

/// What is left of a chain that serves no requests.
struct Ended {
    why: String,
    files: Vec<PathBuf>,
    properties: Properties,
}

impl Layout {
    fn leaf(&self) -> Result<&Node> {
        self.nodes.last().ok_or_else(|| DiskError::State("the disk is closed".to_owned()))
    }

    fn node(&self, index: usize) -> Result<&Node> {
        self.nodes.get(index).ok_or_else(|| DiskError::State("the disk is closed".to_owned()))
    }

    fn files(&self) -> Vec<PathBuf> {
        match &self.ended {
            Some(ended) => ended.files.clone(),
            None => self.nodes.iter().map(|n| n.path().to_owned()).collect(),
        }
    }

    /// From here on every request fails with `why`.
    fn end(&mut self, why: String, files: Vec<PathBuf>, properties: Properties) {
        self.ended = Some(Ended { why, files, properties });
    }
}

/// A request in flight: keeps pauses waiting.
struct Request<'a> {
    _gate: RwLockReadGuard<'a, ()>,
    layout: RwLockReadGuard<'a, Layout>,
}

/// A stop of all I/O on a chain: while it lives, new requests wait and none is in flight. Do not ask
/// the same chain for data or changes from the thread that holds it.
pub struct Pause<'a> {
    chain: &'a Chain,
    _gate: RwLockWriteGuard<'a, ()>,
}

impl Chain {
    /// Opens the chain that ends in `leaf`. Parents are looked up in the leaf's directory only, by the
    /// base name of their recorded paths, and their identity is checked. `ReadWrite` locks the leaf
    /// exclusively and opens its tracking; the parents are shared read-only. A file with a child that
    /// holds data is not opened for writing.
    pub fn open(leaf: &Path, access: Access) -> Result<Self> {
        Self::open_among(leaf, access, &[])
    }

    /// Like [`Chain::open`], for a leaf whose parents may lie elsewhere, as those of a fork do: a file
    /// that is not in its child's folder is looked for in `folders`, by its base name. A path that a
    /// file names is never followed.
    pub fn open_among(leaf: &Path, access: Access, folders: &[PathBuf]) -> Result<Self> {
        let mut nodes = open::open_nodes_among(leaf, access, folders)?;
        let mut continuity = Continuity::Kept;
        if access == Access::ReadWrite {
            continuity = open_for_writing(&mut nodes)?;
        }
        let Some(top) = nodes.last() else {
            return Err(DiskError::corrupt(leaf, "a chain without files"));
        };
        let properties = top.properties();
        Ok(Self {
            folder: open::folder_of(leaf),
            access,
            geometry: properties.geometry,
            lineage: properties.disk_id,
            continuity: Mutex::new(continuity),
            gate: RwLock::new(()),
            layout: RwLock::new(Layout { nodes, merge: None, ended: None }),
            prepared: Mutex::new(None),
            settling: Mutex::new(()),
            changing: Mutex::new(()),
            rules: Rules::of(leaf),
            #[cfg(test)]
            hook: tests::Hook::default(),
            #[cfg(test)]
            flushing: tests::Hook::default(),
        })
    }

    /// The chain's files, base first.
    pub fn files(&self) -> Vec<PathBuf> {
        self.layout.read().files()
    }

    /// Properties of the leaf.
    pub fn properties(&self) -> Properties {
        let layout = self.layout.read();
        match (&layout.ended, layout.nodes.last()) {
            (Some(ended), _) => ended.properties.clone(),
            (None, Some(leaf)) => leaf.properties(),
            (None, None) => unreachable!("an open chain has a leaf"),
        }
    }

    /// Whether tracking survived the last open of the leaf, and if not, why.
    pub fn continuity(&self) -> Continuity {
        self.continuity.lock().clone()
    }

    /// The id that the leaf was last sealed under, for a chain opened at a checkpoint.
    pub fn last_seal(&self) -> Option<RctId> {
        let layout = self.layout.read();
        layout.nodes.last()?.tracker().ok()?.sealed_ids().pop()
    }

    /// The lineage key.
    pub fn lineage(&self) -> Uuid {
        self.lineage
    }

    /// Waits for requests in flight and holds new ones back until the guard is dropped.
    pub fn pause(&self) -> Pause<'_> {
        Pause { chain: self, _gate: self.gate.write() }
    }

    /// Periodic housekeeping of tracking (the owner calls it every 30 s).
    pub fn flush_map(&self) -> Result<()> {
        self.settle()?;
        let request = self.enter()?;
        for node in request.layout.nodes.iter().filter(|n| n.is_live()) {
            if node.has_open_tracker() {
                node.writing()?.flush_map()?;
            }
        }
        Ok(())
    }

    /// Flush and clean close of leaf and tracking. Requests after it fail; closing again does nothing.
    /// On error the chain stays open. Fails while a merge runs: cancel that first.
    pub fn close(&self) -> Result<()> {
        let Some(_alone) = self.changing.try_lock() else {
            return Err(DiskError::State("a merge is running: cancel it, then close".to_owned()));
        };
        let _pause = self.pause();
        let mut layout = self.layout.write();
        if layout.ended.is_some() {
            layout.nodes.clear();
            return Ok(());
        }
        for file in layout.nodes.iter().filter_map(Node::unflushed) {
            node::flush(&file)?;
        }
        if let Some(node) = self.prepared.lock().take() {
            node.retire();
            node.settle()?;
        }
        for node in &layout.nodes {
            node.retire();
            node.settle()?;
        }
        let (files, properties) = (layout.files(), layout.leaf()?.properties());
        layout.end("the disk is closed".to_owned(), files, properties);
        layout.nodes.iter().for_each(Node::wait_for_flushes);
        layout.nodes.clear();
        Ok(())
    }

    /// Starts a request: waits for a pause to end.
    fn enter(&self) -> Result<Request<'_>> {
        let gate = self.gate.read();
        let layout = self.layout.read();
        match &layout.ended {
            Some(ended) => Err(DiskError::State(ended.why.clone())),
            None => Ok(Request { _gate: gate, layout }),
        }
    }

    fn require_writable(&self) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(DiskError::ReadOnly {
                path: self.files().pop().unwrap_or_else(|| self.folder.clone()),
            }),
        }
    }

    /// A point at which tests look at the files, write to the disk, or make the operation fail.
    #[cfg(test)]
    fn step(&self, name: &'static str) -> Result<()> {
        self.hook.call(self, name)
    }

    #[cfg(not(test))]
    #[inline(always)]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn step(&self, _name: &'static str) -> Result<()> {
        Ok(())
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.access == Access::ReadWrite
            && let Err(error) = self.close()
        {
            tracing::warn!(%error, "disk was not closed clean; the next open recovers it");
        }
    }
}

/// Makes the leaf ready for writes. The order is what change tracking rests on: the pair learns the
/// new DataWriteGuid durably, then the file gets it, then writes are accepted.
fn open_for_writing(nodes: &mut [Node]) -> Result<Continuity> {
    let Some((leaf, below)) = nodes.split_last_mut() else { return Ok(Continuity::Kept) };
    let properties = leaf.properties();
    open::refuse_to_orphan(leaf.path(), properties.data_write_guid)?;
    if let (Some(found), Some(parent)) = (properties.parent, below.last()) {
        let fresh = open::refreshed(&found, leaf.path(), parent);
        if fresh != found {
            leaf.vhdx.set_parent(&fresh)?;
        }
    }
    // A pair made anew must not mark writes with an epoch that an id further down already ended.
    let below_epoch = below.iter().filter_map(|n| n.tracker().ok()).map(|t| t.epoch()).max();
    let next = Uuid::new_v4();
    let (tracker, continuity) = leaf.open_tracking(next, below_epoch.unwrap_or(1))?;
    leaf.vhdx.set_data_write_guid(next)?;
    leaf.set_tracking(tracker);
    if let Continuity::Lost(why) = &continuity {
        tracing::warn!(disk = %leaf.path().display(), why, "change tracking begins anew");
    }
    Ok(continuity)
}
