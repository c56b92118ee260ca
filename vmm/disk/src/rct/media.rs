//! The file operations that tracking needs, behind a trait so that a test can record their order
//! and replay every crash.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::io::{Errno, ReadWriteFlags};

use crate::error::{DiskError, Result};
use crate::fs::{self, How};
use crate::vhdx::storage::Storage;

/// One of the two files of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Rct,
    Mrt,
}

/// One open tracking file.
pub(crate) trait Media: Send + Sync {
    fn len(&self) -> io::Result<u64>;
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes; durable after the next [`Media::sync`], perhaps earlier, perhaps in part.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Writes, and returns when this write is durable; says nothing of earlier writes.
    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes every write that completed before the call durable.
    fn sync(&self) -> io::Result<()>;
}

/// Where a pair lives.
pub(super) trait Store {
    fn path(&self, which: Which) -> &Path;
    /// `None` where there is no such file.
    fn open(&self, which: Which, write: bool) -> io::Result<Option<Box<dyn Media>>>;
    /// Puts a new file in the place of whatever is there, at once and durably: `len` bytes, zeros
    /// but for `head` at offset 0.
    fn replace(&self, which: Which, len: u64, head: &[u8]) -> io::Result<()>;
}

/// A tracking file and its name, for errors.
pub(super) struct Handle {
    media: Box<dyn Media>,
    path: PathBuf,
}

impl Handle {
    pub(super) fn new(media: Box<dyn Media>, path: &Path) -> Self {
        Self { media, path: path.to_owned() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> io::Result<u64> {
        self.media.len()
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.media.read_exact_at(buf, offset)
    }

    pub(super) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.media.write_at(buf, offset).map_err(|e| DiskError::io("write", &self.path, e))
    }

    pub(super) fn write_durable(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.media.write_durable(buf, offset).map_err(|e| DiskError::io("write", &self.path, e))
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.media.sync().map_err(|e| DiskError::io("sync", &self.path, e))
    }
}

impl Media for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, buf, offset)
    }

    /// Syncs the written range alone: a seal inside a freeze must not wait for the thousands of
    /// map pages that a concurrent flush has put into the page cache.
    fn write_durable(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match rustix::io::pwritev2(self, &[IoSlice::new(buf)], offset, ReadWriteFlags::DSYNC) {
            Ok(n) if n == buf.len() => Ok(()),
            // A short write, or a file system without the flag: the plain way does the same.
            Ok(_) | Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::INTR) => {
                FileExt::write_all_at(self, buf, offset)?;
                self.sync_data()
            }
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The pair beside a disk file.
pub(super) struct FileStore {
    rct: PathBuf,
    mrt: PathBuf,
}

impl FileStore {
    pub(super) fn new(disk: &Path) -> Self {
        let (rct, mrt) = super::pair_paths(disk);
        Self { rct, mrt }
    }
}

impl Store for FileStore {
    fn path(&self, which: Which) -> &Path {
        match which {
            Which::Rct => &self.rct,
            Which::Mrt => &self.mrt,
        }
    }

    fn open(&self, which: Which, write: bool) -> io::Result<Option<Box<dyn Media>>> {
        // Neither a link out of the VM's folder is followed nor a FIFO waited for.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let how = How { write, create: None, flags: flags.bits() };
        match fs::open(self.path(which), how) {
            Ok(file) if fs::is_regular(&file)? => Ok(Some(Box::new(file))),
            // Something that is not a file of ours: as good as missing, and replaced like it.
            Ok(_) => Ok(None),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) if e.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn replace(&self, which: Which, len: u64, head: &[u8]) -> io::Result<()> {
        let path = self.path(which);
        let temporary = super::unfinished_path(path);
        match fs::remove(&temporary) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = fs::open(&temporary, How { write: true, create: Some(0o600), flags: 0 })?;
        // Length without content: the map stays sparse until it is touched.
        Storage::set_len(&file, len)?;
        Media::write_at(&file, head, 0)?;
        // Killed before the rename: the old file stands and the temporary one is removed by the next
        // attempt. Without the syncs a power cut could leave an empty file under the right name.
        Media::sync(&file)?;
        fs::rename(&temporary, path)?;
        fs::sync_folder_of(path)
    }
}
