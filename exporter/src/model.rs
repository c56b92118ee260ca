//! What callers hand in and get back.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use tidemark_dedup::{Compression, Manifest};
use tidemark_engine::{CheckpointRecord, QuiesceMode, VmConfig};

/// Version of [`PointFacts`].
pub(crate) const FACTS_VERSION: u32 = 1;

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
    /// Why the checkpoint could not be merged away, if it could not; the next operation on the VM
    /// does it.
    #[serde(default)]
    pub merge_error: Option<String>,
    /// What the user was told on the way.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl BackupReport {
    /// Whether every target has the restore point and the checkpoint is gone.
    pub fn complete(&self) -> bool {
        self.merge_error.is_none() && self.targets.iter().all(|t| t.error.is_none())
    }
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
    /// The restore point, as the first of `targets` has it.
    pub manifest: Manifest,
    /// The maker's facts.
    pub facts: PointFacts,
    /// Names of the targets that hold it, in the order in which they are best read.
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
    /// Put it in the place of the VM of that name, which must be stopped; the old one is kept until
    /// the new one is complete.
    pub in_place: bool,
}

/// File format of a restored disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Dynamic VHDX.
    Vhdx,
    /// Raw, sparse.
    Raw,
}
