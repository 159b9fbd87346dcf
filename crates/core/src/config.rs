//! Crypto configs: mode, data unit size, DUN bytes, key type. No key bytes here.

use crate::error::{Error, ErrorKind, Op};
use std::fmt;

pub use inlinecrypt_cipher::Mode;

/// Length of one data unit: the piece of plaintext that has an IV of its own.
///
/// Always a power of two from 1 byte to 2 GiB, as Linux accepts when a key is built; the bounds that matter in
/// practice (512 bytes to 64 KiB) come from an engine's capabilities.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DataUnitSize {
    log2: u8,
}

impl DataUnitSize {
    /// 512 bytes: the smallest that engines offer.
    pub const MIN_SERVED: Self = Self { log2: 9 };
    /// 4096 bytes: what volumes use unless told otherwise.
    pub const DEFAULT: Self = Self { log2: 12 };
    /// 64 KiB: the largest that engines offer.
    pub const MAX_SERVED: Self = Self { log2: 16 };

    /// Accepts `bytes` if it is a power of two.
    #[must_use]
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() {
            // trailing_zeros of a u32 is at most 31.
            #[expect(clippy::cast_possible_truncation, reason = "at most 31")]
            Some(Self { log2: bytes.trailing_zeros() as u8 })
        } else {
            None
        }
    }

    /// The length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1 << self.log2
    }

    /// The base-2 logarithm of the length.
    #[must_use]
    pub const fn log2(self) -> u8 {
        self.log2
    }

    /// How many data units `len_bytes` holds, or `None` if it is not a whole number of them.
    #[must_use]
    pub const fn units_in(self, len_bytes: u64) -> Option<u64> {
        let mask = (1u64 << self.log2) - 1;
        if len_bytes & mask == 0 { Some(len_bytes >> self.log2) } else { None }
    }
}

impl fmt::Debug for DataUnitSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataUnitSize({})", self.bytes())
    }
}

impl fmt::Display for DataUnitSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

/// The form in which a key is given to an engine (`enum blk_crypto_key_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// The key bytes as they are.
    Raw,
    /// A blob that only the engine can open.
    HardwareWrapped,
}

impl KeyType {
    /// Linux's bit for this type.
    #[must_use]
    pub const fn bit(self) -> u32 {
        match self {
            Self::Raw => 1,
            Self::HardwareWrapped => 2,
        }
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::HardwareWrapped => "hardware-wrapped",
        })
    }
}

/// Whether hardware may serve a key, or only the software fallback (Linux's `ALLOW_HW` flag, bit 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hardware {
    /// The profile's own engine may serve the key.
    Allowed,
    /// Only the software fallback may.
    Forbidden,
}

/// What an engine must be able to do to serve a key (`struct blk_crypto_config`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CryptoConfig {
    pub(crate) mode: Mode,
    pub(crate) data_unit_size: DataUnitSize,
    pub(crate) dun_bytes: u8,
    pub(crate) key_type: KeyType,
    pub(crate) hardware: Hardware,
}

impl CryptoConfig {
    /// Algorithm and chaining.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Length of a data unit.
    #[must_use]
    pub fn data_unit_size(&self) -> DataUnitSize {
        self.data_unit_size
    }

    /// How many bytes the largest DUN of this key needs: 1 to the mode's IV bytes.
    #[must_use]
    pub fn dun_bytes(&self) -> u8 {
        self.dun_bytes
    }

    /// The form of the key.
    #[must_use]
    pub fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// Whether the profile's own engine may serve the key.
    #[must_use]
    pub fn hardware(&self) -> Hardware {
        self.hardware
    }
}

/// A config as its ABI has it: numbers from outside, not yet checked.
///
/// [`Key::init`](crate::key::Key::init) checks them in the kernel's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigNumbers {
    /// `enum blk_crypto_mode_num`: 1 to 4.
    pub mode: u32,
    /// Bit 0 allows hardware; no other is known.
    pub flags: u32,
    /// 1 raw, 2 hardware-wrapped.
    pub key_type: u32,
    /// 1 to the mode's IV bytes.
    pub dun_bytes: u32,
    /// A power of two, in bytes.
    pub data_unit_size: u32,
}

impl ConfigNumbers {
    /// The only flag: hardware may serve the key.
    pub const ALLOW_HW: u32 = 1;
}

/// Why a key and config cannot be used together, whatever the device. All mean `EINVAL`.
///
/// In the order in which they are looked for: the first six as `block/blk-crypto.c` `blk_crypto_init_key` has them,
/// the last two are ours (Linux finds equal halves when it programs the key, and bounds units by capabilities only).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidKey {
    /// No such mode number.
    UnknownMode(u32),
    /// A flag that does not exist.
    UnknownFlag(u32),
    /// The key has not the size that its type and mode ask for.
    KeySize {
        /// Bytes given.
        actual: usize,
        /// Least bytes.
        min: usize,
        /// Most bytes.
        max: usize,
    },
    /// A wrapped key without permission to use hardware: nothing else could open it.
    WrappedWithoutHardware,
    /// No such key type.
    UnknownKeyType(u32),
    /// Zero, or more than the mode's IV has.
    DunBytes {
        /// Bytes asked for.
        actual: u32,
        /// The mode's IV bytes.
        max: u8,
    },
    /// Not a power of two.
    DataUnitSize(u32),
    /// More AES blocks in one data unit than the mode is safe for (XTS: 2^20; IEEE 1619-2018 5.1).
    DataUnitTooLarge {
        /// Bytes asked for.
        actual: u32,
        /// The mode's limit, in bytes.
        max: u32,
    },
    /// The two halves of a raw XTS key are equal (SP 800-38E; FIPS 140-3 IG C.I).
    EqualHalves,
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownMode(number) => write!(f, "there is no crypto mode {number}"),
            Self::UnknownFlag(flags) => write!(f, "unknown flags {flags:#x}"),
            Self::KeySize { actual, min, max } if min == max => {
                write!(f, "the key has {actual} bytes, the mode takes {min}")
            }
            Self::KeySize { actual, min, max } => {
                write!(f, "the wrapped key has {actual} bytes, the mode takes {min} to {max}")
            }
            Self::WrappedWithoutHardware => f.write_str(
                "a wrapped key needs the engine that wrapped it; software fallback alone cannot serve it",
            ),
            Self::UnknownKeyType(number) => write!(f, "there is no key type {number}"),
            Self::DunBytes { actual, max } => write!(f, "{actual} DUN bytes; the mode takes 1 to {max}"),
            Self::DataUnitSize(bytes) => write!(f, "a data unit of {bytes} bytes is not a power of two"),
            Self::DataUnitTooLarge { actual, max } => {
                write!(f, "a data unit of {actual} bytes; the mode is safe up to {max}")
            }
            Self::EqualHalves => {
                f.write_str("the two halves of the XTS key are equal; make a new random key")
            }
        }
    }
}

impl std::error::Error for InvalidKey {}

impl From<InvalidKey> for Error {
    fn from(why: InvalidKey) -> Self {
        Self::new(ErrorKind::Invalid, Op::InitKey).because(why)
    }
}
