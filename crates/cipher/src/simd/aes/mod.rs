//! AES over many data units per call, by the CPU's own instructions: XTS with AES-256, CBC with AES-128.
//!
//! ```text
//!   Kernel::best() --> the widest registers that this CPU has AES for
//!                        vaes512: 4 blocks   vaes256: 2   aesni: 1   armv8: 1        x 8 registers in flight
//!   key + kernel   --> XtsKey, CbcKey: the expanded key, a plain value
//! ```
//!
//! - An expanded key lies where its owner puts it, is never changed, and is wiped when dropped. Nothing is allocated or
//!   locked per call, and any number of threads can use it.
//! - The loops are the same for every kernel (`loops.rs`, and `simd/xts.rs` for all ciphers in XTS); a kernel's file has
//!   instructions only.
//! - Constant time: no branch and no address depends on key, tweak or data, but on lengths alone.
//!
//! A CPU without AES instructions has no kernel: AWS-LC serves it, and is what the tests compare each kernel with.

#[cfg(target_arch = "x86_64")]
mod aesni;
#[cfg(target_arch = "aarch64")]
mod armv8;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod loops;
#[cfg(target_arch = "x86_64")]
mod vaes256;
#[cfg(target_arch = "x86_64")]
mod vaes512;

use crate::simd::wipe;
use std::fmt;

/// Code for one kind of AES instructions, which this CPU has: that is checked where one is made, and nowhere else.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    instructions: Instructions,
    /// Whether asking for data ahead of their use helps.
    fetches_ahead: bool,
}

#[derive(Clone, Copy)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Vaes512,
    #[cfg(target_arch = "x86_64")]
    Vaes256,
    #[cfg(target_arch = "x86_64")]
    AesNi,
    #[cfg(target_arch = "aarch64")]
    ArmV8,
}

impl Kernel {
    /// The fastest that this CPU has.
    pub(crate) fn best() -> Option<Self> {
        Self::all().next()
    }

    /// Every one that this CPU has, the fastest first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let aesni = has!("aes") && has!("pclmulqdq") && has!("ssse3");
            let vaes = aesni && has!("vaes") && has!("vpclmulqdq");
            let vaes256 = vaes && has!("avx2");
            let vaes512 = vaes && has!("avx512f") && has!("avx512bw");
            // Measured on Sapphire Rapids: 1.3 to 1.5 times the speed from memory. Not on AMD, which SSE4a is alone to have:
            // an earlier experiment lost by it on Zen 5.
            let fetches_ahead = !has!("sse4a");
            let all = [
                (vaes512, Instructions::Vaes512),
                (vaes256, Instructions::Vaes256),
                (aesni, Instructions::AesNi),
            ];
            all.into_iter()
                .filter_map(move |(has, instructions)| has.then_some(Self { instructions, fetches_ahead }))
        }
        #[cfg(target_arch = "aarch64")]
        {
            let has = std::arch::is_aarch64_feature_detected!("aes");
            has.then_some(Self { instructions: Instructions::ArmV8, fetches_ahead: false }).into_iter()
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        std::iter::empty()
    }

    /// The name that the benchmark shows.
    pub(crate) fn name(self) -> &'static str {
        match self.instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Vaes512 => "vaes512",
            #[cfg(target_arch = "x86_64")]
            Instructions::Vaes256 => "vaes256",
            #[cfg(target_arch = "x86_64")]
            Instructions::AesNi => "aesni",
            #[cfg(target_arch = "aarch64")]
            Instructions::ArmV8 => "armv8",
        }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Calls a function of the kernel's module.
macro_rules! with_kernel {
    ($kernel:expr, $function:ident $(::<$generic:tt>)? ($($argument:expr),*)) => {
        match $kernel.instructions {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: there is a `Kernel` of this kind only where `Kernel::all` found the CPU features that the function needs.
            Instructions::Vaes512 => unsafe { vaes512::$function $(::<$generic>)? ($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::Vaes256 => unsafe { vaes256::$function $(::<$generic>)? ($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::AesNi => unsafe { aesni::$function $(::<$generic>)? ($($argument),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            Instructions::ArmV8 => unsafe { armv8::$function $(::<$generic>)? ($($argument),*) },
        }
    };
}

/// Likewise for what those with one block per register do for all: every x86 kernel needs AES-NI, too.
macro_rules! with_one_block {
    ($kernel:expr, $function:ident ($($argument:expr),*)) => {
        match $kernel.instructions {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Kernel::all` makes none of these where AES-NI is missing, which is what the function needs.
            Instructions::Vaes512 | Instructions::Vaes256 | Instructions::AesNi => unsafe {
                aesni::$function($($argument),*)
            },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: there is a `Kernel` of this kind only where `Kernel::all` found AES, which is what the function needs.
            Instructions::ArmV8 => unsafe { armv8::$function($($argument),*) },
        }
    };
}

/// An AES-256-XTS key, expanded. Wipes itself.
#[repr(C, align(64))]
pub(crate) struct XtsKey {
    encrypt: [[u8; 16]; 15],
    decrypt: [[u8; 16]; 15],
    /// Of the second half, which only ever encrypts.
    tweak: [[u8; 16]; 15],
    kernel: Kernel,
}

impl XtsKey {
    /// Expands `key`: first the data key, then the tweak key. That they differ is checked where keys come in
    /// ([`ModeInfo::check_key`](crate::ModeInfo::check_key)).
    pub(crate) fn new(kernel: Kernel, key: &[u8; 64]) -> Box<Self> {
        // Boxed before it is filled, so that no copy stays behind on the stack.
        let none = [[0; 16]; 15];
        let mut boxed = Box::new(Self { kernel, encrypt: none, decrypt: none, tweak: none });
        let Self { encrypt, decrypt, tweak, .. } = &mut *boxed;
        let (halves, _) = key.as_chunks::<32>();
        with_one_block!(kernel, expand_256(&halves[0], encrypt));
        with_one_block!(kernel, expand_256(&halves[1], tweak));
        with_one_block!(kernel, invert(encrypt, decrypt));
        boxed
    }

    /// Encrypts `data`; the IV of unit `i` is `first + i`, modulo 2^128.
    ///
    /// # Panics
    ///
    /// If `unit_bytes` is not a power of two from 16, or `data` not a whole number of units.
    pub(crate) fn encrypt_units(&self, first: u128, unit_bytes: usize, data: &mut [u8]) {
        assert_units(unit_bytes, data);
        with_kernel!(self.kernel, xts::<true>(self, first, unit_bytes, data));
    }

    /// Decrypts `data`, likewise.
    ///
    /// # Panics
    ///
    /// Likewise.
    pub(crate) fn decrypt_units(&self, first: u128, unit_bytes: usize, data: &mut [u8]) {
        assert_units(unit_bytes, data);
        with_kernel!(self.kernel, xts::<false>(self, first, unit_bytes, data));
    }

    /// Whether asking for data ahead of their use helps.
    fn fetches_ahead(&self) -> bool {
        self.kernel.fetches_ahead
    }
}

impl Drop for XtsKey {
    fn drop(&mut self) {
        let Self { kernel: _, encrypt, decrypt, tweak } = self;
        for keys in [encrypt, decrypt, tweak] {
            wipe(keys.as_flattened_mut());
        }
    }
}

impl fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, encrypt: _, decrypt: _, tweak: _ } = self;
        f.debug_struct("XtsKey").field("kernel", kernel).finish_non_exhaustive()
    }
}

/// An AES-128 key, expanded for CBC. Wipes itself.
#[repr(C, align(64))]
pub(crate) struct CbcKey {
    encrypt: [[u8; 16]; 11],
    decrypt: [[u8; 16]; 11],
    kernel: Kernel,
}

impl CbcKey {
    /// Expands `key`.
    pub(crate) fn new(kernel: Kernel, key: &[u8; 16]) -> Box<Self> {
        // Boxed before it is filled, so that no copy stays behind on the stack.
        let mut boxed = Box::new(Self { kernel, encrypt: [[0; 16]; 11], decrypt: [[0; 16]; 11] });
        let Self { encrypt, decrypt, .. } = &mut *boxed;
        with_one_block!(kernel, expand_128(key, encrypt));
        with_one_block!(kernel, invert(encrypt, decrypt));
        boxed
    }

    /// Encrypts a run of data units, one for each of `ivs`.
    ///
    /// # Panics
    ///
    /// If `unit_bytes` is not a power of two from 16, or `run` not one unit for each IV.
    pub(crate) fn encrypt(&self, ivs: &[[u8; 16]], unit_bytes: usize, run: &mut [u8]) {
        assert_units(unit_bytes, run);
        assert_eq!(run.len() / unit_bytes, ivs.len(), "an IV for each unit");
        with_one_block!(self.kernel, cbc_encrypt(&self.encrypt, ivs, unit_bytes, run));
    }

    /// Decrypts a run of data units, likewise.
    ///
    /// # Panics
    ///
    /// Likewise.
    pub(crate) fn decrypt(&self, ivs: &[[u8; 16]], unit_bytes: usize, run: &mut [u8]) {
        assert_units(unit_bytes, run);
        assert_eq!(run.len() / unit_bytes, ivs.len(), "an IV for each unit");
        with_kernel!(self.kernel, cbc_decrypt(&self.decrypt, ivs, unit_bytes, run));
    }
}

impl Drop for CbcKey {
    fn drop(&mut self) {
        let Self { kernel: _, encrypt, decrypt } = self;
        for keys in [encrypt, decrypt] {
            wipe(keys.as_flattened_mut());
        }
    }
}

impl fmt::Debug for CbcKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, encrypt: _, decrypt: _ } = self;
        f.debug_struct("CbcKey").field("kernel", kernel).finish_non_exhaustive()
    }
}

fn assert_units(unit_bytes: usize, data: &[u8]) {
    assert!(unit_bytes.is_power_of_two() && unit_bytes >= 16 && data.len().is_multiple_of(unit_bytes));
}

/// AES-256's rounds alone, `groups` times on 512 bytes or less that stay in registers: what the benchmark compares
/// with. Returns how many bytes have gone through the rounds.
pub(crate) fn rounds_alone(kernel: Kernel, groups: usize, data: &mut [u8; 512]) -> usize {
    let keys = [[7; 16]; 15];
    with_kernel!(kernel, rounds_alone(&keys, groups, data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::awslc::{Algorithm, Context, Direction};
    use crate::simd::requests::{Request, noise, numbers, requests};
    use proptest::prelude::*;

    fn by_library(
        algorithm: Algorithm,
        direction: Direction,
        key: &[u8],
        ivs: impl Iterator<Item = [u8; 16]>,
        Request { unit_bytes, data, .. }: &Request,
    ) -> Vec<u8> {
        let mut data = data.clone();
        let mut context = Context::new(algorithm, direction, key);
        for (unit, iv) in data.chunks_exact_mut(*unit_bytes).zip(ivs) {
            context.crypt(&iv, unit);
        }
        data
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(crate::unit::cases(400)))]

        #[test]
        fn xts_by_every_kernel_equals_the_library(
            data_key in any::<[u8; 32]>(), tweak_key in any::<[u8; 32]>(), first in numbers(), request in requests(),
        ) {
            prop_assume!(data_key != tweak_key);
            let key: [u8; 64] = [data_key, tweak_key].as_flattened().try_into().unwrap();
            let ivs = (0..).map(|i| first.wrapping_add(i).to_le_bytes());
            let unit_bytes = request.unit_bytes;
            let encrypted = by_library(Algorithm::Aes256Xts, Direction::Encrypt, &key, ivs.clone(), &request);
            let decrypted = by_library(Algorithm::Aes256Xts, Direction::Decrypt, &key, ivs, &request);
            for kernel in Kernel::all() {
                let key = XtsKey::new(kernel, &key);
                let data = request.transform(|data| key.encrypt_units(first, unit_bytes, data));
                prop_assert!(data == encrypted, "{:?}: encryption", kernel);
                let data = request.transform(|data| key.decrypt_units(first, unit_bytes, data));
                prop_assert!(data == decrypted, "{:?}: decryption", kernel);
            }
        }

        #[test]
        fn cbc_by_every_kernel_equals_the_library(
            key in any::<[u8; 16]>(), seed in any::<u64>(), request in requests(),
        ) {
            let unit_bytes = request.unit_bytes;
            let ivs = noise(seed, request.data.len() / unit_bytes * 16);
            let ivs: &[[u8; 16]] = ivs.as_chunks().0;
            let library = |direction| {
                by_library(Algorithm::Aes128Cbc, direction, &key, ivs.iter().copied(), &request)
            };
            let (encrypted, decrypted) = (library(Direction::Encrypt), library(Direction::Decrypt));
            for kernel in Kernel::all() {
                let key = CbcKey::new(kernel, &key);
                let data = request.transform(|data| key.encrypt(ivs, unit_bytes, data));
                prop_assert!(data == encrypted, "{:?}: encryption", kernel);
                let data = request.transform(|data| key.decrypt(ivs, unit_bytes, data));
                prop_assert!(data == decrypted, "{:?}: decryption", kernel);
            }
        }
    }

    #[test]
    fn a_key_shows_nothing_of_itself() {
        for kernel in Kernel::all() {
            let shown =
                format!("{:?} {:?}", XtsKey::new(kernel, &[0xab; 64]), CbcKey::new(kernel, &[0xab; 16]));
            assert!(shown.contains(kernel.name()), "{shown}");
            assert!(!shown.contains("171") && !shown.contains("ab"), "{shown}");
        }
    }

    #[test]
    fn the_fastest_kernel_comes_first() {
        let names: Vec<_> = Kernel::all().map(Kernel::name).collect();
        assert_eq!(Kernel::best().map(Kernel::name), names.first().copied());
        println!("kernels of this CPU: {names:?}");
    }
}
