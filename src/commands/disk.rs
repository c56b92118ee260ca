//! `tidemark disk …`

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tidemark_disk::chain::Chain;
use tidemark_disk::convert::{Format, convert};
use tidemark_disk::nbd::Server;
use tidemark_disk::raw::RawFile;
use tidemark_disk::vhdx::{self, Access, CheckReport, CreateOptions, Kind, Properties, Vhdx};
use tidemark_disk::{Block, Extent, ExtentKind};

use super::restore::serve_until_cancelled;
use crate::cli::{ConvertFormat, DiskCommand};
use crate::context::Context;
use crate::failure::{Code, Failure, Result};
use crate::output::{human, table};

/// Runs a disk command.
pub(crate) fn run(context: &Context, command: DiskCommand) -> Result {
    match command {
        DiskCommand::Info { file } => info(context, &file),
        DiskCommand::Check { file } => check(context, &file),
        DiskCommand::Create { file, size, block_size, sector, fixed } => {
            let block_size = block_size.map_or_else(
                || vhdx::default_block_size(size),
                |b| b.min(u64::from(u32::MAX)) as u32,
            );
            Chain::create(
                &file,
                &CreateOptions {
                    size,
                    block_size,
                    logical_sector: sector,
                    physical_sector: 4096,
                    fixed,
                    disk_id: None,
                    parent: None,
                },
            )?;
            context
                .output
                .result(&json!({"file": file, "size": size, "block_size": block_size}), || {
                    format!("created {} ({})", file.display(), human(size))
                });
            Ok(())
        }
        DiskCommand::Convert { from, to, format } => copy(context, &from, &to, format),
        DiskCommand::Map { file } => map(context, &file),
        DiskCommand::Serve { vm, disk, socket, read_only } => {
            serve(context, &vm, &disk, &socket, read_only)
        }
    }
}

fn info(context: &Context, file: &Path) -> Result {
    let disk = Vhdx::open(file, Access::ReadOnly)?;
    let p = disk.properties();
    let parent = p.parent.as_ref().map(|l| {
        l.relative_path
            .clone()
            .or_else(|| l.absolute_path.clone())
            .or_else(|| l.volume_path.clone())
    });
    let document = json!({
        "file": file,
        "kind": kind(&p),
        "size": p.geometry.size,
        "block_size": p.block_size,
        "logical_sector": p.geometry.logical_sector,
        "physical_sector": p.geometry.physical_sector,
        "disk_id": p.disk_id,
        "data_write_guid": p.data_write_guid,
        "file_write_guid": p.file_write_guid,
        "parent": parent.clone().flatten(),
        "parent_linkage": p.parent.as_ref().map(|l| l.linkage),
        "log_replay_needed": disk.needs_replay(),
    });
    context.output.result(&document, || {
        let mut rows = vec![
            ("kind", kind(&p).to_owned()),
            ("virtual size", format!("{} ({} bytes)", human(p.geometry.size), p.geometry.size)),
            ("block size", human(u64::from(p.block_size))),
            (
                "sectors",
                format!(
                    "{} logical, {} physical",
                    p.geometry.logical_sector, p.geometry.physical_sector
                ),
            ),
            ("disk id", p.disk_id.to_string()),
            ("data write id", p.data_write_guid.to_string()),
        ];
        if let Some(parent) = parent.flatten() {
            rows.push(("parent", parent));
        }
        if disk.needs_replay() {
            rows.push(("log", "to be replayed at the next writable open".to_owned()));
        }
        table(&["", ""], rows.into_iter().map(|(n, v)| vec![n.to_owned(), v]))
    });
    Ok(())
}

fn kind(properties: &Properties) -> &'static str {
    match properties.kind {
        Kind::Fixed => "fixed",
        Kind::Dynamic => "dynamic",
        Kind::Differencing => "differencing",
    }
}

fn check(context: &Context, file: &Path) -> Result {
    let report: CheckReport = vhdx::check(file)?;
    context.output.result(&report, || {
        let mut text = format!(
            "{} of {} blocks present, {} partial, {} zero",
            report.present_blocks, report.blocks, report.partial_blocks, report.zero_blocks
        );
        for note in &report.notes {
            text += &format!("\nnote: {note}");
        }
        if report.problems.is_empty() {
            text += "\nno problems found";
        }
        text
    });
    if report.problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Damaged,
        format!("{} is damaged: {}", file.display(), report.problems.join("; ")),
    ))
}

/// A raw or VHDX file, with its chain.
fn open_any(file: &Path) -> Result<Box<dyn Block>> {
    let mut magic = [0; 8];
    let read = std::fs::File::open(file).and_then(|mut f| std::io::Read::read(&mut f, &mut magic));
    read.map_err(|e| {
        let code =
            if e.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Failed };
        Failure::new(code, format!("open {}: {e}", file.display()))
    })?;
    if &magic == b"vhdxfile" {
        Ok(Box::new(Chain::open(file, Access::ReadOnly)?))
    } else {
        Ok(Box::new(RawFile::open(file, Access::ReadOnly)?))
    }
}

fn copy(context: &Context, from: &Path, to: &Path, format: ConvertFormat) -> Result {
    let source = open_any(from)?;
    let format = match format {
        ConvertFormat::Dynamic => Format::Dynamic,
        ConvertFormat::Fixed => Format::Fixed,
        ConvertFormat::Raw => Format::Raw,
    };
    let progress = context.output.progress();
    let done = convert(
        &*source,
        to,
        format,
        None,
        &|p| progress.engine("convert", p.done, p.total),
        &context.cancel,
    );
    progress.finish();
    done?;
    context.output.result(&json!({"from": from, "to": to}), || format!("wrote {}", to.display()));
    Ok(())
}

fn map(context: &Context, file: &Path) -> Result {
    let disk = open_any(file)?;
    let extents = disk.extents(0, disk.geometry().size)?;
    let document: Vec<_> = extents
        .iter()
        .map(|e| json!({"offset": e.offset, "length": e.len, "kind": name(e)}))
        .collect();
    context.output.result(&document, || {
        table(
            &["OFFSET", "LENGTH", "KIND"],
            extents
                .iter()
                .map(|e| vec![e.offset.to_string(), e.len.to_string(), name(e).to_owned()]),
        )
    });
    Ok(())
}

fn name(extent: &Extent) -> &'static str {
    match extent.kind {
        ExtentKind::Data => "data",
        ExtentKind::Zero => "zero",
        ExtentKind::Hole => "hole",
    }
}

/// Serves an offline VM's disk; the VM is held meanwhile.
fn serve(context: &Context, vm: &str, disk: &str, socket: &Path, read_only: bool) -> Result {
    let engine = context.engine()?;
    let session = engine.session(vm)?;
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    let chain = session.open_disk(disk, access)?;
    let server = Server::bind(socket)?;
    server.add_export(disk, Arc::clone(&chain) as Arc<dyn Block>);
    serve_until_cancelled(context, socket, &[disk.to_owned()]);
    drop(server);
    if !read_only {
        chain.close()?;
    }
    Ok(())
}
