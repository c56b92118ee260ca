//! Runs the disk owner and the guard for the engine's own tests; users have the `tidemark` command.

use std::path::PathBuf;
use std::process::ExitCode;

use tidemark_disk::owner::{OwnedDisk, OwnerConfig};
use tidemark_engine::{EngineOptions, guard};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let done = match args.next().as_deref() {
        Some("disk-server") => disk_server(args),
        Some("vm-guard") => vm_guard(args),
        other => Err(format!("disk-server or vm-guard, not {other:?}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn value(args: &mut impl Iterator<Item = String>, name: &str) -> Result<String, String> {
    args.next().ok_or_else(|| format!("{name} needs a value"))
}

fn disk_server(mut args: impl Iterator<Item = String>) -> Result<(), String> {
    let mut config = OwnerConfig {
        disks: Vec::new(),
        nbd_socket: PathBuf::new(),
        control_socket: PathBuf::new(),
    };
    while let Some(arg) = args.next() {
        let value = value(&mut args, &arg)?;
        match arg.as_str() {
            "--disk" => {
                let (name, leaf) = value.split_once('=').ok_or("NAME=LEAF")?;
                config.disks.push(OwnedDisk { name: name.to_owned(), leaf: leaf.into() });
            }
            "--nbd-socket" => config.nbd_socket = value.into(),
            "--control-socket" => config.control_socket = value.into(),
            other => return Err(format!("unknown argument {other}")),
        }
    }
    tidemark_disk::owner::run(config).map_err(|e| e.to_string())
}

fn vm_guard(mut args: impl Iterator<Item = String>) -> Result<(), String> {
    let (mut data_dir, mut vm) = (String::new(), String::new());
    while let Some(arg) = args.next() {
        let value = value(&mut args, &arg)?;
        match arg.as_str() {
            "--data-dir" => data_dir = value,
            "--vm" => vm = value,
            other => return Err(format!("unknown argument {other}")),
        }
    }
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    guard::run(data_dir.as_ref(), &vm, EngineOptions { program }).map_err(|e| e.to_string())
}
