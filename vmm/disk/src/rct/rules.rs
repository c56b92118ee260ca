//! The ordering rules, by name. Each is obeyed in exactly one place in this module, and each can be
//! switched off there by a test, which then must see the crash test fail.
//!
//! Two more are the caller's: [`Tracker::open`](super::Tracker::open) and
//! [`Tracker::announce`](super::Tracker::announce) return before the disk carries the new
//! DataWriteGuid, else a crash between the two looks like another program's write and costs every
//! id; and the disk is flushed before a seal, else a crash takes back a write that the id counts as
//! done, and nothing says that the content has changed since.

/// What must happen before what, and the bug that the order prevents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The header says OPEN, durably, before the first write. Else a crash finds CLEAN, does not look
    /// at the bitmap, and forgets the whole session.
    OpenBeforeWrites,
    /// A region's bit is durable before a write into it is issued, not merely before it is
    /// acknowledged. The page cache may persist the data at any time; the mark would be lost with
    /// memory.
    BitBeforeWrite,
    /// The map pages are durable before a bit is cleared. Else a crash finds neither.
    PagesBeforeClear,
    /// All pages of a region are durable before its bit is cleared: a region can lie in two.
    EveryPageBeforeClear,
    /// A bit stays while a write into its region is between its first step and its end. Such a write
    /// may have checked the bit and not yet marked its granules.
    InFlightKeepsBit,
    /// A cleared bit counts as not durable at once: the next touch writes and syncs it again.
    ClearedBitIsGone,
    /// The id is durable when a seal returns; else a backup is recorded under an id that no disk
    /// knows.
    SealIsDurable,
    /// A seal starts the next epoch in the same header write. Else writes after a crash are marked
    /// with the epoch that the id ended.
    SealEndsEpoch,
    /// The map pages are durable before the header says CLEAN, which makes recovery skip the bitmap.
    PagesBeforeClean,
    /// Recovery makes the regions' marks durable before it clears the bitmap; it may be killed too.
    RecoveryBeforeClear,
    /// What an open reads is synced before it is built upon: a killed process leaves writes in the page
    /// cache that were read, and can still go missing in a power cut.
    SyncWhatWasFound,
    /// Recovery writes every page of a set region again, also where the marks seem to stand: after a
    /// failed sync the page cache shows them, calls them clean, and no later sync writes them.
    RewriteWhatWasFound,
}

/// Which rules are obeyed: all, but for one that a test has switched off.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rules {
    #[cfg(test)]
    pub(super) broken: Option<Rule>,
}

impl Rules {
    /// The rules for the pair of a disk file.
    #[cfg(test)]
    pub(super) fn of(disk: &std::path::Path) -> Self {
        match crate::fs::recorded::broken(disk) {
            Some(crate::fs::recorded::Broken::Tracking(rule)) => Self { broken: Some(rule) },
            _ => Self::default(),
        }
    }

    /// The rules for the pair of a disk file: all.
    #[cfg(not(test))]
    pub(super) const fn of(_disk: &std::path::Path) -> Self {
        Self {}
    }

    /// Whether `rule` is obeyed; always, outside tests.
    #[cfg(test)]
    pub(super) fn obey(self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    /// Whether `rule` is obeyed; always, outside tests.
    #[cfg(not(test))]
    pub(super) const fn obey(self, _rule: Rule) -> bool {
        true
    }
}
