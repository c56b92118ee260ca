//! The guest agent (QEMU guest agent protocol) on a Unix socket.

use std::path::Path;
use std::time::Duration;

use crate::Result;

/// Name of the agent's socket in a machine's run directory.
pub const AGENT_SOCKET: &str = "qga.sock";

/// A connection to the guest agent. The channel takes one client at a time; keep it short.
pub struct Agent {
    _private: (),
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
    pub fn connect(_socket: &Path, _timeout: Duration) -> Result<Self> {
        todo!()
    }
    /// Answers when the agent is alive.
    pub fn ping(&mut self) -> Result<()> {
        todo!()
    }
    /// Agent version.
    pub fn version(&mut self) -> Result<String> {
        todo!()
    }
    /// Freezes all file systems; gives the number frozen. Times out by itself, then thaw is due.
    pub fn freeze(&mut self, _timeout: Duration) -> Result<u64> {
        todo!()
    }
    /// Thaws; gives the number thawed. Harmless when nothing is frozen.
    pub fn thaw(&mut self, _timeout: Duration) -> Result<u64> {
        todo!()
    }
    /// Whether file systems are frozen.
    pub fn is_frozen(&mut self) -> Result<bool> {
        todo!()
    }
    /// Runs a program in the guest and waits for its end; stdin is given at once.
    pub fn exec(
        &mut self,
        _program: &str,
        _args: &[String],
        _stdin: Option<&[u8]>,
        _timeout: Duration,
    ) -> Result<ExecResult> {
        todo!()
    }
    /// Guest clock, nanoseconds since 1970.
    pub fn time_ns(&mut self) -> Result<i64> {
        todo!()
    }
    /// Sets the guest clock.
    pub fn set_time_ns(&mut self, _time: i64) -> Result<()> {
        todo!()
    }
}
