//! The client's side of the handshake.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::{ALLOCATION_ID, CHANGED_ID, bad};
use crate::nbd::proto::{
    ALLOCATION_CONTEXT, CHANGED_CONTEXT_PREFIX, FIXED_NEWSTYLE, GREETING_MAGIC, MAX_STRING,
    NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC, flag, info, opt, rep,
};
use crate::nbd::wire::Fields;
use crate::rct::RctId;

/// Bytes of one option reply that are accepted.
const MAX_REPLY: usize = 64 << 10;

/// How the server ended its answer to an option: acknowledged, or refused with these words.
type Answer = Result<(), String>;

/// What the handshake yields.
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) min_block: u32,
    pub(super) structured: bool,
    pub(super) contexts: [Option<u32>; 2],
}

pub(super) struct Negotiation<'a> {
    pub(super) stream: &'a UnixStream,
}

impl Negotiation<'_> {
    pub(super) fn run(&self, export: &str, since: Option<&RctId>) -> io::Result<Agreed> {
        if export.len() > MAX_STRING {
            return Err(bad("export name too long"));
        }
        let greeting = (u64::from_be_bytes(self.take()?), u64::from_be_bytes(self.take()?));
        let flags = u16::from_be_bytes(self.take()?);
        if greeting != (GREETING_MAGIC, OPTION_MAGIC) || flags & FIXED_NEWSTYLE == 0 {
            return Err(bad("not an NBD server of the fixed newstyle kind"));
        }
        self.send(&u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;
        let mut agreed = Agreed {
            size: 0,
            flags: 0,
            min_block: 1,
            structured: self.option(opt::STRUCTURED_REPLY, &[], |_, _| Some(()))?.is_ok(),
            contexts: [None; 2],
        };
        if agreed.structured {
            self.choose_contexts(export, since, &mut agreed.contexts)?;
        }
        let mut data = string(export);
        data.extend([0, 1]);
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        let gone = self.option(opt::GO, &data, |kind, data| {
            let mut fields = Fields::new(data);
            match (kind, fields.u16()?) {
                (rep::INFO, info::EXPORT) => {
                    (agreed.size, agreed.flags) = (fields.u64()?, fields.u16()?);
                }
                (rep::INFO, info::BLOCK_SIZE) => agreed.min_block = fields.u32()?,
                _ => {}
            }
            Some(())
        })?;
        gone.map_err(|message| io::Error::new(io::ErrorKind::NotFound, message))?;
        if agreed.flags & flag::HAS_FLAGS == 0 {
            return Err(bad("the server did not describe its export"));
        }
        Ok(agreed)
    }

    fn choose_contexts(
        &self,
        export: &str,
        since: Option<&RctId>,
        ids: &mut [Option<u32>; 2],
    ) -> io::Result<()> {
        let changed = since.map(|id| format!("{CHANGED_CONTEXT_PREFIX}{id}"));
        let mut data = string(export);
        data.extend((1 + u32::from(changed.is_some())).to_be_bytes());
        data.extend(string(ALLOCATION_CONTEXT));
        data.extend(changed.iter().flat_map(|query| string(query)));
        let chosen = self.option(opt::SET_META_CONTEXT, &data, |kind, data| {
            let mut fields = Fields::new(data);
            let id = fields.u32()?;
            match (kind, fields.rest()) {
                (rep::META_CONTEXT, name) if name == ALLOCATION_CONTEXT.as_bytes() => {
                    ids[ALLOCATION_ID] = Some(id);
                }
                (rep::META_CONTEXT, name)
                    if Some(name) == changed.as_ref().map(|c| c.as_bytes()) =>
                {
                    ids[CHANGED_ID] = Some(id);
                }
                _ => {}
            }
            Some(())
        })?;
        if chosen.is_err() {
            *ids = [None; 2];
        }
        Ok(())
    }

    /// Sends an option and hands each of its replies to `each` until the final one: an
    /// acknowledgement, or the server's refusal with its words. `each` returns `None` on a malformed
    /// reply.
    fn option(
        &self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> Option<()>,
    ) -> io::Result<Answer> {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.send(&message)?;
        loop {
            let magic = u64::from_be_bytes(self.take()?);
            let answered = u32::from_be_bytes(self.take()?);
            let kind = u32::from_be_bytes(self.take()?);
            let len = u32::from_be_bytes(self.take()?) as usize;
            if magic != OPTION_REPLY_MAGIC || answered != option || len > MAX_REPLY {
                return Err(bad("malformed option reply"));
            }
            let mut data = vec![0; len];
            self.receive(&mut data)?;
            if kind == rep::ACK {
                return Ok(Ok(()));
            }
            if kind & rep::ERROR_BIT != 0 {
                return Ok(Err(refusal(kind, &data)));
            }
            each(kind, &data).ok_or_else(|| bad("malformed option reply"))?;
        }
    }

    fn take<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<()> {
        let mut stream = self.stream;
        stream.read_exact(buf)
    }

    fn send(&self, data: &[u8]) -> io::Result<()> {
        let mut stream = self.stream;
        stream.write_all(data)
    }
}

fn refusal(kind: u32, data: &[u8]) -> String {
    match (kind, data) {
        (rep::ERR_UNKNOWN, []) => "the NBD server has no such export".to_owned(),
        (_, []) => format!("the NBD server refused (reply {kind:#x})"),
        (_, data) => format!("the NBD server refused: {}", String::from_utf8_lossy(data)),
    }
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}
