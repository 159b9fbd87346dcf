//! SM4's S-box without a table in memory.
//!
//! The standard prints a table. What is behind it (Liu and others, "Analysis of the SMS4 block cipher", ACISP 2007):
//!
//! ```text
//!   S(x) = A * I(A * x + c) + c      I(y) = 1 / y, or 0, in GF(2^8) modulo x^8 + x^7 + x^6 + x^5 + x^4 + x^2 + 1
//! ```
//!
//! CPUs invert in AES's field, GF(2^8) modulo x^8 + x^4 + x^3 + x + 1. There is only one field of that size: a map P, which
//! sends x to the 0x3e of AES's field, takes sums to sums and products to products, so that
//!
//! ```text
//!   S(x) = (A * 1/P) * J(P * A * x + P * c) + c      J: inversion in AES's field
//! ```
//!
//! Matrices are as GFNI takes them: bit i of the result is the parity of byte 7 - i of the matrix and the argument. The tests
//! compute all of it slowly, from the first formula.

/// P * A.
pub(super) const INTO_AES_FIELD: u64 = 0x8aec_81c1_7591_b3ee;
/// P * c, as GFNI's instructions take it: of the byte the bits alone count.
pub(super) const INVERTED: i32 = 0xd6;
/// A * 1/P.
pub(super) const OUT_OF_AES_FIELD: u64 = 0x9dd1_d601_fe52_4761;
/// c.
pub(super) const SBOX_CONSTANT: i32 = 0xd3;
/// What has to follow AES's S-box instead of the bare inversion: that matrix, AES's own one undone before it.
pub(super) const AES_TO_SM4: u64 = 0x0b95_eaa4_5b2a_5619;
/// c, and what becomes of AES's constant.
pub(super) const AES_TO_SM4_CONSTANT: i32 = 0x4d;

/// What `matrix` and `constant` make of each lower half of a byte, and `matrix` alone of each upper half.
#[expect(clippy::cast_possible_truncation, reason = "numbers below 256")]
#[expect(clippy::cast_sign_loss, reason = "not negative")]
pub(super) const fn nibbles(matrix: u64, constant: i32) -> [[u8; 16]; 2] {
    let mut tables = [[0; 16]; 2];
    let mut nibble = 0;
    while nibble < 16 {
        tables[0][nibble] = times(matrix, nibble as u8) ^ constant as u8;
        tables[1][nibble] = times(matrix, (nibble as u8) << 4);
        nibble += 1;
    }
    tables
}

/// `matrix` times `byte`.
#[expect(clippy::cast_possible_truncation, reason = "one bit")]
const fn times(matrix: u64, byte: u8) -> u8 {
    let rows = matrix.to_be_bytes();
    let mut product = 0;
    let mut bit = 0;
    while bit < 8 {
        product |= ((rows[bit] & byte).count_ones() as u8 & 1) << bit;
        bit += 1;
    }
    product
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The product modulo `polynomial`, which has its x^8.
    fn multiply(mut a: u32, mut b: u32, polynomial: u32) -> u32 {
        let mut product = 0;
        while b != 0 {
            product ^= if b & 1 != 0 { a } else { 0 };
            a <<= 1;
            a ^= if a & 0x100 != 0 { polynomial } else { 0 };
            b >>= 1;
        }
        product
    }

    fn invert(a: u32, polynomial: u32) -> u32 {
        (0..256).find(|&b| multiply(a, b, polynomial) == 1).unwrap_or(0)
    }

    /// S(x), from its definition. Row i of A is 0xa7 turned by i.
    pub(in crate::simd::sm4) fn by_definition(x: u8) -> u8 {
        let affine = |x: u32| {
            (0..8).fold(0xd3, |sum, i| sum ^ ((u32::from(0xa7_u8.rotate_left(i)) & x).count_ones() & 1) << i)
        };
        u8::try_from(affine(invert(affine(u32::from(x)), 0x1f5))).unwrap()
    }

    #[test]
    fn the_definition_is_the_standards_table() {
        // GB/T 32907-2016 6.2, table 1: the first and the last row.
        let first =
            [0xd6, 0x90, 0xe9, 0xfe, 0xcc, 0xe1, 0x3d, 0xb7, 0x16, 0xb6, 0x14, 0xc2, 0x28, 0xfb, 0x2c, 0x05];
        let last =
            [0x18, 0xf0, 0x7d, 0xec, 0x3a, 0xdc, 0x4d, 0x20, 0x79, 0xee, 0x5f, 0x3e, 0xd7, 0xcb, 0x39, 0x48];
        for (i, (first, last)) in (0..).zip(first.into_iter().zip(last)) {
            assert_eq!([by_definition(i), by_definition(0xf0 + i)], [first, last]);
        }
    }

    #[test]
    fn the_way_through_the_field_of_aes_is_the_definition() {
        let constant = |constant: i32| u8::try_from(constant).unwrap();
        for x in 0..=255 {
            let inverted = invert(u32::from(times(INTO_AES_FIELD, x) ^ constant(INVERTED)), 0x11b);
            let inverted = u8::try_from(inverted).unwrap();
            assert_eq!(times(OUT_OF_AES_FIELD, inverted) ^ constant(SBOX_CONSTANT), by_definition(x));
            // FIPS 197 5.1.1: AES's own matrix and constant.
            let substituted = (0..8).fold(0x63, |sum, i| {
                sum ^ ((u32::from(0xf1_u8.rotate_left(i) & inverted)).count_ones() & 1) << i
            });
            let substituted = u8::try_from(substituted).unwrap();
            assert_eq!(times(AES_TO_SM4, substituted) ^ constant(AES_TO_SM4_CONSTANT), by_definition(x));
        }
    }

    #[test]
    fn halves_of_a_byte_add_up() {
        let [low, high] = nibbles(INTO_AES_FIELD, INVERTED);
        for x in 0..=255_u8 {
            let sum = low[usize::from(x % 16)] ^ high[usize::from(x / 16)];
            assert_eq!(i32::from(sum), i32::from(times(INTO_AES_FIELD, x)) ^ INVERTED);
        }
    }
}
