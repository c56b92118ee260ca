//! Creating a file.

use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

use super::bat::Shape;
use super::layout::{
    FILE_SIGNATURE, HEADER_OFFSETS, Header, MIB, REGION_TABLE_OFFSETS, Region, Regions, put,
};
use super::metadata::Metadata;
use super::storage::{Storage, sync_parent};
use super::{CreateOptions, Kind, ParentLink, ParentLocator};
use crate::block::Geometry;
use crate::error::{DiskError, Result};
use crate::fs::{self, How};

const LOG: Region = Region { offset: MIB, len: 4 * MIB };
const METADATA: Region = Region { offset: 5 * MIB, len: MIB };
const BAT_OFFSET: u64 = 6 * MIB;

/// Creates a file. The headers are written last: a file that a kill left half made has none and is
/// refused by every reader.
pub(crate) fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let metadata = metadata(path, options)?;
    let how = How { write: true, create: Some(0o666), flags: 0 };
    let file = fs::open(path, how).map_err(|e| DiskError::io("create", path, e))?;
    let made = write(path, &file, &metadata);
    if made.is_err() {
        // Nothing refers to it yet.
        let _ = fs::remove(path);
    }
    made?;
    sync_parent(path)
}

/// Creates in empty storage; `path` is for messages and the parent locator.
#[cfg(test)]
pub(crate) fn create_in(path: &Path, storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    write(path, storage, &metadata(path, options)?)
}

fn metadata(path: &Path, options: &CreateOptions) -> Result<Metadata> {
    let metadata = Metadata {
        geometry: Geometry {
            size: options.size,
            logical_sector: options.logical_sector,
            physical_sector: options.physical_sector,
        },
        block_size: options.block_size,
        kind: match (&options.parent, options.fixed) {
            (Some(_), _) => Kind::Differencing,
            (None, true) => Kind::Fixed,
            (None, false) => Kind::Dynamic,
        },
        disk_id: options.disk_id.unwrap_or_else(Uuid::new_v4),
        parent: options.parent.as_ref().map(|p| locator(path, p)).transpose()?,
    };
    metadata
        .validate()
        .map_err(|what| DiskError::State(format!("cannot create {}: {what}", path.display())))?;
    Ok(metadata)
}

/// The locator that all known readers understand: relative for those that follow the specification,
/// absolute for those that take only its last component. A parent in another folder is named from the
/// child's folder; only [`crate::chain::Chain::open_among`] looks for it there.
pub(crate) fn locator(child: &Path, parent: &ParentLink) -> Result<ParentLocator> {
    let unusable = |why: &str| {
        DiskError::State(format!(
            "{} cannot be recorded as parent of {}: {why}",
            parent.path.display(),
            child.display()
        ))
    };
    let name = parent.path.file_name().and_then(|n| n.to_str());
    let name = name.ok_or_else(|| unusable("its name is not Unicode"))?;
    if name.contains(['\\', '\0']) {
        return Err(unusable("its name has a backslash in it"));
    }
    let (relative, absolute) = if child.parent() == parent.path.parent() {
        (format!(".\\{name}"), format!("\\\\?\\C:\\{name}"))
    } else {
        let (from, to) = (folder_of(child)?, folder_of(&parent.path)?);
        if from == to {
            (format!(".\\{name}"), format!("\\\\?\\C:\\{name}"))
        } else {
            let path =
                windows(&to.join(name)).ok_or_else(|| unusable("its path is not Unicode"))?;
            let relative = windows(&relative(&from, &to).join(name));
            let relative = relative.ok_or_else(|| unusable("its path is not Unicode"))?;
            (format!(".\\{relative}"), format!("\\\\?\\C:{path}"))
        }
    };
    Ok(ParentLocator {
        linkage: parent.data_write_guid,
        linkage2: None,
        relative_path: Some(relative),
        volume_path: None,
        absolute_path: Some(absolute),
    })
}

/// The folder a file lies in, without links and dots.
fn folder_of(path: &Path) -> Result<PathBuf> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    folder.canonicalize().map_err(|e| DiskError::io("find folder", folder, e))
}

/// The way from one folder to another; both absolute.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(to.components().skip(shared)).collect()
}

/// A path with backslashes; `None` if it cannot be written so.
fn windows(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    (!text.contains('\\')).then(|| text.replace('/', "\\"))
}

fn write(path: &Path, storage: &dyn Storage, metadata: &Metadata) -> Result<()> {
    let failed = |e| DiskError::io("create", path, e);
    let bad = |what: String| DiskError::State(format!("cannot create {}: {what}", path.display()));
    let shape = Shape::new(metadata.geometry, metadata.block_size);
    let bat = Region { offset: BAT_OFFSET, len: (shape.entries() * 8).next_multiple_of(MIB) };
    let payload = bat.offset + bat.len;
    let blocks = if metadata.kind == Kind::Fixed { shape.blocks } else { 0 };
    storage.set_len(payload + blocks * shape.block_size).map_err(failed)?;
    // Log and metadata must never run out of space; payload may. A fixed disk takes all of it now.
    storage.reserve(0, payload + blocks * shape.block_size).map_err(failed)?;
    if blocks > 0 {
        let mut table = vec![0; bat.len as usize];
        for block in 0..blocks {
            let entry = (payload + block * shape.block_size) | 6;
            put(&mut table, 8 * shape.payload_index(block) as usize, &entry.to_le_bytes());
        }
        storage.write_all_at(&table, bat.offset).map_err(failed)?;
    }
    storage.write_all_at(&metadata.encode().map_err(bad)?, METADATA.offset).map_err(failed)?;
    let regions = Regions { bat, metadata: METADATA, unknown: Vec::new() }.encode();
    for at in REGION_TABLE_OFFSETS {
        storage.write_all_at(&regions, at).map_err(failed)?;
    }
    let mut identifier = vec![0; 520];
    put(&mut identifier, 0, FILE_SIGNATURE);
    let creator: Vec<u8> = "Tidemark".encode_utf16().flat_map(u16::to_le_bytes).collect();
    put(&mut identifier, 8, &creator);
    storage.write_all_at(&identifier, 0).map_err(failed)?;
    storage.sync().map_err(failed)?;
    let header = Header {
        sequence: 1,
        file_write_guid: Uuid::new_v4(),
        data_write_guid: Uuid::new_v4(),
        log_guid: Uuid::nil(),
        log_version: 0,
        version: 1,
        log_len: LOG.len as u32,
        log_offset: LOG.offset,
    };
    for (slot, at) in HEADER_OFFSETS.into_iter().enumerate() {
        let header = Header { sequence: header.sequence + slot as u64, ..header.clone() };
        storage.write_all_at(&header.encode(), at).map_err(failed)?;
    }
    storage.sync().map_err(failed)
}
