//! Client side of the control protocol.

use std::path::Path;
use std::time::Duration;

use super::protocol::{Request, Response};
use crate::error::Result;

/// A connection to a disk owner.
pub struct Client {
    _private: (),
}

impl Client {
    /// Connects to the owner's control socket.
    pub fn connect(_socket: &Path) -> Result<Self> {
        todo!()
    }

    /// Sends a request and waits for its response; `Response::Error` becomes an `Err`.
    pub fn call(&mut self, _request: &Request, _timeout: Duration) -> Result<Response> {
        todo!()
    }
}
