//! Backings for tests: memory, injected faults, power cuts; and the conformance suite that every backing passes.
//!
//! First-class code, kept to the same bargain as the real ones (`core::backing::Backing`), because what is tested above
//! them is only worth as much as they are.
//!
//! | type | what it is for |
//! | --- | --- |
//! | [`MemBacking`] | a sparse disk in memory: fast, and terabytes cost nothing |
//! | [`StrictBacking`] | panics where the *caller* breaks the bargain: misaligned, past the end, overlapping writes |
//! | [`FaultyBacking`] | fails the n-th call, is full, is too short, as told |
//! | [`PowerCutBacking`] | a disk with a volatile cache: loses, reorders and tears what was not flushed |
//! | [`conformance::run`] | checks that a backing keeps its side of the bargain |
//!
//! Everything random comes from a [`SplitMix64`], so a failure is repeated by its seed.

pub mod conformance;
mod faulty;
mod memory;
mod power_cut;
mod strict;

pub use faulty::{FaultOp, FaultyBacking, Leaving};
pub use memory::MemBacking;
pub use power_cut::PowerCutBacking;
pub use strict::StrictBacking;

use inlinecrypt_core::backing::{Access, BackingFacts};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a disk of `len_bytes` in memory is like, that can be written and discarded, with any alignment.
fn facts_in_memory(len_bytes: u64) -> BackingFacts {
    BackingFacts {
        len_bytes,
        align_bytes: 1,
        access: Access::ReadWrite,
        can_discard: true,
        does_parts_at_once: false,
    }
}

/// A small random generator for tests: SplitMix64 (Steele, Lea and Flood, 2014). Not for secrets.
#[derive(Clone, Debug)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// The generator that begins with `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A random number less than `bound`.
    ///
    /// # Panics
    ///
    /// If `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Not exactly even, by less than one in 2^32 for the small bounds of tests.
        self.next_u64() % bound
    }

    /// Fills `data` with random bytes.
    pub fn fill(&mut self, data: &mut [u8]) {
        for piece in data.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
    }
}

/// A seed for a test: `INLINECRYPT_SEED` if set, else the time. Prints it, so that a failure can be repeated.
#[must_use]
pub fn seed(test: &str) -> u64 {
    let given = std::env::var("INLINECRYPT_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        SplitMix64::new(now.as_secs() ^ (u64::from(now.subsec_nanos()) << 32)).next_u64()
    });
    println!("{test}: INLINECRYPT_SEED={seed}");
    seed
}

/// Takes a lock; a panic of another thread is that thread's to report.
fn enter<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
