//! Checkpoints of all disks together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{MIB, Owner, PATIENCE, StopOnDrop, Vm, checkpoint, content, merge_end, must, report};
use crate::block::Block;
use crate::chain::Chain;
use crate::owner::checkpoint::{Checkpoints, settle};
use crate::owner::disk::Disk;
use crate::owner::{MergeState, Request, Response};
use crate::vhdx::Access;

/// Two disks, an owner, and checkpoint `one` taken.
fn two_disks() -> (Vm, Owner) {
    let vm = Vm::new(&["a", "b"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx"), ("b", "b.vhdx")]));
    (vm, owner)
}

#[test]
fn all_disks_stop_at_one_moment_while_clients_write() {
    let (vm, owner) = two_disks();
    let stop = AtomicBool::new(false);
    let worst = thread::scope(|scope| {
        let (vm, stop) = (&vm, &stop);
        let _end = StopOnDrop(stop);
        // Writes n to disk a, and once that is acknowledged to disk b: at every moment
        // b <= a <= b + 1, and so in every checkpoint.
        let writer = scope.spawn(move || {
            let (a, b) = (vm.disk("a"), vm.disk("b"));
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                a.write_at(0, &n.to_le_bytes().repeat(64)).unwrap();
                b.write_at(0, &n.to_le_bytes().repeat(64)).unwrap();
                if n.is_multiple_of(50) {
                    b.flush().unwrap();
                }
            }
            n
        });
        // Load beside it, so that there is something to flush in the pause.
        for disk in ["a", "b"] {
            scope.spawn(move || {
                let disk = vm.disk(disk);
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    disk.write_at(MIB + at % (24 * MIB), &[at as u8; 16384]).unwrap();
                    at += 16384;
                }
            });
        }
        let mut client = owner.client();
        let mut worst = 0;
        for round in 0..6 {
            let leaves = vm.leaves(&["a", "b"], &round.to_string());
            let before = report(&mut client);
            let (pause_us, ids) = checkpoint(&mut client, &leaves).unwrap();
            worst = worst.max(pause_us);
            assert_eq!(ids.len(), 2);
            // The answer means that the sealed files can be read by anyone.
            let sealed: Vec<_> = before
                .disks
                .iter()
                .map(|disk| {
                    let chain = Chain::open(disk.files.last().unwrap(), Access::ReadOnly).unwrap();
                    let mut first = [0; 512];
                    chain.read_at(0, &mut first).unwrap();
                    assert!(ids.contains(&chain.last_seal().unwrap()));
                    u64::from_le_bytes(first[..8].try_into().unwrap())
                })
                .collect();
            assert!(sealed[1] <= sealed[0] && sealed[0] <= sealed[1] + 1, "{sealed:?}");
            thread::sleep(std::time::Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 6);
        worst
    });
    println!("longest pause {worst} us");
    assert!(worst < 2_000_000);
    let files = report(&mut owner.client()).disks.remove(0).files;
    assert_eq!(files.len(), 7);
    owner.shut_down();
}

#[test]
fn what_is_written_after_a_checkpoint_is_not_in_it() {
    let (vm, owner) = two_disks();
    let disk = vm.disk("a");
    disk.write_at(0, &[1; 65536]).unwrap();
    checkpoint(&mut owner.client(), &vm.leaves(&["a", "b"], "one")).unwrap();
    disk.write_at(4096, &[2; 4096]).unwrap();
    disk.flush().unwrap();
    let sealed = content(&vm.file("a.vhdx"));
    assert!(sealed[..65536] == [1; 65536]);
    let mut now = [0; 12288];
    disk.read_at(0, &mut now).unwrap();
    assert_eq!((now[0], now[4096], now[8192]), (1, 2, 1));
    drop(disk);
    owner.shut_down();
    assert_eq!(content(&vm.file("a_one.avhdx"))[4096], 2);
}

#[test]
fn prepare_and_commit_can_be_repeated() {
    let (vm, owner) = two_disks();
    let leaves = vm.leaves(&["a", "b"], "one");
    let prepare = Request::PrepareCheckpoint { leaves: leaves.clone() };
    let commit = Request::CommitCheckpoint { leaves: leaves.clone() };
    must(&mut owner.client(), &prepare);
    must(&mut owner.client(), &prepare);
    let first = owner.client().call(&commit, PATIENCE).unwrap();
    vm.disk("a").write_at(0, &[1; 512]).unwrap();
    let again = owner.client().call(&commit, PATIENCE).unwrap();
    let ids = |response| match response {
        Response::Committed { disks, .. } => {
            disks.into_iter().map(|d| d.rct_id).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(ids(first), ids(again));
    // Preparing leaves that are in use would destroy them.
    assert!(owner.client().call(&prepare, PATIENCE).is_err());
    let mut read = [0; 512];
    vm.disk("a").read_at(0, &mut read).unwrap();
    assert_eq!(read, [1; 512]);
    assert_eq!(report(&mut owner.client()).disks[0].files.len(), 2);
    owner.shut_down();
}

#[test]
fn an_empty_leaf_left_by_a_dead_owner_is_replaced_and_anything_else_is_not() {
    let (vm, owner) = two_disks();
    let leaves = vm.leaves(&["a", "b"], "one");
    // What a kill between prepare and commit leaves: the same files, unused.
    must(&mut owner.client(), &Request::PrepareCheckpoint { leaves: leaves.clone() });
    let left = std::fs::read(&leaves[0].1).unwrap();
    owner.shut_down();
    std::fs::write(&leaves[0].1, left).unwrap();
    std::fs::write(&leaves[1].1, "something precious").unwrap();
    let owner = Owner::start(vm.config(&[("a", "a.vhdx"), ("b", "b.vhdx")]));
    let error = checkpoint(&mut owner.client(), &leaves).unwrap_err().to_string();
    assert!(error.contains("b_one.avhdx"), "{error}");
    assert_eq!(std::fs::read(&leaves[1].1).unwrap(), b"something precious");
    assert!(!leaves[0].1.exists(), "a failed preparation leaves no leaf");
    std::fs::remove_file(&leaves[1].1).unwrap();
    checkpoint(&mut owner.client(), &leaves).unwrap();
    owner.shut_down();
}

#[test]
fn checkpoints_that_cannot_be_right_are_refused_and_change_nothing() {
    let (vm, owner) = two_disks();
    let mut client = owner.client();
    let good = vm.leaves(&["a", "b"], "one");
    let elsewhere = tempfile::TempDir::new().unwrap();
    let mut outside = good.clone();
    outside[1].1 = elsewhere.path().join("b_one.avhdx");
    let mut above = good.clone();
    above[1].1 = vm.file("sub/../b_one.avhdx");
    let mut own = good.clone();
    own[0].1 = vm.file("a.vhdx");
    for (leaves, why) in [
        (good[..1].to_vec(), "each of the 2 disks once"),
        (vec![good[0].clone(), good[0].clone()], "no new leaf is named for disk b"),
        (vm.leaves(&["a", "c"], "one"), "no disk c"),
        (outside, "not in the folder"),
        (above, "not in the folder"),
        (own, "in use"),
    ] {
        let error = checkpoint(&mut client, &leaves).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let commit = |leaves: &[_]| Request::CommitCheckpoint { leaves: leaves.to_vec() };
    assert!(client.call(&commit(&good), PATIENCE).is_err(), "not prepared");
    must(&mut client, &Request::PrepareCheckpoint { leaves: good.clone() });
    std::fs::remove_file(&good[1].1).unwrap();
    assert!(client.call(&commit(&good), PATIENCE).is_err(), "one was removed");
    let files: Vec<_> = report(&mut client).disks.into_iter().map(|d| d.files.len()).collect();
    assert_eq!(files, [1, 1]);
    // And the next one works.
    checkpoint(&mut client, &vm.leaves(&["a", "b"], "two")).unwrap();
    owner.shut_down();
}

#[test]
fn a_client_that_hangs_up_during_a_checkpoint_changes_nothing_about_it() {
    let (vm, owner) = two_disks();
    let leaves = vm.leaves(&["a", "b"], "one");
    must(&mut owner.client(), &Request::PrepareCheckpoint { leaves: leaves.clone() });
    {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(vm.control()).unwrap();
        let request = Request::CommitCheckpoint { leaves: leaves.clone() };
        crate::owner::wire::send(&mut stream, &request).unwrap();
        stream.flush().unwrap();
    }
    // Asking again settles it: either way both disks are on their new leaves, once.
    let settled = owner.client().call(&Request::CommitCheckpoint { leaves }, PATIENCE);
    assert!(matches!(settled, Ok(Response::Committed { .. })));
    let files: Vec<_> =
        report(&mut owner.client()).disks.into_iter().map(|d| d.files.len()).collect();
    assert_eq!(files, [2, 2]);
    owner.shut_down();
}

#[test]
fn prepared_leaves_do_not_stand_in_the_way_of_a_merge() {
    let (vm, owner) = two_disks();
    let mut client = owner.client();
    checkpoint(&mut client, &vm.leaves(&["a", "b"], "one")).unwrap();
    vm.disk("a").write_at(0, &[5; 4096]).unwrap();
    let abandoned = vm.leaves(&["a", "b"], "two");
    must(&mut client, &Request::PrepareCheckpoint { leaves: abandoned.clone() });
    let child = vm.file("a_one.avhdx");
    must(&mut client, &Request::StartMerge { disk: "a".to_owned(), child: child.clone() });
    assert_eq!(merge_end(&mut client, "a"), MergeState::Done { child });
    assert!(!abandoned[0].1.exists() && !abandoned[1].1.exists());
    assert!(client.call(&Request::CommitCheckpoint { leaves: abandoned }, PATIENCE).is_err());
    owner.shut_down();
}

#[test]
fn a_switch_that_fails_half_way_says_which_disks_have_switched() {
    let vm = Vm::new(&["a", "b", "c"]);
    let open = |name: &str| {
        let chain = Chain::open(&vm.file(&format!("{name}.vhdx")), Access::ReadWrite).unwrap();
        Disk::new(name.to_owned(), chain)
    };
    let disks = ["a", "b", "c"].map(open);
    let leaves = vm.leaves(&["a", "b", "c"], "one");
    let mut checkpoints = Checkpoints::default();
    checkpoints.prepare(&disks, &leaves).unwrap();
    // Disk b loses its new leaf in a way that is only seen when it is to be switched.
    disks[1].chain.discard_prepared().unwrap();
    std::fs::write(&leaves[1].1, "").unwrap();
    let error = checkpoints.commit(&disks, &leaves).unwrap_err().to_string();
    assert!(error.contains("disk b") && error.contains("merged back: a"), "{error}");
    let files: Vec<_> = disks.iter().map(|disk| disk.chain.files().len()).collect();
    assert_eq!(files, [2, 1, 1]);
    // None of these leaves can be switched to later, and I/O goes on everywhere.
    assert!(!leaves[2].1.exists());
    assert!(checkpoints.commit(&disks, &leaves).is_err());
    for disk in &disks {
        disk.chain.write_at(0, &[1; 512]).unwrap();
    }
    // What the engine does about it.
    disks[0].start_merge(&leaves[0].1).unwrap();
    while matches!(disks[0].merge_state(), MergeState::Running { .. }) {
        thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(disks[0].chain.files(), [vm.file("a.vhdx")]);
    disks.iter().for_each(|disk| disk.chain.close().unwrap());
}

#[test]
fn a_checkpoint_whose_sealed_leaf_is_not_durable_fails() {
    let vm = Vm::new(&["a"]);
    let chain = Chain::open(&vm.file("a.vhdx"), Access::ReadWrite).unwrap();
    let disks = [Disk::new("a".to_owned(), chain)];
    let leaves = vm.leaves(&["a"], "one");
    let mut checkpoints = Checkpoints::default();
    checkpoints.prepare(&disks, &leaves).unwrap();
    checkpoints.commit(&disks, &leaves).unwrap();
    disks[0].chain.fail_at(Some("settled"));
    let error = settle(&disks).unwrap_err().to_string();
    assert!(error.contains("disk a") && error.contains("durable"), "{error}");
    // What the engine does about it.
    disks[0].chain.fail_at(None);
    disks[0].start_merge(&leaves[0].1).unwrap();
    while matches!(disks[0].merge_state(), MergeState::Running { .. }) {
        thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(disks[0].chain.files(), [vm.file("a.vhdx")]);
    disks[0].chain.close().unwrap();
}

#[test]
fn discarded_leaves_are_gone_and_never_switched_to() {
    let (vm, owner) = two_disks();
    let mut client = owner.client();
    let leaves = vm.leaves(&["a", "b"], "x");
    let mut call = |request: &Request| client.call(request, PATIENCE);
    call(&Request::PrepareCheckpoint { leaves: leaves.clone() }).unwrap();
    assert!(leaves.iter().all(|(_, path)| path.exists()));
    for _ in 0..2 {
        call(&Request::DiscardCheckpoint).unwrap();
        assert!(!leaves.iter().any(|(_, path)| path.exists()));
    }
    assert!(call(&Request::CommitCheckpoint { leaves: leaves.clone() }).is_err());
    // After a switch there is nothing to discard.
    call(&Request::PrepareCheckpoint { leaves: leaves.clone() }).unwrap();
    call(&Request::CommitCheckpoint { leaves: leaves.clone() }).unwrap();
    call(&Request::DiscardCheckpoint).unwrap();
    assert!(leaves.iter().all(|(_, path)| path.exists()));
}
