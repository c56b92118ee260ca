//! Places at which tests kill the process, to see what the next one makes of it.

/// The environment variable that names the point at which to die.
#[cfg(test)]
pub(crate) const VARIABLE: &str = "TIDEMARK_TEST_DIE_AT";

/// Dies here, as if by `kill -9`, if a test asked for it.
#[cfg(test)]
pub(crate) fn point(name: &str) {
    if std::env::var(VARIABLE).is_ok_and(|at| at == name) {
        std::process::abort();
    }
}

/// Nothing, outside tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point(_name: &str) {}
