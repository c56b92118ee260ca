//! Threads for hashing, compression and encryption, and the runtime for object-store I/O; both are
//! made once per process.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tokio::runtime::Runtime;

use crate::error::{RepoError, Result};

type Work = Box<dyn FnOnce() + Send>;

/// Result of work given to the pool.
pub(crate) struct Job<T>(Receiver<T>);

impl<T> Job<T> {
    /// Waits for the result. A job that panicked gives an error, never a hang.
    pub(crate) fn wait(self) -> Result<T> {
        self.0
            .recv()
            .map_err(|_| RepoError::Invalid("an internal worker failed; see the log".into()))
    }
}

/// Runs `work` on the CPU pool. Work must not wait for other work.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Job<T> {
    let (give, take) = sync_channel(1);
    let work: Work = Box::new(move || {
        // The receiver may be gone: a cancelled writer wants no results.
        let _ = give.send(work());
    });
    if let Err(back) = queue().send(work) {
        // No worker thread could be started: do the work here.
        (back.0)();
    }
    Job(take)
}

/// Number of CPU workers.
pub(crate) fn workers() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 32)
}

fn queue() -> &'static SyncSender<Work> {
    static QUEUE: OnceLock<SyncSender<Work>> = OnceLock::new();
    QUEUE.get_or_init(|| {
        // Callers bound their own work in flight; this bound only stops a runaway.
        let (give, take) = sync_channel::<Work>(4096);
        let take = std::sync::Arc::new(parking_lot::Mutex::new(take));
        for n in 0..workers() {
            let take = take.clone();
            let spawned = std::thread::Builder::new().name(format!("dedup-{n}")).spawn(move || {
                loop {
                    let next = take.lock().recv();
                    let Ok(work) = next else { break };
                    if catch_unwind(AssertUnwindSafe(work)).is_err() {
                        tracing::error!("a repository worker panicked");
                    }
                }
            });
            if let Err(e) = spawned {
                tracing::warn!("cannot start repository worker {n}: {e}");
            }
        }
        give
    })
}

/// The runtime of object-store I/O. Never dropped, so never dropped inside another runtime.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let built = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("dedup-io")
            .enable_all()
            .build();
        match built {
            Ok(runtime) => runtime,
            // Without threads and a poller the process can do nothing at all.
            Err(e) => panic!("cannot start the I/O runtime: {e}"),
        }
    })
}

/// Runs a future to its end on the I/O runtime, blocking this thread.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    runtime().block_on(future)
}

/// Turns a failed I/O task into an error.
pub(crate) fn joined<T>(
    result: std::result::Result<Result<T>, tokio::task::JoinError>,
) -> Result<T> {
    match result {
        Ok(result) => result,
        Err(e) if e.is_cancelled() => Err(RepoError::Cancelled),
        Err(e) => Err(RepoError::Invalid(format!("an internal I/O task failed: {e}"))),
    }
}
