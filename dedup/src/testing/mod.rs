//! For tests: a store in memory that fails on purpose, and a proxy that misbehaves in front of a real
//! one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod memory;
mod proxy;

pub use memory::{Fault, MemoryStore};
pub use proxy::{FaultProxy, Misbehaviour};
