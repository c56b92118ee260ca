//! `make bench`: the main steps on the Debian guest's disk, each beside the plainest tool that moves
//! the same bytes, in one run on one machine. Prints ratios; a figure alone says little.
//!
//! The plain tool is `zstd -1` on all cores, reading the same image and writing a file: no
//! deduplication, no encryption, no index, no checks beyond its own.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Scattered 4 KiB overwrites between the two backups.
const OVERWRITES: u64 = 1440;

/// What one command took.
struct Cost {
    seconds: f64,
    peak_mib: f64,
}

struct Bench {
    tidemark: PathBuf,
    dir: PathBuf,
}

fn main() -> Result {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [tidemark, image] = args.as_slice() else {
        return Err("usage: tidemark-bench TIDEMARK IMAGE".into());
    };
    let dir = std::env::temp_dir().join(format!("tm-bench-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("target"))?;
    let bench = Bench { tidemark: std::path::absolute(tidemark)?, dir: dir.clone() };
    let done = bench.run(Path::new(image));
    std::fs::remove_dir_all(dir)?;
    done
}

impl Bench {
    fn run(&self, image: &Path) -> Result {
        let image = std::path::absolute(image)?;
        let packed = self.dir.join("image.zst");
        let raw = self.dir.join("image.raw");
        let target = self.dir.join("target");
        std::fs::copy(&image, self.dir.join("warm"))?; // the page cache is warm for both
        self.tidemark(&["target", "add", "t", text(&target)])?;
        self.tidemark(&["vm", "create", "v", "--import", text(&image)])?;

        let full = self.tidemark(&["backup", "run", "v"])?;
        let stored = folder_bytes(&target)?;
        let plain = measure(Command::new("zstd").args([
            "-q",
            "-1",
            "-T0",
            "-f",
            text(&image),
            "-o",
            text(&packed),
        ]))?;
        let plain_stored = std::fs::metadata(&packed)?.len();
        self.overwrite(std::fs::metadata(&image)?.len())?;
        let incremental = self.tidemark(&["backup", "run", "v"])?;
        let idle = self.tidemark(&["backup", "run", "v"])?;
        let restore = self.tidemark(&[
            "restore",
            "disk",
            "latest:v",
            "disk0",
            "--format",
            "raw",
            "--out",
            text(&raw),
        ])?;
        let unpack = measure(Command::new("zstd").args([
            "-q",
            "-d",
            "--sparse",
            "-f",
            text(&packed),
            "-o",
            text(&self.dir.join("warm")),
        ]))?;

        println!(
            "{:<28} {:>9} {:>9} {:>7} {:>9}",
            "STEP", "TIDEMARK", "ZSTD -1", "RATIO", "PEAK MiB"
        );
        row("full backup, s", full.seconds, plain.seconds, full.peak_mib);
        row("stored, MiB", mib(stored), mib(plain_stored), f64::NAN);
        row(
            "incremental (1,440 × 4 K), s",
            incremental.seconds,
            plain.seconds,
            incremental.peak_mib,
        );
        row("incremental, idle disk, s", idle.seconds, plain.seconds, idle.peak_mib);
        row(
            "stored by both, MiB",
            mib(folder_bytes(&target)? - stored),
            mib(plain_stored),
            f64::NAN,
        );
        row("restore to raw, s", restore.seconds, unpack.seconds, restore.peak_mib);
        Ok(())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.tidemark);
        command
            .args(args)
            .arg("--quiet")
            .env("TIDEMARK_DATA_DIR", self.dir.join("data"))
            .env("TIDEMARK_PASSPHRASE", "bench");
        command
    }

    fn tidemark(&self, args: &[&str]) -> Result<Cost> {
        measure(&mut self.command(args))
    }

    /// Overwrites scattered pages of the offline VM's disk, through NBD, tracked.
    fn overwrite(&self, size: u64) -> Result {
        let socket = self.dir.join("d.sock");
        let mut server = self
            .command(&["disk", "serve", "v", "disk0", "--socket", text(&socket)])
            .stdout(Stdio::null())
            .spawn()?;
        let end = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            if Instant::now() > end {
                return Err("disk serve does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let step = size / OVERWRITES / 4096 * 4096;
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw"]);
        for i in 0..OVERWRITES {
            io.args(["-c", &format!("write -q -P {} {} 4k", 1 + i % 255, i * step)]);
        }
        io.args(["-c", "flush"]).arg(format!("nbd+unix:///disk0?socket={}", socket.display()));
        measure(&mut io)?;
        measure(Command::new("kill").args(["-INT", &server.id().to_string()]))?;
        server.wait()?;
        Ok(())
    }
}

fn row(name: &str, ours: f64, theirs: f64, peak: f64) {
    let peak = if peak.is_nan() { String::new() } else { format!("{peak:.0}") };
    println!("{name:<28} {ours:>9.2} {theirs:>9.2} {:>7.2} {peak:>9}", ours / theirs);
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// Runs a command to its end; it must succeed. Its largest resident size is read while it runs.
fn measure(command: &mut Command) -> Result<Cost> {
    let start = Instant::now();
    let mut child =
        command.stdout(Stdio::null()).spawn().map_err(|e| format!("{command:?}: {e}"))?;
    let mut peak: f64 = 0.0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let text =
            std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let mark = text.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(mark.and_then(|m| m.trim().parse().ok()).unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(2));
    };
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    Ok(Cost { seconds: start.elapsed().as_secs_f64(), peak_mib: peak / 1024.0 })
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        sum += if kind.is_dir() { folder_bytes(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(sum)
}
