//! Adiantum with XChaCha12 and AES-256: `adiantum(xchacha12,aes)` of Linux.
//!
//! A wide-block mode: every ciphertext bit of a data unit depends on every plaintext bit of it. The unit is split into
//! a long left part and the last 16 bytes:
//!
//! ```text
//!        left                      right
//!          |------- hash --- + ----->|
//!          |                     AES-256
//!      XChaCha12 <----- nonce -------|
//!          |------- hash --- - ----->|
//! ```
//!
//! where + and - are modulo 2^128, little-endian, and the hash is the sum of two:
//!
//! - Poly1305 of the left part's length in bits (16 bytes) and the IV (32 bytes: the whole DUN);
//! - Poly1305, under another key, of the left part's NH hashes: 32 bytes for each 1024 of it.
//!
//! Both leave out Poly1305's final addition of a one-time key.
//!
//! Source: Crowley and Biggers, "Adiantum: length-preserving encryption for entry-level processors" (IACR ToSC 2018/4),
//! sections 2 to 4 and 6.4; Linux `crypto/adiantum.c` and `crypto/nhpoly1305.c` for the sizes.
//!
//! Data units are worked on sixteen at a time: first the hash and the block of each, then the streams' keys of all, then the
//! streams, and the second hash while a unit is still in the first-level cache.

use crate::names::{MessageCipher, assert_message};
use crate::poly1305;
use crate::simd::adiantum::{Kernel, StreamKeys, UNITS_MAX, nh};
use crate::unit::{assert_promise, low_128_bits};
use crate::{Dun, Mode, UnitCipher};
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, KeyIvInit, StreamCipher};
use aes::{Aes256, Block};
use chacha20::XChaCha12;
use std::fmt;
use zeroize::Zeroizing;

/// Adiantum with a key of 32 bytes.
pub(crate) fn xchacha12_aes(key: &[u8]) -> Box<dyn UnitCipher> {
    xchacha12_aes_by(Kernel::best(), key)
}

/// The same by one of our kernels.
pub(crate) fn xchacha12_aes_by(kernel: Kernel, key: &[u8]) -> Box<dyn UnitCipher> {
    Box::new(Adiantum::new(kernel, key))
}

/// The same for messages of any length.
pub(crate) fn xchacha12_aes_messages(key: &[u8]) -> Box<dyn MessageCipher> {
    Box::new(Adiantum::new(Kernel::best(), key))
}

/// Length of the right part: one AES block.
const RIGHT_BYTES: usize = 16;
/// Length of a Poly1305 key without its one-time half.
const POLY_KEY_BYTES: usize = 16;
/// What is derived from the key: AES-256's, the two Poly1305 keys, and NH's.
const DERIVED_BYTES: usize = 32 + POLY_KEY_BYTES + POLY_KEY_BYTES + nh::KEY_BYTES;
/// Data units that go together are no more than this, so that they are still in the second-level cache when they are needed again.
const RUN_BYTES: usize = 128 * 1024;
/// And what is hashed right after it was encrypted, likewise for the first-level cache.
const STRETCH_BYTES: usize = 16 * 1024;

struct Adiantum {
    stream_key: Zeroizing<[u8; 32]>,
    block: Aes256,
    header_hash: poly1305::Key,
    message_hash: poly1305::Key,
    nh: Box<nh::Key>,
    kernel: Kernel,
}

impl Adiantum {
    fn new(kernel: Kernel, key: &[u8]) -> Self {
        let stream_key =
            Zeroizing::new(<[u8; 32]>::try_from(key).expect("length checked by ModeInfo::expand"));
        // Linux crypto/adiantum.c, adiantum_setkey: the derived keys are the key stream under the nonce 1.
        let mut nonce = [0; 24];
        nonce[0] = 1;
        let mut derived = Zeroizing::new([0; DERIVED_BYTES]);
        XChaCha12::new(&Array(*stream_key), &Array(nonce)).apply_keystream(&mut *derived);
        let (block_key, rest) = derived.split_at(32);
        let (header_key, rest) =
            rest.split_first_chunk().expect("DERIVED_BYTES has room for two Poly1305 keys");
        let (message_key, nh_key) =
            rest.split_first_chunk().expect("DERIVED_BYTES has room for two Poly1305 keys");
        Self {
            block: Aes256::new_from_slice(block_key).expect("split off 32 bytes"),
            header_hash: poly1305::Key::new(header_key),
            message_hash: poly1305::Key::new(message_key),
            nh: nh::Key::new(nh_key),
            stream_key,
            kernel,
        }
    }

    /// The hashes of left length and IV, which both hash steps add, of one data unit after the other.
    fn header_hashes(&self, left_bytes: usize, first: Dun) -> impl Iterator<Item = u128> {
        let length = (left_bytes as u128 * 8).to_le_bytes();
        let whole = move |dun: Dun| {
            let iv = dun.to_le_bytes();
            let (iv, _) = iv.as_chunks();
            self.header_hash.hash(&[length, iv[0], iv[1]])
        };
        let mut next = (first, whole(first));
        std::iter::repeat_with(move || {
            let (dun, hash) = next;
            let dun = dun.wrapping_add(1);
            // The next number changes the second block alone, by one, unless it carries into the third.
            let carries = low_128_bits(dun) == 0;
            let following =
                if carries { whole(dun) } else { hash.plus(self.header_hash.step_of_second_of_three()) };
            next = (dun, following);
            hash.finish()
        })
    }

    /// The hash of the left part.
    fn hash_message(&self, left: &[u8]) -> u128 {
        /// Messages of NH whose hashes are as many blocks as Poly1305 takes at once.
        const TOGETHER: usize = 4;
        if !left.len().is_multiple_of(16) {
            // Only names come here. NH takes words of 16 bytes; zeroes fill up the last (Linux crypto/nhpoly1305.c).
            let mut padded = Zeroizing::new(vec![0; left.len().next_multiple_of(16)]);
            padded[..left.len()].copy_from_slice(left);
            return self.hash_message(&padded);
        }
        let mut sum = poly1305::Sum::default();
        for part in left.chunks(TOGETHER * nh::MESSAGE_BYTES_MAX) {
            let mut hashes = [[[0; 16]; 2]; TOGETHER];
            let messages = part.chunks(nh::MESSAGE_BYTES_MAX);
            let hashes = &mut hashes[..messages.len()];
            for (hash, message) in hashes.iter_mut().zip(messages) {
                *hash = self.kernel.nh(&self.nh, message);
            }
            sum = self.message_hash.append(sum, hashes.as_flattened());
        }
        sum.finish()
    }

    /// Encrypts or decrypts up to [`UNITS_MAX`] data units; `header_hashes` are theirs, and `keys` room for those of their streams.
    fn crypt_run<const ENCRYPT: bool>(
        &self,
        header_hashes: &mut impl Iterator<Item = u128>,
        keys: &mut StreamKeys,
        unit_bytes: usize,
        run: &mut [u8],
    ) {
        let count = run.len() / unit_bytes;
        let (mut headers, mut blocks) = ([0; UNITS_MAX], [[0; 16]; UNITS_MAX]);
        let (headers, blocks) = (&mut headers[..count], &mut blocks[..count]);
        let units = run.chunks_exact_mut(unit_bytes);
        for (((header, block), unit), hash) in
            headers.iter_mut().zip(&mut *blocks).zip(units).zip(header_hashes)
        {
            let (left, right) = split(unit);
            *header = hash;
            let middle = u128::from_le_bytes(*right).wrapping_add(hash).wrapping_add(self.hash_message(left));
            *block = middle.to_le_bytes();
        }
        // The nonce of a stream is the block's ciphertext, whichever way we go.
        if ENCRYPT {
            self.block.encrypt_blocks(Block::cast_slice_from_core_mut(blocks));
            self.kernel.stream_keys(&self.stream_key, blocks, keys);
        } else {
            self.kernel.stream_keys(&self.stream_key, blocks, keys);
            self.block.decrypt_blocks(Block::cast_slice_from_core_mut(blocks));
        }
        let stretch_units = (STRETCH_BYTES / unit_bytes).max(1);
        let mut done = headers.iter().zip(&*blocks);
        for (stretch, first_unit) in
            run.chunks_mut(stretch_units * unit_bytes).zip((0..).step_by(stretch_units))
        {
            self.kernel.apply_streams(keys, first_unit, unit_bytes, stretch);
            for (unit, (header, block)) in stretch.chunks_exact_mut(unit_bytes).zip(&mut done) {
                let (left, right) = split(unit);
                let middle = u128::from_le_bytes(*block);
                *right = middle.wrapping_sub(*header).wrapping_sub(self.hash_message(left)).to_le_bytes();
            }
        }
    }

    fn crypt<const ENCRYPT: bool>(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        assert_promise(Mode::Adiantum, unit_bytes, data.len());
        let mut header_hashes = self.header_hashes(unit_bytes - RIGHT_BYTES, first);
        let mut keys = StreamKeys::new();
        let run_units = (RUN_BYTES / unit_bytes).clamp(1, UNITS_MAX);
        for run in data.chunks_mut(run_units * unit_bytes) {
            self.crypt_run::<ENCRYPT>(&mut header_hashes, &mut keys, unit_bytes, run);
        }
    }

    fn crypt_message<const ENCRYPT: bool>(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        let mut header_hashes = self.header_hashes(message.len() - RIGHT_BYTES, dun);
        self.crypt_run::<ENCRYPT>(&mut header_hashes, &mut StreamKeys::new(), message.len(), message);
    }
}

impl UnitCipher for Adiantum {
    fn encrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt::<true>(first, unit_bytes, data);
    }

    fn decrypt(&self, first: Dun, unit_bytes: usize, data: &mut [u8]) {
        self.crypt::<false>(first, unit_bytes, data);
    }
}

impl MessageCipher for Adiantum {
    fn encrypt(&self, dun: Dun, message: &mut [u8]) {
        self.crypt_message::<true>(dun, message);
    }

    fn decrypt(&self, dun: Dun, message: &mut [u8]) {
        self.crypt_message::<false>(dun, message);
    }
}

impl fmt::Debug for Adiantum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stream_key: _, block: _, header_hash: _, message_hash: _, nh: _, kernel } = self;
        f.debug_struct("Adiantum").field("kernel", kernel).finish_non_exhaustive()
    }
}

/// A unit's left part and its last 16 bytes.
fn split(unit: &mut [u8]) -> (&mut [u8], &mut [u8; RIGHT_BYTES]) {
    unit.split_last_chunk_mut().expect("a data unit has 16 bytes or more")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_following_ivs_are_those_of_each() {
        let cipher = Adiantum::new(Kernel::best(), &[7; 32]);
        // Three before each carry that there is, and one that lies in the midst.
        let max = u64::MAX;
        let firsts =
            [[max - 2, 5, 6, 7], [max - 2, max, 6, 7], [max - 2, max, max, 7], [max - 2; 4], [1, 2, 3, 4]];
        for first in firsts.map(Dun::from_limbs) {
            let hashes: Vec<_> = cipher.header_hashes(496, first).take(40).collect();
            for (hash, step) in hashes.into_iter().zip(0..) {
                let alone = cipher.header_hashes(496, first.wrapping_add(step)).next();
                assert_eq!(Some(hash), alone, "{first:?} + {step}");
            }
        }
    }
}
