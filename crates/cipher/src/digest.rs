//! SHA-256 (FIPS 180-4), for noticing that stored bytes have changed. Nothing here is keyed, so it proves nothing to anybody
//! who can write.

use sha2::Digest as _;
use std::fmt;

/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 32;

/// A digest of bytes that come piece by piece.
#[derive(Clone, Default)]
pub struct Digest(sha2::Sha256);

impl Digest {
    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all of them.
    #[must_use]
    pub fn finish(self) -> [u8; DIGEST_BYTES] {
        self.0.finalize().into()
    }

    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
        let mut digest = Self::default();
        digest.update(bytes);
        digest.finish()
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-4's examples (the SHA-256 of "abc", and of nothing).
    #[test]
    fn digests_are_those_of_the_standard() {
        assert_eq!(
            hex::encode(Digest::of(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            hex::encode(Digest::default().finish()),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        let mut pieces = Digest::default();
        pieces.update(b"a");
        pieces.update(b"bc");
        assert_eq!(pieces.finish(), Digest::of(b"abc"));
    }
}
