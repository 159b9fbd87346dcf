//! Comparing what an engine does with what software does: inline ciphertext can always be checked.
//!
//! [`Verified`] stands before any engine and does a share of its requests again in software. At the first difference it
//! stops: that request and all later ones fail, so that no wrong ciphertext reaches the disk and no wrong plaintext the
//! reader, and the message says which keyslot and which DUN.
//!
//! Software needs the key itself. It has it for raw keys. For wrapped ones it depends on the engine: a model can say what
//! its hardware derives, real hardware never would. Requests that cannot be compared are let through.

use inlinecrypt_cipher::{Dun, Mode, UnitCipher};
use inlinecrypt_core::caps::Capabilities;
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::engine::{
    Direction, Engine, Exclusive, KeyLadder, KeyRef, Lifecycle, Piece, SlotHold, SlotIndex,
};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{EphemeralWrappedKey, Key, KeyForm, KeyId};
use inlinecrypt_core::memory::{Memory, MemorySource};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use zeroize::Zeroizing;

/// Which share of the requests is compared: one of so many. Written `all`, `N` or `sample=N`.
///
/// ```
/// use inlinecrypt_engine::Sample;
///
/// assert_eq!("sample=100".parse::<Sample>()?, Sample::one_in(100).unwrap());
/// assert_eq!("all".parse::<Sample>()?.to_string(), "all");
/// # Ok::<(), inlinecrypt_core::error::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sample(NonZeroU32);

impl Sample {
    /// Every request.
    pub const ALL: Self = Self(NonZeroU32::MIN);

    /// One request in `n`, the first among them; `None` if `n` is zero.
    #[must_use]
    pub fn one_in(n: u32) -> Option<Self> {
        NonZeroU32::new(n).map(Self)
    }

    fn takes(self, request: u64) -> bool {
        request.is_multiple_of(u64::from(self.0.get()))
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ALL { f.write_str("all") } else { write!(f, "{}", self.0) }
    }
}

impl FromStr for Sample {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "all" {
            return Ok(Self::ALL);
        }
        let digits = text.strip_prefix("sample=").unwrap_or(text);
        let digits = digits.bytes().all(|byte| byte.is_ascii_digit()).then_some(digits);
        digits.and_then(|digits| digits.parse().ok()).and_then(Self::one_in).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, Op::Open)
                .detail(format!("verify {text:?}: not \"all\" and not a number from 1 to 4294967295"))
        })
    }
}

/// Somebody who knows what an engine derives from a wrapped key.
pub(crate) trait Opener: fmt::Debug + Send + Sync {
    /// The key that encrypts data, if the blob opens.
    fn inline_key(&self, blob: &EphemeralWrappedKey) -> Option<Zeroizing<Vec<u8>>>;
}

/// What software would do with one key.
#[derive(Debug)]
struct Reference {
    key: KeyId,
    cipher: Box<dyn UnitCipher>,
    unit_bytes: usize,
}

/// An engine, a share of whose work is done again in software and compared.
pub struct Verified {
    inner: Arc<dyn Engine>,
    sample: Sample,
    opener: Option<Arc<dyn Opener>>,
    /// Of each keyslot. `None`: empty, or not comparable.
    references: Box<[RwLock<Option<Arc<Reference>>>]>,
    requests: AtomicU64,
    compared: AtomicU64,
    /// Why it stopped, if it did. Never taken back.
    stopped: OnceLock<String>,
}

impl Verified {
    /// Stands before `inner` and compares `sample` of its requests, those with raw keys only.
    #[must_use]
    pub fn new(inner: Arc<dyn Engine>, sample: Sample) -> Self {
        Self::build(inner, sample, None)
    }

    /// Likewise, wrapped keys as well.
    pub(crate) fn with_opener(inner: Arc<dyn Engine>, sample: Sample, opener: Arc<dyn Opener>) -> Self {
        Self::build(inner, sample, Some(opener))
    }

    fn build(inner: Arc<dyn Engine>, sample: Sample, opener: Option<Arc<dyn Opener>>) -> Self {
        let references = (0..inner.capabilities().keyslots).map(|_| RwLock::default()).collect();
        Self {
            inner,
            sample,
            opener,
            references,
            requests: AtomicU64::new(0),
            compared: AtomicU64::new(0),
            stopped: OnceLock::new(),
        }
    }

    /// How many requests were compared.
    #[must_use]
    pub fn compared(&self) -> u64 {
        self.compared.load(Ordering::Relaxed)
    }

    fn check_running(&self, op: Op) -> Result<(), Error> {
        match self.stopped.get() {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::EngineFailed, op).detail(why.clone())),
        }
    }

    fn place(&self, slot: SlotIndex) -> Option<&RwLock<Option<Arc<Reference>>>> {
        self.references.get(usize::try_from(slot.0).ok()?)
    }

    fn reference(&self, slot: SlotIndex) -> Option<Arc<Reference>> {
        self.place(slot)?.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_reference(&self, slot: SlotIndex, reference: Option<Arc<Reference>>) {
        if let Some(place) = self.place(slot) {
            *place.write().unwrap_or_else(PoisonError::into_inner) = reference;
        }
    }

    /// What software makes of `key`, if it can.
    fn expand(&self, key: &Key) -> Option<Reference> {
        let mode = key.config().mode();
        let cipher = match (key.form(), &self.opener) {
            (KeyForm::Raw(raw), _) => mode.info().expand(raw.expose()).ok()?,
            // What hardware derives is a key of this mode.
            (KeyForm::Wrapped(blob), Some(opener)) if mode == Mode::Aes256Xts => {
                mode.info().expand(&opener.inline_key(blob)?).ok()?
            }
            (KeyForm::Wrapped(_) | KeyForm::Deposited(_), _) => return None,
        };
        let unit_bytes = usize::try_from(key.config().data_unit_size().bytes()).ok()?;
        Some(Reference { key: key.id(), cipher, unit_bytes })
    }

    /// Does the work of a request again: `data` as it was before, `result` as the engine left it.
    fn compare(
        &self,
        reference: &Reference,
        place: &str,
        direction: Direction,
        first: Dun,
        data: &mut [u8],
        result: &[u8],
    ) -> Result<(), Error> {
        let Reference { key: _, cipher, unit_bytes } = reference;
        match direction {
            Direction::Encrypt => cipher.encrypt(first, *unit_bytes, data),
            Direction::Decrypt => cipher.decrypt(first, *unit_bytes, data),
        }
        self.compared.fetch_add(1, Ordering::Relaxed);
        let units = data.chunks(*unit_bytes).zip(result.chunks(*unit_bytes));
        let Some((wrong, _)) = (0_u64..).zip(units).find(|(_, (wanted, actual))| wanted != actual) else {
            return Ok(());
        };
        let what = match direction {
            Direction::Encrypt => "encrypted",
            Direction::Decrypt => "decrypted",
        };
        let dun = dun_text(first.wrapping_add(wrong));
        // The first difference is the one to look for; others lose here.
        let _ = self.stopped.set(format!(
            "verification stopped the engine {}: it {what} the data unit with DUN {dun} in {place} differently from \
             software; nothing passes until it is started again",
            self.inner.name()
        ));
        self.check_running(Op::Crypt)
    }
}

/// A DUN as a number, if it fits one; otherwise its limbs, the highest first.
fn dun_text(dun: Dun) -> String {
    match dun.limbs() {
        [low, 0, 0, 0] => low.to_string(),
        [a, b, c, d] => format!("0x{d:016x}{c:016x}{b:016x}{a:016x}"),
    }
}

impl fmt::Debug for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sample = self.sample.to_string();
        f.debug_struct("Verified")
            .field("inner", &self.inner)
            .field("sample", &sample)
            .finish_non_exhaustive()
    }
}

impl Engine for Verified {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    fn memory(&self) -> &dyn MemorySource {
        self.inner.memory()
    }

    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error> {
        self.check_running(Op::Program)?;
        // The same key put back beside running requests stays comparable all the time.
        let former = self.reference(slot).filter(|reference| reference.key == key.id());
        if former.is_none() {
            self.set_reference(slot, None);
        }
        match self.inner.program(slot, key) {
            Ok(()) => {
                if former.is_none() {
                    self.set_reference(slot, self.expand(key).map(Arc::new));
                }
                Ok(())
            }
            Err(why) => {
                self.set_reference(slot, None);
                Err(why)
            }
        }
    }

    fn evict(&self, slot: Option<SlotIndex>, key: &Key) -> Result<(), Error> {
        if let Some(slot) = slot {
            self.set_reference(slot, None);
        }
        self.inner.evict(slot, key)
    }

    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        self.check_running(Op::Crypt)?;
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        if !self.sample.takes(request) {
            return self.inner.crypt(key, direction, memory, pieces);
        }
        let (reference, place) = match key {
            KeyRef::Slot(slot) => (self.reference(slot), format!("keyslot {slot}")),
            KeyRef::Inline(key) => (self.expand(key).map(Arc::new), "no keyslot".to_owned()),
        };
        // One by one, so that what was done before the engine loses a key is compared, too.
        for piece in pieces {
            let Piece { first, range } = piece.clone();
            let before = memory.bytes().get(range.clone()).map(<[u8]>::to_vec);
            self.inner.crypt(key, direction, memory, std::slice::from_mut(piece))?;
            let (Some(reference), Some(mut before)) = (&reference, before) else { continue };
            let after = &memory.bytes()[range.clone()];
            let compared = self.compare(reference, &place, direction, first, &mut before, after);
            if compared.is_err() {
                // Meaningless, and not for anybody's eyes.
                memory.bytes_mut()[range].fill(0);
                return compared;
            }
        }
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        self.inner.key_ladder()
    }

    fn slot_hold(&self) -> SlotHold {
        self.inner.slot_hold()
    }

    fn exclusive(&self) -> Option<&dyn Exclusive> {
        self.inner.exclusive().map(|_inner| self as _)
    }

    fn stopped(&self) -> Option<String> {
        self.stopped.get().cloned().or_else(|| self.inner.stopped())
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        self.inner.lifecycle()
    }
}

impl Exclusive for Verified {
    fn committed(&self) -> Option<KeyType> {
        self.inner.exclusive().and_then(Exclusive::committed)
    }

    fn commit(&self, key_type: KeyType) -> Result<(), Error> {
        self.check_running(Op::Admit)?;
        let inner = self.inner.exclusive();
        inner.expect("only given out if the engine within has one").commit(key_type)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EngineSpec, open};
    use inlinecrypt_core::config::{DataUnitSize, Hardware};
    use inlinecrypt_core::key::RawKey;

    fn engine(spec: &str) -> Arc<dyn Engine> {
        open(&spec.parse::<EngineSpec>().unwrap(), None).unwrap()
    }

    fn key(seed: u8) -> Arc<Key> {
        let raw: Vec<u8> = (0..64).map(|i| i ^ seed).collect();
        let form = KeyForm::Raw(RawKey::new(&raw));
        Key::new(Mode::Aes256Xts, DataUnitSize::MIN_SERVED, 8, form, Hardware::Allowed).unwrap()
    }

    fn crypt(engine: &dyn Engine, first: u64) -> Result<Vec<u8>, Error> {
        let mut memory = engine.memory().allocate(2048).unwrap();
        let key = KeyRef::Slot(SlotIndex(0));
        engine.crypt_range(key, Direction::Encrypt, Dun::from(first), &mut *memory, 0..2048)?;
        Ok(memory.bytes().to_vec())
    }

    #[test]
    fn samples_are_written_in_three_ways() {
        for (text, sample) in [
            ("all", Some(1)),
            ("1", Some(1)),
            ("7", Some(7)),
            ("sample=7", Some(7)),
            ("0", None),
            ("+1", None),
            ("", None),
            ("sample=", None),
            ("sample=all", None),
            ("4294967296", None),
        ] {
            assert_eq!(text.parse::<Sample>().ok(), sample.and_then(Sample::one_in), "{text}");
        }
    }

    #[test]
    fn one_request_in_so_many_is_compared_and_good_ones_pass() {
        let verified = Verified::new(engine("software:slots=1"), Sample::one_in(3).unwrap());
        verified.program(SlotIndex(0), &key(1)).unwrap();
        let plain = engine("software:slots=1");
        plain.program(SlotIndex(0), &key(1)).unwrap();
        for dun in 0..10 {
            assert_eq!(crypt(&verified, dun).unwrap(), crypt(&*plain, dun).unwrap());
        }
        assert_eq!((verified.compared(), verified.stopped()), (4, None));
    }

    #[test]
    fn the_first_wrong_byte_stops_the_engine_and_says_where() {
        let faulty = engine("ice:raw,slots=1,faults=wrong-ciphertext:0.1,seed=5");
        let verified = Verified::new(faulty, Sample::ALL);
        verified.program(SlotIndex(0), &key(1)).unwrap();
        let good = engine("software:slots=1");
        good.program(SlotIndex(0), &key(1)).unwrap();
        let passed = (0..1000).take_while(|&n| match crypt(&verified, n * 4) {
            Ok(data) => {
                assert_eq!(data, crypt(&*good, n * 4).unwrap(), "a wrong one got through");
                true
            }
            Err(why) => {
                assert_eq!(why.kind(), ErrorKind::EngineFailed);
                let text = why.to_string();
                assert!(text.contains("verification stopped the engine ice:raw"), "{text}");
                assert!(text.contains("keyslot 0"), "{text}");
                assert!((n * 4..n * 4 + 4).any(|dun| text.contains(&format!("DUN {dun} "))), "{text}");
                false
            }
        });
        let passed = passed.count();
        assert!(passed < 100, "{passed}");
        let text = verified.stopped().unwrap();
        for _ in 0..3 {
            assert!(crypt(&verified, 0).unwrap_err().to_string().contains(&text));
            let why = verified.program(SlotIndex(0), &key(2)).unwrap_err();
            assert_eq!(why.kind(), ErrorKind::EngineFailed);
        }
        verified.evict(Some(SlotIndex(0)), &key(1)).unwrap();
    }

    #[test]
    fn engines_without_keyslots_are_compared_too() {
        let verified = Verified::new(engine("software:slots=0"), Sample::ALL);
        let mut memory = verified.memory().allocate(512).unwrap();
        let key = key(1);
        verified
            .crypt_range(KeyRef::Inline(&key), Direction::Decrypt, Dun::ZERO, &mut *memory, 0..512)
            .unwrap();
        assert_eq!(verified.compared(), 1);
    }

    #[test]
    fn long_duns_are_shown_in_full() {
        assert_eq!(dun_text(Dun::from(7)), "7");
        assert_eq!(dun_text(Dun::from_limbs([1, 2, 0, 0])), format!("0x{:048x}{:016x}", 2, 1));
    }
}
