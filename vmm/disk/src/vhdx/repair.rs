//! Copies of structures that are kept twice: finding a torn one and making it whole again.

use std::path::Path;

use super::layout::{
    HEADER_OFFSETS, HEADER_SIZE, Header, REGION_TABLE_OFFSETS, REGION_TABLE_SIZE, Regions,
};
use super::storage::{self, Storage};
use super::{Access, Vhdx};
use crate::error::{DiskError, Result};

/// The torn copies of a file, named for people. A file of which both copies are torn does not open.
pub(crate) fn torn_copies(storage: &dyn Storage) -> Vec<String> {
    let mut torn = Vec::new();
    for (index, at) in HEADER_OFFSETS.into_iter().enumerate() {
        let mut bytes = vec![0; HEADER_SIZE];
        if storage.read_exact_at(&mut bytes, at).is_err() || Header::parse(&bytes).is_none() {
            torn.push(format!("header {}", index + 1));
        }
    }
    for (index, at) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
        let mut bytes = vec![0; REGION_TABLE_SIZE];
        let read = storage.read_exact_at(&mut bytes, at);
        if read.is_err() || matches!(Regions::parse(&bytes), Ok(None)) {
            torn.push(format!("region table {}", index + 1));
        }
    }
    torn
}

/// Writes a torn region table anew from its copy; whether there was one. Called at every writable
/// open, once the file has been found to be right. Killed anywhere in it: the copy still counts.
pub(crate) fn mend_region_tables(path: &Path, storage: &dyn Storage) -> Result<bool> {
    let failed = |e| DiskError::io("repair the region table of", path, e);
    let mut copies = [vec![0; REGION_TABLE_SIZE], vec![0; REGION_TABLE_SIZE]];
    for (copy, at) in copies.iter_mut().zip(REGION_TABLE_OFFSETS) {
        storage.read_exact_at(copy, at).map_err(failed)?;
    }
    let valid = copies.each_ref().map(|b| matches!(Regions::parse(b), Ok(Some(_))));
    let (good, bad) = match valid {
        [true, false] => (0, 1),
        [false, true] => (1, 0),
        _ => return Ok(false),
    };
    storage.write_all_at(&copies[good], REGION_TABLE_OFFSETS[bad]).map_err(failed)?;
    storage.sync().map_err(failed)?;
    Ok(true)
}

/// Repairs what can be repaired without guessing: a torn header or region table is made whole from its
/// copy, a log is replayed and emptied. Gives what was done; a second call has nothing to do.
///
/// # Errors
///
/// A file that is damaged beyond that is refused and stays as it is: restore it from a copy.
pub fn repair(path: &Path) -> Result<Vec<String>> {
    let file = storage::open(path, Access::ReadOnly)?;
    let mut done: Vec<String> =
        torn_copies(&file).into_iter().map(|what| format!("{what} written anew")).collect();
    drop(file);
    let reader = Vhdx::open(path, Access::ReadOnly)?;
    if reader.needs_replay() {
        done.push("log replayed".to_owned());
    }
    if reader.has_recovered() {
        done.push("writes of a writer that died committed".to_owned());
    }
    drop(reader);
    if !done.is_empty() {
        // Opening for writing does it all.
        Vhdx::open(path, Access::ReadWrite)?.make_clean()?;
    }
    Ok(done)
}
