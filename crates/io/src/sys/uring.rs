//! Several transfers between a file and memory at once, through io_uring: for media that wait, where one after the other would
//! wait for each.
//!
//! Each thread has a ring of its own, made when it first needs one. A system without io_uring, or that forbids it, is asked once.

use inlinecrypt_core::backing::Part;
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use std::cell::RefCell;
use std::os::fd::{AsRawFd as _, BorrowedFd};
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

/// Does all `parts` at once and tells of each how it went. `None`, and nothing was moved, if it cannot.
///
/// # Panics
///
/// If there are more than [`TOGETHER_MAX`] parts, or one lies outside the memory.
pub(crate) fn transfer_together(
    file: BorrowedFd<'_>,
    memory: &mut Memory<'_>,
    parts: &[Part],
) -> Option<[Moved; TOGETHER_MAX]> {
    assert!(parts.len() <= TOGETHER_MAX, "the caller cuts them");
    if !IS_THERE.load(Ordering::Relaxed) {
        return None;
    }
    RING.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = make();
        }
        let moved = slot.as_mut().and_then(|ring| run(ring, file, memory, parts));
        if moved.is_none() {
            // Forbidden, or broken: from now on all goes the plain way.
            IS_THERE.store(false, Ordering::Relaxed);
            *slot = None;
        }
        moved
    })
}

fn make() -> Option<IoUring> {
    let entries = u32::try_from(TOGETHER_MAX).expect("64");
    // In this way only the thread that waits works on completions; older kernels do not know it.
    let quick = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries);
    quick.or_else(|_| IoUring::new(entries)).ok()
}

fn run(
    ring: &mut IoUring,
    file: BorrowedFd<'_>,
    memory: &mut Memory<'_>,
    parts: &[Part],
) -> Option<[Moved; TOGETHER_MAX]> {
    let mut moved = [Ok(0); TOGETHER_MAX];
    let file = types::Fd(file.as_raw_fd());
    for (index, Part { offset, range, .. }) in parts.iter().enumerate() {
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
    wait_for_all(ring, parts.len(), &mut moved).then_some(moved)
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
        let Some(moved) = transfer_together(file.as_fd(), &mut Memory::Write(&content), &parts) else {
            let _ = writeln!(std::io::stderr(), "SKIPPED: there is no io_uring here");
            return;
        };
        assert_eq!(moved, [Ok(512); 64]);
        let mut whole = Vec::new();
        file.read_to_end(&mut whole).unwrap();
        assert!(whole == content, "written where they belong");

        // The last one, and one beyond the end, to which nothing is moved.
        let mut memory = vec![0; 1024];
        let parts = [part(63, 0), part(64, 512)];
        let moved = transfer_together(file.as_fd(), &mut Memory::Read(&mut memory), &parts).unwrap();
        assert_eq!(moved[..2], [Ok(512), Ok(0)]);
        assert_eq!((&memory[..512], &memory[512..]), (&[64; 512][..], &[0; 512][..]));
    }

    #[test]
    fn an_error_is_told_to_the_transfer_that_has_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = std::fs::File::open(file.path()).unwrap();
        let moved = transfer_together(read_only.as_fd(), &mut Memory::Write(&[1; 512]), &[part(0, 0)]);
        assert!(moved.is_none_or(|moved| moved[0] == Err(Errno::BADF)));
    }
}
