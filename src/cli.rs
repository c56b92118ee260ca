//! The command line: what can be asked. Every command has `--json`.

mod disk;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

pub(crate) use disk::{ConvertFormat, DiskCommand, FileArgs};

/// Backup and export of virtual machines, built on checkpoints.
#[derive(Debug, Parser)]
#[command(
    name = "tidemark",
    version,
    about,
    long_about = LONG_ABOUT,
    after_long_help = AFTER_HELP,
    disable_help_subcommand = true
)]
pub(crate) struct Cli {
    /// Folder with VMs, targets and run records
    #[arg(
        long,
        global = true,
        env = "TIDEMARK_DATA_DIR",
        default_value = "/var/lib/tidemark",
        value_name = "DIR"
    )]
    pub(crate) data_dir: PathBuf,
    /// Print one JSON document on standard output instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress, no notes; errors only
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,
}

const LONG_ABOUT: &str = "\
Backup and export of virtual machines, built on checkpoints.

Tidemark takes a production checkpoint of a running VM, reads only what changed since the last
restore point, stores it deduplicated, compressed and encrypted on one target, copies it to others,
and merges the checkpoint away. Any restore point starts as a new VM.

  tidemark vm create web --import web.qcow2 --memory 2G
  tidemark vm start web
  tidemark target add local /backup/tidemark --passphrase-file /etc/tidemark/pass
  tidemark target add cloud 's3://bucket/tidemark?endpoint=https://s3.example.com' --offsite
  tidemark backup run web
  tidemark restore vm latest:web --as web-test --start";

const AFTER_HELP: &str = "\
Secrets are never arguments. A repository's passphrase comes from the target's --passphrase-file,
else TIDEMARK_PASSPHRASE_<TARGET>, else TIDEMARK_PASSPHRASE, else a prompt; S3 keys from the target's
--credentials-file, else AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

Exit codes:
  0  done
  1  failed; the message says what to do
  2  the command line makes no sense
  3  done, but not all of it (a copy to a further target failed, a target could not be listed)
  4  the VM or file is in use by another operation; try again later
  5  there is no such VM, checkpoint, target, restore point or disk
  6  the guest could not be quiesced and --quiesce require forbids less
  7  damaged data was found; nothing of it was used
  130  cancelled; nothing visible was left behind";

/// Commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, start, stop and look at VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// Create, list and delete (merge) checkpoints
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Say where backups go
    #[command(subcommand)]
    Target(TargetCommand),
    /// Back up VMs, list and verify restore points
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Bring a restore point back: a VM, a disk, or as a block device
    #[command(subcommand)]
    Restore(RestoreCommand),
    /// Work on virtual disk files
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Look into a target's repository
    #[command(subcommand)]
    Repo(RepoCommand),
    /// Run the main job on a real VM, with everything it needs, and print what happened
    Demo(DemoArgs),
    /// Owns the disks of a running VM (started by `vm start`)
    #[command(hide = true)]
    DiskServer(DiskServerArgs),
    /// Watches over a running VM (started by `vm start`)
    #[command(hide = true)]
    VmGuard(VmGuardArgs),
}

/// `tidemark vm …`
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM from disk images or with an empty disk
    #[command(
        after_help = "Images may be raw, vhdx, qcow2 or vmdk; they are copied, never changed. Give --kernel and\n--initrd to boot a kernel directly; without them the firmware boots the first disk."
    )]
    Create(VmCreateArgs),
    /// List VMs
    List,
    /// Show a VM's configuration, disks and state
    Show {
        /// The VM
        vm: String,
    },
    /// Start a VM
    Start {
        /// The VM
        vm: String,
        /// Wait until the guest agent answers, at most this many seconds
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Stop a VM: power button first, then (with --force, or after the time-out) the plug
    Stop {
        /// The VM
        vm: String,
        /// Pull the plug at once
        #[arg(long)]
        force: bool,
        /// Seconds to wait for the guest
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Delete a stopped VM with its disks and checkpoints; restore points stay
    Delete {
        /// The VM
        vm: String,
        /// Really delete; without it only what would be deleted is shown
        #[arg(long)]
        yes: bool,
    },
    /// Run a command in the guest through the guest agent
    Exec {
        /// The VM
        vm: String,
        /// Seconds to wait for its end
        #[arg(long, default_value_t = 300, value_name = "SECONDS")]
        timeout: u64,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<String>,
    },
}

/// `tidemark vm create`
#[derive(Debug, Args)]
pub(crate) struct VmCreateArgs {
    /// Name: 1 to 64 of A-Z a-z 0-9 . _ -
    pub(crate) name: String,
    /// Disk image to import; once per disk
    #[arg(long, value_name = "IMAGE", num_args = 1.., required_unless_present = "disk_size")]
    pub(crate) import: Vec<PathBuf>,
    /// Size of an empty disk, such as 20G; once per disk
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) disk_size: Vec<u64>,
    /// Virtual machine monitor
    #[arg(long, value_enum, default_value_t = Driver::Qemu)]
    pub(crate) driver: Driver,
    /// Virtual processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255))]
    pub(crate) cpus: u32,
    /// Memory
    #[arg(long, default_value = "1G", value_parser = size, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// Linux kernel to boot directly; copied into the VM's folder
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "STRING", requires = "kernel")]
    pub(crate) cmdline: Option<String>,
}

/// Virtual machine monitors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Driver {
    /// qemu-system-x86_64, with KVM where it runs at full speed, else emulated
    Qemu,
    /// Tidemark's own monitor (not part of this version)
    Kvm,
}

/// `tidemark checkpoint …`
#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Take a checkpoint
    Create {
        /// The VM
        vm: String,
        /// Name, 1 to 99 characters; without it the VM's name and the time
        #[arg(long)]
        name: Option<String>,
        /// Disks of a quiesced guest, or with memory and devices
        #[arg(long = "type", value_enum, default_value_t = CheckpointKind::Production)]
        kind: CheckpointKind,
        /// How the guest is brought to rest
        #[command(flatten)]
        quiesce: QuiesceArgs,
    },
    /// List a VM's checkpoints, oldest first
    List {
        /// The VM
        vm: String,
    },
    /// Delete a checkpoint: its child disk is merged into it, no data is lost
    Delete {
        /// The VM
        vm: String,
        /// Name or id
        checkpoint: String,
    },
}

/// Checkpoint types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckpointKind {
    /// Disks of a quiesced guest
    Production,
    /// Memory, devices and disks (not part of this version)
    Standard,
}

/// How the guest is brought to rest.
#[derive(Debug, Clone, Args)]
pub(crate) struct QuiesceArgs {
    /// require: fail without a quiesced guest; try: fall back and say so; off: do not try
    #[arg(long, value_enum, default_value_t = Quiesce::Try, value_name = "MODE")]
    pub(crate) quiesce: Quiesce,
    /// Longest time in seconds that the guest's file systems may stay frozen
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) freeze_deadline: u64,
}

impl QuiesceArgs {
    /// The deadline as a duration.
    pub(crate) fn deadline(&self) -> Duration {
        Duration::from_secs(self.freeze_deadline)
    }
}

/// Quiesce modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quiesce {
    /// Fail without it
    Require,
    /// Fall back to crash-consistent and say so
    Try,
    /// Do not try
    Off,
}

/// `tidemark target …`
#[derive(Debug, Subcommand)]
pub(crate) enum TargetCommand {
    /// Add a target: opens the repository there or makes one, and finds its restore points
    #[command(
        after_help = "URLs:\n  /backup/tidemark or file:///backup/tidemark\n  s3://BUCKET/PREFIX?endpoint=https://HOST:PORT&region=REGION\n\nKeep the passphrase safe and away from this host: without it no restore point can be read."
    )]
    Add {
        /// Name
        name: String,
        /// Where
        url: String,
        /// Media class, for the 3-2-1 rule; guessed from the URL
        #[arg(long, value_enum)]
        media: Option<MediaKind>,
        /// Site, for the 3-2-1 rule
        #[arg(long)]
        site: Option<String>,
        /// The target is away from the host's site
        #[arg(long)]
        offsite: bool,
        /// File with the repository's passphrase (its first line)
        #[arg(long, value_name = "FILE")]
        passphrase_file: Option<PathBuf>,
        /// File with the S3 keys: access_key_id=… and secret_access_key=… lines, or AWS's INI form
        #[arg(long, value_name = "FILE")]
        credentials_file: Option<PathBuf>,
    },
    /// List targets
    List,
    /// Write, read, list and delete a probe object, and open the repository
    Test {
        /// The target
        name: String,
    },
    /// Forget a target; its repository stays as it is
    Remove {
        /// The target
        name: String,
    },
}

/// Media classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MediaKind {
    /// Local or network disk
    Disk,
    /// Object store
    Object,
    /// Tape
    Tape,
}

/// `tidemark backup …`
#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// Back up a VM to one target, then copy to the others
    Run {
        /// The VM
        vm: String,
        /// Target; the first one named is written from the VM. Without it: all targets, local ones first
        #[arg(long, value_name = "NAME")]
        target: Vec<String>,
        /// Read everything, also what tracking says has not changed
        #[arg(long)]
        full: bool,
        /// zstd effort
        #[arg(long, value_enum, default_value_t = Effort::Default)]
        compression: Effort,
        /// How the guest is brought to rest
        #[command(flatten)]
        quiesce: QuiesceArgs,
    },
    /// List restore points, oldest first
    List {
        /// Only of this VM
        vm: Option<String>,
    },
    /// Show a restore point
    Show {
        /// Id, unique beginning of one, or latest:VM
        point: String,
    },
    /// Read restore points and check every chunk
    Verify {
        /// Id, unique beginning of one, or latest:VM
        #[arg(required_unless_present = "all")]
        point: Option<String>,
        /// All restore points of all targets
        #[arg(long, conflicts_with = "point")]
        all: bool,
        /// Check the structure only, do not read the data
        #[arg(long)]
        quick: bool,
    },
}

/// zstd effort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Effort {
    /// zstd 1
    Fast,
    /// zstd 2
    Default,
    /// zstd 9
    Better,
}

/// `tidemark restore …`
#[derive(Debug, Subcommand)]
pub(crate) enum RestoreCommand {
    /// Restore a whole VM as a new VM: new ids, MAC addresses and generation id
    Vm {
        /// Id, unique beginning of one, or latest:VM
        point: String,
        /// Name of the new VM
        #[arg(long = "as", value_name = "NAME")]
        name: String,
        /// Start it
        #[arg(long)]
        start: bool,
        /// Read from this target
        #[arg(long, value_name = "NAME")]
        target: Option<String>,
        /// Replace the stopped VM of that name and keep its identity
        #[arg(long)]
        in_place: bool,
    },
    /// Restore one disk to a file
    Disk {
        /// Id, unique beginning of one, or latest:VM
        point: String,
        /// Disk name
        disk: String,
        /// File to write; must not exist
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// File format
        #[arg(long, value_enum, default_value_t = OutFormat::Vhdx)]
        format: OutFormat,
    },
    /// Serve a restore point's disks read-only over NBD until Ctrl-C
    Serve {
        /// Id, unique beginning of one, or latest:VM
        point: String,
        /// Unix socket to listen on
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
    },
}

/// Formats of restored disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutFormat {
    /// Dynamic VHDX
    Vhdx,
    /// Raw, sparse
    Raw,
}

/// `tidemark repo …`
#[derive(Debug, Subcommand)]
pub(crate) enum RepoCommand {
    /// Sizes and counts of a target's repository
    Stats {
        /// The target
        target: String,
    },
}

/// `tidemark demo`
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Folder with the guest: debian.raw, vmlinuz, initrd.img, cmdline (`make guest` builds it)
    #[arg(long, env = "TIDEMARK_GUEST_DIR", default_value = ".cache/guest", value_name = "DIR")]
    pub(crate) guest: PathBuf,
    /// The SeaweedFS program that plays the S3 service (`make setup` installs it)
    #[arg(
        long,
        env = "TIDEMARK_WEED",
        default_value = ".cache/seaweed-venv/bin/weed",
        value_name = "FILE"
    )]
    pub(crate) weed: PathBuf,
    /// Keep the demo's folder and say where it is
    #[arg(long)]
    pub(crate) keep: bool,
}

/// `tidemark disk-server`
#[derive(Debug, Args)]
pub(crate) struct DiskServerArgs {
    /// NAME=PATH of a disk's leaf
    #[arg(long, value_parser = name_path, required = true)]
    pub(crate) disk: Vec<(String, PathBuf)>,
    /// NBD socket
    #[arg(long)]
    pub(crate) nbd_socket: PathBuf,
    /// Control socket
    #[arg(long)]
    pub(crate) control_socket: PathBuf,
}

/// `tidemark vm-guard`
#[derive(Debug, Args)]
pub(crate) struct VmGuardArgs {
    /// The VM
    #[arg(long)]
    pub(crate) vm: String,
    /// The VM's id, for the process list
    #[arg(long)]
    pub(crate) id: Option<Uuid>,
}

/// A size with binary units: 512, 64M, 20G, 1TiB.
fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|_| format!("{text} is no size; write a number with K, M, G or T, such as 20G"))
}

fn name_path(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH")?;
    Ok((name.to_owned(), path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("20G"), Ok(20 << 30));
        assert_eq!(size("1TiB"), Ok(1 << 40));
        assert_eq!(size("512"), Ok(512));
        assert!(size("lots").is_err());
    }
}
