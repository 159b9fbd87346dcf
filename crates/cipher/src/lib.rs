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

/// For `benches/cipher.rs` alone: what lies beneath, without our layers, to be measured beside them.
#[doc(hidden)]
pub mod beneath {
    use crate::simd::awslc::{Algorithm, Context, Direction};

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
}
