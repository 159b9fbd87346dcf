//! Several transfers between a file and memory at once, through io_uring: for media that wait, where one after the other would
//! wait for each.
//!
//! Each thread has a ring of its own, made when it first needs one. A system without io_uring, or that forbids it, is asked once.

use inlinecrypt_core::backing::Part;
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Transfers that are under way at once, at most.
pub(crate) const TOGETHER_MAX: usize = 64;

/// Whether there is io_uring here, as far as is known.
static IS_THERE: AtomicBool = AtomicBool::new(true);

thread_local! {
    static RING: RefCell<Option<IoUring>> = const { RefCell::new(None) };
}

/// The memory of transfers, and which way they go.
#[derive(Debug)]
pub(crate) enum Memory<'m> {
    /// From the file into it.
    Read(&'m mut [u8]),
    /// From it to the file.
    Write(&'m [u8]),
}

/// How many bytes were moved, or why none.
pub(crate) type Moved = Result<usize, Errno>;

/// Some of as many as [`TOGETHER_MAX`] parts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Which(u64);

const _: () = assert!(TOGETHER_MAX == u64::BITS as usize);

impl Which {
    /// The first `count`.
    pub(crate) fn first(count: usize) -> Self {
        let none_left = u32::try_from(TOGETHER_MAX - count).expect("the caller cuts them");
        Self(u64::MAX.checked_shr(none_left).unwrap_or(0))
    }

    /// And the one of this `index`.
    pub(crate) fn add(&mut self, index: usize) {
        self.0 |= 1 << index;
    }

    pub(crate) fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    fn has(self, index: usize) -> bool {
        self.0 >> index & 1 == 1
    }
}

/// Does those `parts` at once that `which` names, and tells in `moved` of each how it went. `false`, and nothing was moved nor
/// told, if it cannot.
///
/// # Panics
///
/// If there are more than [`TOGETHER_MAX`] parts, or one lies outside the memory.
pub(crate) fn transfer_together(
    file: BorrowedFd<'_>,
    memory: &mut Memory<'_>,
    parts: &[Part],
    which: Which,
    moved: &mut [Moved; TOGETHER_MAX],
) -> bool {
    assert!(parts.len() <= TOGETHER_MAX, "the caller cuts them");
    if !IS_THERE.load(Ordering::Relaxed) {
        return false;
    }
    RING.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = try_make();
        }
        let Some(ring) = slot else { return false };
        let are_done = run(ring, file, memory, parts, which, moved);
        if !are_done {
            // Forbidden, or broken: from now on all goes the plain way.
            IS_THERE.store(false, Ordering::Relaxed);
            *slot = None;
        }
        are_done
    })
}

/// Whether [`transfer_together`] can, as far as is known: the first to ask makes a ring to find out.
pub(crate) fn can_transfer_together() -> bool {
    static ASKED: Once = Once::new();
    ASKED.call_once(|| drop(try_make()));
    IS_THERE.load(Ordering::Relaxed)
}

/// A ring for this thread. `None` for want of descriptors, or if there is no io_uring here, and then nobody tries again.
fn try_make() -> Option<IoUring> {
    match make() {
        Ok(ring) => Some(ring),
        // Another time, perhaps.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => None,
        Err(_) => {
            IS_THERE.store(false, Ordering::Relaxed);
            None
        }
    }
}

fn make() -> io::Result<IoUring> {
    let entries = u32::try_from(TOGETHER_MAX).expect("64");
    // In this way only the thread that waits works on completions; older kernels do not know it.
    let quick = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries);
    quick.or_else(|_| IoUring::new(entries))
}

fn run(
    ring: &mut IoUring,
    file: BorrowedFd<'_>,
    memory: &mut Memory<'_>,
    parts: &[Part],
    which: Which,
    moved: &mut [Moved; TOGETHER_MAX],
) -> bool {
    let file = types::Fd(file.as_raw_fd());
    for (index, Part { offset, range, .. }) in parts.iter().enumerate().filter(|(index, _)| which.has(*index))
    {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("buffers are far smaller");
        let entry = match memory {
            Memory::Read(memory) => {
                let bytes = &mut memory[range.clone()];
                opcode::Read::new(file, bytes.as_mut_ptr(), length(bytes)).offset(*offset).build()
            }
            Memory::Write(memory) => {
                let bytes = &memory[range.clone()];
                opcode::Write::new(file, bytes.as_ptr(), length(bytes)).offset(*offset).build()
            }
        };
        // SAFETY:
        // - the bytes lie in `memory`, which is borrowed for this call and used by nobody else meanwhile, and the call does
        //   not return before the kernel has told of every entry that it took (`wait_for_all`);
        // - nor does it unwind: what may panic in between would be a bug of ours, and aborts (`AbortOnUnwind`);
        // - the file stays open, borrowed likewise.
        let pushed = unsafe { ring.submission().push(&entry.user_data(index as u64)) };
        assert!(pushed.is_ok(), "the ring was empty and has room for all");
    }
    wait_for_all(ring, which.count(), moved)
}

/// Submits all `count` entries and waits until the kernel has told of each. `false` if it took none of them.
fn wait_for_all(ring: &mut IoUring, count: usize, moved: &mut [Moved]) -> bool {
    let guard = AbortOnUnwind;
    let mut left = count;
    let mut is_taken = false;
    while left > 0 {
        let submitted = ring.submit_and_wait(left);
        is_taken |= ring.submission().len() < count;
        if let Err(error) = submitted
            && !is_taken
            && error.kind() != std::io::ErrorKind::Interrupted
        {
            break;
        }
        for entry in ring.completion() {
            moved[usize::try_from(entry.user_data()).expect("an index")] = match entry.result() {
                bytes @ 0.. => Ok(usize::try_from(bytes).expect("not negative")),
                errno => Err(Errno::from_raw_os_error(-errno)),
            };
            left -= 1;
        }
    }
    std::mem::forget(guard);
    left == 0
}

/// Ends the process rather than let memory go that the kernel may still use.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    fn part(index: u64, at: usize) -> Part {
        Part { offset: index * 512, range: at..at + 512, result: Ok(()) }
    }

    #[test]
    fn many_transfers_go_together_and_each_is_told_of() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (1..=64u8).flat_map(|index| [index; 512]).collect();
        let parts: Vec<_> =
            (0..64).rev().map(|index| part(index, usize::try_from(index).unwrap() * 512)).collect();
        let mut moved = [Ok(0); TOGETHER_MAX];
        let mut memory = Memory::Write(&content);
        if !transfer_together(file.as_fd(), &mut memory, &parts, Which::first(64), &mut moved) {
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no io_uring here");
            return;
        }
        assert_eq!(moved, [Ok(512); 64]);
        let mut whole = Vec::new();
        file.read_to_end(&mut whole).unwrap();
        assert!(whole == content, "written where they belong");

        // The last one, and one beyond the end, to which nothing is moved.
        let mut memory = vec![0; 1536];
        let parts = [part(63, 0), part(7, 512), part(64, 1024)];
        let mut which = Which::default();
        which.add(0);
        which.add(2);
        assert_eq!(which.count(), 2);
        let mut moved = [Ok(1); TOGETHER_MAX];
        assert!(transfer_together(file.as_fd(), &mut Memory::Read(&mut memory), &parts, which, &mut moved));
        assert_eq!(moved[..3], [Ok(512), Ok(1), Ok(0)], "the one in the middle was not asked for");
        assert_eq!((&memory[..512], &memory[512..]), (&[64; 512][..], &[0; 1024][..]));
    }

    #[test]
    fn the_first_of_parts_are_counted() {
        for count in [0, 1, 2, 63, 64] {
            let which = Which::first(count);
            assert_eq!(which.count(), count);
            assert!((0..64).all(|index| which.has(index) == (index < count)));
        }
    }

    #[test]
    fn an_error_is_told_to_the_transfer_that_has_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = std::fs::File::open(file.path()).unwrap();
        let mut moved = [Ok(0); TOGETHER_MAX];
        let mut memory = Memory::Write(&[1; 512]);
        let are_done =
            transfer_together(read_only.as_fd(), &mut memory, &[part(0, 0)], Which::first(1), &mut moved);
        assert!(!are_done || moved[0] == Err(Errno::BADF));
    }
}
