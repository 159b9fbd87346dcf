//! The container: a root's secret, wrapped by something, in a file. The layout stands in the [module docs](super).

use super::{HEADER_BYTES, MAGIC};
use crate::blob::WrappingKeyId;
use inlinecrypt_cipher::kdf::counter_mode_cmac;
use inlinecrypt_core::error::ErrorKind;

/// Version of root files that are containers.
pub(super) const VERSION: u32 = 2;

const BODY_AT: usize = 36;
const CHECK_BYTES: usize = 16;

/// More is no body of any kind.
pub const BODY_BYTES_MAX: usize = 4096;

/// No container is longer.
pub(super) const BYTES_MAX: usize = BODY_AT + BODY_BYTES_MAX + CHECK_BYTES;

/// Whoever opens it has to be asked for a passphrase or a PIN.
const ASKS: u16 = 1;

/// What wraps the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Keeper {
    /// A passphrase.
    Passphrase,
    /// A TPM 2.0.
    Tpm2,
    /// A key on a PKCS#11 token.
    Pkcs11,
}

impl Keeper {
    const ALL: [Self; 3] = [Self::Passphrase, Self::Tpm2, Self::Pkcs11];

    /// As the specs call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passphrase => "passphrase",
            Self::Tpm2 => "tpm2",
            Self::Pkcs11 => "pkcs11",
        }
    }

    const fn number(self) -> u16 {
        match self {
            Self::Passphrase => 1,
            Self::Tpm2 => 2,
            Self::Pkcs11 => 3,
        }
    }
}

/// A root's secret, wrapped. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// What opens it.
    pub keeper: Keeper,
    /// Whether a passphrase or PIN has to be asked for.
    pub asks: bool,
    /// The root's public identifier.
    pub id: WrappingKeyId,
    /// What the keeper needs to open it, in the keeper's own format.
    pub body: Vec<u8>,
}

impl Container {
    /// What stands before the body. Keepers that can, bind it to the secret.
    pub(super) fn header(&self) -> [u8; BODY_AT] {
        let mut bytes = [0; BODY_AT];
        let len = u32::try_from(self.body.len()).expect("keepers make bodies of at most BODY_BYTES_MAX");
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        bytes[MAGIC.len()..HEADER_BYTES].copy_from_slice(&VERSION.to_le_bytes());
        bytes[20..22].copy_from_slice(&self.keeper.number().to_le_bytes());
        bytes[22..24].copy_from_slice(&(if self.asks { ASKS } else { 0 }).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.id.to_bytes());
        bytes[32..].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    /// As it stands in the file.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [&self.header()[..], &self.body].concat();
        let check = check_value(&bytes);
        bytes.extend(check);
        bytes
    }

    /// Reads a file's bytes. Magic and version were looked at before.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, (ErrorKind, String)> {
        let damaged = |why: &str| (ErrorKind::KeyRejected, format!("{why}; restore it from a copy"));
        if bytes.len() < BODY_AT + CHECK_BYTES {
            return Err(damaged(&format!("is cut off after {} bytes", bytes.len())));
        }
        let (content, check) = bytes.split_at(bytes.len() - CHECK_BYTES);
        // No need for constant time: anybody may compute it. It finds damage, not forgery.
        if check != check_value(content) {
            return Err(damaged("is damaged, cut off or longer than it was: its check value is wrong"));
        }
        let half = |at: usize| u16::from_le_bytes(content[at..at + 2].try_into().expect("two bytes"));
        let word = |at: usize| u32::from_le_bytes(content[at..at + 4].try_into().expect("four bytes"));
        let body = &content[BODY_AT..];
        let (number, flags) = (half(20), half(22));
        let keeper = Keeper::ALL.into_iter().find(|keeper| keeper.number() == number);
        let (Some(keeper), 0 | ASKS) = (keeper, flags) else {
            return Err((
                ErrorKind::Invalid,
                format!(
                    "is of kind {number} with flags {flags}, which this program does not know; a newer one may"
                ),
            ));
        };
        if usize::try_from(word(32)) != Ok(body.len()) || body.len() > BODY_BYTES_MAX {
            return Err(damaged("says of itself that it has another length"));
        }
        let id = WrappingKeyId::from_bytes(content[24..32].try_into().expect("eight bytes"));
        Ok(Self { keeper, asks: flags == ASKS, id, body: body.to_vec() })
    }
}

/// Over everything before it. The key is no secret.
fn check_value(content: &[u8]) -> [u8; CHECK_BYTES] {
    let mut value = [0; CHECK_BYTES];
    counter_mode_cmac(b"inlinecrypt root container check", content, &mut value);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::parse;
    use proptest::prelude::*;

    fn containers() -> impl Strategy<Value = Container> {
        let body = prop::collection::vec(any::<u8>(), 0..200);
        (0..3_usize, any::<bool>(), any::<[u8; 8]>(), body).prop_map(|(keeper, asks, id, body)| Container {
            keeper: Keeper::ALL[keeper],
            asks,
            id: WrappingKeyId::from_bytes(id),
            body,
        })
    }

    proptest! {
        #[test]
        fn every_container_survives_the_file(container in containers()) {
            prop_assert_eq!(Container::parse(&container.to_bytes()).unwrap(), container);
        }

        #[test]
        fn every_flipped_bit_and_every_other_length_is_refused(container in containers(), more in 1..40_usize) {
            let bytes = container.to_bytes();
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(parse(&changed).is_err(), "bit {}", bit);
            }
            for len in 0..bytes.len() {
                prop_assert!(parse(&bytes[..len]).is_err(), "cut to {}", len);
            }
            prop_assert!(parse(&[&bytes[..], &vec![0; more]].concat()).is_err());
        }

        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = Container::parse(&bytes);
            let with_check = [&bytes[..], &check_value(&bytes)].concat();
            let _ = Container::parse(&with_check);
        }
    }

    /// Pins the format. The check value was computed by another implementation (Python's `cryptography`).
    #[test]
    fn the_format_of_version_2_does_not_change() {
        let id = WrappingKeyId::from_bytes(*b"identify");
        let container = Container { keeper: Keeper::Tpm2, asks: true, id, body: b"body".to_vec() };
        assert_eq!(
            hex::encode(container.to_bytes()),
            "696e6c696e65637279707420726f6f7402000000020001006964656e7469667904000000626f6479\
             ece4809ece303dd9379e5fb86b71600a"
        );
    }

    #[test]
    fn kinds_of_later_versions_are_refused_as_such() {
        let id = WrappingKeyId::from_bytes([7; 8]);
        let mut bytes = Container { keeper: Keeper::Tpm2, asks: false, id, body: vec![] }.to_bytes();
        bytes[20] = 9;
        let content = bytes.len() - CHECK_BYTES;
        let check = check_value(&bytes[..content]);
        bytes[content..].copy_from_slice(&check);
        let (kind, why) = Container::parse(&bytes).unwrap_err();
        assert_eq!(kind, ErrorKind::Invalid);
        assert!(why.contains("kind 9"), "{why}");
    }
}
