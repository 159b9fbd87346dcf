//! The two copies of the header.
//!
//! ```text
//!   offset  bytes  big-endian
//!        0      6  "LUKS" (first copy) or "SKUL" (second), 0xba, 0xbe
//!        6      2  version, 2
//!        8      8  bytes of this copy, JSON area included
//!       16      8  sequence id: the copy with the higher one counts
//!       24     48  label          72  32  checksum's hash     104  64  salt, random in each copy
//!      168     40  UUID          208  48  subsystem           256   8  where this copy lies
//!      448     64  checksum, of the whole copy with this field zero
//!     4096         JSON, up to a NUL; zeroes
//! ```

use super::metadata::Metadata;
use crate::luks1::text;
use crate::{Error, ErrorKind, Hash, Random, Storage};

/// Sizes that a copy may have, in bytes.
pub const HEADER_SIZES: [u64; 9] =
    [16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];

/// Bytes of the binary part.
pub(super) const BINARY_BYTES: usize = 4096;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_BYTES: usize = 64;

/// A header, read from the copy that counts.
#[derive(Clone, Debug)]
pub struct Header {
    /// Bytes of one copy.
    pub size: u64,
    /// Goes up with each change.
    pub sequence_id: u64,
    /// A name that people gave it.
    pub label: String,
    /// Another.
    pub subsystem: String,
    /// What names the container.
    pub uuid: String,
    /// The hash of its checksums.
    pub checksum: Hash,
    /// What the JSON says.
    pub metadata: Metadata,
    /// What the two copies were like when it was read.
    pub copies: [CopyState; 2],
}

/// What a copy is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// It is whole, and says the same as the other.
    Good,
    /// It is whole, and the other is newer.
    Older,
    /// It cannot be used.
    Bad(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    First,
    Second,
}

impl Which {
    fn magic(self) -> [u8; 6] {
        match self {
            Self::First => *b"LUKS\xba\xbe",
            Self::Second => *b"SKUL\xba\xbe",
        }
    }
}

impl Header {
    /// Reads both copies and takes the one that counts: of those that are whole the one with the higher sequence id, the first if
    /// they are equal.
    ///
    /// # Errors
    ///
    /// [`NotLuks`](ErrorKind::NotLuks) if neither has its magic, [`Damaged`](ErrorKind::Damaged) if neither is whole, with the
    /// reasons; [`Io`](ErrorKind::Io).
    pub fn read(storage: &mut dyn Storage) -> Result<Self, Error> {
        let first = Self::read_copy(storage, Which::First, 0);
        let second = match &first {
            Ok(first) => Self::read_copy(storage, Which::Second, first.size),
            Err(_) => {
                let mut found = Err(not_luks());
                for size in HEADER_SIZES {
                    match Self::read_copy(storage, Which::Second, size) {
                        Err(why) if why.kind() == ErrorKind::NotLuks => {}
                        Err(why) => found = Err(why),
                        Ok(copy) => {
                            found = Ok(copy);
                            break;
                        }
                    }
                }
                found
            }
        };
        match (first, second) {
            (Err(error), _) | (_, Err(error)) if error.kind() == ErrorKind::Io => Err(error),
            (Ok(first), Ok(second)) => Ok(if first.sequence_id >= second.sequence_id {
                let other =
                    if first.sequence_id == second.sequence_id { CopyState::Good } else { CopyState::Older };
                Self { copies: [CopyState::Good, other], ..first }
            } else {
                Self { copies: [CopyState::Older, CopyState::Good], ..second }
            }),
            (Ok(first), Err(why)) => {
                Ok(Self { copies: [CopyState::Good, CopyState::Bad(why.to_string())], ..first })
            }
            (Err(why), Ok(second)) => {
                Ok(Self { copies: [CopyState::Bad(why.to_string()), CopyState::Good], ..second })
            }
            (Err(first), Err(second))
                if first.kind() == ErrorKind::NotLuks && second.kind() == ErrorKind::NotLuks =>
            {
                Err(first)
            }
            (Err(why), Err(_)) if why.kind() == ErrorKind::Unsupported => Err(why),
            (Err(first), Err(second)) => Err(Error::damaged(format!(
                "neither copy of its LUKS2 header can be used. The first: {first}. The second: {second}"
            ))),
        }
    }

    fn read_copy(storage: &mut dyn Storage, which: Which, offset: u64) -> Result<Self, Error> {
        let len = storage.len_bytes();
        if offset.checked_add(BINARY_BYTES as u64).is_none_or(|end| end > len) {
            return Err(not_luks());
        }
        let mut bytes = vec![0; BINARY_BYTES];
        storage.read(offset, &mut bytes).map_err(Error::io)?;
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if bytes[..6] != which.magic() {
            return Err(not_luks());
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 2 {
            return Err(Error::unsupported(format!("LUKS version {version}, and 1 and 2 are known here")));
        }
        let (size, sequence_id, lies_at) = (word(8), word(16), word(256));
        if !HEADER_SIZES.contains(&size) {
            return Err(Error::damaged(format!("it says to have {size} bytes, which no header has")));
        }
        if lies_at != offset || (which == Which::Second && offset != size) {
            return Err(Error::damaged(format!("it says to lie at byte {lies_at}, and lies at {offset}")));
        }
        if size > len - offset {
            return Err(Error::damaged(format!("it has {size} bytes, and what it lies on ends before")));
        }
        let checksum = Hash::parse(&text(&bytes[72..104], "checksum's hash")?)?;
        let texts = [
            text(&bytes[24..72], "label")?,
            text(&bytes[168..208], "UUID")?,
            text(&bytes[208..256], "subsystem")?,
        ];
        // All of it is at hand before it is believed.
        let size_in_memory = usize::try_from(size).expect("at most 4 MiB");
        bytes.resize(size_in_memory, 0);
        storage.read(offset + BINARY_BYTES as u64, &mut bytes[BINARY_BYTES..]).map_err(Error::io)?;
        let expected: [u8; CHECKSUM_BYTES] =
            bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_BYTES].try_into().expect("64 bytes");
        if sum(checksum, &mut bytes) != expected {
            return Err(Error::damaged("its checksum is wrong"));
        }
        let json = &bytes[BINARY_BYTES..];
        let end = json.iter().position(|&byte| byte == 0);
        let end = end.ok_or_else(|| Error::damaged("its JSON does not end"))?;
        let metadata = Metadata::parse(&json[..end], size)?;
        let [label, uuid, subsystem] = texts;
        let copies = [CopyState::Good, CopyState::Good];
        Ok(Self { size, sequence_id, label, subsystem, uuid, checksum, metadata, copies })
    }

    /// Whether both copies are whole and the same.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.copies == [CopyState::Good, CopyState::Good]
    }

    /// Writes both copies with the next sequence id, one after the other, each made stable. The copy that counts is written
    /// last, so that one of the two is whole at any moment.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if the JSON has no room, before anything is written; [`Io`](ErrorKind::Io): one copy or
    /// both may be new then.
    pub fn write(&mut self, storage: &mut dyn Storage, random: &mut Random<'_>) -> Result<(), Error> {
        let json = self.metadata.to_json(self.size)?;
        let sequence_id = self.sequence_id.checked_add(1).ok_or_else(|| {
            Error::damaged("its sequence id is the highest there is, so nothing can be changed any more")
        })?;
        self.sequence_id = sequence_id;
        // A copy that is not good is of no use to anybody, so it goes first.
        let order = match self.copies {
            [CopyState::Good, CopyState::Older | CopyState::Bad(_)] => [Which::Second, Which::First],
            _ => [Which::First, Which::Second],
        };
        for which in order {
            let bytes = self.encode(which, &json, random)?;
            let offset = if which == Which::First { 0 } else { self.size };
            storage.write(offset, &bytes).and_then(|()| storage.flush()).map_err(Error::io)?;
        }
        self.copies = [CopyState::Good, CopyState::Good];
        Ok(())
    }

    fn encode(&self, which: Which, json: &[u8], random: &mut Random<'_>) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; usize::try_from(self.size).expect("at most 4 MiB")];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &which.magic());
        put(6, &2_u16.to_be_bytes());
        put(8, &self.size.to_be_bytes());
        put(16, &self.sequence_id.to_be_bytes());
        put(24, self.label.as_bytes());
        put(72, self.checksum.name().as_bytes());
        let mut salt = [0; 64];
        random(&mut salt).map_err(Error::io)?;
        put(104, &salt);
        put(168, self.uuid.as_bytes());
        put(208, self.subsystem.as_bytes());
        put(256, &(if which == Which::First { 0 } else { self.size }).to_be_bytes());
        put(BINARY_BYTES, json);
        let checksum = sum(self.checksum, &mut bytes);
        bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_BYTES].copy_from_slice(&checksum);
        Ok(bytes)
    }
}

/// The checksum of a copy, whose field for it is zero afterwards.
fn sum(hash: Hash, copy: &mut [u8]) -> [u8; CHECKSUM_BYTES] {
    copy[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_BYTES].fill(0);
    let mut checksum = [0; CHECKSUM_BYTES];
    hash.digest(&[copy], &mut checksum);
    checksum
}

fn not_luks() -> Error {
    Error::new(ErrorKind::NotLuks, "there is no LUKS2 header", "Check the name.")
}
