//! What the kernels of several ciphers need of registers of one width: blocks of 16 bytes, and words of 32 bits in them.
//!
//! Each file has the same names:
//!
//! - `Vector`: `BLOCKS` blocks of 16 bytes side by side, `BYTES` in all; `load`, `store`, `xor`, `zero`; `broadcast`: one
//!   block in every place; `splat`: one word in every place;
//! - `rotate::<LEFT, RIGHT>`: each word turned by so many bits to the left, or by the others to 32 to the right;
//! - `transpose`: of four vectors as rows, in each block the columns of words: twice gives the first;
//! - for the tweaks of XTS, `times`: each block times a power of x up to 63 of its own, as [`powers`] has them; `times_group`:
//!   times x to the number of blocks in [`GROUP`] vectors;
//! - `fetch`: a hint that this address is read and written soon.

#[cfg(target_arch = "x86_64")]
pub(super) mod x128;
#[cfg(target_arch = "x86_64")]
pub(super) mod x256;
#[cfg(target_arch = "x86_64")]
pub(super) mod x512;

/// Vectors of AES that are worked on together. Eight cover the AES instruction's latency on every CPU we know: it starts at the
/// most twice a cycle and takes four cycles or less.
pub(super) const GROUP: usize = 8;

/// Powers of x, as `times` takes them: block `b` of vector `i` holds x to the `i * BLOCKS + b` in its lower half, and the
/// polynomial in its upper one.
pub(super) const fn powers<const BYTES: usize, const VECTORS: usize>() -> [[u8; BYTES]; VECTORS] {
    let mut powers = [[0; BYTES]; VECTORS];
    let blocks = BYTES / 16;
    let mut power = 0;
    while power < VECTORS * blocks {
        let at = power % blocks * 16;
        powers[power / blocks][at + power / 8] = 1 << (power % 8);
        powers[power / blocks][at + 8] = POLYNOMIAL;
        power += 1;
    }
    powers
}

//= IEEE 1619-2018 5.2: x^128 is x^7 + x^2 + x + 1.
const POLYNOMIAL: u8 = 0x87;

/// Where each byte comes from if every word is turned by `bits` to the left, a multiple of eight.
#[cfg(target_arch = "x86_64")]
#[expect(clippy::cast_possible_truncation, reason = "a place among sixteen")]
const fn turned<const BYTES: usize>(bits: i32) -> [u8; BYTES] {
    let mut places = [0; BYTES];
    let bytes = (bits / 8).unsigned_abs() as usize;
    let mut at = 0;
    while at < BYTES {
        places[at] = (at % 16 / 4 * 4 + (at + 4 - bytes) % 4) as u8;
        at += 1;
    }
    places
}
