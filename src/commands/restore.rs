//! `tidemark restore …`

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;
use tidemark_disk::nbd::Server;
use tidemark_exporter::{DiskFormat, RestoreRequest};

use crate::cli::{OutFormat, RestoreCommand};
use crate::context::Context;
use crate::failure::Result;

/// Runs a restore command.
pub(crate) fn run(context: &Context, command: RestoreCommand) -> Result {
    let engine = context.engine()?;
    let exporter = context.exporter(&engine);
    match command {
        RestoreCommand::Vm { point, name, start, target, in_place } => {
            let request = RestoreRequest { point, name, target, in_place };
            let progress = context.output.progress();
            let config = exporter.restore_vm(&request, &|e| progress.event(&e), &context.cancel);
            progress.finish();
            let config = config?;
            if start {
                engine.session(&config.name)?.start()?;
            }
            context.output.result(&json!({"vm": config, "started": start}), || {
                format!("restored {}{}", config.name, if start { " and started it" } else { "" })
            });
        }
        RestoreCommand::Disk { point, disk, out, format } => {
            let format = match format {
                OutFormat::Vhdx => DiskFormat::Vhdx,
                OutFormat::Raw => DiskFormat::Raw,
            };
            let progress = context.output.progress();
            let done = exporter.restore_disk(
                &point,
                &disk,
                &out,
                format,
                &|e| progress.event(&e),
                &context.cancel,
            );
            progress.finish();
            done?;
            context.output.result(&json!({"point": point, "disk": disk, "file": out}), || {
                format!("wrote {}", out.display())
            });
        }
        RestoreCommand::Serve { point, socket } => {
            let server = Server::bind(&socket)?;
            let mut names = Vec::new();
            for (name, disk) in exporter.open_point(&point)? {
                server.add_export(&name, disk);
                names.push(name);
            }
            serve_until_cancelled(context, &socket, &names);
        }
    }
    Ok(())
}

/// Says where the exports are, then waits for Ctrl-C.
pub(crate) fn serve_until_cancelled(context: &Context, socket: &Path, names: &[String]) {
    context.output.result(&json!({"socket": socket, "exports": names}), || {
        names
            .iter()
            .map(|name| format!("nbd+unix:///{name}?socket={}", socket.display()))
            .collect::<Vec<_>>()
            .join("\n")
    });
    context.output.note("serving; Ctrl-C ends it");
    while !context.cancel.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(100));
    }
}
