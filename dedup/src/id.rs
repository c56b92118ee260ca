//! Ids of chunks and map pages: keyed, so that they say nothing about content to whoever has no key.

use std::fmt;

/// Length of an id in bytes.
///
/// 128 bits: among 2^37 chunks (8 PiB of distinct data) two different ones share an id with
/// probability 2^-55, and 16 bytes instead of 32 halve disk maps and index. Ids are keyed, so a guest
/// that wants a collision must guess 2^64 chunks online; whoever knows the key may write anything
/// anyway.
pub(crate) const ID_LEN: usize = 16;

/// Id of a chunk or of a map page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct BlobId(pub(crate) [u8; ID_LEN]);

impl BlobId {
    /// Stands for zeros: no chunk, no page.
    pub(crate) const NONE: Self = Self([0; ID_LEN]);

    /// Keyed BLAKE3 of `data`, cut to [`ID_LEN`].
    pub(crate) fn of(key: &[u8; 32], data: &[u8]) -> Self {
        let hash = blake3::keyed_hash(key, data);
        let mut id = [0; ID_LEN];
        id.copy_from_slice(&hash.as_bytes()[..ID_LEN]);
        Self(id)
    }

    /// Whether it stands for zeros.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Reads the hexadecimal form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        hex_decode::<ID_LEN>(text).map(Self)
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

/// Reads exactly `N` bytes of lower-case hexadecimal.
pub(crate) fn hex_decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

/// Bytes nobody can guess.
pub(crate) fn random<const N: usize>() -> crate::error::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| {
        crate::error::RepoError::Invalid(format!("no random numbers from the system: {e}"))
    })?;
    Ok(bytes)
}
