//! The QEMU process: how it is found again, and how it ends.
//!
//! Three files in the run directory:
//! * `machine.lock`: QEMU's standard input. The lock on it lives exactly as long as QEMU, however
//!   the launcher died, so "does one run?" has no race and no stale answer.
//! * `machine.json`: process id, start time and boot id, written (renamed) after the launch. A kill
//!   before that leaves a locked directory without record.
//! * `qemu.pid`: written by QEMU itself; with the process's working directory as proof it replaces a
//!   missing record.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

use super::PID_FILE;
use crate::{DriverError, Result};

const LOCK_FILE: &str = "machine.lock";
const RECORD_FILE: &str = "machine.json";

/// Largest record read; a real one has 150 bytes.
const RECORD_LIMIT: u64 = 4096;

/// How long a launch waits for the lock: whoever asks whether a machine runs holds it for a moment.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// How long an ending machine may take from the first file it closes to its end.
const END_WAIT: Duration = Duration::from_secs(5);

/// How long a launch in another process may take to leave a trace of its process id.
const TRACE_WAIT: Duration = Duration::from_secs(10);

/// Names one process for all time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    format: u32,
    pid: u32,
    /// Start time in clock ticks since boot.
    start_time: u64,
    boot_id: String,
}

/// Takes the run directory's lock for a launch; `None` if a machine holds it.
pub(super) fn lock_to_launch(run_dir: &Path) -> Result<Option<File>> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        let lock = lock(run_dir)?;
        if lock.is_some() || Instant::now() >= deadline {
            return Ok(lock);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes the run directory's lock; `None` while a machine, or whoever asks for one, holds it.
fn lock(run_dir: &Path) -> Result<Option<File>> {
    let path = run_dir.join(LOCK_FILE);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(DriverError::io("open", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(DriverError::io("lock", &path)(error.into())),
    }
}

/// A running process, held by a descriptor that cannot come to mean another one.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    fd: OwnedFd,
}

impl Process {
    /// A child that has not been waited for, so that its id is its own.
    pub(super) fn of_child(pid: u32) -> Result<Self> {
        Self::open(pid)?.ok_or(DriverError::NotRunning)
    }

    fn open(pid: u32) -> Result<Option<Self>> {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self { pid, fd })),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(DriverError::Io {
                op: "open process",
                what: pid.as_raw_nonzero().to_string(),
                source: error.into(),
            }),
        }
    }

    /// Process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for the end; false after `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left)
                .unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 });
            let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => {
                    // Where it is our child, nobody else clears it away.
                    let _ = rustix::process::waitpid(Some(self.pid), WaitOptions::NOHANG);
                    return Ok(true);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(self.failed("wait for", error)),
            }
        }
    }

    /// Kills it; no error when it has ended already.
    pub(super) fn kill(&self) -> Result<()> {
        match rustix::process::pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(self.failed("kill", error)),
        }
    }

    fn failed(&self, op: &'static str, error: rustix::io::Errno) -> DriverError {
        DriverError::Io { op, what: format!("process {}", self.pid()), source: error.into() }
    }

    /// Writes the record. Killed before the rename: found by QEMU's own file instead.
    pub(super) fn record(&self, run_dir: &Path) -> Result<()> {
        let path = run_dir.join(RECORD_FILE);
        let record = Record {
            format: 1,
            pid: self.pid(),
            start_time: start_time(self.pid()).ok_or(DriverError::NotRunning)?,
            boot_id: boot_id(),
        };
        let temporary = run_dir.join("machine.json.new");
        let written = serde_json::to_vec(&record).map_err(std::io::Error::from).and_then(|text| {
            let mut file = File::create(&temporary)?;
            file.write_all(&text)?;
            std::fs::rename(&temporary, &path)
        });
        written.map_err(DriverError::io("write", &path))
    }
}

/// Removes what an ended machine left.
pub(super) fn forget(run_dir: &Path) {
    for name in [RECORD_FILE, PID_FILE] {
        let _ = std::fs::remove_file(run_dir.join(name));
    }
}

/// The process that runs in `run_dir`; `None` if none does.
pub(super) fn find(run_dir: &Path) -> Result<Option<Process>> {
    if !run_dir.exists() {
        return Ok(None);
    }
    let deadline = Instant::now() + TRACE_WAIT;
    loop {
        if lock(run_dir)?.is_some() {
            // The lock may be the first thing that an ending machine lets go.
            if let Some(process) = by_record(run_dir)? {
                process.wait(END_WAIT)?;
            }
            return Ok(None);
        }
        // One that has ended does not hold the lock: that is somebody who asks the same as we do, or is
        // launching.
        if let Some(process) = by_record(run_dir)?
            && !process.wait(Duration::ZERO)?
        {
            return Ok(Some(process));
        }
        if let Some(process) = by_pid_file(run_dir)? {
            process.record(run_dir)?;
            return Ok(Some(process));
        }
        if Instant::now() >= deadline {
            return Err(DriverError::LaunchFailed(format!(
                "a machine holds {}, but its process cannot be found; \
                 look for a qemu-system process there (lsof {}) and end it",
                run_dir.display(),
                run_dir.join(LOCK_FILE).display()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn by_record(run_dir: &Path) -> Result<Option<Process>> {
    let Some(record) = small_file(&run_dir.join(RECORD_FILE))
        .and_then(|text| serde_json::from_str::<Record>(&text).ok())
    else {
        return Ok(None);
    };
    if record.boot_id != boot_id() {
        return Ok(None);
    }
    // Opened first: a start time read afterwards is that of the process held.
    let process = Process::open(record.pid)?;
    Ok(process.filter(|_| start_time(record.pid) == Some(record.start_time)))
}

fn by_pid_file(run_dir: &Path) -> Result<Option<Process>> {
    let Some(pid) =
        small_file(&run_dir.join(PID_FILE)).and_then(|text| text.trim().parse::<u32>().ok())
    else {
        return Ok(None);
    };
    let process = Process::open(pid)?;
    let folder = std::fs::read_link(format!("/proc/{pid}/cwd"));
    let ours = match (folder, run_dir.canonicalize()) {
        (Ok(folder), Ok(run_dir)) => folder == run_dir,
        _ => false,
    };
    Ok(process.filter(|_| ours))
}

fn small_file(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    File::open(path).ok()?.take(RECORD_LIMIT).read_to_string(&mut text).ok()?;
    Some(text)
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Field 22 of /proc/PID/stat. The second field, the program's name, may hold anything, blanks and
/// brackets too, so fields are counted from its last bracket.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_as_long_as_the_child_lives() {
        let dir = tempfile::tempdir().unwrap();
        let lock_file = lock(dir.path()).unwrap().unwrap();
        let mut child =
            std::process::Command::new("sh").args(["-c", "read x"]).stdin(lock_file).spawn();
        // `read` ends at once: the file is empty.
        child.as_mut().unwrap().wait().unwrap();
        assert!(lock(dir.path()).unwrap().is_some());

        let lock_file = lock(dir.path()).unwrap().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("60").stdin(lock_file).spawn().unwrap();
        assert!(lock(dir.path()).unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(lock(dir.path()).unwrap().is_some());
    }

    #[test]
    fn a_reused_process_id_is_not_taken_for_the_machine() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_child(child.id()).unwrap();
        process.record(dir.path()).unwrap();
        assert_eq!(by_record(dir.path()).unwrap().map(|p| p.pid()), Some(child.id()));

        let path = dir.path().join(RECORD_FILE);
        let mut record: Record =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        record.start_time += 1;
        std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(by_record(dir.path()).unwrap().is_none());

        process.kill().unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        let _ = child.wait();
    }

    #[test]
    fn a_machine_is_gone_only_when_its_process_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_child(child.id()).unwrap();
        process.record(dir.path()).unwrap();
        // It has let go of its lock, and takes a while to end.
        let end = Duration::from_millis(200);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(end);
            process.kill().unwrap();
        });
        let begun = Instant::now();
        assert!(find(dir.path()).unwrap().is_none());
        assert!(begun.elapsed() >= end);
        killer.join().unwrap();
        let _ = child.wait();
    }

    #[test]
    fn an_ended_machine_is_not_found_while_somebody_asks_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        Process::of_child(child.id()).unwrap().record(dir.path()).unwrap();
        child.kill().unwrap();
        // Not waited for: its id still names it.
        let asking = lock(dir.path()).unwrap();
        assert!(asking.is_some());
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(asking);
        });
        assert!(find(dir.path()).unwrap().is_none());
        release.join().unwrap();
        assert!(lock_to_launch(dir.path()).unwrap().is_some());
        let _ = child.wait();
    }

    #[test]
    fn damaged_records_are_no_machines() {
        let dir = tempfile::tempdir().unwrap();
        for text in [
            "",
            "{",
            "{\"format\":1}",
            "\u{0}\u{0}",
            "{\"format\":1,\"pid\":0,\"start_time\":1,\"boot_id\":\"\"}",
        ] {
            std::fs::write(dir.path().join(RECORD_FILE), text).unwrap();
            assert!(by_record(dir.path()).unwrap().is_none(), "{text:?}");
        }
        std::fs::write(dir.path().join(PID_FILE), "1\n").unwrap();
        assert!(by_pid_file(dir.path()).unwrap().is_none());
        assert!(find(dir.path()).unwrap().is_none());
    }
}
