//! I5: killed at any point, the next session finishes or undoes. The killed process is this test
//! program itself, run as a child that aborts at a named point.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use tidemark_disk::Geometry;

use super::*;
use crate::{RestoreVm, fault};

const SCENARIO: &str = "TIDEMARK_TEST_SCENARIO";
const DATA_DIR: &str = "TIDEMARK_TEST_DATA_DIR";

/// What the child does before it dies.
#[test]
#[ignore = "run by the other tests of this module"]
fn child() {
    let (Ok(scenario), Ok(data)) = (std::env::var(SCENARIO), std::env::var(DATA_DIR)) else {
        return;
    };
    let engine = open(Path::new(&data));
    match scenario.as_str() {
        "create" => drop(engine.create(&request("new", 2), &|_, _, _| {}, &AtomicBool::new(false))),
        "checkpoint" => {
            let mut session = engine.session("vm").unwrap();
            let _ = session.create_checkpoint(&checkpoint("new", CheckpointPurpose::User));
        }
        "recover" => drop(engine.session("vm")),
        "replace" => replace(&engine),
        delete => {
            let mut session = engine.session("vm").unwrap();
            let name = delete.strip_prefix("delete ").unwrap();
            let _ = super::delete(&mut session, name);
        }
    }
}

/// Restores the VM in its own place, with other content.
fn replace(engine: &Engine) {
    let old = engine.session("vm").unwrap();
    let geometry = Geometry { size: SIZE, logical_sector: 512, physical_sector: 4096 };
    let config = old.config().clone();
    let request = RestoreVm {
        name: "vm".to_owned(),
        disks: config.disks.iter().map(|d| (d.name.clone(), geometry)).collect(),
        config,
        boot: Vec::new(),
        keep_identity: true,
    };
    let new = engine.begin_restore(&request).unwrap();
    for (_, disk) in &new.disks {
        disk.write_at(0, &[9; 4096]).unwrap();
    }
    new.commit_replacing(old).unwrap();
}

/// Runs a scenario in a child that dies at `point`; fails if it never got there.
fn die(fixture: &Fixture, scenario: &str, point: &str) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::crash::child", "--ignored"])
        .env(SCENARIO, scenario)
        .env(DATA_DIR, fixture.path())
        .env(fault::VARIABLE, point)
        .output()
        .unwrap()
        .status;
    assert_eq!(status.signal(), Some(6), "{scenario} did not reach {point}");
}

/// A VM with two disks and a checkpoint "old".
fn prepared() -> (Fixture, [Vec<u8>; 2], [Vec<u8>; 2]) {
    let fixture = Fixture::with_vm(2);
    let mut session = fixture.session();
    write(&session, "disk0", 0, &[1; 8192]);
    write(&session, "disk1", 1 << 20, &[2; 8192]);
    take(&mut session, "old");
    let old = [content(&session, "disk0"), content(&session, "disk1")];
    write(&session, "disk0", 4096, &[3; 8192]);
    write(&session, "disk1", 3 << 20, &[4; 300 << 10]);
    let now = [content(&session, "disk0"), content(&session, "disk1")];
    drop(session);
    (fixture, old, now)
}

fn assert_now(session: &VmSession<'_>, now: &[Vec<u8>; 2], at: &str) {
    assert!(content(session, "disk0") == now[0], "disk0 after {at}");
    assert!(content(session, "disk1") == now[1], "disk1 after {at}");
}

#[test]
fn i5_a_checkpoint_killed_before_its_record_never_was() {
    let points = [
        "checkpoint-intent",
        "checkpoint-prepared",
        "checkpoint-committing",
        "checkpoint-switched",
        "checkpoint-snapshot",
    ];
    for point in points {
        let (fixture, old, now) = prepared();
        die(&fixture, "checkpoint", point);
        assert!(fixture.engine.show("vm").unwrap().pending.is_some(), "{point}");
        let mut session = fixture.session();
        assert_eq!(session.config().checkpoints.len(), 1, "{point}");
        assert_now(&session, &now, point);
        assert!(checkpoint_content(&session, "old", 0) == old[0], "{point}");
        assert_tidy(&fixture, &session);
        take(&mut session, "new");
        assert_tidy(&fixture, &session);
    }
}

#[test]
fn i5_a_checkpoint_killed_after_its_record_stands() {
    let (fixture, old, now) = prepared();
    die(&fixture, "checkpoint", "checkpoint-recorded");
    let session = fixture.session();
    assert_eq!(session.config().checkpoints.len(), 2);
    assert_now(&session, &now, "recorded");
    assert!(checkpoint_content(&session, "new", 1) == now[1]);
    assert!(checkpoint_content(&session, "old", 1) == old[1]);
    assert_tidy(&fixture, &session);
}

#[test]
fn i5_the_undoing_of_a_checkpoint_can_be_killed_as_well() {
    for point in ["undo-merged", "undo-removed"] {
        let (fixture, _, now) = prepared();
        die(&fixture, "checkpoint", "checkpoint-snapshot");
        die(&fixture, "recover", point);
        let session = fixture.session();
        assert_eq!(session.config().checkpoints.len(), 1, "{point}");
        assert_now(&session, &now, point);
        assert_tidy(&fixture, &session);
    }
}

#[test]
fn i5_a_deletion_killed_anywhere_is_finished() {
    for point in ["merge-intent", "merge-disk", "merge-recorded", "merge-removed"] {
        // Of the youngest checkpoint (its child is the leaf), and of an older one.
        for victim in ["old", "new"] {
            let (fixture, old, now) = prepared();
            let mut session = fixture.session();
            take(&mut session, "new");
            write(&session, "disk0", 5 << 20, &[5; 4096]);
            let latest = [content(&session, "disk0"), content(&session, "disk1")];
            drop(session);
            die(&fixture, &format!("delete {victim}"), point);
            let session = fixture.session();
            let at = format!("{victim} at {point}");
            assert_eq!(session.config().checkpoints.len(), 1, "{at}");
            assert_now(&session, &latest, &at);
            let (kept, state) = if victim == "old" { ("new", now) } else { ("old", old) };
            assert!(checkpoint_content(&session, kept, 0) == state[0], "{at}");
            assert!(checkpoint_content(&session, kept, 1) == state[1], "{at}");
            assert_tidy(&fixture, &session);
        }
    }
}

#[test]
fn i5_a_vm_whose_creation_was_killed_leaves_nothing() {
    for point in ["create-begun", "create-disk"] {
        let fixture = Fixture::new();
        die(&fixture, "create", point);
        assert_eq!(fixture.engine.list().unwrap().len(), 0, "{point}");
        let engine = open(fixture.path());
        let left = crate::folder::entries(&fixture.path().join("vms")).unwrap();
        assert_eq!(left, [".create.lock"], "{point}");
        engine.create(&request("new", 1), &|_, _, _| {}, &AtomicBool::new(false)).unwrap();
    }
}

#[test]
fn i5_writes_between_a_killed_switch_and_its_undoing_are_kept() {
    // As a disk owner does that the guard has started again on the new leaves.
    let (fixture, old, _) = prepared();
    die(&fixture, "checkpoint", "checkpoint-snapshot");
    let config = crate::VmConfig::load(&fixture.vm_path("vm.vmcx")).unwrap();
    let folder = fixture.engine.folder("vm").unwrap();
    let intent = crate::intent::Intent::load(&folder).unwrap();
    for (_, leaf) in crate::leaves::current_leaves(&folder, &config, intent.as_ref()).unwrap() {
        assert!(!config.disk_files().any(|f| leaf.ends_with(f)), "the new leaf is the top");
        let chain = tidemark_disk::chain::Chain::open(&leaf, Access::ReadWrite).unwrap();
        chain.write_at(7 << 20, &[8; 65536]).unwrap();
        chain.close().unwrap();
    }
    let session = fixture.session();
    for disk in ["disk0", "disk1"] {
        assert!(content(&session, disk)[7 << 20..][..65536].iter().all(|b| *b == 8), "{disk}");
    }
    assert!(checkpoint_content(&session, "old", 0) == old[0]);
    assert_tidy(&fixture, &session);
}

#[test]
fn i5_an_empty_new_leaf_whose_parent_was_written_since_is_dropped() {
    // The switch had not happened, and the old leaf was written by someone who did not know of it.
    let (fixture, _, mut now) = prepared();
    die(&fixture, "checkpoint", "checkpoint-committing");
    let config = crate::VmConfig::load(&fixture.vm_path("vm.vmcx")).unwrap();
    let leaf = fixture.vm_path("disks").join(&config.disks[0].leaf);
    let chain = tidemark_disk::chain::Chain::open(&leaf, Access::ReadWrite).unwrap();
    chain.write_at(0, &[6; 4096]).unwrap();
    chain.close().unwrap();
    now[0][..4096].fill(6);
    let session = fixture.session();
    assert_now(&session, &now, "a foreign write");
    assert_tidy(&fixture, &session);
}

#[test]
fn i5_a_vm_is_replaced_whole_or_not_at_all() {
    for (point, replaced) in [("replace-finished", false), ("replace-exchanged", true), ("", true)]
    {
        let (fixture, old, now) = prepared();
        let id = fixture.session().config().id;
        if point.is_empty() {
            replace(&fixture.engine);
        } else {
            die(&fixture, "replace", point);
        }
        // The next start takes away whichever of the two lost its name.
        open(fixture.path());
        let left = crate::folder::entries(&fixture.path().join("vms")).unwrap();
        assert_eq!(left, [".create.lock", "vm"], "{point}");
        let session = fixture.session();
        assert_eq!(session.config().id, id, "{point}");
        if replaced {
            let mut new = vec![0; SIZE as usize];
            new[..4096].fill(9);
            assert_now(&session, &[new.clone(), new], point);
            assert!(session.config().checkpoints.is_empty());
        } else {
            assert_now(&session, &now, point);
            assert!(checkpoint_content(&session, "old", 0) == old[0], "{point}");
        }
        assert_tidy(&fixture, &session);
    }
}
