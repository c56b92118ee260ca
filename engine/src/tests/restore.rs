//! A VM made from a restore point.

use std::path::Path;

use tidemark_disk::Geometry;
use tidemark_disk::vhdx::Vhdx;
use uuid::Uuid;

use super::*;
use crate::{EngineError, RestoreVm, VmConfig};

fn geometry() -> Geometry {
    Geometry { size: SIZE, logical_sector: 512, physical_sector: 4096 }
}

fn restore(config: &VmConfig, name: &str) -> RestoreVm {
    RestoreVm {
        name: name.to_owned(),
        config: config.clone(),
        disks: config.disks.iter().map(|d| (d.name.clone(), geometry())).collect(),
        boot: Vec::new(),
        keep_identity: false,
    }
}

fn names(fixture: &Fixture) -> Vec<String> {
    fixture.engine.list().unwrap().into_iter().map(|v| v.config.name).collect()
}

#[test]
fn i4_a_restored_vm_is_visible_only_when_it_is_whole() {
    let fixture = Fixture::with_vm(2);
    let config = fixture.session().config().clone();
    let new = fixture.engine.begin_restore(&restore(&config, "copy")).unwrap();
    new.disks[0].1.write_at(0, &[1; 4096]).unwrap();
    assert_eq!(names(&fixture), ["vm"]);
    drop(new);
    assert_eq!(
        crate::folder::entries(&fixture.path().join("vms")).unwrap(),
        [".create.lock", "vm"]
    );
    let new = fixture.engine.begin_restore(&restore(&config, "copy")).unwrap();
    new.disks[1].1.write_at(65536, &[2; 4096]).unwrap();
    let made = new.commit().unwrap();
    assert_eq!(made.name, "copy");
    assert_eq!(names(&fixture), ["copy", "vm"]);
    let session = fixture.engine.session("copy").unwrap();
    assert_eq!(&content(&session, "disk1")[65536..][..4096], [2; 4096]);
    assert!(session.config() == &made);
}

#[test]
fn a_restored_vm_is_another_one_unless_it_takes_the_old_ones_place() {
    let fixture = Fixture::with_vm(1);
    let mut session = fixture.session();
    take(&mut session, "c");
    let config = session.config().clone();
    drop(session);
    let disk_id = |name: &str| {
        let path = fixture.path().join("vms").join(name).join("disks/disk0.vhdx");
        Vhdx::open(&path, Access::ReadOnly).unwrap().properties().disk_id
    };
    let copy = fixture.engine.begin_restore(&restore(&config, "copy")).unwrap().commit().unwrap();
    assert_ne!(copy.id, config.id);
    assert_ne!(copy.generation_id, config.generation_id);
    assert_ne!(copy.macs, config.macs);
    assert_ne!(disk_id("copy"), disk_id("vm"));
    assert!(copy.checkpoints.is_empty());
    let same = RestoreVm { keep_identity: true, ..restore(&config, "same") };
    let same = fixture.engine.begin_restore(&same).unwrap().commit().unwrap();
    assert_eq!((same.id, &same.macs), (config.id, &config.macs));
    assert_ne!(same.generation_id, config.generation_id, "the guest has gone back in time");
    assert_eq!(disk_id("same"), disk_id("vm"));
}

#[test]
fn boot_files_come_back_with_the_vm() {
    let fixture = Fixture::new();
    let kernel = fixture.path().join("some-kernel");
    std::fs::write(&kernel, b"kernel").unwrap();
    let with_kernel = CreateVm {
        kernel: Some(kernel.clone()),
        initrd: Some(kernel.clone()),
        cmdline: Some("console=ttyS0".to_owned()),
        ..request("vm", 1)
    };
    let config =
        fixture.engine.create(&with_kernel, &|_, _, _| {}, &AtomicBool::new(false)).unwrap();
    std::fs::remove_file(&kernel).unwrap();
    let session = fixture.session();
    let boot: Vec<_> = session
        .boot_files()
        .into_iter()
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect();
    assert_eq!(boot.len(), 2);
    let lacking = fixture.engine.begin_restore(&restore(&config, "copy")).err().unwrap();
    assert!(lacking.to_string().contains("boot file"), "{lacking}");
    let whole = RestoreVm { boot, ..restore(&config, "copy") };
    fixture.engine.begin_restore(&whole).unwrap().commit().unwrap();
    let copied = fixture.path().join("vms/copy/boot").join(config.kernel.unwrap());
    assert_eq!(std::fs::read(copied).unwrap(), b"kernel");
}

#[test]
fn i7_a_hostile_restore_point_cannot_write_outside_the_new_folder() {
    let fixture = Fixture::with_vm(1);
    let config = fixture.session().config().clone();
    let good = || restore(&config, "copy");
    let with = |change: &dyn Fn(&mut RestoreVm)| {
        let mut request = good();
        change(&mut request);
        request
    };
    let hostile = [
        with(&|r| r.disks[0].0 = "../../../evil".to_owned()),
        with(&|r| r.disks[0].1.size = 0),
        with(&|r| r.disks[0].1.size = u64::MAX),
        with(&|r| r.disks[0].1.logical_sector = 77),
        with(&|r| r.disks.clear()),
        with(&|r| r.disks = vec![r.disks[0].clone(), r.disks[0].clone()]),
        with(&|r| r.boot = vec![("../x".to_owned(), Vec::new())]),
        with(&|r| r.config.kernel = Some("../../x".to_owned())),
        with(&|r| {
            r.keep_identity = true;
            r.config.macs = vec!["x,script=/evil".to_owned()];
        }),
        with(&|r| r.config.macs = vec!["52:54:00:00:00:01".to_owned(); 1000]),
        with(&|r| r.name = "../x".to_owned()),
    ];
    for request in hostile {
        let refused = fixture.engine.begin_restore(&request).err().unwrap();
        assert!(matches!(refused, EngineError::Invalid(_)), "{refused}");
    }
    let taken = fixture.engine.begin_restore(&restore(&config, "vm")).err().unwrap();
    assert!(matches!(taken, EngineError::VmExists(_)));
    assert_eq!(names(&fixture), ["vm"]);
}

#[test]
fn two_restores_of_one_name_give_one_vm() {
    let fixture = Fixture::with_vm(1);
    let config = fixture.session().config().clone();
    let first = fixture.engine.begin_restore(&restore(&config, "copy")).unwrap();
    let second = fixture.engine.begin_restore(&restore(&config, "copy")).unwrap();
    let made = first.commit().unwrap();
    assert!(matches!(second.commit(), Err(EngineError::VmExists(_))));
    assert_eq!(fixture.engine.show("copy").unwrap().config.id, made.id);
    assert!(Path::new(&fixture.path().join("vms/copy/vm.vmcx")).exists());
    assert_ne!(made.id, Uuid::nil());
}
