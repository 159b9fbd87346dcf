//! Admission: setting a key is one step that checks it and registers it, so that a refusal comes then, with its reason,
//! and never during I/O.
//!
//! Here is the decision, purely; [`CryptoProfile::admit`](crate::profile::CryptoProfile::admit) carries it out. Engines that
//! serve either raw or wrapped keys will be decided here too; so far every engine serves what it advertises for ever, so
//! a decision reserves nothing but the right to be served.

use crate::caps::{Capabilities, Unsupported};
use crate::config::{CryptoConfig, KeyType};
use crate::error::{Error, ErrorKind, Op};
use crate::key::KeyId;
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
    /// The engine does not accept the wrapped key itself.
    Rejected(Error),
}

impl Refusal {
    /// A refusal by the engine of that name.
    #[must_use]
    pub fn new(engine: &str, reason: Reason) -> Self {
        Self { engine: engine.to_owned(), reason }
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
            Reason::Rejected(error) => write!(f, "{}", error.chain()),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for Error {
    /// With the kernel's meanings: `EOPNOTSUPP` for wrapped keys that are not supported, `ENOPKG` where a fallback is
    /// missing (`block/blk-crypto.c`, `blk_crypto_start_using_key`), the engine's own error for a rejected blob.
    fn from(refusal: Refusal) -> Self {
        let kind = match &refusal.reason {
            Reason::Unsupported(_) => ErrorKind::Unsupported,
            Reason::FallbackOff(_) | Reason::FallbackCannot { .. } => ErrorKind::NoFallback,
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

/// Which keys are admitted, and how often.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct AdmissionTable {
    admitted: BTreeMap<KeyId, u32>,
}

impl AdmissionTable {
    /// Registers one more admission of `key`.
    pub fn enter(&mut self, key: KeyId) {
        *self.admitted.entry(key).or_default() += 1;
    }

    /// Ends one admission of `key`. Whether it was the last.
    ///
    /// # Panics
    ///
    /// If the key is not admitted.
    pub fn leave(&mut self, key: KeyId) -> bool {
        let count = self.admitted.get_mut(&key).expect("only an admitted key leaves");
        *count -= 1;
        let last = *count == 0;
        if last {
            self.admitted.remove(&key);
        }
        last
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
}
