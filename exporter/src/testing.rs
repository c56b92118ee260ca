//! Doubles for tests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tidemark_disk::{Block, DiskError, Extent, ExtentKind, Geometry, Result};

/// A disk whose content is a function of the offset and whose extents are set by hand; counts what is
/// asked of it.
pub(crate) struct FakeDisk {
    size: u64,
    /// Where a kind begins; it lasts to the next entry.
    kinds: Mutex<BTreeMap<u64, ExtentKind>>,
    answer: Mutex<Option<Vec<Extent>>>,
    questions: AtomicU64,
}

impl FakeDisk {
    pub(crate) fn sparse(size: u64) -> Self {
        Self {
            size,
            kinds: Mutex::new(BTreeMap::from([(0, ExtentKind::Hole)])),
            answer: Mutex::default(),
            questions: AtomicU64::new(0),
        }
    }

    /// Sets a range's kind.
    pub(crate) fn extent(&self, offset: u64, len: u64, kind: ExtentKind) {
        let mut kinds = self.kinds.lock();
        let after = *kinds.range(..=offset + len).next_back().unwrap().1;
        kinds.retain(|at, _| !(offset..offset + len).contains(at));
        kinds.insert(offset, kind);
        if offset + len < self.size {
            kinds.entry(offset + len).or_insert(after);
        }
    }

    /// Answers every question for extents with this list.
    pub(crate) fn answer(&self, extents: Vec<Extent>) {
        *self.answer.lock() = Some(extents);
    }

    pub(crate) fn questions(&self) -> u64 {
        self.questions.load(Ordering::Relaxed)
    }

    fn kind_at(&self, offset: u64) -> ExtentKind {
        *self.kinds.lock().range(..=offset).next_back().unwrap().1
    }

    /// The content of one sector.
    pub(crate) fn sector(&self, offset: u64) -> [u8; 512] {
        let mut sector = [0; 512];
        if self.kind_at(offset) == ExtentKind::Data {
            let mut word = offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            for bytes in sector.chunks_exact_mut(8) {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
        sector
    }
}

impl Block for FakeDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size, logical_sector: 512, physical_sector: 4096 }
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        if !offset.is_multiple_of(512) || !len.is_multiple_of(512) || offset + len > self.size {
            return Err(DiskError::OutOfRange { offset, len });
        }
        for (i, sector) in buf.chunks_exact_mut(512).enumerate() {
            sector.copy_from_slice(&self.sector(offset + 512 * i as u64));
        }
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(DiskError::ReadOnly { path: "fake".into() })
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(DiskError::ReadOnly { path: "fake".into() })
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(DiskError::ReadOnly { path: "fake".into() })
    }
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        if let Some(answer) = self.answer.lock().as_ref() {
            return Ok(answer.clone());
        }
        let end = offset + len;
        let kinds = self.kinds.lock();
        let first = *kinds.range(..=offset).next_back().unwrap().1;
        let mut out = vec![Extent { offset, len, kind: first }];
        for (at, kind) in kinds.range(offset + 1..end) {
            let last = out.last_mut().unwrap();
            if last.kind != *kind {
                last.len = at - last.offset;
                out.push(Extent { offset: *at, len: end - at, kind: *kind });
            }
        }
        Ok(out)
    }
}
