//! AES-NI: one block per register, as on every x86-64 server since 2011.

use super::loops::{AHEAD_BYTES, CONSTANTS, GROUP, for_group, loops, one_block, powers};
use super::{XtsKey, double};
use std::arch::x86_64::{
    __m128i as Vector, _MM_HINT_T0, _mm_aesdec_si128, _mm_aesdeclast_si128, _mm_aesenc_si128,
    _mm_aesenclast_si128, _mm_aesimc_si128, _mm_bslli_si128, _mm_bsrli_si128, _mm_clmulepi64_si128,
    _mm_loadu_si128, _mm_prefetch, _mm_set1_epi32, _mm_setzero_si128 as zero, _mm_shuffle_epi8,
    _mm_shuffle_epi32, _mm_slli_si128, _mm_storeu_si128, _mm_xor_si128 as xor,
};

const BLOCKS: usize = 1;

loops!("aes,pclmulqdq,ssse3");
one_block!("aes,pclmulqdq,ssse3");

#[inline]
fn fetch(address: *const u8) {
    // SAFETY: a hint; it reads nothing, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `bytes` borrows.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 16 bytes that `bytes` borrows mutably.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn broadcast(block: &[u8; 16]) -> Vector {
    load(block)
}

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
#[target_feature(enable = "pclmulqdq")]
fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = _mm_clmulepi64_si128::<0x00>(tweaks, powers);
    let high = _mm_clmulepi64_si128::<0x01>(tweaks, powers);
    let carry = _mm_clmulepi64_si128::<0x11>(high, powers);
    xor(xor(low, carry), _mm_bslli_si128::<8>(high))
}

#[inline]
#[target_feature(enable = "pclmulqdq")]
fn times_group(tweaks: Vector) -> Vector {
    // x^8: one byte.
    let carry = _mm_clmulepi64_si128::<0x10>(_mm_bsrli_si128::<15>(tweaks), load(&POWERS[0]));
    xor(_mm_bslli_si128::<1>(tweaks), carry)
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
