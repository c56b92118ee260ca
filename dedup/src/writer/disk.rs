//! Writing one disk: hashing runs on the pool, a few MiB ahead of the decision what is new.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::packer::Packer;
use crate::error::{RepoError, Result};
use crate::fetch::Pages;
use crate::frame::{CHUNK_LEN, FRAME_CHUNKS};
use crate::id::BlobId;
use crate::map::{MapBuilder, Page, PageSource, PageStore, Root, Walker};
use crate::pool::{self, Job};
use crate::{CHUNK, DiskRoot, WriteStats};

/// Bytes hashed or waiting to be hashed at once.
const MAX_AHEAD: usize = 16 << 20;
/// Bytes hashed in one piece of work.
const BATCH: usize = FRAME_CHUNKS * CHUNK_LEN;

/// What is to happen to the map, in order.
enum Step {
    /// Chunks from `first` on; an id for each, none for zeros.
    Data { first: u64, data: Bytes, ids: Job<Vec<BlobId>> },
    /// Chunks become zeros.
    Zero(Range<u64>),
}

/// Writes one disk. Chunks arrive in ascending order; hashing, compression, encryption and upload run
/// behind it on a pool, bounded in memory: a call blocks when the pipeline is full.
pub struct DiskWriter<'a> {
    packer: &'a mut Packer,
    pages: Pages,
    size: u64,
    base: Option<Root>,
    /// Everything below has been written or skipped.
    next: u64,
    map: MapBuilder,
    steps: VecDeque<Step>,
    ahead: usize,
}

impl std::fmt::Debug for DiskWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { size, next, .. } = self;
        f.debug_struct("DiskWriter").field("size", size).field("next", next).finish_non_exhaustive()
    }
}

/// The map's pages: read from the repository, written to the run.
struct RunPages<'a> {
    packer: &'a mut Packer,
    pages: &'a mut Pages,
}

impl PageSource for RunPages<'_> {
    fn page(&mut self, id: &BlobId, level: u8) -> Result<std::sync::Arc<Page>> {
        self.pages.page(id, level)
    }
}

impl PageStore for RunPages<'_> {
    fn put(&mut self, page: &Page) -> Result<BlobId> {
        let bytes = page.encode();
        let id = BlobId::of(&self.packer.inner().keys.page_id, &bytes);
        if !self.packer.knows(&id) {
            self.packer.put_page(page.level, id, &bytes)?;
        }
        Ok(id)
    }
}

impl<'a> DiskWriter<'a> {
    pub(super) fn new(packer: &'a mut Packer, size: u64, base: Option<Root>) -> Result<Self> {
        // A base from this same run can only be read once it is stored.
        if base.is_some_and(|base| packer.is_pending(&base.page)) {
            packer.flush()?;
        }
        let mut pages = Pages::new(packer.inner().clone());
        let map = packer.step(|packer| {
            MapBuilder::new(size, base.as_ref(), &mut RunPages { packer, pages: &mut pages })
        })?;
        Ok(Self { packer, pages, size, base, next: 0, map, steps: VecDeque::new(), ahead: 0 })
    }

    /// Sets the content at `offset` (a multiple of [`CHUNK`]) to `data` (whole chunks, or up to the end
    /// of the disk). All-zero chunks are found and not stored.
    // Taken over: the pipeline holds on to the pieces.
    #[allow(clippy::needless_pass_by_value)]
    pub fn write(&mut self, offset: u64, data: Bytes) -> Result<()> {
        let end = offset.saturating_add(data.len() as u64);
        self.claim(offset..end)?;
        self.packer.stats.read_bytes += data.len() as u64;
        let whole = data.len() / CHUNK_LEN * CHUNK_LEN;
        let mut at = 0;
        while at < whole {
            let batch = data.slice(at..(at + BATCH).min(whole));
            self.hash(offset + at as u64, batch)?;
            at += BATCH;
        }
        if whole < data.len() {
            // The disk's end: what follows within the chunk is zeros, now and when the disk grows.
            let mut last = BytesMut::zeroed(CHUNK_LEN);
            last[..data.len() - whole].copy_from_slice(&data[whole..]);
            self.hash(offset + whole as u64, last.freeze())?;
        }
        Ok(())
    }

    /// Makes the chunks of the range read as zeros.
    pub fn zero(&mut self, range: Range<u64>) -> Result<()> {
        self.claim(range.clone())?;
        self.steps.push_back(Step::Zero(range.start / CHUNK..range.end.div_ceil(CHUNK)));
        self.advance(MAX_AHEAD)
    }

    /// What has been written so far to the restore point.
    pub fn stats(&self) -> WriteStats {
        self.packer.stats
    }

    /// Finishes the disk; what was not written is as in `base` (or zero without one).
    pub fn finish(mut self) -> Result<DiskRoot> {
        self.cut_last_chunk()?;
        self.advance(0)?;
        let Self { packer, mut pages, map, .. } = self;
        packer
            .step(|packer| map.finish(&mut RunPages { packer, pages: &mut pages }))
            .map(|root| root.public())
    }

    /// Checks that a range is aligned, within the disk, and behind all before.
    fn claim(&mut self, range: Range<u64>) -> Result<()> {
        let aligned = range.start.is_multiple_of(CHUNK)
            && (range.end.is_multiple_of(CHUNK) || range.end == self.size);
        if !aligned || range.start > range.end || range.end > self.size || range.start < self.next {
            return Err(RepoError::Invalid(format!(
                "bytes {}..{} cannot be written now: whole chunks of {CHUNK} bytes in ascending \
                 order are expected, from {} up to {}",
                range.start, range.end, self.next, self.size
            )));
        }
        self.next = range.end.next_multiple_of(CHUNK).max(self.next);
        Ok(())
    }

    fn hash(&mut self, offset: u64, data: Bytes) -> Result<()> {
        let (inner, chunks) = (self.packer.inner().clone(), data.clone());
        let ids = pool::spawn(move || {
            chunks.chunks_exact(CHUNK_LEN).map(|c| chunk_id(&inner.keys.chunk_id, c)).collect()
        });
        self.ahead += data.len();
        self.steps.push_back(Step::Data { first: offset / CHUNK, data, ids });
        self.advance(MAX_AHEAD)
    }

    /// Carries steps out until at most `limit` bytes wait.
    fn advance(&mut self, limit: usize) -> Result<()> {
        while self.ahead > limit || limit == 0 || self.steps.len() > 1024 {
            let Some(step) = self.steps.pop_front() else { break };
            let Self { packer, pages, map, ahead, .. } = self;
            packer.step(|packer| match step {
                Step::Zero(chunks) => map.clear(chunks, &mut RunPages { packer, pages }),
                Step::Data { first, data, ids } => {
                    *ahead -= data.len();
                    let ids = ids.wait()?;
                    for ((id, chunk), n) in
                        ids.iter().zip(data.chunks_exact(CHUNK_LEN)).zip(first..)
                    {
                        if !id.is_none() && !packer.knows(id) {
                            packer.put_chunk(*id, chunk)?;
                        }
                        map.set(n, *id, &mut RunPages { packer, pages })?;
                    }
                    Ok(())
                }
            })?;
        }
        Ok(())
    }

    /// A disk cut within a chunk that stays as in the base: the chunk's end becomes zeros, or it would
    /// come back when the disk grows again.
    fn cut_last_chunk(&mut self) -> Result<()> {
        let keep = (self.size % CHUNK) as usize;
        let Some(base) = self.base.filter(|base| base.size > self.size && keep != 0) else {
            return Ok(());
        };
        let last = self.size / CHUNK;
        if self.next > last * CHUNK {
            return Ok(());
        }
        let Self { packer, pages, .. } = self;
        let old = packer.step(|_| {
            let mut walker = Walker::new(&base, last..last + 1);
            let leaf = walker.next_leaf(pages, &mut None)?;
            let found = leaf.and_then(|leaf| leaf.chunks(last..last + 1).next());
            found.map(|(_, id)| pages.chunk(&id)).transpose()
        })?;
        match old {
            Some(old) => self.write(last * CHUNK, old.slice(..keep)),
            None => Ok(()),
        }
    }
}

/// Id of a chunk; none if it is all zeros.
fn chunk_id(key: &[u8; 32], chunk: &[u8]) -> BlobId {
    // Most chunks with data show it early; the blocks are wide enough for vector instructions.
    let zero = chunk.chunks(1024).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0);
    if zero { BlobId::NONE } else { BlobId::of(key, chunk) }
}
