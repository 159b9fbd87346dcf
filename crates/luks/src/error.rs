//! Why something of LUKS cannot be read, opened or changed.

use std::fmt;
use std::io;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no LUKS.
    NotLuks,
    /// It is LUKS, and damaged.
    Damaged,
    /// It is LUKS, and asks for what is not done here.
    Unsupported,
    /// No LUKS keyslot opens with this passphrase.
    Passphrase,
    /// A cost that looks like an attack.
    Cost,
    /// Memory that is not there.
    Memory,
    /// What was asked for cannot be: no such LUKS keyslot, none free, no room.
    Invalid,
    /// The storage failed.
    Io,
}

/// What is wrong, and what to do.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: String,
    advice: &'static str,
    source: Option<io::Error>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, what: impl Into<String>, advice: &'static str) -> Self {
        Self { kind, what: what.into(), advice, source: None }
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::new(
            ErrorKind::Damaged,
            what,
            "Restore the header from a backup: inlinecrypt luks header-restore",
        )
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, what, "Open it with cryptsetup.")
    }

    pub(crate) fn invalid(what: impl Into<String>, advice: &'static str) -> Self {
        Self::new(ErrorKind::Invalid, what, advice)
    }

    pub(crate) fn io(source: io::Error) -> Self {
        Self {
            kind: ErrorKind::Io,
            what: "it cannot be read or written".to_owned(),
            advice: "Check the medium, and who may use it.",
            source: Some(source),
        }
    }

    pub(crate) fn passphrase() -> Self {
        Self::new(
            ErrorKind::Passphrase,
            "no LUKS keyslot opens with this passphrase",
            "Give another; in a key file of cryptsetup every byte counts, also a line feed at the end.",
        )
    }

    /// The same of a passphrase that opens the old key of what is re-encrypted, and not the new one; anything else stays as it is.
    #[must_use]
    pub fn of_old_key_alone(self) -> Self {
        match self.kind {
            ErrorKind::Passphrase => Self::new(
                ErrorKind::Passphrase,
                "it is being re-encrypted, and this passphrase opens the old key alone: its LUKS keyslot goes with that",
                "Give a passphrase that was kept; inlinecrypt luks dump shows the LUKS keyslots of both digests.",
            ),
            _ => self,
        }
    }

    pub(crate) fn no_such_slot(number: u32) -> Self {
        Self::invalid(
            format!("there is no LUKS keyslot {number}"),
            "inlinecrypt luks dump shows which there are.",
        )
    }

    /// None of those that could be tried; the others are named.
    pub(crate) fn passphrase_but(left_out: &[String]) -> Self {
        let Self { what, .. } = Self::passphrase();
        Self::new(
            ErrorKind::Passphrase,
            format!("{what}; not tried: {}", left_out.join("; ")),
            "Give another passphrase, or open with cryptsetup what is not tried here.",
        )
    }

    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What to do about it: one sentence.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        self.advice
    }
}

/// What is wrong, without the advice.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}
