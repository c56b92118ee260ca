use super::*;
use std::sync::Arc;
use tempfile::TempDir;
use tidemark_disk::Block as _;
use tidemark_disk::chain::Chain;
use tidemark_disk::rct::RctId;
use tidemark_disk::vhdx::{Access, CreateOptions, Vhdx};
use tidemark_driver::DriverKind;
use tidemark_engine::CheckpointDisk;

const SIZE: u64 = 4 * 1024 * 1024;

fn rct_id() -> RctId {
    RctId { lineage: Uuid::new_v4(), epoch: 1, seal: Uuid::new_v4() }
}

/// A disk with one sealed moment and a write after it, open as a checkpoint's.
fn disk() -> (TempDir, RctId, OpenCheckpointDisk) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk0.vhdx");
    let options = CreateOptions {
        size: SIZE,
        block_size: 1 << 20,
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    };
    Vhdx::create(&path, &options).unwrap();
    let chain = Arc::new(Chain::open(&path, Access::ReadWrite).unwrap());
    let leaf = dir.path().join("leaf.avhdx");
    chain.prepare_leaf(&leaf).unwrap();
    let sealed = chain.switch_leaf(&chain.pause(), &leaf).unwrap();
    chain.write_at(3 * 65536, &[7; 512]).unwrap();
    let disk = chain.clone() as Arc<dyn tidemark_disk::Block>;
    let open = OpenCheckpointDisk { name: "disk0".to_owned(), rct_id: rct_id(), disk, chain };
    (dir, sealed, open)
}

fn base(name: &str, size: u64, rct_id: RctId) -> Base {
    let root = DiskRoot { size, page: "0".repeat(64), levels: 1 };
    let checkpoint = CheckpointRecord {
        id: Uuid::new_v4(),
        name: "c".to_owned(),
        created: "2026-01-01T00:00:00Z".to_owned(),
        checkpoint_type: CheckpointType::Production,
        purpose: CheckpointPurpose::Backup,
        consistency: Consistency::Offline,
        disks: vec![CheckpointDisk { name: name.to_owned(), file: "f".to_owned(), rct_id }],
        freeze_us: 0,
        pause_us: 0,
    };
    let vm = VmConfig {
        name: "web".to_owned(),
        id: Uuid::new_v4(),
        generation_id: Uuid::new_v4(),
        driver: DriverKind::Qemu,
        cpus: 1,
        memory: 1 << 28,
        kernel: None,
        initrd: None,
        cmdline: None,
        macs: Vec::new(),
        disks: Vec::new(),
        checkpoints: Vec::new(),
    };
    Base {
        manifest: Manifest {
            point: Uuid::new_v4(),
            group: vm.id,
            created: checkpoint.created.clone(),
            disks: vec![PointDisk { name: name.to_owned(), root }],
            files: Vec::new(),
            stats: WriteStats::default(),
            facts: serde_json::Value::Null,
        },
        facts: PointFacts {
            version: FACTS_VERSION,
            vm,
            checkpoint,
            disks: Vec::new(),
            sectors: Vec::new(),
            parent: None,
        },
    }
}

#[test]
fn a_known_disk_is_read_where_it_changed() {
    let (_dir, sealed, open) = disk();
    let base = base("disk0", SIZE, sealed);
    let (since, _, areas) = changed(&open, &base).unwrap();
    assert_eq!(since, base.manifest.point);
    let mut expected = ChunkSet::new(SIZE);
    expected.add(&(3 * 65536..4 * 65536));
    assert_eq!(areas, Areas::Changed(expected));
}

#[test]
fn a_new_disk_a_resized_one_and_a_foreign_id_are_read_in_full() {
    let (_dir, sealed, open) = disk();
    for (base, reason) in [
        (base("disk1", SIZE, sealed.clone()), "not part of restore point"),
        (base("disk0", SIZE / 2, sealed.clone()), "size changed from 2097152 to 4194304"),
        (base("disk0", 2 * SIZE, sealed.clone()), "size changed from 8388608 to 4194304"),
        (base("disk0", SIZE, rct_id()), "change tracking"),
        (base("disk0", SIZE, RctId { seal: Uuid::new_v4(), ..sealed }), "change tracking"),
    ] {
        let told = changed(&open, &base).unwrap_err();
        assert!(told.contains(reason), "{told}");
    }
}
