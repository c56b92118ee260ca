//! The repository: disks as chunks of 64 KiB, deduplicated, compressed, encrypted, in packs on an
//! object store, with a Merkle disk map per restore point. Knows nothing of VMs: what a restore point
//! means to its maker is carried in the manifest as an opaque value.
//!
//! The interface is blocking; object-store I/O runs on a runtime inside. Callers on an async runtime
//! use `spawn_blocking`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

mod bytes;
mod cache;
mod codec;
mod config;
mod copy;
mod diff;
pub mod error;
mod fetch;
mod frame;
mod id;
mod index;
mod key;
mod manifest;
mod map;
mod object;
mod pack;
mod pool;
mod reader;
mod repo;
mod segments;
pub mod store;
#[cfg(feature = "test-support")]
pub mod testing;
mod verify;
mod writer;

pub use error::{RepoError, Result};
pub use key::KdfCost;
pub use reader::DiskReader;
pub use repo::Repository;
pub use store::{Store, StoreCredentials, open_store};
pub use verify::{RepoStats, VerifyReport, scrub};
pub use writer::{DiskWriter, PointWriter};

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
    /// Bytes of all objects uploaded; of a finished run also its manifest's.
    pub stored_bytes: u64,
    /// Objects uploaded; of a finished run also its manifest.
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
