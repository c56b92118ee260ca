//! The engine's side of the guard.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use super::lines::{Lines, Received};
use super::protocol::{Request, Response};
use crate::agent;
use crate::error::{EngineError, Result};
use crate::runtime::{RunDir, log_tail};
use crate::spawn;

/// Longest wait for a guard to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest wait for a new guard to be there.
const START: Duration = Duration::from_secs(15);
/// Longest wait for the guard that was quicker than ours.
const OTHER: Duration = Duration::from_secs(2);
/// Beyond the freeze's own deadline: for the agent's connection before, and the thaw after.
const GRACE: Duration = Duration::from_secs(30);
/// Longest wait for a thaw. The guard goes on trying after it.
const THAW: Duration = Duration::from_secs(30);

fn connect(run: &RunDir) -> Option<Lines> {
    let mut lines = Lines::new(UnixStream::connect(run.guard_socket()).ok()?).ok()?;
    lines.send(&Request::Ping).ok()?;
    match lines.receive(ANSWER) {
        Received::Message(Response::Pong { .. }) => Some(lines),
        _ => None,
    }
}

/// Makes sure that a guard watches the running VM. `command` starts one.
pub(crate) fn ensure(run: &RunDir, command: &mut Command) -> Result<()> {
    if connect(run).is_some() {
        return Ok(());
    }
    let mut child = spawn::start(command, &run.guard_log())?;
    let failed = |why: &str| {
        let said = log_tail(&run.guard_log());
        Err(EngineError::State(format!("the VM's guard does not start ({why}): {said}")))
    };
    let end = Instant::now() + START;
    let mut left = None;
    loop {
        if connect(run).is_some() {
            child.leave();
            return Ok(());
        }
        match child.exited() {
            Some(status) if !status.success() => return failed(&status.to_string()),
            // It has left the place to another one, which is about to answer; or the VM has ended.
            Some(_) if left.get_or_insert_with(Instant::now).elapsed() >= OTHER => {
                return failed("it found another guard or an ended VM");
            }
            _ if Instant::now() >= end => return failed("it does not answer"),
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// A freeze that the guard keeps for us. Dropping it thaws.
pub(crate) struct Freeze<'a> {
    lines: Option<Lines>,
    run: &'a RunDir,
    alive: &'a dyn Fn() -> bool,
    count: u64,
    began: Instant,
}

/// How a freeze ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Thawed {
    /// How many file systems were frozen.
    pub(crate) frozen: u64,
    /// For how long at most, in microseconds.
    pub(crate) frozen_us: u64,
    /// Why the freeze did not last until we ended it, if so.
    pub(crate) broken: Option<String>,
}

impl<'a> Freeze<'a> {
    /// Freezes for at most `deadline`. On error nothing is frozen, or the guard is about to thaw it.
    pub(crate) fn begin(
        run: &'a RunDir,
        deadline: Duration,
        alive: &'a dyn Fn() -> bool,
    ) -> std::result::Result<Self, String> {
        let mut lines = connect(run).ok_or("the VM's guard does not answer")?;
        let began = Instant::now();
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        lines.send(&Request::Freeze { deadline_ms }).map_err(|e| format!("guard: {e}"))?;
        match lines.receive(deadline + GRACE) {
            Received::Message(Response::Frozen { count }) => {
                Ok(Self { lines: Some(lines), run, alive, count, began })
            }
            Received::Message(Response::Error { message }) => Err(message),
            Received::Message(_) => Err("the guard gave a wrong answer".to_owned()),
            Received::Timeout => Err("the freeze was not done in time".to_owned()),
            Received::Closed => {
                // The guard died, perhaps between freezing and telling us.
                let _ = agent::thaw_if_marked(run, THAW, alive);
                Err("the VM's guard ended during the freeze".to_owned())
            }
        }
    }

    /// Ends the freeze and says how it was.
    pub(crate) fn end(mut self) -> Thawed {
        let answer = self.lines.take().map(|mut lines| {
            let sent = lines.send(&Request::Thaw).is_ok();
            if sent { lines.receive(THAW) } else { Received::Closed }
        });
        match answer {
            Some(Received::Message(Response::Thawed { count, frozen_us, expired })) => {
                let broken = if expired {
                    Some("the freeze reached its deadline before the disks were sealed".to_owned())
                } else if count == 0 {
                    Some("the guest had thawed by itself".to_owned())
                } else {
                    None
                };
                Thawed { frozen: self.count, frozen_us, broken }
            }
            Some(Received::Message(Response::Error { message })) => self.broken(&message),
            Some(Received::Timeout) => {
                self.broken("the guest agent did not confirm the thaw; the guard goes on trying")
            }
            _ => {
                self.thaw_directly();
                self.broken("the VM's guard ended during the freeze")
            }
        }
    }

    fn broken(&self, why: &str) -> Thawed {
        let frozen_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        Thawed { frozen: self.count, frozen_us, broken: Some(why.to_owned()) }
    }

    /// The keeper is dead: thaw through the agent ourselves. If we are killed here, too, the marker
    /// makes the next guard or session do it.
    fn thaw_directly(&self) {
        agent::thaw(self.run, None, THAW, self.alive);
    }
}

impl Drop for Freeze<'_> {
    fn drop(&mut self) {
        // Closing the connection makes the guard thaw. If the guard is dead, nobody would.
        if let Some(mut lines) = self.lines.take() {
            let sent = lines.send(&Request::Thaw).is_ok();
            if !sent || matches!(lines.receive::<Response>(THAW), Received::Closed) {
                self.thaw_directly();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_that_cannot_start_is_reported_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().canonicalize().unwrap();
        std::fs::create_dir(data.join("run")).unwrap();
        let run = RunDir::locate(&data, "vm", uuid::Uuid::new_v4());
        run.create().unwrap();
        let begun = Instant::now();
        let error = ensure(&run, &mut Command::new("/nowhere/guard")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/guard"), "{error}");
        let mut failing = Command::new("sh");
        failing.args(["-c", "echo out of luck; exit 3"]);
        let error = ensure(&run, &mut failing).unwrap_err().to_string();
        assert!(error.contains("out of luck") && error.contains('3'), "{error}");
        // One that finds nothing to do is not waited for either.
        ensure(&run, &mut Command::new("true")).unwrap_err();
        assert!(begun.elapsed() < START, "{:?}", begun.elapsed());
    }
}
