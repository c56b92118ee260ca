//! The engine with a real Debian guest under load: checkpoints, merges, and the death of each of the
//! processes involved. One guest boots once for all of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use tidemark_disk::Block;
use tidemark_driver::{DriverKind, MachineState};
use tidemark_engine::{
    CheckpointPurpose, CheckpointRecord, CheckpointRequest, CheckpointType, Consistency, CreateVm,
    Engine, EngineError, EngineOptions, NewDisk, QuiesceMode,
};

/// Boot of the guest under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
const DEADLINE: Duration = Duration::from_secs(20);
const PROGRAM: &str = env!("CARGO_BIN_EXE_tidemark-engine-test");

/// A running VM; what is left of it ends with the test.
struct Guest {
    dir: TempDir,
    engine: Engine,
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Ok(mut session) = self.engine.session("vm") {
            let _ = session.stop(true, Duration::ZERO);
        }
        if std::thread::panicking() {
            for log in ["owner.log", "guard.log"] {
                let text = std::fs::read_to_string(self.run(log)).unwrap_or_default();
                eprintln!("--- {log}\n{text}");
            }
        }
    }
}

impl Guest {
    fn create() -> Self {
        let guest = tidemark_lab::guest(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap();
        // Kills of processes lose nothing that was written, so memory is as good as a disk.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let dir = dir.unwrap();
        let engine =
            Engine::open(&dir.path().join("d"), EngineOptions { program: PROGRAM.into() }).unwrap();
        let cmdline = std::fs::read_to_string(guest.join("cmdline")).unwrap().trim().to_owned();
        let request = CreateVm {
            name: "vm".to_owned(),
            driver: DriverKind::Qemu,
            cpus: 1,
            memory: 512 << 20,
            kernel: Some(guest.join("vmlinuz")),
            initrd: Some(guest.join("initrd.img")),
            cmdline: Some(cmdline),
            disks: vec![NewDisk::Import(guest.join("debian.raw")), NewDisk::Empty(64 << 20)],
        };
        engine.create(&request, &|_, _, _| {}, &AtomicBool::new(false)).unwrap();
        Self { dir, engine }
    }

    fn sh(&self, script: &str) -> String {
        let args = ["-c".to_owned(), script.to_owned()];
        let result = self.engine.exec("vm", "/bin/sh", &args, None, BOOT).unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).trim().to_owned();
        let (out, err) = (text(&result.stdout), text(&result.stderr));
        assert_eq!(result.exit_code, 0, "{script}: {out}{err}");
        out
    }

    fn run(&self, file: &str) -> PathBuf {
        let id = self.engine.show("vm").unwrap().config.id.simple().to_string();
        self.engine.data_dir().join("run").join(&id[..8]).join(file)
    }

    fn pid(&self, file: &str) -> u32 {
        let text = std::fs::read_to_string(self.run(file)).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }

    fn kill(&self, pid_file: &str) -> u32 {
        let pid = self.pid(pid_file);
        kill(pid);
        pid
    }

    fn checkpoint(&self, purpose: CheckpointPurpose) -> CheckpointRecord {
        let mut session = self.engine.session("vm").unwrap();
        session.create_checkpoint(&request(QuiesceMode::Require, purpose)).unwrap()
    }

    fn delete(&self, checkpoint: &CheckpointRecord) {
        let mut session = self.engine.session("vm").unwrap();
        let never = AtomicBool::new(false);
        session.delete_checkpoint(&checkpoint.id.to_string(), &|_, _, _| {}, &never).unwrap();
    }

    /// That the guest's file systems take writes.
    fn assert_thawed(&self, within: Duration) {
        let begun = Instant::now();
        self.sh("date >/root/thawed && date >/mnt/thawed && sync /root/thawed /mnt/thawed");
        let took = begun.elapsed();
        assert!(took < within, "thawed only after {took:?}");
    }

    /// That the configuration names every disk file there is.
    fn assert_no_orphans(&self) {
        let config = self.engine.show("vm").unwrap().config;
        let mut wanted: Vec<String> = config.disks.iter().map(|d| d.leaf.clone()).collect();
        wanted.extend(config.checkpoints.iter().flat_map(|c| &c.disks).map(|d| d.file.clone()));
        wanted.sort();
        let mut found: Vec<String> = std::fs::read_dir(self.engine.data_dir().join("vms/vm/disks"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .map(|n| match n.strip_suffix(".pending") {
                // Only beside a disk, as long as somebody writes it.
                Some(disk) => disk.to_owned(),
                None => n,
            })
            .filter(|n| !n.ends_with(".rct") && !n.ends_with(".mrt"))
            .collect();
        found.sort();
        found.dedup();
        assert_eq!(found, wanted);
    }
}

fn kill(pid: u32) {
    let killed = Command::new("kill").arg("-9").arg(pid.to_string()).status().unwrap();
    assert!(killed.success());
}

fn request(quiesce: QuiesceMode, purpose: CheckpointPurpose) -> CheckpointRequest {
    CheckpointRequest {
        name: None,
        checkpoint_type: CheckpointType::Production,
        quiesce,
        freeze_deadline: DEADLINE,
        purpose,
    }
}

/// Copies a disk to a raw file.
fn dump(disk: &dyn Block, to: &Path) {
    let mut file = std::fs::File::create(to).unwrap();
    let size = disk.geometry().size;
    file.set_len(size).unwrap();
    let mut piece = vec![0; 1 << 20];
    for extent in disk.extents(0, size).unwrap() {
        let mut at = extent.offset;
        while extent.kind == tidemark_disk::ExtentKind::Data && at < extent.offset + extent.len {
            let len = (extent.offset + extent.len - at).min(1 << 20) as usize;
            disk.read_at(at, &mut piece[..len]).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &piece[..len], at).unwrap();
            at += len as u64;
        }
    }
    file.flush().unwrap();
}

#[test]
fn a_guest_under_load_survives_checkpoints_merges_and_kills() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let begun = Instant::now();
    let step = |what: &str| eprintln!("{:6.1} s  {what}", begun.elapsed().as_secs_f64());
    let guest = Guest::create();
    step("imported");
    guest.engine.session("vm").unwrap().start().unwrap();
    guest.engine.wait_agent("vm", BOOT).unwrap();
    step("agent answers");
    assert_eq!(guest.engine.show("vm").unwrap().state, MachineState::Running);
    processes_lead_sessions_of_their_own(&guest);
    guest.sh("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt");
    guest.sh(
        "head -c 3000000 /dev/urandom >/mnt/known && sha256sum /mnt/known >/root/known.sum && sync",
    );
    start_writers(&guest);
    step("load is on");
    frozen_checkpoint_is_clean(&guest);
    step("checkpoint and merge under load");
    freezes_end_by_themselves(&guest);
    step("freezes ended");
    owner_is_replaced(&guest);
    step("owner killed");
    guard_is_replaced(&guest);
    step("guard killed");
    required_quiesce_fails_at_once_without_guard(&guest);
    step("no guard");
    clients_are_killed(&guest);
    step("clients killed");
    required_quiesce_fails_without_agent(&guest);
    step("no agent");
    machine_is_killed(&guest);
    step("machine killed and recovered");
}

fn processes_lead_sessions_of_their_own(guest: &Guest) {
    for file in ["owner.pid", "guard.pid"] {
        let pid = guest.pid(file);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let session = stat[stat.rfind(')').unwrap() + 2..].split(' ').nth(3).unwrap();
        assert_eq!(session, pid.to_string(), "{file}");
    }
}

/// Small synced writes on both disks, for ever.
fn start_writers(guest: &Guest) {
    let script = "for d in /root /mnt; do \
        setsid sh -c \"i=0; while :; do i=\\$((i+1)); echo \\$i >$d/count; \
        dd if=/dev/urandom of=$d/load bs=64k count=8 seek=\\$((i%16*8)) conv=notrunc,fsync status=none; \
        done\" >/dev/null 2>&1 </dev/null & done";
    guest.sh(script);
}

fn count(guest: &Guest) -> u64 {
    guest.sh("cat /mnt/count").parse().unwrap_or(0)
}

fn frozen_checkpoint_is_clean(guest: &Guest) {
    let record = guest.checkpoint(CheckpointPurpose::User);
    assert_eq!(record.consistency, Consistency::FileSystem { frozen: 2 });
    eprintln!("          frozen {} ms, paused {} us", record.freeze_us / 1000, record.pause_us);
    assert!(record.freeze_us > 0 && u128::from(record.freeze_us) < DEADLINE.as_micros());
    guest.assert_thawed(Duration::from_secs(20));
    let session = guest.engine.session("vm").unwrap();
    for disk in session.open_checkpoint(record.id).unwrap() {
        let raw = guest.dir.path().join(format!("{}.raw", disk.name));
        dump(&*disk.disk, &raw);
        let header = Command::new("/sbin/dumpe2fs").arg("-h").arg(&raw).output().unwrap();
        let header = String::from_utf8_lossy(&header.stdout).into_owned();
        assert!(!header.contains("needs_recovery"), "{}: {header}", disk.name);
        let check = Command::new("/sbin/e2fsck").arg("-fn").arg(&raw).output().unwrap();
        let said = String::from_utf8_lossy(&check.stdout).into_owned();
        assert!(check.status.success(), "{}: {said}", disk.name);
        std::fs::remove_file(&raw).unwrap();
    }
    drop(session);
    let before = count(guest);
    guest.delete(&record);
    assert!(count(guest) >= before, "the guest goes on");
    assert!(guest.engine.show("vm").unwrap().config.checkpoints.is_empty());
    guest.assert_no_orphans();
    guest.sh("sha256sum -c /root/known.sum");
}

/// Speaks to the guard as the engine does.
fn freeze(guest: &Guest, deadline: Duration) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(guest.run("guard.sock")).unwrap();
    writeln!(stream, "{{\"request\":\"freeze\",\"deadline_ms\":{}}}", deadline.as_millis())
        .unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.contains("frozen"), "{line}");
    reader
}

fn freezes_end_by_themselves(guest: &Guest) {
    // At the deadline, and the client is told.
    let mut kept = freeze(guest, Duration::from_secs(10));
    guest.assert_thawed(Duration::from_secs(20));
    kept.get_mut().write_all(b"{\"request\":\"thaw\"}\n").unwrap();
    let mut line = String::new();
    kept.read_line(&mut line).unwrap();
    assert!(line.contains("\"expired\":true"), "{line}");
    drop(kept);
    // By the client's end, long before the deadline.
    drop(freeze(guest, Duration::from_secs(300)));
    guest.assert_thawed(Duration::from_secs(20));
    // By the guard's end: the next session thaws.
    let orphan = freeze(guest, Duration::from_secs(300));
    guest.kill("guard.pid");
    drop(orphan);
    drop(guest.engine.session("vm").unwrap());
    guest.assert_thawed(Duration::from_secs(20));
    assert!(!guest.run("frozen").exists());
}

fn owner_is_replaced(guest: &Guest) {
    let before = guest.kill("owner.pid");
    // By the guard alone, no command asks for it. Its file is away for a moment.
    let killed = Instant::now();
    let file = guest.run("owner.pid");
    let another = |text: String| !text.starts_with(&format!("{before} "));
    while !std::fs::read_to_string(&file).is_ok_and(another) {
        assert!(killed.elapsed() < Duration::from_secs(30), "the owner does not come back");
        std::thread::sleep(Duration::from_millis(2));
    }
    let back = killed.elapsed();
    guest.assert_thawed(Duration::from_secs(30));
    eprintln!("          owner back after {back:?}, guest writing after {:?}", killed.elapsed());
    // In the middle of a merge.
    let record = guest.checkpoint(CheckpointPurpose::User);
    guest.sh("head -c 12000000 /dev/urandom >/root/more && sync /root/more");
    std::thread::scope(|scope| {
        let merge = scope.spawn(|| guest.delete(&record));
        std::thread::sleep(Duration::from_millis(60));
        guest.kill("owner.pid");
        merge.join().unwrap();
    });
    guest.assert_no_orphans();
    guest.sh("sha256sum -c /root/known.sum");
}

fn guard_is_replaced(guest: &Guest) {
    let before = guest.kill("guard.pid");
    // Without a guard nobody replaces the owner, until the next command.
    guest.kill("owner.pid");
    drop(guest.engine.session("vm").unwrap());
    assert_ne!(guest.pid("guard.pid"), before);
    guest.assert_thawed(Duration::from_secs(20));
}

fn required_quiesce_fails_at_once_without_guard(guest: &Guest) {
    // A program that starts nothing: the guard cannot come back.
    let options = EngineOptions { program: "/bin/false".into() };
    let crippled = Engine::open(guest.engine.data_dir(), options).unwrap();
    guest.kill("guard.pid");
    let begun = Instant::now();
    let mut session = crippled.session("vm").unwrap();
    let before = session.config().clone();
    let refused =
        session.create_checkpoint(&request(QuiesceMode::Require, CheckpointPurpose::User));
    let Err(EngineError::Quiesce(reason)) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("guard does not start"), "{reason}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(session.config(), &before);
    let tried = session.create_checkpoint(&request(QuiesceMode::Try, CheckpointPurpose::Backup));
    let Consistency::Crash { reason } = tried.unwrap().consistency else { panic!("frozen") };
    assert!(reason.contains("guard does not start"), "{reason}");
    drop(session);
    // The next session brings the guard back and merges the dead run's checkpoint.
    drop(guest.engine.session("vm").unwrap());
    assert!(guest.engine.show("vm").unwrap().config.checkpoints.is_empty());
    guest.assert_no_orphans();
}

fn clients_are_killed(guest: &Guest) {
    let mut random = 12345_u64;
    for _ in 0..6 {
        let mut client = Command::new(PROGRAM)
            .arg("backup")
            .arg(guest.engine.data_dir())
            .arg("vm")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis(100 + (random >> 33) % 900));
        kill(client.id());
        client.wait().unwrap();
        guest.assert_thawed(DEADLINE + Duration::from_secs(10));
        drop(guest.engine.session("vm").unwrap());
        let vm = guest.engine.show("vm").unwrap();
        assert!(vm.config.checkpoints.is_empty() && vm.pending.is_none(), "{vm:?}");
        guest.assert_no_orphans();
    }
    guest.sh("sha256sum -c /root/known.sum");
}

fn required_quiesce_fails_without_agent(guest: &Guest) {
    // Another client has the agent's channel: nobody can freeze.
    let lock = std::fs::File::options().write(true).open(guest.run("agent.lock")).unwrap();
    lock.lock().unwrap();
    let mut session = guest.engine.session("vm").unwrap();
    let before = session.config().clone();
    let refused =
        session.create_checkpoint(&request(QuiesceMode::Require, CheckpointPurpose::User));
    assert!(matches!(refused, Err(EngineError::Quiesce(_))), "{refused:?}");
    assert_eq!(session.config(), &before);
    guest.assert_no_orphans();
    let tried = session.create_checkpoint(&request(QuiesceMode::Try, CheckpointPurpose::Backup));
    assert!(matches!(tried.unwrap().consistency, Consistency::Crash { .. }));
    lock.unlock().unwrap();
}

fn machine_is_killed(guest: &Guest) {
    // With the checkpoint of a dead run, and a guest that was writing.
    let record = guest.checkpoint(CheckpointPurpose::User);
    guest.sh("sync");
    guest.kill("qemu.pid");
    while guest.engine.show("vm").unwrap().state != MachineState::Stopped {
        std::thread::sleep(Duration::from_millis(10));
    }
    let session = guest.engine.session("vm").unwrap();
    assert_eq!(session.config().checkpoints, std::slice::from_ref(&record));
    assert_eq!(guest.engine.show("vm").unwrap().state, MachineState::Stopped);
    for file in ["owner.pid", "guard.pid", "control.sock", "nbd.sock", "guard.sock", "frozen"] {
        assert!(!guest.run(file).exists(), "{file}");
    }
    drop(session);
    guest.delete(&record);
    guest.assert_no_orphans();
    let session = guest.engine.session("vm").unwrap();
    let raw = guest.dir.path().join("disk1.raw");
    let chain = session.open_disk("disk1", tidemark_disk::vhdx::Access::ReadOnly).unwrap();
    dump(&*chain, &raw);
    let check = Command::new("/sbin/e2fsck").arg("-fy").arg(&raw).output().unwrap();
    assert!(matches!(check.status.code(), Some(0 | 1)), "{check:?}");
    let sum = Command::new("sh")
        .args([
            "-c",
            "/sbin/debugfs -R 'stat known' \"$1\" 2>/dev/null | grep -q 'Size: 3000000'",
            "-",
        ])
        .arg(&raw)
        .status()
        .unwrap();
    assert!(sum.success());
}
