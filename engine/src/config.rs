//! What a VM is: its configuration, its checkpoints, and the rules their names and numbers obey.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use tidemark_disk::rct::RctId;
use tidemark_driver::{DriverKind, MachineState};

use crate::error::{EngineError, Result};
use crate::store;

/// Most checkpoints that a VM may have.
pub const MAX_CHECKPOINTS: usize = 50;
/// Most disks that a VM may have.
pub const MAX_DISKS: usize = 26;
/// Most network cards that a VM may have.
const MAX_NICS: usize = 8;
/// Version of the content of `vm.vmcx` and `snapshots/<checkpoint>.vmcx`.
pub const CONFIG_VERSION: u32 = 1;
/// What the first line of a configuration file begins with.
const CONFIG_KIND: &str = "tidemark-vmcx";

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

impl VmConfig {
    /// Reads and checks a configuration file.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let config: Self = store::read(path, CONFIG_KIND, CONFIG_VERSION)?;
        config.check().map_err(|what| EngineError::damaged(path, what))?;
        Ok(config)
    }

    /// Replaces a configuration file. A kill before the rename leaves the old one, after it the new
    /// one; never a mixture.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        self.check().map_err(EngineError::Invalid)?;
        store::write(path, CONFIG_KIND, CONFIG_VERSION, self)
    }

    /// Whether every name and number obeys the rules: nothing read from a file is trusted to stay
    /// inside the VM's folder.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        check_name("VM name", &self.name)?;
        check_processors(self.cpus)?;
        check_memory(self.memory)?;
        if self.disks.is_empty() || self.disks.len() > MAX_DISKS {
            return Err(format!("a VM has 1 to {MAX_DISKS} disks, not {}", self.disks.len()));
        }
        // One more than may be created: a limit must not make a VM unreadable.
        if self.checkpoints.len() > MAX_CHECKPOINTS + 1 {
            return Err(format!("more than {MAX_CHECKPOINTS} checkpoints"));
        }
        for (i, disk) in self.disks.iter().enumerate() {
            check_name("disk name", &disk.name)?;
            check_file_name(&disk.leaf)?;
            if self.disks.iter().take(i).any(|d| d.name == disk.name || d.leaf == disk.leaf) {
                return Err(format!("disk {} is there twice", disk.name));
            }
        }
        for file in self.kernel.iter().chain(&self.initrd) {
            check_file_name(file)?;
        }
        if self.macs.len() > MAX_NICS {
            return Err(format!("a VM has at most {MAX_NICS} network cards"));
        }
        self.macs.iter().try_for_each(|mac| check_mac(mac))?;
        self.checkpoints.iter().try_for_each(|c| self.check_checkpoint(c))
    }

    fn check_checkpoint(&self, checkpoint: &CheckpointRecord) -> std::result::Result<(), String> {
        check_checkpoint_name(&checkpoint.name)?;
        if self.checkpoints.iter().filter(|c| c.id == checkpoint.id).count() > 1 {
            return Err(format!("checkpoint {} is there twice", checkpoint.id));
        }
        for disk in &checkpoint.disks {
            check_file_name(&disk.file)?;
        }
        let same = checkpoint.disks.len() == self.disks.len()
            && checkpoint.disks.iter().zip(&self.disks).all(|(c, d)| c.name == d.name);
        if !same {
            return Err(format!("checkpoint {:?} does not have the VM's disks", checkpoint.name));
        }
        Ok(())
    }

    /// The file that lies above checkpoint `index` in `disk`'s chain: the next checkpoint's, or the
    /// leaf.
    pub(crate) fn child_of(&self, index: usize, disk: &str) -> Option<&str> {
        match self.checkpoints.get(index + 1) {
            Some(next) => next.disks.iter().find(|d| d.name == disk).map(|d| d.file.as_str()),
            None => self.disks.iter().find(|d| d.name == disk).map(|d| d.leaf.as_str()),
        }
    }

    /// Every disk file that the configuration refers to.
    pub(crate) fn disk_files(&self) -> impl Iterator<Item = &str> {
        let sealed = self.checkpoints.iter().flat_map(|c| &c.disks).map(|d| d.file.as_str());
        self.disks.iter().map(|d| d.leaf.as_str()).chain(sealed)
    }
}

/// Names of VMs and disks: 1 to 64 of `A-Z a-z 0-9 . _ -`, not beginning with a dot or a dash (which
/// a command line would take for an option).
pub(crate) fn check_name(what: &str, name: &str) -> std::result::Result<(), String> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let good =
        (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-']);
    if good {
        return Ok(());
    }
    Err(format!(
        "{what} {name:?} is not usable: 1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter, digit or _"
    ))
}

/// File names inside a VM's folder: one path component, never hidden, never going up.
pub(crate) fn check_file_name(name: &str) -> std::result::Result<(), String> {
    let good = (1..=200).contains(&name.len())
        && !name.starts_with('.')
        && !name.contains('/')
        && !name.chars().any(char::is_control);
    if good { Ok(()) } else { Err(format!("file name {name:?} is not allowed")) }
}

/// Names of checkpoints: 1 to 99 characters, none of them a control character, not an id.
pub(crate) fn check_checkpoint_name(name: &str) -> std::result::Result<(), String> {
    let count = name.chars().count();
    if name.trim().is_empty() || count > 99 {
        return Err(format!("a checkpoint name has 1 to 99 characters, not {count}"));
    }
    if name.chars().any(char::is_control) {
        return Err("a checkpoint name has no control characters".to_owned());
    }
    if Uuid::try_parse(name).is_ok() {
        return Err(format!("checkpoint name {name:?} looks like a checkpoint id"));
    }
    Ok(())
}

fn check_processors(cpus: u32) -> std::result::Result<(), String> {
    if (1..=255).contains(&cpus) {
        return Ok(());
    }
    Err(format!("a VM has 1 to 255 processors, not {cpus}"))
}

fn check_memory(memory: u64) -> std::result::Result<(), String> {
    if (16 << 20..=64 << 40).contains(&memory) {
        return Ok(());
    }
    Err(format!("a VM has 16 MiB to 64 TiB of memory, not {memory} bytes"))
}

fn check_mac(mac: &str) -> std::result::Result<(), String> {
    let good = mac.len() == 17
        && mac.split(':').count() == 6
        && mac.split(':').all(|b| b.len() == 2 && b.bytes().all(|c| c.is_ascii_hexdigit()));
    if good { Ok(()) } else { Err(format!("{mac:?} is not a MAC address")) }
}
