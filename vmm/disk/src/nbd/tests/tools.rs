//! The server before the real clients: nbdinfo, nbdcopy, qemu-img, qemu-io.

use std::process::{Child, Command};
use std::sync::atomic::Ordering;

use serde_json::Value;

use super::{Fixture, MemDisk, patterned};
use crate::block::{Block, ExtentKind};
use crate::nbd::{Client, Export, Server};

const MIB: usize = 1 << 20;

/// Runs a program that must succeed and gives its output.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("program installed");
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Ends a helper process also when the test fails.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nbdinfo_sees_size_block_sizes_and_capabilities() {
    let fixture = Fixture::new(MemDisk::new(8 * MIB, 4096));
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", &fixture.uri()])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["export-size"], 8 * MIB);
    assert_eq!(export["block_size_minimum"], 4096);
    assert_eq!(export["block_size_preferred"], 64 << 10);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_multi_conn"] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
}

#[test]
fn nbdinfo_lists_all_exports_and_marks_read_only_ones() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut frozen = MemDisk::new(2 * MIB, 512);
    frozen.read_only = true;
    fixture.server.add_export("frozen", std::sync::Arc::new(frozen));
    let uri = format!("nbd+unix:///?socket={}", fixture.socket.display());
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--list", "--json", &uri])).unwrap();
    let exports = info["exports"].as_array().unwrap();
    let named = |name| exports.iter().find(|e| e["export-name"] == name).unwrap();
    assert_eq!(named("disk")["is_read_only"], false);
    assert_eq!(named("frozen")["is_read_only"], true);
    assert_eq!(named("frozen")["can_zero"], false);
}

#[test]
fn nbdcopy_out_and_in_moves_every_byte() {
    let content = patterned(24 * MIB, 1);
    let fixture = Fixture::new(MemDisk::filled(&content, 512));
    fixture.disk.write_zeroes(6 << 20, 6 << 20, true).unwrap();
    let out = fixture.file("out.raw");
    run("nbdcopy", &[&fixture.uri(), &out]);
    assert!(std::fs::read(&out).unwrap() == content);

    let other = patterned(24 * MIB, 2);
    let source = fixture.file("in.raw");
    std::fs::write(&source, &other).unwrap();
    run("nbdcopy", &["--flush", &source, &fixture.uri()]);
    assert!(fixture.disk.content() == other);
    assert!(fixture.disk.flushes.load(Ordering::Relaxed) > 0);
}

#[test]
fn maps_of_nbdinfo_and_qemu_img_show_data_zeros_and_holes() {
    let fixture = Fixture::new(MemDisk::new(4 * MIB, 512));
    fixture.disk.write_at(0, &[1; MIB]).unwrap();
    fixture.disk.write_zeroes(MIB as u64, MIB as u64, true).unwrap();
    let map: Value =
        serde_json::from_str(&run("nbdinfo", &["--map", "--json", &fixture.uri()])).unwrap();
    let entries: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                e["offset"].as_u64().unwrap(),
                e["length"].as_u64().unwrap(),
                e["type"].as_u64().unwrap(),
            )
        })
        .collect();
    let mib = MIB as u64;
    assert_eq!(entries, [(0, mib, 0), (mib, mib, 2), (2 * mib, 2 * mib, 3)]);

    let map: Value = serde_json::from_str(&run(
        "qemu-img",
        &["map", "--output=json", "-f", "raw", &fixture.uri()],
    ))
    .unwrap();
    let data: Vec<_> =
        map.as_array().unwrap().iter().filter(|e| e["zero"] == false).cloned().collect();
    assert_eq!(data.len(), 1);
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&0.into(), &mib.into()));
}

#[test]
fn qemu_img_converts_both_ways() {
    let content = patterned(16 * MIB, 4);
    let fixture = Fixture::new(MemDisk::filled(&content, 512));
    let qcow = fixture.file("copy.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &fixture.uri(), &qcow]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &fixture.uri(), &qcow]);
    fixture.disk.write_zeroes(0, 16 << 20, true).unwrap();
    run("qemu-img", &["convert", "-n", "-W", "-f", "qcow2", "-O", "raw", &qcow, &fixture.uri()]);
    assert!(fixture.disk.content() == content);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let fixture = Fixture::new(MemDisk::filled(&vec![7; 4 * MIB], 512));
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 0xab 64k 128k",
            "-c",
            "write -f -P 0xcd 1M 4k",
            "-c",
            "write -z 2M 64k",
            "-c",
            "discard 3M 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0xab 64k 128k",
            "-c",
            "read -P 0 2M 64k",
            &fixture.uri(),
        ],
    );
    let content = fixture.disk.content();
    assert!(content[64 << 10..192 << 10].iter().all(|&b| b == 0xab));
    assert!(content[MIB..MIB + 4096].iter().all(|&b| b == 0xcd));
    assert!(content[2 * MIB..2 * MIB + 65536].iter().all(|&b| b == 0));
    assert!(content[3 * MIB..3 * MIB + 65536].iter().all(|&b| b == 0));
    assert_eq!(content[0], 7);
    assert!(fixture.disk.flushes.load(Ordering::Relaxed) >= 2);
    let written = fixture.server.counters("disk").written;
    assert_eq!(written, (128 << 10) + 4096);
}

#[test]
fn our_client_reads_and_writes_what_qemu_nbd_serves() {
    let dir = tempfile::TempDir::new().unwrap();
    let image = dir.path().join("image.raw");
    let socket = dir.path().join("q.sock");
    let content = patterned(4 * MIB, 5);
    std::fs::write(&image, &content).unwrap();
    let child = Command::new("qemu-nbd")
        .args(["-t", "-f", "raw", "-x", "peer", "-k"])
        .arg(&socket)
        .arg(&image)
        .spawn()
        .unwrap();
    let _child = KillOnDrop(child);
    super::eventually("qemu-nbd listens", || Client::connect(&socket, "peer").is_ok());
    let client = Client::connect(&socket, "peer").unwrap();
    let mut read = vec![1; content.len()];
    client.read_at(0, &mut read).unwrap();
    assert!(read == content);
    client.write_at(8192, &[9; 4096]).unwrap();
    client.write_zeroes(65536, 65536, true).unwrap();
    client.flush().unwrap();
    let covered: u64 = client.extents(0, 4 << 20).unwrap().iter().map(|e| e.len).sum();
    assert_eq!(covered, 4 << 20);
    let on_disk = std::fs::read(&image).unwrap();
    assert!(on_disk[8192..12288] == [9; 4096] && on_disk[65536..131_072] == [0; 65536]);
}

#[test]
fn changed_ranges_reach_nbdinfo_and_our_client() {
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("s");
    let mut disk = MemDisk::new(4 * MIB, 512);
    disk.read_only = true;
    let id = crate::rct::RctId {
        lineage: uuid::Uuid::from_u128(1),
        epoch: 7,
        seal: uuid::Uuid::from_u128(2),
    };
    let known = id.to_string();
    let export = Export::new("disk", std::sync::Arc::new(disk)).with_changed_ranges(Box::new(
        move |asked| {
            if asked != known {
                let why = "foreign".to_owned();
                return Err(crate::DiskError::UnknownRctId { id: asked.to_owned(), why });
            }
            Ok(vec![65536..131_072, 0..4096, 131_072..196_608])
        },
    ));
    let _server = Server::bind_with(&socket, vec![export]).unwrap();
    let client = Client::connect_since(&socket, "disk", &id).unwrap();
    assert_eq!(client.changed_ranges().unwrap(), vec![0..4096, 65536..196_608]);
    assert_eq!(client.extents(0, 4 << 20).unwrap()[0].kind, ExtentKind::Hole);

    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let map = run("nbdinfo", &[&format!("--map=tidemark:changed-since:{id}"), "--json", &uri]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let dirty: Vec<_> = map.as_array().unwrap().iter().filter(|e| e["type"] == 1).collect();
    assert_eq!(dirty.len(), 2);
    assert_eq!(dirty[1]["length"], 131_072);

    let foreign = crate::rct::RctId { epoch: 8, ..id };
    let error = Client::connect_since(&socket, "disk", &foreign).err().unwrap();
    assert!(matches!(error, crate::DiskError::UnknownRctId { .. }), "{error}");
}
