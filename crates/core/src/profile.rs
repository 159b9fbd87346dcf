//! Crypto profiles: an engine with its capabilities, keyslots and admissions, and perhaps a software fallback.
//!
//! The life of a key: [`admit`](CryptoProfile::admit) checks and registers it; [`Admission::crypt`] uses it, programming
//! it when need be; dropping the last [`Admission`] evicts it.

use crate::admission::{AdmissionTable, Fallback, Reason, Refusal, ServedBy, decide};
use crate::caps::Capabilities;
use crate::config::KeyType;
use crate::context::runs;
use crate::engine::{Direction, Engine, KeyLadder, KeyRef};
use crate::error::{Error, ErrorKind, Op};
use crate::key::{
    EphemeralWrappedKey, Key, KeyForm, LongTermWrappedKey, RAW_KEY_BYTES_MAX, RawKey, SoftwareSecret,
    WRAPPED_KEY_BYTES_MAX,
};
use crate::keyslot::{Keyslots, KeyslotsStatus, Policy};
use crate::memory::{Buffer, Memory, MemoryPool};
use crate::sync::Mutex;
use inlinecrypt_cipher::Dun;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Least bytes of a raw key to import (the `BLKCRYPTOIMPORTKEY` ioctl's bound).
const IMPORT_BYTES_MIN: usize = 16;

/// How often a request asks for its keyslot again when the engine keeps losing the key. An engine that loses it so
/// often is broken, and the request fails.
const LOSSES_MAX: u32 = 16;

/// An engine with all that the framework knows about it (`struct blk_crypto_profile`).
#[derive(Debug)]
pub struct CryptoProfile {
    engine: Arc<dyn Engine>,
    /// `None` for an engine without keyslots.
    keyslots: Option<Keyslots>,
    /// Protects the register of admitted keys. Held for a look-up only.
    admissions: Mutex<AdmissionTable>,
    fallback: Option<Arc<CryptoProfile>>,
    pool: MemoryPool,
}

/// A profile at one moment, for status displays.
#[derive(Clone, Debug)]
pub struct ProfileStatus {
    /// The engine's name.
    pub engine: String,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Keys that are admitted.
    pub keys: usize,
    /// Its keyslots; `None` for an engine without.
    pub keyslots: Option<KeyslotsStatus>,
}

impl CryptoProfile {
    /// The profile of `engine`, with `pool` for the data of its volumes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Bug`] if the engine advertises wrapped keys and has no key ladder, or the reverse.
    pub fn new(engine: Arc<dyn Engine>, pool: MemoryPool, policy: Policy) -> Result<Self, Error> {
        let capabilities = engine.capabilities();
        if capabilities.key_types.contains(KeyType::HardwareWrapped) != engine.key_ladder().is_some() {
            return Err(Error::new(ErrorKind::Bug, Op::Open)
                .detail("an engine has a key ladder exactly when it takes hardware-wrapped keys"));
        }
        let keyslots = (capabilities.keyslots > 0).then(|| Keyslots::new(engine.clone(), policy));
        Ok(Self { engine, keyslots, admissions: Mutex::new(AdmissionTable::default()), fallback: None, pool })
    }

    /// The same with a software fallback for raw keys that this engine cannot serve.
    #[must_use]
    pub fn with_fallback(self, fallback: Arc<Self>) -> Self {
        Self { fallback: Some(fallback), ..self }
    }

    /// The engine's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.engine.name()
    }

    /// What the engine can do. Constant.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        self.engine.capabilities()
    }

    /// Checks `key` and registers it, as one step: from now on I/O with it is served, whatever else happens
    /// (`blk_crypto_start_using_key`).
    ///
    /// # Errors
    ///
    /// The refusal, with its reason. Nothing is registered then.
    ///
    /// # Blocking
    ///
    /// May wait for the engine. Not for the data path.
    pub fn admit(self: &Arc<Self>, key: Arc<Key>, fallback: Fallback) -> Result<Admission, Refusal> {
        let refuse = |reason| Refusal::new(self.name(), reason);
        let software = self.fallback.as_ref().map(|fallback| fallback.capabilities());
        let served_by = decide(key.config(), self.capabilities(), software, fallback).map_err(refuse)?;
        let profile = match served_by {
            ServedBy::Engine => self.clone(),
            ServedBy::Fallback => self.fallback.clone().expect("decided for a fallback that is there"),
        };
        if let KeyForm::Wrapped(blob) = key.form() {
            // The engine opens the blob now, so that a bad one is refused here and not at the first write.
            let secret =
                profile.derive_software_secret(blob).map_err(|error| refuse(Reason::Rejected(error)))?;
            drop(secret);
        }
        profile.admissions.lock().enter(key.id());
        Ok(Admission { profile, key, served_by })
    }

    /// Wraps a raw key for storage.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the engine has no wrapped keys; [`ErrorKind::Invalid`] for a key that is not 16
    /// to 64 bytes, or not of the size that this engine takes.
    pub fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error> {
        let len = raw.expose().len();
        if !(IMPORT_BYTES_MIN..=RAW_KEY_BYTES_MAX).contains(&len) {
            return Err(Error::new(ErrorKind::Invalid, Op::Import)
                .detail(format!("the raw key has {len} bytes; 16 to 64 can be imported")));
        }
        self.ladder(Op::Import)?.import(raw)
    }

    /// Makes a new key that nobody outside the engine ever sees, wrapped for storage.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the engine has no wrapped keys; what the engine says.
    pub fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        self.ladder(Op::Generate)?.generate()
    }

    /// Turns a stored key into one for this boot of the engine.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the engine has no wrapped keys; [`ErrorKind::Invalid`] for more than 128 bytes;
    /// [`ErrorKind::KeyRejected`] if the blob does not authenticate.
    pub fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        let len = long_term.as_bytes().len();
        if len > WRAPPED_KEY_BYTES_MAX {
            return Err(Error::new(ErrorKind::Invalid, Op::Prepare)
                .detail(format!("the wrapped key has {len} bytes; {WRAPPED_KEY_BYTES_MAX} are the most")));
        }
        self.ladder(Op::Prepare)?.prepare(long_term)
    }

    /// Derives the secret that software may see.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the engine has no wrapped keys; [`ErrorKind::KeyRejected`] if the blob does not
    /// authenticate.
    pub fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
        self.ladder(Op::DeriveSecret)?.derive_software_secret(ephemeral)
    }

    /// Tells the framework that the engine has lost its keyslots. They are programmed again before this returns.
    pub fn reset(&self) {
        if let Some(keyslots) = &self.keyslots {
            keyslots.reset();
        }
    }

    /// The profile at this moment.
    #[must_use]
    pub fn status(&self) -> ProfileStatus {
        ProfileStatus {
            engine: self.name().to_owned(),
            capabilities: self.capabilities().clone(),
            keys: self.admissions.lock().len(),
            keyslots: self.keyslots.as_ref().map(Keyslots::status),
        }
    }

    /// Removes `key` from the engine, and from the fallback's, if it is there (`blk_crypto_evict_key`).
    ///
    /// Dropping the last [`Admission`] does this anyway. With admissions left, the key is programmed again when it is
    /// next used.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::KeyInUse`] while requests use it; it stays. [`ErrorKind::EngineFailed`] if the engine says so; the
    /// key is forgotten all the same.
    pub fn evict(&self, key: &Key) -> Result<(), Error> {
        if let Some(fallback) = &self.fallback {
            fallback.evict(key)?;
        }
        match &self.keyslots {
            Some(keyslots) => keyslots.evict(key),
            None => self.engine.evict(None, key),
        }
    }

    fn ladder(&self, op: Op) -> Result<&dyn KeyLadder, Error> {
        self.engine.key_ladder().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, op)
                .detail(format!("engine {} does not take hardware-wrapped keys", self.name()))
        })
    }
}

/// The right to do I/O with a key: what was admitted is served until this is dropped.
///
/// Dropping the last admission of a key evicts it. A failure of the engine to evict is its own; the key is forgotten.
#[must_use = "the key is evicted when its admission is dropped"]
pub struct Admission {
    profile: Arc<CryptoProfile>,
    key: Arc<Key>,
    served_by: ServedBy,
}

impl Admission {
    /// The admitted key.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// Who serves it.
    #[must_use]
    pub fn served_by(&self) -> ServedBy {
        self.served_by
    }

    /// The profile that serves it: the asked one, or its fallback's.
    #[must_use]
    pub fn profile(&self) -> &Arc<CryptoProfile> {
        &self.profile
    }

    /// A large buffer that the engine can reach, if one is free. Does not wait.
    #[must_use]
    pub fn try_large_buffer(&self) -> Option<Buffer> {
        self.profile.pool.try_large(self.profile.engine.memory())
    }

    /// A buffer of the caller's own that the engine can reach.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfMemory`].
    pub fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        MemoryPool::private(self.profile.engine.memory(), len_bytes)
    }

    /// Encrypts or decrypts `range` of `memory` in place. Data unit `i` has DUN `first + i`, which wraps at the width
    /// that the key has.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misaligned`] and [`ErrorKind::Invalid`] for a range or DUN that breaks the key's config;
    /// what the engine says else. The content of the range is meaningless then.
    ///
    /// # Blocking
    ///
    /// Waits for a keyslot, and while the engine programs and computes.
    pub fn crypt(
        &self,
        direction: Direction,
        first: Dun,
        memory: &mut dyn Memory,
        range: Range<usize>,
    ) -> Result<(), Error> {
        for run in runs(self.key.config(), first, range.len())? {
            let bytes = range.start + run.bytes.start..range.start + run.bytes.end;
            self.crypt_run(direction, run.first, memory, bytes)?;
        }
        Ok(())
    }

    fn crypt_run(
        &self,
        direction: Direction,
        first: Dun,
        memory: &mut dyn Memory,
        range: Range<usize>,
    ) -> Result<(), Error> {
        let engine = &*self.profile.engine;
        let Some(keyslots) = &self.profile.keyslots else {
            return engine.crypt(KeyRef::Inline(&self.key), direction, first, memory, range);
        };
        for _ in 0..LOSSES_MAX {
            let guard = keyslots.acquire(&self.key)?;
            match engine.crypt(KeyRef::Slot(guard.slot()), direction, first, memory, range.clone()) {
                // The engine was reset, say. Nothing was touched, so ask for the key's keyslot again.
                Err(error) if error.kind() == ErrorKind::NoKey => guard.lost(),
                result => return result,
            }
        }
        Err(Error::new(ErrorKind::EngineFailed, Op::Crypt)
            .detail(format!("the engine lost the key {LOSSES_MAX} times in a row")))
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Admission({:?} by {:?} of {})", self.key.id(), self.served_by, self.profile.name())
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if self.profile.admissions.lock().leave(self.key.id()) {
            // No request is in flight, since each borrows an admission. If the engine fails, the key is forgotten.
            let _ = self.profile.evict(&self.key);
        }
    }
}
