//! Starting processes that outlive us: the disk owner and the guard.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::error::{EngineError, Result};
use crate::runtime::RunDir;

/// A log larger than this is begun anew at the next start.
const MAX_LOG: u64 = 1 << 20;

/// A process that we have just started and may still have to stop.
pub(crate) struct Starting {
    child: Option<Child>,
}

/// Starts a program in the background with its output in `log`.
pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Starting> {
    let io = |op, e| EngineError::io(op, log, e);
    if log.metadata().is_ok_and(|m| m.len() > MAX_LOG) {
        let _ = std::fs::rename(log, log.with_extension("log.1"));
    }
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)
        .map_err(|e| io("open", e))?;
    let errors = file.try_clone().map_err(|e| io("open", e))?;
    command.stdin(Stdio::null()).stdout(file).stderr(errors).current_dir("/");
    let child = command
        .spawn()
        .map_err(|e| EngineError::io("start", Path::new(command.get_program()), e))?;
    Ok(Starting { child: Some(child) })
}

impl Starting {
    /// Its process id.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How it ended, if it has.
    pub(crate) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|c| c.try_wait().ok().flatten())
    }

    /// It stands on its own feet now. While we live, somebody must take its exit status, or it would
    /// stay a zombie.
    pub(crate) fn leave(mut self) {
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

impl Drop for Starting {
    /// Not left alone: it failed, and must not linger.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A program in a session of its own, so that neither our terminal's end nor its Ctrl-C reaches it.
/// `setsid` (util-linux) replaces itself by the program: the process id stays.
fn in_own_session(program: &Path) -> Command {
    let mut command = Command::new("setsid");
    command.arg(program);
    command
}

/// The command line of a disk owner.
pub(crate) fn disk_server(program: &Path, run: &RunDir, leaves: &[(String, PathBuf)]) -> Command {
    let mut command = in_own_session(program);
    command.arg("disk-server");
    for (name, leaf) in leaves {
        let mut disk = OsString::from(format!("{name}="));
        disk.push(leaf);
        command.arg("--disk").arg(disk);
    }
    command.arg("--nbd-socket").arg(run.nbd_socket());
    command.arg("--control-socket").arg(run.control_socket());
    command
}

/// The command line of a guard.
pub(crate) fn vm_guard(program: &Path, data_dir: &Path, vm: &str) -> Command {
    let mut command = in_own_session(program);
    command.arg("vm-guard").arg("--data-dir").arg(data_dir).arg("--vm").arg(vm);
    command
}
