//! The guest agent (QEMU guest agent protocol) on a Unix socket.
//!
//! The guest is not trusted: every call has a deadline, every line a limit, and after anything but a
//! proper answer the connection is made anew and synchronised before the next command, because the
//! late answer to the last one may still arrive.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qapi::Execute;
use qapi::qga::{
    GuestExecCaptureOutput, GuestFsfreezeStatus, QgaCommand, guest_exec, guest_exec_status,
    guest_fsfreeze_freeze, guest_fsfreeze_status, guest_fsfreeze_thaw, guest_get_time, guest_info,
    guest_ping, guest_set_time, guest_sync_delimited,
};
use uuid::Uuid;

use crate::channel::{Channel, LINE_LIMIT, Reply, excerpt};
use crate::{DriverError, Result};

#[cfg(test)]
mod tests;

/// Name of the agent's socket in a machine's run directory.
pub const AGENT_SOCKET: &str = "qga.sock";

/// How long a command that only asks may take, on a guest that is busy or emulated.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// How long, after a program's own time, the agent may take to answer.
const EXEC_GRACE: Duration = Duration::from_secs(10);

/// Largest answer to guest-exec-status: twice 16 MiB in base64, and some.
const OUTPUT_LIMIT: usize = 64 << 20;

/// Before the first answer, when to ask again: the agent may have been started since.
const FIRST_RESEND: Duration = Duration::from_secs(1);

/// And at most this long later. Doubling up to it, a slow agent still gets to the last question.
const LAST_RESEND: Duration = Duration::from_secs(16);

/// How long the first attempt to thaw may take; each further one twice as long.
const THAW_PATIENCE: Duration = Duration::from_secs(4);

/// Pause between attempts to thaw.
const THAW_RETRY: Duration = Duration::from_millis(100);

/// Sent before a synchronisation, it makes the agent forget half a command; it also marks the
/// agent's answer.
const DELIMITER: u8 = 0xff;

/// A connection to the guest agent. The channel takes one client at a time; keep it short.
pub struct Agent {
    socket: PathBuf,
    /// In step with the agent; `None` after anything but a proper answer.
    channel: Option<Channel>,
}

/// What a command in the guest left behind.
#[derive(Debug, Clone)]
pub struct ExecResult {
    /// Exit code, or 128 + signal.
    pub exit_code: i32,
    /// Standard output (the agent keeps at most 16 MiB).
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Agent {
    /// Connects and synchronises within `timeout`.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<Self> {
        let mut agent = Self { socket: socket.to_owned(), channel: None };
        agent.synchronise(&Deadline::after(timeout))?;
        Ok(agent)
    }

    /// Answers when the agent is alive.
    pub fn ping(&mut self) -> Result<()> {
        self.call(guest_ping {}, CALL_TIMEOUT).map(drop)
    }

    /// Agent version.
    pub fn version(&mut self) -> Result<String> {
        Ok(self.call(guest_info {}, CALL_TIMEOUT)?.version)
    }

    /// Freezes all file systems; gives the number frozen. Times out by itself, then thaw is due: a
    /// guest that was slow may freeze after the deadline.
    pub fn freeze(&mut self, timeout: Duration) -> Result<u64> {
        self.call(guest_fsfreeze_freeze {}, timeout).map(|n| u64::try_from(n).unwrap_or(0))
    }

    /// Thaws; gives the number thawed. Harmless when nothing is frozen. Tries again until the agent
    /// says that nothing is frozen, or `timeout` is over.
    pub fn thaw(&mut self, timeout: Duration) -> Result<u64> {
        let deadline = Deadline::after(timeout);
        let mut thawed = 0;
        let mut patience = THAW_PATIENCE;
        loop {
            // Not all the time for one answer: an agent that was restarted has lost the question.
            let turn = Deadline::after(patience.min(deadline.left()));
            patience *= 2;
            let answer = self.call_until(guest_fsfreeze_thaw {}, &turn, LINE_LIMIT);
            if let Ok(count) = &answer {
                thawed += u64::try_from(*count).unwrap_or(0);
            }
            let status = self.call_until(guest_fsfreeze_status {}, &turn, LINE_LIMIT);
            match (answer, status) {
                (_, Ok(GuestFsfreezeStatus::thawed)) => return Ok(thawed),
                // Nothing can be frozen, or nothing can be done.
                (
                    _,
                    Err(error @ (DriverError::NotRunning | DriverError::AgentUnsupported { .. })),
                ) => {
                    return Err(error);
                }
                (Err(error @ DriverError::Agent { .. }), _) if deadline.is_over() => {
                    return Err(error);
                }
                _ if deadline.is_over() => return Err(deadline.missed("guest-fsfreeze-thaw")),
                _ => std::thread::sleep(THAW_RETRY),
            }
        }
    }

    /// Whether file systems are frozen.
    pub fn is_frozen(&mut self) -> Result<bool> {
        let status = self.call(guest_fsfreeze_status {}, CALL_TIMEOUT)?;
        Ok(status == GuestFsfreezeStatus::frozen)
    }

    /// Runs a program in the guest and waits for its end; stdin is given at once. A program that is
    /// still running after `timeout` goes on in the guest.
    pub fn exec(
        &mut self,
        program: &str,
        args: &[String],
        stdin: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<ExecResult> {
        let deadline = Deadline::after(timeout);
        // The program has until `deadline`, the agent a little longer to say how it went.
        let pid = self.exec_start(program, args, stdin, timeout + EXEC_GRACE)?;
        let mut pause = Duration::from_millis(5);
        loop {
            if let Some(result) = self.exec_poll(pid, deadline.left() + EXEC_GRACE)? {
                return Ok(result);
            }
            if deadline.is_over() {
                return Err(DriverError::Agent {
                    command: format!("guest-exec {program}"),
                    message: format!("still running after {} s", timeout.as_secs()),
                });
            }
            std::thread::sleep(pause.min(deadline.left()));
            pause = (pause * 2).min(Duration::from_millis(250));
        }
    }

    /// Starts a program in the guest and gives its process id there, for [`Agent::exec_poll`], also
    /// on another connection.
    pub fn exec_start(
        &mut self,
        program: &str,
        args: &[String],
        stdin: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<i64> {
        let start = guest_exec {
            path: program.to_owned(),
            arg: Some(args.to_vec()),
            env: None,
            input_data: stdin.map(<[u8]>::to_vec),
            capture_output: Some(GuestExecCaptureOutput::flag(true)),
        };
        Ok(self.call(start, timeout)?.pid)
    }

    /// What a started program left behind, `None` while it runs. The agent tells it once.
    pub fn exec_poll(&mut self, pid: i64, timeout: Duration) -> Result<Option<ExecResult>> {
        let deadline = Deadline::after(timeout);
        let status = self.call_until(guest_exec_status { pid }, &deadline, OUTPUT_LIMIT)?;
        Ok(status.exited.then(|| ExecResult {
            exit_code: exit_code(status.exitcode, status.signal),
            stdout: status.out_data.unwrap_or_default(),
            stderr: status.err_data.unwrap_or_default(),
        }))
    }

    /// Guest clock, nanoseconds since 1970.
    pub fn time_ns(&mut self) -> Result<i64> {
        self.call(guest_get_time {}, CALL_TIMEOUT)
    }

    /// Sets the guest clock.
    pub fn set_time_ns(&mut self, time: i64) -> Result<()> {
        self.call(guest_set_time { time: Some(time) }, CALL_TIMEOUT).map(drop)
    }

    fn call<C: QgaCommand>(&mut self, command: C, timeout: Duration) -> Result<C::Ok> {
        self.call_until(command, &Deadline::after(timeout), LINE_LIMIT)
    }

    /// One command. Only an answer, be it an error, leaves the connection in step.
    fn call_until<C: QgaCommand>(
        &mut self,
        command: C,
        deadline: &Deadline,
        limit: usize,
    ) -> Result<C::Ok> {
        if self.channel.is_none() {
            self.synchronise(deadline)?;
        }
        // Taken out, and put back by an answer alone.
        let mut channel = self.channel.take().ok_or(DriverError::NotRunning)?;
        let line = request(command)?;
        let failed = |error: io::Error| failure(C::NAME, deadline, &error);
        channel.send(&line, deadline.at).map_err(failed)?;
        let line = channel.line(limit, deadline.at).map_err(failed)?;
        let strange = || DriverError::Agent {
            command: C::NAME.to_owned(),
            message: format!("unexpected answer: {}", excerpt(&line)),
        };
        let reply: Reply<'_> = serde_json::from_slice(&line).map_err(|_| strange())?;
        if let Some(error) = reply.error {
            self.channel = Some(channel);
            let (command, message) = (C::NAME.to_owned(), error.desc);
            return Err(if error.class == "CommandNotFound" {
                DriverError::AgentUnsupported { command, message }
            } else {
                DriverError::Agent { command, message }
            });
        }
        let value = reply.value.ok_or_else(strange)?;
        let value = serde_json::from_str(value.get()).map_err(|_| strange())?;
        self.channel = Some(channel);
        Ok(value)
    }

    /// Connects anew and asks for a random number until the answer to the last question comes;
    /// everything before it is stale.
    fn synchronise(&mut self, deadline: &Deadline) -> Result<()> {
        const COMMAND: &str = "guest-sync-delimited";
        self.channel = None;
        let failed = |error: io::Error| failure(COMMAND, deadline, &error);
        let mut channel = Channel::connect(&self.socket, deadline.at).map_err(failed)?;
        let mut patience = FIRST_RESEND;
        loop {
            let id = i64::from(Uuid::new_v4().as_fields().0);
            let mut line = vec![DELIMITER];
            line.extend(request(guest_sync_delimited { id })?);
            channel.send(&line, deadline.at).map_err(failed)?;
            let ask_again = Instant::now() + patience;
            loop {
                match channel.line(LINE_LIMIT, ask_again.min(deadline.at)) {
                    Ok(line) if is_sync(&line, id) => {
                        self.channel = Some(channel);
                        return Ok(());
                    }
                    Ok(_) => {}
                    Err(error)
                        if error.kind() == io::ErrorKind::TimedOut && !deadline.is_over() =>
                    {
                        break;
                    }
                    Err(error) => return Err(failed(error)),
                }
            }
            patience = (patience * 2).min(LAST_RESEND);
        }
    }
}

/// The program's exit code as a shell would give it.
fn exit_code(code: Option<i64>, signal: Option<i64>) -> i32 {
    let code = code.or(signal.map(|s| s.saturating_add(128))).unwrap_or(0);
    i32::try_from(code).unwrap_or(i32::MAX)
}

fn request<C: QgaCommand>(command: C) -> Result<Vec<u8>> {
    let execute: Execute<C> = Execute::with_command(command);
    let mut line = serde_json::to_vec(&execute).map_err(|error| DriverError::Agent {
        command: C::NAME.to_owned(),
        message: error.to_string(),
    })?;
    line.push(b'\n');
    Ok(line)
}

/// Whether a line is the delimited answer to the synchronisation `id`.
fn is_sync(line: &[u8], id: i64) -> bool {
    let Some(start) = line.iter().rposition(|&b| b == DELIMITER) else { return false };
    serde_json::from_slice::<Reply<'_>>(&line[start + 1..])
        .ok()
        .and_then(|reply| reply.value?.get().parse::<i64>().ok())
        == Some(id)
}

/// An agent's socket that is not there belongs to a machine that has ended.
fn failure(command: &str, deadline: &Deadline, error: &io::Error) -> DriverError {
    use io::ErrorKind as K;
    match error.kind() {
        K::NotFound
        | K::ConnectionRefused
        | K::ConnectionReset
        | K::BrokenPipe
        | K::UnexpectedEof => DriverError::NotRunning,
        K::TimedOut => deadline.missed(command),
        _ => DriverError::Agent { command: command.to_owned(), message: error.to_string() },
    }
}

/// When a call must be over.
struct Deadline {
    at: Instant,
    timeout: Duration,
}

impl Deadline {
    fn after(timeout: Duration) -> Self {
        Self { at: Instant::now() + timeout, timeout }
    }

    fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    fn missed(&self, command: &str) -> DriverError {
        DriverError::AgentTimeout { command: command.to_owned(), seconds: self.timeout.as_secs() }
    }
}
