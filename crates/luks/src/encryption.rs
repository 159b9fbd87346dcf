//! Ciphers by the names that headers have for them, which are dm-crypt's.

use crate::Error;
use inlinecrypt_cipher::Mode;

/// Names, and the modes that they mean with a key of the mode's length: dm-crypt's, and its `capi:` ones. The IV is the number
/// of the 512-byte sector (`plain64`).
const NAMES: &[(&str, Mode)] = &[
    ("aes-xts-plain64", Mode::Aes256Xts),
    ("aes-xts-plain64", Mode::Aes128Xts),
    ("aes-cbc-essiv:sha256", Mode::Aes128CbcEssiv),
    ("xchacha12,aes-adiantum-plain64", Mode::Adiantum),
    ("sm4-xts-plain64", Mode::Sm4Xts),
    ("capi:xts(aes)-plain64", Mode::Aes256Xts),
    ("capi:xts(aes)-plain64", Mode::Aes128Xts),
    ("capi:essiv(cbc(aes),sha256)-plain64", Mode::Aes128CbcEssiv),
    ("capi:adiantum(xchacha12,aes)-plain64", Mode::Adiantum),
    ("capi:xts(sm4)-plain64", Mode::Sm4Xts),
];

/// The mode that `name` means with a key of `key_bytes`.
///
/// # Errors
///
/// [`Unsupported`](crate::ErrorKind::Unsupported) if it is none of ours.
pub fn mode(name: &str, key_bytes: usize) -> Result<Mode, Error> {
    let of_name = || NAMES.iter().filter(|(known, _)| *known == name).map(|(_, mode)| *mode);
    if let Some(mode) = of_name().find(|mode| mode.info().key_bytes == key_bytes) {
        return Ok(mode);
    }
    let lengths: Vec<String> = of_name().map(|mode| mode.info().key_bytes.to_string()).collect();
    Err(Error::unsupported(if lengths.is_empty() {
        let mut known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
        known.dedup();
        format!("it is encrypted with {name:?}, and known here are {}", known.join(", "))
    } else {
        format!("{name} with a key of {key_bytes} bytes, and {} are known here", lengths.join(" and "))
    }))
}

/// The name of a mode in new headers.
///
/// # Panics
///
/// Never: every mode has one.
#[must_use]
pub fn name(mode: Mode) -> &'static str {
    NAMES.iter().find(|(_, known)| *known == mode).map(|(name, _)| *name).expect("every mode has a name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_they_say_with_their_key_lengths() {
        for (text, known) in NAMES {
            let key_bytes = known.info().key_bytes;
            assert_eq!(mode(text, key_bytes).unwrap(), *known);
            let refused = mode(text, 24).unwrap_err().to_string();
            assert!(refused.contains("24 bytes") && refused.contains(&key_bytes.to_string()), "{refused}");
        }
        for known in Mode::ALL {
            assert_eq!(mode(name(known), known.info().key_bytes).unwrap(), known);
        }
        assert!(mode("serpent-xts-plain64", 64).unwrap_err().to_string().contains("serpent"));
    }
}
