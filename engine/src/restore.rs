//! Making a VM from a restore point: its folder is built out of sight, its disks are written by the
//! caller, and it is named when all of it is durable.

use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;

use tidemark_disk::chain::Chain;
use tidemark_disk::{Block, Geometry};

use crate::config::{DiskConfig, VmConfig, check_file_name};
use crate::create::{check_size, make_disk, new_mac};
use crate::engine::Engine;
use crate::error::{EngineError, Result};
use crate::folder::VmFolder;
use crate::lock::FileLock;
use crate::session::VmSession;
use crate::{fault, store};

/// A VM to be made from a restore point.
#[derive(Debug, Clone)]
pub struct RestoreVm {
    /// Name of the new VM.
    pub name: String,
    /// The configuration as backed up; identities are replaced by new ones.
    pub config: VmConfig,
    /// Disk names, sizes, sector sizes (logical, physical), in order.
    pub disks: Vec<(String, Geometry)>,
    /// Boot files: name and content.
    pub boot: Vec<(String, Vec<u8>)>,
    /// Keep ids, MAC addresses and disk ids (restore in place of a VM that is gone).
    pub keep_identity: bool,
}

/// A VM folder under construction; dropped without `commit` it is removed.
pub struct NewVm {
    /// The new disks, in order, for writing.
    pub disks: Vec<(String, Arc<dyn Block>)>,
    chains: Vec<Arc<Chain>>,
    config: VmConfig,
    vms: PathBuf,
    folder: Option<VmFolder>,
    _lock: FileLock,
}

impl Engine {
    /// Makes an empty VM folder for a restore: new disks of these geometries, written through the
    /// returned chains; visible only after [`NewVm::commit`] or [`NewVm::commit_replacing`].
    pub fn begin_restore(&self, request: &RestoreVm) -> Result<NewVm> {
        // With its identity it may be meant to replace the VM of that name: the commit decides.
        if !request.keep_identity {
            self.must_be_free(&request.name)?;
        }
        let config = restored_config(request)?;
        let vms = self.vms();
        let (folder, lock) = VmFolder::begin(&vms)?;
        // From here on it removes the folder, whatever fails.
        let mut new = NewVm {
            disks: Vec::new(),
            chains: Vec::new(),
            config,
            vms,
            folder: Some(folder.clone()),
            _lock: lock,
        };
        for (name, content) in &request.boot {
            store::write_durable(&folder.boot().join(name), &[content])?;
        }
        for ((name, geometry), disk) in request.disks.iter().zip(&new.config.disks) {
            let id = disk_id(request, name);
            let chain = Arc::new(make_disk(&folder.disk(&disk.leaf), *geometry, id)?);
            new.disks.push((name.clone(), Arc::clone(&chain) as Arc<dyn Block>));
            new.chains.push(chain);
        }
        Ok(new)
    }
}

impl NewVm {
    /// Flushes the disks and makes the VM visible under its name.
    pub fn commit(mut self) -> Result<VmConfig> {
        if let Some(folder) = self.finish()? {
            folder.publish(&self.vms, &self.config.name)?;
        }
        // Published: no longer ours to remove.
        self.folder = None;
        Ok(self.config.clone())
    }

    /// Like [`NewVm::commit`], in the place of the stopped VM of that name, which is kept until the
    /// new one is complete, exchanged for it in one step, and then deleted.
    pub fn commit_replacing(mut self, old: VmSession<'_>) -> Result<VmConfig> {
        if old.place.name != self.config.name {
            return Err(EngineError::Invalid(format!(
                "{} cannot take the place of {}",
                self.config.name, old.place.name
            )));
        }
        old.release()?;
        if let Some(folder) = self.finish()? {
            fault::point("replace-finished");
            // Not ours to remove while it is unclear which of the two it is: after an error the next
            // clean-up does it.
            self.folder = None;
            folder.exchange(&self.vms, &self.config.name)?;
            fault::point("replace-exchanged");
            // What is under construction now is the old VM; dropping us removes it.
            self.folder = Some(folder);
        }
        let config = self.config.clone();
        drop(self);
        old.place.run.remove();
        // Only now: its lock kept others away from the folder that was being removed.
        drop(old);
        Ok(config)
    }

    /// Makes everything in the folder durable and closes it.
    fn finish(&mut self) -> Result<Option<VmFolder>> {
        for chain in &self.chains {
            chain.flush()?;
            chain.close()?;
        }
        self.disks.clear();
        self.chains.clear();
        if let Some(folder) = &self.folder {
            self.config.save(&folder.config())?;
        }
        Ok(self.folder.clone())
    }
}

impl Drop for NewVm {
    fn drop(&mut self) {
        self.disks.clear();
        self.chains.clear();
        let removed = self.folder.take().map_or(Ok(()), |folder| folder.remove(&self.vms));
        if let Err(error) = removed {
            tracing::warn!(%error, "removing an unfinished restore");
        }
    }
}

/// The configuration of the new VM. The backed-up one comes from a repository: everything in it is
/// checked before anything is made.
fn restored_config(request: &RestoreVm) -> Result<VmConfig> {
    let mut config = request.config.clone();
    config.name.clone_from(&request.name);
    config.checkpoints.clear();
    config.disks = request
        .disks
        .iter()
        .map(|(name, _)| DiskConfig { name: name.clone(), leaf: format!("{name}.vhdx") })
        .collect();
    if !request.keep_identity {
        config.id = Uuid::new_v4();
        config.macs.iter_mut().for_each(|mac| *mac = new_mac());
    }
    // In its old place or in a new one: the guest goes back in time, and must learn of it.
    config.generation_id = Uuid::new_v4();
    config.check().map_err(EngineError::Invalid)?;
    for (_, geometry) in &request.disks {
        check_size(geometry.size)?;
        for sector in [geometry.logical_sector, geometry.physical_sector] {
            if sector != 512 && sector != 4096 {
                return Err(EngineError::Invalid(format!("sectors of {sector} bytes")));
            }
        }
    }
    for (i, (name, _)) in request.boot.iter().enumerate() {
        check_file_name(name).map_err(EngineError::Invalid)?;
        if request.boot.iter().take(i).any(|(other, _)| other == name) {
            return Err(EngineError::Invalid(format!("boot file {name} is there twice")));
        }
    }
    for wanted in config.kernel.iter().chain(&config.initrd) {
        if !request.boot.iter().any(|(name, _)| name == wanted) {
            return Err(EngineError::Invalid(format!(
                "the restore point lacks the boot file {wanted} that its configuration names"
            )));
        }
    }
    Ok(config)
}

/// The disk id that a restored disk keeps: the lineage of its last seal, where identity is kept.
fn disk_id(request: &RestoreVm, name: &str) -> Option<Uuid> {
    if !request.keep_identity {
        return None;
    }
    let last = request.config.checkpoints.last()?;
    last.disks.iter().find(|d| d.name == name).map(|d| d.rct_id.lineage)
}
