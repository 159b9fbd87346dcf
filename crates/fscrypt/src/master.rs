//! Master keys, and what is derived from them.
//!
//! | HKDF context | what | info | bytes |
//! | --- | --- | --- | --- |
//! | 1 | identifier of a raw key | | 16 |
//! | 2 | key of a file | nonce | the mode's |
//! | 3 | key of a mode, DIRECT_KEY | mode's number | the mode's |
//! | 4 | key of a mode, IV_INO_LBLK_64 | mode's number, filesystem's UUID | the mode's |
//! | 5 | key of a directory's hashes | nonce | 16 |
//! | 6 | key of a mode, IV_INO_LBLK_32 | mode's number, filesystem's UUID | the mode's |
//! | 7 | key of the hash of inode numbers | | 16 |
//! | 8 | identifier of a hardware-wrapped key | | 16 |
//!
//! Everything of a hardware-wrapped key but file contents comes from its software secret; contents are encrypted with its
//! inline key, whatever the filesystem and the data unit.
//!
//! Policies of version 1 know no HKDF: a file's key is the master key, encrypted with AES-128-ECB under the file's nonce.
//!
//! Source: Linux `fs/crypto/hkdf.c`, `keysetup.c`, `keysetup_v1.c`.

use crate::policy::{Context, Derivation, KeyRef, NONCE_BYTES, names_number};
use aes::Aes128;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use inlinecrypt_cipher::Dun;
use inlinecrypt_cipher::kdf::{fscrypt_hkdf, key_identifier_raw, key_identifier_wrapped};
use sha2::{Digest, Sha512};
use std::fmt;
use std::sync::Arc;
use zeroize::Zeroizing;

/// Shortest raw master key, in bytes.
pub const MASTER_KEY_BYTES_MIN: usize = 16;
/// Longest raw master key, in bytes.
pub const MASTER_KEY_BYTES_MAX: usize = 64;

const CONTEXT_PER_FILE_KEY: u8 = 2;
const CONTEXT_DIRECT_KEY: u8 = 3;
const CONTEXT_IV_INO_LBLK_64_KEY: u8 = 4;
const CONTEXT_DIRHASH_KEY: u8 = 5;
const CONTEXT_IV_INO_LBLK_32_KEY: u8 = 6;
const CONTEXT_INODE_HASH_KEY: u8 = 7;

/// A master key. Wipes itself; its `Debug` shows nothing of it.
pub struct MasterKey {
    form: Form,
}

enum Form {
    Raw(Zeroizing<Vec<u8>>),
    Wrapped { software_secret: Zeroizing<[u8; 32]>, contents: Contents },
}

/// Where a hardware-wrapped key's inline key is.
enum Contents {
    Here(Zeroizing<Vec<u8>>),
    In(Arc<dyn InlineEngine>),
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From plaintext.
    Encrypt,
    /// To plaintext.
    Decrypt,
}

/// What has a hardware-wrapped key's inline key, and does not give it away: it encrypts contents itself.
///
/// What it owes: `data` is whole data units of `unit_bytes`, encrypted in AES-256-XTS by the inline key; unit `i` has DUN
/// `first + i`, which fits 64 bits.
pub trait InlineEngine: fmt::Debug + Send + Sync {
    /// Encrypts or decrypts `data` in place.
    ///
    /// # Errors
    ///
    /// Its own. What `data` holds then means nothing.
    fn crypt(&self, way: Way, first: Dun, unit_bytes: u32, data: &mut [u8]) -> Result<(), EngineFailure>;
}

/// What an engine says when it fails.
pub type EngineFailure = Box<dyn std::error::Error + Send + Sync>;

/// By what the contents of a file are encrypted.
pub(crate) enum ContentsKey {
    Bytes(Zeroizing<Vec<u8>>),
    Engine(Arc<dyn InlineEngine>),
}

/// How a key can be named: what it is called in policies of version 2, and by convention in those of version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyName {
    /// Computed from the key.
    pub identifier: [u8; 16],
    /// What e4crypt and fscryptctl choose: the start of SHA-512 of SHA-512 of the key. `None` for hardware-wrapped ones.
    pub descriptor: Option<[u8; 8]>,
}

impl MasterKey {
    /// A raw master key.
    ///
    /// # Errors
    ///
    /// [`DeriveError::Length`] if it has not 16 to 64 bytes.
    pub fn raw(key: &[u8]) -> Result<Self, DeriveError> {
        if !(MASTER_KEY_BYTES_MIN..=MASTER_KEY_BYTES_MAX).contains(&key.len()) {
            return Err(DeriveError::Length(key.len()));
        }
        Ok(Self { form: Form::Raw(Zeroizing::new(key.to_vec())) })
    }

    /// A hardware-wrapped master key, by what hardware derives from it: the secret that software may see, and the key of
    /// AES-256-XTS for file contents.
    ///
    /// # Errors
    ///
    /// [`DeriveError::Length`] if the inline key has not 64 bytes.
    pub fn wrapped(software_secret: &[u8; 32], inline_key: &[u8]) -> Result<Self, DeriveError> {
        if inline_key.len() != 64 {
            return Err(DeriveError::Length(inline_key.len()));
        }
        Ok(Self {
            form: Form::Wrapped {
                software_secret: Zeroizing::new(*software_secret),
                contents: Contents::Here(Zeroizing::new(inline_key.to_vec())),
            },
        })
    }

    /// A hardware-wrapped master key whose inline key stays in the engine that opened it.
    #[must_use]
    pub fn in_engine(software_secret: &[u8; 32], engine: Arc<dyn InlineEngine>) -> Self {
        Self {
            form: Form::Wrapped {
                software_secret: Zeroizing::new(*software_secret),
                contents: Contents::In(engine),
            },
        }
    }

    /// What the key is called.
    #[must_use]
    pub fn name(&self) -> KeyName {
        match &self.form {
            Form::Raw(key) => {
                let inner = Zeroizing::new(<[u8; 64]>::from(Sha512::digest(key.as_slice())));
                let outer = <[u8; 64]>::from(Sha512::digest(inner.as_slice()));
                let descriptor = outer.first_chunk().copied();
                KeyName { identifier: key_identifier_raw(key), descriptor }
            }
            Form::Wrapped { software_secret, .. } => {
                KeyName { identifier: key_identifier_wrapped(software_secret), descriptor: None }
            }
        }
    }

    /// The key for the contents of a file with this context, on the filesystem `uuid`; `None` if an engine keeps it.
    ///
    /// # Errors
    ///
    /// If the key is too short for the mode, or hardware-wrapped and the policy is none for such keys.
    pub fn contents_key_bytes(
        &self,
        context: &Context,
        uuid: &[u8; 16],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, DeriveError> {
        Ok(match self.contents_key(context, uuid)? {
            ContentsKey::Bytes(bytes) => Some(bytes),
            ContentsKey::Engine(_) => None,
        })
    }

    /// What encrypts the contents of a file with this context, on the filesystem `uuid`.
    pub(crate) fn contents_key(
        &self,
        context: &Context,
        uuid: &[u8; 16],
    ) -> Result<ContentsKey, DeriveError> {
        let contents = context.policy.contents();
        let info = contents.mode().info();
        if let Form::Wrapped { contents, .. } = &self.form {
            check_wrapped(context.policy.derivation())?;
            return Ok(match contents {
                Contents::Here(key) => ContentsKey::Bytes(key.clone()),
                Contents::In(engine) => ContentsKey::Engine(engine.clone()),
            });
        }
        self.mode_key(context, uuid, contents.number(), info.key_bytes, info.security_bytes)
            .map(ContentsKey::Bytes)
    }

    /// The key for the names in a directory, or for the target of a symbolic link, with this context.
    ///
    /// # Errors
    ///
    /// If the key is too short for the mode, or hardware-wrapped and the policy is none for such keys.
    pub fn names_key(&self, context: &Context, uuid: &[u8; 16]) -> Result<Zeroizing<Vec<u8>>, DeriveError> {
        let mode = context.policy.names();
        // Their security strength is their key's length.
        self.mode_key(context, uuid, names_number(mode), mode.key_bytes(), mode.key_bytes())
    }

    /// The key of a directory's SipHash of names, where names are compared without regard to case.
    #[must_use]
    pub fn dirhash_key(&self, nonce: &[u8; NONCE_BYTES]) -> Zeroizing<[u8; 16]> {
        self.siphash_key(CONTEXT_DIRHASH_KEY, nonce)
    }

    /// The key of the SipHash of inode numbers, with IV_INO_LBLK_32.
    #[must_use]
    pub fn inode_hash_key(&self) -> Zeroizing<[u8; 16]> {
        self.siphash_key(CONTEXT_INODE_HASH_KEY, &[])
    }

    fn siphash_key(&self, context: u8, info: &[u8]) -> Zeroizing<[u8; 16]> {
        let mut key = Zeroizing::new([0; 16]);
        fscrypt_hkdf(self.hkdf_key(), context, info, &mut *key);
        key
    }

    /// What is derived from.
    fn hkdf_key(&self) -> &[u8] {
        match &self.form {
            Form::Raw(key) => key,
            Form::Wrapped { software_secret, .. } => &**software_secret,
        }
    }

    fn mode_key(
        &self,
        context: &Context,
        uuid: &[u8; 16],
        mode_number: u8,
        key_bytes: usize,
        security_bytes: usize,
    ) -> Result<Zeroizing<Vec<u8>>, DeriveError> {
        let Context { policy, nonce } = context;
        let derivation = policy.derivation();
        let master = self.hkdf_key();
        if let Form::Wrapped { .. } = &self.form {
            check_wrapped(derivation)?;
        }
        if let KeyRef::Descriptor(_) = policy.key() {
            // Version 1 has no HKDF, and needs as many bytes as the mode.
            let start = master.get(..key_bytes);
            let start = start.ok_or(DeriveError::TooShort { needed: key_bytes, actual: master.len() })?;
            return Ok(match derivation {
                Derivation::DirectKey => Zeroizing::new(start.to_vec()),
                _ => encrypted_by_nonce(start, nonce),
            });
        }
        if master.len() < security_bytes {
            return Err(DeriveError::TooShort { needed: security_bytes, actual: master.len() });
        }
        let mut key = Zeroizing::new(vec![0; key_bytes]);
        let with_uuid = [&[mode_number], &uuid[..]].concat();
        match derivation {
            Derivation::PerFileKey => fscrypt_hkdf(master, CONTEXT_PER_FILE_KEY, nonce, &mut key),
            Derivation::DirectKey => fscrypt_hkdf(master, CONTEXT_DIRECT_KEY, &[mode_number], &mut key),
            Derivation::IvInoLblk64 => fscrypt_hkdf(master, CONTEXT_IV_INO_LBLK_64_KEY, &with_uuid, &mut key),
            Derivation::IvInoLblk32 => fscrypt_hkdf(master, CONTEXT_IV_INO_LBLK_32_KEY, &with_uuid, &mut key),
        }
        Ok(key)
    }
}

/// Hardware derives one key for contents, so that no policy with other keys can be served.
fn check_wrapped(derivation: Derivation) -> Result<(), DeriveError> {
    match derivation {
        Derivation::IvInoLblk64 | Derivation::IvInoLblk32 => Ok(()),
        Derivation::PerFileKey | Derivation::DirectKey => Err(DeriveError::Wrapped(derivation)),
    }
}

/// Version 1's key of a file: AES-128-ECB of the master key, under the nonce. All keys are whole blocks.
fn encrypted_by_nonce(master: &[u8], nonce: &[u8; NONCE_BYTES]) -> Zeroizing<Vec<u8>> {
    let aes = Aes128::new(&Array(*nonce));
    let mut key = Zeroizing::new(master.to_vec());
    for block in key.as_chunks_mut::<16>().0 {
        let mut data = Array(*block);
        aes.encrypt_block(&mut data);
        *block = data.0;
    }
    key
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = match self.form {
            Form::Raw(_) => "raw",
            Form::Wrapped { .. } => "hardware-wrapped",
        };
        write!(f, "MasterKey({form})")
    }
}

/// Why a key cannot be derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeriveError {
    /// No key of this form has so many bytes.
    Length(usize),
    /// Too few bytes for the policy's mode.
    TooShort {
        /// Bytes that the mode needs at least.
        needed: usize,
        /// Bytes that the key has.
        actual: usize,
    },
    /// A policy that hardware-wrapped keys cannot have.
    Wrapped(Derivation),
}

impl fmt::Display for DeriveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(len) => write!(
                f,
                "the key has {len} bytes; raw master keys have {MASTER_KEY_BYTES_MIN} to {MASTER_KEY_BYTES_MAX}"
            ),
            Self::TooShort { needed, actual } => {
                write!(f, "the master key has {actual} bytes, and the policy's modes need {needed}")
            }
            Self::Wrapped(derivation) => write!(
                f,
                "a hardware-wrapped key cannot have a policy with {}: only IV_INO_LBLK_64 and IV_INO_LBLK_32",
                derivation.name()
            ),
        }
    }
}

impl std::error::Error for DeriveError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ContentsMode, Policy};
    use inlinecrypt_cipher::names::NamesMode;

    #[test]
    fn keys_show_nothing_of_themselves() {
        let key = MasterKey::raw(&[0x5a; 64]).unwrap();
        assert_eq!(format!("{key:?}"), "MasterKey(raw)");
        assert!(MasterKey::raw(&[0; 15]).is_err() && MasterKey::raw(&[0; 65]).is_err());
    }

    #[test]
    fn hardware_wrapped_keys_have_the_policies_of_hardware_alone() {
        let key = MasterKey::wrapped(&[1; 32], &[2; 64]).unwrap();
        for (derivation, may) in [
            (Derivation::PerFileKey, false),
            (Derivation::IvInoLblk64, true),
            (Derivation::IvInoLblk32, true),
        ] {
            let policy = Policy::new(
                ContentsMode::Aes256Xts,
                NamesMode::Aes256Cts,
                32,
                derivation,
                0,
                KeyRef::Identifier(key.name().identifier),
            );
            let context = Context { policy: policy.unwrap(), nonce: [3; 16] };
            assert_eq!(key.contents_key(&context, &[4; 16]).is_ok(), may, "{derivation:?}");
            assert_eq!(key.names_key(&context, &[4; 16]).is_ok(), may, "{derivation:?}");
        }
    }

    /// A raw key with the bytes of the software secret is another key, and called otherwise.
    #[test]
    fn whoever_learns_the_software_secret_does_not_get_the_same_identifier() {
        let wrapped = MasterKey::wrapped(&[1; 32], &[2; 64]).unwrap();
        assert_ne!(wrapped.name().identifier, MasterKey::raw(&[1; 32]).unwrap().name().identifier);
    }
}
