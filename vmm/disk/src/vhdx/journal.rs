//! Headers and log of an open file: how metadata changes become durable.
//!
//! One commit is: entry into the log, sync, pages in place. The in-place writes are made durable by the
//! next commit's first sync, which also covers the payload, so a guest flush costs two syncs however
//! many blocks it adds. Each entry names itself as tail: everything before it is in place by then.
//! What a kill leaves behind:
//!
//! | killed | state |
//! |---|---|
//! | before the entry is whole | the entry fails its checks; the entry before it, which the ring still holds, is replayed again, to no effect |
//! | after the entry is durable | the entry is replayed |
//! | before the header names the log (first commit of an open) | no log: the state before the commit |

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::layout::{HEADER_OFFSETS, Header, MIB};
use super::log::{self, Update};
use super::storage::Storage;
use crate::error::{DiskError, Result};

/// The writer's side of headers and log.
pub(crate) struct Journal {
    path: PathBuf,
    header: Header,
    /// Slot of the current header.
    slot: usize,
    /// The log GUID of this open; the header names it once the first entry is durable.
    log_guid: Uuid,
    active: bool,
    sequence: u64,
    /// Where the next entry goes.
    position: u32,
    /// The most pages that one entry takes; tests make it small.
    pub(crate) page_limit: usize,
}

impl Journal {
    pub(crate) fn new(path: &Path, header: Header, slot: usize) -> Self {
        Self {
            path: path.to_owned(),
            header,
            slot,
            log_guid: Uuid::new_v4(),
            active: false,
            sequence: 1,
            position: 0,
            page_limit: usize::MAX,
        }
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Changes the header: the older slot first, so that a kill leaves one valid header in any case;
    /// then the other, so that both are fresh. After an error it is not known which one is valid:
    /// nothing may be written any more.
    pub(crate) fn set_header(
        &mut self,
        storage: &dyn Storage,
        change: impl Fn(&mut Header),
    ) -> Result<()> {
        change(&mut self.header);
        for _ in 0..2 {
            self.header.sequence += 1;
            self.slot = 1 - self.slot;
            storage
                .write_all_at(&self.header.encode(), HEADER_OFFSETS[self.slot])
                .map_err(|e| DiskError::io("write header of", &self.path, e))?;
            storage.sync().map_err(|e| DiskError::io("sync", &self.path, e))?;
        }
        Ok(())
    }

    /// Commits metadata pages. On entry everything written before is synced (payload before metadata:
    /// an entry must not point at payload that is not there yet); on return the change is durable.
    /// `stable` is the file's size before that sync: a reader refuses a file that is shorter than an
    /// entry says, so a size that another thread has set since must not get into it. `file_end` is the
    /// size that holds all structures.
    pub(crate) fn commit(
        &mut self,
        storage: &dyn Storage,
        updates: &[Update],
        stable: u64,
        file_end: u64,
    ) -> Result<()> {
        let mut rest = updates;
        let mut first = true;
        while !rest.is_empty() {
            if !first {
                // The pages of the round before must be in place before its entry stops being the tail.
                storage.sync().map_err(|e| DiskError::io("sync", &self.path, e))?;
            }
            first = false;
            let (round, later) = rest.split_at(self.fitting(rest));
            self.commit_round(storage, round, stable / MIB * MIB, file_end)?;
            rest = later;
        }
        Ok(())
    }

    /// Whether one entry takes all of the updates, so that no kill comes between them.
    pub(crate) fn fits(&self, updates: &[Update]) -> bool {
        self.fitting(updates) >= updates.len()
    }

    /// How many of the updates one entry takes. A third of the log: the entry before the new one is
    /// then never overwritten, wherever the ring turns.
    fn fitting(&self, updates: &[Update]) -> usize {
        let limit = self.header.log_len as usize / 3;
        let mut n = updates.len().min(limit / log::SECTOR).min(self.page_limit);
        while n > 1 && log::entry_len(&updates[..n]) > limit {
            n -= 1;
        }
        n.max(1)
    }

    fn commit_round(
        &mut self,
        storage: &dyn Storage,
        updates: &[Update],
        stable: u64,
        file_end: u64,
    ) -> Result<()> {
        let io = |op| move |path: &Path, e| DiskError::io(op, path, e);
        let len = log::entry_len(updates) as u32;
        if self.position + len > self.header.log_len {
            self.position = 0;
        }
        let entry = log::encode_entry(
            self.log_guid,
            self.sequence,
            self.position,
            stable,
            file_end.next_multiple_of(MIB),
            updates,
        );
        storage
            .write_all_at(&entry, self.header.log_offset + u64::from(self.position))
            .map_err(|e| io("write log of")(&self.path, e))?;
        storage.sync().map_err(|e| io("sync")(&self.path, e))?;
        if !self.active {
            let guid = self.log_guid;
            self.set_header(storage, |h| h.log_guid = guid)?;
            self.active = true;
        }
        self.sequence += 1;
        self.position += len;
        for update in updates {
            let written = match update {
                Update::Data { offset, page } => storage.write_all_at(&page[..], *offset),
                Update::Zero { offset, len } => storage.punch(*offset, *len),
            };
            written.map_err(|e| io("write metadata of")(&self.path, e))?;
        }
        Ok(())
    }

    /// Empties the log. The caller has synced everything in place; the next commit starts a new log.
    pub(crate) fn close_log(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.active || !self.header.log_guid.is_nil() {
            self.set_header(storage, |h| h.log_guid = Uuid::nil())?;
            self.active = false;
            self.log_guid = Uuid::new_v4();
            self.position = 0;
            self.sequence = 1;
        }
        Ok(())
    }
}
