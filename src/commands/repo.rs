//! `tidemark repo …`

use crate::cli::RepoCommand;
use crate::context::Context;
use crate::failure::Result;
use crate::output::{human, table};

/// Runs a repository command.
pub(crate) fn run(context: &Context, command: &RepoCommand) -> Result {
    let engine = context.engine()?;
    let exporter = context.exporter(&engine);
    match command {
        RepoCommand::Stats { target } => {
            let stats = exporter.repository(target)?.stats()?;
            context.output.result(&stats, || {
                table(
                    &["", ""],
                    [
                        ("restore points", stats.points.to_string()),
                        ("packs", stats.packs.to_string()),
                        ("stored", human(stats.stored_bytes)),
                        ("chunks", stats.chunks.to_string()),
                        ("chunk bytes", human(stats.chunk_bytes)),
                        ("as if stored whole", human(stats.logical_bytes)),
                    ]
                    .map(|(name, value)| vec![name.to_owned(), value]),
                )
            });
        }
    }
    Ok(())
}
