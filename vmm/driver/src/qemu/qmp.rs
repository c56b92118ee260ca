//! QMP, one connection per operation: QEMU serves one client at a time, so none may keep it.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use qapi::Execute;
use qapi::qmp::{QmpCommand, qmp_capabilities};

use crate::channel::{Channel, LINE_LIMIT, Reply, excerpt};
use crate::{DriverError, Result};

/// How long an ordinary command may take, waiting for another client included.
pub(super) const TIMEOUT: Duration = Duration::from_secs(15);

/// Runs one command on the monitor at `socket`.
pub(super) fn execute<C: QmpCommand>(
    socket: &Path,
    command: C,
    timeout: Duration,
) -> Result<C::Ok> {
    let deadline = Instant::now() + timeout;
    let failed = |error: io::Error| failure(C::NAME, timeout, &error);
    let mut channel = Channel::connect(socket, deadline).map_err(failed)?;
    // The greeting comes when it is our turn.
    channel.line(LINE_LIMIT, deadline).map_err(failed)?;
    exchange(&mut channel, qmp_capabilities { enable: None }, timeout, deadline)?;
    exchange(&mut channel, command, timeout, deadline)
}

fn exchange<C: QmpCommand>(
    channel: &mut Channel,
    command: C,
    timeout: Duration,
    deadline: Instant,
) -> Result<C::Ok> {
    let failed = |error: io::Error| failure(C::NAME, timeout, &error);
    let qmp = |message: String| DriverError::Qmp { command: C::NAME.to_owned(), message };
    let request: Execute<C> = Execute::with_command(command);
    let mut line = serde_json::to_vec(&request).map_err(|e| qmp(e.to_string()))?;
    line.push(b'\n');
    channel.send(&line, deadline).map_err(failed)?;
    loop {
        let line = channel.line(LINE_LIMIT, deadline).map_err(failed)?;
        let reply: Reply<'_> = serde_json::from_slice(&line)
            .map_err(|_| qmp(format!("not QMP: {}", excerpt(&line))))?;
        if reply.event.is_some() {
            continue;
        }
        if let Some(error) = reply.error {
            return Err(qmp(error.desc));
        }
        let value = reply.value.map_or("null", |v| v.get());
        return serde_json::from_str(value).map_err(|e| qmp(format!("unexpected answer: {e}")));
    }
}

/// A monitor that is not there, or goes away, is a machine that has ended.
fn failure(command: &str, timeout: Duration, error: &io::Error) -> DriverError {
    use io::ErrorKind as K;
    let message = match error.kind() {
        K::NotFound
        | K::ConnectionRefused
        | K::ConnectionReset
        | K::BrokenPipe
        | K::UnexpectedEof => return DriverError::NotRunning,
        K::TimedOut => format!("no answer within {} s", timeout.as_secs()),
        _ => error.to_string(),
    };
    DriverError::Qmp { command: command.to_owned(), message }
}
