//! `make bench-disk`: a disk served over NBD, by Tidemark and by qemu-nbd, under the same fio jobs, in
//! turn, in one run on one machine. Prints medians and ratios; a figure alone says little.
//!
//! All of them serve one Unix socket, keep what they hold in the page cache (writeback), and are
//! measured from outside by fio's NBD engine. The order changes from round to round.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemark_disk::chain::Chain;
use tidemark_disk::nbd::Server;
use tidemark_disk::vhdx::{Access, CreateOptions, Vhdx, default_block_size};
use tidemark_disk::{Block, BlockRange, Extent, ExtentKind, Geometry};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const MIB: u64 = 1 << 20;
/// Size of the disks.
const DISK: u64 = 4096 * MIB;
/// The part that jobs on written blocks work on.
const FILLED: u64 = 1024 * MIB;

/// Who serves the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A dynamic VHDX with change tracking, as a VM has it.
    Tracked,
    /// A dynamic VHDX alone.
    Plain,
    /// A chain of five files with change tracking.
    Chain5,
    /// qemu-nbd on an image.
    Qemu(&'static str),
}

const KINDS: [Kind; 6] = [
    Kind::Tracked,
    Kind::Plain,
    Kind::Chain5,
    Kind::Qemu("raw"),
    Kind::Qemu("qcow2"),
    Kind::Qemu("vhdx"),
];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Tracked => "TIDEMARK",
            Self::Plain => "NO RCT",
            Self::Chain5 => "CHAIN OF 5",
            Self::Qemu("raw") => "RAW",
            Self::Qemu("qcow2") => "QCOW2",
            Self::Qemu(_) => "QEMU VHDX",
        }
    }
}

/// One fio job.
struct Job {
    name: &'static str,
    /// Needs blocks that hold data; otherwise a new disk.
    filled: bool,
    read: bool,
    args: &'static [&'static str],
}

const JOBS: [Job; 9] = [
    job("sequential read, MiB/s", true, true, &["--rw=read", "--bs=1M", "--iodepth=8"]),
    job("sequential write, MiB/s", true, false, &["--rw=write", "--bs=1M", "--iodepth=8"]),
    job("4 KiB random read, depth 1", true, true, &["--rw=randread", "--bs=4k", "--iodepth=1"]),
    job("4 KiB random read, depth 32", true, true, &["--rw=randread", "--bs=4k", "--iodepth=32"]),
    job("4 KiB random write, depth 1", true, false, &["--rw=randwrite", "--bs=4k", "--iodepth=1"]),
    job(
        "4 KiB random write, depth 32",
        true,
        false,
        &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    ),
    job(
        "4 KiB write, flush every 32",
        true,
        false,
        &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=32"],
    ),
    job(
        "first writes, 64 KiB random",
        false,
        false,
        &["--rw=randwrite", "--bs=64k", "--iodepth=8"],
    ),
    job(
        "first writes, flush every 32",
        false,
        false,
        &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=32"],
    ),
];

const fn job(name: &'static str, filled: bool, read: bool, args: &'static [&'static str]) -> Job {
    Job { name, filled, read, args }
}

/// A disk in service; dropping it ends the service.
enum Service {
    Ours(#[allow(dead_code, reason = "serves until dropped")] Server),
    Qemu(Child),
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Self::Qemu(child) = self {
            let _ = Command::new("kill").arg(child.id().to_string()).status();
            let _ = child.wait();
        }
    }
}

fn main() -> Result {
    let mut args = std::env::args().skip(1);
    let seconds: u32 = args.next().as_deref().unwrap_or("2").parse()?;
    let rounds: usize = args.next().as_deref().unwrap_or("3").parse()?;
    let only = args.next();
    let base =
        std::env::var_os("TIDEMARK_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = base.join(format!("tm-bench-disk-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let done = run(&dir, seconds, rounds, only.as_deref());
    std::fs::remove_dir_all(&dir)?;
    done
}

fn run(dir: &Path, seconds: u32, rounds: usize, only: Option<&str>) -> Result {
    print!("{:<30}", "MEDIAN OF fio THROUGH NBD");
    KINDS.iter().for_each(|k| print!(" {:>10}", k.name()));
    println!(" {:>8} {:>8} {:>8}", "/QCOW2", "/RAW", "RCT");
    for job in JOBS.iter().filter(|j| only.is_none_or(|o| j.name.contains(o))) {
        let mut figures = vec![Vec::new(); KINDS.len()];
        for round in 0..rounds {
            for turn in 0..KINDS.len() {
                let which = (turn + round) % KINDS.len();
                figures[which].push(measure(dir, KINDS[which], job, seconds)?);
            }
        }
        let medians: Vec<f64> = figures.into_iter().map(median).collect();
        print!("{:<30}", job.name);
        medians.iter().for_each(|m| print!(" {m:>10.0}"));
        println!(
            " {:>8.2} {:>8.2} {:>8.2}",
            medians[0] / medians[4],
            medians[0] / medians[3],
            medians[0] / medians[1]
        );
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Runs a job on a new disk: MiB/s for the sequential ones, otherwise requests per second.
fn measure(dir: &Path, kind: Kind, job: &Job, seconds: u32) -> Result<f64> {
    let place = dir.join("disk");
    std::fs::create_dir(&place)?;
    let socket = place.join("s");
    let service = serve(&place, &socket, kind, job.filled)?;
    let size = if job.filled { FILLED } else { DISK };
    let output = Command::new("fio")
        .args(["--name=job", "--ioengine=nbd", "--output-format=json", "--randrepeat=1"])
        .args(["--time_based", "--norandommap", "--random_generator=tausworthe64"])
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--size={size}"))
        .args(job.args)
        .stderr(Stdio::inherit())
        .output()?;
    drop(service);
    std::fs::remove_dir_all(&place)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |at| &text[at..]);
    let report: serde_json::Value =
        serde_json::from_str(json).map_err(|e| format!("fio: {e}: {text}"))?;
    let part = &report["jobs"][0][if job.read { "read" } else { "write" }];
    let sequential = job.name.contains("MiB/s");
    let figure = if sequential { &part["bw_bytes"] } else { &part["iops"] };
    let figure = figure.as_f64().ok_or("fio gave no figure")?;
    Ok(if sequential { figure / MIB as f64 } else { figure })
}

fn serve(place: &Path, socket: &Path, kind: Kind, filled: bool) -> Result<Service> {
    let file = place.join("disk.vhdx");
    let service = match kind {
        Kind::Qemu(format) => return serve_qemu(place, socket, format, filled),
        Kind::Tracked => {
            Chain::create(&file, &options())?;
            let chain = Arc::new(Chain::open(&file, Access::ReadWrite)?);
            fill(&*chain, filled, 0, 1)?;
            chain as Arc<dyn Block>
        }
        Kind::Chain5 => {
            Chain::create(&file, &options())?;
            let chain = Arc::new(Chain::open(&file, Access::ReadWrite)?);
            // Each file holds every fifth part of what the one below it holds.
            fill(&*chain, filled, 0, 1)?;
            for number in 1..5 {
                let leaf = place.join(format!("disk_{number}.avhdx"));
                chain.prepare_leaf(&leaf)?;
                chain.switch_leaf(&chain.pause(), &leaf)?;
                chain.settle()?;
                fill(&*chain, filled, number, 5)?;
            }
            chain as Arc<dyn Block>
        }
        Kind::Plain => {
            Vhdx::create(&file, &options())?;
            let disk = Arc::new(Alone(Vhdx::open(&file, Access::ReadWrite)?));
            fill(&*disk, filled, 0, 1)?;
            disk as Arc<dyn Block>
        }
    };
    let server = Server::bind(socket)?;
    server.add_export("", service);
    Ok(Service::Ours(server))
}

fn options() -> CreateOptions {
    CreateOptions {
        size: DISK,
        block_size: default_block_size(DISK),
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    }
}

/// Writes every `step`th MiB from `first` on.
fn fill(disk: &dyn Block, filled: bool, first: u64, step: usize) -> Result {
    let data = vec![0x5a; MIB as usize];
    for at in (first * MIB..FILLED).step_by(step * MIB as usize).take_while(|_| filled) {
        disk.write_at(at, &data)?;
    }
    disk.flush()?;
    Ok(())
}

fn serve_qemu(place: &Path, socket: &Path, format: &str, filled: bool) -> Result<Service> {
    let image = place.join("image");
    let ok = Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(&image)
        .arg(DISK.to_string())
        .status()?
        .success();
    if !ok {
        return Err("qemu-img create failed".into());
    }
    let mut child = Command::new("qemu-nbd")
        .args(["--persistent", "--shared=16", "--cache=writeback", "--format", format, "--socket"])
        .arg(socket)
        .arg(&image)
        .stdout(Stdio::null())
        // It complains of every client that leaves.
        .stderr(Stdio::null())
        .spawn()?;
    let end = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        if Instant::now() > end || child.try_wait()?.is_some() {
            let _ = child.kill();
            return Err("qemu-nbd does not answer".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let service = Service::Qemu(child);
    if filled {
        let disk = tidemark_disk::nbd::Client::connect(socket, "")?;
        fill(&disk, true, 0, 1)?;
    }
    Ok(service)
}

/// A single file as a disk, without tracking.
struct Alone(Vhdx);

impl Block for Alone {
    fn geometry(&self) -> Geometry {
        self.0.properties().geometry
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> tidemark_disk::Result<()> {
        self.0.read_at(offset, buf).map(drop)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> tidemark_disk::Result<()> {
        self.0.write_at(offset, buf)
    }

    fn flush(&self) -> tidemark_disk::Result<()> {
        self.0.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> tidemark_disk::Result<()> {
        self.0.write_zeroes(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> tidemark_disk::Result<()> {
        self.0.write_zeroes(offset, len)
    }

    fn extents(&self, offset: u64, len: u64) -> tidemark_disk::Result<Vec<Extent>> {
        let BlockRange { start, end } = offset..offset + len;
        Ok(vec![Extent { offset: start, len: end - start, kind: ExtentKind::Data }])
    }
}
