//! Changes of disk files that nobody uses.

use std::path::Path;

use serde_json::json;
use tidemark_disk::chain::{self, Chain};
use tidemark_disk::rct::Continuity;
use tidemark_disk::vhdx::Access;
use uuid::Uuid;

use crate::context::Context;
use crate::failure::{Code, Failure, Result};
use crate::output::human;

/// `tidemark disk resize`
pub(super) fn resize(context: &Context, file: &Path, size: u64, dry_run: bool) -> Result {
    let done = chain::resize(file, size, dry_run)?;
    let lost = match &done.continuity {
        Continuity::Kept => None,
        Continuity::Lost(why) => Some(why.clone()),
    };
    let document = json!({
        "file": file, "size_before": done.before, "size": done.after,
        "change_tracking_lost": lost, "dry_run": dry_run,
    });
    context.output.result(&document, || {
        let verb = match (dry_run, done.after == done.before) {
            (_, true) => "has that size already:",
            (true, _) => "would be resized:",
            (false, _) => "was resized:",
        };
        let mut text = format!(
            "{} {verb} {} ({} bytes), before {} ({} bytes)",
            file.display(),
            human(done.after),
            done.after,
            human(done.before),
            done.before
        );
        if let Some(why) = lost {
            text +=
                &format!("\nnote: change tracking begins anew, the next backup reads all: {why}");
        }
        text
    });
    Ok(())
}

/// `tidemark disk compact`
pub(super) fn compact(context: &Context, file: &Path, quick: bool, dry_run: bool) -> Result {
    let progress = context.output.progress();
    let show = |p: tidemark_disk::vhdx::CompactProgress| progress.engine(p.step, p.done, p.total);
    let done = chain::compact(file, !quick, dry_run, &show, &context.cancel);
    progress.finish();
    let done = done?;
    let mut document = serde_json::to_value(done).unwrap_or_default();
    document["file"] = json!(file);
    document["dry_run"] = json!(dry_run);
    context.output.result(&document, || {
        let verb = if dry_run { "would be" } else { "was" };
        format!(
            "{} {verb} shortened from {} to {}: {} blocks of zeros, {} structures moved ({})",
            file.display(),
            human(done.length_before),
            human(done.length_after),
            done.zero_blocks + done.empty_blocks,
            done.moved,
            human(done.moved_bytes)
        )
    });
    Ok(())
}

/// `tidemark disk merge`
pub(super) fn merge(
    context: &Context,
    leaf: &Path,
    levels: usize,
    into: Option<&Path>,
    dry_run: bool,
) -> Result {
    let levels = match into {
        None => levels,
        Some(into) => levels_to(leaf, into)?,
    };
    let progress = context.output.progress();
    let done = chain::merge_down(
        leaf,
        levels,
        dry_run,
        &|file, p| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            progress.engine(&format!("merge {name}"), p.done, p.total);
        },
        &context.cancel,
    );
    progress.finish();
    let done = done?;
    let mut document = serde_json::to_value(&done).unwrap_or_default();
    document["dry_run"] = json!(dry_run);
    context.output.result(&document, || {
        let (verb, gone) =
            if dry_run { ("would take", "would be deleted") } else { ("took", "was deleted") };
        let mut text = format!("{} {verb} everything of {}", done.into.display(), leaf.display());
        for file in &done.grown {
            text += &format!("\n{}: as large as the leaf", file.display());
        }
        for file in &done.merged {
            text += &format!("\n{}: {gone}", file.display());
        }
        text
    });
    Ok(())
}

/// How many files lie above `into` in the leaf's chain.
fn levels_to(leaf: &Path, into: &Path) -> Result<usize> {
    let files = Chain::open(leaf, Access::ReadOnly)?.files();
    let wanted = into
        .canonicalize()
        .map_err(|e| Failure::new(Code::NotFound, format!("open {}: {e}", into.display())))?;
    let found = files.iter().position(|f| f.canonicalize().is_ok_and(|f| f == wanted));
    match found.map(|index| files.len() - 1 - index) {
        Some(levels) if levels > 0 => Ok(levels),
        Some(_) => Err(Failure::new(
            Code::Failed,
            format!("{} is the leaf itself: name a file below it", into.display()),
        )),
        None => Err(Failure::new(
            Code::NotFound,
            format!("{} is not in the chain of {}", into.display(), leaf.display()),
        )),
    }
}

/// `tidemark disk set-parent`
pub(super) fn set_parent(
    context: &Context,
    child: &Path,
    parent: &Path,
    ignore_identity: bool,
    dry_run: bool,
) -> Result {
    let same = chain::set_parent(child, parent, ignore_identity, dry_run)?;
    if !same {
        context.output.note(&format!(
            "warning: {} is not the file that {} was made on. Unless both hold the same data, what the \
             child reads as is garbage from now on; check its file systems before you use it. Its \
             change tracking begins anew, and children of its own no longer open.",
            parent.display(),
            child.display()
        ));
    }
    let document = json!({
        "child": child, "parent": parent, "identity_matches": same, "dry_run": dry_run,
    });
    context.output.result(&document, || {
        let verb = if dry_run { "would get" } else { "has" };
        format!("{} {verb} the parent {}", child.display(), parent.display())
    });
    Ok(())
}

/// `tidemark disk set-id`
pub(super) fn set_id(context: &Context, file: &Path, id: Option<Uuid>, dry_run: bool) -> Result {
    let id = chain::set_disk_id(file, id, dry_run)?;
    let document = json!({"file": file, "disk_id": id, "dry_run": dry_run});
    context.output.result(&document, || {
        let verb = if dry_run { "would get" } else { "has" };
        format!("{} {verb} the disk id {id}", file.display())
    });
    Ok(())
}
