//! A repository: creation, opening, listing of restore points.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use futures::StreamExt;
use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use crate::cache::{FrameCache, PageCache};
use crate::config::{self, Config};
use crate::error::{RepoError, Result};
use crate::fetch::Patience;
use crate::index::Index;
use crate::key::{KdfCost, Keys, Unwrapped, unwrap};
use crate::manifest;
use crate::object::damaged;
use crate::pool::block_on;
use crate::store::{ObjectInfo, Store};
use crate::{Compression, DiskReader, DiskRoot, Manifest, OpenOptions, Passphrase, PointWriter};

/// Requests in flight while many small objects are read.
pub(crate) const PARALLEL: usize = 16;
/// Larger configurations and key objects are refused unread.
const MAX_SMALL_OBJECT: u64 = 64 * 1024;
/// More key objects than this are refused: each costs a key derivation.
const MAX_KEYS: usize = 64;
/// Larger manifest objects are refused unread.
const MAX_MANIFEST_OBJECT: u64 = 80 << 20;

/// An open repository. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").field("store", &self.inner.name).finish_non_exhaustive()
    }
}

/// What all clones, readers and writers share.
pub(crate) struct Inner {
    pub(crate) store: Arc<dyn Store>,
    /// The store's name, for messages.
    pub(crate) name: String,
    pub(crate) keys: Keys,
    pub(crate) id: [u8; 16],
    pub(crate) index: RwLock<Index>,
    /// Held while the index is brought up to date, so that this happens once at a time.
    pub(crate) refreshing: Mutex<()>,
    /// This repository's part of the cache folder.
    pub(crate) cache_dir: Option<PathBuf>,
    pub(crate) frames: FrameCache,
    pub(crate) pages: PageCache,
    /// Length at which a writer closes a pack.
    pub(crate) pack_target: AtomicU64,
}

impl Repository {
    /// Makes a new repository in an empty store; `AlreadyExists` if there is one.
    pub fn create(
        store: Arc<dyn Store>,
        passphrase: &Passphrase,
        options: &OpenOptions,
    ) -> Result<Self> {
        Self::create_with(store, passphrase, options, KdfCost::default())
    }

    /// As [`Repository::create`], with a chosen cost of guessing the passphrase.
    pub fn create_with(
        store: Arc<dyn Store>,
        passphrase: &Passphrase,
        options: &OpenOptions,
        cost: KdfCost,
    ) -> Result<Self> {
        let name = store.describe();
        if small_object(&*store, config::KEY)?.is_some() {
            return Err(RepoError::AlreadyExists { store: name, key: config::KEY.into() });
        }
        refuse_headless(&*store)?;
        let config = Config::new();
        let keys = Keys::generate()?;
        let id = *config.repository.as_bytes();
        let (key_name, key_object) = keys.wrap(&id, passphrase, cost)?;
        // The key first: a repository without a way to open it must never exist. Killed here, it
        // leaves a key object of no repository, which readers pass over.
        block_on(store.create(&key_name, key_object.into()))?;
        if let Err(e) = block_on(store.create(config::KEY, config.seal(&keys)?.into())) {
            // Another creator was first; our key is of no use to anyone. Garbage if this fails too.
            if matches!(e, RepoError::AlreadyExists { .. }) {
                let _ = block_on(store.delete(&key_name));
            }
            return Err(e);
        }
        Ok(Self::assemble(store, keys, id, options))
    }

    /// Opens the repository of a store; tells a wrong passphrase, damage and absence apart.
    pub fn open(
        store: Arc<dyn Store>,
        passphrase: &Passphrase,
        options: &OpenOptions,
    ) -> Result<Self> {
        let name = store.describe();
        let Some(object) = small_object(&*store, config::KEY)? else {
            refuse_headless(&*store)?;
            return Err(RepoError::NoRepository(name));
        };
        let config = Config::parse(&name, &object)?;
        let id = *config.repository.as_bytes();
        let keys = find_key(&*store, &id, passphrase)?;
        Config::authenticate(&keys, &object)?;
        let repository = Self::assemble(store, keys, id, options);
        repository.inner.refresh()?;
        Ok(repository)
    }

    fn assemble(store: Arc<dyn Store>, keys: Keys, id: [u8; 16], options: &OpenOptions) -> Self {
        let cache_dir =
            options.cache_dir.as_ref().map(|dir| dir.join(Uuid::from_bytes(id).to_string()));
        Self {
            inner: Arc::new(Inner {
                name: store.describe(),
                store,
                keys,
                id,
                index: RwLock::default(),
                refreshing: Mutex::default(),
                cache_dir,
                frames: FrameCache::default(),
                pages: PageCache::default(),
                pack_target: AtomicU64::new(crate::pack::TARGET_LEN),
            }),
        }
    }

    /// Makes this handle's writers close packs early, so that little data makes many packs.
    #[cfg(feature = "test-support")]
    pub fn set_pack_target(&self, bytes: u64) {
        self.inner.pack_target.store(bytes, std::sync::atomic::Ordering::Relaxed);
    }

    /// Identity.
    pub fn id(&self) -> Uuid {
        Uuid::from_bytes(self.inner.id)
    }

    /// Manifests of all restore points, or of one group, oldest first. A damaged manifest is an entry
    /// of its own and hides no other.
    pub fn points(&self, group: Option<Uuid>) -> Result<Vec<Result<Manifest>>> {
        let mut objects = self.inner.list_points(group)?;
        objects.sort_by(|a, b| age(&a.key).cmp(age(&b.key)));
        let inner = &self.inner;
        Ok(block_on(
            futures::stream::iter(objects)
                .map(|object| async move { inner.read_point(&object).await })
                .buffered(PARALLEL)
                .collect(),
        ))
    }

    /// The newest readable restore point of a group; one listing and one read.
    pub fn latest(&self, group: Uuid) -> Result<Option<Manifest>> {
        for object in self.inner.list_points(Some(group))?.iter().rev() {
            match block_on(self.inner.read_point(object)) {
                // An older restore point will do instead of a damaged or just deleted one.
                Err(e @ (RepoError::Damaged { .. } | RepoError::Missing { .. })) => {
                    tracing::warn!("passing over a restore point: {e}");
                }
                result => return result.map(Some),
            }
        }
        Ok(None)
    }

    /// One restore point.
    pub fn point(&self, point: Uuid) -> Result<Manifest> {
        let objects = self.inner.list_points(None)?;
        let found = objects
            .iter()
            .find(|object| manifest::parse_key(&object.key).is_some_and(|(_, id)| id == point))
            .ok_or_else(|| RepoError::NoSuchPoint(point.to_string()))?;
        block_on(self.inner.read_point(found))
    }

    /// Starts writing a restore point.
    pub fn begin(&self, compression: Compression) -> Result<PointWriter> {
        // Others may have written since: what they stored need not be stored again.
        self.inner.refresh()?;
        Ok(PointWriter::new(self.inner.clone(), compression))
    }

    /// Opens a stored disk or file for reading.
    pub fn open_disk(&self, root: &DiskRoot) -> Result<DiskReader> {
        DiskReader::open(self.inner.clone(), root, Patience::Retry)
    }

    /// As [`Repository::open_disk`], for a reader that has another copy to turn to: what the store
    /// does not give at the first attempt is an error at once.
    pub fn open_disk_once(&self, root: &DiskRoot) -> Result<DiskReader> {
        DiskReader::open(self.inner.clone(), root, Patience::Once)
    }

    /// The whole content of a stored small file, which may have at most `limit` bytes.
    pub fn read_file(&self, file: &crate::PointFile, limit: u64) -> Result<Vec<u8>> {
        if file.root.size > limit {
            return Err(RepoError::Invalid(format!(
                "{}: {} bytes are more than the {limit} expected",
                file.name, file.root.size
            )));
        }
        let mut content = vec![0; file.root.size as usize];
        self.open_disk(&file.root)?.read_at(0, &mut content)?;
        Ok(content)
    }
}

impl Inner {
    pub(crate) fn list_points(&self, group: Option<Uuid>) -> Result<Vec<ObjectInfo>> {
        let mut objects = block_on(self.store.list(&manifest::prefix(group)))?;
        objects.retain(|object| manifest::parse_key(&object.key).is_some());
        Ok(objects)
    }

    async fn read_point(&self, object: &ObjectInfo) -> Result<Manifest> {
        if object.size > MAX_MANIFEST_OBJECT {
            return Err(damaged(&object.key, "larger than the format allows"));
        }
        let bytes = self.store.get(&object.key).await?;
        manifest::open(&self.keys, &self.name, &object.key, &self.id, &bytes)
    }
}

/// The part of a manifest's key that sorts by age.
fn age(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

/// A small object that may not be there. The size is looked at first: nobody vouches for it.
fn small_object(store: &dyn Store, key: &str) -> Result<Option<Bytes>> {
    let Some(info) = block_on(store.list(key))?.into_iter().find(|object| object.key == key) else {
        return Ok(None);
    };
    if info.size > MAX_SMALL_OBJECT {
        return Err(damaged(key, "larger than the format allows"));
    }
    block_on(store.get(key)).map(Some)
}

/// Restore points without a configuration are a damaged repository, not an empty store.
fn refuse_headless(store: &dyn Store) -> Result<()> {
    if block_on(store.list("points/"))?.is_empty() {
        return Ok(());
    }
    Err(damaged(config::KEY, "missing, although there are restore points; restore it from a copy"))
}

fn find_key(store: &dyn Store, id: &[u8; 16], passphrase: &Passphrase) -> Result<Keys> {
    let name = store.describe();
    let (mut others, mut damage) = (false, None);
    for info in block_on(store.list("keys/"))?.into_iter().take(MAX_KEYS) {
        let tried = if info.size > MAX_SMALL_OBJECT {
            Err(damaged(&info.key, "larger than the format allows"))
        } else {
            block_on(store.get(&info.key))
                .and_then(|object| unwrap(&name, &info.key, &object, id, passphrase))
        };
        match tried {
            Ok(Unwrapped::Keys(keys)) => return Ok(*keys),
            Ok(Unwrapped::OtherPassphrase) => others = true,
            Ok(Unwrapped::OtherRepository) => {}
            Err(e @ RepoError::Damaged { .. }) => damage = Some(e),
            Err(e) => return Err(e),
        }
    }
    match damage {
        // The passphrase may be right and its key object the damaged one.
        Some(damage) => Err(damage),
        None if others => Err(RepoError::WrongPassphrase(name)),
        None => Err(damaged("keys/", "no key object is left; restore it from a copy")),
    }
}
