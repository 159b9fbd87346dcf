//! LUKS containers: what they say about their data, and how their keys are had.
//!
//! ```text
//!   file     headers in files, locked while they are changed
//!   look     header -> where the data lies and how it is encrypted; nothing secret
//!   unlock   passphrase -> volume key, in a process of its own that ends with it
//!   keep     which LUKS keyslots open the new key of what is re-encrypted
//!   ledger   how far a re-encryption is
//!   token    a wrapped key in a header
//! ```

pub(crate) mod file;
pub(crate) mod keep;
pub(crate) mod ledger;
pub(crate) mod look;
pub(crate) mod token;
pub(crate) mod unlock;

use crate::report::{Code, Failure, plain};
use inlinecrypt_luks::{Error, ErrorKind};
use std::error::Error as _;
use std::fmt::Display;
use std::io;

/// An error of the format, met with the container or header `name`.
pub(crate) fn failure(name: impl Display, error: &Error) -> Failure {
    let code = match error.kind() {
        ErrorKind::Passphrase => Code::Refused,
        ErrorKind::Memory => Code::Memory,
        ErrorKind::NotLuks | ErrorKind::Damaged | ErrorKind::Cost => Code::File,
        ErrorKind::Io => match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
            Some(source) => return Failure::of_io(name, source, error.advice()),
            None => Code::File,
        },
        _ => Code::Wrong,
    };
    let why = match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(source) => format!("{error}: {}", plain(source)),
        None => error.to_string(),
    };
    Failure::new(code, format!("{name}: {why}"), error.advice())
}

/// Random bytes of the system.
pub(crate) fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}
