//! A part of another backing: where a volume lies that does not begin at byte 0.

use inlinecrypt_core::backing::{Backing, BackingFacts, Durability, Extent, Part};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::sync::Arc;

/// The bytes of another backing from a certain one on. Errors name places of the whole.
#[derive(Debug)]
pub struct Window {
    whole: Arc<dyn Backing>,
    start: u64,
    facts: BackingFacts,
}

impl Window {
    /// What `whole` has from byte `start` on.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if it ends before `start`, or cannot be addressed there: `start` must be a multiple of its
    /// `align_bytes`.
    pub fn new(whole: Arc<dyn Backing>, start: u64) -> Result<Self, Error> {
        let invalid = |detail: String| Error::new(ErrorKind::Invalid, Op::Open).detail(detail);
        let facts = whole.facts();
        let Some(len_bytes) = facts.len_bytes.checked_sub(start) else {
            return Err(invalid(format!(
                "it has {} bytes and is to be used from {start} on",
                facts.len_bytes
            )));
        };
        if !start.is_multiple_of(facts.align_bytes.into()) {
            return Err(invalid(format!(
                "it is addressed in blocks of {} bytes and is to be used from {start} on",
                facts.align_bytes
            )));
        }
        Ok(Self { whole, start, facts: BackingFacts { len_bytes, ..facts } })
    }
}

impl Window {
    /// What `whole` has from byte `start` on: itself, if that is all of it.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn over(whole: Arc<dyn Backing>, start: u64) -> Result<Arc<dyn Backing>, Error> {
        match start {
            0 => Ok(whole),
            start => Ok(Arc::new(Self::new(whole, start)?)),
        }
    }
}

impl Backing for Window {
    fn facts(&self) -> BackingFacts {
        self.facts
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.whole.read(self.start + offset, data)
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.whole.write(self.start + offset, data, durability)
    }

    fn read_parts(&self, memory: &mut [u8], parts: &mut [Part]) {
        parts.iter_mut().for_each(|part| part.offset += self.start);
        self.whole.read_parts(memory, parts);
        parts.iter_mut().for_each(|part| part.offset -= self.start);
    }

    fn write_parts(&self, memory: &[u8], parts: &mut [Part]) {
        parts.iter_mut().for_each(|part| part.offset += self.start);
        self.whole.write_parts(memory, parts);
        parts.iter_mut().for_each(|part| part.offset -= self.start);
    }

    fn flush(&self) -> Result<(), Error> {
        self.whole.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.whole.discard(self.start + offset, len)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        let mut extents = self.whole.extents(self.start + offset, len, extents_max)?;
        for extent in &mut extents {
            extent.offset -= self.start;
        }
        Ok(extents)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.whole.prefetch(self.start + offset, len);
    }
}
