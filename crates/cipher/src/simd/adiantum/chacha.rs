//! ChaCha12 of many blocks at once, written once and compiled for each vector width.
//!
//! Sixteen vectors are the sixteen words of the state, and each of their `LANES` places is a block of its own. The blocks of a
//! data unit differ in their counter, those of several units in their keys too, so that short units fill vectors as well as long
//! ones.

/// ChaCha of vectors. A kernel's file has what [`width`](crate::simd::width) lists, and
///
/// - `LANES`: how many words a vector has; `PLACES`: the number of each; `IN_ORDER`: from where `pick` takes them so that words
///   which `transpose` made stand as their blocks did;
/// - `add_words`, `and`, `shift_right`: of the words of two vectors;
/// - `pick`: the words of a vector whose numbers are given, modulo `LANES`;
/// - `xor_blocks`: sixteen vectors of key stream, transposed by fours, onto the blocks.
macro_rules! chacha {
    ($features:tt) => {
        use super::{CONSTANTS, StreamKeys, Streams};
        use std::hint::black_box;

        /// One half of a double round: on the columns of the state, or on its diagonals.
        #[inline]
        #[target_feature(enable = $features)]
        fn half_round<const DIAGONAL: usize>(x: &mut [Vector; 16]) {
            macro_rules! step {
                ($to:literal += $from:literal, $target:literal <<< $left:literal, $right:literal) => {
                    for_group!(i => {
                        let place = |row: usize| row * 4 + (i + row * DIAGONAL) % 4;
                        x[place($to)] = add_words(x[place($to)], x[place($from)]);
                        x[place($target)] = rotate::<$left, $right>(xor(x[place($target)], x[place($to)]));
                    }, 0, 1, 2, 3);
                };
            }
            //= RFC 8439 2.1: the quarter round, four of them in step.
            step!(0 += 1, 3 <<< 16, 16);
            step!(2 += 3, 1 <<< 12, 20);
            step!(0 += 1, 3 <<< 8, 24);
            step!(2 += 3, 1 <<< 7, 25);
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn twelve_rounds(mut x: [Vector; 16]) -> [Vector; 16] {
            for _ in 0..6 {
                half_round::<0>(&mut x);
                half_round::<1>(&mut x);
            }
            x
        }

        /// HChaCha12 of a nonce for each data unit: the keys of their streams.
        #[target_feature(enable = $features)]
        pub(super) fn stream_keys(key: &[u8; 32], nonces: &[[u8; 16]], keys: &mut StreamKeys) {
            for (part, nonces) in nonces.chunks(LANES).enumerate() {
                let mut all = [[0; 16]; LANES];
                all[..nonces.len()].copy_from_slice(nonces);
                let (vectors, _) = all.as_flattened().as_chunks::<BYTES>();
                let mut nonces = [zero(); 4];
                for_group!(i => { nonces[i] = load(&vectors[i]); }, 0, 1, 2, 3);
                let nonces = transpose(nonces);
                // Read anew: kept from one part to the next, the key would be spilled, and lie about on the stack.
                let (words, _) = black_box(key).as_chunks();
                let mut x = [zero(); 16];
                for_group!(i => {
                    x[i] = splat(CONSTANTS[i]);
                    x[4 + i] = splat(u32::from_le_bytes(words[i]));
                    x[8 + i] = splat(u32::from_le_bytes(words[4 + i]));
                    x[12 + i] = pick(nonces[i], load(&IN_ORDER));
                }, 0, 1, 2, 3);
                let x = twelve_rounds(x);
                // draft-irtf-cfrg-xchacha-03 2.2: the first and the last row are the key.
                for_group!(i => {
                    store(&mut keys.rows[i].as_chunks_mut().0[part], x[i]);
                    store(&mut keys.rows[4 + i].as_chunks_mut().0[part], x[12 + i]);
                }, 0, 1, 2, 3);
            }
        }

        /// XORs their streams onto data units, one for each stream, which are whole blocks of 64 bytes.
        #[target_feature(enable = $features)]
        pub(super) fn apply_streams(streams: &Streams<'_>, units: &mut [u8]) {
            let (blocks, _) = units.as_chunks_mut::<64>();
            let unit_blocks = streams.unit_bytes / 64;
            let mut firsts = (streams.first_unit * unit_blocks..).step_by(LANES);
            let (groups, rest) = blocks.as_chunks_mut();
            for (group, first) in groups.iter_mut().zip(&mut firsts) {
                apply_group(streams.keys, unit_blocks, first, group);
            }
            if let (false, Some(first)) = (rest.is_empty(), firsts.next()) {
                let mut group = [[0; 64]; LANES];
                group[..rest.len()].copy_from_slice(rest);
                apply_group(streams.keys, unit_blocks, first, &mut group);
                rest.copy_from_slice(&group[..rest.len()]);
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn apply_group(
            keys: &StreamKeys,
            unit_blocks: usize,
            first: usize,
            blocks: &mut [[u8; 64]; LANES],
        ) {
            let word = |number: usize| splat(u32::try_from(number).expect("16 units of 2^26 bytes at the most"));
            let numbers = add_words(word(first), load(&PLACES));
            let unit = shift_right(numbers, splat(unit_blocks.ilog2()));
            let counter = and(numbers, word(unit_blocks - 1));
            // All units of a group are in one part.
            let part = (first >> unit_blocks.ilog2()) / LANES;
            let mut x = twelve_rounds(start(keys, part, unit, counter));
            // The keys are read anew, as there is no register to keep them in.
            let start = start(black_box(keys), part, unit, counter);
            let mut fours = [[zero(); 4]; 4];
            for_group!(row => {
                for_group!(i => { x[4 * row + i] = add_words(x[4 * row + i], start[4 * row + i]); }, 0, 1, 2, 3);
                fours[row] = transpose([x[4 * row], x[4 * row + 1], x[4 * row + 2], x[4 * row + 3]]);
            }, 0, 1, 2, 3);
            xor_blocks(fours, blocks);
        }

        /// The state before the first round.
        #[inline]
        #[target_feature(enable = $features)]
        fn start(keys: &StreamKeys, part: usize, unit: Vector, counter: Vector) -> [Vector; 16] {
            let mut x = [zero(); 16];
            for_group!(i => {
                x[i] = splat(CONSTANTS[i]);
                x[4 + i] = pick(load(&keys.rows[i].as_chunks().0[part]), unit);
                x[8 + i] = pick(load(&keys.rows[4 + i].as_chunks().0[part]), unit);
            }, 0, 1, 2, 3);
            x[12] = counter;
            // Linux crypto/adiantum.c, adiantum_crypt: the rest of the nonce is a one.
            x[14] = splat(1);
            x
        }
    };
}

pub(super) use chacha;
