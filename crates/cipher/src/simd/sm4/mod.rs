//! SM4-XTS over many data units per call, by vector instructions, without a table in memory.
//!
//! ```text
//!   Kernel::best() --> gfni512: 4 blocks per register   gfni256: 2   aesni: 1      x 8 registers together
//!   key + kernel   --> XtsKey: the expanded key, a plain value
//! ```
//!
//! - An expanded key lies where its owner puts it, is never changed, and is wiped when dropped. Nothing is allocated or
//!   locked per call, and any number of threads can use it.
//! - SM4 is the same for every kernel (`loops.rs`), and so are the loops over data units (`simd/xts.rs`); a kernel's file has
//!   instructions only, of which the S-box is the point (`sbox.rs`).
//! - Constant time: no branch and no address depends on key, tweak or data, but on lengths alone. The library is not: it looks
//!   its S-box up in memory.
//!
//! A CPU that has none of these has no kernel: the library serves it, and is what the tests compare each kernel with.

#[cfg(target_arch = "x86_64")]
mod aesni;
#[cfg(target_arch = "x86_64")]
mod gfni256;
#[cfg(target_arch = "x86_64")]
mod gfni512;
#[cfg(target_arch = "x86_64")]
mod loops;
#[cfg(target_arch = "x86_64")]
mod sbox;

use std::fmt;
use zeroize::Zeroize;

/// Code for one kind of instructions, which this CPU has: that is checked where one is made, and nowhere else.
#[derive(Clone, Copy)]
pub(crate) struct Kernel(Instructions);

#[derive(Clone, Copy)]
enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Gfni512,
    #[cfg(target_arch = "x86_64")]
    Gfni256,
    #[cfg(target_arch = "x86_64")]
    AesNi,
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
            let gfni = has!("gfni") && has!("vpclmulqdq");
            let all = [
                (gfni && has!("avx512f") && has!("avx512bw"), Instructions::Gfni512),
                (gfni && has!("avx2"), Instructions::Gfni256),
                (has!("aes") && has!("pclmulqdq") && has!("ssse3"), Instructions::AesNi),
            ];
            all.into_iter().filter_map(|(has, instructions)| has.then_some(Self(instructions)))
        }
        #[cfg(not(target_arch = "x86_64"))]
        std::iter::empty()
    }

    /// The name that the benchmark shows.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Instructions::Gfni512 => "gfni512",
            #[cfg(target_arch = "x86_64")]
            Instructions::Gfni256 => "gfni256",
            #[cfg(target_arch = "x86_64")]
            Instructions::AesNi => "aesni",
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
        match $kernel.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: there is a `Kernel` of this kind only where `Kernel::all` found the CPU features that the function needs.
            Instructions::Gfni512 => unsafe { gfni512::$function $(::<$generic>)? ($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::Gfni256 => unsafe { gfni256::$function $(::<$generic>)? ($($argument),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Instructions::AesNi => unsafe { aesni::$function $(::<$generic>)? ($($argument),*) },
        }
    };
}

/// An SM4-XTS key, expanded. Wipes itself.
#[repr(C, align(64))]
pub(crate) struct XtsKey {
    encrypt: [u32; 32],
    decrypt: [u32; 32],
    /// Of the second half, which only ever encrypts.
    tweak: [u32; 32],
    kernel: Kernel,
}

impl XtsKey {
    /// Expands `key`: first the data key, then the tweak key. That they differ is checked where keys come in
    /// ([`ModeInfo::check_key`](crate::ModeInfo::check_key)).
    pub(crate) fn new(kernel: Kernel, key: &[u8; 32]) -> Box<Self> {
        // Boxed before it is filled, so that no copy stays behind on the stack.
        let none = [0; 32];
        let mut boxed = Box::new(Self { kernel, encrypt: none, decrypt: none, tweak: none });
        let Self { encrypt, decrypt, tweak, .. } = &mut *boxed;
        let (halves, _) = key.as_chunks::<16>();
        with_kernel!(kernel, expand(&halves[0], encrypt));
        with_kernel!(kernel, expand(&halves[1], tweak));
        //= GB/T 32907-2016 7.2: decryption takes the round keys backwards.
        for (place, key) in decrypt.iter_mut().zip(encrypt.iter().rev()) {
            *place = *key;
        }
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

    /// Whether asking for data ahead of their use helps: SM4 is not fast enough to wait for memory.
    #[expect(clippy::unused_self, reason = "the loops ask a key")]
    fn fetches_ahead(&self) -> bool {
        false
    }
}

impl Drop for XtsKey {
    fn drop(&mut self) {
        let Self { kernel: _, encrypt, decrypt, tweak } = self;
        for keys in [encrypt, decrypt, tweak] {
            keys.zeroize();
        }
    }
}

impl fmt::Debug for XtsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, encrypt: _, decrypt: _, tweak: _ } = self;
        f.debug_struct("XtsKey").field("kernel", kernel).finish_non_exhaustive()
    }
}

fn assert_units(unit_bytes: usize, data: &[u8]) {
    assert!(unit_bytes.is_power_of_two() && unit_bytes >= 16 && data.len().is_multiple_of(unit_bytes));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::requests::{dun, numbers, requests};
    use crate::unit::cases;
    use crate::xts;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(200)))]

        #[test]
        fn xts_by_every_kernel_equals_the_library(
            data_key in any::<[u8; 16]>(), tweak_key in any::<[u8; 16]>(), first in numbers(), request in requests(),
        ) {
            let key: [u8; 32] = [data_key, tweak_key].as_flattened().try_into().unwrap();
            let library = xts::sm4_by_library(&key);
            let dun = dun(first, [0; 2]);
            let unit_bytes = request.unit_bytes;
            let (mut encrypted, mut decrypted) = (request.data.clone(), request.data.clone());
            library.encrypt(dun, unit_bytes, &mut encrypted);
            library.decrypt(dun, unit_bytes, &mut decrypted);
            for kernel in Kernel::all() {
                let key = XtsKey::new(kernel, &key);
                let data = request.transform(|data| key.encrypt_units(first, unit_bytes, data));
                prop_assert!(data == encrypted, "{:?}: encryption", kernel);
                let data = request.transform(|data| key.decrypt_units(first, unit_bytes, data));
                prop_assert!(data == decrypted, "{:?}: decryption", kernel);
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn every_kernel_substitutes_by_definition() {
        let all: [u8; 256] = std::array::from_fn(|x| u8::try_from(x).unwrap());
        let expected = all.map(sbox::tests::by_definition);
        for kernel in Kernel::all() {
            let mut bytes = all;
            with_kernel!(kernel, substitute_all(bytes.as_chunks_mut().0));
            assert_eq!(bytes, expected, "{kernel:?}");
        }
    }

    #[test]
    fn a_key_shows_nothing_of_itself() {
        for kernel in Kernel::all() {
            let shown = format!("{:?}", XtsKey::new(kernel, &[0xab; 32]));
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
