//! Agents that are late, mad or hostile, played by a script on a socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use super::*;

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

/// What the scripted agent sees and says.
struct Guest {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Guest {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        Self { reader: BufReader::new(stream.try_clone().unwrap()), writer: stream }
    }

    /// The next command; `Null` when the driver has gone.
    fn hear(&mut self) -> Value {
        let mut line = Vec::new();
        if self.reader.read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            return Value::Null;
        }
        let start = line.iter().rposition(|&b| b == DELIMITER).map_or(0, |i| i + 1);
        serde_json::from_slice(&line[start..]).unwrap()
    }

    fn say(&mut self, bytes: &[u8]) {
        // The driver may have given up: that is its right.
        let _ = self.writer.write_all(bytes);
    }

    fn answer(&mut self, value: &Value) {
        let text = json!({ "return": value }).to_string();
        self.say(format!("{text}\n").as_bytes());
    }

    fn synchronise(&mut self) {
        let command = self.hear();
        assert_eq!(command["execute"], "guest-sync-delimited");
        self.say(&[DELIMITER]);
        self.answer(&command["arguments"]["id"]);
    }
}

/// Runs `script` as the agent behind a fresh socket.
fn scripted(
    script: impl FnOnce(&UnixListener) + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join(AGENT_SOCKET);
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || script(&listener));
    (dir, socket, thread)
}

#[test]
fn stale_answers_before_the_synchronisation_are_discarded() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        let command = guest.hear();
        let id = command["arguments"]["id"].as_i64().unwrap();
        guest.say(b"half an answer}\n{\"return\": 7}\n");
        guest.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"stray\"}}\n\xff");
        guest.answer(&json!(id + 1));
        // The right number without the delimiter is no answer to this question either.
        guest.answer(&json!(id));
        guest.say(&[DELIMITER]);
        guest.answer(&json!(id));
        assert_eq!(guest.hear()["execute"], "guest-info");
        guest.answer(&json!({"version": "1.2.3", "supported_commands": []}));
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    assert_eq!(agent.version().unwrap(), "1.2.3");
    thread.join().unwrap();
}

#[test]
fn an_agent_that_starts_late_is_asked_again() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        // The first question is lost: nobody had opened the port.
        let lost = guest.hear();
        let next = guest.hear();
        assert_ne!(lost, next);
        guest.say(&[DELIMITER]);
        guest.answer(&lost["arguments"]["id"]);
        guest.say(&[DELIMITER]);
        guest.answer(&next["arguments"]["id"]);
        assert_eq!(guest.hear()["execute"], "guest-ping");
        guest.answer(&json!({}));
    });
    Agent::connect(&socket, LONG).unwrap().ping().unwrap();
    thread.join().unwrap();
}

#[test]
fn silence_ends_at_the_deadline() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        while !guest.hear().is_null() {}
    });
    let start = Instant::now();
    let error = Agent::connect(&socket, SHORT).map(drop).unwrap_err();
    assert!(matches!(error, DriverError::AgentTimeout { .. }), "{error}");
    assert!(start.elapsed() >= SHORT);
    thread.join().unwrap();
}

#[test]
fn an_answer_dripping_byte_by_byte_ends_at_the_deadline() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        guest.hear();
        while guest.writer.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    let error = agent.freeze(SHORT).unwrap_err();
    assert!(matches!(error, DriverError::AgentTimeout { .. }), "{error}");
    drop(agent);
    thread.join().unwrap();
}

#[test]
fn a_flood_of_lines_ends_at_the_deadline() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        let flood = b"{\"return\": 1}\n".repeat(1000);
        while guest.writer.write_all(&flood).is_ok() {}
    });
    let error = Agent::connect(&socket, SHORT).map(drop).unwrap_err();
    assert!(matches!(error, DriverError::AgentTimeout { .. }), "{error}");
    thread.join().unwrap();
}

#[test]
fn a_line_without_end_is_cut_off() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        guest.hear();
        let block = [b'x'; 65536];
        while guest.writer.write_all(&block).is_ok() {}
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    let error = agent.ping().unwrap_err();
    assert!(error.to_string().contains("longer than 1048576 bytes"), "{error}");
    drop(agent);
    thread.join().unwrap();
}

#[test]
fn i2_a_late_freeze_is_thawed_on_a_fresh_connection() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        assert_eq!(guest.hear()["execute"], "guest-fsfreeze-freeze");
        // The driver gives up, and connects anew; the answer comes late, into the new connection.
        assert!(guest.hear().is_null());
        let mut guest = Guest::accept(listener);
        let question = guest.hear();
        guest.answer(&json!(3));
        guest.say(&[DELIMITER]);
        guest.answer(&question["arguments"]["id"]);
        assert_eq!(guest.hear()["execute"], "guest-fsfreeze-thaw");
        guest.answer(&json!(3));
        assert_eq!(guest.hear()["execute"], "guest-fsfreeze-status");
        guest.answer(&json!("thawed"));
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    assert!(matches!(agent.freeze(SHORT), Err(DriverError::AgentTimeout { .. })));
    assert_eq!(agent.thaw(LONG).unwrap(), 3);
    thread.join().unwrap();
}

#[test]
fn i2_thaw_repeats_until_the_agent_says_thawed() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        guest.hear();
        guest.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"thaw: I/O error\"}}\n");
        guest.hear();
        guest.answer(&json!("frozen"));
        // Garbage costs the connection, not the thaw.
        assert_eq!(guest.hear()["execute"], "guest-fsfreeze-thaw");
        guest.say(b"\x00\xfe garbage\n");
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        assert_eq!(guest.hear()["execute"], "guest-fsfreeze-status");
        guest.answer(&json!("frozen"));
        assert_eq!(guest.hear()["execute"], "guest-fsfreeze-thaw");
        guest.answer(&json!(2));
        guest.hear();
        guest.answer(&json!("thawed"));
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    assert_eq!(agent.thaw(LONG).unwrap(), 2);
    thread.join().unwrap();
}

#[test]
fn i2_thaw_that_never_succeeds_reports_why() {
    // The script ends with the test: how often the driver connects is its own affair.
    let (_dir, socket, _) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        loop {
            match guest.hear()["execute"].as_str() {
                Some("guest-fsfreeze-thaw") => guest.say(
                    b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"thaw: no way\"}}\n",
                ),
                Some(_) => guest.answer(&json!("frozen")),
                None => {
                    guest = Guest::accept(listener);
                    guest.synchronise();
                }
            }
        }
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    let error = agent.thaw(SHORT).unwrap_err().to_string();
    assert!(error.contains("thaw"), "{error}");
}

#[test]
fn a_guest_without_freeze_support_is_told_apart() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        while !guest.hear().is_null() {
            guest.say(
                b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"has been disabled\"}}\n",
            );
        }
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    assert!(matches!(agent.freeze(LONG), Err(DriverError::AgentUnsupported { .. })));
    let start = Instant::now();
    assert!(matches!(agent.thaw(LONG), Err(DriverError::AgentUnsupported { .. })));
    assert!(start.elapsed() < LONG);
    drop(agent);
    thread.join().unwrap();
}

#[test]
fn answers_of_the_wrong_kind_are_errors() {
    let answers: [&[u8]; 8] = [
        b"{\"return\": {}}\n",
        b"{\"return\": \"many\"}\n",
        b"{\"return\": 1e400}\n",
        b"{}\n",
        b"[]\n",
        b"\n",
        b"{\"return\": 5\n",
        b"{\"error\": 5}\n",
    ];
    for answer in answers {
        let (_dir, socket, thread) = scripted(move |listener| {
            let mut guest = Guest::accept(listener);
            guest.synchronise();
            guest.hear();
            guest.say(answer);
            guest.hear();
        });
        let mut agent = Agent::connect(&socket, LONG).unwrap();
        let error = agent.freeze(LONG).unwrap_err();
        assert!(matches!(error, DriverError::Agent { .. }), "{error}");
        drop(agent);
        thread.join().unwrap();
    }
}

#[test]
fn a_program_is_polled_to_its_end() {
    let (_dir, socket, thread) = scripted(|listener| {
        let mut guest = Guest::accept(listener);
        guest.synchronise();
        let command = guest.hear();
        assert_eq!(
            command["arguments"],
            json!({"path": "cat", "arg": ["-"], "input-data": "aGk=", "capture-output": true})
        );
        guest.answer(&json!({"pid": 9}));
        guest.hear();
        guest.answer(&json!({"exited": false}));
        assert_eq!(guest.hear()["arguments"]["pid"], 9);
        guest.answer(&json!({"exited": true, "signal": 15, "out-data": "aGk="}));
    });
    let mut agent = Agent::connect(&socket, LONG).unwrap();
    let result = agent.exec("cat", &["-".to_owned()], Some(b"hi"), LONG).unwrap();
    assert_eq!((result.exit_code, result.stdout.as_slice()), (143, b"hi".as_slice()));
    thread.join().unwrap();
}

#[test]
fn a_socket_nobody_serves_is_a_machine_that_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join(AGENT_SOCKET);
    assert!(matches!(Agent::connect(&socket, LONG), Err(DriverError::NotRunning)));
    drop(UnixListener::bind(&socket).unwrap());
    assert!(matches!(Agent::connect(&socket, LONG), Err(DriverError::NotRunning)));
}
