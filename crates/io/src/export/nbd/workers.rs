//! Threads of one connection, for disks that wait: so that several of its requests wait at once.
//!
//! The number in flight is bounded: twice as many as there are workers. Who submits waits for room, so a client that
//! sends faster than the disk works is held up by its own socket.

use super::activity::Busy;
use super::execute::Executor;
use super::reply::Shared;
use super::request::{Request, WriteRequest};
use crate::export::Kind;
use inlinecrypt_core::backing::Durability;
use inlinecrypt_core::disk::Span;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::memory::Buffer;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

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
    Part(Part),
}

/// A piece of a write that was received.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) whole: Arc<WriteInParts>,
    pub(super) span: Span,
    pub(super) buffer: Buffer,
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
    pub(super) fn submit_part(&self, part: Part) {
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

/// A write whose pieces are done in any order. Answered when the last is.
#[derive(Debug)]
pub(super) struct WriteInParts {
    write: WriteRequest,
    cookie: u64,
    /// Pieces that are not done, and one for who receives them.
    pending: AtomicUsize,
    /// The first failure.
    failure: Mutex<Option<Error>>,
}

impl WriteInParts {
    pub(super) fn new(write: WriteRequest, cookie: u64) -> Self {
        Self { write, cookie, pending: AtomicUsize::new(1), failure: Mutex::new(None) }
    }

    pub(super) fn durability(&self) -> Durability {
        self.write.durability
    }

    /// One more piece is on its way.
    pub(super) fn begin_part(&self) {
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    /// Remembers what became of a piece.
    pub(super) fn note(&self, result: Result<(), Error>) {
        if let Err(error) = result {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// A piece, or receiving, is done. The last one answers.
    pub(super) fn end_part<W: Write>(&self, shared: &Shared<'_, W>) -> io::Result<()> {
        if self.pending.fetch_sub(1, Ordering::AcqRel) > 1 {
            return Ok(());
        }
        let result = match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        };
        shared.conclude(self.cookie, Kind::Write, self.write.len.into(), result)
    }
}
