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
    /// As many as there are pieces under way: few, so a list is searched fastest.
    list: Vec<Entry>,
    /// How many of them nobody else may hold.
    exclusive: usize,
    last: u64,
    waiting: usize,
}

/// One of the ranges that somebody takes together; these have the same number.
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

/// Held ranges. Dropping it lets the next request on.
#[must_use = "the ranges are free as soon as the guard is dropped"]
#[derive(Debug)]
pub(crate) struct RangeGuard<'l> {
    lock: &'l RangeLock,
    id: u64,
}

impl RangeLock {
    pub(crate) fn new() -> Self {
        let ranges = Ranges { list: Vec::new(), exclusive: 0, last: 0, waiting: 0 };
        Self { ranges: Mutex::new(ranges), freed: Condvar::new() }
    }

    /// Takes `range`, after every request that came before and stands in the way: nobody is passed, nobody starves.
    pub(crate) fn take(&self, range: Range<u64>, sharing: Sharing) -> RangeGuard<'_> {
        self.take_all(std::iter::once((range, sharing)))
    }

    /// Takes all of `wanted` at once, in the same order.
    ///
    /// There is no deadlock: a thread waits for such as came before it only, and does nothing with what is free of its
    /// ranges until it has all. They do not stand in the way of each other.
    pub(crate) fn take_all(
        &self,
        wanted: impl Iterator<Item = (Range<u64>, Sharing)> + Clone,
    ) -> RangeGuard<'_> {
        let mut ranges = self.ranges.lock();
        ranges.last += 1;
        let id = ranges.last;
        let others = ranges.list.len();
        for (range, sharing) in wanted.clone() {
            ranges.exclusive += usize::from(sharing == Sharing::Exclusive);
            ranges.list.push(Entry { id, range, sharing });
        }
        if others > 0 && ranges.exclusive > 0 {
            // Who came before only ever gets out of the way, so what is free once stays so.
            for (range, sharing) in wanted {
                while ranges.is_blocked(id, &range, sharing) {
                    ranges.waiting += 1;
                    ranges = wait(&self.freed, ranges);
                    ranges.waiting -= 1;
                }
            }
        }
        RangeGuard { lock: self, id }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut ranges = self.lock.ranges.lock();
        let Ranges { list, exclusive, waiting, last: _ } = &mut *ranges;
        list.retain(|entry| {
            let stays = entry.id != self.id;
            *exclusive -= usize::from(!stays && entry.sharing == Sharing::Exclusive);
            stays
        });
        if *waiting > 0 {
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

    /// The same with several ranges at once, taken in any order by each.
    #[test]
    fn many_ranges_are_taken_together_without_a_deadlock() {
        let lock = RangeLock::new();
        let marks: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 1..=8u64 {
                let (lock, marks) = (&lock, &marks);
                scope.spawn(move || {
                    for n in 0..500u64 {
                        let starts = [0, 1, 2].map(|index| (thread * 7 + n * 13 + index * 29) % 60);
                        let guard =
                            lock.take_all(starts.map(|at| (at..at + 4, Sharing::Exclusive)).into_iter());
                        let marked: std::collections::BTreeSet<u64> =
                            starts.iter().flat_map(|at| *at..at + 4).collect();
                        let cells = marked.iter().map(|at| &marks[usize::try_from(*at).unwrap()]);
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
        let ranges = lock.ranges.lock();
        assert_eq!((ranges.list.len(), ranges.exclusive, ranges.waiting), (0, 0, 0));
    }

    #[test]
    fn nobody_is_passed_by_who_came_later_and_wants_but_one_of_many() {
        let lock = RangeLock::new();
        let first = lock.take(0..4, Sharing::Exclusive);
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let many = scope.spawn(|| {
                let wanted = [(0..4, Sharing::Exclusive), (8..12, Sharing::Exclusive)];
                let _guard = lock.take_all(wanted.into_iter());
                done.fetch_add(1, Ordering::SeqCst)
            });
            while lock.ranges.lock().waiting < 1 {
                std::thread::yield_now();
            }
            let later = scope.spawn(|| {
                let _guard = lock.take(8..9, Sharing::Shared);
                done.fetch_add(1, Ordering::SeqCst)
            });
            while lock.ranges.lock().waiting < 2 {
                std::thread::yield_now();
            }
            drop(first);
            assert_eq!((many.join().unwrap(), later.join().unwrap()), (0, 1));
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

    /// Two that take two ranges each, in opposite order, and one that takes one of them.
    #[test]
    fn many_ranges_at_once() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(2);
        builder.check(|| {
            let shared = Arc::new((RangeLock::new(), [AtomicBool::new(false), AtomicBool::new(false)]));
            let threads: Vec<_> = [[0, 1], [1, 0]]
                .into_iter()
                .map(|order| {
                    let shared = shared.clone();
                    loom::thread::spawn(move || enter(&shared, &order))
                })
                .collect();
            enter(&shared, &[1]);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }

    fn enter((lock, writing): &(RangeLock, [AtomicBool; 2]), places: &[usize]) {
        let wanted = places.iter().map(|place| {
            let at = *place as u64 * 4;
            (at..at + 4, Sharing::Exclusive)
        });
        let guard = lock.take_all(wanted);
        for place in places {
            assert!(!writing[*place].swap(true, Ordering::SeqCst));
        }
        for place in places {
            writing[*place].store(false, Ordering::SeqCst);
        }
        drop(guard);
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
