//! What all objects have in common: a header, a key of their own, a hash at the end.
//!
//! The first eight bytes of any object are its magic, the next four its version; the last 32 are the
//! BLAKE3 hash of everything before, so that a copy can be scrubbed without a key. These three hold
//! for every future version.

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};

use crate::bytes::Fields;
use crate::codec;
use crate::error::{RepoError, Result};
use crate::id::random;
use crate::key::{Keys, aes_key};

/// Format version that is written, and the newest that is read.
pub(crate) const VERSION: u32 = 1;
/// Length of [`Header`].
pub(crate) const HEADER_LEN: usize = 88;
/// Length of the hash at every object's end.
pub(crate) const HASH_LEN: usize = 32;
/// What encryption adds.
pub(crate) const TAG_LEN: usize = 16;

/// Kinds of encrypted objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Pack,
    Index,
    Manifest,
}

impl Kind {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Self::Pack => b"TIDEPACK",
            Self::Index => b"TIDEINDX",
            Self::Manifest => b"TIDEPOIN",
        }
    }

    fn parent_key(self, keys: &Keys) -> &[u8; 32] {
        match self {
            Self::Pack => &keys.pack,
            Self::Index => &keys.index,
            Self::Manifest => &keys.manifest,
        }
    }
}

/// Parts of an object that are encrypted each by itself; the first half of the nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Section {
    Frame = 0,
    PackIndex = 1,
    Body = 2,
}

/// The first bytes of an encrypted object. Its key is derived from all of them, so none can be
/// changed or moved to another object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) repository: [u8; 16],
    pub(crate) object: [u8; 16],
    salt: [u8; 32],
    /// Pack: generation (for garbage collection). Segment: epoch (for merging). 0 for now.
    pub(crate) generation: u64,
}

impl Header {
    /// A header with a new salt.
    pub(crate) fn new(kind: Kind, repository: [u8; 16], object: [u8; 16]) -> Result<Self> {
        Ok(Self { kind, repository, object, salt: random()?, generation: 0 })
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..8].copy_from_slice(self.kind.magic());
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        // 12..16: flags, none yet.
        out[16..32].copy_from_slice(&self.repository);
        out[32..48].copy_from_slice(&self.object);
        out[48..80].copy_from_slice(&self.salt);
        out[80..].copy_from_slice(&self.generation.to_le_bytes());
        out
    }

    /// Reads a header that must be of this kind and repository.
    pub(crate) fn parse(
        store: &str,
        key: &str,
        kind: Kind,
        repository: &[u8; 16],
        bytes: &[u8],
    ) -> Result<Self> {
        let bad = || damaged(key, "the object is shorter than its header");
        let mut fields = Fields::new(bytes);
        if fields.array::<8>().ok_or_else(bad)? != *kind.magic() {
            return Err(damaged(key, format!("not an object of kind {kind:?}")));
        }
        check_version(store, fields.u32().ok_or_else(bad)?)?;
        if fields.u32().ok_or_else(bad)? != 0 {
            return Err(damaged(key, "unknown flags"));
        }
        let header = Self {
            kind,
            repository: fields.array().ok_or_else(bad)?,
            object: fields.array().ok_or_else(bad)?,
            salt: fields.array().ok_or_else(bad)?,
            generation: fields.u64().ok_or_else(bad)?,
        };
        if header.repository != *repository {
            return Err(damaged(key, "the object belongs to another repository"));
        }
        Ok(header)
    }
}

/// Encrypts and decrypts one object's sections.
pub(crate) struct Sealer {
    key: LessSafeKey,
    header: [u8; HEADER_LEN],
}

impl Sealer {
    pub(crate) fn new(keys: &Keys, header: &Header) -> Result<Self> {
        let bytes = header.encode();
        let key = zeroize::Zeroizing::new(
            *blake3::keyed_hash(header.kind.parent_key(keys), &bytes).as_bytes(),
        );
        Ok(Self { key: aes_key(&key)?, header: bytes })
    }

    /// The nonce is (section, number): unique under a key that no other object has.
    fn nonce(section: Section, number: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&(section as u32).to_le_bytes());
        nonce[4..].copy_from_slice(&number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    fn aad(&self, section: Section, number: u64) -> [u8; HEADER_LEN + 12] {
        let mut aad = [0; HEADER_LEN + 12];
        aad[..HEADER_LEN].copy_from_slice(&self.header);
        aad[HEADER_LEN..HEADER_LEN + 4].copy_from_slice(&(section as u32).to_le_bytes());
        aad[HEADER_LEN + 4..].copy_from_slice(&number.to_le_bytes());
        aad
    }

    /// Encrypts in place and appends the tag. Never call it twice for the same section and number.
    pub(crate) fn seal(&self, section: Section, number: u64, data: &mut Vec<u8>) -> Result<()> {
        let aad = Aad::from(self.aad(section, number));
        self.key
            .seal_in_place_append_tag(Self::nonce(section, number), aad, data)
            .map_err(|_| RepoError::Invalid("encryption failed".into()))
    }

    /// Decrypts; `None` when anything was changed.
    pub(crate) fn open(&self, section: Section, number: u64, data: &[u8]) -> Option<Vec<u8>> {
        let mut data = data.to_vec();
        let aad = Aad::from(self.aad(section, number));
        let len = self.key.open_in_place(Self::nonce(section, number), aad, &mut data).ok()?.len();
        data.truncate(len);
        Some(data)
    }
}

/// A whole object of one encrypted body.
pub(crate) fn seal_body(
    keys: &Keys,
    header: &Header,
    payload: &[u8],
    level: i32,
) -> Result<Vec<u8>> {
    let mut body = Vec::with_capacity(payload.len() + HEADER_LEN + TAG_LEN + HASH_LEN + 8);
    let len = u32::try_from(payload.len())
        .map_err(|_| RepoError::Invalid("an object of 4 GiB or more is not possible".into()))?;
    let packed = codec::compress(payload, level)?;
    body.push(packed.codec);
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(packed.bytes(payload));
    Sealer::new(keys, header)?.seal(Section::Body, 0, &mut body)?;
    let mut object = header.encode().to_vec();
    object.append(&mut body);
    append_hash(&mut object);
    Ok(object)
}

/// Checks and decrypts a whole object of one body, of at most `limit` bytes.
pub(crate) fn open_body(
    keys: &Keys,
    store: &str,
    key: &str,
    kind: Kind,
    repository: &[u8; 16],
    object: &[u8],
    limit: usize,
) -> Result<(Header, Vec<u8>)> {
    let body = check_hash(key, object)?;
    let header = Header::parse(store, key, kind, repository, body)?;
    let plain = Sealer::new(keys, &header)?
        .open(Section::Body, 0, &body[HEADER_LEN..])
        .ok_or_else(|| damaged(key, "decryption failed"))?;
    let mut fields = Fields::new(&plain);
    let (Some(codec), Some(len)) = (fields.u8(), fields.u32()) else {
        return Err(damaged(key, "no body"));
    };
    if len as usize > limit {
        return Err(damaged(key, "the body claims to be larger than the format allows"));
    }
    let payload = codec::expand(codec, fields.rest(), len as usize)
        .ok_or_else(|| damaged(key, "decompression failed"))?;
    Ok((header, payload))
}

/// Appends the BLAKE3 hash of everything before.
pub(crate) fn append_hash(object: &mut Vec<u8>) {
    let hash = blake3::hash(object);
    object.extend_from_slice(hash.as_bytes());
}

/// Checks the hash at the end of an object and gives what is before it.
pub(crate) fn check_hash<'a>(key: &str, object: &'a [u8]) -> Result<&'a [u8]> {
    let Some(at) = object.len().checked_sub(HASH_LEN) else {
        return Err(damaged(key, "the object is cut short"));
    };
    let (body, hash) = object.split_at(at);
    if blake3::hash(body).as_bytes() != hash {
        return Err(damaged(key, "the content does not match its hash"));
    }
    Ok(body)
}

/// Refuses versions that this program does not know.
pub(crate) fn check_version(store: &str, version: u32) -> Result<()> {
    if version == VERSION {
        return Ok(());
    }
    Err(RepoError::TooNew { store: store.to_owned(), version, supported: VERSION })
}

/// An error that names a damaged object.
pub(crate) fn damaged(key: &str, what: impl Into<String>) -> RepoError {
    RepoError::Damaged { key: key.to_owned(), what: what.into() }
}
