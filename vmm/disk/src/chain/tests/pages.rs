//! "Changed since" in pages.

use super::world::{MIB, World, folder, options};
use crate::GRANULE;
use crate::block::{Block, BlockRange};
use crate::chain::Chain;
use crate::error::DiskError;
use crate::rct::RctId;
use crate::vhdx::Access;

/// All pages, joined.
fn paged(chain: &Chain, id: &RctId, max: usize) -> Vec<BlockRange> {
    let mut all: Vec<BlockRange> = Vec::new();
    let mut next = Some(0);
    while let Some(from) = next {
        let page = chain.changed_since_from(id, from, max).unwrap();
        assert!(page.ranges.len() <= max.max(1));
        let end = page.next.unwrap_or(u64::MAX);
        assert!(page.ranges.iter().all(|r| r.start >= from && r.end <= end), "{page:?}");
        assert!(page.next.is_none_or(|next| next > from));
        for range in page.ranges {
            match all.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => all.push(range),
            }
        }
        next = page.next;
    }
    all
}

/// A disk with an id in each of its files, and scattered changes in each.
fn scattered() -> World {
    let mut world = World::new(5, 30 * MIB + 512, 4 << 20);
    for file in 0..3 {
        for granule in (file..480).step_by(7) {
            world.write_to(granule * GRANULE + 512..granule * GRANULE + 1024);
        }
        world.checkpoint();
    }
    world.write_to(30 * MIB..30 * MIB + 512);
    world
}

#[test]
fn pages_give_what_one_answer_gives() {
    let world = scattered();
    for sealed in &world.sealed {
        let whole = world.chain().changed_since(&sealed.id).unwrap();
        for max in [0, 1, 2, 5, 1000] {
            assert_eq!(paged(world.chain(), &sealed.id, max), whole, "pages of {max}");
        }
        let middle = 11 * MIB;
        let rest = world.chain().changed_since_from(&sealed.id, middle, usize::MAX).unwrap();
        let expected: Vec<BlockRange> =
            whole.iter().filter(|r| r.end > middle).map(|r| r.start.max(middle)..r.end).collect();
        assert_eq!((rest.ranges, rest.next), (expected, None));
    }
    for bad in [1, GRANULE - 512, 31 * MIB] {
        let page = world.chain().changed_since_from(&world.sealed[0].id, bad, 1);
        assert!(matches!(page, Err(DiskError::OutOfRange { .. })), "{bad}");
    }
}

#[test]
fn i3_pages_stay_right_while_files_come_and_go_between_them() {
    let mut world = scattered();
    let ids = world.sealed.clone();
    for sealed in &ids {
        let before = world.chain().changed_since(&sealed.id).unwrap();
        let mut next = Some(0);
        let mut all = Vec::new();
        while let Some(from) = next {
            let page = world.chain().changed_since_from(&sealed.id, from, 20).unwrap();
            all.extend(page.ranges);
            next = page.next;
            match world.chain().files().len() {
                1 | 2 => world.checkpoint(),
                files => world.merge(files - 2),
            }
        }
        let covered = |r: &BlockRange| all.iter().any(|a| a.start <= r.start && r.end <= a.end);
        assert!(before.iter().all(covered), "a change was lost between two pages");
        world.check_changes();
    }
}

/// A disk of many windows: no question takes it all at once.
#[test]
fn pages_cross_windows() {
    let folder = folder();
    let base = folder.path().join("disk.vhdx");
    let size = 5 << 30;
    Chain::create(&base, &options(size, 1 << 20)).unwrap();
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    let new = folder.path().join("disk_1.avhdx");
    chain.prepare_leaf(&new).unwrap();
    let pause = chain.pause();
    let id = chain.switch_leaf(&pause, &new).unwrap();
    drop(pause);
    // Over the border of two windows, and far away.
    let written = [(1 << 30) - GRANULE..(1 << 30) + GRANULE, (4 << 30)..(4 << 30) + GRANULE];
    for range in &written {
        chain.write_at(range.start, &vec![1; (range.end - range.start) as usize]).unwrap();
    }
    assert_eq!(chain.changed_since(&id).unwrap(), written);
    for max in [1, 2, 3] {
        assert_eq!(paged(&chain, &id, max), written);
    }
}
