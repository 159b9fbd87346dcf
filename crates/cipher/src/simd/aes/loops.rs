//! AES in XTS and CBC, written once and compiled for each vector width.
//!
//! A kernel's file has what [`width`](crate::simd::width) lists and the primitives below, says `xts!` (`simd/xts.rs`), and then
//! `loops!` with the CPU features that it needs:
//!
//! - `enter`, `round`, `last`: AES in three parts. `round` and `last` get the round key before and the one after, as
//!   some CPUs add a key first and others last; what `last` gets as the one after may be more than a key;
//! - `shift_in`: the blocks moved one place up, the last block of another vector coming in below.

/// See the top of the file.
macro_rules! loops {
    ($features:tt) => {
        use crate::simd::xts::for_group;
        use std::hint::black_box;

        /// AES-256's round keys.
        type Keys = [[u8; 16]; 15];

        /// AES, forwards or backwards, of each input, and the sum of that and each mask.
        #[inline]
        #[target_feature(enable = $features)]
        fn crypt<const ENCRYPT: bool, const KEYS: usize, const N: usize>(
            keys: &[[u8; 16]; KEYS],
            input: [Vector; N],
            masks: [Vector; N],
        ) -> [Vector; N] {
            // Read anew: kept from one call to the next, keys would be spilled, and lie about on the stack.
            let keys = black_box(keys);
            let mut state = input;
            let mut before = broadcast(&keys[0]);
            for state in &mut state {
                *state = enter(*state, before);
            }
            for key in &keys[1..KEYS - 1] {
                let key = broadcast(key);
                for state in &mut state {
                    *state = round::<ENCRYPT>(*state, before, key);
                }
                before = key;
            }
            let key = broadcast(&keys[KEYS - 1]);
            for (state, mask) in state.iter_mut().zip(masks) {
                *state = last::<ENCRYPT>(*state, before, xor(key, mask));
            }
            state
        }

        /// Turns the numbers of data units into the tweaks of their first blocks.
        #[inline]
        #[target_feature(enable = $features)]
        fn first_tweaks(keys: &Keys, tweaks: &mut [[u8; BYTES]]) {
            let (groups, rest) = tweaks.as_chunks_mut();
            for group in groups {
                let group: &mut [_; GROUP] = group;
                let input = std::array::from_fn(|i| load(&group[i]));
                let output = crypt::<true, 15, GROUP>(keys, input, [zero(); GROUP]);
                for (tweak, output) in group.iter_mut().zip(output) {
                    store(tweak, output);
                }
            }
            // Independent of each other, so that the CPU overlaps them by itself.
            for tweak in rest {
                let [output] = crypt::<true, 15, 1>(keys, [load(tweak)], [zero()]);
                store(tweak, output);
            }
        }

        /// One group. Gives the tweaks of the group after it, which `next` makes between the rounds: there they cost no
        /// time, not even where the data come slowly.
        #[inline]
        #[target_feature(enable = $features)]
        fn xts_group<const ENCRYPT: bool>(
            keys: &Keys,
            tweaks: [Vector; GROUP],
            group: &mut [u8; GROUP_BYTES],
            end: *const u8,
            next: impl Fn(usize, Vector) -> Vector,
        ) -> [Vector; GROUP] {
            // Read anew, as in `crypt`.
            let keys = black_box(keys);
            fetch_ahead(group, end);
            let (vectors, _) = group.as_chunks_mut::<BYTES>();
            let mut before = broadcast(&keys[0]);
            let mut state = tweaks;
            for i in 0..GROUP {
                state[i] = enter(xor(load(&vectors[i]), tweaks[i]), before);
            }
            let mut after = tweaks;
            for_group!(i => {
                let key = broadcast(&keys[1 + i]);
                for state in &mut state {
                    *state = round::<ENCRYPT>(*state, before, key);
                }
                after[i] = next(i, tweaks[i]);
                before = key;
            });
            for key in &keys[1 + GROUP..14] {
                let key = broadcast(key);
                for state in &mut state {
                    *state = round::<ENCRYPT>(*state, before, key);
                }
                before = key;
            }
            let key = broadcast(&keys[14]);
            for i in 0..GROUP {
                store(&mut vectors[i], last::<ENCRYPT>(state[i], before, xor(key, tweaks[i])));
            }
            after
        }

        /// CBC decryption over many units.
        #[target_feature(enable = $features)]
        pub(super) fn cbc_decrypt(
            keys: &[[u8; 16]; 11],
            ivs: &[[u8; 16]],
            unit_bytes: usize,
            run: &mut [u8],
        ) {
            for (unit, iv) in run.chunks_exact_mut(unit_bytes).zip(ivs) {
                let mut before = broadcast(iv);
                let (groups, rest) = unit.as_chunks_mut::<GROUP_BYTES>();
                for group in groups {
                    before = cbc_group(keys, before, group);
                }
                if !rest.is_empty() {
                    let mut group = [0; GROUP_BYTES];
                    group[..rest.len()].copy_from_slice(rest);
                    cbc_group(keys, before, &mut group);
                    rest.copy_from_slice(&group[..rest.len()]);
                }
            }
        }

        /// One group of a unit, `before` having the ciphertext before it as its last block. Gives the same for the
        /// group after it.
        #[inline]
        #[target_feature(enable = $features)]
        fn cbc_group(keys: &[[u8; 16]; 11], before: Vector, group: &mut [u8; GROUP_BYTES]) -> Vector {
            let (vectors, _) = group.as_chunks_mut::<BYTES>();
            let input: [_; GROUP] = std::array::from_fn(|i| load(&vectors[i]));
            let mut masks = input;
            for i in 0..GROUP {
                masks[i] = shift_in(if i == 0 { before } else { input[i - 1] }, input[i]);
            }
            let output = crypt::<false, 11, GROUP>(keys, input, masks);
            for (vector, output) in vectors.iter_mut().zip(output) {
                store(vector, output);
            }
            input[GROUP - 1]
        }

        /// The rounds of AES-256 alone, on data that never leave the registers: the speed that no mode can exceed. Returns
        /// how many bytes went through.
        #[target_feature(enable = $features)]
        pub(super) fn rounds_alone(keys: &[[u8; 16]; 15], groups: usize, data: &mut [u8; 512]) -> usize {
            let (vectors, _) = data.as_chunks_mut::<BYTES>();
            let (vectors, _) = vectors.as_chunks_mut::<GROUP>();
            let vectors = &mut vectors[0];
            let mut state: [_; GROUP] = std::array::from_fn(|i| load(&vectors[i]));
            for _ in 0..groups {
                let mut before = broadcast(&keys[0]);
                for key in &keys[1..] {
                    let key = broadcast(key);
                    for state in &mut state {
                        *state = round::<true>(*state, before, key);
                    }
                    before = key;
                }
            }
            for (vector, state) in vectors.iter_mut().zip(state) {
                store(vector, state);
            }
            groups * GROUP_BYTES
        }
    };
}

/// What is done with one block per register: key schedules (FIPS 197 5.2), and CBC encryption.
macro_rules! one_block {
    ($features:tt) => {
        /// CBC encryption over many units. Within a unit each block waits for the one before; units do not wait for each
        /// other, so several go in step: block 0 of each, then block 1 of each, and so on.
        ///
        /// Not more than eight of them, nor in wider registers: units start a multiple of 4096 bytes apart, so that their
        /// lines compete for one set of the first-level cache, which holds 8 to 12.
        #[target_feature(enable = $features)]
        pub(super) fn cbc_encrypt(
            keys: &[[u8; 16]; 11],
            ivs: &[[u8; 16]],
            unit_bytes: usize,
            run: &mut [u8],
        ) {
            let (eights, rest) = ivs.as_chunks();
            let (eight_units, rest_units) = run.split_at_mut(eights.len() * 8 * unit_bytes);
            for (ivs, units) in eights.iter().zip(eight_units.chunks_exact_mut(8 * unit_bytes)) {
                cbc_encrypt_in_step::<8>(keys, ivs, unit_bytes, units);
            }
            let (fours, rest) = rest.as_chunks();
            let (four_units, rest_units) = rest_units.split_at_mut(fours.len() * 4 * unit_bytes);
            for (ivs, units) in fours.iter().zip(four_units.chunks_exact_mut(4 * unit_bytes)) {
                cbc_encrypt_in_step::<4>(keys, ivs, unit_bytes, units);
            }
            for (iv, unit) in rest.iter().zip(rest_units.chunks_exact_mut(unit_bytes)) {
                cbc_encrypt_in_step::<1>(keys, &[*iv], unit_bytes, unit);
            }
        }

        /// CBC encryption of `N` units, which are all of `units`.
        #[inline]
        #[target_feature(enable = $features)]
        fn cbc_encrypt_in_step<const N: usize>(
            keys: &[[u8; 16]; 11],
            ivs: &[[u8; 16]; N],
            unit_bytes: usize,
            units: &mut [u8],
        ) {
            let (blocks, _) = units.as_chunks_mut::<16>();
            let unit_blocks = unit_bytes / 16;
            assert_eq!(blocks.len(), N * unit_blocks);
            let mut chains: [_; N] = std::array::from_fn(|i| load(&ivs[i]));
            for at in 0..unit_blocks {
                for i in 0..N {
                    chains[i] = xor(chains[i], load(&blocks[i * unit_blocks + at]));
                }
                chains = crypt::<true, 11, N>(keys, chains, [zero(); N]);
                for i in 0..N {
                    store(&mut blocks[i * unit_blocks + at], chains[i]);
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn expand_128(key: &[u8; 16], keys: &mut [[u8; 16]; 11]) {
            let mut key = load(key);
            store(&mut keys[0], key);
            for (place, constant) in keys[1..].iter_mut().zip(CONSTANTS) {
                key = xor(sums(key), sub_rot_word(key, constant));
                store(place, key);
            }
        }

        #[target_feature(enable = $features)]
        pub(super) fn expand_256(key: &[u8; 32], keys: &mut [[u8; 16]; 15]) {
            let (halves, _) = key.as_chunks();
            let (mut even, mut odd) = (load(&halves[0]), load(&halves[1]));
            store(&mut keys[0], even);
            store(&mut keys[1], odd);
            for i in 1..8 {
                even = xor(sums(even), sub_rot_word(odd, CONSTANTS[i - 1]));
                store(&mut keys[2 * i], even);
                if i < 7 {
                    odd = xor(sums(odd), sub_word(even));
                    store(&mut keys[2 * i + 1], odd);
                }
            }
        }

        //= FIPS 197 5.3.5: the equivalent inverse cipher takes the keys backwards, all but the outer two through
        //= InvMixColumns.
        #[target_feature(enable = $features)]
        pub(super) fn invert<const KEYS: usize>(encrypt: &[[u8; 16]; KEYS], decrypt: &mut [[u8; 16]; KEYS]) {
            decrypt[0] = encrypt[KEYS - 1];
            for i in 1..KEYS - 1 {
                store(&mut decrypt[i], inverse_mix_columns(load(&encrypt[KEYS - 1 - i])));
            }
            decrypt[KEYS - 1] = encrypt[0];
        }
    };
}

//= FIPS 197 5.2: Rcon, powers of x modulo x^8 + x^4 + x^3 + x + 1.
pub(super) const CONSTANTS: [u8; 10] = [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1b, 0x36];

pub(super) use {loops, one_block};
