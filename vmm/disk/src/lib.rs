//! Virtual disks: VHDX and AVHDX files, chains of them, change tracking (RCT, MRT), online merge,
//! and NBD serving.
//!
//! A [`chain::Chain`] is what a VM writes to: the files from base to leaf, their tracking, the switch
//! to a new leaf and the merge of a child into its parent. It implements [`Block`], the one interface
//! the NBD server and the exporter read through.

pub mod block;
pub mod chain;
pub mod convert;
pub mod error;
mod fs;
pub mod nbd;
pub mod owner;
pub mod raw;
pub mod rct;
pub mod vhdx;

pub use block::{Block, BlockRange, Extent, ExtentKind, Geometry};
pub use error::{DiskError, Result};

/// Size of a change-tracking granule and of a repository chunk, in bytes.
pub const GRANULE: u64 = 64 * 1024;
