//! The `tidemark` command: parses arguments, wires the rooms together, prints. No logic.

mod cli;
mod commands;
mod context;
mod demo;
mod failure;
mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::context::Context;
use crate::failure::{Code, Result};

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("TIDEMARK_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("tidemark: {failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::DiskServer(args) => commands::process::disk_server(args)?,
        Command::VmGuard(args) => commands::process::vm_guard(&cli.data_dir, &args)?,
        command => {
            let context = Context::new(cli.data_dir, cli.json, cli.quiet)?;
            return dispatch(&context, command);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn dispatch(context: &Context, command: Command) -> Result<ExitCode> {
    match command {
        Command::Vm(command) => return commands::vm::run(context, command),
        Command::Checkpoint(command) => commands::checkpoint::run(context, command)?,
        Command::Target(command) => commands::target::run(context, command)?,
        Command::Backup(command) => return commands::backup::run(context, command),
        Command::Restore(command) => commands::restore::run(context, command)?,
        Command::Disk(command) => commands::disk::run(context, command)?,
        Command::Repo(command) => commands::repo::run(context, &command)?,
        Command::Demo(args) => demo::run(context, &args)?,
        Command::DiskServer(_) | Command::VmGuard(_) => {
            return Err(failure::Failure::new(Code::Failed, "not a command for people"));
        }
    }
    Ok(ExitCode::SUCCESS)
}
