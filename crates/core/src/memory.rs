//! Memory for data on its way through an engine, and the bounded pool that it comes from.
//!
//! An engine may live in another process and reach only memory that both have mapped. So nobody hands an engine a slice
//! of his own: buffers come from the engine's [`MemorySource`]. A [`MemoryPool`] keeps a bounded number of large ones for
//! all volumes of an engine; who finds it exhausted goes on with a small one of his own, so exhaustion costs speed and
//! nothing else, and a client that stalls in mid-request cannot keep others from their work.

use crate::error::{Error, ErrorKind, Op};
use crate::sync::Mutex;
use std::fmt;
use std::sync::Arc;

/// Alignment of every buffer in bytes: what direct I/O to any disk asks for.
pub const ALIGN_BYTES: usize = 4096;

/// A piece of memory that an engine can reach.
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

/// Memory from the heap, aligned by leaving out what comes before the boundary.
struct HeapMemory {
    bytes: Vec<u8>,
    start: usize,
    len_bytes: usize,
}

impl HeapMemory {
    fn new(len_bytes: usize) -> Result<Self, Error> {
        let out_of_memory = || Error::new(ErrorKind::OutOfMemory, Op::Allocate);
        let room = len_bytes.checked_add(ALIGN_BYTES).ok_or_else(out_of_memory)?;
        // Zeroed by the allocator, so pages that nobody touches are never resident.
        let bytes = vec![0; room];
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES);
        if start > ALIGN_BYTES {
            return Err(out_of_memory());
        }
        Ok(Self { bytes, start, len_bytes })
    }
}

impl fmt::Debug for HeapMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HeapMemory({} bytes)", self.len_bytes)
    }
}

impl Memory for HeapMemory {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len_bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len_bytes]
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
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes().len())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(home), Some(memory)) = (self.home.take(), self.memory.take()) {
            home.lock().idle.push(memory);
        }
    }
}

#[derive(Debug)]
struct Free {
    /// Last in, first out: the warmest buffer is used next, and cold ones are never touched.
    idle: Vec<Box<dyn Memory>>,
    made: usize,
}

/// A bounded number of large buffers, shared by all volumes of an engine.
#[derive(Debug)]
pub struct MemoryPool {
    free: Arc<Mutex<Free>>,
    large_bytes: usize,
    large_max: usize,
}

impl MemoryPool {
    /// A pool of at most `large_max` buffers of `large_bytes` each, made when first needed.
    #[must_use]
    pub fn new(large_bytes: usize, large_max: usize) -> Self {
        Self { free: Arc::new(Mutex::new(Free { idle: Vec::new(), made: 0 })), large_bytes, large_max }
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
            None if free.made < self.large_max => {
                let memory = source.allocate(self.large_bytes).ok()?;
                free.made += 1;
                memory
            }
            None => return None,
        };
        Some(Buffer { memory: Some(memory), home: Some(self.free.clone()) })
    }

    /// A buffer of `len_bytes` that belongs to its taker alone and is freed when dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutOfMemory`].
    pub fn private(source: &dyn MemorySource, len_bytes: usize) -> Result<Buffer, Error> {
        Ok(Buffer { memory: Some(source.allocate(len_bytes)?), home: None })
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
    fn buffers_are_aligned_for_direct_io() {
        for len in [1, 512, 4096, 70_000] {
            let buffer = MemoryPool::private(&HeapSource, len).unwrap();
            assert_eq!(buffer.bytes().as_ptr().align_offset(ALIGN_BYTES), 0);
            assert_eq!(buffer.bytes().len(), len);
        }
    }
}
