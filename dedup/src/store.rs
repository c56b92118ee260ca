//! Object stores: local folders and S3-compatible services behind one small interface.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::Result;

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
    /// Size of an object.
    async fn size(&self, key: &str) -> Result<u64>;
    /// All objects whose key begins with `prefix`, by key.
    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>>;
    /// Deletes an object; a missing one is no error.
    async fn delete(&self, key: &str) -> Result<()>;
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
pub fn open_store(_url: &str, _credentials: &StoreCredentials) -> Result<Arc<dyn Store>> {
    todo!()
}
