//! Inline encryption's ciphers: crypto modes, IVs, key derivation and key wrapping.
//!
//! Everything here is a pure function of its arguments: no files, no randomness, no clock. A mode is one row of
//! [`MODES`]; an expanded key is a [`UnitCipher`], which transforms many data units per call.
//!
//! Start reading at [`mode`], then [`dun`], then [`xts`].

#![deny(unsafe_code)]

pub mod adiantum;
pub mod dun;
pub mod essiv;
pub mod mode;
pub mod xts;

pub use dun::Dun;
pub use mode::{KeyError, MODES, Mode, ModeInfo, SectorUpdate, UnitCipher};
