//! One file against a plain model, against other programs, and against crashes.

mod crash;
mod damage;
mod failures;
mod model;
mod oracles;
mod recorder;
mod reshape;
mod structure;

use std::path::{Path, PathBuf};

use super::*;

/// A small file's options.
fn options(size: u64) -> CreateOptions {
    CreateOptions {
        size,
        block_size: 1 << 20,
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    }
}

/// Creates and opens a file.
fn made(dir: &Path, name: &str, options: &CreateOptions) -> Vhdx {
    let path = dir.join(name);
    Vhdx::create(&path, options).unwrap();
    Vhdx::open(&path, Access::ReadWrite).unwrap()
}

/// A child of an open disk.
fn child_of(parent: &Vhdx, dir: &Path, name: &str, block_size: u32) -> Vhdx {
    let p = parent.properties();
    let o = CreateOptions {
        size: p.geometry.size,
        block_size,
        logical_sector: p.geometry.logical_sector,
        physical_sector: p.geometry.physical_sector,
        fixed: false,
        disk_id: Some(p.disk_id),
        parent: Some(ParentLink {
            path: parent.path().to_owned(),
            data_write_guid: p.data_write_guid,
        }),
    };
    made(dir, name, &o)
}

/// Reads through a chain, leaf first.
fn read_chain(chain: &[&Vhdx], offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    let whole = offset..offset + len as u64;
    let mut todo = vec![whole];
    for disk in chain {
        let mut rest = Vec::new();
        for range in todo {
            let part = &mut buf[(range.start - offset) as usize..(range.end - offset) as usize];
            rest.extend(disk.read_at(range.start, part).unwrap());
        }
        todo = rest;
    }
    buf
}

/// Bytes that tell where and in which generation they were written.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8
        })
        .collect()
}

fn tool(program: &str, args: &[&str]) -> (bool, String) {
    let out = std::process::Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; `make setup` installs what the tests need"));
    let mut text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&out.stderr));
    (out.status.success(), text)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn temp() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}
