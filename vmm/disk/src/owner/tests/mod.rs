//! Helpers for the tests of the owner: disks, an owner in a thread, an owner in a process.

mod checkpoints;
mod control;
mod kills;
mod merges;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{Client, MergeState, OwnedDisk, OwnerConfig, OwnerReport, Request, Response, run};
use crate::block::Block;
use crate::chain::Chain;
use crate::error::Result;
use crate::nbd;
use crate::vhdx::{Access, CreateOptions};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Names the environment variable by which a test process becomes an owner.
const OWNER_ENV: &str = "TIDEMARK_TEST_OWNER";

/// The disks of one VM, in a folder of their own.
pub(super) struct Vm {
    pub(super) dir: TempDir,
}

impl Vm {
    /// Creates the named disks, 32 MiB each.
    pub(super) fn new(names: &[&str]) -> Self {
        Self::sized(names, 32 * MIB)
    }

    pub(super) fn sized(names: &[&str], size: u64) -> Self {
        let vm = Self { dir: TempDir::new().unwrap() };
        let options = CreateOptions {
            size,
            block_size: 1 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            fixed: false,
            disk_id: None,
            parent: None,
        };
        for name in names {
            Chain::create(&vm.file(&format!("{name}.vhdx")), &options).unwrap();
        }
        vm
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn control(&self) -> PathBuf {
        self.file("control.sock")
    }

    /// An owner's configuration: (disk, leaf file).
    pub(super) fn config(&self, leaves: &[(&str, &str)]) -> OwnerConfig {
        let disk = |&(name, leaf): &(&str, &str)| OwnedDisk {
            name: name.to_owned(),
            leaf: self.file(leaf),
        };
        OwnerConfig {
            disks: leaves.iter().map(disk).collect(),
            nbd_socket: self.file("nbd.sock"),
            control_socket: self.control(),
        }
    }

    /// An NBD client of a disk.
    pub(super) fn disk(&self, name: &str) -> nbd::Client {
        nbd::Client::connect(&self.file("nbd.sock"), name).unwrap()
    }

    /// New leaves of a checkpoint: `<disk>_<checkpoint>.avhdx`.
    pub(super) fn leaves(&self, disks: &[&str], checkpoint: &str) -> Vec<(String, PathBuf)> {
        let leaf =
            |disk: &&str| ((*disk).to_owned(), self.file(&format!("{disk}_{checkpoint}.avhdx")));
        disks.iter().map(leaf).collect()
    }
}

/// Tells the threads of a test to end, also when it fails.
pub(super) struct StopOnDrop<'a>(pub(super) &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Connects as soon as the owner answers.
pub(super) fn reach(control: &Path) -> Client {
    let start = Instant::now();
    loop {
        match Client::connect(control) {
            Ok(client) => return client,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn report(client: &mut Client) -> OwnerReport {
    match client.call(&Request::Report, PATIENCE).unwrap() {
        Response::Report(report) => report,
        other => panic!("{other:?}"),
    }
}

pub(super) fn must(client: &mut Client, request: &Request) {
    assert!(matches!(client.call(request, PATIENCE).unwrap(), Response::Ok));
}

/// Prepares, commits and settles a checkpoint; gives the pause and each disk's id.
pub(super) fn checkpoint(
    client: &mut Client,
    leaves: &[(String, PathBuf)],
) -> Result<(u64, Vec<crate::rct::RctId>)> {
    client.call(&Request::PrepareCheckpoint { leaves: leaves.to_vec() }, PATIENCE)?;
    match client.call(&Request::CommitCheckpoint { leaves: leaves.to_vec() }, PATIENCE)? {
        Response::Committed { pause_us, disks } => {
            client.call(&Request::SettleCheckpoint, PATIENCE)?;
            Ok((pause_us, disks.into_iter().map(|d| d.rct_id).collect()))
        }
        other => panic!("{other:?}"),
    }
}

/// Waits until a disk's merge has ended.
pub(super) fn merge_end(client: &mut Client, disk: &str) -> MergeState {
    let start = Instant::now();
    loop {
        let report = report(client);
        let state = report.disks.into_iter().find(|d| d.disk == disk).unwrap().merge;
        if !matches!(state, MergeState::Running { .. }) {
            return state;
        }
        assert!(start.elapsed() < PATIENCE, "the merge does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a chain opened for reading holds.
pub(super) fn content(leaf: &Path) -> Vec<u8> {
    let chain = Chain::open(leaf, Access::ReadOnly).unwrap();
    let mut content = vec![0; chain.geometry().size as usize];
    chain.read_at(0, &mut content).unwrap();
    content
}

/// An owner in a thread of the test; shut down when dropped.
pub(super) struct Owner {
    control: PathBuf,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Owner {
    pub(super) fn start(config: OwnerConfig) -> Self {
        let control = config.control_socket.clone();
        let thread = std::thread::spawn(move || run(config));
        let owner = Self { control, thread: Some(thread) };
        owner.client();
        owner
    }

    pub(super) fn client(&self) -> Client {
        reach(&self.control)
    }

    pub(super) fn shut_down(mut self) {
        must(&mut self.client(), &Request::Shutdown);
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let asked = Client::connect(&self.control)
                .and_then(|mut client| client.call(&Request::Shutdown, PATIENCE));
            if asked.is_ok() {
                let _ = thread.join();
            }
        }
    }
}

/// An owner in a process of its own; killed when dropped.
pub(super) struct OwnerProcess(pub(super) Child);

impl OwnerProcess {
    pub(super) fn start(config: &OwnerConfig) -> Self {
        let mut lines = vec![config.nbd_socket.clone(), config.control_socket.clone()];
        for disk in &config.disks {
            lines.push(PathBuf::from(&disk.name));
            lines.push(disk.leaf.clone());
        }
        let lines: Vec<_> = lines.iter().map(|line| line.to_str().unwrap()).collect();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "owner::tests::owner_process", "--ignored", "--nocapture"])
            .env(OWNER_ENV, lines.join("\n"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    pub(super) fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for OwnerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Not a test: what [`OwnerProcess`] runs. Does nothing when it is run as a test.
#[test]
#[ignore = "the body of a helper process"]
fn owner_process() {
    let Ok(lines) = std::env::var(OWNER_ENV) else { return };
    let lines: Vec<&str> = lines.lines().collect();
    let disk = |pair: &[&str]| OwnedDisk { name: pair[0].to_owned(), leaf: pair[1].into() };
    run(OwnerConfig {
        nbd_socket: lines[0].into(),
        control_socket: lines[1].into(),
        disks: lines[2..].chunks(2).map(disk).collect(),
    })
    .unwrap();
}
