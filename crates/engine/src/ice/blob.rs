//! Blobs as the storage engine's key manager makes them, long-term and ephemeral alike.
//!
//! HWKM v1: 68 bytes, as in Qualcomm's OP-TEE and in a dump of an SM8350. All of it is authenticated.
//!
//! ```text
//!   offset  bytes
//!        0     48  AES-256-SIV of the 32-byte key: tag, then ciphertext
//!       48      8  the key's policy, two little-endian words: 0x52011a24, 0x3
//!       56     12  what the wrapping is bound to, three little-endian words: 0x1 long-term, 0x11 ephemeral; 0; 0
//!       68
//! ```
//!
//! HWKM v2: 100 bytes. The layout of shipped hardware is not public; this one is ours. It begins as the software
//! engine's [blobs](crate::blob) do, with version 2, so that people are told whose key they have.
//!
//! ```text
//!   offset  bytes
//!        0     12  magic "inlinecrypt" and a zero byte
//!       12      1  version: 2
//!       13      1  form: 1 long-term, 2 ephemeral
//!       14      2  zero
//!       16      8  identifier of the wrapping key: the root's, or that of one start of the engine
//!       24      8  zero
//!       32     68  as v1; the 32 bytes before are associated data, too
//!      100
//! ```
//!
//! A long-term blob belongs to a chip, for which the root stands; an ephemeral one to one start of the engine.

use super::HwkmVersion;
use super::hwkm::{BLOB_BYTES, SEALED_BYTES, WrapBinding};
use super::kdf_context::KeyPolicy;
use crate::blob::{Form, WrappingKeyId};
use std::fmt;

/// Length of a blob of HWKM v1.
pub const V1_BYTES: usize = BLOB_BYTES;
/// Length of a blob of HWKM v2.
pub const V2_BYTES: usize = PREFIX_BYTES + BLOB_BYTES;

const PREFIX_BYTES: usize = 32;
const MAGIC: [u8; 12] = *b"inlinecrypt\0";
pub(crate) const V2_VERSION: u8 = 2;

const _: () = assert!(V1_BYTES == 68 && V2_BYTES == 100);

/// Length of the blobs of this version.
pub(crate) const fn blob_bytes(version: HwkmVersion) -> usize {
    match version {
        HwkmVersion::V1 => V1_BYTES,
        HwkmVersion::V2 => V2_BYTES,
    }
}

/// What stands before the wrapped key: nothing for v1.
pub(crate) fn prefix(version: HwkmVersion, form: Form, id: WrappingKeyId) -> Vec<u8> {
    match version {
        HwkmVersion::V1 => Vec::new(),
        HwkmVersion::V2 => [&MAGIC[..], &[V2_VERSION, form.byte(), 0, 0], &id.to_bytes(), &[0; 8]].concat(),
    }
}

pub(crate) const fn binding(form: Form) -> WrapBinding {
    match form {
        Form::LongTerm => WrapBinding::LONG_TERM,
        Form::Ephemeral => WrapBinding::EPHEMERAL,
    }
}

/// Whether `bytes` have the length of a v1 blob, and its public part: which form it says it is. A raw key is no match for
/// it: none has 68 bytes.
pub(crate) fn looks_like_v1(bytes: &[u8]) -> Option<Form> {
    let clear = (bytes.len() == V1_BYTES).then(|| &bytes[SEALED_BYTES..])?;
    let bound = clear.strip_prefix(&KeyPolicy::STORED.to_le_bytes())?;
    [Form::LongTerm, Form::Ephemeral].into_iter().find(|&form| binding(form).to_le_bytes() == bound)
}

/// What a v2 blob of the right length says about itself.
pub(crate) fn parse_v2(bytes: &[u8]) -> Option<(Form, WrappingKeyId)> {
    let header = (bytes.len() == V2_BYTES).then(|| &bytes[..PREFIX_BYTES])?;
    let form = Form::from_byte(header[13])?;
    let id = WrappingKeyId::from_bytes(header[16..24].try_into().ok()?);
    (prefix(HwkmVersion::V2, form, id) == header).then_some((form, id))
}

/// Why a blob is refused, for people. Made from what is public in it; that it is refused was decided by authentication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) wanted: Form,
    /// Whose wrapping key is here.
    pub(crate) here: WrappingKeyId,
    pub(crate) why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Length {
        actual: usize,
        expected: usize,
    },
    OtherForm(Form),
    OtherKey(WrappingKeyId),
    /// Nothing public tells.
    Unauthentic,
}

impl Refused {
    pub(crate) fn explain(version: HwkmVersion, wanted: Form, here: WrappingKeyId, blob: &[u8]) -> Self {
        let expected = blob_bytes(version);
        let why = if blob.len() != expected {
            Why::Length { actual: blob.len(), expected }
        } else {
            match version {
                HwkmVersion::V1 => match looks_like_v1(blob) {
                    Some(form) if form != wanted => Why::OtherForm(form),
                    _ => Why::Unauthentic,
                },
                HwkmVersion::V2 => match parse_v2(blob) {
                    Some((form, _)) if form != wanted => Why::OtherForm(form),
                    Some((_, id)) if id != here => Why::OtherKey(id),
                    _ => Why::Unauthentic,
                },
            }
        };
        Self { wanted, here, why }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wanted, here, why } = self;
        match (why, wanted) {
            (Why::Length { actual, expected }, _) => write!(
                f,
                "the blob has {actual} bytes, this engine's have {expected}: it is damaged, or of another engine"
            ),
            (Why::OtherForm(Form::LongTerm), _) => {
                f.write_str("this is a long-term wrapped key; it has to be prepared before it is used")
            }
            (Why::OtherForm(Form::Ephemeral), _) => f.write_str(
                "this is an ephemeral wrapped key, of use only until its engine stops; give the long-term one",
            ),
            (Why::OtherKey(id), Form::LongTerm) => {
                write!(f, "the key was wrapped under root {id}, the engine has root {here}")
            }
            (Why::OtherKey(_), Form::Ephemeral) => f.write_str(
                "the key was prepared by another start of the engine; prepare it again from the long-term one",
            ),
            (Why::Unauthentic, Form::LongTerm) => write!(
                f,
                "the wrapped key does not authenticate: it is damaged, or was wrapped under another root than {here}"
            ),
            (Why::Unauthentic, Form::Ephemeral) => f.write_str(
                "the wrapped key does not authenticate: it is damaged, or was prepared by another start of the engine; \
                 prepare it again from the long-term one",
            ),
        }
    }
}

impl std::error::Error for Refused {}
