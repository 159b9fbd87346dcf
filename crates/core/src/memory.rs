//! Memory for data on its way through an engine, and the bounded pool that it comes from.
//!
//! An engine may live in another process and reach only memory that both have mapped. So nobody hands an engine a slice
//! of his own: buffers come from the engine's [`MemorySource`]. A [`MemoryPool`] keeps a bounded number of large ones for
//! all volumes of an engine; who finds it exhausted goes on with a small one of his own, so exhaustion costs speed and
//! nothing else, and a client that stalls in mid-request cannot keep others from their work.

use crate::error::{Error, ErrorKind, Op};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, thread_number};
use memmap2::MmapMut;
use std::fmt;
use std::sync::Arc;

/// Alignment of every buffer in bytes: what direct I/O to any disk asks for.
pub const ALIGN_BYTES: usize = 4096;

/// At how many places threads begin to look for a buffer: more of them keep threads apart, and more memory warm.
const FIRSTS: usize = 4;

/// A piece of memory that an engine can reach.
///
/// Its pages hold nothing else, and go back to the system when it is dropped: others may have been lent them, to read.
pub trait Memory: fmt::Debug + Send {
    /// The bytes. Aligned to [`ALIGN_BYTES`].
    fn bytes(&self) -> &[u8];

    /// The bytes, to be changed.
    fn bytes_mut(&mut self) -> &mut [u8];

    /// Where the memory begins in what the engine has mapped, in bytes. Engines in this process do not ask.
    fn mapped_at(&self) -> u64;
}

/// Where memory comes from that an engine can reach.
pub trait MemorySource: fmt::Debug + Send + Sync {
    /// Zeroed memory of `len_bytes`, aligned to [`ALIGN_BYTES`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfMemory`].
    fn allocate(&self, len_bytes: usize) -> Result<Box<dyn Memory>, Error>;
}

/// Memory of this process, for engines that live in it.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeapSource;

impl MemorySource for HeapSource {
    fn allocate(&self, len_bytes: usize) -> Result<Box<dyn Memory>, Error> {
        Ok(Box::new(HeapMemory::new(len_bytes)?))
    }
}

/// Whole pages of this process. Those that nobody touches are never resident.
struct HeapMemory {
    pages: MmapMut,
    len_bytes: usize,
}

impl HeapMemory {
    fn new(len_bytes: usize) -> Result<Self, Error> {
        let no_memory = |why| Error::new(ErrorKind::OutOfMemory, Op::Allocate).because(why);
        let pages = MmapMut::map_anon(len_bytes.max(1)).map_err(no_memory)?;
        Ok(Self { pages, len_bytes })
    }
}

impl fmt::Debug for HeapMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HeapMemory({} bytes)", self.len_bytes)
    }
}

impl Memory for HeapMemory {
    fn bytes(&self) -> &[u8] {
        &self.pages[..self.len_bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.pages[..self.len_bytes]
    }

    fn mapped_at(&self) -> u64 {
        0
    }
}

/// A buffer for one request at a time. Goes back to its pool, if it came from one, when dropped.
pub struct Buffer {
    /// `None` only while dropping.
    memory: Option<Box<dyn Memory>>,
    /// The place in the pool that is kept free.
    home: Option<Arc<Place>>,
    is_secluded: bool,
}

impl Buffer {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.memory.as_ref().expect("present until dropped").bytes()
    }

    /// The bytes, to be changed.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory_mut().bytes_mut()
    }

    /// The memory itself, for an engine.
    #[must_use]
    pub fn memory_mut(&mut self) -> &mut dyn Memory {
        &mut **self.memory.as_mut().expect("present until dropped")
    }

    /// Keeps the memory from other users of the pool: it does not go back there, but to the system, when dropped. For memory
    /// that somebody else may go on reading. `false`, and nothing has changed, if it has no pool or half of that is so already.
    #[must_use]
    pub fn seclude(&mut self) -> bool {
        let Some(home) = &self.home else { return false };
        self.is_secluded = self.is_secluded || home.seclude();
        self.is_secluded
    }
}

impl Buffer {
    /// Whether it is [kept from the pool](Self::seclude).
    #[must_use]
    pub fn is_secluded(&self) -> bool {
        self.is_secluded
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes().len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.take() else { return };
        if self.is_secluded {
            // Given back before another can be made instead.
            self.memory = None;
            // Relaxed: a number, which nothing is read by.
            home.secluded.fetch_sub(1, Ordering::Relaxed);
        }
        home.give_back(self.memory.take());
    }
}

/// On cache lines of its own, so that whoever has it writes to nothing that others read.
#[derive(Debug)]
#[repr(align(128))]
struct Place {
    /// Whoever sets it has the place to himself.
    is_taken: AtomicBool,
    /// The memory, once it was made, while nobody has the place. Never locked by two.
    idle: Mutex<Option<Box<dyn Memory>>>,
    /// How many buffers of the pool will not come back.
    secluded: Arc<AtomicU64>,
    /// Half of all.
    secluded_max: u64,
}

impl Place {
    fn give_back(&self, memory: Option<Box<dyn Memory>>) {
        *self.idle.lock() = memory;
        self.is_taken.store(false, Ordering::Release);
    }

    /// Whether one more of the buffers may stay away.
    fn seclude(&self) -> bool {
        let more = |secluded| (secluded < self.secluded_max).then_some(secluded + 1);
        self.secluded.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

/// A bounded number of large buffers, shared by all volumes of an engine.
#[derive(Debug)]
pub struct MemoryPool {
    places: Box<[Arc<Place>]>,
    large_bytes: usize,
}

impl MemoryPool {
    /// A pool of at most `large_max` buffers of `large_bytes` each, made when first needed.
    #[must_use]
    pub fn new(large_bytes: usize, large_max: usize) -> Self {
        let secluded = Arc::new(AtomicU64::new(0));
        let place = || Place {
            is_taken: AtomicBool::new(false),
            idle: Mutex::new(None),
            secluded: secluded.clone(),
            secluded_max: large_max as u64 / 2,
        };
        Self { places: (0..large_max).map(|_| Arc::new(place())).collect(), large_bytes }
    }

    /// Length of the large buffers, in bytes.
    #[must_use]
    pub fn large_bytes(&self) -> usize {
        self.large_bytes
    }

    /// A large buffer if one is free, else `None`: go on with a small one. Does not wait.
    pub fn try_large(&self, source: &dyn MemorySource) -> Option<Buffer> {
        let place = self.take()?;
        let idle = place.idle.lock().take();
        let Some(memory) = idle.or_else(|| source.allocate(self.large_bytes).ok()) else {
            place.give_back(None);
            return None;
        };
        Some(Buffer { memory: Some(memory), home: Some(place.clone()), is_secluded: false })
    }

    /// Takes a place that is free. Others are touched only when so many buffers are used at once, and those used last are the
    /// warmest; but a few threads begin at places of their own.
    fn take(&self) -> Option<&Arc<Place>> {
        let first = thread_number() % FIRSTS;
        let places = self.places.iter().skip(first).chain(self.places.iter().take(first));
        places.into_iter().find(|place| {
            // A look first: others' places stay in their caches. Acquire: what the last user did with the memory is done.
            let is_taken = &place.is_taken;
            !is_taken.load(Ordering::Relaxed)
                && is_taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        })
    }

    /// A buffer of `len_bytes` that belongs to its taker alone and is freed when dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfMemory`].
    pub fn private(source: &dyn MemorySource, len_bytes: usize) -> Result<Buffer, Error> {
        Ok(Buffer { memory: Some(source.allocate(len_bytes)?), home: None, is_secluded: false })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_pool_of_one_lends_one_and_takes_it_back() {
        let pool = MemoryPool::new(8192, 1);
        let first = pool.try_large(&HeapSource).expect("one is there");
        assert!(pool.try_large(&HeapSource).is_none());
        drop(first);
        assert!(pool.try_large(&HeapSource).is_some());
    }

    #[test]
    fn a_pool_of_none_still_lets_one_go_on() {
        assert!(MemoryPool::new(8192, 0).try_large(&HeapSource).is_none());
        assert_eq!(MemoryPool::private(&HeapSource, 512).unwrap().bytes().len(), 512);
    }

    #[test]
    fn secluded_memory_is_nobody_elses_and_makes_room_when_it_goes() {
        let pool = MemoryPool::new(8192, 2);
        let mut first = pool.try_large(&HeapSource).unwrap();
        let mut second = pool.try_large(&HeapSource).unwrap();
        assert!(first.seclude() && first.seclude());
        assert!(!second.seclude(), "half of a pool of two is one");
        first.bytes_mut().fill(1);
        drop(first);
        let mut third = pool.try_large(&HeapSource).expect("room for another");
        assert_eq!(third.bytes()[0], 0, "other memory");
        assert!(pool.try_large(&HeapSource).is_none());
        assert!(third.seclude());
        second.bytes_mut().fill(2);
        drop(second);
        assert_eq!(pool.try_large(&HeapSource).unwrap().bytes()[0], 2, "the same memory");
        assert!(!MemoryPool::private(&HeapSource, 512).unwrap().seclude());
    }

    #[test]
    fn each_buffer_has_one_user_and_no_more_are_made_than_may_be() {
        let pool = MemoryPool::new(4096, 70);
        let made = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 1..=8u8 {
                let (pool, made) = (&pool, &made);
                scope.spawn(move || {
                    for round in 0..200 {
                        let mut held = Vec::new();
                        for _ in 0..(round + usize::from(thread)) % 12 {
                            let Some(mut buffer) = pool.try_large(&HeapSource) else { break };
                            let is_new = buffer.bytes()[1] == 0;
                            made.fetch_add(u64::from(is_new), Ordering::Relaxed);
                            buffer.bytes_mut()[..2].copy_from_slice(&[thread, 1]);
                            held.push(buffer);
                        }
                        std::thread::yield_now();
                        assert!(held.iter().all(|buffer| buffer.bytes()[0] == thread));
                    }
                });
            }
        });
        assert!(made.into_inner() <= 70);
        let all: Vec<_> = std::iter::from_fn(|| pool.try_large(&HeapSource)).collect();
        assert_eq!(all.len(), 70);
    }

    #[test]
    fn buffers_are_aligned_for_direct_io() {
        for len in [1, 512, 4096, 70_000] {
            let buffer = MemoryPool::private(&HeapSource, len).unwrap();
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN_BYTES), 0);
            assert_eq!(buffer.bytes().len(), len);
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::atomic::AtomicUsize;

    #[derive(Debug)]
    struct Counting(AtomicUsize);

    impl MemorySource for Counting {
        fn allocate(&self, len_bytes: usize) -> Result<Box<dyn Memory>, Error> {
            self.0.fetch_add(1, Ordering::Relaxed);
            HeapSource.allocate(len_bytes)
        }
    }

    /// Three at a pool of two: nobody has another's buffer, and none is lost.
    #[test]
    fn a_buffer_goes_from_hand_to_hand() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(2);
        builder.check(|| {
            let shared = Arc::new((MemoryPool::new(64, 2), Counting(AtomicUsize::new(0))));
            let visit = |(pool, source): &(MemoryPool, Counting), mark: u8| {
                let Some(mut buffer) = pool.try_large(source) else { return };
                buffer.bytes_mut()[0] = mark;
                loom::thread::yield_now();
                assert_eq!(buffer.bytes()[0], mark);
            };
            let threads: Vec<_> = (1..=2)
                .map(|mark| {
                    let shared = shared.clone();
                    loom::thread::spawn(move || visit(&shared, mark))
                })
                .collect();
            visit(&shared, 3);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            let (pool, source) = &*shared;
            let both = (pool.try_large(source), pool.try_large(source));
            assert!(both.0.is_some() && both.1.is_some() && pool.try_large(source).is_none());
            assert_eq!(source.0.load(Ordering::Relaxed), 2);
        });
    }
}
