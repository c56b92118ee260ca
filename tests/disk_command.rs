//! `tidemark disk …` on files, and what other programs make of the results.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{Host, Random, tool};
use tidemark_disk::Block;
use tidemark_disk::chain::Chain;
use tidemark_disk::vhdx::Access;

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw image of 40 MiB and a bit: data, holes, and zeros that were written.
fn image(host: &Host) -> PathBuf {
    let path = host.path().join("in.raw");
    let file = fs::File::create(&path).unwrap();
    file.set_len(40 * MIB + 8192).unwrap();
    let mut random = Random(1);
    for at in [0, 3, 4, 5, 17, 30] {
        file.write_all_at(&random.bytes(700 << 10), at * MIB + 4096).unwrap();
    }
    file.write_all_at(&vec![0; 6 << 20], 20 * MIB).unwrap();
    path
}

/// Other programs find the file whole; the raw image has its content, with zeros after its end.
fn assert_good(file: &Path, raw: &Path) {
    tool("qemu-img", ["check", "-f", "vhdx", text(file)]);
    tool("qemu-img", ["compare", "-f", "vhdx", "-F", "raw", text(file), text(raw)]);
    assert!(tool("7z", ["t", text(file)]).contains("Everything is Ok"));
    assert!(tool("vhdiinfo", [text(file)]).contains("Virtual Hard Disk"));
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// A child with data of its own, and the whole content in a raw image.
fn child(host: &Host, base: &Path, name: &str, seed: u64) -> (PathBuf, PathBuf) {
    let path = host.path().join(name);
    host.json(["disk", "fork", text(base), text(&path)]);
    let chain = Chain::open(&path, Access::ReadWrite).unwrap();
    let mut random = Random(seed);
    chain.write_at((seed % 20) * MIB + 512, &random.bytes(300 << 10)).unwrap();
    chain.discard(30 * MIB, 2 * MIB).unwrap();
    chain.close().unwrap();
    let raw = path.with_extension("raw");
    host.json(["disk", "convert", text(&path), text(&raw), "--format", "raw"]);
    (path, raw)
}

#[test]
fn conversions_are_right_and_overwrite_nothing() {
    let host = Host::new();
    let raw = image(&host);
    for format in ["dynamic", "fixed"] {
        let disk = host.path().join(format!("{format}.vhdx"));
        let args = ["disk", "convert", text(&raw), text(&disk), "--format", format];
        let plan = host.json(args.iter().copied().chain(["--dry-run"]));
        assert!(!disk.exists() && plan["data"].as_u64().unwrap() < 20 * MIB, "{plan}");
        host.json(args);
        assert_good(&disk, &raw);
        let info = host.json(["disk", "info", text(&disk)]);
        assert_eq!(info["kind"], format);
        for extra in [&["--dry-run"][..], &[]] {
            let said = host.fails(1, args.iter().copied().chain(extra.iter().copied()));
            assert!(said.contains(&format!("{format}.vhdx")), "{said}");
        }
        let back = host.path().join(format!("{format}.raw"));
        host.json(["disk", "convert", text(&disk), text(&back), "--format", "raw"]);
        tool("cmp", [text(&raw), text(&back)]);
    }
    host.fails(5, ["disk", "convert", "/none.raw", text(&host.path().join("x.vhdx"))]);
}

#[test]
fn disks_grow_shrink_and_get_compact() {
    let host = Host::new();
    let raw = image(&host);
    for format in ["dynamic", "fixed"] {
        let disk = host.path().join(format!("{format}.vhdx"));
        host.json(["disk", "convert", text(&raw), text(&disk), "--format", format]);
        host.json(["disk", "resize", text(&disk), "100M", "--dry-run"]);
        assert_eq!(host.json(["disk", "info", text(&disk)])["size"], 40 * MIB + 8192);
        let done = host.json(["disk", "resize", text(&disk), "100M"]);
        assert_eq!(done["size"], 100 * MIB);
        assert_good(&disk, &raw);
        let said = host.fails(1, ["disk", "resize", text(&disk), "10M"]);
        assert!(said.contains("holds data up to"), "{said}");
        host.json(["disk", "resize", text(&disk), "35M"]);
        assert_eq!(host.json(["disk", "info", text(&disk)])["size"], 35 * MIB);
        assert_good(&disk, &raw);
    }
    // Data that becomes zeros.
    let disk = host.path().join("dynamic.vhdx");
    tool("qemu-io", ["-f", "vhdx", "-c", "write -P 0 0 16M", text(&disk)]);
    tool("qemu-io", ["-f", "raw", "-c", "write -P 0 0 16M", text(&raw)]);
    let before = length(&disk);
    let plan = host.json(["disk", "compact", text(&disk), "--dry-run"]);
    assert_eq!(length(&disk), before);
    let done = host.json(["disk", "compact", text(&disk)]);
    assert_eq!(done["length_after"], plan["length_after"]);
    assert_eq!(length(&disk), done["length_after"].as_u64().unwrap());
    assert!(length(&disk) + 4 * MIB < before, "{done}");
    assert_good(&disk, &raw);
}

#[test]
fn a_chain_is_forked_folded_down_and_named_anew() {
    let host = Host::new();
    let raw = image(&host);
    let base = host.path().join("base.vhdx");
    host.json(["disk", "convert", text(&raw), text(&base)]);
    let (one, _) = child(&host, &base, "one.avhdx", 5);
    let (two, two_raw) = child(&host, &one, "two.avhdx", 9);
    let info = host.json(["disk", "info", text(&two)]);
    assert_eq!(info["chain"].as_array().unwrap().len(), 3);
    assert!(tool("7z", ["t", text(&two)]).contains("Everything is Ok"));
    let map = host.json(["disk", "map", text(&two)]);
    assert!(map.as_array().unwrap().iter().any(|e| e["kind"] == "zero" && e["offset"] == 30 * MIB));

    // The base gets another name: found again by its identity only.
    let renamed = host.path().join("renamed.vhdx");
    fs::rename(&base, &renamed).unwrap();
    host.fails(5, ["disk", "check", text(&two)]);
    let other = host.path().join("other.vhdx");
    host.json(["disk", "convert", text(&raw), text(&other)]);
    let said = host.fails(7, ["disk", "set-parent", text(&one), text(&other)]);
    assert!(said.contains("changed"), "{said}");
    let found = host.json(["disk", "set-parent", text(&one), text(&renamed)]);
    assert_eq!(found["identity_matches"], true);
    host.json(["disk", "check", text(&two)]);

    let plan = host.json(["disk", "merge", text(&two), "--into", text(&renamed), "--dry-run"]);
    assert_eq!(plan["merged"].as_array().unwrap().len(), 2);
    assert!(one.exists() && two.exists());
    host.fails(5, ["disk", "merge", text(&two), "--into", text(&other)]);
    host.fails(1, ["disk", "merge", text(&two), "--levels", "3"]);
    // Somebody uses it.
    let open = Chain::open(&two, Access::ReadWrite).unwrap();
    for args in [
        &["disk", "merge", text(&two), "--levels", "2"][..],
        &["disk", "resize", text(&two), "1G"],
        &["disk", "compact", text(&two)],
        &["disk", "compact", text(&renamed)],
        &["disk", "info", text(&two)],
    ] {
        let said = host.fails(4, args.iter().copied());
        assert!(said.contains("in use"), "{said}");
    }
    drop(open);
    host.json(["disk", "merge", text(&two), "--levels", "2"]);
    assert!(!one.exists() && !two.exists());
    assert_good(&renamed, &two_raw);
}

#[test]
fn another_parent_on_demand_comes_with_a_warning() {
    let host = Host::new();
    let raw = image(&host);
    let base = host.path().join("base.vhdx");
    host.json(["disk", "convert", text(&raw), text(&base)]);
    let (one, one_raw) = child(&host, &base, "one.avhdx", 5);
    let copy = host.path().join("copy.vhdx");
    host.json(["disk", "convert", text(&raw), text(&copy)]);
    let args = ["disk", "set-parent", text(&one), text(&copy), "--ignore-identity"];
    let out = host.run(args.iter().copied().chain(["--dry-run"]));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("warning"), "{said}");
    assert_eq!(host.json(args)["identity_matches"], false);
    // The same data here, so the same content.
    let back = host.path().join("back.raw");
    host.json(["disk", "convert", text(&one), text(&back), "--format", "raw"]);
    tool("cmp", [text(&one_raw), text(&back)]);
    assert!(tool("7z", ["t", text(&one)]).contains("Everything is Ok"));
}

#[test]
fn torn_copies_are_found_and_repaired() {
    let host = Host::new();
    let raw = image(&host);
    let disk = host.path().join("d.vhdx");
    host.json(["disk", "convert", text(&raw), text(&disk)]);
    for at in [64 << 10, 192 << 10] {
        let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
        file.write_all_at(&[0xff; 512], at + 40).unwrap();
    }
    let found = host.json(["disk", "check", text(&disk)]);
    assert_eq!(found["repairable"].as_array().unwrap().len(), 2, "{found}");
    let found = host.json(["disk", "check", text(&disk), "--repair"]);
    assert_eq!(found["repaired"].as_array().unwrap().len(), 2, "{found}");
    assert!(found["repairable"].as_array().unwrap().is_empty());
    assert!(
        host.json(["disk", "check", text(&disk), "--repair"])["repaired"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert_good(&disk, &raw);
    // Beyond repair: refused, and left as it is.
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    for at in [192 << 10, 256 << 10] {
        file.write_all_at(&[0xff; 512], at + 40).unwrap();
    }
    let before = fs::read(&disk).unwrap();
    host.fails(7, ["disk", "check", text(&disk), "--repair"]);
    assert!(fs::read(&disk).unwrap() == before);
}

#[test]
fn a_vms_disk_is_not_taken_apart_by_accident() {
    let host = Host::new();
    let raw = image(&host);
    host.json(["vm", "create", "v", "--import", text(&raw)]);
    let disk = host.data_dir().join("vms/v/disks/disk0.vhdx");
    let said = host.fails(1, ["disk", "set-id", text(&disk)]);
    assert!(said.contains("the VM v") && said.contains("--force"), "{said}");
    host.json(["disk", "set-id", text(&disk), "--dry-run"]);
    assert_eq!(host.json(["disk", "info", text(&disk)])["vm"], "v");
    // Its size may change: the next backup reads what was added, and the whole comes back.
    host.add_local_target("local");
    host.json(["backup", "run", "v"]);
    host.json(["disk", "resize", text(&disk), "64M"]);
    let chain = Chain::open(&disk, Access::ReadWrite).unwrap();
    chain.write_at(60 * MIB, &[7; 4096]).unwrap();
    chain.close().unwrap();
    host.json(["backup", "run", "v"]);
    let out = host.path().join("out.raw");
    host.json(["restore", "disk", "latest:v", "disk0", "--out", text(&out), "--format", "raw"]);
    tool("qemu-img", ["compare", "-f", "vhdx", "-F", "raw", text(&disk), text(&out)]);
    assert_eq!(length(&out), 64 * MIB);
}
