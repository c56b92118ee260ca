//! Making a file smaller without changing what it reads as.
//!
//! First blocks of zeros leave their places, then blocks move from the file's end into gaps, then the
//! end is cut off. A block is copied into a place that no durable table names, and synced, before a log
//! entry points at it; places that were left are not used again until the end:
//!
//! | killed | state |
//! |---|---|
//! | before a batch's log entry is durable | its blocks are where they were; their copies are free space |
//! | after it | they are at their new places; the old ones are free space |
//!
//! No DataWriteGuid changes: for readers, children and change tracking nothing has happened.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::error::{DiskError, Result};
use crate::vhdx::bat::{Payload, bitmap_raw};
use crate::vhdx::layout::Region;
use crate::vhdx::{BlockState, Kind};

use super::Vhdx;
use super::place::{PAGE_ENTRIES, Span, What};

/// What is read or copied at once.
const PIECE: u64 = 1 << 20;
/// What is moved under one sync.
const BATCH: u64 = if cfg!(test) { 2 << 20 } else { 128 << 20 };
/// Blocks that give their places up under one sync.
const ZERO_BATCH: usize = if cfg!(test) { 3 } else { 4096 };

/// What compacting a file would do, or has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CompactPlan {
    /// The file's length before, in bytes.
    pub length_before: u64,
    /// And after.
    pub length_after: u64,
    /// Blocks of nothing but zeros, which need no place.
    pub zero_blocks: u64,
    /// Partial blocks of which the file holds no sector.
    pub empty_blocks: u64,
    /// Structures that move towards the file's start.
    pub moved: u64,
    /// Bytes to be copied for that.
    pub moved_bytes: u64,
}

/// How far compacting has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompactProgress {
    /// "look for zeros" or "move blocks".
    pub step: &'static str,
    /// Bytes done in this step.
    pub done: u64,
    /// Bytes of this step.
    pub total: u64,
}

/// A structure on its way to the file's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Move {
    span: Span,
    to: u64,
}

/// Free places, lowest first.
struct Gaps {
    /// Long enough for a payload block; start and end.
    wide: BTreeMap<u64, u64>,
    narrow: BTreeMap<u64, u64>,
    block_size: u64,
}

impl Gaps {
    fn add(&mut self, start: u64, end: u64) {
        if start + self.block_size <= end {
            self.wide.insert(start, end);
        } else if start < end {
            self.narrow.insert(start, end);
        }
    }

    /// The lowest place of this length before `limit`; short things go where no block fits.
    fn take(&mut self, len: u64, limit: u64) -> Option<u64> {
        let fits = |(start, end): (&u64, &u64)| {
            (*start + len <= *end && *start + len <= limit).then_some((*start, *end))
        };
        let short = len < self.block_size;
        let narrow = short.then(|| self.narrow.iter().find_map(fits)).flatten();
        let (start, end) = narrow.or_else(|| self.wide.iter().find_map(fits))?;
        self.narrow.remove(&start);
        self.wide.remove(&start);
        self.add(start + len, end);
        Some(start)
    }
}

/// What goes where so that the file becomes as short as it can; the end after that.
fn plan(mut spans: Vec<Span>, block_size: u64) -> (Vec<Move>, u64) {
    spans.sort_unstable_by_key(|s| s.offset);
    let mut gaps = Gaps { wide: BTreeMap::new(), narrow: BTreeMap::new(), block_size };
    let mut at = crate::vhdx::layout::MIB;
    for span in &spans {
        gaps.add(at, span.offset);
        at = at.max(span.end());
    }
    let mut moves = Vec::new();
    let mut end = spans.first().map_or(at, Span::end);
    while let Some(span) = spans.pop() {
        let movable = span.what != What::Anchored;
        let place = movable.then(|| gaps.take(span.len, span.offset)).flatten();
        let Some(to) = place else {
            // The last structure stays: nothing below it makes the file shorter.
            end = end.max(span.end());
            break;
        };
        end = end.max(to + span.len);
        moves.push(Move { span, to });
    }
    (moves, end)
}

impl Vhdx {
    /// What [`Vhdx::compact`] would do. `scan` reads all blocks and looks for zeros; without it only
    /// places that are free already count.
    pub fn compact_plan(
        &self,
        scan: bool,
        progress: &dyn Fn(CompactProgress),
        cancel: &AtomicBool,
    ) -> Result<CompactPlan> {
        let useless = self.useless_blocks(scan, progress, cancel)?;
        let gone = |what: What| matches!(what, What::Block(b) if useless.contains_key(&b));
        let spans = self.spans().into_iter().filter(|s| !gone(s.what)).collect();
        let (moves, end) = plan(spans, self.shape.block_size);
        let zero = useless.values().filter(|s| **s == BlockState::Zero).count() as u64;
        let length_before = *self.file_len.lock();
        Ok(CompactPlan {
            length_before,
            length_after: end.min(length_before),
            zero_blocks: zero,
            empty_blocks: useless.len() as u64 - zero,
            moved: moves.len() as u64,
            moved_bytes: moves.iter().map(|m| m.span.len).sum(),
        })
    }

    /// Makes the file as short as it can be and gives its unused space back to the host. What the disk
    /// reads as, its DataWriteGuid and its change tracking stay as they are. `scan` as in
    /// [`Vhdx::compact_plan`]. Cancelled or failed it has done a part, which is right as it is.
    pub fn compact(
        &mut self,
        scan: bool,
        progress: &dyn Fn(CompactProgress),
        cancel: &AtomicBool,
    ) -> Result<CompactPlan> {
        self.flush()?;
        let length_before = *self.file_len.get_mut();
        let useless = self.useless_blocks(scan, progress, cancel)?;
        let zero = useless.values().filter(|s| **s == BlockState::Zero).count() as u64;
        let useless: Vec<_> = useless.into_iter().collect();
        for batch in useless.chunks(ZERO_BATCH) {
            for (block, state) in batch {
                let payload = Payload { state: *state, offset: 0 };
                self.point(self.shape.payload_index(*block), payload.raw());
            }
            self.flush_pending()?;
        }
        // The places of these blocks are free from here on: no durable table names them.
        let (moves, _) = plan(self.spans(), self.shape.block_size);
        let moved = self.move_all(&moves, progress, cancel);
        // Also after a failure: free is what the durable table says.
        let rebuilt = self.flush_pending().and_then(|()| self.rebuild_space());
        moved.and(rebuilt)?;
        self.cut_tail()?;
        self.punch_gaps()?;
        Ok(CompactPlan {
            length_before,
            length_after: *self.file_len.get_mut(),
            zero_blocks: zero,
            empty_blocks: useless.len() as u64 - zero,
            moved: moves.len() as u64,
            moved_bytes: moves.iter().map(|m| m.span.len).sum(),
        })
    }

    /// Blocks that have a place and need none, and what they become. ZERO promises zeros to every
    /// reader, also in a child; a partial block without a sector says "ask the parent" either way.
    fn useless_blocks(
        &self,
        scan: bool,
        progress: &dyn Fn(CompactProgress),
        cancel: &AtomicBool,
    ) -> Result<BTreeMap<u64, BlockState>> {
        let mut found = BTreeMap::new();
        if self.kind == Kind::Fixed {
            // Its blocks keep their places, whatever they hold.
            return Ok(found);
        }
        let total = self.shape.size;
        for block in 0..self.shape.blocks {
            match self.block_state(block) {
                BlockState::Full if scan => {
                    if cancel.load(Ordering::Relaxed) {
                        return Err(DiskError::Cancelled);
                    }
                    if self.is_zero(block)? {
                        found.insert(block, BlockState::Zero);
                    }
                    let done = total.min((block + 1) * self.shape.block_size);
                    progress(CompactProgress { step: "look for zeros", done, total });
                }
                BlockState::Partial => {
                    let (begin, len) = self.extent_of(block);
                    let runs = self.runs(block, 0, len)?;
                    debug_assert!(runs.first().is_none_or(|(r, _)| r.start == begin));
                    if runs.iter().all(|(_, present)| !present) {
                        found.insert(block, BlockState::NotPresent);
                    }
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// First byte and length of a block as far as it lies in the disk.
    fn extent_of(&self, block: u64) -> (u64, u64) {
        let begin = block * self.shape.block_size;
        (begin, self.shape.block_size.min(self.shape.size - begin))
    }

    fn is_zero(&self, block: u64) -> Result<bool> {
        let (begin, len) = self.extent_of(block);
        let mut buf = vec![0; PIECE.min(len) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE) as usize;
            self.read_at(begin + done, &mut buf[..n])?;
            if buf[..n].iter().any(|b| *b != 0) {
                return Ok(false);
            }
            done += n as u64;
        }
        Ok(true)
    }

    fn move_all(
        &mut self,
        moves: &[Move],
        progress: &dyn Fn(CompactProgress),
        cancel: &AtomicBool,
    ) -> Result<()> {
        let total = moves.iter().map(|m| m.span.len).sum();
        let (mut done, mut in_batch) = (0, 0);
        for step in moves {
            if cancel.load(Ordering::Relaxed) {
                return Err(DiskError::Cancelled);
            }
            if step.span.what == What::Table {
                self.flush_pending()?;
                in_batch = 0;
                let bat = self.bat.for_shape(&self.shape, self.kind, step.span.len / 8);
                self.move_table(&bat, Region { offset: step.to, len: step.span.len }, Vec::new())?;
            } else {
                self.move_span(step)?;
                in_batch += step.span.len;
            }
            if in_batch >= BATCH {
                self.flush_pending()?;
                in_batch = 0;
            }
            done += step.span.len;
            progress(CompactProgress { step: "move blocks", done, total });
        }
        self.flush_pending()
    }

    /// Changes an entry of the table for the next flush. The pending file does not learn of it: nobody
    /// has been told that it has happened.
    fn point(&self, index: u64, raw: u64) {
        self.bat.set_raw(index, raw);
        self.pending.write().dirty_bat.insert(index / PAGE_ENTRIES);
    }

    /// Copies a structure and points the table in memory at the copy; the next flush syncs the copy
    /// before it logs the table.
    fn move_span(&self, step: &Move) -> Result<()> {
        let mut buf = vec![0; PIECE as usize];
        let mut at = 0;
        while at < step.span.len {
            self.storage.read_exact_at(&mut buf, step.span.offset + at).map_err(self.io("read"))?;
            if buf.iter().any(|b| *b != 0) {
                self.write_payload(&buf, step.to + at)?;
            } else {
                // Stays sparse on the host.
                self.storage.punch(step.to + at, PIECE).map_err(self.io("clear a block of"))?;
                self.unsynced.store(true, Ordering::Release);
            }
            at += PIECE;
        }
        match step.span.what {
            What::Block(block) => {
                let payload = self.bat.payload(&self.shape, block);
                let moved = Payload { offset: step.to, ..payload };
                self.point(self.shape.payload_index(block), moved.raw());
            }
            What::Bitmap(block) => self.point(self.shape.bitmap_index(block), bitmap_raw(step.to)),
            What::Anchored | What::Table => {}
        }
        Ok(())
    }

    /// Gives free space inside the file back to the host. Nothing refers to it.
    fn punch_gaps(&mut self) -> Result<()> {
        let mut spans = self.spans();
        spans.sort_unstable_by_key(|s| s.offset);
        let mut at = crate::vhdx::layout::MIB;
        for span in spans {
            if at < span.offset {
                self.storage.punch(at, span.offset - at).map_err(self.io("clear space of"))?;
            }
            at = at.max(span.end());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn span(offset: u64, len: u64, what: What) -> Span {
        Span { offset: offset * MIB, len: len * MIB, what }
    }

    #[test]
    fn blocks_go_from_the_end_into_the_lowest_gaps_and_bitmaps_into_narrow_ones() {
        let spans = vec![
            span(1, 2, What::Anchored),
            span(7, 2, What::Block(0)),
            span(10, 2, What::Block(1)),
            span(12, 1, What::Bitmap(0)),
            span(13, 2, What::Block(2)),
        ];
        let (moves, end) = plan(spans, 2 * MIB);
        let moves: Vec<_> = moves.iter().map(|m| (m.span.what, m.to / MIB)).collect();
        assert_eq!(moves, [(What::Block(2), 3), (What::Bitmap(0), 9), (What::Block(1), 5)]);
        assert_eq!(end, 10 * MIB);
    }

    #[test]
    fn nothing_moves_where_the_last_structure_is_anchored() {
        let spans = vec![span(4, 1, What::Block(0)), span(9, 1, What::Anchored)];
        assert_eq!(plan(spans, MIB), (Vec::new(), 10 * MIB));
    }
}
