//! A backing that remembers what went wrong, for `status`.

use inlinecrypt_core::backing::{Backing, BackingFacts, Durability, Extent, Part};
use inlinecrypt_core::error::{Error, ErrorKind};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Passes everything on, and remembers the first failure to make data stable.
pub(crate) struct Watched {
    inner: Arc<dyn Backing>,
    /// Why data may be lost. Never taken back: nothing can make it good.
    lost: OnceLock<String>,
    failures: AtomicU64,
}

impl Watched {
    pub(crate) fn new(inner: Arc<dyn Backing>) -> Self {
        Self { inner, lost: OnceLock::new(), failures: AtomicU64::new(0) }
    }

    /// Why data may be lost, if it may.
    pub(crate) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Requests that the backing failed.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn note<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &result {
            self.note_failure(error);
        }
        result
    }

    fn note_failure(&self, error: &Error) {
        if error.kind() != ErrorKind::Unsupported {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn note_parts(&self, parts: &[Part]) {
        for part in parts {
            if let Err(error) = &part.result {
                self.note_failure(error);
            }
        }
    }

    fn note_stable(&self, result: Result<(), Error>) -> Result<(), Error> {
        // A durable write that found no room lost nothing: it is refused, and what was acknowledged before is there.
        if let Err(error) = &result
            && error.kind() != ErrorKind::NoSpace
        {
            self.lost.get_or_init(|| error.chain());
        }
        self.note(result)
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Backing for Watched {
    fn facts(&self) -> BackingFacts {
        self.inner.facts()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.note(self.inner.read(offset, data))
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        let result = self.inner.write(offset, data, durability);
        match durability {
            Durability::Cached => self.note(result),
            Durability::Durable => self.note_stable(result),
        }
    }

    fn read_parts(&self, memory: &mut [u8], parts: &mut [Part]) {
        self.inner.read_parts(memory, parts);
        self.note_parts(parts);
    }

    fn write_parts(&self, memory: &[u8], parts: &mut [Part]) {
        self.inner.write_parts(memory, parts);
        self.note_parts(parts);
    }

    fn flush(&self) -> Result<(), Error> {
        self.note_stable(self.inner.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.note(self.inner.discard(offset, len))
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.note(self.inner.extents(offset, len, extents_max))
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.inner.prefetch(offset, len);
    }
}
