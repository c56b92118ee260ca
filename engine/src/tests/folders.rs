//! VM folders: creation, listing, deletion, locks, damage.

use super::*;
use crate::{EngineError, VmConfig};

#[test]
fn a_created_vm_is_listed_and_deleted() {
    let fixture = Fixture::with_vm(2);
    let all = fixture.engine.list().unwrap();
    assert_eq!(all.len(), 1);
    let config = &all[0].config;
    assert_eq!((config.name.as_str(), config.disks.len()), ("vm", 2));
    assert_eq!(all[0].state, tidemark_driver::MachineState::Stopped);
    assert!(all[0].pending.is_none());
    assert!(config.macs[0].starts_with("52:54:00:"));
    let session = fixture.session();
    assert_tidy(&fixture, &session);
    session.delete().unwrap();
    assert!(fixture.engine.list().unwrap().is_empty());
    assert_eq!(crate::folder::entries(&fixture.path().join("vms")).unwrap(), [".create.lock"]);
    assert!(matches!(fixture.engine.session("vm"), Err(EngineError::NoSuchVm(_))));
}

#[test]
fn new_disks_are_sound_for_other_tools() {
    let fixture = Fixture::with_vm(1);
    let disk = fixture.vm_path("disks/disk0.vhdx");
    let check = std::process::Command::new("qemu-img").arg("check").arg(&disk).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
}

#[test]
fn names_that_would_leave_the_folder_are_refused() {
    let fixture = Fixture::new();
    for name in ["", ".", "..", ".x", "-x", "a/b", "a b", "ä", &"x".repeat(65), "x\n"] {
        let made = fixture.engine.create(&request(name, 1), &|_, _, _| {}, &AtomicBool::new(false));
        assert!(matches!(made, Err(EngineError::Invalid(_))), "{name:?}");
        assert!(matches!(fixture.engine.show(name), Err(EngineError::NoSuchVm(_))), "{name:?}");
    }
    let longest = "x".repeat(64);
    fixture.engine.create(&request(&longest, 1), &|_, _, _| {}, &AtomicBool::new(false)).unwrap();
    let again =
        fixture.engine.create(&request(&longest, 1), &|_, _, _| {}, &AtomicBool::new(false));
    assert!(matches!(again, Err(EngineError::VmExists(_))));
}

#[test]
fn numbers_that_make_no_vm_are_refused() {
    let fixture = Fixture::new();
    let wrong = [
        CreateVm { cpus: 0, ..request("vm", 1) },
        CreateVm { memory: 1, ..request("vm", 1) },
        CreateVm { disks: Vec::new(), ..request("vm", 1) },
        CreateVm { disks: vec![NewDisk::Empty(0)], ..request("vm", 1) },
        CreateVm { disks: vec![NewDisk::Empty((1 << 20) + 1)], ..request("vm", 1) },
        CreateVm { disks: vec![NewDisk::Empty((64 << 40) + 512)], ..request("vm", 1) },
        CreateVm { initrd: Some("/etc/hostname".into()), ..request("vm", 1) },
        CreateVm { driver: DriverKind::Kvm, ..request("vm", 1) },
    ];
    for request in wrong {
        let made = fixture.engine.create(&request, &|_, _, _| {}, &AtomicBool::new(false));
        assert!(matches!(made, Err(EngineError::Invalid(_))), "{request:?} {made:?}");
    }
    let missing = CreateVm { kernel: Some("/no/kernel".into()), ..request("vm", 1) };
    let error = fixture
        .engine
        .create(&missing, &|_, _, _| {}, &AtomicBool::new(false))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/no/kernel"), "{error}");
    assert!(fixture.engine.list().unwrap().is_empty());
}

#[test]
fn two_sessions_of_one_vm_exclude_each_other() {
    let fixture = Fixture::with_vm(1);
    let session = fixture.session();
    let other = open(fixture.path());
    assert!(matches!(other.session("vm"), Err(EngineError::Busy(_))));
    assert!(other.show("vm").is_ok(), "looking needs no session");
    drop(session);
    assert!(other.session("vm").is_ok());
}

#[test]
fn i7_a_damaged_configuration_is_reported_with_its_file() {
    let fixture = Fixture::with_vm(1);
    fixture.engine.create(&request("good", 1), &|_, _, _| {}, &AtomicBool::new(false)).unwrap();
    let path = fixture.vm_path("vm.vmcx");
    let good = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, good.replace("\"cpus\": 1", "\"cpus\": 2")).unwrap();
    let error = fixture.engine.session("vm").err().unwrap().to_string();
    assert!(error.contains("vm.vmcx") && error.contains("checksum"), "{error}");
    let all = fixture.engine.list().unwrap();
    assert_eq!(all.len(), 2, "the others are still listed, and so is this one");
    let vm = all.iter().find(|v| v.config.name == "vm").unwrap();
    assert!(vm.pending.as_ref().unwrap().contains("checksum"));
}

#[test]
fn a_configuration_cannot_point_outside_its_folder() {
    let fixture = Fixture::with_vm(1);
    let path = fixture.vm_path("vm.vmcx");
    for bad in ["../../other/disks/disk0.vhdx", "/etc/passwd", ".hidden", ""] {
        let mut config = VmConfig::load(&path).unwrap();
        config.disks[0].leaf = bad.to_owned();
        assert!(config.check().is_err(), "{bad}");
        // Even with a right checksum.
        crate::store::write(&fixture.vm_path("evil.vmcx"), "tidemark-vmcx", 1, &config).unwrap();
        let read = VmConfig::load(&fixture.vm_path("evil.vmcx"));
        assert!(matches!(read, Err(EngineError::Damaged { .. })), "{bad}");
    }
}

#[test]
fn a_folder_that_somebody_is_building_is_left_alone() {
    let fixture = Fixture::new();
    let vms = fixture.path().join("vms");
    let (folder, lock) = crate::folder::VmFolder::begin(&vms).unwrap();
    drop(open(fixture.path()));
    assert!(folder.root().exists());
    drop(lock);
    std::fs::create_dir(vms.join(".deleted-x")).unwrap();
    drop(open(fixture.path()));
    assert_eq!(crate::folder::entries(&vms).unwrap(), [".create.lock"]);
}

#[test]
fn what_needs_a_running_machine_says_so() {
    let fixture = Fixture::with_vm(1);
    let mut session = fixture.session();
    assert!(matches!(session.stop(false, Duration::ZERO), Err(EngineError::State(_))));
    let exec = fixture.engine.exec("vm", "true", &[], None, Duration::from_secs(1));
    assert!(exec.unwrap_err().to_string().contains("not running"));
    assert!(fixture.engine.wait_agent("vm", Duration::from_secs(1)).is_err());
}
