//! Opening a file: headers, log replay, regions, metadata, block table.

use std::io;
use std::path::Path;

use uuid::Uuid;

use super::Access;
use super::bat::{Bat, Shape, Space};
use super::journal::Journal;
use super::layout::{
    FILE_SIGNATURE, HEADER_OFFSETS, HEADER_SIZE, Header, MAX_SIZE, MIB, REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE, Region, Regions, current_header,
};
use super::log::{self, ReplayPlan, Update};
use super::metadata::Metadata;
use super::pending_file::{Change, Found, Identity, PendingFile, Place, pending_path};
use super::storage::Storage;
use crate::error::{DiskError, Result};

/// A metadata region larger than this is not believed (2047 items of up to 1 MiB are possible, but no
/// known writer goes beyond 1 MiB in all).
const MAX_METADATA: u64 = 64 << 20;

/// Everything that an open finds.
pub(crate) struct Opened {
    pub(crate) journal: Journal,
    pub(crate) regions: Regions,
    pub(crate) metadata: Metadata,
    pub(crate) shape: Shape,
    pub(crate) bat: Bat,
    pub(crate) space: Space,
    pub(crate) file_len: u64,
    /// A read-only open's replay, applied to every metadata read.
    pub(crate) replay: Option<ReplayPlan>,
    /// What the pending file adds: entries are in `bat` already, sectors are not yet in any bitmap.
    pub(crate) changes: Vec<Change>,
}

/// Opens a file's structures; with write access the log is replayed into the file, once everything has
/// been found to be right: a refused file is not changed. `next` is the FileWriteGuid that a writer is
/// about to set.
pub(crate) fn open(
    path: &Path,
    storage: &dyn Storage,
    beside: Option<(&dyn Place, Identity)>,
    access: Access,
    next: Uuid,
) -> Result<Opened> {
    let bad = |what: String| DiskError::corrupt(path, what);
    let reader = Reader { path, storage, replay: None };
    let signature = reader.read(0, 8).map_err(|_| bad("too short for a VHDX file".to_owned()))?;
    if signature != FILE_SIGNATURE {
        return Err(bad("not a VHDX file (no signature)".to_owned()));
    }
    let headers =
        HEADER_OFFSETS.map(|at| reader.read(at, HEADER_SIZE).ok().and_then(|b| Header::parse(&b)));
    let [a, b] = headers;
    let (header, slot) = current_header(a, b).map_err(bad)?;
    header.validate().map_err(bad)?;
    let plan = find_replay(&reader, &header)?;
    let mut found = find_pending(path, beside, access, &header)?;
    let present = header.file_write_guid;
    let log = Region { offset: header.log_offset, len: u64::from(header.log_len) };
    let mut journal = Journal::new(path, header, slot);
    let reader = Reader { path, storage, replay: plan.as_ref() };
    let regions = read_regions(&reader)?;
    let metadata = read_metadata(&reader, &regions)?;
    let shape = Shape::new(metadata.geometry, metadata.block_size);
    let file_len = reader.len()?;
    let bat_len = (shape.entries() * 8).min(regions.bat.len);
    let mut bytes = reader.read(regions.bat.offset, bat_len as usize)?;
    let changes = found.as_mut().map(|f| std::mem::take(&mut f.changes)).unwrap_or_default();
    apply_entries(&changes, &mut bytes, &shape).map_err(|what| stale_pending(path, &what))?;
    let mut taken = vec![log, regions.bat, regions.metadata];
    taken.extend(regions.unknown.iter().filter(|r| r.len > 0));
    let parsed = Bat::parse(&bytes, &shape, metadata.kind, &taken, file_len);
    let (bat, space) = match changes.is_empty() {
        true => parsed.map_err(bad)?,
        false => parsed.map_err(|what| stale_pending(path, &what))?,
    };
    check_sectors(&changes, &bat, &shape).map_err(|what| stale_pending(path, &what))?;
    if let (Some(found), Access::ReadWrite) = (&mut found, access) {
        found
            .accept([present, next])
            .map_err(|e| DiskError::io("write the pending file of", path, e))?;
    }
    let replay = match (plan, access) {
        (Some(plan), Access::ReadWrite) => {
            replay_into(path, storage, &mut journal, &plan, next)?;
            None
        }
        (plan, _) => plan,
    };
    let reader = Reader { path, storage, replay: replay.as_ref() };
    let file_len = reader.len()?;
    Ok(Opened { journal, regions, metadata, shape, bat, space, file_len, replay, changes })
}

/// What a killed writer left in the pending file.
fn find_pending(
    path: &Path,
    beside: Option<(&dyn Place, Identity)>,
    access: Access,
    header: &Header,
) -> Result<Option<Found>> {
    let Some((place, identity)) = beside else { return Ok(None) };
    let writable = access == Access::ReadWrite;
    PendingFile::find(place, identity, header.file_write_guid, writable)
        .map_err(|e| DiskError::io("read the pending file of", path, e))
}

fn stale_pending(path: &Path, what: &str) -> DiskError {
    let file = pending_path(path);
    DiskError::corrupt(
        path,
        format!(
            "with {} applied: {what}; remove that file to open the disk as after a power cut",
            file.display()
        ),
    )
}

type Checked = std::result::Result<(), String>;

/// Puts the table entries in their places; they are checked with the rest of the table.
fn apply_entries(changes: &[Change], table: &mut [u8], shape: &Shape) -> Checked {
    for change in changes {
        if let Change::Entry { index, value } = *change {
            let at = usize::try_from(index).ok().filter(|_| index < shape.entries());
            let at = at.and_then(|i| i.checked_mul(8)).filter(|at| at + 8 <= table.len());
            let at = at.ok_or_else(|| format!("there is no block table entry {index}"))?;
            table[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    Ok(())
}

/// Changed sectors must lie in one block of the disk each, in a chunk that has a bitmap.
fn check_sectors(changes: &[Change], bat: &Bat, shape: &Shape) -> Checked {
    let per_block = shape.sectors_per_block();
    for change in changes {
        if let Change::Sectors { first, count, .. } = *change {
            let block = first / per_block;
            let inside = count >= 1 && count <= per_block - first % per_block;
            if !inside || block >= shape.blocks || bat.bitmap(shape, block).is_none() {
                return Err(format!("there are no bits for {count} sectors from {first} on"));
            }
        }
    }
    Ok(())
}

/// Reads metadata as it is after the replay.
pub(crate) struct Reader<'a> {
    pub(crate) path: &'a Path,
    pub(crate) storage: &'a dyn Storage,
    pub(crate) replay: Option<&'a ReplayPlan>,
}

impl Reader<'_> {
    /// The file's length after the replay.
    pub(crate) fn len(&self) -> Result<u64> {
        let len = self.storage.len().map_err(|e| DiskError::io("examine", self.path, e))?;
        Ok(self.replay.map_or(len, |r| r.file_len.max(len)))
    }

    /// Reads a range that must lie in the file.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        if offset.checked_add(len as u64).is_none_or(|end| self.len().is_ok_and(|l| end > l)) {
            return Err(DiskError::corrupt(
                self.path,
                format!("the file ends before {offset} + {len}"),
            ));
        }
        let mut buf = vec![0; len];
        read_zero_filled(self.storage, &mut buf, offset)
            .map_err(|e| DiskError::io("read", self.path, e))?;
        if let Some(replay) = self.replay {
            replay.apply(offset, &mut buf);
        }
        Ok(buf)
    }
}

/// Reads; what lies beyond the file's end is zero.
pub(crate) fn read_zero_filled(
    storage: &dyn Storage,
    buf: &mut [u8],
    offset: u64,
) -> io::Result<()> {
    let len = storage.len()?;
    let there = len.saturating_sub(offset).min(buf.len() as u64) as usize;
    let (head, tail) = buf.split_at_mut(there);
    tail.fill(0);
    if head.is_empty() { Ok(()) } else { storage.read_exact_at(head, offset) }
}

/// What the log wants replayed, if it is not empty.
fn find_replay(reader: &Reader<'_>, header: &Header) -> Result<Option<ReplayPlan>> {
    if header.log_guid.is_nil() {
        return Ok(None);
    }
    let bad = |what: String| DiskError::corrupt(reader.path, what);
    let bytes = reader.read(header.log_offset, header.log_len as usize)?;
    let sequence = log::active_sequence(&bytes, header.log_guid).map_err(bad)?;
    let plan = log::replay_plan(&sequence);
    if reader.len()? < plan.flushed_file_offset {
        return Err(bad("the file is truncated: shorter than its log says".to_owned()));
    }
    if plan.touches(0, REGION_TABLE_OFFSETS[0])
        || plan.touches(header.log_offset, header.log_len.into())
    {
        return Err(bad("the log changes headers or itself".to_owned()));
    }
    // Twice the largest disk leaves room for any block table and bitmaps.
    if plan.file_len > 2 * MAX_SIZE {
        return Err(bad(format!("the log asks for a file of {} bytes", plan.file_len)));
    }
    Ok(Some(plan))
}

/// Replays into the file. Killed anywhere in it, the log is still named by the header and the next open
/// does it again.
fn replay_into(
    path: &Path,
    storage: &dyn Storage,
    journal: &mut Journal,
    plan: &ReplayPlan,
    next: Uuid,
) -> Result<()> {
    let failed = |e| DiskError::io("replay the log of", path, e);
    journal.set_header(storage, |h| h.file_write_guid = next)?;
    if storage.len().map_err(failed)? < plan.file_len {
        storage.set_len(plan.file_len.next_multiple_of(MIB)).map_err(failed)?;
    }
    for update in &plan.updates {
        match update {
            Update::Data { offset, page } => storage.write_all_at(&page[..], *offset),
            Update::Zero { offset, len } => storage.punch(*offset, *len),
        }
        .map_err(failed)?;
    }
    storage.sync().map_err(failed)?;
    journal.close_log(storage)
}

fn read_regions(reader: &Reader<'_>) -> Result<Regions> {
    let bad = |what: String| DiskError::corrupt(reader.path, what);
    for at in REGION_TABLE_OFFSETS {
        if let Ok(bytes) = reader.read(at, REGION_TABLE_SIZE)
            && let Some(regions) = Regions::parse(&bytes).map_err(bad)?
        {
            return Ok(regions);
        }
    }
    Err(bad("both region tables are damaged".to_owned()))
}

fn read_metadata(reader: &Reader<'_>, regions: &Regions) -> Result<Metadata> {
    let bad = |what: String| DiskError::corrupt(reader.path, what);
    let len = regions.metadata.len;
    if len > MAX_METADATA {
        return Err(bad(format!("metadata region of {len} bytes")));
    }
    Metadata::parse(&reader.read(regions.metadata.offset, len as usize)?).map_err(bad)
}
