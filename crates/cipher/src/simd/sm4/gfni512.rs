//! GFNI with AVX-512: four blocks per register, as on Intel from Ice Lake and on AMD from Zen 4.

use super::XtsKey;
use super::loops::loops;
use super::sbox::{INTO_AES_FIELD, INVERTED, OUT_OF_AES_FIELD, SBOX_CONSTANT};
use crate::simd::width::powers;
use crate::simd::width::x512::{
    BLOCKS, BYTES, Vector, broadcast, fetch, load, rotate, splat, store, times, transpose, xor, zero,
};
use crate::simd::xts::xts;
use std::arch::x86_64::{
    _mm512_bslli_epi128, _mm512_clmulepi64_epi128, _mm512_cvtsi512_si32, _mm512_gf2p8affine_epi64_epi8,
    _mm512_gf2p8affineinv_epi64_epi8, _mm512_set1_epi64, _mm512_shuffle_epi8,
};

xts!("avx512f,avx512bw,gfni,vpclmulqdq");
loops!("avx512f,avx512bw,gfni,vpclmulqdq");

/// Twice as many as elsewhere: a round waits for the one before, and four chains of four vectors fill the CPU.
const GROUP: usize = 16;
static POWERS: [[u8; BYTES]; GROUP] = powers();

#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times_group(tweaks: Vector) -> Vector {
    // x^64: half a block.
    let carry = _mm512_clmulepi64_epi128::<0x11>(tweaks, load(&POWERS[0]));
    xor(_mm512_bslli_epi128::<8>(tweaks), carry)
}

#[inline]
#[target_feature(enable = "avx512f,gfni")]
fn substitute(bytes: Vector) -> Vector {
    let (into, out) =
        (_mm512_set1_epi64(INTO_AES_FIELD.cast_signed()), _mm512_set1_epi64(OUT_OF_AES_FIELD.cast_signed()));
    let bytes = _mm512_gf2p8affine_epi64_epi8::<{ INVERTED }>(bytes, into);
    _mm512_gf2p8affineinv_epi64_epi8::<{ SBOX_CONSTANT }>(bytes, out)
}

#[inline]
#[target_feature(enable = "avx512bw")]
fn swap_bytes(words: Vector) -> Vector {
    _mm512_shuffle_epi8(words, broadcast(&super::loops::SWAPPED))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn first_word(words: Vector) -> u32 {
    _mm512_cvtsi512_si32(words).cast_unsigned()
}
