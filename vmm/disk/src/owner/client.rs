//! Client side of the control protocol.

use std::io::{self, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::protocol::{Request, Response};
use super::wire::{self, MAX_RESPONSE};
use crate::error::{DiskError, Result};

/// A connection to a disk owner.
pub struct Client {
    socket: PathBuf,
    reader: BufReader<Deadline>,
    /// Set once a response may be lost or late: a further call could take it for its own.
    broken: bool,
}

impl Client {
    /// Connects to the owner's control socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|e| {
            DiskError::Owner(format!("no owner answers on {}: {e}", socket.display()))
        })?;
        let reader = BufReader::new(Deadline { stream, end: Instant::now() });
        Ok(Self { socket: socket.to_owned(), reader, broken: false })
    }

    /// Sends a request and waits for its response; `Response::Error` becomes an `Err`. After a timeout
    /// or a lost connection the request may have been executed or not, and this client is of no use
    /// any more: connect again and ask for a report.
    pub fn call(&mut self, request: &Request, timeout: Duration) -> Result<Response> {
        if self.broken {
            let socket = self.socket.display();
            return Err(DiskError::Owner(format!(
                "the connection to {socket} was lost; connect again"
            )));
        }
        match self.exchange(request, timeout) {
            Ok(Response::Error { message }) => Err(DiskError::Owner(message)),
            Ok(response) => Ok(response),
            Err(error) => {
                self.broken = true;
                let what = match error.kind() {
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                        format!("no answer within {} ms", timeout.as_millis())
                    }
                    io::ErrorKind::UnexpectedEof => "it hung up before it answered".to_owned(),
                    _ => error.to_string(),
                };
                Err(DiskError::Owner(format!("{what} (on {})", self.socket.display())))
            }
        }
    }

    fn exchange(&mut self, request: &Request, timeout: Duration) -> io::Result<Response> {
        let deadline = self.reader.get_mut();
        deadline.end = Instant::now() + timeout;
        deadline.stream.set_write_timeout(Some(deadline.left()?))?;
        wire::send(&mut deadline.stream, request)?;
        let line = wire::read_line(&mut self.reader, MAX_RESPONSE)?
            .ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?;
        wire::parse(&line).map_err(|what| io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

/// A stream that stops reading at a point in time, however slowly bytes trickle in.
struct Deadline {
    stream: UnixStream,
    end: Instant,
}

impl Deadline {
    fn left(&self) -> io::Result<Duration> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Deadline {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buf)
    }
}
