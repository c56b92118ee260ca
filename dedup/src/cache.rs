//! Bounded caches of decoded frames and pages in memory.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::frame::{Content, Decoded};
use crate::id::BlobId;
use crate::index::Location;
use crate::map::Page;

/// Memory of decoded data frames.
const DATA_BYTES: usize = 32 << 20;
/// Memory of decoded map frames.
const MAP_BYTES: usize = 8 << 20;
/// Parsed pages, about 1 KiB each.
const PAGES: usize = 8192;

/// Least recently used entries go first.
struct Lru<K, V> {
    entries: HashMap<K, (V, u64, usize)>,
    by_age: BTreeMap<u64, K>,
    clock: u64,
    weight: usize,
    limit: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Lru<K, V> {
    fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), by_age: BTreeMap::new(), clock: 0, weight: 0, limit }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        let (value, age, _) = self.entries.get_mut(key)?;
        self.by_age.remove(age);
        self.clock += 1;
        *age = self.clock;
        self.by_age.insert(self.clock, *key);
        Some(value.clone())
    }

    fn put(&mut self, key: K, value: V, weight: usize) {
        self.clock += 1;
        if let Some((_, age, old)) = self.entries.insert(key, (value, self.clock, weight)) {
            self.by_age.remove(&age);
            self.weight -= old;
        }
        self.by_age.insert(self.clock, key);
        self.weight += weight;
        while self.weight > self.limit {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            if let Some((_, _, weight)) = self.entries.remove(&oldest) {
                self.weight -= weight;
            }
        }
    }
}

/// Names a frame within one open repository: number of the pack in the index, number of the frame.
pub(crate) type FrameKey = (u32, u32);

/// Decoded frames: data and map apart, so that a restore does not drive the map out.
pub(crate) struct FrameCache {
    data: Mutex<Lru<FrameKey, Arc<Decoded>>>,
    map: Mutex<Lru<FrameKey, Arc<Decoded>>>,
}

impl Default for FrameCache {
    fn default() -> Self {
        Self { data: Mutex::new(Lru::new(DATA_BYTES)), map: Mutex::new(Lru::new(MAP_BYTES)) }
    }
}

impl FrameCache {
    fn part(&self, place: &Location) -> &Mutex<Lru<FrameKey, Arc<Decoded>>> {
        match place.info().content {
            Content::Chunks => &self.data,
            Content::Pages => &self.map,
        }
    }

    pub(crate) fn get(&self, place: &Location) -> Option<Arc<Decoded>> {
        self.part(place).lock().get(&place.frame_key())
    }

    pub(crate) fn put(&self, place: &Location, frame: &Arc<Decoded>) {
        self.part(place).lock().put(place.frame_key(), frame.clone(), frame.weight());
    }

    /// Forgets data, so that a verification reads what is stored and not what was.
    pub(crate) fn clear(&self) {
        *self.data.lock() = Lru::new(DATA_BYTES);
        *self.map.lock() = Lru::new(MAP_BYTES);
    }
}

/// Parsed pages.
pub(crate) struct PageCache(Mutex<Lru<BlobId, Arc<Page>>>);

impl Default for PageCache {
    fn default() -> Self {
        Self(Mutex::new(Lru::new(PAGES)))
    }
}

impl PageCache {
    pub(crate) fn get(&self, id: &BlobId) -> Option<Arc<Page>> {
        self.0.lock().get(id)
    }

    pub(crate) fn put(&self, id: BlobId, page: &Arc<Page>) {
        self.0.lock().put(id, page.clone(), 1);
    }

    /// As [`FrameCache::clear`].
    pub(crate) fn clear(&self) {
        *self.0.lock() = Lru::new(PAGES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_its_limit_and_keeps_what_is_used() {
        let mut lru = Lru::new(10);
        for n in 0..10 {
            lru.put(n, n, 1);
        }
        assert_eq!(lru.get(&0), Some(0));
        lru.put(10, 10, 1);
        assert_eq!(lru.get(&1), None, "the least recently used one went");
        assert_eq!(lru.get(&0), Some(0));
        lru.put(11, 11, 9);
        assert_eq!((lru.get(&0), lru.get(&11), lru.weight), (Some(0), Some(11), 10));
        lru.put(12, 12, 11);
        assert_eq!((lru.entries.len(), lru.by_age.len(), lru.weight), (0, 0, 0));
    }
}
