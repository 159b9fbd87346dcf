//! AVX2: eight blocks of the stream at once, as on Intel from Haswell and on AMD from Excavator.

use super::chacha::chacha;
use super::nh::nh;
use crate::simd::width::x256::{BYTES, Vector, load, rotate, splat, store, transpose, xor, zero};
use crate::simd::xts::for_group;
use std::arch::x86_64::{
    _mm_loadu_si128, _mm_set1_epi8, _mm256_add_epi32 as add_words, _mm256_add_epi64 as add_doubles,
    _mm256_and_si256 as and, _mm256_mul_epu32, _mm256_permute2x128_si256, _mm256_permutevar8x32_epi32,
    _mm256_shuffle_epi32, _mm256_srli_epi64, _mm256_srlv_epi32 as shift_right, _mm256_unpackhi_epi64,
    _mm256_unpacklo_epi64, _mm256_zextsi128_si256,
};

chacha!("avx2");
nh!("avx2");

const LANES: usize = 8;
static PLACES: [u8; BYTES] = super::numbers([0, 1, 2, 3, 4, 5, 6, 7]);
static IN_ORDER: [u8; BYTES] = super::numbers([0, 4, 1, 5, 2, 6, 3, 7]);

#[inline]
#[target_feature(enable = "avx2")]
fn pick(words: Vector, places: Vector) -> Vector {
    _mm256_permutevar8x32_epi32(words, places)
}

#[inline]
#[target_feature(enable = "avx2")]
fn xor_blocks(rows: [[Vector; 4]; 4], blocks: &mut [[u8; 64]; LANES]) {
    for_group!(i => {
        // Blocks `i` and `4 + i` lie in the lower and the upper halves of the four vectors.
        let [a, b, c, d] = [rows[0][i], rows[1][i], rows[2][i], rows[3][i]];
        let streams = [
            [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x20>(c, d)],
            [_mm256_permute2x128_si256::<0x31>(a, b), _mm256_permute2x128_si256::<0x31>(c, d)],
        ];
        for_group!(q => {
            let (halves, _) = blocks[4 * q + i].as_chunks_mut();
            for (half, stream) in halves.iter_mut().zip(streams[q]) {
                let sum = xor(load(half), stream);
                store(half, sum);
            }
        }, 0, 1);
    }, 0, 1, 2, 3);
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_part(blocks: &[[u8; 16]]) -> (Vector, Vector) {
    // SAFETY: an unaligned load of the 16 bytes of the only block that there can be.
    let words = unsafe { _mm_loadu_si128(blocks[0].as_ptr().cast()) };
    (_mm256_zextsi128_si256(words), _mm256_zextsi128_si256(_mm_set1_epi8(-1)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn pair(words: Vector) -> Vector {
    _mm256_shuffle_epi32::<0xd8>(words)
}

#[inline]
#[target_feature(enable = "avx2")]
fn multiply_pairs(words: Vector) -> Vector {
    _mm256_mul_epu32(words, _mm256_srli_epi64::<32>(words))
}

#[inline]
#[target_feature(enable = "avx2")]
fn totals([a, b, c, d]: [Vector; 4]) -> [[u8; 16]; 2] {
    let ab = add_doubles(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    let cd = add_doubles(_mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d));
    let low = _mm256_permute2x128_si256::<0x20>(ab, cd);
    let high = _mm256_permute2x128_si256::<0x31>(ab, cd);
    let mut bytes = [0; BYTES];
    store(&mut bytes, add_doubles(low, high));
    let (blocks, _) = bytes.as_chunks();
    [blocks[0], blocks[1]]
}
