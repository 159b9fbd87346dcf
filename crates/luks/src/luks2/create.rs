//! New containers.

use super::container::{Container, STRIPES};
use super::header::{CopyState, HEADER_SIZES, Header};
use super::metadata::{ALIGN_BYTES, Digest, KEYSLOTS_BYTES_MAX, Metadata};
use crate::{Error, Hash, Random, Storage, encryption};
use inlinecrypt_cipher::Mode;
use serde_json::{Value, json};
use std::ops::RangeInclusive;

/// Where data begins unless told otherwise: 16 MiB, as cryptsetup has it.
pub const DATA_OFFSET_DEFAULT: u64 = 16 << 20;
/// Bytes of one copy of a new header: as cryptsetup has it.
const SIZE: u64 = 16 << 10;

/// What a new container is to be like.
#[derive(Clone, Debug)]
pub struct NewContainer<'a> {
    /// How its data is encrypted.
    pub mode: Mode,
    /// Length of its sectors, in bytes: 512, 1024, 2048 or 4096.
    pub sector_bytes: u32,
    /// Where its data begins, in bytes: 0 with a detached header.
    pub data_offset: u64,
    /// Bytes of header and areas together: the data offset, unless the header is detached.
    pub header_bytes: u64,
    /// What names it: a UUID.
    pub uuid: &'a str,
    /// A name for people.
    pub label: &'a str,
    /// Another.
    pub subsystem: &'a str,
    /// The key of its data and the iterations of the digest that tells it. If nobody knows the key, `None`: then the digest is
    /// random and tells every key to be wrong, since cryptsetup takes no segment without a digest.
    pub key: Option<(&'a [u8], u32)>,
    /// Tokens to begin with.
    pub tokens: Vec<Value>,
}

impl NewContainer<'_> {
    /// How many bytes header and areas may have together; with a mode, so that one LUKS keyslot for its key fits in.
    #[must_use]
    pub fn header_limits(mode: Option<Mode>) -> RangeInclusive<u64> {
        let area = mode.map_or(ALIGN_BYTES, |mode| (mode.info().key_bytes * STRIPES) as u64);
        2 * SIZE + area.next_multiple_of(ALIGN_BYTES)..=2 * SIZE + KEYSLOTS_BYTES_MAX
    }

    /// Writes the header: no LUKS keyslot is in it yet. Digest 0 tells the key of segment 0.
    ///
    /// The second copy is written first: what has no first one is no LUKS for anybody who does not look for the second.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::ErrorKind::Invalid) before anything is written, [`Io`](crate::ErrorKind::Io).
    pub fn write<S: Storage>(&self, mut storage: S, random: &mut Random<'_>) -> Result<Container<S>, Error> {
        let Self { mode, sector_bytes, data_offset, header_bytes, uuid, label, subsystem, key, tokens } =
            self;
        check_text(uuid, 39, "a UUID")?;
        check_text(label, 47, "a label")?;
        check_text(subsystem, 47, "a subsystem")?;
        let keyslots_bytes = header_bytes.checked_sub(2 * SIZE).filter(|bytes| bytes % ALIGN_BYTES == 0);
        let Some(keyslots_bytes) = keyslots_bytes else {
            return Err(Error::invalid(
                format!("{header_bytes} bytes for the header"),
                "Give a multiple of 4096 that is more than 32 KiB.",
            ));
        };
        debug_assert!(HEADER_SIZES.contains(&SIZE));
        let digest = Digest::make(*key, random)?;
        let tokens: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(number, token)| (number.to_string(), token.clone())).collect();
        let json = json!({
            "keyslots": {},
            "tokens": tokens,
            "segments": { "0": {
                "type": "crypt",
                "offset": data_offset.to_string(),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": encryption::name(*mode),
                "sector_size": sector_bytes,
            } },
            "digests": { "0": digest },
            "config": {
                "json_size": (SIZE - super::header::BINARY_BYTES as u64).to_string(),
                "keyslots_size": keyslots_bytes.to_string(),
            },
        });
        let mut header = Header {
            size: SIZE,
            sequence_id: 0,
            label: (*label).to_owned(),
            subsystem: (*subsystem).to_owned(),
            uuid: (*uuid).to_owned(),
            checksum: Hash::Sha256,
            metadata: Metadata::from_value(json, SIZE)?,
            copies: [CopyState::Good, CopyState::Bad("it is not there yet".to_owned())],
        };
        header.write(&mut storage, random)?;
        Ok(Container::new(storage, header))
    }
}

/// A field of text.
pub(super) fn check_text(text: &str, bytes_max: usize, what: &str) -> Result<(), Error> {
    if text.len() <= bytes_max && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Ok(());
    }
    Err(Error::invalid(
        format!("{what} of {} bytes; {bytes_max} is the most, of ASCII", text.len()),
        "Choose a shorter or a plainer one.",
    ))
}
