//! Two targets with the same content, one of which fails.

use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use tidemark_dedup::store::ObjectInfo;
use tidemark_dedup::{CHUNK, Compression, KdfCost, OpenOptions, Passphrase, Store, open_store};

use super::*;

const SIZE: u64 = 200 * CHUNK;

/// A store that gives no part of an object at the first attempt, from a number of reads on.
struct Hesitant {
    store: Arc<dyn Store>,
    /// Reads that succeed.
    good: AtomicU64,
    /// Whether patience helps.
    recovers: bool,
    once: AtomicU64,
    patient: AtomicU64,
}

impl Hesitant {
    fn silence(&self) -> RepoError {
        RepoError::Unreachable { store: self.describe(), attempts: 1, detail: "silent".into() }
    }

    fn fails(&self) -> bool {
        self.good.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_err()
    }
}

#[async_trait]
impl Store for Hesitant {
    fn describe(&self) -> String {
        "hesitant".to_owned()
    }
    async fn create(&self, key: &str, data: Bytes) -> tidemark_dedup::Result<()> {
        self.store.create(key, data).await
    }
    async fn get(&self, key: &str) -> tidemark_dedup::Result<Bytes> {
        self.store.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> tidemark_dedup::Result<Bytes> {
        self.patient.fetch_add(1, Ordering::SeqCst);
        if self.recovers { self.store.get_range(key, range).await } else { Err(self.silence()) }
    }
    async fn get_range_once(&self, key: &str, range: Range<u64>) -> tidemark_dedup::Result<Bytes> {
        if self.fails() {
            self.once.fetch_add(1, Ordering::SeqCst);
            return Err(self.silence());
        }
        self.store.get_range(key, range).await
    }
    async fn size(&self, key: &str) -> tidemark_dedup::Result<u64> {
        self.store.size(key).await
    }
    async fn list(&self, prefix: &str) -> tidemark_dedup::Result<Vec<ObjectInfo>> {
        self.store.list(prefix).await
    }
    async fn delete(&self, key: &str) -> tidemark_dedup::Result<()> {
        self.store.delete(key).await
    }
}

/// Targets in folders of their own, each with all of `content`.
struct Targets {
    _dir: tempfile::TempDir,
    stores: Vec<Arc<Hesitant>>,
    source: DiskSource,
}

/// One target for each number of good reads.
fn targets(content: &[u8], good: &[u64], recovers: bool) -> Targets {
    let dir = tempfile::tempdir().unwrap();
    let (mut stores, mut readers) = (Vec::new(), Vec::new());
    for (n, good) in good.iter().enumerate() {
        let path = dir.path().join(n.to_string());
        let plain = open_store(path.to_str().unwrap(), &Default::default()).unwrap();
        let (secret, options) = (Passphrase::new("secret"), OpenOptions::default());
        let made = Repository::create_with(plain.clone(), &secret, &options, KdfCost::CHEAP);
        let mut writer = made.unwrap().begin(Compression::Fast).unwrap();
        let mut disk = writer.disk(content.len() as u64, None).unwrap();
        for (n, chunk) in content.chunks(CHUNK as usize).enumerate() {
            disk.write(n as u64 * CHUNK, Bytes::copy_from_slice(chunk)).unwrap();
        }
        let root = disk.finish().unwrap();
        let manifest = Manifest {
            point: Uuid::new_v4(),
            group: Uuid::new_v4(),
            created: "2026-08-01T00:00:00Z".to_owned(),
            disks: Vec::new(),
            files: Vec::new(),
            stats: Default::default(),
            facts: serde_json::Value::Null,
        };
        writer.commit(manifest).unwrap();
        let store = Arc::new(Hesitant {
            store: plain,
            good: AtomicU64::new(*good),
            recovers,
            once: AtomicU64::default(),
            patient: AtomicU64::default(),
        });
        readers.push(Reader {
            target: format!("target{n}"),
            repository: Repository::open(store.clone(), &secret, &options).unwrap(),
            root,
            once: Mutex::default(),
            patient: Mutex::default(),
        });
        stores.push(store);
    }
    let source = DiskSource {
        name: "disk0".to_owned(),
        size: content.len() as u64,
        readers,
        preferred: AtomicUsize::new(0),
        notes: Mutex::default(),
    };
    Targets { _dir: dir, stores, source }
}

/// Content that does not compress or repeat.
fn content() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut content = vec![0; SIZE as usize];
    for word in content.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    content
}

fn read_all(source: &DiskSource) -> Result<Vec<u8>> {
    let mut found = vec![0; source.size as usize];
    let mut next = 0;
    source.for_each(&AtomicBool::new(false), &mut |offset, data| {
        assert!(offset >= next, "out of order");
        next = offset + data.len() as u64;
        found[offset as usize..next as usize].copy_from_slice(&data);
        Ok(())
    })?;
    Ok(found)
}

#[test]
fn a_silent_target_is_left_at_its_first_failure_wherever_that_is() {
    let content = content();
    for good in [0, 1, 2, 4] {
        let lab = targets(&content, &[good, u64::MAX], false);
        assert!(read_all(&lab.source).unwrap() == content, "silent after {good} reads");
        // What was on its way when the first one failed; not one request more, and none with retries.
        let failed = lab.stores[0].once.load(Ordering::SeqCst);
        assert!((1..=8).contains(&failed), "{failed} attempts after {good} reads");
        assert_eq!(lab.stores[0].patient.load(Ordering::SeqCst), 0);
        assert_eq!(lab.source.preferred.load(Ordering::Relaxed), 1);
        let notes = lab.source.notes.lock();
        assert!(notes.len() == 1 && notes[0].contains("target0"), "{notes:?}");
    }
}

#[test]
fn single_reads_leave_a_silent_target_too() {
    let content = content();
    let lab = targets(&content, &[0, u64::MAX], false);
    let mut piece = vec![0; 3 * CHUNK as usize];
    for at in [0, 7 * CHUNK] {
        lab.source.read_at(at, &mut piece).unwrap();
        assert!(piece == content[at as usize..][..piece.len()]);
    }
    assert_eq!(lab.stores[0].once.load(Ordering::SeqCst), 1);
    assert_eq!(lab.stores[0].patient.load(Ordering::SeqCst), 0);
}

#[test]
fn targets_that_all_hesitate_are_asked_again_with_patience() {
    let content = content();
    let lab = targets(&content, &[2, 1], true);
    assert!(read_all(&lab.source).unwrap() == content);
    let lab = targets(&content, &[2, 1], false);
    let error = read_all(&lab.source).unwrap_err().to_string();
    assert!(error.contains("target0") && error.contains("target1"), "{error}");
    for store in &lab.stores {
        assert!(store.patient.load(Ordering::SeqCst) > 0);
    }
}

#[test]
fn the_only_target_is_asked_with_patience_from_the_start() {
    let content = content();
    let lab = targets(&content, &[0], true);
    assert!(read_all(&lab.source).unwrap() == content);
    assert_eq!(lab.stores[0].once.load(Ordering::SeqCst), 0);
}
