//! Moving a child's blocks into its parent, and its tracking with them.

use std::sync::atomic::{AtomicBool, Ordering};

use super::merge::{Job, forget_ids};
use super::node::{Node, Payload};
use super::rules::Rule;
use super::{Chain, MergeProgress};
use crate::block::BlockRange;
use crate::error::{DiskError, Result};
use crate::rct::{RctId, Tracker};
use crate::vhdx::{BlockState, Presence};

/// Copied under one hold of a block's lock: how long a guest write may wait for it. (Small disks in
/// tests must have many pieces and batches, too.)
const PIECE: u64 = if cfg!(test) { 256 << 10 } else { 1 << 20 };
/// Data of one batch: one sync of the parent, one release in the child.
const BATCH: u64 = if cfg!(test) { 1 << 20 } else { 8 << 20 };
/// Blocks of one batch.
const BATCH_BLOCKS: usize = 256;
/// Blocks looked at under one request.
const SCAN: u64 = 1 << 16;
/// Part of the map handed over under one request.
const WINDOW: u64 = 1 << 30;
/// How often a batch is copied again because a guest write reached the child only.
const RETRIES: usize = 8;

/// The epochs under which a child's data is marked in the parent: exact between the child's ids, so
/// that each of them means the same in the parent.
struct Levels {
    /// Of data that no id of the child ended before.
    first: u32,
    /// (an id's epoch, the mark of what was written after it), ascending.
    later: Vec<(u32, u32)>,
}

impl Levels {
    /// Without the child's pair everything counts as written after the parent's last id.
    fn new(child: &Node, parent: &Tracker) -> Self {
        let tracker = child.tracker().ok();
        let ids = tracker.map(Tracker::sealed_ids).unwrap_or_default();
        let current = tracker.map_or(parent.epoch(), Tracker::epoch);
        // An id of the parent must never seem later than the child's data, whatever became of epochs.
        let theirs = |id: &&RctId| !ids.contains(id);
        let floor = parent.sealed_ids().iter().filter(theirs).map(|id| id.epoch).max();
        let floor = floor.map_or(0, |e| e.saturating_add(1));
        let mut epochs: Vec<u32> = ids.iter().map(|id| id.epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        let marks = epochs.iter().copied().skip(1).chain([current]);
        let later = epochs.iter().copied().zip(marks.map(|m| m.max(floor))).collect();
        let first = epochs.first().copied().unwrap_or(current).max(floor);
        Self { first, later }
    }

    /// Marks a range that the child holds. The caller keeps the regions' bits until the data is there.
    fn mark(&self, child: &Node, parent: &Tracker, range: &BlockRange) -> Result<()> {
        drop(parent.before_merge_write(range.start, range.end - range.start, self.first)?);
        self.mark_later(child, parent, range)
    }

    /// Marks what of a range was written after the child's ids.
    fn mark_later(&self, child: &Node, parent: &Tracker, range: &BlockRange) -> Result<()> {
        let Ok(tracker) = child.tracker() else { return Ok(()) };
        for (sealed, mark) in &self.later {
            for part in tracker.changed_after(*sealed, range.clone())? {
                let start = part.start.max(range.start);
                let end = part.end.min(range.end);
                if start < end {
                    drop(parent.before_merge_write(start, end - start, *mark)?);
                }
            }
        }
        Ok(())
    }
}

impl Chain {
    /// Moves every block of the child down, in batches. Guest writes never make new blocks in the
    /// child meanwhile, so one pass ends.
    pub(super) fn move_blocks(
        &self,
        job: Job,
        progress: &dyn Fn(MergeProgress),
        cancel: &AtomicBool,
    ) -> Result<()> {
        let mut state = MergeProgress { done: 0, total: self.data_of(job)? };
        progress(state);
        let mut next = 0;
        loop {
            let batch = self.next_batch(job, &mut next)?;
            if batch.is_empty() {
                return Ok(());
            }
            self.move_batch(job, &batch, &mut |bytes| {
                state.done = (state.done + bytes).min(state.total);
                progress(state);
                if cancel.load(Ordering::Relaxed) { Err(DiskError::Cancelled) } else { Ok(()) }
            })?;
        }
    }

    /// Bytes of data that the child holds.
    fn data_of(&self, job: Job) -> Result<u64> {
        let mut total = 0;
        let mut block = 0;
        while let Some(found) = self.next_present(job, &mut block)? {
            let request = self.enter()?;
            total += data_in(job.child(&request.layout)?, found)?;
        }
        Ok(total)
    }

    /// The next block from `from` on that the child holds; `from` moves behind it.
    fn next_present(&self, job: Job, from: &mut u64) -> Result<Option<u64>> {
        loop {
            let request = self.enter()?;
            let child = job.child(&request.layout)?;
            let end = child.blocks().min(from.saturating_add(SCAN));
            let here = |b: &u64| child.vhdx.block_state(*b) != BlockState::NotPresent;
            if let Some(block) = (*from..end).find(here) {
                *from = block + 1;
                return Ok(Some(block));
            }
            if end == child.blocks() {
                return Ok(None);
            }
            *from = end;
        }
    }

    /// Blocks to move together, ascending; empty at the end.
    fn next_batch(&self, job: Job, from: &mut u64) -> Result<Vec<u64>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < BATCH_BLOCKS && bytes < BATCH {
            let mut after = *from;
            let Some(block) = self.next_present(job, &mut after)? else { break };
            let request = self.enter()?;
            bytes += data_in(job.child(&request.layout)?, block)?;
            if bytes > BATCH && !batch.is_empty() {
                break;
            }
            batch.push(block);
            *from = after;
        }
        Ok(batch)
    }

    /// Copies the blocks piece by piece, makes them durable, and releases them in the child.
    fn move_batch(
        &self,
        job: Job,
        batch: &[u64],
        copied: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        for _ in 0..RETRIES {
            self.reset_copied(job, batch.first().copied())?;
            for &block in batch {
                self.copy_block(job, block, copied)?;
            }
            self.step("merge:copied")?;
            // Guests go on meanwhile.
            if self.rules.obey(Rule::SyncBeforeRelease) {
                // Not under a request: a pause need not wait for it.
                let parent = job.parent(&self.enter()?.layout)?.vhdx.clone();
                parent.flush()?;
            }
            self.step("merge:flushed")?;
            if self.release(job, batch)? {
                return self.step("merge:released");
            }
        }
        Err(DiskError::State("guest writes could not be copied to the parent".to_owned()))
    }

    fn reset_copied(&self, job: Job, first: Option<u64>) -> Result<()> {
        let request = self.enter()?;
        if let Some(merge) = &request.layout.merge {
            let at = first.unwrap_or(0) * job.child(&request.layout)?.block_size;
            merge.set_copied(at..at);
            merge.take_spoiled();
        }
        Ok(())
    }

    fn copy_block(
        &self,
        job: Job,
        block: u64,
        copied: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = {
            let request = self.enter()?;
            let child = job.child(&request.layout)?;
            (block * child.block_size, child.size.min((block + 1) * child.block_size))
        };
        while at < end {
            let stop = end.min(at + PIECE);
            let bytes = self.copy_piece(job, block, at..stop)?;
            self.step("merge:piece")?;
            copied(bytes)?;
            at = stop;
        }
        Ok(())
    }

    /// Copies what the child holds of a piece of one block. Marks come before data, as for a write: the
    /// regions' bits are durable, and kept by the guard, until the data is written. Killed before: the
    /// parent's copy is not asked for yet. After: its region counts as changed.
    fn copy_piece(&self, job: Job, block: u64, piece: BlockRange) -> Result<u64> {
        let request = self.enter()?;
        let (child, parent) = (job.child(&request.layout)?, job.parent(&request.layout)?);
        let tracker = parent.writing()?;
        let levels = Levels::new(child, tracker);
        let merge = request.layout.merge.as_ref();
        // Marks nothing itself. Its sync comes before guest writes are held back, and the marks below
        // then need none.
        let _tracked = tracker.before_merge_write(piece.start, piece.end - piece.start, 0)?;
        let _held = merge.map(|m| m.stripe(block).write());
        let mut bytes = 0;
        for (range, presence) in child.present(&piece)? {
            if self.rules.obey(Rule::MarkWhatIsCopied) {
                levels.mark(child, tracker, &range)?;
            }
            if presence == Presence::Zero {
                parent.put(range.start, Payload::Zeros(range.end - range.start))?;
                continue;
            }
            copy_data(child, parent, &range)?;
            bytes += range.end - range.start;
        }
        if let Some(merge) = merge {
            merge.set_copied(merge.copied().start..piece.end);
        }
        Ok(bytes)
    }

    /// Gives the batch up in the child, if the parent has all of it. Killed before: the child still
    /// has the blocks, and what it has is read. After: the parent has them, durably as of the sync
    /// after the copies, which is all that guests may count on: their flushes sync the parent too.
    fn release(&self, job: Job, batch: &[u64]) -> Result<bool> {
        let request = self.enter()?;
        let child = job.child(&request.layout)?;
        let Some(merge) = &request.layout.merge else {
            // Nobody writes to this file: a pause need not wait for the syncs.
            let child = child.vhdx.clone();
            drop(request);
            return child.release_blocks(batch).map(|()| true);
        };
        let stripes = merge.stripes(batch);
        let _held: Vec<_> = stripes.iter().map(|s| s.write()).collect();
        if merge.take_spoiled() {
            return Ok(false);
        }
        child.vhdx.release_blocks(batch)?;
        merge.set_copied(0..0);
        Ok(true)
    }

    /// Once the child is empty: its marks and ids go to the parent. The marks went with the data
    /// already, but for writes that a parent's pair lost with a crash in the middle of the merge.
    pub(super) fn hand_over_tracking(&self, job: Job) -> Result<()> {
        let mut at = 0;
        while at < self.geometry.size {
            let request = self.enter()?;
            let (child, parent) = (job.child(&request.layout)?, job.parent(&request.layout)?);
            let end = child.size.min(at + WINDOW);
            if at < end {
                let tracker = parent.writing()?;
                Levels::new(child, tracker).mark_later(child, tracker, &(at..end))?;
            }
            at += WINDOW;
        }
        self.step("merge:marked")?;
        let request = self.enter()?;
        let (child, parent) = (job.child(&request.layout)?, job.parent(&request.layout)?);
        if job.of_leaf && !self.rules.obey(Rule::AdoptBeforeForget) {
            let ids = child.tracker().map(Tracker::sealed_ids).unwrap_or_default();
            forget_ids(child)?;
            return parent.writing()?.adopt_ids(&ids);
        }
        // Marks are durable before ids that rest on them: by the map or by the regions' bits, which
        // stay set until a map flush.
        if let Ok(tracker) = child.tracker() {
            parent.writing()?.adopt_ids(&tracker.sealed_ids())?;
        }
        drop(request);
        self.step("merge:adopted")
    }
}

/// Bytes of data, not of zeros, that a block holds.
fn data_in(node: &Node, block: u64) -> Result<u64> {
    let start = block * node.block_size;
    let parts = node.present(&(start..start + node.block_size))?;
    let data = parts.iter().filter(|(_, p)| *p == Presence::Data);
    Ok(data.map(|(r, _)| r.end - r.start).sum())
}

fn copy_data(child: &Node, parent: &Node, range: &BlockRange) -> Result<()> {
    let mut buf = vec![0; (range.end - range.start) as usize];
    let absent = child.vhdx.read_at(range.start, &mut buf)?;
    if !absent.is_empty() {
        return Err(DiskError::corrupt(child.path(), "a sector went away while it was copied"));
    }
    parent.put(range.start, Payload::Data(&buf))
}
