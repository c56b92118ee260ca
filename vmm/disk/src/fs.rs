//! The file system as VHDX files and tracking files use it. All that a crash could lose or reorder
//! goes through here, so that crash tests can put a recorder in its place.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use uuid::Uuid;

#[cfg(test)]
pub(crate) mod recorded;

/// An open file of a disk.
#[cfg(not(test))]
pub(crate) type DiskFile = std::fs::File;
#[cfg(test)]
pub(crate) use recorded::DiskFile;

/// How to open a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// For writing, too.
    pub(crate) write: bool,
    /// The mode of a file that must not exist yet; `None` for one that must.
    pub(crate) create: Option<u32>,
    /// Further flags of `open(2)`.
    pub(crate) flags: u32,
}

/// What a look through a folder finds.
pub(crate) struct Found {
    /// The name in the folder.
    pub(crate) name: OsString,
    /// A file, not a link, a folder or a device.
    pub(crate) regular: bool,
    /// Length in bytes; `None` where it cannot be examined.
    pub(crate) len: Option<u64>,
}

/// Opens or creates a file. A creation is durable after [`sync_folder`].
pub(crate) fn open(path: &Path, how: How) -> io::Result<DiskFile> {
    #[cfg(test)]
    if let Some(disk) = recorded::find(path) {
        return disk.open(path, how).map(DiskFile::Recorded);
    }
    let mut options = OpenOptions::new();
    options.read(true).write(how.write).custom_flags(how.flags.cast_signed());
    if let Some(mode) = how.create {
        options.create_new(true).mode(mode);
    }
    let file = options.open(path)?;
    #[cfg(test)]
    let file = DiskFile::Real(file);
    Ok(file)
}

/// Whether an open file is one, not a folder or a device.
pub(crate) fn is_regular(file: &DiskFile) -> io::Result<bool> {
    #[cfg(test)]
    let DiskFile::Real(file) = file else { return Ok(true) };
    Ok(file.metadata()?.is_file())
}

/// The boot of the kernel whose page cache holds the file's latest content; `None` where the kernel
/// does not say.
pub(crate) fn boot_of(file: &DiskFile) -> Option<Uuid> {
    #[cfg(test)]
    if let DiskFile::Recorded(handle) = file {
        return Some(handle.boot());
    }
    let _ = file;
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Uuid::parse_str(text.trim()).ok()
}

/// Device and inode of an open file.
pub(crate) fn number_of(file: &DiskFile) -> io::Result<(u64, u64)> {
    #[cfg(test)]
    let file = match file {
        DiskFile::Real(file) => file,
        DiskFile::Recorded(handle) => return Ok((0, handle.number())),
    };
    let meta = file.metadata()?;
    Ok((meta.dev(), meta.ino()))
}

/// Removes a file's name; durable after [`sync_folder`].
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    if let Some(disk) = recorded::find(path) {
        return disk.remove(path);
    }
    std::fs::remove_file(path)
}

/// Renames a file, in the place of one that may be there; durable after [`sync_folder`].
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    if let Some(disk) = recorded::find(from) {
        return disk.rename(from, to);
    }
    std::fs::rename(from, to)
}

/// Makes creations, renames and removals in the folder of `path` durable.
pub(crate) fn sync_folder_of(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    if let Some(disk) = recorded::find(path) {
        disk.sync_folder();
        return Ok(());
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::File::open(folder)?.sync_all()
}

/// Whether `path` names a file itself: not a link to one.
pub(crate) fn is_file(path: &Path) -> io::Result<bool> {
    #[cfg(test)]
    if let Some(disk) = recorded::find(path) {
        return disk.contains(path).then_some(true).ok_or_else(|| io::ErrorKind::NotFound.into());
    }
    Ok(std::fs::symlink_metadata(path)?.file_type().is_file())
}

/// What lies in a folder.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<Found>> {
    #[cfg(test)]
    if let Some(disk) = recorded::find_folder(folder) {
        return Ok(disk.list());
    }
    let found = |entry: std::fs::DirEntry| Found {
        regular: entry.file_type().is_ok_and(|t| t.is_file()),
        len: entry.metadata().ok().map(|m| m.len()),
        name: entry.file_name(),
    };
    std::fs::read_dir(folder)?.map(|entry| entry.map(found)).collect()
}
