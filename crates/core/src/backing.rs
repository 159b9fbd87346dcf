//! Where ciphertext is stored. Says nothing of files, so that remote backings fit too.

use crate::error::Error;
use std::fmt;
use std::ops::Range;

/// Whether a request may change anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durability {
    /// When later reads see it. A power cut may lose it until the next flush.
    Cached,
    /// When it is on stable storage (forced unit access).
    Durable,
}

/// A run of a volume or backing, and whether storage is allocated to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes, never 0.
    pub len: u64,
    /// Whether storage is allocated to it.
    pub allocated: bool,
}

/// One of several transfers that are asked for together.
#[derive(Debug)]
pub struct Part {
    /// Where on the backing it begins, in bytes.
    pub offset: u64,
    /// Where its bytes are, in the memory given.
    pub range: Range<usize>,
    /// How it went.
    pub result: Result<(), Error>,
}

/// What a backing is like. Constant while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingFacts {
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Offsets, lengths and memory must be multiples of this, in bytes: a power of two from 1 to 4096.
    pub align_bytes: u32,
    /// Whether it can be written.
    pub access: Access,
    /// Whether [`Backing::discard`] does anything.
    pub can_discard: bool,
    /// Whether [`Backing::read_parts`] and [`Backing::write_parts`] have all parts on their way at once, since the medium is
    /// waited for.
    pub does_parts_at_once: bool,
}

/// Where ciphertext is stored: a file, a block device.
///
/// # What the volume promises
///
/// - Requests lie within `len_bytes`, keep to `align_bytes` (also the address of the memory), and are not empty.
/// - No write or discard overlaps another request in time.
/// - Nothing is written, discarded or zeroed on a read-only backing.
///
/// # What an implementation owes
///
/// - All methods may be called from many threads at once, and block until done.
/// - A write that returned `Ok` is seen by every later read, and is stable after the next `flush` that returned `Ok`.
///   With [`Durability::Durable`] it is stable when it returns.
/// - After a failed write any part of the range may have the old or the new content; nothing else changes.
/// - After a failed `flush`, or a durable write that failed for another reason than lack of space, no later `flush`
///   succeeds: what was lost cannot be made good. A write that found no space took nothing with it.
/// - A medium that has become shorter is not made longer again: what was cut off is lost, and every later write and flush
///   says so.
/// - The real causes are kept: [`NoSpace`](crate::error::ErrorKind::NoSpace) for a full medium,
///   [`Backing`](crate::error::ErrorKind::Backing) else, with the system's error as source.
pub trait Backing: fmt::Debug + Send + Sync {
    /// What it is like.
    fn facts(&self) -> BackingFacts;

    /// Fills `data` from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Backing`](crate::error::ErrorKind::Backing), also if the medium has become shorter. `data` is meaningless then.
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error>;

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    ///
    /// See the trait.
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error>;

    /// Does several reads, and puts into each how it went. They may overlap on the backing, not in `memory`.
    ///
    /// One after the other, unless an implementation knows better: on a medium that waits, all of them at once.
    fn read_parts(&self, memory: &mut [u8], parts: &mut [Part]) {
        for Part { offset, range, result } in parts {
            *result = self.read(*offset, &mut memory[range.clone()]);
        }
    }

    /// Does several cached writes, which do not overlap, and puts into each how it went. Else as
    /// [`read_parts`](Self::read_parts).
    fn write_parts(&self, memory: &[u8], parts: &mut [Part]) {
        for Part { offset, range, result } in parts {
            *result = self.write(*offset, &memory[range.clone()], Durability::Cached);
        }
    }

    /// Makes every write that returned before stable.
    ///
    /// # Errors
    ///
    /// [`FlushLost`](crate::error::ErrorKind::FlushLost) from the first failure on.
    fn flush(&self) -> Result<(), Error>;

    /// Gives back the storage of a range; its content is arbitrary afterwards.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::error::ErrorKind::Unsupported) if it cannot; nothing is changed then.
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error>;

    /// Which runs of `offset..offset + len` are allocated: in order, without gaps, at most `extents_max` of them
    /// (so the last may end early). A backing that cannot tell says that all is.
    ///
    /// # Errors
    ///
    /// [`Backing`](crate::error::ErrorKind::Backing).
    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error>;

    /// Hints that a range will be read soon. May do nothing.
    fn prefetch(&self, offset: u64, len: u64);
}
