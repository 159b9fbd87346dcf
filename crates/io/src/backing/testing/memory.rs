//! A disk in memory.

use super::enter;
use inlinecrypt_core::backing::{Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

/// Unit of allocation, in bytes.
const PAGE_BYTES: usize = 4096;

/// A sparse disk in memory. What was never written, or was discarded in whole pages of 4096 bytes, reads as zeroes and
/// takes no memory.
pub struct MemBacking {
    facts: BackingFacts,
    pages: Mutex<BTreeMap<u64, Box<[u8; PAGE_BYTES]>>>,
}

impl MemBacking {
    /// An empty disk of `len_bytes` that can be written and discarded, with any alignment.
    #[must_use]
    pub fn new(len_bytes: u64) -> Self {
        Self { facts: super::facts_in_memory(len_bytes), pages: Mutex::default() }
    }

    /// The same disk with other facts, of which the length must not grow.
    ///
    /// # Panics
    ///
    /// If it did.
    #[must_use]
    pub fn with_facts(self, facts: BackingFacts) -> Self {
        assert!(facts.len_bytes <= self.facts.len_bytes, "a disk does not grow");
        Self { facts, ..self }
    }

    /// How much memory its content takes, in bytes.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        (enter(&self.pages).len() * PAGE_BYTES) as u64
    }

    /// All its content from `offset` on, as a copy: for tests that look at the ciphertext.
    ///
    /// # Panics
    ///
    /// If the range does not lie on the disk.
    #[must_use]
    pub fn snapshot(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.read(offset, &mut data).expect("range on the disk");
        data
    }

    fn check(&self, op: Op, offset: u64, len: u64) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.facts.len_bytes => Ok(()),
            _ => Err(Error::new(ErrorKind::Backing, op).at(offset, len).detail("past the end")),
        }
    }
}

impl fmt::Debug for MemBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { facts, pages } = self;
        let pages = enter(pages).len();
        f.debug_struct("MemBacking").field("facts", facts).field("pages", &pages).finish()
    }
}

/// The pieces of a range, page by page: page number, where in the page, where in the data.
fn pieces(
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let page_bytes = PAGE_BYTES as u64;
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let head = usize::try_from(at % page_bytes).expect("less than a page");
        let take = (PAGE_BYTES - head).min(len - done);
        let piece = (at / page_bytes, head..head + take, done..done + take);
        done += take;
        Some(piece)
    })
}

impl Backing for MemBacking {
    fn facts(&self) -> BackingFacts {
        self.facts
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.check(Op::Read, offset, data.len() as u64)?;
        let pages = enter(&self.pages);
        for (page, in_page, in_data) in pieces(offset, data.len()) {
            match pages.get(&page) {
                Some(bytes) => data[in_data].copy_from_slice(&bytes[in_page]),
                None => data[in_data].fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _durability: Durability) -> Result<(), Error> {
        self.check(Op::Write, offset, data.len() as u64)?;
        let mut pages = enter(&self.pages);
        for (page, in_page, in_data) in pieces(offset, data.len()) {
            let bytes = pages.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES]));
            bytes[in_page].copy_from_slice(&data[in_data]);
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        if !self.facts.can_discard {
            return Err(Error::new(ErrorKind::Unsupported, Op::Trim).at(offset, len));
        }
        self.check(Op::Trim, offset, len)?;
        let page_bytes = PAGE_BYTES as u64;
        let (first, end) = (offset.div_ceil(page_bytes), (offset + len) / page_bytes);
        let mut pages = enter(&self.pages);
        if first < end {
            let mut dropped = pages.split_off(&first);
            pages.append(&mut dropped.split_off(&end));
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.check(Op::Extents, offset, len)?;
        let page_bytes = PAGE_BYTES as u64;
        let end = offset + len;
        let pages = enter(&self.pages);
        let mut runs: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let page = at / page_bytes;
            let allocated = pages.contains_key(&page);
            let until = if allocated {
                (page + 1) * page_bytes
            } else {
                pages.range(page..).next().map_or(end, |(next, _)| next * page_bytes)
            };
            let len = until.min(end) - at;
            let full = runs.len() >= extents_max;
            match runs.last_mut() {
                Some(last) if last.allocated == allocated => last.len += len,
                _ if full => break,
                _ => runs.push(Extent { offset: at, len, allocated }),
            }
            at += len;
        }
        Ok(runs)
    }

    fn prefetch(&self, _offset: u64, _len: u64) {}
}
