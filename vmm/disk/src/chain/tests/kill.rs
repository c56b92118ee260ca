//! A kill, or an error, at every step of a checkpoint and of a merge.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::world::{
    MIB, Rng, Sealed, World, assert_same, assert_superset, bytes, merge, read_all, snapshot,
};
use crate::block::Block;
use crate::chain::{Chain, delete_disk_files};
use crate::error::{DiskError, Result};
use crate::rct::Continuity;
use crate::vhdx::Access;

const SIZE: u64 = 4 * MIB + 512 * 3;

/// What a disk may hold after a kill: each sector as last flushed, or as written since.
#[derive(Clone)]
struct Allowed {
    flushed: Vec<u8>,
    since: Vec<Vec<u8>>,
}

impl Allowed {
    fn latest(&self) -> &[u8] {
        self.since.last().unwrap_or(&self.flushed)
    }

    fn check(&self, found: &[u8], step: &str) {
        for (i, sector) in found.chunks(512).enumerate() {
            let at = i * 512..i * 512 + sector.len();
            let legal = sector == &self.flushed[at.clone()]
                || self.since.iter().any(|image| sector == &image[at.clone()]);
            assert!(
                legal,
                "sector {i} holds neither flushed nor later data after a kill at {step}"
            );
        }
    }
}

/// A guest that writes in the middle of a change.
struct Guest {
    allowed: Allowed,
    rng: Rng,
    writes: u32,
}

impl Guest {
    fn act(&mut self, chain: &Chain) {
        let range = self.rng.range(SIZE, 512);
        let mut image = self.allowed.latest().to_vec();
        let part = range.start as usize..range.end as usize;
        if self.rng.below(4) == 0 {
            chain.discard(range.start, range.end - range.start).unwrap();
            image[part].fill(0);
        } else {
            let data = bytes(&mut self.rng, range.end - range.start);
            chain.write_at(range.start, &data).unwrap();
            image[part].copy_from_slice(&data);
        }
        self.allowed.since.push(image);
        self.writes += 1;
        if self.writes.is_multiple_of(3) {
            chain.flush().unwrap();
            self.allowed = Allowed { flushed: self.allowed.latest().to_vec(), since: Vec::new() };
        }
    }
}

/// Steps at which I/O is held back.
fn paused(step: &str) -> bool {
    step.starts_with("switch:") || matches!(step, "merge:paused" | "merge:before-repoint")
}

/// A disk of three files with data, zeros and holes in each, and its ids.
fn three_files(seed: u64) -> World {
    let mut world = World::new(seed, SIZE, 1 << 20);
    for _ in 0..2 {
        (0..4).for_each(|_| world.write());
        world.zero();
        world.checkpoint();
    }
    (0..4).for_each(|_| world.write());
    world.zero();
    world.chain().flush().unwrap();
    world
}

/// What is in order after a kill: content, answers, and the way on.
fn verify_killed(copy: &Path, leaf: &Path, allowed: &Allowed, ids: &[Sealed], step: &str) {
    let leaf = copy.join(leaf.file_name().unwrap());
    let reader = Chain::open(&leaf, Access::ReadOnly).unwrap();
    let seen = read_all(&reader);
    allowed.check(&seen, step);
    check_ids(&reader, ids, &seen);
    drop(reader);
    let chain = Chain::open(&leaf, Access::ReadWrite).unwrap();
    assert_eq!(chain.continuity(), Continuity::Kept, "tracking was lost by a kill at {step}");
    check_ids(&chain, ids, &seen);
    go_on(&chain, ids, seen);
}

fn check_ids(chain: &Chain, ids: &[Sealed], now: &[u8]) {
    for sealed in ids {
        assert_superset(&chain.changed_since(&sealed.id).unwrap(), &sealed.content, now);
    }
}

/// After a kill the disk is written again, and merged down to its base.
fn go_on(chain: &Chain, ids: &[Sealed], mut content: Vec<u8>) {
    delete_leftovers(chain);
    let data = vec![0x77; 4096];
    chain.write_at(MIB - 2048, &data).unwrap();
    content[MIB as usize - 2048..][..4096].copy_from_slice(&data);
    while let [_, child, ..] = &chain.files()[..] {
        merge(chain, child);
        delete_disk_files(child).unwrap();
        assert_same(&read_all(chain), &content, "the disk after the merge was ended");
        check_ids(chain, ids, &content);
    }
    chain.close().unwrap();
    let base = chain.files().remove(0);
    let reader = Chain::open(&base, Access::ReadOnly).unwrap();
    assert_same(&read_all(&reader), &content, "the base");
    check_ids(&reader, ids, &content);
}

/// Files that the chain does not need, as whoever recovers the VM deletes them.
fn delete_leftovers(chain: &Chain) {
    let used = chain.files();
    for entry in std::fs::read_dir(used[0].parent().unwrap()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "avhdx") && !used.contains(&path) {
            delete_disk_files(&path).unwrap();
        }
    }
}

/// Kills a merge at every step, with or without a guest that writes meanwhile.
fn kill_merge_everywhere(seed: u64, child: usize, with_guest: bool) {
    let world = three_files(seed);
    let leaf = world.leaf();
    let files = world.chain().files();
    let allowed = Allowed { flushed: world.content.clone(), since: Vec::new() };
    let guest = Arc::new(Mutex::new(Guest { allowed, rng: world.rng.clone(), writes: 0 }));
    let ids = world.sealed.clone();
    let folder = world.folder.path().to_owned();
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let (hook_guest, hook_seen, hook_leaf) = (guest.clone(), seen.clone(), leaf.clone());
    let parent = files[child - 1].clone();
    let of_leaf = child + 1 == files.len();
    world.chain().hook.set(move |chain, step| {
        let mut guest = hook_guest.lock();
        if with_guest && !paused(step) {
            guest.act(chain);
        }
        let count = {
            let mut seen = hook_seen.lock();
            let count = seen.entry(step).or_insert(0u32);
            *count += 1;
            *count
        };
        // Every step at first, then some of those that are many.
        if count > 3 && !count.is_multiple_of(5) {
            return Ok(());
        }
        let copy = snapshot(&folder);
        verify_killed(copy.path(), &hook_leaf, &guest.allowed, &ids, step);
        if of_leaf && matches!(step, "merge:paused" | "merge:left") {
            // The child is empty: its parent alone is the disk too.
            let copy = snapshot(&folder);
            let parent = copy.path().join(parent.file_name().unwrap());
            let chain = Chain::open(&parent, Access::ReadWrite).unwrap();
            guest.allowed.check(&read_all(&chain), step);
        }
        Ok(())
    });
    merge(world.chain(), &files[child]);
    world.chain().hook.clear();
    assert_same(&read_all(world.chain()), guest.lock().allowed.latest(), "the merged disk");
    let seen = seen.lock();
    let end = if of_leaf { "merge:paused" } else { "merge:repointed" };
    for step in ["merge:announced", "merge:guid", "merge:copied", "merge:released", end] {
        assert!(seen.contains_key(step), "{step} was not reached: {seen:?}");
    }
}

#[test]
fn i5_a_kill_at_any_step_of_a_leaf_merge_loses_nothing() {
    kill_merge_everywhere(0, 2, false);
    kill_merge_everywhere(10, 2, true);
    kill_merge_everywhere(11, 2, true);
}

#[test]
fn i5_a_kill_at_any_step_of_a_merge_further_down_loses_nothing() {
    kill_merge_everywhere(20, 1, false);
    kill_merge_everywhere(30, 1, true);
}

#[test]
fn i5_a_kill_at_any_step_of_a_checkpoint_loses_nothing() {
    for seed in 40..42 {
        let mut world = three_files(seed);
        let (old, new) = (world.leaf(), world.new_leaf());
        let content = world.content.clone();
        let (folder, ids) = (world.folder.path().to_owned(), world.sealed.clone());
        let allowed = Allowed { flushed: content, since: Vec::new() };
        let (hook_old, hook_new) = (old.clone(), new.clone());
        world.chain().hook.set(move |_, step| {
            for leaf in [&hook_old, &hook_new] {
                // `settle` runs before the new leaf is made, too.
                if leaf.exists() {
                    let copy = snapshot(&folder);
                    verify_killed(copy.path(), leaf, &allowed, &ids, step);
                }
            }
            Ok(())
        });
        world.chain().prepare_leaf(&new).unwrap();
        let pause = world.chain().pause();
        let id = world.chain().switch_leaf(&pause, &new).unwrap();
        drop(pause);
        world.chain().settle().unwrap();
        world.chain().hook.clear();
        world.note_seal(id, old.clone());
        world.write();
        world.chain().flush().unwrap();

        // Now the new leaf holds data: the old one alone is no longer the disk.
        let copy = snapshot(world.folder.path());
        let stale = copy.path().join(old.file_name().unwrap());
        assert!(matches!(Chain::open(&stale, Access::ReadWrite), Err(DiskError::State(_))));
        let allowed = Allowed { flushed: world.content.clone(), since: Vec::new() };
        verify_killed(copy.path(), &new, &allowed, &world.sealed, "the end");
    }
}

/// Runs `change` with an error at its n-th step, for every n, until it gets through.
fn fail_everywhere(mut world: World, change: impl Fn(&Chain) -> Result<()>) -> World {
    for failing in 0.. {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        world.chain().hook.set(move |_, step| {
            match counter.fetch_add(1, Ordering::Relaxed) == failing {
                true => Err(DiskError::State(format!("injected at {step}"))),
                false => Ok(()),
            }
        });
        let result = change(world.chain());
        world.chain().hook.clear();
        world.check_content();
        world.write();
        world.check_content();
        world.check_changes();
        if result.is_ok() && calls.load(Ordering::Relaxed) <= failing {
            return world;
        }
        if result.is_ok() && world.chain().files().len() < 3 {
            return world;
        }
    }
    unreachable!()
}

#[test]
fn an_error_at_any_step_of_a_merge_leaves_the_disk_in_use() {
    for child in [1, 2] {
        let world = three_files(60);
        let file = world.chain().files()[child].clone();
        let world =
            fail_everywhere(world, |chain| chain.merge(&file, &|_| (), &AtomicBool::new(false)));
        assert_eq!(world.chain().files().len(), 2);
        delete_disk_files(&file).unwrap();
        let mut world = world;
        world.reopen();
        world.check_content();
        world.check_changes();
    }
}

#[test]
fn an_error_at_any_step_of_a_switch_leaves_the_old_leaf_in_use() {
    for at in ["switch:fitted", "switch:sealed"] {
        let mut world = three_files(70);
        let (old, new): (PathBuf, PathBuf) = (world.leaf(), world.new_leaf());
        world.chain().prepare_leaf(&new).unwrap();
        world.chain().hook.set(move |_, step| match step == at {
            true => Err(DiskError::State("injected".to_owned())),
            false => Ok(()),
        });
        let pause = world.chain().pause();
        assert!(world.chain().switch_leaf(&pause, &new).is_err());
        drop(pause);
        world.chain().hook.clear();
        assert_eq!(world.leaf(), old);
        world.write();
        world.check_content();
        world.check_changes();
        // It can be tried again, or given up.
        let pause = world.chain().pause();
        let id = world.chain().switch_leaf(&pause, &new).unwrap();
        drop(pause);
        world.note_seal(id, old);
        world.write();
        world.check_content();
        world.check_changes();
    }
}

#[test]
fn a_cancelled_merge_leaves_an_ordinary_chain_and_goes_on_later() {
    let mut world = three_files(80);
    let child = world.leaf();
    let cancel = AtomicBool::new(false);
    let result =
        world.chain().merge(&child, &|p| cancel.store(p.done > 0, Ordering::Relaxed), &cancel);
    assert!(matches!(result, Err(DiskError::Cancelled)));
    assert_eq!(world.chain().files().len(), 3);
    assert_eq!(world.chain().properties().parent.unwrap().linkage2, None);
    for _ in 0..5 {
        world.write();
    }
    world.check_content();
    world.check_changes();
    world.checkpoint();
    world.reopen();
    world.write();
    world.check_content();
    world.check_changes();
    while world.chain().files().len() > 1 {
        world.merge(1);
        world.check_content();
        world.check_changes();
    }
}

/// After its merge a child's map learns of no more writes. If a kill lets the chain be opened at the
/// child again, its ids must be asked of its parent.
#[test]
fn i3_an_emptied_child_does_not_answer_for_what_came_after_its_merge() {
    let mut world = World::new(90, SIZE, 1 << 20);
    world.write_to(0..4096);
    world.checkpoint();
    world.write_to(MIB..MIB + 4096);
    world.checkpoint();
    world.merge(2);
    // The leaf has an id of its own now, and goes the same way.
    let child = world.leaf();
    assert_eq!(world.sealed[1].file, child);
    merge(world.chain(), &child);
    world.write_to(3 * MIB..3 * MIB + 4096);
    world.chain().flush().unwrap();
    let copy = snapshot(world.folder.path());
    let leaf = copy.path().join(child.file_name().unwrap());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let chain = Chain::open(&leaf, access).unwrap();
        assert_same(&read_all(&chain), &world.content, "the disk, opened at the emptied child");
        check_ids(&chain, &world.sealed, &world.content);
    }
    // Nor does it where the chain goes on.
    delete_disk_files(&child).unwrap();
    world.check_changes();
}
