//! Keys. The form is the type; identity is the handle, never the bytes.
//!
//! ```text
//! RawKey --import--> LongTermWrappedKey --prepare--> EphemeralWrappedKey --program--> a keyslot
//!          generate-----^      (stored)               (this boot)       \--derive--> SoftwareSecret
//! ```

use crate::config::{ConfigNumbers, CryptoConfig, DataUnitSize, Hardware, InvalidKey, KeyType, Mode};
use inlinecrypt_cipher::KeyError;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

/// Most bytes of a raw key (`BLK_CRYPTO_MAX_RAW_KEY_SIZE`).
pub const RAW_KEY_BYTES_MAX: usize = 64;
/// Most bytes of a wrapped key, long-term or ephemeral (`BLK_CRYPTO_MAX_HW_WRAPPED_KEY_SIZE`).
pub const WRAPPED_KEY_BYTES_MAX: usize = 128;
/// Bytes of a software secret (`BLK_CRYPTO_SW_SECRET_SIZE`).
pub const SOFTWARE_SECRET_BYTES: usize = 32;
/// Bytes of a key's public name (`FSCRYPT_KEY_IDENTIFIER_SIZE`).
pub const KEY_IDENTIFIER_BYTES: usize = 16;

/// Bytes that are wiped when dropped and do not print.
struct Secret(Zeroizing<Box<[u8]>>);

impl Secret {
    fn copy_of(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(bytes.into()))
    }

    fn debug(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{name}({} bytes)", self.0.len())
    }
}

/// Key bytes as they are. The only form that must never leave the process that encrypts.
pub struct RawKey(Secret);

impl RawKey {
    /// Copies `bytes`; wiping the original is the caller's duty.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(Secret::copy_of(bytes))
    }

    /// The bytes. Grep for this name to see who looks.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0.0
    }
}

impl fmt::Debug for RawKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("RawKey", f)
    }
}

/// A key wrapped for storage: survives restarts, opened only by the engine whose root wrapped it.
pub struct LongTermWrappedKey(Secret);

impl LongTermWrappedKey {
    /// Copies `blob`. Whether it authenticates is for the engine to say.
    #[must_use]
    pub fn new(blob: &[u8]) -> Self {
        Self(Secret::copy_of(blob))
    }

    /// The blob.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0.0
    }
}

impl fmt::Debug for LongTermWrappedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("LongTermWrappedKey", f)
    }
}

/// A key wrapped for this boot of its engine: useless after a restart.
pub struct EphemeralWrappedKey(Secret);

impl EphemeralWrappedKey {
    /// Copies `blob`. Whether it authenticates is for the engine to say.
    #[must_use]
    pub fn new(blob: &[u8]) -> Self {
        Self(Secret::copy_of(blob))
    }

    /// The blob.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0.0
    }
}

impl fmt::Debug for EphemeralWrappedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("EphemeralWrappedKey", f)
    }
}

/// A secret that software may see, derived by the engine from a wrapped key and independent of its inline key.
pub struct SoftwareSecret(Zeroizing<[u8; SOFTWARE_SECRET_BYTES]>);

impl SoftwareSecret {
    /// Takes over the bytes.
    #[must_use]
    pub fn new(bytes: Zeroizing<[u8; SOFTWARE_SECRET_BYTES]>) -> Self {
        Self(bytes)
    }

    /// The bytes. Grep for this name to see who looks.
    #[must_use]
    pub fn expose(&self) -> &[u8; SOFTWARE_SECRET_BYTES] {
        &self.0
    }
}

impl fmt::Debug for SoftwareSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SoftwareSecret")
    }
}

/// A raw key that an engine keeps: what its owner has left is a ticket, with which nobody can encrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepositedKey {
    /// By what the engine finds the key again. Never 0, and no secret.
    pub ticket: u64,
    /// Length of the key, in bytes.
    pub len_bytes: usize,
    /// Whether its two halves are equal, which XTS refuses.
    pub has_equal_halves: bool,
    /// Its public name, as [`Engine::key_identifier`](crate::engine::Engine::key_identifier) gives it.
    pub identifier: [u8; KEY_IDENTIFIER_BYTES],
}

/// The form in which a key is used for I/O.
#[derive(Debug)]
pub enum KeyForm {
    /// The bytes themselves.
    Raw(RawKey),
    /// A raw key that the engine keeps ([`Engine::deposit`](crate::engine::Engine::deposit)).
    Deposited(DepositedKey),
    /// A blob of this boot.
    Wrapped(EphemeralWrappedKey),
}

impl KeyForm {
    /// Length of the key or blob, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        match self {
            Self::Raw(key) => key.expose().len(),
            Self::Deposited(key) => key.len_bytes,
            Self::Wrapped(blob) => blob.as_bytes().len(),
        }
    }

    fn key_type(&self) -> KeyType {
        match self {
            Self::Raw(_) | Self::Deposited(_) => KeyType::Raw,
            Self::Wrapped(_) => KeyType::HardwareWrapped,
        }
    }
}

/// Which key: a handle, unique in this process and never used again. Says nothing about the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(u64);

impl KeyId {
    fn next() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        // Relaxed: only uniqueness matters.
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// An identity chosen by a test or a simulation.
    #[must_use]
    pub const fn for_simulation(number: u64) -> Self {
        Self(number)
    }

    /// The handle as a number, for status displays and simulations.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({})", self.0)
    }
}

/// A key with the config it is for (`struct blk_crypto_key`): immutable, shared by [`Arc`], identified by handle.
///
/// Two keys made from the same bytes are two keys.
#[derive(Debug)]
pub struct Key {
    id: KeyId,
    config: CryptoConfig,
    form: KeyForm,
}

impl Key {
    /// Checks numbers and bytes from outside, in the kernel's order, and makes a key of them.
    ///
    /// # Errors
    ///
    /// The first rule broken, see [`InvalidKey`].
    pub fn init(numbers: ConfigNumbers, bytes: &[u8]) -> Result<Arc<Self>, InvalidKey> {
        let mode = Mode::ALL
            .into_iter()
            .find(|mode| mode.info().linux_number.is_some_and(|number| u32::from(number) == numbers.mode))
            .ok_or(InvalidKey::UnknownMode(numbers.mode))?;
        if numbers.flags & !ConfigNumbers::ALLOW_HW != 0 {
            return Err(InvalidKey::UnknownFlag(numbers.flags & !ConfigNumbers::ALLOW_HW));
        }
        let hardware = if numbers.flags & ConfigNumbers::ALLOW_HW != 0 {
            Hardware::Allowed
        } else {
            Hardware::Forbidden
        };
        let form = match numbers.key_type {
            1 => KeyForm::Raw(RawKey::new(bytes)),
            2 => KeyForm::Wrapped(EphemeralWrappedKey::new(bytes)),
            other => return Err(InvalidKey::UnknownKeyType(other)),
        };
        Self::checked(mode, numbers.data_unit_size, numbers.dun_bytes, form, hardware)
    }

    /// A key for `mode`, with data units of `data_unit_bytes` and DUNs of up to `dun_bytes`.
    ///
    /// # Errors
    ///
    /// The first rule broken, see [`InvalidKey`].
    pub fn new(
        mode: Mode,
        data_unit_size: DataUnitSize,
        dun_bytes: u8,
        form: KeyForm,
        hardware: Hardware,
    ) -> Result<Arc<Self>, InvalidKey> {
        Self::checked(mode, data_unit_size.bytes(), dun_bytes.into(), form, hardware)
    }

    fn checked(
        mode: Mode,
        data_unit_bytes: u32,
        dun_bytes: u32,
        form: KeyForm,
        hardware: Hardware,
    ) -> Result<Arc<Self>, InvalidKey> {
        let info = mode.info();
        let actual = form.len_bytes();
        let (min, max) = match form {
            KeyForm::Raw(_) | KeyForm::Deposited(_) => (info.key_bytes, info.key_bytes),
            KeyForm::Wrapped(_) => (info.security_bytes, WRAPPED_KEY_BYTES_MAX),
        };
        if !(min..=max).contains(&actual) {
            return Err(InvalidKey::KeySize { actual, min, max });
        }
        if matches!(form, KeyForm::Wrapped(_)) && hardware == Hardware::Forbidden {
            return Err(InvalidKey::WrappedWithoutHardware);
        }
        let dun_bytes = u8::try_from(dun_bytes)
            .ok()
            .filter(|bytes| (1..=info.iv_bytes).contains(bytes))
            .ok_or(InvalidKey::DunBytes { actual: dun_bytes, max: info.iv_bytes })?;
        let data_unit_size =
            DataUnitSize::from_bytes(data_unit_bytes).ok_or(InvalidKey::DataUnitSize(data_unit_bytes))?;
        if data_unit_bytes > info.unit_bytes_max {
            return Err(InvalidKey::DataUnitTooLarge { actual: data_unit_bytes, max: info.unit_bytes_max });
        }
        if let KeyForm::Raw(key) = &form {
            info.check_key(key.expose()).map_err(|why| match why {
                KeyError::EqualHalves => InvalidKey::EqualHalves,
                KeyError::WrongLength { expected, actual } => {
                    InvalidKey::KeySize { actual, min: expected, max: expected }
                }
            })?;
        }
        if let KeyForm::Deposited(DepositedKey { has_equal_halves: true, .. }) = form
            && info.refuses_equal_halves()
        {
            return Err(InvalidKey::EqualHalves);
        }
        let config = CryptoConfig { mode, data_unit_size, dun_bytes, key_type: form.key_type(), hardware };
        Ok(Arc::new(Self { id: KeyId::next(), config, form }))
    }

    /// Which key this is.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// What an engine must be able to do to serve it.
    #[must_use]
    pub fn config(&self) -> &CryptoConfig {
        &self.config
    }

    /// The key's form, for the engine that opens it.
    #[must_use]
    pub fn form(&self) -> &KeyForm {
        &self.form
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: ConfigNumbers =
        ConfigNumbers { mode: 1, flags: 1, key_type: 1, dun_bytes: 8, data_unit_size: 4096 };

    fn xts_key() -> [u8; 64] {
        std::array::from_fn(|i| u8::try_from(i).unwrap())
    }

    fn refusal(numbers: ConfigNumbers, bytes: &[u8]) -> InvalidKey {
        Key::init(numbers, bytes).expect_err("must be refused")
    }

    #[test]
    fn rules_are_checked_in_the_kernels_order() {
        // Everything wrong at once; each fix uncovers the next rule.
        let mut numbers =
            ConfigNumbers { mode: 0, flags: 0x80, key_type: 9, dun_bytes: 0, data_unit_size: 3000 };
        let mut bytes = vec![7; 10];
        assert_eq!(refusal(numbers, &bytes), InvalidKey::UnknownMode(0));
        numbers.mode = 5;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::UnknownMode(5));
        numbers.mode = 1;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::UnknownFlag(0x80));
        numbers.flags = 0;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::UnknownKeyType(9));
        numbers.key_type = 2;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::KeySize { actual: 10, min: 32, max: 128 });
        bytes = vec![7; 32];
        assert_eq!(refusal(numbers, &bytes), InvalidKey::WrappedWithoutHardware);
        numbers.key_type = 1;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::KeySize { actual: 32, min: 64, max: 64 });
        bytes = vec![7; 64];
        assert_eq!(refusal(numbers, &bytes), InvalidKey::DunBytes { actual: 0, max: 16 });
        numbers.dun_bytes = 17;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::DunBytes { actual: 17, max: 16 });
        numbers.dun_bytes = 16;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::DataUnitSize(3000));
        numbers.data_unit_size = 1 << 25;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::DataUnitTooLarge { actual: 1 << 25, max: 1 << 24 });
        numbers.data_unit_size = 4096;
        assert_eq!(refusal(numbers, &bytes), InvalidKey::EqualHalves);
        assert!(Key::init(numbers, &xts_key()).is_ok());
    }

    #[test]
    fn wrapped_keys_are_bounded_by_strength_and_room() {
        let wrapped = ConfigNumbers { key_type: 2, ..GOOD };
        for (len, fits) in [(31, false), (32, true), (128, true), (129, false)] {
            assert_eq!(Key::init(wrapped, &vec![1; len]).is_ok(), fits, "{len} bytes");
        }
    }

    #[test]
    fn a_data_unit_of_one_byte_is_accepted_here_as_in_linux() {
        assert!(Key::init(ConfigNumbers { data_unit_size: 1, ..GOOD }, &xts_key()).is_ok());
        assert_eq!(
            refusal(ConfigNumbers { data_unit_size: 0, ..GOOD }, &xts_key()),
            InvalidKey::DataUnitSize(0)
        );
    }

    #[test]
    fn the_same_bytes_twice_are_two_keys() {
        let (a, b) = (Key::init(GOOD, &xts_key()).unwrap(), Key::init(GOOD, &xts_key()).unwrap());
        assert_ne!(a.id(), b.id());
    }

    #[test]
    fn keys_do_not_print() {
        let key = Key::init(GOOD, &xts_key()).unwrap();
        let text = format!("{key:?} {:?}", RawKey::new(&[0xab; 32]));
        assert!(text.contains("RawKey(64 bytes)") && text.contains("RawKey(32 bytes)"), "{text}");
        assert!(!text.contains("171"), "{text}");
    }
}
