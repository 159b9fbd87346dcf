//! A part of a backing: what lies behind a header.

use inlinecrypt_core::backing::{Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::sync::Arc;

/// The bytes `offset..offset + len` of another backing, as one of its own. Nothing outside of them is ever touched.
#[derive(Debug)]
pub struct Window {
    inner: Arc<dyn Backing>,
    offset: u64,
    facts: BackingFacts,
}

impl Window {
    /// The window of `len_bytes` that begins at `offset`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if it is empty, ends behind the end of `inner`, or does not begin and end where `inner` can
    /// be addressed.
    pub fn new(inner: Arc<dyn Backing>, offset: u64, len_bytes: u64) -> Result<Self, Error> {
        let facts = inner.facts();
        let invalid = |detail: String| Err(Error::new(ErrorKind::Invalid, Op::Open).detail(detail));
        if len_bytes == 0 || offset.checked_add(len_bytes).is_none_or(|end| end > facts.len_bytes) {
            return invalid(format!(
                "the data has {len_bytes} bytes from byte {offset} on, and the file {}",
                facts.len_bytes
            ));
        }
        let align_bytes = u64::from(facts.align_bytes);
        if offset % align_bytes != 0 || len_bytes % align_bytes != 0 {
            return invalid(format!(
                "the data has {len_bytes} bytes from byte {offset} on, and is addressed in blocks of {align_bytes}"
            ));
        }
        Ok(Self { inner, offset, facts: BackingFacts { len_bytes, ..facts } })
    }
}

impl Backing for Window {
    fn facts(&self) -> BackingFacts {
        self.facts
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.inner.read(self.offset + offset, data)
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.inner.write(self.offset + offset, data, durability)
    }

    fn flush(&self) -> Result<(), Error> {
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.inner.discard(self.offset + offset, len)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        let extents = self.inner.extents(self.offset + offset, len, extents_max)?;
        Ok(extents
            .into_iter()
            .map(|extent| Extent { offset: extent.offset - self.offset, ..extent })
            .collect())
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.inner.prefetch(self.offset + offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::testing::{MemBacking, conformance};

    #[test]
    fn a_window_is_a_backing_and_touches_nothing_else() {
        conformance::run(|| {
            let inner = Arc::new(MemBacking::new(4 << 20));
            Arc::new(Window::new(inner, 1 << 20, 2 << 20).unwrap())
        });
        let inner = Arc::new(MemBacking::new(16 << 10));
        let window = Window::new(inner.clone(), 4096, 8192).unwrap();
        window.write(0, &[1; 8192], Durability::Cached).unwrap();
        let content = inner.snapshot(0, 16 << 10);
        assert!(content[4096..12288].iter().all(|&byte| byte == 1));
        assert!(content[..4096].iter().chain(&content[12288..]).all(|&byte| byte == 0));
    }

    #[test]
    fn a_window_that_is_not_there_is_refused() {
        for (offset, len) in [(0, 0), (0, 8193), (8192, 1), (u64::MAX, 2), (4096, u64::MAX)] {
            let error = Window::new(Arc::new(MemBacking::new(8192)), offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{offset} {len}");
        }
    }
}
