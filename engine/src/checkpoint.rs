//! Taking a production checkpoint: everything slow before the freeze, the seal and switch of all disks
//! together within it, the record as the commit point after it.

use std::time::Duration;

use jiff::{Timestamp, Zoned};
use uuid::Uuid;

use tidemark_disk::DiskError;
use tidemark_disk::chain::Chain;
use tidemark_disk::owner::{CommittedDisk, Request, Response};
use tidemark_disk::vhdx::Access;

use crate::config::{
    CheckpointDisk, CheckpointPurpose, CheckpointRecord, CheckpointRequest, CheckpointType,
    Consistency, MAX_CHECKPOINTS, QuiesceMode, VmConfig, check_checkpoint_name,
};
use crate::error::{EngineError, Result};
use crate::fault;
use crate::guard::{Freeze, Thawed};
use crate::intent::{CheckpointIntent, Intent, Phase};
use crate::process::ProcessId;
use crate::session::VmSession;
use crate::{machine, owner};

/// Longest creation of the new leaf files.
const PREPARE: Duration = Duration::from_secs(120);
/// Longest switch of a guest that is not frozen.
const COMMIT: Duration = Duration::from_secs(60);

/// A switch that has happened, on all disks.
struct Taken {
    disks: Vec<CommittedDisk>,
    consistency: Consistency,
    freeze_us: u64,
    pause_us: u64,
}

impl VmSession<'_> {
    /// Takes a checkpoint. On error none was taken, and the VM's disks are as they were.
    pub fn create_checkpoint(&mut self, request: &CheckpointRequest) -> Result<CheckpointRecord> {
        let name = self.check_request(request)?;
        self.recover_intent()?;
        let unguarded = self.unguarded(request)?;
        let mut intent = CheckpointIntent::new(Uuid::new_v4(), &self.config);
        // Killed from here on until the record stands, the checkpoint is undone.
        Intent::Checkpoint(intent.clone()).save(&self.place.folder)?;
        fault::point("checkpoint-intent");
        let record = match self.take(&mut intent, request, unguarded) {
            Ok(taken) => self.record_checkpoint(&intent, name, request, taken),
            Err(error) => Err(error),
        };
        record.or_else(|error| self.take_back(&intent, error))
    }

    /// Why the guest must not be frozen: only its guard ends a freeze if we die. Known before anything
    /// is made, so that a checkpoint that requires a freeze fails at once.
    fn unguarded(&self, request: &CheckpointRequest) -> Result<Option<String>> {
        if request.quiesce == QuiesceMode::Off || !self.is_running()? {
            return Ok(None);
        }
        match self.watch().map_err(|e| e.to_string()) {
            Err(reason) if request.quiesce == QuiesceMode::Require && self.is_running()? => {
                Err(EngineError::Quiesce(reason))
            }
            watched => Ok(watched.err()),
        }
    }

    /// Undoes a failed attempt. Gives its error, or the checkpoint if its record stands after all.
    fn take_back(
        &mut self,
        intent: &CheckpointIntent,
        error: EngineError,
    ) -> Result<CheckpointRecord> {
        if let Err(error) = self.undo_checkpoint(intent) {
            // The next operation tries again; until then the intent says so.
            tracing::warn!(vm = self.place.name, %error, "checkpoint not undone yet");
        }
        let stands = self.config.checkpoints.iter().find(|c| c.id == intent.id);
        stands.cloned().ok_or(error)
    }

    fn check_request(&self, request: &CheckpointRequest) -> Result<String> {
        if request.checkpoint_type == CheckpointType::Standard {
            return Err(EngineError::Invalid(
                "standard checkpoints (with memory) are not in this version; use --type production"
                    .to_owned(),
            ));
        }
        // A backup's checkpoint goes away again: a full tree must not keep a VM from being backed up.
        let most = MAX_CHECKPOINTS + usize::from(request.purpose == CheckpointPurpose::Backup);
        if self.config.checkpoints.len() >= most {
            return Err(EngineError::State(format!(
                "VM {} has {MAX_CHECKPOINTS} checkpoints, the most there may be; delete some first",
                self.place.name
            )));
        }
        let taken = |name: &str| self.config.checkpoints.iter().any(|c| c.name == name);
        match &request.name {
            Some(name) => {
                check_checkpoint_name(name).map_err(EngineError::Invalid)?;
                if taken(name) {
                    return Err(EngineError::Invalid(format!(
                        "VM {} has a checkpoint {name:?} already",
                        self.place.name
                    )));
                }
                Ok(name.clone())
            }
            None => {
                let now = Zoned::now().strftime("%m/%d/%Y - %I:%M:%S %p");
                let base = format!("{} ({now})", self.place.name);
                let numbered = (2..).map(|n| format!("{base} {n}"));
                let mut names = std::iter::once(base.clone()).chain(numbered);
                Ok(names.find(|n| !taken(n)).unwrap_or(base))
            }
        }
    }

    fn take(
        &self,
        intent: &mut CheckpointIntent,
        request: &CheckpointRequest,
        unguarded: Option<String>,
    ) -> Result<Taken> {
        match machine::process(&self.place)? {
            Some(machine) => self.take_online(intent, request, &machine, unguarded),
            None => {
                self.settle()?;
                self.take_offline(intent)
            }
        }
    }

    /// Says that the new leaves are complete: from now on they may be in use.
    fn enter_commit(&self, intent: &mut CheckpointIntent) -> Result<()> {
        fault::point("checkpoint-prepared");
        intent.phase = Phase::Committing;
        Intent::Checkpoint(intent.clone()).save(&self.place.folder)?;
        fault::point("checkpoint-committing");
        Ok(())
    }

    fn take_online(
        &self,
        intent: &mut CheckpointIntent,
        request: &CheckpointRequest,
        machine: &ProcessId,
        unguarded: Option<String>,
    ) -> Result<Taken> {
        let leaves: Vec<_> = intent
            .leaves
            .iter()
            .map(|l| (l.disk.clone(), self.place.folder.disk(&l.file)))
            .collect();
        // One connection for both steps: an owner that was restarted in between must not be asked to
        // switch to leaves that it has not prepared.
        let mut owner = owner::connect(&self.place.run)?;
        owner.call(&Request::PrepareCheckpoint { leaves: leaves.clone() }, PREPARE)?;
        self.enter_commit(intent)?;
        let alive = || machine.alive();
        let freeze = match unguarded {
            Some(reason) => Err(reason),
            None => self.quiesce(request, &alive)?,
        };
        let patience = if freeze.is_ok() { request.freeze_deadline } else { COMMIT };
        let committed = owner.call(&Request::CommitCheckpoint { leaves }, patience);
        // Thaw first, whatever became of the switch.
        let (consistency, freeze_us) = match freeze {
            Ok(freeze) => judge(freeze.end(), request.quiesce),
            Err(reason) => (Ok(Consistency::Crash { reason }), 0),
        };
        fault::point("checkpoint-switched");
        let (disks, pause_us) = committed_disks(committed?)?;
        // Durable before it is recorded; the guest runs meanwhile.
        owner.call(&Request::SettleCheckpoint, COMMIT)?;
        fault::point("checkpoint-settled");
        Ok(Taken { disks, consistency: consistency?, freeze_us, pause_us })
    }

    /// Freezes the guest as far as asked for: the freeze, or why there is none.
    fn quiesce<'f>(
        &'f self,
        request: &CheckpointRequest,
        alive: &'f dyn Fn() -> bool,
    ) -> Result<std::result::Result<Freeze<'f>, String>> {
        if request.quiesce == QuiesceMode::Off {
            return Ok(Err("quiescing was switched off".to_owned()));
        }
        match Freeze::begin(&self.place.run, request.freeze_deadline, alive) {
            Ok(freeze) => Ok(Ok(freeze)),
            Err(reason) if request.quiesce == QuiesceMode::Require => {
                Err(EngineError::Quiesce(reason))
            }
            Err(reason) => Ok(Err(reason)),
        }
    }

    fn take_offline(&self, intent: &mut CheckpointIntent) -> Result<Taken> {
        let folder = &self.place.folder;
        let mut chains = Vec::new();
        for (disk, new) in self.config.disks.iter().zip(&intent.leaves) {
            let chain = Chain::open(&folder.disk(&disk.leaf), Access::ReadWrite)?;
            chain.prepare_leaf(&folder.disk(&new.file))?;
            chains.push((chain, new.clone()));
        }
        self.enter_commit(intent)?;
        let mut disks = Vec::new();
        for (chain, new) in &chains {
            let rct_id = chain.switch_leaf(&chain.pause(), &folder.disk(&new.file))?;
            disks.push(CommittedDisk { disk: new.disk.clone(), rct_id });
            fault::point("checkpoint-switched");
        }
        for (chain, _) in &chains {
            chain.close()?;
        }
        Ok(Taken { disks, consistency: Consistency::Offline, freeze_us: 0, pause_us: 0 })
    }

    /// Writes the record: the commit point is the rename of `vm.vmcx`.
    fn record_checkpoint(
        &mut self,
        intent: &CheckpointIntent,
        name: String,
        request: &CheckpointRequest,
        taken: Taken,
    ) -> Result<CheckpointRecord> {
        let mut config = self.config.clone();
        let record = CheckpointRecord {
            id: intent.id,
            name,
            created: format!("{:.3}", Timestamp::now()),
            checkpoint_type: request.checkpoint_type,
            purpose: request.purpose,
            consistency: taken.consistency,
            disks: sealed_disks(&config, &taken.disks)?,
            freeze_us: taken.freeze_us,
            pause_us: taken.pause_us,
        };
        for disk in &mut config.disks {
            if let Some(leaf) = intent.leaf_of(&disk.name) {
                leaf.clone_into(&mut disk.leaf);
            }
        }
        config.checkpoints.push(record.clone());
        self.write_snapshot(&record)?;
        fault::point("checkpoint-snapshot");
        config.save(&self.place.folder.config())?;
        self.config = config;
        fault::point("checkpoint-recorded");
        Intent::clear(&self.place.folder)?;
        Ok(record)
    }

    /// Writes `snapshots/<checkpoint>.vmcx`: the VM as it was, on the files that hold that state.
    pub(crate) fn write_snapshot(&self, record: &CheckpointRecord) -> Result<()> {
        let mut config = self.config.clone();
        for disk in &mut config.disks {
            if let Some(sealed) = record.disks.iter().find(|d| d.name == disk.name) {
                disk.leaf.clone_from(&sealed.file);
            }
        }
        let earlier = config.checkpoints.iter().position(|c| c.id == record.id);
        config.checkpoints.truncate(earlier.unwrap_or(config.checkpoints.len()));
        config.save(&self.place.folder.snapshot(record.id))
    }
}

/// What consistency a freeze has brought, now that it is over.
fn judge(thawed: Thawed, mode: QuiesceMode) -> (Result<Consistency>, u64) {
    let consistency = match thawed.broken {
        None => Ok(Consistency::FileSystem { frozen: thawed.frozen }),
        Some(reason) if mode == QuiesceMode::Require => Err(EngineError::Quiesce(reason)),
        Some(reason) => Ok(Consistency::Crash { reason }),
    };
    (consistency, thawed.frozen_us)
}

fn committed_disks(response: Response) -> Result<(Vec<CommittedDisk>, u64)> {
    match response {
        Response::Committed { pause_us, disks } => Ok((disks, pause_us)),
        other => Err(DiskError::Owner(format!("unexpected answer {other:?}")).into()),
    }
}

/// The files that were sealed: the leaves so far.
fn sealed_disks(config: &VmConfig, committed: &[CommittedDisk]) -> Result<Vec<CheckpointDisk>> {
    let sealed = config.disks.iter().map(|disk| {
        let found = committed.iter().find(|c| c.disk == disk.name).ok_or_else(|| {
            DiskError::Owner(format!("disk {} is missing in the answer", disk.name))
        })?;
        Ok(CheckpointDisk {
            name: disk.name.clone(),
            file: disk.leaf.clone(),
            rct_id: found.rct_id.clone(),
        })
    });
    sealed.collect()
}
