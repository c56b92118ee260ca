//! One error type for the command, and the exit code that scripts get for it.

use std::fmt;

use tidemark_dedup::RepoError;
use tidemark_disk::DiskError;
use tidemark_engine::EngineError;
use tidemark_exporter::ExportError;

/// Exit codes; documented in `tidemark --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// Failed.
    Failed = 1,
    /// Done in part.
    Partial = 3,
    /// In use by another operation.
    Busy = 4,
    /// No such thing.
    NotFound = 5,
    /// Quiesce was required and failed.
    Quiesce = 6,
    /// Damaged data.
    Damaged = 7,
    /// Cancelled.
    Cancelled = 130,
}

/// A command's failure: what to tell the user, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) code: Code,
    message: String,
}

impl Failure {
    /// A failure with a message of the command's own.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Result of a command.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

impl From<DiskError> for Failure {
    fn from(e: DiskError) -> Self {
        Self::new(disk_code(&e), e.to_string())
    }
}

impl From<EngineError> for Failure {
    fn from(e: EngineError) -> Self {
        Self::new(engine_code(&e), e.to_string())
    }
}

impl From<ExportError> for Failure {
    fn from(e: ExportError) -> Self {
        let code = match &e {
            ExportError::Engine(e) => engine_code(e),
            ExportError::Disk(e) => disk_code(e),
            ExportError::Target { source, .. } => repo_code(source),
            ExportError::NoSuchTarget(_)
            | ExportError::NoSuchPoint(_)
            | ExportError::PointNotFound { .. } => Code::NotFound,
            ExportError::NoGoodCopy { .. } | ExportError::DamagedFile { .. } => Code::Damaged,
            ExportError::Cancelled => Code::Cancelled,
            _ => Code::Failed,
        };
        Self::new(code, e.to_string())
    }
}

impl From<RepoError> for Failure {
    fn from(e: RepoError) -> Self {
        Self::new(repo_code(&e), e.to_string())
    }
}

fn disk_code(e: &DiskError) -> Code {
    match e {
        DiskError::Busy { .. } => Code::Busy,
        DiskError::Cancelled => Code::Cancelled,
        DiskError::Corrupt { .. } | DiskError::ParentChanged { .. } => Code::Damaged,
        DiskError::ParentMissing { .. } => Code::NotFound,
        DiskError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Code::NotFound
        }
        _ => Code::Failed,
    }
}

fn engine_code(e: &EngineError) -> Code {
    match e {
        EngineError::Disk(e) => disk_code(e),
        EngineError::NoSuchVm(_) | EngineError::NoSuchCheckpoint { .. } => Code::NotFound,
        EngineError::Busy(_) => Code::Busy,
        EngineError::Quiesce(_) => Code::Quiesce,
        EngineError::Damaged { .. } => Code::Damaged,
        EngineError::Cancelled => Code::Cancelled,
        _ => Code::Failed,
    }
}

fn repo_code(e: &RepoError) -> Code {
    match e {
        RepoError::Damaged { .. } | RepoError::Missing { .. } => Code::Damaged,
        RepoError::NoSuchPoint(_) | RepoError::NoRepository(_) => Code::NotFound,
        RepoError::Cancelled => Code::Cancelled,
        _ => Code::Failed,
    }
}
