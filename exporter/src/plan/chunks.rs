//! A set of a disk's chunks, at one bit each where there are any: 2 MiB for each TiB, however scattered.

use std::ops::Range;

use tidemark_dedup::CHUNK;
use tidemark_disk::BlockRange;

use super::WINDOW;

const WORDS: usize = (WINDOW / CHUNK / 64) as usize;

/// Chunks of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChunkSet {
    size: u64,
    windows: Vec<Option<Box<[u64; WORDS]>>>,
}

impl ChunkSet {
    /// No chunk of a disk of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        Self { size, windows: vec![None; size.div_ceil(WINDOW) as usize] }
    }

    /// Adds the chunks that a range touches. Ranges may come in any order, overlap, and lie outside the
    /// disk: tracking promises none of that, but a promise broken here would be a lost block.
    pub(crate) fn add(&mut self, range: &BlockRange) {
        let end = range.end.min(self.size);
        if range.start >= end {
            return;
        }
        for chunk in range.start / CHUNK..end.div_ceil(CHUNK) {
            let at = (chunk % (WINDOW / CHUNK)) as usize;
            if let Some(window) = self.windows.get_mut((chunk * CHUNK / WINDOW) as usize) {
                window.get_or_insert_with(|| Box::new([0; WORDS]))[at / 64] |= 1 << (at % 64);
            }
        }
    }

    /// The next chunks from `at` (chunk aligned) on, up to a gap or the border of a window.
    pub(crate) fn next_run(&self, at: u64) -> Option<Range<u64>> {
        let mut window = at / WINDOW;
        let mut from = (at % WINDOW / CHUNK) as usize;
        while let Some(words) = self.windows.get(window as usize) {
            if let Some(words) = words
                && let Some(start) = find(words, from, true)
            {
                let end = find(words, start, false).unwrap_or(WORDS * 64);
                let byte = |chunk: usize| window * WINDOW + chunk as u64 * CHUNK;
                return Some(byte(start)..byte(end).min(self.size));
            }
            window += 1;
            from = 0;
        }
        None
    }
}

/// The first bit from `from` on that is as wanted.
fn find(words: &[u64; WORDS], from: usize, set: bool) -> Option<usize> {
    let mut at = from;
    while at < WORDS * 64 {
        let word = if set { words[at / 64] } else { !words[at / 64] } >> (at % 64);
        if word != 0 {
            return Some(at + word.trailing_zeros() as usize);
        }
        at = (at / 64 + 1) * 64;
    }
    None
}
