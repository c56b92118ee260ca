//! Many connections and many requests in flight.

use std::io::{Read, Write};
use std::thread;

use super::protocol::Bare;
use super::{Fixture, MemDisk, Seeded};
use crate::block::Block;
use crate::nbd::Client;
use crate::nbd::proto::{REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, cmd};

const MIB: u64 = 1 << 20;

#[test]
fn concurrent_random_writes_over_many_connections_all_land() {
    let fixture = Fixture::new(MemDisk::new(16 << 20, 512));
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..8)
            .map(|number: u64| {
                let socket = &fixture.socket;
                scope.spawn(move || {
                    let client = Client::connect(socket, "disk").unwrap();
                    let base = number * 2 * MIB;
                    let mut model = vec![0; 2 << 20];
                    let mut random = Seeded(number);
                    for _ in 0..60 {
                        let at = random.below(4000) * 512;
                        let len = 512 * (1 + random.below(64)).min((2 * MIB - at) / 512);
                        let data = random.bytes(len as usize);
                        client.write_at(base + at, &data).unwrap();
                        model[at as usize..][..data.len()].copy_from_slice(&data);
                    }
                    model
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    assert!(fixture.disk.content() == models.concat());
}

#[test]
fn unaligned_neighbours_on_two_connections_lose_no_byte() {
    let fixture = Fixture::new(MemDisk::new(8192, 4096));
    // Each writes its own half of the same sectors, byte-granular, again and again.
    thread::scope(|scope| {
        for half in 0..2u64 {
            let mut bare = Bare::enter(&fixture);
            scope.spawn(move || {
                for round in 0..120u64 {
                    let value = round as u8;
                    bare.request(0, cmd::WRITE, half * 3000 + 100, 3000);
                    bare.0.write_all(&[value; 3000]).unwrap();
                    assert_eq!(bare.error(), 0);
                    bare.request(0, cmd::READ, half * 3000 + 100, 3000);
                    assert_eq!(bare.error(), 0);
                    assert_eq!(bare.array::<3000>(), [value; 3000]);
                }
            });
        }
    });
}

#[test]
fn deep_pipelines_are_answered_completely_in_any_order() {
    let fixture = Fixture::new(MemDisk::filled(&Seeded(5).bytes(4 << 20), 512));
    let content = fixture.disk.content();
    let bare = Bare::enter(&fixture);
    let mut reading = bare.0.try_clone().unwrap();
    let mut writing = bare.0;
    const REQUESTS: u64 = 2000;
    thread::scope(|scope| {
        scope.spawn(move || {
            for cookie in 0..REQUESTS {
                let mut head = REQUEST_MAGIC.to_be_bytes().to_vec();
                head.extend([0, 0, 0, 0]);
                head.extend(cookie.to_be_bytes());
                head.extend((cookie % 1000 * 4096).to_be_bytes());
                head.extend(4096u32.to_be_bytes());
                writing.write_all(&head).unwrap();
            }
        });
        let mut seen = vec![false; REQUESTS as usize];
        for _ in 0..REQUESTS {
            let mut head = [0; 16];
            reading.read_exact(&mut head).unwrap();
            assert_eq!(head[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
            assert_eq!(head[4..8], [0; 4]);
            let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
            assert!(!std::mem::replace(&mut seen[cookie as usize], true));
            let mut data = [0; 4096];
            reading.read_exact(&mut data).unwrap();
            assert!(data == content[(cookie % 1000 * 4096) as usize..][..4096]);
        }
    });
}

#[test]
fn a_held_write_does_not_hold_other_requests_of_its_connection() {
    let fixture = Fixture::new(MemDisk::new(1 << 20, 512));
    fixture.disk.hold_writes(true);
    let mut bare = Bare::enter(&fixture);
    bare.request(0, cmd::WRITE, 0, 512);
    bare.0.write_all(&[1; 512]).unwrap();
    bare.request(0, cmd::READ, 4096, 512);
    assert_eq!(bare.error(), 0);
    assert_eq!(bare.array::<512>(), [0; 512]);
    fixture.disk.hold_writes(false);
    assert_eq!(bare.error(), 0);
    let client = Client::connect(&fixture.socket, "disk").unwrap();
    let mut read = [0; 512];
    client.read_at(0, &mut read).unwrap();
    assert_eq!(read, [1; 512]);
}
