//! The server: listeners in, one thread for each connection, and an orderly end.

use super::activity::Activity;
use super::cores::{Cores, LOOK_AROUND, Looks};
use super::hold::{Fate, Handed, Held, Hold, Rest, WAKE_INTERVAL};
use super::lend::{self, Lender};
use super::negotiate::{Handshake, Next, Terms, TlsState, greet, haggle};
use super::session::{Ended, Session};
use super::stream::Inbox;
use super::tls::{self, Tls, TlsMode};
use crate::export::{CountersSnapshot, Export, ExportSpec, Exports};
use crate::listen::{Listener, Stopper, Stream};
use crate::sys;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::error::Error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, SendFlags};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Stack of a connection's thread, in bytes: a TLS handshake without optimisation needs the most.
const STACK_BYTES: usize = 1024 * 1024;

/// What a unix socket may hold for a client that is busy, in bytes: a few pieces of a request, so that a client that pauses
/// finds something to do.
const SEND_ROOM_BYTES: usize = 2 * 1024 * 1024;

/// The same while every core has a busy connection of its own: there is nobody to fill more than this meanwhile, and more
/// would leave the cache before the client reads it. By how the kernel counts, this holds one piece of a request.
const CROWDED_SEND_ROOM_BYTES: usize = 160 * 1024;

/// Up to how many connections get that much. It is the kernel's memory, and stays full while a client does not read:
/// 128 MiB in all, twice that by how the kernel counts. More connections than this share the machine anyway, and then
/// the system's own size does. So with the larger inboxes.
const LARGE_SEND_ROOMS_MAX: usize = 64;

/// How long connections get to notice that they were cut off, once the drain deadline has passed.
const CUT_OFF_GRACE: Duration = Duration::from_secs(1);

/// How long a connection must have been idle to be closed for another when there are too many: no program that works
/// pauses so long between two requests and minds being connected anew, and who opens connections only to keep others out
/// must come back for each of them every minute.
const IDLE_TIME_MIN: Duration = Duration::from_secs(60);

/// Who sends again within this time is worth looking around for: waking a halted core is in it, his and ours.
const QUICK: Duration = Duration::from_micros(200);

/// Workers of a connection to a disk on a medium that does many transfers at once: enough to keep one busy with pieces of
/// [`CHUNK_BYTES`](inlinecrypt_core::disk::CHUNK_BYTES), few enough not to matter.
const WORKERS_FOR_MEDIA: usize = 4;

/// At most one line about refused connections in this time.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Most connections at once. One more takes the place of the one that has been idle longest, if that was for more than
    /// a minute; else it is closed.
    pub connections_max: usize,
    /// How long a client may take from connecting to transmission, TLS included.
    pub handshake_time_max: Duration,
    /// Most threads that execute requests, for each connection. 0: the connection's own thread does, which is best unless the
    /// backing waits for a medium. `None`: as suits the disk. Where it does batches at once, the own thread does short reads and
    /// cached writes all the same.
    pub workers: Option<usize>,
    /// How many cores there are for threads of this server. While fewer connections are busy, a connection without workers
    /// gets a second thread for long requests.
    pub cores: usize,
    /// Whether clients may or must use TLS.
    pub tls: TlsMode,
    /// Whether clients on Unix sockets are lent what they read, which costs no copy. Only for clients that read from their
    /// socket, as all known ones do: who splices from it, as some proxies do, may see data change that he has already. Has no
    /// effect before Linux 6.5. The process must ignore `SIGPIPE`, as Rust's do unless told otherwise.
    pub zero_copy: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            handshake_time_max: Duration::from_secs(30),
            workers: None,
            cores: thread::available_parallelism().map_or(1, usize::from),
            tls: TlsMode::Off,
            zero_copy: false,
        }
    }
}

/// An NBD server. Cloning gives another handle to the same.
#[derive(Clone, Debug)]
pub struct NbdServer(Arc<Inner>);

struct Inner {
    exports: Exports,
    options: ServerOptions,
    cores: Cores,
    stopping: AtomicBool,
    /// Nothing else is locked while this is held.
    table: Mutex<Table>,
    /// A connection or an acceptor has gone, or a connection has come to rest.
    gone: Condvar,
    hold: Hold,
    /// Connections need rest no longer.
    roused: Condvar,
    refused: AtomicU64,
    failed_handshakes: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    connections: HashMap<u64, Connection>,
    stoppers: Vec<Stopper>,
    next_id: u64,
    acceptors: usize,
    refusal_logged: Option<Instant>,
    /// Resting connections that stay here are to be closed.
    closing_held: bool,
}

#[derive(Debug)]
struct Connection {
    socket: Arc<Stream>,
    activity: Arc<Activity>,
    /// It was closed to make room, and its thread is about to notice.
    closed: bool,
    /// Its thread, once it runs.
    thread: Option<rustix::thread::Pid>,
    /// It is held, and has come to rest.
    rest: Option<Rest>,
}

impl Table {
    /// Whether so few connections share the machine that each may have much memory.
    fn are_few(&self) -> bool {
        self.connections.len() <= LARGE_SEND_ROOMS_MAX
    }

    /// How many resting connections stay with this server.
    fn staying(&self) -> usize {
        self.connections.values().filter(|connection| matches!(connection.rest, Some(Rest::Stays))).count()
    }

    /// Sees to it that there is room for one more, and says whether there is.
    fn make_room(&mut self, connections_max: usize, now: Instant) -> bool {
        if self.connections.len() < connections_max {
            return true;
        }
        let open = self.connections.iter_mut().filter(|(_, connection)| !connection.closed);
        let mut count = 0;
        let longest = open
            .inspect(|_| count += 1)
            .filter_map(|(id, connection)| Some((connection.activity.idle_time(now)?, *id, connection)))
            .filter(|(idle_time, ..)| *idle_time > IDLE_TIME_MIN)
            .max_by_key(|(idle_time, ..)| *idle_time);
        if count < connections_max {
            return true;
        }
        let Some((idle_time, id, connection)) = longest else { return false };
        connection.closed = true;
        let _ = connection.socket.shutdown(Shutdown::Both);
        tracing::info!(connection = id, ?idle_time, "closed to make room for another");
        true
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdServer")
            .field("exports", &self.exports)
            .field("options", &self.options)
            .field("stopping", &self.stopping)
            .finish_non_exhaustive()
    }
}

/// What a server is doing, for `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerStatus {
    /// Its exports, in the order in which they were added.
    pub exports: Vec<ExportStatus>,
    /// Connections at this moment, those in handshake included.
    pub connections_now: usize,
    /// Connections closed because there were too many.
    pub connections_refused: u64,
    /// Connections that ended before transmission other than by the client's wish.
    pub handshakes_failed: u64,
    /// Whether it is stopping.
    pub stopping: bool,
}

/// What an export is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Its numbers.
    pub counters: CountersSnapshot,
}

/// How stopping went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stopped {
    /// Connections that were cut off because they did not end in time.
    pub cut_off: usize,
    /// Of these, connections whose threads still wait for their disk.
    pub abandoned: usize,
}

impl NbdServer {
    /// A server that nobody can reach yet.
    ///
    /// # Errors
    ///
    /// [`Invalid`](inlinecrypt_core::error::ErrorKind::Invalid) for unusable or repeated names.
    pub fn new(exports: impl IntoIterator<Item = ExportSpec>, options: ServerOptions) -> Result<Self, Error> {
        let registry = Exports::default();
        for spec in exports {
            registry.add(spec)?;
        }
        Ok(Self(Arc::new(Inner {
            exports: registry,
            cores: Cores::new(options.cores),
            options,
            stopping: AtomicBool::new(false),
            table: Mutex::default(),
            gone: Condvar::new(),
            hold: Hold::default(),
            roused: Condvar::new(),
            refused: AtomicU64::new(0),
            failed_handshakes: AtomicU64::new(0),
        })))
    }

    /// The exports. They may change while the server runs.
    #[must_use]
    pub fn exports(&self) -> &Exports {
        &self.0.exports
    }

    /// Accepts connections from `listener`, in a thread of its own, until the server stops. The listener is dropped then.
    ///
    /// # Errors
    ///
    /// The system's, if it has no thread left.
    pub fn listen(&self, listener: Listener) -> io::Result<()> {
        let stopper = listener.stopper();
        {
            let mut table = self.0.lock();
            table.acceptors += 1;
            table.stoppers.push(stopper.clone());
        }
        if self.0.stopping.load(Ordering::Acquire) {
            stopper.stop();
        }
        let inner = self.0.clone();
        let spawned = thread::Builder::new().name("nbd-accept".to_owned()).spawn(move || {
            inner.accept_until_stopped(&listener);
            drop(listener);
            inner.lock().acceptors -= 1;
            inner.gone.notify_all();
        });
        if let Err(error) = spawned {
            self.0.lock().acceptors -= 1;
            return Err(error);
        }
        Ok(())
    }

    /// Serves a socket that is connected already, in a thread of its own.
    ///
    /// # Errors
    ///
    /// The system's; [`ConnectionRefused`](io::ErrorKind::ConnectionRefused) if there are too many connections, or the
    /// server is stopping.
    pub fn serve(&self, stream: impl Into<Stream>) -> io::Result<()> {
        self.0.clone().start(stream.into())
    }

    /// Answers what was received, and then lets connections rest and accepts no more, until [`resume`](Self::resume).
    ///
    /// Connections that do not come to rest within `time_max` are cut off. The disks are at rest when this returns; nothing
    /// is flushed.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](io::ErrorKind::TimedOut) if a connection's thread still waits for its disk then, and all others go on;
    /// the system's.
    ///
    /// # Blocking
    ///
    /// For `time_max` and a second at most.
    pub fn hold(&self, time_max: Duration) -> io::Result<Held> {
        let inner = &self.0;
        sys::be_interruptible()?;
        inner.hold.begin();
        let deadline = Instant::now() + time_max;
        if inner.wait_for_rest(deadline) == 0 {
            return Ok(inner.held(0));
        }
        let cut_off = inner.cut_off_the_restless();
        if inner.wait_for_rest(Instant::now() + CUT_OFF_GRACE) == 0 {
            return Ok(inner.held(cut_off));
        }
        self.resume();
        Err(io::Error::new(io::ErrorKind::TimedOut, "a request still waits for its disk"))
    }

    /// Goes on after [`hold`](Self::hold), with the connections that rest and those that were adopted meanwhile.
    pub fn resume(&self) {
        let inner = &self.0;
        {
            let accepting = inner.hold.lock();
            let mut table = inner.lock();
            inner.hold.end(accepting);
            for connection in table.connections.values_mut() {
                connection.rest.take_if(|rest| !matches!(rest, Rest::Given));
            }
        }
        inner.roused.notify_all();
    }

    /// Takes over a connection of another server. While held, it rests until [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// [`NotFound`](io::ErrorKind::NotFound) if there is no such export; else as [`serve`](Self::serve).
    pub fn adopt(&self, connection: Handed) -> io::Result<()> {
        let (socket, handed) = connection.checked()?;
        let export = self.0.exports.all().into_iter().find(|export| export.name() == handed.export);
        let Some(export) = export else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no export {:?} here", handed.export),
            ));
        };
        let terms = Terms { export, structured: handed.structured, allocation: handed.allocation };
        self.0.clone().start_with(socket, Some((terms, handed.unread)))
    }

    /// Closes the resting connections that were not handed over, as those whose client has to connect again, and lets the
    /// others rest for ever: they are another server's, and this process must end. Returns how many were closed.
    ///
    /// # Blocking
    ///
    /// For a second at most.
    pub fn close_held(&self) -> usize {
        let inner = &self.0;
        let count = {
            let mut table = inner.lock();
            table.closing_held = true;
            for connection in table.connections.values_mut() {
                if !matches!(connection.rest, Some(Rest::Stays)) {
                    connection.rest = Some(Rest::Given);
                }
            }
            table.staying()
        };
        inner.roused.notify_all();
        let table = inner.lock();
        drop(inner.gone.wait_timeout_while(table, CUT_OFF_GRACE, |table| table.staying() > 0));
        count
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> ServerStatus {
        let exports = self.0.exports.all();
        ServerStatus {
            exports: exports.iter().map(|export| ExportStatus::of(export)).collect(),
            connections_now: self.0.lock().connections.len(),
            connections_refused: self.0.refused.load(Ordering::Relaxed),
            handshakes_failed: self.0.failed_handshakes.load(Ordering::Relaxed),
            stopping: self.0.stopping.load(Ordering::Relaxed),
        }
    }

    /// Stops: no more connections, requests that were received are answered, written data is made stable.
    ///
    /// Connections that do not end within `drain_time_max` (their clients do not read, or their disks do not answer) are
    /// cut off.
    ///
    /// # Errors
    ///
    /// The first failed flush; all is stopped even so.
    ///
    /// # Blocking
    ///
    /// For `drain_time_max` and a second, and for the disks' flushes.
    pub fn stop(&self, drain_time_max: Duration) -> Result<Stopped, Error> {
        let inner = &self.0;
        inner.stopping.store(true, Ordering::Release);
        self.resume();
        for stopper in &inner.lock().stoppers {
            stopper.stop();
        }
        // Who waits for a request sees the end of the stream. What came before it can still be read.
        inner.shut_all(Shutdown::Read);
        inner.wait_until_gone(drain_time_max);
        let cut_off = inner.shut_all(Shutdown::Both);
        inner.wait_until_gone(if cut_off > 0 { CUT_OFF_GRACE } else { Duration::ZERO });
        let abandoned = inner.lock().connections.len();
        if cut_off > 0 {
            tracing::warn!(cut_off, abandoned, "connections did not end in time");
        }
        let mut result = Ok(Stopped { cut_off, abandoned });
        for export in inner.exports.all() {
            if export.disk().geometry().access == Access::ReadWrite
                && let Err(error) = export.disk().flush()
            {
                tracing::error!(export = export.name(), "last flush: {}", error.chain());
                result = result.and(Err(error));
            }
        }
        result
    }
}

impl ExportStatus {
    fn of(export: &Export) -> Self {
        let geometry = export.disk().geometry();
        Self {
            name: export.name().to_owned(),
            size_bytes: geometry.size_bytes,
            read_only: geometry.access == Access::ReadOnly,
            counters: export.counters().snapshot(),
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shuts all connections in one or both directions. Returns how many there are.
    fn shut_all(&self, how: Shutdown) -> usize {
        let table = self.lock();
        for connection in table.connections.values() {
            let _ = connection.socket.shutdown(how);
        }
        table.connections.len()
    }

    fn wait_until_gone(&self, time_max: Duration) {
        let table = self.lock();
        let waits = |table: &mut Table| !table.connections.is_empty() || table.acceptors > 0;
        drop(self.gone.wait_timeout_while(table, time_max, waits));
    }

    fn accept_until_stopped(self: &Arc<Self>, listener: &Listener) {
        loop {
            match listener.wait() {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => self.log_refusal(&io::Error::other(error)),
            }
            let _turn = self.hold.turn_to_accept();
            match listener.accept_now() {
                Ok(Some(stream)) => {
                    if let Err(error) = self.clone().start(stream) {
                        self.log_refusal(&error);
                    }
                }
                // It has gone, or is another's by now.
                Ok(None) => {}
                Err(error) => self.log_refusal(&io::Error::other(error)),
            }
        }
    }

    fn log_refusal(&self, error: &io::Error) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let now = Instant::now();
        let last = &mut self.lock().refusal_logged;
        if last.is_none_or(|last| now.duration_since(last) >= REFUSAL_LOG_INTERVAL) {
            *last = Some(now);
            tracing::warn!(refused, %error, "connection refused");
        }
    }

    /// Enters the connection and starts its thread.
    fn start(self: Arc<Self>, socket: Stream) -> io::Result<()> {
        self.start_with(socket, None)
    }

    /// The same; one that was taken over has its terms already, and what was received of its next request.
    fn start_with(self: Arc<Self>, socket: Stream, taken: Option<(Terms, Vec<u8>)>) -> io::Result<()> {
        let socket = Arc::new(socket);
        let activity = Arc::new(Activity::default());
        let id = {
            let mut table = self.lock();
            // Asked while the table is locked: either `stop` sees this connection, or we see that it stops.
            let why = if self.stopping.load(Ordering::Acquire) {
                Some("stopping")
            } else if !table.make_room(self.options.connections_max, Instant::now()) {
                Some("too many connections")
            } else {
                None
            };
            if let Some(why) = why {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, why));
            }
            table.next_id += 1;
            let id = table.next_id;
            let connection = Connection {
                socket: socket.clone(),
                activity: activity.clone(),
                closed: false,
                thread: None,
                rest: None,
            };
            table.connections.insert(id, connection);
            id
        };
        let inner = self.clone();
        let spawned =
            thread::Builder::new().name("nbd".to_owned()).stack_size(STACK_BYTES).spawn(move || {
                inner.converse(id, &socket, &activity, taken);
                inner.leave(id, socket);
            });
        if let Err(error) = spawned {
            self.lock().connections.remove(&id);
            return Err(error);
        }
        Ok(())
    }

    /// Takes the connection out of the table and closes it.
    fn leave(&self, id: u64, socket: Arc<Stream>) {
        // In this order: once the table is empty, every client has been told.
        let _ = socket.shutdown(Shutdown::Both);
        self.lock().connections.remove(&id);
        drop(socket);
        self.gone.notify_all();
    }

    /// The whole life of a connection.
    fn converse(&self, id: u64, socket: &Stream, activity: &Activity, taken: Option<(Terms, Vec<u8>)>) {
        let few = {
            let mut table = self.lock();
            if let Some(connection) = table.connections.get_mut(&id) {
                connection.thread = Some(rustix::thread::gettid());
            }
            table.are_few()
        };
        let lender = self.options.zero_copy.then(|| Lender::new(socket)).flatten();
        let lender = lender.as_ref();
        // Replies leave when we say so.
        if few && let Err(error) = socket.set_send_room(SEND_ROOM_BYTES) {
            tracing::debug!(connection = id, %error, "no larger send buffer");
        }
        if let Err(error) = socket.set_nodelay() {
            tracing::debug!(connection = id, %error, "no TCP_NODELAY");
        }
        // A client whose machine died says nothing ever again; the system finds out. No effect on Unix sockets.
        if let Err(error) = rustix::net::sockopt::set_socket_keepalive(socket, true) {
            tracing::debug!(connection = id, %error, "no keepalive");
        }
        if let Some((terms, unread)) = taken {
            let timed = Timed { lender, ..Timed::new(&self.cores, socket, None) };
            let mut inbox = Inbox::with(timed, &unread);
            let how = Way::Plain(lender);
            return self.transmit(id, socket, activity, &terms, &mut inbox, how, || timed);
        }
        let deadline = Instant::now() + self.options.handshake_time_max;
        let timed = Timed::new(&self.cores, socket, Some(deadline));
        match self.shake_hands(timed) {
            Ok(Shaken::Plain(mut inbox, terms)) => {
                let timed = Timed { lender, ..Timed::new(&self.cores, socket, None) };
                *inbox.reader_mut() = timed;
                self.transmit(id, socket, activity, &terms, &mut inbox, Way::Plain(lender), || timed);
            }
            Ok(Shaken::Tls(tls, mut inbox, terms)) => {
                inbox.reader_mut().transport().deadline = None;
                let writer = || tls.writer(Timed::new(&self.cores, socket, None));
                self.transmit(id, socket, activity, &terms, &mut inbox, Way::Tls, writer);
                tls.close(Timed::new(&self.cores, socket, Some(Instant::now() + CUT_OFF_GRACE)));
            }
            Ok(Shaken::Closed(why)) => tracing::debug!(connection = id, why, "closed in handshake"),
            Err(error) => {
                self.failed_handshakes.fetch_add(1, Ordering::Relaxed);
                tracing::info!(connection = id, peer = %socket.peer(), %error, "handshake failed");
            }
        }
    }

    fn shake_hands<'s>(&self, mut timed: Timed<'s>) -> io::Result<Shaken<'s>> {
        let (state, setup) = match &self.options.tls {
            TlsMode::Off => (TlsState::Unavailable, None),
            TlsMode::Allowed(setup) => (TlsState::Offered, Some(setup)),
            TlsMode::Required(setup) => (TlsState::Demanded, Some(setup)),
        };
        let mut inbox = Inbox::new(timed);
        let Some(client) = greet(&mut inbox, &mut timed)? else {
            return Ok(Shaken::Closed("no greeting from the client"));
        };
        let mut handshake = Handshake::new(&self.exports, &self.stopping, client, state);
        match (haggle(&mut handshake, &mut inbox, &mut timed)?, setup) {
            (Next::Transmit(terms), _) => Ok(Shaken::Plain(inbox, terms)),
            (Next::Close(why), _) => Ok(Shaken::Closed(why)),
            (Next::Option, _) | (Next::StartTls, None) => {
                unreachable!("haggling goes on until it leads somewhere")
            }
            (Next::StartTls, Some(setup)) => {
                drop(inbox);
                let tls = tls::accept(setup, timed)?;
                handshake.tls_is_running();
                let mut inbox = Inbox::new(tls.reader(timed));
                let mut writer = tls.writer(timed);
                match haggle(&mut handshake, &mut inbox, &mut writer)? {
                    Next::Transmit(terms) => Ok(Shaken::Tls(tls, inbox, terms)),
                    Next::Close(why) => {
                        tls.close(timed);
                        Ok(Shaken::Closed(why))
                    }
                    Next::Option | Next::StartTls => unreachable!("TLS starts once"),
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "all that a connection consists of")]
    fn transmit<R: Read, W: Write + Send>(
        &self,
        id: u64,
        socket: &Stream,
        activity: &Activity,
        terms: &Terms,
        inbox: &mut Inbox<R>,
        way: Way<'_>,
        writer: impl Fn() -> W,
    ) {
        let lender = match way {
            Way::Plain(lender) => lender,
            Way::Tls => None,
        };
        let are_few = self.lock().are_few();
        if are_few {
            inbox.enlarge();
        }
        if lender.is_some() && are_few {
            // Less is kept than the socket could hold.
            let _ = socket.set_send_room(lend::SEND_ROOM_BYTES);
        }
        let name = terms.export.name();
        tracing::debug!(connection = id, peer = %socket.peer(), export = name, structured = terms.structured, "connected");
        terms.export.counters().connected();
        let hang_up = || {
            let _ = socket.shutdown(Shutdown::Both);
        };
        let resize = |is_crowded: bool| {
            let few = lender.is_none() && self.lock().are_few();
            let room = if is_crowded { CROWDED_SEND_ROOM_BYTES } else { SEND_ROOM_BYTES };
            if few && let Err(error) = socket.set_send_room(room) {
                tracing::debug!(connection = id, %error, "send buffer left as it is");
            }
        };
        let workers = self.options.workers.unwrap_or_else(|| {
            let waits = terms.export.disk().geometry().does_batches_at_once;
            if waits { WORKERS_FOR_MEDIA } else { 0 }
        });
        let session = Session::new(terms, &self.stopping, workers, &hang_up)
            .telling(activity)
            .on(&self.cores)
            .telling_of_crowds(&resize)
            .lending(lender)
            .unless(self.hold.wanted());
        let ended = loop {
            match session.run(inbox, writer()) {
                Ended::Held => {
                    if let Some(lender) = lender {
                        lender.rest();
                    }
                    let handed = match way {
                        Way::Plain(_) => Handed::of(socket, terms, inbox.available()),
                        // What TLS has agreed on stays here.
                        Way::Tls => None,
                    };
                    match self.rest(id, handed.map_or(Rest::Stays, Rest::Handed)) {
                        // As the next session takes it to be.
                        Fate::GoOn => resize(false),
                        Fate::End(ended) => break ended,
                    }
                }
                ended => break ended,
            }
        };
        terms.export.counters().disconnected();
        match ended {
            Ended::Disconnected | Ended::Left | Ended::Stopped | Ended::Held => {
                tracing::debug!(connection = id, export = name, ?ended, "disconnected");
            }
            Ended::Violation(_) | Ended::FailedLate | Ended::Transport(_) => {
                tracing::info!(connection = id, export = name, ?ended, "connection lost");
            }
        }
    }
}

/// How bytes go to and fro.
#[derive(Clone, Copy, Debug)]
enum Way<'l> {
    /// As they are; and who lends what goes.
    Plain(Option<&'l Lender<'l>>),
    Tls,
}

/// Holding: the server's side of `hold.rs`.
impl Inner {
    /// Rests until the server resumes, or until told to end.
    fn rest(&self, id: u64, rest: Rest) -> Fate {
        let mut table = self.lock();
        // Asked while the table is locked: either `resume` sees this connection, or we see that it resumed.
        if !self.hold.wanted().load(Ordering::Acquire) {
            return Fate::GoOn;
        }
        if let Some(connection) = table.connections.get_mut(&id) {
            connection.rest = Some(rest);
        }
        self.gone.notify_all();
        loop {
            match table.connections.get(&id).and_then(|connection| connection.rest.as_ref()) {
                None => return Fate::GoOn,
                Some(Rest::Stays) if table.closing_held => return Fate::End(Ended::Stopped),
                Some(_) => {}
            }
            table = self.roused.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until every connection rests, waking those that wait for their clients. Returns how many do not.
    fn wait_for_rest(&self, deadline: Instant) -> usize {
        let mut table = self.lock();
        loop {
            let restless = || table.connections.values().filter(|connection| connection.rest.is_none());
            let count = restless().count();
            if count == 0 || Instant::now() >= deadline {
                return count;
            }
            restless().filter_map(|connection| connection.thread).for_each(sys::interrupt);
            let waited = self.gone.wait_timeout(table, WAKE_INTERVAL);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn cut_off_the_restless(&self) -> usize {
        let table = self.lock();
        let mut count = 0;
        for connection in table.connections.values().filter(|connection| connection.rest.is_none()) {
            // It may have gone by itself.
            let _ = connection.socket.shutdown(Shutdown::Both);
            count += 1;
        }
        count
    }

    /// What rests. What can be handed over is given once: it stays `Handed` here, to go on if nobody takes it.
    fn held(&self, cut_off: usize) -> Held {
        let mut held = Held { cut_off, ..Held::default() };
        for connection in self.lock().connections.values_mut() {
            match connection.rest.replace(Rest::Rests) {
                Some(Rest::Handed(handed)) => held.connections.push(handed),
                other => {
                    connection.rest = other;
                    held.stay += 1;
                }
            }
        }
        held
    }
}

/// What a handshake led to.
enum Shaken<'s> {
    Plain(Inbox<Timed<'s>>, Terms),
    Tls(Tls, Inbox<tls::TlsReader<Timed<'s>>>, Terms),
    Closed(&'static str),
}

/// A socket that may have to be done by a certain time.
#[derive(Clone, Copy, Debug)]
struct Timed<'s> {
    cores: &'s Cores,
    socket: &'s Stream,
    deadline: Option<Instant>,
    /// Whether the client took little time for the last bytes that came.
    is_quick: bool,
    looks: Looks,
    /// Whether the client is on this machine.
    is_local: bool,
    /// Who is told when the client sends nothing for a while.
    lender: Option<&'s Lender<'s>>,
}

impl<'s> Timed<'s> {
    fn new(cores: &'s Cores, socket: &'s Stream, deadline: Option<Instant>) -> Self {
        Self {
            cores,
            socket,
            deadline,
            is_quick: false,
            looks: Looks::default(),
            is_local: socket.is_local(),
            lender: None,
        }
    }

    /// Waits until the socket can be read or written, or it is too late.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let rest = Timespec::try_from(rest).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(self.socket, what)], Some(&rest)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// With a deadline: what does not fit now must not block.
    fn send_flags(&self) -> SendFlags {
        let no_wait = if self.deadline.is_some() { SendFlags::DONTWAIT } else { SendFlags::empty() };
        SendFlags::NOSIGNAL | no_wait
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        let begun = Instant::now();
        if self.is_quick
            && self.looks.are_due()
            && let Some(_looking) = self.cores.look_around()
        {
            // Others of this server get the core meanwhile.
            let mut looked = false;
            while begun.elapsed() < LOOK_AROUND {
                match rustix::net::recv(self.socket, &mut *into, RecvFlags::DONTWAIT) {
                    Err(rustix::io::Errno::AGAIN) => thread::yield_now(),
                    received => {
                        if looked {
                            self.looks.note(true);
                        }
                        return Ok(received?.0);
                    }
                }
                looked = true;
            }
            self.looks.note(false);
        }
        if self.is_local {
            sys::let_waker_finish();
        }
        // An interruption is for the caller to look why.
        let (len, _) = loop {
            match (rustix::net::recv(self.socket, &mut *into, RecvFlags::empty()), self.lender) {
                (Err(rustix::io::Errno::AGAIN), Some(lender)) => lender.rest(),
                (received, _) => break received?,
            }
        };
        self.is_quick = self.deadline.is_none() && begun.elapsed() < QUICK;
        Ok(len)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT)?;
        // TLS takes no interruption for an answer.
        Ok(retry_on_intr(|| rustix::net::send(self.socket, bytes, self.send_flags()))?)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.wait(PollFlags::OUT)?;
        let mut no_control = rustix::net::SendAncillaryBuffer::default();
        Ok(retry_on_intr(|| rustix::net::sendmsg(self.socket, parts, &mut no_control, self.send_flags()))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::ram::RamDisk;
    use inlinecrypt_testkit::Client;
    use inlinecrypt_testkit::nbd::cmd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_connection_is_idle_until_it_gets_a_request_and_once_it_answered() {
        for workers in [0, 2] {
            let disk = Arc::new(RamDisk::new(1 << 20));
            let spec = ExportSpec { name: "disk".to_owned(), description: String::new(), disk: disk.clone() };
            let options = ServerOptions { workers: Some(workers), ..ServerOptions::default() };
            let server = NbdServer::new([spec], options).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            server.serve(theirs).unwrap();
            let mut client = Client::connect(ours, "disk").unwrap();
            let activity = server.0.lock().connections.values().next().unwrap().activity.clone();
            let idle_time = || activity.idle_time(Instant::now());
            assert!(idle_time().is_some());
            disk.delay(Duration::from_millis(400));
            for index in 0..3 {
                client.send_header(cmd::READ, 0, index * 4096, 4096).unwrap();
            }
            thread::sleep(Duration::from_millis(100));
            assert_eq!(idle_time(), None, "workers: {workers}");
            for _ in 0..3 {
                client.receive().unwrap();
            }
            let deadline = Instant::now() + Duration::from_secs(20);
            while idle_time().is_none() {
                assert!(Instant::now() < deadline, "never idle again");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn who_has_been_idle_longest_makes_room_and_who_works_does_not() {
        let mut table = Table::default();
        let mut clients = Vec::new();
        for id in 0..3 {
            let (client, socket) = UnixStream::pair().unwrap();
            client.set_nonblocking(true).unwrap();
            clients.push(client);
            let connection = Connection {
                socket: Arc::new(socket.into()),
                activity: Arc::new(Activity::default()),
                closed: false,
                thread: None,
                rest: None,
            };
            table.connections.insert(id, connection);
            thread::sleep(Duration::from_millis(1));
        }
        // The first works; of the others, the second has had nothing to do since before the third came.
        let working = table.connections[&0].activity.clone();
        let busy = working.busy();
        let closed = |clients: &[UnixStream]| -> Vec<bool> {
            clients.iter().map(|mut client| matches!(client.read(&mut [0]), Ok(0))).collect()
        };
        let now = Instant::now();
        assert!(table.make_room(4, now), "there is room as it is");
        assert!(!table.make_room(3, now + Duration::from_secs(59)), "nobody was idle for a minute");
        assert_eq!(closed(&clients), [false; 3]);
        let later = now + Duration::from_secs(61);
        assert!(table.make_room(3, later));
        assert_eq!(closed(&clients), [false, true, false]);
        assert!(table.make_room(3, later), "who was closed does not count");
        assert_eq!(closed(&clients), [false, true, false]);
        assert!(table.make_room(2, later));
        assert_eq!(closed(&clients), [false, true, true]);
        assert!(!table.make_room(1, later), "who works is left alone");
        drop(busy);
        assert!(table.make_room(1, later));
        assert_eq!(closed(&clients), [true; 3]);
    }
}
