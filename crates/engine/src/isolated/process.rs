//! The engine process: hosts engines for one host, and does nothing else.
//!
//! ```text
//!   run: cage begun (1-3) -> secret memory (4) -> Hello: shared memory, lanes (5) -> cage shut (6-10) -> Ready
//!     control thread   order -> apply -> answer, until the host goes
//!     lane threads     ring.rs: copy the order, check it, transform, answer
//! ```
//!
//! - Nothing secret arrives before `Ready` has been answered.
//! - It ends when its host's end of the socket closes, whoever held it.
//! - What the host writes into shared memory or messages is checked here; the worst that a bad host can do is to encrypt with
//!   keys that it was given anyway.

#[doc(hidden)]
pub mod fuzzing;

use super::proto::{
    self, Answer, Inbox, Order, Secret, VERSION, WireEngine, WireForm, WireKey, WireStep, kind_code,
    with_failure,
};
use super::realtime::{self, LanePriority};
use super::ring::{CHUNK_BYTES, Deed, Head, LANE_BYTES, Lane, PIECES_MAX, Progress, UNDO_BYTES, WirePiece};
use super::sandbox::Report;
use crate::root::RootMaterial;
use crate::sys::{self, Region, View};
use crate::{EngineSpec, Root};
use inlinecrypt_cipher::kdf::key_identifier_raw;
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::engine::{Direction, Engine, KeyLadder, KeyRef, Piece, SlotIndex};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{EphemeralWrappedKey, Key, KeyForm, LongTermWrappedKey, RawKey};
use inlinecrypt_core::memory::Memory;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// How much secret memory a process asks for: a hundred thousand keys, or as much as the system allows to lock.
const SECRET_BYTES: usize = 64 << 20;

/// Stack of the control thread: opening a root with a passphrase needs most.
pub(super) const CONTROL_STACK_BYTES: usize = 512 << 10;
/// Stack of a lane's thread.
pub(super) const LANE_STACK_BYTES: usize = 128 << 10;

/// Most lanes.
pub const LANES_MAX: u32 = 64;

/// Most raw keys in keeping.
const DEPOSITS_MAX: usize = 1 << 16;

/// Whether the process is to be locked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cage {
    /// As it must be.
    Shut,
    /// Not at all: a thread of a test or of an embedder plays the process.
    None,
}

/// Runs this process as an engine process: its host is at the other end of `socket`. Its lanes have `priority`, or a higher one if
/// the host asks for it. Never returns.
///
/// To be called at the very start of a program whose allocator is [`SecretAllocator`](crate::SecretAllocator), by its only
/// thread.
pub fn run(socket: OwnedFd, priority: LanePriority) -> ! {
    let standard_error = std::io::stderr();
    sys::close_all_but(&[socket.as_fd(), standard_error.as_fd()]);
    let mut report = Report::default();
    report.begin();
    match sys::enter_secret_memory(SECRET_BYTES) {
        Ok(memory) => report.note_memory(memory),
        Err(why) => {
            eprintln!("inlinecrypt engine process: no memory for keys: {why}");
            std::process::exit(3);
        }
    }
    // Where the CPU has no AES instructions a library's contexts hold keys: they would be in the C library's heap.
    if !inlinecrypt_cipher::allocate_as_rust_does() {
        eprintln!("inlinecrypt engine process: the library's memory cannot be secret");
        std::process::exit(3);
    }
    // On a stack in secret memory; this first thread's own is the only one that is not.
    let serving = Box::new(move || {
        let status = match serve(socket, Cage::Shut, priority, report) {
            Ok(()) => 0,
            Err(why) => {
                eprintln!("inlinecrypt engine process: {why}");
                1
            }
        };
        std::process::exit(status);
    });
    if let Err(why) = sys::spawn(CONTROL_STACK_BYTES, serving) {
        eprintln!("inlinecrypt engine process: no thread: {why}");
        std::process::exit(3);
    }
    loop {
        std::thread::park();
    }
}

/// Plays an engine process on the calling thread, without a cage, until the host at the other end of `socket` goes. For tests,
/// and for embedders that want the bargain of an engine process without its protection.
///
/// # Errors
///
/// What the socket says.
pub fn serve_uncaged(socket: OwnedFd) -> io::Result<()> {
    serve(socket, Cage::None, LanePriority::Usual, Report::default())
}

fn serve(socket: OwnedFd, cage: Cage, priority: LanePriority, mut report: Report) -> io::Result<()> {
    // Asked now: the cage has no window.
    let pid = std::process::id();
    let mut inbox = Inbox::default();
    let (len, mut descriptors) = inbox.receive(&socket)?;
    if len == 0 {
        return Ok(());
    }
    // A hello of another version is another message but for its beginning.
    if let Some(version) = inbox.hello_version(len).filter(|version| *version != VERSION) {
        let error = Error::new(ErrorKind::Unsupported, Op::Open).detail(format!(
            "the engine process speaks version {VERSION} of its language, and the host version {version}: restart both from \
             one program"
        ));
        return with_failure(&error, |answer| proto::send(socket.as_fd(), &answer, &[]));
    }
    let Order::Hello { version: _, lanes, shared_bytes, generation, require_sandbox, realtime } =
        inbox.parse(len)?
    else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the host did not say hello first"));
    };
    let refuse = |why: String| {
        let error = Error::new(ErrorKind::Unsupported, Op::Open).detail(why);
        with_failure(&error, |answer| proto::send(socket.as_fd(), &answer, &[]))
    };
    let (1, Some(shared), Ok(shared_bytes), 1..=LANES_MAX) =
        (descriptors.len(), descriptors.pop(), usize::try_from(shared_bytes), lanes)
    else {
        return refuse("the host's hello makes no sense".to_owned());
    };
    let floor = lanes as usize * LANE_BYTES;
    if shared_bytes < floor {
        return refuse("the shared memory is too small for its lanes".to_owned());
    }
    let region = match Region::map(shared, shared_bytes) {
        Ok(region) => Arc::new(region),
        Err(why) => return refuse(format!("the shared memory cannot be used: {why}")),
    };
    let wants_realtime = realtime || priority == LanePriority::Realtime;
    if wants_realtime && cage == Cage::None {
        return refuse(
            "real-time priority is for an engine process, and this is a thread of its host".to_owned(),
        );
    }
    // Lanes have what this thread has when it starts them.
    let usual = match wants_realtime.then(|| report.begin_realtime()).transpose() {
        Ok(usual) => usual,
        Err(error) => return with_failure(&error, |answer| proto::send(socket.as_fd(), &answer, &[])),
    };
    let hosted: Arc<OnceLock<Hosted>> = Arc::new(OnceLock::new());
    let mut threads = Threads { region: region.clone(), is_over: Arc::default(), joins: Vec::new(), lanes };
    // A thread that starts makes system calls that the cage forbids.
    let (tell, started) = std::sync::mpsc::channel();
    for index in 0..lanes as usize {
        let (region, hosted, is_over) = (region.clone(), hosted.clone(), threads.is_over.clone());
        let tell = tell.clone();
        let working = move || {
            let _ = tell.send(());
            drop(tell);
            work(&region, index, generation, floor, &hosted, cage, &is_over);
        };
        match cage {
            Cage::Shut => sys::spawn(LANE_STACK_BYTES, Box::new(working))?,
            Cage::None => threads.joins.push(std::thread::Builder::new().spawn(working)?),
        }
    }
    for _ in 0..lanes {
        started.recv().map_err(io::Error::other)?;
    }
    if let Err(error) = usual.map_or(Ok(()), realtime::end) {
        return with_failure(&error, |answer| proto::send(socket.as_fd(), &answer, &[]));
    }
    if cage == Cage::Shut {
        report.lock(pid);
    }
    if require_sandbox && (cage == Cage::None || !report.missing.is_empty()) {
        return refuse(format!("the sandbox is incomplete: {}", report.missing.join("; ")));
    }
    let (steps, missing) = (report.steps.join("\n"), report.missing.join("\n"));
    let ready = Answer::Ready { pid, steps: &steps, missing: &missing };
    proto::send(socket.as_fd(), &ready, &[])?;

    let mut control = Control { hosted, deposits: HashMap::new(), last_ticket: 0, last_handle: 0 };
    loop {
        let (len, descriptors) = match inbox.receive(&socket) {
            Ok((0, _)) => return Ok(()),
            Ok(received) => received,
            Err(why) if why.kind() == io::ErrorKind::InvalidData => {
                let error = Error::new(ErrorKind::Invalid, Op::Open).because(why);
                with_failure(&error, |answer| proto::send(socket.as_fd(), &answer, &[]))?;
                continue;
            }
            Err(why) => return Err(why),
        };
        let send = |answer: Answer<'_>| proto::send(socket.as_fd(), &answer, &[]);
        match inbox.parse::<Order<'_>>(len) {
            Ok(order) => match control.apply(order, descriptors, &send) {
                Ok(sent) => sent?,
                Err(error) => with_failure(&error, send)?,
            },
            Err(why) => {
                let error = Error::new(ErrorKind::Invalid, Op::Open).because(why);
                with_failure(&error, send)?;
            }
        }
    }
}

/// The engines, once they were started: what control and lanes share.
#[derive(Debug)]
struct Hosted {
    engines: Vec<HostedEngine>,
}

#[derive(Debug)]
struct HostedEngine {
    engine: Arc<dyn Engine>,
    /// Data unit size of the key in each keyslot, in bytes; 0 if none is. What lanes cut pieces at.
    units: Box<[AtomicU32]>,
    /// Which key is in each keyslot, for engines that want to know at eviction.
    keys: RwLock<HashMap<u32, Arc<Key>>>,
    /// Keys that a host may name by a handle: in an order to an engine without keyslots, or to program a keyslot.
    remembered: RwLock<HashMap<u32, Arc<Key>>>,
}

impl HostedEngine {
    fn new(engine: Arc<dyn Engine>) -> Self {
        let keyslots = engine.capabilities().keyslots;
        Self {
            engine,
            units: (0..keyslots).map(|_| AtomicU32::new(0)).collect(),
            keys: RwLock::default(),
            remembered: RwLock::default(),
        }
    }

    fn program(&self, slot: u32, key: Arc<Key>) -> Result<(), Error> {
        let place = self.units.get(slot as usize).ok_or_else(|| nonsense("there is no such keyslot"))?;
        place.store(0, Ordering::Release);
        self.engine.program(SlotIndex(slot), &key)?;
        place.store(key.config().data_unit_size().bytes(), Ordering::Release);
        write(&self.keys).insert(slot, key);
        Ok(())
    }

    fn remembered(&self, handle: u32, op: Op) -> Result<Arc<Key>, Error> {
        let keys = self.remembered.read().unwrap_or_else(PoisonError::into_inner);
        let found = keys.get(&handle).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NoKey, op).detail("no such key is remembered"))
    }
}

/// What the control thread knows.
#[derive(Debug)]
struct Control {
    hosted: Arc<OnceLock<Hosted>>,
    deposits: HashMap<u64, RawKey>,
    last_ticket: u64,
    last_handle: u32,
}

type Sent = io::Result<()>;

impl Control {
    /// Does what was ordered and sends the answer.
    fn apply(
        &mut self,
        order: Order<'_>,
        descriptors: Vec<OwnedFd>,
        send: &dyn Fn(Answer<'_>) -> Sent,
    ) -> Result<Sent, Error> {
        match order {
            Order::Hello { .. } => Err(nonsense("hello was said before")),
            Order::Open { spec, fallback, root } => self.open(spec, fallback, root, descriptors, send),
            Order::Deposit(Secret(raw)) => self.deposit(raw, send),
            Order::Program { engine, slot, key } => {
                let hosted = self.engine(engine)?;
                hosted.program(slot, self.key(&key, Op::Program)?)?;
                Ok(send(Answer::Done))
            }
            Order::Evict { engine, slot } => {
                let hosted = self.engine(engine)?;
                let place =
                    hosted.units.get(slot as usize).ok_or_else(|| nonsense("there is no such keyslot"))?;
                place.store(0, Ordering::Release);
                let Some(key) = write(&hosted.keys).remove(&slot) else { return Ok(send(Answer::Done)) };
                hosted.engine.evict(Some(SlotIndex(slot)), &key)?;
                Ok(send(Answer::Done))
            }
            Order::Remember { engine, key } => {
                let hosted = self.engine(engine)?;
                let key = self.key(&key, Op::Program)?;
                let (mode, unit) = (key.config().mode(), key.config().data_unit_size());
                // With keyslots, programming says whether the engine takes it.
                if hosted.units.is_empty() && !hosted.engine.capabilities().units[mode.index()].contains(unit)
                {
                    return Err(Error::new(ErrorKind::Unsupported, Op::Crypt)
                        .detail("the engine does not do this mode with this data unit size"));
                }
                let mut remembered = write(&hosted.remembered);
                if remembered.len() >= DEPOSITS_MAX {
                    return Err(nonsense("too many keys are remembered"));
                }
                // Never one that was another key's: an order may still be on its way.
                let handle = self.last_handle.checked_add(1).ok_or_else(|| nonsense("no handle is left"))?;
                remembered.insert(handle, key);
                drop(remembered);
                self.last_handle = handle;
                Ok(send(Answer::Remembered(handle)))
            }
            Order::Forget { engine, handle } => {
                let hosted = self.engine(engine)?;
                let key = write(&hosted.remembered).remove(&handle);
                if let Some(key) = key.filter(|_| hosted.units.is_empty()) {
                    hosted.engine.evict(None, &key)?;
                }
                Ok(send(Answer::Done))
            }
            Order::Import { engine, raw: Secret(raw) } => {
                let blob = self.ladder(engine, Op::Import)?.import(&RawKey::new(raw))?;
                Ok(send(Answer::Blob(blob.as_bytes())))
            }
            Order::Generate { engine } => {
                let blob = self.ladder(engine, Op::Generate)?.generate()?;
                Ok(send(Answer::Blob(blob.as_bytes())))
            }
            Order::Prepare { engine, blob } => {
                let blob = self.ladder(engine, Op::Prepare)?.prepare(&LongTermWrappedKey::new(blob))?;
                Ok(send(Answer::Blob(blob.as_bytes())))
            }
            Order::Check { engine, blob } => {
                self.ladder(engine, Op::Admit)?.check(&EphemeralWrappedKey::new(blob))?;
                Ok(send(Answer::Done))
            }
            Order::DeriveSecret { engine, blob } => {
                let ladder = self.ladder(engine, Op::DeriveSecret)?;
                let secret = ladder.derive_software_secret(&EphemeralWrappedKey::new(blob))?;
                Ok(send(Answer::Secret(Secret(secret.expose()))))
            }
            Order::Identify { engine, blob } => {
                let form = KeyForm::Wrapped(EphemeralWrappedKey::new(blob));
                Ok(send(Answer::Identifier(self.engine(engine)?.engine.key_identifier(&form)?)))
            }
            Order::Commit { engine, wrapped } => {
                let key_type = if wrapped { KeyType::HardwareWrapped } else { KeyType::Raw };
                let exclusive = self.engine(engine)?.engine.exclusive();
                exclusive.ok_or_else(|| nonsense("the engine is not exclusive"))?.commit(key_type)?;
                Ok(send(Answer::Done))
            }
            Order::WhyStopped { engine } => {
                let why = self.engine(engine)?.engine.stopped();
                let why = why.map(|why| why.chars().take(1000).collect::<String>());
                Ok(send(Answer::Stopped(why.as_deref())))
            }
            Order::Lifecycle { engine, step } => {
                let lifecycle = self.engine(engine)?.engine.lifecycle();
                let lifecycle = lifecycle.ok_or_else(|| nonsense("nothing happens to the engine"))?;
                match step {
                    WireStep::Reset => lifecycle.reset()?,
                    WireStep::Suspend => lifecycle.suspend()?,
                    WireStep::Resume => lifecycle.resume()?,
                }
                Ok(send(Answer::Done))
            }
        }
    }

    fn open(
        &self,
        spec: &str,
        fallback: Option<&str>,
        root: Option<proto::RootParts<'_>>,
        descriptors: Vec<OwnedFd>,
        send: &dyn Fn(Answer<'_>) -> Sent,
    ) -> Result<Sent, Error> {
        if self.hosted.get().is_some() {
            return Err(nonsense("the engines run already"));
        }
        let root = match root {
            Some(parts) => {
                let proto::RootParts { kind, public, secret: Secret(secret) } = parts;
                let (plain, secret) = (public.to_vec(), Zeroizing::new(secret.to_vec()));
                let parts = crate::root::RootParts { kind, plain, secret, descriptors };
                Some(Root::from_material(RootMaterial::from_parts(parts)?)?)
            }
            None => None,
        };
        let spec: EngineSpec = spec.parse()?;
        let mut engines = vec![HostedEngine::new(crate::open(&spec, root.as_ref())?)];
        if let Some(fallback) = fallback {
            engines.push(HostedEngine::new(crate::open(&fallback.parse()?, None)?));
        }
        let hosted = self.hosted.get_or_init(|| Hosted { engines });
        let describe = |index: usize| hosted.engines.get(index).map(|hosted| WireEngine::of(&*hosted.engine));
        Ok(send(Answer::Opened {
            engine: describe(0).expect("the first was started"),
            fallback: describe(1),
            root: root.map(|root| root.id().to_bytes()),
        }))
    }

    fn deposit(&mut self, raw: &[u8], send: &dyn Fn(Answer<'_>) -> Sent) -> Result<Sent, Error> {
        if self.deposits.len() >= DEPOSITS_MAX {
            return Err(
                Error::new(ErrorKind::OutOfMemory, Op::Open).detail("too many raw keys are in keeping")
            );
        }
        self.last_ticket += 1;
        let ticket = self.last_ticket;
        self.deposits.insert(ticket, RawKey::new(raw));
        let (first, second) = raw.split_at(raw.len() / 2);
        Ok(send(Answer::Deposited {
            ticket,
            has_equal_halves: first.ct_eq(second).into(),
            identifier: key_identifier_raw(raw),
        }))
    }

    fn engine(&self, index: u8) -> Result<&HostedEngine, Error> {
        let hosted = self.hosted.get().ok_or_else(|| nonsense("no engine was started"))?;
        hosted.engines.get(usize::from(index)).ok_or_else(|| nonsense("there is no such engine"))
    }

    fn ladder(&self, engine: u8, op: Op) -> Result<&dyn KeyLadder, Error> {
        self.engine(engine)?.engine.key_ladder().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, op).detail("the engine does not take hardware-wrapped keys")
        })
    }

    fn key(&self, key: &WireKey<'_>, op: Op) -> Result<Arc<Key>, Error> {
        let (mode, unit, dun_bytes, hardware) =
            key.config().ok_or_else(|| nonsense("a key's numbers mean nothing"))?;
        let form = match key.form {
            WireForm::Ticket(ticket) => {
                let raw = self.deposits.get(&ticket).ok_or_else(|| {
                    Error::new(ErrorKind::KeyRejected, op)
                        .detail("the raw key was deposited with another start")
                })?;
                KeyForm::Raw(RawKey::new(raw.expose()))
            }
            WireForm::Raw(Secret(raw)) => KeyForm::Raw(RawKey::new(raw)),
            WireForm::Wrapped(blob) => KeyForm::Wrapped(EphemeralWrappedKey::new(blob)),
        };
        Key::new(mode, unit, dun_bytes, form, hardware)
            .map_err(|why| Error::new(ErrorKind::Invalid, op).because(why))
    }
}

fn nonsense(why: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, Op::Open).detail(why)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the lanes' threads where they do not end with the process.
struct Threads {
    region: Arc<Region>,
    is_over: Arc<AtomicBool>,
    joins: Vec<std::thread::JoinHandle<()>>,
    lanes: u32,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        (0..self.lanes as usize).for_each(|index| Lane::new(&self.region, index).stop());
        self.joins.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// What a lane's thread does until there are no orders any more.
fn work(
    region: &Region,
    index: usize,
    generation: u64,
    floor: usize,
    hosted: &OnceLock<Hosted>,
    cage: Cage,
    is_over: &AtomicBool,
) {
    let lane = Lane::new(region, index);
    let mut pieces = Vec::with_capacity(PIECES_MAX);
    let mut cpu = None;
    while let Some(head) = lane.next_order(generation, is_over, &mut pieces) {
        if cage == Cage::Shut && cpu != Some(head.cpu) {
            cpu = Some(head.cpu);
            follow_to(head.cpu);
        }
        attend(region, &lane, floor, hosted.get(), &head, &pieces);
    }
}

/// Does one order and answers it.
fn attend(
    region: &Region,
    lane: &Lane<'_>,
    floor: usize,
    hosted: Option<&Hosted>,
    head: &Head,
    pieces: &[WirePiece],
) {
    match hosted {
        Some(hosted) => match obey(region, lane, floor, hosted, head, pieces) {
            Ok(()) => lane.answer(0, ""),
            Err(error) => {
                let code = 1 + u32::from(kind_code(error.kind()));
                lane.answer(code, &proto::why(&error));
            }
        },
        None => lane.answer(1 + u32::from(kind_code(ErrorKind::NoKey)), "no engine was started"),
    }
}

/// Goes to the CPU of the thread that waits for the answer. If there is no such CPU, stays.
fn follow_to(cpu: u32) {
    let cpu = cpu as usize;
    if cpu < rustix::thread::CpuSet::MAX_CPU {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

fn refused(why: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, Op::Crypt).detail(why)
}

fn obey(
    region: &Region,
    lane: &Lane<'_>,
    floor: usize,
    hosted: &Hosted,
    head: &Head,
    pieces: &[WirePiece],
) -> Result<(), Error> {
    let hosted =
        hosted.engines.get(usize::from(head.engine)).ok_or_else(|| refused("there is no such engine"))?;
    let direction = match head.deed {
        Deed::Encrypt => Direction::Encrypt,
        Deed::Decrypt => Direction::Decrypt,
        Deed::Program { slot } => return hosted.program(slot, hosted.remembered(head.key, Op::Program)?),
    };
    transform(region, lane, floor, hosted, head, direction, pieces)
}

fn transform(
    region: &Region,
    lane: &Lane<'_>,
    floor: usize,
    hosted: &HostedEngine,
    head: &Head,
    direction: Direction,
    pieces: &[WirePiece],
) -> Result<(), Error> {
    let encrypts = direction == Direction::Encrypt;
    let remembered;
    let (key, unit_bytes) = if head.is_slot {
        let unit = hosted.units.get(head.key as usize).ok_or_else(|| refused("there is no such keyslot"))?;
        (KeyRef::Slot(SlotIndex(head.key)), unit.load(Ordering::Acquire))
    } else {
        if !hosted.units.is_empty() {
            return Err(refused("the engine has keyslots, it takes no key with a request"));
        }
        remembered = hosted.remembered(head.key, Op::Crypt)?;
        (KeyRef::Inline(&remembered), remembered.config().data_unit_size().bytes())
    };
    if unit_bytes == 0 {
        return Err(Error::new(ErrorKind::NoKey, Op::Crypt).detail("the keyslot is empty"));
    }
    let unit_bytes = unit_bytes as usize;
    if unit_bytes > UNDO_BYTES {
        return Err(refused("data units are too large"));
    }
    // What was to be decrypted can be had again, what was to be encrypted cannot: only that is kept.
    let step = if encrypts { CHUNK_BYTES.max(unit_bytes) } else { usize::MAX };
    for (index, piece) in pieces.iter().enumerate() {
        let view = View::new(region, floor, piece.offset, piece.len);
        let mut view = view.ok_or_else(|| refused("a piece lies outside the shared memory"))?;
        let len = view.bytes().len();
        if !len.is_multiple_of(unit_bytes) || len > u32::MAX as usize {
            return Err(Error::new(ErrorKind::Misaligned, Op::Crypt)
                .detail("a piece is not a whole number of data units"));
        }
        let index = u8::try_from(index).expect("at most PIECES_MAX");
        let mut done = 0;
        while done < len {
            let chunk = done..len.min(done.saturating_add(step));
            let bytes = u32::try_from(done).expect("checked above");
            if encrypts {
                let undo_bytes = u32::try_from(chunk.len()).expect("at most UNDO_BYTES");
                lane.begin_chunk(Progress { pieces: index, bytes, undo_bytes }, &view.bytes()[chunk.clone()]);
            }
            let first = piece.first.wrapping_add((done / unit_bytes) as u64);
            let mut work = [Piece { first, range: chunk.clone() }];
            let result = hosted.engine.crypt(key, direction, &mut view, &mut work);
            if let Err(error) = result {
                // Untouched if the key was not there; meaningless else, and nobody looks.
                lane.note(Progress { pieces: index, bytes, undo_bytes: 0 });
                return Err(error);
            }
            done = chunk.end;
            lane.note(Progress {
                pieces: index,
                bytes: u32::try_from(done).expect("checked above"),
                undo_bytes: 0,
            });
        }
    }
    Ok(())
}

impl Memory for View<'_> {
    fn bytes(&self) -> &[u8] {
        View::bytes(self)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        View::bytes_mut(self)
    }

    fn mapped_at(&self) -> u64 {
        0
    }
}
