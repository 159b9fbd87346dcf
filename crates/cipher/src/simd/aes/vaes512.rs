//! VAES with AVX-512: four blocks per register, as on Intel from Ice Lake and on AMD from Zen 4.

use super::XtsKey;
use super::loops::loops;
use crate::simd::width::GROUP;
use crate::simd::width::x512::{
    BLOCKS, BYTES, POWERS, Vector, broadcast, fetch, load, store, times, times_group, xor, zero,
};
use crate::simd::xts::xts;
use std::arch::x86_64::{
    _mm512_aesdec_epi128, _mm512_aesdeclast_epi128, _mm512_aesenc_epi128, _mm512_aesenclast_epi128,
    _mm512_alignr_epi64,
};

xts!("avx512f,avx512bw,vaes,vpclmulqdq");

loops!("avx512f,avx512bw,vaes,vpclmulqdq");

#[inline]
#[target_feature(enable = "avx512f")]
fn enter(data: Vector, key: Vector) -> Vector {
    xor(data, key)
}

#[inline]
#[target_feature(enable = "avx512f,vaes")]
fn round<const ENCRYPT: bool>(state: Vector, _before: Vector, after: Vector) -> Vector {
    if ENCRYPT { _mm512_aesenc_epi128(state, after) } else { _mm512_aesdec_epi128(state, after) }
}

#[inline]
#[target_feature(enable = "avx512f,vaes")]
fn last<const ENCRYPT: bool>(state: Vector, _before: Vector, after: Vector) -> Vector {
    if ENCRYPT { _mm512_aesenclast_epi128(state, after) } else { _mm512_aesdeclast_epi128(state, after) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shift_in(before: Vector, vector: Vector) -> Vector {
    _mm512_alignr_epi64::<6>(vector, before)
}
