//! Writing a restore point: chunks into frames into packs, pages beside them, then the index segment,
//! then the manifest.
//!
//! Memory of a run, whatever the disk's size: up to 16 MiB being hashed, a frame before and after
//! compression for each worker and two more, one pack (64 MiB and the frames in flight) being filled
//! and one being uploaded; with two workers at most 170 MiB in all, measured.

mod disk;
mod packer;

use std::sync::Arc;

use crate::error::{RepoError, Result};
use crate::manifest;
use crate::map::{MAX_SIZE, Root};
use crate::pool::block_on;
use crate::repo::Inner;
use crate::{Compression, DiskRoot, Manifest, PointFile, WriteStats};

pub use disk::DiskWriter;
use packer::Packer;

/// Writes one restore point. Dropped without [`PointWriter::commit`] it leaves only garbage that no
/// reader sees.
pub struct PointWriter {
    packer: Packer,
}

impl std::fmt::Debug for PointWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PointWriter").field("stats", &self.packer.stats).finish_non_exhaustive()
    }
}

impl PointWriter {
    pub(crate) fn new(inner: Arc<Inner>, compression: Compression) -> Self {
        let level = match compression {
            Compression::Fast => 1,
            Compression::Default => 2,
            Compression::Better => 9,
        };
        Self { packer: Packer::new(inner, level) }
    }

    /// Starts a disk of `size` bytes, empty or as a change of `base`. One disk at a time.
    pub fn disk(&mut self, size: u64, base: Option<&DiskRoot>) -> Result<DiskWriter<'_>> {
        if size > MAX_SIZE {
            return Err(RepoError::Invalid(format!(
                "a disk of {size} bytes is larger than a repository holds ({MAX_SIZE})"
            )));
        }
        let base = base.map(Root::parse).transpose()?;
        DiskWriter::new(&mut self.packer, size, base)
    }

    /// Stores a small file.
    pub fn file(&mut self, name: &str, content: &[u8]) -> Result<PointFile> {
        let mut writer = self.disk(content.len() as u64, None)?;
        writer.write(0, bytes::Bytes::copy_from_slice(content))?;
        Ok(PointFile { name: name.to_owned(), root: writer.finish()? })
    }

    /// What has been written so far.
    pub fn stats(&self) -> WriteStats {
        self.packer.stats
    }

    /// Makes everything durable, then writes the manifest; `stats` is filled in (the manifest object
    /// itself not counted, since it holds them).
    pub fn commit(mut self, mut manifest: Manifest) -> Result<Manifest> {
        let before = self.finish(&manifest)?;
        let inner = self.packer.inner();
        let object = manifest::seal_counted(&inner.keys, inner.id, &mut manifest, before)?;
        self.publish(&manifest, object)?;
        Ok(manifest)
    }

    /// Makes everything durable. A restore point whose maps are not here is refused.
    pub(crate) fn finish(&mut self, manifest: &Manifest) -> Result<WriteStats> {
        manifest::check(manifest)?;
        self.packer.flush()?;
        for root in manifest::roots(manifest) {
            let page = Root::parse(root)?.page;
            if !page.is_none() && !self.packer.is_durable(&page) {
                return Err(RepoError::Invalid(format!(
                    "disk map {page} is not in this repository; nothing was committed"
                )));
            }
        }
        Ok(self.packer.stats)
    }

    /// Writes the manifest: the commit point. Killed before, there is no restore point, only garbage;
    /// killed after, there is one, and all it needs has been durable before.
    pub(crate) fn publish(&self, manifest: &Manifest, object: Vec<u8>) -> Result<()> {
        block_on(self.packer.inner().store.create(&manifest::key(manifest)?, object.into()))
    }
}
