//! NBD server over Unix sockets (fixed newstyle), for QEMU and any other NBD client.

use std::path::Path;
use std::sync::Arc;

use crate::block::Block;
use crate::error::Result;

/// A running NBD server; dropping it stops listening, closes its connections and removes the socket.
pub struct Server {
    _private: (),
}

impl Server {
    /// Listens on `socket` (mode 0600; a stale socket file is replaced). Serves nothing until exports
    /// are added.
    pub fn bind(_socket: &Path) -> Result<Self> {
        todo!()
    }

    /// Adds or replaces an export. The first one added is also the default export (empty name).
    pub fn add_export(&self, _name: &str, _disk: Arc<dyn Block>) {
        todo!()
    }

    /// Takes an export away; its connections end.
    pub fn remove_export(&self, _name: &str) {
        todo!()
    }

    /// Number of open connections.
    pub fn connections(&self) -> usize {
        todo!()
    }
}
