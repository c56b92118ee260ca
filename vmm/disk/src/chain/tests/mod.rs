//! Tests of chains.

mod crash;
mod errors;
mod kill;
mod model;
mod offline;
mod pages;
mod property;
mod threads;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use super::Chain;
use crate::error::Result;

type Call = dyn Fn(&Chain, &'static str) -> Result<()> + Send + Sync;

/// Called at every step of a change, to look at the files, to write, or to fail.
#[derive(Default)]
pub(super) struct Hook(Mutex<Option<Arc<Call>>>, AtomicU32);

impl Hook {
    pub(super) fn call(&self, chain: &Chain, step: &'static str) -> Result<()> {
        let call = self.0.lock().clone();
        call.map_or(Ok(()), |call| call(chain, step))
    }

    fn set(&self, call: impl Fn(&Chain, &'static str) -> Result<()> + Send + Sync + 'static) {
        *self.0.lock() = Some(Arc::new(call));
    }

    /// The block size of new leaves, where a test wants another.
    pub(super) fn block_size(&self) -> Option<u32> {
        Some(self.1.load(Ordering::Relaxed)).filter(|size| *size > 0)
    }

    fn set_block_size(&self, size: u32) {
        self.1.store(size, Ordering::Relaxed);
    }

    fn clear(&self) {
        *self.0.lock() = None;
    }
}

impl Chain {
    /// Makes the operations of this chain fail at a step, or at none any more.
    pub(crate) fn fail_at(&self, failing: Option<&'static str>) {
        self.hook.clear();
        if let Some(failing) = failing {
            self.hook.set(move |_, step| match step == failing {
                true => Err(crate::error::DiskError::State(format!("failed at {step}"))),
                false => Ok(()),
            });
        }
    }
}
