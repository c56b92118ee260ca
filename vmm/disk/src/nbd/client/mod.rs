//! A small blocking NBD client: one connection, one request at a time.

mod negotiation;
mod wire;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;

use super::proto::{STATE_CHANGED, STATE_HOLE, STATE_ZERO, cmd, flag};
use crate::block::{Block, BlockRange, Extent, ExtentKind, Geometry};
use crate::error::{DiskError, Result};
use crate::rct::RctId;
use negotiation::Negotiation;
use wire::{Command, Failure, Sink, Wire};

/// Time for each step of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of one read or write; longer ones are split. Never above what servers must accept (32 MiB).
const MAX_TRANSFER: u64 = 4 << 20;
/// Bytes asked for in one zeroing, discard or status request: below 4 GiB, sector aligned.
const MAX_SPAN: u64 = 1 << 30;
const ALLOCATION_ID: usize = 0;
const CHANGED_ID: usize = 1;

/// A remote disk. After an I/O error on the connection every further call fails; connect again.
pub struct Client {
    socket: PathBuf,
    geometry: Geometry,
    flags: u16,
    structured: bool,
    /// Server's ids of the contexts, by [`ALLOCATION_ID`] and [`CHANGED_ID`].
    contexts: [Option<u32>; 2],
    wire: Mutex<Wire>,
}

impl Client {
    /// Connects to `export` (empty: the server's default) on a Unix socket.
    pub fn connect(socket: &Path, export: &str) -> Result<Self> {
        Self::establish(socket, export, None)
    }

    /// Connects and asks what has changed since `id`; see [`Client::changed_ranges`]. Fails with
    /// `UnknownRctId` where the server cannot answer.
    pub fn connect_since(socket: &Path, export: &str, id: &RctId) -> Result<Self> {
        let client = Self::establish(socket, export, Some(id))?;
        if client.contexts[CHANGED_ID].is_none() {
            let why = "the server does not answer for it".to_owned();
            return Err(DiskError::UnknownRctId { id: id.to_string(), why });
        }
        Ok(client)
    }

    fn establish(socket: &Path, export: &str, since: Option<&RctId>) -> Result<Self> {
        let io_err = |e| DiskError::io("connect to", socket, e);
        let stream = UnixStream::connect(socket).map_err(io_err)?;
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT)).map_err(io_err)?;
        stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT)).map_err(io_err)?;
        let agreed = Negotiation { stream: &stream }.run(export, since).map_err(io_err)?;
        stream.set_read_timeout(None).map_err(io_err)?;
        stream.set_write_timeout(None).map_err(io_err)?;
        let logical = match agreed.min_block {
            ..=512 => 512,
            513..=4096 => 4096,
            other => {
                let what = format!("an export with blocks of {other} bytes");
                return Err(DiskError::Unsupported { path: socket.to_owned(), what });
            }
        };
        if !agreed.size.is_multiple_of(u64::from(logical)) {
            let what = format!("an export of {} bytes, no multiple of {logical}", agreed.size);
            return Err(DiskError::Unsupported { path: socket.to_owned(), what });
        }
        Ok(Self {
            socket: socket.to_owned(),
            geometry: Geometry {
                size: agreed.size,
                logical_sector: logical,
                physical_sector: 4096,
            },
            flags: agreed.flags,
            structured: agreed.structured,
            contexts: agreed.contexts,
            wire: Mutex::new(Wire::new(stream)),
        })
    }

    /// The ranges that may differ from the content at the id given to [`Client::connect_since`].
    pub fn changed_ranges(&self) -> Result<Vec<BlockRange>> {
        let mut ranges: Vec<BlockRange> = Vec::new();
        self.status(CHANGED_ID, 0, self.geometry.size, |at, len, flags| {
            if flags & STATE_CHANGED != 0 {
                match ranges.last_mut() {
                    Some(last) if last.end == at => last.end = at + len,
                    _ => ranges.push(at..at + len),
                }
            }
        })?;
        Ok(ranges)
    }

    /// Calls `each` for every extent of a context over the range.
    fn status(
        &self,
        context: usize,
        offset: u64,
        len: u64,
        mut each: impl FnMut(u64, u64, u32),
    ) -> Result<()> {
        let id = self.contexts[context].ok_or_else(|| {
            DiskError::State("the NBD server does not report block status".to_owned())
        })?;
        let (mut at, end) = (offset, offset + len);
        let mut extents = Vec::new();
        while at < end {
            let command = Command {
                kind: cmd::BLOCK_STATUS,
                flags: 0,
                offset: at,
                len: (end - at).min(MAX_SPAN) as u32,
            };
            extents.clear();
            self.transact(command, &[], Sink::Status(id, &mut extents))?;
            let before = at;
            for &(len, flags) in &extents {
                // The last extent may reach past what was asked.
                let len = u64::from(len).min(end - at);
                if len > 0 {
                    each(at, len, flags);
                    at += len;
                }
            }
            if at == before {
                return Err(self.protocol("block status without extents"));
            }
        }
        Ok(())
    }

    fn transact(&self, command: Command, payload: &[u8], sink: Sink<'_>) -> Result<()> {
        let mut wire = self.wire.lock();
        if wire.broken {
            return Err(self.protocol("the connection was lost; connect again"));
        }
        wire.transact(command, payload, self.structured, sink).map_err(|failure| match failure {
            Failure::Refused(code, message) => self.refused(code, message),
            Failure::Broken(error) => {
                wire.broken = true;
                DiskError::io("talk to the NBD server at", &self.socket, error)
            }
        })
    }

    fn refused(&self, code: u32, message: String) -> DiskError {
        let source = io::Error::from_raw_os_error(code as i32);
        if message.is_empty() {
            return DiskError::io("be served by", &self.socket, source);
        }
        // The server's words say more than the number, except where the number is asked for.
        match source.raw_os_error() {
            Some(code) if code == rustix::io::Errno::NOSPC.raw_os_error() => {
                DiskError::io("be served by", &self.socket, source)
            }
            _ => {
                DiskError::io("be served by", &self.socket, io::Error::new(source.kind(), message))
            }
        }
    }

    fn protocol(&self, what: &'static str) -> DiskError {
        let error = io::Error::new(io::ErrorKind::InvalidData, what);
        DiskError::io("talk to the NBD server at", &self.socket, error)
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let sector = u64::from(self.geometry.logical_sector);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.geometry.size);
        if inside && offset.is_multiple_of(sector) && len.is_multiple_of(sector) {
            Ok(())
        } else {
            Err(DiskError::OutOfRange { offset, len })
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only() {
            return Err(DiskError::ReadOnly { path: self.socket.clone() });
        }
        Ok(())
    }

    /// Sends a command without payload over a range of any length.
    fn span(&self, kind: u16, flags: u16, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        self.check(offset, len)?;
        let mut at = offset;
        while at < offset + len {
            let part = (offset + len - at).min(MAX_SPAN);
            let command = Command { kind, flags, offset: at, len: part as u32 };
            self.transact(command, &[], Sink::Nothing)?;
            at += part;
        }
        Ok(())
    }
}

impl Block for Client {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_only(&self) -> bool {
        self.flags & flag::READ_ONLY != 0
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        let mut at = offset;
        for part in buf.chunks_mut(MAX_TRANSFER as usize) {
            let len = part.len() as u32;
            let command = Command { kind: cmd::READ, flags: 0, offset: at, len };
            self.transact(command, &[], Sink::Data(part))?;
            at += u64::from(len);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check_writable()?;
        self.check(offset, buf.len() as u64)?;
        let mut at = offset;
        for part in buf.chunks(MAX_TRANSFER as usize) {
            let len = part.len() as u32;
            let command = Command { kind: cmd::WRITE, flags: 0, offset: at, len };
            self.transact(command, part, Sink::Nothing)?;
            at += u64::from(len);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if self.flags & flag::SEND_FLUSH == 0 {
            // A server that cannot flush promises nothing, so neither do we.
            return Err(DiskError::State("the NBD server cannot flush".to_owned()));
        }
        let command = Command { kind: cmd::FLUSH, flags: 0, offset: 0, len: 0 };
        self.transact(command, &[], Sink::Nothing)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        // TRIM leaves the content open; zeroing that may unmap is what a discard here means.
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        if self.flags & flag::SEND_WRITE_ZEROES == 0 && !self.read_only() {
            self.check(offset, len)?;
            let zeros = vec![0; len.min(MAX_TRANSFER) as usize];
            let mut at = offset;
            while at < offset + len {
                let part = (offset + len - at).min(MAX_TRANSFER);
                self.write_at(at, &zeros[..part as usize])?;
                at += part;
            }
            return Ok(());
        }
        let flags = if may_unmap { 0 } else { cmd::FLAG_NO_HOLE };
        self.span(cmd::WRITE_ZEROES, flags, offset, len)
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check(offset, len)?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut add = |offset, len, kind| match extents.last_mut() {
            Some(last) if last.kind == kind => last.len += len,
            _ => extents.push(Extent { offset, len, kind }),
        };
        if len > 0 && self.contexts[ALLOCATION_ID].is_none() {
            add(offset, len, ExtentKind::Data);
            return Ok(extents);
        }
        self.status(ALLOCATION_ID, offset, len, |at, len, flags| {
            let kind = match flags & (STATE_HOLE | STATE_ZERO) {
                flags if flags & STATE_ZERO == 0 => ExtentKind::Data,
                STATE_ZERO => ExtentKind::Zero,
                _ => ExtentKind::Hole,
            };
            add(at, len, kind);
        })?;
        Ok(extents)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let wire = self.wire.get_mut();
        if !wire.broken {
            let _ = wire.stream.set_write_timeout(Some(Duration::from_secs(1)));
            let bye = Command { kind: cmd::DISC, flags: 0, offset: 0, len: 0 };
            let _ = wire.send(bye, &[]);
        }
    }
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
