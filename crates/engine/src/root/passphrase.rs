//! The secret, wrapped by a passphrase: argon2id (RFC 9106) makes a key of it, and AES-SIV wraps with that.
//!
//! ```text
//!   offset  bytes   the container's body, little-endian
//!        0      4   memory, in KiB
//!        4      4   passes
//!        8      4   lanes
//!       12     32   salt
//!       44     48   the secret, wrapped. Bound to it: all of the container before this
//!       92
//! ```

use super::container::{Container, Keeper};
use crate::blob::WrappingKeyId;
use argon2::{Algorithm, Argon2, Block, Params, Version};
use inlinecrypt_cipher::wrap::{self, WrappingKey};
use inlinecrypt_core::error::ErrorKind;
use zeroize::{Zeroize as _, Zeroizing};

const SALT_AT: usize = 12;
const SEALED_AT: usize = 44;
const BODY_BYTES: usize = SEALED_AT + 32 + wrap::OVERHEAD_BYTES;

/// The longest passphrase. A key file as a passphrase fits, too.
pub const PASSPHRASE_BYTES_MAX: usize = 4096;

/// What argon2id costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Memory, in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes, which could be computed at the same time.
    pub lanes: u32,
}

impl Cost {
    /// What new roots get: four times the memory of RFC 9106's second recommendation (4: 3 passes, 4 lanes, 64 MiB), as
    /// this is done once a start. Half a second or so.
    pub const DEFAULT: Self = Self { memory_kib: 256 << 10, passes: 3, lanes: 4 };

    /// The most that is taken from a file: more, and opening it would look like a hang.
    const MAX: Self = Self { memory_kib: 4 << 20, passes: 256, lanes: 64 };

    fn is_served(self) -> bool {
        let Self { memory_kib, passes, lanes } = self;
        let fits = |value, max| (1..=max).contains(&value);
        fits(memory_kib, Self::MAX.memory_kib)
            && fits(passes, Self::MAX.passes)
            && fits(lanes, Self::MAX.lanes)
            && memory_kib >= 8 * lanes
    }

    /// What `container` says it costs to open; `None` if it is not one of a passphrase.
    #[must_use]
    pub fn of(container: &Container) -> Option<Self> {
        let Container { keeper: Keeper::Passphrase, body, .. } = container else { return None };
        let word = |at: usize| Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?));
        Some(Self { memory_kib: word(0)?, passes: word(4)?, lanes: word(8)? })
    }

    /// The key that wraps.
    fn stretch(self, passphrase: &[u8], salt: &[u8]) -> Result<WrappingKey, (ErrorKind, String)> {
        let Self { memory_kib, passes, lanes } = self;
        let params =
            Params::new(memory_kib, passes, lanes, Some(32)).expect("costs and lengths were looked at");
        let blocks = params.block_count();
        let mut memory = Vec::new();
        memory.try_reserve_exact(blocks).map_err(|_no_memory| {
            (ErrorKind::OutOfMemory, format!("takes {} MiB to open, which are not there", memory_kib >> 10))
        })?;
        memory.resize(blocks, Block::default());
        let mut key = Box::new(Zeroizing::new([0; 32]));
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let done = on_this_thread(|| {
            argon2.hash_password_into_with_memory(passphrase, salt, &mut **key, &mut memory)
        });
        memory.zeroize();
        done.expect("argon2 fails for lengths out of bounds only");
        Ok(WrappingKey::derive(&key, b"inlinecrypt v1 root wrapped by a passphrase"))
    }
}

/// Runs `work`, and what it would share out among threads, on this one: an engine process may start none, and other threads'
/// stacks are no secret memory.
fn on_this_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    match rayon_core::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build() {
        Ok(pool) => pool.install(work),
        // It has been here before, and that stays so for the life of a thread.
        Err(_) => work(),
    }
}

/// Wraps `secret`, whose public name is `id`.
pub(super) fn wrap(
    secret: &[u8; 32],
    id: WrappingKeyId,
    passphrase: &[u8],
    salt: &[u8; 32],
    cost: Cost,
) -> Result<Container, (ErrorKind, String)> {
    check(passphrase)?;
    let mut body = vec![0; BODY_BYTES];
    body[..4].copy_from_slice(&cost.memory_kib.to_le_bytes());
    body[4..8].copy_from_slice(&cost.passes.to_le_bytes());
    body[8..SALT_AT].copy_from_slice(&cost.lanes.to_le_bytes());
    body[SALT_AT..SEALED_AT].copy_from_slice(salt);
    let mut container = Container { keeper: Keeper::Passphrase, asks: true, id, body };
    let key = cost.stretch(passphrase, salt)?;
    let sealed = wrap::wrap(&key, &[&container.header(), &container.body[..SEALED_AT]], secret);
    container.body[SEALED_AT..].copy_from_slice(&sealed);
    Ok(container)
}

/// Opens what [`wrap`] made.
pub(super) fn unwrap(
    container: &Container,
    passphrase: &[u8],
) -> Result<Box<Zeroizing<[u8; 32]>>, (ErrorKind, String)> {
    check(passphrase)?;
    let body = &container.body;
    let (Some(cost), BODY_BYTES) = (Cost::of(container), body.len()) else {
        let why = "is not as long as one wrapped by a passphrase; restore it from a copy";
        return Err((ErrorKind::KeyRejected, why.into()));
    };
    if !cost.is_served() {
        return Err((
            ErrorKind::Invalid,
            format!(
                "asks for {} KiB, {} passes and {} lanes of argon2id, more than is sensible; restore it from a copy",
                cost.memory_kib, cost.passes, cost.lanes
            ),
        ));
    }
    let key = cost.stretch(passphrase, &body[SALT_AT..SEALED_AT])?;
    let opened = wrap::unwrap(&key, &[&container.header(), &body[..SEALED_AT]], &body[SEALED_AT..]).map_err(
        |_unauthentic| {
            (
                ErrorKind::KeyRejected,
                "does not open with this passphrase; give the one that it was made with".into(),
            )
        },
    )?;
    let mut secret = Box::new(Zeroizing::new([0; 32]));
    secret.copy_from_slice(&opened);
    Ok(secret)
}

fn check(passphrase: &[u8]) -> Result<(), (ErrorKind, String)> {
    match passphrase.len() {
        0 => Err((
            ErrorKind::KeyRejected,
            "needs a passphrase, and the one given is empty; give another".into(),
        )),
        1..=PASSPHRASE_BYTES_MAX => Ok(()),
        _ => Err((
            ErrorKind::KeyRejected,
            format!("takes a passphrase of at most {PASSPHRASE_BYTES_MAX} bytes; give a shorter one"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Cheap enough to be tried thousands of times.
    const CHEAP: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };

    const ID: WrappingKeyId = WrappingKeyId::from_bytes(*b"identify");

    fn wrapped(passphrase: &[u8]) -> Container {
        wrap(&[7; 32], ID, passphrase, &[9; 32], CHEAP).unwrap()
    }

    proptest! {
        #[test]
        fn only_the_same_passphrase_opens(
            passphrase in prop::collection::vec(any::<u8>(), 1..40),
            other in prop::collection::vec(any::<u8>(), 1..40),
        ) {
            let container = wrapped(&passphrase);
            prop_assert_eq!(**unwrap(&container, &passphrase).unwrap(), [7; 32]);
            let opened = unwrap(&container, &other).map(|secret| **secret);
            prop_assert_eq!(opened.is_ok(), other == passphrase);
        }
    }

    /// Also where the container's check value was made anew: by somebody who means it.
    #[test]
    fn nothing_in_it_can_be_changed() {
        let good = wrapped(b"passphrase");
        let refused = |changed: &Container| unwrap(changed, b"passphrase").expect_err("must be refused").0;
        for bit in 0..good.body.len() * 8 {
            let mut changed = good.clone();
            changed.body[bit / 8] ^= 1 << (bit % 8);
            // Costs out of bounds are told apart; those within make another key. More than 64 MiB only takes time.
            if Cost::of(&changed).is_none_or(|cost| !cost.is_served() || cost.memory_kib <= 64 << 10) {
                refused(&changed);
            }
        }
        let other = Container { id: WrappingKeyId::from_bytes([1; 8]), ..good.clone() };
        assert_eq!(refused(&other), ErrorKind::KeyRejected);
        let quiet = Container { asks: false, ..good.clone() };
        assert_eq!(refused(&quiet), ErrorKind::KeyRejected);
        let mut short = good;
        short.body.pop();
        assert_eq!(refused(&short), ErrorKind::KeyRejected);
    }

    #[test]
    fn costs_beyond_all_sense_are_refused_at_once() {
        let mut greedy = wrapped(b"passphrase");
        greedy.body[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let (kind, why) = unwrap(&greedy, b"passphrase").unwrap_err();
        assert_eq!(kind, ErrorKind::Invalid);
        assert!(why.contains("4294967295 KiB"), "{why}");
    }

    #[test]
    fn an_empty_and_an_endless_passphrase_are_refused() {
        let container = wrapped(b"passphrase");
        for wrong in [&b""[..], &[1; PASSPHRASE_BYTES_MAX + 1]] {
            assert_eq!(unwrap(&container, wrong).unwrap_err().0, ErrorKind::KeyRejected);
        }
    }

    /// Pins format and derivation. Computed by other implementations from the documentation: Python's
    /// `cryptography` has argon2id, AES-SIV and CMAC.
    #[test]
    fn the_format_of_version_1_does_not_change() {
        let container = wrapped(b"passphrase");
        assert_eq!(
            hex::encode(&container.body[SEALED_AT..]),
            "36efb33ab11c2268e3d656674159deb88e9d1aa122905fb6289c2592bbac9d60c8ff91dadab67893e6dcbbfafbc6611c"
        );
    }
}
