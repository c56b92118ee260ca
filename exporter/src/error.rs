//! Errors of backup, copy and restore.

use std::path::{Path, PathBuf};

use tidemark_dedup::RepoError;
use tidemark_disk::DiskError;
use tidemark_engine::EngineError;

/// Result of an export operation.
pub type Result<T> = std::result::Result<T, ExportError>;

/// Errors of backup, copy and restore.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// An engine operation.
    #[error(transparent)]
    Engine(EngineError),
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
    Disk(DiskError),
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
    /// A file of the data directory is damaged.
    #[error("{path} is damaged: {what}", path = path.display())]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// No such target.
    #[error("there is no target named {0}; `tidemark target list` shows them")]
    NoSuchTarget(String),
    /// The target's name is taken.
    #[error("a target named {0} exists already; choose another name or remove it first")]
    TargetExists(String),
    /// A passphrase or key is missing or unusable.
    #[error("target {target}: {what}")]
    Secret {
        /// The target.
        target: String,
        /// Which one, and which file or variable to set.
        what: String,
    },
    /// The store answered, but not as a repository needs it.
    #[error("target {target}: {what}")]
    Unfit {
        /// The target.
        target: String,
        /// What it did.
        what: String,
    },
    /// No such restore point on any target.
    #[error("no target has a restore point {0}; `tidemark backup list` shows them")]
    NoSuchPoint(String),
    /// No such restore point on the targets that could be read.
    #[error("no target that could be read has a restore point {point}; not read: {unread}")]
    PointNotFound {
        /// What was asked for.
        point: String,
        /// Targets that could not be read, and why.
        unread: String,
    },
    /// A prefix that fits several restore points.
    #[error("{prefix} fits several restore points ({points}); give more characters")]
    Ambiguous {
        /// The prefix.
        prefix: String,
        /// What it fits.
        points: String,
    },
    /// The facts kept with a restore point cannot be used.
    #[error("restore point {point} on target {target}: its facts cannot be read: {what}")]
    Facts {
        /// The restore point.
        point: String,
        /// The target.
        target: String,
        /// What is wrong.
        what: String,
    },
    /// Every target that holds the data failed to give it.
    #[error("{what} could not be read from any target: {failures}")]
    NoGoodCopy {
        /// Disk or file and the offset.
        what: String,
        /// Each target's failure.
        failures: String,
    },
    /// The arguments make no sense.
    #[error("{0}")]
    Invalid(String),
    /// Cancelled; nothing visible was left behind.
    #[error("cancelled; nothing visible was left behind")]
    Cancelled,
}

impl From<EngineError> for ExportError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Cancelled | EngineError::Disk(DiskError::Cancelled) => Self::Cancelled,
            other => Self::Engine(other),
        }
    }
}

impl From<DiskError> for ExportError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Cancelled => Self::Cancelled,
            other => Self::Disk(other),
        }
    }
}

impl ExportError {
    /// For `map_err`: names the target of a repository error.
    pub(crate) fn on(target: &str) -> impl FnOnce(RepoError) -> Self + '_ {
        move |source| match source {
            RepoError::Cancelled => Self::Cancelled,
            source => Self::Target { target: target.to_owned(), source },
        }
    }

    /// For `map_err`: names the operation and file of an I/O error.
    pub(crate) fn io<'p>(
        op: &'static str,
        path: &'p Path,
    ) -> impl FnOnce(std::io::Error) -> Self + 'p {
        move |source| Self::Io { op, path: path.to_owned(), source }
    }

    /// Whether this is a cancellation.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }
}

/// Fails if the caller wants to stop.
pub(crate) fn check(cancel: &std::sync::atomic::AtomicBool) -> Result<()> {
    if cancel.load(std::sync::atomic::Ordering::Relaxed) {
        return Err(ExportError::Cancelled);
    }
    Ok(())
}
