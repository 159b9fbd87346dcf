//! A disk that does nothing: what is left is everything else.

use inlinecrypt_core::backing::{Access, Extent};
use inlinecrypt_core::batch::Batch;
use inlinecrypt_core::disk::{Disk, Geometry, LARGE_BUFFER_BYTES, Span, Unaligned};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::memory::{Buffer, HeapSource, MemoryPool};
use inlinecrypt_core::volume::SECTOR_BYTES;

/// A disk that drops what it is given and gives what is in the buffer.
#[derive(Debug)]
pub(super) struct NoDisk {
    size: u64,
    pool: MemoryPool,
}

impl NoDisk {
    pub(super) fn new(size: u64) -> Self {
        Self { size, pool: MemoryPool::new(LARGE_BUFFER_BYTES, 8) }
    }
}

impl Disk for NoDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size,
            logical_block_bytes: SECTOR_BYTES,
            preferred_block_bytes: 4096,
            unaligned: Unaligned::Served,
            access: Access::ReadWrite,
            can_trim: false,
            does_batches_at_once: false,
        }
    }

    fn try_large_buffer(&self) -> Option<Buffer> {
        self.pool.try_large(&HeapSource)
    }

    fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        MemoryPool::private(&HeapSource, len_bytes)
    }

    fn span(&self, offset: u64, len: u64, buffer_bytes: usize) -> Span {
        Span::cut(1, offset, len, buffer_bytes)
    }

    fn check(&self, _: u64, _: u64, _: Access) -> Result<(), Error> {
        Ok(())
    }

    fn transfer(&self, batch: &mut Batch, _: &mut Buffer) {
        batch.items_mut().iter_mut().for_each(|item| item.set_result(Ok(())));
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>, Error> {
        Ok(vec![Extent { offset, len, allocated: true }])
    }

    fn prefetch(&self, _: u64, _: u64) {}
}
