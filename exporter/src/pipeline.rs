//! Ordered read-ahead: several threads read the pieces of a plan, one caller takes them in order.
//! At most [`AHEAD`] pieces of 1 MiB are in memory here, whatever the disk's size.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::thread;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::error::{ExportError, Result, check};
use crate::plan::{PIECE, Step};

/// Pieces read ahead of the consumer.
const AHEAD: usize = 16;

/// What the consumer gets, ascending.
pub(crate) enum Piece {
    /// Content read.
    Data {
        /// Where it belongs.
        offset: u64,
        /// At most 1 MiB.
        data: Bytes,
    },
    /// Zeros that nobody had to read.
    Zero(Range<u64>),
}

/// Reads into a buffer from an offset; called from several threads.
pub(crate) type ReadFn<'a> = &'a (dyn Fn(u64, &mut [u8]) -> Result<()> + Sync);

struct Job {
    range: Range<u64>,
    done: Sender<Result<Bytes>>,
}

/// A place in the order: a piece that is being read, zeros, or the plan's failure.
enum Place {
    Reading { offset: u64, done: Receiver<Result<Bytes>> },
    Zero(Range<u64>),
    Failed(ExportError),
}

/// Runs a plan to its end, its first error or its cancellation. No thread outlives the call.
pub(crate) fn run(
    steps: impl Iterator<Item = Result<Step>> + Send,
    readers: usize,
    read: ReadFn<'_>,
    cancel: &AtomicBool,
    mut sink: impl FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let buffers = Buffers::new();
    thread::scope(|scope| {
        let (job_in, jobs) = bounded::<Job>(AHEAD);
        let (place_in, places) = bounded::<Place>(AHEAD);
        let spawn_failed = |e| ExportError::Io { op: "start", path: "a thread".into(), source: e };
        for _ in 0..readers.max(1) {
            let (jobs, buffers) = (jobs.clone(), buffers.clone());
            let work = move || serve(&jobs, &buffers, read, cancel);
            thread::Builder::new()
                .name("read-ahead".to_owned())
                .spawn_scoped(scope, work)
                .map_err(spawn_failed)?;
        }
        drop(jobs);
        thread::Builder::new()
            .name("plan".to_owned())
            .spawn_scoped(scope, move || feed(steps, &job_in, &place_in, cancel))
            .map_err(spawn_failed)?;
        // `places` is dropped with this call: a planner that still wants to send then ends, which
        // closes the jobs, which ends the readers.
        drain(places, cancel, &mut sink)
    })
}

/// The planner: gives every step its place in the order, and reading to the readers.
fn feed(
    steps: impl Iterator<Item = Result<Step>>,
    jobs: &Sender<Job>,
    places: &Sender<Place>,
    cancel: &AtomicBool,
) {
    for step in steps {
        // Bounded by `places`, so that `jobs` never has more than AHEAD waiting.
        let sent = match check(cancel).and(step) {
            Ok(Step::Read(range)) => {
                let (done, result) = bounded(1);
                let place = Place::Reading { offset: range.start, done: result };
                places.send(place).is_ok() && jobs.send(Job { range, done }).is_ok()
            }
            Ok(Step::Zero(range)) => places.send(Place::Zero(range)).is_ok(),
            Err(e) => {
                // Nobody listening means that the run has failed already.
                places.send(Place::Failed(e)).ok();
                return;
            }
        };
        if !sent {
            return;
        }
    }
}

fn serve(jobs: &Receiver<Job>, buffers: &Buffers, read: ReadFn<'_>, cancel: &AtomicBool) {
    for Job { range, done } in jobs {
        let result = check(cancel).and_then(|()| {
            let mut buffer = buffers.take();
            let len = (range.end - range.start) as usize;
            let target = buffer.get_mut(..len).ok_or_else(|| {
                ExportError::Invalid(format!("a piece of {len} bytes was planned"))
            })?;
            read(range.start, target)?;
            Ok(buffers.lend(buffer, len))
        });
        // A consumer that is gone does not want it any more.
        done.send(result).ok();
    }
}

fn drain(
    places: Receiver<Place>,
    cancel: &AtomicBool,
    sink: &mut impl FnMut(Piece) -> Result<()>,
) -> Result<()> {
    for place in places {
        check(cancel)?;
        let piece = match place {
            Place::Failed(e) => return Err(e),
            Place::Zero(range) => Piece::Zero(range),
            Place::Reading { offset, done } => {
                let data = done.recv().unwrap_or_else(|_| {
                    Err(ExportError::Invalid("a reading thread ended unexpectedly".to_owned()))
                })?;
                Piece::Data { offset, data }
            }
        };
        sink(piece)?;
    }
    check(cancel)
}

/// Buffers of one piece, used again and again: fresh memory for every MiB would cost more than
/// hashing it.
#[derive(Clone)]
struct Buffers {
    give: Sender<Vec<u8>>,
    free: Receiver<Vec<u8>>,
}

impl Buffers {
    fn new() -> Self {
        let (give, free) = bounded(AHEAD * 2);
        Self { give, free }
    }

    fn take(&self) -> Vec<u8> {
        self.free.try_recv().unwrap_or_else(|_| vec![0; PIECE as usize])
    }

    /// The buffer as shared bytes; it comes back when the last of them is dropped.
    fn lend(&self, buffer: Vec<u8>, len: usize) -> Bytes {
        Bytes::from_owner(Lent { buffer, len, home: self.give.clone() })
    }
}

struct Lent {
    buffer: Vec<u8>,
    len: usize,
    home: Sender<Vec<u8>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Full: one buffer less to keep.
        self.home.try_send(std::mem::take(&mut self.buffer)).ok();
    }
}

#[cfg(test)]
mod tests;
