//! QEMU as the virtual machine monitor.

use std::path::Path;
use std::time::Duration;

use crate::{Machine, MachineSpec, MachineState, Result};

/// A running `qemu-system-x86_64`.
pub struct Qemu {
    _private: (),
}

impl Qemu {
    /// Starts QEMU in its own session and waits until it answers QMP.
    pub fn launch(_spec: &MachineSpec) -> Result<Self> {
        todo!()
    }
    /// Finds the machine that was launched with this run directory.
    pub fn attach(_run_dir: &Path) -> Result<Option<Self>> {
        todo!()
    }
}

impl Machine for Qemu {
    fn state(&mut self) -> Result<MachineState> {
        todo!()
    }
    fn pid(&self) -> u32 {
        todo!()
    }
    fn press_power_button(&mut self) -> Result<()> {
        todo!()
    }
    fn wait_stopped(&mut self, _timeout: Duration) -> Result<bool> {
        todo!()
    }
    fn kill(&mut self) -> Result<()> {
        todo!()
    }
    fn pause(&mut self) -> Result<()> {
        todo!()
    }
    fn resume(&mut self) -> Result<()> {
        todo!()
    }
    fn description(&self) -> String {
        todo!()
    }
}
