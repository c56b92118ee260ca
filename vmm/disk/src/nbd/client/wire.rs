//! One request and its reply on a client's connection.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::bad;
use crate::nbd::proto::{
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, cmd, errno,
};
use crate::nbd::wire::Fields;

/// Bytes of one status or error chunk that are accepted.
const MAX_CHUNK: usize = 1 << 20;

/// What came of a request.
pub(super) type Transacted = Result<(), Failure>;

pub(super) struct Wire {
    pub(super) stream: UnixStream,
    cookie: u64,
    pub(super) broken: bool,
}

/// A request.
#[derive(Clone, Copy)]
pub(super) struct Command {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// Where a reply's content goes.
pub(super) enum Sink<'a> {
    Nothing,
    Data(&'a mut [u8]),
    /// Extents of the context with this server id.
    Status(u32, &'a mut Vec<(u32, u32)>),
}

/// Why a transaction failed.
pub(super) enum Failure {
    /// The server refused it; the connection is fine.
    Refused(u32, String),
    /// The connection is lost.
    Broken(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, cookie: 0, broken: false }
    }

    pub(super) fn send(&mut self, command: Command, payload: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut head = Vec::with_capacity(28);
        head.extend(REQUEST_MAGIC.to_be_bytes());
        head.extend(command.flags.to_be_bytes());
        head.extend(command.kind.to_be_bytes());
        head.extend(self.cookie.to_be_bytes());
        head.extend(command.offset.to_be_bytes());
        head.extend(command.len.to_be_bytes());
        self.stream.write_all(&head)?;
        self.stream.write_all(payload)
    }

    pub(super) fn transact(
        &mut self,
        command: Command,
        payload: &[u8],
        structured: bool,
        sink: Sink<'_>,
    ) -> Transacted {
        self.send(command, payload)?;
        match u32::from_be_bytes(self.take()?) {
            SIMPLE_REPLY_MAGIC => self.simple_reply(command, structured, sink),
            STRUCTURED_REPLY_MAGIC if structured => self.chunks(command, sink),
            _ => Err(bad("bad reply magic").into()),
        }
    }

    fn simple_reply(&mut self, command: Command, structured: bool, sink: Sink<'_>) -> Transacted {
        let error = u32::from_be_bytes(self.take()?);
        self.expect_cookie()?;
        if error != 0 {
            return Err(Failure::Refused(error, String::new()));
        }
        match sink {
            Sink::Nothing => Ok(()),
            Sink::Data(buf) if !structured && command.kind == cmd::READ => {
                Ok(self.stream.read_exact(buf)?)
            }
            _ => Err(bad("simple reply where chunks were agreed").into()),
        }
    }

    /// Reads the chunks of one reply; the first magic is already taken.
    fn chunks(&mut self, command: Command, mut sink: Sink<'_>) -> Transacted {
        let mut failure = None;
        let mut filled = 0;
        loop {
            let flags = u16::from_be_bytes(self.take()?);
            let kind = u16::from_be_bytes(self.take()?);
            self.expect_cookie()?;
            let len = u32::from_be_bytes(self.take()?) as usize;
            match (kind, &mut sink) {
                (chunk::NONE, _) if len == 0 => {}
                (chunk::OFFSET_DATA, Sink::Data(buf)) if len > 8 => {
                    let at = self.position(command, len - 8)?;
                    self.stream.read_exact(&mut buf[at..at + len - 8])?;
                    filled += len - 8;
                }
                (chunk::OFFSET_HOLE, Sink::Data(buf)) if len == 12 => {
                    let offset = u64::from_be_bytes(self.take()?);
                    let hole = u32::from_be_bytes(self.take()?) as usize;
                    let at = place(command, offset, hole)?;
                    buf[at..at + hole].fill(0);
                    filled += hole;
                }
                (chunk::BLOCK_STATUS, Sink::Status(id, extents)) => {
                    let data = self.bounded(len)?;
                    collect_status(&data, *id, extents).ok_or_else(|| bad("malformed status"))?;
                }
                (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                    failure.get_or_insert(parse_error(&self.bounded(len)?));
                }
                _ => return Err(bad("unexpected chunk").into()),
            }
            if flags & chunk::FLAG_DONE != 0 {
                break;
            }
            if u32::from_be_bytes(self.take()?) != STRUCTURED_REPLY_MAGIC {
                return Err(bad("bad chunk magic").into());
            }
        }
        match (failure, sink) {
            (Some((code, message)), _) => Err(Failure::Refused(code, message)),
            // Chunks may not overlap, so the sum tells whether every byte came.
            (None, Sink::Data(buf)) if filled != buf.len() => Err(bad("bytes are missing").into()),
            _ => Ok(()),
        }
    }

    fn position(&mut self, command: Command, len: usize) -> io::Result<usize> {
        let offset = u64::from_be_bytes(self.take()?);
        place(command, offset, len)
    }

    fn expect_cookie(&mut self) -> io::Result<()> {
        let cookie = u64::from_be_bytes(self.take()?);
        if cookie == self.cookie { Ok(()) } else { Err(bad("reply to another request")) }
    }

    fn bounded(&mut self, len: usize) -> io::Result<Vec<u8>> {
        if len > MAX_CHUNK {
            return Err(bad("chunk too long"));
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Where a chunk's bytes lie in the buffer of the request.
fn place(command: Command, offset: u64, len: usize) -> io::Result<usize> {
    let at = offset.checked_sub(command.offset).and_then(|at| usize::try_from(at).ok());
    at.filter(|at| at.checked_add(len).is_some_and(|end| end <= command.len as usize))
        .ok_or_else(|| bad("chunk outside the request"))
}

fn collect_status(data: &[u8], id: u32, extents: &mut Vec<(u32, u32)>) -> Option<()> {
    let mut fields = Fields::new(data);
    if fields.u32()? != id {
        return Some(());
    }
    while !fields.at_end() {
        extents.push((fields.u32()?, fields.u32()?));
    }
    Some(())
}

fn parse_error(data: &[u8]) -> (u32, String) {
    let mut fields = Fields::new(data);
    let code = fields.u32().unwrap_or(errno::EIO);
    let len = fields.u16().map_or(0, usize::from);
    let message = fields.bytes(len).unwrap_or_default();
    (code, String::from_utf8_lossy(message).into_owned())
}
