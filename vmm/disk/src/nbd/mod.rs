//! NBD over Unix sockets (fixed newstyle): a server for QEMU and any other NBD client, and a small
//! blocking client. What is supported is listed in docs/nbd.md.
//!
//! A client is never trusted: lengths, counts, time for the handshake and memory are bounded per
//! connection, and a client that breaks the protocol loses its own connection and nothing else.

mod client;
mod contexts;
mod export;
mod handshake;
mod proto;
mod registry;
pub(crate) mod socket;
#[cfg(test)]
mod tests;
mod transmission;
mod wire;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

pub use client::Client;
pub use export::{ChangedRanges, Counters, Export};

use parking_lot::Mutex;

use crate::block::Block;
use crate::error::{DiskError, Result};
use registry::{Open, Registry};
use socket::Listener;

/// A running NBD server; dropping it stops listening, closes its connections, waits until no request
/// is in flight, and removes the socket.
pub struct Server {
    registry: Arc<Registry>,
    listener: Arc<Listener>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Listens on `socket` (mode 0600; a stale socket file is replaced). Serves nothing until exports
    /// are added.
    pub fn bind(socket: &Path) -> Result<Self> {
        Self::bind_with(socket, Vec::new())
    }

    /// Like [`Server::bind`], with exports in place before the first client: one that reconnects in
    /// the same instant finds them all.
    pub fn bind_with(socket: &Path, exports: Vec<Export>) -> Result<Self> {
        let registry = Arc::new(Registry::default());
        for export in exports {
            registry.add(export);
        }
        let listener = Arc::new(Listener::bind(socket)?);
        let acceptor = {
            let (listener, registry) = (listener.clone(), registry.clone());
            thread::Builder::new()
                .name("nbd-accept".to_owned())
                .spawn(move || accept_clients(&listener, &registry))
                .map_err(|e| DiskError::io("start a thread for", socket, e))?
        };
        Ok(Self { registry, listener, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Adds or replaces an export. The first one added is also the default export (empty name).
    pub fn add_export(&self, name: &str, disk: Arc<dyn Block>) {
        self.add(Export::new(name, disk));
    }

    /// Adds or replaces an export; the connections of a replaced one end.
    pub fn add(&self, export: Export) {
        self.registry.add(export);
    }

    /// Takes an export away; its connections end, and no request is in flight when this returns. Not
    /// to be called while the disk's I/O is paused: requests would never finish.
    pub fn remove_export(&self, name: &str) {
        self.registry.remove(name);
    }

    /// Number of open connections.
    pub fn connections(&self) -> usize {
        self.registry.connections()
    }

    /// Bytes moved for clients of an export since it was added; zeros if there is none of this name.
    pub fn counters(&self, name: &str) -> Counters {
        self.registry.counters(name)
    }

    /// What dropping does, for a server that others still look at. Not to be called while a disk's I/O
    /// is paused.
    pub fn stop(&self) {
        self.listener.stop();
        if let Some(acceptor) = self.acceptor.lock().take() {
            let _ = acceptor.join();
        }
        self.registry.close();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Takes clients in until the listener is stopped.
fn accept_clients(listener: &Listener, registry: &Arc<Registry>) {
    while let Some(stream) = listener.next_client() {
        let stream = Arc::new(stream);
        // Too many clients, or no thread for another: this one is dropped, and may try again.
        let Some(open) = registry.open(&stream) else { continue };
        let started = thread::Builder::new()
            .name("nbd-client".to_owned())
            .spawn(move || serve_client(&stream, &open));
        if let Err(error) = started {
            tracing::warn!(%error, "no thread for an NBD client");
        }
    }
}

fn serve_client(stream: &UnixStream, open: &Open) {
    let serve = || -> io::Result<()> {
        match handshake::negotiate(&open.registry, open.id, stream)? {
            Some(session) => transmission::serve(stream, &session),
            None => Ok(()),
        }
    };
    if let Err(error) = serve() {
        tracing::debug!(%error, "NBD client gone");
    }
}
