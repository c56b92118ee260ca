//! Structure check of a file, read-only.

use std::path::Path;

use serde::Serialize;

use super::{Access, BlockState, Kind, Vhdx};
use crate::error::{DiskError, Result};

/// What a check found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CheckReport {
    /// Broken rules; the file is refused for writing while there is one.
    pub problems: Vec<String>,
    /// Damage that loses nothing, for there is a good copy: [`super::repair`] or the next writable
    /// open mends it.
    pub repairable: Vec<String>,
    /// Worth knowing, harmless.
    pub notes: Vec<String>,
    /// Blocks with data in this file.
    pub present_blocks: u64,
    /// Blocks partly in this file.
    pub partial_blocks: u64,
    /// Blocks known to be zero.
    pub zero_blocks: u64,
    /// Blocks in all.
    pub blocks: u64,
}

/// Checks headers, log, regions, metadata and block table. Damage is in the report; an error means that
/// the file could not be examined.
pub fn check(path: &Path) -> Result<CheckReport> {
    let disk = match Vhdx::open(path, Access::ReadOnly) {
        Ok(disk) => disk,
        Err(DiskError::Corrupt { what, .. }) => {
            return Ok(CheckReport { problems: vec![what], ..CheckReport::default() });
        }
        Err(e) => return Err(e),
    };
    let mut report = CheckReport { blocks: disk.blocks(), ..CheckReport::default() };
    for block in 0..report.blocks {
        match disk.block_state(block) {
            BlockState::NotPresent => {}
            BlockState::Zero => report.zero_blocks += 1,
            BlockState::Full => report.present_blocks += 1,
            BlockState::Partial => report.partial_blocks += 1,
        }
    }
    // Shared like the open file's lock; what cannot be read now was read a moment ago.
    if let Ok(file) = super::storage::open(path, Access::ReadOnly) {
        for what in super::repair::torn_copies(&file) {
            report.repairable.push(format!("{what} is torn; its copy is used"));
        }
    }
    if disk.needs_replay() {
        report.notes.push("the log is not empty; the next writable open replays it".to_owned());
    }
    if disk.has_recovered() {
        report.notes.push(
            "the writer died: changes in the pending file; the next writable open commits them"
                .to_owned(),
        );
    }
    if disk.properties().kind == Kind::Differencing {
        report.notes.push("a differencing disk: its parent was not checked".to_owned());
    }
    Ok(report)
}
