//! What goes wrong in a simulated world, how often, and what does not.
//!
//! | fault | how |
//! | --- | --- |
//! | a program fails, leaves half a key | the ICE engine's own dice |
//! | an evict fails, a keyslot is lost | the ICE engine's own dice |
//! | the switch between key types fails | the ICE engine's `commit-fail` |
//! | programs take long | virtual time |
//! | controller reset, host told late | an event, `Lifecycle::reset` |
//! | engine dies and is started again | an event: a new engine, the mode told again, wrapped keys prepared again |
//! | power cut | an event: everything in memory is gone, unflushed sectors old, newer or newest |
//! | a volume is closed and opened again | an event |
//! | a key is evicted by hand while it is used | an event |
//!
//! Not here: errors of the disk (`inlinecrypt-io` has its own tests), wrong ciphertext (the engine's `verify` finds it),
//! suspend, threads (loom).

use super::random::Random;
use inlinecrypt_engine::{Chance, Faults};

/// How often the world does something to the host, in percent of its chances.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Resets.
    pub reset: u64,
    /// Engine restarts.
    pub restart: u64,
    /// Power cuts.
    pub power_cut: u64,
    /// Evictions by hand.
    pub evict: u64,
    /// Volumes that close.
    pub close: u64,
}

impl Rates {
    /// Every other world is calm in each respect.
    pub fn draw(random: &mut Random) -> Self {
        let mut rate = |most: u64| if random.percent(50) { 0 } else { random.below(most) + 1 };
        Self { reset: rate(6), restart: rate(3), power_cut: rate(3), evict: rate(8), close: rate(5) }
    }
}

/// What the ICE engine of a world does wrong by itself.
pub fn engine_faults(random: &mut Random) -> Faults {
    let mut chance = |percent: u32| {
        let millionths = if random.percent(60) { 0 } else { percent * 10_000 };
        Chance::from_millionths(millionths).expect("less than one")
    };
    Faults {
        program_fail: chance(10),
        half_program: chance(5),
        evict_fail: chance(20),
        lose_slot: chance(3),
        ..Faults::default()
    }
}

/// A mistake built in on purpose, to see the checks catch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Data units after the first get the DUN of the next one.
    WrongDun,
    /// The grant of another keyslot is used.
    WrongKeyslot,
    /// Some writes are not encrypted.
    Plaintext,
    /// The disk does not flush.
    NoFlush,
    /// Some requests are answered twice.
    AnswerTwice,
    /// The host does not hear of resets, and believes that empty keyslots hold keys; what it reads is garbage.
    IgnoreEmpty,
}

impl Sabotage {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::WrongDun,
        Self::WrongKeyslot,
        Self::Plaintext,
        Self::NoFlush,
        Self::AnswerTwice,
        Self::IgnoreEmpty,
    ];
}
