//! Every interleaving of a few threads at the shell. Run with `cargo xtask loom`.
//!
//! One scenario per hazard; each is small, since loom tries them all.

use super::*;
use crate::caps::{Capabilities, KeyTypes, UnitMask};
use crate::config::{DataUnitSize, Hardware, Mode};
use crate::engine::{Direction, Engine, KeyLadder, KeyRef, Piece, SlotIndex};
use crate::error::{Error, ErrorKind, Op};
use crate::key::{Key, KeyForm, KeyId, RawKey};
use crate::memory::{HeapSource, Memory, MemorySource};
use loom::sync::Mutex;
use loom::thread;
use std::sync::Arc;

/// Remembers which key each keyslot holds, and notices overlapping calls.
#[derive(Debug)]
struct FakeEngine {
    capabilities: Capabilities,
    slots: Mutex<Vec<Option<KeyId>>>,
    failures: Mutex<u32>,
    busy: Mutex<bool>,
}

impl FakeEngine {
    fn new(keyslots: u32, failures: u32) -> Arc<Self> {
        Arc::new(Self {
            capabilities: Capabilities {
                units: [UnitMask::SERVED; Mode::ALL.len()],
                dun_bytes_max: 32,
                key_types: KeyTypes::RAW,
                keyslots,
            },
            slots: Mutex::new(vec![None; keyslots as usize]),
            failures: Mutex::new(failures),
            busy: Mutex::new(false),
        })
    }

    fn holds(&self, slot: SlotIndex) -> Option<KeyId> {
        self.slots.lock().unwrap()[slot.0 as usize]
    }

    fn enter(&self) {
        assert!(!std::mem::replace(&mut *self.busy.lock().unwrap(), true), "calls overlap");
    }

    fn leave(&self) {
        *self.busy.lock().unwrap() = false;
    }
}

impl Engine for FakeEngine {
    fn name(&self) -> &str {
        "fake"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn memory(&self) -> &dyn MemorySource {
        &HeapSource
    }

    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error> {
        self.enter();
        self.slots.lock().unwrap()[slot.0 as usize] = None;
        let mut failures = self.failures.lock().unwrap();
        let fails = *failures > 0;
        *failures = failures.saturating_sub(1);
        drop(failures);
        if !fails {
            self.slots.lock().unwrap()[slot.0 as usize] = Some(key.id());
        }
        self.leave();
        if fails { Err(Error::new(ErrorKind::EngineFailed, Op::Program)) } else { Ok(()) }
    }

    fn evict(&self, slot: Option<SlotIndex>, _: &Key) -> Result<(), Error> {
        self.enter();
        self.slots.lock().unwrap()[slot.expect("it has keyslots").0 as usize] = None;
        self.leave();
        Ok(())
    }

    fn crypt(&self, _: KeyRef<'_>, _: Direction, _: &mut dyn Memory, _: &mut [Piece]) -> Result<(), Error> {
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        None
    }
}

/// A key, and where it was last.
struct Known(Arc<Key>, Whereabouts);

fn key(n: u8) -> Arc<Known> {
    let bytes: Vec<u8> = (n..n + 64).collect();
    let form = KeyForm::Raw(RawKey::new(&bytes));
    let key = Key::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, 8, form, Hardware::Allowed);
    Arc::new(Known(key.expect("a good key"), Whereabouts::default()))
}

fn shell(keyslots: u32, failures: u32, policy: Policy) -> (Arc<FakeEngine>, Arc<Keyslots>) {
    let engine = FakeEngine::new(keyslots, failures);
    (engine.clone(), Arc::new(Keyslots::new(engine, policy)))
}

fn use_key(engine: &FakeEngine, slots: &Keyslots, Known(key, whereabouts): &Known) {
    let guard = slots.acquire(key, whereabouts).expect("the engine does not fail");
    assert_eq!(engine.holds(guard.slot()), Some(key.id()), "a granted keyslot holds the asked key");
}

fn model(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // Less does not find a keyslot that is taken for what it was; without a bound it takes hours.
    builder.preemption_bound = builder.preemption_bound.max(Some(3));
    builder.check(body);
}

#[test]
fn two_keys_one_keyslot() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let other = thread::spawn({
            let (engine, slots) = (engine.clone(), slots.clone());
            move || use_key(&engine, &slots, &key(1))
        });
        use_key(&engine, &slots, &key(2));
        other.join().unwrap();
    });
}

/// There is a keyslot for each, but the engine may only be asked for one thing at a time.
#[test]
fn two_keys_two_keyslots() {
    model(|| {
        let (engine, slots) = shell(2, 0, Policy::default());
        let other = thread::spawn({
            let (engine, slots) = (engine.clone(), slots.clone());
            move || use_key(&engine, &slots, &key(1))
        });
        use_key(&engine, &slots, &key(2));
        other.join().unwrap();
    });
}

#[test]
fn three_requests_two_keys_one_keyslot_no_bypass() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy { bypass_max: 0, ..Policy::default() });
        let shared = key(1);
        let threads: Vec<_> = [shared.clone(), key(2)]
            .into_iter()
            .map(|key| {
                let (engine, slots) = (engine.clone(), slots.clone());
                thread::spawn(move || use_key(&engine, &slots, &key))
            })
            .collect();
        use_key(&engine, &slots, &shared);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn eviction_while_another_waits() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let (first, second) = (key(1), key(2));
        use_key(&engine, &slots, &first);
        let other = thread::spawn({
            let (engine, slots, second) = (engine.clone(), slots.clone(), second.clone());
            move || use_key(&engine, &slots, &second)
        });
        let evicted = slots.evict(&first.0);
        assert!(evicted.is_ok(), "nobody uses it: {evicted:?}");
        other.join().unwrap();
        assert_ne!(engine.holds(SlotIndex(0)), Some(first.0.id()));
    });
}

#[test]
fn a_failing_program_while_others_wait() {
    model(|| {
        let (engine, slots) = shell(1, 1, Policy { program_retries: 0, ..Policy::default() });
        let other = thread::spawn({
            let (engine, slots) = (engine.clone(), slots.clone());
            move || {
                let key = key(1);
                let granted = slots.acquire(&key.0, &key.1);
                if let Ok(guard) = &granted {
                    assert_eq!(engine.holds(guard.slot()), Some(key.0.id()));
                }
                granted.is_ok()
            }
        });
        let mine = key(2);
        let granted = slots.acquire(&mine.0, &mine.1);
        if let Ok(guard) = &granted {
            assert_eq!(engine.holds(guard.slot()), Some(mine.0.id()));
        }
        let ok = granted.is_ok();
        drop(granted);
        assert_eq!(u8::from(ok) + u8::from(other.join().unwrap()), 1, "one failure fails one key's request");
    });
}

#[test]
fn a_reset_during_use() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let mine = key(1);
        let other = thread::spawn({
            let (engine, slots, mine) = (engine.clone(), slots.clone(), mine.clone());
            move || {
                let guard = slots.acquire(&mine.0, &mine.1).expect("the engine does not fail");
                // It may be about to be put back.
                assert!(engine.holds(guard.slot()).is_none_or(|key| key == mine.0.id()));
            }
        });
        slots.reset();
        other.join().unwrap();
        // What a loss mid-use leads to: report it, ask again.
        let guard = slots.acquire(&mine.0, &mine.1).expect("the engine does not fail");
        guard.lost();
        use_key(&engine, &slots, &mine);
    });
}

#[test]
fn the_last_release_as_a_waiter_arrives() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let mine = key(1);
        let guard = slots.acquire(&mine.0, &mine.1).expect("the engine does not fail");
        let other = thread::spawn({
            let (engine, slots) = (engine.clone(), slots.clone());
            move || use_key(&engine, &slots, &key(2))
        });
        drop(guard);
        other.join().unwrap();
    });
}

/// A key that is in and open, found without the lock by one thread while another takes its keyslot away.
#[test]
fn an_open_keyslot_is_shared_while_another_key_comes() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let mine = key(1);
        // The first programs it, the second opens it.
        use_key(&engine, &slots, &mine);
        use_key(&engine, &slots, &mine);
        let other = thread::spawn({
            let (engine, slots) = (engine.clone(), slots.clone());
            move || use_key(&engine, &slots, &key(2))
        });
        use_key(&engine, &slots, &mine);
        other.join().unwrap();
        use_key(&engine, &slots, &mine);
        assert_eq!(slots.status().slots[0].users, 0);
    });
}

/// Two find an open keyslot, and its owner wants the key out.
#[test]
fn an_open_keyslot_is_evicted_once_nobody_uses_it() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let mine = key(1);
        use_key(&engine, &slots, &mine);
        use_key(&engine, &slots, &mine);
        let other = thread::spawn({
            let (engine, slots, mine) = (engine.clone(), slots.clone(), mine.clone());
            move || {
                let guard = slots.acquire(&mine.0, &mine.1).expect("the engine does not fail");
                let refused = slots.evict(&mine.0);
                assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::KeyInUse));
                assert_eq!(engine.holds(guard.slot()), Some(mine.0.id()));
            }
        });
        use_key(&engine, &slots, &mine);
        other.join().unwrap();
        slots.evict(&mine.0).expect("nobody uses it");
        let status = slots.status().slots[0];
        assert_eq!((status.key, status.users, status.counters.hits), (None, 0, 3));
    });
}

/// Whereabouts that are wrong: the keyslot has got another key since, and is open again.
#[test]
fn a_keyslot_that_changed_hands_is_not_mistaken() {
    model(|| {
        let (engine, slots) = shell(1, 0, Policy::default());
        let (mine, theirs) = (key(1), key(2));
        use_key(&engine, &slots, &mine);
        use_key(&engine, &slots, &mine);
        let other = thread::spawn({
            let (engine, slots) = (engine.clone(), slots.clone());
            move || {
                use_key(&engine, &slots, &theirs);
                use_key(&engine, &slots, &theirs);
                // Nobody else has this key, so nobody keeps it in.
                slots.evict(&theirs.0).expect("nobody uses it");
            }
        });
        use_key(&engine, &slots, &mine);
        other.join().unwrap();
        assert_eq!(slots.status().slots[0].users, 0);
    });
}
