//! "Changed since" over a chain.

use super::node::Node;
use super::{Chain, Layout};
use crate::GRANULE;
use crate::block::BlockRange;
use crate::error::{DiskError, Result};
use crate::rct::RctId;

/// Looked at under one request: a pause waits for it.
const WINDOW: u64 = 1 << 30;

impl Chain {
    /// Ranges that may differ from the content at `id`, as of this chain's leaf: granule aligned,
    /// merged, clipped to the disk. Fails with `UnknownRctId` where only a full read is safe.
    pub fn changed_since(&self, id: &RctId) -> Result<Vec<BlockRange>> {
        // A merge that ends meanwhile changes which files to ask: begin again.
        for _ in 0..16 {
            if let Some(ranges) = self.try_changed_since(id)? {
                return Ok(ranges);
            }
        }
        Err(DiskError::State("the disk's files keep changing: ask again".to_owned()))
    }

    fn try_changed_since(&self, id: &RctId) -> Result<Option<Vec<BlockRange>>> {
        let (generation, sealed) = {
            let layout = self.enter()?.layout;
            (layout.generation, self.sealed_in(&layout, id)?)
        };
        let mut out = Vec::new();
        let mut at = 0;
        while at < self.geometry.size {
            let end = self.geometry.size.min(at + WINDOW);
            let request = self.enter()?;
            if request.layout.generation != generation {
                return Ok(None);
            }
            changed_in(&request.layout.nodes, sealed, id, at..end, &mut out)?;
            at = end;
        }
        let size = self.geometry.size;
        Ok(Some(normalise(out, size)))
    }

    /// The highest file whose pair knows the id: its marks are complete since then, and what was
    /// written later without being marked there is present in the files above it.
    fn sealed_in(&self, layout: &Layout, id: &RctId) -> Result<usize> {
        let unknown = |why: String| DiskError::UnknownRctId { id: id.to_string(), why };
        let mut silent = Vec::new();
        for (index, node) in layout.nodes.iter().enumerate().rev() {
            match node.tracker() {
                Ok(tracker) if tracker.knows(id) => return Ok(index),
                Ok(_) => {}
                Err(why) => silent.push(format!("{}: {why}", node.name().display())),
            }
        }
        if id.lineage != self.lineage {
            return Err(unknown(format!("it belongs to another disk, not to {}", self.lineage)));
        }
        if !silent.is_empty() {
            return Err(unknown(silent.join("; ")));
        }
        Err(unknown("no file of this chain was sealed under it".to_owned()))
    }
}

/// Asks the files above `sealed` before its marks, top first: data that a merge moves down meanwhile
/// is marked below before it leaves the file above.
fn changed_in(
    nodes: &[Node],
    sealed: usize,
    id: &RctId,
    window: BlockRange,
    out: &mut Vec<BlockRange>,
) -> Result<()> {
    let (below, above) = nodes.split_at((sealed + 1).min(nodes.len()));
    for node in above.iter().rev() {
        for (part, _) in node.present(&window)? {
            push(out, part);
        }
    }
    let Some(node) = below.last() else { return Ok(()) };
    // The disk has grown since: what lies beyond the old end was not there.
    if node.size < window.end {
        push(out, window.start.max(node.size)..window.end);
    }
    let end = window.end.min(node.size);
    if window.start < end {
        let tracker = node
            .tracker()
            .map_err(|why| DiskError::UnknownRctId { id: id.to_string(), why: why.to_owned() })?;
        out.extend(tracker.changed_after(id.epoch, window.start..end)?);
    }
    Ok(())
}

/// Adds a range, in whole granules, to a list that grows mostly upwards.
fn push(out: &mut Vec<BlockRange>, range: BlockRange) {
    let range = range.start / GRANULE * GRANULE..range.end.next_multiple_of(GRANULE);
    match out.last_mut() {
        Some(last) if last.start <= range.start && range.start <= last.end => {
            last.end = last.end.max(range.end);
        }
        _ => out.push(range),
    }
}

/// Sorted, in whole granules, joined, clipped.
fn normalise(mut ranges: Vec<BlockRange>, size: u64) -> Vec<BlockRange> {
    ranges.sort_unstable_by_key(|r| r.start);
    let mut out = Vec::with_capacity(ranges.len());
    for range in ranges {
        push(&mut out, range);
    }
    for range in &mut out {
        range.end = range.end.min(size);
    }
    out.retain(|r| r.start < r.end);
    out
}
