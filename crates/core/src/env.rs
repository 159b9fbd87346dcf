//! Time, handed in: the framework has no clock of its own.

use std::fmt;

/// A clock that never goes back.
pub trait Clock: fmt::Debug + Send + Sync {
    /// Nanoseconds since some fixed moment.
    fn now_ns(&self) -> u64;
}

/// A clock that stands still. Quanta have no length then, and nothing waits for a time to come.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoppedClock;

impl Clock for StoppedClock {
    fn now_ns(&self) -> u64 {
        0
    }
}
