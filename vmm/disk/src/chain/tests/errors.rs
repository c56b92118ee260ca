//! Files that are missing, changed, damaged, in use, or not what they claim.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use uuid::Uuid;

use super::world::{MIB, World, assert_same, folder, merge, options, read_all, snapshot};
use crate::block::Block;
use crate::chain::{Chain, delete_disk_files};
use crate::error::{DiskError, Result};
use crate::rct::{Continuity, RctId, pair_paths};
use crate::vhdx::{Access, CreateOptions, ParentLink, Vhdx};

fn open_error(path: &Path) -> DiskError {
    match Chain::open(path, Access::ReadOnly) {
        Err(error) => error,
        Ok(_) => panic!("{} opened", path.display()),
    }
}

fn try_merge(chain: &Chain, child: &Path) -> Result<()> {
    chain.merge(child, &|_| (), &AtomicBool::new(false))
}

/// A closed disk of two files.
fn two_files(seed: u64) -> World {
    let mut world = World::new(seed, 3 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    world.write();
    world.chain().close().unwrap();
    world
}

/// A child made by hand.
fn child_of(parent: &Path, child: &Path, change: impl FnOnce(&mut CreateOptions)) {
    let properties = Vhdx::open(parent, Access::ReadOnly).unwrap().properties();
    let mut options = CreateOptions {
        disk_id: Some(properties.disk_id),
        parent: Some(ParentLink {
            path: parent.to_owned(),
            data_write_guid: properties.data_write_guid,
        }),
        ..options(properties.geometry.size, properties.block_size)
    };
    change(&mut options);
    Vhdx::create(child, &options).unwrap();
}

#[test]
fn i7_a_missing_parent_is_named() {
    let world = two_files(1);
    let (base, leaf) =
        (world.folder.path().join("disk.vhdx"), world.folder.path().join("disk_1.avhdx"));
    std::fs::rename(&base, world.folder.path().join("elsewhere.vhdx")).unwrap();
    match open_error(&leaf) {
        DiskError::ParentMissing { path, parent } => {
            assert_eq!((path, parent.as_str()), (leaf, "disk.vhdx"));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn i7_a_changed_parent_is_refused() {
    let world = two_files(2);
    let (base, leaf) =
        (world.folder.path().join("disk.vhdx"), world.folder.path().join("disk_1.avhdx"));
    Vhdx::open(&base, Access::ReadWrite).unwrap().set_data_write_guid(Uuid::new_v4()).unwrap();
    assert!(matches!(open_error(&leaf), DiskError::ParentChanged { .. }));
}

#[test]
fn i7_a_damaged_parent_is_named() {
    let world = two_files(3);
    let (base, leaf) =
        (world.folder.path().join("disk.vhdx"), world.folder.path().join("disk_1.avhdx"));
    std::fs::OpenOptions::new().write(true).open(&base).unwrap().set_len(1000).unwrap();
    match open_error(&leaf) {
        DiskError::Corrupt { path, .. } => assert_eq!(path, base),
        other => panic!("{other}"),
    }
}

#[test]
fn parents_are_found_in_the_own_folder_only() {
    let world = two_files(4);
    let leaf = world.folder.path().join("disk_1.avhdx");
    // The same folder under another path: the recorded absolute path does not matter.
    let copy = snapshot(world.folder.path());
    let chain = Chain::open(&copy.path().join("disk_1.avhdx"), Access::ReadOnly).unwrap();
    assert!(chain.files().iter().all(|f| f.starts_with(copy.path())));
    drop(chain);
    // Alone in a folder, although the parent still lies where the locator says.
    let alone = tempfile::tempdir().unwrap();
    let moved = alone.path().join("disk_1.avhdx");
    std::fs::copy(&leaf, &moved).unwrap();
    assert!(matches!(open_error(&moved), DiskError::ParentMissing { .. }));
    // A link that leads out of the folder is not followed.
    std::os::unix::fs::symlink(
        world.folder.path().join("disk.vhdx"),
        alone.path().join("disk.vhdx"),
    )
    .unwrap();
    assert!(matches!(open_error(&moved), DiskError::ParentMissing { .. }));
}

#[test]
fn i7_hostile_locators_lead_nowhere() {
    let world = two_files(5);
    let leaf = world.folder.path().join("disk_1.avhdx");
    for name in ["..", ".", "..\\..\\etc\\passwd", "/etc/passwd", "\\", &"x".repeat(4000)] {
        let vhdx = Vhdx::open(&leaf, Access::ReadWrite).unwrap();
        let mut locator = vhdx.properties().parent.unwrap();
        locator.relative_path = Some(name.to_owned());
        locator.volume_path = None;
        locator.absolute_path = None;
        vhdx.set_parent(&locator).unwrap();
        drop(vhdx);
        assert!(matches!(open_error(&leaf), DiskError::ParentMissing { .. }), "{name}");
    }
    // Its own parent.
    let vhdx = Vhdx::open(&leaf, Access::ReadWrite).unwrap();
    let mut locator = vhdx.properties().parent.unwrap();
    locator.relative_path = Some(".\\disk_1.avhdx".to_owned());
    locator.linkage = vhdx.properties().data_write_guid;
    vhdx.set_parent(&locator).unwrap();
    drop(vhdx);
    assert!(matches!(open_error(&leaf), DiskError::Corrupt { .. }));
}

#[test]
fn chains_that_are_too_long_are_refused() {
    let folder = folder();
    let file = |i: u32| folder.path().join(format!("d{i}.avhdx"));
    Chain::create(&file(0), &options(MIB, 1 << 20)).unwrap();
    for i in 1..=64 {
        child_of(&file(i - 1), &file(i), |_| ());
    }
    assert_eq!(Chain::open(&file(63), Access::ReadOnly).unwrap().files().len(), 64);
    assert!(matches!(open_error(&file(64)), DiskError::Corrupt { .. }));
    let chain = Chain::open(&file(63), Access::ReadWrite);
    drop(chain);
}

#[test]
fn a_larger_child_reads_zeros_beyond_its_parent() {
    let folder = folder();
    let (base, leaf) = (folder.path().join("a.vhdx"), folder.path().join("b.avhdx"));
    Chain::create(&base, &options(2 * MIB + 512, 1 << 20)).unwrap();
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    chain.write_at(2 * MIB, &[7; 512]).unwrap();
    chain.close().unwrap();
    child_of(&base, &leaf, |o| o.size = 5 * MIB);
    let chain = Chain::open(&leaf, Access::ReadWrite).unwrap();
    let mut expected = vec![0; 5 * MIB as usize];
    expected[2 * MIB as usize..][..512].fill(7);
    assert_same(&read_all(&chain), &expected, "the larger child");
    chain.write_at(4 * MIB, &[9; 512]).unwrap();
    expected[4 * MIB as usize..][..512].fill(9);
    assert_same(&read_all(&chain), &expected, "the larger child");
    // It does not fit into its parent.
    assert!(matches!(try_merge(&chain, &leaf), Err(DiskError::State(_))));
    chain.close().unwrap();

    child_of(&base, &folder.path().join("small.avhdx"), |o| o.size = MIB);
    let error = open_error(&folder.path().join("small.avhdx"));
    assert!(matches!(error, DiskError::Unsupported { .. }));
    child_of(&base, &folder.path().join("4k.avhdx"), |o| {
        o.logical_sector = 4096;
        o.size = 4 * MIB;
    });
    assert!(matches!(open_error(&folder.path().join("4k.avhdx")), DiskError::Corrupt { .. }));
}

#[test]
fn requests_outside_the_disk_or_unaligned_are_refused() {
    let world = World::new(6, MIB, 1 << 20);
    let chain = world.chain();
    let mut buf = [0; 1024];
    for (offset, len) in
        [(256, 512), (0, 100), (MIB, 512), (MIB - 512, 1024), (u64::MAX - 511, 512)]
    {
        let len = len as usize;
        assert!(matches!(
            chain.read_at(offset, &mut buf[..len]),
            Err(DiskError::OutOfRange { .. })
        ));
        assert!(matches!(chain.write_at(offset, &buf[..len]), Err(DiskError::OutOfRange { .. })));
        let len = len as u64;
        assert!(matches!(chain.discard(offset, len), Err(DiskError::OutOfRange { .. })));
        assert!(matches!(chain.extents(offset, len), Err(DiskError::OutOfRange { .. })));
    }
    chain.read_at(MIB, &mut []).unwrap();
    chain.write_at(MIB, &[]).unwrap();
    chain.discard(0, 0).unwrap();
}

#[test]
fn frozen_files_are_read_by_others_while_the_leaf_is_written() {
    let mut world = World::new(8, 3 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    let frozen = world.chain().files()[0].clone();
    let reader = Chain::open(&frozen, Access::ReadOnly).unwrap();
    world.write();
    assert_same(&read_all(&reader), &world.sealed[0].content, "the checkpoint");
    assert_eq!(reader.last_seal().as_ref(), Some(&world.sealed[0].id));
    assert!(reader.changed_since(&world.sealed[0].id).unwrap().is_empty());
    assert!(matches!(reader.write_at(0, &[0; 512]), Err(DiskError::ReadOnly { .. })));
    assert!(reader.read_only());
    // The leaf is the owner's alone.
    assert!(matches!(open_error(&world.leaf()), DiskError::Busy { .. }));
    assert!(matches!(delete_disk_files(&world.leaf()), Err(DiskError::Busy { .. })));
    // Nobody's frozen file is changed under a reader.
    let leaf = world.leaf();
    assert!(matches!(try_merge(world.chain(), &leaf), Err(DiskError::Busy { .. })));
    world.write();
    world.check_content();
    drop(reader);
    world.merge(1);
    world.check_content();
}

#[test]
fn a_file_with_another_child_is_not_merged_into() {
    let mut world = World::new(9, 3 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    world.write();
    let (base, leaf) = (world.chain().files()[0].clone(), world.leaf());
    let other = world.folder.path().join("other.avhdx");
    child_of(&base, &other, |_| ());
    match try_merge(world.chain(), &leaf) {
        Err(DiskError::State(what)) => assert!(what.contains("other.avhdx"), "{what}"),
        other => panic!("{other:?}"),
    }
    // The other child has not lost its parent.
    Chain::open(&other, Access::ReadOnly).unwrap();
    world.write();
    world.check_content();
    // A damaged file might be one.
    std::fs::write(&other, vec![0; 2 << 20]).unwrap();
    assert!(matches!(try_merge(world.chain(), &leaf), Err(DiskError::State(_))));
    std::fs::remove_file(&other).unwrap();
    // A leaf that is prepared on the one to be merged.
    let new = world.new_leaf();
    world.chain().prepare_leaf(&new).unwrap();
    assert!(matches!(try_merge(world.chain(), &leaf), Err(DiskError::State(_))));
    world.chain().discard_prepared().unwrap();
    assert!(!new.exists() && !pair_paths(&new).0.exists());
    world.merge(1);
    world.check_content();
    world.check_changes();
}

#[test]
fn a_base_is_not_merged_and_strangers_neither() {
    let world = World::new(10, MIB, 1 << 20);
    let base = world.leaf();
    assert!(matches!(try_merge(world.chain(), &base), Err(DiskError::State(_))));
    assert!(matches!(try_merge(world.chain(), Path::new("x.avhdx")), Err(DiskError::State(_))));
}

#[test]
fn preparing_is_repeatable_and_clears_what_a_crash_left() {
    let mut world = World::new(11, 2 * MIB, 1 << 20);
    world.write();
    let new = world.new_leaf();
    world.chain().prepare_leaf(&new).unwrap();
    world.chain().prepare_leaf(&new).unwrap();
    // Another name instead.
    let second = world.new_leaf();
    world.chain().prepare_leaf(&second).unwrap();
    assert!(!new.exists());
    // Found again after a kill, with a GUID that is stale by then.
    world.kill();
    let second = world.folder.path().join(second.file_name().unwrap());
    assert!(second.exists());
    world.chain().prepare_leaf(&second).unwrap();
    let pause = world.chain().pause();
    world.chain().switch_leaf(&pause, &second).unwrap();
    drop(pause);
    world.write();
    world.reopen();
    world.check_content();
    // Files with data, or of others, are not replaced.
    for name in ["disk.vhdx", second.file_name().unwrap().to_str().unwrap()] {
        let path = world.folder.path().join(name);
        assert!(matches!(world.chain().prepare_leaf(&path), Err(DiskError::State(_))));
    }
    let outside = tempfile::tempdir().unwrap();
    let outside = outside.path().join("x.avhdx");
    assert!(matches!(world.chain().prepare_leaf(&outside), Err(DiskError::State(_))));
}

#[test]
fn unknown_ids_are_refused_with_the_reason() {
    let mut world = World::new(12, 2 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    let known = world.sealed[0].id.clone();
    let foreign = RctId { lineage: Uuid::new_v4(), ..known.clone() };
    let unsealed = RctId { seal: Uuid::new_v4(), ..known.clone() };
    for (id, part) in [(foreign, "another disk"), (unsealed, "no file of this chain")] {
        match world.chain().changed_since(&id) {
            Err(DiskError::UnknownRctId { why, .. }) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?}"),
        }
    }
    // The pair that knew the id is gone.
    world.chain().close().unwrap();
    let (rct, _) = pair_paths(&world.folder.path().join("disk.vhdx"));
    std::fs::remove_file(rct).unwrap();
    let chain = Chain::open(&world.folder.path().join("disk_1.avhdx"), Access::ReadWrite).unwrap();
    assert!(matches!(chain.changed_since(&known), Err(DiskError::UnknownRctId { .. })));
    assert_eq!(chain.continuity(), Continuity::Kept);
}

#[test]
fn i3_ids_below_survive_the_loss_of_a_childs_pair() {
    for lost_while_leaf in [true, false] {
        let mut world = World::new(13, 4 * MIB, 1 << 20);
        world.write();
        world.checkpoint();
        world.write();
        if !lost_while_leaf {
            world.checkpoint();
            world.sealed.truncate(1);
            world.write();
        }
        world.chain().close().unwrap();
        let (rct, mrt) = pair_paths(&world.folder.path().join("disk_1.avhdx"));
        std::fs::remove_file(rct).unwrap();
        std::fs::write(mrt, b"nonsense").unwrap();
        world.open_again();
        let lost = matches!(world.chain().continuity(), Continuity::Lost(_));
        assert_eq!(lost, lost_while_leaf);
        world.sealed[0].written = None;
        world.write();
        world.check_changes();
        world.merge(1);
        world.check_content();
        world.check_changes();
        // Ids sealed from here on are later than all before.
        world.checkpoint();
        world.write();
        world.check_changes();
    }
}

#[test]
fn i3_a_childs_ids_survive_the_loss_of_its_parents_pair() {
    let mut world = World::new(14, 4 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    world.write();
    world.checkpoint();
    world.write();
    // The first leaf has the second id; now it is the leaf again.
    world.merge(2);
    world.write();
    world.chain().close().unwrap();
    std::fs::remove_file(pair_paths(&world.folder.path().join("disk.vhdx")).0).unwrap();
    world.open_again();
    world.sealed.remove(0);
    world.sealed[0].written = None;
    world.write();
    world.merge(1);
    world.write();
    world.check_content();
    world.check_changes();
}

#[test]
fn a_closed_chain_serves_nothing_and_lets_go_of_its_files() {
    let mut world = World::new(15, 2 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    let files = world.chain().files();
    world.chain().close().unwrap();
    world.chain().close().unwrap();
    assert_eq!(world.chain().files(), files);
    assert!(matches!(world.chain().flush(), Err(DiskError::State(_))));
    assert!(matches!(world.chain().read_at(0, &mut [0; 512]), Err(DiskError::State(_))));
    let again = Chain::open(&files[1], Access::ReadWrite).unwrap();
    assert_same(&read_all(&again), &world.content, "the disk opened anew");
}

#[test]
fn deleting_removes_the_pair_and_may_be_repeated() {
    let world = two_files(16);
    let leaf = world.folder.path().join("disk_1.avhdx");
    let (rct, mrt) = pair_paths(&leaf);
    assert!(rct.exists() && mrt.exists());
    for _ in 0..2 {
        delete_disk_files(&leaf).unwrap();
        assert!(!leaf.exists() && !rct.exists() && !mrt.exists());
    }
}

#[test]
fn a_merge_leaves_a_child_that_reads_the_same() {
    let mut world = World::new(17, 3 * MIB, 1 << 20);
    world.write();
    world.checkpoint();
    world.write();
    let child = world.leaf();
    merge(world.chain(), &child);
    world.chain().close().unwrap();
    let chain = Chain::open(&child, Access::ReadOnly).unwrap();
    assert_same(&read_all(&chain), &world.content, "the child after its merge");
    assert_eq!(chain.properties().parent.unwrap().linkage2, None);
}

/// The writer died after it had switched away from the file and before it had closed it.
#[test]
fn i5_a_parent_that_a_dead_writer_left_open_is_made_durable() {
    let folder = folder();
    let (base, leaf) = (folder.path().join("disk.vhdx"), folder.path().join("disk_1.avhdx"));
    Chain::create(&base, &options(8 * MIB, 1 << 20)).unwrap();
    child_of(&base, &leaf, |_| ());
    let old = Vhdx::open(&base, Access::ReadWrite).unwrap();
    old.write_at(2 * MIB, &[7; 4096]).unwrap();
    old.abandon();
    let held = |access| {
        let mut data = [0; 4096];
        Chain::open(&leaf, access).unwrap().read_at(2 * MIB, &mut data).unwrap();
        data == [7; 4096]
    };
    assert!(held(Access::ReadOnly));
    assert!(folder.path().join("disk.vhdx.pending").exists(), "reading changes nothing");
    // A flush of the leaf promises what lies in the parent too: nothing of it may be pending.
    assert!(held(Access::ReadWrite));
    assert!(!folder.path().join("disk.vhdx.pending").exists());
    assert!(held(Access::ReadOnly));
}

#[test]
fn a_deleted_disk_leaves_nothing_behind() {
    let folder = folder();
    let disk = folder.path().join("disk.vhdx");
    Chain::create(&disk, &options(8 * MIB, 1 << 20)).unwrap();
    // Killed while a pair was being made anew.
    for left in ["disk.vhdx.rct.new", "disk.vhdx.mrt.new", "disk.vhdx.pending"] {
        std::fs::write(folder.path().join(left), b"half").unwrap();
    }
    delete_disk_files(&disk).unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    delete_disk_files(&disk).unwrap();
}
