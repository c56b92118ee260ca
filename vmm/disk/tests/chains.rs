//! Chains as other tools see them: what we freeze and close, they read.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use tidemark_disk::Block;
use tidemark_disk::chain::{Chain, delete_disk_files};
use tidemark_disk::vhdx::{Access, CreateOptions};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 40 * MIB;

fn create(folder: &Path, block_size: u32) -> Chain {
    let base = folder.join("disk.vhdx");
    let options = CreateOptions {
        size: SIZE,
        block_size,
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    };
    Chain::create(&base, &options).unwrap();
    Chain::open(&base, Access::ReadWrite).unwrap()
}

/// Writes through the chain and into the model: a whole block, parts of blocks, and zeros.
fn change(chain: &Chain, model: &mut [u8], fill: u8) {
    let at = u64::from(fill) * 3 * MIB;
    let parts = [(at, 2 * MIB), (at + 5 * MIB / 2, 1536), (at + 4 * MIB - 512, 136 * 512)];
    for (offset, len) in parts {
        let data: Vec<u8> = (0..len).map(|i| fill ^ (i / 512) as u8).collect();
        chain.write_at(offset, &data).unwrap();
        model[offset as usize..(offset + len) as usize].copy_from_slice(&data);
    }
    // Over what the file below holds, whole blocks and parts.
    let (offset, len) = (at - 2 * MIB, 2 * MIB + 4096);
    chain.discard(offset, len).unwrap();
    model[offset as usize..(offset + len) as usize].fill(0);
}

fn checkpoint(chain: &Chain, new: &Path) {
    chain.prepare_leaf(new).unwrap();
    let pause = chain.pause();
    chain.switch_leaf(&pause, new).unwrap();
    drop(pause);
    chain.settle().unwrap();
}

fn merge(chain: &Chain, child: &Path) {
    chain.merge(child, &|_| (), &AtomicBool::new(false)).unwrap();
    delete_disk_files(child).unwrap();
}

fn run(program: &str, args: &[&str]) -> Vec<u8> {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    out.stdout
}

fn assert_7z_reads(file: &Path, model: &[u8]) {
    let file = file.to_str().unwrap();
    run("7z", &["t", file]);
    let read = run("7z", &["x", "-so", file]);
    assert_eq!(read.len(), model.len());
    let wrong = read.chunks(512).zip(model.chunks(512)).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "7-Zip reads this sector of {file} differently");
}

#[test]
fn a_chain_of_three_reads_the_same_through_7zip() {
    for block_size in [1 << 20, 8 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let chain = create(folder.path(), block_size);
        let mut model = vec![0; SIZE as usize];
        let mut frozen = Vec::new();
        for i in 1..=2 {
            change(&chain, &mut model, i);
            let old = chain.files().pop().unwrap();
            checkpoint(&chain, &folder.path().join(format!("disk_{i}.avhdx")));
            // At once, while the new leaf is in use.
            assert_7z_reads(&old, &model);
            frozen.push((old, model.clone()));
        }
        change(&chain, &mut model, 3);
        let leaf = chain.files().pop().unwrap();
        chain.close().unwrap();
        assert_7z_reads(&leaf, &model);
        for (file, then) in &frozen {
            assert_7z_reads(file, then);
            run("vhdiinfo", &[file.to_str().unwrap()]);
        }
    }
}

#[test]
fn a_merged_chain_is_a_plain_disk_for_everyone() {
    let folder = tempfile::tempdir().unwrap();
    let chain = create(folder.path(), 1 << 20);
    let mut model = vec![0; SIZE as usize];
    for i in 1..=3 {
        change(&chain, &mut model, i);
        checkpoint(&chain, &folder.path().join(format!("disk_{i}.avhdx")));
    }
    change(&chain, &mut model, 4);
    // A file in the middle first, then the leaf, then the rest.
    for index in [2, 2, 1] {
        merge(&chain, &chain.files()[index]);
    }
    let base = chain.files().pop().unwrap();
    chain.close().unwrap();
    assert_7z_reads(&base, &model);
    run("qemu-img", &["check", base.to_str().unwrap()]);
    let raw = folder.path().join("disk.raw");
    run("qemu-img", &["convert", "-O", "raw", base.to_str().unwrap(), raw.to_str().unwrap()]);
    assert!(std::fs::read(&raw).unwrap() == model, "qemu-img reads the disk differently");
}

#[test]
fn a_middle_merge_leaves_a_chain_that_7zip_follows() {
    let folder = tempfile::tempdir().unwrap();
    let chain = create(folder.path(), 2 << 20);
    let mut model = vec![0; SIZE as usize];
    let mut images = Vec::new();
    for i in 1..=3 {
        change(&chain, &mut model, i);
        images.push(model.clone());
        checkpoint(&chain, &folder.path().join(format!("disk_{i}.avhdx")));
    }
    change(&chain, &mut model, 4);
    let files = chain.files();
    merge(&chain, &files[1]);
    // The re-pointed file is frozen again, and follows its new parent.
    assert_eq!(chain.files(), [&*files[0], &*files[2], &*files[3]]);
    assert_7z_reads(&files[2], &images[2]);
    // The file merged into holds what the merged one held.
    assert_7z_reads(&files[0], &images[1]);
    chain.close().unwrap();
    assert_7z_reads(&files[3], &model);
}

#[test]
fn a_disk_made_by_qemu_img_gets_checkpoints_and_tracking() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("disk.vhdx");
    let path = base.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "vhdx", path, "40M"]);
    run("qemu-io", &["-f", "vhdx", "-c", "write -P 0x5a 1M 3M", path]);
    let mut model = vec![0; SIZE as usize];
    model[MIB as usize..4 * MIB as usize].fill(0x5a);
    let chain = Chain::open(&base, Access::ReadWrite).unwrap();
    change(&chain, &mut model, 1);
    checkpoint(&chain, &folder.path().join("disk_1.avhdx"));
    let id = Chain::open(&base, Access::ReadOnly).unwrap().last_seal().unwrap();
    chain.write_at(30 * MIB, &[9; 512]).unwrap();
    model[30 * MIB as usize..][..512].fill(9);
    let changed = 30 * MIB..30 * MIB + 65_536;
    assert_eq!(chain.changed_since(&id).unwrap(), std::slice::from_ref(&changed));
    merge(&chain, &chain.files()[1]);
    assert_eq!(chain.changed_since(&id).unwrap(), [changed]);
    chain.close().unwrap();
    assert_7z_reads(&base, &model);
}
