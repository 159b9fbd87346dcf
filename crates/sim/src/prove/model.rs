//! The world around the tables: upper layers that set up keys, write back in the background and leave; an engine to which
//! everything happens that happens to engines; and the host between them, reduced to what it tells whom, and when.
//!
//! Every step calls the state machines that decide ([`Gate`], [`Slots`]), carries out what they want done, and compares with
//! what the engine really holds. A promise that breaks is written into the state, which ends that history.
//!
//! What is not atomic in the profile is not atomic here: a switch, a program, an evict each take from one step to another,
//! the tables hear of a reset after it happened, a request finds an empty keyslot in one step and reports it in another.

use super::design::{Answer, Gate, Order, Refused, Slots, Switch, Who};
use inlinecrypt_core::admission::{Application, Hold, Mode, ServedBy, Timestamp};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::keyslot::table::{EvictOutcome, Grant, Programmed};
use inlinecrypt_core::keyslot::{Policy, Priority};
use std::collections::BTreeSet;
use std::marker::PhantomData;

/// How an upper layer may ask for its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ask {
    /// Whether it wants a keyslot of its own.
    pub hold: Hold,
    /// Whether software may serve it.
    pub fallback: bool,
}

impl Ask {
    /// To be known, by the engine alone.
    pub const PLAIN: Self = Self { hold: Hold::Register, fallback: false };
    /// With a keyslot of its own.
    pub const PIN: Self = Self { hold: Hold::Pin, fallback: false };
    /// With software as a way out.
    pub const FALLBACK: Self = Self { hold: Hold::Register, fallback: true };
}

/// An upper layer: a filesystem, a volume.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    /// Which key. Layers may share one.
    pub key: u64,
    /// Its type.
    pub key_type: KeyType,
    /// How urgent its requests are.
    pub priority: Priority,
    /// How it may ask: each is tried.
    pub asks: Vec<Ask>,
    /// How often it sets up its key.
    pub admissions: u8,
    /// Requests in all.
    pub requests: u8,
    /// Requests at once.
    pub in_flight: u8,
    /// Evictions by hand, while it may have requests under way.
    pub evictions: u8,
}

impl LayerPlan {
    /// One that sets up its key once and has so many requests, one at a time.
    #[must_use]
    pub fn new(key: u64, key_type: KeyType, requests: u8) -> Self {
        Self {
            key,
            key_type,
            priority: Priority::Normal,
            asks: vec![Ask::PLAIN],
            admissions: 1,
            requests,
            in_flight: 1,
            evictions: 0,
        }
    }
}

/// How often each thing may go wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// Programs that fail.
    pub program_failures: u8,
    /// Programs that the engine rejects for good.
    pub rejections: u8,
    /// Switches that fail.
    pub switch_failures: u8,
    /// Evictions that fail.
    pub evict_failures: u8,
    /// Keyslots that the engine loses, one each.
    pub losses: u8,
    /// Resets.
    pub resets: u8,
    /// Restarts: keyslots and mode are gone.
    pub restarts: u8,
}

/// What is explored.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For people.
    pub name: &'static str,
    /// Keyslots of the engine.
    pub keyslots: u32,
    /// Whether it serves one key type only.
    pub is_exclusive: bool,
    /// The keyslots' policy.
    pub policy: Policy,
    /// Whether somebody may declare the mode, and to what.
    pub declares: Option<KeyType>,
    /// Whether every history begins with all keys admitted, each in its first way. For engines that take both types.
    pub starts_set_up: bool,
    /// The upper layers.
    pub layers: Vec<LayerPlan>,
    /// What may go wrong.
    pub faults: Faults,
}

/// What an upper layer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It has no key set up.
    Outside,
    /// It waits for the answer.
    Asked(Ask),
    /// Its key is admitted; the keyslots have not been told of its pin yet.
    Untold(Ask),
    /// Its key is admitted.
    Admitted(Ask),
    /// Its key is served by software: not the engine's business.
    InSoftware,
    /// It drops its admission and waits until the key is out.
    Leaving,
}

/// A request, or room for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seat {
    /// Nothing.
    Free,
    /// Waits for a keyslot.
    Waiting,
    /// Has one.
    Granted(Grant),
    /// Found that the keyslot holds nothing, and is about to say so.
    FoundEmpty(Grant),
}

/// An upper layer at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layer {
    /// What it is about.
    pub phase: Phase,
    /// Its requests under way.
    pub seats: Vec<Seat>,
    admissions_left: u8,
    requests_left: u8,
    evictions_left: u8,
    /// An eviction by hand is under way.
    is_evicting: bool,
}

/// Which key types an engine takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineMode {
    /// All.
    Both,
    /// It has not been told.
    Undecided,
    /// One.
    One(KeyType),
    /// None: a switch failed.
    Poisoned,
}

impl EngineMode {
    fn serves(self, key_type: KeyType) -> bool {
        self == Self::Both || self == Self::One(key_type)
    }
}

/// What the engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// Programs.
    Program {
        /// The keyslot.
        slot: u32,
        /// The key.
        key: KeyId,
        /// The request that it is for.
        by: Option<Who>,
        /// Which attempt it is.
        attempt: u8,
    },
    /// Evicts.
    Evict {
        /// The keyslot.
        slot: u32,
        /// The key.
        key: KeyId,
    },
}

/// The engine as it really is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EngineModel {
    /// What each keyslot holds.
    pub slots: Vec<Option<KeyId>>,
    /// Key types.
    pub mode: EngineMode,
    /// What it is doing.
    pub work: Option<Work>,
    switching: Option<KeyType>,
    /// A reset came while it was programming.
    is_overtaken: bool,
    /// Keyslots that it lost without anybody having heard.
    untold: Vec<bool>,
    /// A reset of which the host has not heard.
    reset_untold: bool,
    /// It died, and the next one has not started.
    is_down: bool,
    /// It was started again, and has not been told its mode: it programs nothing yet.
    is_returning: bool,
    /// It is the one before that was told to switch.
    switch_is_stale: bool,
}

impl EngineModel {
    /// Whether requests and programs have to wait for it.
    fn is_away(&self) -> bool {
        self.is_down || self.is_returning
    }
}

/// A request that waits for a keyslot, in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Waiting {
    who: Who,
    /// Who waited before it.
    ahead: u8,
    /// Requests granted before it.
    others: u8,
    /// Of these, those that came later.
    passed: u8,
    /// Its program has begun: nobody takes that from it.
    is_started: bool,
}

/// A promise that was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The engine refuses the type of an admitted key: what was to be written is lost.
    LostWrite(KeyId),
    /// A request was granted a keyslot that holds another key.
    WrongKey(u32),
    /// A request was granted a keyslot that holds no key, though the engine lost none.
    EmptyKeyslot(u32),
    /// The engine cannot serve the key that somebody holds an admission for.
    Shrunk,
    /// A refusal without cause, or that names the wrong one.
    BadRefusal,
    /// An admission that the engine or the fallback cannot keep.
    BadAdmission,
    /// What is reserved is not what is held.
    Reserved,
    /// A request was granted later than the documented number of others.
    TooLate,
    /// Somebody was answered who did not ask, or had been answered.
    Answered,
    /// A request failed though its key was not refused by the engine often enough.
    FailedEarly,
    /// The engine was told to touch a keyslot in use, a pinned key, or two things at once.
    Touched,
    /// A key was reported evicted and is in the engine, or in use and is not.
    Evicted,
    /// Somebody waits and nothing is under way.
    Stuck,
}

/// Everything, at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State<G, S> {
    /// What decides who is admitted.
    pub gate: G,
    /// What decides who has which keyslot.
    pub slots: S,
    /// The engine.
    pub engine: EngineModel,
    /// The upper layers.
    pub layers: Vec<Layer>,
    queue: Vec<Waiting>,
    /// Pins that the keyslots were told of.
    pinned: BTreeSet<KeyId>,
    /// What the mode was committed to, by whom.
    committed: Option<(KeyType, u8)>,
    is_declaring: bool,
    /// A declaration was accepted: it holds over restarts.
    is_declared: bool,
    declarations_left: u8,
    faults: Faults,
    /// The first promise that was broken.
    pub broken: Option<Broken>,
}

impl<G, S> State<G, S> {
    /// Whether a switch has failed, in this history or by the plan's bounds in none.
    pub(super) fn has_failed_to_switch(&self) -> bool {
        self.faults.switch_failures == 0
    }
}

/// What may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A layer sets up its key, in one of its ways.
    SetUp(u8, u8),
    /// Somebody declares the mode.
    Declare,
    /// The engine has switched, or could not.
    Switched(bool),
    /// The profile tells the keyslots of a layer's pin.
    TellPin(u8),
    /// A layer writes something back: it asks for a keyslot.
    Write(u8),
    /// A request does its work and gives the keyslot back, or finds the keyslot empty.
    Use(u8, u8),
    /// A request reports the empty keyslot, gives it back and asks again.
    Report(u8, u8),
    /// A layer drops its admission.
    Leave(u8),
    /// A layer evicts its key by hand.
    Evict(u8),
    /// The engine is done programming. The key got in: decided here for a program that a reset overtook.
    Programmed(Programmed, bool),
    /// The engine is done evicting, and says how it went.
    Evicted(bool),
    /// The engine is reset.
    Reset,
    /// The host hears of it.
    HearReset,
    /// The engine dies.
    Restart,
    /// The next one has been started, and the wrapped keys were prepared again. The table says what to tell it.
    Restarted,
    /// The engine loses a keyslot.
    Lose(u32),
}

/// The model of one design in one plan.
#[derive(Clone, Debug)]
pub struct World<G, S> {
    /// What is explored.
    pub plan: Plan,
    design: PhantomData<fn() -> (G, S)>,
}

/// Whose number a declaration has where layers have theirs.
pub(super) const DECLARED: u8 = u8::MAX;

fn count(faults: &mut u8) {
    *faults -= 1;
}

impl<G: Gate, S: Slots> World<G, S> {
    /// The model of this plan.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self { plan, design: PhantomData }
    }

    /// Where every history begins.
    #[must_use]
    pub fn start(&self) -> State<G, S> {
        let plan = &self.plan;
        let mut slots = S::new(plan.keyslots, plan.policy);
        for layer in &plan.layers {
            slots.set_priority(KeyId::for_simulation(layer.key), layer.priority);
        }
        let layer = |layer: &LayerPlan| Layer {
            phase: Phase::Outside,
            seats: vec![Seat::Free; layer.in_flight.into()],
            admissions_left: layer.admissions,
            requests_left: layer.requests,
            evictions_left: layer.evictions,
            is_evicting: false,
        };
        let state = State {
            gate: G::new(plan.keyslots, plan.is_exclusive),
            slots,
            engine: EngineModel {
                slots: vec![None; plan.keyslots as usize],
                mode: if plan.is_exclusive { EngineMode::Undecided } else { EngineMode::Both },
                work: None,
                switching: None,
                is_overtaken: false,
                untold: vec![false; plan.keyslots as usize],
                reset_untold: false,
                is_down: false,
                is_returning: false,
                switch_is_stale: false,
            },
            layers: plan.layers.iter().map(layer).collect(),
            queue: Vec::new(),
            pinned: BTreeSet::new(),
            committed: None,
            is_declaring: false,
            is_declared: false,
            declarations_left: u8::from(plan.declares.is_some()),
            faults: plan.faults,
            broken: None,
        };
        let layers =
            0..if plan.starts_set_up { u8::try_from(plan.layers.len()).expect("few layers") } else { 0 };
        layers.fold(state, |state, layer| {
            let state = self.after(&state, Step::SetUp(layer, 0));
            match state.layers[usize::from(layer)].phase {
                Phase::Untold(_) => self.after(&state, Step::TellPin(layer)),
                _ => state,
            }
        })
    }

    /// A layer's key.
    #[must_use]
    pub fn key(&self, layer: u8) -> KeyId {
        KeyId::for_simulation(self.plan.layers[usize::from(layer)].key)
    }

    pub(super) fn key_type(&self, key: KeyId) -> KeyType {
        let layer = self.plan.layers.iter().find(|layer| layer.key == key.number());
        layer.expect("every key is some layer's").key_type
    }

    /// What may happen next.
    pub fn steps(&self, state: &State<G, S>, steps: &mut Vec<Step>) {
        if state.broken.is_some() {
            return;
        }
        let engine = &state.engine;
        let number = |index: usize| u8::try_from(index).expect("few layers");
        for (index, (layer, plan)) in state.layers.iter().zip(&self.plan.layers).enumerate() {
            let index = number(index);
            let is_idle = layer.seats.iter().all(|seat| *seat == Seat::Free) && !layer.is_evicting;
            match layer.phase {
                Phase::Outside if layer.admissions_left > 0 => {
                    steps.extend((0..plan.asks.len()).map(|ask| Step::SetUp(index, number(ask))));
                }
                Phase::Untold(_) => steps.push(Step::TellPin(index)),
                Phase::Admitted(_) => {
                    if layer.requests_left > 0 && layer.seats.contains(&Seat::Free) {
                        steps.push(Step::Write(index));
                    }
                    if layer.evictions_left > 0 && !layer.is_evicting {
                        steps.push(Step::Evict(index));
                    }
                    if is_idle {
                        steps.push(Step::Leave(index));
                    }
                }
                Phase::InSoftware => steps.push(Step::Leave(index)),
                Phase::Outside | Phase::Asked(_) | Phase::Leaving => {}
            }
            for (seat, content) in layer.seats.iter().enumerate() {
                match content {
                    Seat::Granted(_) if !engine.is_away() => steps.push(Step::Use(index, number(seat))),
                    Seat::FoundEmpty(_) => steps.push(Step::Report(index, number(seat))),
                    Seat::Granted(_) | Seat::Free | Seat::Waiting => {}
                }
            }
        }
        if state.declarations_left > 0 {
            steps.push(Step::Declare);
        }
        if engine.reset_untold && !engine.is_away() {
            steps.push(Step::HearReset);
        }
        if engine.switching.is_some() {
            steps.push(Step::Switched(true));
            // One that died in between may say so instead.
            if state.faults.switch_failures > 0 || engine.is_down || engine.switch_is_stale {
                steps.push(Step::Switched(false));
            }
        }
        if engine.is_down {
            steps.push(Step::Restarted);
            return;
        }
        if engine.is_returning {
            if state.faults.restarts > 0 {
                steps.push(Step::Restart);
            }
            return;
        }
        match engine.work {
            Some(Work::Program { .. }) => {
                steps.push(Step::Programmed(Programmed::Done, true));
                if engine.is_overtaken {
                    steps.push(Step::Programmed(Programmed::Done, false));
                }
                if state.faults.program_failures > 0 {
                    steps.push(Step::Programmed(Programmed::Failed, false));
                }
                if state.faults.rejections > 0 {
                    steps.push(Step::Programmed(Programmed::Rejected, false));
                }
            }
            Some(Work::Evict { .. }) => {
                steps.push(Step::Evicted(true));
                if state.faults.evict_failures > 0 {
                    steps.push(Step::Evicted(false));
                }
            }
            None => {}
        }
        if state.faults.resets > 0 && !engine.reset_untold {
            steps.push(Step::Reset);
        }
        if state.faults.restarts > 0 {
            steps.push(Step::Restart);
        }
        if state.faults.losses > 0 {
            let held = (0..).zip(&engine.slots).filter(|(_, held)| held.is_some());
            steps.extend(held.map(|(slot, _)| Step::Lose(slot)));
        }
    }

    /// What comes of a step.
    #[must_use]
    pub fn after(&self, state: &State<G, S>, step: Step) -> State<G, S> {
        let mut next = state.clone();
        Turn { world: self, state: &mut next, finished: None, answers: Vec::new(), orders: Vec::new() }
            .take(step);
        next
    }
}

/// One step being taken.
struct Turn<'a, G: Gate, S: Slots> {
    world: &'a World<G, S>,
    state: &'a mut State<G, S>,
    /// The key that the engine is just done programming, how it went, and at which attempt.
    finished: Option<(KeyId, Programmed, u8)>,
    answers: Vec<Answer>,
    orders: Vec<Order>,
}

impl<G: Gate, S: Slots> Turn<'_, G, S> {
    fn broken(&mut self, what: Broken) {
        self.state.broken.get_or_insert(what);
    }

    fn expect(&mut self, holds: bool, else_broken: Broken) {
        if !holds {
            self.broken(else_broken);
        }
    }

    fn layer(&mut self, index: u8) -> &mut Layer {
        &mut self.state.layers[usize::from(index)]
    }

    fn take(mut self, step: Step) {
        match step {
            Step::SetUp(index, ask) => {
                let plan = &self.world.plan.layers[usize::from(index)];
                let ask = plan.asks[usize::from(ask)];
                let application = Application {
                    key: self.world.key(index),
                    key_type: plan.key_type,
                    hold: ask.hold,
                    fallback_ready: ask.fallback && plan.key_type == KeyType::Raw,
                    label: format!("layer {index}"),
                    now: Timestamp(u64::from(index) + 1),
                };
                let layer = self.layer(index);
                layer.admissions_left -= 1;
                layer.phase = Phase::Asked(ask);
                let mode = self.state.engine.mode;
                self.state.gate.apply(index, application, mode, &mut self.answers);
            }
            Step::Declare => {
                self.state.declarations_left = 0;
                self.state.is_declaring = true;
                let key_type = self.world.plan.declares.expect("only where the plan says so");
                let now = Timestamp(u64::from(DECLARED) + 1);
                self.state.gate.declare(DECLARED, key_type, now, &mut self.answers);
            }
            Step::Switched(ok) => self.switched(ok),
            Step::TellPin(index) => {
                let Phase::Untold(ask) = self.layer(index).phase else {
                    unreachable!("offered for these only")
                };
                self.layer(index).phase = Phase::Admitted(ask);
                self.update_pin(self.world.key(index));
            }
            Step::Write(index) => {
                let layer = self.layer(index);
                layer.requests_left -= 1;
                let seat = layer.seats.iter().position(|seat| *seat == Seat::Free).expect("offered if free");
                self.acquire(index, u8::try_from(seat).expect("few"));
            }
            Step::Use(index, seat) => self.use_keyslot(index, seat),
            Step::Report(index, seat) => {
                let Seat::FoundEmpty(grant) = *self.seat(index, seat) else {
                    unreachable!("offered for these only")
                };
                *self.seat(index, seat) = Seat::Free;
                self.state.slots.lost(grant);
                self.state.slots.release(grant, &mut self.orders);
                self.carry_out();
                self.acquire(index, seat);
            }
            Step::Leave(index) => self.leave(index),
            Step::Evict(index) => {
                let layer = self.layer(index);
                layer.evictions_left -= 1;
                layer.is_evicting = true;
                self.state.slots.evict(Who::Eviction(index), self.world.key(index), &mut self.orders);
            }
            Step::Programmed(outcome, got_in) => self.programmed(outcome, got_in),
            Step::Evicted(ok) => {
                let Some(Work::Evict { slot, .. }) = self.state.engine.work.take() else {
                    unreachable!("offered for these only")
                };
                if !ok {
                    count(&mut self.state.faults.evict_failures);
                }
                self.state.engine.slots[slot as usize] = None;
                self.state.slots.evicted(slot, ok, &mut self.orders);
            }
            Step::Reset => {
                count(&mut self.state.faults.resets);
                self.wipe();
            }
            Step::HearReset => self.hear_reset(),
            Step::Restart => {
                count(&mut self.state.faults.restarts);
                self.wipe();
                let engine = &mut self.state.engine;
                (engine.is_down, engine.is_returning) = (true, false);
                if engine.mode != EngineMode::Both {
                    engine.mode = EngineMode::Undecided;
                }
            }
            Step::Restarted => {
                let engine = &mut self.state.engine;
                (engine.is_down, engine.is_returning) = (false, true);
                engine.switch_is_stale = engine.switching.is_some();
                let is_bound = engine.switch_is_stale || self.held().0 > 0 || self.state.is_declared;
                self.state.committed = self.state.committed.filter(|_| is_bound);
                self.state.gate.restarted(&mut self.answers);
                self.carry_out();
                self.returned();
            }
            Step::Lose(slot) => {
                count(&mut self.state.faults.losses);
                self.state.engine.slots[slot as usize] = None;
                self.state.engine.untold[slot as usize] = true;
            }
        }
        self.carry_out();
        self.check();
    }

    fn switched(&mut self, ok: bool) {
        let engine = &mut self.state.engine;
        let key_type = engine.switching.take().expect("it was asked to");
        // What a dead engine says of itself changes nothing in the next one.
        if !std::mem::take(&mut engine.switch_is_stale) && !engine.is_down {
            if ok {
                engine.mode = EngineMode::One(key_type);
            } else {
                count(&mut self.state.faults.switch_failures);
                engine.mode = EngineMode::Poisoned;
            }
        }
        self.state.gate.switched(ok, &mut self.answers);
        self.carry_out();
        self.returned();
    }

    /// The engine is back once it is told all that it has to be told. If that fails while somebody holds an admission, the
    /// host starts the next one.
    fn returned(&mut self) {
        let engine = &mut self.state.engine;
        if !engine.is_returning || engine.switching.is_some() {
            return;
        }
        engine.is_returning = false;
        if engine.mode == EngineMode::Poisoned && self.held().0 > 0 {
            let engine = &mut self.state.engine;
            (engine.is_down, engine.mode) = (true, EngineMode::Undecided);
            return;
        }
        self.hear_reset();
    }

    fn seat(&mut self, index: u8, seat: u8) -> &mut Seat {
        &mut self.layer(index).seats[usize::from(seat)]
    }

    fn update_pin(&mut self, key: KeyId) {
        let is_pinned = self.state.gate.is_pinned(key);
        if is_pinned {
            self.state.pinned.insert(key);
        } else {
            self.state.pinned.remove(&key);
        }
        self.state.slots.set_pinned(key, is_pinned, &mut self.orders);
    }

    fn acquire(&mut self, index: u8, seat: u8) {
        let (who, key) = (Who::Request(index, seat), self.world.key(index));
        *self.seat(index, seat) = Seat::Waiting;
        match self.state.slots.acquire(who, key, &mut self.orders) {
            Some(grant) => self.granted(who, grant),
            None => {
                let ahead = u8::try_from(self.state.queue.len()).expect("few");
                self.state.queue.push(Waiting { who, ahead, others: 0, passed: 0, is_started: false });
            }
        }
    }

    /// The request's data goes through the engine, which uses whatever the keyslot holds.
    fn use_keyslot(&mut self, index: u8, seat: u8) {
        let Seat::Granted(grant) = *self.seat(index, seat) else { unreachable!("offered for these only") };
        match self.state.engine.slots[grant.slot.0 as usize] {
            Some(key) if key == self.world.key(index) => {
                *self.seat(index, seat) = Seat::Free;
                self.state.slots.release(grant, &mut self.orders);
            }
            Some(_) => self.broken(Broken::WrongKey(grant.slot.0)),
            None => *self.seat(index, seat) = Seat::FoundEmpty(grant),
        }
    }

    fn leave(&mut self, index: u8) {
        let key = self.world.key(index);
        let Phase::Admitted(ask) = self.layer(index).phase else {
            self.layer(index).phase = Phase::Outside;
            return;
        };
        let is_last = self.state.gate.leave(key, ask.hold);
        if ask.hold == Hold::Pin {
            self.update_pin(key);
        }
        if is_last {
            self.layer(index).phase = Phase::Leaving;
            self.carry_out();
            self.state.slots.evict(Who::Eviction(index), key, &mut self.orders);
        } else {
            self.layer(index).phase = Phase::Outside;
        }
    }

    fn programmed(&mut self, outcome: Programmed, got_in: bool) {
        let Some(Work::Program { slot, key, attempt, .. }) = self.state.engine.work.take() else {
            unreachable!("offered for these only")
        };
        let key_type = self.world.key_type(key);
        let engine = &mut self.state.engine;
        if engine.mode == EngineMode::Undecided && G::SWITCH == Switch::AtFirstProgram {
            engine.mode = EngineMode::One(key_type);
        }
        let serves = engine.mode.serves(key_type);
        let mut outcome = outcome;
        if serves {
            engine.untold[slot as usize] = outcome == Programmed::Done && !got_in;
            engine.slots[slot as usize] = (outcome == Programmed::Done && got_in).then_some(key);
        } else {
            // The engine does not take this type of key, and never will.
            outcome = Programmed::Rejected;
            // A key that is just leaving may still be under way to an engine that was started again; nobody misses it.
            let is_held = (0..).zip(&self.state.layers).any(|(index, layer)| {
                self.world.key(index) == key && matches!(layer.phase, Phase::Untold(_) | Phase::Admitted(_))
            });
            self.expect(!is_held, Broken::LostWrite(key));
        }
        match outcome {
            Programmed::Failed => count(&mut self.state.faults.program_failures),
            Programmed::Rejected if serves => count(&mut self.state.faults.rejections),
            Programmed::Done | Programmed::Rejected => {}
        }
        self.finished = Some((key, outcome, attempt));
        self.state.slots.programmed(slot, outcome, &mut self.orders);
    }

    fn wipe(&mut self) {
        let engine = &mut self.state.engine;
        for (held, untold) in engine.slots.iter_mut().zip(&mut engine.untold) {
            *untold |= held.take().is_some();
        }
        engine.reset_untold = true;
        engine.is_overtaken = matches!(engine.work, Some(Work::Program { .. }));
    }

    fn hear_reset(&mut self) {
        let engine = &mut self.state.engine;
        engine.reset_untold = false;
        engine.untold.fill(false);
        self.state.slots.reset(&mut self.orders);
    }

    fn carry_out(&mut self) {
        for answer in std::mem::take(&mut self.answers) {
            match answer {
                Answer::Commit(key_type, by) => {
                    let engine = &self.state.engine;
                    // Once a start. Who holds an admission, or declared it, keeps the next one to what it was.
                    let is_first = engine.switching.is_none()
                        && matches!(engine.mode, EngineMode::Undecided)
                        && self.state.committed.is_none_or(|committed| committed == (key_type, by));
                    self.expect(is_first, Broken::Touched);
                    self.state.committed = Some((key_type, by));
                    self.state.engine.switching = Some(key_type);
                }
                Answer::Admit(DECLARED, _) | Answer::Refuse(DECLARED, _) => {
                    self.state.is_declared |= matches!(answer, Answer::Admit(..));
                    let was_asked = std::mem::replace(&mut self.state.is_declaring, false);
                    self.expect(was_asked, Broken::Answered);
                }
                Answer::Admit(index, served_by) => self.admitted(index, served_by),
                Answer::Refuse(index, why) => self.refused(index, why),
            }
        }
        for order in std::mem::take(&mut self.orders) {
            match order {
                Order::Program { slot, key, by } => self.start_program(slot, key, by),
                Order::Evict { slot, key } => {
                    let is_used = self.users(slot).next().is_some();
                    self.expect(self.state.engine.work.is_none() && !is_used, Broken::Touched);
                    self.state.engine.work = Some(Work::Evict { slot, key });
                }
                Order::Grant { who, grant } => self.granted(who, grant),
                Order::Fail { who } => self.failed(who),
                Order::Evicted { who, outcome } => self.evicted(who, outcome),
            }
        }
    }

    /// Layers with a request in this keyslot.
    fn users(&self, slot: u32) -> impl Iterator<Item = u8> + '_ {
        (0..).zip(&self.state.layers).flat_map(move |(index, layer)| {
            let uses = move |seat: &&Seat| {
                matches!(seat, Seat::Granted(grant) | Seat::FoundEmpty(grant) if grant.slot.0 == slot)
            };
            layer.seats.iter().filter(uses).map(move |_| index)
        })
    }

    fn admitted(&mut self, index: u8, served_by: ServedBy) {
        let Phase::Asked(ask) = self.layer(index).phase else { return self.broken(Broken::Answered) };
        let key_type = self.world.plan.layers[usize::from(index)].key_type;
        let is_right = match served_by {
            ServedBy::Engine => {
                !G::PROMISES || self.state.engine.mode.serves(key_type) || self.state.engine.is_away()
            }
            ServedBy::Fallback => ask.fallback && key_type == KeyType::Raw,
        };
        self.expect(is_right, Broken::BadAdmission);
        self.layer(index).phase = match (served_by, ask.hold) {
            (ServedBy::Engine, Hold::Pin) => Phase::Untold(ask),
            (ServedBy::Engine, Hold::Register) => Phase::Admitted(ask),
            (ServedBy::Fallback, _) => Phase::InSoftware,
        };
    }

    fn refused(&mut self, index: u8, why: Refused) {
        let Phase::Asked(ask) = self.layer(index).phase else { return self.broken(Broken::Answered) };
        let key_type = self.world.plan.layers[usize::from(index)].key_type;
        let names_it =
            |key_type: KeyType, by: u8, state: &State<G, S>| state.committed == Some((key_type, by));
        let is_right = match why {
            Refused::Locked(locked, by) => {
                locked != key_type && names_it(locked, by, self.state) && !ask.fallback
            }
            Refused::Poisoned(locked, by) => {
                (self.state.engine.mode == EngineMode::Poisoned || self.state.engine.is_down)
                    && names_it(locked, by, self.state)
                    && !(ask.fallback && key_type == KeyType::Raw)
            }
            Refused::NoPinLeft(pinned) => {
                let (_, held) = self.held();
                ask.hold == Hold::Pin
                    && u32::try_from(held) == Ok(pinned)
                    && pinned + 1 >= self.world.plan.keyslots
            }
            Refused::Unlawful => false,
            // The designs without promises have their own reasons.
            Refused::Otherwise => !G::PROMISES,
        };
        self.expect(is_right, Broken::BadRefusal);
        self.layer(index).phase = Phase::Outside;
    }

    fn start_program(&mut self, slot: u32, key: KeyId, by: Option<Who>) {
        let world = self.world;
        let only_its_own = self.users(slot).all(|user| by.is_none() && world.key(user) == key);
        let engine = &self.state.engine;
        let displaced = engine.slots[slot as usize].filter(|displaced| *displaced != key);
        let stays = displaced.is_some_and(|displaced| self.state.pinned.contains(&displaced));
        let may = engine.work.is_none() && only_its_own && !stays;
        let attempt = match self.finished {
            Some((finished, Programmed::Failed, attempt)) if finished == key => attempt + 1,
            // A reset overtook it, so its success means nothing. Nor does it undo the failures before.
            Some((finished, Programmed::Done, attempt)) if finished == key => attempt,
            _ => 1,
        };
        self.expect(may, Broken::Touched);
        if let Some(by) = by {
            match self.state.queue.iter_mut().find(|waiting| waiting.who == by) {
                Some(waiting) => waiting.is_started = true,
                None => self.broken(Broken::Answered),
            }
        }
        // From here on the keyslot may hold anything, until the engine is done.
        let engine = &mut self.state.engine;
        engine.slots[slot as usize] = None;
        engine.untold[slot as usize] = false;
        engine.is_overtaken = false;
        engine.work = Some(Work::Program { slot, key, by, attempt });
    }

    fn granted(&mut self, who: Who, grant: Grant) {
        let Who::Request(index, seat) = who else { return self.broken(Broken::Answered) };
        let was_waiting = *self.seat(index, seat) == Seat::Waiting;
        self.expect(was_waiting, Broken::Answered);
        let slot = grant.slot.0 as usize;
        match self.state.engine.slots[slot] {
            Some(key) if key == self.world.key(index) => {}
            Some(_) => self.broken(Broken::WrongKey(grant.slot.0)),
            None if self.state.engine.untold[slot] => {}
            None => self.broken(Broken::EmptyKeyslot(grant.slot.0)),
        }
        let place = self.state.queue.iter().position(|waiting| waiting.who == who);
        if let Some(place) = place {
            self.state.queue.remove(place);
        }
        let bypass_max = self.world.plan.policy.bypass_max;
        let mut in_time = true;
        for (at, waiting) in
            self.state.queue.iter_mut().enumerate().filter(|(_, waiting)| !waiting.is_started)
        {
            waiting.others += 1;
            waiting.passed += u8::from(place.is_none_or(|place| at < place));
            in_time &= u32::from(waiting.passed) <= bypass_max
                && u32::from(waiting.others) <= u32::from(waiting.ahead) + bypass_max;
        }
        self.expect(in_time || !S::PROMISES, Broken::TooLate);
        *self.seat(index, seat) = Seat::Granted(grant);
    }

    fn failed(&mut self, who: Who) {
        let Who::Request(index, seat) = who else { return self.broken(Broken::Answered) };
        let was_waiting = *self.seat(index, seat) == Seat::Waiting;
        self.expect(was_waiting, Broken::Answered);
        let retries = self.world.plan.policy.program_retries;
        let may = match self.finished {
            Some((key, outcome, attempt)) => {
                key == self.world.key(index)
                    && outcome != Programmed::Done
                    && (outcome == Programmed::Rejected || u32::from(attempt) > retries || !S::PROMISES)
            }
            None => false,
        };
        self.expect(may, Broken::FailedEarly);
        self.state.queue.retain(|waiting| waiting.who != who);
        *self.seat(index, seat) = Seat::Free;
    }

    fn evicted(&mut self, who: Who, outcome: EvictOutcome) {
        let Who::Eviction(index) = who else { return self.broken(Broken::Answered) };
        let key = self.world.key(index);
        let is_used = (0..).zip(&self.state.layers).any(|(other, layer)| {
            self.world.key(other) == key && layer.seats.iter().any(|seat| *seat != Seat::Free)
        });
        let is_granted = (0..).zip(&self.state.layers).any(|(other, layer)| {
            self.world.key(other) == key && layer.seats.iter().any(|seat| matches!(seat, Seat::Granted(_)))
        });
        let is_there = self.state.engine.slots.contains(&Some(key));
        let is_right = match outcome {
            EvictOutcome::InUse => is_used,
            EvictOutcome::Done | EvictOutcome::EngineFailed => !is_granted && !is_there,
        };
        self.expect(is_right, Broken::Evicted);
        let layer = self.layer(index);
        if layer.phase == Phase::Leaving {
            layer.phase = Phase::Outside;
        } else {
            let was_asked = std::mem::replace(&mut layer.is_evicting, false);
            self.expect(was_asked, Broken::Answered);
        }
    }

    /// How many keys are held on the engine, and how many of them with a pin.
    fn held(&self) -> (usize, usize) {
        let held = |pinned: bool| {
            let layers = (0..).zip(&self.state.layers).filter(|(_, layer)| match layer.phase {
                Phase::Untold(ask) | Phase::Admitted(ask) => !pinned || ask.hold == Hold::Pin,
                Phase::Outside | Phase::Asked(_) | Phase::InSoftware | Phase::Leaving => false,
            });
            layers.map(|(index, _)| self.world.key(index)).collect::<BTreeSet<_>>().len()
        };
        (held(false), held(true))
    }

    /// What holds in every state.
    fn check(&mut self) {
        if self.state.broken.is_some() {
            return;
        }
        self.state.gate.check();
        self.state.slots.check();
        let state = &*self.state;
        let engine = &state.engine;
        if G::PROMISES {
            let serves_all =
                state.layers.iter().zip(&self.world.plan.layers).all(|(layer, plan)| match layer.phase {
                    Phase::Untold(_) | Phase::Admitted(_) => {
                        engine.is_away() || engine.mode.serves(plan.key_type)
                    }
                    Phase::Outside | Phase::Asked(_) | Phase::InSoftware | Phase::Leaving => true,
                });
            let is_committed = match state.gate.mode() {
                Some(Mode::Committed(lock)) => {
                    state.committed.is_some_and(|(key_type, _)| key_type == lock.key_type)
                }
                _ => true,
            };
            let reserved = state.gate.reserved().is_none_or(|reserved| reserved == self.held());
            self.expect(serves_all && is_committed, Broken::Shrunk);
            self.expect(reserved, Broken::Reserved);
        }
        let state = &*self.state;
        let engine = &state.engine;
        let seats = || state.layers.iter().flat_map(|layer| &layer.seats);
        let someone_waits = !state.queue.is_empty()
            || state.is_declaring
            || seats().any(|seat| *seat == Seat::Waiting)
            || state
                .layers
                .iter()
                .any(|layer| layer.is_evicting || matches!(layer.phase, Phase::Asked(_) | Phase::Leaving));
        let something_happens = engine.work.is_some()
            || engine.switching.is_some()
            || seats().any(|seat| matches!(seat, Seat::Granted(_) | Seat::FoundEmpty(_)));
        self.expect(!someone_waits || something_happens, Broken::Stuck);
    }
}
