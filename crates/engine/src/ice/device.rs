//! The controller: what is on the chip's side of the register map.
//!
//! ```text
//!   driver --- readl, writel ----> registers, CRYPTOCFG of each keyslot
//!   secure world --- load_key ---> key registers (nobody reads them) --.
//!   requests --- crypt ----------> keyslot on? ---------------------> cipher
//! ```
//!
//! - A keyslot encrypts if its `CRYPTOCFG` has CFGE set and there is a whole key behind it. What the data unit is, it
//!   alone says.
//! - Reset and loss of power put every register to its default (legacy mode, all keyslots off) and lose all keys.
//! - DUNs have 8 bytes (UFS) or 4 (eMMC). Real hardware cuts off what is above; this model refuses such a request before it
//!   touches anything, since what would come out is never what was meant.

use super::faults::Dice;
use super::regs::{self, CryptoCfg, Offset, UfsCcap, UfsCryptoCap, Version};
use super::{HwkmVersion, IceSpec};
use inlinecrypt_cipher::{Dun, Mode, UnitCipher};
use inlinecrypt_core::engine::Direction;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use zeroize::Zeroizing;

/// Words of a key: AES key, then what the ICE table calls salt, the tweak key; each little-endian.
pub(crate) const KEY_WORDS: usize = 16;

/// Why a request was not carried out. It was not touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CryptFault {
    /// There is no such keyslot.
    NoSuchSlot,
    /// CFGE is clear, or there is no key.
    Off,
    /// The configuration names no cipher or no data unit that there is.
    BadConfig(CryptoCfg),
    /// Not whole data units.
    Misaligned { unit_bytes: usize },
    /// A DUN has more bytes than the engine.
    DunTooLong,
}

/// Registers that are plain storage.
#[derive(Debug)]
struct Registers {
    control: u32,
    advanced_control: u32,
    km_ctl: u32,
    irq_status: u32,
    bbac: [u32; 5],
    /// Reads of `BIST_STATUS` that still answer "running".
    bist_polls: u32,
    powered: bool,
}

/// One keyslot: its configuration, and key registers that only the secure world writes.
struct Slot {
    cfg: CryptoCfg,
    words: Zeroizing<[u32; KEY_WORDS]>,
    /// How many of the words were written. A whole key has all.
    words_written: usize,
    /// Made when the keyslot is switched on; shared by the requests under way. It stays in its box, so that no copy of the
    /// key is left behind by moving it.
    cipher: Option<Arc<Box<dyn UnitCipher>>>,
}

impl Slot {
    fn empty() -> Self {
        Self { cfg: CryptoCfg::OFF, words: Zeroizing::new([0; KEY_WORDS]), words_written: 0, cipher: None }
    }
}

/// The controller.
pub(crate) struct Controller {
    version: Version,
    hwkm: Option<HwkmVersion>,
    dun_bytes: u8,
    unit_mask: u8,
    registers: Mutex<Registers>,
    slots: Box<[RwLock<Slot>]>,
    dice: Arc<Dice>,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Version { major, minor, step } = self.version;
        write!(f, "Controller(ICE {major}.{minor}.{step}, {} keyslots)", self.slots.len())
    }
}

impl Controller {
    pub(crate) fn new(spec: &IceSpec, dice: Arc<Dice>) -> Self {
        let controller = Self {
            version: spec.variant.version(),
            hwkm: spec.variant.hwkm(),
            dun_bytes: spec.dun_bytes,
            unit_mask: spec.unit_mask,
            registers: Mutex::new(Registers {
                control: 0,
                advanced_control: 0,
                km_ctl: 0,
                irq_status: 0,
                bbac: [0; 5],
                bist_polls: 0,
                powered: false,
            }),
            slots: (0..spec.keyslots).map(|_| RwLock::new(Slot::empty())).collect(),
            dice,
        };
        controller.power_on(bist_polls(controller.dice.faults.bist_fail));
        controller
    }

    /// Every register to its default, every key lost, and the self test starts. It ends after `bist_polls` looks at it.
    pub(crate) fn power_on(&self, bist_polls: u32) {
        self.lose_all();
        *self.registers() = Registers {
            // Each generation has its legacy mode bit in another place, and it is set.
            control: if self.hwkm == Some(HwkmVersion::V2) { regs::ICE_LEGACY_MODE_ENABLED } else { 0 },
            advanced_control: 0,
            km_ctl: if self.hwkm == Some(HwkmVersion::V1) {
                regs::ICE_HWKM_ICE_LEGACY_MODE_ENABLED
            } else {
                0
            },
            irq_status: 0,
            bbac: [0; 5],
            bist_polls,
            powered: true,
        };
    }

    /// Clocks off: registers read as nothing, keys are lost.
    pub(crate) fn power_off(&self) {
        self.power_on(0);
        self.registers().powered = false;
    }

    /// Whether keys come through the key manager.
    pub(crate) fn is_in_hwkm_mode(&self) -> bool {
        let registers = self.registers();
        match self.hwkm {
            None => false,
            Some(HwkmVersion::V1) => registers.km_ctl & regs::ICE_HWKM_ICE_LEGACY_MODE_ENABLED == 0,
            Some(HwkmVersion::V2) => registers.control & regs::ICE_LEGACY_MODE_ENABLED == 0,
        }
    }

    /// Whether the slave's bank may reach its slots.
    pub(crate) fn is_bank_open(&self) -> bool {
        self.registers().bbac == [u32::MAX; 5]
    }

    pub(crate) fn keyslots(&self) -> u32 {
        u32::try_from(self.slots.len()).expect("at most 256")
    }

    pub(crate) const fn dun_bytes(&self) -> u8 {
        self.dun_bytes
    }

    /// Whether the device does data units of this size, in 512s.
    pub(crate) const fn has_unit(&self, dusize: u8) -> bool {
        dusize.is_power_of_two() && self.unit_mask & dusize != 0
    }

    /// The storage controller's capability words: `CAP`, `CCAP` and the only `x-CRYPTOCAP` (UFSHCI; eMMC has the latter
    /// two).
    pub(crate) fn capability_words(&self) -> [u32; 3] {
        let config_count = u8::try_from(self.slots.len() - 1).expect("at most 256 keyslots");
        let ccap = UfsCcap { num_crypto_cap: 1, config_count, config_array_ptr: 0 };
        let cap = UfsCryptoCap {
            algorithm_id: regs::UFS_CRYPTO_ALG_AES_XTS,
            sdus_mask: self.unit_mask,
            key_size: regs::UFS_CRYPTO_KEY_SIZE_256,
        };
        [regs::UFS_CAP_CRYPTO_SUPPORT, ccap.to_register(), cap.to_register()]
    }

    /// Reads a register. What is not there, or has no power, reads as zero.
    pub(crate) fn readl(&self, offset: Offset) -> u32 {
        let mut registers = self.registers();
        if !registers.powered {
            return 0;
        }
        match offset {
            regs::ICE_REG_CONTROL => registers.control,
            regs::ICE_REG_VERSION => self.version.to_register(),
            regs::ICE_REG_FUSE_SETTING => {
                if self.dice.faults.fuse_blown {
                    regs::ICE_FUSE_SETTING_MASK
                } else {
                    0
                }
            }
            regs::ICE_REG_BIST_STATUS => {
                let running = registers.bist_polls > 0;
                registers.bist_polls = registers.bist_polls.saturating_sub(1);
                if running { regs::ICE_BIST_STATUS_MASK } else { 0 }
            }
            regs::ICE_REG_ADVANCED_CONTROL => registers.advanced_control,
            regs::ICE_REG_HWKM_TZ_KM_CTL => registers.km_ctl,
            regs::ICE_REG_HWKM_TZ_KM_STATUS => self.hwkm.map_or(0, |version| {
                let failed =
                    if self.dice.faults.hwkm_bist_fail { regs::ice_hwkm_bist_done(version) } else { 0 };
                regs::km_status_good(version) & !failed
            }),
            regs::ICE_REG_HWKM_BANK0_BANKN_IRQ_STATUS => registers.irq_status,
            _ => {
                if let Some(bank) = bank(offset) {
                    return registers.bbac[bank];
                }
                drop(registers);
                let slot = regs::cryptocfg_slot(offset).and_then(|slot| self.read_slot(slot));
                slot.map_or(0, |slot| slot.cfg.to_register())
            }
        }
    }

    /// Writes a register. What is not there, has no power, or is read-only ignores it.
    pub(crate) fn writel(&self, value: u32, offset: Offset) {
        let mut registers = self.registers();
        if !registers.powered {
            return;
        }
        match offset {
            regs::ICE_REG_CONTROL => registers.control = value,
            regs::ICE_REG_ADVANCED_CONTROL => registers.advanced_control = value,
            regs::ICE_REG_HWKM_TZ_KM_CTL if self.hwkm.is_some() => registers.km_ctl = value,
            // Writing a one clears the bit.
            regs::ICE_REG_HWKM_BANK0_BANKN_IRQ_STATUS => registers.irq_status &= !value,
            _ => {
                if let Some(bank) = bank(offset).filter(|_| self.hwkm.is_some()) {
                    registers.bbac[bank] = value;
                    return;
                }
                drop(registers);
                if let Some(slot) = regs::cryptocfg_slot(offset) {
                    self.configure(slot, CryptoCfg::from_register(value));
                }
            }
        }
    }

    /// Writes `CRYPTOCFG`; with CFGE, a keyslot that has a whole key starts to use it.
    fn configure(&self, slot: u32, cfg: CryptoCfg) {
        let Some(mut slot) = self.write_slot(slot) else { return };
        slot.cfg = cfg;
        let whole = slot.words_written == KEY_WORDS;
        // The former cipher goes when the last request that uses it is done.
        slot.cipher = if cfg.is_enabled() && whole { expand(&slot.words) } else { None };
    }

    /// The wire from the secure world: writes key words from the first on. Whoever does that while the keyslot is on, or
    /// stops half way and switches it on, gets what hardware gives: a mixture of two keys.
    pub(crate) fn load_key(&self, slot: u32, words: &[u32]) {
        let Some(mut slot) = self.write_slot(slot) else { return };
        slot.words[..words.len()].copy_from_slice(words);
        slot.words_written = slot.words_written.max(words.len());
        if slot.cipher.is_some() {
            slot.cipher = expand(&slot.words);
        }
    }

    /// The wire from the secure world: switches the keyslot off and forgets its key.
    pub(crate) fn wipe(&self, slot: u32) {
        if let Some(mut slot) = self.write_slot(slot) {
            *slot = Slot::empty();
        }
    }

    /// Whether the key registers of this keyslot hold anything. For tests: nobody else can tell.
    #[cfg(test)]
    pub(crate) fn holds_key_words(&self, slot: u32) -> bool {
        self.read_slot(slot).is_some_and(|slot| slot.words_written > 0)
    }

    fn lose_all(&self) {
        for slot in 0..self.keyslots() {
            self.wipe(slot);
        }
    }

    /// Encrypts or decrypts whole data units.
    pub(crate) fn crypt(
        &self,
        slot: u32,
        direction: Direction,
        first: Dun,
        data: &mut [u8],
    ) -> Result<(), CryptFault> {
        let (cfg, cipher) = {
            let slot = self.read_slot(slot).ok_or(CryptFault::NoSuchSlot)?;
            (slot.cfg, slot.cipher.clone())
        };
        if self.dice.strikes(self.dice.faults.lose_slot) {
            self.wipe(slot);
            return Err(CryptFault::Off);
        }
        let cipher = cipher.filter(|_| cfg.is_enabled()).ok_or(CryptFault::Off)?;
        let unit_bytes = cfg
            .unit_bytes()
            .filter(|_| self.has_unit(cfg.dusize) && cfg.capidx == regs::CIPHER_AES_256_XTS)
            .ok_or(CryptFault::BadConfig(cfg))?;
        if !data.len().is_multiple_of(unit_bytes) {
            return Err(CryptFault::Misaligned { unit_bytes });
        }
        let units = u64::try_from(data.len() / unit_bytes).map_err(|_too_long| CryptFault::DunTooLong)?;
        let (last, wrapped) = first.overflowing_add(units.saturating_sub(1));
        if wrapped || last.significant_bytes() > self.dun_bytes || first.significant_bytes() > self.dun_bytes
        {
            return Err(CryptFault::DunTooLong);
        }
        match direction {
            Direction::Encrypt => cipher.encrypt(first, unit_bytes, data),
            Direction::Decrypt => cipher.decrypt(first, unit_bytes, data),
        }
        if !data.is_empty() && self.dice.strikes(self.dice.faults.wrong_ciphertext) {
            let at = self.dice.below(u64::try_from(data.len()).unwrap_or(u64::MAX));
            data[usize::try_from(at).expect("below the length")] ^= 0x20;
        }
        Ok(())
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // Nothing panics while the lock is held.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_slot(&self, slot: u32) -> Option<RwLockReadGuard<'_, Slot>> {
        let slot = self.slots.get(usize::try_from(slot).ok()?)?;
        Some(slot.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_slot(&self, slot: u32) -> Option<RwLockWriteGuard<'_, Slot>> {
        let slot = self.slots.get(usize::try_from(slot).ok()?)?;
        Some(slot.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How often a self test is looked at before it ends: once more, or for ever.
pub(crate) const fn bist_polls(never: bool) -> u32 {
    if never { u32::MAX } else { 1 }
}

fn bank(offset: Offset) -> Option<usize> {
    regs::ICE_REG_HWKM_BANK0_BBAC.iter().position(|bbac| *bbac == offset)
}

/// The cipher of a key. None for a key that the cipher refuses: equal halves, of which the secure world keeps all-zero ones
/// away.
fn expand(words: &[u32; KEY_WORDS]) -> Option<Arc<Box<dyn UnitCipher>>> {
    let mut key = Zeroizing::new([0; KEY_WORDS * 4]);
    for (bytes, word) in key.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Mode::Aes256Xts.info().expand(&*key).ok().map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ice::{Faults, IceVariant};

    fn controller(faults: Faults) -> Controller {
        let spec = IceSpec { keyslots: 2, dun_bytes: 4, faults, ..IceSpec::new(IceVariant::HwkmV2) };
        Controller::new(&spec, Arc::new(Dice::new(faults, 0)))
    }

    fn words() -> [u32; KEY_WORDS] {
        std::array::from_fn(|i| u32::try_from(i).unwrap() * 0x0101_0101 + 7)
    }

    const ON: CryptoCfg = CryptoCfg { dusize: 1, capidx: 3, reserved: 0, cfge: 0x80 };

    fn crypt(controller: &Controller, first: Dun, len: usize) -> Result<Vec<u8>, CryptFault> {
        let mut data = vec![0x11; len];
        let result = controller.crypt(1, Direction::Encrypt, first, &mut data);
        if result.is_err() {
            assert_eq!(data, vec![0x11; len], "touched");
        }
        result.map(|()| data)
    }

    #[test]
    fn a_keyslot_encrypts_only_while_it_is_on_and_has_a_whole_key() {
        let controller = controller(Faults::default());
        let cfg = regs::cryptocfg(1);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Off));
        controller.writel(ON.to_register(), cfg);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Off));
        controller.load_key(1, &words()[..8]);
        controller.writel(ON.to_register(), cfg);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Off), "half a key");
        controller.load_key(1, &words());
        controller.writel(ON.to_register(), cfg);
        assert_eq!(controller.readl(cfg), ON.to_register());

        let key: Vec<u8> = words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut wanted = vec![0x11; 1024];
        Mode::Aes256Xts.info().expand(&key).unwrap().encrypt(Dun::from(5), 512, &mut wanted);
        assert_eq!(crypt(&controller, Dun::from(5), 1024), Ok(wanted));

        controller.writel(0, cfg);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Off));
        controller.writel(ON.to_register(), cfg);
        assert!(crypt(&controller, Dun::ZERO, 512).is_ok());
        controller.wipe(1);
        assert_eq!(controller.readl(cfg), 0);
        controller.writel(ON.to_register(), cfg);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Off));
    }

    /// Why CFGE has to be cleared first.
    #[test]
    fn half_a_program_over_a_keyslot_that_is_on_mixes_two_keys() {
        let controller = controller(Faults::default());
        controller.load_key(1, &words());
        controller.writel(ON.to_register(), regs::cryptocfg(1));
        let before = crypt(&controller, Dun::ZERO, 512).unwrap();
        let new = words().map(|word| !word);
        controller.load_key(1, &new[..8]);
        let mixed = crypt(&controller, Dun::ZERO, 512).unwrap();
        controller.load_key(1, &new);
        let after = crypt(&controller, Dun::ZERO, 512).unwrap();
        assert!(mixed != before && mixed != after && before != after);
    }

    #[test]
    fn the_data_unit_is_what_the_mask_says_and_nothing_else() {
        let controller = controller(Faults::default());
        let cfg = regs::cryptocfg(1);
        controller.load_key(1, &words());
        controller.writel(CryptoCfg { dusize: 8, ..ON }.to_register(), cfg);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Misaligned { unit_bytes: 4096 }));
        assert!(crypt(&controller, Dun::ZERO, 8192).is_ok());
        for bad in
            [CryptoCfg { dusize: 0, ..ON }, CryptoCfg { dusize: 3, ..ON }, CryptoCfg { capidx: 4, ..ON }]
        {
            controller.writel(bad.to_register(), cfg);
            assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::BadConfig(bad)));
        }
    }

    #[test]
    fn duns_beyond_the_engines_bytes_are_refused_untouched() {
        let controller = controller(Faults::default());
        controller.load_key(1, &words());
        controller.writel(ON.to_register(), regs::cryptocfg(1));
        let last = Dun::from(u64::from(u32::MAX));
        assert!(crypt(&controller, last, 512).is_ok());
        assert_eq!(crypt(&controller, last, 1024), Err(CryptFault::DunTooLong));
        assert_eq!(crypt(&controller, last.wrapping_add(1), 512), Err(CryptFault::DunTooLong));
        assert_eq!(crypt(&controller, Dun::from_limbs([0, 1, 0, 0]), 512), Err(CryptFault::DunTooLong));
        assert_eq!(crypt(&controller, Dun::from_limbs([u64::MAX; 4]), 1024), Err(CryptFault::DunTooLong));
    }

    #[test]
    fn power_and_reset_take_keys_and_put_legacy_mode_back() {
        let controller = controller(Faults::default());
        controller.load_key(1, &words());
        controller.writel(ON.to_register(), regs::cryptocfg(1));
        controller.writel(0, regs::ICE_REG_CONTROL);
        assert!(controller.is_in_hwkm_mode());
        controller.power_off();
        assert_eq!(controller.readl(regs::ICE_REG_VERSION), 0);
        controller.writel(ON.to_register(), regs::cryptocfg(1));
        controller.power_on(1);
        assert!(!controller.is_in_hwkm_mode());
        assert_eq!(controller.readl(regs::cryptocfg(1)), 0);
        assert_eq!(crypt(&controller, Dun::ZERO, 512), Err(CryptFault::Off));
    }

    #[test]
    fn the_self_test_runs_for_a_while_and_then_is_done() {
        let healthy = controller(Faults::default());
        assert_ne!(healthy.readl(regs::ICE_REG_BIST_STATUS), 0);
        assert_eq!(healthy.readl(regs::ICE_REG_BIST_STATUS), 0);
        assert_eq!(healthy.readl(regs::ICE_REG_HWKM_TZ_KM_STATUS), 0x287);
        let ill = controller(Faults { bist_fail: true, hwkm_bist_fail: true, ..Faults::default() });
        assert!((0..1000).all(|_| ill.readl(regs::ICE_REG_BIST_STATUS) != 0));
        assert_ne!(ill.readl(regs::ICE_REG_HWKM_TZ_KM_STATUS), 0x287);
    }

    #[test]
    fn capability_words_say_what_the_device_is() {
        let [cap, ccap, cryptocap] = controller(Faults::default()).capability_words();
        assert_eq!(cap, 1 << 28);
        assert_eq!(UfsCcap::from_register(ccap).keyslots(), 2);
        assert_eq!(
            UfsCryptoCap::from_register(cryptocap),
            UfsCryptoCap { algorithm_id: 0, sdus_mask: 0xff, key_size: 3 }
        );
    }

    #[test]
    fn key_registers_do_not_print() {
        let controller = controller(Faults::default());
        controller.load_key(1, &words());
        assert_eq!(format!("{controller:?}"), "Controller(ICE 3.2.1, 2 keyslots)");
    }
}
