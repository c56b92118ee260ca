//! Messages of the owner's control protocol: one JSON object a line, a request and then its response.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::rct::RctId;

/// Version of the control protocol, named in every line; client and owner must agree.
pub const PROTOCOL_VERSION: u32 = 1;

/// What a client can ask.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// The owner's state.
    Report,
    /// Creates the new leaf files of a checkpoint: (disk name, path). Repeating it is harmless.
    PrepareCheckpoint {
        /// New leaf of each disk.
        leaves: Vec<(String, PathBuf)>,
    },
    /// Pauses all disks together, seals, switches to the prepared leaves, resumes. What was sealed
    /// counts only once [`Request::SettleCheckpoint`] has been answered; a guest that is frozen can be
    /// thawed before that.
    CommitCheckpoint {
        /// New leaf of each disk, as prepared.
        leaves: Vec<(String, PathBuf)>,
    },
    /// Makes the sealed leaves durable and closes them clean, so that any process can read them.
    /// Repeating it is harmless.
    SettleCheckpoint,
    /// Gives up leaves that were prepared and not switched to, and removes their files. Afterwards a
    /// late `CommitCheckpoint` for them fails. Repeating it is harmless.
    DiscardCheckpoint,
    /// Starts folding `child` into its parent in the background; see [`DiskReport::merge`].
    StartMerge {
        /// Disk name.
        disk: String,
        /// The file to fold away.
        child: PathBuf,
    },
    /// Stops a running merge; it can be started again.
    CancelMerge {
        /// Disk name.
        disk: String,
    },
    /// Closes all disks clean and exits.
    Shutdown,
}

/// What the owner answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// Done, nothing to say.
    Ok,
    /// To `Report`.
    Report(OwnerReport),
    /// To `CommitCheckpoint`.
    Committed {
        /// How long I/O was held back, in microseconds.
        pause_us: u64,
        /// Each disk's sealed id.
        disks: Vec<CommittedDisk>,
    },
    /// The request failed; nothing was changed unless the message says so.
    Error {
        /// For people.
        message: String,
    },
}

/// One disk of a committed checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CommittedDisk {
    /// Disk name.
    pub disk: String,
    /// The id its content was sealed under.
    pub rct_id: RctId,
}

/// The owner's state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OwnerReport {
    /// [`PROTOCOL_VERSION`] of the owner.
    pub protocol: u32,
    /// Process id.
    pub pid: u32,
    /// Its disks.
    pub disks: Vec<DiskReport>,
}

/// One disk of the owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskReport {
    /// Disk name.
    pub disk: String,
    /// Chain files, base first.
    pub files: Vec<PathBuf>,
    /// Open NBD connections of the whole owner.
    pub connections: usize,
    /// Bytes read and written by clients since the owner started.
    pub read_bytes: u64,
    /// See `read_bytes`.
    pub written_bytes: u64,
    /// The current or last merge.
    pub merge: MergeState,
    /// Why change tracking of this disk began anew when the owner opened it, if it did.
    #[serde(default)]
    pub tracking_lost: Option<String>,
}

/// State of a disk's merge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum MergeState {
    /// None since the owner started.
    None,
    /// Running.
    Running {
        /// The file being folded away.
        child: PathBuf,
        /// Bytes moved.
        done: u64,
        /// Bytes to move.
        total: u64,
    },
    /// Finished: the file is out of the chain and may be deleted.
    Done {
        /// The file.
        child: PathBuf,
    },
    /// Failed or cancelled; it can be started again.
    Failed {
        /// The file.
        child: PathBuf,
        /// Why.
        message: String,
    },
}
