//! Metadata contexts: what BLOCK_STATUS says of a range.

use super::export::Served;
use super::proto::{STATE_CHANGED, STATE_HOLE, STATE_ZERO};
use crate::block::{BlockRange, ExtentKind};
use crate::error::Result;

/// Contexts one connection may choose.
pub(super) const MAX_CONTEXTS: usize = 16;
/// Extents in one reply; the client asks again from where they end.
const MAX_EXTENTS: usize = 4096;
/// The disk is asked for the extents of this much at a time, which bounds the memory of a reply
/// however fragmented the disk is.
const WINDOW: u64 = 64 << 20;

/// A chosen context.
pub(super) struct Context {
    pub(super) name: String,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    /// `base:allocation`.
    Allocation,
    /// `tidemark:changed-since:…`: ordered, disjoint ranges.
    Changed(Vec<BlockRange>),
}

/// Run-length list of one reply: neighbours with equal flags are one extent.
struct Runs {
    runs: Vec<(u32, u32)>,
    limit: usize,
}

impl Runs {
    /// Adds a run; false once the limit is reached and the run did not fit.
    fn push(&mut self, len: u64, flags: u32) -> bool {
        if let Some((last, same)) = self.runs.last_mut()
            && *same == flags
        {
            // The request is at most u32::MAX long, and so is the sum of its parts.
            *last += len as u32;
            return true;
        }
        if self.runs.len() == self.limit {
            return false;
        }
        self.runs.push((len as u32, flags));
        true
    }
}

impl Kind {
    pub(super) fn changed(mut ranges: Vec<BlockRange>) -> Self {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_by_key(|range| range.start);
        let mut merged: Vec<BlockRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Self::Changed(merged)
    }

    /// The (length, flags) extents that cover the range from its start: all of it, or as much as fits
    /// one reply (one extent, if `one`). The range lies inside the disk and is not empty.
    pub(super) fn status(
        &self,
        served: &Served,
        range: BlockRange,
        one: bool,
    ) -> Result<Vec<(u32, u32)>> {
        let mut runs = Runs { runs: Vec::new(), limit: if one { 1 } else { MAX_EXTENTS } };
        match self {
            Self::Allocation => allocation(served, range, &mut runs)?,
            Self::Changed(ranges) => changed(ranges, range, &mut runs),
        }
        Ok(runs.runs)
    }
}

fn allocation(served: &Served, range: BlockRange, runs: &mut Runs) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let until = range.end.min(at + WINDOW);
        let wide = served.widen(at, until - at);
        for extent in served.disk().extents(wide.start, wide.end - wide.start)? {
            let end = (extent.offset + extent.len).min(until);
            if end <= at {
                continue;
            }
            let flags = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Zero => STATE_ZERO,
                ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
            };
            if !runs.push(end - at, flags) {
                return Ok(());
            }
            at = end;
        }
        if at < until {
            return Err(crate::DiskError::State("the disk left a gap in its extents".to_owned()));
        }
    }
    Ok(())
}

fn changed(ranges: &[BlockRange], range: BlockRange, runs: &mut Runs) {
    let mut at = range.start;
    let first = ranges.partition_point(|r| r.end <= at);
    for next in &ranges[first..] {
        if next.start >= range.end {
            break;
        }
        let start = next.start.max(at);
        let end = next.end.min(range.end);
        if start > at && !runs.push(start - at, 0) {
            return;
        }
        if !runs.push(end - start, STATE_CHANGED) {
            return;
        }
        at = end;
    }
    if at < range.end {
        runs.push(range.end - at, 0);
    }
}
