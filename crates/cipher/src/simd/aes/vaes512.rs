//! VAES with AVX-512: four blocks per register, as on Intel from Ice Lake and on AMD from Zen 4.

use super::loops::{AHEAD_BYTES, GROUP, for_group, loops, powers};
use super::{XtsKey, double};
use std::arch::x86_64::{
    __m512i as Vector, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm512_aesdec_epi128,
    _mm512_aesdeclast_epi128, _mm512_aesenc_epi128, _mm512_aesenclast_epi128, _mm512_alignr_epi64,
    _mm512_broadcast_i32x4, _mm512_bslli_epi128, _mm512_bsrli_epi128, _mm512_clmulepi64_epi128,
    _mm512_loadu_si512, _mm512_setzero_si512 as zero, _mm512_storeu_si512, _mm512_xor_si512 as xor,
};

const BLOCKS: usize = 4;

loops!("avx512f,avx512bw,vaes,vpclmulqdq");

#[inline]
fn fetch(address: *const u8) {
    // SAFETY: a hint; it reads nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 64 bytes that `bytes` borrows.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 64 bytes that `bytes` borrows mutably.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(block: &[u8; 16]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `block` borrows.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(block.as_ptr().cast()) })
}

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
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = _mm512_clmulepi64_epi128::<0x00>(tweaks, powers);
    let high = _mm512_clmulepi64_epi128::<0x01>(tweaks, powers);
    let carry = _mm512_clmulepi64_epi128::<0x11>(high, powers);
    xor(xor(low, carry), _mm512_bslli_epi128::<8>(high))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,vpclmulqdq")]
fn times_group(tweaks: Vector) -> Vector {
    // x^32: four bytes.
    let carry = _mm512_clmulepi64_epi128::<0x10>(_mm512_bsrli_epi128::<12>(tweaks), load(&POWERS[0]));
    xor(_mm512_bslli_epi128::<4>(tweaks), carry)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shift_in(before: Vector, vector: Vector) -> Vector {
    _mm512_alignr_epi64::<6>(vector, before)
}
