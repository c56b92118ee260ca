//! A checkpoint's part on one disk: the new leaf, and the switch to it.

use std::path::Path;

use uuid::Uuid;

use super::files::{create_pair, delete_disk_files, undo_create};
use super::node::Node;
use super::open::{MAX_FILES, children_of, folder_of, names_of};
use super::{Chain, Pause};
use crate::error::{DiskError, Result};
use crate::fs;
use crate::rct::RctId;
use crate::vhdx::{Access, CreateOptions, ParentLink, Properties, Vhdx};

/// Block size of children, as Hyper-V's: small blocks keep partial ones few.
const CHILD_BLOCK: u32 = 2 << 20;
/// Disks up to here get small blocks in children; larger ones would have huge block tables.
const SMALL_BLOCKS_UP_TO: u64 = 16 << 40;

/// What a new leaf must fit.
struct Fit {
    properties: Properties,
    link: ParentLink,
    epoch: u32,
    block_size: u32,
}

impl Chain {
    /// Creates `leaf` as an empty child of the current leaf, with its tracking pair, ready to be
    /// written; nothing uses it yet. Durable on return; done outside any pause. Repeating it is
    /// harmless, and a leaf that was prepared under another name is removed.
    pub fn prepare_leaf(&self, leaf: &Path) -> Result<()> {
        self.require_writable()?;
        self.settle()?;
        let fit = self.fit_of_leaf(leaf)?;
        let path = self.folder.join(leaf.file_name().unwrap_or_default());
        {
            let mut prepared = self.prepared.lock();
            match prepared.take() {
                Some(node) if node.is(leaf) && fs::is_file(&path).is_ok() => {
                    *prepared = Some(node);
                    return Ok(());
                }
                Some(node) => discard(node)?,
                None => {}
            }
            remove_stale(&path, &fit.link.path)?;
            // Killed from here on: an empty child that nothing names.
            *prepared = Some(create_leaf(&path, &fit)?);
        }
        self.step("prepared")?;
        self.confirm_prepared(&fit)
    }

    /// A merge that began meanwhile either sees the prepared leaf and gives up, or is seen here.
    fn confirm_prepared(&self, fit: &Fit) -> Result<()> {
        let request = self.enter()?;
        let same = request.layout.leaf()?.is(&fit.link.path);
        if same && request.layout.merge.is_none() {
            return Ok(());
        }
        drop(request);
        self.discard_prepared()?;
        Err(merge_in_the_way())
    }

    /// Removes a leaf that was prepared and will not be used.
    pub fn discard_prepared(&self) -> Result<()> {
        match self.prepared.lock().take() {
            Some(node) => discard(node),
            None => Ok(()),
        }
    }

    /// Makes what was written so far durable, so that little is left for the pause of a switch. Call
    /// it just before [`Chain::pause`].
    pub fn preflush(&self) -> Result<()> {
        let request = self.enter()?;
        let leaf = request.layout.leaf()?;
        leaf.vhdx.flush()?;
        leaf.writing()?.flush_map()
    }

    /// With I/O paused: seal the current leaf under a new id, and make the prepared `leaf` the one
    /// that is written. On error the old leaf stays in use.
    ///
    /// The old leaf is synced, closed clean and opened to other processes by [`Chain::settle`], which
    /// the caller calls after the pause and before anyone is told the id: under full write load the
    /// sync takes far longer than a guest should wait. Until then nobody else can open the old leaf,
    /// so nothing can be read under the id that a power cut could still take back; and guest flushes
    /// include the old leaf.
    pub fn switch_leaf(&self, pause: &Pause<'_>, leaf: &Path) -> Result<RctId> {
        self.require_writable()?;
        if !std::ptr::eq(pause.chain, self) {
            return Err(DiskError::State("the pause is of another disk".to_owned()));
        }
        let mut layout = self.layout.write();
        if let Some(ended) = &layout.ended {
            return Err(DiskError::State(ended.why.clone()));
        }
        if layout.merge.is_some() {
            return Err(merge_in_the_way());
        }
        let mut prepared = self.prepared.lock();
        let Some(new) = prepared.as_ref().filter(|n| n.is(leaf)) else {
            return Err(DiskError::State(format!("{} was not prepared", leaf.display())));
        };
        let old = layout.leaf()?;
        fit_to(new, old)?;
        self.step("switch:fitted")?;
        // The old leaf's content ends here. Killed before: it goes on as the leaf. After: it holds an
        // id that nobody knows, and may still go on.
        let id = old.writing()?.seal()?;
        if let Err(error) = self.step("switch:sealed") {
            old.writing()?.forget(&id)?;
            return Err(error);
        }
        old.retire();
        layout.nodes.extend(prepared.take());
        Ok(id)
    }

    /// Syncs files that are no longer written, closes them clean and shares them, so that every tool,
    /// and every other process, can read them. Call it after the pause of a switch; where it fails
    /// the checkpoint is not durable. [`Chain::flush_map`] and [`Chain::close`] do it too. A kill
    /// before it loses what the guest had not flushed, and costs a replay and some re-reading.
    pub fn settle(&self) -> Result<()> {
        {
            let _one = self.settling.lock();
            let request = self.enter()?;
            request.layout.nodes.iter().try_for_each(Node::settle)?;
        }
        self.step("settled")
    }

    /// Checks that `leaf` can be the next leaf, and says what it must be.
    fn fit_of_leaf(&self, leaf: &Path) -> Result<Fit> {
        let request = self.enter()?;
        let layout = &request.layout;
        if layout.merge.is_some() {
            return Err(merge_in_the_way());
        }
        let state = |what: String| Err(DiskError::State(what));
        if leaf.file_name().is_none() || !same_folder(&folder_of(leaf), &self.folder) {
            return state(format!("{} is not in the disk's folder", leaf.display()));
        }
        if layout.nodes.iter().any(|n| n.is(leaf)) {
            return state(format!("{} is in use by this disk", leaf.display()));
        }
        if layout.nodes.len() >= MAX_FILES {
            return state(format!("the disk has {MAX_FILES} files: delete a checkpoint first"));
        }
        let old = layout.leaf()?;
        let properties = old.properties();
        let link =
            ParentLink { path: old.path().to_owned(), data_write_guid: properties.data_write_guid };
        // The seal will end the current epoch: the child's marks must be later.
        let epoch = old.writing()?.epoch().saturating_add(1);
        let block_size = self.child_block_size(&properties);
        Ok(Fit { properties, link, epoch, block_size })
    }

    fn child_block_size(&self, parent: &Properties) -> u32 {
        #[cfg(test)]
        if let Some(wanted) = self.hook.block_size() {
            return wanted;
        }
        let small = parent.geometry.size <= SMALL_BLOCKS_UP_TO;
        if small { parent.block_size.min(CHILD_BLOCK) } else { parent.block_size }
    }
}

fn merge_in_the_way() -> DiskError {
    DiskError::State("the leaf is being merged: wait for the end, or cancel it".to_owned())
}

fn same_folder(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Adjusts a prepared leaf to what has happened to the current one since; in most cases nothing.
fn fit_to(new: &Node, old: &Node) -> Result<()> {
    let sealed = old.writing()?.epoch();
    if new.writing()?.epoch() <= sealed {
        new.writing()?.raise_epoch(sealed.saturating_add(1))?;
    }
    let guid = old.properties().data_write_guid;
    match new.properties().parent {
        Some(locator) if !names_of(&locator).iter().any(|n| old.name() == n.as_str()) => {
            let (new, old) = (new.path().display(), old.path().display());
            Err(DiskError::State(format!("{new} was prepared for another leaf than {old}")))
        }
        Some(locator) if locator.linkage == guid => Ok(()),
        Some(mut locator) => {
            locator.linkage = guid;
            locator.linkage2 = None;
            new.vhdx.set_parent(&locator)
        }
        None => Err(DiskError::corrupt(new.path(), "a prepared leaf without a parent")),
    }
}

/// A file in the way: removed if it is an empty child of the current leaf, as one that was prepared
/// before a crash is.
fn remove_stale(path: &Path, parent: &Path) -> Result<()> {
    if fs::is_file(path).is_err() {
        return Ok(());
    }
    let stale = children_of(parent, &[])?;
    if stale.files.iter().any(|c| c.empty && c.path.file_name() == path.file_name()) {
        return delete_disk_files(path);
    }
    Err(DiskError::State(format!("{} exists already and is not an unused leaf", path.display())))
}

/// Creates a leaf, complete and durable, or leaves nothing.
fn create_leaf(path: &Path, fit: &Fit) -> Result<Node> {
    let geometry = fit.properties.geometry;
    let options = CreateOptions {
        size: geometry.size,
        block_size: fit.block_size,
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        fixed: false,
        disk_id: Some(fit.properties.disk_id),
        parent: Some(fit.link.clone()),
    };
    Vhdx::create(path, &options)?;
    open_leaf(path, fit.epoch).inspect_err(|_| undo_create(path))
}

/// All the syncs that a first open for writing needs, done before the pause.
fn open_leaf(path: &Path, epoch: u32) -> Result<Node> {
    create_pair(path, epoch)?;
    let mut node = Node::new(Vhdx::open(path, Access::ReadWrite)?, Access::ReadWrite);
    let next = Uuid::new_v4();
    let (tracker, _) = node.open_tracking(next, epoch)?;
    node.vhdx.set_data_write_guid(next)?;
    node.set_tracking(tracker);
    Ok(node)
}

/// Closes and deletes a leaf that was never used.
fn discard(node: Node) -> Result<()> {
    let path = node.path().to_owned();
    drop(node);
    delete_disk_files(&path)
}
