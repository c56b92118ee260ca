//! New base disks, and the end of disk files.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Chain;
use crate::error::{DiskError, Result};
use crate::fs;
use crate::rct::{DiskIdentity, Tracker, pair_paths, unfinished_path};
use crate::vhdx::{Access, CreateOptions, Properties, Vhdx, pending_path};

/// A file that a merge has emptied may still be held by a guest's request that began before: so long
/// a deletion waits for it.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

impl Chain {
    /// Creates a new base disk with its tracking pair; durable on return, nothing left on error. A
    /// kill in between leaves a disk without a pair, which the first open for writing makes.
    pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
        if options.parent.is_some() {
            return Err(DiskError::State(
                "a child is made by a checkpoint of its parent, not as a new disk".to_owned(),
            ));
        }
        Vhdx::create(path, options)?;
        create_pair(path, 1).inspect_err(|_| undo_create(path)).map(|_| ())
    }
}

/// Makes the pair of a file that was just created.
pub(super) fn create_pair(path: &Path, epoch: u32) -> Result<Properties> {
    let properties = Vhdx::open(path, Access::ReadOnly)?.properties();
    let identity = DiskIdentity {
        lineage: properties.disk_id,
        size: properties.geometry.size,
        data_write_guid: properties.data_write_guid,
    };
    Tracker::create(path, &identity, epoch)?;
    Ok(properties)
}

/// Removes a file that this call created and that cannot be used; the error that led here counts.
pub(super) fn undo_create(path: &Path) {
    if let Err(error) = delete_disk_files(path) {
        tracing::warn!(%error, "an unfinished disk file was left behind");
    }
}

/// Removes a disk file with its tracking pair, also what a kill has left of a pair in the making; files
/// that are not there are no error.
///
/// The disk file goes last: as long as it is there everyone sees that the deletion has not ended and
/// does it again, while a pair alone would be left behind for ever. A kill in between leaves a disk
/// without tracking, which costs a full read if the disk should be used after all, and no data.
pub fn delete_disk_files(path: &Path) -> Result<()> {
    let end = Instant::now() + LAST_REQUESTS;
    // Damaged files can be deleted too.
    while let Err(busy @ DiskError::Busy { .. }) = Vhdx::open(path, Access::ReadOnly) {
        if Instant::now() >= end {
            return Err(busy);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let (rct, mrt) = pair_paths(path);
    let unfinished = [unfinished_path(&mrt), unfinished_path(&rct)];
    for file in unfinished.iter().chain([&mrt, &rct, &pending_path(path)]) {
        remove(file)?;
    }
    sync_folder(path)?;
    remove(path)?;
    sync_folder(path)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(DiskError::io("delete", path, e)),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    fs::sync_folder_of(path).map_err(|e| DiskError::io("sync the folder of", path, e))
}
