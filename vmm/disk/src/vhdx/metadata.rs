//! The metadata region ([MS-VHDX] 2.6): what the disk is, and its parent.

use std::collections::HashSet;

use uuid::{Uuid, uuid};

use super::layout::{MAX_BLOCK, MAX_SIZE, MIN_BLOCK, guid_at, put, u16_at, u32_at, u64_at};
use super::locator;
use super::{Kind, ParentLocator};
use crate::block::Geometry;

/// Bytes of the metadata table; items follow it.
pub(crate) const TABLE: usize = 64 << 10;
const MAX_ENTRIES: usize = 2047;
const MAX_ITEM: u32 = 1 << 20;

const FILE_PARAMETERS: Uuid = uuid!("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
const DISK_SIZE: Uuid = uuid!("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
const DISK_ID: Uuid = uuid!("BECA12AB-B2E6-4523-93EF-C309E000C746");
const LOGICAL_SECTOR: Uuid = uuid!("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
const PHYSICAL_SECTOR: Uuid = uuid!("CDA348C7-445D-4471-9CC9-E9885251C556");
const PARENT_LOCATOR: Uuid = uuid!("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");

const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;

/// What the metadata region says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) geometry: Geometry,
    pub(crate) block_size: u32,
    pub(crate) kind: Kind,
    pub(crate) disk_id: Uuid,
    pub(crate) parent: Option<ParentLocator>,
}

/// An entry of the metadata table.
#[derive(Debug, Clone, Copy)]
struct Entry {
    id: Uuid,
    offset: u32,
    len: u32,
    flags: u32,
}

/// Parses the table; every item lies in the region and overlaps no other.
fn entries(region: &[u8]) -> Result<Vec<Entry>, String> {
    if region.len() < TABLE || &region[..8] != b"metadata" {
        return Err("metadata table has no signature".to_owned());
    }
    let count = usize::from(u16_at(region, 10));
    if count > MAX_ENTRIES {
        return Err(format!("metadata table with {count} entries"));
    }
    let mut seen = HashSet::new();
    let mut spans = Vec::new();
    let mut found = Vec::with_capacity(count);
    for b in region[32..32 + 32 * count].chunks_exact(32) {
        let e = Entry {
            id: guid_at(b, 0),
            offset: u32_at(b, 16),
            len: u32_at(b, 20),
            flags: u32_at(b, 24),
        };
        if !seen.insert((e.id, e.flags & IS_USER)) {
            return Err(format!("metadata item {} named twice", e.id));
        }
        let end = u64::from(e.offset) + u64::from(e.len);
        if e.len > 0
            && ((e.offset as usize) < TABLE || e.len > MAX_ITEM || end > region.len() as u64)
        {
            return Err(format!("metadata item {} of {} bytes at {}", e.id, e.len, e.offset));
        }
        if e.len > 0 {
            spans.push((e.offset, e.offset + e.len));
        }
        found.push(e);
    }
    spans.sort_unstable();
    if spans.windows(2).any(|w| w[0].1 > w[1].0) {
        return Err("metadata items overlap".to_owned());
    }
    Ok(found)
}

impl Metadata {
    /// Parses a whole metadata region.
    pub(crate) fn parse(region: &[u8]) -> Result<Self, String> {
        let (mut parameters, mut size, mut disk_id) = (None, None, None);
        let (mut logical, mut physical, mut parent) = (None, None, None);
        for e in entries(region)? {
            // An empty item's offset is not checked.
            let begin = if e.len == 0 { 0 } else { e.offset as usize };
            let item = &region[begin..][..e.len as usize];
            let want = |len: usize| {
                if item.len() == len {
                    Ok(item)
                } else {
                    Err(format!("metadata item {} has {} bytes", e.id, e.len))
                }
            };
            match e.id {
                _ if e.flags & IS_USER != 0 && e.flags & IS_REQUIRED != 0 => {
                    return Err(format!("unknown required user metadata item {}", e.id));
                }
                // Whatever its id: only system items say what the disk is.
                _ if e.flags & IS_USER != 0 => {}
                FILE_PARAMETERS => parameters = Some((u32_at(want(8)?, 0), u32_at(item, 4))),
                DISK_SIZE => size = Some(u64_at(want(8)?, 0)),
                DISK_ID => disk_id = Some(guid_at(want(16)?, 0)),
                LOGICAL_SECTOR => logical = Some(u32_at(want(4)?, 0)),
                PHYSICAL_SECTOR => physical = Some(u32_at(want(4)?, 0)),
                PARENT_LOCATOR => parent = Some(locator::parse(item)?),
                _ if e.flags & IS_REQUIRED != 0 => {
                    return Err(format!("unknown required metadata item {}", e.id));
                }
                _ => {}
            }
        }
        let (block_size, bits) = parameters.ok_or("no file parameters")?;
        let kind = match bits & 3 {
            0 => Kind::Dynamic,
            1 => Kind::Fixed,
            _ => Kind::Differencing,
        };
        let metadata = Self {
            geometry: Geometry {
                size: size.ok_or("no virtual disk size")?,
                logical_sector: logical.ok_or("no logical sector size")?,
                physical_sector: physical.ok_or("no physical sector size")?,
            },
            block_size,
            kind,
            disk_id: disk_id.ok_or("no virtual disk id")?,
            parent,
        };
        metadata.validate()?;
        Ok(metadata)
    }

    /// The format's limits; also for files to be created.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let Geometry { size, logical_sector, physical_sector } = self.geometry;
        if !self.block_size.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&self.block_size)
        {
            return Err(format!(
                "block size {} (1 MiB to 256 MiB, a power of two)",
                self.block_size
            ));
        }
        for sector in [logical_sector, physical_sector] {
            if sector != 512 && sector != 4096 {
                return Err(format!("sector size {sector} (512 or 4096)"));
            }
        }
        if size == 0 || size > MAX_SIZE || size % u64::from(logical_sector) != 0 {
            return Err(format!(
                "virtual size {size} (a multiple of the sector size, up to 64 TiB)"
            ));
        }
        if (self.kind == Kind::Differencing) != self.parent.is_some() {
            return Err("parent locator and file parameters disagree".to_owned());
        }
        Ok(())
    }

    /// The table and items of a new file. The parent locator comes last, so that it can grow.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        let bits: u32 = match self.kind {
            Kind::Dynamic => 0,
            Kind::Fixed => 1,
            Kind::Differencing => 2,
        };
        let mut parameters = self.block_size.to_le_bytes().to_vec();
        parameters.extend(bits.to_le_bytes());
        let disk = IS_VIRTUAL_DISK | IS_REQUIRED;
        let mut items = vec![
            (FILE_PARAMETERS, IS_REQUIRED, parameters),
            (DISK_SIZE, disk, self.geometry.size.to_le_bytes().to_vec()),
            (DISK_ID, disk, self.disk_id.to_bytes_le().to_vec()),
            (LOGICAL_SECTOR, disk, self.geometry.logical_sector.to_le_bytes().to_vec()),
            (PHYSICAL_SECTOR, disk, self.geometry.physical_sector.to_le_bytes().to_vec()),
        ];
        if let Some(parent) = &self.parent {
            items.push((PARENT_LOCATOR, IS_REQUIRED, locator::encode(parent)?));
        }
        let mut b = vec![0; TABLE];
        put(&mut b, 0, b"metadata");
        put(&mut b, 10, &(items.len() as u16).to_le_bytes());
        for (i, (id, flags, item)) in items.into_iter().enumerate() {
            // The locator starts on a page of its own: rewriting it touches nothing else.
            if id == PARENT_LOCATOR {
                b.resize(b.len().next_multiple_of(4096), 0);
            }
            let entry = Entry { id, offset: b.len() as u32, len: item.len() as u32, flags };
            put_entry(&mut b, i, entry);
            b.extend(item);
        }
        Ok(b)
    }
}

fn put_entry(b: &mut [u8], index: usize, e: Entry) {
    let at = 32 + 32 * index;
    put(b, at, &e.id.to_bytes_le());
    put(b, at + 16, &e.offset.to_le_bytes());
    put(b, at + 20, &e.len.to_le_bytes());
    put(b, at + 24, &e.flags.to_le_bytes());
    put(b, at + 28, &0u32.to_le_bytes());
}

/// Puts another parent locator into a metadata region (whole, as read); gives the byte range of the
/// region that changed, page aligned, besides the table's pages.
pub(crate) fn replace_locator(
    region: &mut [u8],
    parent: &ParentLocator,
) -> Result<std::ops::Range<usize>, String> {
    let found = entries(region)?;
    let item = locator::encode(parent)?;
    let index = found
        .iter()
        .position(|e| e.id == PARENT_LOCATOR && e.flags & IS_USER == 0)
        .ok_or("no parent locator")?;
    let others = found.iter().enumerate().filter(|(i, _)| *i != index);
    let last = others
        .filter(|(_, e)| e.len > 0)
        .map(|(_, e)| (e.offset + e.len) as usize)
        .max()
        .unwrap_or(TABLE);
    let offset = last.max(TABLE).next_multiple_of(4096);
    let end = (offset + item.len()).next_multiple_of(4096);
    if end > region.len() {
        return Err("no room for the parent locator".to_owned());
    }
    region[offset..end].fill(0);
    put(region, offset, &item);
    let entry = Entry { offset: offset as u32, len: item.len() as u32, ..found[index] };
    put_entry(region, index, entry);
    Ok(offset..end)
}

/// Puts another virtual size into a metadata region.
pub(crate) fn replace_size(region: &mut [u8], size: u64) -> Result<(), String> {
    replace(region, DISK_SIZE, &size.to_le_bytes())
}

/// Puts another Virtual Disk ID into a metadata region.
pub(crate) fn replace_disk_id(region: &mut [u8], id: Uuid) -> Result<(), String> {
    replace(region, DISK_ID, &id.to_bytes_le())
}

/// Overwrites a system item by one of the same length.
fn replace(region: &mut [u8], id: Uuid, value: &[u8]) -> Result<(), String> {
    let found = entries(region)?;
    let item = found.iter().find(|e| e.id == id && e.flags & IS_USER == 0 && e.len > 0);
    let item = item.ok_or_else(|| format!("no metadata item {id}"))?;
    if item.len as usize != value.len() {
        return Err(format!("metadata item {id} has {} bytes", item.len));
    }
    put(region, item.offset as usize, value);
    Ok(())
}
