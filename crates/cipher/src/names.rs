//! The modes that filesystems encrypt names with: one message, 16 bytes or longer, of any length.
//!
//! The table beside that of [`mode`](crate::mode): fscrypt encrypts file names and the targets of symbolic links by these. A name
//! has no data units; its IV is that of data unit zero, of which a mode takes as many bytes as it has use for.
//!
//! To add a mode: its implementation in a file of its own, a variant and a row here, and its known answers in
//! `tests/names.rs`.

use crate::{Dun, KeyError, adiantum, cts, hctr2};
use std::fmt;

/// Shortest message that these modes take, in bytes.
pub const MESSAGE_BYTES_MIN: usize = 16;

/// A mode for names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamesMode {
    /// AES-256 in CBC with ciphertext stealing (CS3): equal beginnings of names show.
    Aes256Cts,
    /// The same with AES-128.
    Aes128Cts,
    /// The same with SM4.
    Sm4Cts,
    /// Adiantum with XChaCha12 and AES-256: a wide-block mode.
    Adiantum,
    /// HCTR2 with AES-256: a wide-block mode for CPUs with AES instructions.
    Aes256Hctr2,
}

impl NamesMode {
    /// Every mode.
    pub const ALL: [Self; 5] =
        [Self::Aes256Cts, Self::Aes128Cts, Self::Sm4Cts, Self::Adiantum, Self::Aes256Hctr2];

    /// The name that fscrypt's documentation has.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// Length of a key, in bytes.
    #[must_use]
    pub const fn key_bytes(self) -> usize {
        self.row().1
    }

    /// Length of the IV, in bytes: how much of the DUN reaches the cipher.
    #[must_use]
    pub const fn iv_bytes(self) -> usize {
        self.row().2
    }

    /// Expands `key` into the cipher that it selects.
    ///
    /// # Errors
    ///
    /// [`KeyError::WrongLength`] if it has not [`key_bytes`](Self::key_bytes) bytes.
    ///
    /// # Examples
    ///
    /// ```
    /// use inlinecrypt_cipher::{Dun, names::NamesMode};
    ///
    /// let cipher = NamesMode::Aes256Hctr2.expand(&[7; 32])?;
    /// let mut name = *b"a name, 18 bytes..";
    /// cipher.encrypt(Dun::ZERO, &mut name);
    /// assert_ne!(&name, b"a name, 18 bytes..");
    /// cipher.decrypt(Dun::ZERO, &mut name);
    /// assert_eq!(&name, b"a name, 18 bytes..");
    /// # Ok::<(), inlinecrypt_cipher::KeyError>(())
    /// ```
    pub fn expand(self, key: &[u8]) -> Result<Box<dyn MessageCipher>, KeyError> {
        let (_, expected, _, build) = self.row();
        if key.len() != expected {
            return Err(KeyError::WrongLength { expected, actual: key.len() });
        }
        Ok(build(key))
    }

    /// Name, key bytes, IV bytes, and what makes the cipher of a key of that length.
    const fn row(self) -> (&'static str, usize, usize, Build) {
        match self {
            Self::Aes256Cts => ("AES-256-CTS-CBC", 32, 16, cts::aes_256),
            Self::Aes128Cts => ("AES-128-CTS-CBC", 16, 16, cts::aes_128),
            Self::Sm4Cts => ("SM4-CTS-CBC", 16, 16, cts::sm4),
            Self::Adiantum => ("Adiantum", 32, 32, adiantum::xchacha12_aes_messages),
            Self::Aes256Hctr2 => ("AES-256-HCTR2", 32, 32, hctr2::aes_256),
        }
    }
}

type Build = fn(&[u8]) -> Box<dyn MessageCipher>;

/// The name that fscrypt's documentation has.
impl fmt::Display for NamesMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// An expanded key: encrypts and decrypts one message in place, without changing its length.
///
/// Its `Debug` shows no key material.
///
/// # Panics
///
/// If a message is shorter than [`MESSAGE_BYTES_MIN`].
pub trait MessageCipher: fmt::Debug + Send + Sync {
    /// Encrypts `message` in place, under the IV that `dun` begins with.
    fn encrypt(&self, dun: Dun, message: &mut [u8]);

    /// Decrypts `message` in place.
    fn decrypt(&self, dun: Dun, message: &mut [u8]);
}

/// Asserts what the caller promises.
pub(crate) fn assert_message(message: &[u8]) {
    assert!(message.len() >= MESSAGE_BYTES_MIN, "a message of {} bytes is too short", message.len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_encrypted_is_decrypted_again(
            which in 0..NamesMode::ALL.len(),
            key in proptest::collection::vec(any::<u8>(), 32),
            limbs in any::<[u64; 4]>(),
            message in proptest::collection::vec(any::<u8>(), 16..300),
        ) {
            let mode = NamesMode::ALL[which];
            let cipher = mode.expand(&key[..mode.key_bytes()]).unwrap();
            let dun = Dun::from_limbs(limbs);
            let mut data = message.clone();
            cipher.encrypt(dun, &mut data);
            prop_assert_ne!(&data, &message);
            cipher.decrypt(dun, &mut data);
            prop_assert_eq!(&data, &message);
        }

        #[test]
        fn wide_modes_change_every_block_with_any_byte(
            wide in prop_oneof![Just(NamesMode::Adiantum), Just(NamesMode::Aes256Hctr2)],
            message in proptest::collection::vec(any::<u8>(), 32..100),
            at in any::<proptest::sample::Index>(),
        ) {
            let cipher = wide.expand(&[3; 32]).unwrap();
            let mut other = message.clone();
            other[at.index(message.len())] ^= 1;
            let mut message = message;
            cipher.encrypt(Dun::ZERO, &mut message);
            cipher.encrypt(Dun::ZERO, &mut other);
            for (one, other) in message.chunks_exact(16).zip(other.chunks_exact(16)) {
                prop_assert_ne!(one, other);
            }
        }
    }

    #[test]
    fn keys_of_another_length_are_refused() {
        for mode in NamesMode::ALL {
            assert!(mode.expand(&vec![1; mode.key_bytes()]).is_ok());
            let wrong = mode.expand(&vec![1; mode.key_bytes() + 1]).unwrap_err();
            assert_eq!(
                wrong,
                KeyError::WrongLength { expected: mode.key_bytes(), actual: mode.key_bytes() + 1 }
            );
        }
    }
}
