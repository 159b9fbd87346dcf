//! Key derivation: what wrapped-key hardware derives from the key that it unwraps, and fscrypt's key identifiers.
//!
//! ```text
//!   master key --CMAC counter mode--> inline encryption key   (goes to the cipher, never to software)
//!             `--CMAC counter mode--> software secret         (software may see it)
//!                                        `--HKDF, context 8--> key identifier
//!   raw key ----------------------------------HKDF, context 1--> key identifier
//! ```
//!
//! Sources: SP 800-108r1 4.1 (counter mode) and SP 800-38B (CMAC); the labels and contexts of [`KdfVariant`] are those
//! that the Android kernel tests (`encryption/utils.cpp`) and xfstests (`src/fscrypt-crypt-util.c`) accept from
//! shipped hardware; RFC 5869 and Linux `fs/crypto/hkdf.c` for the identifiers.

use crate::Mode;
use aes::Aes256;
use cmac::{Cmac, KeyInit, Mac};
use hkdf::Hkdf;
use sha2::Sha512;
use std::fmt;
use zeroize::Zeroizing;

/// Which hardware's labels, contexts and byte order are used.
///
/// Android names them in the property `ro.crypto.hw_wrapped_keys.kdf`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KdfVariant {
    /// `v1`: SM8650 and later; also what xfstests expects.
    #[default]
    V1,
    /// `legacykdf`: earlier hardware with the same layout and another key policy.
    LegacyKdf,
    /// `rearranged`: other labels, and the message's 16-byte pieces in reverse order.
    Rearranged,
}

impl KdfVariant {
    /// Every variant.
    pub const ALL: [Self; 3] = [Self::V1, Self::LegacyKdf, Self::Rearranged];

    /// The variant of this name, as the Android property spells it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|variant| variant.name() == name)
    }

    /// The name in the Android property.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::LegacyKdf => "legacykdf",
            Self::Rearranged => "rearranged",
        }
    }

    const fn label(self) -> &'static [u8] {
        match self {
            Self::V1 | Self::LegacyKdf => b"\x00\x00\x40\x00\x00\x00\x00\x00\x00\x00\x20",
            Self::Rearranged => &[0; 32],
        }
    }

    /// A text padded with zeroes, then the derived key's policy.
    const fn inline_key_context(self) -> &'static [u8] {
        match self {
            Self::V1 => b"inline encryption key\0\0\0\x00\x00\x00\x02\x43\x00\x82\x50\x00\x00\x00\x00",
            Self::LegacyKdf => b"inline encryption key\0\0\0\x00\x00\x00\x01\x43\x00\x82\x18\x00\x00\x00\x00",
            Self::Rearranged => {
                b"inline encryption storagekey ctx\x00\x00\x00\x00\x00\x10\x70\x18\x72\x00\x00\x00\x00"
            }
        }
    }

    const fn software_secret_context(self) -> &'static [u8] {
        match self {
            Self::V1 | Self::LegacyKdf => {
                b"raw secret\0\0\0\0\0\0\x00\x00\x00\x02\x17\x00\x80\x50\x00\x00\x00\x00"
            }
            Self::Rearranged => b"derive raw secret context abcdef",
        }
    }
}

/// The name in the Android property.
impl fmt::Display for KdfVariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The key that encrypts data, from the key that was wrapped.
///
/// For [`Mode::Aes256Xts`] these are the 64 bytes that hardware derives: first the data key, then the tweak key. No
/// hardware derives keys for the other modes, so there the construction is **ours**: the same, with the mode's key
/// length as output length, and the mode's sysfs name after the context, so that no two modes ever share key bytes.
#[must_use]
pub fn inline_encryption_key(variant: KdfVariant, master: &[u8; 32], mode: Mode) -> Zeroizing<Vec<u8>> {
    let mut context = variant.inline_key_context().to_vec();
    if mode != Mode::Aes256Xts {
        context.extend_from_slice(mode.info().name.as_bytes());
    }
    let mut key = Zeroizing::new(vec![0; mode.info().key_bytes]);
    derive(variant, master, &context, &mut key);
    key
}

/// The secret that software may see, from the key that was wrapped. fscrypt derives from it what is not done in
/// hardware: file name keys and the key identifier.
#[must_use]
pub fn software_secret(variant: KdfVariant, master: &[u8; 32]) -> Zeroizing<[u8; 32]> {
    let mut secret = Zeroizing::new([0; 32]);
    derive(variant, master, variant.software_secret_context(), &mut *secret);
    secret
}

/// SP 800-108r1 4.1: counter mode with CMAC-AES-256, a 32-bit big-endian counter from 1 before `fixed`, filling `out`.
///
/// `fixed` is SP 800-108's fixed input data, as it stands. All but the last block of `out` are 16 bytes.
///
/// # Panics
///
/// If `out` is longer than 2^32 - 1 blocks.
pub fn counter_mode_cmac(key: &[u8; 32], fixed: &[u8], out: &mut [u8]) {
    let message = |counter: u32| [&counter.to_be_bytes(), fixed].concat();
    fill(key, message, out);
}

/// The 16-byte identifier that fscrypt gives a raw key: HKDF-SHA512 with context 1 (Linux `fs/crypto/hkdf.c`,
/// `HKDF_CONTEXT_KEY_IDENTIFIER_FOR_RAW_KEY`).
#[must_use]
pub fn key_identifier_raw(key: &[u8]) -> [u8; 16] {
    let mut identifier = [0; 16];
    fscrypt_hkdf(key, 1, &[], &mut identifier);
    identifier
}

/// The 16-byte identifier that fscrypt gives a hardware-wrapped key, from its software secret: HKDF-SHA512 with
/// context 8 (`HKDF_CONTEXT_KEY_IDENTIFIER_FOR_HW_WRAPPED_KEY`).
#[must_use]
pub fn key_identifier_wrapped(software_secret: &[u8; 32]) -> [u8; 16] {
    let mut identifier = [0; 16];
    fscrypt_hkdf(software_secret, 8, &[], &mut identifier);
    identifier
}

/// fscrypt's HKDF-SHA512: `out` from `key`, for the purpose `context`, with `info` (Linux `fs/crypto/hkdf.c`).
///
/// Extraction has no salt; the expansion's info is `"fscrypt\0"`, the context byte, and `info`.
///
/// # Panics
///
/// If `out` is longer than 16,320 bytes (RFC 5869 2.3: 255 hashes).
pub fn fscrypt_hkdf(key: &[u8], context: u8, info: &[u8], out: &mut [u8]) {
    Hkdf::<Sha512>::new(None, key)
        .expand_multi_info(&[b"fscrypt\0", &[context], info], out)
        .expect("the output is at most 255 hashes long");
}

/// One derivation as the hardware does it: label, zero, context, output length in bits.
fn derive(variant: KdfVariant, master: &[u8; 32], context: &[u8], out: &mut [u8]) {
    let bits = u32::try_from(out.len() * 8).expect("a key of a few bytes");
    //= SP 800-108r1 4.1: the fixed input data are Label, a zero byte, Context, and L.
    let fixed = [variant.label(), &[0], context, &bits.to_be_bytes()].concat();
    match variant {
        KdfVariant::V1 | KdfVariant::LegacyKdf => counter_mode_cmac(master, &fixed, out),
        KdfVariant::Rearranged => {
            fill(master, |counter| rearrange(&[&counter.to_be_bytes(), &fixed[..]].concat()), out)
        }
    }
}

/// The pieces of 16 bytes of `message`, the last first. They are counted from the end, so the short one is the
/// message's start, and comes last.
fn rearrange(message: &[u8]) -> Vec<u8> {
    message.rchunks(16).collect::<Vec<_>>().concat()
}

/// Fills `out` with the CMACs of `message(1)`, `message(2)` and so on. Messages hold nothing secret.
fn fill(key: &[u8; 32], message: impl Fn(u32) -> Vec<u8>, out: &mut [u8]) {
    let keyed = Cmac::<Aes256>::new(key.into());
    for (counter, block) in (1..).zip(out.chunks_mut(16)) {
        let mac = Zeroizing::new(<[u8; 16]>::from(
            keyed.clone().chain_update(message(counter)).finalize().into_bytes(),
        ));
        block.copy_from_slice(&mac[..block.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rearranging_puts_the_last_sixteen_bytes_first() {
        let message: Vec<u8> = (0..37).collect();
        let expected: Vec<u8> = (21..37).chain(5..21).chain(0..5).collect();
        assert_eq!(rearrange(&message), expected);
    }

    #[test]
    fn no_two_modes_or_variants_share_key_bytes() {
        let keys: Vec<_> = KdfVariant::ALL
            .into_iter()
            .flat_map(|variant| Mode::ALL.map(|mode| inline_encryption_key(variant, &[9; 32], mode)))
            .collect();
        for (i, one) in keys.iter().enumerate() {
            for other in &keys[..i] {
                assert!(one.chunks(16).all(|a| other.chunks(16).all(|b| a != b)));
            }
        }
    }

    #[test]
    fn names_are_the_property_values() {
        for variant in KdfVariant::ALL {
            assert_eq!(KdfVariant::from_name(&variant.to_string()), Some(variant));
        }
        assert_eq!(KdfVariant::from_name("v2"), None);
    }
}
