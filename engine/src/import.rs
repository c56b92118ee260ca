//! Importing a disk image: raw and VHDX by ourselves, other formats through `qemu-img`. What an image
//! is, its first bytes say; its name only has to agree.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use tidemark_disk::chain::Chain;
use tidemark_disk::convert::{CopyProgress, copy};
use tidemark_disk::raw::RawFile;
use tidemark_disk::vhdx::Access;
use tidemark_disk::{Block, DiskError};

use crate::create::{check_size, make_disk};
use crate::error::{EngineError, Result};

/// More than `qemu-img info` has to say of any image.
const MAX_INFO: u64 = 1 << 20;

/// Progress of one import: done, in all.
type Share<'a> = &'a (dyn Fn(u64, u64) + Sync);

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
        Format::Raw => open_raw(source).map(drop),
        Format::Vhdx => Ok(Chain::open(source, Access::ReadOnly).map(|_| ())?),
        Format::Other(format) => check_foreign(source, format),
    }
}

/// Copies an image into a new disk at `target`, with an id of its own. Cancelled or failed, the target
/// is the caller's to remove.
pub(crate) fn import(
    source: &Path,
    target: &Path,
    progress: Share<'_>,
    cancel: &AtomicBool,
) -> Result<()> {
    match sniff(source)? {
        Format::Raw => copy_in(&open_raw(source)?, target, progress, cancel),
        Format::Vhdx => copy_in(&Chain::open(source, Access::ReadOnly)?, target, progress, cancel),
        Format::Other(format) => {
            let raw = target.with_extension("import");
            // The second half of the way.
            let rest = |done, total| progress(total + done, 2 * total);
            let converted = convert(source, format, &raw, progress, cancel)
                .and_then(|()| copy_in(&open_raw(&raw)?, target, &rest, cancel));
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
fn convert(
    source: &Path,
    format: &str,
    raw: &Path,
    progress: Share<'_>,
    cancel: &AtomicBool,
) -> Result<()> {
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
        // "    (12.34/100%)", each ended by a carriage return, several times a second.
        for part in BufReader::new(stdout).split(b'\r').map_while(std::io::Result::ok) {
            if cancel.load(Ordering::Relaxed) {
                // Fails only if it has ended.
                let _ = child.kill();
                break;
            }
            if let Some(percent) = percent(&String::from_utf8_lossy(&part)) {
                progress(percent, 200);
            }
        }
    }
    let output = child.wait_with_output().map_err(run)?;
    if cancel.load(Ordering::Relaxed) {
        return Err(EngineError::Cancelled);
    }
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
fn copy_in(
    source: &dyn Block,
    target: &Path,
    progress: Share<'_>,
    cancel: &AtomicBool,
) -> Result<()> {
    let disk = make_disk(target, source.geometry(), None)?;
    let copied = copy(source, &disk, &|p: CopyProgress| progress(p.done, p.total), cancel);
    let closed = disk.close();
    match copied.and(closed) {
        Err(DiskError::Cancelled) => Err(EngineError::Cancelled),
        done => Ok(done?),
    }
}

fn open_raw(path: &Path) -> Result<RawFile> {
    let image = RawFile::open(path, Access::ReadOnly)?;
    check_size(image.geometry().size)?;
    Ok(image)
}
