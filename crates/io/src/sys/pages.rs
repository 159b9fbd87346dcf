//! Memory that others are lent to read.

use rustix::io::Errno;
use rustix::pipe::{IoSliceRaw, SpliceFlags};
use std::os::fd::{AsFd, BorrowedFd};

/// Puts the pages of `bytes` into a pipe, as far as it has room, and returns how many bytes that were (vmsplice(2)). Waits for
/// room for the first.
///
/// Whoever reads the pipe, or what the pages go on into, sees what is in them then: do not change them before. They may be
/// unmapped, though, since the pipe holds the pages themselves.
pub(crate) fn put_pages(pipe: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    let part = IoSliceRaw::from_slice(bytes);
    // SAFETY: the kernel reads `bytes`, which is borrowed during the call; afterwards it holds pages, not addresses. Without
    // SPLICE_F_GIFT nobody can write to them through the pipe.
    unsafe { rustix::pipe::vmsplice(pipe, &[part], SpliceFlags::empty()) }
}

/// `SIOCOUTQ` of `include/uapi/linux/sockios.h`, which is `TIOCOUTQ`: writes an int through its pointer.
#[expect(clippy::cast_possible_truncation, reason = "request numbers have 32 bits")]
const SIOCOUTQ: rustix::ioctl::Opcode = libc::TIOCOUTQ as rustix::ioctl::Opcode;

/// At most how many bytes the other end of a Unix socket has not read yet: what the kernel counts for them, which is more
/// than they are (unix(7); `unix_outq_len` of `net/unix/af_unix.c`).
pub(crate) fn unread_bytes(socket: impl AsFd) -> Result<u64, Errno> {
    // SAFETY: SIOCOUTQ of a socket writes an int, and every int is valid.
    let request = unsafe { rustix::ioctl::Getter::<SIOCOUTQ, i32>::new() };
    // SAFETY: the opcode and what it writes belong together; on what is no socket the number asks a terminal for the same.
    let count = unsafe { rustix::ioctl::ioctl(socket, request) }?;
    Ok(u64::try_from(count).unwrap_or(u64::MAX))
}
