//! Poly1305 without its one-time key, for many short messages under one key.
//!
//! [`adiantum`](crate::adiantum) hashes three messages of two to eight blocks per data unit of 512 or 4096 bytes. General
//! implementations set up vector code for long messages first, which there costs more than the hashing itself
//! (measured: Adiantum takes 2.6 us for 512 bytes with the `poly1305` crate, 0.75 us with this). This one is scalar, and
//! has nothing to set up.
//!
//! ```text
//!   h = (...((m1 * r) + m2) * r + ... + mn) * r  mod 2^130 - 5      each m with a one put above its 128 bits
//!   result = h mod 2^128
//! ```
//!
//! Numbers are three limbs of 44, 44 and 42 bits, so that products of limbs add up in 128 bits.
//!
//! Source: RFC 8439 2.5, with s = 0. No branch and no address depends on key or message.

use zeroize::Zeroize;

const MASK_44: u64 = (1 << 44) - 1;
const MASK_42: u64 = (1 << 42) - 1;

/// The multiplier r. Wipes itself.
pub(crate) struct Key {
    r: [u64; 3],
}

impl Key {
    /// The key whose r is `bytes`, clamped.
    pub(crate) fn new(bytes: &[u8; 16]) -> Self {
        //= RFC 8439 2.5: clamping clears the top four bits of bytes 3, 7, 11, 15 and the low two of bytes 4, 8, 12.
        let r = u128::from_le_bytes(*bytes) & 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;
        Self { r: limbs(r) }
    }

    /// The hash of `blocks`: Poly1305's accumulator after the last, modulo 2^128.
    #[inline]
    pub(crate) fn hash(&self, blocks: impl IntoIterator<Item = [u8; 16]>) -> u128 {
        let [r0, r1, r2] = self.r;
        // 2^132 is 20 modulo 2^130 - 5: what leaves the third limb comes back times 20.
        let (s1, s2) = (r1 * 20, r2 * 20);
        let mut h = [0_u64; 3];
        for block in blocks {
            let m = limbs(u128::from_le_bytes(block));
            // At most 45 bits each: a limb, and what the last carry left over.
            let [h0, h1, h2] = [h[0] + m[0], h[1] + m[1], h[2] + m[2] + (1 << 40)];
            let d0 = product(h0, r0) + product(h1, s2) + product(h2, s1);
            let d1 = product(h0, r1) + product(h1, r0) + product(h2, s2);
            let d2 = product(h0, r2) + product(h1, r1) + product(h2, r0);
            let d1 = d1 + (d0 >> 44);
            let d2 = d2 + (d1 >> 44);
            let low = low_44(d0) + low_64(d2 >> 42) * 5;
            h = [low & MASK_44, low_44(d1) + (low >> 44), low_44(d2) & MASK_42];
        }
        reduce(h)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.r.zeroize();
    }
}

/// 128 bits as limbs; the third has 40 of them.
#[inline]
fn limbs(x: u128) -> [u64; 3] {
    [low_44(x), low_44(x >> 44), low_64(x >> 88)]
}

#[inline]
fn low_44(x: u128) -> u64 {
    low_64(x) & MASK_44
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the point of it")]
fn low_64(x: u128) -> u64 {
    x as u64
}

#[inline]
fn product(a: u64, b: u64) -> u128 {
    u128::from(a) * u128::from(b)
}

/// The one representative below 2^130 - 5, modulo 2^128.
#[inline]
fn reduce([h0, h1, h2]: [u64; 3]) -> u128 {
    // Twice around settles every carry: the first can leave one in the second limb, the second none.
    let [h0, h1, h2] = carry(carry([h0, h1, h2]));
    // h + 5 reaches 2^130 exactly if h is 2^130 - 5 or more; then h + 5 - 2^130 is the answer.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = h2 + (g1 >> 44);
    let take = (g2 >> 42).wrapping_neg();
    let pick = |g: u64, h: u64, mask: u64| u128::from((g & mask & take) | (h & !take));
    // The third limb's top two bits, 2^128 and 2^129, fall out of the sum.
    pick(g0, h0, MASK_44) | pick(g1, h1, MASK_44) << 44 | pick(g2, h2, MASK_42) << 88
}

#[inline]
fn carry([h0, h1, h2]: [u64; 3]) -> [u64; 3] {
    let h1 = h1 + (h0 >> 44);
    let h2 = h2 + (h1 >> 44);
    [(h0 & MASK_44) + (h2 >> 42) * 5, h1 & MASK_44, h2 & MASK_42]
}

#[cfg(test)]
mod tests {
    use super::*;
    use poly1305::universal_hash::{KeyInit, UniversalHash};
    use proptest::prelude::*;

    /// Poly1305 by somebody else, the one-time key being zero.
    fn oracle(key: &[u8; 16], blocks: &[[u8; 16]]) -> u128 {
        let mut padded = [0; 32];
        padded[..16].copy_from_slice(key);
        let mut hash = poly1305::Poly1305::new(&padded.into());
        hash.update(&blocks.iter().map(|&block| block.into()).collect::<Vec<_>>());
        u128::from_le_bytes(hash.finalize().into())
    }

    /// Bytes that make carries: all ones and all zeroes, as often as any.
    fn block() -> impl Strategy<Value = [u8; 16]> {
        prop_oneof![
            Just([0xff; 16]),
            Just([0; 16]),
            any::<[u8; 16]>(),
            prop::array::uniform16(prop::sample::select(&[0, 1, 0xfe, 0xff][..])),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn it_equals_the_oracle(key in block(), blocks in prop::collection::vec(block(), 0..12)) {
            prop_assert_eq!(Key::new(&key).hash(blocks.iter().copied()), oracle(&key, &blocks));
        }
    }

    #[test]
    fn the_last_reduction_is_exact_around_the_modulus() {
        const P: [u64; 3] = [MASK_44 - 4, MASK_44, MASK_42];
        assert_eq!(reduce(P), 0);
        assert_eq!(reduce([P[0] + 1, P[1], P[2]]), 1);
        assert_eq!(reduce([P[0] + 4, P[1], P[2]]), 4);
        assert_eq!(reduce([P[0] - 1, P[1], P[2]]), u128::MAX - 5);
        // Not settled: 2^130 as a carry into the third limb's 43rd bit, which is 5.
        assert_eq!(reduce([0, 1 << 44, MASK_42]), 5);
        assert_eq!(reduce([1 << 44, MASK_44, MASK_42]), 5);
    }
}
