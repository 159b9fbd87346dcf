//! The inline-encryption framework that Linux calls blk-crypto, in user space.
//!
//! It knows no files, sockets, clocks or randomness: engines and backings are handed in.
//!
//! ```text
//!   exports           Disk: an export sees a plain disk
//!      |
//!   volume            aligns, locks, makes contexts, cuts requests            read volume first
//!      |     //!   profile   backing  admission, keyslots, fallback | where ciphertext is stored
//!      |
//!   engine            program, evict, crypt, and the key ladder
//! ```
//!
//! Reading order: [`config`], [`key`], [`context`] are the nouns; [`engine`] and [`backing`] the bargains with what is
//! outside; [`keyslot`] the hard part; [`profile`] and [`admission`] what a key goes through; [`volume`] the life of a
//! request; [`reencrypt`] how a volume gets another key while it is used. [`plain`] is what it all would be without encryption.
#![forbid(unsafe_code)]

pub mod admission;
pub mod backing;
pub mod batch;
pub mod caps;
pub mod config;
pub mod context;
pub mod disk;
pub mod dm;
pub mod engine;
pub mod env;
pub mod error;
pub mod key;
pub mod keyslot;
pub mod layer;
pub mod memory;
pub mod plain;
pub mod profile;
mod range_lock;
pub mod reencrypt;
mod sync;
pub mod testing;
pub mod volume;

pub use inlinecrypt_cipher::Dun;
