//! Disk maps: Merkle trees of pages of ids. Each page has 64 slots; a leaf page's slots are chunks
//! (4 MiB of disk), an upper page's are pages of the level below. An empty slot is zeros, so nothing
//! is ever stored or enumerated for the empty parts of a disk, and equal content always has the same
//! root.

use std::ops::Range;
use std::sync::Arc;

use crate::CHUNK;
use crate::bytes::Fields;
use crate::error::{RepoError, Result};
use crate::id::{BlobId, ID_LEN};

/// Slots of a page. 64: one changed chunk costs a leaf of at most 1 KiB and its few ancestors, and
/// 1,440 chunks scattered over 16 GiB cost about 1.3 MiB; 16 GiB are three levels, 1 TiB four.
pub(crate) const FANOUT: u64 = 64;
const FANOUT_BITS: u32 = 6;
/// Levels of the largest disk: 64^7 chunks are 256 PiB.
pub(crate) const MAX_LEVELS: u8 = 7;
/// Largest disk: 4 PiB, far above any virtual disk, low enough that sums never overflow.
pub(crate) const MAX_SIZE: u64 = 1 << 52;
const PAGE_VERSION: u8 = 1;
const HEAD_LEN: usize = 1 + 1 + 8;
/// Length of a page of one id; empty pages are never stored.
pub(crate) const MIN_PAGE_LEN: usize = HEAD_LEN + ID_LEN;
/// Length of a full page.
pub(crate) const MAX_PAGE_LEN: usize = HEAD_LEN + FANOUT as usize * ID_LEN;

/// Number of chunks of a disk.
pub(crate) fn chunk_count(size: u64) -> u64 {
    size.div_ceil(CHUNK)
}

/// Levels of the map of a disk: as few as hold it, at least one.
pub(crate) fn levels_for(size: u64) -> u8 {
    let mut levels = 1;
    while chunk_count(size) > span(levels) {
        levels += 1;
    }
    levels
}

/// Chunks below one page of a level (level 0: the chunk itself).
pub(crate) fn span(level: u8) -> u64 {
    1 << (FANOUT_BITS * u32::from(level))
}

/// A page in memory.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) level: u8,
    pub(crate) slots: [BlobId; FANOUT as usize],
}

impl Page {
    pub(crate) fn empty(level: u8) -> Self {
        Self { level, slots: [BlobId::NONE; FANOUT as usize] }
    }

    fn is_empty(&self) -> bool {
        self.slots.iter().all(BlobId::is_none)
    }

    /// Version, level, bitmap of used slots, ids of used slots. One content has one encoding.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bitmap = 0u64;
        let mut out = Vec::with_capacity(MAX_PAGE_LEN);
        out.extend_from_slice(&[PAGE_VERSION, self.level]);
        out.extend_from_slice(&[0; 8]);
        for (n, id) in self.slots.iter().enumerate().filter(|(_, id)| !id.is_none()) {
            bitmap |= 1 << n;
            out.extend_from_slice(&id.0);
        }
        out[2..HEAD_LEN].copy_from_slice(&bitmap.to_le_bytes());
        out
    }

    /// Reads a page; strict, so that no two encodings mean the same.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if page_len(bytes) != Some(bytes.len()) {
            return None;
        }
        let mut fields = Fields::new(bytes);
        let (_version, level, bitmap) = (fields.u8()?, fields.u8()?, fields.u64()?);
        let mut page = Self::empty(level);
        for (n, slot) in page.slots.iter_mut().enumerate() {
            if bitmap >> n & 1 == 1 {
                *slot = BlobId(fields.array()?);
                if slot.is_none() {
                    return None;
                }
            }
        }
        Some(page)
    }
}

/// Length of the page that begins these bytes.
pub(crate) fn page_len(bytes: &[u8]) -> Option<usize> {
    let mut fields = Fields::new(bytes);
    let (version, level, bitmap) = (fields.u8()?, fields.u8()?, fields.u64()?);
    let sane = version == PAGE_VERSION && (1..=MAX_LEVELS).contains(&level) && bitmap != 0;
    sane.then(|| HEAD_LEN + bitmap.count_ones() as usize * ID_LEN)
}

/// Where pages come from.
pub(crate) trait PageSource {
    /// The page of this id, which must be of this level.
    fn page(&mut self, id: &BlobId, level: u8) -> Result<Arc<Page>>;
}

/// Where pages come from and go to.
pub(crate) trait PageStore: PageSource {
    /// Stores a page unless it is known, and gives its id.
    fn put(&mut self, page: &Page) -> Result<BlobId>;
}

/// A disk map in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Root {
    pub(crate) size: u64,
    pub(crate) page: BlobId,
    pub(crate) levels: u8,
}

impl Root {
    /// Checks a root that came from outside.
    pub(crate) fn parse(root: &crate::DiskRoot) -> Result<Self> {
        let page = BlobId::parse(&root.page)
            .ok_or_else(|| RepoError::Invalid(format!("{:?} is not a page id", root.page)))?;
        if root.size > MAX_SIZE || root.levels != levels_for(root.size) {
            return Err(RepoError::Invalid(format!(
                "a disk map of {} levels does not fit a disk of {} bytes",
                root.levels, root.size
            )));
        }
        Ok(Self { size: root.size, page, levels: root.levels })
    }

    pub(crate) fn public(&self) -> crate::DiskRoot {
        crate::DiskRoot { size: self.size, page: self.page.to_string(), levels: self.levels }
    }
}

struct Open {
    /// Number of the page within its level.
    number: u64,
    page: Page,
    dirty: bool,
}

/// Makes a map, in ascending order of chunks, as a change of another one. Only pages that a change
/// touches are read, and only pages that differ are stored. A page that was stored is never read
/// again by the same builder.
pub(crate) struct MapBuilder {
    size: u64,
    /// The base was larger.
    cut: bool,
    levels: u8,
    root: BlobId,
    /// Open pages on the way to the current leaf; `path[l - 1]` is of level `l`.
    path: Vec<Option<Open>>,
}

impl MapBuilder {
    /// A map of `size` bytes that begins as `base`, cut or extended to the size.
    pub(crate) fn new(size: u64, base: Option<&Root>, pages: &mut dyn PageStore) -> Result<Self> {
        let levels = levels_for(size);
        let mut builder = Self {
            size,
            levels,
            cut: base.is_some_and(|base| base.size > size),
            root: BlobId::NONE,
            path: (0..levels).map(|_| None).collect(),
        };
        let Some(base) = base.filter(|base| !base.page.is_none()) else { return Ok(builder) };
        if base.levels <= levels {
            builder.plant(base);
        } else {
            let mut root = base.page;
            for level in (levels + 1..=base.levels).rev() {
                if !root.is_none() {
                    root = pages.page(&root, level)?.slots[0];
                }
            }
            builder.root = root;
        }
        Ok(builder)
    }

    /// Puts a lower tree at the left end of this one.
    fn plant(&mut self, base: &Root) {
        if base.levels == self.levels {
            self.root = base.page;
            return;
        }
        for level in base.levels + 1..=self.levels {
            let mut page = Page::empty(level);
            if level == base.levels + 1 {
                page.slots[0] = base.page;
            }
            self.path[usize::from(level) - 1] = Some(Open { number: 0, page, dirty: true });
        }
    }

    /// Sets a chunk; [`BlobId::NONE`] for zeros.
    pub(crate) fn set(&mut self, chunk: u64, id: BlobId, pages: &mut dyn PageStore) -> Result<()> {
        self.set_slot(1, chunk, id, pages)
    }

    /// Makes chunks zeros, whole subtrees at once, without reading what is below.
    pub(crate) fn clear(&mut self, chunks: Range<u64>, pages: &mut dyn PageStore) -> Result<()> {
        let mut at = chunks.start;
        while at < chunks.end {
            let mut level = 0;
            while level + 1 < self.levels
                && at.is_multiple_of(span(level + 1))
                && chunks.end - at >= span(level + 1)
            {
                level += 1;
            }
            self.set_slot(level + 1, at >> (FANOUT_BITS * u32::from(level)), BlobId::NONE, pages)?;
            at += span(level);
        }
        Ok(())
    }

    /// Sets the entry `child` of level `level - 1` in its page of level `level`.
    fn set_slot(
        &mut self,
        level: u8,
        child: u64,
        id: BlobId,
        pages: &mut dyn PageStore,
    ) -> Result<()> {
        // Below the slot nothing may stay open: it would be written back over it.
        self.close_below(level, pages)?;
        let open = self.open(level, child >> FANOUT_BITS, pages)?;
        let slot = &mut open.page.slots[(child % FANOUT) as usize];
        if *slot != id {
            *slot = id;
            open.dirty = true;
        }
        Ok(())
    }

    /// Opens a page, with all its ancestors, closing what is in the way.
    fn open(&mut self, level: u8, number: u64, pages: &mut dyn PageStore) -> Result<&mut Open> {
        for l in (level..=self.levels).rev() {
            let wanted = number >> (FANOUT_BITS * u32::from(l - level));
            let at = usize::from(l) - 1;
            if self.path[at].as_ref().is_some_and(|open| open.number == wanted) {
                continue;
            }
            self.close_below(l + 1, pages)?;
            let id = match self.path.get(at + 1) {
                Some(Some(parent)) => parent.page.slots[(wanted % FANOUT) as usize],
                _ => self.root,
            };
            let page = if id.is_none() {
                Page::empty(l)
            } else {
                Arc::unwrap_or_clone(pages.page(&id, l)?)
            };
            self.path[at] = Some(Open { number: wanted, page, dirty: false });
        }
        self.path[usize::from(level) - 1]
            .as_mut()
            .ok_or_else(|| RepoError::Invalid("disk map page is not open".into()))
    }

    /// Stores open pages of the levels below `level` and puts their ids into their parents.
    fn close_below(&mut self, level: u8, pages: &mut dyn PageStore) -> Result<()> {
        for at in 0..usize::from(level) - 1 {
            let Some(open) = self.path[at].take() else { continue };
            if !open.dirty {
                continue;
            }
            let id = if open.page.is_empty() { BlobId::NONE } else { pages.put(&open.page)? };
            match self.path.get_mut(at + 1) {
                Some(Some(parent)) => {
                    let slot = &mut parent.page.slots[(open.number % FANOUT) as usize];
                    if *slot != id {
                        *slot = id;
                        parent.dirty = true;
                    }
                }
                // Pages are opened below their parents only, so this is the root page.
                _ => self.root = id,
            }
        }
        Ok(())
    }

    /// Stores what is open and gives the root.
    pub(crate) fn finish(mut self, pages: &mut dyn PageStore) -> Result<Root> {
        // What was beyond the new size must not come back when the disk grows again. Only now: pages
        // are closed in ascending order, and a closed one cannot be read before it is durable.
        if self.cut {
            self.clear(chunk_count(self.size)..span(self.levels), pages)?;
        }
        self.close_below(self.levels + 1, pages)?;
        Ok(Root { size: self.size, page: self.root, levels: self.levels })
    }
}

/// Goes through the chunks of a map that are not zeros, in order, one leaf at a time.
pub(crate) struct Walker {
    /// Subtrees still to be visited, the next one last: page id, level, first chunk.
    stack: Vec<(BlobId, u8, u64)>,
    end: u64,
    start: u64,
}

/// A leaf page with its first chunk.
pub(crate) struct Leaf {
    pub(crate) page: Arc<Page>,
    pub(crate) first: u64,
}

impl Leaf {
    /// Chunks of the leaf that are not zeros, within `range`.
    pub(crate) fn chunks(&self, range: Range<u64>) -> impl Iterator<Item = (u64, BlobId)> + '_ {
        (self.first..)
            .zip(self.page.slots.iter().copied())
            .filter(move |(chunk, id)| !id.is_none() && range.contains(chunk))
    }
}

impl Walker {
    /// The chunks `range` of a map.
    pub(crate) fn new(root: &Root, range: Range<u64>) -> Self {
        let end = range.end.min(chunk_count(root.size));
        let stack =
            if root.page.is_none() { Vec::new() } else { vec![(root.page, root.levels, 0)] };
        Self { stack, end, start: range.start }
    }

    /// The range that is walked, cut to the disk.
    pub(crate) fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// The next leaf. After an error the walk can go on: only what is below the page is left out, and
    /// `failed` gets the chunks that it covers.
    pub(crate) fn next_leaf(
        &mut self,
        pages: &mut dyn PageSource,
        failed: &mut Option<Range<u64>>,
    ) -> Result<Option<Leaf>> {
        while let Some((id, level, first)) = self.stack.pop() {
            if first >= self.end || first + span(level) <= self.start {
                continue;
            }
            let page = match pages.page(&id, level) {
                Ok(page) => page,
                Err(e) => {
                    *failed = Some(first..(first + span(level)).min(self.end));
                    return Err(e);
                }
            };
            if level == 1 {
                return Ok(Some(Leaf { page, first }));
            }
            for (slot, id) in page.slots.iter().enumerate().rev() {
                if !id.is_none() {
                    self.stack.push((*id, level - 1, first + slot as u64 * span(level - 1)));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
