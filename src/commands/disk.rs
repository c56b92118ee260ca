//! `tidemark disk …`

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tidemark_disk::chain::Chain;
use tidemark_disk::nbd::Server;
use tidemark_disk::vhdx::Access;
use tidemark_disk::{Block, ExtentKind};

use super::restore::serve_until_cancelled;
use crate::cli::DiskCommand;
use crate::context::Context;
use crate::failure::Result;

/// Runs a disk command.
pub fn run(context: &Context, command: DiskCommand) -> Result {
    match command {
        _ => todo!(),
    }
}
