//! Clients that lie, flood, stall or die: each loses its own connection and nothing else.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::protocol::Bare;
use super::{Fixture, MemDisk, Seeded, eventually};
use crate::block::Block;
use crate::nbd::Client;
use crate::nbd::proto::{OPTION_MAGIC, REQUEST_MAGIC, cmd, errno, opt, rep};

const MIB: usize = 1 << 20;

fn still_serves(fixture: &Fixture) {
    let client = Client::connect(&fixture.socket, "disk").unwrap();
    client.read_at(0, &mut [0; 512]).unwrap();
}

#[test]
fn garbage_never_harms_the_server() {
    let content = Seeded(3).bytes(MIB);
    let fixture = Fixture::new(MemDisk::filled(&content, 512));
    let mut random = Seeded(42);
    for round in 0..300 {
        let mut stream = UnixStream::connect(&fixture.socket).unwrap();
        let mut message = Vec::new();
        if round % 3 > 0 {
            message.extend((random.below(4) as u32).to_be_bytes());
        }
        if round % 3 > 1 {
            // Options that are right at the start and wild in the middle.
            for _ in 0..random.below(4) {
                message.extend(OPTION_MAGIC.to_be_bytes());
                message.extend((random.below(12) as u32).to_be_bytes());
                let len = random.below(40) as usize;
                message.extend((len as u32).to_be_bytes());
                let mut data = random.bytes(len);
                data.iter_mut().take(3).for_each(|byte| *byte = 0);
                message.extend(data);
            }
        }
        let len = random.below(600) as usize;
        message.extend(random.bytes(len));
        // The server may hang up in the middle of it.
        let _ = stream.write_all(&message);
    }
    eventually("all of them are gone", || fixture.server.connections() == 0);
    still_serves(&fixture);
    assert!(fixture.disk.content() == content);
}

#[test]
fn garbage_requests_in_transmission_end_that_connection_only() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut random = Seeded(7);
    for _ in 0..100 {
        let mut bare = Bare::enter(&fixture);
        for _ in 0..random.below(5) {
            let mut head = REQUEST_MAGIC.to_be_bytes().to_vec();
            head.extend((random.below(40) as u16).to_be_bytes());
            // Everything but writes and zeroing, which could be right by chance.
            let command =
                [cmd::READ, cmd::FLUSH, cmd::BLOCK_STATUS, 5, 8, 40][random.below(6) as usize];
            head.extend(command.to_be_bytes());
            head.extend(random.bytes(20));
            let _ = bare.0.write_all(&head);
        }
        let _ = bare.0.write_all(&random.bytes(64));
    }
    eventually("all of them are gone", || fixture.server.connections() == 0);
    still_serves(&fixture);
    assert!(fixture.disk.content().iter().all(|&b| b == 0));
}

#[test]
fn oversize_requests_are_refused_and_their_payload_passed_over() {
    let fixture = Fixture::new(MemDisk::new(48 * MIB, 512));
    let mut bare = Bare::enter(&fixture);
    let too_long = (32 << 20) + 512;
    bare.request(0, cmd::WRITE, 0, too_long);
    bare.0.write_all(&vec![1; too_long as usize]).unwrap();
    assert_eq!(bare.error(), errno::EINVAL);
    bare.request(0, cmd::READ, 0, too_long);
    assert_eq!(bare.error(), errno::EINVAL);
    bare.request(0, cmd::WRITE, 0, 32 << 20);
    bare.0.write_all(&vec![2; 32 << 20]).unwrap();
    assert_eq!(bare.error(), 0);
    assert!(fixture.disk.content()[..32 << 20].iter().all(|&b| b == 2));
}

#[test]
fn option_floods_and_giant_options_end_the_handshake() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut bare = Bare::greet(&fixture);
    for _ in 0..64 {
        bare.option(opt::LIST, &[]);
        while bare.answer().0 != rep::ACK {}
    }
    assert_eq!(bare.0.read(&mut [0; 1]).unwrap(), 0);

    let mut bare = Bare::greet(&fixture);
    let mut head = OPTION_MAGIC.to_be_bytes().to_vec();
    head.extend(opt::GO.to_be_bytes());
    head.extend(u32::MAX.to_be_bytes());
    bare.0.write_all(&head).unwrap();
    assert_eq!(bare.answer().0, rep::ERR_TOO_BIG);
    assert_eq!(bare.0.read(&mut [0; 1]).unwrap(), 0);
    still_serves(&fixture);
}

#[test]
fn more_clients_than_allowed_are_turned_away() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let clients: Vec<_> = (0..64).map(|_| Bare::enter(&fixture)).collect();
    assert_eq!(UnixStream::connect(&fixture.socket).unwrap().read(&mut [0; 1]).unwrap(), 0);
    drop(clients);
    eventually("they are gone", || fixture.server.connections() == 0);
    still_serves(&fixture);
}

#[test]
fn a_client_that_dies_inside_a_write_changes_nothing() {
    let fixture = Fixture::new(MemDisk::filled(&vec![4; MIB], 512));
    let mut bare = Bare::enter(&fixture);
    bare.request(0, cmd::WRITE, 0, 65536);
    bare.0.write_all(&[9; 65535]).unwrap();
    drop(bare);
    eventually("it is gone", || fixture.server.connections() == 0);
    assert!(fixture.disk.content() == vec![4; MIB]);
    still_serves(&fixture);
}

#[test]
fn a_client_that_never_reads_its_replies_stalls_nobody_else() {
    let fixture = Fixture::new(MemDisk::new(48 * MIB, 512));
    let mut greedy = Bare::enter(&fixture);
    greedy.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..20 {
        greedy.request(0, cmd::READ, 0, 32 << 20);
    }
    still_serves(&fixture);
    fixture.server.remove_export("disk");
    assert_eq!(fixture.server.connections(), 0);
}

#[test]
fn a_panic_in_the_disk_ends_the_connection_instead_of_hanging_the_client() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    fixture.disk.panic_on_flush.store(true, Ordering::Relaxed);
    let client = Client::connect(&fixture.socket, "disk").unwrap();
    assert!(client.flush().is_err());
    fixture.disk.panic_on_flush.store(false, Ordering::Relaxed);
    still_serves(&fixture);
}
