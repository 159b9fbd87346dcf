//! Engines: what encrypts, and what opens hardware-wrapped keys.
//!
//! ```text
//!   EngineSpec "software:slots=4"     RootSpec "file:/var/lib/..."
//!            |                                |
//!            |                                v
//!            |                        Root   where the long-term wrapping key comes from
//!            v                                |
//!          open(spec, root) <-----------------'
//!            |
//!            v
//!          dyn Engine   software, ice (later: isolated); verify wraps any of them
//!            |- dyn KeyLadder   import, generate, prepare, derive software secret
//!            |- dyn Exclusive   raw or wrapped keys, decided once: ice with a key manager
//!            `- dyn Lifecycle   reset, suspend, resume: ice
//! ```
//!
//! - An engine opened without a root takes raw keys only, and says so in its capabilities.
//! - Wrapping keys never leave this crate.
//! - Every engine passes `tests/conformance.rs`, which iterates [`EngineSpec::all_for_tests`].
//!
//! To add an engine: its file, a variant of [`EngineSpec`], and its arm in [`open`]; the compiler points at the rest.
//!
//! Start reading at [`software`], the smallest complete engine; then [`blob`] for the format of wrapped keys, and
//! [`root`] for where their wrapping key lives; then [`ice`], the model of hardware.

#![deny(unsafe_code)]

pub mod blob;
pub mod hardening;
pub mod ice;
pub mod isolated;
mod ladder;
mod random;
pub mod root;
pub mod software;
mod spec;
mod sys;
pub mod verify;

pub use blob::{BlobError, BlobInfo, Form, WrappingKeyId, inspect, looks_like_wrapped_key};
pub use hardening::harden_process;
pub use ice::{Chance, Faults, IceEngine, IceSpec, IceVariant};
pub use inlinecrypt_cipher::kdf::KdfVariant;
pub use root::{Ask, Root, RootMaterial, RootSpec};
pub use spec::{EngineSpec, SoftwareSpec};
pub use sys::SecretAllocator;
pub use verify::{Sample, Verified};

use inlinecrypt_core::engine::Engine;
use inlinecrypt_core::error::Error;
use std::sync::Arc;

/// Starts the engine that `spec` describes: the registry of engines.
///
/// With a `root` it serves hardware-wrapped keys besides raw ones, if it ever does; without, raw keys only.
///
/// # Errors
///
/// [`EngineFailed`](inlinecrypt_core::error::ErrorKind::EngineFailed) if the system gives no randomness, or the engine fails
/// its self test.
///
/// # Examples
///
/// ```
/// use inlinecrypt_engine::{EngineSpec, open};
///
/// let spec: EngineSpec = "software:slots=4".parse()?;
/// let engine = open(&spec, None)?;
/// assert_eq!(engine.capabilities().keyslots, 4);
/// assert!(engine.key_ladder().is_none());
/// # Ok::<(), inlinecrypt_core::error::Error>(())
/// ```
pub fn open(spec: &EngineSpec, root: Option<&Root>) -> Result<Arc<dyn Engine>, Error> {
    match spec {
        EngineSpec::Software(software) => Ok(Arc::new(software::SoftwareEngine::new(*software, root)?)),
        EngineSpec::Ice(ice) => {
            let engine = Arc::new(ice::IceEngine::new(*ice, root)?);
            Ok(match ice.verify {
                Some(sample) => Arc::new(Verified::with_opener(engine.clone(), sample, engine)),
                None => engine,
            })
        }
    }
}
