//! One block per register: SSE, as every x86-64 has.

use super::{GROUP, powers, turned};
pub(in crate::simd) use std::arch::x86_64::{
    __m128i as Vector, _mm_setzero_si128 as zero, _mm_xor_si128 as xor,
};
use std::arch::x86_64::{
    _MM_HINT_T0, _mm_bslli_si128, _mm_bsrli_si128, _mm_clmulepi64_si128, _mm_loadu_si128, _mm_or_si128,
    _mm_prefetch, _mm_set1_epi32, _mm_shuffle_epi8, _mm_slli_epi32, _mm_srli_epi32, _mm_storeu_si128,
    _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi32, _mm_unpacklo_epi64,
};

pub(in crate::simd) const BLOCKS: usize = 1;
pub(in crate::simd) const BYTES: usize = 16 * BLOCKS;
pub(in crate::simd) static POWERS: [[u8; BYTES]; GROUP] = powers();

#[inline]
pub(in crate::simd) fn fetch(address: *const u8) {
    // SAFETY: a hint; it reads nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
pub(in crate::simd) fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `bytes` borrows.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
pub(in crate::simd) fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 16 bytes that `bytes` borrows mutably.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "sse2")]
pub(in crate::simd) fn broadcast(block: &[u8; 16]) -> Vector {
    load(block)
}

#[inline]
#[target_feature(enable = "sse2")]
pub(in crate::simd) fn splat(word: u32) -> Vector {
    _mm_set1_epi32(word.cast_signed())
}

#[inline]
#[target_feature(enable = "ssse3")]
pub(in crate::simd) fn rotate<const LEFT: i32, const RIGHT: i32>(words: Vector) -> Vector {
    if LEFT % 8 == 0 {
        _mm_shuffle_epi8(words, load(&const { turned(LEFT) }))
    } else {
        _mm_or_si128(_mm_slli_epi32::<LEFT>(words), _mm_srli_epi32::<RIGHT>(words))
    }
}

#[inline]
#[target_feature(enable = "sse2")]
pub(in crate::simd) fn transpose([a, b, c, d]: [Vector; 4]) -> [Vector; 4] {
    let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
    [
        _mm_unpacklo_epi64(ab, cd),
        _mm_unpackhi_epi64(ab, cd),
        _mm_unpacklo_epi64(ab_high, cd_high),
        _mm_unpackhi_epi64(ab_high, cd_high),
    ]
}

#[inline]
#[target_feature(enable = "pclmulqdq")]
pub(in crate::simd) fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = _mm_clmulepi64_si128::<0x00>(tweaks, powers);
    let high = _mm_clmulepi64_si128::<0x01>(tweaks, powers);
    let carry = _mm_clmulepi64_si128::<0x11>(high, powers);
    xor(xor(low, carry), _mm_bslli_si128::<8>(high))
}

#[inline]
#[target_feature(enable = "pclmulqdq")]
pub(in crate::simd) fn times_group(tweaks: Vector) -> Vector {
    // x^8: one byte.
    let carry = _mm_clmulepi64_si128::<0x10>(_mm_bsrli_si128::<15>(tweaks), load(&POWERS[0]));
    xor(_mm_bslli_si128::<1>(tweaks), carry)
}
