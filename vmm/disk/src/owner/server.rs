//! The owner process itself.

use std::path::PathBuf;

use crate::error::Result;

/// One disk to own.
#[derive(Debug, Clone)]
pub struct OwnedDisk {
    /// Disk name, also the NBD export's name.
    pub name: String,
    /// Path of the leaf.
    pub leaf: PathBuf,
}

/// What an owner process is started with.
#[derive(Debug, Clone)]
pub struct OwnerConfig {
    /// The VM's disks.
    pub disks: Vec<OwnedDisk>,
    /// Unix socket of the NBD server.
    pub nbd_socket: PathBuf,
    /// Unix socket of the control protocol.
    pub control_socket: PathBuf,
}

/// Runs until `Shutdown` or SIGTERM; both close all disks clean.
pub fn run(_config: OwnerConfig) -> Result<()> {
    todo!()
}
