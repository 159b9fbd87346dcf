//! The key ladder in software: what hardware does with wrapped keys, step by step.
//!
//! ```text
//!   raw key --import--.                      root's wrapping key     this start's wrapping key
//!                     v                               |                        |
//!         generate -> 32-byte key --wrap------------> long-term --prepare--> ephemeral
//!                                                                              |
//!                                                   open: inline encryption key, software secret
//! ```
//!
//! The key in the middle exists in memory only while one of these steps runs.

use crate::blob::{Form, MASTER_KEY_BYTES, MasterKey, Wrapper};
use crate::{Root, random};
use inlinecrypt_cipher::Mode;
use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key, software_secret};
use inlinecrypt_core::engine::KeyLadder;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{EphemeralWrappedKey, LongTermWrappedKey, RawKey, SoftwareSecret};
use std::sync::Arc;
use zeroize::Zeroizing;

/// A key ladder with a root's wrapping key for storage, and a wrapping key of its own for use.
#[derive(Debug)]
pub(crate) struct SoftwareLadder {
    long_term: Arc<Wrapper>,
    ephemeral: Wrapper,
    kdf: KdfVariant,
}

impl SoftwareLadder {
    /// A ladder whose ephemeral keys no other opens.
    pub(crate) fn new(root: &Root, kdf: KdfVariant) -> Result<Self, Error> {
        let secret = random::secret(Op::Open)?;
        let ephemeral = Wrapper::derive(&secret, Form::Ephemeral);
        Ok(Self { long_term: root.wrapper(), ephemeral, kdf })
    }

    /// The key that encrypts data in `mode`. Never leaves the engine.
    pub(crate) fn inline_key(
        &self,
        blob: &EphemeralWrappedKey,
        mode: Mode,
        op: Op,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        let master = self.open_ephemeral(blob, op)?;
        Ok(inline_encryption_key(self.kdf, &master, mode))
    }

    fn open_ephemeral(&self, blob: &EphemeralWrappedKey, op: Op) -> Result<MasterKey, Error> {
        self.ephemeral.unwrap(blob.as_bytes()).map_err(|why| why.during(op))
    }
}

impl KeyLadder for SoftwareLadder {
    fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error> {
        let bytes = raw.expose();
        let master: &[u8; MASTER_KEY_BYTES] = bytes.try_into().map_err(|_length| {
            Error::new(ErrorKind::Invalid, Op::Import).detail(format!(
                "the raw key has {} bytes, the engine wraps keys of {MASTER_KEY_BYTES}",
                bytes.len()
            ))
        })?;
        Ok(LongTermWrappedKey::new(&self.long_term.wrap(master)))
    }

    fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        let master = random::secret(Op::Generate)?;
        Ok(LongTermWrappedKey::new(&self.long_term.wrap(&master)))
    }

    fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        let master = self.long_term.unwrap(long_term.as_bytes()).map_err(|why| why.during(Op::Prepare))?;
        Ok(EphemeralWrappedKey::new(&self.ephemeral.wrap(&master)))
    }

    fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
        let master = self.open_ephemeral(ephemeral, Op::DeriveSecret)?;
        Ok(SoftwareSecret::new(software_secret(self.kdf, &master)))
    }
}
