//! The commands, one file per noun.

pub(crate) mod backup;
pub(crate) mod checkpoint;
pub(crate) mod disk;
pub(crate) mod process;
pub(crate) mod repo;
pub(crate) mod restore;
pub(crate) mod target;
pub(crate) mod vm;
