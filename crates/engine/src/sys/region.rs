//! Memory that two processes map: lanes of orders in front, data behind.

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, ftruncate, memfd_create,
    seek,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

/// A mapping of shared memory, for as long as it is used.
///
/// Nothing in here is a Rust value: it is bytes and atomic numbers that the other process may change at any time. So
/// whoever reads it copies first, checks the copy, and never looks twice.
pub(crate) struct Region {
    start: NonNull<u8>,
    len_bytes: usize,
    descriptor: OwnedFd,
}

// SAFETY: the mapping belongs to the process, not to a thread; access to its content is by atomics, or by who owns a Part.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// New shared memory of `len_bytes`, zeroed, whose length nobody can change any more. Takes no memory until touched.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub(crate) fn create(len_bytes: usize) -> io::Result<Self> {
        let descriptor = memfd_create(c"inlinecrypt data", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&descriptor, len_bytes as u64)?;
        fcntl_add_seals(&descriptor, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(descriptor, len_bytes)
    }

    /// Maps the shared memory that another process has made.
    ///
    /// # Errors
    ///
    /// What the system says; [`InvalidInput`](io::ErrorKind::InvalidInput) if it is shorter than `len_bytes`, or could be made
    /// so, which would end whoever touches what is gone.
    pub(crate) fn map(descriptor: OwnedFd, len_bytes: usize) -> io::Result<Self> {
        if !super::has_fixed_length(&descriptor, len_bytes as u64)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the shared memory has no fixed length"));
        }
        // SAFETY: a new mapping at a place of the system's choice touches no memory of ours; the descriptor is open.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &descriptor,
                0,
            )
        }?;
        let start = NonNull::<u8>::new(start.cast()).ok_or_else(|| io::Error::other("mapped at nothing"))?;
        // Part of a huge page that somebody else refers to would be zeroed, and kept, where a page is given back. A system that
        // has no huge pages refuses.
        // SAFETY: it is about how the mapping made just now is filled, and changes nothing of what is in it.
        let _ = unsafe { madvise(start.as_ptr().cast(), len_bytes, Advice::LinuxNoHugepage) };
        Ok(Self { start, len_bytes, descriptor })
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Gives the pages of a range back to the system; it reads as zeroes afterwards. Whoever else has them keeps them as they
    /// are.
    ///
    /// # Errors
    ///
    /// What the system says; or that it has zeroed pages instead of giving them up.
    fn release(&self, offset: usize, len_bytes: usize) -> io::Result<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.descriptor, how, offset as u64, len_bytes as u64)?;
        match seek(&self.descriptor, SeekFrom::Data(offset as u64)) {
            Ok(data) if data < (offset + len_bytes) as u64 => {
                Err(io::Error::other("pages were not given up"))
            }
            Ok(_) | Err(Errno::NXIO) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn at(&self, offset: usize, len_bytes: usize, align: usize) -> NonNull<u8> {
        let end = offset.checked_add(len_bytes).expect("offsets are far below the end of memory");
        assert!(end <= self.len_bytes && offset.is_multiple_of(align), "inside the region, and aligned");
        // SAFETY: the offset is inside the mapping, checked just now.
        unsafe { self.start.add(offset) }
    }

    /// The number at `offset`, a multiple of 4.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        let at = self.at(offset, 4, 4);
        // SAFETY: mapped, aligned (checked by `at`), for as long as `self` lives; every bit pattern is a number; what other
        // threads and the other process do to it they do atomically, or it is their value that is wrong, not our program.
        unsafe { at.cast::<AtomicU32>().as_ref() }
    }

    /// The number at `offset`, a multiple of 8.
    pub(crate) fn long(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8, 8);
        // SAFETY: as for `word`.
        unsafe { at.cast::<AtomicU64>().as_ref() }
    }

    /// Copies out what is at `offset` now.
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let at = self.at(offset, into.len(), 1);
        // SAFETY: both ranges are mapped and as long; `into` is ours alone, so they do not overlap. The other process may
        // change the source meanwhile: then the copy is a mixture, which its user checks like anything from outside.
        unsafe { std::ptr::copy_nonoverlapping(at.as_ptr(), into.as_mut_ptr(), into.len()) };
    }

    /// Copies `from` to `offset`.
    pub(crate) fn copy_in(&self, offset: usize, from: &[u8]) {
        let at = self.at(offset, from.len(), 1);
        // SAFETY: both ranges are mapped and as long; `from` is not in shared memory, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), at.as_ptr(), from.len()) };
    }

    /// Copies inside the region. The ranges must not overlap.
    pub(crate) fn copy_within(&self, from: usize, to: usize, len_bytes: usize) {
        assert!(from + len_bytes <= to || to + len_bytes <= from, "the ranges do not overlap");
        let (from, to) = (self.at(from, len_bytes, 1), self.at(to, len_bytes, 1));
        // SAFETY: both ranges are mapped and, asserted above, apart. Whoever else writes there meanwhile spoils his own data.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), len_bytes) };
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} bytes)", self.len_bytes)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nobody borrows from it any more. A failure would leave it mapped.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// Lends pieces of a region, page by page, so that no two overlap.
#[derive(Debug)]
pub(crate) struct Parts {
    region: Arc<Region>,
    /// Free ranges: where they begin, and their length. Held for a look-up only.
    free: Mutex<BTreeMap<usize, usize>>,
}

impl Parts {
    /// Lends what lies behind `floor`. The caller gives out nothing of it by other means.
    pub(crate) fn new(region: Arc<Region>, floor: usize) -> Arc<Self> {
        let floor = floor.next_multiple_of(page_bytes());
        let free = BTreeMap::from([(floor, region.len_bytes - floor)]);
        Arc::new(Self { region, free: Mutex::new(free) })
    }

    /// Zeroed memory, or `None` if there is none left in one piece.
    pub(crate) fn lend(self: &Arc<Self>, len_bytes: usize) -> Option<Part> {
        let room = len_bytes.max(1).checked_next_multiple_of(page_bytes())?;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (&offset, &len) = free.iter().find(|(_, len)| **len >= room)?;
        free.remove(&offset);
        if len > room {
            free.insert(offset + room, len - room);
        }
        Some(Part { home: self.clone(), offset, len_bytes })
    }

    /// Takes a range back, and joins it with its free neighbours.
    fn take_back(&self, offset: usize, room: usize) {
        // It must read as zeroes when it is lent again. If the system cannot, nobody gets it again.
        if self.region.release(offset, room).is_err() {
            return;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut start, mut len) = (offset, room);
        if let Some((&before, &its)) = free.range(..offset).next_back()
            && before + its == offset
        {
            free.remove(&before);
            (start, len) = (before, its + len);
        }
        if let Some(its) = free.remove(&(start + len)) {
            len += its;
        }
        free.insert(start, len);
    }
}

fn page_bytes() -> usize {
    rustix::param::page_size()
}

/// A piece of shared memory, lent to one user. Goes home when dropped.
pub(crate) struct Part {
    home: Arc<Parts>,
    offset: usize,
    len_bytes: usize,
}

impl Part {
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let at = self.home.region.at(self.offset, self.len_bytes, 1);
        // SAFETY: mapped for as long as the region, which we hold; ours alone in this process (`Parts`). The engine
        // process writes here only while its caller waits for it with `&mut self` borrowed.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), self.len_bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let at = self.home.region.at(self.offset, self.len_bytes, 1);
        // SAFETY: as for `bytes`, and `&mut self` makes it ours alone.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), self.len_bytes) }
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({} bytes)", self.len_bytes)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.home.take_back(self.offset, self.len_bytes.max(1).next_multiple_of(page_bytes()));
    }
}

/// Bytes in shared memory that an engine process works on by order of another.
///
/// They are nothing but bytes to be transformed: no decision is made from them.
pub(crate) struct View<'r> {
    region: &'r Region,
    offset: usize,
    len_bytes: usize,
}

impl<'r> View<'r> {
    /// The bytes from `offset`, if they are in the region and behind `floor`.
    pub(crate) fn new(region: &'r Region, floor: usize, offset: u64, len_bytes: u64) -> Option<Self> {
        let (offset, len_bytes) = (usize::try_from(offset).ok()?, usize::try_from(len_bytes).ok()?);
        let end = offset.checked_add(len_bytes)?;
        (offset >= floor && end <= region.len_bytes).then_some(Self { region, offset, len_bytes })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        let at = self.region.at(self.offset, self.len_bytes, 1);
        // SAFETY: mapped for as long as the region is borrowed. A host that breaks its promise and writes here while we work
        // gets a mixture of its own bytes: ciphers read and write them, and neither branch nor index by them.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), self.len_bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let at = self.region.at(self.offset, self.len_bytes, 1);
        // SAFETY: as for `bytes`; two lanes told to work on the same bytes mix them up for whoever told them so.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), self.len_bytes) }
    }
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View({} bytes)", self.len_bytes)
    }
}
