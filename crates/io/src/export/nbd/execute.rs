//! What requests do: from the disk to a reply, or from the client to the disk.
//!
//! Each thread of a connection has an [`Executor`]. Whether that is the thread that talks to the client or a worker makes
//! no difference here.

use super::activity::Busy;
use super::helper::{Besides, Help};
use super::lend::Lender;
use super::parts::{Job, ReadAhead, ReadInParts, ReadPart, ReadsAhead, WriteInParts, WritePart};
use super::reply::{Failure, Lent, Shared};
use super::request::{Request, WriteRequest};
use super::stream::GATHER_BYTES_MIN;
use super::wire::*;
use super::workers::Crew;
use crate::export::Kind;
use inlinecrypt_core::backing::Durability;
use inlinecrypt_core::batch::{Batch, Transfer};
use inlinecrypt_core::disk::{CHUNK_BYTES, Disk, LARGE_BUFFER_BYTES, SMALL_BUFFER_BYTES, Span};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::memory::Buffer;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

/// From this length on the pieces of a request may be done by a second thread, in bytes: handing one over costs about a
/// microsecond, moving and encrypting so many about ten.
pub(super) const LONG_BYTES_MIN: u32 = 64 * 1024;

/// Whether a piece is the last of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IsLast(pub(super) bool);

/// How many pieces of a read are read ahead by workers: with the one at hand as many as there usually are workers.
const CREW_AHEAD_MAX: usize = 3;

/// Who reads pieces ahead, unless he has other things to do, and how many at once.
struct ReadingAhead<'f> {
    offer: &'f dyn Fn(Job) -> Result<(), Job>,
    count_max: usize,
}

/// Most short requests that are done together. Clients have fewer under way; more would only make them wait for the
/// first answer.
const GATHERED_MAX: usize = 64;

/// Does requests: long ones one at a time, short ones that came together also together.
#[derive(Debug)]
pub(super) struct Executor<'s, 'a, W> {
    shared: &'s Shared<'a, W>,
    /// Memory for when the pool has none; made when first needed, and kept.
    private: Option<Buffer>,
    gathered: Gathered<'a>,
}

/// Short requests that were received and not done yet.
#[derive(Debug, Default)]
struct Gathered<'a> {
    batch: Batch,
    /// Of each piece of the batch, its request's.
    cookies: Vec<u64>,
    /// There while there are any: the buffer, and the fact that something is under way.
    lease: Option<(Lease, Busy<'a>)>,
}

/// A buffer, and where it goes afterwards.
#[derive(Debug)]
enum Lease {
    Pooled(Buffer),
    Private(Buffer),
}

impl Lease {
    fn buffer(&mut self) -> &mut Buffer {
        match self {
            Self::Pooled(buffer) | Self::Private(buffer) => buffer,
        }
    }
}

impl<'s, 'a, W: Write> Executor<'s, 'a, W> {
    pub(super) fn new(shared: &'s Shared<'a, W>) -> Self {
        Self { shared, private: None, gathered: Gathered::default() }
    }

    pub(super) fn shared(&self) -> &'s Shared<'a, W> {
        self.shared
    }

    /// Does a request that has no payload, and answers it.
    pub(super) fn execute(&mut self, request: &Request, cookie: u64) -> Result<(), Failure> {
        let disk = self.shared.disk();
        let (kind, len, result) = match *request {
            Request::Read { offset, len, one_chunk } => return self.read(cookie, offset, len, one_chunk),
            Request::BlockStatus { offset, len, extents_max } => {
                return self.block_status(cookie, offset, len, extents_max);
            }
            Request::Flush => (Kind::Flush, 0, disk.flush()),
            Request::Trim { offset, len, durability } => {
                let result = disk.trim(offset, len.into()).and_then(|()| match durability {
                    Durability::Durable => disk.flush(),
                    Durability::Cached => Ok(()),
                });
                (Kind::Trim, len, result)
            }
            Request::WriteZeroes { offset, len, durability, zeroing } => {
                let result = self
                    .with_buffer(|buffer| disk.write_zeroes(offset, len.into(), zeroing, durability, buffer));
                (Kind::WriteZeroes, len, result.and_then(|done| done))
            }
            Request::Cache { offset, len } => {
                disk.prefetch(offset, len.into());
                (Kind::Cache, len, Ok(()))
            }
        };
        Ok(self.shared.conclude(cookie, kind, len.into(), result)?)
    }

    /// Does a write. `receive` fills memory from the client, and gets the whole payload whatever happens.
    pub(super) fn write(
        &mut self,
        write: &WriteRequest,
        cookie: u64,
        mut receive: impl FnMut(&mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let disk = self.shared.disk();
        let done = self.with_buffer(|buffer| write_pieces(disk, write, buffer, &mut receive));
        let result = match done {
            Ok(done) => done?,
            Err(no_memory) => {
                skip(write.len.into(), &mut receive)?;
                Err(no_memory)
            }
        };
        Ok(self.shared.conclude(cookie, Kind::Write, write.len.into(), result)?)
    }

    /// Receives a write and hands its pieces over, each with whether it is the last. A piece that comes back, or for
    /// which no large buffer is free, is written here and now: who waits for memory waits for his own work.
    pub(super) fn write_in_parts(
        &mut self,
        write: &WriteRequest,
        cookie: u64,
        mut hand_over: impl FnMut(WritePart, IsLast) -> Result<(), Job>,
        mut receive: impl FnMut(&mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let disk = self.shared.disk();
        let whole = Arc::new(WriteInParts::new(*write, cookie));
        let (mut offset, mut rest) = (write.offset, u64::from(write.len));
        while rest > 0 {
            if let Some(mut buffer) = disk.try_large_buffer() {
                let span = disk.span(offset, rest, buffer.bytes().len());
                receive(&mut buffer.bytes_mut()[span.payload()])?;
                let len = wide(span.payload().len());
                (offset, rest) = (offset + len, rest - len);
                whole.begin_part();
                let part = WritePart { whole: whole.clone(), span, buffer };
                if let Err(job) = hand_over(part, IsLast(rest == 0)) {
                    job.run(self)?;
                }
            } else {
                let done = self.with_buffer(|buffer| {
                    let span = disk.span(offset, rest, buffer.bytes().len());
                    receive(&mut buffer.bytes_mut()[span.payload()])?;
                    let len = wide(span.payload().len());
                    (offset, rest) = (offset + len, rest - len);
                    Ok::<_, Failure>(disk.write(span, buffer, write.durability))
                });
                match done {
                    Ok(done) => whole.note(done?),
                    Err(no_memory) => {
                        skip(rest, &mut receive)?;
                        rest = 0;
                        whole.note(Err(no_memory));
                    }
                }
            }
        }
        Ok(whole.end_part(self.shared)?)
    }

    /// Writes one piece of a write, and answers it if that was the last.
    pub(super) fn write_part(&mut self, part: WritePart) -> Result<(), Failure> {
        let WritePart { whole, span, mut buffer } = part;
        whole.note(self.shared.disk().write(span, &mut buffer, whole.durability()));
        drop(buffer);
        Ok(whole.end_part(self.shared)?)
    }

    /// Does a request, with some help if it is a long read. `besides`: what there is to do afterwards.
    pub(super) fn execute_with_help(
        &mut self,
        request: &Request,
        cookie: u64,
        help: &Help<'_, 's, 'a, W>,
        besides: Besides,
    ) -> Result<(), Failure> {
        let shared = self.shared;
        match *request {
            Request::Read { offset, len, one_chunk: false } if len >= LONG_BYTES_MIN => {
                let len = u64::from(len);
                if shared.is_structured() {
                    return self.read_in_parts(cookie, offset, len, |part, IsLast(last)| {
                        help.offer(Job::Read(part), if last { besides } else { Besides::More })
                    });
                }
                if chunk_end(offset, offset + len) == offset + len {
                    return match help.offer(Job::Whole(*request, cookie), besides) {
                        Ok(()) => Ok(()),
                        Err(_) => self.execute(request, cookie),
                    };
                }
                let offer = |job| help.offer(job, Besides::More);
                self.read_simple(cookie, offset, len, Some(&ReadingAhead { offer: &offer, count_max: 1 }))
            }
            _ => self.execute(request, cookie),
        }
    }

    /// Does a request, or leaves it to workers. The pieces of a long read wait for the disk together. `is_lone`: nothing else
    /// is under way, so that waking a worker gains nothing.
    pub(super) fn execute_with_crew(
        &mut self,
        request: &Request,
        cookie: u64,
        crew: &Crew<'_, 's, 'a, W>,
        is_lone: bool,
    ) -> Result<(), Failure> {
        match *request {
            Request::Read { offset, len, one_chunk: false } if self.has_pieces_at_once(offset, len) => {
                if self.shared.is_structured() {
                    self.read_in_parts(cookie, offset, len.into(), |part, IsLast(last)| {
                        let job = Job::Read(part);
                        if is_lone && last { Err(job) } else { crew.submit(job) }
                    })
                } else {
                    let offer = |job| crew.offer(job);
                    let ahead = ReadingAhead { offer: &offer, count_max: CREW_AHEAD_MAX };
                    self.read_simple(cookie, offset, len.into(), Some(&ahead))
                }
            }
            _ if is_lone => self.execute(request, cookie),
            _ => crew.submit(Job::Whole(*request, cookie)).or_else(|job| job.run(self)),
        }
    }

    /// Whether a read has several pieces that are best waited for together.
    fn has_pieces_at_once(&self, offset: u64, len: u32) -> bool {
        let end = offset + u64::from(len);
        self.shared.disk().geometry().does_batches_at_once && chunk_end(offset, end) < end
    }

    /// Hands the pieces of a read over, each with whether it is the last. One that comes back is read here and now.
    pub(super) fn read_in_parts(
        &mut self,
        cookie: u64,
        offset: u64,
        len: u64,
        mut hand_over: impl FnMut(ReadPart, IsLast) -> Result<(), Job>,
    ) -> Result<(), Failure> {
        let mut parts = Arc::new(ReadInParts::new(cookie, offset, len)).parts().peekable();
        while let Some(part) = parts.next() {
            if let Err(job) = hand_over(part, IsLast(parts.peek().is_none())) {
                job.run(self)?;
            }
        }
        Ok(())
    }

    /// Reads one piece of a read and sends it, and ends the reply if that was the last.
    pub(super) fn read_part(&mut self, part: &ReadPart) -> Result<(), Failure> {
        let shared = self.shared;
        let ReadPart { whole, offset, len } = part;
        if whole.has_failed_before(*offset) {
            return Ok(whole.fail_part(shared, None)?);
        }
        let (mut at, end) = (*offset, offset + len);
        loop {
            let (span, mut lease) = match self.read_piece(at, end) {
                Ok(read) => read,
                Err(error) => return Ok(whole.fail_part(shared, Some((at, error)))?),
            };
            let (payload, buffer) = (span.payload(), lease.buffer());
            let next = at + wide(payload.len());
            let lent = if next == end {
                whole.end_part(shared, at, buffer, payload)?
            } else {
                whole.send(shared, at, buffer, payload)?
            };
            self.settle(lease, lent);
            if next == end {
                return Ok(());
            }
            at = next;
        }
    }

    fn read(&mut self, cookie: u64, offset: u64, len: u32, one_chunk: bool) -> Result<(), Failure> {
        let len = u64::from(len);
        match (self.shared.is_structured(), one_chunk) {
            (false, _) => self.read_simple(cookie, offset, len, None),
            (true, false) => self.read_chunks(cookie, offset, len),
            (true, true) => self.read_one_chunk(cookie, offset, len),
        }
    }

    /// Answers a read by chunks, one for each piece.
    fn read_chunks(&mut self, cookie: u64, offset: u64, len: u64) -> Result<(), Failure> {
        let shared = self.shared;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let (span, mut lease) = match self.read_piece(at, end) {
                Ok(read) => read,
                Err(error) => return Ok(shared.fail(cookie, &error, Some(at))?),
            };
            let payload = span.payload();
            let next = at + wide(payload.len());
            //= NBD protocol, NBD_REPLY_FLAG_DONE: allowed on data, since nothing can fail any more once it was read.
            let flags = if next == end { NBD_REPLY_FLAG_DONE } else { 0 };
            if next == end {
                shared.count(Kind::Read, len);
            }
            let head = data_chunk_header(flags, cookie, at, payload.len());
            let lent = shared.send_from(&mut *shared.lock()?, &head, lease.buffer(), payload)?;
            self.settle(lease, lent);
            at = next;
        }
        Ok(())
    }

    /// Answers a read by one chunk: in place if it is one piece, gathered else.
    fn read_one_chunk(&mut self, cookie: u64, offset: u64, len: u64) -> Result<(), Failure> {
        let shared = self.shared;
        let end = offset + len;
        // Never more than a chunk, by the rules for requests; exactly so much, without growing.
        let mut gathered = Vec::new();
        let mut at = offset;
        while at < end {
            let (span, mut lease) = match self.read_piece(at, end) {
                Ok(read) => read,
                Err(error) => return Ok(shared.fail(cookie, &error, Some(at))?),
            };
            let payload = span.payload();
            if wide(payload.len()) == len {
                shared.count(Kind::Read, len);
                let head = data_chunk_header(NBD_REPLY_FLAG_DONE, cookie, offset, payload.len());
                let lent = shared.send_from(&mut *shared.lock()?, &head, lease.buffer(), payload)?;
                self.settle(lease, lent);
                return Ok(());
            }
            if gathered.is_empty() {
                gathered.reserve_exact(usize::try_from(len).unwrap_or(CHUNK_BYTES));
            }
            at += wide(payload.len());
            gathered.extend_from_slice(&lease.buffer().bytes()[payload]);
            self.settle(lease, None);
        }
        shared.count(Kind::Read, len);
        let head = data_chunk_header(NBD_REPLY_FLAG_DONE, cookie, offset, gathered.len());
        Ok(shared.send(&head, &gathered)?)
    }

    /// Answers a read by a simple reply. With help, the next pieces are read while the last is sent.
    ///
    /// The first piece is read before anything is said, so that the common failures can still be told.
    fn read_simple(
        &mut self,
        cookie: u64,
        offset: u64,
        len: u64,
        help: Option<&ReadingAhead<'_>>,
    ) -> Result<(), Failure> {
        let shared = self.shared;
        let end = offset + len;
        // Who reads ahead must never be waited for by `offer`, since the outbox is locked below.
        let mut ahead = ReadsAhead::default();
        let read_ahead = |ReadsAhead(ahead): &mut ReadsAhead, from: u64| {
            let Some(ReadingAhead { offer, count_max }) = help else { return };
            let mut at = ahead.back().map_or(from, |last| chunk_end(last.span().offset(), end));
            while at < end && ahead.len() < *count_max {
                let piece = Arc::new(ReadAhead::new(shared.disk().span(at, end - at, LARGE_BUFFER_BYTES)));
                if offer(Job::Ahead(piece.clone())).is_err() {
                    break;
                }
                ahead.push_back(piece);
                at = chunk_end(at, end);
            }
        };
        let late = |error: Error| {
            //= NBD protocol, NBD_CMD_READ, simple replies: an error after the header is a hard disconnect.
            shared.note_late_failure(&error);
            Failure::Late
        };
        read_ahead(&mut ahead, chunk_end(offset, end));
        let (span, mut lease) = match self.read_piece(offset, end) {
            Ok(read) => read,
            Err(error) => return Ok(shared.fail(cookie, &error, None)?),
        };
        let mut outbox = shared.lock()?;
        let lent = shared.send_from(&mut outbox, &simple_reply(0, cookie), lease.buffer(), span.payload())?;
        self.settle(lease, lent);
        let mut at = offset + wide(span.payload().len());
        while at < end {
            let is_due = ahead.0.front().is_some_and(|first| first.span().offset() == at);
            let due = if is_due { ahead.0.pop_front() } else { None };
            read_ahead(&mut ahead, chunk_end(at, end));
            let (span, mut lease) = match due.and_then(|due| due.take().map(|read| (due.span(), read))) {
                Some((span, read)) => (span, Lease::Pooled(read.map_err(late)?)),
                None => self.read_piece(at, end).map_err(late)?,
            };
            let lent = shared.send_from(&mut outbox, &[], lease.buffer(), span.payload())?;
            self.settle(lease, lent);
            at += wide(span.payload().len());
        }
        shared.count(Kind::Read, len);
        Ok(())
    }

    fn block_status(
        &mut self,
        cookie: u64,
        offset: u64,
        len: u32,
        extents_max: usize,
    ) -> Result<(), Failure> {
        let extents = match self.shared.disk().extents(offset, len.into(), extents_max) {
            Ok(extents) => extents,
            Err(error) => return Ok(self.shared.fail(cookie, &error, None)?),
        };
        let mut payload = BASE_ALLOCATION_ID.to_be_bytes().to_vec();
        let (mut rest, mut last) = (len, None::<(u32, u32)>);
        let mut push = |(run, state): (u32, u32)| {
            payload.extend_from_slice(&run.to_be_bytes());
            payload.extend_from_slice(&state.to_be_bytes());
        };
        for extent in extents.iter().take(extents_max) {
            let run = u32::try_from(extent.len).unwrap_or(u32::MAX).min(rest);
            rest -= run;
            // Never NBD_STATE_ZERO: a hole in ciphertext does not read as zeroes.
            let state = if extent.allocated { 0 } else { NBD_STATE_HOLE };
            last = match last {
                _ if run == 0 => last,
                Some((before, same)) if same == state => Some((before + run, state)),
                Some(other) => {
                    push(other);
                    Some((run, state))
                }
                None => Some((run, state)),
            };
        }
        //= NBD protocol, NBD_CMD_BLOCK_STATUS: at least one descriptor; status 0 may be said of any block.
        push(last.unwrap_or((len, 0)));
        Ok(self.shared.send_status(cookie, len, &payload)?)
    }

    /// Takes a short read to those that will be done together. `false`: it is for [`execute`](Self::execute).
    pub(super) fn gather_read(&mut self, request: &Request, cookie: u64) -> Result<bool, Failure> {
        let Request::Read { offset, len, .. } = *request else { return Ok(false) };
        let Some(span) = self.only_span(offset, len) else { return Ok(false) };
        Ok(self.gather(span, Transfer::Read, cookie)?.is_some())
    }

    /// Takes a short write to those that will be done together, and returns where its payload is to be put, at once.
    /// `None`: it is for [`write`](Self::write).
    pub(super) fn gather_write(
        &mut self,
        write: &WriteRequest,
        cookie: u64,
    ) -> Result<Option<&mut [u8]>, Failure> {
        let WriteRequest { offset, len, durability } = *write;
        let Some(span) = self.only_span(offset, len) else { return Ok(None) };
        let Some(place) = self.gather(span, Transfer::Write(durability), cookie)? else { return Ok(None) };
        let (lease, _) = self.gathered.lease.as_mut().expect("just gathered");
        Ok(Some(&mut lease.buffer().bytes_mut()[place]))
    }

    /// The span of a request that is short and one piece whatever the buffer.
    fn only_span(&self, offset: u64, len: u32) -> Option<Span> {
        if len >= LONG_BYTES_MIN {
            return None;
        }
        let span = self.shared.disk().span(offset, len.into(), SMALL_BUFFER_BYTES);
        (wide(span.payload().len()) == u64::from(len)).then_some(span)
    }

    /// `None` if there is no memory for it.
    fn gather(
        &mut self,
        span: Span,
        transfer: Transfer,
        cookie: u64,
    ) -> Result<Option<Range<usize>>, Failure> {
        if self.gathered.cookies.len() == GATHERED_MAX {
            self.finish_gathered()?;
        }
        loop {
            if self.gathered.lease.is_none() {
                // Who finds none is told by the other way that his request takes.
                let Ok(lease) = self.lease() else { return Ok(None) };
                self.gathered.lease = Some((lease, self.shared.busy()));
            }
            let Gathered { batch, cookies, lease } = &mut self.gathered;
            let room = lease.as_mut().expect("just leased").0.buffer().bytes().len();
            if let Some(place) = batch.push(span, transfer, room) {
                cookies.push(cookie);
                return Ok(Some(place));
            }
            assert!(!batch.is_empty(), "every buffer has room for one piece");
            self.finish_gathered()?;
        }
    }

    /// Does what was gathered, and answers it. Returns how many requests that were.
    pub(super) fn finish_gathered(&mut self) -> Result<usize, Failure> {
        let Some((mut lease, _busy)) = self.gathered.lease.take() else { return Ok(0) };
        let Gathered { batch, cookies, .. } = &mut self.gathered;
        self.shared.disk().transfer(batch, lease.buffer());
        let answered = self.shared.answer(batch, cookies, lease.buffer().bytes());
        let count = cookies.len();
        batch.clear();
        cookies.clear();
        self.give_back(lease);
        answered?;
        Ok(count)
    }

    /// Lends a large buffer of the pool, or else the private one.
    fn with_buffer<T>(&mut self, work: impl FnOnce(&mut Buffer) -> T) -> Result<T, Error> {
        let mut lease = self.lease()?;
        let result = work(lease.buffer());
        self.give_back(lease);
        Ok(result)
    }

    fn lease(&mut self) -> Result<Lease, Error> {
        let disk = self.shared.disk();
        if let Some(buffer) = disk.try_large_buffer() {
            return Ok(Lease::Pooled(buffer));
        }
        match self.private.take() {
            Some(buffer) => Ok(Lease::Private(buffer)),
            None => Ok(Lease::Private(disk.private_buffer(SMALL_BUFFER_BYTES)?)),
        }
    }

    /// Reads the piece that begins at `at`, of a request that ends at `end`, into a buffer to be sent from.
    fn read_piece(&mut self, at: u64, end: u64) -> Result<(Span, Lease), Error> {
        let disk = self.shared.disk();
        let lender = self.shared.lender().filter(|_| end - at >= wide(GATHER_BYTES_MIN));
        let mut lease = match lender.and_then(Lender::take) {
            Some(buffer) => Lease::Pooled(buffer),
            None => self.lease()?,
        };
        let span = disk.span(at, end - at, lease.buffer().bytes().len());
        match disk.read(span, lease.buffer()) {
            Ok(()) => Ok((span, lease)),
            Err(error) => {
                self.give_back(lease);
                Err(error)
            }
        }
    }

    /// What was in the buffer has been sent.
    fn settle(&mut self, lease: Lease, lent: Lent) {
        match (lease, self.shared.lender()) {
            (Lease::Pooled(buffer), Some(lender)) if buffer.is_secluded() => {
                lender.keep(buffer, lent.unwrap_or(0));
            }
            (Lease::Private(buffer), _) => self.private = Some(buffer),
            (Lease::Pooled(_), _) => {}
        }
    }

    fn give_back(&mut self, lease: Lease) {
        self.settle(lease, None);
    }
}

/// Writes from the client to the disk, piece by piece. After a failure the rest of the payload is received all the same.
fn write_pieces(
    disk: &dyn Disk,
    write: &WriteRequest,
    buffer: &mut Buffer,
    receive: &mut impl FnMut(&mut [u8]) -> Result<(), Failure>,
) -> Result<Result<(), Error>, Failure> {
    let (mut offset, mut rest) = (write.offset, u64::from(write.len));
    while rest > 0 {
        let span = disk.span(offset, rest, buffer.bytes().len());
        receive(&mut buffer.bytes_mut()[span.payload()])?;
        let len = wide(span.payload().len());
        (offset, rest) = (offset + len, rest - len);
        if let Err(error) = disk.write(span, buffer, write.durability) {
            skip(rest, receive)?;
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

/// Receives payload that has no use any more.
fn skip(mut rest: u64, receive: &mut impl FnMut(&mut [u8]) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut nowhere = [0; 4096];
    while rest > 0 {
        let len = usize::try_from(rest).unwrap_or(usize::MAX).min(nowhere.len());
        receive(&mut nowhere[..len])?;
        rest -= wide(len);
    }
    Ok(())
}

/// Where the piece that begins at `at` ends, of a request that ends at `end`.
fn chunk_end(at: u64, end: u64) -> u64 {
    let chunk = wide(CHUNK_BYTES);
    end.min((at / chunk + 1) * chunk)
}

/// A length in memory as one on disk.
fn wide(len: usize) -> u64 {
    u64::try_from(len).expect("memory lengths fit 64 bits")
}
