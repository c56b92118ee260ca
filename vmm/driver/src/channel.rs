//! A Unix socket that carries one JSON object per line, with a deadline on everything: QMP and the
//! guest agent. What comes from a guest is hostile, so lines are bounded.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::Deserialize;
use serde_json::value::RawValue;

/// The longest path that fits a socket address with room for the terminating zero.
pub(crate) const MAX_SOCKET_PATH: usize = 107;

/// Largest ordinary line.
pub(crate) const LINE_LIMIT: usize = 1 << 20;

/// How long to wait before asking again whether the listener has room.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// An answer before its value is looked into: unknown members cost no memory.
#[derive(Deserialize)]
pub(crate) struct Reply<'a> {
    /// The value of a command that succeeded.
    #[serde(rename = "return", borrow)]
    pub(crate) value: Option<&'a RawValue>,
    /// What went wrong.
    pub(crate) error: Option<ReplyError>,
    /// Set when this is no answer but an event.
    #[serde(borrow)]
    pub(crate) event: Option<&'a RawValue>,
}

/// Error part of an answer.
#[derive(Deserialize)]
pub(crate) struct ReplyError {
    /// QAPI error class.
    #[serde(default)]
    pub(crate) class: String,
    /// For people.
    #[serde(default)]
    pub(crate) desc: String,
}

/// One connection.
pub(crate) struct Channel {
    stream: UnixStream,
    /// Received and not yet handed out.
    buffer: Vec<u8>,
    /// How much of `buffer` is known to hold no line end.
    scanned: usize,
}

impl Channel {
    /// Connects, waiting until `deadline` for a listener whose queue is full.
    pub(crate) fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        // A path too long for a socket address is reached through its folder's descriptor.
        let folder;
        let short: PathBuf = if path.as_os_str().len() > MAX_SOCKET_PATH {
            let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            folder = rustix::fs::open(parent, flags, Mode::empty())?;
            Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name)
        } else {
            path.to_owned()
        };
        let address = SocketAddrUnix::new(short.as_path())?;
        loop {
            // Not blocking: connect() to a full listen queue would wait for ever.
            let socket = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => {
                    let stream = UnixStream::from(socket);
                    stream.set_nonblocking(false)?;
                    return Ok(Self { stream, buffer: Vec::new(), scanned: 0 });
                }
                Err(Errno::AGAIN | Errno::INTR) => {
                    std::thread::sleep(CONNECT_RETRY.min(remaining(deadline)?));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends all of `bytes`.
    pub(crate) fn send(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(remaining(deadline)?))?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(error) => passing(error)?,
            }
        }
        Ok(())
    }

    /// The next line, without its end; an error of kind `TimedOut` at the deadline, of kind
    /// `InvalidData` when it is longer than `limit`, of kind `UnexpectedEof` at the end.
    pub(crate) fn line(&mut self, limit: usize, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            if let Some(found) = self.buffer[self.scanned..].iter().position(|&b| b == b'\n') {
                let end = self.scanned + found;
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                line.truncate(end);
                return Ok(line);
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() > limit {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("an answer is longer than {limit} bytes"),
                ));
            }
            let mut chunk = [0u8; 65536];
            self.stream.set_read_timeout(Some(remaining(deadline)?))?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(error) => passing(error)?,
            }
        }
    }
}

/// Time left, never zero (a zero timeout means none to the kernel).
fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Lets errors pass after which the deadline decides.
fn passing(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// The beginning of something unexpected, fit for an error message.
pub(crate) fn excerpt(line: &[u8]) -> String {
    line[..line.len().min(80)].escape_ascii().to_string()
}
