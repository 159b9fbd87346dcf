//! Long requests whose pieces are done by several threads: the last one to finish answers. And reads whose reply keeps
//! an order, where pieces are read ahead.

use super::execute::Executor;
use super::lend::Lender;
use super::reply::{Failure, Lent, Shared};
use super::request::{Request, WriteRequest};
use super::wire::*;
use crate::export::Kind;
use inlinecrypt_core::backing::Durability;
use inlinecrypt_core::disk::{CHUNK_BYTES, Disk, Span};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::memory::Buffer;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// What one thread of a connection leaves to another: mostly a piece of a long request.
#[derive(Debug)]
pub(super) enum Job {
    Read(ReadPart),
    Write(WritePart),
    /// To be read only: another thread sends it when its turn has come.
    Ahead(Arc<ReadAhead>),
    /// All of a request, and its cookie.
    Whole(Request, u64),
}

impl Job {
    /// Does it, and answers it if nothing else is to come first.
    pub(super) fn run<W: Write>(self, executor: &mut Executor<'_, '_, W>) -> Result<(), Failure> {
        match self {
            Self::Read(part) => executor.read_part(&part),
            Self::Write(part) => executor.write_part(part),
            Self::Ahead(ahead) => {
                ahead.read(executor.shared().disk(), executor.shared().lender());
                Ok(())
            }
            Self::Whole(request, cookie) => executor.execute(&request, cookie),
        }
    }

    /// Does it for the connection's own thread, which may wait for the client, who waits for this: so what there is to say is sent
    /// at once. What is read ahead answers nothing, and who waits for it has the outbox. A failure ends the connection.
    pub(super) fn run_for_another<W: Write>(self, executor: &mut Executor<'_, '_, W>) {
        let shared = executor.shared();
        let flushes = !matches!(self, Self::Ahead(_));
        let mut done = self.run(executor);
        if flushes && done.is_ok() {
            done = shared.flush().map_err(Failure::from);
        }
        if let Err(failure) = done {
            shared.break_off(&failure);
        }
    }
}

/// A piece of a write that was received.
#[derive(Debug)]
pub(super) struct WritePart {
    pub(super) whole: Arc<WriteInParts>,
    pub(super) span: Span,
    pub(super) buffer: Buffer,
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

/// A piece of a read.
#[derive(Debug)]
pub(super) struct ReadPart {
    pub(super) whole: Arc<ReadInParts>,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A read whose pieces are done in any order, each answered by a chunk of its own.
///
/// A piece that fails is told by the last chunk, whoever sends it; what was read before and after is told, too.
#[derive(Debug)]
pub(super) struct ReadInParts {
    cookie: u64,
    offset: u64,
    len: u64,
    /// Chunks' worth of pieces that are not done. Changed while the outbox is locked, so that the last chunk says so.
    pending: AtomicUsize,
    /// The failure that comes first on the disk, and where.
    failure: Mutex<Option<(u64, Error)>>,
}

impl ReadInParts {
    /// A read of `len` bytes, more than 0.
    pub(super) fn new(cookie: u64, offset: u64, len: u64) -> Self {
        let chunk = CHUNK_BYTES as u64;
        let parts = (offset + len).div_ceil(chunk) - offset / chunk;
        let pending = AtomicUsize::new(usize::try_from(parts).expect("requests are bounded"));
        Self { cookie, offset, len, pending, failure: Mutex::new(None) }
    }

    /// Its pieces: what lies between multiples of [`CHUNK_BYTES`].
    pub(super) fn parts(self: Arc<Self>) -> impl Iterator<Item = ReadPart> {
        let (mut at, end, chunk) = (self.offset, self.offset + self.len, CHUNK_BYTES as u64);
        std::iter::from_fn(move || {
            let offset = at;
            at = end.min((offset / chunk + 1) * chunk);
            (offset < end).then(|| ReadPart { whole: self.clone(), offset, len: at - offset })
        })
    }

    /// Whether a piece has failed.
    fn has_failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether something before `offset` has failed, so that a piece there need not be read. Those before it must be: the
    /// reply says where the first failure is.
    pub(super) fn has_failed_before(&self, offset: u64) -> bool {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().is_some_and(|(first, _)| *first < offset)
    }

    /// Sends what was read of a piece, not its last.
    pub(super) fn send<W: Write>(
        &self,
        shared: &Shared<'_, W>,
        offset: u64,
        buffer: &mut Buffer,
        payload: Range<usize>,
    ) -> io::Result<Lent> {
        let head = data_chunk_header(0, self.cookie, offset, payload.len());
        shared.send_from(&mut *shared.lock()?, &head, buffer, payload)
    }

    /// A piece is done: sends the last that was read of it, and ends the reply if it was the last piece.
    pub(super) fn end_part<W: Write>(
        &self,
        shared: &Shared<'_, W>,
        offset: u64,
        buffer: &mut Buffer,
        payload: Range<usize>,
    ) -> io::Result<Lent> {
        let mut outbox = shared.lock()?;
        let is_last = self.pending.fetch_sub(1, Ordering::AcqRel) == 1;
        let ends = is_last && !self.has_failed();
        if ends {
            shared.count(Kind::Read, self.len);
        }
        //= NBD protocol, NBD_REPLY_FLAG_DONE: allowed on data, since nothing can fail any more once all was read.
        let flags = if ends { NBD_REPLY_FLAG_DONE } else { 0 };
        let head = data_chunk_header(flags, self.cookie, offset, payload.len());
        let lent = shared.send_from(&mut outbox, &head, buffer, payload)?;
        drop(outbox);
        if is_last && !ends {
            self.tell_failure(shared)?;
        }
        Ok(lent)
    }

    /// A piece has failed at `offset`, or was not tried since one before it had.
    pub(super) fn fail_part<W: Write>(
        &self,
        shared: &Shared<'_, W>,
        failure: Option<(u64, Error)>,
    ) -> io::Result<()> {
        if let Some((offset, error)) = failure {
            let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(known, _)| offset < *known) {
                *first = Some((offset, error));
            }
        }
        let outbox = shared.lock()?;
        let is_last = self.pending.fetch_sub(1, Ordering::AcqRel) == 1;
        drop(outbox);
        if is_last { self.tell_failure(shared) } else { Ok(()) }
    }

    fn tell_failure<W: Write>(&self, shared: &Shared<'_, W>) -> io::Result<()> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (offset, error) = failure.expect("only a read that failed is told so");
        shared.fail(self.cookie, &error, Some(offset))
    }
}

/// Pieces of a read that are read ahead, in order. Those that were not begun are given up when it is dropped.
#[derive(Debug, Default)]
pub(super) struct ReadsAhead(pub(super) VecDeque<Arc<ReadAhead>>);

impl Drop for ReadsAhead {
    fn drop(&mut self) {
        for ahead in &self.0 {
            let mut state = ahead.state.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*state, Ahead::Waiting) {
                *state = Ahead::Taken;
            }
        }
    }
}

/// A piece that is read before its turn to be sent has come, by whoever has time.
#[derive(Debug)]
pub(super) struct ReadAhead {
    span: Span,
    state: Mutex<Ahead>,
    done: Condvar,
}

#[derive(Debug)]
enum Ahead {
    Waiting,
    Running,
    Done(Result<Buffer, Error>),
    /// Somebody needs it now and reads it himself, or has it.
    Taken,
}

impl ReadAhead {
    /// `span` is for a large buffer.
    pub(super) fn new(span: Span) -> Self {
        Self { span, state: Mutex::new(Ahead::Waiting), done: Condvar::new() }
    }

    pub(super) fn span(&self) -> Span {
        self.span
    }

    /// Reads it, unless it was taken.
    pub(super) fn read(&self, disk: &dyn Disk, lender: Option<&Lender<'_>>) {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if !matches!(*state, Ahead::Waiting) {
                return;
            }
            *state = Ahead::Running;
        }
        // Without memory it is left to who needs it.
        let state = match lender.and_then(Lender::take).or_else(|| disk.try_large_buffer()) {
            Some(mut buffer) => Ahead::Done(disk.read(self.span, &mut buffer).map(|()| buffer)),
            None => Ahead::Waiting,
        };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.done.notify_all();
    }

    /// What was read, waiting for who is reading. `None`: nobody is, and the caller has to.
    pub(super) fn take(&self) -> Option<Result<Buffer, Error>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match mem::replace(&mut *state, Ahead::Taken) {
                Ahead::Waiting | Ahead::Taken => return None,
                Ahead::Done(result) => return Some(result),
                Ahead::Running => {
                    *state = Ahead::Running;
                    state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}
