//! GFNI with AVX2: two blocks per register, as on Intel from Alder Lake.

use super::XtsKey;
use super::loops::loops;
use super::sbox::{INTO_AES_FIELD, INVERTED, OUT_OF_AES_FIELD, SBOX_CONSTANT};
use crate::simd::width::GROUP;
use crate::simd::width::x256::{
    BLOCKS, BYTES, POWERS, Vector, broadcast, fetch, load, rotate, splat, store, times, times_group,
    transpose, xor, zero,
};
use crate::simd::xts::xts;
use std::arch::x86_64::{
    _mm256_cvtsi256_si32, _mm256_gf2p8affine_epi64_epi8, _mm256_gf2p8affineinv_epi64_epi8,
    _mm256_set1_epi64x, _mm256_shuffle_epi8,
};

xts!("avx2,gfni,vpclmulqdq");
loops!("avx2,gfni,vpclmulqdq");

#[inline]
#[target_feature(enable = "avx2,gfni")]
fn substitute(bytes: Vector) -> Vector {
    let (into, out) = (
        _mm256_set1_epi64x(INTO_AES_FIELD.cast_signed()),
        _mm256_set1_epi64x(OUT_OF_AES_FIELD.cast_signed()),
    );
    let bytes = _mm256_gf2p8affine_epi64_epi8::<{ INVERTED }>(bytes, into);
    _mm256_gf2p8affineinv_epi64_epi8::<{ SBOX_CONSTANT }>(bytes, out)
}

#[inline]
#[target_feature(enable = "avx2")]
fn swap_bytes(words: Vector) -> Vector {
    _mm256_shuffle_epi8(words, broadcast(&super::loops::SWAPPED))
}

#[inline]
#[target_feature(enable = "avx2")]
fn first_word(words: Vector) -> u32 {
    _mm256_cvtsi256_si32(words).cast_unsigned()
}
