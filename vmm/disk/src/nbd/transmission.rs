//! The transmission phase of one connection: this thread reads requests, a few workers execute them
//! and reply in whatever order they finish.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::Receiver;
use parking_lot::{Condvar, Mutex};

use super::handshake::{Session, invalid};
use super::proto::{
    MAX_PAYLOAD, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, cmd, errno,
};
use super::wire::Fields;
use crate::error::DiskError;

/// Workers of one connection, started as requests pile up.
const MAX_WORKERS: usize = 8;
/// Requests of one connection that are read ahead of the workers.
const MAX_QUEUED: usize = 128;
/// Payload bytes of one connection in memory: one largest request, or many small ones.
const MAX_IN_FLIGHT: usize = MAX_PAYLOAD as usize;
/// Bytes of a request's head.
const HEAD: usize = 28;

/// Serves requests until the client leaves or breaks the protocol. When this returns, every request
/// that was read has been executed.
pub(super) fn serve(stream: &UnixStream, session: &Session) -> io::Result<()> {
    let (queue, requests) = crossbeam_channel::bounded(MAX_QUEUED);
    let connection = Connection {
        stream,
        session,
        writing: Mutex::new(()),
        budget: Budget::default(),
        requests,
        idle: AtomicUsize::new(0),
    };
    thread::scope(|scope| {
        let mut workers = 0;
        let mut reader = BufReader::with_capacity(8 << 10, stream);
        let ended = loop {
            let request = match connection.next_request(&mut reader) {
                Ok(Some(request)) => request,
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            };
            if workers < MAX_WORKERS && connection.idle.load(Ordering::Acquire) == 0 {
                let worker = thread::Builder::new().name("nbd-worker".to_owned());
                match worker.spawn_scoped(scope, || connection.work()) {
                    Ok(_) => workers += 1,
                    Err(e) if workers == 0 => break Err(e),
                    Err(_) => {}
                }
            }
            if queue.send(request).is_err() {
                break Ok(());
            }
        };
        // Without a sender the workers finish what is queued and end.
        drop(queue);
        ended
    })
}

struct Connection<'a> {
    stream: &'a UnixStream,
    session: &'a Session,
    /// Held while one reply is written, so that replies do not mix.
    writing: Mutex<()>,
    budget: Budget,
    requests: Receiver<Request>,
    idle: AtomicUsize,
}

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
    /// Of a write.
    payload: Vec<u8>,
    /// What the budget was charged.
    charge: usize,
}

/// What a request leads to.
enum Outcome {
    Done,
    Data(Vec<u8>),
    /// Per chosen context, its extents.
    Status(Vec<Vec<(u32, u32)>>),
}

/// An error as the client sees it.
struct Refusal {
    code: u32,
    message: String,
}

impl Refusal {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<&DiskError> for Refusal {
    fn from(error: &DiskError) -> Self {
        let full = [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT];
        let code = match error {
            DiskError::ReadOnly { .. } => errno::EPERM,
            DiskError::OutOfRange { .. } => errno::EINVAL,
            _ if error.os_error().is_some_and(|e| full.iter().any(|f| f.raw_os_error() == e)) => {
                errno::ENOSPC
            }
            _ => errno::EIO,
        };
        Self::new(code, error.to_string())
    }
}

impl Connection<'_> {
    /// Reads the next request with its payload; `None` when the client is done.
    fn next_request(&self, reader: &mut impl Read) -> io::Result<Option<Request>> {
        loop {
            let mut head = [0; HEAD];
            match reader.read_exact(&mut head) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(e) => return Err(e),
            }
            let mut request = parse_head(&head)?;
            if request.command == cmd::DISC {
                return Ok(None);
            }
            let is_write = request.command == cmd::WRITE;
            if let Err(refusal) = self.check(&request) {
                if is_write {
                    // The payload is on its way whatever we think of it; let it pass in small pieces.
                    let sent = u64::from(request.len);
                    if io::copy(&mut reader.by_ref().take(sent), &mut io::sink())? < sent {
                        return Ok(None);
                    }
                }
                self.reply(&request, Err(refusal))?;
                continue;
            }
            if is_write || request.command == cmd::READ {
                request.charge = request.len as usize;
                self.budget.take(request.charge);
            }
            if is_write {
                request.payload = vec![0; request.len as usize];
                reader.read_exact(&mut request.payload)?;
            }
            return Ok(Some(request));
        }
    }

    /// Refuses what must not reach the disk.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let known = match request.command {
            cmd::READ => cmd::FLAG_DF | cmd::FLAG_FUA,
            cmd::WRITE | cmd::TRIM | cmd::FLUSH => cmd::FLAG_FUA,
            cmd::WRITE_ZEROES => cmd::FLAG_FUA | cmd::FLAG_NO_HOLE | cmd::FLAG_FAST_ZERO,
            cmd::BLOCK_STATUS => cmd::FLAG_REQ_ONE | cmd::FLAG_FUA,
            _ => return Err(Refusal::new(errno::EINVAL, "command not supported")),
        };
        if request.flags & !known != 0 {
            return Err(Refusal::new(errno::EINVAL, "flag not supported by this command"));
        }
        if request.command == cmd::FLUSH {
            return Ok(());
        }
        let served = &self.session.export;
        let writes = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if writes && served.disk().read_only() {
            return Err(Refusal::new(errno::EPERM, "the disk is read-only"));
        }
        if request.flags & cmd::FLAG_FAST_ZERO != 0 {
            return Err(Refusal::new(errno::ENOTSUP, "zeroing may be as slow as writing"));
        }
        let end = request.offset.checked_add(u64::from(request.len));
        if request.len == 0 || end.is_none_or(|end| end > served.size()) {
            return Err(Refusal::new(errno::EINVAL, "request is empty or outside the disk"));
        }
        if matches!(request.command, cmd::READ | cmd::WRITE) && request.len > MAX_PAYLOAD {
            let code = if request.command == cmd::READ && self.session.structured {
                errno::EOVERFLOW
            } else {
                errno::EINVAL
            };
            return Err(Refusal::new(code, "request is larger than the maximum block size"));
        }
        if request.command == cmd::BLOCK_STATUS && self.session.contexts.is_empty() {
            return Err(Refusal::new(errno::EINVAL, "no metadata context was chosen"));
        }
        Ok(())
    }

    /// A worker: executes requests until the reader has gone.
    fn work(&self) {
        loop {
            self.idle.fetch_add(1, Ordering::AcqRel);
            let request = self.requests.recv();
            self.idle.fetch_sub(1, Ordering::AcqRel);
            let Ok(request) = request else { return };
            let replied = catch_unwind(AssertUnwindSafe(|| {
                let outcome = self.execute(&request).map_err(|e| Refusal::from(&e));
                self.reply(&request, outcome)
            }));
            self.budget.give_back(request.charge);
            if !matches!(replied, Ok(Ok(()))) {
                // A reply was lost: the client must learn it, or it would wait for ever.
                let _ = self.stream.shutdown(Shutdown::Both);
            }
        }
    }

    fn execute(&self, request: &Request) -> Result<Outcome, DiskError> {
        let served = &self.session.export;
        let (offset, len) = (request.offset, u64::from(request.len));
        let outcome = match request.command {
            cmd::READ => served.read(offset, request.len as usize).map(Outcome::Data),
            cmd::WRITE => served.write(offset, &request.payload).map(|()| Outcome::Done),
            cmd::FLUSH => served.disk().flush().map(|()| Outcome::Done),
            cmd::TRIM => served.trim(offset, len).map(|()| Outcome::Done),
            cmd::WRITE_ZEROES => {
                let may_unmap = request.flags & cmd::FLAG_NO_HOLE == 0;
                served.zero(offset, len, may_unmap).map(|()| Outcome::Done)
            }
            _ => {
                let one = request.flags & cmd::FLAG_REQ_ONE != 0;
                let contexts = &self.session.contexts;
                let status =
                    |kind: &super::contexts::Kind| kind.status(served, offset..offset + len, one);
                contexts
                    .iter()
                    .map(|c| status(&c.kind))
                    .collect::<Result<_, _>>()
                    .map(Outcome::Status)
            }
        };
        let writes = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        let outcome = match outcome {
            // Forced unit access: not acknowledged before it is durable.
            Ok(done) if writes && request.flags & cmd::FLAG_FUA != 0 => {
                served.disk().flush().map(|()| done)
            }
            other => other,
        };
        outcome.inspect_err(|e| served.warn(command_name(request.command), offset, request.len, e))
    }

    fn reply(&self, request: &Request, outcome: Result<Outcome, Refusal>) -> io::Result<()> {
        let cookie = request.cookie;
        // Chunks must be used for reads and block status, and are nobody's need elsewhere.
        let chunked =
            self.session.structured && matches!(request.command, cmd::READ | cmd::BLOCK_STATUS);
        match outcome {
            Ok(Outcome::Data(data)) if chunked => {
                let mut head =
                    chunk_head(cookie, chunk::FLAG_DONE, chunk::OFFSET_DATA, 8 + data.len());
                head.extend(request.offset.to_be_bytes());
                self.send(&head, &data)
            }
            Ok(Outcome::Data(data)) => self.send(&simple_head(cookie, 0), &data),
            Ok(Outcome::Done) => self.send(&simple_head(cookie, 0), &[]),
            Ok(Outcome::Status(contexts)) => self.send(&status_chunks(cookie, &contexts), &[]),
            Err(refusal) if chunked => {
                let message = &refusal.message.as_bytes()[..refusal.message.len().min(1024)];
                let mut head =
                    chunk_head(cookie, chunk::FLAG_DONE, chunk::ERROR, 6 + message.len());
                head.extend(refusal.code.to_be_bytes());
                head.extend((message.len() as u16).to_be_bytes());
                self.send(&head, message)
            }
            Err(refusal) => self.send(&simple_head(cookie, refusal.code), &[]),
        }
    }

    /// Writes one whole reply.
    fn send(&self, mut head: &[u8], mut data: &[u8]) -> io::Result<()> {
        let _turn = self.writing.lock();
        let mut stream = self.stream;
        while !head.is_empty() {
            match stream.write_vectored(&[IoSlice::new(head), IoSlice::new(data)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    let of_head = sent.min(head.len());
                    head = &head[of_head..];
                    data = &data[sent - of_head..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        stream.write_all(data)
    }
}

fn parse_head(head: &[u8; HEAD]) -> io::Result<Request> {
    let mut fields = Fields::new(head);
    let parse = |fields: &mut Fields<'_>| {
        Some((
            fields.u32()?,
            fields.u16()?,
            fields.u16()?,
            fields.u64()?,
            fields.u64()?,
            fields.u32()?,
        ))
    };
    match parse(&mut fields) {
        Some((REQUEST_MAGIC, flags, command, cookie, offset, len)) => {
            Ok(Request { flags, command, cookie, offset, len, payload: Vec::new(), charge: 0 })
        }
        _ => Err(invalid("bad request magic")),
    }
}

fn simple_head(cookie: u64, error: u32) -> Vec<u8> {
    let mut head = Vec::with_capacity(16);
    head.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    head.extend(error.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head
}

fn chunk_head(cookie: u64, flags: u16, kind: u16, len: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(28);
    head.extend(STRUCTURED_REPLY_MAGIC.to_be_bytes());
    head.extend(flags.to_be_bytes());
    head.extend(kind.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head.extend((len as u32).to_be_bytes());
    head
}

/// One chunk per context, the last one marked done.
fn status_chunks(cookie: u64, contexts: &[Vec<(u32, u32)>]) -> Vec<u8> {
    let mut reply = Vec::new();
    for (id, extents) in contexts.iter().enumerate() {
        let flags = if id + 1 == contexts.len() { chunk::FLAG_DONE } else { 0 };
        reply.extend(chunk_head(cookie, flags, chunk::BLOCK_STATUS, 4 + 8 * extents.len()));
        reply.extend((id as u32).to_be_bytes());
        for (len, flags) in extents {
            reply.extend(len.to_be_bytes());
            reply.extend(flags.to_be_bytes());
        }
    }
    reply
}

fn command_name(command: u16) -> &'static str {
    match command {
        cmd::READ => "read",
        cmd::WRITE => "write",
        cmd::FLUSH => "flush",
        cmd::TRIM => "trim",
        cmd::WRITE_ZEROES => "write zeroes",
        _ => "block status",
    }
}

/// Bounds the payload bytes of a connection.
#[derive(Default)]
struct Budget {
    used: Mutex<usize>,
    freed: Condvar,
}

impl Budget {
    /// Waits until `bytes` fit; never more than [`MAX_IN_FLIGHT`], so they do once all else is done.
    fn take(&self, bytes: usize) {
        let mut used = self.used.lock();
        while *used + bytes > MAX_IN_FLIGHT {
            self.freed.wait(&mut used);
        }
        *used += bytes;
    }

    fn give_back(&self, bytes: usize) {
        *self.used.lock() -= bytes;
        self.freed.notify_one();
    }
}
