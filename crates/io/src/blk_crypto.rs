//! The key ladder of real hardware: what a block device imports, generates and prepares, through Linux's blk-crypto.
//!
//! The same steps as those of our engines, with the blobs of the device's hardware. What a device can do shows in sysfs;
//! asking it for what it cannot do is refused by the kernel, and the refusal put into words here.

use crate::sys::blk_crypto as sys;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{EphemeralWrappedKey, LongTermWrappedKey, RawKey, WRAPPED_KEY_BYTES_MAX};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

/// Lengths of the raw keys that the kernel lets hardware import, in bytes. Hardware takes fewer: 32 is usual.
pub const IMPORT_BYTES: RangeInclusive<usize> = 16..=64;

/// A block device, opened to be asked for keys.
#[derive(Debug)]
pub struct KeyDevice {
    device: OwnedFd,
}

impl KeyDevice {
    /// Opens a block device, for reading: the kernel asks for no more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::Permission`]; [`ErrorKind::Invalid`] if it is no block device.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |errno: Errno| {
            let kind = match errno {
                Errno::NOENT | Errno::NXIO | Errno::NODEV | Errno::NOTDIR | Errno::NOMEDIUM => {
                    ErrorKind::NotFound
                }
                Errno::ACCESS | Errno::PERM => ErrorKind::Permission,
                Errno::NOMEM => ErrorKind::OutOfMemory,
                _ => ErrorKind::Backing,
            };
            Error::new(kind, Op::Open).because(io::Error::from(errno))
        };
        // What it is, before it is opened: opening alone does something to a terminal or a fifo.
        let status = rustix::fs::stat(path).map_err(failed)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::BlockDevice {
            return Err(Error::new(ErrorKind::Invalid, Op::Open).detail(
                "it is no block device; name the disk whose hardware is to have the key, such as /dev/sda",
            ));
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let device = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        Ok(Self { device })
    }

    /// Wraps `key` for storage.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for a length that is not in [`IMPORT_BYTES`] or that the hardware does not take;
    /// [`ErrorKind::Unsupported`] if device or kernel cannot; [`ErrorKind::EngineFailed`].
    ///
    /// # Blocking
    ///
    /// Waits for the hardware.
    pub fn import(&self, key: &RawKey) -> Result<LongTermWrappedKey, Error> {
        let len = key.expose().len();
        if !IMPORT_BYTES.contains(&len) {
            return Err(Error::new(ErrorKind::Invalid, Op::Import).detail(format!(
                "a raw key of {len} bytes, and the kernel takes {} to {}",
                IMPORT_BYTES.start(),
                IMPORT_BYTES.end()
            )));
        }
        let blob =
            sys::import(self.device.as_fd(), key.expose()).map_err(|errno| refusal(Op::Import, errno))?;
        Ok(LongTermWrappedKey::new(&blob))
    }

    /// Makes a key that nobody ever sees, wrapped for storage.
    ///
    /// # Errors
    ///
    /// Those of [`import`](Self::import), without the first.
    ///
    /// # Blocking
    ///
    /// Waits for the hardware.
    pub fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        let blob = sys::generate(self.device.as_fd()).map_err(|errno| refusal(Op::Generate, errno))?;
        Ok(LongTermWrappedKey::new(&blob))
    }

    /// Turns a stored key into one for this boot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::KeyRejected`] if it is not of this hardware or was changed; else those of
    /// [`generate`](Self::generate).
    ///
    /// # Blocking
    ///
    /// Waits for the hardware.
    pub fn prepare(&self, key: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        let len = key.as_bytes().len();
        if !(1..=WRAPPED_KEY_BYTES_MAX).contains(&len) {
            return Err(Error::new(ErrorKind::KeyRejected, Op::Prepare).detail(format!(
                "it has {len} bytes, and no hardware's wrapped key has more than {WRAPPED_KEY_BYTES_MAX}, or none"
            )));
        }
        let blob =
            sys::prepare(self.device.as_fd(), key.as_bytes()).map_err(|errno| refusal(Op::Prepare, errno))?;
        Ok(EphemeralWrappedKey::new(&blob))
    }
}

/// What the kernel's refusal means (Linux `block/blk-crypto.c`, `blk_crypto_ioctl`; `drivers/soc/qcom/ice.c`).
fn refusal(op: Op, errno: Errno) -> Error {
    let (kind, detail) = match errno {
        Errno::OPNOTSUPP => (
            ErrorKind::Unsupported,
            "the device takes no hardware-wrapped keys, or not as it was started; see what it takes with: inlinecrypt \
             probe",
        ),
        Errno::NOTTY | Errno::NOSYS => (
            ErrorKind::Unsupported,
            "the kernel does not know the request: it is older than hardware-wrapped keys, or built without blk-crypto; \
             see what it has with: inlinecrypt probe",
        ),
        Errno::BADMSG => (
            ErrorKind::KeyRejected,
            "the hardware does not open it: it is another device's, or was changed; give the key that this device made",
        ),
        Errno::INVAL if op == Op::Import => (
            ErrorKind::Invalid,
            "the hardware does not take a raw key of this length; most take 32 bytes, from which they derive the two \
             halves",
        ),
        Errno::INVAL => (
            ErrorKind::Invalid,
            "the hardware does not take it; check that it is a long-term wrapped key of this device",
        ),
        Errno::OVERFLOW => (
            ErrorKind::Overflow,
            "the wrapped key does not fit the 128 bytes that one has at most; the driver and this program disagree",
        ),
        Errno::ACCESS | Errno::PERM => {
            (ErrorKind::Permission, "the system does not let this user ask; ask as root, or through who may")
        }
        Errno::NOMEM => (ErrorKind::OutOfMemory, "the kernel has no memory; try again"),
        Errno::NODEV | Errno::NXIO => (ErrorKind::NotFound, "the device is gone; check the name"),
        Errno::FAULT => (ErrorKind::Bug, "the kernel cannot reach our memory; please report this"),
        Errno::TIMEDOUT | Errno::IO | Errno::BUSY | Errno::AGAIN => {
            (ErrorKind::EngineFailed, "the hardware or its firmware failed; the kernel's log says more")
        }
        _ => (ErrorKind::EngineFailed, "the kernel refuses; its log may say more"),
    };
    Error::new(kind, op).detail(detail).because(io::Error::from(errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_of_the_kernel_has_its_words() {
        for (op, errno, kind, says) in [
            (Op::Generate, Errno::OPNOTSUPP, ErrorKind::Unsupported, "no hardware-wrapped keys"),
            (Op::Generate, Errno::NOTTY, ErrorKind::Unsupported, "does not know the request"),
            (Op::Prepare, Errno::BADMSG, ErrorKind::KeyRejected, "another device's"),
            (Op::Import, Errno::INVAL, ErrorKind::Invalid, "raw key of this length"),
            (Op::Prepare, Errno::INVAL, ErrorKind::Invalid, "long-term wrapped key of this device"),
            (Op::Import, Errno::OVERFLOW, ErrorKind::Overflow, "128 bytes"),
            (Op::Import, Errno::ACCESS, ErrorKind::Permission, "root"),
            (Op::Import, Errno::PERM, ErrorKind::Permission, "root"),
            (Op::Import, Errno::NOMEM, ErrorKind::OutOfMemory, "memory"),
            (Op::Import, Errno::NODEV, ErrorKind::NotFound, "gone"),
            (Op::Import, Errno::NXIO, ErrorKind::NotFound, "gone"),
            (Op::Import, Errno::FAULT, ErrorKind::Bug, "report"),
            (Op::Import, Errno::IO, ErrorKind::EngineFailed, "firmware"),
            (Op::Import, Errno::TIMEDOUT, ErrorKind::EngineFailed, "firmware"),
            (Op::Import, Errno::XDEV, ErrorKind::EngineFailed, "refuses"),
        ] {
            let error = refusal(op, errno);
            assert_eq!((error.kind(), error.op()), (kind, op), "{errno:?}");
            assert!(error.to_string().contains(says), "{errno:?}: {error}");
            assert!(
                error.chain().contains(&io::Error::from(errno).to_string()),
                "the cause is kept: {errno:?}"
            );
        }
    }

    #[test]
    fn what_is_no_block_device_is_not_opened() {
        for path in ["/dev/null", "/", "/proc/self/exe"] {
            let error = KeyDevice::open(Path::new(path)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{path}");
        }
        let error = KeyDevice::open(Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
