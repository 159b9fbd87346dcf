//! Secret memory: the heap of an engine process.
//!
//! Until [`enter_secret_memory`] is called, [`SecretAllocator`] is the system's allocator. From then on, every allocation of
//! the process comes from one arena that no other process sees (`memfd_secret(2)`: its pages are not even in the kernel's own
//! map of memory), or, where the kernel has no such thing, that is at least locked and left out of dumps and children. So
//! whatever any code expands from a key, it lies there. What is freed is wiped.

use dlmalloc::{Allocator, Dlmalloc};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Least arena that an engine can work in, in bytes: the stacks of as many threads as it usually has, and some heap.
pub(crate) const ARENA_BYTES_MIN: usize = 4 << 20;

/// What keeps the heap of an engine process from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SecretMemory {
    /// `memfd_secret(2)`: locked, in no dump, and reachable by no other process, not even by root's debugger.
    Secret { bytes: usize },
    /// Locked, and in no dump; whoever may debug the process can read it.
    Locked { bytes: usize },
    /// In no dump, and not even locked: it may be swapped out.
    Unlocked { bytes: usize },
}

impl fmt::Display for SecretMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &usize| bytes >> 20;
        match self {
            Self::Secret { bytes } => {
                write!(f, "heap and stacks in secret memory (memfd_secret, {} MiB)", mib(bytes))
            }
            Self::Locked { bytes } => {
                write!(
                    f,
                    "heap and stacks in locked memory ({} MiB): no memfd_secret, for lack of it or by RLIMIT_MEMLOCK",
                    mib(bytes)
                )
            }
            Self::Unlocked { bytes } => write!(
                f,
                "heap and stacks in ordinary memory ({} MiB): neither memfd_secret nor locking, for lack of them or by \
                 RLIMIT_MEMLOCK",
                mib(bytes)
            ),
        }
    }
}

static ENTERED: AtomicBool = AtomicBool::new(false);
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(0);
/// Allocations from this size on, in bytes, get a mapping of their own, left out of dumps and children: what opening a root with a
/// passphrase computes in is larger than what many systems allow to lock. It is wiped, too, and gone in a moment.
const LARGE_BYTES: usize = 4 << 20;
/// Where those begin. More at once come from the arena.
static LARGE: [AtomicUsize; 16] = [const { AtomicUsize::new(0) }; 16];

static HEAP: Mutex<Dlmalloc<Arena>> = Mutex::new(Dlmalloc::new_with_allocator(Arena));

/// The arena, page by page, for dlmalloc.
struct Arena;

// SAFETY:
// - what `alloc` returns is a part of the arena, which is mapped for good, and it gives out each part once (one atomic
//   addition under HEAP's lock);
// - nothing is remapped, shrunk or freed, and it says so;
// - the arena is zeroed by the system, and no part is given out twice.
unsafe impl Allocator for Arena {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let refused = (ptr::null_mut(), 0, 0);
        let Some(size) = size.checked_next_multiple_of(self.page_size()) else { return refused };
        let at = NEXT.load(Ordering::Relaxed);
        if size > END.load(Ordering::Relaxed) - at {
            return refused;
        }
        NEXT.store(at + size, Ordering::Relaxed);
        (at as *mut u8, size, 0)
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }

    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    fn can_release_part(&self, _: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        4096
    }
}

/// The allocator of a program that may become an engine process: the system's, until that is so.
#[derive(Debug)]
pub struct SecretAllocator;

// SAFETY:
// - memory comes from dlmalloc or from the system, both of which keep GlobalAlloc's contract, and goes back to the one it came
//   from, told by its address;
// - dlmalloc is called under HEAP's lock, which allocates nothing, and no code that runs under it does.
unsafe impl GlobalAlloc for SecretAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !ENTERED.load(Ordering::Relaxed) {
            // SAFETY: the caller's promise about `layout` is passed on.
            return unsafe { System.alloc(layout) };
        }
        if layout.size() >= LARGE_BYTES
            && layout.align() <= 4096
            && let Some(at) = map_large(layout.size())
        {
            return at;
        }
        let mut heap = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: as above; the heap is ours while locked.
        unsafe { heap.malloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let large = (layout.size() >= LARGE_BYTES)
            .then(|| LARGE.iter().find(|it| it.load(Ordering::SeqCst) == at.addr()));
        if let Some(Some(place)) = large {
            // SAFETY: our own mapping of this size, as LARGE says, which its owner gives up. The system clears pages before anybody
            // else gets them.
            unsafe { libc::munmap(at.cast(), layout.size()) };
            return place.store(0, Ordering::SeqCst);
        }
        if !is_secret(at) {
            // SAFETY: not from the arena, so the system gave it; the caller's promise is passed on.
            return unsafe { System.dealloc(at, layout) };
        }
        for offset in 0..layout.size() {
            // SAFETY: inside the allocation.
            let byte = unsafe { at.add(offset) };
            // SAFETY: the caller owned these bytes until this call, and gives them up with it. Volatile, so that wiping is not
            // left out as useless.
            unsafe { byte.write_volatile(0) };
        }
        let mut heap = HEAP.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: from the arena, so dlmalloc gave it, with this size and alignment.
        unsafe { heap.free(at, layout.size(), layout.align()) }
    }
    // `realloc` is the default: allocate, copy, free, so that what was moved away is wiped.
}

/// A mapping for one large allocation, if there is a place to note it.
fn map_large(bytes: usize) -> Option<*mut u8> {
    let taken = |it: &&AtomicUsize| it.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    let place = LARGE.iter().find(taken)?;
    let Ok(at) = map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1) else {
        place.store(0, Ordering::SeqCst);
        return None;
    };
    for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: our own mapping, just made; neither advice changes its content.
        unsafe { libc::madvise(at.cast(), bytes, advice) };
    }
    place.store(at.addr(), Ordering::SeqCst);
    Some(at)
}

fn is_secret(at: *mut u8) -> bool {
    (START.load(Ordering::Relaxed)..END.load(Ordering::Relaxed)).contains(&at.addr())
}

/// From now on, all memory of this process that is not a stack comes from a new arena of `wanted_bytes`, or of as much as the
/// system allows to lock. To be called once, by a process's only thread, if its allocator is a [`SecretAllocator`].
///
/// # Errors
///
/// What the system says, if there is no memory at all.
///
/// # Panics
///
/// If it is called twice.
pub(crate) fn enter_secret_memory(wanted_bytes: usize) -> io::Result<SecretMemory> {
    assert!(!ENTERED.load(Ordering::Relaxed), "entered once");
    let mut bytes = wanted_bytes.next_power_of_two().max(ARENA_BYTES_MIN);
    let mut found = None;
    while found.is_none() && bytes >= ARENA_BYTES_MIN {
        found = map_secret(bytes).ok().map(|at| (at, SecretMemory::Secret { bytes }));
        if found.is_none() {
            bytes /= 2;
        }
    }
    let (at, kind) = match found {
        Some(found) => found,
        None => map_ordinary(wanted_bytes.next_power_of_two().max(ARENA_BYTES_MIN))?,
    };
    let (SecretMemory::Secret { bytes } | SecretMemory::Locked { bytes } | SecretMemory::Unlocked { bytes }) =
        kind;
    NEXT.store(at.addr(), Ordering::Relaxed);
    START.store(at.addr(), Ordering::Relaxed);
    END.store(at.addr() + bytes, Ordering::Relaxed);
    ENTERED.store(true, Ordering::SeqCst);
    Ok(kind)
}

fn map_secret(bytes: usize) -> io::Result<*mut u8> {
    // SAFETY: takes one number; what it returns is a descriptor or an error.
    let number = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let number =
        i32::try_from(number).ok().filter(|number| *number >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the system has just made it for us, and nobody else knows of it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::fs::ftruncate(&descriptor, bytes as u64)?;
    map(bytes, libc::MAP_SHARED, descriptor.as_raw_fd())
}

/// Memory with as much of what `memfd_secret` gives as there is.
fn map_ordinary(wanted_bytes: usize) -> io::Result<(*mut u8, SecretMemory)> {
    let mut bytes = wanted_bytes;
    while bytes >= ARENA_BYTES_MIN {
        let at = map_undumped(bytes)?;
        // SAFETY: our own mapping, just made, whose content this does not change.
        if unsafe { libc::mlock(at.cast(), bytes) } == 0 {
            return Ok((at, SecretMemory::Locked { bytes }));
        }
        // SAFETY: our own mapping, which nobody uses.
        unsafe { libc::munmap(at.cast(), bytes) };
        bytes /= 2;
    }
    // Less of it would not be locked either.
    Ok((map_undumped(wanted_bytes)?, SecretMemory::Unlocked { bytes: wanted_bytes }))
}

/// Memory that is in no dump and no child.
fn map_undumped(bytes: usize) -> io::Result<*mut u8> {
    let at = map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    // SAFETY: our own mapping, just made; neither call changes its content.
    unsafe { libc::madvise(at.cast(), bytes, libc::MADV_DONTDUMP) };
    // SAFETY: as above.
    unsafe { libc::madvise(at.cast(), bytes, libc::MADV_DONTFORK) };
    Ok(at)
}

fn map(bytes: usize, flags: libc::c_int, descriptor: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: a new mapping at a place of the system's choice touches no memory of ours.
    let at = unsafe {
        libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, descriptor, 0)
    };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}
