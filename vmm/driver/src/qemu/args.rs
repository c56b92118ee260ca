//! The command line of a machine.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde_json::json;

use super::{MONITOR_SOCKET, PID_FILE};
use crate::agent::AGENT_SOCKET;
use crate::channel::MAX_SOCKET_PATH;
use crate::probe::Accelerator;
use crate::{DriverError, MachineDisk, MachineSpec, Result};

/// Seconds QEMU keeps requests waiting for a disk owner that has gone: a week, so that its restart
/// is invisible to the guest, however late an operator comes.
const RECONNECT_DELAY: u32 = 7 * 24 * 3600;

/// Seconds QEMU waits for the disk owner at start.
const OPEN_TIMEOUT: u32 = 10;

/// Short name, in the run directory, of a disk owner's socket whose path is too long.
const NBD_LINK: &str = "nbd.link";

/// Longest serial number virtio-blk can show.
const SERIAL_LEN: usize = 20;

/// Arguments for QEMU, which is started in the run directory.
pub(super) fn build(spec: &MachineSpec, accelerator: Accelerator) -> Result<Vec<OsString>> {
    let mut args = Args::default();
    args.machine(spec, accelerator);
    args.channels(spec)?;
    let socket = nbd_socket(spec)?;
    for (index, disk) in spec.disks.iter().enumerate() {
        // With a kernel given, that is what is booted; QEMU refuses a second first choice.
        args.disk(index, disk, &socket, spec.kernel.is_none());
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        // Restricted: the guest has a card, but reaches neither the host nor anything beyond.
        args.pair("-netdev", format!("user,id=net{index},restrict=on"));
        args.json(
            "-device",
            &json!({"driver": "virtio-net-pci", "netdev": format!("net{index}"), "mac": nic.mac,
                "romfile": ""}),
        );
    }
    args.kernel(spec)?;
    Ok(args.0)
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn pair(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.push(flag.into());
        self.0.push(value.into());
    }

    /// Devices and block nodes in JSON, where nothing needs escaping.
    fn json(&mut self, flag: &str, value: &serde_json::Value) {
        self.pair(flag, value.to_string());
    }

    fn machine(&mut self, spec: &MachineSpec, accelerator: Accelerator) {
        let name = OsString::from(spec.name.replace(',', ",,"));
        let mut title = OsString::from("guest=");
        title.push(&name);
        title.push(",process=tidemark-");
        title.push(&name);
        self.pair("-name", title);
        self.flag("-no-user-config");
        self.flag("-nodefaults");
        self.pair("-display", "none");
        self.pair("-machine", "q35,usb=off,sata=off,smbus=off,i8042=off,vmport=off");
        match accelerator {
            Accelerator::Kvm => {
                self.pair("-accel", "kvm");
                self.pair("-cpu", "host");
            }
            Accelerator::Tcg => {
                self.pair("-accel", "tcg,thread=multi");
                self.pair("-cpu", "max");
            }
        }
        self.pair("-smp", spec.cpus.to_string());
        self.pair("-m", format!("size={}k", spec.memory / 1024));
        self.pair("-uuid", spec.vm_id.to_string());
        self.pair("-rtc", "base=utc");
        self.pair("-pidfile", PID_FILE);
        self.pair(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        self.json("-device", &json!({"driver": "vmgenid", "guid": spec.generation_id.to_string()}));
        self.json("-object", &json!({"qom-type": "rng-builtin", "id": "rng0"}));
        self.json("-device", &json!({"driver": "virtio-rng-pci", "rng": "rng0"}));
    }

    /// Monitor, guest agent and console.
    fn channels(&mut self, spec: &MachineSpec) -> Result<()> {
        self.pair(
            "-chardev",
            format!("socket,id=monitor,path={MONITOR_SOCKET},server=on,wait=off"),
        );
        self.pair("-mon", "chardev=monitor,mode=control");
        self.json("-device", &json!({"driver": "virtio-serial-pci"}));
        self.pair("-chardev", format!("socket,id=agent,path={AGENT_SOCKET},server=on,wait=off"));
        self.json(
            "-device",
            &json!({"driver": "virtserialport", "chardev": "agent",
                "name": "org.qemu.guest_agent.0"}),
        );
        let mut console = OsString::from("file,id=console,append=on,path=");
        console.push(escape_commas(absolute(&spec.console_log)?.as_os_str()));
        self.pair("-chardev", console);
        self.pair("-serial", "chardev:console");
        Ok(())
    }

    fn disk(&mut self, index: usize, disk: &MachineDisk, socket: &str, bootable: bool) {
        let node = format!("disk{index}");
        self.json(
            "-blockdev",
            &json!({"driver": "nbd", "node-name": node, "export": disk.name, "discard": "unmap",
                "server": {"type": "unix", "path": socket},
                "reconnect-delay": RECONNECT_DELAY, "open-timeout": OPEN_TIMEOUT}),
        );
        // A host without space stops the machine, which can go on when there is some again; other
        // errors are the guest's to see.
        let mut device = json!({"driver": "virtio-blk-pci", "id": format!("virtio-{node}"),
            "drive": node, "serial": serial(&disk.name), "write-cache": "on", "discard": true,
            "logical_block_size": disk.sectors.0, "physical_block_size": disk.sectors.1,
            "werror": "enospc", "rerror": "report"});
        if bootable {
            device["bootindex"] = index.into();
        }
        self.json("-device", &device);
    }

    fn kernel(&mut self, spec: &MachineSpec) -> Result<()> {
        let Some(kernel) = &spec.kernel else { return Ok(()) };
        self.pair("-kernel", absolute(kernel)?);
        if let Some(initrd) = &spec.initrd {
            self.pair("-initrd", absolute(initrd)?);
        }
        if let Some(cmdline) = &spec.cmdline {
            self.pair("-append", cmdline.as_str());
        }
        Ok(())
    }
}

/// How QEMU, in the run directory, names the disk owner's socket: never longer than a socket
/// address, and valid as long as the run directory is, because QEMU connects again and again.
fn nbd_socket(spec: &MachineSpec) -> Result<String> {
    let path = absolute(&spec.nbd_socket)?;
    let plain = |p: &Path| p.to_str().filter(|s| s.len() <= MAX_SOCKET_PATH).map(str::to_owned);
    if path.parent() == Some(absolute(&spec.run_dir)?.as_path())
        && let Some(name) = path.file_name().and_then(|n| plain(Path::new(n)))
    {
        return Ok(name);
    }
    if let Some(name) = plain(&path) {
        return Ok(name);
    }
    let link = spec.run_dir.join(NBD_LINK);
    let made = match std::fs::remove_file(&link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::os::unix::fs::symlink(&path, &link),
    };
    made.map_err(DriverError::io("link", &link))?;
    Ok(NBD_LINK.to_owned())
}

fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    std::path::absolute(path).map_err(DriverError::io("resolve", path))
}

/// At most 20 bytes of a disk's name, cut between characters.
fn serial(name: &str) -> &str {
    &name[..name.floor_char_boundary(SERIAL_LEN)]
}

/// A comma ends a value in QEMU's option syntax unless doubled.
fn escape_commas(value: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(value.len());
    for &byte in value.as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_is_cut_between_characters() {
        assert_eq!(serial("system"), "system");
        assert_eq!(serial("0123456789012345678é"), "0123456789012345678");
        assert_eq!(serial(""), "");
    }

    #[test]
    fn commas_in_paths_do_not_become_options() {
        assert_eq!(escape_commas(OsStr::new("/a,logappend=off")), "/a,,logappend=off");
    }
}
