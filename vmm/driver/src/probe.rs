//! Whether this host's KVM runs guest kernels at full speed.
//!
//! `/dev/kvm` alone says little: some hosts (nested or paravirtual ones) emulate the guest's
//! ring 0, at about 2 million instructions a second, and a stock kernel never boots there. So a
//! ring-0 loop is timed.

use std::sync::OnceLock;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// How guests are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

/// Ring-0 instructions a second from which KVM is worth using. Hardware makes thousands of
/// millions, an emulator a few.
const MIN_RATE: f64 = 100e6;

/// Instructions of each step. The first tells an emulator within about 10 ms; the last is long
/// enough to drown the cost of entering the guest, also in a nested one.
const STEPS: [u32; 4] = [20_000, 200_000, 2_000_000, 2_000_000];

/// Below this rate no further step is tried.
const HOPELESS_RATE: f64 = 20e6;

/// A KVM that has not answered after this long is not used.
const PATIENCE: Duration = Duration::from_secs(2);

/// The accelerator to use: `TIDEMARK_ACCEL=kvm|tcg` if set, else what the probe of /dev/kvm says.
pub fn accelerator() -> Accelerator {
    static PROBED: OnceLock<Accelerator> = OnceLock::new();
    match std::env::var("TIDEMARK_ACCEL").as_deref() {
        Ok("kvm") => return Accelerator::Kvm,
        Ok("tcg") => return Accelerator::Tcg,
        Ok("") | Err(_) => {}
        Ok(other) => tracing::warn!("TIDEMARK_ACCEL={other}: neither kvm nor tcg; probing"),
    }
    *PROBED.get_or_init(probe)
}

/// Times ring 0 on its own thread, so that a KVM that hangs costs two seconds and no more.
fn probe() -> Accelerator {
    let (send, receive) = mpsc::channel();
    let spawned = std::thread::Builder::new().name("kvm-probe".to_owned()).spawn(move || {
        // Nobody listens any more after `PATIENCE`.
        let _ = send.send(ring0_rate());
    });
    let rate = match spawned {
        Ok(_) => receive.recv_timeout(PATIENCE).unwrap_or_else(|_| Err("no answer".to_owned())),
        Err(error) => Err(error.to_string()),
    };
    match rate {
        Ok(rate) => {
            let chosen = if rate >= MIN_RATE { Accelerator::Kvm } else { Accelerator::Tcg };
            tracing::debug!("KVM runs ring 0 at {:.1} M instructions/s: {chosen:?}", rate / 1e6);
            chosen
        }
        Err(reason) => {
            tracing::debug!("no usable KVM ({reason}): Tcg");
            Accelerator::Tcg
        }
    }
}

/// One page of memory shared with the probe's guest.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Guest address of the page.
const CODE_AT: u64 = 0x1000;

/// Real mode: `again: dec ecx; jnz again; hlt`.
const CODE: [u8; 5] = [0x66, 0x49, 0x75, 0xfc, 0xf4];

/// The best rate of [`STEPS`], in instructions a second.
fn ring0_rate() -> Result<f64, String> {
    let text = |error: kvm_ioctls::Error| error.to_string();
    let mut page = Box::new(Page([0xf4; 4096]));
    page.0[..CODE.len()].copy_from_slice(&CODE);
    let kvm = Kvm::new().map_err(text)?;
    let vm = kvm.create_vm().map_err(text)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_AT,
        memory_size: 4096,
        userspace_addr: std::ptr::from_mut::<Page>(&mut page) as u64,
    };
    // SAFETY: the region is the whole of `page`, which is aligned, of that size, not touched while
    // the guest runs, and declared before `vm`, so that it outlives the machine that refers to it.
    #[allow(unsafe_code)]
    unsafe { vm.set_user_memory_region(region) }.map_err(text)?;
    let mut vcpu = vm.create_vcpu(0).map_err(text)?;
    let mut sregs = vcpu.get_sregs().map_err(text)?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(text)?;

    let mut best = 0f64;
    for instructions in STEPS {
        let mut regs = vcpu.get_regs().map_err(text)?;
        (regs.rip, regs.rflags, regs.rcx) = (CODE_AT, 2, u64::from(instructions / 2));
        vcpu.set_regs(&regs).map_err(text)?;
        let start = processor_time();
        match vcpu.run().map_err(text)? {
            VcpuExit::Hlt => {}
            other => return Err(format!("the loop ended with {other:?}")),
        }
        let spent = processor_time().saturating_sub(start).max(Duration::from_nanos(1));
        best = best.max(f64::from(instructions) / spent.as_secs_f64());
        if best < HOPELESS_RATE {
            break;
        }
    }
    Ok(best)
}

/// Time this thread has run, the guest and its emulation included: on a busy host the time by the
/// clock says more about the other programs.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn probe_decides_quickly_whatever_the_host() {
        let start = Instant::now();
        let first = probe();
        assert!(start.elapsed() < PATIENCE + Duration::from_secs(2));
        // Where the rate is known it is far on one side of the limit, not near it.
        if let Ok(rate) = ring0_rate() {
            eprintln!("ring 0: {:.1} M instructions/s", rate / 1e6);
            assert_eq!(first == Accelerator::Kvm, rate >= MIN_RATE, "{rate}");
            assert!(rate > 0.0);
        }
    }
}
