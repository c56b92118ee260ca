//! Files against other programs: what they read of ours, what we read of theirs.

use std::io::Read;
use std::process::{Command, Stdio};

use super::*;

const MIB: u64 = 1 << 20;
/// Not a whole number of blocks. 7-Zip takes only multiples of 8 sectors, of other writers too.
const SIZE: u64 = 35 * MIB + 3 * 4096;

/// Small pseudo-random numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Scattered writes and zeros; the model holds what the disk must read as.
fn scatter(disk: &Vhdx, model: &mut [u8], seed: u64) {
    let mut numbers = Numbers(seed);
    let sectors = model.len() as u64 / 512;
    for _ in 0..40 {
        let longest = [9, 300, 5000][numbers.below(3) as usize];
        let at = numbers.below(sectors);
        let len = (1 + numbers.below(longest)).min(sectors - at) * 512;
        let range = (at * 512) as usize..(at * 512 + len) as usize;
        if numbers.below(4) == 0 {
            disk.write_zeroes(at * 512, len).unwrap();
            model[range].fill(0);
        } else {
            let data = pattern(numbers.below(1 << 30), len as usize);
            disk.write_at(at * 512, &data).unwrap();
            model[range].copy_from_slice(&data);
        }
    }
}

fn succeeds(program: &str, args: &[&str]) -> String {
    let (ok, said) = tool(program, args);
    assert!(ok, "{program} {args:?}: {said}");
    said
}

/// Compares what a program writes to its output with a disk's content.
fn assert_output_is(program: &str, args: &[&str], size: u64, read: impl Fn(u64, usize) -> Vec<u8>) {
    let mut child = Command::new(program)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}; `make setup` installs what the tests need"));
    let mut output = child.stdout.take().unwrap();
    let mut theirs = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let n = (size - at).min(1 << 20) as usize;
        output.read_exact(&mut theirs[..n]).unwrap();
        assert!(theirs[..n] == read(at, n), "{program} {args:?} differs at {at} for {n}");
        at += n as u64;
    }
    assert_eq!(output.read(&mut theirs).unwrap(), 0, "longer than the disk");
    assert!(child.wait().unwrap().success());
}

#[test]
fn qemu_and_7zip_read_what_we_write() {
    let (_keep, dir) = temp();
    for (i, (block_size, fixed, size)) in [
        (1, false, SIZE),
        (2, false, SIZE + 512),
        (32, false, SIZE),
        (1, true, SIZE),
        (8, true, SIZE + 512),
    ]
    .into_iter()
    .enumerate()
    {
        let o = CreateOptions { block_size: block_size << 20, fixed, ..options(size) };
        let disk = made(&dir, &format!("{i}.vhdx"), &o);
        let path = disk.path().to_owned();
        let raw = dir.join(format!("{i}.img"));
        let mut model = vec![0; size as usize];
        scatter(&disk, &mut model, i as u64);
        drop(disk);
        std::fs::write(&raw, &model).unwrap();
        succeeds("qemu-img", &["check", "-f", "vhdx", text(&path)]);
        succeeds("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", text(&path), text(&raw)]);
        let said = succeeds("vhdiinfo", &[text(&path)]);
        assert!(said.contains(&format!("({size} bytes)")), "{said}");
        assert!(said.contains(if fixed { "Fixed" } else { "Dynamic" }), "{said}");
        if size == SIZE {
            assert!(succeeds("7z", &["t", text(&path)]).contains("Everything is Ok"));
            assert_output_is("7z", &["x", "-so", text(&path)], size, |at, n| {
                model[at as usize..][..n].to_vec()
            });
        }
    }
}

#[test]
fn seven_zip_lists_the_properties_we_wrote() {
    let (_keep, dir) = temp();
    let base = made(&dir, "base.vhdx", &options(SIZE));
    let leaf = child_of(&base, &dir, "leaf.avhdx", 2 << 20);
    leaf.write_at(512, &[1; 512]).unwrap();
    let (b, l) = (base.properties(), leaf.properties());
    // 7-Zip prints the bytes in file order, but the linkage as a GUID.
    let bytes = |id: uuid::Uuid| -> String {
        id.to_bytes_le().iter().map(|b| format!("{b:02x}")).collect()
    };
    let path = leaf.path().to_owned();
    drop((base, leaf));
    let said = succeeds("7z", &["l", "-slt", text(&path)]);
    for line in [
        "Type = VHDX".to_owned(),
        "Creator Application = Tidemark".to_owned(),
        format!("VirtualDiskSize: {SIZE}"),
        format!("Id: {}", bytes(b.disk_id)),
        format!("DataWriteGuid: {}", bytes(l.data_write_guid)),
        "HasParent: +".to_owned(),
        "BlockSize: 2097152".to_owned(),
        "LogicalSectorSize: 512".to_owned(),
        "PhysicalSectorSize: 4096".to_owned(),
        format!("parent_linkage: {}", b.data_write_guid.braced()),
        "relative_path: .\\base.vhdx".to_owned(),
    ] {
        assert!(said.contains(&line), "no {line} in {said}");
    }
    assert!(!said.contains("ERROR") && !said.contains("WARNING"), "{said}");
}

#[test]
fn we_read_and_continue_what_qemu_writes() {
    let (_keep, dir) = temp();
    let raw = dir.join("source.img");
    let mut model = vec![0; SIZE as usize];
    for (i, piece) in model.chunks_mut(70_000).enumerate().filter(|(i, _)| i % 5 < 2) {
        piece.copy_from_slice(&pattern(i as u64, piece.len()));
    }
    std::fs::write(&raw, &model).unwrap();
    for kind in ["dynamic", "fixed"] {
        for block_size in ["1M", "2M", "32M"] {
            let path = dir.join(format!("{kind}{block_size}.vhdx"));
            let o = format!("subformat={kind},block_size={block_size}");
            let (from, to) = (text(&raw), text(&path));
            succeeds("qemu-img", &["convert", "-f", "raw", "-O", "vhdx", "-o", &o, from, to]);
            assert!(check(&path).unwrap().problems.is_empty());
            let disk = Vhdx::open(&path, Access::ReadOnly).unwrap();
            assert!(read_chain(&[&disk], 0, SIZE as usize) == model, "{o}");
            drop(disk);
            let disk = Vhdx::open(&path, Access::ReadWrite).unwrap();
            let mut changed = model.clone();
            scatter(&disk, &mut changed, 5);
            drop(disk);
            let target = dir.join("changed.img");
            std::fs::write(&target, &changed).unwrap();
            succeeds("qemu-img", &["check", "-f", "vhdx", to]);
            succeeds("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", to, text(&target)]);
        }
    }
}

#[test]
fn we_read_what_qemu_adds_to_our_file() {
    let (_keep, dir) = temp();
    let disk = made(&dir, "d.vhdx", &options(SIZE));
    let path = disk.path().to_owned();
    let mut model = vec![0; SIZE as usize];
    scatter(&disk, &mut model, 77);
    drop(disk);
    let mut args = vec!["-f".to_owned(), "vhdx".to_owned()];
    for (i, (at, len)) in [(0, 512), (3 * MIB - 512, 4096), (20 * MIB, 5 * MIB), (SIZE - 512, 512)]
        .into_iter()
        .enumerate()
    {
        args.extend(["-c".to_owned(), format!("write -P {} {at} {len}", i + 1)]);
        model[at as usize..(at + len) as usize].fill(i as u8 + 1);
    }
    args.push(text(&path).to_owned());
    succeeds("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    let disk = Vhdx::open(&path, Access::ReadWrite).unwrap();
    assert!(read_chain(&[&disk], 0, SIZE as usize) == model);
    scatter(&disk, &mut model, 78);
    drop(disk);
    let raw = dir.join("model.img");
    std::fs::write(&raw, &model).unwrap();
    succeeds("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", text(&path), text(&raw)]);
}

/// A chain from base to leaf with the given block sizes in MiB, closed, and what its leaf reads as.
fn chain_of_three(dir: &Path, blocks: [u32; 3], size: u64, seed: u64) -> (Vec<PathBuf>, Vec<u8>) {
    let mut model = vec![0; size as usize];
    let o = CreateOptions { block_size: blocks[0] << 20, ..options(size) };
    let base = made(dir, "base.vhdx", &o);
    scatter(&base, &mut model, seed);
    let middle = child_of(&base, dir, "middle.avhdx", blocks[1] << 20);
    scatter(&middle, &mut model, seed + 1);
    let leaf = child_of(&middle, dir, "leaf.avhdx", blocks[2] << 20);
    scatter(&leaf, &mut model, seed + 2);
    // A whole block that must not show the parent's data.
    leaf.write_zeroes(0, 32 * MIB).unwrap();
    model[..32 << 20].fill(0);
    leaf.write_at(MIB, &pattern(9, 3 * 512)).unwrap();
    model[MIB as usize..][..3 * 512].copy_from_slice(&pattern(9, 3 * 512));
    (vec![base.path().to_owned(), middle.path().to_owned(), leaf.path().to_owned()], model)
}

#[test]
fn seven_zip_reads_mixed_chains_as_we_do() {
    for (i, blocks) in [[1, 2, 32], [32, 1, 2], [2, 32, 1]].into_iter().enumerate() {
        let (_keep, dir) = temp();
        let (paths, model) = chain_of_three(&dir, blocks, 70 * MIB + 4096, 100 * i as u64);
        let disks: Vec<_> =
            paths.iter().rev().map(|p| Vhdx::open(p, Access::ReadOnly).unwrap()).collect();
        let all: Vec<_> = disks.iter().collect();
        assert!(read_chain(&all, 0, model.len()) == model, "{blocks:?}");
        let leaf = text(&paths[2]);
        assert!(succeeds("7z", &["t", leaf]).contains("Everything is Ok"));
        assert_output_is("7z", &["x", "-so", leaf], model.len() as u64, |at, n| {
            model[at as usize..][..n].to_vec()
        });
        for path in &paths[1..] {
            assert!(succeeds("vhdiinfo", &[text(path)]).contains("Differential"));
        }
    }
}

#[test]
fn seven_zip_finds_the_bitmaps_of_a_second_chunk() {
    let (_keep, dir) = temp();
    let size = (4 << 30) + 9 * MIB;
    let base = made(&dir, "base.vhdx", &CreateOptions { block_size: 32 << 20, ..options(size) });
    base.write_at(4 << 30, &pattern(1, 9 << 20)).unwrap();
    let leaf = child_of(&base, &dir, "leaf.avhdx", 1 << 20);
    for at in [5 * MIB, (4 << 30) - 512, (4 << 30) + 512, (4 << 30) + 3 * MIB + 1024, size - 512] {
        leaf.write_at(at, &pattern(at, 512)).unwrap();
    }
    leaf.write_zeroes((4 << 30) + 5 * MIB, 2 * MIB).unwrap();
    let paths = [leaf.path().to_owned(), base.path().to_owned()];
    drop((leaf, base));
    let disks = paths.clone().map(|p| Vhdx::open(&p, Access::ReadOnly).unwrap());
    assert_output_is("7z", &["x", "-so", text(&paths[0])], size, |at, n| {
        read_chain(&[&disks[0], &disks[1]], at, n)
    });
}

#[test]
fn seven_zip_reads_partial_blocks_of_4k_sectors() {
    let (_keep, dir) = temp();
    // 7-Zip refuses some sizes that are no multiple of the block size when sectors are 4 KiB.
    let size = 10 * MIB;
    let base = made(&dir, "base.vhdx", &CreateOptions { logical_sector: 4096, ..options(size) });
    base.write_at(0, &pattern(1, 5 << 20)).unwrap();
    let leaf = child_of(&base, &dir, "leaf.avhdx", 2 << 20);
    for at in [0, 3 * MIB - 4096, 3 * MIB + 8192, size - 4096] {
        leaf.write_at(at, &pattern(at + 2, 4096)).unwrap();
    }
    let paths = [leaf.path().to_owned(), base.path().to_owned()];
    drop((leaf, base));
    let disks = paths.clone().map(|p| Vhdx::open(&p, Access::ReadOnly).unwrap());
    assert_output_is("7z", &["x", "-so", text(&paths[0])], size, |at, n| {
        read_chain(&[&disks[0], &disks[1]], at, n)
    });
}
