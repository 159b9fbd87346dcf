//! The secure world, behind its call interface: the only one that sees keys.
//!
//! Calls of service ES (0x10), as Linux's `drivers/firmware/qcom/qcom_scm.c` makes them:
//!
//! | number | call | gives |
//! |---|---|---|
//! | 0x03 | invalidate ICE key: index | |
//! | 0x04 | config set ICE key: index, key or blob, cipher, data unit in 512s | |
//! | 0x07 | derive software secret: ephemeral blob | 32 bytes |
//! | 0x08 | generate ICE key | long-term blob |
//! | 0x09 | prepare ICE key: long-term blob | ephemeral blob |
//! | 0x0a | import ICE key: raw key | long-term blob |
//!
//! - Whether a call is there is asked one by one. Without a key manager, or without the chip's own key, 0x07 to 0x0a are
//!   not.
//! - A blob that does not open is `EINVAL`; a failure of the hardware `EIO`.
//! - 0x07 to 0x0a do not touch the storage engine: they work whatever its mode.
//! - A raw key comes in big-endian words. Its keyslot is configured here, that of a wrapped one by the driver: so does
//!   shipped firmware.
//! - Indices are keyslots in legacy mode. In HWKM mode v1 counts keyslots too, v2 slots of the key manager, two for each
//!   keyslot.
//! - Keys of all-zero halves, which OP-TEE refuses, are taken: a key that was admitted must not fail later.
//!
//! What happens inside follows Qualcomm's OP-TEE: stored keys are wrapped with a key derived from the chip's own; those of
//! this boot with one that is bound to 64 random bytes as well; on the way to the storage engine a key is wrapped with the
//! transport key, and what encrypts is derived there. The contexts of the wrapping keys are ours.

use super::blob::{binding, blob_bytes, prefix};
use super::device::{Controller, KEY_WORDS};
use super::faults::Dice;
use super::hwkm::{BLOB_BYTES, Command, Hwkm, HwkmError, KEY_BYTES, Response, WrapBinding, error, slot};
use super::kdf_context::{KeyPolicy, Recipe, context_on_bus, key_on_bus};
use super::regs::{self, CryptoCfg};
use super::{HwkmVersion, IceSpec, IceVariant};
use crate::blob::{Form, WrappingKeyId};
use crate::{Root, random};
use inlinecrypt_cipher::kdf::KdfVariant;
use inlinecrypt_core::error::{Error, Op};
use std::fmt;
use std::sync::Arc;
use zeroize::Zeroizing;

/// `QCOM_SCM_SVC_ES`.
pub(crate) const SVC_ES: u8 = 0x10;
/// `QCOM_SCM_ES_INVALIDATE_ICE_KEY`.
pub(crate) const ES_INVALIDATE_ICE_KEY: u8 = 0x03;
/// `QCOM_SCM_ES_CONFIG_SET_ICE_KEY`.
pub(crate) const ES_CONFIG_SET_ICE_KEY: u8 = 0x04;
/// `QCOM_SCM_ES_DERIVE_SW_SECRET`.
pub(crate) const ES_DERIVE_SW_SECRET: u8 = 0x07;
/// `QCOM_SCM_ES_GENERATE_ICE_KEY`.
pub(crate) const ES_GENERATE_ICE_KEY: u8 = 0x08;
/// `QCOM_SCM_ES_PREPARE_ICE_KEY`.
pub(crate) const ES_PREPARE_ICE_KEY: u8 = 0x09;
/// `QCOM_SCM_ES_IMPORT_ICE_KEY`.
pub(crate) const ES_IMPORT_ICE_KEY: u8 = 0x0a;

/// Length of a raw key in a call.
const RAW_KEY_BYTES: usize = KEY_WORDS * 4;
/// Bytes of a software secret.
const SECRET_BYTES: usize = 32;

/// One call, with its arguments.
pub(crate) enum ScmCall<'c> {
    InvalidateIceKey { index: u32 },
    ConfigSetIceKey { index: u32, key: &'c [u8], cipher: u8, data_unit_512s: u32 },
    DeriveSwSecret { ephemeral: &'c [u8], room: usize },
    GenerateIceKey { room: usize },
    PrepareIceKey { long_term: &'c [u8], room: usize },
    ImportIceKey { raw: &'c [u8], room: usize },
}

impl ScmCall<'_> {
    pub(crate) const fn number(&self) -> u8 {
        match self {
            Self::InvalidateIceKey { .. } => ES_INVALIDATE_ICE_KEY,
            Self::ConfigSetIceKey { .. } => ES_CONFIG_SET_ICE_KEY,
            Self::DeriveSwSecret { .. } => ES_DERIVE_SW_SECRET,
            Self::GenerateIceKey { .. } => ES_GENERATE_ICE_KEY,
            Self::PrepareIceKey { .. } => ES_PREPARE_ICE_KEY,
            Self::ImportIceKey { .. } => ES_IMPORT_ICE_KEY,
        }
    }
}

/// What comes back.
pub(crate) enum ScmReply {
    Done,
    Blob(Vec<u8>),
    Secret(Zeroizing<[u8; SECRET_BYTES]>),
}

impl fmt::Debug for ScmReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "Done",
            Self::Blob(_) => "Blob",
            Self::Secret(_) => "Secret",
        })
    }
}

/// How a call fails, as Linux's `qcom_scm_remap_error` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScmError {
    /// The hardware failed (-1).
    Eio,
    /// An argument is wrong (-2, -3).
    Einval,
    /// There is no such call (-4).
    Eopnotsupp,
}

/// The key manager's master and slave, with what the firmware knows for this boot.
struct KeyManager {
    version: HwkmVersion,
    kdf: KdfVariant,
    master: Hwkm,
    slave: Hwkm,
    /// What the wrapping key of this boot is bound to.
    boot: Zeroizing<[u8; 64]>,
    long_term_id: WrappingKeyId,
    ephemeral_id: WrappingKeyId,
}

/// The secure world.
pub(crate) struct SecureWorld {
    firmware: IceVariant,
    keyslots: u32,
    key_manager: Option<KeyManager>,
    dice: Arc<Dice>,
}

impl fmt::Debug for SecureWorld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecureWorld({})", self.firmware.full_name())
    }
}

impl SecureWorld {
    /// Boots it. The root stands for the chip; without one no chip-unique key was ever fused in.
    pub(crate) fn boot(spec: &IceSpec, root: Option<&Root>, dice: Arc<Dice>) -> Result<Self, Error> {
        let key_manager = match (spec.variant.hwkm(), root) {
            (Some(version), Some(root)) => Some(KeyManager::boot(version, spec, root)?),
            _ => None,
        };
        Ok(Self { firmware: spec.variant, keyslots: spec.keyslots, key_manager, dice })
    }

    /// Whether the call is there (`__qcom_scm_is_call_available`).
    pub(crate) fn is_call_available(&self, service: u8, number: u8) -> bool {
        service == SVC_ES
            && match number {
                ES_INVALIDATE_ICE_KEY | ES_CONFIG_SET_ICE_KEY => true,
                ES_DERIVE_SW_SECRET | ES_GENERATE_ICE_KEY | ES_PREPARE_ICE_KEY | ES_IMPORT_ICE_KEY => {
                    self.key_manager.is_some()
                }
                _ => false,
            }
    }

    /// Whether this firmware sets raw keys in HWKM mode, too.
    pub(crate) const fn takes_both(&self) -> bool {
        matches!(self.firmware, IceVariant::Next)
    }

    /// The storage engine was reset or lost its power, and with it the key manager's slave.
    pub(crate) fn slave_lost(&mut self) {
        if let Some(keys) = &mut self.key_manager {
            keys.slave.lose_all();
        }
    }

    /// The public name of the wrapping key of a form.
    pub(crate) fn wrapping_key_id(&self, form: Form) -> Option<WrappingKeyId> {
        self.key_manager.as_ref().map(|keys| keys.id(form))
    }

    /// What a blob makes the storage engine encrypt with. Nothing that real firmware would answer: for comparing with
    /// software.
    pub(crate) fn inline_key(&mut self, ephemeral: &[u8]) -> Result<Zeroizing<Vec<u8>>, ScmError> {
        let keys = self.key_manager.as_mut().ok_or(ScmError::Eopnotsupp)?;
        let stored = keys.stored_key(ephemeral)?;
        Ok(Recipe::inline_key(keys.kdf).derive(keys.kdf, &stored))
    }

    /// Carries out `call`.
    pub(crate) fn call(&mut self, controller: &Controller, call: &ScmCall<'_>) -> Result<ScmReply, ScmError> {
        if !self.is_call_available(SVC_ES, call.number()) {
            return Err(ScmError::Eopnotsupp);
        }
        match *call {
            ScmCall::InvalidateIceKey { index } => self.invalidate(controller, index),
            ScmCall::ConfigSetIceKey { index, key, cipher, data_unit_512s } => {
                self.set_key(controller, index, key, cipher, data_unit_512s)
            }
            ScmCall::DeriveSwSecret { ephemeral, room } => {
                self.check_blob()?;
                self.keys(room, SECRET_BYTES)?.derive_secret(ephemeral).map(ScmReply::Secret)
            }
            ScmCall::GenerateIceKey { room } => self.keys_for_blob(room)?.generate().map(ScmReply::Blob),
            ScmCall::PrepareIceKey { long_term, room } => {
                self.check_blob()?;
                self.keys_for_blob(room)?.prepare(long_term).map(ScmReply::Blob)
            }
            ScmCall::ImportIceKey { raw, room } => self.keys_for_blob(room)?.import(raw).map(ScmReply::Blob),
        }
    }

    /// The fault that refuses good blobs.
    fn check_blob(&self) -> Result<(), ScmError> {
        if self.dice.strikes(self.dice.faults.refuse_blobs) { Err(ScmError::Einval) } else { Ok(()) }
    }

    fn keys(&mut self, room: usize, needed: usize) -> Result<&mut KeyManager, ScmError> {
        let keys = self.key_manager.as_mut().ok_or(ScmError::Eopnotsupp)?;
        if room < needed { Err(ScmError::Einval) } else { Ok(keys) }
    }

    fn keys_for_blob(&mut self, room: usize) -> Result<&mut KeyManager, ScmError> {
        let needed = self.key_manager.as_ref().map_or(0, |keys| blob_bytes(keys.version));
        self.keys(room, needed)
    }

    /// The keyslot that an index means.
    fn keyslot(&self, controller: &Controller, index: u32) -> Result<u32, ScmError> {
        let per_keyslot = match self.firmware.hwkm() {
            Some(HwkmVersion::V2) if controller.is_in_hwkm_mode() => 2,
            _ => 1,
        };
        if !index.is_multiple_of(per_keyslot) || index / per_keyslot >= self.keyslots {
            return Err(ScmError::Einval);
        }
        Ok(index / per_keyslot)
    }

    fn invalidate(&mut self, controller: &Controller, index: u32) -> Result<ScmReply, ScmError> {
        let keyslot = self.keyslot(controller, index)?;
        if self.dice.strikes(self.dice.faults.evict_fail) {
            return Err(ScmError::Eio);
        }
        controller.wipe(keyslot);
        if let Some(keys) = &mut self.key_manager {
            keys.clear_mapped(keyslot);
        }
        Ok(ScmReply::Done)
    }

    fn set_key(
        &mut self,
        controller: &Controller,
        index: u32,
        key: &[u8],
        cipher: u8,
        data_unit_512s: u32,
    ) -> Result<ScmReply, ScmError> {
        let keyslot = self.keyslot(controller, index)?;
        let dusize = u8::try_from(data_unit_512s).map_err(|_large| ScmError::Einval)?;
        if cipher != regs::CIPHER_AES_256_XTS || !controller.has_unit(dusize) {
            return Err(ScmError::Einval);
        }
        // No blob has the length of a raw key.
        let is_raw = key.len() == RAW_KEY_BYTES;
        if is_raw && controller.is_in_hwkm_mode() && !self.takes_both() {
            return Err(ScmError::Einval);
        }
        if !is_raw && !controller.is_in_hwkm_mode() {
            return Err(ScmError::Einval);
        }
        let words = if is_raw {
            // Big-endian words in the call, little-endian registers.
            words(key, u32::from_be_bytes)
        } else {
            self.check_blob()?;
            let keys = self.key_manager.as_mut().ok_or(ScmError::Einval)?;
            let derived = keys.derive_in_slave(key, keyslot, controller.is_bank_open())?;
            words(&derived, u32::from_le_bytes)
        };
        let faults = &self.dice.faults;
        if self.dice.fails_as_one_of_the_first() || self.dice.strikes(faults.program_fail) {
            return Err(ScmError::Eio);
        }
        if self.dice.strikes(faults.half_program) {
            controller.load_key(keyslot, &words[..KEY_WORDS / 2]);
            return Err(ScmError::Eio);
        }
        controller.load_key(keyslot, &*words);
        if is_raw {
            let cfg = CryptoCfg { dusize, capidx: cipher, reserved: 0, cfge: CryptoCfg::CFG_ENABLE_VAL };
            controller.writel(cfg.to_register(), regs::cryptocfg(keyslot));
        }
        Ok(ScmReply::Done)
    }
}

/// The key registers for `key`, whose words are encoded so. A key of another length fills fewer.
fn words(key: &[u8], decode: fn([u8; 4]) -> u32) -> Zeroizing<[u32; KEY_WORDS]> {
    let mut words = Zeroizing::new([0; KEY_WORDS]);
    for (word, bytes) in words.iter_mut().zip(key.chunks_exact(4)) {
        *word = decode(bytes.try_into().expect("chunks of four"));
    }
    words
}

/// The hardware's answer in terms of a call: what does not open is the caller's fault.
fn blame(why: HwkmError) -> ScmError {
    match why.status {
        error::IMPORT_UNWRAP_FAILED | error::INCORRECT_CMD_LENGTH => ScmError::Einval,
        _ => ScmError::Eio,
    }
}

const CHIP: u16 = slot::UKDK_L1 as u16;
const TRANSPORT: u16 = slot::TPKEY as u16;
const WRAP: u16 = slot::TZ_WRAP_KEY as u16;
const GENERAL1: u16 = slot::TZ_GENERAL_PURPOSE1 as u16;
const GENERAL2: u16 = slot::TZ_GENERAL_PURPOSE2 as u16;

impl KeyManager {
    /// Part of the format: a change makes every stored key unreadable.
    const LONG_TERM_CONTEXT: &[u8] = b"inlinecrypt ice v1 long-term wrapping key";

    fn boot(version: HwkmVersion, spec: &IceSpec, root: &Root) -> Result<Self, Error> {
        let mut boot = Zeroizing::new([0; 64]);
        for part in boot.chunks_exact_mut(32) {
            part.copy_from_slice(&random::secret(Op::Open)?[..]);
        }
        let id = random::secret(Op::Open)?;
        let ephemeral_id = WrappingKeyId::from_bytes(id[..8].try_into().expect("of 32 bytes"));
        let keyslots = u16::try_from(spec.keyslots).expect("at most 256");
        let mut keys = Self {
            version,
            kdf: spec.kdf,
            master: Hwkm::master(spec.kdf, root.chip_key()),
            slave: Hwkm::slave(spec.kdf, keyslots),
            boot,
            long_term_id: root.id(),
            ephemeral_id,
        };
        let failed = |why: HwkmError| {
            Error::new(inlinecrypt_core::error::ErrorKind::EngineFailed, Op::Open).because(why)
        };
        keys.master
            .run(&Command::NistKeygen { dks: TRANSPORT, policy: KeyPolicy::TRANSPORT })
            .map_err(failed)?;
        keys.master.run(&Command::SetTpkey { sks: TRANSPORT }).map_err(failed)?;
        Ok(keys)
    }

    const fn id(&self, form: Form) -> WrappingKeyId {
        match form {
            Form::LongTerm => self.long_term_id,
            Form::Ephemeral => self.ephemeral_id,
        }
    }

    /// Does `work` with the wrapping key of `form` in its slot, and leaves no key behind in any slot of passage.
    fn with_wrapping_key<T>(
        &mut self,
        form: Form,
        work: impl FnOnce(&mut Self) -> Result<T, ScmError>,
    ) -> Result<T, ScmError> {
        let recipe = match form {
            Form::LongTerm => Recipe::wrapping_key(Self::LONG_TERM_CONTEXT),
            Form::Ephemeral => Recipe::wrapping_key(&*self.boot),
        };
        self.kdf(WRAP, CHIP, &recipe)?;
        let result = work(self);
        self.clear(WRAP, true);
        result
    }

    fn kdf(&mut self, dks: u16, kdk: u16, recipe: &Recipe) -> Result<(), ScmError> {
        kdf(&mut self.master, dks, kdk, recipe)
    }

    /// Empties a slot of the master that may be empty.
    fn clear(&mut self, dks: u16, double: bool) {
        // The only refusal here is that it is empty.
        let _ = self.master.run(&Command::KeySlotClear { dks, double });
    }

    /// Opens a blob into the first general slot, does `work`, and clears both general slots.
    fn with_opened<T>(
        &mut self,
        form: Form,
        blob: &[u8],
        work: impl FnOnce(&mut Self) -> Result<T, ScmError>,
    ) -> Result<T, ScmError> {
        if blob.len() != blob_bytes(self.version) {
            return Err(ScmError::Einval);
        }
        let (prefix, blob) = blob.split_at(blob.len() - BLOB_BYTES);
        let opened = self.with_wrapping_key(form, |keys| {
            let import = Command::KeyUnwrapImport { dks: GENERAL1, kwk: WRAP, blob, prefix };
            keys.master.run(&import).map_err(blame)
        });
        let result = opened.and_then(|_done| work(self));
        self.clear(GENERAL1, false);
        self.clear(GENERAL2, false);
        result
    }

    /// The key in the first general slot, as a blob.
    fn wrap(&mut self, form: Form) -> Result<Vec<u8>, ScmError> {
        let prefix = prefix(self.version, form, self.id(form));
        self.with_wrapping_key(form, |keys| {
            let export =
                Command::KeyWrapExport { sks: GENERAL1, kwk: WRAP, binding: binding(form), prefix: &prefix };
            match keys.master.run(&export).map_err(blame)? {
                Response::Blob(blob) => Ok([&prefix[..], &blob].concat()),
                _ => Err(ScmError::Eio),
            }
        })
    }

    fn generate(&mut self) -> Result<Vec<u8>, ScmError> {
        let keygen = Command::NistKeygen { dks: GENERAL1, policy: KeyPolicy::STORED };
        self.master.run(&keygen).map_err(blame)?;
        let blob = self.wrap(Form::LongTerm);
        self.clear(GENERAL1, false);
        blob
    }

    fn import(&mut self, raw: &[u8]) -> Result<Vec<u8>, ScmError> {
        if raw.len() != KEY_BYTES {
            return Err(ScmError::Einval);
        }
        let key = key_on_bus(raw);
        let write = Command::KeySlotWrite { slot: GENERAL1, policy: KeyPolicy::STORED, key: &key };
        self.master.run(&write).map_err(blame)?;
        let blob = self.wrap(Form::LongTerm);
        self.clear(GENERAL1, false);
        blob
    }

    fn prepare(&mut self, long_term: &[u8]) -> Result<Vec<u8>, ScmError> {
        self.with_opened(Form::LongTerm, long_term, |keys| keys.wrap(Form::Ephemeral))
    }

    fn derive_secret(&mut self, ephemeral: &[u8]) -> Result<Zeroizing<[u8; SECRET_BYTES]>, ScmError> {
        self.with_opened(Form::Ephemeral, ephemeral, |keys| {
            let recipe = Recipe::software_secret(keys.kdf);
            keys.kdf(GENERAL2, GENERAL1, &recipe)?;
            let Response::Key(key) =
                keys.master.run(&Command::KeySlotRead { slot: GENERAL2 }).map_err(blame)?
            else {
                return Err(ScmError::Eio);
            };
            let mut secret = Zeroizing::new([0; SECRET_BYTES]);
            secret.copy_from_slice(&key_on_bus(&key));
            Ok(secret)
        })
    }

    /// Takes the key of a blob to the slave and derives what encrypts, in the pair of the keyslot.
    fn derive_in_slave(
        &mut self,
        ephemeral: &[u8],
        keyslot: u32,
        bank_open: bool,
    ) -> Result<Zeroizing<Vec<u8>>, ScmError> {
        let carried = self.with_opened(Form::Ephemeral, ephemeral, |keys| {
            let export = Command::KeyWrapExport {
                sks: GENERAL1,
                kwk: TRANSPORT,
                binding: WrapBinding::TRANSPORT,
                prefix: &[],
            };
            match keys.master.run(&export).map_err(blame)? {
                Response::Blob(blob) => Ok(blob),
                _ => Err(ScmError::Eio),
            }
        })?;
        self.slave.set_reachable(bank_open);
        self.master.share_transport_key(&mut self.slave);
        self.clear_mapped(keyslot);
        let staging = slot::SLAVE_STAGING;
        let import = Command::KeyUnwrapImport { dks: staging, kwk: TRANSPORT, blob: &carried, prefix: &[] };
        // The blob is ours: if it does not open, it is not the caller's fault.
        self.slave.run(&import).map_err(|_why| ScmError::Eio)?;
        let mapped = mapped(keyslot);
        let derived = kdf(&mut self.slave, mapped, staging, &Recipe::inline_key(self.kdf));
        // Filled a moment ago.
        let _ = self.slave.run(&Command::KeySlotClear { dks: staging, double: false });
        derived?;
        self.slave.mapped_key(mapped).map(|key| Zeroizing::new(key.to_vec())).ok_or(ScmError::Eio)
    }

    fn clear_mapped(&mut self, keyslot: u32) {
        // It may be empty.
        let _ = self.slave.run(&Command::KeySlotClear { dks: mapped(keyslot), double: true });
    }

    /// The key inside a blob.
    fn stored_key(&mut self, ephemeral: &[u8]) -> Result<Zeroizing<[u8; KEY_BYTES]>, ScmError> {
        self.with_opened(Form::Ephemeral, ephemeral, |keys| keys.master.peek(GENERAL1).ok_or(ScmError::Eio))
    }
}

/// The slave's pair for a keyslot.
fn mapped(keyslot: u32) -> u16 {
    slot::SLAVE_MAPPED + 2 * u16::try_from(keyslot).expect("at most 256 keyslots")
}

fn kdf(hwkm: &mut Hwkm, dks: u16, kdk: u16, recipe: &Recipe) -> Result<(), ScmError> {
    let context = context_on_bus(&recipe.context);
    let (policy, binding) = (recipe.policy, recipe.binding);
    let command = Command::SystemKdf { dks, kdk, policy, binding, context: &context };
    hwkm.run(&command).map(|_done| ()).map_err(blame)
}
