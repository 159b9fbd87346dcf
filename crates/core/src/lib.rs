//! The inline-encryption framework that Linux calls blk-crypto, in user space.
#![forbid(unsafe_code)]

pub mod backing;
pub mod caps;
pub mod config;
pub mod disk;
pub mod engine;
pub mod error;
pub mod key;
pub mod keyslot;
pub mod memory;
mod sync;

pub use inlinecrypt_cipher::Dun;
