//! Names: padded and encrypted, as shown without a key, and the targets of symbolic links.
//!
//! ```text
//!   name, 1 to 255 bytes -> zeroes up to a multiple of the policy's padding, 16 at least, 255 at most -> encrypted, one message
//!   target on the disk:     length (16 bits, little-endian)  encrypted target, padded alike
//!   no-key name:            base64url of: hash (2 x 32 bits)  ciphertext up to 149 bytes [SHA-256 of the rest]
//! ```
//!
//! Source: Linux `fs/crypto/fname.c` and `hooks.c`.

use crate::file::{Duns, FileError, Place, siphash};
use crate::master::MasterKey;
use crate::policy::{Context, NONCE_BYTES};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use inlinecrypt_cipher::names::{MESSAGE_BYTES_MIN, MessageCipher};
use sha2::{Digest, Sha256};
use std::fmt;

/// Longest name, in bytes, encrypted or not.
pub const NAME_BYTES_MAX: usize = 255;

/// How much of a long ciphertext stands in a no-key name as it is, in bytes.
const NO_KEY_BYTES: usize = 149;

/// What encrypts the names of one directory, or the target of one symbolic link.
pub struct NamesCipher {
    cipher: Box<dyn MessageCipher>,
    duns: Duns,
    padding: usize,
}

impl NamesCipher {
    /// The cipher for the directory or link at `place` with this context.
    ///
    /// # Errors
    ///
    /// If the key is none for the policy.
    pub fn new(key: &MasterKey, context: &Context, place: Place) -> Result<Self, FileError> {
        let bytes = key.names_key(context, &place.uuid).map_err(FileError::Derive)?;
        let cipher = context.policy.names().expand(&bytes).map_err(FileError::Key)?;
        let padding = context.policy.padding_bytes();
        Ok(Self { cipher, duns: Duns::new(key, context, place), padding })
    }

    /// Encrypts a name as it lies in its directory.
    ///
    /// # Errors
    ///
    /// [`NameError::Length`] for names that no directory has.
    pub fn encrypt_name(&self, name: &[u8]) -> Result<Vec<u8>, NameError> {
        self.encrypt(name, NAME_BYTES_MAX)
    }

    /// Decrypts a name that lies in a directory.
    ///
    /// # Errors
    ///
    /// Says why it is no name that was encrypted by this key and policy.
    pub fn decrypt_name(&self, ciphertext: &[u8]) -> Result<Vec<u8>, NameError> {
        let name = self.decrypt(ciphertext, NAME_BYTES_MAX)?;
        if name.contains(&b'/') || name == b"." || name == b".." {
            return Err(NameError::NotAName);
        }
        Ok(name)
    }

    /// Encrypts the target of a link as it lies in its inode or block, on a filesystem with blocks of `block_bytes`.
    ///
    /// # Errors
    ///
    /// [`NameError::Length`] for targets that no link has.
    pub fn encrypt_target(&self, target: &[u8], block_bytes: u32) -> Result<Vec<u8>, NameError> {
        let ciphertext = self.encrypt(target, target_bytes_max(block_bytes))?;
        let len = u16::try_from(ciphertext.len()).map_err(|_too_long| NameError::Length(target.len()))?;
        Ok([&len.to_le_bytes(), &ciphertext[..]].concat())
    }

    /// Decrypts the target of a link. `data` is as long as the inode says.
    ///
    /// # Errors
    ///
    /// Says why it is no target that was encrypted by this key and policy.
    pub fn decrypt_target(&self, data: &[u8], block_bytes: u32) -> Result<Vec<u8>, NameError> {
        let (len, ciphertext) = data.split_first_chunk().ok_or(NameError::Length(data.len()))?;
        if usize::from(u16::from_le_bytes(*len)) != ciphertext.len() {
            return Err(NameError::Length(data.len()));
        }
        self.decrypt(ciphertext, target_bytes_max(block_bytes))
    }

    fn encrypt(&self, text: &[u8], max: usize) -> Result<Vec<u8>, NameError> {
        let bytes = self.padded_bytes(text.len(), max).ok_or(NameError::Length(text.len()))?;
        let mut message = text.to_vec();
        message.resize(bytes, 0);
        self.cipher.encrypt(self.duns.of(0), &mut message);
        Ok(message)
    }

    fn decrypt(&self, ciphertext: &[u8], max: usize) -> Result<Vec<u8>, NameError> {
        if !(MESSAGE_BYTES_MIN..=max).contains(&ciphertext.len()) {
            return Err(NameError::Length(ciphertext.len()));
        }
        let mut message = ciphertext.to_vec();
        self.cipher.decrypt(self.duns.of(0), &mut message);
        let len = message.iter().position(|&byte| byte == 0).unwrap_or(message.len());
        if message[len..].iter().any(|&byte| byte != 0) {
            return Err(NameError::Padding);
        }
        message.truncate(len);
        if self.padded_bytes(len, max) != Some(ciphertext.len()) {
            return Err(NameError::NotCanonical { len, padded: ciphertext.len() });
        }
        Ok(message)
    }

    /// Linux `fs/crypto/fname.c`, `__fscrypt_fname_encrypted_size`.
    fn padded_bytes(&self, len: usize, max: usize) -> Option<usize> {
        (1..=max).contains(&len).then(|| len.max(MESSAGE_BYTES_MIN).next_multiple_of(self.padding).min(max))
    }
}

impl fmt::Debug for NamesCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamesCipher({:?}, padded to {})", self.cipher, self.padding)
    }
}

/// Longest ciphertext of a link's target: a block, less its length and a zero that Linux counts.
fn target_bytes_max(block_bytes: u32) -> usize {
    block_bytes as usize - 3
}

/// The name that a directory entry has for whoever has no key. `hash` is what the directory's index has for it.
///
/// ```
/// use inlinecrypt_fscrypt::names::no_key_name;
///
/// assert_eq!(no_key_name([1, 2], &[0xff; 16]), "AQAAAAIAAAD_____________________");
/// ```
#[must_use]
pub fn no_key_name(hash: [u32; 2], ciphertext: &[u8]) -> String {
    let mut bytes = [hash[0].to_le_bytes(), hash[1].to_le_bytes()].concat();
    match ciphertext.split_at_checked(NO_KEY_BYTES) {
        Some((start, rest)) if !rest.is_empty() => {
            bytes.extend(start);
            bytes.extend(Sha256::digest(rest));
        }
        _ => bytes.extend(ciphertext),
    }
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The target of a link for whoever has no key.
#[must_use]
pub fn no_key_target(data: &[u8]) -> String {
    no_key_name([0, 0], data.get(2..).unwrap_or_default())
}

/// The hash of a name in a directory where case makes no difference: `folded` is the name without case.
#[must_use]
pub fn dirhash(key: &MasterKey, nonce: &[u8; NONCE_BYTES], folded: &[u8]) -> u64 {
    siphash(&key.dirhash_key(nonce), folded)
}

/// Why bytes are no encrypted name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameError {
    /// No name or target has so many bytes.
    Length(usize),
    /// What follows the name is not zero.
    Padding,
    /// The padding is not what the policy says.
    NotCanonical {
        /// Bytes of the name.
        len: usize,
        /// Bytes that it is padded to.
        padded: usize,
    },
    /// It has a slash in it, or names the directory itself or the one above.
    NotAName,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(len) => write!(f, "{len} bytes are no encrypted name"),
            Self::Padding => f.write_str("it does not decrypt to a name followed by zeroes"),
            Self::NotCanonical { len, padded } => {
                write!(
                    f,
                    "it decrypts to {len} bytes of name, and is padded to {padded}, which the policy does not do"
                )
            }
            Self::NotAName => f.write_str("it decrypts to something that is no name"),
        }
    }
}

impl std::error::Error for NameError {}
