//! What makes keys of passphrases, and what that costs.

use crate::{Error, ErrorKind, Hash};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use std::time::Duration;
use zeroize::{Zeroize as _, Zeroizing};

/// A key derivation with its cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kdf {
    /// PBKDF2.
    Pbkdf2 {
        /// Over HMAC with this.
        hash: Hash,
        /// How often.
        iterations: u32,
    },
    /// Argon2 (RFC 9106, version 1.3).
    Argon2 {
        /// Which of them.
        variant: Argon2Variant,
        /// Passes over the memory.
        passes: u32,
        /// Memory in KiB.
        memory_kib: u32,
        /// Lanes.
        lanes: u32,
    },
}

/// Which Argon2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argon2Variant {
    /// `argon2i`.
    I,
    /// `argon2id`.
    Id,
}

/// Most memory that a header may ask for: what cryptsetup asks for at most.
const MEMORY_KIB_MAX: u32 = 4 << 20;
/// Most lanes: cryptsetup's limit is 4.
const LANES_MAX: u32 = 16;
/// Most memory times passes, in KiB: 256 GiB, minutes. What cryptsetup chooses in two seconds is a fiftieth of it.
const WORK_KIB_MAX: u64 = 256 << 20;
/// Most iterations of PBKDF2: minutes. What cryptsetup chooses in two seconds is a fiftieth of it.
const ITERATIONS_MAX: u32 = 500_000_000;

impl Kdf {
    /// Refuses costs by which a header would hold up or fill up whoever opens it, and those that are none.
    ///
    /// # Errors
    ///
    /// [`Cost`](ErrorKind::Cost).
    pub fn check(&self) -> Result<(), Error> {
        let refused = |what: String| {
            Err(Error::new(ErrorKind::Cost, what, "If it is to be trusted, open it with cryptsetup."))
        };
        match *self {
            Self::Pbkdf2 { iterations, .. } if !(1..=ITERATIONS_MAX).contains(&iterations) => {
                refused(format!(
                    "it asks for {iterations} iterations of PBKDF2, and 1 to {ITERATIONS_MAX} are sensible"
                ))
            }
            Self::Argon2 { passes, memory_kib, lanes, .. } => {
                let fits = (8 * lanes.min(LANES_MAX)..=MEMORY_KIB_MAX).contains(&memory_kib)
                    && (1..=LANES_MAX).contains(&lanes)
                    && passes >= 1
                    && u64::from(passes) * u64::from(memory_kib) <= WORK_KIB_MAX;
                if fits {
                    return Ok(());
                }
                refused(format!(
                    "it asks for {passes} passes of Argon2 over {memory_kib} KiB in {lanes} lanes, which is not sensible"
                ))
            }
            Self::Pbkdf2 { .. } => Ok(()),
        }
    }

    /// A key of `key_bytes` from a passphrase.
    ///
    /// # Errors
    ///
    /// [`Cost`](ErrorKind::Cost) if it costs too much, [`Memory`](ErrorKind::Memory) if that is not there.
    pub(crate) fn derive(
        &self,
        passphrase: &[u8],
        salt: &[u8],
        key_bytes: usize,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        self.check()?;
        let mut key = Zeroizing::new(vec![0; key_bytes]);
        match *self {
            Self::Pbkdf2 { hash, iterations } => hash.pbkdf2(passphrase, salt, iterations, &mut key),
            Self::Argon2 { variant, passes, memory_kib, lanes } => {
                let refused = |what: String| {
                    Error::new(ErrorKind::Memory, what, "Free memory, or open it where there is more.")
                };
                let params = Params::new(memory_kib, passes, lanes, Some(key_bytes))
                    .map_err(|why| Error::damaged(format!("the cost of a LUKS keyslot: {why}")))?;
                let blocks = params.block_count();
                let mut memory = Vec::new();
                memory.try_reserve_exact(blocks).map_err(|_no_memory| {
                    refused(format!("it takes {memory_kib} KiB to open, which are not there"))
                })?;
                memory.resize(blocks, Block::default());
                let algorithm = match variant {
                    Argon2Variant::I => Algorithm::Argon2i,
                    Argon2Variant::Id => Algorithm::Argon2id,
                };
                let done = Argon2::new(algorithm, Version::V0x13, params).hash_password_into_with_memory(
                    passphrase,
                    salt,
                    &mut key,
                    &mut memory,
                );
                memory.zeroize();
                done.map_err(|why| Error::damaged(format!("the salt of a LUKS keyslot: {why}")))?;
            }
        }
        Ok(key)
    }

    /// The cost that takes `target`, found by `time`, which says how long something took.
    ///
    /// Argon2 gets four passes over as much memory as fits, and more of them if that is not enough, as cryptsetup does it;
    /// never less than `self` has of memory and passes as its least.
    ///
    /// # Errors
    ///
    /// Those of [`check`](Self::check).
    pub fn calibrate(
        self,
        target: Duration,
        memory_kib_max: u32,
        time: &mut dyn FnMut(&mut dyn FnMut()) -> Duration,
    ) -> Result<Self, Error> {
        let mut run = |kdf: Self| {
            let mut result = Ok(());
            let took =
                time(&mut || result = kdf.derive(b"foo", b"0123456789abcdef0123456789abcdef", 32).map(drop));
            result.map(|()| took.as_secs_f64().max(1e-6))
        };
        // The product is far below what a u32 holds, after the clamp.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped before")]
        let whole = |value: f64, least: u32, most: u32| value.clamp(least.into(), most.into()) as u32;
        match self {
            Self::Pbkdf2 { hash, .. } => {
                let mut iterations = 1 << 14;
                loop {
                    let took = run(Self::Pbkdf2 { hash, iterations })?;
                    // Long enough to be believed.
                    if took > 0.1 || iterations > ITERATIONS_MAX / 8 {
                        let wanted = f64::from(iterations) * target.as_secs_f64() / took;
                        return Ok(Self::Pbkdf2 { hash, iterations: whole(wanted, 1000, ITERATIONS_MAX) });
                    }
                    iterations *= 4;
                }
            }
            Self::Argon2 { variant, lanes, .. } => {
                let most = memory_kib_max.clamp(MEMORY_KIB_MIN, MEMORY_KIB_MAX);
                let sample = most.min(128 << 10);
                let took = run(Self::Argon2 { variant, passes: PASSES_MIN, memory_kib: sample, lanes })?;
                let per_second = f64::from(sample) * f64::from(PASSES_MIN) / took;
                let work = per_second * target.as_secs_f64();
                let memory_kib = whole(work / f64::from(PASSES_MIN), MEMORY_KIB_MIN, most);
                let passes = whole(work / f64::from(memory_kib), PASSES_MIN, 1 << 16);
                Ok(Self::Argon2 { variant, passes, memory_kib, lanes })
            }
        }
    }
}

/// Least memory of a calibrated Argon2, in KiB.
const MEMORY_KIB_MIN: u32 = 64 << 10;
/// Least passes of a calibrated Argon2.
const PASSES_MIN: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn argon2(passes: u32, memory_kib: u32, lanes: u32) -> Kdf {
        Kdf::Argon2 { variant: Argon2Variant::Id, passes, memory_kib, lanes }
    }

    #[test]
    fn costs_that_are_attacks_are_refused_at_once() {
        for kdf in [
            argon2(u32::MAX, 1 << 20, 4),
            argon2(1, u32::MAX, 4),
            argon2(1, 1 << 20, u32::MAX),
            argon2(0, 1 << 20, 4),
            argon2(4, 1 << 20, 0),
            argon2(4, 7, 1),
            Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: u32::MAX },
            Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 0 },
        ] {
            assert_eq!(kdf.derive(b"x", &[0; 32], 64).unwrap_err().kind(), ErrorKind::Cost, "{kdf:?}");
        }
        for kdf in [argon2(4, 4 << 20, 4), argon2(1, 32, 1), argon2(64, 1 << 20, 4)] {
            kdf.check().unwrap();
        }
    }

    /// A clock on which a KiB takes a microsecond, and an iteration as long.
    #[test]
    fn calibration_finds_what_takes_so_long() {
        let target = Duration::from_secs(2);
        // A sample of 128 MiB and four passes in half a second: a second holds 1 GiB of them.
        let mut half_a_second = |_: &mut dyn FnMut()| Duration::from_millis(500);
        let mut calibrate = |most| argon2(0, 0, 4).calibrate(target, most, &mut half_a_second).unwrap();
        assert_eq!(calibrate(4 << 20), argon2(4, 512 << 10, 4));
        assert_eq!(calibrate(128 << 10), argon2(16, 128 << 10, 4));
        let pbkdf2 = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 0 };
        assert_eq!(
            pbkdf2.calibrate(target, 0, &mut |_| Duration::from_millis(500)).unwrap(),
            Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 4 << 14 }
        );
    }
}
