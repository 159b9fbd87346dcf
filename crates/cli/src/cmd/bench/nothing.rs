//! A disk and an engine that do nothing: what is left is everything else.

use inlinecrypt_core::backing::{Access, Extent};
use inlinecrypt_core::batch::Batch;
use inlinecrypt_core::caps::{Capabilities, KeyTypes, UnitMask};
use inlinecrypt_core::config::Mode;
use inlinecrypt_core::disk::{Disk, Geometry, LARGE_BUFFER_BYTES, Span, Unaligned};
use inlinecrypt_core::engine::{Direction, Engine, KeyLadder, KeyRef, Piece, SlotIndex};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::Key;
use inlinecrypt_core::memory::{Buffer, HeapSource, Memory, MemoryPool, MemorySource};
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

/// An engine that leaves all data as it is. For nothing but to be measured: no key of anybody's ever gets here.
#[derive(Debug)]
pub(super) struct NoEngine(Capabilities);

impl NoEngine {
    pub(super) fn new() -> Self {
        Self(Capabilities {
            units: [UnitMask::SERVED; Mode::ALL.len()],
            dun_bytes_max: 32,
            key_types: KeyTypes::RAW,
            keyslots: 32,
        })
    }
}

impl Engine for NoEngine {
    fn name(&self) -> &str {
        "none"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.0
    }

    fn memory(&self) -> &dyn MemorySource {
        &HeapSource
    }

    fn program(&self, _: SlotIndex, _: &Key) -> Result<(), Error> {
        Ok(())
    }

    fn evict(&self, _: Option<SlotIndex>, _: &Key) -> Result<(), Error> {
        Ok(())
    }

    fn crypt(
        &self,
        _: KeyRef<'_>,
        _: Direction,
        _: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        pieces.iter_mut().for_each(Piece::finish);
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        None
    }
}
