//! The software engine: the smallest complete one. Read it first.
//!
//! ```text
//!   program(slot, key) --> expand the key -----------> keyslots[slot] = Some(cipher)
//!                            ^ raw: the bytes
//!                            ^ wrapped: open the blob, derive the inline encryption key
//!   crypt(slot, range) --> take the slot's cipher --> transform the range in place, here and now
//! ```
//!
//! - A keyslot is a lock around a counted cipher. Each request holds the lock for as long as it takes to count itself
//!   in, never while it computes; nothing is locked or allocated per data unit.
//! - `program` exchanges the keyslot's content once: for the new cipher, or for nothing if there is none. So a failure
//!   leaves the keyslot empty, and the same key put back beside a running request is not missed for a moment. What was
//!   there is wiped when the last request that counted itself in is done.
//! - It serves every mode, data units of 512 bytes to 64 KiB, and DUNs of all 32 bytes.
//! - It is also the fallback, so it does not ask whether a key allows hardware.

use crate::ladder::SoftwareLadder;
use crate::{Root, SoftwareSpec};
use arc_swap::{ArcSwapOption, Guard};
use inlinecrypt_cipher::{Mode, UnitCipher};
use inlinecrypt_core::caps::{Capabilities, DUN_BYTES_MAX, KeyTypes, UnitMask, Unsupported};
use inlinecrypt_core::engine::{Direction, Engine, KeyLadder, KeyRef, Piece, SlotIndex};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{Key, KeyForm};
use inlinecrypt_core::memory::{HeapSource, Memory, MemorySource};
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// An engine that encrypts on the thread that asks.
pub struct SoftwareEngine {
    capabilities: Capabilities,
    keyslots: Box<[Keyslot]>,
    /// Present if the engine has a root.
    ladder: Option<SoftwareLadder>,
}

impl SoftwareEngine {
    /// Starts an engine. With a `root` it serves hardware-wrapped keys, too; without, raw keys only.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](ErrorKind::EngineFailed) if the system gives no randomness.
    pub fn new(spec: SoftwareSpec, root: Option<&Root>) -> Result<Self, Error> {
        let SoftwareSpec { keyslots, kdf } = spec;
        let ladder = root.map(|root| SoftwareLadder::new(root, kdf)).transpose()?;
        let capabilities = Capabilities {
            units: [UnitMask::SERVED; Mode::ALL.len()],
            dun_bytes_max: DUN_BYTES_MAX,
            key_types: if ladder.is_some() { KeyTypes::BOTH } else { KeyTypes::RAW },
            keyslots,
        };
        Ok(Self { capabilities, keyslots: (0..keyslots).map(|_| Keyslot::default()).collect(), ladder })
    }

    /// Opens and expands `key`. What lies between the blob and the cipher is wiped on the way.
    fn expand(&self, key: &Key, op: Op) -> Result<Programmed, Error> {
        let (mode, unit) = (key.config().mode(), key.config().data_unit_size());
        let offered = self.capabilities.units[mode.index()];
        let unsupported = |why: Unsupported| Error::new(ErrorKind::Unsupported, op).because(why);
        if !offered.contains(unit) {
            return Err(unsupported(Unsupported::ModeOrUnit { mode, asked: unit, offered }));
        }
        let cipher = match (key.form(), &self.ladder) {
            (KeyForm::Raw(raw), _) => mode.info().expand(raw.expose()),
            (KeyForm::Wrapped(blob), Some(ladder)) => mode.info().expand(&ladder.inline_key(blob, mode, op)?),
            (KeyForm::Deposited(_), _) => return Err(deposited_elsewhere(op)),
            (KeyForm::Wrapped(_), None) => {
                return Err(unsupported(Unsupported::KeyType(key.config().key_type())));
            }
        };
        let cipher = cipher.map_err(|why| Error::new(ErrorKind::EngineFailed, op).because(why))?;
        let unit_bytes = usize::try_from(unit.bytes()).expect("at most 64 KiB, checked above");
        Ok(Programmed { cipher, unit_bytes })
    }

    fn keyslot(&self, slot: SlotIndex, op: Op) -> Result<&Keyslot, Error> {
        usize::try_from(slot.0).ok().and_then(|index| self.keyslots.get(index)).ok_or_else(|| {
            invalid(op, format!("there is no keyslot {slot}: the engine has {}", self.keyslots.len()))
        })
    }
}

impl fmt::Debug for SoftwareEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { capabilities: _, keyslots, ladder } = self;
        f.debug_struct("SoftwareEngine").field("keyslots", &keyslots.len()).field("ladder", ladder).finish()
    }
}

impl Engine for SoftwareEngine {
    fn name(&self) -> &str {
        SoftwareSpec::NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn memory(&self) -> &dyn MemorySource {
        &HeapSource
    }

    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error> {
        let keyslot = self.keyslot(slot, Op::Program)?;
        let expanded = self.expand(key, Op::Program);
        let (content, result) = match expanded {
            Ok(programmed) => (Some(Arc::new(programmed)), Ok(())),
            Err(why) => (None, Err(why)),
        };
        keyslot.put(content);
        result
    }

    /// Empties the keyslot whatever it holds. Without keyslots there is nothing to forget.
    fn evict(&self, slot: Option<SlotIndex>, _key: &Key) -> Result<(), Error> {
        match slot {
            Some(slot) => self.keyslot(slot, Op::Evict)?.put(None),
            None if self.keyslots.is_empty() => {}
            None => return Err(invalid(Op::Evict, "which keyslot? The engine has some")),
        }
        Ok(())
    }

    /// A key that comes with the request is opened and expanded for this request alone: about 0.1 microseconds for a raw
    /// AES-256-XTS key, half of what encrypting 4 KiB takes; 2 to 5 microseconds for a wrapped key. Engines with
    /// keyslots pay that once per `program`.
    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        let (there, expanded);
        let programmed = match key {
            KeyRef::Slot(slot) => {
                there = self.keyslot(slot, Op::Crypt)?.programmed();
                there.as_deref().ok_or_else(|| {
                    Error::new(ErrorKind::NoKey, Op::Crypt).detail(format!("keyslot {slot} is empty"))
                })?
            }
            KeyRef::Inline(key) if self.keyslots.is_empty() => {
                expanded = self.expand(key, Op::Crypt)?;
                &expanded
            }
            KeyRef::Inline(_) => {
                return Err(invalid(Op::Crypt, "the engine has keyslots, it takes no key with a request"));
            }
        };
        let Programmed { cipher, unit_bytes } = programmed;
        for piece in pieces {
            let data = memory.bytes_mut().get_mut(piece.range.clone()).ok_or_else(|| {
                invalid(Op::Crypt, format!("bytes {:?} are not in the memory given", piece.range))
            })?;
            if !data.len().is_multiple_of(*unit_bytes) {
                return Err(Error::new(ErrorKind::Misaligned, Op::Crypt).detail(format!(
                    "{} bytes are not a whole number of data units of {unit_bytes} bytes",
                    data.len()
                )));
            }
            match direction {
                Direction::Encrypt => cipher.encrypt(piece.first, *unit_bytes, data),
                Direction::Decrypt => cipher.decrypt(piece.first, *unit_bytes, data),
            }
            piece.finish();
        }
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        self.ladder.as_ref().map(|ladder| ladder as _)
    }
}

/// An expanded key. Shared by the requests under way, so that none holds a lock.
///
/// The cipher stays in its box: moving it into the shared allocation would leave a copy of the key behind.
#[derive(Debug)]
struct Programmed {
    cipher: Box<dyn UnitCipher>,
    unit_bytes: usize,
}

/// A place for one key. Exchanged as a whole; who uses what was there goes on using it.
#[derive(Debug, Default)]
struct Keyslot(ArcSwapOption<Programmed>);

impl Keyslot {
    fn programmed(&self) -> Guard<Option<Arc<Programmed>>> {
        self.0.load()
    }

    /// What was there is wiped here, or by the last request that uses it.
    fn put(&self, programmed: Option<Arc<Programmed>>) {
        self.0.store(programmed);
    }
}

/// What an engine says to a ticket for a raw key that it never got.
pub(crate) fn deposited_elsewhere(op: Op) -> Error {
    Error::new(ErrorKind::KeyRejected, op).detail("the raw key is kept by another engine")
}

fn invalid(op: Op, why: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Invalid, op).detail(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_cipher::Dun;
    use inlinecrypt_core::config::{DataUnitSize, Hardware};
    use inlinecrypt_core::key::RawKey;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn engine(keyslots: u32) -> SoftwareEngine {
        SoftwareEngine::new(SoftwareSpec { keyslots, ..SoftwareSpec::default() }, None).unwrap()
    }

    fn key(fill: u8, hardware: Hardware) -> Arc<Key> {
        let raw: Vec<u8> = (0..64).map(|i| fill ^ i).collect();
        let form = KeyForm::Raw(RawKey::new(&raw));
        Key::new(Mode::Aes256Xts, DataUnitSize::MIN_SERVED, 8, form, hardware).unwrap()
    }

    #[test]
    fn a_key_that_forbids_hardware_is_served_because_this_is_the_fallback() {
        engine(1).program(SlotIndex(0), &key(1, Hardware::Forbidden)).unwrap();
    }

    #[test]
    fn putting_the_same_key_back_is_not_noticed_by_requests_under_way() {
        let (engine, key) = (engine(1), key(1, Hardware::Allowed));
        engine.program(SlotIndex(0), &key).unwrap();
        let encrypt = || {
            let mut memory = HeapSource.allocate(512).unwrap();
            let key = KeyRef::Slot(SlotIndex(0));
            engine.crypt_range(key, Direction::Encrypt, Dun::ZERO, &mut *memory, 0..512).unwrap();
            memory.bytes().to_vec()
        };
        let wanted = encrypt();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    engine.program(SlotIndex(0), &key).unwrap();
                }
            });
            let all_equal = (0..5000).all(|_| encrypt() == wanted);
            done.store(true, Ordering::Relaxed);
            assert!(all_equal);
        });
    }

    #[test]
    fn an_evicted_key_is_wiped_once_no_request_uses_it() {
        let (engine, key) = (engine(1), key(1, Hardware::Allowed));
        engine.program(SlotIndex(0), &key).unwrap();
        let under_way = engine.keyslots[0].programmed();
        let watch = Arc::downgrade(under_way.as_ref().unwrap());
        engine.evict(Some(SlotIndex(0)), &key).unwrap();
        assert!(watch.upgrade().is_some());
        drop(under_way);
        assert!(watch.upgrade().is_none());
    }

    #[test]
    fn debug_shows_no_key_and_is_short_however_many_keyslots() {
        let engine = engine(65_536);
        engine.program(SlotIndex(0), &key(0xb0, Hardware::Allowed)).unwrap();
        assert_eq!(format!("{engine:?}"), "SoftwareEngine { keyslots: 65536, ladder: None }");
    }
}
