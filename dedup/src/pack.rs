//! Packs: immutable objects of frames, ending in their own index.
//!
//! ```text
//! header (88) | frame 0 | frame 1 | … | index, encrypted | index length u32 | frames u32 | BLAKE3 (32)
//! ```

use crate::bytes::Fields;
use crate::codec;
use crate::error::Result;
use crate::frame::{CHUNK_LEN, Content, FrameInfo, MAX_BLOBS, MAX_RAW};
use crate::id::{BlobId, ID_LEN, hex};
use crate::map::{MAX_PAGE_LEN, MIN_PAGE_LEN};
use crate::object::{HASH_LEN, HEADER_LEN, Header, Kind, TAG_LEN, damaged};

/// A pack is closed when it has grown to this; frames in flight then go over it by a little.
pub(crate) const TARGET_LEN: u64 = 64 << 20;
/// Readers refuse larger packs.
pub(crate) const MAX_LEN: u64 = 256 << 20;
/// Readers refuse packs of more frames; writers close a pack before.
pub(crate) const MAX_FRAMES: u32 = 1 << 14;
/// Index length, number of frames, hash.
pub(crate) const FOOTER_LEN: usize = 4 + 4 + HASH_LEN;
/// Content, codec, number of blobs, stored and raw length.
const FRAME_ENTRY_LEN: usize = 1 + 1 + 2 + 4 + 4;
/// Header, length of the pack, number of frames.
const PACK_ENTRY_LEN: usize = HEADER_LEN + 8 + 4;

/// What the index says about one pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackInfo {
    pub(crate) header: Header,
    /// Length of the whole object.
    pub(crate) len: u64,
    pub(crate) frames: Vec<FrameInfo>,
}

impl PackInfo {
    /// The object's key.
    pub(crate) fn key(&self) -> String {
        key(&self.header.object)
    }
}

/// Key of a pack: spread over folders, so that no folder of a local store grows without bound.
pub(crate) fn key(id: &[u8; 16]) -> String {
    let id = hex(id);
    format!("packs/{}/{id}", &id[..2])
}

/// A pack's entry in its own index and in index segments: the description and the ids of each frame.
pub(crate) fn encode_entry(info: &PackInfo, ids: &[Vec<BlobId>]) -> Vec<u8> {
    let blobs: usize = ids.iter().map(Vec::len).sum();
    let mut out = Vec::with_capacity(PACK_ENTRY_LEN + ids.len() * FRAME_ENTRY_LEN + blobs * ID_LEN);
    out.extend_from_slice(&info.header.encode());
    out.extend_from_slice(&info.len.to_le_bytes());
    out.extend_from_slice(&(info.frames.len() as u32).to_le_bytes());
    for (frame, ids) in info.frames.iter().zip(ids) {
        out.extend_from_slice(&[frame.content as u8, frame.codec]);
        out.extend_from_slice(&frame.blobs.to_le_bytes());
        out.extend_from_slice(&frame.stored.to_le_bytes());
        out.extend_from_slice(&frame.raw.to_le_bytes());
        ids.iter().for_each(|id| out.extend_from_slice(&id.0));
    }
    out
}

/// Length that [`encode_entry`] will give.
pub(crate) fn entry_len(frames: usize, blobs: usize) -> usize {
    PACK_ENTRY_LEN + frames * FRAME_ENTRY_LEN + blobs * ID_LEN
}

/// Reads one entry and hands each blob's id, frame and position to `each`. Every bound that later
/// reads rely on is checked here.
pub(crate) fn decode_entry(
    store: &str,
    key: &str,
    repository: &[u8; 16],
    fields: &mut Fields<'_>,
    each: &mut dyn FnMut(BlobId, u32, u8),
) -> Result<PackInfo> {
    let bad = |what: &str| damaged(key, format!("pack entry: {what}"));
    let cut = || bad("cut short");
    let header = Header::parse(
        store,
        key,
        Kind::Pack,
        repository,
        fields.take(HEADER_LEN).ok_or_else(cut)?,
    )?;
    let len = fields.u64().ok_or_else(cut)?;
    let count = fields.u32().ok_or_else(cut)?;
    if len > MAX_LEN || count > MAX_FRAMES {
        return Err(bad("larger than the format allows"));
    }
    // Every frame entry takes bytes, so the count cannot ask for more memory than there is input.
    if fields.rest().len() < count as usize * FRAME_ENTRY_LEN {
        return Err(cut());
    }
    let mut frames = Vec::with_capacity(count as usize);
    let mut offset = HEADER_LEN as u64;
    for number in 0..count {
        let info = decode_frame(fields, offset).ok_or_else(|| bad("impossible frame"))?;
        offset += u64::from(info.stored);
        if offset > len {
            return Err(bad("frames go past the pack's end"));
        }
        for position in 0..info.blobs {
            let id = BlobId(fields.array().ok_or_else(cut)?);
            each(id, number, position as u8);
        }
        frames.push(info);
    }
    Ok(PackInfo { header, len, frames })
}

fn decode_frame(fields: &mut Fields<'_>, offset: u64) -> Option<FrameInfo> {
    let content = Content::from_byte(fields.u8()?)?;
    let codec = fields.u8()?;
    let blobs = fields.u16()?;
    let stored = fields.u32()?;
    let raw = fields.u32()?;
    let (count, raw_len) = (usize::from(blobs), raw as usize);
    let fits = match content {
        Content::Chunks => raw_len == count * CHUNK_LEN,
        Content::Pages => (count * MIN_PAGE_LEN..=count * MAX_PAGE_LEN).contains(&raw_len),
    };
    // Compression is only kept when it saves something, so nothing is stored longer than raw + tag.
    let sane = (1..=MAX_BLOBS).contains(&count)
        && raw_len <= MAX_RAW
        && (TAG_LEN..=raw_len + TAG_LEN).contains(&(stored as usize))
        && matches!(codec, codec::RAW | codec::ZSTD);
    (fits && sane).then_some(FrameInfo {
        offset: u32::try_from(offset).ok()?,
        stored,
        raw,
        blobs,
        content,
        codec,
    })
}

/// The end of a pack of which `tail` is the last part: length of the encrypted index.
pub(crate) fn footer(key: &str, tail: &[u8], len: u64) -> Result<usize> {
    let start = tail.len().checked_sub(FOOTER_LEN).ok_or_else(|| damaged(key, "cut short"))?;
    let index = Fields::new(&tail[start..]).u32().unwrap_or(0) as usize;
    let room = len.saturating_sub((HEADER_LEN + FOOTER_LEN) as u64);
    if index < TAG_LEN || index as u64 > room || len > MAX_LEN {
        return Err(damaged(key, "its index length is impossible"));
    }
    Ok(index)
}
