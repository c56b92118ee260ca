//! Constants and small structures of the format ([MS-VHDX] 2.1, 2.2): file identifier, headers, region
//! tables. All integers are little-endian, GUIDs in Microsoft's mixed-endian form, checksums CRC-32C
//! over the structure with its checksum field zero.

use uuid::{Uuid, uuid};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
pub(crate) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
pub(crate) const HEADER_SIZE: usize = 4096;
pub(crate) const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
pub(crate) const REGION_TABLE_SIZE: usize = 64 << 10;
/// Everything but headers and region tables lies at or above this offset.
pub(crate) const FIRST_REGION: u64 = MIB;
/// [MS-VHDX] limits the virtual size to 64 TiB.
pub(crate) const MAX_SIZE: u64 = 64 << 40;
pub(crate) const MIN_BLOCK: u32 = 1 << 20;
pub(crate) const MAX_BLOCK: u32 = 256 << 20;
/// A log region larger than this is not believed; other writers use 1 MiB.
pub(crate) const MAX_LOG: u32 = 256 << 20;
const MAX_REGIONS: usize = 2047;

pub(crate) const BAT_REGION: Uuid = uuid!("2DC27766-F623-4200-9D64-115E9BFD4A08");
pub(crate) const METADATA_REGION: Uuid = uuid!("8B7CA206-4790-4B9A-B8FE-575F050F886E");

pub(crate) fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(b, at))
}

pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(b, at))
}

pub(crate) fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(b, at))
}

pub(crate) fn guid_at(b: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(array(b, at))
}

/// Bytes at `at`; zeros where the buffer is too short, which no valid structure is.
fn array<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = b.get(at..at + N) {
        out.copy_from_slice(found);
    }
    out
}

pub(crate) fn put(b: &mut [u8], at: usize, value: &[u8]) {
    b[at..at + value.len()].copy_from_slice(value);
}

/// CRC-32C of a structure whose checksum field lies at byte 4.
pub(crate) fn checksum(b: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&b[..4]);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[0; 4]), &b[8..])
}

/// One of the two headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) file_write_guid: Uuid,
    pub(crate) data_write_guid: Uuid,
    /// Nil: the log is empty.
    pub(crate) log_guid: Uuid,
    pub(crate) log_version: u16,
    pub(crate) version: u16,
    pub(crate) log_len: u32,
    pub(crate) log_offset: u64,
}

impl Header {
    /// `None` if signature or checksum are wrong.
    pub(crate) fn parse(b: &[u8]) -> Option<Self> {
        if b.len() < HEADER_SIZE
            || &b[..4] != b"head"
            || u32_at(b, 4) != checksum(&b[..HEADER_SIZE])
        {
            return None;
        }
        Some(Self {
            sequence: u64_at(b, 8),
            file_write_guid: guid_at(b, 16),
            data_write_guid: guid_at(b, 32),
            log_guid: guid_at(b, 48),
            log_version: u16_at(b, 64),
            version: u16_at(b, 66),
            log_len: u32_at(b, 68),
            log_offset: u64_at(b, 72),
        })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; HEADER_SIZE];
        put(&mut b, 0, b"head");
        put(&mut b, 8, &self.sequence.to_le_bytes());
        put(&mut b, 16, &self.file_write_guid.to_bytes_le());
        put(&mut b, 32, &self.data_write_guid.to_bytes_le());
        put(&mut b, 48, &self.log_guid.to_bytes_le());
        put(&mut b, 64, &self.log_version.to_le_bytes());
        put(&mut b, 66, &self.version.to_le_bytes());
        put(&mut b, 68, &self.log_len.to_le_bytes());
        put(&mut b, 72, &self.log_offset.to_le_bytes());
        let crc = checksum(&b);
        put(&mut b, 4, &crc.to_le_bytes());
        b
    }

    /// The rules that make a current header usable.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.version != 1 {
            return Err(format!("header version {} (only 1 is known)", self.version));
        }
        if !self.log_guid.is_nil() && self.log_version != 0 {
            return Err(format!("log version {} (only 0 is known)", self.log_version));
        }
        let aligned = self.log_offset.is_multiple_of(MIB) && u64::from(self.log_len) % MIB == 0;
        let size_fits = self.log_len > 0 && self.log_len <= MAX_LOG;
        let lies_well = (FIRST_REGION..=u64::MAX / 2).contains(&self.log_offset);
        if !aligned || !size_fits || !lies_well {
            return Err(format!("log of {} bytes at {}", self.log_len, self.log_offset));
        }
        // Room to count on for as long as any file lives; no writer starts that high.
        if self.sequence > u64::MAX / 2 {
            return Err(format!("header sequence number {}", self.sequence));
        }
        Ok(())
    }
}

/// The current header and its slot. Two valid headers with the same sequence number are accepted only
/// if they are identical, as a Microsoft-made file has them.
pub(crate) fn current_header(
    a: Option<Header>,
    b: Option<Header>,
) -> Result<(Header, usize), String> {
    match (a, b) {
        (None, None) => Err("no valid header".to_owned()),
        (Some(a), None) => Ok((a, 0)),
        (None, Some(b)) => Ok((b, 1)),
        (Some(a), Some(b)) if a.sequence == b.sequence && a != b => {
            Err("two different headers with the same sequence number".to_owned())
        }
        (Some(a), Some(b)) if a.sequence >= b.sequence => Ok((a, 0)),
        (Some(_), Some(b)) => Ok((b, 1)),
    }
}

/// A region of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What the region table names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) bat: Region,
    pub(crate) metadata: Region,
    /// Optional regions of other makers: left alone, but their space is taken.
    pub(crate) unknown: Vec<Region>,
}

impl Regions {
    /// Parses one copy. `Ok(None)`: signature or checksum are wrong, try the other copy.
    pub(crate) fn parse(b: &[u8]) -> Result<Option<Self>, String> {
        if b.len() < REGION_TABLE_SIZE
            || &b[..4] != b"regi"
            || u32_at(b, 4) != checksum(&b[..REGION_TABLE_SIZE])
        {
            return Ok(None);
        }
        let count = u32_at(b, 8) as usize;
        if count > MAX_REGIONS {
            return Err(format!("region table with {count} entries"));
        }
        let (mut bat, mut metadata, mut unknown) = (None, None, Vec::new());
        let mut seen = std::collections::HashSet::new();
        for entry in b[16..16 + 32 * count].chunks_exact(32) {
            let guid = guid_at(entry, 0);
            let region = Region { offset: u64_at(entry, 16), len: u64::from(u32_at(entry, 24)) };
            if !seen.insert(guid) {
                return Err(format!("region {guid} named twice"));
            }
            if !region.offset.is_multiple_of(MIB)
                || !region.len.is_multiple_of(MIB)
                || region.offset < FIRST_REGION
                || region.offset.checked_add(region.len).is_none()
            {
                return Err(format!("region {guid} of {} bytes at {}", region.len, region.offset));
            }
            match guid {
                BAT_REGION => bat = Some(region),
                METADATA_REGION => metadata = Some(region),
                _ if u32_at(entry, 28) & 1 != 0 => {
                    return Err(format!("unknown required region {guid}"));
                }
                _ => unknown.push(region),
            }
        }
        Ok(Some(Self {
            bat: bat.ok_or("no block allocation table region")?,
            metadata: metadata.ok_or("no metadata region")?,
            unknown,
        }))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; REGION_TABLE_SIZE];
        put(&mut b, 0, b"regi");
        put(&mut b, 8, &2u32.to_le_bytes());
        for (i, (guid, region)) in
            [(BAT_REGION, self.bat), (METADATA_REGION, self.metadata)].into_iter().enumerate()
        {
            let at = 16 + 32 * i;
            put(&mut b, at, &guid.to_bytes_le());
            put(&mut b, at + 16, &region.offset.to_le_bytes());
            put(&mut b, at + 24, &(region.len as u32).to_le_bytes());
            put(&mut b, at + 28, &1u32.to_le_bytes());
        }
        let crc = checksum(&b);
        put(&mut b, 4, &crc.to_le_bytes());
        b
    }
}

/// Puts another place of the block table into the bytes of a region table that is valid; all other
/// entries stay as they are.
pub(crate) fn move_table(b: &mut [u8], to: Region) -> Result<(), String> {
    let len = u32::try_from(to.len).map_err(|_| "a block table of 4 GiB or more".to_owned())?;
    let count = (u32_at(b, 8) as usize).min(MAX_REGIONS);
    let at = (0..count).map(|i| 16 + 32 * i).find(|at| guid_at(b, *at) == BAT_REGION);
    let at = at.ok_or("no block allocation table region")?;
    put(b, at + 16, &to.offset.to_le_bytes());
    put(b, at + 24, &len.to_le_bytes());
    let crc = checksum(&b[..REGION_TABLE_SIZE]);
    put(b, 4, &crc.to_le_bytes());
    Ok(())
}
