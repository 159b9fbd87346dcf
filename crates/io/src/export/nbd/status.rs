//! From our errors to the protocol's: the one place where a failure becomes a number on the wire.

use inlinecrypt_core::error::{Errno, Error};

/// An error that the protocol knows, in its spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: the export is read-only.
    EPERM = 1,
    /// Input or output failed.
    EIO = 5,
    /// No memory.
    ENOMEM = 12,
    /// The request breaks a rule.
    EINVAL = 22,
    /// Past the end, or the medium is full.
    ENOSPC = 28,
    /// Too large for one chunk.
    EOVERFLOW = 75,
    /// Not supported; or zeroes would not be fast.
    ENOTSUP = 95,
    /// The server is stopping.
    ESHUTDOWN = 108,
}

impl NbdError {
    /// What the protocol calls an [`Errno`]. What it has no name for is an I/O error.
    #[must_use]
    pub fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::EPERM | Errno::EACCES => Self::EPERM,
            Errno::ENOMEM => Self::ENOMEM,
            Errno::EINVAL => Self::EINVAL,
            Errno::ENOSPC => Self::ENOSPC,
            Errno::EOVERFLOW => Self::EOVERFLOW,
            Errno::EOPNOTSUPP => Self::ENOTSUP,
            Errno::ESHUTDOWN => Self::ESHUTDOWN,
            _ => Self::EIO,
        }
    }

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        self as u32
    }

    /// A text for people that says nothing about our inside.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::EPERM => "the export is read-only",
            Self::EIO => "input/output error",
            Self::ENOMEM => "out of memory",
            Self::EINVAL => "invalid request",
            Self::ENOSPC => "no space, or past the end of the export",
            Self::EOVERFLOW => "too large for one chunk",
            Self::ENOTSUP => "not supported",
            Self::ESHUTDOWN => "the server is stopping",
        }
    }
}

impl From<&Error> for NbdError {
    fn from(error: &Error) -> Self {
        Self::from_errno(error.errno())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_core::error::ErrorKind;

    #[test]
    fn every_kind_has_a_number_that_the_protocol_allows() {
        for kind in ErrorKind::ALL {
            let code = NbdError::from_errno(kind.errno()).code();
            assert!([1, 5, 12, 22, 28, 75, 95, 108].contains(&code), "{kind:?}: {code}");
        }
    }

    #[test]
    fn the_numbers_are_the_protocols() {
        let wanted = [
            (ErrorKind::ReadOnly, 1),
            (ErrorKind::Backing, 5),
            (ErrorKind::EngineGone, 5),
            (ErrorKind::Interrupted, 5),
            (ErrorKind::OutOfMemory, 12),
            (ErrorKind::Misaligned, 22),
            (ErrorKind::OutOfRange, 22),
            (ErrorKind::PastEnd, 28),
            (ErrorKind::NoSpace, 28),
            (ErrorKind::Overflow, 75),
            (ErrorKind::Unsupported, 95),
            (ErrorKind::Stopping, 108),
        ];
        for (kind, code) in wanted {
            assert_eq!(NbdError::from_errno(kind.errno()).code(), code, "{kind:?}");
        }
    }
}
