//! One error type for the framework and the rooms around it, and its one total map to errno.
//!
//! An [`Error`] says what went wrong ([`ErrorKind`]), while doing what ([`Op`]), where, and why (its source). It never
//! carries key bytes, plaintext or ciphertext.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// What went wrong, for programs to match on. Grouped by who can do something about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    // The caller can fix these by calling differently.
    /// Key, config or argument breaks a rule that holds whatever the device. Nothing was touched.
    Invalid,
    /// Offset or length is not what the volume can do. Nothing was touched.
    Misaligned,
    /// A read, trim or the like reaches past the end. Nothing was touched.
    OutOfRange,
    /// A write reaches past the end, as a full disk would say. Nothing was touched.
    PastEnd,
    /// The volume is read-only. Nothing was touched.
    ReadOnly,
    /// The profile cannot do this, and no fallback is allowed or possible.
    Unsupported,
    /// The profile cannot do this, and the software fallback is switched off or lacks the mode.
    NoFallback,
    /// Eviction refused: requests still use the key. It stays programmed; try again later.
    KeyInUse,
    /// Somebody else holds the device or file.
    Busy,
    /// A wrapped key is larger than the room that was given for it.
    Overflow,

    // The key's owner can fix these.
    /// A wrapped key does not authenticate: corrupted, foreign, or from another boot. Not retried.
    KeyRejected,
    /// Permission to a file or key was refused.
    Permission,

    // The world.
    /// A file or device is not there.
    NotFound,
    /// The keyslot holds no key (any more): the engine lost it. The data was not touched.
    NoKey,
    /// The engine reported failure. The buffer content is meaningless.
    EngineFailed,
    /// The engine process is gone, and the keys with it.
    EngineGone,
    /// The engine process ended in the midst of a decryption. The buffer content is meaningless; whoever can get the
    /// ciphertext again may try again.
    Interrupted,
    /// The backing failed to read or write. See the source.
    Backing,
    /// The backing is full.
    NoSpace,
    /// An earlier flush failed: what was written before it may be lost, so no later flush can promise it.
    FlushLost,
    /// No memory.
    OutOfMemory,
    /// We are shutting down.
    Stopping,

    // Us.
    /// An invariant of ours does not hold. A bug; please report.
    Bug,
}

impl ErrorKind {
    /// Every kind, for tests of total maps.
    pub const ALL: &[Self] = &[
        Self::Invalid,
        Self::Misaligned,
        Self::OutOfRange,
        Self::PastEnd,
        Self::ReadOnly,
        Self::Unsupported,
        Self::NoFallback,
        Self::KeyInUse,
        Self::Busy,
        Self::Overflow,
        Self::KeyRejected,
        Self::Permission,
        Self::NotFound,
        Self::NoKey,
        Self::EngineFailed,
        Self::EngineGone,
        Self::Interrupted,
        Self::Backing,
        Self::NoSpace,
        Self::FlushLost,
        Self::OutOfMemory,
        Self::Stopping,
        Self::Bug,
    ];

    /// The errno that Linux would return. The only place where kinds become numbers.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::Invalid | Self::Misaligned | Self::OutOfRange => Errno::EINVAL,
            Self::PastEnd | Self::NoSpace => Errno::ENOSPC,
            Self::ReadOnly => Errno::EPERM,
            Self::Unsupported => Errno::EOPNOTSUPP,
            Self::NoFallback => Errno::ENOPKG,
            Self::KeyInUse | Self::Busy => Errno::EBUSY,
            Self::Overflow => Errno::EOVERFLOW,
            Self::KeyRejected => Errno::EBADMSG,
            Self::Permission => Errno::EACCES,
            Self::NotFound => Errno::ENOENT,
            Self::NoKey
            | Self::EngineFailed
            | Self::EngineGone
            | Self::Interrupted
            | Self::Backing
            | Self::FlushLost
            | Self::Bug => Errno::EIO,
            Self::OutOfMemory => Errno::ENOMEM,
            Self::Stopping => Errno::ESHUTDOWN,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::Invalid => "invalid argument",
            Self::Misaligned => "not a whole number of blocks",
            Self::OutOfRange => "past the end of the volume",
            Self::PastEnd => "no space: past the end of the volume",
            Self::ReadOnly => "the volume is read-only",
            Self::Unsupported => "not supported",
            Self::NoFallback => "no software fallback",
            Self::KeyInUse => "the key is in use",
            Self::Busy => "in use by somebody else",
            Self::Overflow => "too large for the room given",
            Self::KeyRejected => "the key was rejected",
            Self::Permission => "permission refused",
            Self::NotFound => "not found",
            Self::NoKey => "the keyslot holds no key",
            Self::EngineFailed => "the engine failed",
            Self::EngineGone => "the engine is gone",
            Self::Interrupted => "the engine ended in the midst of a decryption",
            Self::Backing => "backing failed",
            Self::NoSpace => "no space left on the backing",
            Self::FlushLost => "an earlier flush failed, data written before it may be lost",
            Self::OutOfMemory => "out of memory",
            Self::Stopping => "stopping",
            Self::Bug => "internal error",
        }
    }
}

/// A Linux error number, as its ABI has it (`include/uapi/asm-generic/errno-base.h`, `errno.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Self = Self(1);
    /// No such file or directory.
    pub const ENOENT: Self = Self(2);
    /// I/O error.
    pub const EIO: Self = Self(5);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Permission denied.
    pub const EACCES: Self = Self(13);
    /// Device or resource busy.
    pub const EBUSY: Self = Self(16);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// No space left on device.
    pub const ENOSPC: Self = Self(28);
    /// Package not installed: here, no software implementation of a mode.
    pub const ENOPKG: Self = Self(65);
    /// Bad message: here, a wrapped key that does not authenticate.
    pub const EBADMSG: Self = Self(74);
    /// Value too large: here, a blob larger than its room.
    pub const EOVERFLOW: Self = Self(75);
    /// Operation not supported.
    pub const EOPNOTSUPP: Self = Self(95);
    /// Shutting down.
    pub const ESHUTDOWN: Self = Self(108);

    /// The number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }
}

/// What was being done when an error happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Op {
    /// Building a key from its bytes.
    InitKey,
    /// Admitting a key to a profile.
    Admit,
    /// Programming a keyslot.
    Program,
    /// Evicting a key.
    Evict,
    /// Encrypting or decrypting.
    Crypt,
    /// Importing a raw key.
    Import,
    /// Generating a key.
    Generate,
    /// Preparing a long-term wrapped key for this boot.
    Prepare,
    /// Deriving a software secret.
    DeriveSecret,
    /// Opening a file, device, root or engine.
    Open,
    /// Creating a volume or file.
    Create,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Flushing.
    Flush,
    /// Trimming.
    Trim,
    /// Writing zeroes.
    WriteZeroes,
    /// Asking which parts are allocated.
    Extents,
    /// Allocating memory for data.
    Allocate,
    /// Getting a volume under another key.
    Reencrypt,
}

impl Op {
    /// Every operation.
    pub const ALL: &[Self] = &[
        Self::InitKey,
        Self::Admit,
        Self::Program,
        Self::Evict,
        Self::Crypt,
        Self::Import,
        Self::Generate,
        Self::Prepare,
        Self::DeriveSecret,
        Self::Open,
        Self::Create,
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::WriteZeroes,
        Self::Extents,
        Self::Allocate,
        Self::Reencrypt,
    ];
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InitKey => "set up key",
            Self::Admit => "admit key",
            Self::Program => "program keyslot",
            Self::Evict => "evict key",
            Self::Crypt => "encrypt or decrypt",
            Self::Import => "import key",
            Self::Generate => "generate key",
            Self::Prepare => "prepare key",
            Self::DeriveSecret => "derive software secret",
            Self::Open => "open",
            Self::Create => "create",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write zeroes",
            Self::Extents => "list extents",
            Self::Allocate => "allocate memory",
            Self::Reencrypt => "re-encrypt",
        })
    }
}

/// What went wrong, while doing what, where, and why.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    op: Op,
    place: Option<(u64, u64)>,
    detail: Option<Cow<'static, str>>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that happened during `op`.
    #[must_use]
    pub fn new(kind: ErrorKind, op: Op) -> Self {
        Self(Box::new(Inner { kind, op, place: None, detail: None, source: None }))
    }

    /// Adds where in the volume or file it happened.
    #[must_use]
    pub fn at(mut self, offset_bytes: u64, len_bytes: u64) -> Self {
        self.0.place = Some((offset_bytes, len_bytes));
        self
    }

    /// Adds a fact that a person needs: which rule, which value, what to do. Never secret bytes.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into().into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done.
    #[must_use]
    pub fn op(&self) -> Op {
        self.0.op
    }

    /// The detail that was given, if any.
    #[must_use]
    pub fn detail_text(&self) -> Option<&str> {
        self.0.detail.as_deref()
    }

    /// The errno that Linux would return.
    #[must_use]
    pub fn errno(&self) -> Errno {
        self.0.kind.errno()
    }

    /// The same failure for another of the requests that it hit.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(Box::new(Inner {
            kind: self.0.kind,
            op: self.0.op,
            place: self.0.place,
            detail: self.0.detail.clone(),
            source: self.0.source.clone(),
        }))
    }

    /// The error and its causes on one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, op, place, detail, source: _ } = &*self.0;
        write!(f, "{op}")?;
        if let Some((offset, len)) = place {
            write!(f, " at {offset}+{len}")?;
        }
        write!(f, ": {}", kind.text())?;
        if let Some(detail) = detail {
            write!(f, ": {detail}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error meanings of `linux-inline-encryption.md`, checked as numbers so that a renamed constant cannot hide.
    #[test]
    fn kinds_mean_what_the_kernel_means() {
        let meaning = [
            (ErrorKind::Unsupported, 95),
            (ErrorKind::NoFallback, 65),
            (ErrorKind::KeyRejected, 74),
            (ErrorKind::Invalid, 22),
            (ErrorKind::Overflow, 75),
            (ErrorKind::KeyInUse, 16),
        ];
        for (kind, number) in meaning {
            assert_eq!(kind.errno().raw(), number, "{kind:?}");
        }
        assert!(ErrorKind::ALL.iter().all(|kind| kind.errno().raw() > 0));
    }

    #[test]
    fn text_names_operation_place_kind_and_causes_in_order() {
        let error = Error::new(ErrorKind::Backing, Op::Read)
            .at(4096, 512)
            .because(std::io::Error::other("cable unplugged"));
        assert_eq!(error.chain(), "read at 4096+512: backing failed: cable unplugged");
        assert_eq!(error.duplicate().chain(), error.chain());
    }
}
