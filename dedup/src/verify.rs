//! Checking restore points, and counting what there is.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use serde::Serialize;
use uuid::Uuid;

use crate::diff::Spans;
use crate::error::{RepoError, Result};
use crate::fetch::Pages;
use crate::frame::Content;
use crate::id::BlobId;
use crate::map::{FANOUT, PageSource, Root, Walker, chunk_count};
use crate::object::{HASH_LEN, damaged};
use crate::pack::PackInfo;
use crate::pool::block_on;
use crate::reader::{Piece, Stream};
use crate::repo::{Inner, PARALLEL, Repository};
use crate::store::{ObjectInfo, Store};
use crate::{CHUNK, DiskRoot, Manifest, manifest};

/// More damage than this is counted and not listed.
const MAX_LINES: usize = 1000;

/// Result of a verification.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VerifyReport {
    /// Chunks referenced.
    pub chunks: u64,
    /// Bytes of disk content checked.
    pub bytes: u64,
    /// What is damaged: object, disk and offset where known.
    pub damage: Vec<String>,
}

/// Sizes and counts.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RepoStats {
    /// Restore points.
    pub points: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of all objects.
    pub stored_bytes: u64,
    /// Distinct chunks.
    pub chunks: u64,
    /// Bytes of distinct chunks before compression.
    pub chunk_bytes: u64,
    /// Bytes of all restore points' disks, as if each were stored whole (zeros excluded).
    pub logical_bytes: u64,
}

impl Repository {
    /// Reads every page and, with `read_data`, every chunk of a restore point. Without it, every chunk
    /// must be in the index and its pack in the store, of the right length.
    ///
    /// Damage is in the report; an error means that the verification itself could not be done.
    pub fn verify(
        &self,
        point: Uuid,
        read_data: bool,
        progress: &(dyn Fn(u64, u64) + Sync),
        cancel: &AtomicBool,
    ) -> Result<VerifyReport> {
        let manifest = match self.point(point) {
            Err(e @ RepoError::Damaged { .. }) => {
                return Ok(VerifyReport { damage: vec![e.to_string()], ..Default::default() });
            }
            other => other?,
        };
        let inner = &self.inner;
        // What is stored counts, not what was read before.
        inner.frames.clear();
        inner.pages.clear();
        inner.refresh()?;
        let mut check = Check {
            inner,
            packs: inner.list_packs()?.into_iter().collect(),
            used: HashMap::new(),
            adopted: false,
            total: manifest::roots(&manifest).map(|root| root.size).sum(),
            done: 0,
            progress,
            cancel,
            report: VerifyReport::default(),
            unlisted: 0,
        };
        for (name, root) in named_roots(&manifest) {
            check.map(&name, root, read_data)?;
        }
        if read_data {
            check.pack_ends()?;
            check.segments()?;
        }
        progress(check.total, check.total);
        if check.unlisted > 0 {
            check.report.damage.push(format!("and {} more", check.unlisted));
        }
        Ok(check.report)
    }

    /// Sizes and counts of what the repository holds.
    pub fn stats(&self) -> Result<RepoStats> {
        self.inner.refresh()?;
        let objects = block_on(self.inner.store.list(""))?;
        let manifests = self.points(None)?;
        let mut stats = RepoStats {
            points: manifests.len() as u64,
            packs: objects.iter().filter(|o| o.key.starts_with("packs/")).count() as u64,
            stored_bytes: objects.iter().map(|o| o.size).sum(),
            chunks: self.inner.index.read().distinct_chunks(),
            ..Default::default()
        };
        stats.chunk_bytes = stats.chunks * CHUNK;
        let (mut pages, mut known) = (Pages::new(self.inner.clone()), HashMap::new());
        // A damaged restore point cannot be counted; listing and verification report it.
        for manifest in manifests.iter().flatten() {
            for root in manifest::roots(manifest) {
                let root = Root::parse(root)?;
                match count(&root.page, root.levels, &mut pages, &mut known) {
                    Ok(chunks) => stats.logical_bytes += (chunks * CHUNK).min(root.size),
                    Err(RepoError::Damaged { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(stats)
    }
}

/// Chunks below a page; pages that maps share are counted once and remembered.
fn count(
    id: &BlobId,
    level: u8,
    pages: &mut Pages,
    known: &mut HashMap<BlobId, u64>,
) -> Result<u64> {
    if id.is_none() || level == 0 {
        return Ok(u64::from(!id.is_none()));
    }
    if let Some(count) = known.get(id) {
        return Ok(*count);
    }
    let page = pages.page(id, level)?;
    let mut sum = 0;
    for slot in &page.slots {
        sum += count(slot, level - 1, pages, known)?;
    }
    known.insert(*id, sum);
    Ok(sum)
}

fn named_roots(manifest: &Manifest) -> impl Iterator<Item = (String, &DiskRoot)> {
    let disks = manifest.disks.iter().map(|d| (format!("disk {}", d.name), &d.root));
    disks.chain(manifest.files.iter().map(|f| (format!("file {}", f.name), &f.root)))
}

/// A verification under way.
struct Check<'a> {
    inner: &'a Arc<Inner>,
    /// Packs in the store and their lengths.
    packs: HashMap<[u8; 16], ObjectInfo>,
    /// Packs that hold the restore point's chunks.
    used: HashMap<[u8; 16], Arc<PackInfo>>,
    /// Packs that no segment describes have been looked at.
    adopted: bool,
    total: u64,
    done: u64,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    cancel: &'a AtomicBool,
    report: VerifyReport,
    unlisted: u64,
}

impl Check<'_> {
    fn damage(&mut self, line: String) {
        if self.report.damage.len() < MAX_LINES {
            self.report.damage.push(line);
        } else {
            self.unlisted += 1;
        }
    }

    fn map(&mut self, name: &str, root: &DiskRoot, read_data: bool) -> Result<()> {
        let root = Root::parse(root)?;
        let walk = || Walker::new(&root, 0..chunk_count(root.size));
        let before = self.done;
        self.structure(name, walk(), read_data)?;
        if read_data {
            let mut stream = Stream::new(self.inner.clone(), walk());
            let cancel = self.cancel;
            stream.run(cancel, &mut |piece| {
                (self.progress)(before + piece.chunks.start * CHUNK, self.total);
                self.piece(name, piece);
                Ok(())
            })?;
        }
        self.done = before + root.size;
        (self.progress)(self.done, self.total);
        Ok(())
    }

    fn piece(&mut self, name: &str, piece: Piece) {
        match piece.data {
            Ok(data) => {
                self.report.chunks += piece.chunks.end - piece.chunks.start;
                self.report.bytes += data.len() as u64;
            }
            Err(e) => {
                let bytes = piece.chunks.start * CHUNK..piece.chunks.end * CHUNK;
                self.damage(format!("{name}, bytes {}..{}: {e}", bytes.start, bytes.end));
            }
        }
    }

    /// Every page is read; chunks are looked up, and unless they are read later, that is all.
    fn structure(&mut self, name: &str, mut walker: Walker, read_later: bool) -> Result<()> {
        let mut pages = Pages::new(self.inner.clone());
        let before = self.done;
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(RepoError::Cancelled);
            }
            let mut failed = None;
            let spans = match walker.next(&mut pages, &mut failed) {
                Ok(Some(spans)) => spans,
                Ok(None) => return Ok(()),
                // The reading will come upon it again.
                Err(RepoError::Damaged { .. }) if read_later => continue,
                Err(e @ RepoError::Damaged { .. }) => {
                    self.piece(name, Piece { chunks: failed.unwrap_or(0..0), data: Err(e) });
                    continue;
                }
                Err(e) => return Err(e),
            };
            for span in spans {
                let stored = self.stored(&span.id)?;
                if read_later {
                    continue;
                }
                if span.first.is_multiple_of(FANOUT) {
                    (self.progress)(before + span.first * CHUNK, self.total);
                }
                self.report.chunks += 1;
                self.report.bytes += CHUNK;
                if let Err(e) = stored {
                    let chunks = span.first..span.first + 1;
                    self.piece(name, Piece { chunks, data: Err(e) });
                }
            }
        }
    }

    /// Whether some pack that holds the chunk is in the store, whole.
    fn stored(&mut self, id: &BlobId) -> Result<Result<()>> {
        let mut places = self.inner.index.read().locate(id);
        if places.is_empty() && !self.adopted {
            self.adopted = true;
            self.inner.adopt_unindexed()?;
            places = self.inner.index.read().locate(id);
        }
        let mut failure = damaged(&format!("blob {id}"), "it is in no pack");
        for place in places {
            let pack = &place.pack;
            self.used.entry(pack.header.object).or_insert_with(|| pack.clone());
            failure = match self.packs.get(&pack.header.object) {
                _ if place.info().content != Content::Chunks => {
                    damaged(&pack.key(), format!("{id} is not a chunk"))
                }
                Some(object) if object.size == pack.len => return Ok(Ok(())),
                Some(ObjectInfo { size, .. }) => {
                    let expected = pack.len;
                    damaged(&pack.key(), format!("{size} bytes long instead of {expected}"))
                }
                None => damaged(&pack.key(), "the pack is missing"),
            };
        }
        Ok(Err(failure))
    }

    /// Header and own index of the packs: redundant as long as the segments are there.
    fn pack_ends(&mut self) -> Result<()> {
        let used = std::mem::take(&mut self.used);
        let known = used.iter().filter_map(|(id, pack)| Some((self.packs.get(id)?.clone(), pack)));
        let inner = self.inner;
        let results: Vec<Result<()>> = block_on(
            futures::stream::iter(known)
                .map(|(object, pack)| async move { inner.check_pack_ends(&object, pack).await })
                .buffered(PARALLEL)
                .collect(),
        );
        results.into_iter().try_for_each(|result| self.note(result))
    }

    /// Index segments: redundant, since packs hold their own index, but worth knowing about.
    fn segments(&mut self) -> Result<()> {
        for object in self.inner.list_segments()? {
            let checked = block_on(self.inner.check_segment(&object));
            self.note(checked)?;
        }
        Ok(())
    }

    /// Damage is noted; an object that has gone meanwhile is none.
    fn note(&mut self, result: Result<()>) -> Result<()> {
        match result {
            Err(e @ RepoError::Damaged { .. }) => self.damage(e.to_string()),
            Err(RepoError::Missing { .. }) => {}
            other => return other,
        }
        Ok(())
    }
}

/// Reads every object of a repository whole and checks the hash at its end. Needs no key: an off-site
/// copy can be scrubbed by someone who must not read it.
pub fn scrub(
    store: &dyn Store,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &AtomicBool,
) -> Result<VerifyReport> {
    let ours = ["config", "keys/", "packs/", "index/", "points/"];
    let mut objects = block_on(store.list(""))?;
    objects.retain(|object| ours.iter().any(|prefix| object.key.starts_with(prefix)));
    let total = objects.iter().map(|object| object.size).sum();
    let mut report = VerifyReport::default();
    for object in objects {
        match scrub_object(store, &object, cancel) {
            Ok(()) | Err(RepoError::Missing { .. }) => {}
            Err(e @ RepoError::Damaged { .. }) => report.damage.push(e.to_string()),
            Err(e) => return Err(e),
        }
        report.bytes += object.size;
        progress(report.bytes, total);
    }
    Ok(report)
}

fn scrub_object(store: &dyn Store, object: &ObjectInfo, cancel: &AtomicBool) -> Result<()> {
    const STEP: u64 = 8 << 20;
    let key = &object.key;
    let body = object
        .size
        .checked_sub(HASH_LEN as u64)
        .ok_or_else(|| damaged(key, "the object is cut short"))?;
    let mut hasher = blake3::Hasher::new();
    for start in (0..body).step_by(STEP as usize) {
        if cancel.load(Ordering::Relaxed) {
            return Err(RepoError::Cancelled);
        }
        hasher.update(&block_on(store.get_range(key, start..(start + STEP).min(body)))?);
    }
    let hash = block_on(store.get_range(key, body..object.size))?;
    if hasher.finalize().as_bytes()[..] != hash[..] {
        return Err(damaged(key, "the content does not match its hash"));
    }
    Ok(())
}
