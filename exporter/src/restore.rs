//! Restores whole VMs.

use std::sync::atomic::AtomicBool;

use tidemark_disk::Geometry;
use tidemark_driver::MachineState;
use tidemark_engine::{EngineError, RestoreVm, VmConfig, VmSession};

use crate::block::geometry;
use crate::error::{ExportError, Result, check};
use crate::exporter::Exporter;
use crate::model::{Events, RestoreRequest};
use crate::report::{Amounts, Reporter};
use crate::source::{DiskSource, PointSource};

impl Exporter<'_> {
    /// Restores a whole VM; new ids, MAC addresses and generation id unless in place.
    pub fn restore_vm(
        &self,
        request: &RestoreRequest,
        events: Events<'_>,
        cancel: &AtomicBool,
    ) -> Result<VmConfig> {
        let reporter = Reporter::new(events);
        reporter.step("find the restore point");
        let source = self.open_source(&request.point, request.target.as_deref(), &reporter)?;
        let replaced = self.to_replace(request, &source)?;
        let order = RestoreVm {
            name: request.name.clone(),
            config: config_of(&source),
            disks: disks_of(&source)?,
            boot: source.boot_files(&reporter)?,
            keep_identity: request.in_place,
        };
        check(cancel)?;
        // Until its commit the new VM is a folder under construction: a kill or an error leaves
        // nothing visible, and in place the old VM as it was.
        let new = self.engine.begin_restore(&order)?;
        for (name, disk) in &new.disks {
            reporter.step(format!("restore {name}"));
            let stored = source.disk(name)?;
            write_disk(&stored, &reporter, cancel, &|at, data| Ok(disk.write_at(at, data)?))?;
        }
        check(cancel)?;
        reporter.step("commit");
        Ok(match replaced {
            Some(old) => new.commit_replacing(old)?,
            None => new.commit()?,
        })
    }

    /// The VM that a restore in place will replace, held so that nobody starts it meanwhile.
    fn to_replace(
        &self,
        request: &RestoreRequest,
        source: &PointSource,
    ) -> Result<Option<VmSession<'_>>> {
        if !request.in_place {
            return Ok(None);
        }
        let name = &request.name;
        let session = match self.engine.session(name) {
            Ok(session) => session,
            // Gone altogether: then it is simply restored with its identity.
            Err(EngineError::NoSuchVm(_)) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if session.config().id != source.manifest.group {
            return Err(ExportError::Invalid(format!(
                "restore point {} is of another VM ({}) than the {name} that is here; restore it under another name, or delete {name} first",
                source.point, source.facts.vm.name
            )));
        }
        if self.engine.show(name)?.state != MachineState::Stopped {
            return Err(ExportError::Invalid(format!(
                "VM {name} is running; stop it before restoring in its place"
            )));
        }
        Ok(Some(session))
    }
}

/// The configuration to restore. The host's own checkpoints are not part of a restore point; the one
/// it was made from tells the disks' lineages, which a restore in place keeps.
fn config_of(source: &PointSource) -> VmConfig {
    VmConfig { checkpoints: vec![source.facts.checkpoint.clone()], ..source.facts.vm.clone() }
}

/// The VM's disks in its order; every one must be in the restore point.
fn disks_of(source: &PointSource) -> Result<Vec<(String, Geometry)>> {
    let stored = |name: &str| source.manifest.disks.iter().find(|d| d.name == name);
    let disks = source.facts.vm.disks.iter().map(|disk| {
        let root = &stored(&disk.name)
            .ok_or_else(|| {
                ExportError::Invalid(format!(
                    "restore point {} lacks disk {} of its VM",
                    source.point, disk.name
                ))
            })?
            .root;
        Ok((disk.name.clone(), geometry(&source.facts, &disk.name, root.size)?))
    });
    disks.collect()
}

/// Copies a stored disk into an empty one: verified data is written, zeros are left out.
pub(crate) fn write_disk(
    source: &DiskSource,
    reporter: &Reporter<'_>,
    cancel: &AtomicBool,
    write: &dyn Fn(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    // Progress is the position on the disk; how much of it is data is only known at its end.
    let amounts = |done| Amounts { done, total: source.size, ..Amounts::default() };
    let result = source.for_each(cancel, &mut |offset, data| {
        check(cancel)?;
        write(offset, &data)?;
        reporter.progress(amounts(offset + data.len() as u64));
        source.tell(reporter);
        Ok(())
    });
    source.tell(reporter);
    result?;
    reporter.progress_now(amounts(source.size));
    Ok(())
}
