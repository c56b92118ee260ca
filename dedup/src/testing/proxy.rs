//! A proxy in front of an HTTP service that misbehaves on purpose.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What a proxy does to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misbehaviour {
    /// Nothing: bytes go through.
    None,
    /// The next so many requests are answered 503.
    Unavailable(usize),
    /// The next so many requests are answered 507.
    Full(usize),
    /// The next so many connections that send more than `bytes` are cut there.
    CutUpload {
        /// How many.
        times: usize,
        /// After this many bytes from the client.
        bytes: usize,
    },
    /// The next so many requests reach the service, and their answers are thrown away.
    LoseAnswer(usize),
    /// Connections are accepted and never answered.
    BlackHole,
}

/// A proxy on a free port; stopped when dropped. It closes every connection after one exchange, so
/// that each request meets the misbehaviour anew.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    target: String,
    misbehaviour: Mutex<Misbehaviour>,
    hits: AtomicUsize,
    connections: AtomicUsize,
}

impl Shared {
    /// Takes one misbehaviour, if any is left.
    fn take(&self) -> Misbehaviour {
        use Misbehaviour::{BlackHole, CutUpload, Full, LoseAnswer, None, Unavailable};
        let mut left = self.misbehaviour.lock();
        let now = *left;
        *left = match now {
            Unavailable(n) if n > 1 => Unavailable(n - 1),
            Full(n) if n > 1 => Full(n - 1),
            LoseAnswer(n) if n > 1 => LoseAnswer(n - 1),
            // Counted when a connection is really cut.
            CutUpload { .. } | BlackHole => now,
            _ => None,
        };
        if !matches!(now, None | CutUpload { .. }) {
            self.hits.fetch_add(1, Ordering::SeqCst);
        }
        now
    }

    fn cut_one(&self) -> bool {
        let mut left = self.misbehaviour.lock();
        let Misbehaviour::CutUpload { times, bytes } = *left else { return false };
        *left = match times {
            0 | 1 => Misbehaviour::None,
            _ => Misbehaviour::CutUpload { times: times - 1, bytes },
        };
        self.hits.fetch_add(1, Ordering::SeqCst);
        true
    }
}

impl FaultProxy {
    /// A proxy to `target` (host and port) that begins well-behaved.
    ///
    /// # Panics
    /// When there is no free port.
    pub fn start(target: &str) -> Self {
        let listener =
            crate::pool::block_on(TcpListener::bind(("127.0.0.1", 0))).expect("a free port");
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            misbehaviour: Mutex::new(Misbehaviour::None),
            hits: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        });
        let task = crate::pool::runtime().spawn(serve(listener, shared.clone()));
        Self { address, shared, task }
    }

    /// Host and port.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// What to do from now on.
    pub fn misbehave(&self, how: Misbehaviour) {
        *self.shared.misbehaviour.lock() = how;
        self.shared.hits.store(0, Ordering::SeqCst);
    }

    /// How often it misbehaved since it was told to.
    pub fn hits(&self) -> usize {
        self.shared.hits.load(Ordering::SeqCst)
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let shared = shared.clone();
        tokio::spawn(async move {
            // A broken connection is what this is for.
            let _ = exchange(client, &shared).await;
        });
    }
}

async fn exchange(mut client: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let head = read_head(&mut client).await?;
    match shared.take() {
        Misbehaviour::BlackHole => {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            Ok(())
        }
        Misbehaviour::Unavailable(_) => {
            answer(client, &head, "503 Service Unavailable", "SlowDown").await
        }
        Misbehaviour::Full(_) => {
            answer(client, &head, "507 Insufficient Storage", "InsufficientStorage").await
        }
        Misbehaviour::LoseAnswer(_) => forward(client, shared, head, None, false).await,
        Misbehaviour::CutUpload { bytes, .. } => {
            forward(client, shared, head, Some(bytes), true).await
        }
        Misbehaviour::None => forward(client, shared, head, None, true).await,
    }
}

/// Reads to the end of the request's head, and makes the exchange the connection's only one.
async fn read_head(client: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let end = loop {
        if let Some(at) = head.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        if client.read_buf(&mut head).await? == 0 || head.len() > 1 << 20 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    };
    let rest = head.split_off(end);
    head.extend_from_slice(b"\r\nconnection: close");
    head.extend_from_slice(&rest);
    Ok(head)
}

/// Bytes of the body that are still to come.
fn body_left(head: &[u8]) -> usize {
    let end = head.windows(4).position(|w| w == b"\r\n\r\n").map_or(head.len(), |at| at + 4);
    let text = String::from_utf8_lossy(&head[..end]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
    length.saturating_sub(head.len() - end)
}

async fn answer(
    mut client: TcpStream,
    head: &[u8],
    status: &str,
    code: &str,
) -> std::io::Result<()> {
    // The whole request is read first: an answer before its end may be lost with the connection.
    let mut left = body_left(head);
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        match client.read(&mut buffer).await? {
            0 => return Ok(()),
            n => left = left.saturating_sub(n),
        }
    }
    let body = format!("<Error><Code>{code}</Code></Error>");
    let len = body.len();
    let text =
        format!("HTTP/1.1 {status}\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n{body}");
    client.write_all(text.as_bytes()).await?;
    client.shutdown().await
}

async fn forward(
    client: TcpStream,
    shared: &Shared,
    head: Vec<u8>,
    cut_after: Option<usize>,
    give_answer: bool,
) -> std::io::Result<()> {
    let server = TcpStream::connect(&shared.target).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut sent = head.len();
    let mut left = body_left(&head);
    to_server.write_all(&head).await?;
    let mut buffer = vec![0; 64 * 1024];
    while left > 0 {
        if cut_after.is_some_and(|bytes| sent > bytes) && shared.cut_one() {
            return Ok(());
        }
        let n = from_client.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        to_server.write_all(&buffer[..n]).await?;
        sent += n;
        left = left.saturating_sub(n);
    }
    if give_answer {
        tokio::io::copy(&mut from_server, &mut to_client).await?;
    } else {
        let mut lost = Vec::new();
        from_server.read_to_end(&mut lost).await?;
    }
    to_client.shutdown().await
}
