//! A backup's memory does not grow with the disk.

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
        let report = host.path().join("time");
        let output = std::process::Command::new("/usr/bin/time")
            .args(["-f", "%M", "-o", report.to_str().unwrap(), common::TIDEMARK, "backup", "run", "big", "--json"])
            .env("TIDEMARK_DATA_DIR", host.data_dir())
            .env("TIDEMARK_PASSPHRASE", common::PASSPHRASE)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let run: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(run["disks"][0][1]["mode"], expected);
        let kib: u64 = std::fs::read_to_string(&report).unwrap().trim().parse().unwrap();
        assert!(kib < 256 << 10, "{expected} backup took {kib} KiB");
    }
    let out = host.path().join("out.raw");
    host.json(["restore", "disk", "latest:big", "disk0", "--format", "raw", "--out", out.to_str().unwrap()]);
    common::tool("cmp", ["-n", "8G", image.to_str().unwrap(), out.to_str().unwrap()]);
}
