//! For tests: a store in memory that fails on purpose, a real S3 service on a free port, and a proxy
//! in front of it that misbehaves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod memory;
mod proxy;
mod weed;

pub use memory::{Fault, MemoryStore};
pub use proxy::{FaultProxy, Misbehaviour};
pub use weed::Weed;
