//! Restores: whole VMs, in place, disks to files, from damaged and missing targets.

use std::process::Command;
use std::sync::atomic::AtomicBool;

use crate::common::*;
use tidemark_exporter::{DiskFormat, ExportError, RestoreRequest};

static CANCEL: AtomicBool = AtomicBool::new(false);

/// A VM with content, backed up to two targets.
fn backed_up<'l>(
    lab: &'l Lab,
    size: u64,
) -> (tidemark_exporter::Exporter<'l>, tidemark_exporter::BackupReport, Vec<u8>) {
    let exporter = lab.with_targets(&["first", "second"]);
    lab.create_vm("web", &[size]);
    let mut model = vec![0; size as usize];
    lab.change("web", "disk0", &mut model, &Dice(21).changes(size, 60));
    let report = backup(&exporter, "web", &[]);
    assert!(report.complete(), "{report:?}");
    (exporter, report, model)
}

/// Flips one bit in the middle of everything large in a store.
fn damage(lab: &Lab, target: &str) -> usize {
    let packs = files_over(&lab.store(target), 100 * 1024);
    for path in &packs {
        let mut content = std::fs::read(path).unwrap();
        for at in (1000..content.len()).step_by(50_000) {
            content[at] ^= 0x10;
        }
        std::fs::write(path, content).unwrap();
    }
    packs.len()
}

#[test]
fn a_vm_comes_back_with_new_identity_and_the_same_content() {
    let lab = Lab::new();
    let (exporter, report, model) = backed_up(&lab, 6 * MIB + 512);
    let original = lab.engine.show("web").unwrap().config;
    let (restored, notes) = restore(&exporter, "latest:web", "web2", None);
    let restored = restored.unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    assert_ne!(restored.id, original.id);
    assert_ne!(restored.generation_id, original.generation_id);
    assert!(restored.macs.iter().all(|mac| !original.macs.contains(mac)));
    assert_eq!(restored.memory, original.memory);
    assert_same("restored VM", &lab.content("web2", "disk0"), &model);
    let session = lab.engine.session("web2").unwrap();
    let boot: Vec<_> =
        session.boot_files().into_iter().map(|(_, path)| std::fs::read(path).unwrap()).collect();
    assert_eq!(boot, [pattern(1, 300_000), pattern(2, 70_001)]);
    drop(session);
    // The copy starts a history of its own.
    let copy = backup(&exporter, "web2", &["first"]);
    assert_eq!(copy.targets[0].new_bytes, 0, "deduplicated against the original");
    assert_eq!(exporter.find("latest:web", None).unwrap().manifest.point, report.point);
    // A name that is taken is refused.
    let (again, _) = restore(&exporter, "latest:web", "web2", None);
    assert!(again.is_err());
    assert_same("untouched", &lab.content("web2", "disk0"), &model);
}

#[test]
fn i7_a_damaged_target_is_named_and_the_next_one_used() {
    let lab = Lab::new();
    let (_, report, model) = backed_up(&lab, 6 * MIB);
    assert!(damage(&lab, "first") > 0);
    let exporter = lab.exporter();
    let point = report.point.to_string();
    let (alone, _) = restore(&exporter, &point, "lost", Some("first"));
    let error = alone.unwrap_err().to_string();
    assert!(error.contains("damaged") && error.contains("first"), "{error}");
    assert!(lab.engine.show("lost").is_err(), "no half-restored VM");

    let (restored, notes) = restore(&exporter, &point, "saved", None);
    restored.unwrap();
    assert!(notes.iter().any(|n| n.contains("first") && n.contains("damaged")), "{notes:?}");
    assert_same("saved from the second target", &lab.content("saved", "disk0"), &model);

    damage(&lab, "second");
    let exporter = lab.exporter();
    let (restored, _) = restore(&exporter, &point, "gone", None);
    let error = restored.unwrap_err().to_string();
    assert!(error.contains("first") && error.contains("second"), "{error}");
    assert!(lab.engine.show("gone").is_err());
}

#[test]
fn a_missing_target_is_told_and_the_next_one_used() {
    let lab = Lab::new();
    let (_, report, model) = backed_up(&lab, 2 * MIB);
    std::fs::remove_dir_all(lab.store("first")).unwrap();
    let exporter = lab.exporter();
    let (restored, notes) = restore(&exporter, &report.point.to_string(), "new", None);
    restored.unwrap();
    assert!(notes.iter().any(|n| n.contains("first")), "{notes:?}");
    assert_same("from the second target", &lab.content("new", "disk0"), &model);
    let (points, unread) = exporter.list(None).unwrap();
    assert_eq!((points.len(), unread.len()), (1, 1));
    assert_eq!(points[0].targets, ["second"]);
    assert_eq!(unread[0].0, "first");
}

#[test]
fn in_place_needs_the_flag_the_same_vm_and_keeps_its_identity() {
    let lab = Lab::new();
    let (exporter, report, model) = backed_up(&lab, 4 * MIB);
    let original = lab.engine.show("web").unwrap().config;
    let mut changed = model.clone();
    lab.change("web", "disk0", &mut changed, &Dice(30).changes(4 * MIB, 10));
    let point = report.point.to_string();
    assert!(restore(&exporter, &point, "web", None).0.is_err(), "without the flag");
    assert_same("untouched", &lab.content("web", "disk0"), &changed);

    lab.create_vm("other", &[MIB]);
    let in_place = |name: &str| RestoreRequest {
        point: point.clone(),
        name: name.to_owned(),
        target: None,
        in_place: true,
    };
    let error = exporter.restore_vm(&in_place("other"), &ignore, &CANCEL).unwrap_err();
    assert!(error.to_string().contains("another VM"), "{error}");

    let cancelled = exporter.restore_vm(&in_place("web"), &ignore, &AtomicBool::new(true));
    assert!(matches!(cancelled, Err(ExportError::Cancelled)), "{cancelled:?}");
    assert_same("still the old one", &lab.content("web", "disk0"), &changed);

    let restored = exporter.restore_vm(&in_place("web"), &ignore, &CANCEL).unwrap();
    assert_eq!(restored.id, original.id);
    assert_eq!(restored.macs, original.macs);
    assert_same("back in place", &lab.content("web", "disk0"), &model);
    assert_eq!(lab.engine.list().unwrap().len(), 2, "nothing is left of the old one");
    let next = backup(&exporter, "web", &[]);
    assert_same("and backed up", &point_content(&exporter, next.point)["disk0"], &model);

    // Of a VM that is gone it is a plain restore with its identity.
    lab.engine.session("web").unwrap().delete().unwrap();
    let restored = exporter.restore_vm(&in_place("web"), &ignore, &CANCEL).unwrap();
    assert_eq!(restored.id, original.id);
    assert_same("made again", &lab.content("web", "disk0"), &model);
}

#[test]
fn a_disk_becomes_a_file_that_other_tools_read() {
    let lab = Lab::new();
    let (exporter, report, model) = backed_up(&lab, 5 * MIB + 512);
    let point = &report.point.to_string()[..8];
    let out = |name: &str| lab.dir.path().join(name);
    let run = |name: &str, format| {
        exporter.restore_disk(point, "disk0", &out(name), format, &ignore, &CANCEL)
    };
    run("raw.img", DiskFormat::Raw).unwrap();
    assert_same("raw", &std::fs::read(out("raw.img")).unwrap(), &model);
    run("disk.vhdx", DiskFormat::Vhdx).unwrap();
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "vhdx", "-O", "raw"])
        .args([out("disk.vhdx"), out("converted.img")])
        .output()
        .unwrap();
    assert!(converted.status.success(), "{}", String::from_utf8_lossy(&converted.stderr));
    assert_same("vhdx", &std::fs::read(out("converted.img")).unwrap()[..model.len()], &model);

    // An existing file is not touched.
    std::fs::write(out("mine"), "precious").unwrap();
    for format in [DiskFormat::Raw, DiskFormat::Vhdx] {
        let error = run("mine", format).unwrap_err().to_string();
        assert!(error.contains("exists already"), "{error}");
    }
    assert_eq!(std::fs::read(out("mine")).unwrap(), b"precious");

    // Cancelled: nothing.
    let cancel = AtomicBool::new(true);
    let before = std::fs::read_dir(lab.dir.path()).unwrap().count();
    let result =
        exporter.restore_disk(point, "disk0", &out("x"), DiskFormat::Raw, &ignore, &cancel);
    assert!(matches!(result, Err(ExportError::Cancelled)), "{result:?}");
    assert_eq!(std::fs::read_dir(lab.dir.path()).unwrap().count(), before);

    let error = exporter
        .restore_disk(point, "disk7", &out("x"), DiskFormat::Raw, &ignore, &CANCEL)
        .unwrap_err()
        .to_string();
    assert!(error.contains("disk7") && error.contains("disk0"), "{error}");
}

#[test]
fn a_restore_point_is_a_read_only_disk_that_nbd_clients_read() {
    let lab = Lab::new();
    let (exporter, report, model) = backed_up(&lab, 4 * MIB);
    let disks = exporter.open_point(&report.point.to_string()).unwrap();
    let (name, disk) = &disks[0];
    assert_eq!(name, "disk0");
    assert!(disk.read_only());
    assert!(disk.write_at(0, &[0; 512]).is_err() && disk.discard(0, 512).is_err());
    assert!(disk.read_at(1, &mut [0; 512]).is_err(), "not sector aligned");
    assert!(disk.read_at(4 * MIB, &mut [0; 512]).is_err(), "outside");
    let mut at = 0;
    for extent in disk.extents(0, 4 * MIB).unwrap() {
        assert_eq!(extent.offset, at, "no gaps");
        at += extent.len;
        if extent.kind != tidemark_disk::ExtentKind::Data {
            let range = extent.offset as usize..at as usize;
            assert!(model[range].iter().all(|b| *b == 0));
        }
    }
    assert_eq!(at, 4 * MIB);

    let socket = lab.dir.path().join("s");
    let server = tidemark_disk::nbd::Server::bind(&socket).unwrap();
    server.add_export(name, disk.clone());
    let url = format!("nbd+unix:///disk0?socket={}", socket.display());
    let copy = lab.dir.path().join("copy.img");
    let copied = Command::new("nbdcopy").arg(&url).arg(&copy).output().unwrap();
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    assert_same("over NBD", &std::fs::read(copy).unwrap(), &model);
}

#[test]
fn points_are_found_by_id_prefix_and_latest() {
    let lab = Lab::new();
    let (exporter, first, _) = backed_up(&lab, MIB);
    let second = backup(&exporter, "web", &["first"]);
    let id = second.point.to_string();
    for text in [&id[..], &id[..8], &id.replace('-', "")[..10], "latest:web"] {
        assert_eq!(exporter.find(text, None).unwrap().manifest.point, second.point, "{text}");
    }
    let found = exporter.find(&first.point.to_string(), None).unwrap();
    assert_eq!(found.targets, ["first", "second"]);
    assert!(matches!(exporter.find(&id, Some("second")), Err(ExportError::NoSuchPoint(_))));
    let found = exporter.find("latest:web", Some("second")).unwrap();
    assert_eq!(found.manifest.point, first.point);
    assert!(matches!(exporter.find("latest:nobody", None), Err(ExportError::NoSuchPoint(_))));
    assert!(matches!(exporter.find("abc", None), Err(ExportError::Invalid(_))));
}
