//! NH, the fast half of Adiantum's hash: 1024 bytes of message to 32 bytes.
//!
//! A message of up to 1024 bytes, a multiple of 16, is seen as 32-bit words. Pass p of four adds the key from word 4p
//! on to the message, and sums the products of words two apart:
//!
//! ```text
//!   sum(p) = SUM over j = 0, 4, 8 .. of (m[j] + k[4p+j]) * (m[j+2] + k[4p+j+2])
//!                                     + (m[j+1] + k[4p+j+1]) * (m[j+3] + k[4p+j+3])
//! ```
//!
//! with additions modulo 2^32, products of 64 bits, sums modulo 2^64. Everything is little-endian.
//!
//! Source: Crowley and Biggers (see [`adiantum`](crate::adiantum)), section 6.1; Linux `include/crypto/nhpoly1305.h`
//! for passes and strides.

use crate::simd::wipe;

/// How often the message is hashed, each time with the key shifted by 16 bytes.
pub(super) const PASSES: usize = 4;
/// Message bytes that one hash takes at the most.
pub(crate) const MESSAGE_BYTES_MAX: usize = 1024;
/// Length of the key.
pub(crate) const KEY_BYTES: usize = MESSAGE_BYTES_MAX + (PASSES - 1) * 16;

/// An NH key. Wipes itself.
#[repr(C, align(64))]
pub(crate) struct Key {
    bytes: [u8; KEY_BYTES],
    /// The same, of each four words the inner two swapped: where vector code wants them.
    pub(super) paired: [u8; KEY_BYTES],
}

impl Key {
    /// The key of these bytes.
    ///
    /// # Panics
    ///
    /// If they are not [`KEY_BYTES`].
    pub(crate) fn new(bytes: &[u8]) -> Box<Self> {
        // Boxed before it is filled, so that no copy stays behind on the stack.
        let mut key = Box::new(Self { bytes: [0; KEY_BYTES], paired: [0; KEY_BYTES] });
        key.bytes.copy_from_slice(bytes);
        key.paired.copy_from_slice(bytes);
        for four in key.paired.as_chunks_mut::<4>().0.chunks_exact_mut(4) {
            four.swap(1, 2);
        }
        key
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        let Self { bytes, paired } = self;
        wipe(bytes);
        wipe(paired);
    }
}

/// Four words of a message or a key.
fn words(four: &[u8; 16]) -> [u32; 4] {
    let (words, _) = four.as_chunks();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

/// The definition, word by word. `fours` are 64 at the most.
pub(super) fn sums(key: &Key, fours: &[[u8; 16]]) -> [[u8; 16]; 2] {
    let (keys, _) = key.bytes.as_chunks();
    let mut sums = [0_u64; PASSES];
    for (four, keys) in fours.iter().zip(keys.windows(PASSES)) {
        let message = words(four);
        for (sum, key) in sums.iter_mut().zip(keys) {
            let key = words(key);
            let added = |i: usize| u64::from(message[i].wrapping_add(key[i]));
            *sum = sum.wrapping_add(added(0) * added(2)).wrapping_add(added(1) * added(3));
        }
    }
    let pair = |low: u64, high: u64| (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
    [pair(sums[0], sums[1]), pair(sums[2], sums[3])]
}

/// NH of vectors. A kernel's file has what [`width`](crate::simd::width) lists, and
///
/// - `load_part`: fewer blocks than a vector has, zeroes in place of the others; and ones in every bit of the blocks that are there;
/// - `pair`: of each four words the inner two swapped: a pair that is multiplied then lies in one half of the block;
/// - `multiply_pairs`: of each two words the product, 64 bits;
/// - `add_words`, `add_doubles`: the sums of words of 32 and of 64 bits;
/// - `totals`: of each vector the sum of all its words of 64 bits.
#[cfg(target_arch = "x86_64")]
macro_rules! nh {
    ($features:tt) => {
        use super::nh::{self, PASSES};

        /// The sums of a message of 64 times 16 bytes at the most.
        #[target_feature(enable = $features)]
        pub(super) fn nh_sums(key: &nh::Key, fours: &[[u8; 16]]) -> [[u8; 16]; 2] {
            let (vectors, rest) = fours.as_flattened().as_chunks::<BYTES>();
            let mut sums = [zero(); PASSES];
            // The keys of a vector: each pass's begin 16 bytes after those of the pass before.
            let keys = |i: usize| {
                key.paired[i * BYTES..].first_chunk::<KEYS_BYTES>().expect("64 times 16 bytes at the most")
            };
            for (i, vector) in vectors.iter().enumerate() {
                let words = pair(load(vector));
                let keys = keys(i);
                for_group!(pass => {
                    let added = add_words(words, load(keys[16 * pass..].first_chunk().expect("PASSES of them")));
                    sums[pass] = add_doubles(sums[pass], multiply_pairs(added));
                }, 0, 1, 2, 3);
            }
            if !rest.is_empty() {
                let (words, mask) = load_part(rest.as_chunks().0);
                let words = pair(words);
                let keys = keys(vectors.len());
                for_group!(pass => {
                    // Where there is no message there is no product, whatever the key.
                    let added = add_words(words, load(keys[16 * pass..].first_chunk().expect("PASSES of them")));
                    sums[pass] = add_doubles(sums[pass], multiply_pairs(and(added, mask)));
                }, 0, 1, 2, 3);
            }
            totals(sums)
        }

        /// Keys that one vector needs: its length, and 16 bytes for each further pass.
        const KEYS_BYTES: usize = BYTES + (PASSES - 1) * 16;
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use nh;
