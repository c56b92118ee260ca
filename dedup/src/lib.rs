//! The repository: disks as chunks of 64 KiB, deduplicated, compressed, encrypted, in packs on an
//! object store, with a Merkle disk map per restore point. Knows nothing of VMs: what a restore point
//! means to its maker is carried in the manifest as an opaque value.
//!
//! The interface is blocking; object-store I/O runs on a runtime inside. Callers on an async runtime
//! use `spawn_blocking`.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub mod error;
pub mod store;

pub use error::{RepoError, Result};
pub use store::{Store, StoreCredentials, open_store};

/// Bytes of a chunk, also the unit in which disks are written.
pub const CHUNK: u64 = 64 * 1024;

/// A secret that opens a repository. Zeroed when dropped; never printed.
#[derive(Clone, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct Passphrase(String);

impl Passphrase {
    /// Takes the secret over; surrounding line ends are not part of it.
    pub fn new(secret: &str) -> Self {
        Self(secret.trim_end_matches(['\r', '\n']).to_owned())
    }
}

/// How to open a repository.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Folder for the local index cache; it may be deleted at any time. `None`: no cache.
    pub cache_dir: Option<PathBuf>,
}

/// zstd effort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// zstd 1.
    Fast,
    /// zstd 2.
    #[default]
    Default,
    /// zstd 9.
    Better,
}

/// Root of a disk map; with the repository it is the whole disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRoot {
    /// Virtual size in bytes.
    pub size: u64,
    /// Id of the root page, hexadecimal; all zeros for an empty disk.
    pub page: String,
    /// Levels of the tree.
    pub levels: u8,
}

/// One disk of a restore point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// Disk name.
    pub name: String,
    /// Content.
    pub root: DiskRoot,
}

/// A small file kept with a restore point, stored as a map of chunks like a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointFile {
    /// File name.
    pub name: String,
    /// Content; `size` is the exact length.
    pub root: DiskRoot,
}

/// What a run added to a repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteStats {
    /// Bytes handed in (zeros included).
    pub read_bytes: u64,
    /// Bytes of chunks that the repository did not have.
    pub new_bytes: u64,
    /// Bytes of all objects uploaded.
    pub stored_bytes: u64,
    /// Objects uploaded.
    pub objects: u64,
}

/// A restore point, complete by itself. Written last, with a conditional create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Identity of the restore point; a copy in another repository keeps it.
    pub point: Uuid,
    /// What it belongs to (the VM's id): points are listed by it.
    pub group: Uuid,
    /// When the content was current, RFC 3339 UTC.
    pub created: String,
    /// Disks.
    pub disks: Vec<PointDisk>,
    /// Small files.
    pub files: Vec<PointFile>,
    /// What writing it took (in the repository it was first written to).
    pub stats: WriteStats,
    /// The maker's own facts.
    pub facts: serde_json::Value,
}

/// An open repository. Cheap to clone.
#[derive(Clone)]
pub struct Repository {
    _private: Arc<()>,
}

impl Repository {
    /// Makes a new repository in an empty store; `AlreadyExists` if there is one.
    pub fn create(
        _store: Arc<dyn Store>,
        _passphrase: &Passphrase,
        _options: &OpenOptions,
    ) -> Result<Self> {
        todo!()
    }
    /// Opens the repository of a store; tells a wrong passphrase, damage and absence apart.
    pub fn open(
        _store: Arc<dyn Store>,
        _passphrase: &Passphrase,
        _options: &OpenOptions,
    ) -> Result<Self> {
        todo!()
    }
    /// Identity.
    pub fn id(&self) -> Uuid {
        todo!()
    }
    /// Manifests of all restore points, or of one group, oldest first. A damaged manifest is an entry
    /// of its own and hides no other.
    pub fn points(&self, _group: Option<Uuid>) -> Result<Vec<Result<Manifest>>> {
        todo!()
    }
    /// The newest readable restore point of a group; one listing and one read.
    pub fn latest(&self, _group: Uuid) -> Result<Option<Manifest>> {
        todo!()
    }
    /// One restore point.
    pub fn point(&self, _point: Uuid) -> Result<Manifest> {
        todo!()
    }
    /// Starts writing a restore point.
    pub fn begin(&self, _compression: Compression) -> Result<PointWriter> {
        todo!()
    }
    /// Opens a stored disk or file for reading.
    pub fn open_disk(&self, _root: &DiskRoot) -> Result<DiskReader> {
        todo!()
    }
    /// Reads every page and, with `read_data`, every chunk of a restore point.
    pub fn verify(
        &self,
        _point: Uuid,
        _read_data: bool,
        _progress: &(dyn Fn(u64, u64) + Sync),
        _cancel: &AtomicBool,
    ) -> Result<VerifyReport> {
        todo!()
    }
    /// Copies a restore point from `source`: only chunks that this repository does not have.
    pub fn copy_from(
        &self,
        _source: &Repository,
        _point: Uuid,
        _progress: &(dyn Fn(u64, u64) + Sync),
        _cancel: &AtomicBool,
    ) -> Result<WriteStats> {
        todo!()
    }
    /// Sizes and counts of what the repository holds.
    pub fn stats(&self) -> Result<RepoStats> {
        todo!()
    }
}

/// Result of a verification.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VerifyReport {
    /// Chunks referenced.
    pub chunks: u64,
    /// Bytes of disk content checked.
    pub bytes: u64,
    /// What is damaged: object, disk and offset where known.
    pub damage: Vec<String>,
}

/// Sizes and counts.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RepoStats {
    /// Restore points.
    pub points: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of all objects.
    pub stored_bytes: u64,
    /// Distinct chunks.
    pub chunks: u64,
    /// Bytes of distinct chunks before compression.
    pub chunk_bytes: u64,
    /// Bytes of all restore points' disks, as if each were stored whole (zeros excluded).
    pub logical_bytes: u64,
}

/// Writes one restore point. Dropped without [`PointWriter::commit`] it leaves only garbage that no
/// reader sees.
pub struct PointWriter {
    _private: (),
}

impl PointWriter {
    /// Starts a disk of `size` bytes, empty or as a change of `base`. One disk at a time.
    pub fn disk(&mut self, _size: u64, _base: Option<&DiskRoot>) -> Result<DiskWriter<'_>> {
        todo!()
    }
    /// Stores a small file.
    pub fn file(&mut self, _name: &str, _content: &[u8]) -> Result<PointFile> {
        todo!()
    }
    /// What has been written so far.
    pub fn stats(&self) -> WriteStats {
        todo!()
    }
    /// Makes everything durable, then writes the manifest; `stats` is filled in.
    pub fn commit(self, _manifest: Manifest) -> Result<Manifest> {
        todo!()
    }
}

/// Writes one disk. Chunks arrive in ascending order; hashing, compression, encryption and upload run
/// behind it on a pool, bounded in memory: a call blocks when the pipeline is full.
pub struct DiskWriter<'a> {
    _writer: &'a mut PointWriter,
}

impl DiskWriter<'_> {
    /// Sets the content at `offset` (a multiple of [`CHUNK`]) to `data` (whole chunks, or up to the end
    /// of the disk). All-zero chunks are found and not stored.
    pub fn write(&mut self, _offset: u64, _data: bytes::Bytes) -> Result<()> {
        todo!()
    }
    /// Makes the chunks of the range read as zeros.
    pub fn zero(&mut self, _range: Range<u64>) -> Result<()> {
        todo!()
    }
    /// What has been written so far to the restore point.
    pub fn stats(&self) -> WriteStats {
        todo!()
    }
    /// Finishes the disk; what was not written is as in `base` (or zero without one).
    pub fn finish(self) -> Result<DiskRoot> {
        todo!()
    }
}

/// Reads one stored disk; safe to share between threads, with a bounded cache of decoded frames.
pub struct DiskReader {
    _private: (),
}

impl DiskReader {
    /// Virtual size.
    pub fn size(&self) -> u64 {
        todo!()
    }
    /// Fills `buf` from `offset`, verified.
    pub fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        todo!()
    }
    /// Ranges that hold data, in order; the rest reads as zeros.
    pub fn data_ranges(&self, _range: Range<u64>) -> Result<Vec<Range<u64>>> {
        todo!()
    }
}
