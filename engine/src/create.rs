//! Creating a VM: its folder is built out of sight and then named, all or nothing.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use uuid::Uuid;

use tidemark_disk::Geometry;
use tidemark_disk::chain::Chain;
use tidemark_disk::vhdx::{Access, CreateOptions};
use tidemark_driver::DriverKind;

use crate::config::{CreateVm, DiskConfig, NewDisk, Progress, VmConfig, check_name};
use crate::engine::Engine;
use crate::error::{EngineError, Result};
use crate::folder::VmFolder;
use crate::session::no_kvm_driver;
use crate::{fault, import, store};

/// Names of the boot files in a VM's folder.
const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd.img";
/// Largest disk that VHDX allows.
const MAX_DISK: u64 = 64 << 40;
/// Smallest disk that makes sense.
const MIN_DISK: u64 = 1 << 20;

impl Engine {
    /// Creates a VM. All or nothing: a half-made folder is removed, also after a kill, or when `cancel`
    /// becomes true.
    pub fn create(
        &self,
        request: &CreateVm,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<VmConfig> {
        let config = new_config(request)?;
        self.must_be_free(&config.name)?;
        check_sources(request)?;
        let vms = self.vms();
        let (folder, _lock) = VmFolder::begin(&vms)?;
        fault::point("create-begun");
        let built = build(&folder, request, &config, progress, cancel);
        let published = built.and_then(|()| folder.clone().publish(&vms, &config.name));
        if let Err(error) = published {
            if let Err(also) = folder.remove(&vms) {
                tracing::warn!(error = %also, "removing a half-made VM");
            }
            return Err(error);
        }
        Ok(config)
    }

    /// Whether the name can be given to a new VM.
    pub(crate) fn must_be_free(&self, name: &str) -> Result<()> {
        check_name("VM name", name).map_err(EngineError::Invalid)?;
        if store::exists(&self.vms().join(name))? {
            return Err(EngineError::VmExists(name.to_owned()));
        }
        Ok(())
    }
}

fn new_config(request: &CreateVm) -> Result<VmConfig> {
    if request.driver != DriverKind::Qemu {
        return Err(no_kvm_driver());
    }
    let disks = (0..request.disks.len())
        .map(|i| DiskConfig { name: format!("disk{i}"), leaf: format!("disk{i}.vhdx") })
        .collect();
    let config = VmConfig {
        name: request.name.clone(),
        id: Uuid::new_v4(),
        generation_id: Uuid::new_v4(),
        driver: request.driver,
        cpus: request.cpus,
        memory: request.memory,
        kernel: request.kernel.as_ref().map(|_| KERNEL.to_owned()),
        initrd: request.initrd.as_ref().map(|_| INITRD.to_owned()),
        cmdline: request.cmdline.clone(),
        macs: vec![new_mac()],
        disks,
        checkpoints: Vec::new(),
    };
    config.check().map_err(EngineError::Invalid)?;
    if config.kernel.is_none() && (config.initrd.is_some() || config.cmdline.is_some()) {
        return Err(EngineError::Invalid(
            "--initrd and --cmdline need --kernel: without it the firmware boots the first disk"
                .to_owned(),
        ));
    }
    Ok(config)
}

/// Everything that can be seen to be wrong before hours of copying.
fn check_sources(request: &CreateVm) -> Result<()> {
    for path in request.kernel.iter().chain(&request.initrd) {
        File::open(path).map_err(|e| EngineError::io("open", path, e))?;
    }
    for disk in &request.disks {
        match disk {
            NewDisk::Empty(size) => check_size(*size)?,
            NewDisk::Import(path) => import::check(path)?,
        }
    }
    Ok(())
}

pub(crate) fn check_size(size: u64) -> Result<()> {
    if size.is_multiple_of(512) && (MIN_DISK..=MAX_DISK).contains(&size) {
        return Ok(());
    }
    Err(EngineError::Invalid(format!(
        "a disk of {size} bytes is not possible: 1 MiB to 64 TiB, in whole sectors of 512 bytes"
    )))
}

fn build(
    folder: &VmFolder,
    request: &CreateVm,
    config: &VmConfig,
    progress: Progress<'_>,
    cancel: &AtomicBool,
) -> Result<()> {
    for (source, name) in [(&request.kernel, KERNEL), (&request.initrd, INITRD)] {
        if let Some(source) = source {
            copy_file(source, &folder.boot().join(name))?;
        }
    }
    for (source, disk) in request.disks.iter().zip(&config.disks) {
        let path = folder.disk(&disk.leaf);
        match source {
            NewDisk::Empty(size) => {
                let geometry = Geometry { size: *size, logical_sector: 512, physical_sector: 4096 };
                make_disk(&path, geometry, None)?.close()?;
            }
            NewDisk::Import(source) => {
                let what = format!("import {}", disk.name);
                let tell = |done, total| progress(&what, done, total);
                import::import(source, &path, &tell, cancel)?;
            }
        }
        fault::point("create-disk");
    }
    config.save(&folder.config())
}

/// Makes a new disk and opens it, with change tracking, for writing.
pub(crate) fn make_disk(path: &Path, geometry: Geometry, id: Option<Uuid>) -> Result<Chain> {
    check_size(geometry.size)?;
    let options = CreateOptions {
        size: geometry.size,
        block_size: block_size(geometry.size),
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        fixed: false,
        disk_id: Some(id.unwrap_or_else(Uuid::new_v4)),
        parent: None,
    };
    Chain::create(path, &options)?;
    Ok(Chain::open(path, Access::ReadWrite)?)
}

/// Small blocks keep sparse disks small; large disks need larger ones, for the sake of their tables.
fn block_size(size: u64) -> u32 {
    if size <= 4 << 40 { 2 << 20 } else { 32 << 20 }
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map_err(|e| EngineError::io("copy", from, e))?;
    let file = File::open(to).map_err(|e| EngineError::io("open", to, e))?;
    file.sync_all().map_err(|e| EngineError::io("sync", to, e))
}

/// A random MAC address from the block that QEMU uses for its guests.
pub(crate) fn new_mac() -> String {
    let id = Uuid::new_v4();
    let [a, b, c, ..] = *id.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}
