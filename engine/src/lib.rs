//! VMs and their folders, checkpoints, quiesce, and the recovery of half-done work.
//!
//! An [`Engine`] is a data directory. Whoever changes a VM takes its [`VmSession`], which first
//! finishes or undoes what a killed predecessor left (an *intent* file says what), and excludes all
//! others until it is dropped. A running VM has three processes that outlive every command: the
//! machine (QEMU), the disk owner, and the guard ([`guard`]).
//!
//! Where the invariants are kept: I2 (a freeze ends) in `guard/keeper.rs` and `guard/client.rs`; I5
//! (kill anything) in `recover.rs`, by the rule in `leaves.rs` and the commit points in
//! `checkpoint.rs` and `merge.rs`; I6 in `recover.rs`, which removes no file that holds data.

mod agent;
mod checkpoint;
mod config;
mod create;
mod engine;
mod error;
mod fault;
mod folder;
pub mod guard;
mod import;
mod intent;
mod leaves;
mod lock;
mod machine;
mod merge;
mod owner;
mod process;
mod recover;
mod restore;
mod runtime;
mod session;
mod spawn;
mod store;
#[cfg(test)]
mod tests;

pub use config::{
    CONFIG_VERSION, CheckpointDisk, CheckpointPurpose, CheckpointRecord, CheckpointRequest,
    CheckpointType, Consistency, CreateVm, DiskConfig, MAX_CHECKPOINTS, MAX_DISKS, NewDisk,
    Progress, QuiesceMode, VmConfig, VmSummary,
};
pub use engine::{Engine, EngineOptions};
pub use error::{EngineError, Result};
pub use restore::{NewVm, RestoreVm};
pub use session::{OpenCheckpointDisk, VmSession};
