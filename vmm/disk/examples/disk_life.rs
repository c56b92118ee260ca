//! A disk's life with the library: create, write, checkpoint, ask what changed, grow, merge, compact.
//!
//!     cargo run -p tidemark-disk --example disk_life
//!
//! docs/disk.md walks through it; the test suite runs it.

use std::error::Error;
use std::sync::atomic::AtomicBool;

use tidemark_disk::Block;
use tidemark_disk::chain::{self, Chain};
use tidemark_disk::vhdx::{self, Access, CreateOptions};

const MIB: u64 = 1 << 20;

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let base = folder.path().join("disk.vhdx");
    let leaf = folder.path().join("disk_1.avhdx");

    // An empty dynamic disk with its change tracking (disk.vhdx, .rct, .mrt).
    let options = CreateOptions {
        size: 64 * MIB,
        block_size: vhdx::default_block_size(64 * MIB),
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        disk_id: None,
        parent: None,
    };
    Chain::create(&base, &options)?;

    // Write. Only `flush` promises that the data outlives a power cut.
    let disk = Chain::open(&base, Access::ReadWrite)?;
    disk.write_at(0, &[1; 4096])?;
    disk.flush()?;

    // A checkpoint: the slow part first, then an instant without I/O, then the rest.
    disk.prepare_leaf(&leaf)?;
    let id = {
        let pause = disk.pause();
        disk.switch_leaf(&pause, &leaf)?
    };
    disk.settle()?;

    // From here on writes go to the leaf, and the id knows which they were.
    disk.write_at(10 * MIB, &[2; 4096])?;
    let changed = disk.changed_since(&id)?;
    println!("changed since {id}: {changed:?}");
    assert_eq!(changed.len(), 1);
    assert!(changed[0].contains(&(10 * MIB)));
    disk.close()?;

    // Nobody has the disk open: its leaf can grow. Ids stay good; what was added counts as changed.
    let resized = chain::resize(&leaf, 80 * MIB, false)?;
    println!("{} bytes, were {}; tracking {:?}", resized.after, resized.before, resized.continuity);

    // Fold the leaf into its parent, which grows for it, and give unused space back.
    let go = AtomicBool::new(false);
    chain::merge_down(&leaf, 1, false, &|_, _| (), &go)?;
    let compacted = chain::compact(&base, true, false, &|_| (), &go)?;
    println!("file of {} bytes, was {}", compacted.length_after, compacted.length_before);

    let disk = Chain::open(&base, Access::ReadOnly)?;
    let mut found = [0; 4096];
    disk.read_at(10 * MIB, &mut found)?;
    assert_eq!((found, disk.geometry().size, disk.files().len()), ([2; 4096], 80 * MIB, 1));
    assert!(disk.changed_since(&id)?.iter().any(|r| r.contains(&(10 * MIB))));
    assert!(vhdx::check(&base)?.problems.is_empty());
    Ok(())
}
