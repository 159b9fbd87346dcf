//! Threads of one connection, for disks that wait: so that several of its requests wait at once.
//!
//! The number in flight is bounded: twice as many as there are workers. Who submits waits for room, so a client that
//! sends faster than the disk works is held up by its own socket.

use super::activity::Busy;
use super::execute::Executor;
use super::parts::WritePart;
use super::reply::Shared;
use super::request::Request;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

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
    waiting_max: usize,
}

#[derive(Debug, Default)]
struct Queue<'a> {
    jobs: VecDeque<(Job, Busy<'a>)>,
    running: usize,
    closed: bool,
}

#[derive(Debug)]
enum Job {
    Request(Request, u64),
    Part(WritePart),
}

impl<'s, 'a, W: Write> Workers<'s, 'a, W> {
    pub(super) fn new(shared: &'s Shared<'a, W>, count: usize) -> Self {
        Self {
            shared,
            queue: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            waiting_max: count,
        }
    }

    /// Leaves a request to the workers. Waits for room.
    pub(super) fn submit(&self, request: Request, cookie: u64) {
        self.push(Job::Request(request, cookie));
    }

    /// Leaves a piece of a write to the workers. Waits for room.
    pub(super) fn submit_part(&self, part: WritePart) {
        self.push(Job::Part(part));
    }

    /// Whether they have nothing to do.
    pub(super) fn are_idle(&self) -> bool {
        let queue = self.lock();
        queue.jobs.is_empty() && queue.running == 0
    }

    /// Waits until everything is done.
    pub(super) fn finish(&self) {
        let mut queue = self.lock();
        while !queue.jobs.is_empty() || queue.running > 0 {
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends the workers home once everything is done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// What each worker does until it is sent home.
    pub(super) fn work(&self) {
        let mut executor = Executor::new(self.shared);
        while let Some((job, _busy)) = self.next() {
            let done = match job {
                Job::Request(request, cookie) => executor.execute(&request, cookie),
                Job::Part(part) => executor.write_part(part),
            };
            // At once: the next job may wait long for the disk.
            if let Err(failure) = done.and_then(|()| Ok(self.shared.flush()?)) {
                self.shared.break_off(&failure);
            }
            self.lock().running -= 1;
            self.room.notify_all();
        }
    }

    fn push(&self, job: Job) {
        let mut queue = self.lock();
        while queue.jobs.len() >= self.waiting_max {
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.jobs.push_back((job, self.shared.busy()));
        drop(queue);
        self.work.notify_one();
    }

    fn next(&self) -> Option<(Job, Busy<'a>)> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                queue.running += 1;
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
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
