//! Random histories of a stopped VM against a model that keeps whole disks in memory.

use super::*;

/// What a VM should hold.
#[derive(Default)]
struct Model {
    now: Vec<Vec<u8>>,
    checkpoints: Vec<(String, Vec<Vec<u8>>)>,
}

impl Model {
    fn assert_equal(&self, session: &VmSession<'_>, seed: u64, step: usize) {
        for (i, now) in self.now.iter().enumerate() {
            assert!(&content(session, &format!("disk{i}")) == now, "seed {seed} step {step}");
        }
        let names: Vec<_> = session.config().checkpoints.iter().map(|c| &c.name).collect();
        assert_eq!(names, self.checkpoints.iter().map(|(n, _)| n).collect::<Vec<_>>());
        for (name, disks) in &self.checkpoints {
            for (i, disk) in disks.iter().enumerate() {
                let found = checkpoint_content(session, name, i);
                assert!(&found == disk, "seed {seed} step {step} checkpoint {name} disk{i}");
            }
        }
    }
}

fn history(seed: u64, steps: usize) {
    let fixture = Fixture::with_vm(2);
    let mut random = Random(seed);
    let mut model = Model { now: vec![vec![0; SIZE as usize]; 2], ..Model::default() };
    let mut session = fixture.session();
    for step in 0..steps {
        match random.next(10) {
            0..=4 => {
                let disk = random.next(2);
                let len = 512 * (1 + random.next(600));
                let at = 512 * random.next((SIZE - len) / 512);
                let bytes = vec![1 + random.next(255) as u8; len as usize];
                write(&session, &format!("disk{disk}"), at, &bytes);
                model.now[disk as usize][at as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            5 => {
                let disk = random.next(2);
                let at = (2 << 20) * random.next(4);
                let chain = session.open_disk(&format!("disk{disk}"), Access::ReadWrite).unwrap();
                chain.write_zeroes(at, 2 << 20, true).unwrap();
                chain.close().unwrap();
                model.now[disk as usize][at as usize..][..2 << 20].fill(0);
            }
            6 | 7 if model.checkpoints.len() < 5 => {
                let name = format!("c{step}");
                take(&mut session, &name);
                model.checkpoints.push((name, model.now.clone()));
            }
            6..=8 if !model.checkpoints.is_empty() => {
                let at = random.next(model.checkpoints.len() as u64) as usize;
                let (name, _) = model.checkpoints.remove(at);
                delete(&mut session, &name).unwrap();
            }
            _ => {
                drop(session);
                session = fixture.session();
            }
        }
        if step % 8 == 7 {
            model.assert_equal(&session, seed, step);
        }
    }
    model.assert_equal(&session, seed, steps);
    assert_tidy(&fixture, &session);
}

#[test]
fn histories_1() {
    history(1, 48);
}

#[test]
fn histories_2() {
    history(0xdead_beef, 48);
}

#[test]
fn histories_3() {
    history(77_777, 48);
}
