//! The VHDX log: entries as bytes, the active sequence, what a replay has to do.
//!
//! Pure functions over byte buffers; the caller reads and writes the file. The log is a ring of 4 KiB
//! sectors holding entries. An entry is a header with descriptors, then one data sector for each data
//! descriptor. Its sequence number is repeated in every descriptor and every data sector and a CRC-32C
//! covers all of it, so an entry that a crash left half written never counts.
//!
//! Everything read here is hostile: work is linear in the log's size and memory proportional to it.

use std::collections::BTreeMap;

use uuid::Uuid;

/// The unit of the log and of the updates in it.
pub(crate) const SECTOR: usize = 4096;

const PAGE: u64 = SECTOR as u64;
/// Size of a descriptor; the entry header takes the room of two.
const DESCRIPTOR: usize = 32;
const DESCRIPTORS_PER_SECTOR: usize = SECTOR / DESCRIPTOR;
const HEADER_SLOTS: usize = 2;
/// The file identifier and the two headers; the format never writes them through the log.
const HEADERS_END: u64 = 192 * 1024;
/// How many times the log's size may be checksummed. Sane entries hardly overlap (the rest of an older
/// lap under a newer one); padded entries nested in each other would cost quadratic time.
const CHECKSUM_LAPS: usize = 8;

/// One change that an entry carries. Offsets and lengths are multiples of 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Update {
    /// A page of new content.
    Data {
        /// Where in the file.
        offset: u64,
        /// The content.
        page: Box<[u8; SECTOR]>,
    },
    /// A range that becomes zeros.
    Zero {
        /// Where in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl Update {
    /// First byte in the file.
    pub(crate) fn offset(&self) -> u64 {
        match self {
            Self::Data { offset, .. } | Self::Zero { offset, .. } => *offset,
        }
    }

    /// The byte after the last one.
    pub(crate) fn end(&self) -> u64 {
        match self {
            Self::Data { offset, .. } => offset.saturating_add(PAGE),
            Self::Zero { offset, len } => offset.saturating_add(*len),
        }
    }
}

/// One entry of the active sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParsedEntry {
    /// Its sequence number.
    pub(crate) sequence: u64,
    /// Log offset of the first entry to replay when this one is the head.
    pub(crate) tail: u32,
    /// Its changes in order.
    pub(crate) updates: Vec<Update>,
    /// A file size that was durable when the entry was written: a shorter file is truncated.
    pub(crate) flushed_file_offset: u64,
    /// A file size that holds all allocated structures.
    pub(crate) last_file_offset: u64,
    /// Where it starts in the log.
    pub(crate) offset: u32,
    /// Its length in bytes; it may wrap around the log's end.
    pub(crate) len: u32,
}

/// The entries to replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ActiveSequence {
    /// From tail to head; never empty.
    pub(crate) entries: Vec<ParsedEntry>,
    /// Sequence number of the head.
    pub(crate) head_sequence: u64,
    /// Log offset just after the head, wrapped.
    pub(crate) end: u32,
    /// The head's: a file shorter than this is truncated and must be refused.
    pub(crate) flushed_file_offset: u64,
    /// The head's: after the replay the file must have at least this size.
    pub(crate) last_file_offset: u64,
}

/// Descriptor sectors, the first one with the header included.
fn descriptor_sectors(descriptors: usize) -> usize {
    (descriptors + HEADER_SLOTS).div_ceil(DESCRIPTORS_PER_SECTOR)
}

/// Sector in the entry and byte in the sector of a descriptor: 126 fit beside the header, 128 into
/// each further sector.
fn descriptor_place(index: usize) -> (usize, usize) {
    let slot = index + HEADER_SLOTS;
    (slot / DESCRIPTORS_PER_SECTOR, slot % DESCRIPTORS_PER_SECTOR * DESCRIPTOR)
}

/// Bytes [`encode_entry`] makes of these updates.
pub(crate) fn entry_len(updates: &[Update]) -> usize {
    let pages = updates.iter().filter(|update| matches!(update, Update::Data { .. })).count();
    (descriptor_sectors(updates.len()) + pages) * SECTOR
}

/// Encodes one entry. `sequence` is not zero, `tail` is the log offset of the active sequence's first
/// entry, this one included. The caller has checked [`entry_len`] against the free space of its log.
///
/// # Panics
///
/// If the entry is longer than any log can be (4 GiB).
pub(crate) fn encode_entry(
    log_guid: Uuid,
    sequence: u64,
    tail: u32,
    flushed_file_offset: u64,
    last_file_offset: u64,
    updates: &[Update],
) -> Vec<u8> {
    let len = entry_len(updates);
    assert!(len <= u32::MAX as usize, "a log entry of {len} bytes fits into no log");
    debug_assert!(sequence > 0 && (tail as usize).is_multiple_of(SECTOR));
    let mut entry = vec![0u8; len];
    put(&mut entry, 0, b"loge");
    put(&mut entry, 8, &(len as u32).to_le_bytes());
    put(&mut entry, 12, &tail.to_le_bytes());
    put(&mut entry, 16, &sequence.to_le_bytes());
    put(&mut entry, 24, &(updates.len() as u32).to_le_bytes());
    put(&mut entry, 32, &log_guid.to_bytes_le());
    put(&mut entry, 48, &flushed_file_offset.to_le_bytes());
    put(&mut entry, 56, &last_file_offset.to_le_bytes());
    let mut data_at = descriptor_sectors(updates.len()) * SECTOR;
    for (index, update) in updates.iter().enumerate() {
        debug_assert!(update.offset().is_multiple_of(PAGE) && update.end().is_multiple_of(PAGE));
        let (sector, byte) = descriptor_place(index);
        let at = sector * SECTOR + byte;
        put(&mut entry, at + 16, &update.offset().to_le_bytes());
        put(&mut entry, at + 24, &sequence.to_le_bytes());
        match update {
            Update::Zero { len, .. } => {
                put(&mut entry, at, b"zero");
                put(&mut entry, at + 8, &len.to_le_bytes());
            }
            Update::Data { page, .. } => {
                put(&mut entry, at, b"desc");
                put(&mut entry, at + 4, &page[SECTOR - 4..]);
                put(&mut entry, at + 8, &page[..8]);
                put_data_sector(&mut entry, data_at, sequence, page);
                data_at += SECTOR;
            }
        }
    }
    let checksum = crc32c::crc32c(&entry);
    put(&mut entry, 4, &checksum.to_le_bytes());
    entry
}

/// The middle of a page; its ends are in the descriptor, where the sequence number sits here.
fn put_data_sector(entry: &mut [u8], at: usize, sequence: u64, page: &[u8; SECTOR]) {
    put(entry, at, b"data");
    put(entry, at + 4, &((sequence >> 32) as u32).to_le_bytes());
    put(entry, at + 8, &page[8..SECTOR - 4]);
    put(entry, at + SECTOR - 4, &(sequence as u32).to_le_bytes());
}

fn put(buf: &mut [u8], at: usize, bytes: &[u8]) {
    buf[at..at + bytes.len()].copy_from_slice(bytes);
}

fn bytes_at<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&buf[at..at + N]);
    bytes
}

fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(buf, at))
}

fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(buf, at))
}

/// A valid entry's header. Offsets and lengths count sectors.
#[derive(Debug, Clone, Copy)]
struct Frame {
    start: usize,
    sectors: usize,
    sequence: u64,
    tail: u32,
    descriptors: usize,
}

/// Where a chain of entries leads: each next one valid, adjacent, and one greater in sequence.
#[derive(Debug, Clone, Copy)]
struct Chain {
    /// Start of the last entry.
    head: usize,
    /// Sectors of all entries from here to the head.
    sectors: usize,
}

/// The log's sectors, addressed modulo their number.
struct Ring<'a> {
    sectors: &'a [[u8; SECTOR]],
}

impl<'a> Ring<'a> {
    fn new(log: &'a [u8]) -> Result<Self, String> {
        let (sectors, rest) = log.as_chunks::<SECTOR>();
        if sectors.is_empty() || !rest.is_empty() || u32::try_from(log.len()).is_err() {
            return Err(format!("a log of {} bytes is not possible", log.len()));
        }
        Ok(Self { sectors })
    }

    fn sector(&self, index: usize) -> &'a [u8; SECTOR] {
        &self.sectors[index % self.sectors.len()]
    }

    /// The header at `start`, if it is one of this log's and its numbers are possible.
    fn frame(&self, start: usize, log_guid: Uuid) -> Option<Frame> {
        let header = self.sector(start);
        if !header.starts_with(b"loge") || bytes_at(header, 32) != log_guid.to_bytes_le() {
            return None;
        }
        let len = u32_at(header, 8) as usize;
        let frame = Frame {
            start,
            sectors: len / SECTOR,
            sequence: u64_at(header, 16),
            tail: u32_at(header, 12),
            descriptors: u32_at(header, 24) as usize,
        };
        let possible = len.is_multiple_of(SECTOR)
            && frame.sectors <= self.sectors.len()
            && descriptor_sectors(frame.descriptors) <= frame.sectors
            && frame.sequence > 0;
        possible.then_some(frame)
    }

    fn descriptor(&self, frame: &Frame, index: usize) -> &'a [u8] {
        let (sector, byte) = descriptor_place(index);
        &self.sector(frame.start + sector)[byte..byte + DESCRIPTOR]
    }

    /// Whether all descriptors and data sectors carry their signatures and the sequence number.
    ///
    /// Done before the checksum: a sector is a header or one of these, so false headers inside other
    /// entries fail here without cost.
    fn is_consistent(&self, frame: &Frame) -> bool {
        let mut data = frame.start + descriptor_sectors(frame.descriptors);
        let end = frame.start + frame.sectors;
        for index in 0..frame.descriptors {
            let descriptor = self.descriptor(frame, index);
            if u64_at(descriptor, 24) != frame.sequence {
                return false;
            }
            if descriptor.starts_with(b"zero") {
                continue;
            }
            if !descriptor.starts_with(b"desc") || data == end {
                return false;
            }
            let sector = self.sector(data);
            let high = u64::from(u32_at(sector, 4));
            let low = u64::from(u32_at(sector, SECTOR - 4));
            if !sector.starts_with(b"data") || (high << 32 | low) != frame.sequence {
                return false;
            }
            data += 1;
        }
        true
    }

    /// Whether the checksum over the whole entry, its own field taken as zero, is right.
    fn checksum_matches(&self, frame: &Frame) -> bool {
        let header = self.sector(frame.start);
        let mut checksum = crc32c::crc32c(&header[..4]);
        checksum = crc32c::crc32c_append(checksum, &[0; 4]);
        checksum = crc32c::crc32c_append(checksum, &header[8..]);
        for index in 1..frame.sectors {
            checksum = crc32c::crc32c_append(checksum, self.sector(frame.start + index));
        }
        checksum == u32_at(header, 4)
    }

    /// All valid entries by their start.
    fn valid_entries(&self, log_guid: Uuid) -> Result<BTreeMap<usize, Frame>, String> {
        let mut budget = self.sectors.len() * CHECKSUM_LAPS;
        let mut valid = BTreeMap::new();
        for start in 0..self.sectors.len() {
            let Some(frame) = self.frame(start, log_guid) else { continue };
            if !self.is_consistent(&frame) {
                continue;
            }
            let Some(left) = budget.checked_sub(frame.sectors) else {
                return Err("the log's entries lie inside each other".to_owned());
            };
            budget = left;
            if self.checksum_matches(&frame) {
                valid.insert(start, frame);
            }
        }
        Ok(valid)
    }

    /// The start of the entry that continues `frame`'s sequence.
    fn next(&self, frame: &Frame, entries: &BTreeMap<usize, Frame>) -> Option<usize> {
        let start = (frame.start + frame.sectors) % self.sectors.len();
        let next = entries.get(&start)?;
        (Some(next.sequence) == frame.sequence.checked_add(1)).then_some(start)
    }

    /// For each entry, where the longest chain from it leads.
    fn chains(&self, entries: &BTreeMap<usize, Frame>) -> BTreeMap<usize, Chain> {
        // Sequence numbers grow along a chain, so from the greatest down every successor is known.
        let mut descending: Vec<&Frame> = entries.values().collect();
        descending.sort_by_key(|frame| std::cmp::Reverse(frame.sequence));
        let mut chains = BTreeMap::<usize, Chain>::new();
        for frame in descending {
            let rest = self.next(frame, entries).and_then(|next| chains.get(&next).copied());
            let chain = match rest {
                Some(rest) => Chain { head: rest.head, sectors: rest.sectors + frame.sectors },
                None => Chain { head: frame.start, sectors: frame.sectors },
            };
            chains.insert(frame.start, chain);
        }
        chains
    }

    /// Whether a valid sequence ends with this entry: the chain from its Tail leads to it without
    /// meeting itself. Looking from the heads finds wrapped sequences without a second scan.
    fn is_head(&self, frame: &Frame, chains: &BTreeMap<usize, Chain>) -> bool {
        let tail = frame.tail as usize;
        tail.is_multiple_of(SECTOR)
            && chains.get(&(tail / SECTOR)).is_some_and(|chain| {
                chain.head == frame.start && chain.sectors <= self.sectors.len()
            })
    }

    /// The entries from tail to head of the valid sequence with the greatest head. Entries before the
    /// head's Tail are left out: they are in place, and space that they describe may be payload now.
    fn active(&self, entries: &BTreeMap<usize, Frame>) -> Result<Vec<Frame>, String> {
        let chains = self.chains(entries);
        let mut heads: Vec<&Frame> =
            entries.values().filter(|frame| self.is_head(frame, &chains)).collect();
        heads.sort_by_key(|frame| std::cmp::Reverse(frame.sequence));
        let head = match heads[..] {
            [head, rival, ..] if rival.sequence == head.sequence => {
                return Err(format!("two log sequences end with number {}", head.sequence));
            }
            [head, ..] => head,
            [] => {
                return Err(format!(
                    "the log is not empty but holds no valid sequence ({} valid entries)",
                    entries.len()
                ));
            }
        };
        let mut at = head.tail as usize / SECTOR;
        let mut sequence = Vec::new();
        while let Some(frame) = entries.get(&at) {
            sequence.push(*frame);
            match self.next(frame, entries) {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(sequence)
    }

    fn parse(&self, frame: &Frame) -> Result<ParsedEntry, String> {
        let header = self.sector(frame.start);
        let mut data = frame.start + descriptor_sectors(frame.descriptors);
        let mut updates = Vec::with_capacity(frame.descriptors);
        for index in 0..frame.descriptors {
            let descriptor = self.descriptor(frame, index);
            let offset = u64_at(descriptor, 16);
            let update = if descriptor.starts_with(b"zero") {
                Update::Zero { offset, len: u64_at(descriptor, 8) }
            } else {
                let mut page = Box::new(*self.sector(data));
                page[..8].copy_from_slice(&descriptor[8..16]);
                page[SECTOR - 4..].copy_from_slice(&descriptor[4..8]);
                data += 1;
                Update::Data { offset, page }
            };
            check_target(&update, frame.sequence)?;
            updates.push(update);
        }
        Ok(ParsedEntry {
            sequence: frame.sequence,
            tail: frame.tail,
            updates,
            flushed_file_offset: u64_at(header, 48),
            last_file_offset: u64_at(header, 56),
            offset: (frame.start * SECTOR) as u32,
            len: (frame.sectors * SECTOR) as u32,
        })
    }
}

/// Refuses an update that no writer of the format makes. Its entry has the right checksum, so it is
/// not torn: falling back to an older sequence would silently undo what the head made durable.
fn check_target(update: &Update, sequence: u64) -> Result<(), String> {
    let (offset, end) = (update.offset(), update.end());
    let aligned = offset.is_multiple_of(PAGE) && end.is_multiple_of(PAGE);
    if aligned && offset >= HEADERS_END && i64::try_from(end).is_ok() {
        return Ok(());
    }
    Err(format!("log entry {sequence} updates the impossible range {offset}..{end}"))
}

/// Finds the active sequence in the bytes of the whole log region.
///
/// # Errors
///
/// The reason why a file whose header names `log_guid` must be refused: no valid sequence, more than
/// one with the greatest number, or impossible updates in it.
pub(crate) fn active_sequence(log: &[u8], log_guid: Uuid) -> Result<ActiveSequence, String> {
    let ring = Ring::new(log)?;
    let frames = ring.active(&ring.valid_entries(log_guid)?)?;
    let entries = frames.iter().map(|frame| ring.parse(frame)).collect::<Result<Vec<_>, _>>()?;
    let Some(head) = entries.last() else {
        return Err("the log holds no entries".to_owned());
    };
    Ok(ActiveSequence {
        head_sequence: head.sequence,
        end: ((u64::from(head.offset) + u64::from(head.len)) % log.len() as u64) as u32,
        flushed_file_offset: head.flushed_file_offset,
        last_file_offset: head.last_file_offset,
        entries,
    })
}

/// What the file holds after a replay where that differs from what it may hold now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplayPlan {
    /// Ascending and disjoint; later entries have won. A replay may write them in any order and may be
    /// repeated after a kill: the log still holds all of it until the header's LogGuid is cleared.
    pub(crate) updates: Vec<Update>,
    /// A file shorter than this is truncated: refuse it.
    pub(crate) flushed_file_offset: u64,
    /// The file must be at least this long after the replay: the head's LastFileOffset, or the end of
    /// the last update if that is greater.
    pub(crate) file_len: u64,
}

/// Reduces a sequence to its final effect. Zero ranges stay ranges, whatever length they claim.
pub(crate) fn replay_plan(seq: &ActiveSequence) -> ReplayPlan {
    let mut merged = BTreeMap::<u64, Update>::new();
    for update in seq.entries.iter().flat_map(|entry| &entry.updates) {
        let (start, end) = (update.offset(), update.end());
        if start == end {
            continue;
        }
        carve(&mut merged, start, end);
        merged.insert(start, update.clone());
    }
    let end = merged.last_key_value().map_or(0, |(_, update)| update.end());
    ReplayPlan {
        updates: merged.into_values().collect(),
        flushed_file_offset: seq.flushed_file_offset,
        file_len: end.max(seq.last_file_offset),
    }
}

/// Removes what lies in the range. Only zero ranges can reach over its ends: pages are aligned.
fn carve(merged: &mut BTreeMap<u64, Update>, start: u64, end: u64) {
    let mut rest = start;
    if let Some((&before, update)) = merged.range_mut(..start).next_back()
        && update.end() > start
    {
        rest = update.end();
        *update = Update::Zero { offset: before, len: start - before };
    }
    while let Some((&inside, update)) = merged.range(start..end).next() {
        rest = rest.max(update.end());
        merged.remove(&inside);
    }
    if rest > end {
        merged.insert(end, Update::Zero { offset: end, len: rest - end });
    }
}

impl ReplayPlan {
    /// The updates that touch the range.
    fn touching(&self, start: u64, end: u64) -> &[Update] {
        let from = self.updates.partition_point(|update| update.end() <= start);
        let to = self.updates.partition_point(|update| update.offset() < end);
        &self.updates[from..to.max(from)]
    }

    /// Whether the replay changes anything in the range, which it must not for the log itself.
    pub(crate) fn touches(&self, offset: u64, len: u64) -> bool {
        !self.touching(offset, offset.saturating_add(len)).is_empty()
    }

    /// Brings `buf`, read from the file at `offset`, to its content after the replay: how a read-only
    /// open replays in memory. Bytes beyond the end of the file are to be zeros in `buf`.
    pub(crate) fn apply(&self, offset: u64, buf: &mut [u8]) {
        let end = offset.saturating_add(buf.len() as u64);
        for update in self.touching(offset, end) {
            let from = update.offset().max(offset);
            let to = update.end().min(end);
            let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
            match update {
                Update::Zero { .. } => target.fill(0),
                Update::Data { offset: page_at, page } => {
                    let skip = (from - page_at) as usize;
                    target.copy_from_slice(&page[skip..skip + target.len()]);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
