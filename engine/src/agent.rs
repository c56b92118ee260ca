//! The guest agent's channel, shared: it takes one client at a time, so whoever talks holds the run
//! directory's agent lock, for as short a time as possible. A freeze holds it until the thaw, which
//! keeps every other command away from a frozen guest.

use std::time::{Duration, Instant};

use tidemark_driver::DriverError;
use tidemark_driver::agent::{Agent, ExecResult};

use crate::error::{EngineError, Result};
use crate::lock::FileLock;
use crate::runtime::RunDir;
use crate::store;

/// Longest wait for an agent that ought to answer at once.
const ANSWER: Duration = Duration::from_secs(5);
/// How long, after a program's own time, the agent may take to say how it went.
const GRACE: Duration = Duration::from_secs(10);
/// A program that takes longer than this is looked at now and then only.
const LONG: Duration = Duration::from_millis(250);

/// The agent's channel, for us alone.
pub(crate) struct Channel {
    /// The agent.
    pub(crate) agent: Agent,
    _lock: FileLock,
}

impl Channel {
    /// Takes the channel and synchronises with the agent.
    pub(crate) fn open(run: &RunDir, timeout: Duration) -> Result<Self> {
        let end = Instant::now() + timeout;
        let lock = take_lock(run, "to be reached", timeout)?;
        let left = end.saturating_duration_since(Instant::now());
        let agent = Agent::connect(&run.agent_socket(), left)?;
        Ok(Self { agent, _lock: lock })
    }
}

fn take_lock(run: &RunDir, command: &str, timeout: Duration) -> Result<FileLock> {
    let lock = FileLock::take(&run.agent_lock(), timeout)?;
    Ok(lock.ok_or_else(|| DriverError::AgentTimeout {
        command: command.to_owned(),
        seconds: timeout.as_secs(),
    })?)
}

/// Waits until the agent answers.
pub(crate) fn wait(run: &RunDir, timeout: Duration, alive: &dyn Fn() -> bool) -> Result<()> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let result = Channel::open(run, left.min(Duration::from_secs(2)))
            .and_then(|mut channel| Ok(channel.agent.ping()?));
        match result {
            Ok(()) => return Ok(()),
            Err(_) if !alive() => return Err(DriverError::NotRunning.into()),
            Err(_) if left.is_zero() => {
                return Err(DriverError::AgentTimeout {
                    command: "ping".to_owned(),
                    seconds: timeout.as_secs(),
                }
                .into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Runs a program in the guest and waits for its end. The channel is given up between the looks at
/// a program that takes long, so that a freeze gets its turn.
pub(crate) fn exec(
    run: &RunDir,
    program: &str,
    args: &[String],
    stdin: Option<&[u8]>,
    timeout: Duration,
    alive: &dyn Fn() -> bool,
) -> Result<ExecResult> {
    let end = Instant::now() + timeout;
    let left = || end.saturating_duration_since(Instant::now());
    let mut channel = Channel::open(run, timeout)?;
    let pid = channel.agent.exec_start(program, args, stdin, left() + GRACE)?;
    let mut pause = Duration::from_millis(5);
    loop {
        // Short programs end within one turn at the channel.
        while pause < LONG {
            if let Some(result) = channel.agent.exec_poll(pid, left() + GRACE)? {
                return Ok(result);
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        drop(channel);
        if !alive() {
            return Err(DriverError::NotRunning.into());
        }
        if left().is_zero() {
            return Err(DriverError::Agent {
                command: format!("guest-exec {program}"),
                message: format!("still running after {} s", timeout.as_secs()),
            }
            .into());
        }
        std::thread::sleep(LONG.min(left()));
        channel = Channel::open(run, left() + GRACE)?;
        pause = LONG / 2;
    }
}

/// Notes that a freeze may be in force, before it is.
pub(crate) fn mark_frozen(run: &RunDir) -> Result<()> {
    store::write_durable(&run.frozen_marker(), &[b"a freeze may be in force\n"])
}

/// Thaws until the guest says that nothing is frozen, or until the machine is gone (`alive`) or
/// `timeout` has passed; then `None`. Gives the number of file systems that it thawed. The marker goes
/// when the thaw is sure.
pub(crate) fn thaw(
    run: &RunDir,
    channel: Option<Channel>,
    timeout: Duration,
    alive: &dyn Fn() -> bool,
) -> Option<u64> {
    let end = Instant::now() + timeout;
    let mut channel = channel;
    let mut pause = Duration::from_millis(50);
    loop {
        // The lock is given up between attempts: if we are killed or stuck, another gets its chance.
        match thaw_once(run, channel.take()) {
            Ok(thawed) => {
                let _ = store::remove_file(&run.frozen_marker());
                return Some(thawed);
            }
            Err(error) => tracing::warn!(%error, "the guest is not thawed yet; trying again"),
        }
        if !alive() {
            let _ = store::remove_file(&run.frozen_marker());
            return None;
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// One attempt: how many file systems it thawed; an error if one may still be frozen.
fn thaw_once(run: &RunDir, channel: Option<Channel>) -> Result<u64> {
    let mut channel = match channel {
        Some(channel) => channel,
        None => Channel::open(run, ANSWER)?,
    };
    match channel.agent.thaw(ANSWER) {
        Ok(count) => Ok(count),
        // What cannot be thawed cannot have been frozen.
        Err(DriverError::AgentUnsupported { .. }) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Thaws if a freeze may have been left behind, by a guard that was killed: harmless where none was.
pub(crate) fn thaw_if_marked(
    run: &RunDir,
    timeout: Duration,
    alive: &dyn Fn() -> bool,
) -> Result<()> {
    if !store::exists(&run.frozen_marker())? {
        return Ok(());
    }
    if thaw(run, None, timeout, alive).is_none() && alive() {
        return Err(EngineError::State(
            "the guest's file systems may still be frozen and the guest agent does not answer; \
             run `fsfreeze -u` in the guest or restart the VM"
                .to_owned(),
        ));
    }
    Ok(())
}
