//! One disk of the owner, and the merge that may run on it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use super::protocol::MergeState;
use crate::chain::{Chain, MergeProgress};
use crate::error::{DiskError, Result};

/// An open disk.
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) chain: Arc<Chain>,
    merge: Arc<Mutex<MergeState>>,
    worker: Mutex<Option<Worker>>,
}

/// The thread of a merge.
struct Worker {
    cancel: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Disk {
    pub(super) fn new(name: String, chain: Chain) -> Self {
        Self {
            name,
            chain: Arc::new(chain),
            merge: Arc::new(Mutex::new(MergeState::None)),
            worker: Mutex::new(None),
        }
    }

    pub(super) fn merge_state(&self) -> MergeState {
        self.merge.lock().clone()
    }

    /// The file that is written.
    pub(super) fn leaf(&self) -> Option<PathBuf> {
        self.chain.files().pop()
    }

    /// Whether `file` is the one that is written; by name, for a chain's files lie in one directory.
    pub(super) fn has_leaf(&self, file: &Path) -> bool {
        self.leaf().is_some_and(|leaf| leaf.file_name() == file.file_name())
    }

    /// Whether a merge of the leaf runs: no checkpoint can be taken meanwhile.
    pub(super) fn leaf_is_merging(&self) -> bool {
        matches!(self.merge_state(), MergeState::Running { child, .. } if Some(&child) == self.leaf().as_ref())
    }

    /// Starts folding `child` into its parent. Asked again while that runs or after it is done, it
    /// does nothing; the state says [`MergeState::Running`] before this returns.
    pub(super) fn start_merge(&self, child: &Path) -> Result<()> {
        let mut worker = self.worker.lock();
        let files = self.chain.files();
        // Known by name: all files of a chain lie in one directory.
        let position = files.iter().position(|file| file.file_name() == child.file_name());
        match self.merge_state() {
            MergeState::Running { child: running, .. }
                if running.file_name() == child.file_name() =>
            {
                return Ok(());
            }
            MergeState::Running { child: running, .. } => {
                return Err(DiskError::State(format!(
                    "disk {} is merging {} already: wait for the end, or cancel it",
                    self.name,
                    running.display()
                )));
            }
            MergeState::Done { child: done } if position.is_none() && done == child => {
                return Ok(());
            }
            _ => {}
        }
        let child = match position {
            Some(0) => {
                return Err(DiskError::State(format!(
                    "{} is the base of disk {} and has no parent to merge into",
                    child.display(),
                    self.name
                )));
            }
            Some(position) => files[position].clone(),
            None => {
                return Err(DiskError::State(format!(
                    "{} is not part of disk {}",
                    child.display(),
                    self.name
                )));
            }
        };
        // An earlier thread has set its final state and is as good as ended.
        if let Some(earlier) = worker.take() {
            let _ = earlier.thread.join();
        }
        *self.merge.lock() = MergeState::Running { child: child.clone(), done: 0, total: 0 };
        let cancel = Arc::new(AtomicBool::new(false));
        let thread = {
            let (chain, state) = (self.chain.clone(), self.merge.clone());
            let (cancel, child) = (cancel.clone(), child.clone());
            thread::Builder::new()
                .name("merge".to_owned())
                .spawn(move || run_merge(&chain, &child, &state, &cancel))
        };
        match thread {
            Ok(thread) => *worker = Some(Worker { cancel, thread }),
            Err(error) => {
                let message = format!("no thread for the merge: {error}");
                *self.merge.lock() = MergeState::Failed { child, message: message.clone() };
                return Err(DiskError::State(message));
            }
        }
        Ok(())
    }

    /// Stops a running merge and waits until it has stopped; does nothing if none runs.
    pub(super) fn cancel_merge(&self) {
        if let Some(worker) = self.worker.lock().take() {
            worker.cancel.store(true, Ordering::Relaxed);
            let _ = worker.thread.join();
        }
    }
}

/// The merge's thread. A kill at any moment leaves a chain that the next owner opens and merges on.
fn run_merge(chain: &Chain, child: &Path, state: &Mutex<MergeState>, cancel: &AtomicBool) {
    let progress = |p: MergeProgress| {
        *state.lock() =
            MergeState::Running { child: child.to_owned(), done: p.done, total: p.total };
    };
    let merged = catch_unwind(AssertUnwindSafe(|| chain.merge(child, &progress, cancel)));
    let child = child.to_owned();
    *state.lock() = match merged {
        Ok(Ok(())) => MergeState::Done { child },
        Ok(Err(error)) => {
            tracing::warn!(child = %child.display(), %error, "merge stopped");
            MergeState::Failed { child, message: error.to_string() }
        }
        Err(_) => MergeState::Failed {
            child,
            message: "the merge failed inside; see the disk owner's log".to_owned(),
        },
    };
}
