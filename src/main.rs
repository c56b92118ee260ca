//! The `tidemark` command. Work in progress.
fn main() {}
