//! When to try again, how long to wait, when to give up.

use std::future::Future;
use std::time::{Duration, Instant};

use crate::error::{RepoError, Result};

/// Limits of trying again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// After this long no new attempt begins.
    pub(super) give_up_after: Duration,
    /// How long a request without data may take.
    pub(super) timeout: Duration,
}

/// Lowest speed at which a transfer is still waited for; over slower lines a larger
/// `timeout_seconds` helps.
const SLOWEST_BYTES_PER_SECOND: u64 = 256 * 1024;
/// First pause; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Why an attempt failed.
pub(super) enum Failure {
    /// Trying again may help.
    Transient(String),
    /// It will not.
    Final(RepoError),
}

impl Policy {
    /// One attempt, with the same patience.
    pub(super) fn once(self) -> Self {
        Self { give_up_after: Duration::ZERO, ..self }
    }

    /// Runs an operation until it succeeds, fails for good, or time is up. `bytes`: how much data it
    /// moves. Every attempt has a deadline, so a peer that says nothing cannot hold us for ever.
    pub(super) async fn run<T, F>(
        &self,
        store: &str,
        bytes: u64,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        let begun = Instant::now();
        let deadline = self.timeout + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND);
        let (mut attempts, mut pause) = (0, FIRST_PAUSE);
        loop {
            attempts += 1;
            let detail = match tokio::time::timeout(deadline, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(Failure::Final(e))) => return Err(e),
                Ok(Err(Failure::Transient(detail))) => detail,
                Err(_) => format!("no answer within {} s", deadline.as_secs()),
            };
            if begun.elapsed() + pause >= self.give_up_after {
                return Err(RepoError::Unreachable { store: store.to_owned(), attempts, detail });
            }
            tracing::warn!(%store, attempts, "trying again in {pause:?}: {detail}");
            tokio::time::sleep(jitter(pause)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Between half and all of a pause, so that many hosts do not come back at the same moment.
fn jitter(pause: Duration) -> Duration {
    let [byte] = crate::id::random::<1>().unwrap_or([128]);
    pause.mul_f64(0.5 + f64::from(byte) / 512.0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const QUICK: Policy =
        Policy { give_up_after: Duration::from_millis(900), timeout: Duration::from_millis(50) };

    fn run<T, F: Future<Output = std::result::Result<T, Failure>>>(
        attempt: impl FnMut() -> F,
    ) -> Result<T> {
        crate::pool::block_on(QUICK.run("s3://test", 0, attempt))
    }

    #[test]
    fn a_passing_failure_is_tried_again() {
        let tries = Cell::new(0);
        let result = run(|| async {
            tries.set(tries.get() + 1);
            if tries.get() < 3 { Err(Failure::Transient("503".into())) } else { Ok(7) }
        });
        assert_eq!(result.unwrap(), 7);
        assert_eq!(tries.get(), 3);
    }

    #[test]
    fn a_final_failure_is_not_tried_again() {
        let tries = Cell::new(0);
        let result: Result<()> = run(|| async {
            tries.set(tries.get() + 1);
            Err(Failure::Final(RepoError::Cancelled))
        });
        assert!(matches!(result, Err(RepoError::Cancelled)));
        assert_eq!(tries.get(), 1);
    }

    #[test]
    fn one_attempt_is_one() {
        let tries = Cell::new(0);
        let attempt = || async {
            tries.set(tries.get() + 1);
            Err(Failure::Transient("503".into()))
        };
        let result: Result<()> = crate::pool::block_on(QUICK.once().run("s3://test", 0, attempt));
        assert!(matches!(result, Err(RepoError::Unreachable { attempts: 1, .. })), "{result:?}");
        assert_eq!(tries.get(), 1);
    }

    #[test]
    fn silence_and_lasting_failure_end_as_unreachable() {
        let result: Result<()> = run(|| async {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            Ok(())
        });
        let Err(RepoError::Unreachable { attempts, .. }) = result else { panic!("{result:?}") };
        assert!(attempts > 1);
    }
}
