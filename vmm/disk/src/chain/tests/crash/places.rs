//! The sectors that the crash test looks at, and what it puts there.

use std::ops::Range;
use std::sync::LazyLock;

use super::super::world::{MIB, Rng};
use super::life::Value;
use crate::block::Block;

/// Two regions of the write-intent bitmap; the last block is cut.
pub(super) const SIZE: u64 = 20 * MIB + 40 * 512;
pub(super) const BLOCK: u64 = MIB;
/// Blocks in use: neighbours, the two at a region's border, and the last one.
const HOT: [u64; 6] = [0, 1, 2, 15, 16, 20];
/// Sectors of a block in use: its ends, and around the place where a merge cuts its copies.
const PARTS: [Range<u64>; 3] = [0..8, 508..516, 2040..2048];

pub(super) const ZERO: Value = 0;
/// What was never written there.
pub(super) const GARBAGE: Value = u64::MAX;

/// Offsets of the sectors, ascending.
pub(super) static PLACES: LazyLock<Vec<u64>> = LazyLock::new(|| {
    let sectors = |block: &u64| {
        let start = block * BLOCK;
        PARTS.into_iter().flatten().map(move |sector| start + sector * 512)
    };
    HOT.iter().flat_map(sectors).filter(|at| *at < SIZE).collect()
});

/// The runs of sectors that follow one another, as indices of [`PLACES`].
pub(super) static RUNS: LazyLock<Vec<Range<usize>>> = LazyLock::new(|| {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, at) in PLACES.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if PLACES[run.end - 1] + 512 == *at => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
});

/// First sector and number of a request to some of the runs.
pub(super) fn run_of(rng: &mut Rng, runs: Range<usize>) -> (usize, usize) {
    let run = &RUNS[runs.start + rng.below(runs.len() as u64) as usize];
    let start = run.start + rng.below(run.len() as u64) as usize;
    let len = 1 + rng.below((run.end - start).min(9) as u64) as usize;
    (start, len)
}

fn sector(value: Value, at: u64) -> Vec<u8> {
    if value == ZERO {
        return vec![0; 512];
    }
    [value.to_le_bytes(), at.to_le_bytes()].concat().repeat(32)
}

/// What a write of `value` puts into places that follow one another.
pub(super) fn data_of(value: Value, places: Range<usize>) -> Vec<u8> {
    places.flat_map(|i| sector(value, PLACES[i])).collect()
}

/// What it puts into a range of the disk.
pub(super) fn block_data(value: Value, range: Range<u64>) -> Vec<u8> {
    range.step_by(512).flat_map(|at| sector(value, at)).collect()
}

fn value_of(data: &[u8], at: u64) -> Value {
    let unit = |range: Range<usize>| data[range].try_into().map_or(GARBAGE, u64::from_le_bytes);
    match (unit(0..8), unit(8..16)) {
        // All units are the same.
        _ if data[16..] != data[..496] => GARBAGE,
        (0, 0) => ZERO,
        (value @ 1.., place) if place == at => value,
        _ => GARBAGE,
    }
}

/// What the places hold.
pub(super) fn values(disk: &dyn Block) -> crate::Result<Vec<Value>> {
    let mut found = Vec::with_capacity(PLACES.len());
    for run in &*RUNS {
        let mut data = vec![0xee; run.len() * 512];
        disk.read_at(PLACES[run.start], &mut data)?;
        let sectors = data.chunks_exact(512).zip(&PLACES[run.clone()]);
        found.extend(sectors.map(|(data, at)| value_of(data, *at)));
    }
    Ok(found)
}

/// The first sector of the whole disk that holds what was never written there.
pub(super) fn garbage(disk: &dyn Block) -> crate::Result<Option<u64>> {
    let mut data = vec![0; BLOCK as usize];
    for start in (0..SIZE).step_by(BLOCK as usize) {
        let part = &mut data[..(SIZE - start).min(BLOCK) as usize];
        disk.read_at(start, part)?;
        let wrong = (start..).step_by(512).zip(part.chunks_exact(512));
        if let Some((at, _)) = wrong.into_iter().find(|(at, data)| value_of(data, *at) == GARBAGE) {
            return Ok(Some(at));
        }
    }
    Ok(None)
}
