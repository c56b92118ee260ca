//! What of a disk must be read: from its extents and, incrementally, from change tracking. Works in
//! whole chunks and in windows, so that memory does not grow with the disk.

use std::collections::VecDeque;
use std::ops::Range;

use tidemark_dedup::CHUNK;
use tidemark_disk::{Block, ExtentKind};

use crate::error::Result;

mod chunks;

pub(crate) use chunks::ChunkSet;

/// Extents are asked for in windows of this size: at worst (every other sector written) one answer
/// has half a million entries, and a hole of 1 TiB takes four thousand questions.
const WINDOW: u64 = 256 * 1024 * 1024;

/// Largest piece read at once, and the alignment that pieces do not cross: the repository's frame.
pub(crate) const PIECE: u64 = 1024 * 1024;

/// What to do with the next range; ranges ascend and are whole chunks, or end with the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Read it; at most [`PIECE`] long.
    Read(Range<u64>),
    /// It is known to read as zeros.
    Zero(Range<u64>),
}

/// Which areas of the disk a run looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Areas {
    /// All of it, over nothing: zeros need no step.
    Whole,
    /// Only these, over a base: zeros must be told.
    Changed(ChunkSet),
}

fn align_down(offset: u64) -> u64 {
    offset / CHUNK * CHUNK
}

/// The steps of a disk, found window by window.
pub(crate) struct Steps<'a> {
    disk: &'a dyn Block,
    size: u64,
    areas: &'a Areas,
    /// Where to go on.
    at: u64,
    ready: VecDeque<Step>,
    failed: bool,
}

impl<'a> Steps<'a> {
    pub(crate) fn new(disk: &'a dyn Block, areas: &'a Areas) -> Self {
        let size = disk.geometry().size;
        Self { disk, size, areas, at: 0, ready: VecDeque::new(), failed: false }
    }

    /// The next window that lies in an area; its ends are chunk aligned or the disk's end.
    fn next_window(&mut self) -> Option<Range<u64>> {
        let window = match self.areas {
            Areas::Whole if self.at >= self.size => return None,
            Areas::Whole => self.at..self.size.min((self.at / WINDOW + 1) * WINDOW),
            Areas::Changed(chunks) => chunks.next_run(self.at)?,
        };
        // A run that ends with the disk may end within a chunk.
        self.at = window.end.checked_next_multiple_of(CHUNK)?;
        Some(window)
    }

    fn plan(&mut self, window: Range<u64>) -> Result<()> {
        if window.is_empty() {
            return Ok(());
        }
        let mut at = window.start;
        for zero in zero_chunks(self.disk, &window)? {
            self.read(at..zero.start);
            at = zero.end;
            if matches!(self.areas, Areas::Changed(_)) {
                self.ready.push_back(Step::Zero(zero));
            }
        }
        self.read(at..window.end);
        Ok(())
    }

    fn read(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PIECE + 1) * PIECE);
            self.ready.push_back(Step::Read(at..end));
            at = end;
        }
    }
}

/// Whole chunks of the window that are known to be zero. Whatever an extent list leaves out counts as
/// data: reading too much costs time, reading too little costs the backup.
fn zero_chunks(disk: &dyn Block, window: &Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut zeros: Vec<Range<u64>> = Vec::new();
    for extent in disk.extents(window.start, window.end - window.start)? {
        if extent.kind == ExtentKind::Data {
            continue;
        }
        let start = extent.offset.max(window.start);
        let end = extent.offset.saturating_add(extent.len).min(window.end);
        match zeros.last_mut() {
            Some(last) if last.end == start => last.end = end,
            // Out of order would be a defect below us; then nothing of it is believed.
            Some(last) if last.end > start => return Ok(Vec::new()),
            _ if start < end => zeros.push(start..end),
            _ => {}
        }
    }
    let disk_end = disk.geometry().size;
    let whole = |zero: Range<u64>| {
        let end = if zero.end == disk_end { zero.end } else { align_down(zero.end) };
        zero.start.next_multiple_of(CHUNK)..end
    };
    Ok(zeros.into_iter().map(whole).filter(|zero| zero.start < zero.end).collect())
}

impl Iterator for Steps<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.failed {
                return None;
            }
            if let Some(step) = self.ready.pop_front() {
                return Some(Ok(step));
            }
            let window = self.next_window()?;
            if let Err(e) = self.plan(window) {
                self.failed = true;
                return Some(Err(e));
            }
        }
    }
}

/// Bytes that the steps will read, for progress.
pub(crate) fn bytes_to_read(disk: &dyn Block, areas: &Areas) -> Result<u64> {
    let mut sum = 0;
    for step in Steps::new(disk, areas) {
        if let Step::Read(range) = step? {
            sum += range.end - range.start;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests;
