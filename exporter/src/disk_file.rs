//! Restores a disk to a file.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use tempfile::TempPath;
use tidemark_disk::Geometry;
use tidemark_disk::vhdx::{Access, CreateOptions, Vhdx};
use uuid::Uuid;

use crate::block::geometry;
use crate::error::{ExportError, Result, check};
use crate::exporter::Exporter;
use crate::model::{DiskFormat, Events};
use crate::report::Reporter;
use crate::restore::write_disk;
use crate::target::sync_dir;

/// Block size of restored VHDX files: Hyper-V's own.
const VHDX_BLOCK: u32 = 32 * 1024 * 1024;

impl Exporter<'_> {
    /// Restores a disk to a file. `out` must not exist; it appears when it is complete and durable.
    pub fn restore_disk(
        &self,
        point: &str,
        disk: &str,
        out: &Path,
        format: DiskFormat,
        events: Events<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let reporter = Reporter::new(events);
        if out.symlink_metadata().is_ok() {
            return Err(exists(out));
        }
        let source = self.open_source(point, None, &reporter)?;
        let disk_source = source.disk(disk)?;
        let geometry = geometry(&source.facts, disk, disk_source.size)?;
        let dir = match out.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        };
        let file_name = out.file_name().ok_or_else(|| {
            ExportError::Invalid(format!("{} is not the path of a file", out.display()))
        })?;
        // A kill leaves this file behind, clearly unfinished; every other way out removes it.
        let name = format!(".{}.{}.partial", file_name.to_string_lossy(), Uuid::new_v4().simple());
        let partial = TempPath::try_from_path(dir.join(name))
            .map_err(ExportError::io("create a file in", &dir))?;
        let file = Output::create(&partial, format, &geometry)?;
        reporter.step(format!("restore {disk}"));
        write_disk(&disk_source, &reporter, cancel, &|offset, data| file.write(offset, data))?;
        check(cancel)?;
        file.finish(&partial)?;
        partial.persist_noclobber(out).map_err(|e| match e.error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(out),
            _ => ExportError::Io { op: "create", path: out.to_owned(), source: e.error },
        })?;
        sync_dir(&dir)
    }
}

fn exists(out: &Path) -> ExportError {
    ExportError::Invalid(format!("{} exists already and is not overwritten", out.display()))
}

/// A new, empty file that a disk is written into.
enum Output {
    Raw(File, PathBuf),
    Vhdx(Box<Vhdx>),
}

impl Output {
    fn create(path: &Path, format: DiskFormat, geometry: &Geometry) -> Result<Self> {
        match format {
            DiskFormat::Raw => {
                let file = File::create_new(path).map_err(ExportError::io("create", path))?;
                file.set_len(geometry.size).map_err(ExportError::io("size", path))?;
                Ok(Self::Raw(file, path.to_owned()))
            }
            DiskFormat::Vhdx => {
                Vhdx::create(
                    path,
                    &CreateOptions {
                        size: geometry.size,
                        block_size: VHDX_BLOCK,
                        logical_sector: geometry.logical_sector,
                        physical_sector: geometry.physical_sector,
                        fixed: false,
                        disk_id: None,
                        parent: None,
                    },
                )?;
                Ok(Self::Vhdx(Box::new(Vhdx::open(path, Access::ReadWrite)?)))
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        match self {
            Self::Raw(file, path) => {
                file.write_all_at(data, offset).map_err(ExportError::io("write", path))
            }
            Self::Vhdx(vhdx) => Ok(vhdx.write_at(offset, data)?),
        }
    }

    /// Makes everything durable and closes the file.
    fn finish(self, path: &Path) -> Result<()> {
        match self {
            Self::Raw(file, path) => file.sync_all().map_err(ExportError::io("sync", &path)),
            Self::Vhdx(vhdx) => {
                vhdx.flush()?;
                vhdx.make_clean()?;
                File::open(path)
                    .and_then(|file| file.sync_all())
                    .map_err(ExportError::io("sync", path))
            }
        }
    }
}
