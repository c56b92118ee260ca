//! The ordering rules of chains, by name. Each is obeyed in exactly one place in this module, and each
//! can be switched off there by a test, which then must see the crash test fail. Those of the
//! tracking files are in `rct`.

use std::path::Path;

/// What must happen before what, and the bug that the order prevents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The pair knows a new DataWriteGuid before its file carries it. Else a crash between the two
    /// looks like another program's write, and costs every id.
    AnnounceBeforeGuid,
    /// The child names the parent's new DataWriteGuid before the parent carries it. Else a crash
    /// between the two leaves a child that refuses its parent.
    ChildNamesGuid,
    /// What a merge copies is marked in the parent. Else an id of the parent does not see it once the
    /// child has given it up.
    MarkWhatIsCopied,
    /// The parent is synced before the child gives blocks up. Else neither has them after a crash. One
    /// sync after the copies is enough: what guests write to both files between it and the release is
    /// not flushed (a flush syncs both), and losing it leaves what was copied, which is no older than
    /// the last flush.
    SyncBeforeRelease,
    /// A guest write to a block that is copied but not given up goes to both files. Else it is given
    /// up with the child's block.
    MirrorWhatIsCopied,
    /// A guest write during the merge of the leaf is marked in the child, whose pair answers for the
    /// child's ids, whichever file it goes to.
    TrackInChild,
    /// It is marked in the parent where it goes there.
    TrackInParent,
    /// A guest's flush includes every file that may hold acknowledged writes: the parent during a
    /// merge, the leaf before the last switch.
    FlushEveryFile,
    /// The parent has the child's ids before the child forgets them.
    AdoptBeforeForget,
    /// An emptied child forgets its ids before writes are marked in its parent alone. Else a kill lets
    /// it be opened once more, and answer for writes that it never learned of.
    ForgetBeforeParentAlone,
    /// An open for writing syncs the files below the leaf before it builds on them. A killed process
    /// leaves writes in the page cache that can be read, and can still go missing in a power cut: a
    /// DataWriteGuid that the child then names alone, or data that guests flush now.
    SyncWhatWasFound,
    /// The grandchild names the parent before the file between them leaves the chain.
    RepointBeforeLeave,
}

/// Which rules are obeyed: all, but for one that a test has switched off.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rules {
    #[cfg(test)]
    broken: Option<Rule>,
}

impl Rules {
    /// The rules for the disk files of a folder: all, outside tests.
    #[cfg(test)]
    pub(super) fn of(file: &Path) -> Self {
        match crate::fs::recorded::broken(file) {
            Some(crate::fs::recorded::Broken::Chain(rule)) => Self { broken: Some(rule) },
            _ => Self::default(),
        }
    }

    #[cfg(not(test))]
    pub(super) const fn of(_file: &Path) -> Self {
        Self {}
    }

    /// Whether `rule` is obeyed; always, outside tests.
    #[cfg(test)]
    pub(super) fn obey(self, rule: Rule) -> bool {
        self.broken != Some(rule)
    }

    #[cfg(not(test))]
    pub(super) const fn obey(self, _rule: Rule) -> bool {
        true
    }
}
