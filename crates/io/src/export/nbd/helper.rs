//! The second thread of a connection, for long requests: one piece is encrypted and written, or read and sent, while the
//! next is received or read.
//!
//! It is a convenience and nothing waits for it: a piece that it has no room for is done by the connection's own thread,
//! and so is one that it has not begun when there is nothing else left to do. It is made when first needed, and only
//! works while there is a core for it ([`Cores`]). Between two pieces it looks around for a while before it sleeps, since
//! waking a core that went to sleep takes longer than a piece. While it is awake it keeps off the core of the connection's own
//! thread, to which the scheduler would draw it.

use super::activity::Busy;
use super::cores::{Cores, LOOK_AROUND, Looks};
use super::execute::Executor;
use super::parts::Job;
use super::place::{current_core, keep_off};
use super::reply::{Failure, Shared};
use rustix::process::Pid;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Pieces that may wait for the helper: one while the connection's own thread does a piece of its own, and one while it
/// receives the next.
const WAITING_MAX: usize = 2;

/// How often it changes its core at most: that costs as much as several pieces, so who is driven out of one again and again
/// rather stays.
const MOVE_INTERVAL: Duration = Duration::from_millis(4);

/// The second thread of a connection, and what it has to do.
pub(super) struct Helper<'s, 'a, W> {
    shared: &'s Shared<'a, W>,
    cores: &'a Cores,
    /// Nothing else is locked while this is held.
    queue: Mutex<Queue<'a>>,
    /// How many jobs are in the queue: what the helper looks at before it takes the lock.
    waiting: AtomicUsize,
    /// The connection's own thread, and the core on which it was seen last.
    own: Pid,
    core: AtomicUsize,
    /// There is something to do, or there never will be.
    work: Condvar,
    /// Nothing is left to do.
    done: Condvar,
}

#[derive(Debug, Default)]
struct Queue<'a> {
    jobs: VecDeque<(Job, Busy<'a>)>,
    is_running: bool,
    is_made: bool,
    /// It has taken a core, and gives it back before it sleeps.
    is_awake: bool,
    closed: bool,
    looks: Looks,
}

/// Whether whoever offers a job has more to do himself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Besides {
    More,
    Nothing,
}

impl<W> fmt::Debug for Helper<'_, '_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helper").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl<'s, 'a, W: Write> Helper<'s, 'a, W> {
    /// To be made by the thread that it is to help.
    pub(super) fn new(shared: &'s Shared<'a, W>, cores: &'a Cores) -> Self {
        Self {
            shared,
            cores,
            queue: Mutex::default(),
            waiting: AtomicUsize::new(0),
            own: rustix::thread::gettid(),
            core: AtomicUsize::new(usize::MAX),
            work: Condvar::new(),
            done: Condvar::new(),
        }
    }

    /// Gives the helper a job, or gives the job back: no room, no core, or not worth it. `make` starts its thread.
    fn offer(&self, job: Job, besides: Besides, make: &dyn Fn() -> io::Result<()>) -> Result<(), Job> {
        let mut queue = self.lock();
        if queue.jobs.len() >= WAITING_MAX {
            return Err(job);
        }
        let wakes = !queue.is_awake;
        if wakes {
            // Waking it takes longer than a piece does.
            if besides == Besides::Nothing || !self.cores.take_one() {
                return Err(job);
            }
            if !queue.is_made {
                if let Err(error) = make() {
                    tracing::debug!(%error, "no second thread for a connection");
                    self.cores.give_back();
                    return Err(job);
                }
                queue.is_made = true;
            }
            queue.is_awake = true;
        } else if self.cores.are_too_few() {
            return Err(job);
        }
        queue.jobs.push_back((job, self.shared.busy()));
        self.core.store(current_core(), Ordering::Relaxed);
        self.waiting.store(queue.jobs.len(), Ordering::Release);
        drop(queue);
        if wakes {
            self.work.notify_one();
        }
        Ok(())
    }

    /// Takes a read back that has not begun.
    fn take_back(&self) -> Option<(Job, Busy<'a>)> {
        if self.waiting.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut queue = self.lock();
        // The last one: the helper takes from the front.
        let (Job::Read(_) | Job::Whole(..), _) = queue.jobs.back()? else { return None };
        let taken = queue.jobs.pop_back();
        self.waiting.store(queue.jobs.len(), Ordering::Release);
        taken
    }

    /// Waits until it has nothing to do.
    fn finish(&self) {
        let mut queue = self.lock();
        while !queue.jobs.is_empty() || queue.is_running {
            queue = self.done.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends it home once everything is done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// What its thread does until it is sent home.
    pub(super) fn work(&self) {
        let mut executor = Executor::new(self.shared);
        let mut moved = None::<Instant>;
        while let Some((job, _busy)) = self.next() {
            let core = self.core.load(Ordering::Relaxed);
            if core == current_core() && moved.is_none_or(|moved| moved.elapsed() >= MOVE_INTERVAL) {
                keep_off(core, self.own);
                moved = Some(Instant::now());
            }
            job.run_for_another(&mut executor);
        }
    }

    fn next(&self) -> Option<(Job, Busy<'a>)> {
        let mut queue = self.lock();
        queue.is_running = false;
        // Around, and found nothing.
        let mut looked = false;
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                self.waiting.store(queue.jobs.len(), Ordering::Release);
                queue.is_running = true;
                return Some(job);
            }
            self.done.notify_all();
            let gives_up = queue.closed || (queue.is_awake && looked);
            if gives_up && queue.is_awake {
                queue.is_awake = false;
                self.cores.give_back();
            }
            if queue.closed {
                return None;
            }
            if queue.is_awake {
                if queue.looks.are_due() {
                    drop(queue);
                    looked = !self.look_around();
                    queue = self.lock();
                    queue.looks.note(!looked);
                } else {
                    looked = true;
                }
            } else {
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                looked = false;
            }
        }
    }

    /// Whether a job comes soon.
    fn look_around(&self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < LOOK_AROUND {
            if self.waiting.load(Ordering::Acquire) > 0 {
                return true;
            }
            thread::yield_now();
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, Queue<'a>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends the helper home when dropped, so that it goes however the session ends.
#[derive(Debug)]
pub(super) struct HomeWhenDropped<'h, 's, 'a, W: Write>(pub(super) &'h Helper<'s, 'a, W>);

impl<W: Write> Drop for HomeWhenDropped<'_, '_, '_, W> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// What the connection's own thread has of its helper.
pub(super) struct Help<'h, 's, 'a, W> {
    helper: &'h Helper<'s, 'a, W>,
    make: &'h dyn Fn() -> io::Result<()>,
}

impl<W> fmt::Debug for Help<'_, '_, '_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Help").field("helper", self.helper).finish_non_exhaustive()
    }
}

impl<'h, 's, 'a, W: Write> Help<'h, 's, 'a, W> {
    /// `make` starts a thread that does [`Helper::work`].
    pub(super) fn new(helper: &'h Helper<'s, 'a, W>, make: &'h dyn Fn() -> io::Result<()>) -> Self {
        Self { helper, make }
    }

    /// See [`Helper::offer`].
    pub(super) fn offer(&self, job: Job, besides: Besides) -> Result<(), Job> {
        self.helper.offer(job, besides, self.make)
    }

    /// Does what has not begun, before there is nothing to do but to wait.
    pub(super) fn do_what_waits(&self, executor: &mut Executor<'s, 'a, W>) -> Result<(), Failure> {
        while let Some((job, _busy)) = self.helper.take_back() {
            job.run(executor)?;
        }
        Ok(())
    }

    /// Waits until the helper has nothing to do.
    pub(super) fn finish(&self) {
        self.helper.finish();
    }
}
