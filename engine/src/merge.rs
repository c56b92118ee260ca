//! Merging a file of a disk chain into its parent, whoever has the chain open; and the deletion of a
//! checkpoint, which is such a merge for each disk.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tidemark_disk::DiskError;
use tidemark_disk::chain::Chain;
use tidemark_disk::owner::{Client, MergeState, Request};
use tidemark_disk::vhdx::Access;

use crate::config::{CheckpointRecord, Progress, VmConfig};
use crate::engine::Place;
use crate::error::{EngineError, Result};
use crate::fault;
use crate::intent::{Intent, MergeDisk, MergeIntent};
use crate::leaves::leaf_of;
use crate::session::VmSession;
use crate::{machine, owner, store};

/// How often a running merge is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Longest wait for the owner to accept a merge or its end.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a disk owner may be away (its guard starts it again) before a merge gives up.
const AWAY: Duration = Duration::from_secs(60);

impl VmSession<'_> {
    /// Deletes a checkpoint: merges its child into it. By id or name. Cancelled, it stays and can be
    /// deleted again later; the next session finishes what was begun.
    pub fn delete_checkpoint(
        &mut self,
        checkpoint: &str,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let id = self.find_checkpoint(checkpoint)?.id;
        match Intent::load(&self.place.folder)? {
            Some(Intent::Merge(begun)) if begun.checkpoint == id => {
                return self.finish_merge(&begun, progress, cancel);
            }
            Some(_) => self.recover_intent()?,
            None => {}
        }
        let intent = self.plan_merge(id)?;
        // From here on the merge is finished, not undone: the children are never told apart from
        // their parents again once blocks have moved.
        Intent::Merge(intent.clone()).save(&self.place.folder)?;
        fault::point("merge-intent");
        self.finish_merge(&intent, progress, cancel)
    }

    /// A checkpoint by id or name.
    pub(crate) fn find_checkpoint(&self, wanted: &str) -> Result<&CheckpointRecord> {
        let by_id = self.config.checkpoints.iter().find(|c| c.id.to_string() == wanted);
        by_id.or_else(|| self.config.checkpoints.iter().find(|c| c.name == wanted)).ok_or_else(
            || EngineError::NoSuchCheckpoint {
                vm: self.place.name.clone(),
                checkpoint: wanted.to_owned(),
            },
        )
    }

    fn plan_merge(&self, id: uuid::Uuid) -> Result<MergeIntent> {
        let missing = || EngineError::damaged(&self.place.folder.config(), "a disk has no child");
        let index = self.config.checkpoints.iter().position(|c| c.id == id).ok_or_else(missing)?;
        let disks = self.config.checkpoints[index].disks.iter().map(|disk| {
            let child = self.config.child_of(index, &disk.name).ok_or_else(missing)?;
            Ok(MergeDisk {
                disk: disk.name.clone(),
                child: child.to_owned(),
                parent: disk.file.clone(),
            })
        });
        Ok(MergeIntent { checkpoint: id, disks: disks.collect::<Result<_>>()? })
    }

    /// Does what is left of a checkpoint's deletion. Every step may be repeated: killed anywhere, the
    /// next call goes on.
    pub(crate) fn finish_merge(
        &mut self,
        intent: &MergeIntent,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        while self.config.checkpoints.iter().any(|c| c.id == intent.checkpoint) {
            for disk in &intent.disks {
                let what = format!("merge {}", disk.disk);
                let tell = |done, total| progress(&what, done, total);
                let (name, child) = (&disk.disk, &disk.child);
                let place = &self.place;
                Fold { place, disk: name, child, progress: &tell, cancel }.run()?;
                fault::point("merge-disk");
            }
            self.record_merge(intent)?;
        }
        fault::point("merge-recorded");
        // The record no longer names the children: what a kill leaves of them, the intent removes.
        for disk in &intent.disks {
            self.remove_unused(&disk.child)?;
            fault::point("merge-removed");
        }
        for checkpoint in &self.config.checkpoints {
            self.write_snapshot(checkpoint)?;
        }
        store::remove_file(&self.place.folder.snapshot(intent.checkpoint))?;
        Intent::clear(&self.place.folder)
    }

    /// The commit point of a deletion. Does nothing if a disk owner that was started meanwhile has a
    /// child in its chain again: then the merge must be repeated, or what the guest wrote to that
    /// child would be lost.
    fn record_merge(&mut self, intent: &MergeIntent) -> Result<()> {
        let _lock = owner::hold(&self.place.run)?;
        if machine::process(&self.place)?.is_some() {
            let Ok(report) =
                owner::connect(&self.place.run).and_then(|mut c| owner::report(&mut c))
            else {
                return Ok(());
            };
            if intent.disks.iter().any(|d| owner::has_file(&report, &d.disk, &d.child)) {
                return Ok(());
            }
        } else if owner::process(&self.place.run).is_some() {
            // The machine has just ended, its owner is closing the disks.
            return Ok(());
        }
        let config = without(&self.config, intent);
        config.save(&self.place.folder.config())?;
        self.config = config;
        Ok(())
    }

    /// Removes a disk file and its tracking pair, if the configuration does not name it.
    pub(crate) fn remove_unused(&self, file: &str) -> Result<()> {
        if self.config.disk_files().any(|used| used == file) {
            return Err(EngineError::damaged(
                &self.place.folder.config(),
                format!("it still names {file}, which was merged"),
            ));
        }
        self.place.folder.remove_disk(file)
    }
}

/// The configuration without a checkpoint, whose file now holds what its child held.
fn without(config: &VmConfig, intent: &MergeIntent) -> VmConfig {
    let mut config = config.clone();
    config.checkpoints.retain(|c| c.id != intent.checkpoint);
    for merged in &intent.disks {
        let sealed = config.checkpoints.iter_mut().flat_map(|c| &mut c.disks).map(|d| &mut d.file);
        let leaves = config.disks.iter_mut().map(|d| &mut d.leaf);
        for file in leaves.chain(sealed).filter(|f| **f == merged.child) {
            file.clone_from(&merged.parent);
        }
    }
    config
}

fn is_named(path: &Path, file: &str) -> bool {
    path.file_name() == Some(OsStr::new(file))
}

/// Folding a file of a disk's chain into its parent.
pub(crate) struct Fold<'a> {
    pub(crate) place: &'a Place,
    pub(crate) disk: &'a str,
    /// The file's name.
    pub(crate) child: &'a str,
    /// Bytes done, bytes in all.
    pub(crate) progress: &'a dyn Fn(u64, u64),
    pub(crate) cancel: &'a AtomicBool,
}

/// Why an online merge stopped.
enum Online {
    /// The owner is gone: killed, and started again by the guard, or at its end with the machine.
    Lost(DiskError),
    /// The merge itself.
    Failed(EngineError),
}

/// What the owner has been asked for.
#[derive(Default)]
struct Asked {
    start: bool,
    cancel: bool,
}

/// Asks the owner for something. A refusal is told from a lost connection by asking it for its state.
fn order(client: &mut Client, request: &Request) -> std::result::Result<(), Online> {
    match client.call(request, ANSWER) {
        Ok(_) => Ok(()),
        Err(error) if owner::report(client).is_ok() => Err(Online::Failed(error.into())),
        Err(error) => Err(Online::Lost(error)),
    }
}

impl Fold<'_> {
    /// Does it: through the disk owner while the VM runs, by ourselves while it does not, also if that
    /// changes in between. Done already: fine.
    pub(crate) fn run(&self) -> Result<()> {
        let mut give_up = Instant::now() + AWAY;
        loop {
            if machine::process(self.place)?.is_none() {
                owner::shutdown(&self.place.run, ANSWER)?;
                return self.offline();
            }
            match self.online(&mut give_up) {
                Err(Online::Lost(_)) if Instant::now() < give_up => std::thread::sleep(POLL),
                Err(Online::Lost(error)) => return Err(error.into()),
                Err(Online::Failed(error)) => return Err(error),
                Ok(()) => return Ok(()),
            }
        }
    }

    fn online(&self, give_up: &mut Instant) -> std::result::Result<(), Online> {
        let Self { place, disk, child, progress, cancel } = *self;
        let mut client = owner::connect(&place.run).map_err(Online::Lost)?;
        let mut asked = Asked::default();
        loop {
            let report = owner::report(&mut client).map_err(Online::Lost)?;
            *give_up = Instant::now() + AWAY;
            let Some(state) = report.disks.into_iter().find(|d| d.disk == disk) else {
                let what = format!("the disk owner does not know disk {disk}");
                return Err(Online::Failed(EngineError::State(what)));
            };
            let Some(path) = state.files.iter().find(|f| is_named(f, child)) else { return Ok(()) };
            match state.merge {
                MergeState::Running { child: running, done, total }
                    if is_named(&running, child) =>
                {
                    asked.start = true;
                    progress(done, total);
                    if cancel.load(Ordering::Relaxed) && !asked.cancel {
                        asked.cancel = true;
                        order(&mut client, &Request::CancelMerge { disk: disk.to_owned() })?;
                    }
                }
                MergeState::Running { child: other, .. } => {
                    let what = format!("disk {disk} is merging {} already", other.display());
                    return Err(Online::Failed(EngineError::State(what)));
                }
                MergeState::Failed { message, .. } if asked.start => {
                    return Err(Online::Failed(if asked.cancel {
                        EngineError::Cancelled
                    } else {
                        DiskError::Owner(format!("merge of {child}: {message}")).into()
                    }));
                }
                MergeState::Done { .. } if asked.start => {
                    let what = format!("merge of {child} is done, but the file is still in use");
                    return Err(Online::Failed(DiskError::Owner(what).into()));
                }
                _ if cancel.load(Ordering::Relaxed) => {
                    return Err(Online::Failed(EngineError::Cancelled));
                }
                _ => {
                    asked.start = true;
                    let child = path.clone();
                    order(&mut client, &Request::StartMerge { disk: disk.to_owned(), child })?;
                }
            }
            std::thread::sleep(POLL);
        }
    }

    fn offline(&self) -> Result<()> {
        let config = VmConfig::load(&self.place.folder.config())?;
        let chain = Chain::open(&leaf_of(self.place, &config, self.disk)?, Access::ReadWrite)?;
        let merged = match chain.files().into_iter().find(|f| is_named(f, self.child)) {
            Some(path) => chain.merge(&path, &|p| (self.progress)(p.done, p.total), self.cancel),
            None => Ok(()),
        };
        let closed = chain.close();
        match merged {
            Err(DiskError::Cancelled) => Err(EngineError::Cancelled),
            merged => Ok(merged.and(closed)?),
        }
    }
}
