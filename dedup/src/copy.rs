//! Copying restore points between repositories. Their keys differ, so chunks are decrypted, verified
//! and written anew; what both have in common through an earlier restore point is neither read nor
//! compared chunk by chunk.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use crate::diff::DiffWalker;
use crate::error::{RepoError, Result};
use crate::fetch::Pages;
use crate::manifest;
use crate::map::{Root, Walker, chunk_count};
use crate::reader::{Piece, Stream};
use crate::repo::Repository;
use crate::writer::{DiskWriter, PointWriter};
use crate::{CHUNK, Compression, DiskRoot, Manifest, WriteStats};

/// The newest restore point that both repositories have: as the source has it, as we have it.
struct Common {
    source: Manifest,
    here: Manifest,
}

impl Common {
    /// The maps of a disk on both sides, if they are of the same disk.
    fn disk(&self, name: &str) -> Option<(&DiskRoot, &DiskRoot)> {
        let find =
            |manifest: &'_ Manifest| manifest.disks.iter().position(|disk| disk.name == name);
        let source = &self.source.disks[find(&self.source)?].root;
        let here = &self.here.disks[find(&self.here)?].root;
        (source.size == here.size).then_some((source, here))
    }
}

impl Repository {
    /// Copies a restore point from `source`: only chunks that this repository does not have. Does
    /// nothing if the restore point is here already.
    pub fn copy_from(
        &self,
        source: &Repository,
        point: Uuid,
        progress: &(dyn Fn(u64, u64) + Sync),
        cancel: &AtomicBool,
    ) -> Result<WriteStats> {
        let manifest = source.point(point)?;
        if self.has(&manifest)? {
            return Ok(WriteStats::default());
        }
        let common = self.common(source, &manifest)?;
        source.inner.refresh()?;
        let mut writer = self.begin(Compression::Default)?;
        let mut copied = manifest.clone();
        let total = manifest::roots(&manifest).map(|root| root.size).sum();
        let mut done = 0;
        let disks = copied.disks.iter_mut().map(|disk| {
            let base = common.as_ref().and_then(|common| common.disk(&disk.name));
            (&mut disk.root, base)
        });
        let files = copied.files.iter_mut().map(|file| (&mut file.root, None));
        for (root, base) in disks.chain(files) {
            let task = MapCopy { source, root, base, cancel };
            *root = task.run(&mut writer, &|at| progress(done + at, total))?;
            done += root.size;
        }
        if cancel.load(Ordering::Relaxed) {
            return Err(RepoError::Cancelled);
        }
        let mut stats = writer.finish(&copied)?;
        // With the statistics of the first writing: that is what they say.
        let object = manifest::seal(&self.inner.keys, self.inner.id, &copied)?;
        let len = object.len() as u64;
        match writer.publish(&copied, object) {
            Ok(()) => {
                stats.stored_bytes += len;
                stats.objects += 1;
            }
            // Another copy of the same restore point was faster.
            Err(RepoError::AlreadyExists { .. }) if self.point(point).is_ok() => {}
            Err(e) => return Err(e),
        }
        progress(total, total);
        Ok(stats)
    }

    /// Whether a readable manifest of this restore point is here.
    fn has(&self, wanted: &Manifest) -> Result<bool> {
        let key = manifest::key(wanted)?;
        let listed = self.inner.list_points(Some(wanted.group))?;
        if !listed.iter().any(|object| object.key == key) {
            return Ok(false);
        }
        // A damaged one is an error: its name is taken, and it must be dealt with first.
        self.point(wanted.point).map(|_| true)
    }

    fn common(&self, source: &Repository, wanted: &Manifest) -> Result<Option<Common>> {
        let here = self.inner.list_points(Some(wanted.group))?;
        let here: HashSet<String> = here.into_iter().map(|object| object.key).collect();
        let mut both = source.inner.list_points(Some(wanted.group))?;
        both.retain(|object| here.contains(&object.key));
        // The nearest before the wanted one, else any: later ones also share most chunks.
        let key = manifest::key(wanted)?;
        both.sort_by(|a, b| (a.key < key, &a.key).cmp(&(b.key < key, &b.key)));
        for object in both.iter().rev().take(3) {
            let Some((_, id)) = manifest::parse_key(&object.key) else { continue };
            if let (Ok(source), Ok(here)) = (source.point(id), self.point(id)) {
                return Ok(Some(Common { source, here }));
            }
        }
        Ok(None)
    }
}

/// One disk or file to be copied.
struct MapCopy<'a> {
    source: &'a Repository,
    root: &'a DiskRoot,
    base: Option<(&'a DiskRoot, &'a DiskRoot)>,
    cancel: &'a AtomicBool,
}

impl MapCopy<'_> {
    fn run(&self, writer: &mut PointWriter, progress: &dyn Fn(u64)) -> Result<DiskRoot> {
        let root = Root::parse(self.root)?;
        let inner = &self.source.inner;
        let mut disk = writer.disk(root.size, self.base.map(|(_, here)| here))?;
        let mut stream = match self.base {
            Some((old, _)) => {
                let mut pages = Pages::new(inner.clone());
                let spans = DiffWalker::new(&Root::parse(old)?, &root, &mut pages);
                Stream::new(inner.clone(), spans)
            }
            None => Stream::new(inner.clone(), Walker::new(&root, 0..chunk_count(root.size))),
        };
        stream.run(self.cancel, &mut |piece| {
            progress(piece.chunks.start * CHUNK);
            put(&mut disk, root.size, piece)
        })?;
        disk.finish()
    }
}

fn put(disk: &mut DiskWriter<'_>, size: u64, piece: Piece) -> Result<()> {
    let (start, end) = (piece.chunks.start * CHUNK, (piece.chunks.end * CHUNK).min(size));
    let data = piece.data?;
    if data.is_empty() {
        return disk.zero(start..end);
    }
    disk.write(start, data.slice(..(end - start) as usize))
}
