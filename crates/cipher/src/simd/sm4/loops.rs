//! SM4 of many blocks at once, written once and compiled for each vector width.
//!
//! A kernel's file has what [`width`](crate::simd::width) lists and the primitives below, says `xts!` (`simd/xts.rs`), and then
//! `loops!` with the CPU features that it needs:
//!
//! - `substitute`: SM4's S-box of each byte;
//! - `swap_bytes`: the bytes of each word the other way round;
//! - `first_word`: the lowest word.
//!
//! Four vectors go together, turned so that each has one of the four words of all their blocks; a round is then the same for
//! every place.

/// The four words of each block of four vectors.
pub(super) const WORDS: usize = 4;

//= GB/T 32907-2016 7.3: the family key FK.
pub(super) const FAMILY_KEY: [u32; 4] = [0xa3b1_bac6, 0x56aa_3350, 0x677d_9197, 0xb270_22dc];

/// Where the bytes of words the other way round come from.
pub(super) static SWAPPED: [u8; 16] = [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12];

/// The fixed key of round `i`.
pub(super) const fn fixed_key(i: u32) -> u32 {
    //= GB/T 32907-2016 7.3: byte j of CK(i) is (4i + j) * 7 modulo 256, the first byte being the uppermost.
    let mut key = 0;
    let mut j = 0;
    while j < 4 {
        key = (key << 8) | (((4 * i + j) * 7) % 256);
        j += 1;
    }
    key
}

/// See the top of the file.
macro_rules! loops {
    ($features:tt) => {
        use super::loops::{FAMILY_KEY, WORDS, fixed_key};
        use std::hint::black_box;

        /// SM4's round keys.
        type Keys = [u32; 32];

        /// SM4 of each block; backwards if the keys are.
        #[inline]
        #[target_feature(enable = $features)]
        fn crypt(keys: &Keys, input: [Vector; GROUP]) -> [Vector; GROUP] {
            // Read anew: kept from one call to the next, keys would be spilled, and lie about on the stack.
            let keys = black_box(keys);
            let mut state = [[zero(); WORDS]; GROUP / WORDS];
            for (words, four) in state.iter_mut().zip(input.as_chunks::<WORDS>().0) {
                let [a, b, c, d] = *four;
                *words = transpose([swap_bytes(a), swap_bytes(b), swap_bytes(c), swap_bytes(d)]);
            }
            for keys in keys.as_chunks::<WORDS>().0 {
                round::<0>(&mut state, keys);
                round::<1>(&mut state, keys);
                round::<2>(&mut state, keys);
                round::<3>(&mut state, keys);
            }
            let mut output = input;
            for (four, words) in output.as_chunks_mut::<WORDS>().0.iter_mut().zip(state) {
                //= GB/T 32907-2016 7.1: the last four words come out in reverse.
                let [a, b, c, d] = transpose([words[3], words[2], words[1], words[0]]);
                *four = [swap_bytes(a), swap_bytes(b), swap_bytes(c), swap_bytes(d)];
            }
            output
        }

        /// The round that replaces word `I`.
        #[inline]
        #[target_feature(enable = $features)]
        fn round<const I: usize>(state: &mut [[Vector; WORDS]; GROUP / WORDS], keys: &[u32; WORDS]) {
            let key = splat(keys[I]);
            for words in state {
                let [one, two, three] = [words[(I + 1) % 4], words[(I + 2) % 4], words[(I + 3) % 4]];
                let mixed = substitute(xor(xor(one, two), xor(three, key)));
                words[I] = xor(words[I], spread(mixed));
            }
        }

        /// The linear part of a round.
        #[inline]
        #[target_feature(enable = $features)]
        fn spread(word: Vector) -> Vector {
            //= GB/T 32907-2016 6.2: L(B) is B + B <<< 2 + B <<< 10 + B <<< 18 + B <<< 24.
            let by_bytes = xor(word, xor(rotate::<8, 24>(word), rotate::<16, 16>(word)));
            xor(xor(word, rotate::<24, 8>(word)), rotate::<2, 30>(by_bytes))
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn first_tweaks(keys: &Keys, tweaks: &mut [[u8; BYTES]]) {
            for group in tweaks.chunks_mut(GROUP) {
                let input = load_group(group);
                for (tweak, output) in group.iter_mut().zip(crypt(keys, input)) {
                    store(tweak, output);
                }
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn xts_group<const ENCRYPT: bool>(
            keys: &Keys,
            tweaks: [Vector; GROUP],
            group: &mut [u8; GROUP_BYTES],
            end: *const u8,
            next: impl Fn(usize, Vector) -> Vector,
        ) -> [Vector; GROUP] {
            fetch_ahead(group, end);
            let (vectors, _) = group.as_chunks_mut::<BYTES>();
            let mut input = tweaks;
            for i in 0..GROUP {
                input[i] = xor(load(&vectors[i]), tweaks[i]);
            }
            let output = crypt(keys, input);
            let mut after = tweaks;
            for i in 0..GROUP {
                store(&mut vectors[i], xor(output[i], tweaks[i]));
                after[i] = next(i, tweaks[i]);
            }
            after
        }

        #[target_feature(enable = $features)]
        pub(super) fn expand(key: &[u8; 16], keys: &mut Keys) {
            let (words, _) = key.as_chunks();
            let mut words: [u32; 4] = std::array::from_fn(|i| u32::from_be_bytes(words[i]) ^ FAMILY_KEY[i]);
            for (place, i) in keys.iter_mut().zip(0..) {
                let mixed = words[1] ^ words[2] ^ words[3] ^ fixed_key(i);
                let mixed = first_word(substitute(splat(mixed)));
                //= GB/T 32907-2016 7.3: L'(B) is B + B <<< 13 + B <<< 23.
                let next = words[0] ^ mixed ^ mixed.rotate_left(13) ^ mixed.rotate_left(23);
                words = [words[1], words[2], words[3], next];
                *place = next;
            }
        }

        /// The S-box of every byte, for the tests.
        #[cfg(test)]
        #[target_feature(enable = $features)]
        pub(super) fn substitute_all(bytes: &mut [[u8; BYTES]]) {
            for bytes in bytes {
                let output = substitute(load(bytes));
                store(bytes, output);
            }
        }
    };
}

pub(super) use loops;
