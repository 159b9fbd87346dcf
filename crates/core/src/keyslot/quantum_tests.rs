//! Quanta, priorities and waits in virtual time: busy keys on few keyslots, with an engine that takes long to program.

use super::policy::{Order, Policy, Priority};
use super::table::{Acquired, Action, Grant, KeyslotTable, Programmed, Ticket};
use crate::engine::SlotIndex;
use crate::key::KeyId;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// What happens at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// Client `n` asks for its key.
    Ask(usize),
    Programmed(u32),
    /// Client `n` is done with its keyslot.
    Done(usize),
    Tick,
}

struct Client {
    key: KeyId,
    asked_ns: u64,
    grant: Option<Grant>,
    served: u64,
    longest_wait_ns: u64,
}

/// Clients that ask again and again, and how long things take.
struct World {
    table: KeyslotTable,
    clients: Vec<Client>,
    waiting: BTreeMap<Ticket, usize>,
    agenda: BinaryHeap<Reverse<(u64, Event)>>,
    now_ns: u64,
    program_ns: u64,
    request_ns: u64,
    think_ns: u64,
    programs: u64,
    events: u64,
}

impl World {
    fn new(keyslots: u32, policy: Policy, keys: u64, clients_per_key: usize, program_ns: u64) -> Self {
        let keys = (0..keys).flat_map(|key| std::iter::repeat_n(key, clients_per_key));
        let client = |key| Client {
            key: KeyId::for_simulation(key),
            asked_ns: 0,
            grant: None,
            served: 0,
            longest_wait_ns: 0,
        };
        let clients: Vec<_> = keys.map(client).collect();
        let agenda = (0..clients.len()).map(|n| Reverse((0, Event::Ask(n)))).collect();
        Self {
            table: KeyslotTable::new(keyslots, policy),
            clients,
            waiting: BTreeMap::new(),
            agenda,
            now_ns: 0,
            program_ns,
            request_ns: 4_000,
            think_ns: 2_000,
            programs: 0,
            events: 0,
        }
    }

    fn later(&mut self, after_ns: u64, event: Event) {
        self.agenda.push(Reverse((self.now_ns + after_ns, event)));
    }

    fn grant(&mut self, n: usize, grant: Grant) {
        let client = &mut self.clients[n];
        client.grant = Some(grant);
        client.served += 1;
        client.longest_wait_ns = client.longest_wait_ns.max(self.now_ns - client.asked_ns);
        // No two clients of a key in step.
        self.later(self.request_ns + (n as u64 % 7) * 1_300, Event::Done(n));
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Program { slot, .. } => {
                    self.programs += 1;
                    self.later(self.program_ns, Event::Programmed(slot.0));
                }
                Action::Grant { ticket, grant } => {
                    let n = self.waiting.remove(&ticket).expect("it waits");
                    self.grant(n, grant);
                }
                Action::WakeAt { at_ns, .. } => {
                    assert!(at_ns > self.now_ns, "a time that is yet to come");
                    self.agenda.push(Reverse((at_ns, Event::Tick)));
                }
                other => unreachable!("{other:?}"),
            }
        }
        self.events += 1;
        if self.events.is_multiple_of(64) {
            self.table.check();
        }
    }

    fn run(&mut self, until_ns: u64) {
        while let Some(Reverse((at_ns, event))) = self.agenda.pop() {
            if at_ns > until_ns {
                return;
            }
            self.now_ns = at_ns;
            self.table.at(at_ns);
            let mut actions = Vec::new();
            match event {
                Event::Ask(n) => {
                    self.clients[n].asked_ns = at_ns;
                    match self.table.acquire(self.clients[n].key, &mut actions) {
                        Acquired::Granted(grant) => self.grant(n, grant),
                        Acquired::Queued(ticket) => drop(self.waiting.insert(ticket, n)),
                    }
                }
                Event::Programmed(slot) => {
                    self.table.programmed(SlotIndex(slot), Programmed::Done, &mut actions);
                }
                Event::Done(n) => {
                    let grant = self.clients[n].grant.take().expect("it was granted");
                    self.table.release(grant, &mut actions);
                    self.later(self.think_ns, Event::Ask(n));
                }
                Event::Tick => self.table.tick(&mut actions),
            }
            self.carry_out(actions);
        }
    }

    fn longest_wait_ns(&self) -> u64 {
        // Who still waits has waited, too.
        let now = self.waiting.values().map(|&n| self.now_ns - self.clients[n].asked_ns);
        self.clients.iter().map(|client| client.longest_wait_ns).chain(now).max().unwrap_or(0)
    }

    fn served(&self) -> u64 {
        self.clients.iter().map(|client| client.served).sum()
    }
}

const SECOND: u64 = 1_000_000_000;

#[test]
fn programming_takes_its_share_and_the_longest_wait_keeps_its_bound() {
    for (keyslots, keys, clients_per_key) in [(1, 2, 1), (1, 8, 4), (4, 16, 1), (4, 100, 2)] {
        for program_ns in [50_000, 1_000_000] {
            let policy = Policy::default();
            let mut world = World::new(keyslots, policy, keys, clients_per_key, program_ns);
            let (q, h) = (policy.quantum_ns(program_ns), world.request_ns + 6 * 1_300);
            let b = u64::from(policy.bypass_max);
            let bound = keys.div_ceil(u64::from(keyslots)) * (q + (b + 1) * h) + keys * program_ns;
            world.run(3 * bound);
            let what = format!("{keys} keys x {clients_per_key} on {keyslots} keyslots, {program_ns} ns");
            // The first program of a keyslot takes it from nobody.
            let swaps = world.programs.saturating_sub(keyslots.into());
            let share = swaps * program_ns * 100 / (world.now_ns * u64::from(keyslots));
            assert!(share <= u64::from(policy.program_share_percent), "{what}: {share} % of the time");
            assert!(world.clients.iter().all(|client| client.served > 0), "{what}: somebody starves");
            let (q, h) = (policy.quantum_ns(program_ns), world.request_ns);
            let b = u64::from(policy.bypass_max);
            let bound = keys.div_ceil(u64::from(keyslots)) * (q + (b + 1) * h) + keys * program_ns;
            assert!(
                world.longest_wait_ns() <= bound,
                "{what}: {} ns, bound {bound}",
                world.longest_wait_ns()
            );
        }
    }
}

#[test]
fn quanta_serve_more_than_upstreams_race_where_programs_are_slow() {
    let served = |policy| {
        let mut world = World::new(1, policy, 16, 1, 1_000_000);
        world.run(SECOND);
        (world.served(), world.longest_wait_ns())
    };
    let (ours, upstreams) = (served(Policy::default()), served(Policy::UPSTREAM));
    assert!(ours.0 > 5 * upstreams.0, "ours {ours:?}, upstream's {upstreams:?}");
}

#[test]
fn upstreams_race_lets_a_popular_key_starve_the_others() {
    let starved = |policy: Policy| {
        let mut world = World::new(1, policy, 2, 6, 1_000);
        // One key always has a request in flight: its clients overlap.
        world.think_ns = 100;
        world.run(SECOND / 10);
        world.longest_wait_ns() > SECOND / 20
    };
    assert!(starved(Policy::UPSTREAM));
    assert!(!starved(Policy::default()));
    assert_eq!(Policy::UPSTREAM.order, Order::Upstream);
}

#[test]
fn urgent_keys_wait_less_and_the_others_are_not_starved() {
    // So few bypasses that the bound shows, no quantum, one keyslot, many keys.
    let policy = Policy { bypass_max: 8, program_share_percent: 100, ..Policy::default() };
    let mut world = World::new(1, policy, 20, 1, 10_000);
    world.table.set_priority(KeyId::for_simulation(7), Priority::High);
    world.table.set_priority(KeyId::for_simulation(3), Priority::Low);
    world.run(SECOND);
    let wait = |key: usize| world.clients[key].longest_wait_ns;
    assert!(wait(7) < wait(12) / 2, "high {}, normal {}", wait(7), wait(12));
    assert!(world.clients.iter().all(|client| client.served > 10));
}

#[test]
fn the_least_urgent_idle_key_has_to_leave_first() {
    let mut table = KeyslotTable::new(2, Policy::default());
    let mut actions = Vec::new();
    table.set_priority(KeyId::for_simulation(2), Priority::Low);
    for key in [1, 2] {
        table.acquire(KeyId::for_simulation(key), &mut actions);
        let Some(Action::Program { slot, .. }) = actions.pop() else { panic!("{actions:?}") };
        table.programmed(slot, Programmed::Done, &mut actions);
        let Some(Action::Grant { grant, .. }) = actions.pop() else { panic!("{actions:?}") };
        table.release(grant, &mut actions);
    }
    // Key 1 was used longest ago.
    table.acquire(KeyId::for_simulation(3), &mut actions);
    assert!(matches!(actions[..], [Action::Program { slot: SlotIndex(1), .. }]), "{actions:?}");
}

#[test]
fn an_idle_keyslot_is_kept_for_its_key_for_as_long_as_a_program_takes() {
    let mut table = KeyslotTable::new(1, Policy::default());
    let mut actions = Vec::new();
    table.at(0).acquire(KeyId::for_simulation(1), &mut actions);
    actions.clear();
    table.at(100_000).programmed(SlotIndex(0), Programmed::Done, &mut actions);
    let Some(Action::Grant { grant, .. }) = actions.pop() else { panic!("{actions:?}") };
    let Acquired::Queued(other) = table.at(110_000).acquire(KeyId::for_simulation(2), &mut actions) else {
        panic!("there is one keyslot")
    };
    assert_eq!(table.expected_wait_ns(KeyId::for_simulation(3)), 2 * 900_000 + 2 * 100_000);
    table.at(120_000).release(grant, &mut actions);
    assert_eq!(actions, [Action::WakeAt { ticket: other, at_ns: 220_000 }]);
    actions.clear();
    table.at(219_999).tick(&mut actions);
    assert_eq!(actions, [Action::WakeAt { ticket: other, at_ns: 220_000 }]);
    actions.clear();
    table.at(220_000).tick(&mut actions);
    assert!(matches!(actions[..], [Action::Program { by: Some(by), .. }] if by == other), "{actions:?}");
}
