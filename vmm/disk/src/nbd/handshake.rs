//! Fixed newstyle negotiation. Everything the client sends is bounded: each option's length, their
//! number, and the time for all of it together.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::contexts::{Context, Kind, MAX_CONTEXTS};
use super::export::Served;
use super::proto::{
    ALLOCATION_CONTEXT, CHANGED_CONTEXT_PREFIX, FIXED_NEWSTYLE, GREETING_MAGIC, MAX_PAYLOAD,
    MAX_STRING, NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC, info, opt, rep,
};
use super::registry::Registry;
use super::wire::Fields;

/// Time for the whole negotiation.
const DEADLINE: Duration = Duration::from_secs(15);
/// Options a client may send.
const MAX_OPTIONS: usize = 64;
/// Bytes of data of one option.
const MAX_OPTION_DATA: usize = 64 << 10;
/// The block size at which requests are cheapest: a tracking granule.
const PREFERRED_BLOCK: u32 = 64 << 10;

/// What was agreed.
pub(super) struct Session {
    pub(super) export: Arc<Served>,
    /// Replies to reads come in chunks.
    pub(super) structured: bool,
    /// Metadata contexts, numbered by position.
    pub(super) contexts: Vec<Context>,
}

/// Negotiates with a new client; `None` when it went away politely.
pub(super) fn negotiate(
    registry: &Registry,
    connection: u64,
    stream: &UnixStream,
) -> io::Result<Option<Session>> {
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut handshake = Handshake {
        registry,
        connection,
        stream,
        deadline: Instant::now() + DEADLINE,
        structured: false,
        contexts: None,
    };
    let session = handshake.run()?;
    // From here a client may be idle for days.
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(session)
}

struct Handshake<'a> {
    registry: &'a Registry,
    connection: u64,
    stream: &'a UnixStream,
    deadline: Instant,
    structured: bool,
    /// The export the contexts were chosen for, and the contexts.
    contexts: Option<(Arc<Served>, Vec<Context>)>,
}

/// What an option leads to.
enum Next {
    Option,
    Transmission(Session),
    End,
}

impl Handshake<'_> {
    fn run(&mut self) -> io::Result<Option<Session>> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(GREETING_MAGIC.to_be_bytes());
        greeting.extend(OPTION_MAGIC.to_be_bytes());
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.send(&greeting)?;
        let flags = u32::from_be_bytes(self.take()?);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(invalid("unknown client flags"));
        }
        let no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        for _ in 0..MAX_OPTIONS {
            match self.option(no_zeroes)? {
                Next::Option => {}
                Next::Transmission(session) => return Ok(Some(session)),
                Next::End => return Ok(None),
            }
        }
        Err(invalid("too many options"))
    }

    fn option(&mut self, no_zeroes: bool) -> io::Result<Next> {
        if u64::from_be_bytes(self.take()?) != OPTION_MAGIC {
            return Err(invalid("bad option magic"));
        }
        let option = u32::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?) as usize;
        if len > MAX_OPTION_DATA {
            self.error(option, rep::ERR_TOO_BIG, "option data too long")?;
            return Err(invalid("option data too long"));
        }
        let mut data = vec![0; len];
        self.receive(&mut data)?;
        match option {
            opt::EXPORT_NAME => return self.export_name(&data, no_zeroes),
            opt::ABORT => {
                self.reply(option, rep::ACK, &[])?;
                return Ok(Next::End);
            }
            opt::GO | opt::INFO => return self.go(option, &data),
            opt::LIST if data.is_empty() => self.list()?,
            opt::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.reply(option, rep::ACK, &[])?;
            }
            opt::LIST | opt::STRUCTURED_REPLY => {
                self.error(option, rep::ERR_INVALID, "this option takes no data")?;
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, &data)?,
            opt::STARTTLS => self.error(option, rep::ERR_UNSUP, "no TLS on a Unix socket")?,
            _ => self.error(option, rep::ERR_UNSUP, "option not supported")?,
        }
        Ok(Next::Option)
    }

    /// The oldest way in: there is no reply but the export itself, an unknown name ends it.
    fn export_name(&mut self, data: &[u8], no_zeroes: bool) -> io::Result<Next> {
        let export = name(data)
            .and_then(|name| self.registry.attach(self.connection, name))
            .ok_or_else(|| invalid("unknown export"))?;
        let mut reply = Vec::with_capacity(134);
        reply.extend(export.size().to_be_bytes());
        reply.extend(export.flags(self.structured).to_be_bytes());
        if !no_zeroes {
            reply.extend([0; 124]);
        }
        self.send(&reply)?;
        Ok(Next::Transmission(self.session(export)))
    }

    fn go(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let Some((wanted, asked)) = parse_go(data) else {
            self.error(option, rep::ERR_INVALID, "malformed option data")?;
            return Ok(Next::Option);
        };
        let export = if option == opt::GO {
            self.registry.attach(self.connection, wanted)
        } else {
            self.registry.find(wanted)
        };
        let Some(export) = export else {
            self.error(option, rep::ERR_UNKNOWN, "no export of this name")?;
            return Ok(Next::Option);
        };
        let mut about = info::EXPORT.to_be_bytes().to_vec();
        about.extend(export.size().to_be_bytes());
        about.extend(export.flags(self.structured).to_be_bytes());
        self.reply(option, rep::INFO, &about)?;
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [export.sector() as u32, PREFERRED_BLOCK, MAX_PAYLOAD] {
            sizes.extend(size.to_be_bytes());
        }
        self.reply(option, rep::INFO, &sizes)?;
        if asked.contains(&info::NAME) {
            let mut named = info::NAME.to_be_bytes().to_vec();
            named.extend(export.export.name.as_bytes());
            self.reply(option, rep::INFO, &named)?;
        }
        self.reply(option, rep::ACK, &[])?;
        if option == opt::INFO {
            return Ok(Next::Option);
        }
        Ok(Next::Transmission(self.session(export)))
    }

    fn list(&mut self) -> io::Result<()> {
        for name in self.registry.names() {
            let mut entry = (name.len() as u32).to_be_bytes().to_vec();
            entry.extend(name.as_bytes());
            self.reply(opt::LIST, rep::SERVER, &entry)?;
        }
        self.reply(opt::LIST, rep::ACK, &[])
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        if option == opt::SET_META_CONTEXT {
            // Whatever comes of this request, an earlier choice is void.
            self.contexts = None;
        }
        if !self.structured {
            return self.error(option, rep::ERR_INVALID, "structured replies come first");
        }
        let Some((wanted, queries)) = parse_meta(data) else {
            return self.error(option, rep::ERR_INVALID, "malformed option data");
        };
        let Some(export) = self.registry.find(wanted) else {
            return self.error(option, rep::ERR_UNKNOWN, "no export of this name");
        };
        let contexts = if option == opt::SET_META_CONTEXT {
            select(&export, &queries)
        } else {
            offered(&export, &queries)
        };
        for (position, context) in contexts.iter().enumerate() {
            let id = if option == opt::SET_META_CONTEXT { position as u32 } else { 0 };
            let mut entry = id.to_be_bytes().to_vec();
            entry.extend(context.name.as_bytes());
            self.reply(option, rep::META_CONTEXT, &entry)?;
        }
        if option == opt::SET_META_CONTEXT {
            self.contexts = Some((export, contexts));
        }
        self.reply(option, rep::ACK, &[])
    }

    fn session(&mut self, export: Arc<Served>) -> Session {
        // Contexts hold for the export they were chosen for, and no other.
        let contexts = match self.contexts.take() {
            Some((chosen, contexts)) if Arc::ptr_eq(&chosen, &export) => contexts,
            _ => Vec::new(),
        };
        Session { export, structured: self.structured, contexts }
    }

    fn reply(&self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut reply = Vec::with_capacity(20 + data.len());
        reply.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        reply.extend(option.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend((data.len() as u32).to_be_bytes());
        reply.extend(data);
        self.send(&reply)
    }

    fn error(&self, option: u32, kind: u32, message: &str) -> io::Result<()> {
        self.reply(option, kind, message.as_bytes())
    }

    fn send(&self, data: &[u8]) -> io::Result<()> {
        let mut stream = self.stream;
        stream.write_all(data)
    }

    fn take<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    /// Fills `buf` before the deadline of the whole negotiation.
    fn receive(&self, mut buf: &mut [u8]) -> io::Result<()> {
        let mut stream = self.stream;
        while !buf.is_empty() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            match stream.read(buf) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => buf = &mut buf[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The contexts that SET chooses: each existing one that a query names in full.
fn select(export: &Arc<Served>, queries: &[&str]) -> Vec<Context> {
    let mut chosen: Vec<Context> = Vec::new();
    for query in queries {
        if chosen.len() == MAX_CONTEXTS {
            break;
        }
        if chosen.iter().any(|context| context.name == *query) {
            continue;
        }
        chosen.extend(find_context(export, query));
    }
    chosen
}

/// The contexts that LIST names: all without a query, else those that match or lie in a namespace.
fn offered(export: &Arc<Served>, queries: &[&str]) -> Vec<Context> {
    let allocation = || Context { name: ALLOCATION_CONTEXT.to_owned(), kind: Kind::Allocation };
    if queries.is_empty() {
        return vec![allocation()];
    }
    let expanded: Vec<&str> =
        queries.iter().map(|&q| if q == "base:" { ALLOCATION_CONTEXT } else { q }).collect();
    select(export, &expanded)
}

fn find_context(export: &Arc<Served>, query: &str) -> Option<Context> {
    if query == ALLOCATION_CONTEXT {
        return Some(Context { name: query.to_owned(), kind: Kind::Allocation });
    }
    let id = query.strip_prefix(CHANGED_CONTEXT_PREFIX)?;
    match export.changed_provider()?(id) {
        Ok(ranges) => Some(Context { name: query.to_owned(), kind: Kind::changed(ranges) }),
        Err(error) => {
            // Leaving the context out is the protocol's "no": the client reads everything.
            tracing::warn!(disk = %export.export.name, id, %error, "changed ranges refused");
            None
        }
    }
}

fn parse_go(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields::new(data);
    let wanted = fields.string()?;
    let count = fields.u16()?;
    let mut asked = Vec::new();
    for _ in 0..count {
        asked.push(fields.u16()?);
    }
    fields.at_end().then_some((wanted, asked))
}

fn parse_meta(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields::new(data);
    let wanted = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.at_end().then_some((wanted, queries))
}

fn name(data: &[u8]) -> Option<&str> {
    if data.len() > MAX_STRING { None } else { std::str::from_utf8(data).ok() }
}

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
