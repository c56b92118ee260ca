//! The tracker against a plain model: an array of epochs.

use proptest::collection::vec;
use proptest::prelude::*;
use uuid::Uuid;

use super::recorder::World;
use super::{GRANULES, SIZE, flags, identity};
use crate::GRANULE;
use crate::rct::rules::Rules;
use crate::rct::{Continuity, RctId, Tracker};

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, len: u64 },
    MergeWrite { offset: u64, len: u64, ahead: u32 },
    Seal,
    Flush,
    Reopen,
    Forget(usize),
    Query { id: usize, start: u64, end: u64 },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    (0..SIZE / 512, 0..4000_u64)
        .prop_map(|(start, sectors)| (start * 512, (sectors * 512).min(SIZE - start * 512)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => range().prop_map(|(offset, len)| Step::Write { offset, len }),
        2 => (range(), 0..3_u32)
            .prop_map(|((offset, len), ahead)| Step::MergeWrite { offset, len, ahead }),
        2 => Just(Step::Seal),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => any::<usize>().prop_map(Step::Forget),
        3 => (any::<usize>(), 0..=SIZE, 0..=SIZE)
            .prop_map(|(id, a, b)| Step::Query { id, start: a.min(b), end: a.max(b) }),
    ]
}

struct Model {
    epochs: Vec<u32>,
    epoch: u32,
    ids: Vec<RctId>,
}

fn open(world: &World) -> Tracker {
    let next = Uuid::new_v4();
    let found = identity(world.guid());
    let (tracker, continuity) = Tracker::open_in(world, &found, next, 1, Rules::default()).unwrap();
    assert_eq!(continuity, Continuity::Kept);
    world.set_guid(next);
    tracker
}

impl Model {
    fn mark(&mut self, offset: u64, len: u64, epoch: u32) {
        for granule in offset / GRANULE..(offset + len).div_ceil(GRANULE) {
            if len > 0 {
                let stands = &mut self.epochs[granule as usize];
                *stands = epoch.max(*stands);
            }
        }
    }

    fn step(&mut self, tracker: &Tracker, step: &Step) {
        match *step {
            Step::Write { offset, len } => {
                tracker.before_write(offset, len).unwrap();
                self.mark(offset, len, self.epoch);
            }
            Step::MergeWrite { offset, len, ahead } => {
                let epoch = self.epoch + ahead; // At or behind every id, as a child's marks are.
                tracker.before_merge_write(offset, len, epoch).unwrap();
                self.epoch = epoch;
                self.mark(offset, len, epoch);
            }
            Step::Seal => {
                self.ids.push(tracker.seal().unwrap());
                self.epoch += 1;
            }
            Step::Flush => tracker.flush_map().unwrap(),
            Step::Forget(id) if !self.ids.is_empty() => {
                let id = self.ids.remove(id % self.ids.len());
                tracker.forget(&id).unwrap();
            }
            Step::Query { id, start, end } if !self.ids.is_empty() => {
                self.query(tracker, id % self.ids.len(), start, end);
            }
            Step::Reopen | Step::Forget(_) | Step::Query { .. } => {}
        }
        assert_eq!(tracker.epoch(), self.epoch);
        assert_eq!(tracker.sealed_ids(), self.ids);
    }

    fn query(&self, tracker: &Tracker, id: usize, start: u64, end: u64) {
        let id = &self.ids[id];
        assert!(tracker.knows(id));
        let ranges = tracker.changed_after(id.epoch, start..end).unwrap();
        assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "not merged: {ranges:?}");
        let found = flags(&ranges, GRANULES);
        for granule in 0..GRANULES {
            let inside = granule * GRANULE < end && (granule + 1) * GRANULE > start && start < end;
            let expected = inside && self.epochs[granule as usize] > id.epoch;
            assert_eq!(found[granule as usize], expected, "granule {granule}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]
    #[test]
    fn tracker_agrees_with_an_array_of_epochs(steps in vec(step(), 1..60)) {
        let world = World::new(Uuid::new_v4());
        crate::rct::pair::create(&world, &identity(world.guid()), 1, 0).unwrap();
        let mut model = Model { epochs: vec![0; GRANULES as usize], epoch: 1, ids: Vec::new() };
        let mut tracker = open(&world);
        for step in &steps {
            if matches!(step, Step::Reopen) {
                tracker.close_clean().unwrap();
                tracker = open(&world);
            }
            model.step(&tracker, step);
        }
        for id in 0..model.ids.len() {
            model.query(&tracker, id, 0, SIZE);
        }
    }
}
