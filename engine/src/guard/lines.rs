//! JSON lines on a Unix socket, with deadlines and a bound on their length.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest line.
const MAX_LINE: usize = 64 * 1024;

/// A connection that carries one JSON object a line. A line that arrives in pieces is kept across
/// timeouts.
pub(crate) struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
}

/// What waiting for a line ended with.
pub(crate) enum Received<T> {
    /// A message.
    Message(T),
    /// The other side has gone, or sent what is no message.
    Closed,
    /// Nothing came in time.
    Timeout,
}

impl Lines {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Sends a message.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }

    /// Waits for a message.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self, timeout: Duration) -> Received<T> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(at) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=at).collect();
                return serde_json::from_slice(&line).map_or(Received::Closed, Received::Message);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Received::Timeout;
            }
            match self.read_some(left) {
                Ok(0) => return Received::Closed,
                Ok(_) if self.buffer.len() > MAX_LINE => return Received::Closed,
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Received::Timeout;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Received::Closed,
            }
        }
    }

    fn read_some(&mut self, timeout: Duration) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        let mut chunk = [0; 4096];
        let n = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..n]);
        Ok(n)
    }
}
