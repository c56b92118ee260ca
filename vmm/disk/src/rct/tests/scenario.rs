//! Random lives of a disk, recorded: sessions of writes, flushes, seals, GUID changes, closes and
//! unclean ends.

use super::recorder::{Name, World};
use super::{GRANULES, Random, identity};
use crate::GRANULE;
use crate::rct::rules::{Rule, Rules};
use crate::rct::{Continuity, RctId, Tracker, WriteGuard};

/// Where pages and regions begin and end.
const EDGES: [u64; 14] =
    [0, 255, 256, 767, 768, 1018, 1019, 1020, 1021, 1023, 1024, 2039, 2040, 2047];

/// What a scenario gets wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutant {
    None,
    /// One of the module's rules.
    Rule(Rule),
    /// The disk carries the new GUID before the header announces it.
    GuidBeforeAnnounce,
    /// A seal without a flush of the disk.
    SealWithoutFlush,
}

impl Mutant {
    fn rules(self) -> Rules {
        match self {
            Self::Rule(rule) => Rules { broken: Some(rule) },
            _ => Rules::default(),
        }
    }
}

/// A seal and what the disk held then.
pub(super) struct Sealed {
    pub(super) epoch: u32,
    /// `None`: the seal failed, but its id may stand in the file.
    pub(super) id: Option<RctId>,
    pub(super) content: Vec<u64>,
    /// Length of the log when the seal returned.
    pub(super) at: usize,
}

/// A recorded life.
pub(super) struct Life {
    pub(super) world: World,
    pub(super) sealed: Vec<Sealed>,
    /// Length of the log when the pair first stood.
    pub(super) born: usize,
    random: Random,
    value: u64,
    mutant: Mutant,
    /// Syncs fail now and then.
    faulty: bool,
}

/// A write between its steps.
struct Pending<'a> {
    guard: WriteGuard<'a>,
    granules: std::ops::Range<u64>,
    marked: bool,
}

impl Life {
    /// Lives through `sessions` of up to `steps` steps each.
    pub(super) fn record(
        seed: u64,
        sessions: u64,
        steps: u64,
        mutant: Mutant,
        faulty: bool,
    ) -> Result<Self, String> {
        let mut random = Random(seed);
        let world = World::new(random.uuid());
        crate::rct::pair::create(&world, &identity(world.guid()), 1, 0).unwrap();
        let born = world.len();
        let mut life = Self { world, sealed: Vec::new(), born, random, value: 0, mutant, faulty };
        for _ in 0..sessions {
            life.session(steps)?;
        }
        Ok(life)
    }

    /// Whether syncs failed in it.
    pub(super) fn faulty(&self) -> bool {
        self.faulty
    }

    fn session(&mut self, steps: u64) -> Result<(), String> {
        let next = self.random.uuid();
        let found = identity(self.world.guid());
        if self.mutant == Mutant::GuidBeforeAnnounce {
            self.world.set_guid(next);
        }
        let opened = Tracker::open_in(&self.world, &found, next, 1, self.mutant.rules());
        let (tracker, continuity) = match opened {
            Ok(opened) => opened,
            Err(_) if self.faulty => return Ok(()),
            Err(e) => return Err(e.to_string()),
        };
        if continuity != Continuity::Kept {
            return Err(format!("lost without a crash: {continuity:?}"));
        }
        self.world.set_guid(next);
        let mut pending = Vec::new();
        for _ in 0..1 + self.random.below(steps) {
            self.step(&tracker, &mut pending)?;
        }
        if self.random.below(2) == 0 {
            self.finish(&tracker, &mut pending);
            let closed = tracker.close_clean();
            return if self.faulty { Ok(()) } else { closed.map_err(|e| e.to_string()) };
        }
        Ok(()) // Killed: pending writes were never issued.
    }

    fn step<'a>(
        &mut self,
        tracker: &'a Tracker,
        pending: &mut Vec<Pending<'a>>,
    ) -> Result<(), String> {
        if self.faulty && self.random.below(6) == 0 {
            let file = if self.random.below(2) == 0 { Name::Rct } else { Name::Mrt };
            self.world.fail_sync(file, self.random.below(3) as u32);
        }
        match self.random.below(24) {
            0..10 => self.begin_write(tracker, pending, true),
            10..12 => self.begin_write(tracker, pending, false),
            12 => drop(self.world.sync(Name::Disk)),
            13..19 => self.check(tracker.flush_map())?,
            19..21 => self.finish(tracker, pending),
            21..23 => self.seal(tracker, pending)?,
            _ => {
                let next = self.random.uuid();
                if self.mutant == Mutant::GuidBeforeAnnounce {
                    self.world.set_guid(next);
                }
                let announced = tracker.announce(next);
                if announced.is_ok() {
                    self.world.set_guid(next);
                }
                self.check(announced)?;
            }
        }
        Ok(())
    }

    fn check<T>(&self, result: crate::Result<T>) -> Result<(), String> {
        if self.faulty { Ok(()) } else { result.map(drop).map_err(|e| e.to_string()) }
    }

    /// A write that completes at once, or stops on its way: before its marks, or before its data.
    fn begin_write<'a>(
        &mut self,
        tracker: &'a Tracker,
        pending: &mut Vec<Pending<'a>>,
        complete: bool,
    ) {
        let edge = EDGES[self.random.below(EDGES.len() as u64) as usize];
        let start = if self.random.below(4) == 0 { self.random.below(GRANULES) } else { edge };
        let granules = start..(start + 1 + self.random.below(3)).min(GRANULES);
        let (offset, len) = (granules.start * GRANULE, (granules.end - granules.start) * GRANULE);
        let marked = complete || self.random.below(2) == 0;
        let guard =
            if marked { tracker.before_write(offset, len) } else { tracker.enter(offset, len) };
        // A refused write is not issued.
        let Ok(guard) = guard else { return };
        pending.push(Pending { guard, granules, marked });
        if complete {
            let last = pending.len() - 1;
            self.complete(tracker, pending.swap_remove(last));
        }
    }

    fn complete(&mut self, tracker: &Tracker, write: Pending<'_>) {
        if !write.marked {
            tracker.map.mark(write.granules.clone(), tracker.epoch());
        }
        for granule in write.granules {
            self.value += 1;
            self.world.write_granule(granule, self.value);
        }
        drop(write.guard);
    }

    fn finish<'a>(&mut self, tracker: &'a Tracker, pending: &mut Vec<Pending<'a>>) {
        for write in std::mem::take(pending) {
            self.complete(tracker, write);
        }
    }

    fn seal<'a>(
        &mut self,
        tracker: &'a Tracker,
        pending: &mut Vec<Pending<'a>>,
    ) -> Result<(), String> {
        self.finish(tracker, pending);
        if self.mutant != Mutant::SealWithoutFlush {
            self.world.sync(Name::Disk).unwrap();
        }
        let content = self.world.content();
        let epoch = tracker.epoch();
        let sealed = tracker.seal();
        let at = self.world.len();
        self.sealed.push(Sealed { epoch, id: sealed.as_ref().ok().cloned(), content, at });
        self.check(sealed)
    }
}
