//! Runs the disk owner, the guard, and a client to be killed for the engine's own tests; users have the
//! `tidemark` command.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tidemark_disk::owner::{OwnedDisk, OwnerConfig};
use tidemark_engine::{
    CheckpointPurpose, CheckpointRequest, CheckpointType, Engine, EngineOptions, QuiesceMode, guard,
};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let done = match args.next().as_deref() {
        Some("disk-server") => disk_server(args),
        Some("vm-guard") => vm_guard(args),
        Some("backup") => backup(args),
        other => Err(format!("disk-server, vm-guard or backup, not {other:?}")),
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

/// `backup DATA_DIR VM`: checkpoint and merge, as a backup run does, again and again.
fn backup(mut args: impl Iterator<Item = String>) -> Result<(), String> {
    let data_dir = value(&mut args, "DATA_DIR")?;
    let vm = value(&mut args, "VM")?;
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let engine =
        Engine::open(data_dir.as_ref(), EngineOptions { program }).map_err(|e| e.to_string())?;
    let request = CheckpointRequest {
        name: None,
        checkpoint_type: CheckpointType::Production,
        quiesce: QuiesceMode::Try,
        freeze_deadline: Duration::from_secs(10),
        purpose: CheckpointPurpose::Backup,
    };
    loop {
        let mut session = engine.session(&vm).map_err(|e| e.to_string())?;
        let taken = session.create_checkpoint(&request).map_err(|e| e.to_string())?;
        println!("{:?}", taken.consistency);
        session
            .delete_checkpoint(&taken.id.to_string(), &|_, _, _| {}, &AtomicBool::new(false))
            .map_err(|e| e.to_string())?;
    }
}
