//! Memory of a backup of a large disk, measured in a process of its own.

use std::process::Command;

use bytes::Bytes;
use tidemark_dedup::{CHUNK, Compression, StoreCredentials, open_store};

use crate::support::*;

/// Room for the exporter's own buffers within the 256 MiB that a backup may take.
const LIMIT_KIB: u64 = 208 * 1024;

#[test]
fn a_backup_of_a_sparse_tebibyte_stays_within_its_memory() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory::sparse_tebibyte", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let peak = text.lines().find_map(|line| line.strip_prefix("peak KiB: ")).unwrap();
    let peak: u64 = peak.trim().parse().unwrap();
    assert!(peak < LIMIT_KIB, "peak memory {peak} KiB");
}

#[test]
#[ignore = "run by a_backup_of_a_sparse_tebibyte_stays_within_its_memory"]
fn sparse_tebibyte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repo");
    let store = open_store(path.to_str().unwrap(), &StoreCredentials::default()).unwrap();
    let repository = create(store);
    let size = 1u64 << 40;
    let mut writer = repository.begin(Compression::Default).unwrap();
    let mut disk = writer.disk(size, None).unwrap();
    // 320 extents of 1 MiB that do not compress: five packs in a row.
    for n in 0..320u64 {
        let seed = n.to_le_bytes();
        let mut data = vec![0; 1 << 20];
        blake3::Hasher::new().update(&seed).finalize_xof().fill(&mut data);
        disk.write(size / 320 * n / CHUNK * CHUNK, Bytes::from(data)).unwrap();
    }
    let root = disk.finish().unwrap();
    let stats = writer.commit(manifest(1, vec![("disk0", root.clone())])).unwrap().stats;
    assert_eq!(stats.new_bytes, 320 << 20);
    assert!(stats.stored_bytes < 322 << 20, "{stats:?}");
    let reader = repository.open_disk(&root).unwrap();
    assert_eq!(reader.data_ranges(0..size).unwrap().len(), 320);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("\npeak KiB: {}", peak.trim().trim_end_matches(" kB"));
}
