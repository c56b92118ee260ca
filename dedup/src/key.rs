//! The master key, what is derived from it, and the key objects that wrap it.

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::Passphrase;
use crate::bytes::Fields;
use crate::error::{RepoError, Result};
use crate::id::{hex, random};
use crate::object::{HASH_LEN, TAG_LEN, VERSION, append_hash, check_hash, check_version, damaged};

const MAGIC: &[u8; 8] = b"TIDEKEYS";
const KDF_ARGON2ID: u32 = 1;
/// Magic, version, flags, repository, key id, KDF and its three costs, salt.
const HEAD_LEN: usize = 8 + 4 + 4 + 16 + 16 + 16 + 32;
const KEY_OBJECT_LEN: usize = HEAD_LEN + 32 + TAG_LEN + HASH_LEN;

/// Cost of deriving a key from a passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KdfCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over the memory.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for KdfCost {
    /// 64 MiB, 3 passes, 1 lane: RFC 9106's second recommendation, with one lane because the
    /// derivation runs on one thread here.
    fn default() -> Self {
        Self { memory_kib: 64 * 1024, passes: 3, lanes: 1 }
    }
}

impl KdfCost {
    /// Worth nothing against guessing; for tests.
    pub const CHEAP: Self = Self { memory_kib: 8, passes: 1, lanes: 1 };

    /// Bounds on what a key object may ask for, so that a hostile one cannot make the reader
    /// allocate gigabytes or compute for hours.
    fn acceptable(self) -> bool {
        (8..=256 * 1024).contains(&self.memory_kib)
            && (1..=16).contains(&self.passes)
            && (1..=16).contains(&self.lanes)
            && self.memory_kib >= 8 * self.lanes
    }
}

/// Keys derived from the master key, one for each purpose.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(crate) struct Keys {
    master: [u8; 32],
    /// Ids of chunks.
    pub(crate) chunk_id: [u8; 32],
    /// Ids of map pages.
    pub(crate) page_id: [u8; 32],
    /// Parent of pack keys.
    pub(crate) pack: [u8; 32],
    /// Parent of index-segment keys.
    pub(crate) index: [u8; 32],
    /// Parent of manifest keys.
    pub(crate) manifest: [u8; 32],
    /// Authenticates the configuration.
    pub(crate) config: [u8; 32],
}

impl Keys {
    /// A new random master key.
    pub(crate) fn generate() -> Result<Self> {
        Ok(Self::derive(&Zeroizing::new(random::<32>()?)))
    }

    fn derive(master: &[u8; 32]) -> Self {
        let sub = |context: &str| blake3::derive_key(context, master);
        Self {
            master: *master,
            chunk_id: sub("tidemark repository v1: chunk id"),
            page_id: sub("tidemark repository v1: page id"),
            pack: sub("tidemark repository v1: pack"),
            index: sub("tidemark repository v1: index segment"),
            manifest: sub("tidemark repository v1: manifest"),
            config: sub("tidemark repository v1: config"),
        }
    }

    /// Wraps the master key for a passphrase: name and content of the key object.
    pub(crate) fn wrap(
        &self,
        repository: &[u8; 16],
        passphrase: &Passphrase,
        cost: KdfCost,
    ) -> Result<(String, Vec<u8>)> {
        if !cost.acceptable() {
            return Err(RepoError::Invalid(format!(
                "key derivation cost {cost:?} is out of bounds"
            )));
        }
        let id: [u8; 16] = random()?;
        let salt: [u8; 32] = random()?;
        let mut object = Vec::with_capacity(KEY_OBJECT_LEN);
        object.extend_from_slice(MAGIC);
        for field in [VERSION, 0] {
            object.extend_from_slice(&field.to_le_bytes());
        }
        object.extend_from_slice(repository);
        object.extend_from_slice(&id);
        for field in [KDF_ARGON2ID, cost.memory_kib, cost.passes, cost.lanes] {
            object.extend_from_slice(&field.to_le_bytes());
        }
        object.extend_from_slice(&salt);
        let key = wrapping_key(passphrase, &salt, cost)?;
        let mut wrapped = Zeroizing::new(self.master.to_vec());
        // The salt is new for every wrapping, so the key is, so the one nonce never repeats.
        key.seal_in_place_append_tag(zero_nonce(), Aad::from(&object[..]), &mut *wrapped)
            .map_err(|_| RepoError::Invalid("encrypting the master key failed".into()))?;
        object.extend_from_slice(&wrapped);
        append_hash(&mut object);
        Ok((format!("keys/{}", hex(&id)), object))
    }
}

/// What a key object turned out to be.
pub(crate) enum Unwrapped {
    /// It opened.
    Keys(Box<Keys>),
    /// Intact, but of another passphrase.
    OtherPassphrase,
    /// Intact, but of another repository: left behind by a creation that another one overtook.
    OtherRepository,
}

/// Tries a passphrase on a key object. Damage is told by the object's own hash, a wrong passphrase by
/// the cipher.
pub(crate) fn unwrap(
    store: &str,
    key: &str,
    object: &[u8],
    repository: &[u8; 16],
    passphrase: &Passphrase,
) -> Result<Unwrapped> {
    let body = check_hash(key, object)?;
    let bad = || damaged(key, "malformed key object");
    let mut fields = Fields::new(body);
    if fields.array::<8>().as_ref() != Some(MAGIC) {
        return Err(damaged(key, "not a key object"));
    }
    check_version(store, fields.u32().ok_or_else(bad)?)?;
    let flags = fields.u32().ok_or_else(bad)?;
    let owner: [u8; 16] = fields.array().ok_or_else(bad)?;
    let _id: [u8; 16] = fields.array().ok_or_else(bad)?;
    let mut number = || fields.u32().ok_or_else(bad);
    let kdf = number()?;
    let cost = KdfCost { memory_kib: number()?, passes: number()?, lanes: number()? };
    let salt: [u8; 32] = fields.array().ok_or_else(bad)?;
    if owner != *repository {
        return Ok(Unwrapped::OtherRepository);
    }
    if flags != 0 || kdf != KDF_ARGON2ID || !cost.acceptable() || body.len() != HEAD_LEN + 48 {
        return Err(damaged(key, "key derivation parameters out of bounds"));
    }
    let (head, wrapped) = body.split_at(HEAD_LEN);
    let kek = wrapping_key(passphrase, &salt, cost)?;
    let mut wrapped = Zeroizing::new(wrapped.to_vec());
    let Ok(plain) = kek.open_in_place(zero_nonce(), Aad::from(head), &mut wrapped) else {
        return Ok(Unwrapped::OtherPassphrase);
    };
    let master = Zeroizing::new(<[u8; 32]>::try_from(&*plain).map_err(|_| bad())?);
    Ok(Unwrapped::Keys(Box::new(Keys::derive(&master))))
}

fn zero_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

fn wrapping_key(passphrase: &Passphrase, salt: &[u8; 32], cost: KdfCost) -> Result<LessSafeKey> {
    let fail = |e: argon2::Error| RepoError::Invalid(format!("key derivation failed: {e}"));
    let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).map_err(fail)?;
    let mut kek = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase.0.as_bytes(), salt, &mut *kek)
        .map_err(fail)?;
    aes_key(&kek)
}

/// An AES-256-GCM key.
pub(crate) fn aes_key(key: &[u8; 32]) -> Result<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, key)
        .map(LessSafeKey::new)
        .map_err(|_| RepoError::Invalid("AES-256-GCM is not available".into()))
}
