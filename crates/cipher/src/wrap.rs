//! Key wrapping: a key made unreadable, and unchangeable unnoticed, by whoever has not the wrapping key.
//!
//! AES-SIV with AES-256, "AEAD_AES_SIV_CMAC_512" (RFC 5297), without a nonce: deterministic authenticated encryption, the
//! use that RFC 5297 1.3.1 and 1.3.3 recommend for keys. The output is 16 bytes longer than the input: the synthetic IV, which is
//! also the authenticator, then the ciphertext. Hardware of the first generation wraps its keys the same way.
//!
//! Associated data are authenticated, not stored: the same strings have to be given at both ends. RFC 5297 authenticates
//! them as a vector, so `["ab", "c"]` and `["a", "bc"]` differ.

use crate::kdf::counter_mode_cmac;
use aes_siv::{KeyInit, siv::Aes256Siv};
use std::fmt;
use zeroize::Zeroizing;

/// How many bytes a wrapped key is longer than the key.
pub const OVERHEAD_BYTES: usize = 16;

/// The most associated strings that one key can be wrapped with (RFC 5297 7: 126 besides the plaintext, for safety).
pub const ASSOCIATED_MAX: usize = 126;

/// The key that wraps other keys: 64 bytes, the first 32 for authentication, the others for encryption.
///
/// Wiped when dropped; its `Debug` shows nothing of it.
pub struct WrappingKey(
    /// Boxed, so that moving the key leaves no copy behind.
    Box<Zeroizing<[u8; 64]>>,
);

impl WrappingKey {
    /// A wrapping key from its 64 bytes.
    #[must_use]
    pub fn new(bytes: &[u8; 64]) -> Self {
        let mut own = Box::new(Zeroizing::new([0; 64]));
        own.copy_from_slice(bytes);
        Self(own)
    }

    /// A wrapping key for one purpose, from a secret of 32 bytes: counter mode with CMAC-AES-256 (SP 800-108r1 4.1) over
    /// `label`, a zero byte, and the output length in bits. Different labels give unrelated keys.
    ///
    /// # Panics
    ///
    /// If `label` is empty or holds a zero byte.
    #[must_use]
    pub fn derive(secret: &[u8; 32], label: &[u8]) -> Self {
        assert!(!label.is_empty() && !label.contains(&0), "a label is a name, without zero bytes");
        let mut bytes = Box::new(Zeroizing::new([0; 64]));
        let fixed = [label, &[0], &512_u32.to_be_bytes()].concat();
        counter_mode_cmac(secret, &fixed, &mut **bytes);
        Self(bytes)
    }

    fn siv(&self) -> Aes256Siv {
        Aes256Siv::new((&**self.0).into())
    }
}

impl fmt::Debug for WrappingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bytes) = self;
        write!(f, "WrappingKey({} bytes)", bytes.len())
    }
}

/// A wrapped key that was changed, cut, wrapped with another key, or wrapped with other associated data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unauthentic;

impl fmt::Display for Unauthentic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the wrapped key does not authenticate")
    }
}

impl std::error::Error for Unauthentic {}

/// Wraps `key` (any length): [`OVERHEAD_BYTES`] longer, the same every time.
///
/// # Panics
///
/// If there are more than [`ASSOCIATED_MAX`] associated strings.
///
/// # Examples
///
/// ```
/// use inlinecrypt_cipher::wrap::{Unauthentic, WrappingKey, unwrap, wrap};
///
/// let kek = WrappingKey::derive(&[7; 32], b"example");
/// let wrapped = wrap(&kek, &[b"disk 1"], b"sixteen byte key");
/// assert_eq!(**unwrap(&kek, &[b"disk 1"], &wrapped)?, *b"sixteen byte key");
/// assert_eq!(unwrap(&kek, &[b"disk 2"], &wrapped), Err(Unauthentic));
/// # Ok::<(), Unauthentic>(())
/// ```
#[must_use]
pub fn wrap(kek: &WrappingKey, associated: &[&[u8]], key: &[u8]) -> Vec<u8> {
    assert_count(associated);
    kek.siv().encrypt(associated, key).expect("few enough associated strings, and memory for the result")
}

/// Opens what [`wrap`] made.
///
/// # Errors
///
/// [`Unauthentic`] if `wrapped` or `associated` differ from what was wrapped in so much as one bit.
///
/// # Panics
///
/// If there are more than [`ASSOCIATED_MAX`] associated strings.
pub fn unwrap(
    kek: &WrappingKey,
    associated: &[&[u8]],
    wrapped: &[u8],
) -> Result<Zeroizing<Vec<u8>>, Unauthentic> {
    assert_count(associated);
    // The cause says nothing beyond "error", on purpose.
    kek.siv().decrypt(associated, wrapped).map(Zeroizing::new).map_err(|_error| Unauthentic)
}

fn assert_count(associated: &[&[u8]]) {
    assert!(associated.len() <= ASSOCIATED_MAX, "{} associated strings", associated.len());
}
