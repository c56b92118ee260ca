//! The `Machine` interface and its drivers: how a VM is launched, watched and talked to, whatever
//! hypervisor runs it. Knows nothing of disks but the NBD socket and export they are served from.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub mod agent;
mod channel;
pub mod probe;
pub mod qemu;

/// Errors of drivers and of the guest agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// A program or file of the host.
    #[error("{op} {what}: {source}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The hypervisor ended before it was ready; its last words follow.
    #[error("the virtual machine monitor ended at start: {0}")]
    LaunchFailed(String),
    /// QMP answered with an error.
    #[error("QMP {command}: {message}")]
    Qmp {
        /// The command.
        command: String,
        /// The error's text.
        message: String,
    },
    /// The guest agent did not answer in time: not installed, not running, or the guest is busy.
    #[error(
        "the guest agent did not answer {command} within {seconds} s; is qemu-guest-agent running in the guest?"
    )]
    AgentTimeout {
        /// The command.
        command: String,
        /// Seconds waited.
        seconds: u64,
    },
    /// The guest agent answered with an error.
    #[error("guest agent {command}: {message}")]
    Agent {
        /// The command.
        command: String,
        /// The error's text.
        message: String,
    },
    /// The guest agent does not know the command, or its configuration forbids it.
    #[error("the guest agent does not offer {command}: {message}")]
    AgentUnsupported {
        /// The command.
        command: String,
        /// The error's text.
        message: String,
    },
    /// The machine is gone.
    #[error("the virtual machine is not running")]
    NotRunning,
}

impl DriverError {
    /// An error of the system on a path.
    pub(crate) fn io(op: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let what = path.display().to_string();
        move |source| Self::Io { op, what, source }
    }
}

/// Result of a driver operation.
pub type Result<T> = std::result::Result<T, DriverError>;

/// Which virtual machine monitor runs a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverKind {
    /// `qemu-system-x86_64`, with KVM or TCG.
    Qemu,
    /// Tidemark's own monitor.
    Kvm,
}

/// A disk as the machine sees it.
#[derive(Debug, Clone)]
pub struct MachineDisk {
    /// Disk name; also the NBD export's name and, cut to 20 bytes, the guest-visible serial.
    pub name: String,
    /// Logical and physical sector size.
    pub sectors: (u32, u32),
}

/// A network card.
#[derive(Debug, Clone)]
pub struct MachineNic {
    /// MAC address, `52:54:00:…`.
    pub mac: String,
}

/// Everything needed to launch a machine.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// VM name, for the process title.
    pub name: String,
    /// SMBIOS UUID.
    pub vm_id: Uuid,
    /// VM generation id.
    pub generation_id: Uuid,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Direct kernel boot; without it the firmware boots the first disk.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Disks, in order.
    pub disks: Vec<MachineDisk>,
    /// Network cards.
    pub nics: Vec<MachineNic>,
    /// Socket on which the disk owner serves `disks` over NBD.
    pub nbd_socket: PathBuf,
    /// Directory for this machine's sockets and process id file (short: sockets have 107 bytes).
    pub run_dir: PathBuf,
    /// The serial console goes here, appended.
    pub console_log: PathBuf,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// Executing.
    Running,
    /// Stopped with its state kept.
    Paused,
    /// No process.
    Stopped,
}

/// A launched machine. Implementations hold no guest state: another process may attach to the same
/// machine after this one has gone.
pub trait Machine: Send {
    /// What it is doing now.
    fn state(&mut self) -> Result<MachineState>;
    /// Process id of the monitor.
    fn pid(&self) -> u32;
    /// Presses the power button.
    fn press_power_button(&mut self) -> Result<()>;
    /// Waits until the machine has ended; false after `timeout`.
    fn wait_stopped(&mut self, timeout: Duration) -> Result<bool>;
    /// Ends it at once, as if the power were cut.
    fn kill(&mut self) -> Result<()>;
    /// Stops the virtual processors.
    fn pause(&mut self) -> Result<()>;
    /// Starts them again.
    fn resume(&mut self) -> Result<()>;
    /// What runs it, for people: "qemu 7.2.22 (kvm)".
    fn description(&self) -> String;
}

/// Launches a machine; it survives the caller.
pub fn launch(kind: DriverKind, spec: &MachineSpec) -> Result<Box<dyn Machine>> {
    match kind {
        DriverKind::Qemu => Ok(Box::new(qemu::Qemu::launch(spec)?)),
        DriverKind::Kvm => Err(DriverError::LaunchFailed(
            "the kvm driver is not part of this version; use --driver qemu".to_owned(),
        )),
    }
}

/// Attaches to the machine launched with this run directory; `None` if none is running.
pub fn attach(kind: DriverKind, run_dir: &Path) -> Result<Option<Box<dyn Machine>>> {
    match kind {
        DriverKind::Qemu => {
            Ok(qemu::Qemu::attach(run_dir)?.map(|m| Box::new(m) as Box<dyn Machine>))
        }
        DriverKind::Kvm => Ok(None),
    }
}

/// Process id of the machine launched with this run directory, without asking it anything, so that
/// the answer comes at once whatever the machine is doing; `None` if none is running.
pub fn process_id(kind: DriverKind, run_dir: &Path) -> Result<Option<u32>> {
    match kind {
        DriverKind::Qemu => qemu::Qemu::process_id(run_dir),
        DriverKind::Kvm => Ok(None),
    }
}
