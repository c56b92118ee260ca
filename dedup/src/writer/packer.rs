//! From new chunks and pages to durable packs and index segments, bounded in memory: one pack is
//! filled while at most one other is uploaded.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::WriteStats;
use crate::error::{RepoError, Result};
use crate::frame::{self, CHUNK_LEN, Content, FRAME_CHUNKS, FRAME_PAGES, FrameInfo};
use crate::id::{BlobId, random};
use crate::index::SEGMENT_TARGET_LEN;
use crate::object::{HEADER_LEN, Header, Kind, Sealer, Section, TAG_LEN};
use crate::pack::{FOOTER_LEN, MAX_FRAMES, PackInfo, encode_entry, entry_len};
use crate::pool::{self, Job, block_on};
use crate::repo::Inner;

/// Frames being compressed at once, besides what the workers hold.
const SPARE_FRAMES: usize = 2;

/// Blobs gathering into a frame.
struct Gathering {
    content: Content,
    full: usize,
    raw: Vec<u8>,
    ids: Vec<BlobId>,
}

impl Gathering {
    fn new(content: Content, full: usize) -> Self {
        Self { content, full, raw: Vec::new(), ids: Vec::new() }
    }

    fn add(&mut self, id: BlobId, blob: &[u8]) {
        if self.raw.capacity() == 0 && self.content == Content::Chunks {
            // Room for the tag too, so that incompressible frames are encrypted where they are.
            self.raw.reserve_exact(FRAME_CHUNKS * CHUNK_LEN + TAG_LEN);
        }
        self.raw.extend_from_slice(blob);
        self.ids.push(id);
    }
}

/// A frame on its way through the pool.
struct InFlight {
    content: Content,
    raw: u32,
    ids: Vec<BlobId>,
    job: Job<Result<(u8, Vec<u8>)>>,
}

/// The pack that is being filled.
struct OpenPack {
    header: Header,
    sealer: Arc<Sealer>,
    parts: Vec<Bytes>,
    len: u64,
    hash: blake3::Hasher,
    frames: Vec<FrameInfo>,
    ids: Vec<Vec<BlobId>>,
    /// In the order of their numbers.
    in_flight: VecDeque<InFlight>,
}

impl OpenPack {
    fn new(inner: &Inner) -> Result<Self> {
        let header = Header::new(Kind::Pack, inner.id, random()?)?;
        let mut pack = Self {
            sealer: Arc::new(Sealer::new(&inner.keys, &header)?),
            header,
            parts: Vec::new(),
            len: 0,
            hash: blake3::Hasher::new(),
            frames: Vec::new(),
            ids: Vec::new(),
            in_flight: VecDeque::new(),
        };
        pack.push(Bytes::copy_from_slice(&header.encode()));
        Ok(pack)
    }

    fn push(&mut self, part: Bytes) {
        self.len += part.len() as u64;
        self.hash.update(&part);
        self.parts.push(part);
    }

    /// Number of frames, those in flight included.
    fn count(&self) -> u32 {
        (self.frames.len() + self.in_flight.len()) as u32
    }

    /// Takes finished frames in, in order, until at most `limit` are in flight.
    fn settle(&mut self, limit: usize) -> Result<()> {
        while self.in_flight.len() > limit {
            let Some(done) = self.in_flight.pop_front() else { break };
            let (codec, stored) = done.job.wait()??;
            self.frames.push(FrameInfo {
                offset: self.len as u32,
                stored: stored.len() as u32,
                raw: done.raw,
                blobs: done.ids.len() as u16,
                content: done.content,
                codec,
            });
            self.ids.push(done.ids);
            self.push(stored.into());
        }
        Ok(())
    }

    /// Adds index and footer. The entry says what the index segment will say too.
    fn close(mut self) -> Result<ClosedPack> {
        self.settle(0)?;
        let blobs = self.ids.iter().map(Vec::len).sum();
        let index_len = entry_len(self.frames.len(), blobs) + TAG_LEN;
        let info = PackInfo {
            header: self.header,
            len: self.len + (index_len + FOOTER_LEN) as u64,
            frames: std::mem::take(&mut self.frames),
        };
        let entry = encode_entry(&info, &self.ids);
        let mut tail = entry.clone();
        self.sealer.seal(Section::PackIndex, 0, &mut tail)?;
        tail.extend_from_slice(&(index_len as u32).to_le_bytes());
        tail.extend_from_slice(&(info.frames.len() as u32).to_le_bytes());
        self.push(tail.into());
        let hash = self.hash.finalize();
        self.push(Bytes::copy_from_slice(hash.as_bytes()));
        debug_assert_eq!(self.len, info.len);
        Ok(ClosedPack { key: info.key(), len: info.len, entry, parts: self.parts })
    }
}

struct ClosedPack {
    key: String,
    len: u64,
    entry: Vec<u8>,
    parts: Vec<Bytes>,
}

/// A pack on its way to the store.
struct Upload {
    task: JoinHandle<Result<()>>,
    len: u64,
    entry: Vec<u8>,
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// See the module.
pub(super) struct Packer {
    inner: Arc<Inner>,
    level: i32,
    chunks: Gathering,
    leaves: Gathering,
    uppers: Gathering,
    pack: Option<OpenPack>,
    upload: Option<Upload>,
    /// Entries of durable packs that no segment describes yet.
    entries: Vec<Vec<u8>>,
    /// Blobs of this run that are not in the index yet. They count as known to this run alone: it
    /// commits only if all its packs became durable.
    pending: HashSet<BlobId>,
    /// Set by the first failure: from then on this run can never be committed.
    failed: bool,
    pub(super) stats: WriteStats,
}

impl Packer {
    pub(super) fn new(inner: Arc<Inner>, level: i32) -> Self {
        Self {
            inner,
            level,
            chunks: Gathering::new(Content::Chunks, FRAME_CHUNKS),
            leaves: Gathering::new(Content::Pages, FRAME_PAGES),
            uppers: Gathering::new(Content::Pages, FRAME_PAGES),
            pack: None,
            upload: None,
            entries: Vec::new(),
            pending: HashSet::new(),
            failed: false,
            stats: WriteStats::default(),
        }
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Runs a step; when it fails, the run is over. Nothing that a failed step may have left
    /// half-done (ids taken for known, pages not stored) can then reach a manifest.
    pub(super) fn step<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.failed {
            return Err(RepoError::Invalid(
                "this restore point failed to be written before; begin a new one".into(),
            ));
        }
        let result = step(self);
        self.failed = result.is_err();
        result
    }

    /// Whether a blob need not be stored.
    pub(super) fn knows(&self, id: &BlobId) -> bool {
        self.pending.contains(id) || self.is_durable(id)
    }

    /// Whether a durable, indexed pack holds a blob.
    pub(super) fn is_durable(&self, id: &BlobId) -> bool {
        self.inner.index.read().contains(id)
    }

    /// Whether a blob is on its way in this run.
    pub(super) fn is_pending(&self, id: &BlobId) -> bool {
        self.pending.contains(id)
    }

    /// Stores a new chunk.
    pub(super) fn put_chunk(&mut self, id: BlobId, chunk: &[u8]) -> Result<()> {
        self.stats.new_bytes += chunk.len() as u64;
        self.pending.insert(id);
        self.chunks.add(id, chunk);
        if self.chunks.ids.len() < self.chunks.full {
            return Ok(());
        }
        let full =
            std::mem::replace(&mut self.chunks, Gathering::new(Content::Chunks, FRAME_CHUNKS));
        self.submit(full)
    }

    /// Stores a new page. Leaves and upper pages gather apart: whoever reads a leaf wants the next
    /// one, whoever reads an upper page its neighbours.
    pub(super) fn put_page(&mut self, level: u8, id: BlobId, page: &[u8]) -> Result<()> {
        self.pending.insert(id);
        let gathering = if level == 1 { &mut self.leaves } else { &mut self.uppers };
        gathering.add(id, page);
        if gathering.ids.len() < gathering.full {
            return Ok(());
        }
        let full = std::mem::replace(gathering, Gathering::new(Content::Pages, FRAME_PAGES));
        self.submit(full)
    }

    fn submit(&mut self, frame: Gathering) -> Result<()> {
        if frame.ids.is_empty() {
            return Ok(());
        }
        if self.pack.is_none() {
            self.pack = Some(OpenPack::new(&self.inner)?);
        }
        let Some(pack) = &mut self.pack else { return Ok(()) };
        pack.settle(pool::workers() + SPARE_FRAMES - 1)?;
        let number = pack.count();
        let target = self.inner.pack_target.load(Ordering::Relaxed);
        let (sealer, level, raw_len) = (pack.sealer.clone(), self.level, frame.raw.len() as u32);
        let raw = frame.raw;
        let job = pool::spawn(move || frame::encode(&sealer, number, raw, level));
        let content = frame.content;
        pack.in_flight.push_back(InFlight { content, raw: raw_len, ids: frame.ids, job });
        if pack.len >= target || pack.count() >= MAX_FRAMES - 1 {
            self.close_pack()?;
        }
        Ok(())
    }

    fn close_pack(&mut self) -> Result<()> {
        let Some(pack) = self.pack.take() else { return Ok(()) };
        let pack = pack.close()?;
        self.finish_upload()?;
        let (store, len, entry) = (self.inner.store.clone(), pack.len, pack.entry);
        let (key, parts) = (pack.key, pack.parts);
        let task = pool::runtime().spawn(async move { store.create_parts(&key, parts).await });
        self.upload = Some(Upload { task, len, entry });
        Ok(())
    }

    /// Waits until the pack that is being uploaded is durable.
    fn finish_upload(&mut self) -> Result<()> {
        let Some(mut upload) = self.upload.take() else { return Ok(()) };
        pool::joined(block_on(&mut upload.task))?;
        self.stats.stored_bytes += upload.len;
        self.stats.objects += 1;
        self.entries.push(std::mem::take(&mut upload.entry));
        let waiting: usize = self.entries.iter().map(Vec::len).sum();
        if waiting >= SEGMENT_TARGET_LEN { self.write_segment() } else { Ok(()) }
    }

    /// Describes durable packs in a segment; only then may other runs build on them.
    fn write_segment(&mut self) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        self.stats.stored_bytes += self.inner.write_segment(&self.entries)?;
        self.stats.objects += 1;
        self.entries.clear();
        let index = self.inner.index.read();
        self.pending.retain(|id| !index.contains(id));
        Ok(())
    }

    /// Makes everything durable and known.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.step(|this| {
            for (content, full, which) in [
                (Content::Chunks, FRAME_CHUNKS, 0),
                (Content::Pages, FRAME_PAGES, 1),
                (Content::Pages, FRAME_PAGES, 2),
            ] {
                let gathering = match which {
                    0 => &mut this.chunks,
                    1 => &mut this.leaves,
                    _ => &mut this.uppers,
                };
                let rest = std::mem::replace(gathering, Gathering::new(content, full));
                this.submit(rest)?;
            }
            this.close_pack()?;
            this.finish_upload()?;
            this.write_segment()?;
            let (bytes, objects) = this.inner.describe_adopted()?;
            this.stats.stored_bytes += bytes;
            this.stats.objects += objects;
            Ok(())
        })
    }
}

const _: () = assert!(HEADER_LEN == 88);
