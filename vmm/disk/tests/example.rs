//! The example of docs/disk.md runs.

#[path = "../examples/disk_life.rs"]
#[allow(dead_code)]
mod disk_life;

#[test]
fn the_example_of_the_guide_runs() {
    disk_life::main().unwrap();
}
