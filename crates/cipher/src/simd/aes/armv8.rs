//! The ARMv8 cryptography extension: one block per register.

use super::XtsKey;
use super::loops::{CONSTANTS, loops, one_block};
use crate::simd::width::{GROUP, powers};
use crate::simd::xts::xts;
use std::arch::aarch64::{
    uint8x16_t as Vector, vaesdq_u8, vaeseq_u8, vaesimcq_u8, vaesmcq_u8, vdupq_laneq_u32, vdupq_n_u8,
    vdupq_n_u32, veorq_u8 as xor, vextq_u8, vgetq_lane_u64, vld1q_u8, vmull_p64, vqtbl1q_u8,
    vreinterpretq_u8_p128, vreinterpretq_u8_u32, vreinterpretq_u32_u8, vreinterpretq_u64_u8, vst1q_u8,
};

const BLOCKS: usize = 1;
const BYTES: usize = 16 * BLOCKS;
static POWERS: [[u8; BYTES]; GROUP] = powers();

xts!("neon,aes");
loops!("neon,aes");
one_block!("neon,aes");

/// Never called: no kernel of ours fetches ahead here.
#[inline]
fn fetch(_address: *const u8) {}

#[inline]
#[target_feature(enable = "neon")]
fn zero() -> Vector {
    vdupq_n_u8(0)
}

#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8; BYTES]) -> Vector {
    // SAFETY: an unaligned load of the 16 bytes that `bytes` borrows.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(bytes: &mut [u8; BYTES], value: Vector) {
    // SAFETY: an unaligned store to the 16 bytes that `bytes` borrows mutably.
    unsafe { vst1q_u8(bytes.as_mut_ptr(), value) }
}

#[inline]
#[target_feature(enable = "neon")]
fn broadcast(block: &[u8; 16]) -> Vector {
    load(block)
}

/// The first round adds the key.
#[inline]
#[target_feature(enable = "neon")]
fn enter(data: Vector, _key: Vector) -> Vector {
    data
}

#[inline]
#[target_feature(enable = "neon,aes")]
fn round<const ENCRYPT: bool>(state: Vector, before: Vector, _after: Vector) -> Vector {
    if ENCRYPT { vaesmcq_u8(vaeseq_u8(state, before)) } else { vaesimcq_u8(vaesdq_u8(state, before)) }
}

#[inline]
#[target_feature(enable = "neon,aes")]
fn last<const ENCRYPT: bool>(state: Vector, before: Vector, after: Vector) -> Vector {
    xor(if ENCRYPT { vaeseq_u8(state, before) } else { vaesdq_u8(state, before) }, after)
}

/// The carry-less product of one half of each.
#[inline]
#[target_feature(enable = "neon,aes")]
fn multiply<const A: i32, const B: i32>(a: Vector, b: Vector) -> Vector {
    let (a, b) = (vreinterpretq_u64_u8(a), vreinterpretq_u64_u8(b));
    vreinterpretq_u8_p128(vmull_p64(vgetq_lane_u64::<A>(a), vgetq_lane_u64::<B>(b)))
}

#[inline]
#[target_feature(enable = "neon,aes")]
fn times(tweaks: Vector, powers: Vector) -> Vector {
    let low = multiply::<0, 0>(tweaks, powers);
    let high = multiply::<1, 0>(tweaks, powers);
    let carry = multiply::<1, 1>(high, powers);
    xor(xor(low, carry), vextq_u8::<8>(zero(), high))
}

#[inline]
#[target_feature(enable = "neon,aes")]
fn times_group(tweaks: Vector) -> Vector {
    // x^8: one byte.
    let carry = multiply::<0, 1>(vextq_u8::<15>(tweaks, zero()), load(&POWERS[0]));
    xor(vextq_u8::<15>(zero(), tweaks), carry)
}

#[inline]
#[target_feature(enable = "neon")]
fn shift_in(before: Vector, _vector: Vector) -> Vector {
    before
}

/// SubWord of the last word, in every word.
#[inline]
#[target_feature(enable = "neon,aes")]
fn sub_word(key: Vector) -> Vector {
    // With four equal columns ShiftRows changes nothing.
    let words = vreinterpretq_u32_u8(key);
    vaeseq_u8(vreinterpretq_u8_u32(vdupq_laneq_u32::<3>(words)), zero())
}

/// SubWord of RotWord of the last word, plus `constant` in the lowest byte, in every word.
#[inline]
#[target_feature(enable = "neon,aes")]
fn sub_rot_word(key: Vector, constant: u8) -> Vector {
    let rotated = vqtbl1q_u8(key, vreinterpretq_u8_u32(vdupq_n_u32(0x0c0f_0e0d)));
    xor(vaeseq_u8(rotated, zero()), vreinterpretq_u8_u32(vdupq_n_u32(u32::from(constant))))
}

/// Each word added to all later ones.
#[inline]
#[target_feature(enable = "neon")]
fn sums(key: Vector) -> Vector {
    let sums = xor(key, vextq_u8::<12>(zero(), key));
    xor(sums, vextq_u8::<8>(zero(), sums))
}

#[inline]
#[target_feature(enable = "neon,aes")]
fn inverse_mix_columns(key: Vector) -> Vector {
    vaesimcq_u8(key)
}
