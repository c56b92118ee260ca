//! Importing images of every format, each against the same content.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::EngineError;

fn qemu_img(args: &[&dyn AsRef<std::ffi::OsStr>]) {
    let mut command = Command::new("qemu-img");
    args.iter().for_each(|a| {
        command.arg(a.as_ref());
    });
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A raw image with data at both ends and in between, a hole, and stored zeros.
fn raw_image(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 5 << 20];
    let mut random = Random(42);
    for at in [0, 1_000_000, 3 << 20, (5 << 20) - 70_000] {
        bytes[at..at + 70_000].fill_with(|| random.next(256) as u8);
    }
    std::fs::write(path, &bytes).unwrap();
    bytes
}

fn import(fixture: &Fixture, name: &str, image: &Path) -> crate::Result<Vec<u8>> {
    let request = CreateVm { disks: vec![NewDisk::Import(image.to_owned())], ..request(name, 0) };
    let never = AtomicBool::new(false);
    fixture.engine.create(&request, &|_, done, total| assert!(done <= total), &never)?;
    let session = fixture.engine.session(name).unwrap();
    Ok(content(&session, "disk0"))
}

#[test]
fn every_format_is_imported_with_its_content() {
    let fixture = Fixture::new();
    let raw = fixture.path().join("image.raw");
    let bytes = raw_image(&raw);
    assert!(import(&fixture, "raw", &raw).unwrap() == bytes);
    for format in ["qcow2", "vmdk", "vdi", "vhdx"] {
        let image = fixture.path().join(format!("image.{format}"));
        qemu_img(&[&"convert", &"-f", &"raw", &"-O", &format, &raw, &image]);
        assert!(import(&fixture, format, &image).unwrap() == bytes, "{format}");
        // Whatever it is called.
        let renamed = fixture.path().join(format!("{format}.img"));
        std::fs::rename(&image, &renamed).unwrap();
        assert!(import(&fixture, &format!("{format}-2"), &renamed).unwrap() == bytes, "{format}");
    }
    let left: Vec<_> = crate::folder::entries(&fixture.path().join("vms/qcow2/disks")).unwrap();
    assert_eq!(left, ["disk0.vhdx", "disk0.vhdx.mrt", "disk0.vhdx.rct"]);
}

#[test]
fn imported_disks_have_ids_of_their_own() {
    use tidemark_disk::vhdx::Vhdx;
    let fixture = Fixture::with_vm(1);
    let first = fixture.vm_path("disks/disk0.vhdx");
    import(&fixture, "copy", &first).unwrap();
    let id = |p: &Path| Vhdx::open(p, Access::ReadOnly).unwrap().properties().disk_id;
    assert_ne!(id(&first), id(&fixture.path().join("vms/copy/disks/disk0.vhdx")));
}

#[test]
fn a_raw_image_with_half_a_sector_is_filled_up() {
    let fixture = Fixture::new();
    let raw = fixture.path().join("odd.img");
    std::fs::write(&raw, vec![7; (1 << 20) + 100]).unwrap();
    let disk = import(&fixture, "odd", &raw).unwrap();
    assert_eq!(disk.len(), (1 << 20) + 512);
    assert!(disk[..(1 << 20) + 100].iter().all(|b| *b == 7));
    assert!(disk[(1 << 20) + 100..].iter().all(|b| *b == 0));
}

#[test]
fn images_that_cannot_be_imported_say_why_and_leave_nothing() {
    let fixture = Fixture::new();
    let path = |name: &str| fixture.path().join(name);
    let base = path("base.qcow2");
    qemu_img(&[&"create", &"-f", &"qcow2", &base, &"8M"]);
    let overlay = path("overlay.qcow2");
    qemu_img(&[&"create", &"-f", &"qcow2", &"-F", &"qcow2", &"-b", &base, &overlay]);
    std::fs::write(path("cut.qcow2"), b"QFI").unwrap();
    std::fs::write(path("torn.qcow2"), &std::fs::read(&base).unwrap()[..4096]).unwrap();
    std::fs::write(path("tiny.raw"), b"x").unwrap();
    std::fs::write(path("cut.vhdx"), b"vhdxfile, but no more").unwrap();
    let cases = [
        ("overlay.qcow2", "base.qcow2"),
        ("cut.qcow2", "does not begin like one"),
        ("torn.qcow2", "torn.qcow2"),
        ("tiny.raw", "1 MiB"),
        ("cut.vhdx", "cut.vhdx"),
        ("missing.raw", "missing.raw"),
    ];
    for (image, said) in cases {
        let error = import(&fixture, "vm", &path(image)).map(drop).unwrap_err();
        assert!(error.to_string().contains(said), "{image}: {error}");
        assert!(!matches!(error, EngineError::VmExists(_)));
    }
    assert!(fixture.engine.list().unwrap().is_empty());
    assert_eq!(crate::folder::entries(&fixture.path().join("vms")).unwrap(), [".create.lock"]);
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    let fixture = Fixture::new();
    let raw = fixture.path().join("image.raw");
    raw_image(&raw);
    let qcow2 = fixture.path().join("image.qcow2");
    qemu_img(&[&"convert", &"-f", &"raw", &"-O", &"qcow2", &raw, &qcow2]);
    for image in [&raw, &qcow2] {
        let request = CreateVm { disks: vec![NewDisk::Import(image.clone())], ..request("vm", 0) };
        // At the first sign of progress.
        let cancel = AtomicBool::new(false);
        let tell = |_: &str, _, _| cancel.store(true, std::sync::atomic::Ordering::Relaxed);
        let cancelled = fixture.engine.create(&request, &tell, &cancel);
        assert!(matches!(cancelled, Err(EngineError::Cancelled)), "{cancelled:?}");
        let left = crate::folder::entries(&fixture.path().join("vms")).unwrap();
        assert_eq!(left, [".create.lock"]);
    }
}
