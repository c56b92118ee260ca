//! Finding the pair of a disk, judging whether it may be believed, and making it anew.

use std::sync::Arc;

use uuid::Uuid;

use super::DiskIdentity;
use super::header::{self, EPOCH_END, EPOCH_LIMIT, MrtHeader, RctHeader, Slots};
use super::intent::{FoundBits, empty_pages};
use super::layout::{Layout, MRT_LEN};
use super::media::{Handle, Store, Which};
use crate::error::{DiskError, Result};

/// A pair that agrees with itself and with its disk.
pub(super) struct Pair {
    pub(super) rct: Arc<Handle>,
    pub(super) mrt: Arc<Handle>,
    pub(super) header: Slots<RctHeader>,
    pub(super) mrt_header: Slots<MrtHeader>,
    pub(super) layout: Layout,
    pub(super) bits: FoundBits,
}

/// Why there is no such pair.
pub(super) enum Unusable {
    /// The ids are gone; a new pair continues after `epoch`, where that could be read.
    Lost { why: String, epoch: u32 },
    /// The files cannot be reached; nothing was decided.
    Error(DiskError),
}

impl From<DiskError> for Unusable {
    fn from(e: DiskError) -> Self {
        Self::Error(e)
    }
}

fn lost<T>(why: impl Into<String>) -> std::result::Result<T, Unusable> {
    Err(Unusable::Lost { why: why.into(), epoch: 0 })
}

impl Pair {
    /// Opens and judges the pair.
    pub(super) fn load(
        store: &dyn Store,
        identity: &DiskIdentity,
        write: bool,
    ) -> std::result::Result<Self, Unusable> {
        let rct = open(store, Which::Rct, write)?;
        let header = Slots::<RctHeader>::read(&rct);
        let header = header.or_else(|why| lost(format!("{}: {why}", rct.path().display())))?;
        let epoch = header.record.epoch;
        let after = |e| match e {
            Unusable::Lost { why, .. } if epoch < EPOCH_LIMIT => Unusable::Lost { why, epoch },
            e => e,
        };
        let layout = check_rct(&rct, &header.record, identity).map_err(after)?;
        let mrt = open(store, Which::Mrt, write).map_err(after)?;
        let mrt_header = check_mrt(&mrt, &header.record).map_err(after)?;
        let bits = FoundBits::read(&mrt, header.record.tracking);
        Ok(Self { rct: Arc::new(rct), mrt: Arc::new(mrt), header, mrt_header, layout, bits })
    }

    /// Whether the last session may have left writes that only the bitmap knows. A header slot that
    /// does not decode may have held OPEN, so a CLEAN in the other one proves nothing.
    pub(super) fn unclean(&self) -> bool {
        !self.header.record.clean || self.header.other_bad
    }
}

fn open(store: &dyn Store, which: Which, write: bool) -> std::result::Result<Handle, Unusable> {
    let path = store.path(which);
    match store.open(which, write) {
        Ok(Some(media)) => Ok(Handle::new(media, path)),
        Ok(None) => lost(format!("{} is missing", path.display())),
        Err(e) => Err(DiskError::io("open", path, e).into()),
    }
}

fn check_rct(
    rct: &Handle,
    header: &RctHeader,
    identity: &DiskIdentity,
) -> std::result::Result<Layout, Unusable> {
    let name = rct.path().display();
    if header.lineage != identity.lineage {
        return lost(format!("{name} belongs to another disk ({})", header.lineage));
    }
    if header.size != identity.size {
        return lost(format!(
            "the disk was resized from {} to {} bytes by another program",
            header.size, identity.size
        ));
    }
    // A foreign writer: the format obliges each to change the GUID before its first change.
    if ![header.prev, header.next].contains(&identity.data_write_guid) {
        return lost(format!(
            "the disk was changed by another program since it was last tracked (its DataWriteGuid is \
             {}, {name} expects {})",
            identity.data_write_guid, header.next
        ));
    }
    if header.epoch >= EPOCH_LIMIT {
        return lost(format!("{name} has reached the last epoch"));
    }
    let Some(layout) = header.layout() else {
        return lost(format!("{name}: granules of {} bytes are not supported", header.granule));
    };
    check_len(rct, layout.rct_len())?;
    Ok(layout)
}

fn check_mrt(mrt: &Handle, rct: &RctHeader) -> std::result::Result<Slots<MrtHeader>, Unusable> {
    let name = mrt.path().display();
    let header = Slots::<MrtHeader>::read(mrt);
    let header = header.or_else(|why| lost(format!("{name}: {why}")))?;
    let found = &header.record;
    // An older copy of the bitmap would hide the bits of the last session.
    let same_session = [found.session, found.prev_session].contains(&rct.session);
    if found.tracking != rct.tracking || found.size != rct.size || !same_session {
        return lost(format!("{name} does not belong to the .rct beside it"));
    }
    check_len(mrt, MRT_LEN)?;
    Ok(header)
}

fn check_len(file: &Handle, expected: u64) -> std::result::Result<(), Unusable> {
    match file.len() {
        Ok(len) if len == expected => Ok(()),
        Ok(len) => lost(format!("{} has {len} bytes instead of {expected}", file.path().display())),
        Err(e) => Err(DiskError::io("examine", file.path(), e).into()),
    }
}

/// Puts a new, clean pair in place: no ids, granules without a mark count as of `base`. A kill between
/// the two files leaves a pair that does not match, which is made anew by the next open.
pub(super) fn create(
    store: &dyn Store,
    identity: &DiskIdentity,
    epoch: u32,
    base: u32,
) -> Result<()> {
    let rct_path = store.path(Which::Rct);
    let Some(layout) = Layout::for_size(identity.size) else {
        return Err(DiskError::Unsupported {
            path: rct_path.to_owned(),
            what: format!("change tracking of a disk of {} bytes", identity.size),
        });
    };
    if epoch >= EPOCH_END {
        return Err(DiskError::State(format!(
            "{}: epoch {epoch} is beyond what change tracking can count",
            rct_path.display()
        )));
    }
    let (tracking, session) = (Uuid::new_v4(), Uuid::new_v4());
    let mrt =
        MrtHeader { sequence: 1, tracking, size: layout.size(), session, prev_session: session };
    let rct = RctHeader {
        sequence: 1,
        lineage: identity.lineage,
        tracking,
        size: layout.size(),
        granule: layout.granule(),
        epoch: epoch.max(1),
        base,
        clean: true,
        session,
        prev: identity.data_write_guid,
        next: identity.data_write_guid,
        ids: Vec::new(),
    };
    let bitmap = [header::initial(&mrt), empty_pages(tracking)].concat();
    let put = |which, len, head: &[u8]| {
        let replaced = store.replace(which, len, head);
        replaced.map_err(|e| DiskError::io("create", store.path(which), e))
    };
    put(Which::Mrt, MRT_LEN, &bitmap)?;
    put(Which::Rct, layout.rct_len(), &header::initial(&rct))
}
