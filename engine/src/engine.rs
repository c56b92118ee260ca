//! All VMs of one data directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use tidemark_driver::agent::ExecResult;
use tidemark_driver::{DriverError, DriverKind, MachineState};

use crate::config::{CheckpointPurpose, VmConfig, VmSummary, check_name};
use crate::error::{EngineError, Result};
use crate::folder::{self, VmFolder};
use crate::intent::Intent;
use crate::lock::FileLock;
use crate::process::ProcessId;
use crate::runtime::RunDir;
use crate::{agent, leaves, machine, store};

/// How an engine is opened.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The program to run as disk owner (`<program> disk-server …`) and guard (`<program> vm-guard …`).
    pub program: PathBuf,
}

/// All VMs of one data directory.
pub struct Engine {
    data_dir: PathBuf,
    options: EngineOptions,
}

/// Where one VM is, and what it is run with: everything but its changing state.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) data_dir: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) name: String,
    pub(crate) driver: DriverKind,
    pub(crate) folder: VmFolder,
    pub(crate) run: RunDir,
}

impl Engine {
    /// Opens (creating if needed) a data directory, and removes what killed creations and deletions
    /// left in it.
    pub fn open(data_dir: &Path, options: EngineOptions) -> Result<Self> {
        for dir in [data_dir.to_owned(), data_dir.join("vms"), data_dir.join("run")] {
            folder::make_dir(&dir)?;
        }
        let engine = Self::at(data_dir, options)?;
        folder::clean_up(&engine.vms())?;
        Ok(engine)
    }

    /// Opens an existing data directory without changing anything.
    pub(crate) fn at(data_dir: &Path, options: EngineOptions) -> Result<Self> {
        let canonical =
            data_dir.canonicalize().map_err(|e| EngineError::io("open", data_dir, e))?;
        Ok(Self { data_dir: canonical, options })
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Where the VM's serial console is logged.
    pub fn console_log(&self, vm: &str) -> Result<PathBuf> {
        Ok(self.folder(vm)?.console_log())
    }

    pub(crate) fn vms(&self) -> PathBuf {
        self.data_dir.join("vms")
    }

    /// The folder of a VM that exists.
    pub(crate) fn folder(&self, vm: &str) -> Result<VmFolder> {
        check_name("VM name", vm).map_err(|_| EngineError::NoSuchVm(vm.to_owned()))?;
        let folder = VmFolder::of(&self.vms(), vm);
        if store::exists(folder.root())? {
            return Ok(folder);
        }
        Err(EngineError::NoSuchVm(vm.to_owned()))
    }

    pub(crate) fn place(&self, folder: VmFolder, config: &VmConfig) -> Place {
        Place {
            data_dir: self.data_dir.clone(),
            program: self.options.program.clone(),
            name: config.name.clone(),
            driver: config.driver,
            run: RunDir::locate(&self.data_dir, &config.name, config.id),
            folder,
        }
    }

    /// Reads a VM's configuration.
    pub(crate) fn load(&self, vm: &str) -> Result<(VmFolder, VmConfig)> {
        let folder = self.folder(vm)?;
        let mut config = VmConfig::load(&folder.config())?;
        // A folder copied under another name is that VM.
        vm.clone_into(&mut config.name);
        Ok((folder, config))
    }

    /// All VMs, by name. One whose configuration cannot be read is listed with what is wrong.
    pub fn list(&self) -> Result<Vec<VmSummary>> {
        let mut all = Vec::new();
        for name in folder::entries(&self.vms())? {
            if name.starts_with('.') || !self.vms().join(&name).is_dir() {
                continue;
            }
            match self.show(&name) {
                Ok(summary) => all.push(summary),
                // Deleted just now.
                Err(EngineError::NoSuchVm(_)) => {}
                Err(error) => all.push(unreadable(&name, &error)),
            }
        }
        Ok(all)
    }

    /// One VM.
    pub fn show(&self, vm: &str) -> Result<VmSummary> {
        let (folder, config) = self.load(vm)?;
        let place = self.place(folder, &config);
        let state = machine::state(&place)?;
        let pending = pending(&place, &config);
        Ok(VmSummary { config, state, pending })
    }

    /// Runs a program in the guest.
    pub fn exec(
        &self,
        vm: &str,
        program: &str,
        args: &[String],
        stdin: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<ExecResult> {
        let (place, id) = self.running(vm)?;
        agent::exec(&place.run, program, args, stdin, timeout, &|| id.alive())
    }

    /// Waits until the guest agent answers.
    pub fn wait_agent(&self, vm: &str, timeout: Duration) -> Result<()> {
        let (place, id) = self.running(vm)?;
        agent::wait(&place.run, timeout, &|| id.alive())
    }

    fn running(&self, vm: &str) -> Result<(Place, ProcessId)> {
        let (folder, config) = self.load(vm)?;
        let place = self.place(folder, &config);
        let id = machine::process(&place)?.ok_or(DriverError::NotRunning)?;
        Ok((place, id))
    }
}

/// A VM that cannot be read is still there, and says why.
fn unreadable(name: &str, error: &EngineError) -> VmSummary {
    let config = VmConfig {
        name: name.to_owned(),
        id: Uuid::nil(),
        generation_id: Uuid::nil(),
        driver: DriverKind::Qemu,
        cpus: 0,
        memory: 0,
        kernel: None,
        initrd: None,
        cmdline: None,
        macs: Vec::new(),
        disks: Vec::new(),
        checkpoints: Vec::new(),
    };
    VmSummary { config, state: MachineState::Stopped, pending: Some(error.to_string()) }
}

/// Half-done work that nobody is at, for people.
fn pending(place: &Place, config: &VmConfig) -> Option<String> {
    if FileLock::holder(&place.folder.lock_file()).is_some() {
        return None;
    }
    let mut notes = Vec::new();
    match Intent::load(&place.folder) {
        Ok(Some(intent)) => notes.push(intent.describe(config)),
        Ok(None) => {}
        Err(error) => notes.push(error.to_string()),
    }
    for checkpoint in &config.checkpoints {
        if checkpoint.purpose == CheckpointPurpose::Backup {
            let name = &checkpoint.name;
            notes.push(format!("checkpoint {name:?} of a backup that has ended is to be merged"));
        }
    }
    match leaves::strangers(&place.folder, config) {
        Ok(files) if files.is_empty() => {}
        Ok(files) => notes.push(format!(
            "disk files that nothing refers to: {}; look at them with `tidemark disk info`",
            files.join(", ")
        )),
        Err(error) => notes.push(error.to_string()),
    }
    (!notes.is_empty()).then(|| notes.join("; "))
}
