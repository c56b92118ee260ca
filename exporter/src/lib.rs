//! From checkpoint to restore point and back: backup runs, copies between targets, restores.
//!
//! A run goes `session → open targets → checkpoint → read what changed → commit the restore point →
//! merge the checkpoint → copy to the other targets`. The guest is touched in two places only: the
//! short freeze of the checkpoint, and the online merge; it never waits for a target, because what is
//! read is a sealed file that nothing writes.
//!
//! ```text
//! model     requests, events, reports, facts: what callers see
//! target    target files                       secrets  passphrases and keys
//! probe     is the store fit for a repository? exporter opening repositories
//! plan      which chunks to read               pipeline ordered read-ahead
//! backup    the run                            runs     its record
//! copy      target to target                   point    finding restore points
//! source    a restore point's disk, read from the first target that gives it
//! restore   VMs    disk_file  disks to files   block    disks as block devices
//! ```

mod backup;
mod block;
mod copy;
mod disk_file;
mod error;
mod exporter;
mod model;
mod pipeline;
mod plan;
mod point;
mod probe;
mod report;
mod restore;
mod runs;
mod secrets;
mod source;
mod target;
#[cfg(test)]
mod testing;

pub use copy::CopyReport;
pub use error::{ExportError, Result};
pub use exporter::Exporter;
pub use model::{
    BackupReport, BackupRequest, DiskFormat, Events, FoundPoint, PointFacts, ReadMode,
    RestoreRequest, RunEvent, TargetResult,
};
pub use point::Unread;
pub use runs::{RunOutcome, RunRecord};
pub use secrets::{SecretPrompt, TargetSecrets};
pub use target::{Media, Target};
