//! A recorded life of a whole chain: guest I/O, checkpoints, merges, the deletions after them, and
//! what must be true of the disk at every moment of it.

use std::ffi::OsString;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::super::world::{Rng, options};
use super::places::{BLOCK, PLACES, RUNS, SIZE, ZERO, block_data, data_of, run_of, values};
use crate::block::Block;
use crate::chain::{Chain, MergeProgress, delete_disk_files};
use crate::error::{DiskError, Result};
use crate::fs::recorded::{Broken, Recorded, Snapshot};
use crate::rct::{Continuity, RctId};
use crate::vhdx::Access;

/// What a sector holds: zeros, or the data of one write.
pub(super) type Value = u64;

/// A change of sectors: when it began and was acknowledged, in events.
pub(super) struct Change {
    pub(super) begin: usize,
    pub(super) end: usize,
    /// Of [`PLACES`].
    pub(super) places: Range<usize>,
    pub(super) value: Value,
}

/// A sealed id, what the disk held then, and when it was told.
#[derive(Clone)]
pub(super) struct Sealed {
    pub(super) id: RctId,
    pub(super) values: Vec<Value>,
    pub(super) told: usize,
}

/// What is known of the disk.
pub(super) struct Model {
    recorded: Recorded,
    pub(super) rng: Rng,
    /// The runs of sectors that guests use.
    runs: Range<usize>,
    next: Value,
    /// Of every place, now.
    pub(super) values: Vec<Value>,
    /// At the beginning.
    pub(super) first: Vec<Value>,
    pub(super) changes: Vec<Change>,
    /// Ends of flushes, and the number of changes that they made durable.
    pub(super) flushes: Vec<(usize, usize)>,
    /// From which event on which file is opened after a crash.
    pub(super) leaves: Vec<(usize, OsString)>,
    pub(super) sealed: Vec<Sealed>,
}

impl Model {
    /// A guest's request.
    fn act(&mut self, chain: &Chain) -> Result<()> {
        let before = self.changes.len();
        self.request(chain)?;
        if let Some(change) = self.changes.get_mut(before) {
            change.end = self.recorded.len();
        }
        Ok(())
    }

    fn request(&mut self, chain: &Chain) -> Result<()> {
        let begin = self.recorded.len();
        let (at, run) = run_of(&mut self.rng, self.runs.clone());
        match self.rng.below(16) {
            0..8 => {
                let value = self.new_value();
                self.changed(begin, at..at + run, value);
                chain.write_at(PLACES[at], &data_of(value, at..at + run))
            }
            8 | 9 => {
                self.changed(begin, at..at + run, ZERO);
                chain.discard(PLACES[at], run as u64 * 512)
            }
            10 | 11 => self.act_on_block(chain, begin),
            _ => self.flush(chain),
        }
    }

    /// Writes or discards a whole block.
    fn act_on_block(&mut self, chain: &Chain, begin: usize) -> Result<()> {
        let (at, _) = run_of(&mut self.rng, self.runs.clone());
        let start = PLACES[at] / BLOCK * BLOCK;
        let end = SIZE.min(start + BLOCK);
        let first = PLACES.partition_point(|p| *p < start);
        let places = first..PLACES.partition_point(|p| *p < end);
        if self.rng.below(3) == 0 {
            let value = self.new_value();
            self.changed(begin, places, value);
            chain.write_at(start, &block_data(value, start..end))
        } else {
            self.changed(begin, places, ZERO);
            chain.write_zeroes(start, end - start, true)
        }
    }

    fn new_value(&mut self) -> Value {
        self.next += 1;
        self.next
    }

    fn changed(&mut self, begin: usize, places: Range<usize>, value: Value) {
        self.values[places.clone()].fill(value);
        self.changes.push(Change { begin, end: usize::MAX, places, value });
    }

    fn flush(&mut self, chain: &Chain) -> Result<()> {
        let included = self.changes.len();
        chain.flush()?;
        self.flushes.push((self.recorded.len(), included));
        Ok(())
    }

    /// From now on a crash is followed by an open of `leaf`.
    fn record(&mut self, leaf: OsString) {
        self.leaves.push((self.recorded.len(), leaf));
    }

    /// The file to open after a crash at an event.
    pub(super) fn leaf_at(&self, at: usize) -> OsString {
        self.leaves.iter().rev().find(|(from, _)| *from <= at).unwrap().1.clone()
    }
}

/// What a life gets wrong on purpose: its caller's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    Right,
    /// Tells the id before the old leaf is settled.
    TellsEarly,
    /// Deletes a merged file before the chain without it is recorded.
    DeletesEarly,
}

/// One life of a disk, from a state on.
pub(super) struct Life {
    pub(super) recorded: Recorded,
    chain: Option<Chain>,
    pub(super) model: Arc<Mutex<Model>>,
    /// Events before it: of the creation.
    pub(super) born: usize,
    caller: Caller,
    made: u64,
}

/// Whether I/O is held back at a step of a merge.
fn paused(step: &str) -> bool {
    matches!(step, "merge:paused" | "merge:before-repoint")
}

impl Life {
    /// The life of a new disk.
    pub(super) fn begin(seed: u64, broken: Option<Broken>, caller: Caller) -> Result<Self> {
        let recorded = Recorded::new(Snapshot::default(), broken);
        let base = recorded.path().join("disk.vhdx");
        Chain::create(&base, &options(SIZE, BLOCK as u32))?;
        let sealed = Vec::new();
        Self::open(recorded, "disk.vhdx".into(), sealed, Rng::new(seed), 0, caller)
    }

    /// Goes on from what a crash at `at` left.
    pub(super) fn resume(&self, at: usize, state: Snapshot) -> Result<Self> {
        let model = self.model.lock();
        let recorded = Recorded::new(state, self.recorded.broken());
        let sealed = model.sealed.iter().filter(|s| s.told <= at);
        let sealed = sealed.map(|s| Sealed { told: 0, ..s.clone() }).collect();
        let mut rng = model.rng.clone();
        rng.next();
        let leaf = model.leaf_at(at);
        let mut life = Self::open(recorded, leaf, sealed, rng, model.next + 1000, self.caller)?;
        life.made = self.made;
        delete_leftovers(life.chain())?;
        Ok(life)
    }

    fn open(
        recorded: Recorded,
        leaf: OsString,
        sealed: Vec<Sealed>,
        rng: Rng,
        next: Value,
        caller: Caller,
    ) -> Result<Self> {
        let chain = Chain::open(&recorded.path().join(&leaf), Access::ReadWrite)?;
        let values = values(&chain)?;
        let born = recorded.len();
        let model = Model {
            recorded: recorded.clone(),
            rng,
            runs: 0..RUNS.len(),
            next,
            first: values.clone(),
            values,
            changes: Vec::new(),
            flushes: vec![(0, 0)],
            leaves: vec![(0, leaf)],
            sealed,
        };
        let model = Arc::new(Mutex::new(model));
        Ok(Self { recorded, chain: Some(chain), model, born, caller, made: 0 })
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }

    fn below(&self, n: u64) -> u64 {
        self.model.lock().rng.below(n)
    }

    fn act(&self) -> Result<()> {
        self.model.lock().act(self.chain())
    }

    /// Lives on for some steps, then closes the disk.
    pub(super) fn live(&mut self, steps: u32) -> Result<()> {
        for _ in 0..steps {
            let files = self.chain().files().len() as u64;
            match self.below(20) {
                0..3 => self.chain().flush_map()?,
                3..6 if files < 4 => self.checkpoint()?,
                6..10 if files > 1 => self.merge(1 + self.below(files - 1))?,
                10 => self.reopen()?,
                _ => self.act()?,
            }
        }
        self.close()
    }

    /// Two checkpoints, folded back one after the other, from the leaf down: the second merge is of a
    /// leaf with an id. After each merge guests go where nobody has been.
    pub(super) fn fold_leaves(&mut self) -> Result<()> {
        self.fold(|files| files - 1)
    }

    /// The same from the base up.
    pub(super) fn fold_middles(&mut self) -> Result<()> {
        self.fold(|_| 1)
    }

    fn fold(&mut self, index: fn(u64) -> u64) -> Result<()> {
        let middle = RUNS.len() / 2;
        self.model.lock().runs = 0..middle;
        for _ in 0..2 {
            self.act()?;
            self.checkpoint()?;
        }
        while self.chain().files().len() > 1 {
            self.act()?;
            self.merge(index(self.chain().files().len() as u64))?;
            let mut model = self.model.lock();
            model.runs.end = RUNS.len().min(model.runs.end + 2);
        }
        self.close()
    }

    fn checkpoint(&mut self) -> Result<()> {
        self.made += 1;
        let name = OsString::from(format!("disk_{}.avhdx", self.made));
        let new = self.recorded.path().join(&name);
        self.chain().prepare_leaf(&new)?;
        self.act()?;
        // The engine's intent: from here on the new leaf may be in use.
        self.model.lock().record(name);
        self.chain().preflush()?;
        self.act()?;
        let pause = self.chain().pause();
        let id = self.chain().switch_leaf(&pause, &new)?;
        drop(pause);
        let values = self.model.lock().values.clone();
        let tell = |model: &mut Model| {
            let told = model.recorded.len();
            model.sealed.push(Sealed { id, values, told });
        };
        if self.caller == Caller::TellsEarly {
            tell(&mut self.model.lock());
            self.act()?;
            return self.chain().settle();
        }
        // Guests go on before the old leaf is settled.
        for _ in 0..self.below(4) {
            self.act()?;
        }
        self.chain().settle()?;
        tell(&mut self.model.lock());
        Ok(())
    }

    /// Merges under guest writes, or begins to.
    fn merge(&mut self, index: u64) -> Result<()> {
        let files = self.chain().files();
        let child = files[index as usize].clone();
        let model = self.model.clone();
        self.chain().hook.set(move |chain, step| {
            let mut model = model.lock();
            if paused(step) || model.rng.below(3) > 0 { Ok(()) } else { model.act(chain) }
        });
        let cancelled = self.below(5) == 0;
        let cancel = AtomicBool::new(false);
        let progress = |p: MergeProgress| {
            cancel.store(cancelled && p.done > 0, Ordering::Relaxed);
        };
        let merged = self.chain().merge(&child, &progress, &cancel);
        self.chain().hook.clear();
        match merged {
            Err(DiskError::Cancelled) => return Ok(()),
            other => other?,
        }
        let leaf = files[index as usize - 1].file_name().unwrap().to_owned();
        // Guests go on before the chain without the child is recorded.
        let runs = self.model.lock().runs.clone();
        if runs.end < RUNS.len() {
            self.model.lock().runs = runs.end..RUNS.len();
        }
        for _ in 0..=self.below(5) {
            self.act()?;
        }
        self.model.lock().runs = runs;
        let early = self.caller == Caller::DeletesEarly;
        if early {
            delete_disk_files(&child)?;
        }
        if index as usize + 1 == files.len() {
            self.model.lock().record(leaf);
        }
        self.act()?;
        if early { Ok(()) } else { delete_disk_files(&child) }
    }

    fn close(&mut self) -> Result<()> {
        self.chain().close()?;
        self.chain = None;
        let mut model = self.model.lock();
        let end = (self.recorded.len(), model.changes.len());
        model.flushes.push(end);
        Ok(())
    }

    fn reopen(&mut self) -> Result<()> {
        self.close()?;
        let leaf = self.model.lock().leaf_at(usize::MAX);
        let chain = Chain::open(&self.recorded.path().join(leaf), Access::ReadWrite)?;
        if chain.continuity() != Continuity::Kept {
            return Err(DiskError::State(format!("without a crash: {:?}", chain.continuity())));
        }
        self.chain = Some(chain);
        Ok(())
    }
}

/// Files that the chain does not need, as whoever recovers the VM deletes them.
pub(super) fn delete_leftovers(chain: &Chain) -> Result<()> {
    let used = chain.files();
    for found in crate::fs::list(used[0].parent().unwrap()).unwrap() {
        let path = used[0].with_file_name(&found.name);
        if path.extension().is_some_and(|e| e == "avhdx") && !used.contains(&path) {
            delete_disk_files(&path)?;
        }
    }
    Ok(())
}
