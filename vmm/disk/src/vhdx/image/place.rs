//! Where a file's structures lie, and changes of that. Everything here has the file for itself
//! (`&mut`), between flushes: no metadata is newer in memory than in the file.

use crate::block::BlockRange;
use crate::error::{DiskError, Result};
use crate::vhdx::BlockState;
use crate::vhdx::bat::{BITMAP_BLOCK, Bat, Space};
use crate::vhdx::layout::{self, MIB, REGION_TABLE_OFFSETS, REGION_TABLE_SIZE, Region, Regions};
use crate::vhdx::log::{SECTOR, Update};
use crate::vhdx::open::Reader;

use super::Vhdx;

/// Entries of one page of the block table.
pub(super) const PAGE_ENTRIES: u64 = SECTOR as u64 / 8;

/// What takes space in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Log, metadata, regions of other makers: they stay where they are.
    Anchored,
    /// The block table.
    Table,
    /// A payload block.
    Block(u64),
    /// The sector bitmap of the chunk that begins with this block.
    Bitmap(u64),
}

/// A structure and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) what: What,
}

impl Span {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

impl Vhdx {
    /// Everything that the file's metadata say is in use, in no order.
    pub(super) fn spans(&self) -> Vec<Span> {
        let header = self.journal.lock().header().clone();
        let log = Region { offset: header.log_offset, len: u64::from(header.log_len) };
        let mut spans: Vec<Span> = [log, self.regions.metadata]
            .iter()
            .chain(&self.regions.unknown)
            .filter(|r| r.len > 0)
            .map(|r| Span { offset: r.offset, len: r.len, what: What::Anchored })
            .collect();
        let table = self.regions.bat;
        spans.push(Span { offset: table.offset, len: table.len, what: What::Table });
        for block in 0..self.shape.blocks {
            let payload = self.bat.payload(&self.shape, block);
            if matches!(payload.state, BlockState::Full | BlockState::Partial) {
                let what = What::Block(block);
                spans.push(Span { offset: payload.offset, len: self.shape.block_size, what });
            }
        }
        for block in (0..self.shape.blocks).step_by(self.shape.chunk_ratio as usize) {
            if let Some(offset) = self.bat.bitmap(&self.shape, block) {
                spans.push(Span { offset, len: BITMAP_BLOCK, what: What::Bitmap(block) });
            }
        }
        spans
    }

    /// Finds anew what is free: all that the table, which is durable, does not name.
    pub(super) fn rebuild_space(&mut self) -> Result<()> {
        let spans = self.spans().iter().map(|s| (s.offset, s.end())).collect();
        let len = *self.file_len.get_mut();
        let space = Space::new(spans, self.shape.block_size, len);
        *self.space.get_mut() = space.map_err(|what| DiskError::corrupt(&self.path, what))?;
        Ok(())
    }

    /// Cuts off what nothing uses at the file's end; gives the bytes. Killed before the end: the file
    /// is longer than it need be.
    pub(super) fn cut_tail(&mut self) -> Result<u64> {
        let end = self.spans().iter().map(Span::end).max().unwrap_or(MIB);
        let len = *self.file_len.get_mut();
        if end >= len {
            return Ok(0);
        }
        // The log names a size that the file must not fall below; an empty log names none.
        self.clean()?;
        let cut = self.storage.set_len(end).and_then(|()| self.storage.sync());
        self.or_fail(cut.map_err(self.io("shorten")))?;
        *self.file_len.get_mut() = end;
        self.rebuild_space()?;
        Ok(len - end)
    }

    /// Reads metadata of the file, in which all of it is in place.
    pub(super) fn read_metadata(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let reader = Reader { path: &self.path, storage: &*self.storage, replay: None };
        reader.read(offset, len)
    }

    /// The pages of the metadata region that a change of it touches.
    pub(super) fn metadata_updates(
        &self,
        change: impl FnOnce(&mut [u8]) -> std::result::Result<(), String>,
    ) -> Result<Vec<Update>> {
        let region = self.regions.metadata;
        let old = self.read_metadata(region.offset, region.len as usize)?;
        let mut new = old.clone();
        change(&mut new).map_err(|what| DiskError::corrupt(&self.path, what))?;
        Ok(changed_pages(&old, &new, region.offset))
    }

    /// The pages of both region tables once they name another place of the block table. A damaged copy
    /// is mended along the way.
    pub(super) fn region_updates(&self, table: Region) -> Result<Vec<Update>> {
        let bad = |what: String| DiskError::corrupt(&self.path, what);
        let mut copies = Vec::new();
        for at in REGION_TABLE_OFFSETS {
            copies.push((at, self.read_metadata(at, REGION_TABLE_SIZE)?));
        }
        let valid = copies.iter().find(|(_, b)| matches!(Regions::parse(b), Ok(Some(_))));
        let Some((_, valid)) = valid else {
            return Err(bad("both region tables are damaged".to_owned()));
        };
        let mut new = valid.clone();
        layout::move_table(&mut new, table).map_err(bad)?;
        Ok(copies.iter().flat_map(|(at, old)| changed_pages(old, &new, *at)).collect())
    }

    /// Pages of a block table that is to lie in the table's region; runs of empty ones as ranges.
    pub(super) fn table_updates(&self, bat: &Bat, pages: BlockRange) -> Vec<Update> {
        let mut updates: Vec<Update> = Vec::new();
        for number in pages {
            let offset = self.regions.bat.offset + number * SECTOR as u64;
            let page = bat.page(number);
            if page.iter().any(|b| *b != 0) {
                updates.push(Update::Data { offset, page });
                continue;
            }
            match updates.last_mut() {
                Some(Update::Zero { len, .. }) => *len += SECTOR as u64,
                _ => updates.push(Update::Zero { offset, len: SECTOR as u64 }),
            }
        }
        updates
    }

    /// Makes updates durable, in as many log entries as they take.
    pub(super) fn commit(&self, updates: &[Update]) -> Result<()> {
        let mut journal = self.journal.lock();
        self.check_failed()?;
        self.sync_and_commit(&mut journal, updates)
    }

    /// Makes updates durable all at once: a kill leaves none or all of them.
    pub(super) fn commit_together(&self, updates: &[Update]) -> Result<()> {
        let mut journal = self.journal.lock();
        self.check_failed()?;
        if !journal.fits(updates) {
            return Err(DiskError::State(format!(
                "{}: the log is too small for this change",
                self.path.display()
            )));
        }
        self.sync_and_commit(&mut journal, updates)
    }

    /// Writes the table into a free place and makes that the table's region, together with `more`.
    /// Killed before the log entry is durable: the old region counts, the new place is unused; after:
    /// the new one, with all its pages, which were synced before the entry was written.
    pub(super) fn move_table(&mut self, bat: &Bat, to: Region, more: Vec<Update>) -> Result<()> {
        const PAGES: u64 = 256;
        let mut page = 0;
        while page * (SECTOR as u64) < to.len {
            let n = PAGES.min(to.len / SECTOR as u64 - page);
            let bytes: Vec<u8> = (page..page + n).flat_map(|p| *bat.page(p)).collect();
            let written = self.storage.write_all_at(&bytes, to.offset + page * SECTOR as u64);
            written.map_err(self.io("write block table of"))?;
            page += n;
        }
        let mut updates = self.region_updates(to)?;
        updates.extend(more);
        self.commit_together(&updates)?;
        self.regions.bat = to;
        Ok(())
    }
}

/// The pages in which two states of a range at `offset` differ.
pub(super) fn changed_pages(old: &[u8], new: &[u8], offset: u64) -> Vec<Update> {
    new.chunks_exact(SECTOR)
        .zip(old.chunks_exact(SECTOR))
        .zip((offset..).step_by(SECTOR))
        .filter(|((new, old), _)| new != old)
        .map(|((new, _), offset)| {
            let mut page = Box::new([0; SECTOR]);
            page.copy_from_slice(new);
            Update::Data { offset, page }
        })
        .collect()
}
