use super::*;

fn image(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn odd_file_is_a_whole_number_of_sectors_and_ends_in_zeros() {
    let (_dir, path) = image(&[7; 1000]);
    let disk = RawFile::open(&path, Access::ReadWrite).unwrap();
    assert_eq!(disk.geometry().size, 1024);
    let mut buf = [1; 1024];
    disk.read_at(0, &mut buf).unwrap();
    assert_eq!((&buf[..1000], &buf[1000..]), (&[7; 1000][..], &[0; 24][..]));
    disk.write_at(512, &[9; 512]).unwrap();
    disk.flush().unwrap();
    disk.read_at(512, &mut buf[..512]).unwrap();
    assert_eq!(buf[..512], [9; 512]);
    assert!(matches!(disk.read_at(512, &mut buf), Err(DiskError::OutOfRange { .. })));
    assert!(matches!(disk.read_at(8, &mut buf[..512]), Err(DiskError::OutOfRange { .. })));
}

#[test]
fn a_file_cut_while_open_is_an_error_not_zeros() {
    let (_dir, path) = image(&[7; 4096]);
    let disk = RawFile::open(&path, Access::ReadOnly).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(2048).unwrap();
    assert!(matches!(disk.read_at(0, &mut [0; 4096]), Err(DiskError::Io { .. })));
}

#[test]
fn extents_follow_writes_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RawFile::create(&dir.path().join("d.img"), 8 << 20).unwrap();
    let whole = |kind| vec![Extent { offset: 0, len: 8 << 20, kind }];
    assert_eq!(disk.extents(0, 8 << 20).unwrap(), whole(ExtentKind::Hole));
    disk.write_at(1 << 20, &[1; 1 << 20]).unwrap();
    disk.write_at(5 << 20, &[1; 1 << 20]).unwrap();
    let kinds = |d: &RawFile| -> Vec<_> {
        let found = d.extents(0, 8 << 20).unwrap();
        found.iter().map(|e| (e.offset >> 20, e.len >> 20, e.kind)).collect()
    };
    use ExtentKind::{Data, Hole};
    assert_eq!(
        kinds(&disk),
        [(0, 1, Hole), (1, 1, Data), (2, 3, Hole), (5, 1, Data), (6, 2, Hole)]
    );
    let inside = disk.extents((1 << 20) + 512, 1024).unwrap();
    assert_eq!(inside, [Extent { offset: (1 << 20) + 512, len: 1024, kind: Data }]);
    disk.discard(1 << 20, 1 << 20).unwrap();
    assert_eq!(kinds(&disk), [(0, 5, Hole), (5, 1, Data), (6, 2, Hole)]);
    disk.write_zeroes(5 << 20, 1 << 20, false).unwrap();
    let mut buf = vec![1; 8 << 20];
    disk.read_at(0, &mut buf).unwrap();
    assert!(buf.iter().all(|b| *b == 0));
}

#[test]
fn what_is_no_image_is_refused() {
    let (dir, path) = image(&[]);
    assert!(matches!(RawFile::open(&path, Access::ReadOnly), Err(DiskError::Unsupported { .. })));
    assert!(RawFile::open(dir.path(), Access::ReadOnly).is_err());
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    assert!(matches!(RawFile::open(&pipe, Access::ReadOnly), Err(DiskError::Unsupported { .. })));
    assert!(RawFile::create(&path, 512).is_err(), "creating replaces nothing");
    assert!(RawFile::create(&dir.path().join("zero"), 0).is_err());
    assert!(!dir.path().join("zero").exists());
}

#[test]
fn writer_excludes_others_and_readers_cannot_write() {
    let (_dir, path) = image(&[0; 4096]);
    let writer = RawFile::open(&path, Access::ReadWrite).unwrap();
    let busy = |access| matches!(RawFile::open(&path, access), Err(DiskError::Busy { .. }));
    assert!(busy(Access::ReadOnly) && busy(Access::ReadWrite));
    drop(writer);
    let reader = RawFile::open(&path, Access::ReadOnly).unwrap();
    assert!(busy(Access::ReadWrite) && !busy(Access::ReadOnly));
    assert!(matches!(reader.write_at(0, &[0; 512]), Err(DiskError::ReadOnly { .. })));
    assert!(matches!(reader.discard(0, 512), Err(DiskError::ReadOnly { .. })));
}
