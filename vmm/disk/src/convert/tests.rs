use std::sync::Mutex;

use super::*;

const MIB: u64 = 1 << 20;

fn quiet(_: CopyProgress) {}

/// A disk with data at its edges, over piece and buffer borders, and with written zeros.
fn source(dir: &Path, size: u64) -> RawFile {
    let disk = RawFile::create(&dir.join("source.img"), size).unwrap();
    let put = |at: u64, len: usize| {
        let data: Vec<u8> =
            (0..len).map(|i| ((at as usize + i) * 31 / 7 % 255 + 1) as u8).collect();
        disk.write_at(at, &data).unwrap();
    };
    put(0, 512);
    put(3 * MIB - 512, 1024);
    put(9 * MIB + 4096, (2 * MIB) as usize);
    put(size - 512, 512);
    disk.write_at(20 * MIB, &vec![0; MIB as usize]).unwrap();
    disk
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn every_format_holds_the_same_disk() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path(), 130 * MIB + 512);
    let go = |name: &str, format, block_size| {
        let dst = dir.path().join(name);
        convert(&src, &dst, format, block_size, &quiet, &AtomicBool::new(false)).unwrap();
        dst
    };
    let raw = RawFile::open(&go("r.img", Format::Raw, None), Access::ReadOnly).unwrap();
    assert_eq!(compare(&src, &raw).unwrap(), None);
    let pairs = [(Format::Dynamic, None), (Format::Dynamic, Some(32 << 20)), (Format::Fixed, None)];
    for (i, (format, block_size)) in pairs.into_iter().enumerate() {
        let path = go(&format!("{i}.vhdx"), format, block_size);
        let disk = Standalone(Vhdx::open(&path, Access::ReadOnly).unwrap());
        assert_eq!(compare(&src, &disk).unwrap(), None, "{format:?}");
        assert!(!disk.0.needs_replay());
    }
    assert_eq!(names(dir.path()), ["0.vhdx", "1.vhdx", "2.vhdx", "r.img", "source.img"]);
}

#[test]
fn zeros_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path(), 64 * MIB);
    let dst = RawFile::create(&dir.path().join("d.img"), 64 * MIB).unwrap();
    let seen = Mutex::new(Vec::new());
    let note = |p: CopyProgress| seen.lock().unwrap().push(p.done);
    let written = copy(&src, &dst, &note, &AtomicBool::new(false)).unwrap();
    assert_eq!(written, PIECE + 2 * PIECE + (2 * MIB + PIECE) + PIECE);
    let holes: u64 = dst
        .extents(0, 64 * MIB)
        .unwrap()
        .iter()
        .filter(|e| e.kind == ExtentKind::Hole)
        .map(|e| e.len)
        .sum();
    assert_eq!(holes, 64 * MIB - written);
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&(64 * MIB)));
}

#[test]
fn disks_that_differ_anywhere_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path(), 130 * MIB);
    let dst = RawFile::create(&dir.path().join("d.img"), 130 * MIB).unwrap();
    copy(&src, &dst, &quiet, &AtomicBool::new(false)).unwrap();
    for at in [0, 3 * MIB - 512, 70 * MIB, 130 * MIB - 512] {
        let mut sector = [0; 512];
        dst.read_at(at, &mut sector).unwrap();
        let mut changed = sector;
        changed[511] ^= 1;
        dst.write_at(at, &changed).unwrap();
        assert_eq!(compare(&src, &dst).unwrap(), Some(at + 511));
        assert_eq!(compare(&dst, &src).unwrap(), Some(at + 511));
        dst.write_at(at, &sector).unwrap();
    }
    assert_eq!(compare(&src, &dst).unwrap(), None);
    let longer = RawFile::create(&dir.path().join("l.img"), 131 * MIB).unwrap();
    copy(&src, &longer, &quiet, &AtomicBool::new(false)).unwrap();
    assert_eq!(compare(&src, &longer).unwrap(), Some(130 * MIB));
    assert!(copy(&longer, &src, &quiet, &AtomicBool::new(false)).is_err());
}

#[test]
fn disks_with_other_sectors_are_copied_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path(), 32 * MIB + 512);
    let path = dir.path().join("4k.vhdx");
    let options = CreateOptions {
        size: 32 * MIB + 4096,
        block_size: 1 << 20,
        logical_sector: 4096,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    };
    Vhdx::create(&path, &options).unwrap();
    let dst = Standalone(Vhdx::open(&path, Access::ReadWrite).unwrap());
    copy(&src, &dst, &quiet, &AtomicBool::new(false)).unwrap();
    assert_eq!(compare(&src, &dst).unwrap(), Some(32 * MIB + 512), "only the sizes differ");
}

#[test]
fn an_existing_file_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path(), 32 * MIB);
    let dst = dir.path().join("d.img");
    std::fs::write(&dst, b"mine").unwrap();
    let run = |cancel: &AtomicBool| convert(&src, &dst, Format::Raw, None, &quiet, cancel);
    assert!(run(&AtomicBool::new(false)).is_err());
    assert_eq!(std::fs::read(&dst).unwrap(), b"mine");
    std::fs::remove_file(&dst).unwrap();
    // One that comes up during the copy.
    let late = |_: CopyProgress| std::fs::write(&dst, b"mine").unwrap();
    assert!(convert(&src, &dst, Format::Fixed, None, &late, &AtomicBool::new(false)).is_err());
    assert_eq!(std::fs::read(&dst).unwrap(), b"mine");
    assert_eq!(names(dir.path()), ["d.img", "source.img"]);
}

#[test]
fn cancel_and_failure_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let src = source(dir.path(), 64 * MIB);
    let dst = dir.path().join("d.vhdx");
    let cancel = AtomicBool::new(false);
    let stop = |_: CopyProgress| cancel.store(true, Ordering::Relaxed);
    for format in [Format::Raw, Format::Dynamic, Format::Fixed] {
        cancel.store(false, Ordering::Relaxed);
        let done = convert(&src, &dst, format, None, &stop, &cancel);
        assert!(matches!(done, Err(DiskError::Cancelled)), "{done:?}");
    }
    // The source fails in the middle.
    let file = std::fs::OpenOptions::new().write(true).open(src.path()).unwrap();
    file.set_len(10 * MIB).unwrap();
    let done = convert(&src, &dst, Format::Raw, None, &quiet, &AtomicBool::new(false));
    assert!(matches!(done, Err(DiskError::Io { .. })), "{done:?}");
    assert_eq!(names(dir.path()), ["source.img"]);
}
