//! Copying and comparing whole disks, and writing a disk into a new image file.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use uuid::Uuid;

use crate::block::{Block, BlockRange, Extent, ExtentKind, Geometry};
use crate::error::{DiskError, Result};
use crate::raw::RawFile;
use crate::vhdx::storage::{sync_parent, unsupported};
use crate::vhdx::{Access, CreateOptions, Vhdx, default_block_size};

/// What one read fetches.
const BUFFER: u64 = 1 << 20;
/// Buffers on their way from the reader to the writer.
const READ_AHEAD: usize = 4;
/// A piece of zeros of this size is not written.
const PIECE: u64 = 64 << 10;
/// How much of a disk is asked for its extents at once.
const WINDOW: u64 = 64 << 20;

/// What kind of image to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes and nothing else, sparse.
    Raw,
    /// VHDX that grows as it is written.
    Dynamic,
    /// VHDX with all its space taken at once.
    Fixed,
}

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyProgress {
    /// Bytes of the disk that are done, holes included.
    pub done: u64,
    /// Size of the disk.
    pub total: u64,
}

/// Copies a whole disk into one that reads as zeros everywhere, and flushes it. Holes and pieces of
/// zeros are not written. Gives the bytes written.
///
/// # Errors
///
/// Also if the source is larger than the destination, or `cancel` becomes true: the destination then
/// holds a part.
pub fn copy(
    src: &dyn Block,
    dst: &dyn Block,
    progress: &(dyn Fn(CopyProgress) + Sync),
    cancel: &AtomicBool,
) -> Result<u64> {
    let (from, to) = (src.geometry().size, dst.geometry().size);
    if from > to {
        return Err(DiskError::State(format!(
            "the destination has {to} bytes, too few for a disk of {from}"
        )));
    }
    let written = std::thread::scope(|scope| {
        let (filled, incoming) = bounded(READ_AHEAD);
        let (recycle, empty) = bounded(READ_AHEAD + 2);
        // The reader ends when its channel is closed, whichever side fails.
        scope.spawn(move || {
            if let Err(e) = read_all(src, &filled, &empty, cancel) {
                let _ = filled.send(Err(e));
            }
        });
        write_all(dst, &incoming, &recycle, progress, cancel, from)
    })?;
    dst.flush()?;
    progress(CopyProgress { done: from, total: from });
    Ok(written)
}

/// A piece of the disk on its way.
struct Filled {
    offset: u64,
    data: Vec<u8>,
}

/// Reads all that may be data, in order.
fn read_all(
    src: &dyn Block,
    filled: &Sender<Result<Filled>>,
    empty: &Receiver<Vec<u8>>,
    cancel: &AtomicBool,
) -> Result<()> {
    let size = src.geometry().size;
    let mut at = 0;
    // The writer turns a cancel into an error.
    while at < size && !cancel.load(Ordering::Relaxed) {
        let len = WINDOW.min(size - at);
        let data_in_window = data_ranges(&src.extents(at, len)?, size);
        at += len;
        for range in data_in_window {
            for piece in pieces(range) {
                let mut data = empty.try_recv().unwrap_or_default();
                data.resize((piece.end - piece.start) as usize, 0);
                src.read_at(piece.start, &mut data)?;
                if filled.send(Ok(Filled { offset: piece.start, data })).is_err() {
                    // The writer has given up and says why itself.
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Ranges to be read, widened to whole pieces so that any destination's sectors fit, joined.
fn data_ranges(extents: &[Extent], size: u64) -> Vec<BlockRange> {
    let mut ranges: Vec<BlockRange> = Vec::new();
    for extent in extents.iter().filter(|e| e.kind == ExtentKind::Data) {
        let start = extent.offset / PIECE * PIECE;
        let end = (extent.offset + extent.len).next_multiple_of(PIECE).min(size);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// A range in buffers, cut where the offset is a multiple of a buffer.
fn pieces(range: BlockRange) -> impl Iterator<Item = BlockRange> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = ((start / BUFFER + 1) * BUFFER).min(range.end);
        (start < range.end).then_some(start..at)
    })
}

fn write_all(
    dst: &dyn Block,
    incoming: &Receiver<Result<Filled>>,
    recycle: &Sender<Vec<u8>>,
    progress: &(dyn Fn(CopyProgress) + Sync),
    cancel: &AtomicBool,
    total: u64,
) -> Result<u64> {
    let sector = u64::from(dst.geometry().logical_sector);
    let mut written = 0;
    for filled in incoming {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiskError::Cancelled);
        }
        let Filled { offset, mut data } = filled?;
        let end = offset + data.len() as u64;
        // Only the last sector of a disk can be cut; the destination has room for all of it.
        data.resize(data.len().next_multiple_of(sector as usize), 0);
        for run in nonzero_runs(&data) {
            written += run.len() as u64;
            dst.write_at(offset + run.start as u64, &data[run])?;
        }
        progress(CopyProgress { done: end, total });
        let _ = recycle.try_send(data);
    }
    // Holes do not come by here.
    if cancel.load(Ordering::Relaxed) { Err(DiskError::Cancelled) } else { Ok(written) }
}

/// The runs of pieces with something other than zeros in them.
fn nonzero_runs(data: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (index, piece) in data.chunks(PIECE as usize).enumerate() {
        if is_zero(piece) {
            continue;
        }
        let start = index * PIECE as usize;
        let end = start + piece.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|c| c.iter().fold(0, |all, b| all | b) == 0)
}

/// Writes a disk into a new image file at `dst`. The file gets its name when it is whole and durable;
/// on an error, or when `cancel` becomes true, nothing is left. `block_size` is for VHDX, a good one
/// when `None`.
pub fn convert(
    src: &dyn Block,
    dst: &Path,
    format: Format,
    block_size: Option<u32>,
    progress: &(dyn Fn(CopyProgress) + Sync),
    cancel: &AtomicBool,
) -> Result<()> {
    // Before the work; the rename below refuses a file that comes up meanwhile.
    if dst.symlink_metadata().is_ok() {
        return Err(exists(dst));
    }
    let temporary = temporary_name(dst)?;
    let made = write_image(src, &temporary, format, block_size, progress, cancel)
        .and_then(|()| publish(&temporary, dst));
    if made.is_err() {
        // A kill before this leaves the temporary file, which no one mistakes for an image.
        let _ = std::fs::remove_file(&temporary);
    }
    made
}

fn exists(path: &Path) -> DiskError {
    DiskError::io("create", path, std::io::ErrorKind::AlreadyExists.into())
}

/// A name beside `dst`: a rename does not cross file systems.
fn temporary_name(dst: &Path) -> Result<PathBuf> {
    if dst.file_name().is_none() {
        return Err(DiskError::io("create", dst, std::io::ErrorKind::InvalidInput.into()));
    }
    Ok(dst.with_file_name(format!(".tidemark-{}.part", Uuid::new_v4().simple())))
}

fn write_image(
    src: &dyn Block,
    path: &Path,
    format: Format,
    block_size: Option<u32>,
    progress: &(dyn Fn(CopyProgress) + Sync),
    cancel: &AtomicBool,
) -> Result<()> {
    let geometry = src.geometry();
    if format == Format::Raw {
        let image = RawFile::create(path, geometry.size)?;
        return copy(src, &image, progress, cancel).map(drop);
    }
    let options = CreateOptions {
        size: geometry.size,
        block_size: block_size.unwrap_or_else(|| default_block_size(geometry.size)),
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        fixed: format == Format::Fixed,
        disk_id: None,
        parent: None,
    };
    Vhdx::create(path, &options)?;
    let image = Standalone(Vhdx::open(path, Access::ReadWrite)?);
    // The format wants it before the first change of what the disk reads as.
    image.0.set_data_write_guid(Uuid::new_v4())?;
    copy(src, &image, progress, cancel)?;
    image.0.make_clean()
}

/// Gives the whole file its name without replacing another. Killed before, the temporary file is left;
/// after, the image is there.
fn publish(temporary: &Path, dst: &Path) -> Result<()> {
    match renameat_with(CWD, temporary, CWD, dst, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // File systems without it: a link does not replace either.
        Err(e) if unsupported(e) => {
            std::fs::hard_link(temporary, dst).map_err(|e| DiskError::io("create", dst, e))?;
            std::fs::remove_file(temporary).map_err(|e| DiskError::io("remove", temporary, e))?;
        }
        Err(e) => return Err(DiskError::io("create", dst, e.into())),
    }
    sync_parent(dst)
}

/// The offset of the first byte in which two disks differ. Disks of different sizes differ at the
/// shorter one's end at the latest.
pub fn compare(a: &dyn Block, b: &dyn Block) -> Result<Option<u64>> {
    let sizes = (a.geometry().size, b.geometry().size);
    let shared = sizes.0.min(sizes.1);
    let mut at = 0;
    while at < shared {
        let len = WINDOW.min(shared - at);
        let mut extents = a.extents(at, in_sectors(a, len))?;
        extents.extend(b.extents(at, in_sectors(b, len))?);
        extents.sort_by_key(|e| e.offset);
        for piece in data_ranges(&extents, shared).into_iter().flat_map(pieces) {
            let len = piece.end - piece.start;
            let (left, right) = (read(a, piece.start, len)?, read(b, piece.start, len)?);
            if left != right
                && let Some(i) = left.iter().zip(&right).position(|(l, r)| l != r)
            {
                return Ok(Some(piece.start + i as u64));
            }
        }
        at += len;
    }
    Ok((sizes.0 != sizes.1).then_some(shared))
}

/// A length as a disk's sectors have it: the other disk may end inside one of them.
fn in_sectors(disk: &dyn Block, len: u64) -> u64 {
    len.next_multiple_of(disk.geometry().logical_sector.into())
}

fn read(disk: &dyn Block, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut data = vec![0; in_sectors(disk, len) as usize];
    disk.read_at(offset, &mut data)?;
    data.truncate(len as usize);
    Ok(data)
}

/// One VHDX file without a parent as a disk.
struct Standalone(Vhdx);

impl Block for Standalone {
    fn geometry(&self) -> Geometry {
        self.0.properties().geometry
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        // Without a parent nothing is left to be read elsewhere.
        self.0.read_at(offset, buf).map(drop)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.0.write_at(offset, buf)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<()> {
        self.0.write_zeroes(offset, len)
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let kind = |p| match p {
            crate::vhdx::Presence::Absent => ExtentKind::Hole,
            crate::vhdx::Presence::Zero => ExtentKind::Zero,
            crate::vhdx::Presence::Data => ExtentKind::Data,
        };
        let found = self.0.presence(offset, len)?;
        Ok(found
            .into_iter()
            .map(|(r, p)| Extent { offset: r.start, len: r.end - r.start, kind: kind(p) })
            .collect())
    }
}

#[cfg(test)]
mod tests;
