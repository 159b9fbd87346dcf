//! A wrapped key in a LUKS2 header: the token `inlinecrypt-wrapped-key` ([format](../../../../docs/luks.md)).

use crate::identifier::Identifier;
use crate::report::{Code, Failure};
use base64ct::{Base64, Encoding as _};
use inlinecrypt_cipher::Mode;
use inlinecrypt_cipher::kdf::KdfVariant;
use inlinecrypt_core::key::WRAPPED_KEY_BYTES_MAX;
use inlinecrypt_engine::EngineSpec;
use inlinecrypt_luks::luks2::Metadata;
use serde_json::{Value, json};
use std::fmt;

/// What the token's `type` says.
pub(crate) const TYPE: &str = "inlinecrypt-wrapped-key";

/// The version of the token that this program knows.
const VERSION: u64 = 1;

/// A long-term wrapped key with what is known about it.
#[derive(Clone)]
pub(crate) struct WrappedKey {
    pub(crate) blob: Vec<u8>,
    pub(crate) mode: Mode,
    pub(crate) key_id: Identifier,
    /// How an engine derives from it what encrypts the data. `key_id` is the same for several of them. Older tokens do not say it.
    pub(crate) kdf: Option<KdfVariant>,
}

impl WrappedKey {
    /// The one in a header, if there is one.
    pub(crate) fn find(metadata: &Metadata) -> Result<Option<Self>, Failure> {
        let tokens = metadata.tokens();
        let mut ours =
            tokens.iter().filter(|(_, token)| token.get("type").and_then(Value::as_str) == Some(TYPE));
        let Some((number, token)) = ours.next() else { return Ok(None) };
        let wrong = |what: &str| {
            Failure::new(
                Code::File,
                format!("token {number}, {TYPE}: {what}"),
                "Restore the header from a backup: inlinecrypt luks header-restore",
            )
        };
        if ours.next().is_some() {
            return Err(wrong("there is another one of the kind"));
        }
        match token.get("version").and_then(Value::as_u64) {
            Some(VERSION) => {}
            Some(other) => {
                return Err(wrong(&format!("version {other}, and {VERSION} is known here"))
                    .advise("Use a newer inlinecrypt."));
            }
            None => return Err(wrong("it has no version")),
        }
        let text = |name: &str| token.get(name).and_then(Value::as_str).unwrap_or_default();
        let blob = Base64::decode_vec(text("blob")).map_err(|_why| wrong("its blob is not base64"))?;
        if blob.is_empty() || blob.len() > WRAPPED_KEY_BYTES_MAX {
            return Err(wrong(&format!("its blob has {} bytes", blob.len())));
        }
        let mode = Mode::from_name(text("mode")).ok_or_else(|| wrong("its mode is not known here"))?;
        let key_id = text("key_id").parse().map_err(|why: String| wrong(&why))?;
        let kdf = match token.get("kdf") {
            None => None,
            Some(name) => {
                let known = name.as_str().and_then(KdfVariant::from_name);
                Some(known.ok_or_else(|| {
                    wrong("its key derivation is not known here").advise("Use a newer inlinecrypt.")
                })?)
            }
        };
        Ok(Some(Self { blob, mode, key_id, kdf }))
    }

    /// Refuses an engine that derives another key from it: reads would give noise, and writes would destroy data.
    pub(crate) fn check_engine(&self, spec: &EngineSpec) -> Result<(), Failure> {
        let (theirs, Some(ours)) = (derivation(spec), self.kdf) else { return Ok(()) };
        if ours == theirs {
            return Ok(());
        }
        Err(Failure::new(
            Code::Wrong,
            format!(
                "its wrapped key is for engines that derive keys by {}, and {spec} derives them by {}",
                ours.name(),
                theirs.name()
            ),
            format!("Name an engine that does: --engine software:kdf={}", ours.name()),
        ))
    }

    /// The token.
    pub(crate) fn to_token(&self) -> Value {
        let Self { blob, mode, key_id, kdf } = self;
        let mut token = json!({
            "type": TYPE,
            "keyslots": [],
            "version": VERSION,
            "mode": mode.info().name,
            "key_id": key_id.to_string(),
            "blob": Base64::encode_string(blob),
        });
        if let Some(kdf) = kdf {
            token["kdf"] = kdf.name().into();
        }
        token
    }
}

/// How an engine derives keys.
pub(crate) fn derivation(spec: &EngineSpec) -> KdfVariant {
    match spec {
        EngineSpec::Software(spec) => spec.kdf,
        EngineSpec::Ice(spec) => spec.kdf,
    }
}

/// No secret, but long.
impl fmt::Debug for WrappedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WrappedKey({})", self.key_id)
    }
}
