//! Reads and writes.

use super::merge::LeafMerge;
use super::node::{self, Node, Payload};
use super::rules::{Rule, Rules};
use super::{Chain, Layout};
use crate::block::{Block, BlockRange, Extent, ExtentKind, Geometry};
use crate::error::{DiskError, Result};
use crate::vhdx::{Access, BlockState, Presence};

impl Chain {
    /// Whether a request is sector aligned and inside the disk.
    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let sector = u64::from(self.geometry.logical_sector);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.geometry.size);
        if inside && offset.is_multiple_of(sector) && len.is_multiple_of(sector) {
            Ok(())
        } else {
            Err(DiskError::OutOfRange { offset, len })
        }
    }

    fn write(&self, offset: u64, payload: Payload<'_>) -> Result<()> {
        self.require_writable()?;
        self.check(offset, payload.len())?;
        if payload.len() == 0 {
            return Ok(());
        }
        let request = self.enter()?;
        let layout = &*request.layout;
        if let Some(merge) = &layout.merge {
            return write_merging(layout, merge, offset, payload);
        }
        let leaf = layout.leaf()?;
        // Killed before the guard: nothing written. After: the region counts as changed.
        let _tracked = leaf.writing()?.before_write(offset, payload.len())?;
        leaf.put(offset, payload)
    }
}

/// A guest write while the leaf is being merged into its parent.
fn write_merging(
    layout: &Layout,
    merge: &LeafMerge,
    offset: u64,
    payload: Payload<'_>,
) -> Result<()> {
    let child = layout.leaf()?;
    let parent = layout.node(layout.nodes.len().wrapping_sub(2))?;
    // The child's pair answers for its ids until the merge ends, whichever file the data goes to.
    let rules = merge.rules;
    let _tracked = if rules.obey(Rule::TrackInChild) {
        Some(child.writing()?.before_write(offset, payload.len())?)
    } else {
        None
    };
    let end = offset + payload.len();
    let mut at = offset;
    while at < end {
        let block = at / child.block_size;
        let stop = end.min((block + 1) * child.block_size);
        let part = payload.slice(at - offset, stop - offset);
        // Shared: the block is not released, and no part of it copied, during this write.
        let _stripe = merge.stripe(block).read();
        if child.vhdx.block_state(block) == BlockState::NotPresent {
            write_to_parent(parent, rules, at, part)?;
        } else {
            child.put(at, part)?;
            if rules.obey(Rule::MirrorWhatIsCopied) {
                mirror(parent, merge, at, part);
            }
        }
        at = stop;
    }
    Ok(())
}

fn write_to_parent(parent: &Node, rules: Rules, offset: u64, payload: Payload<'_>) -> Result<()> {
    if !rules.obey(Rule::TrackInParent) {
        return parent.put(offset, payload);
    }
    let _tracked = parent.writing()?.before_write(offset, payload.len())?;
    parent.put(offset, payload)
}

/// Repeats a write to the child in the parent where the merge has copied the range already. A failure
/// is the merge's, not the guest's: the child has the data, and the copy is done again.
fn mirror(parent: &Node, merge: &LeafMerge, offset: u64, payload: Payload<'_>) {
    let copied = merge.copied();
    let start = offset.max(copied.start);
    let end = (offset + payload.len()).min(copied.end);
    if start >= end {
        return;
    }
    let part = payload.slice(start - offset, end - offset);
    if write_to_parent(parent, merge.rules, start, part).is_err() {
        merge.spoil();
    }
}

/// Reads what `nodes` (base first) hold. Each file is asked before its parent: what a merge has moved
/// away in the meantime is in the parent by then.
fn read(nodes: &[Node], offset: u64, buf: &mut [u8]) -> Result<()> {
    let Some((node, below)) = nodes.split_last() else {
        buf.fill(0);
        return Ok(());
    };
    // A child may be larger than its parent.
    let here = node.size.saturating_sub(offset).min(buf.len() as u64) as usize;
    let (buf, beyond) = buf.split_at_mut(here);
    beyond.fill(0);
    if buf.is_empty() {
        return Ok(());
    }
    for absent in node.vhdx.read_at(offset, buf)? {
        let part = (absent.start - offset) as usize..(absent.end - offset) as usize;
        read(below, absent.start, &mut buf[part])?;
    }
    Ok(())
}

/// Appends the extents of a range, joining neighbours of one kind.
fn extents(nodes: &[Node], range: BlockRange, out: &mut Vec<Extent>) -> Result<()> {
    let Some((node, below)) = nodes.split_last() else {
        push(out, range, ExtentKind::Hole);
        return Ok(());
    };
    let end = range.end.clamp(range.start, node.size.max(range.start));
    if range.start < end {
        for (part, presence) in node.vhdx.presence(range.start, end - range.start)? {
            match presence {
                Presence::Absent => extents(below, part, out)?,
                Presence::Zero => push(out, part, ExtentKind::Zero),
                Presence::Data => push(out, part, ExtentKind::Data),
            }
        }
    }
    push(out, end..range.end, ExtentKind::Hole);
    Ok(())
}

fn push(out: &mut Vec<Extent>, range: BlockRange, kind: ExtentKind) {
    let len = range.end - range.start;
    match out.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.kind == kind => last.len += len,
        _ => out.push(Extent { offset: range.start, len, kind }),
    }
}

impl Block for Chain {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        read(&self.enter()?.layout.nodes, offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write(offset, Payload::Data(buf))
    }

    /// Acknowledged writes may be in the leaf, in the parent it is being merged into, and in the leaf
    /// before the last switch: all are flushed, older ones first.
    fn flush(&self) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Ok(());
        }
        // A pause does not wait for syncs: what is acknowledged by now is in these files, whatever
        // becomes of the chain meanwhile.
        let files: Vec<_> = {
            let request = self.enter()?;
            let all = usize::from(!self.rules.obey(Rule::FlushEveryFile));
            let first = all * (request.layout.nodes.len() - 1);
            request.layout.nodes[first..].iter().filter_map(Node::unflushed).collect()
        };
        #[cfg(test)]
        self.flushing.call(self, "flush")?;
        files.iter().try_for_each(|file| node::flush(file))
    }

    /// Zeros, never "ask the parent": that would bring old data back.
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write(offset, Payload::Zeros(len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> Result<()> {
        self.write(offset, Payload::Zeros(len))
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check(offset, len)?;
        let mut out = Vec::new();
        extents(&self.enter()?.layout.nodes, offset..offset + len, &mut out)?;
        Ok(out)
    }
}
