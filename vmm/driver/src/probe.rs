//! Whether this host's KVM runs guest kernels at full speed.

/// How guests are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

/// The accelerator to use: `TIDEMARK_ACCEL=kvm|tcg` if set, else what the probe of /dev/kvm says.
pub fn accelerator() -> Accelerator {
    todo!()
}
