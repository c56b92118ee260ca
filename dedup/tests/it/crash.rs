//! Failures and death at every storage call.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_dedup::testing::{Fault, MemoryStore};
use tidemark_dedup::{Compression, Manifest, RepoError, Repository, Result};

use crate::support::*;

/// A backup of two disks and a file against an older restore point, in several packs.
fn backup(store: &Arc<MemoryStore>, n: u32) -> Result<(Manifest, Vec<u8>)> {
    let repository = open(store.clone())?;
    repository.set_pack_target(300 << 10);
    let base = repository.latest(GROUP)?.expect("the first restore point");
    let base = &base.disks[0].root;
    let mut content = old_content();
    let new = noise(50 + u64::from(n), 12 * C);
    content[8 * C..20 * C].copy_from_slice(&new);
    content.resize(content.len() - 5 * C - 100, 0);
    let mut writer = repository.begin(Compression::Fast)?;
    let mut disk = writer.disk(content.len() as u64, Some(base))?;
    disk.write(8 * C as u64, Bytes::from(new))?;
    let root = disk.finish()?;
    let second = put_disk(&mut writer, &noise(90 + u64::from(n), 9 * C))?;
    let mut manifest = manifest(n, vec![("disk0", root), ("disk1", second)]);
    manifest.files.push(writer.file("vm.vmcx", b"configuration")?);
    writer.commit(manifest).map(|manifest| (manifest, content))
}

fn old_content() -> Vec<u8> {
    noise(1, 40 * C)
}

fn check(repository: &Repository, manifest: &Manifest, content: &[u8]) {
    assert!(read_disk(repository, &manifest.disks[0].root).unwrap() == content);
    if let [_, second] = &manifest.disks[..] {
        let n = manifest.facts["n"].as_u64().unwrap();
        assert!(read_disk(repository, &second.root).unwrap() == noise(90 + n, 9 * C));
        assert_eq!(repository.read_file(&manifest.files[0], 100).unwrap(), b"configuration");
    }
}

#[test]
fn i4_a_failed_call_never_leaves_a_restore_point_half_visible_and_a_retry_succeeds() {
    let store = Arc::new(MemoryStore::new());
    let first = put_point(&create(store.clone()), 1, &old_content()).unwrap();
    let before = store.objects();
    for (after_effect, lasting) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut calls = 0;
        loop {
            store.restore(before.clone());
            store.fail_at(Some(Fault { call: calls, after_effect, lasting }));
            let result = backup(&store, 2);
            let hit = store.fault_hit();
            store.fail_at(None);
            // Another host looks at what is left.
            let repository = open(store.clone()).unwrap();
            let points: Vec<Manifest> =
                repository.points(Some(GROUP)).unwrap().into_iter().map(Result::unwrap).collect();
            assert!(points.len() == 1 || points.len() == 2, "call {calls}");
            assert_eq!(points[0].point, first.point);
            check(&repository, &points[0], &old_content());
            if let Ok((manifest, _)) = &result {
                assert_eq!(points.last().map(|p| p.point), Some(manifest.point));
            }
            let content = |n: u64| {
                let mut content = old_content();
                content[8 * C..20 * C].copy_from_slice(&noise(50 + n, 12 * C));
                content.truncate(40 * C - 5 * C - 100);
                content
            };
            if let Some(second) = points.get(1) {
                check(&repository, second, &content(2));
            }
            let (again, content) = backup(&store, 3).unwrap();
            let repository = open(store.clone()).unwrap();
            check(&repository, &repository.point(again.point).unwrap(), &content);
            if !hit {
                break;
            }
            assert!(result.is_err() || !lasting, "call {calls} failed for good and no one noticed");
            calls += 1;
        }
        assert!(calls > 8, "only {calls} calls were made to fail");
    }
}

#[test]
fn i4_a_failed_creation_leaves_nothing_that_stops_the_next() {
    for after_effect in [false, true] {
        for call in 0.. {
            let store = Arc::new(MemoryStore::new());
            store.fail_at(Some(Fault { call, after_effect, lasting: true }));
            let created = try_create(store.clone());
            let hit = store.fault_hit();
            store.fail_at(None);
            assert_eq!(created.is_err(), hit, "call {call}");
            match open(store.clone()) {
                Ok(_) => {}
                Err(RepoError::NoRepository(_)) => drop(create(store.clone())),
                Err(e) => panic!("call {call}: {e}"),
            }
            put_point(&open(store).unwrap(), 1, &noise(1, C)).unwrap();
            if !hit {
                break;
            }
        }
    }
}

#[test]
fn a_writer_that_failed_once_can_never_commit() {
    let (store, repository) = memory();
    repository.set_pack_target(100 << 10);
    let mut writer = repository.begin(Compression::Fast).unwrap();
    let root = put_disk(&mut writer, &noise(1, 4 * C)).unwrap();
    store.fail_at(Some(Fault { call: 0, after_effect: false, lasting: false }));
    let mut failures = 0;
    for n in 0..20u64 {
        failures += u32::from(put_disk(&mut writer, &noise(2 + n, 20 * C)).is_err());
    }
    assert!(failures > 0 && store.fault_hit());
    assert!(writer.commit(manifest(1, vec![("disk0", root)])).is_err());
    assert_eq!(open(store).unwrap().points(None).unwrap().len(), 0);
}

#[test]
fn a_dropped_writer_leaves_no_restore_point_and_its_disk_can_be_begun_anew() {
    let (store, repository) = memory();
    let mut writer = repository.begin(Compression::Default).unwrap();
    let mut disk = writer.disk(100 * C as u64, None).unwrap();
    disk.write(0, Bytes::from(noise(1, 50 * C))).unwrap();
    drop(disk);
    let root = put_disk(&mut writer, &noise(1, 60 * C)).unwrap();
    drop(writer);
    assert!(repository.points(None).unwrap().is_empty());
    // What the dropped writer may have stored is not taken for durable.
    let mut writer = repository.begin(Compression::Default).unwrap();
    let again = put_disk(&mut writer, &noise(1, 60 * C)).unwrap();
    assert_eq!(again, root);
    writer.commit(manifest(1, vec![("disk0", again.clone())])).unwrap();
    assert!(read_disk(&open(store).unwrap(), &again).unwrap() == noise(1, 60 * C));
}

#[test]
fn a_manifest_of_maps_that_are_not_stored_is_refused() {
    let (_, elsewhere) = memory();
    let foreign = put_point(&elsewhere, 1, &noise(1, C)).unwrap();
    let (_, repository) = memory();
    let writer = repository.begin(Compression::Fast).unwrap();
    let refused = writer.commit(manifest(2, vec![("disk0", foreign.disks[0].root.clone())]));
    assert!(matches!(refused, Err(RepoError::Invalid(_))), "{refused:?}");
    assert!(repository.points(None).unwrap().is_empty());
}
