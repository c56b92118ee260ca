//! Getting blobs out of packs: by range reads, neighbours together, always verified.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::cache::FrameKey;
use crate::error::{RepoError, Result};
use crate::frame::Decoded;
use crate::id::BlobId;
use crate::index::Location;
use crate::map::{Page, PageSource};
use crate::object::{Sealer, damaged};
use crate::pack::PackInfo;
use crate::pool::{self, Job, block_on};
use crate::repo::Inner;

/// Frames with a gap up to this between them are read in one request: the gap costs less than
/// another request.
const MAX_GAP: u32 = 256 * 1024;
/// Most bytes of one request.
const MAX_READ: u32 = 4 << 20;

/// What to do when a store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Try again, as long as the store's policy says.
    Retry,
    /// Say so after the first attempt: there is another copy.
    Once,
}

/// A frame that was fetched, or why not.
pub(crate) type Fetched = Result<Arc<Decoded>>;

/// One request on its way.
pub(crate) struct Request {
    places: Vec<Location>,
    task: JoinHandle<Result<Vec<Job<Fetched>>>>,
}

impl Drop for Request {
    fn drop(&mut self) {
        // A reader that stops early does not go on loading.
        self.task.abort();
    }
}

impl Inner {
    /// Begins to read frames, each given once. They arrive in the order of their packs.
    pub(crate) fn request(
        self: &Arc<Self>,
        mut places: Vec<Location>,
        patience: Patience,
    ) -> Vec<Request> {
        places.sort_by_key(Location::frame_key);
        let mut requests = Vec::new();
        let mut group: Vec<Location> = Vec::new();
        for place in places {
            if group.first().is_some_and(|first| !joins(first, &group[group.len() - 1], &place)) {
                requests.push(self.request_group(std::mem::take(&mut group), patience));
            }
            group.push(place);
        }
        if !group.is_empty() {
            requests.push(self.request_group(group, patience));
        }
        requests
    }

    fn request_group(self: &Arc<Self>, places: Vec<Location>, patience: Patience) -> Request {
        let (inner, wanted) = (self.clone(), places.clone());
        let task = pool::runtime().spawn(async move {
            let (first, last) = (wanted[0].info(), wanted[wanted.len() - 1].info());
            let pack = wanted[0].pack.clone();
            let start = u64::from(first.offset);
            let end = u64::from(last.offset) + u64::from(last.stored);
            let bytes = inner.read_pack(&pack, start..end, patience).await?;
            let sealer = Arc::new(Sealer::new(&inner.keys, &pack.header)?);
            Ok(wanted
                .into_iter()
                .map(|place| {
                    let info = *place.info();
                    let at = (u64::from(info.offset) - start) as usize;
                    let stored = bytes.slice(at..at + info.stored as usize);
                    let (inner, sealer) = (inner.clone(), sealer.clone());
                    pool::spawn(move || inner.decode(&place, &sealer, &stored))
                })
                .collect())
        });
        Request { places, task }
    }

    async fn read_pack(
        &self,
        pack: &PackInfo,
        range: std::ops::Range<u64>,
        patience: Patience,
    ) -> Result<Bytes> {
        let key = pack.key();
        let len = range.end - range.start;
        let read = match patience {
            Patience::Retry => self.store.get_range(&key, range).await,
            Patience::Once => self.store.get_range_once(&key, range).await,
        };
        let bytes = read.map_err(|e| match e {
            RepoError::Missing { .. } => damaged(&key, "the pack is missing"),
            other => other,
        })?;
        if bytes.len() as u64 != len {
            return Err(damaged(&key, "the pack is cut short"));
        }
        Ok(bytes)
    }

    fn decode(&self, place: &Location, sealer: &Sealer, stored: &[u8]) -> Fetched {
        let decoded = Decoded::decode(&self.keys, sealer, place.frame, place.info(), stored)
            .map_err(|what| {
                let at = place.info().offset;
                damaged(&place.pack.key(), format!("frame {} at byte {at}: {what}", place.frame))
            })?;
        Ok(Arc::new(decoded))
    }

    /// Waits for requests. What arrives intact also goes into the cache.
    pub(crate) fn collect(
        &self,
        requests: Vec<Request>,
        into: &mut HashMap<FrameKey, Fetched>,
    ) -> Result<()> {
        for mut request in requests {
            let answer = pool::joined(block_on(&mut request.task));
            let places = std::mem::take(&mut request.places);
            match answer {
                Ok(jobs) => {
                    for (place, job) in places.iter().zip(jobs) {
                        let frame = job.wait()?;
                        if let Ok(frame) = &frame {
                            self.frames.put(place, frame);
                        }
                        into.insert(place.frame_key(), frame);
                    }
                }
                Err(RepoError::Damaged { key, what }) => {
                    for place in &places {
                        into.insert(place.frame_key(), Err(damaged(&key, what.clone())));
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// One blob, from any pack that has it intact. `refreshes` bounds how often an unknown id makes
    /// us look for what other writers have added.
    pub(crate) fn blob(
        self: &Arc<Self>,
        id: &BlobId,
        refreshes: &mut u32,
        patience: Patience,
    ) -> Result<Bytes> {
        let mut places = self.index.read().locate(id);
        while places.is_empty() && *refreshes > 0 {
            *refreshes -= 1;
            self.refresh()?;
            places = self.index.read().locate(id);
            if places.is_empty() && *refreshes == 0 {
                self.adopt_unindexed()?;
                places = self.index.read().locate(id);
            }
        }
        let mut failure = None;
        for place in places {
            match self.blob_at(&place, id, patience) {
                Ok(blob) => return Ok(blob),
                Err(e) => failure = failure.or(Some(e)),
            }
        }
        Err(failure.unwrap_or_else(|| damaged(&format!("blob {id}"), "it is in no pack")))
    }

    fn blob_at(
        self: &Arc<Self>,
        place: &Location,
        id: &BlobId,
        patience: Patience,
    ) -> Result<Bytes> {
        let frame = match self.frames.get(place) {
            Some(frame) => frame,
            None => {
                let mut fetched = HashMap::new();
                let requests = self.request(vec![place.clone()], patience);
                self.collect(requests, &mut fetched)?;
                fetched
                    .remove(&place.frame_key())
                    .unwrap_or_else(|| Err(damaged(&place.pack.key(), "nothing was read")))?
            }
        };
        frame.blob(place.position, id).ok_or_else(|| {
            let (frame, position) = (place.frame, place.position);
            damaged(&place.pack.key(), format!("frame {frame}, blob {position} is not {id}"))
        })
    }
}

/// Whether a frame is read together with the group before it.
fn joins(first: &Location, last: &Location, next: &Location) -> bool {
    let end = last.info().offset + last.info().stored;
    let next_end = next.info().offset + next.info().stored;
    first.pack_number == next.pack_number
        && next.info().offset.saturating_sub(end) <= MAX_GAP
        && next_end - first.info().offset <= MAX_READ
}

/// Reads pages of a repository.
pub(crate) struct Pages {
    inner: Arc<Inner>,
    refreshes: u32,
    pub(crate) patience: Patience,
}

impl Pages {
    pub(crate) fn new(inner: Arc<Inner>) -> Self {
        Self { inner, refreshes: 2, patience: Patience::Retry }
    }

    pub(crate) fn with(inner: Arc<Inner>, patience: Patience) -> Self {
        Self { patience, ..Self::new(inner) }
    }

    /// A chunk's content, 64 KiB.
    pub(crate) fn chunk(&mut self, id: &BlobId) -> Result<Bytes> {
        self.inner.blob(id, &mut self.refreshes, self.patience)
    }
}

impl PageSource for Pages {
    fn page(&mut self, id: &BlobId, level: u8) -> Result<Arc<Page>> {
        if let Some(page) = self.inner.pages.get(id).filter(|page| page.level == level) {
            return Ok(page);
        }
        let bytes = self.inner.blob(id, &mut self.refreshes, self.patience)?;
        let page = Page::decode(&bytes)
            .filter(|page| page.level == level)
            .map(Arc::new)
            .ok_or_else(|| damaged(&format!("map page {id}"), "malformed"))?;
        self.inner.pages.put(*id, &page);
        Ok(page)
    }
}
