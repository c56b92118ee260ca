//! Small files that must never be half written: one header line with kind, version and checksum, then
//! JSON for people and programs. Format: docs/formats/vm-folder.md.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{EngineError, Result};

/// Larger files are refused unread: 50 checkpoints of 26 disks stay far below.
const MAX_LEN: u64 = 4 << 20;

/// Reads a document of `kind` up to `version`.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, kind: &str, version: u32) -> Result<T> {
    let file = File::open(path).map_err(|e| EngineError::io("open", path, e))?;
    let mut bytes = Vec::new();
    let mut limited = file.take(MAX_LEN + 1);
    limited.read_to_end(&mut bytes).map_err(|e| EngineError::io("read", path, e))?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(EngineError::damaged(path, format!("larger than {MAX_LEN} bytes")));
    }
    decode(&bytes, kind, version).map_err(|what| EngineError::damaged(path, what))
}

fn decode<T: DeserializeOwned>(
    bytes: &[u8],
    kind: &str,
    version: u32,
) -> std::result::Result<T, String> {
    let end = bytes.iter().position(|b| *b == b'\n').ok_or("the header line is missing")?;
    let (header, body) = (&bytes[..end], &bytes[end + 1..]);
    let header = std::str::from_utf8(header).map_err(|_| "the header line is not text")?;
    let mut words = header.split(' ');
    if words.next() != Some(kind) {
        return Err(format!("it does not begin with {kind:?}"));
    }
    let found: u32 =
        words.next().and_then(|w| w.parse().ok()).ok_or("the header has no version")?;
    if found == 0 || found > version {
        return Err(format!(
            "format version {found} is newer than {version}; use a newer Tidemark"
        ));
    }
    let sum = words
        .next()
        .and_then(|w| w.strip_prefix("crc32c="))
        .and_then(|w| u32::from_str_radix(w, 16).ok())
        .ok_or("the header has no checksum")?;
    let actual = crc32c::crc32c(body);
    if actual != sum {
        return Err(format!(
            "the checksum of its content is {actual:08x}, the header says {sum:08x}; restore the file from a copy"
        ));
    }
    serde_json::from_slice(body).map_err(|e| format!("its content cannot be understood: {e}"))
}

/// Replaces `path` by a new document. The caller holds the lock that makes it the only writer. A kill
/// before the rename leaves the old file (and a temporary one that the next write replaces), after it
/// the new one; the directory is synced, so that a power cut cannot bring the old one back.
pub(crate) fn write<T: Serialize>(path: &Path, kind: &str, version: u32, value: &T) -> Result<()> {
    let mut body = serde_json::to_vec_pretty(value)
        .map_err(|e| EngineError::Invalid(format!("{} cannot be written: {e}", path.display())))?;
    body.push(b'\n');
    let header = format!("{kind} {version} crc32c={:08x}\n", crc32c::crc32c(&body));
    write_durable(path, &[header.as_bytes(), &body])
}

/// Replaces `path` by these bytes, all or nothing, durable on return.
pub(crate) fn write_durable(path: &Path, parts: &[&[u8]]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temp = path.with_file_name(format!(".{name}.tmp"));
    let io = |op, at: &Path, e| EngineError::io(op, at, e);
    let mut file = File::create(&temp).map_err(|e| io("create", &temp, e))?;
    for part in parts {
        file.write_all(part).map_err(|e| io("write", &temp, e))?;
    }
    file.sync_all().map_err(|e| io("sync", &temp, e))?;
    fs::rename(&temp, path).map_err(|e| io("rename", &temp, e))?;
    sync_parent(path)
}

/// Makes a directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    let file = File::open(dir).map_err(|e| EngineError::io("open", dir, e))?;
    file.sync_all().map_err(|e| EngineError::io("sync", dir, e))
}

/// Makes the entry of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync_dir)
}

/// Removes a file; that it is gone already is no error. Gives whether it was there.
pub(crate) fn remove_file(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(EngineError::io("remove", path, e)),
    }
}

/// Whether there is something at `path`. A directory that cannot be read is an error, never "no".
pub(crate) fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|e| EngineError::io("look for", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_survives_the_round_trip_and_stays_readable_for_people() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.vmcx");
        write(&path, "kind", 3, &vec!["a", "b"]).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("kind 3 crc32c="), "{text}");
        assert_eq!(read::<Vec<String>>(&path, "kind", 3).unwrap(), ["a", "b"]);
        assert_eq!(read::<Vec<String>>(&path, "kind", 4).unwrap(), ["a", "b"], "older is readable");
    }

    #[test]
    fn i7_every_damaged_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.vmcx");
        write(&path, "kind", 1, &vec!["hello", "world"]).unwrap();
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            for bit in [0x01, 0x20] {
                let mut bad = good.clone();
                bad[at] ^= bit;
                // Flipping the case of a checksum's hex digit changes nothing that is meant.
                if let Ok(value) = decode::<Vec<String>>(&bad, "kind", 1) {
                    assert!(at < 24 && value == ["hello", "world"], "byte {at}");
                }
            }
            assert!(decode::<Vec<String>>(&good[..at], "kind", 1).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.vmcx");
        write(&path, "kind", 2, &1).unwrap();
        let error = read::<u32>(&path, "kind", 1).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("x.vmcx"), "{error}");
    }
}
