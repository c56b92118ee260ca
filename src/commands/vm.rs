//! `tidemark vm …`

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tidemark_driver::{DriverKind, MachineState};
use tidemark_engine::{CreateVm, NewDisk, VmSummary};

use crate::cli::{Driver, VmCommand, VmCreateArgs};
use crate::context::Context;
use crate::failure::Result;
use crate::output::{human, table};

/// Runs a VM command.
pub(crate) fn run(context: &Context, command: VmCommand) -> Result<ExitCode> {
    match command {
        VmCommand::Create(args) => create(context, args)?,
        VmCommand::List => list(context)?,
        VmCommand::Show { vm } => show(context, &vm)?,
        VmCommand::Start { vm, wait } => start(context, &vm, wait)?,
        VmCommand::Stop { vm, force, timeout } => stop(context, &vm, force, timeout)?,
        VmCommand::Delete { vm, yes } => delete(context, &vm, yes)?,
        VmCommand::Exec { vm, timeout, command } => return exec(context, &vm, timeout, &command),
    }
    Ok(ExitCode::SUCCESS)
}

fn create(context: &Context, args: VmCreateArgs) -> Result {
    let disks = args
        .import
        .into_iter()
        .map(NewDisk::Import)
        .chain(args.disk_size.into_iter().map(NewDisk::Empty))
        .collect();
    let request = CreateVm {
        name: args.name,
        driver: match args.driver {
            Driver::Qemu => DriverKind::Qemu,
            Driver::Kvm => DriverKind::Kvm,
        },
        cpus: args.cpus,
        memory: args.memory,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        disks,
    };
    let progress = context.output.progress();
    let tell = |what: &str, done, total| progress.engine(what, done, total);
    let made = context.engine()?.create(&request, &tell, &context.cancel);
    progress.finish();
    let config = made?;
    context
        .output
        .result(&config, || format!("created {} ({} disks)", config.name, config.disks.len()));
    Ok(())
}

fn list(context: &Context) -> Result {
    let vms = context.engine()?.list()?;
    context.output.result(&vms, || {
        if vms.is_empty() {
            return "no VMs; `tidemark vm create --help` says how to make one".to_owned();
        }
        table(
            &["NAME", "STATE", "CPUS", "MEMORY", "DISKS", "CHECKPOINTS", "PENDING"],
            vms.iter().map(|vm| {
                vec![
                    vm.config.name.clone(),
                    state(vm.state).to_owned(),
                    vm.config.cpus.to_string(),
                    human(vm.config.memory),
                    vm.config.disks.len().to_string(),
                    vm.config.checkpoints.len().to_string(),
                    vm.pending.clone().unwrap_or_default(),
                ]
            }),
        )
    });
    Ok(())
}

fn show(context: &Context, name: &str) -> Result {
    let vm = context.engine()?.show(name)?;
    context.output.result(&vm, || describe(&vm));
    Ok(())
}

fn describe(vm: &VmSummary) -> String {
    let c = &vm.config;
    let mut rows = vec![
        vec!["name".to_owned(), c.name.clone()],
        vec!["id".to_owned(), c.id.to_string()],
        vec!["state".to_owned(), state(vm.state).to_owned()],
        vec!["processors".to_owned(), c.cpus.to_string()],
        vec!["memory".to_owned(), human(c.memory)],
        vec!["generation id".to_owned(), c.generation_id.to_string()],
        vec!["mac".to_owned(), c.macs.join(" ")],
    ];
    rows.extend(c.disks.iter().map(|d| vec![d.name.clone(), d.leaf.clone()]));
    rows.extend(
        c.checkpoints
            .iter()
            .map(|k| vec!["checkpoint".to_owned(), format!("{} ({})", k.name, k.created)]),
    );
    rows.extend(vm.pending.iter().map(|p| vec!["pending".to_owned(), p.clone()]));
    table(&["", ""], rows)
}

fn state(state: MachineState) -> &'static str {
    match state {
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::Stopped => "stopped",
    }
}

fn start(context: &Context, vm: &str, wait: Option<u64>) -> Result {
    let engine = context.engine()?;
    engine.session(vm)?.start()?;
    if let Some(seconds) = wait {
        engine.wait_agent(vm, Duration::from_secs(seconds))?;
    }
    context.output.result(&json!({"vm": vm, "started": true, "agent": wait.is_some()}), || {
        format!("started {vm}")
    });
    Ok(())
}

fn stop(context: &Context, vm: &str, force: bool, timeout: u64) -> Result {
    let forced = context.engine()?.session(vm)?.stop(force, Duration::from_secs(timeout))?;
    context.output.result(&json!({"vm": vm, "stopped": true, "forced": forced}), || {
        format!("stopped {vm}{}", if forced { " (forced)" } else { "" })
    });
    Ok(())
}

fn delete(context: &Context, vm: &str, yes: bool) -> Result {
    let engine = context.engine()?;
    if yes {
        engine.session(vm)?.delete()?;
    } else {
        let summary = engine.show(vm)?;
        context.output.note(&describe(&summary));
    }
    context.output.result(&json!({"vm": vm, "deleted": yes}), || {
        if yes {
            format!("deleted {vm}")
        } else {
            format!("would delete {vm} with the disks and checkpoints above; add --yes to do it")
        }
    });
    Ok(())
}

fn exec(context: &Context, vm: &str, timeout: u64, command: &[String]) -> Result<ExitCode> {
    let (program, args) = command.split_first().map_or(("", &[][..]), |(p, a)| (p.as_str(), a));
    let done = context.engine()?.exec(vm, program, args, None, Duration::from_secs(timeout))?;
    if context.output.json() {
        let result = json!({
            "vm": vm,
            "exit_code": done.exit_code,
            "stdout": String::from_utf8_lossy(&done.stdout),
            "stderr": String::from_utf8_lossy(&done.stderr),
        });
        context.output.result(&result, String::new);
    } else {
        let _ = std::io::stdout().write_all(&done.stdout);
        let _ = std::io::stderr().write_all(&done.stderr);
    }
    Ok(ExitCode::from(u8::try_from(done.exit_code).unwrap_or(255)))
}
