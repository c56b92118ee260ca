//! Disks that nobody uses, and what is done to them.
#![allow(clippy::single_range_in_vec_init)] // answers are lists of ranges

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use uuid::Uuid;

use super::world::{MIB, options, read_all};
use crate::block::Block;
use crate::chain::{
    Chain, compact, delete_disk_files, fork, merge_down, resize, set_disk_id, set_parent,
};
use crate::error::DiskError;
use crate::rct::{Continuity, RctId};
use crate::vhdx::{Access, ParentLocator, Vhdx};

const SIZE: u64 = 6 * MIB + 4096;

fn go() -> AtomicBool {
    AtomicBool::new(false)
}

fn data(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 7 + i % 251 + seed * 31) as u8 | 1).collect()
}

/// A chain of files with data in each, closed, with the id of each switch.
fn chain_of(folder: &Path, files: usize) -> (Vec<PathBuf>, Vec<RctId>) {
    let names: Vec<PathBuf> = (0..files)
        .map(|i| folder.join(if i == 0 { "base.vhdx".into() } else { format!("{i}.avhdx") }))
        .collect();
    Chain::create(&names[0], &options(SIZE, 1 << 20)).unwrap();
    let chain = Chain::open(&names[0], Access::ReadWrite).unwrap();
    let mut ids = Vec::new();
    for i in 0..files as u64 {
        chain.write_at(i * MIB / 2, &data(i, MIB + 512)).unwrap();
        chain.discard((i + 2) % 5 * MIB, MIB).unwrap();
        if let Some(next) = names.get(i as usize + 1) {
            chain.prepare_leaf(next).unwrap();
            ids.push(chain.switch_leaf(&chain.pause(), next).unwrap());
            chain.settle().unwrap();
        }
    }
    chain.close().unwrap();
    (names, ids)
}

fn content(leaf: &Path) -> Vec<u8> {
    read_all(&Chain::open(leaf, Access::ReadOnly).unwrap())
}

fn seal(leaf: &Path) -> RctId {
    let chain = Chain::open(leaf, Access::ReadWrite).unwrap();
    let next = leaf.with_file_name("sealing.avhdx");
    chain.prepare_leaf(&next).unwrap();
    let id = chain.switch_leaf(&chain.pause(), &next).unwrap();
    chain.settle().unwrap();
    chain.merge(&next, &|_| (), &go()).unwrap();
    delete_disk_files(&next).unwrap();
    chain.close().unwrap();
    id
}

fn state_error<T: std::fmt::Debug>(result: crate::Result<T>) -> String {
    match result {
        Err(DiskError::State(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn i3_a_resized_disk_answers_for_its_ids_and_what_was_added_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    for files in [1, 2] {
        let folder = dir.path().join(files.to_string());
        std::fs::create_dir(&folder).unwrap();
        let (names, mut ids) = chain_of(&folder, files);
        let leaf = names.last().unwrap();
        ids.push(seal(leaf));
        let before = content(leaf);
        let done = resize(leaf, 9 * MIB, false).unwrap();
        assert_eq!((done.before, done.after, done.continuity), (SIZE, 9 * MIB, Continuity::Kept));
        let chain = Chain::open(leaf, Access::ReadWrite).unwrap();
        let now = read_all(&chain);
        assert!(now[..before.len()] == before && now[before.len()..].iter().all(|b| *b == 0));
        let sealed = ids.last().unwrap();
        let edge = SIZE / crate::GRANULE * crate::GRANULE;
        assert_eq!(chain.changed_since(sealed).unwrap(), [edge..9 * MIB]);
        chain.write_at(8 * MIB, &data(9, 512)).unwrap();
        assert_eq!(chain.changed_since(sealed).unwrap(), [edge..9 * MIB]);
        for id in &ids {
            let changed = chain.changed_since(id).unwrap();
            assert_eq!(changed.last().unwrap().end, 9 * MIB);
        }
        chain.close().unwrap();
        // Back again: nothing but what was written stands in the way.
        let why = state_error(resize(leaf, SIZE, false));
        assert!(why.contains(&(8 * MIB + 512).to_string()), "{why}");
        let small = 8 * MIB + 512;
        assert_eq!(resize(leaf, small, true).unwrap().after, small);
        assert_eq!(Vhdx::open(leaf, Access::ReadOnly).unwrap().properties().geometry.size, 9 * MIB);
        assert_eq!(resize(leaf, small, false).unwrap().continuity, Continuity::Kept);
        let chain = Chain::open(leaf, Access::ReadOnly).unwrap();
        assert_eq!(chain.changed_since(sealed).unwrap(), [edge..small]);
    }
}

#[test]
fn a_disk_with_children_and_a_child_below_its_parents_size_keep_their_size() {
    let dir = tempfile::tempdir().unwrap();
    let (names, _) = chain_of(dir.path(), 2);
    assert!(state_error(resize(&names[0], 9 * MIB, false)).contains("its child"));
    let why = state_error(resize(&names[1], 4 * MIB, false));
    assert!(why.contains("never smaller than its parent"), "{why}");
    let _open = Chain::open(&names[1], Access::ReadWrite).unwrap();
    assert!(matches!(resize(&names[1], 9 * MIB, false), Err(DiskError::Busy { .. })));
    assert!(matches!(compact(&names[1], true, false, &|_| (), &go()), Err(DiskError::Busy { .. })));
}

#[test]
fn a_resize_cut_short_answers_for_no_id() {
    let dir = tempfile::tempdir().unwrap();
    let (names, ids) = chain_of(dir.path(), 1);
    assert!(ids.is_empty());
    let id = seal(&names[0]);
    // The file has its new size, and the kill came before the pair had it.
    let mut disk = Vhdx::open(&names[0], Access::ReadWrite).unwrap();
    disk.resize(9 * MIB).unwrap();
    drop(disk);
    let chain = Chain::open(&names[0], Access::ReadWrite).unwrap();
    assert!(matches!(chain.continuity(), Continuity::Lost(_)));
    assert!(matches!(chain.changed_since(&id), Err(DiskError::UnknownRctId { .. })));
}

#[test]
fn i6_compacting_changes_neither_content_nor_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (names, ids) = chain_of(dir.path(), 3);
    let chain = Chain::open(&names[2], Access::ReadWrite).unwrap();
    chain.write_at(0, &vec![0; 2 << 20]).unwrap();
    chain.close().unwrap();
    let look = |leaf: &Path| {
        let chain = Chain::open(leaf, Access::ReadOnly).unwrap();
        let answers: Vec<_> = ids.iter().map(|id| chain.changed_since(id).unwrap()).collect();
        (read_all(&chain), answers)
    };
    let before = look(&names[2]);
    for name in &names {
        let guid = |n: &Path| Vhdx::open(n, Access::ReadOnly).unwrap().properties().data_write_guid;
        let was = guid(name);
        let plan = compact(name, true, true, &|_| (), &go()).unwrap();
        assert_eq!(std::fs::metadata(name).unwrap().len(), plan.length_before);
        assert_eq!(compact(name, true, false, &|_| (), &go()).unwrap(), plan);
        assert_eq!(std::fs::metadata(name).unwrap().len(), plan.length_after);
        assert_eq!(guid(name), was);
        assert!(look(&names[2]) == before, "{}", name.display());
    }
}

#[test]
fn levels_are_folded_down_and_the_rest_stays() {
    for (files, levels) in [(2, 1), (4, 2), (4, 3), (5, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let (names, ids) = chain_of(dir.path(), files);
        let before = content(&names[files - 1]);
        let plan = merge_down(&names[files - 1], levels, true, &|_, _| (), &go()).unwrap();
        assert!(names.iter().all(|n| n.exists()));
        let done = merge_down(&names[files - 1], levels, false, &|_, _| (), &go()).unwrap();
        assert_eq!(done, plan);
        let top = files - 1 - levels;
        assert_eq!((&done.into, &done.merged[..]), (&names[top], &names[top + 1..]));
        for (i, name) in names.iter().enumerate() {
            assert_eq!(name.exists(), i <= top);
        }
        assert!(content(&names[top]) == before);
        let chain = Chain::open(&names[top], Access::ReadWrite).unwrap();
        for id in &ids {
            chain.changed_since(id).unwrap();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (names, _) = chain_of(dir.path(), 3);
    for levels in [0, 3, 9] {
        let why = state_error(merge_down(&names[2], levels, false, &|_, _| (), &go()));
        assert!(why.contains("1 to 2 levels"), "{why}");
    }
}

#[test]
fn a_leaf_larger_than_its_parents_is_folded_into_them() {
    let dir = tempfile::tempdir().unwrap();
    let (names, ids) = chain_of(dir.path(), 3);
    resize(&names[2], 10 * MIB + 512, false).unwrap();
    let chain = Chain::open(&names[2], Access::ReadWrite).unwrap();
    chain.write_at(9 * MIB, &data(4, MIB)).unwrap();
    chain.close().unwrap();
    let before = content(&names[2]);
    let done = merge_down(&names[2], 2, false, &|_, _| (), &go()).unwrap();
    assert_eq!(done.grown, names[..2]);
    assert!(content(&names[0]) == before);
    let chain = Chain::open(&names[0], Access::ReadWrite).unwrap();
    for id in &ids {
        let changed = chain.changed_since(id).unwrap();
        assert!(changed.iter().any(|r| r.start <= SIZE && r.end == 10 * MIB + 512), "{changed:?}");
    }
}

#[test]
fn a_chain_with_another_branch_is_not_folded() {
    let dir = tempfile::tempdir().unwrap();
    let (names, _) = chain_of(dir.path(), 2);
    let other = dir.path().join("other.avhdx");
    fork(&names[0], &other, None, None, false).unwrap();
    let why = state_error(merge_down(&names[1], 1, false, &|_, _| (), &go()));
    assert!(why.contains("another child"), "{why}");
}

#[test]
fn forks_of_one_base_live_side_by_side_also_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let bases = dir.path().join("bases");
    let forks = dir.path().join("forks").join("deep");
    std::fs::create_dir_all(&bases).unwrap();
    std::fs::create_dir_all(&forks).unwrap();
    let (names, ids) = chain_of(&bases, 2);
    let base = &names[1];
    let before = content(base);
    let near = bases.join("near.avhdx");
    let far = forks.join("far.avhdx");
    assert!(!fork(base, &near, None, None, true).unwrap().elsewhere && !near.exists());
    fork(base, &near, None, Some(2 << 20), false).unwrap();
    assert!(fork(base, &far, Some(8 * MIB), None, false).unwrap().elsewhere);
    assert!(fork(base, &far, None, None, false).is_err(), "overwritten");
    assert!(state_error(fork(base, &forks.join("x"), Some(MIB), None, false)).contains("smaller"));
    assert!(matches!(Chain::open(&far, Access::ReadOnly), Err(DiskError::ParentMissing { .. })));
    let folders = [bases.clone()];
    let far_chain = Chain::open_among(&far, Access::ReadWrite, &folders).unwrap();
    let near_chain = Chain::open(&near, Access::ReadWrite).unwrap();
    far_chain.write_at(0, &data(1, 512)).unwrap();
    near_chain.write_at(0, &data(2, 512)).unwrap();
    let mut expected = before.clone();
    expected[..512].copy_from_slice(&data(2, 512));
    assert!(read_all(&near_chain) == expected);
    expected[..512].copy_from_slice(&data(1, 512));
    expected.resize(8 << 20, 0);
    assert!(read_all(&far_chain) == expected);
    // Both know what the base knows.
    assert!(far_chain.changed_since(&ids[0]).is_ok() && near_chain.changed_since(&ids[0]).is_ok());
    far_chain.close().unwrap();
    near_chain.close().unwrap();
    let named = Vhdx::open(&far, Access::ReadOnly).unwrap().properties().parent.unwrap();
    assert_eq!(named.relative_path.as_deref(), Some(".\\..\\..\\bases\\1.avhdx"));
    assert!(content(base) == before);
}

/// Puts a locator into a child as another writer would.
fn name_parent(child: &Path, change: impl FnOnce(&mut ParentLocator)) {
    let disk = Vhdx::open(child, Access::ReadWrite).unwrap();
    let mut locator = disk.properties().parent.unwrap();
    (locator.relative_path, locator.absolute_path, locator.volume_path) = (None, None, None);
    change(&mut locator);
    disk.set_parent(&locator).unwrap();
}

#[test]
fn each_form_of_a_parents_path_is_read_and_stale_ones_are_refreshed() {
    let dir = tempfile::tempdir().unwrap();
    let (names, _) = chain_of(dir.path(), 2);
    let before = content(&names[1]);
    let recorded = || Vhdx::open(&names[1], Access::ReadOnly).unwrap().properties().parent.unwrap();
    let good = ".\\base.vhdx";
    type Change = fn(&mut ParentLocator);
    let forms: [(Change, [Option<&str>; 3]); 6] = [
        (
            |l| l.relative_path = Some("base.vhdx".into()),
            [Some("base.vhdx"), Some("\\\\?\\C:\\base.vhdx"), None],
        ),
        (
            |l| l.relative_path = Some("..\\..\\old\\base.vhdx".into()),
            [Some(good), Some("\\\\?\\C:\\base.vhdx"), None],
        ),
        (
            |l| l.absolute_path = Some("\\\\?\\D:\\VMs\\base.vhdx".into()),
            [Some(good), Some("\\\\?\\D:\\VMs\\base.vhdx"), None],
        ),
        (
            |l| l.volume_path = Some("\\\\?\\Volume{1}\\base.vhdx".into()),
            [Some(good), Some("\\\\?\\C:\\base.vhdx"), Some("\\\\?\\Volume{1}\\base.vhdx")],
        ),
        (
            |l| {
                l.relative_path = Some(".\\renamed.vhdx".into());
                l.volume_path = Some("\\\\?\\Volume{1}\\renamed.vhdx".into());
                l.absolute_path = Some("\\\\?\\D:\\base.vhdx".into());
            },
            [Some(good), Some("\\\\?\\D:\\base.vhdx"), None],
        ),
        (
            |l| {
                l.relative_path = Some(good_path());
                l.absolute_path = Some("\\\\?\\UNC\\srv\\share\\base.vhdx".into());
            },
            [Some(good), Some("\\\\?\\UNC\\srv\\share\\base.vhdx"), None],
        ),
    ];
    for (i, (form, expected)) in forms.into_iter().enumerate() {
        name_parent(&names[1], form);
        let found = recorded();
        assert!(content(&names[1]) == before, "form {i}");
        assert_eq!(recorded(), found, "a reader writes nothing");
        Chain::open(&names[1], Access::ReadWrite).unwrap().close().unwrap();
        let now = recorded();
        let paths = [&now.relative_path, &now.absolute_path, &now.volume_path];
        assert_eq!(paths.map(|p| p.as_deref()), expected, "form {i}");
        assert_eq!(now.linkage, found.linkage);
    }
}

fn good_path() -> String {
    ".\\base.vhdx".to_owned()
}

#[test]
fn another_parent_is_taken_only_by_its_identity_or_on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let (names, ids) = chain_of(dir.path(), 3);
    let before = content(&names[2]);
    let moved = dir.path().join("renamed.vhdx");
    std::fs::rename(&names[0], &moved).unwrap();
    std::fs::rename(dir.path().join("base.vhdx.rct"), dir.path().join("renamed.vhdx.rct")).unwrap();
    std::fs::rename(dir.path().join("base.vhdx.mrt"), dir.path().join("renamed.vhdx.mrt")).unwrap();
    assert!(matches!(
        Chain::open(&names[2], Access::ReadOnly),
        Err(DiskError::ParentMissing { .. })
    ));
    assert!(set_parent(&names[1], &moved, false, true).unwrap());
    assert!(Chain::open(&names[2], Access::ReadOnly).is_err(), "a dry run changes nothing");
    assert!(set_parent(&names[1], &moved, false, false).unwrap());
    assert!(content(&names[2]) == before);
    let chain = Chain::open(&names[2], Access::ReadWrite).unwrap();
    assert!(ids.iter().all(|id| chain.changed_since(id).is_ok()));
    chain.close().unwrap();
    // Another disk, a loop, a base, a smaller child.
    let other = dir.path().join("other.vhdx");
    Chain::create(&other, &options(SIZE, 1 << 20)).unwrap();
    assert!(matches!(
        set_parent(&names[2], &other, false, false),
        Err(DiskError::ParentChanged { .. })
    ));
    assert!(state_error(set_parent(&names[1], &names[2], true, false)).contains("rests"));
    assert!(state_error(set_parent(&other, &names[2], true, false)).contains("not a differencing"));
    let large = dir.path().join("large.vhdx");
    Chain::create(&large, &options(2 * SIZE, 1 << 20)).unwrap();
    assert!(set_parent(&names[2], &large, true, false).is_err());
    assert!(content(&names[2]) == before);
    // With children above, even on demand only the leaf.
    assert!(state_error(set_parent(&names[1], &other, true, false)).contains("its child"));
    assert!(!set_parent(&names[2], &other, true, true).unwrap());
    assert!(!set_parent(&names[2], &other, true, false).unwrap());
    let chain = Chain::open(&names[2], Access::ReadWrite).unwrap();
    assert_eq!(chain.files(), [other, names[2].clone()]);
    for id in &ids {
        assert!(matches!(chain.changed_since(id), Err(DiskError::UnknownRctId { .. })));
    }
}

#[test]
fn another_disk_id_makes_another_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (names, _) = chain_of(dir.path(), 1);
    let id = seal(&names[0]);
    let before = content(&names[0]);
    let wanted = Uuid::from_u128(0xfeed);
    assert_eq!(set_disk_id(&names[0], Some(wanted), true).unwrap(), wanted);
    assert!(Chain::open(&names[0], Access::ReadOnly).unwrap().changed_since(&id).is_ok());
    assert_eq!(set_disk_id(&names[0], Some(wanted), false).unwrap(), wanted);
    let chain = Chain::open(&names[0], Access::ReadWrite).unwrap();
    assert_eq!(chain.lineage(), wanted);
    assert!(read_all(&chain) == before);
    assert!(matches!(chain.changed_since(&id), Err(DiskError::UnknownRctId { .. })));
    chain.close().unwrap();
    let child = dir.path().join("child.avhdx");
    fork(&names[0], &child, None, None, false).unwrap();
    let chain = Chain::open(&child, Access::ReadWrite).unwrap();
    chain.write_at(0, &data(1, 512)).unwrap();
    chain.close().unwrap();
    assert!(state_error(set_disk_id(&names[0], None, false)).contains("its child"));
    assert!(state_error(set_disk_id(&child, None, false)).contains("differencing"));
}
