//! The exclusive right to change one VM.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use tidemark_disk::chain::{Chain, ChangedPage};
use tidemark_disk::rct::RctId;
use tidemark_disk::vhdx::{Access, Vhdx};
use tidemark_disk::{Block, DiskError};
use tidemark_driver::{DriverKind, MachineDisk, MachineNic, MachineSpec};

use crate::config::VmConfig;
use crate::engine::{Engine, Place};
use crate::error::{EngineError, Result};
use crate::intent::Intent;
use crate::leaves::{current_leaves, leaf_of};
use crate::lock::FileLock;
use crate::runtime::log_tail;
use crate::{guard, machine, owner, spawn, store};

/// Longest clean close of a VM's disks after its end.
const CLOSE: Duration = Duration::from_secs(300);
/// Longest end of a machine whose plug has been pulled.
const KILLED: Duration = Duration::from_secs(30);
/// How long a sealed file may stay with the process that sealed it, and how often we look.
const SEALED: Duration = Duration::from_secs(10);
const BUSY_RETRY: Duration = Duration::from_millis(20);

/// The exclusive right to change one VM, held by file lock until dropped or the process ends.
/// Taking it finishes or undoes half-done work first; what cannot be finished then is tried again by
/// the operations that need it, and is shown as `pending` until it succeeds.
pub struct VmSession<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) place: Place,
    pub(crate) config: VmConfig,
    _lock: FileLock,
}

impl Engine {
    /// Takes the VM for changes; recovers it first. `Busy` if another process has it.
    pub fn session(&self, vm: &str) -> Result<VmSession<'_>> {
        let folder = self.folder(vm)?;
        let lock = match FileLock::try_take(&folder.lock_file()) {
            Ok(lock) => lock,
            // Deleted since we looked.
            Err(_) if !folder.root().exists() => return Err(EngineError::NoSuchVm(vm.to_owned())),
            Err(e) => return Err(e),
        };
        let mut lock = lock.ok_or_else(|| EngineError::Busy(vm.to_owned()))?;
        lock.sign();
        let (folder, config) = self.load(vm)?;
        let place = self.place(folder, &config);
        let mut session = VmSession { engine: self, place, config, _lock: lock };
        if let Err(error) = session.recover() {
            // A VM with work that cannot be finished now (no space, say) must still start and stop.
            tracing::warn!(vm, %error, "half-done work could not be finished yet");
        }
        Ok(session)
    }
}

impl VmSession<'_> {
    /// The configuration as it stands.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Whether the machine runs.
    pub(crate) fn is_running(&self) -> Result<bool> {
        Ok(machine::process(&self.place)?.is_some())
    }

    /// Starts the VM.
    pub fn start(&mut self) -> Result<()> {
        let name = &self.place.name;
        if self.is_running()? {
            return Err(EngineError::State(format!("VM {name} is running already")));
        }
        if self.place.driver != DriverKind::Qemu {
            return Err(no_kvm_driver());
        }
        self.settle()?;
        let spec = self.machine_spec()?;
        owner::ensure(&self.place)?;
        // A kill from here on leaves an owner without a machine, which the next session shuts down,
        // or a machine without a guard, which the next session gives one.
        let launched = tidemark_driver::launch(self.place.driver, &spec)
            .map_err(EngineError::from)
            .and_then(|machine| self.watch().map_err(|e| (machine, e)).or_else(give_up));
        if let Err(error) = launched {
            if let Err(also) = owner::shutdown(&self.place.run, CLOSE) {
                tracing::warn!(error = %also, "closing the disks after a failed start");
            }
            return Err(error);
        }
        Ok(())
    }

    /// Makes sure that the running VM has its guard.
    pub(crate) fn watch(&self) -> Result<()> {
        let place = &self.place;
        let mut command = spawn::vm_guard(&place.program, &place.data_dir, &place.name);
        guard::ensure(&place.run, &mut command)
    }

    fn machine_spec(&self) -> Result<MachineSpec> {
        let (config, folder, run) = (&self.config, &self.place.folder, &self.place.run);
        let boot = |file: &Option<String>| -> Result<Option<PathBuf>> {
            let Some(file) = file else { return Ok(None) };
            let path = folder.boot().join(file);
            if store::exists(&path)? {
                return Ok(Some(path));
            }
            Err(EngineError::State(format!(
                "boot file {} is missing; put it back to start the VM",
                path.display()
            )))
        };
        let intent = Intent::load(folder)?;
        let mut disks = Vec::new();
        for (name, leaf) in current_leaves(folder, config, intent.as_ref())? {
            let geometry = Vhdx::open(&leaf, Access::ReadOnly)?.properties().geometry;
            disks.push(MachineDisk {
                name,
                sectors: (geometry.logical_sector, geometry.physical_sector),
            });
        }
        crate::folder::make_dir(&folder.logs())?;
        Ok(MachineSpec {
            name: config.name.clone(),
            vm_id: config.id,
            generation_id: config.generation_id,
            cpus: config.cpus,
            memory: config.memory,
            kernel: boot(&config.kernel)?,
            initrd: boot(&config.initrd)?,
            cmdline: config.cmdline.clone(),
            disks,
            nics: config.macs.iter().map(|mac| MachineNic { mac: mac.clone() }).collect(),
            nbd_socket: run.nbd_socket(),
            run_dir: run.path().to_owned(),
            console_log: folder.console_log(),
        })
    }

    /// Stops it: power button, then (`force` or after `timeout`) the plug. Gives whether it was forced.
    pub fn stop(&mut self, force: bool, timeout: Duration) -> Result<bool> {
        let Some(mut machine) = machine::attach(&self.place)? else {
            return Err(EngineError::State(format!("VM {} is not running", self.place.name)));
        };
        let mut forced = force;
        if !forced {
            machine.press_power_button()?;
            forced = !machine.wait_stopped(timeout)?;
        }
        if forced {
            machine.kill()?;
            if !machine.wait_stopped(KILLED)? {
                return Err(EngineError::State(format!(
                    "process {} of VM {} does not end",
                    machine.pid(),
                    self.place.name
                )));
            }
        }
        drop(machine);
        self.settle()?;
        Ok(forced)
    }

    /// With the machine ended: waits until guard and disk owner have closed the disks, and does it for
    /// them if they cannot.
    pub(crate) fn settle(&self) -> Result<()> {
        let run = &self.place.run;
        run.create()?;
        if let Some(guard) = run.guard_pid().filter(|guard| !guard.wait(CLOSE)) {
            return Err(EngineError::State(format!(
                "the VM's guard (process {}) does not end: {}",
                guard.pid,
                log_tail(&run.guard_log())
            )));
        }
        owner::shutdown(run, CLOSE)?;
        store::remove_file(&run.frozen_marker())?;
        run.clear_guard()
    }

    /// Makes sure that nothing uses the VM's files any more, which are about to go away.
    pub(crate) fn release(&self) -> Result<()> {
        if self.is_running()? {
            return Err(EngineError::State(format!(
                "VM {name} is running; stop it first (`tidemark vm stop {name}`)",
                name = self.place.name
            )));
        }
        self.settle()
    }

    /// Deletes the stopped VM and its files.
    pub fn delete(self) -> Result<()> {
        self.release()?;
        self.place.folder.remove(&self.engine.vms())?;
        self.place.run.remove();
        Ok(())
    }

    /// Opens a checkpoint's disks read-only. They must be closed again before the checkpoint can be
    /// deleted.
    pub fn open_checkpoint(&self, id: Uuid) -> Result<Vec<OpenCheckpointDisk>> {
        let record = self.config.checkpoints.iter().find(|c| c.id == id).ok_or_else(|| {
            EngineError::NoSuchCheckpoint {
                vm: self.place.name.clone(),
                checkpoint: id.to_string(),
            }
        })?;
        record
            .disks
            .iter()
            .map(|disk| {
                let file = self.place.folder.disk(&disk.file);
                let chain = Arc::new(open_shared(&file)?);
                Ok(OpenCheckpointDisk {
                    name: disk.name.clone(),
                    rct_id: disk.rct_id.clone(),
                    disk: Arc::clone(&chain) as Arc<dyn Block>,
                    chain,
                })
            })
            .collect()
    }

    /// The stopped VM's disk, open for writing with change tracking, for whoever serves it. Close it
    /// while the session lasts.
    pub fn open_disk(&self, disk: &str, access: Access) -> Result<Arc<Chain>> {
        if self.is_running()? {
            return Err(EngineError::State(format!(
                "VM {} is running; its disks belong to it",
                self.place.name
            )));
        }
        self.settle()?;
        let leaf = leaf_of(&self.place, &self.config, disk)?;
        Ok(Arc::new(Chain::open(&leaf, access)?))
    }

    /// Files that a restore needs besides the disks (kernel, initial RAM disk): name and path.
    pub fn boot_files(&self) -> Vec<(String, PathBuf)> {
        let boot = self.place.folder.boot();
        let names = self.config.kernel.iter().chain(&self.config.initrd);
        names.map(|name| (name.clone(), boot.join(name))).collect()
    }
}

/// Opens a sealed file, waiting for whoever is just closing it after the seal.
fn open_shared(file: &Path) -> Result<Chain> {
    let end = Instant::now() + SEALED;
    loop {
        match Chain::open(file, Access::ReadOnly) {
            Err(DiskError::Busy { .. }) if Instant::now() < end => std::thread::sleep(BUSY_RETRY),
            opened => return Ok(opened?),
        }
    }
}

/// A machine that cannot be watched must not run: nobody would keep its disks alive.
fn give_up((mut machine, error): (Box<dyn tidemark_driver::Machine>, EngineError)) -> Result<()> {
    machine.kill()?;
    machine.wait_stopped(KILLED)?;
    Err(error)
}

pub(crate) fn no_kvm_driver() -> EngineError {
    EngineError::Invalid("the kvm driver is not part of this version; use --driver qemu".to_owned())
}

/// A checkpoint's disk, open for reading.
pub struct OpenCheckpointDisk {
    /// Disk name.
    pub name: String,
    /// The id it was sealed under.
    pub rct_id: RctId,
    /// Its content.
    pub disk: Arc<dyn Block>,
    /// The chain, for `changed_since`.
    pub chain: Arc<Chain>,
}

impl OpenCheckpointDisk {
    /// Ranges that may differ from `id`, from `offset` on; `UnknownRctId` where only a full read is
    /// safe. See [`Chain::changed_since_from`].
    pub fn changed_since_from(
        &self,
        id: &RctId,
        offset: u64,
        max_ranges: usize,
    ) -> std::result::Result<ChangedPage, DiskError> {
        self.chain.changed_since_from(id, offset, max_ranges)
    }
}
