//! What differs between two maps of one repository: equal pages are passed over unread, so the cost
//! follows the difference.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{RepoError, Result};
use crate::id::BlobId;
use crate::map::{FANOUT, Page, PageSource, Root, Walker, chunk_count, span};

/// Neighbouring chunks of the newer map: one with content, or any number of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) id: BlobId,
}

/// Something that gives chunks in ascending order.
pub(crate) trait Spans: Send {
    /// The next few, or none at the end. After an error the rest can still be had; `failed` says which
    /// chunks are left out.
    fn next(
        &mut self,
        pages: &mut dyn PageSource,
        failed: &mut Option<Range<u64>>,
    ) -> Result<Option<Vec<Span>>>;
}

impl Spans for Walker {
    fn next(
        &mut self,
        pages: &mut dyn PageSource,
        failed: &mut Option<Range<u64>>,
    ) -> Result<Option<Vec<Span>>> {
        let Some(leaf) = self.next_leaf(pages, failed)? else { return Ok(None) };
        let chunks = leaf.chunks(self.range());
        Ok(Some(chunks.map(|(first, id)| Span { first, count: 1, id }).collect()))
    }
}

/// What is known of the older map at a place.
#[derive(Clone, Copy)]
enum Old {
    /// The page or chunk there; none for zeros.
    Id(BlobId),
    /// The older map's root, which lies further down: the older disk was much smaller.
    Above(BlobId, u8),
    /// It could not be read: everything counts as different.
    Unknown,
}

/// Goes through the differences.
pub(crate) struct DiffWalker {
    stack: Vec<(Old, BlobId, u8, u64)>,
    end: u64,
}

impl DiffWalker {
    /// Chunks in which `new` differs from `old`, as they are in `new`.
    pub(crate) fn new(old: &Root, new: &Root, pages: &mut dyn PageSource) -> Self {
        let mut below = Old::Id(old.page);
        // A larger older map: its left end covers the newer one.
        for level in (new.levels + 1..=old.levels).rev() {
            below = match below {
                Old::Id(id) if !id.is_none() => {
                    pages.page(&id, level).map_or(Old::Unknown, |page| Old::Id(page.slots[0]))
                }
                same => same,
            };
        }
        if old.levels < new.levels {
            below = Old::Above(old.page, old.levels);
        }
        Self { stack: vec![(below, new.page, new.levels, 0)], end: chunk_count(new.size) }
    }

    fn visit(
        &mut self,
        (old, new, level, first): (Old, BlobId, u8, u64),
        pages: &mut dyn PageSource,
    ) -> Result<Option<Span>> {
        if matches!(old, Old::Id(id) if id == new) || first >= self.end {
            return Ok(None);
        }
        if level == 0 || new.is_none() {
            let count = span(level).min(self.end - first);
            return Ok(Some(Span { first, count, id: new }));
        }
        let page = pages.page(&new, level)?;
        let old = old_children(old, level, pages)?;
        for (slot, id) in page.slots.iter().enumerate().rev() {
            let old = match &old {
                Children::Page(page) => Old::Id(page.slots[slot]),
                Children::First(below) if slot == 0 => *below,
                Children::First(_) | Children::Zeros => Old::Id(BlobId::NONE),
                Children::Unknown => Old::Unknown,
            };
            self.stack.push((old, *id, level - 1, first + slot as u64 * span(level - 1)));
        }
        Ok(None)
    }
}

enum Children {
    Page(Arc<Page>),
    First(Old),
    Zeros,
    Unknown,
}

fn old_children(old: Old, level: u8, pages: &mut dyn PageSource) -> Result<Children> {
    Ok(match old {
        Old::Unknown => Children::Unknown,
        Old::Id(id) if id.is_none() => Children::Zeros,
        Old::Id(id) => match pages.page(&id, level) {
            Ok(page) => Children::Page(page),
            Err(RepoError::Damaged { .. }) => Children::Unknown,
            Err(e) => return Err(e),
        },
        Old::Above(root, levels) if level == levels + 1 => Children::First(Old::Id(root)),
        Old::Above(root, levels) => Children::First(Old::Above(root, levels)),
    })
}

impl Spans for DiffWalker {
    fn next(
        &mut self,
        pages: &mut dyn PageSource,
        failed: &mut Option<Range<u64>>,
    ) -> Result<Option<Vec<Span>>> {
        let mut found = Vec::new();
        while found.len() < FANOUT as usize {
            let Some(place) = self.stack.pop() else { break };
            match self.visit(place, pages) {
                Ok(span) => found.extend(span),
                Err(e) => {
                    // What was found before comes first; the error comes again with the next call.
                    if !found.is_empty() {
                        self.stack.push(place);
                        break;
                    }
                    *failed = Some(place.3..(place.3 + span(place.2)).min(self.end));
                    return Err(e);
                }
            }
        }
        Ok((!found.is_empty()).then_some(found))
    }
}
