//! Open keyslots: what most requests find, at the price of two atomic operations.
//!
//! While nobody waits, a request whose key is in a keyslot changes nothing that the table decides by but the number of users
//! and who used it last. So the [table](super::table) lets the shell *open* that keyslot: from then on its users are counted
//! here, in one word that also says whether the keyslot is open. Before anything else happens to the table, the shell closes
//! all of them and tells the table what happened meanwhile, in order of last use. So the table decides as if it had counted
//! itself (`model_tests::opening_changes_nothing`).
//!
//! ```text
//!   word:  open (1 bit) | tag (13) | users (22: more than there are threads) | hits since it was opened (28)
//! ```
//!
//! The tag is that of the keyslot's filling: who has looked which key it holds counts himself in only if that filling is still
//! there.
//!
//! A user is counted in one place only: here while the keyslot is open, by the table while it is closed. Closing moves the
//! users that there are over, in one step.

use super::table::{Acquired, Grant, KeyslotTable};
use crate::engine::SlotIndex;
use crate::key::KeyId;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use std::fmt;

const HIT: u64 = 1;
const USER: u64 = 1 << 28;
const TAG: u64 = 1 << 50;
const OPEN: u64 = 1 << 63;
const HITS_MAX: u64 = USER - 1;
const USERS_MAX: u64 = TAG / USER - 1;

fn users(word: u64) -> u64 {
    (word % TAG) / USER
}

fn hits(word: u64) -> u64 {
    word % USER
}

/// In which keyslot a key was last. Only saves looking: it may be wrong.
pub struct Whereabouts(AtomicU32);

impl Default for Whereabouts {
    fn default() -> Self {
        Self(AtomicU32::new(u32::MAX))
    }
}

impl fmt::Debug for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Whereabouts({})", self.0.load(Ordering::Relaxed))
    }
}

impl Whereabouts {
    pub(super) fn note(&self, slot: SlotIndex) {
        // Most requests find what is there already.
        if self.0.load(Ordering::Relaxed) != slot.0 {
            self.0.store(slot.0, Ordering::Relaxed);
        }
    }
}

/// What happened to a keyslot while it was open.
#[derive(Clone, Copy, Debug)]
struct Closed {
    slot: SlotIndex,
    /// Who uses it now.
    users: u32,
    hits: u64,
    /// When it was last given back: larger is later.
    last_use: u64,
}

/// All keyslots of an engine, open or closed.
#[derive(Debug)]
pub(super) struct OpenSlots {
    slots: Box<[Slot]>,
    /// The largest `last_use` there is.
    uses: Apart,
}

/// A number on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Apart(AtomicU64);

/// On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    word: AtomicU64,
    /// What it holds, while it is open or has users that came when it was. Changed while it has none.
    key: AtomicU64,
    filling: AtomicU64,
    last_use: AtomicU64,
}

impl OpenSlots {
    pub(super) fn new(count: u32) -> Self {
        let zero = || AtomicU64::new(0);
        let slot = |_| Slot { word: zero(), key: zero(), filling: zero(), last_use: zero() };
        Self { slots: (0..count).map(slot).collect(), uses: Apart(zero()) }
    }

    fn at(&self, slot: SlotIndex) -> &Slot {
        &self.slots[slot.0 as usize]
    }

    /// Where `key` was last, and the word of that keyslot if it is open and holds it now.
    fn find(&self, key: KeyId, whereabouts: &Whereabouts) -> Option<(SlotIndex, &Slot, u64)> {
        let index = whereabouts.0.load(Ordering::Relaxed);
        let slot = self.slots.get(index as usize)?;
        // Acquire: what it holds was written before it was opened.
        let word = slot.word.load(Ordering::Acquire);
        let is_there = word & OPEN != 0 && slot.key.load(Ordering::Relaxed) == key.number();
        is_there.then_some((SlotIndex(index), slot, word))
    }

    /// Whether `key` seems to be in an open keyslot.
    pub(super) fn seems_there(&self, key: KeyId, whereabouts: &Whereabouts) -> bool {
        self.find(key, whereabouts).is_some()
    }

    /// Shares the keyslot that holds `key`, if it is open and where it is thought to be.
    pub(super) fn share(&self, key: KeyId, whereabouts: &Whereabouts) -> Share {
        let (index, slot) = loop {
            let Some((index, slot, word)) = self.find(key, whereabouts) else { return Share::No };
            // Where a count is full, the table takes over.
            if users(word) == USERS_MAX || hits(word) == HITS_MAX {
                return Share::No;
            }
            let counted = word + USER + HIT;
            let tried = slot.word.compare_exchange_weak(word, counted, Ordering::Acquire, Ordering::Relaxed);
            if tried.is_ok() {
                break (index, slot);
            }
        };
        // In use from here on, so it keeps its key.
        let grant = Grant { slot: index, filling: slot.filling.load(Ordering::Relaxed) };
        match slot.key.load(Ordering::Relaxed) == key.number() {
            true => Share::Yes(grant),
            false => Share::Mistaken(grant),
        }
    }

    /// Gives a keyslot back, if it is open. `false`: it is for the table to count.
    pub(super) fn give_back(&self, slot: SlotIndex) -> bool {
        let slot = self.at(slot);
        let mut word = slot.word.load(Ordering::Relaxed);
        while word & OPEN != 0 {
            if users(word) == 1 {
                self.note_use(slot);
            }
            // Release: the user is done with the engine before anyone finds the keyslot idle.
            match slot.word.compare_exchange_weak(word, word - USER, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
        false
    }

    /// Nobody used another keyslot later. Shared memory is written only if that was not so before.
    fn note_use(&self, slot: &Slot) {
        let latest = self.uses.0.load(Ordering::Relaxed);
        if latest == 0 || slot.last_use.load(Ordering::Relaxed) != latest {
            slot.last_use.store(self.uses.0.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// Opens a keyslot that holds `key` and has so many users. For who has locked the table, which says that it may be.
    fn open(&self, grant: Grant, key: KeyId, users: u32) {
        let slot = self.at(grant.slot);
        slot.key.store(key.number(), Ordering::Relaxed);
        slot.filling.store(grant.filling, Ordering::Relaxed);
        let tag = grant.filling % (OPEN / TAG);
        slot.word.store(OPEN | (tag * TAG) | (u64::from(users) * USER), Ordering::Release);
    }

    /// Closes an open keyslot. For who has locked the table.
    fn close(&self, slot: SlotIndex) -> Closed {
        let at = self.at(slot);
        // Acquire: whoever gave it back is done with the engine.
        let word = at.word.swap(0, Ordering::AcqRel);
        Closed {
            slot,
            users: u32::try_from(users(word)).expect("22 bits"),
            hits: hits(word),
            last_use: at.last_use.load(Ordering::Relaxed),
        }
    }
}

/// The answer to [`OpenSlots::share`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Share {
    Yes(Grant),
    /// The table knows.
    No,
    /// It was closed between the look and the count, filled as often as there are tags, and opened with another key. To be
    /// given back.
    Mistaken(Grant),
}

/// Which keyslots are open, for who has locked the table.
#[derive(Debug, Default)]
pub(super) struct Opened {
    list: Vec<SlotIndex>,
    /// Room for closing them.
    closing: Vec<Closed>,
}

impl Opened {
    /// Closes all of them: from now on the table knows who uses which.
    pub(super) fn close_all(&mut self, slots: &OpenSlots, table: &mut KeyslotTable) {
        let Self { list, closing } = self;
        closing.extend(list.drain(..).map(|slot| slots.close(slot)));
        closing.sort_unstable_by_key(|closed| closed.last_use);
        for Closed { slot, users, hits, .. } in closing.drain(..) {
            table.close(slot, users, hits);
        }
    }

    /// Grants a keyslot that [hits](KeyslotTable::hit), and leaves it open. It may have been open before, when the asker does
    /// not know where its key is.
    pub(super) fn grant(
        &mut self,
        slots: &OpenSlots,
        table: &mut KeyslotTable,
        slot: SlotIndex,
        key: KeyId,
    ) -> Grant {
        match self.list.contains(&slot) {
            true => {
                // Its place among those used last does not matter: it is used now.
                let Closed { users, hits, .. } = slots.close(slot);
                table.close(slot, users, hits);
            }
            false => self.list.push(slot),
        }
        let Acquired::Granted(grant) = table.acquire(key, &mut Vec::new()) else {
            unreachable!("it was seen to hit");
        };
        slots.open(grant, key, table.open(slot));
        grant
    }
}
