//! The exports and connections of one server.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::export::{Counters, Export, Served};

/// Open connections of one server; further clients are turned away.
const MAX_CONNECTIONS: usize = 64;

#[derive(Default)]
pub(super) struct Registry {
    state: Mutex<State>,
    /// Told whenever a connection has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    exports: Vec<Arc<Served>>,
    connections: Vec<Connection>,
    next_id: u64,
    closing: bool,
}

struct Connection {
    id: u64,
    stream: Arc<UnixStream>,
    /// The export it has chosen.
    served: Option<Arc<Served>>,
}

impl State {
    fn find(&self, name: &str) -> Option<Arc<Served>> {
        if name.is_empty() {
            return self.exports.first().cloned();
        }
        self.exports.iter().find(|served| served.export.name == name).cloned()
    }
}

impl Registry {
    /// Adds an export; one of the same name is replaced in its place and its connections end.
    pub(super) fn add(&self, export: Export) {
        let new = Arc::new(Served::new(export));
        let mut state = self.state.lock();
        let same = state.exports.iter().position(|old| old.export.name == new.export.name);
        match same {
            Some(position) => {
                let old = std::mem::replace(&mut state.exports[position], new);
                self.end_connections(&mut state, &old);
            }
            None => state.exports.push(new),
        }
    }

    pub(super) fn remove(&self, name: &str) {
        let mut state = self.state.lock();
        if let Some(position) = state.exports.iter().position(|old| old.export.name == name) {
            let old = state.exports.remove(position);
            self.end_connections(&mut state, &old);
        }
    }

    /// Ends the connections of an export and waits until none of their requests is in flight.
    fn end_connections(&self, state: &mut parking_lot::MutexGuard<'_, State>, old: &Arc<Served>) {
        let uses = |connection: &Connection| {
            connection.served.as_ref().is_some_and(|served| Arc::ptr_eq(served, old))
        };
        for connection in state.connections.iter().filter(|c| uses(c)) {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        while state.connections.iter().any(uses) {
            self.ended.wait(state);
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Served>> {
        self.state.lock().find(name)
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.state.lock().exports.iter().map(|served| served.export.name.clone()).collect()
    }

    pub(super) fn counters(&self, name: &str) -> Counters {
        self.find(name).map(|served| served.counters()).unwrap_or_default()
    }

    pub(super) fn connections(&self) -> usize {
        self.state.lock().connections.len()
    }

    /// Binds a connection to an export, in one step with finding it: an export that is being removed
    /// either is not found or sees this connection and ends it.
    pub(super) fn attach(&self, id: u64, name: &str) -> Option<Arc<Served>> {
        let mut state = self.state.lock();
        let served = state.find(name)?;
        let connection = state.connections.iter_mut().find(|connection| connection.id == id)?;
        connection.served = Some(served.clone());
        Some(served)
    }

    /// Takes a connection in; `None` when there are too many, or the server is closing.
    pub(super) fn open(self: &Arc<Self>, stream: &Arc<UnixStream>) -> Option<Open> {
        let mut state = self.state.lock();
        if state.closing || state.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        let id = state.next_id;
        state.next_id += 1;
        state.connections.push(Connection { id, stream: stream.clone(), served: None });
        Some(Open { registry: self.clone(), id })
    }

    /// Ends all connections and waits for them; no request is in flight afterwards.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        for connection in &state.connections {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        while !state.connections.is_empty() {
            self.ended.wait(&mut state);
        }
        state.exports.clear();
    }
}

/// A connection's place in the registry, given back when dropped, also by a panic.
pub(super) struct Open {
    pub(super) registry: Arc<Registry>,
    pub(super) id: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.registry.state.lock().connections.retain(|connection| connection.id != self.id);
        self.registry.ended.notify_all();
    }
}
