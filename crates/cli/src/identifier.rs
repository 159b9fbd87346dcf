//! The public name of a key: 16 bytes that say which key it is, and nothing about its bytes.

use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::KeyForm;
use inlinecrypt_core::profile::CryptoProfile;
use std::fmt;
use std::str::FromStr;

/// A key's identifier, as fscrypt computes it. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Identifier([u8; 16]);

impl Identifier {
    /// The identifier of `key`. A wrapped key's depends on how the engine of `profile` derives keys.
    pub(crate) fn of(key: &KeyForm, profile: &CryptoProfile) -> Result<Self, Error> {
        profile.key_identifier(key).map(Self)
    }
}

impl From<[u8; 16]> for Identifier {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Identifier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("{text:?} is not a key identifier: those are 32 hexadecimal digits");
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refused());
        }
        let mut bytes = [0; 16];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = str::from_utf8(digits).map_err(|_why| refused())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_why| refused())?;
        }
        Ok(Self(bytes))
    }
}

impl serde::Serialize for Identifier {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_parses_back() {
        let text = "00112233445566778899aabbccddeeff";
        assert_eq!(text.parse::<Identifier>().unwrap().to_string(), text);
        for wrong in ["", "0011", "zz112233445566778899aabbccddeeff", "+0112233445566778899aabbccddeeff"] {
            assert!(wrong.parse::<Identifier>().is_err(), "{wrong}");
        }
    }
}
