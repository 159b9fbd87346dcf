//! A lock on byte ranges: requests that touch the same data units come one after the other.

use crate::sync::{Condvar, Mutex, wait};
use std::ops::Range;

/// Ranges that requests hold or wait for, in order of arrival.
#[derive(Debug)]
pub(crate) struct RangeLock {
    /// Protects the list. Held for a short look-up only; nothing else is taken while it is held.
    ranges: Mutex<Ranges>,
    freed: Condvar,
}

#[derive(Debug)]
struct Ranges {
    /// As many as there are requests under way: few, so a list is searched fastest.
    list: Vec<Entry>,
    last: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: Range<u64>,
    sharing: Sharing,
}

/// Whether others may hold the same range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Shared,
    Exclusive,
}

impl Ranges {
    /// Whether a request that came before `id` stands in the way.
    fn is_blocked(&self, id: u64, range: &Range<u64>, sharing: Sharing) -> bool {
        self.list.iter().any(|other| {
            other.id < id
                && other.range.start < range.end
                && range.start < other.range.end
                && (sharing == Sharing::Exclusive || other.sharing == Sharing::Exclusive)
        })
    }
}

/// A held range. Dropping it lets the next request on.
#[must_use = "the range is free as soon as the guard is dropped"]
#[derive(Debug)]
pub(crate) struct RangeGuard<'l> {
    lock: &'l RangeLock,
    id: u64,
}

impl RangeLock {
    pub(crate) fn new() -> Self {
        Self { ranges: Mutex::new(Ranges { list: Vec::new(), last: 0, waiting: 0 }), freed: Condvar::new() }
    }

    /// Takes `range`, after every request that came before and stands in the way: nobody is passed, nobody starves.
    pub(crate) fn take(&self, range: Range<u64>, sharing: Sharing) -> RangeGuard<'_> {
        let mut ranges = self.ranges.lock();
        ranges.last += 1;
        let id = ranges.last;
        ranges.list.push(Entry { id, range: range.clone(), sharing });
        while ranges.is_blocked(id, &range, sharing) {
            ranges.waiting += 1;
            ranges = wait(&self.freed, ranges);
            ranges.waiting -= 1;
        }
        RangeGuard { lock: self, id }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut ranges = self.lock.ranges.lock();
        let index = ranges.list.iter().position(|entry| entry.id == self.id).expect("held until now");
        ranges.list.swap_remove(index);
        if ranges.waiting > 0 {
            self.lock.freed.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Writers that mark every byte of their range see no mark but their own.
    #[test]
    fn overlapping_exclusive_ranges_never_meet() {
        let lock = RangeLock::new();
        let marks: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 1..=8u64 {
                let (lock, marks) = (&lock, &marks);
                scope.spawn(move || {
                    for n in 0..500u64 {
                        let start = (thread * 7 + n * 13) % 56;
                        let range = start..start + 1 + n % 8;
                        let guard = lock.take(range.clone(), Sharing::Exclusive);
                        let cells = range.clone().map(|at| &marks[usize::try_from(at).unwrap()]);
                        for mark in cells.clone() {
                            assert_eq!(mark.swap(thread, Ordering::Relaxed), 0);
                        }
                        std::thread::yield_now();
                        for mark in cells {
                            assert_eq!(mark.swap(0, Ordering::Relaxed), thread);
                        }
                        drop(guard);
                    }
                });
            }
        });
    }

    #[test]
    fn shared_ranges_do_not_wait_for_each_other() {
        let lock = RangeLock::new();
        let first = lock.take(0..10, Sharing::Shared);
        let second = lock.take(5..15, Sharing::Shared);
        let elsewhere = lock.take(15..20, Sharing::Exclusive);
        drop((first, second, elsewhere));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use std::sync::Arc;

    #[test]
    fn two_writers_and_a_reader_on_one_range() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(2);
        builder.check(|| {
            let shared = Arc::new((RangeLock::new(), AtomicBool::new(false)));
            let threads: Vec<_> = [Sharing::Exclusive, Sharing::Shared]
                .into_iter()
                .map(|sharing| {
                    let shared = shared.clone();
                    loom::thread::spawn(move || visit(&shared, sharing))
                })
                .collect();
            visit(&shared, Sharing::Exclusive);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    fn visit((lock, writing): &(RangeLock, AtomicBool), sharing: Sharing) {
        let guard = lock.take(0..4, sharing);
        if sharing == Sharing::Exclusive {
            assert!(!writing.swap(true, Ordering::SeqCst));
            writing.store(false, Ordering::SeqCst);
        } else {
            assert!(!writing.load(Ordering::SeqCst));
        }
        drop(guard);
    }
}
