//! VAES with AVX2: two blocks per register, as on Intel from Alder Lake and on AMD from Zen 3.

use super::loops::{AHEAD_BYTES, GROUP, for_group, loops, powers};
use super::{XtsKey, double};
use std::arch::x86_64::{
    __m256i as Vector, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_aesdec_epi128,
    _mm256_aesdeclast_epi128, _mm256_aesenc_epi128, _mm256_aesenclast_epi128, _mm256_broadcastsi128_si256,
    _mm256_bslli_epi128, _mm256_bsrli_epi128, _mm256_clmulepi64_epi128, _mm256_loadu_si256,
    _mm256_permute2x128_si256, _mm256_setzero_si256 as zero, _mm256_storeu_si256, _mm256_xor_si256 as xor,
};

const BLOCKS: usize = 2;

loops!("avx2,vaes,vpclmulqdq");

#[inline]
fn fetch(address: *const u8) {
    // SAFETY: a hint; it reads nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 32 bytes that `bytes` borrows.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 32 bytes that `bytes` borrows mutably.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(block: &[u8; 16]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `block` borrows.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
}

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
#[target_feature(enable = "avx2,vpclmulqdq")]
fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = _mm256_clmulepi64_epi128::<0x00>(tweaks, powers);
    let high = _mm256_clmulepi64_epi128::<0x01>(tweaks, powers);
    let carry = _mm256_clmulepi64_epi128::<0x11>(high, powers);
    xor(xor(low, carry), _mm256_bslli_epi128::<8>(high))
}

#[inline]
#[target_feature(enable = "avx2,vpclmulqdq")]
fn times_group(tweaks: Vector) -> Vector {
    // x^16: two bytes.
    let carry = _mm256_clmulepi64_epi128::<0x10>(_mm256_bsrli_epi128::<14>(tweaks), load(&POWERS[0]));
    xor(_mm256_bslli_epi128::<2>(tweaks), carry)
}

#[inline]
#[target_feature(enable = "avx2")]
fn shift_in(before: Vector, vector: Vector) -> Vector {
    _mm256_permute2x128_si256::<0x21>(before, vector)
}
