//! Random operations against a vector.

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 7 << 20;

#[derive(Debug, Clone)]
enum Op {
    Write { at: u64, len: u64, seed: u64 },
    Zero { at: u64, len: u64 },
    Flush,
    Reopen,
    Release(u64),
}

fn op(sector: u64) -> impl Strategy<Value = Op> {
    let sectors = SIZE / sector;
    let range = (0..sectors, prop_oneof![3 => 1..40u64, 1 => 1..sectors])
        .prop_map(move |(at, len)| (at * sector, len.min(sectors - at) * sector));
    prop_oneof![
        6 => (range.clone(), any::<u64>()).prop_map(|((at, len), seed)| Op::Write { at, len, seed }),
        3 => range.prop_map(|(at, len)| Op::Zero { at, len }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => (0..7u64).prop_map(Op::Release),
    ]
}

/// Content of the file under test: `None` is what the parent holds.
fn run(ops: &[Op], o: &CreateOptions, differencing: bool) {
    let (_keep, dir) = temp();
    let base = made(&dir, "base.vhdx", o);
    base.write_at(0, &pattern(1, SIZE as usize)).unwrap();
    base.flush().unwrap();
    let under = if differencing { pattern(1, SIZE as usize) } else { vec![0; SIZE as usize] };
    let path = dir.join("test.vhdx");
    let mut disk = if differencing {
        child_of(&base, &dir, "test.vhdx", o.block_size)
    } else {
        made(&dir, "test.vhdx", o)
    };
    let mut model = under.clone();
    for op in ops {
        match *op {
            Op::Write { at, len, seed } => {
                let data = pattern(seed, len as usize);
                disk.write_at(at, &data).unwrap();
                model[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            Op::Zero { at, len } => {
                disk.write_zeroes(at, len).unwrap();
                model[at as usize..(at + len) as usize].fill(0);
            }
            Op::Flush => disk.flush().unwrap(),
            Op::Reopen => {
                drop(disk);
                disk = Vhdx::open(&path, Access::ReadWrite).unwrap();
            }
            Op::Release(block) => {
                let size = u64::from(o.block_size);
                if block * size >= SIZE || o.fixed {
                    continue;
                }
                disk.release_blocks(&[block]).unwrap();
                let range = (block * size) as usize..((block + 1) * size).min(SIZE) as usize;
                model[range.clone()].copy_from_slice(&under[range]);
            }
        }
        let chain: &[&Vhdx] = if differencing { &[&disk, &base] } else { &[&disk] };
        assert!(read_chain(chain, 0, SIZE as usize) == model, "after {op:?}");
    }
    disk.flush().unwrap();
    drop(disk);
    let report = check(&path).unwrap();
    assert!(report.problems.is_empty(), "{report:?}");
    let disk = Vhdx::open(&path, Access::ReadOnly).unwrap();
    let chain: &[&Vhdx] = if differencing { &[&disk, &base] } else { &[&disk] };
    assert!(read_chain(chain, 0, SIZE as usize) == model, "after the last open");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn dynamic_file_equals_model(ops in prop::collection::vec(op(512), 1..30), big in any::<bool>()) {
        run(&ops, &CreateOptions { block_size: if big { 2 << 20 } else { 1 << 20 }, ..options(SIZE) }, false);
    }

    #[test]
    fn differencing_file_equals_model(ops in prop::collection::vec(op(512), 1..30), big in any::<bool>()) {
        run(&ops, &CreateOptions { block_size: if big { 32 << 20 } else { 1 << 20 }, ..options(SIZE) }, true);
    }

    #[test]
    fn differencing_file_with_4k_sectors_equals_model(ops in prop::collection::vec(op(4096), 1..30)) {
        run(&ops, &CreateOptions { logical_sector: 4096, ..options(SIZE) }, true);
    }

    #[test]
    fn fixed_file_equals_model(ops in prop::collection::vec(op(512), 1..20)) {
        run(&ops, &CreateOptions { fixed: true, ..options(SIZE) }, false);
    }
}

#[test]
fn many_threads_write_side_by_side() {
    let (_keep, dir) = temp();
    let base = made(&dir, "base.vhdx", &options(64 << 20));
    let disk = child_of(&base, &dir, "leaf.avhdx", 1 << 20);
    std::thread::scope(|scope| {
        for t in 0..8u64 {
            let disk = &disk;
            scope.spawn(move || {
                for i in 0..400u64 {
                    let at = (i * 8 + t) * 4096;
                    disk.write_at(at, &pattern(at, 4096)).unwrap();
                    if i % 50 == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    drop(disk);
    let disk = Vhdx::open(&dir.join("leaf.avhdx"), Access::ReadOnly).unwrap();
    for i in 0..3200u64 {
        assert!(read_chain(&[&disk, &base], i * 4096, 4096) == pattern(i * 4096, 4096), "page {i}");
    }
}

#[test]
fn bitmaps_of_a_second_chunk_are_found() {
    let (_keep, dir) = temp();
    let base = made(&dir, "base.vhdx", &options(9 << 30));
    let leaf = child_of(&base, &dir, "leaf.avhdx", 1 << 20);
    for at in [5u64 << 20, (5 << 30) + 512, (9 << 30) - 512] {
        leaf.write_at(at, &pattern(at, 512)).unwrap();
    }
    drop(leaf);
    let leaf = Vhdx::open(&dir.join("leaf.avhdx"), Access::ReadWrite).unwrap();
    for at in [5u64 << 20, (5 << 30) + 512, (9 << 30) - 512] {
        assert_eq!(read_chain(&[&leaf, &base], at, 512), pattern(at, 512));
    }
    assert_eq!(leaf.read_at((5 << 30) + 1024, &mut [0; 512]).unwrap().len(), 1);
}

#[test]
fn second_opener_is_told_that_the_file_is_busy() {
    let (_keep, dir) = temp();
    let disk = made(&dir, "d.vhdx", &options(SIZE));
    assert!(matches!(
        Vhdx::open(disk.path(), Access::ReadOnly),
        Err(crate::DiskError::Busy { .. })
    ));
    disk.freeze().unwrap();
    let _reader = Vhdx::open(disk.path(), Access::ReadOnly).unwrap();
    assert!(matches!(
        Vhdx::open(disk.path(), Access::ReadWrite),
        Err(crate::DiskError::Busy { .. })
    ));
    assert!(matches!(disk.write_at(0, &[0; 512]), Err(crate::DiskError::ReadOnly { .. })));
}
