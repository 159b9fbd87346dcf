//! How many threads of a server are at work, against the number of cores: whether one more would find a core free.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Time is looked at in slices of this length: long enough that a busy connection shows in each, short enough that one
/// that ended is soon forgotten.
const SLICE: Duration = Duration::from_millis(4);

/// How long a thread looks around for more work before it sleeps, while work is likely: about what waking a halted core
/// costs, which is also the longest that receiving a piece takes. It yields meanwhile, so whoever has work gets the core.
pub(super) const LOOK_AROUND: Duration = Duration::from_micros(60);

/// A connection counts as busy in a slice once it has moved so many bytes in it: a quarter of a gigabyte a second, some
/// tenth of what a core can do.
const BUSY_BYTES: u64 = 1024 * 1024;

/// What a short request counts for, in bytes: it costs about as much as moving so many.
pub(super) const REQUEST_BYTES_WORTH: u64 = 16 * 1024;

/// Bits of a count of connections; the slice's number is above them.
const COUNT_BITS: u32 = 16;

/// The cores of the machine, and how many of them the connections and helpers of a server keep busy.
#[derive(Debug)]
pub struct Cores {
    count: usize,
    begun: Instant,
    /// Of this slice and the last, by the number's last bit: the slice's number, and how many connections were busy in it.
    slices: [AtomicU64; 2],
    /// Helpers that are awake.
    helpers: AtomicUsize,
    /// Threads that look around for work.
    looking: AtomicUsize,
}

/// A thread looks around for work, until this is dropped.
#[derive(Debug)]
pub(super) struct Looking<'c>(&'c AtomicUsize);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Cores {
    /// `count` of them.
    #[must_use]
    pub fn new(count: usize) -> Self {
        // Slices begin with number 2, so that an empty place is older than any.
        Self {
            count,
            begun: Instant::now() - 2 * SLICE,
            slices: [const { AtomicU64::new(0) }; 2],
            helpers: AtomicUsize::new(0),
            looking: AtomicUsize::new(0),
        }
    }

    fn slice(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis() / SLICE.as_millis()).unwrap_or(u64::MAX)
    }

    /// One more connection is busy in `slice`.
    fn note_busy(&self, slice: u64) {
        let more = |found: u64| {
            let is_same = found >> COUNT_BITS == slice;
            Some(if is_same { found + 1 } else { slice << COUNT_BITS | 1 })
        };
        // Relaxed, here and below: it is an estimate, and nothing else hangs on it.
        let _ =
            self.slices[usize::from(slice & 1 == 1)].fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// How many connections are busy; at least the one that asks.
    fn busy(&self) -> usize {
        let slice = self.slice();
        let counts = self.slices.iter().map(|place| {
            let found = place.load(Ordering::Relaxed);
            let is_recent = found >> COUNT_BITS >= slice - 1;
            if is_recent { usize::try_from(found & ((1 << COUNT_BITS) - 1)).unwrap_or(usize::MAX) } else { 0 }
        });
        counts.max().unwrap_or(0).max(1)
    }

    /// Whether each core has a connection of its own, so that none is left for anything else.
    pub(super) fn are_taken(&self) -> bool {
        self.busy() >= self.count
    }

    /// Takes a core for a helper, if one is free. To be given back.
    pub(super) fn take_one(&self) -> bool {
        let busy = self.busy();
        let more = |helpers: usize| (busy + helpers < self.count).then_some(helpers + 1);
        self.helpers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Lets a thread look around for work, unless as many as there are cores do so already: more would only take turns.
    pub(super) fn look_around(&self) -> Option<Looking<'_>> {
        let more = |looking: usize| (looking < self.count).then_some(looking + 1);
        let looks = self.looking.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        // Made only if counted: dropping it counts it off.
        looks.then(|| Looking(&self.looking))
    }

    /// A helper that took a core goes to sleep.
    pub(super) fn give_back(&self) {
        self.helpers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether there are more threads at work than cores, helpers that took one included.
    pub(super) fn are_too_few(&self) -> bool {
        self.busy() + self.helpers.load(Ordering::Relaxed) > self.count
    }
}

/// Whether looking around still pays for one thread.
///
/// A thread that looks around yields, but the scheduler gives the core to others of the same group only. If whoever is waited
/// for wants this very core and belongs to another group (another session, or service), the look finds nothing and only keeps
/// him from sending: at one look a request, a tenth of the throughput is left. So each look that found nothing has the thread
/// go to sleep at once for a while, twice as long as the time before, and each that found something half as long.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looks {
    /// How many times more it sleeps at once.
    to_skip: u32,
    /// How many times it does so after a look that found nothing.
    penalty: u32,
}

impl Looks {
    /// A look costs as much as some ten requests.
    const PENALTY_MIN: u32 = 32;
    const PENALTY_MAX: u32 = 1024;

    /// Whether to look around this time.
    pub(super) fn are_due(&mut self) -> bool {
        let are_due = self.to_skip == 0;
        self.to_skip = self.to_skip.saturating_sub(1);
        are_due
    }

    /// What the look came to.
    pub(super) fn note(&mut self, found: bool) {
        if found {
            self.penalty /= 2;
        } else {
            self.penalty = (self.penalty * 2).clamp(Self::PENALTY_MIN, Self::PENALTY_MAX);
            self.to_skip = self.penalty;
        }
    }
}

/// How busy one connection is.
#[derive(Debug, Default)]
pub(super) struct Pace {
    slice: u64,
    bytes: u64,
}

impl Pace {
    /// The connection has work worth `bytes`. Says whether a new slice has begun.
    pub(super) fn note(&mut self, cores: &Cores, bytes: u64) -> bool {
        let slice = cores.slice();
        let is_new = self.slice != slice;
        if is_new {
            *self = Self { slice, bytes: 0 };
        }
        let before = self.bytes;
        self.bytes = before.saturating_add(bytes);
        if before < BUSY_BYTES && self.bytes >= BUSY_BYTES {
            cores.note_busy(slice);
        }
        is_new
    }
}

/// What one connection tells of how busy it is, and is told of all of them.
pub(super) struct Load<'c> {
    cores: Option<&'c Cores>,
    pace: Pace,
    /// Told when all cores are taken, and when no more; and what it was told.
    crowded: Option<&'c dyn Fn(bool)>,
    is_crowded: bool,
}

impl<'c> Load<'c> {
    /// `crowded` takes it that the cores are not.
    pub(super) fn new(cores: Option<&'c Cores>, crowded: Option<&'c dyn Fn(bool)>) -> Self {
        Self { cores, pace: Pace::default(), crowded, is_crowded: false }
    }

    /// The connection has work worth `bytes`.
    pub(super) fn note(&mut self, bytes: u64) {
        let Some(cores) = self.cores else { return };
        let is_new = self.pace.note(cores, bytes);
        if is_new
            && let Some(crowded) = self.crowded
            && self.is_crowded != cores.are_taken()
        {
            self.is_crowded = !self.is_crowded;
            crowded(self.is_crowded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_look_around_as_there_are_cores() {
        let cores = Cores::new(2);
        for _ in 0..3 {
            let looking = [cores.look_around(), cores.look_around()];
            assert!(looking.iter().all(Option::is_some));
            assert!(cores.look_around().is_none() && cores.look_around().is_none());
        }
        assert!(cores.look_around().is_some());
    }

    #[test]
    fn who_never_finds_anything_hardly_looks_and_who_does_looks_always() {
        let mut looks = Looks::default();
        let mut count = 0;
        for _ in 0..10_000 {
            if looks.are_due() {
                count += 1;
                looks.note(false);
            }
        }
        assert!((1..20).contains(&count), "{count} looks in 10,000 reads");
        // Now there is always something: after the last penalty it looks each time.
        let looked = (0..10_000)
            .filter(|_| {
                looks.are_due() && {
                    looks.note(true);
                    true
                }
            })
            .count();
        assert!(looked >= 10_000 - Looks::PENALTY_MAX as usize, "{looked}");
        // One that found nothing among many that did costs little.
        looks.note(false);
        assert!((0..=Looks::PENALTY_MIN).any(|_| looks.are_due()));
    }

    #[test]
    fn a_helper_finds_a_core_while_fewer_connections_are_busy_than_there_are() {
        let cores = Cores::new(2);
        let (mut first, mut second) = (Pace::default(), Pace::default());
        first.note(&cores, BUSY_BYTES);
        assert!(cores.take_one());
        assert!(!cores.take_one(), "one connection and one helper are two");
        assert!(!cores.are_too_few());
        // Again and again, should a slice end in between.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !cores.are_too_few() {
            assert!(Instant::now() < deadline, "two busy connections and a helper are never three");
            first.note(&cores, BUSY_BYTES);
            second.note(&cores, BUSY_BYTES);
        }
        while !cores.are_taken() {
            assert!(Instant::now() < deadline, "two busy connections never take two cores");
            first.note(&cores, BUSY_BYTES);
            second.note(&cores, BUSY_BYTES);
        }
        cores.give_back();
        while cores.take_one() {
            cores.give_back();
            assert!(Instant::now() < deadline, "two busy connections leave a core");
            first.note(&cores, BUSY_BYTES);
            second.note(&cores, BUSY_BYTES);
        }
    }

    #[test]
    fn a_connection_that_ended_is_forgotten() {
        let cores = Cores::new(2);
        let (mut first, mut second) = (Pace::default(), Pace::default());
        first.note(&cores, BUSY_BYTES);
        second.note(&cores, BUSY_BYTES);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !cores.take_one() {
            assert!(Instant::now() < deadline, "never forgotten");
            first.note(&cores, BUSY_BYTES);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_connection_with_little_to_do_counts_for_none() {
        let cores = Cores::new(2);
        let (mut busy, mut quiet) = (Pace::default(), Pace::default());
        busy.note(&cores, BUSY_BYTES);
        quiet.note(&cores, REQUEST_BYTES_WORTH);
        assert!(cores.take_one());
    }

    #[test]
    fn one_core_has_none_for_a_helper() {
        assert!(!Cores::new(1).take_one());
    }
}
