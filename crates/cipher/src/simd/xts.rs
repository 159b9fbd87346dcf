//! XTS over data units, written once and compiled for each cipher and each vector width.
//!
//! A kernel's file has, beside what [`width`](super::width) lists, its cipher, and then says `xts!` with the CPU features that it
//! needs:
//!
//! - `GROUP`: how many vectors are worked on together; `POWERS` and `times_group` for so many;
//! - `XtsKey`: the expanded key, with three sets of round `Keys`: `encrypt`, `decrypt`, and `tweak`, which only ever encrypts;
//!   `fetches_ahead()`: whether asking for data ahead of their use helps;
//! - `first_tweaks`: turns the numbers of data units into the tweaks of their first blocks;
//! - `xts_group`: one group of vectors, each with its tweak; gives the tweaks of the group after it.

/// How far ahead data are fetched. Measured: 512 bytes gain half of what 2048 do, and up to 8192 no more.
pub(super) const AHEAD_BYTES: usize = 2048;

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
macro_rules! xts {
    ($features:tt) => {
        use crate::simd::xts::{AHEAD_BYTES, double};
        use std::ptr;

        /// Blocks that are worked on together.
        const GROUP_BLOCKS: usize = GROUP * BLOCKS;
        const GROUP_BYTES: usize = GROUP * BYTES;

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
        #[target_feature(enable = $features)]
        fn load_group(vectors: &[[u8; BYTES]]) -> [Vector; GROUP] {
            let mut loaded = [zero(); GROUP];
            for (place, vector) in loaded.iter_mut().zip(vectors) {
                *place = load(vector);
            }
            loaded
        }

        #[inline]
        fn blocks_mut(vectors: &mut [[u8; BYTES]]) -> &mut [[u8; 16]] {
            vectors.as_flattened_mut().as_chunks_mut().0
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
            let end = if key.fetches_ahead() { data.as_ptr_range().end } else { ptr::null() };
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

        /// Units of one group or more.
        #[inline]
        #[target_feature(enable = $features)]
        fn xts_units<const ENCRYPT: bool>(
            keys: &Keys,
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

        /// Units of less than a group: several in each.
        #[target_feature(enable = $features)]
        fn xts_small_units<const ENCRYPT: bool>(
            keys: &Keys,
            tweaks: &[[u8; 16]],
            unit_bytes: usize,
            run: &mut [u8],
        ) {
            let (groups, rest) = run.as_chunks_mut::<GROUP_BYTES>();
            let group_units = GROUP_BYTES / unit_bytes;
            if unit_bytes >= BYTES {
                let vectors = unit_bytes / BYTES;
                for (group, firsts) in groups.iter_mut().zip(tweaks.chunks_exact(group_units)) {
                    let mut tweaks = [zero(); GROUP];
                    for i in 0..GROUP {
                        tweaks[i] = times(broadcast(&firsts[i / vectors]), load(&POWERS[i % vectors]));
                    }
                    xts_group::<ENCRYPT>(keys, tweaks, group, ptr::null(), |_, tweak| tweak);
                }
                let done = groups.len() * group_units;
                xts_few_units::<ENCRYPT>(keys, &tweaks[done..], unit_bytes, rest);
            } else {
                xts_few_units::<ENCRYPT>(keys, tweaks, unit_bytes, run);
            }
        }

        /// Units of less than a vector, or in all of less than a group, which is filled up with nothing.
        #[target_feature(enable = $features)]
        fn xts_few_units<const ENCRYPT: bool>(
            keys: &Keys,
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
                let tweaks = load_group(vectors);
                let mut group = [0; GROUP_BYTES];
                group[..part.len()].copy_from_slice(part);
                xts_group::<ENCRYPT>(keys, tweaks, &mut group, ptr::null(), |_, tweak| tweak);
                part.copy_from_slice(&group[..part.len()]);
            }
        }
    };
}

/// Times x in GF(2^128), in the byte order of IEEE 1619.
pub(crate) fn double(tweak: u128) -> u128 {
    //= IEEE 1619-2018 5.2: a carry out of the top bit adds the polynomial, 0x87, to the lowest byte.
    let carry = (tweak >> 127) * 0x87;
    (tweak << 1) ^ carry
}

pub(super) use {for_group, xts};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubling_shifts_and_folds_the_carry() {
        assert_eq!(double(1), 2);
        assert_eq!(double(1 << 127), 0x87);
        assert_eq!(double(3 << 126), (1 << 127) ^ 0x87);
    }
}
