//! A lock on byte ranges: requests that touch the same data units come one after the other.
//!
//! Mostly nobody stands in anybody's way, and then threads share nothing that they write to: each takes a *lane* of its own,
//! publishes in it what it wants, and looks into the other lanes. Who finds that somebody stands in the way takes it back and
//! goes through the *queue*, in which requests come in order of arrival; while there is one in it, everybody goes that way.
//!
//! ```text
//!   free lane?  publish   queue closed, or somebody in the way?  -- no --> held
//!        | none                | take it back
//!        `---------------------`--> queue up, wait for who came before and for the lanes --> a free lane, else stays in the queue
//! ```
//!
//! Of two that publish at the same time at least one sees the other, since each has a fence between publishing and looking
//! (Dekker's algorithm). If both do, both queue up. The same holds for who gives back and looks whether anybody waits, against
//! who queues up and looks at the lanes.

use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, MutexGuard, Ordering, fence, thread_number, wait};
use std::ops::Range;
use std::sync::OnceLock;

/// How many threads get on without the queue. Each looks at all lanes.
const LANES: usize = if cfg!(loom) { 2 } else { 8 };

/// How many ranges fit a lane: all that are taken together in practice.
const PLACES: usize = if cfg!(loom) { 2 } else { 64 };

/// All ranges there can be: who takes this is alone.
pub(crate) const EVERYTHING: Range<u64> = 0..u64::MAX >> 1;

/// Ranges that requests hold or wait for.
#[derive(Debug)]
pub(crate) struct RangeLock {
    /// Made for the first who takes anything.
    lanes: OnceLock<Box<[Lane; LANES]>>,
    /// Whether somebody is in the queue. Changed while the queue is locked only.
    is_queued: AtomicBool,
    /// Protects the queue. Held for a short look only; nothing else is taken while it is held.
    queue: Mutex<Queue>,
    freed: Condvar,
}

/// What one thread holds. On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Lane {
    /// [`FREE`], [`CLAIMED`], or what is [published](Lane::publish).
    state: AtomicU64,
    /// Made for the first who needs it. Nothing in it counts but what `state` says.
    places: OnceLock<Box<[Place; PLACES]>>,
}

/// A range: twice its start, plus one if it is exclusive; and its end.
#[derive(Debug)]
struct Place {
    start: AtomicU64,
    end: AtomicU64,
}

/// Nobody's.
const FREE: u64 = 0;

/// Somebody's who has published nothing yet.
const CLAIMED: u64 = 1;

/// Added to [`CLAIMED`] if one of the ranges is exclusive.
const EXCLUSIVE: u64 = 2;

/// Added to [`CLAIMED`] for each range.
const COUNTED: u64 = 4;

#[derive(Debug)]
struct Queue {
    /// As many as there are pieces under way: few, so a list is searched fastest.
    list: Vec<Entry>,
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

/// A range that somebody wants.
type Wanted = (Range<u64>, Sharing);

/// Whether one of two who want these has to wait for the other.
fn collide((range, sharing): &Wanted, (other, others): &Wanted) -> bool {
    range.start < other.end
        && other.start < range.end
        && (*sharing == Sharing::Exclusive || *others == Sharing::Exclusive)
}

impl Place {
    fn put(&self, (range, sharing): Wanted) {
        assert!(range.end <= EVERYTHING.end, "a range ends below 2^63");
        // Release: who sees this has seen, too, that the lane's former owner let go.
        self.start.store((range.start << 1) | u64::from(sharing == Sharing::Exclusive), Ordering::Release);
        self.end.store(range.end, Ordering::Release);
    }

    fn get(&self) -> Wanted {
        let start = self.start.load(Ordering::Acquire);
        let sharing = if start & 1 == 1 { Sharing::Exclusive } else { Sharing::Shared };
        (start >> 1..self.end.load(Ordering::Acquire), sharing)
    }
}

impl Lane {
    fn new() -> Self {
        Self { state: AtomicU64::new(FREE), places: OnceLock::new() }
    }

    fn claim(&self) -> bool {
        // A look first: others' lanes stay in their caches.
        self.state.load(Ordering::Relaxed) == FREE
            && self.state.compare_exchange(FREE, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Says what is wanted, to all who look from now on. `false`, and nothing is said, if it does not fit.
    fn publish(&self, wanted: impl Iterator<Item = Wanted>) -> bool {
        let place = || Place { start: AtomicU64::new(0), end: AtomicU64::new(0) };
        let places = self.places.get_or_init(|| Box::new(std::array::from_fn(|_| place())));
        let mut state = CLAIMED;
        for (index, wanted) in wanted.enumerate() {
            let Some(place) = places.get(index) else { return false };
            if wanted.1 == Sharing::Exclusive {
                state |= EXCLUSIVE;
            }
            state += COUNTED;
            place.put(wanted);
        }
        self.state.store(state, Ordering::Release);
        fence(Ordering::SeqCst);
        true
    }

    fn free(&self) {
        self.state.store(FREE, Ordering::Release);
    }

    /// Whether its owner stands in the way of one who wants these.
    fn blocks(&self, wanted: impl Iterator<Item = Wanted>) -> bool {
        let state = self.state.load(Ordering::Acquire);
        let Some(count) = state.checked_sub(CLAIMED).map(|rest| rest / COUNTED).filter(|&count| count > 0)
        else {
            return false;
        };
        let count = usize::try_from(count).expect("as many as there are places");
        let places = &self.places.get().expect("something was published")[..count];
        let is_shared = state & EXCLUSIVE == 0;
        wanted
            .filter(|(_, sharing)| !is_shared || *sharing == Sharing::Exclusive)
            .any(|wanted| places.iter().any(|place| collide(&wanted, &place.get())))
    }
}

impl Queue {
    /// Whether a request that came before `id` stands in the way.
    fn blocks(&self, id: u64, wanted: &Wanted) -> bool {
        self.list.iter().any(|other| other.id < id && collide(wanted, &(other.range.clone(), other.sharing)))
    }
}

/// Held ranges. Dropping it lets the next request on.
#[must_use = "the ranges are free as soon as the guard is dropped"]
#[derive(Debug)]
pub(crate) struct RangeGuard<'l> {
    lock: &'l RangeLock,
    held: Held,
}

#[derive(Clone, Copy, Debug)]
enum Held {
    /// In this lane.
    Lane(usize),
    /// In the queue, since no lane was free, or they do not fit one.
    Queue { id: u64 },
}

impl RangeLock {
    pub(crate) fn new() -> Self {
        let queue = Queue { list: Vec::new(), last: 0, waiting: 0 };
        let lock = Self {
            lanes: OnceLock::new(),
            is_queued: AtomicBool::new(false),
            queue: Mutex::new(queue),
            freed: Condvar::new(),
        };
        if cfg!(loom) {
            // It does not know that the cell has the others wait.
            lock.lanes();
        }
        lock
    }

    /// Takes `range`, after every request that came before and stands in the way: nobody is passed, nobody starves.
    pub(crate) fn take(&self, range: Range<u64>, sharing: Sharing) -> RangeGuard<'_> {
        self.take_all(std::iter::once((range, sharing)))
    }

    /// Takes all of `wanted` at once, in the same order. Ranges end below 2^63.
    ///
    /// There is no deadlock: a thread waits for such as came before it only, and does nothing with what is free of its
    /// ranges until it has all. They do not stand in the way of each other.
    pub(crate) fn take_all(&self, wanted: impl Iterator<Item = Wanted> + Clone) -> RangeGuard<'_> {
        let held = match self.try_lane(wanted.clone()) {
            Ok(lane) => Held::Lane(lane),
            Err(Retreat { was_seen }) => self.queue_up(wanted, was_seen),
        };
        RangeGuard { lock: self, held }
    }

    fn lanes(&self) -> &[Lane; LANES] {
        self.lanes.get_or_init(|| Box::new(std::array::from_fn(|_| Lane::new())))
    }

    /// Publishes `wanted` in a lane, if one is free and they fit, and returns its index.
    fn publish(&self, wanted: impl Iterator<Item = Wanted>) -> Option<usize> {
        let first = thread_number();
        let index = (0..LANES).map(|n| (first + n) % LANES).find(|&index| self.lanes()[index].claim())?;
        if self.lanes()[index].publish(wanted) {
            return Some(index);
        }
        self.lanes()[index].free();
        None
    }

    /// Takes a lane, if nobody is queued or stands in the way.
    fn try_lane(&self, wanted: impl Iterator<Item = Wanted> + Clone) -> Result<usize, Retreat> {
        // A look first: who queues up anyway wakes nobody for nothing.
        if self.is_queued.load(Ordering::Relaxed) {
            return Err(Retreat { was_seen: false });
        }
        let index = self.publish(wanted.clone()).ok_or(Retreat { was_seen: false })?;
        let mut others = self.lanes().iter().enumerate().filter(|(other, _)| *other != index);
        if self.is_queued.load(Ordering::Acquire) || others.any(|(_, lane)| lane.blocks(wanted.clone())) {
            self.lanes()[index].free();
            return Err(Retreat { was_seen: true });
        }
        Ok(index)
    }

    fn queue_up(&self, wanted: impl Iterator<Item = Wanted> + Clone, was_seen: bool) -> Held {
        let mut queue = self.queue.lock();
        if was_seen && queue.waiting > 0 {
            // Somebody may have taken what was published for held.
            self.freed.notify_all();
        }
        self.is_queued.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // From here on nobody takes a lane but who is in the queue.
        queue.last += 1;
        let id = queue.last;
        let entry = |(range, sharing)| Entry { id, range, sharing };
        queue.list.extend(wanted.clone().map(entry));
        // Who came before only ever gets out of the way, so what is free once stays so.
        for wanted in wanted.clone() {
            while queue.blocks(id, &wanted) || self.lanes_block(&wanted) {
                queue.waiting += 1;
                queue = wait(&self.freed, queue);
                queue.waiting -= 1;
            }
        }
        match self.publish(wanted) {
            Some(lane) => {
                self.leave(queue, id);
                Held::Lane(lane)
            }
            None => Held::Queue { id },
        }
    }

    fn lanes_block(&self, wanted: &Wanted) -> bool {
        self.lanes().iter().any(|lane| lane.blocks(std::iter::once(wanted.clone())))
    }

    /// Takes a request out of the queue. The last one opens the lanes again.
    fn leave(&self, mut queue: MutexGuard<'_, Queue>, id: u64) {
        queue.list.retain(|entry| entry.id != id);
        if queue.list.is_empty() {
            // Release: what is in the lanes is seen by who sees this.
            self.is_queued.store(false, Ordering::Release);
        }
    }
}

/// Nothing was taken without the queue.
struct Retreat {
    /// Whether others may have seen that it was tried.
    was_seen: bool,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let lock = self.lock;
        match self.held {
            Held::Lane(index) => {
                lock.lanes()[index].free();
                fence(Ordering::SeqCst);
                if !lock.is_queued.load(Ordering::Relaxed) {
                    return;
                }
                if lock.queue.lock().waiting > 0 {
                    lock.freed.notify_all();
                }
            }
            Held::Queue { id } => {
                let queue = lock.queue.lock();
                if queue.waiting > 0 {
                    lock.freed.notify_all();
                }
                lock.leave(queue, id);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn assert_is_unused(lock: &RangeLock) {
        assert!(lock.lanes().iter().all(|lane| lane.state.load(Ordering::SeqCst) == FREE));
        let queue = lock.queue.lock();
        assert_eq!((queue.list.len(), queue.waiting), (0, 0));
        assert!(!lock.is_queued.load(Ordering::SeqCst));
    }

    /// Writers that mark every byte of their range see no mark but their own.
    #[test]
    fn overlapping_exclusive_ranges_never_meet() {
        let lock = RangeLock::new();
        let marks: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            // More than there are lanes.
            for thread in 1..=12u64 {
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
        assert_is_unused(&lock);
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
        assert_is_unused(&lock);
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
            while lock.queue.lock().waiting < 1 {
                std::thread::yield_now();
            }
            let later = scope.spawn(|| {
                let _guard = lock.take(8..9, Sharing::Shared);
                done.fetch_add(1, Ordering::SeqCst)
            });
            while lock.queue.lock().waiting < 2 {
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
        for guard in [&first, &second, &elsewhere] {
            assert!(matches!(guard.held, Held::Lane(_)), "nobody needs the queue: {guard:?}");
        }
        drop((first, second, elsewhere));
        assert_is_unused(&lock);
    }

    #[test]
    fn who_meets_nobody_needs_no_lock() {
        let lock = std::sync::Arc::new(RangeLock::new());
        let (done, is_done) = std::sync::mpsc::channel();
        let queue = lock.queue.lock();
        std::thread::spawn({
            let lock = lock.clone();
            move || {
                let first = lock.take(0..10, Sharing::Exclusive);
                let second = lock.take(10..20, Sharing::Exclusive);
                drop((first, second));
                done.send(()).unwrap();
            }
        });
        is_done.recv_timeout(std::time::Duration::from_secs(60)).expect("it does not wait for the queue");
        drop(queue);
        assert_is_unused(&lock);
    }

    #[test]
    fn who_had_to_wait_opens_the_lanes_to_others() {
        let lock = RangeLock::new();
        let first = lock.take(0..10, Sharing::Shared);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| lock.take(5..15, Sharing::Exclusive));
            while lock.queue.lock().waiting < 1 {
                std::thread::yield_now();
            }
            assert!(lock.is_queued.load(Ordering::SeqCst));
            drop(first);
            let second = waits.join().unwrap();
            assert!(matches!(second.held, Held::Lane(_)));
            let third = lock.take(20..30, Sharing::Exclusive);
            assert!(matches!(third.held, Held::Lane(_)));
        });
        assert_is_unused(&lock);
    }

    #[test]
    fn more_ranges_than_fit_and_more_threads_than_lanes_are_held_in_the_queue() {
        let lock = RangeLock::new();
        let many = || (0..PLACES as u64 + 1).map(|n| (n * 8..n * 8 + 4, Sharing::Exclusive));
        let first = lock.take_all(many());
        assert!(matches!(first.held, Held::Queue { .. }));
        let between = lock.take(4..8, Sharing::Exclusive);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(lock.take(8..9, Sharing::Shared)));
            while lock.queue.lock().waiting < 1 {
                std::thread::yield_now();
            }
            drop(first);
            waits.join().unwrap();
        });
        drop(between);
        assert_is_unused(&lock);
        let apart = |n: usize| lock.take(n as u64 * 4..n as u64 * 4 + 4, Sharing::Exclusive);
        let guards: Vec<_> = (0..LANES + 2).map(apart).collect();
        assert_eq!(guards.iter().filter(|guard| matches!(guard.held, Held::Queue { .. })).count(), 2);
        drop(guards);
        let everything = lock.take(EVERYTHING, Sharing::Exclusive);
        assert!(matches!(everything.held, Held::Lane(_)));
        drop(everything);
        assert_is_unused(&lock);
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

    /// One who holds a range while another is queued behind it and a third comes to a range that nobody has.
    #[test]
    fn one_waits_while_another_passes_elsewhere() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(2);
        builder.check(|| {
            let shared = Arc::new((RangeLock::new(), [AtomicBool::new(false), AtomicBool::new(false)]));
            let threads: Vec<_> = [[0], [1]]
                .into_iter()
                .map(|places| {
                    let shared = shared.clone();
                    loom::thread::spawn(move || enter(&shared, &places))
                })
                .collect();
            enter(&shared, &[0]);
            enter(&shared, &[1]);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let lock = &shared.0;
            assert!(!lock.is_queued.load(Ordering::SeqCst), "the lanes are open again");
            assert!(lock.lanes().iter().all(|lane| lane.state.load(Ordering::SeqCst) == FREE));
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
