//! I5 on a real VM: `kill -9` of any process at random moments of backup and merge. Seeded: kill
//! number n does the same on every machine, as far as time allows. `TIDEMARK_KILLS` says how many
//! (`make soak` asks for many more), `TIDEMARK_SEED` where to begin.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

mod common;

use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use common::vm::Vm;
use common::{Host, Random};

/// Longest freeze that the runs allow.
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Command,
    DiskOwner,
    Guard,
    Qemu,
}

impl Victim {
    /// The command is what dies most in practice; QEMU costs a boot each time.
    fn choose(random: &mut Random) -> Self {
        match random.below(20) {
            0..=9 => Self::Command,
            10..=15 => Self::DiskOwner,
            16..=17 => Self::Guard,
            _ => Self::Qemu,
        }
    }

    /// What the process's command line contains.
    fn mark(self) -> &'static str {
        match self {
            Self::Command => "",
            Self::DiskOwner => "disk-server",
            Self::Guard => "vm-guard",
            Self::Qemu => "qemu-system",
        }
    }
}

#[test]
fn i5_any_process_killed_at_any_moment_of_backup_and_merge() {
    let kills: u64 = env_number("TIDEMARK_KILLS").unwrap_or(50);
    let first: u64 = env_number("TIDEMARK_SEED").unwrap_or(0);
    let host = Host::new();
    host.add_local_target("local");
    let vm = Vm::create(&host, "k");
    vm.start();
    start_writer(&vm);
    let begun = Instant::now();
    host.json(["backup", "run", "k", "--quiesce", "require"]);
    host.json(["backup", "run", "k", "--quiesce", "require"]);
    let usual = begun.elapsed() / 2;

    for seed in first..first + kills {
        let mut random = Random(seed);
        let victim = Victim::choose(&mut random);
        let sum = change(&vm, &mut random);
        let mut run = start_backup(&host, &mut random);
        std::thread::sleep(Duration::from_micros(random.below(usual.as_micros() as u64)));
        let killed = kill(&host, victim, &run);
        eprintln!("kill {seed}: {victim:?} {}", if killed { "killed" } else { "was gone" });
        let killed_at = Instant::now();
        if victim == Victim::Command || victim == Victim::Qemu {
            let _ = wait(&mut run, Duration::from_secs(120), seed);
        }
        if victim == Victim::Qemu {
            vm.start();
            start_writer(&vm);
        } else {
            i2_guest_writes_again(&vm, killed_at, seed);
        }
        let _ = wait(&mut run, Duration::from_secs(120), seed);
        aftermath(&host, &vm, &sum, seed);
    }
    host.json(["backup", "verify", "--all"]);
    restored_vm_holds_the_data(&host, &vm);
}

fn env_number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().unwrap())
}

/// A writer whose log shows any lost or reordered line. Each line is synced before the next one begins:
/// after a power cut all of them are whole but the last, which ext4 may have left cut off or as NULs.
fn start_writer(vm: &Vm<'_>) {
    vm.sh("touch /srv/log && tr '\\0' '?' < /srv/log > /srv/seen \
        && bad=$(awk '$0 != \"line \" NR {print NR; exit}' /srv/seen) \
        && all=$(awk 'END {print NR}' /srv/seen) \
        && if [ -n \"$bad\" ]; then \
            if [ \"$bad\" -lt \"$all\" ]; then echo \"bad line $bad of $all\"; sed -n \"$bad,+3p\" /srv/seen; exit 1; fi; \
            head -n $((bad - 1)) /srv/log > /srv/new && mv /srv/new /srv/log && sync; \
        fi; \
        n=$(wc -c < /srv/log); [ $n -eq 0 ] || [ \"$(tail -c 1 /srv/log | od -An -tu1 | tr -d ' ')\" = 10 ] || echo >> /srv/log");
    vm.sh("nohup sh -c 'i=$(wc -l < /srv/log 2>/dev/null || echo 0); while :; do i=$((i+1)); echo line $i >> /srv/log; sync /srv/log; done' >/dev/null 2>&1 </dev/null & echo started");
}

/// New known data in the guest; gives its checksum line.
fn change(vm: &Vm<'_>, random: &mut Random) -> String {
    let kib = 64 + random.below(2000);
    vm.sh(&format!("head -c {kib}K /dev/urandom > /srv/known && sync && sha256sum /srv/known"))
}

fn start_backup(host: &Host, random: &mut Random) -> Child {
    let quiesce = if random.below(3) == 0 { "off" } else { "require" };
    host.command(["backup", "run", "k", "--quiesce", quiesce, "--quiet"])
        .args(["--freeze-deadline", &DEADLINE.as_secs().to_string()])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

/// Kills the victim that belongs to this host; false if it is not there.
fn kill(host: &Host, victim: Victim, run: &Child) -> bool {
    let pid = match victim {
        Victim::Command => Some(run.id()),
        _ => find(host, victim.mark()),
    };
    let Some(pid) = pid else { return false };
    let status =
        std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    // A process with much memory takes a moment to be gone; until then its VM counts as running.
    let alive = || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    while victim != Victim::Command && alive() {
        std::thread::sleep(Duration::from_millis(10));
    }
    status.success()
}

/// The process whose command line names this host's folder and contains `mark`.
fn find(host: &Host, mark: &str) -> Option<u32> {
    let home = host.path().to_str().unwrap();
    std::fs::read_dir("/proc").unwrap().find_map(|entry| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        let cwd = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        (line.contains(mark) && (line.contains(home) || cwd.starts_with(home))).then_some(pid)
    })
}

fn wait(run: &mut Child, limit: Duration, seed: u64) -> ExitStatus {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = run.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "seed {seed}: the run hangs after the kill");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// I2: whatever was killed, the guest's file systems are writable again within the deadline (and
/// what an agent call takes on an emulated machine).
fn i2_guest_writes_again(vm: &Vm<'_>, since: Instant, seed: u64) {
    vm.sh("echo alive > /srv/alive && sync /srv/alive");
    let took = since.elapsed();
    let limit = DEADLINE + Duration::from_secs(10);
    assert!(took < limit, "seed {seed}: the guest could not write for {took:?}");
}

/// The next run succeeds and leaves everything as it should be.
fn aftermath(host: &Host, vm: &Vm<'_>, sum: &str, seed: u64) {
    let run = host.json(["backup", "run", "k", "--quiesce", "require"]);
    assert_eq!(vm.disk_files(), ["disk0.vhdx"], "seed {seed}: an AVHDX was orphaned");
    assert_eq!(
        host.json(["vm", "show", "k"])["config"]["checkpoints"].as_array().unwrap().len(),
        0
    );
    assert_eq!(vm.sh("sha256sum /srv/known"), sum, "seed {seed}: the guest's data changed");
    host.json(["backup", "verify", run["point"].as_str().unwrap(), "--quick"]);
    assert_eq!(host.json(["vm", "list"])[0]["pending"], serde_json::Value::Null, "seed {seed}");
}

/// The last restore point, as a new VM, holds what the guest held.
fn restored_vm_holds_the_data(host: &Host, vm: &Vm<'_>) {
    let sum = vm.sh("sha256sum /srv/known");
    host.json(["backup", "run", "k", "--quiesce", "require"]);
    vm.cut_power();
    host.json(["restore", "vm", "latest:k", "--as", "k2", "--start"]);
    let restored = Vm::existing(host, "k2");
    restored.start_again();
    assert_eq!(restored.sh("sha256sum /srv/known"), sum);
    restored.sh("tr '\\0' '?' < /srv/log | awk '$0 != \"line \" NR {print \"line \" NR \" is \" $0; exit 1}'");
    restored.cut_power();
}
