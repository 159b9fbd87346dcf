//! The contents of a regular file: which DUN each data unit has, and the cipher.
//!
//! | policy | DUN of data unit i |
//! | --- | --- |
//! | per-file keys | i |
//! | DIRECT_KEY | i in bits 0 to 63, nonce in bits 64 to 191 |
//! | IV_INO_LBLK_64 | i in bits 0 to 31, inode's number in bits 32 to 63 |
//! | IV_INO_LBLK_32 | (hash of the inode's number + i) modulo 2^32 |
//!
//! Source: Linux `fs/crypto/crypto.c`, `fscrypt_generate_iv`, and `inode_hash` in `keysetup.c`.

use crate::master::{ContentsKey, DeriveError, EngineFailure, InlineEngine, MasterKey, Way};
use crate::policy::{Context, Derivation};
use inlinecrypt_cipher::{Dun, KeyError, UnitCipher};
use siphasher::sip::SipHasher24;
use std::fmt;
use std::hash::Hasher as _;
use std::sync::Arc;

/// Where a file is: what keys and IVs depend on besides its context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The filesystem's UUID.
    pub uuid: [u8; 16],
    /// The inode's number.
    pub inode: u32,
}

/// DUNs of one file, directory or link.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Duns {
    derivation: Derivation,
    nonce: u128,
    inode: u32,
    /// The low half of the hash of the inode's number; zero where it is not used.
    hashed_inode: u32,
}

impl Duns {
    pub(crate) fn new(key: &MasterKey, context: &Context, place: Place) -> Self {
        let derivation = context.policy.derivation();
        let hashed_inode = match derivation {
            Derivation::IvInoLblk32 => {
                low_32(siphash(&key.inode_hash_key(), &u64::from(place.inode).to_le_bytes()))
            }
            _ => 0,
        };
        Self { derivation, nonce: u128::from_le_bytes(context.nonce), inode: place.inode, hashed_inode }
    }

    /// The DUN of data unit `index`.
    pub(crate) fn of(&self, index: u64) -> Dun {
        let (nonce_low, nonce_high) = (low_64(self.nonce), low_64(self.nonce >> 64));
        match self.derivation {
            Derivation::PerFileKey => Dun::from(index),
            Derivation::DirectKey => Dun::from_limbs([index, nonce_low, nonce_high, 0]),
            Derivation::IvInoLblk64 => Dun::from(u64::from(self.inode) << 32 | index & u64::from(u32::MAX)),
            Derivation::IvInoLblk32 => Dun::from(u64::from(self.hashed_inode.wrapping_add(low_32(index)))),
        }
    }

    /// How many units from `index` on have DUNs one after the other: with IV_INO_LBLK_32 they start at zero again within a file.
    fn run(&self, index: u64) -> u64 {
        match self.derivation {
            Derivation::PerFileKey | Derivation::DirectKey => u64::MAX - index,
            Derivation::IvInoLblk64 => (1 << 32) - (index & u64::from(u32::MAX)),
            Derivation::IvInoLblk32 => (1 << 32) - u64::from(self.hashed_inode.wrapping_add(low_32(index))),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the point of it")]
fn low_32(x: u64) -> u32 {
    x as u32
}

#[expect(clippy::cast_possible_truncation, reason = "the point of it")]
fn low_64(x: u128) -> u64 {
    x as u64
}

/// SipHash-2-4, the key as two little-endian words.
pub(crate) fn siphash(key: &[u8; 16], message: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new_with_key(key);
    hasher.write(message);
    hasher.finish()
}

/// What encrypts and decrypts the contents of one file.
pub struct FileCipher {
    cipher: Cipher,
    duns: Duns,
    unit_bytes: u32,
}

#[derive(Debug)]
enum Cipher {
    Here(Box<dyn UnitCipher>),
    Engine(Arc<dyn InlineEngine>),
}

impl FileCipher {
    /// The cipher of the file at `place` with this context, on a filesystem with blocks of `block_bytes`.
    ///
    /// # Errors
    ///
    /// If the key is none for the policy.
    pub fn new(
        key: &MasterKey,
        context: &Context,
        place: Place,
        block_bytes: u32,
    ) -> Result<Self, FileError> {
        let cipher = match key.contents_key(context, &place.uuid).map_err(FileError::Derive)? {
            ContentsKey::Engine(engine) => Cipher::Engine(engine),
            ContentsKey::Bytes(bytes) => {
                Cipher::Here(context.policy.contents().mode().info().expand(&bytes).map_err(FileError::Key)?)
            }
        };
        let unit_bytes = context.policy.data_unit_bytes(block_bytes);
        Ok(Self { cipher, duns: Duns::new(key, context, place), unit_bytes })
    }

    /// Size of a data unit, in bytes.
    #[must_use]
    pub const fn unit_bytes(&self) -> u32 {
        self.unit_bytes
    }

    /// The DUN of data unit `index` of the file.
    #[must_use]
    pub fn dun(&self, index: u64) -> Dun {
        self.duns.of(index)
    }

    /// Encrypts whole data units in place, the first being unit `index` of the file.
    ///
    /// # Errors
    ///
    /// Those of the engine, if one has the key.
    ///
    /// # Panics
    ///
    /// If `data` is not a whole number of data units.
    pub fn encrypt(&self, index: u64, data: &mut [u8]) -> Result<(), EngineFailure> {
        self.crypt(Way::Encrypt, index, data)
    }

    /// Decrypts whole data units in place, the first being unit `index` of the file.
    ///
    /// # Errors
    ///
    /// Those of the engine, if one has the key.
    ///
    /// # Panics
    ///
    /// If `data` is not a whole number of data units.
    pub fn decrypt(&self, index: u64, data: &mut [u8]) -> Result<(), EngineFailure> {
        self.crypt(Way::Decrypt, index, data)
    }

    fn crypt(&self, way: Way, mut index: u64, mut data: &mut [u8]) -> Result<(), EngineFailure> {
        let unit = self.unit_bytes as usize;
        while !data.is_empty() {
            let run_bytes = usize::try_from(self.duns.run(index)).unwrap_or(usize::MAX).saturating_mul(unit);
            let (run, rest) = data.split_at_mut(run_bytes.min(data.len()));
            let dun = self.duns.of(index);
            match (&self.cipher, way) {
                (Cipher::Here(cipher), Way::Encrypt) => cipher.encrypt(dun, unit, run),
                (Cipher::Here(cipher), Way::Decrypt) => cipher.decrypt(dun, unit, run),
                (Cipher::Engine(engine), _) => engine.crypt(way, dun, self.unit_bytes, run)?,
            }
            index = index.wrapping_add((run.len() / unit) as u64);
            data = rest;
        }
        Ok(())
    }
}

impl fmt::Debug for FileCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileCipher({:?}, unit {})", self.cipher, self.unit_bytes)
    }
}

/// Why a file's cipher cannot be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileError {
    /// No key for this policy comes from the master key.
    Derive(DeriveError),
    /// The derived key is refused: halves that are equal, which chance does not bring about.
    Key(KeyError),
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Derive(why) => why.fmt(f),
            Self::Key(why) => write!(f, "the derived key cannot be used: {why}"),
        }
    }
}

impl std::error::Error for FileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Derive(why) => Some(why),
            Self::Key(why) => Some(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{ContentsMode, KeyRef, Policy};
    use inlinecrypt_cipher::names::NamesMode;

    /// Units one by one, each under its own DUN, are what a long run gives; also where DUNs start at zero again.
    #[test]
    fn dun_wraps_within_a_file_and_not_into_bit_32() {
        let key = MasterKey::raw(&[9; 64]).unwrap();
        let policy = Policy::new(
            ContentsMode::Aes256Xts,
            NamesMode::Aes256Cts,
            4,
            Derivation::IvInoLblk32,
            0,
            KeyRef::Identifier(key.name().identifier),
        );
        let context = Context { policy: policy.unwrap(), nonce: [1; 16] };
        let file = FileCipher::new(&key, &context, Place { uuid: [2; 16], inode: 77 }, 512).unwrap();
        let to_the_top = (1 << 32) - file.dun(0).limbs()[0];
        let first = to_the_top - 2;
        let duns: Vec<u64> = (0..4).map(|i| file.dun(first + i).limbs()[0]).collect();
        assert_eq!(duns, [0xffff_fffe, 0xffff_ffff, 0, 1]);
        let mut whole = vec![5; 4 * 512];
        file.encrypt(first, &mut whole).unwrap();
        for (i, unit) in (0..).zip(whole.chunks(512)) {
            let mut alone = vec![5; 512];
            file.encrypt(first + i, &mut alone).unwrap();
            assert_eq!(alone, unit, "{i}");
        }
        file.decrypt(first, &mut whole).unwrap();
        assert_eq!(whole, vec![5; 4 * 512]);
    }
}
