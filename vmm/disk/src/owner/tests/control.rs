//! The control socket, its clients, and the owner's beginning and end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Client, MIB, Owner, OwnerProcess, PATIENCE, Vm, must, reach, report};
use crate::block::Block;
use crate::chain::Chain;
use crate::error::DiskError;
use crate::owner::control::Control;
use crate::owner::{MergeState, PROTOCOL_VERSION, Request, Response, run};
use crate::rct::Continuity;
use crate::vhdx::Access;

/// A control socket whose handler is a test's.
fn control(vm: &Vm, handler: impl Fn(Request) -> Response + Send + Sync + 'static) -> Control {
    Control::start(&vm.control(), Arc::new(handler)).unwrap()
}

/// Sends a line as it is and gives the answer.
fn say(reader: &mut BufReader<UnixStream>, line: &[u8]) -> Value {
    reader.get_mut().write_all(line).unwrap();
    let mut answer = String::new();
    reader.read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn bare(vm: &Vm) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(vm.control()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

#[test]
fn lines_are_as_documented_and_malformed_ones_answered() {
    let vm = Vm::new(&[]);
    let _control = control(&vm, |_| Response::Ok);
    let mut client = bare(&vm);
    let ok = json!({"version": 1, "response": "ok"});
    assert_eq!(say(&mut client, b"{\"version\":1,\"request\":\"report\"}\n"), ok);
    let leaves = b"{\"version\":1,\"request\":\"commit-checkpoint\",\"leaves\":[[\"a\",\"/x\"]],\"new\":1}\n";
    assert_eq!(say(&mut client, leaves), ok);
    for bad in [
        &b"\n"[..],
        b"{}\n",
        b"nonsense\n",
        b"\xff\xfe\n",
        b"{\"version\":1,\"request\":\"fly\"}\n",
        b"{\"version\":1,\"request\":\"start-merge\"}\n",
        b"{\"version\":2,\"request\":\"report\"}\n",
    ] {
        let answer = say(&mut client, bad);
        assert_eq!(answer["response"], "error", "{answer}");
    }
    let answer = say(&mut client, b"{\"version\":2,\"request\":\"report\"}\n");
    assert!(answer["message"].as_str().unwrap().contains("version 2"), "{answer}");
    assert_eq!(say(&mut client, b"{\"version\":1,\"request\":\"report\"}\n"), ok);
}

#[test]
fn endless_lines_end_their_connection_only() {
    let vm = Vm::new(&[]);
    let _control = control(&vm, |_| Response::Ok);
    let mut client = bare(&vm);
    // The server hangs up in the middle of it.
    let _ = client.get_mut().write_all(&vec![b'x'; 3 << 20]);
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    must(&mut reach(&vm.control()), &Request::Report);
}

#[test]
fn a_handler_that_panics_is_an_error_for_its_client() {
    let vm = Vm::new(&[]);
    let _control = control(&vm, |request| match request {
        Request::Shutdown => panic!("a bug"),
        _ => Response::Ok,
    });
    let mut client = reach(&vm.control());
    assert!(matches!(client.call(&Request::Shutdown, PATIENCE), Err(DiskError::Owner(_))));
    must(&mut client, &Request::Report);
}

#[test]
fn a_late_answer_breaks_the_client_and_is_never_taken_for_another() {
    let vm = Vm::new(&[]);
    let listener = UnixListener::bind(vm.control()).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // Trickles, so that each read succeeds, and never ends its line in time.
        for byte in b"{\"version\":1,\"response\"" {
            let _ = stream.write_all(&[*byte]);
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut client = Client::connect(&vm.control()).unwrap();
    let start = Instant::now();
    let error = client.call(&Request::Report, Duration::from_millis(150)).unwrap_err();
    assert!(error.to_string().contains("no answer within 150 ms"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
    let error = client.call(&Request::Report, PATIENCE).unwrap_err();
    assert!(error.to_string().contains("connect again"), "{error}");
    server.join().unwrap();
    assert!(matches!(Client::connect(&vm.file("nobody")), Err(DiskError::Owner(_))));
}

#[test]
fn the_report_tells_files_traffic_and_merge() {
    let vm = Vm::new(&["a", "b"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx"), ("b", "b.vhdx")]));
    let mode = std::fs::metadata(vm.control()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let disk = vm.disk("b");
    disk.write_at(4096, &[1; 8192]).unwrap();
    disk.read_at(0, &mut [0; 4096]).unwrap();
    let report = report(&mut owner.client());
    assert_eq!((report.protocol, report.pid), (PROTOCOL_VERSION, std::process::id()));
    assert_eq!(report.disks.len(), 2);
    assert_eq!((report.disks[0].read_bytes, report.disks[0].written_bytes), (0, 0));
    let b = &report.disks[1];
    assert_eq!((b.disk.as_str(), &b.files), ("b", &vec![vm.file("b.vhdx")]));
    assert_eq!((b.read_bytes, b.written_bytes, b.connections), (4096, 8192, 1));
    assert_eq!((&b.merge, &b.tracking_lost), (&MergeState::None, &None));
    drop(disk);
    owner.shut_down();
}

#[test]
fn shutdown_closes_clean_under_writes_and_clients_learn_it() {
    let vm = Vm::new(&["a"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx")]));
    let disk = vm.disk("a");
    let writer = std::thread::spawn(move || {
        let mut done = 0u64;
        while disk.write_at(done * 4096, &[7; 4096]).is_ok() && done < 8000 {
            done += 1;
        }
        done
    });
    std::thread::sleep(Duration::from_millis(50));
    owner.shut_down();
    let done = writer.join().unwrap();
    assert!(!vm.control().exists() && !vm.file("nbd.sock").exists());
    let chain = Chain::open(&vm.file("a.vhdx"), Access::ReadWrite).unwrap();
    assert_eq!(chain.continuity(), Continuity::Kept);
    let mut read = vec![0; (done * 4096) as usize];
    chain.read_at(0, &mut read).unwrap();
    assert!(done > 0 && read.iter().all(|&b| b == 7), "an acknowledged write is missing");
}

#[test]
fn i5_a_second_owner_fails_with_busy_and_names_the_file() {
    let vm = Vm::new(&["a"]);
    let owner = Owner::start(vm.config(&[("a", "a.vhdx")]));
    let mut second = vm.config(&[("a", "a.vhdx")]);
    second.nbd_socket = vm.file("second.nbd");
    second.control_socket = vm.file("second.control");
    let error = run(second).unwrap_err();
    assert!(matches!(&error, DiskError::Busy { path } if *path == vm.file("a.vhdx")), "{error}");
    // The first one did not notice.
    vm.disk("a").write_at(0, &[1; 512]).unwrap();
    owner.shut_down();
}

#[test]
fn an_owner_waits_for_its_dying_predecessor() {
    let vm = Vm::new(&["a"]);
    let mut first = OwnerProcess::start(&vm.config(&[("a", "a.vhdx")]));
    vm_is_up(&vm);
    let config = vm.config(&[("a", "a.vhdx")]);
    let second = std::thread::spawn(move || run(config));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!second.is_finished());
    first.kill();
    let mut client = reach_pid(&vm, std::process::id());
    must(&mut client, &Request::Shutdown);
    second.join().unwrap().unwrap();
}

#[test]
fn sigterm_closes_all_disks_clean() {
    let vm = Vm::new(&["a", "b"]);
    let mut owner = OwnerProcess::start(&vm.config(&[("a", "a.vhdx"), ("b", "b.vhdx")]));
    vm_is_up(&vm);
    vm.disk("b").write_at(MIB, &[3; 512]).unwrap();
    let pid = rustix::process::Pid::from_raw(owner.0.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(owner.0.wait().unwrap().success());
    assert!(!vm.control().exists() && !vm.file("nbd.sock").exists());
    let chain = Chain::open(&vm.file("b.vhdx"), Access::ReadWrite).unwrap();
    assert_eq!(chain.continuity(), Continuity::Kept);
    let mut read = [0; 512];
    chain.read_at(MIB, &mut read).unwrap();
    assert_eq!(read, [3; 512]);
}

/// Waits until an owner process answers.
fn vm_is_up(vm: &Vm) {
    report(&mut reach(&vm.control()));
}

/// Waits until the owner that answers is this process.
fn reach_pid(vm: &Vm, pid: u32) -> Client {
    let start = Instant::now();
    loop {
        if let Ok(mut client) = Client::connect(&vm.control())
            && let Ok(Response::Report(report)) = client.call(&Request::Report, PATIENCE)
            && report.pid == pid
        {
            return client;
        }
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}
