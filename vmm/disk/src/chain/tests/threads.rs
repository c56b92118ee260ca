//! Guests on several threads while leaves are switched and merged under them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::world::{MIB, Rng, assert_superset, folder, merge, options, read_all};
use crate::block::Block;
use crate::chain::{Chain, delete_disk_files};
use crate::vhdx::Access;

const SIZE: u64 = 12 * MIB;
const WRITERS: u64 = 3;
/// Sectors in a run that belong to one writer; its neighbours belong to others.
const RUN: u64 = 8;

/// Every sector carries its writer's latest stamp, and its own number.
fn stamp(sector: u64, sequence: u64) -> [u8; 512] {
    let mut out = [0; 512];
    if sequence > 0 {
        for pair in out.chunks_exact_mut(16) {
            pair[..8].copy_from_slice(&sector.to_le_bytes());
            pair[8..].copy_from_slice(&sequence.to_le_bytes());
        }
    }
    out
}

/// Writes, zeroes and reads back the runs of one writer; returns what each of its sectors holds.
fn guest(chain: &Chain, writer: u64, stop: &AtomicBool, writes: &AtomicU64) -> Vec<u64> {
    let mut rng = Rng::new(writer + 900);
    let mut latest = vec![0; (SIZE / 512) as usize];
    let runs = SIZE / 512 / RUN / WRITERS;
    let mut sequence = 0;
    while !stop.load(Ordering::Relaxed) {
        sequence += 1;
        let run = rng.below(runs) * WRITERS + writer;
        let first = run * RUN + rng.below(RUN);
        let count = 1 + rng.below((run + 1) * RUN - first);
        let part = first as usize..(first + count) as usize;
        match rng.below(10) {
            0 => {
                chain.discard(first * 512, count * 512).unwrap();
                latest[part].fill(0);
            }
            1 | 2 => check(chain, first, &latest[part]),
            _ => {
                let data: Vec<u8> =
                    (first..first + count).flat_map(|s| stamp(s, sequence)).collect();
                chain.write_at(first * 512, &data).unwrap();
                latest[part].fill(sequence);
                writes.fetch_add(1, Ordering::Relaxed);
            }
        }
        if rng.below(200) == 0 {
            chain.flush().unwrap();
        }
    }
    latest
}

fn check(chain: &Chain, first: u64, latest: &[u64]) {
    let mut buf = vec![0; latest.len() * 512];
    chain.read_at(first * 512, &mut buf).unwrap();
    for (i, (found, sequence)) in buf.chunks(512).zip(latest).enumerate() {
        let sector = first + i as u64;
        assert_eq!(found, stamp(sector, *sequence), "sector {sector}, last written {sequence}");
    }
}

/// Checkpoints and merges, over and over; returns the longest pause.
fn churn(chain: &Chain, folder: &std::path::Path, rounds: u32) -> Duration {
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let new = folder.join(format!("disk_{round}.avhdx"));
        chain.prepare_leaf(&new).unwrap();
        chain.preflush().unwrap();
        let start = Instant::now();
        let pause = chain.pause();
        let id = chain.switch_leaf(&pause, &new).unwrap();
        drop(pause);
        longest = longest.max(start.elapsed());
        chain.settle().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert!(!chain.changed_since(&id).unwrap().is_empty());
        // Every third round leaves its file for a merge further down in the next one.
        if round % 3 != 0 {
            let files = chain.files();
            let child = if round % 3 == 1 { &files[1] } else { files.last().unwrap() };
            merge(chain, child);
            delete_disk_files(child).unwrap();
        }
    }
    longest
}

#[test]
fn i6_guests_notice_neither_switches_nor_merges() {
    let folder = folder();
    let base = folder.path().join("disk.vhdx");
    Chain::create(&base, &options(SIZE, 4 << 20)).unwrap();
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let latest = std::thread::scope(|scope| {
        let (chain, stop, writes) = (&chain, &stop, &writes);
        let guests: Vec<_> =
            (0..WRITERS).map(|w| scope.spawn(move || guest(chain, w, stop, writes))).collect();
        let churned = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            churn(chain, folder.path(), 9)
        }));
        stop.store(true, Ordering::Relaxed);
        let images: Vec<_> = guests.into_iter().map(|g| g.join().unwrap()).collect();
        eprintln!("longest pause {:?}, {writes:?} writes", churned.unwrap());
        images
    });
    let mut all = vec![0; (SIZE / 512) as usize];
    for (sector, slot) in all.iter_mut().enumerate() {
        *slot = latest[(sector as u64 / RUN % WRITERS) as usize][sector];
    }
    check(&chain, 0, &all);
    while let [_, child, ..] = &chain.files()[..] {
        merge(&chain, child);
        delete_disk_files(child).unwrap();
    }
    check(&chain, 0, &all);
    chain.close().unwrap();
    check(&Chain::open(&base, Access::ReadOnly).unwrap(), 0, &all);
}

#[test]
fn i3_changed_since_holds_for_a_merge_under_writes() {
    let folder = folder();
    let base = folder.path().join("disk.vhdx");
    Chain::create(&base, &options(SIZE, 1 << 20)).unwrap();
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let moments = std::thread::scope(|scope| {
        let (chain, stop, writes) = (&chain, &stop, &writes);
        for writer in 0..WRITERS {
            scope.spawn(move || guest(chain, writer, stop, writes));
        }
        let mut moments = Vec::new();
        for round in 0..4 {
            std::thread::sleep(Duration::from_millis(40));
            let new = folder.path().join(format!("disk_{round}.avhdx"));
            chain.prepare_leaf(&new).unwrap();
            let pause = chain.pause();
            let id = chain.switch_leaf(&pause, &new).unwrap();
            drop(pause);
            chain.settle().unwrap();
            let frozen = chain.files().into_iter().rev().nth(1).unwrap();
            let then = read_all(&Chain::open(&frozen, Access::ReadOnly).unwrap());
            moments.push((id, then));
            if round % 2 == 1 {
                merge(chain, &new);
                delete_disk_files(&new).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        moments
    });
    let compare = || {
        let now = read_all(&chain);
        for (id, then) in &moments {
            assert_superset(&chain.changed_since(id).unwrap(), then, &now);
        }
    };
    compare();
    while let [_, child, ..] = &chain.files()[..] {
        merge(&chain, child);
        delete_disk_files(child).unwrap();
        compare();
    }
}

/// Figures for people: how long guests are held back. Run it alone, in the release profile.
#[test]
#[ignore = "measures"]
fn pause_of_a_switch_under_full_write_load() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("disk.vhdx");
    Chain::create(&base, &options(1 << 30, 32 << 20)).unwrap();
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    let stop = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let (mut drains, mut pauses, mut merges) = (Vec::new(), Vec::new(), Vec::new());
    let slowest = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (chain, stop, written, slowest) = (&chain, &stop, &written, &slowest);
            scope.spawn(move || {
                let (mut rng, data) = (Rng::new(seed), vec![seed as u8 + 1; 65_536]);
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    chain.write_at(rng.below((1 << 30) / 65_536) * 65_536, &data).unwrap();
                    slowest.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..100 {
            let new = folder.path().join(format!("disk_{round}.avhdx"));
            chain.prepare_leaf(&new).unwrap();
            chain.preflush().unwrap();
            let start = Instant::now();
            let pause = chain.pause();
            drains.push(start.elapsed());
            chain.switch_leaf(&pause, &new).unwrap();
            drop(pause);
            pauses.push(start.elapsed());
            chain.settle().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            let start = Instant::now();
            merge(&chain, &new);
            merges.push(start.elapsed());
            delete_disk_files(&new).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    for times in [&mut drains, &mut pauses, &mut merges] {
        times.sort();
    }
    eprintln!(
        "pause: median {:?}, p99 {:?}, of it drain {:?}, {:?}; merge: median {:?}, longest {:?}; {written:?} writes of 64 KiB, \
         slowest {slowest:?} us",
        pauses[50], pauses[98], drains[50], drains[98], merges[50], merges[99]
    );
}

/// A guest's sync may take long; the pause of a checkpoint must not wait for it. What was acknowledged
/// before is durable when the sync returns, wherever the chain has gone meanwhile.
#[test]
fn a_pause_does_not_wait_for_a_flush() {
    let folder = folder();
    let (base, leaf) = (folder.path().join("disk.vhdx"), folder.path().join("disk_1.avhdx"));
    Chain::create(&base, &options(SIZE, 1 << 20)).unwrap();
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    chain.write_at(0, &[1; 4096]).unwrap();
    chain.prepare_leaf(&leaf).unwrap();
    let (began, wait_for_begin) = std::sync::mpsc::channel();
    let (go_on, wait_for_end) = std::sync::mpsc::channel();
    let ends = parking_lot::Mutex::new(wait_for_end);
    chain.flushing.set(move |_, _| {
        began.send(()).unwrap();
        ends.lock().recv().unwrap();
        Ok(())
    });
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| chain.flush());
        wait_for_begin.recv().unwrap();
        let id = chain.switch_leaf(&chain.pause(), &leaf).unwrap();
        chain.write_at(4096, &[2; 4096]).unwrap();
        chain.settle().unwrap();
        go_on.send(()).unwrap();
        flush.join().unwrap().unwrap();
        assert_eq!(chain.changed_since(&id).unwrap().len(), 1);
    });
    chain.flushing.clear();
    chain.close().unwrap();
}
