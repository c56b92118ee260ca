//! The block allocation table ([MS-VHDX] 2.5): index arithmetic, entry rules, and the space that the
//! entries leave free.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{MIB, Region};
use super::{BlockState, Kind};
use crate::block::Geometry;

const STATE_MASK: u64 = 7;
const RESERVED_MASK: u64 = 0xf_fff8;
/// Bytes of a sector bitmap block.
pub(crate) const BITMAP_BLOCK: u64 = MIB;

/// Raw payload states.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const FULL: u64 = 6;
const PARTIAL: u64 = 7;

/// How blocks, chunks and table entries relate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) size: u64,
    pub(crate) block_size: u64,
    pub(crate) sector: u64,
    /// Payload blocks of one chunk: those that one sector bitmap block covers.
    pub(crate) chunk_ratio: u64,
    pub(crate) blocks: u64,
}

impl Shape {
    pub(crate) fn new(geometry: Geometry, block_size: u32) -> Self {
        let (block_size, sector) = (u64::from(block_size), u64::from(geometry.logical_sector));
        Self {
            size: geometry.size,
            block_size,
            sector,
            chunk_ratio: (sector << 23) / block_size,
            blocks: geometry.size.div_ceil(block_size),
        }
    }

    /// Entries of a differencing file's table, which is also what a table's region is sized for.
    pub(crate) fn entries(&self) -> u64 {
        self.blocks.div_ceil(self.chunk_ratio) * (self.chunk_ratio + 1)
    }

    /// Entries that a file of this kind must have.
    pub(crate) fn entries_of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Differencing => self.entries(),
            _ => self.blocks + (self.blocks - 1) / self.chunk_ratio,
        }
    }

    /// Table index of a payload block.
    pub(crate) fn payload_index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Table index of the sector bitmap of the chunk that holds a block.
    pub(crate) fn bitmap_index(&self, block: u64) -> u64 {
        block / self.chunk_ratio * (self.chunk_ratio + 1) + self.chunk_ratio
    }

    pub(crate) fn sectors_per_block(&self) -> u64 {
        self.block_size / self.sector
    }
}

/// The table in memory. Reads of entries take no lock; changes happen under the block's stripe.
pub(crate) struct Bat {
    entries: Vec<AtomicU64>,
}

/// A payload entry as reads see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Payload {
    pub(crate) state: BlockState,
    /// File offset, for `Full` and `Partial`.
    pub(crate) offset: u64,
}

impl Payload {
    /// The entry as the table holds it.
    pub(crate) fn raw(self) -> u64 {
        match self.state {
            BlockState::NotPresent => NOT_PRESENT,
            BlockState::Zero => ZERO,
            BlockState::Full => FULL | self.offset,
            BlockState::Partial => PARTIAL | self.offset,
        }
    }
}

/// The entry of a sector bitmap block at `offset`.
pub(crate) fn bitmap_raw(offset: u64) -> u64 {
    FULL | offset
}

impl Bat {
    /// From the region's bytes, checked against `file_len` and the other regions. Gives the table and
    /// the space that blocks and regions occupy.
    pub(crate) fn parse(
        bytes: &[u8],
        shape: &Shape,
        kind: Kind,
        taken: &[Region],
        file_len: u64,
    ) -> Result<(Self, Space), String> {
        let mut spans: Vec<(u64, u64)> =
            taken.iter().map(|r| (r.offset, r.offset + r.len)).collect();
        let mut entries = Vec::with_capacity((bytes.len() / 8).min(shape.entries() as usize));
        let used = shape.entries_of(kind);
        for (index, raw) in bytes.chunks_exact(8).take(shape.entries() as usize).enumerate() {
            let mut entry = [0; 8];
            entry.copy_from_slice(raw);
            let entry = u64::from_le_bytes(entry);
            let index = index as u64;
            if index < used {
                check_entry(entry, index, shape, kind, &mut spans)?;
            }
            entries.push(AtomicU64::new(if index < used { entry } else { 0 }));
        }
        if (entries.len() as u64) < used {
            return Err("block allocation table region is too short".to_owned());
        }
        let bat = Self { entries };
        bat.check_bitmaps(shape, kind)?;
        let space = Space::new(spans, shape.block_size, file_len)?;
        Ok((bat, space))
    }

    /// The table of the same file under another size: what lies behind the size is gone, what is new
    /// is not present. At most `capacity` entries, which the caller has made sure are enough.
    pub(crate) fn for_shape(&self, shape: &Shape, kind: Kind, capacity: u64) -> Self {
        let used = shape.entries_of(kind);
        let row = shape.chunk_ratio + 1;
        let keep = |index: u64| {
            let is_bitmap = index % row == shape.chunk_ratio;
            index < used && (is_bitmap || index - index / row < shape.blocks)
        };
        let entries = (0..shape.entries().min(capacity))
            .map(|index| AtomicU64::new(if keep(index) { self.raw(index) } else { 0 }))
            .collect();
        Self { entries }
    }

    /// A partial block needs its chunk's sector bitmap.
    fn check_bitmaps(&self, shape: &Shape, kind: Kind) -> Result<(), String> {
        if kind != Kind::Differencing {
            return Ok(());
        }
        for block in 0..shape.blocks {
            let partial = self.raw(shape.payload_index(block)) & STATE_MASK == PARTIAL;
            if partial && self.bitmap(shape, block).is_none() {
                return Err(format!("block {block} is partial but has no sector bitmap"));
            }
        }
        Ok(())
    }

    pub(crate) fn raw(&self, index: u64) -> u64 {
        self.entries.get(index as usize).map_or(0, |e| e.load(Ordering::Acquire))
    }

    pub(crate) fn set_raw(&self, index: u64, value: u64) {
        if let Some(entry) = self.entries.get(index as usize) {
            entry.store(value, Ordering::Release);
        }
    }

    pub(crate) fn payload(&self, shape: &Shape, block: u64) -> Payload {
        let raw = self.raw(shape.payload_index(block));
        let state = match raw & STATE_MASK {
            NOT_PRESENT => BlockState::NotPresent,
            FULL => BlockState::Full,
            PARTIAL => BlockState::Partial,
            // Undefined and unmapped read as zeros here, always.
            _ => BlockState::Zero,
        };
        Payload { state, offset: raw & !(STATE_MASK | RESERVED_MASK) }
    }

    /// File offset of a chunk's sector bitmap.
    pub(crate) fn bitmap(&self, shape: &Shape, block: u64) -> Option<u64> {
        let raw = self.raw(shape.bitmap_index(block));
        (raw & STATE_MASK == FULL).then_some(raw & !(STATE_MASK | RESERVED_MASK))
    }

    /// One 4 KiB page of the table as it goes to the file.
    pub(crate) fn page(&self, page: u64) -> Box<[u8; 4096]> {
        let mut bytes = Box::new([0; 4096]);
        for (i, slot) in bytes.chunks_exact_mut(8).enumerate() {
            slot.copy_from_slice(&self.raw(page * 512 + i as u64).to_le_bytes());
        }
        bytes
    }
}

/// Checks one entry; adds the space it takes.
fn check_entry(
    entry: u64,
    index: u64,
    shape: &Shape,
    kind: Kind,
    spans: &mut Vec<(u64, u64)>,
) -> Result<(), String> {
    if entry & RESERVED_MASK != 0 {
        return Err(format!("block table entry {index} has reserved bits set"));
    }
    let offset = entry & !(STATE_MASK | RESERVED_MASK);
    let is_bitmap = index % (shape.chunk_ratio + 1) == shape.chunk_ratio;
    let len = match (is_bitmap, entry & STATE_MASK) {
        (_, NOT_PRESENT) | (false, UNDEFINED | ZERO | UNMAPPED) => return Ok(()),
        (true, FULL) if kind == Kind::Differencing => BITMAP_BLOCK,
        (false, FULL) => shape.block_size,
        (false, PARTIAL) if kind == Kind::Differencing => shape.block_size,
        (_, state) => return Err(format!("block table entry {index} has state {state}")),
    };
    let end = offset
        .checked_add(len)
        .ok_or_else(|| format!("block table entry {index} points too far"))?;
    if offset < MIB {
        return Err(format!("block table entry {index} points into the headers"));
    }
    spans.push((offset, end));
    Ok(())
}

/// Where new blocks go: freed places first, then the file's end.
pub(crate) struct Space {
    block_size: u64,
    /// Free places of one block each. Their old content is still there.
    free: BTreeSet<u64>,
    /// What the open found unused, last one first; ranges, for a sparse file may be of any length.
    gaps: Vec<Range<u64>>,
    /// Everything from here on is unused, and zero where the file reaches.
    end: u64,
}

/// A place for a new block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    /// It held something before and must be cleared.
    pub(crate) used: bool,
}

impl Space {
    /// What is free beside these spans in a file of this length. Fails where two of them overlap or
    /// one lies outside.
    pub(crate) fn new(
        mut spans: Vec<(u64, u64)>,
        block_size: u64,
        file_len: u64,
    ) -> Result<Self, String> {
        spans.sort_unstable();
        let mut gaps = Vec::new();
        let mut at = MIB;
        for (start, end) in spans {
            if start < at {
                return Err(format!("two structures of the file overlap at {start}"));
            }
            if end > file_len {
                return Err(format!("a structure ends at {end}, after the file's end {file_len}"));
            }
            gaps.push(at..start);
            at = end;
        }
        // What lies between the last structure and the file's end was allocated but never committed:
        // it may hold anything.
        gaps.push(at..file_len / MIB * MIB);
        gaps.retain(|gap| gap.start + block_size <= gap.end);
        gaps.reverse();
        let end = at.max(file_len.next_multiple_of(MIB));
        Ok(Self { block_size, free: BTreeSet::new(), gaps, end })
    }

    /// A place for a payload block.
    pub(crate) fn take_block(&mut self) -> Place {
        match self.take_gap().or_else(|| self.free.pop_first()) {
            Some(offset) => Place { offset, used: true },
            None => self.take_end(self.block_size),
        }
    }

    fn take_gap(&mut self) -> Option<u64> {
        let gap = self.gaps.last_mut()?;
        let offset = gap.start;
        gap.start += self.block_size;
        if gap.start + self.block_size > gap.end {
            self.gaps.pop();
        }
        Some(offset)
    }

    /// A place at the end of the file.
    pub(crate) fn take_end(&mut self, len: u64) -> Place {
        let offset = self.end;
        self.end += len;
        Place { offset, used: false }
    }

    /// Gives a payload block's place back.
    pub(crate) fn give_back(&mut self, offset: u64) {
        self.free.insert(offset);
    }

    /// The size that holds everything allocated.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(size: u64, block_size: u32, sector: u32) -> Shape {
        Shape::new(Geometry { size, logical_sector: sector, physical_sector: 4096 }, block_size)
    }

    #[test]
    fn table_size_matches_the_specification_example() {
        // [MS-VHDX]: 64 TiB in 1 MiB blocks of 512 B sectors.
        let s = shape(64 << 40, 1 << 20, 512);
        assert_eq!((s.chunk_ratio, s.entries()), (4096, 67_125_248));
        assert_eq!(shape(1 << 40, 256 << 20, 512).chunk_ratio, 16);
        assert_eq!(shape(1 << 40, 1 << 20, 4096).chunk_ratio, 32768);
    }

    #[test]
    fn bitmap_entries_follow_each_chunk() {
        let s = shape(10 << 30, 1 << 20, 512);
        assert_eq!(s.payload_index(4095), 4095);
        assert_eq!(s.bitmap_index(4095), 4096);
        assert_eq!(s.payload_index(4096), 4097);
        assert_eq!(s.bitmap_index(4096), 8193);
    }

    #[test]
    fn gaps_and_uncommitted_tail_are_reused() {
        let mut space =
            Space::new(vec![(4 * MIB, 5 * MIB), (7 * MIB, 8 * MIB)], MIB, 10 * MIB).unwrap();
        let mut taken: Vec<_> =
            (0..7).map(|_| space.take_block()).map(|p| (p.offset / MIB, p.used)).collect();
        taken.push((space.take_block().offset / MIB, false));
        assert_eq!(
            taken,
            [
                (1, true),
                (2, true),
                (3, true),
                (5, true),
                (6, true),
                (8, true),
                (9, true),
                (10, false)
            ]
        );
        assert!(Space::new(vec![(MIB, 3 * MIB), (2 * MIB, 4 * MIB)], MIB, 10 * MIB).is_err());
        assert!(Space::new(vec![(MIB, 11 * MIB)], MIB, 10 * MIB).is_err());
    }
}
