//! From checkpoint to restore point and back: backup runs, copies between targets, restores.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use tidemark_dedup::{Compression, Manifest, Passphrase, RepoError, Repository, StoreCredentials};
use tidemark_disk::{Block, DiskError};
use tidemark_engine::{CheckpointRecord, Engine, EngineError, QuiesceMode, VmConfig};

/// Errors of backup, copy and restore.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// An engine operation.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A repository operation, and on which target.
    #[error("target {target}: {source}")]
    Target {
        /// The target's name.
        target: String,
        /// What failed.
        source: RepoError,
    },
    /// A disk operation.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// No such target.
    #[error("there is no target named {0}; `tidemark target list` shows them")]
    NoSuchTarget(String),
    /// No such restore point on any target.
    #[error("no target has a restore point {0}; `tidemark backup list` shows them")]
    NoSuchPoint(String),
    /// The arguments make no sense.
    #[error("{0}")]
    Invalid(String),
    /// Cancelled; nothing visible was left behind.
    #[error("cancelled; nothing visible was left behind")]
    Cancelled,
}

/// Result of an export operation.
pub type Result<T> = std::result::Result<T, ExportError>;

/// Media class of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Media {
    /// Local or network disk.
    Disk,
    /// Object store.
    Object,
    /// Tape.
    Tape,
}

/// A configured target; stored in `<data-dir>/targets/<name>.json`, without secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Name.
    pub name: String,
    /// Store URL.
    pub url: String,
    /// Media class.
    pub media: Media,
    /// Site, for 3-2-1.
    pub site: Option<String>,
    /// Away from the host's site.
    pub offsite: bool,
    /// File that holds the repository's passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// File that holds the S3 keys (`access_key_id=…`, `secret_access_key=…` lines, or AWS's INI form).
    pub credentials_file: Option<PathBuf>,
}

/// Asks for a secret that no file and no environment variable gave; `None`: no terminal.
pub type SecretPrompt<'a> = &'a (dyn Fn(&str) -> Option<String> + Sync);

/// What a backup run should do.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// The VM.
    pub vm: String,
    /// Target names; the first is written from the VM, the others are copied to. Empty: all targets.
    pub targets: Vec<String>,
    /// Read everything even if tracking could tell what changed.
    pub full: bool,
    /// Quiesce mode.
    pub quiesce: QuiesceMode,
    /// Longest freeze.
    pub freeze_deadline: Duration,
    /// Compression.
    pub compression: Compression,
}

/// What a run is doing now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum RunEvent {
    /// A step begins.
    Step {
        /// For people: "checkpoint", "read disk0", "copy to offsite", "merge".
        step: String,
    },
    /// Progress within the step.
    Progress {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
        /// Bytes of new chunks so far.
        new_bytes: u64,
        /// Bytes stored so far.
        stored_bytes: u64,
    },
    /// Something the user should know: full read because …, crash-consistent because ….
    Note {
        /// The text.
        text: String,
    },
}

/// Receives a run's events; called from several threads.
pub type Events<'a> = &'a (dyn Fn(RunEvent) + Sync);

/// How much was read and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "kebab-case")]
pub enum ReadMode {
    /// Everything; the reason is for people.
    Full {
        /// Why.
        reason: String,
    },
    /// Only what changed since the restore point.
    Incremental {
        /// The base.
        since: Uuid,
    },
}

/// What a run did on one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetResult {
    /// Target.
    pub target: String,
    /// Bytes read: from the VM's disks on the first target, from the first target on the others.
    pub read_bytes: u64,
    /// Bytes of chunks new to it.
    pub new_bytes: u64,
    /// Bytes uploaded.
    pub stored_bytes: u64,
    /// Duration in milliseconds.
    pub millis: u64,
    /// Why the copy failed, if it did.
    pub error: Option<String>,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupReport {
    /// The restore point.
    pub point: Uuid,
    /// The VM.
    pub vm: String,
    /// Each disk's read mode.
    pub disks: Vec<(String, ReadMode)>,
    /// The checkpoint it came from (gone by now).
    pub checkpoint: CheckpointRecord,
    /// Each target, first one first.
    pub targets: Vec<TargetResult>,
    /// Milliseconds that the merge took.
    pub merge_millis: u64,
    /// Milliseconds in all.
    pub millis: u64,
}

/// What the exporter keeps in [`Manifest::facts`]; versioned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointFacts {
    /// Version of these facts: 1.
    pub version: u32,
    /// VM configuration at that moment.
    pub vm: VmConfig,
    /// The checkpoint.
    pub checkpoint: CheckpointRecord,
    /// Each disk's read mode.
    pub disks: Vec<(String, ReadMode)>,
    /// Geometry of each disk: name, logical and physical sector size.
    pub sectors: Vec<(String, u32, u32)>,
    /// The restore point that this one was written against.
    pub parent: Option<Uuid>,
}

/// A restore point and where it is.
#[derive(Debug, Clone)]
pub struct FoundPoint {
    /// The restore point.
    pub manifest: Manifest,
    /// The maker's facts.
    pub facts: PointFacts,
    /// Names of the targets that hold it.
    pub targets: Vec<String>,
}

/// How a VM is restored.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// The restore point: id, unique prefix of one, or `latest:<vm>`.
    pub point: String,
    /// Name of the new VM.
    pub name: String,
    /// Read from this target; `None`: the first that answers, local ones first.
    pub target: Option<String>,
    /// Put it in the place of the VM of that name, which is stopped and deleted first.
    pub in_place: bool,
}

/// The targets of a data directory and what can be done with them.
pub struct Exporter<'a> {
    _engine: &'a Engine,
}

impl<'a> Exporter<'a> {
    /// Over the targets of the engine's data directory.
    pub fn new(_engine: &'a Engine, _prompt: SecretPrompt<'a>) -> Self {
        todo!()
    }
    /// Adds a target: probes the store, opens its repository or makes one. Gives whether it was made
    /// and how many restore points were found.
    pub fn add_target(&self, _target: &Target) -> Result<(bool, usize)> {
        todo!()
    }
    /// Configured targets, by name.
    pub fn targets(&self) -> Result<Vec<Target>> {
        todo!()
    }
    /// Writes, reads, lists and deletes a probe object, checks conditional create and the key.
    pub fn test_target(&self, _name: &str) -> Result<Vec<String>> {
        todo!()
    }
    /// Forgets a target; the repository stays as it is.
    pub fn remove_target(&self, _name: &str) -> Result<()> {
        todo!()
    }
    /// Opens a target's repository.
    pub fn repository(&self, _name: &str) -> Result<Repository> {
        todo!()
    }
    /// Runs a backup.
    pub fn backup(
        &self,
        _request: &BackupRequest,
        _events: Events<'_>,
        _cancel: &AtomicBool,
    ) -> Result<BackupReport> {
        todo!()
    }
    /// All restore points of all targets, oldest first, and targets that could not be read.
    pub fn list(&self, _vm: Option<&str>) -> Result<(Vec<FoundPoint>, Vec<(String, ExportError)>)> {
        todo!()
    }
    /// Finds one by id, unique prefix, or `latest:<vm>`.
    pub fn find(&self, _point: &str, _target: Option<&str>) -> Result<FoundPoint> {
        todo!()
    }
    /// Restores a whole VM; new ids, MAC addresses and generation id unless in place.
    pub fn restore_vm(
        &self,
        _request: &RestoreRequest,
        _events: Events<'_>,
        _cancel: &AtomicBool,
    ) -> Result<VmConfig> {
        todo!()
    }
    /// Restores a disk to a file.
    pub fn restore_disk(
        &self,
        _point: &str,
        _disk: &str,
        _out: &Path,
        _format: DiskFormat,
        _events: Events<'_>,
        _cancel: &AtomicBool,
    ) -> Result<()> {
        todo!()
    }
    /// A restore point's disks as read-only block devices, for NBD.
    pub fn open_point(&self, _point: &str) -> Result<Vec<(String, Arc<dyn Block>)>> {
        todo!()
    }
}

/// File format of a restored disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Dynamic VHDX.
    Vhdx,
    /// Raw, sparse.
    Raw,
}

/// Secrets of a target, from its files, the environment or the prompt.
pub struct TargetSecrets {
    /// Repository passphrase.
    pub passphrase: Passphrase,
    /// Store credentials.
    pub credentials: StoreCredentials,
}
