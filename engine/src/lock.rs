//! Locks on files: held by an open file, gone with the process however it ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::error::{EngineError, Result};
use crate::process::ProcessId;

/// An exclusive lock; released when dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
}

impl FileLock {
    /// Takes the lock at `path`; `None` if another holds it.
    pub(crate) fn try_take(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(|e| EngineError::io("open", path, e))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(EngineError::io("lock", path, e)),
            }
            // The folder may have been renamed or removed between opening and locking: a lock on a
            // file that is no longer there excludes nobody.
            if is_at(&file, path) {
                return Ok(Some(Self { file }));
            }
            if !path.parent().is_some_and(Path::exists) {
                let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
                return Err(EngineError::io("lock", path, gone));
            }
        }
    }

    /// Takes the lock, waiting up to `timeout`; `None` if it stayed taken.
    pub(crate) fn take(path: &Path, timeout: Duration) -> Result<Option<Self>> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(lock) = Self::try_take(path)? {
                return Ok(Some(lock));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes into the file who holds it, for readers that must not touch the lock itself.
    pub(crate) fn sign(&mut self) {
        let text = ProcessId::own().map(|id| id.to_line()).unwrap_or_default();
        // Only a hint for people: failing to write it changes nothing.
        let _ = self.file.rewind();
        let _ = self.file.set_len(0);
        let _ = self.file.write_all(text.as_bytes());
    }

    /// The living process that signed the lock file at `path`, without touching the lock.
    pub(crate) fn holder(path: &Path) -> Option<ProcessId> {
        let mut text = String::new();
        File::open(path).ok()?.take(256).read_to_string(&mut text).ok()?;
        ProcessId::from_line(&text).filter(ProcessId::alive)
    }

    /// Removes the signature, so that nobody takes the living process for a holder.
    fn unsign(&mut self) {
        let _ = self.file.set_len(0);
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        self.unsign();
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_excludes_and_is_freed_by_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let mut lock = FileLock::try_take(&path).unwrap().unwrap();
        lock.sign();
        assert!(FileLock::try_take(&path).unwrap().is_none());
        assert_eq!(FileLock::holder(&path).unwrap().pid, std::process::id());
        drop(lock);
        assert!(FileLock::holder(&path).is_none());
        assert!(FileLock::take(&path, Duration::from_millis(50)).unwrap().is_some());
    }

    #[test]
    fn a_lock_in_a_removed_folder_is_not_a_lock() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("f");
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("l");
        let held = FileLock::try_take(&path).unwrap().unwrap();
        std::fs::rename(&folder, dir.path().join("g")).unwrap();
        assert!(FileLock::try_take(&path).is_err());
        drop(held);
    }
}
