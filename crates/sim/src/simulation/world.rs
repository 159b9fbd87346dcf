//! A host with its tables, an engine, volumes with clients, and a clock: one thread, one event after the other.
//!
//! The host is what the profile's shell is, without threads: it hands events to the framework's own [`AdmissionTable`] and
//! [`KeyslotTable`] and carries out what they want done on a real engine, at virtual times. Requests of many clients are under
//! way at once, wait for keyslots, and are interrupted by everything in [`fault`](super::fault).
//!
//! After each power cut and at the end, every sector is decrypted by another engine than the one that encrypted it.

use super::check::Shadow;
use super::disk::{PLAINTEXT, SECTOR, SimDisk};
use super::fault::{Rates, Sabotage, engine_faults};
use super::random::Random;
use super::{Failure, Seen, root};
use inlinecrypt_core::Dun;
use inlinecrypt_core::admission::{
    self, AdmissionTable, Applicant, Application, Fallback, Hold, Reason, ServedBy, Timestamp, decide,
};
use inlinecrypt_core::backing::{Backing, Durability};
use inlinecrypt_core::config::{DataUnitSize, Hardware, KeyType, Mode};
use inlinecrypt_core::engine::{Direction, Engine, KeyRef, SlotHold, SlotIndex};
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_core::key::{Key, KeyForm, KeyId, LongTermWrappedKey, RawKey};
use inlinecrypt_core::keyslot::table::{
    self, Acquired, EvictOutcome, Grant, KeyslotTable, Programmed, Ticket,
};
use inlinecrypt_core::keyslot::{Policy, Priority};
use inlinecrypt_engine::{Chance, EngineSpec, IceSpec, IceVariant, SoftwareSpec, open};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Sectors of each volume.
const SECTORS: usize = 64;
/// More events than any world that ends.
const EVENTS_MAX: u64 = 50_000;
/// How often a request asks again for a keyslot that the engine keeps losing (as the profile does).
const LOSSES_MAX: u32 = 16;

const MICROSECOND: u64 = 1000;
/// How much longer a slow program takes.
const PROGRAM_SLOW: u64 = 5;

#[derive(Clone, Copy, Debug)]
enum Event {
    Think(usize),
    Open(usize),
    Switched,
    Programmed(SlotIndex, KeyId),
    Evicted(SlotIndex, KeyId),
    Wake,
    Compute(u64),
    Media(u64),
    Reset,
    HearReset,
    Restart,
    PowerCut,
}

/// What is stored of a volume's key.
#[derive(Debug)]
enum Stored {
    Raw([u8; 64]),
    Wrapped(LongTermWrappedKey),
}

#[derive(Debug)]
struct Volume {
    stored: Stored,
    unit_size: DataUnitSize,
    fallback: Fallback,
    hold: Hold,
    priority: Priority,
    disk: Arc<SimDisk>,
    shadow: Shadow,
    /// What the other engine uses.
    oracle: Arc<Key>,
    /// The key of this opening, as the tables know it: it outlives the blobs that are prepared for each engine start.
    handle: Option<KeyId>,
    /// The same for this engine start.
    key: Option<Arc<Key>>,
    state: Opening,
    operations_left: u32,
    refusals: u32,
    /// Evictions by hand under way.
    evictions: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    Closed,
    Asked,
    Open(ServedBy, Hold),
    Closing,
}

impl Volume {
    fn key_type(&self) -> KeyType {
        match self.stored {
            Stored::Raw(_) => KeyType::Raw,
            Stored::Wrapped(_) => KeyType::HardwareWrapped,
        }
    }

    fn dun(&self, sector: usize) -> Dun {
        Dun::from((sector * SECTOR) as u64 / u64::from(self.unit_size.bytes()))
    }
}

#[derive(Debug)]
enum Kind {
    Read,
    Write { plain: Vec<u8>, cipher: Vec<u8>, durability: Durability, shadow: u64 },
    Flush { begun: u64 },
    Trim,
}

#[derive(Debug)]
struct Request {
    volume: usize,
    kind: Kind,
    range: Range<usize>,
    grant: Option<Grant>,
    asked_at: u64,
    losses: u32,
    /// Its data is on the way to the medium.
    is_at_media: bool,
}

#[derive(Clone, Copy, Debug)]
enum Waits {
    Request(u64),
    /// By hand.
    Eviction(usize),
    Closing(usize),
}

/// What a host has in memory: gone with the power.
struct Host {
    engine: Arc<dyn Engine>,
    admission: AdmissionTable,
    applicants: BTreeMap<Applicant, Option<usize>>,
    keyslots: Option<KeyslotTable>,
    tickets: BTreeMap<Ticket, Waits>,
    requests: BTreeMap<u64, Request>,
    is_busy: bool,
    reset_untold: bool,
    /// When the keyslots want to be told the time.
    wake_at: Option<u64>,
}

/// A simulated world.
pub(super) struct World {
    seed: u64,
    sabotage: Option<Sabotage>,
    random: Random,
    rates: Rates,
    spec: EngineSpec,
    policy: Policy,
    program_ns: u64,
    /// What the keyslot table's documentation says of waits, where the world keeps to what it assumes.
    wait_bound_ns: Option<u64>,
    now: u64,
    /// Events of a host that lost power do not happen any more.
    events: BTreeMap<(u64, u64), Event>,
    last_event: u64,
    happened: u64,
    last_request: u64,
    volumes: Vec<Volume>,
    host: Host,
    /// Serves raw keys that the engine refuses; also the other engine for raw keys.
    software: Arc<dyn Engine>,
    /// The other engine for wrapped keys.
    oracle: Arc<dyn Engine>,
    seen: Seen,
}

type Step<T = ()> = Result<T, String>;

fn or_say<T>(result: Result<T, Error>, what: &str) -> Step<T> {
    result.map_err(|error| format!("{what}: {}", error.chain()))
}

impl World {
    pub(super) fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut random = Random::new(seed);
        let spec = Self::draw_engine(&mut random);
        let policy = Policy {
            bypass_max: random.pick(&[0, 1, 4, 64]),
            program_retries: random.pick(&[0, 1, 1, 2]),
            program_share_percent: random.pick(&[10, 10, 50, 100]),
            anticipation_min_ns: random.pick(&[0, 20_000]),
            ..Policy::default()
        };
        let healthy = Self::healthy(&spec);
        let oracle = open(&healthy, Some(root())).expect("a healthy engine starts");
        let software = EngineSpec::Software(SoftwareSpec { keyslots: 0, ..SoftwareSpec::default() });
        let software = open(&software, None).expect("software starts");
        let host = Self::boot(&spec, policy);
        let mut world = Self {
            seed,
            sabotage,
            rates: Rates::draw(&mut random),
            program_ns: random.pick(&[0, 5, 50, 1000]) * MICROSECOND,
            random,
            spec,
            policy,
            wait_bound_ns: None,
            now: 0,
            events: BTreeMap::new(),
            last_event: 0,
            happened: 0,
            last_request: 0,
            volumes: Vec::new(),
            host,
            software,
            oracle,
            seen: Seen::default(),
        };
        let volumes = 2 + world.random.index(4);
        if let Some(exclusive) = world.oracle.exclusive() {
            exclusive.commit(KeyType::HardwareWrapped).expect("a healthy engine switches");
        }
        for number in 0..volumes {
            let volume = world.draw_volume(number);
            world.volumes.push(volume);
            let at = world.random.below(50 * MICROSECOND);
            world.schedule(at, Event::Open(number));
        }
        world.wait_bound_ns = world.bound_waits();
        world
    }

    /// `ceil(n / s) * (q + (b + 1) * h) + n * p`, as derived in `keyslot/table.rs`, with the most that each can be here. It
    /// does not speak of resets, evictions and losses, which take the engine's time, too.
    fn bound_waits(&self) -> Option<u64> {
        let Rates { reset, restart, evict, close, power_cut: _ } = self.rates;
        let loses = matches!(&self.spec, EngineSpec::Ice(ice) if ice.faults.lose_slot != Chance::NEVER);
        let keyslots = u64::from(self.host.engine.capabilities().keyslots);
        if reset + restart + evict + close > 0 || loses || keyslots == 0 {
            return None;
        }
        let volumes = self.volumes.len() as u64;
        let pins = self.volumes.iter().filter(|volume| volume.hold == Hold::Pin).count() as u64;
        let unpinned = keyslots - pins.min(keyslots - 1);
        let program = PROGRAM_SLOW * self.program_ns;
        let quantum = self.policy.quantum_ns(program);
        // Computing, then the medium.
        let hold = 90 * MICROSECOND;
        let round = quantum + (u64::from(self.policy.bypass_max) + 1) * hold;
        let programs = volumes * program * (u64::from(self.policy.program_retries) + 1);
        Some(volumes.div_ceil(unpinned) * round + programs)
    }

    fn draw_engine(random: &mut Random) -> EngineSpec {
        let keyslots = random.pick(&[1, 1, 2, 3, 8]);
        if random.percent(25) {
            let keyslots = if random.percent(20) { 0 } else { keyslots };
            return EngineSpec::Software(SoftwareSpec { keyslots, ..SoftwareSpec::default() });
        }
        let variant = random.pick(&IceVariant::ALL);
        let mut faults = engine_faults(random);
        faults.commit_fail = random.percent(10);
        EngineSpec::Ice(IceSpec { keyslots, faults, seed: random.draw(), ..IceSpec::new(variant) })
    }

    /// The same engine without faults, with room for every volume.
    fn healthy(spec: &EngineSpec) -> EngineSpec {
        match spec {
            EngineSpec::Software(software) => EngineSpec::Software(SoftwareSpec { keyslots: 8, ..*software }),
            EngineSpec::Ice(ice) => EngineSpec::Ice(IceSpec { keyslots: 8, ..IceSpec::new(ice.variant) }),
        }
    }

    fn boot(spec: &EngineSpec, policy: Policy) -> Host {
        let engine = open(spec, Some(root())).expect("the engine starts");
        let keyslots = engine.capabilities().keyslots;
        Host {
            admission: AdmissionTable::new(keyslots, engine.exclusive().is_some()),
            applicants: BTreeMap::new(),
            keyslots: (keyslots > 0).then(|| KeyslotTable::new(keyslots, policy)),
            tickets: BTreeMap::new(),
            requests: BTreeMap::new(),
            is_busy: false,
            reset_untold: false,
            wake_at: None,
            engine,
        }
    }

    fn draw_volume(&mut self, number: usize) -> Volume {
        let random = &mut self.random;
        let unit_size = DataUnitSize::from_bytes(random.pick(&[512, 4096])).expect("powers of two");
        let mut raw = [0; 64];
        random.fill(&mut raw);
        let wraps = self.oracle.key_ladder().filter(|_| random.percent(50));
        let stored = match wraps {
            // ICE imports nothing but its own sizes; generated is all the same to us.
            Some(ladder) => Stored::Wrapped(ladder.generate().expect("a healthy engine generates")),
            None => Stored::Raw(raw),
        };
        let engine = &self.oracle;
        let key = make_key(&stored, unit_size, &**engine).expect("a healthy engine prepares");
        if matches!(stored, Stored::Wrapped(_)) {
            let slot = SlotIndex(u32::try_from(number).expect("few"));
            engine.program(slot, &key).expect("a healthy engine programs");
        }
        let disk = SimDisk::new(SECTORS, self.sabotage == Some(Sabotage::NoFlush));
        Volume {
            stored,
            unit_size,
            fallback: if random.percent(50) { Fallback::Allowed } else { Fallback::Off },
            hold: if random.percent(20) { Hold::Pin } else { Hold::Register },
            priority: random.pick(&[Priority::Low, Priority::Normal, Priority::Normal, Priority::High]),
            disk: Arc::new(disk),
            shadow: Shadow::new(SECTORS),
            oracle: key,
            handle: None,
            key: None,
            state: Opening::Closed,
            operations_left: 10 + u32::try_from(random.below(40)).expect("small"),
            refusals: 0,
            evictions: 0,
        }
    }

    fn schedule(&mut self, after_ns: u64, event: Event) {
        self.last_event += 1;
        self.events.insert((self.now + after_ns, self.last_event), event);
    }

    fn soon(&mut self, most_us: u64) -> u64 {
        self.random.below(most_us * MICROSECOND + 1)
    }

    /// Lives until nothing happens any more.
    pub(super) fn live(mut self) -> Result<Seen, Failure> {
        let outcome = self.run();
        let (seed, event) = (self.seed, self.happened);
        outcome.map(|()| self.seen).map_err(|what| Failure { seed, event, what })
    }

    fn run(&mut self) -> Step {
        while let Some(((at, _), event)) = self.events.pop_first() {
            self.now = at;
            self.happened += 1;
            if self.happened > EVENTS_MAX {
                return Err("the world does not come to its end".into());
            }
            if let Some(keyslots) = &mut self.host.keyslots {
                keyslots.at(self.now);
            }
            self.happen(event)?;
            self.check()?;
        }
        self.seen.events += self.happened;
        if let Some(id) = self.host.requests.keys().next() {
            return Err(format!("request {id} was never answered"));
        }
        if self.host.keyslots.as_ref().is_some_and(|keyslots| keyslots.waiting() > 0)
            || !self.host.tickets.is_empty()
        {
            return Err("somebody waits for a keyslot for ever".into());
        }
        for number in 0..self.volumes.len() {
            let found = self.decrypt(number)?;
            let checked = self.volumes[number].shadow.check_read(0, &found);
            checked.map_err(|sector| format!("at the end, sector {sector} of volume {number} is wrong"))?;
        }
        Ok(())
    }

    fn happen(&mut self, event: Event) -> Step {
        match event {
            Event::Think(volume) => self.think(volume),
            Event::Open(volume) => self.open(volume),
            Event::Switched => self.switched(),
            Event::Programmed(slot, key) => self.programmed(slot, key),
            Event::Evicted(slot, key) => {
                self.host.is_busy = false;
                let key = self.any_key(key)?;
                let ok = self.host.engine.evict(Some(slot), &key).is_ok();
                self.keyslots(|keyslots, actions| keyslots.evicted(slot, ok, actions))
            }
            // What was asked for later replaces it.
            Event::Wake if self.host.wake_at != Some(self.now) => Ok(()),
            Event::Wake => {
                self.host.wake_at = None;
                self.keyslots(KeyslotTable::tick)
            }
            Event::Compute(request) => self.compute(request),
            Event::Media(request) => self.media(request),
            Event::Reset => {
                // A poisoned engine does not come back from anything.
                let is_poisoned = matches!(self.host.admission.mode(), admission::Mode::Poisoned(_));
                if let (Some(lifecycle), false) = (self.host.engine.lifecycle(), is_poisoned) {
                    or_say(lifecycle.reset(), "a reset")?;
                    self.seen.resets += 1;
                    self.reset_happened();
                }
                Ok(())
            }
            Event::HearReset => {
                self.host.reset_untold = false;
                self.keyslots(KeyslotTable::reset)
            }
            Event::Restart => self.restart(),
            Event::PowerCut => self.power_cut(),
        }
    }

    fn reset_happened(&mut self) {
        if !std::mem::replace(&mut self.host.reset_untold, true) {
            let after = self.soon(100);
            self.schedule(after, Event::HearReset);
        }
    }

    /// What holds after every event.
    fn check(&self) -> Step {
        self.host.admission.check();
        if let Some(keyslots) = &self.host.keyslots {
            keyslots.check();
        }
        if let (admission::Mode::Committed(lock), Some(exclusive)) =
            (self.host.admission.mode(), self.host.engine.exclusive())
            && exclusive.committed() != Some(lock.key_type)
        {
            return Err("the engine does not serve what it is committed to".into());
        }
        if self.volumes.iter().any(|volume| volume.disk.saw_plaintext()) {
            return Err("plaintext reached a disk".into());
        }
        Ok(())
    }

    fn any_key(&self, id: KeyId) -> Step<Arc<Key>> {
        let volume = self.volumes.iter().find(|volume| volume.handle == Some(id));
        let key = volume.and_then(|volume| volume.key.clone());
        key.ok_or_else(|| "the keyslots know a key of nobody's".into())
    }

    // Volumes come and go.

    fn open(&mut self, number: usize) -> Step {
        let volume = &self.volumes[number];
        if volume.state != Opening::Closed {
            return Ok(());
        }
        let engine = self.host.engine.clone();
        let (key_type, policy) = (volume.key_type(), volume.fallback);
        // With every refusal it asks for less.
        let hold = if volume.refusals == 0 { volume.hold } else { Hold::Register };
        if key_type == KeyType::HardwareWrapped && engine.key_ladder().is_none() {
            return Ok(());
        }
        let key = or_say(make_key(&volume.stored, volume.unit_size, &*engine), "preparing a good blob")?;
        let fallback = self.software.capabilities();
        let config = *key.config();
        self.volumes[number].key = Some(key.clone());
        self.volumes[number].handle = Some(key.id());
        match decide(&config, engine.capabilities(), Some(fallback), policy) {
            Err(_) => return Ok(()),
            Ok(ServedBy::Fallback) => {
                self.volumes[number].state = Opening::Open(ServedBy::Fallback, Hold::Register);
                self.schedule(0, Event::Think(number));
                return Ok(());
            }
            Ok(ServedBy::Engine) => {}
        }
        if let (KeyForm::Wrapped(blob), Some(ladder)) = (key.form(), engine.key_ladder()) {
            or_say(ladder.derive_software_secret(blob), "opening a good blob")?;
        }
        self.volumes[number].state = Opening::Asked;
        let application = Application {
            key: key.id(),
            key_type,
            hold,
            fallback_ready: policy == Fallback::Allowed && key_type == KeyType::Raw,
            label: format!("volume {number}"),
            now: Timestamp(self.now + 1),
        };
        let mut actions = Vec::new();
        let applicant = self.host.admission.apply(application, &mut actions);
        self.host.applicants.insert(applicant, Some(number));
        self.volumes[number].hold = hold;
        self.answer(actions)
    }

    fn answer(&mut self, actions: Vec<admission::Action>) -> Step {
        for action in actions {
            match action {
                admission::Action::Commit { .. } => {
                    let after = self.soon(200);
                    self.schedule(after, Event::Switched);
                }
                admission::Action::Admit { applicant, served_by } => {
                    let asked = self.host.applicants.remove(&applicant);
                    let Some(number) = asked.ok_or("an admission was answered twice")? else { continue };
                    self.admitted(number, served_by)?;
                }
                admission::Action::Refuse { applicant, reason } => {
                    let asked = self.host.applicants.remove(&applicant);
                    let Some(number) = asked.ok_or("an admission was answered twice")? else { continue };
                    self.refused(number, &reason)?;
                }
            }
        }
        Ok(())
    }

    fn admitted(&mut self, number: usize, served_by: ServedBy) -> Step {
        self.seen.admissions += 1;
        let volume = &mut self.volumes[number];
        let hold = if served_by == ServedBy::Engine { volume.hold } else { Hold::Register };
        volume.state = Opening::Open(served_by, hold);
        let (id, priority) = (volume.handle.expect("made before it asked"), volume.priority);
        if served_by == ServedBy::Engine {
            let is_pinned = self.host.admission.is_pinned(id);
            self.keyslots(|keyslots, actions| {
                keyslots.set_priority(id, priority);
                keyslots.set_pinned(id, is_pinned, actions);
            })?;
        }
        self.schedule(0, Event::Think(number));
        Ok(())
    }

    fn refused(&mut self, number: usize, reason: &Reason) -> Step {
        self.seen.refusals += 1;
        let volume = &self.volumes[number];
        let is_right = match reason {
            Reason::Locked(lock) => lock.key_type != volume.key_type(),
            Reason::Poisoned(_) => {
                // Its owner does what the message says, sometimes.
                if self.random.percent(50) {
                    let after = self.soon(500);
                    self.schedule(after, Event::Restart);
                }
                true
            }
            Reason::NoPinLeft { pinned, keyslots } => volume.hold == Hold::Pin && pinned + 1 >= *keyslots,
            _ => false,
        };
        if !is_right {
            return Err(format!("volume {number} was refused without cause: {reason:?}"));
        }
        let volume = &mut self.volumes[number];
        volume.state = Opening::Closed;
        volume.refusals += 1;
        if volume.refusals < 3 {
            let after = self.soon(1000);
            self.schedule(after, Event::Open(number));
        }
        Ok(())
    }

    fn switched(&mut self) -> Step {
        let admission::Mode::Switching(lock) = self.host.admission.mode() else {
            return Err("a switch ended that was not begun".into());
        };
        let key_type = lock.key_type;
        let exclusive = self.host.engine.exclusive().ok_or("an engine for both types was to switch")?;
        let ok = exclusive.commit(key_type).is_ok();
        let mut actions = Vec::new();
        self.host.admission.switched(ok, &mut actions);
        self.answer(actions)
    }

    fn close(&mut self, number: usize) -> Step {
        let volume = &mut self.volumes[number];
        let Opening::Open(served_by, hold) = volume.state else { return Ok(()) };
        let id = volume.handle.expect("an open volume has one");
        if served_by == ServedBy::Fallback {
            volume.state = Opening::Closed;
            let after = self.soon(500);
            self.schedule(after, Event::Open(number));
            return Ok(());
        }
        self.seen.closes += 1;
        let is_last = self.host.admission.leave(id, hold);
        if !is_last {
            return Err("two volumes share a key here".into());
        }
        self.volumes[number].state = Opening::Closing;
        self.keyslots(|keyslots, actions| keyslots.set_pinned(id, false, actions))?;
        if self.host.keyslots.is_none() {
            return self.closed(number);
        }
        self.ask_eviction(id, Waits::Closing(number))
    }

    fn closed(&mut self, number: usize) -> Step {
        self.volumes[number].state = Opening::Closed;
        let after = self.soon(500);
        self.schedule(after, Event::Open(number));
        Ok(())
    }

    fn ask_eviction(&mut self, id: KeyId, waits: Waits) -> Step {
        let Some(keyslots) = &mut self.host.keyslots else { return Ok(()) };
        let mut actions = Vec::new();
        let ticket = keyslots.evict(id, &mut actions);
        self.host.tickets.insert(ticket, waits);
        self.carry_out(actions)
    }

    // Keyslots.

    fn keyslots(&mut self, event: impl FnOnce(&mut KeyslotTable, &mut Vec<table::Action>)) -> Step {
        let Some(keyslots) = &mut self.host.keyslots else { return Ok(()) };
        let mut actions = Vec::new();
        event(keyslots, &mut actions);
        self.carry_out(actions)
    }

    fn take_ticket(&mut self, ticket: Ticket) -> Step<Waits> {
        self.host.tickets.remove(&ticket).ok_or_else(|| "a ticket was answered twice".into())
    }

    fn carry_out(&mut self, actions: Vec<table::Action>) -> Step {
        for action in actions {
            match action {
                table::Action::Program { slot, key, .. } => {
                    self.begin_work()?;
                    let slow = if self.random.percent(10) { PROGRAM_SLOW } else { 1 };
                    let after = self.program_ns * slow;
                    if let Some(keyslots) = &mut self.host.keyslots {
                        keyslots.engine_begins(self.now);
                    }
                    self.schedule(after, Event::Programmed(slot, key));
                }
                table::Action::Evict { slot, key, .. } => {
                    self.begin_work()?;
                    let after = self.program_ns;
                    self.schedule(after, Event::Evicted(slot, key));
                }
                table::Action::WakeAt { at_ns, .. } => {
                    self.seen.wakes += 1;
                    let at_ns = at_ns.max(self.now);
                    self.host.wake_at = Some(at_ns);
                    self.schedule(at_ns - self.now, Event::Wake);
                }
                table::Action::Grant { ticket, grant } => match self.take_ticket(ticket)? {
                    Waits::Request(request) => self.granted(request, grant)?,
                    Waits::Eviction(_) | Waits::Closing(_) => {
                        return Err("an eviction was granted a keyslot".into());
                    }
                },
                table::Action::Fail { ticket } => match self.take_ticket(ticket)? {
                    Waits::Request(request) => self.complete(request, false)?,
                    Waits::Eviction(_) | Waits::Closing(_) => {
                        return Err("an eviction failed like a request".into());
                    }
                },
                table::Action::Evicted { ticket, outcome } => match self.take_ticket(ticket)? {
                    Waits::Eviction(volume) => {
                        self.volumes[volume].evictions -= 1;
                        self.seen.evictions += 1;
                    }
                    Waits::Closing(_) if outcome == EvictOutcome::InUse => {
                        return Err("a key that nobody uses is in use".into());
                    }
                    Waits::Closing(volume) => self.closed(volume)?,
                    Waits::Request(_) => return Err("a request was answered like an eviction".into()),
                },
            }
        }
        Ok(())
    }

    fn begin_work(&mut self) -> Step {
        if std::mem::replace(&mut self.host.is_busy, true) {
            return Err("the engine was given two things to do at once".into());
        }
        Ok(())
    }

    fn programmed(&mut self, slot: SlotIndex, id: KeyId) -> Step {
        self.host.is_busy = false;
        let key = self.any_key(id)?;
        self.seen.programs += 1;
        let outcome = match self.host.engine.program(slot, &key) {
            Ok(()) => Programmed::Done,
            Err(error) if error.kind() == ErrorKind::EngineFailed => {
                self.seen.failed_programs += 1;
                Programmed::Failed
            }
            Err(error) => return Err(format!("AN ADMITTED KEY WAS REFUSED: {}", error.chain())),
        };
        self.keyslots(|keyslots, actions| keyslots.programmed(slot, outcome, actions))
    }

    // Requests.

    fn think(&mut self, number: usize) -> Step {
        let volume = &self.volumes[number];
        let Opening::Open(served_by, _) = volume.state else { return Ok(()) };
        if volume.operations_left == 0 {
            return Ok(());
        }
        let under_way = self.host.requests.values().filter(|request| request.volume == number).count();
        if under_way == 4 {
            // It has enough to wait for. Nothing goes wrong meanwhile, or an engine that is reset more often than it can
            // program would be reset for ever.
            let after = self.soon(150);
            self.schedule(after, Event::Think(number));
            return Ok(());
        }
        let rates = self.rates;
        if under_way == 0 && volume.evictions == 0 && self.random.percent(rates.close) {
            return self.close(number);
        }
        if served_by == ServedBy::Engine && self.host.keyslots.is_some() && self.random.percent(rates.evict) {
            self.volumes[number].evictions += 1;
            let id = self.volumes[number].handle.expect("an open volume has one");
            self.ask_eviction(id, Waits::Eviction(number))?;
        }
        for (rate, event) in
            [(rates.reset, Event::Reset), (rates.restart, Event::Restart), (rates.power_cut, Event::PowerCut)]
        {
            if self.random.percent(rate) {
                let after = self.soon(300);
                self.schedule(after, event);
            }
        }
        self.volumes[number].operations_left -= 1;
        self.issue(number)?;
        let after = self.soon(150);
        self.schedule(after, Event::Think(number));
        Ok(())
    }

    fn issue(&mut self, number: usize) -> Step {
        let unit = self.volumes[number].unit_size.bytes() as usize / SECTOR;
        let units = SECTORS / unit;
        let first = self.random.index(units);
        let range = first * unit..(first + 1 + self.random.index((units - first).min(4))) * unit;
        let overlaps = |request: &Request| {
            request.volume == number && request.range.start < range.end && range.start < request.range.end
        };
        // Where clients overlap, the volume's range lock makes one wait; here it goes elsewhere another time.
        if self.host.requests.values().any(overlaps) {
            return Ok(());
        }
        self.last_request += 1;
        let id = self.last_request;
        let is_software = matches!(self.volumes[number].state, Opening::Open(ServedBy::Fallback, _));
        let shadow = &mut self.volumes[number].shadow;
        let (kind, range) = match self.random.below(100) {
            0..45 => {
                let plain = client_data(number, id, &range);
                let durability =
                    if self.random.percent(15) { Durability::Durable } else { Durability::Cached };
                let token = shadow.begin_write(range.start, &plain);
                (Kind::Write { plain, cipher: Vec::new(), durability, shadow: token }, range)
            }
            45..80 => (Kind::Read, range),
            80..95 => (Kind::Flush { begun: shadow.begin_flush() }, 0..0),
            _ => {
                shadow.trim(range.clone());
                (Kind::Trim, range)
            }
        };
        let needs_key = matches!(kind, Kind::Read | Kind::Write { .. });
        let request = Request {
            volume: number,
            kind,
            range,
            grant: None,
            asked_at: self.now,
            losses: 0,
            is_at_media: false,
        };
        self.host.requests.insert(id, request);
        self.seen.requests += 1;
        if !needs_key {
            let after = self.soon(80);
            self.schedule(after, Event::Media(id));
        } else if is_software || self.host.keyslots.is_none() {
            self.schedule(MICROSECOND, Event::Compute(id));
        } else {
            self.acquire(id)?;
        }
        Ok(())
    }

    fn request(&mut self, id: u64) -> Step<&mut Request> {
        self.host.requests.get_mut(&id).ok_or_else(|| format!("request {id} goes on after its answer"))
    }

    fn acquire(&mut self, id: u64) -> Step {
        let (volume, now) = (self.request(id)?.volume, self.now);
        self.request(id)?.asked_at = now;
        let key = self.volumes[volume].handle.expect("an open volume has one");
        let Some(keyslots) = &mut self.host.keyslots else { return Err("there are no keyslots".into()) };
        let mut actions = Vec::new();
        match keyslots.acquire(key, &mut actions) {
            Acquired::Granted(grant) => self.granted(id, grant),
            Acquired::Queued(ticket) => {
                self.seen.waits += 1;
                self.host.tickets.insert(ticket, Waits::Request(id));
                self.carry_out(actions)
            }
        }
    }

    fn granted(&mut self, id: u64, grant: Grant) -> Step {
        let now = self.now;
        let request = self.request(id)?;
        request.grant = Some(grant);
        let waited = now - request.asked_at;
        self.seen.longest_wait_ns = self.seen.longest_wait_ns.max(waited);
        if let Some(bound) = self.wait_bound_ns {
            self.seen.bounded_waits += u64::from(waited > 0);
            if waited > bound {
                return Err(format!(
                    "request {id} waited {waited} ns for its keyslot; at most {bound} are documented"
                ));
            }
        }
        let after = self.soon(10);
        self.schedule(after, Event::Compute(id));
        Ok(())
    }

    fn release(&mut self, id: u64) -> Step {
        match self.request(id)?.grant.take() {
            Some(grant) => self.keyslots(|keyslots, actions| keyslots.release(grant, actions)),
            None => Ok(()),
        }
    }

    /// The data goes through the engine.
    fn compute(&mut self, id: u64) -> Step {
        let (sabotage, odd) = (self.sabotage, self.random.percent(20));
        let keyslots = self.host.engine.capabilities().keyslots;
        let request = self.host.requests.get_mut(&id).ok_or("a request goes on after its answer")?;
        let volume = &self.volumes[request.volume];
        let (direction, plain) = match &request.kind {
            Kind::Write { plain, .. } => (Direction::Encrypt, Some(plain.clone())),
            Kind::Read | Kind::Flush { .. } | Kind::Trim => (Direction::Decrypt, None),
        };
        let is_software = matches!(volume.state, Opening::Open(ServedBy::Fallback, _));
        let engine = if is_software { &self.software } else { &self.host.engine };
        let mut memory = or_say(engine.memory().allocate(request.range.len() * SECTOR), "memory")?;
        match &plain {
            Some(plain) => memory.bytes_mut().copy_from_slice(plain),
            None => or_say(
                volume.disk.read((request.range.start * SECTOR) as u64, memory.bytes_mut()),
                "the disk",
            )?,
        }
        let key = volume.key.as_ref().expect("an open volume has one");
        let key_ref = match request.grant {
            Some(grant) if sabotage == Some(Sabotage::WrongKeyslot) => {
                KeyRef::Slot(SlotIndex((grant.slot.0 + 1) % keyslots))
            }
            Some(grant) => KeyRef::Slot(grant.slot),
            None => KeyRef::Inline(key),
        };
        let at = request.range.start + if sabotage == Some(Sabotage::WrongDun) { 8 } else { 0 };
        let all = 0..memory.bytes().len();
        let result = if sabotage == Some(Sabotage::Plaintext) && odd && plain.is_some() {
            Ok(())
        } else {
            engine.crypt_range(key_ref, direction, volume.dun(at), &mut *memory, all)
        };
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NoKey && sabotage != Some(Sabotage::IgnoreEmpty) => {
                return self.lost(id);
            }
            Err(error) if error.kind() == ErrorKind::NoKey => {}
            Err(error) => {
                return Err(format!("the engine does not encrypt for an admitted key: {}", error.chain()));
            }
        }
        match &mut request.kind {
            Kind::Write { cipher, .. } => *cipher = memory.bytes().to_vec(),
            Kind::Read | Kind::Flush { .. } | Kind::Trim => {
                volume.shadow.check_read(request.range.start, memory.bytes()).map_err(|sector| {
                    format!("a read found sector {sector} of volume {} wrong", request.volume)
                })?;
            }
        }
        request.is_at_media = true;
        if self.host.engine.slot_hold() == SlotHold::WhileComputing {
            self.release(id)?;
        }
        let after = self.soon(80);
        self.schedule(after, Event::Media(id));
        Ok(())
    }

    /// The keyslot held no key.
    fn lost(&mut self, id: u64) -> Step {
        self.seen.losses += 1;
        let request = self.request(id)?;
        request.losses += 1;
        let losses = request.losses;
        let grant = request.grant.take().ok_or("the key came with the request and is not there")?;
        if losses > LOSSES_MAX {
            return Err(format!("the keyslot of request {id} was empty {losses} times in a row"));
        }
        self.keyslots(|keyslots, actions| {
            keyslots.lost(grant);
            keyslots.release(grant, actions);
        })?;
        self.acquire(id)
    }

    /// The medium is done.
    fn media(&mut self, id: u64) -> Step {
        let request = self.host.requests.get(&id).ok_or("a request goes on after its answer")?;
        let disk = &self.volumes[request.volume].disk;
        let at = (request.range.start * SECTOR) as u64;
        let done = match &request.kind {
            Kind::Write { cipher, durability, .. } => disk.write(at, cipher, *durability),
            Kind::Read => Ok(()),
            Kind::Flush { .. } => disk.flush(),
            Kind::Trim => disk.discard(at, (request.range.len() * SECTOR) as u64),
        };
        or_say(done, "the disk")?;
        self.release(id)?;
        self.complete(id, true)?;
        if self.sabotage == Some(Sabotage::AnswerTwice) && self.random.percent(5) {
            self.complete(id, true)?;
        }
        Ok(())
    }

    /// The client has its answer.
    fn complete(&mut self, id: u64, ok: bool) -> Step {
        let request =
            self.host.requests.remove(&id).ok_or_else(|| format!("request {id} was answered twice"))?;
        self.seen.answers += 1;
        self.seen.failed_requests += u64::from(!ok);
        let shadow = &mut self.volumes[request.volume].shadow;
        match request.kind {
            Kind::Write { shadow: token, durability, .. } if ok => {
                shadow.end_write(token, durability == Durability::Durable);
            }
            Kind::Write { shadow: token, .. } => shadow.cancel_write(token),
            Kind::Flush { begun } => shadow.end_flush(begun),
            Kind::Trim => shadow.trim(request.range),
            Kind::Read => {}
        }
        Ok(())
    }

    // The large events.

    /// The engine dies. The host starts another, prepares the wrapped keys again, and tells it the mode if it has to keep
    /// one; if that fails, it starts yet another. Whoever holds a keyslot finds it empty.
    fn restart(&mut self) -> Step {
        self.seen.restarts += 1;
        let mut spec = self.spec;
        if let EngineSpec::Ice(ice) = &mut spec {
            ice.faults.commit_fail = match self.host.admission.mode() {
                admission::Mode::Committed(_) => self.random.percent(10),
                // The next one is better, or nobody would ever see that it is asked again.
                admission::Mode::Poisoned(_) => {
                    self.seen.cures += 1;
                    false
                }
                _ => ice.faults.commit_fail,
            };
        }
        loop {
            self.start_engine(&spec)?;
            let mut actions = Vec::new();
            self.host.admission.restarted(&mut actions);
            let Some(admission::Action::Commit { key_type }) = actions.pop() else { break };
            let exclusive = self.host.engine.exclusive().ok_or("an engine for both types was to switch")?;
            let ok = exclusive.commit(key_type).is_ok();
            let mut actions = Vec::new();
            self.host.admission.switched(ok, &mut actions);
            self.answer(actions)?;
            if ok {
                break;
            }
            self.seen.failed_restarts += 1;
            if let EngineSpec::Ice(ice) = &mut spec {
                ice.faults.commit_fail = false;
            }
        }
        self.reset_happened();
        Ok(())
    }

    fn start_engine(&mut self, spec: &EngineSpec) -> Step {
        let engine = or_say(open(spec, Some(root())), "starting the engine again")?;
        for volume in &mut self.volumes {
            if volume.key_type() == KeyType::HardwareWrapped && volume.key.is_some() {
                // The handle stays; the keyslots do not notice.
                let key = make_key(&volume.stored, volume.unit_size, &*engine);
                volume.key = Some(or_say(key, "preparing a good blob again")?);
            }
        }
        self.host.engine = engine;
        Ok(())
    }

    /// Everything in memory is gone; the disks keep what they flushed, and of the rest what they like.
    fn power_cut(&mut self) -> Step {
        self.seen.power_cuts += 1;
        for request in self.host.requests.values().filter(|request| request.is_at_media) {
            if let Kind::Write { cipher, .. } = &request.kind {
                // What was on the way may have got there, sector by sector.
                for (sector, content) in request.range.clone().zip(cipher.chunks_exact(SECTOR)) {
                    if self.random.percent(50) {
                        let disk = &self.volumes[request.volume].disk;
                        or_say(
                            disk.write((sector * SECTOR) as u64, content, Durability::Cached),
                            "the disk",
                        )?;
                    }
                }
            }
        }
        for number in 0..self.volumes.len() {
            self.volumes[number].disk.cut_power(&mut self.random);
            let found = self.decrypt(number)?;
            let checked = self.volumes[number].shadow.check_after_power_cut(&found);
            checked.map_err(|sector| {
                format!("after a power cut, sector {sector} of volume {number} is wrong")
            })?;
        }
        self.seen.answers += self.host.requests.len() as u64;
        let mode = self.host.admission.mode().clone();
        self.events.clear();
        self.host = Self::boot(&self.spec, self.policy);
        // The owner may have declared the mode; else who comes first decides anew.
        if let (admission::Mode::Committed(lock), true) = (mode, self.random.percent(50)) {
            let mut actions = Vec::new();
            let applicant = self.host.admission.declare(lock.key_type, Timestamp(self.now + 1), &mut actions);
            self.host.applicants.insert(applicant, None);
            self.answer(actions)?;
        }
        for number in 0..self.volumes.len() {
            let volume = &mut self.volumes[number];
            (volume.state, volume.key, volume.handle) = (Opening::Closed, None, None);
            (volume.refusals, volume.evictions) = (0, 0);
            let after = self.soon(100);
            self.schedule(after, Event::Open(number));
        }
        Ok(())
    }

    /// The whole volume, through the other engine.
    fn decrypt(&self, number: usize) -> Step<Vec<u8>> {
        let volume = &self.volumes[number];
        let (engine, key) = match volume.stored {
            Stored::Raw(_) => (&self.software, KeyRef::Inline(&volume.oracle)),
            Stored::Wrapped(_) => {
                (&self.oracle, KeyRef::Slot(SlotIndex(u32::try_from(number).expect("few"))))
            }
        };
        let mut memory = or_say(engine.memory().allocate(SECTORS * SECTOR), "memory")?;
        or_say(volume.disk.read(0, memory.bytes_mut()), "the disk")?;
        let crypted =
            engine.crypt_range(key, Direction::Decrypt, volume.dun(0), &mut *memory, 0..SECTORS * SECTOR);
        or_say(crypted, "the other engine")?;
        Ok(memory.bytes().to_vec())
    }
}

fn make_key(stored: &Stored, unit_size: DataUnitSize, engine: &dyn Engine) -> Result<Arc<Key>, Error> {
    let form = match (stored, engine.key_ladder()) {
        (Stored::Raw(raw), _) => KeyForm::Raw(RawKey::new(raw)),
        (Stored::Wrapped(long_term), Some(ladder)) => KeyForm::Wrapped(ladder.prepare(long_term)?),
        (Stored::Wrapped(_), None) => unreachable!("asked before"),
    };
    Ok(Key::new(Mode::Aes256Xts, unit_size, 4, form, Hardware::Allowed).expect("a good key"))
}

/// The words of a client: recognisable if they are ever seen where they must not be.
fn client_data(volume: usize, request: u64, sectors: &Range<usize>) -> Vec<u8> {
    let words = sectors.clone().flat_map(|sector| {
        (0..SECTOR / 16).flat_map(move |place| {
            let mut word = [0; 16];
            word[..8].copy_from_slice(&PLAINTEXT);
            word[8..12].copy_from_slice(&u32::try_from(request).expect("few").to_le_bytes());
            word[12] = u8::try_from(volume).expect("few");
            word[13] = u8::try_from(sector).expect("few");
            word[14] = u8::try_from(place).expect("few");
            word
        })
    });
    words.collect()
}
