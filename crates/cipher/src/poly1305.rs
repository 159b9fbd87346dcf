//! Poly1305 without its one-time key, for many short messages under one key.
//!
//! [`adiantum`](crate::adiantum) hashes messages of two to eight blocks, twice per data unit of 512 or 4096 bytes. General
//! implementations set up vector code for long messages first, which there costs more than the hashing itself
//! (measured: Adiantum took 2.6 us for 512 bytes with the `poly1305` crate, 0.75 us with a scalar one). This one is scalar,
//! and has nothing to set up: it runs beside the vector code around it, on parts of the CPU that are idle there.
//!
//! ```text
//!   h = (...((m1 * r) + m2) * r + ... + mn) * r  mod 2^130 - 5      each m with a one put above its 128 bits
//!     = m1 * r^n + m2 * r^(n-1) + ... + mn * r                      so that no product waits for another
//!   result = h mod 2^128
//! ```
//!
//! Numbers are three limbs of 44, 44 and 42 bits, so that products of limbs add up in 128 bits: those of eight blocks, before
//! any carry.
//!
//! Source: RFC 8439 2.5, with s = 0. No branch and no address depends on key or message, but on its length.

use zeroize::Zeroize;

const MASK_44: u64 = (1 << 44) - 1;
const MASK_42: u64 = (1 << 42) - 1;

/// Blocks whose products are added up before a carry.
const TOGETHER: usize = 8;

/// The multiplier r. Wipes itself.
pub(crate) struct Key {
    /// r to the eighth, the seventh, ..., r.
    powers: [Factor; TOGETHER],
}

/// A number to multiply with.
#[derive(Clone, Copy)]
struct Factor {
    limbs: [u64; 3],
    /// The upper two limbs times 20. 2^132 is 20 modulo 2^130 - 5: what leaves the third limb comes back times that.
    folded: [u64; 2],
}

impl Factor {
    fn new(limbs: [u64; 3]) -> Self {
        Self { limbs, folded: [limbs[1] * 20, limbs[2] * 20] }
    }
}

impl Key {
    /// The key whose r is `bytes`, clamped.
    pub(crate) fn new(bytes: &[u8; 16]) -> Self {
        //= RFC 8439 2.5: clamping clears the top four bits of bytes 3, 7, 11, 15 and the low two of bytes 4, 8, 12.
        let r = u128::from_le_bytes(*bytes) & 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;
        let r = limbs(r);
        let factor = Factor::new(r);
        let mut powers = [factor; TOGETHER];
        let mut power = r;
        for place in powers.iter_mut().rev().skip(1) {
            power = settle(multiply(power, &factor));
            *place = Factor::new(power);
        }
        Self { powers }
    }

    /// The hash of `blocks`.
    #[inline]
    pub(crate) fn hash(&self, blocks: &[[u8; 16]]) -> Sum {
        blocks.chunks(TOGETHER).fold(Sum::default(), |sum, blocks| self.append(sum, blocks))
    }

    /// The hash of what `sum` is the hash of, followed by `blocks`: eight at the most.
    ///
    /// # Panics
    ///
    /// If there are more.
    #[inline]
    pub(crate) fn append(&self, sum: Sum, blocks: &[[u8; 16]]) -> Sum {
        let powers = &self.powers[TOGETHER - blocks.len()..];
        let mut carried = sum.0;
        let mut products = [0; 3];
        for (block, power) in blocks.iter().zip(powers) {
            let m = limbs(u128::from_le_bytes(*block));
            // At most 46 bits each: a limb, and what the last carry left over.
            let number = [carried[0] + m[0], carried[1] + m[1], carried[2] + m[2] + (1 << 40)];
            carried = [0; 3];
            for (sum, product) in products.iter_mut().zip(multiply(number, power)) {
                *sum += product;
            }
        }
        if blocks.is_empty() { sum } else { Sum(settle(products)) }
    }

    /// By how much the hash of three blocks grows if the second one does by one, without a carry: r squared.
    pub(crate) fn step_of_second_of_three(&self) -> Sum {
        Sum(self.powers[TOGETHER - 2].limbs)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        for Factor { limbs, folded } in &mut self.powers {
            limbs.zeroize();
            folded.zeroize();
        }
    }
}

/// A hash that may grow: Poly1305's accumulator modulo 2^130 - 5.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sum([u64; 3]);

impl Sum {
    /// The sum of both.
    #[inline]
    pub(crate) fn plus(self, other: Self) -> Self {
        Self(carry(std::array::from_fn(|i| self.0[i] + other.0[i])))
    }

    /// The hash: the accumulator modulo 2^128.
    #[inline]
    pub(crate) fn finish(self) -> u128 {
        reduce(self.0)
    }
}

/// The product of both, its limbs as they are.
#[inline]
fn multiply([h0, h1, h2]: [u64; 3], factor: &Factor) -> [u128; 3] {
    let ([r0, r1, r2], [s1, s2]) = (factor.limbs, factor.folded);
    [
        product(h0, r0) + product(h1, s2) + product(h2, s1),
        product(h0, r1) + product(h1, r0) + product(h2, s2),
        product(h0, r2) + product(h1, r1) + product(h2, r0),
    ]
}

/// Limbs of the usual size, but for what is left over in the second one.
#[inline]
fn settle([d0, d1, d2]: [u128; 3]) -> [u64; 3] {
    let d1 = d1 + (d0 >> 44);
    let d2 = d2 + (d1 >> 44);
    // Of eight blocks' products 2^58 at the most leave the third limb.
    let low = u128::from(low_44(d0)) + (d2 >> 42) * 5;
    [low_44(low), low_44(d1) + low_64(low >> 44), low_64(d2) & MASK_42]
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
        #![proptest_config(ProptestConfig::with_cases(crate::unit::cases(2000)))]

        #[test]
        fn it_equals_the_oracle(key in block(), blocks in prop::collection::vec(block(), 0..40)) {
            prop_assert_eq!(Key::new(&key).hash(&blocks).finish(), oracle(&key, &blocks));
        }

        #[test]
        fn a_hash_goes_on_where_another_ended(
            key in block(), start in prop::collection::vec(block(), 0..20), rest in prop::collection::vec(block(), 0..=8),
        ) {
            let key = Key::new(&key);
            let whole = key.append(key.hash(&start), &rest);
            prop_assert_eq!(whole.finish(), key.hash(&[start, rest].concat()).finish());
        }

        #[test]
        fn the_second_of_three_grows_by_steps(
            key in block(), blocks in prop::array::uniform3(block()), steps in 0..70_u8,
        ) {
            let key = Key::new(&key);
            let [first, second, third] = blocks;
            let number = u128::from_le_bytes(second).min(u128::MAX - u128::from(steps));
            let mut sum = key.hash(&[first, number.to_le_bytes(), third]);
            for _ in 0..steps {
                sum = sum.plus(key.step_of_second_of_three());
            }
            let expected = key.hash(&[first, (number + u128::from(steps)).to_le_bytes(), third]);
            prop_assert_eq!(sum.finish(), expected.finish());
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
