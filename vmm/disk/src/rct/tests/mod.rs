//! Tests of tracking. `recorder` is the abstract disk that the crash tests replay.

#![allow(clippy::single_range_in_vec_init)]

mod behaviour;
mod crash;
mod damage;
mod model;
mod recorder;
mod scenario;
mod threads;

use uuid::Uuid;

use super::DiskIdentity;
use crate::block::BlockRange;

/// Three map pages, eight regions; region 3 lies in pages 0 and 1, region 7 in pages 1 and 2.
const SIZE: u64 = 128 << 20;
const GRANULES: u64 = SIZE / crate::GRANULE;
const LINEAGE: Uuid = Uuid::from_u128(0x11ea);

fn identity(data_write_guid: Uuid) -> DiskIdentity {
    DiskIdentity { lineage: LINEAGE, size: SIZE, data_write_guid }
}

/// splitmix64: the same seed gives the same run everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.next(), self.next())
    }
}

/// The granules of `ranges`, as flags.
fn flags(ranges: &[BlockRange], granules: u64) -> Vec<bool> {
    let mut set = vec![false; granules as usize];
    for range in ranges {
        let end = range.end.div_ceil(crate::GRANULE);
        set[(range.start / crate::GRANULE) as usize..end as usize].fill(true);
    }
    set
}
