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

use zeroize::Zeroize;

/// How often the message is hashed, each time with the key shifted by 16 bytes.
const PASSES: usize = 4;
/// Message bytes that one hash takes at the most.
pub(crate) const MESSAGE_BYTES_MAX: usize = 1024;
const KEY_WORDS: usize = MESSAGE_BYTES_MAX / 4 + (PASSES - 1) * 4;
/// Length of the key.
pub(crate) const KEY_BYTES: usize = KEY_WORDS * 4;

/// An NH key. Wipes itself.
pub(crate) struct Key {
    words: [u32; KEY_WORDS],
}

impl Key {
    /// The key whose words are the little-endian ones of `bytes`.
    ///
    /// # Panics
    ///
    /// If `bytes` are not [`KEY_BYTES`].
    pub(crate) fn new(bytes: &[u8]) -> Box<Self> {
        assert_eq!(bytes.len(), KEY_BYTES);
        // Boxed before it is filled, so that no copy stays behind on the stack.
        let mut key = Box::new(Self { words: [0; KEY_WORDS] });
        for (word, bytes) in key.words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        key
    }

    /// The hash of `message`, in two halves of 16 bytes.
    ///
    /// # Panics
    ///
    /// If `message` is longer than [`MESSAGE_BYTES_MAX`], or not a multiple of 16 bytes long.
    pub(crate) fn hash(&self, message: &[u8]) -> [[u8; 16]; 2] {
        assert!(message.len() <= MESSAGE_BYTES_MAX && message.len().is_multiple_of(16));
        let (units, _) = message.as_chunks();
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2, asked on the line above, which is all that the function needs.
            // WHY UNSAFE: doubles the speed of all of Adiantum on units of 4096 bytes (measured with benches/cipher.rs).
            return to_bytes(unsafe { sums_avx2(&self.words, units) });
        }
        to_bytes(sums(&self.words, units))
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.words.zeroize();
    }
}

fn to_bytes(sums: [u64; PASSES]) -> [[u8; 16]; 2] {
    let pair = |low: u64, high: u64| (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
    [pair(sums[0], sums[1]), pair(sums[2], sums[3])]
}

/// The definition, word by word.
#[inline(always)]
fn sums(key: &[u32; KEY_WORDS], units: &[[u8; 16]]) -> [u64; PASSES] {
    let mut sums = [0_u64; PASSES];
    for (unit, key) in units.iter().zip(key.windows(4 * PASSES).step_by(4)) {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(unit.as_chunks().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        for (sum, key) in sums.iter_mut().zip(key.chunks_exact(4)) {
            let added = |i: usize| u64::from(words[i].wrapping_add(key[i]));
            *sum = sum.wrapping_add(added(0) * added(2)).wrapping_add(added(1) * added(3));
        }
    }
    sums
}

/// The same with two passes per 256-bit register.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sums_avx2(key: &[u32; KEY_WORDS], units: &[[u8; 16]]) -> [u64; PASSES] {
    use std::arch::x86_64::{
        __m256i, _mm_set_epi64x, _mm256_add_epi32, _mm256_add_epi64, _mm256_broadcastsi128_si256,
        _mm256_extract_epi64, _mm256_loadu_si256, _mm256_mul_epu32, _mm256_setzero_si256,
        _mm256_shuffle_epi32,
    };

    /// Adds to `sum` the products of `words` + `key`: per 128-bit lane, words 0 * 2 in its lower half, 1 * 3 in its upper.
    #[target_feature(enable = "avx2")]
    fn accumulate(sum: __m256i, words: __m256i, key: &[u32; 8]) -> __m256i {
        // SAFETY: an unaligned load of the 32 bytes that `key` borrows.
        let key = unsafe { _mm256_loadu_si256(key.as_ptr().cast()) };
        let added = _mm256_add_epi32(words, key);
        let (zero_one, two_three) =
            (_mm256_shuffle_epi32::<0x10>(added), _mm256_shuffle_epi32::<0x32>(added));
        _mm256_add_epi64(sum, _mm256_mul_epu32(zero_one, two_three))
    }

    let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    for (unit, key) in units.iter().zip(key.windows(4 * PASSES).step_by(4)) {
        let halves: &[[u8; 8]] = unit.as_chunks().0;
        let words = _mm256_broadcastsi128_si256(_mm_set_epi64x(
            i64::from_le_bytes(halves[1]),
            i64::from_le_bytes(halves[0]),
        ));
        let (keys, _) = key.as_chunks();
        low = accumulate(low, words, &keys[0]);
        high = accumulate(high, words, &keys[1]);
    }
    let sum = |a: i64, b: i64| a.wrapping_add(b).cast_unsigned();
    [
        sum(_mm256_extract_epi64::<0>(low), _mm256_extract_epi64::<1>(low)),
        sum(_mm256_extract_epi64::<2>(low), _mm256_extract_epi64::<3>(low)),
        sum(_mm256_extract_epi64::<0>(high), _mm256_extract_epi64::<1>(high)),
        sum(_mm256_extract_epi64::<2>(high), _mm256_extract_epi64::<3>(high)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn vector_code_equals_its_portable_twin(
            key in prop::collection::vec(any::<u8>(), KEY_BYTES),
            message in prop::collection::vec(any::<u8>(), 0..=MESSAGE_BYTES_MAX),
        ) {
            let key = Key::new(&key);
            let message = &message[..message.len() / 16 * 16];
            prop_assert_eq!(key.hash(message), to_bytes(sums(&key.words, message.as_chunks().0)));
        }
    }

    #[test]
    fn carries_are_dropped_where_the_definition_says() {
        // All ones plus all ones is 2^32 - 2 in every word, so each unit adds 2 * (2^32 - 2)^2 to each sum.
        let key = Key::new(&[0xff; KEY_BYTES]);
        let product = (u64::from(u32::MAX) - 1).pow(2);
        let expected = (0..128).fold(0_u64, |sum, _| sum.wrapping_add(product));
        assert_eq!(key.hash(&[0xff; MESSAGE_BYTES_MAX]), to_bytes([expected; PASSES]));
    }
}
