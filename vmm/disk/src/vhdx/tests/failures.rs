//! Failures of other implementations that no other test covers; docs/disk.md lists all of them.

use super::recorder::{Image, Recorder};
use super::*;
use crate::vhdx::create::create_in;
use crate::vhdx::layout::put;

const MIB: u64 = 1 << 20;
const TABLE: usize = 6 << 20;

fn open(image: &Image, access: Access) -> Vhdx {
    Vhdx::from_storage(Path::new("f"), Box::new(Recorder::new(image.clone())), access).unwrap()
}

/// A closed file of 16 blocks; a child's block 6 is whole, its block 7 has one sector.
fn file(kind: Kind) -> Vec<u8> {
    let recorder = Recorder::default();
    let parent = ParentLink { path: "/d/base.vhdx".into(), data_write_guid: Uuid::from_u128(1) };
    let o = CreateOptions {
        parent: (kind == Kind::Differencing).then_some(parent),
        ..options(16 * MIB)
    };
    let path = Path::new("/d/leaf.avhdx");
    create_in(path, &recorder, &o).unwrap();
    let disk = Vhdx::from_storage(path, Box::new(recorder.clone()), Access::ReadWrite).unwrap();
    disk.write_at(6 * MIB, &pattern(6, 1 << 20)).unwrap();
    if kind == Kind::Differencing {
        disk.write_at(7 * MIB + 1024, &pattern(7, 512)).unwrap();
    }
    drop(disk);
    let image = recorder.image();
    image.to_bytes(image.len() as usize)
}

#[test]
fn every_state_of_a_childs_block_reads_right() {
    for kind in [Kind::Differencing, Kind::Dynamic] {
        let mut bytes = file(kind);
        // UNDEFINED and UNMAPPED, without and with the place of an earlier life, which other writers
        // may leave there; it belongs to somebody else now.
        let old = u64::from_le_bytes(bytes[TABLE + 48..TABLE + 56].try_into().unwrap()) & !7;
        for (block, raw) in [(1, 1), (2, 2), (3, 3), (4, old | 1), (5, old | 3)] {
            put(&mut bytes, TABLE + 8 * block, &u64::to_le_bytes(raw));
        }
        let image = Image::from_bytes(&bytes);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let disk = open(&image, access);
            let mut read = vec![0xee; 16 << 20];
            let absent = disk.read_at(0, &mut read).unwrap();
            let zero = |blocks: std::ops::Range<usize>| {
                read[blocks.start << 20..blocks.end << 20].iter().all(|b| *b == 0)
            };
            // Zeros, never the parent: not "absent", and written to the buffer.
            assert!(zero(1..6), "{kind:?}");
            assert!(read[6 << 20..7 << 20] == pattern(6, 1 << 20));
            if kind == Kind::Differencing {
                let partial = 7 * MIB;
                assert_eq!(absent, [0..MIB, partial..partial + 1024, partial + 1536..16 * MIB]);
                assert!(read[(7 << 20) + 1024..][..512] == pattern(7, 512));
            } else {
                assert!(absent.is_empty() && zero(0..1) && zero(7..16));
            }
        }
    }
}

#[test]
fn a_partial_block_without_a_sector_asks_the_parent_for_all() {
    let mut bytes = file(Kind::Differencing);
    // The chunk's bitmap: entry 4096 of the table.
    let entry = TABLE + 8 * 4096;
    let bitmap = u64::from_le_bytes(bytes[entry..entry + 8].try_into().unwrap()) & !7;
    bytes[bitmap as usize..][..1 << 20].fill(0);
    let disk = open(&Image::from_bytes(&bytes), Access::ReadWrite);
    assert_eq!(disk.block_state(7), BlockState::Partial);
    assert_eq!(disk.read_at(7 * MIB, &mut [0; 4096]).unwrap().len(), 1);
    // A whole block never looks at its bits.
    assert!(disk.read_at(6 * MIB, &mut [0; 4096]).unwrap().is_empty());
}

#[test]
fn linkage_in_upper_case_and_keys_of_other_makers_are_read() {
    let locator = ParentLocator {
        linkage: Uuid::from_u128(0xabcdef),
        linkage2: None,
        relative_path: Some("..\\base.vhdx".to_owned()),
        volume_path: None,
        absolute_path: None,
    };
    let mut item = crate::vhdx::locator::encode(&locator).unwrap();
    let braces: Vec<u8> = "{".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let at = item.windows(2).position(|w| w == braces).unwrap();
    for unit in item[at..at + 76].chunks_exact_mut(2) {
        unit[0] = unit[0].to_ascii_uppercase();
    }
    assert!(item.windows(2).any(|w| w == b"A\0"));
    assert_eq!(crate::vhdx::locator::parse(&item).unwrap(), locator);
}

#[test]
fn entries_on_both_sides_of_a_table_page_survive_the_log() {
    let size = 600 * MIB;
    let recorder = Recorder::default();
    create_in(Path::new("f"), &recorder, &options(size)).unwrap();
    let disk =
        Vhdx::from_storage(Path::new("f"), Box::new(recorder.clone()), Access::ReadWrite).unwrap();
    let blocks = [512, 510, 513, 511, 0, 514];
    for block in blocks {
        disk.write_at(block * MIB, &pattern(block, 4096)).unwrap();
        disk.flush().unwrap();
    }
    // Killed: the log is full of entries.
    let killed = recorder.image();
    assert!(open(&killed, Access::ReadOnly).needs_replay());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let disk = open(&killed, access);
        for block in 0..600 {
            let full = disk.block_state(block) == BlockState::Full;
            assert_eq!(full, blocks.contains(&block), "block {block}");
            if full {
                assert_eq!(read_chain(&[&disk], block * MIB, 4096), pattern(block, 4096));
            }
        }
    }
}
