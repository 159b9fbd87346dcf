//! `serve`: from a plan to a running server, and to its orderly end.
//!
//! ```text
//!   create (if asked) -> plan -> keys admitted -> backings locked -> sockets -> clients -> READY=1
//!   --take-over: sockets and locked backings come from the running server, which ends (`take_over.rs`)
//!   SIGTERM or SIGINT -> STOPPING=1 -> no more clients -> requests answered -> flushed -> sockets removed -> exit 0
//! ```
//!
//! Nobody can connect before everything has succeeded, so a server that fails to start has disturbed nobody.

use crate::ask::Asker;
use crate::cli::{FallbackArg, LayoutArgs, Serve, TlsArg};
use crate::control::{
    self, Answers, ConnectionsReport, ControlServer, EngineReport, KeyslotsReport, ProcessReport,
    ReencryptAction, ReencryptReport, ReencryptRequest, ServerReport, SlotReport, VolumeReport,
};
use crate::create::NewVolume;
use crate::files::{self, quoted};
use crate::host::{self, Host, HostEngine, Ready};
use crate::identifier::Identifier;
use crate::keyfile::KeySource;
use crate::places;
use crate::plain::{self, ServedPlain};
use crate::plan::{self, ControlPlan, ListenPlan, Plan, Settings};
use crate::reencrypt::{self, Backings, Job, LuksTerms, Old, Terms, Wish};
use crate::report::{Code, Failure, Failures, note, print};
use crate::size::Size;
use crate::take_over::{self, Message, Predecessor, VolumeFacts};
use crate::watch::Watched;
use inlinecrypt_core::admission::{Mode, ServedBy};
use inlinecrypt_core::backing::{Access, Backing};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::disk::Disk;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::LiveVolume;
use inlinecrypt_core::volume::{Discard, Volume};
use inlinecrypt_engine::{EngineSpec, WrappingKeyId};
use inlinecrypt_io::backing::{Caching, DiscardPolicy, FileBacking, OpenOptions, Window};
use inlinecrypt_io::export::ExportSpec;
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions, TlsMode};
use inlinecrypt_io::listen::{self, Claim, Listen, ListenOptions, Listener, NamedAt, Peer, Stream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::net::ToSocketAddrs as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, TryLockError};

pub(super) fn run(mut args: Serve) -> Result<(), Failures> {
    // First, so that a signal at any moment is an orderly stop.
    let mut signals = catch_signals()?;
    // Before any thread is started.
    let activated = Listener::activated().map_err(|error| Failure::of("cannot serve", &error))?;
    raise_descriptor_limit();
    refuse_with_config(&args)?;
    plain::refuse_with_plain(&args)?;
    if let Some(key) = &mut args.key {
        key.take_stdin()?;
    }
    let mut asker = Asker::new(&args.engine.passphrase).with_key_file(args.key_file.clone());
    if args.create.is_some() {
        if activated.is_empty() || !args.nbd.is_empty() {
            check_places(&args)?;
        }
        create(&args, &mut asker)?;
    }
    let mut plan = Plan::for_serve(&args)
        .or_else(|failures| Failures::check(failures).map(|()| unreachable!("failed")))?;
    let tls = host::tls(&plan.listen.tls)?;
    let (host, mut failures) = Host::prepare(&plan, &mut asker);
    // Wipes what was typed or given.
    drop(asker);
    args.key = None;
    plan.volumes.clear();
    if activated.is_empty() || plan.listen.asked_for {
        failures.extend(plan.listen.places.iter().filter_map(plan::check_place));
    }
    Failures::check(failures)?;
    host.tell_notes();
    host.tell_keys_given_once(&plan.engines);

    let options = ServerOptions {
        workers: plan.server.workers,
        tls,
        connections_max: plan.server.connections_max.unwrap_or(ServerOptions::default().connections_max),
        zero_copy: plan.server.zero_copy,
        ..ServerOptions::default()
    };
    let takes_plain = !matches!(options.tls, TlsMode::Required(_));
    let mut predecessor = args.take_over.as_deref().map(Predecessor::ask).transpose()?;
    let running = Running::open(host, options, predecessor.as_mut())?;
    let (adopted, claims) = match &mut predecessor {
        Some(predecessor) => adopt_doors(std::mem::take(&mut predecessor.doors))?,
        None => <(Vec<_>, Vec<_>)>::default(),
    };
    let listeners = listen(&plan.listen, activated, adopted)?;
    let uris = uris(&listeners, &plan.listen, &running);
    let doors = listeners.iter().map(Listener::hand_over).collect::<io::Result<_>>().map_err(|error| {
        Failure::of_io("cannot keep a listener", &error, "Raise the limit on descriptors (ulimit -n).")
    })?;
    let running = Arc::new(Running { uris, doors, signals: Some(signals.handle()), ..running });
    let inherited = predecessor.as_mut().and_then(|old| old.inherited_control(&plan.server.control));
    let is_held = predecessor.is_some();
    if is_held {
        // Nobody is accepted or answered before the other server has let go.
        running.server.hold(take_over::REST_TIME_MAX).map_err(|error| {
            Failure::of_io("cannot wait for the other server", &error, "Please report this.")
        })?;
    }
    // Before the first client is served, so that who has been served finds it.
    let mut control = match inherited {
        Some(_) => None,
        None => start_control(&plan.server.control, &running)?,
    };
    for listener in listeners {
        running.server.listen(listener).map_err(|error| {
            Failure::of_io("cannot start a listener", &error, "Raise the limit on threads (ulimit -u).")
        })?;
    }
    if let Some(old) = predecessor {
        let adopt = |connection| running.server.adopt(connection);
        let count = old.take(takes_plain, inherited.is_some(), adopt)?;
        running.claim_all(&claims);
        if let Err(error) = listen::notify_taken_over() {
            note(error.chain());
        }
        old.tell_serving();
        if let Some((listener, claim)) = inherited {
            claim.claim();
            control = running.answer_at(listener).map_err(|error| note(error.chain())).ok();
        }
        running.server.resume();
        tracing::info!(connections = count, "took over from another server");
    }

    // A reader that has gone is no reason to stop.
    let _ = print(&running.greeting());
    if let Err(error) = listen::notify_ready() {
        note(error.chain());
    }
    if !args.pause_reencryption {
        running.resume_reencryptions();
    }
    signals.forever().next();

    // Whoever is taking over gets to an end first, one way or the other.
    let _turn = running.turn.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(successor) = running.successor.get() {
        let closed = running.server.close_held();
        note(format_args!(
            "handed over to {successor}; {closed} connections with TLS were closed, to be made again"
        ));
        if !successor.has_control {
            drop(control);
        }
        // Without a word to the sockets, names and locks, which are that server's.
        std::process::exit(0);
    }

    tracing::info!("stopping");
    if let Err(error) = listen::notify_stopping() {
        note(error.chain());
    }
    running.stop_reencryptions();
    let stopped = running.server.stop(plan.server.stop_time_max);
    drop(control);
    match stopped {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::of("stopped, but not all data could be made stable", &error).into()),
    }
}

/// The first signal comes out of the iterator; the second ends the process at once.
pub(super) fn catch_signals() -> Result<Signals, Failure> {
    let caught = || -> std::io::Result<Signals> {
        let stopping = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal finds the flag down, and raises it. The code is a shell's for the signal.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stopping.clone())?;
            signal_hook::flag::register(signal, stopping.clone())?;
        }
        Signals::new([SIGTERM, SIGINT])
    };
    caught().map_err(|error| Failure::of_io("cannot catch signals", &error, "Please report this."))
}

/// Every client and volume takes a descriptor, and the usual soft limit is for programs that call `select`.
pub(super) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    // If the system refuses, fewer clients fit.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// What a config says for each volume cannot be said for all at once.
fn refuse_with_config(args: &Serve) -> Result<(), Failure> {
    if args.config.is_none() {
        return Ok(());
    }
    let layout = &args.layout;
    let given = [
        ("VOLUME", !args.volumes.is_empty()),
        ("--key", args.key.is_some()),
        ("--name", args.name.is_some()),
        ("--engine", args.engine.engine.is_some()),
        ("--root", args.engine.root.is_some()),
        ("--mode", layout.mode.is_some()),
        ("--data-unit", layout.data_unit.is_some()),
        ("--block", layout.block.is_some()),
        ("--iv-offset", layout.iv_offset.is_some()),
        ("--iv", layout.iv.is_some()),
        ("--offset", layout.offset.is_some()),
        ("--fallback", args.fallback.is_some()),
        ("--discard", args.discard.is_some()),
        ("--plain", args.plain),
        ("--read-only", args.read_only),
        ("--direct", args.direct),
        ("--header", args.header.is_some()),
        ("--recover", args.recover),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((what, _)) => Err(Failure::new(
            Code::Wrong,
            format!("{what} together with --config: a config says for each volume how it is served"),
            "Put it into the config, or leave --config out.",
        )),
    }
}

/// What would keep a new volume from being served, told before it is made.
fn check_places(args: &Serve) -> Result<(), Failures> {
    let usual = args.volumes.first().map(|volume| Listen::Unix(places::beside(volume, ".sock")));
    let places = if args.nbd.is_empty() { usual.as_slice() } else { &args.nbd[..] };
    let mut failures: Vec<Failure> = places.iter().filter_map(plan::check_place).collect();
    failures.extend(args.name.as_deref().and_then(|name| plan::check_name(name, "--name")));
    Failures::check(failures)
}

fn create(args: &Serve, asker: &mut Asker) -> Result<(), Failures> {
    let (Some(size), [path]) = (args.create, &args.volumes[..]) else {
        return Err(Failure::new(
            Code::Wrong,
            format!("--create makes one volume, and {} are named", args.volumes.len()),
            "Name the file to make: inlinecrypt serve --create 1GiB demo.img",
        )
        .into());
    };
    NewVolume {
        path,
        size,
        settings: Settings { key: args.key.clone(), ..Settings::with_layout(&args.layout) },
        fallback: args.fallback.unwrap_or(FallbackArg::Off),
        engine: plan::engine_from(&args.engine).map(|mut engine| {
            args.isolation.apply(&mut engine);
            engine.realtime = args.engine_realtime;
            plan::check_realtime(&engine).map(|()| engine)
        })??,
        name_engine: args.engine.engine.is_some() || args.engine.root.is_some(),
    }
    .make(asker)?;
    Ok(())
}

fn listen(
    plan: &ListenPlan,
    activated: Vec<(String, Listener)>,
    adopted: Vec<Listener>,
) -> Result<Vec<Listener>, Failure> {
    let mut listeners: Vec<Listener> = activated.into_iter().map(|(_, listener)| listener).collect();
    let asked_for = listeners.is_empty() || plan.asked_for;
    let inherited: Vec<Listen> = adopted.iter().map(Listener::place).collect();
    listeners.extend(adopted);
    if asked_for {
        for place in plan.places.iter().filter(|place| !inherited.iter().any(|other| is_same(place, other))) {
            let listener = Listener::bind(place, ListenOptions::default()).map_err(|error| {
                let failure = Failure::of_file("cannot serve", &error);
                if failure.code == Code::Busy && matches!(place, Listen::Tcp { .. }) {
                    failure.advise("Choose another port with --nbd, or stop who has it (ss -ltnp shows it).")
                } else {
                    failure
                }
            })?;
            listeners.push(listener);
        }
    }
    Ok(listeners)
}

/// Whether a server that listens at `actual`, which has a number for an address, does as `asked`.
fn is_same(asked: &Listen, actual: &Listen) -> bool {
    match (asked, actual) {
        (Listen::Unix(asked), Listen::Unix(actual)) => {
            std::path::absolute(asked).ok() == std::path::absolute(actual).ok()
        }
        (Listen::Tcp { host, port }, Listen::Tcp { host: actual_host, port: actual_port }) => {
            let mut addresses = (host.as_str(), *port).to_socket_addrs().into_iter().flatten();
            (*port == 0 || port == actual_port)
                && addresses.any(|address| address.ip().to_string() == *actual_host)
        }
        _ => false,
    }
}

type Door = (OwnedFd, Option<NamedAt>);

/// Makes listeners of another server's sockets. Their names are not ours before they are claimed.
fn adopt_doors(doors: Vec<Door>) -> Result<(Vec<Listener>, Vec<Claim>), Failure> {
    let adopted = doors.into_iter().map(|(socket, named)| Listener::adopt(socket, named));
    let adopted: Result<Vec<_>, _> = adopted.collect();
    Ok(adopted.map_err(|error| Failure::of_file("cannot serve", &error))?.into_iter().unzip())
}

fn start_control(plan: &ControlPlan, running: &Arc<Running>) -> Result<Option<ControlServer>, Failure> {
    let start = |path: &Path| ControlServer::bind(path).and_then(|listener| running.answer_at(listener));
    match plan {
        ControlPlan::None => Ok(None),
        ControlPlan::At(path) => {
            start(path).map(Some).map_err(|error| Failure::of_file("cannot make the control socket", &error))
        }
        // Nobody asked for it, so it may fail.
        ControlPlan::Default => {
            let made = default_control_path().and_then(|path| {
                start(&path).map_err(|error| Failure::of_file("cannot make the control socket", &error))
            });
            match made {
                Ok(control) => Ok(Some(control)),
                Err(failure) => {
                    note(format_args!("{}; `inlinecrypt status` will not find this server", failure.what));
                    Ok(None)
                }
            }
        }
    }
}

fn default_control_path() -> Result<PathBuf, Failure> {
    let directories = places::control_directories();
    let mut failure = None;
    for directory in &directories {
        match files::make_private_directory(directory) {
            Ok(()) => {
                control::remove_stale(directory);
                return Ok(directory.join(format!("{}.sock", std::process::id())));
            }
            Err(why) => failure = Some(why),
        }
    }
    Err(failure.unwrap_or_else(|| {
        Failure::new(Code::File, "no place for the control socket", "Name one with --control.")
    }))
}

/// A volume that is served.
#[derive(Debug)]
struct Served {
    volume: Arc<LiveVolume>,
    backing: Arc<Watched>,
    /// The part of that which is the volume's.
    data: Arc<dyn Backing>,
    /// What is behind it.
    file: Arc<FileBacking>,
    name: String,
    path: PathBuf,
    engine: usize,
    /// Where it begins in its file.
    offset_bytes: u64,
    terms: Terms,
    /// Its re-encryption, the last one if there were several. Held while one begins.
    job: Mutex<Option<Job>>,
    /// Whether one begins, which may take long: nobody who only looks waits for that.
    is_beginning: AtomicBool,
}

/// A server at work.
#[derive(Debug)]
struct Running {
    server: NbdServer,
    volumes: Vec<Served>,
    /// Exported behind the others.
    plain: Vec<ServedPlain>,
    engines: Vec<EngineFacts>,
    /// Public names of the keys that may be in keyslots.
    identifiers: RwLock<HashMap<KeyId, Identifier>>,
    uris: Vec<String>,
    started_at: u64,
    /// Its listening sockets, to be handed over.
    doors: Vec<Door>,
    control_door: OnceLock<Door>,
    /// Wakes the thread that waits for signals.
    signals: Option<Handle>,
    /// Held while handing over, and while stopping.
    turn: Mutex<()>,
    successor: OnceLock<Successor>,
}

/// The server to which this one has handed over.
#[derive(Debug)]
struct Successor {
    peer: Peer,
    /// It also has the control socket.
    has_control: bool,
}

impl std::fmt::Display for Successor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.peer.fmt(f)
    }
}

/// An engine or the fallback, as `status` shows it.
#[derive(Debug)]
struct EngineFacts {
    name: String,
    spec: Option<EngineSpec>,
    root: Option<WrappingKeyId>,
    profile: Arc<CryptoProfile>,
}

impl Running {
    /// Locks the backings and makes volumes of them.
    fn open(
        host: Host,
        options: ServerOptions,
        mut predecessor: Option<&mut Predecessor>,
    ) -> Result<Self, Failures> {
        let Host { engines, volumes: ready, plain: ready_plain } = host;
        let mut facts = Vec::new();
        let mut fallbacks = Vec::new();
        for HostEngine { name, spec, root, profile, fallback } in engines.into_iter().flatten() {
            fallbacks.extend(fallback.map(|profile| EngineFacts {
                name: format!("fallback of {name}"),
                spec: None,
                root: None,
                profile,
            }));
            facts.push(EngineFacts { name, spec: Some(spec), root, profile });
        }
        // Behind the others: volumes name engines by their place.
        facts.append(&mut fallbacks);
        let mut volumes = Vec::new();
        let mut failures = Vec::new();
        let mut identifiers = HashMap::new();
        for ready in ready {
            identifiers.insert(ready.admission.key().id(), ready.identifier);
            identifiers.extend(ready.next.as_ref().map(|next| (next.admission.key().id(), next.identifier)));
            let file = predecessor.as_mut().and_then(|old| old.file(&ready.plan.name));
            match Served::open(ready, file) {
                Ok(served) => volumes.push(served),
                Err(failure) => failures.push(failure),
            }
        }
        let mut plain = Vec::new();
        let pool = plain::pool();
        for ready in ready_plain {
            let file = predecessor.as_mut().and_then(|old| old.file(&ready.plan.name));
            match ServedPlain::open(ready, file, pool.clone()) {
                Ok(served) => plain.push(served),
                Err(failure) => failures.push(failure),
            }
        }
        Failures::check(failures)?;
        let identifiers = RwLock::new(identifiers);
        if let Some(old) = predecessor {
            let facts = volumes.iter().map(|served| served.facts(&identifiers));
            let facts = facts.chain(plain.iter().map(ServedPlain::facts));
            old.check(&facts.collect::<Vec<_>>())?;
        }
        let export = |name: &str, disk: Arc<dyn Disk>| ExportSpec {
            name: name.to_owned(),
            description: String::new(),
            disk,
        };
        let encrypted = volumes.iter().map(|served| export(&served.name, served.volume.clone()));
        let exports = encrypted.chain(plain.iter().map(|served| export(&served.name, served.volume.clone())));
        let server = NbdServer::new(exports, options).map_err(|error| Failure::of("cannot serve", &error))?;
        let started_at = host::seconds_now();
        Ok(Self {
            server,
            volumes,
            plain,
            engines: facts,
            identifiers,
            uris: Vec::new(),
            started_at,
            doors: Vec::new(),
            control_door: OnceLock::new(),
            signals: None,
            turn: Mutex::new(()),
            successor: OnceLock::new(),
        })
    }

    /// Lets the re-encryptions go on that were under way when the volumes were last served.
    fn resume_reencryptions(&self) {
        for served in &self.volumes {
            if let Some(job) = &*served.job() {
                job.resume(None);
            }
        }
    }

    /// Lets them end after the zones at hand.
    fn stop_reencryptions(&self) {
        // One that is beginning derives keys, for minutes perhaps. It ends with the process: the header is the old one or the new.
        for served in self.volumes.iter().filter(|served| !served.is_beginning()) {
            if let Some(job) = &*served.job() {
                job.stop();
            }
        }
    }

    /// The engine that serves a key of a volume: mostly the one that the volume was planned for.
    fn engine_of(&self, served: &Served, profile: &Arc<CryptoProfile>) -> &EngineFacts {
        let engines = self.engines.iter().filter(|engine| engine.spec.is_some());
        let mut its = engines.filter(|engine| Arc::ptr_eq(&engine.profile, profile));
        its.next().unwrap_or(&self.engines[served.engine])
    }

    fn begin_reencryption(&self, served: &Served, wish: &Wish) -> Result<Job, Failure> {
        let current = served.volume.current();
        let identifiers = self.identifiers.read().unwrap_or_else(PoisonError::into_inner);
        let identifier = identifiers.get(&current.admission().key().id());
        let identifier = *identifier.expect("entered when its key was admitted");
        drop(identifiers);
        let profile = &self.engine_of(served, current.admission().profile()).profile;
        let old = Old::Live(served.volume.clone());
        let backings = Backings { whole: served.backing.clone(), data: served.data.clone() };
        let (job, key) =
            reencrypt::begin(old, &served.path, identifier, backings, &served.terms, wish, profile)?;
        self.identifiers.write().unwrap_or_else(PoisonError::into_inner).insert(key, job.identifier);
        job.resume(None);
        Ok(job)
    }

    /// Locks and names that were another server's are ours.
    fn claim_all(&self, claims: &[Claim]) {
        claims.iter().for_each(Claim::claim);
        self.volumes.iter().for_each(|served| served.file.claim());
        self.plain.iter().for_each(|served| served.file.claim());
    }

    /// Answers `status` and its like at `listener`.
    fn answer_at(self: &Arc<Self>, listener: Listener) -> Result<ControlServer, Error> {
        if let Ok(door) = listener.hand_over() {
            let _ = self.control_door.set(door);
        }
        ControlServer::start(listener, self.clone())
    }

    /// Why data may be lost, if it may: a server that does not know it must not go on.
    fn lost(&self) -> Option<String> {
        let encrypted = self.volumes.iter().map(|served| (&served.name, &served.backing));
        let mut all = encrypted.chain(self.plain.iter().map(|served| (&served.name, &served.backing)));
        let (name, _) = all.find(|(_, backing)| backing.lost().is_some())?;
        Some(format!("{name:?} may have lost data, which only a new start takes note of"))
    }

    /// Offers everything, and lets go once the other server has it: then there is a successor. Else this one goes on, and the
    /// other has been told why, or has gone.
    fn hand_over_to(&self, stream: &Stream, peer: Peer) -> io::Result<()> {
        let socket = stream.as_fd();
        let refuse = |why: String| {
            tracing::warn!(%peer, "not handed over: {why}");
            take_over::send(socket, &Message::Refused { why }, None)
        };
        if !matches!(peer, Peer::Unix { uid, .. } if uid == rustix::process::geteuid().as_raw()) {
            return refuse("it is another user's".to_owned());
        }
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return refuse("it is stopping, or handing over already".to_owned());
            }
        };
        if self.successor.get().is_some() {
            return refuse("it has handed over already".to_owned());
        }
        if let Some(why) = self.lost() {
            return refuse(why);
        }
        if let Some(served) = self.volumes.iter().find(|served| served.is_beginning()) {
            return refuse(format!("the re-encryption of {:?} is about to begin", served.name));
        }
        // None begins until this is over.
        let jobs: Vec<_> = self.volumes.iter().map(Served::job).collect();
        let mut under_way = jobs.iter().zip(&self.volumes).filter(|(job, _)| is_under_way(job.as_ref()));
        if let Some((_, served)) = under_way.next() {
            return refuse(format!(
                "{:?} is being re-encrypted: wait until it is done, or stop this server and start the new one",
                served.name
            ));
        }
        for served in &self.volumes {
            let file = served.file.hand_over()?;
            take_over::send(socket, &Message::Volume(served.facts(&self.identifiers)), Some(file.as_fd()))?;
        }
        for served in &self.plain {
            let file = served.file.hand_over()?;
            take_over::send(socket, &Message::Volume(served.facts()), Some(file.as_fd()))?;
        }
        for (door, named) in &self.doors {
            take_over::send(socket, &Message::Door(named.clone().into()), Some(door.as_fd()))?;
        }
        if let Some((door, named)) = self.control_door.get() {
            take_over::send(socket, &Message::Control(named.clone().into()), Some(door.as_fd()))?;
        }
        take_over::send(socket, &Message::Offered { version: take_over::VERSION }, None)?;
        let (Message::Prepared { takes_plain, takes_control }, _) =
            take_over::expect(socket, Some(take_over::PREPARE_TIME_MAX))?
        else {
            return refuse("it was not told that the other is prepared".to_owned());
        };

        let began = std::time::Instant::now();
        let held = match self.server.hold(take_over::REST_TIME_MAX) {
            Ok(held) => held,
            Err(error) => return refuse(format!("its connections do not come to rest: {error}")),
        };
        let resuming = Resuming(&self.server);
        if let Some(why) = self.lost() {
            return refuse(why);
        }
        if !takes_plain && !held.connections.is_empty() {
            return refuse("it has connections without TLS, which the new one would not serve".to_owned());
        }
        let count = held.connections.len();
        for connection in held.connections {
            let socket_of = connection.socket;
            let message = Message::Connection {
                export: connection.export,
                structured: connection.structured,
                allocation: connection.allocation,
                unread: connection.unread,
            };
            take_over::send(socket, &message, Some(socket_of.as_fd()))?;
        }
        take_over::send(socket, &Message::All, None)?;
        let (Message::Taken, _) = take_over::expect(socket, Some(take_over::TAKE_TIME_MAX))? else {
            return refuse("it was not told that the other has everything".to_owned());
        };
        take_over::send(socket, &Message::Go, None)?;
        // From here on the other server may serve, for as long as it lives.
        match take_over::expect(socket, None) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                return Err(error);
            }
            _serves => std::mem::forget(resuming),
        }
        // Before the turn ends: who waits for it must not stop what is the other's.
        let _ = self.successor.set(Successor { peer, has_control: takes_control });
        tracing::info!(
            %peer,
            connections = count,
            with_tls = held.stay,
            cut_off = held.cut_off,
            pause_us = began.elapsed().as_micros(),
            "handed over"
        );
        if held.cut_off > 0 {
            tracing::warn!(
                cut_off = held.cut_off,
                "connections were cut off in mid-request or mid-handshake"
            );
        }
        Ok(())
    }

    /// What a person reads when the server is ready: what, where, and the lines to try next.
    fn greeting(&self) -> String {
        let mut text = String::new();
        for Served { volume, name, path, .. } in &self.volumes {
            let current = volume.current();
            let layout = current.layout();
            let _ = writeln!(
                text,
                "serving {} as {name:?}: {}, {}, data unit {}",
                crate::report::printable(&path.display().to_string()),
                Size(layout.size_bytes()),
                layout.mode(),
                layout.data_unit_size(),
            );
            if let Some((new, done)) = volume.becoming() {
                let _ = writeln!(
                    text,
                    "  being re-encrypted: {} done, to {}, data unit {}",
                    Size(done),
                    new.layout().mode(),
                    new.layout().data_unit_size()
                );
            }
        }
        for served in &self.plain {
            text.push_str(&served.greeting());
        }
        for uri in &self.uris {
            let _ = writeln!(text, "  {uri}");
        }
        let encrypted = self.volumes.iter().map(|served| served.volume.geometry());
        let mut all = encrypted.chain(self.plain.iter().map(|served| served.volume.geometry()));
        if let (Some(uri), Some(first)) = (self.uris.first(), all.next()) {
            let uri = quoted(uri);
            let copy = match first.access {
                Access::ReadOnly => format!("nbdcopy {uri} FILE"),
                Access::ReadWrite => format!("nbdcopy FILE {uri}"),
            };
            let _ = write!(text, "try next\n  nbdinfo {uri}\n  {copy}\n");
        }
        text
    }

    fn report_all(&self) -> ServerReport {
        let status = self.server.status();
        let volumes = self.volumes.iter().zip(&status.exports);
        let plain = self.plain.iter().zip(&status.exports[self.volumes.len()..]);
        ServerReport {
            version: control::VERSION,
            program_version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            started_at: self.started_at,
            stopping: status.stopping,
            uris: self.uris.clone(),
            connections: ConnectionsReport {
                now: status.connections_now,
                refused: status.connections_refused,
                handshakes_failed: status.handshakes_failed,
            },
            volumes: volumes
                .map(|(served, export)| {
                    let current = served.volume.current();
                    let (layout, admission) = (current.layout(), current.admission());
                    let becoming = served.volume.becoming();
                    let troubles =
                        [admission.trouble(), becoming.and_then(|(new, _)| new.admission().trouble())];
                    let lost = served.backing.lost().map(|why| ("data_lost", why.to_owned()));
                    let trouble = lost.or_else(|| Some(("no_key", troubles.into_iter().flatten().next()?)));
                    VolumeReport {
                        name: served.name.clone(),
                        path: served.path.display().to_string(),
                        size_bytes: layout.size_bytes(),
                        plain: false,
                        mode: layout.mode().info().name,
                        data_unit_bytes: layout.data_unit_size().bytes(),
                        block_bytes: layout.logical_block_bytes(),
                        iv_offset_sectors: layout.iv_offset_sectors(),
                        iv: layout.iv().name(),
                        offset_bytes: served.offset_bytes,
                        read_only: export.read_only,
                        key_type: match admission.key().config().key_type() {
                            KeyType::Raw => "raw",
                            KeyType::HardwareWrapped => "hardware-wrapped",
                        },
                        key_id: served.identifier(&self.identifiers),
                        engine: self.engine_of(served, admission.profile()).name.clone(),
                        served_by: match admission.served_by() {
                            ServedBy::Engine => "engine",
                            ServedBy::Fallback => "fallback",
                        },
                        state: trouble.as_ref().map_or("ok", |(state, _)| state),
                        reason: trouble.map(|(_, why)| why),
                        backing_failures: served.backing.failures(),
                        reencrypt: served.report_job(),
                        counters: export.counters,
                    }
                })
                .chain(plain.map(|(served, export)| served.report(export)))
                .collect(),
            engines: self.engines.iter().map(|engine| self.report_engine(engine)).collect(),
        }
    }

    fn report_engine(&self, engine: &EngineFacts) -> EngineReport {
        let EngineFacts { name, spec, root, profile } = engine;
        let status = profile.status();
        let type_name = |key_type: KeyType| match key_type {
            KeyType::Raw => "raw",
            KeyType::HardwareWrapped => "hardware-wrapped",
        };
        let (key_type, lock) = match &status.mode {
            Mode::Settled => ("any", None),
            Mode::Undecided => ("undecided", None),
            Mode::Switching(lock) => ("switching", Some(lock)),
            Mode::Committed(lock) => (type_name(lock.key_type), Some(lock)),
            Mode::Poisoned(lock) => ("poisoned", Some(lock)),
        };
        EngineReport {
            name: name.clone(),
            spec: spec.map_or_else(|| status.engine.clone(), |spec| spec.to_string()),
            role: if spec.is_some() { "engine" } else { "fallback" },
            root_id: root.map(|id| id.to_string()),
            keys_admitted: status.keys,
            keys_pinned: status.pinned,
            spills: status.spills,
            key_type,
            decided_by: lock.map(|lock| lock.by.clone()),
            decided_at: lock.map(|lock| lock.since.0),
            process: status.process.map(|process| ProcessReport {
                pid: process.pid,
                restarts: process.restarts,
                last_pause_us: process.last_pause_ns / 1000,
                stopped: process.stopped,
                sandbox: process.sandbox,
            }),
            state: if status.stopped.is_some() { "stopped" } else { "ok" },
            reason: status.stopped,
            keyslots: status.keyslots.map(|keyslots| KeyslotsReport {
                waiting: keyslots.waiting,
                waits: keyslots.waits,
                longest_wait_us: keyslots.longest_wait_ns / 1000,
                resets: keyslots.resets,
                slots: keyslots
                    .slots
                    .iter()
                    .enumerate()
                    .map(|(slot, status)| SlotReport {
                        slot,
                        key_id: status.key.and_then(|key| identifier_of(&self.identifiers, key)),
                        users: status.users,
                        hits: status.counters.hits,
                        programs: status.counters.programs,
                        program_failures: status.counters.program_failures,
                        evictions: status.counters.evictions,
                        waits: status.counters.waits,
                    })
                    .collect(),
            }),
        }
    }
}

/// Lets the server go on when dropped: nobody has taken over.
#[derive(Debug)]
struct Resuming<'s>(&'s NbdServer);

impl Drop for Resuming<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

impl Answers for Running {
    fn hand_over(&self, stream: &Stream) -> io::Result<()> {
        let peer = stream.peer();
        stream.set_write_timeout(Some(take_over::TAKE_TIME_MAX))?;
        let done = self.hand_over_to(stream, peer);
        if let Err(error) = &done {
            tracing::warn!(%peer, %error, "not handed over: this server goes on");
        }
        if self.successor.get().is_some()
            && let Some(signals) = &self.signals
        {
            signals.close();
        }
        done
    }

    fn report(&self) -> ServerReport {
        self.report_all()
    }

    fn reencrypt(&self, request: &ReencryptRequest) -> Result<Option<String>, Failure> {
        let ReencryptRequest { volume, action } = request;
        let Some(served) = self.volumes.iter().find(|served| served.path == Path::new(volume)) else {
            if self.plain.iter().any(|served| served.path == Path::new(volume)) {
                return Err(plain::has_no_key(volume));
            }
            return Err(Failure::new(
                Code::File,
                format!("{volume} is not served here"),
                "`inlinecrypt status` shows which server serves it.",
            ));
        };
        if served.is_beginning() {
            return Err(Failure::new(
                Code::Busy,
                format!("the re-encryption of {} is about to begin", served.terms.label),
                "Try again in a moment.",
            ));
        }
        let mut job = served.job();
        match action {
            ReencryptAction::Begin {
                key,
                mode,
                data_unit_bytes,
                block_bytes,
                iv_offset_sectors,
                iv,
                zone_bytes,
                throttle_bytes,
                keep_holes,
                remove_old_key,
                others,
            } => {
                if is_under_way(job.as_ref()) {
                    return Err(reencrypt::under_way(&served.terms.label));
                }
                let wrong =
                    |why: String| Failure::new(Code::Wrong, why, "Ask with a command of this version.");
                let key = key.as_deref().map(|key| KeySource::parse(key.as_ref(), Path::new("/")));
                let mode = mode.as_deref().map(crate::cli::parse_mode);
                let unit = data_unit_bytes.map(|bytes| crate::cli::data_unit(bytes.into()));
                let layout = LayoutArgs {
                    mode: mode.transpose().map_err(wrong)?,
                    data_unit: unit.transpose().map_err(wrong)?,
                    block: *block_bytes,
                    iv_offset: *iv_offset_sectors,
                    iv: iv.as_deref().map(crate::cli::parse_iv).transpose().map_err(wrong)?,
                    offset: None,
                };
                let wish = Wish {
                    layout,
                    key: key.transpose().map_err(wrong)?,
                    zone_bytes: *zone_bytes,
                    throttle_bytes: *throttle_bytes,
                    keep_holes: *keep_holes,
                    remove_old_key: *remove_old_key,
                    others: others.clone(),
                    engine: None,
                };
                // The last one's thread has ended, or is about to.
                drop(job.take());
                served.is_beginning.store(true, Ordering::Relaxed);
                let begun = self.begin_reencryption(served, &wish);
                served.is_beginning.store(false, Ordering::Relaxed);
                *job = Some(begun?);
                Ok(served.terms.is_named_twice.then(|| {
                    format!(
                        "the config or command line of the server names key or layout of {}, too: change it before the \
                         next start, which refuses it otherwise",
                        served.terms.label
                    )
                }))
            }
            ReencryptAction::Pause | ReencryptAction::Resume { .. } => {
                let Some(job) = job.as_ref().filter(|job| !job.is_done()) else {
                    return Err(Failure::new(
                        Code::Wrong,
                        format!("{} is not being re-encrypted", served.terms.label),
                        format!("To begin: inlinecrypt volume reencrypt {}", files::shell_word(&served.path)),
                    ));
                };
                match action {
                    ReencryptAction::Resume { throttle_bytes } => job.resume(*throttle_bytes),
                    _ => job.pause(),
                }
                Ok(None)
            }
        }
    }

    fn missing_keyslots(&self, volume: &str) -> Result<Vec<u32>, Failure> {
        let served = self.volumes.iter().find(|served| served.path == Path::new(volume));
        match served.and_then(|served| served.terms.luks.as_ref()) {
            Some(luks) => luks.missing(),
            None => Ok(Vec::new()),
        }
    }

    fn reset(&self, engine: Option<&str>) -> Result<Vec<String>, String> {
        let engines = self.engines.iter().filter(|facts| facts.spec.is_some());
        let asked: Vec<_> = engines.filter(|facts| engine.is_none_or(|name| facts.name == name)).collect();
        if asked.is_empty() {
            return Err(format!("there is no engine {:?} here", engine.unwrap_or_default()));
        }
        asked
            .into_iter()
            .map(|facts| match facts.profile.reset() {
                Ok(()) => Ok(facts.name.clone()),
                Err(error) => Err(format!("engine {}: {}", facts.name, error.chain())),
            })
            .collect()
    }
}

impl Served {
    /// Opens and locks the backing, or takes it over as `handed` by another server.
    fn open(ready: Ready, handed: Option<OwnedFd>) -> Result<Self, Failure> {
        let Ready { plan, layout, admission, identifier: _, unused_bytes: _, next } = ready;
        let discard = match plan.discard {
            Discard::Pass => DiscardPolicy::PassDown,
            Discard::Off => DiscardPolicy::Ignore,
        };
        let options = OpenOptions { access: plan.access, caching: plan.caching, discard };
        let file = match handed {
            Some(file) => FileBacking::adopt(&plan.path, file, options),
            None => FileBacking::open(&plan.path, options),
        };
        let file = Arc::new(file.map_err(|error| Failure::of_file(&plan.label, &error))?);
        let align_bytes = file.facts().align_bytes;
        let backing = Arc::new(Watched::new(file.clone()));
        let unit_bytes = layout.data_unit_size().bytes();
        let offset_bytes = plan.layout.offset;
        let lies_on = Window::over(backing.clone(), offset_bytes).map_err(|error| {
            Failure::of_file(&plan.label, &error)
                .advise("Leave --direct (direct = true) out, or correct where the volume begins.")
        })?;
        let volume =
            Volume::new(layout, admission, lies_on.clone(), plan.access, plan.discard).map_err(|error| {
                let failure = Failure::of(&plan.label, &error);
                if plan.caching == Caching::Direct && align_bytes > unit_bytes {
                    failure.advise(format!(
                        "Leave --direct (direct = true) out, or make a volume with data units of {align_bytes} bytes \
                         or more."
                    ))
                } else {
                    failure
                }
            })?;
        let luks = LuksTerms::of(&plan, false);
        let terms = Terms {
            luks,
            label: plan.label,
            access: plan.access,
            discard: plan.discard,
            fallback: plan.fallback,
            slots: plan.slots,
            is_named_twice: plan.is_named_twice,
        };
        let path = std::path::absolute(&plan.path).unwrap_or_else(|_| plan.path.clone());
        let (volume, job) = match next {
            None => {
                let settle = || match &plan.luks {
                    Some(luks) => {
                        reencrypt::settle_container(luks, &plan.path, backing.clone(), &terms.label)
                    }
                    None => reencrypt::settle_remains(&path),
                };
                if terms.access == Access::ReadWrite
                    && let Err(failure) = settle()
                {
                    // It costs nobody anything but space, and is tried again at the next start.
                    tracing::warn!(volume = %terms.label, "{}", failure.what);
                }
                (Arc::new(LiveVolume::new(volume)), None)
            }
            Some(next) => {
                let backings = Backings { whole: backing.clone(), data: lies_on.clone() };
                let (volume, job) = reencrypt::go_on(volume, &path, backings, &terms, next)?;
                (volume, Some(job))
            }
        };
        let job = Mutex::new(job);
        Ok(Self {
            volume,
            backing,
            data: lies_on,
            file,
            name: plan.name,
            path,
            engine: plan.engine,
            offset_bytes,
            terms,
            job,
            is_beginning: AtomicBool::new(false),
        })
    }

    fn facts(&self, identifiers: &RwLock<HashMap<KeyId, Identifier>>) -> VolumeFacts {
        let current = self.volume.current();
        VolumeFacts::of(
            &self.name,
            self.identifier(identifiers),
            current.layout(),
            self.volume.geometry(),
            self.offset_bytes,
        )
    }

    /// The public name of its key.
    fn identifier(&self, identifiers: &RwLock<HashMap<KeyId, Identifier>>) -> String {
        let key = self.volume.current().admission().key().id();
        identifier_of(identifiers, key).unwrap_or_default()
    }

    /// Its re-encryption, if one has begun.
    fn report_job(&self) -> Option<ReencryptReport> {
        if self.is_beginning() {
            return None;
        }
        self.job().as_ref().map(report_job)
    }

    /// Whether its job is locked for longer, since its re-encryption is about to begin.
    fn is_beginning(&self) -> bool {
        self.is_beginning.load(Ordering::Relaxed)
    }

    fn job(&self) -> MutexGuard<'_, Option<Job>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn identifier_of(identifiers: &RwLock<HashMap<KeyId, Identifier>>, key: KeyId) -> Option<String> {
    let identifiers = identifiers.read().unwrap_or_else(PoisonError::into_inner);
    identifiers.get(&key).map(ToString::to_string)
}

fn is_under_way(job: Option<&Job>) -> bool {
    job.is_some_and(|job| !job.is_done())
}

fn report_job(job: &Job) -> ReencryptReport {
    let report = job.report();
    ReencryptReport {
        state: report.state,
        reason: report.failure.map(|failure| failure.what),
        done_bytes: report.progress.done_bytes,
        size_bytes: report.progress.size_bytes,
        throttle_bytes: report.throttle_bytes,
        key_id: job.identifier.to_string(),
    }
}

/// Every volume at every listener, as clients write it. A single volume is the default export, so its name is left out.
fn uris(listeners: &[Listener], plan: &ListenPlan, running: &Running) -> Vec<String> {
    let scheme = if plan.tls.when == TlsArg::Required { "nbds" } else { "nbd" };
    let encrypted = running.volumes.iter().map(|served| served.name.as_str());
    let mut names: Vec<&str> =
        encrypted.chain(running.plain.iter().map(|served| served.name.as_str())).collect();
    if let [only] = &mut names[..] {
        *only = "";
    }
    let mut uris = Vec::new();
    for listener in listeners {
        for name in &names {
            uris.push(uri(scheme, &listener.place(), name));
        }
    }
    uris
}

fn uri(scheme: &str, place: &Listen, name: &str) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let name = percent(name.as_bytes(), b"");
    match place {
        Listen::Unix(path) => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            format!("{scheme}+unix:///{name}?socket={}", percent(path.as_os_str().as_bytes(), b"/"))
        }
        Listen::Tcp { host, port } if host.contains(':') => format!("{scheme}://[{host}]:{port}/{name}"),
        Listen::Tcp { host, port } => format!("{scheme}://{host}:{port}/{name}"),
    }
}

/// Percent-encoded, but for letters, digits, what RFC 3986 leaves unreserved, and `also`.
fn percent(bytes: &[u8], also: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            text.push(byte.into());
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_those_of_the_nbd_uri_specification() {
        let unix = Listen::Unix("/run/a b?.sock".into());
        assert_eq!(uri("nbd", &unix, ""), "nbd+unix:///?socket=/run/a%20b%3F.sock");
        let tcp = |host: &str| Listen::Tcp { host: host.to_owned(), port: 10809 };
        assert_eq!(uri("nbds", &tcp("::1"), "db/1"), "nbds://[::1]:10809/db%2F1");
        assert_eq!(uri("nbd", &tcp("example.org"), "é"), "nbd://example.org:10809/%C3%A9");
    }
}
