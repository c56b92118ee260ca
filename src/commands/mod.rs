//! The commands, one file per noun.

pub mod backup;
pub mod checkpoint;
pub mod disk;
pub mod process;
pub mod repo;
pub mod restore;
pub mod target;
pub mod vm;
