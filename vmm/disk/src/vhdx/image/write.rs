//! Writing: where data goes, and what that changes in the block table and the bitmaps.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Vhdx;
use crate::error::Result;
use crate::vhdx::bat::{BITMAP_BLOCK, Payload, Place, bitmap_raw};
use crate::vhdx::bitmap::Pending;
use crate::vhdx::pending_file::{Change, PendingFile};
use crate::vhdx::storage::write_zeros;
use crate::vhdx::{BlockState, Kind};

impl Vhdx {
    /// Writes; allocates blocks (partial ones in a differencing file) as needed. No sync.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _writable = self.writable()?;
        self.check_range(offset, buf.len() as u64)?;
        for (block, within, at, n) in self.pieces(offset, buf.len() as u64) {
            self.make_room()?;
            self.write_block(block, within, &buf[at as usize..(at + n) as usize])?;
        }
        Ok(())
    }

    fn write_block(&self, block: u64, within: u64, data: &[u8]) -> Result<()> {
        {
            let _guard = self.stripe(block).read();
            let payload = self.bat.payload(&self.shape, block);
            let in_place = match payload.state {
                BlockState::Full => true,
                BlockState::Partial => {
                    self.runs(block, within, data.len() as u64)?.iter().all(|(_, present)| *present)
                }
                _ => false,
            };
            if in_place {
                return self.write_payload(data, payload.offset + within);
            }
        }
        let _guard = self.stripe(block).write();
        // Another thread may have been faster.
        let payload = self.bat.payload(&self.shape, block);
        match payload.state {
            BlockState::Full => self.write_payload(data, payload.offset + within),
            BlockState::Partial => {
                self.write_payload(data, payload.offset + within)?;
                self.mark_present(block, within, data.len() as u64, payload)
            }
            BlockState::Zero => self.allocate_full(block, within, data),
            BlockState::NotPresent if self.kind != Kind::Differencing => {
                self.allocate_full(block, within, data)
            }
            BlockState::NotPresent if data.len() as u64 == self.shape.block_size => {
                self.allocate_full(block, within, data)
            }
            BlockState::NotPresent => self.allocate_partial(block, within, data),
        }
    }

    pub(super) fn write_payload(&self, data: &[u8], offset: u64) -> Result<()> {
        let written = self.storage.write_all_at(data, offset).map_err(self.io("write"));
        // After the write: a flush that begins once this write has completed must see it.
        self.unsynced.store(true, Ordering::Release);
        written
    }

    /// A place for a block, inside the file.
    fn place(&self) -> Result<Place> {
        let place = self.space.lock().take_block();
        let made = self.grow(place.offset + self.shape.block_size);
        made.inspect_err(|_| self.space.lock().give_back(place.offset))?;
        Ok(place)
    }

    pub(super) fn grow(&self, end: u64) -> Result<()> {
        let mut len = self.file_len.lock();
        if end > *len {
            self.storage.set_len(end).map_err(self.io("extend"))?;
            *len = end;
        }
        Ok(())
    }

    /// A new block whose other sectors read as zeros.
    fn allocate_full(&self, block: u64, within: u64, data: &[u8]) -> Result<()> {
        let place = self.place()?;
        let whole = data.len() as u64 == self.shape.block_size;
        let cleared = if place.used && !whole {
            self.storage
                .punch(place.offset, self.shape.block_size)
                .map_err(self.io("clear a block of"))
        } else {
            Ok(())
        };
        let written = cleared.and_then(|()| self.write_payload(data, place.offset + within));
        written.inspect_err(|_| self.space.lock().give_back(place.offset))?;
        let payload = Payload { state: BlockState::Full, offset: place.offset };
        let added = self.change(&mut self.pending.write(), &[self.entry(block, payload)]);
        added.inspect_err(|_| self.space.lock().give_back(place.offset))
    }

    /// A new block that holds only the written sectors.
    fn allocate_partial(&self, block: u64, within: u64, data: &[u8]) -> Result<()> {
        if self.pending.read().released.contains(&block) {
            // The file's table may still give the block's old place as partial. A flush that takes
            // several log entries would put the new bits beside it, and a kill between them leaves
            // sectors that were never written.
            self.flush_pending()?;
        }
        self.load_bitmap(block)?;
        let bitmap = match self.bat.bitmap(&self.shape, block) {
            Some(_) => None,
            None => Some(self.allocate_bitmap()?),
        };
        let place = self.place()?;
        let written = self.write_payload(data, place.offset + within);
        written.inspect_err(|_| self.space.lock().give_back(place.offset))?;
        let mut pending = self.pending.write();
        let mut changes = Vec::with_capacity(4);
        if let Some(offset) = bitmap
            && self.bat.bitmap(&self.shape, block).is_none()
        {
            let index = self.shape.bitmap_index(block);
            changes.push(Change::Entry { index, value: bitmap_raw(offset) });
        }
        let Range { start, end } = self.sectors(block);
        // Bits of an earlier life of this block may still be set.
        changes.push(Change::Sectors { first: start, count: end - start, present: false });
        changes.push(self.written(block, within, data.len() as u64));
        // Last: only now does anybody look at the bits.
        let payload = Payload { state: BlockState::Partial, offset: place.offset };
        changes.push(self.entry(block, payload));
        let added = self.change(&mut pending, &changes);
        added.inspect_err(|_| self.space.lock().give_back(place.offset))
    }

    /// A sector bitmap block at the end of the file, all zero. If another thread gives the chunk one at
    /// the same time, this one stays unused until the next open.
    fn allocate_bitmap(&self) -> Result<u64> {
        let place = self.space.lock().take_end(BITMAP_BLOCK);
        self.grow(place.offset + BITMAP_BLOCK)?;
        self.storage.reserve(place.offset, BITMAP_BLOCK).map_err(self.io("extend"))?;
        Ok(place.offset)
    }

    /// Says that more sectors of a partial block are in this file; a block that has them all becomes
    /// full. The block's stripe is held for writing and the data has been written: a flush in between
    /// logs either none of it or all of it.
    fn mark_present(&self, block: u64, within: u64, len: u64, payload: Payload) -> Result<()> {
        let written = self.written(block, within, len);
        let Change::Sectors { first, count, .. } = written else { return Ok(()) };
        let all = self.sectors(block);
        let mut pending = self.pending.write();
        let full = pending.all(all.start..first) && pending.all(first + count..all.end);
        let entry = self.entry(block, Payload { state: BlockState::Full, ..payload });
        let changes = [written, entry];
        self.change(&mut pending, if full { &changes } else { &changes[..1] })
    }

    /// The sectors of a range of a block as present ones.
    fn written(&self, block: u64, within: u64, len: u64) -> Change {
        let sector = self.shape.sector;
        let first = (block * self.shape.block_size + within) / sector;
        Change::Sectors { first, count: len / sector, present: true }
    }

    fn entry(&self, block: u64, payload: Payload) -> Change {
        Change::Entry { index: self.shape.payload_index(block), value: payload.raw() }
    }

    /// Changes metadata: first where it outlives this process, then in memory; both under the one lock,
    /// so that they see the same order. What the changes point at has been written. On error nothing
    /// has changed. A kill in between: the write is not acknowledged, and is there.
    fn change(&self, pending: &mut Pending, changes: &[Change]) -> Result<()> {
        if let Some(file) = &mut pending.file {
            file.record(changes).map_err(self.io("write the pending file of"))?;
        }
        self.apply(pending, changes);
        Ok(())
    }

    pub(super) fn apply(&self, pending: &mut Pending, changes: &[Change]) {
        for change in changes {
            match *change {
                Change::Entry { index, value } => {
                    self.bat.set_raw(index, value);
                    pending.dirty_bat.insert(index / 512);
                }
                Change::Sectors { first, count, present } => {
                    pending.set(first..first + count, present);
                }
            }
        }
    }

    /// Flushes when so much has changed since the last flush that the pending file is full.
    fn make_room(&self) -> Result<()> {
        let full = self.pending.read().file.as_ref().is_some_and(PendingFile::is_full);
        if full { self.flush_pending() } else { Ok(()) }
    }

    /// Makes the range read as zeros; whole blocks become ZERO and free their space.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let _writable = self.writable()?;
        self.check_range(offset, len)?;
        for (block, within, _, n) in self.pieces(offset, len) {
            let start = block * self.shape.block_size;
            let whole = n == self.shape.block_size.min(self.shape.size - start);
            self.make_room()?;
            if whole && self.kind != Kind::Fixed {
                self.zero_block(block)?;
            } else {
                self.zero_part(block, within, n)?;
            }
        }
        Ok(())
    }

    fn zero_block(&self, block: u64) -> Result<()> {
        let _guard = self.stripe(block).write();
        let payload = self.bat.payload(&self.shape, block);
        match payload.state {
            BlockState::Zero => return Ok(()),
            BlockState::NotPresent if self.kind != Kind::Differencing => return Ok(()),
            _ => {}
        }
        let mut pending = self.pending.write();
        // In a differencing file never NOT_PRESENT: that would bring the parent's data back.
        let zero = self.entry(block, Payload { state: BlockState::Zero, offset: 0 });
        self.change(&mut pending, &[zero])?;
        self.free_later(&mut pending, payload);
        Ok(())
    }

    /// A block has left its place, which may be used again when the log says so.
    fn free_later(&self, pending: &mut Pending, payload: Payload) {
        if !matches!(payload.state, BlockState::Full | BlockState::Partial) {
            return;
        }
        #[cfg(test)]
        if self.reuse_early {
            return self.space.lock().give_back(payload.offset);
        }
        pending.freed.push(payload.offset);
    }

    fn zero_part(&self, block: u64, within: u64, len: u64) -> Result<()> {
        {
            let _guard = self.stripe(block).read();
            let payload = self.bat.payload(&self.shape, block);
            match payload.state {
                BlockState::Zero => return Ok(()),
                BlockState::NotPresent if self.kind != Kind::Differencing => return Ok(()),
                BlockState::Full => {
                    let zeroed = write_zeros(&*self.storage, payload.offset + within, len);
                    self.unsynced.store(true, Ordering::Release);
                    return zeroed.map_err(self.io("write"));
                }
                _ => {}
            }
        }
        let zeros = vec![0; len.min(1 << 20) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(zeros.len() as u64);
            self.write_block(block, within + done, &zeros[..n as usize])?;
            done += n;
        }
        Ok(())
    }

    /// Merge only: sets the blocks to NOT_PRESENT, durable when this returns. Their content must
    /// already be durable in the parent, or guest data is lost.
    pub fn release_blocks(&self, indices: &[u64]) -> Result<()> {
        let _writable = self.writable()?;
        for &block in indices {
            self.make_room()?;
            let _guard = self.stripe(block).write();
            let payload = self.bat.payload(&self.shape, block);
            let mut pending = self.pending.write();
            let gone = self.entry(block, Payload { state: BlockState::NotPresent, offset: 0 });
            self.change(&mut pending, &[gone])?;
            pending.released.insert(block);
            self.free_later(&mut pending, payload);
        }
        self.flush_pending()
    }
}
