//! What decides: ours, called as it is, and the designs it is compared with.
//!
//! The two traits are the smallest common language in which one model can drive all of them. For ours they translate names
//! and nothing else.

use super::model::EngineMode;
use inlinecrypt_core::admission::{
    self, AdmissionTable, Applicant, Application, DECLARED, Hold, Lock, Mode, Reason, Refusal, ServedBy,
    Timestamp,
};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::engine::SlotIndex;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::keyslot::table::{
    self, Acquired, EvictOutcome, Grant, KeyslotTable, Programmed, Ticket,
};
use inlinecrypt_core::keyslot::{Policy, Priority};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::hash::Hash;

/// When an exclusive engine is switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// When a key is admitted.
    AtAdmission,
    /// When a key is first programmed, which is during I/O.
    AtFirstProgram,
}

/// Who asked the keyslots for something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Who {
    /// A layer's request in one of its seats.
    Request(u8, u8),
    /// A layer's eviction.
    Eviction(u8),
}

/// What a [`Gate`] wants done or says.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// Switch the engine, for this layer.
    Commit(KeyType, u8),
    /// The layer is admitted.
    Admit(u8, ServedBy),
    /// The layer is refused.
    Refuse(u8, Refused),
}

/// Why a layer is refused: what the refusal names.
#[derive(Clone, Copy, Debug)]
pub enum Refused {
    /// The engine serves this type, because of this layer.
    Locked(KeyType, u8),
    /// Switching it to this type for this layer failed.
    Poisoned(KeyType, u8),
    /// So many keys are pinned.
    NoPinLeft(u32),
    /// A reason that cannot be, or a text that does not say it.
    Unlawful,
    /// A design without promises says no.
    Otherwise,
}

/// Decides whether a key may be used.
pub trait Gate: Clone + Debug + Eq + Hash + Send + Sync + 'static {
    /// When the engine is switched.
    const SWITCH: Switch;
    /// Whether it promises anything about the keys that it admits. Who promises nothing is not held to it; the lost write
    /// is found all the same.
    const PROMISES: bool;
    /// How an admission comes about, for stories.
    const ADMITS: &str;

    /// For an engine with so many keyslots.
    fn new(keyslots: u32, is_exclusive: bool) -> Self;
    /// A layer sets up its key; the engine is in this mode.
    fn apply(&mut self, layer: u8, application: Application, engine: EngineMode, answers: &mut Vec<Answer>);
    /// Somebody declares the mode.
    fn declare(&mut self, _: u8, _: KeyType, _: Timestamp, _: &mut Vec<Answer>) {}
    /// The engine has switched, or could not.
    fn switched(&mut self, _: bool, _: &mut Vec<Answer>) {}
    /// The engine was started again, and has not been told its mode.
    fn restarted(&mut self, _: &mut Vec<Answer>) {}
    /// A layer drops its admission. Whether it was the key's last.
    fn leave(&mut self, key: KeyId, hold: Hold) -> bool;
    /// Whether a keyslot is reserved for the key.
    fn is_pinned(&self, _: KeyId) -> bool {
        false
    }
    /// The mode, if it keeps one.
    fn mode(&self) -> Option<&Mode> {
        None
    }
    /// How many keys it has registered and pinned, if it counts them.
    fn reserved(&self) -> Option<(usize, usize)> {
        None
    }
    /// Its own invariants.
    fn check(&self) {}
}

/// What [`Slots`] want done or say.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Program.
    Program {
        /// The keyslot.
        slot: u32,
        /// The key.
        key: KeyId,
        /// For whom.
        by: Option<Who>,
    },
    /// Evict.
    Evict {
        /// The keyslot.
        slot: u32,
        /// The key.
        key: KeyId,
    },
    /// A request that waited has its keyslot.
    Grant {
        /// The request.
        who: Who,
        /// What it got.
        grant: Grant,
    },
    /// A request that waited fails.
    Fail {
        /// The request.
        who: Who,
    },
    /// An eviction is over.
    Evicted {
        /// The eviction.
        who: Who,
        /// How it ended.
        outcome: EvictOutcome,
    },
}

/// Decides which key is in which keyslot, and who waits.
pub trait Slots: Clone + Debug + Eq + Hash + Send + Sync + 'static {
    /// Whether it promises an order and retries.
    const PROMISES: bool;

    /// So many empty keyslots.
    fn new(count: u32, policy: Policy) -> Self;
    /// A request wants a keyslot with this key. What it is granted at once; else it waits.
    fn acquire(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) -> Option<Grant>;
    /// A request gives its keyslot back.
    fn release(&mut self, grant: Grant, orders: &mut Vec<Order>);
    /// A request says that its keyslot holds nothing.
    fn lost(&mut self, grant: Grant);
    /// An owner wants a key out.
    fn evict(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>);
    /// The engine is done programming.
    fn programmed(&mut self, slot: u32, outcome: Programmed, orders: &mut Vec<Order>);
    /// The engine is done evicting.
    fn evicted(&mut self, slot: u32, ok: bool, orders: &mut Vec<Order>);
    /// The engine was reset.
    fn reset(&mut self, orders: &mut Vec<Order>);
    /// A key is pinned, or not any more.
    fn set_pinned(&mut self, _: KeyId, _: bool, _: &mut Vec<Order>) {}
    /// How urgent a key's requests are.
    fn set_priority(&mut self, _: KeyId, _: Priority) {}
    /// Its own invariants.
    fn check(&self) {}
}

/// The framework's own [`AdmissionTable`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OurGate {
    table: AdmissionTable,
    waiting: BTreeMap<Applicant, u8>,
}

impl OurGate {
    fn translate(
        &mut self,
        actions: Vec<admission::Action>,
        asks: Option<(Applicant, u8)>,
        answers: &mut Vec<Answer>,
    ) {
        self.waiting.extend(asks);
        let mut layer_of = |applicant| self.waiting.remove(&applicant).unwrap_or(u8::MAX - 1);
        for action in actions {
            answers.push(match action {
                // Recorded under whoever's admission the engine is being switched for.
                admission::Action::Commit { key_type } => match self.table.mode() {
                    Mode::Switching(lock) => Answer::Commit(key_type, layer_in(lock)),
                    _ => Answer::Commit(key_type, u8::MAX - 1),
                },
                admission::Action::Admit { applicant, served_by } => {
                    Answer::Admit(layer_of(applicant), served_by)
                }
                admission::Action::Refuse { applicant, reason } => {
                    Answer::Refuse(layer_of(applicant), read_refusal(reason))
                }
            });
        }
    }
}

/// The layer that a lock names, as the model labels them; the time has to be that layer's, too.
fn layer_in(lock: &Lock) -> u8 {
    let layer = match lock.by.strip_prefix("layer ") {
        Some(number) => number.parse().unwrap_or(u8::MAX - 1),
        None if lock.by == DECLARED => super::model::DECLARED,
        None => u8::MAX - 1,
    };
    if lock.since == Timestamp(u64::from(layer) + 1) { layer } else { u8::MAX - 1 }
}

/// What a refusal names. Its text has to name that, too: the engine, what is locked, by whom.
fn read_refusal(reason: Reason) -> Refused {
    let refused = match &reason {
        Reason::Locked(lock) => Refused::Locked(lock.key_type, layer_in(lock)),
        Reason::Poisoned(lock) => Refused::Poisoned(lock.key_type, layer_in(lock)),
        Reason::NoPinLeft { pinned, .. } => Refused::NoPinLeft(*pinned),
        _ => Refused::Unlawful,
    };
    let words = match &reason {
        Reason::Locked(lock) | Reason::Poisoned(lock) => vec![lock.by.clone(), lock.key_type.to_string()],
        Reason::NoPinLeft { pinned, keyslots } => vec![pinned.to_string(), keyslots.to_string()],
        _ => Vec::new(),
    };
    let text = Refusal::new("the-engine", reason).to_string();
    let says_it = text.contains("the-engine") && words.iter().all(|word| text.contains(word));
    if says_it { refused } else { Refused::Unlawful }
}

impl Gate for OurGate {
    const SWITCH: Switch = Switch::AtAdmission;
    const PROMISES: bool = true;
    const ADMITS: &str = "is admitted";

    fn new(keyslots: u32, is_exclusive: bool) -> Self {
        Self { table: AdmissionTable::new(keyslots, is_exclusive), waiting: BTreeMap::new() }
    }

    fn apply(&mut self, layer: u8, application: Application, _: EngineMode, answers: &mut Vec<Answer>) {
        let mut actions = Vec::new();
        let applicant = self.table.apply(application, &mut actions);
        self.translate(actions, Some((applicant, layer)), answers);
    }

    fn declare(&mut self, layer: u8, key_type: KeyType, now: Timestamp, answers: &mut Vec<Answer>) {
        let mut actions = Vec::new();
        // The table gives declarations no time of their own to show; ours is the declarer's.
        let applicant = self.table.declare(key_type, now, &mut actions);
        self.translate(actions, Some((applicant, layer)), answers);
    }

    fn switched(&mut self, ok: bool, answers: &mut Vec<Answer>) {
        let mut actions = Vec::new();
        self.table.switched(ok, &mut actions);
        self.translate(actions, None, answers);
    }

    fn restarted(&mut self, answers: &mut Vec<Answer>) {
        let mut actions = Vec::new();
        self.table.restarted(&mut actions);
        self.translate(actions, None, answers);
    }

    fn leave(&mut self, key: KeyId, hold: Hold) -> bool {
        self.table.leave(key, hold)
    }

    fn is_pinned(&self, key: KeyId) -> bool {
        self.table.is_pinned(key)
    }

    fn mode(&self) -> Option<&Mode> {
        Some(self.table.mode())
    }

    fn reserved(&self) -> Option<(usize, usize)> {
        Some((self.table.len(), self.table.pinned() as usize))
    }

    fn check(&self) {
        self.table.check();
    }
}

/// The framework's own [`KeyslotTable`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OurSlots {
    table: KeyslotTable,
    waiting: BTreeMap<Ticket, Who>,
}

impl OurSlots {
    fn translate(&mut self, actions: Vec<table::Action>, orders: &mut Vec<Order>) {
        for action in actions {
            let waiting = &mut self.waiting;
            // A ticket that nobody holds becomes an eviction of nobody, which the model does not let pass.
            let nobody = Who::Eviction(u8::MAX);
            let mut answered = |ticket| waiting.remove(&ticket).unwrap_or(nobody);
            orders.push(match action {
                table::Action::Program { slot, key, by } => {
                    let by = by.map(|ticket| self.waiting.get(&ticket).copied().unwrap_or(nobody));
                    Order::Program { slot: slot.0, key, by }
                }
                table::Action::Evict { slot, key, .. } => Order::Evict { slot: slot.0, key },
                table::Action::Grant { ticket, grant } => Order::Grant { who: answered(ticket), grant },
                table::Action::Fail { ticket } => Order::Fail { who: answered(ticket) },
                table::Action::Evicted { ticket, outcome } => {
                    Order::Evicted { who: answered(ticket), outcome }
                }
                table::Action::WakeAt { .. } => unreachable!("nobody has told the time"),
            });
        }
    }
}

impl Slots for OurSlots {
    const PROMISES: bool = true;

    fn new(count: u32, policy: Policy) -> Self {
        Self { table: KeyslotTable::new(count, policy), waiting: BTreeMap::new() }
    }

    fn acquire(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) -> Option<Grant> {
        let mut actions = Vec::new();
        match self.table.acquire(key, &mut actions) {
            Acquired::Granted(grant) => Some(grant),
            Acquired::Queued(ticket) => {
                self.waiting.insert(ticket, who);
                self.translate(actions, orders);
                None
            }
        }
    }

    fn release(&mut self, grant: Grant, orders: &mut Vec<Order>) {
        let mut actions = Vec::new();
        self.table.release(grant, &mut actions);
        self.translate(actions, orders);
    }

    fn lost(&mut self, grant: Grant) {
        self.table.lost(grant);
    }

    fn evict(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) {
        let mut actions = Vec::new();
        let ticket = self.table.evict(key, &mut actions);
        self.waiting.insert(ticket, who);
        self.translate(actions, orders);
    }

    fn programmed(&mut self, slot: u32, outcome: Programmed, orders: &mut Vec<Order>) {
        let mut actions = Vec::new();
        self.table.programmed(SlotIndex(slot), outcome, &mut actions);
        self.translate(actions, orders);
    }

    fn evicted(&mut self, slot: u32, ok: bool, orders: &mut Vec<Order>) {
        let mut actions = Vec::new();
        self.table.evicted(SlotIndex(slot), ok, &mut actions);
        self.translate(actions, orders);
    }

    fn reset(&mut self, orders: &mut Vec<Order>) {
        let mut actions = Vec::new();
        self.table.reset(&mut actions);
        self.translate(actions, orders);
    }

    fn set_pinned(&mut self, key: KeyId, pinned: bool, orders: &mut Vec<Order>) {
        let mut actions = Vec::new();
        self.table.set_pinned(key, pinned, &mut actions);
        self.translate(actions, orders);
    }

    fn set_priority(&mut self, key: KeyId, priority: Priority) {
        self.table.set_priority(key, priority);
    }

    fn check(&self) {
        self.table.check();
    }
}

/// How many admissions each key has: what the designs without reservation keep, to know when to evict.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Users(BTreeMap<KeyId, u32>);

impl Users {
    fn add(&mut self, key: KeyId) {
        *self.0.entry(key).or_default() += 1;
    }

    fn remove(&mut self, key: KeyId) -> bool {
        let users = self.0.get_mut(&key).expect("only who came leaves");
        *users -= 1;
        let is_last = *users == 0;
        if is_last {
            self.0.remove(&key);
        }
        is_last
    }
}

/// Advertise both key types, and let the first key that is programmed decide.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AdvertiseBoth(Users);

impl Gate for AdvertiseBoth {
    const SWITCH: Switch = Switch::AtFirstProgram;
    const PROMISES: bool = false;
    const ADMITS: &str = "is admitted, since the engine advertises both types";

    fn new(_: u32, _: bool) -> Self {
        Self(Users::default())
    }

    fn apply(&mut self, layer: u8, application: Application, _: EngineMode, answers: &mut Vec<Answer>) {
        self.0.add(application.key);
        answers.push(Answer::Admit(layer, ServedBy::Engine));
    }

    fn leave(&mut self, key: KeyId, _: Hold) -> bool {
        self.0.remove(key)
    }
}

/// Look at what the engine serves when a key is set up, and reserve nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CheckOnly(Users);

impl Gate for CheckOnly {
    const SWITCH: Switch = Switch::AtFirstProgram;
    const PROMISES: bool = false;
    const ADMITS: &str = "is admitted, since a look at the engine finds nothing against it";

    fn new(_: u32, _: bool) -> Self {
        Self(Users::default())
    }

    fn apply(&mut self, layer: u8, application: Application, engine: EngineMode, answers: &mut Vec<Answer>) {
        let serves = matches!(engine, EngineMode::Both | EngineMode::Undecided)
            || engine == EngineMode::One(application.key_type);
        answers.push(if serves {
            self.0.add(application.key);
            Answer::Admit(layer, ServedBy::Engine)
        } else {
            Answer::Refuse(layer, Refused::Otherwise)
        });
    }

    fn leave(&mut self, key: KeyId, _: Hold) -> bool {
        self.0.remove(key)
    }
}

/// Linux's keyslots (`block/blk-crypto-profile.c`): the mapping is changed after a program that succeeded, so a failed one
/// leaves the victim's key mapped to a keyslot that does not hold it any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamSlots {
    /// Mapped key and references.
    slots: Vec<(Option<KeyId>, u32)>,
    /// Least recently used first.
    idle: VecDeque<u32>,
    /// Under the lock: what the engine is doing.
    busy: Option<Busy>,
    waiters: VecDeque<(Who, KeyId)>,
    evictions: VecDeque<(Who, KeyId)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Busy {
    Programs(Who, KeyId),
    Evicts(Who),
    /// After a reset, every mapped key in turn.
    Reprograms,
}

impl UpstreamSlots {
    fn find(&self, key: KeyId) -> Option<u32> {
        (0..).zip(&self.slots).find(|(_, (mapped, _))| *mapped == Some(key)).map(|(slot, _)| slot)
    }

    fn take(&mut self, slot: u32) -> Grant {
        self.idle.retain(|idle| *idle != slot);
        self.slots[slot as usize].1 += 1;
        Grant { slot: SlotIndex(slot), filling: 0 }
    }

    fn advance(&mut self, orders: &mut Vec<Order>) {
        while self.busy.is_none() {
            if let Some((who, key)) = self.evictions.pop_front() {
                match self.find(key) {
                    None => orders.push(Order::Evicted { who, outcome: EvictOutcome::Done }),
                    Some(slot) if self.slots[slot as usize].1 > 0 => {
                        orders.push(Order::Evicted { who, outcome: EvictOutcome::InUse });
                    }
                    Some(slot) => {
                        self.busy = Some(Busy::Evicts(who));
                        orders.push(Order::Evict { slot, key });
                    }
                }
            } else if let Some(place) = self.waiters.iter().position(|(_, key)| self.find(*key).is_some()) {
                let (who, key) = self.waiters.remove(place).expect("just found");
                let grant = self.take(self.find(key).expect("just found"));
                orders.push(Order::Grant { who, grant });
            } else if let (Some(&slot), Some(&(who, key))) = (self.idle.front(), self.waiters.front()) {
                self.waiters.pop_front();
                self.busy = Some(Busy::Programs(who, key));
                orders.push(Order::Program { slot, key, by: Some(who) });
            } else {
                return;
            }
        }
    }
}

impl Slots for UpstreamSlots {
    const PROMISES: bool = false;

    fn new(count: u32, _: Policy) -> Self {
        Self {
            slots: vec![(None, 0); count as usize],
            idle: (0..count).collect(),
            busy: None,
            waiters: VecDeque::new(),
            evictions: VecDeque::new(),
        }
    }

    fn acquire(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) -> Option<Grant> {
        if let (None, Some(slot)) = (self.busy, self.find(key)) {
            return Some(self.take(slot));
        }
        self.waiters.push_back((who, key));
        self.advance(orders);
        None
    }

    fn release(&mut self, grant: Grant, orders: &mut Vec<Order>) {
        let slot = grant.slot.0;
        self.slots[slot as usize].1 -= 1;
        if self.slots[slot as usize].1 == 0 {
            self.idle.push_back(slot);
        }
        self.advance(orders);
    }

    fn lost(&mut self, _: Grant) {}

    fn evict(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) {
        self.evictions.push_back((who, key));
        self.advance(orders);
    }

    fn programmed(&mut self, slot: u32, outcome: Programmed, orders: &mut Vec<Order>) {
        match self.busy.take() {
            Some(Busy::Programs(who, key)) if outcome == Programmed::Done => {
                // Only now does the former key lose its place.
                self.slots[slot as usize].0 = Some(key);
                let grant = self.take(slot);
                orders.push(Order::Grant { who, grant });
            }
            // The mapping is left as it was.
            Some(Busy::Programs(who, _)) => orders.push(Order::Fail { who }),
            Some(Busy::Reprograms) => {
                let next = (slot + 1..).zip(&self.slots[slot as usize + 1..]);
                let next = next.filter_map(|(slot, (mapped, _))| mapped.map(|key| (slot, key))).next();
                if let Some((slot, key)) = next {
                    self.busy = Some(Busy::Reprograms);
                    orders.push(Order::Program { slot, key, by: None });
                }
            }
            Some(Busy::Evicts(_)) | None => unreachable!("the engine was asked to program"),
        }
        self.advance(orders);
    }

    fn evicted(&mut self, slot: u32, ok: bool, orders: &mut Vec<Order>) {
        let Some(Busy::Evicts(who)) = self.busy.take() else { unreachable!("the engine was asked to evict") };
        self.slots[slot as usize].0 = None;
        let outcome = if ok { EvictOutcome::Done } else { EvictOutcome::EngineFailed };
        orders.push(Order::Evicted { who, outcome });
        self.advance(orders);
    }

    fn reset(&mut self, orders: &mut Vec<Order>) {
        let first = (0..).zip(&self.slots).find_map(|(slot, (mapped, _))| mapped.map(|key| (slot, key)));
        if let (None, Some((slot, key))) = (self.busy, first) {
            self.busy = Some(Busy::Reprograms);
            orders.push(Order::Program { slot, key, by: None });
        }
    }
}
