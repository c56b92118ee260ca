//! Where a VHDX file's bytes live: the operating system's file, or a recorder in crash tests.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::Access;
use crate::error::{DiskError, Result};
use crate::fs::{self, DiskFile, How};

/// Positional file I/O. Writes may reach the disk in any order until `sync` returns.
pub(crate) trait Storage: Send + Sync {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes all completed writes, and the length, durable.
    fn sync(&self) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes the range read as zeros and frees its space where the file system can.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves space for the range, so that later writes to it cannot fail for lack of it.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Changes the lock; false if another process is in the way.
    fn lock(&self, access: Access) -> io::Result<bool>;
}

impl Storage for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self, flags, offset, len) {
            Ok(()) => Ok(()),
            Err(e) if unsupported(e) => write_zeros(self, offset, len),
            Err(e) => Err(e.into()),
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(self, FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(()),
            Err(e) if unsupported(e) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn lock(&self, access: Access) -> io::Result<bool> {
        let locked = match access {
            Access::ReadOnly => self.try_lock_shared(),
            Access::ReadWrite => self.try_lock(),
        };
        match locked {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
}

/// Whether a file system or device does not know an operation, so that a slower way must do.
pub(crate) fn unsupported(e: rustix::io::Errno) -> bool {
    matches!(e, rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL)
}

/// Writes zeros over a range, in pieces.
pub(crate) fn write_zeros(storage: &dyn Storage, offset: u64, len: u64) -> io::Result<()> {
    const PIECE: usize = 1 << 20;
    let zeros = vec![0; PIECE.min(len as usize)];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(zeros.len() as u64);
        storage.write_all_at(&zeros[..n as usize], offset + done)?;
        done += n;
    }
    Ok(())
}

/// Opens a file under its lock. The lock belongs to this open file, not to the process, and goes with
/// it however the process ends.
pub(crate) fn open(path: &Path, access: Access) -> Result<DiskFile> {
    let write = access == Access::ReadWrite;
    let how = How { write, create: None, flags: OFlags::NONBLOCK.bits() };
    let file = fs::open(path, how).map_err(|e| DiskError::io("open", path, e))?;
    if !fs::is_regular(&file).map_err(|e| DiskError::io("examine", path, e))? {
        return Err(DiskError::corrupt(path, "not a regular file"));
    }
    lock(path, &file, access)?;
    Ok(file)
}

/// Opens whatever lies at `path`; a pipe does not block.
pub(crate) fn open_any(path: &Path, access: Access, flags: u32) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(access == Access::ReadWrite)
        .custom_flags((OFlags::NONBLOCK.bits() | flags) as i32)
        .open(path)
        .map_err(|e| DiskError::io("open", path, e))
}

/// Takes the lock that `access` needs.
pub(crate) fn lock(path: &Path, file: &dyn Storage, access: Access) -> Result<()> {
    match file.lock(access) {
        Ok(true) => Ok(()),
        Ok(false) => Err(DiskError::Busy { path: path.to_owned() }),
        Err(e) => Err(DiskError::io("lock", path, e)),
    }
}

/// Makes the creation, renaming or removal of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    fs::sync_folder_of(path).map_err(|e| DiskError::io("sync the folder of", path, e))
}
