use super::*;
use crate::testing::FakeDisk;
use tidemark_disk::Extent;

fn reads(disk: &FakeDisk, areas: &Areas) -> Vec<Step> {
    Steps::new(disk, areas).map(|s| s.unwrap()).collect()
}

fn chunks(ranges: &[Range<u64>], size: u64) -> ChunkSet {
    let mut set = ChunkSet::new(size);
    ranges.iter().for_each(|range| set.add(range));
    set
}

fn runs(chunks: &ChunkSet) -> Vec<Range<u64>> {
    let from = |at: u64| chunks.next_run(at);
    std::iter::successors(from(0), |run| from(run.end.next_multiple_of(CHUNK))).collect()
}

fn covered(steps: &[Step]) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for step in steps {
        let (Step::Read(range) | Step::Zero(range)) = step;
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range.clone()),
        }
    }
    out
}

#[test]
fn ranges_from_tracking_are_sorted_joined_and_clipped() {
    let size = 10 * CHUNK + 512;
    let wild = vec![
        9 * CHUNK..u64::MAX,
        CHUNK + 1..CHUNK + 2,
        2 * CHUNK..3 * CHUNK,
        5 * CHUNK..5 * CHUNK,
        20 * CHUNK..21 * CHUNK,
        0..1,
    ];
    assert_eq!(runs(&chunks(&wild, size)), [0..3 * CHUNK, 9 * CHUNK..size]);
    assert!(runs(&ChunkSet::new(size)).is_empty());
}

#[test]
fn chunks_are_found_across_words_and_windows() {
    let size = 3 * WINDOW + CHUNK;
    let ranges = [0..CHUNK, 62 * CHUNK..66 * CHUNK, WINDOW - CHUNK..WINDOW + CHUNK, size - 1..size];
    let found = [
        0..CHUNK,
        62 * CHUNK..66 * CHUNK,
        WINDOW - CHUNK..WINDOW,
        WINDOW..WINDOW + CHUNK,
        3 * WINDOW..size,
    ];
    assert_eq!(runs(&chunks(&ranges, size)), found);
}

#[test]
fn a_full_read_skips_holes_and_zeros_by_whole_chunks() {
    let disk = FakeDisk::sparse(64 * CHUNK);
    // One sector of data makes its whole chunk data.
    disk.extent(3 * CHUNK + 512, 512, ExtentKind::Data);
    disk.extent(20 * CHUNK, 2 * PIECE, ExtentKind::Data);
    disk.extent(20 * CHUNK + 4096, CHUNK, ExtentKind::Zero);
    let steps = reads(&disk, &Areas::Whole);
    assert!(steps.iter().all(|s| matches!(s, Step::Read(r) if r.end - r.start <= PIECE
        && r.start / PIECE == (r.end - 1) / PIECE)));
    assert_eq!(covered(&steps), [3 * CHUNK..4 * CHUNK, 20 * CHUNK..52 * CHUNK]);
    assert_eq!(bytes_to_read(&disk, &Areas::Whole).unwrap(), 33 * CHUNK);
}

#[test]
fn an_incremental_read_covers_its_areas_exactly_and_tells_zeros() {
    let size = 40 * CHUNK + 512;
    let disk = FakeDisk::sparse(size);
    disk.extent(0, 10 * CHUNK, ExtentKind::Data);
    disk.extent(40 * CHUNK, 512, ExtentKind::Zero);
    let changed = chunks(&[8 * CHUNK..12 * CHUNK, 39 * CHUNK..size], size);
    let steps = reads(&disk, &Areas::Changed(changed));
    assert_eq!(
        steps,
        [
            Step::Read(8 * CHUNK..10 * CHUNK),
            Step::Zero(10 * CHUNK..12 * CHUNK),
            Step::Zero(39 * CHUNK..size),
        ]
    );
    assert_eq!(covered(&steps), [8 * CHUNK..12 * CHUNK, 39 * CHUNK..size]);
}

#[test]
fn the_short_last_chunk_is_read() {
    let size = 3 * CHUNK + 1536;
    let disk = FakeDisk::sparse(size);
    disk.extent(3 * CHUNK + 1024, 512, ExtentKind::Data);
    assert_eq!(reads(&disk, &Areas::Whole), [Step::Read(3 * CHUNK..size)]);
}

#[test]
fn what_an_extent_list_leaves_out_or_garbles_is_read() {
    let disk = FakeDisk::sparse(8 * CHUNK);
    disk.answer(vec![Extent { offset: 2 * CHUNK, len: CHUNK, kind: ExtentKind::Hole }]);
    assert_eq!(covered(&reads(&disk, &Areas::Whole)), [0..2 * CHUNK, 3 * CHUNK..8 * CHUNK]);
    let hole = |offset, len| Extent { offset, len, kind: ExtentKind::Hole };
    disk.answer(vec![hole(4 * CHUNK, CHUNK), hole(0, 6 * CHUNK)]);
    assert_eq!(covered(&reads(&disk, &Areas::Whole)), vec![0..8 * CHUNK; 1]);
    disk.answer(vec![hole(0, u64::MAX)]);
    assert!(reads(&disk, &Areas::Whole).is_empty());
}

#[test]
fn a_sparse_tebibyte_takes_a_question_per_window_not_per_granule() {
    let disk = FakeDisk::sparse(1 << 40);
    disk.extent(1 << 39, 4096, ExtentKind::Data);
    assert_eq!(reads(&disk, &Areas::Whole).len(), 1);
    assert!(disk.questions() <= 4096 + 1, "{}", disk.questions());
}

#[test]
fn every_chunk_that_is_not_known_zero_is_read_once() {
    // Against a slow oracle: chunk by chunk.
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for _ in 0..200 {
        let size = 512 * (1 + random(64 * 128));
        let disk = FakeDisk::sparse(size);
        for _ in 0..random(20) {
            let at = 512 * random(size / 512);
            let len = (512 * (1 + random(400))).min(size - at);
            let kind = [ExtentKind::Data, ExtentKind::Zero, ExtentKind::Hole][random(3) as usize];
            disk.extent(at, len, kind);
        }
        let data = disk.extents(0, size).unwrap();
        let oracle: Vec<u64> = (0..size.div_ceil(CHUNK))
            .filter(|c| {
                data.iter().any(|e| {
                    e.kind == ExtentKind::Data
                        && e.offset < (c + 1) * CHUNK
                        && e.offset + e.len > c * CHUNK
                })
            })
            .collect();
        let mut read = Vec::new();
        for step in reads(&disk, &Areas::Whole) {
            let Step::Read(r) = step else { panic!("zero step over nothing") };
            assert!(r.end.is_multiple_of(CHUNK) || r.end == size);
            read.extend(r.start / CHUNK..r.end.div_ceil(CHUNK));
        }
        assert_eq!(read, oracle);
    }
}
