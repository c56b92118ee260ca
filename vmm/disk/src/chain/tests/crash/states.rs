//! The states that crashes of a life leave, and what must hold in each.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

use super::super::world::{Rng, granules};
use super::life::{Change, Life, Model, Sealed, Value, delete_leftovers};
use super::places::{PLACES, garbage, values};
use crate::GRANULE;
use crate::block::Block;
use crate::chain::{Chain, delete_disk_files};
use crate::fs::recorded::{Crashes, Event, Fate, Recorded, Snapshot};
use crate::rct::Continuity;
use crate::vhdx::Access;

/// How thoroughly a life is looked at.
#[derive(Clone, Copy)]
pub(super) struct Depth {
    /// Lives of one disk, each but the first from a state that a crash of the one before left.
    pub(super) lives: u32,
    /// Random subsets of the unsynced writes per event.
    pub(super) samples: u64,
    /// Looks at every so many events, and where most is at stake.
    pub(super) stride: usize,
    /// At one in so many events a kill, and power cuts during the recovery from it.
    pub(super) kills: u64,
}

/// What was looked at.
#[derive(Default, Clone, Copy)]
pub(super) struct Tally {
    pub(super) states: u64,
    /// Of them subsets drawn at random.
    pub(super) sampled: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: Self) {
        self.states += other.states;
        self.sampled += other.sampled;
    }
}

/// Goes through the crashes of a life.
pub(super) struct Explorer<'a> {
    life: &'a Life,
    model: &'a Model,
    rng: Rng,
    walk: Crashes,
    honest: fn(&Event) -> bool,
    /// The values after the last flush that has ended, and the changes in them.
    flushed: Vec<Value>,
    included: usize,
    pub(super) tally: Tally,
    /// One of the states, to live on from.
    pub(super) survivor: Option<(usize, Snapshot)>,
}

impl<'a> Explorer<'a> {
    pub(super) fn new(
        life: &'a Life,
        model: &'a Model,
        seed: u64,
        honest: fn(&Event) -> bool,
    ) -> Self {
        Self {
            life,
            model,
            rng: Rng::new(!seed),
            walk: life.recorded.crashes(),
            honest,
            flushed: model.first.clone(),
            included: 0,
            tally: Tally::default(),
            survivor: None,
        }
    }

    pub(super) fn all(&mut self, depth: Depth) -> Result<(), String> {
        loop {
            let at = self.walk.at();
            if at >= self.life.born && (at.is_multiple_of(depth.stride) || self.at_stake(at)) {
                self.crash_here(depth)
                    .map_err(|e| format!("crash at {at}, after {}: {e}", self.walk.describe()))?;
            }
            if self.walk.ended() {
                return Ok(());
            }
            self.walk.pass(self.honest);
        }
    }

    /// Whether a flush has just ended, or another file is about to be opened after a crash.
    fn at_stake(&self, at: usize) -> bool {
        self.model.flushes.iter().any(|(end, _)| *end == at)
            || self.model.leaves.iter().any(|(from, _)| *from == at + 1)
    }

    fn crash_here(&mut self, depth: Depth) -> Result<(), String> {
        let at = self.walk.at();
        let ended = self.model.flushes.iter().rev().find(|(end, _)| *end <= at).unwrap().1;
        for change in &self.model.changes[self.included.min(ended)..ended] {
            self.flushed[change.places.clone()].fill(change.value);
        }
        self.included = self.included.max(ended);
        let ways = if self.walk.open() == 0 { 1 } else { 4 + depth.samples };
        for way in 0..ways {
            let state = fates(&self.walk, way, &mut self.rng);
            self.tally.states += 1;
            self.tally.sampled += u64::from(way >= 4);
            let dice = self.rng.below(64);
            self.check(&state, at, dice).map_err(|e| format!("way {way}: {e}"))?;
            if self.rng.below(self.tally.states) == 0 {
                self.survivor = Some((at, state));
            }
        }
        match self.rng.below(depth.kills) {
            0 => self.crash_recovery(at).map_err(|e| format!("killed, then {e}")),
            _ => Ok(()),
        }
    }

    /// The process is killed, the next one recovers on what the page cache holds, and the power fails
    /// meanwhile. What guests found there and flushed stays.
    fn crash_recovery(&mut self, at: usize) -> Result<(), String> {
        let killed = self.life.recorded.killed(at);
        let leaf = killed.path().join(self.model.leaf_at(at));
        let chain = Chain::open(&leaf, Access::ReadWrite).map_err(|e| e.to_string())?;
        let found = values(&chain).map_err(|e| e.to_string())?;
        self.keeps_acknowledged(at, &found)?;
        chain.flush().map_err(|e| e.to_string())?;
        let flushed = killed.len();
        drop(chain);
        let mut walk = self.walk.clone().continued(&killed);
        while !walk.ended() {
            walk.pass(self.honest);
            let stays = walk.at() >= flushed;
            if walk.at() == flushed || self.rng.below(6) == 0 {
                self.cut(&walk, at, stays.then_some(&found))
                    .map_err(|e| format!("crash at {}: {e}", walk.at()))?;
            }
        }
        Ok(())
    }

    /// The power fails in the middle of a recovery, or after it: then `flushed` is there.
    fn cut(
        &mut self,
        walk: &Crashes,
        at: usize,
        flushed: Option<&Vec<Value>>,
    ) -> Result<(), String> {
        for way in [1, 2, 4, 5] {
            let state = fates(walk, way, &mut self.rng);
            self.tally.states += 1;
            self.tally.sampled += u64::from(way >= 4);
            let left = self.check(&state, at, 63).map_err(|e| format!("way {way}: {e}"))?;
            if flushed.is_some_and(|flushed| *flushed != left) {
                return Err(format!("way {way}: a flush after the kill was not enough"));
            }
        }
        Ok(())
    }

    /// After the death of the process alone guests run on: all that was acknowledged is there.
    fn keeps_acknowledged(&self, at: usize, found: &[Value]) -> Result<(), String> {
        let mut expected = self.model.first.clone();
        let begun = self.model.changes.iter().filter(|c| c.begin < at);
        let (ended, in_flight): (Vec<&Change>, Vec<&Change>) = begun.partition(|c| c.end <= at);
        for change in ended {
            expected[change.places.clone()].fill(change.value);
        }
        for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let now = in_flight.iter().any(|c| c.places.contains(&place) && c.value == *found);
            if found != expected && !now {
                let offset = PLACES[place];
                return Err(format!("{offset} holds {found}, acknowledged was {expected}"));
            }
        }
        Ok(())
    }

    /// Checks the state that a crash at `at` left.
    fn check(&self, state: &Snapshot, at: usize, dice: u64) -> Result<Vec<Value>, String> {
        let recorded = Recorded::new(state.clone(), self.life.recorded.broken());
        let leaf = recorded.path().join(self.model.leaf_at(at));
        if dice.is_multiple_of(3) {
            let reader =
                Chain::open(&leaf, Access::ReadOnly).map_err(|e| format!("reading: {e}"))?;
            self.compare(at, &reader).map_err(|e| format!("reading: {e}"))?;
        }
        let chain = Chain::open(&leaf, Access::ReadWrite).map_err(|e| format!("writing: {e}"))?;
        if let Continuity::Lost(why) = chain.continuity() {
            return Err(format!("tracking is lost: {why}"));
        }
        let found = self.compare(at, &chain)?;
        if dice.is_multiple_of(8)
            && let Some(at) = garbage(&chain).map_err(|e| e.to_string())?
        {
            return Err(format!("{at} holds what was never written there"));
        }
        if dice == 1 {
            let ids: Vec<&Sealed> = self.ids(at).collect();
            go_on(&chain, &ids, found.clone()).map_err(|e| format!("going on: {e}"))?;
        }
        Ok(found)
    }

    fn ids(&self, at: usize) -> impl Iterator<Item = &Sealed> {
        self.model.sealed.iter().filter(move |s| s.told <= at)
    }

    /// Every sector holds what was flushed, or was written later; every id that was told answers.
    fn compare(&self, at: usize, chain: &Chain) -> Result<Vec<Value>, String> {
        let found = values(chain).map_err(|e| e.to_string())?;
        let later: Vec<&Change> =
            self.model.changes[self.included..].iter().filter(|c| c.begin < at).collect();
        for (place, (value, flushed)) in found.iter().zip(&self.flushed).enumerate() {
            let allowed = value == flushed
                || later.iter().any(|c| c.value == *value && c.places.contains(&place));
            if !allowed {
                let offset = PLACES[place];
                return Err(format!("{offset} holds {value}, flushed was {flushed}"));
            }
        }
        for sealed in self.ids(at) {
            contains_changes(chain, sealed, &found)?;
        }
        Ok(found)
    }
}

/// What a crash keeps: all, nothing, the disk but no tracking, tracking but no disk, this and that.
fn fates(walk: &Crashes, way: u64, rng: &mut Rng) -> Snapshot {
    let tracking = |name: Option<&OsStr>| {
        name.is_some_and(|n| !Path::new(n).extension().is_some_and(|e| e == "vhdx" || e == "avhdx"))
    };
    // Mostly kept, mostly lost, or evenly.
    let bias = 1 + rng.below(3);
    walk.state(|name| match way {
        0 => Fate::Whole,
        1 => Fate::Lost,
        2 if tracking(name) => Fate::Lost,
        3 if !tracking(name) && name.is_some() => Fate::Lost,
        2 | 3 => Fate::Whole,
        _ => match rng.below(8) {
            0 | 1 => Fate::Torn(rng.next()),
            n if n < 2 * bias => Fate::Lost,
            _ => Fate::Whole,
        },
    })
}

fn contains_changes(chain: &Chain, sealed: &Sealed, found: &[Value]) -> Result<(), String> {
    let ranges = chain.changed_since(&sealed.id).map_err(|e| e.to_string())?;
    let reported: BTreeSet<u64> = granules(&ranges).collect();
    let pairs = found.iter().zip(&sealed.values).zip(&*PLACES);
    let missed = pairs
        .into_iter()
        .find(|((now, then), at)| now != then && !reported.contains(&(*at / GRANULE)));
    missed.map_or(Ok(()), |((now, then), at)| {
        Err(format!("{at} held {then} at {} and holds {now}, which is not reported", sealed.id))
    })
}

/// The disk is written again, and merged down to its base.
fn go_on(chain: &Chain, ids: &[&Sealed], mut content: Vec<Value>) -> Result<(), String> {
    let text = |e: crate::DiskError| e.to_string();
    delete_leftovers(chain).map_err(text)?;
    for place in [0, PLACES.len() / 2, PLACES.len() - 1] {
        let value = 1 << 40;
        chain
            .write_at(PLACES[place], &super::places::data_of(value, place..place + 1))
            .map_err(text)?;
        content[place] = value;
    }
    while let [_, child, ..] = &chain.files()[..] {
        chain.merge(child, &|_| (), &std::sync::atomic::AtomicBool::new(false)).map_err(text)?;
        delete_disk_files(child).map_err(text)?;
        if values(chain).map_err(text)? != content {
            return Err(format!("the merge of {} changed something", child.display()));
        }
        ids.iter().try_for_each(|id| contains_changes(chain, id, &content))?;
    }
    chain.close().map_err(text)
}
