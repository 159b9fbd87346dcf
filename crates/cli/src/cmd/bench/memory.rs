//! Memory, in the place of a file.

use super::scratch::FILL_BYTES;
use inlinecrypt_core::backing::{Access, Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::memory::{HeapSource, Memory, MemorySource as _};
use inlinecrypt_io::backing::testing::SplitMix64;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Bytes under one lock: as much as a volume moves at once, so that threads hardly meet.
const PART_BYTES: usize = 256 * 1024;

/// Memory that is there from the beginning, and begins at a page: what it costs is to copy.
pub(super) struct MemoryBacking {
    parts: Vec<Mutex<Box<dyn Memory>>>,
}

impl std::fmt::Debug for MemoryBacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryBacking({} MiB)", self.len_bytes() >> 20)
    }
}

impl MemoryBacking {
    /// `size` bytes of noise, a multiple of 1 MiB.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`](inlinecrypt_core::error::ErrorKind::OutOfMemory).
    pub(super) fn new(size: u64) -> Result<Self, Error> {
        let mut noise = vec![0; FILL_BYTES];
        SplitMix64::new(3).fill(&mut noise);
        let part = |_| -> Result<_, Error> {
            let mut memory = HeapSource.allocate(PART_BYTES)?;
            memory.bytes_mut().copy_from_slice(&noise[..PART_BYTES]);
            Ok(Mutex::new(memory))
        };
        let parts = (0..size / PART_BYTES as u64).map(part).collect::<Result<_, Error>>()?;
        Ok(Self { parts })
    }

    fn len_bytes(&self) -> u64 {
        self.parts.len() as u64 * PART_BYTES as u64
    }

    /// Calls `each` for the parts of a range, with the bytes there and where in the data they belong.
    fn for_each(&self, offset: u64, len: usize, mut each: impl FnMut(&mut [u8], Range<usize>)) {
        let mut done = 0;
        while done < len {
            let at = usize::try_from(offset).expect("memory has a place for it") + done;
            let within = at % PART_BYTES;
            let take = (PART_BYTES - within).min(len - done);
            let mut part = self.parts[at / PART_BYTES].lock().unwrap_or_else(PoisonError::into_inner);
            each(&mut part.bytes_mut()[within..within + take], done..done + take);
            done += take;
        }
    }
}

impl Backing for MemoryBacking {
    fn facts(&self) -> BackingFacts {
        BackingFacts {
            len_bytes: self.len_bytes(),
            align_bytes: 1,
            access: Access::ReadWrite,
            can_discard: false,
            does_parts_at_once: false,
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.for_each(offset, data.len(), |bytes, place| data[place].copy_from_slice(bytes));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _: Durability) -> Result<(), Error> {
        self.for_each(offset, data.len(), |bytes, place| bytes.copy_from_slice(&data[place]));
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>, Error> {
        Ok(vec![Extent { offset, len, allocated: true }])
    }

    fn prefetch(&self, _: u64, _: u64) {}
}
