//! The index between store, local cache and memory: loading, refreshing, rebuilding from the packs'
//! own indices.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::StreamExt;

use crate::bytes::Fields;
use crate::error::{RepoError, Result};
use crate::id::{hex, hex_decode, random};
use crate::index::{Batch, MAX_SEGMENT_LEN, SEGMENT_TARGET_LEN, encode_segment};
use crate::object::{HEADER_LEN, Header, Kind, Sealer, Section, damaged, open_body, seal_body};
use crate::pack::{FOOTER_LEN, PackInfo, decode_entry, footer};
use crate::pool::block_on;
use crate::repo::{Inner, PARALLEL};
use crate::store::ObjectInfo;

const PREFIX: &str = "index/";
/// First guess of how much of a pack's end holds its index.
const TAIL_GUESS: u64 = 64 * 1024;

/// Epoch and id that a segment's key names.
fn parse_key(key: &str) -> Option<&str> {
    let name = key.strip_prefix(PREFIX)?;
    let (epoch, id) = name.split_once('-')?;
    hex_decode::<4>(epoch)?;
    hex_decode::<16>(id)?;
    Some(name)
}

impl Inner {
    /// Reads the index segments that are not known yet. A damaged or vanished one costs a look at the
    /// packs that no other segment describes; it does not stop the repository from being read.
    pub(crate) fn refresh(&self) -> Result<()> {
        let _alone = self.refreshing.lock();
        let listed = block_on(self.store.list(PREFIX))?;
        let listed: Vec<ObjectInfo> =
            listed.into_iter().filter(|object| parse_key(&object.key).is_some()).collect();
        self.prune_cache(&listed);
        let new: Vec<&ObjectInfo> = {
            let index = self.index.read();
            listed.iter().filter(|object| !index.segments.contains(&object.key)).collect()
        };
        let mut incomplete = false;
        let mut segments = std::pin::pin!(
            futures::stream::iter(new)
                .map(|object| async move { (object, self.segment(object).await) })
                .buffer_unordered(4)
        );
        while let Some((object, segment)) = block_on(segments.next()) {
            match segment {
                Ok(batch) => {
                    let mut index = self.index.write();
                    index.add(batch);
                    index.segments.insert(object.key.clone());
                }
                Err(e @ (RepoError::Damaged { .. } | RepoError::Missing { .. })) => {
                    tracing::warn!("index segment left out: {e}");
                    incomplete = true;
                }
                Err(e) => return Err(e),
            }
        }
        if incomplete { self.adopt_unindexed().map(drop) } else { Ok(()) }
    }

    /// One segment, from the local cache if that has it intact.
    async fn segment(&self, object: &ObjectInfo) -> Result<Batch> {
        let path = self.cache_path(&object.key);
        if let Some(bytes) = path.as_ref().and_then(|path| fs::read(path).ok())
            && let Ok(batch) = self.read_segment(&object.key, &bytes)
        {
            return Ok(batch);
        }
        let bytes = self.fetch_segment(object).await?;
        let batch = self.read_segment(&object.key, &bytes)?;
        self.cache_segment(&object.key, &bytes);
        Ok(batch)
    }

    async fn fetch_segment(&self, object: &ObjectInfo) -> Result<Bytes> {
        if object.size > MAX_SEGMENT_LEN as u64 {
            return Err(damaged(&object.key, "larger than the format allows"));
        }
        self.store.get(&object.key).await
    }

    fn read_segment(&self, key: &str, bytes: &[u8]) -> Result<Batch> {
        let limit = MAX_SEGMENT_LEN;
        let (header, body) =
            open_body(&self.keys, &self.name, key, Kind::Index, &self.id, bytes, limit)?;
        if segment_key(&header) != key {
            return Err(damaged(key, "the segment is another one than its name says"));
        }
        Batch::read_segment(&self.name, key, &self.id, &body)
    }

    /// Checks one stored segment, past the cache.
    pub(crate) async fn check_segment(&self, object: &ObjectInfo) -> Result<()> {
        let bytes = self.fetch_segment(object).await?;
        self.read_segment(&object.key, &bytes).map(drop)
    }

    /// Keys and sizes of all segments.
    pub(crate) fn list_segments(&self) -> Result<Vec<ObjectInfo>> {
        let mut listed = block_on(self.store.list(PREFIX))?;
        listed.retain(|object| parse_key(&object.key).is_some());
        Ok(listed)
    }

    /// Writes a segment of pack entries, all of durable packs, and takes it into the index. Gives the
    /// size of the object. Killed before: the packs are garbage until a collection finds them.
    /// Killed after: they are known, and a later run need not store their chunks again.
    pub(crate) fn write_segment(&self, entries: &[Vec<u8>]) -> Result<u64> {
        let header = Header::new(Kind::Index, self.id, random()?)?;
        let key = segment_key(&header);
        // Ids do not compress, but runs of small frames do.
        let object: Bytes = seal_body(&self.keys, &header, &encode_segment(entries), 1)?.into();
        block_on(self.store.create(&key, object.clone()))?;
        self.cache_segment(&key, &object);
        let mut batch = Batch::default();
        for entry in entries {
            batch.read(&self.name, &key, &self.id, &mut Fields::new(entry))?;
        }
        let mut index = self.index.write();
        index.add(batch);
        index.segments.insert(key);
        Ok(object.len() as u64)
    }

    /// Takes packs into the index that no readable segment describes, from the packs' own indices.
    /// Gives how many there were. A pack whose end is damaged is left out, with a warning.
    pub(crate) fn adopt_unindexed(&self) -> Result<usize> {
        let packs = self.list_packs()?;
        let unknown: Vec<&ObjectInfo> = {
            let index = self.index.read();
            packs.iter().filter(|(id, _)| !index.has_pack(id)).map(|(_, object)| object).collect()
        };
        let mut tails = std::pin::pin!(
            futures::stream::iter(unknown)
                .map(|object| self.pack_entry(object))
                .buffer_unordered(PARALLEL)
        );
        let mut adopted = 0;
        while let Some(entry) = block_on(tails.next()) {
            let mut batch = Batch::default();
            let read = entry.and_then(|(key, entry)| {
                batch.read(&self.name, &key, &self.id, &mut Fields::new(&entry))
            });
            match read {
                Ok(()) => {
                    self.index.write().adopt(batch);
                    adopted += 1;
                }
                Err(e @ (RepoError::Damaged { .. } | RepoError::Missing { .. })) => {
                    tracing::warn!("pack left out: {e}");
                }
                Err(e) => return Err(e),
            }
        }
        Ok(adopted)
    }

    /// Describes adopted packs in new segments: a restore point must not depend on packs that only a
    /// search finds. So the index heals with the next run. Gives bytes and number of objects written.
    pub(crate) fn describe_adopted(&self) -> Result<(u64, u64)> {
        let (mut bytes, mut objects, mut entries) = (0, 0, Vec::new());
        let adopted = self.index.read().adopted();
        for (at, pack) in adopted.iter().enumerate() {
            let object = ObjectInfo { key: pack.key(), size: pack.len };
            entries.push(block_on(self.pack_entry(&object))?.1);
            let waiting: usize = entries.iter().map(Vec::len).sum();
            if waiting >= SEGMENT_TARGET_LEN || at + 1 == adopted.len() {
                bytes += self.write_segment(&entries)?;
                objects += 1;
                entries.clear();
            }
        }
        Ok((bytes, objects))
    }

    /// Ids, keys and sizes of all packs.
    pub(crate) fn list_packs(&self) -> Result<Vec<([u8; 16], ObjectInfo)>> {
        let listed = block_on(self.store.list("packs/"))?;
        Ok(listed
            .into_iter()
            .filter_map(|object| {
                let id = hex_decode::<16>(object.key.rsplit('/').next()?)?;
                (crate::pack::key(&id) == object.key).then_some((id, object))
            })
            .collect())
    }

    /// The entry at the end of a pack, decrypted, and the pack's key.
    async fn pack_entry(&self, object: &ObjectInfo) -> Result<(String, Vec<u8>)> {
        let key = &object.key;
        if object.size < (HEADER_LEN + FOOTER_LEN) as u64 {
            return Err(damaged(key, "cut short"));
        }
        let head = self.store.get_range(key, 0..HEADER_LEN as u64).await?;
        let header = Header::parse(&self.name, key, Kind::Pack, &self.id, &head)?;
        if crate::pack::key(&header.object) != *key {
            return Err(damaged(key, "the pack is another one than its name says"));
        }
        let start = object.size.saturating_sub(TAIL_GUESS);
        let mut tail = self.store.get_range(key, start..object.size).await?;
        let index = footer(key, &tail, object.size)?;
        let needed = (index + FOOTER_LEN) as u64;
        if needed > tail.len() as u64 {
            tail = self.store.get_range(key, object.size - needed..object.size).await?;
        }
        let sealed = tail
            .len()
            .checked_sub(index + FOOTER_LEN)
            .map(|at| &tail[at..at + index])
            .ok_or_else(|| damaged(key, "cut short"))?;
        let entry = Sealer::new(&self.keys, &header)?
            .open(Section::PackIndex, 0, sealed)
            .ok_or_else(|| damaged(key, "its index does not decrypt"))?;
        // The entry names its own pack: one from elsewhere would have failed to decrypt.
        Ok((key.clone(), entry))
    }

    /// Checks a pack's header and the index at its end against what the index knows of it.
    pub(crate) async fn check_pack_ends(
        &self,
        object: &ObjectInfo,
        known: &PackInfo,
    ) -> Result<()> {
        let (key, entry) = self.pack_entry(object).await?;
        let (name, mut fields) = (&self.name, Fields::new(&entry));
        let found = decode_entry(name, &key, &self.id, &mut fields, &mut |_, _, _| {})?;
        if found != *known || !fields.is_empty() {
            return Err(damaged(&key, "its own index differs from the index segment"));
        }
        Ok(())
    }

    fn cache_path(&self, key: &str) -> Option<PathBuf> {
        Some(self.cache_dir.as_ref()?.join(parse_key(key)?))
    }

    /// Keeps a segment locally. Only a convenience: failures are not errors, a damaged file is found
    /// out when it is read, and a file appears whole or not at all.
    fn cache_segment(&self, key: &str, object: &[u8]) {
        let Some(path) = self.cache_path(key) else { return };
        let Ok(nonce) = random::<8>() else { return };
        let temp = path.with_extension(format!("{}.tmp", hex(&nonce)));
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            fs::write(&temp, object)?;
            fs::rename(&temp, &path)
        };
        if let Err(e) = write() {
            tracing::debug!("index cache {}: {e}", path.display());
            let _ = fs::remove_file(&temp);
        }
    }

    /// Removes cached segments that are no longer in the store.
    fn prune_cache(&self, listed: &[ObjectInfo]) {
        let Some(dir) = &self.cache_dir else { return };
        let live: HashSet<&str> = listed.iter().filter_map(|o| parse_key(&o.key)).collect();
        let Ok(entries) = fs::read_dir(dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let known = name.to_str().is_some_and(|name| live.contains(name));
            // Files of other processes that are being written end in `.tmp`; they are short-lived,
            // and a removed one is only not cached.
            if !known {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn segment_key(header: &Header) -> String {
    format!("{PREFIX}{:08x}-{}", header.generation, hex(&header.object))
}
