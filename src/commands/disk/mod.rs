//! `tidemark disk …`

mod change;
mod make;
mod show;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidemark_disk::Block;
use tidemark_disk::chain::Chain;
use tidemark_disk::nbd::Server;
use tidemark_disk::raw::RawFile;
use tidemark_disk::vhdx::Access;

use super::restore::serve_until_cancelled;
use crate::cli::DiskCommand;
use crate::context::Context;
use crate::failure::{Code, Failure, Result};

/// Runs a disk command.
pub(crate) fn run(context: &Context, command: DiskCommand) -> Result {
    match command {
        DiskCommand::Info(file) => show::info(context, &file),
        DiskCommand::Check { file, repair } => show::check(context, &file, repair),
        DiskCommand::Map(file) => show::map(context, &file),
        DiskCommand::Create { file, size, block_size, sector, fixed, id } => {
            make::create(context, &file, &make::New { size, block_size, sector, fixed, id })
        }
        DiskCommand::Fork { base, child, size, block_size, dry_run } => {
            make::fork(context, &base, &child, size, block_size, dry_run)
        }
        DiskCommand::Convert { from, to, format, block_size, parents_in, dry_run } => {
            let copy = make::Copy { to: &to, format, block_size, dry_run };
            make::convert(context, &from, &parents_in, &copy)
        }
        DiskCommand::Resize { file, size, dry_run } => {
            change::resize(context, &file, size, dry_run)
        }
        DiskCommand::Compact { file, quick, dry_run } => {
            change::compact(context, &file, quick, dry_run)
        }
        DiskCommand::Merge { leaf, levels, into, dry_run, force } => {
            refuse_vm_file(&leaf, force || dry_run, "tidemark checkpoint delete merges them")?;
            change::merge(context, &leaf, levels, into.as_deref(), dry_run)
        }
        DiskCommand::SetParent { child, parent, ignore_identity, dry_run, force } => {
            refuse_vm_file(&child, force || dry_run, "Tidemark names its parents itself")?;
            change::set_parent(context, &child, &parent, ignore_identity, dry_run)
        }
        DiskCommand::SetId { file, id, dry_run, force } => {
            refuse_vm_file(&file, force || dry_run, "its restore points know it by its id")?;
            change::set_id(context, &file, id, dry_run)
        }
        DiskCommand::Serve { vm, disk, socket, read_only } => {
            serve(context, &vm, &disk, &socket, read_only)
        }
    }
}

/// The VM that a disk file belongs to: its folder lies beside a VM's configuration.
fn vm_of(file: &Path) -> Option<String> {
    let folder = file.canonicalize().ok()?.parent()?.parent()?.to_owned();
    let vm = folder.join("vm.vmcx").is_file();
    vm.then(|| folder.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

/// What would make a VM's configuration wrong is not done by accident.
fn refuse_vm_file(file: &Path, anyway: bool, instead: &str) -> Result {
    match vm_of(file).filter(|_| !anyway) {
        None => Ok(()),
        Some(vm) => Err(Failure::new(
            Code::Failed,
            format!(
                "{} belongs to the VM {vm}: {instead}; --force does it all the same",
                file.display()
            ),
        )),
    }
}

/// Whether a file begins like a VHDX file.
fn is_vhdx(file: &Path) -> Result<bool> {
    let mut magic = [0; 8];
    let read = std::fs::File::open(file).and_then(|mut f| std::io::Read::read(&mut f, &mut magic));
    read.map_err(|e| {
        let code =
            if e.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Failed };
        Failure::new(code, format!("open {}: {e}", file.display()))
    })?;
    Ok(&magic == b"vhdxfile")
}

/// A raw or VHDX file, with its chain.
fn open_any(file: &Path, parents_in: &[PathBuf]) -> Result<Box<dyn Block>> {
    if is_vhdx(file)? {
        Ok(Box::new(Chain::open_among(file, Access::ReadOnly, parents_in)?))
    } else {
        Ok(Box::new(RawFile::open(file, Access::ReadOnly)?))
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
