//! Capabilities: what an engine can do, and whether that suffices for a config.

use crate::config::{CryptoConfig, DataUnitSize, Hardware, KeyType, Mode};
use std::fmt;

/// Most bytes of a DUN that any mode takes (`BLK_CRYPTO_MAX_IV_SIZE`).
pub const DUN_BYTES_MAX: u8 = 32;

/// A set of data unit sizes. As in Linux a set bit's *value* is the size in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitMask(u32);

impl UnitMask {
    /// No size at all: the mode is not supported.
    pub const NONE: Self = Self(0);
    /// Every power of two from 512 bytes to 64 KiB.
    pub const SERVED: Self = Self(0x1fe00);

    /// The set whose bits' values are sizes in bytes.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits, as sysfs shows them.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether `size` is in the set.
    #[must_use]
    pub const fn contains(self, size: DataUnitSize) -> bool {
        self.0 & size.bytes() != 0
    }

    /// Whether the set is empty.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// A set of key types, with Linux's bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyTypes(u32);

impl KeyTypes {
    /// Neither.
    pub const NONE: Self = Self(0);
    /// Raw keys only.
    pub const RAW: Self = Self(1);
    /// Hardware-wrapped keys only.
    pub const WRAPPED: Self = Self(2);
    /// Both.
    pub const BOTH: Self = Self(3);

    /// Whether `key_type` is in the set.
    #[must_use]
    pub const fn contains(self, key_type: KeyType) -> bool {
        self.0 & key_type.bit() != 0
    }
}

/// What an engine can do: the first half of a crypto profile (`struct blk_crypto_profile`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Data unit sizes per mode, indexed by [`Mode::index`].
    pub units: [UnitMask; Mode::ALL.len()],
    /// Most bytes of a DUN: 0 to 32.
    pub dun_bytes_max: u8,
    /// Forms of key.
    pub key_types: KeyTypes,
    /// How many keys the engine holds at once. 0: it takes the key with every request.
    pub keyslots: u32,
}

/// Why an engine cannot serve a config: the first rule that fails, in the order in which Linux looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// The key's owner forbids hardware.
    HardwareForbidden,
    /// The mode is not offered, or not with this data unit size.
    ModeOrUnit {
        /// Mode asked for.
        mode: Mode,
        /// Data unit size asked for.
        asked: DataUnitSize,
        /// Data unit sizes that the engine offers for the mode.
        offered: UnitMask,
    },
    /// The engine's DUN is too short.
    DunBytes {
        /// Bytes asked for.
        asked: u8,
        /// Bytes that the engine has.
        max: u8,
    },
    /// The engine does not take keys of this form.
    KeyType(KeyType),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HardwareForbidden => f.write_str("the key may only be served by the software fallback"),
            Self::ModeOrUnit { mode, offered, .. } if offered.is_empty() => {
                write!(f, "the engine does not do {mode}")
            }
            Self::ModeOrUnit { mode, asked, offered } => {
                write!(f, "the engine does not do {mode} with data units of {asked} bytes (it offers ")?;
                let sizes = (0..32).filter(|bit| offered.bits() & (1 << bit) != 0);
                for (n, bit) in sizes.enumerate() {
                    write!(f, "{}{}", if n == 0 { "" } else { ", " }, 1u64 << bit)?;
                }
                f.write_str(")")
            }
            Self::DunBytes { asked, max } => {
                write!(f, "the key needs data unit numbers of {asked} bytes, the engine has {max}")
            }
            Self::KeyType(key_type) => write!(f, "the engine does not take {key_type} keys"),
        }
    }
}

impl std::error::Error for Unsupported {}

impl Capabilities {
    /// Nothing at all.
    pub const NONE: Self = Self {
        units: [UnitMask::NONE; Mode::ALL.len()],
        dun_bytes_max: 0,
        key_types: KeyTypes::NONE,
        keyslots: 0,
    };

    /// Everything there is, without keyslots: what a stack of no devices would offer.
    pub const ALL: Self = Self {
        units: [UnitMask(u32::MAX); Mode::ALL.len()],
        dun_bytes_max: DUN_BYTES_MAX,
        key_types: KeyTypes::BOTH,
        keyslots: 0,
    };

    /// Whether the engine can serve `config` by itself (`block/blk-crypto.c`,
    /// `blk_crypto_config_supported_natively`).
    ///
    /// # Errors
    ///
    /// The first rule that fails.
    pub fn check(&self, config: &CryptoConfig) -> Result<(), Unsupported> {
        if config.hardware == Hardware::Forbidden {
            return Err(Unsupported::HardwareForbidden);
        }
        let offered = self.units[config.mode.index()];
        if !offered.contains(config.data_unit_size) {
            return Err(Unsupported::ModeOrUnit { mode: config.mode, asked: config.data_unit_size, offered });
        }
        if self.dun_bytes_max < config.dun_bytes {
            return Err(Unsupported::DunBytes { asked: config.dun_bytes, max: self.dun_bytes_max });
        }
        if !self.key_types.contains(config.key_type) {
            return Err(Unsupported::KeyType(config.key_type));
        }
        Ok(())
    }

    /// What both can do; `other` being absent clears everything (`blk_crypto_intersect_capabilities`). The keyslots
    /// of `self` stay: a stacked device has its own or none.
    #[must_use]
    pub fn intersect(&self, other: Option<&Self>) -> Self {
        let Some(other) = other else {
            return Self { keyslots: self.keyslots, ..Self::NONE };
        };
        let Self { units, dun_bytes_max, key_types, keyslots: _ } = other;
        let mut both = self.clone();
        for (mine, theirs) in both.units.iter_mut().zip(units) {
            mine.0 &= theirs.0;
        }
        both.dun_bytes_max = both.dun_bytes_max.min(*dun_bytes_max);
        both.key_types.0 &= key_types.0;
        both
    }

    /// Whether all that `other` can do, `self` can (`blk_crypto_has_capabilities`). Keyslots do not count.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        let Self { units, dun_bytes_max, key_types, keyslots: _ } = other;
        self.units.iter().zip(units).all(|(mine, theirs)| theirs.0 & !mine.0 == 0)
            && self.dun_bytes_max >= *dun_bytes_max
            && key_types.0 & !self.key_types.0 == 0
    }
}
