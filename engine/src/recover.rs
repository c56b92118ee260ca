//! What a session does before anything else: finish or undo what a kill left half done (I5).

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tidemark_disk::owner::Request;

use crate::config::{CheckpointPurpose, VmConfig};
use crate::error::{EngineError, Result};
use crate::intent::{CheckpointIntent, Intent, NewLeaf, Phase};
use crate::leaves::{is_empty, strangers};
use crate::merge::Fold;
use crate::session::VmSession;
use crate::{agent, fault, machine, owner, store};

/// Longest wait for a thaw that a dead guard owes.
const THAW: Duration = Duration::from_secs(30);
/// Longest wait for the owner to give prepared leaves up: it may be switching just now.
const DISCARD: Duration = Duration::from_secs(60);
/// How often an undo that a restarted disk owner has thwarted begins again, and after what pause.
const ATTEMPTS: u32 = 10;
const AGAIN: Duration = Duration::from_millis(100);

impl VmSession<'_> {
    /// Brings processes, intents and checkpoints of dead runs in order.
    pub(crate) fn recover(&mut self) -> Result<()> {
        self.recover_processes()?;
        self.recover_intent()?;
        // First: a merge is refused while a stray file names one of its files as parent.
        self.remove_orphans()?;
        self.merge_dead_backups()
    }

    /// A running VM gets the owner and the guard that it lacks, and is thawed; of a VM that has ended,
    /// nothing stays behind.
    fn recover_processes(&self) -> Result<()> {
        let Some(id) = machine::process(&self.place)? else { return self.settle() };
        owner::ensure(&self.place)?;
        self.watch()?;
        agent::thaw_if_marked(&self.place.run, THAW, &|| id.alive())
    }

    /// Finishes or undoes what the intent says, if there is one.
    pub(crate) fn recover_intent(&mut self) -> Result<()> {
        match Intent::load(&self.place.folder)? {
            None => Ok(()),
            Some(Intent::Checkpoint(intent)) => self.undo_checkpoint(&intent),
            Some(Intent::Merge(intent)) => {
                self.finish_merge(&intent, &|_, _, _| {}, &AtomicBool::new(false))
            }
        }
    }

    /// A backup run holds the session from beginning to end: one whose checkpoint we find is dead.
    fn merge_dead_backups(&mut self) -> Result<()> {
        let dead = |c: &&crate::CheckpointRecord| c.purpose == CheckpointPurpose::Backup;
        // Youngest first: each merge is then of the leaf, and moves the least.
        while let Some(checkpoint) = self.config.checkpoints.iter().rev().find(dead) {
            let id = checkpoint.id.to_string();
            tracing::info!(
                vm = self.place.name,
                checkpoint = id,
                "merging a dead run's checkpoint"
            );
            self.delete_checkpoint(&id, &|_, _, _| {}, &AtomicBool::new(false))?;
        }
        Ok(())
    }

    /// Takes a checkpoint back that has no record: its new leaves, if they came into use, are merged
    /// into the files that they were to protect. A kill at any moment leaves the intent, by which this
    /// begins again.
    pub(crate) fn undo_checkpoint(&mut self, intent: &CheckpointIntent) -> Result<()> {
        // As it is on the disk: the write that failed may have been the one after the rename.
        let path = self.place.folder.config();
        self.config.checkpoints = VmConfig::load(&path)?.checkpoints;
        for attempt in 0.. {
            if intent.is_recorded(&self.config) {
                break;
            }
            if attempt == ATTEMPTS {
                return Err(EngineError::State(format!(
                    "checkpoint {} cannot be undone: its leaf files hold data but are not in use",
                    intent.id
                )));
            }
            self.discard_prepared()?;
            if intent.phase == Phase::Committing {
                for leaf in &intent.leaves {
                    self.merge_back(leaf)?;
                    fault::point("undo-merged");
                }
            }
            if self.drop_leaves(intent)? {
                break;
            }
            std::thread::sleep(AGAIN);
        }
        Intent::clear(&self.place.folder)
    }

    /// Makes sure that the disk owner neither holds prepared leaves nor switches to them any more: a
    /// dead client's request may be waiting in its socket.
    fn discard_prepared(&self) -> Result<()> {
        if machine::process(&self.place)?.is_none() {
            return Ok(());
        }
        let Ok(mut client) = owner::connect(&self.place.run) else { return Ok(()) };
        if let Err(error) = client.call(&Request::DiscardCheckpoint, DISCARD) {
            // A dead owner holds nothing; a living one has to be asked again.
            tracing::debug!(%error, "discarding prepared leaves");
        }
        Ok(())
    }

    fn merge_back(&self, leaf: &NewLeaf) -> Result<()> {
        if !store::exists(&self.place.folder.disk(&leaf.file))? {
            return Ok(());
        }
        let never = AtomicBool::new(false);
        let (place, disk, child) = (&self.place, &leaf.disk, &leaf.file);
        Fold { place, disk, child, progress: &|_, _| {}, cancel: &never }.run()
    }

    /// Removes the new leaves. False if one of them must be merged back (again): a disk owner that was
    /// started meanwhile uses it, or has used it until it died.
    fn drop_leaves(&self, intent: &CheckpointIntent) -> Result<bool> {
        let _lock = owner::hold(&self.place.run)?;
        // A living owner that has no new leaf in its chain was started before the leaves could be
        // used, or has merged them back: either way nothing is in them. Without one, look.
        let mut look = intent.phase == Phase::Committing;
        if machine::process(&self.place)?.is_some() {
            let report = owner::connect(&self.place.run).and_then(|mut c| owner::report(&mut c));
            if let Ok(report) = report {
                if intent.leaves.iter().any(|l| owner::has_file(&report, &l.disk, &l.file)) {
                    return Ok(false);
                }
                look = false;
            }
        } else if owner::process(&self.place.run).is_some() {
            return Ok(false);
        }
        for leaf in &intent.leaves {
            let path = self.place.folder.disk(&leaf.file);
            if look && store::exists(&path)? && !is_empty(&path)? {
                return Ok(false);
            }
        }
        for leaf in &intent.leaves {
            self.remove_unused(&leaf.file)?;
            fault::point("undo-removed");
        }
        store::remove_file(&self.place.folder.snapshot(intent.id))?;
        Ok(true)
    }

    /// Removes disk files that nothing refers to and that hold nothing. One that holds data, or that
    /// cannot be understood, stays and is reported.
    fn remove_orphans(&self) -> Result<()> {
        for file in strangers(&self.place.folder, &self.config)? {
            let path = self.place.folder.disk(&file);
            match is_empty(&path) {
                Ok(true) => self.place.folder.remove_disk(&file)?,
                Ok(false) => {
                    tracing::warn!(path = %path.display(), "nothing refers to this disk file");
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "unreferenced disk file");
                }
            }
        }
        Ok(())
    }
}
