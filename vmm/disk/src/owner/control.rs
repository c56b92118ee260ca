//! The control socket: any number of clients (up to a limit), each with one request at a time.

use std::io::{self, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::protocol::{Request, Response};
use super::wire::{self, MAX_REQUEST};
use crate::error::{DiskError, Result};
use crate::nbd::socket::Listener;

/// Clients served at the same time; further ones are turned away.
const MAX_CLIENTS: usize = 32;
/// A client that does not take its response for this long is given up.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers requests, from many threads at once.
pub(super) type Handler = dyn Fn(Request) -> Response + Send + Sync;

/// The control socket's server.
pub(super) struct Control {
    listener: Arc<Listener>,
    clients: Arc<Clients>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Clients {
    open: Mutex<Vec<Arc<UnixStream>>>,
    ended: Condvar,
}

impl Control {
    /// Listens on `socket` and answers with `handler`.
    pub(super) fn start(socket: &Path, handler: Arc<Handler>) -> Result<Self> {
        let listener = Arc::new(Listener::bind(socket)?);
        let clients = Arc::new(Clients::default());
        let acceptor = {
            let (listener, clients) = (listener.clone(), clients.clone());
            thread::Builder::new()
                .name("control-accept".to_owned())
                .spawn(move || accept_clients(&listener, &clients, &handler))
                .map_err(|e| DiskError::io("start a thread for", socket, e))?
        };
        Ok(Self { listener, clients, acceptor: Some(acceptor) })
    }

    /// Takes no further clients; present ones stay.
    pub(super) fn stop_listening(&self) {
        self.listener.stop();
    }

    /// Lets present clients take the responses they wait for, then hangs up.
    fn finish(&mut self) {
        self.listener.stop();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let mut open = self.clients.open.lock();
        for stream in open.iter() {
            // Only the reading side: a response that is being written still arrives.
            let _ = stream.shutdown(Shutdown::Read);
        }
        let end = Instant::now() + 2 * RESPONSE_TIMEOUT;
        while !open.is_empty() && !self.clients.ended.wait_until(&mut open, end).timed_out() {}
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.finish();
    }
}

fn accept_clients(listener: &Listener, clients: &Arc<Clients>, handler: &Arc<Handler>) {
    while let Some(stream) = listener.next_client() {
        let stream = Arc::new(stream);
        let mut open = clients.open.lock();
        if open.len() >= MAX_CLIENTS {
            continue;
        }
        open.push(stream.clone());
        drop(open);
        let place = Place { clients: clients.clone(), stream };
        let handler = handler.clone();
        let started = thread::Builder::new().name("control-client".to_owned()).spawn(move || {
            if let Err(error) = serve(&place.stream, &*handler) {
                tracing::debug!(%error, "control client gone");
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "no thread for a control client");
        }
    }
}

/// A client's place in the list, given back when dropped.
struct Place {
    clients: Arc<Clients>,
    stream: Arc<UnixStream>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.open.lock().retain(|open| !Arc::ptr_eq(open, &self.stream));
        let _ = self.stream.shutdown(Shutdown::Both);
        self.clients.ended.notify_all();
    }
}

/// Answers one client until it leaves. A client that leaves in the middle of its request changes
/// nothing about the request.
fn serve(stream: &UnixStream, handler: &Handler) -> io::Result<()> {
    stream.set_write_timeout(Some(RESPONSE_TIMEOUT))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let line = match wire::read_line(&mut reader, MAX_REQUEST) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) => {
                let _ = wire::send(&mut writer, &Response::Error { message: error.to_string() });
                return Err(error);
            }
        };
        let response = match wire::parse(&line) {
            Ok(request) => answer(request, handler),
            Err(message) => Response::Error { message },
        };
        wire::send(&mut writer, &response)?;
    }
}

fn answer(request: Request, handler: &Handler) -> Response {
    catch_unwind(AssertUnwindSafe(|| handler(request))).unwrap_or_else(|_| Response::Error {
        message: "the disk owner failed inside while it answered; see its log".to_owned(),
    })
}
