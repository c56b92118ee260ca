//! The freeze keeper (I2): a freeze ends by request, by the requester's death, or at its deadline.

use std::time::{Duration, Instant};

use super::lines::{Lines, Received};
use super::protocol::{Request, Response};
use crate::agent::{self, Channel};
use crate::error::{EngineError, Result};
use crate::runtime::RunDir;

/// Longest wait for the agent to answer before a freeze.
const CONNECT: Duration = Duration::from_secs(10);
/// A thaw is tried as long as the machine lives; this is far beyond any of its lives.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Longest freeze that anybody may ask for.
const MAX_DEADLINE: Duration = Duration::from_secs(600);
/// An idle connection is dropped after this time.
const IDLE: Duration = Duration::from_secs(3600);

/// Serves one client until it leaves.
pub(crate) fn serve(mut lines: Lines, run: &RunDir, alive: &dyn Fn() -> bool) {
    loop {
        let Received::Message(request) = lines.receive(IDLE) else { return };
        let answer = match request {
            Request::Ping => Response::Pong { pid: std::process::id() },
            Request::Thaw => Response::Error { message: "nothing is frozen by you".to_owned() },
            Request::Freeze { deadline_ms } => {
                let deadline = Duration::from_millis(deadline_ms).min(MAX_DEADLINE);
                match freeze(run, deadline, alive) {
                    Ok(frozen) => match frozen.keep(&mut lines, run, alive) {
                        Some(answer) => answer,
                        None => return,
                    },
                    Err(error) => Response::Error { message: error.to_string() },
                }
            }
        };
        if lines.send(&answer).is_err() {
            return;
        }
    }
}

/// Frozen file systems.
struct Frozen {
    channel: Channel,
    count: u64,
    since: Instant,
    deadline: Instant,
}

/// Freezes. Whatever goes wrong, nothing is frozen when this returns an error.
fn freeze(run: &RunDir, deadline: Duration, alive: &dyn Fn() -> bool) -> Result<Frozen> {
    let mut channel = Channel::open(run, CONNECT)?;
    // Killed from here on, the marker makes the next guard or session thaw.
    agent::mark_frozen(run)?;
    let since = Instant::now();
    match channel.agent.freeze(deadline) {
        Ok(count) if count > 0 && since.elapsed() < deadline => {
            Ok(Frozen { channel, count, since, deadline: since + deadline })
        }
        Ok(count) => {
            agent::thaw(run, Some(channel), FOR_EVER, alive);
            Err(EngineError::State(match count {
                0 => "the guest has no file system that can be frozen".to_owned(),
                _ => format!("the freeze took longer than {} ms", deadline.as_millis()),
            }))
        }
        Err(error) => {
            agent::thaw(run, Some(channel), FOR_EVER, alive);
            Err(error.into())
        }
    }
}

impl Frozen {
    /// Tells the client, waits for the end, and thaws. Gives the answer to the client's thaw request;
    /// `None` if it is gone.
    fn keep(self, lines: &mut Lines, run: &RunDir, alive: &dyn Fn() -> bool) -> Option<Response> {
        let told = lines.send(&Response::Frozen { count: self.count }).is_ok();
        let left = self.deadline.saturating_duration_since(Instant::now());
        let ended = if told { lines.receive::<Request>(left) } else { Received::Closed };
        let thawed = agent::thaw(run, Some(self.channel), FOR_EVER, alive);
        let frozen_us = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        let expired = match ended {
            Received::Message(Request::Thaw) => false,
            Received::Timeout => {
                tracing::warn!("the freeze reached its deadline; thawed");
                // The client learns it when it asks.
                let Received::Message(Request::Thaw) = lines.receive(IDLE) else { return None };
                true
            }
            _ => return None,
        };
        Some(match thawed {
            Some(count) => Response::Thawed { count, frozen_us, expired },
            None => {
                Response::Error { message: "the virtual machine ended while frozen".to_owned() }
            }
        })
    }
}
