//! Our tables with one mistake each: every promise is broken by one of them, and the checker says which.

use super::design::{Answer, Order, Refused, Switch, Who};
use super::*;
use inlinecrypt_core::admission::{Application, Hold, Mode, Timestamp};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::engine::SlotIndex;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::keyslot::table::{EvictOutcome, Grant, Programmed};
use inlinecrypt_core::keyslot::{Policy, Priority};

const NONE: u8 = 0;
const LOSES_GRANTS: u8 = 1;
const GRANTS_TWICE: u8 = 2;
const GRANTS_ANOTHER: u8 = 3;
const NEVER_RETRIES: u8 = 4;
const SAYS_EVICTED: u8 = 5;
const LETS_ALL_PASS: u8 = 6;
const DEAF_TO_RESETS: u8 = 7;
const DEAF_TO_PINS: u8 = 8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct BentSlots<const HOW: u8>(OurSlots);

impl<const HOW: u8> BentSlots<HOW> {
    fn bend(orders: &mut Vec<Order>) {
        let bent = std::mem::take(orders).into_iter().flat_map(|order| match (HOW, order) {
            (LOSES_GRANTS, Order::Grant { .. }) => vec![],
            (GRANTS_TWICE, Order::Grant { .. }) => vec![order, order],
            (GRANTS_ANOTHER, Order::Grant { who, grant }) => {
                let slot = SlotIndex(1 - grant.slot.0);
                vec![Order::Grant { who, grant: Grant { slot, ..grant } }]
            }
            (SAYS_EVICTED, Order::Evicted { who, .. }) => {
                vec![Order::Evicted { who, outcome: EvictOutcome::Done }]
            }
            _ => vec![order],
        });
        *orders = bent.collect();
    }
}

impl<const HOW: u8> Slots for BentSlots<HOW> {
    const PROMISES: bool = true;

    fn new(count: u32, policy: Policy) -> Self {
        let bypass_max = if HOW == LETS_ALL_PASS { 100 } else { policy.bypass_max };
        Self(OurSlots::new(count, Policy { bypass_max, ..policy }))
    }
    fn acquire(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) -> Option<Grant> {
        let grant = self.0.acquire(who, key, orders);
        Self::bend(orders);
        grant
    }
    fn release(&mut self, grant: Grant, orders: &mut Vec<Order>) {
        self.0.release(grant, orders);
        Self::bend(orders);
    }
    fn lost(&mut self, grant: Grant) {
        self.0.lost(grant);
    }
    fn evict(&mut self, who: Who, key: KeyId, orders: &mut Vec<Order>) {
        self.0.evict(who, key, orders);
        Self::bend(orders);
    }
    fn programmed(&mut self, slot: u32, outcome: Programmed, orders: &mut Vec<Order>) {
        let bent = HOW == NEVER_RETRIES && outcome == Programmed::Failed;
        self.0.programmed(slot, if bent { Programmed::Rejected } else { outcome }, orders);
        Self::bend(orders);
    }
    fn evicted(&mut self, slot: u32, ok: bool, orders: &mut Vec<Order>) {
        self.0.evicted(slot, ok, orders);
        Self::bend(orders);
    }
    fn reset(&mut self, orders: &mut Vec<Order>) {
        if HOW != DEAF_TO_RESETS {
            self.0.reset(orders);
        }
        Self::bend(orders);
    }
    fn set_pinned(&mut self, key: KeyId, pinned: bool, orders: &mut Vec<Order>) {
        if HOW != DEAF_TO_PINS {
            self.0.set_pinned(key, pinned, orders);
        }
    }
    fn set_priority(&mut self, key: KeyId, priority: Priority) {
        self.0.set_priority(key, priority);
    }
    fn check(&self) {
        self.0.check();
    }
}

const NEVER_LEAVES: u8 = 1;
const BLAMES_ANOTHER: u8 = 2;
const BELIEVES_SWITCHES: u8 = 3;
const FORGETS_ITS_MODE: u8 = 4;
const STAYS_POISONED: u8 = 5;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct BentGate<const HOW: u8>(OurGate);

impl<const HOW: u8> Gate for BentGate<HOW> {
    const SWITCH: Switch = Switch::AtAdmission;
    const PROMISES: bool = true;
    const ADMITS: &str = "is admitted";

    fn new(keyslots: u32, is_exclusive: bool) -> Self {
        Self(OurGate::new(keyslots, is_exclusive))
    }
    fn apply(&mut self, layer: u8, application: Application, mode: EngineMode, answers: &mut Vec<Answer>) {
        self.0.apply(layer, application, mode, answers);
        for answer in answers {
            if let (BLAMES_ANOTHER, Answer::Refuse(_, Refused::Locked(_, by))) = (HOW, answer) {
                *by = by.wrapping_add(1);
            }
        }
    }
    fn declare(&mut self, layer: u8, key_type: KeyType, now: Timestamp, answers: &mut Vec<Answer>) {
        self.0.declare(layer, key_type, now, answers);
    }
    fn switched(&mut self, ok: bool, answers: &mut Vec<Answer>) {
        self.0.switched(ok || HOW == BELIEVES_SWITCHES, answers);
    }
    fn leave(&mut self, key: KeyId, hold: Hold) -> bool {
        HOW == NEVER_LEAVES || self.0.leave(key, hold)
    }
    fn is_pinned(&self, key: KeyId) -> bool {
        self.0.is_pinned(key)
    }
    fn restarted(&mut self, answers: &mut Vec<Answer>) {
        let is_ignored = match self.0.mode() {
            Some(Mode::Committed(_)) => HOW == FORGETS_ITS_MODE,
            Some(Mode::Poisoned(_)) => HOW == STAYS_POISONED,
            _ => false,
        };
        if !is_ignored {
            self.0.restarted(answers);
        }
    }
    fn mode(&self) -> Option<&Mode> {
        self.0.mode()
    }
    fn reserved(&self) -> Option<(usize, usize)> {
        self.0.reserved()
    }
    fn check(&self) {
        self.0.check();
    }
}

fn breaks<G: Gate, S: Slots>(plan: &str) -> &'static str {
    let plan = plans::ours(Bounds::Small).into_iter().find(|known| known.name == plan).expect("a plan");
    let finding = check::<G, S>(&plan, 1);
    let [(name, story)] = &finding.broken[..] else { panic!("found {:?}", finding.broken) };
    assert!(story.lines().count() > 1, "{story}");
    name
}

fn slots<const HOW: u8>(plan: &str) -> &'static str {
    breaks::<OurGate, BentSlots<HOW>>(plan)
}

fn gate<const HOW: u8>(plan: &str) -> &'static str {
    breaks::<BentGate<HOW>, OurSlots>(plan)
}

#[test]
fn every_bent_table_is_found_out() {
    assert_eq!(slots::<LOSES_GRANTS>("contention"), "nobody waits while nothing is under way");
    assert_eq!(slots::<GRANTS_TWICE>("contention"), "everybody is answered once");
    assert_eq!(slots::<NEVER_RETRIES>("faults"), "only a failed program fails a request, after its retries");
    assert_eq!(slots::<LETS_ALL_PASS>("contention"), "nobody waits for more others than documented");
    assert_eq!(slots::<DEAF_TO_RESETS>("resets"), "a granted keyslot holds the asked key");
    assert_eq!(
        slots::<DEAF_TO_PINS>("hints"),
        "keyslots in use and pins are left alone, one thing at a time"
    );
    let granted = slots::<GRANTS_ANOTHER>("resets");
    assert!(granted.starts_with("a granted keyslot holds"), "{granted}");

    assert_eq!(gate::<NEVER_LEAVES>("admission"), "what is reserved is what is held");
    assert_eq!(gate::<BLAMES_ANOTHER>("admission"), "a refusal has a cause and names it");
    assert_eq!(gate::<BELIEVES_SWITCHES>("admission"), "an admission can be kept");
    assert_eq!(
        gate::<FORGETS_ITS_MODE>("admission"),
        "what is served never shrinks for who holds an admission"
    );
    assert_eq!(gate::<STAYS_POISONED>("admission"), "a refusal has a cause and names it");
}

#[test]
fn an_eviction_that_was_not_one_is_found_out() {
    let mut plan = plans::one_failed_program();
    plan.layers[0].evictions = 1;
    let finding = check::<OurGate, BentSlots<SAYS_EVICTED>>(&plan, 1);
    assert_eq!(finding.broken[0].0, "an eviction's answer is true");
    assert!(
        check::<BentGate<NONE>, BentSlots<NONE>>(&plan, 1).broken.is_empty(),
        "the bending itself bends nothing"
    );
}
