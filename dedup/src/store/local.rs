//! A folder as an object store. An object is written under a temporary name, synced, and renamed to
//! its key without replacing anything; then the folder is synced. So an object is there whole and
//! durable, or not at all, whenever the machine stops.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{ObjectInfo, Store, check_key};
use crate::error::{RepoError, Result};
use crate::id::{hex, random};

/// Folder of half-written objects; never listed.
const TEMP: &str = "tmp";
/// A half-written object of this age belongs to no living writer.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// A folder.
#[derive(Clone)]
pub(super) struct LocalStore {
    root: Arc<PathBuf>,
    /// There was no folder when the store was opened; the first object makes it. Without this, a
    /// folder that vanishes (a disk unplugged) would look like an empty store.
    unborn: Arc<AtomicBool>,
    /// Folders below the root that are durable.
    durable: Arc<Mutex<HashSet<PathBuf>>>,
}

impl LocalStore {
    /// Opens the folder. If only the folder above exists, the first object will make it; if that does
    /// not exist either, a disk is perhaps not mounted.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let root = std::path::absolute(path)
            .map_err(|e| RepoError::Invalid(format!("{}: {e}", path.display())))?;
        let unborn = Arc::new(AtomicBool::new(!root.exists()));
        let store = Self { root: Arc::new(root), unborn, durable: Arc::default() };
        let nearest = if store.is_unborn() { store.root.parent() } else { Some(&**store.root) };
        let meta = fs::metadata(nearest.unwrap_or(Path::new("/")))
            .map_err(|e| store.error("open", "", &e))?;
        if !meta.is_dir() {
            return Err(RepoError::Invalid(format!("{} is not a folder", store.root.display())));
        }
        store.remove_stale();
        Ok(store)
    }

    fn is_unborn(&self) -> bool {
        self.unborn.load(Ordering::Relaxed)
    }

    fn remove_stale(&self) {
        let Ok(entries) = fs::read_dir(self.root.join(TEMP)) else { return };
        for entry in entries.flatten() {
            let age = entry
                .metadata()
                .and_then(|m| m.modified())
                .ok()
                .and_then(|at| SystemTime::now().duration_since(at).ok());
            if age.is_some_and(|age| age > STALE) {
                // Garbage; whoever cannot remove it can still work.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        check_key(key)?;
        Ok(self.root.join(key))
    }

    fn error(&self, op: &'static str, key: &str, e: &std::io::Error) -> RepoError {
        let (store, detail) = (self.describe(), e.to_string());
        match e.kind() {
            ErrorKind::NotFound if key.is_empty() || !(self.is_unborn() || self.root.is_dir()) => {
                RepoError::NoSuchStore { store, detail }
            }
            ErrorKind::NotFound => RepoError::Missing { store, key: key.to_owned() },
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                RepoError::AccessDenied { store, detail }
            }
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                RepoError::NoSpace { store, detail }
            }
            _ => RepoError::Store { store, op, key: key.to_owned(), detail },
        }
    }

    fn create_now(&self, key: &str, parts: &[Bytes]) -> Result<()> {
        let path = self.path(key)?;
        let fail = |e: std::io::Error| self.error("create", key, &e);
        let parent = path.parent().unwrap_or(&self.root);
        if self.is_unborn() {
            self.give_birth().map_err(fail)?;
        }
        self.make_dirs(parent).map_err(fail)?;
        let temp = self.root.join(TEMP);
        self.make_dirs(&temp).map_err(fail)?;
        let temp = TempFile(temp.join(hex(&random::<16>()?)));
        let mut file =
            OpenOptions::new().write(true).create_new(true).open(&temp.0).map_err(fail)?;
        for part in parts {
            file.write_all(part).map_err(fail)?;
        }
        // Killed before this line: a temporary file that no one lists. The data must be durable
        // before the name is, or a power cut could leave a named, empty object.
        file.sync_all().map_err(fail)?;
        match rename_new(&temp.0, &path) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                if !same_content(&path, parts).map_err(fail)? {
                    let (store, key) = (self.describe(), key.to_owned());
                    return Err(RepoError::AlreadyExists { store, key });
                }
            }
            Err(e) => return Err(fail(e)),
        }
        // Killed before this line: the object may or may not be there after a power cut; nothing that
        // refers to it has been written yet.
        sync_dir(parent).map_err(fail)
    }

    fn give_birth(&self) -> std::io::Result<()> {
        match fs::create_dir(&*self.root) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        sync_dir(self.root.parent().unwrap_or(Path::new("/")))?;
        self.unborn.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Makes folders below the root, each durable in the one above.
    fn make_dirs(&self, dir: &Path) -> std::io::Result<()> {
        // A folder that another process has just made may not be durable yet: each process sees to
        // that for itself, once.
        if dir == *self.root || (self.durable.lock().contains(dir) && dir.is_dir()) {
            return Ok(());
        }
        let parent = dir.parent().unwrap_or(&self.root);
        self.make_dirs(parent)?;
        match fs::create_dir(dir) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        sync_dir(parent)?;
        self.durable.lock().insert(dir.to_owned());
        Ok(())
    }

    fn read_now(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = self.path(key)?;
        let fail = |e: std::io::Error| self.error("read", key, &e);
        let file = File::open(&path).map_err(fail)?;
        let len = file.metadata().map_err(fail)?.len();
        let range = range.unwrap_or(0..len);
        // Bounded by what is there, whatever was asked for.
        let end = range.end.min(len);
        let mut data = vec![0; end.saturating_sub(range.start) as usize];
        file.read_exact_at(&mut data, range.start).map_err(fail)?;
        Ok(data.into())
    }

    fn list_now(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let mut found = Vec::new();
        let dir = prefix.rsplit_once('/').map_or("", |(dir, _)| dir);
        if !dir.is_empty() {
            check_key(dir)?;
        }
        if !self.root.is_dir() && !self.is_unborn() {
            let e = std::io::Error::from(ErrorKind::NotFound);
            return Err(self.error("list", "", &e));
        }
        self.walk(dir, prefix, &mut found)
            .map_err(|e| self.error("list", if prefix.is_empty() { "." } else { prefix }, &e))?;
        found.sort_unstable_by(|a: &ObjectInfo, b| a.key.cmp(&b.key));
        Ok(found)
    }

    fn walk(&self, dir: &str, prefix: &str, found: &mut Vec<ObjectInfo>) -> std::io::Result<()> {
        let entries = match fs::read_dir(self.root.join(dir)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let key = if dir.is_empty() { name } else { format!("{dir}/{name}") };
            if key == TEMP || check_key(&key).is_err() {
                continue;
            }
            let kind = entry.file_type()?;
            if kind.is_dir() && (key.starts_with(prefix) || prefix.starts_with(&key)) {
                self.walk(&key, prefix, found)?;
            } else if kind.is_file() && key.starts_with(prefix) {
                match entry.metadata() {
                    Ok(meta) => found.push(ObjectInfo { key, size: meta.len() }),
                    // Deleted while listing.
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.clone();
        crate::pool::joined(crate::pool::runtime().spawn_blocking(move || work(&store)).await)
    }
}

#[async_trait]
impl Store for LocalStore {
    fn describe(&self) -> String {
        format!("file://{}", self.root.display())
    }

    async fn create(&self, key: &str, data: Bytes) -> Result<()> {
        self.create_parts(key, vec![data]).await
    }

    async fn create_parts(&self, key: &str, parts: Vec<Bytes>) -> Result<()> {
        let key = key.to_owned();
        self.blocking(move |store| store.create_now(&key, &parts)).await
    }

    async fn get(&self, key: &str) -> Result<Bytes> {
        let key = key.to_owned();
        self.blocking(move |store| store.read_now(&key, None)).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let key = key.to_owned();
        self.blocking(move |store| store.read_now(&key, Some(range))).await
    }

    async fn size(&self, key: &str) -> Result<u64> {
        let key = key.to_owned();
        self.blocking(move |store| {
            let meta = fs::metadata(store.path(&key)?);
            meta.map(|m| m.len()).map_err(|e| store.error("look at", &key, &e))
        })
        .await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let prefix = prefix.to_owned();
        self.blocking(move |store| store.list_now(&prefix)).await
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let key = key.to_owned();
        self.blocking(move |store| {
            let path = store.path(&key)?;
            match fs::remove_file(&path) {
                Ok(()) => sync_dir(path.parent().unwrap_or(&store.root)),
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                Err(e) => Err(e),
            }
            .map_err(|e| store.error("delete", &key, &e))
        })
        .await
    }
}

/// Removes itself; after a successful rename there is nothing left to remove.
struct TempFile(PathBuf);

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Renames without replacing. File systems that cannot do that in one step (NFS, some FUSE) get a
/// hard link, which fails just so when the name is taken.
fn rename_new(from: &Path, to: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => fs::hard_link(from, to),
        result => result.map_err(Into::into),
    }
}

fn same_content(path: &Path, parts: &[Bytes]) -> std::io::Result<bool> {
    let mut file = File::open(path)?;
    let len: u64 = parts.iter().map(|p| p.len() as u64).sum();
    if file.metadata()?.len() != len {
        return Ok(false);
    }
    let mut buffer = vec![0; 64 * 1024];
    for piece in parts.iter().flat_map(|part| part.chunks(64 * 1024)) {
        let there = &mut buffer[..piece.len()];
        file.read_exact(there)?;
        if there != piece {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::block_on;

    fn store() -> (tempfile::TempDir, LocalStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(&dir.path().join("repo")).unwrap();
        (dir, store)
    }

    #[test]
    fn an_object_is_created_once_and_never_replaced() {
        let (_dir, store) = store();
        block_on(store.create("points/a/1", Bytes::from_static(b"one"))).unwrap();
        block_on(store.create("points/a/1", Bytes::from_static(b"one"))).unwrap();
        let again = block_on(store.create("points/a/1", Bytes::from_static(b"two")));
        assert!(matches!(again, Err(RepoError::AlreadyExists { .. })), "{again:?}");
        assert_eq!(block_on(store.get("points/a/1")).unwrap(), "one");
        assert!(fs::read_dir(store.root.join(TEMP)).unwrap().next().is_none());
    }

    #[test]
    fn listing_gives_what_begins_with_the_prefix_in_order() {
        let (_dir, store) = store();
        for key in ["packs/ab/abc", "packs/aa/aab", "points/g/2", "points/g/1", "config"] {
            block_on(store.create(key, Bytes::from(key.to_owned()))).unwrap();
        }
        let list = |prefix: &str| -> Vec<String> {
            block_on(store.list(prefix)).unwrap().into_iter().map(|o| o.key).collect()
        };
        assert_eq!(list("packs/"), ["packs/aa/aab", "packs/ab/abc"]);
        assert_eq!(list("points/g/"), ["points/g/1", "points/g/2"]);
        assert_eq!(list("points/h/"), [""; 0]);
        assert_eq!(list("").len(), 5);
        assert_eq!(list("conf"), ["config"]);
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let (dir, store) = store();
        let missing = block_on(store.get("packs/00/00"));
        assert!(matches!(missing, Err(RepoError::Missing { .. })), "{missing:?}");
        for key in ["../x", "/etc/passwd", "a//b", "a/../b", "", "tmp/\0"] {
            let bad = block_on(store.get(key));
            assert!(matches!(bad, Err(RepoError::Invalid(_))), "{key}: {bad:?}");
        }
        let unborn = dir.path().join("unborn");
        let unborn_store = LocalStore::open(&unborn).unwrap();
        assert_eq!(block_on(unborn_store.list("")).unwrap(), []);
        let missing = block_on(unborn_store.get("config"));
        assert!(matches!(missing, Err(RepoError::Missing { .. })), "{missing:?}");
        assert!(!unborn.exists(), "looking makes nothing");
        block_on(unborn_store.create("config", Bytes::from_static(b"x"))).unwrap();
        fs::remove_dir_all(&unborn).unwrap();
        let gone = block_on(unborn_store.list(""));
        assert!(matches!(gone, Err(RepoError::NoSuchStore { .. })), "{gone:?}");
        let gone = block_on(unborn_store.create("keys/x", Bytes::from_static(b"x")));
        assert!(matches!(gone, Err(RepoError::NoSuchStore { .. })), "{gone:?}");
        let nowhere = LocalStore::open(&dir.path().join("no/such"));
        assert!(matches!(nowhere, Err(RepoError::NoSuchStore { .. })));
        block_on(store.create("config", Bytes::from_static(b"x"))).unwrap();
        fs::remove_dir_all(&*store.root).unwrap();
        let gone = block_on(store.list("points/"));
        assert!(matches!(gone, Err(RepoError::NoSuchStore { .. })), "{gone:?}");
    }

    #[test]
    fn half_written_objects_are_removed_when_they_are_old() {
        let (_dir, store) = store();
        let temp = store.root.join(TEMP);
        fs::create_dir_all(&temp).unwrap();
        let (old, young) = (temp.join("old"), temp.join("young"));
        fs::write(&old, "x").unwrap();
        fs::write(&young, "x").unwrap();
        let past = SystemTime::now() - 2 * STALE;
        File::options().write(true).open(&old).unwrap().set_modified(past).unwrap();
        LocalStore::open(&store.root).unwrap();
        assert!(!old.exists());
        assert!(young.exists());
    }
}
