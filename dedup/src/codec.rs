//! zstd, with contexts kept per thread, and bounded expansion.

use std::cell::RefCell;

use crate::error::{RepoError, Result};

/// Stored as it is.
pub(crate) const RAW: u8 = 0;
/// One zstd frame (RFC 8878), no dictionary.
pub(crate) const ZSTD: u8 = 1;

/// Result of a compression: data that does not shrink stays raw.
pub(crate) struct Packed {
    pub(crate) codec: u8,
    data: Option<Vec<u8>>,
}

impl Packed {
    /// The bytes to store; `raw` is what was compressed.
    pub(crate) fn bytes<'a>(&'a self, raw: &'a [u8]) -> &'a [u8] {
        self.data.as_deref().unwrap_or(raw)
    }

    /// The bytes to store, owned.
    pub(crate) fn unwrap_or(self, raw: Vec<u8>) -> Vec<u8> {
        self.data.unwrap_or(raw)
    }
}

thread_local! {
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> =
        const { RefCell::new(None) };
    static EXPANDER: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

/// Compresses if that saves at least 1/64.
pub(crate) fn compress(raw: &[u8], level: i32) -> Result<Packed> {
    let fail = |e: std::io::Error| RepoError::Invalid(format!("zstd: {e}"));
    COMPRESSOR.with_borrow_mut(|slot| {
        let compressor = match slot {
            Some((have, compressor)) => {
                if *have != level {
                    compressor.set_compression_level(level).map_err(fail)?;
                    *have = level;
                }
                compressor
            }
            None => &mut slot.insert((level, zstd::bulk::Compressor::new(level).map_err(fail)?)).1,
        };
        let mut data = Vec::with_capacity(zstd::zstd_safe::compress_bound(raw.len()));
        let len = compressor.compress_to_buffer(raw, &mut data).map_err(fail)?;
        if len >= raw.len() - raw.len() / 64 {
            return Ok(Packed { codec: RAW, data: None });
        }
        data.shrink_to(len + 64);
        Ok(Packed { codec: ZSTD, data: Some(data) })
    })
}

/// Expands to exactly `len` bytes, or gives nothing. The caller has bounded `len`.
pub(crate) fn expand(codec: u8, data: &[u8], len: usize) -> Option<Vec<u8>> {
    match codec {
        RAW => (data.len() == len).then(|| data.to_vec()),
        ZSTD => EXPANDER.with_borrow_mut(|slot| {
            let expander = match slot {
                Some(expander) => expander,
                None => slot.insert(zstd::bulk::Decompressor::new().ok()?),
            };
            let raw = expander.decompress(data, len).ok()?;
            (raw.len() == len).then_some(raw)
        }),
        _ => None,
    }
}
