//! The owner's part of a checkpoint: new leaves for all disks, and the switch to them as one moment.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::disk::Disk;
use super::protocol::{CommittedDisk, Response};
use crate::error::{DiskError, Result};

/// Rounds of flushing before the pause.
const PREFLUSH_ROUNDS: usize = 3;
/// A round shorter than this has left next to nothing.
const PREFLUSHED: Duration = Duration::from_millis(5);

/// What the owner remembers of checkpoints. Held locked while one is prepared or committed.
#[derive(Default)]
pub(super) struct Checkpoints {
    /// Leaves that are ready for the switch.
    prepared: Option<Vec<(String, PathBuf)>>,
    /// The last switch and its answer, for a client that lost it and asks again.
    committed: Option<(Vec<(String, PathBuf)>, Response)>,
}

impl Checkpoints {
    /// Creates the new leaves, outside of any pause. Fails with no leaf left behind, or all ready.
    /// A kill leaves empty files that nothing uses; preparing the same ones again replaces them.
    pub(super) fn prepare(&mut self, disks: &[Disk], leaves: &[(String, PathBuf)]) -> Result<()> {
        let pairs = pair_up(disks, leaves)?;
        self.prepared = None;
        for (disk, leaf) in &pairs {
            let made = check_place(disk, leaf).and_then(|()| disk.chain.prepare_leaf(leaf));
            if let Err(error) = made {
                discard(disks.iter());
                return Err(error);
            }
        }
        self.prepared = Some(leaves.to_vec());
        Ok(())
    }

    /// Gives up what was prepared. A kill leaves empty files that nothing uses.
    pub(super) fn discard(&mut self, disks: &[Disk]) -> Result<()> {
        self.prepared = None;
        disks.iter().try_for_each(|disk| disk.chain.discard_prepared())
    }

    /// Pauses all disks, switches each to its prepared leaf, and lets them go on. Asked again for the
    /// same leaves while they are in use, it gives the same answer.
    pub(super) fn commit(
        &mut self,
        disks: &[Disk],
        leaves: &[(String, PathBuf)],
    ) -> Result<Response> {
        let pairs = pair_up(disks, leaves)?;
        if let Some((done, response)) = &self.committed
            && done == leaves
            && pairs.iter().all(|(disk, leaf)| disk.has_leaf(leaf))
        {
            return Ok(response.clone());
        }
        self.check_ready(&pairs, leaves)?;
        // Whatever comes of it: these leaves are used up.
        self.prepared = None;
        preflush(&pairs)?;
        let (switched, pause_us) = switch_all(&pairs);
        let response = Response::Committed { pause_us, disks: switched? };
        self.committed = Some((leaves.to_vec(), response.clone()));
        Ok(response)
    }

    /// Gives prepared leaves up: they would stand in the way of a merge.
    pub(super) fn abandon(&mut self, disks: &[Disk]) {
        if self.prepared.take().is_some() {
            discard(disks.iter());
        }
    }

    /// Refuses before any disk is touched what would fail on some of them after others had switched.
    fn check_ready(&self, pairs: &[(&Disk, &Path)], leaves: &[(String, PathBuf)]) -> Result<()> {
        if self.prepared.as_deref() != Some(leaves) {
            return Err(DiskError::State(
                "these leaves are not prepared: prepare the checkpoint first".to_owned(),
            ));
        }
        // Whoever prepared them may have given up and removed them since.
        if let Some((_, leaf)) = pairs.iter().find(|(_, leaf)| !leaf.exists()) {
            return Err(DiskError::State(format!(
                "{} has been removed: prepare the checkpoint again",
                leaf.display()
            )));
        }
        match pairs.iter().find(|(disk, _)| disk.leaf_is_merging()) {
            Some((disk, _)) => Err(DiskError::State(format!(
                "the leaf of disk {} is being merged: wait for the end, or cancel it",
                disk.name
            ))),
            None => Ok(()),
        }
    }
}

/// Flushes what can be flushed before the pause, so that it is not waited for in it. Under load each
/// round leaves what was written during it: less every time, up to a point.
fn preflush(pairs: &[(&Disk, &Path)]) -> Result<()> {
    for _ in 0..PREFLUSH_ROUNDS {
        let start = Instant::now();
        for (disk, _) in pairs {
            disk.chain.preflush()?;
        }
        if start.elapsed() < PREFLUSHED {
            break;
        }
    }
    Ok(())
}

/// The switch itself, and how long requests were held back for it, in microseconds.
fn switch_all(pairs: &[(&Disk, &Path)]) -> (Result<Vec<CommittedDisk>>, u64) {
    let start = Instant::now();
    // Always in the order of the owner's disks.
    let pauses: Vec<_> = pairs.iter().map(|(disk, _)| disk.chain.pause()).collect();
    let mut switched: Vec<CommittedDisk> = Vec::new();
    let mut failure = None;
    for ((disk, leaf), pause) in pairs.iter().zip(&pauses) {
        match disk.chain.switch_leaf(pause, leaf) {
            Ok(rct_id) => switched.push(CommittedDisk { disk: disk.name.clone(), rct_id }),
            Err(error) => {
                failure = Some((disk.name.clone(), error));
                break;
            }
        }
    }
    drop(pauses);
    let pause_us = start.elapsed().as_micros() as u64;
    let Some((name, error)) = failure else { return (Ok(switched), pause_us) };
    // Leaves that were not switched to go, so that nothing can switch to them later.
    discard(pairs[switched.len()..].iter().map(|(disk, _)| *disk));
    let message = if switched.is_empty() {
        format!("disk {name}: {error}; no disk was switched")
    } else {
        let done: Vec<_> = switched.iter().map(|d| d.disk.as_str()).collect();
        format!(
            "disk {name}: {error}; already on their new leaves, which must be merged back: {}",
            done.join(", ")
        )
    };
    (Err(DiskError::State(message)), pause_us)
}

/// Syncs and closes the old leaves; apart from the switch, so that a frozen guest need not wait for
/// it. A checkpoint whose sync failed is none: the client undoes it, by merging the new leaves back.
/// The next map flush tries to close them again.
pub(super) fn settle(disks: &[Disk]) -> Result<()> {
    for disk in disks {
        disk.chain.settle().map_err(|error| {
            DiskError::State(format!(
                "disk {}: the leaf that the checkpoint sealed could not be made durable: {error}; all \
                 disks are on their new leaves, which must be merged back",
                disk.name
            ))
        })?;
    }
    Ok(())
}

fn discard<'a>(disks: impl Iterator<Item = &'a Disk>) {
    for disk in disks {
        if let Err(error) = disk.chain.discard_prepared() {
            tracing::warn!(disk = disk.name, %error, "an unused leaf was left behind");
        }
    }
}

/// Pairs each disk with its new leaf, in the order of the owner's disks. A checkpoint is of the whole
/// VM: every disk must be named, once.
fn pair_up<'a>(
    disks: &'a [Disk],
    leaves: &'a [(String, PathBuf)],
) -> Result<Vec<(&'a Disk, &'a Path)>> {
    let known: HashSet<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    if let Some((name, _)) = leaves.iter().find(|(name, _)| !known.contains(name.as_str())) {
        return Err(DiskError::State(format!("this owner has no disk {name}")));
    }
    if leaves.len() != disks.len() {
        return Err(DiskError::State(format!(
            "a checkpoint names each of the {} disks once, not {}",
            disks.len(),
            leaves.len()
        )));
    }
    disks
        .iter()
        .map(|disk| match leaves.iter().find(|(name, _)| *name == disk.name) {
            Some((_, leaf)) => Ok((disk, leaf.as_path())),
            None => Err(DiskError::State(format!("no new leaf is named for disk {}", disk.name))),
        })
        .collect()
}

/// A client may only name files beside the disk's leaf.
fn check_place(disk: &Disk, leaf: &Path) -> Result<()> {
    let current = disk.leaf().unwrap_or_default();
    let folder = |file: &Path| file.parent().and_then(|folder| folder.canonicalize().ok());
    if leaf.file_name().is_some() && folder(leaf).is_some() && folder(leaf) == folder(&current) {
        return Ok(());
    }
    Err(DiskError::State(format!(
        "{} is not in the folder of disk {} ({})",
        leaf.display(),
        disk.name,
        current.display()
    )))
}
