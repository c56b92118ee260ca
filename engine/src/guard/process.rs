//! The guard process.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::keeper;
use super::lines::Lines;
use crate::agent;
use crate::engine::{Engine, EngineOptions, Place};
use crate::error::{EngineError, Result};
use crate::lock::FileLock;
use crate::process::{ProcessId, wait_readable};
use crate::{machine, owner, store};

/// How often the guard looks even if nothing has told it to.
const LOOK: Duration = Duration::from_secs(30);
/// First wait before a disk owner that did not start is started again; doubles up to `SLOWEST`.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const SLOWEST: Duration = Duration::from_secs(30);
/// Longest clean close of the disks.
const CLOSE: Duration = Duration::from_secs(300);
/// How long a new guard tries to end a freeze that its predecessor left behind.
const THAW: Duration = Duration::from_secs(365 * 24 * 3600);

/// Runs the guard of a running VM until the VM ends. Returns at once if the VM is not running or has
/// a guard already.
pub fn run(data_dir: &Path, vm: &str, options: EngineOptions) -> Result<()> {
    let engine = Engine::at(data_dir, options)?;
    let (folder, config) = engine.load(vm)?;
    let place = engine.place(folder, &config);
    place.run.create()?;
    let Some(_lock) = FileLock::try_take(&place.run.guard_lock())? else {
        return Ok(());
    };
    if let Some(own) = ProcessId::own() {
        place.run.set_guard_pid(&own)?;
    }
    let guard = Guard { place: Arc::new(place) };
    let result = guard.watch();
    let finished = guard.finish();
    result.and(finished)
}

struct Guard {
    place: Arc<Place>,
}

impl Guard {
    /// Keeps the VM's disk owner alive until the machine ends.
    fn watch(&self) -> Result<()> {
        let Some(machine) = machine::process(&self.place)? else { return Ok(()) };
        self.listen(&machine)?;
        let mut retry = FIRST_RETRY;
        while let Some(machine_end) = machine.pidfd() {
            if let Some(owner_end) = owner::process(&self.place.run).and_then(|id| id.pidfd()) {
                wait_readable(&[&machine_end, &owner_end], LOOK);
                continue;
            }
            // The guest's disks stand still until there is an owner again (QEMU reconnects).
            let began = Instant::now();
            match owner::ensure(&self.place) {
                Ok(()) => {
                    tracing::warn!(millis = began.elapsed().as_millis(), "disk owner restarted");
                    retry = FIRST_RETRY;
                }
                Err(error) => {
                    tracing::error!(%error, "the disk owner cannot be started; trying again");
                    wait_readable(&[&machine_end], retry);
                    retry = (retry * 2).min(SLOWEST);
                }
            }
        }
        Ok(())
    }

    /// Serves the freeze keeper in the background, and first ends a freeze that a guard before us may
    /// have left.
    fn listen(&self, machine: &ProcessId) -> Result<()> {
        let socket = self.place.run.guard_socket();
        store::remove_file(&socket)?;
        let listener =
            UnixListener::bind(&socket).map_err(|e| EngineError::io("listen on", &socket, e))?;
        let (place, id) = (Arc::clone(&self.place), machine.clone());
        std::thread::spawn(move || {
            if let Err(error) = agent::thaw_if_marked(&place.run, THAW, &|| id.alive()) {
                tracing::error!(%error, "thaw");
            }
        });
        let (place, id) = (Arc::clone(&self.place), machine.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(lines) = stream.and_then(Lines::new) else {
                    // Out of descriptors, perhaps: do not spin.
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                };
                let (place, id) = (Arc::clone(&place), id.clone());
                std::thread::spawn(move || keeper::serve(lines, &place.run, &|| id.alive()));
            }
        });
        Ok(())
    }

    /// The machine has ended: close the disks clean and leave nothing behind.
    fn finish(&self) -> Result<()> {
        let closed = owner::shutdown(&self.place.run, CLOSE);
        store::remove_file(&self.place.run.frozen_marker())?;
        self.place.run.clear_guard()?;
        closed
    }
}
