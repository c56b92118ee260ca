//! The engine without a machine: everything that a stopped VM can go through, and what a kill at any
//! point of it leaves.

mod crash;
mod folders;
mod import;
mod model;
mod offline;
mod restore;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tempfile::TempDir;

use tidemark_disk::Block;
use tidemark_disk::vhdx::Access;
use tidemark_driver::DriverKind;

use crate::{
    CheckpointPurpose, CheckpointRecord, CheckpointRequest, CheckpointType, CreateVm, Engine,
    EngineOptions, NewDisk, QuiesceMode, Result, VmSession,
};

/// Disk size of most tests: a few VHDX blocks.
const SIZE: u64 = 8 << 20;

/// A data directory.
struct Fixture {
    dir: TempDir,
    engine: Engine,
}

impl Fixture {
    fn new() -> Self {
        // A kill of a process loses nothing that it wrote, synced or not: so memory serves as well as
        // a disk, and its syncs are for free.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        let engine = open(dir.path());
        Self { dir, engine }
    }

    /// With a VM `vm` of empty disks.
    fn with_vm(disks: usize) -> Self {
        let fixture = Self::new();
        fixture
            .engine
            .create(&request("vm", disks), &|_, _, _| {}, &AtomicBool::new(false))
            .unwrap();
        fixture
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn vm_path(&self, rest: &str) -> PathBuf {
        self.path().join("vms/vm").join(rest)
    }

    fn session(&self) -> VmSession<'_> {
        self.engine.session("vm").unwrap()
    }
}

fn open(data_dir: &Path) -> Engine {
    Engine::open(data_dir, EngineOptions { program: "/bin/false".into() }).unwrap()
}

fn request(name: &str, disks: usize) -> CreateVm {
    CreateVm {
        name: name.to_owned(),
        driver: DriverKind::Qemu,
        cpus: 1,
        memory: 256 << 20,
        kernel: None,
        initrd: None,
        cmdline: None,
        disks: vec![NewDisk::Empty(SIZE); disks],
    }
}

fn checkpoint(name: &str, purpose: CheckpointPurpose) -> CheckpointRequest {
    CheckpointRequest {
        name: Some(name.to_owned()),
        checkpoint_type: CheckpointType::Production,
        quiesce: QuiesceMode::Require,
        freeze_deadline: Duration::from_secs(5),
        purpose,
    }
}

fn take(session: &mut VmSession<'_>, name: &str) -> CheckpointRecord {
    session.create_checkpoint(&checkpoint(name, CheckpointPurpose::User)).unwrap()
}

fn delete(session: &mut VmSession<'_>, name: &str) -> Result<()> {
    session.delete_checkpoint(name, &|_, _, _| {}, &AtomicBool::new(false))
}

/// Writes to a disk of the stopped VM.
fn write(session: &VmSession<'_>, disk: &str, offset: u64, bytes: &[u8]) {
    let chain = session.open_disk(disk, Access::ReadWrite).unwrap();
    chain.write_at(offset, bytes).unwrap();
    chain.close().unwrap();
}

fn content_of(disk: &dyn Block) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.geometry().size).unwrap()];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

fn content(session: &VmSession<'_>, disk: &str) -> Vec<u8> {
    content_of(&*session.open_disk(disk, Access::ReadOnly).unwrap())
}

fn checkpoint_content(session: &VmSession<'_>, name: &str, disk: usize) -> Vec<u8> {
    let id = session.find_checkpoint(name).unwrap().id;
    content_of(&*session.open_checkpoint(id).unwrap()[disk].disk)
}

/// The disk files of the VM, by name.
fn disk_files(fixture: &Fixture) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixture.vm_path("disks"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Checks that the VM's folder holds what its configuration names, and nothing else.
fn assert_tidy(fixture: &Fixture, session: &VmSession<'_>) {
    let config = session.config();
    let mut wanted: Vec<String> = config
        .disk_files()
        .flat_map(|f| [f.to_owned(), format!("{f}.mrt"), format!("{f}.rct")])
        .collect();
    wanted.sort();
    assert_eq!(disk_files(fixture), wanted);
    assert!(!fixture.vm_path("intent.json").exists());
    let mut snapshots: Vec<String> =
        config.checkpoints.iter().map(|c| format!("{}.vmcx", c.id)).collect();
    snapshots.sort();
    let found = crate::folder::entries(&fixture.vm_path("snapshots")).unwrap();
    assert_eq!(found, snapshots);
    for (record, at) in config.checkpoints.iter().zip(0..) {
        let path = fixture.vm_path("snapshots").join(format!("{}.vmcx", record.id));
        let then = crate::VmConfig::load(&path).unwrap();
        let files =
            |c: &crate::VmConfig| c.disks.iter().map(|d| d.leaf.clone()).collect::<Vec<_>>();
        let sealed: Vec<_> = record.disks.iter().map(|d| d.file.clone()).collect();
        assert_eq!(files(&then), sealed);
        assert_eq!(then.checkpoints, config.checkpoints[..at]);
    }
}

/// A small generator: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % below
    }
}
