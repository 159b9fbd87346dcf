//! Checks the caller's side of the bargain.

use super::enter;
use inlinecrypt_core::backing::{Access, Backing, BackingFacts, Durability, Extent, Part};
use inlinecrypt_core::error::Error;
use std::ops::Range;
use std::sync::Mutex;

/// Passes everything on, and panics where the caller breaks what `core::backing::Backing` lets him promise: ranges that
/// are empty, misaligned or past the end, misaligned memory, changes to a read-only backing, and writes or discards that
/// overlap another request in time.
#[derive(Debug)]
pub struct StrictBacking<B> {
    inner: B,
    /// Requests under way. Nothing else is taken while it is held.
    under_way: Mutex<Vec<(Range<u64>, Access)>>,
}

impl<B: Backing> StrictBacking<B> {
    /// Watches over `inner`.
    #[must_use]
    pub fn new(inner: B) -> Self {
        Self { inner, under_way: Mutex::default() }
    }

    /// What it watches over.
    #[must_use]
    pub fn inner(&self) -> &B {
        &self.inner
    }

    fn enter(&self, offset: u64, len: u64, access: Access) -> UnderWay<'_> {
        let facts = self.inner.facts();
        let align = u64::from(facts.align_bytes);
        assert!(len > 0, "an empty request at {offset}");
        assert!(
            offset.is_multiple_of(align) && len.is_multiple_of(align),
            "{offset}+{len} is not aligned to {align}"
        );
        let end = offset.checked_add(len).expect("the range overflows");
        assert!(end <= facts.len_bytes, "{offset}+{len} reaches past the end at {}", facts.len_bytes);
        assert!(
            access == Access::ReadOnly || facts.access == Access::ReadWrite,
            "a change to a read-only backing at {offset}+{len}"
        );
        let mut under_way = enter(&self.under_way);
        for (other, other_access) in under_way.iter() {
            let apart = end <= other.start || other.end <= offset;
            let reads = access == Access::ReadOnly && *other_access == Access::ReadOnly;
            assert!(apart || reads, "{offset}+{len} overlaps {other:?}, which is under way");
        }
        under_way.push((offset..end, access));
        UnderWay { under_way: &self.under_way, entry: (offset..end, access) }
    }

    fn check_memory(&self, data: &[u8]) {
        let align = self.inner.facts().align_bytes as usize;
        assert!(data.as_ptr().addr().is_multiple_of(align), "memory is not aligned to {align}");
    }
}

impl<B: Backing> StrictBacking<B> {
    fn enter_parts(&self, memory: &[u8], parts: &[Part], access: Access) -> Vec<UnderWay<'_>> {
        let enter = |part: &Part| {
            self.check_memory(&memory[part.range.clone()]);
            self.enter(part.offset, part.range.len() as u64, access)
        };
        parts.iter().map(enter).collect()
    }
}

/// A request under way. Over when dropped.
struct UnderWay<'a> {
    under_way: &'a Mutex<Vec<(Range<u64>, Access)>>,
    entry: (Range<u64>, Access),
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut under_way = enter(self.under_way);
        if let Some(index) = under_way.iter().position(|entry| *entry == self.entry) {
            under_way.swap_remove(index);
        }
    }
}

impl<B: Backing> Backing for StrictBacking<B> {
    fn facts(&self) -> BackingFacts {
        self.inner.facts()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.check_memory(data);
        let _under_way = self.enter(offset, data.len() as u64, Access::ReadOnly);
        self.inner.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.check_memory(data);
        let _under_way = self.enter(offset, data.len() as u64, Access::ReadWrite);
        self.inner.write(offset, data, durability)
    }

    fn read_parts(&self, memory: &mut [u8], parts: &mut [Part]) {
        let under_way = self.enter_parts(memory, parts, Access::ReadOnly);
        self.inner.read_parts(memory, parts);
        drop(under_way);
    }

    fn write_parts(&self, memory: &[u8], parts: &mut [Part]) {
        let under_way = self.enter_parts(memory, parts, Access::ReadWrite);
        self.inner.write_parts(memory, parts);
        drop(under_way);
    }

    fn flush(&self) -> Result<(), Error> {
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        let _under_way = self.enter(offset, len, Access::ReadWrite);
        self.inner.discard(offset, len)
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.inner.extents(offset, len, extents_max)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.inner.prefetch(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemBacking;
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn panics(action: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(action)).is_err()
    }

    #[test]
    fn every_broken_promise_panics() {
        let facts = |access| BackingFacts { align_bytes: 512, access, ..super::super::facts_in_memory(8192) };
        let disk = StrictBacking::new(MemBacking::new(8192).with_facts(facts(Access::ReadWrite)));
        let memory = vec![0; 2048];
        let skip = memory.as_ptr().align_offset(512);
        let data = &memory[skip..][..512];

        disk.write(0, data, Durability::Cached).expect("kept");
        assert!(panics(|| drop(disk.write(0, &[], Durability::Cached))), "empty");
        assert!(panics(|| drop(disk.write(256, data, Durability::Cached))), "misaligned offset");
        assert!(panics(|| drop(disk.write(0, &data[..256], Durability::Cached))), "misaligned length");
        assert!(panics(|| drop(disk.write(0, &memory[skip + 1..][..512], Durability::Cached))), "memory");
        assert!(panics(|| drop(disk.write(8192, data, Durability::Cached))), "past the end");
        assert!(panics(|| drop(disk.discard(u64::MAX - 511, 512))), "overflow");

        let disk = StrictBacking::new(MemBacking::new(8192).with_facts(facts(Access::ReadOnly)));
        assert!(panics(|| drop(disk.write(0, data, Durability::Cached))), "read-only");
        assert!(panics(|| drop(disk.discard(0, 512))), "read-only");
    }

    #[test]
    fn overlap_in_time_panics_only_where_something_changes() {
        let disk = StrictBacking::new(MemBacking::new(8192));
        let write = disk.enter(0, 1024, Access::ReadWrite);
        assert!(panics(|| drop(disk.enter(512, 1024, Access::ReadOnly))));
        drop(disk.enter(1024, 512, Access::ReadWrite));
        drop(write);
        let read = disk.enter(0, 1024, Access::ReadOnly);
        drop(disk.enter(512, 1024, Access::ReadOnly));
        assert!(panics(|| drop(disk.enter(512, 1024, Access::ReadWrite))));
        drop(read);
        assert!(enter(&disk.under_way).is_empty());
    }
}
