//! Ciphers by the names that headers have for them, which are dm-crypt's.

use crate::Error;
use inlinecrypt_cipher::Mode;

/// How something is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// By a mode of ours, the IV made of the number of the 512-byte sector (`plain64`).
    Mode(Mode),
    /// AES-128-XTS, `plain64`: 32-byte keys.
    Aes128Xts,
}

/// Names and key lengths: dm-crypt's, and its `capi:` ones.
const NAMES: &[(&str, usize, Encryption)] = &[
    ("aes-xts-plain64", 64, Encryption::Mode(Mode::Aes256Xts)),
    ("aes-xts-plain64", 32, Encryption::Aes128Xts),
    ("aes-cbc-essiv:sha256", 16, Encryption::Mode(Mode::Aes128CbcEssiv)),
    ("xchacha12,aes-adiantum-plain64", 32, Encryption::Mode(Mode::Adiantum)),
    ("sm4-xts-plain64", 32, Encryption::Mode(Mode::Sm4Xts)),
    ("capi:xts(aes)-plain64", 64, Encryption::Mode(Mode::Aes256Xts)),
    ("capi:xts(aes)-plain64", 32, Encryption::Aes128Xts),
    ("capi:essiv(cbc(aes),sha256)-plain64", 16, Encryption::Mode(Mode::Aes128CbcEssiv)),
    ("capi:adiantum(xchacha12,aes)-plain64", 32, Encryption::Mode(Mode::Adiantum)),
    ("capi:xts(sm4)-plain64", 32, Encryption::Mode(Mode::Sm4Xts)),
];

impl Encryption {
    /// What `name` means with a key of `key_bytes`.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if it is nothing that we do.
    pub fn parse(name: &str, key_bytes: usize) -> Result<Self, Error> {
        let of_name = || NAMES.iter().filter(|(known, ..)| *known == name);
        if let Some((.., encryption)) = of_name().find(|(_, bytes, _)| *bytes == key_bytes) {
            return Ok(*encryption);
        }
        let lengths: Vec<String> = of_name().map(|(_, bytes, _)| bytes.to_string()).collect();
        Err(Error::unsupported(if lengths.is_empty() {
            let mut known: Vec<&str> = NAMES.iter().map(|(name, ..)| *name).collect();
            known.dedup();
            format!("it is encrypted with {name:?}, and known here are {}", known.join(", "))
        } else {
            format!("{name} with a key of {key_bytes} bytes, and {} are known here", lengths.join(" and "))
        }))
    }

    /// Its name in new headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(.., encryption)| *encryption == self).map_or("", |(name, ..)| name)
    }

    /// Length of its key, in bytes.
    #[must_use]
    pub fn key_bytes(self) -> usize {
        match self {
            Self::Mode(mode) => mode.info().key_bytes,
            Self::Aes128Xts => 32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_they_say_with_their_key_lengths() {
        for (name, key_bytes, encryption) in NAMES {
            assert_eq!(Encryption::parse(name, *key_bytes).unwrap(), *encryption);
            assert_eq!(encryption.key_bytes(), *key_bytes);
            assert_eq!(Encryption::parse(encryption.name(), *key_bytes).unwrap(), *encryption);
            let refused = Encryption::parse(name, 24).unwrap_err().to_string();
            assert!(refused.contains("24 bytes") && refused.contains(&key_bytes.to_string()), "{refused}");
        }
        assert!(Encryption::parse("serpent-xts-plain64", 64).unwrap_err().to_string().contains("serpent"));
    }
}
