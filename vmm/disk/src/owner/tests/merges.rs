//! Merges under the writes of NBD clients.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{MIB, Owner, PATIENCE, StopOnDrop, Vm, checkpoint, content, merge_end, must, report};
use crate::block::Block;
use crate::chain::delete_disk_files;
use crate::nbd;
use crate::owner::{MergeState, Request};

fn start(disk: &str, child: &std::path::Path) -> Request {
    Request::StartMerge { disk: disk.to_owned(), child: child.to_owned() }
}

/// Writes random ranges until told to stop, and gives what the disk must hold then.
fn scribble(disk: &nbd::Client, mut model: Vec<u8>, seed: u64, stop: &AtomicBool) -> Vec<u8> {
    let mut state = seed | 1;
    let mut random = move |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let len = 512 * (1 + random(96));
        let at = 512 * random((model.len() as u64 - len) / 512);
        let range = at as usize..(at + len) as usize;
        if random(8) == 0 {
            disk.write_zeroes(at, len, true).unwrap();
            model[range].fill(0);
        } else {
            disk.write_at(at, &vec![round as u8; len as usize]).unwrap();
            model[range].fill(round as u8);
        }
        if random(64) == 0 {
            disk.flush().unwrap();
        }
    }
    model
}

fn read_all(disk: &nbd::Client) -> Vec<u8> {
    let mut read = vec![0; disk.geometry().size as usize];
    disk.read_at(0, &mut read).unwrap();
    read
}

#[test]
fn i6_merges_of_leaf_and_middle_under_writes_lose_nothing() {
    let vm = Vm::new(&["a"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx")]));
    let mut client = owner.client();
    let disk = vm.disk("a");
    let mut model: Vec<u8> = (0..32 * MIB).map(|i| (i / 65536) as u8).collect();
    disk.write_at(0, &model).unwrap();
    for round in 0..4 {
        let stop = AtomicBool::new(false);
        model = thread::scope(|scope| {
            let _end = StopOnDrop(&stop);
            let writer = scope.spawn(|| scribble(&disk, model, round + 1, &stop));
            let (older, newer) = (format!("{round}x"), format!("{round}y"));
            checkpoint(&mut client, &vm.leaves(&["a"], &older)).unwrap();
            thread::sleep(std::time::Duration::from_millis(40));
            checkpoint(&mut client, &vm.leaves(&["a"], &newer)).unwrap();
            thread::sleep(std::time::Duration::from_millis(40));
            let files =
                [vm.file(&format!("a_{older}.avhdx")), vm.file(&format!("a_{newer}.avhdx"))];
            // The middle one first, then the leaf; or the leaf twice.
            let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
            for file in order.map(|i| &files[i]) {
                must(&mut client, &start("a", file));
                assert_eq!(merge_end(&mut client, "a"), MergeState::Done { child: file.clone() });
                assert!(!report(&mut client).disks[0].files.contains(file));
                // Repeating it is harmless, and the file may go.
                must(&mut client, &start("a", file));
                delete_disk_files(file).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap()
        });
        assert!(read_all(&disk) == model, "round {round}");
    }
    assert_eq!(report(&mut client).disks[0].files, [vm.file("a.vhdx")]);
    drop(disk);
    owner.shut_down();
    assert!(content(&vm.file("a.vhdx")) == model);
    let base = vm.file("a.vhdx");
    let check = Command::new("qemu-img").args(["check", "-f", "vhdx"]).arg(base).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
}

#[test]
fn a_cancelled_merge_leaves_the_disk_whole_and_goes_on_when_asked() {
    let vm = Vm::new(&["a"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx")]));
    let mut client = owner.client();
    let disk = vm.disk("a");
    checkpoint(&mut client, &vm.leaves(&["a"], "one")).unwrap();
    let model: Vec<u8> = (0..32 * MIB).map(|i| (i / 4096) as u8 | 1).collect();
    disk.write_at(0, &model).unwrap();
    let child = vm.file("a_one.avhdx");
    let mut stopped = 0;
    for _ in 0..5 {
        must(&mut client, &start("a", &child));
        must(&mut client, &Request::CancelMerge { disk: "a".to_owned() });
        let state = report(&mut client).disks.remove(0).merge;
        assert!(read_all(&disk) == model);
        match state {
            MergeState::Failed { .. } => stopped += 1,
            MergeState::Done { .. } => break,
            other => panic!("still {other:?} after it was cancelled"),
        }
    }
    assert!(stopped > 0, "every merge was over before it could be cancelled");
    must(&mut client, &start("a", &child));
    assert_eq!(merge_end(&mut client, "a"), MergeState::Done { child });
    assert!(read_all(&disk) == model);
    // Nothing runs: cancelling is no error.
    must(&mut client, &Request::CancelMerge { disk: "a".to_owned() });
    drop(disk);
    owner.shut_down();
    assert!(content(&vm.file("a.vhdx")) == model);
}

#[test]
fn merges_that_cannot_be_are_refused() {
    let vm = Vm::new(&["a"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx")]));
    let mut client = owner.client();
    for (disk, file, why) in [
        ("a", "a.vhdx", "base"),
        ("a", "other.avhdx", "not part of"),
        ("b", "b.vhdx", "no disk b"),
        ("a", "", "not part of"),
    ] {
        let error = client.call(&start(disk, &vm.file(file)), PATIENCE).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    assert_eq!(report(&mut client).disks[0].merge, MergeState::None);
    owner.shut_down();
}

#[test]
fn i5_shutdown_in_the_middle_of_a_merge_stops_it_and_the_next_owner_goes_on() {
    let vm = Vm::new(&["a"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx")]));
    checkpoint(&mut owner.client(), &vm.leaves(&["a"], "one")).unwrap();
    let model: Vec<u8> = (0..32 * MIB).map(|i| (i / 8192) as u8 | 1).collect();
    let disk = vm.disk("a");
    disk.write_at(0, &model).unwrap();
    drop(disk);
    let child = vm.file("a_one.avhdx");
    must(&mut owner.client(), &start("a", &child));
    owner.shut_down();
    assert!(content(&child) == model);
    let owner = Owner::start(vm.config(&[("a", "a_one.avhdx")]));
    assert!(read_all(&vm.disk("a")) == model);
    must(&mut owner.client(), &start("a", &child));
    assert_eq!(merge_end(&mut owner.client(), "a"), MergeState::Done { child });
    owner.shut_down();
    assert!(content(&vm.file("a.vhdx")) == model);
}
