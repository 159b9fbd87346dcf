//! Memory for data on its way through an engine, and the bounded pool that it comes from.
//!
//! An engine may live in another process and reach only memory that both have mapped. So nobody hands an engine a slice
//! of his own: buffers come from the engine's [`MemorySource`]. A [`MemoryPool`] keeps a bounded number of large ones for
//! all volumes of an engine; who finds it exhausted goes on with a small one of his own, so exhaustion costs speed and
//! nothing else, and a client that stalls in mid-request cannot keep others from their work.

use crate::error::{Error, ErrorKind, Op};
use crate::sync::Mutex;
use memmap2::MmapMut;
use std::fmt;
use std::sync::Arc;

/// Alignment of every buffer in bytes: what direct I/O to any disk asks for.
pub const ALIGN_BYTES: usize = 4096;

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
    home: Option<Arc<Mutex<Free>>>,
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
        if !self.is_secluded {
            let mut free = home.lock();
            self.is_secluded = free.secluded < free.large_max / 2;
            free.secluded += usize::from(self.is_secluded);
        }
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
            let mut free = home.lock();
            free.secluded -= 1;
            free.made -= 1;
        } else {
            home.lock().idle.extend(self.memory.take());
        }
    }
}

#[derive(Debug)]
struct Free {
    /// Last in, first out: the warmest buffer is used next, and cold ones are never touched.
    idle: Vec<Box<dyn Memory>>,
    made: usize,
    large_max: usize,
    /// How many of those made will not come back.
    secluded: usize,
}

/// A bounded number of large buffers, shared by all volumes of an engine.
#[derive(Debug)]
pub struct MemoryPool {
    free: Arc<Mutex<Free>>,
    large_bytes: usize,
}

impl MemoryPool {
    /// A pool of at most `large_max` buffers of `large_bytes` each, made when first needed.
    #[must_use]
    pub fn new(large_bytes: usize, large_max: usize) -> Self {
        let free = Free { idle: Vec::new(), made: 0, large_max, secluded: 0 };
        Self { free: Arc::new(Mutex::new(free)), large_bytes }
    }

    /// Length of the large buffers, in bytes.
    #[must_use]
    pub fn large_bytes(&self) -> usize {
        self.large_bytes
    }

    /// A large buffer if one is free, else `None`: go on with a small one. Does not wait.
    pub fn try_large(&self, source: &dyn MemorySource) -> Option<Buffer> {
        let mut free = self.free.lock();
        let memory = match free.idle.pop() {
            Some(memory) => memory,
            None if free.made < free.large_max => {
                let memory = source.allocate(self.large_bytes).ok()?;
                free.made += 1;
                memory
            }
            None => return None,
        };
        Some(Buffer { memory: Some(memory), home: Some(self.free.clone()), is_secluded: false })
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

#[cfg(test)]
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
    fn buffers_are_aligned_for_direct_io() {
        for len in [1, 512, 4096, 70_000] {
            let buffer = MemoryPool::private(&HeapSource, len).unwrap();
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN_BYTES), 0);
            assert_eq!(buffer.bytes().len(), len);
        }
    }
}
