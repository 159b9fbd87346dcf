//! A disk in memory, without encryption: for trying exports, and for tests, where it fails and dawdles on demand.

use inlinecrypt_core::backing::{Access, Durability, Extent};
use inlinecrypt_core::batch::{Batch, Transfer};
use inlinecrypt_core::disk::{CHUNK_BYTES, Disk, Geometry, LARGE_BUFFER_BYTES, Span, Unaligned, Zeroing};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::memory::{Buffer, HeapSource, MemoryPool};
use inlinecrypt_core::volume::SECTOR_BYTES;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

/// A disk in memory. Memory is allocated where it is written.
#[derive(Debug)]
pub struct RamDisk {
    geometry: Geometry,
    /// Pieces never cross a chunk, so one lock each suffices.
    chunks: Vec<RwLock<Option<Box<[u8]>>>>,
    pool: MemoryPool,
    has_faults: AtomicBool,
    faults: Mutex<Faults>,
    flushes: AtomicU64,
    durable_writes: AtomicU64,
}

#[derive(Debug, Default)]
struct Faults {
    reads: Option<(Range<u64>, ErrorKind)>,
    writes: Option<(Range<u64>, ErrorKind)>,
    flushes: Option<ErrorKind>,
    delay: Duration,
}

impl RamDisk {
    /// A disk of `size_bytes`, a multiple of 512, that is all there is to it: writable, with trim, and served at any offset.
    ///
    /// # Panics
    ///
    /// If the size is none.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self::with_geometry(Geometry {
            size_bytes,
            logical_block_bytes: SECTOR_BYTES,
            preferred_block_bytes: 4096,
            unaligned: Unaligned::Served,
            access: Access::ReadWrite,
            can_trim: true,
            does_batches_at_once: false,
        })
    }

    /// A disk of any shape.
    ///
    /// # Panics
    ///
    /// If the size is no multiple of 512.
    #[must_use]
    pub fn with_geometry(geometry: Geometry) -> Self {
        assert!(geometry.size_bytes.is_multiple_of(u64::from(SECTOR_BYTES)), "disks are whole sectors");
        let chunks = geometry.size_bytes.div_ceil(wide(CHUNK_BYTES));
        Self {
            geometry,
            chunks: (0..chunks).map(|_| RwLock::new(None)).collect(),
            pool: MemoryPool::new(LARGE_BUFFER_BYTES, 8),
            has_faults: AtomicBool::new(false),
            faults: Mutex::default(),
            flushes: AtomicU64::new(0),
            durable_writes: AtomicU64::new(0),
        }
    }

    /// The same with a pool of only `large_max` large buffers.
    #[must_use]
    pub fn with_pool_of(mut self, large_max: usize) -> Self {
        self.pool = MemoryPool::new(LARGE_BUFFER_BYTES, large_max);
        self
    }

    /// Makes reads that touch `range` fail.
    pub fn fail_reads(&self, range: Range<u64>, kind: ErrorKind) {
        self.change_faults(|faults| faults.reads = Some((range, kind)));
    }

    /// Makes writes that touch `range` fail.
    pub fn fail_writes(&self, range: Range<u64>, kind: ErrorKind) {
        self.change_faults(|faults| faults.writes = Some((range, kind)));
    }

    /// Makes flushes fail.
    pub fn fail_flushes(&self, kind: ErrorKind) {
        self.change_faults(|faults| faults.flushes = Some(kind));
    }

    /// Makes reads and writes take so long; all of a batch that is not durable as long as one if the disk
    /// does batches at once.
    pub fn delay(&self, delay: Duration) {
        self.change_faults(|faults| faults.delay = delay);
    }

    /// How often it was flushed.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// How many pieces were written with [`Durability::Durable`].
    #[must_use]
    pub fn durable_writes(&self) -> u64 {
        self.durable_writes.load(Ordering::Relaxed)
    }

    fn change_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner));
        self.has_faults.store(true, Ordering::Release);
    }

    fn fault(&self, op: Op, span: Span) -> Result<(), Error> {
        if !self.has_faults.load(Ordering::Acquire) {
            return Ok(());
        }
        let fault = {
            let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
            if op == Op::Read { faults.reads.clone() } else { faults.writes.clone() }
        };
        let (start, end) = (span.offset(), span.offset() + wide(span.payload().len()));
        match fault {
            Some((range, kind)) if start < range.end && range.start < end => {
                Err(Error::new(kind, op).at(start, end - start).detail("told to fail"))
            }
            _ => Ok(()),
        }
    }

    /// Waits as long as it was told that transfers take.
    fn dawdle(&self) {
        if self.has_faults.load(Ordering::Acquire) {
            let delay = self.faults.lock().unwrap_or_else(PoisonError::into_inner).delay;
            thread::sleep(delay);
        }
    }

    /// The chunk of an offset, and where in it that is.
    fn locate(&self, offset: u64) -> (&RwLock<Option<Box<[u8]>>>, usize) {
        let index = usize::try_from(offset / wide(CHUNK_BYTES)).expect("checked by Disk::check");
        let within = usize::try_from(offset % wide(CHUNK_BYTES)).expect("less than a chunk");
        (&self.chunks[index], within)
    }

    fn load(&self, span: Span, payload: &mut [u8]) -> Result<(), Error> {
        self.fault(Op::Read, span)?;
        let (chunk, start) = self.locate(span.offset());
        match &*chunk.read().unwrap_or_else(PoisonError::into_inner) {
            Some(bytes) => payload.copy_from_slice(&bytes[start..][..payload.len()]),
            None => payload.fill(0),
        }
        Ok(())
    }

    fn store(&self, span: Span, payload: &[u8], durability: Durability) -> Result<(), Error> {
        self.fault(Op::Write, span)?;
        let (chunk, start) = self.locate(span.offset());
        let mut chunk = chunk.write().unwrap_or_else(PoisonError::into_inner);
        let bytes = chunk.get_or_insert_with(|| vec![0; CHUNK_BYTES].into_boxed_slice());
        bytes[start..][..payload.len()].copy_from_slice(payload);
        if durability == Durability::Durable {
            self.durable_writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Runs `change` on each chunk's part of a range.
    fn for_each_chunk(
        &self,
        offset: u64,
        len: u64,
        mut change: impl FnMut(&mut Option<Box<[u8]>>, Range<usize>),
    ) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (chunk, within) = self.locate(at);
            let len = (CHUNK_BYTES - within).min(usize::try_from(end - at).unwrap_or(usize::MAX));
            change(&mut chunk.write().unwrap_or_else(PoisonError::into_inner), within..within + len);
            at += wide(len);
        }
    }
}

impl Disk for RamDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn try_large_buffer(&self) -> Option<Buffer> {
        self.pool.try_large(&HeapSource)
    }

    fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error> {
        MemoryPool::private(&HeapSource, len_bytes)
    }

    fn span(&self, offset: u64, len: u64, buffer_bytes: usize) -> Span {
        // Payload first: in units of one byte there are no edges.
        Span::cut(1, offset, len, buffer_bytes)
    }

    fn check(&self, offset: u64, len: u64, access: Access) -> Result<(), Error> {
        let refuse = |kind| {
            let op = if access == Access::ReadOnly { Op::Read } else { Op::Write };
            Err(Error::new(kind, op).at(offset, len))
        };
        if access == Access::ReadWrite && self.geometry.access == Access::ReadOnly {
            return refuse(ErrorKind::ReadOnly);
        }
        if offset.checked_add(len).is_none_or(|end| end > self.geometry.size_bytes) {
            return refuse(if access == Access::ReadOnly {
                ErrorKind::OutOfRange
            } else {
                ErrorKind::PastEnd
            });
        }
        let mask = u64::from(self.geometry.logical_block_bytes) - 1;
        if self.geometry.unaligned == Unaligned::Refused && (offset | len) & mask != 0 {
            return refuse(ErrorKind::Misaligned);
        }
        Ok(())
    }

    fn transfer(&self, batch: &mut Batch, buffer: &mut Buffer) {
        for (index, item) in batch.items_mut().iter_mut().enumerate() {
            let is_durable = item.transfer() == Transfer::Write(Durability::Durable);
            if index == 0 || is_durable || !self.geometry.does_batches_at_once {
                self.dawdle();
            }
            let payload = &mut buffer.bytes_mut()[item.payload()];
            let result = match item.transfer() {
                Transfer::Read => self.load(item.span(), payload),
                Transfer::Write(durability) => self.store(item.span(), payload, durability),
            };
            item.set_result(result);
        }
    }

    fn flush(&self) -> Result<(), Error> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        match self.faults.lock().unwrap_or_else(PoisonError::into_inner).flushes {
            Some(kind) => Err(Error::new(kind, Op::Flush).detail("told to fail")),
            None => Ok(()),
        }
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.for_each_chunk(offset, len, |chunk, range| {
            if range == (0..CHUNK_BYTES) {
                *chunk = None;
            }
        });
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        zeroing: Zeroing,
        durability: Durability,
        _: &mut Buffer,
    ) -> Result<(), Error> {
        // Like an encrypted disk, which has to write them.
        if zeroing == Zeroing::OnlyIfFast {
            return Err(Error::new(ErrorKind::Unsupported, Op::WriteZeroes));
        }
        self.for_each_chunk(offset, len, |chunk, range| {
            chunk.get_or_insert_with(|| vec![0; CHUNK_BYTES].into_boxed_slice())[range].fill(0);
        });
        if durability == Durability::Durable {
            self.durable_writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        let mut extents: Vec<Extent> = Vec::new();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (chunk, within) = self.locate(at);
            let len = wide(CHUNK_BYTES - within).min(end - at);
            let allocated = chunk.read().unwrap_or_else(PoisonError::into_inner).is_some();
            let is_full = extents.len() == extents_max;
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => last.len += len,
                _ if is_full => break,
                _ => extents.push(Extent { offset: at, len, allocated }),
            }
            at += len;
        }
        Ok(extents)
    }

    fn prefetch(&self, _: u64, _: u64) {}
}

fn wide(len: usize) -> u64 {
    u64::try_from(len).expect("memory lengths fit 64 bits")
}
