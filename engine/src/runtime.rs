//! The run directory of a VM: sockets and process ids of what runs now, none of which outlives it.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::{EngineError, Result};
use crate::process::ProcessId;
use crate::store;

/// Longest socket path that we make; the system allows 107 bytes.
const MAX_SOCKET_PATH: usize = 100;
/// Room for the longest socket name in a run directory, with its slash.
const SOCKET_NAME: usize = 24;

/// A VM's run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    path: PathBuf,
    /// It lies below /tmp, where anybody may write.
    shared: bool,
    /// Who the directory belongs to: the data directory, the VM's name and id.
    owner: String,
}

impl RunDir {
    /// Where the run directory of a VM is, whether it exists or not. The data directory's path is
    /// canonical.
    pub(crate) fn locate(data_dir: &Path, name: &str, vm: Uuid) -> Self {
        let short = &vm.simple().to_string()[..8];
        let inside = data_dir.join("run").join(short);
        let owner = format!("{} {name} {vm}\n", data_dir.display());
        if inside.as_os_str().len() + SOCKET_NAME <= MAX_SOCKET_PATH {
            return Self { path: inside, shared: false, owner };
        }
        let uid = rustix::process::getuid().as_raw();
        let hash = fnv1a(data_dir.as_os_str().as_encoded_bytes());
        let path = PathBuf::from(format!("/tmp/tidemark-{uid}/{hash:016x}/{short}"));
        Self { path, shared: true, owner }
    }

    /// Makes the directory and checks that it is ours and nobody else's.
    pub(crate) fn create(&self) -> Result<()> {
        let mut checked = Vec::new();
        if self.shared {
            // Every level below /tmp must be ours alone.
            checked.extend(self.path.ancestors().skip(1).take(2).map(Path::to_owned));
            checked.reverse();
        }
        checked.push(self.path.clone());
        for dir in &checked {
            private_dir(dir)?;
        }
        match fs::read_to_string(self.owner_file()) {
            Ok(found) if found == self.owner => return Ok(()),
            Ok(found) if self.in_use() => {
                return Err(EngineError::State(format!(
                    "the run directory {} belongs to another running VM ({}); two VMs with the same id cannot run at once",
                    self.path.display(),
                    found.trim()
                )));
            }
            _ => {}
        }
        store::write_durable(&self.owner_file(), &[self.owner.as_bytes()])
    }

    /// Whether the directory exists and is this VM's.
    pub(crate) fn is_ours(&self) -> bool {
        fs::read_to_string(self.owner_file()).is_ok_and(|found| found == self.owner)
    }

    fn in_use(&self) -> bool {
        [self.owner_pid(), self.guard_pid()].into_iter().flatten().any(|id| id.alive())
    }

    fn owner_file(&self) -> PathBuf {
        self.path.join("vm")
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The disk owner's NBD server.
    pub(crate) fn nbd_socket(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }

    /// The disk owner's control protocol.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// The disk owner's log.
    pub(crate) fn owner_log(&self) -> PathBuf {
        self.path.join("owner.log")
    }

    /// Held while somebody starts a disk owner.
    pub(crate) fn owner_lock(&self) -> PathBuf {
        self.path.join("owner.lock")
    }

    /// The guard's socket.
    pub(crate) fn guard_socket(&self) -> PathBuf {
        self.path.join("guard.sock")
    }

    /// The guard's log.
    pub(crate) fn guard_log(&self) -> PathBuf {
        self.path.join("guard.log")
    }

    /// Held by the guard as long as it lives.
    pub(crate) fn guard_lock(&self) -> PathBuf {
        self.path.join("guard.lock")
    }

    /// Held by whoever talks to the guest agent, whose channel takes one client at a time.
    pub(crate) fn agent_lock(&self) -> PathBuf {
        self.path.join("agent.lock")
    }

    /// The guest agent's socket.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.path.join(tidemark_driver::agent::AGENT_SOCKET)
    }

    /// Present from before a freeze until it is known to have ended.
    pub(crate) fn frozen_marker(&self) -> PathBuf {
        self.path.join("frozen")
    }

    /// The disk owner, as far as recorded.
    pub(crate) fn owner_pid(&self) -> Option<ProcessId> {
        read_pid(&self.path.join("owner.pid"))
    }

    /// The guard, as far as recorded.
    pub(crate) fn guard_pid(&self) -> Option<ProcessId> {
        read_pid(&self.path.join("guard.pid"))
    }

    /// Records the disk owner.
    pub(crate) fn set_owner_pid(&self, id: &ProcessId) -> Result<()> {
        store::write_durable(&self.path.join("owner.pid"), &[id.to_line().as_bytes()])
    }

    /// Records the guard.
    pub(crate) fn set_guard_pid(&self, id: &ProcessId) -> Result<()> {
        store::write_durable(&self.path.join("guard.pid"), &[id.to_line().as_bytes()])
    }

    /// Removes what a disk owner that has ended left behind.
    pub(crate) fn clear_owner(&self) -> Result<()> {
        for path in [self.path.join("owner.pid"), self.control_socket(), self.nbd_socket()] {
            store::remove_file(&path)?;
        }
        Ok(())
    }

    /// Removes what a guard that has ended left behind.
    pub(crate) fn clear_guard(&self) -> Result<()> {
        for path in [self.path.join("guard.pid"), self.guard_socket()] {
            store::remove_file(&path)?;
        }
        Ok(())
    }

    /// Removes the whole directory, of a VM that is being deleted.
    pub(crate) fn remove(&self) {
        if self.is_ours() {
            // Nothing in it is of use to anybody; what cannot be removed is replaced later.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn read_pid(path: &Path) -> Option<ProcessId> {
    ProcessId::from_line(&fs::read_to_string(path).ok()?)
}

/// Makes sure that `dir` is a directory of ours that nobody else can enter.
fn private_dir(dir: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700);
    match builder.create(dir) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(EngineError::io("create", dir, e)),
    }
    let meta = fs::symlink_metadata(dir).map_err(|e| EngineError::io("look at", dir, e))?;
    let ours = meta.uid() == rustix::process::geteuid().as_raw();
    if meta.is_dir() && ours && meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(EngineError::State(format!(
        "{} is not a directory that only we can enter; remove it or correct its owner and mode (0700)",
        dir.display()
    )))
}

/// FNV-1a, 64 bits: the path must be the same for every version of the program.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The last lines of a log, for an error message.
pub(crate) fn log_tail(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let tail = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(2048)))?;
        let mut bytes = Vec::new();
        file.take(2048).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = tail().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    match lines.as_slice() {
        [] => format!("{} says nothing", path.display()),
        lines => lines[lines.len().saturating_sub(8)..].join("\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_stay_short_whatever_the_data_directory() {
        let vm = Uuid::new_v4();
        for len in [1, 40, 60, 70, 80, 200] {
            let data = PathBuf::from(format!("/{}", "d".repeat(len)));
            let run = RunDir::locate(&data, "a", vm);
            assert!(run.control_socket().as_os_str().len() <= MAX_SOCKET_PATH, "{run:?}");
            assert_eq!(run.path(), RunDir::locate(&data, "a", vm).path());
        }
    }

    #[test]
    fn the_hash_never_changes() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn a_run_directory_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().canonicalize().unwrap();
        fs::create_dir(data.join("run")).unwrap();
        let run = RunDir::locate(&data, "a", Uuid::new_v4());
        run.create().unwrap();
        assert!(run.is_ours());
        run.create().unwrap();
        fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(run.create().is_err());
    }
}
