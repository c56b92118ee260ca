//! Damaged structures and logs, as whole files: what is refused, what is understood.

use super::recorder::{Image, Recorder};
use super::*;
use crate::vhdx::layout::{Header, REGION_TABLE_SIZE, Region, Regions, checksum, put, u64_at};
use crate::vhdx::log::{Update, encode_entry};
use crate::vhdx::metadata::Metadata;

const MIB: usize = 1 << 20;
const LOG: usize = MIB;
const METADATA: usize = 2 * MIB;
const BAT: usize = 3 * MIB;
const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
const REGIONS: [usize; 2] = [192 << 10, 256 << 10];
const GUID: Uuid = Uuid::from_u128(0xabc);
const DATA_WRITE: Uuid = Uuid::from_u128(0xda7a);

fn header(sequence: u64, log_guid: Uuid) -> Header {
    Header {
        sequence,
        file_write_guid: Uuid::from_u128(1),
        data_write_guid: DATA_WRITE,
        log_guid,
        log_version: 0,
        version: 1,
        log_len: MIB as u32,
        log_offset: LOG as u64,
    }
}

/// A 64 MiB dynamic disk of 1 MiB blocks: log, metadata, block table at 1, 2 and 3 MiB, block 0 at 4 MiB.
fn file() -> Vec<u8> {
    let mut b = vec![0; 5 * MIB];
    put(&mut b, 0, b"vhdxfile");
    for (slot, at) in HEADERS.into_iter().enumerate() {
        put(&mut b, at, &header(slot as u64 + 1, Uuid::nil()).encode());
    }
    let region = |offset: usize| Region { offset: offset as u64, len: MIB as u64 };
    let regions = Regions { bat: region(BAT), metadata: region(METADATA), unknown: Vec::new() };
    REGIONS.iter().for_each(|at| put(&mut b, *at, &regions.encode()));
    let metadata = Metadata {
        geometry: Geometry { size: 64 << 20, logical_sector: 512, physical_sector: 512 },
        block_size: 1 << 20,
        kind: Kind::Dynamic,
        disk_id: Uuid::from_u128(2),
        parent: None,
    };
    put(&mut b, METADATA, &metadata.encode().unwrap());
    put(&mut b, BAT, &(4 << 20 | 6u64).to_le_bytes());
    b[4 * MIB..].fill(0x44);
    b
}

fn set_header(b: &mut [u8], change: impl Fn(&mut Header)) {
    for (slot, at) in HEADERS.into_iter().enumerate() {
        let mut header = header(slot as u64 + 1, Uuid::nil());
        change(&mut header);
        put(b, at, &header.encode());
    }
}

fn open(image: &Image, access: Access) -> crate::Result<Vhdx> {
    Vhdx::from_storage(Path::new("f.vhdx"), Box::new(Recorder::new(image.clone())), access)
}

/// Why both ways of opening refuse the file, which they must leave as it is.
fn refused(b: &[u8]) -> String {
    let image = Image::from_bytes(b);
    let said = [Access::ReadOnly, Access::ReadWrite].map(|access| {
        let file = Recorder::new(image.clone());
        match Vhdx::from_storage(Path::new("f.vhdx"), Box::new(file.clone()), access) {
            Err(crate::DiskError::Corrupt { what, .. }) if file.now() == 0 => what,
            Err(e) => panic!("{} changes, {e}", file.now()),
            Ok(_) => panic!("opens with {access:?}"),
        }
    });
    assert_eq!(said[0], said[1]);
    said[0].clone()
}

/// Blocks with data, as both ways of opening see them.
fn mapped(b: &[u8]) -> Vec<u64> {
    let image = Image::from_bytes(b);
    let blocks = [Access::ReadOnly, Access::ReadWrite].map(|access| {
        let disk = open(&image, access).unwrap();
        (0..disk.blocks()).filter(|b| disk.block_state(*b) == BlockState::Full).collect::<Vec<_>>()
    });
    assert_eq!(blocks[0], blocks[1]);
    blocks[0].clone()
}

fn entry(b: &mut [u8], index: usize, raw: u64) {
    put(b, BAT + 8 * index, &raw.to_le_bytes());
}

#[test]
fn the_file_without_defects_opens() {
    assert_eq!(mapped(&file()), [0]);
}

#[test]
fn c1_torn_newer_header_leaves_the_older() {
    let mut b = file();
    b[HEADERS[1] + 2000] ^= 1;
    assert_eq!(mapped(&b), [0]);
    let mut b = file();
    b[HEADERS[0] + 2000] ^= 1;
    assert_eq!(mapped(&b), [0]);
}

#[test]
fn c2_two_torn_headers_are_refused() {
    let mut b = file();
    HEADERS.iter().for_each(|at| b[at + 2000] ^= 1);
    assert!(refused(&b).contains("header"));
}

#[test]
fn c3_two_blocks_in_one_place_are_refused() {
    let mut b = file();
    entry(&mut b, 7, 4 << 20 | 6);
    assert!(refused(&b).contains("overlap"));
}

#[test]
fn c4_torn_region_table_leaves_its_copy() {
    for torn in REGIONS {
        let mut b = file();
        b[torn + 60_000] ^= 1;
        assert_eq!(mapped(&b), [0]);
    }
}

#[test]
fn c5_two_torn_region_tables_are_refused() {
    let mut b = file();
    REGIONS.iter().for_each(|at| b[at + 60_000] ^= 1);
    assert!(refused(&b).contains("region tables"));
}

#[test]
fn c6_c7_c8_c9_impossible_block_entries_are_refused() {
    for (raw, why) in [
        (5 << 20 | 6 | 1 << 3, "reserved bits"),
        (5 << 20 | 6 | 1 << 19, "reserved bits"),
        (4, "state 4"),
        (5 << 20 | 5, "state 5"),
        (2 << 20 | 6, "overlap"),
        (1 << 20 | 6, "overlap"),
        (6, "into the headers"),
        (9 << 20 | 6, "after the file's end"),
        (0xffff_ffff_fff0_0006, "points too far"),
    ] {
        let mut b = file();
        entry(&mut b, 3, raw);
        let said = refused(&b);
        assert!(said.contains(why), "{raw:x}: {said}");
    }
}

#[test]
fn c10_headers_of_equal_sequence_must_be_identical() {
    let mut b = file();
    put(&mut b, HEADERS[1], &header(1, Uuid::nil()).encode());
    assert_eq!(mapped(&b), [0]);
    let other = Header { data_write_guid: Uuid::from_u128(9), ..header(1, Uuid::nil()) };
    put(&mut b, HEADERS[1], &other.encode());
    assert!(refused(&b).contains("same sequence"));
}

#[test]
fn c11_partial_block_without_a_parent_is_refused() {
    let mut b = file();
    entry(&mut b, 0, 4 << 20 | 7);
    assert!(refused(&b).contains("state 7"));
}

/// A change of a header, and the words of its refusal.
type Change = (fn(&mut Header), &'static str);

#[test]
fn c12_impossible_headers_are_refused() {
    let changes: [Change; 6] = [
        (|h| h.version = 2, "version 2"),
        (|h| h.log_offset = 0xffff_ffff_fff0_0000, "log of"),
        (|h| h.log_offset += 512, "log of"),
        (|h| h.log_len = 0, "log of"),
        (|h| h.log_len = 1 << 31, "log of"),
        (|h| h.sequence = u64::MAX - h.sequence, "sequence number"),
    ];
    for (change, why) in changes {
        let mut b = file();
        set_header(&mut b, change);
        let said = refused(&b);
        assert!(said.contains(why), "{said}");
    }
    // The version of a log that is empty does not matter.
    let mut b = file();
    set_header(&mut b, |h| h.log_version = 1);
    assert_eq!(mapped(&b), [0]);
}

/// A log entry that maps blocks to places in MiB, blocks 0 at 4 MiB included.
fn mapping(sequence: u64, tail: usize, blocks: &[(usize, u64)], sizes: (usize, usize)) -> Vec<u8> {
    let mut page = Box::new([0; 4096]);
    put(&mut page[..], 0, &(4 << 20 | 6u64).to_le_bytes());
    for (block, place) in blocks {
        put(&mut page[..], 8 * block, &(place << 20 | 6).to_le_bytes());
    }
    let update = Update::Data { offset: BAT as u64, page };
    encode_entry(GUID, sequence, tail as u32, sizes.0 as u64, sizes.1 as u64, &[update])
}

/// A file of 7 MiB whose headers name a log with these entries.
fn with_log(entries: &[(usize, &[u8])]) -> Vec<u8> {
    let mut b = file();
    b.resize(7 * MIB, 0);
    set_header(&mut b, |h| h.log_guid = GUID);
    for (at, entry) in entries {
        put(&mut b, LOG + at, entry);
    }
    b
}

const SIZES: (usize, usize) = (5 * MIB, 7 * MIB);
/// Entries here are two sectors long.
const ENTRY: usize = 8192;

#[test]
fn t1_replay_extends_the_file_to_the_last_offset() {
    let entry = mapping(1, 0, &[(1, 5)], (5 * MIB, 6 * MIB));
    let mut b = with_log(&[(0, &entry)]);
    b.truncate(5 * MIB);
    assert_eq!(mapped(&b), [0, 1]);
    let image = Image::from_bytes(&b);
    let reader = open(&image, Access::ReadOnly).unwrap();
    assert!(reader.needs_replay());
    assert_eq!(read_chain(&[&reader], 1 << 20, 512), [0; 512]);
    let file = Recorder::new(image);
    let disk =
        Vhdx::from_storage(Path::new("f"), Box::new(file.clone()), Access::ReadWrite).unwrap();
    assert_eq!(read_chain(&[&disk], 1 << 20, 512), [0; 512]);
    assert_eq!(file.image().len(), 6 << 20);
}

#[test]
fn t2_named_log_without_entries_is_refused() {
    assert!(refused(&with_log(&[])).contains("no valid sequence"));
}

#[test]
fn t3_torn_entry_does_not_count() {
    let mut torn = mapping(2, 0, &[(1, 5), (2, 6)], SIZES);
    torn[5000] ^= 1;
    assert_eq!(mapped(&with_log(&[(0, &mapping(1, 0, &[(1, 5)], SIZES)), (ENTRY, &torn)])), [0, 1]);
}

#[test]
fn t4_entry_after_a_gap_stands_alone() {
    let (one, five) = (mapping(1, 0, &[(1, 5)], SIZES), mapping(5, ENTRY, &[(2, 6)], SIZES));
    assert_eq!(mapped(&with_log(&[(0, &one), (ENTRY, &five)])), [0, 2]);
}

#[test]
fn t5_tail_outside_the_sequence_is_refused() {
    let entry = mapping(9, 512 << 10, &[(1, 5)], SIZES);
    assert!(refused(&with_log(&[(0, &entry)])).contains("no valid sequence"));
}

#[test]
fn t6_file_shorter_than_promised_is_refused() {
    let entry = mapping(1, 0, &[(1, 5)], (54 * MIB, 54 * MIB));
    assert!(refused(&with_log(&[(0, &entry)])).contains("truncated"));
}

#[test]
fn t7_entry_of_another_log_does_not_count() {
    let mut stale = mapping(100, ENTRY, &[(2, 6)], SIZES);
    put(&mut stale, 32, &Uuid::from_u128(7).to_bytes_le());
    put(&mut stale, 4, &[0; 4]);
    let crc = checksum(&stale);
    put(&mut stale, 4, &crc.to_le_bytes());
    let one = mapping(1, 0, &[(1, 5)], SIZES);
    assert_eq!(mapped(&with_log(&[(0, &one), (ENTRY, &stale)])), [0, 1]);
}

#[test]
fn t8_wrapped_sequence_is_replayed_whole() {
    // The second entry holds another page of the table, so the first must count too.
    let end = MIB - ENTRY;
    let first = mapping(1, end, &[(1, 5)], SIZES);
    let page = Box::new([0; 4096]);
    let other = Update::Data { offset: BAT as u64 + 4096, page };
    let second = encode_entry(GUID, 2, end as u32, SIZES.0 as u64, SIZES.1 as u64, &[other]);
    assert_eq!(mapped(&with_log(&[(end, &first), (0, &second)])), [0, 1]);
}

#[test]
fn damage_beside_a_log_leaves_the_log_alone() {
    let mut b = with_log(&[(0, &mapping(1, 0, &[(1, 5), (2, 5)], SIZES))]);
    assert!(refused(&b).contains("overlap"));
    b[METADATA] ^= 1;
    assert!(refused(&b).contains("signature"));
}

#[test]
fn log_that_changes_headers_or_itself_is_refused() {
    for offset in [HEADERS[0], LOG, LOG + 64 * 1024] {
        let update = Update::Data { offset: offset as u64, page: Box::new([0; 4096]) };
        let bytes = encode_entry(GUID, 1, 0, 5 << 20, 7 << 20, &[update]);
        refused(&with_log(&[(0, &bytes)]));
    }
}

#[test]
fn replay_keeps_the_content_guid_and_a_reader_writes_nothing() {
    let b = with_log(&[(0, &mapping(1, 0, &[(1, 5)], SIZES))]);
    let file = Recorder::new(Image::from_bytes(&b));
    let open = |access| Vhdx::from_storage(Path::new("f"), Box::new(file.clone()), access).unwrap();
    let before = open(Access::ReadOnly).properties();
    assert_eq!(file.now(), 0);
    drop(open(Access::ReadWrite));
    let after = open(Access::ReadOnly);
    assert!(!after.needs_replay());
    let after = after.properties();
    // A child of this file records it, and must still fit after its parent's replay.
    assert_eq!((before.data_write_guid, after.data_write_guid), (DATA_WRITE, DATA_WRITE));
    assert_ne!(before.file_write_guid, after.file_write_guid);
    let b = file.image().to_bytes(7 * MIB);
    assert_eq!(u64_at(&b, BAT + 8), 5 << 20 | 6);
}

#[test]
fn metadata_and_regions_that_contradict_are_refused() {
    let entry = |index: usize| METADATA + 32 + 32 * index;
    let cases: [(usize, &[u8], &str); 9] = [
        (METADATA, b"x", "signature"),
        (METADATA + 10, &[0xff, 0xff], "entries"),
        (METADATA + 10, &[4, 0], "no physical sector size"),
        (entry(1), &[0x12; 16], "unknown required metadata item"),
        (entry(1) + 16, &[0xff; 4], "metadata item"),
        (entry(1) + 16, &[0, 0, 1, 0], "overlap"),
        // Empty, far outside: nothing is read there.
        (entry(1) + 16, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], "has 0 bytes"),
        (METADATA + (64 << 10), &[0, 0, 8, 0], "block size"),
        (METADATA + (64 << 10) + 4, &[2], "disagree"),
    ];
    for (at, bytes, why) in cases {
        let mut b = file();
        put(&mut b, at, bytes);
        let said = refused(&b);
        assert!(said.contains(why), "{why}: {said}");
    }
    // The size as a user item does not count.
    let mut b = file();
    put(&mut b, entry(1) + 24, &[1]);
    assert!(refused(&b).contains("no virtual disk size"));
    let mut b = file();
    for at in REGIONS {
        put(&mut b, at + 16, &[9; 16]);
        let crc = checksum(&b[at..at + REGION_TABLE_SIZE]);
        put(&mut b, at + 4, &crc.to_le_bytes());
    }
    assert!(refused(&b).contains("unknown required region"));
}
