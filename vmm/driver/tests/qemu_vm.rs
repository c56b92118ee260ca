//! The driver alone with a real Debian guest; `qemu-nbd` stands in for the disk owner.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tidemark_driver::agent::{AGENT_SOCKET, Agent};
use tidemark_driver::{
    DriverError, DriverKind, Machine, MachineDisk, MachineNic, MachineSpec, MachineState, attach,
    launch,
};
use uuid::Uuid;

/// Boot of the guest under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

/// Serves a raw file over NBD until dropped.
struct NbdServer(Child);

impl NbdServer {
    fn start(socket: &Path, image: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let child = Command::new("qemu-nbd")
            .args(["--format=raw", "--cache=writeback", "--discard=unmap", "--persistent"])
            .args(["--shared=4", "--export-name=system"])
            .arg("--socket")
            .arg(socket)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        while !socket.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine that does not outlive a failed test.
struct Vm(Box<dyn Machine>);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

fn spec(dir: &Path, disks: &[&str]) -> MachineSpec {
    let run_dir = dir.join("run");
    MachineSpec {
        name: "test, with a comma".to_owned(),
        vm_id: Uuid::new_v4(),
        generation_id: Uuid::new_v4(),
        cpus: 2,
        memory: 512 << 20,
        kernel: None,
        initrd: None,
        cmdline: None,
        disks: disks
            .iter()
            .map(|name| MachineDisk { name: (*name).to_owned(), sectors: (512, 4096) })
            .collect(),
        nics: vec![MachineNic { mac: "52:54:00:12:34:56".to_owned() }],
        nbd_socket: run_dir.join("nbd.sock"),
        console_log: dir.join("console,append=off.log"),
        run_dir,
    }
}

fn sh(agent: &mut Agent, script: &str) -> String {
    let args = ["-c".to_owned(), script.to_owned()];
    let result = agent.exec("/bin/sh", &args, None, BOOT).unwrap();
    let (stdout, stderr) = (text(&result.stdout), text(&result.stderr));
    assert_eq!(result.exit_code, 0, "{script}: {stdout}{stderr}");
    stdout
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[test]
fn a_real_guest_is_driven_from_boot_to_power_off() {
    let guest = tidemark_lab::guest(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("system.raw");
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .arg(guest.join("debian.raw"))
        .arg(&image)
        .status()
        .unwrap();
    assert!(copied.success());

    let mut spec = spec(dir.path(), &["system"]);
    spec.kernel = Some(guest.join("vmlinuz"));
    spec.initrd = Some(guest.join("initrd.img"));
    spec.cmdline = Some(std::fs::read_to_string(guest.join("cmdline")).unwrap().trim().to_owned());
    std::fs::create_dir(&spec.run_dir).unwrap();
    let server = NbdServer::start(&spec.nbd_socket, &image);

    let start = Instant::now();
    let mut vm = Vm(launch(DriverKind::Qemu, &spec).unwrap());
    let mut agent = Agent::connect(&spec.run_dir.join(AGENT_SOCKET), BOOT).unwrap();
    eprintln!("{}: guest agent after {:.1?}", vm.0.description(), start.elapsed());

    identity_is_visible(&mut agent, &spec);
    processes_run_in_the_guest(&mut agent);
    paused_and_resumed(&mut vm, &mut agent);
    file_systems_freeze_and_thaw(&mut agent);
    let server = owner_restart_is_invisible(&mut agent, server, &spec, &image);
    attached_again(&vm, &spec);

    vm.0.press_power_button().unwrap();
    assert!(vm.0.wait_stopped(BOOT).unwrap(), "the power button has no effect");
    assert_eq!(vm.0.state().unwrap(), MachineState::Stopped);
    assert!(matches!(agent.ping(), Err(DriverError::NotRunning)));
    assert!(attach(DriverKind::Qemu, &spec.run_dir).unwrap().is_none());
    drop(server);
    let console = std::fs::metadata(&spec.console_log).unwrap();
    assert!(console.len() > 0, "the console log is empty");
    // Shut down properly: no journal to replay.
    let check = Command::new("/sbin/e2fsck").args(["-fn"]).arg(&image).output().unwrap();
    assert!(check.status.success(), "{}", text(&check.stdout));
}

fn identity_is_visible(agent: &mut Agent, spec: &MachineSpec) {
    assert!(agent.version().unwrap().contains('.'));
    assert_eq!(
        sh(agent, "cat /sys/class/dmi/id/product_uuid").to_lowercase(),
        spec.vm_id.to_string()
    );
    assert_eq!(sh(agent, "cat /sys/block/vda/serial"), "system");
    assert_eq!(
        sh(
            agent,
            "cat /sys/block/vda/queue/logical_block_size /sys/block/vda/queue/physical_block_size"
        ),
        "512\n4096"
    );
    assert_eq!(sh(agent, "cat /sys/class/net/e*/address"), spec.nics[0].mac);
    let guest = i128::from(agent.time_ns().unwrap());
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let difference = guest - i128::try_from(host.as_nanos()).unwrap();
    assert!(difference.abs() < 60_000_000_000, "the clocks differ by {difference} ns");
}

fn processes_run_in_the_guest(agent: &mut Agent) {
    let input: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let echo = agent.exec("/bin/cat", &[], Some(&input), BOOT).unwrap();
    assert!(echo.stdout == input && echo.stderr.is_empty() && echo.exit_code == 0);

    let args = ["-c".to_owned(), "echo wrong >&2; exit 7".to_owned()];
    let failed = agent.exec("/bin/sh", &args, None, BOOT).unwrap();
    assert_eq!((failed.exit_code, text(&failed.stderr).as_str()), (7, "wrong"));
    let args = ["-c".to_owned(), "kill -9 $$".to_owned()];
    assert_eq!(agent.exec("/bin/sh", &args, None, BOOT).unwrap().exit_code, 137);

    let missing = agent.exec("/no/such/program", &[], None, BOOT);
    assert!(matches!(missing, Err(DriverError::Agent { .. })), "{missing:?}");
    let slow = agent.exec("/bin/sleep", &["1000".to_owned()], None, Duration::from_secs(1));
    assert!(matches!(slow, Err(DriverError::Agent { .. })), "{slow:?}");
    agent.ping().unwrap();
}

fn paused_and_resumed(vm: &mut Vm, agent: &mut Agent) {
    vm.0.pause().unwrap();
    assert_eq!(vm.0.state().unwrap(), MachineState::Paused);
    vm.0.resume().unwrap();
    assert_eq!(vm.0.state().unwrap(), MachineState::Running);
    agent.ping().unwrap();
}

fn file_systems_freeze_and_thaw(agent: &mut Agent) {
    assert!(!agent.is_frozen().unwrap());
    assert_eq!(agent.thaw(BOOT).unwrap(), 0, "harmless when nothing is frozen");
    assert_eq!(agent.freeze(BOOT).unwrap(), 1);
    assert!(agent.is_frozen().unwrap());
    // While frozen the agent runs nothing that could hang on a frozen file system.
    assert!(agent.exec("/bin/true", &[], None, BOOT).is_err());
    assert_eq!(agent.thaw(BOOT).unwrap(), 1);
    assert!(!agent.is_frozen().unwrap());
    sh(agent, "echo written >/var/tmp/after-thaw && sync");
}

/// The owner dies while the guest writes, and comes back: nothing but a pause is seen.
fn owner_restart_is_invisible(
    agent: &mut Agent,
    server: NbdServer,
    spec: &MachineSpec,
    image: &Path,
) -> NbdServer {
    let script = "cd /var/tmp; for i in $(seq 20); do \
         head -c 500000 /dev/urandom >f$i && sync f$i || exit 1; done; cat f[0-9]* | sha256sum >sum; sync; \
         echo done >finished";
    sh(agent, &format!("setsid sh -c '{script}' >/dev/null 2>&1 </dev/null &"));
    wait_for_file(agent, "/var/tmp/f5");
    drop(server);
    std::thread::sleep(Duration::from_millis(300));
    let server = NbdServer::start(&spec.nbd_socket, image);
    wait_for_file(agent, "/var/tmp/finished");
    sh(agent, "echo 3 >/proc/sys/vm/drop_caches; cd /var/tmp; cat f[0-9]* | sha256sum | cmp - sum");
    assert_eq!(sh(agent, "dmesg | grep -ciE 'i/o error|ext4-fs error' || true"), "0");
    server
}

fn wait_for_file(agent: &mut Agent, path: &str) {
    let give_up = Instant::now() + BOOT;
    while sh(agent, &format!("[ -e {path} ] && echo yes || echo no")) != "yes" {
        assert!(Instant::now() < give_up, "{path} does not appear");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn attached_again(vm: &Vm, spec: &MachineSpec) {
    let mut other = attach(DriverKind::Qemu, &spec.run_dir).unwrap().unwrap();
    assert_eq!(other.pid(), vm.0.pid());
    assert_eq!(other.description(), vm.0.description());
    assert_eq!(other.state().unwrap(), MachineState::Running);
    let second = launch(DriverKind::Qemu, spec);
    assert!(matches!(second, Err(DriverError::LaunchFailed(_))));
    // A launcher that died before it wrote its record is no obstacle.
    std::fs::remove_file(spec.run_dir.join("machine.json")).unwrap();
    let found = attach(DriverKind::Qemu, &spec.run_dir).unwrap().unwrap();
    assert_eq!(found.pid(), vm.0.pid());
    assert!(spec.run_dir.join("machine.json").exists());
}

#[test]
fn a_killed_machine_is_gone_and_can_be_launched_again() {
    let dir = tempfile::tempdir().unwrap();
    // A run directory whose socket paths are longer than a socket address.
    let mut spec = spec(&dir.path().join("x".repeat(120)), &[]);
    std::fs::create_dir_all(&spec.run_dir).unwrap();
    assert!(attach(DriverKind::Qemu, &spec.run_dir).unwrap().is_none());
    let mut vm = Vm(launch(DriverKind::Qemu, &spec).unwrap());
    let first = vm.0.pid();
    assert_eq!(vm.0.state().unwrap(), MachineState::Running);
    assert!(!vm.0.wait_stopped(Duration::from_millis(10)).unwrap());
    vm.0.kill().unwrap();
    assert_eq!(vm.0.state().unwrap(), MachineState::Stopped);
    vm.0.kill().unwrap();
    assert!(vm.0.press_power_button().is_err());
    assert!(attach(DriverKind::Qemu, &spec.run_dir).unwrap().is_none());
    spec.cpus = 1;
    let vm = Vm(launch(DriverKind::Qemu, &spec).unwrap());
    assert_ne!(vm.0.pid(), first);
}

#[test]
fn a_launch_that_fails_says_why_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path(), &[]);
    spec.kernel = Some(dir.path().join("no-such-kernel"));
    let error = launch(DriverKind::Qemu, &spec).map(drop).unwrap_err().to_string();
    assert!(error.contains("no-such-kernel"), "{error}");
    assert!(attach(DriverKind::Qemu, &spec.run_dir).unwrap().is_none());
}
