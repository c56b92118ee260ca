//! Messages between the engine and the guard.

use serde::{Deserialize, Serialize};

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Whether the guard is there.
    Ping,
    /// Freeze the guest's file systems, for at most this long.
    Freeze {
        /// Milliseconds from the beginning of the freeze to its end at the latest.
        deadline_ms: u64,
    },
    /// Thaw them.
    Thaw,
}

/// What the guard answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub(crate) enum Response {
    /// To `Ping`.
    Pong {
        /// The guard's process id.
        pid: u32,
    },
    /// To `Freeze`: the file systems are frozen.
    Frozen {
        /// How many.
        count: u64,
    },
    /// To `Thaw`: nothing is frozen any more.
    Thawed {
        /// How many file systems were frozen until then.
        count: u64,
        /// From before the freeze until after the thaw, in microseconds.
        frozen_us: u64,
        /// The freeze had ended before it was asked to: at its deadline.
        expired: bool,
    },
    /// It did not work; nothing is frozen, unless the message says so.
    Error {
        /// For people.
        message: String,
    },
}
