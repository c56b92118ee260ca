//! A listening Unix socket with a life of its own on the file system: mode 0600 before anyone can
//! connect, a dead predecessor's file replaced, a live one's never, removed at the end.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{DiskError, Result};

/// Connections the kernel queues while the accept loop is busy.
const BACKLOG: i32 = 64;

/// A listening socket; its file goes when this is dropped.
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    stopped: AtomicBool,
    /// Device and inode of the socket file, so that a successor's file is never removed.
    identity: (u64, u64),
}

impl Listener {
    /// Listens on `path`. [`DiskError::Busy`] when another process answers there.
    pub(crate) fn bind(path: &Path) -> Result<Self> {
        remove_stale(path)?;
        let bind = || -> io::Result<UnixListener> {
            let fd = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )?;
            rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
            // Between bind and listen every connect is refused, so nobody gets in before the mode is set.
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            rustix::net::listen(&fd, BACKLOG)?;
            Ok(UnixListener::from(fd))
        };
        let listener = bind().map_err(|e| match e.raw_os_error() {
            Some(code) if code == rustix::io::Errno::NAMETOOLONG.raw_os_error() => {
                DiskError::State(format!(
                    "socket path {} is longer than the system's 107 bytes; use a shorter directory",
                    path.display()
                ))
            }
            _ => DiskError::io("listen on", path, e),
        })?;
        let meta = std::fs::symlink_metadata(path).map_err(|e| DiskError::io("stat", path, e))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            stopped: AtomicBool::new(false),
            identity: (meta.dev(), meta.ino()),
        })
    }

    /// Waits for a client; `None` once [`Listener::stop`] was called.
    pub(crate) fn next_client(&self) -> Option<UnixStream> {
        loop {
            let accepted = self.listener.accept();
            if self.stopped.load(Ordering::Acquire) {
                return None;
            }
            match accepted {
                Ok((stream, _)) => return Some(stream),
                Err(error) => {
                    // Out of descriptors or memory, or the client has gone again: it passes.
                    tracing::warn!(%error, socket = %self.path.display(), "no client accepted");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Refuses further clients and wakes a thread that waits in [`Listener::next_client`]; the file goes.
    pub(crate) fn stop(&self) {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return;
        }
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Removes a socket file nobody listens on; a kill -9 leaves such files.
fn remove_stale(path: &Path) -> Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(DiskError::io("stat", path, e)),
    };
    if !meta.file_type().is_socket() {
        return Err(DiskError::State(format!(
            "{} exists and is not a socket; it is left alone, choose another socket path",
            path.display()
        )));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|e| DiskError::io("remove", path, e))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // Connected, or its queue is full (EAGAIN), or not ours to reach: somebody lives there.
        Ok(_) => Err(DiskError::Busy { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            Err(DiskError::Busy { path: path.to_owned() })
        }
        Err(e) => Err(DiskError::io("probe", path, e)),
    }
}
