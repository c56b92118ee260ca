//! Another virtual size.
//!
//! The size is one item of the metadata; the block table's entries behind the size mean nothing. So
//! entries are put in place first and the size comes last, in one log entry:
//!
//! | killed | state |
//! |---|---|
//! | before that entry is durable | the old size; at most unused entries behind it, and unused space |
//! | after it | the new size, all its entries in place; at most unused space at the file's end |

use crate::error::{DiskError, Result};
use crate::vhdx::bat::{Bat, Payload, Shape};
use crate::vhdx::layout::{MIB, Region};
use crate::vhdx::metadata;
use crate::vhdx::storage::write_zeros;
use crate::vhdx::{BlockState, Kind};

use super::Vhdx;
use super::place::PAGE_ENTRIES;

/// How much is looked at together for zeros.
const PIECE: u64 = 1 << 20;

impl Vhdx {
    /// Gives the disk another virtual size, durable on return. What is added reads as zeros (in a
    /// child: as nothing of its own, and what lies beyond the parent's end is zero); what is cut off
    /// must be zeros, see [`Vhdx::least_size`]. A fixed disk gets, or gives back, its space.
    ///
    /// The caller sets a new DataWriteGuid first, for a reader sees the change, and takes care of the
    /// tracking files; [`crate::chain::resize`] does all of it.
    ///
    /// # Errors
    ///
    /// Before anything is changed: a size that the format does not know, data that would be cut off,
    /// no room for a fixed disk's blocks or a longer block table.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        self.flush()?;
        let mut metadata = self.metadata.get_mut().clone();
        let before = metadata.geometry.size;
        metadata.geometry.size = size;
        metadata.validate().map_err(|what| {
            DiskError::State(format!("cannot resize {}: {what}", self.path.display()))
        })?;
        let shape = Shape::new(metadata.geometry, metadata.block_size);
        match size.cmp(&before) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Greater => self.lengthen(shape)?,
            std::cmp::Ordering::Less => self.shorten(shape)?,
        }
        self.shape = shape;
        self.metadata.get_mut().geometry.size = size;
        self.rebuild_space()?;
        self.cut_tail()?;
        Ok(())
    }

    /// The smallest size to which the disk can shrink: nothing but zeros lies behind it in this file.
    /// What a child does not hold is not looked at: it cannot be smaller than its parent anyway. Bytes,
    /// a multiple of the logical sector, at least one sector.
    pub fn least_size(&self) -> Result<u64> {
        let sector = self.shape.sector;
        for block in (0..self.shape.blocks).rev() {
            if !matches!(self.block_state(block), BlockState::Full | BlockState::Partial) {
                continue;
            }
            let begin = block * self.shape.block_size;
            let mut end = self.shape.size.min(begin + self.shape.block_size);
            while end > begin {
                let start = begin.max((end - 1) / PIECE * PIECE);
                // What the file does not hold stays zero.
                let mut data = vec![0; (end - start) as usize];
                self.read_at(start, &mut data)?;
                if let Some(last) = data.iter().rposition(|b| *b != 0) {
                    return Ok((start + last as u64 + 1).next_multiple_of(sector));
                }
                end = start;
            }
        }
        Ok(sector)
    }

    fn lengthen(&mut self, shape: Shape) -> Result<()> {
        self.clear_last_block()?;
        let found = *self.file_len.get_mut();
        let placed = self.room_for(&shape);
        let Ok((table, bat)) = placed else {
            // What was added to the file is not in use, and no log entry has named its length yet.
            if self.storage.set_len(found).is_ok() {
                *self.file_len.get_mut() = found;
            }
            self.rebuild_space()?;
            return placed.map(drop);
        };
        let size = self.size_update(shape.size)?;
        if table == self.regions.bat {
            let first = self.shape.entries_of(self.kind) / PAGE_ENTRIES;
            let end = shape.entries_of(self.kind).div_ceil(PAGE_ENTRIES);
            // Readers do not look at these entries until the size is there.
            self.commit(&self.table_updates(&bat, first..end))?;
            // Ranges of zeros were punched; without space for it, table pages could not be written.
            let _ = self.storage.reserve(table.offset, table.len);
            self.commit_together(&size)?;
        } else {
            self.move_table(&bat, table, size)?;
        }
        self.bat = bat;
        Ok(())
    }

    /// Makes what lies behind the disk's end in its last block zero: other writers may have left
    /// anything there. Nobody reads it yet.
    fn clear_last_block(&self) -> Result<()> {
        let within = self.shape.size % self.shape.block_size;
        let payload = self.bat.payload(&self.shape, self.shape.blocks - 1);
        if within == 0 || !matches!(payload.state, BlockState::Full | BlockState::Partial) {
            return Ok(());
        }
        let rest = self.shape.block_size - within;
        write_zeros(&*self.storage, payload.offset + within, rest).map_err(self.io("write"))
    }

    /// The table's region and the table for a greater size; space for both, and for the blocks of a
    /// fixed disk, is in the file when this returns, and zero.
    fn room_for(&mut self, shape: &Shape) -> Result<(Region, Bat)> {
        let mut table = self.regions.bat;
        let mut taken = Vec::new();
        if shape.entries_of(self.kind) * 8 > table.len {
            // As everywhere, long enough for a differencing disk.
            let len = (shape.entries() * 8).next_multiple_of(MIB);
            table = Region { offset: self.space.get_mut().take_end(len).offset, len };
            taken.push(table);
        }
        let bat = self.bat.for_shape(shape, self.kind, table.len / 8);
        if self.kind == Kind::Fixed {
            let blocks = self.shape.blocks..shape.blocks;
            let len = (blocks.end - blocks.start) * shape.block_size;
            let offset = self.space.get_mut().take_end(len).offset;
            taken.push(Region { offset, len });
            for (block, offset) in blocks.zip((offset..).step_by(shape.block_size as usize)) {
                let payload = Payload { state: BlockState::Full, offset };
                bat.set_raw(shape.payload_index(block), payload.raw());
            }
        }
        for region in taken {
            self.grow(region.offset + region.len)?;
            self.storage.reserve(region.offset, region.len).map_err(self.io("extend"))?;
        }
        Ok((table, bat))
    }

    fn shorten(&mut self, shape: Shape) -> Result<()> {
        let least = self.least_size()?;
        if shape.size < least {
            return Err(DiskError::State(format!(
                "{} cannot shrink to {} bytes: it holds data up to {least}, which is the smallest \
                 size; remove partitions or file systems behind it first",
                self.path.display(),
                shape.size
            )));
        }
        let bat = self.bat.for_shape(&shape, self.kind, self.regions.bat.len / 8);
        // From the first block that goes to the last entry there was; both are often on one page.
        let first = self.shape.payload_index(shape.blocks) / PAGE_ENTRIES;
        let end = self.shape.entries_of(self.kind).div_ceil(PAGE_ENTRIES);
        let mut updates = self.size_update(shape.size)?;
        updates.extend(self.table_updates(&bat, first..end));
        self.commit_together(&updates)?;
        let _ = self.storage.reserve(self.regions.bat.offset, self.regions.bat.len);
        self.bat = bat;
        Ok(())
    }

    fn size_update(&self, size: u64) -> Result<Vec<crate::vhdx::log::Update>> {
        self.metadata_updates(|region| metadata::replace_size(region, size))
    }

    /// Gives the disk another Virtual Disk ID, durable on return: it is another disk from then on.
    /// The caller sets a new DataWriteGuid first.
    pub fn set_disk_id(&mut self, id: uuid::Uuid) -> Result<()> {
        self.flush()?;
        self.commit_together(&self.metadata_updates(|r| metadata::replace_disk_id(r, id))?)?;
        self.metadata.get_mut().disk_id = id;
        Ok(())
    }
}
