//! Lines of the control protocol: one JSON object each, with the protocol's version, of bounded length.

use std::io::{self, BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::protocol::PROTOCOL_VERSION;

/// Bytes of a request's line.
pub(super) const MAX_REQUEST: u64 = 1 << 20;
/// Bytes of a response's line.
pub(super) const MAX_RESPONSE: u64 = 8 << 20;

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    message: T,
}

/// What every version of a line has in common.
#[derive(Deserialize)]
struct Header {
    version: u32,
}

/// Writes one message.
pub(super) fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Envelope { version: PROTOCOL_VERSION, message })?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads one line of at most `limit` bytes; `None` at the end of the stream.
pub(super) fn read_line(stream: &mut impl BufRead, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    stream.take(limit).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) if line.len() as u64 == limit => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"))
        }
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Understands a line, or says what is wrong with it.
pub(super) fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, String> {
    let malformed = |e: serde_json::Error| format!("malformed message: {e}");
    let header: Header = serde_json::from_slice(line).map_err(malformed)?;
    if header.version != PROTOCOL_VERSION {
        return Err(format!(
            "message of control protocol version {}, this side speaks version {PROTOCOL_VERSION}; \
             stop the VM and start it again",
            header.version
        ));
    }
    serde_json::from_slice::<Envelope<T>>(line).map(|e| e.message).map_err(malformed)
}
