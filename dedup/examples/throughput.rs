//! How fast a repository in a folder takes a disk and gives it back: a file, or 1 GiB of mixed data.
//!
//! `cargo run --release -p tidemark-dedup --example throughput -- FOLDER [FILE]`

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use bytes::Bytes;
use tidemark_dedup::{
    CHUNK, Compression, Manifest, OpenOptions, Passphrase, PointDisk, Repository, StoreCredentials,
    open_store,
};
use uuid::Uuid;

const STEP: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("usage: throughput FOLDER [FILE]")?;
    let path = Path::new(&folder).join(format!("throughput-{}", std::process::id()));
    let mut source = Source::open(args.next().as_deref())?;
    let store =
        open_store(path.to_str().ok_or("the folder's name")?, &StoreCredentials::default())?;
    let passphrase = Passphrase::new("throughput");
    let repository = Repository::create(store, &passphrase, &OpenOptions::default())?;

    let begun = Instant::now();
    let mut writer = repository.begin(Compression::Default)?;
    let mut disk = writer.disk(source.size, None)?;
    let mut at = 0;
    while let Some(data) = source.next(at)? {
        let len = data.len() as u64;
        disk.write(at, data)?;
        at += len;
    }
    let root = disk.finish()?;
    let manifest = writer.commit(Manifest {
        point: Uuid::new_v4(),
        group: Uuid::new_v4(),
        created: "2026-01-01T00:00:00Z".into(),
        disks: vec![PointDisk { name: "disk0".into(), root: root.clone() }],
        files: Vec::new(),
        stats: Default::default(),
        facts: serde_json::Value::Null,
    })?;
    report("written", source.size, begun);
    let stats = manifest.stats;
    println!(
        "new {} MiB, stored {} MiB in {} objects",
        stats.new_bytes >> 20,
        stats.stored_bytes >> 20,
        stats.objects
    );
    let begun = Instant::now();
    let mut sum = 0u64;
    repository.open_disk(&root)?.for_each(
        0..source.size,
        &AtomicBool::new(false),
        &mut |_, d| {
            sum += d.len() as u64;
            Ok(())
        },
    )?;
    report("read back and verified", sum, begun);
    let status = std::fs::read_to_string("/proc/self/status")?;
    status.lines().filter(|line| line.starts_with("VmHWM")).for_each(|line| println!("{line}"));
    std::fs::remove_dir_all(path)?;
    Ok(())
}

fn report(what: &str, bytes: u64, begun: Instant) {
    let seconds = begun.elapsed().as_secs_f64();
    let mib = bytes as f64 / f64::from(1 << 20);
    println!("{what}: {mib:.0} MiB in {seconds:.2} s, {:.0} MiB/s", mib / seconds);
}

/// A file, or data of which a quarter each is zeros, noise, text-like and repeated.
struct Source {
    file: Option<File>,
    size: u64,
}

impl Source {
    fn open(file: Option<&str>) -> Result<Self, Box<dyn Error>> {
        let file = file.map(File::open).transpose()?;
        let size = match &file {
            Some(file) => file.metadata()?.len(),
            None => 1 << 30,
        };
        Ok(Self { file, size })
    }

    fn next(&mut self, at: u64) -> Result<Option<Bytes>, Box<dyn Error>> {
        let len = (self.size - at).min(STEP as u64) as usize;
        if len == 0 {
            return Ok(None);
        }
        let mut data = vec![0; len];
        match &mut self.file {
            Some(file) => file.read_exact(&mut data)?,
            None => fill(at / STEP as u64, &mut data),
        }
        Ok(Some(data.into()))
    }
}

fn fill(n: u64, data: &mut [u8]) {
    let mut state = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for word in data.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = match n % 4 {
            0 => 0,
            1 => state,
            // Few different words, in no order.
            2 => u64::from_le_bytes(*b"the tide") ^ (state & 0x0F0F),
            _ => CHUNK ^ (n << 16),
        };
        let len = word.len();
        word.copy_from_slice(&value.to_le_bytes()[..len]);
    }
}
