//! VMs and their folders, checkpoints, quiesce, and the recovery of half-done work.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use tidemark_disk::rct::RctId;
use tidemark_disk::{Block, BlockRange, DiskError};
use tidemark_driver::agent::ExecResult;
use tidemark_driver::{DriverError, DriverKind, MachineState};

/// Errors of VM and checkpoint operations.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A disk operation.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A driver or guest agent operation.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A file of the data directory.
    #[error("{op} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// No such VM.
    #[error("there is no VM named {0}; `tidemark vm list` shows them")]
    NoSuchVm(String),
    /// The name is taken.
    #[error("a VM named {0} exists already")]
    VmExists(String),
    /// No such checkpoint.
    #[error("VM {vm} has no checkpoint {checkpoint}; `tidemark checkpoint list {vm}` shows them")]
    NoSuchCheckpoint {
        /// The VM.
        vm: String,
        /// What was asked for.
        checkpoint: String,
    },
    /// Another process is working on the VM.
    #[error("VM {0} is busy: another operation on it is running; try again when it has finished")]
    Busy(String),
    /// Quiesce was required and did not succeed.
    #[error("the guest could not be quiesced ({0}); no checkpoint was taken. Use --quiesce try to accept a crash-consistent one")]
    Quiesce(String),
    /// A configuration or record file is damaged.
    #[error("{path} is damaged: {what}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The operation does not fit the VM's state.
    #[error("{0}")]
    State(String),
    /// The arguments make no sense.
    #[error("{0}")]
    Invalid(String),
    /// Cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// Result of an engine operation.
pub type Result<T> = std::result::Result<T, EngineError>;

/// One disk of a VM's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Disk name, unique in the VM: `disk0`.
    pub name: String,
    /// File name of the current leaf, in the VM's `disks` folder.
    pub leaf: String,
}

/// A VM's configuration: the content of `vm.vmcx`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Name, 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Identity; a restore as a new VM gets a new one.
    pub id: Uuid,
    /// VM generation id.
    pub generation_id: Uuid,
    /// Driver.
    pub driver: DriverKind,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// File name of the kernel in the VM's `boot` folder.
    pub kernel: Option<String>,
    /// File name of the initial RAM disk in the VM's `boot` folder.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// MAC addresses.
    pub macs: Vec<String>,
    /// Disks, in order.
    pub disks: Vec<DiskConfig>,
    /// Checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointRecord>,
}

/// What a checkpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointPurpose {
    /// Made by a person or script; stays until deleted.
    User,
    /// Made by a backup run; merged away when the run ends or is found dead.
    Backup,
}

/// Checkpoint type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointType {
    /// Disks of a quiesced guest.
    Production,
    /// Memory, devices and disks.
    Standard,
}

/// How hard to try for a quiesced guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuiesceMode {
    /// Fail without it.
    Require,
    /// Fall back to crash-consistent and say so.
    Try,
    /// Do not try.
    Off,
}

/// What consistency was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "level", rename_all = "kebab-case")]
pub enum Consistency {
    /// File systems were frozen by the guest agent.
    FileSystem {
        /// How many.
        frozen: u64,
    },
    /// Like after a power cut.
    Crash {
        /// Why no more was reached.
        reason: String,
    },
    /// The VM was off.
    Offline,
}

/// A checkpoint's disk: a sealed file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDisk {
    /// Disk name.
    pub name: String,
    /// File name of the file that holds this checkpoint's state (the parent of the then new leaf).
    pub file: String,
    /// The id it was sealed under.
    pub rct_id: RctId,
}

/// A checkpoint as recorded in the VM's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// Identity.
    pub id: Uuid,
    /// Name, 1 to 99 characters.
    pub name: String,
    /// Creation time, RFC 3339 UTC.
    pub created: String,
    /// Type.
    pub checkpoint_type: CheckpointType,
    /// Purpose.
    pub purpose: CheckpointPurpose,
    /// Consistency.
    pub consistency: Consistency,
    /// Sealed disks.
    pub disks: Vec<CheckpointDisk>,
    /// How long the guest's file systems were frozen, in microseconds.
    pub freeze_us: u64,
    /// How long disk I/O was held back, in microseconds.
    pub pause_us: u64,
}

/// What to create.
#[derive(Debug, Clone)]
pub struct CreateVm {
    /// Name.
    pub name: String,
    /// Driver.
    pub driver: DriverKind,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Kernel to copy in.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk to copy in.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Disks, in order.
    pub disks: Vec<NewDisk>,
}

/// Where a new VM's disk comes from.
#[derive(Debug, Clone)]
pub enum NewDisk {
    /// Empty, of this many bytes.
    Empty(u64),
    /// Imported: raw and vhdx by ourselves, qcow2 and vmdk through qemu-img.
    Import(PathBuf),
}

/// A VM as listed.
#[derive(Debug, Clone, Serialize)]
pub struct VmSummary {
    /// Configuration.
    pub config: VmConfig,
    /// State of the machine.
    pub state: MachineState,
    /// Half-done work that the next operation will finish or undo, for people.
    pub pending: Option<String>,
}

/// What checkpoint to take.
#[derive(Debug, Clone)]
pub struct CheckpointRequest {
    /// Name; `None`: the VM's name and the time.
    pub name: Option<String>,
    /// Type.
    pub checkpoint_type: CheckpointType,
    /// Quiesce mode.
    pub quiesce: QuiesceMode,
    /// Longest time that the guest may stay frozen.
    pub freeze_deadline: Duration,
    /// Purpose.
    pub purpose: CheckpointPurpose,
}

/// Progress of a longer engine operation: what, bytes done, bytes in all.
pub type Progress<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

/// How an engine is opened.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The program to run as disk owner (`<program> disk-server …`) and guard (`<program> vm-guard …`).
    pub program: PathBuf,
}

/// All VMs of one data directory.
pub struct Engine {
    _private: (),
}

/// The exclusive right to change one VM, held by OFD lock until dropped or the process ends.
/// Taking it finishes or undoes half-done work first.
pub struct VmSession<'a> {
    _engine: &'a Engine,
}

impl Engine {
    /// Opens (creating if needed) a data directory.
    pub fn open(_data_dir: &Path, _options: EngineOptions) -> Result<Self> {
        todo!()
    }
    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        todo!()
    }
    /// All VMs, by name.
    pub fn list(&self) -> Result<Vec<VmSummary>> {
        todo!()
    }
    /// One VM.
    pub fn show(&self, _vm: &str) -> Result<VmSummary> {
        todo!()
    }
    /// Creates a VM. All or nothing: a half-made folder is removed, also after a kill.
    pub fn create(&self, _request: &CreateVm, _progress: Progress<'_>) -> Result<VmConfig> {
        todo!()
    }
    /// Makes an empty VM folder for a restore: new disks of these geometries, written through the
    /// returned chains; visible only after [`NewVm::commit`].
    pub fn begin_restore(&self, _request: &RestoreVm) -> Result<NewVm> {
        todo!()
    }
    /// Runs a program in the guest.
    pub fn exec(
        &self,
        _vm: &str,
        _program: &str,
        _args: &[String],
        _stdin: Option<&[u8]>,
        _timeout: Duration,
    ) -> Result<ExecResult> {
        todo!()
    }
    /// Waits until the guest agent answers.
    pub fn wait_agent(&self, _vm: &str, _timeout: Duration) -> Result<()> {
        todo!()
    }
    /// Takes the VM for changes; recovers it first. `Busy` if another process has it.
    pub fn session(&self, _vm: &str) -> Result<VmSession<'_>> {
        todo!()
    }
}

impl VmSession<'_> {
    /// The configuration as it stands.
    pub fn config(&self) -> &VmConfig {
        todo!()
    }
    /// Starts the VM.
    pub fn start(&mut self) -> Result<()> {
        todo!()
    }
    /// Stops it: power button, then (`force` or after `timeout`) the plug. Gives whether it was forced.
    pub fn stop(&mut self, _force: bool, _timeout: Duration) -> Result<bool> {
        todo!()
    }
    /// Deletes the stopped VM and its files.
    pub fn delete(self) -> Result<()> {
        todo!()
    }
    /// Takes a checkpoint.
    pub fn create_checkpoint(&mut self, _request: &CheckpointRequest) -> Result<CheckpointRecord> {
        todo!()
    }
    /// Deletes a checkpoint: merges its child into it. By id or name.
    pub fn delete_checkpoint(
        &mut self,
        _checkpoint: &str,
        _progress: Progress<'_>,
        _cancel: &std::sync::atomic::AtomicBool,
    ) -> Result<()> {
        todo!()
    }
    /// Opens a checkpoint's disks read-only.
    pub fn open_checkpoint(&self, _id: Uuid) -> Result<Vec<OpenCheckpointDisk>> {
        todo!()
    }
    /// Files that a restore needs besides the disks (kernel, initial RAM disk): name and path.
    pub fn boot_files(&self) -> Vec<(String, PathBuf)> {
        todo!()
    }
}

/// A checkpoint's disk, open for reading.
pub struct OpenCheckpointDisk {
    /// Disk name.
    pub name: String,
    /// The id it was sealed under.
    pub rct_id: RctId,
    /// Its content.
    pub disk: std::sync::Arc<dyn Block>,
    /// The chain, for `changed_since`.
    pub chain: std::sync::Arc<tidemark_disk::chain::Chain>,
}

impl OpenCheckpointDisk {
    /// Ranges that may differ from `id`; `UnknownRctId` where only a full read is safe.
    pub fn changed_since(&self, id: &RctId) -> std::result::Result<Vec<BlockRange>, DiskError> {
        self.chain.changed_since(id)
    }
}

/// A VM to be made from a restore point.
#[derive(Debug, Clone)]
pub struct RestoreVm {
    /// Name of the new VM.
    pub name: String,
    /// The configuration as backed up; identities are replaced by new ones.
    pub config: VmConfig,
    /// Disk names, sizes, sector sizes (logical, physical), in order.
    pub disks: Vec<(String, tidemark_disk::Geometry)>,
    /// Boot files: name and content.
    pub boot: Vec<(String, Vec<u8>)>,
    /// Keep ids, MAC addresses and disk ids (restore in place of a VM that is gone).
    pub keep_identity: bool,
}

/// A VM folder under construction; dropped without `commit` it is removed.
pub struct NewVm {
    /// The new disks, in order, for writing.
    pub disks: Vec<(String, std::sync::Arc<dyn Block>)>,
}

impl NewVm {
    /// Flushes the disks and makes the VM visible under its name.
    pub fn commit(self) -> Result<VmConfig> {
        todo!()
    }
}
