//! Policies and contexts: what says how a directory tree is encrypted, as it lies on the disk.
//!
//! A *policy* is modes, flags, data unit size and the name of a master key. A *context* is a policy and the file's own nonce; the
//! filesystem keeps one for each encrypted file.
//!
//! ```text
//!   version 1, 28 bytes: 1  contents  names  flags                          descriptor: 8   nonce: 16
//!   version 2, 40 bytes: 2  contents  names  flags  log2(unit)  0  0  0     identifier: 16  nonce: 16
//! ```
//!
//! Source: Linux `include/uapi/linux/fscrypt.h` and `fs/crypto/policy.c`.

use inlinecrypt_cipher::Mode;
use inlinecrypt_cipher::names::NamesMode;
use std::fmt;

/// Length of a file's nonce, in bytes.
pub const NONCE_BYTES: usize = 16;

/// Longest context, in bytes.
pub const CONTEXT_BYTES_MAX: usize = V2_BYTES;

const V1_BYTES: usize = 28;
const V2_BYTES: usize = 40;

/// How names are padded: two bits of the flags.
const FLAGS_PAD: u8 = 0x03;
const FLAG_DIRECT_KEY: u8 = 0x04;
const FLAG_IV_INO_LBLK_64: u8 = 0x08;
const FLAG_IV_INO_LBLK_32: u8 = 0x10;

/// What a policy names its master key by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyRef {
    /// Version 1: a descriptor that whoever added the key has chosen.
    Descriptor([u8; 8]),
    /// Version 2: computed from the key.
    Identifier([u8; 16]),
}

/// As hexadecimal digits.
impl fmt::Display for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: &[u8] = match self {
            Self::Descriptor(bytes) => bytes,
            Self::Identifier(bytes) => bytes,
        };
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The mode that file contents are encrypted with, as fscrypt numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ContentsMode {
    /// 1
    Aes256Xts,
    /// 5
    Aes128CbcEssiv,
    /// 7
    Sm4Xts,
    /// 9
    Adiantum,
}

impl ContentsMode {
    /// The mode of this number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Aes256Xts),
            5 => Some(Self::Aes128CbcEssiv),
            7 => Some(Self::Sm4Xts),
            9 => Some(Self::Adiantum),
            _ => None,
        }
    }

    /// fscrypt's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Aes256Xts => 1,
            Self::Aes128CbcEssiv => 5,
            Self::Sm4Xts => 7,
            Self::Adiantum => 9,
        }
    }

    /// The cipher.
    #[must_use]
    pub const fn mode(self) -> Mode {
        match self {
            Self::Aes256Xts => Mode::Aes256Xts,
            Self::Aes128CbcEssiv => Mode::Aes128CbcEssiv,
            Self::Sm4Xts => Mode::Sm4Xts,
            Self::Adiantum => Mode::Adiantum,
        }
    }
}

/// The number that fscrypt gives a mode for names.
#[must_use]
pub const fn names_number(mode: NamesMode) -> u8 {
    match mode {
        NamesMode::Aes256Cts => 4,
        NamesMode::Aes128Cts => 6,
        NamesMode::Sm4Cts => 8,
        NamesMode::Adiantum => 9,
        NamesMode::Aes256Hctr2 => 10,
    }
}

fn names_from_number(number: u8) -> Option<NamesMode> {
    NamesMode::ALL.into_iter().find(|&mode| names_number(mode) == number)
}

/// How keys and IVs of files are made. At most one of these may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Derivation {
    /// Each file has a key of its own, and its data units are counted from zero.
    PerFileKey,
    /// One key for the mode; the IV has the file's nonce.
    DirectKey,
    /// One key for the mode and filesystem; the DUN is the inode's number above 32 bits of the unit's: for UFS.
    IvInoLblk64,
    /// The same with a hash of the inode's number, to which the unit's is added in 32 bits: for eMMC.
    IvInoLblk32,
}

impl Derivation {
    /// The name of Linux's flag, or `per-file keys`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PerFileKey => "per-file keys",
            Self::DirectKey => "DIRECT_KEY",
            Self::IvInoLblk64 => "IV_INO_LBLK_64",
            Self::IvInoLblk32 => "IV_INO_LBLK_32",
        }
    }
}

/// How a directory tree is encrypted. There are only such as Linux would accept on some filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    contents: ContentsMode,
    names: NamesMode,
    padding: u8,
    derivation: Derivation,
    log2_data_unit: u8,
    key: KeyRef,
}

impl Policy {
    /// A policy; of version 1 if `key` is a descriptor. `padding_bytes` is what names are padded to a multiple of: 4, 8, 16 or
    /// 32. `log2_data_unit` is 0 for data units of the filesystem's block size.
    ///
    /// # Errors
    ///
    /// Says which rule is broken.
    pub fn new(
        contents: ContentsMode,
        names: NamesMode,
        padding_bytes: u8,
        derivation: Derivation,
        log2_data_unit: u8,
        key: KeyRef,
    ) -> Result<Self, ContextError> {
        let padding = (0..4).find(|&code| 4 << code == padding_bytes).ok_or(ContextError::Padding)?;
        let policy = Self { contents, names, padding, derivation, log2_data_unit, key };
        policy.check()?;
        Ok(policy)
    }

    /// Linux `fs/crypto/policy.c`, `fscrypt_supported_policy`, as far as no filesystem is asked.
    fn check(&self) -> Result<(), ContextError> {
        let Self { contents, names, padding: _, derivation, log2_data_unit, key } = *self;
        let modes = match (contents, names) {
            (ContentsMode::Aes256Xts, NamesMode::Aes256Cts)
            | (ContentsMode::Aes128CbcEssiv, NamesMode::Aes128Cts)
            | (ContentsMode::Adiantum, NamesMode::Adiantum) => true,
            (ContentsMode::Aes256Xts, NamesMode::Aes256Hctr2) | (ContentsMode::Sm4Xts, NamesMode::Sm4Cts) => {
                matches!(key, KeyRef::Identifier(_))
            }
            _ => false,
        };
        if !modes {
            return Err(ContextError::Modes(contents.number(), names_number(names)));
        }
        match derivation {
            Derivation::PerFileKey => {}
            Derivation::DirectKey if contents == ContentsMode::Adiantum => {}
            Derivation::IvInoLblk64 | Derivation::IvInoLblk32
                if contents == ContentsMode::Aes256Xts && matches!(key, KeyRef::Identifier(_)) => {}
            other => return Err(ContextError::Derivation(other)),
        }
        if log2_data_unit != 0 && !(9..=16).contains(&log2_data_unit) {
            return Err(ContextError::DataUnit(log2_data_unit));
        }
        Ok(())
    }

    /// The mode of file contents.
    #[must_use]
    pub const fn contents(&self) -> ContentsMode {
        self.contents
    }

    /// The mode of names and of the targets of symbolic links.
    #[must_use]
    pub const fn names(&self) -> NamesMode {
        self.names
    }

    /// What names are padded to a multiple of, in bytes: 4, 8, 16 or 32.
    #[must_use]
    pub const fn padding_bytes(&self) -> usize {
        4 << self.padding
    }

    /// How keys and IVs are made.
    #[must_use]
    pub const fn derivation(&self) -> Derivation {
        self.derivation
    }

    /// Size of a data unit of contents in bytes, on a filesystem with blocks of `block_bytes`.
    #[must_use]
    pub const fn data_unit_bytes(&self, block_bytes: u32) -> u32 {
        if self.log2_data_unit == 0 { block_bytes } else { 1 << self.log2_data_unit }
    }

    /// The master key's name.
    #[must_use]
    pub const fn key(&self) -> KeyRef {
        self.key
    }

    /// 1 or 2.
    #[must_use]
    pub const fn version(&self) -> u8 {
        match self.key {
            KeyRef::Descriptor(_) => 1,
            KeyRef::Identifier(_) => 2,
        }
    }

    /// The flags as they lie on the disk.
    #[must_use]
    pub const fn flags(&self) -> u8 {
        self.padding
            | match self.derivation {
                Derivation::PerFileKey => 0,
                Derivation::DirectKey => FLAG_DIRECT_KEY,
                Derivation::IvInoLblk64 => FLAG_IV_INO_LBLK_64,
                Derivation::IvInoLblk32 => FLAG_IV_INO_LBLK_32,
            }
    }
}

/// On one line: modes, derivation, data unit, padding, key.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { contents, names, derivation, log2_data_unit, key, .. } = self;
        write!(f, "v{}, {} / {}, {}", self.version(), contents.mode(), names, derivation.name())?;
        if *log2_data_unit != 0 {
            write!(f, ", data unit {}", 1_u32 << log2_data_unit)?;
        }
        write!(f, ", names padded to {}, key {key}", self.padding_bytes())
    }
}

/// A policy and the file's nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Context {
    /// How the file is encrypted.
    pub policy: Policy,
    /// What makes it differ from other files of the policy. Not secret.
    pub nonce: [u8; NONCE_BYTES],
}

impl Context {
    /// Reads a context as it lies on the disk.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ContextError> {
        let &[version, contents, names, flags, ref rest @ ..] = bytes else {
            return Err(ContextError::Length(bytes.len()));
        };
        let expected = match version {
            1 => V1_BYTES,
            2 => V2_BYTES,
            other => return Err(ContextError::Version(other)),
        };
        if bytes.len() != expected {
            return Err(ContextError::Length(bytes.len()));
        }
        let (rest, nonce) = rest.split_last_chunk().ok_or(ContextError::Length(bytes.len()))?;
        let (log2_data_unit, key) = match *rest {
            [a, b, c, d, e, f, g, h] => (0, KeyRef::Descriptor([a, b, c, d, e, f, g, h])),
            [log2, 0, 0, 0, ref identifier @ ..] => {
                let identifier = identifier.try_into();
                (log2, KeyRef::Identifier(identifier.map_err(|_len| ContextError::Length(bytes.len()))?))
            }
            _ => return Err(ContextError::Reserved),
        };
        let derivation = match flags & !FLAGS_PAD {
            0 => Derivation::PerFileKey,
            FLAG_DIRECT_KEY => Derivation::DirectKey,
            FLAG_IV_INO_LBLK_64 => Derivation::IvInoLblk64,
            FLAG_IV_INO_LBLK_32 => Derivation::IvInoLblk32,
            _ => return Err(ContextError::Flags(flags)),
        };
        let policy = Policy {
            contents: ContentsMode::from_number(contents).ok_or(ContextError::Modes(contents, names))?,
            names: names_from_number(names).ok_or(ContextError::Modes(contents, names))?,
            padding: flags & FLAGS_PAD,
            derivation,
            log2_data_unit,
            key,
        };
        policy.check()?;
        Ok(Self { policy, nonce: *nonce })
    }

    /// The context as it lies on the disk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self { policy, nonce } = self;
        let mut bytes =
            vec![policy.version(), policy.contents.number(), names_number(policy.names), policy.flags()];
        match &policy.key {
            KeyRef::Descriptor(descriptor) => bytes.extend(descriptor),
            KeyRef::Identifier(identifier) => {
                bytes.extend([policy.log2_data_unit, 0, 0, 0]);
                bytes.extend(identifier);
            }
        }
        bytes.extend(nonce);
        bytes
    }
}

/// What is wrong with a context or policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextError {
    /// Not the length that its version has.
    Length(usize),
    /// A version that we do not know.
    Version(u8),
    /// Modes for contents and names that do not go together, or are not known.
    Modes(u8, u8),
    /// Flags that are not known, or exclude each other.
    Flags(u8),
    /// A derivation that does not go with these modes or this version.
    Derivation(Derivation),
    /// A data unit of 2 to the power of this.
    DataUnit(u8),
    /// Bytes that have to be zero are not.
    Reserved,
    /// Padding is to 4, 8, 16 or 32 bytes.
    Padding,
}

impl fmt::Display for ContextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(len) => {
                write!(
                    f,
                    "the encryption context has {len} bytes, and is 28 (version 1) or 40 (version 2) long"
                )
            }
            Self::Version(version) => {
                write!(f, "the encryption context has version {version}, and 1 and 2 are known")
            }
            Self::Modes(contents, names) => write!(
                f,
                "the encryption context has modes {contents} (contents) and {names} (names), which do not go together"
            ),
            Self::Flags(flags) => {
                write!(
                    f,
                    "the encryption context has flags {flags:#04x}, which are not known or exclude each other"
                )
            }
            Self::Derivation(derivation) => {
                write!(
                    f,
                    "the encryption context has {}, which does not go with its modes",
                    derivation.name()
                )
            }
            Self::DataUnit(log2) => {
                write!(
                    f,
                    "the encryption context has data units of 2^{log2} bytes, and 2^9 to 2^16 are possible"
                )
            }
            Self::Reserved => f.write_str("the encryption context has bytes set that are reserved"),
            Self::Padding => f.write_str("names are padded to 4, 8, 16 or 32 bytes"),
        }
    }
}

impl std::error::Error for ContextError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v2(edit: impl FnOnce(&mut Vec<u8>)) -> Result<Context, ContextError> {
        let mut bytes = vec![2, 1, 4, 3, 0, 0, 0, 0];
        bytes.extend([0xa5; 16]);
        bytes.extend([0x5a; 16]);
        edit(&mut bytes);
        Context::parse(&bytes)
    }

    #[test]
    fn what_linux_accepts_is_read_and_what_it_refuses_is_not() {
        let good = v2(|_| {}).unwrap();
        assert_eq!(good.policy.contents(), ContentsMode::Aes256Xts);
        assert_eq!(good.policy.padding_bytes(), 32);
        assert_eq!(good.policy.data_unit_bytes(4096), 4096);
        assert_eq!(v2(|b| b[4] = 9).unwrap().policy.data_unit_bytes(4096), 512);
        assert_eq!(v2(|b| b[0] = 3), Err(ContextError::Version(3)));
        assert_eq!(v2(|b| b[0] = 1), Err(ContextError::Length(40)));
        assert_eq!(v2(|b| b[1] = 2), Err(ContextError::Modes(2, 4)));
        assert_eq!(v2(|b| b[2] = 6), Err(ContextError::Modes(1, 6)));
        assert_eq!(v2(|b| b[3] = 0x18), Err(ContextError::Flags(0x18)));
        assert_eq!(v2(|b| b[3] = 0x20), Err(ContextError::Flags(0x20)));
        assert_eq!(v2(|b| b[3] = 4), Err(ContextError::Derivation(Derivation::DirectKey)));
        assert_eq!(v2(|b| b[4] = 8), Err(ContextError::DataUnit(8)));
        assert_eq!(v2(|b| b[6] = 1), Err(ContextError::Reserved));
        assert_eq!(v2(|b| b.truncate(39)), Err(ContextError::Length(39)));
        assert_eq!(Context::parse(&[]), Err(ContextError::Length(0)));
    }

    #[test]
    fn version_1_knows_fewer_modes_and_no_data_unit() {
        let mut bytes = vec![1, 1, 4, 2];
        bytes.extend([7; 8]);
        bytes.extend([8; 16]);
        let context = Context::parse(&bytes).unwrap();
        assert_eq!(context.policy.key(), KeyRef::Descriptor([7; 8]));
        assert_eq!(context.to_bytes(), bytes);
        bytes[2] = 10;
        assert_eq!(Context::parse(&bytes), Err(ContextError::Modes(1, 10)));
        bytes[2] = 4;
        bytes[3] = 8;
        assert_eq!(Context::parse(&bytes), Err(ContextError::Derivation(Derivation::IvInoLblk64)));
    }

    proptest! {
        /// Whatever is accepted is written back as it was: nothing of it is ignored.
        #[test]
        fn no_bit_of_a_context_is_without_meaning(
            start in prop_oneof![Just(vec![1_u8, 1, 4, 3]), Just(vec![2, 9, 9, 0, 12]), Just(vec![2, 1, 10, 8])],
            len in prop_oneof![Just(28_usize), Just(40), 0..60_usize],
            flip in any::<proptest::sample::Index>(),
        ) {
            let mut bytes = start;
            bytes.resize(len, 0);
            if !bytes.is_empty() {
                let bit = flip.index(bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            if let Ok(context) = Context::parse(&bytes) {
                prop_assert_eq!(context.to_bytes(), bytes);
            }
        }
    }
}
