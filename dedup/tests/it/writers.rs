//! Several writers of one repository, and several openers of one cache.

use std::sync::Arc;

use tidemark_dedup::testing::MemoryStore;
use tidemark_dedup::{
    Compression, OpenOptions, RepoError, Repository, StoreCredentials, open_store,
};

use crate::support::*;

#[test]
fn many_writers_at_once_all_commit_and_all_read_back() {
    let store = Arc::new(MemoryStore::new());
    create(store.clone());
    std::thread::scope(|scope| {
        for n in 0..6u32 {
            let store = store.clone();
            scope.spawn(move || {
                let repository = open(store).unwrap();
                repository.set_pack_target(400 << 10);
                for round in 0..3 {
                    // Half is common to all writers, half is each one's own.
                    let mut data = noise(1, 30 * C);
                    data.extend(noise(100 + u64::from(n * 3 + round), 30 * C));
                    put_point(&repository, n * 3 + round, &data).unwrap();
                }
            });
        }
    });
    let repository = open(store).unwrap();
    let points = repository.points(Some(GROUP)).unwrap();
    assert_eq!(points.len(), 18);
    for point in points {
        let point = point.unwrap();
        let n = point.facts["n"].as_u64().unwrap();
        let mut data = noise(1, 30 * C);
        data.extend(noise(100 + n, 30 * C));
        assert!(read_disk(&repository, &point.disks[0].root).unwrap() == data);
    }
}

#[test]
fn of_two_creators_at_once_one_wins_and_the_other_is_told() {
    for _ in 0..20 {
        let store = Arc::new(MemoryStore::new());
        let results: Vec<_> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..4)
                .map(|_| {
                    let store = store.clone();
                    scope.spawn(move || try_create(store))
                })
                .collect();
            handles.into_iter().map(|h| h.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
        let told = |r: &_| matches!(r, Err(RepoError::AlreadyExists { .. }));
        assert_eq!(results.iter().filter(|r| told(r)).count(), 3);
        let winner = results.into_iter().find_map(Result::ok).unwrap();
        assert_eq!(open(store.clone()).unwrap().id(), winner.id());
        put_point(&winner, 1, &noise(1, C)).unwrap();
    }
}

#[test]
fn an_open_repository_reads_what_others_wrote_later() {
    let (store, early) = memory();
    let late = open(store.clone()).unwrap();
    let data = noise(9, 80 * C);
    let point = put_point(&late, 1, &data).unwrap();
    let found = early.point(point.point).unwrap();
    assert!(read_disk(&early, &found.disks[0].root).unwrap() == data);
    // And does not store again what is there.
    store.fail_at(None);
    let mut writer = early.begin(Compression::Fast).unwrap();
    put_disk(&mut writer, &data).unwrap();
    assert_eq!(writer.stats().new_bytes, 0);
}

#[test]
fn the_index_cache_spares_reads_and_can_be_damaged_or_deleted_at_any_time() {
    let (store, _) = {
        let (store, repository) = memory();
        for n in 0..4 {
            put_point(&repository, n, &noise(u64::from(n), 20 * C)).unwrap();
        }
        (store, repository)
    };
    let dir = tempfile::tempdir().unwrap();
    let options = OpenOptions { cache_dir: Some(dir.path().join("cache")) };
    let segment_reads = |store: &MemoryStore| {
        let calls = store.calls();
        calls.iter().filter(|c| c.0 == "get" && c.1.starts_with("index/")).count()
    };
    let open = |expected: usize| {
        store.fail_at(None);
        let repository = Repository::open(store.clone(), &passphrase(), &options).unwrap();
        assert_eq!(segment_reads(&store), expected);
        for point in repository.points(None).unwrap() {
            let root = &point.unwrap().disks[0].root;
            read_disk(&repository, root).unwrap();
        }
        repository
    };
    open(4);
    let repository = open(0);
    // A writer keeps its own segment.
    put_point(&repository, 9, &noise(9, 20 * C)).unwrap();
    open(0);
    let files: Vec<_> =
        std::fs::read_dir(dir.path().join("cache").join(repository.id().to_string()))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
    assert_eq!(files.len(), 5);
    let mut bytes = std::fs::read(&files[0]).unwrap();
    bytes[95] ^= 1;
    std::fs::write(&files[0], bytes).unwrap();
    std::fs::write(&files[1], b"").unwrap();
    std::fs::copy(&files[2], &files[3]).unwrap();
    open(3);
    open(0);
    std::fs::remove_dir_all(dir.path()).unwrap();
    open(5);
}

#[test]
fn a_folder_is_a_repository_that_can_be_moved() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("here");
    let store = open_store(here.to_str().unwrap(), &StoreCredentials::default()).unwrap();
    let repository = create(store);
    let data = noise(3, 100 * C + 5);
    let point = put_point(&repository, 1, &data).unwrap();
    let there = dir.path().join("there");
    std::fs::rename(&here, &there).unwrap();
    assert!(matches!(repository.points(None), Err(RepoError::NoSuchStore { .. })));
    let url = format!("file://{}", there.display());
    let moved = open(open_store(&url, &StoreCredentials::default()).unwrap()).unwrap();
    let found = moved.point(point.point).unwrap();
    assert!(read_disk(&moved, &found.disks[0].root).unwrap() == data);
}
