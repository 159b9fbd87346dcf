//! Where a volume meets the world: backings below it, exports above it, and the listeners that clients come in by.
#![deny(unsafe_code)]

pub mod backing;
pub mod blk_crypto;
pub mod export;
pub mod listen;
mod sys;
