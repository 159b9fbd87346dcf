//! Transmission: requests in, replies out, until one side has enough.
//!
//! The loop of [`Session::run`] is the only place that waits for the client. Before it does, it sends what has gathered.
//! What a request does stands in `execute.rs`; whether it is done here or by a worker makes no difference there.

use super::activity::Activity;
use super::cores::{Cores, Load, REQUEST_BYTES_WORTH};
use super::execute::{Executor, IsLast, LONG_BYTES_MIN};
use super::helper::{Besides, Help, Helper, HomeWhenDropped};
use super::lend::Lender;
use super::negotiate::{REQUEST_BYTES_MAX, Terms};
use super::parts::Job;
use super::reply::{Failure, Shared};
use super::request::{Asked, Request, Rules, payload_len};
use super::status::NbdError;
use super::stream::{Inbox, Outbox};
use super::wire::{REQUEST_BYTES, RequestHeader};
use super::workers::{CloseWhenDropped, Crew, Workers};
use inlinecrypt_core::backing::Durability;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Longest payload that is received only to be thrown away, in bytes. Who sends more is cut off.
const DISCARD_BYTES_MAX: u32 = 2 * REQUEST_BYTES_MAX;

/// How many requests are still served after we began to stop: more than clients have under way.
const LATE_REQUESTS_MAX: u32 = 1024;

/// Stack of a helper or worker, in bytes: they call engines and backings, and no TLS handshake.
const STACK_BYTES: usize = 512 * 1024;

/// Why a session ended.
#[derive(Debug)]
pub enum Ended {
    /// The client said goodbye.
    Disconnected,
    /// The client left without a word, between two requests.
    Left,
    /// We are stopping.
    Stopped,
    /// It is to be held between two requests: all that were received whole are answered, and it can go on with the inbox as
    /// it is.
    Held,
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
    cores: Option<&'a Cores>,
    held: Option<&'a AtomicBool>,
    crowded: Option<&'a dyn Fn(bool)>,
    lender: Option<&'a Lender<'a>>,
}

/// Who does requests, besides the thread that receives them.
#[derive(Debug)]
enum Others<'o, 's, 'a, W> {
    Nobody,
    Workers(Crew<'o, 's, 'a, W>),
    Helper(Help<'o, 's, 'a, W>),
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
    /// A session on `terms` that ends once `stopping` is true. Requests are executed by up to `workers` threads; if 0, by the
    /// caller's. Where the disk does batches at once, the caller's does short reads and cached writes all the same. A worker
    /// that cannot go on calls `hang_up`, which must make the reader report its end.
    #[must_use]
    pub fn new(
        terms: &'a Terms,
        stopping: &'a AtomicBool,
        workers: usize,
        hang_up: &'a (dyn Fn() + Sync),
    ) -> Self {
        Self {
            terms,
            stopping,
            workers,
            hang_up,
            activity: None,
            cores: None,
            held: None,
            crowded: None,
            lender: None,
        }
    }

    /// The same, telling `activity` of each request.
    #[must_use]
    pub fn telling(self, activity: &'a Activity) -> Self {
        Self { activity: Some(activity), ..self }
    }

    /// The same, telling `cores` how busy it is, and with a second thread for long requests while there is a core for it, unless
    /// there are workers.
    #[must_use]
    pub fn on(self, cores: &'a Cores) -> Self {
        Self { cores: Some(cores), ..self }
    }

    /// The same, telling `crowded` when busy connections have taken all of these cores, and when no more. False at first.
    #[must_use]
    pub fn telling_of_crowds(self, crowded: &'a dyn Fn(bool)) -> Self {
        Self { crowded: Some(crowded), ..self }
    }

    /// The same, lending long payloads to the client, who is at the other end of the socket that the writer writes to.
    #[must_use]
    pub(super) fn lending(self, lender: Option<&'a Lender<'a>>) -> Self {
        Self { lender, ..self }
    }

    /// The same, ending between two requests while `held` is true. Whoever sets it must see to it that the reader reports
    /// that it was interrupted.
    #[must_use]
    pub fn unless(self, held: &'a AtomicBool) -> Self {
        Self { held: Some(held), ..self }
    }

    /// Serves until the end. All requests that were received whole are answered then, as far as the client takes it.
    /// Once stopping, whoever stops must see to it that the reader reports its end.
    ///
    /// # Blocking
    ///
    /// Waits for the client, and for the disk.
    pub fn run<R: Read, W: Write + Send>(&self, inbox: &mut Inbox<R>, writer: W) -> Ended {
        let shared = Shared::new(self.terms, Outbox::new(writer), self.hang_up, self.activity, self.lender);
        match (self.workers, self.cores) {
            (0, None) => self.serve(inbox, &shared, Others::Nobody),
            (0, Some(cores)) => {
                let helper = Helper::new(&shared, cores);
                thread::scope(|scope| {
                    let make = || {
                        let thread = thread::Builder::new().name("nbd-helper".to_owned());
                        thread.stack_size(STACK_BYTES).spawn_scoped(scope, || helper.work()).map(drop)
                    };
                    let _closing = HomeWhenDropped(&helper);
                    self.serve(inbox, &shared, Others::Helper(Help::new(&helper, &make)))
                })
            }
            (count, _) => {
                let workers = Workers::new(&shared, count);
                thread::scope(|scope| {
                    let make = || {
                        let thread = thread::Builder::new().name("nbd-worker".to_owned());
                        thread.stack_size(STACK_BYTES).spawn_scoped(scope, || workers.work()).map(drop)
                    };
                    // Ends the workers even if serving panics; else the scope would wait for them forever.
                    let _closing = CloseWhenDropped(&workers);
                    self.serve(inbox, &shared, Others::Workers(Crew::new(&workers, &make)))
                })
            }
        }
    }

    /// The loop, and a last word from everybody.
    fn serve<'s, 'b, R: Read, W: Write + Send>(
        &self,
        inbox: &mut Inbox<R>,
        shared: &'s Shared<'b, W>,
        mut others: Others<'_, 's, 'b, W>,
    ) -> Ended {
        let mut executor = Executor::new(shared);
        let taken = self.take_requests(inbox, &mut executor, &mut others);
        // They were received whole, whatever came after them.
        let gathered = executor.finish_gathered();
        let ended = match taken.and_then(|ended| gathered.map(|_| ended)) {
            Ok(ended) => ended,
            // TLS takes the end of the stream for a cut line.
            Err(Failure::Transport(error))
                if error.kind() == ErrorKind::UnexpectedEof && self.stopping.load(Ordering::Acquire) =>
            {
                Ended::Stopped
            }
            Err(failure) => failure.into_ended(),
        };
        match others {
            Others::Nobody => {}
            Others::Workers(crew) => crew.finish(),
            Others::Helper(help) => help.finish(),
        }
        if shared.failed_late() {
            return Ended::FailedLate;
        }
        match (&ended, shared.flush()) {
            (Ended::Disconnected | Ended::Left | Ended::Stopped | Ended::Held, Err(error)) => {
                Ended::Transport(error)
            }
            _ => ended,
        }
    }

    fn take_requests<'s, 'b, R: Read, W: Write + Send>(
        &self,
        inbox: &mut Inbox<R>,
        executor: &mut Executor<'s, 'b, W>,
        others: &mut Others<'_, 's, 'b, W>,
    ) -> Result<Ended, Failure> {
        let shared = executor.shared();
        let rules = Rules::new(self.terms);
        // Short requests that came together are done together. Where the disk waits for each, it has a thread for itself.
        let has_workers = matches!(others, Others::Workers(_));
        // Who waits for a disk sends as far ahead as he can: cores are not what he lacks.
        let mut load = Load::new(self.cores, self.crowded.filter(|_| !has_workers));
        let gathers = !has_workers || shared.disk().geometry().does_batches_at_once;
        let mut late_requests = 0;
        loop {
            while inbox.available().len() < REQUEST_BYTES {
                finish_gathered(executor, &mut load)?;
                if let Others::Helper(help) = others {
                    help.do_what_waits(executor)?;
                }
                shared.flush()?;
                let was_empty = inbox.available().is_empty();
                let is_held = || self.held.is_some_and(|held| held.load(Ordering::Acquire));
                let Some(len) = inbox.fill_unless(is_held)? else { return Ok(Ended::Held) };
                if len == 0 {
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

            let payload_len = payload_len(&header);
            if payload_len > DISCARD_BYTES_MAX {
                return Ok(Ended::Violation("a write is absurdly long"));
            }
            let len = usize::try_from(payload_len).expect("at most DISCARD_BYTES_MAX");
            if payload_len > 0 {
                inbox.expect_long(payload_len > LONG_BYTES_MIN);
            }
            // What was sent before we stopped is served. A client that goes on and on is told.
            late_requests += u32::from(self.stopping.load(Ordering::Acquire));
            let admitted = match rules.admit(&header) {
                Ok(Asked::Plain(_) | Asked::Write(_)) if late_requests > LATE_REQUESTS_MAX => {
                    Err(NbdError::ESHUTDOWN)
                }
                other => other,
            };
            if gathers {
                match &admitted {
                    Ok(Asked::Plain(request)) if executor.gather_read(request, header.cookie)? => continue,
                    // What is to be durable is waited for one by one, whatever the disk does at once.
                    Ok(Asked::Write(write))
                        if payload_len < LONG_BYTES_MIN
                            && !(has_workers && write.durability == Durability::Durable) =>
                    {
                        if inbox.available().len() < len {
                            finish_gathered(executor, &mut load)?;
                            receive_small(inbox, shared, len)?;
                        }
                        if let Some(place) = executor.gather_write(write, header.cookie)? {
                            inbox.read_exact(place)?;
                            continue;
                        }
                    }
                    _ => {}
                }
                finish_gathered(executor, &mut load)?;
            }
            let _busy = shared.busy();
            if let (Ok(Asked::Plain(Request::Read { .. })), Some(lender)) = (&admitted, self.lender) {
                lender.expect(header.len);
            }
            match admitted {
                Ok(Asked::Disconnect) => return Ok(Ended::Disconnected),
                Ok(Asked::Plain(request)) => {
                    if matches!(request, Request::Read { .. }) {
                        load.note(u64::from(header.len).max(REQUEST_BYTES_WORTH));
                    }
                    match others {
                        Others::Workers(crew) => {
                            let is_lone = inbox.available().is_empty() && crew.is_idle();
                            executor.execute_with_crew(&request, header.cookie, crew, is_lone)?;
                        }
                        Others::Helper(help) => {
                            executor.execute_with_help(&request, header.cookie, help, besides(inbox))?;
                        }
                        Others::Nobody => executor.execute(&request, header.cookie)?,
                    }
                }
                Ok(Asked::Write(write)) => {
                    load.note(u64::from(payload_len).max(REQUEST_BYTES_WORTH));
                    receive_small(inbox, shared, len)?;
                    // Of a long one it is not known before it was received.
                    let nothing_follows = len <= LONG_BYTES_MIN as usize && inbox.available().len() <= len;
                    let receive = |into: &mut [u8]| receive(inbox, shared, into);
                    match others {
                        Others::Workers(crew) => {
                            let is_lone = nothing_follows && crew.is_idle();
                            let submit = |part, IsLast(last)| {
                                let job = Job::Write(part);
                                if is_lone && last { Err(job) } else { crew.submit(job) }
                            };
                            executor.write_in_parts(&write, header.cookie, submit, receive)?;
                        }
                        Others::Helper(help) if payload_len >= LONG_BYTES_MIN => {
                            let offer = |part, IsLast(last)| {
                                let besides = if last { Besides::Nothing } else { Besides::More };
                                help.offer(Job::Write(part), besides)
                            };
                            executor.write_in_parts(&write, header.cookie, offer, receive)?;
                        }
                        Others::Helper(_) | Others::Nobody => {
                            executor.write(&write, header.cookie, receive)?
                        }
                    }
                }
                Err(refusal) => {
                    if inbox.available().len() < len {
                        shared.flush()?;
                    }
                    // Whatever it is, it goes no further than here.
                    inbox.expect_long(false);
                    inbox.discard(len)?;
                    shared.refuse(&header, refusal)?;
                }
            }
        }
    }
}

/// Has the short requests done that were gathered.
fn finish_gathered<W: Write>(executor: &mut Executor<'_, '_, W>, load: &mut Load<'_>) -> Result<(), Failure> {
    let count = executor.finish_gathered()?;
    if count > 0 {
        load.note(count as u64 * REQUEST_BYTES_WORTH);
    }
    Ok(())
}

/// Whether more requests are there already.
fn besides<R: Read>(inbox: &Inbox<R>) -> Besides {
    if inbox.available().len() < REQUEST_BYTES { Besides::Nothing } else { Besides::More }
}

/// Receives a short payload whole, before any buffer is taken for it: so a client that stalls in it keeps
/// nothing from others.
fn receive_small<R: Read, W: Write>(
    inbox: &mut Inbox<R>,
    shared: &Shared<'_, W>,
    len: usize,
) -> Result<(), Failure> {
    if len <= LONG_BYTES_MIN as usize && inbox.available().len() < len {
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
