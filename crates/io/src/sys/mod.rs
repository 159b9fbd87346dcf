//! The few system calls that no library wraps safely. The only place of this crate with `unsafe`.
#![allow(unsafe_code)]

pub(crate) mod blk_crypto;
mod pages;
mod turn;
mod uring;

pub(crate) use pages::{put_pages, unread_bytes};
pub(crate) use turn::{let_waker_finish, take_turn_at_once};
pub(crate) use uring::{Memory, Moved, TOGETHER_MAX, Which, can_transfer_together, transfer_together};

use rustix::io::Errno;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// `BLKDISCARD` of `include/uapi/linux/fs.h`: `_IO(0x12, 119)`, with a pointer to offset and length in bytes.
const BLKDISCARD: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 119);

/// Discards a range of a block device. Both numbers must be multiples of its logical sector.
pub(crate) fn discard_blocks(device: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Errno> {
    // SAFETY: BLKDISCARD reads two u64 through its pointer, and [u64; 2] is just that.
    let request = unsafe { rustix::ioctl::Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]) };
    // SAFETY:
    // - the opcode and what it reads belong together, see above;
    // - it writes no memory of ours, and `device` stays open during the call;
    // - on anything but a block device the number 0x12/119 is unknown and the kernel refuses it.
    unsafe { rustix::ioctl::ioctl(device, request) }
}

/// Who is at the other end of a Unix socket, or who listens there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// The process, unless it lives in a process namespace that we cannot see.
    pub(crate) pid: Option<NonZeroU32>,
    /// Its user.
    pub(crate) uid: u32,
}

/// Asks for the peer of a Unix socket (`SO_PEERCRED`).
///
/// Not `rustix`'s, whose process id cannot be 0; but it is 0 where the peer's process namespace is not ours.
pub(crate) fn peer_credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let mut answer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len_bytes: libc::socklen_t = size_of::<libc::ucred>().try_into().expect("twelve");
    // SAFETY:
    // - `answer` is a live `ucred`, which SO_PEERCRED fills, and any integers in it are valid;
    // - `len_bytes` says how long it is and is writable; the kernel never writes more than that;
    // - the descriptor stays open during the call, borrowed from `socket`.
    let status = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut answer).cast(),
            &raw mut len_bytes,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(answer.pid).ok().and_then(NonZeroU32::new);
    Ok(Credentials { pid, uid: answer.uid })
}

/// Lets [`interrupt`] end the waiting of a thread.
pub(crate) fn be_interruptible() -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: all fields of `sigaction` are integers or an optional function, for which zero is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // Without SA_RESTART: what waits shall return.
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY:
    // - `action` lives during the call and is only read; the former action is not asked for;
    // - the handler does nothing at all, so it may run at any moment on any thread;
    // - SIGURG is ignored by default, and nothing of ours asks for the urgent data that it tells of.
    match unsafe { libc::sigaction(libc::SIGURG, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes a system call in which a thread of this process waits return `EINTR`. Who is just about to wait is missed.
pub(crate) fn interrupt(thread: rustix::thread::Pid) {
    // SAFETY: takes three numbers and touches no memory. Only threads of this very process are reached, whose handler, see
    // above, does nothing; a thread that has gone is not found.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            libc::pid_t::from(rustix::process::getpid().as_raw_nonzero().get()),
            thread.as_raw_nonzero().get(),
            libc::SIGURG,
        );
    }
}

/// The descriptors that the service manager has handed over, with their names; from the second call on, none.
pub(crate) fn handed_over() -> io::Result<Vec<(OwnedFd, String)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    // Checks that they were meant for this process, and that each is open.
    let given = sd_notify::listen_fds_with_names()?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let own = |(descriptor, name)| {
        // SAFETY:
        // - open: `listen_fds_with_names` has just set its close-on-exec flag, which fails for others;
        // - ours alone: by `sd_listen_fds(3)` the parent made it for this process to own, and nothing of ours opens 3 and
        //   what follows, as they were open at the start; TAKEN sees to it that it is owned once.
        let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
        (owned, name)
    };
    Ok(given.map(own).collect())
}
