//! The record of runs: `<data-dir>/runs.jsonl`, one JSON object a line, appended and synced.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{ExportError, Result};
use crate::model::BackupReport;

/// Version of a line.
const VERSION: u32 = 1;
/// A longer line is cut down to its outcome.
const MAX_LINE: usize = 64 * 1024;
/// Longest error text kept.
const MAX_ERROR: usize = 4096;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunOutcome {
    /// Every target has the restore point.
    Complete,
    /// The restore point exists, but a copy or the merge failed.
    Partial,
    /// There is no restore point.
    Failed,
    /// Cancelled before there was a restore point.
    Cancelled,
}

/// A line of the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Version of the line: 1.
    pub version: u32,
    /// When the run began, RFC 3339 UTC.
    pub started: String,
    /// When it ended.
    pub ended: String,
    /// The VM.
    pub vm: String,
    /// How it ended.
    pub outcome: RunOutcome,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<BackupReport>,
}

impl RunRecord {
    pub(crate) fn new(vm: &str, started: Timestamp, result: &Result<BackupReport>) -> Self {
        let (outcome, error, report) = match result {
            Ok(report) if report.complete() => (RunOutcome::Complete, None, Some(report.clone())),
            Ok(report) => (RunOutcome::Partial, None, Some(report.clone())),
            Err(ExportError::Cancelled) => (RunOutcome::Cancelled, None, None),
            Err(e) => (RunOutcome::Failed, Some(cut(&e.to_string())), None),
        };
        Self {
            version: VERSION,
            started: started.to_string(),
            ended: Timestamp::now().to_string(),
            vm: cut(vm),
            outcome,
            error,
            report,
        }
    }

    fn line(&self) -> Result<Vec<u8>> {
        let to_line = |record: &Self| {
            let mut line = serde_json::to_vec(record)
                .map_err(|e| ExportError::Invalid(format!("the run's record: {e}")))?;
            line.push(b'\n');
            Ok(line)
        };
        let line = to_line(self)?;
        if line.len() <= MAX_LINE {
            return Ok(line);
        }
        let error = Some("the report was too long to be kept".to_owned());
        to_line(&Self { error, report: None, ..self.clone() })
    }
}

/// Cuts a text at a character boundary.
fn cut(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_ERROR);
    text[..end].to_owned()
}

/// Appends a line, durable on return. One write under a lock: a kill leaves at most one torn last
/// line, which the next append ends and readers skip.
pub(crate) fn append(data_dir: &Path, record: &RunRecord) -> Result<()> {
    let path = data_dir.join("runs.jsonl");
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(ExportError::io("open", &path))?;
    file.lock().map_err(ExportError::io("lock", &path))?;
    let mut line = record.line()?;
    if torn(&mut file).map_err(ExportError::io("read", &path))? {
        line.insert(0, b'\n');
    }
    file.write_all(&line).map_err(ExportError::io("write", &path))?;
    file.sync_data().map_err(ExportError::io("sync", &path))
}

/// Whether the file's last line has no end.
fn torn(file: &mut File) -> std::io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(vm: &str, error: &str) -> RunRecord {
        let result = Err(ExportError::Invalid(error.to_owned()));
        RunRecord::new(vm, Timestamp::now(), &result)
    }

    #[test]
    fn lines_survive_a_torn_one_before_them() {
        let dir = tempfile::tempdir().unwrap();
        append(dir.path(), &failed("web", "first")).unwrap();
        let path = dir.path().join("runs.jsonl");
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"vers").unwrap();
        append(dir.path(), &failed("web", "third")).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let read: Vec<Option<RunRecord>> =
            text.lines().map(|line| serde_json::from_str(line).ok()).collect();
        assert_eq!(read.len(), 3);
        assert_eq!(read[0].as_ref().unwrap().error.as_deref(), Some("first"));
        assert!(read[1].is_none());
        assert_eq!(read[2].as_ref().unwrap().outcome, RunOutcome::Failed);
    }

    #[test]
    fn a_line_is_bounded_whatever_failed() {
        let dir = tempfile::tempdir().unwrap();
        append(dir.path(), &failed("web", &"ü".repeat(100_000))).unwrap();
        assert!(std::fs::metadata(dir.path().join("runs.jsonl")).unwrap().len() < 10_000);
        let cancelled = RunRecord::new("w", Timestamp::now(), &Err(ExportError::Cancelled));
        assert_eq!(cancelled.outcome, RunOutcome::Cancelled);
    }
}
