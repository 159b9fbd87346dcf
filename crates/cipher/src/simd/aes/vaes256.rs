//! VAES with AVX2: two blocks per register, as on Intel from Alder Lake and on AMD from Zen 3.

use super::XtsKey;
use super::loops::loops;
use crate::simd::width::GROUP;
use crate::simd::width::x256::{
    BLOCKS, BYTES, POWERS, Vector, broadcast, fetch, load, store, times, times_group, xor, zero,
};
use crate::simd::xts::xts;
use std::arch::x86_64::{
    _mm256_aesdec_epi128, _mm256_aesdeclast_epi128, _mm256_aesenc_epi128, _mm256_aesenclast_epi128,
    _mm256_permute2x128_si256,
};

xts!("avx2,vaes,vpclmulqdq");

loops!("avx2,vaes,vpclmulqdq");

#[inline]
#[target_feature(enable = "avx2")]
fn enter(data: Vector, key: Vector) -> Vector {
    xor(data, key)
}

#[inline]
#[target_feature(enable = "avx2,vaes")]
fn round<const ENCRYPT: bool>(state: Vector, _before: Vector, after: Vector) -> Vector {
    if ENCRYPT { _mm256_aesenc_epi128(state, after) } else { _mm256_aesdec_epi128(state, after) }
}

#[inline]
#[target_feature(enable = "avx2,vaes")]
fn last<const ENCRYPT: bool>(state: Vector, _before: Vector, after: Vector) -> Vector {
    if ENCRYPT { _mm256_aesenclast_epi128(state, after) } else { _mm256_aesdeclast_epi128(state, after) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn shift_in(before: Vector, vector: Vector) -> Vector {
    _mm256_permute2x128_si256::<0x21>(before, vector)
}
