//! Frames: up to 1 MiB of chunks or map pages, compressed together and encrypted.

use bytes::Bytes;

use crate::CHUNK;
use crate::codec;
use crate::error::Result;
use crate::id::BlobId;
use crate::key::Keys;
use crate::map::page_len;
use crate::object::{Sealer, Section};

/// Bytes of a chunk in memory.
pub(crate) const CHUNK_LEN: usize = CHUNK as usize;
/// Chunks in a full frame: 1 MiB.
pub(crate) const FRAME_CHUNKS: usize = 16;
/// Pages in a full map frame: at most 132 KiB, so that one page does not cost a long read.
pub(crate) const FRAME_PAGES: usize = 128;
/// Most blobs of any frame; positions fit a byte.
pub(crate) const MAX_BLOBS: usize = 256;
/// Most bytes of a frame before compression.
pub(crate) const MAX_RAW: usize = FRAME_CHUNKS * CHUNK_LEN;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Content {
    /// Chunks, each exactly 64 KiB.
    Chunks = 0,
    /// Map pages, whose own heads tell their lengths.
    Pages = 1,
}

impl Content {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Chunks),
            1 => Some(Self::Pages),
            _ => None,
        }
    }
}

/// A frame as it is described in an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameInfo {
    /// Where it begins in the pack; the sum of what is before it.
    pub(crate) offset: u32,
    /// Encrypted length.
    pub(crate) stored: u32,
    /// Length before compression.
    pub(crate) raw: u32,
    /// Number of blobs.
    pub(crate) blobs: u16,
    pub(crate) content: Content,
    pub(crate) codec: u8,
}

/// Compresses and encrypts a frame.
pub(crate) fn encode(
    sealer: &Sealer,
    number: u32,
    raw: Vec<u8>,
    level: i32,
) -> Result<(u8, Vec<u8>)> {
    let packed = codec::compress(&raw, level)?;
    let codec = packed.codec;
    let mut data = packed.unwrap_or(raw);
    sealer.seal(Section::Frame, u64::from(number), &mut data)?;
    Ok((codec, data))
}

/// A frame read back, with the ids that its blobs really have.
pub(crate) struct Decoded {
    data: Bytes,
    /// Id and end of each blob.
    blobs: Vec<(BlobId, u32)>,
}

impl Decoded {
    /// Decrypts, expands and hashes; the error says what failed.
    pub(crate) fn decode(
        keys: &Keys,
        sealer: &Sealer,
        number: u32,
        info: &FrameInfo,
        stored: &[u8],
    ) -> std::result::Result<Self, &'static str> {
        if stored.len() != info.stored as usize {
            return Err("cut short");
        }
        let packed =
            sealer.open(Section::Frame, u64::from(number), stored).ok_or("decryption failed")?;
        // `raw` is bounded where the index is read.
        let raw = match info.codec {
            codec::RAW if packed.len() == info.raw as usize => packed,
            codec::RAW => return Err("wrong length"),
            codec => {
                codec::expand(codec, &packed, info.raw as usize).ok_or("decompression failed")?
            }
        };
        let blobs = match info.content {
            Content::Chunks => split_chunks(keys, &raw),
            Content::Pages => split_pages(keys, &raw),
        }
        .filter(|blobs| blobs.len() == usize::from(info.blobs))
        .ok_or("its content is not what its index says")?;
        Ok(Self { data: raw.into(), blobs })
    }

    /// The blob at a position, if it has this id.
    pub(crate) fn blob(&self, position: u8, id: &BlobId) -> Option<Bytes> {
        let at = usize::from(position);
        let (found, end) = self.blobs.get(at)?;
        let start = at.checked_sub(1).map_or(0, |before| self.blobs[before].1);
        (found == id).then(|| self.data.slice(start as usize..*end as usize))
    }

    /// Neighbouring blobs from a position on, if they have these ids.
    pub(crate) fn run<'a>(
        &self,
        position: u8,
        ids: impl Iterator<Item = &'a BlobId>,
    ) -> Option<Bytes> {
        let first = usize::from(position);
        let mut at = first;
        for id in ids {
            (self.blobs.get(at)?.0 == *id).then_some(())?;
            at += 1;
        }
        let start = first.checked_sub(1).map_or(0, |before| self.blobs[before].1);
        let end = self.blobs.get(at.checked_sub(1)?)?.1;
        (start <= end).then(|| self.data.slice(start as usize..end as usize))
    }

    /// Memory it takes.
    pub(crate) fn weight(&self) -> usize {
        self.data.len() + self.blobs.len() * size_of::<(BlobId, u32)>()
    }
}

fn split_chunks(keys: &Keys, raw: &[u8]) -> Option<Vec<(BlobId, u32)>> {
    if !raw.len().is_multiple_of(CHUNK_LEN) {
        return None;
    }
    let chunks = raw.chunks_exact(CHUNK_LEN).zip(1u32..);
    Some(chunks.map(|(c, n)| (BlobId::of(&keys.chunk_id, c), n * CHUNK_LEN as u32)).collect())
}

fn split_pages(keys: &Keys, raw: &[u8]) -> Option<Vec<(BlobId, u32)>> {
    let mut pages = Vec::new();
    let mut at = 0;
    while at < raw.len() {
        let len = page_len(&raw[at..])?;
        let page = raw.get(at..at + len)?;
        at += len;
        pages.push((BlobId::of(&keys.page_id, page), u32::try_from(at).ok()?));
    }
    Some(pages)
}
