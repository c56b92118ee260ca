//! Invariant I3 in every state that a crash can leave, and the proof that the test would see each
//! ordering rule broken.

use super::recorder::{Fate, Name, World};
use super::scenario::{Life, Mutant, Sealed};
use super::{GRANULES, Random, SIZE, flags, identity};
use crate::rct::rules::{Rule, Rules};
use crate::rct::{Continuity, Tracker};

/// Checks every id that `tracker` answers for against the disk's content, and that every id sealed
/// before `at` is among them.
fn check_ids(life: &Life, tracker: &Tracker, after: &World, at: usize) -> Result<(), String> {
    let content = after.content();
    let table = tracker.sealed_ids();
    for sealed in &life.sealed {
        let known = match &sealed.id {
            Some(id) => tracker.knows(id),
            // In the table under this epoch stands either a later seal or this one.
            None => table.iter().any(|id| {
                id.epoch == sealed.epoch && life.sealed.iter().all(|s| s.id.as_ref() != Some(id))
            }),
        };
        if !known && sealed.id.is_some() && sealed.at <= at {
            return Err(format!("the id of epoch {} is forgotten", sealed.epoch));
        }
        if known {
            check_superset(sealed, &content, tracker)?;
        }
    }
    Ok(())
}

fn check_superset(sealed: &Sealed, content: &[u64], tracker: &Tracker) -> Result<(), String> {
    let epoch = sealed.epoch;
    let changed = flags(&tracker.changed_after(epoch, 0..SIZE).unwrap(), GRANULES);
    let missed = (0..GRANULES as usize).find(|&g| content[g] != sealed.content[g] && !changed[g]);
    missed.map_or(Ok(()), |granule| {
        Err(format!("granule {granule} differs since epoch {epoch} and is not reported"))
    })
}

/// Opens a crashed state in both ways and checks; then crashes the recovery itself.
fn check_state(
    life: &Life,
    state: &World,
    at: usize,
    rules: Rules,
    nested: Option<&mut Random>,
) -> Result<(), String> {
    let read_only = match Tracker::open_read_only_in(state, &identity(state.guid())) {
        Ok(tracker) => tracker,
        // A failed sync followed by a crash may cost the ids, if that is said.
        Err(_) if life.faulty() => return Ok(()),
        Err(e) => return Err(e.to_string()),
    };
    check_ids(life, &read_only, state, at)?;
    let mut next = Random(at as u64);
    let opened = Tracker::open_in(state, &identity(state.guid()), next.uuid(), 1, rules);
    let (tracker, continuity) = opened.map_err(|e| e.to_string())?;
    if continuity != Continuity::Kept {
        return Err(format!("{continuity:?}"));
    }
    check_ids(life, &tracker, state, at).map_err(|e| format!("open for writing: {e}"))?;
    drop(tracker);
    if let Some(random) = nested {
        for inner_at in 0..=state.len() {
            let open = state.unsynced(inner_at);
            let again = state.crash(inner_at, &open, &mut |_, _| Fate::random(random));
            check_state(life, &again, at, rules, None)
                .map_err(|e| format!("second crash in recovery at {inner_at}: {e}"))?;
        }
    }
    Ok(())
}

fn rules(mutant: Mutant) -> Rules {
    match mutant {
        Mutant::Rule(rule) => Rules { broken: Some(rule) },
        _ => Rules::default(),
    }
}

/// Crashes a life at about `points` of its operations.
pub(super) fn explore_some(life: &Life, seed: u64, points: usize) -> Result<u64, String> {
    let step = ((life.world.len() - life.born) / points).max(1);
    explore(life, seed, Mutant::None, 2, (life.born..=life.world.len()).step_by(step))
}

/// Crashes a life at its end.
pub(super) fn explore_end(life: &Life, seed: u64) -> Result<u64, String> {
    explore(life, seed, Mutant::None, 2, [life.world.len()])
}

/// Crashes a life at `points`, with the extreme fates and `samples` random ones.
fn explore(
    life: &Life,
    seed: u64,
    mutant: Mutant,
    samples: u64,
    points: impl IntoIterator<Item = usize>,
) -> Result<u64, String> {
    let mut random = Random(!seed);
    let mut states = 0;
    for at in points {
        let open = life.world.unsynced(at);
        for sample in 0..samples + 4 {
            let state = life.world.crash(at, &open, &mut |_, file| match sample {
                0 => Fate::Lost,
                1 => Fate::Whole,
                // The worst case: data arrived, tracking did not.
                2 if file == Name::Disk => Fate::Whole,
                2 => Fate::Lost,
                3 if file == Name::Mrt => Fate::Whole,
                3 => Fate::Lost,
                _ => Fate::random(&mut random),
            });
            let mut nested = Random(random.next());
            let deep = (at as u64 + sample).is_multiple_of(41).then_some(&mut nested);
            check_state(life, &state, at, rules(mutant), deep).map_err(|e| {
                let last = life.world.describe(at.saturating_sub(1));
                format!("seed {seed}, crash after operation {at} ({last}), fate {sample}: {e}")
            })?;
            states += 1;
        }
    }
    Ok(states)
}

/// Kills the process at every `step`th operation, lets a new one recover on what the page cache
/// holds, and cuts the power meanwhile.
fn kill_then_cut(life: &Life, seed: u64, mutant: Mutant, step: usize) -> Result<(), String> {
    let mut random = Random(seed);
    for at in (life.born..=life.world.len()).step_by(step) {
        let killed = life.world.killed(at);
        // What opens a disk for writing makes its headers durable first.
        killed.sync(Name::Disk).unwrap();
        let found = identity(killed.guid());
        Tracker::open_in(&killed, &found, random.uuid(), 1, rules(mutant))
            .map_err(|e| e.to_string())?;
        for cut in at..=killed.len() {
            let open = killed.unsynced(cut);
            for sample in 0..3 {
                let state = killed.crash(cut, &open, &mut |_, file| match sample {
                    0 if file == Name::Rct => Fate::Lost,
                    0 => Fate::Whole,
                    _ => Fate::random(&mut random),
                });
                check_state(life, &state, at, rules(mutant), None)
                    .map_err(|e| format!("seed {seed}, kill at {at}, cut at {cut}: {e}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn i3_changed_since_survives_a_power_cut_during_recovery_from_a_kill() {
    for seed in 400..408 {
        let life = Life::record(seed, 3, 24, Mutant::None, false).unwrap();
        kill_then_cut(&life, seed, Mutant::None, 3).unwrap();
    }
}

fn live_and_crash(seed: u64, mutant: Mutant, faulty: bool) -> Result<u64, String> {
    let life = Life::record(seed, 3, 24, mutant, faulty)?;
    explore(&life, seed, mutant, 2, life.born..=life.world.len())
}

#[test]
fn i3_changed_since_survives_a_crash_after_any_operation() {
    let mut states = 0;
    for seed in 0..16 {
        states += live_and_crash(seed, Mutant::None, false).unwrap();
    }
    assert!(states > 4_000, "{states} states are too few to mean anything");
}

#[test]
fn i3_changed_since_survives_failed_syncs() {
    for seed in 100..116 {
        live_and_crash(seed, Mutant::None, true).unwrap();
    }
}

#[test]
fn i3_holds_for_every_subset_of_unsynced_writes() {
    let mut states = 0;
    for seed in 200..206 {
        let life = Life::record(seed, 2, 7, Mutant::None, false).unwrap();
        for at in life.born..=life.world.len() {
            let open = life.world.unsynced(at);
            let shown = open.len().min(8);
            for subset in 0..1_u64 << shown {
                let state = life.world.crash(at, &open, &mut |index, _| {
                    let bit = open.iter().rev().position(|&i| i == index).unwrap();
                    // Beyond the newest eight: as the oldest of them.
                    let bit = bit.min(shown - 1);
                    if subset & (1 << bit) != 0 { Fate::Whole } else { Fate::Lost }
                });
                check_state(&life, &state, at, Rules::default(), None)
                    .unwrap_or_else(|e| panic!("seed {seed} at {at}, subset {subset:b}: {e}"));
                states += 1;
            }
        }
    }
    assert!(states > 1_000, "{states}");
}

/// Whether some seed shows that `mutant` breaks an invariant.
fn caught(mutant: Mutant) -> Option<String> {
    (0..24).find_map(|seed| live_and_crash(seed, mutant, false).err())
}

#[test]
fn breaking_any_ordering_rule_is_seen() {
    for rule in [
        Rule::OpenBeforeWrites,
        Rule::BitBeforeWrite,
        Rule::PagesBeforeClear,
        Rule::EveryPageBeforeClear,
        Rule::InFlightKeepsBit,
        Rule::ClearedBitIsGone,
        Rule::SealIsDurable,
        Rule::SealEndsEpoch,
        Rule::PagesBeforeClean,
        Rule::RecoveryBeforeClear,
    ] {
        let found = caught(Mutant::Rule(rule));
        assert!(found.is_some(), "the crash test does not see {rule:?} broken");
        println!("{rule:?}: {}", found.unwrap());
    }
}

#[test]
fn believing_the_page_cache_is_seen() {
    let sync = Mutant::Rule(Rule::SyncWhatWasFound);
    let found = (400..408).find_map(|seed| {
        let life = Life::record(seed, 3, 24, sync, false).unwrap();
        kill_then_cut(&life, seed, sync, 3).err()
    });
    println!("{sync:?}: {}", found.expect("the crash test does not see an open without syncs"));
}

/// A recovery whose sync fails, another one that succeeds, and a power cut.
fn recover_twice(rules: Rules) -> bool {
    let mut random = Random(1);
    let world = World::new(random.uuid());
    crate::rct::pair::create(&world, &identity(world.guid()), 1, 0).unwrap();
    let mut open = |rules| {
        let next = random.uuid();
        let (tracker, _) = Tracker::open_in(&world, &identity(world.guid()), next, 1, rules)?;
        world.set_guid(next);
        crate::Result::Ok(tracker)
    };
    let tracker = open(rules).unwrap();
    let id = tracker.seal().unwrap();
    tracker.before_write(0, 512).unwrap();
    drop(tracker);
    world.fail_sync(Name::Rct, 1);
    assert!(open(rules).is_err());
    assert_eq!(world.failures(), 1);
    drop(open(rules).unwrap());
    let (at, lost) =
        (world.len(), |_, file| if file == Name::Rct { Fate::Lost } else { Fate::Whole });
    let cut = world.crash(at, &world.unsynced(at), &mut { lost });
    let tracker = Tracker::open_read_only_in(&cut, &identity(cut.guid())).unwrap();
    !tracker.changed_after(id.epoch, 0..512).unwrap().is_empty()
}

#[test]
fn i3_changed_since_survives_a_recovery_whose_sync_failed() {
    assert!(recover_twice(Rules::default()));
    assert!(!recover_twice(Rules { broken: Some(Rule::RewriteWhatWasFound) }), "cannot fail");
}

#[test]
fn callers_that_break_their_rules_are_seen() {
    for mutant in [Mutant::GuidBeforeAnnounce, Mutant::SealWithoutFlush] {
        let found = caught(mutant);
        assert!(found.is_some(), "the crash test does not see {mutant:?}");
        println!("{mutant:?}: {}", found.unwrap());
    }
}
