//! The shell of the keyslot table: one lock, and waiting threads. And for most requests no lock: keyslots that need no decision
//! are [open](super::open).
//!
//! A thread that waits has a mailbox; whoever causes an action for it puts the action there and wakes that thread alone.
//! Programs are carried out by the thread that needs them, so that a request that is merely done never pays for others.

use super::open::{OpenSlots, Opened, Share, Whereabouts};
use super::policy::{Policy, Priority};
use super::table::{Acquired, Action, EvictOutcome, Grant, KeyslotTable, Programmed, SlotStatus, Ticket};
use crate::engine::{Engine, SlotIndex};
use crate::env::{Clock, StoppedClock};
use crate::error::{Error, ErrorKind, Op};
use crate::key::{Key, KeyId};
use crate::sync::{Condvar, Mutex, MutexGuard, wait, wait_timeout};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// The keyslots of one engine, for many threads.
#[derive(Debug)]
pub struct Keyslots {
    engine: Arc<dyn Engine>,
    clock: Arc<dyn Clock>,
    open: OpenSlots,
    state: Mutex<State>,
}

/// Protects the table and the mailboxes. Never held while the engine is called or a thread sleeps.
#[derive(Debug)]
struct State {
    table: KeyslotTable,
    mailboxes: BTreeMap<Ticket, Mailbox>,
    /// The key last programmed into each keyslot: what a reset puts back.
    keys: Vec<Option<Arc<Key>>>,
    /// Programs that nobody waits for, after a reset: done by whoever caused them.
    orphans: Vec<(SlotIndex, KeyId)>,
    opened: Opened,
    /// Why the engine did not program a key, until the actions that follow are delivered.
    failure: Option<Error>,
    waits: u64,
    longest_wait_ns: u64,
    resets: u64,
}

#[derive(Debug)]
struct Mailbox {
    wake: Arc<Condvar>,
    letter: Option<Letter>,
}

#[derive(Debug)]
enum Letter {
    Granted(Grant),
    Program(SlotIndex),
    Failed(Error),
    /// Come back at this time.
    WakeAt(u64),
    Evict(SlotIndex),
    Evicted(EvictOutcome),
}

/// Keyslots at one moment, for status displays.
#[derive(Clone, Debug)]
pub struct KeyslotsStatus {
    /// Every keyslot, by index.
    pub slots: Vec<SlotStatus>,
    /// Requests that wait now.
    pub waiting: usize,
    /// Requests that had to wait since the start.
    pub waits: u64,
    /// The longest that one of them waited, program included, in nanoseconds; 0 without a clock.
    pub longest_wait_ns: u64,
    /// Engine resets since the start.
    pub resets: u64,
}

/// Use of a programmed keyslot. Dropping it gives the keyslot back.
#[must_use = "the keyslot is given back as soon as the guard is dropped"]
pub struct KeyslotGuard<'k> {
    keyslots: &'k Keyslots,
    grant: Grant,
}

impl KeyslotGuard<'_> {
    /// The keyslot that holds the asked key.
    #[must_use]
    pub fn slot(&self) -> SlotIndex {
        self.grant.slot
    }

    /// Gives the keyslot back, since the engine says that it holds no key. The key is programmed again when it is
    /// next asked for.
    pub fn lost(self) {
        self.keyslots.closed().table.lost(self.grant);
        // Dropped now, so released.
    }
}

impl fmt::Debug for KeyslotGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyslotGuard({})", self.grant.slot)
    }
}

impl Drop for KeyslotGuard<'_> {
    fn drop(&mut self) {
        self.keyslots.release(self.grant);
    }
}

impl Keyslots {
    /// All keyslots of `engine`, empty.
    ///
    /// # Panics
    ///
    /// If the engine has none.
    #[must_use]
    pub fn new(engine: Arc<dyn Engine>, policy: Policy) -> Self {
        let count = engine.capabilities().keyslots;
        let state = State {
            table: KeyslotTable::new(count, policy),
            mailboxes: BTreeMap::new(),
            keys: vec![None; count as usize],
            orphans: Vec::new(),
            opened: Opened::default(),
            failure: None,
            waits: 0,
            longest_wait_ns: 0,
            resets: 0,
        };
        let open = OpenSlots::new(count);
        Self { engine, clock: Arc::new(StoppedClock), open, state: Mutex::new(state) }
    }

    /// The same with a clock: without, keys have no quanta.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Takes a keyslot that holds `key`, programming one if need be. `whereabouts` saves looking where it is, and is to be
    /// the same one every time.
    ///
    /// # Errors
    ///
    /// What the engine said when it could not program the key, after a retry. Only requests for this key fail.
    ///
    /// # Blocking
    ///
    /// Waits while every keyslot is in use, in order of arrival (see [`Policy`]), and while the engine programs. A
    /// thread must not hold a keyslot while it asks for another, nor call this from inside the engine.
    pub fn acquire(&self, key: &Arc<Key>, whereabouts: &Whereabouts) -> Result<KeyslotGuard<'_>, Error> {
        match self.open.share(key.id(), whereabouts) {
            Share::Yes(grant) => return Ok(KeyslotGuard { keyslots: self, grant }),
            Share::Mistaken(grant) => self.release(grant),
            Share::No => {}
        }
        let mut actions = Vec::new();
        let mut state = self.state.lock();
        if let Some(slot) = state.table.hit(key.id()) {
            // From now on it is found without the lock.
            let State { table, opened, .. } = &mut *state;
            let grant = opened.grant(&self.open, table, slot, key.id());
            whereabouts.note(slot);
            return Ok(KeyslotGuard { keyslots: self, grant });
        }
        self.close_all(&mut state);
        self.tell_time(&mut state, Some(key.id()));
        let ticket = match state.table.acquire(key.id(), &mut actions) {
            Acquired::Granted(grant) => return Ok(KeyslotGuard { keyslots: self, grant }),
            Acquired::Queued(ticket) => ticket,
        };
        state.waits += 1;
        let asked_ns = self.clock.now_ns();
        let wake = state.open_mailbox(ticket);
        state.deliver(actions);
        let mut wake_at = None;
        loop {
            state = self.program_orphans(state);
            match state.collect(ticket) {
                None => match wake_at {
                    None => state = wait(&wake, state),
                    Some(at_ns) => state = self.wait_until(&wake, state, at_ns, &mut wake_at),
                },
                Some(Letter::WakeAt(at_ns)) => wake_at = Some(at_ns),
                Some(Letter::Granted(grant)) => {
                    state.mailboxes.remove(&ticket);
                    let waited_ns = self.clock.now_ns().saturating_sub(asked_ns);
                    state.longest_wait_ns = state.longest_wait_ns.max(waited_ns);
                    return Ok(KeyslotGuard { keyslots: self, grant });
                }
                Some(Letter::Failed(error)) => {
                    state.mailboxes.remove(&ticket);
                    return Err(error);
                }
                Some(Letter::Program(slot)) => {
                    state.keys[slot.0 as usize] = Some(key.clone());
                    state = self.program(state, slot, key);
                }
                Some(letter) => unreachable!("a request does not get {letter:?}"),
            }
        }
    }

    /// Removes `key` from the engine, if it is there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::KeyInUse`] while requests use the key or wait for it; it stays.
    /// [`ErrorKind::EngineFailed`] if the engine says so; the key is forgotten all the same.
    ///
    /// # Blocking
    ///
    /// Waits while the engine programs or evicts.
    pub fn evict(&self, key: &Key) -> Result<(), Error> {
        let mut state = self.closed();
        let mut actions = Vec::new();
        let ticket = state.table.evict(key.id(), &mut actions);
        let wake = state.open_mailbox(ticket);
        state.deliver(actions);
        let mut failure = None;
        loop {
            state = self.program_orphans(state);
            match state.collect(ticket) {
                None => state = wait(&wake, state),
                Some(Letter::Evict(slot)) => {
                    drop(state);
                    let result = self.engine.evict(Some(slot), key);
                    state = self.closed();
                    let mut actions = Vec::new();
                    state.table.evicted(slot, result.is_ok(), &mut actions);
                    failure = result.err();
                    state.deliver(actions);
                }
                Some(Letter::Evicted(outcome)) => {
                    state.mailboxes.remove(&ticket);
                    if outcome != EvictOutcome::InUse {
                        state.forget(key.id());
                    }
                    return match outcome {
                        EvictOutcome::Done => Ok(()),
                        EvictOutcome::InUse => Err(Error::new(ErrorKind::KeyInUse, Op::Evict)),
                        EvictOutcome::EngineFailed => {
                            Err(failure.unwrap_or_else(|| Error::new(ErrorKind::EngineFailed, Op::Evict)))
                        }
                    };
                }
                Some(letter) => unreachable!("an eviction does not get {letter:?}"),
            }
        }
    }

    /// Whether `key`, once it has a keyslot, keeps it against others. The caller sees to it that one keyslot stays free
    /// ([`AdmissionTable`](crate::admission::AdmissionTable)).
    pub fn set_pinned(&self, key: KeyId, pinned: bool) {
        let mut state = self.closed();
        let mut actions = Vec::new();
        state.table.set_pinned(key, pinned, &mut actions);
        // Nothing that nobody waits for can begin here: that happens after a reset, and then the engine is busy.
        state.deliver(actions);
    }

    /// The engine has lost the content of all keyslots: programs every key again that was in one.
    ///
    /// A key that cannot be programmed again is forgotten; the next request for it programs it anew, or says why not.
    ///
    /// # Blocking
    ///
    /// Waits while the engine programs.
    pub fn reset(&self) {
        let mut state = self.closed();
        state.resets += 1;
        let mut actions = Vec::new();
        state.table.reset(&mut actions);
        state.deliver(actions);
        drop(self.program_orphans(state));
    }

    /// The keyslots at this moment.
    #[must_use]
    pub fn status(&self) -> KeyslotsStatus {
        let state = self.closed();
        KeyslotsStatus {
            slots: state.table.status(),
            waiting: state.table.waiting(),
            waits: state.waits,
            longest_wait_ns: state.longest_wait_ns,
            resets: state.resets,
        }
    }

    /// How long a request for `key` would wait by and large, in nanoseconds.
    #[must_use]
    pub fn expected_wait_ns(&self, key: KeyId, whereabouts: &Whereabouts) -> u64 {
        if self.open.seems_there(key, whereabouts) {
            return 0;
        }
        let mut state = self.state.lock();
        if state.table.hit(key).is_some() {
            // Others' keyslots stay open.
            return 0;
        }
        self.close_all(&mut state);
        state.table.expected_wait_ns(key)
    }

    /// How urgent the requests of `key` are.
    pub fn set_priority(&self, key: KeyId, priority: Priority) {
        self.state.lock().table.set_priority(key, priority);
    }

    /// Only when it makes a difference: asking a clock is not free, and most requests find their key and nobody waiting.
    fn tell_time(&self, state: &mut State, key: Option<KeyId>) {
        if state.table.needs_time(key) {
            state.table.at(self.clock.now_ns());
        }
    }

    /// Sleeps until woken or until the time has come, which it then tells the table.
    fn wait_until<'a>(
        &'a self,
        wake: &Condvar,
        state: MutexGuard<'a, State>,
        at_ns: u64,
        wake_at: &mut Option<u64>,
    ) -> MutexGuard<'a, State> {
        let left_ns = at_ns.saturating_sub(self.clock.now_ns());
        let mut state = if left_ns > 0 { wait_timeout(wake, state, left_ns) } else { state };
        let now_ns = self.clock.now_ns();
        if now_ns >= at_ns {
            *wake_at = None;
            // It may have been granted meanwhile, and others' keyslots opened.
            self.close_all(&mut state);
            let mut actions = Vec::new();
            state.table.at(now_ns).tick(&mut actions);
            state.deliver(actions);
        }
        state
    }

    /// Locks the table with all keyslots closed: whatever happens, it knows who uses which.
    fn closed(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        self.close_all(&mut state);
        state
    }

    fn close_all(&self, state: &mut State) {
        state.opened.close_all(&self.open, &mut state.table);
    }

    fn release(&self, grant: Grant) {
        if self.open.give_back(grant.slot) {
            return;
        }
        let mut state = self.closed();
        self.tell_time(&mut state, None);
        let mut actions = Vec::new();
        state.table.release(grant, &mut actions);
        state.deliver(actions);
        drop(self.program_orphans(state));
    }

    fn program<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        slot: SlotIndex,
        key: &Key,
    ) -> MutexGuard<'a, State> {
        let mut state = state;
        state.table.engine_begins(self.clock.now_ns());
        drop(state);
        let result = self.engine.program(slot, key);
        let mut state = self.closed();
        state.table.at(self.clock.now_ns());
        let outcome = match &result {
            Ok(()) => Programmed::Done,
            Err(error) if error.kind() == ErrorKind::KeyRejected => Programmed::Rejected,
            Err(_) => Programmed::Failed,
        };
        let mut actions = Vec::new();
        state.table.programmed(slot, outcome, &mut actions);
        state.failure = result.err();
        state.deliver(actions);
        state
    }

    fn program_orphans<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while let Some((slot, id)) = state.orphans.pop() {
            let key = state.keys[slot.0 as usize].clone().expect("what is put back was there before");
            assert_eq!(key.id(), id, "the key that is put back is the one that was there");
            state = self.program(state, slot, &key);
        }
        state
    }
}

impl State {
    fn open_mailbox(&mut self, ticket: Ticket) -> Arc<Condvar> {
        let wake = Arc::new(Condvar::new());
        self.mailboxes.insert(ticket, Mailbox { wake: wake.clone(), letter: None });
        wake
    }

    /// Lets go of a key that the owner wants out: its bytes may be wiped with the last handle.
    fn forget(&mut self, id: KeyId) {
        for key in &mut self.keys {
            if key.as_ref().is_some_and(|key| key.id() == id) {
                *key = None;
            }
        }
    }

    fn collect(&mut self, ticket: Ticket) -> Option<Letter> {
        self.mailboxes.get_mut(&ticket).expect("its owner removes it").letter.take()
    }

    fn deliver(&mut self, actions: Vec<Action>) {
        for action in actions {
            let (ticket, letter) = match action {
                Action::Grant { ticket, grant } => (ticket, Letter::Granted(grant)),
                Action::Program { slot, by: Some(ticket), .. } => (ticket, Letter::Program(slot)),
                Action::Program { slot, key, by: None } => {
                    self.orphans.push((slot, key));
                    continue;
                }
                Action::WakeAt { ticket, at_ns } => (ticket, Letter::WakeAt(at_ns)),
                Action::Evict { slot, by, .. } => (by, Letter::Evict(slot)),
                Action::Evicted { ticket, outcome } => (ticket, Letter::Evicted(outcome)),
                Action::Fail { ticket } => {
                    let error = match &self.failure {
                        Some(failure) => failure.duplicate(),
                        None => Error::new(ErrorKind::EngineFailed, Op::Program),
                    };
                    (ticket, Letter::Failed(error))
                }
            };
            let mailbox = self.mailboxes.get_mut(&ticket).expect("who is named waits");
            assert!(matches!(mailbox.letter, None | Some(Letter::WakeAt(_))), "one letter at a time");
            mailbox.letter = Some(letter);
            mailbox.wake.notify_one();
        }
        self.failure = None;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::config::{DataUnitSize, Hardware, Mode};
    use crate::key::{KeyForm, RawKey};
    use crate::testing::FakeEngine;

    #[test]
    fn a_key_that_is_there_needs_no_lock() {
        let raw: Vec<u8> = (0..64).collect();
        let (unit, form) = (DataUnitSize::DEFAULT, KeyForm::Raw(RawKey::new(&raw)));
        let key: Arc<Key> = Key::new(Mode::Aes256Xts, unit, 8, form, Hardware::Allowed).unwrap();
        let whereabouts = Whereabouts::default();
        let keyslots = Keyslots::new(Arc::new(FakeEngine::with_keyslots(2)), Policy::default());
        // The first programs it, the second opens its keyslot.
        drop(keyslots.acquire(&key, &whereabouts).unwrap());
        drop(keyslots.acquire(&key, &whereabouts).unwrap());
        let shared = Arc::new((keyslots, key, whereabouts));
        let (done, is_done) = std::sync::mpsc::channel();
        let state = shared.0.state.lock();
        std::thread::spawn({
            let shared = shared.clone();
            move || {
                let (keyslots, key, whereabouts) = &*shared;
                let both = (keyslots.acquire(key, whereabouts), keyslots.acquire(key, whereabouts));
                done.send((both.0.unwrap().slot(), both.1.unwrap().slot())).unwrap();
            }
        });
        let slots = is_done.recv_timeout(std::time::Duration::from_secs(60)).expect("it needs no lock");
        drop(state);
        assert_eq!(slots.0, slots.1);
        let status = shared.0.status();
        assert_eq!((status.slots[slots.0.0 as usize].counters.hits, status.waits), (3, 1));
    }
}
