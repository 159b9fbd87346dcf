//! Who does the work: a thread that moves the boundary, until it is done or told to rest.

use super::Record;
use crate::identifier::Identifier;
use crate::report::Failure;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::reencrypt::{Progress, Reencryption};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long to wait after a failure before trying again: media come back, and disks get room.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// A re-encryption at work. Stops after the zone at hand when dropped, to be taken up at the next start.
#[derive(Debug)]
pub(crate) struct Job {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
    /// The key that the volume is getting.
    pub(crate) identifier: Identifier,
}

#[derive(Debug)]
struct Shared {
    /// Held for a look. Nothing else is taken meanwhile.
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Debug)]
struct Orders {
    is_paused: bool,
    is_stopping: bool,
    throttle_bytes: u64,
    progress: Progress,
    phase: Phase,
    /// Why the last attempt failed, until one succeeds.
    failure: Option<Failure>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Working,
    Done,
}

/// A job at one moment.
#[derive(Clone, Debug)]
pub(crate) struct JobReport {
    pub(crate) progress: Progress,
    /// `running`, `paused`, `failing` or `done`.
    pub(crate) state: &'static str,
    pub(crate) throttle_bytes: u64,
    pub(crate) failure: Option<Failure>,
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while paused, and as long as `rest` says else. `false` if it is over.
    fn rest(&self, rest: Rest) -> bool {
        let mut orders = self.orders();
        loop {
            // Anew each time: the throttle may be another meanwhile.
            let left = rest.left(orders.throttle_bytes);
            if orders.is_stopping {
                return false;
            }
            if orders.is_paused {
                orders = self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner);
            } else if left.is_zero() {
                return true;
            } else {
                orders = self.changed.wait_timeout(orders, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

/// How long to wait before the next zone.
#[derive(Clone, Copy, Debug)]
enum Rest {
    No,
    /// So many bytes were moved since then.
    Moved(Instant, u64),
    /// An attempt failed then.
    Failed(Instant),
}

impl Rest {
    /// How long it is still, if so many bytes may be moved in a second; 0 for as many as there are.
    fn left(self, throttle_bytes: u64) -> Duration {
        match self {
            Self::No => Duration::ZERO,
            Self::Failed(when) => RETRY_AFTER.saturating_sub(when.elapsed()),
            Self::Moved(began, bytes) => {
                let nanos = (u128::from(bytes) * 1_000_000_000).checked_div(throttle_bytes.into());
                let least = Duration::from_nanos(u64::try_from(nanos.unwrap_or(0)).unwrap_or(u64::MAX));
                least.saturating_sub(began.elapsed())
            }
        }
    }
}

/// What the worker has.
struct Work {
    running: Reencryption,
    volume: PathBuf,
    record: Record,
    shared: Arc<Shared>,
}

impl Job {
    /// Rests until it is told to [resume](Self::resume).
    pub(crate) fn start(
        running: Reencryption,
        volume: PathBuf,
        record: Record,
        throttle_bytes: u64,
        identifier: Identifier,
    ) -> Result<Self, Failure> {
        let orders = Orders {
            is_paused: true,
            is_stopping: false,
            throttle_bytes,
            progress: running.progress(),
            phase: Phase::Working,
            failure: running.unfinished().map(|error| failed_at(&volume, error)),
        };
        let shared = Arc::new(Shared { orders: Mutex::new(orders), changed: Condvar::new() });
        let running = running.with_holes(record.holes());
        let mut work = Work { running, volume, record, shared: shared.clone() };
        let worker = std::thread::Builder::new()
            .name("reencrypt".to_owned())
            .spawn(move || work.run())
            .map_err(|error| {
                Failure::of_io("cannot start a thread", &error, "Raise the limit on threads (ulimit -u).")
            })?;
        Ok(Self { shared, worker: Mutex::new(Some(worker)), identifier })
    }

    pub(crate) fn report(&self) -> JobReport {
        let orders = self.shared.orders();
        let state = match (orders.phase, &orders.failure, orders.is_paused) {
            (Phase::Done, ..) => "done",
            (_, _, true) => "paused",
            (_, Some(_), _) => "failing",
            (_, None, _) => "running",
        };
        JobReport {
            progress: orders.progress,
            state,
            throttle_bytes: orders.throttle_bytes,
            failure: orders.failure.clone(),
        }
    }

    /// Lets it rest once the zone at hand is done.
    pub(crate) fn pause(&self) {
        self.shared.orders().is_paused = true;
        self.shared.changed.notify_all();
    }

    /// Lets it go on, at most so fast if that is said.
    pub(crate) fn resume(&self, throttle_bytes: Option<u64>) {
        let mut orders = self.shared.orders();
        orders.is_paused = false;
        // What failed is tried again.
        orders.failure = None;
        if let Some(throttle_bytes) = throttle_bytes {
            orders.throttle_bytes = throttle_bytes;
        }
        drop(orders);
        self.shared.changed.notify_all();
    }

    /// Whether nothing is left to do.
    pub(crate) fn is_done(&self) -> bool {
        self.shared.orders().phase == Phase::Done
    }

    /// Ends the work after the zone at hand.
    pub(crate) fn stop(&self) {
        self.shared.orders().is_stopping = true;
        self.shared.changed.notify_all();
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            let _ = worker.join();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.stop();
    }
}

fn failed_at(volume: &Path, error: &Error) -> Failure {
    Failure::of(format!("{}: re-encryption", volume.display()), error)
}

impl Work {
    fn run(&mut self) {
        let mut rest = Rest::No;
        while self.shared.rest(rest) {
            let began = Instant::now();
            let before = self.running.progress().done_bytes;
            match self.step() {
                Ok(true) => return,
                Ok(false) => {
                    rest = Rest::Moved(began, self.running.progress().done_bytes - before);
                }
                Err(failure) => {
                    tracing::warn!(volume = %self.volume.display(), "re-encryption: {}", failure.what);
                    self.shared.orders().failure = Some(failure);
                    rest = Rest::Failed(Instant::now());
                }
            }
        }
        tracing::info!(volume = %self.volume.display(), "re-encryption rests");
    }

    /// The next zone, or what comes after the last. Says whether that was all.
    fn step(&mut self) -> Result<bool, Failure> {
        let label = self.volume.display().to_string();
        let failed = |error: Error| failed_at(&self.volume, &error);
        let progress = self.running.step().map_err(failed)?;
        let set = |phase| {
            let mut orders = self.shared.orders();
            orders.progress = progress;
            orders.failure = None;
            orders.phase = phase;
        };
        if !progress.is_complete() {
            set(Phase::Working);
            return Ok(false);
        }
        let new = self.running.finish().map_err(failed)?;
        self.record.settle(&self.volume)?;
        set(Phase::Done);
        tracing::info!(volume = %label, mode = %new.layout().mode(), "re-encrypted");
        Ok(true)
    }
}
