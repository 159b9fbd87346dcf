//! Volumes without encryption: what clients write lies on the backing as it is.
//!
//! For comparison, since the difference to a [`Volume`](crate::volume::Volume) is what encryption costs; and for images that
//! are still to be moved in or out. Above and below all is as with a volume: pieces, range locks, buffers, backing. There is
//! no key, no keyslot and no engine.
//!
//! What an interrupted write may damage is what the medium damages: sectors of that write, and no others.

use crate::backing::{Access, Backing, Extent};
use crate::batch::{Batch, Item};
use crate::disk::{Disk, Geometry, SCRATCH_BYTES, SIZE_BYTES_MAX, Span, Unaligned};
use crate::error::{Error, ErrorKind, Op};
use crate::memory::{Buffer, HeapSource, MemoryPool};
use crate::range_lock::{RangeLock, Sharing};
use crate::volume::{Discard, SECTOR_BYTES, clip};
use std::sync::Arc;

/// Unit at which requests are cheapest, and in which storage is given back: a page, as with volumes.
const PAGE_BYTES: u32 = 4096;

/// A volume that is not encrypted, over a backing.
#[derive(Debug)]
pub struct PlainVolume {
    size_bytes: u64,
    backing: Arc<dyn Backing>,
    /// What the backing is addressed in, in bytes. Only what is not whole units of it is read before it is written.
    unit_bytes: u32,
    access: Access,
    can_discard: bool,
    does_batches_at_once: bool,
    pool: Arc<MemoryPool>,
    locks: RangeLock,
}

impl PlainVolume {
    /// The first `size_bytes` of `backing`, of which whole sectors are used. Large buffers come from `pool`, in this process.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if that is not even a sector, or the backing is shorter or cannot be addressed;
    /// [`ErrorKind::ReadOnly`] if it is to be written and cannot be.
    pub fn new(
        backing: Arc<dyn Backing>,
        size_bytes: u64,
        access: Access,
        discard: Discard,
        pool: Arc<MemoryPool>,
    ) -> Result<Self, Error> {
        let invalid = |detail: String| Err(Error::new(ErrorKind::Invalid, Op::Open).detail(detail));
        let facts = backing.facts();
        let whole = size_bytes & !(u64::from(SECTOR_BYTES) - 1);
        if whole == 0 {
            return invalid(format!("{size_bytes} bytes are not even one sector of {SECTOR_BYTES}"));
        }
        if size_bytes > SIZE_BYTES_MAX {
            return invalid(format!("{size_bytes} bytes; a volume has {SIZE_BYTES_MAX} at the most"));
        }
        if facts.len_bytes < size_bytes {
            return invalid(format!("the backing has {} bytes, the volume {size_bytes}", facts.len_bytes));
        }
        let unit_bytes = facts.align_bytes;
        if unit_bytes as usize > SCRATCH_BYTES || !facts.len_bytes.is_multiple_of(unit_bytes.into()) {
            return invalid(format!("the backing is addressed in blocks of {unit_bytes} bytes"));
        }
        if facts.access == Access::ReadOnly && access == Access::ReadWrite {
            return Err(Error::new(ErrorKind::ReadOnly, Op::Open).detail("the backing is read-only"));
        }
        Ok(Self {
            size_bytes: whole,
            can_discard: facts.can_discard && discard == Discard::Pass && access == Access::ReadWrite,
            does_batches_at_once: facts.does_parts_at_once,
            backing,
            unit_bytes,
            access,
            pool,
            locks: RangeLock::new(),
        })
    }

    fn unit_floor(&self, offset: u64) -> u64 {
        offset & !(u64::from(self.unit_bytes) - 1)
    }

    /// Whether a piece may be worked on at all. The export has checked the request; this guards against others.
    fn check_piece(&self, item: &Item, buffer: &Buffer) -> Result<(), Error> {
        let span = item.span();
        self.check(span.offset, span.len as u64, item.transfer().access())?;
        item.fits(buffer)
    }
}

impl Disk for PlainVolume {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            logical_block_bytes: SECTOR_BYTES,
            preferred_block_bytes: PAGE_BYTES.max(self.unit_bytes),
            unaligned: Unaligned::Served,
            access: self.access,
            can_trim: self.can_discard,
            does_batches_at_once: self.does_batches_at_once,
        }
    }

    fn try_large_buffer(&self) -> Option<Buffer> {
        self.pool.try_large(&HeapSource)
    }

    fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        MemoryPool::private(&HeapSource, len_bytes)
    }

    fn span(&self, offset: u64, len: u64, buffer_bytes: usize) -> Span {
        Span::cut(self.unit_bytes, offset, len, buffer_bytes)
    }

    fn check(&self, offset: u64, len: u64, access: Access) -> Result<(), Error> {
        self.geometry().check(offset, len, access)
    }

    fn transfer(&self, batch: &mut Batch, buffer: &mut Buffer) {
        for item in &mut batch.items {
            item.set_result(self.check_piece(item, buffer));
        }
        let _guard = batch.lock(&self.locks);
        batch.do_parts(
            |item| item.goes(Access::ReadOnly).then(|| (item.span().units().start, item.units())),
            |parts| self.backing.read_parts(buffer.bytes_mut(), parts),
        );
        let writes = batch.items.iter_mut().filter(|item| item.goes(Access::ReadWrite));
        for item in writes.filter(|item| item.span().scratch_len > 0) {
            let filled = item.fill_edges(self.unit_bytes.into(), buffer, |offset, scratch, buffer| {
                self.backing.read(offset, &mut buffer.bytes_mut()[scratch])
            });
            item.set_result(filled);
        }
        batch.store(&*self.backing, self.unit_bytes.into(), buffer);
    }

    fn flush(&self) -> Result<(), Error> {
        match self.access {
            Access::ReadOnly => Ok(()),
            Access::ReadWrite => self.backing.flush(),
        }
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check(offset, len, Access::ReadWrite)?;
        let page = u64::from(PAGE_BYTES);
        let (start, end) = (offset.next_multiple_of(page), (offset + len) & !(page - 1));
        if !self.can_discard || start >= end {
            return Ok(());
        }
        // Held until the storage is given back, so that no later write is lost to an earlier trim.
        let _guard = self.locks.take(start..end, Sharing::Exclusive);
        self.backing.discard(start, end - start)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.check(offset, len, Access::ReadOnly)?;
        if len == 0 || extents_max == 0 {
            return Ok(Vec::new());
        }
        let (first, end) = (self.unit_floor(offset), offset + len);
        let last = end.next_multiple_of(self.unit_bytes.into());
        let mut extents = self.backing.extents(first, last - first, extents_max)?;
        clip(&mut extents, offset..end);
        Ok(extents)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        if len > 0 && self.check(offset, len, Access::ReadOnly).is_ok() {
            let start = self.unit_floor(offset);
            self.backing.prefetch(start, (offset + len).next_multiple_of(self.unit_bytes.into()) - start);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
