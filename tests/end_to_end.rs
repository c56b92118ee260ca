//! The main job on a real Debian VM: what `tidemark` must show (restore equality, consistency of the
//! guest's file systems and database, cost of an incremental).
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use common::vm::Vm;
use common::{Host, TIDEMARK, s3, tool};
use tidemark_dedup::Compression;
use tidemark_disk::Block;
use tidemark_disk::chain::Chain;
use tidemark_disk::vhdx::Access;
use tidemark_engine::{Engine, EngineOptions, QuiesceMode};
use tidemark_exporter::{BackupReport, BackupRequest, Exporter, ReadMode, RunEvent};

/// Bytes a second reader of the checkpoint may see: its whole content, hashed.
type Hashes = BTreeMap<String, String>;

/// Backs up through the library and, while the checkpoint exists, hashes its disks by itself.
fn backup_and_hash(host: &Host, vm: &str, quiesce: QuiesceMode) -> (BackupReport, Hashes) {
    let engine =
        Engine::open(&host.data_dir(), EngineOptions { program: TIDEMARK.into() }).unwrap();
    let no_prompt = |_: &str| Some(common::PASSPHRASE.to_owned());
    let exporter = Exporter::new(&engine, &no_prompt);
    let hashes = Mutex::new(Hashes::new());
    let request = BackupRequest {
        vm: vm.to_owned(),
        targets: vec!["local".to_owned()],
        full: false,
        quiesce,
        freeze_deadline: Duration::from_secs(10),
        compression: Compression::Fast,
    };
    let on_event = |event: RunEvent| {
        if !matches!(event, RunEvent::Step { .. }) {
            return;
        }
        let config = engine.show(vm).unwrap().config;
        let Some(checkpoint) = config.checkpoints.last() else { return };
        let mut hashes = hashes.lock().unwrap();
        if hashes.is_empty() {
            for disk in &checkpoint.disks {
                let file = host.data_dir().join("vms").join(vm).join("disks").join(&disk.file);
                hashes.insert(
                    disk.name.clone(),
                    hash(&Chain::open(&file, Access::ReadOnly).unwrap()),
                );
            }
        }
    };
    let report = exporter.backup(&request, &on_event, &AtomicBool::new(false)).unwrap();
    let hashes = hashes.into_inner().unwrap();
    assert!(!hashes.is_empty(), "no step of the run showed its checkpoint");
    (report, hashes)
}

fn hash(disk: &dyn Block) -> String {
    let size = disk.geometry().size;
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let n = buf.len().min((size - at) as usize);
        disk.read_at(at, &mut buf[..n]).unwrap();
        hasher.update(&buf[..n]);
        at += n as u64;
    }
    hasher.finalize().to_string()
}

fn hash_file(path: &std::path::Path) -> String {
    blake3::Hasher::new().update_mmap(path).unwrap().finalize().to_string()
}

/// Restores a point's disk to a raw file.
fn restore_raw(host: &Host, point: &str, name: &str) -> std::path::PathBuf {
    let out = host.path().join(name);
    host.json([
        "restore",
        "disk",
        point,
        "disk0",
        "--format",
        "raw",
        "--out",
        out.to_str().unwrap(),
    ]);
    out
}

#[test]
fn restored_disk_equals_checkpoint_under_full_write_load() {
    let host = Host::new();
    host.add_local_target("local");
    let vm = Vm::create(&host, "busy");
    vm.start();
    vm.sh("nohup sh -c 'while :; do dd if=/dev/urandom of=/srv/load bs=1M count=48 conv=notrunc,fsync; done' >/dev/null 2>&1 </dev/null & echo started");
    for round in 0..3 {
        let (report, hashes) = backup_and_hash(&host, "busy", QuiesceMode::Off);
        let incremental = matches!(report.disks[0].1, ReadMode::Incremental { .. });
        assert_eq!(incremental, round > 0, "{:?}", report.disks);
        let raw = restore_raw(&host, &report.point.to_string(), &format!("round{round}.raw"));
        assert_eq!(hashes["disk0"], hash_file(&raw), "round {round}");
        std::fs::remove_file(raw).unwrap();
    }
    assert_eq!(vm.disk_files(), ["disk0.vhdx"], "an AVHDX was left behind");
    vm.cut_power();
}

#[test]
fn quiesced_point_needs_no_journal_replay_and_postgresql_starts_clean() {
    let host = Host::new();
    host.add_local_target("local");
    let service = s3::start(&host);
    let keys = s3::key_file(&host);
    host.json([
        "target",
        "add",
        "offsite",
        &service.url("e2e"),
        "--offsite",
        "--credentials-file",
        &keys,
    ]);
    let vm = Vm::create(&host, "db");
    vm.start();
    vm.sh("su postgres -c 'createdb bank && psql -q bank -c \"create table t (n bigserial primary key, at timestamptz default now())\"'");
    vm.sh("nohup su postgres -c 'while :; do psql -q bank -c \"insert into t default values\"; done' >/dev/null 2>&1 </dev/null & echo started");
    let (full, hashes) = backup_and_hash(&host, "db", QuiesceMode::Require);
    let raw = restore_raw(&host, &full.point.to_string(), "full.raw");
    assert_eq!(hashes["disk0"], hash_file(&raw));
    let features = tool("dumpe2fs", ["-h", raw.to_str().unwrap()]);
    assert!(!features.contains("needs_recovery"), "the journal needs a replay:\n{features}");

    let (second, _) = backup_and_hash(&host, "db", QuiesceMode::Require);
    let committed: u64 =
        vm.sh("su postgres -c 'psql -tA bank -c \"select count(*) from t\"'").parse().unwrap();
    host.json(["backup", "run", "db", "--quiesce", "require"]);
    vm.cut_power();
    host.json(["vm", "delete", "db", "--yes"]);

    let restored = host.json(["restore", "vm", "latest:db", "--as", "db2", "--target", "offsite"]);
    assert_ne!(restored["vm"]["id"], second.checkpoint.id.to_string());
    let db2 = Vm::existing(&host, "db2");
    db2.start();
    let rows: u64 = db2.sh("for i in $(seq 60); do su postgres -c 'psql -tA bank -c \"select count(*) from t\"' 2>/dev/null && exit 0; sleep 1; done; exit 1").parse().unwrap();
    assert!(
        rows >= committed,
        "{rows} rows restored, {committed} were committed before the backup"
    );
    // PostgreSQL itself replays its log after any backup of a running cluster; the file system does not.
    let log = db2.sh(
        "cat /var/log/postgresql/*.log 2>/dev/null; journalctl -b --no-pager -t postgres || true",
    );
    assert!(!log.contains("PANIC") && !log.contains("invalid page"), "{log}");
    db2.sh("su postgres -c 'psql -q bank -c \"reindex table t; select count(*) from t where at is null\"'");
    let dmesg = db2.sh("dmesg | grep -i 'EXT4-fs.*vda' || true");
    assert!(!dmesg.to_lowercase().contains("recover"), "{dmesg}");
    db2.cut_power();
}

#[test]
fn incremental_reads_only_changed_granules_and_an_idle_disk_costs_nothing() {
    const MIB: u64 = 1 << 20;
    let host = Host::new();
    let target = host.add_local_target("local");
    host.json(["vm", "create", "cost", "--disk-size", "4G"]);
    let mut random = common::Random(7);
    let changed = serve_and_write(&host, "cost", &mut random, 1200);
    let first = host.json(["backup", "run", "cost"]);
    assert_eq!(first["disks"][0][1]["mode"], "full");
    // A full read knows only which blocks of the file hold something, not which granules.
    assert!(first["targets"][0]["read_bytes"].as_u64().unwrap() >= changed);

    let changed = serve_and_write(&host, "cost", &mut random, 150);
    let second = host.json(["backup", "run", "cost"]);
    assert_eq!(second["disks"][0][1]["mode"], "incremental");
    let read = second["targets"][0]["read_bytes"].as_u64().unwrap();
    assert!(read <= changed + MIB, "read {read} bytes for {changed} changed");

    let before = folder_bytes(&target);
    let third = host.json(["backup", "run", "cost"]);
    assert_eq!(third["targets"][0]["read_bytes"], 0);
    let stored = folder_bytes(&target) - before;
    assert!(stored < 64 << 10, "an idle disk cost {stored} bytes");
    assert_eq!(third["targets"][0]["stored_bytes"].as_u64().unwrap(), stored, "I9");
}

/// Writes `count` random 4 KiB blocks through `disk serve` and gives the bytes of granules touched.
fn serve_and_write(host: &Host, vm: &str, random: &mut common::Random, count: usize) -> u64 {
    let socket = host.path().join("d.sock");
    let mut server = host
        .command(["disk", "serve", vm, "disk0", "--socket", socket.to_str().unwrap()])
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(server.try_wait().unwrap().is_none(), "disk serve ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    let uri = format!("nbd+unix:///disk0?socket={}", socket.display());
    let mut script = vec!["-f".to_owned(), "raw".to_owned()];
    let mut granules = std::collections::BTreeSet::new();
    for _ in 0..count {
        let block = random.below((4 << 30) / 4096);
        granules.insert(block / 16);
        script.extend([
            "-c".to_owned(),
            format!("write -q -P {} {} 4k", 1 + random.below(255), block * 4096),
        ]);
    }
    script.extend(["-c".to_owned(), "flush".to_owned(), uri]);
    tool("qemu-io", &script);
    tool("kill", ["-INT", &server.id().to_string()]);
    assert!(server.wait().unwrap().success());
    granules.len() as u64 * (64 << 10)
}

fn folder_bytes(folder: &std::path::Path) -> u64 {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        sum += if entry.file_type().unwrap().is_dir() {
            folder_bytes(&entry.path())
        } else {
            entry.metadata().unwrap().len()
        };
    }
    sum
}
