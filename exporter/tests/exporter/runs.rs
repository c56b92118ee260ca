//! Backup runs of offline VMs: what is read, what is stored, what comes back.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::common::*;
use parking_lot::Mutex;
use tidemark_exporter::{ExportError, ReadMode, RunEvent, RunOutcome, RunRecord};

#[test]
fn every_point_equals_its_checkpoint_bit_for_bit_on_every_target() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first", "second"]);
    // Odd sizes: the last granule is short.
    let sizes = [9 * MIB + 512, 3 * MIB];
    lab.create_vm("web", &sizes);
    let mut models: Vec<Vec<u8>> = sizes.iter().map(|s| vec![0; *s as usize]).collect();
    let mut dice = Dice(11);
    let mut points = Vec::new();
    for round in 0..5 {
        let mut touched = 0;
        for (i, model) in models.iter_mut().enumerate() {
            let changes = dice.changes(sizes[i], if round == 0 { 60 } else { 8 });
            touched += granule_bytes(&changes);
            lab.change("web", &format!("disk{i}"), model, &changes);
        }
        let report = backup(&exporter, "web", &["first", "second"]);
        assert!(report.complete(), "{report:?}");
        assert_eq!(lab.checkpoints("web"), 0);
        if round > 0 {
            assert!(report.disks.iter().all(|(_, m)| matches!(m, ReadMode::Incremental { .. })));
            let read = report.targets[0].read_bytes;
            assert!(read <= touched, "round {round}: {read} read, {touched} changed");
        }
        points.push((report.point, models.clone()));
    }
    let files = lab.disk_files("web");
    assert_eq!(files.len(), 2, "checkpoints were merged away: {files:?}");
    for (point, models) in &points {
        let disks = point_content(&exporter, *point);
        for (i, model) in models.iter().enumerate() {
            assert_same(&format!("{point} disk{i}"), &disks[&format!("disk{i}")], model);
        }
    }
    // The second target alone.
    exporter.remove_target("first").unwrap();
    for (point, models) in &points {
        let disks = point_content(&exporter, *point);
        for (i, model) in models.iter().enumerate() {
            assert_same(&format!("copy of {point} disk{i}"), &disks[&format!("disk{i}")], model);
        }
    }
    let (listed, unread) = exporter.list(Some("web")).unwrap();
    assert!(unread.is_empty(), "{unread:?}");
    let listed: Vec<_> = listed.iter().map(|p| p.manifest.point).collect();
    assert_eq!(listed, points.iter().map(|(p, _)| *p).collect::<Vec<_>>());
}

#[test]
fn with_nothing_changed_nothing_is_read_and_next_to_nothing_stored() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first", "second"]);
    lab.create_vm("web", &[8 * MIB]);
    let mut model = vec![0; 8 * MIB as usize];
    lab.change("web", "disk0", &mut model, &Dice(3).changes(8 * MIB, 50));
    backup(&exporter, "web", &[]);
    let report = backup(&exporter, "web", &[]);
    assert_eq!(report.targets[0].read_bytes, 0);
    for target in &report.targets {
        assert!(target.stored_bytes < 64 * 1024, "{target:?}");
        assert_eq!(target.new_bytes, 0, "{target:?}");
    }
    assert_same("second point", &point_content(&exporter, report.point)["disk0"], &model);
}

#[test]
fn lost_tracking_means_a_full_read_with_a_reason_and_right_content() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first"]);
    lab.create_vm("web", &[4 * MIB]);
    let mut model = vec![0; 4 * MIB as usize];
    lab.change("web", "disk0", &mut model, &Dice(5).changes(4 * MIB, 30));
    backup(&exporter, "web", &[]);
    lab.change("web", "disk0", &mut model, &Dice(6).changes(4 * MIB, 3));
    for entry in std::fs::read_dir(lab.disks_dir("web")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "rct" || e == "mrt") {
            std::fs::write(path, b"rubbish").unwrap();
        }
    }
    let notes = Mutex::new(Vec::new());
    let listen = |event| {
        if let RunEvent::Note { text } = event {
            notes.lock().push(text);
        }
    };
    let report = exporter.backup(&request("web", &[]), &listen, &AtomicBool::new(false)).unwrap();
    let ReadMode::Full { reason } = &report.disks[0].1 else { panic!("{:?}", report.disks) };
    assert!(reason.contains("change tracking"), "{reason}");
    assert!(notes.lock().iter().any(|n| n.contains("read in full")), "{:?}", notes.lock());
    assert_same("after lost tracking", &point_content(&exporter, report.point)["disk0"], &model);
    // And the next one is incremental again.
    let report = backup(&exporter, "web", &[]);
    assert!(matches!(report.disks[0].1, ReadMode::Incremental { .. }), "{:?}", report.disks);
    assert_eq!(report.targets[0].read_bytes, 0);
}

#[test]
fn a_full_run_on_request_reads_everything_and_stores_nothing_known() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first"]);
    lab.create_vm("web", &[4 * MIB]);
    let mut model = vec![0; 4 * MIB as usize];
    let write = Change::Write { at: 0, len: 2 * MIB as usize, seed: 1 };
    lab.change("web", "disk0", &mut model, &[write]);
    backup(&exporter, "web", &[]);
    let mut full = request("web", &[]);
    full.full = true;
    let report = exporter.backup(&full, &ignore, &AtomicBool::new(false)).unwrap();
    assert_eq!(report.disks[0].1, ReadMode::Full { reason: "asked for".to_owned() });
    assert!(report.targets[0].read_bytes >= 2 * MIB);
    assert_eq!(report.targets[0].new_bytes, 0);
    assert!(report.targets[0].stored_bytes < 64 * 1024);
    assert_same("full again", &point_content(&exporter, report.point)["disk0"], &model);
}

#[test]
fn i4_a_cancelled_run_leaves_no_point_and_no_checkpoint() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first", "second"]);
    lab.create_vm("web", &[16 * MIB]);
    let mut model = vec![0; 16 * MIB as usize];
    let fill = Change::Write { at: 0, len: 12 * MIB as usize, seed: 9 };
    lab.change("web", "disk0", &mut model, &[fill]);
    // At every step there is.
    let mut committed = false;
    for at in 1..20 {
        let cancel = AtomicBool::new(false);
        let seen = AtomicU32::new(0);
        let name = Mutex::new(String::new());
        let listen = |event| {
            if let RunEvent::Step { step } = event
                && seen.fetch_add(1, Ordering::SeqCst) + 1 == at
            {
                *name.lock() = step;
                cancel.store(true, Ordering::SeqCst);
            }
        };
        let result = exporter.backup(&request("web", &[]), &listen, &cancel);
        let step = name.lock().clone();
        assert_eq!(lab.checkpoints("web"), 0, "cancelled at {step}");
        let points = exporter.list(Some("web")).unwrap().0;
        match result {
            Err(ExportError::Cancelled) => {
                assert!(points.is_empty(), "cancelled at {step}: {points:?}");
            }
            // From the commit on there is a restore point, and the copies say what was not done.
            Ok(report) if cancel.load(Ordering::SeqCst) => {
                assert!(["commit", "merge", "copy to second"].contains(&step.as_str()), "{step}");
                assert_eq!(report.targets[1].error.as_deref(), Some("cancelled"));
                assert_eq!(points.len(), 1);
                committed = true;
                break;
            }
            other => panic!("cancelled at {step:?}: {other:?}"),
        }
    }
    assert!(committed);
    let report = backup(&exporter, "web", &[]);
    assert!(report.complete());
    assert_same("after it all", &point_content(&exporter, report.point)["disk0"], &model);
}

#[test]
fn a_failed_copy_is_the_targets_failure_and_can_be_caught_up() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first", "second"]);
    lab.create_vm("web", &[4 * MIB]);
    let mut model = vec![0; 4 * MIB as usize];
    lab.change("web", "disk0", &mut model, &Dice(8).changes(4 * MIB, 30));
    // A store that is not there: its folder is gone, as with a mount that is missing.
    let away = lab.dir.path().join("away");
    std::fs::rename(lab.store("second"), &away).unwrap();
    let other = lab.exporter();
    let report = backup(&other, "web", &["first", "second"]);
    assert!(!report.complete());
    assert!(report.targets[0].error.is_none());
    assert!(report.targets[1].error.is_some());
    assert_eq!(lab.checkpoints("web"), 0);
    let second = backup(&exporter, "web", &["first"]);

    std::fs::rename(&away, lab.store("second")).unwrap();
    let cancel = AtomicBool::new(false);
    let caught = exporter.copy_points("first", "second", Some("web"), &ignore, &cancel).unwrap();
    let ids: Vec<_> = caught.copied.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [report.point, second.point]);
    let again = exporter.copy_points("first", "second", None, &ignore, &cancel).unwrap();
    assert_eq!((again.copied.len(), again.present), (0, 2));
    exporter.remove_target("first").unwrap();
    assert_same("caught up", &point_content(&exporter, report.point)["disk0"], &model);
}

#[test]
fn a_first_target_that_fails_costs_the_vm_nothing() {
    let lab = Lab::new();
    lab.with_targets(&["first"]);
    lab.create_vm("web", &[MIB]);
    lab.secret("passphrase", "wrong\n");
    let exporter = lab.exporter();
    let cancel = AtomicBool::new(false);
    let steps = Mutex::new(Vec::new());
    let listen = |event| {
        if let RunEvent::Step { step } = event {
            steps.lock().push(step);
        }
    };
    let error = exporter.backup(&request("web", &[]), &listen, &cancel).unwrap_err().to_string();
    assert!(error.contains("wrong passphrase") && error.contains("first"), "{error}");
    assert!(!error.contains("staple"));
    assert_eq!(*steps.lock(), ["open targets"], "no checkpoint was taken");
    let error = exporter.backup(&request("nobody", &[]), &ignore, &cancel).unwrap_err();
    assert!(error.to_string().contains("nobody"), "{error}");
    let error = exporter.backup(&request("web", &["nowhere"]), &ignore, &cancel).unwrap_err();
    assert!(matches!(error, ExportError::NoSuchTarget(_)), "{error}");
}

#[test]
fn i9_every_run_is_recorded() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first"]);
    lab.create_vm("web", &[MIB]);
    let report = backup(&exporter, "web", &[]);
    let cancel = AtomicBool::new(true);
    exporter.backup(&request("web", &[]), &ignore, &cancel).unwrap_err();
    exporter.backup(&request("nobody", &[]), &ignore, &AtomicBool::new(false)).unwrap_err();
    let text = std::fs::read_to_string(lab.engine.data_dir().join("runs.jsonl")).unwrap();
    let records: Vec<RunRecord> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let outcomes: Vec<_> = records.iter().map(|r| r.outcome).collect();
    assert_eq!(outcomes, [RunOutcome::Complete, RunOutcome::Cancelled, RunOutcome::Failed]);
    assert_eq!(records[0].report.as_ref(), Some(&report));
    assert!(records[2].error.as_ref().unwrap().contains("nobody"));
}

#[test]
fn a_sparse_tebibyte_is_backed_up_in_bounded_memory() {
    let lab = Lab::new();
    let exporter = lab.with_targets(&["first", "second"]);
    let size = 1 << 40;
    lab.create_vm("huge", &[size]);
    let places = [0, 7 * MIB + 512, size / 3 / 512 * 512, size - 300 * 1024];
    let write = |seed: u64| {
        let session = lab.engine.session("huge").unwrap();
        let chain = session.open_disk("disk0", tidemark_disk::vhdx::Access::ReadWrite).unwrap();
        for at in places {
            tidemark_disk::Block::write_at(chain.as_ref(), at, &pattern(seed ^ at, 200 * 1024))
                .unwrap();
        }
        tidemark_disk::Block::flush(chain.as_ref()).unwrap();
        chain.close().unwrap();
    };
    write(1);
    let begun = std::time::Instant::now();
    let report = backup(&exporter, "huge", &[]);
    let full = begun.elapsed();
    // A full read knows the disk file's blocks of 2 MiB; 200 KiB touch at most two of them.
    assert!(report.targets[0].read_bytes <= 4 * 2 * 2 * MIB, "{report:?}");
    write(2);
    let begun = std::time::Instant::now();
    let report = backup(&exporter, "huge", &[]);
    let incremental = begun.elapsed();
    // And at most five granules of 64 KiB.
    assert!(report.targets[0].read_bytes <= 4 * 5 * CHUNK, "{report:?}");
    let disks = exporter.open_point(&report.point.to_string()).unwrap();
    for at in places {
        let mut back = vec![0; 200 * 1024];
        disks[0].1.read_at(at, &mut back).unwrap();
        assert_same(&format!("at {at}"), &back, &pattern(2 ^ at, 200 * 1024));
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    println!("full {full:?}, incremental {incremental:?}, peak {} MiB", kib / 1024);
    assert!(kib < 256 * 1024, "peak memory {kib} KiB");
    assert!(full.as_secs() < 30 && incremental.as_secs() < 30, "{full:?} {incremental:?}");
}
