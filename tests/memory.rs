//! A backup's memory does not grow with the disk.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

mod common;

use std::os::unix::fs::FileExt;

use common::Host;

#[test]
fn backup_of_a_sparse_tebibyte_stays_under_256_mib() {
    let host = Host::new();
    host.add_local_target("local");
    let image = host.path().join("big.raw");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(1 << 40).unwrap();
    let mut random = common::Random(3);
    for i in 0..256 {
        file.write_all_at(&random.bytes(1 << 20), i << 32).unwrap();
    }
    drop(file);
    host.json(["vm", "create", "big", "--import", image.to_str().unwrap()]);
    for expected in ["full", "incremental"] {
        let mut child = host
            .command(["backup", "run", "big", "--json"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let kib = peak_kib(&mut child);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let run: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(run["disks"][0][1]["mode"], expected);
        assert!(kib < 256 << 10, "{expected} backup took {kib} KiB");
    }
    let out = host.path().join("out.raw");
    host.json([
        "restore",
        "disk",
        "latest:big",
        "disk0",
        "--format",
        "raw",
        "--out",
        out.to_str().unwrap(),
    ]);
    common::tool("cmp", ["-n", "8G", image.to_str().unwrap(), out.to_str().unwrap()]);
}

/// Watches a process to its end and gives its largest resident size. The kernel keeps the high-water
/// mark, so only growth in the last few milliseconds can be missed.
fn peak_kib(child: &mut std::process::Child) -> u64 {
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let mark =
            status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(mark.and_then(|m| m.trim().parse().ok()).unwrap_or(0));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(peak > 0, "the process ended before it was seen");
    peak
}
