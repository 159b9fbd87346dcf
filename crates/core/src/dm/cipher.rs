//! Ciphers as dm-crypt and LUKS write them: `aes-xts-plain64`, `capi:xts(aes)-plain64`.

use crate::config::Mode;
use std::fmt;

/// A cipher of Linux's that a mode of ours computes. With AES in XTS, the length of the key tells which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cipher {
    /// `aes-xts`: AES-256-XTS with 64 bytes of key, AES-128-XTS with 32.
    AesXts,
    /// `aes-cbc-essiv:sha256` with 16 bytes of key.
    AesCbcEssiv,
    /// `xchacha12,aes-adiantum`
    Adiantum,
    /// `sm4-xts`
    Sm4Xts,
}

impl Cipher {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::AesXts, Self::AesCbcEssiv, Self::Adiantum, Self::Sm4Xts];

    /// The cipher of a mode.
    #[must_use]
    pub const fn of(mode: Mode) -> Self {
        match mode {
            Mode::Aes256Xts | Mode::Aes128Xts => Self::AesXts,
            Mode::Aes128CbcEssiv => Self::AesCbcEssiv,
            Mode::Adiantum => Self::Adiantum,
            Mode::Sm4Xts => Self::Sm4Xts,
        }
    }

    /// The modes that it may be, the usual one first.
    #[must_use]
    pub const fn modes(self) -> &'static [Mode] {
        match self {
            Self::AesXts => &[Mode::Aes256Xts, Mode::Aes128Xts],
            Self::AesCbcEssiv => &[Mode::Aes128CbcEssiv],
            Self::Adiantum => &[Mode::Adiantum],
            Self::Sm4Xts => &[Mode::Sm4Xts],
        }
    }

    /// The mode that it is with a key of `key_bytes`, if we have that.
    #[must_use]
    pub fn mode(self, key_bytes: usize) -> Option<Mode> {
        self.modes().iter().copied().find(|mode| mode.info().key_bytes == key_bytes)
    }
}

/// How Linux counts for the IV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IvMode {
    /// All 64 bits of the number (`plain64`; and ESSIV, which encrypts that).
    Plain64,
    /// Its low 32 bits (`plain`): the same as long as no number needs more.
    Plain,
}

/// A cipher with its IV mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CipherSpec {
    /// What encrypts.
    pub cipher: Cipher,
    /// What is made the IV of.
    pub iv: IvMode,
}

/// Why a cipher cannot be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CipherError {
    /// It has not the form `CIPHER-CHAINING-IV[:OPTIONS]` or `capi:NAME-IV[:OPTIONS]`.
    Form,
    /// Several keys in turn (`aes:64-...`).
    KeyCount,
    /// No mode of ours computes it.
    UnknownCipher(String),
    /// An IV mode that we do not have.
    UnknownIv(String),
    /// An IV mode that does not go with the cipher.
    IvOfCipher(String),
    /// What stands behind the IV mode is not known.
    UnknownIvOptions(String),
}

impl fmt::Display for CipherError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const KNOWN: &str = "served are aes-xts-plain64, aes-cbc-essiv:sha256, xchacha12,aes-adiantum-plain64 and \
                             sm4-xts-plain64, under these names or as capi:";
        match self {
            Self::Form => write!(f, "it is not CIPHER-CHAINING-IV or capi:NAME-IV; {KNOWN}"),
            Self::KeyCount => write!(f, "several keys in turn are not served; {KNOWN}"),
            Self::UnknownCipher(name) => write!(f, "no mode computes {name:?}; {KNOWN}"),
            Self::UnknownIv(name) => {
                write!(f, "the IV mode {name:?} is not served; plain64, plain and essiv:sha256 are")
            }
            Self::IvOfCipher(name) => {
                write!(f, "the IV mode {name:?} does not go with the cipher here; {KNOWN}")
            }
            Self::UnknownIvOptions(options) => {
                write!(
                    f,
                    "the IV options {options:?} are not known; essiv:sha256 is the one IV mode with any"
                )
            }
        }
    }
}

impl std::error::Error for CipherError {}

/// The cipher's names in dm-crypt's form and in the crypto API's.
const NAMES: [(Cipher, &str, &str); 4] = [
    (Cipher::AesXts, "aes-xts", "xts(aes)"),
    (Cipher::AesCbcEssiv, "aes-cbc", "cbc(aes)"),
    (Cipher::Adiantum, "xchacha12,aes-adiantum", "adiantum(xchacha12,aes)"),
    (Cipher::Sm4Xts, "sm4-xts", "xts(sm4)"),
];

impl CipherSpec {
    /// Reads what dm-crypt and LUKS headers write.
    ///
    /// # Errors
    ///
    /// [`CipherError`].
    pub fn parse(text: &str) -> Result<Self, CipherError> {
        if super::may_hold_key(text) {
            // Not to be repeated.
            return Err(CipherError::Form);
        }
        let (cipher, iv) = match text.strip_prefix("capi:") {
            // The API's names have no hyphen outside parentheses; the IV mode stands behind the last.
            Some(rest) => rest.rsplit_once('-').ok_or(CipherError::Form)?,
            None => {
                let (cipher, rest) = text.split_once('-').ok_or(CipherError::Form)?;
                let (chaining, _) = rest.split_once('-').ok_or(CipherError::Form)?;
                if cipher.contains(':') {
                    return Err(CipherError::KeyCount);
                }
                let end = cipher.len() + 1 + chaining.len();
                (&text[..end], &text[end + 1..])
            }
        };
        let is_api = text.starts_with("capi:");
        let (iv_name, options) = match iv.split_once(':') {
            Some((name, options)) => (name, Some(options)),
            None => (iv, None),
        };
        // The API has ESSIV in the cipher, and then the number is given to it as it is.
        let essiv_in_cipher = is_api && cipher == "essiv(cbc(aes),sha256)";
        let found = match NAMES.iter().find(|(_, dm, api)| cipher == if is_api { *api } else { *dm }) {
            Some((cipher, _, _)) => *cipher,
            None if essiv_in_cipher => Cipher::AesCbcEssiv,
            None => return Err(CipherError::UnknownCipher(cipher.to_owned())),
        };
        let wants_essiv = found == Cipher::AesCbcEssiv && !essiv_in_cipher;
        let iv = match (iv_name, options) {
            ("essiv", Some("sha256")) if wants_essiv => IvMode::Plain64,
            ("plain64", None) if !wants_essiv => IvMode::Plain64,
            ("plain", None) if !wants_essiv => IvMode::Plain,
            ("essiv", Some("sha256")) | ("plain64" | "plain", None) => {
                return Err(CipherError::IvOfCipher(iv.to_owned()));
            }
            ("essiv" | "plain64" | "plain", options) => {
                return Err(CipherError::UnknownIvOptions(options.unwrap_or_default().to_owned()));
            }
            _ => return Err(CipherError::UnknownIv(iv_name.to_owned())),
        };
        Ok(Self { cipher: found, iv })
    }
}

/// As cryptsetup writes it; dm-crypt takes it.
impl fmt::Display for CipherSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name, _) =
            NAMES.iter().find(|(cipher, ..)| *cipher == self.cipher).expect("every cipher is there");
        match (self.cipher, self.iv) {
            (Cipher::AesCbcEssiv, IvMode::Plain64) => write!(f, "{name}-essiv:sha256"),
            // ESSIV of 32 bits has no name but this.
            (Cipher::AesCbcEssiv, IvMode::Plain) => f.write_str("capi:essiv(cbc(aes),sha256)-plain"),
            (_, IvMode::Plain64) => write!(f, "{name}-plain64"),
            (_, IvMode::Plain) => write!(f, "{name}-plain"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_linux_are_understood() {
        use Cipher::{Adiantum, AesCbcEssiv, AesXts, Sm4Xts};
        for (text, cipher, iv) in [
            ("aes-xts-plain64", AesXts, IvMode::Plain64),
            ("capi:xts(aes)-plain64", AesXts, IvMode::Plain64),
            ("aes-xts-plain", AesXts, IvMode::Plain),
            ("aes-cbc-essiv:sha256", AesCbcEssiv, IvMode::Plain64),
            ("capi:cbc(aes)-essiv:sha256", AesCbcEssiv, IvMode::Plain64),
            ("capi:essiv(cbc(aes),sha256)-plain64", AesCbcEssiv, IvMode::Plain64),
            ("xchacha12,aes-adiantum-plain64", Adiantum, IvMode::Plain64),
            ("capi:adiantum(xchacha12,aes)-plain64", Adiantum, IvMode::Plain64),
            ("sm4-xts-plain64", Sm4Xts, IvMode::Plain64),
            ("capi:xts(sm4)-plain64", Sm4Xts, IvMode::Plain64),
        ] {
            assert_eq!(CipherSpec::parse(text), Ok(CipherSpec { cipher, iv }), "{text}");
        }
    }

    #[test]
    fn what_is_printed_is_understood() {
        for cipher in Cipher::ALL {
            for iv in [IvMode::Plain64, IvMode::Plain] {
                let spec = CipherSpec { cipher, iv };
                assert_eq!(CipherSpec::parse(&spec.to_string()), Ok(spec));
            }
        }
    }

    #[test]
    fn others_are_refused_with_their_reason() {
        use CipherError::{Form, IvOfCipher, KeyCount, UnknownCipher, UnknownIv, UnknownIvOptions};
        let s = str::to_owned;
        for (text, why) in [
            ("", Form),
            ("aes", Form),
            ("aes-xts", Form),
            ("capi:xts(aes)", Form),
            ("aes:64-cbc-lmk", KeyCount),
            ("twofish-xts-plain64", UnknownCipher(s("twofish-xts"))),
            ("capi:xts(twofish)-plain64", UnknownCipher(s("xts(twofish)"))),
            ("aes-ctr-plain64", UnknownCipher(s("aes-ctr"))),
            ("capi:aes-xts-plain64", UnknownCipher(s("aes-xts"))),
            // Without ESSIV the IVs can be foreseen: another format.
            ("aes-cbc-plain64", IvOfCipher(s("plain64"))),
            ("aes-xts-essiv:sha256", IvOfCipher(s("essiv:sha256"))),
            ("capi:essiv(cbc(aes),sha256)-essiv:sha256", IvOfCipher(s("essiv:sha256"))),
            ("aes-cbc-essiv:sha1", UnknownIvOptions(s("sha1"))),
            ("aes-cbc-essiv", UnknownIvOptions(s(""))),
            ("aes-xts-plain64:x", UnknownIvOptions(s("x"))),
            ("aes-xts-plain64be", UnknownIv(s("plain64be"))),
            ("aes-xts-random", UnknownIv(s("random"))),
            ("aes-xts-", UnknownIv(s(""))),
        ] {
            assert_eq!(CipherSpec::parse(text), Err(why), "{text}");
        }
    }

    #[test]
    fn the_length_of_the_key_tells_the_mode() {
        assert_eq!(Cipher::AesXts.mode(64), Some(Mode::Aes256Xts));
        assert_eq!(Cipher::AesXts.mode(32), Some(Mode::Aes128Xts));
        assert_eq!(Cipher::AesXts.mode(48), None);
        assert_eq!(Cipher::AesCbcEssiv.mode(32), None);
        for mode in Mode::ALL {
            assert_eq!(Cipher::of(mode).mode(mode.info().key_bytes), Some(mode));
        }
    }
}
