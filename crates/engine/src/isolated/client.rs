//! The host's side: an [`Engine`] like any other, whose work is done elsewhere.

use super::launch::{Launched, Launcher};
use super::process::{CONTROL_STACK_BYTES, LANE_STACK_BYTES, LANES_MAX};
use super::proto::{self, Answer, Inbox, Order, RootParts, Secret, VERSION, WireForm, WireKey, WireStep};
use super::realtime::{self, LanePriority};
use super::ring::{Deed, Head, LANE_BYTES, Lane, PIECES_MAX, RESULT_LOST, WirePiece};
use crate::blob::WrappingKeyId;
use crate::root::RootMaterial;
use crate::sys::{ARENA_BYTES_MIN, Part, Parts, Region};
use inlinecrypt_cipher::kdf::key_identifier_raw;
use inlinecrypt_core::caps::Capabilities;
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::engine::{
    Direction, Engine, EngineProcess, Exclusive, KeyLadder, KeyRef, Lifecycle, Piece, RawKeySource, SlotHold,
    SlotIndex,
};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{
    DepositedKey, EphemeralWrappedKey, KEY_IDENTIFIER_BYTES, Key, KeyForm, KeyId, LongTermWrappedKey, RawKey,
    SoftwareSecret,
};
use inlinecrypt_core::memory::{Memory, MemorySource};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use rustix::thread::futex;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard, mpsc};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Gives the root's material for each start of the engine process.
pub type RootGiver = dyn Fn() -> Result<RootMaterial, Error> + Send + Sync;

/// Within which time [`Options::deaths_max`] ends are too many: something is wrong that another start does not cure.
const DEATHS_TIME: Duration = Duration::from_secs(60);

/// How long what keeps a process from being started again may take to pass.
const START_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two attempts to start a process: first, and at the most.
const START_PAUSE_MIN: Duration = Duration::from_millis(5);
const START_PAUSE_MAX: Duration = Duration::from_millis(500);

/// What is to run in an engine process, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The engine's spec.
    pub spec: String,
    /// The spec of another engine beside it, for what that one cannot serve.
    pub fallback: Option<String>,
    /// How many orders it works on at once: 1 to 64.
    pub lanes: u32,
    /// How much data may be on its way through it, in bytes. Takes no memory until used.
    pub data_bytes: usize,
    /// Whether to refuse a process that is not locked up entirely.
    pub require_sandbox: bool,
    /// At which priority its lanes work. A process that may not have it is refused.
    pub priority: LanePriority,
    /// How many bytes an order has at most; what is longer goes in several, none shorter than a data unit. A lane does one without
    /// a pause, which at real-time priority is bounded ([`COMPUTE_MAX`](realtime::COMPUTE_MAX)).
    pub order_bytes_max: usize,
    /// How many ends of the process within a minute are too many. After that many, no other is started.
    pub deaths_max: u32,
}

/// Most lanes usually, where the least arena is all that there may be, and where twice that may be.
const LANES_SMALL: u32 = 24;
const LANES_LARGE: u32 = 48;

/// What their stacks leave of an arena, for keys.
const fn heap_bytes(arena: usize, lanes: u32) -> usize {
    arena - CONTROL_STACK_BYTES - lanes as usize * LANE_STACK_BYTES
}
const _: () = assert!(heap_bytes(ARENA_BYTES_MIN, LANES_SMALL) >= 512 << 10 && LANES_LARGE <= LANES_MAX);
const _: () = assert!(heap_bytes(2 * ARENA_BYTES_MIN, LANES_LARGE) >= 512 << 10);

/// What [`Options::order_bytes_max`] usually is: tens of milliseconds for a CPU without instructions for the cipher.
pub const ORDER_BYTES_MAX: usize = 16 << 20;

/// What [`Options::deaths_max`] usually is.
pub const DEATHS_MAX: u32 = 3;

impl Options {
    /// Runs `spec` with the usual numbers and a gibibyte of room. Of lanes there are four for each CPU, since one that works for
    /// threads of several CPUs has to move between them, which costs more than an order; at least 16, and of more than 24 one for
    /// each CPU, up to 48, since each takes secret memory. Where less than 8 MiB may be locked, never more than 24.
    #[must_use]
    pub fn new(spec: impl Into<String>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let cpus = u32::try_from(cpus).unwrap_or(LANES_MAX);
        let lockable = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let is_large = lockable.is_none_or(|bytes| bytes >= 2 * ARENA_BYTES_MIN as u64);
        let lanes_max = if is_large { LANES_LARGE } else { LANES_SMALL };
        Self {
            spec: spec.into(),
            fallback: None,
            lanes: cpus.saturating_mul(4).clamp(16, LANES_SMALL).max(cpus.min(lanes_max)),
            data_bytes: 1 << 30,
            require_sandbox: false,
            priority: LanePriority::Usual,
            order_bytes_max: ORDER_BYTES_MAX,
            deaths_max: DEATHS_MAX,
        }
    }
}

/// Engines in one process.
#[derive(Debug)]
pub struct Isolated {
    /// The engine that was asked for.
    pub engine: Arc<IsolatedEngine>,
    /// The one beside it.
    pub fallback: Option<Arc<IsolatedEngine>>,
    /// The root that wraps its keys.
    pub root: Option<WrappingKeyId>,
}

/// Starts an engine process and the engines in it.
///
/// # Errors
///
/// Whatever keeps process, root or engines from starting.
///
/// # Blocking
///
/// Waits for the process.
pub fn start(
    launcher: Arc<dyn Launcher>,
    root: Option<Arc<RootGiver>>,
    options: Options,
) -> Result<Isolated, Error> {
    let no_memory =
        |why| Error::new(ErrorKind::OutOfMemory, Op::Open).detail("no shared memory").because(why);
    let lanes = options.lanes.clamp(1, LANES_MAX) as usize;
    let floor = (lanes * LANE_BYTES).next_multiple_of(4096);
    let region = Arc::new(Region::create(floor + options.data_bytes).map_err(no_memory)?);
    let host = Arc::new(Host {
        launcher,
        root,
        parts: Parts::new(region.clone(), floor),
        region,
        busy: (0..lanes).map(|_| AtomicBool::new(false)).collect(),
        cpus: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
        freed: AtomicU32::new(0),
        waiting: AtomicU32::new(0),
        current: AtomicU64::new(0),
        gone: AtomicU64::new(0),
        line: Mutex::new(Line::default()),
        changed: Condvar::new(),
        prepared: Mutex::default(),
        deposits: Mutex::default(),
        committed: [Mutex::new(None), Mutex::new(None)],
        listeners: Mutex::default(),
        options,
    });
    let (report, started) = mpsc::channel();
    let watched = host.clone();
    // All starts are this thread's: the process ends when the thread that started it does.
    let watch = std::thread::Builder::new()
        .name("engine watch".to_owned())
        .spawn(move || watched.watch(&report))
        .map_err(|why| Error::new(ErrorKind::OutOfMemory, Op::Open).because(why))?;
    let gone =
        |_ended| Error::new(ErrorKind::EngineGone, Op::Open).detail("the engine process did not start");
    let opened = started.recv().map_err(gone).and_then(|started| started);
    let handle = Arc::new(Handle { host, watch: Mutex::new(Some(watch)) });
    let Opened { engine, fallback, root } = opened?;
    let make = |index, facts| Arc::new(IsolatedEngine::new(handle.clone(), index, facts));
    Ok(Isolated { engine: make(0, engine), fallback: fallback.map(|facts| make(1, facts)), root })
}

/// What an engine said of itself when it was started.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    name: String,
    capabilities: Capabilities,
    slot_hold: SlotHold,
    is_exclusive: bool,
    has_lifecycle: bool,
}

impl From<proto::WireEngine<'_>> for Facts {
    fn from(wire: proto::WireEngine<'_>) -> Self {
        Self {
            name: wire.name.to_owned(),
            capabilities: wire.capabilities(),
            slot_hold: wire.slot_hold(),
            is_exclusive: wire.is_exclusive,
            has_lifecycle: wire.has_lifecycle,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Opened {
    engine: Facts,
    fallback: Option<Facts>,
    root: Option<WrappingKeyId>,
}

/// Ends the process when the last engine in it is dropped.
#[derive(Debug)]
struct Handle {
    host: Arc<Host>,
    watch: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        {
            let mut line = self.host.line();
            line.is_closing = true;
            if let Some(session) = &line.session {
                let _ = rustix::net::shutdown(&session.socket, rustix::net::Shutdown::Both);
            }
        }
        self.host.changed.notify_all();
        if let Some(watch) = self.watch.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = watch.join();
        }
    }
}

/// One engine process after the other.
struct Host {
    launcher: Arc<dyn Launcher>,
    root: Option<Arc<RootGiver>>,
    options: Options,
    region: Arc<Region>,
    parts: Arc<Parts>,
    /// Which lanes are taken by a thread of ours.
    busy: Box<[AtomicBool]>,
    /// How many CPUs there are.
    cpus: usize,
    /// Counts lanes that were given back while somebody waited for one.
    freed: AtomicU32,
    /// How many threads wait for a lane.
    waiting: AtomicU32,
    /// Which start runs, or ran last.
    current: AtomicU64,
    /// The last start whose process has ended, with every thread of it: nobody answers its orders in lanes any more.
    gone: AtomicU64,
    line: Mutex<Line>,
    changed: Condvar,
    /// Blobs of this start and earlier ones, and what they were prepared from.
    prepared: Mutex<HashMap<Vec<u8>, Prepared>>,
    deposits: Mutex<HashMap<u64, Deposit>>,
    /// What each engine was told to serve, to be told again.
    committed: [Mutex<Option<KeyType>>; 2],
    listeners: Mutex<Vec<Arc<dyn Fn() + Send + Sync>>>,
}

/// The line to the process of the moment. Its lock is held for a look only.
#[derive(Debug, Default)]
struct Line {
    session: Option<Arc<Session>>,
    stopped: Option<String>,
    is_closing: bool,
    starts: u64,
    last_pause_ns: u64,
    sandbox: Vec<String>,
}

/// A running process.
#[derive(Debug)]
struct Session {
    socket: OwnedFd,
    pid: u32,
    /// Which start this is.
    generation: u64,
    /// One order at a time. Held while the process works on it.
    inbox: Mutex<Inbox>,
}

#[derive(Debug)]
struct Prepared {
    long_term: Vec<u8>,
    generation: u64,
    now: Vec<u8>,
}

#[derive(Debug)]
struct Deposit {
    again: Option<Arc<dyn RawKeySource>>,
    /// The key's public name: what is had again must have the same.
    identifier: [u8; KEY_IDENTIFIER_BYTES],
    generation: u64,
    now: u64,
    /// Why it could not be had again, when that was last tried.
    trouble: Option<String>,
}

/// What becomes of a raw key that nobody can give again.
const NOT_AGAIN: &str = "the engine process was started again, and this raw key cannot be had again without asking; restart the \
                         server";

/// What is said of a raw key that was read again and is another one.
const ANOTHER_KEY: &str = "the engine process was started again, and where the raw key was there is another key now; bring the \
                           key back";

/// Why an order was not answered.
enum Trouble {
    /// The process is gone; another may come.
    Gone,
    /// It said no.
    Said(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Said(error)
    }
}

impl Session {
    /// Gives an order and reads the answer.
    fn exchange<T>(
        &self,
        order: &Order<'_>,
        op: Op,
        read: impl FnOnce(Answer<'_>) -> Result<T, Error>,
    ) -> Result<T, Trouble> {
        self.exchange_with(order, &[], op, read)
    }

    fn exchange_with<T>(
        &self,
        order: &Order<'_>,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
        op: Op,
        read: impl FnOnce(Answer<'_>) -> Result<T, Error>,
    ) -> Result<T, Trouble> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        proto::send(self.socket.as_fd(), order, descriptors).map_err(|why| match why.kind() {
            std::io::ErrorKind::InvalidInput => Trouble::Said(
                Error::new(ErrorKind::Invalid, op).detail("too long for the engine process").because(why),
            ),
            _ => Trouble::Gone,
        })?;
        let len = match inbox.receive(&self.socket) {
            Ok((0, _)) | Err(_) => return Err(Trouble::Gone),
            Ok((len, _)) => len,
        };
        let answer = inbox.parse(len).map_err(|why| Error::new(ErrorKind::Bug, op).because(why))?;
        let read = read(answer);
        // What was received may have been a secret.
        *inbox = Inbox::default();
        Ok(read?)
    }

    fn done(&self, order: &Order<'_>, op: Op) -> Result<(), Trouble> {
        self.exchange(order, op, |answer| match answer {
            Answer::Done => Ok(()),
            other => Err(other.into_error(op)),
        })
    }

    fn blob(&self, order: &Order<'_>, op: Op) -> Result<Vec<u8>, Trouble> {
        self.exchange(order, op, |answer| match answer {
            Answer::Blob(blob) => Ok(blob.to_vec()),
            other => Err(other.into_error(op)),
        })
    }

    fn deposit(&self, raw: &RawKey) -> Result<DepositedKey, Trouble> {
        let order = Order::Deposit(Secret(raw.expose()));
        self.exchange(&order, Op::InitKey, |answer| match answer {
            Answer::Deposited { ticket, has_equal_halves, identifier } => {
                Ok(DepositedKey { ticket, len_bytes: raw.expose().len(), has_equal_halves, identifier })
            }
            other => Err(other.into_error(Op::InitKey)),
        })
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("options", &self.options)
            .field("launcher", &self.launcher)
            .finish_non_exhaustive()
    }
}

impl Host {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lane(&self, index: usize) -> Lane<'_> {
        Lane::new(&self.region, index)
    }

    // The watch thread.

    fn watch(&self, report: &mpsc::Sender<Result<Opened, Error>>) {
        let (mut child, opened) = match self.begin(1, None) {
            Ok(begun) => begun,
            Err(error) => {
                let _ = report.send(Err(error));
                return;
            }
        };
        let _ = report.send(Ok(opened.clone()));
        let mut deaths = VecDeque::new();
        loop {
            self.wait_for_end(child);
            let ended = Instant::now();
            let ended_generation = self.current.load(Ordering::SeqCst);
            self.gone.store(ended_generation, Ordering::SeqCst);
            let generation = {
                let mut line = self.line();
                line.session = None;
                if line.is_closing {
                    return;
                }
                line.starts + 1
            };
            // Every thread of the process has ended: what it was working on stays as it is.
            (0..self.busy.len()).for_each(|index| self.lane(index).take_back(ended_generation));
            if !self.may_go_on(&mut deaths) {
                return;
            }
            tracing::warn!("the engine process has ended; starting another");
            match self.begin_again(generation, &opened, &mut deaths) {
                Some(next) => child = next,
                None => return,
            }
            self.tell_of_restart();
            let pause = ended.elapsed();
            self.line().last_pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
            tracing::warn!(pause_ms = pause.as_millis(), "the engine process was started again");
        }
    }

    /// Counts an end of the process, and stops if that was one too many.
    fn may_go_on(&self, deaths: &mut VecDeque<Instant>) -> bool {
        let now = Instant::now();
        deaths.push_back(now);
        while deaths.front().is_some_and(|death| now.duration_since(*death) > DEATHS_TIME) {
            deaths.pop_front();
        }
        let goes_on = deaths.len() < self.options.deaths_max as usize;
        if !goes_on {
            self.stop(format!(
                "the engine process ended {} times within a minute; see its messages, and restart the server",
                deaths.len()
            ));
        }
        goes_on
    }

    /// Starts a process as `opened` was, until one is there. One that ends at once counts as ended, and what else keeps it from
    /// starting (a root that cannot be read, say) is given some time to pass. `None` if it was given up, and all were told.
    fn begin_again(
        &self,
        generation: u64,
        opened: &Opened,
        deaths: &mut VecDeque<Instant>,
    ) -> Option<Option<Child>> {
        let since = Instant::now();
        let mut pause = START_PAUSE_MIN;
        loop {
            let error = match self.begin(generation, Some(opened)) {
                Ok((child, _)) => return Some(child),
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::Stopping => return None,
                ErrorKind::EngineGone => {
                    if !self.may_go_on(deaths) {
                        return None;
                    }
                }
                _ if since.elapsed() < START_TIME_MAX => {}
                _ => {
                    self.stop(format!("the engine process cannot be started again: {}", error.chain()));
                    return None;
                }
            }
            tracing::warn!("the engine process was not started, and is tried again: {}", error.chain());
            let line = self.line();
            let line = self
                .changed
                .wait_timeout_while(line, pause, |line| !line.is_closing)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if line.is_closing {
                return None;
            }
            drop(line);
            pause = (2 * pause).min(START_PAUSE_MAX);
        }
    }

    /// On a thread of its own: who is told may need the new process, and another after it.
    fn tell_of_restart(&self) {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !listeners.is_empty() {
            let tell = move || listeners.iter().for_each(|listener| listener());
            let _ = std::thread::Builder::new().name("engine restart".to_owned()).spawn(tell);
        }
    }

    fn stop(&self, why: String) {
        tracing::error!("{why}");
        self.line().stopped = Some(why);
        self.changed.notify_all();
    }

    /// Starts a process and its engines, which must be as `expected`, and tells them what others were told before.
    fn begin(&self, generation: u64, expected: Option<&Opened>) -> Result<(Option<Child>, Opened), Error> {
        let Launched { socket, mut child } = self.launcher.launch()?;
        let begun = self.greet(socket, generation, expected);
        if begun.is_err()
            && let Some(child) = &mut child
        {
            let _ = child.kill();
            let _ = child.wait();
        }
        Ok((child, begun?))
    }

    fn greet(&self, socket: OwnedFd, generation: u64, expected: Option<&Opened>) -> Result<Opened, Error> {
        let gone = |trouble| match trouble {
            Trouble::Gone => Error::new(ErrorKind::EngineGone, Op::Open)
                .detail("the engine process ended as soon as it was started; see its messages"),
            Trouble::Said(error) => error,
        };
        let mut session = Session { socket, pid: 0, generation, inbox: Mutex::default() };
        let hello = Order::Hello {
            version: VERSION,
            lanes: u32::try_from(self.busy.len()).expect("at most LANES_MAX"),
            shared_bytes: self.region.len_bytes() as u64,
            generation,
            require_sandbox: self.options.require_sandbox,
            realtime: self.options.priority == LanePriority::Realtime,
        };
        let ready =
            session.exchange_with(&hello, &[self.region.descriptor()], Op::Open, |answer| match answer {
                Answer::Ready { pid, steps, missing } => {
                    let missing = missing.lines().map(|line| format!("MISSING {line}"));
                    Ok((pid, steps.lines().map(str::to_owned).chain(missing).collect::<Vec<_>>()))
                }
                other => Err(other.into_error(Op::Open)),
            });
        let (pid, sandbox) = ready.map_err(gone)?;
        session.pid = pid;
        let root = self.root.as_ref().map(|give| give()).transpose()?.map(RootMaterial::into_parts);
        let descriptors: Vec<_> = root.iter().flat_map(|root| &root.descriptors).map(AsFd::as_fd).collect();
        let open = Order::Open {
            spec: &self.options.spec,
            fallback: self.options.fallback.as_deref(),
            root: root.as_ref().map(|root| RootParts {
                kind: root.kind,
                public: &root.plain,
                secret: Secret(&root.secret),
            }),
        };
        let opened = session.exchange_with(&open, &descriptors, Op::Open, |answer| match answer {
            Answer::Opened { engine, fallback, root } => Ok(Opened {
                engine: engine.into(),
                fallback: fallback.map(Facts::from),
                root: root.map(WrappingKeyId::from_bytes),
            }),
            other => Err(other.into_error(Op::Open)),
        });
        let opened = opened.map_err(gone)?;
        if expected.is_some_and(|expected| *expected != opened) {
            // Before anybody is given this process: keys and requests are another engine's.
            return Err(Error::new(ErrorKind::Invalid, Op::Open)
                .detail("the engine came back as another one, with another root or other abilities; bring the root back"));
        }
        for (engine, committed) in (0u8..).zip(&self.committed) {
            let committed = *committed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(key_type) = committed {
                let wrapped = key_type == KeyType::HardwareWrapped;
                session.done(&Order::Commit { engine, wrapped }, Op::Admit).map_err(gone)?;
            }
        }
        let mut line = self.line();
        line.session = Some(Arc::new(session));
        line.starts = generation;
        line.sandbox = sandbox;
        let is_closing = line.is_closing;
        self.current.store(generation, Ordering::SeqCst);
        drop(line);
        self.changed.notify_all();
        if is_closing { Err(Error::new(ErrorKind::Stopping, Op::Open)) } else { Ok(opened) }
    }

    /// Waits until the process has closed its socket, and every thread of it has ended.
    fn wait_for_end(&self, child: Option<Child>) {
        let session = self.line().session.clone().expect("there is one until this thread says otherwise");
        let mut ends = [PollFd::new(&session.socket, PollFlags::empty())];
        while matches!(poll(&mut ends, None), Err(rustix::io::Errno::INTR)) {}
        match child {
            Some(mut child) => {
                let _ = child.kill();
                let ended_by = child.wait().ok().and_then(|status| status.signal());
                if ended_by == Some(Signal::XCPU.as_raw()) {
                    let ms = realtime::COMPUTE_MAX.as_millis();
                    tracing::error!(
                        "the system ended the engine process: it computed at real-time priority without a pause, for {ms} ms or \
                         what RLIMIT_RTTIME was lowered to"
                    );
                }
            }
            None => wait_for_process(session.pid),
        }
    }

    // The threads that serve.

    /// The running process; waits while one is being started.
    fn session(&self, op: Op) -> Result<Arc<Session>, Error> {
        let mut line = self.line();
        loop {
            if let Some(why) = &line.stopped {
                return Err(Error::new(ErrorKind::EngineGone, op).detail(why.clone()));
            }
            if let Some(session) = &line.session {
                return Ok(session.clone());
            }
            if line.is_closing {
                return Err(Error::new(ErrorKind::Stopping, op));
            }
            line = self.changed.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Does `work` with the running process; again with the next one if it ends meanwhile.
    fn ask<T>(&self, op: Op, mut work: impl FnMut(&Session) -> Result<T, Trouble>) -> Result<T, Error> {
        loop {
            let session = self.session(op)?;
            match work(&session) {
                Ok(done) => return Ok(done),
                Err(Trouble::Said(error)) => return Err(error),
                Err(Trouble::Gone) => self.wait_past(session.generation),
            }
        }
    }

    /// Waits until the process of `generation` is known to be gone.
    fn wait_past(&self, generation: u64) {
        let mut line = self.line();
        while line.session.as_ref().is_some_and(|session| session.generation == generation)
            && !line.is_closing
        {
            line = self
                .changed
                .wait_timeout(line, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// What the key's blob is called in the process of `session`.
    fn blob_now(&self, session: &Session, engine: u8, blob: &[u8]) -> Result<Vec<u8>, Trouble> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        // Not one of ours: the engine says what it thinks of it.
        let Some(known) = prepared.get_mut(blob) else { return Ok(blob.to_vec()) };
        if known.generation != session.generation {
            known.now = session.blob(&Order::Prepare { engine, blob: &known.long_term }, Op::Prepare)?;
            known.generation = session.generation;
        }
        Ok(known.now.clone())
    }

    fn ticket_now(&self, session: &Session, ticket: u64) -> Result<u64, Trouble> {
        let mut deposits = self.deposits.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(deposit) = deposits.get_mut(&ticket) else { return Ok(ticket) };
        if deposit.generation != session.generation {
            let gone = |why: String| Error::new(ErrorKind::EngineGone, Op::Program).detail(why);
            let again = deposit.again.as_ref().ok_or_else(|| gone(NOT_AGAIN.to_owned()))?;
            let raw = again.read().and_then(|raw| match key_identifier_raw(raw.expose()) {
                identifier if identifier == deposit.identifier => Ok(raw),
                _ => Err(Error::new(ErrorKind::KeyRejected, Op::Program).detail(ANOTHER_KEY)),
            });
            let raw = raw.inspect_err(|error| deposit.trouble = Some(error.chain()))?;
            deposit.now = session.deposit(&raw)?.ticket;
            deposit.generation = session.generation;
            deposit.trouble = None;
        }
        Ok(deposit.now)
    }

    /// Calls `work` with `key` as the process of `session` knows it.
    fn with_key<T>(
        &self,
        session: &Session,
        engine: u8,
        key: &Key,
        work: impl FnOnce(WireKey<'_>) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let blob;
        let form = match key.form() {
            KeyForm::Raw(raw) => WireForm::Raw(Secret(raw.expose())),
            KeyForm::Deposited(deposited) => WireForm::Ticket(self.ticket_now(session, deposited.ticket)?),
            KeyForm::Wrapped(wrapped) => {
                blob = self.blob_now(session, engine, wrapped.as_bytes())?;
                WireForm::Wrapped(&blob)
            }
        };
        work(WireKey::new(key.config(), form))
    }

    /// Takes a lane, if possible one whose engine thread is on `cpu` already. `None` while all are taken.
    ///
    /// Moving a thread to another CPU costs more than all the rest of an order, so each CPU has lanes of its own.
    fn free_lane(&self, cpu: usize) -> Option<TakenLane<'_>> {
        let of_this_cpu = |index: &usize| index % self.cpus == cpu % self.cpus;
        let near = (0..self.busy.len()).filter(of_this_cpu);
        let mut lanes = near.chain(0..self.busy.len()).map(|index| (index, &self.busy[index]));
        // Looked at first: a look is cheaper than a try.
        let free = |busy: &AtomicBool| !busy.load(Ordering::Relaxed) && !busy.swap(true, Ordering::SeqCst);
        lanes.find(|(_, busy)| free(busy)).map(|(index, _)| TakenLane { host: self, index, cpu })
    }

    /// The same, but waits while all are taken.
    fn take_lane(&self, cpu: usize) -> TakenLane<'_> {
        loop {
            if let Some(taken) = self.free_lane(cpu) {
                return taken;
            }
            // Whoever gives a lane back from now on sees that somebody waits, and counts.
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let freed = self.freed.load(Ordering::SeqCst);
            let found = self.free_lane(cpu);
            if found.is_none() {
                let _ = futex::wait(&self.freed, futex::Flags::PRIVATE, freed, None);
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            if let Some(taken) = found {
                return taken;
            }
        }
    }
}

/// Waits until a process that is not our child has ended.
fn wait_for_process(pid: u32) {
    if pid == std::process::id() {
        // A thread of this very process: it has closed its socket as the last thing it did.
        return;
    }
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return };
    if let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
        let mut ends = [PollFd::new(&process, PollFlags::IN)];
        while matches!(poll(&mut ends, None), Err(rustix::io::Errno::INTR)) {}
    }
}

/// A lane that is a thread's own until dropped.
struct TakenLane<'h> {
    host: &'h Host,
    index: usize,
    /// Where the thread ran when it took the lane.
    cpu: usize,
}

impl TakenLane<'_> {
    /// The same as an order says it.
    fn wire_cpu(&self) -> u32 {
        u32::try_from(self.cpu).unwrap_or(u32::MAX)
    }
}

impl Drop for TakenLane<'_> {
    fn drop(&mut self) {
        self.host.busy[self.index].store(false, Ordering::SeqCst);
        if self.host.waiting.load(Ordering::SeqCst) > 0 {
            self.host.freed.fetch_add(1, Ordering::SeqCst);
            let _ = futex::wake(&self.host.freed, futex::Flags::PRIVATE, 1);
        }
    }
}

/// How many keys for keyslots a process remembers: more than are busy at once.
const KNOWN_MAX: usize = 4096;

/// An engine in another process.
pub struct IsolatedEngine {
    handle: Arc<Handle>,
    index: u8,
    facts: Facts,
    source: SharedSource,
    /// Data unit size of the key in each keyslot, in bytes.
    units: Box<[AtomicU32]>,
    /// Keys that the process remembers. Requests look up one only if the engine has no keyslots.
    remembered: RwLock<HashMap<KeyId, Known>>,
}

/// What a process of one start calls a key. No other key of that start is ever called so, and later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Known {
    generation: u64,
    handle: u32,
}

impl IsolatedEngine {
    fn new(handle: Arc<Handle>, index: u8, facts: Facts) -> Self {
        let source = SharedSource(handle.host.parts.clone());
        let units = (0..facts.capabilities.keyslots).map(|_| AtomicU32::new(0)).collect();
        Self { handle, index, facts, source, units, remembered: RwLock::default() }
    }

    /// Calls `listener`, on a thread of its own, after each restart of the process:
    /// [`CryptoProfile::restarted`](inlinecrypt_core::profile::CryptoProfile::restarted) is to be told.
    pub fn when_restarted(&self, listener: impl Fn() + Send + Sync + 'static) {
        self.host().listeners.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::new(listener));
    }

    fn host(&self) -> &Host {
        &self.handle.host
    }

    fn done(&self, op: Op, order: &Order<'_>) -> Result<(), Error> {
        self.host().ask(op, |session| session.done(order, op))
    }

    fn known(&self) -> RwLockWriteGuard<'_, HashMap<KeyId, Known>> {
        self.remembered.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the process calls `key`, which it is told if need be.
    fn remember(&self, key: &Key) -> Result<Known, Error> {
        let known = self.remembered.read().unwrap_or_else(PoisonError::into_inner).get(&key.id()).copied();
        // Of this start, whether the process runs or has just ended: whoever hands it an order sees which.
        let current = self.host().current.load(Ordering::SeqCst);
        if let Some(known) = known.filter(|known| known.generation == current) {
            return Ok(known);
        }
        self.host().ask(Op::Crypt, |session| {
            let mut remembered = self.known();
            if let Some(known) = remembered.get(&key.id())
                && known.generation == session.generation
            {
                return Ok(*known);
            }
            let engine = self.index;
            // Nobody says when a key goes that is in no keyslot. Any may be forgotten: it is remembered again when needed.
            if self.facts.capabilities.keyslots > 0
                && remembered.len() >= KNOWN_MAX
                && let Some(oldest) = remembered.iter().min_by_key(|(_, known)| **known).map(|(id, _)| *id)
                && let Some(Known { generation, handle }) = remembered.remove(&oldest)
                && generation == session.generation
            {
                session.done(&Order::Forget { engine, handle }, Op::Program)?;
            }
            let handle = self.host().with_key(session, engine, key, |key| {
                session.exchange(&Order::Remember { engine, key }, Op::Crypt, |answer| match answer {
                    Answer::Remembered(handle) => Ok(handle),
                    other => Err(other.into_error(Op::Crypt)),
                })
            })?;
            let known = Known { generation: session.generation, handle };
            remembered.insert(key.id(), known);
            Ok(known)
        })
    }

    /// One order: of what is left of `pieces` as much as one may have. `Ok(true)` if that was done, and has been taken off. Else as
    /// [`order`](Self::order).
    fn order_share(
        &self,
        key: Called,
        unit_bytes: usize,
        direction: Direction,
        memory_at: u64,
        pieces: &mut [Piece],
    ) -> Result<bool, Error> {
        let bytes_max = self.host().options.order_bytes_max;
        let (share, cut_bytes) =
            share(pieces, bytes_max.saturating_sub(bytes_max % unit_bytes).max(unit_bytes));
        let last_bytes = share.last().map_or(0, |last| last.range.len());
        let done = self.order(key, unit_bytes, direction, memory_at, share);
        if let Some(last) = share.last_mut().filter(|_| cut_bytes > 0) {
            last.range.end += cut_bytes;
            if let Ok(true) = done {
                last.first = last.first.wrapping_add((last_bytes / unit_bytes) as u64);
            }
        }
        done
    }

    /// One order: `pieces`, which fit. `Ok(false)` if the process was gone; then what was encrypted has
    /// been taken off, and what was to be decrypted means nothing.
    fn order(
        &self,
        key: Called,
        unit_bytes: usize,
        direction: Direction,
        memory_at: u64,
        pieces: &mut [Piece],
    ) -> Result<bool, Error> {
        let host = self.host();
        let (number, is_slot, generation) = match key {
            // Of the process of this start, whether it runs or has just ended: the framework programs a new one itself.
            Called::Slot(slot) => (slot.0, true, host.current.load(Ordering::SeqCst)),
            Called::Known(Known { generation, handle }) => (handle, false, generation),
        };
        let taken = host.take_lane(rustix::thread::sched_getcpu());
        let head = Head {
            engine: self.index,
            is_slot,
            deed: if direction == Direction::Encrypt { Deed::Encrypt } else { Deed::Decrypt },
            key: number,
            cpu: taken.wire_cpu(),
            pieces: u32::try_from(pieces.len()).expect("at most PIECES_MAX"),
        };
        let wire = pieces.iter().map(|Piece { first, range }| WirePiece {
            offset: memory_at + range.start as u64,
            len: range.len() as u64,
            first: *first,
        });
        let lane = self.hand_in(&taken, generation, head, wire);
        match lane.result() {
            0 => {
                pieces.iter_mut().for_each(Piece::finish);
                Ok(true)
            }
            RESULT_LOST => {
                lane.take_off(pieces, unit_bytes);
                Ok(false)
            }
            code => {
                let error = error_of(&lane, code, Op::Crypt);
                if error.kind() == ErrorKind::NoKey {
                    lane.take_off(pieces, unit_bytes);
                }
                Err(error)
            }
        }
    }

    /// Leaves an order to the process of `generation` in a lane and waits until it is done, or lost.
    fn hand_in(
        &self,
        taken: &TakenLane<'_>,
        generation: u64,
        head: Head,
        pieces: impl Iterator<Item = WirePiece>,
    ) -> Lane<'_> {
        let host = self.host();
        let lane = host.lane(taken.index);
        lane.post(generation, head, pieces);
        lane.wait(generation, || host.gone.load(Ordering::SeqCst) >= generation);
        lane
    }

    /// Programs a keyslot by an order in a lane, which costs a tenth of one on the control socket. `Ok(false)` if that is not
    /// possible now: no lane is free, or the process does not know the key, or was gone.
    fn program_by_lane(&self, slot: SlotIndex, key: &Key) -> Result<bool, Error> {
        // What it has against the key is said on the other way.
        let Ok(Known { generation, handle }) = self.remember(key) else { return Ok(false) };
        let Some(taken) = self.host().free_lane(rustix::thread::sched_getcpu()) else { return Ok(false) };
        let deed = Deed::Program { slot: slot.0 };
        let cpu = taken.wire_cpu();
        let head = Head { engine: self.index, is_slot: false, deed, key: handle, cpu, pieces: 0 };
        let lane = self.hand_in(&taken, generation, head, std::iter::empty());
        match lane.result() {
            0 => return Ok(true),
            RESULT_LOST => {}
            code => {
                let error = error_of(&lane, code, Op::Program);
                if error.kind() != ErrorKind::NoKey {
                    return Err(error);
                }
            }
        }
        self.known().remove(&key.id());
        Ok(false)
    }
}

/// The part of `pieces` that one order has: at most `bytes_max`, for which the last one may have been made shorter; by how much.
fn share(pieces: &mut [Piece], bytes_max: usize) -> (&mut [Piece], usize) {
    let begin = pieces.iter().position(|piece| !piece.is_done()).unwrap_or(0);
    let pieces = &mut pieces[begin..];
    let mut room = bytes_max;
    let mut count = 0;
    let mut cut_bytes = 0;
    for piece in pieces.iter_mut().take(PIECES_MAX) {
        if room == 0 {
            break;
        }
        count += 1;
        cut_bytes = piece.range.len().saturating_sub(room);
        piece.range.end -= cut_bytes;
        room -= piece.range.len();
    }
    (&mut pieces[..count], cut_bytes)
}

/// What an order calls its key.
#[derive(Clone, Copy, Debug)]
enum Called {
    Slot(SlotIndex),
    Known(Known),
}

/// What an engine said to an order that failed.
fn error_of(lane: &Lane<'_>, code: u32, op: Op) -> Error {
    let kind = u8::try_from(code - 1).map_or(ErrorKind::EngineFailed, proto::kind_of);
    let text = lane.text();
    let error = Error::new(kind, op);
    if text.is_empty() { error } else { error.detail(text) }
}

impl fmt::Debug for IsolatedEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IsolatedEngine").field("facts", &self.facts).finish_non_exhaustive()
    }
}

impl Engine for IsolatedEngine {
    fn name(&self) -> &str {
        &self.facts.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.facts.capabilities
    }

    fn memory(&self) -> &dyn MemorySource {
        &self.source
    }

    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error> {
        let engine = self.index;
        if !self.program_by_lane(slot, key)? {
            self.host().ask(Op::Program, |session| {
                self.host().with_key(session, engine, key, |key| {
                    session.done(&Order::Program { engine, slot: slot.0, key }, Op::Program)
                })
            })?;
        }
        if let Some(unit) = self.units.get(slot.0 as usize) {
            unit.store(key.config().data_unit_size().bytes(), Ordering::Release);
        }
        Ok(())
    }

    fn evict(&self, slot: Option<SlotIndex>, key: &Key) -> Result<(), Error> {
        let engine = self.index;
        let evicted = match slot {
            Some(slot) => self.done(Op::Evict, &Order::Evict { engine, slot: slot.0 }),
            None if self.facts.capabilities.keyslots > 0 => {
                return Err(
                    Error::new(ErrorKind::Invalid, Op::Evict).detail("which keyslot? The engine has some")
                );
            }
            None => Ok(()),
        };
        let known = self.known().remove(&key.id());
        let forgotten = known.map_or(Ok(()), |Known { generation, handle }| {
            self.host().ask(Op::Evict, |session| match generation == session.generation {
                true => session.done(&Order::Forget { engine, handle }, Op::Evict),
                // It went with its process.
                false => Ok(()),
            })
        });
        evicted.and(forgotten)
    }

    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        let at = memory.mapped_at();
        let len = memory.bytes().len();
        if let Some(piece) =
            pieces.iter().find(|piece| piece.range.end > len || piece.range.start > piece.range.end)
        {
            return Err(Error::new(ErrorKind::Invalid, Op::Crypt)
                .detail(format!("bytes {:?} are not in the memory given", piece.range)));
        }
        if matches!(key, KeyRef::Inline(_)) && self.facts.capabilities.keyslots > 0 {
            return Err(Error::new(ErrorKind::Invalid, Op::Crypt)
                .detail("the engine has keyslots, it takes no key with a request"));
        }
        if pieces.is_empty() {
            return Ok(());
        }
        loop {
            let (number, unit_bytes) = match key {
                KeyRef::Slot(slot) => {
                    let unit = self.units.get(slot.0 as usize).map_or(0, |unit| unit.load(Ordering::Acquire));
                    (Called::Slot(slot), unit)
                }
                KeyRef::Inline(key) => {
                    (Called::Known(self.remember(key)?), key.config().data_unit_size().bytes())
                }
            };
            let unit_bytes = (unit_bytes as usize).max(1);
            match (self.order_share(number, unit_bytes, direction, at, pieces), key) {
                (Ok(true), _) if pieces.iter().all(Piece::is_done) => return Ok(()),
                (Ok(true), _) => {}
                (Ok(false), _) if direction == Direction::Decrypt => {
                    // Not until the new process is there, so that the caller finds it.
                    self.host().session(Op::Crypt)?;
                    return Err(Error::new(ErrorKind::Interrupted, Op::Crypt));
                }
                (Ok(false), KeyRef::Slot(slot)) => {
                    // Not until the new process is there: the framework programs the key again next.
                    self.host().session(Op::Crypt)?;
                    return Err(Error::new(ErrorKind::NoKey, Op::Crypt)
                        .detail(format!("keyslot {slot} went with its engine process")));
                }
                // Remembered by the next process, and handed in again.
                (Ok(false), KeyRef::Inline(_)) => drop(self.host().session(Op::Crypt)?),
                (Err(error), KeyRef::Inline(key)) if error.kind() == ErrorKind::NoKey => {
                    self.known().remove(&key.id());
                }
                (Err(error), _) => return Err(error),
            }
        }
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        self.facts.capabilities.key_types.contains(KeyType::HardwareWrapped).then_some(self as _)
    }

    fn slot_hold(&self) -> SlotHold {
        self.facts.slot_hold
    }

    fn exclusive(&self) -> Option<&dyn Exclusive> {
        self.facts.is_exclusive.then_some(self as _)
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        self.facts.has_lifecycle.then_some(self as _)
    }

    fn deposit(&self, raw: RawKey, again: Option<Arc<dyn RawKeySource>>) -> Result<KeyForm, Error> {
        let (deposited, generation) =
            self.host().ask(Op::InitKey, |session| Ok((session.deposit(&raw)?, session.generation)))?;
        // One number per start would not be unique over all of them.
        let ticket = generation << 32 | deposited.ticket;
        let DepositedKey { identifier, ticket: now, .. } = deposited;
        let deposit = Deposit { again, identifier, generation, now, trouble: None };
        self.host().deposits.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket, deposit);
        Ok(KeyForm::Deposited(DepositedKey { ticket, ..deposited }))
    }

    fn key_identifier(&self, form: &KeyForm) -> Result<[u8; KEY_IDENTIFIER_BYTES], Error> {
        match form {
            KeyForm::Raw(raw) => Ok(key_identifier_raw(raw.expose())),
            KeyForm::Deposited(key) => Ok(key.identifier),
            KeyForm::Wrapped(blob) => self.host().ask(Op::DeriveSecret, |session| {
                let blob = self.host().blob_now(session, self.index, blob.as_bytes())?;
                let order = Order::Identify { engine: self.index, blob: &blob };
                session.exchange(&order, Op::DeriveSecret, |answer| match answer {
                    Answer::Identifier(identifier) => Ok(identifier),
                    other => Err(other.into_error(Op::DeriveSecret)),
                })
            }),
        }
    }

    /// Does not wait for a process that is being started.
    fn stopped(&self) -> Option<String> {
        let session = {
            let line = self.host().line();
            if line.stopped.is_some() {
                return line.stopped.clone();
            }
            line.session.clone()?
        };
        let answer =
            session.exchange(&Order::WhyStopped { engine: self.index }, Op::Open, |answer| match answer {
                Answer::Stopped(why) => Ok(why.map(str::to_owned)),
                other => Err(other.into_error(Op::Open)),
            });
        answer.unwrap_or(None)
    }

    fn trouble(&self, key: &Key) -> Option<String> {
        let (stopped, generation) = {
            let line = self.host().line();
            (line.stopped.clone(), line.session.as_ref().map(|session| session.generation))
        };
        if stopped.is_some() {
            return stopped;
        }
        let KeyForm::Deposited(key) = key.form() else { return None };
        let deposits = self.host().deposits.lock().unwrap_or_else(PoisonError::into_inner);
        let deposit = deposits.get(&key.ticket)?;
        if generation.is_none_or(|now| now == deposit.generation) {
            return None;
        }
        match deposit.again {
            Some(_) => deposit.trouble.clone(),
            None => Some(NOT_AGAIN.to_owned()),
        }
    }

    fn process(&self) -> Option<EngineProcess> {
        let line = self.host().line();
        Some(EngineProcess {
            pid: line.session.as_ref().map(|session| session.pid),
            restarts: line.starts.saturating_sub(1),
            last_pause_ns: line.last_pause_ns,
            stopped: line.stopped.clone(),
            sandbox: line.sandbox.clone(),
        })
    }
}

impl KeyLadder for IsolatedEngine {
    fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error> {
        let order = Order::Import { engine: self.index, raw: Secret(raw.expose()) };
        let blob = self.host().ask(Op::Import, |session| session.blob(&order, Op::Import))?;
        Ok(LongTermWrappedKey::new(&blob))
    }

    fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        let order = Order::Generate { engine: self.index };
        let blob = self.host().ask(Op::Generate, |session| session.blob(&order, Op::Generate))?;
        Ok(LongTermWrappedKey::new(&blob))
    }

    fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        let order = Order::Prepare { engine: self.index, blob: long_term.as_bytes() };
        let (blob, generation) = self
            .host()
            .ask(Op::Prepare, |session| Ok((session.blob(&order, Op::Prepare)?, session.generation)))?;
        let known = Prepared { long_term: long_term.as_bytes().to_vec(), generation, now: blob.clone() };
        self.host().prepared.lock().unwrap_or_else(PoisonError::into_inner).insert(blob.clone(), known);
        Ok(EphemeralWrappedKey::new(&blob))
    }

    fn check(&self, ephemeral: &EphemeralWrappedKey) -> Result<(), Error> {
        self.host().ask(Op::Admit, |session| {
            let blob = self.host().blob_now(session, self.index, ephemeral.as_bytes())?;
            session.done(&Order::Check { engine: self.index, blob: &blob }, Op::Admit)
        })
    }

    fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
        self.host().ask(Op::DeriveSecret, |session| {
            let blob = self.host().blob_now(session, self.index, ephemeral.as_bytes())?;
            let order = Order::DeriveSecret { engine: self.index, blob: &blob };
            session.exchange(&order, Op::DeriveSecret, |answer| match answer {
                Answer::Secret(Secret(bytes)) => {
                    let mut secret = Zeroizing::new([0; inlinecrypt_core::key::SOFTWARE_SECRET_BYTES]);
                    if bytes.len() != secret.len() {
                        return Err(Error::new(ErrorKind::Bug, Op::DeriveSecret));
                    }
                    secret.copy_from_slice(bytes);
                    Ok(SoftwareSecret::new(secret))
                }
                other => Err(other.into_error(Op::DeriveSecret)),
            })
        })
    }
}

impl Exclusive for IsolatedEngine {
    fn committed(&self) -> Option<KeyType> {
        *self.host().committed[usize::from(self.index)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self, key_type: KeyType) -> Result<(), Error> {
        let order = Order::Commit { engine: self.index, wrapped: key_type == KeyType::HardwareWrapped };
        self.done(Op::Admit, &order)?;
        let committed = &self.host().committed[usize::from(self.index)];
        *committed.lock().unwrap_or_else(PoisonError::into_inner) = Some(key_type);
        Ok(())
    }
}

impl Lifecycle for IsolatedEngine {
    fn reset(&self) -> Result<(), Error> {
        self.done(Op::Open, &Order::Lifecycle { engine: self.index, step: WireStep::Reset })
    }

    fn suspend(&self) -> Result<(), Error> {
        self.done(Op::Open, &Order::Lifecycle { engine: self.index, step: WireStep::Suspend })
    }

    fn resume(&self) -> Result<(), Error> {
        self.done(Op::Open, &Order::Lifecycle { engine: self.index, step: WireStep::Resume })
    }
}

/// Memory that the engine process has mapped, too.
#[derive(Debug)]
struct SharedSource(Arc<Parts>);

impl MemorySource for SharedSource {
    fn allocate(&self, len_bytes: usize) -> Result<Box<dyn Memory>, Error> {
        let part = self.0.lend(len_bytes).ok_or_else(|| {
            Error::new(ErrorKind::OutOfMemory, Op::Allocate)
                .detail("the memory shared with the engine process is used up")
        })?;
        Ok(Box::new(SharedMemory(part)))
    }
}

#[derive(Debug)]
struct SharedMemory(Part);

impl Memory for SharedMemory {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }

    fn mapped_at(&self) -> u64 {
        self.0.offset() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_cipher::Dun;

    fn pieces(lens: impl IntoIterator<Item = usize>) -> Vec<Piece> {
        let mut end = 0;
        let piece = |len| {
            end += len;
            Piece { first: Dun::from_limbs([7, 0, 0, 0]), range: end - len..end }
        };
        lens.into_iter().map(piece).collect()
    }

    fn lens(pieces: &[Piece]) -> Vec<usize> {
        pieces.iter().map(|piece| piece.range.len()).collect()
    }

    #[test]
    fn an_order_has_no_more_bytes_and_pieces_than_it_may_have() {
        let mut exact = pieces([10, 20, 30]);
        let (part, cut_bytes) = share(&mut exact, 30);
        assert_eq!((lens(part), cut_bytes), (vec![10, 20], 0));
        let mut cut = pieces([10, 20, 30]);
        let (part, cut_bytes) = share(&mut cut, 40);
        assert_eq!((lens(part), cut_bytes), (vec![10, 20, 10], 20));
        let mut large = pieces([100, 5]);
        let (part, cut_bytes) = share(&mut large, 40);
        assert_eq!((lens(part), cut_bytes), (vec![40], 60));
        let mut all = pieces([10, 20, 30]);
        let (part, cut_bytes) = share(&mut all, 1000);
        assert_eq!((lens(part), cut_bytes), (vec![10, 20, 30], 0));
        let mut many = pieces([1; PIECES_MAX + 1]);
        let (part, cut_bytes) = share(&mut many, 1000);
        assert_eq!((part.len(), cut_bytes), (PIECES_MAX, 0));
    }

    #[test]
    fn an_order_begins_with_what_is_left() {
        let mut begun = pieces([10, 20, 30]);
        begun[0].finish();
        let (part, cut_bytes) = share(&mut begun, 25);
        assert_eq!((lens(part), cut_bytes), (vec![20, 5], 25));
        let mut nothing = pieces([0, 0]);
        assert_eq!(share(&mut nothing, 25).1, 0);
    }
}
