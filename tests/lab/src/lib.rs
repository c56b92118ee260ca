//! Surroundings that the demo and the tests run in: a real S3 service (SeaweedFS) in a folder of its
//! own, on free loopback ports, gone when dropped; and the Debian guest's files.

use std::fs::File;
use std::io::{Error, Result};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Access key of the service; it listens on loopback only and lives for minutes.
pub const ACCESS_KEY: &str = "tidemark-lab";
/// Secret key of the service.
pub const SECRET_KEY: &str = "tidemark-lab-secret";
/// The bucket that is made at start.
pub const BUCKET: &str = "tidemark";

/// How long the service may take to answer.
const START: Duration = Duration::from_secs(60);

/// The SeaweedFS program: `TIDEMARK_WEED`, else where `make setup` puts it below `checkout`.
pub fn weed(checkout: &Path) -> PathBuf {
    std::env::var_os("TIDEMARK_WEED")
        .map_or_else(|| checkout.join(".cache/seaweed-venv/bin/weed"), PathBuf::from)
}

/// The files of the Debian guest: `TIDEMARK_GUEST_DIR`, else where `make guest` puts them below
/// `checkout`.
pub fn guest(checkout: &Path) -> Result<PathBuf> {
    let dir = std::env::var_os("TIDEMARK_GUEST_DIR")
        .map_or_else(|| checkout.join(".cache/guest"), PathBuf::from);
    // The stamp is written last.
    if dir.join("stamp").exists() {
        return Ok(dir);
    }
    let what = "run `make guest`, or set TIDEMARK_GUEST_DIR";
    Err(Error::other(format!("no guest image in {}: {what}", dir.display())))
}

/// A running S3 service.
pub struct S3Service {
    child: Child,
    port: u16,
}

impl S3Service {
    /// Starts `weed` with its data and log in `dir` and waits until S3 answers.
    pub fn start(weed: &Path, dir: &Path) -> Result<Self> {
        let weed = std::path::absolute(weed)?;
        if !weed.exists() {
            return Err(Error::other(format!("{} is missing; run `make setup`", weed.display())));
        }
        // Another process may take a port between the look and the start: then try others.
        let mut last = None;
        for _ in 0..3 {
            let mut service = Self::spawn(&weed, dir)?;
            match service.wait_ready(&dir.join("s3.log")) {
                Ok(()) => return Ok(service),
                Err(e) => last = Some(e),
            }
        }
        let why = last.map(|e| e.to_string()).unwrap_or_default();
        Err(Error::other(format!("{why}; see {}", dir.join("s3.log").display())))
    }

    fn spawn(weed: &Path, dir: &Path) -> Result<Self> {
        let data = dir.join("s3");
        std::fs::create_dir_all(&data)?;
        let log = File::create(dir.join("s3.log"))?;
        let names = [
            "s3.port",
            "s3.port.grpc",
            "s3.port.iceberg",
            "s3.port.lance",
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
            "filer.port",
            "filer.port.grpc",
            "admin.port",
            "admin.port.grpc",
        ];
        let ports = free_ports(names.len())?;
        let child = Command::new(weed)
            .arg("mini")
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"])
            .arg(format!("-dir={}", data.display()))
            .arg(format!("-bucket={BUCKET}"))
            .arg("-s3.autoCreateBucket=false")
            .args(names.iter().zip(&ports).map(|(name, port)| format!("-{name}={port}")))
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .spawn()?;
        Ok(Self { child, port: ports[0] })
    }

    /// Waits until all parts are up and the bucket is made, which the service says in its log.
    fn wait_ready(&mut self, log: &Path) -> Result<()> {
        let end = Instant::now() + START;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                return Err(Error::other(format!("the S3 service ended at once ({status})")));
            }
            if std::fs::read_to_string(log)?.contains("ready to use") {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(Error::other(format!("the S3 service did not answer within {START:?}")))
    }

    /// Port of its S3 interface on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// URL of a target below `prefix` in its bucket.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{}&region=us-east-1", self.port)
    }
}

impl Drop for S3Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports that nobody listens on, all different.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let listeners =
        (0..count).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<Vec<_>>>()?;
    listeners.iter().map(|l| Ok(l.local_addr()?.port())).collect()
}
