//! Threads of one connection, for disks that wait: so that several of its requests wait at once.
//!
//! They are made as they are needed, and go home when all that came in a second was done by others. The number in flight is
//! bounded: twice as many as there are workers. Who submits waits for room, so a client that sends faster than the disk works
//! is held up by its own socket.

use super::activity::Busy;
use super::execute::Executor;
use super::parts::Job;
use super::reply::Shared;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a worker waits for work before it goes home.
const IDLE_TIME_MAX: Duration = Duration::from_secs(1);

/// The workers of a connection, and what they have to do.
#[derive(Debug)]
pub(super) struct Workers<'s, 'a, W> {
    shared: &'s Shared<'a, W>,
    /// Nothing else is locked while this is held.
    queue: Mutex<Queue<'a>>,
    /// There is something to do, or there never will be.
    work: Condvar,
    /// There is room, or nothing is left to do.
    room: Condvar,
    count_max: usize,
}

#[derive(Debug, Default)]
struct Queue<'a> {
    jobs: VecDeque<(Job, Busy<'a>)>,
    running: usize,
    /// Whether somebody waits for room, or for the end.
    awaited: bool,
    /// How many workers there are.
    made: usize,
    closed: bool,
}

impl<'s, 'a, W: Write> Workers<'s, 'a, W> {
    /// Up to `count_max` of them.
    pub(super) fn new(shared: &'s Shared<'a, W>, count_max: usize) -> Self {
        Self { shared, queue: Mutex::default(), work: Condvar::new(), room: Condvar::new(), count_max }
    }

    /// Whether they have nothing to do.
    fn are_idle(&self) -> bool {
        let queue = self.lock();
        queue.jobs.is_empty() && queue.running == 0
    }

    /// Waits until everything is done.
    fn finish(&self) {
        let mut queue = self.lock();
        while !queue.jobs.is_empty() || queue.running > 0 {
            queue.awaited = true;
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends the workers home once everything is done.
    fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// What each worker does until it is sent home.
    pub(super) fn work(&self) {
        let mut executor = Executor::new(self.shared);
        while let Some((job, _busy)) = self.next() {
            job.run_for_another(&mut executor);
            let mut queue = self.lock();
            queue.running -= 1;
            self.tell(queue);
        }
    }

    /// Leaves a job to the workers. It comes back if there is no worker and none can be made, and, unless `waits`, if none
    /// would begin at once; else this waits for room.
    fn submit(&self, job: Job, make: &dyn Fn() -> io::Result<()>, waits: bool) -> Result<(), Job> {
        let mut queue = self.lock();
        while waits && queue.jobs.len() >= self.count_max {
            queue.awaited = true;
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let mut one_is_free = queue.made - queue.running > queue.jobs.len();
        if !one_is_free && queue.made < self.count_max {
            match make() {
                Ok(()) => {
                    queue.made += 1;
                    one_is_free = true;
                }
                Err(error) => tracing::debug!(%error, "no more workers for a connection"),
            }
        }
        if queue.made == 0 || !(one_is_free || waits) {
            return Err(job);
        }
        queue.jobs.push_back((job, self.shared.busy()));
        drop(queue);
        self.work.notify_one();
        Ok(())
    }

    fn next(&self) -> Option<(Job, Busy<'a>)> {
        let mut queue = self.lock();
        let mut gives_up = false;
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                queue.running += 1;
                self.tell(queue);
                return Some(job);
            }
            if queue.closed || gives_up {
                queue.made -= 1;
                return None;
            }
            let waited = self.work.wait_timeout(queue, IDLE_TIME_MAX).unwrap_or_else(PoisonError::into_inner);
            queue = waited.0;
            gives_up = waited.1.timed_out();
        }
    }

    /// Tells who waits that there is room, or less under way.
    fn tell(&self, mut queue: MutexGuard<'_, Queue<'a>>) {
        let awaited = mem::take(&mut queue.awaited);
        drop(queue);
        if awaited {
            self.room.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<'a>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the workers when dropped, so that they go home however the session ends.
#[derive(Debug)]
pub(super) struct CloseWhenDropped<'w, 's, 'a, W: Write>(pub(super) &'w Workers<'s, 'a, W>);

impl<W: Write> Drop for CloseWhenDropped<'_, '_, '_, W> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// What the connection's own thread has of its workers.
pub(super) struct Crew<'w, 's, 'a, W> {
    workers: &'w Workers<'s, 'a, W>,
    make: &'w dyn Fn() -> io::Result<()>,
}

impl<W> fmt::Debug for Crew<'_, '_, '_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").field("queue", &self.workers.queue).finish_non_exhaustive()
    }
}

impl<'w, 's, 'a, W: Write> Crew<'w, 's, 'a, W> {
    /// `make` starts a thread that does [`Workers::work`].
    pub(super) fn new(workers: &'w Workers<'s, 'a, W>, make: &'w dyn Fn() -> io::Result<()>) -> Self {
        Self { workers, make }
    }

    /// Leaves a job to the workers. It comes back if there are none, for want of threads.
    ///
    /// # Blocking
    ///
    /// Waits for room, so until a worker is done with his job: not to be called with anything locked that they need.
    pub(super) fn submit(&self, job: Job) -> Result<(), Job> {
        self.workers.submit(job, self.make, true)
    }

    /// Leaves a job to a worker who has nothing else to do. It comes back if there is none.
    pub(super) fn offer(&self, job: Job) -> Result<(), Job> {
        self.workers.submit(job, self.make, false)
    }

    /// Whether they have nothing to do.
    pub(super) fn is_idle(&self) -> bool {
        self.workers.are_idle()
    }

    /// Waits until everything is done.
    pub(super) fn finish(&self) {
        self.workers.finish();
    }
}
