//! Four blocks per register: AVX-512.

use super::{GROUP, powers};
pub(in crate::simd) use std::arch::x86_64::{
    __m512i as Vector, _mm512_setzero_si512 as zero, _mm512_xor_si512 as xor,
};
use std::arch::x86_64::{
    _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm512_broadcast_i32x4, _mm512_bslli_epi128,
    _mm512_bsrli_epi128, _mm512_clmulepi64_epi128, _mm512_loadu_si512, _mm512_rol_epi32, _mm512_set1_epi32,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64,
};

pub(in crate::simd) const BLOCKS: usize = 4;
pub(in crate::simd) const BYTES: usize = 16 * BLOCKS;
pub(in crate::simd) static POWERS: [[u8; BYTES]; GROUP] = powers();

#[inline]
pub(in crate::simd) fn fetch(address: *const u8) {
    // SAFETY: a hint; it reads nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::simd) fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 64 bytes that `bytes` borrows.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::simd) fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 64 bytes that `bytes` borrows mutably.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::simd) fn broadcast(block: &[u8; 16]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `block` borrows.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::simd) fn splat(word: u32) -> Vector {
    _mm512_set1_epi32(word.cast_signed())
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::simd) fn rotate<const LEFT: i32, const RIGHT: i32>(words: Vector) -> Vector {
    _mm512_rol_epi32::<LEFT>(words)
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::simd) fn transpose([a, b, c, d]: [Vector; 4]) -> [Vector; 4] {
    let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab, cd),
        _mm512_unpackhi_epi64(ab, cd),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
pub(in crate::simd) fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = _mm512_clmulepi64_epi128::<0x00>(tweaks, powers);
    let high = _mm512_clmulepi64_epi128::<0x01>(tweaks, powers);
    let carry = _mm512_clmulepi64_epi128::<0x11>(high, powers);
    xor(xor(low, carry), _mm512_bslli_epi128::<8>(high))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
pub(in crate::simd) fn times_group(tweaks: Vector) -> Vector {
    // x^32: four bytes.
    let carry = _mm512_clmulepi64_epi128::<0x10>(_mm512_bsrli_epi128::<12>(tweaks), load(&POWERS[0]));
    xor(_mm512_bslli_epi128::<4>(tweaks), carry)
}
