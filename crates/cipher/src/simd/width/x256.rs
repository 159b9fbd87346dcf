//! Two blocks per register: AVX2.

use super::{GROUP, powers, turned};
pub(in crate::simd) use std::arch::x86_64::{
    __m256i as Vector, _mm256_setzero_si256 as zero, _mm256_xor_si256 as xor,
};
use std::arch::x86_64::{
    _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_broadcastsi128_si256, _mm256_bslli_epi128,
    _mm256_bsrli_epi128, _mm256_clmulepi64_epi128, _mm256_loadu_si256, _mm256_or_si256, _mm256_set1_epi32,
    _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_si256, _mm256_unpackhi_epi32,
    _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
};

pub(in crate::simd) const BLOCKS: usize = 2;
pub(in crate::simd) const BYTES: usize = 16 * BLOCKS;
pub(in crate::simd) static POWERS: [[u8; BYTES]; GROUP] = powers();

#[inline]
pub(in crate::simd) fn fetch(address: *const u8) {
    // SAFETY: a hint; it reads nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::simd) fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 32 bytes that `bytes` borrows.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::simd) fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 32 bytes that `bytes` borrows mutably.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::simd) fn broadcast(block: &[u8; 16]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `block` borrows.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::simd) fn splat(word: u32) -> Vector {
    _mm256_set1_epi32(word.cast_signed())
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::simd) fn rotate<const LEFT: i32, const RIGHT: i32>(words: Vector) -> Vector {
    if LEFT % 8 == 0 {
        _mm256_shuffle_epi8(words, load(&const { turned(LEFT) }))
    } else {
        _mm256_or_si256(_mm256_slli_epi32::<LEFT>(words), _mm256_srli_epi32::<RIGHT>(words))
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::simd) fn transpose([a, b, c, d]: [Vector; 4]) -> [Vector; 4] {
    let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab, cd),
        _mm256_unpackhi_epi64(ab, cd),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

#[inline]
#[target_feature(enable = "avx2,vpclmulqdq")]
pub(in crate::simd) fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = _mm256_clmulepi64_epi128::<0x00>(tweaks, powers);
    let high = _mm256_clmulepi64_epi128::<0x01>(tweaks, powers);
    let carry = _mm256_clmulepi64_epi128::<0x11>(high, powers);
    xor(xor(low, carry), _mm256_bslli_epi128::<8>(high))
}

#[inline]
#[target_feature(enable = "avx2,vpclmulqdq")]
pub(in crate::simd) fn times_group(tweaks: Vector) -> Vector {
    // x^16: two bytes.
    let carry = _mm256_clmulepi64_epi128::<0x10>(_mm256_bsrli_epi128::<14>(tweaks), load(&POWERS[0]));
    xor(_mm256_bslli_epi128::<2>(tweaks), carry)
}
