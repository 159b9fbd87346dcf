//! How long a connection has had nothing to do.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How many requests of a connection are under way, and since when none is. Its thread and its workers tell, the server
/// asks.
#[derive(Debug)]
pub struct Activity {
    begun: Instant,
    under_way: AtomicU32,
    /// When the last request ended, in nanoseconds after `begun`; 0 before the first.
    idle_since_ns: AtomicU64,
}

impl Default for Activity {
    /// A connection that begins now.
    fn default() -> Self {
        Self { begun: Instant::now(), under_way: AtomicU32::new(0), idle_since_ns: AtomicU64::new(0) }
    }
}

impl Activity {
    /// A request is under way until what this returns is dropped.
    pub(super) fn busy(&self) -> Busy<'_> {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        Busy(Some(self))
    }

    /// How long nothing was under way, as of `now`; `None` while something is.
    #[must_use]
    pub fn idle_time(&self, now: Instant) -> Option<Duration> {
        if self.under_way.load(Ordering::Acquire) > 0 {
            return None;
        }
        let since = Duration::from_nanos(self.idle_since_ns.load(Ordering::Relaxed));
        Some(now.saturating_duration_since(self.begun + since))
    }
}

/// A request that is under way.
#[derive(Debug)]
pub(super) struct Busy<'a>(Option<&'a Activity>);

impl Busy<'_> {
    /// A request of which nobody wants to know.
    pub(super) fn untold() -> Self {
        Self(None)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let Some(activity) = self.0 else { return };
        let since_ns = u64::try_from(activity.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        activity.idle_since_ns.store(since_ns, Ordering::Relaxed);
        // Whoever sees that none is left sees the time, too.
        activity.under_way.fetch_sub(1, Ordering::Release);
    }
}
