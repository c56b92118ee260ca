//! Changes of disks that nobody uses: another size, a shorter file, another parent, a fork, a chain
//! folded down. Each takes the locks of the files that it changes, and leaves at every point of it
//! files that open and a tracking pair that answers rightly or not at all.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;
use uuid::Uuid;

use super::files::{create_pair, undo_create};
use super::node::Node;
use super::open::{
    self, check_parent, children_of, folder_of, open_nodes, open_nodes_among, refuse_to_orphan,
};
use super::{Chain, MergeProgress, delete_disk_files, open_for_writing};
use crate::error::{DiskError, Result};
use crate::rct::{self, Continuity, DiskIdentity};
use crate::vhdx::{
    Access, CompactPlan, CompactProgress, CreateOptions, Kind, ParentLink, Vhdx, create,
};

/// What a resize did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resized {
    /// Virtual size before, in bytes.
    pub before: u64,
    /// Virtual size now.
    pub after: u64,
    /// The smallest size the disk could have got: where its data ends, or its parent.
    pub least: u64,
    /// Whether ids sealed before are still answered.
    pub continuity: Continuity,
}

/// Gives a disk that is not in use another virtual size: a base without children, or a leaf. What is
/// added reads as zeros and counts as changed since every id; only zeros are cut off. With `dry_run`
/// everything is checked and nothing done.
///
/// | killed after | state |
/// |---|---|
/// | tracking announces the new DataWriteGuid, the file has it | the old size, ids stand |
/// | the file has the new size | the pair has the old one: the next open makes it anew, no id is answered |
/// | the pair has the new size | done |
pub fn resize(leaf: &Path, size: u64, dry_run: bool) -> Result<Resized> {
    let access = if dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let mut nodes = open_nodes(leaf, access)?;
    let parent = nodes.len().checked_sub(2).map(|below| nodes[below].size);
    let Some(node) = nodes.last() else {
        return Err(DiskError::corrupt(leaf, "a chain without files"));
    };
    refuse_to_orphan(leaf, node.properties().data_write_guid)?;
    let before = node.size;
    // Only shrinking has to know; to look for it may mean reading a lot.
    let data = if size < before { node.vhdx.least_size()? } else { 0 };
    let least = data.max(parent.unwrap_or(0));
    if size < parent.unwrap_or(0) && size < before {
        return Err(DiskError::State(format!(
            "{} cannot shrink to {size} bytes: a child is never smaller than its parent, so {least} \
             is the smallest size; merge it into its parent first",
            leaf.display()
        )));
    }
    if size < data {
        return Err(too_small(leaf, size, least));
    }
    let mut done = Resized { before, after: size, least, continuity: Continuity::Kept };
    if dry_run || size == before {
        return Ok(done);
    }
    done.continuity = open_for_writing(&mut nodes)?;
    if let Some(node) = nodes.last_mut()
        && let Continuity::Lost(why) = resize_open(node, size)?
    {
        done.continuity = Continuity::Lost(why);
    }
    Ok(done)
}

fn too_small(disk: &Path, size: u64, least: u64) -> DiskError {
    DiskError::State(format!(
        "{} cannot shrink to {size} bytes: it holds data up to {least}, which is the smallest size; \
         remove what lies behind it in the guest first (a GPT keeps a copy at the disk's end)",
        disk.display()
    ))
}

/// Resizes a file whose tracking has been opened for it.
fn resize_open(node: &mut Node, size: u64) -> Result<Continuity> {
    node.writing()?.close_clean()?;
    let before = identity(node);
    let path = node.path().to_owned();
    let Some(disk) = Arc::get_mut(&mut node.vhdx) else {
        return Err(DiskError::State(format!("{} is being used", path.display())));
    };
    disk.resize(size)?;
    disk.make_clean()?;
    node.size = size;
    // The disk is right; tracking that cannot be brought along begins anew with the next open.
    Ok(rct::resize(node.path(), &before, size).unwrap_or_else(|e| Continuity::Lost(e.to_string())))
}

fn identity(node: &Node) -> DiskIdentity {
    let properties = node.properties();
    DiskIdentity {
        lineage: properties.disk_id,
        size: properties.geometry.size,
        data_write_guid: properties.data_write_guid,
    }
}

/// Makes a disk file that is not in use shorter: see [`Vhdx::compact`]. Any file of a chain can be
/// compacted, for nothing changes that its children or its tracking could see.
pub fn compact(
    file: &Path,
    scan: bool,
    dry_run: bool,
    progress: &dyn Fn(CompactProgress),
    cancel: &AtomicBool,
) -> Result<CompactPlan> {
    if dry_run {
        return Vhdx::open(file, Access::ReadOnly)?.compact_plan(scan, progress, cancel);
    }
    let mut disk = Vhdx::open(file, Access::ReadWrite)?;
    let done = disk.compact(scan, progress, cancel)?;
    disk.make_clean()?;
    Ok(done)
}

/// Names `parent` as the parent of `child` (which may be any file of a chain but its base). The parent
/// must be the one that the child was made on: its DataWriteGuid is compared. Gives whether it was.
///
/// With `ignore_identity` another one is taken: what the child reads as changes then, perhaps into
/// garbage, so it gets a new DataWriteGuid, its own children no longer fit, and its tracking begins
/// anew. With `dry_run` everything is checked and nothing done.
pub fn set_parent(
    child: &Path,
    parent: &Path,
    ignore_identity: bool,
    dry_run: bool,
) -> Result<bool> {
    let below = open_nodes_among(parent, Access::ReadOnly, &[])?;
    let Some(top) = below.last() else {
        return Err(DiskError::corrupt(parent, "a chain without files"));
    };
    let found = top.properties();
    for node in &below {
        if same_file(node.path(), child)? {
            return Err(DiskError::State(format!(
                "{} cannot be the parent of {}, on which it rests",
                parent.display(),
                child.display()
            )));
        }
    }
    let access = if dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let disk = Vhdx::open(child, access)?;
    let properties = disk.properties();
    let Some(locator) = properties.parent.clone().filter(|_| properties.kind == Kind::Differencing)
    else {
        return Err(DiskError::State(format!(
            "{} is not a differencing disk: it has no parent",
            child.display()
        )));
    };
    let same = open::accepts(&locator, found.data_write_guid);
    let mut accepted = locator.clone();
    if ignore_identity {
        accepted.linkage = found.data_write_guid;
    }
    check_parent(child, &properties, &accepted, parent, &found)?;
    if !same {
        refuse_to_orphan(child, properties.data_write_guid)?;
    }
    let link = ParentLink { path: parent.to_owned(), data_write_guid: found.data_write_guid };
    let mut named = create::locator(child, &link)?;
    if dry_run {
        return Ok(same);
    }
    if same {
        // A merge that was cut short goes on: the child must go on accepting both GUIDs.
        (named.linkage, named.linkage2) = (locator.linkage, locator.linkage2);
        disk.set_parent(&named)?;
    } else {
        // The new GUID first: should a kill come before the parent, the content is the old one, and
        // the tracking pair, which does not know the GUID, answers for nothing.
        let identity = DiskIdentity {
            lineage: properties.disk_id,
            size: properties.geometry.size,
            data_write_guid: Uuid::new_v4(),
        };
        disk.set_data_write_guid(identity.data_write_guid)?;
        disk.set_parent(&named)?;
        rct::start_anew(child, &identity)?;
    }
    disk.make_clean()?;
    Ok(same)
}

/// Gives a base without children another Virtual Disk ID, a random one if `None`: from then on it is
/// another disk, of which no id and no child of the old one is known.
pub fn set_disk_id(file: &Path, id: Option<Uuid>, dry_run: bool) -> Result<Uuid> {
    let access = if dry_run { Access::ReadOnly } else { Access::ReadWrite };
    let mut disk = Vhdx::open(file, access)?;
    let properties = disk.properties();
    if properties.kind == Kind::Differencing {
        return Err(DiskError::State(format!(
            "{} is a differencing disk: it has the id of its base",
            file.display()
        )));
    }
    refuse_to_orphan(file, properties.data_write_guid)?;
    let id = id.unwrap_or_else(Uuid::new_v4);
    if dry_run || id == properties.disk_id {
        return Ok(id);
    }
    // Killed between the steps: the pair knows neither the GUID nor the id, and answers for nothing.
    let identity = DiskIdentity {
        lineage: id,
        size: properties.geometry.size,
        data_write_guid: Uuid::new_v4(),
    };
    disk.set_data_write_guid(identity.data_write_guid)?;
    disk.set_disk_id(id)?;
    rct::start_anew(file, &identity)?;
    disk.make_clean()?;
    Ok(id)
}

/// A new child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forked {
    /// Its virtual size.
    pub size: u64,
    /// Its block size.
    pub block_size: u32,
    /// Whether it lies in another folder than its parent, so that every open must be told that folder.
    pub elsewhere: bool,
}

/// Makes a new child of a disk that is only read from now on: the base of any number of forks. `size`
/// may be larger than the base's. The base stays as it is; whoever writes to it orphans its forks,
/// which then refuse to open.
pub fn fork(
    base: &Path,
    child: &Path,
    size: Option<u64>,
    block_size: Option<u32>,
    dry_run: bool,
) -> Result<Forked> {
    let below = open_nodes(base, Access::ReadOnly)?;
    let Some(top) = below.last() else {
        return Err(DiskError::corrupt(base, "a chain without files"));
    };
    let parent = top.properties();
    let size = size.unwrap_or(parent.geometry.size);
    if size < parent.geometry.size {
        return Err(DiskError::State(format!(
            "a child of {} cannot be smaller than its {} bytes",
            base.display(),
            parent.geometry.size
        )));
    }
    let link = ParentLink { path: base.to_owned(), data_write_guid: parent.data_write_guid };
    let elsewhere = !same_folder(child, base)?;
    let block_size = block_size.unwrap_or(parent.block_size);
    let forked = Forked { size, block_size, elsewhere };
    create::locator(child, &link)?;
    if child.symlink_metadata().is_ok() {
        return Err(DiskError::io("create", child, std::io::ErrorKind::AlreadyExists.into()));
    }
    if dry_run {
        return Ok(forked);
    }
    let options = CreateOptions {
        size,
        block_size,
        logical_sector: parent.geometry.logical_sector,
        physical_sector: parent.geometry.physical_sector,
        fixed: false,
        disk_id: Some(parent.disk_id),
        parent: Some(link),
    };
    // The child's marks must be later than every id below it.
    let epochs = below.iter().filter_map(|n| n.tracker().ok()).map(|t| t.epoch());
    let epoch = epochs.max().unwrap_or(0).saturating_add(1);
    Vhdx::create(child, &options)?;
    create_pair(child, epoch).inspect_err(|_| undo_create(child))?;
    Ok(forked)
}

fn same_file(a: &Path, b: &Path) -> Result<bool> {
    let id = |path: &Path| match std::fs::metadata(path) {
        Ok(meta) => Ok((meta.dev(), meta.ino())),
        Err(e) => Err(DiskError::io("examine", path, e)),
    };
    Ok(id(a)? == id(b)?)
}

fn same_folder(a: &Path, b: &Path) -> Result<bool> {
    let folder = |path: &Path| {
        let folder = folder_of(path);
        folder.canonicalize().map_err(|e| DiskError::io("find folder", &folder, e))
    };
    Ok(folder(a)? == folder(b)?)
}

/// What a merge down does, or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergeDown {
    /// The file that holds everything in the end.
    pub into: PathBuf,
    /// Files that are folded into it and deleted, lowest first.
    pub merged: Vec<PathBuf>,
    /// Files that have to grow first, for the leaf is larger.
    pub grown: Vec<PathBuf>,
}

/// Folds the `levels` topmost files of a chain that is not in use into the file below them, and
/// deletes them. From the bottom up: each file's data is copied once. Killed at any point, the chain
/// opens at the leaf as long as that is there, then at the file that it was folded into; called again
/// it goes on. With `dry_run` it only says what would be done.
pub fn merge_down(
    leaf: &Path,
    levels: usize,
    dry_run: bool,
    progress: &dyn Fn(&Path, MergeProgress),
    cancel: &AtomicBool,
) -> Result<MergeDown> {
    let plan = plan_merge(leaf, levels)?;
    if dry_run {
        return Ok(plan);
    }
    grow_parents(leaf, &plan)?;
    let chain = Chain::open(leaf, Access::ReadWrite)?;
    for child in &plan.merged {
        chain.merge(child, &|p| progress(child, p), cancel)?;
        delete_disk_files(child)?;
    }
    chain.close()?;
    Ok(plan)
}

fn plan_merge(leaf: &Path, levels: usize) -> Result<MergeDown> {
    let nodes = open_nodes(leaf, Access::ReadOnly)?;
    let into = nodes.len().checked_sub(levels + 1).filter(|_| levels > 0).ok_or_else(|| {
        DiskError::State(format!(
            "{} has {} files below it: 1 to {} levels can be merged",
            leaf.display(),
            nodes.len() - 1,
            nodes.len() - 1
        ))
    })?;
    let size = nodes.last().map_or(0, |n| n.size);
    let own: Vec<OsString> = nodes.iter().map(|n| n.name().to_owned()).collect();
    for node in &nodes[into..] {
        let others = children_of(node.path(), &own)?;
        if let Some(other) = others.files.first() {
            return Err(DiskError::State(format!(
                "{} cannot be merged: {} is another child of {}",
                leaf.display(),
                other.path.display(),
                node.path().display()
            )));
        }
    }
    Ok(MergeDown {
        into: nodes[into].path().to_owned(),
        merged: nodes[into + 1..].iter().map(|n| n.path().to_owned()).collect(),
        grown: nodes[into..]
            .iter()
            .filter(|n| n.size < size)
            .map(|n| n.path().to_owned())
            .collect(),
    })
}

/// Makes every file that takes part as large as the leaf, from the top down, for a child may be larger
/// than its parent and never smaller. The order is that of a merge, so that the child fits its parent
/// at every point: tracking knows the new DataWriteGuid N, the child accepts N, the parent gets N and
/// then the size, the child names N alone.
fn grow_parents(leaf: &Path, plan: &MergeDown) -> Result<()> {
    let mut child = leaf.to_owned();
    let mut parents: Vec<&PathBuf> = plan.merged.iter().rev().skip(1).collect();
    parents.push(&plan.into);
    for parent in parents {
        if plan.grown.contains(parent) {
            grow_parent(&child, parent)?;
        }
        child.clone_from(parent);
    }
    Ok(())
}

fn grow_parent(child: &Path, parent: &Path) -> Result<()> {
    let upper = Vhdx::open(child, Access::ReadWrite)?;
    let mut nodes = open_nodes(parent, Access::ReadWrite)?;
    let Some(node) = nodes.last_mut() else {
        return Err(DiskError::corrupt(parent, "a chain without files"));
    };
    let properties = upper.properties();
    let Some(mut locator) = properties.parent else {
        return Err(DiskError::corrupt(child, "a child that names no parent"));
    };
    let next = Uuid::new_v4();
    locator.linkage = node.properties().data_write_guid;
    locator.linkage2 = Some(next);
    let (tracker, _) = node.open_tracking(next, 1)?;
    upper.set_parent(&locator)?;
    node.vhdx.set_data_write_guid(next)?;
    node.set_tracking(tracker);
    if let Continuity::Lost(why) = resize_open(node, properties.geometry.size)? {
        tracing::warn!(disk = %parent.display(), why, "change tracking begins anew");
    }
    locator.linkage = next;
    locator.linkage2 = None;
    upper.set_parent(&locator)?;
    upper.make_clean()
}
