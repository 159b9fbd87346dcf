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

#[expect(unsafe_code, reason = "the one place for it: AWS-LC and vector instructions")]
mod simd;
mod unit;

pub use dun::Dun;
pub use mode::{KeyError, MODES, Mode, ModeInfo, SectorUpdate, UnitCipher};
