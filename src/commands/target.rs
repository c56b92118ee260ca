//! `tidemark target …`

use serde_json::json;
use tidemark_exporter::{Media, Target};

use crate::cli::{MediaKind, TargetCommand};
use crate::context::Context;
use crate::failure::Result;
use crate::output::table;

/// Runs a target command.
pub(crate) fn run(context: &Context, command: TargetCommand) -> Result {
    let engine = context.engine()?;
    let exporter = context.exporter(&engine);
    match command {
        TargetCommand::Add {
            name,
            url,
            media,
            site,
            offsite,
            passphrase_file,
            credentials_file,
        } => {
            let media = match media {
                Some(MediaKind::Disk) => Media::Disk,
                Some(MediaKind::Object) => Media::Object,
                Some(MediaKind::Tape) => Media::Tape,
                None if url.starts_with("s3://") => Media::Object,
                None => Media::Disk,
            };
            let target =
                Target { name, url, media, site, offsite, passphrase_file, credentials_file };
            let (made, points) = exporter.add_target(&target)?;
            let result = json!({"target": target, "created": made, "points": points});
            context.output.result(&result, || {
                if made {
                    format!("added {}: new repository", target.name)
                } else {
                    format!("added {}: repository with {points} restore points", target.name)
                }
            });
        }
        TargetCommand::List => {
            let targets = exporter.targets()?;
            context.output.result(&targets, || list(&targets));
        }
        TargetCommand::Test { name } => {
            let checks = exporter.test_target(&name)?;
            context.output.result(&json!({"target": name, "checks": checks}), || checks.join("\n"));
        }
        TargetCommand::Remove { name } => {
            exporter.remove_target(&name)?;
            context.output.result(&json!({"target": name, "removed": true}), || {
                format!("removed {name}; its repository stays as it is")
            });
        }
    }
    Ok(())
}

fn list(targets: &[Target]) -> String {
    if targets.is_empty() {
        return "no targets; `tidemark target add --help` says how to add one".to_owned();
    }
    table(
        &["NAME", "MEDIA", "SITE", "OFF-SITE", "URL"],
        targets.iter().map(|t| {
            vec![
                t.name.clone(),
                match t.media {
                    Media::Disk => "disk".to_owned(),
                    Media::Object => "object".to_owned(),
                    Media::Tape => "tape".to_owned(),
                },
                t.site.clone().unwrap_or_default(),
                if t.offsite { "yes" } else { "no" }.to_owned(),
                t.url.clone(),
            ]
        }),
    )
}
