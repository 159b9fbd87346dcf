//! AES-128-CBC encryption of several data units in step.
//!
//! Within a unit each block waits for the one before, so one unit keeps a quarter or less of the CPU's AES units busy.
//! Units do not wait for each other: here, block 0 of each unit goes first, then block 1 of each, and so on.
//!
//! There is vector code for x86-64 alone. Elsewhere, and for the units that are left over, AWS-LC encrypts unit by
//! unit; that is the portable twin, too.

use zeroize::Zeroizing;

/// Most units that go in step. Eight cover the AES instruction's latency; more would compete for one set of the
/// first-level cache, as units start a multiple of 4096 bytes apart, and that set holds 8 to 12 lines.
pub(crate) const LANES_MAX: usize = 8;

/// An AES-128 key expanded for encryption in step. Wipes itself.
pub(crate) struct Key {
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "read by the vector code alone"))]
    rounds: Zeroizing<[[u8; 16]; 11]>,
}

impl Key {
    /// `None` if this CPU, or this build, has no code for it.
    pub(crate) fn new(key: &[u8; 16]) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("aes") {
            let mut rounds = Zeroizing::new([[0; 16]; 11]);
            // SAFETY: the CPU has AES instructions, asked on the line above, which is all that the function needs.
            unsafe { x86::expand(key, &mut rounds) };
            return Some(Self { rounds });
        }
        let _ = key;
        None
    }

    /// Encrypts from the front of `run` as many units as it can in step, and returns how many those are: a multiple of
    /// four, and fewer than four stay. `ivs` has one IV for each unit.
    ///
    /// # Panics
    ///
    /// If `unit_bytes` is not a multiple of 16, or `run` is not one unit for each IV.
    pub(crate) fn encrypt(&self, ivs: &[[u8; 16]], unit_bytes: usize, run: &mut [u8]) -> usize {
        assert!(unit_bytes.is_multiple_of(16) && run.len() == ivs.len() * unit_bytes);
        let done = self.in_lanes::<LANES_MAX>(ivs, unit_bytes, run);
        done + self.in_lanes::<4>(&ivs[done..], unit_bytes, &mut run[done * unit_bytes..])
    }

    /// Encrypts as many times `LANES` units as there are, and returns how many units those are.
    #[cfg(target_arch = "x86_64")]
    fn in_lanes<const LANES: usize>(&self, ivs: &[[u8; 16]], unit_bytes: usize, run: &mut [u8]) -> usize {
        let (ivs, _) = ivs.as_chunks::<LANES>();
        for (ivs, units) in ivs.iter().zip(run.chunks_exact_mut(LANES * unit_bytes)) {
            // SAFETY: a `Key` exists only where `new` found AES instructions, which is all that the function needs.
            // WHY UNSAFE: five times the speed of AWS-LC's unit by unit at 4096 bytes (measured with benches/cipher.rs).
            unsafe { x86::encrypt(&self.rounds, ivs, unit_bytes, units) };
        }
        ivs.len() * LANES
    }

    /// There is no code for it here, and no `Key` to call it with.
    #[cfg(not(target_arch = "x86_64"))]
    fn in_lanes<const LANES: usize>(&self, _ivs: &[[u8; 16]], _unit_bytes: usize, _run: &mut [u8]) -> usize {
        0
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_aesenc_si128, _mm_aesenclast_si128, _mm_aeskeygenassist_si128, _mm_loadu_si128,
        _mm_shuffle_epi32, _mm_slli_si128, _mm_storeu_si128, _mm_xor_si128,
    };

    #[inline]
    #[target_feature(enable = "sse2")]
    fn load(bytes: &[u8; 16]) -> __m128i {
        // SAFETY: an unaligned load of the 16 bytes that `bytes` borrows.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn store(bytes: &mut [u8; 16], value: __m128i) {
        // SAFETY: an unaligned store to the 16 bytes that `bytes` borrows mutably.
        unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), value) }
    }

    /// FIPS 197 5.2: the key schedule.
    #[target_feature(enable = "aes")]
    pub(super) fn expand(key: &[u8; 16], rounds: &mut [[u8; 16]; 11]) {
        /// The round key after `key`.
        #[inline]
        #[target_feature(enable = "aes")]
        fn next<const RCON: i32>(key: __m128i) -> __m128i {
            let word = _mm_shuffle_epi32::<0xff>(_mm_aeskeygenassist_si128::<RCON>(key));
            // Each word is added to all later ones.
            let sums = _mm_xor_si128(key, _mm_slli_si128::<4>(key));
            let sums = _mm_xor_si128(sums, _mm_slli_si128::<8>(sums));
            _mm_xor_si128(sums, word)
        }
        let k0 = load(key);
        let k1 = next::<0x01>(k0);
        let k2 = next::<0x02>(k1);
        let k3 = next::<0x04>(k2);
        let k4 = next::<0x08>(k3);
        let k5 = next::<0x10>(k4);
        let k6 = next::<0x20>(k5);
        let k7 = next::<0x40>(k6);
        let k8 = next::<0x80>(k7);
        let k9 = next::<0x1b>(k8);
        let k10 = next::<0x36>(k9);
        for (bytes, key) in rounds.iter_mut().zip([k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10]) {
            store(bytes, key);
        }
    }

    /// CBC over `LANES` units, which are all of `run`.
    #[target_feature(enable = "aes")]
    pub(super) fn encrypt<const LANES: usize>(
        rounds: &[[u8; 16]; 11],
        ivs: &[[u8; 16]; LANES],
        unit_bytes: usize,
        run: &mut [u8],
    ) {
        let mut keys = [load(&rounds[0]); 11];
        for (key, bytes) in keys.iter_mut().zip(rounds) {
            *key = load(bytes);
        }
        let [first, middle @ .., last] = keys;
        let mut chains = [first; LANES];
        for (chain, iv) in chains.iter_mut().zip(ivs) {
            *chain = load(iv);
        }
        let (blocks, _) = run.as_chunks_mut::<16>();
        let unit_blocks = unit_bytes / 16;
        assert_eq!(blocks.len(), LANES * unit_blocks);
        for at in 0..unit_blocks {
            for lane in 0..LANES {
                let plain = load(&blocks[lane * unit_blocks + at]);
                chains[lane] = _mm_xor_si128(chains[lane], _mm_xor_si128(plain, first));
            }
            for key in middle {
                for chain in &mut chains {
                    *chain = _mm_aesenc_si128(*chain, key);
                }
            }
            for lane in 0..LANES {
                chains[lane] = _mm_aesenclast_si128(chains[lane], last);
                store(&mut blocks[lane * unit_blocks + at], chains[lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::awslc::{Algorithm, Context, Direction};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn vector_code_equals_its_portable_twin(
            key in any::<[u8; 16]>(),
            ivs in prop::collection::vec(any::<[u8; 16]>(), 0..30),
            log2 in 4..12_u32,
            fill in any::<u8>(),
        ) {
            let Some(in_step) = Key::new(&key) else { return Ok(()) };
            let unit_bytes = 1 << log2;
            let plain = vec![fill; ivs.len() * unit_bytes];
            let mut data = plain.clone();
            let done = in_step.encrypt(&ivs, unit_bytes, &mut data);
            prop_assert_eq!(done, ivs.len() / 4 * 4);

            let mut expected = plain;
            let mut context = Context::new(Algorithm::Aes128Cbc, Direction::Encrypt, &key);
            for (unit, iv) in expected.chunks_exact_mut(unit_bytes).zip(&ivs).take(done) {
                context.crypt(iv, unit);
            }
            prop_assert!(data == expected);
        }
    }
}
