//! The owner process itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::checkpoint::{self, Checkpoints};
use super::control::Control;
use super::disk::Disk;
use super::protocol::{DiskReport, OwnerReport, PROTOCOL_VERSION, Request, Response};
use crate::chain::Chain;
use crate::error::{DiskError, Result};
use crate::nbd::{Export, Server};
use crate::rct::Continuity;
use crate::vhdx::Access;

/// How often tracking is brought to disk, so that a crash costs little re-reading.
const HOUSEKEEPING: Duration = Duration::from_secs(30);
/// How long a predecessor that is just ending may keep its locks.
const PREDECESSOR: Duration = Duration::from_secs(5);
/// How often its locks are tried.
const RETRY: Duration = Duration::from_millis(50);

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

/// What ends the owner.
enum End {
    /// A client asked; it waits for what came of it.
    Asked(Sender<Response>),
    /// SIGTERM or SIGINT.
    Signal,
}

/// The owner's state, shared by all its threads.
struct Owner {
    disks: Vec<Disk>,
    server: Server,
    /// Held while disks are switched, or a merge is started. `None` once the owner is ending.
    changing: Mutex<Option<Checkpoints>>,
    end: Sender<End>,
}

/// Runs until `Shutdown` or SIGTERM; both close all disks clean.
///
/// A kill at any moment leaves socket files, which the next owner replaces, and open disks, which it
/// recovers: their logs are replayed and tracking marks what it cannot vouch for.
pub fn run(config: OwnerConfig) -> Result<()> {
    // Before anything is open: a signal from here on ends the owner in good order.
    let (end, ends) = mpsc::channel();
    let _signals = watch_signals(end.clone(), &config.control_socket)?;
    let disks = open_disks(config.disks)?;
    let exports =
        disks.iter().map(|disk| Export::new(disk.name.clone(), disk.chain.clone())).collect();
    let server = Server::bind_with(&config.nbd_socket, exports)?;
    let changing = Mutex::new(Some(Checkpoints::default()));
    let owner = Arc::new(Owner { disks, server, changing, end });
    let control = {
        let owner = Arc::downgrade(&owner);
        let gone = || Response::Error { message: "the disk owner is ending".to_owned() };
        Control::start(
            &config.control_socket,
            Arc::new(move |request| owner.upgrade().map_or_else(gone, |o| o.answer(request))),
        )?
    };
    let first = owner.serve_until_told(&ends);
    control.stop_listening();
    let closed = owner.close();
    for end in std::iter::once(first).chain(ends.try_iter()) {
        if let End::Asked(reply) = end {
            let _ = reply.send(match &closed {
                Ok(()) => Response::Ok,
                Err(error) => Response::Error { message: error.to_string() },
            });
        }
    }
    // Nobody waits for an end that has come; then hang up, after the last response is out.
    drop(ends);
    drop(control);
    closed
}

/// Turns signals into the owner's end, as long as the guard lives.
fn watch_signals(end: Sender<End>, control: &Path) -> Result<SignalGuard> {
    let failed = |e| DiskError::io("watch signals for", control, e);
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(failed)?;
    let handle = signals.handle();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for _ in signals.forever() {
                if end.send(End::Signal).is_err() {
                    break;
                }
            }
        })
        .map_err(failed)?;
    Ok(SignalGuard(handle))
}

struct SignalGuard(signal_hook::iterator::Handle);

impl Drop for SignalGuard {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn open_disks(wanted: Vec<OwnedDisk>) -> Result<Vec<Disk>> {
    let patience = Instant::now() + PREDECESSOR;
    let mut disks: Vec<Disk> = Vec::new();
    for disk in wanted {
        if disk.name.is_empty() || disks.iter().any(|other| other.name == disk.name) {
            return Err(DiskError::State(format!(
                "disk name {:?} is empty or used twice",
                disk.name
            )));
        }
        let chain = open_chain(&disk.leaf, patience)?;
        if let Continuity::Lost(why) = chain.continuity() {
            tracing::warn!(
                disk = disk.name,
                why,
                "change tracking starts anew: the next backup reads everything"
            );
        }
        disks.push(Disk::new(disk.name, chain));
    }
    Ok(disks)
}

fn open_chain(leaf: &Path, patience: Instant) -> Result<Chain> {
    loop {
        match Chain::open(leaf, Access::ReadWrite) {
            Err(DiskError::Busy { .. }) if Instant::now() < patience => thread::sleep(RETRY),
            other => return other,
        }
    }
}

impl Owner {
    /// Keeps house until the end is called for.
    fn serve_until_told(&self, ends: &Receiver<End>) -> End {
        let mut next = Instant::now() + HOUSEKEEPING;
        loop {
            match ends.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Disconnected) => return End::Signal,
                Err(RecvTimeoutError::Timeout) => {}
            }
            for disk in &self.disks {
                // One at a time with checkpoints: a pause would have to wait for the syncs in here.
                if let Err(error) = self.change(|_| disk.chain.flush_map()) {
                    // Nothing is lost: what could not be flushed is re-read after a crash.
                    tracing::warn!(disk = disk.name, %error, "change tracking not flushed");
                }
            }
            next = Instant::now() + HOUSEKEEPING;
        }
    }

    fn answer(&self, request: Request) -> Response {
        let answer = match request {
            Request::Report => return Response::Report(self.report()),
            Request::PrepareCheckpoint { leaves } => self
                .change(|checkpoints| checkpoints.prepare(&self.disks, &leaves))
                .map(|()| Response::Ok),
            Request::CommitCheckpoint { leaves } => {
                self.change(|checkpoints| checkpoints.commit(&self.disks, &leaves))
            }
            Request::SettleCheckpoint => checkpoint::settle(&self.disks).map(|()| Response::Ok),
            Request::DiscardCheckpoint => {
                self.change(|checkpoints| checkpoints.discard(&self.disks)).map(|()| Response::Ok)
            }
            Request::StartMerge { disk, child } => {
                let start = |checkpoints: &mut Checkpoints| {
                    checkpoints.abandon(&self.disks);
                    self.disk(&disk)?.start_merge(&child)
                };
                self.change(start).map(|()| Response::Ok)
            }
            // Not under `changing`: a merge must be stoppable whatever else is going on.
            Request::CancelMerge { disk } => self.disk(&disk).map(|disk| {
                disk.cancel_merge();
                Response::Ok
            }),
            Request::Shutdown => return self.shut_down(),
        };
        answer.unwrap_or_else(|error| Response::Error { message: error.to_string() })
    }

    fn disk(&self, name: &str) -> Result<&Disk> {
        self.disks
            .iter()
            .find(|disk| disk.name == name)
            .ok_or_else(|| DiskError::State(format!("this owner has no disk {name}")))
    }

    /// Runs one change of the chains at a time, and none once the owner is ending.
    fn change<T>(&self, change: impl FnOnce(&mut Checkpoints) -> Result<T>) -> Result<T> {
        match &mut *self.changing.lock() {
            Some(checkpoints) => change(checkpoints),
            None => Err(DiskError::State("the disk owner is ending".to_owned())),
        }
    }

    fn report(&self) -> OwnerReport {
        let connections = self.server.connections();
        let disk_report = |disk: &Disk| {
            let counters = self.server.counters(&disk.name);
            // The state first: a merge that is `Done` here has left the files below.
            let merge = disk.merge_state();
            DiskReport {
                disk: disk.name.clone(),
                files: disk.chain.files(),
                connections,
                read_bytes: counters.read,
                written_bytes: counters.written,
                merge,
                tracking_lost: match disk.chain.continuity() {
                    Continuity::Kept => None,
                    Continuity::Lost(why) => Some(why),
                },
            }
        };
        OwnerReport {
            protocol: PROTOCOL_VERSION,
            pid: std::process::id(),
            disks: self.disks.iter().map(disk_report).collect(),
        }
    }

    fn shut_down(&self) -> Response {
        let (reply, response) = mpsc::channel();
        let ending = || Response::Error { message: "the disk owner is ending".to_owned() };
        match self.end.send(End::Asked(reply)) {
            Ok(()) => response.recv().unwrap_or_else(|_| ending()),
            Err(_) => ending(),
        }
    }

    /// Ends merges and clients, then closes every disk clean. An error is the first one; the disks it
    /// concerns are recovered when they are opened next.
    fn close(&self) -> Result<()> {
        // Waits for a switch that is under way; nothing begins after it.
        *self.changing.lock() = None;
        for disk in &self.disks {
            disk.cancel_merge();
        }
        self.server.stop();
        let mut result = Ok(());
        for disk in &self.disks {
            if let Err(error) = disk.chain.close() {
                tracing::warn!(disk = disk.name, %error, "disk not closed clean");
                result = result.and(Err(error));
            }
        }
        result
    }
}
