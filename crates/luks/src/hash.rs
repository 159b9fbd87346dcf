//! Hashes, by the names that headers have for them.

use crate::Error;
use hmac::Hmac;
use sha1::Sha1;
use sha2::digest::Output;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use std::fmt;

/// A hash of LUKS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1: what old LUKS1 headers have.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256: what everybody has.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Hash {
    const ALL: [Self; 5] = [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512];

    /// The hash of this name.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for every other.
    pub fn parse(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|hash| hash.name() == name.to_ascii_lowercase()).ok_or_else(|| {
            Error::unsupported(format!(
                "it uses the hash {name:?}, and sha1, sha224, sha256, sha384 and sha512 are known here"
            ))
        })
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// Length of what it gives, in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The hash of `parts`, one after the other, into the beginning of `out`.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than the hash.
    pub(crate) fn digest(self, parts: &[&[u8]], out: &mut [u8]) {
        fn by<D: Digest>(parts: &[&[u8]], out: &mut [u8]) {
            let mut hasher = D::new();
            parts.iter().for_each(|part| hasher.update(part));
            let digest: Output<D> = hasher.finalize();
            out[..digest.len()].copy_from_slice(&digest);
        }
        match self {
            Self::Sha1 => by::<Sha1>(parts, out),
            Self::Sha224 => by::<Sha224>(parts, out),
            Self::Sha256 => by::<Sha256>(parts, out),
            Self::Sha384 => by::<Sha384>(parts, out),
            Self::Sha512 => by::<Sha512>(parts, out),
        }
    }

    /// PBKDF2 with HMAC (RFC 8018 5.2): fills `out`.
    pub(crate) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        let done = match self {
            Self::Sha1 => pbkdf2::pbkdf2::<Hmac<Sha1>>(password, salt, iterations, out),
            Self::Sha224 => pbkdf2::pbkdf2::<Hmac<Sha224>>(password, salt, iterations, out),
            Self::Sha256 => pbkdf2::pbkdf2::<Hmac<Sha256>>(password, salt, iterations, out),
            Self::Sha384 => pbkdf2::pbkdf2::<Hmac<Sha384>>(password, salt, iterations, out),
            Self::Sha512 => pbkdf2::pbkdf2::<Hmac<Sha512>>(password, salt, iterations, out),
        };
        done.expect("HMAC takes keys of any length");
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6070, the second vector.
    #[test]
    fn pbkdf2_is_that_of_the_rfc() {
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 2, &mut out);
        assert_eq!(hex::encode(out), "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957");
    }

    #[test]
    fn lengths_and_names_are_those_of_the_hashes() {
        for hash in Hash::ALL {
            let mut out = [0; 64];
            hash.digest(&[b"a", b"bc"], &mut out);
            assert!(
                out[hash.bytes()..].iter().all(|&byte| byte == 0)
                    && out[hash.bytes() - 4..hash.bytes()] != [0; 4]
            );
            assert_eq!(Hash::parse(&hash.name().to_uppercase()).unwrap(), hash);
        }
        assert!(Hash::parse("whirlpool").unwrap_err().to_string().contains("whirlpool"));
    }
}
