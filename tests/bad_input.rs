//! Bad input gives a clear error that names the thing, the right exit code, and loses nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{Host, Random, tool};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw image with some data.
fn image(host: &Host, name: &str, seed: u64) -> PathBuf {
    let path = host.path().join(name);
    let file = fs::File::create(&path).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut random = Random(seed);
    for i in 0..16 {
        file.write_all_at(&random.bytes(256 << 10), i * (4 << 20)).unwrap();
    }
    path
}

/// A VM with one backed-up disk.
fn backed_up(host: &Host) -> PathBuf {
    let target = host.add_local_target("local");
    let raw = image(host, "in.raw", 1);
    host.json(["vm", "create", "v", "--import", text(&raw)]);
    host.json(["backup", "run", "v"]);
    target
}

#[test]
fn truncated_vhdx_is_refused_by_name() {
    let host = Host::new();
    let disk = host.path().join("d.vhdx");
    host.json(["disk", "create", text(&disk), "--size", "64M"]);
    for len in [0, 1 << 10, 100 << 10, 300 << 10, (1 << 20) + 4096] {
        fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(len).unwrap();
        let said = host.fails(7, ["disk", "info", text(&disk)]);
        assert!(said.contains("d.vhdx"), "{said}");
        let import = host.run(["vm", "create", "v", "--import", text(&disk)]);
        let said = String::from_utf8_lossy(&import.stderr);
        assert!(!import.status.success() && said.contains("d.vhdx"), "{said}");
    }
    host.fails(5, ["vm", "show", "v"]);
}

#[test]
fn missing_and_changed_parent_are_told_apart() {
    let host = Host::new();
    backed_up(&host);
    host.json(["checkpoint", "create", "v", "--name", "before"]);
    let disks = host.data_dir().join("vms/v/disks");
    let base = disks.join("disk0.vhdx");
    let aside = disks.join("aside");
    fs::rename(&base, &aside).unwrap();
    let said = host.fails(5, ["backup", "run", "v"]);
    assert!(said.contains("disk0.vhdx"), "{said}");
    // Another program writes to the parent: its DataWriteGuid changes.
    fs::copy(&aside, &base).unwrap();
    tool("qemu-io", ["-f", "vhdx", "-c", "write -P 7 0 64k", text(&base)]);
    let said = host.fails(7, ["backup", "run", "v"]);
    assert!(said.contains("disk0.vhdx") && said.contains("changed"), "{said}");
    // The right parent back: all is well.
    fs::rename(&aside, &base).unwrap();
    host.json(["backup", "run", "v"]);
}

#[test]
fn i7_flipped_bit_in_a_pack_is_found_and_never_restored() {
    let host = Host::new();
    let target = backed_up(&host);
    let pack = largest_file(&target);
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::set_permissions(&pack, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(&pack, &bytes).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap().to_owned();
    let out = host.path().join("out.raw");
    let said = host.fails(7, ["backup", "verify", "--all"]);
    assert!(said.contains("damaged"), "{said}");
    let said = host
        .fails(7, ["restore", "disk", "latest:v", "disk0", "--format", "raw", "--out", text(&out)]);
    assert!(said.contains(&name[..8]), "{said} does not name {name}");
    assert!(!out.exists(), "a damaged disk was left as if it were good");
    let said = host.fails(7, ["restore", "vm", "latest:v", "--as", "v2"]);
    assert!(said.contains(&name[..8]), "{said}");
    host.fails(5, ["vm", "show", "v2"]);
}

fn largest_file(folder: &Path) -> PathBuf {
    let mut found = Vec::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else {
                found.push((entry.metadata().unwrap().len(), entry.path()));
            }
        }
    }
    found.into_iter().max().unwrap().1
}

#[test]
fn wrong_passphrase_is_told_from_damage() {
    let host = Host::new();
    backed_up(&host);
    let output =
        host.command(["backup", "list"]).env("TIDEMARK_PASSPHRASE", "wrong").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("passphrase"), "{said}");
    let output =
        host.command(["backup", "run", "v"]).env("TIDEMARK_PASSPHRASE", "wrong").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("passphrase") && said.contains("local"), "{said}");
    let output =
        host.command(["backup", "run", "v"]).env_remove("TIDEMARK_PASSPHRASE").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("TIDEMARK_PASSPHRASE"), "{said}");
    host.json(["backup", "run", "v"]);
}

/// A file system of a few MiB, unmounted when dropped.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    fn mount(host: &Host, mib: u64) -> Self {
        let dir = host.path().join("small");
        fs::create_dir(&dir).unwrap();
        tool("mount", ["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", text(&dir)]);
        Self(dir)
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn full_target_fails_the_run_and_loses_nothing() {
    if tool("id", ["-u"]).trim() != "0" {
        eprintln!("mounting a small file system needs root; the store's own tests cover ENOSPC");
        return;
    }
    let host = Host::new();
    let small = SmallFileSystem::mount(&host, 2);
    host.json(["target", "add", "small", text(&small.0)]);
    let raw = image(&host, "in.raw", 1);
    host.json(["vm", "create", "v", "--import", text(&raw)]);
    let said = host.fails(1, ["backup", "run", "v"]);
    assert!(said.contains("small") && said.contains("space"), "{said}");
    assert_eq!(host.json(["backup", "list"])["points"].as_array().unwrap().len(), 0);
    assert_eq!(
        host.json(["vm", "show", "v"])["config"]["checkpoints"].as_array().unwrap().len(),
        0
    );
    tool("mount", ["-o", "remount,size=64m", text(&small.0)]);
    host.json(["backup", "run", "v"]);
    host.json(["backup", "verify", "--all"]);
}

#[test]
fn unknown_names_say_where_to_look() {
    let host = Host::new();
    assert!(host.fails(5, ["vm", "show", "ghost"]).contains("tidemark vm list"));
    assert!(host.fails(5, ["backup", "show", "0123456789"]).contains("tidemark backup list"));
    assert!(host.fails(5, ["repo", "stats", "ghost"]).contains("tidemark target list"));
    host.fails(2, ["vm", "create", "v", "--disk-size", "lots"]);
    host.fails(1, ["vm", "create", "no/slashes", "--disk-size", "1G"]);
}
