//! Making changes durable, through the log.

use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::Vhdx;
use crate::error::{DiskError, Result};
use crate::vhdx::journal::Journal;
use crate::vhdx::log::Update;
use crate::vhdx::metadata;
use crate::vhdx::pending_file::PendingFile;
use crate::vhdx::{Access, ParentLocator};

impl Vhdx {
    /// Makes completed writes and their metadata durable: at most two syncs (two more at the first new
    /// block after an open).
    pub fn flush(&self) -> Result<()> {
        let _writable = self.writable()?;
        self.flush_pending()
    }

    pub(super) fn flush_pending(&self) -> Result<()> {
        // Held throughout: a flush that finds nothing to do must still wait for the one that does it,
        // and share its failure.
        let mut journal = self.journal.lock();
        self.check_failed()?;
        let (updates, freed, area) = self.take_pending();
        if !self.unsynced.swap(false, Ordering::AcqRel) && updates.is_empty() {
            return Ok(());
        }
        self.sync_and_commit(&mut journal, &updates)?;
        if let Some(area) = area {
            let emptied = self.pending.read().file.as_ref().map_or(Ok(()), |f| f.empty(area));
            self.or_fail(emptied.map_err(self.io("write the pending file of")))?;
        }
        // Only now does no durable table entry point at these places any more.
        let mut space = self.space.lock();
        freed.into_iter().for_each(|offset| space.give_back(offset));
        Ok(())
    }

    /// Syncs payload, and the pages that the commit before put in place; then commits.
    pub(super) fn sync_and_commit(&self, journal: &mut Journal, updates: &[Update]) -> Result<()> {
        let stable = self.storage.len().map_err(self.io("examine"))?;
        let done = self.storage.sync().map_err(self.io("sync")).and_then(|()| {
            let end = self.space.lock().end();
            journal.commit(&*self.storage, updates, stable, end)
        });
        self.or_fail(done)
    }

    /// The metadata pages to log, in an order that holds should they need several log entries. Bitmaps
    /// come before the table: a block's bits are there before the table points at it (a block becomes
    /// partial only from NOT_PRESENT, in which state nobody looks at its bits). The table goes
    /// backwards: a chunk's bitmap entry follows its blocks', and no partial block may lack it.
    /// Also gives the places that become free, and the area of the pending file to be emptied.
    fn take_pending(&self) -> (Vec<Update>, Vec<u64>, Option<usize>) {
        let mut pending = self.pending.write();
        let area = pending.file.as_mut().and_then(PendingFile::turn);
        pending.released.clear();
        let bitmaps = std::mem::take(&mut pending.dirty_bitmap);
        let tables = std::mem::take(&mut pending.dirty_bat);
        let mut updates = Vec::with_capacity(bitmaps.len() + tables.len());
        for number in bitmaps {
            if let (Some(offset), Some(page)) =
                (self.bitmap_page_offset(number), pending.page(number))
            {
                updates.push(Update::Data { offset, page: Box::new(*page) });
            }
        }
        for number in tables.into_iter().rev() {
            let offset = self.regions.bat.offset + number * 4096;
            updates.push(Update::Data { offset, page: self.bat.page(number) });
        }
        (updates, std::mem::take(&mut pending.freed), area)
    }

    /// Sets a new DataWriteGuid in both headers, durable when this returns. The caller has announced
    /// it in the tracking files and, during a merge, in the child's `linkage2`.
    pub fn set_data_write_guid(&self, guid: Uuid) -> Result<()> {
        let _writable = self.writable()?;
        let mut journal = self.journal.lock();
        self.check_failed()?;
        self.or_fail(journal.set_header(&*self.storage, |h| h.data_write_guid = guid))
    }

    /// Rewrites the parent locator through the log, durable when this returns.
    pub fn set_parent(&self, locator: &ParentLocator) -> Result<()> {
        let _writable = self.writable()?;
        self.flush_pending()?;
        let updates =
            self.metadata_updates(|region| metadata::replace_locator(region, locator).map(drop))?;
        self.commit_together(&updates)?;
        self.metadata.write().parent = Some(locator.clone());
        Ok(())
    }

    /// Flushes and empties the log, so that tools which do not replay logs read the file right.
    pub fn make_clean(&self) -> Result<()> {
        let _writable = self.writable()?;
        self.clean()
    }

    pub(super) fn clean(&self) -> Result<()> {
        self.flush_pending()?;
        let mut journal = self.journal.lock();
        self.check_failed()?;
        let synced = self.storage.sync().map_err(self.io("sync"));
        self.or_fail(synced.and_then(|()| journal.close_log(&*self.storage)))?;
        match &mut self.pending.write().file {
            Some(file) => file.close().map_err(self.io("remove the pending file of")),
            None => Ok(()),
        }
    }

    /// Ends writing: clean, read-only from now on, the lock shared with other readers.
    pub fn freeze(&self) -> Result<()> {
        drop(self.writable()?);
        // Waits for writes on their way; later ones are refused.
        let mut access = self.access.write();
        self.clean()?;
        *access = Access::ReadOnly;
        match self.storage.lock(Access::ReadOnly).map_err(self.io("lock"))? {
            true => Ok(()),
            // Changing a lock lets go of it for a moment.
            false => Err(DiskError::Busy { path: self.path.clone() }),
        }
    }
}
