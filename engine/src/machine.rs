//! The machine of a VM, found through its run directory.

use std::time::Duration;

use tidemark_driver::{Machine, MachineState};

use crate::engine::Place;
use crate::error::Result;
use crate::process::ProcessId;

/// How long a killed machine may take to give its memory back and close its files. One that takes
/// longer counts as running still.
const DYING: Duration = Duration::from_secs(10);

/// The running machine, if there is one.
pub(crate) fn attach(place: &Place) -> Result<Option<Box<dyn Machine>>> {
    if !place.run.is_ours() {
        return Ok(None);
    }
    Ok(tidemark_driver::attach(place.driver, place.run.path())?)
}

/// Its process; known whatever the machine is doing, also while its disks stand still. A machine that
/// has just been killed is waited for: until its process has ended it is not stopped, and no command
/// can do anything with it.
pub(crate) fn process(place: &Place) -> Result<Option<ProcessId>> {
    if !place.run.is_ours() {
        return Ok(None);
    }
    let pid = tidemark_driver::process_id(place.driver, place.run.path())?;
    Ok(pid.and_then(ProcessId::of).filter(|id| !(id.dying() && id.wait(DYING))))
}

/// What it is doing.
pub(crate) fn state(place: &Place) -> Result<MachineState> {
    if process(place)?.is_none() {
        return Ok(MachineState::Stopped);
    }
    match attach(place).and_then(|m| m.map(|mut m| Ok(m.state()?)).transpose()) {
        Ok(state) => Ok(state.unwrap_or(MachineState::Stopped)),
        // Its monitor does not answer just now: another command may have its attention.
        Err(_) if process(place)?.is_some() => Ok(MachineState::Running),
        Err(_) => Ok(MachineState::Stopped),
    }
}
