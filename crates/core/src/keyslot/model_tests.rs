//! The keyslot table against a simple engine and a simple idea of fairness, for random histories.

use super::open::{OpenSlots, Opened, Share};
use super::table::{Acquired, Action, EvictOutcome, Grant, KeyslotTable, Programmed, Ticket};
use super::*;
use crate::engine::SlotIndex;
use crate::key::KeyId;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// What the outside world may do to a table. Numbers pick among what is there.
#[derive(Clone, Copy, Debug)]
enum Step {
    Acquire(u64),
    Release(usize),
    Lost(usize),
    Evict(u64),
    Pin(u64, bool),
    Reset,
    /// The engine finishes what it was asked for.
    Engine(Programmed),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u64..6).prop_map(Step::Acquire),
        6 => any::<usize>().prop_map(Step::Release),
        1 => any::<usize>().prop_map(Step::Lost),
        1 => (0u64..6).prop_map(Step::Evict),
        1 => (0u64..6, any::<bool>()).prop_map(|(key, pin)| Step::Pin(key, pin)),
        1 => Just(Step::Reset),
        6 => prop_oneof![
            6 => Just(Programmed::Done),
            1 => Just(Programmed::Failed),
            1 => Just(Programmed::Rejected)
        ]
        .prop_map(Step::Engine),
    ]
}

/// A request, from its arrival to its end.
#[derive(Debug)]
struct Waiting {
    key: KeyId,
    /// Who waited before it.
    ahead: usize,
    /// Later requests granted before it.
    passed: usize,
    /// Requests granted before it.
    others: usize,
    program_started: bool,
}

/// The table with all that surrounds it: an engine that keeps its bargain, requests, evictions.
struct World {
    table: KeyslotTable,
    policy: Policy,
    /// What each keyslot of the engine really holds.
    engine: Vec<Option<KeyId>>,
    todo: Option<Action>,
    /// A reset came while the engine was programming: it may have been before or after.
    overtaken: bool,
    granted: Vec<(KeyId, Grant)>,
    waiting: BTreeMap<Ticket, Waiting>,
    evicting: BTreeMap<Ticket, KeyId>,
    pinned: BTreeSet<KeyId>,
    failed: usize,
    /// Who counts the users of keyslots that need no decision. `None`: the table.
    open: Option<Open>,
}

struct Open {
    slots: OpenSlots,
    opened: Opened,
    whereabouts: BTreeMap<KeyId, Whereabouts>,
    shared: u64,
}

impl World {
    fn new(slots: u32, policy: Policy) -> Self {
        Self {
            table: KeyslotTable::new(slots, policy),
            policy,
            engine: vec![None; slots as usize],
            todo: None,
            overtaken: false,
            granted: Vec::new(),
            waiting: BTreeMap::new(),
            evicting: BTreeMap::new(),
            pinned: BTreeSet::new(),
            failed: 0,
            open: None,
        }
    }

    /// The same with keyslots that are opened whenever they can be.
    fn opening(self) -> Self {
        let slots = OpenSlots::new(u32::try_from(self.engine.len()).unwrap());
        let open = Open { slots, opened: Opened::default(), whereabouts: BTreeMap::new(), shared: 0 };
        Self { open: Some(open), ..self }
    }

    fn close_all(&mut self) {
        if let Some(Open { slots, opened, .. }) = &mut self.open {
            opened.close_all(slots, &mut self.table);
        }
    }

    /// Grants a keyslot that is open, or can be.
    fn try_open(&mut self, key: KeyId) -> Option<Grant> {
        let Open { slots, opened, whereabouts, shared } = self.open.as_mut()?;
        let whereabouts = whereabouts.entry(key).or_default();
        match slots.share(key, whereabouts) {
            Share::Yes(grant) => {
                *shared += 1;
                return Some(grant);
            }
            Share::Mistaken(_) => unreachable!("nothing happens meanwhile"),
            Share::No => {}
        }
        let slot = self.table.hit(key)?;
        whereabouts.note(slot);
        Some(opened.grant(slots, &mut self.table, slot, key))
    }

    fn release(&mut self, grant: Grant) {
        if self.open.as_ref().is_some_and(|open| open.slots.give_back(grant.slot)) {
            return;
        }
        self.close_all();
        let mut actions = Vec::new();
        self.table.release(grant, &mut actions);
        self.carry_out(actions);
    }

    fn acquire(&mut self, key: KeyId) {
        if let Some(grant) = self.try_open(key) {
            return self.grant(key, grant, None);
        }
        self.close_all();
        let mut actions = Vec::new();
        match self.table.acquire(key, &mut actions) {
            Acquired::Granted(grant) => {
                assert!(actions.is_empty());
                self.grant(key, grant, None);
            }
            Acquired::Queued(ticket) => {
                let ahead = self.waiting.len();
                self.waiting
                    .insert(ticket, Waiting { key, ahead, passed: 0, others: 0, program_started: false });
                self.carry_out(actions);
            }
        }
    }

    fn grant(&mut self, key: KeyId, grant: Grant, ticket: Option<Ticket>) {
        assert_eq!(self.engine[grant.slot.0 as usize], Some(key), "a granted keyslot holds the asked key");
        let bypass_max = self.policy.bypass_max as usize;
        for (other, waiting) in &mut self.waiting {
            if waiting.program_started {
                continue;
            }
            waiting.others += 1;
            assert!(waiting.others <= waiting.ahead + bypass_max, "granted later than the documented bound");
            if ticket.is_none_or(|ticket| *other < ticket) {
                waiting.passed += 1;
                assert!(waiting.passed <= bypass_max, "passed too often");
            }
        }
        self.granted.push((key, grant));
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Program { slot, key, by } => {
                    assert!(self.todo.is_none(), "the engine does one thing at a time");
                    let users = self.granted.iter().filter(|(_, grant)| grant.slot == slot);
                    for (user, _) in users {
                        assert_eq!((*user, by), (key, None), "a keyslot in use only gets its own key back");
                    }
                    let displaced = self.engine[slot.0 as usize];
                    let by_another = displaced.is_some_and(|displaced| displaced != key);
                    assert!(!(by_another && self.pinned.contains(&displaced.unwrap())), "a pinned key stays");
                    if let Some(by) = by {
                        let head = self.waiting.get_mut(&by).expect("it waits");
                        assert_eq!(head.key, key);
                        head.program_started = true;
                    }
                    // From here on the engine may hold anything: nobody may be granted this keyslot.
                    self.engine[slot.0 as usize] = None;
                    (self.todo, self.overtaken) = (Some(action), false);
                }
                Action::Evict { slot, key, by } => {
                    assert!(self.todo.is_none(), "the engine does one thing at a time");
                    assert!(self.granted.iter().all(|(_, grant)| grant.slot != slot));
                    assert_eq!(self.evicting[&by], key);
                    self.todo = Some(action);
                }
                Action::WakeAt { .. } => unreachable!("nobody has told the time"),
                Action::Grant { ticket, grant } => {
                    let waiting = self.waiting.remove(&ticket).expect("it waits");
                    self.grant(waiting.key, grant, Some(ticket));
                }
                Action::Fail { ticket } => {
                    self.waiting.remove(&ticket).expect("it waits");
                    self.failed += 1;
                }
                Action::Evicted { ticket, outcome } => {
                    let key = self.evicting.remove(&ticket).expect("it was asked for");
                    let granted = self.granted.iter().any(|(user, _)| *user == key);
                    let awaited = self.waiting.values().any(|waiting| waiting.key == key);
                    match outcome {
                        EvictOutcome::InUse => assert!(granted || awaited, "somebody uses it"),
                        // Who asks for the key after the eviction began programs it again.
                        EvictOutcome::Done | EvictOutcome::EngineFailed => {
                            assert!(!granted, "nobody uses it")
                        }
                    }
                }
            }
        }
        self.table.check();
    }

    fn engine_finishes(&mut self, outcome: Programmed) {
        if self.todo.is_none() {
            return;
        }
        self.close_all();
        let mut actions = Vec::new();
        match self.todo.take() {
            None => {}
            Some(Action::Program { slot, key, .. }) => {
                if outcome == Programmed::Done && !self.overtaken {
                    self.engine[slot.0 as usize] = Some(key);
                }
                self.table.programmed(slot, outcome, &mut actions);
            }
            Some(Action::Evict { slot, .. }) => {
                self.engine[slot.0 as usize] = None;
                self.table.evicted(slot, outcome == Programmed::Done, &mut actions);
            }
            Some(other) => unreachable!("{other:?}"),
        }
        self.carry_out(actions);
    }

    fn apply(&mut self, step: Step) {
        let key = |number| KeyId::for_simulation(number);
        let mut actions = Vec::new();
        match step {
            Step::Acquire(number) => self.acquire(key(number)),
            Step::Release(n) if !self.granted.is_empty() => {
                let (_, grant) = self.granted.swap_remove(n % self.granted.len());
                self.release(grant);
            }
            Step::Lost(n) if !self.granted.is_empty() => {
                // A request reports a loss. If the table takes it for news, the engine has really lost the key; else
                // it is a late report about a filling that was replaced since.
                let (_, grant) = self.granted.swap_remove(n % self.granted.len());
                self.close_all();
                self.table.lost(grant);
                if self.table.status()[grant.slot.0 as usize].key.is_none() {
                    self.engine[grant.slot.0 as usize] = None;
                }
                self.table.release(grant, &mut actions);
                self.carry_out(actions);
            }
            Step::Release(_) | Step::Lost(_) => {}
            Step::Evict(number) => {
                self.close_all();
                // What the shell does: the ticket is known before the actions are carried out.
                let ticket = self.table.evict(key(number), &mut actions);
                self.evicting.insert(ticket, key(number));
                self.carry_out(actions);
            }
            Step::Pin(number, pin) => {
                self.close_all();
                if pin && (self.pinned.len() + 1 < self.engine.len()) {
                    self.pinned.insert(key(number));
                } else {
                    self.pinned.remove(&key(number));
                }
                self.table.set_pinned(key(number), self.pinned.contains(&key(number)), &mut actions);
                self.carry_out(actions);
            }
            Step::Reset => {
                self.close_all();
                self.engine.fill(None);
                self.overtaken = true;
                self.table.reset(&mut actions);
                self.carry_out(actions);
            }
            Step::Engine(outcome) => self.engine_finishes(outcome),
        }
    }

    /// Everything that is under way comes to its end.
    fn drain(&mut self) {
        for _ in 0..10_000 {
            if self.todo.is_some() {
                self.engine_finishes(Programmed::Done);
            } else if self.granted.is_empty() {
                break;
            } else {
                self.apply(Step::Release(0));
            }
        }
        assert!(self.waiting.is_empty() && self.granted.is_empty(), "every request comes to its end");
        assert!(self.evicting.is_empty(), "every eviction comes to its end");
        assert_eq!(self.table.waiting(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Safety, order and progress hold for every history.
    #[test]
    fn every_history_is_safe_and_ends(
        slots in 1u32..4,
        bypass_max in 0u32..4,
        program_retries in 0u32..3,
        steps in proptest::collection::vec(step(), 0..120),
    ) {
        let mut world = World::new(slots, Policy { bypass_max, program_retries, ..Policy::default() });
        for step in steps {
            world.apply(step);
        }
        world.drain();
    }

    /// Users that are counted outside the table make no difference to anything it decides, shows or counts.
    #[test]
    fn opening_changes_nothing(
        slots in 1u32..4,
        bypass_max in 0u32..4,
        steps in proptest::collection::vec(step(), 0..120),
    ) {
        let policy = Policy { bypass_max, ..Policy::default() };
        let (mut world, mut opening) = (World::new(slots, policy), World::new(slots, policy).opening());
        for step in steps {
            world.apply(step);
            opening.apply(step);
            prop_assert_eq!(&opening.engine, &world.engine);
            prop_assert_eq!(&opening.granted, &world.granted);
            prop_assert_eq!(opening.todo, world.todo);
        }
        world.drain();
        opening.drain();
        opening.close_all();
        prop_assert_eq!(opening.table.status(), world.table.status());
        prop_assert_eq!(opening.table, world.table);
    }

    /// Without contention the table is least recently used, with empty keyslots first.
    #[test]
    fn without_contention_it_is_plain_lru(
        slots in 1u32..5,
        opens in any::<bool>(),
        uses in proptest::collection::vec(0u64..8, 0..100),
    ) {
        let world = World::new(slots, Policy::default());
        let mut world = if opens { world.opening() } else { world };
        let mut oracle: Vec<u64> = Vec::new();
        for number in uses {
            world.acquire(KeyId::for_simulation(number));
            let hit = oracle.contains(&number);
            prop_assert_eq!(world.todo.is_none(), hit, "programs exactly when the key is not there");
            world.engine_finishes(Programmed::Done);
            world.apply(Step::Release(0));
            oracle.retain(|&other| other != number);
            oracle.push(number);
            if oracle.len() > slots as usize {
                oracle.remove(0);
            }
            let held: BTreeSet<_> = world.engine.iter().flatten().map(|key| key.number()).collect();
            prop_assert_eq!(held, oracle.iter().copied().collect::<BTreeSet<_>>());
        }
    }
}

#[test]
fn a_key_that_is_used_again_is_found_without_the_table() {
    let mut world = World::new(2, Policy::default()).opening();
    for round in 0..5 {
        for number in [1, 2] {
            world.acquire(key(number));
            world.engine_finishes(Programmed::Done);
            world.apply(Step::Release(0));
        }
        // The first rounds program it and open it; from then on, nothing closes it.
        assert_eq!(world.open.as_ref().unwrap().shared, if round < 2 { 0 } else { (round - 1) * 2 });
    }
    world.close_all();
    let hits = world.table.status().iter().map(|slot| slot.counters.hits).sum::<u64>();
    assert_eq!(hits, 8);
}

fn key(number: u64) -> KeyId {
    KeyId::for_simulation(number)
}

#[test]
fn requests_for_one_key_share_its_keyslot() {
    let mut world = World::new(1, Policy::default());
    world.acquire(key(1));
    world.engine_finishes(Programmed::Done);
    world.acquire(key(1));
    world.acquire(key(1));
    assert_eq!(world.table.status()[0].users, 3);
    assert_eq!(world.table.status()[0].counters.programs, 1);
}

#[test]
fn an_emptied_keyslot_is_taken_before_a_live_one() {
    let mut world = World::new(2, Policy::default());
    for number in [1, 2] {
        world.acquire(key(number));
        world.engine_finishes(Programmed::Done);
        world.apply(Step::Release(0));
    }
    // Key 2 was used last, so plain LRU would displace key 1.
    world.apply(Step::Evict(2));
    world.engine_finishes(Programmed::Done);
    world.acquire(key(3));
    world.engine_finishes(Programmed::Done);
    assert_eq!(world.engine, [Some(key(1)), Some(key(3))]);
}

#[test]
fn a_displaced_key_is_not_found_after_the_program_that_displaced_it_failed() {
    let mut world = World::new(1, Policy { program_retries: 0, ..Policy::default() });
    world.acquire(key(1));
    world.engine_finishes(Programmed::Done);
    world.apply(Step::Release(0));
    world.acquire(key(2));
    world.engine_finishes(Programmed::Failed);
    assert_eq!(world.failed, 1);
    // Upstream would hit the keyslot here, which is blank. We program.
    world.acquire(key(1));
    assert!(matches!(world.todo, Some(Action::Program { .. })));
}

#[test]
fn a_failed_program_is_tried_again_and_then_fails_only_that_keys_requests() {
    let mut world = World::new(1, Policy::default());
    world.acquire(key(1));
    world.acquire(key(2));
    world.acquire(key(1));
    world.engine_finishes(Programmed::Failed);
    assert_eq!(world.failed, 0, "one retry first");
    world.engine_finishes(Programmed::Failed);
    assert_eq!(world.failed, 2, "both requests for key 1");
    world.engine_finishes(Programmed::Done);
    assert_eq!(world.granted.len(), 1);
    assert_eq!(world.granted[0].0, key(2));
}

#[test]
fn a_rejected_key_is_not_tried_again() {
    let mut world = World::new(1, Policy::default());
    world.acquire(key(1));
    world.engine_finishes(Programmed::Rejected);
    assert_eq!((world.failed, world.todo), (1, None));
}

#[test]
fn a_popular_key_cannot_keep_others_waiting() {
    let policy = Policy { bypass_max: 3, ..Policy::default() };
    let mut world = World::new(1, policy);
    world.acquire(key(1));
    world.engine_finishes(Programmed::Done);
    world.acquire(key(2));
    for _ in 0..10 {
        // There is always a request for key 1 in flight.
        world.acquire(key(1));
        world.apply(Step::Release(0));
    }
    assert_eq!(world.granted.len(), 0, "three were let past, the others queue behind");
    world.engine_finishes(Programmed::Done);
    assert_eq!(world.granted[0].0, key(2));
}

#[test]
fn eviction_in_use_reports_it_and_keeps_the_key() {
    let mut world = World::new(1, Policy::default());
    world.acquire(key(1));
    world.engine_finishes(Programmed::Done);
    world.apply(Step::Evict(1));
    assert_eq!(world.engine, [Some(key(1))]);
    world.apply(Step::Release(0));
    world.apply(Step::Evict(1));
    world.engine_finishes(Programmed::Failed);
    // The engine failed, and the key is forgotten all the same.
    world.acquire(key(1));
    assert!(matches!(world.todo, Some(Action::Program { .. })));
}

#[test]
fn evicting_a_key_that_is_in_no_keyslot_is_done_at_once() {
    let mut table = KeyslotTable::new(1, Policy::default());
    let mut actions = Vec::new();
    let ticket = table.evict(key(9), &mut actions);
    assert_eq!(actions, [Action::Evicted { ticket, outcome: EvictOutcome::Done }]);
}

#[test]
fn a_reset_programs_every_key_again_also_those_in_use() {
    let mut world = World::new(3, Policy::default());
    for number in [1, 2] {
        world.acquire(key(number));
        world.engine_finishes(Programmed::Done);
    }
    world.apply(Step::Release(0));
    world.apply(Step::Reset);
    assert_eq!(world.engine, [None, None, None]);
    world.engine_finishes(Programmed::Done);
    world.engine_finishes(Programmed::Done);
    assert_eq!(world.engine, [Some(key(1)), Some(key(2)), None]);
    assert_eq!(world.todo, None);
}

#[test]
fn a_late_report_of_a_loss_does_not_empty_a_keyslot_that_was_refilled() {
    let mut world = World::new(1, Policy::default());
    world.acquire(key(1));
    world.engine_finishes(Programmed::Done);
    world.acquire(key(1));
    let (_, old) = world.granted[0];
    world.apply(Step::Reset);
    world.engine_finishes(Programmed::Done);
    world.table.lost(old);
    world.table.check();
    assert_eq!(world.table.status()[0].key, Some(key(1)));
}

#[test]
fn a_program_that_a_reset_overtook_is_done_again() {
    let mut world = World::new(1, Policy::default());
    world.acquire(key(1));
    world.apply(Step::Reset);
    world.engine_finishes(Programmed::Done);
    assert!(matches!(world.todo, Some(Action::Program { .. })), "the first success means nothing");
    assert!(world.granted.is_empty());
    world.engine_finishes(Programmed::Done);
    assert_eq!(world.granted[0].1.slot, SlotIndex(0));
}
