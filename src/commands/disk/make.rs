//! New disk files.

use std::path::{Path, PathBuf};

use serde_json::json;
use tidemark_disk::chain::{self, Chain};
use tidemark_disk::convert::{self, Format};
use tidemark_disk::vhdx::{self, CreateOptions};
use tidemark_disk::{Block, ExtentKind};
use uuid::Uuid;

use super::open_any;
use crate::cli::ConvertFormat;
use crate::context::Context;
use crate::failure::{Code, Failure, Result};
use crate::output::human;

/// A block size as the library takes it; what does not fit is refused there by its limits.
fn block(size: u64) -> u32 {
    size.min(u64::from(u32::MAX)) as u32
}

/// What `tidemark disk create` was asked for.
pub(super) struct New {
    pub(super) size: u64,
    pub(super) block_size: Option<u64>,
    pub(super) sector: u32,
    pub(super) fixed: bool,
    pub(super) id: Option<Uuid>,
}

/// `tidemark disk create`
pub(super) fn create(context: &Context, file: &Path, new: &New) -> Result {
    let block_size = new.block_size.map_or_else(|| vhdx::default_block_size(new.size), block);
    Chain::create(
        file,
        &CreateOptions {
            size: new.size,
            block_size,
            logical_sector: new.sector,
            physical_sector: 4096,
            fixed: new.fixed,
            disk_id: new.id,
            parent: None,
        },
    )?;
    context
        .output
        .result(&json!({"file": file, "size": new.size, "block_size": block_size}), || {
            format!("created {} ({})", file.display(), human(new.size))
        });
    Ok(())
}

/// `tidemark disk fork`
pub(super) fn fork(
    context: &Context,
    base: &Path,
    child: &Path,
    size: Option<u64>,
    block_size: Option<u64>,
    dry_run: bool,
) -> Result {
    let made = chain::fork(base, child, size, block_size.map(block), dry_run)?;
    let document = json!({
        "base": base, "child": child, "size": made.size, "block_size": made.block_size,
        "parent_elsewhere": made.elsewhere, "dry_run": dry_run,
    });
    context.output.result(&document, || {
        let verb = if dry_run { "would create" } else { "created" };
        let mut text = format!(
            "{verb} {} ({}) on {}, which must not be written from then on",
            child.display(),
            human(made.size),
            base.display()
        );
        if made.elsewhere {
            text += "\nnote: its parent is in another folder: open it with --parents-in";
        }
        text
    });
    Ok(())
}

/// What `tidemark disk convert` was asked for.
pub(super) struct Copy<'a> {
    pub(super) to: &'a Path,
    pub(super) format: ConvertFormat,
    pub(super) block_size: Option<u64>,
    pub(super) dry_run: bool,
}

/// `tidemark disk convert`
pub(super) fn convert(
    context: &Context,
    from: &Path,
    parents_in: &[PathBuf],
    copy: &Copy<'_>,
) -> Result {
    let source = open_any(from, parents_in)?;
    if copy.dry_run {
        return plan(context, from, &*source, copy);
    }
    let format = match copy.format {
        ConvertFormat::Dynamic => Format::Dynamic,
        ConvertFormat::Fixed => Format::Fixed,
        ConvertFormat::Raw => Format::Raw,
    };
    let progress = context.output.progress();
    let done = convert::convert(
        &*source,
        copy.to,
        format,
        copy.block_size.map(block),
        &|p| progress.engine("convert", p.done, p.total),
        &context.cancel,
    );
    progress.finish();
    done?;
    context
        .output
        .result(&json!({"from": from, "to": copy.to}), || format!("wrote {}", copy.to.display()));
    Ok(())
}

fn plan(context: &Context, from: &Path, source: &dyn Block, copy: &Copy<'_>) -> Result {
    if copy.to.symlink_metadata().is_ok() {
        let what = format!("create {}: there is such a file already", copy.to.display());
        return Err(Failure::new(Code::Failed, what));
    }
    let size = source.geometry().size;
    let extents = source.extents(0, size)?;
    let data: u64 = extents.iter().filter(|e| e.kind == ExtentKind::Data).map(|e| e.len).sum();
    let most = if copy.format == ConvertFormat::Fixed { size } else { data };
    let document = json!({
        "from": from, "to": copy.to, "size": size, "data": data, "written_at_most": most,
        "dry_run": true,
    });
    context.output.result(&document, || {
        format!(
            "would write {}: {} of {} are data, at most {} would be taken",
            copy.to.display(),
            human(data),
            human(size),
            human(most)
        )
    });
    Ok(())
}
