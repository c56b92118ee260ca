//! Semantics a client relies on, through our own client or a bare socket.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Fixture, MemDisk, Seeded, eventually};
use crate::block::{Block, ExtentKind};
use crate::error::DiskError;
use crate::nbd::proto::{
    GREETING_MAGIC, OPTION_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, cmd, errno, opt, rep,
};
use crate::nbd::{Client, Server};

const MIB: usize = 1 << 20;

/// A connection that says exactly what a test wants, with simple replies.
pub(super) struct Bare(pub(super) UnixStream);

impl Bare {
    /// Past the greeting.
    pub(super) fn greet(fixture: &Fixture) -> Self {
        let mut bare = Self(UnixStream::connect(&fixture.socket).unwrap());
        bare.0.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(bare.u64(), GREETING_MAGIC);
        assert_eq!(bare.u64(), OPTION_MAGIC);
        assert_eq!(bare.u16(), 3);
        bare.0.write_all(&3u32.to_be_bytes()).unwrap();
        bare
    }

    /// In transmission, by the oldest option.
    pub(super) fn enter(fixture: &Fixture) -> Self {
        let mut bare = Self::greet(fixture);
        bare.option(opt::EXPORT_NAME, b"disk");
        bare.u64();
        bare.u16();
        bare
    }

    pub(super) fn option(&mut self, option: u32, data: &[u8]) {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.0.write_all(&message).unwrap();
    }

    /// Kind and data of the next reply to an option.
    pub(super) fn answer(&mut self) -> (u32, Vec<u8>) {
        self.u64();
        self.u32();
        let kind = self.u32();
        let mut data = vec![0; self.u32() as usize];
        self.0.read_exact(&mut data).unwrap();
        (kind, data)
    }

    pub(super) fn request(&mut self, flags: u16, command: u16, offset: u64, len: u32) {
        let mut head = REQUEST_MAGIC.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(77u64.to_be_bytes());
        head.extend(offset.to_be_bytes());
        head.extend(len.to_be_bytes());
        self.0.write_all(&head).unwrap();
    }

    /// The error number of a simple reply.
    pub(super) fn error(&mut self) -> u32 {
        assert_eq!(self.u32(), SIMPLE_REPLY_MAGIC);
        let error = self.u32();
        assert_eq!(self.u64(), 77);
        error
    }

    pub(super) fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }
    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }
    pub(super) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }
    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }
}

#[test]
fn client_sees_what_it_wrote_and_what_reads_as_zeros() {
    let fixture = Fixture::new(MemDisk::new(16 * MIB, 512));
    let client = Client::connect(&fixture.socket, "disk").unwrap();
    assert_eq!(client.geometry().size, 16 << 20);
    assert_eq!(client.geometry().logical_sector, 512);
    let data = Seeded(1).bytes(9 * MIB);
    client.write_at(512, &data).unwrap();
    client.write_zeroes(MIB as u64, MIB as u64, false).unwrap();
    assert!(!fixture.disk.last_unmap.load(Ordering::Relaxed));
    client.discard(2 << 20, 1 << 20).unwrap();
    assert!(fixture.disk.last_unmap.load(Ordering::Relaxed));
    client.flush().unwrap();
    assert_eq!(fixture.disk.flushes.load(Ordering::Relaxed), 1);
    let mut model = vec![0; 16 * MIB];
    model[512..512 + data.len()].copy_from_slice(&data);
    model[MIB..3 * MIB].fill(0);
    let mut read = vec![1; 16 * MIB];
    client.read_at(0, &mut read).unwrap();
    assert!(read == model && fixture.disk.content() == model);
    let kinds: Vec<_> =
        client.extents(0, 16 << 20).unwrap().iter().map(|e| (e.offset, e.kind)).collect();
    assert_eq!(
        kinds,
        [
            (0, ExtentKind::Hole),
            (512, ExtentKind::Data),
            (1 << 20, ExtentKind::Zero),
            (3 << 20, ExtentKind::Data),
            ((9 << 20) + 512, ExtentKind::Hole),
        ]
    );
    assert_eq!(client.extents(0, 16 << 20).unwrap(), fixture.disk.extents(0, 16 << 20).unwrap());
    let counters = fixture.server.counters("disk");
    assert_eq!((counters.read, counters.written), (16 << 20, 9 << 20));
}

#[test]
fn fragmented_disks_are_reported_whole_over_several_replies() {
    let fixture = Fixture::new(MemDisk::new(8 * MIB, 512));
    for sector in (0..16384).step_by(2) {
        fixture.disk.write_at(sector * 512, &[1; 512]).unwrap();
    }
    let client = Client::connect(&fixture.socket, "disk").unwrap();
    let extents = client.extents(0, 8 << 20).unwrap();
    assert_eq!(extents.len(), 16384);
    assert_eq!(extents, fixture.disk.extents(0, 8 << 20).unwrap());
}

#[test]
fn disk_errors_arrive_as_their_numbers_and_the_connection_goes_on() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let client = Client::connect(&fixture.socket, "").unwrap();
    for (errno, seen) in [
        (rustix::io::Errno::NOSPC, Some(28)),
        (rustix::io::Errno::DQUOT, Some(28)),
        (rustix::io::Errno::IO, Some(5)),
    ] {
        *fixture.disk.fail_with.lock() = Some(errno);
        assert_eq!(client.write_at(0, &[1; 512]).unwrap_err().os_error(), seen);
        // A structured error carries the server's words.
        let error = client.read_at(0, &mut [0; 512]).unwrap_err();
        assert!(error.os_error() == seen || error.to_string().contains("write memory"), "{error}");
    }
    *fixture.disk.fail_with.lock() = None;
    client.write_at(0, &[2; 512]).unwrap();
    assert_eq!(fixture.disk.content()[511], 2);
}

#[test]
fn i6_read_only_disks_refuse_every_kind_of_write() {
    let mut disk = MemDisk::filled(&[5; 4096], 512);
    disk.read_only = true;
    let fixture = Fixture::new(disk);
    let client = Client::connect(&fixture.socket, "disk").unwrap();
    assert!(client.read_only());
    assert!(matches!(client.write_at(0, &[0; 512]), Err(DiskError::ReadOnly { .. })));
    let mut bare = Bare::enter(&fixture);
    bare.request(0, cmd::WRITE, 0, 512);
    bare.0.write_all(&[9; 512]).unwrap();
    assert_eq!(bare.error(), errno::EPERM);
    for command in [cmd::TRIM, cmd::WRITE_ZEROES] {
        bare.request(0, command, 0, 512);
        assert_eq!(bare.error(), errno::EPERM);
    }
    assert_eq!(fixture.disk.content(), [5; 4096]);
}

#[test]
fn fua_flushes_before_the_reply_and_fast_zero_is_declined() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut bare = Bare::enter(&fixture);
    for (count, command) in [(1, cmd::WRITE), (2, cmd::WRITE_ZEROES), (3, cmd::TRIM)] {
        bare.request(cmd::FLAG_FUA, command, 0, 512);
        if command == cmd::WRITE {
            bare.0.write_all(&[1; 512]).unwrap();
        }
        assert_eq!(bare.error(), 0);
        assert_eq!(fixture.disk.flushes.load(Ordering::Relaxed), count);
    }
    bare.request(cmd::FLAG_FAST_ZERO, cmd::WRITE_ZEROES, 0, 512);
    assert_eq!(bare.error(), errno::ENOTSUP);
}

#[test]
fn requests_outside_the_disk_or_senseless_are_refused_without_harm() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut bare = Bare::enter(&fixture);
    for (flags, command, offset, len) in [
        (0, cmd::READ, 1 << 20, 512),
        (0, cmd::READ, u64::MAX - 100, 512),
        (0, cmd::READ, (1 << 20) - 511, 512),
        (0, cmd::READ, 0, 0),
        (0, cmd::READ, 0, u32::MAX),
        (0, cmd::TRIM, u64::MAX, u32::MAX),
        (0, cmd::WRITE_ZEROES, 512, 1 << 20),
        (0, cmd::BLOCK_STATUS, 0, 512),
        (1 << 9, cmd::READ, 0, 512),
        (0, 99, 0, 0),
    ] {
        bare.request(flags, command, offset, len);
        assert_eq!(bare.error(), errno::EINVAL, "{command} {offset} {len}");
    }
    bare.request(0, cmd::WRITE, 1 << 20, 1024);
    bare.0.write_all(&[1; 1024]).unwrap();
    assert_eq!(bare.error(), errno::EINVAL);
    bare.request(0, cmd::READ, 0, 512);
    assert_eq!(bare.error(), 0);
    assert_eq!(bare.array::<512>(), [0; 512]);
}

#[test]
fn requests_of_single_bytes_touch_no_other_byte() {
    for sector in [512, 4096] {
        let mut model = Seeded(8).bytes(128 << 10);
        let fixture = Fixture::new(MemDisk::filled(&model, sector));
        let mut bare = Bare::enter(&fixture);
        let mut random = Seeded(u64::from(sector));
        for _ in 0..120 {
            let offset = random.below(120 << 10);
            let len = 1 + random.below(9000).min((128 << 10) - offset - 1);
            let range = offset as usize..(offset + len) as usize;
            match random.below(3) {
                0 => {
                    let data = random.bytes(len as usize);
                    bare.request(0, cmd::WRITE, offset, len as u32);
                    bare.0.write_all(&data).unwrap();
                    assert_eq!(bare.error(), 0);
                    model[range].copy_from_slice(&data);
                }
                1 => {
                    bare.request(0, cmd::WRITE_ZEROES, offset, len as u32);
                    assert_eq!(bare.error(), 0);
                    model[range].fill(0);
                }
                _ => {
                    bare.request(0, cmd::READ, offset, len as u32);
                    assert_eq!(bare.error(), 0);
                    let mut data = vec![0; len as usize];
                    bare.0.read_exact(&mut data).unwrap();
                    assert!(data == model[range]);
                }
            }
        }
        assert!(fixture.disk.content() == model);
        // A trim may keep what is not a whole sector, and must keep what lies outside.
        bare.request(0, cmd::TRIM, 1, 3 * sector);
        assert_eq!(bare.error(), 0);
        let s = sector as usize;
        model[s..3 * s].fill(0);
        assert!(fixture.disk.content() == model);
    }
}

#[test]
fn tls_unknown_options_and_unknown_exports_are_refused_and_the_handshake_goes_on() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut bare = Bare::greet(&fixture);
    bare.option(opt::STARTTLS, &[]);
    assert_eq!(bare.answer().0, rep::ERR_UNSUP);
    bare.option(4711, b"junk");
    assert_eq!(bare.answer().0, rep::ERR_UNSUP);
    bare.option(opt::GO, &[0, 0, 0, 2, b'n', b'o', 0, 0]);
    assert_eq!(bare.answer().0, rep::ERR_UNKNOWN);
    bare.option(opt::GO, &[0, 0, 0, 9]);
    assert_eq!(bare.answer().0, rep::ERR_INVALID);
    bare.option(opt::SET_META_CONTEXT, &[0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bare.answer().0, rep::ERR_INVALID, "needs structured replies first");
    bare.option(opt::LIST, &[]);
    assert_eq!(bare.answer(), (rep::SERVER, b"\0\0\0\x04disk".to_vec()));
    assert_eq!(bare.answer().0, rep::ACK);
    bare.option(opt::ABORT, &[]);
    assert_eq!(bare.answer().0, rep::ACK);
    assert_eq!(bare.0.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_removed_export_ends_its_connections_and_leaves_the_others() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    fixture.server.add_export("other", Arc::new(MemDisk::new(MIB, 512)));
    let gone = Client::connect(&fixture.socket, "disk").unwrap();
    let stays = Client::connect(&fixture.socket, "other").unwrap();
    fixture.server.remove_export("disk");
    assert!(gone.read_at(0, &mut [0; 512]).is_err());
    assert!(gone.read_at(0, &mut [0; 512]).unwrap_err().to_string().contains("connect again"));
    stays.read_at(0, &mut [0; 512]).unwrap();
    assert_eq!(fixture.server.connections(), 1);
    let error = Client::connect(&fixture.socket, "disk").err().unwrap();
    assert!(error.to_string().contains("no export of this name"), "{error}");
}

#[test]
fn removing_an_export_waits_for_its_requests() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mut bare = Bare::enter(&fixture);
    fixture.disk.hold_writes(true);
    bare.request(0, cmd::WRITE, 0, 512);
    bare.0.write_all(&[1; 512]).unwrap();
    // The write sits in the disk; one more request shows that it was read.
    bare.request(0, cmd::READ, 4096, 512);
    assert_eq!(bare.error(), 0);
    std::thread::scope(|scope| {
        let removal = scope.spawn(|| fixture.server.remove_export("disk"));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!removal.is_finished());
        fixture.disk.hold_writes(false);
        removal.join().unwrap();
        assert_eq!(fixture.disk.content()[0], 1);
    });
}

#[test]
fn the_socket_is_private_replaced_when_stale_and_gone_at_the_end() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let mode = std::fs::metadata(&fixture.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(Server::bind(&fixture.socket), Err(DiskError::Busy { .. })));
    Client::connect(&fixture.socket, "disk").unwrap();

    let stale = fixture.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    let server = Server::bind(&stale).unwrap();
    drop(server);
    assert!(!stale.exists());

    let file = fixture.dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(Server::bind(&file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");

    let Fixture { socket, server, .. } = fixture;
    drop(server);
    assert!(!socket.exists());
}

#[test]
fn dropping_the_server_ends_idle_and_half_negotiated_connections() {
    let fixture = Fixture::new(MemDisk::new(MIB, 512));
    let _idle = Bare::enter(&fixture);
    let _half = Bare::greet(&fixture);
    eventually("both are counted", || fixture.server.connections() == 2);
    let start = std::time::Instant::now();
    drop(fixture);
    assert!(start.elapsed() < Duration::from_secs(5));
}
