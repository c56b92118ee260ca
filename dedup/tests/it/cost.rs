//! What runs cost: bytes and requests follow the change.

use std::sync::Arc;

use bytes::Bytes;
use tidemark_dedup::testing::MemoryStore;
use tidemark_dedup::{CHUNK, Compression, WriteStats};

use crate::support::*;

#[test]
fn an_incremental_run_of_nothing_uploads_only_a_manifest_in_ten_requests() {
    let (store, repository) = memory();
    put_point(&repository, 1, &noise(1, 200 * C)).unwrap();
    store.fail_at(None);
    let repository = open(store.clone()).unwrap();
    let base = repository.latest(GROUP).unwrap().unwrap();
    let mut writer = repository.begin(Compression::Default).unwrap();
    let disk = writer.disk(200 * CHUNK, Some(&base.disks[0].root)).unwrap();
    let root = disk.finish().unwrap();
    assert_eq!(root, base.disks[0].root);
    let done = writer.commit(manifest(2, vec![("disk0", root)])).unwrap();
    let calls = store.calls();
    let uploaded: u64 = calls.iter().filter(|c| c.0 == "create").map(|c| c.2).sum();
    let only = WriteStats { stored_bytes: uploaded, objects: 1, ..WriteStats::default() };
    assert_eq!(done.stats, only);
    assert!(uploaded < 4096, "{uploaded} bytes for nothing");
    assert!(calls.len() <= 10, "{calls:?}");
}

#[test]
fn an_incremental_run_is_one_pack_one_segment_one_manifest_and_stores_the_change() {
    let (store, repository) = memory();
    put_point(&repository, 1, &noise(1, 600 * C)).unwrap();
    let repository = open(store.clone()).unwrap();
    let base = repository.latest(GROUP).unwrap().unwrap();
    store.fail_at(None);
    let mut writer = repository.begin(Compression::Default).unwrap();
    let mut disk = writer.disk(600 * CHUNK, Some(&base.disks[0].root)).unwrap();
    for n in 0..10u64 {
        disk.write(n * 59 * CHUNK, Bytes::from(noise(100 + n, C))).unwrap();
    }
    // Written again as it was: nothing new.
    disk.write(595 * CHUNK, Bytes::copy_from_slice(&noise(1, 600 * C)[595 * C..])).unwrap();
    let root = disk.finish().unwrap();
    let done = writer.commit(manifest(2, vec![("disk0", root.clone())])).unwrap();
    assert_eq!(done.stats.new_bytes, 10 * CHUNK);
    assert_eq!(done.stats.read_bytes, 15 * CHUNK);
    assert_eq!(done.stats.objects, 3);
    let calls = store.calls();
    let creates: Vec<_> = calls.iter().filter(|c| c.0 == "create").collect();
    assert_eq!(creates.len(), 3, "{creates:?}");
    let uploaded: u64 = creates.iter().map(|c| c.2).sum();
    assert!(uploaded < 10 * CHUNK * 6 / 10, "{uploaded} bytes for ten chunks");
    assert_eq!(done.stats.stored_bytes, uploaded);
    assert_eq!(repository.point(done.point).unwrap().stats, done.stats);
    let stats = repository.stats().unwrap();
    assert_eq!((stats.points, stats.packs, stats.chunks), (2, 2, 610));
    assert_eq!(stats.logical_bytes, 1200 * CHUNK);
    let stored: u64 = store.objects().values().map(|o| o.len() as u64).sum();
    assert_eq!(stats.stored_bytes, stored);
}

#[test]
fn the_cost_of_a_change_is_the_same_whatever_the_disks_size() {
    let mut costs = Vec::new();
    for size in [10u64 << 30, 1 << 40, 10 << 40] {
        let store = Arc::new(MemoryStore::new());
        let repository = create(store.clone());
        let mut base = None;
        for n in 1..3 {
            store.fail_at(None);
            let mut writer = repository.begin(Compression::Default).unwrap();
            let mut disk = writer.disk(size, base.as_ref()).unwrap();
            for place in 0..8 {
                let at = size / 8 * place / CHUNK * CHUNK;
                disk.write(at, Bytes::from(noise(n * 10 + place, 2 * C))).unwrap();
            }
            let root = disk.finish().unwrap();
            writer.commit(manifest(n as u32, vec![("disk0", root.clone())])).unwrap();
            base = Some(root);
        }
        let calls = store.calls();
        let bytes: u64 = calls.iter().filter(|c| c.0 == "create").map(|c| c.2).sum();
        costs.push((calls.len(), bytes));
    }
    let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
    assert!(most.0 <= least.0 + 3, "{costs:?}");
    assert!(costs.iter().all(|c| c.1 <= costs[0].1 * 12 / 10), "{costs:?}");
}

#[test]
fn zeros_cost_nothing_and_equal_chunks_are_stored_once() {
    let (_, repository) = memory();
    let mut writer = repository.begin(Compression::Default).unwrap();
    let zeros = put_disk(&mut writer, &vec![0; 64 * C]).unwrap();
    assert_eq!(zeros.page, "0".repeat(32));
    assert_eq!(writer.stats().new_bytes, 0);
    let same: Vec<u8> = noise(3, C).repeat(64);
    put_disk(&mut writer, &same).unwrap();
    assert_eq!(writer.stats().new_bytes, CHUNK);
    // Zeros over a base are cut out again.
    let base = put_disk(&mut writer, &same).unwrap();
    let mut disk = writer.disk(64 * CHUNK, Some(&base)).unwrap();
    disk.write(0, Bytes::from(vec![0; 32 * C])).unwrap();
    disk.zero(32 * CHUNK..64 * CHUNK).unwrap();
    assert_eq!(disk.finish().unwrap(), zeros);
}

#[test]
fn misplaced_writes_are_refused_and_change_nothing() {
    let (_, repository) = memory();
    let mut writer = repository.begin(Compression::Default).unwrap();
    let mut disk = writer.disk(10 * CHUNK - 5, None).unwrap();
    disk.write(CHUNK, Bytes::from(noise(1, C))).unwrap();
    assert!(disk.write(CHUNK, Bytes::from(noise(2, C))).is_err(), "behind");
    assert!(disk.write(2 * CHUNK + 1, Bytes::from(noise(2, C))).is_err(), "not aligned");
    assert!(disk.write(3 * CHUNK, Bytes::from(noise(2, 100))).is_err(), "not whole");
    assert!(disk.write(9 * CHUNK, Bytes::from(noise(2, C))).is_err(), "past the end");
    assert!(disk.zero(u64::MAX - 1..u64::MAX).is_err());
    disk.write(9 * CHUNK, Bytes::from(noise(3, C - 5))).unwrap();
    let root = disk.finish().unwrap();
    writer.commit(manifest(1, vec![("disk0", root.clone())])).unwrap();
    let mut expected = vec![0; 10 * C - 5];
    expected[C..2 * C].copy_from_slice(&noise(1, C));
    expected[9 * C..].copy_from_slice(&noise(3, C - 5));
    assert!(read_disk(&repository, &root).unwrap() == expected);
    assert!(repository.begin(Compression::Fast).unwrap().disk(u64::MAX, None).is_err());
}
