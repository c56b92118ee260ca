//! A chain beside a plain model of what it must hold.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use tempfile::TempDir;

use crate::GRANULE;
use crate::block::{Block, BlockRange};
use crate::chain::{Chain, delete_disk_files};
use crate::rct::RctId;
use crate::vhdx::{Access, CreateOptions};

pub(super) const MIB: u64 = 1 << 20;

/// SplitMix64: the same numbers for the same seed, everywhere.
#[derive(Clone)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A sector-aligned range of a disk: mostly short, sometimes long or whole blocks.
    pub(super) fn range(&mut self, size: u64, sector: u64) -> BlockRange {
        let sectors = size / sector;
        let longest = match self.below(8) {
            0 => sectors / 2,
            1 | 2 => MIB / sector,
            _ => 64,
        };
        if self.below(10) == 0 {
            let start = self.below(size.div_ceil(MIB)) * MIB;
            return start..size.min(start + (1 + self.below(3)) * MIB);
        }
        let start = self.below(sectors);
        let len = 1 + self.below(longest.max(1));
        start * sector..sectors.min(start + len) * sector
    }
}

pub(super) fn options(size: u64, block_size: u32) -> CreateOptions {
    CreateOptions {
        size,
        block_size,
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    }
}

/// A sealed moment and what must be true of it.
#[derive(Clone)]
pub(super) struct Sealed {
    pub(super) id: RctId,
    pub(super) content: Vec<u8>,
    /// Granules written since; `None` once a crash made the answer coarser.
    pub(super) written: Option<BTreeSet<u64>>,
    pub(super) file: PathBuf,
}

pub(super) struct World {
    pub(super) folder: TempDir,
    chain: Option<Chain>,
    pub(super) content: Vec<u8>,
    pub(super) sealed: Vec<Sealed>,
    pub(super) rng: Rng,
    sector: u64,
    made: u32,
}

impl World {
    pub(super) fn new(seed: u64, size: u64, block_size: u32) -> Self {
        Self::of(seed, &options(size, block_size))
    }

    pub(super) fn of(seed: u64, options: &CreateOptions) -> Self {
        let folder = folder();
        let base = folder.path().join("disk.vhdx");
        let (size, sector) = (options.size, options.logical_sector.into());
        Chain::create(&base, options).unwrap();
        let chain = Chain::open(&base, Access::ReadWrite).unwrap();
        let content = vec![0; size as usize];
        let rng = Rng::new(seed);
        Self { folder, chain: Some(chain), content, sealed: Vec::new(), rng, sector, made: 0 }
    }

    pub(super) fn chain(&self) -> &Chain {
        self.chain.as_ref().unwrap()
    }

    pub(super) fn leaf(&self) -> PathBuf {
        self.chain().files().pop().unwrap()
    }

    fn touched(&mut self, range: &BlockRange) {
        for sealed in &mut self.sealed {
            if let Some(written) = &mut sealed.written {
                written.extend(range.start / GRANULE..range.end.div_ceil(GRANULE));
            }
        }
    }

    pub(super) fn write(&mut self) {
        let range = self.rng.range(self.content.len() as u64, self.sector);
        self.write_to(range);
    }

    pub(super) fn write_to(&mut self, range: BlockRange) {
        let data = bytes(&mut self.rng, range.end - range.start);
        self.chain().write_at(range.start, &data).unwrap();
        self.note_write(&range, &data);
    }

    /// A write that was made elsewhere.
    pub(super) fn note_write(&mut self, range: &BlockRange, data: &[u8]) {
        self.content[range.start as usize..range.end as usize].copy_from_slice(data);
        self.touched(range);
    }

    pub(super) fn zero(&mut self) {
        let range = self.rng.range(self.content.len() as u64, self.sector);
        self.zero_at(range);
    }

    pub(super) fn zero_at(&mut self, range: BlockRange) {
        let len = range.end - range.start;
        match self.rng.below(2) {
            0 => self.chain().discard(range.start, len).unwrap(),
            _ => self.chain().write_zeroes(range.start, len, true).unwrap(),
        }
        self.content[range.start as usize..range.end as usize].fill(0);
        self.touched(&range);
    }

    pub(super) fn new_leaf(&mut self) -> PathBuf {
        self.made += 1;
        self.folder.path().join(format!("disk_{}.avhdx", self.made))
    }

    pub(super) fn checkpoint(&mut self) {
        let (old, new) = (self.leaf(), self.new_leaf());
        self.chain().prepare_leaf(&new).unwrap();
        self.chain().preflush().unwrap();
        let pause = self.chain().pause();
        let id = self.chain().switch_leaf(&pause, &new).unwrap();
        drop(pause);
        self.chain().settle().unwrap();
        self.note_seal(id, old);
    }

    pub(super) fn note_seal(&mut self, id: RctId, file: PathBuf) {
        let (content, written) = (self.content.clone(), Some(BTreeSet::new()));
        self.sealed.push(Sealed { id, content, written, file });
    }

    pub(super) fn merge(&mut self, index: usize) {
        let child = self.chain().files()[index].clone();
        merge(self.chain(), &child);
        delete_disk_files(&child).unwrap();
    }

    pub(super) fn reopen(&mut self) {
        let leaf = self.leaf();
        self.chain().close().unwrap();
        self.chain = None;
        self.chain = Some(Chain::open(&leaf, Access::ReadWrite).unwrap());
    }

    /// Kill: goes on with a copy of the files as they are in the middle of things.
    pub(super) fn kill(&mut self) {
        self.chain().flush().unwrap();
        let leaf = self.leaf();
        let copy = snapshot(self.folder.path());
        self.chain = None;
        self.folder = copy;
        let leaf = self.folder.path().join(leaf.file_name().unwrap());
        self.chain = Some(Chain::open(&leaf, Access::ReadWrite).unwrap());
        for sealed in &mut self.sealed {
            sealed.written = None;
            sealed.file = self.folder.path().join(sealed.file.file_name().unwrap());
        }
    }

    /// Opens the chain again that was closed by hand.
    pub(super) fn open_again(&mut self) {
        let leaf = self.leaf();
        self.chain = None;
        self.chain = Some(Chain::open(&leaf, Access::ReadWrite).unwrap());
    }

    pub(super) fn check_content(&self) {
        assert_same(&read_all(self.chain()), &self.content, "the disk");
    }

    /// Every id answers, with all that differs and, without crashes, nothing that was not written.
    pub(super) fn check_changes(&self) {
        for sealed in &self.sealed {
            let ranges = self.chain().changed_since(&sealed.id).unwrap();
            assert_superset(&ranges, &sealed.content, &self.content);
            let Some(written) = &sealed.written else { continue };
            let extra = granules(&ranges).find(|g| !written.contains(g));
            assert_eq!(extra, None, "granule reported since {} that was not written", sealed.id);
        }
    }

    /// Files of the chain that were sealed still hold what they held, for readers from outside.
    pub(super) fn check_frozen(&self) {
        let files = self.chain().files();
        let (_, frozen) = files.split_last().unwrap();
        for file in frozen {
            let Some(sealed) = self.sealed.iter().rfind(|s| s.file == *file) else { continue };
            let reader = Chain::open(file, Access::ReadOnly).unwrap();
            if reader.last_seal().as_ref() == Some(&sealed.id) {
                assert_same(&read_all(&reader), &sealed.content, "a frozen file");
            }
        }
    }
}

pub(super) fn bytes(rng: &mut Rng, len: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(len as usize + 8);
    while out.len() < len as usize {
        out.extend(rng.next().to_le_bytes());
    }
    out.truncate(len as usize);
    out
}

pub(super) fn merge(chain: &Chain, child: &Path) {
    chain.merge(child, &|_| (), &AtomicBool::new(false)).unwrap();
}

pub(super) fn read_all(block: &dyn Block) -> Vec<u8> {
    let mut buf = vec![0xa5; block.geometry().size as usize];
    // Unaligned to blocks on purpose.
    for (i, piece) in buf.chunks_mut(97 * 4096).enumerate() {
        block.read_at((i * 97 * 4096) as u64, piece).unwrap();
    }
    buf
}

pub(super) fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len());
    let wrong = found.chunks(512).zip(expected.chunks(512)).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{what} differs from the model in this sector");
}

pub(super) fn granules(ranges: &[BlockRange]) -> impl Iterator<Item = u64> + '_ {
    ranges.iter().flat_map(|r| r.start / GRANULE..r.end.div_ceil(GRANULE))
}

pub(super) fn assert_superset(ranges: &[BlockRange], then: &[u8], now: &[u8]) {
    for pair in ranges.windows(2) {
        assert!(pair[0].end < pair[1].start, "ranges are not merged and sorted: {ranges:?}");
    }
    let reported: BTreeSet<u64> = granules(ranges).collect();
    let pairs = then.chunks(GRANULE as usize).zip(now.chunks(GRANULE as usize)).enumerate();
    for (granule, (a, b)) in pairs {
        assert!(a == b || reported.contains(&(granule as u64)), "granule {granule} was missed");
    }
}

/// A folder for disks. In memory where there is room: these tests sync by the thousand, and a kill
/// does not depend on the file system. (`tests/chains.rs` runs on the real one.)
pub(super) fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let room = rustix::fs::statvfs(memory).map_or(0, |s| s.f_bavail * s.f_frsize);
    if room > 1 << 30
        && let Ok(folder) = tempfile::tempdir_in(memory)
    {
        return folder;
    }
    tempfile::tempdir().unwrap()
}

/// A copy of a folder, as a kill at this moment leaves it.
pub(super) fn snapshot(from: &Path) -> TempDir {
    let copy = folder();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        sparse_copy(&entry.path(), &copy.path().join(entry.file_name()));
    }
    copy
}

/// Copies what is not zero.
fn sparse_copy(from: &Path, to: &Path) {
    use std::os::unix::fs::FileExt;
    let data = std::fs::read(from).unwrap();
    let file = std::fs::File::create(to).unwrap();
    file.set_len(data.len() as u64).unwrap();
    for (i, piece) in data.chunks(1 << 16).enumerate() {
        if piece.iter().any(|b| *b != 0) {
            file.write_all_at(piece, (i << 16) as u64).unwrap();
        }
    }
}
