//! Pieces of requests that are done together, in one buffer: what many small requests have in common costs once.
//!
//! Each piece has a place of its own in the buffer, laid out by its [`Span`], and a result of its own. What a batch leaves
//! behind is what its pieces would leave one after the other, since a piece that overlaps another is not let in unless
//! both are read. A batch is made to be used again: it keeps its memory when cleared.

use crate::backing::{Access, Backing, Durability, Part};
use crate::disk::Span;
use crate::engine::Piece;
use crate::error::{Error, ErrorKind, Op};
use crate::memory::Buffer;
use crate::range_lock::{RangeGuard, RangeLock, Sharing};
use std::ops::Range;

/// What is to be done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From the disk into the buffer.
    Read,
    /// From the buffer to the disk.
    Write(Durability),
}

impl Transfer {
    /// What it asks of the disk.
    #[must_use]
    pub fn access(self) -> Access {
        match self {
            Self::Read => Access::ReadOnly,
            Self::Write(_) => Access::ReadWrite,
        }
    }
}

/// A piece of a batch.
#[derive(Debug)]
pub struct Item {
    span: Span,
    transfer: Transfer,
    /// Where its memory begins in the buffer.
    at: usize,
    /// How it went, or is going.
    result: Result<(), Error>,
}

impl Item {
    /// A piece whose memory begins at `at`.
    pub(crate) fn placed(span: Span, transfer: Transfer, at: usize) -> Self {
        Self { span, transfer, at, result: Ok(()) }
    }

    /// The piece.
    #[must_use]
    pub fn span(&self) -> Span {
        self.span
    }

    /// What is to be done with it.
    #[must_use]
    pub fn transfer(&self) -> Transfer {
        self.transfer
    }

    /// Where in the buffer its payload lies.
    #[must_use]
    pub fn payload(&self) -> Range<usize> {
        let Range { start, end } = self.span.payload();
        self.at + start..self.at + end
    }

    /// How it went. `Ok` before it was tried.
    ///
    /// # Errors
    ///
    /// What the backing or the engine says.
    pub fn result(&self) -> &Result<(), Error> {
        &self.result
    }

    /// Remembers how it went.
    pub fn set_result(&mut self, result: Result<(), Error>) {
        self.result = result;
    }

    /// Where in the buffer its data units lie.
    pub(crate) fn units(&self) -> Range<usize> {
        self.at..self.at + self.span.units_len
    }

    /// Where in the buffer its memory ends, scratch room included.
    pub(crate) fn end(&self) -> usize {
        self.at + self.span.buffer_bytes()
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Whether the buffer has its memory.
    pub(crate) fn fits(&self, buffer: &Buffer) -> Result<(), Error> {
        if buffer.bytes().len() < self.end() {
            return Err(Error::new(ErrorKind::Invalid, Op::Allocate).detail("the buffer is too small"));
        }
        Ok(())
    }

    pub(crate) fn into_result(self) -> Result<(), Error> {
        self.result
    }

    /// Completes the first and last data unit of a write with what is on the disk. `read_edge` puts the data unit at an
    /// offset of the disk into the scratch room, the range that it is told.
    pub(crate) fn fill_edges(
        &self,
        unit_bytes: u64,
        buffer: &mut Buffer,
        mut read_edge: impl FnMut(u64, Range<usize>, &mut Buffer) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (payload, place, units) = (self.payload(), self.units(), self.span.units());
        let unit = usize::try_from(unit_bytes).expect("at most 64 KiB");
        let scratch = place.end..place.end + unit;
        let last = place.end - unit;
        if payload.start > place.start {
            read_edge(units.start, scratch.clone(), buffer)?;
            let head = payload.start - place.start;
            buffer.bytes_mut().copy_within(scratch.start..scratch.start + head, place.start);
            if last == place.start {
                // The same data unit also holds what comes behind the payload.
                let tail = payload.end - place.start;
                buffer.bytes_mut().copy_within(scratch.start + tail..scratch.end, payload.end);
                return Ok(());
            }
        }
        if payload.end < place.end {
            read_edge(units.end - unit_bytes, scratch.clone(), buffer)?;
            buffer.bytes_mut().copy_within(scratch.start + (payload.end - last)..scratch.end, payload.end);
        }
        Ok(())
    }

    /// What is sent to the backing of a piece that is written, and where its bytes are: whole granules, and no more than
    /// hold the payload.
    fn stored(&self, granule: u64) -> (u64, Range<usize>) {
        // The other sectors of a data unit have the very bytes that are on the disk.
        let start = self.span.offset & !(granule - 1);
        let end = (self.span.offset + self.span.len as u64).next_multiple_of(granule);
        let units = self.span.units();
        let within = |at: u64| self.at + usize::try_from(at - units.start).expect("within the buffer");
        (start, within(start)..within(end))
    }

    /// Whether it needs this access and has not failed.
    #[must_use]
    pub fn goes(&self, access: Access) -> bool {
        self.transfer.access() == access && self.result.is_ok()
    }
}

/// Pieces that are done together.
#[derive(Debug, Default)]
pub struct Batch {
    pub(crate) items: Vec<Item>,
    /// What the engine is told of them; here for its memory only.
    pub(crate) pieces: Vec<Piece>,
    /// What the backing is told of them; likewise.
    pub(crate) parts: Vec<Part>,
    writes: usize,
    end: usize,
}

impl Batch {
    /// A batch of one piece, at the beginning of its buffer.
    #[must_use]
    pub fn of_one(span: Span, transfer: Transfer) -> Self {
        let item = Item { span, transfer, at: 0, result: Ok(()) };
        Self { items: vec![item], ..Self::default() }
    }

    /// Takes a piece in and says where in the buffer its payload lies. `None`, and nothing has changed, if a buffer of
    /// `buffer_bytes` has no room for it beside the others, or it overlaps one of them and one of the two is written.
    ///
    /// All pieces of a batch are of one disk.
    pub fn push(&mut self, span: Span, transfer: Transfer, buffer_bytes: usize) -> Option<Range<usize>> {
        let item = Item { span, transfer, at: self.end, result: Ok(()) };
        if item.end() > buffer_bytes {
            return None;
        }
        let is_write = transfer != Transfer::Read;
        if is_write || self.writes > 0 {
            let range = span.units();
            let clashes = self.items.iter().any(|other| {
                let units = other.span.units();
                let overlaps = units.start < range.end && range.start < units.end;
                overlaps && (is_write || other.transfer != Transfer::Read)
            });
            if clashes {
                return None;
            }
        }
        self.writes += usize::from(is_write);
        self.end = item.end();
        let payload = item.payload();
        self.items.push(item);
        Some(payload)
    }

    /// A batch of pieces that have their places already.
    pub(crate) fn of_placed(items: Vec<Item>) -> Self {
        Self { items, ..Self::default() }
    }

    /// Its pieces, in the order in which they came.
    #[must_use]
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Its pieces, for a disk that does them.
    pub fn items_mut(&mut self) -> &mut [Item] {
        &mut self.items
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Makes it empty.
    pub fn clear(&mut self) {
        self.items.clear();
        (self.writes, self.end) = (0, 0);
    }

    /// Locks the data units of all pieces that take part; those that are only read, together with others that read.
    ///
    /// # Blocking
    ///
    /// Waits until all of them are free.
    pub(crate) fn lock<'l>(&self, locks: &'l RangeLock) -> RangeGuard<'l> {
        locks.take_all(self.items.iter().filter(|item| item.result().is_ok()).map(|item| {
            let sharing = match item.transfer() {
                Transfer::Read => Sharing::Shared,
                Transfer::Write(_) => Sharing::Exclusive,
            };
            (item.span().units(), sharing)
        }))
    }

    /// Does with `work` what `part_of` says of the pieces that take part, in one go: where on the backing, where in the buffer.
    pub(crate) fn do_parts(
        &mut self,
        part_of: impl Fn(&Item) -> Option<(u64, Range<usize>)>,
        work: impl FnOnce(&mut [Part]),
    ) {
        let Self { items, parts, .. } = self;
        let part = |(offset, range)| Part { offset, range, result: Ok(()) };
        parts.extend(items.iter().filter_map(|item| part_of(item).map(part)));
        if !parts.is_empty() {
            work(parts);
        }
        let took_part = items.iter_mut().filter(|item| part_of(item).is_some());
        for (item, part) in took_part.zip(parts.drain(..)) {
            item.set_result(part.result);
        }
    }

    /// Sends what is written and has not failed to `backing`, in multiples of `granule` bytes.
    pub(crate) fn store(&mut self, backing: &dyn Backing, granule: u64, buffer: &Buffer) {
        let cached = |item: &Item| item.transfer() == Transfer::Write(Durability::Cached);
        self.do_parts(
            |item| (item.result().is_ok() && cached(item)).then(|| item.stored(granule)),
            |parts| backing.write_parts(buffer.bytes(), parts),
        );
        for item in self.items.iter_mut().filter(|item| item.goes(Access::ReadWrite) && !cached(item)) {
            let (start, range) = item.stored(granule);
            item.set_result(backing.write(start, &buffer.bytes()[range], Durability::Durable));
        }
    }

    /// If `result` is an error, it is that of all pieces with this access that have not failed.
    pub(crate) fn fail(&mut self, access: Access, result: Result<(), Error>) {
        let Err(error) = result else { return };
        for item in self.items.iter_mut().filter(|item| item.goes(access)) {
            item.set_result(Err(error.duplicate()));
        }
    }

    /// The result of its only piece.
    pub(crate) fn into_only_result(mut self) -> Result<(), Error> {
        self.items.pop().map_or(Ok(()), |item| item.result)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const ROOM: usize = 1 << 18;
    const WRITE: Transfer = Transfer::Write(Durability::Cached);

    fn span(offset: u64, len: u64) -> Span {
        Span::cut(4096, offset, len, ROOM)
    }

    #[test]
    fn places_do_not_overlap_and_end_with_the_buffer() {
        let mut batch = Batch::default();
        let mut end = 0;
        // One of each three begins and ends inside a data unit, so it has scratch room behind it.
        for index in 0.. {
            let span = if index % 3 == 0 { span(index * 8192 + 100, 200) } else { span(index * 8192, 4096) };
            let Some(payload) = batch.push(span, WRITE, ROOM) else { break };
            assert!(payload.start >= end && payload.end <= ROOM);
            end = batch.items().last().unwrap().end();
        }
        assert!(end > ROOM - 8192, "{end}");
        batch.clear();
        assert_eq!(batch.push(span(100, 200), WRITE, ROOM), Some(100..300));
    }

    #[test]
    fn only_reads_may_overlap() {
        let mut batch = Batch::default();
        let mut takes = |offset, transfer| batch.push(span(offset, 512), transfer, ROOM).is_some();
        assert!(takes(0, Transfer::Read));
        assert!(takes(0, Transfer::Read));
        assert!(!takes(512, WRITE), "the same data unit");
        assert!(takes(4096, WRITE));
        assert!(!takes(4608, WRITE));
        assert!(!takes(4608, Transfer::Read));
        assert!(takes(0, Transfer::Read));
    }
}
