//! `tidemark checkpoint …`

use serde_json::json;
use tidemark_engine::{
    CheckpointPurpose, CheckpointRecord, CheckpointRequest, CheckpointType, Consistency,
    QuiesceMode,
};

use crate::cli::{CheckpointCommand, CheckpointKind, Quiesce};
use crate::context::Context;
use crate::failure::Result;
use crate::output::{millis, table};

/// Runs a checkpoint command.
pub(crate) fn run(context: &Context, command: CheckpointCommand) -> Result {
    let engine = context.engine()?;
    match command {
        CheckpointCommand::Create { vm, name, kind, quiesce } => {
            let record = engine.session(&vm)?.create_checkpoint(&CheckpointRequest {
                name,
                checkpoint_type: match kind {
                    CheckpointKind::Production => CheckpointType::Production,
                    CheckpointKind::Standard => CheckpointType::Standard,
                },
                quiesce: quiesce_mode(quiesce.quiesce),
                freeze_deadline: quiesce.deadline(),
                purpose: CheckpointPurpose::User,
            })?;
            context.output.result(&record, || {
                format!(
                    "checkpoint {} ({})\n{}; frozen {} ms, disk I/O held {} ms",
                    record.name,
                    record.id,
                    consistency(&record.consistency),
                    millis(record.freeze_us),
                    millis(record.pause_us)
                )
            });
        }
        CheckpointCommand::List { vm } => {
            let summary = engine.show(&vm)?;
            let checkpoints = &summary.config.checkpoints;
            context.output.result(checkpoints, || list(&vm, checkpoints));
        }
        CheckpointCommand::Delete { vm, checkpoint } => {
            let progress = context.output.progress();
            let done = engine.session(&vm)?.delete_checkpoint(
                &checkpoint,
                &|what, done, total| progress.engine(what, done, total),
                &context.cancel,
            );
            progress.finish();
            done?;
            context
                .output
                .result(&json!({"vm": vm, "checkpoint": checkpoint, "deleted": true}), || {
                    format!("deleted {checkpoint}; its data is merged into {vm}'s disks")
                });
        }
    }
    Ok(())
}

fn list(vm: &str, checkpoints: &[CheckpointRecord]) -> String {
    if checkpoints.is_empty() {
        return format!("{vm} has no checkpoints");
    }
    table(
        &["NAME", "CREATED", "PURPOSE", "CONSISTENCY", "ID"],
        checkpoints.iter().map(|c| {
            vec![
                c.name.clone(),
                c.created.clone(),
                match c.purpose {
                    CheckpointPurpose::User => "user".to_owned(),
                    CheckpointPurpose::Backup => "backup".to_owned(),
                },
                consistency(&c.consistency),
                c.id.to_string(),
            ]
        }),
    )
}

/// Consistency for people.
pub(crate) fn consistency(consistency: &Consistency) -> String {
    match consistency {
        Consistency::FileSystem { frozen } => format!("file systems quiesced ({frozen})"),
        Consistency::Crash { reason } => format!("crash-consistent: {reason}"),
        Consistency::Offline => "VM was off".to_owned(),
    }
}

/// The engine's word for a quiesce mode.
pub(crate) fn quiesce_mode(mode: Quiesce) -> QuiesceMode {
    match mode {
        Quiesce::Require => QuiesceMode::Require,
        Quiesce::Try => QuiesceMode::Try,
        Quiesce::Off => QuiesceMode::Off,
    }
}
