//! The table of crypto modes: one row per mode.
//!
//! To add a mode: its implementation in a file of its own, one row in [`MODES`], and its known answers in `vectors/`.

use crate::Dun;
use std::fmt;

/// An algorithm with its chaining, as Linux numbers and names them (`include/linux/blk-crypto.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// AES-256 in XTS (IEEE 1619): 64-byte key of two halves.
    Aes256Xts,
    /// AES-128-CBC, the IV encrypted with AES-256 under the key's SHA-256 (ESSIV).
    Aes128CbcEssiv,
    /// Adiantum with XChaCha12 and AES-256: a wide-block mode for CPUs without AES instructions.
    Adiantum,
    /// SM4 in XTS with the tweak doubling of IEEE 1619: 32-byte key of two halves.
    Sm4Xts,
}

/// What a change of some 512-byte sectors inside a data unit does to the ciphertext of the others.
///
/// It decides whether a logical block smaller than the data unit is safe: see the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorUpdate {
    /// The other sectors keep their very bytes (XTS: each 16-byte block stands alone).
    Local,
    /// All later sectors of the unit change (CBC).
    Chained,
    /// Every byte of the unit changes (wide-block modes).
    Wide,
}

/// One row of [`MODES`].
#[derive(Debug)]
pub struct ModeInfo {
    /// The mode that this row describes.
    pub mode: Mode,
    /// The number that Linux gives it (`enum blk_crypto_mode_num`).
    pub linux_number: u8,
    /// The name that sysfs shows, and that our command line takes.
    pub name: &'static str,
    /// The name in Linux's crypto API.
    pub api_name: &'static str,
    /// Length of a raw key, in bytes.
    pub key_bytes: usize,
    /// Security strength, in bytes: the least size of a hardware-wrapped key for this mode.
    pub security_bytes: usize,
    /// Length of the IV, in bytes: how much of the DUN reaches the cipher.
    pub iv_bytes: u8,
    /// Largest data unit in bytes that the mode may be used with. XTS: 2^20 AES blocks (IEEE 1619-2018 5.1,
    /// SP 800-38E).
    pub unit_bytes_max: u32,
    /// What rewriting a part of a data unit does to the rest of it.
    pub sector_update: SectorUpdate,
    build: fn(&[u8]) -> Box<dyn UnitCipher>,
}

/// A raw key that cannot be used with a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// The key has not the mode's length.
    WrongLength {
        /// Bytes that the mode needs.
        expected: usize,
        /// Bytes that were given.
        actual: usize,
    },
    /// The two halves of an XTS key are the same, which breaks XTS (FIPS 140-3 IG C.I; SP 800-38E).
    EqualHalves,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrongLength { expected, actual } => {
                write!(f, "the mode takes a key of {expected} bytes, this one has {actual}")
            }
            Self::EqualHalves => f.write_str("the two halves of the XTS key are equal"),
        }
    }
}

impl std::error::Error for KeyError {}

/// An expanded key: encrypts and decrypts runs of data units in place.
///
/// # What the caller promises
///
/// - `unit_bytes` is a power of two from 16 to the mode's `unit_bytes_max`;
/// - `data` is a whole number of units.
///
/// # What an implementation owes
///
/// - Unit `i` of `data` uses the IV of DUN `first + i`, with carry over all 256 bits and then truncated to the mode's
///   IV bytes.
/// - It can be called from several threads at once; nothing is allocated, locked or asked of the system per data unit.
/// - Its `Debug` shows no key material, and its memory is wiped when it is dropped.
///
/// # Panics
///
/// If the caller breaks its promise.
pub trait UnitCipher: fmt::Debug + Send + Sync {
    /// Encrypts `data` in place.
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]);

    /// Decrypts `data` in place.
    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]);
}
