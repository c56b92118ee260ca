//! What the tests share.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_dedup::testing::MemoryStore;
use tidemark_dedup::{
    CHUNK, Compression, DiskRoot, KdfCost, Manifest, OpenOptions, Passphrase, PointDisk,
    PointWriter, Repository, Result, Store,
};
use uuid::Uuid;

pub(crate) const GROUP: Uuid = Uuid::from_u128(0x6172);
pub(crate) const C: usize = CHUNK as usize;

pub(crate) fn passphrase() -> Passphrase {
    Passphrase::new("correct horse\n")
}

pub(crate) fn create(store: Arc<dyn Store>) -> Repository {
    try_create(store).unwrap()
}

pub(crate) fn try_create(store: Arc<dyn Store>) -> Result<Repository> {
    let options = OpenOptions::default();
    Repository::create_with(store, &passphrase(), &options, KdfCost::CHEAP)
}

pub(crate) fn open(store: Arc<dyn Store>) -> Result<Repository> {
    Repository::open(store, &passphrase(), &OpenOptions::default())
}

pub(crate) fn memory() -> (Arc<MemoryStore>, Repository) {
    let store = Arc::new(MemoryStore::new());
    let repository = create(store.clone());
    (store, repository)
}

/// Data that compresses to about half, different for each seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = vec![0; len];
    for word in out.chunks_mut(16) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let n = word.len().min(8);
        word[..n].copy_from_slice(&state.to_le_bytes()[..n]);
    }
    out
}

/// Moments one after the other.
pub(crate) fn at(n: u32) -> String {
    format!("2026-08-01T{:02}:{:02}:{:02}Z", n / 3600, n / 60 % 60, n % 60)
}

pub(crate) fn manifest(n: u32, disks: Vec<(&str, DiskRoot)>) -> Manifest {
    Manifest {
        point: Uuid::from_u128(0x100 + u128::from(n)),
        group: GROUP,
        created: at(n),
        disks: disks
            .into_iter()
            .map(|(name, root)| PointDisk { name: name.into(), root })
            .collect(),
        files: Vec::new(),
        stats: Default::default(),
        facts: serde_json::json!({ "n": n }),
    }
}

/// Writes a whole disk.
pub(crate) fn put_disk(writer: &mut PointWriter, content: &[u8]) -> Result<DiskRoot> {
    let mut disk = writer.disk(content.len() as u64, None)?;
    for (n, piece) in content.chunks(3 * C).enumerate() {
        disk.write((n * 3 * C) as u64, Bytes::copy_from_slice(piece))?;
    }
    disk.finish()
}

/// Writes a restore point of one disk.
pub(crate) fn put_point(repository: &Repository, n: u32, content: &[u8]) -> Result<Manifest> {
    let mut writer = repository.begin(Compression::Fast)?;
    let root = put_disk(&mut writer, content)?;
    writer.commit(manifest(n, vec![("disk0", root)]))
}

pub(crate) fn read_disk(repository: &Repository, root: &DiskRoot) -> Result<Vec<u8>> {
    let reader = repository.open_disk(root)?;
    let mut content = vec![0xEE; reader.size() as usize];
    reader.read_at(0, &mut content)?;
    Ok(content)
}
