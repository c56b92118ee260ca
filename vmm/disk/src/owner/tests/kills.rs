//! kill -9 of the owner at seeded moments of writes, checkpoints and merges.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{MIB, MergeState, OwnerProcess, PATIENCE, Vm, content, reach};
use crate::GRANULE;
use crate::block::Block;
use crate::chain::{Chain, delete_disk_files};
use crate::error::Result;
use crate::nbd;
use crate::owner::{Client, Request, Response};
use crate::rct::RctId;
use crate::vhdx::Access;

/// The unit of the model: a page, which a killed process writes whole or not at all.
const PAGE: u64 = 4096;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// What each page holds: the last acknowledged value, flushed or not, and what a write that was never
/// answered may have left instead.
struct Model {
    pages: Vec<u64>,
    unanswered: Option<(std::ops::Range<u64>, u64)>,
    next: u64,
    /// Writes of the present owner's life: its death is timed by them, not by a clock.
    writes: Arc<AtomicU64>,
}

impl Model {
    fn new(size: u64) -> Self {
        let pages = vec![0; (size / PAGE) as usize];
        Self { pages, unanswered: None, next: 1, writes: Arc::default() }
    }

    fn write(&mut self, disk: &nbd::Client, random: &mut Random) -> Result<()> {
        let pages = 1 + random.below(12);
        let first = random.below(self.pages.len() as u64 - pages);
        let value = self.next;
        self.next += 1;
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.unanswered = Some((first..first + pages, value));
        disk.write_at(first * PAGE, &value.to_le_bytes().repeat((pages * PAGE / 8) as usize))?;
        self.unanswered = None;
        self.pages[first as usize..(first + pages) as usize].fill(value);
        Ok(())
    }

    /// Checks a disk after a kill and takes over what it holds.
    fn check(&mut self, content: &[u8]) {
        for (number, (page, held)) in
            self.pages.iter_mut().zip(content.chunks(PAGE as usize)).enumerate()
        {
            let value = u64::from_le_bytes(held[..8].try_into().unwrap());
            assert!(held.chunks(8).all(|c| c == value.to_le_bytes()), "page {number} is torn");
            let unanswered = self
                .unanswered
                .as_ref()
                .is_some_and(|(pages, new)| pages.contains(&(number as u64)) && *new == value);
            assert!(value == *page || unanswered, "page {number} holds {value}, not {page}");
            *page = value;
        }
        self.unanswered = None;
    }
}

/// How far the checkpoint or merge of a round has come: which leaf counts if the owner dies.
enum Stage {
    /// The new leaf may exist, unused.
    Preparing,
    /// The switch was asked for.
    Committing,
    /// The new leaf is the one that is written.
    Switched,
    /// It has been merged into the base.
    Merged,
}

/// One VM life: writes, checkpoint, writes, merge, until the owner dies.
fn live(
    vm: &Vm,
    model: &mut Model,
    random: &mut Random,
    stage: &mut Stage,
    seal: &mut Option<(RctId, Vec<u8>)>,
    leaf: &Path,
) -> Result<()> {
    let mut client = reach(&vm.control());
    let disk = nbd::Client::connect(&vm.file("nbd.sock"), "a")?;
    scribble(model, &disk, random)?;
    let leaves = vec![("a".to_owned(), leaf.to_owned())];
    client.call(&Request::PrepareCheckpoint { leaves: leaves.clone() }, PATIENCE)?;
    scribble(model, &disk, random)?;
    *stage = Stage::Committing;
    let committed = client.call(&Request::CommitCheckpoint { leaves }, PATIENCE)?;
    *stage = Stage::Switched;
    client.call(&Request::SettleCheckpoint, PATIENCE)?;
    let Response::Committed { disks, .. } = committed else { panic!("{committed:?}") };
    // The sealed file is read as an exporter does, while the owner goes on.
    *seal = Some((disks[0].rct_id.clone(), content(&vm.file("a.vhdx"))));
    scribble(model, &disk, random)?;
    let start = Request::StartMerge { disk: "a".to_owned(), child: leaf.to_owned() };
    client.call(&start, PATIENCE)?;
    while !merged(&mut client)? {
        model.write(&disk, random)?;
    }
    *stage = Stage::Merged;
    scribble(model, &disk, random)?;
    loop {
        scribble(model, &disk, random)?;
    }
}

fn merged(client: &mut Client) -> Result<bool> {
    match client.call(&Request::Report, PATIENCE)? {
        Response::Report(report) => match &report.disks[0].merge {
            MergeState::Failed { message, .. } => panic!("merge: {message}"),
            state => Ok(matches!(state, MergeState::Done { .. })),
        },
        other => panic!("{other:?}"),
    }
}

fn scribble(model: &mut Model, disk: &nbd::Client, random: &mut Random) -> Result<()> {
    for _ in 0..random.below(40) {
        model.write(disk, random)?;
    }
    if random.below(2) == 0 {
        disk.flush()?;
    }
    Ok(())
}

/// What whoever started the owner does after its death: decides on the leaf, finishes the merge.
fn recover(vm: &Vm, stage: &Stage, leaf: &Path) -> PathBuf {
    let base = vm.file("a.vhdx");
    match stage {
        Stage::Switched => leaf.to_owned(),
        // Not known whether it happened: if the new leaf holds anything it did.
        Stage::Committing if Chain::open(&base, Access::ReadWrite).is_err() => leaf.to_owned(),
        Stage::Preparing | Stage::Committing | Stage::Merged => {
            let _ = delete_disk_files(leaf);
            base
        }
    }
}

/// Gives the stage in which the owner died.
fn life_and_death(vm: &Vm, model: &mut Model, seed: u64) -> Stage {
    let mut random = Random(seed);
    let base = vm.file("a.vhdx");
    let new = vm.file(&format!("a_{seed}.avhdx"));
    let mut owner = OwnerProcess::start(&vm.config(&[("a", "a.vhdx")]));
    let mut stage = Stage::Preparing;
    let mut seal = None;
    model.writes.store(0, Ordering::Relaxed);
    // Not before the first write: whoever starts an owner waits for its first answer.
    let (writes, death) = (model.writes.clone(), 1 + random.below(120));
    let delay = Duration::from_micros(random.below(4000));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            eventually(|| writes.load(Ordering::Relaxed) >= death);
            std::thread::sleep(delay);
            owner.kill();
        });
        let _ = live(vm, model, &mut random, &mut stage, &mut seal, &new);
    });
    let leaf = recover(vm, &stage, &new);
    let chain = Chain::open(&leaf, Access::ReadWrite).unwrap();
    let mut held = vec![0; chain.geometry().size as usize];
    chain.read_at(0, &mut held).unwrap();
    model.check(&held);
    if let Some((id, sealed)) = seal {
        check_changes(&chain, &id, &sealed, &held);
    }
    if leaf != base {
        chain.merge(&leaf, &|_| {}, &false.into()).unwrap();
        chain.close().unwrap();
        drop(chain);
        delete_disk_files(&leaf).unwrap();
    } else {
        chain.close().unwrap();
    }
    assert!(content(&base) == held);
    let left: Vec<_> = std::fs::read_dir(vm.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        // A pair that was just being created may leave a temporary file, which nothing reads.
        .filter(|name| name.contains(".avhdx") && !name.ends_with(".new"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    stage
}

/// Every granule that differs from the sealed content is in the answer.
fn check_changes(chain: &Chain, id: &RctId, sealed: &[u8], now: &[u8]) {
    let ranges = chain.changed_since(id).unwrap();
    for (number, (old, new)) in
        sealed.chunks(GRANULE as usize).zip(now.chunks(GRANULE as usize)).enumerate()
    {
        let at = number as u64 * GRANULE;
        assert!(
            old == new || ranges.iter().any(|r| r.start <= at && at < r.end),
            "granule {number} has changed and is not told"
        );
    }
}

#[test]
fn i3_i5_kills_at_any_moment_lose_no_acknowledged_write_and_no_change() {
    let vm = Vm::sized(&["a"], 8 * MIB);
    let mut model = Model::new(8 * MIB);
    let kills = std::env::var("TIDEMARK_SOAK").map_or(12, |n| n.parse().unwrap());
    let mut in_use = 0;
    for seed in 1..=kills {
        let stage = life_and_death(&vm, &mut model, seed);
        in_use += u64::from(matches!(stage, Stage::Switched | Stage::Merged));
    }
    assert!(in_use * 4 > kills, "only {in_use} of {kills} kills came after the switch");
}

#[test]
fn i5_a_killed_owner_is_replaced_and_its_sockets_taken_over() {
    let vm = Vm::new(&["a"]);
    let config = vm.config(&[("a", "a.vhdx")]);
    let mut owner = OwnerProcess::start(&config);
    reach(&vm.control());
    let disk = vm.disk("a");
    // Not flushed: the guest believes in it all the same.
    disk.write_at(0, &[1; 65536]).unwrap();
    owner.kill();
    assert!(vm.control().exists() && vm.file("nbd.sock").exists());
    assert!(disk.read_at(0, &mut [0; 512]).is_err());
    let _owner = OwnerProcess::start(&config);
    super::report(&mut reach(&vm.control()));
    let mut read = [0; 65536];
    vm.disk("a").read_at(0, &mut read).unwrap();
    assert!(read == [1; 65536]);
}

#[test]
fn i5_qemu_waits_for_the_next_owner_and_goes_on() {
    let vm = Vm::new(&["a"]);
    let config = vm.config(&[("a", "a.vhdx")]);
    let mut owner = OwnerProcess::start(&config);
    reach(&vm.control());
    let node = format!(
        "driver=nbd,server.type=unix,server.path={},export=a,reconnect-delay=30",
        vm.file("nbd.sock").display()
    );
    // The second half comes while nobody serves the disk, or just after the next owner has begun.
    let orders = [
        "write -P 0x11 0 1M",
        "sleep 500",
        "write -P 0x22 1M 1M",
        "read -P 0x11 0 1M",
        "read -P 0x22 1M 1M",
    ];
    let qemu = Command::new("qemu-io")
        .args(["--image-opts", &node])
        .args(orders.iter().flat_map(|order| ["-c", order]))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let written = || {
        let mut client = reach(&vm.control());
        super::report(&mut client).disks[0].written_bytes
    };
    eventually(|| written() == 1 << 20);
    owner.kill();
    std::thread::sleep(Duration::from_millis(700));
    let _owner = OwnerProcess::start(&config);
    let output = qemu.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("read 1048576/1048576").count(), 2, "{said}");
    assert!(!said.contains("failed"), "{said}");
}

fn eventually(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_micros(100));
    }
}
