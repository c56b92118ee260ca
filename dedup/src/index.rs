//! The index in memory: where every chunk and page is. Sorted runs of 24-byte entries, merged as they
//! grow, so that a lookup is a few binary searches and a chunk costs 24 bytes and its share of a
//! frame entry.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::bytes::Fields;
use crate::error::Result;
use crate::frame::{Content, FrameInfo};
use crate::id::BlobId;
use crate::object::damaged;
use crate::pack::{PackInfo, decode_entry};

/// Layout of a segment's body: pack entries, one after the other.
const LAYOUT_PACKS: u8 = 1;
/// Readers refuse larger segment bodies.
pub(crate) const MAX_SEGMENT_LEN: usize = 128 << 20;
/// Writers close a segment when it has grown to this: 16 GiB of chunks.
pub(crate) const SEGMENT_TARGET_LEN: usize = 4 << 20;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    id: BlobId,
    pack: u32,
    /// Frame in the upper 24 bits, position in the lower 8.
    place: u32,
}

const _: () = assert!(size_of::<Entry>() == 24);

/// Where a blob is.
#[derive(Clone)]
pub(crate) struct Location {
    pub(crate) pack: Arc<PackInfo>,
    /// Number of the pack in this index; with the frame it names a frame within this process.
    pub(crate) pack_number: u32,
    pub(crate) frame: u32,
    pub(crate) position: u8,
}

impl Location {
    pub(crate) fn info(&self) -> &FrameInfo {
        // Entries are only made together with the frames that they name.
        &self.pack.frames[self.frame as usize]
    }

    /// Names the frame within this process.
    pub(crate) fn frame_key(&self) -> (u32, u32) {
        (self.pack_number, self.frame)
    }
}

/// All durable packs that are known.
#[derive(Default)]
pub(crate) struct Index {
    packs: Vec<Arc<PackInfo>>,
    by_id: HashMap<[u8; 16], u32>,
    /// Each run is sorted; the largest first.
    runs: Vec<Vec<Entry>>,
    /// Keys of the segments that were read.
    pub(crate) segments: HashSet<String>,
    /// Packs that are known only from their own ends, because no readable segment describes them.
    adopted: HashSet<[u8; 16]>,
}

/// Packs on their way into an index.
#[derive(Default)]
pub(crate) struct Batch {
    packs: Vec<Arc<PackInfo>>,
    /// Entries whose pack number counts within this batch.
    entries: Vec<Entry>,
}

impl Batch {
    /// Reads one pack entry.
    pub(crate) fn read(
        &mut self,
        store: &str,
        key: &str,
        repository: &[u8; 16],
        fields: &mut Fields<'_>,
    ) -> Result<()> {
        let pack = self.packs.len() as u32;
        let entries = &mut self.entries;
        let before = entries.len();
        let result = decode_entry(store, key, repository, fields, &mut |id, frame, position| {
            entries.push(Entry { id, pack, place: frame << 8 | u32::from(position) });
        });
        match result {
            Ok(info) => {
                self.packs.push(Arc::new(info));
                Ok(())
            }
            Err(e) => {
                self.entries.truncate(before);
                Err(e)
            }
        }
    }

    /// Reads a segment's body.
    pub(crate) fn read_segment(
        store: &str,
        key: &str,
        repository: &[u8; 16],
        body: &[u8],
    ) -> Result<Self> {
        let bad = || damaged(key, "malformed index segment");
        let mut fields = Fields::new(body);
        if fields.u8() != Some(LAYOUT_PACKS) {
            return Err(bad());
        }
        // Segments that a merged one stands for; they are merely redundant while they still exist.
        let replaced = fields.u32().ok_or_else(bad)? as usize;
        fields.take(replaced.checked_mul(16).ok_or_else(bad)?).ok_or_else(bad)?;
        let count = fields.u32().ok_or_else(bad)?;
        let mut batch = Self::default();
        for _ in 0..count {
            batch.read(store, key, repository, &mut fields)?;
        }
        if fields.is_empty() { Ok(batch) } else { Err(bad()) }
    }
}

/// Body of a segment of these pack entries.
pub(crate) fn encode_segment(entries: &[Vec<u8>]) -> Vec<u8> {
    let len: usize = entries.iter().map(Vec::len).sum();
    let mut body = Vec::with_capacity(len + 9);
    body.push(LAYOUT_PACKS);
    body.extend_from_slice(&0u32.to_le_bytes());
    body.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    entries.iter().for_each(|entry| body.extend_from_slice(entry));
    body
}

impl Index {
    /// Adds packs that a segment describes; those already known are left out.
    pub(crate) fn add(&mut self, batch: Batch) {
        for pack in &batch.packs {
            self.adopted.remove(&pack.header.object);
        }
        self.insert(batch);
    }

    /// Adds packs that no segment describes.
    pub(crate) fn adopt(&mut self, batch: Batch) {
        let ids = batch.packs.iter().map(|pack| pack.header.object);
        let new: Vec<_> = ids.filter(|id| !self.by_id.contains_key(id)).collect();
        self.adopted.extend(new);
        self.insert(batch);
    }

    /// Packs that no segment describes yet.
    pub(crate) fn adopted(&self) -> Vec<Arc<PackInfo>> {
        let numbers = self.adopted.iter().filter_map(|id| self.by_id.get(id));
        numbers.map(|number| self.packs[*number as usize].clone()).collect()
    }

    fn insert(&mut self, batch: Batch) {
        let numbers: Vec<Option<u32>> = batch
            .packs
            .into_iter()
            .map(|pack| {
                let number = self.packs.len() as u32;
                match self.by_id.entry(pack.header.object) {
                    std::collections::hash_map::Entry::Occupied(_) => None,
                    std::collections::hash_map::Entry::Vacant(free) => {
                        free.insert(number);
                        self.packs.push(pack);
                        Some(number)
                    }
                }
            })
            .collect();
        let mut run: Vec<Entry> = batch
            .entries
            .into_iter()
            .filter_map(|e| numbers[e.pack as usize].map(|pack| Entry { pack, ..e }))
            .collect();
        if run.is_empty() {
            return;
        }
        run.sort_unstable();
        run.shrink_to_fit();
        self.runs.push(run);
        self.settle();
    }

    /// Merges runs until each is more than twice as long as the next.
    fn settle(&mut self) {
        while let [.., a, b] = &self.runs[..] {
            if a.len() / 2 >= b.len() {
                break;
            }
            if let (Some(b), Some(a)) = (self.runs.pop(), self.runs.pop()) {
                self.runs.push(merge(&a, &b));
            }
        }
    }

    /// Whether a durable pack holds this blob.
    pub(crate) fn contains(&self, id: &BlobId) -> bool {
        self.runs.iter().any(|run| find(run, id).is_some())
    }

    /// Every place that holds a blob; more than one when writers did not know of each other.
    pub(crate) fn locate(&self, id: &BlobId) -> Vec<Location> {
        let mut places = Vec::new();
        for run in &self.runs {
            let Some(at) = find(run, id) else { continue };
            for entry in run[at..].iter().take_while(|e| e.id == *id) {
                places.push(Location {
                    pack: self.packs[entry.pack as usize].clone(),
                    pack_number: entry.pack,
                    frame: entry.place >> 8,
                    position: entry.place as u8,
                });
            }
        }
        places
    }

    /// Whether a pack is known.
    pub(crate) fn has_pack(&self, id: &[u8; 16]) -> bool {
        self.by_id.contains_key(id)
    }

    /// Number of distinct chunks, map pages not counted.
    pub(crate) fn distinct_chunks(&self) -> u64 {
        let is_chunk = |e: &Entry| {
            let pack = &self.packs[e.pack as usize];
            pack.frames[(e.place >> 8) as usize].content == Content::Chunks
        };
        let mut count = 0;
        for (n, run) in self.runs.iter().enumerate() {
            for same in run.chunk_by(|a, b| a.id == b.id) {
                let earlier = self.runs[..n].iter().any(|r| find(r, &same[0].id).is_some());
                count += u64::from(!earlier && is_chunk(&same[0]));
            }
        }
        count
    }
}

/// The first entry of an id. Ids are uniform, so a guess by value is near; the search widens from it.
fn find(run: &[Entry], id: &BlobId) -> Option<usize> {
    let head = u64::from_be_bytes([
        id.0[0], id.0[1], id.0[2], id.0[3], id.0[4], id.0[5], id.0[6], id.0[7],
    ]);
    let guess = ((u128::from(head) * run.len() as u128) >> 64) as usize;
    let (mut low, mut high, mut step) = (guess, guess, 16);
    while low > 0 && run[low - 1].id >= *id {
        low = low.saturating_sub(step);
        step *= 2;
    }
    step = 16;
    while high < run.len() && run[high].id < *id {
        high = (high + step).min(run.len());
        step *= 2;
    }
    let at = low + run[low..high].partition_point(|e| e.id < *id);
    run.get(at).is_some_and(|e| e.id == *id).then_some(at)
}

fn merge(a: &[Entry], b: &[Entry]) -> Vec<Entry> {
    let mut out = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        let next = if x <= y { a.next() } else { b.next() };
        out.extend(next);
    }
    out.extend(a);
    out.extend(b);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_finds_exactly_what_is_there() {
        for len in [1usize, 2, 3, 17, 1000, 5000] {
            let mut run: Vec<Entry> = (0..len as u32)
                .map(|n| Entry {
                    id: BlobId::of(&[7; 32], &(n / 2).to_le_bytes()),
                    pack: n,
                    place: 0,
                })
                .collect();
            run.sort_unstable();
            for entry in &run {
                let at = find(&run, &entry.id).unwrap();
                assert_eq!(run[at].id, entry.id);
                assert!(at == 0 || run[at - 1].id < entry.id, "the first of equal ones");
            }
            for n in 0..200u32 {
                let absent = BlobId::of(&[8; 32], &n.to_le_bytes());
                assert_eq!(find(&run, &absent), None);
            }
            assert_eq!(find(&run, &BlobId([0; 16])), None);
            assert_eq!(find(&run, &BlobId([255; 16])), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_segment_makes_the_reader_fail_badly(
            junk in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400),
            at in 0usize..400,
            value in proptest::prelude::any::<u8>(),
            cut in 0usize..400,
        ) {
            use crate::object::{Header, Kind};
            let _ = Batch::read_segment("s", "k", &[1; 16], &junk);
            let header = Header::new(Kind::Pack, [1; 16], [2; 16]).unwrap();
            let frame = FrameInfo {
                offset: 88,
                stored: 100,
                raw: 4 << 16,
                blobs: 4,
                content: Content::Chunks,
                codec: 1,
            };
            let pack = PackInfo { header, len: 5000, frames: vec![frame; 3] };
            let ids: Vec<BlobId> = (0..4u8).map(|n| BlobId([n; 16])).collect();
            let entry = crate::pack::encode_entry(&pack, &vec![ids; 3]);
            let mut segment = encode_segment(&[entry]);
            proptest::prop_assert!(Batch::read_segment("s", "k", &[1; 16], &segment).is_ok());
            let (at, cut) = (at % segment.len(), cut % segment.len());
            segment[at] = value;
            if let Ok(batch) = Batch::read_segment("s", "k", &[1; 16], &segment) {
                let mut index = Index::default();
                index.add(batch);
                // Whatever it says, what it names can be looked up.
                (0..4u8).flat_map(|n| index.locate(&BlobId([n; 16]))).for_each(|place| {
                    let info = place.info();
                    assert!(u64::from(info.offset + info.stored) <= place.pack.len);
                });
            }
            segment.truncate(cut);
            proptest::prop_assert!(Batch::read_segment("s", "k", &[1; 16], &segment).is_err());
        }
    }

    #[test]
    fn merged_runs_keep_every_entry_in_order() {
        let run = |seed: u8, len: u32| {
            let mut run: Vec<Entry> = (0..len)
                .map(|n| Entry { id: BlobId::of(&[seed; 32], &n.to_le_bytes()), pack: n, place: 1 })
                .collect();
            run.sort_unstable();
            run
        };
        let (a, b) = (run(1, 300), run(2, 77));
        let merged = merge(&a, &b);
        assert_eq!(merged.len(), 377);
        assert!(merged.is_sorted());
        assert!(a.iter().chain(&b).all(|e| find(&merged, &e.id).is_some()));
    }
}
