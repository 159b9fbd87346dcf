//! What needs `unsafe`: memory that two processes map, memory that nobody else sees, threads with stacks in it and how they
//! are scheduled, and a few system calls that no library wraps safely. The only place of this crate with `unsafe`.
#![allow(unsafe_code)]

mod region;
mod schedule;
mod secret;
mod thread;

pub use secret::SecretAllocator;

pub(crate) use region::{Part, Parts, Region, View};
pub(crate) use schedule::Schedule;
pub(crate) use secret::{ARENA_BYTES_MIN, SecretMemory, enter_secret_memory};
pub(crate) use thread::spawn;

use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

/// Makes a socket pair's end non-inheritable again or inheritable, for the moment of starting a child.
pub(crate) fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let mut numbers: Vec<u32> =
        keep.iter().filter_map(|descriptor| u32::try_from(descriptor.as_raw_fd()).ok()).collect();
    numbers.sort_unstable();
    let mut first = 0u32;
    for number in numbers.into_iter().chain([u32::MAX]) {
        let last = if number == u32::MAX { u32::MAX } else { number.wrapping_sub(1) };
        if number > first || number == u32::MAX {
            // SAFETY: close_range takes three numbers and touches no memory. What it closes belongs to nobody: the caller
            // runs at the start of a process, before anything of ours has opened a descriptor, and keeps its own.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = number.wrapping_add(1);
    }
}

/// Asks the system to refuse all but what `allowed` lists, on every thread of the process, for ever.
///
/// # Errors
///
/// What the system says.
pub(crate) fn restrict_system_calls(program: &[seccompiler::sock_filter]) -> io::Result<()> {
    seccompiler::apply_filter_all_threads(program).map_err(io::Error::other)
}

/// What becomes of things that are forbidden: tried with arguments that do no harm should they be allowed.
///
/// `pid` is the number of this process. Returns what the system says to each.
pub(crate) fn try_forbidden(call: Forbidden, pid: u32) -> Result<(), Errno> {
    let answer = match call {
        Forbidden::Open => {
            // SAFETY: the path is a constant that ends in a zero byte; opening a directory changes nothing.
            unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), libc::O_RDONLY, 0) }
        }
        Forbidden::Socket => {
            // SAFETY: takes three numbers and touches no memory.
            unsafe { libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0) }
        }
        Forbidden::Ptrace => {
            // SAFETY: PTRACE_TRACEME takes no pointers; allowed, it would let a parent trace us, which then could anyway.
            unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0) }
        }
        Forbidden::Exec => {
            // SAFETY: an empty path names no program, so that even where it is allowed nothing is executed; the two null
            // pointers are what the system takes for empty lists.
            unsafe {
                libc::syscall(libc::SYS_execve, c"".as_ptr(), std::ptr::null::<u8>(), std::ptr::null::<u8>())
            }
        }
        Forbidden::Fork => {
            // SAFETY: an unknown flag combination (CLONE_THREAD without CLONE_SIGHAND) is refused by the system before it
            // makes anything, so no second thread ever runs on this stack.
            unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_THREAD, 0, 0, 0, 0) }
        }
        Forbidden::Priority => {
            let usual: libc::c_int = 0;
            // SAFETY: 0 is the calling thread, which has the usual policy and priority; allowed, it would have them again. The
            // system reads its `struct sched_param`, one int, from where `usual` is.
            unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_OTHER, &raw const usual) }
        }
        Forbidden::Affinity => {
            let all = [u64::MAX; 16];
            // This process itself, by its number: it tells as much as another's would, and the system without the cage allows
            // it to everybody. Allowed, the first thread, which only waits, could wait on any CPU.
            // SAFETY: the system reads as many bytes as it is told from `all`, which has them.
            unsafe { libc::syscall(libc::SYS_sched_setaffinity, pid, size_of_val(&all), all.as_ptr()) }
        }
        Forbidden::ReadOther => {
            // SAFETY: process 1 and no memory ranges at all: nothing is read or written.
            unsafe {
                libc::syscall(
                    libc::SYS_process_vm_readv,
                    1,
                    std::ptr::null::<libc::iovec>(),
                    0,
                    std::ptr::null::<libc::iovec>(),
                    0,
                    0,
                )
            }
        }
    };
    if answer >= 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

/// What an engine process must not be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forbidden {
    Open,
    Socket,
    Ptrace,
    Exec,
    Fork,
    ReadOther,
    Priority,
    Affinity,
}

impl Forbidden {
    pub(crate) const ALL: [Self; 8] = [
        Self::Open,
        Self::Socket,
        Self::Ptrace,
        Self::Exec,
        Self::Fork,
        Self::ReadOther,
        Self::Priority,
        Self::Affinity,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Socket => "socket",
            Self::Ptrace => "ptrace",
            Self::Exec => "exec",
            Self::Fork => "fork",
            Self::ReadOther => "read another process",
            Self::Priority => "change its priority",
            Self::Affinity => "move a process by its number",
        }
    }
}

/// Asks the system to end this process when its parent ends, and not before: the signals by which people and service managers
/// end a server go to all processes of it, and the server still has requests to answer then.
pub(crate) fn end_with_parent() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: ignoring a signal runs no code of ours.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

/// Locks the memory of this process that is mapped and may hold secrets but is not secret memory (stacks, statics), keeps
/// it out of core dumps and out of children. Returns how many bytes could not be locked.
pub(crate) fn guard_ordinary_memory(maps: &str) -> usize {
    let mut unlocked = 0;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let name = words.nth(3).unwrap_or_default();
        let private_and_writable = rights.starts_with("rw") && rights.ends_with('p');
        if !private_and_writable || name.starts_with("[vv") {
            continue;
        }
        let Some((start, end)) = range.split_once('-') else { continue };
        let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) else {
            continue;
        };
        let at = start as *mut libc::c_void;
        let len = end - start;
        // Only what is in use: a stack's reserve is locked as it is touched.
        // SAFETY: the range is a mapping of this process, as the system has just listed it; locking changes no content, and
        // a range that was unmapped meanwhile is refused.
        if unsafe { libc::mlock2(at, len, MLOCK_ONFAULT) } != 0 {
            unlocked += len;
        }
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: as above; neither advice changes content in this process, and it starts no children.
            unsafe { libc::madvise(at, len, advice) };
        }
    }
    unlocked
}

const MLOCK_ONFAULT: libc::c_uint = 1;

/// Whether `descriptor` is a piece of shared memory that nobody can make shorter.
pub(crate) fn has_fixed_length(descriptor: impl AsFd, len_bytes: u64) -> io::Result<bool> {
    let seals = rustix::fs::fcntl_get_seals(&descriptor)?;
    let length = rustix::fs::fstat(&descriptor)?.st_size;
    Ok(seals.contains(rustix::fs::SealFlags::SHRINK)
        && u64::try_from(length).is_ok_and(|len| len >= len_bytes))
}
