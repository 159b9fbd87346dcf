//! The two parts of Adiantum where its time goes, by vector instructions: XChaCha12's streams and NH.
//!
//! ```text
//!   Kernel::best() --> avx512: 16 blocks of stream at once   avx2: 8   portable: what the library does
//! ```
//!
//! - Streams are computed for several data units together. [`Kernel::stream_keys`] derives a key for each, which is as much
//!   work as a block of stream; [`Kernel::apply_streams`] takes all their blocks as one sequence.
//! - The loops are the same for every kernel (`chacha.rs`, `nh.rs`); a kernel's file has instructions only.
//! - Constant time: no branch and no address depends on key, nonce or data, but on lengths alone.
//!
//! The portable kernel serves every other CPU, and is what the tests compare the others with: the library's ChaCha12, and NH's
//! definition.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod chacha;
pub(crate) mod nh;
mod portable;

use crate::simd::wipe;
use std::fmt;

/// Data units whose streams' keys are derived together.
pub(crate) const UNITS_MAX: usize = 16;

/// Where streams may be applied from: what every kernel takes at once, or a multiple of it.
pub(crate) const STRIDE_BYTES: usize = 16 * 64;

//= RFC 8439 2.3: "expand 32-byte k".
#[cfg(target_arch = "x86_64")]
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// Code for one kind of vector registers, which this CPU has: that is checked where one is made, and nowhere else.
#[derive(Clone, Copy)]
pub(crate) struct Kernel(Instructions);

#[derive(Clone, Copy)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Calls a function of the kernel's module.
macro_rules! with_kernel {
    ($kernel:expr, $function:ident ($($argument:expr),*)) => {
        match $kernel.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: there is a `Kernel` of this kind only where `Kernel::all` found the CPU features that the function needs.
            Instructions::Avx512 => unsafe { avx512::$function($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::Avx2 => unsafe { avx2::$function($($argument),*) },
            Instructions::Portable => portable::$function($($argument),*),
        }
    };
}

impl Kernel {
    /// The fastest that this CPU has.
    pub(crate) fn best() -> Self {
        Self::all().next().expect("the portable one is always there")
    }

    /// Every one that this CPU has, the fastest first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            (std::arch::is_x86_feature_detected!("avx512f"), Instructions::Avx512),
            #[cfg(target_arch = "x86_64")]
            (std::arch::is_x86_feature_detected!("avx2"), Instructions::Avx2),
            (true, Instructions::Portable),
        ];
        all.into_iter().filter_map(|(has, instructions)| has.then_some(Self(instructions)))
    }

    /// The name that the benchmark shows.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => "avx2",
            Instructions::Portable => "portable",
        }
    }

    /// The NH hash of `message`.
    ///
    /// # Panics
    ///
    /// If `message` is longer than [`nh::MESSAGE_BYTES_MAX`], or not a multiple of 16 bytes long.
    #[inline]
    pub(crate) fn nh(self, key: &nh::Key, message: &[u8]) -> [[u8; 16]; 2] {
        let (fours, rest) = message.as_chunks();
        assert!(message.len() <= nh::MESSAGE_BYTES_MAX && rest.is_empty());
        with_kernel!(self, nh_sums(key, fours))
    }

    /// Makes `keys` those of the streams that XChaCha12 has under `key` and nonces of 24 bytes: each of the given ones, then a one
    /// in 8 bytes.
    ///
    /// # Panics
    ///
    /// If there are more than [`UNITS_MAX`].
    pub(crate) fn stream_keys(self, key: &[u8; 32], nonces: &[[u8; 16]], keys: &mut StreamKeys) {
        assert!(nonces.len() <= UNITS_MAX);
        with_kernel!(self, stream_keys(key, nonces, keys));
    }

    /// XORs streams onto data units of `unit_bytes`, unit `i` getting that of key `first_unit + i`. What becomes of the last 16
    /// bytes of each unit, which Adiantum has no stream for, is not said.
    ///
    /// # Panics
    ///
    /// If `unit_bytes` is below 16 or above 2^26, if `units` is not a whole number of units, if there are not so many keys, or if
    /// a whole number of blocks is not preceded by a multiple of [`STRIDE_BYTES`].
    pub(crate) fn apply_streams(
        self,
        keys: &StreamKeys,
        first_unit: usize,
        unit_bytes: usize,
        units: &mut [u8],
    ) {
        assert!((16..=1 << 26).contains(&unit_bytes) && units.len().is_multiple_of(unit_bytes));
        assert!(first_unit + units.len() / unit_bytes <= UNITS_MAX);
        let streams = Streams { keys, first_unit, unit_bytes };
        if unit_bytes.is_power_of_two() && unit_bytes >= 64 {
            assert!((first_unit * unit_bytes).is_multiple_of(STRIDE_BYTES));
            with_kernel!(self, apply_streams(&streams, units));
        } else {
            // Names, and data units that nobody has: not whole blocks of stream.
            portable::apply_streams(&streams, units);
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The keys of [`UNITS_MAX`] streams. Wipes itself.
#[repr(C, align(64))]
pub(crate) struct StreamKeys {
    /// Row `w` has the little-endian word `w` of each key.
    rows: [[u8; 4 * UNITS_MAX]; 8],
}

impl StreamKeys {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self { rows: [[0; 4 * UNITS_MAX]; 8] }
    }
}

impl Drop for StreamKeys {
    fn drop(&mut self) {
        wipe(self.rows.as_flattened_mut());
    }
}

/// The streams of data units, from one of them on.
struct Streams<'a> {
    keys: &'a StreamKeys,
    first_unit: usize,
    unit_bytes: usize,
}

/// Little-endian words.
#[cfg(target_arch = "x86_64")]
const fn numbers<const LANES: usize, const BYTES: usize>(lanes: [u8; LANES]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    let mut at = 0;
    while at < LANES {
        bytes[4 * at] = lanes[at];
        at += 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adiantum;
    use crate::simd::requests::{dun, noise, numbers, requests};
    use crate::unit::cases;
    use proptest::prelude::*;

    fn vectored() -> impl Iterator<Item = Kernel> {
        Kernel::all().filter(|kernel| !matches!(kernel.0, Instructions::Portable))
    }

    fn portable() -> Kernel {
        Kernel(Instructions::Portable)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(300)))]

        /// The whole mode, on requests of any length, place and number.
        #[test]
        fn adiantum_by_every_kernel_equals_the_portable_one(
            key in any::<[u8; 32]>(), first in numbers(), above in any::<[u64; 2]>(), request in requests(),
        ) {
            let first = dun(first, above);
            let unit_bytes = request.unit_bytes;
            let twin = adiantum::xchacha12_aes_by(portable(), &key);
            let (mut encrypted, mut decrypted) = (request.data.clone(), request.data.clone());
            twin.encrypt(first, unit_bytes, &mut encrypted);
            twin.decrypt(first, unit_bytes, &mut decrypted);
            for kernel in vectored() {
                let cipher = adiantum::xchacha12_aes_by(kernel, &key);
                let data = request.transform(|data| cipher.encrypt(first, unit_bytes, data));
                prop_assert!(data == encrypted, "{:?}: encryption", kernel);
                let data = request.transform(|data| cipher.decrypt(first, unit_bytes, data));
                prop_assert!(data == decrypted, "{:?}: decryption", kernel);
            }
        }

        #[test]
        fn nh_by_every_kernel_equals_its_definition(
            key in prop::collection::vec(any::<u8>(), nh::KEY_BYTES),
            message in prop::collection::vec(any::<u8>(), 0..=nh::MESSAGE_BYTES_MAX),
            offset in 0..64_usize,
        ) {
            let key = nh::Key::new(&key);
            let message = &message[offset.min(message.len())..];
            let message = &message[..message.len() / 16 * 16];
            let expected = portable().nh(&key, message);
            for kernel in vectored() {
                prop_assert_eq!(kernel.nh(&key, message), expected, "{:?}", kernel);
            }
        }

        /// From any unit on, as a stretch of a run has them.
        #[test]
        fn streams_of_every_kernel_equal_the_librarys(
            key in any::<[u8; 32]>(), seed in any::<u64>(), log2 in 5..12_u32, first in 0..UNITS_MAX,
            units in 0..=UNITS_MAX,
        ) {
            let unit_bytes = 1 << log2;
            let first = first / (STRIDE_BYTES >> log2).max(1) * (STRIDE_BYTES >> log2).max(1);
            let units = units.min(UNITS_MAX - first);
            let nonces = noise(seed, 16 * (first + units));
            let (nonces, _) = nonces.as_chunks();
            let streams = |kernel: Kernel| {
                let mut data = noise(seed ^ 1, units * unit_bytes);
                let mut keys = StreamKeys::new();
                kernel.stream_keys(&key, nonces, &mut keys);
                kernel.apply_streams(&keys, first, unit_bytes, &mut data);
                // What has no stream is not to be compared.
                data.chunks_mut(unit_bytes).for_each(|unit| unit[unit_bytes - 16..].fill(0));
                data
            };
            let expected = streams(portable());
            for kernel in vectored() {
                prop_assert!(streams(kernel) == expected, "{:?}", kernel);
            }
        }
    }

    #[test]
    fn carries_are_dropped_where_the_definition_says() {
        // All ones plus all ones is 2^32 - 2 in every word, so each four words add 2 * (2^32 - 2)^2 to each sum.
        let key = nh::Key::new(&[0xff; nh::KEY_BYTES]);
        let product = (u64::from(u32::MAX) - 1).pow(2);
        let sum = (0..128).fold(0_u64, |sum, _| sum.wrapping_add(product)).to_le_bytes();
        let sums = [sum; 4];
        let expected: &[[u8; 16]] = sums.as_flattened().as_chunks().0;
        for kernel in Kernel::all() {
            assert_eq!(kernel.nh(&key, &[0xff; nh::MESSAGE_BYTES_MAX]), expected, "{kernel:?}");
        }
    }

    #[test]
    fn the_fastest_kernel_comes_first() {
        let names: Vec<_> = Kernel::all().map(Kernel::name).collect();
        assert_eq!(Kernel::best().name(), names[0]);
        assert_eq!(names.last(), Some(&"portable"));
        println!("kernels of this CPU: {names:?}");
    }
}
