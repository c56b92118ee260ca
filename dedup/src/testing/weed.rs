//! SeaweedFS: a real S3 service for tests.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::store::{Store, StoreCredentials, open_store};

const ACCESS_KEY: &str = "tidemark-test";
const SECRET_KEY: &str = "tidemark-test-secret";

/// A running service in a folder of its own; stopped when dropped.
#[derive(Debug)]
pub struct Weed {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Weed {
    /// Starts the service and waits until it answers.
    ///
    /// # Panics
    /// When there is no `weed`, or it does not come up.
    pub fn start() -> Self {
        let program = find();
        // Another process may take a port between our look and its use: then try others.
        for _ in 0..5 {
            if let Some(weed) = Self::try_start(&program) {
                return weed;
            }
        }
        panic!("{} does not come up", program.display());
    }

    fn try_start(program: &Path) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("s3.json");
        let identities = serde_json::json!({ "identities": [{
            "name": "test",
            "credentials": [{ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY }],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        std::fs::write(&config, identities.to_string()).unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let [s3, filer, volume, master] = free_ports();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new(program)
            .current_dir(dir.path())
            .arg("server")
            .arg(format!("-dir={}", data.display()))
            .arg("-ip=127.0.0.1")
            .arg("-ip.bind=127.0.0.1")
            .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
            .args([format!("-filer.port={filer}"), format!("-s3.port={s3}")])
            .args(["-filer", "-s3", "-volume.max=100", "-master.volumeSizeLimitMB=128"])
            .arg(format!("-s3.config={}", config.display()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut weed = Self { child, port: s3, _dir: dir };
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            if weed.child.try_wait().unwrap().is_some() {
                return None;
            }
            if weed.try_bucket("ready") {
                return Some(weed);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        None
    }

    /// Host and port of the S3 service.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Keys that it accepts.
    pub fn credentials(&self) -> StoreCredentials {
        StoreCredentials {
            access_key_id: Some(ACCESS_KEY.into()),
            secret_access_key: Some(SECRET_KEY.into()),
            session_token: None,
        }
    }

    /// Store URL of a bucket and prefix, straight to the service.
    pub fn url(&self, place: &str) -> String {
        format!("s3://{place}?endpoint=http://{}", self.address())
    }

    /// Makes a bucket.
    ///
    /// # Panics
    /// When the service refuses.
    pub fn bucket(&self, name: &str) {
        let begun = Instant::now();
        while !self.try_bucket(name) {
            assert!(begun.elapsed() < Duration::from_secs(30), "bucket {name} cannot be made");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A store on a bucket made for it.
    ///
    /// # Panics
    /// When the service refuses.
    pub fn store(&self, bucket: &str) -> Arc<dyn Store> {
        self.bucket(bucket);
        open_store(&self.url(bucket), &self.credentials()).unwrap()
    }

    /// Makes a bucket by a signed request, and writes an object to see that the service is whole.
    fn try_bucket(&self, name: &str) -> bool {
        let url = format!("http://{}/{name}", self.address());
        let mut request = Command::new("curl");
        request
            .args(["-sf", "-m", "5", "-o", "/dev/null", "-X", "PUT"])
            .args(["--aws-sigv4", "aws:amz:us-east-1:s3"])
            .args(["--user", &format!("{ACCESS_KEY}:{SECRET_KEY}")])
            .args(["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        // Made before is as good: 409.
        let _ = Command::new("true").status();
        let made = request.arg(&url).status().is_ok_and(|s| s.success());
        let store = open_store(
            &format!("s3://{name}/probe?endpoint=http://{}&retry_seconds=1", self.address()),
            &self.credentials(),
        )
        .unwrap();
        let probe = crate::pool::block_on(store.create("probe", bytes::Bytes::from_static(b"1")));
        let gone = crate::pool::block_on(store.delete("probe"));
        made || (probe.is_ok() && gone.is_ok())
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `weed` from `TIDEMARK_WEED`, the path, or the workspace's cache of test tools.
fn find() -> PathBuf {
    if let Some(path) = std::env::var_os("TIDEMARK_WEED") {
        return path.into();
    }
    let in_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|dir| dir.join("weed")).find(|file| file.is_file())
    });
    let cached = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cached = cached.join(".cache/seaweed-venv/bin/weed");
    in_path.or_else(|| cached.is_file().then_some(cached)).expect(
        "SeaweedFS is missing: `make setup` installs it, or set TIDEMARK_WEED to its `weed` program",
    )
}

/// Ports that are free now, and whose gRPC ports (10,000 above) are free too.
fn free_ports() -> [u16; 4] {
    let mut held = Vec::new();
    let mut ports = Vec::new();
    while ports.len() < 4 {
        let [low, high] = crate::id::random::<2>().unwrap();
        let port = 20_000 + u16::from_le_bytes([low, high]) % 20_000;
        let pair = [port, port + 10_000].map(|port| TcpListener::bind(("127.0.0.1", port)));
        if pair.iter().all(Result::is_ok) {
            held.push(pair);
            ports.push(port);
        }
    }
    ports.try_into().unwrap()
}
