//! A chain against a plain model, over very many operations: chains of up to six files whose block
//! sizes differ from file to file, of both sector sizes, with merges anywhere under guest I/O, closes
//! and kills.

use std::sync::atomic::{AtomicBool, Ordering};

use super::world::{MIB, Rng, World, bytes, options};
use crate::block::{Block, BlockRange};
use crate::chain::delete_disk_files;
use crate::error::DiskError;
use crate::vhdx::CreateOptions;

/// Files of a chain.
const FILES: usize = 6;
/// Ids that are asked about at a time.
const IDS: usize = 8;
/// Everything is compared once in so many operations.
const COMPARE: u32 = 400;

/// Mostly short; now and then a block or two.
fn range(rng: &mut Rng, size: u64, sector: u64) -> BlockRange {
    let sectors = size / sector;
    let longest = match rng.below(100) {
        0 => 3 * MIB / sector,
        1..10 => 256,
        _ => 24,
    };
    // Often at the border of a block, of a granule, or of the disk.
    let start = match rng.below(4) {
        0 => rng.below(size.div_ceil(MIB)) * MIB / sector,
        1 => (rng.below(size / 65_536) * 65_536 / sector).saturating_sub(rng.below(4)),
        _ => rng.below(sectors),
    };
    let start = start.min(sectors - 1);
    start * sector..sectors.min(start + 1 + rng.below(longest)) * sector
}

/// Reads a range beside the model.
fn read(world: &mut World, sector: u64) {
    let range = range(&mut world.rng, world.content.len() as u64, sector);
    let mut found = vec![0xa5; (range.end - range.start) as usize];
    world.chain().read_at(range.start, &mut found).unwrap();
    let expected = &world.content[range.start as usize..range.end as usize];
    assert!(found == expected, "{range:?} does not read as written");
}

fn change(world: &mut World, sector: u64) {
    let range = range(&mut world.rng, world.content.len() as u64, sector);
    match world.rng.below(5) {
        // Whole blocks of zeros, too.
        0 if world.rng.below(4) == 0 => {
            let size = world.content.len() as u64;
            let start = range.start / MIB * MIB;
            let end = start + (1 + world.rng.below(4)) * MIB;
            world.zero_at(start..size.min(end));
        }
        0 => world.zero_at(range),
        _ => world.write_to(range),
    }
}

fn checkpoint(world: &mut World) {
    let exponent = world.rng.below(6);
    world.chain().hook.set_block_size((MIB << exponent) as u32);
    world.checkpoint();
    if world.sealed.len() > IDS {
        let forgotten = world.rng.below(IDS as u64) as usize;
        world.sealed.remove(forgotten);
    }
}

/// Merges any file; sometimes gives up on the way. A guest writes at every step; gives the number of
/// its writes.
fn merge(world: &mut World, sector: u64) -> u32 {
    let files = world.chain().files();
    let child = files[1 + world.rng.below(files.len() as u64 - 1) as usize].clone();
    let size = world.content.len() as u64;
    let guest = std::sync::Arc::new(parking_lot::Mutex::new((world.rng.clone(), Vec::new())));
    let at_step = guest.clone();
    world.chain().hook.set(move |chain, step| {
        if matches!(step, "merge:paused" | "merge:before-repoint") {
            return Ok(());
        }
        let (rng, writes) = &mut *at_step.lock();
        let range = range(rng, size, sector);
        let zeros = rng.below(5) == 0;
        let len = range.end - range.start;
        let data = if zeros { vec![0; len as usize] } else { bytes(rng, len) };
        match zeros {
            true => chain.discard(range.start, len)?,
            false => chain.write_at(range.start, &data)?,
        }
        writes.push((range, data));
        Ok(())
    });
    let cancel = AtomicBool::new(false);
    let give_up = world.rng.below(6) == 0;
    let progress = |p: crate::chain::MergeProgress| {
        cancel.store(give_up && p.done > 0, Ordering::Relaxed);
    };
    let merged = world.chain().merge(&child, &progress, &cancel);
    world.chain().hook.clear();
    match merged {
        Ok(()) => delete_disk_files(&child).unwrap(),
        Err(DiskError::Cancelled) => {}
        Err(e) => panic!("{e}"),
    }
    let (rng, writes) = std::mem::replace(&mut *guest.lock(), (Rng::new(0), Vec::new()));
    world.rng = rng;
    let count = writes.len() as u32;
    for (range, data) in writes {
        world.note_write(&range, &data);
    }
    count
}

/// A life of `count` operations.
fn live(seed: u64, options: &CreateOptions, count: u32) {
    let mut world = World::of(seed, options);
    let sector = options.logical_sector.into();
    let mut done = 0;
    let mut compared = 0;
    while done < count {
        done += 1;
        let files = world.chain().files().len();
        match world.rng.below(1000) {
            0..8 if files < FILES => checkpoint(&mut world),
            8..14 if files > 1 => done += merge(&mut world, sector),
            14 => world.reopen(),
            15 => world.kill(),
            16..20 => world.chain().flush_map().unwrap(),
            20..40 => world.chain().flush().unwrap(),
            40..340 => read(&mut world, sector),
            _ => change(&mut world, sector),
        }
        if done >= compared + COMPARE {
            compared = done;
            world.check_content();
            world.check_changes();
        }
    }
    while world.chain().files().len() > 1 {
        merge(&mut world, sector);
        world.check_content();
        world.check_changes();
    }
    world.reopen();
    world.check_content();
    world.check_changes();
}

/// One test for each disk, so that they run side by side.
macro_rules! disks {
    ($($name:ident: $seed:literal, $size:expr, $block:literal, $sector:literal;)*) => {
        $(#[test]
        fn $name() {
            let options = options($size, $block << 20);
            live($seed, &CreateOptions { logical_sector: $sector, ..options }, OPERATIONS);
        })*
    };
}

/// Of each disk: 104,000 in all.
const OPERATIONS: u32 = 13_000;

disks! {
    i6_disk_of_1_mib_blocks_equals_its_model: 1, 5 * MIB + 512 * 3, 1, 512;
    i6_disk_of_2_mib_blocks_equals_its_model: 2, 7 * MIB + 512, 2, 512;
    i6_disk_of_8_mib_blocks_equals_its_model: 3, 17 * MIB + 512 * 9, 8, 512;
    i6_disk_of_32_mib_blocks_equals_its_model: 4, 34 * MIB + 512, 32, 512;
    i6_disk_of_1_mib_blocks_and_4_kib_sectors_equals_its_model: 5, 6 * MIB + 4096, 1, 4096;
    i6_disk_of_4_mib_blocks_and_4_kib_sectors_equals_its_model: 6, 9 * MIB + 4096 * 3, 4, 4096;
    i6_disk_of_16_mib_blocks_and_4_kib_sectors_equals_its_model: 7, 20 * MIB, 16, 4096;
    i6_disk_of_32_mib_blocks_and_4_kib_sectors_equals_its_model: 8, 33 * MIB, 32, 4096;
}
