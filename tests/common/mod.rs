//! What the end-to-end tests share: a data directory of their own, the command, a Debian guest, an S3
//! service. Everything ends and disappears when its value is dropped.
#![allow(dead_code)] // each test program uses its part

pub(crate) mod s3;
pub(crate) mod vm;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// The program under test.
pub(crate) const TIDEMARK: &str = env!("CARGO_BIN_EXE_tidemark");

/// Passphrase of all test repositories.
pub(crate) const PASSPHRASE: &str = "correct horse battery staple";

/// A host: a data directory and the command that works on it.
pub(crate) struct Host {
    dir: TempDir,
}

impl Host {
    /// An empty one. The folder is short, because sockets live in it.
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("tm-").tempdir_in("/tmp").unwrap();
        Self { dir }
    }

    /// A folder for the test's own files.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The data directory.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A command line, ready to run.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(TIDEMARK);
        command
            .env("TIDEMARK_DATA_DIR", self.data_dir())
            .env("TIDEMARK_PASSPHRASE", PASSPHRASE)
            .env_remove("AWS_ACCESS_KEY_ID")
            .env_remove("AWS_SECRET_ACCESS_KEY")
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command whatever comes of it.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed, with `--json`, and gives its document.
    pub(crate) fn json<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Value {
        let mut command = self.command(args);
        let output = command.arg("--json").output().unwrap();
        assert!(
            output.status.success(),
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!("{command:?}: {e}: {}", String::from_utf8_lossy(&output.stdout))
        })
    }

    /// Runs a command that must fail with this exit code, and gives what it said.
    pub(crate) fn fails<S: AsRef<OsStr>>(
        &self,
        code: i32,
        args: impl IntoIterator<Item = S>,
    ) -> String {
        let mut command = self.command(args);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
        said
    }

    /// Adds a local target in the host's folder.
    pub(crate) fn add_local_target(&self, name: &str) -> PathBuf {
        let folder = self.path().join(format!("target-{name}"));
        std::fs::create_dir_all(&folder).unwrap();
        self.json(["target", "add", name, folder.to_str().unwrap()]);
        folder
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // VMs that a failed test left running.
        let Ok(list) = self.command(["vm", "list", "--json"]).output() else { return };
        let Ok(vms) = serde_json::from_slice::<Value>(&list.stdout) else { return };
        for vm in vms.as_array().into_iter().flatten() {
            if vm["state"] != "stopped" {
                let name = vm["config"]["name"].as_str().unwrap_or_default().to_owned();
                let _ = self.command(["vm", "stop", &name, "--force"]).output();
            }
        }
    }
}

/// Runs a program that must succeed and gives its output.
pub(crate) fn tool<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(program);
    let output =
        command.args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| {
            panic!("{program}: {e}; `make setup` installs what the tests need")
        });
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A deterministic random generator (SplitMix64) for seeded tests.
pub(crate) struct Random(pub u64);

impl Random {
    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Incompressible bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}
