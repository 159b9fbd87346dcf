//! The table of crypto modes: one row per mode.
//!
//! To add a mode: its implementation in a file of its own, one row in [`MODES`], and its known answers in `vectors/`.

use crate::{Dun, adiantum, essiv, xts};
use std::fmt;
use subtle::ConstantTimeEq as _;

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
    /// AES-128 in XTS (IEEE 1619): 32-byte key of two halves. dm-crypt has it, blk-crypto has not, so no hardware of
    /// Linux's does it.
    Aes128Xts,
}

impl Mode {
    /// Every mode, in the order of [`MODES`].
    pub const ALL: [Self; 5] =
        [Self::Aes256Xts, Self::Aes128CbcEssiv, Self::Adiantum, Self::Sm4Xts, Self::Aes128Xts];

    /// The mode's row of [`MODES`].
    #[must_use]
    pub fn info(self) -> &'static ModeInfo {
        &MODES[self.index()]
    }

    /// The mode's place in [`MODES`] and [`Mode::ALL`]: what an array with one entry per mode is indexed by.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Aes256Xts => 0,
            Self::Aes128CbcEssiv => 1,
            Self::Adiantum => 2,
            Self::Sm4Xts => 3,
            Self::Aes128Xts => 4,
        }
    }

    /// The mode of this name, as sysfs spells it; upper and lower case are the same here.
    ///
    /// ```
    /// use inlinecrypt_cipher::Mode;
    ///
    /// assert_eq!(Mode::from_name("aes-256-xts"), Some(Mode::Aes256Xts));
    /// assert_eq!(Mode::from_name("Adiantum"), Some(Mode::Adiantum));
    /// assert_eq!(Mode::from_name("AES-256-GCM"), None);
    /// ```
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        MODES.iter().find(|info| info.name.eq_ignore_ascii_case(name)).map(|info| info.mode)
    }
}

/// The name that sysfs shows.
impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.info().name)
    }
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
    /// The number that Linux gives it (`enum blk_crypto_mode_num`); `None` if blk-crypto does not know it.
    pub linux_number: Option<u8>,
    /// The name that sysfs shows, or would show, and that our command line takes.
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
    /// The two halves of a key have to differ (XTS).
    halves_differ: bool,
    /// Gets a key that `check_key` accepted.
    build: fn(&[u8]) -> Box<dyn UnitCipher>,
}

impl ModeInfo {
    /// Whether a key whose halves are equal is refused.
    #[must_use]
    pub fn refuses_equal_halves(&self) -> bool {
        self.halves_differ
    }

    /// Whether `key` can be used with this mode. Takes the same time for every key of the right length.
    ///
    /// # Errors
    ///
    /// [`KeyError::WrongLength`] if it has not [`key_bytes`](Self::key_bytes) bytes; [`KeyError::EqualHalves`] if it
    /// is an XTS key whose halves are equal.
    pub fn check_key(&self, key: &[u8]) -> Result<(), KeyError> {
        if key.len() != self.key_bytes {
            return Err(KeyError::WrongLength { expected: self.key_bytes, actual: key.len() });
        }
        let (first, second) = key.split_at(key.len() / 2);
        if self.halves_differ && bool::from(first.ct_eq(second)) {
            return Err(KeyError::EqualHalves);
        }
        Ok(())
    }

    /// Expands `key` into the cipher that it selects.
    ///
    /// # Errors
    ///
    /// Those of [`check_key`](Self::check_key).
    ///
    /// # Examples
    ///
    /// ```
    /// use inlinecrypt_cipher::{Dun, Mode};
    ///
    /// let key: Vec<u8> = (0..64).collect();
    /// let cipher = Mode::Aes256Xts.info().expand(&key)?;
    /// let mut data = vec![0; 8192];
    /// cipher.encrypt(Dun::from(7), 4096, &mut data); // two data units: DUN 7 and DUN 8
    /// assert_ne!(data[..4096], data[4096..]);
    /// cipher.decrypt(Dun::from(8), 4096, &mut data[4096..]);
    /// assert_eq!(data[4096..], [0; 4096]);
    /// # Ok::<(), inlinecrypt_cipher::KeyError>(())
    /// ```
    pub fn expand(&self, key: &[u8]) -> Result<Box<dyn UnitCipher>, KeyError> {
        self.check_key(key)?;
        Ok((self.build)(key))
    }
}

/// Largest data unit of a mode without a limit of its own: 16 MiB, which is also what the XTS modes may have
/// (2^20 blocks of 16 bytes).
const UNIT_BYTES_MAX: u32 = 1 << 24;

/// Every mode we know: Linux's in its order (`block/blk-crypto.c`, `blk_crypto_modes`), then those that it has elsewhere.
pub static MODES: [ModeInfo; 5] = [
    ModeInfo {
        mode: Mode::Aes256Xts,
        linux_number: Some(1),
        name: "AES-256-XTS",
        api_name: "xts(aes)",
        key_bytes: 64,
        security_bytes: 32,
        iv_bytes: 16,
        unit_bytes_max: UNIT_BYTES_MAX,
        sector_update: SectorUpdate::Local,
        halves_differ: true,
        build: xts::aes_256,
    },
    ModeInfo {
        mode: Mode::Aes128CbcEssiv,
        linux_number: Some(2),
        name: "AES-128-CBC-ESSIV",
        api_name: "essiv(cbc(aes),sha256)",
        key_bytes: 16,
        security_bytes: 16,
        iv_bytes: 16,
        unit_bytes_max: UNIT_BYTES_MAX,
        sector_update: SectorUpdate::Chained,
        halves_differ: false,
        build: essiv::aes_128,
    },
    ModeInfo {
        mode: Mode::Adiantum,
        linux_number: Some(3),
        name: "Adiantum",
        api_name: "adiantum(xchacha12,aes)",
        key_bytes: 32,
        security_bytes: 32,
        iv_bytes: 32,
        unit_bytes_max: UNIT_BYTES_MAX,
        sector_update: SectorUpdate::Wide,
        halves_differ: false,
        build: adiantum::xchacha12_aes,
    },
    ModeInfo {
        mode: Mode::Sm4Xts,
        linux_number: Some(4),
        name: "SM4-XTS",
        api_name: "xts(sm4)",
        key_bytes: 32,
        security_bytes: 16,
        iv_bytes: 16,
        unit_bytes_max: UNIT_BYTES_MAX,
        sector_update: SectorUpdate::Local,
        halves_differ: true,
        build: xts::sm4,
    },
    ModeInfo {
        mode: Mode::Aes128Xts,
        linux_number: None,
        name: "AES-128-XTS",
        api_name: "xts(aes)",
        key_bytes: 32,
        security_bytes: 16,
        iv_bytes: 16,
        unit_bytes_max: UNIT_BYTES_MAX,
        sector_update: SectorUpdate::Local,
        halves_differ: true,
        build: xts::aes_128,
    },
];

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_where_their_mode_says() {
        for (at, mode) in Mode::ALL.into_iter().enumerate() {
            assert_eq!(mode.index(), at);
            assert_eq!(mode.info().mode, mode);
            let number = u8::try_from(at + 1).unwrap();
            assert_eq!(mode.info().linux_number, (mode != Mode::Aes128Xts).then_some(number));
        }
    }

    #[test]
    fn names_are_found_in_any_case_and_shown_as_sysfs_does() {
        for mode in Mode::ALL {
            assert_eq!(Mode::from_name(&mode.to_string()), Some(mode));
            assert_eq!(Mode::from_name(&mode.to_string().to_lowercase()), Some(mode));
            assert_eq!(Mode::from_name(&mode.to_string().to_uppercase()), Some(mode));
        }
        assert_eq!(Mode::from_name("AES-256-XT"), None);
        assert_eq!(format!("{:>12}", Mode::Sm4Xts), "     SM4-XTS");
    }

    #[test]
    fn every_other_key_length_is_refused() {
        for info in &MODES {
            for len in (0..=130).filter(|&len| len != info.key_bytes) {
                let key: Vec<u8> =
                    (0..len).collect::<Vec<usize>>().iter().map(|&b| u8::try_from(b).unwrap()).collect();
                let refused = KeyError::WrongLength { expected: info.key_bytes, actual: len };
                assert_eq!(info.check_key(&key), Err(refused));
                assert_eq!(info.expand(&key).err(), Some(refused));
            }
        }
    }

    #[test]
    fn equal_halves_are_refused_for_xts_alone() {
        for info in &MODES {
            let mut key = vec![0x5a; info.key_bytes];
            let refused = info.name.ends_with("XTS").then_some(KeyError::EqualHalves);
            assert_eq!(info.check_key(&key).err(), refused, "{}", info.name);
            assert_eq!(info.expand(&key).err(), refused, "{}", info.name);
            // One bit of difference, at the far end, is enough.
            *key.last_mut().unwrap() ^= 1;
            assert_eq!(info.check_key(&key), Ok(()));
        }
    }

    #[test]
    fn debug_of_a_cipher_shows_no_key() {
        for info in &MODES {
            let key: Vec<u8> = (0xb0..).take(info.key_bytes).collect();
            let shown = format!("{:?}", info.expand(&key).unwrap());
            assert!(shown.len() < 80, "{shown}");
            assert!(!shown.contains("176") && !shown.to_lowercase().contains("b0"), "{shown}");
        }
    }
}
