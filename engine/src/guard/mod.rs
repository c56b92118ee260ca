//! The guard: a process beside each running VM that outlives every command. It starts the disk owner
//! again when that dies, shuts it down when the VM ends, and keeps the freeze: whatever happens to the
//! process that asked for it, the guest is thawed.
//!
//! Protocol on `guard.sock`, JSON lines (docs/formats/vm-folder.md): a client freezes, does its work,
//! and thaws; closing the connection thaws as well.

mod client;
mod keeper;
mod lines;
mod process;
mod protocol;

pub(crate) use client::{Freeze, Thawed, ensure};
pub use process::run;
