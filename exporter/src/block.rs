//! A restore point's disk as a read-only block device.

use std::path::PathBuf;
use std::sync::Arc;

use tidemark_disk::{Block, DiskError, Extent, ExtentKind, Geometry};

use crate::error::{ExportError, Result};
use crate::exporter::Exporter;
use crate::model::PointFacts;
use crate::report::Reporter;
use crate::source::DiskSource;

impl Exporter<'_> {
    /// A restore point's disks as read-only block devices, for NBD. They stay usable after the
    /// exporter is gone; memory is bounded by each disk's cache of decoded frames.
    pub fn open_point(&self, point: &str) -> Result<Vec<(String, Arc<dyn Block>)>> {
        let reporter = Reporter::new(&|_| ());
        let source = self.open_source(point, None, &reporter)?;
        let mut disks = Vec::new();
        for disk in &source.manifest.disks {
            let geometry = geometry(&source.facts, &disk.name, disk.root.size)?;
            let stored = StoredDisk { source: source.disk(&disk.name)?, geometry };
            disks.push((disk.name.clone(), Arc::new(stored) as Arc<dyn Block>));
        }
        Ok(disks)
    }
}

/// A disk's geometry as backed up, checked: it comes from a repository.
pub(crate) fn geometry(facts: &PointFacts, disk: &str, size: u64) -> Result<Geometry> {
    let (_, logical_sector, physical_sector) =
        *facts.sectors.iter().find(|(name, ..)| name == disk).ok_or_else(|| {
            ExportError::Invalid(format!("the restore point does not give disk {disk}'s sectors"))
        })?;
    let sector = |bytes: u32| bytes == 512 || bytes == 4096;
    if !sector(logical_sector)
        || !sector(physical_sector)
        || !size.is_multiple_of(u64::from(logical_sector))
    {
        return Err(ExportError::Invalid(format!(
            "disk {disk} of the restore point has an impossible geometry: {size} bytes in sectors of {logical_sector}/{physical_sector}"
        )));
    }
    Ok(Geometry { size, logical_sector, physical_sector })
}

struct StoredDisk {
    source: DiskSource,
    geometry: Geometry,
}

impl StoredDisk {
    fn check(&self, offset: u64, len: u64) -> tidemark_disk::Result<()> {
        let sector = u64::from(self.geometry.logical_sector);
        let end = offset.checked_add(len);
        if !offset.is_multiple_of(sector)
            || !len.is_multiple_of(sector)
            || end.is_none_or(|end| end > self.geometry.size)
        {
            return Err(DiskError::OutOfRange { offset, len });
        }
        Ok(())
    }

    fn failed(&self, error: ExportError) -> DiskError {
        DiskError::Io {
            op: "read",
            path: PathBuf::from(self.source.describe()),
            source: std::io::Error::other(error),
        }
    }

    fn refuse(&self) -> DiskError {
        DiskError::ReadOnly { path: PathBuf::from(self.source.describe()) }
    }
}

impl Block for StoredDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> tidemark_disk::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.source.read_at(offset, buf).map_err(|e| self.failed(e))
    }

    fn write_at(&self, _offset: u64, _buf: &[u8]) -> tidemark_disk::Result<()> {
        Err(self.refuse())
    }

    /// Nothing is ever written, so everything is durable.
    fn flush(&self) -> tidemark_disk::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> tidemark_disk::Result<()> {
        Err(self.refuse())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _may_unmap: bool) -> tidemark_disk::Result<()> {
        Err(self.refuse())
    }

    fn extents(&self, offset: u64, len: u64) -> tidemark_disk::Result<Vec<Extent>> {
        self.check(offset, len)?;
        let end = offset + len;
        let data = self.source.data_ranges(&(offset..end)).map_err(|e| self.failed(e))?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut push = |from: u64, to: u64, kind| match extents.last_mut() {
            _ if from >= to => {}
            Some(last) if last.kind == kind => last.len += to - from,
            _ => extents.push(Extent { offset: from, len: to - from, kind }),
        };
        let mut at = offset;
        for range in data {
            let (from, to) = (range.start.clamp(at, end), range.end.clamp(at, end));
            push(at, from, ExtentKind::Hole);
            push(from, to, ExtentKind::Data);
            at = at.max(to);
        }
        push(at, end, ExtentKind::Hole);
        Ok(extents)
    }
}
