//! The demo's steps, in order.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tidemark_dedup::Compression;
use tidemark_driver::DriverKind;
use tidemark_engine::{CreateVm, Engine, NewDisk, QuiesceMode};
use tidemark_exporter::{
    BackupReport, BackupRequest, Exporter, Media, ReadMode, RestoreRequest, Target,
};
use tidemark_lab::{ACCESS_KEY, S3Service, SECRET_KEY};

use super::Story;
use super::guest::Guest;
use crate::cli::DemoArgs;
use crate::context::Context;
use crate::failure::{Code, Failure, Result};

const VM: &str = "demo";
const RESTORED: &str = "demo-restored";

/// Checksums (as `sha256sum` prints them) that the restored VM must reproduce.
struct Known {
    first: String,
    second: String,
}

/// Runs all steps below `dir`; whatever happens, no process of the demo is left behind.
pub(crate) fn run(context: &Context, args: &DemoArgs, dir: &Path, story: &mut Story<'_>) -> Result {
    let s3 = story.step("start an S3 service (SeaweedFS)", || {
        S3Service::start(&args.weed, dir).map_err(|e| Failure::new(Code::Failed, e.to_string()))
    })?;
    let targets = targets(dir, &s3)?;
    let home = Host::open(context, &dir.join("home"))?;
    let known = protect(context, &home.engine, args, dir, &targets, story)?;

    story.step("lose the host: VM, disks, local target", || {
        let stopped = home.engine.session(VM)?.stop(true, Duration::from_secs(10))?;
        debug_assert!(stopped);
        home.engine.session(VM)?.delete()?;
        let mut lost = vec![home.engine.data_dir().to_owned()];
        lost.push(dir.join("local"));
        for folder in lost {
            std::fs::remove_dir_all(&folder).map_err(|e| {
                Failure::new(Code::Failed, format!("remove {}: {e}", folder.display()))
            })?;
        }
        Ok(())
    })?;
    drop(home);
    recover(context, dir, &targets[1], &known, story)
}

/// A data directory whose VMs are stopped when the demo ends, however it ends.
struct Host {
    engine: Engine,
}

impl Host {
    fn open(context: &Context, data_dir: &Path) -> Result<Self> {
        Ok(Self { engine: context.engine_at(data_dir)? })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for vm in self.engine.list().unwrap_or_default() {
            if let Ok(mut session) = self.engine.session(&vm.config.name) {
                let _ = session.stop(true, Duration::from_secs(1));
            }
        }
    }
}

fn targets(dir: &Path, s3: &S3Service) -> Result<[Target; 2]> {
    let passphrase = secret(dir, "passphrase", "a passphrase for the demo only\n")?;
    let keys = secret(
        dir,
        "s3-keys",
        &format!("access_key_id={ACCESS_KEY}\nsecret_access_key={SECRET_KEY}\n"),
    )?;
    Ok([
        Target {
            name: "local".to_owned(),
            url: dir.join("local").display().to_string(),
            media: Media::Disk,
            site: Some("here".to_owned()),
            offsite: false,
            passphrase_file: Some(passphrase.clone()),
            credentials_file: None,
        },
        Target {
            name: "offsite".to_owned(),
            url: s3.url("demo"),
            media: Media::Object,
            site: Some("elsewhere".to_owned()),
            offsite: true,
            passphrase_file: Some(passphrase),
            credentials_file: Some(keys),
        },
    ])
}

fn secret(dir: &Path, name: &str, content: &str) -> Result<PathBuf> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = dir.join(name);
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut f| f.write_all(content.as_bytes()))
        .map_err(|e| Failure::new(Code::Failed, format!("write {}: {e}", path.display())))?;
    Ok(path)
}

/// From nothing to two restore points on two targets.
fn protect(
    context: &Context,
    engine: &Engine,
    args: &DemoArgs,
    dir: &Path,
    targets: &[Target; 2],
    story: &mut Story<'_>,
) -> Result<Known> {
    story.step("import a Debian 12 VM", || create(context, engine, args))?;
    let guest = story.step("start it, wait for the guest agent", || Guest::boot(engine, VM))?;
    let first = story.step("write 64 MiB, start a writer", || {
        let sum = guest.write("first", 64)?;
        guest.start_writer()?;
        Ok(sum)
    })?;
    let exporter = context.exporter(engine);
    story.step("add two targets, local and off-site", || {
        std::fs::create_dir(dir.join("local"))
            .map_err(|e| Failure::new(Code::Failed, format!("create the local target: {e}")))?;
        for target in targets {
            exporter.add_target(target)?;
        }
        Ok(())
    })?;
    let full = story.step("back up", || backup(context, &exporter))?;
    story.backup("full backup", &full);
    let second = story.step("change data: 16 MiB more", || guest.write("second", 16))?;
    let incremental = story.step("back up again", || backup(context, &exporter))?;
    story.backup("incremental backup", &incremental);
    only_the_change(&full, &incremental)?;
    Ok(Known { first, second })
}

fn create(context: &Context, engine: &Engine, args: &DemoArgs) -> Result {
    let file = |name: &str| {
        let path = args.guest.join(name);
        if path.exists() {
            Ok(path)
        } else {
            Err(Failure::new(
                Code::Failed,
                format!("the demo's guest is missing {}; run `make guest`", path.display()),
            ))
        }
    };
    let cmdline = std::fs::read_to_string(file("cmdline")?)
        .map_err(|e| Failure::new(Code::Failed, format!("read the guest's command line: {e}")))?;
    engine.create(
        &CreateVm {
            name: VM.to_owned(),
            driver: DriverKind::Qemu,
            cpus: 2,
            memory: 1 << 30,
            kernel: Some(file("vmlinuz")?),
            initrd: Some(file("initrd.img")?),
            cmdline: Some(cmdline.trim().to_owned()),
            disks: vec![NewDisk::Import(file("debian.raw")?)],
        },
        &|_, _, _| {},
        &context.cancel,
    )?;
    Ok(())
}

fn backup(context: &Context, exporter: &Exporter<'_>) -> Result<BackupReport> {
    let request = BackupRequest {
        vm: VM.to_owned(),
        targets: vec!["local".to_owned(), "offsite".to_owned()],
        full: false,
        quiesce: QuiesceMode::Require,
        freeze_deadline: Duration::from_secs(10),
        compression: Compression::Default,
    };
    let progress = context.output.progress();
    let report = exporter.backup(&request, &|event| progress.event(&event), &context.cancel);
    progress.finish();
    let report = report?;
    if let Some(failed) = report.targets.iter().find_map(|t| t.error.clone()) {
        return Err(Failure::new(Code::Failed, failed));
    }
    Ok(report)
}

/// The second backup must have read and stored the change and not the disk.
fn only_the_change(full: &BackupReport, incremental: &BackupReport) -> Result {
    let read = |r: &BackupReport| r.targets.first().map_or(0, |t| t.read_bytes);
    let tracked =
        incremental.disks.iter().all(|(_, mode)| matches!(mode, ReadMode::Incremental { .. }));
    if !tracked || read(incremental) >= read(full) / 2 {
        return Err(Failure::new(
            Code::Failed,
            format!(
                "the second backup read {} bytes where the first read {}; change tracking did not work",
                read(incremental),
                read(full)
            ),
        ));
    }
    Ok(())
}

/// On a new host, from the off-site copy alone.
fn recover(
    context: &Context,
    dir: &Path,
    offsite: &Target,
    known: &Known,
    story: &mut Story<'_>,
) -> Result {
    let host = Host::open(context, &dir.join("new-home"))?;
    let exporter = context.exporter(&host.engine);
    story.step("new host: add the off-site target", || {
        let (_, points) = exporter.add_target(offsite)?;
        if points < 2 {
            return Err(Failure::new(
                Code::Failed,
                format!("{points} restore points found, 2 expected"),
            ));
        }
        Ok(())
    })?;
    story.step("restore the VM from off-site", || {
        let progress = context.output.progress();
        let restored = exporter.restore_vm(
            &RestoreRequest {
                point: format!("latest:{VM}"),
                name: RESTORED.to_owned(),
                target: None,
                in_place: false,
            },
            &|event| progress.event(&event),
            &context.cancel,
        );
        progress.finish();
        restored?;
        Ok(())
    })?;
    let guest = story.step("start the restored VM", || Guest::boot(&host.engine, RESTORED))?;
    story.step("compare checksums in the guest", || {
        for (name, expected) in [("first", &known.first), ("second", &known.second)] {
            let found = guest.sh(&format!("sha256sum /srv/{name}"))?;
            if found != *expected {
                return Err(Failure::new(
                    Code::Damaged,
                    format!("/srv/{name} is {found}, but was {expected}"),
                ));
            }
        }
        guest.check_log()?;
        Ok(())
    })
}
