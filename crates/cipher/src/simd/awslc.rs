//! AES-256-XTS and AES-128-CBC from AWS-LC, behind two safe types.
//!
//! A [`Context`] is one `EVP_CIPHER_CTX`: one key, one direction, and the IV of the unit that it is working on. That IV
//! makes it useless to two threads at once, so a [`Key`] keeps a few contexts per direction and lends each call one:
//!
//! ```text
//!   call --> the thread's own place --try_lock--> free: use it
//!                                                 taken: the next place ... all taken: wait for the first
//! ```
//!
//! Costs: one uncontended lock per call, none per data unit. A context is made when its place is first used, so
//! that a key set up for nothing costs no key schedule; nothing is allocated after that.

use aws_lc_sys as sys;
use std::alloc::{self, Layout};
use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use zeroize::{Zeroize as _, Zeroizing};

/// Bytes before what an [`allocate`]d block gives out, where its size is noted; what keeps it aligned for anything.
const NOTE_BYTES: usize = 16;

/// From now on, AWS-LC's memory comes from the program's own allocator, and is wiped when it is freed. Without this, contexts lie
/// in the C library's heap, whatever allocator the program has. Says whether it is so; not once AWS-LC has been told something
/// else.
///
/// To be called before AWS-LC is used for the first time: what it has allocated before, it would free with the wrong function.
pub(crate) fn allocate_as_rust_does() -> bool {
    // SAFETY: three functions that keep the bargain of malloc, realloc and free with each other, and never unwind.
    unsafe { sys::CRYPTO_set_mem_functions(Some(allocate), Some(reallocate), Some(free)) == 1 }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(NOTE_BYTES)?, NOTE_BYTES).ok()
}

extern "C" fn allocate(bytes: usize, _file: *const c_char, _line: c_int) -> *mut c_void {
    let Some(layout) = layout(bytes) else { return ptr::null_mut() };
    // SAFETY: not of size zero, since the note is in it.
    let block = unsafe { alloc::alloc(layout) };
    if block.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: the block begins with room for a number, and is aligned for it.
    unsafe { block.cast::<usize>().write(bytes) };
    // SAFETY: the block is NOTE_BYTES longer than what is given out.
    unsafe { block.add(NOTE_BYTES) }.cast()
}

/// How many bytes `allocate` was asked for.
///
/// # Safety
///
/// `at` is what `allocate` gave, and was not freed.
unsafe fn size(at: *mut c_void) -> usize {
    // SAFETY: the caller's promise: the note lies right before it.
    let note = unsafe { at.cast::<u8>().sub(NOTE_BYTES) };
    // SAFETY: written by `allocate`.
    unsafe { note.cast::<usize>().read() }
}

extern "C" fn reallocate(at: *mut c_void, bytes: usize, file: *const c_char, line: c_int) -> *mut c_void {
    let new = allocate(bytes, file, line);
    if at.is_null() || new.is_null() {
        return new;
    }
    // SAFETY: AWS-LC gives back what `allocate` gave it.
    let old = unsafe { size(at) };
    // SAFETY: both are as long as the shorter one, and apart.
    unsafe { ptr::copy_nonoverlapping(at.cast::<u8>(), new.cast::<u8>(), old.min(bytes)) };
    free(at, file, line);
    new
}

extern "C" fn free(at: *mut c_void, _file: *const c_char, _line: c_int) {
    if at.is_null() {
        return;
    }
    // SAFETY: AWS-LC gives back what `allocate` gave it.
    let bytes = unsafe { size(at) };
    // SAFETY: its owner gives up these bytes, which are valid until the deallocation below.
    unsafe { std::slice::from_raw_parts_mut(at.cast::<MaybeUninit<u8>>(), bytes) }.zeroize();
    // SAFETY: the block begins NOTE_BYTES before.
    let block = unsafe { at.cast::<u8>().sub(NOTE_BYTES) };
    let layout = layout(bytes).expect("it was good when it was allocated");
    // SAFETY: allocated with this very layout, and nobody has it any more.
    unsafe { alloc::dealloc(block, layout) };
}

/// What a context computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    /// XTS of IEEE 1619, without ciphertext stealing as used here. 64-byte key.
    Aes256Xts,
    /// CBC without padding. 16-byte key.
    Aes128Cbc,
}

impl Algorithm {
    const fn key_bytes(self) -> usize {
        match self {
            Self::Aes256Xts => 64,
            Self::Aes128Cbc => 16,
        }
    }

    fn evp(self) -> *const sys::EVP_CIPHER {
        match self {
            // SAFETY: takes nothing, and returns a pointer to a constant that lives as long as the program.
            Self::Aes256Xts => unsafe { sys::EVP_aes_256_xts() },
            // SAFETY: as above.
            Self::Aes128Cbc => unsafe { sys::EVP_aes_128_cbc() },
        }
    }
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Encrypt,
    Decrypt,
}

/// A key schedule for one direction, and room for one IV.
pub(crate) struct Context {
    /// Owned: made in `new`, freed in `drop`, never handed out.
    evp: NonNull<sys::EVP_CIPHER_CTX>,
}

// SAFETY: an EVP_CIPHER_CTX is plain memory that belongs to its owner; AWS-LC keeps no thread-local state about it.
unsafe impl Send for Context {}

impl Context {
    /// Expands `key`.
    ///
    /// # Panics
    ///
    /// If `key` has not the algorithm's length, if the halves of an XTS key are equal, or if there is no memory.
    pub(crate) fn new(algorithm: Algorithm, direction: Direction, key: &[u8]) -> Self {
        assert_eq!(key.len(), algorithm.key_bytes(), "a key of the algorithm's length");
        // SAFETY: takes nothing; null, its sign of failure, is handled below.
        let evp = unsafe { sys::EVP_CIPHER_CTX_new() };
        let context = Self { evp: NonNull::new(evp).expect("memory for a cipher context") };
        let enc = match direction {
            Direction::Encrypt => 1,
            Direction::Decrypt => 0,
        };
        // SAFETY:
        // - `context.evp` is live and ours alone;
        // - `evp()` is a live constant; a null engine means the built-in one;
        // - `key` points to as many bytes as the algorithm reads, asserted on top;
        // - a null IV means that it is set later, which `crypt` does before each use.
        let done = unsafe {
            sys::EVP_CipherInit_ex(
                context.evp.as_ptr(),
                algorithm.evp(),
                ptr::null_mut(),
                key.as_ptr(),
                ptr::null(),
                enc,
            )
        };
        assert_eq!(done, 1, "AWS-LC accepts every key of this length, but an XTS key with equal halves");
        context
    }

    /// Transforms one data unit in place. For CBC and XTS alike `unit` is a whole number of 16-byte blocks.
    ///
    /// # Panics
    ///
    /// If it is not, or if it is longer than 2^20 blocks for XTS.
    #[inline]
    pub(crate) fn crypt(&mut self, iv: &[u8; 16], unit: &mut [u8]) {
        assert!(!unit.is_empty() && unit.len().is_multiple_of(16), "whole blocks");
        // SAFETY:
        // - `self.evp` is live, and `&mut self` makes it ours alone;
        // - null cipher, engine and key leave those as `new` set them; -1 leaves the direction;
        // - both algorithms read 16 bytes of IV, and copy them.
        let done = unsafe {
            sys::EVP_CipherInit_ex(
                self.evp.as_ptr(),
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                iv.as_ptr(),
                -1,
            )
        };
        assert_eq!(done, 1, "AWS-LC takes a new IV for a context that has its key");
        let data = unit.as_mut_ptr();
        // SAFETY:
        // - `self.evp` is live and ours alone, with key (from `new`) and IV (from above) set;
        // - input and output are the same `unit.len()` writable bytes, which AWS-LC allows (in place, exact overlap);
        // - it writes no more than it reads: XTS keeps the length, and CBC through `EVP_Cipher` neither pads nor buffers.
        let done = unsafe { sys::EVP_Cipher(self.evp.as_ptr(), data, data, unit.len()) };
        assert_eq!(done, 1, "AWS-LC takes whole blocks, up to 2^20 of them");
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `self.evp` came from `EVP_CIPHER_CTX_new` and is not used again. AWS-LC wipes the schedule as it frees it.
        unsafe { sys::EVP_CIPHER_CTX_free(self.evp.as_ptr()) }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// Contexts per key and direction: how many threads can use one key in one direction without waiting for each other.
/// A power of two. Eight is more than one disk has submitters at a time on the machines we know.
const PLACES: usize = 8;

/// One context, made at its first use. On a cache line of its own, so that threads do not slow each other.
#[derive(Default)]
#[repr(align(64))]
struct Place(Mutex<Option<Context>>);

/// An AES key that several threads can use at once.
pub(crate) struct Key<const KEY_BYTES: usize> {
    algorithm: Algorithm,
    /// Kept, because a context for a further thread is made when that thread first comes. Boxed, so that moving the key
    /// leaves no copy behind.
    bytes: Box<Zeroizing<[u8; KEY_BYTES]>>,
    encrypting: [Place; PLACES],
    decrypting: [Place; PLACES],
}

impl<const KEY_BYTES: usize> Key<KEY_BYTES> {
    /// Takes `key`; the schedule follows at the first use.
    ///
    /// # Panics
    ///
    /// If `key` has not the algorithm's length.
    pub(crate) fn new(algorithm: Algorithm, key: &[u8]) -> Self {
        assert_eq!(KEY_BYTES, algorithm.key_bytes(), "a key type of the algorithm's length");
        let mut bytes = Box::new(Zeroizing::new([0; KEY_BYTES]));
        bytes.copy_from_slice(key);
        Self { algorithm, bytes, encrypting: Default::default(), decrypting: Default::default() }
    }

    /// Calls `work` with a context that no other thread is using.
    pub(crate) fn with<R>(&self, direction: Direction, work: impl FnOnce(&mut Context) -> R) -> R {
        let places = match direction {
            Direction::Encrypt => &self.encrypting,
            Direction::Decrypt => &self.decrypting,
        };
        let mut place = lend(places);
        work(place.get_or_insert_with(|| Context::new(self.algorithm, direction, &**self.bytes)))
    }
}

impl<const KEY_BYTES: usize> fmt::Debug for Key<KEY_BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { algorithm, bytes: _, encrypting: _, decrypting: _ } = self;
        f.debug_struct("Key").field("algorithm", algorithm).finish_non_exhaustive()
    }
}

/// The first free place from the thread's own on; if there is none, waits for the thread's own.
///
/// A poisoned place is as good as any: a context carries nothing from one unit to the next.
fn lend(places: &[Place; PLACES]) -> MutexGuard<'_, Option<Context>> {
    let own = own_place();
    for step in 0..PLACES {
        match places[(own + step) % PLACES].0.try_lock() {
            Ok(guard) => return guard,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => {}
        }
    }
    places[own % PLACES].0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that differs between the first [`PLACES`] threads, and is spread evenly over further ones.
fn own_place() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<Option<usize>> = const { Cell::new(None) };
    }
    OWN.with(|own| {
        own.get().unwrap_or_else(|| {
            let place = NEXT.fetch_add(1, Ordering::Relaxed) % PLACES;
            own.set(Some(place));
            place
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "equal halves")]
    fn the_library_too_refuses_equal_halves() {
        drop(Context::new(Algorithm::Aes256Xts, Direction::Encrypt, &[7; 64]));
    }

    #[test]
    #[should_panic(expected = "algorithm's length")]
    fn a_short_key_never_reaches_the_library() {
        drop(Context::new(Algorithm::Aes128Cbc, Direction::Encrypt, &[7; 15]));
    }

    #[test]
    #[should_panic(expected = "whole blocks")]
    fn part_of_a_block_never_reaches_the_library() {
        Context::new(Algorithm::Aes128Cbc, Direction::Encrypt, &[7; 16]).crypt(&[0; 16], &mut [0; 17]);
    }

    #[test]
    fn a_thread_waits_when_every_place_is_taken() {
        let key = Key::<16>::new(Algorithm::Aes128Cbc, &[7; 16]);
        let mut expected = [1; 32];
        key.with(Direction::Encrypt, |context| context.crypt(&[0; 16], &mut expected));
        let held: Vec<_> = key.encrypting.iter().map(|place| place.0.lock().unwrap()).collect();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut data = [1; 32];
                key.with(Direction::Encrypt, |context| context.crypt(&[0; 16], &mut data));
                data
            });
            // Decryption has places of its own, so it goes ahead.
            let mut data = expected;
            key.with(Direction::Decrypt, |context| context.crypt(&[0; 16], &mut data));
            assert_eq!(data, [1; 32]);
            drop(held);
            assert_eq!(waiting.join().unwrap(), expected);
        });
    }
}
