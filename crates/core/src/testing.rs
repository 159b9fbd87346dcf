//! Fakes for tests of the framework and of what is built on it.

use crate::backing::{Access, Backing, BackingFacts, Durability, Extent};
use crate::caps::{Capabilities, KeyTypes, UnitMask};
use crate::config::Mode;
use crate::engine::{Direction, Engine, KeyLadder, KeyRef, Piece, SlotHold, SlotIndex};
use crate::error::{Error, ErrorKind, Op};
use crate::key::{Key, KeyForm};
use crate::memory::{HeapSource, Memory, MemorySource};
use inlinecrypt_cipher::{Dun, UnitCipher};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

/// The smallest engine: raw keys, all modes, and faults on demand.
#[derive(Debug)]
pub struct FakeEngine {
    capabilities: Capabilities,
    slots: Vec<RwLock<Option<Held>>>,
    failures: AtomicU32,
    interruptions: AtomicU32,
    crypts: AtomicU32,
    slot_hold: SlotHold,
    program_time: Duration,
}

#[derive(Debug)]
struct Held {
    cipher: Box<dyn UnitCipher>,
    unit_bytes: usize,
}

impl FakeEngine {
    /// An engine with `keyslots` of them.
    #[must_use]
    pub fn with_keyslots(keyslots: u32) -> Self {
        Self::with_capabilities(Capabilities {
            units: [UnitMask::SERVED; Mode::ALL.len()],
            dun_bytes_max: 32,
            key_types: KeyTypes::RAW,
            keyslots,
        })
    }

    /// An engine that advertises this. It serves raw keys only.
    #[must_use]
    pub fn with_capabilities(capabilities: Capabilities) -> Self {
        let slots = (0..capabilities.keyslots).map(|_| RwLock::new(None)).collect();
        Self {
            capabilities,
            slots,
            failures: AtomicU32::new(0),
            interruptions: AtomicU32::new(0),
            crypts: AtomicU32::new(0),
            slot_hold: SlotHold::WhileComputing,
            program_time: Duration::ZERO,
        }
    }

    /// The same, needing its keyslots for whole requests.
    #[must_use]
    pub fn on_the_way_to_the_disk(self) -> Self {
        Self { slot_hold: SlotHold::WholeRequest, ..self }
    }

    /// The same, taking so long to program.
    #[must_use]
    pub fn with_program_time(self, program_time: Duration) -> Self {
        Self { program_time, ..self }
    }

    /// Makes the next `count` programs fail.
    pub fn fail_programs(&self, count: u32) {
        self.failures.store(count, Ordering::Relaxed);
    }

    /// Lets it end and start again in the midst of the next `count` decryptions.
    pub fn interrupt_decryptions(&self, count: u32) {
        self.interruptions.store(count, Ordering::Relaxed);
    }

    /// Forgets what is in every keyslot, as a controller reset does.
    pub fn lose_keyslots(&self) {
        for slot in &self.slots {
            *slot.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// How often it was called to encrypt or decrypt.
    #[must_use]
    pub fn crypts(&self) -> u32 {
        self.crypts.load(Ordering::Relaxed)
    }

    fn expand(key: &Key) -> Result<Held, Error> {
        let KeyForm::Raw(raw) = key.form() else {
            return Err(Error::new(ErrorKind::Unsupported, Op::Program));
        };
        let config = key.config();
        let cipher = config.mode().info().expand(raw.expose());
        let cipher = cipher.map_err(|why| Error::new(ErrorKind::Invalid, Op::Program).because(why))?;
        Ok(Held { cipher, unit_bytes: config.data_unit_size().bytes() as usize })
    }
}

impl Held {
    fn crypt(&self, direction: Direction, first: Dun, data: &mut [u8]) {
        match direction {
            Direction::Encrypt => self.cipher.encrypt(first, self.unit_bytes, data),
            Direction::Decrypt => self.cipher.decrypt(first, self.unit_bytes, data),
        }
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
        let mut held = self.slots[slot.0 as usize].write().unwrap_or_else(PoisonError::into_inner);
        *held = None;
        std::thread::sleep(self.program_time);
        let less = |failures: u32| failures.checked_sub(1);
        if self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            return Err(Error::new(ErrorKind::EngineFailed, Op::Program).detail("told to fail"));
        }
        *held = Some(Self::expand(key)?);
        Ok(())
    }

    fn evict(&self, slot: Option<SlotIndex>, _: &Key) -> Result<(), Error> {
        if let Some(slot) = slot {
            *self.slots[slot.0 as usize].write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }

    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        self.crypts.fetch_add(1, Ordering::Relaxed);
        let less = |interruptions: u32| interruptions.checked_sub(1);
        if direction == Direction::Decrypt
            && self.interruptions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        {
            for piece in pieces {
                memory.bytes_mut()[piece.range.clone()].fill(0xee);
            }
            self.lose_keyslots();
            return Err(Error::new(ErrorKind::Interrupted, Op::Crypt));
        }
        for piece in pieces {
            let data = &mut memory.bytes_mut()[piece.range.clone()];
            match key {
                KeyRef::Inline(key) => Self::expand(key)?.crypt(direction, piece.first, data),
                KeyRef::Slot(slot) => {
                    let held = self.slots[slot.0 as usize].read().unwrap_or_else(PoisonError::into_inner);
                    let held = held.as_ref().ok_or_else(|| Error::new(ErrorKind::NoKey, Op::Crypt))?;
                    held.crypt(direction, piece.first, data);
                }
            }
            piece.finish();
        }
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        None
    }

    fn slot_hold(&self) -> SlotHold {
        self.slot_hold
    }
}

/// An engine that leaves all data as it is. For nothing but to be measured: no key of anybody's ever gets here.
#[derive(Debug)]
pub struct IdleEngine(Capabilities);

impl Default for IdleEngine {
    fn default() -> Self {
        Self(Capabilities {
            units: [UnitMask::SERVED; Mode::ALL.len()],
            dun_bytes_max: 32,
            key_types: KeyTypes::RAW,
            keyslots: 32,
        })
    }
}

impl Engine for IdleEngine {
    fn name(&self) -> &str {
        "idle"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.0
    }

    fn memory(&self) -> &dyn MemorySource {
        &HeapSource
    }

    fn program(&self, _: SlotIndex, _: &Key) -> Result<(), Error> {
        Ok(())
    }

    fn evict(&self, _: Option<SlotIndex>, _: &Key) -> Result<(), Error> {
        Ok(())
    }

    fn crypt(
        &self,
        _: KeyRef<'_>,
        _: Direction,
        _: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        pieces.iter_mut().for_each(Piece::finish);
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        None
    }
}

/// A backing in RAM.
#[derive(Debug)]
pub struct MemBacking {
    bytes: Mutex<Vec<u8>>,
    align_bytes: u32,
}

impl MemBacking {
    /// `len_bytes` of zeroes, addressed in multiples of `align_bytes`.
    #[must_use]
    pub fn new(len_bytes: usize, align_bytes: u32) -> Self {
        Self { bytes: Mutex::new(vec![0; len_bytes]), align_bytes }
    }

    /// A copy of the content.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bytes of a request that keeps the trait's promises.
    fn range(&self, offset: u64, len: usize) -> Range<usize> {
        let start = usize::try_from(offset).expect("within memory");
        let align = self.align_bytes as usize;
        assert!(
            len > 0 && start.is_multiple_of(align) && len.is_multiple_of(align),
            "promised by the volume"
        );
        start..start + len
    }
}

impl Backing for MemBacking {
    fn facts(&self) -> BackingFacts {
        let len_bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        BackingFacts {
            len_bytes,
            align_bytes: self.align_bytes,
            access: Access::ReadWrite,
            can_discard: true,
            does_parts_at_once: false,
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        data.copy_from_slice(&bytes[self.range(offset, data.len())]);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), Error> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes[self.range(offset, data.len())].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        let len = usize::try_from(len).expect("within memory");
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)[self.range(offset, len)].fill(0);
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>, Error> {
        Ok(vec![Extent { offset, len, allocated: true }])
    }

    fn prefetch(&self, _: u64, _: u64) {}
}
