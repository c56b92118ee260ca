//! Copies between repositories.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tidemark_dedup::testing::{Fault, MemoryStore};
use tidemark_dedup::{CHUNK, Compression, Manifest, RepoError, Repository, Result, WriteStats};

use crate::support::*;

fn copy(to: &Repository, from: &Repository, point: &Manifest) -> Result<WriteStats> {
    to.copy_from(from, point.point, &|_, _| {}, &AtomicBool::new(false))
}

/// A point that differs from the one before in some chunks, some of which become zeros.
fn next(repository: &Repository, n: u32, base: &Manifest, content: &mut [u8]) -> Manifest {
    let mut writer = repository.begin(Compression::Better).unwrap();
    let size = content.len() as u64;
    let mut disk = writer.disk(size, Some(&base.disks[0].root)).unwrap();
    let new = noise(1000 + u64::from(n), 3 * C);
    disk.write(7 * CHUNK, Bytes::from(new.clone())).unwrap();
    disk.zero(70 * CHUNK..140 * CHUNK).unwrap();
    content[7 * C..10 * C].copy_from_slice(&new);
    content[70 * C..140 * C].fill(0);
    let root = disk.finish().unwrap();
    let mut manifest = manifest(n, vec![("disk0", root)]);
    manifest.files.push(writer.file("vm.vmcx", format!("config {n}").as_bytes()).unwrap());
    writer.commit(manifest).unwrap()
}

#[test]
fn a_copy_is_the_same_restore_point_and_a_later_one_moves_only_the_change() {
    let (store, source) = memory();
    let mut content = noise(1, 300 * C);
    let first = put_point(&source, 1, &content).unwrap();
    let second = next(&source, 2, &first, &mut content);
    let (_, target) = memory();
    let full = copy(&target, &source, &first).unwrap();
    assert_eq!(full.new_bytes, 300 * CHUNK);
    store.fail_at(None);
    let change = copy(&target, &source, &second).unwrap();
    assert_eq!(change.read_bytes, 3 * CHUNK + 8, "three chunks and a file");
    let read: u64 = store.calls().iter().filter(|c| c.0 == "get_range").map(|c| c.2).sum();
    assert!(read < 20 * CHUNK, "{read} bytes read from the source");
    let copied = target.point(second.point).unwrap();
    assert_eq!((copied.group, &copied.created), (second.group, &second.created));
    assert_eq!((copied.facts, copied.stats), (second.facts.clone(), second.stats));
    assert!(read_disk(&target, &copied.disks[0].root).unwrap() == content);
    assert_eq!(target.read_file(&copied.files[0], 100).unwrap(), b"config 2");
    // Again: nothing to do.
    assert_eq!(copy(&target, &source, &second).unwrap(), WriteStats::default());
    assert_eq!(target.points(None).unwrap().len(), 2);
}

#[test]
fn copies_of_resized_disks_and_in_any_order_are_right() {
    let (_, source) = memory();
    let mut base: Option<Manifest> = None;
    let mut points = Vec::new();
    // Across the sizes at which maps gain and lose levels, and within chunks.
    let sizes = [10 * C, 64 * C, 64 * C + 1, 200 * C + 77, 64 * C - 3, 63 * C + 5, 5000 * C, 3 * C];
    let mut content = Vec::new();
    for (n, size) in (1u32..).zip(sizes) {
        content.resize(size, 0);
        let new = noise(u64::from(n), 2 * C);
        content[..2 * C].copy_from_slice(&new);
        let mut writer = source.begin(Compression::Fast).unwrap();
        let base_root = base.as_ref().map(|m| &m.disks[0].root);
        let mut disk = writer.disk(size as u64, base_root).unwrap();
        disk.write(0, Bytes::from(new)).unwrap();
        if size == 64 * C + 1 {
            disk.write(64 * CHUNK, Bytes::from(vec![9])).unwrap();
            content[64 * C] = 9;
        }
        let root = disk.finish().unwrap();
        let point = writer.commit(manifest(n, vec![("disk0", root)])).unwrap();
        assert!(read_disk(&source, &point.disks[0].root).unwrap() == content);
        points.push((point.clone(), content.clone()));
        base = Some(point);
    }
    for order in [[0, 1, 2, 3, 4, 5, 6, 7], [7, 2, 6, 0, 5, 3, 1, 4]] {
        let (_, target) = memory();
        for at in order {
            let (point, content) = &points[at];
            copy(&target, &source, point).unwrap();
            let copied = target.point(point.point).unwrap();
            assert!(read_disk(&target, &copied.disks[0].root).unwrap() == *content, "{at}");
        }
    }
}

#[test]
fn i7_damaged_source_data_is_not_copied() {
    let (store, source) = memory();
    let point = put_point(&source, 1, &noise(1, 40 * C)).unwrap();
    let pack = store.objects().into_keys().find(|key| key.starts_with("packs/")).unwrap();
    let mut bytes = store.objects()[&pack].to_vec();
    bytes[1000] ^= 4;
    store.replace(&pack, bytes);
    let (_, target) = memory();
    let result = copy(&target, &open(store).unwrap(), &point);
    assert!(matches!(&result, Err(RepoError::Damaged { key, .. }) if *key == pack), "{result:?}");
    assert!(target.points(None).unwrap().is_empty());
}

#[test]
fn i4_a_copy_killed_at_any_call_shows_nothing_or_everything_and_can_be_repeated() {
    let (_, source) = memory();
    let mut content = noise(1, 150 * C);
    let first = put_point(&source, 1, &content).unwrap();
    let second = next(&source, 2, &first, &mut content);
    for after_effect in [false, true] {
        for call in 0.. {
            let store = Arc::new(MemoryStore::new());
            let target = create(store.clone());
            copy(&target, &source, &first).unwrap();
            store.fail_at(Some(Fault { call, after_effect, lasting: true }));
            let result = copy(&target, &source, &second);
            let hit = store.fault_hit();
            store.fail_at(None);
            assert_eq!(result.is_err(), hit, "call {call}");
            let target = open(store).unwrap();
            copy(&target, &source, &second).unwrap();
            let copied = target.point(second.point).unwrap();
            assert!(read_disk(&target, &copied.disks[0].root).unwrap() == content);
            if !hit {
                break;
            }
        }
    }
}

#[test]
fn a_cancelled_copy_ends_soon_and_shows_nothing() {
    let (_, source) = memory();
    let point = put_point(&source, 1, &noise(1, 2000 * C)).unwrap();
    let (_, target) = memory();
    let cancel = AtomicBool::new(false);
    let stop = |done: u64, _| cancel.store(done > 100 * CHUNK, Ordering::Relaxed);
    let result = target.copy_from(&source, point.point, &stop, &cancel);
    assert!(matches!(result, Err(RepoError::Cancelled)), "{result:?}");
    assert!(target.points(None).unwrap().is_empty());
}
