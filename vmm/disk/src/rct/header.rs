//! The headers of both files: a record in two slots, of which the valid one with the greater
//! sequence number counts. A write goes to the other slot, so that a torn one leaves the old record.

use uuid::Uuid;

use super::layout::{Layout, PAGE};
use super::media::Handle;
use crate::error::Result;

/// Newest version of both formats.
const VERSION: u32 = 1;
const RCT_MAGIC: &[u8; 8] = b"TDMKRCT\0";
const MRT_MAGIC: &[u8; 8] = b"TDMKMRT\0";
/// Ids that a header holds; sealing more drops the oldest.
pub(super) const MAX_IDS: usize = 64;
const IDS_AT: usize = 256;
const ID_LEN: usize = 32;
const STATE_OPEN: u32 = 1;
const STATE_CLEAN: u32 = 2;
/// From this epoch on a pair is not continued by the next open but made anew. The room up to
/// [`EPOCH_END`] is for a session that is open and goes on sealing.
pub(super) const EPOCH_LIMIT: u32 = u32::MAX - (1 << 20);
/// No epoch gets here: `u32::MAX` means "changed for every id", and nothing ever wraps.
pub(super) const EPOCH_END: u32 = u32::MAX - 1;

const _: () = assert!(IDS_AT + MAX_IDS * ID_LEN <= PAGE);

/// A header record.
pub(super) trait Record: Clone {
    fn sequence(&self) -> u64;
    fn set_sequence(&mut self, sequence: u64);
    fn encode(&self) -> [u8; PAGE];
    /// The record, or which rule it breaks.
    fn decode(page: &[u8; PAGE]) -> std::result::Result<Self, String>;
}

/// The current record of a file and where it stands.
pub(super) struct Slots<T> {
    pub(super) record: T,
    slot: u64,
    /// The other slot did not decode: torn by a crash, or damaged, and then perhaps the newer one.
    pub(super) other_bad: bool,
}

impl<T: Record> Slots<T> {
    /// Finds the current record, or says why there is none.
    pub(super) fn read(file: &Handle) -> std::result::Result<Self, String> {
        let slot = |index: u64| {
            let mut page = [0; PAGE];
            match file.read(&mut page, index * PAGE as u64) {
                Ok(()) => T::decode(&page),
                Err(e) => Err(format!("cannot be read: {e}")),
            }
        };
        match (slot(0), slot(1)) {
            (Ok(a), Ok(b)) if b.sequence() > a.sequence() => Ok(Self::at(b, 1, false)),
            (Ok(a), b) => Ok(Self::at(a, 0, b.is_err())),
            (Err(_), Ok(b)) => Ok(Self::at(b, 1, true)),
            (Err(a), Err(b)) => Err(format!("both headers are unusable ({a}; {b})")),
        }
    }

    fn at(record: T, slot: u64, other_bad: bool) -> Self {
        Self { record, slot, other_bad }
    }

    /// Makes `record` the current one. A kill before the end leaves the old record, or the new one;
    /// on error the old one stays current here and its slot untouched.
    pub(super) fn write(&mut self, file: &Handle, mut record: T) -> Result<()> {
        record.set_sequence(self.record.sequence() + 1);
        // On failure the record may be on disk all the same; a later one must still beat it.
        self.record.set_sequence(record.sequence());
        let slot = 1 - self.slot;
        file.write_durable(&record.encode(), slot * PAGE as u64)?;
        *self = Self::at(record, slot, false);
        Ok(())
    }

    /// Like `write`, into both slots one after the other: damage to one then costs nothing.
    pub(super) fn write_both(&mut self, file: &Handle, record: &T) -> Result<()> {
        self.write(file, record.clone())?;
        self.write(file, record.clone())
    }
}

/// Both slots of a new file.
pub(super) fn initial<T: Record>(record: &T) -> Vec<u8> {
    let mut first = record.clone();
    first.set_sequence(record.sequence() + 1);
    [record.encode(), first.encode()].concat()
}

/// A sealed id as the table holds it; the lineage is the header's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) seal: Uuid,
    pub(super) epoch: u32,
    /// Seconds since 1970.
    pub(super) time: u64,
}

/// The record of an `.rct`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RctHeader {
    pub(super) sequence: u64,
    pub(super) lineage: Uuid,
    pub(super) tracking: Uuid,
    pub(super) size: u64,
    pub(super) granule: u64,
    /// The current epoch: later than every id in the table.
    pub(super) epoch: u32,
    /// A granule without a mark counts as written in this epoch: 0 in a pair that has seen the disk
    /// from its creation, its first epoch in one that was made anew.
    pub(super) base: u32,
    pub(super) clean: bool,
    /// Drawn at every writable open; the `.mrt` must know it.
    pub(super) session: Uuid,
    /// The DataWriteGuids that the disk may carry.
    pub(super) prev: Uuid,
    pub(super) next: Uuid,
    /// By epoch.
    pub(super) ids: Vec<Sealed>,
}

impl RctHeader {
    pub(super) fn layout(&self) -> Option<Layout> {
        Layout::new(self.size, self.granule)
    }
}

impl Record for RctHeader {
    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn set_sequence(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    fn encode(&self) -> [u8; PAGE] {
        let mut page = Fields::new(RCT_MAGIC, self.sequence);
        page.uuid(24, self.lineage);
        page.uuid(40, self.tracking);
        page.u64(56, self.size);
        page.u32(64, u32::try_from(self.granule).unwrap_or(0));
        page.u32(68, self.epoch);
        page.u32(72, self.base);
        page.u32(76, if self.clean { STATE_CLEAN } else { STATE_OPEN });
        page.uuid(80, self.session);
        page.uuid(96, self.prev);
        page.uuid(112, self.next);
        let ids = &self.ids[self.ids.len().saturating_sub(MAX_IDS)..];
        page.u32(128, u32::try_from(ids.len()).unwrap_or(0));
        for (i, id) in ids.iter().enumerate() {
            let at = IDS_AT + i * ID_LEN;
            page.uuid(at, id.seal);
            page.u32(at + 16, id.epoch);
            page.u64(at + 24, id.time);
        }
        page.sealed()
    }

    fn decode(page: &[u8; PAGE]) -> std::result::Result<Self, String> {
        let sequence = check(page, RCT_MAGIC)?;
        let count = read_u32(page, 128) as usize;
        if count > MAX_IDS {
            return Err(format!("{count} ids in a table of {MAX_IDS}"));
        }
        let ids = (0..count).map(|i| IDS_AT + i * ID_LEN).map(|at| Sealed {
            seal: read_uuid(page, at),
            epoch: read_u32(page, at + 16),
            time: read_u64(page, at + 24),
        });
        let header = Self {
            sequence,
            lineage: read_uuid(page, 24),
            tracking: read_uuid(page, 40),
            size: read_u64(page, 56),
            granule: u64::from(read_u32(page, 64)),
            epoch: read_u32(page, 68),
            base: read_u32(page, 72),
            clean: match read_u32(page, 76) {
                STATE_OPEN => false,
                STATE_CLEAN => true,
                other => return Err(format!("unknown state {other}")),
            },
            session: read_uuid(page, 80),
            prev: read_uuid(page, 96),
            next: read_uuid(page, 112),
            ids: ids.collect(),
        };
        if header.ids.iter().any(|id| id.epoch >= header.epoch) {
            return Err("an id is not older than the current epoch".to_owned());
        }
        Ok(header)
    }
}

/// The record of an `.mrt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MrtHeader {
    pub(super) sequence: u64,
    pub(super) tracking: Uuid,
    pub(super) size: u64,
    /// The session that the bitmap belongs to, and the one before it: a kill between the two files'
    /// headers leaves the `.rct` one session behind.
    pub(super) session: Uuid,
    pub(super) prev_session: Uuid,
}

impl Record for MrtHeader {
    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn set_sequence(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    fn encode(&self) -> [u8; PAGE] {
        let mut page = Fields::new(MRT_MAGIC, self.sequence);
        page.uuid(24, self.tracking);
        page.u64(40, self.size);
        page.uuid(48, self.session);
        page.uuid(64, self.prev_session);
        page.sealed()
    }

    fn decode(page: &[u8; PAGE]) -> std::result::Result<Self, String> {
        Ok(Self {
            sequence: check(page, MRT_MAGIC)?,
            tracking: read_uuid(page, 24),
            size: read_u64(page, 40),
            session: read_uuid(page, 48),
            prev_session: read_uuid(page, 64),
        })
    }
}

/// A header page being filled in.
struct Fields([u8; PAGE]);

impl Fields {
    fn new(magic: &[u8; 8], sequence: u64) -> Self {
        let mut page = Self([0; PAGE]);
        page.0[..8].copy_from_slice(magic);
        page.u32(12, VERSION);
        page.u64(16, sequence);
        page
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn uuid(&mut self, at: usize, value: Uuid) {
        self.0[at..at + 16].copy_from_slice(value.as_bytes());
    }

    fn sealed(mut self) -> [u8; PAGE] {
        let crc = header_crc(&self.0);
        self.u32(8, crc);
        self.0
    }
}

/// CRC-32C of the page without its own field at offset 8.
fn header_crc(page: &[u8; PAGE]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&page[..8]), &page[12..])
}

fn check(page: &[u8; PAGE], magic: &[u8; 8]) -> std::result::Result<u64, String> {
    if &page[..8] != magic {
        return Err("no header".to_owned());
    }
    if read_u32(page, 8) != header_crc(page) {
        return Err("wrong checksum".to_owned());
    }
    let version = read_u32(page, 12);
    if version != VERSION {
        return Err(format!("version {version}, this program knows {VERSION}"));
    }
    let sequence = read_u64(page, 16);
    // Headers are written a few times per checkpoint: only a forged file comes near the end.
    if sequence > u64::MAX / 2 { Err("sequence out of range".to_owned()) } else { Ok(sequence) }
}

pub(super) fn read_u32(page: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn read_u64(page: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn read_uuid(page: &[u8], at: usize) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&page[at..at + 16]);
    Uuid::from_bytes(bytes)
}
