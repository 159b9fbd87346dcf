//! Inline encryption's ciphers: crypto modes, IVs, key derivation and key wrapping.
//!
//! Everything here is a pure function of its arguments: no files, no randomness, no clock. A mode is one row of
//! [`MODES`]; an expanded key is a [`UnitCipher`], which transforms many data units per call.
//!
//! - A 512-bit key and a DUN go in, ciphertext comes out: [`mode`] is the table, [`xts`], [`essiv`] and [`adiantum`] are
//!   its rows' implementations.
//! - [`names`] is the table of the modes for file names, which encrypt one message instead of data units.
//! - [`kdf`] and [`wrap`] are what hardware does with hardware-wrapped keys.
//! - [`digest`] notices changed bytes.
//! - Everything is byte for byte what Linux computes; `vectors/` holds the evidence, each file with its origin.
//! - `unsafe` is confined to one module, `simd`.
//!
//! Start reading at [`mode`], then [`dun`], then [`xts`].

#![deny(unsafe_code)]

pub mod adiantum;
pub mod digest;
pub mod dun;
pub mod essiv;
pub mod kdf;
pub mod mode;
pub mod names;
pub mod wrap;
pub mod xts;

mod cts;
mod hctr2;
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
    use crate::simd::{adiantum as simd_adiantum, sm4 as simd_sm4};
    use crate::{Mode, UnitCipher, adiantum, essiv, xts};

    /// A way to compute a mode, by name: what expands a key.
    pub type Way = (&'static str, Box<dyn Fn(&[u8]) -> Box<dyn UnitCipher>>);

    /// Every way that this CPU has to compute a mode: each kernel of ours, the one in use first, then the library. A
    /// mode that has one way alone: that one.
    ///
    /// Their keys have to be such that the mode accepts them ([`ModeInfo::check_key`](crate::ModeInfo::check_key)).
    pub fn ways(mode: Mode) -> Vec<Way> {
        type ByKernel = fn(Kernel, &[u8]) -> Box<dyn UnitCipher>;
        type ByLibrary = fn(&[u8]) -> Box<dyn UnitCipher>;
        let (by_kernel, by_library): (ByKernel, ByLibrary) = match mode {
            Mode::Aes256Xts => (xts::aes_256_by, xts::aes_256_by_library),
            Mode::Aes128CbcEssiv => (essiv::aes_128_by, essiv::aes_128_by_library),
            Mode::Adiantum => {
                let kernels = simd_adiantum::Kernel::all();
                let way = |kernel: simd_adiantum::Kernel| -> Way {
                    (kernel.name(), Box::new(move |key| adiantum::xchacha12_aes_by(kernel, key)))
                };
                return kernels.map(way).collect();
            }
            Mode::Sm4Xts => {
                let kernels = simd_sm4::Kernel::all()
                    .map(|kernel| -> Way { (kernel.name(), Box::new(move |key| xts::sm4_by(kernel, key))) });
                return kernels.chain([("library", Box::new(xts::sm4_by_library) as _)]).collect();
            }
            Mode::Aes128Xts => return vec![("alone", Box::new(xts::aes_128))],
        };
        let kernels = Kernel::all()
            .map(|kernel| -> Way { (kernel.name(), Box::new(move |key| by_kernel(kernel, key))) });
        kernels.chain([("aws-lc", Box::new(by_library) as _)]).collect()
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
