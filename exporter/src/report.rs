//! Turns what happens into events: steps, notes (kept for the run's record), progress at a bearable
//! rate.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::model::{Events, RunEvent};

/// Time between two progress events; people cannot read faster and terminals are slow.
const INTERVAL: Duration = Duration::from_millis(100);

/// Notes kept for the record; further ones are only shown.
const MAX_NOTES: usize = 64;

pub(crate) struct Reporter<'a> {
    events: Events<'a>,
    last: Mutex<Option<Instant>>,
    notes: Mutex<Vec<String>>,
}

/// Progress of a step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Amounts {
    pub(crate) done: u64,
    pub(crate) total: u64,
    pub(crate) new_bytes: u64,
    pub(crate) stored_bytes: u64,
}

impl<'a> Reporter<'a> {
    pub(crate) fn new(events: Events<'a>) -> Self {
        Self { events, last: Mutex::new(None), notes: Mutex::new(Vec::new()) }
    }

    pub(crate) fn step(&self, step: impl Into<String>) {
        *self.last.lock() = None;
        (self.events)(RunEvent::Step { step: step.into() });
    }

    pub(crate) fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!("{text}");
        let mut notes = self.notes.lock();
        if notes.len() < MAX_NOTES {
            notes.push(text.clone());
        }
        drop(notes);
        (self.events)(RunEvent::Note { text });
    }

    /// Reports progress, unless the last report was a moment ago.
    pub(crate) fn progress(&self, amounts: Amounts) {
        let mut last = self.last.lock();
        if last.is_some_and(|at| at.elapsed() < INTERVAL) {
            return;
        }
        *last = Some(Instant::now());
        drop(last);
        self.progress_now(amounts);
    }

    /// Reports progress in any case: the last report of a step.
    pub(crate) fn progress_now(&self, amounts: Amounts) {
        let Amounts { done, total, new_bytes, stored_bytes } = amounts;
        (self.events)(RunEvent::Progress { done, total, new_bytes, stored_bytes });
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        self.notes.lock().clone()
    }
}
