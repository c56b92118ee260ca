//! The `config` object: what kind of repository this is. Readable without a key, authenticated with
//! one. There is one per repository, made by a conditional create: that is the repository's birth.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::bytes::Fields;
use crate::error::{RepoError, Result};
use crate::key::Keys;
use crate::object::{VERSION, append_hash, check_hash, check_version, damaged};

/// Its key.
pub(crate) const KEY: &str = "config";
const MAGIC: &[u8; 8] = b"TIDECONF";
const HEAD_LEN: usize = 8 + 4 + 4;
const MAC_LEN: usize = 32;

/// The readable part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    /// Identity, bound into every object.
    pub(crate) repository: Uuid,
    /// When it was made, RFC 3339.
    pub(crate) created: String,
    /// Bytes of a chunk; 65,536 in version 1.
    pub(crate) chunk_size: u64,
    /// What a program must know to read it. Unknown ones stop it.
    pub(crate) required_features: Vec<String>,
    /// What a program may ignore.
    pub(crate) optional_features: Vec<String>,
}

impl Config {
    /// A new repository.
    pub(crate) fn new() -> Self {
        Self {
            repository: Uuid::new_v4(),
            created: jiff::Timestamp::now().to_string(),
            chunk_size: crate::CHUNK,
            required_features: Vec::new(),
            optional_features: Vec::new(),
        }
    }

    /// The object: magic, version, length of the JSON, JSON, keyed hash, hash.
    pub(crate) fn seal(&self, keys: &Keys) -> Result<Vec<u8>> {
        let json = serde_json::to_vec(self)
            .map_err(|e| RepoError::Invalid(format!("the configuration: {e}")))?;
        let mut object = MAGIC.to_vec();
        object.extend_from_slice(&VERSION.to_le_bytes());
        object.extend_from_slice(&(json.len() as u32).to_le_bytes());
        object.extend_from_slice(&json);
        let mac = blake3::keyed_hash(&keys.config, &object);
        object.extend_from_slice(mac.as_bytes());
        append_hash(&mut object);
        Ok(object)
    }

    /// Reads it; [`Config::authenticate`] follows as soon as there is a key.
    pub(crate) fn parse(store: &str, object: &[u8]) -> Result<Self> {
        let body = check_hash(KEY, object)?;
        let mut fields = Fields::new(body);
        if fields.array::<8>().as_ref() != Some(MAGIC) {
            return Err(damaged(KEY, "not a repository configuration"));
        }
        let bad = || damaged(KEY, "malformed");
        check_version(store, fields.u32().ok_or_else(bad)?)?;
        let len = fields.u32().ok_or_else(bad)? as usize;
        let json = fields.take(len).ok_or_else(bad)?;
        if fields.rest().len() != MAC_LEN {
            return Err(bad());
        }
        let config: Self =
            serde_json::from_slice(json).map_err(|e| damaged(KEY, format!("malformed: {e}")))?;
        if let Some(feature) = config.required_features.first() {
            return Err(RepoError::UnknownFeature {
                store: store.to_owned(),
                feature: feature.clone(),
            });
        }
        if config.chunk_size != crate::CHUNK {
            return Err(damaged(KEY, format!("impossible chunk size {}", config.chunk_size)));
        }
        Ok(config)
    }

    /// Checks that a holder of the key wrote this object.
    pub(crate) fn authenticate(keys: &Keys, object: &[u8]) -> Result<()> {
        let body = check_hash(KEY, object)?;
        let at = body.len().checked_sub(MAC_LEN).filter(|at| *at >= HEAD_LEN);
        let (signed, mac) = body.split_at(at.ok_or_else(|| damaged(KEY, "malformed"))?);
        let mac: [u8; MAC_LEN] = mac.try_into().map_err(|_| damaged(KEY, "malformed"))?;
        // Compared in constant time by the type.
        if blake3::keyed_hash(&keys.config, signed) != blake3::Hash::from_bytes(mac) {
            return Err(damaged(KEY, "not written by a holder of this repository's key"));
        }
        Ok(())
    }
}
