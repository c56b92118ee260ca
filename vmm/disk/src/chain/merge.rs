//! Online merge of a file into its parent: its beginning and its ends. What a kill leaves at each
//! point is in the table of the module above.

use std::ffi::OsString;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use super::node::Node;
use super::open::{children_of, names_of};
use super::rules::{Rule, Rules};
use super::{Chain, Layout, MergeProgress};
use crate::block::BlockRange;
use crate::error::{DiskError, Result};
use crate::rct::Continuity;
use crate::vhdx::{Access, ParentLocator, Vhdx};

/// Locks that blocks of the child share between guest writes and the merge.
const STRIPES: u64 = 256;

/// What guest writes must know while the leaf is being merged.
pub(super) struct LeafMerge {
    stripes: Vec<RwLock<()>>,
    /// Blocks here that the child holds are copied, but not released yet: writes go to both files.
    copied: Mutex<Range<u64>>,
    /// A write to such a block reached the child only.
    spoiled: AtomicBool,
    pub(super) rules: Rules,
}

impl LeafMerge {
    fn new(rules: Rules) -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| RwLock::new(())).collect(),
            copied: Mutex::new(0..0),
            spoiled: AtomicBool::new(false),
            rules,
        }
    }

    /// The lock of a block: shared while a guest writes it, exclusive while it is copied or released.
    pub(super) fn stripe(&self, block: u64) -> &RwLock<()> {
        &self.stripes[(block % STRIPES) as usize]
    }

    /// The locks of several blocks, each once, in the order in which they are taken.
    pub(super) fn stripes(&self, blocks: &[u64]) -> Vec<&RwLock<()>> {
        let mut indices: Vec<u64> = blocks.iter().map(|b| b % STRIPES).collect();
        indices.sort_unstable();
        indices.dedup();
        indices.into_iter().map(|i| &self.stripes[i as usize]).collect()
    }

    pub(super) fn copied(&self) -> BlockRange {
        self.copied.lock().clone()
    }

    pub(super) fn set_copied(&self, range: BlockRange) {
        *self.copied.lock() = range;
    }

    pub(super) fn spoil(&self) {
        self.spoiled.store(true, Ordering::Release);
    }

    pub(super) fn take_spoiled(&self) -> bool {
        self.spoiled.swap(false, Ordering::AcqRel)
    }
}

/// A merge that runs: the child's index in the chain does not change, for new leaves go on top.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) child: usize,
    pub(super) of_leaf: bool,
}

impl Job {
    pub(super) fn child(self, layout: &Layout) -> Result<&Node> {
        layout.node(self.child)
    }

    pub(super) fn parent(self, layout: &Layout) -> Result<&Node> {
        layout.node(self.child - 1)
    }
}

impl Chain {
    /// Folds the file `child` of this chain into its parent, under guest I/O, and drops it from the
    /// chain; the caller records the new chain and then deletes the file with
    /// [`super::delete_disk_files`]. Restartable: called again after a crash, a failure or a
    /// cancellation it goes on. `child` may be the leaf or any file above the base. Fails, changing
    /// nothing, where another file names the child or its parent as its parent, or where another
    /// process has one of the two open.
    pub fn merge(
        &self,
        child: &Path,
        progress: &dyn Fn(MergeProgress),
        cancel: &AtomicBool,
    ) -> Result<()> {
        let Some(_alone) = self.changing.try_lock() else {
            return Err(DiskError::State("another merge of this disk is running".to_owned()));
        };
        self.require_writable()?;
        self.settle()?;
        let job = self.plan(child)?;
        let done = self
            .begin(job)
            .and_then(|()| self.move_blocks(job, progress, cancel))
            .and_then(|()| self.hand_over_tracking(job))
            .and_then(|()| if job.of_leaf { self.drop_leaf(job) } else { self.drop_middle(job) });
        match done {
            Ok(old) => {
                self.leave_behind(&old);
                Ok(())
            }
            Err(error) => {
                // The chain goes on with both files, as if the merge had never begun.
                if let Err(also) = self.abandon(job) {
                    tracing::warn!(%also, "the files of a merge that failed stay open for writing");
                }
                Err(error)
            }
        }
    }

    fn plan(&self, child: &Path) -> Result<Job> {
        let request = self.enter()?;
        let nodes = &request.layout.nodes;
        let Some(index) = nodes.iter().position(|n| n.is(child)) else {
            return Err(DiskError::State(format!("{} is not in this chain", child.display())));
        };
        let Some(parent) = index.checked_sub(1).and_then(|i| nodes.get(i)) else {
            return Err(DiskError::State(format!("{} has no parent", child.display())));
        };
        let (mine, theirs) = (request.layout.node(index)?.properties(), parent.properties());
        if mine.geometry.size != theirs.geometry.size || mine.disk_id != theirs.disk_id {
            return Err(DiskError::State(format!(
                "{} cannot be merged into {}: size or disk id differ",
                child.display(),
                parent.path().display()
            )));
        }
        let name = request.layout.node(index)?.name();
        if let Some(above) = nodes.get(index + 1)
            && !names_of(&parent_of(above)?).iter().any(|n| name == n.as_str())
        {
            return Err(DiskError::State(format!(
                "{} has left its chain already; open the disk anew",
                child.display()
            )));
        }
        Ok(Job { child: index, of_leaf: index + 1 == nodes.len() })
    }

    /// Takes both files for writing and gives the parent its new DataWriteGuid.
    fn begin(&self, job: Job) -> Result<()> {
        {
            let _pause = self.pause();
            let mut layout = self.layout.write();
            claim(&mut layout, job.child - 1)?;
            claim(&mut layout, job.child)?;
        }
        self.step("merge:claimed")?;
        self.refuse_siblings(job)?;
        let tracking = self.open_parent(job)?;
        let _pause = self.pause();
        let mut layout = self.layout.write();
        if let Some((tracker, continuity)) = tracking {
            layout.nodes[job.child - 1].set_tracking(tracker);
            if let (true, Continuity::Lost(why)) = (job.of_leaf, continuity) {
                *self.continuity.lock() = Continuity::Lost(why);
            }
        }
        if job.of_leaf {
            if self.prepared.lock().is_some() {
                return Err(DiskError::State(
                    "a new leaf is prepared on the one to be merged: discard it first".to_owned(),
                ));
            }
            layout.merge = Some(LeafMerge::new(self.rules));
        }
        Ok(())
    }

    /// Whoever else has the child or the parent as parent would be orphaned. Both are locked for us,
    /// so nobody can have a child of them open; what is locked otherwise is not their child.
    fn refuse_siblings(&self, job: Job) -> Result<()> {
        let request = self.enter()?;
        let layout = &request.layout;
        let own: Vec<OsString> = layout.nodes.iter().map(|n| n.name().to_owned()).collect();
        for node in [job.child(layout)?, job.parent(layout)?] {
            let children = children_of(node.path(), &own)?;
            if let Some((path, why)) = children.unreadable.first() {
                return Err(DiskError::State(format!(
                    "nothing is merged while {} cannot be read, for it may be another child of {} \
                     ({why}); move it away if it is not needed",
                    path.display(),
                    node.path().display()
                )));
            }
            if let Some(other) = children.files.first() {
                let hint =
                    if other.empty { "; delete it if it was merged away before" } else { "" };
                return Err(DiskError::State(format!(
                    "{} cannot be merged: {} is another child of {}{hint}",
                    job.child(layout)?.path().display(),
                    other.path.display(),
                    node.path().display()
                )));
            }
        }
        Ok(())
    }

    /// The order of the reference: tracking knows N, the child accepts N (rule `ChildNamesGuid`), the
    /// parent gets N.
    fn open_parent(&self, job: Job) -> Result<Option<(Box<crate::rct::Tracker>, Continuity)>> {
        let request = self.enter()?;
        let (child, parent) = (job.child(&request.layout)?, job.parent(&request.layout)?);
        let next = Uuid::new_v4();
        let found = parent.properties().data_write_guid;
        let opened = if parent.has_open_tracker() {
            // Left open by an attempt that could not be ended properly.
            parent.writing()?.announce(next)?;
            None
        } else {
            Some(parent.open_tracking(next, 1)?)
        };
        self.step("merge:announced")?;
        let mut locator = parent_of(child)?;
        locator.linkage = found;
        locator.linkage2 = Some(next);
        if !self.rules.obey(Rule::ChildNamesGuid) {
            parent.vhdx.set_data_write_guid(next)?;
        }
        child.vhdx.set_parent(&locator)?;
        self.step("merge:linked")?;
        parent.vhdx.set_data_write_guid(next)?;
        self.step("merge:guid")?;
        // From now on the parent's marks are later than every id of the child.
        let tracker = match &opened {
            Some((tracker, _)) => tracker,
            None => parent.writing()?,
        };
        let child_epoch = child.tracker().map_or(0, |t| t.epoch());
        tracker.raise_epoch(child_epoch)?;
        self.step("merge:raised")?;
        Ok(opened)
    }

    /// Ends the merge of the leaf: its parent is the leaf from here on.
    fn drop_leaf(&self, job: Job) -> Result<Node> {
        let _pause = self.pause();
        let mut layout = self.layout.write();
        require_empty(job.child(&layout)?)?;
        if self.rules.obey(Rule::ForgetBeforeParentAlone) {
            forget_ids(job.child(&layout)?)?;
        }
        self.step("merge:paused")?;
        layout.merge = None;
        Ok(layout.nodes.remove(job.child))
    }

    /// Ends the merge of a file further down: its child gets the parent as its own, durably, before
    /// the file leaves the chain.
    fn drop_middle(&self, job: Job) -> Result<Node> {
        let old = {
            let _pause = self.pause();
            let mut layout = self.layout.write();
            require_empty(job.child(&layout)?)?;
            let mut locator = parent_of(job.child(&layout)?)?;
            locator.linkage = job.parent(&layout)?.properties().data_write_guid;
            locator.linkage2 = None;
            let above = job.child + 1;
            claim(&mut layout, above)?;
            self.step("merge:before-repoint")?;
            let grandchild = layout.node(above)?;
            let before = parent_of(grandchild)?;
            let repointed = if self.rules.obey(Rule::RepointBeforeLeave) {
                grandchild.vhdx.set_parent(&locator)
            } else {
                Ok(())
            };
            if repointed.is_err() {
                // It may have reached the file all the same.
                let _ = grandchild.vhdx.set_parent(&before);
            }
            if above + 1 < layout.nodes.len() {
                grandchild.retire();
            }
            repointed?;
            job.parent(&layout)?.retire();
            layout.nodes.remove(job.child)
        };
        // The change is made: what fails here is repeated by the next `settle`.
        if let Err(error) = self.step("merge:repointed").and_then(|()| self.settle()) {
            tracing::warn!(%error, "merged files are not closed clean yet");
        }
        Ok(old)
    }

    /// Leaves the child, now empty, as a proper file: whoever opens it instead of its parent reads
    /// the same. Errors only cost that: the chain is right without it.
    fn leave_behind(&self, old: &Node) {
        let parent = old.path().to_owned();
        let linked = parent_of(old).and_then(|mut locator| {
            if let Some(guid) = locator.linkage2.take() {
                locator.linkage = guid;
            }
            old.vhdx.set_parent(&locator)
        });
        old.retire();
        let closed = linked.and_then(|()| old.settle()).and_then(|()| self.step("merge:left"));
        if let Err(error) = closed {
            tracing::warn!(file = %parent.display(), %error, "merged file was not closed clean");
        }
    }

    /// Ends a merge early: both files stay, and guest writes go to the leaf only.
    fn abandon(&self, job: Job) -> Result<()> {
        // What can be done outside the pause; the parent keeps its GUID, so the child can name it.
        let linked = self.link_plainly(job);
        {
            let _pause = self.pause();
            let mut layout = self.layout.write();
            layout.merge = None;
            let parent = job.parent(&layout)?;
            // Where this fails the parent stays live, and guest flushes include it.
            if parent.is_live() {
                parent.vhdx.flush()?;
            }
            parent.retire();
            if !job.of_leaf {
                job.child(&layout)?.retire();
            }
        }
        self.step("merge:abandoned")?;
        linked.and_then(|()| self.settle())
    }

    fn link_plainly(&self, job: Job) -> Result<()> {
        let request = self.enter()?;
        let (child, parent) = (job.child(&request.layout)?, job.parent(&request.layout)?);
        if parent.is_live() {
            parent.vhdx.flush()?;
        }
        let mut locator = parent_of(child)?;
        if !child.is_live() || locator.linkage2.is_none() {
            return Ok(());
        }
        locator.linkage = parent.properties().data_write_guid;
        locator.linkage2 = None;
        child.vhdx.set_parent(&locator)
    }
}

fn parent_of(node: &Node) -> Result<ParentLocator> {
    let locator = node.properties().parent;
    locator.ok_or_else(|| DiskError::corrupt(node.path(), "a child that names no parent"))
}

/// The parent has the child's ids. From here on writes are marked in the parent alone: should a kill let
/// the chain be opened at the child again, the child's map must not be asked.
pub(super) fn forget_ids(child: &Node) -> Result<()> {
    let emptied = child.writing()?;
    emptied.sealed_ids().iter().try_for_each(|id| emptied.forget(id))
}

fn require_empty(child: &Node) -> Result<()> {
    if child.is_empty() {
        return Ok(());
    }
    Err(DiskError::State(format!("{} still holds data after its merge", child.path().display())))
}

/// Takes a file of the chain for writing, under a pause. On error it stays shared; it is only when
/// even that fails that the disk stops, rather than serving from a file that may have changed.
fn claim(layout: &mut Layout, index: usize) -> Result<()> {
    let node = layout.node(index)?;
    if node.is_claimed() {
        node.revive();
        return Ok(());
    }
    let (path, before) = (node.path().to_owned(), node.properties());
    let (files, leaf) = (layout.files(), layout.leaf()?.properties());
    // Our own shared lock would be in the way.
    node.wait_for_flushes();
    drop(layout.nodes.remove(index));
    let (opened, refused) = match Vhdx::open(&path, Access::ReadWrite) {
        Ok(vhdx) => (Ok(Node::new(vhdx, Access::ReadWrite)), None),
        Err(e) => (reopen_shared(&path), Some(e)),
    };
    let same = |n: &Node| n.properties().data_write_guid == before.data_write_guid;
    match (opened, refused) {
        (Ok(node), refused) if same(&node) => {
            layout.nodes.insert(index, node);
            refused.map_or(Ok(()), Err)
        }
        (Ok(_), _) => {
            let why = format!("{} was changed by another process", path.display());
            layout.end(why.clone(), files, leaf);
            Err(DiskError::State(why))
        }
        (Err(e), _) => {
            layout.end(format!("{} could not be opened again: {e}", path.display()), files, leaf);
            Err(e)
        }
    }
}

/// Another process that tried for the file at the wrong moment soon goes away.
fn reopen_shared(path: &Path) -> Result<Node> {
    let mut last = DiskError::Busy { path: path.to_owned() };
    for _ in 0..200 {
        match Vhdx::open(path, Access::ReadOnly) {
            Ok(vhdx) => return Ok(Node::new(vhdx, Access::ReadOnly)),
            Err(e) => last = e,
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Err(last)
}
