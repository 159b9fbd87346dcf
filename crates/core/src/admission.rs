//! Admission: setting a key is one step that checks it *and* reserves what it needs, so that a refusal comes then, with its
//! reason, and never during I/O.
//!
//! [`AdmissionTable`] decides, purely: an event goes in, actions come out.
//! [`CryptoProfile::admit`](crate::profile::CryptoProfile::admit) carries them out.
//!
//! What is reserved: on an engine that serves raw *or* wrapped keys, the choice between them; with [`Hold::Pin`], a keyslot.
//!
//! ```text
//!             first admission, or declared          engine switched
//!   Undecided ---------------------------> Switching ---------------> Committed   for ever
//!       ^                                   ^  |
//!       |                                   |  `-- switch failed ---> Poisoned    until the engine is started again
//!       |                                   |
//!       `--- nothing holds it to a type -- restarted -- keys are admitted, or it was declared: to what it was
//! ```
//!
//! An engine that was started again has not been told anything. If a key is admitted, or somebody declared the type, it is
//! switched to what it was before; everybody else decides anew.
//!
//! Invariants (checked by [`AdmissionTable::check`]):
//! - a key that was admitted is never refused later: nothing leads out of Committed while one is admitted but the same
//!   switch once more, and what Poisoned refuses was not admitted;
//! - all keys that an exclusive engine serves have the type that it is committed to, or is to be committed to again;
//! - a refused or dropped admission reserves nothing but, at most, the one switch that it caused while others waited;
//! - pins leave at least one keyslot free.

use crate::caps::{Capabilities, Unsupported};
use crate::config::{CryptoConfig, KeyType};
use crate::error::{Error, ErrorKind, Op};
use crate::key::KeyId;
use crate::keyslot::Priority;
use std::collections::BTreeMap;
use std::fmt;

/// Whether software may serve a raw key that the engine does not. A wrapped key it never may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// Never.
    Off,
    /// If the engine cannot.
    Allowed,
}

/// Who serves an admitted key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ServedBy {
    /// The profile's own engine.
    Engine,
    /// The software fallback.
    Fallback,
}

/// Why a key was refused, and by which engine.
#[derive(Debug)]
pub struct Refusal {
    engine: String,
    reason: Reason,
    /// What the engine says of itself.
    engine_says: Option<String>,
}

/// The rule that a refused key broke.
#[derive(Debug)]
#[non_exhaustive]
pub enum Reason {
    /// The engine cannot serve a hardware-wrapped key of this config, and nobody else can open it.
    Unsupported(Unsupported),
    /// The engine cannot serve the raw key, and falling back to software is switched off for it.
    FallbackOff(Unsupported),
    /// The engine cannot serve the raw key, and neither can the fallback.
    FallbackCannot {
        /// What the engine lacks.
        engine: Unsupported,
        /// What the fallback lacks; `None` if there is no fallback at all.
        fallback: Option<Unsupported>,
    },
    /// The engine serves the other key type, and does so until it is started again.
    Locked(Lock),
    /// The engine could not be switched to a key type, and serves nothing until it is started again.
    Poisoned(Lock),
    /// A keyslot cannot be reserved: one must stay free.
    NoPinLeft {
        /// Keyslots that are reserved.
        pinned: u32,
        /// Keyslots that there are.
        keyslots: u32,
    },
    /// The engine does not accept the wrapped key itself.
    Rejected(Error),
}

/// A moment, in seconds since the beginning of 1970. Handed in: nothing here has a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Timestamp(pub u64);

/// Who commits an engine whose key type is declared.
pub const DECLARED: &str = "a declaration";

/// What an exclusive engine is committed to, since when, and who did it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lock {
    /// The key type that it serves.
    pub key_type: KeyType,
    /// Whose admission committed it, or [`DECLARED`].
    pub by: String,
    /// When.
    pub since: Timestamp,
}

/// What a key needs of its engine beyond being served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Hold {
    /// To be known. Any number of keys can be registered, whatever the number of keyslots.
    #[default]
    Register,
    /// A keyslot of its own: once programmed, it is not displaced by others.
    Pin,
}

/// On which terms a key is to be admitted.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Whether software may serve it.
    pub fallback: Fallback,
    /// What it needs.
    pub hold: Hold,
    /// How urgent its requests are.
    pub priority: Priority,
    /// Whether it is programmed right away, waiting for a keyslot if need be, and not by its first request.
    pub preprogram: bool,
    /// A raw key's request goes to the software fallback, if that is allowed, when it would wait longer than this for a
    /// keyslot, in nanoseconds.
    pub spill_after_ns: Option<u64>,
    /// Who asks, for messages: a volume's name.
    pub label: String,
    /// When.
    pub now: Timestamp,
}

impl From<Fallback> for Terms {
    /// Registers a key for nobody in particular.
    fn from(fallback: Fallback) -> Self {
        Self {
            fallback,
            hold: Hold::Register,
            priority: Priority::Normal,
            preprogram: false,
            spill_after_ns: None,
            label: "another key".to_owned(),
            now: Timestamp::default(),
        }
    }
}

impl Refusal {
    /// A refusal by the engine of that name.
    #[must_use]
    pub fn new(engine: &str, reason: Reason) -> Self {
        Self { engine: engine.to_owned(), reason, engine_says: None }
    }

    /// The same, with why the engine serves nothing, if it says so.
    pub(crate) fn with_engine_saying(self, engine_says: Option<String>) -> Self {
        Self { engine_says, ..self }
    }

    /// The rule that was broken.
    #[must_use]
    pub fn reason(&self) -> &Reason {
        &self.reason
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "engine {} refuses the key: ", self.engine)?;
        match &self.reason {
            Reason::Unsupported(why) => {
                write!(f, "{why}; a hardware-wrapped key is never served by software")
            }
            Reason::FallbackOff(why) => write!(f, "{why}; software fallback is off for this key"),
            Reason::FallbackCannot { engine, fallback: None } => {
                write!(f, "{engine}; there is no software fallback")
            }
            Reason::FallbackCannot { engine, fallback: Some(fallback) } => {
                write!(f, "{engine}; nor can software fallback: {fallback}")
            }
            Reason::Locked(Lock { key_type, by, since }) => write!(
                f,
                "it serves {key_type} keys only, since {by} committed it {} until it is started again; use a key of \
                 that type, another engine, or for a raw key software fallback",
                Ago(*since)
            ),
            Reason::Poisoned(Lock { key_type, by, since }) => write!(
                f,
                "switching it to {key_type} keys for {by} failed {}: {}",
                Ago(*since),
                self.engine_says.as_deref().unwrap_or("it serves nothing until it is started again")
            ),
            Reason::NoPinLeft { pinned, keyslots } => write!(
                f,
                "{pinned} of its {keyslots} keyslots are pinned and one must stay free; register the key without a pin"
            ),
            Reason::Rejected(error) => write!(f, "{}", error.chain()),
        }
    }
}

impl std::error::Error for Refusal {}

/// A moment as UTC, for messages.
struct Ago(Timestamp);

impl fmt::Display for Ago {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Timestamp(seconds) = self.0;
        if seconds == 0 {
            return f.write_str("at its start");
        }
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Civil date from days since 1970-01-01, in eras of 400 years that begin in March.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "at {year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
    }
}

impl From<Refusal> for Error {
    /// With the kernel's meanings: `EOPNOTSUPP` for wrapped keys that are not supported, `ENOPKG` where a fallback is
    /// missing (`block/blk-crypto.c`, `blk_crypto_start_using_key`), the engine's own error for a rejected blob.
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal.reason {
            Reason::Unsupported(_) | Reason::Locked(_) => ErrorKind::Unsupported,
            Reason::FallbackOff(_) | Reason::FallbackCannot { .. } => ErrorKind::NoFallback,
            Reason::Poisoned(_) => ErrorKind::EngineFailed,
            Reason::NoPinLeft { .. } => ErrorKind::Busy,
            Reason::Rejected(error) => error.kind(),
        };
        Self::new(kind, Op::Admit).because(refusal)
    }
}

/// Decides who serves a key of `config`.
///
/// # Errors
///
/// The reason to refuse it.
pub fn decide(
    config: &CryptoConfig,
    engine: &Capabilities,
    fallback: Option<&Capabilities>,
    policy: Fallback,
) -> Result<ServedBy, Reason> {
    let Err(lacks) = engine.check(config) else {
        return Ok(ServedBy::Engine);
    };
    if config.key_type() == KeyType::HardwareWrapped {
        return Err(Reason::Unsupported(lacks));
    }
    if policy == Fallback::Off {
        return Err(Reason::FallbackOff(lacks));
    }
    let Some(fallback) = fallback else {
        return Err(Reason::FallbackCannot { engine: lacks, fallback: None });
    };
    // For the fallback it does not matter that hardware is forbidden: it is software.
    let software = CryptoConfig { hardware: crate::config::Hardware::Allowed, ..*config };
    match fallback.check(&software) {
        Ok(()) => Ok(ServedBy::Fallback),
        Err(why) => Err(Reason::FallbackCannot { engine: lacks, fallback: Some(why) }),
    }
}

/// Which admission: unique in a table, in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Applicant(u64);

/// A key that asks to be admitted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Application {
    /// The key.
    pub key: KeyId,
    /// Its type.
    pub key_type: KeyType,
    /// What it needs.
    pub hold: Hold,
    /// Whether the fallback can and may serve it, should the engine refuse.
    pub fallback_ready: bool,
    /// Who asks.
    pub label: String,
    /// When.
    pub now: Timestamp,
}

/// What the table wants done.
#[derive(Debug)]
pub enum Action {
    /// Switch the engine to this key type, then report [`AdmissionTable::switched`].
    Commit {
        /// The key type.
        key_type: KeyType,
    },
    /// The applicant is admitted.
    Admit {
        /// Who.
        applicant: Applicant,
        /// By whom its key is served.
        served_by: ServedBy,
    },
    /// The applicant is refused. Nothing is reserved for it.
    Refuse {
        /// Who.
        applicant: Applicant,
        /// Why.
        reason: Reason,
    },
}

/// Which key types an engine serves, and whether that is settled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// All that it advertises, for ever.
    Settled,
    /// One of them, and nobody has said which.
    Undecided,
    /// It is being switched.
    Switching(Lock),
    /// One of them, for as long as a key is admitted or somebody declared it, restarts included.
    Committed(Lock),
    /// None: the switch failed.
    Poisoned(Lock),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Admitted {
    key_type: KeyType,
    count: u32,
    pins: u32,
}

/// The keys that one engine has admitted, and what it is committed to. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AdmissionTable {
    keyslots: u32,
    mode: Mode,
    admitted: BTreeMap<KeyId, Admitted>,
    waiting: Vec<(Applicant, Application)>,
    /// Who declares the type that the engine is being switched to.
    declaring: Vec<Applicant>,
    /// The type was declared: it holds, whether keys are admitted or not.
    declared: bool,
    /// The engine was started again while it was being switched, so how that ended means nothing.
    switch_again: bool,
    last: u64,
}

impl AdmissionTable {
    /// The table of an engine with so many keyslots.
    #[must_use]
    pub fn new(keyslots: u32, exclusive: bool) -> Self {
        let mode = if exclusive { Mode::Undecided } else { Mode::Settled };
        Self {
            keyslots,
            mode,
            admitted: BTreeMap::new(),
            waiting: Vec::new(),
            declaring: Vec::new(),
            declared: false,
            switch_again: false,
            last: 0,
        }
    }

    /// A key asks to be served by the engine, whose capabilities it suits. An action with its number answers, now or when
    /// a switch is over.
    pub fn apply(&mut self, application: Application, actions: &mut Vec<Action>) -> Applicant {
        let applicant = self.next_applicant();
        self.consider(applicant, application, actions);
        applicant
    }

    /// Somebody decides the mode ahead of any key. An action answers: `Admit` (of no key) or `Refuse`.
    pub fn declare(&mut self, key_type: KeyType, now: Timestamp, actions: &mut Vec<Action>) -> Applicant {
        let applicant = self.next_applicant();
        match &self.mode {
            Mode::Undecided => {
                self.declaring.push(applicant);
                self.start_switch(Lock { key_type, by: DECLARED.to_owned(), since: now }, actions);
            }
            Mode::Committed(lock) | Mode::Switching(lock) if lock.key_type != key_type => {
                actions.push(Action::Refuse { applicant, reason: Reason::Locked(lock.clone()) });
            }
            Mode::Poisoned(lock) => {
                actions.push(Action::Refuse { applicant, reason: Reason::Poisoned(lock.clone()) });
            }
            Mode::Switching(_) => self.declaring.push(applicant),
            Mode::Settled | Mode::Committed(_) => {
                self.declared |= self.mode != Mode::Settled;
                actions.push(Action::Admit { applicant, served_by: ServedBy::Engine });
            }
        }
        applicant
    }

    /// The engine was switched, or could not be.
    ///
    /// # Panics
    ///
    /// If no switch was asked for.
    pub fn switched(&mut self, ok: bool, actions: &mut Vec<Action>) {
        let Mode::Switching(lock) = self.mode.clone() else { unreachable!("no switch was asked for") };
        if std::mem::take(&mut self.switch_again) {
            return self.start_switch(lock, actions);
        }
        for applicant in std::mem::take(&mut self.declaring) {
            self.declared |= ok;
            actions.push(if ok {
                Action::Admit { applicant, served_by: ServedBy::Engine }
            } else {
                Action::Refuse { applicant, reason: Reason::Poisoned(lock.clone()) }
            });
        }
        self.mode = if ok { Mode::Committed(lock) } else { Mode::Poisoned(lock) };
        for (applicant, application) in std::mem::take(&mut self.waiting) {
            self.consider(applicant, application, actions);
        }
    }

    /// The engine was started again, and has not been told a key type. Admitted keys keep their admissions: if there are
    /// any, or the type was declared, the engine is to be switched to what it was, and nothing may be programmed before
    /// that has succeeded. If that fails it is poisoned, and who holds an admission waits for the next start.
    pub fn restarted(&mut self, actions: &mut Vec<Action>) {
        match self.mode.clone() {
            Mode::Settled | Mode::Undecided => {}
            Mode::Switching(_) => self.switch_again = true,
            Mode::Committed(lock) | Mode::Poisoned(lock) => {
                if self.admitted.is_empty() && !self.declared {
                    self.mode = Mode::Undecided;
                } else {
                    self.start_switch(lock, actions);
                }
            }
        }
    }

    /// Ends one admission of `key`, that was pinned or not. Whether it was the key's last.
    ///
    /// # Panics
    ///
    /// If the key is not admitted like that.
    pub fn leave(&mut self, key: KeyId, hold: Hold) -> bool {
        let admitted = self.admitted.get_mut(&key).expect("only an admitted key leaves");
        admitted.count -= 1;
        if hold == Hold::Pin {
            admitted.pins = admitted.pins.checked_sub(1).expect("only a pinned key gives a pin back");
        }
        let last = admitted.count == 0;
        if last {
            self.admitted.remove(&key);
        }
        last
    }

    /// Which key types the engine serves.
    #[must_use]
    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// How many keys are admitted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.admitted.len()
    }

    /// Whether no key is admitted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.admitted.is_empty()
    }

    /// Whether `key` has a keyslot reserved.
    #[must_use]
    pub fn is_pinned(&self, key: KeyId) -> bool {
        self.admitted.get(&key).is_some_and(|admitted| admitted.pins > 0)
    }

    /// How many keys have a keyslot reserved.
    #[must_use]
    pub fn pinned(&self) -> u32 {
        u32::try_from(self.admitted.values().filter(|admitted| admitted.pins > 0).count()).unwrap_or(u32::MAX)
    }

    /// Asserts the invariants of the module's documentation. For tests and models.
    ///
    /// # Panics
    ///
    /// If one does not hold.
    pub fn check(&self) {
        match &self.mode {
            Mode::Settled => {}
            Mode::Undecided => {
                assert!(self.admitted.is_empty(), "nothing is admitted before the engine is committed");
                assert!(!self.declared, "what was declared is no longer undecided");
            }
            // With keys, if the engine was committed before and is, or was, to be committed again.
            Mode::Switching(lock) | Mode::Poisoned(lock) | Mode::Committed(lock) => {
                assert!(self.admitted.values().all(|admitted| admitted.key_type == lock.key_type));
            }
        }
        assert!(!self.switch_again || matches!(self.mode, Mode::Switching(_)), "only a switch is done again");
        assert!(
            (self.waiting.is_empty() && self.declaring.is_empty()) || matches!(self.mode, Mode::Switching(_)),
            "they wait for a switch only"
        );
        assert!(self.pinned() == 0 || self.pinned() < self.keyslots.max(1) || self.keyslots == 0);
    }

    fn next_applicant(&mut self) -> Applicant {
        self.last += 1;
        Applicant(self.last)
    }

    fn start_switch(&mut self, lock: Lock, actions: &mut Vec<Action>) {
        actions.push(Action::Commit { key_type: lock.key_type });
        self.mode = Mode::Switching(lock);
    }

    fn consider(&mut self, applicant: Applicant, application: Application, actions: &mut Vec<Action>) {
        if let Some(reason) = self.pin_refused(&application) {
            actions.push(Action::Refuse { applicant, reason });
            return;
        }
        let reason = match &self.mode {
            Mode::Undecided => {
                let Application { key_type, ref label, now: since, .. } = application;
                let lock = Lock { key_type, by: label.clone(), since };
                self.waiting.push((applicant, application));
                return self.start_switch(lock, actions);
            }
            // Whatever comes of the switch decides. If it fails, the fallback is what is left.
            Mode::Switching(_) => {
                self.waiting.push((applicant, application));
                return;
            }
            Mode::Committed(lock) if lock.key_type != application.key_type => Reason::Locked(lock.clone()),
            Mode::Poisoned(lock) => Reason::Poisoned(lock.clone()),
            Mode::Settled | Mode::Committed(_) => {
                let new = Admitted { key_type: application.key_type, count: 0, pins: 0 };
                let admitted = self.admitted.entry(application.key).or_insert(new);
                admitted.count += 1;
                admitted.pins += u32::from(application.hold == Hold::Pin);
                actions.push(Action::Admit { applicant, served_by: ServedBy::Engine });
                return;
            }
        };
        // The fallback is another engine with a register of its own; here nothing is reserved.
        actions.push(if application.fallback_ready {
            Action::Admit { applicant, served_by: ServedBy::Fallback }
        } else {
            Action::Refuse { applicant, reason }
        });
    }

    /// One keyslot stays free, so that every other key gets its turn. An engine without keyslots has none to give, and
    /// needs none.
    fn pin_refused(&self, application: &Application) -> Option<Reason> {
        let pinned = self.pinned();
        let refused = application.hold == Hold::Pin
            && self.keyslots > 0
            && !self.is_pinned(application.key)
            && pinned + 1 >= self.keyslots;
        refused.then_some(Reason::NoPinLeft { pinned, keyslots: self.keyslots })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Apply { key: u64, pin: bool, fallback: bool },
        Declare(bool),
        Switched(bool),
        Restarted,
        Leave(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u64..8, any::<bool>(), any::<bool>())
                .prop_map(|(key, pin, fallback)| Step::Apply { key, pin, fallback }),
            1 => any::<bool>().prop_map(Step::Declare),
            3 => prop_oneof![4 => Just(true), 1 => Just(false)].prop_map(Step::Switched),
            1 => Just(Step::Restarted),
            3 => any::<usize>().prop_map(Step::Leave),
        ]
    }

    fn type_of(raw: bool) -> KeyType {
        if raw { KeyType::Raw } else { KeyType::HardwareWrapped }
    }

    /// Even keys are raw, odd ones wrapped.
    fn application(key: u64, pin: bool, fallback: bool) -> Application {
        Application {
            key: KeyId::for_simulation(key),
            key_type: type_of(key.is_multiple_of(2)),
            hold: if pin { Hold::Pin } else { Hold::Register },
            fallback_ready: fallback && key.is_multiple_of(2),
            label: format!("volume {key}"),
            now: Timestamp(key),
        }
    }

    struct World {
        table: AdmissionTable,
        /// Who waits for an answer; `None` for who declared.
        asked: BTreeMap<Applicant, Option<Application>>,
        held: Vec<Application>,
        /// What the engine was switched to since its start: it takes no second word.
        engine: Option<KeyType>,
        /// The switch under way, and whether it is the engine's that runs now.
        todo: Option<(KeyType, bool)>,
        is_declared: bool,
        is_exclusive: bool,
    }

    impl World {
        fn new(keyslots: u32, exclusive: bool) -> Self {
            let table = AdmissionTable::new(keyslots, exclusive);
            let (asked, held) = (BTreeMap::new(), Vec::new());
            Self { table, asked, held, engine: None, todo: None, is_declared: false, is_exclusive: exclusive }
        }

        fn carry_out(&mut self, actions: Vec<Action>) {
            for action in actions {
                match action {
                    Action::Commit { key_type } => {
                        assert!(self.todo.is_none() && self.engine.is_none(), "one switch, once a start");
                        self.todo = Some((key_type, true));
                    }
                    Action::Admit { applicant, served_by } => {
                        let asked = self.asked.remove(&applicant).expect("answered once");
                        match (asked, served_by) {
                            (Some(application), ServedBy::Engine) => self.held.push(application),
                            (Some(application), ServedBy::Fallback) => {
                                assert!(application.fallback_ready && application.key_type == KeyType::Raw);
                            }
                            (None, _) => self.is_declared = self.is_exclusive,
                        }
                    }
                    Action::Refuse { applicant, reason } => {
                        self.asked.remove(&applicant).expect("answered once");
                        let text = Refusal::new("ice", reason).to_string();
                        assert!(text.starts_with("engine ice refuses the key: "), "{text}");
                    }
                }
            }
            self.table.check();
            let keys: BTreeSet<_> = self.held.iter().map(|held| held.key).collect();
            assert_eq!(self.table.len(), keys.len(), "registered is what was admitted and not left");
            let pins = self.held.iter().filter(|held| held.hold == Hold::Pin).map(|held| held.key);
            assert_eq!(self.table.pinned() as usize, pins.collect::<BTreeSet<_>>().len());
            if let Mode::Committed(lock) = self.table.mode() {
                assert_eq!(self.engine, Some(lock.key_type), "the engine serves what the table says");
            }
            if self.table.mode() == &Mode::Undecided {
                assert!(self.engine.is_none() && self.held.is_empty() && !self.is_declared);
            }
        }

        fn apply(&mut self, step: Step) {
            let mut actions = Vec::new();
            match step {
                Step::Apply { key, pin, fallback } => {
                    let application = application(key, pin, fallback);
                    let applicant = self.table.apply(application.clone(), &mut actions);
                    self.asked.insert(applicant, Some(application));
                }
                Step::Declare(raw) => {
                    let applicant = self.table.declare(type_of(raw), Timestamp(9), &mut actions);
                    self.asked.insert(applicant, None);
                }
                Step::Switched(ok) => {
                    let Some((key_type, is_this_start)) = self.todo.take() else { return };
                    if is_this_start {
                        self.engine = ok.then_some(key_type);
                    }
                    self.table.switched(ok, &mut actions);
                }
                Step::Restarted => {
                    self.engine = None;
                    self.todo = self.todo.map(|(key_type, _)| (key_type, false));
                    self.table.restarted(&mut actions);
                }
                Step::Leave(n) if !self.held.is_empty() => {
                    let held = self.held.swap_remove(n % self.held.len());
                    let last = self.table.leave(held.key, held.hold);
                    assert_eq!(last, self.held.iter().all(|other| other.key != held.key));
                }
                Step::Leave(_) => {}
            }
            self.carry_out(actions);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn every_history_keeps_the_promises(
            keyslots in 0u32..4, exclusive in any::<bool>(), steps in proptest::collection::vec(step(), 0..60)
        ) {
            let mut world = World::new(keyslots, exclusive);
            for step in steps {
                world.apply(step);
            }
            world.apply(Step::Switched(true));
            // It was the switch of an engine that is gone.
            world.apply(Step::Switched(true));
            prop_assert!(world.asked.is_empty(), "everybody gets an answer");
        }
    }

    fn refusal(world: &mut World, application: Application) -> String {
        let mut actions = Vec::new();
        world.table.apply(application, &mut actions);
        let Some(Action::Refuse { reason, .. }) = actions.pop() else { panic!("{actions:?}") };
        Refusal::new("ice:hwkm-v2", reason).to_string()
    }

    #[test]
    fn a_refusal_says_what_is_locked_to_what_by_whom_and_since_when() {
        let mut world = World::new(4, true);
        world.apply(Step::Apply { key: 1, pin: false, fallback: false });
        world.apply(Step::Switched(true));
        let text = refusal(&mut world, application(2, false, false));
        assert_eq!(
            text,
            "engine ice:hwkm-v2 refuses the key: it serves hardware-wrapped keys only, since volume 1 committed it at \
             1970-01-01 00:00:01 UTC until it is started again; use a key of that type, another engine, or for a raw \
             key software fallback"
        );
    }

    #[test]
    fn a_failed_switch_poisons_the_engine_and_admits_nobody() {
        let mut world = World::new(4, true);
        world.apply(Step::Apply { key: 1, pin: false, fallback: false });
        world.apply(Step::Apply { key: 2, pin: false, fallback: true });
        world.apply(Step::Switched(false));
        assert!(world.held.is_empty() && world.asked.is_empty());
        let text = refusal(&mut world, application(1, false, false));
        assert!(text.contains("failed at 1970-01-01 00:00:01 UTC"), "{text}");
    }

    #[test]
    fn poison_ends_with_the_next_start_which_decides_anew() {
        let mut world = World::new(4, true);
        world.apply(Step::Apply { key: 1, pin: false, fallback: false });
        world.apply(Step::Switched(false));
        assert!(matches!(world.table.mode(), Mode::Poisoned(_)));
        world.apply(Step::Restarted);
        assert_eq!(world.table.mode(), &Mode::Undecided);
        world.apply(Step::Apply { key: 2, pin: false, fallback: false });
        world.apply(Step::Switched(true));
        assert_eq!((world.held.len(), world.engine), (1, Some(KeyType::Raw)));
    }

    #[test]
    fn admitted_keys_outlive_restarts_and_even_one_whose_switch_fails() {
        let mut world = World::new(4, true);
        world.apply(Step::Apply { key: 1, pin: true, fallback: false });
        world.apply(Step::Switched(true));
        let Mode::Committed(before) = world.table.mode().clone() else { panic!("committed") };
        world.apply(Step::Restarted);
        assert_eq!(
            world.table.mode(),
            &Mode::Switching(before.clone()),
            "to what it was, by whom, since when"
        );
        world.apply(Step::Switched(false));
        assert_eq!((world.table.len(), world.table.pinned()), (1, 1));
        let text = refusal(&mut world, application(3, false, false));
        assert!(text.contains("switching it to hardware-wrapped keys for volume 1 failed"), "{text}");
        world.apply(Step::Restarted);
        // The other type gets no chance in between.
        world.apply(Step::Apply { key: 2, pin: false, fallback: false });
        world.apply(Step::Switched(true));
        assert_eq!(world.table.mode(), &Mode::Committed(before));
        assert_eq!(world.held.len(), 1);
    }

    #[test]
    fn what_nobody_holds_to_a_type_is_decided_anew_by_the_next_start_but_a_declaration_holds() {
        for declared in [false, true] {
            let mut world = World::new(4, true);
            if declared {
                world.apply(Step::Declare(true));
            } else {
                world.apply(Step::Apply { key: 2, pin: false, fallback: false });
            }
            world.apply(Step::Switched(true));
            world.apply(Step::Leave(0));
            world.apply(Step::Restarted);
            world.apply(Step::Apply { key: 1, pin: false, fallback: false });
            world.apply(Step::Switched(true));
            assert_eq!(world.held.len(), usize::from(!declared));
            let serves = if declared { KeyType::Raw } else { KeyType::HardwareWrapped };
            assert_eq!(world.engine, Some(serves));
        }
    }

    /// How the switch of an engine that died meanwhile ended means nothing for the next one.
    #[test]
    fn a_restart_during_a_switch_switches_again_whatever_the_first_one_says() {
        for said in [true, false] {
            let mut world = World::new(4, true);
            world.apply(Step::Apply { key: 1, pin: false, fallback: false });
            world.apply(Step::Restarted);
            world.apply(Step::Switched(said));
            assert_eq!((world.held.len(), world.asked.len()), (0, 1));
            world.apply(Step::Switched(true));
            assert_eq!((world.held.len(), world.engine), (1, Some(KeyType::HardwareWrapped)));
        }
    }

    #[test]
    fn pins_leave_one_keyslot_free_and_say_so() {
        let mut world = World::new(2, false);
        world.apply(Step::Apply { key: 0, pin: true, fallback: false });
        world.apply(Step::Apply { key: 0, pin: true, fallback: false });
        assert_eq!(world.table.pinned(), 1, "a key has one keyslot, however often it is pinned");
        let text = refusal(&mut world, application(2, true, false));
        assert!(text.contains("1 of its 2 keyslots are pinned and one must stay free"), "{text}");
        for key in 0..100 {
            world.apply(Step::Apply { key, pin: false, fallback: false });
        }
        assert_eq!(world.table.len(), 100, "registering is always fine");
    }

    #[test]
    fn moments_are_shown_as_people_write_them() {
        let text = |seconds| Ago(Timestamp(seconds)).to_string();
        assert_eq!(text(951_782_400), "at 2000-02-29 00:00:00 UTC");
        assert_eq!(text(1_795_478_399), "at 2026-11-23 23:59:59 UTC");
        assert_eq!(text(4_107_542_400), "at 2100-03-01 00:00:00 UTC");
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::caps::{KeyTypes, UnitMask};
    use crate::config::{DataUnitSize, Hardware};
    use crate::engine::{Direction, Engine, Exclusive, KeyLadder, KeyRef, Piece, SlotIndex};
    use crate::error::Op;
    use crate::key::{EphemeralWrappedKey, Key, KeyForm, LongTermWrappedKey, RawKey, SoftwareSecret};
    use crate::keyslot::Policy;
    use crate::memory::{HeapSource, Memory, MemoryPool, MemorySource};
    use crate::profile::CryptoProfile;
    use loom::sync::Mutex;
    use std::sync::Arc;

    /// Serves one key type, switches once a start, opens every blob.
    #[derive(Debug)]
    struct OneType {
        capabilities: Capabilities,
        committed: Mutex<Option<KeyType>>,
        fails: bool,
    }

    impl OneType {
        fn profile(fails: bool) -> (Arc<Self>, Arc<CryptoProfile>) {
            let capabilities = Capabilities {
                units: [UnitMask::SERVED; crate::config::Mode::ALL.len()],
                dun_bytes_max: 8,
                key_types: KeyTypes::BOTH,
                keyslots: 2,
            };
            let engine = Arc::new(Self { capabilities, committed: Mutex::new(None), fails });
            let pool = MemoryPool::new(4096, 0);
            let profile = CryptoProfile::new(engine.clone(), pool, Policy::default()).unwrap();
            (engine, Arc::new(profile))
        }
    }

    impl Engine for OneType {
        fn name(&self) -> &str {
            "one-type"
        }
        fn capabilities(&self) -> &Capabilities {
            &self.capabilities
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
            _: &mut [Piece],
        ) -> Result<(), Error> {
            Ok(())
        }
        fn key_ladder(&self) -> Option<&dyn KeyLadder> {
            Some(self)
        }
        fn exclusive(&self) -> Option<&dyn Exclusive> {
            Some(self)
        }
    }

    impl Exclusive for OneType {
        fn committed(&self) -> Option<KeyType> {
            *self.committed.lock().unwrap()
        }
        fn commit(&self, key_type: KeyType) -> Result<(), Error> {
            let former = self.committed.lock().unwrap().replace(key_type);
            assert!(former.is_none_or(|former| former == key_type), "switched once");
            if self.fails { Err(Error::new(ErrorKind::EngineFailed, Op::Admit)) } else { Ok(()) }
        }
    }

    impl KeyLadder for OneType {
        fn import(&self, _: &RawKey) -> Result<LongTermWrappedKey, Error> {
            Ok(LongTermWrappedKey::new(&[1; 64]))
        }
        fn generate(&self) -> Result<LongTermWrappedKey, Error> {
            Ok(LongTermWrappedKey::new(&[1; 64]))
        }
        fn prepare(&self, _: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
            Ok(EphemeralWrappedKey::new(&[2; 64]))
        }
        fn derive_software_secret(&self, _: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
            Ok(SoftwareSecret::new(zeroize::Zeroizing::new([3; 32])))
        }
    }

    fn key(wrapped: bool) -> Arc<Key> {
        let bytes: Vec<u8> = (0..64).collect();
        let form = if wrapped {
            KeyForm::Wrapped(EphemeralWrappedKey::new(&bytes))
        } else {
            KeyForm::Raw(RawKey::new(&bytes))
        };
        Key::new(inlinecrypt_cipher::Mode::Aes256Xts, DataUnitSize::DEFAULT, 8, form, Hardware::Allowed)
            .unwrap()
    }

    /// Two volumes with different key types set up their keys at once: exactly one is admitted, or none if the switch
    /// fails, and both get an answer.
    fn race(fails: bool) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(3);
        builder.check(move || {
            let (_engine, profile) = OneType::profile(fails);
            let other = loom::thread::spawn({
                let profile = profile.clone();
                move || profile.admit(key(true), Fallback::Off).ok()
            });
            let mine = profile.admit(key(false), Fallback::Off).ok();
            let admitted = [mine, other.join().unwrap()];
            assert_eq!(admitted.iter().flatten().count(), usize::from(!fails));
            drop(admitted);
            assert_eq!(profile.status().keys, 0);
        });
    }

    #[test]
    fn two_key_types_at_once_one_is_admitted() {
        race(false);
    }

    #[test]
    fn two_key_types_at_once_and_the_switch_fails() {
        race(true);
    }

    /// The engine dies and is started again while the first key is admitted: whenever that is, the key is admitted and
    /// the engine that runs in the end serves it.
    #[test]
    fn a_restart_at_any_moment_of_the_first_admission() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(3);
        builder.check(|| {
            let (engine, profile) = OneType::profile(false);
            let other = loom::thread::spawn({
                let (engine, profile) = (engine.clone(), profile.clone());
                move || {
                    *engine.committed.lock().unwrap() = None;
                    profile.restarted().unwrap();
                }
            });
            let admission = profile.admit(key(true), Fallback::Off).unwrap();
            other.join().unwrap();
            assert_eq!(engine.committed(), Some(KeyType::HardwareWrapped));
            drop(admission);
        });
    }
}
