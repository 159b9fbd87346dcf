//! AES-NI: one block per register, as on every x86-64 server since 2011.

use super::XtsKey;
use super::loops::{CONSTANTS, loops, one_block};
use crate::simd::width::GROUP;
use crate::simd::width::x128::{
    BLOCKS, BYTES, POWERS, Vector, broadcast, fetch, load, store, times, times_group, xor, zero,
};
use crate::simd::xts::xts;
use std::arch::x86_64::{
    _mm_aesdec_si128, _mm_aesdeclast_si128, _mm_aesenc_si128, _mm_aesenclast_si128, _mm_aesimc_si128,
    _mm_set1_epi32, _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_slli_si128,
};

xts!("aes,pclmulqdq,ssse3");

loops!("aes,pclmulqdq,ssse3");
one_block!("aes,pclmulqdq,ssse3");

#[inline]
#[target_feature(enable = "sse2")]
fn enter(data: Vector, key: Vector) -> Vector {
    xor(data, key)
}

#[inline]
#[target_feature(enable = "aes")]
fn round<const ENCRYPT: bool>(state: Vector, _before: Vector, after: Vector) -> Vector {
    if ENCRYPT { _mm_aesenc_si128(state, after) } else { _mm_aesdec_si128(state, after) }
}

#[inline]
#[target_feature(enable = "aes")]
fn last<const ENCRYPT: bool>(state: Vector, _before: Vector, after: Vector) -> Vector {
    if ENCRYPT { _mm_aesenclast_si128(state, after) } else { _mm_aesdeclast_si128(state, after) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn shift_in(before: Vector, _vector: Vector) -> Vector {
    before
}

/// SubWord of the last word, in every word.
#[inline]
#[target_feature(enable = "aes")]
fn sub_word(key: Vector) -> Vector {
    // With four equal columns ShiftRows changes nothing; the zero key leaves SubBytes alone. Half the latency of
    // AESKEYGENASSIST.
    _mm_aesenclast_si128(_mm_shuffle_epi32::<0xff>(key), zero())
}

/// SubWord of RotWord of the last word, plus `constant` in the lowest byte, in every word.
#[inline]
#[target_feature(enable = "aes,ssse3")]
fn sub_rot_word(key: Vector, constant: u8) -> Vector {
    let rotated = _mm_shuffle_epi8(key, _mm_set1_epi32(0x0c0f_0e0d));
    _mm_aesenclast_si128(rotated, _mm_set1_epi32(i32::from(constant)))
}

/// Each word added to all later ones.
#[inline]
#[target_feature(enable = "sse2")]
fn sums(key: Vector) -> Vector {
    let sums = xor(key, _mm_slli_si128::<4>(key));
    xor(sums, _mm_slli_si128::<8>(sums))
}

#[inline]
#[target_feature(enable = "aes")]
fn inverse_mix_columns(key: Vector) -> Vector {
    _mm_aesimc_si128(key)
}
