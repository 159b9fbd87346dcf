//! LUKS1 and LUKS2 on the disk.
//!
//! ```text
//!   passphrase --kdf--> area key --area--> striped key --af--> volume key --digest--> it is the right one
//!
//!   LUKS2:  | header, JSON | header, JSON | LUKS keyslots' areas ... | data segment ...        both copies hold the same
//!   LUKS1:  | header | LUKS keyslots' areas ... | data ...
//! ```
//!
//! - [`detect`] says what bytes are; [`luks1::Header`] and [`luks2::Container`] read them and open them with a passphrase;
//!   [`luks2::Container`] also changes them, so that whoever is killed leaves the old header or the new one.
//! - [`storage::Storage`] is where they lie: nothing here opens files. Randomness and time are handed in.
//! - Whatever is read is checked before it is believed, also what was computed over by a right checksum.
//! - LUKS's keyslots are called LUKS keyslots, since keyslots are an engine's.
//!
//! Sources: the LUKS2 on-disk format specification 1.1.1 and the LUKS1 one 1.2.3 (both of the cryptsetup project), and what
//! cryptsetup does with the files of the tests.
//!
//! Start reading at [`luks2`].
#![forbid(unsafe_code)]

pub mod encryption;
pub mod error;
pub mod kdf;
pub mod luks1;
pub mod luks2;
pub mod storage;

mod af;
mod area;
mod hash;

pub use error::{Error, ErrorKind};
pub use hash::Hash;
pub use storage::Storage;

use std::io;
use zeroize::Zeroizing;

/// A key that was opened: the one that encrypts data.
pub type VolumeKey = Zeroizing<Vec<u8>>;

/// Where random bytes come from.
pub type Random<'r> = dyn FnMut(&mut [u8]) -> io::Result<()> + 'r;

/// Bytes of the longest passphrase (cryptsetup's limit for key files, by default).
pub const PASSPHRASE_BYTES_MAX: usize = 8 << 20;

/// What a disk or file begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// LUKS1.
    Luks1,
    /// LUKS2.
    Luks2,
    /// LUKS2 whose first header is gone, by its second one.
    Luks2SecondOnly,
}

/// Whether there is LUKS on `storage`, by its magic alone.
///
/// # Errors
///
/// What the storage says.
pub fn detect(storage: &mut dyn Storage) -> Result<Option<Kind>, Error> {
    let mut start = [0; 8];
    let len = storage.len_bytes();
    if len < 512 {
        return Ok(None);
    }
    storage.read(0, &mut start).map_err(Error::io)?;
    match (&start[..6], u16::from_be_bytes([start[6], start[7]])) {
        (b"LUKS\xba\xbe", 1) => return Ok(Some(Kind::Luks1)),
        (b"LUKS\xba\xbe", _) => return Ok(Some(Kind::Luks2)),
        _ => {}
    }
    for size in luks2::HEADER_SIZES {
        if len >= 2 * size {
            let mut magic = [0; 6];
            storage.read(size, &mut magic).map_err(Error::io)?;
            if magic == *b"SKUL\xba\xbe" {
                return Ok(Some(Kind::Luks2SecondOnly));
            }
        }
    }
    Ok(None)
}
