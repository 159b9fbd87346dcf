//! The driver: what Linux does with the controller (`drivers/soc/qcom/ice.c`, `drivers/ufs/core/ufshcd-crypto.c`).
//!
//! ```text
//!   probe    version, fuses, capability words, self tests, secure world calls   -> what may be advertised
//!   enable   low power, optimisations, key manager on if it is to be used, self test
//!   program  CFGE off -> secure world sets the key -> CFGE on
//!   evict    CFGE off -> secure world invalidates
//! ```
//!
//! Where it differs from Linux, on purpose:
//! - Both self tests are read at probe. Linux reads the key manager's later and can only log that it failed, since its
//!   capabilities are out by then.
//! - CFGE is cleared before raw keys and evictions, too, so that whatever fails leaves the keyslot off.
//! - A wrapped key that the secure world refuses while it is programmed is `EBADMSG`, as at prepare and derive, so that it is
//!   not tried again. Linux passes `EINVAL` on.
//! - A wrapped key has to have the length of a blob. The secure world tells raw from wrapped by length alone; where it takes
//!   both, 64 bytes that were given as a wrapped key would be used as a raw one.
//! - The keyslot numbers of raw keys are translated as those of wrapped ones once the key manager is on, which in Linux
//!   never happens together.

use super::HwkmVersion;
use super::blob::blob_bytes;
use super::device::Controller;
use super::regs::{self, CryptoCfg, UfsCcap, UfsCryptoCap, Version};
use super::scm::{self, SVC_ES, ScmCall, ScmError, ScmReply, SecureWorld};
use inlinecrypt_cipher::Mode;
use inlinecrypt_core::key::{Key, KeyForm, WRAPPED_KEY_BYTES_MAX};
use std::fmt;
use zeroize::Zeroizing;

/// `BLK_CRYPTO_SW_SECRET_SIZE`.
const SECRET_BYTES: usize = 32;

/// How often Linux looks at the self test: every 50 us for 5 ms.
const BIST_POLLS: u32 = 5000 / 50;

/// An errno that the driver returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errno {
    Einval,
    Eio,
    Enodev,
    Ebadmsg,
    Etimedout,
    Eopnotsupp,
}

/// How the driver fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DriverError {
    pub(crate) errno: Errno,
    pub(crate) why: &'static str,
}

impl DriverError {
    const fn new(errno: Errno, why: &'static str) -> Self {
        Self { errno, why }
    }
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.why, self.errno)
    }
}

impl std::error::Error for DriverError {}

/// What probing found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Probed {
    pub(crate) hwkm_version: Option<HwkmVersion>,
    /// The key manager is there, its self test passed, and the secure world has all calls for wrapped keys.
    pub(crate) wrapped_keys: bool,
    pub(crate) keyslots: u32,
    /// Sizes of data units of AES-256-XTS, in 512s.
    pub(crate) unit_mask: u8,
}

/// The driver's state.
#[derive(Debug)]
pub(crate) struct Driver {
    probed: Probed,
    use_hwkm: bool,
    hwkm_init_complete: bool,
}

impl Driver {
    /// Finds out what is there, before anything is advertised. Changes nothing.
    pub(crate) fn probe(controller: &Controller, secure: &SecureWorld) -> Result<Self, DriverError> {
        let version = Version::from_register(controller.readl(regs::ICE_REG_VERSION));
        let Version { major, minor, step } = version;
        if major != 3 && major != 4 {
            return Err(DriverError::new(Errno::Enodev, "this version of ICE is not supported"));
        }
        let hwkm_version = if major > 3 || minor >= 3 || (minor == 2 && step >= 1) {
            Some(HwkmVersion::V2)
        } else if minor == 2 {
            Some(HwkmVersion::V1)
        } else {
            None
        };
        let fuses = regs::ICE_FUSE_SETTING_MASK
            | regs::ICE_FORCE_HW_KEY0_SETTING_MASK
            | regs::ICE_FORCE_HW_KEY1_SETTING_MASK;
        if controller.readl(regs::ICE_REG_FUSE_SETTING) & fuses != 0 {
            return Err(DriverError::new(Errno::Enodev, "fuses are blown, ICE is unusable"));
        }
        let (keyslots, unit_mask) = Self::capabilities(controller)?;
        Self::wait_bist(controller)?;
        let calls = [
            scm::ES_DERIVE_SW_SECRET,
            scm::ES_GENERATE_ICE_KEY,
            scm::ES_PREPARE_ICE_KEY,
            scm::ES_IMPORT_ICE_KEY,
        ];
        let wrapped_keys = calls.into_iter().all(|call| secure.is_call_available(SVC_ES, call))
            && hwkm_version.is_some_and(|version| {
                controller.readl(regs::ICE_REG_HWKM_TZ_KM_STATUS) == regs::km_status_good(version)
            });
        let probed = Probed { hwkm_version, wrapped_keys, keyslots, unit_mask };
        Ok(Self { probed, use_hwkm: false, hwkm_init_complete: false })
    }

    /// What the storage controller's capability words offer (`ufshcd_hba_init_crypto_capabilities`).
    fn capabilities(controller: &Controller) -> Result<(u32, u8), DriverError> {
        let [cap, ccap, cryptocap] = controller.capability_words();
        let cryptocap = UfsCryptoCap::from_register(cryptocap);
        let is_xts = cryptocap.algorithm_id == regs::UFS_CRYPTO_ALG_AES_XTS
            && cryptocap.key_size == regs::UFS_CRYPTO_KEY_SIZE_256;
        if cap & regs::UFS_CAP_CRYPTO_SUPPORT == 0 || !is_xts {
            return Err(DriverError::new(Errno::Enodev, "the storage controller does not do AES-256-XTS"));
        }
        Ok((UfsCcap::from_register(ccap).keyslots(), cryptocap.sdus_mask))
    }

    pub(crate) const fn probed(&self) -> Probed {
        self.probed
    }

    /// Whether the key manager is the one that takes keys, as decided.
    #[cfg(test)]
    pub(crate) const fn uses_hwkm(&self) -> bool {
        self.use_hwkm
    }

    /// Decides whether the key manager takes the keys. Takes effect when the engine is next enabled.
    pub(crate) const fn decide(&mut self, use_hwkm: bool) {
        self.use_hwkm = use_hwkm;
    }

    /// `qcom_ice_enable`: after power-on or reset, and after [`decide`](Self::decide).
    pub(crate) fn enable(&mut self, controller: &Controller) -> Result<(), DriverError> {
        let advanced = controller.readl(regs::ICE_REG_ADVANCED_CONTROL) | regs::ICE_LOW_POWER_MODE;
        controller.writel(advanced, regs::ICE_REG_ADVANCED_CONTROL);
        let advanced = controller.readl(regs::ICE_REG_ADVANCED_CONTROL) | regs::ICE_OPTIMIZATION;
        controller.writel(advanced, regs::ICE_REG_ADVANCED_CONTROL);
        self.resume(controller)
    }

    /// `qcom_ice_resume`, after the clocks are on: the key manager is initialised again.
    pub(crate) fn resume(&mut self, controller: &Controller) -> Result<(), DriverError> {
        self.hwkm_init(controller);
        Self::wait_bist(controller)?;
        if let Some(version) = self.probed.hwkm_version.filter(|_| self.use_hwkm)
            && controller.readl(regs::ICE_REG_HWKM_TZ_KM_STATUS) != regs::km_status_good(version)
        {
            return Err(DriverError::new(Errno::Eio, "the self test of the HWKM failed"));
        }
        Ok(())
    }

    /// `qcom_ice_suspend`.
    pub(crate) const fn suspend(&mut self) {
        self.hwkm_init_complete = false;
    }

    fn hwkm_init(&mut self, controller: &Controller) {
        let Some(version) = self.probed.hwkm_version.filter(|_| self.use_hwkm) else { return };
        let (register, legacy) = match version {
            HwkmVersion::V1 => (regs::ICE_REG_HWKM_TZ_KM_CTL, regs::ICE_HWKM_ICE_LEGACY_MODE_ENABLED),
            HwkmVersion::V2 => (regs::ICE_REG_CONTROL, regs::ICE_LEGACY_MODE_ENABLED),
        };
        controller.writel(controller.readl(register) & !legacy, register);
        controller.writel(regs::ICE_HWKM_DISABLE_CRC_CHECKS_VAL, regs::ICE_REG_HWKM_TZ_KM_CTL);
        for bbac in regs::ICE_REG_HWKM_BANK0_BBAC {
            controller.writel(u32::MAX, bbac);
        }
        controller.writel(regs::ICE_HWKM_RSP_FIFO_CLEAR_VAL, regs::ICE_REG_HWKM_BANK0_BANKN_IRQ_STATUS);
        self.hwkm_init_complete = true;
    }

    /// Waits until the self test is over. The model ends after so many looks, or never; nobody sleeps between them.
    fn wait_bist(controller: &Controller) -> Result<(), DriverError> {
        let is_over = |_| controller.readl(regs::ICE_REG_BIST_STATUS) & regs::ICE_BIST_STATUS_MASK == 0;
        if (0..BIST_POLLS).any(is_over) {
            Ok(())
        } else {
            Err(DriverError::new(Errno::Etimedout, "the power-on self test of ICE does not end"))
        }
    }

    /// The number that the secure world knows a keyslot by.
    const fn translate(&self, slot: u32) -> u32 {
        match self.probed.hwkm_version {
            Some(HwkmVersion::V2) if self.hwkm_init_complete => slot * 2,
            _ => slot,
        }
    }

    /// `qcom_ice_program_key`. `between` runs while the keyslot is off.
    pub(crate) fn program(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
        slot: u32,
        key: &Key,
        between: impl FnOnce(),
    ) -> Result<(), DriverError> {
        controller.writel(CryptoCfg::OFF.to_register(), regs::cryptocfg(slot));
        let config = key.config();
        if config.mode() != Mode::Aes256Xts {
            return Err(DriverError::new(Errno::Einval, "unsupported crypto mode"));
        }
        let data_unit_512s = config.data_unit_size().bytes() / 512;
        let index = self.translate(slot);
        let cipher = regs::CIPHER_AES_256_XTS;
        match key.form() {
            KeyForm::Wrapped(blob) => {
                if !self.use_hwkm {
                    return Err(DriverError::new(Errno::Einval, "got a wrapped key when not using HWKM"));
                }
                if !self.hwkm_init_complete {
                    return Err(DriverError::new(Errno::Einval, "HWKM is not yet initialized"));
                }
                let key = blob.as_bytes();
                if self.probed.hwkm_version.is_none_or(|version| key.len() != blob_bytes(version)) {
                    return Err(bad_blob());
                }
                between();
                let call = ScmCall::ConfigSetIceKey { index, key, cipher, data_unit_512s };
                secure.call(controller, &call).map_err(|why| match why {
                    // All other arguments are good.
                    ScmError::Einval => bad_blob(),
                    why => failed(why),
                })?;
                let dusize = u8::try_from(data_unit_512s)
                    .map_err(|_large| DriverError::new(Errno::Einval, "unsupported data unit size"))?;
                let cfg = CryptoCfg { dusize, capidx: cipher, reserved: 0, cfge: CryptoCfg::CFG_ENABLE_VAL };
                controller.writel(cfg.to_register(), regs::cryptocfg(slot));
            }
            KeyForm::Deposited(_) => {
                return Err(DriverError::new(Errno::Einval, "the raw key is kept by another engine"));
            }
            KeyForm::Raw(raw) => {
                if self.use_hwkm && !secure.takes_both() {
                    return Err(DriverError::new(Errno::Einval, "got a raw key when using HWKM"));
                }
                between();
                // The call wants big-endian words.
                let mut key = Zeroizing::new(raw.expose().to_vec());
                for word in key.chunks_exact_mut(4) {
                    word.reverse();
                }
                let call = ScmCall::ConfigSetIceKey { index, key: &key, cipher, data_unit_512s };
                secure.call(controller, &call).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// `qcom_ice_evict_key`.
    pub(crate) fn evict(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
        slot: u32,
    ) -> Result<(), DriverError> {
        controller.writel(CryptoCfg::OFF.to_register(), regs::cryptocfg(slot));
        let call = ScmCall::InvalidateIceKey { index: self.translate(slot) };
        secure.call(controller, &call).map(|_done| ()).map_err(failed)
    }

    /// `qcom_ice_generate_key`.
    pub(crate) fn generate(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
    ) -> Result<Vec<u8>, DriverError> {
        self.blob_of(controller, secure, &ScmCall::GenerateIceKey { room: self.room() })
    }

    fn room(&self) -> usize {
        self.probed.hwkm_version.map_or(0, blob_bytes).min(WRAPPED_KEY_BYTES_MAX)
    }

    fn blob_of(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
        call: &ScmCall<'_>,
    ) -> Result<Vec<u8>, DriverError> {
        match secure.call(controller, call).map_err(failed)? {
            ScmReply::Blob(blob) => Ok(blob),
            _ => Err(failed(ScmError::Eio)),
        }
    }

    /// `qcom_ice_import_key`.
    pub(crate) fn import(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
        raw: &[u8],
    ) -> Result<Vec<u8>, DriverError> {
        self.blob_of(controller, secure, &ScmCall::ImportIceKey { raw, room: self.room() })
    }

    /// `qcom_ice_prepare_key`: whatever is wrong with the blob is `EBADMSG`.
    pub(crate) fn prepare(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
        long_term: &[u8],
    ) -> Result<Vec<u8>, DriverError> {
        let call = ScmCall::PrepareIceKey { long_term, room: self.room() };
        self.blob_of(controller, secure, &call).map_err(probably_bad_blob)
    }

    /// `qcom_ice_derive_sw_secret`: likewise.
    pub(crate) fn derive_software_secret(
        &self,
        controller: &Controller,
        secure: &mut SecureWorld,
        ephemeral: &[u8],
    ) -> Result<Zeroizing<[u8; SECRET_BYTES]>, DriverError> {
        let call = ScmCall::DeriveSwSecret { ephemeral, room: SECRET_BYTES };
        match secure.call(controller, &call).map_err(failed).map_err(probably_bad_blob)? {
            ScmReply::Secret(secret) => Ok(secret),
            _ => Err(failed(ScmError::Eio)),
        }
    }
}

const fn bad_blob() -> DriverError {
    DriverError::new(Errno::Ebadmsg, "the wrapped key is probably invalid")
}

/// "-EIO and -EINVAL: probably invalid key", says ice.c of derive and prepare.
fn probably_bad_blob(why: DriverError) -> DriverError {
    match why.errno {
        Errno::Eio | Errno::Einval => bad_blob(),
        _ => why,
    }
}

const fn failed(why: ScmError) -> DriverError {
    match why {
        ScmError::Eio => DriverError::new(Errno::Eio, "the secure world reports a failure of the hardware"),
        ScmError::Einval => DriverError::new(Errno::Einval, "the secure world refuses an argument"),
        ScmError::Eopnotsupp => DriverError::new(Errno::Eopnotsupp, "the secure world has no such call"),
    }
}
