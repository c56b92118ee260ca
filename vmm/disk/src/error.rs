//! Errors of disk operations.

use std::path::{Path, PathBuf};

/// Result of a disk operation.
pub type Result<T> = std::result::Result<T, DiskError>;

/// Why a disk operation failed. The message names the file and what to do where that is known.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The operating system refused a file operation.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// The operation, in the infinitive: "read", "sync".
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file's structures break the format's rules.
    #[error("{path} is damaged: {what}", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The structure and the rule.
        what: String,
    },
    /// A valid file with something this version does not support.
    #[error("{path} is not supported: {what}", path = path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature.
        what: String,
    },
    /// A differencing disk's parent is not where the disk says.
    #[error("parent {parent} of {path} was not found", path = path.display())]
    ParentMissing {
        /// The child.
        path: PathBuf,
        /// The parent's name as recorded in the child.
        parent: String,
    },
    /// The parent was changed after the child was made.
    #[error("parent {parent} of {path} has changed since the child was created (expected {expected}, found {found})",
        path = path.display(), parent = parent.display())]
    ParentChanged {
        /// The child.
        path: PathBuf,
        /// The parent file.
        parent: PathBuf,
        /// The identity the child recorded.
        expected: String,
        /// The parent's identity.
        found: String,
    },
    /// The request reaches outside the disk or is not sector aligned.
    #[error("request at {offset} for {len} bytes is outside the disk or not sector aligned")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// A write to a disk that is open read-only.
    #[error("{path} is open read-only", path = path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
    /// Another process holds the file.
    #[error("{path} is in use by another process (a running VM holds its disks): stop it, or try again later",
        path = path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// "Changed since" was asked for an id that this disk cannot answer: read everything.
    #[error("change tracking cannot answer for {id}: {why}")]
    UnknownRctId {
        /// The id asked for.
        id: String,
        /// Why it is not known.
        why: String,
    },
    /// The operation does not fit the disk's present state.
    #[error("{0}")]
    State(String),
    /// The operation was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The disk owner process answered with an error or not at all.
    #[error("disk owner: {0}")]
    Owner(String),
}

impl DiskError {
    /// Wraps an I/O error with its operation and file.
    pub fn io(op: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { op, path: path.to_owned(), source }
    }

    /// A broken rule of the format.
    pub fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), what: what.into() }
    }

    /// The system error number behind this error, if there is one (ENOSPC, EIO).
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
