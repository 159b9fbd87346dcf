//! The loops over data units, written once and compiled for each vector width.
//!
//! A kernel's file has the primitives, all of one width, and then says `loops!` with the CPU features that it needs:
//!
//! - `Vector`: `BLOCKS` blocks of 16 bytes side by side; `load`, `store`, `xor`; `broadcast`: one block in every place;
//! - `enter`, `round`, `last`: AES in three parts. `round` and `last` get the round key before and the one after, as
//!   some CPUs add a key first and others last; what `last` gets as the one after may be more than a key;
//! - `times`: each block times a power of x up to 63 of its own; `times_group`: times x to the number of blocks in a
//!   group;
//! - `fetch`: a hint that this address is read and written soon;
//! - `shift_in`: the blocks moved one place up, the last block of another vector coming in below.

/// Vectors that are worked on together. Eight cover the AES instruction's latency on every CPU we know: it starts at the
/// most twice a cycle and takes four cycles or less.
pub(super) const GROUP: usize = 8;

/// How far ahead data are fetched. Measured: 512 bytes gain half of what 2048 do, and up to 8192 no more.
pub(super) const AHEAD_BYTES: usize = 2048;

/// Powers of x, as `times` takes them: block `b` of vector `i` holds x to the `i * BLOCKS + b` in its lower half, and the
/// polynomial in its upper one.
pub(super) const fn powers<const BYTES: usize>() -> [[u8; BYTES]; GROUP] {
    let mut powers = [[0; BYTES]; GROUP];
    let blocks = BYTES / 16;
    let mut power = 0;
    while power < GROUP * blocks {
        let at = power % blocks * 16;
        powers[power / blocks][at + power / 8] = 1 << (power % 8);
        powers[power / blocks][at + 8] = POLYNOMIAL;
        power += 1;
    }
    powers
}

//= IEEE 1619-2018 5.2: x^128 is x^7 + x^2 + x + 1.
const POLYNOMIAL: u8 = 0x87;

/// A block of code for each `i` of a group, written out: the compiler leaves a loop of this length as one, with the vectors
/// in memory instead of registers, which costs a tenth of the speed.
macro_rules! for_group {
    ($i:ident => $code:block) => {
        for_group!($i => $code, 0, 1, 2, 3, 4, 5, 6, 7);
    };
    ($i:ident => $code:block, $($value:literal),*) => {
        $({
            let $i: usize = $value;
            $code
        })*
    };
}

/// See the top of the file.
macro_rules! loops {
    ($features:tt) => {
        use std::hint::black_box;
        use std::ptr;

        const BYTES: usize = 16 * BLOCKS;
        /// Blocks that are worked on together.
        const GROUP_BLOCKS: usize = GROUP * BLOCKS;
        const GROUP_BYTES: usize = GROUP * BYTES;
        static POWERS: [[u8; BYTES]; GROUP] = powers();

        /// Asks for data that are worked on soon: from memory, not from a cache, they come faster (see `Kernel::all`).
        #[inline]
        #[target_feature(enable = $features)]
        fn fetch_ahead(group: &[u8; GROUP_BYTES], end: *const u8) {
            let ahead = group.as_ptr().wrapping_add(AHEAD_BYTES);
            if ahead < end {
                for line in (0..GROUP_BYTES).step_by(64) {
                    fetch(ahead.wrapping_add(line));
                }
            }
        }

        #[inline]
        fn blocks_mut(vectors: &mut [[u8; BYTES]]) -> &mut [[u8; 16]] {
            vectors.as_flattened_mut().as_chunks_mut().0
        }

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

        /// XTS over many units. Unit `i` has the number `first + i`.
        #[target_feature(enable = $features)]
        pub(super) fn xts<const ENCRYPT: bool>(
            key: &XtsKey,
            first: u128,
            unit_bytes: usize,
            data: &mut [u8],
        ) {
            let keys = if ENCRYPT { &key.encrypt } else { &key.decrypt };
            let end = if key.kernel.fetches_ahead { data.as_ptr_range().end } else { ptr::null() };
            let mut number = first;
            for run in data.chunks_mut(GROUP_BLOCKS * unit_bytes) {
                let units = run.len() / unit_bytes;
                let mut tweaks = [[0; BYTES]; GROUP];
                let tweaks = &mut tweaks[..units.div_ceil(BLOCKS)];
                for tweak in blocks_mut(tweaks) {
                    *tweak = number.to_le_bytes();
                    number = number.wrapping_add(1);
                }
                first_tweaks(&key.tweak, tweaks);
                let tweaks = &blocks_mut(tweaks)[..units];
                if unit_bytes < GROUP_BYTES {
                    xts_small_units::<ENCRYPT>(keys, tweaks, unit_bytes, run);
                    continue;
                }
                xts_units::<ENCRYPT>(keys, tweaks, unit_bytes, run, end);
            }
        }

        /// Turns the numbers of data units into the tweaks of their first blocks.
        #[inline]
        #[target_feature(enable = $features)]
        fn first_tweaks(keys: &[[u8; 16]; 15], tweaks: &mut [[u8; BYTES]]) {
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

        /// Units of one group or more.
        #[inline]
        #[target_feature(enable = $features)]
        fn xts_units<const ENCRYPT: bool>(
            keys: &[[u8; 16]; 15],
            firsts: &[[u8; 16]],
            unit_bytes: usize,
            run: &mut [u8],
            end: *const u8,
        ) {
            let first = broadcast(&firsts[0]);
            let mut tweaks = [first; GROUP];
            for i in 0..GROUP {
                tweaks[i] = times(first, load(&POWERS[i]));
            }
            for (unit, next) in run.chunks_exact_mut(unit_bytes).zip(1..) {
                let (groups, _) = unit.as_chunks_mut::<GROUP_BYTES>();
                let Some((last, groups)) = groups.split_last_mut() else { return };
                for group in groups {
                    tweaks = xts_group::<ENCRYPT>(keys, tweaks, group, end, |_, tweak| times_group(tweak));
                }
                // After the last unit of all nobody wants them, but they cost nothing.
                let first = broadcast(&firsts[next % firsts.len()]);
                tweaks = xts_group::<ENCRYPT>(keys, tweaks, last, end, |i, _| times(first, load(&POWERS[i])));
            }
        }

        /// One group. Gives the tweaks of the group after it, which `next` makes between the rounds: there they cost no
        /// time, not even where the data come slowly.
        #[inline]
        #[target_feature(enable = $features)]
        fn xts_group<const ENCRYPT: bool>(
            keys: &[[u8; 16]; 15],
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

        /// Units of less than a group: several in each, the last group filled up with nothing.
        #[target_feature(enable = $features)]
        fn xts_small_units<const ENCRYPT: bool>(
            keys: &[[u8; 16]; 15],
            tweaks: &[[u8; 16]],
            unit_bytes: usize,
            run: &mut [u8],
        ) {
            let mut firsts = tweaks.iter();
            for part in run.chunks_mut(GROUP_BYTES) {
                let mut tweaks = [[0; 16]; GROUP_BLOCKS];
                for (unit, first) in tweaks[..part.len() / 16].chunks_mut(unit_bytes / 16).zip(&mut firsts) {
                    let mut tweak = u128::from_le_bytes(*first);
                    for place in unit {
                        *place = tweak.to_le_bytes();
                        tweak = double(tweak);
                    }
                }
                let (vectors, _) = tweaks.as_flattened().as_chunks::<BYTES>();
                let tweaks = std::array::from_fn(|i| load(&vectors[i]));
                let mut group = [0; GROUP_BYTES];
                group[..part.len()].copy_from_slice(part);
                xts_group::<ENCRYPT>(keys, tweaks, &mut group, ptr::null(), |_, tweak| tweak);
                part.copy_from_slice(&group[..part.len()]);
            }
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

pub(super) use {for_group, loops, one_block};
