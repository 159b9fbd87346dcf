//! The hardware key manager (HWKM): slots for keys with policies, and the operations on them.
//!
//! There are two: the *master* belongs to the secure world and has 23 slots; the *slave* sits in the storage engine and
//! has a staging slot and a pair for each keyslot. Both check what they are told against the policies of the keys; what is
//! refused changes nothing.
//!
//! ```text
//!   master   0-3 L1 keys (3: the chip's own)   10/11 transport   14/15 wrapping   16/17 general purpose
//!   slave    8/9 staging                       10 + 2 n, 11 + 2 n: the key of keyslot n
//! ```
//!
//! Blobs as `KEY_WRAP_EXPORT` makes them, 68 bytes:
//!
//! ```text
//!   offset  bytes
//!        0     48  AES-256-SIV of the key: tag, then ciphertext
//!       48      8  the key's policy, two little-endian words
//!       56     12  what the wrapping is bound to, three little-endian words
//! ```
//!
//! Policy and binding are the associated data. Numbers of slots, operations and error bits: OP-TEE
//! `core/drivers/crypto/qcom` (`hwkm.h`, `hwkm_errno.h`). Which check comes first, and the slave's slots, are ours.

use super::kdf_context::{KdfBinding, KeyPolicy, Recipe, Role, Security, context_on_bus, key_on_bus};
use crate::random;
use inlinecrypt_cipher::kdf::KdfVariant;
use inlinecrypt_cipher::wrap::{self, WrappingKey};
use inlinecrypt_core::error::Op;
use std::fmt;
use zeroize::Zeroizing;

/// `HWKM_MAX_KEY_SIZE`: of a single key.
pub(crate) const KEY_BYTES: usize = 32;
/// `HWKM_MAX_CTX_SIZE`.
pub(crate) const CONTEXT_BYTES_MAX: usize = 64;
/// `HWKM_MAX_BLOB_SIZE`.
pub(crate) const BLOB_BYTES: usize = SEALED_BYTES + 8 + 12;
/// A single key and its tag.
pub(crate) const SEALED_BYTES: usize = KEY_BYTES + wrap::OVERHEAD_BYTES;

/// Slots of the master (`enum hwkm_master_key_slots`).
pub(crate) mod slot {
    pub(crate) const UKDK_L1: u8 = 3;
    pub(crate) const TPKEY: u8 = 10;
    pub(crate) const TZ_WRAP_KEY: u8 = 14;
    pub(crate) const TZ_GENERAL_PURPOSE1: u8 = 16;
    pub(crate) const TZ_GENERAL_PURPOSE2: u8 = 17;
    pub(crate) const MASTER_COUNT: u16 = 23;
    /// Of the slave: where a key waits to be derived from.
    pub(crate) const SLAVE_STAGING: u16 = 8;
    /// Of the slave: where the pairs of the keyslots begin (`pipe * 2 + 10` in Qualcomm's OP-TEE).
    pub(crate) const SLAVE_MAPPED: u16 = 10;
}

/// `enum hwkm_op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Operation {
    NistKeygen = 0,
    SystemKdf = 1,
    // 2 is reserved.
    KeyWrapExport = 3,
    KeyUnwrapImport = 4,
    KeySlotClear = 5,
    KeySlotRdwr = 6,
    SetTpkey = 7,
}

/// Bits of the error status. 0 to 7 mean the same for all operations, the others depend on it (`hwkm_errno.h`).
pub(crate) mod error {
    pub(crate) const INCORRECT_CMD_LENGTH: u32 = 1 << 4;
    pub(crate) const BBAC_ACCESS: u32 = 1 << 6;

    pub(crate) const KEYGEN_KEYSLOT_ID_OUT_OF_RANGE: u32 = 1 << 8;
    pub(crate) const KEYGEN_INVALID_SECURITY_LEVEL: u32 = 1 << 18;
    pub(crate) const KEYGEN_DKS_SLOT_NOT_EMPTY: u32 = 1 << 19;

    pub(crate) const RDWR_KEYSLOT_ID_OUT_OF_RANGE: u32 = 1 << 8;
    pub(crate) const RDWR_UNSUPPORTED_KEY_SIZE: u32 = 1 << 9;
    pub(crate) const RDWR_INVALID_SECURITY_LEVEL: u32 = 1 << 11;
    pub(crate) const RDWR_SECURITY_LEVEL_VIOLATION: u32 = 1 << 19;
    pub(crate) const RDWR_SKS_SLOT_EMPTY: u32 = 1 << 20;
    pub(crate) const RDWR_DKS_SLOT_NOT_EMPTY: u32 = 1 << 21;

    pub(crate) const KDF_DEPTH_ERROR: u32 = 1 << 21;
    pub(crate) const KDF_KDK_TYPE: u32 = 1 << 22;
    pub(crate) const KDF_KEYSLOT_SLOT: u32 = 1 << 24;
    pub(crate) const KDF_KEYSLOT_OUT_OF_RANGE: u32 = 1 << 25;
    pub(crate) const KDF_DOUBLE_KEY_SLOT_NOT_EVEN: u32 = 1 << 26;

    pub(crate) const EXPORT_SKS_SIZE_ERROR: u32 = 1 << 10;
    pub(crate) const EXPORT_SKS_SLOT_OUT_OF_RANGE: u32 = 1 << 11;
    pub(crate) const EXPORT_KWK_SLOT_OUT_OF_RANGE: u32 = 1 << 13;
    pub(crate) const EXPORT_WRAP_WITH_TPKEY_NOT_ALLOWED: u32 = 1 << 15;
    pub(crate) const EXPORT_WRAP_EXPORT_NOT_ALLOWED: u32 = 1 << 17;
    pub(crate) const EXPORT_UNEXPECTED_KEY_TYPE: u32 = 1 << 20;
    pub(crate) const EXPORT_KWK_SLOT_EMPTY: u32 = 1 << 21;
    pub(crate) const EXPORT_SKS_SLOT_EMPTY: u32 = 1 << 22;

    pub(crate) const IMPORT_UNWRAP_FAILED: u32 = 1 << 8;
    pub(crate) const IMPORT_DKS_OUT_OF_RANGE: u32 = 1 << 12;
    pub(crate) const IMPORT_KWK_SLOT_OUT_OF_RANGE: u32 = 1 << 13;
    pub(crate) const IMPORT_UNEXPECTED_KEY_TYPE: u32 = 1 << 26;
    pub(crate) const IMPORT_KWK_SLOT_EMPTY: u32 = 1 << 27;
    pub(crate) const IMPORT_DKS_SLOT_NOT_EMPTY: u32 = 1 << 28;

    pub(crate) const CLEAR_KEYSLOT_ID_OUT_OF_RANGE: u32 = 1 << 9;
    pub(crate) const CLEAR_KEY_SIZE: u32 = 1 << 10;
    pub(crate) const CLEAR_DKS_SLOT_EMPTY: u32 = 1 << 12;

    pub(crate) const TPKEY_KEYSLOT_ID_OUT_OF_RANGE: u32 = 1 << 11;
    pub(crate) const TPKEY_UNEXPECTED_KEY_TYPE: u32 = 1 << 12;
    pub(crate) const TPKEY_SKS_SLOT_EMPTY: u32 = 1 << 13;
}

/// A refusal: the operation, and its error status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HwkmError {
    pub(crate) operation: Operation,
    pub(crate) status: u32,
}

impl fmt::Display for HwkmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HWKM operation {:?} failed with status {:#x}", self.operation, self.status)
    }
}

impl std::error::Error for HwkmError {}

/// A command. Keys and contexts are in the order in which they travel, see [`key_on_bus`] and [`context_on_bus`].
#[derive(Debug)]
pub(crate) enum Command<'c> {
    /// A new random key.
    NistKeygen { dks: u16, policy: KeyPolicy },
    /// A child of the key in `kdk`.
    SystemKdf { dks: u16, kdk: u16, policy: KeyPolicy, binding: KdfBinding, context: &'c [u8] },
    /// The key in `sks`, wrapped with that in `kwk`. `prefix` comes with HWKM v2: more that is authenticated.
    KeyWrapExport { sks: u16, kwk: u16, binding: WrapBinding, prefix: &'c [u8] },
    /// The reverse.
    KeyUnwrapImport { dks: u16, kwk: u16, blob: &'c [u8], prefix: &'c [u8] },
    /// Forgets the key in `dks`.
    KeySlotClear { dks: u16, double: bool },
    /// Shows the key in `slot`.
    KeySlotRead { slot: u16 },
    /// Takes a key as it is.
    KeySlotWrite { slot: u16, policy: KeyPolicy, key: &'c [u8] },
    /// Makes the key in `sks` the transport key.
    SetTpkey { sks: u16 },
}

impl Command<'_> {
    pub(crate) const fn operation(&self) -> Operation {
        match self {
            Self::NistKeygen { .. } => Operation::NistKeygen,
            Self::SystemKdf { .. } => Operation::SystemKdf,
            Self::KeyWrapExport { .. } => Operation::KeyWrapExport,
            Self::KeyUnwrapImport { .. } => Operation::KeyUnwrapImport,
            Self::KeySlotClear { .. } => Operation::KeySlotClear,
            Self::KeySlotRead { .. } | Self::KeySlotWrite { .. } => Operation::KeySlotRdwr,
            Self::SetTpkey { .. } => Operation::SetTpkey,
        }
    }
}

/// What comes back besides the status.
#[derive(Debug)]
pub(crate) enum Response {
    Done,
    Blob([u8; BLOB_BYTES]),
    /// In the order in which keys travel.
    Key(Zeroizing<Vec<u8>>),
}

/// What a wrapping is bound to (`hwkm_hw_wrapping_bsve`). Stored keys and those of this boot differ, so that a blob shows
/// what it is; that is ours, for no public source says what shipped firmware sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrapBinding {
    /// Bit 0, `key_policy_version_en`.
    pub(crate) policy_version: bool,
    /// Bit 4, `boot_stage_otp_en`.
    pub(crate) boot_stage: bool,
}

impl WrapBinding {
    pub(crate) const LONG_TERM: Self = Self { policy_version: true, boot_stage: false };
    pub(crate) const EPHEMERAL: Self = Self { policy_version: true, boot_stage: true };
    pub(crate) const TRANSPORT: Self = Self { policy_version: false, boot_stage: false };

    pub(crate) const fn to_le_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[0] = self.policy_version as u8 | (self.boot_stage as u8) << 4;
        bytes
    }
}

/// A key in a slot.
struct Entry {
    key: Zeroizing<Vec<u8>>,
    policy: KeyPolicy,
}

impl Entry {
    fn is_double(&self) -> bool {
        self.key.len() > KEY_BYTES
    }
}

/// A key manager.
pub(crate) struct Hwkm {
    /// Entry `i` is that of slot `i`. A double key is an entry of its even slot; the odd one stays empty.
    slots: Vec<Option<Entry>>,
    /// The transport key that was set.
    transport: Option<Zeroizing<Vec<u8>>>,
    kdf: KdfVariant,
    /// Whether the slots may be reached: the bank access registers of the slave.
    reachable: bool,
}

impl fmt::Debug for Hwkm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let filled = self.slots.iter().flatten().count();
        write!(f, "Hwkm({filled} of {} slots filled)", self.slots.len())
    }
}

impl Hwkm {
    /// The master, with the chip's own key in its slot.
    pub(crate) fn master(kdf: KdfVariant, chip: &[u8; KEY_BYTES]) -> Self {
        let mut master = Self::empty(kdf, slot::MASTER_COUNT, true);
        let key = Zeroizing::new(chip.to_vec());
        master.slots[usize::from(slot::UKDK_L1)] = Some(Entry { key, policy: KeyPolicy::CHIP });
        master
    }

    /// A slave for this many keyslots. Nobody reaches its slots until the bank access registers are set.
    pub(crate) fn slave(kdf: KdfVariant, keyslots: u16) -> Self {
        Self::empty(kdf, slot::SLAVE_MAPPED + 2 * keyslots, false)
    }

    fn empty(kdf: KdfVariant, slots: u16, reachable: bool) -> Self {
        Self { slots: (0..slots).map(|_| None).collect(), transport: None, kdf, reachable }
    }

    /// What the bank access registers say.
    pub(crate) fn set_reachable(&mut self, reachable: bool) {
        self.reachable = reachable;
    }

    /// Loses all keys, as a reset or the loss of power does to a slave.
    pub(crate) fn lose_all(&mut self) {
        self.slots.fill_with(|| None);
        self.transport = None;
        self.reachable = false;
    }

    /// The private wire on which a master hands its transport key to a slave.
    pub(crate) fn share_transport_key(&self, slave: &mut Self) {
        slave.transport.clone_from(&self.transport);
    }

    /// The private wire from a slave's mapped pair to the cipher beside it.
    pub(crate) fn mapped_key(&self, dks: u16) -> Option<&[u8]> {
        self.slots.get(usize::from(dks))?.as_ref().filter(|entry| entry.is_double()).map(|entry| &**entry.key)
    }

    /// A single key as it is. No hardware does that: for comparing with software.
    pub(crate) fn peek(&self, slot: u16) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
        let entry = self.slots.get(usize::from(slot))?.as_ref()?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        (entry.key.len() == KEY_BYTES).then(|| {
            key.copy_from_slice(&entry.key);
            key
        })
    }

    /// Carries out `command`, or leaves everything as it was.
    pub(crate) fn run(&mut self, command: &Command<'_>) -> Result<Response, HwkmError> {
        let refuse = |status| HwkmError { operation: command.operation(), status };
        if !self.reachable {
            return Err(refuse(error::BBAC_ACCESS));
        }
        match *command {
            Command::NistKeygen { dks, policy } => self.keygen(dks, policy),
            Command::SystemKdf { dks, kdk, policy, binding, context } => {
                self.system_kdf(dks, kdk, policy, binding, context)
            }
            Command::KeyWrapExport { sks, kwk, binding, prefix } => {
                self.wrap_export(sks, kwk, binding, prefix)
            }
            Command::KeyUnwrapImport { dks, kwk, blob, prefix } => self.unwrap_import(dks, kwk, blob, prefix),
            Command::KeySlotClear { dks, double } => self.clear(dks, double),
            Command::KeySlotRead { slot } => self.read(slot),
            Command::KeySlotWrite { slot, policy, key } => self.write(slot, policy, key),
            Command::SetTpkey { sks } => self.set_tpkey(sks),
        }
        .map_err(refuse)
    }

    fn entry(&self, slot: u16, out_of_range: u32) -> Result<Option<&Entry>, u32> {
        self.slots.get(usize::from(slot)).map(Option::as_ref).ok_or(out_of_range)
    }

    /// Whether a key of this many bytes may go to `slot`.
    fn room(&self, slot: u16, key_bytes: usize, errors: [u32; 3]) -> Result<(), u32> {
        let [out_of_range, not_even, not_empty] = errors;
        if self.entry(slot, out_of_range)?.is_some() {
            return Err(not_empty);
        }
        let (odd, double) = (!slot.is_multiple_of(2), key_bytes > KEY_BYTES);
        if double {
            if odd {
                return Err(not_even);
            }
            if self.entry(slot + 1, out_of_range)?.is_some() {
                return Err(not_empty);
            }
        }
        // The second half of a double key.
        if odd && self.entry(slot - 1, out_of_range)?.is_some_and(Entry::is_double) {
            return Err(not_empty);
        }
        Ok(())
    }

    fn put(&mut self, slot: u16, key: Zeroizing<Vec<u8>>, policy: KeyPolicy) {
        self.slots[usize::from(slot)] = Some(Entry { key, policy });
    }

    fn keygen(&mut self, dks: u16, policy: KeyPolicy) -> Result<Response, u32> {
        use error::{
            KEYGEN_DKS_SLOT_NOT_EMPTY, KEYGEN_INVALID_SECURITY_LEVEL, KEYGEN_KEYSLOT_ID_OUT_OF_RANGE,
        };
        let bytes = policy.algorithm.key_bytes();
        let errors =
            [KEYGEN_KEYSLOT_ID_OUT_OF_RANGE, KEYGEN_KEYSLOT_ID_OUT_OF_RANGE, KEYGEN_DKS_SLOT_NOT_EMPTY];
        self.room(dks, bytes, errors)?;
        let mut key = Zeroizing::new(Vec::with_capacity(bytes));
        while key.len() < bytes {
            // No randomness: the only thing that can go wrong here, and the hardware has no bit for it.
            let part = random::secret(Op::Generate).map_err(|_why| KEYGEN_INVALID_SECURITY_LEVEL)?;
            key.extend_from_slice(&part[..]);
        }
        self.put(dks, key, policy);
        Ok(Response::Done)
    }

    fn system_kdf(
        &mut self,
        dks: u16,
        kdk: u16,
        policy: KeyPolicy,
        binding: KdfBinding,
        context: &[u8],
    ) -> Result<Response, u32> {
        use error::{
            INCORRECT_CMD_LENGTH, KDF_DEPTH_ERROR, KDF_DOUBLE_KEY_SLOT_NOT_EVEN, KDF_KDK_TYPE,
            KDF_KEYSLOT_OUT_OF_RANGE, KDF_KEYSLOT_SLOT,
        };
        if context.len() > CONTEXT_BYTES_MAX {
            return Err(INCORRECT_CMD_LENGTH);
        }
        let parent = self.entry(kdk, KDF_KEYSLOT_OUT_OF_RANGE)?.ok_or(KDF_KEYSLOT_SLOT)?;
        if parent.policy.role != Role::Derivation {
            return Err(KDF_KDK_TYPE);
        }
        if policy.depth >= parent.policy.depth {
            return Err(KDF_DEPTH_ERROR);
        }
        let errors = [KDF_KEYSLOT_OUT_OF_RANGE, KDF_DOUBLE_KEY_SLOT_NOT_EVEN, KDF_KEYSLOT_SLOT];
        self.room(dks, policy.algorithm.key_bytes(), errors)?;
        let recipe = Recipe { context: context_on_bus(context), binding, policy };
        let parent: &[u8; KEY_BYTES] = parent.key[..].try_into().map_err(|_length| KDF_KDK_TYPE)?;
        let child = recipe.derive(self.kdf, parent);
        self.put(dks, child, policy);
        Ok(Response::Done)
    }

    /// The key in `kwk`: the transport key that was set, or a wrapping key.
    fn wrapping_key(
        &self,
        kwk: u16,
        out_of_range: u32,
        empty: u32,
        unexpected: u32,
    ) -> Result<(WrappingKey, bool), u32> {
        let is_transport = kwk == u16::from(slot::TPKEY);
        let key = if is_transport {
            self.transport.as_ref().ok_or(empty)?
        } else {
            let entry = self.entry(kwk, out_of_range)?.ok_or(empty)?;
            if entry.policy.role != Role::Wrapping {
                return Err(unexpected);
            }
            &entry.key
        };
        let bytes: &[u8; 64] = key[..].try_into().map_err(|_length| unexpected)?;
        Ok((WrappingKey::new(bytes), is_transport))
    }

    fn wrap_export(&self, sks: u16, kwk: u16, binding: WrapBinding, prefix: &[u8]) -> Result<Response, u32> {
        use error::{
            EXPORT_KWK_SLOT_EMPTY, EXPORT_KWK_SLOT_OUT_OF_RANGE, EXPORT_SKS_SIZE_ERROR,
            EXPORT_SKS_SLOT_EMPTY, EXPORT_SKS_SLOT_OUT_OF_RANGE, EXPORT_UNEXPECTED_KEY_TYPE,
            EXPORT_WRAP_EXPORT_NOT_ALLOWED, EXPORT_WRAP_WITH_TPKEY_NOT_ALLOWED,
        };
        let source = self.entry(sks, EXPORT_SKS_SLOT_OUT_OF_RANGE)?.ok_or(EXPORT_SKS_SLOT_EMPTY)?;
        let (wrapping, is_transport) = self.wrapping_key(
            kwk,
            EXPORT_KWK_SLOT_OUT_OF_RANGE,
            EXPORT_KWK_SLOT_EMPTY,
            EXPORT_UNEXPECTED_KEY_TYPE,
        )?;
        match is_transport {
            true if !source.policy.transport => return Err(EXPORT_WRAP_WITH_TPKEY_NOT_ALLOWED),
            false if !source.policy.wrap_export => return Err(EXPORT_WRAP_EXPORT_NOT_ALLOWED),
            _ => {}
        }
        if source.is_double() {
            return Err(EXPORT_SKS_SIZE_ERROR);
        }
        let clear = [&source.policy.to_le_bytes()[..], &binding.to_le_bytes()].concat();
        let sealed = wrap::wrap(&wrapping, &[prefix, &clear], &source.key);
        let mut blob = [0; BLOB_BYTES];
        let (first, second) = blob.split_at_mut(SEALED_BYTES);
        first.copy_from_slice(&sealed);
        second.copy_from_slice(&clear);
        Ok(Response::Blob(blob))
    }

    fn unwrap_import(&mut self, dks: u16, kwk: u16, blob: &[u8], prefix: &[u8]) -> Result<Response, u32> {
        use error::{
            IMPORT_DKS_OUT_OF_RANGE, IMPORT_DKS_SLOT_NOT_EMPTY, IMPORT_KWK_SLOT_EMPTY,
            IMPORT_KWK_SLOT_OUT_OF_RANGE, IMPORT_UNEXPECTED_KEY_TYPE, IMPORT_UNWRAP_FAILED,
            INCORRECT_CMD_LENGTH,
        };
        if blob.len() != BLOB_BYTES {
            return Err(INCORRECT_CMD_LENGTH);
        }
        let errors = [IMPORT_DKS_OUT_OF_RANGE, IMPORT_DKS_OUT_OF_RANGE, IMPORT_DKS_SLOT_NOT_EMPTY];
        self.room(dks, KEY_BYTES, errors)?;
        let (wrapping, _) = self.wrapping_key(
            kwk,
            IMPORT_KWK_SLOT_OUT_OF_RANGE,
            IMPORT_KWK_SLOT_EMPTY,
            IMPORT_UNEXPECTED_KEY_TYPE,
        )?;
        let (sealed, clear) = blob.split_at(SEALED_BYTES);
        let key = wrap::unwrap(&wrapping, &[prefix, clear], sealed)
            .map_err(|wrap::Unauthentic| IMPORT_UNWRAP_FAILED)?;
        let policy: [u8; 8] = clear[..8].try_into().map_err(|_length| IMPORT_UNWRAP_FAILED)?;
        let policy = KeyPolicy::from_le_bytes(policy).ok_or(IMPORT_UNWRAP_FAILED)?;
        self.put(dks, key, policy);
        Ok(Response::Done)
    }

    fn clear(&mut self, dks: u16, double: bool) -> Result<Response, u32> {
        use error::{CLEAR_DKS_SLOT_EMPTY, CLEAR_KEY_SIZE, CLEAR_KEYSLOT_ID_OUT_OF_RANGE};
        let entry = self.entry(dks, CLEAR_KEYSLOT_ID_OUT_OF_RANGE)?.ok_or(CLEAR_DKS_SLOT_EMPTY)?;
        if entry.is_double() != double {
            return Err(CLEAR_KEY_SIZE);
        }
        self.slots[usize::from(dks)] = None;
        Ok(Response::Done)
    }

    fn read(&self, slot: u16) -> Result<Response, u32> {
        use error::{RDWR_KEYSLOT_ID_OUT_OF_RANGE, RDWR_SECURITY_LEVEL_VIOLATION, RDWR_SKS_SLOT_EMPTY};
        let entry = self.entry(slot, RDWR_KEYSLOT_ID_OUT_OF_RANGE)?.ok_or(RDWR_SKS_SLOT_EMPTY)?;
        if entry.policy.security != Security::Software {
            return Err(RDWR_SECURITY_LEVEL_VIOLATION);
        }
        Ok(Response::Key(key_on_bus(&entry.key)))
    }

    fn write(&mut self, slot: u16, policy: KeyPolicy, key: &[u8]) -> Result<Response, u32> {
        use error::{
            RDWR_DKS_SLOT_NOT_EMPTY, RDWR_INVALID_SECURITY_LEVEL, RDWR_KEYSLOT_ID_OUT_OF_RANGE,
            RDWR_UNSUPPORTED_KEY_SIZE,
        };
        if key.len() != KEY_BYTES || policy.algorithm.key_bytes() != KEY_BYTES {
            return Err(RDWR_UNSUPPORTED_KEY_SIZE);
        }
        if policy.security == Security::Hardware {
            return Err(RDWR_INVALID_SECURITY_LEVEL);
        }
        let errors = [RDWR_KEYSLOT_ID_OUT_OF_RANGE, RDWR_KEYSLOT_ID_OUT_OF_RANGE, RDWR_DKS_SLOT_NOT_EMPTY];
        self.room(slot, KEY_BYTES, errors)?;
        self.put(slot, key_on_bus(key), policy);
        Ok(Response::Done)
    }

    fn set_tpkey(&mut self, sks: u16) -> Result<Response, u32> {
        use error::{TPKEY_KEYSLOT_ID_OUT_OF_RANGE, TPKEY_SKS_SLOT_EMPTY, TPKEY_UNEXPECTED_KEY_TYPE};
        let entry = self.entry(sks, TPKEY_KEYSLOT_ID_OUT_OF_RANGE)?.ok_or(TPKEY_SKS_SLOT_EMPTY)?;
        if entry.policy.role != Role::Transport {
            return Err(TPKEY_UNEXPECTED_KEY_TYPE);
        }
        self.transport = Some(entry.key.clone());
        Ok(Response::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WRAP: u16 = slot::TZ_WRAP_KEY as u16;
    const GENERAL: u16 = slot::TZ_GENERAL_PURPOSE1 as u16;
    const GENERAL2: u16 = slot::TZ_GENERAL_PURPOSE2 as u16;
    const TPKEY: u16 = slot::TPKEY as u16;
    const CHIP: u16 = slot::UKDK_L1 as u16;

    fn master() -> Hwkm {
        Hwkm::master(KdfVariant::V1, &[7; 32])
    }

    fn ok(hwkm: &mut Hwkm, command: &Command<'_>) -> Response {
        hwkm.run(command).unwrap_or_else(|why| panic!("{command:?}: {why}"))
    }

    fn status(hwkm: &mut Hwkm, command: &Command<'_>) -> u32 {
        let filled: Vec<bool> = hwkm.slots.iter().map(Option::is_some).collect();
        let why = hwkm.run(command).expect_err("must be refused");
        assert_eq!(why.operation, command.operation());
        assert_eq!(filled, hwkm.slots.iter().map(Option::is_some).collect::<Vec<_>>(), "{command:?}");
        why.status
    }

    fn derive_wrapping(hwkm: &mut Hwkm, context: &[u8]) {
        let recipe = Recipe::wrapping_key(context);
        let context = context_on_bus(&recipe.context);
        let (policy, binding) = (recipe.policy, recipe.binding);
        ok(hwkm, &Command::SystemKdf { dks: WRAP, kdk: CHIP, policy, binding, context: &context });
    }

    fn write(key: &[u8], slot: u16) -> Command<'_> {
        Command::KeySlotWrite { slot, policy: KeyPolicy::STORED, key }
    }

    fn export() -> Command<'static> {
        Command::KeyWrapExport { sks: GENERAL, kwk: WRAP, binding: WrapBinding::LONG_TERM, prefix: &[] }
    }

    #[test]
    fn operations_have_the_numbers_of_the_hardware() {
        let numbers = [
            Operation::NistKeygen,
            Operation::SystemKdf,
            Operation::KeyWrapExport,
            Operation::KeyUnwrapImport,
            Operation::KeySlotClear,
            Operation::KeySlotRdwr,
            Operation::SetTpkey,
        ]
        .map(|operation| operation as u8);
        assert_eq!(numbers, [0, 1, 3, 4, 5, 6, 7]);
        assert_eq!(BLOB_BYTES, 68);
    }

    #[test]
    fn a_wrapped_key_comes_back_with_its_policy_and_no_bit_of_it_can_change() {
        let mut master = master();
        derive_wrapping(&mut master, b"test");
        ok(&mut master, &write(&[0x5a; 32], GENERAL));
        let Response::Blob(blob) = ok(&mut master, &export()) else { panic!("no blob") };
        assert_eq!(blob[48..56], KeyPolicy::STORED.to_le_bytes());
        assert_eq!(blob[56..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for bit in 0..BLOB_BYTES * 8 {
            let mut changed = blob;
            changed[bit / 8] ^= 1 << (bit % 8);
            let import = Command::KeyUnwrapImport { dks: GENERAL2, kwk: WRAP, blob: &changed, prefix: &[] };
            assert_eq!(status(&mut master, &import), error::IMPORT_UNWRAP_FAILED, "bit {bit}");
        }
        let import = |prefix| Command::KeyUnwrapImport { dks: GENERAL2, kwk: WRAP, blob: &blob, prefix };
        assert_eq!(status(&mut master, &import(b"x")), error::IMPORT_UNWRAP_FAILED);
        ok(&mut master, &import(&[]));
        let entry = master.slots[usize::from(GENERAL2)].as_ref().unwrap();
        assert_eq!((&entry.key[..], entry.policy), (&[0x5a; 32][..], KeyPolicy::STORED));
    }

    #[test]
    fn every_refusal_has_its_bit_and_changes_nothing() {
        let mut master = master();
        let keygen = |dks, policy| Command::NistKeygen { dks, policy };
        assert_eq!(status(&mut master, &export()), error::EXPORT_SKS_SLOT_EMPTY);
        ok(&mut master, &write(&[1; 32], GENERAL));
        assert_eq!(status(&mut master, &write(&[1; 32], GENERAL)), error::RDWR_DKS_SLOT_NOT_EMPTY);
        assert_eq!(status(&mut master, &write(&[1; 31], GENERAL2)), error::RDWR_UNSUPPORTED_KEY_SIZE);
        assert_eq!(status(&mut master, &write(&[1; 32], 23)), error::RDWR_KEYSLOT_ID_OUT_OF_RANGE);
        assert_eq!(
            status(
                &mut master,
                &Command::KeySlotWrite { slot: GENERAL2, policy: KeyPolicy::CHIP, key: &[1; 32] }
            ),
            error::RDWR_INVALID_SECURITY_LEVEL
        );
        assert_eq!(status(&mut master, &export()), error::EXPORT_KWK_SLOT_EMPTY);
        assert_eq!(
            status(&mut master, &Command::KeySlotRead { slot: GENERAL }),
            error::RDWR_SECURITY_LEVEL_VIOLATION
        );
        assert_eq!(status(&mut master, &Command::KeySlotRead { slot: GENERAL2 }), error::RDWR_SKS_SLOT_EMPTY);
        assert_eq!(
            status(&mut master, &Command::KeySlotClear { dks: GENERAL2, double: false }),
            error::CLEAR_DKS_SLOT_EMPTY
        );
        assert_eq!(
            status(&mut master, &Command::KeySlotClear { dks: GENERAL, double: true }),
            error::CLEAR_KEY_SIZE
        );
        assert_eq!(
            status(&mut master, &Command::KeySlotClear { dks: 99, double: true }),
            error::CLEAR_KEYSLOT_ID_OUT_OF_RANGE
        );
        assert_eq!(
            status(&mut master, &keygen(GENERAL, KeyPolicy::STORED)),
            error::KEYGEN_DKS_SLOT_NOT_EMPTY
        );
        assert_eq!(
            status(&mut master, &keygen(24, KeyPolicy::STORED)),
            error::KEYGEN_KEYSLOT_ID_OUT_OF_RANGE
        );
        assert_eq!(status(&mut master, &Command::SetTpkey { sks: TPKEY }), error::TPKEY_SKS_SLOT_EMPTY);
        assert_eq!(
            status(&mut master, &Command::SetTpkey { sks: GENERAL }),
            error::TPKEY_UNEXPECTED_KEY_TYPE
        );
        assert_eq!(status(&mut master, &Command::SetTpkey { sks: 50 }), error::TPKEY_KEYSLOT_ID_OUT_OF_RANGE);
        let kdf = |dks, kdk, policy| Command::SystemKdf {
            dks,
            kdk,
            policy,
            binding: KdfBinding::CHILD,
            context: &[0; 8],
        };
        let inline = KeyPolicy::inline_key(KdfVariant::V1);
        assert_eq!(status(&mut master, &kdf(GENERAL2, GENERAL, inline)), error::KDF_DOUBLE_KEY_SLOT_NOT_EVEN);
        assert_eq!(status(&mut master, &kdf(GENERAL, GENERAL, inline)), error::KDF_KEYSLOT_SLOT);
        assert_eq!(status(&mut master, &kdf(18, GENERAL, KeyPolicy::STORED)), error::KDF_DEPTH_ERROR);
        assert_eq!(status(&mut master, &kdf(18, 20, inline)), error::KDF_KEYSLOT_SLOT);
        assert_eq!(status(&mut master, &kdf(18, 200, inline)), error::KDF_KEYSLOT_OUT_OF_RANGE);
        ok(&mut master, &kdf(18, GENERAL, inline));
        assert_eq!(status(&mut master, &kdf(20, 18, inline)), error::KDF_KDK_TYPE);
        // The second half of the double key is taken.
        assert_eq!(status(&mut master, &write(&[1; 32], 19)), error::RDWR_DKS_SLOT_NOT_EMPTY);
        assert_eq!(
            status(
                &mut master,
                &Command::SystemKdf {
                    dks: 20,
                    kdk: GENERAL,
                    policy: inline,
                    binding: KdfBinding::CHILD,
                    context: &[0; 65]
                }
            ),
            error::INCORRECT_CMD_LENGTH
        );
        derive_wrapping(&mut master, b"test");
        let export_of =
            |sks| Command::KeyWrapExport { sks, kwk: WRAP, binding: WrapBinding::LONG_TERM, prefix: &[] };
        assert_eq!(status(&mut master, &export_of(CHIP)), error::EXPORT_WRAP_EXPORT_NOT_ALLOWED);
        assert_eq!(status(&mut master, &export_of(18)), error::EXPORT_WRAP_EXPORT_NOT_ALLOWED);
        let by = |sks, kwk| Command::KeyWrapExport { sks, kwk, binding: WrapBinding::TRANSPORT, prefix: &[] };
        assert_eq!(status(&mut master, &by(GENERAL, 18)), error::EXPORT_UNEXPECTED_KEY_TYPE);
        assert_eq!(status(&mut master, &by(GENERAL, TPKEY)), error::EXPORT_KWK_SLOT_EMPTY);
        ok(&mut master, &keygen(TPKEY, KeyPolicy::TRANSPORT));
        ok(&mut master, &Command::SetTpkey { sks: TPKEY });
        assert_eq!(status(&mut master, &by(CHIP, TPKEY)), error::EXPORT_WRAP_WITH_TPKEY_NOT_ALLOWED);
        let short = Command::KeyUnwrapImport { dks: GENERAL2, kwk: WRAP, blob: &[0; 67], prefix: &[] };
        assert_eq!(status(&mut master, &short), error::INCORRECT_CMD_LENGTH);
        let full = Command::KeyUnwrapImport { dks: GENERAL, kwk: WRAP, blob: &[0; 68], prefix: &[] };
        assert_eq!(status(&mut master, &full), error::IMPORT_DKS_SLOT_NOT_EMPTY);
    }

    #[test]
    fn a_slave_is_reached_through_its_bank_only_and_shares_the_masters_transport_key() {
        let mut master = master();
        let mut slave = Hwkm::slave(KdfVariant::V1, 4);
        ok(&mut master, &Command::NistKeygen { dks: TPKEY, policy: KeyPolicy::TRANSPORT });
        ok(&mut master, &Command::SetTpkey { sks: TPKEY });
        master.share_transport_key(&mut slave);
        let bus = key_on_bus(&[3; 32]);
        ok(&mut master, &write(&bus, GENERAL));
        let transport =
            Command::KeyWrapExport { sks: GENERAL, kwk: TPKEY, binding: WrapBinding::TRANSPORT, prefix: &[] };
        let Response::Blob(blob) = ok(&mut master, &transport) else { panic!("no blob") };
        let import =
            Command::KeyUnwrapImport { dks: slot::SLAVE_STAGING, kwk: TPKEY, blob: &blob, prefix: &[] };
        assert_eq!(status(&mut slave, &import), error::BBAC_ACCESS);
        slave.set_reachable(true);
        ok(&mut slave, &import);
        let recipe = Recipe::inline_key(KdfVariant::V1);
        let context = context_on_bus(&recipe.context);
        let dks = slot::SLAVE_MAPPED + 6;
        ok(
            &mut slave,
            &Command::SystemKdf {
                dks,
                kdk: slot::SLAVE_STAGING,
                policy: recipe.policy,
                binding: recipe.binding,
                context: &context,
            },
        );
        assert_eq!(slave.mapped_key(dks).unwrap(), &**recipe.derive(KdfVariant::V1, &[3; 32]));
        slave.lose_all();
        assert!(slave.mapped_key(dks).is_none());
        assert_eq!(status(&mut slave, &import), error::BBAC_ACCESS);
        assert!(!format!("{master:?} {slave:?}").contains("3, 3"));
    }

    #[test]
    fn keys_travel_with_their_last_byte_first() {
        let mut master = master();
        let key: Vec<u8> = (0..32).collect();
        let policy = KeyPolicy { security: Security::Software, ..KeyPolicy::STORED };
        ok(&mut master, &Command::KeySlotWrite { slot: GENERAL, policy, key: &key_on_bus(&key) });
        assert_eq!(master.slots[usize::from(GENERAL)].as_ref().unwrap().key[..], key);
        let Response::Key(read) = ok(&mut master, &Command::KeySlotRead { slot: GENERAL }) else {
            panic!("no key")
        };
        assert_eq!(key_on_bus(&read)[..], key);
    }

    proptest! {
        #[test]
        fn no_blob_panics_and_none_opens(blob in prop::collection::vec(any::<u8>(), 0..120)) {
            let mut master = master();
            derive_wrapping(&mut master, b"test");
            let import = Command::KeyUnwrapImport { dks: GENERAL, kwk: WRAP, blob: &blob, prefix: &[] };
            prop_assert!(master.run(&import).is_err());
        }
    }
}
