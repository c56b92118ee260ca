//! The processes behind a running VM: disk owner and guard.

use std::path::Path;

use tidemark_disk::owner::{self, OwnedDisk, OwnerConfig};
use tidemark_engine::EngineOptions;

use crate::cli::{DiskServerArgs, VmGuardArgs};
use crate::context::program;
use crate::failure::Result;

/// Owns a VM's disks until told to stop.
pub(crate) fn disk_server(args: DiskServerArgs) -> Result {
    let disks = args.disk.into_iter().map(|(name, leaf)| OwnedDisk { name, leaf }).collect();
    Ok(owner::run(OwnerConfig {
        disks,
        nbd_socket: args.nbd_socket,
        control_socket: args.control_socket,
    })?)
}

/// Watches over a VM until it ends.
pub(crate) fn vm_guard(data_dir: &Path, args: &VmGuardArgs) -> Result {
    let options = EngineOptions { program: program()? };
    Ok(tidemark_engine::guard::run(data_dir, &args.vm, options)?)
}
