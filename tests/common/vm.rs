//! A Debian guest on a test host.

use std::path::{Path, PathBuf};

use super::Host;

/// The guest's files, made by `make guest`.
pub(crate) fn guest_dir() -> PathBuf {
    tidemark_lab::guest(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// A VM with the Debian guest.
pub(crate) struct Vm<'a> {
    /// Its host.
    pub(crate) host: &'a Host,
    /// Its name.
    pub(crate) name: String,
}

impl<'a> Vm<'a> {
    /// Imports the guest.
    pub(crate) fn create(host: &'a Host, name: &str) -> Self {
        let guest = guest_dir();
        let file = |f: &str| guest.join(f).to_str().unwrap().to_owned();
        let cmdline = std::fs::read_to_string(guest.join("cmdline")).unwrap();
        host.json([
            "vm",
            "create",
            name,
            "--import",
            &file("debian.raw"),
            "--kernel",
            &file("vmlinuz"),
            "--initrd",
            &file("initrd.img"),
            "--cmdline",
            cmdline.trim(),
            "--cpus",
            "2",
            "--memory",
            "1G",
        ]);
        Self { host, name: name.to_owned() }
    }

    /// A VM that exists already.
    pub(crate) fn existing(host: &'a Host, name: &str) -> Self {
        Self { host, name: name.to_owned() }
    }

    /// Starts it and waits for the guest agent.
    pub(crate) fn start(&self) -> &Self {
        self.host.json(["vm", "start", &self.name, "--wait", "240"]);
        self
    }

    /// Waits for the guest agent of a VM that was started already.
    pub(crate) fn start_again(&self) -> &Self {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(240);
        while !self.host.run(["vm", "exec", &self.name, "--", "/bin/true"]).status.success() {
            assert!(std::time::Instant::now() < end, "the guest agent does not answer");
        }
        self
    }

    /// Stops it at once, as a power cut would.
    pub(crate) fn cut_power(&self) {
        self.host.json(["vm", "stop", &self.name, "--force"]);
    }

    /// Runs a shell script in the guest; it must succeed.
    pub(crate) fn sh(&self, script: &str) -> String {
        let done =
            self.host.json(["vm", "exec", &self.name, "--json", "--", "/bin/sh", "-c", script]);
        assert_eq!(done["exit_code"], 0, "in the guest: {script}: {done}");
        done["stdout"].as_str().unwrap().trim().to_owned()
    }

    /// The leaf files of its disks, in its folder.
    pub(crate) fn disk_files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.folder().join("disks"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.ends_with("vhdx"))
            .collect();
        names.sort();
        names
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> PathBuf {
        self.host.data_dir().join("vms").join(&self.name)
    }
}
