//! What every engine owes (`inlinecrypt_core::engine`), checked for every engine of the registry.
//!
//! An engine is tested by being in [`EngineSpec::all_for_tests`]. [`run`] takes one that is open and asks it for
//! everything that the docs of `Engine` and `KeyLadder` promise, as far as its capabilities reach.

use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key, software_secret};
use inlinecrypt_cipher::{Dun, Mode};
use inlinecrypt_core::caps::{Capabilities, KeyTypes};
use inlinecrypt_core::config::{DataUnitSize, Hardware, KeyType};
use inlinecrypt_core::engine::{
    Direction, Engine, Exclusive, KeyLadder, KeyRef, Lifecycle, Piece, SlotIndex,
};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{
    EphemeralWrappedKey, Key, KeyForm, LongTermWrappedKey, RawKey, SoftwareSecret, WRAPPED_KEY_BYTES_MAX,
};
use inlinecrypt_core::memory::{ALIGN_BYTES, Memory, MemorySource};
use inlinecrypt_engine::isolated::client::RootGiver;
use inlinecrypt_engine::isolated::{self, IsolatedEngine, LanePriority, ThreadLauncher};
use inlinecrypt_engine::root::Unattended;
use inlinecrypt_engine::{EngineSpec, Root, RootSpec, open};
use proptest::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Asks `engine`, which `spec` describes, to keep every promise.
fn run(spec: &EngineSpec, engine: &dyn Engine) {
    let bargain = Bargain { engine, kdf: spec.kdf() };
    bargain.capabilities_and_ladder_agree();
    bargain.memory_is_zeroed_aligned_and_as_long_as_asked();
    bargain.ciphertext_is_that_of_the_mode_and_nothing_else_is_touched();
    bargain.odd_ranges_are_refused_and_nothing_is_touched();
    bargain.a_key_that_is_not_served_leaves_the_keyslot_empty();
    bargain.many_threads_share_one_key();
    if engine.capabilities().keyslots == 0 {
        bargain.without_keyslots_a_key_is_forgotten_gladly();
    } else {
        bargain.an_empty_keyslot_answers_no_key_and_touches_nothing();
        bargain.programming_replaces_and_evicting_empties();
        bargain.keyslots_do_not_disturb_each_other();
        bargain.programming_beside_a_running_request_does_not_disturb_it();
        bargain.the_same_key_put_back_beside_a_running_request_never_gives_wrong_data();
    }
    bargain.keyslots_that_do_not_exist_are_refused();
    if let Some(lifecycle) = engine.lifecycle() {
        bargain.reset_and_suspend_empty_every_keyslot(lifecycle);
    }
    if let Some(exclusive) = engine.exclusive() {
        bargain.what_was_decided_stays(exclusive);
    }
    if let Some(ladder) = engine.key_ladder() {
        // The ladder works whatever the engine was told to serve.
        bargain.the_ladder_gives_the_published_keys(ladder);
        bargain.import_takes_a_size_or_calls_it_invalid(ladder);
        if bargain.serves(KeyType::HardwareWrapped) {
            bargain.wrapped_keys_encrypt_as_the_derived_raw_keys_do(ladder);
            bargain.generated_keys_are_new_and_work(ladder);
        }
        bargain.whatever_was_not_wrapped_here_is_rejected(ladder);
    }
}

struct Bargain<'e> {
    engine: &'e dyn Engine,
    kdf: KdfVariant,
}

/// DUNs at which carries happen, those just before what short ones can hold, and one with all its limbs used.
const DUNS: [Dun; 6] = [
    Dun::ZERO,
    Dun::from_limbs([0xffff_fffd, 0, 0, 0]),
    Dun::from_limbs([u64::MAX - 2, 0, 0, 0]),
    Dun::from_limbs([u64::MAX, 0, 0, 0]),
    Dun::from_limbs([u64::MAX, u64::MAX, 7, 0]),
    Dun::from_limbs([0x0123_4567_89ab_cdef, 0xfedc, 0xba98, 0x7654]),
];

/// The master key of the published known answers, 00 01 .. 1f.
const MASTER: [u8; 32] = {
    let mut master = [0; 32];
    let mut i = 0;
    while i < 32 {
        #[expect(clippy::cast_possible_truncation, reason = "below 32")]
        let byte = i as u8;
        master[i] = byte;
        i += 1;
    }
    master
};

/// What a key asks for: no more than any engine has. Which DUNs really come is another matter.
const DUN_BYTES: u8 = 4;

fn key_bytes(mode: Mode, seed: u8) -> Vec<u8> {
    (0..mode.info().key_bytes)
        .map(|i| u8::try_from(i).unwrap().wrapping_mul(167).wrapping_add(seed))
        .collect()
}

fn key(mode: Mode, unit: DataUnitSize, form: KeyForm) -> Arc<Key> {
    Key::new(mode, unit, DUN_BYTES, form, Hardware::Allowed).unwrap()
}

fn raw_key(mode: Mode, unit: DataUnitSize, seed: u8) -> Arc<Key> {
    key(mode, unit, KeyForm::Raw(RawKey::new(&key_bytes(mode, seed))))
}

fn bytes_of(unit: DataUnitSize) -> usize {
    unit.bytes().try_into().unwrap()
}

fn plaintext(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 31 % 251).unwrap()).collect()
}

/// What the cipher makes of it, without any engine.
fn expected(mode: Mode, bytes: &[u8], unit: DataUnitSize, first: Dun, plain: &[u8]) -> Vec<u8> {
    let mut data = plain.to_vec();
    mode.info().expand(bytes).unwrap().encrypt(first, bytes_of(unit), &mut data);
    data
}

impl<'e> Bargain<'e> {
    fn memory(&self, content: &[u8]) -> Box<dyn Memory> {
        let mut memory = self.engine.memory().allocate(content.len()).unwrap();
        memory.bytes_mut().copy_from_slice(content);
        memory
    }

    fn keyslots(&self) -> u32 {
        self.engine.capabilities().keyslots
    }

    fn last_slot(&self) -> SlotIndex {
        SlotIndex(self.keyslots() - 1)
    }

    /// The modes and data unit sizes that the engine serves.
    fn configs(&self) -> Vec<(Mode, DataUnitSize)> {
        let units = (0..32).map(|bit| DataUnitSize::from_bytes(1 << bit).unwrap());
        let all = units.flat_map(|unit| Mode::ALL.map(|mode| (mode, unit)));
        all.filter(|&(mode, unit)| self.engine.capabilities().units[mode.index()].contains(unit)).collect()
    }

    /// Those DUNs of which a few data units fit the engine.
    fn duns(&self) -> Vec<Dun> {
        let max = self.engine.capabilities().dun_bytes_max;
        let fits = |first: &Dun| (0..3).all(|units| first.wrapping_add(units).significant_bytes() <= max);
        DUNS.into_iter().filter(fits).collect()
    }

    /// One of them, for promises that have nothing to do with modes.
    fn config(&self) -> (Mode, DataUnitSize) {
        self.configs()[0]
    }

    /// Whether it takes such keys now. An engine that serves one type only has been told which.
    fn serves(&self, key_type: KeyType) -> bool {
        match self.engine.exclusive() {
            Some(exclusive) => exclusive.committed() == Some(key_type),
            None => self.engine.capabilities().key_types.contains(key_type),
        }
    }

    fn serves_raw(&self) -> bool {
        self.serves(KeyType::Raw)
    }

    /// A key that the engine takes. Different seeds, different keys.
    fn any_key(&self, seed: u8) -> Arc<Key> {
        let (mode, unit) = self.config();
        if self.serves_raw() { raw_key(mode, unit, seed) } else { self.wrapped_key(mode, unit, &[seed; 32]) }
    }

    fn ephemeral(&self, master: &[u8; 32]) -> EphemeralWrappedKey {
        let ladder = self.engine.key_ladder().expect("the engine takes wrapped keys");
        ladder.prepare(&ladder.import(&RawKey::new(master)).unwrap()).unwrap()
    }

    fn wrapped_key(&self, mode: Mode, unit: DataUnitSize, master: &[u8; 32]) -> Arc<Key> {
        key(mode, unit, KeyForm::Wrapped(self.ephemeral(master)))
    }

    /// Makes `key` ready for use: in the last keyslot, or with the request.
    fn start<'k>(&self, key: &'k Key) -> Result<KeyRef<'k>, Error> {
        if self.keyslots() == 0 {
            return Ok(KeyRef::Inline(key));
        }
        self.engine.program(self.last_slot(), key)?;
        Ok(KeyRef::Slot(self.last_slot()))
    }

    fn stop(&self, key: &Key) {
        self.engine.evict((self.keyslots() > 0).then(|| self.last_slot()), key).unwrap();
    }

    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        first: Dun,
        content: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let mut memory = self.memory(content);
        self.engine.crypt_range(key, direction, first, &mut *memory, 0..content.len())?;
        Ok(memory.bytes().to_vec())
    }

    /// The kind of a refusal that has to leave all memory as it was.
    fn refusal_untouched(&self, key: KeyRef<'_>, len: usize, range: Range<usize>) -> ErrorKind {
        let content = plaintext(len);
        let mut memory = self.memory(&content);
        let kinds = [Direction::Encrypt, Direction::Decrypt].map(|direction| {
            let refused = self.engine.crypt_range(key, direction, Dun::ZERO, &mut *memory, range.clone());
            refused.unwrap_err().kind()
        });
        assert!(memory.bytes() == content, "the memory was touched");
        assert_eq!(kinds[0], kinds[1]);
        kinds[0]
    }

    fn assert_no_key(&self, slot: SlotIndex) {
        let len = bytes_of(self.config().1);
        assert_eq!(self.refusal_untouched(KeyRef::Slot(slot), len, 0..len), ErrorKind::NoKey);
    }

    fn capabilities_and_ladder_agree(&self) {
        let wrapped = self.engine.capabilities().key_types.contains(KeyType::HardwareWrapped);
        assert_eq!(self.engine.key_ladder().is_some(), wrapped);
        assert!(!self.configs().is_empty());
        assert!(!self.engine.name().is_empty());
    }

    fn memory_is_zeroed_aligned_and_as_long_as_asked(&self) {
        for len in [0, 1, 512, 4096, 70_000] {
            let mut memory = self.engine.memory().allocate(len).unwrap();
            assert_eq!(memory.bytes(), vec![0; len]);
            assert_eq!(memory.bytes().as_ptr().align_offset(ALIGN_BYTES), 0);
            memory.bytes_mut().fill(1);
        }
    }

    fn ciphertext_is_that_of_the_mode_and_nothing_else_is_touched(&self) {
        if !self.serves_raw() {
            return;
        }
        for (mode, unit) in self.configs() {
            let key = raw_key(mode, unit, 1);
            let key_ref = self.start(&key).unwrap();
            // Before and after the range: bytes that are none of the engine's business.
            let (before, len) = (48, 3 * bytes_of(unit));
            let content = plaintext(before + len + 16);
            for first in self.duns() {
                let mut memory = self.memory(&content);
                let range = before..before + len;
                self.engine
                    .crypt_range(key_ref, Direction::Encrypt, first, &mut *memory, range.clone())
                    .unwrap();
                let mut wanted = content.clone();
                wanted[range.clone()].copy_from_slice(&expected(
                    mode,
                    &key_bytes(mode, 1),
                    unit,
                    first,
                    &content[range.clone()],
                ));
                assert!(memory.bytes() == wanted, "{mode} {unit} {first:?}");

                // The last data unit alone, then the others: each stands for itself.
                let last = range.end - bytes_of(unit)..range.end;
                self.engine
                    .crypt_range(
                        key_ref,
                        Direction::Decrypt,
                        first.wrapping_add(2),
                        &mut *memory,
                        last.clone(),
                    )
                    .unwrap();
                let rest = range.start..last.start;
                self.engine.crypt_range(key_ref, Direction::Decrypt, first, &mut *memory, rest).unwrap();
                assert!(memory.bytes() == content, "{mode} {unit} {first:?}");
            }
            self.stop(&key);
        }
    }

    fn odd_ranges_are_refused_and_nothing_is_touched(&self) {
        let key = self.any_key(2);
        let unit = bytes_of(self.config().1);
        let key_ref = self.start(&key).unwrap();
        for not_whole in [0..1, 0..unit - 1, 0..unit + 1, 16..unit, 0..2 * unit - 16] {
            assert_eq!(self.refusal_untouched(key_ref, 2 * unit, not_whole), ErrorKind::Misaligned);
        }
        let end_before_start = Range { start: unit, end: 0 };
        for outside in
            [0..3 * unit, 2 * unit..3 * unit, 0..usize::MAX, usize::MAX..usize::MAX, end_before_start]
        {
            assert_eq!(self.refusal_untouched(key_ref, 2 * unit, outside), ErrorKind::Invalid);
        }
        // No data units are a whole number of them.
        for empty in [0..0, unit..unit, 2 * unit..2 * unit] {
            let mut memory = self.memory(&plaintext(2 * unit));
            self.engine.crypt_range(key_ref, Direction::Encrypt, Dun::ZERO, &mut *memory, empty).unwrap();
            assert_eq!(memory.bytes(), plaintext(2 * unit));
        }
        // And the key is as good as before.
        self.crypt(key_ref, Direction::Encrypt, Dun::ZERO, &plaintext(unit)).unwrap();
        self.stop(&key);
    }

    fn a_key_that_is_not_served_leaves_the_keyslot_empty(&self) {
        let good = self.any_key(3);
        let (mode, unit) = self.config();
        let mut bad = Vec::new();
        for bit in 4..=20 {
            let size = DataUnitSize::from_bytes(1 << bit).unwrap();
            let mode = self.configs()[0].0;
            if !self.engine.capabilities().units[mode.index()].contains(size) {
                bad.push((raw_key(mode, size, 3), ErrorKind::Unsupported));
            }
        }
        if !self.serves_raw() {
            bad.push((raw_key(mode, unit, 3), ErrorKind::Unsupported));
        }
        for mode in Mode::ALL {
            if self.engine.capabilities().units[mode.index()].is_empty() {
                bad.push((raw_key(mode, unit, 3), ErrorKind::Unsupported));
            }
        }
        let rejected = match self.serves(KeyType::HardwareWrapped) {
            true => ErrorKind::KeyRejected,
            false => ErrorKind::Unsupported,
        };
        for len in [32, 64, WRAPPED_KEY_BYTES_MAX] {
            let blob = EphemeralWrappedKey::new(&vec![0x17; len]);
            bad.push((key(mode, unit, KeyForm::Wrapped(blob)), rejected));
        }
        for (bad, kind) in bad {
            if self.keyslots() == 0 {
                let len = bytes_of(bad.config().data_unit_size());
                assert_eq!(self.refusal_untouched(KeyRef::Inline(&bad), len, 0..len), kind);
                continue;
            }
            self.engine.program(self.last_slot(), &good).unwrap();
            let why = self.engine.program(self.last_slot(), &bad).unwrap_err();
            assert_eq!(why.kind(), kind, "{why}");
            self.assert_no_key(self.last_slot());
        }
    }

    fn many_threads_share_one_key(&self) {
        let key = self.any_key(4);
        let unit = bytes_of(self.config().1);
        let key_ref = self.start(&key).unwrap();
        let plain = plaintext(8 * unit);
        let alone: Vec<_> = (0..4_u64)
            .map(|n| self.crypt(key_ref, Direction::Encrypt, Dun::from(n * 1000), &plain).unwrap())
            .collect();
        std::thread::scope(|scope| {
            for n in 0..4_u64 {
                let (plain, alone) = (&plain, &alone[usize::try_from(n).unwrap()]);
                scope.spawn(move || {
                    for _ in 0..50 {
                        let dun = Dun::from(n * 1000);
                        assert!(self.crypt(key_ref, Direction::Encrypt, dun, plain).unwrap() == *alone);
                        assert!(self.crypt(key_ref, Direction::Decrypt, dun, alone).unwrap() == *plain);
                    }
                });
            }
        });
        self.stop(&key);
    }

    fn without_keyslots_a_key_is_forgotten_gladly(&self) {
        let key = self.any_key(5);
        for _ in 0..2 {
            self.engine.evict(None, &key).unwrap();
        }
        // Forgotten is not forbidden.
        let unit = bytes_of(self.config().1);
        self.crypt(KeyRef::Inline(&key), Direction::Encrypt, Dun::ZERO, &plaintext(unit)).unwrap();
        self.engine.evict(None, &key).unwrap();
    }

    fn an_empty_keyslot_answers_no_key_and_touches_nothing(&self) {
        let key = self.any_key(6);
        for slot in (0..self.keyslots()).map(SlotIndex) {
            self.engine.evict(Some(slot), &key).unwrap();
            self.assert_no_key(slot);
        }
    }

    fn programming_replaces_and_evicting_empties(&self) {
        let slot = self.last_slot();
        let plain = plaintext(bytes_of(self.config().1));
        let (one, other) = (self.any_key(7), self.any_key(8));
        let encrypt = || self.crypt(KeyRef::Slot(slot), Direction::Encrypt, Dun::ZERO, &plain).unwrap();

        self.engine.program(slot, &one).unwrap();
        let with_one = encrypt();
        self.engine.program(slot, &other).unwrap();
        let with_other = encrypt();
        assert_ne!(with_one, with_other);
        // The same key again, as after a reset.
        self.engine.program(slot, &other).unwrap();
        assert_eq!(encrypt(), with_other);
        self.engine.program(slot, &one).unwrap();
        assert_eq!(encrypt(), with_one);

        self.engine.evict(Some(slot), &one).unwrap();
        self.assert_no_key(slot);
        self.engine.evict(Some(slot), &one).unwrap();
        self.assert_no_key(slot);
    }

    fn keyslots_do_not_disturb_each_other(&self) {
        let slots: Vec<_> = (0..self.keyslots().min(64)).map(SlotIndex).collect();
        let plain = plaintext(bytes_of(self.config().1));
        let keys: Vec<_> = slots.iter().map(|slot| self.any_key(u8::try_from(slot.0).unwrap())).collect();
        for (slot, key) in slots.iter().zip(&keys) {
            self.engine.program(*slot, key).unwrap();
        }
        let encrypt = |slot: &SlotIndex| {
            self.crypt(KeyRef::Slot(*slot), Direction::Encrypt, Dun::ZERO, &plain).unwrap()
        };
        let ciphertexts: Vec<_> = slots.iter().map(encrypt).collect();
        for (n, one) in ciphertexts.iter().enumerate() {
            assert!(ciphertexts[..n].iter().all(|other| other != one));
        }
        // One after the other goes; the others stay as they were.
        for (n, (slot, key)) in slots.iter().zip(&keys).enumerate() {
            self.engine.evict(Some(*slot), key).unwrap();
            self.assert_no_key(*slot);
            assert_eq!(slots[n + 1..].iter().map(encrypt).collect::<Vec<_>>(), ciphertexts[n + 1..]);
        }
    }

    fn programming_beside_a_running_request_does_not_disturb_it(&self) {
        if self.keyslots() < 2 {
            return;
        }
        let (busy, other) = (SlotIndex(0), self.last_slot());
        let (key, passing) = (self.any_key(9), self.any_key(10));
        let plain = plaintext(4 * bytes_of(self.config().1));
        self.engine.program(busy, &key).unwrap();
        let encrypt = || self.crypt(KeyRef::Slot(busy), Direction::Encrypt, Dun::ZERO, &plain).unwrap();
        let wanted = encrypt();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    self.engine.program(other, &passing).unwrap();
                    self.engine.evict(Some(other), &passing).unwrap();
                }
            });
            let all_equal = (0..200).all(|_| encrypt() == wanted);
            done.store(true, Ordering::Relaxed);
            assert!(all_equal);
        });
        self.engine.evict(Some(busy), &key).unwrap();
    }

    /// The one overlap that the framework may cause: after a reset it puts keys back while requests hold them.
    fn the_same_key_put_back_beside_a_running_request_never_gives_wrong_data(&self) {
        let slot = self.last_slot();
        let key = self.any_key(12);
        let plain = plaintext(4 * bytes_of(self.config().1));
        self.engine.program(slot, &key).unwrap();
        let wanted = self.crypt(KeyRef::Slot(slot), Direction::Encrypt, Dun::ZERO, &plain).unwrap();
        let done = AtomicBool::new(false);
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    self.engine.program(slot, &key).unwrap();
                }
            });
            let outcomes = (0..200)
                .map(|_| {
                    let mut memory = self.memory(&plain);
                    let key = KeyRef::Slot(slot);
                    let result = self.engine.crypt_range(
                        key,
                        Direction::Encrypt,
                        Dun::ZERO,
                        &mut *memory,
                        0..plain.len(),
                    );
                    (result.map_err(|why| why.kind()), memory.bytes().to_vec())
                })
                .collect();
            done.store(true, Ordering::Relaxed);
            outcomes
        });
        for (result, content) in outcomes {
            match result {
                Ok(()) => assert!(content == wanted),
                Err(kind) => {
                    assert_eq!(kind, ErrorKind::NoKey);
                    assert!(content == plain);
                }
            }
        }
        self.stop(&key);
    }

    fn reset_and_suspend_empty_every_keyslot(&self, lifecycle: &dyn Lifecycle) {
        let (slot, key) = (self.last_slot(), self.any_key(14));
        let plain = plaintext(bytes_of(self.config().1));
        let encrypt = || self.crypt(KeyRef::Slot(slot), Direction::Encrypt, Dun::ZERO, &plain);
        self.engine.program(slot, &key).unwrap();
        let wanted = encrypt().unwrap();
        let capabilities = self.engine.capabilities().clone();
        let committed = self.engine.exclusive().map(|exclusive| exclusive.committed());
        let comes_back = || {
            for slot in (0..self.keyslots()).map(SlotIndex) {
                self.assert_no_key(slot);
            }
            // The very same key, prepared or not, is good again.
            self.engine.program(slot, &key).unwrap();
            assert_eq!(encrypt().unwrap(), wanted);
            assert_eq!(*self.engine.capabilities(), capabilities);
            assert_eq!(self.engine.exclusive().map(|exclusive| exclusive.committed()), committed);
        };
        for _ in 0..3 {
            lifecycle.reset().unwrap();
            comes_back();
            // Twice is once.
            lifecycle.suspend().unwrap();
            lifecycle.suspend().unwrap();
            assert_eq!(encrypt().unwrap_err().kind(), ErrorKind::EngineFailed);
            assert_eq!(self.engine.program(slot, &key).unwrap_err().kind(), ErrorKind::EngineFailed);
            assert_eq!(self.engine.evict(Some(slot), &key).unwrap_err().kind(), ErrorKind::EngineFailed);
            lifecycle.resume().unwrap();
            lifecycle.resume().unwrap();
            comes_back();
        }
        self.stop(&key);
    }

    fn what_was_decided_stays(&self, exclusive: &dyn Exclusive) {
        let committed = exclusive.committed().unwrap();
        let other = match committed {
            KeyType::Raw => KeyType::HardwareWrapped,
            KeyType::HardwareWrapped => KeyType::Raw,
        };
        assert!(self.engine.capabilities().key_types.contains(other));
        let key = self.any_key(15);
        let key_ref = self.start(&key).unwrap();
        let why = exclusive.commit(other).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::Unsupported, "{why}");
        exclusive.commit(committed).unwrap();
        assert_eq!(exclusive.committed(), Some(committed));
        // The key that was there does not notice.
        let unit = bytes_of(self.config().1);
        self.crypt(key_ref, Direction::Encrypt, Dun::ZERO, &plaintext(unit)).unwrap();
        self.stop(&key);
    }

    fn keyslots_that_do_not_exist_are_refused(&self) {
        let key = self.any_key(11);
        let unit = bytes_of(self.config().1);
        for slot in [self.keyslots(), self.keyslots() + 1, u32::MAX].map(SlotIndex) {
            assert_eq!(self.engine.program(slot, &key).unwrap_err().kind(), ErrorKind::Invalid);
            assert_eq!(self.engine.evict(Some(slot), &key).unwrap_err().kind(), ErrorKind::Invalid);
            assert_eq!(self.refusal_untouched(KeyRef::Slot(slot), unit, 0..unit), ErrorKind::Invalid);
        }
        if self.keyslots() > 0 {
            assert_eq!(self.engine.evict(None, &key).unwrap_err().kind(), ErrorKind::Invalid);
            assert_eq!(self.refusal_untouched(KeyRef::Inline(&key), unit, 0..unit), ErrorKind::Invalid);
        }
    }

    fn the_ladder_gives_the_published_keys(&self, ladder: &dyn KeyLadder) {
        // linux-inline-encryption known answers: the software secrets of the Android kernel tests (zero master), and
        // one that fscrypt-crypt-util computes (00..1f).
        let zero = match self.kdf {
            KdfVariant::V1 | KdfVariant::LegacyKdf => {
                "e26fb19b4fb6266fc7c5fc9654efad643cfebc64c097341155195595c28d5ec9"
            }
            KdfVariant::Rearranged => "4ef06e6aa984104667863f15087c12bbfb8e4715145bc06b5982abd4198385b4",
        };
        let secret = ladder.derive_software_secret(&self.ephemeral(&[0; 32])).unwrap();
        assert_eq!(hex::encode(secret.expose()), zero);
        let secret = ladder.derive_software_secret(&self.ephemeral(&MASTER)).unwrap();
        assert_eq!(*secret.expose(), *software_secret(self.kdf, &MASTER));
        if self.kdf == KdfVariant::V1 {
            let known = "48b69fb100fda3d600b75d7f25e2b8f1cf95e5de1bd624b9273d537519270c65";
            assert_eq!(hex::encode(secret.expose()), known);
        }
        for blob in
            [ladder.import(&RawKey::new(&MASTER)).unwrap().as_bytes(), self.ephemeral(&MASTER).as_bytes()]
        {
            assert!((32..=WRAPPED_KEY_BYTES_MAX).contains(&blob.len()));
            assert!(blob.windows(8).all(|window| !MASTER.windows(8).any(|part| part == window)));
        }
    }

    fn wrapped_keys_encrypt_as_the_derived_raw_keys_do(&self, _ladder: &dyn KeyLadder) {
        // The 64 bytes that shipped hardware derives; the first three from the Android kernel tests.
        let zero = match self.kdf {
            KdfVariant::V1 => {
                "cbe5db40215a3d386d61e54ef2f8a7814b00bacf35b316f88e68e89a47abbab4\
                 834c27dac8a91ae1c3304f31b5f2202c14989661bafccc56cf6212d8b1f72691"
            }
            KdfVariant::LegacyKdf => {
                "6361f802b37aa64a075784bede2341f1d9236e646c70460f15b37ce5ff43a54f\
                 15d95693343d528b67372a7f383ed8e7c45ed0899e02825453c9419aafa3695f"
            }
            KdfVariant::Rearranged => {
                "dba0a67e471be39fd1ec289945f52145df12937a0b42915f7c711feb47403e6a\
                 e5b7b52968a8cc635d10ab8b8724ef5dec6236d81a1b387808c407ce01c56388"
            }
        };
        let mut known = vec![([0; 32], Mode::Aes256Xts, hex::decode(zero).unwrap())];
        if self.kdf == KdfVariant::V1 {
            let bytes = "16317c8fe3133e7aef46bdede2b39f09a81e9fbe0c095f906c5c1341da6eaf17\
                         f151e2982f4f14a5495f78761066cafa5ebb995997d3fb5c8678bb394b6b57dc";
            known.push((MASTER, Mode::Aes256Xts, hex::decode(bytes).unwrap()));
        }
        for mode in Mode::ALL {
            known.push((MASTER, mode, inline_encryption_key(self.kdf, &MASTER, mode).to_vec()));
        }
        for (mode, unit) in self.configs() {
            for (master, _, derived) in known.iter().filter(|(_, of, _)| *of == mode) {
                let wrapped = self.wrapped_key(mode, unit, master);
                let key_ref = self.start(&wrapped).unwrap();
                let plain = plaintext(2 * bytes_of(unit));
                for first in self.duns() {
                    let ciphertext = self.crypt(key_ref, Direction::Encrypt, first, &plain).unwrap();
                    assert!(ciphertext == expected(mode, derived, unit, first, &plain), "{mode} {unit}");
                    assert!(self.crypt(key_ref, Direction::Decrypt, first, &ciphertext).unwrap() == plain);
                }
                self.stop(&wrapped);
            }
        }
    }

    fn generated_keys_are_new_and_work(&self, ladder: &dyn KeyLadder) {
        let (mode, unit) = self.config();
        let plain = plaintext(bytes_of(unit));
        let ciphertexts: Vec<_> = (0..3)
            .map(|_| {
                let ephemeral = ladder.prepare(&ladder.generate().unwrap()).unwrap();
                ladder.derive_software_secret(&ephemeral).unwrap();
                let key = key(mode, unit, KeyForm::Wrapped(ephemeral));
                let key_ref = self.start(&key).unwrap();
                let ciphertext = self.crypt(key_ref, Direction::Encrypt, Dun::ZERO, &plain).unwrap();
                self.stop(&key);
                ciphertext
            })
            .collect();
        assert!(
            ciphertexts[0] != ciphertexts[1]
                && ciphertexts[1] != ciphertexts[2]
                && ciphertexts[0] != ciphertexts[2]
        );
    }

    fn import_takes_a_size_or_calls_it_invalid(&self, ladder: &dyn KeyLadder) {
        let mut taken = 0;
        for len in 16..=64 {
            match ladder.import(&RawKey::new(&vec![7; len])) {
                Ok(long_term) => {
                    taken += 1;
                    ladder.prepare(&long_term).unwrap();
                }
                Err(why) => assert_eq!(why.kind(), ErrorKind::Invalid, "{why}"),
            }
        }
        assert!(taken > 0);
    }

    /// Everything but a blob of the right form, bit for bit.
    fn whatever_was_not_wrapped_here_is_rejected(&self, ladder: &dyn KeyLadder) {
        let long_term = ladder.import(&RawKey::new(&MASTER)).unwrap();
        let ephemeral = ladder.prepare(&long_term).unwrap();
        let (long_term, ephemeral) = (long_term.as_bytes(), ephemeral.as_bytes());
        let (mode, unit) = self.config();
        let good = self.any_key(13);

        for blob in changed(long_term).iter().map(Vec::as_slice).chain([ephemeral]) {
            let why = ladder.prepare(&LongTermWrappedKey::new(blob)).unwrap_err();
            assert_eq!(why.kind(), ErrorKind::KeyRejected, "{why}");
        }
        for blob in changed(ephemeral).iter().map(Vec::as_slice).chain([long_term]) {
            let why = ladder.derive_software_secret(&EphemeralWrappedKey::new(blob)).unwrap_err();
            assert_eq!(why.kind(), ErrorKind::KeyRejected, "{why}");
            let form = KeyForm::Wrapped(EphemeralWrappedKey::new(blob));
            // Sizes that a key cannot have never reach an engine.
            let Ok(bad) = Key::new(mode, unit, DUN_BYTES, form, Hardware::Allowed) else {
                continue;
            };
            if !self.serves(KeyType::HardwareWrapped) {
                continue;
            }
            if self.keyslots() == 0 {
                let len = bytes_of(unit);
                assert_eq!(self.refusal_untouched(KeyRef::Inline(&bad), len, 0..len), ErrorKind::KeyRejected);
            } else {
                self.engine.program(self.last_slot(), &good).unwrap();
                let why = self.engine.program(self.last_slot(), &bad).unwrap_err();
                assert_eq!(why.kind(), ErrorKind::KeyRejected, "{why}");
                self.assert_no_key(self.last_slot());
            }
        }
        // The messages show nothing of the bytes.
        let why = ladder.derive_software_secret(&EphemeralWrappedKey::new(&MASTER)).unwrap_err();
        assert!(!why.chain().contains("000102") && !format!("{why:?}").contains("1, 2, 3"), "{why:?}");
    }
}

/// `blob` with each of its bits flipped, at every other length, and things that are no blob at all.
fn changed(blob: &[u8]) -> Vec<Vec<u8>> {
    let flipped = (0..blob.len() * 8).map(|bit| {
        let mut changed = blob.to_vec();
        changed[bit / 8] ^= 1 << (bit % 8);
        changed
    });
    let shorter = (0..blob.len()).map(|len| blob[..len].to_vec());
    let tails = (1..blob.len()).map(|from| blob[from..].to_vec());
    let longer = (blob.len() + 1..=WRAPPED_KEY_BYTES_MAX + 1).map(|len| {
        let mut changed = blob.to_vec();
        changed.resize(len, 0);
        changed
    });
    let raw = [16, 32, 64, blob.len()].map(plaintext);
    flipped.chain(shorter).chain(tails).chain(longer).chain(raw).collect()
}

/// A root in a directory that goes with it.
fn new_root() -> (tempfile::TempDir, Root) {
    let directory = tempfile::tempdir().unwrap();
    let root = Root::create_file(directory.path().join("root")).unwrap();
    (directory, root)
}

/// The engine that `spec` describes, ready to program: one that serves either key type, once told each.
fn ready(spec: &EngineSpec, root: Option<&Root>) -> Vec<Arc<dyn Engine>> {
    let start = || open(spec, root).unwrap_or_else(|why| panic!("{spec}: {}", why.chain()));
    let engine = start();
    if engine.exclusive().is_none() {
        return vec![engine];
    }
    [KeyType::Raw, KeyType::HardwareWrapped]
        .into_iter()
        .map(|key_type| {
            let engine = start();
            engine.exclusive().unwrap().commit(key_type).unwrap();
            engine
        })
        .collect()
}

/// The engine, ready for wrapped keys, if it ever takes them.
fn ready_for_wrapped(spec: &EngineSpec, root: &Root) -> Option<Arc<dyn Engine>> {
    let engine = open(spec, Some(root)).unwrap();
    engine.key_ladder()?;
    if let Some(exclusive) = engine.exclusive() {
        exclusive.commit(KeyType::HardwareWrapped).unwrap();
    }
    Some(engine)
}

#[test]
fn every_engine_keeps_the_bargain() {
    let (_directory, root) = new_root();
    for spec in EngineSpec::all_for_tests() {
        for root in [None, Some(&root)] {
            for engine in ready(&spec, root) {
                let decided = engine.exclusive().and_then(|exclusive| exclusive.committed());
                let rooted = if root.is_some() { "with a root" } else { "without a root" };
                eprintln!("{spec}, {rooted}, {decided:?}");
                run(&spec, &*engine);
                // Nothing that one run leaves behind changes the next.
                run(&spec, &*engine);
            }
        }
    }
}

/// The engine of `spec` at the other end of a socket and of shared memory, decided for `key_type` if it must be.
fn isolated(spec: &EngineSpec, root: Option<&RootSpec>, key_type: KeyType) -> Arc<IsolatedEngine> {
    let root = root.cloned();
    let giver = root.map(|root| Arc::new(move || root.gather(&mut Unattended)) as Arc<RootGiver>);
    let options = isolated::Options { data_bytes: 64 << 20, ..isolated::Options::new(spec.to_string()) };
    let engine = isolated::start(Arc::new(ThreadLauncher), giver, options).unwrap().engine;
    if let Some(exclusive) = engine.exclusive() {
        exclusive.commit(key_type).unwrap();
    }
    engine
}

#[test]
fn every_engine_keeps_the_bargain_from_afar() {
    let (directory, _root) = new_root();
    let root = RootSpec::File(directory.path().join("root"));
    for spec in EngineSpec::all_for_tests() {
        let near = open(&spec, None).unwrap();
        for (root, key_type) in
            [(None, KeyType::Raw), (Some(&root), KeyType::Raw), (Some(&root), KeyType::HardwareWrapped)]
        {
            let served = isolated_serves(&spec, root, key_type);
            if !served {
                continue;
            }
            let engine = isolated(&spec, root, key_type);
            assert_eq!(engine.name(), near.name());
            println!("{spec} from afar, {key_type:?}");
            run(&spec, &*engine);
        }
    }
}

/// Orders are cut by bytes, in the midst of a piece, too: what comes out is what the engine makes of all of it together.
#[test]
fn requests_of_several_orders_are_as_those_of_one() {
    const UNIT: usize = 4096;
    // Three data units and a half; less than one; more than all.
    for order_bytes_max in [14 << 10, 100, 1 << 20] {
        let options =
            isolated::Options { data_bytes: 8 << 20, order_bytes_max, ..isolated::Options::new("software") };
        let engine = isolated::start(Arc::new(ThreadLauncher), None, options).unwrap().engine;
        let near = open(&"software".parse().unwrap(), None).unwrap();
        let unit = DataUnitSize::from_bytes(4096).unwrap();
        let raw: Vec<u8> = (0..64).collect();
        let key =
            Key::new(Mode::Aes256Xts, unit, 8, KeyForm::Raw(RawKey::new(&raw)), Hardware::Allowed).unwrap();
        let mut end = 0;
        let pieces: Vec<Piece> = [1usize, 3, 4, 0, 17, 2, 90]
            .into_iter()
            .chain(std::iter::repeat_n(1, 70))
            .map(|units| {
                let start = end;
                end += units * UNIT;
                Piece { first: Dun::from_limbs([1000 + start as u64, 0, 0, 0]), range: start..end }
            })
            .collect();
        let plain: Vec<u8> = (0..251).cycle().take(end).collect();
        let transform = |engine: &dyn Engine, direction, bytes: &[u8]| {
            engine.program(SlotIndex(0), &key).unwrap();
            let mut memory = engine.memory().allocate(bytes.len()).unwrap();
            memory.bytes_mut().copy_from_slice(bytes);
            let mut work = pieces.clone();
            engine.crypt(KeyRef::Slot(SlotIndex(0)), direction, &mut *memory, &mut work).unwrap();
            memory.bytes().to_vec()
        };
        let encrypted = transform(&*engine, Direction::Encrypt, &plain);
        assert!(encrypted == transform(&*near, Direction::Encrypt, &plain), "{order_bytes_max}");
        assert!(transform(&*engine, Direction::Decrypt, &encrypted) == plain, "{order_bytes_max}");
    }
}

/// It is its process that has it, and a thread of the host's would take it along.
#[test]
fn an_engine_on_a_thread_of_its_host_has_no_real_time_priority() {
    let options =
        isolated::Options { priority: LanePriority::Realtime, ..isolated::Options::new("software") };
    let error = isolated::start(Arc::new(ThreadLauncher), None, options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("real-time priority is for an engine process"), "{error}");
}

/// Whether the engine of `spec` serves keys of `key_type` at all.
fn isolated_serves(spec: &EngineSpec, root: Option<&RootSpec>, key_type: KeyType) -> bool {
    let root = root.map(|root| Root::open(root).unwrap());
    open(spec, root.as_ref()).unwrap().capabilities().key_types.contains(key_type)
}

#[test]
fn an_undecided_engine_offers_everything_and_programs_nothing() {
    let (_directory, root) = new_root();
    let mut undecided = 0;
    for spec in EngineSpec::all_for_tests() {
        let engine = open(&spec, Some(&root)).unwrap();
        let Some(exclusive) = engine.exclusive() else { continue };
        undecided += 1;
        assert_eq!(exclusive.committed(), None);
        assert_eq!(engine.capabilities().key_types, KeyTypes::BOTH);
        let bargain = Bargain { engine: &*engine, kdf: spec.kdf() };
        let (mode, unit) = bargain.config();
        for key in [raw_key(mode, unit, 1), bargain.wrapped_key(mode, unit, &MASTER)] {
            let why = engine.program(SlotIndex(0), &key).unwrap_err();
            assert_eq!(why.kind(), ErrorKind::EngineFailed, "{why}");
            bargain.assert_no_key(SlotIndex(0));
        }
        let ladder = engine.key_ladder().unwrap();
        bargain.the_ladder_gives_the_published_keys(ladder);
        // What was prepared before the decision is good after it.
        let key = bargain.wrapped_key(mode, unit, &MASTER);
        exclusive.commit(KeyType::HardwareWrapped).unwrap();
        engine.program(SlotIndex(0), &key).unwrap();
    }
    assert!(undecided >= 2);
}

#[test]
fn without_a_root_an_engine_takes_raw_keys_only() {
    for spec in EngineSpec::all_for_tests() {
        let engine = open(&spec, None).unwrap();
        assert!(!engine.capabilities().key_types.contains(KeyType::HardwareWrapped));
    }
}

#[test]
fn a_stored_key_gives_the_same_ciphertext_at_every_start_and_a_prepared_one_only_at_its_own() {
    let (directory, root) = new_root();
    for spec in EngineSpec::all_for_tests() {
        let Some(first) = ready_for_wrapped(&spec, &root) else { continue };
        let again = Root::open_file(directory.path().join("root")).unwrap();
        let second = ready_for_wrapped(&spec, &again).unwrap();
        let (first, second) = (&*first, &*second);
        let stored = first.key_ladder().unwrap().generate().unwrap();
        let ciphertexts = [first, second].map(|engine| {
            let bargain = Bargain { engine, kdf: spec.kdf() };
            let (mode, unit) = bargain.config();
            let prepared = engine.key_ladder().unwrap().prepare(&stored).unwrap();
            let key = key(mode, unit, KeyForm::Wrapped(prepared));
            let plain = plaintext(bytes_of(unit));
            bargain.crypt(bargain.start(&key).unwrap(), Direction::Encrypt, Dun::from(5), &plain).unwrap()
        });
        assert_eq!(ciphertexts[0], ciphertexts[1], "{spec}");

        let of_first = first.key_ladder().unwrap().prepare(&stored).unwrap();
        let why = second.key_ladder().unwrap().derive_software_secret(&of_first).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::KeyRejected, "{spec}");
        assert!(why.chain().contains("prepare it again"), "{}", why.chain());
        assert_eq!(why.errno().raw(), 74, "EBADMSG");
    }
}

#[test]
fn a_key_of_another_root_is_rejected_and_the_message_names_both() {
    let ((_one, mine), (_other, theirs)) = (new_root(), new_root());
    for spec in EngineSpec::all_for_tests() {
        let Some(engine) = ready_for_wrapped(&spec, &theirs) else { continue };
        let stored = engine.key_ladder().unwrap().generate().unwrap();
        let why = open(&spec, Some(&mine)).unwrap().key_ladder().unwrap().prepare(&stored).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::KeyRejected);
        let text = why.chain();
        assert!(text.contains(&mine.id().to_string()), "{text}");
        // Blobs of the first hardware do not say whose they are.
        let is_anonymous = stored.as_bytes().len() == 68;
        assert!(is_anonymous || text.contains(&theirs.id().to_string()), "{text}");
    }
}

/// Engines that are not in the registry for being like another: the most keyslots there can be.
#[test]
fn the_most_keyslots_work_from_first_to_last() {
    let spec: EngineSpec = "software:slots=65536".parse().unwrap();
    let engine = open(&spec, None).unwrap();
    let bargain = Bargain { engine: &*engine, kdf: spec.kdf() };
    bargain.an_empty_keyslot_answers_no_key_and_touches_nothing();
    bargain.programming_replaces_and_evicting_empties();
    bargain.keyslots_that_do_not_exist_are_refused();
}

#[test]
fn the_software_engine_imports_32_bytes_and_nothing_else() {
    let (_directory, root) = new_root();
    let engine = open(&EngineSpec::default(), Some(&root)).unwrap();
    let ladder = engine.key_ladder().unwrap();
    for len in 0..=128 {
        let imported = ladder.import(&RawKey::new(&vec![7; len]));
        assert_eq!(
            imported.map_err(|why| why.kind()).err(),
            (len != 32).then_some(ErrorKind::Invalid),
            "{len}"
        );
    }
}

/// One broken promise each. If the suite does not notice one of them, it checks too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    FailedProgramKeepsFormerKey,
    ProgramKeepsFormerKey,
    EvictKeepsKey,
    EvictOfEmptyFails,
    NoKeyTouchesData,
    DirectionIgnored,
    DunHasOneLimb,
    LastUnitForgotten,
    OddEndRoundedDown,
    OneByteTooMuch,
    KeyslotsShared,
    CapabilitiesWithoutLadder,
    GenerateRepeats,
    SecretOfMaster,
    LongTermIsEphemeral,
}

const FAULTS: [Fault; 15] = [
    Fault::FailedProgramKeepsFormerKey,
    Fault::ProgramKeepsFormerKey,
    Fault::EvictKeepsKey,
    Fault::EvictOfEmptyFails,
    Fault::NoKeyTouchesData,
    Fault::DirectionIgnored,
    Fault::DunHasOneLimb,
    Fault::LastUnitForgotten,
    Fault::OddEndRoundedDown,
    Fault::OneByteTooMuch,
    Fault::KeyslotsShared,
    Fault::CapabilitiesWithoutLadder,
    Fault::GenerateRepeats,
    Fault::SecretOfMaster,
    Fault::LongTermIsEphemeral,
];

/// A good engine with one fault, or none.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Engine>,
    fault: Option<Fault>,
}

impl Faulty {
    fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    fn slot(&self, slot: SlotIndex) -> SlotIndex {
        let exists = slot.0 < self.capabilities().keyslots;
        if self.has(Fault::KeyslotsShared) && exists { SlotIndex(slot.0 / 2) } else { slot }
    }

    fn is_programmed(&self, slot: SlotIndex) -> bool {
        let mut memory = self.inner.memory().allocate(0).unwrap();
        let nothing =
            self.inner.crypt_range(KeyRef::Slot(slot), Direction::Encrypt, Dun::ZERO, &mut *memory, 0..0);
        nothing.is_ok()
    }

    fn ladder(&self) -> &dyn KeyLadder {
        self.inner.key_ladder().unwrap()
    }
}

impl Engine for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }

    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn memory(&self) -> &dyn MemorySource {
        self.inner.memory()
    }

    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error> {
        let slot = self.slot(slot);
        if self.has(Fault::ProgramKeepsFormerKey) && self.is_programmed(slot) {
            return Ok(());
        }
        if let (true, KeyForm::Wrapped(blob)) = (self.has(Fault::FailedProgramKeepsFormerKey), key.form()) {
            // Fails before the keyslot is touched.
            self.derive_software_secret(blob)?;
        }
        self.inner.program(slot, key)
    }

    fn evict(&self, slot: Option<SlotIndex>, key: &Key) -> Result<(), Error> {
        let slot = slot.map(|slot| self.slot(slot));
        match slot {
            Some(slot) if self.has(Fault::EvictKeepsKey) && self.is_programmed(slot) => Ok(()),
            Some(slot) if self.has(Fault::EvictOfEmptyFails) && !self.is_programmed(slot) => {
                Err(Error::new(ErrorKind::EngineFailed, Op::Evict))
            }
            _ => self.inner.evict(slot, key),
        }
    }

    fn crypt(
        &self,
        key: KeyRef<'_>,
        mut direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        let key = match key {
            KeyRef::Slot(slot) => KeyRef::Slot(self.slot(slot)),
            inline @ KeyRef::Inline(_) => inline,
        };
        if self.has(Fault::DirectionIgnored) {
            direction = Direction::Encrypt;
        }
        for piece in pieces {
            let Piece { mut first, mut range } = piece.clone();
            if self.has(Fault::DunHasOneLimb) {
                first = Dun::from(first.limbs()[0]);
            }
            if self.has(Fault::LastUnitForgotten) && range.len() == 3 * 512 {
                range.end -= 512;
            }
            if self.has(Fault::OddEndRoundedDown) && range.start == 0 {
                range.end -= range.end % 512;
            }
            let result = self.inner.crypt_range(key, direction, first, memory, range.clone());
            match &result {
                Ok(()) if self.has(Fault::OneByteTooMuch) => {
                    if let Some(byte) = memory.bytes_mut().get_mut(range.end) {
                        *byte ^= 1;
                    }
                }
                Err(why) if self.has(Fault::NoKeyTouchesData) && why.kind() == ErrorKind::NoKey => {
                    memory.bytes_mut().fill(0);
                }
                _ => {}
            }
            result?;
            piece.finish();
        }
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        if self.has(Fault::CapabilitiesWithoutLadder) { None } else { Some(self) }
    }
}

impl KeyLadder for Faulty {
    fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error> {
        self.ladder().import(raw)
    }

    fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        if self.has(Fault::GenerateRepeats) {
            self.import(&RawKey::new(&[7; 32]))
        } else {
            self.ladder().generate()
        }
    }

    fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        if self.has(Fault::LongTermIsEphemeral) && self.ladder().prepare(long_term).is_err() {
            let ephemeral = EphemeralWrappedKey::new(long_term.as_bytes());
            self.ladder().derive_software_secret(&ephemeral)?;
            return Ok(ephemeral);
        }
        self.ladder().prepare(long_term)
    }

    fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
        let secret = self.ladder().derive_software_secret(ephemeral)?;
        Ok(if self.has(Fault::SecretOfMaster) { SoftwareSecret::new(MASTER.into()) } else { secret })
    }
}

#[test]
fn the_suite_notices_every_broken_promise() {
    let (_directory, root) = new_root();
    let spec: EngineSpec = "software:slots=4".parse().unwrap();
    let noticed = |fault| {
        let engine = Faulty { inner: open(&spec, Some(&root)).unwrap(), fault };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&spec, &engine))).is_err()
    };
    assert!(!noticed(None));
    let missed: Vec<_> = FAULTS.into_iter().filter(|fault| !noticed(Some(*fault))).collect();
    assert!(missed.is_empty(), "{missed:?}");
}

/// What a list of operations may do to keyslots.
#[derive(Clone, Debug)]
enum Operation {
    Program(u32, usize),
    ProgramRejected(u32),
    Evict(u32, usize),
    Crypt(u32),
}

fn operation() -> impl Strategy<Value = Operation> {
    let (slot, key) = (0..4_u32, 0..6_usize);
    prop_oneof![
        3 => (slot.clone(), key.clone()).prop_map(|(slot, key)| Operation::Program(slot, key)),
        1 => slot.clone().prop_map(Operation::ProgramRejected),
        1 => (slot.clone(), key).prop_map(|(slot, key)| Operation::Evict(slot, key)),
        4 => slot.prop_map(Operation::Crypt),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The oracle is a map from keyslot to key.
    #[test]
    fn keyslots_hold_what_a_map_would(operations in prop::collection::vec(operation(), 1..60)) {
        let (_directory, root) = new_root();
        for spec in EngineSpec::all_for_tests() {
          for engine in ready(&spec, Some(&root)) {
            let bargain = Bargain { engine: &*engine, kdf: spec.kdf() };
            let slots = bargain.keyslots();
            if slots == 0 {
                continue;
            }
            let (mode, unit) = bargain.config();
            let keys: Vec<_> = (0..6).map(|n| match bargain.serves(KeyType::HardwareWrapped) {
                true if n % 2 == 1 => bargain.wrapped_key(mode, unit, &[n; 32]),
                _ => bargain.any_key(n),
            }).collect();
            let rejected = key(mode, unit, KeyForm::Wrapped(EphemeralWrappedKey::new(&[9; 72])));
            let plain = plaintext(bytes_of(unit));
            let ciphertexts: Vec<_> = keys.iter().map(|key| {
                let key_ref = bargain.start(key).unwrap();
                bargain.crypt(key_ref, Direction::Encrypt, Dun::ZERO, &plain).unwrap()
            }).collect();
            bargain.stop(&keys[0]);

            let mut oracle: HashMap<u32, usize> = HashMap::new();
            for operation in &operations {
                match *operation {
                    Operation::Program(slot, key) => {
                        engine.program(SlotIndex(slot % slots), &keys[key]).unwrap();
                        oracle.insert(slot % slots, key);
                    }
                    Operation::ProgramRejected(slot) => {
                        prop_assert!(engine.program(SlotIndex(slot % slots), &rejected).is_err());
                        oracle.remove(&(slot % slots));
                    }
                    Operation::Evict(slot, key) => {
                        engine.evict(Some(SlotIndex(slot % slots)), &keys[key]).unwrap();
                        oracle.remove(&(slot % slots));
                    }
                    Operation::Crypt(slot) => {
                        let slot = SlotIndex(slot % slots);
                        match oracle.get(&slot.0) {
                            Some(&key) => prop_assert!(
                                bargain.crypt(KeyRef::Slot(slot), Direction::Encrypt, Dun::ZERO, &plain).unwrap()
                                    == ciphertexts[key]
                            ),
                            None => bargain.assert_no_key(slot),
                        }
                    }
                }
            }
          }
        }
    }
}
