//! Errors of repository operations.

/// Result of a repository operation.
pub type Result<T> = std::result::Result<T, RepoError>;

/// Why a repository operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepoError {
    /// The URL or an option makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The store refused the credentials.
    #[error(
        "{store}: access denied; check the access key, the secret key and the bucket's policy ({detail})"
    )]
    AccessDenied {
        /// The store.
        store: String,
        /// The store's words.
        detail: String,
    },
    /// The bucket or folder does not exist.
    #[error("{store}: the bucket or folder does not exist; create it first ({detail})")]
    NoSuchStore {
        /// The store.
        store: String,
        /// The store's words.
        detail: String,
    },
    /// The store could not be reached, after retries.
    #[error(
        "{store}: not reachable after {attempts} attempts; nothing was changed that a retry does not mend ({detail})"
    )]
    Unreachable {
        /// The store.
        store: String,
        /// Attempts made.
        attempts: u32,
        /// The last failure.
        detail: String,
    },
    /// The store is out of space.
    #[error("{store}: no space left; free some or use another target ({detail})")]
    NoSpace {
        /// The store.
        store: String,
        /// The store's words.
        detail: String,
    },
    /// An object is not there.
    #[error("{store}: object {key} is missing")]
    Missing {
        /// The store.
        store: String,
        /// The object.
        key: String,
    },
    /// A conditional create found the object already there.
    #[error("{store}: object {key} exists already")]
    AlreadyExists {
        /// The store.
        store: String,
        /// The object.
        key: String,
    },
    /// There is no repository in the store.
    #[error("{0}: there is no repository here")]
    NoRepository(String),
    /// The passphrase opens none of the repository's keys.
    #[error("wrong passphrase for the repository at {0}")]
    WrongPassphrase(String),
    /// Stored data failed its check.
    #[error("damaged: object {key}: {what}")]
    Damaged {
        /// The object.
        key: String,
        /// What failed.
        what: String,
    },
    /// The repository's format is newer than this program.
    #[error(
        "the repository at {store} has format version {version}; this program reads up to {supported}. Upgrade Tidemark"
    )]
    TooNew {
        /// The store.
        store: String,
        /// Its version.
        version: u32,
        /// Supported version.
        supported: u32,
    },
    /// The repository uses something that this program does not know.
    #[error(
        "the repository at {store} needs the feature {feature:?}, which this program does not know. Upgrade Tidemark"
    )]
    UnknownFeature {
        /// The store.
        store: String,
        /// The feature.
        feature: String,
    },
    /// No such restore point.
    #[error("there is no restore point {0}")]
    NoSuchPoint(String),
    /// Any other failure of the store.
    #[error("{store}: {op} {key}: {detail}")]
    Store {
        /// The store.
        store: String,
        /// What was tried.
        op: &'static str,
        /// On what object.
        key: String,
        /// The store's words.
        detail: String,
    },
    /// Cancelled.
    #[error("cancelled")]
    Cancelled,
}
