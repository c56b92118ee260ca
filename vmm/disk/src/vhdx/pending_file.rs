//! The pending file: metadata changes that were acknowledged and that no flush has committed yet.
//!
//! A write that adds a block is acknowledged once its payload is in the page cache; the block table
//! reaches the file with the next flush. After a power cut that is what a disk may do: the guest's own
//! memory of the write is gone too. After the death of this process alone the guest runs on, reconnects
//! and believes in the write. So each such change is also appended, without a sync, to a small file
//! beside the disk, *after* the payload and *before* the acknowledgement. The page cache outlives the
//! process, and so payload and record survive together. docs/formats/vhdx.md gives the layout.
//!
//! The records count only while the page cache that held them does: in the same boot of the kernel and
//! for the same file, at the FileWriteGuid of the writer that died. Otherwise they are dropped, for
//! payload that no sync made durable may be gone, and a record of it would show what was never written.
//!
//! There are two areas. A flush takes all changes made so far and turns to the other area in the same
//! moment; once its commit is durable it empties the first. Records set absolute values, so applying an
//! area that was committed already changes nothing.
//!
//! | killed | the next open finds |
//! |---|---|
//! | before the record is whole | its checksum fails: the write was not acknowledged |
//! | after it | the change, and the payload that was written before it |
//! | during a flush | both areas, the older one first |
//! | after the flush, before its area is emptied | records that set what the log or the table already says |
//! | while an open takes records over | the records still: they accept the old FileWriteGuid and the new one |

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use uuid::Uuid;

use super::open::read_zero_filled;
use super::storage::Storage;
use crate::fs::{self, DiskFile, How};

const MAGIC: [u8; 8] = *b"TMKPEND1";
/// Bytes of an area, its header page included.
pub(crate) const AREA: u64 = 32 << 20;
/// Records of one area start here.
const FIRST: u64 = 4096;
/// A flush is due when an area has this many bytes of records.
const SOFT_LIMIT: u64 = 16 << 20;
const HEADER: usize = 96;
const RECORD: usize = 32;

const ENTRY: u32 = 1;
const PRESENT: u32 = 2;
const ABSENT: u32 = 3;

/// The pending file's path beside a disk file.
pub(crate) fn pending_path(disk: &Path) -> PathBuf {
    let mut name = OsString::from(disk);
    name.push(".pending");
    PathBuf::from(name)
}

/// One metadata change, as an absolute value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// An entry of the block table.
    Entry { index: u64, value: u64 },
    /// Bits of the sector bitmaps, by sector of the disk.
    Sectors { first: u64, count: u64, present: bool },
}

/// What the records hold for: they are dropped unless all of it is still so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The kernel's boot: another one has another page cache.
    pub(crate) boot: Uuid,
    /// Device and inode of the disk file.
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Identity {
    /// Of an open file. `None` where the kernel does not say which boot this is.
    pub(crate) fn of(file: &DiskFile) -> io::Result<Option<Self>> {
        let Some(boot) = fs::boot_of(file) else { return Ok(None) };
        let (device, inode) = fs::number_of(file)?;
        Ok(Some(Self { boot, device, inode }))
    }
}

/// The place of a pending file: beside the disk, or in memory in tests.
pub(crate) trait Place: Send + Sync {
    /// The file, if there is one.
    fn open(&self, writable: bool) -> io::Result<Option<Box<dyn Storage>>>;
    /// An empty file, instead of one that is there.
    fn create(&self) -> io::Result<Box<dyn Storage>>;
    /// Removes the file, if there is one.
    fn remove(&self) -> io::Result<()>;
}

/// Beside the disk file.
pub(crate) struct Beside(pub(crate) PathBuf);

impl Place for Beside {
    fn open(&self, writable: bool) -> io::Result<Option<Box<dyn Storage>>> {
        let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits();
        match fs::open(&self.0, How { write: writable, create: None, flags }) {
            Ok(file) if fs::is_regular(&file)? => Ok(Some(Box::new(file))),
            Ok(_) => Err(io::Error::other("not a regular file")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn create(&self) -> io::Result<Box<dyn Storage>> {
        // Never through a link that somebody has put there.
        self.remove()?;
        let how = How { write: true, create: Some(0o666), flags: 0 };
        Ok(Box::new(fs::open(&self.0, how)?))
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// What an open found: the changes, oldest first.
pub(crate) struct Found {
    storage: Box<dyn Storage>,
    areas: Vec<(usize, Header)>,
    pub(crate) changes: Vec<Change>,
}

impl Found {
    /// Lets the records count for the present FileWriteGuid and for the one that is about to be set.
    pub(crate) fn accept(&mut self, guids: [Uuid; 2]) -> io::Result<()> {
        for (area, header) in &mut self.areas {
            header.file_write_guids = guids;
            self.storage.write_all_at(&header.encode(), *area as u64 * AREA)?;
        }
        Ok(())
    }
}

/// The writer's side.
pub(crate) struct PendingFile {
    place: Box<dyn Place>,
    identity: Identity,
    guid: Uuid,
    storage: Option<Box<dyn Storage>>,
    sequence: u32,
    area: usize,
    /// Bytes of records in the present area.
    used: u64,
    /// Checksum of the last record.
    chain: u32,
}

impl PendingFile {
    pub(crate) fn new(place: Box<dyn Place>, identity: Identity, guid: Uuid) -> Self {
        Self { place, identity, guid, storage: None, sequence: 0, area: 0, used: 0, chain: 0 }
    }

    /// Reads what a killed writer of the file with this FileWriteGuid left.
    pub(crate) fn find(
        place: &dyn Place,
        identity: Identity,
        guid: Uuid,
        writable: bool,
    ) -> io::Result<Option<Found>> {
        let Some(storage) = place.open(writable)? else { return Ok(None) };
        let mut areas: Vec<(usize, Header)> = Vec::new();
        for area in 0..2 {
            let mut bytes = [0; HEADER];
            read_zero_filled(&*storage, &mut bytes, area as u64 * AREA)?;
            let header = Header::parse(&bytes);
            areas.extend(header.filter(|h| h.is_for(identity, guid)).map(|h| (area, h)));
        }
        areas.sort_by_key(|(_, header)| header.sequence);
        let mut changes = Vec::new();
        for (area, header) in &areas {
            read_records(&*storage, *area, header.sequence, &mut changes)?;
        }
        Ok((!areas.is_empty()).then_some(Found { storage, areas, changes }))
    }

    /// Whether a flush is due before more is recorded.
    pub(crate) fn is_full(&self) -> bool {
        self.used >= SOFT_LIMIT
    }

    /// Appends changes that belong together. A kill may keep the first ones only, so any beginning of
    /// the list must be harmless. On error nothing is recorded.
    pub(crate) fn record(&mut self, changes: &[Change]) -> io::Result<()> {
        if FIRST + self.used + (changes.len() * RECORD) as u64 > AREA {
            return Err(io::Error::other("the pending file is full"));
        }
        if self.storage.is_none() {
            self.storage = Some(self.place.create()?);
        }
        let Some(storage) = &self.storage else { return Ok(()) };
        let base = self.area as u64 * AREA;
        if self.used == 0 {
            let header = Header {
                identity: self.identity,
                sequence: self.sequence + 1,
                file_write_guids: [self.guid; 2],
            };
            storage.write_all_at(&header.encode(), base)?;
            self.sequence += 1;
        }
        let mut chain = if self.used == 0 { self.sequence } else { self.chain };
        let bytes: Vec<u8> = changes.iter().flat_map(|c| encode(*c, &mut chain)).collect();
        storage.write_all_at(&bytes, base + FIRST + self.used)?;
        self.used += bytes.len() as u64;
        self.chain = chain;
        Ok(())
    }

    /// Turns to the other area, in the moment in which a flush takes all changes. Gives the area that
    /// the flush empties when it has committed them. The other one is empty: flushes do not overlap.
    pub(crate) fn turn(&mut self) -> Option<usize> {
        (self.used > 0).then(|| {
            let area = self.area;
            self.area = 1 - area;
            self.used = 0;
            area
        })
    }

    /// Empties an area whose changes are committed. If that fails, no further changes may be committed:
    /// old records would come after them.
    pub(crate) fn empty(&self, area: usize) -> io::Result<()> {
        match &self.storage {
            Some(storage) => storage.write_all_at(&[0; HEADER], area as u64 * AREA),
            None => Ok(()),
        }
    }

    /// Removes the file unless it holds changes that were not committed.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        if self.used > 0 { Ok(()) } else { self.discard() }
    }

    /// Removes the file with everything in it.
    pub(crate) fn discard(&mut self) -> io::Result<()> {
        self.storage = None;
        self.used = 0;
        self.place.remove()
    }
}

#[derive(Clone, Copy)]
struct Header {
    identity: Identity,
    sequence: u32,
    file_write_guids: [Uuid; 2],
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[12..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..32].copy_from_slice(self.identity.boot.as_bytes());
        bytes[32..40].copy_from_slice(&self.identity.device.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.identity.inode.to_le_bytes());
        bytes[48..64].copy_from_slice(self.file_write_guids[0].as_bytes());
        bytes[64..80].copy_from_slice(self.file_write_guids[1].as_bytes());
        let checksum = crc32c::crc32c(&bytes);
        bytes[8..12].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None` for anything that is not a whole header: an emptied area, or what a power cut left.
    fn parse(bytes: &[u8; HEADER]) -> Option<Self> {
        let mut summed = *bytes;
        summed[8..12].fill(0);
        let whole = bytes[..8] == MAGIC && crc32c::crc32c(&summed).to_le_bytes() == bytes[8..12];
        whole.then(|| Self {
            identity: Identity {
                boot: uuid_at(bytes, 16),
                device: u64_at(bytes, 32),
                inode: u64_at(bytes, 40),
            },
            sequence: u32_at(bytes, 12),
            file_write_guids: [uuid_at(bytes, 48), uuid_at(bytes, 64)],
        })
    }

    fn is_for(&self, identity: Identity, guid: Uuid) -> bool {
        self.identity == identity && self.file_write_guids.contains(&guid)
    }
}

/// Reads an area's records up to the first that is not whole or of an older use of the area.
fn read_records(
    storage: &dyn Storage,
    area: usize,
    sequence: u32,
    changes: &mut Vec<Change>,
) -> io::Result<()> {
    const PIECE: usize = 1 << 20;
    let mut piece = vec![0; PIECE];
    let mut chain = sequence;
    for at in (FIRST..AREA).step_by(PIECE) {
        let n = (AREA - at).min(PIECE as u64) as usize;
        read_zero_filled(storage, &mut piece[..n], area as u64 * AREA + at)?;
        for record in piece[..n].chunks_exact(RECORD) {
            match decode(record, &mut chain) {
                Some(change) => changes.push(change),
                None => return Ok(()),
            }
        }
    }
    Ok(())
}

/// Each record's checksum begins with that of the one before it, the first one's with the area's
/// sequence number: what is left of an older use, or of an append that failed, never continues the list.
fn encode(change: Change, chain: &mut u32) -> [u8; RECORD] {
    let (kind, a, b) = match change {
        Change::Entry { index, value } => (ENTRY, index, value),
        Change::Sectors { first, count, present: true } => (PRESENT, first, count),
        Change::Sectors { first, count, present: false } => (ABSENT, first, count),
    };
    let mut bytes = [0; RECORD];
    bytes[4..8].copy_from_slice(&kind.to_le_bytes());
    bytes[16..24].copy_from_slice(&a.to_le_bytes());
    bytes[24..32].copy_from_slice(&b.to_le_bytes());
    *chain = crc32c::crc32c_append(*chain, &bytes[4..]);
    bytes[..4].copy_from_slice(&chain.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8], chain: &mut u32) -> Option<Change> {
    *chain = crc32c::crc32c_append(*chain, &bytes[4..]);
    if *chain != u32_at(bytes, 0) {
        return None;
    }
    let (a, b) = (u64_at(bytes, 16), u64_at(bytes, 24));
    match u32_at(bytes, 4) {
        ENTRY => Some(Change::Entry { index: a, value: b }),
        PRESENT => Some(Change::Sectors { first: a, count: b, present: true }),
        ABSENT => Some(Change::Sectors { first: a, count: b, present: false }),
        _ => None,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

fn uuid_at(bytes: &[u8], at: usize) -> Uuid {
    let mut field = [0; 16];
    field.copy_from_slice(&bytes[at..at + 16]);
    Uuid::from_bytes(field)
}
