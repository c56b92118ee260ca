//! The record of work that a kill could leave half done. It is written, durable, before the first
//! change, and removed after the last; whoever finds it finishes or undoes the work.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{VmConfig, check_file_name};
use crate::error::{EngineError, Result};
use crate::folder::{VmFolder, leaf_name};
use crate::store;

const KIND: &str = "tidemark-intent";
const VERSION: u32 = 1;

/// Half-done work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub(crate) enum Intent {
    /// A checkpoint is being taken.
    Checkpoint(CheckpointIntent),
    /// A checkpoint is being deleted: its child is merged into it.
    Merge(MergeIntent),
}

/// How far the taking of a checkpoint has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// The new leaves are being created: nothing can have been written to them.
    Preparing,
    /// They are complete, and the switch to them may have happened on any disk.
    Committing,
}

/// A checkpoint that is being taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CheckpointIntent {
    /// The checkpoint's id.
    pub(crate) id: Uuid,
    /// How far it has come.
    pub(crate) phase: Phase,
    /// The new leaf of each disk.
    pub(crate) leaves: Vec<NewLeaf>,
}

/// The new leaf of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NewLeaf {
    /// Disk name.
    pub(crate) disk: String,
    /// The new leaf's file name.
    pub(crate) file: String,
}

/// A checkpoint that is being deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MergeIntent {
    /// The checkpoint's id.
    pub(crate) checkpoint: Uuid,
    /// What is merged.
    pub(crate) disks: Vec<MergeDisk>,
}

/// The merge of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MergeDisk {
    /// Disk name.
    pub(crate) disk: String,
    /// File name of the child, which goes away.
    pub(crate) child: String,
    /// File name of the checkpoint's file, which then holds the child's state.
    pub(crate) parent: String,
}

impl Intent {
    /// Reads the intent, if there is one.
    pub(crate) fn load(folder: &VmFolder) -> Result<Option<Self>> {
        let path = folder.intent();
        if !store::exists(&path)? {
            return Ok(None);
        }
        let intent: Self = store::read(&path, KIND, VERSION)?;
        intent.check().map_err(|what| EngineError::damaged(&path, what))?;
        Ok(Some(intent))
    }

    /// Makes the intent durable.
    pub(crate) fn save(&self, folder: &VmFolder) -> Result<()> {
        store::write(&folder.intent(), KIND, VERSION, self)
    }

    /// Takes it away: the work is done or undone.
    pub(crate) fn clear(folder: &VmFolder) -> Result<()> {
        if store::remove_file(&folder.intent())? {
            store::sync_dir(folder.root())?;
        }
        Ok(())
    }

    /// The disk files it speaks of.
    pub(crate) fn files(&self) -> Vec<&str> {
        match self {
            Self::Checkpoint(c) => c.leaves.iter().map(|l| l.file.as_str()).collect(),
            Self::Merge(m) => m.disks.iter().flat_map(|d| [&*d.child, &*d.parent]).collect(),
        }
    }

    /// What is half done, for people.
    pub(crate) fn describe(&self, config: &VmConfig) -> String {
        match self {
            Self::Checkpoint(_) => "an unfinished checkpoint is to be undone".to_owned(),
            Self::Merge(m) => match config.checkpoints.iter().find(|c| c.id == m.checkpoint) {
                Some(c) => format!("the merge of checkpoint {:?} is to be finished", c.name),
                None => "files of a merged checkpoint are to be removed".to_owned(),
            },
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        self.files().into_iter().try_for_each(check_file_name)
    }
}

impl CheckpointIntent {
    /// For a new checkpoint of all disks.
    pub(crate) fn new(id: Uuid, config: &VmConfig) -> Self {
        let leaves = config
            .disks
            .iter()
            .map(|d| NewLeaf { disk: d.name.clone(), file: leaf_name(&d.name, id) })
            .collect();
        Self { id, phase: Phase::Preparing, leaves }
    }

    /// The new leaf of a disk.
    pub(crate) fn leaf_of(&self, disk: &str) -> Option<&str> {
        self.leaves.iter().find(|l| l.disk == disk).map(|l| l.file.as_str())
    }

    /// Whether the checkpoint's record stands: only the intent's removal is missing.
    pub(crate) fn is_recorded(&self, config: &VmConfig) -> bool {
        config.checkpoints.iter().any(|c| c.id == self.id)
    }
}
