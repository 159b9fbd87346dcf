//! The hash by which ext4 indexes names. Of an encrypted name it is that of the ciphertext, and a part of what readers without a
//! key are shown.
//!
//! Source: Linux `fs/ext4/hash.c`; MD4's functions: RFC 1320; TEA: Wheeler and Needham 1994.

use super::Superblock;

/// `HTREE_EOF` times two: no hash may be it.
const END: u32 = 0x7fff_ffff << 1;

impl Superblock {
    /// Major and minor hash of a name.
    pub(super) fn hash_name(&self, name: &[u8]) -> [u32; 2] {
        let seed = if self.hash_seed == [0; 4] {
            [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476]
        } else {
            self.hash_seed
        };
        // Versions 3 to 5 are those of 0 to 2 with bytes that have no sign.
        let is_unsigned = self.hash_unsigned || self.hash_version >= 3;
        let [major, minor] = match self.hash_version % 3 {
            0 => [legacy(name, is_unsigned), 0],
            1 => {
                let mut state = seed;
                for chunk in name.chunks(32) {
                    half_md4(&mut state, &words::<8>(chunk, is_unsigned));
                }
                [state[1], state[2]]
            }
            _ => {
                let mut state = seed;
                for chunk in name.chunks(16) {
                    tea(&mut state, &words::<4>(chunk, is_unsigned));
                }
                [state[0], state[1]]
            }
        };
        let major = major & !1;
        [if major == END { END - 2 } else { major }, minor]
    }
}

/// A byte as C sees it, with a sign or without.
fn byte(value: u8, is_unsigned: bool) -> u32 {
    if is_unsigned { value.into() } else { i32::from(value.cast_signed()).cast_unsigned() }
}

/// A chunk as words, big-endian, filled up by its length.
fn words<const N: usize>(chunk: &[u8], is_unsigned: bool) -> [u32; N] {
    let len = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
    let pad = len | len << 8;
    let pad = pad | pad << 16;
    let mut words = [pad; N];
    for (word, bytes) in words.iter_mut().zip(chunk.chunks(4)) {
        *word = bytes.iter().fold(pad, |word, &value| byte(value, is_unsigned).wrapping_add(word << 8));
    }
    words
}

fn legacy(name: &[u8], is_unsigned: bool) -> u32 {
    let (mut hash, mut last) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
    for &value in name {
        let mut next = last.wrapping_add(hash ^ byte(value, is_unsigned).wrapping_mul(7_152_373));
        if next & 0x8000_0000 != 0 {
            next = next.wrapping_sub(0x7fff_ffff);
        }
        last = hash;
        hash = next;
    }
    hash << 1
}

fn tea(state: &mut [u32; 4], words: &[u32; 4]) {
    let ([mut b0, mut b1], [a, b, c, d]) = ([state[0], state[1]], *words);
    let mut sum = 0_u32;
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        b0 = b0.wrapping_add((b1 << 4).wrapping_add(a) ^ b1.wrapping_add(sum) ^ (b1 >> 5).wrapping_add(b));
        b1 = b1.wrapping_add((b0 << 4).wrapping_add(c) ^ b0.wrapping_add(sum) ^ (b0 >> 5).wrapping_add(d));
    }
    state[0] = state[0].wrapping_add(b0);
    state[1] = state[1].wrapping_add(b1);
}

/// MD4 with eight words instead of sixteen.
fn half_md4(state: &mut [u32; 4], words: &[u32; 8]) {
    type Function = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Function, u32, [usize; 8], [u32; 4]); 3] = [
        (|x, y, z| z ^ (x & (y ^ z)), 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (|x, y, z| (x & y).wrapping_add((x ^ y) & z), 0x5a82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (|x, y, z| x ^ y ^ z, 0x6ed9_eba1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (function, constant, order, shifts) in ROUNDS {
        for (step, word) in order.into_iter().enumerate() {
            let sum = a.wrapping_add(function(b, c, d)).wrapping_add(words[word]).wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, added) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(added);
    }
}
