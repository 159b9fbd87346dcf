//! What all threads of a connection have in common: above all the outbox, whose lock keeps a reply together.

use super::activity::{Activity, Busy};
use super::lend::Lender;
use super::negotiate::Terms;
use super::session::Ended;
use super::status::NbdError;
use super::stream::{GATHER_BYTES_MIN, Outbox};
use super::wire::*;
use crate::export::Kind;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::batch::{Batch, Transfer};
use inlinecrypt_core::disk::Disk;
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_core::memory::Buffer;
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many failures of one connection are logged one by one.
const LOG_LINES_MAX: u32 = 16;

/// Why nothing more can be said on a connection.
#[derive(Debug)]
pub(super) enum Failure {
    Transport(io::Error),
    /// A read failed after its reply had begun.
    Late,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Transport(error)
    }
}

impl Failure {
    pub(super) fn into_ended(self) -> Ended {
        match self {
            Self::Transport(error) => Ended::Transport(error),
            Self::Late => Ended::FailedLate,
        }
    }
}

/// What all threads of a connection have in common.
pub(super) struct Shared<'a, W> {
    terms: &'a Terms,
    disk: &'a dyn Disk,
    /// Keeps messages whole. Held while sending, and by a long read in simple replies from its first piece to its last.
    outbox: Mutex<Outbox<W>>,
    /// Nothing may be sent any more.
    broken: AtomicBool,
    /// A read failed after its reply had begun.
    failed_late: AtomicBool,
    log_lines: AtomicU32,
    hang_up: &'a (dyn Fn() + Sync),
    activity: Option<&'a Activity>,
    lender: Option<&'a Lender<'a>>,
}

/// How much had been lent to the client in all when a buffer was, if it was: then it is the [`Lender`]'s to keep.
pub(super) type Lent = Option<u64>;

impl<W> fmt::Debug for Shared<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("terms", self.terms)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl<'a, W: Write> Shared<'a, W> {
    pub(super) fn new(
        terms: &'a Terms,
        outbox: Outbox<W>,
        hang_up: &'a (dyn Fn() + Sync),
        activity: Option<&'a Activity>,
        lender: Option<&'a Lender<'a>>,
    ) -> Self {
        Self {
            terms,
            disk: terms.export.disk(),
            outbox: Mutex::new(outbox),
            broken: AtomicBool::new(false),
            failed_late: AtomicBool::new(false),
            log_lines: AtomicU32::new(0),
            hang_up,
            activity,
            lender,
        }
    }

    /// A request is under way until what this returns is dropped.
    pub(super) fn busy(&self) -> Busy<'a> {
        self.activity.map_or_else(Busy::untold, Activity::busy)
    }

    pub(super) fn disk(&self) -> &'a dyn Disk {
        self.disk
    }

    pub(super) fn is_structured(&self) -> bool {
        self.terms.structured
    }

    /// Counts a request that succeeded.
    pub(super) fn count(&self, kind: Kind, len_bytes: u64) {
        self.terms.export.counters.done(kind, len_bytes);
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.or_break(self.lock()?.flush())
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(super) fn failed_late(&self) -> bool {
        self.failed_late.load(Ordering::Acquire)
    }

    /// A worker cannot go on: nothing more is sent, and the thread that waits for the client learns of it.
    pub(super) fn break_off(&self, failure: &Failure) {
        self.broken.store(true, Ordering::Release);
        tracing::debug!(export = self.terms.export.name(), ?failure, "connection broken off");
        (self.hang_up)();
    }

    /// The outbox, unless nothing may be sent any more.
    pub(super) fn lock(&self) -> io::Result<MutexGuard<'_, Outbox<W>>> {
        let outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_broken() { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(outbox) }
    }

    pub(super) fn send(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        self.or_break(self.lock()?.send(head, payload))
    }

    /// What was sent in part leaves nothing to say: others must not go on behind it. To be called before the outbox is unlocked.
    fn or_break<T>(&self, sent: io::Result<T>) -> io::Result<T> {
        sent.inspect_err(|_| self.broken.store(true, Ordering::Release))
    }

    /// Who lends buffers to the client, if anybody.
    pub(super) fn lender(&self) -> Option<&'a Lender<'a>> {
        self.lender
    }

    /// Sends part of a buffer. It may be lent for that.
    pub(super) fn send_from(
        &self,
        outbox: &mut Outbox<W>,
        head: &[u8],
        buffer: &mut Buffer,
        payload: Range<usize>,
    ) -> io::Result<Lent> {
        self.or_break(match self.lender {
            Some(lender) if payload.len() >= GATHER_BYTES_MIN && lender.may_lend(buffer) => {
                outbox.flush().and_then(|()| lender.send(head, &buffer.bytes()[payload])).map(Some)
            }
            _ => outbox.send(head, &buffer.bytes()[payload]).map(|()| None),
        })
    }

    /// Answers a request that could not even be tried.
    pub(super) fn refuse(&self, header: &RequestHeader, error: NbdError) -> io::Result<()> {
        let RequestHeader { flags, kind, offset, len, cookie } = *header;
        self.log(|| {
            tracing::info!(export = self.terms.export.name(), kind, flags, offset, len, ?error, "refused")
        });
        self.answer_error(cookie, error, None)
    }

    /// Answers a request other than a read, and counts it.
    pub(super) fn conclude(
        &self,
        cookie: u64,
        kind: Kind,
        len_bytes: u64,
        result: Result<(), Error>,
    ) -> io::Result<()> {
        match result {
            Ok(()) => {
                self.count(kind, len_bytes);
                //= NBD protocol, Structured reply: a simple reply will do where there is no payload.
                self.send(&simple_reply(0, cookie), &[])
            }
            Err(error) => self.fail(cookie, &error, None),
        }
    }

    /// Answers the requests of a batch in their order, by their cookies. What was read is in `bytes`.
    pub(super) fn answer(&self, batch: &Batch, cookies: &[u64], bytes: &[u8]) -> io::Result<()> {
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let done = batch.items().iter().filter(|item| item.goes(access));
            let kind = if access == Access::ReadOnly { Kind::Read } else { Kind::Write };
            self.terms.export.counters.done_many(kind, done.map(|item| item.payload().len()));
        }
        let mut outbox = self.lock()?;
        for (item, cookie) in batch.items().iter().zip(cookies) {
            match (item.result(), item.transfer()) {
                (Ok(()), Transfer::Write(_)) => self.or_break(outbox.send(&simple_reply(0, *cookie), &[]))?,
                (Ok(()), Transfer::Read) => {
                    let payload = &bytes[item.payload()];
                    if self.terms.structured {
                        let offset = item.span().offset();
                        let head = data_chunk_header(NBD_REPLY_FLAG_DONE, *cookie, offset, payload.len());
                        self.or_break(outbox.send(&head, payload))?;
                    } else {
                        self.or_break(outbox.send(&simple_reply(0, *cookie), payload))?;
                    }
                }
                (Err(error), transfer) => {
                    drop(outbox);
                    let place = (transfer == Transfer::Read).then(|| item.span().offset());
                    self.fail(*cookie, error, place)?;
                    outbox = self.lock()?;
                }
            }
        }
        Ok(())
    }

    /// Answers a request that failed.
    pub(super) fn fail(&self, cookie: u64, error: &Error, offset: Option<u64>) -> io::Result<()> {
        // Refused speed is an answer, not a failure.
        if error.kind() != ErrorKind::Unsupported {
            self.log(|| tracing::warn!(export = self.terms.export.name(), "{}", error.chain()));
        }
        self.answer_error(cookie, NbdError::from(error), offset)
    }

    /// A read failed where the protocol has no words for it any more.
    pub(super) fn note_late_failure(&self, error: &Error) {
        self.failed_late.store(true, Ordering::Release);
        self.broken.store(true, Ordering::Release);
        self.terms.export.counters.failed();
        self.log(|| tracing::warn!(export = self.terms.export.name(), "in mid-reply: {}", error.chain()));
    }

    /// Answers a question about allocation.
    pub(super) fn send_status(&self, cookie: u64, len: u32, payload: &[u8]) -> io::Result<()> {
        self.count(Kind::BlockStatus, len.into());
        let payload_len = u32::try_from(payload.len()).expect("bounded by EXTENTS_MAX");
        let head = chunk_header(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, cookie, payload_len);
        self.send(&head, payload)
    }

    fn answer_error(&self, cookie: u64, error: NbdError, offset: Option<u64>) -> io::Result<()> {
        self.terms.export.counters.failed();
        if !self.terms.structured {
            return self.send(&simple_reply(error.code(), cookie), &[]);
        }
        let text = error.text().as_bytes();
        let mut payload = error.code().to_be_bytes().to_vec();
        payload.extend_from_slice(&u16::try_from(text.len()).expect("our texts are short").to_be_bytes());
        payload.extend_from_slice(text);
        let kind = match offset {
            Some(offset) => {
                payload.extend_from_slice(&offset.to_be_bytes());
                NBD_REPLY_TYPE_ERROR_OFFSET
            }
            None => NBD_REPLY_TYPE_ERROR,
        };
        let len = u32::try_from(payload.len()).expect("our texts are short");
        self.send(&chunk_header(NBD_REPLY_FLAG_DONE, kind, cookie, len), &payload)
    }

    fn log(&self, line: impl FnOnce()) {
        if self.log_lines.load(Ordering::Relaxed) < LOG_LINES_MAX {
            line();
            if self.log_lines.fetch_add(1, Ordering::Relaxed) + 1 == LOG_LINES_MAX {
                tracing::info!(
                    export = self.terms.export.name(),
                    "further errors of this connection are only counted"
                );
            }
        }
    }
}
