//! Files cut off anywhere and with random damage: no panic, no endless work, never silently less.

use super::recorder::{Image, Recorder};
use super::*;
use crate::vhdx::create::create_in;
use crate::vhdx::layout::{checksum, put};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 20 * MIB + 512;

struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A child with full, partial and zero blocks; with entries in its log, or closed.
fn child(clean: bool) -> Image {
    let file = Recorder::default();
    let parent = ParentLink { path: "/d/base.vhdx".into(), data_write_guid: Uuid::from_u128(1) };
    let o = CreateOptions { parent: Some(parent), ..options(SIZE) };
    let path = Path::new("/d/leaf.avhdx");
    create_in(path, &file, &o).unwrap();
    let disk = Vhdx::from_storage(path, Box::new(file.clone()), Access::ReadWrite).unwrap();
    disk.write_at(MIB, &pattern(1, 1 << 20)).unwrap();
    disk.flush().unwrap();
    disk.write_at(17 * MIB + 512, &pattern(2, 4096)).unwrap();
    disk.write_zeroes(2 * MIB, MIB).unwrap();
    disk.flush().unwrap();
    let dirty = file.image();
    drop(disk);
    if clean { file.image() } else { dirty }
}

fn open(image: &Image, access: Access) -> crate::Result<Vhdx> {
    Vhdx::from_storage(Path::new("f"), Box::new(Recorder::new(image.clone())), access)
}

/// Opens both ways; uses what opens, up to some size.
fn use_it(image: &Image) -> bool {
    let opened = [Access::ReadOnly, Access::ReadWrite].map(|access| {
        let Ok(disk) = open(image, access) else { return false };
        let size = disk.properties().geometry.size;
        let sector = u64::from(disk.properties().geometry.logical_sector);
        for at in [0, MIB, 2 * MIB, 17 * MIB, size / sector * sector - sector] {
            let len = (8 * 4096).min(size.saturating_sub(at));
            if len > 0 {
                let _ = disk.read_at(at, &mut vec![0; len as usize]);
                let _ = disk.presence(at, len);
                let _ = disk.write_at(at, &vec![1; len as usize]);
            }
        }
        let _ = disk.flush();
        true
    });
    opened[0]
}

#[test]
fn file_cut_anywhere_is_refused() {
    for clean in [true, false] {
        let whole = child(clean);
        assert!(use_it(&whole));
        let mut numbers = Numbers(1);
        let mut cuts: Vec<u64> = (0..whole.len()).step_by(256 << 10).collect();
        cuts.extend((0..20).map(|_| numbers.below(whole.len() / 4096) * 4096));
        for cut in cuts {
            let mut image = whole.clone();
            image.set_len(cut);
            assert!(!use_it(&image), "cut to {cut}, clean {clean}");
        }
    }
}

/// Puts a checksum right again, so that what it covers is looked at.
fn reseal(b: &mut [u8]) {
    let sealed =
        [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10)];
    for (at, len) in sealed {
        let crc = checksum(&b[at..at + len]);
        put(b, at + 4, &crc.to_le_bytes());
    }
    let log = MIB as usize;
    for at in (log..5 * log).step_by(4096) {
        let len = u32::from_le_bytes(b[at + 8..at + 12].try_into().unwrap()) as usize;
        if b[at..].starts_with(b"loge")
            && len.is_multiple_of(4096)
            && len > 0
            && at + len <= b.len()
        {
            let crc = checksum(&b[at..at + len]);
            put(b, at + 4, &crc.to_le_bytes());
        }
    }
}

/// Values that break arithmetic.
fn nasty(numbers: &mut Numbers) -> u64 {
    let one = 1u64 << numbers.below(64);
    match numbers.below(6) {
        0 => u64::MAX,
        1 => 0,
        2 => one,
        3 => one - 1,
        4 => u64::MAX << numbers.below(40),
        _ => numbers.below(1 << 31),
    }
}

#[test]
fn random_damage_never_panics() {
    // Headers, region tables, log entries, metadata table and items, block table.
    let places = [
        (64 << 10, 96),
        (128 << 10, 96),
        (192 << 10, 96),
        (256 << 10, 96),
        (1 << 20, 16384),
        (5 << 20, 256),
        ((5 << 20) + (64 << 10), 512),
        ((5 << 20) + (68 << 10), 512),
        (6 << 20, 256),
        ((6 << 20) + 8 * 4096, 8),
    ];
    let mut opened = 0;
    for clean in [true, false] {
        let whole = child(clean);
        let bytes = whole.to_bytes(7 << 20);
        for seed in 0..350 {
            let mut numbers = Numbers(seed);
            let mut b = bytes.clone();
            for _ in 0..=numbers.below(3) {
                let (at, len) = places[numbers.below(places.len() as u64) as usize];
                let at = at + numbers.below(len / 4) as usize * 4;
                let value = nasty(&mut numbers).to_le_bytes();
                let n = [1, 2, 4, 8][numbers.below(4) as usize];
                put(&mut b, at, &value[..n]);
            }
            reseal(&mut b);
            let mut image = whole.clone();
            image.overwrite(&b);
            opened += usize::from(use_it(&image));
        }
    }
    // Both outcomes: damage that matters and damage that does not.
    assert!((50..600).contains(&opened), "{opened} of 700 files open");
}

#[test]
fn sparse_file_of_any_length_opens_at_once() {
    let mut image = child(true);
    image.set_len(i64::MAX as u64 / 4096 * 4096);
    let disk = open(&image, Access::ReadWrite).unwrap();
    disk.write_at(5 * MIB, &[1; 512]).unwrap();
    disk.flush().unwrap();
    assert_eq!(read_chain(&[&disk], 5 * MIB, 512), [1; 512]);
}
