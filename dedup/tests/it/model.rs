//! Disks in the repository against plain vectors of bytes.

use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use proptest::prelude::*;
use tidemark_dedup::{CHUNK, Compression, DiskRoot};

use crate::support::*;

#[derive(Debug, Clone)]
enum Change {
    /// Chunk, number of chunks, seed; seed 0 writes zeros as data.
    Write(u64, u64, u64),
    Zero(u64, u64),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0u64..150, 1u64..20, 0u64..6).prop_map(|(at, n, seed)| Change::Write(at, n, seed)),
        1 => (0u64..150, 1u64..60).prop_map(|(at, n)| Change::Zero(at, n)),
    ]
}

/// Size of a disk in bytes, often not whole chunks, and what changes.
fn step() -> impl Strategy<Value = (u64, Vec<Change>)> {
    (1u64..160, prop_oneof![Just(0u64), 1u64..CHUNK], prop::collection::vec(change(), 0..6))
        .prop_map(|(chunks, tail, changes)| (chunks * CHUNK - tail, changes))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_restore_point_of_a_chain_reads_back_bit_for_bit(
        steps in prop::collection::vec(step(), 1..5)
    ) {
        let (store, repository) = memory();
        let mut model: Vec<u8> = Vec::new();
        let mut points: Vec<(DiskRoot, Vec<u8>)> = Vec::new();
        for (n, (size, mut changes)) in steps.into_iter().enumerate() {
            model.resize(size as usize, 0);
            let mut writer = repository.begin(Compression::Fast).unwrap();
            let base = points.last().map(|(root, _)| root);
            let mut disk = writer.disk(size, base).unwrap();
            changes.sort_by_key(|c| match c { Change::Write(at, ..) | Change::Zero(at, _) => *at });
            let mut next = 0;
            for change in changes {
                let (at, count, seed) = match change {
                    Change::Write(at, count, seed) => (at, count, Some(seed)),
                    Change::Zero(at, count) => (at, count, None),
                };
                let start = at.max(next) * CHUNK;
                let end = ((at.max(next) + count) * CHUNK).min(size);
                if start >= end { continue }
                next = end.div_ceil(CHUNK);
                let len = (end - start) as usize;
                let data = match seed {
                    None | Some(0) => vec![0; len],
                    // The same few contents again and again, so that chunks are shared.
                    Some(seed) => (0..len.div_ceil(C)).flat_map(|_| noise(seed, C)).take(len).collect(),
                };
                model[start as usize..end as usize].copy_from_slice(&data);
                match seed {
                    None => disk.zero(start..end).unwrap(),
                    Some(_) => disk.write(start, Bytes::from(data)).unwrap(),
                }
            }
            let root = disk.finish().unwrap();
            writer.commit(manifest(n as u32, vec![("disk0", root.clone())])).unwrap();
            points.push((root, model.clone()));
        }
        // Read by another host, which has nothing but the store.
        let other = open(store).unwrap();
        for (n, (root, content)) in points.iter().enumerate() {
            let found = other.points(Some(GROUP)).unwrap().remove(n).unwrap();
            prop_assert_eq!(&found.disks[0].root, root);
            prop_assert!(read_disk(&other, root).unwrap() == *content);
            let reader = other.open_disk(root).unwrap();
            let ranges = reader.data_ranges(0..reader.size()).unwrap();
            let mut in_data = vec![false; content.len()];
            ranges.iter().for_each(|r| in_data[r.start as usize..r.end as usize].fill(true));
            prop_assert!(content.iter().zip(&in_data).all(|(byte, data)| *data || *byte == 0));
            // The same content has the same map, however it came about.
            let mut writer = other.begin(Compression::Fast).unwrap();
            let again = put_disk(&mut writer, content).unwrap();
            prop_assert_eq!(&again, root);
            let odd = content.len() / 3;
            let mut part = vec![1; (content.len() - odd).min(3 * C + 17)];
            reader.read_at(odd as u64, &mut part).unwrap();
            prop_assert!(part[..] == content[odd..odd + part.len()]);
        }
        let last = points.len() as u128 - 1;
        let report = other
            .verify(uuid::Uuid::from_u128(0x100 + last), true, &|_, _| {}, &AtomicBool::new(false))
            .unwrap();
        prop_assert_eq!(report.damage, Vec::<String>::new());
    }
}

#[test]
fn chunks_and_maps_larger_than_one_frame_and_one_window_read_back() {
    let (store, repository) = memory();
    let mut content = noise(7, 90 << 20);
    content[30 << 20..50 << 20].fill(0);
    let point = put_point(&repository, 1, &content).unwrap();
    let other = open(store).unwrap();
    let root = &other.point(point.point).unwrap().disks[0].root;
    assert!(read_disk(&other, root).unwrap() == content);
}

#[test]
fn a_disk_that_was_cut_reads_zeros_there_when_it_grows_again() {
    let (_, repository) = memory();
    let mut content = noise(3, 66 * C);
    let mut base = put_point(&repository, 1, &content).unwrap().disks[0].root.clone();
    // Cut within a chunk of the second leaf, then within the first, then grown past both.
    for (n, size) in [(2, 65 * C - 1), (3, 10 * C + 7), (4, 70 * C + 1)] {
        content.resize(size, 0);
        let mut writer = repository.begin(Compression::Fast).unwrap();
        base = writer.disk(size as u64, Some(&base)).unwrap().finish().unwrap();
        writer.commit(manifest(n, vec![("disk0", base.clone())])).unwrap();
        assert!(read_disk(&repository, &base).unwrap() == content, "at {size}");
    }
    let data = repository.open_disk(&base).unwrap().data_ranges(0..70 * CHUNK).unwrap();
    assert_eq!((data.len(), data[0].clone()), (1, 0..11 * CHUNK));
}
