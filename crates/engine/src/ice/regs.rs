//! The register map: names as the specifications and Linux's driver spell them, and nothing else.
//!
//! ```text
//!   0x0000  CONTROL             bit 0 legacy mode (HWKM v2)
//!   0x0008  VERSION             major, minor, step
//!   0x0010  FUSE_SETTING        any of bits 0 to 2 blown: unusable
//!   0x0070  BIST_STATUS         bits 31:28 while the power-on self test runs
//!   0x1000  ADVANCED_CONTROL    low power and optimisation sequences
//!   0x4040  CRYPTOCFG, + 0x80 per keyslot:  | data unit mask | capability index | reserved | CFGE, bit 7 |
//!   0x8000  HWKM slave:  +0x1000 KM_CTL, +0x1004 KM_STATUS, +0x2008 IRQ_STATUS, +0x5000.. bank access
//! ```
//!
//! Sources, by the names used below:
//! - `ice.c`: Linux `drivers/soc/qcom/ice.c` (0eaed89c18ae).
//! - UFSHCI: JESD223, "crypto capability" and "crypto configuration" (Linux `include/ufs/ufshci.h`).
//! - `ice/*`, `hwkm*`: OP-TEE `core/drivers/crypto/qcom`.

use super::HwkmVersion;

/// A register of the controller, by its byte offset.
pub(crate) type Offset = u32;

// ice.c, "QCOM ICE registers".
pub(crate) const ICE_REG_CONTROL: Offset = 0x0000;
pub(crate) const ICE_LEGACY_MODE_ENABLED: u32 = 1 << 0;
pub(crate) const ICE_REG_VERSION: Offset = 0x0008;
pub(crate) const ICE_REG_FUSE_SETTING: Offset = 0x0010;
pub(crate) const ICE_FUSE_SETTING_MASK: u32 = 1 << 0;
pub(crate) const ICE_FORCE_HW_KEY0_SETTING_MASK: u32 = 1 << 1;
pub(crate) const ICE_FORCE_HW_KEY1_SETTING_MASK: u32 = 1 << 2;
pub(crate) const ICE_REG_BIST_STATUS: Offset = 0x0070;
pub(crate) const ICE_BIST_STATUS_MASK: u32 = 0xf000_0000;
pub(crate) const ICE_REG_ADVANCED_CONTROL: Offset = 0x1000;
/// The "low power mode sequence" of ice.c.
pub(crate) const ICE_LOW_POWER_MODE: u32 = 0x7000;
/// The "ICE optimizations enable sequence" of ice.c.
pub(crate) const ICE_OPTIMIZATION: u32 = 0x0d80_7100;
pub(crate) const ICE_REG_CRYPTOCFG_BASE: Offset = 0x4040;
pub(crate) const ICE_REG_CRYPTOCFG_SIZE: Offset = 0x80;

// ice.c, "QCOM ICE HWKM (Hardware Key Manager) registers".
pub(crate) const HWKM_OFFSET: Offset = 0x8000;
pub(crate) const ICE_REG_HWKM_TZ_KM_CTL: Offset = HWKM_OFFSET + 0x1000;
pub(crate) const ICE_HWKM_DISABLE_CRC_CHECKS_VAL: u32 = (1 << 1) | (1 << 2);
/// HWKM v1 keeps the legacy mode bit in its own block.
pub(crate) const ICE_HWKM_ICE_LEGACY_MODE_ENABLED: u32 = 1 << 5;
pub(crate) const ICE_REG_HWKM_TZ_KM_STATUS: Offset = HWKM_OFFSET + 0x1004;
pub(crate) const ICE_HWKM_KT_CLEAR_DONE: u32 = 1 << 0;
pub(crate) const ICE_HWKM_BOOT_CMD_LIST0_DONE: u32 = 1 << 1;
pub(crate) const ICE_HWKM_BOOT_CMD_LIST1_DONE: u32 = 1 << 2;
pub(crate) const ICE_REG_HWKM_BANK0_BANKN_IRQ_STATUS: Offset = HWKM_OFFSET + 0x2008;
pub(crate) const ICE_HWKM_RSP_FIFO_CLEAR_VAL: u32 = 1 << 3;
/// `BBAC_0` to `BBAC_4`: which keyslots of the HWKM slave its bank may reach.
pub(crate) const ICE_REG_HWKM_BANK0_BBAC: [Offset; 5] = [
    HWKM_OFFSET + 0x5000,
    HWKM_OFFSET + 0x5004,
    HWKM_OFFSET + 0x5008,
    HWKM_OFFSET + 0x500c,
    HWKM_OFFSET + 0x5010,
];

/// The built-in self test of the HWKM's ciphers is done and passed.
pub(crate) const fn ice_hwkm_crypto_bist_done(version: HwkmVersion) -> u32 {
    match version {
        HwkmVersion::V1 => 1 << 14,
        HwkmVersion::V2 => 1 << 7,
    }
}

/// The built-in self test of the HWKM itself is done and passed.
pub(crate) const fn ice_hwkm_bist_done(version: HwkmVersion) -> u32 {
    match version {
        HwkmVersion::V1 => 1 << 16,
        HwkmVersion::V2 => 1 << 9,
    }
}

/// What `KM_STATUS` has to equal, to the bit.
pub(crate) const fn km_status_good(version: HwkmVersion) -> u32 {
    ICE_HWKM_KT_CLEAR_DONE
        | ICE_HWKM_BOOT_CMD_LIST0_DONE
        | ICE_HWKM_BOOT_CMD_LIST1_DONE
        | ice_hwkm_crypto_bist_done(version)
        | ice_hwkm_bist_done(version)
}

/// Where the `CRYPTOCFG` of a keyslot is. With more than 126 keyslots they lie among the HWKM's registers, none of which
/// has an offset that leaves 0x40 when divided by 0x80.
pub(crate) const fn cryptocfg(slot: u32) -> Offset {
    ICE_REG_CRYPTOCFG_BASE + ICE_REG_CRYPTOCFG_SIZE * slot
}

/// The keyslot whose `CRYPTOCFG` is at `offset`.
pub(crate) const fn cryptocfg_slot(offset: Offset) -> Option<u32> {
    match offset.checked_sub(ICE_REG_CRYPTOCFG_BASE) {
        Some(past) if past.is_multiple_of(ICE_REG_CRYPTOCFG_SIZE) => Some(past / ICE_REG_CRYPTOCFG_SIZE),
        _ => None,
    }
}

/// The version register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) major: u8,
    pub(crate) minor: u8,
    pub(crate) step: u16,
}

impl Version {
    pub(crate) const fn new(major: u8, minor: u8, step: u16) -> Self {
        Self { major, minor, step }
    }

    pub(crate) const fn to_register(self) -> u32 {
        let [step_low, step_high] = self.step.to_le_bytes();
        u32::from_le_bytes([step_low, step_high, self.minor, self.major])
    }

    pub(crate) const fn from_register(value: u32) -> Self {
        let [step_low, step_high, minor, major] = value.to_le_bytes();
        Self { major, minor, step: u16::from_le_bytes([step_low, step_high]) }
    }
}

/// `union crypto_cfg` of ice.c: a little-endian word of four bytes. UFSHCI has the same fields in doubleword 16 of an
/// entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CryptoCfg {
    /// Data unit size in 512s, one bit set.
    pub(crate) dusize: u8,
    /// Which crypto capability.
    pub(crate) capidx: u8,
    pub(crate) reserved: u8,
    /// Bit 7: the keyslot is on.
    pub(crate) cfge: u8,
}

impl CryptoCfg {
    /// `QCOM_ICE_HWKM_CFG_ENABLE_VAL`.
    pub(crate) const CFG_ENABLE_VAL: u8 = 1 << 7;
    pub(crate) const OFF: Self = Self { dusize: 0, capidx: 0, reserved: 0, cfge: 0 };

    pub(crate) const fn to_register(self) -> u32 {
        u32::from_le_bytes([self.dusize, self.capidx, self.reserved, self.cfge])
    }

    pub(crate) const fn from_register(value: u32) -> Self {
        let [dusize, capidx, reserved, cfge] = value.to_le_bytes();
        Self { dusize, capidx, reserved, cfge }
    }

    pub(crate) const fn is_enabled(self) -> bool {
        self.cfge & Self::CFG_ENABLE_VAL != 0
    }

    /// Length of a data unit in bytes, if the mask names exactly one.
    pub(crate) fn unit_bytes(self) -> Option<usize> {
        self.dusize.is_power_of_two().then(|| usize::from(self.dusize) * 512)
    }
}

/// The capability index of AES-256-XTS: `QCOM_SCM_ICE_CIPHER_AES_256_XTS` of Linux, XTS256 of OP-TEE's ICE table (whose
/// others are XTS128 0, CBC128 1, ECB128 2, CBC256 4, ECB256 5; none of them is served).
pub(crate) const CIPHER_AES_256_XTS: u8 = 3;

/// UFSHCI 5.2.1 `CAP`, bit 28 (CS): the controller encrypts.
pub(crate) const UFS_CAP_CRYPTO_SUPPORT: u32 = 1 << 28;
/// UFSHCI: `x-CRYPTOCAP.ALGID` of AES-XTS.
pub(crate) const UFS_CRYPTO_ALG_AES_XTS: u8 = 0;
/// UFSHCI: `x-CRYPTOCAP.KS` of 256 bits.
pub(crate) const UFS_CRYPTO_KEY_SIZE_256: u8 = 3;

/// `CCAP`: how many capabilities and configurations there are, and where (UFSHCI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UfsCcap {
    /// Number of crypto capabilities.
    pub(crate) num_crypto_cap: u8,
    /// Number of crypto configurations **minus one** (CFGC): 1 to 256 keyslots.
    pub(crate) config_count: u8,
    /// Where the array is, in 256s.
    pub(crate) config_array_ptr: u8,
}

impl UfsCcap {
    pub(crate) const fn to_register(self) -> u32 {
        u32::from_le_bytes([self.num_crypto_cap, self.config_count, 0, self.config_array_ptr])
    }

    pub(crate) const fn from_register(value: u32) -> Self {
        let [num_crypto_cap, config_count, _, config_array_ptr] = value.to_le_bytes();
        Self { num_crypto_cap, config_count, config_array_ptr }
    }

    pub(crate) fn keyslots(self) -> u32 {
        u32::from(self.config_count) + 1
    }
}

/// `x-CRYPTOCAP`: one capability (UFSHCI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UfsCryptoCap {
    pub(crate) algorithm_id: u8,
    /// Data unit sizes, in 512s.
    pub(crate) sdus_mask: u8,
    pub(crate) key_size: u8,
}

impl UfsCryptoCap {
    pub(crate) const fn to_register(self) -> u32 {
        u32::from_le_bytes([self.algorithm_id, self.sdus_mask, self.key_size, 0])
    }

    pub(crate) const fn from_register(value: u32) -> Self {
        let [algorithm_id, sdus_mask, key_size, _] = value.to_le_bytes();
        Self { algorithm_id, sdus_mask, key_size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cryptocfg_is_the_little_endian_word_of_the_driver() {
        let cfg = CryptoCfg { dusize: 8, capidx: 3, reserved: 0, cfge: 0x80 };
        assert_eq!(cfg.to_register(), 0x8000_0308);
        assert_eq!(cfg.unit_bytes(), Some(4096));
        assert!(cfg.is_enabled() && !CryptoCfg::OFF.is_enabled());
        assert_eq!(CryptoCfg { dusize: 128, ..cfg }.unit_bytes(), Some(65_536));
        for not_one in [0, 3, 0xff] {
            assert_eq!(CryptoCfg { dusize: not_one, ..cfg }.unit_bytes(), None);
        }
    }

    #[test]
    fn keyslots_registers_lie_apart_from_all_others() {
        assert_eq!((cryptocfg(0), cryptocfg(31)), (0x4040, 0x4fc0));
        let others = [
            ICE_REG_CONTROL,
            ICE_REG_VERSION,
            ICE_REG_FUSE_SETTING,
            ICE_REG_BIST_STATUS,
            ICE_REG_ADVANCED_CONTROL,
            ICE_REG_HWKM_TZ_KM_CTL,
            ICE_REG_HWKM_TZ_KM_STATUS,
            ICE_REG_HWKM_BANK0_BANKN_IRQ_STATUS,
        ];
        for other in others.into_iter().chain(ICE_REG_HWKM_BANK0_BBAC) {
            assert!((0..256).all(|slot| cryptocfg(slot) != other));
            assert_eq!(cryptocfg_slot(other), None, "{other:#x}");
        }
        assert!((0..256).all(|slot| cryptocfg_slot(cryptocfg(slot)) == Some(slot)));
    }

    #[test]
    fn status_words_are_those_of_the_driver() {
        assert_eq!(km_status_good(HwkmVersion::V1), 0x1_4007);
        assert_eq!(km_status_good(HwkmVersion::V2), 0x287);
        assert_eq!(Version::new(3, 2, 1).to_register(), 0x0302_0001);
    }

    #[test]
    fn a_controller_of_32_keyslots_counts_31_in_its_capability_word() {
        let ccap = UfsCcap { num_crypto_cap: 1, config_count: 31, config_array_ptr: 4 };
        assert_eq!(ccap.to_register(), 0x0400_1f01);
        assert_eq!(ccap.keyslots(), 32);
        let cap = UfsCryptoCap { algorithm_id: 0, sdus_mask: 0xff, key_size: 3 };
        assert_eq!(cap.to_register(), 0x0003_ff00);
    }

    proptest! {
        #[test]
        fn every_word_survives_its_fields(word in any::<u32>()) {
            prop_assert_eq!(CryptoCfg::from_register(word).to_register(), word);
            prop_assert_eq!(Version::from_register(word).to_register(), word);
            prop_assert_eq!(UfsCcap::from_register(word & 0xff00_ffff).to_register(), word & 0xff00_ffff);
            prop_assert_eq!(UfsCryptoCap::from_register(word & 0xff_ffff).to_register(), word & 0xff_ffff);
        }
    }
}
