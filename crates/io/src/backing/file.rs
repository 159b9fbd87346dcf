//! A regular file or block device as backing.
//!
//! Reads and writes are one system call each and allocate nothing; with direct I/O, those that come together are one system call
//! in all. Start reading at [`FileBacking::read_all`].

use super::lock::{self, LockedFile};
use super::stable::{Failed, Ledger, SHORTER};
use super::{Caching, DiscardPolicy, OpenOptions};
use crate::sys::{self, Memory, Moved, TOGETHER_MAX, Which};
use inlinecrypt_core::backing::{Access, Backing, BackingFacts, Durability, Extent, Part};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::fs::{
    Advice, AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Stat, StatxFlags, fallocate,
};
use rustix::io::{Errno, IoSlice, ReadWriteFlags, retry_on_intr};
use std::fs;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What statfs(2) says of a file in memory: `linux/magic.h`.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Alignment for direct I/O where the system does not say: right for every disk there is.
const DIRECT_ALIGN_BYTES: u32 = 4096;

/// A regular file or block device.
#[derive(Debug)]
pub struct FileBacking {
    file: LockedFile,
    /// The same, opened once more. The system tells a failed write-back once to each opening, so this one still tells
    /// what a refused durable write may have collected from `file`. `None` if it could not be opened: then every refusal
    /// counts as a loss.
    witness: Option<OwnedFd>,
    path: PathBuf,
    medium: Medium,
    caching: Caching,
    facts: BackingFacts,
    /// Whether the system takes `RWF_DSYNC` for this file. Only ever becomes false.
    takes_dsync: AtomicBool,
    /// Whether the system takes `RWF_NOWAIT` for this file. Only ever becomes false.
    reads_at_once: AtomicBool,
    /// Whether it never has to be waited for.
    is_in_memory: bool,
    /// Whether the medium was ever found shorter than it was when opened. Only ever becomes true.
    shorter: AtomicBool,
    ledger: Ledger,
}

/// What the file is.
#[derive(Clone, Copy, Debug)]
enum Medium {
    Regular,
    BlockDevice {
        /// Its logical sector, in bytes.
        sector_bytes: u32,
    },
}

impl FileBacking {
    /// Opens and locks the file or block device at `path`.
    ///
    /// # Errors
    ///
    /// See [`open`](super::open).
    pub fn open(path: impl Into<PathBuf>, options: OpenOptions) -> Result<Self, Error> {
        let path = path.into();
        let OpenOptions { access, caching, .. } = options;
        let (file, stat) = open_file(&path, access, caching)?;
        let file = lock::lock(file, &stat, access, &path)?;
        Self::of(file, &stat, path, options)
    }

    /// Takes over the file at `path`, open and locked, that another server handed over. The lock stays that server's until
    /// [`claim`](Self::claim).
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if it is another file, [`Unsupported`](ErrorKind::Unsupported) if it is open in another
    /// way; else as [`open`](super::open).
    pub fn adopt(path: impl Into<PathBuf>, file: OwnedFd, options: OpenOptions) -> Result<Self, Error> {
        let path = path.into();
        let failed = |errno| not_opened(&path, errno);
        let (is, named) =
            (rustix::fs::fstat(&file).map_err(failed)?, rustix::fs::stat(&path).map_err(failed)?);
        check_type(&is, &path)?;
        let refuse = |kind, why: &'static str| Err(Error::new(kind, Op::Open).detail(why));
        if (is.st_dev, is.st_ino) != (named.st_dev, named.st_ino) {
            return refuse(
                ErrorKind::Invalid,
                "the other server serves another file of that name; name that one, or stop that server first",
            );
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(failed)?;
        let access = match flags & OFlags::RWMODE {
            OFlags::RDONLY => Access::ReadOnly,
            _ => Access::ReadWrite,
        };
        let caching = if flags.contains(OFlags::DIRECT) { Caching::Direct } else { Caching::PageCache };
        if access != options.access {
            return refuse(
                ErrorKind::Unsupported,
                match access {
                    Access::ReadOnly => {
                        "the other server serves it for reading alone; say --read-only here, too"
                    }
                    Access::ReadWrite => {
                        "the other server serves it for reading and writing; leave --read-only (read_only) out"
                    }
                },
            );
        }
        if caching != options.caching {
            return refuse(
                ErrorKind::Unsupported,
                match caching {
                    Caching::Direct => "the other server serves it with direct I/O; say --direct here, too",
                    Caching::PageCache => {
                        "the other server serves it through the page cache; leave --direct (direct) out"
                    }
                },
            );
        }
        // It is, in this very opening, so that this changes nothing.
        let file = lock::lock(file, &is, access, &path)?;
        file.disclaim();
        Self::of(file, &is, path, options)
    }

    /// Another descriptor of the opening that holds the lock, for a server that takes it over.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn hand_over(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// The lock of an adopted file is ours now.
    pub fn claim(&self) {
        self.file.claim();
    }

    fn of(file: LockedFile, stat: &Stat, path: PathBuf, options: OpenOptions) -> Result<Self, Error> {
        let OpenOptions { access, caching, discard } = options;
        let witness = match access {
            Access::ReadOnly => None,
            Access::ReadWrite => open_again(&file),
        };

        let failed = |errno: Errno| {
            Error::new(ErrorKind::Backing, Op::Open)
                .detail(path.display().to_string())
                .because(io::Error::from(errno))
        };
        let (medium, len_bytes) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => {
                let sector_bytes = rustix::fs::ioctl_blksszget(&file).map_err(failed)?;
                let len_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(failed)?;
                (Medium::BlockDevice { sector_bytes }, len_bytes)
            }
            // Its length after it was locked: nobody of ours changes it any more.
            _ => (Medium::Regular, file_len(&file).map_err(failed)?),
        };
        if len_bytes == 0 {
            return Err(Error::new(ErrorKind::Invalid, Op::Open).detail(format!(
                "{} is empty; give it a size first, or let --create do so",
                path.display()
            )));
        }
        let align_bytes = match caching {
            Caching::PageCache => 1,
            Caching::Direct => direct_align(&file, medium, &path)?,
        };
        if !len_bytes.is_multiple_of(align_bytes.into()) {
            return Err(Error::new(ErrorKind::Invalid, Op::Open).detail(format!(
                "{} is {len_bytes} bytes long, and direct I/O needs a multiple of {align_bytes} here; serve it \
                 without --direct",
                path.display()
            )));
        }
        let can_discard = access == Access::ReadWrite
            && discard == DiscardPolicy::PassDown
            && match medium {
                Medium::Regular => can_punch(&file, len_bytes),
                Medium::BlockDevice { .. } => can_trim(stat),
            };
        let does_parts_at_once = caching == Caching::Direct && sys::can_transfer_together();
        // A file system that cannot say is like most.
        let is_in_memory = rustix::fs::fstatfs(&file).is_ok_and(|about| about.f_type == TMPFS_MAGIC);
        Ok(Self {
            file,
            witness,
            path,
            medium,
            caching,
            facts: BackingFacts { len_bytes, align_bytes, access, can_discard, does_parts_at_once },
            takes_dsync: AtomicBool::new(true),
            reads_at_once: AtomicBool::new(!is_in_memory),
            is_in_memory,
            shorter: AtomicBool::new(false),
            ledger: Ledger::default(),
        })
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How much of a short transfer counts: with direct I/O, what is left must stay aligned.
    fn usable(&self, transferred: usize) -> usize {
        transferred - transferred % self.facts.align_bytes as usize
    }

    /// Reads as much as can be read without waiting for the medium. `None` if there is no way to ask for that.
    fn read_at_once(&self, into: &mut [u8], offset: u64) -> Option<usize> {
        if !self.reads_at_once.load(Ordering::Relaxed) {
            return None;
        }
        let into = &mut [IoSliceMut::new(into)];
        match rustix::io::preadv2(&self.file, into, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Some(read),
            // Not of every file system, or forbidden.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM) => {
                self.reads_at_once.store(false, Ordering::Relaxed);
                None
            }
            // What is wrong with it shows when it is waited for.
            Err(_) => Some(0),
        }
    }

    fn read_all(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let len = data.len() as u64;
        let mut rest = data;
        let mut at = offset;
        match self.caching {
            Caching::Direct => sys::take_turn_at_once(),
            Caching::PageCache => match self.read_at_once(rest, at) {
                Some(read) if read == rest.len() => return Ok(()),
                Some(read) => {
                    rest = &mut rest[read..];
                    at += read as u64;
                    sys::take_turn_at_once();
                }
                None if self.is_in_memory => {}
                None => sys::take_turn_at_once(),
            },
        }
        while !rest.is_empty() {
            let read = retry_on_intr(|| rustix::io::pread(&self.file, &mut *rest, at))
                .map_err(|errno| world_error(Op::Read, errno, offset, len))?;
            let done = if read == rest.len() { read } else { self.usable(read) };
            if done == 0 {
                return Err(self.note_shorter(Op::Read, Some((offset, len))));
            }
            rest = &mut rest[done..];
            at += done as u64;
        }
        Ok(())
    }

    /// Whether the medium is, or ever was found, shorter than when it was opened. Asked before all that changes it or
    /// calls it stable: writing would make the file long again, and what was cut off, stable or not, would from then on
    /// read as the noise that zeroes decrypt to. One system call that goes to no medium. Who cuts it between that and
    /// the write is not seen here.
    fn is_shorter(&self) -> Result<bool, Errno> {
        if self.shorter.load(Ordering::Relaxed) {
            return Ok(true);
        }
        match self.medium {
            Medium::Regular => Ok(file_len(&self.file)? < self.facts.len_bytes),
            // It takes no write beyond its end.
            Medium::BlockDevice { .. } => Ok(false),
        }
    }

    /// The medium is shorter than it was: nothing is called stable from now on, nor written.
    fn note_shorter(&self, op: Op, range: Option<(u64, u64)>) -> Error {
        self.shorter.store(true, Ordering::Relaxed);
        self.ledger.note_shorter(op, range);
        let error = Error::new(ErrorKind::Backing, op)
            .detail(SHORTER)
            .because(io::Error::from(io::ErrorKind::UnexpectedEof));
        match range {
            Some((offset, len)) => error.at(offset, len),
            None => error,
        }
    }

    /// Writes all of `data` by `write`, one system call of which says how many bytes it wrote.
    fn write_all(
        &self,
        offset: u64,
        data: &[u8],
        write: impl Fn(&[u8], u64) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let written = retry_on_intr(|| write(rest, at))?;
            let done = if written == rest.len() { written } else { self.usable(written) };
            if done == 0 {
                // The system took nothing and gave no reason.
                return Err(Errno::IO);
            }
            rest = &rest[done..];
            at += done as u64;
        }
        Ok(())
    }

    /// Does parts at once where the medium waits and there is a way; what it left undone is then up to `finish`, which is told
    /// how many bytes of each were moved.
    fn move_parts(
        &self,
        mut memory: Memory<'_>,
        parts: &mut [Part],
        op: Op,
        finish: impl Fn(&mut Memory<'_>, &Part, usize) -> Result<(), Error>,
    ) {
        for parts in parts.chunks_mut(TOGETHER_MAX) {
            let mut moved = [Ok(0); TOGETHER_MAX];
            let waiting = match (self.caching, &mut memory) {
                (Caching::Direct, _) => Which::first(parts.len()),
                (Caching::PageCache, Memory::Read(memory)) => {
                    self.read_what_is_there(memory, parts, &mut moved)
                }
                // The page cache takes them.
                (Caching::PageCache, Memory::Write(_)) => Which::default(),
            };
            if waiting.count() > 1 {
                sys::take_turn_at_once();
                sys::transfer_together(self.file.as_fd(), &mut memory, parts, waiting, &mut moved);
            }
            for (part, moved) in parts.iter_mut().zip(moved) {
                let len = part.range.len();
                part.result = match moved {
                    Ok(bytes) if bytes == len => Ok(()),
                    Ok(bytes) => finish(&mut memory, part, self.usable(bytes)),
                    Err(Errno::INTR | Errno::AGAIN) => finish(&mut memory, part, 0),
                    Err(errno) => Err(world_error(op, errno, part.offset, len as u64)),
                };
            }
        }
    }

    /// Reads what the page cache has, and says which parts are left to be waited for: all of which it has not all. Nothing is
    /// left if there is no way to ask for that, or but one part.
    fn read_what_is_there(&self, memory: &mut [u8], parts: &[Part], moved: &mut [Moved]) -> Which {
        let mut left = Which::default();
        if parts.len() < 2 {
            return left;
        }
        for (index, part) in parts.iter().enumerate() {
            match self.read_at_once(&mut memory[part.range.clone()], part.offset) {
                Some(read) if read == part.range.len() => moved[index] = Ok(read),
                Some(_) => left.add(index),
                None => break,
            }
        }
        left
    }

    fn write_cached(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if self.caching == Caching::Direct {
            sys::take_turn_at_once();
        }
        self.write_all(offset, data, |rest, at| rustix::io::pwrite(&self.file, rest, at))
    }

    fn write_durable(&self, offset: u64, data: &[u8]) -> Result<(), Failed> {
        sys::take_turn_at_once();
        if self.takes_dsync.load(Ordering::Relaxed) {
            let written = self.write_all(offset, data, |rest, at| {
                rustix::io::pwritev2(&self.file, &[IoSlice::new(rest)], at, ReadWriteFlags::DSYNC)
            });
            match written {
                // Refused for the flag, before anything was written.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.takes_dsync.store(false, Ordering::Relaxed),
                done => return done.map_err(|errno| self.judge(errno)),
            }
        }
        self.write_cached(offset, data).map_err(|errno| self.judge(errno))?;
        retry_on_intr(|| rustix::fs::fdatasync(&self.file)).map_err(Failed::Lost)
    }

    /// Whether a durable write that failed was but refused. "No space" may be said of this write, or of older ones that
    /// are just being written back; if the latter, making all stable by the witness fails too.
    pub(super) fn judge(&self, errno: Errno) -> Failed {
        match &self.witness {
            Some(witness) if is_no_space(errno) => match retry_on_intr(|| rustix::fs::fdatasync(witness)) {
                Ok(()) => Failed::Refused(errno),
                Err(_) => Failed::Lost(errno),
            },
            _ => Failed::Lost(errno),
        }
    }

    fn discard_sectors(&self, offset: u64, len: u64, sector_bytes: u32) -> Result<(), Errno> {
        // The device takes whole sectors only. What else the range has stays as it is.
        let sector = u64::from(sector_bytes);
        let first = offset.next_multiple_of(sector);
        let end = (offset + len) / sector * sector;
        if first >= end {
            return Ok(());
        }
        retry_on_intr(|| sys::discard_blocks(self.file.as_fd(), first, end - first))
    }
}

impl Backing for FileBacking {
    fn facts(&self) -> BackingFacts {
        self.facts
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.read_all(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        let len = data.len() as u64;
        let looked = self.is_shorter();
        if looked == Ok(true) {
            return Err(self.note_shorter(Op::Write, Some((offset, len))));
        }
        match durability {
            Durability::Cached => looked
                .and_then(|_| self.write_cached(offset, data))
                .map_err(|errno| world_error(Op::Write, errno, offset, len)),
            Durability::Durable => self.ledger.settle(Op::Write, Some((offset, len)), || {
                looked.map_err(Failed::Lost)?;
                self.write_durable(offset, data)
            }),
        }
    }

    fn read_parts(&self, memory: &mut [u8], parts: &mut [Part]) {
        self.move_parts(Memory::Read(memory), parts, Op::Read, |memory, part, done| {
            let Memory::Read(memory) = memory else { unreachable!("it was given so") };
            let Range { start, end } = part.range;
            self.read_all(part.offset + done as u64, &mut memory[start + done..end])
        });
    }

    fn write_parts(&self, memory: &[u8], parts: &mut [Part]) {
        // Asked once for all of them.
        match self.is_shorter() {
            Ok(false) => self.move_parts(Memory::Write(memory), parts, Op::Write, |_, part, done| {
                let Range { start, end } = part.range;
                self.write_cached(part.offset + done as u64, &memory[start + done..end])
                    .map_err(|errno| world_error(Op::Write, errno, part.offset, part.range.len() as u64))
            }),
            Ok(true) => {
                for part in parts {
                    let range = (part.offset, part.range.len() as u64);
                    part.result = Err(self.note_shorter(Op::Write, Some(range)));
                }
            }
            Err(errno) => {
                for part in parts {
                    let len = part.range.len() as u64;
                    part.result = Err(world_error(Op::Write, errno, part.offset, len));
                }
            }
        }
    }

    fn flush(&self) -> Result<(), Error> {
        if self.facts.access == Access::ReadOnly {
            return Ok(());
        }
        let looked = self.is_shorter();
        if looked == Ok(true) {
            // Told by the ledger, below.
            let _ = self.note_shorter(Op::Flush, None);
        }
        // Also makes stable what is needed to find the data: new length, new blocks.
        self.ledger.settle(Op::Flush, None, || {
            looked.map_err(Failed::Lost)?;
            sys::take_turn_at_once();
            retry_on_intr(|| rustix::fs::fdatasync(&self.file)).map_err(Failed::Lost)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        if !self.facts.can_discard {
            return Err(Error::new(ErrorKind::Unsupported, Op::Trim).at(offset, len));
        }
        if self.is_shorter().map_err(|errno| world_error(Op::Trim, errno, offset, len))? {
            return Err(self.note_shorter(Op::Trim, Some((offset, len))));
        }
        let discarded = match self.medium {
            Medium::Regular => retry_on_intr(|| {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.file, hole, offset, len)
            }),
            Medium::BlockDevice { sector_bytes } => self.discard_sectors(offset, len, sector_bytes),
        };
        discarded.map_err(|errno| match errno {
            Errno::OPNOTSUPP => {
                Error::new(ErrorKind::Unsupported, Op::Trim).at(offset, len).because(io::Error::from(errno))
            }
            _ => world_error(Op::Trim, errno, offset, len),
        })
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        let mut runs = Runs { runs: Vec::new(), runs_max: extents_max, at: offset, end: offset + len };
        if matches!(self.medium, Medium::BlockDevice { .. }) {
            runs.push_until(u64::MAX, Allocated::Yes);
            return Ok(runs.runs);
        }
        let failed = |errno| world_error(Op::Extents, errno, offset, len);
        while runs.wants_more() {
            match retry_on_intr(|| rustix::fs::seek(&self.file, SeekFrom::Data(runs.at))) {
                Ok(data) => runs.push_until(data, Allocated::No),
                // A hole to the end of the file. Beyond that, should it have become shorter, reading will tell.
                Err(Errno::NXIO) => {
                    runs.push_until(file_len(&self.file).map_err(failed)?, Allocated::No);
                    runs.push_until(u64::MAX, Allocated::Yes);
                    continue;
                }
                Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                    runs.push_until(u64::MAX, Allocated::Yes);
                    continue;
                }
                Err(errno) => return Err(failed(errno)),
            }
            if !runs.wants_more() {
                break;
            }
            match retry_on_intr(|| rustix::fs::seek(&self.file, SeekFrom::Hole(runs.at))) {
                Ok(hole) if hole > runs.at => runs.push_until(hole, Allocated::Yes),
                // The data that was there has gone meanwhile, or the file has become shorter: be careful, not exact.
                Ok(_) | Err(Errno::NXIO) => runs.push_until(u64::MAX, Allocated::Yes),
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(runs.runs)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        if self.caching == Caching::PageCache {
            // A hint, so a failure means nothing.
            let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(len), Advice::WillNeed);
        }
    }
}

/// Whether storage is allocated to a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Allocated {
    Yes,
    No,
}

/// Extents in the making: in order, without gaps, none empty, neighbours different.
struct Runs {
    runs: Vec<Extent>,
    runs_max: usize,
    /// Where the next one begins.
    at: u64,
    end: u64,
}

impl Runs {
    fn wants_more(&self) -> bool {
        self.at < self.end && self.runs.len() < self.runs_max
    }

    /// Goes on until `until`, or the end if that comes first. Nothing if that lies behind us.
    fn push_until(&mut self, until: u64, allocated: Allocated) {
        let until = until.min(self.end);
        if until <= self.at || self.runs_max == 0 {
            return;
        }
        let (len, allocated) = (until - self.at, allocated == Allocated::Yes);
        let full = self.runs.len() == self.runs_max;
        match self.runs.last_mut() {
            Some(last) if last.allocated == allocated => last.len += len,
            _ if full => return,
            _ => self.runs.push(Extent { offset: self.at, len, allocated }),
        }
        self.at = until;
    }
}

/// The error for what the system said about a range.
pub(super) fn world_error(op: Op, errno: Errno, offset: u64, len: u64) -> Error {
    let kind = match errno {
        errno if is_no_space(errno) => ErrorKind::NoSpace,
        _ => ErrorKind::Backing,
    };
    Error::new(kind, op).at(offset, len).because(io::Error::from(errno))
}

/// Whether the system has no room: on the medium, in a quota, or below the largest length a file may have.
pub(super) fn is_no_space(errno: Errno) -> bool {
    matches!(errno, Errno::NOSPC | Errno::DQUOT | Errno::FBIG)
}

/// Another opening of the same file, for reading and so without claims of its own.
fn open_again(file: &LockedFile) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    retry_on_intr(|| rustix::fs::open(&path, flags, Mode::empty())).ok()
}

fn file_len(file: &LockedFile) -> Result<u64, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

fn open_file(path: &Path, access: Access, caching: Caching) -> Result<(OwnedFd, Stat), Error> {
    // Looked at before it is opened: opening a fifo would wait, and opening some devices does things.
    let before = retry_on_intr(|| rustix::fs::stat(path)).map_err(|errno| not_opened(path, errno))?;
    check_type(&before, path)?;

    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY;
    flags |= match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    if caching == Caching::Direct {
        flags |= OFlags::DIRECT;
    }
    let is_device = FileType::from_raw_mode(before.st_mode) == FileType::BlockDevice;
    if is_device && access == Access::ReadWrite {
        // For block devices: nobody else may have claimed it, and nobody may until it is closed.
        flags |= OFlags::EXCL;
    }
    let file = match retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())) {
        Ok(file) => file,
        Err(Errno::INVAL) if caching == Caching::Direct => {
            return Err(no_direct(path).because(io::Error::from(Errno::INVAL)));
        }
        Err(Errno::BUSY) if is_device => {
            return Err(Error::new(ErrorKind::Busy, Op::Open)
                .detail(format!("{}: {}", path.display(), lock::device_users(&before)))
                .because(io::Error::from(Errno::BUSY)));
        }
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) if access == Access::ReadWrite => {
            let readable = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).is_ok();
            let advice = if readable { "; to serve it all the same, add --read-only" } else { "" };
            return Err(Error::new(ErrorKind::Permission, Op::Open)
                .detail(format!("{} is not writable{advice}", path.display()))
                .because(io::Error::from(errno)));
        }
        Err(errno) => return Err(not_opened(path, errno)),
    };
    let stat = rustix::fs::fstat(&file).map_err(|errno| not_opened(path, errno))?;
    check_type(&stat, path)?;
    Ok((file, stat))
}

fn check_type(stat: &Stat, path: &Path) -> Result<(), Error> {
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => return Ok(()),
        FileType::Directory => "a directory",
        FileType::Fifo => "a fifo",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "something else",
    };
    Err(Error::new(ErrorKind::Invalid, Op::Open)
        .detail(format!("{} is {what}; a regular file or a block device is needed", path.display())))
}

fn not_opened(path: &Path, errno: Errno) -> Error {
    let kind = match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM => ErrorKind::NotFound,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => ErrorKind::Permission,
        Errno::BUSY | Errno::TXTBSY => ErrorKind::Busy,
        Errno::LOOP | Errno::NAMETOOLONG | Errno::INVAL => ErrorKind::Invalid,
        Errno::NOMEM => ErrorKind::OutOfMemory,
        _ => ErrorKind::Backing,
    };
    Error::new(kind, Op::Open).detail(path.display().to_string()).because(io::Error::from(errno))
}

fn no_direct(path: &Path) -> Error {
    Error::new(ErrorKind::Unsupported, Op::Open)
        .detail(format!("{} cannot do direct I/O; serve it without --direct", path.display()))
}

/// What direct I/O asks of offsets, lengths and memory, in bytes.
fn direct_align(file: &LockedFile, medium: Medium, path: &Path) -> Result<u32, Error> {
    let align_bytes = match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(answer) if StatxFlags::from_bits_retain(answer.stx_mask).contains(StatxFlags::DIOALIGN) => {
            if answer.stx_dio_offset_align == 0 {
                return Err(no_direct(path));
            }
            answer.stx_dio_offset_align.max(answer.stx_dio_mem_align)
        }
        // A system or filesystem that does not say.
        _ => match medium {
            Medium::Regular => DIRECT_ALIGN_BYTES,
            Medium::BlockDevice { sector_bytes } => sector_bytes,
        },
    };
    if !align_bytes.is_power_of_two() || align_bytes > DIRECT_ALIGN_BYTES {
        return Err(no_direct(path).because(io::Error::other(format!(
            "it asks for an alignment of {align_bytes} bytes, and we have {DIRECT_ALIGN_BYTES} at most"
        ))));
    }
    Ok(align_bytes)
}

/// Whether holes can be punched, found out by punching one beyond the end, where nothing is.
fn can_punch(file: &LockedFile, len_bytes: u64) -> bool {
    /// Far enough from the last byte that no filesystem block holds both.
    const DISTANCE_BYTES: u64 = 64 << 20;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let beyond = len_bytes.saturating_add(DISTANCE_BYTES) & !0xffff;
    retry_on_intr(|| fallocate(file, hole, beyond, 4096)).is_ok()
}

/// Whether a block device discards, by its queue limits. Partitions have them one level up.
fn can_trim(node: &Stat) -> bool {
    let (major, minor) = (rustix::fs::major(node.st_rdev), rustix::fs::minor(node.st_rdev));
    ["queue", "../queue"].iter().any(|queue| {
        let limit = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/discard_max_bytes"));
        limit.ok().and_then(|text| text.trim().parse::<u64>().ok()).is_some_and(|bytes| bytes > 0)
    })
}
