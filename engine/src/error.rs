//! Errors of VM and checkpoint operations.

use std::path::{Path, PathBuf};

use tidemark_disk::DiskError;
use tidemark_driver::DriverError;

/// Errors of VM and checkpoint operations.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A disk operation.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A driver or guest agent operation.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A file of the data directory.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// No such VM.
    #[error("there is no VM named {0}; `tidemark vm list` shows them")]
    NoSuchVm(String),
    /// The name is taken.
    #[error("a VM named {0} exists already")]
    VmExists(String),
    /// No such checkpoint.
    #[error("VM {vm} has no checkpoint {checkpoint}; `tidemark checkpoint list {vm}` shows them")]
    NoSuchCheckpoint {
        /// The VM.
        vm: String,
        /// What was asked for.
        checkpoint: String,
    },
    /// Another process is working on the VM.
    #[error("VM {0} is busy: another operation on it is running; try again when it has finished")]
    Busy(String),
    /// Quiesce was required and did not succeed.
    #[error(
        "the guest could not be quiesced ({0}); no checkpoint was taken. Use --quiesce try to accept a crash-consistent one"
    )]
    Quiesce(String),
    /// A configuration or record file is damaged.
    #[error("{path} is damaged: {what}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The operation does not fit the VM's state.
    #[error("{0}")]
    State(String),
    /// The arguments make no sense.
    #[error("{0}")]
    Invalid(String),
    /// Cancelled.
    #[error("cancelled")]
    Cancelled,
}

impl EngineError {
    pub(crate) fn io(op: &'static str, path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::Io { op, path: path.to_owned(), source: source.into() }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }
}

/// Result of an engine operation.
pub type Result<T> = std::result::Result<T, EngineError>;
