//! AES-NI: one block per register, as on every x86-64 server since 2011. AES's S-box, between two linear maps, is SM4's.

use super::XtsKey;
use super::loops::loops;
use super::sbox::{AES_TO_SM4, AES_TO_SM4_CONSTANT, INTO_AES_FIELD, INVERTED, nibbles};
use crate::simd::width::GROUP;
use crate::simd::width::x128::{
    BLOCKS, BYTES, POWERS, Vector, broadcast, fetch, load, rotate, splat, store, times, times_group,
    transpose, xor, zero,
};
use crate::simd::xts::xts;
use std::arch::x86_64::{
    _mm_aesenclast_si128, _mm_and_si128, _mm_cvtsi128_si32, _mm_set1_epi8, _mm_shuffle_epi8, _mm_srli_epi32,
};

xts!("aes,pclmulqdq,ssse3");
loops!("aes,pclmulqdq,ssse3");

/// Where ShiftRows takes the bytes from that it puts into their places, backwards.
static ROWS_SHIFTED_BACK: [u8; 16] = [0, 13, 10, 7, 4, 1, 14, 11, 8, 5, 2, 15, 12, 9, 6, 3];

#[inline]
#[target_feature(enable = "aes,ssse3")]
fn substitute(bytes: Vector) -> Vector {
    let into = const { &nibbles(INTO_AES_FIELD, INVERTED) };
    let out = const { &nibbles(AES_TO_SM4, AES_TO_SM4_CONSTANT) };
    // The zero key leaves SubBytes, and ShiftRows, which is undone.
    let substituted = _mm_aesenclast_si128(map(bytes, into), zero());
    map(_mm_shuffle_epi8(substituted, load(&ROWS_SHIFTED_BACK)), out)
}

/// A linear map and a constant, as the tables of what it makes of the lower and of the upper half of a byte: tables in a
/// register, so that no address depends on a byte.
#[inline]
#[target_feature(enable = "ssse3")]
fn map(bytes: Vector, [low, high]: &[[u8; 16]; 2]) -> Vector {
    let mask = _mm_set1_epi8(15);
    let low = _mm_shuffle_epi8(load(low), _mm_and_si128(bytes, mask));
    let high = _mm_shuffle_epi8(load(high), _mm_and_si128(_mm_srli_epi32::<4>(bytes), mask));
    xor(low, high)
}

#[inline]
#[target_feature(enable = "ssse3")]
fn swap_bytes(words: Vector) -> Vector {
    _mm_shuffle_epi8(words, load(&super::loops::SWAPPED))
}

#[inline]
#[target_feature(enable = "sse2")]
fn first_word(words: Vector) -> u32 {
    _mm_cvtsi128_si32(words).cast_unsigned()
}
