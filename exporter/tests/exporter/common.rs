//! A data directory with targets and offline VMs, and a model of what their disks must hold.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;
use tempfile::TempDir;
use tidemark_dedup::Compression;
use tidemark_disk::Block;
use tidemark_disk::vhdx::Access;
use tidemark_driver::DriverKind;
use tidemark_engine::{CreateVm, Engine, EngineOptions, NewDisk, QuiesceMode, VmConfig};
use tidemark_exporter::{
    BackupReport, BackupRequest, Exporter, Media, RestoreRequest, Result, RunEvent, Target,
};
use uuid::Uuid;

pub const MIB: u64 = 1024 * 1024;
pub const CHUNK: u64 = 64 * 1024;

pub fn no_prompt(_: &str) -> Option<String> {
    None
}

pub fn ignore(_: RunEvent) {}

pub struct Lab {
    pub dir: TempDir,
    pub engine: Engine,
}

impl Lab {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = EngineOptions { program: "/bin/false".into() };
        let engine = Engine::open(&dir.path().join("data"), options).unwrap();
        let lab = Self { dir, engine };
        lab.secret("passphrase", "correct horse battery staple\n");
        lab
    }

    pub fn secret(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    pub fn exporter(&self) -> Exporter<'_> {
        Exporter::new(&self.engine, &no_prompt)
    }

    pub fn store(&self, target: &str) -> PathBuf {
        self.dir.path().join("stores").join(target)
    }

    pub fn target(&self, name: &str) -> Target {
        std::fs::create_dir_all(self.store(name)).unwrap();
        Target {
            name: name.to_owned(),
            url: self.store(name).to_str().unwrap().to_owned(),
            media: Media::Disk,
            site: None,
            offsite: false,
            passphrase_file: Some(self.dir.path().join("passphrase")),
            credentials_file: None,
        }
    }

    /// An exporter with these targets added.
    pub fn with_targets(&self, names: &[&str]) -> Exporter<'_> {
        let exporter = self.exporter();
        for name in names {
            exporter.add_target(&self.target(name)).unwrap();
        }
        exporter
    }

    pub fn create_vm(&self, name: &str, disks: &[u64]) -> VmConfig {
        let kernel = self.dir.path().join("vmlinuz");
        std::fs::write(&kernel, pattern(1, 300_000)).unwrap();
        let initrd = self.dir.path().join("initrd.img");
        std::fs::write(&initrd, pattern(2, 70_001)).unwrap();
        let request = CreateVm {
            name: name.to_owned(),
            driver: DriverKind::Qemu,
            cpus: 1,
            memory: 256 * MIB,
            kernel: Some(kernel),
            initrd: Some(initrd),
            cmdline: Some("console=ttyS0".to_owned()),
            disks: disks.iter().map(|size| NewDisk::Empty(*size)).collect(),
        };
        self.engine.create(&request, &|_, _, _| (), &AtomicBool::new(false)).unwrap()
    }

    /// Changes an offline VM's disk, with tracking, and its model alike.
    pub fn change(&self, vm: &str, disk: &str, model: &mut [u8], changes: &[Change]) {
        let session = self.engine.session(vm).unwrap();
        let chain = session.open_disk(disk, Access::ReadWrite).unwrap();
        for change in changes {
            change.apply(chain.as_ref(), model);
        }
        chain.flush().unwrap();
        chain.close().unwrap();
    }

    /// The disk's content as the VM would see it.
    pub fn content(&self, vm: &str, disk: &str) -> Vec<u8> {
        let session = self.engine.session(vm).unwrap();
        let chain = session.open_disk(disk, Access::ReadOnly).unwrap();
        read_all(chain.as_ref())
    }

    pub fn checkpoints(&self, vm: &str) -> usize {
        self.engine.session(vm).unwrap().config().checkpoints.len()
    }

    pub fn disks_dir(&self, vm: &str) -> PathBuf {
        self.engine.data_dir().join("vms").join(vm).join("disks")
    }

    /// Disk files (without tracking files) of a VM, sorted.
    pub fn disk_files(&self, vm: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.disks_dir(vm)).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|n| n.ends_with("vhdx")).collect();
        names.sort();
        names
    }
}

/// A change to a disk.
#[derive(Debug, Clone)]
pub enum Change {
    Write { at: u64, len: usize, seed: u64 },
    Zero { at: u64, len: u64 },
    Discard { at: u64, len: u64 },
}

impl Change {
    pub fn apply(&self, disk: &dyn Block, model: &mut [u8]) {
        match *self {
            Self::Write { at, len, seed } => {
                let data = pattern(seed, len);
                disk.write_at(at, &data).unwrap();
                model[at as usize..at as usize + len].copy_from_slice(&data);
            }
            Self::Zero { at, len } => {
                disk.write_zeroes(at, len, true).unwrap();
                model[at as usize..(at + len) as usize].fill(0);
            }
            Self::Discard { at, len } => {
                disk.discard(at, len).unwrap();
                model[at as usize..(at + len) as usize].fill(0);
            }
        }
    }

    fn range(&self) -> (u64, u64) {
        match *self {
            Self::Write { at, len, .. } => (at, len as u64),
            Self::Zero { at, len } | Self::Discard { at, len } => (at, len),
        }
    }
}

/// Bytes of the 64 KiB granules that the changes touch.
pub fn granule_bytes(changes: &[Change]) -> u64 {
    let mut granules = std::collections::BTreeSet::new();
    for change in changes {
        let (at, len) = change.range();
        granules.extend(at / CHUNK..(at + len).div_ceil(CHUNK));
    }
    granules.len() as u64 * CHUNK
}

/// Incompressible bytes.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut word = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Small numbers from a seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    pub fn changes(&mut self, size: u64, n: u64) -> Vec<Change> {
        let mut one = || {
            let at = 512 * self.roll(size / 512);
            let len = (512 * (1 + self.roll(300))).min(size - at);
            match self.roll(6) {
                0 => Change::Zero { at, len },
                1 => Change::Discard { at, len },
                _ => Change::Write { at, len: len as usize, seed: self.roll(1 << 30) },
            }
        };
        (0..n).map(|_| one()).collect()
    }
}

pub fn read_all(disk: &dyn Block) -> Vec<u8> {
    let mut content = vec![0; disk.geometry().size as usize];
    for (i, piece) in content.chunks_mut(MIB as usize).enumerate() {
        disk.read_at(i as u64 * MIB, piece).unwrap();
    }
    content
}

/// Equality without printing megabytes.
pub fn assert_same(what: &str, left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len(), "{what}: sizes differ");
    if let Some(at) = left.iter().zip(right).position(|(a, b)| a != b) {
        panic!("{what}: first difference at {at} (granule {})", at as u64 / CHUNK);
    }
}

pub fn request(vm: &str, targets: &[&str]) -> BackupRequest {
    BackupRequest {
        vm: vm.to_owned(),
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
        full: false,
        quiesce: QuiesceMode::Off,
        freeze_deadline: Duration::from_secs(10),
        compression: Compression::Fast,
    }
}

pub fn backup(exporter: &Exporter<'_>, vm: &str, targets: &[&str]) -> BackupReport {
    exporter.backup(&request(vm, targets), &ignore, &AtomicBool::new(false)).unwrap()
}

pub fn restore(
    exporter: &Exporter<'_>,
    point: &str,
    name: &str,
    target: Option<&str>,
) -> (Result<VmConfig>, Vec<String>) {
    let request = RestoreRequest {
        point: point.to_owned(),
        name: name.to_owned(),
        target: target.map(str::to_owned),
        in_place: false,
    };
    let notes = Mutex::new(Vec::new());
    let listen = |event| {
        if let RunEvent::Note { text } = event {
            notes.lock().push(text);
        }
    };
    let result = exporter.restore_vm(&request, &listen, &AtomicBool::new(false));
    (result, notes.into_inner())
}

/// The disks of a restore point, whole.
pub fn point_content(exporter: &Exporter<'_>, point: Uuid) -> BTreeMap<String, Vec<u8>> {
    let disks: Vec<(String, Arc<dyn Block>)> = exporter.open_point(&point.to_string()).unwrap();
    disks.into_iter().map(|(name, disk)| (name, read_all(disk.as_ref()))).collect()
}

/// Files below a folder that are larger than `over` bytes, with paths.
pub fn files_over(dir: &Path, over: u64) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_over(&entry.path(), over));
        } else if entry.metadata().unwrap().len() > over {
            found.push(entry.path());
        }
    }
    found
}
