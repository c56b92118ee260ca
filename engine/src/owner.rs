//! The disk owner process of a running VM: starting it, reaching it, shutting it down.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use tidemark_disk::DiskError;
use tidemark_disk::owner::{Client, OwnerReport, PROTOCOL_VERSION, Request, Response};

use crate::config::VmConfig;
use crate::engine::Place;
use crate::error::{EngineError, Result};
use crate::intent::Intent;
use crate::leaves::current_leaves;
use crate::lock::FileLock;
use crate::process::ProcessId;
use crate::runtime::{RunDir, log_tail};
use crate::spawn;

/// Longest wait for the answer to a question.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest start: the logs and tracking of all disks are recovered in it.
const START: Duration = Duration::from_secs(120);

/// A connection to the owner, if one lives.
pub(crate) fn connect(run: &RunDir) -> std::result::Result<Client, DiskError> {
    Client::connect(&run.control_socket())
}

/// How long a killed owner may take to vanish.
const DYING: Duration = Duration::from_secs(5);

/// The owner's state.
pub(crate) fn report(client: &mut Client) -> std::result::Result<OwnerReport, DiskError> {
    match client.call(&Request::Report, ANSWER)? {
        Response::Report(report) if report.protocol == PROTOCOL_VERSION => Ok(report),
        Response::Report(report) => Err(DiskError::Owner(format!(
            "it speaks version {} of the control protocol, this program version {PROTOCOL_VERSION}; \
             stop the VM and start it again",
            report.protocol
        ))),
        other => Err(DiskError::Owner(format!("unexpected answer {other:?}"))),
    }
}

/// Whether the owner has a file in a disk's chain.
pub(crate) fn has_file(report: &OwnerReport, disk: &str, file: &str) -> bool {
    let mut files = report.disks.iter().filter(|d| d.disk == disk).flat_map(|d| &d.files);
    files.any(|path| path.file_name() == Some(OsStr::new(file)))
}

/// The living owner's process.
pub(crate) fn process(run: &RunDir) -> Option<ProcessId> {
    if let Some(id) = run.owner_pid().filter(ProcessId::alive) {
        return Some(id);
    }
    if !run.control_socket().exists() {
        return None;
    }
    // Not recorded, if whoever started it was killed before it could do so.
    let pid = report(&mut connect(run).ok()?).ok()?.pid;
    let id = ProcessId::of(pid)?;
    let _ = run.set_owner_pid(&id);
    Some(id)
}

/// While this lock is held, no disk owner is started, so that what the present one reports stays true
/// as long as it lives, and the next one sees the files and records as they are when it is released.
pub(crate) fn hold(run: &RunDir) -> Result<FileLock> {
    FileLock::take(&run.owner_lock(), START)?
        .ok_or_else(|| EngineError::State(format!("{} stays locked", run.owner_lock().display())))
}

/// Makes sure that the VM's disks have an owner. Any number of processes may try at once.
pub(crate) fn ensure(place: &Place) -> Result<()> {
    let run = &place.run;
    let _lock = hold(run)?;
    if let Some(id) = process(run) {
        match connect(run).and_then(|mut client| report(&mut client)) {
            Ok(_) => return Ok(()),
            // Killed, and just about to be gone.
            Err(_) if id.wait(DYING) => {}
            Err(e) => {
                return Err(EngineError::State(format!(
                    "the disk owner (process {}) does not answer: {e}",
                    id.pid
                )));
            }
        }
    }
    run.clear_owner()?;
    // Read now, under the lock: a checkpoint may have moved on while we waited.
    let config = VmConfig::load(&place.folder.config())?;
    let intent = Intent::load(&place.folder)?;
    let leaves = current_leaves(&place.folder, &config, intent.as_ref())?;
    start(place, &leaves)
}

fn start(place: &Place, leaves: &[(String, PathBuf)]) -> Result<()> {
    let run = &place.run;
    let mut command = spawn::disk_server(&place.program, run, leaves);
    let mut child = spawn::start(&mut command, &run.owner_log())?;
    let end = Instant::now() + START;
    loop {
        let up = connect(run).and_then(|mut client| report(&mut client));
        if up.is_ok() && run.nbd_socket().exists() {
            if let Some(id) = child.pid().and_then(ProcessId::of) {
                run.set_owner_pid(&id)?;
            }
            child.leave();
            return Ok(());
        }
        if child.exited().is_some() || Instant::now() >= end {
            return Err(EngineError::State(format!(
                "the disk owner does not start: {}",
                log_tail(&run.owner_log())
            )));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Shuts the owner down clean and waits for its end; nothing to do if there is none.
pub(crate) fn shutdown(run: &RunDir, timeout: Duration) -> Result<()> {
    let _lock = hold(run)?;
    if let Some(id) = process(run) {
        // The answer may be lost with the connection: its end is what counts.
        let asked = connect(run).and_then(|mut client| client.call(&Request::Shutdown, timeout));
        if let Err(error) = asked {
            tracing::debug!(%error, "shutdown request");
            if !id.wait(Duration::from_secs(1)) {
                id.signal(Signal::TERM);
            }
        }
        if !id.wait(timeout) {
            return Err(EngineError::State(format!(
                "the disk owner (process {}) does not end: {}",
                id.pid,
                log_tail(&run.owner_log())
            )));
        }
    }
    run.clear_owner()
}
