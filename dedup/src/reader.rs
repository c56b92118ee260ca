//! Reading stored disks: at random, and in order with reads in flight ahead of the consumer.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use crate::cache::FrameKey;
use crate::diff::{Span, Spans};
use crate::error::{RepoError, Result};
use crate::fetch::{Fetched, Pages, Patience, Request};
use crate::frame::FRAME_CHUNKS;
use crate::index::Location;
use crate::map::{PageSource, Root, Walker};
use crate::repo::Inner;
use crate::{CHUNK, DiskRoot};

/// Frames of a window. Two windows are in memory: one is consumed while the next is read.
const WINDOW_FRAMES: usize = 16;
/// Chunks of a window.
const WINDOW_CHUNKS: usize = 512;

/// Reads one stored disk; safe to share between threads, with a bounded cache of decoded frames.
pub struct DiskReader {
    inner: Arc<Inner>,
    root: Root,
    patience: Patience,
}

impl std::fmt::Debug for DiskReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskReader").field("root", &self.root).finish_non_exhaustive()
    }
}

impl DiskReader {
    pub(crate) fn open(inner: Arc<Inner>, root: &DiskRoot, patience: Patience) -> Result<Self> {
        let root = Root::parse(root)?;
        if !root.page.is_none() {
            // A root that does not exist should fail here and not at the first read.
            Pages::with(inner.clone(), patience).page(&root.page, root.levels)?;
        }
        Ok(Self { inner, root, patience })
    }

    /// Virtual size.
    pub fn size(&self) -> u64 {
        self.root.size
    }

    /// Fills `buf` from `offset`, verified.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.check(&range)?;
        buf.fill(0);
        let never = AtomicBool::new(false);
        self.for_each(range, &never, &mut |at, data| {
            let at = (at - offset) as usize;
            buf[at..at + data.len()].copy_from_slice(&data);
            Ok(())
        })
    }

    /// Ranges that hold data, in order; the rest reads as zeros.
    pub fn data_ranges(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.check(&range)?;
        let mut pages = Pages::with(self.inner.clone(), self.patience);
        let mut walker = Walker::new(&self.root, chunks_of(&range));
        let mut found: Vec<Range<u64>> = Vec::new();
        while let Some(leaf) = walker.next_leaf(&mut pages, &mut None)? {
            for (chunk, _) in leaf.chunks(walker.range()) {
                let start = (chunk * CHUNK).max(range.start);
                let end = ((chunk + 1) * CHUNK).min(range.end);
                match found.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => found.push(start..end),
                }
            }
        }
        Ok(found)
    }

    /// Hands over the data of a range in ascending order, verified, with reads in flight ahead; what
    /// is left out is zeros. Stops at the first error, of the repository or of `each`, and when
    /// `cancel` is set.
    pub fn for_each(
        &self,
        range: Range<u64>,
        cancel: &AtomicBool,
        each: &mut dyn FnMut(u64, Bytes) -> Result<()>,
    ) -> Result<()> {
        self.check(&range)?;
        let walker = Walker::new(&self.root, chunks_of(&range));
        let pages = Pages::with(self.inner.clone(), self.patience);
        let mut stream = Stream::over(self.inner.clone(), pages, walker);
        stream.run(cancel, &mut |piece| {
            let data = piece.data?;
            let start = piece.chunks.start * CHUNK;
            let end = (start + data.len() as u64).min(range.end);
            let cut = start.max(range.start);
            if cut < end {
                each(cut, data.slice((cut - start) as usize..(end - start) as usize))?;
            }
            Ok(())
        })
    }

    fn check(&self, range: &Range<u64>) -> Result<()> {
        if range.start <= range.end && range.end <= self.root.size {
            return Ok(());
        }
        Err(RepoError::Invalid(format!(
            "bytes {}..{} are not within a disk of {} bytes",
            range.start, range.end, self.root.size
        )))
    }
}

fn chunks_of(range: &Range<u64>) -> Range<u64> {
    range.start / CHUNK..range.end.div_ceil(CHUNK)
}

/// Some of a disk's content, or why it cannot be read.
pub(crate) struct Piece {
    /// The chunks it covers; all of them, or (below a damaged page) possibly zeros among them.
    pub(crate) chunks: Range<u64>,
    /// Whole chunks; nothing for zeros.
    pub(crate) data: Result<Bytes>,
}

/// A chunk that is to be read.
struct Item {
    span: Span,
    /// Where it is first looked for; `None` when the index does not know it.
    place: Option<Location>,
}

/// Chunks being read together.
struct Window {
    items: Vec<Item>,
    /// Frames that were cached when the window was made.
    have: HashMap<FrameKey, Fetched>,
    requests: Vec<Request>,
}

/// Reads chunks in disk order.
pub(crate) struct Stream {
    inner: Arc<Inner>,
    pages: Pages,
    spans: Box<dyn Spans>,
    /// Chunks that no window has taken yet, the next one last.
    left: Vec<Span>,
    /// A page that could not be read; reported between the windows.
    broken: Option<Piece>,
}

impl Stream {
    pub(crate) fn new(inner: Arc<Inner>, spans: impl Spans + 'static) -> Self {
        let pages = Pages::new(inner.clone());
        Self::over(inner, pages, spans)
    }

    fn over(inner: Arc<Inner>, pages: Pages, spans: impl Spans + 'static) -> Self {
        Self { pages, spans: Box::new(spans), inner, left: Vec::new(), broken: None }
    }

    /// Hands every piece to `each`, in order, until that gives an error. Damage is a piece; errors of
    /// the store end the stream.
    pub(crate) fn run(
        &mut self,
        cancel: &AtomicBool,
        each: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        let mut current = self.window()?;
        loop {
            let broken = self.broken.take();
            // The next window's reads are begun before this one is consumed.
            let next = if broken.is_none() && current.is_some() { self.window()? } else { None };
            if let Some(window) = current {
                self.consume(window, cancel, each)?;
            }
            match broken {
                Some(piece) => {
                    each(piece)?;
                    current = self.window()?;
                }
                None if next.is_none() && self.broken.is_none() => return Ok(()),
                None => current = next,
            }
        }
    }

    /// Plans the next window and begins to read it. `None` at the end, or before a broken page.
    fn window(&mut self) -> Result<Option<Window>> {
        let mut window = Window { items: Vec::new(), have: HashMap::new(), requests: Vec::new() };
        let mut wanted: HashMap<FrameKey, Location> = HashMap::new();
        while window.items.len() < WINDOW_CHUNKS && wanted.len() < WINDOW_FRAMES {
            let Some(span) = self.next_span()? else { break };
            let place = self.inner.index.read().locate(&span.id).into_iter().next();
            if let Some(place) = &place {
                let key = place.frame_key();
                if !window.have.contains_key(&key) && !wanted.contains_key(&key) {
                    match self.inner.frames.get(place) {
                        Some(frame) => drop(window.have.insert(key, Ok(frame))),
                        None => drop(wanted.insert(key, place.clone())),
                    }
                }
            }
            window.items.push(Item { span, place });
        }
        if window.items.is_empty() {
            return Ok(None);
        }
        window.requests = self.inner.request(wanted.into_values().collect(), self.pages.patience);
        Ok(Some(window))
    }

    fn next_span(&mut self) -> Result<Option<Span>> {
        while self.left.is_empty() && self.broken.is_none() {
            let mut failed = None;
            match self.spans.next(&mut self.pages, &mut failed) {
                Ok(Some(spans)) => self.left = spans.into_iter().rev().collect(),
                Ok(None) => return Ok(None),
                Err(e @ RepoError::Damaged { .. }) => {
                    let chunks = failed.unwrap_or(0..0);
                    self.broken = Some(Piece { chunks, data: Err(e) });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(self.left.pop())
    }

    fn consume(
        &mut self,
        window: Window,
        cancel: &AtomicBool,
        each: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        let mut frames = window.have;
        self.inner.collect(window.requests, &mut frames)?;
        let mut items = &window.items[..];
        while let Some(first) = items.first() {
            if cancel.load(Ordering::Relaxed) {
                return Err(RepoError::Cancelled);
            }
            let (run, rest) = items.split_at(run_len(items));
            let chunks = first.span.first..first.span.first + run.len() as u64;
            if first.span.id.is_none() {
                let chunks = chunks.start..chunks.start + first.span.count;
                each(Piece { chunks, data: Ok(Bytes::new()) })?;
            } else if let Some(data) = together(&frames, run) {
                each(Piece { chunks, data: Ok(data) })?;
            } else {
                self.one_by_one(run, each)?;
            }
            items = rest;
        }
        Ok(())
    }

    /// The slow way: each chunk from any pack that has it, looking for other writers' segments if
    /// need be. Damage is reported for each chunk by itself.
    fn one_by_one(
        &mut self,
        run: &[Item],
        each: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        for Item { span, .. } in run {
            let data = self.pages.chunk(&span.id);
            if let Err(e) = &data
                && !matches!(e, RepoError::Damaged { .. })
            {
                return data.map(drop);
            }
            each(Piece { chunks: span.first..span.first + 1, data })?;
        }
        Ok(())
    }
}

/// How many of the next items lie side by side on the disk and in one frame.
fn run_len(items: &[Item]) -> usize {
    let side_by_side = items.windows(2).take_while(|pair| match (&pair[0].place, &pair[1].place) {
        (Some(a), Some(b)) => {
            pair[0].span.first + 1 == pair[1].span.first
                && a.frame_key() == b.frame_key()
                && u16::from(a.position) + 1 == u16::from(b.position)
        }
        _ => false,
    });
    (side_by_side.count() + 1).min(FRAME_CHUNKS)
}

/// A run as one slice of its frame.
fn together(frames: &HashMap<FrameKey, Fetched>, run: &[Item]) -> Option<Bytes> {
    let place = run.first()?.place.as_ref()?;
    let frame = frames.get(&place.frame_key())?.as_ref().ok()?;
    frame.run(place.position, run.iter().map(|item| &item.span.id))
}
