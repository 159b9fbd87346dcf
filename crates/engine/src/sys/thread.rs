//! Threads whose stacks come from the allocator: in an engine process, from secret memory.

use std::alloc::{Layout, alloc_zeroed};
use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// Starts a thread that runs `work` on a stack of `stack_bytes` from the program's allocator. It is never joined, and its stack
/// is never freed: for threads that last as long as their process.
///
/// # Errors
///
/// What the system says.
pub(crate) fn spawn(stack_bytes: usize, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
    let layout = Layout::from_size_align(stack_bytes, 4096).map_err(io::Error::other)?;
    // SAFETY: the layout is not of size zero, which the system's least stack forbids as well.
    let stack = unsafe { alloc_zeroed(layout) };
    if stack.is_null() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: fills what it is given, and fails only for lack of memory.
    check(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
    // SAFETY: initialised just now. The stack is ours, aligned, and nobody else's from now on.
    check(unsafe { libc::pthread_attr_setstack(attributes.as_mut_ptr(), stack.cast(), stack_bytes) })?;
    // SAFETY: initialised above.
    check(unsafe {
        libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED)
    })?;
    let work = Box::into_raw(Box::new(work));
    let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
    // SAFETY: initialised attributes, room for a handle, and a function that takes what it is given, once.
    let status = unsafe { libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), run, work.cast()) };
    // SAFETY: initialised above, and not used again.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    if status != 0 {
        // SAFETY: no thread was made, so the box is still ours.
        drop(unsafe { Box::from_raw(work) });
    }
    check(status)
}

extern "C" fn run(work: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: made by `spawn` from a box of this type, for this one call.
    let work = unsafe { Box::from_raw(work.cast::<Box<dyn FnOnce() + Send>>()) };
    work();
    ptr::null_mut()
}

fn check(status: libc::c_int) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) }
}
