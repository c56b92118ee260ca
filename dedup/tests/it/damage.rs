//! Damage to every kind of object: found, named, and never returned as data.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use tidemark_dedup::testing::MemoryStore;
use tidemark_dedup::{Compression, Manifest, RepoError, Repository, Result, scrub};

use crate::support::*;

const CHUNKS: usize = 70;

fn content() -> Vec<u8> {
    let mut content = noise(1, CHUNKS * C);
    content[20 * C..40 * C].fill(0);
    content
}

/// A repository of two restore points.
fn repository() -> (Arc<MemoryStore>, Manifest) {
    let store = Arc::new(MemoryStore::new());
    let repository = create(store.clone());
    repository.set_pack_target(700 << 10);
    put_point(&repository, 1, &noise(2, 30 * C)).unwrap();
    let point = put_point(&repository, 2, &content()).unwrap();
    (store, point)
}

/// What a reader sees: the content, or an error.
fn read(store: &Arc<MemoryStore>, point: &Manifest) -> Result<Vec<u8>> {
    let repository = open(store.clone())?;
    let manifest = repository.point(point.point)?;
    read_disk(&repository, &manifest.disks[0].root)
}

/// Whether a scrub without keys finds something, and whether everything else does.
fn found(store: &Arc<MemoryStore>) -> (bool, bool) {
    let never = AtomicBool::new(false);
    let scrubbed = !scrub(&**store, &|_, _| {}, &never).unwrap().damage.is_empty();
    let check = |repository: Repository| -> Result<bool> {
        let points = repository.points(None)?;
        let mut damage = points.len() < 2;
        for point in points {
            let report = repository.verify(point?.point, true, &|_, _| {}, &never)?;
            damage |= !report.damage.is_empty();
        }
        Ok(damage)
    };
    (scrubbed, open(store.clone()).and_then(check).unwrap_or(true))
}

fn kinds(store: &MemoryStore) -> Vec<String> {
    store.objects().into_keys().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn i7_a_flipped_bit_or_a_cut_in_any_object_is_found_and_never_read(
        which in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(),
        near_end in any::<bool>(),
        bit in 0u8..8,
        cut in prop::bool::weighted(0.3),
    ) {
        thread_local!(static MADE: (Arc<MemoryStore>, Manifest) = repository());
        let (store, point) = MADE.with(|made| made.clone());
        let before = store.objects();
        let keys = kinds(&store);
        let key = which.get(&keys);
        let mut bytes = before[key].to_vec();
        // Heads and ends are small: look at them as often as at the bulk.
        let at = match near_end {
            true => bytes.len() - 1 - place.index(bytes.len().min(120)),
            false => place.index(bytes.len()),
        };
        if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << bit }
        store.replace(key, bytes);
        let (scrubbed, verified) = found(&store);
        let seen = read(&store, &point);
        store.restore(before.clone());
        prop_assert!(scrubbed, "{key} byte {at}: not found by a scrub");
        // The hash at a pack's end and its count of frames are for the scrub alone.
        let pack_end = key.starts_with("packs/") && !cut && before[key].len() - at <= 36;
        prop_assert!(verified || pack_end, "{key} byte {at}: not found by verification");
        if let Ok(seen) = seen {
            prop_assert!(seen == content(), "{key} byte {at}: wrong data");
        }
    }

    #[test]
    fn objects_made_by_someone_without_a_key_are_refused_calmly(
        which in any::<prop::sample::Index>(),
        keep in 0usize..120,
        mut junk in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        thread_local!(static MADE: (Arc<MemoryStore>, Manifest) = repository());
        let (store, point) = MADE.with(|made| made.clone());
        let before = store.objects();
        let keys = kinds(&store);
        let key = which.get(&keys);
        // A true beginning, junk, and a hash that fits: all that can be forged.
        let mut forged = before[key][..keep.min(before[key].len())].to_vec();
        forged.append(&mut junk);
        let hash = blake3::hash(&forged);
        forged.extend_from_slice(hash.as_bytes());
        store.replace(key, forged);
        let (_, verified) = found(&store);
        let seen = read(&store, &point);
        store.restore(before.clone());
        prop_assert!(verified, "{key}");
        if let Ok(seen) = seen {
            prop_assert!(seen == content(), "{key}: wrong data");
        }
    }
}

#[test]
fn i7_a_missing_or_swapped_object_is_found() {
    let (store, point) = repository();
    let before = store.objects();
    for key in kinds(&store) {
        store.remove(&key);
        let verified = found(&store).1;
        // Segments are redundant, and so is a key's absence told apart from damage.
        assert!(verified || key.starts_with("index/"), "{key} is missing and no one noticed");
        if let Ok(seen) = read(&store, &point) {
            assert!(seen == content(), "{key}");
        }
        store.restore(before.clone());
    }
    for prefix in ["packs/", "points/", "index/"] {
        let same: Vec<_> = before.iter().filter(|(key, _)| key.starts_with(prefix)).collect();
        store.replace(same[0].0, same[1].1.to_vec());
        assert!(found(&store).1, "{prefix}: one in another's place");
        store.restore(before.clone());
    }
}

#[test]
fn damage_names_the_pack_the_disk_and_the_place() {
    let (store, point) = repository();
    let repository = open(store.clone()).unwrap();
    // The frame that holds chunk 45 lies in one of the point's packs; break all of them in turn.
    let before = store.objects();
    let mut named = 0;
    for pack in kinds(&store).into_iter().filter(|key| key.starts_with("packs/")) {
        let mut bytes = before[&pack].to_vec();
        bytes[5000] ^= 1;
        store.replace(&pack, bytes);
        let never = AtomicBool::new(false);
        let report = repository.verify(point.point, true, &|_, _| {}, &never).unwrap();
        for line in &report.damage {
            assert!(line.contains(&pack), "{line}");
            named += u32::from(line.starts_with("disk disk0, bytes "));
        }
        store.restore(before.clone());
    }
    assert!(named > 0);
    let never = AtomicBool::new(false);
    let report = repository.verify(point.point, true, &|_, _| {}, &never).unwrap();
    assert_eq!((report.chunks, report.damage.len()), (50, 0));
    let report = repository.verify(point.point, false, &|_, _| {}, &never).unwrap();
    assert_eq!((report.chunks, report.damage.len()), (50, 0));
    let gone = kinds(&store).into_iter().find(|key| key.starts_with("packs/")).unwrap();
    store.remove(&gone);
    let first = repository.points(None).unwrap().remove(0).unwrap();
    let all: Vec<_> = [first.point, point.point]
        .into_iter()
        .flat_map(|p| repository.verify(p, false, &|_, _| {}, &never).unwrap().damage)
        .collect();
    assert!(all.iter().any(|line| line.contains("the pack is missing")), "{all:?}");
}

#[test]
fn a_damaged_manifest_hides_no_other_and_latest_takes_the_one_before() {
    let (store, _) = repository();
    let repository = open(store.clone()).unwrap();
    let newest = kinds(&store).into_iter().rfind(|key| key.starts_with("points/")).unwrap();
    let mut bytes = store.objects()[&newest].to_vec();
    bytes[100] ^= 1;
    store.replace(&newest, bytes);
    let points = repository.points(None).unwrap();
    assert!(points[0].is_ok());
    assert!(matches!(&points[1], Err(RepoError::Damaged { key, .. }) if *key == newest));
    assert_eq!(repository.latest(GROUP).unwrap().unwrap().facts["n"], 1);
}

#[test]
fn without_index_segments_everything_is_found_through_the_packs() {
    let (store, point) = repository();
    for key in kinds(&store).into_iter().filter(|key| key.starts_with("index/")) {
        store.remove(&key);
    }
    assert!(read(&store, &point).unwrap() == content());
    let never = AtomicBool::new(false);
    let report = open(store).unwrap().verify(point.point, false, &|_, _| {}, &never).unwrap();
    assert_eq!(report.damage, Vec::<String>::new());
}

#[test]
fn lost_index_segments_are_written_anew_by_the_next_run() {
    let (store, point) = repository();
    let lost: Vec<_> = kinds(&store).into_iter().filter(|k| k.starts_with("index/")).collect();
    store.remove(&lost[0]);
    store.replace(&lost[1], vec![7; 200]);
    let repository = open(store.clone()).unwrap();
    let base = &repository.point(point.point).unwrap().disks[0].root;
    let mut writer = repository.begin(Compression::Fast).unwrap();
    let root = writer.disk(content().len() as u64, Some(base)).unwrap().finish().unwrap();
    assert_eq!(root, *base);
    writer.commit(manifest(3, vec![("disk0", root.clone())])).unwrap();
    store.remove(&lost[1]);
    store.fail_at(None);
    let other = open(store.clone()).unwrap();
    let searched = |c: &(&str, String, u64)| c.0 == "list" && c.1 == "packs/";
    assert!(!store.calls().iter().any(searched), "{:?}", store.calls());
    assert!(read_disk(&other, &root).unwrap() == content());
    assert!(!store.calls().iter().any(searched));
}

#[test]
fn a_chunk_that_is_stored_twice_survives_the_loss_of_one_pack() {
    let store = Arc::new(MemoryStore::new());
    let one = create(store.clone());
    let two = open(store.clone()).unwrap();
    // Both begin before either has stored anything.
    let mut first = one.begin(Compression::Fast).unwrap();
    let mut second = two.begin(Compression::Fast).unwrap();
    let data = noise(4, 20 * C);
    let root = put_disk(&mut first, &data).unwrap();
    assert_eq!(put_disk(&mut second, &data).unwrap(), root);
    first.commit(manifest(1, vec![("disk0", root.clone())])).unwrap();
    second.commit(manifest(2, vec![("disk0", root.clone())])).unwrap();
    let packs: Vec<_> = kinds(&store).into_iter().filter(|k| k.starts_with("packs/")).collect();
    assert_eq!(packs.len(), 2);
    for pack in packs {
        let before = store.objects();
        store.replace(&pack, vec![0; before[&pack].len()]);
        assert!(read_disk(&open(store.clone()).unwrap(), &root).unwrap() == data);
        store.restore(before);
    }
}
