//! The keyslot table: a pure state machine. An event goes in, actions come out.
//!
//! It decides which key is in which keyslot, who waits, and what the engine has to do next; it never waits or calls
//! anything itself. [`Keyslots`](super::Keyslots) carries its actions out with threads; simulations and model checks
//! drive the very same code.
//!
//! ```text
//!             start program            programmed ok
//!   Empty ----------------> Programming -----------> Ready (users 0: idle, in LRU order | users > 0: in use)
//!     ^   <----------------      |                     |  |  reset                ^
//!     |    programmed failed     |                     |  `---> stale: same key   | programmed ok
//!     |                          |                     |        programmed again -'
//!     `--- evicted (also when the engine says it failed), displaced, lost
//! ```
//!
//! Invariants (checked by [`KeyslotTable::check`] in tests and models):
//! - a key is in at most one keyslot; a keyslot is found by key exactly while it is Ready or stale;
//! - a displaced key is forgotten *before* the program that displaces it starts, so a failed program leaves no stale
//!   mapping (upstream has this hole: facts 3.9);
//! - the engine has at most one program or evict to do at a time, and never for a keyslot in use, except to put the
//!   same key back after a reset;
//! - a pinned key is displaced by nobody, and at least one keyslot holds no pinned key;
//! - a granted keyslot holds the asked key until it is released or the engine reports it lost;
//! - an open keyslot is Ready and nobody waits: its users are counted outside, and nothing else happens until all are closed;
//! - a waiter is granted after at most as many others as waited before it, plus `bypass_max`, plus what the quanta of the
//!   keys in the keyslots let pass.
//!
//! # How long a request waits
//!
//! Time is told with [`KeyslotTable::at`]; a table that is never told any has no quanta. Let `p` be the time of a program
//! with its retries, `q` the quantum, `h` the longest that one request holds a keyslot, `b` the bypass bound. A keyslot
//! that holds a key nobody pinned can be taken from it at the latest `q` after it was programmed, when the requests granted
//! until then are done (`h`), and those that the bypass let pass (at most `b * h`). Programs come one after the other. So
//! the `n`th waiter for a key of its own (no key waits twice: waiters for one key are granted together, `bypass_max`
//! permitting) on `s` keyslots that are not pinned is granted within
//!
//! ```text
//!     ceil(n / s) * (q + (b + 1) * h) + n * p
//! ```
//!
//! and while all of `s` are busy, programs take at most the policy's share of each keyslot's time, since each is followed by
//! its quantum on that keyslot.

use super::lru::LruList;
use super::policy::{Order, Policy, Priority};
use crate::engine::SlotIndex;
use crate::key::KeyId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Who waits: unique in a table, in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The use of a keyslot by one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The keyslot that holds the asked key.
    pub slot: SlotIndex,
    /// Which filling of the keyslot it is: tells a late report of a loss from a new one.
    pub filling: u64,
}

/// The answer to [`KeyslotTable::acquire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// At once. To be given back with [`KeyslotTable::release`].
    Granted(Grant),
    /// An action will name this ticket.
    Queued(Ticket),
}

/// What the table wants done. Carried out in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Program `key` into `slot`, then report [`KeyslotTable::programmed`]. By the request that waits with `by`, or
    /// by whoever caused it (`None`: after a reset).
    Program {
        /// The keyslot.
        slot: SlotIndex,
        /// The key to put in.
        key: KeyId,
        /// The request that it is for.
        by: Option<Ticket>,
    },
    /// Tell the table the time ([`KeyslotTable::tick`]) at `at_ns`, unless something else happens to `ticket` before. It
    /// replaces what was asked before.
    WakeAt {
        /// The request at the head, which has most to gain.
        ticket: Ticket,
        /// When, in the nanoseconds of [`KeyslotTable::at`].
        at_ns: u64,
    },
    /// Evict `key` from `slot`, then report [`KeyslotTable::evicted`].
    Evict {
        /// The keyslot.
        slot: SlotIndex,
        /// The key in it.
        key: KeyId,
        /// Who asked for the eviction.
        by: Ticket,
    },
    /// The request that waits with `ticket` has its keyslot.
    Grant {
        /// The request.
        ticket: Ticket,
        /// What it got.
        grant: Grant,
    },
    /// The request that waits with `ticket` fails, since its key could not be programmed.
    Fail {
        /// The request.
        ticket: Ticket,
    },
    /// The eviction that was asked for with `ticket` is over.
    Evicted {
        /// The eviction.
        ticket: Ticket,
        /// How it ended.
        outcome: EvictOutcome,
    },
}

/// How an eviction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EvictOutcome {
    /// The key is in no keyslot. It may not have been in one: with more keys than keyslots that is normal.
    Done,
    /// Requests use the key or wait for it. It stays.
    InUse,
    /// The engine reported failure. The key is forgotten all the same.
    EngineFailed,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Programmed {
    /// The keyslot holds the key.
    Done,
    /// It is empty. May be tried again.
    Failed,
    /// It is empty, and the key can never be programmed. Not tried again.
    Rejected,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fill {
    Empty,
    /// `again`: the engine was reset meanwhile, so success means nothing.
    Programming {
        key: KeyId,
        by: Option<Ticket>,
        attempts: u32,
        again: bool,
    },
    Ready {
        key: KeyId,
    },
    /// The engine was reset: the keyslot has to be programmed again before anyone gets it.
    Stale {
        key: KeyId,
    },
    Evicting {
        key: KeyId,
        by: Ticket,
    },
    /// The engine lost the key while requests were granted: empty once they are gone.
    Lost {
        key: KeyId,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Slot {
    fill: Fill,
    users: u32,
    filling: u64,
    /// Until when its key keeps it while it has requests, in nanoseconds.
    quantum_end_ns: u64,
    /// Since when it is idle, in nanoseconds.
    idle_since_ns: u64,
    /// Whether its users are counted outside ([`KeyslotTable::open`]).
    is_open: bool,
}

/// What happened in one keyslot since the start. Counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotCounters {
    /// Grants that found the key there.
    pub hits: u64,
    /// Programs that succeeded.
    pub programs: u64,
    /// Programs that failed, retries included.
    pub program_failures: u64,
    /// Keys that had to leave: displaced by another or evicted by their owner.
    pub evictions: u64,
    /// Grants that had to wait for this keyslot to become idle or to be programmed.
    pub waits: u64,
}

/// One keyslot, for status displays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// The key in it, if any.
    pub key: Option<KeyId>,
    /// Requests that use it now.
    pub users: u32,
    /// What happened in it.
    pub counters: SlotCounters,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Waiter {
    ticket: Ticket,
    key: KeyId,
    /// Requests that came later and were granted before it.
    bypassed: u32,
}

/// What was counted, not what is: two tables that differ in it only behave the same, so they are equal.
#[derive(Clone, Debug)]
struct History(Vec<SlotCounters>);

impl PartialEq for History {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for History {}

impl std::hash::Hash for History {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

/// The keyslots of one engine. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeyslotTable {
    policy: Policy,
    slots: Vec<Slot>,
    counters: History,
    by_key: BTreeMap<KeyId, u32>,
    empty: LruList,
    idle: LruList,
    waiters: VecDeque<Waiter>,
    /// Keys that are not displaced. Fewer than there are keyslots: admission sees to that.
    pinned: BTreeSet<KeyId>,
    /// Keys that are not of normal priority.
    priorities: BTreeMap<KeyId, Priority>,
    /// Evictions that wait for the engine to be free.
    evictions: BTreeMap<Ticket, KeyId>,
    /// The keyslot for which the engine has something to do.
    engine_at: Option<u32>,
    /// How many keyslots are open.
    open: u32,
    last_ticket: u64,
    last_filling: u64,
    now_ns: u64,
    /// When the engine was given what it is doing.
    engine_since_ns: u64,
    /// How long a program takes: the average, the last ones counting most.
    program_ns: u64,
    /// What was last asked for with [`Action::WakeAt`].
    wake: Option<(Ticket, u64)>,
    /// Whom the upstream policy's race favours next.
    race: u64,
}

impl KeyslotTable {
    /// A table of `count` empty keyslots.
    ///
    /// # Panics
    ///
    /// If `count` is 0: an engine without keyslots needs no table.
    #[must_use]
    pub fn new(count: u32, policy: Policy) -> Self {
        assert!(count > 0, "an engine without keyslots needs no table");
        let slot = Slot {
            fill: Fill::Empty,
            users: 0,
            filling: 0,
            quantum_end_ns: 0,
            idle_since_ns: 0,
            is_open: false,
        };
        let mut empty = LruList::new(count);
        (0..count).for_each(|slot| empty.push_back(slot));
        Self {
            policy,
            slots: vec![slot; count as usize],
            counters: History(vec![SlotCounters::default(); count as usize]),
            by_key: BTreeMap::new(),
            empty,
            idle: LruList::new(count),
            waiters: VecDeque::new(),
            pinned: BTreeSet::new(),
            priorities: BTreeMap::new(),
            evictions: BTreeMap::new(),
            engine_at: None,
            open: 0,
            last_ticket: 0,
            last_filling: 0,
            now_ns: 0,
            engine_since_ns: 0,
            program_ns: 0,
            wake: None,
            race: 0,
        }
    }

    /// Tells the time, in nanoseconds since some fixed moment, before an event. Time that goes back is ignored.
    pub fn at(&mut self, now_ns: u64) -> &mut Self {
        self.now_ns = self.now_ns.max(now_ns);
        self
    }

    /// Whoever carries out a program begins with it now: what came before was a thread being woken, and does not count
    /// as the engine's time.
    pub fn engine_begins(&mut self, now_ns: u64) {
        self.at(now_ns);
        self.engine_since_ns = self.now_ns;
    }

    /// Nothing happened but time.
    pub fn tick(&mut self, actions: &mut Vec<Action>) {
        self.wake = None;
        self.advance(actions);
    }

    /// Whether the time makes a difference to the next event: if somebody waits, or is about to, for `key`.
    #[must_use]
    pub fn needs_time(&self, key: Option<KeyId>) -> bool {
        !self.waiters.is_empty() || key.is_some_and(|key| self.ready_slot(key).is_none())
    }

    /// A request wants a keyslot that holds `key`.
    ///
    /// Granted at once if the key is there and nobody has been passed too often; else queued.
    pub fn acquire(&mut self, key: KeyId, actions: &mut Vec<Action>) -> Acquired {
        if let Some(slot) = self.ready_slot(key).filter(|&slot| self.may_pass(slot)) {
            if !self.is_within_quantum(slot) {
                self.count_bypass(self.waiters.len());
            }
            self.counters.0[slot as usize].hits += 1;
            return Acquired::Granted(self.grant(slot));
        }
        let ticket = self.next_ticket();
        self.waiters.push_back(Waiter { ticket, key, bypassed: 0 });
        self.advance(actions);
        Acquired::Queued(ticket)
    }

    /// The keyslot that a request for `key` would be granted at once, since the key is there and nobody waits.
    #[must_use]
    pub fn hit(&self, key: KeyId) -> Option<SlotIndex> {
        self.waiters.is_empty().then(|| self.ready_slot(key).map(SlotIndex)).flatten()
    }

    /// Lets the caller count the users of a keyslot that [hits](Self::hit), and returns how many there are. He grants and
    /// releases it himself, and [closes](Self::close) it before anything else happens to the table than an
    /// [`acquire`](Self::acquire) that hits another keyslot.
    ///
    /// # Panics
    ///
    /// If it is open already, or would not hit.
    pub fn open(&mut self, slot: SlotIndex) -> u32 {
        let at = &mut self.slots[slot.0 as usize];
        assert!(matches!(at.fill, Fill::Ready { .. }) && self.waiters.is_empty(), "only what hits is opened");
        assert!(!std::mem::replace(&mut at.is_open, true), "keyslot {slot} is open already");
        self.open += 1;
        self.idle.remove(slot.0);
        std::mem::take(&mut self.slots[slot.0 as usize].users)
    }

    /// The keyslot has so many users, and was granted `hits` times, since it was opened. Of several that have no users, the
    /// one that was used longest ago is closed first.
    ///
    /// # Panics
    ///
    /// If it is not open.
    pub fn close(&mut self, slot: SlotIndex, users: u32, hits: u64) {
        let at = &mut self.slots[slot.0 as usize];
        assert!(std::mem::replace(&mut at.is_open, false), "keyslot {slot} is not open");
        at.users = users;
        self.open -= 1;
        self.counters.0[slot.0 as usize].hits += hits;
        if users == 0 {
            self.slots[slot.0 as usize].idle_since_ns = self.now_ns;
            self.idle.push_back(slot.0);
        }
    }

    /// A granted request is done with its keyslot.
    ///
    /// # Panics
    ///
    /// If the keyslot is not in use.
    pub fn release(&mut self, grant: Grant, actions: &mut Vec<Action>) {
        self.assert_closed();
        let index = grant.slot.0;
        let slot = &mut self.slots[index as usize];
        slot.users = slot.users.checked_sub(1).expect("only a granted keyslot is released");
        if slot.users > 0 {
            return;
        }
        slot.idle_since_ns = self.now_ns;
        match slot.fill {
            Fill::Ready { .. } => self.idle.push_back(index),
            Fill::Lost { .. } => self.make_empty(index),
            // Being programmed again after a reset: idle when that is over.
            Fill::Stale { .. } | Fill::Programming { .. } => {}
            Fill::Empty | Fill::Evicting { .. } => {
                unreachable!("a keyslot in use is not empty or being evicted")
            }
        }
        if !self.waiters.is_empty() {
            self.advance(actions);
        }
    }

    /// The engine says that a granted keyslot holds no key. The request still has to release it, and may then ask
    /// again. A report about an earlier filling is ignored: the key has been put back since, or is about to be.
    pub fn lost(&mut self, grant: Grant) {
        self.assert_closed();
        let slot = &mut self.slots[grant.slot.0 as usize];
        let Fill::Ready { key } = slot.fill else { return };
        if slot.filling != grant.filling {
            return;
        }
        // The reporter uses it, so it is not idle, and becomes empty with the last release.
        slot.fill = Fill::Lost { key };
        self.by_key.remove(&key);
    }

    /// The owner wants `key` out of the engine. An action ends it.
    pub fn evict(&mut self, key: KeyId, actions: &mut Vec<Action>) -> Ticket {
        let ticket = self.next_ticket();
        self.evictions.insert(ticket, key);
        self.advance(actions);
        ticket
    }

    /// Whether `key`, once it has a keyslot, keeps it against others.
    ///
    /// # Panics
    ///
    /// If no keyslot would be left to the others: whoever admits pins must not let that happen.
    pub fn set_pinned(&mut self, key: KeyId, pinned: bool, actions: &mut Vec<Action>) {
        if pinned {
            self.pinned.insert(key);
            assert!(self.pinned.len() < self.slots.len(), "one keyslot stays free");
        } else if self.pinned.remove(&key) {
            self.advance(actions);
        }
    }

    /// How urgent the requests of `key` are.
    pub fn set_priority(&mut self, key: KeyId, priority: Priority) {
        match priority {
            Priority::Normal => self.priorities.remove(&key),
            Priority::Low | Priority::High => self.priorities.insert(key, priority),
        };
    }

    /// How long a request for `key` would wait by and large, in nanoseconds, judged by those that wait now and by how
    /// long programs take: the bound of the module's documentation, without what cannot be known.
    #[must_use]
    pub fn expected_wait_ns(&self, key: KeyId) -> u64 {
        if self.ready_slot(key).is_some() && self.waiters.is_empty() {
            return 0;
        }
        let keys: BTreeSet<_> =
            self.waiters.iter().map(|waiter| waiter.key).filter(|&other| other != key).collect();
        let ahead = keys.len() as u64;
        self.assert_closed();
        let free = self.empty.front().is_some() || self.idle.front().is_some();
        if ahead == 0 && free {
            return self.program_ns;
        }
        let keyslots = (self.slots.len() - self.pinned.len()).max(1) as u64;
        let rounds = (ahead + 1).div_ceil(keyslots);
        let quantum = self.policy.quantum_ns(self.program_ns);
        rounds.saturating_mul(quantum).saturating_add((ahead + 1).saturating_mul(self.program_ns))
    }

    /// The engine has carried out [`Action::Program`].
    ///
    /// # Panics
    ///
    /// If no program was asked for this keyslot.
    pub fn programmed(&mut self, slot: SlotIndex, outcome: Programmed, actions: &mut Vec<Action>) {
        let index = slot.0;
        assert_eq!(self.engine_at.take(), Some(index), "the engine was not asked to program this keyslot");
        let Fill::Programming { key, by, attempts, again } = self.slots[index as usize].fill else {
            unreachable!("the engine was not asked to program this keyslot");
        };
        if outcome == Programmed::Done {
            self.counters.0[index as usize].programs += 1;
        } else {
            self.counters.0[index as usize].program_failures += 1;
        }
        match outcome {
            Programmed::Done if again => self.start_program(index, key, by, attempts, actions),
            Programmed::Done => {
                let took_ns = self.now_ns - self.engine_since_ns;
                self.program_ns =
                    if self.program_ns == 0 { took_ns } else { (7 * self.program_ns + took_ns) / 8 };
                let quantum_ns = self.policy.quantum_ns(self.program_ns);
                let slot = &mut self.slots[index as usize];
                slot.fill = Fill::Ready { key };
                slot.quantum_end_ns = self.now_ns.saturating_add(quantum_ns);
                slot.idle_since_ns = self.now_ns;
                self.by_key.insert(key, index);
                match by {
                    Some(ticket) => {
                        self.counters.0[index as usize].waits += 1;
                        let grant = self.grant(index);
                        actions.push(Action::Grant { ticket, grant });
                    }
                    None if self.slots[index as usize].users == 0 => self.idle.push_back(index),
                    None => {}
                }
            }
            Programmed::Failed if attempts <= self.policy.program_retries => {
                self.start_program(index, key, by, attempts + 1, actions);
            }
            Programmed::Failed | Programmed::Rejected => {
                if self.slots[index as usize].users > 0 {
                    self.slots[index as usize].fill = Fill::Lost { key };
                } else {
                    self.make_empty(index);
                }
                actions.extend(by.map(|ticket| Action::Fail { ticket }));
                // The others that wait for this key would only fail one by one.
                self.waiters.retain(|waiter| {
                    if waiter.key == key {
                        actions.push(Action::Fail { ticket: waiter.ticket });
                    }
                    waiter.key != key
                });
            }
        }
        self.advance(actions);
    }

    /// The engine has carried out [`Action::Evict`]. The keyslot is empty, whatever it says.
    ///
    /// # Panics
    ///
    /// If no eviction was asked for this keyslot.
    pub fn evicted(&mut self, slot: SlotIndex, ok: bool, actions: &mut Vec<Action>) {
        let index = slot.0;
        assert_eq!(self.engine_at.take(), Some(index), "the engine was not asked to evict from this keyslot");
        let Fill::Evicting { by, .. } = self.slots[index as usize].fill else {
            unreachable!("the engine was not asked to evict from this keyslot");
        };
        self.make_empty(index);
        let outcome = if ok { EvictOutcome::Done } else { EvictOutcome::EngineFailed };
        actions.push(Action::Evicted { ticket: by, outcome });
        self.advance(actions);
    }

    /// The engine was reset: all keyslots are empty. Every key that was in one is programmed again, those in use too.
    pub fn reset(&mut self, actions: &mut Vec<Action>) {
        self.assert_closed();
        for (index, slot) in (0..).zip(&mut self.slots) {
            match &mut slot.fill {
                Fill::Ready { key } => {
                    slot.fill = Fill::Stale { key: *key };
                    self.idle.remove(index);
                }
                Fill::Programming { again, .. } => *again = true,
                Fill::Empty | Fill::Stale { .. } | Fill::Evicting { .. } | Fill::Lost { .. } => {}
            }
        }
        self.advance(actions);
    }

    /// How many requests wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// All keyslots, for status displays.
    #[must_use]
    pub fn status(&self) -> Vec<SlotStatus> {
        self.assert_closed();
        let key_of = |fill: &Fill| match *fill {
            Fill::Ready { key } | Fill::Stale { key } => Some(key),
            Fill::Programming { key, .. } | Fill::Evicting { key, .. } => Some(key),
            Fill::Empty | Fill::Lost { .. } => None,
        };
        let slots = self.slots.iter().zip(&self.counters.0);
        slots
            .map(|(slot, counters)| SlotStatus {
                key: key_of(&slot.fill),
                users: slot.users,
                counters: *counters,
            })
            .collect()
    }

    /// Asserts the invariants of the module's documentation. For tests and models.
    ///
    /// # Panics
    ///
    /// If one does not hold.
    pub fn check(&self) {
        assert_eq!(self.open as usize, self.slots.iter().filter(|slot| slot.is_open).count());
        assert!(self.open == 0 || self.waiters.is_empty(), "nobody waits while a keyslot is open");
        let (idle, empty): (Vec<_>, Vec<_>) = (self.idle.iter().collect(), self.empty.iter().collect());
        let mut engine_ops = 0;
        for (index, slot) in (0..).zip(&self.slots) {
            let (mut is_idle, mut is_empty) = (false, false);
            match slot.fill {
                Fill::Empty => {
                    assert_eq!(slot.users, 0, "an empty keyslot has no users");
                    is_empty = true;
                }
                Fill::Ready { key } => {
                    assert_eq!(self.by_key.get(&key), Some(&index), "a filled keyslot is found by its key");
                    is_idle = slot.users == 0 && !slot.is_open;
                }
                Fill::Stale { key } => assert_eq!(self.by_key.get(&key), Some(&index)),
                Fill::Programming { key, by, .. } => {
                    engine_ops += 1;
                    assert_eq!(self.engine_at, Some(index));
                    assert!(by.is_none() || slot.users == 0, "only a reset programs a keyslot in use");
                    assert_eq!(self.by_key.get(&key), None, "a key is not found before it is programmed");
                }
                Fill::Evicting { .. } => {
                    engine_ops += 1;
                    assert_eq!((self.engine_at, slot.users), (Some(index), 0));
                }
                Fill::Lost { .. } => assert!(slot.users > 0, "a lost keyslot without users is empty"),
            }
            assert_eq!(idle.contains(&index), is_idle, "keyslot {index} idle");
            assert_eq!(empty.contains(&index), is_empty, "keyslot {index} empty");
        }
        assert_eq!(engine_ops, usize::from(self.engine_at.is_some()));
        for (&key, &index) in &self.by_key {
            let fill = self.slots[index as usize].fill;
            assert!(fill == Fill::Ready { key } || fill == Fill::Stale { key }, "{key:?} leads to {fill:?}");
        }
        for pair in self.waiters.iter().collect::<Vec<_>>().windows(2) {
            assert!(pair[0].ticket < pair[1].ticket && pair[0].bypassed >= pair[1].bypassed);
        }
        assert!(self.waiters.iter().all(|waiter| waiter.bypassed <= self.policy.bypass_max));
        if self.engine_at.is_none() && !self.waiters.is_empty() {
            assert!(
                (self.victim().is_none() || self.wake.is_some()) && empty.is_empty(),
                "nobody waits while a keyslot and the engine are free"
            );
        }
    }

    fn next_ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        Ticket(self.last_ticket)
    }

    fn ready_slot(&self, key: KeyId) -> Option<u32> {
        let &slot = self.by_key.get(&key)?;
        matches!(self.slots[slot as usize].fill, Fill::Ready { .. }).then_some(slot)
    }

    fn grant(&mut self, index: u32) -> Grant {
        self.idle.remove(index);
        let slot = &mut self.slots[index as usize];
        assert!(!slot.is_open, "keyslot {index} is closed before the table grants it");
        slot.users += 1;
        Grant { slot: SlotIndex(index), filling: slot.filling }
    }

    fn make_empty(&mut self, index: u32) {
        self.slots[index as usize].fill = Fill::Empty;
        self.empty.push_back(index);
    }

    fn start_program(
        &mut self,
        index: u32,
        key: KeyId,
        by: Option<Ticket>,
        attempts: u32,
        actions: &mut Vec<Action>,
    ) {
        self.last_filling += 1;
        let slot = &mut self.slots[index as usize];
        slot.filling = self.last_filling;
        slot.fill = Fill::Programming { key, by, attempts, again: false };
        self.engine_at = Some(index);
        self.engine_since_ns = self.now_ns;
        actions.push(Action::Program { slot: SlotIndex(index), key, by });
    }

    fn assert_closed(&self) {
        assert_eq!(self.open, 0, "keyslots are closed before anything else happens");
    }

    /// Grants and starts whatever can be granted and started now.
    fn advance(&mut self, actions: &mut Vec<Action>) {
        self.assert_closed();
        self.grant_waiters(actions);
        if self.engine_at.is_some() {
            return;
        }
        // What the engine does next: first what a reset took away, since granted requests need it; then what owners
        // want out; then the waiter at the head.
        let stale = (0..).zip(&self.slots).find_map(|(index, slot)| match slot.fill {
            Fill::Stale { key } => Some((index, key)),
            _ => None,
        });
        if let Some((index, key)) = stale {
            self.by_key.remove(&key);
            self.start_program(index, key, None, 1, actions);
            return;
        }
        while let Some((ticket, key)) = self.evictions.pop_first() {
            if self.start_eviction(ticket, key, actions) {
                return;
            }
        }
        self.program_for_head(actions);
    }

    /// Grants waiters whose key is in a keyslot, in order, as long as nobody is passed too often.
    fn grant_waiters(&mut self, actions: &mut Vec<Action>) {
        let mut next = 0;
        while let Some(waiter) = self.waiters.get(next) {
            let ready = self.ready_slot(waiter.key);
            let Some(index) = ready.filter(|&index| next == 0 || self.may_pass(index)) else {
                next += 1;
                continue;
            };
            let waiter = self.waiters.remove(next).expect("just looked at");
            if !self.is_within_quantum(index) {
                self.count_bypass(next);
            }
            let counters = &mut self.counters.0[index as usize];
            counters.hits += 1;
            counters.waits += 1;
            let grant = self.grant(index);
            actions.push(Action::Grant { ticket: waiter.ticket, grant });
        }
    }

    /// The first `count` waiters are passed by one that came later.
    fn count_bypass(&mut self, count: usize) {
        self.waiters
            .iter_mut()
            .take(count)
            .for_each(|passed| passed.bypassed = passed.bypassed.saturating_add(1));
    }

    /// Whether a request for the key in this keyslot may be granted before those that wait.
    fn may_pass(&self, index: u32) -> bool {
        let patient = |head: &Waiter| head.bypassed < self.policy.bypass_max;
        self.waiters.front().is_none_or(patient) || self.is_within_quantum(index)
    }

    fn is_within_quantum(&self, index: u32) -> bool {
        self.now_ns < self.slots[index as usize].quantum_end_ns
    }

    /// Until when an idle keyslot is kept for its key's next request, if it is.
    fn kept_until(&self, index: u32) -> Option<u64> {
        let slot = &self.slots[index as usize];
        let patience_ns = slot.idle_since_ns.saturating_add(self.program_ns);
        let until = slot.quantum_end_ns.min(patience_ns);
        (self.program_ns >= self.policy.anticipation_min_ns && self.now_ns < until).then_some(until)
    }

    /// Whether the engine has something to do for it.
    fn start_eviction(&mut self, ticket: Ticket, key: KeyId, actions: &mut Vec<Action>) -> bool {
        let awaited = self.waiters.iter().any(|waiter| waiter.key == key);
        let draining = self.slots.iter().any(|slot| slot.fill == Fill::Lost { key });
        let outcome = match self.by_key.get(&key).copied() {
            _ if awaited || draining => EvictOutcome::InUse,
            Some(index) if self.slots[index as usize].users > 0 => EvictOutcome::InUse,
            Some(index) => {
                self.idle.remove(index);
                self.by_key.remove(&key);
                self.counters.0[index as usize].evictions += 1;
                self.slots[index as usize].fill = Fill::Evicting { key, by: ticket };
                self.engine_at = Some(index);
                actions.push(Action::Evict { slot: SlotIndex(index), key, by: ticket });
                return true;
            }
            None => EvictOutcome::Done,
        };
        actions.push(Action::Evicted { ticket, outcome });
        false
    }

    /// The idle keyslot to take the key from: not pinned, not kept, of the lowest priority, used longest ago.
    fn victim(&self) -> Option<u32> {
        let free = self.displaceable().filter(|&(index, _)| self.kept_until(index).is_none());
        free.min_by_key(|&(_, priority)| priority).map(|(index, _)| index)
    }

    /// Idle keyslots whose key is not pinned, used longest ago first, with the key's priority.
    fn displaceable(&self) -> impl Iterator<Item = (u32, Priority)> + '_ {
        self.idle.iter().filter_map(|index| match self.slots[index as usize].fill {
            Fill::Ready { key } => (!self.pinned.contains(&key)).then(|| (index, self.priority(key))),
            _ => unreachable!("an idle keyslot is ready"),
        })
    }

    fn priority(&self, key: KeyId) -> Priority {
        self.priorities.get(&key).copied().unwrap_or_default()
    }

    /// Which waiter goes next.
    fn pick(&mut self) -> usize {
        if self.policy.order == Order::Upstream {
            // Whoever gets the lock: as good as random, and repeatable (the constants are Knuth's MMIX).
            self.race =
                self.race.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let waiting = self.waiters.len() as u64;
            return usize::try_from((self.race >> 33) % waiting).expect("less than a length");
        }
        let patient = self.waiters[0].bypassed < self.policy.bypass_max;
        if self.priorities.is_empty() || !patient {
            return 0;
        }
        let most_urgent =
            self.waiters.iter().enumerate().rev().max_by_key(|(_, waiter)| self.priority(waiter.key));
        most_urgent.map_or(0, |(place, _)| place)
    }

    /// Programs the key of the waiter that goes next into an empty keyslot, else into the victim.
    fn program_for_head(&mut self, actions: &mut Vec<Action>) {
        let Some(first) = self.waiters.front().map(|head| head.ticket) else { return };
        let Some(index) = self.empty.front().or_else(|| self.victim()) else {
            let kept = self.displaceable().filter_map(|(index, _)| self.kept_until(index)).min();
            let wake = kept.map(|at_ns| (first, at_ns));
            if wake.is_some() && wake != self.wake {
                actions.extend(wake.map(|(ticket, at_ns)| Action::WakeAt { ticket, at_ns }));
            }
            self.wake = wake;
            return;
        };
        let place = self.pick();
        let head = self.waiters.remove(place).expect("one that waits");
        self.count_bypass(place);
        self.empty.remove(index);
        self.idle.remove(index);
        // Forget the displaced key first: whatever becomes of the program, it is not there any more.
        if let Fill::Ready { key: displaced } = self.slots[index as usize].fill {
            self.by_key.remove(&displaced);
            self.counters.0[index as usize].evictions += 1;
        }
        self.start_program(index, head.key, Some(head.ticket), 1, actions);
    }
}
