//! The one rule that says which file of a disk is its top, after any crash.

use std::path::{Path, PathBuf};

use tidemark_disk::DiskError;
use tidemark_disk::chain::Chain;
use tidemark_disk::vhdx::{Access, Presence, Vhdx};

use crate::config::VmConfig;
use crate::engine::Place;
use crate::error::{EngineError, Result};
use crate::folder::{VmFolder, entries};
use crate::intent::{CheckpointIntent, Intent, Phase};
use crate::store;

/// The top file of each disk of a VM whose disks nobody has open: name and path, in order.
///
/// It is the configured leaf, unless a checkpoint was being taken and its new leaves were complete:
/// then the switch may have happened, so a new leaf that is a child of the configured one is the top.
/// Using it is right also where the switch had not happened, because it is then empty.
pub(crate) fn current_leaves(
    folder: &VmFolder,
    config: &VmConfig,
    intent: Option<&Intent>,
) -> Result<Vec<(String, PathBuf)>> {
    let pending = match intent {
        Some(Intent::Checkpoint(c)) if !c.is_recorded(config) => Some(c),
        _ => None,
    };
    config
        .disks
        .iter()
        .map(|disk| {
            let configured = folder.disk(&disk.leaf);
            let top = match pending {
                Some(intent) => switched_leaf(folder, intent, &disk.name, &configured)?,
                None => None,
            };
            Ok((disk.name.clone(), top.unwrap_or(configured)))
        })
        .collect()
}

/// The top file of one disk of a VM whose disks nobody has open.
pub(crate) fn leaf_of(place: &Place, config: &VmConfig, disk: &str) -> Result<PathBuf> {
    let intent = Intent::load(&place.folder)?;
    let mut leaves = current_leaves(&place.folder, config, intent.as_ref())?.into_iter();
    let found = leaves.find(|(name, _)| name == disk).map(|(_, leaf)| leaf);
    found.ok_or_else(|| EngineError::Invalid(format!("VM {} has no disk {disk}", place.name)))
}

/// The new leaf of a disk, if it may be in use.
fn switched_leaf(
    folder: &VmFolder,
    intent: &CheckpointIntent,
    disk: &str,
    configured: &Path,
) -> Result<Option<PathBuf>> {
    let (Phase::Committing, Some(file)) = (intent.phase, intent.leaf_of(disk)) else {
        return Ok(None);
    };
    let leaf = folder.disk(file);
    if !store::exists(&leaf)? {
        // Undone already.
        return Ok(None);
    }
    match is_child_of(&leaf, configured) {
        Ok(true) => Ok(Some(leaf)),
        // The configured leaf has been written since the new one was made: there was no switch.
        Ok(false) if is_empty(&leaf)? => Ok(None),
        Ok(false) => Err(EngineError::damaged(
            &leaf,
            format!("it holds data but is not a child of {}", configured.display()),
        )),
        Err(e) => Err(e.into()),
    }
}

/// Whether `leaf` is a valid child of `parent`.
fn is_child_of(leaf: &Path, parent: &Path) -> std::result::Result<bool, DiskError> {
    match Chain::open(leaf, Access::ReadOnly) {
        Ok(chain) => {
            let files = chain.files();
            let below = files.len().checked_sub(2).and_then(|i| files.get(i));
            Ok(below.is_some_and(|f| f.file_name() == parent.file_name()))
        }
        Err(DiskError::ParentChanged { path, .. }) if path.file_name() == leaf.file_name() => {
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// Whether a file holds nothing at all, neither data nor zeros, so that removing it loses nothing.
pub(crate) fn is_empty(file: &Path) -> std::result::Result<bool, DiskError> {
    let vhdx = Vhdx::open(file, Access::ReadOnly)?;
    let properties = vhdx.properties();
    if properties.parent.is_none() {
        return Ok(false);
    }
    let step = u64::from(properties.block_size);
    let size = properties.geometry.size;
    let mut at = 0;
    while at < size {
        let len = step.min(size - at);
        let parts = vhdx.presence(at, len)?;
        if parts.iter().any(|(_, p)| *p != Presence::Absent) {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

/// Disk files in the VM's folder that neither its configuration nor its half-done work refers to.
pub(crate) fn strangers(folder: &VmFolder, config: &VmConfig) -> Result<Vec<String>> {
    let intent = Intent::load(folder)?;
    let known: Vec<&str> =
        config.disk_files().chain(intent.iter().flat_map(Intent::files)).collect();
    let mut names = entries(&folder.disks())?;
    names.retain(|n| (n.ends_with(".vhdx") || n.ends_with(".avhdx")) && !known.contains(&&**n));
    Ok(names)
}
