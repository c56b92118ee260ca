//! Importing a disk image: raw and VHDX by ourselves, other formats through `qemu-img`. What an image
//! is, its first bytes say; its name only has to agree.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use tidemark_disk::chain::Chain;
use tidemark_disk::vhdx::Access;
use tidemark_disk::{Block, BlockRange, DiskError, Extent, ExtentKind, Geometry};

use crate::create::{check_size, make_disk};
use crate::error::{EngineError, Result};

/// How much is copied at once.
const STEP: usize = 1 << 20;
/// Zeros are looked for, and left out, in pieces of this size.
const PIECE: usize = 64 * 1024;
/// More than `qemu-img info` has to say of any image.
const MAX_INFO: u64 = 1 << 20;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Raw,
    Vhdx,
    /// Something that `qemu-img` reads, by its name there.
    Other(&'static str),
}

/// Whether an image can be imported, as far as can be seen at once.
pub(crate) fn check(source: &Path) -> Result<()> {
    match sniff(source)? {
        Format::Raw => RawFile::open(source).map(|_| ()),
        Format::Vhdx => Ok(Chain::open(source, Access::ReadOnly).map(|_| ())?),
        Format::Other(format) => check_foreign(source, format),
    }
}

/// Copies an image into a new disk at `target`, with an id of its own.
pub(crate) fn import(source: &Path, target: &Path, progress: &dyn Fn(u64, u64)) -> Result<()> {
    match sniff(source)? {
        Format::Raw => copy_in(&RawFile::open(source)?, target, progress),
        Format::Vhdx => copy_in(&Chain::open(source, Access::ReadOnly)?, target, progress),
        Format::Other(format) => {
            let raw = target.with_extension("import");
            let converted = convert(source, format, &raw, progress)
                .and_then(|()| copy_in(&RawFile::open(&raw)?, target, progress));
            let removed = crate::store::remove_file(&raw);
            converted.and(removed.map(|_| ()))
        }
    }
}

/// Tells the format by its magic.
fn sniff(path: &Path) -> Result<Format> {
    let file = File::open(path).map_err(|e| EngineError::io("open", path, e))?;
    let len = file.metadata().map_err(|e| EngineError::io("look at", path, e))?.len();
    let mut head = Vec::new();
    (&file).take(512).read_to_end(&mut head).map_err(|e| EngineError::io("read", path, e))?;
    let mut tail = [0; 8];
    if len >= 512 {
        file.read_exact_at(&mut tail, len - 512).map_err(|e| EngineError::io("read", path, e))?;
    }
    let format = format_of(&head, &tail);
    let named = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    let claimed = match named.as_deref() {
        Some("vhdx" | "avhdx") => Some(Format::Vhdx),
        Some("qcow2") => Some(Format::Other("qcow2")),
        Some("vmdk") => Some(Format::Other("vmdk")),
        Some("vdi") => Some(Format::Other("vdi")),
        _ => None,
    };
    match claimed {
        Some(claimed) if format == Format::Raw => Err(EngineError::Invalid(format!(
            "{} is named like {claimed:?} but does not begin like one: damaged, or cut short?",
            path.display()
        ))),
        _ => Ok(format),
    }
}

fn format_of(head: &[u8], tail: &[u8]) -> Format {
    if head.starts_with(b"vhdxfile") {
        Format::Vhdx
    } else if head.starts_with(b"QFI\xfb") {
        Format::Other("qcow2")
    } else if head.starts_with(b"KDMV")
        || head.starts_with(b"COWD")
        || head.starts_with(b"# Disk DescriptorFile")
    {
        Format::Other("vmdk")
    } else if head.starts_with(b"QED\0") {
        Format::Other("qed")
    } else if head.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) {
        Format::Other("vdi")
    } else if head.starts_with(b"conectix") || tail == b"conectix" {
        Format::Other("vpc")
    } else {
        Format::Raw
    }
}

/// An image that names other files could make us read what its maker may not: refused.
fn check_foreign(source: &Path, format: &str) -> Result<()> {
    let output =
        qemu_img(source, Command::new("qemu-img").args(["info", "--output=json", "-f", format]))?;
    let info: serde_json::Value = serde_json::from_slice(&output)
        .map_err(|e| EngineError::Invalid(format!("{}: qemu-img info: {e}", source.display())))?;
    let specific = &info["format-specific"]["data"];
    let backing = info["backing-filename"].as_str().or_else(|| specific["data-file"].as_str());
    if let Some(other) = backing {
        return Err(EngineError::Invalid(format!(
            "{} needs another file, {other}; make it self-contained first: \
             qemu-img convert -O qcow2 {} NEW",
            source.display(),
            source.display()
        )));
    }
    check_size(info["virtual-size"].as_u64().unwrap_or(0))?;
    check_sound(source, format)
}

/// `qemu-img convert` reads what a cut-off image lacks as zeros: its check notices.
fn check_sound(source: &Path, format: &str) -> Result<()> {
    let output = Command::new("qemu-img")
        .args(["check", "-f", format])
        .arg(source)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| EngineError::io("run (package qemu-utils)", Path::new("qemu-img"), e))?;
    // 3: clusters that nothing uses, harmless; 63: the format cannot be checked.
    if matches!(output.status.code(), Some(0 | 3 | 63)) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().next().unwrap_or("qemu-img check finds errors");
    Err(EngineError::Invalid(format!("{} is damaged: {first}", source.display())))
}

/// Runs a `qemu-img` command on `source` and gives its output.
fn qemu_img(source: &Path, command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .arg(source)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| EngineError::io("run (package qemu-utils)", Path::new("qemu-img"), e))?;
    if output.status.success() && output.stdout.len() as u64 <= MAX_INFO {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(EngineError::Invalid(format!("{} cannot be read: {}", source.display(), said.trim())))
}

/// Converts an image to a sparse raw file, which the caller removes.
fn convert(source: &Path, format: &str, raw: &Path, progress: &dyn Fn(u64, u64)) -> Result<()> {
    check_foreign(source, format)?;
    let run = |e| EngineError::io("run (package qemu-utils)", Path::new("qemu-img"), e);
    let mut child = Command::new("qemu-img")
        .args(["convert", "-p", "-S", "64k", "-f", format, "-O", "raw"])
        .args([source, raw])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(run)?;
    if let Some(stdout) = child.stdout.take() {
        // "    (12.34/100%)", each ended by a carriage return.
        for part in BufReader::new(stdout).split(b'\r').map_while(std::io::Result::ok) {
            if let Some(percent) = percent(&String::from_utf8_lossy(&part)) {
                progress(percent, 200);
            }
        }
    }
    let output = child.wait_with_output().map_err(run)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(EngineError::Invalid(format!("{} cannot be converted: {}", source.display(), said.trim())))
}

fn percent(text: &str) -> Option<u64> {
    let number = text.trim().strip_prefix('(')?.split('/').next()?;
    number.split('.').next()?.parse().ok().filter(|p| *p <= 100)
}

/// Copies a disk's content into a new one, leaving zeros out.
fn copy_in(source: &dyn Block, target: &Path, progress: &dyn Fn(u64, u64)) -> Result<()> {
    let geometry = source.geometry();
    let disk = make_disk(target, geometry, None)?;
    let copied = copy(source, &disk, progress);
    let closed = disk.close();
    Ok(copied.and(closed)?)
}

fn copy(
    source: &dyn Block,
    target: &dyn Block,
    progress: &dyn Fn(u64, u64),
) -> std::result::Result<(), DiskError> {
    let size = source.geometry().size;
    let mut buffer = vec![0; STEP];
    let mut at = 0;
    while at < size {
        // Holes are found many at a time, data is moved in steps.
        let window = (size - at).min(1 << 30);
        for extent in source.extents(at, window)? {
            if extent.kind == ExtentKind::Data {
                copy_extent(
                    source,
                    target,
                    extent.offset..extent.offset + extent.len,
                    &mut buffer,
                    &|done| {
                        progress(done, size);
                    },
                )?;
            }
        }
        at += window;
        progress(at, size);
    }
    target.flush()
}

fn copy_extent(
    source: &dyn Block,
    target: &dyn Block,
    range: BlockRange,
    buffer: &mut [u8],
    progress: &dyn Fn(u64),
) -> std::result::Result<(), DiskError> {
    let mut at = range.start;
    while at < range.end {
        // To the next multiple of the step, so that pieces are aligned.
        let step = STEP as u64;
        let len = (step - at % step).min(range.end - at);
        let bytes = &mut buffer[..usize::try_from(len).unwrap_or(STEP)];
        source.read_at(at, bytes)?;
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            if piece.iter().any(|b| *b != 0) {
                target.write_at(at + (i * PIECE) as u64, piece)?;
            }
        }
        at += len;
        progress(at);
    }
    Ok(())
}

/// A raw image, for reading. Its last sector is filled up with zeros.
struct RawFile {
    file: File,
    path: std::path::PathBuf,
    len: u64,
}

impl RawFile {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| EngineError::io("open", path, e))?;
        // By seeking: a block device has no length.
        let len = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|e| EngineError::io("find the length of", path, e))?;
        check_size(len.next_multiple_of(512))?;
        Ok(Self { file, path: path.to_owned(), len })
    }

    fn seek(&self, to: rustix::fs::SeekFrom) -> std::result::Result<Option<u64>, DiskError> {
        match rustix::fs::seek(&self.file, to) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(e) => Err(DiskError::io("seek in", &self.path, e.into())),
        }
    }
}

impl Block for RawFile {
    fn geometry(&self) -> Geometry {
        let size = self.len.next_multiple_of(512);
        Geometry { size, logical_sector: 512, physical_sector: 4096 }
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::result::Result<(), DiskError> {
        let inside = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (data, rest) = buf.split_at_mut(inside.min(buf.len()));
        rest.fill(0);
        self.file.read_exact_at(data, offset).map_err(|e| DiskError::io("read", &self.path, e))
    }

    fn write_at(&self, _: u64, _: &[u8]) -> std::result::Result<(), DiskError> {
        Err(DiskError::ReadOnly { path: self.path.clone() })
    }

    fn flush(&self) -> std::result::Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> std::result::Result<(), DiskError> {
        Err(DiskError::ReadOnly { path: self.path.clone() })
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> std::result::Result<(), DiskError> {
        Err(DiskError::ReadOnly { path: self.path.clone() })
    }

    fn extents(&self, offset: u64, len: u64) -> std::result::Result<Vec<Extent>, DiskError> {
        use rustix::fs::SeekFrom;
        let end = offset + len;
        let mut extents = Vec::new();
        let mut at = offset;
        while at < end {
            let data = self.seek(SeekFrom::Data(at))?.unwrap_or(end).min(end);
            // Whole sectors, whatever the file system's blocks.
            let data = (data - data % 512).max(at);
            if data > at {
                extents.push(Extent { offset: at, len: data - at, kind: ExtentKind::Hole });
            }
            if data == end {
                break;
            }
            let hole = self.seek(SeekFrom::Hole(data))?.unwrap_or(end);
            let hole = hole.next_multiple_of(512).max(data + 512).min(end);
            extents.push(Extent { offset: data, len: hole - data, kind: ExtentKind::Data });
            at = hole;
        }
        Ok(extents)
    }
}
