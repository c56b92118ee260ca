//! Raw image files and block devices as disks.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom as Whence, fallocate, seek};
use rustix::io::Errno;

use crate::block::{Block, Extent, ExtentKind, Geometry};
use crate::error::{DiskError, Result};
use crate::vhdx::Access;
use crate::vhdx::storage::{lock, open_any, sync_parent, unsupported, write_zeros};

const SECTOR: u64 = 512;
/// The kernel's positions are signed.
const MAX_LEN: u64 = i64::MAX as u64 / SECTOR * SECTOR;

/// A raw image: byte 0 of the file is byte 0 of the disk. A file that ends inside a sector counts to
/// that sector's end, the missing bytes read as zeros.
#[derive(Debug)]
pub struct RawFile {
    path: PathBuf,
    file: File,
    access: Access,
    /// Bytes that were there when the file was opened: a read that ends before them must fail.
    len: u64,
    size: u64,
}

impl RawFile {
    /// Opens an image file or a block device, exclusive for writing, shared for reading. A device that
    /// is mounted or otherwise taken is busy for writing.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let device = std::fs::metadata(path)
            .map_err(|e| DiskError::io("examine", path, e))?
            .file_type()
            .is_block_device();
        let claim = device && access == Access::ReadWrite;
        let flags = if claim { OFlags::EXCL.bits() } else { 0 };
        let file = open_any(path, access, flags).map_err(|e| match e.os_error() {
            Some(code) if Errno::from_raw_os_error(code) == Errno::BUSY => {
                DiskError::Busy { path: path.to_owned() }
            }
            _ => e,
        })?;
        let kind = file.metadata().map_err(|e| DiskError::io("examine", path, e))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Unsupported {
                path: path.to_owned(),
                what: "neither a file nor a block device".to_owned(),
            });
        }
        lock(path, &file, access)?;
        // A device's metadata has no length.
        let len = (&file).seek(SeekFrom::End(0)).map_err(|e| DiskError::io("examine", path, e))?;
        Self::new(path, file, access, len)
    }

    /// Creates a sparse image of `size` bytes that reads as zeros, and opens it for writing; its name
    /// is durable when this returns. Fails if `path` exists.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|e| DiskError::io("create", path, e))?;
        let made = lock(path, &file, Access::ReadWrite)
            .and_then(|()| {
                file.set_len(size)
                    .and_then(|()| file.sync_all())
                    .map_err(|e| DiskError::io("create", path, e))
            })
            .and_then(|()| sync_parent(path))
            .and_then(|()| Self::new(path, file, Access::ReadWrite, size));
        made.inspect_err(|_| {
            // Nothing refers to it yet.
            let _ = std::fs::remove_file(path);
        })
    }

    fn new(path: &Path, file: File, access: Access, len: u64) -> Result<Self> {
        if len == 0 || len > MAX_LEN {
            return Err(DiskError::Unsupported {
                path: path.to_owned(),
                what: format!("a disk of {len} bytes"),
            });
        }
        let size = len.next_multiple_of(SECTOR);
        Ok(Self { path: path.to_owned(), file, access, len, size })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn io(&self, op: &'static str) -> impl Fn(io::Error) -> DiskError + '_ {
        move |e| DiskError::io(op, &self.path, e)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        if !inside || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(DiskError::OutOfRange { offset, len });
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(DiskError::ReadOnly { path: self.path.clone() }),
        }
    }

    /// Zeros a range with the file system's help, or by writing.
    fn zero(&self, offset: u64, len: u64, flags: FallocateFlags) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        match fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(()),
            Err(e) if unsupported(e) => {
                write_zeros(&self.file, offset, len).map_err(self.io("write"))
            }
            Err(e) => Err(self.io("write zeros to")(e.into())),
        }
    }

    /// Where data, or a hole, begins at or after a position; the file's end if nowhere.
    fn seek(&self, whence: Whence) -> Result<Option<u64>> {
        match seek(&self.file, whence) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(self.io("examine")(e.into())),
        }
    }

    /// The first run of data at or after `at`, widened to sectors. `None`: only a hole follows.
    fn next_data(&self, at: u64) -> Result<Option<(u64, u64)>> {
        let start = match self.seek(Whence::Data(at)) {
            Ok(Some(start)) => start / SECTOR * SECTOR,
            Ok(None) => return Ok(None),
            // Devices and some file systems do not say.
            Err(e) if e.os_error().is_some_and(|c| unsupported(Errno::from_raw_os_error(c))) => {
                return Ok(Some((at, self.size)));
            }
            Err(e) => return Err(e),
        };
        // Gone between the two questions: a hole was punched. Claiming data is never wrong.
        let end = self.seek(Whence::Hole(start))?.unwrap_or(self.size);
        let end = end.next_multiple_of(SECTOR).max(start + SECTOR);
        Ok(Some((start.max(at), end)))
    }
}

impl Block for RawFile {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size, logical_sector: SECTOR as u32, physical_sector: 4096 }
    }

    fn read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            match FileExt::read_at(&self.file, &mut buf[done..], offset + done as u64) {
                Ok(0) if offset + done as u64 >= self.len => {
                    buf[done..].fill(0);
                    break;
                }
                // Somebody cut the file: zeros would be silently wrong data.
                Ok(0) => return Err(self.io("read")(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.io("read")(e)),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, buf.len() as u64)?;
        self.file.write_all_at(buf, offset).map_err(self.io("write"))
    }

    fn flush(&self) -> Result<()> {
        self.check_writable()?;
        self.file.sync_data().map_err(self.io("sync"))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.check_writable()?;
        self.check_range(offset, len)?;
        let flags = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        self.zero(offset, len, flags)
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check_range(offset, len)?;
        // Somebody cut the file: what is gone must not pass for a hole.
        if (&self.file).seek(SeekFrom::End(0)).map_err(self.io("examine"))? < self.len {
            return Err(self.io("examine")(io::ErrorKind::UnexpectedEof.into()));
        }
        let end = offset + len;
        let mut found: Vec<Extent> = Vec::new();
        let mut push = |from: u64, to: u64, kind| match found.last_mut() {
            _ if from >= to => {}
            Some(last) if last.kind == kind => last.len += to - from,
            _ => found.push(Extent { offset: from, len: to - from, kind }),
        };
        let mut at = offset;
        while at < end {
            let (start, stop) = self.next_data(at)?.unwrap_or((end, end));
            push(at, start.min(end), ExtentKind::Hole);
            push(start.min(end), stop.min(end), ExtentKind::Data);
            at = stop;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
