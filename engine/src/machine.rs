//! The machine of a VM, found through its run directory.

use tidemark_driver::{Machine, MachineState};

use crate::engine::Place;
use crate::error::Result;
use crate::process::ProcessId;

/// The running machine, if there is one.
pub(crate) fn attach(place: &Place) -> Result<Option<Box<dyn Machine>>> {
    if !place.run.is_ours() {
        return Ok(None);
    }
    Ok(tidemark_driver::attach(place.driver, place.run.path())?)
}

/// Its process.
pub(crate) fn process(place: &Place) -> Result<Option<ProcessId>> {
    Ok(attach(place)?.and_then(|m| ProcessId::of(m.pid())))
}

/// What it is doing.
pub(crate) fn state(place: &Place) -> Result<MachineState> {
    let Some(mut machine) = attach(place)? else { return Ok(MachineState::Stopped) };
    match machine.state() {
        Ok(state) => Ok(state),
        // Another command may have its monitor's attention just now.
        Err(_) if ProcessId::of(machine.pid()).is_some() => Ok(MachineState::Running),
        Err(_) => Ok(MachineState::Stopped),
    }
}
