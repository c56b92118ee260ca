//! What a user sees when an S3 target misbehaves: a clear error, no visible restore point, and success
//! on the next run. Faults inside a transfer (503, cut connections) are injected by a proxy.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failure is the test's answer

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};

use common::{Host, Random, s3};

/// A TCP proxy before the S3 service.
struct Proxy {
    port: u16,
    faults: Arc<Faults>,
}

/// What the proxy does to the requests that come through it.
#[derive(Default)]
struct Faults {
    /// Answer so many requests with 503.
    unavailable: AtomicUsize,
    /// Cut the connection after so many bytes of upload; negative: never.
    cut_after: AtomicI64,
    /// How often to cut.
    cuts: AtomicUsize,
}

impl Proxy {
    fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let faults = Arc::new(Faults { cut_after: AtomicI64::new(-1), ..Faults::default() });
        let shared = Arc::clone(&faults);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let faults = Arc::clone(&shared);
                std::thread::spawn(move || serve(client, upstream, &faults));
            }
        });
        Self { port, faults }
    }
}

fn take(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

fn serve(mut client: TcpStream, upstream: u16, faults: &Faults) -> Option<()> {
    if take(&faults.unavailable) {
        let mut request = [0; 4096];
        let _ = client.read(&mut request).ok()?;
        let answer = "HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        client.write_all(answer.as_bytes()).ok()?;
        return client.shutdown(std::net::Shutdown::Both).ok();
    }
    let server = TcpStream::connect(("127.0.0.1", upstream)).ok()?;
    let (mut down, mut to) = (server.try_clone().ok()?, client.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut down, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    let mut up = server;
    let mut buf = vec![0; 64 << 10];
    let mut sent = 0;
    loop {
        let n = client.read(&mut buf).ok().filter(|n| *n > 0)?;
        up.write_all(&buf[..n]).ok()?;
        sent += n as i64;
        let limit = faults.cut_after.load(Ordering::SeqCst);
        if limit >= 0 && sent > limit && take(&faults.cuts) {
            let _ = up.shutdown(std::net::Shutdown::Both);
            return client.shutdown(std::net::Shutdown::Both).ok();
        }
    }
}

/// A VM with 24 MiB of incompressible data.
fn vm(host: &Host) {
    let raw: PathBuf = host.path().join("in.raw");
    let mut content = Random(11).bytes(24 << 20);
    content.resize(64 << 20, 0);
    std::fs::write(&raw, content).unwrap();
    host.json(["vm", "create", "v", "--import", raw.to_str().unwrap()]);
}

fn add(host: &Host, name: &str, url: &str) -> std::process::Output {
    s3::with_keys(&mut host.command(["target", "add", name, url, "--json"])).output().unwrap()
}

fn backup(host: &Host) -> std::process::Output {
    s3::with_keys(&mut host.command(["backup", "run", "v", "--json"])).output().unwrap()
}

fn points(host: &Host) -> usize {
    let output = s3::with_keys(&mut host.command(["backup", "list", "--json"])).output().unwrap();
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    list["points"].as_array().unwrap().len()
}

fn said(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn wrong_key_missing_bucket_and_no_route_are_told_apart() {
    let host = Host::new();
    let service = s3::start(&host);
    let url = service.url("a");
    let wrong = host
        .command(["target", "add", "s3", &url])
        .env("AWS_ACCESS_KEY_ID", tidemark_lab::ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", "wrong")
        .output()
        .unwrap();
    assert!(!wrong.status.success() && said(&wrong).contains("secret key"), "{}", said(&wrong));

    let missing = add(&host, "s3", &url.replace("s3://tidemark/", "s3://elsewhere/"));
    assert!(!missing.status.success() && said(&missing).contains("bucket"), "{}", said(&missing));

    let nowhere = add(&host, "s3", "s3://tidemark/a?endpoint=http://127.0.0.1:9&retry_seconds=2");
    assert!(
        !nowhere.status.success() && said(&nowhere).contains("127.0.0.1:9"),
        "{}",
        said(&nowhere)
    );
    assert!(host.json(["target", "list"]).as_array().unwrap().is_empty());

    let none = host.command(["target", "add", "s3", &url]).output().unwrap();
    assert!(!none.status.success() && said(&none).contains("AWS_ACCESS_KEY_ID"), "{}", said(&none));
    assert!(add(&host, "s3", &url).status.success());
}

#[test]
fn i4_faults_during_upload_are_retried_or_leave_no_point() {
    let host = Host::new();
    let service = s3::start(&host);
    let proxy = Proxy::start(service.port());
    vm(&host);
    let url = format!(
        "s3://{}/faults?endpoint=http://127.0.0.1:{}&region=us-east-1&retry_seconds=10",
        tidemark_lab::BUCKET,
        proxy.port
    );
    let added = add(&host, "s3", &url);
    assert!(added.status.success(), "{}", said(&added));

    // Busy for a while: the run waits and succeeds.
    proxy.faults.unavailable.store(3, Ordering::SeqCst);
    let run = backup(&host);
    assert!(run.status.success(), "{}", said(&run));
    assert_eq!(points(&host), 1);

    // Cut in mid-upload once: retried.
    change(&host, 21);
    proxy.faults.cut_after.store(1 << 20, Ordering::SeqCst);
    proxy.faults.cuts.store(1, Ordering::SeqCst);
    let run = backup(&host);
    assert!(run.status.success(), "{}", said(&run));
    assert_eq!(proxy.faults.cuts.load(Ordering::SeqCst), 0, "nothing was cut");

    // Cut always: a clear error and no restore point; the next run succeeds.
    change(&host, 22);
    proxy.faults.cuts.store(usize::MAX, Ordering::SeqCst);
    let run = backup(&host);
    assert!(!run.status.success() && said(&run).contains("not reachable"), "{}", said(&run));
    proxy.faults.cuts.store(0, Ordering::SeqCst);
    assert_eq!(points(&host), 2);
    let run = backup(&host);
    assert!(run.status.success(), "{}", said(&run));
    assert_eq!(points(&host), 3);
    let verify = s3::with_keys(&mut host.command(["backup", "verify", "--all"])).output().unwrap();
    assert!(verify.status.success(), "{}", said(&verify));
}

/// New incompressible data in the VM's disk.
fn change(host: &Host, seed: u64) {
    let raw = host.path().join("change.raw");
    std::fs::write(&raw, Random(seed).bytes(8 << 20)).unwrap();
    let socket = host.path().join("d.sock");
    let mut server = host
        .command(["disk", "serve", "v", "disk0", "--socket", socket.to_str().unwrap()])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(server.try_wait().unwrap().is_none(), "disk serve ended");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let uri = format!("nbd+unix:///disk0?socket={}", socket.display());
    common::tool(
        "qemu-io",
        ["-f", "raw", "-c", &format!("write -s {} 32M 8M", raw.display()), "-c", "flush", &uri],
    );
    common::tool("kill", ["-INT", &server.id().to_string()]);
    assert!(server.wait().unwrap().success());
}
