//! Locks and threads: the standard library's, or loom's when a model is checked. Nothing else imports either.
//!
//! A poisoned lock is entered all the same: release builds abort on panic, and in tests the first panic is the one to
//! see.

#[cfg(loom)]
pub(crate) use loom::sync::Condvar;
#[cfg(not(loom))]
pub(crate) use std::sync::Condvar;

#[cfg(loom)]
use loom::sync as imp;
#[cfg(not(loom))]
use std::sync as imp;

pub(crate) use imp::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::cell::Cell;
use std::sync::PoisonError;

pub(crate) type MutexGuard<'a, T> = imp::MutexGuard<'a, T>;

/// A lock whose poison is ignored.
#[derive(Debug)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number for the thread that asks: always the same, and another one than those of most other threads. For spreading them.
pub(crate) fn thread_number() -> usize {
    static LAST: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<Option<usize>> = const { Cell::new(None) };
    }
    NUMBER.with(|number| {
        number.get().unwrap_or_else(|| {
            let next = LAST.fetch_add(1, Ordering::Relaxed);
            number.set(Some(next));
            next
        })
    })
}

/// Waits for `condvar`, letting go of the lock meanwhile.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits for `condvar` for so long at the most, in nanoseconds, letting go of the lock meanwhile.
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    nanoseconds: u64,
) -> MutexGuard<'a, T> {
    let duration = std::time::Duration::from_nanos(nanoseconds);
    condvar.wait_timeout(guard, duration).unwrap_or_else(PoisonError::into_inner).0
}
