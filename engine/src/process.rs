//! Processes by identity: a process id alone may be somebody else's tomorrow.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process: its id, when it started, and in which life of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// Process id.
    pub(crate) pid: u32,
    /// Start time in clock ticks since the host's start.
    pub(crate) start: u64,
    /// The kernel's boot id: ids and start times repeat after a restart of the host.
    pub(crate) boot: String,
}

impl ProcessId {
    /// This process.
    pub(crate) fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// The living process with this id now; `None` for a zombie. A process whose first thread has
    /// ended lives, with all its files and locks, until the last thread has.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = Stat::of(pid).filter(|stat| !stat.ended)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        Some(Self { pid, start: stat.start, boot })
    }

    /// Whether this very process lives.
    pub(crate) fn alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Whether it lives, but has been killed or is on its way out: nothing it holds will be used again.
    pub(crate) fn dying(&self) -> bool {
        let stat = Stat::of(self.pid).filter(|stat| stat.start == self.start);
        stat.is_some_and(|stat| stat.ending && !stat.ended) && self.alive()
    }

    /// One line for a pid file: pid, start, boot id.
    pub(crate) fn to_line(&self) -> String {
        format!("{} {} {}\n", self.pid, self.start, self.boot)
    }

    /// Reads what [`ProcessId::to_line`] wrote.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let pid = words.next()?.parse().ok()?;
        let start = words.next()?.parse().ok()?;
        Some(Self { pid, start, boot: words.next()?.to_owned() })
    }

    /// A descriptor that becomes readable when the process ends; `None` if it has.
    pub(crate) fn pidfd(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Checked after opening: the descriptor now stands for this process or for none.
        self.alive().then_some(fd)
    }

    /// Waits for its end; false after `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let Some(fd) = self.pidfd() else { return !self.alive() };
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if wait_readable(&[&fd], left) || !self.alive() {
                return true;
            }
            if left.is_zero() {
                return false;
            }
        }
    }

    /// Sends a signal, never to another process that got the same id.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(fd) = self.pidfd() {
            let _ = pidfd_send_signal(&fd, signal);
        }
    }
}

/// What the kernel says of a process.
struct Stat {
    /// All threads have ended and closed their files.
    ended: bool,
    /// Its end has begun.
    ending: bool,
    /// Start time in clock ticks since the host's start.
    start: u64,
}

impl Stat {
    /// The kernel's `PF_EXITING`.
    const EXITING: u64 = 4;
    /// SIGKILL in a set of signals.
    const KILL: u64 = 1 << (9 - 1);

    fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The program's name, in parentheses, may itself hold spaces and parentheses. What follows
        // begins with the third field of proc(5).
        let fields: Vec<&str> =
            stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let state = *fields.first()?;
        let (flags, threads, start, pending) = (number(9)?, number(20)?, number(22)?, number(31)?);
        Some(Self {
            ended: state == "X" || state == "Z" && threads <= 1,
            ending: state == "Z" || flags & Self::EXITING != 0 || pending & Self::KILL != 0,
            start,
        })
    }
}

/// Waits until one of the descriptors is readable or `timeout` has passed; gives whether one is.
pub(crate) fn wait_readable(fds: &[&OwnedFd], timeout: Duration) -> bool {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    matches!(poll(&mut polled, Some(&timeout)), Ok(n) if n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let own = ProcessId::own().unwrap();
        assert!(own.alive());
        assert_eq!(ProcessId::from_line(&own.to_line()), Some(own.clone()));
        assert!(!ProcessId { start: own.start + 1, ..own.clone() }.alive());
        assert!(!ProcessId { boot: "another".to_owned(), ..own }.alive());
    }

    #[test]
    fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(!id.wait(Duration::from_millis(20)));
        id.signal(Signal::KILL);
        assert!(id.wait(Duration::from_secs(10)));
        assert!(!id.alive(), "a zombie is not alive");
        assert!(!id.dying());
        child.wait().unwrap();
    }

    #[test]
    fn a_process_lives_as_long_as_its_last_thread() {
        // Only the first thread makes the plain exit call; the other one goes on.
        let script = "import ctypes, threading, time\n\
            threading.Thread(target=time.sleep, args=(60,)).start()\n\
            ctypes.CDLL(None).syscall(60, 0)";
        let mut child = std::process::Command::new("python3").args(["-c", script]).spawn().unwrap();
        let pid = child.id();
        let begun = Instant::now();
        let zombie = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat[stat.rfind(')').unwrap()..].starts_with(") Z")
        };
        while !zombie() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the first thread does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let id = ProcessId::of(pid).expect("it has a thread left");
        assert!(id.alive() && id.dying());
        assert!(!id.wait(Duration::from_millis(20)));
        id.signal(Signal::KILL);
        assert!(id.wait(Duration::from_secs(10)));
        assert!(!id.alive() && !id.dying());
        child.wait().unwrap();
    }
}
