//! Crypto profiles: an engine with its capabilities, keyslots and admissions, and perhaps a software fallback.
//!
//! The life of a key: [`admit`](CryptoProfile::admit) checks and registers it; [`Admission::begin`] uses it for a
//! request, programming it when need be; dropping the last [`Admission`] evicts it.

use crate::admission::{
    Action, AdmissionTable, Applicant, Application, Hold, Lock, Mode, Reason, Refusal, ServedBy, Terms,
    Timestamp, decide,
};
use crate::caps::Capabilities;
use crate::config::KeyType;
use crate::context::runs;
use crate::engine::{Direction, Engine, EngineProcess, KeyLadder, KeyRef, Piece, RawKeySource, SlotHold};
use crate::env::Clock;
use crate::error::{Error, ErrorKind, Op};
use crate::key::{
    EphemeralWrappedKey, KEY_IDENTIFIER_BYTES, Key, KeyForm, KeyId, LongTermWrappedKey, RAW_KEY_BYTES_MAX,
    RawKey, SoftwareSecret, WRAPPED_KEY_BYTES_MAX,
};
use crate::keyslot::{KeyslotGuard, Keyslots, KeyslotsStatus, Policy, Whereabouts};
use crate::memory::{Buffer, Memory, MemoryPool};
use crate::sync::{Condvar, Mutex, MutexGuard, wait};
use inlinecrypt_cipher::Dun;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
    /// Protects the register of admitted keys. Held for a look-up, and while the keyslots' lock is taken to tell them of
    /// pins; never while the engine is called.
    register: Mutex<Register>,
    /// An applicant that waits for a switch may find its answer.
    answered: Condvar,
    fallback: Option<Arc<CryptoProfile>>,
    pool: MemoryPool,
    /// Requests that went to the fallback since a keyslot would have taken too long.
    spills: AtomicU64,
}

/// The admission table, and its answers on their way to the threads that asked.
#[derive(Debug)]
struct Register {
    table: AdmissionTable,
    answers: BTreeMap<Applicant, Result<ServedBy, Reason>>,
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
    /// Keys that have a keyslot reserved.
    pub pinned: u32,
    /// Requests that went to the fallback since a keyslot would have taken too long.
    pub spills: u64,
    /// Which key types it serves.
    pub mode: Mode,
    /// Why the engine serves nothing until it is started again, if so.
    pub stopped: Option<String>,
    /// Its keyslots; `None` for an engine without.
    pub keyslots: Option<KeyslotsStatus>,
    /// The engine's process; `None` if it runs in this one.
    pub process: Option<EngineProcess>,
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
        let table = AdmissionTable::new(capabilities.keyslots, engine.exclusive().is_some());
        let register = Mutex::new(Register { table, answers: BTreeMap::new() });
        Ok(Self {
            engine,
            keyslots,
            register,
            answered: Condvar::new(),
            fallback: None,
            pool,
            spills: AtomicU64::new(0),
        })
    }

    /// The same with a software fallback for raw keys that this engine cannot serve.
    #[must_use]
    pub fn with_fallback(self, fallback: Arc<Self>) -> Self {
        Self { fallback: Some(fallback), ..self }
    }

    /// The same with a clock: without, keys have no quanta on their keyslots.
    #[must_use]
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { keyslots: self.keyslots.map(|keyslots| keyslots.with_clock(clock)), ..self }
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

    /// Checks `key` and reserves what it needs, as one step: from now on I/O with it is served, whatever else happens
    /// (`blk_crypto_start_using_key`, and more).
    ///
    /// On an engine that serves raw or wrapped keys only, the first admission decides which, and succeeds once the engine
    /// has been switched. On the fallback a pin is not needed and reserves nothing.
    ///
    /// # Errors
    ///
    /// The refusal, with its reason. Nothing is reserved then.
    ///
    /// # Blocking
    ///
    /// May wait for the engine, and for a switch that somebody else has begun. Not for the data path.
    pub fn admit(self: &Arc<Self>, key: Arc<Key>, terms: impl Into<Terms>) -> Result<Admission, Refusal> {
        let Terms { fallback: policy, hold, priority, preprogram, spill_after_ns, label, now } = terms.into();
        let refuse = |reason| self.refusal(reason);
        let software = self.fallback.as_ref().map(|fallback| fallback.capabilities());
        let config = key.config();
        let mut served_by = decide(config, self.capabilities(), software, policy).map_err(refuse)?;
        let software_may = config.key_type() == KeyType::Raw
            && decide(config, &Capabilities::NONE, software, policy).is_ok();
        if served_by == ServedBy::Engine {
            if let KeyForm::Wrapped(blob) = key.form() {
                // The engine opens the blob now, so that a bad one is refused here and not at the first write.
                let checked = self.ladder(Op::Admit).and_then(|ladder| ladder.check(blob));
                checked.map_err(|error| refuse(Reason::Rejected(error)))?;
            }
            let (id, key_type, fallback_ready) = (key.id(), config.key_type(), software_may);
            let application = Application { key: id, key_type, hold, fallback_ready, label, now };
            served_by = self.ask(|table, actions| table.apply(application, actions)).map_err(refuse)?;
            if served_by == ServedBy::Engine {
                self.update_pin(id);
            }
        }
        if served_by == ServedBy::Fallback {
            let fallback = self.fallback.as_ref().expect("decided for a fallback that is there");
            return fallback.admit_alone(key).map_err(refuse);
        }
        let whereabouts = Whereabouts::default();
        let mut admission =
            Admission { profile: self.clone(), key, whereabouts, hold, served_by, spill: None };
        if let Some(keyslots) = &self.keyslots {
            keyslots.set_priority(admission.key.id(), priority);
            if preprogram {
                // If it fails, the first request tries again and says why.
                drop(keyslots.acquire(&admission.key, &admission.whereabouts));
            }
        }
        if let (Some(after_ns), Some(fallback), true) = (spill_after_ns, &self.fallback, software_may) {
            let by = fallback.admit_alone(admission.key.clone()).map_err(refuse)?;
            admission.spill = Some(Spill { after_ns, by: Box::new(by) });
        }
        Ok(admission)
    }

    /// Decides ahead of any key which type an exclusive engine serves. On any other engine this does nothing.
    ///
    /// # Errors
    ///
    /// The refusal, if it serves the other type already or the switch fails.
    ///
    /// # Blocking
    ///
    /// Waits for the engine.
    pub fn declare(&self, key_type: KeyType, now: Timestamp) -> Result<(), Refusal> {
        let answer = self.ask(|table, actions| table.declare(key_type, now, actions));
        answer.map(drop).map_err(|reason| self.refusal(reason))
    }

    fn refusal(&self, reason: Reason) -> Refusal {
        let engine_says = if let Reason::Poisoned(_) = &reason { self.engine.stopped() } else { None };
        Refusal::new(self.name(), reason).with_engine_saying(engine_says)
    }

    /// What a fallback does with a key that has been decided for it.
    fn admit_alone(self: &Arc<Self>, key: Arc<Key>) -> Result<Admission, Reason> {
        let (id, key_type) = (key.id(), key.config().key_type());
        let (hold, label, now) = (Hold::Register, String::new(), Timestamp::default());
        let application = Application { key: id, key_type, hold, fallback_ready: false, label, now };
        self.ask(|table, actions| table.apply(application, actions))?;
        let (whereabouts, served_by) = (Whereabouts::default(), ServedBy::Fallback);
        Ok(Admission { profile: self.clone(), key, whereabouts, hold, served_by, spill: None })
    }

    /// A large buffer that the engine can reach, if one is free. Does not wait.
    pub(crate) fn try_large_buffer(&self) -> Option<Buffer> {
        self.pool.try_large(self.engine.memory())
    }

    /// A buffer of the caller's own that the engine can reach.
    pub(crate) fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        MemoryPool::private(self.engine.memory(), len_bytes)
    }

    /// Puts a question to the admission table, and carries out what it wants done until the answer is there.
    fn ask(
        &self,
        question: impl FnOnce(&mut AdmissionTable, &mut Vec<Action>) -> Applicant,
    ) -> Result<ServedBy, Reason> {
        let mut register = self.register.lock();
        let mut actions = Vec::new();
        let me = question(&mut register.table, &mut actions);
        loop {
            let commit = register.deliver(actions, &self.answered);
            actions = Vec::new();
            if let Some(key_type) = commit {
                (register, actions) = self.switch(register, key_type);
                continue;
            }
            if let Some(answer) = register.answers.remove(&me) {
                return answer;
            }
            register = wait(&self.answered, register);
        }
    }

    /// Tells the keyslots whether `key` is pinned. The register is locked meanwhile, so that no two such messages overtake
    /// each other and the number of pins that is admitted is the number that the keyslots see.
    fn update_pin(&self, key: KeyId) {
        let register = self.register.lock();
        if let Some(keyslots) = &self.keyslots {
            keyslots.set_pinned(key, register.table.is_pinned(key));
        }
    }

    fn switch<'a>(
        &'a self,
        register: MutexGuard<'a, Register>,
        key_type: KeyType,
    ) -> (MutexGuard<'a, Register>, Vec<Action>) {
        drop(register);
        let exclusive = self.engine.exclusive().expect("only exclusive engines are switched");
        // Why it failed, the engine says when it is asked (`Engine::stopped`).
        let ok = exclusive.commit(key_type).is_ok();
        let mut register = self.register.lock();
        let mut actions = Vec::new();
        register.table.switched(ok, &mut actions);
        // Who waits until it is over may wait for no answer.
        self.answered.notify_all();
        (register, actions)
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

    /// Gives a raw key into the engine's keeping, and returns the form in which to use it ([`Engine::deposit`]).
    ///
    /// # Errors
    ///
    /// What the engine says.
    pub fn deposit(&self, raw: RawKey, again: Option<Arc<dyn RawKeySource>>) -> Result<KeyForm, Error> {
        self.engine.deposit(raw, again)
    }

    /// The public name of a key ([`Engine::key_identifier`]).
    ///
    /// # Errors
    ///
    /// What the engine says.
    pub fn key_identifier(&self, form: &KeyForm) -> Result<[u8; KEY_IDENTIFIER_BYTES], Error> {
        self.engine.key_identifier(form)
    }

    /// Resets the engine, if that can be done to it, and programs every key again that was in a keyslot.
    ///
    /// Also to be called when the engine has lost its keyslots by itself: it is safe at any time.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::EngineFailed`] if the engine does not come back.
    ///
    /// # Blocking
    ///
    /// Waits while the engine programs.
    pub fn reset(&self) -> Result<(), Error> {
        if let Some(lifecycle) = self.engine.lifecycle() {
            lifecycle.reset()?;
        }
        if let Some(keyslots) = &self.keyslots {
            keyslots.reset();
        }
        Ok(())
    }

    /// The engine was started again: it knows neither its key type nor any key. Tells it the type once more, if admitted
    /// keys or a declaration hold it to one, and programs every key again that was in a keyslot. Admissions stay what they
    /// are; a switch that once failed is forgotten.
    ///
    /// Whoever starts the engine again sees to it that what was prepared before opens in the new one, and that the engine
    /// programs nothing until this returns; requests that ask meanwhile are to wait, not to fail.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::EngineFailed`] if it cannot be switched. Admitted keys wait for the next start; nothing else is
    /// admitted until then.
    ///
    /// # Blocking
    ///
    /// Waits for the engine, and for a switch that somebody else has begun.
    pub fn restarted(&self) -> Result<(), Error> {
        let mut register = self.register.lock();
        let mut actions = Vec::new();
        register.table.restarted(&mut actions);
        loop {
            let commit = register.deliver(actions, &self.answered);
            actions = Vec::new();
            match commit {
                Some(key_type) => (register, actions) = self.switch(register, key_type),
                None if matches!(register.table.mode(), Mode::Switching(_)) => {
                    register = wait(&self.answered, register);
                }
                None => break,
            }
        }
        if let Mode::Poisoned(Lock { key_type, .. }) = register.table.mode() {
            return Err(Error::new(ErrorKind::EngineFailed, Op::Admit).detail(format!(
                "engine {} was started again and could not be switched to {key_type} keys",
                self.name()
            )));
        }
        drop(register);
        if let Some(keyslots) = &self.keyslots {
            keyslots.reset();
        }
        Ok(())
    }

    /// The profile at this moment.
    #[must_use]
    pub fn status(&self) -> ProfileStatus {
        let register = self.register.lock();
        let (keys, pinned, mode) =
            (register.table.len(), register.table.pinned(), register.table.mode().clone());
        drop(register);
        ProfileStatus {
            engine: self.name().to_owned(),
            capabilities: self.capabilities().clone(),
            keys,
            pinned,
            spills: self.spills.load(Ordering::Relaxed),
            mode,
            stopped: self.engine.stopped(),
            keyslots: self.keyslots.as_ref().map(Keyslots::status),
            process: self.engine.process(),
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

impl Register {
    /// Files the answers, wakes who waits for one, and returns the switch that the engine is to make.
    fn deliver(&mut self, actions: Vec<Action>, answered: &Condvar) -> Option<KeyType> {
        let mut commit = None;
        for action in actions {
            match action {
                Action::Commit { key_type } => commit = Some(key_type),
                Action::Admit { applicant, served_by } => drop(self.answers.insert(applicant, Ok(served_by))),
                Action::Refuse { applicant, reason } => drop(self.answers.insert(applicant, Err(reason))),
            }
        }
        if !self.answers.is_empty() {
            answered.notify_all();
        }
        commit
    }
}

/// The right to do I/O with a key: what was admitted is served until this is dropped.
///
/// Dropping the last admission of a key evicts it. A failure of the engine to evict is its own; the key is forgotten.
#[must_use = "the key is evicted when its admission is dropped"]
pub struct Admission {
    profile: Arc<CryptoProfile>,
    key: Arc<Key>,
    whereabouts: Whereabouts,
    hold: Hold,
    served_by: ServedBy,
    spill: Option<Spill>,
}

/// Where requests go that would wait too long for a keyslot.
struct Spill {
    after_ns: u64,
    by: Box<Admission>,
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

    /// Why its requests fail, and will go on failing until a person does something; `None` if the engine knows of nothing.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.profile.engine.trouble(&self.key)
    }

    /// A large buffer that the engine can reach, if one is free. Does not wait.
    #[must_use]
    pub fn try_large_buffer(&self) -> Option<Buffer> {
        self.profile.try_large_buffer()
    }

    /// A buffer of the caller's own that the engine can reach.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfMemory`].
    pub fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        self.profile.private_buffer(len_bytes)
    }

    /// Begins a request. Engines that sit on the way to the disk need the keyslot from now until the request is done;
    /// others take it while they compute.
    ///
    /// # Errors
    ///
    /// What the engine said when it could not program the key.
    ///
    /// # Blocking
    ///
    /// May wait for a keyslot, and while the engine programs. A thread has one request at a time.
    pub fn begin(&self) -> Result<Request<'_>, Error> {
        let Some(keyslots) = &self.profile.keyslots else {
            return Ok(Request { admission: self, guard: None });
        };
        if let Some(Spill { after_ns, by }) = &self.spill
            && keyslots.expected_wait_ns(self.key.id(), &self.whereabouts) > *after_ns
        {
            // Relaxed: a counter for people.
            self.profile.spills.fetch_add(1, Ordering::Relaxed);
            return by.begin();
        }
        let guard = match self.profile.engine.slot_hold() {
            SlotHold::WhileComputing => None,
            SlotHold::WholeRequest => Some(keyslots.acquire(&self.key, &self.whereabouts)?),
        };
        Ok(Request { admission: self, guard })
    }

    /// Encrypts or decrypts as a request of its own: [`begin`](Self::begin) and [`Request::crypt`].
    ///
    /// # Errors
    ///
    /// Theirs.
    pub fn crypt(
        &self,
        direction: Direction,
        first: Dun,
        memory: &mut dyn Memory,
        range: Range<usize>,
    ) -> Result<(), Error> {
        self.begin()?.crypt(direction, first, memory, range)
    }
}

/// A request under way: what it encrypts and decrypts goes through one engine.
#[derive(Debug)]
#[must_use = "the keyslot is given back when the request is dropped"]
pub struct Request<'a> {
    admission: &'a Admission,
    /// The keyslot, where the engine needs it for the whole request.
    guard: Option<KeyslotGuard<'a>>,
}

impl Request<'_> {
    /// Encrypts or decrypts `range` of `memory` in place. Data unit `i` has DUN `first + i`, which wraps at the width
    /// that the key has.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Misaligned`] and [`ErrorKind::Invalid`] for a range or DUN that breaks the key's config;
    /// what the engine says else. The content of the range is meaningless then. After [`ErrorKind::Interrupted`]
    /// (only when decrypting) who has the ciphertext may try again.
    ///
    /// # Blocking
    ///
    /// May wait for a keyslot, and while the engine programs and computes.
    pub fn crypt(
        &mut self,
        direction: Direction,
        first: Dun,
        memory: &mut dyn Memory,
        range: Range<usize>,
    ) -> Result<(), Error> {
        self.crypt_pieces(direction, memory, &mut [Piece { first, range }])
    }

    /// [`crypt`](Self::crypt) for many pieces at once, which take the keyslot once and go to the engine together.
    ///
    /// What `pieces` name afterwards means nothing.
    ///
    /// # Errors
    ///
    /// The same. The content of all pieces is meaningless then.
    pub fn crypt_pieces(
        &mut self,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        let config = self.admission.key.config();
        let mut wraps = false;
        for Piece { first, range } in &*pieces {
            wraps |= runs(config, *first, range.len())?.nth(1).is_some();
        }
        if !wraps {
            return self.crypt_runs(direction, memory, pieces);
        }
        for Piece { first, range } in pieces {
            for run in runs(config, *first, range.len())? {
                let range = range.start + run.bytes.start..range.start + run.bytes.end;
                self.crypt_runs(direction, memory, &mut [Piece { first: run.first, range }])?;
            }
        }
        Ok(())
    }

    /// Pieces whose DUNs do not wrap.
    fn crypt_runs(
        &mut self,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        let Admission { profile, key, whereabouts, .. } = self.admission;
        let engine = &*profile.engine;
        let Some(keyslots) = &profile.keyslots else {
            return engine.crypt(KeyRef::Inline(key), direction, memory, pieces);
        };
        let whole_request = self.guard.is_some();
        for _ in 0..LOSSES_MAX {
            let guard = match self.guard.take() {
                Some(guard) => guard,
                None => keyslots.acquire(key, whereabouts)?,
            };
            match engine.crypt(KeyRef::Slot(guard.slot()), direction, memory, pieces) {
                // The engine was reset, say. What is left was not touched, so ask for the key's keyslot again.
                Err(error) if error.kind() == ErrorKind::NoKey => guard.lost(),
                // The keyslot is as empty, but it is for the caller to get the ciphertext again.
                Err(error) if error.kind() == ErrorKind::Interrupted => {
                    guard.lost();
                    return Err(error);
                }
                result => {
                    self.guard = whole_request.then_some(guard);
                    return result;
                }
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
        let last = {
            let mut register = self.profile.register.lock();
            let last = register.table.leave(self.key.id(), self.hold);
            if let (Hold::Pin, Some(keyslots)) = (self.hold, &self.profile.keyslots) {
                keyslots.set_pinned(self.key.id(), register.table.is_pinned(self.key.id()));
            }
            last
        };
        if last {
            // No request is in flight, since each borrows an admission. If the engine fails, the key is forgotten.
            let _ = self.profile.evict(&self.key);
        }
    }
}
