//! Containers for tests: small, cheap to open, the same each time.

use inlinecrypt_cipher::Mode;
use inlinecrypt_luks::kdf::Kdf;
use inlinecrypt_luks::luks2::{Container, NewContainer};
use inlinecrypt_luks::{Hash, Storage};
use std::io;

/// As cheap as it can be.
pub(crate) const CHEAP: Kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1 };
/// Room for the header: four areas fit.
pub(crate) const HEADER_BYTES: u64 = (32 << 10) + 4 * 258_048;
pub(crate) const KEY_BYTES: usize = 64;

/// Bytes that look random, the same for each seed.
pub(crate) fn random(seed: u64) -> impl FnMut(&mut [u8]) -> io::Result<()> {
    let mut state = seed;
    move |bytes: &mut [u8]| {
        for byte in bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
        Ok(())
    }
}

pub(crate) fn key() -> [u8; KEY_BYTES] {
    std::array::from_fn(|at| at as u8)
}

/// A container with passphrases `zero` and `one` in LUKS keyslots 0 and 1, and 64 KiB of data.
pub(crate) fn container() -> Vec<u8> {
    let mut random = random(1);
    let key = key();
    let new = NewContainer {
        mode: Mode::Aes256Xts,
        sector_bytes: 512,
        data_offset: HEADER_BYTES,
        header_bytes: HEADER_BYTES,
        uuid: "01234567-89ab-cdef-0123-456789abcdef",
        label: "test",
        subsystem: "",
        key: Some((&key, 1000)),
        tokens: vec![
            serde_json::json!({ "type": "somebody-elses", "keyslots": ["1"], "secret": [1, { "a": null }] }),
        ],
    };
    let disk = vec![0; usize::try_from(HEADER_BYTES).unwrap() + (64 << 10)];
    let mut container = new.write(disk, &mut random).unwrap();
    for (number, passphrase) in [b"zero".as_slice(), b"one"].into_iter().enumerate() {
        let made = container.add_keyslot(&key, 0, passphrase, CHEAP, None, &mut random).unwrap();
        assert_eq!(made as usize, number);
    }
    container.into_storage()
}

/// Which of these passphrases open it.
pub(crate) fn opens<S: Storage>(container: &mut Container<S>, passphrases: &[&str]) -> Vec<String> {
    let mut opens = |passphrase: &&&str| {
        container.open(passphrase.as_bytes(), None).is_ok_and(|opened| opened.key[..] == key()[..])
    };
    passphrases
        .iter()
        .filter(|passphrase| opens(passphrase))
        .map(|passphrase| (*passphrase).to_owned())
        .collect()
}
