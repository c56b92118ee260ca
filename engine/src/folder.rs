//! A VM's folder: where each of its files lies (docs/formats/vm-folder.md).

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use tidemark_disk::chain::delete_disk_files;

use crate::error::{EngineError, Result};
use crate::lock::FileLock;
use crate::store;

/// Folders under construction begin with this.
const NEW_PREFIX: &str = ".new-";
/// Folders being deleted begin with this.
const DELETED_PREFIX: &str = ".deleted-";

/// The folder of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmFolder {
    root: PathBuf,
}

impl VmFolder {
    /// The folder of the VM `name`, whose name has been checked.
    pub(crate) fn of(vms: &Path, name: &str) -> Self {
        Self { root: vms.join(name) }
    }

    /// Makes a folder under construction, with its parts, and takes its lock. A kill leaves a folder
    /// whose lock nobody holds: [`clean_up`] removes it.
    pub(crate) fn begin(vms: &Path) -> Result<(Self, FileLock)> {
        // Without this lock, a clean-up could see the folder before its lock exists.
        let _guard = creation_lock(vms)?;
        let folder = Self { root: vms.join(format!("{NEW_PREFIX}{}", Uuid::new_v4())) };
        make_dir(&folder.root)?;
        let lock = FileLock::try_take(&folder.lock_file())?
            .ok_or_else(|| EngineError::Busy("under construction".to_owned()))?;
        for dir in [folder.disks(), folder.snapshots(), folder.boot(), folder.logs()] {
            make_dir(&dir)?;
        }
        Ok((folder, lock))
    }

    /// Gives a finished folder its name: the moment at which the VM exists. Everything in it must be
    /// durable. A kill before leaves a folder under construction, after it the whole VM.
    pub(crate) fn publish(self, vms: &Path, name: &str) -> Result<Self> {
        self.sync()?;
        let target = vms.join(name);
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        let here = rustix::fs::CWD;
        match rustix::fs::renameat_with(here, &self.root, here, &target, flags) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(EngineError::VmExists(name.to_owned())),
            Err(e) => return Err(EngineError::io("rename", &self.root, e)),
        }
        store::sync_dir(vms)?;
        Ok(Self { root: target })
    }

    /// Exchanges a finished folder under construction with the VM `name`: the one takes the name, the
    /// other is then found under construction, in one step. A kill before it leaves the old VM, after
    /// it the new one; [`clean_up`] removes the other, whose lock nobody holds any more.
    pub(crate) fn exchange(&self, vms: &Path, name: &str) -> Result<()> {
        self.sync()?;
        let target = vms.join(name);
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        let here = rustix::fs::CWD;
        rustix::fs::renameat_with(here, &self.root, here, &target, flags)
            .map_err(|e| EngineError::io("exchange", &target, e))?;
        store::sync_dir(vms)
    }

    /// Makes the names of a finished folder's files durable.
    fn sync(&self) -> Result<()> {
        for dir in [self.disks(), self.snapshots(), self.boot(), self.root.clone()] {
            store::sync_dir(&dir)?;
        }
        Ok(())
    }

    /// Removes the folder: first out of sight in one step, then from the disk.
    pub(crate) fn remove(&self, vms: &Path) -> Result<()> {
        let gone = vms.join(format!("{DELETED_PREFIX}{}", Uuid::new_v4()));
        match fs::rename(&self.root, &gone) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(EngineError::io("rename", &self.root, e)),
        }
        store::sync_dir(vms)?;
        remove_tree(&gone)
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The configuration.
    pub(crate) fn config(&self) -> PathBuf {
        self.root.join("vm.vmcx")
    }

    /// The record of half-done work.
    pub(crate) fn intent(&self) -> PathBuf {
        self.root.join("intent.json")
    }

    /// The lock of the one session.
    pub(crate) fn lock_file(&self) -> PathBuf {
        self.root.join("vm.lock")
    }

    /// The disk files.
    pub(crate) fn disks(&self) -> PathBuf {
        self.root.join("disks")
    }

    /// One disk file.
    pub(crate) fn disk(&self, file: &str) -> PathBuf {
        self.disks().join(file)
    }

    /// Kernel and initial RAM disk.
    pub(crate) fn boot(&self) -> PathBuf {
        self.root.join("boot")
    }

    /// Logs.
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// What the guest's serial console said.
    pub(crate) fn console_log(&self) -> PathBuf {
        self.logs().join("console.log")
    }

    /// Records of checkpoints.
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// The configuration as of a checkpoint.
    pub(crate) fn snapshot(&self, checkpoint: Uuid) -> PathBuf {
        self.snapshots().join(format!("{checkpoint}.vmcx"))
    }

    /// Removes a disk file that nothing refers to any more, with its tracking pair. Refused while
    /// somebody writes it.
    pub(crate) fn remove_disk(&self, file: &str) -> Result<()> {
        Ok(delete_disk_files(&self.disk(file))?)
    }
}

/// The file name of `disk`'s leaf above checkpoint `id`.
pub(crate) fn leaf_name(disk: &str, id: Uuid) -> String {
    format!("{disk}_{id}.avhdx")
}

/// Makes a directory for the owner's eyes only; that it exists is no error.
pub(crate) fn make_dir(path: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(path).map_err(|e| EngineError::io("create", path, e))
}

/// Removes what killed creations and deletions have left in the folder of all VMs.
pub(crate) fn clean_up(vms: &Path) -> Result<()> {
    let _guard = creation_lock(vms)?;
    for entry in entries(vms)? {
        let path = vms.join(&entry);
        if entry.starts_with(DELETED_PREFIX) {
            remove_tree(&path)?;
        } else if entry.starts_with(NEW_PREFIX) {
            let folder = VmFolder { root: path };
            // A lock that is held: somebody is at work in there. An error: it has just gone.
            if let Ok(Some(_lock)) = FileLock::try_take(&folder.lock_file()) {
                folder.remove(vms)?;
            }
        }
    }
    Ok(())
}

fn creation_lock(vms: &Path) -> Result<FileLock> {
    let path = vms.join(".create.lock");
    FileLock::take(&path, std::time::Duration::from_secs(30))?
        .ok_or_else(|| EngineError::State(format!("{} stays locked", path.display())))
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        // Another process may be cleaning up, too.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(EngineError::io("remove", path, e)),
    }
}

/// The names in a directory that are text, sorted.
pub(crate) fn entries(dir: &Path) -> Result<Vec<String>> {
    let list = fs::read_dir(dir).map_err(|e| EngineError::io("list", dir, e))?;
    let mut names = Vec::new();
    for entry in list {
        let entry = entry.map_err(|e| EngineError::io("list", dir, e))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
