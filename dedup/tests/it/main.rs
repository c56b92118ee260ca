//! The repository as a whole, over stores that behave and stores that do not.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod copy;
mod cost;
mod crash;
mod damage;
mod keys;
mod memory;
mod model;
mod s3;
mod support;
mod writers;
