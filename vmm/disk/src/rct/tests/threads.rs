//! Many writers against flushes: the log of what really happened is then crashed like a single-
//! threaded one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use super::crash::{explore_end, explore_some};
use super::recorder::Name;
use super::scenario::{Life, Mutant, Sealed};
use super::{GRANULES, Random, identity};
use crate::GRANULE;
use crate::rct::Tracker;
use crate::rct::rules::{Rule, Rules};

const WRITERS: u64 = 4;
const WRITES: u64 = 60;

/// Writers over few regions, a flusher that never rests, and a sealer that drains like a pause.
fn race(seed: u64, rules: Rules, flush: bool) -> Life {
    let mut life = Life::record(seed, 0, 1, Mutant::None, false).unwrap();
    let world = life.world.clone();
    let next = Random(seed).uuid();
    let (tracker, _) = Tracker::open_in(&world, &identity(world.guid()), next, 1, rules).unwrap();
    world.set_guid(next);
    world.race();
    let (paused, running) = (RwLock::new(()), AtomicBool::new(true));
    let value = AtomicU64::new(1);
    let sealed = &mut life.sealed;
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (tracker, world, paused, value) = (&tracker, &world, &paused, &value);
                scope.spawn(move || {
                    let mut random = Random(seed ^ (writer << 32));
                    for _ in 0..WRITES {
                        let granule = random.below(8) * (GRANULES / 8) + random.below(3);
                        let _io = paused.read();
                        let guard = tracker.before_write(granule * GRANULE, GRANULE).unwrap();
                        world.write_granule(granule, value.fetch_add(1, Ordering::Relaxed));
                        drop(guard);
                    }
                })
            })
            .collect();
        let (tracker, world, paused, running) = (&tracker, &world, &paused, &running);
        scope.spawn(move || {
            while flush && running.load(Ordering::Relaxed) {
                tracker.flush_map().unwrap();
                std::thread::yield_now();
            }
        });
        for _ in 0..3 {
            std::thread::yield_now();
            let _drained = paused.write();
            world.sync(Name::Disk).unwrap();
            let (content, epoch) = (world.content(), tracker.epoch());
            let id = tracker.seal().unwrap();
            sealed.push(Sealed { epoch, id: Some(id), content, at: world.len() });
        }
        writers.into_iter().for_each(|w| w.join().unwrap());
        let _last = tracker.before_write(0, GRANULE).unwrap();
        world.write_granule(0, u64::MAX);
        running.store(false, Ordering::Relaxed);
    });
    life
}

#[test]
fn i3_holds_with_many_writers_and_a_restless_flusher() {
    for seed in 300..308 {
        let life = race(seed, Rules::default(), true);
        explore_some(&life, seed, 40).unwrap();
    }
}

#[test]
fn the_race_sees_a_missing_sync() {
    // Without flushes the missing sync is never made up for, however the threads run.
    let broken = Rules { broken: Some(Rule::BitBeforeWrite) };
    assert!(explore_end(&race(300, broken, false), 300).is_err());
}

#[test]
fn first_touches_share_their_syncs() {
    use std::sync::Barrier;
    let life = Life::record(1, 0, 1, Mutant::None, false).unwrap();
    let world = &life.world;
    let next = Random(5).uuid();
    let (tracker, _) =
        Tracker::open_in(world, &identity(world.guid()), next, 1, Rules::default()).unwrap();
    world.race();
    let (before, barrier) = (world.syncs(Name::Mrt), Barrier::new(8));
    std::thread::scope(|scope| {
        for region in 0..8 {
            let (tracker, barrier) = (&tracker, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..50 {
                    tracker.before_write(region * (16 << 20) + round * GRANULE, 512).unwrap();
                }
            });
        }
    });
    let syncs = world.syncs(Name::Mrt) - before;
    assert!((1..=8).contains(&syncs), "{syncs} syncs for 8 regions and 400 writes");
}
