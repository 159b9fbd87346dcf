//! XTS (IEEE 1619-2018, SP 800-38E): AES-256, SM4 and AES-128.
//!
//! The key is two keys: the first encrypts the data, the second turns the IV into the first block's tweak. Each
//! further block's tweak is the one before times x in GF(2^128):
//!
//! ```text
//!   T(0) = E(key 2, IV)      T(j+1) = T(j) * x      C(j) = E(key 1, P(j) ^ T(j)) ^ T(j)
//! ```
//!
//! - The IV is the low 16 bytes of the DUN, little-endian.
//! - A data unit is a whole number of blocks, so ciphertext stealing never happens here.
//! - AES-256 and SM4 come from our own kernels (`simd::aes`, `simd::sm4`); if the CPU has not the instructions for them, AES-256
//!   from AWS-LC and SM4 from the generic code below. So do AES-128, and the portable twins that the tests compare with.

use crate::simd::aes::{Kernel, XtsKey};
use crate::simd::xts::double;
use crate::simd::{awslc, sm4 as simd_sm4};
use crate::unit::{assert_promise, low_128_bits};
use crate::{Dun, Mode, UnitCipher};
use aes::cipher::{
    Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16,
};
use std::fmt;

/// AES-256-XTS with a key of 64 bytes: first the data key, then the tweak key.
pub(crate) fn aes_256(key: &[u8]) -> Box<dyn UnitCipher> {
    match Kernel::best() {
        Some(kernel) => aes_256_by(kernel, key),
        None => aes_256_by_library(key),
    }
}

/// The same by one of our kernels.
pub(crate) fn aes_256_by(kernel: Kernel, key: &[u8]) -> Box<dyn UnitCipher> {
    XtsKey::new(kernel, key.try_into().expect("length checked by ModeInfo::expand"))
}

/// The same by AWS-LC, for CPUs without AES instructions and for comparison.
pub(crate) fn aes_256_by_library(key: &[u8]) -> Box<dyn UnitCipher> {
    Box::new(Aes256Xts { key: awslc::Key::new(awslc::Algorithm::Aes256Xts, key) })
}

/// SM4-XTS with a key of 32 bytes: first the data key, then the tweak key. The doubling is that of IEEE 1619 (Linux's
/// `xts` template), not the one of GB/T 17964-2021, which differs from the second block on.
pub(crate) fn sm4(key: &[u8]) -> Box<dyn UnitCipher> {
    match simd_sm4::Kernel::best() {
        Some(kernel) => sm4_by(kernel, key),
        None => sm4_by_library(key),
    }
}

/// The same by one of our kernels.
pub(crate) fn sm4_by(kernel: simd_sm4::Kernel, key: &[u8]) -> Box<dyn UnitCipher> {
    simd_sm4::XtsKey::new(kernel, key.try_into().expect("length checked by ModeInfo::expand"))
}

/// The same by the library, for other CPUs and for comparison. It looks its S-box up in memory: not constant time.
pub(crate) fn sm4_by_library(key: &[u8]) -> Box<dyn UnitCipher> {
    Box::new(Xts::<sm4::Sm4>::new(Mode::Sm4Xts, key))
}

/// AES-128-XTS with a key of 32 bytes: first the data key, then the tweak key.
pub(crate) fn aes_128(key: &[u8]) -> Box<dyn UnitCipher> {
    Box::new(Xts::<aes::Aes128>::new(Mode::Aes128Xts, key))
}

impl UnitCipher for XtsKey {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Aes256Xts, unit_bytes, data.len());
        self.encrypt_units(low_128_bits(first), unit_bytes, data);
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Aes256Xts, unit_bytes, data.len());
        self.decrypt_units(low_128_bits(first), unit_bytes, data);
    }
}

impl UnitCipher for simd_sm4::XtsKey {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Sm4Xts, unit_bytes, data.len());
        self.encrypt_units(low_128_bits(first), unit_bytes, data);
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Sm4Xts, unit_bytes, data.len());
        self.decrypt_units(low_128_bits(first), unit_bytes, data);
    }
}

/// AES-256-XTS by AWS-LC.
#[derive(Debug)]
struct Aes256Xts {
    key: awslc::Key<64>,
}

impl Aes256Xts {
    fn crypt(&self, direction: awslc::Direction, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Aes256Xts, unit_bytes, data.len());
        self.key.with(direction, |context| {
            let mut iv = low_128_bits(first);
            for unit in data.chunks_exact_mut(unit_bytes) {
                context.crypt(&iv.to_le_bytes(), unit);
                iv = iv.wrapping_add(1);
            }
        });
    }
}

impl UnitCipher for Aes256Xts {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt(awslc::Direction::Encrypt, first, unit_bytes, data);
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt(awslc::Direction::Decrypt, first, unit_bytes, data);
    }
}

/// Blocks that are transformed together, so that a cipher with vector code gets enough of them at once.
const BATCH: usize = 32;

/// XTS over any block cipher with 16-byte blocks. It wipes itself: the ciphers do.
struct Xts<C> {
    mode: Mode,
    data: C,
    tweak: C,
}

impl<C> Xts<C>
where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>,
{
    fn new(mode: Mode, key: &[u8]) -> Self {
        let (data, tweak) = key.split_at(key.len() / 2);
        let expand = |half| C::new_from_slice(half).expect("length checked by ModeInfo::expand");
        Self { mode, data: expand(data), tweak: expand(tweak) }
    }

    /// Calls `transform` for up to [`BATCH`] blocks at a time, each with its tweak added before and after.
    fn crypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8], transform: impl Fn(&mut [Block<C>])) {
        assert_promise(self.mode, unit_bytes, data.len());
        let mut iv = low_128_bits(first);
        for unit in data.chunks_exact_mut(unit_bytes) {
            //= IEEE 1619-2018 5.1: the data unit number becomes the tweak as a little-endian array of 16 bytes.
            let mut block: Block<C> = Array(iv.to_le_bytes());
            self.tweak.encrypt_block(&mut block);
            let mut tweak = u128::from_le_bytes(block.0);
            let (blocks, rest) = Block::<C>::slice_as_chunks_mut(unit);
            debug_assert!(rest.is_empty(), "a power of two from 16 is a whole number of blocks");
            for blocks in blocks.chunks_mut(BATCH) {
                let first = tweak;
                tweak = add_tweaks(first, blocks);
                transform(blocks);
                add_tweaks(first, blocks);
            }
            iv = iv.wrapping_add(1);
        }
    }
}

impl<C> UnitCipher for Xts<C>
where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt(first, unit_bytes, data, |blocks| self.data.encrypt_blocks(blocks));
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt(first, unit_bytes, data, |blocks| self.data.decrypt_blocks(blocks));
    }
}

impl<C> fmt::Debug for Xts<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, data: _, tweak: _ } = self;
        f.debug_struct("Xts").field("mode", mode).finish_non_exhaustive()
    }
}

/// Adds to each block its tweak, the first block's being `tweak`; returns the one after the last block's.
fn add_tweaks(mut tweak: u128, blocks: &mut [Array<u8, U16>]) -> u128 {
    for block in blocks {
        block.0 = (u128::from_le_bytes(block.0) ^ tweak).to_le_bytes();
        tweak = double(tweak);
    }
    tweak
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Two implementations that share no code but the unit loop.
        #[test]
        fn the_library_equals_its_portable_twin(
            key in prop::array::uniform32(any::<u8>()),
            limbs in prop::array::uniform4(any::<u64>()),
            log2 in 4..13_u32,
            units in 1..5_usize,
            fill in any::<u8>(),
        ) {
            let key: Vec<u8> = key.iter().copied().chain(key.iter().map(|b| !b)).collect();
            let (library, portable) = (aes_256_by_library(&key), Xts::<aes::Aes256>::new(Mode::Aes256Xts, &key));
            let unit_bytes = 1 << log2;
            let plain = vec![fill; units * unit_bytes];
            let dun = Dun::from_limbs(limbs);

            let (mut one, mut other) = (plain.clone(), plain.clone());
            library.encrypt(dun, unit_bytes, &mut one);
            portable.encrypt(dun, unit_bytes, &mut other);
            prop_assert!(one == other);
            library.decrypt(dun, unit_bytes, &mut one);
            portable.decrypt(dun, unit_bytes, &mut other);
            prop_assert!(one == plain && other == plain);
        }
    }

    /// OpenSSL's evpciph_sm4.txt, XTSStandard = IEEE, has 56 bytes: what follows the two blocks in `vectors/` is
    /// reached by ciphertext stealing, which puts the start of the third block's ciphertext last.
    #[test]
    fn sm4_gives_the_published_start_of_a_third_block() {
        let bytes = |digits: &str| hex::decode(digits).unwrap();
        let key = bytes("2b7e151628aed2a6abf7158809cf4f3c000102030405060708090a0b0c0d0e0f");
        // The IV f0 f1 .. ff, as little-endian limbs.
        let dun = Dun::from_limbs([0xf7f6_f5f4_f3f2_f1f0, 0xfffe_fdfc_fbfa_f9f8, 0, 0]);
        let mut data = bytes("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        data.extend(bytes("30c81c46a35ce411e5fbc1191a0a52ef"));
        data.resize(64, 0);
        for cipher in [sm4(&key), sm4_by_library(&key)] {
            let mut data = data.clone();
            cipher.encrypt(dun, 64, &mut data);
            assert_eq!(data[32..40], bytes("27d16c0db6d2cfc7"));
        }
    }
}
