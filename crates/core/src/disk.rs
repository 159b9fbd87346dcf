//! What an export sees: a plain disk. It cannot tell that encryption happens.
//!
//! A request is cut into pieces of at most [`CHUNK_BYTES`] at multiples of that; each piece has a [`Span`], which says how
//! much memory it takes (whole data units, and room for the edges) and where in it the payload lies. The export puts the
//! payload of a write right there, and sends the payload of a read from there: nothing is copied on the way.

use crate::backing::{Access, Durability, Extent};
use crate::batch::{Batch, Transfer};
use crate::error::{Error, ErrorKind, Op};
use crate::memory::Buffer;
use std::fmt;
use std::ops::Range;

/// Longest piece of a request that is handled at once, in bytes. Pieces do not cross multiples of it.
///
/// Large enough that system calls do not show, small enough that a piece stays in a core's cache on its way from socket
/// through cipher to file.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Length of a large pool buffer: a chunk, and scratch room for one data unit of the largest kind at an edge.
pub const LARGE_BUFFER_BYTES: usize = CHUNK_BYTES + SCRATCH_BYTES;

/// Scratch room that a span may need behind its data units, in bytes.
pub const SCRATCH_BYTES: usize = 64 * 1024;

/// The longest volume, in bytes: what Linux's offsets can say, with room for rounding.
pub const SIZE_BYTES_MAX: u64 = 1 << 62;

/// The shape of a disk. Constant while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Its size in bytes: a multiple of `logical_block_bytes`.
    pub size_bytes: u64,
    /// Least unit that clients should address, in bytes: a power of two from 512 to 64 KiB.
    pub logical_block_bytes: u32,
    /// Unit at which requests are cheapest, in bytes: a multiple of `logical_block_bytes`.
    pub preferred_block_bytes: u32,
    /// Whether requests that are not whole logical blocks are served all the same, or refused.
    pub unaligned: Unaligned,
    /// Whether it can be written.
    pub access: Access,
    /// Whether trim gives storage back.
    pub can_trim: bool,
    /// Whether the pieces of a batch are on their way to a medium at once, which is waited for: then short requests are best done
    /// together, and long ones by several threads. Durable writes are on their way one by one all the same.
    pub does_batches_at_once: bool,
}

impl Geometry {
    /// Whether a request as a whole may be tried, as [`Disk::check`] says.
    pub(crate) fn check(&self, offset: u64, len: u64, access: Access) -> Result<(), Error> {
        let op = match access {
            Access::ReadOnly => Op::Read,
            Access::ReadWrite => Op::Write,
        };
        let refuse = |kind| Err(Error::new(kind, op).at(offset, len));
        if access == Access::ReadWrite && self.access == Access::ReadOnly {
            return refuse(ErrorKind::ReadOnly);
        }
        if offset.checked_add(len).is_none_or(|end| end > self.size_bytes) {
            return refuse(match access {
                Access::ReadOnly => ErrorKind::OutOfRange,
                Access::ReadWrite => ErrorKind::PastEnd,
            });
        }
        let block_mask = u64::from(self.logical_block_bytes) - 1;
        if self.unaligned == Unaligned::Refused && (offset | len) & block_mask != 0 {
            return refuse(ErrorKind::Misaligned);
        }
        Ok(())
    }
}

/// What becomes of a request that is not a whole number of logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unaligned {
    /// Served, by read-modify-write, without risk to neighbouring bytes.
    Served,
    /// Refused with [`Misaligned`](crate::error::ErrorKind::Misaligned): with this mode an interrupted write would
    /// damage neighbouring bytes.
    Refused,
}

/// A piece of a request: its payload, and the memory that it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where the payload begins on the disk, in bytes.
    pub(crate) offset: u64,
    /// Payload bytes that come after the beginning of the first data unit.
    pub(crate) head: usize,
    /// Length of the payload.
    pub(crate) len: usize,
    /// Length of all data units touched: where scratch room begins.
    pub(crate) units_len: usize,
    /// Scratch bytes behind the data units.
    pub(crate) scratch_len: usize,
}

impl Span {
    /// The piece of a request at `offset`, at most `len` bytes long, on a disk of data units of `unit_bytes`: shortened
    /// so that its memory fits `buffer_bytes` and it does not cross a multiple of [`CHUNK_BYTES`].
    ///
    /// # Panics
    ///
    /// If `len` is 0, `unit_bytes` not a power of two up to 64 KiB, or `buffer_bytes` less than [`SMALL_BUFFER_BYTES`].
    #[must_use]
    pub fn cut(unit_bytes: u32, offset: u64, len: u64, buffer_bytes: usize) -> Self {
        assert!(len > 0 && buffer_bytes >= SMALL_BUFFER_BYTES, "promised by the caller");
        assert!(unit_bytes.is_power_of_two() && unit_bytes as usize <= SCRATCH_BYTES, "promised by the disk");
        let unit = u64::from(unit_bytes);
        let floor = |at: u64| at & !(unit - 1);
        let units_start = floor(offset);
        // Whole data units that fit beside the scratch room of one.
        let room = floor(buffer_bytes as u64 - unit);
        let chunk_end = (offset / CHUNK_BYTES as u64 + 1) * CHUNK_BYTES as u64;
        let end = offset.saturating_add(len).min(chunk_end).min(units_start + room);
        let units_end = end.next_multiple_of(unit);
        let partial = offset != units_start || end != units_end;
        let small = |bytes: u64| usize::try_from(bytes).expect("at most a chunk and a data unit");
        Self {
            offset,
            head: small(offset - units_start),
            len: small(end - offset),
            units_len: small(units_end - units_start),
            scratch_len: if partial { small(unit) } else { 0 },
        }
    }

    /// The same payload on a disk of data units of `unit_bytes`. Pieces do not cross a multiple of [`CHUNK_BYTES`], so
    /// it stays one piece.
    pub(crate) fn recut(&self, unit_bytes: u32) -> Self {
        let span = Self::cut(unit_bytes, self.offset, self.len as u64, LARGE_BUFFER_BYTES);
        assert!(span.len == self.len, "a piece lies within a chunk");
        span
    }

    /// How many bytes of memory the piece takes.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.units_len + self.scratch_len
    }

    /// Where in that memory the payload lies.
    #[must_use]
    pub fn payload(&self) -> Range<usize> {
        self.head..self.head + self.len
    }

    /// Where the data units lie on the disk, in bytes.
    pub(crate) fn units(&self) -> Range<u64> {
        let start = self.offset - self.head as u64;
        start..start + self.units_len as u64
    }

    /// The payload's bytes on the disk.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len as u64
    }

    /// Where the payload lies on the disk, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// As slow as it takes.
    AnySpeed,
    /// Only if it is faster than writing them; else refuse at once.
    OnlyIfFast,
}

/// What an export sees: a plain disk.
///
/// All methods may be called from many threads at once and block until done. Ranges may overlap; each piece is then
/// applied whole, before or after the other. Errors carry the kind that [`errno`](crate::error::ErrorKind::errno) maps.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Its shape.
    fn geometry(&self) -> Geometry;

    /// A large buffer if one is free: it suffices for every span. Does not wait.
    fn try_large_buffer(&self) -> Option<Buffer>;

    /// A buffer of the caller's own, of `len_bytes`.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`](crate::error::ErrorKind::OutOfMemory).
    fn private_buffer(&self, len_bytes: usize) -> Result<Buffer, Error>;

    /// The piece of a request at `offset`, at most `len` bytes long and shortened so that its memory fits
    /// `buffer_bytes` and it does not cross a multiple of [`CHUNK_BYTES`]. Never empty.
    ///
    /// # Panics
    ///
    /// If `len` is 0 or `buffer_bytes` less than [`SMALL_BUFFER_BYTES`].
    fn span(&self, offset: u64, len: u64, buffer_bytes: usize) -> Span;

    /// Whether a request as a whole may be tried: within the disk, aligned as far as it must be, and allowed.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`](crate::error::ErrorKind::OutOfRange) or, for writes,
    /// [`PastEnd`](crate::error::ErrorKind::PastEnd);
    /// [`Misaligned`](crate::error::ErrorKind::Misaligned); [`ReadOnly`](crate::error::ErrorKind::ReadOnly).
    fn check(&self, offset: u64, len: u64, access: Access) -> Result<(), Error>;

    /// Does all pieces of `batch`, whose memory is in `buffer`, and leaves with each how it went.
    ///
    /// The payload of a write must be in its place before; the content of its place is meaningless afterwards. The
    /// payload of a read is in its place afterwards, unless it failed. The pieces of a failed write may have the old or
    /// the new content on the disk. A piece that fails fails alone, but for a failure of the engine: that hits all that
    /// were read, or all that were written.
    fn transfer(&self, batch: &mut Batch, buffer: &mut Buffer);

    /// Reads a piece: afterwards its payload is in `buffer`.
    ///
    /// # Errors
    ///
    /// What the backing or the engine says. The buffer's content is meaningless then.
    fn read(&self, span: Span, buffer: &mut Buffer) -> Result<(), Error> {
        let mut batch = Batch::of_one(span, Transfer::Read);
        self.transfer(&mut batch, buffer);
        batch.into_only_result()
    }

    /// Writes a piece whose payload is in `buffer`. Afterwards the buffer's content is meaningless.
    ///
    /// # Errors
    ///
    /// What the backing or the engine says. Any part of the range may have the old or the new content then.
    fn write(&self, span: Span, buffer: &mut Buffer, durability: Durability) -> Result<(), Error> {
        let mut batch = Batch::of_one(span, Transfer::Write(durability));
        self.transfer(&mut batch, buffer);
        batch.into_only_result()
    }

    /// Makes every write that returned before stable.
    ///
    /// # Errors
    ///
    /// [`FlushLost`](crate::error::ErrorKind::FlushLost) from the first failure on.
    fn flush(&self) -> Result<(), Error>;

    /// Gives storage back where whole data units are concerned; their content is arbitrary afterwards. The rest of
    /// the range is left as it is.
    ///
    /// # Errors
    ///
    /// What the backing says.
    fn trim(&self, offset: u64, len: u64) -> Result<(), Error>;

    /// Makes a range read as zeroes. `scratch` is any buffer of [`SMALL_BUFFER_BYTES`] or more; the larger, the faster.
    ///
    /// Writes them, unless a disk knows better. An encrypted one does not: a hole would not read as zeroes, it decrypts to
    /// noise, here as in dm-crypt.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::error::ErrorKind::Unsupported) at once, if it had to be fast and is not.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        zeroing: Zeroing,
        durability: Durability,
        scratch: &mut Buffer,
    ) -> Result<(), Error> {
        self.check(offset, len, Access::ReadWrite)?;
        if zeroing == Zeroing::OnlyIfFast {
            return Err(Error::new(ErrorKind::Unsupported, Op::WriteZeroes).at(offset, len));
        }
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let span = self.span(at, end - at, scratch.bytes().len());
            scratch.bytes_mut()[span.payload()].fill(0);
            self.write(span, scratch, Durability::Cached)?;
            at += span.len as u64;
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.flush(),
        }
    }

    /// Which runs of a range are allocated, at most `extents_max` of them, in order and without gaps.
    ///
    /// # Errors
    ///
    /// What the backing says.
    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error>;

    /// Hints that a range will be read soon.
    fn prefetch(&self, offset: u64, len: u64);
}

/// Least length of a buffer that every disk can work with: one data unit of the largest kind and its scratch room.
pub const SMALL_BUFFER_BYTES: usize = 2 * SCRATCH_BYTES;
