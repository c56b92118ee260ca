//! The exporter over real repositories in folders and real, stopped VMs.
#![allow(unreachable_pub, clippy::unwrap_used)]

mod common;
mod restores;
mod runs;
mod targets;
