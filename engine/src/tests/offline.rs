//! Checkpoints of a stopped VM.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::{Consistency, EngineError};

#[test]
fn a_checkpoint_keeps_what_was_and_the_leaf_goes_on() {
    let fixture = Fixture::with_vm(2);
    let mut session = fixture.session();
    write(&session, "disk0", 0, &[1; 4096]);
    write(&session, "disk1", 65536, &[2; 4096]);
    let before = [content(&session, "disk0"), content(&session, "disk1")];
    let record = take(&mut session, "one");
    assert_eq!(record.consistency, Consistency::Offline);
    assert_eq!(record.disks.len(), 2);
    write(&session, "disk0", 0, &[3; 4096]);
    write(&session, "disk1", 1 << 20, &[4; 4096]);
    assert_eq!(checkpoint_content(&session, "one", 0), before[0]);
    assert_eq!(checkpoint_content(&session, "one", 1), before[1]);
    assert_eq!(&content(&session, "disk0")[..4096], [3; 4096]);
    assert_eq!(&content(&session, "disk1")[1 << 20..][..4096], [4; 4096]);
    assert_tidy(&fixture, &session);
}

#[test]
fn deleting_merges_and_loses_nothing_wherever_the_checkpoint_lies() {
    for victim in ["a", "b", "c"] {
        let fixture = Fixture::with_vm(2);
        let mut session = fixture.session();
        let mut states = Vec::new();
        for (i, name) in [(1, "a"), (2, "b"), (3, "c")] {
            write(&session, "disk0", i * 4096, &[i as u8; 8192]);
            write(&session, "disk1", i << 20, &[i as u8; 100 * 512]);
            take(&mut session, name);
            states.push((name, content(&session, "disk0"), content(&session, "disk1")));
        }
        write(&session, "disk0", 0, &[9; 512]);
        let now = [content(&session, "disk0"), content(&session, "disk1")];
        delete(&mut session, victim).unwrap();
        assert_eq!([content(&session, "disk0"), content(&session, "disk1")], now, "{victim}");
        for (name, disk0, disk1) in states.iter().filter(|(name, ..)| *name != victim) {
            assert_eq!(&checkpoint_content(&session, name, 0), disk0, "{victim} {name}");
            assert_eq!(&checkpoint_content(&session, name, 1), disk1, "{victim} {name}");
        }
        assert_tidy(&fixture, &session);
        assert!(matches!(delete(&mut session, victim), Err(EngineError::NoSuchCheckpoint { .. })));
    }
}

#[test]
fn changes_can_be_asked_for_since_a_checkpoint_that_is_gone() {
    let fixture = Fixture::with_vm(1);
    let mut session = fixture.session();
    write(&session, "disk0", 0, &[1; 4096]);
    let first = take(&mut session, "first");
    delete(&mut session, "first").unwrap();
    write(&session, "disk0", 3 << 20, &[2; 4096]);
    let second = take(&mut session, "second");
    let open = session.open_checkpoint(second.id).unwrap();
    let changed = open[0].chain.changed_since(&first.disks[0].rct_id).unwrap();
    let granule = 3 << 20..(3 << 20) + 65536;
    assert_eq!(changed, vec![granule]);
}

#[test]
fn a_dead_backups_checkpoint_is_merged_by_the_next_session() {
    let fixture = Fixture::with_vm(1);
    let mut session = fixture.session();
    take(&mut session, "mine");
    session.create_checkpoint(&checkpoint("run", CheckpointPurpose::Backup)).unwrap();
    write(&session, "disk0", 4096, &[7; 4096]);
    assert!(fixture.engine.show("vm").unwrap().pending.is_none(), "somebody is at it");
    drop(session);
    let pending = fixture.engine.show("vm").unwrap().pending.unwrap();
    assert!(pending.contains("\"run\""), "{pending}");
    let session = fixture.session();
    assert_eq!(session.config().checkpoints.len(), 1);
    assert_eq!(session.config().checkpoints[0].name, "mine");
    assert_eq!(&content(&session, "disk0")[4096..8192], [7; 4096]);
    assert_tidy(&fixture, &session);
}

#[test]
fn a_cancelled_merge_is_finished_later() {
    let fixture = Fixture::with_vm(2);
    let mut session = fixture.session();
    take(&mut session, "one");
    write(&session, "disk0", 0, &vec![5; 4 << 20]);
    write(&session, "disk1", 0, &vec![6; 4 << 20]);
    let now = [content(&session, "disk0"), content(&session, "disk1")];
    let cancel = AtomicBool::new(true);
    let cancelled = session.delete_checkpoint("one", &|_, _, _| {}, &cancel);
    assert!(matches!(cancelled, Err(EngineError::Cancelled)), "{cancelled:?}");
    assert_eq!([content(&session, "disk0"), content(&session, "disk1")], now);
    drop(session);
    assert!(fixture.engine.show("vm").unwrap().pending.unwrap().contains("\"one\""));
    let session = fixture.session();
    assert!(session.config().checkpoints.is_empty());
    assert_eq!([content(&session, "disk0"), content(&session, "disk1")], now);
    assert_tidy(&fixture, &session);
}

#[test]
fn a_merge_tells_how_far_it_is() {
    let fixture = Fixture::with_vm(1);
    let mut session = fixture.session();
    take(&mut session, "one");
    write(&session, "disk0", 0, &vec![5; 4 << 20]);
    let most = AtomicU64::new(0);
    let tell = |what: &str, done: u64, total: u64| {
        assert_eq!(what, "merge disk0");
        assert!(done <= total);
        most.fetch_max(done, Ordering::Relaxed);
    };
    session.delete_checkpoint("one", &tell, &AtomicBool::new(false)).unwrap();
    assert_eq!(most.into_inner(), 4 << 20);
}

#[test]
fn names_and_numbers_of_checkpoints_have_limits() {
    let fixture = Fixture::with_vm(1);
    let mut session = fixture.session();
    let mut named = |name: &str| {
        session.create_checkpoint(&checkpoint(name, CheckpointPurpose::User)).map(|c| c.name)
    };
    let longest = "ä".repeat(99);
    assert_eq!(named(&longest).unwrap(), longest);
    for bad in ["", "  ", &"x".repeat(100), "a\nb", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"] {
        assert!(matches!(named(bad), Err(EngineError::Invalid(_))), "{bad:?}");
    }
    let again = named(&longest).unwrap_err().to_string();
    assert!(again.contains("already"), "{again}");
    let standard = CheckpointRequest {
        checkpoint_type: CheckpointType::Standard,
        ..checkpoint("s", CheckpointPurpose::User)
    };
    let error = session.create_checkpoint(&standard).unwrap_err().to_string();
    assert!(error.contains("not in this version"), "{error}");
    let unnamed = CheckpointRequest { name: None, ..checkpoint("", CheckpointPurpose::User) };
    let first = session.create_checkpoint(&unnamed).unwrap().name;
    let second = session.create_checkpoint(&unnamed).unwrap().name;
    assert!(first.starts_with("vm (") && first != second, "{first} {second}");
    while session.config().checkpoints.len() < crate::MAX_CHECKPOINTS {
        session.create_checkpoint(&unnamed).unwrap();
    }
    assert!(matches!(session.create_checkpoint(&unnamed), Err(EngineError::State(_))));
    let backup = checkpoint("run", CheckpointPurpose::Backup);
    session.create_checkpoint(&backup).unwrap();
    drop(session);
    let session = fixture.session();
    assert_eq!(session.config().checkpoints.len(), crate::MAX_CHECKPOINTS);
}

#[test]
fn i6_an_unreferenced_file_is_removed_only_if_it_holds_nothing() {
    use tidemark_disk::vhdx::{CreateOptions, ParentLink, Vhdx};
    let fixture = Fixture::with_vm(1);
    let base = fixture.vm_path("disks/disk0.vhdx");
    let properties = Vhdx::open(&base, Access::ReadOnly).unwrap().properties();
    let child = |name: &str| {
        let path = fixture.vm_path("disks").join(name);
        let options = CreateOptions {
            size: SIZE,
            block_size: 2 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            fixed: false,
            disk_id: Some(properties.disk_id),
            parent: Some(ParentLink {
                path: base.clone(),
                data_write_guid: properties.data_write_guid,
            }),
        };
        Vhdx::create(&path, &options).unwrap();
        path
    };
    let empty = child("disk0_empty.avhdx");
    // Killed while its tracking pair was made.
    std::fs::write(fixture.vm_path("disks/disk0_empty.avhdx.rct.new"), b"half").unwrap();
    let full = child("disk0_full.avhdx");
    let vhdx = Vhdx::open(&full, Access::ReadWrite).unwrap();
    vhdx.write_at(0, &[1; 4096]).unwrap();
    vhdx.flush().unwrap();
    drop(vhdx);
    std::fs::write(fixture.vm_path("disks/torn.vhdx"), b"vhdxfile").unwrap();
    drop(fixture.session());
    assert!(!empty.exists() && full.exists());
    let left = crate::folder::entries(&fixture.vm_path("disks")).unwrap();
    assert!(!left.iter().any(|name| name.starts_with("disk0_empty")), "{left:?}");
    let pending = fixture.engine.show("vm").unwrap().pending.unwrap();
    assert!(pending.contains("disk0_full.avhdx") && pending.contains("torn.vhdx"), "{pending}");
}
