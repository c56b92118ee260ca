//! A store in memory that records its calls and fails at a chosen one.

use std::collections::BTreeMap;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::error::{RepoError, Result};
use crate::store::{ObjectInfo, Store};

/// When and how a store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Number of the call, from 0.
    pub call: usize,
    /// The call has its effect, and only its answer is lost.
    pub after_effect: bool,
    /// All later calls fail too: the process is dead.
    pub lasting: bool,
}

/// Objects in memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    calls: Vec<(&'static str, String, u64)>,
    fault: Option<Fault>,
    hit: bool,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plans a failure; counts calls from now on.
    pub fn fail_at(&self, fault: Option<Fault>) {
        let mut state = self.state.lock();
        state.calls.clear();
        state.fault = fault;
        state.hit = false;
    }

    /// Whether the planned failure happened.
    pub fn fault_hit(&self) -> bool {
        self.state.lock().hit
    }

    /// Calls since the last [`MemoryStore::fail_at`]: operation, key, bytes moved.
    pub fn calls(&self) -> Vec<(&'static str, String, u64)> {
        self.state.lock().calls.clone()
    }

    /// Keys and contents.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.state.lock().objects.clone()
    }

    /// Puts everything back to an earlier state.
    pub fn restore(&self, objects: BTreeMap<String, Bytes>) {
        self.state.lock().objects = objects;
    }

    /// Changes an object behind everyone's back.
    pub fn replace(&self, key: &str, data: Vec<u8>) {
        self.state.lock().objects.insert(key.to_owned(), data.into());
    }

    /// Removes an object behind everyone's back.
    pub fn remove(&self, key: &str) {
        self.state.lock().objects.remove(key);
    }

    fn call<T>(
        &self,
        op: &'static str,
        key: &str,
        bytes: u64,
        act: impl FnOnce(&mut BTreeMap<String, Bytes>) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.state.lock();
        let number = state.calls.len();
        state.calls.push((op, key.to_owned(), bytes));
        let fault = state.fault.filter(|f| number == f.call || f.lasting && number > f.call);
        let Some(fault) = fault else { return act(&mut state.objects) };
        state.hit = true;
        if fault.after_effect && number == fault.call {
            let _ = act(&mut state.objects);
        }
        Err(RepoError::Unreachable {
            store: self.describe(),
            attempts: 1,
            detail: format!("planned failure of call {number}"),
        })
    }

    fn missing(&self, key: &str) -> RepoError {
        RepoError::Missing { store: self.describe(), key: key.to_owned() }
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn describe(&self) -> String {
        "memory".into()
    }

    async fn create(&self, key: &str, data: Bytes) -> Result<()> {
        self.call("create", key, data.len() as u64, |objects| match objects.get(key) {
            Some(there) if *there == data => Ok(()),
            Some(_) => {
                Err(RepoError::AlreadyExists { store: "memory".into(), key: key.to_owned() })
            }
            None => {
                objects.insert(key.to_owned(), data.clone());
                Ok(())
            }
        })
    }

    async fn get(&self, key: &str) -> Result<Bytes> {
        self.call("get", key, 0, |objects| {
            objects.get(key).cloned().ok_or_else(|| self.missing(key))
        })
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.call("get_range", key, range.end - range.start, |objects| {
            let object = objects.get(key).ok_or_else(|| self.missing(key))?;
            let end = range.end.min(object.len() as u64);
            let start = range.start.min(end);
            Ok(object.slice(start as usize..end as usize))
        })
    }

    async fn size(&self, key: &str) -> Result<u64> {
        self.call("size", key, 0, |objects| {
            objects.get(key).map(|o| o.len() as u64).ok_or_else(|| self.missing(key))
        })
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.call("list", prefix, 0, |objects| {
            Ok(objects
                .iter()
                .filter(|(key, _)| key.starts_with(prefix))
                .map(|(key, data)| ObjectInfo { key: key.clone(), size: data.len() as u64 })
                .collect())
        })
    }

    async fn delete(&self, key: &str) -> Result<()> {
        self.call("delete", key, 0, |objects| {
            objects.remove(key);
            Ok(())
        })
    }
}
