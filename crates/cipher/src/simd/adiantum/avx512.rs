//! AVX-512: sixteen blocks of the stream at once, as on Intel from Skylake's servers and on AMD from Zen 4.

use super::chacha::chacha;
use super::nh::nh;
use crate::simd::width::x512::{BYTES, Vector, load, rotate, splat, store, transpose, xor, zero};
use crate::simd::xts::for_group;
use std::arch::x86_64::{
    _mm512_add_epi32 as add_words, _mm512_add_epi64 as add_doubles, _mm512_and_si512 as and,
    _mm512_castsi512_si256, _mm512_inserti64x4, _mm512_maskz_loadu_epi64, _mm512_maskz_set1_epi64,
    _mm512_mul_epu32, _mm512_permutexvar_epi32, _mm512_shuffle_epi32, _mm512_shuffle_i32x4,
    _mm512_shuffle_i64x2, _mm512_srli_epi64, _mm512_srlv_epi32 as shift_right, _mm512_unpackhi_epi64,
    _mm512_unpacklo_epi64,
};

chacha!("avx512f");
nh!("avx512f");

const LANES: usize = 16;
static PLACES: [u8; BYTES] = super::numbers([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
static IN_ORDER: [u8; BYTES] = super::numbers([0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]);

#[inline]
#[target_feature(enable = "avx512f")]
fn pick(words: Vector, places: Vector) -> Vector {
    _mm512_permutexvar_epi32(places, words)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn xor_blocks(rows: [[Vector; 4]; 4], blocks: &mut [[u8; 64]; LANES]) {
    for_group!(i => {
        // Block `4q + i` lies in the q-th quarters of the four vectors.
        let [a, b, c, d] = [rows[0][i], rows[1][i], rows[2][i], rows[3][i]];
        let (ab, cd) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0x44>(c, d));
        let (ab_high, cd_high) = (_mm512_shuffle_i32x4::<0xee>(a, b), _mm512_shuffle_i32x4::<0xee>(c, d));
        let streams = [
            _mm512_shuffle_i32x4::<0x88>(ab, cd),
            _mm512_shuffle_i32x4::<0xdd>(ab, cd),
            _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high),
            _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high),
        ];
        for_group!(q => {
            let block = &mut blocks[4 * q + i];
            let sum = xor(load(block), streams[q]);
            store(block, sum);
        }, 0, 1, 2, 3);
    }, 0, 1, 2, 3);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_part(blocks: &[[u8; 16]]) -> (Vector, Vector) {
    let mask = [0, 0b11, 0b1111, 0b11_1111][blocks.len()];
    // SAFETY: reads two words of 64 bits for each of the blocks that are borrowed, and nothing where the mask has no bit.
    let words = unsafe { _mm512_maskz_loadu_epi64(mask, blocks.as_ptr().cast()) };
    (words, _mm512_maskz_set1_epi64(mask, -1))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pair(words: Vector) -> Vector {
    _mm512_shuffle_epi32::<0xd8>(words)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn multiply_pairs(words: Vector) -> Vector {
    _mm512_mul_epu32(words, _mm512_srli_epi64::<32>(words))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn totals([a, b, c, d]: [Vector; 4]) -> [[u8; 16]; 2] {
    let ab = add_doubles(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let cd = add_doubles(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
    let low = _mm512_inserti64x4::<1>(ab, _mm512_castsi512_si256(cd));
    let high = _mm512_shuffle_i64x2::<0xee>(ab, cd);
    // Of each half of it both quarters are still to be added.
    let sums = add_doubles(low, high);
    let sums = add_doubles(sums, _mm512_shuffle_i64x2::<0xb1>(sums, sums));
    let mut bytes = [0; BYTES];
    store(&mut bytes, sums);
    let (blocks, _) = bytes.as_chunks();
    [blocks[0], blocks[2]]
}
