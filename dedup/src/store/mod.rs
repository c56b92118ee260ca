//! Object stores: local folders and S3-compatible services behind one small interface.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use url::Url;

use crate::error::{RepoError, Result};

mod local;
mod retry;
mod s3;

/// An object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Key below the store's prefix.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
}

/// What a repository needs of an object store. Implementations retry what is worth retrying and give
/// typed errors.
#[async_trait]
pub trait Store: Send + Sync {
    /// Where it is, for people; without secrets.
    fn describe(&self) -> String;
    /// Creates an object, durable on return; `AlreadyExists` if the key is taken (a retry that finds
    /// its own earlier write is a success).
    async fn create(&self, key: &str, data: Bytes) -> Result<()>;
    /// Reads a whole object.
    async fn get(&self, key: &str) -> Result<Bytes>;
    /// Reads a range of an object.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;
    /// As [`Store::get_range`], without trying again: for a reader that can turn to another copy.
    async fn get_range_once(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.get_range(key, range).await
    }
    /// Size of an object.
    async fn size(&self, key: &str) -> Result<u64>;
    /// All objects whose key begins with `prefix`, by key.
    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>>;
    /// Deletes an object; a missing one is no error.
    async fn delete(&self, key: &str) -> Result<()>;
    /// As [`Store::create`], of data in several pieces: a pack need not be copied together. All
    /// pieces together are the object.
    async fn create_parts(&self, key: &str, parts: Vec<Bytes>) -> Result<()> {
        self.create(key, parts.concat().into()).await
    }
}

/// Credentials of an object store; never part of a URL. Zeroed when dropped.
#[derive(Clone, Default, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct StoreCredentials {
    /// S3 access key id.
    pub access_key_id: Option<String>,
    /// S3 secret access key.
    pub secret_access_key: Option<String>,
    /// S3 session token.
    pub session_token: Option<String>,
}

/// Opens a store: `file:///dir` or a plain path, or
/// `s3://bucket/prefix?endpoint=http://host:port&region=us-east-1`.
///
/// More options of `s3` URLs: `retry_seconds` (how long to go on trying, 60) and `timeout_seconds`
/// (how long one request may take, besides the time that its data needs, 30). A local folder is made
/// with its first object if the folder above it exists. Without credentials, `s3` uses `AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`.
pub fn open_store(url: &str, credentials: &StoreCredentials) -> Result<Arc<dyn Store>> {
    if !url.contains("://") {
        return Ok(Arc::new(local::LocalStore::open(&PathBuf::from(url))?));
    }
    let parsed =
        Url::parse(url).map_err(|e| RepoError::Invalid(format!("{url:?} is not a URL: {e}")))?;
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(RepoError::Invalid(
            "credentials do not belong into a store's URL; use a credentials file or the environment"
                .into(),
        ));
    }
    match parsed.scheme() {
        "file" => {
            let path = parsed.to_file_path().map_err(|()| {
                RepoError::Invalid(format!("{url:?} names no folder; write file:///path"))
            })?;
            Ok(Arc::new(local::LocalStore::open(&path)?))
        }
        "s3" => Ok(Arc::new(s3::S3Store::open(&parsed, credentials)?)),
        other => Err(RepoError::Invalid(format!(
            "{other:?} is no kind of store; use file:///path or s3://bucket/prefix?endpoint=…"
        ))),
    }
}

/// Refuses keys that could leave the store or upset a file system. Keys are made by this crate or
/// listed by a store; neither is taken on trust.
fn check_key(key: &str) -> Result<()> {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if key.len() <= 512 && key.split('/').all(plain) {
        return Ok(());
    }
    Err(RepoError::Invalid(format!("{key:?} is not an object key")))
}
