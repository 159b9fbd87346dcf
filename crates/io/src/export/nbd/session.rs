//! Transmission: requests in, replies out, until one side has enough.
//!
//! The loop of [`Session::run`] is the only place that waits for the client. Before it does, it sends what has gathered.
//! What a request does stands in `execute.rs`; whether it is done here or by a worker makes no difference there.

use super::activity::Activity;
use super::execute::Executor;
use super::negotiate::{REQUEST_BYTES_MAX, Terms};
use super::reply::{Failure, Shared};
use super::request::{Asked, Rules, payload_len};
use super::status::NbdError;
use super::stream::{INBOX_BYTES, Inbox, Outbox};
use super::wire::{REQUEST_BYTES, RequestHeader};
use super::workers::{CloseWhenDropped, Workers};
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Longest payload that is received only to be thrown away, in bytes. Who sends more is cut off.
const DISCARD_BYTES_MAX: u32 = 2 * REQUEST_BYTES_MAX;

/// How many requests are still served after we began to stop: more than clients have under way.
const LATE_REQUESTS_MAX: u32 = 1024;

/// Why a session ended.
#[derive(Debug)]
pub enum Ended {
    /// The client said goodbye.
    Disconnected,
    /// The client left without a word, between two requests.
    Left,
    /// We are stopping.
    Stopped,
    /// The client broke the protocol in a way that leaves no way on.
    Violation(&'static str),
    /// A read failed after its reply had begun: the protocol asks for this.
    FailedLate,
    /// The transport failed.
    Transport(io::Error),
}

/// A connection in transmission.
pub struct Session<'a> {
    terms: &'a Terms,
    stopping: &'a AtomicBool,
    workers: usize,
    hang_up: &'a (dyn Fn() + Sync),
    activity: Option<&'a Activity>,
}

impl fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("terms", self.terms)
            .field("workers", &self.workers)
            .finish_non_exhaustive()
    }
}

impl<'a> Session<'a> {
    /// A session on `terms` that ends once `stopping` is true. Requests are executed by `workers` threads; if 0, by the
    /// caller's. A worker that cannot go on calls `hang_up`, which must make the reader report its end.
    #[must_use]
    pub fn new(
        terms: &'a Terms,
        stopping: &'a AtomicBool,
        workers: usize,
        hang_up: &'a (dyn Fn() + Sync),
    ) -> Self {
        Self { terms, stopping, workers, hang_up, activity: None }
    }

    /// The same, telling `activity` of each request.
    #[must_use]
    pub fn telling(self, activity: &'a Activity) -> Self {
        Self { activity: Some(activity), ..self }
    }

    /// Serves until the end. All requests that were received whole are answered then, as far as the client takes it.
    /// Once stopping, whoever stops must see to it that the reader reports its end.
    ///
    /// # Blocking
    ///
    /// Waits for the client, and for the disk.
    pub fn run<R: Read, W: Write + Send>(&self, inbox: &mut Inbox<R>, writer: W) -> Ended {
        let shared = Shared::new(self.terms, Outbox::new(writer), self.hang_up, self.activity);
        if self.workers == 0 {
            return self.serve(inbox, &shared, None);
        }
        let workers = Workers::new(&shared, self.workers);
        thread::scope(|scope| {
            for _ in 0..self.workers {
                scope.spawn(|| workers.work());
            }
            // Ends the workers even if serving panics; else the scope would wait for them forever.
            let _closing = CloseWhenDropped(&workers);
            self.serve(inbox, &shared, Some(&workers))
        })
    }

    /// The loop, and a last word from everybody.
    fn serve<R: Read, W: Write + Send>(
        &self,
        inbox: &mut Inbox<R>,
        shared: &Shared<'_, W>,
        workers: Option<&Workers<'_, '_, W>>,
    ) -> Ended {
        let ended = match self.take_requests(inbox, &mut Executor::new(shared), workers) {
            Ok(ended) => ended,
            // TLS takes the end of the stream for a cut line.
            Err(Failure::Transport(error))
                if error.kind() == ErrorKind::UnexpectedEof && self.stopping.load(Ordering::Acquire) =>
            {
                Ended::Stopped
            }
            Err(failure) => failure.into_ended(),
        };
        if let Some(workers) = workers {
            workers.finish();
        }
        if shared.failed_late() {
            return Ended::FailedLate;
        }
        match (&ended, shared.flush()) {
            (Ended::Disconnected | Ended::Left | Ended::Stopped, Err(error)) => Ended::Transport(error),
            _ => ended,
        }
    }

    fn take_requests<R: Read, W: Write + Send>(
        &self,
        inbox: &mut Inbox<R>,
        executor: &mut Executor<'_, '_, W>,
        workers: Option<&Workers<'_, '_, W>>,
    ) -> Result<Ended, Failure> {
        let shared = executor.shared();
        let rules = Rules::new(self.terms);
        let mut late_requests = 0;
        loop {
            while inbox.available().len() < REQUEST_BYTES {
                shared.flush()?;
                let was_empty = inbox.available().is_empty();
                if inbox.fill()? == 0 {
                    return match (self.stopping.load(Ordering::Acquire), was_empty) {
                        (true, _) => Ok(Ended::Stopped),
                        (false, true) => Ok(Ended::Left),
                        (false, false) => Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                    };
                }
            }
            if shared.is_broken() {
                return Ok(Ended::FailedLate);
            }
            let (bytes, _) = inbox.available().split_first_chunk().expect("waited for above");
            let Ok(header) = RequestHeader::parse(bytes) else {
                return Ok(Ended::Violation("wrong magic in a request"));
            };
            inbox.consume(REQUEST_BYTES);
            let _busy = shared.busy();

            let payload_len = payload_len(&header);
            if payload_len > DISCARD_BYTES_MAX {
                return Ok(Ended::Violation("a write is absurdly long"));
            }
            let len = usize::try_from(payload_len).expect("at most DISCARD_BYTES_MAX");
            // What was sent before we stopped is served. A client that goes on and on is told.
            late_requests += u32::from(self.stopping.load(Ordering::Acquire));
            let admitted = match rules.admit(&header) {
                Ok(Asked::Plain(_) | Asked::Write(_)) if late_requests > LATE_REQUESTS_MAX => {
                    Err(NbdError::ESHUTDOWN)
                }
                other => other,
            };
            match admitted {
                Ok(Asked::Disconnect) => return Ok(Ended::Disconnected),
                Ok(Asked::Plain(request)) => match workers {
                    Some(workers) if !(inbox.available().is_empty() && workers.are_idle()) => {
                        workers.submit(request, header.cookie);
                    }
                    // A lone request gains nothing from a thread that has to be woken first.
                    _ => executor.execute(&request, header.cookie)?,
                },
                Ok(Asked::Write(write)) => {
                    receive_small(inbox, shared, len)?;
                    let receive = |into: &mut [u8]| receive(inbox, shared, into);
                    match workers {
                        Some(workers) => executor.write_in_parts(&write, header.cookie, workers, receive)?,
                        None => executor.write(&write, header.cookie, receive)?,
                    }
                }
                Err(refusal) => {
                    if inbox.available().len() < len {
                        shared.flush()?;
                    }
                    inbox.discard(len)?;
                    shared.refuse(&header, refusal)?;
                }
            }
        }
    }
}

/// Receives a payload that fits the inbox whole, before any buffer is taken for it: so a client that stalls in it keeps
/// nothing from others.
fn receive_small<R: Read, W: Write>(
    inbox: &mut Inbox<R>,
    shared: &Shared<'_, W>,
    len: usize,
) -> Result<(), Failure> {
    if len <= INBOX_BYTES && inbox.available().len() < len {
        shared.flush()?;
        inbox.need(len)?;
    }
    Ok(())
}

/// Fills `into` from the client; sends what has gathered before waiting for more.
fn receive<R: Read, W: Write>(
    inbox: &mut Inbox<R>,
    shared: &Shared<'_, W>,
    into: &mut [u8],
) -> Result<(), Failure> {
    if inbox.available().len() < into.len() {
        shared.flush()?;
    }
    Ok(inbox.read_exact(into)?)
}
