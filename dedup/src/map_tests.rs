use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

/// Pages in memory; counts what is stored and read.
#[derive(Default)]
struct Memory {
    /// Pages and whether they can be read already.
    pages: HashMap<BlobId, (Page, bool)>,
    puts: usize,
    reads: usize,
}

impl PageSource for Memory {
    fn page(&mut self, id: &BlobId, level: u8) -> Result<Arc<Page>> {
        self.reads += 1;
        let (page, durable) = self.pages[id].clone();
        assert!(durable, "a page was read that is only about to be stored");
        assert_eq!(page.level, level);
        Ok(Arc::new(page))
    }
}

impl PageStore for Memory {
    fn put(&mut self, page: &Page) -> Result<BlobId> {
        let bytes = page.encode();
        assert!(Page::decode(&bytes).is_some_and(|read| read == *page));
        let id = BlobId::of(&[1; 32], &bytes);
        if let std::collections::hash_map::Entry::Vacant(free) = self.pages.entry(id) {
            free.insert((page.clone(), false));
            self.puts += 1;
        }
        Ok(id)
    }
}

impl Memory {
    fn finish(&mut self, builder: MapBuilder) -> Root {
        let root = builder.finish(self).unwrap();
        self.pages.values_mut().for_each(|(_, durable)| *durable = true);
        root
    }
}

fn chunk_id(n: u64) -> BlobId {
    BlobId::of(&[2; 32], &n.to_le_bytes())
}

fn content(root: &Root, pages: &mut Memory) -> BTreeMap<u64, BlobId> {
    let mut walker = Walker::new(root, 0..u64::MAX);
    let mut found = BTreeMap::new();
    while let Some(leaf) = walker.next_leaf(pages, &mut None).unwrap() {
        found.extend(leaf.chunks(walker.range()));
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_chain_of_maps_equals_a_plain_model(
        steps in prop::collection::vec(
            (1u64..20_000, prop::collection::btree_map(0u64..20_000, 0u64..4, 0..40), any::<bool>()),
            1..6,
        )
    ) {
        let mut pages = Memory::default();
        let mut base: Option<Root> = None;
        let mut model: BTreeMap<u64, BlobId> = BTreeMap::new();
        for (chunks, writes, wide) in steps {
            model.retain(|chunk, _| *chunk < chunks);
            let mut builder = MapBuilder::new(chunks * CHUNK, base.as_ref(), &mut pages).unwrap();
            for (chunk, value) in writes {
                if chunk >= chunks { break }
                if value == 0 {
                    let end = if wide { (chunk + 5000).min(chunks) } else { chunk + 1 };
                    builder.clear(chunk..end, &mut pages).unwrap();
                    model.retain(|c, _| !(chunk..end).contains(c));
                    if wide { break }
                } else {
                    builder.set(chunk, chunk_id(value), &mut pages).unwrap();
                    model.insert(chunk, chunk_id(value));
                }
            }
            let root = pages.finish(builder);
            prop_assert_eq!(content(&root, &mut pages), model.clone());
            // The same content, written anew, has the same root.
            let mut fresh = MapBuilder::new(chunks * CHUNK, None, &mut pages).unwrap();
            for (chunk, id) in &model {
                fresh.set(*chunk, *id, &mut pages).unwrap();
            }
            prop_assert_eq!(pages.finish(fresh), root);
            base = Some(root);
        }
    }

    #[test]
    fn no_bytes_make_the_page_reader_fail_badly(bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
        if let Some(page) = Page::decode(&bytes) {
            prop_assert_eq!(page.encode(), bytes);
        }
    }
}

#[test]
fn the_cost_of_a_map_follows_the_change_and_not_the_disk() {
    let mut pages = Memory::default();
    for size in [16u64 << 30, 1 << 40, 10 << 40] {
        let mut builder = MapBuilder::new(size, None, &mut pages).unwrap();
        builder.set(chunk_count(size) / 2, chunk_id(1), &mut pages).unwrap();
        let root = pages.finish(builder);
        (pages.puts, pages.reads) = (0, 0);
        let mut builder = MapBuilder::new(size, Some(&root), &mut pages).unwrap();
        builder.clear(0..chunk_count(size) / 2, &mut pages).unwrap();
        builder.set(chunk_count(size) / 2, chunk_id(2), &mut pages).unwrap();
        builder.clear(chunk_count(size) / 2 + 1..chunk_count(size), &mut pages).unwrap();
        pages.finish(builder);
        assert!(pages.puts <= usize::from(MAX_LEVELS), "{} pages for one chunk", pages.puts);
        assert!(pages.reads <= 2 * usize::from(MAX_LEVELS), "{} reads for one chunk", pages.reads);
    }
}

#[test]
fn scattered_changes_cost_little() {
    let mut pages = Memory::default();
    let size = 16u64 << 30;
    let mut builder = MapBuilder::new(size, None, &mut pages).unwrap();
    for chunk in 0..chunk_count(size) {
        builder.set(chunk, chunk_id(chunk), &mut pages).unwrap();
    }
    let root = pages.finish(builder);
    pages.puts = 0;
    let mut builder = MapBuilder::new(size, Some(&root), &mut pages).unwrap();
    for n in 0..1440 {
        builder.set(n * 182, chunk_id(n + (1 << 40)), &mut pages).unwrap();
    }
    pages.finish(builder);
    let cost = pages.puts * (MAX_PAGE_LEN + ID_LEN);
    assert!(cost < 2 << 20, "{cost} bytes of map for 1,440 changed chunks");
}
