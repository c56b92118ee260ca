//! "Changed since" over a chain.

use super::node::Node;
use super::{Chain, Layout};
use crate::GRANULE;
use crate::block::BlockRange;
use crate::error::{DiskError, Result};
use crate::rct::RctId;

/// Looked at under one request: a pause waits for it. Granules, and so ranges, do not cross its border.
const WINDOW: u64 = 1 << 30;

/// A part of the answer to "changed since?".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedPage {
    /// Ascending, granule aligned, clipped to the disk. The last one may touch the next page's first.
    pub ranges: Vec<BlockRange>,
    /// Where to go on; `None` at the end of the disk.
    pub next: Option<u64>,
}

impl Chain {
    /// Ranges that may differ from the content at `id`, as of this chain's leaf: granule aligned,
    /// merged, clipped to the disk. Fails with `UnknownRctId` where only a full read is safe.
    ///
    /// The answer takes up to 128 MiB for each TiB of the disk; [`Chain::changed_since_from`] gives it
    /// in pages.
    pub fn changed_since(&self, id: &RctId) -> Result<Vec<BlockRange>> {
        let mut out: Vec<BlockRange> = Vec::new();
        let mut next = Some(0);
        while let Some(from) = next {
            let page = self.changed_since_from(id, from, usize::MAX)?;
            for range in page.ranges {
                match out.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => out.push(range),
                }
            }
            next = page.next;
        }
        Ok(out)
    }

    /// Like [`Chain::changed_since`], for the disk from `offset` on (a multiple of the granule), and at
    /// most `max_ranges` ranges at once (at least one). Each page is right by itself, also where a
    /// checkpoint or a merge changes the chain's files between two pages: every window of the disk is
    /// answered by the files that hold it at that moment.
    pub fn changed_since_from(
        &self,
        id: &RctId,
        offset: u64,
        max_ranges: usize,
    ) -> Result<ChangedPage> {
        let size = self.geometry.size;
        if offset > size || !offset.is_multiple_of(GRANULE) {
            return Err(DiskError::OutOfRange { offset, len: 0 });
        }
        let max_ranges = max_ranges.max(1);
        let mut ranges = Vec::new();
        let mut at = offset;
        loop {
            let end = size.min((at / WINDOW + 1) * WINDOW);
            let mut found = Vec::new();
            {
                let request = self.enter()?;
                let sealed = self.sealed_in(&request.layout, id)?;
                changed_in(&request.layout.nodes, sealed, id, at..end, &mut found)?;
            }
            let found = normalise(found, at..end);
            let room = max_ranges - ranges.len();
            if let Some(first_left) = found.get(room) {
                let next = Some(first_left.start);
                ranges.extend_from_slice(&found[..room]);
                return Ok(ChangedPage { ranges, next });
            }
            ranges.extend(found);
            at = end;
            if at >= size {
                return Ok(ChangedPage { ranges, next: None });
            }
            if ranges.len() == max_ranges {
                return Ok(ChangedPage { ranges, next: Some(at) });
            }
        }
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

/// Sorted, in whole granules, joined, clipped to a window whose start is a granule's.
fn normalise(mut ranges: Vec<BlockRange>, window: BlockRange) -> Vec<BlockRange> {
    ranges.sort_unstable_by_key(|r| r.start);
    let mut out = Vec::with_capacity(ranges.len());
    for range in ranges {
        push(&mut out, range);
    }
    for range in &mut out {
        *range = range.start.max(window.start)..range.end.min(window.end);
    }
    out.retain(|r| r.start < r.end);
    out
}
