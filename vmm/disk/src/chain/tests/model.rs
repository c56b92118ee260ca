//! Long random lives of a disk against a plain model.

use super::world::{MIB, World};
use crate::block::{Block, ExtentKind};

/// One seeded life: writes, discards, checkpoints, merges, reopens, and kills if asked for.
fn live(seed: u64, size: u64, block_size: u32, kills: bool, steps: u32) {
    let mut world = World::new(seed, size, block_size);
    for step in 0..steps {
        let files = world.chain().files().len();
        match world.rng.below(20) {
            0..=7 => world.write(),
            8..=10 => world.zero(),
            11 => world.chain().flush().unwrap(),
            12 => world.chain().flush_map().unwrap(),
            13 | 14 if files < 4 => world.checkpoint(),
            15 | 16 if files > 1 => {
                let index = 1 + world.rng.below(files as u64 - 1) as usize;
                world.merge(index);
            }
            17 => world.reopen(),
            18 if kills => world.kill(),
            _ => world.write(),
        }
        if step % 8 == 7 {
            world.check_content();
            world.check_changes();
            world.check_frozen();
        }
    }
    while world.chain().files().len() > 1 {
        world.merge(1);
        world.check_content();
        world.check_changes();
    }
    world.reopen();
    world.check_content();
    world.check_changes();
}

#[test]
fn i6_a_chain_reads_as_written_through_checkpoints_and_merges() {
    for seed in 0..4 {
        live(seed, 6 * MIB + 512 * 7, 1 << 20, false, 120);
    }
}

#[test]
fn i6_also_where_children_have_smaller_blocks_than_their_parents() {
    for seed in 100..102 {
        live(seed, 13 * MIB + 512, 8 << 20, false, 100);
    }
}

#[test]
fn i3_changed_since_survives_kills() {
    for seed in 200..204 {
        live(seed, 5 * MIB + 512, 1 << 20, true, 120);
    }
}

#[test]
fn extents_agree_with_content() {
    let mut world = World::new(7, 9 * MIB, 1 << 20);
    for _ in 0..3 {
        (0..4).for_each(|_| world.write());
        (0..2).for_each(|_| world.zero());
        world.checkpoint();
    }
    let extents = world.chain().extents(512, 9 * MIB - 1024).unwrap();
    let mut at = 512;
    for (i, extent) in extents.iter().enumerate() {
        assert_eq!(extent.offset, at);
        assert!(i == 0 || extents[i - 1].kind != extent.kind);
        let part = &world.content[at as usize..(at + extent.len) as usize];
        assert!(extent.kind == ExtentKind::Data || part.iter().all(|b| *b == 0));
        at += extent.len;
    }
    assert_eq!(at, 9 * MIB - 512);
    assert!(extents.iter().any(|e| e.kind == ExtentKind::Hole));
}
