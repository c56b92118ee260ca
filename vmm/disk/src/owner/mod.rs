//! The disk owner: the one process that writes the disks of a running VM. It serves the leaves over
//! NBD and answers the control protocol (JSON lines on a Unix socket, docs/formats/owner-protocol.md).

mod checkpoint;
mod client;
mod control;
mod disk;
mod protocol;
mod server;
#[cfg(test)]
mod tests;
mod wire;

pub use client::Client;
pub use protocol::{
    CommittedDisk, DiskReport, MergeState, OwnerReport, PROTOCOL_VERSION, Request, Response,
};
pub use server::{OwnedDisk, OwnerConfig, run};
