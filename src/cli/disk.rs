//! `tidemark disk …`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use uuid::Uuid;

use super::size;

/// `tidemark disk …`
#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Show what a VHDX file is, and its chain
    #[command(after_help = "\
Examples:
  tidemark disk info web.vhdx
  tidemark disk info fork.avhdx --parents-in /srv/bases --json")]
    Info(FileArgs),
    /// Check a VHDX file's structure, its chain and its change tracking; read-only without --repair
    #[command(after_help = "\
Exit code 7 if there is damage. --repair does what needs no guess: a torn header or region table is
made whole from its copy, a log that a crash left is replayed. It never touches a file that is damaged
beyond that; restore such a disk.

Examples:
  tidemark disk check web.vhdx
  tidemark disk check web.vhdx --repair")]
    Check {
        /// The file, and where its parents are
        #[command(flatten)]
        file: FileArgs,
        /// Mend torn copies and replay the log
        #[arg(long)]
        repair: bool,
    },
    /// Create an empty VHDX file
    #[command(after_help = "\
Examples:
  tidemark disk create data.vhdx --size 200G
  tidemark disk create fast.vhdx --size 20G --fixed --block-size 32M
To make a child of an existing disk: tidemark disk fork.")]
    Create {
        /// The file; must not exist
        file: PathBuf,
        /// Virtual size, such as 20G; at most 64T
        #[arg(long, value_parser = size)]
        size: u64,
        /// Block size, 1M to 256M, a power of two
        #[arg(long, value_parser = size)]
        block_size: Option<u64>,
        /// Logical sector size: 512 or 4096
        #[arg(long, default_value_t = 512)]
        sector: u32,
        /// Allocate everything at once
        #[arg(long)]
        fixed: bool,
        /// Virtual Disk ID; random without it
        #[arg(long, value_name = "GUID")]
        id: Option<Uuid>,
    },
    /// Make a child of a disk that is only read from then on
    #[command(after_help = "\
Any number of forks can rest on one base, and each holds only what was written to it. The base must not
be written any more: its forks would refuse to open. A fork outside the base's folder opens only where
that folder is named with --parents-in.

Examples:
  tidemark disk fork debian.vhdx web.avhdx
  tidemark disk fork /srv/bases/debian.vhdx big.avhdx --size 100G --dry-run")]
    Fork {
        /// The parent
        base: PathBuf,
        /// The child; must not exist
        child: PathBuf,
        /// Virtual size of the child, if larger than the base's
        #[arg(long, value_parser = size)]
        size: Option<u64>,
        /// Block size of the child
        #[arg(long, value_parser = size)]
        block_size: Option<u64>,
        /// Only check and say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Convert a raw or VHDX file (with its chain) to another format
    #[command(after_help = "\
The source is not changed, and a file that exists is never overwritten. A child is converted together
with its parents into one file that stands alone.

Examples:
  tidemark disk convert web.avhdx web-whole.vhdx
  tidemark disk convert image.raw web.vhdx --format fixed
  tidemark disk convert web.vhdx image.raw --format raw --dry-run")]
    Convert {
        /// The source
        from: PathBuf,
        /// The file to write; must not exist
        to: PathBuf,
        /// Format of the new file
        #[arg(long, value_enum, default_value_t = ConvertFormat::Dynamic)]
        format: ConvertFormat,
        /// Block size of a VHDX file, 1M to 256M, a power of two
        #[arg(long, value_parser = size)]
        block_size: Option<u64>,
        /// Folder in which parents are looked for besides the child's own
        #[arg(long, value_name = "DIR")]
        parents_in: Vec<PathBuf>,
        /// Only say what would be read and written
        #[arg(long)]
        dry_run: bool,
    },
    /// Change the virtual size of a disk that is not in use
    #[command(after_help = "\
Growing adds zeros at the end; change tracking goes on, and the next backup sees the new part as
changed. Shrinking cuts off nothing but zeros, and says how far it can go: shrink the file systems and
partitions in the guest first. The disk is a base without children, or a leaf.

Examples:
  tidemark disk resize web.vhdx 40G
  tidemark disk resize web.vhdx 10G --dry-run")]
    Resize {
        /// The file
        file: PathBuf,
        /// The new virtual size, such as 40G
        #[arg(value_parser = size)]
        size: u64,
        /// Only check and say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Make a VHDX file shorter; what the disk reads as does not change
    #[command(after_help = "\
Blocks of zeros give up their places, blocks at the file's end move into gaps, the end is cut off.
Change tracking and children are not affected. Trim in the guest first (fstrim), so that deleted files
are zeros.

Examples:
  tidemark disk compact web.vhdx --dry-run
  tidemark disk compact web.vhdx
  tidemark disk compact web.vhdx --quick")]
    Compact {
        /// The file
        file: PathBuf,
        /// Do not read blocks to look for zeros
        #[arg(long)]
        quick: bool,
        /// Only look and say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Fold a chain that is not in use down into one of its parents
    #[command(after_help = "\
The files above the target are folded into it, from the lowest up, and deleted; the target then reads
as the leaf did. Killed at any point, the same command goes on. A VM's checkpoints are deleted with
`tidemark checkpoint delete`, also while the VM runs.

Examples:
  tidemark disk merge leaf.avhdx                     # into its parent
  tidemark disk merge leaf.avhdx --into base.vhdx --dry-run
  tidemark disk merge leaf.avhdx --levels 3")]
    Merge {
        /// The leaf of the chain
        leaf: PathBuf,
        /// How many files are folded down
        #[arg(long, default_value_t = 1, conflicts_with = "into", value_name = "N")]
        levels: usize,
        /// The file that takes everything
        #[arg(long, value_name = "FILE")]
        into: Option<PathBuf>,
        /// Only check and say what would be done
        #[arg(long)]
        dry_run: bool,
        /// Also where the files belong to a VM, whose configuration then names files that are gone
        #[arg(long)]
        force: bool,
    },
    /// Say where a child's parent is, after files were moved or renamed
    #[command(after_help = "\
The parent must be the very file that the child was made on, unchanged: its DataWriteGuid is compared.
--ignore-identity takes another one. That is right only if you know that both hold the same data; if
not, the child reads as garbage. The child's change tracking begins anew then.

Examples:
  tidemark disk set-parent leaf.avhdx renamed-base.vhdx
  tidemark disk set-parent leaf.avhdx copy.vhdx --ignore-identity --dry-run")]
    SetParent {
        /// The child
        child: PathBuf,
        /// Its parent
        parent: PathBuf,
        /// Take the parent even if it is not the one that the child was made on
        #[arg(long)]
        ignore_identity: bool,
        /// Only check and say what would be done
        #[arg(long)]
        dry_run: bool,
        /// Also where the child belongs to a VM
        #[arg(long)]
        force: bool,
    },
    /// Give a base another Virtual Disk ID, as a copy that lives on beside its original should have
    #[command(after_help = "\
Change tracking begins anew. A disk with children keeps its id, for it is theirs too.

Examples:
  tidemark disk set-id copy.vhdx
  tidemark disk set-id copy.vhdx --id 3f2504e0-4f89-41d3-9a0c-0305e82c3301")]
    SetId {
        /// The file
        file: PathBuf,
        /// The id; random without it
        #[arg(long, value_name = "GUID")]
        id: Option<Uuid>,
        /// Only check and say what would be done
        #[arg(long)]
        dry_run: bool,
        /// Also where the file belongs to a VM
        #[arg(long)]
        force: bool,
    },
    /// List the ranges of a VHDX file's chain that hold data
    #[command(after_help = "\
Examples:
  tidemark disk map web.avhdx
  tidemark disk map web.avhdx --json | jq 'map(select(.kind == \"data\").length) | add'")]
    Map(FileArgs),
    /// Serve an offline VM's disk over NBD, with change tracking, until Ctrl-C
    #[command(
        after_help = "Any NBD client can then write to it, and the next backup sees what it wrote:\n  nbdcopy image.raw 'nbd+unix:///?socket=/run/d.sock'"
    )]
    Serve {
        /// The VM
        vm: String,
        /// Disk name
        disk: String,
        /// Unix socket to listen on
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
    },
}

/// A disk file, and where its parents are.
#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    /// The file
    pub(crate) file: PathBuf,
    /// Folder in which parents are looked for besides the child's own
    #[arg(long, value_name = "DIR")]
    pub(crate) parents_in: Vec<PathBuf>,
}

/// Formats of converted disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertFormat {
    /// Dynamic VHDX
    Dynamic,
    /// Fixed VHDX
    Fixed,
    /// Raw, sparse
    Raw,
}
