//! Inline encryption's ciphers: crypto modes, IVs, key derivation and key wrapping.
//!
//! Everything here is a pure function of its arguments: no files, no randomness, no clock. A mode is one row of
//! [`MODES`]; an expanded key is a [`UnitCipher`], which transforms many data units per call.
//!
//! - A 512-bit key and a DUN go in, ciphertext comes out: [`mode`] is the table, [`xts`], [`essiv`] and [`adiantum`] are
//!   its rows' implementations.
//! - [`kdf`] and [`wrap`] are what hardware does with hardware-wrapped keys.
//! - Everything is byte for byte what Linux computes; `vectors/` holds the evidence, each file with its origin.
//! - `unsafe` is confined to one module, `simd`.
//!
//! Start reading at [`mode`], then [`dun`], then [`xts`].

#![deny(unsafe_code)]

pub mod adiantum;
pub mod dun;
pub mod essiv;
pub mod kdf;
pub mod mode;
pub mod wrap;
pub mod xts;

mod poly1305;
#[expect(unsafe_code, reason = "the one place for it: AWS-LC and vector instructions")]
mod simd;
mod unit;

pub use dun::Dun;
pub use mode::{KeyError, MODES, Mode, ModeInfo, SectorUpdate, UnitCipher};

/// From now on, the memory of the library beneath some modes comes from the program's own allocator, and is wiped when it is
/// freed: for programs whose allocator keeps secrets better than the C library's does. To be called at the very start, before any
/// key is set up. Says whether it is so.
#[must_use]
pub fn allocate_as_rust_does() -> bool {
    simd::awslc::allocate_as_rust_does()
}

/// For benchmarks and tests alone: what lies beneath, to be measured and compared one by one.
#[doc(hidden)]
pub mod beneath {
    use crate::simd::aes::{Kernel, rounds_alone};
    use crate::simd::awslc::{Algorithm, Context, Direction};
    use crate::{Mode, UnitCipher, adiantum, essiv, xts};

    /// Bare AWS-LC encryption: `data` is one unit, `iv` its IV. Makes one context, not shareable between threads.
    pub fn aes_256_xts_encryptor(key: &[u8]) -> impl FnMut(&[u8; 16], &mut [u8]) + use<> {
        let mut context = Context::new(Algorithm::Aes256Xts, Direction::Encrypt, key);
        move |iv, data| context.crypt(iv, data)
    }

    /// Bare AWS-LC decryption, likewise.
    pub fn aes_256_xts_decryptor(key: &[u8]) -> impl FnMut(&[u8; 16], &mut [u8]) + use<> {
        let mut context = Context::new(Algorithm::Aes256Xts, Direction::Decrypt, key);
        move |iv, data| context.crypt(iv, data)
    }

    /// A mode's cipher with `key` in every way that this CPU has, by name: each kernel of ours, the one in use first,
    /// then the library. Modes that have one way alone: `portable`.
    ///
    /// # Panics
    ///
    /// If the mode does not accept the key.
    pub fn ways(mode: Mode, key: &[u8]) -> Vec<(&'static str, Box<dyn UnitCipher>)> {
        mode.info().check_key(key).expect("a key of the mode");
        let by_kernel: fn(Kernel, &[u8]) -> Box<dyn UnitCipher>;
        let by_library: fn(&[u8]) -> Box<dyn UnitCipher>;
        match mode {
            Mode::Aes256Xts => (by_kernel, by_library) = (xts::aes_256_by, xts::aes_256_by_library),
            Mode::Aes128CbcEssiv => (by_kernel, by_library) = (essiv::aes_128_by, essiv::aes_128_by_library),
            Mode::Adiantum => return vec![("portable", adiantum::xchacha12_aes(key))],
            Mode::Sm4Xts => return vec![("portable", xts::sm4(key))],
        }
        let kernels = Kernel::all().map(|kernel| (kernel.name(), by_kernel(kernel, key)));
        kernels.chain([("aws-lc", by_library(key))]).collect()
    }

    /// AES-256's rounds alone, about `bytes` bytes of them, in registers: the speed that no mode can exceed. Returns
    /// how many bytes it were, or `None` if the CPU has no AES.
    pub fn aes_256_rounds(bytes: usize) -> Option<usize> {
        let mut data = [1; 512];
        let done = rounds_alone(Kernel::best()?, bytes / 512, &mut data);
        std::hint::black_box(data);
        Some(done)
    }
}
