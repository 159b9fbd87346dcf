//! A file to measure with, which nobody sees and which is gone however this process ends: it has no name.

use crate::files::{self, Staged};
use crate::report::{Code, Failure};
use crate::size::Size;
use inlinecrypt_core::backing::{Backing as _, Durability};
use inlinecrypt_io::backing::testing::SplitMix64;
use inlinecrypt_io::backing::{FileBacking, OpenOptions};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How much is written at once to fill something, in bytes.
pub(super) const FILL_BYTES: usize = 1 << 20;

/// A file without a name.
#[derive(Debug)]
pub(super) struct Scratch {
    file: OwnedFd,
    /// Where it takes its room.
    pub(super) directory: PathBuf,
}

impl AsFd for Scratch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Scratch {
    /// A file of `size` bytes in the directory `asked`, or in that of the new name `asked`.
    pub(super) fn make(asked: Option<&Path>, size: u64) -> Result<Self, Failure> {
        let directory = directory(asked)?;
        let failed = |errno: Errno| {
            Failure::of_io(
                format!("cannot make a file in {}", directory.display()),
                &errno.into(),
                "Name another directory, with room, that you may write in: --file DIRECTORY",
            )
        };
        let free = rustix::fs::statvfs(&directory).map_err(failed)?;
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        if free < size {
            return Err(Failure::new(
                Code::File,
                format!(
                    "{} has room for {}, and the file is to have {}",
                    directory.display(),
                    Size(free),
                    Size(size)
                ),
                "Name a directory with more room (--file DIRECTORY), or a smaller file (--size SIZE).",
            ));
        }
        let file = open(&directory).map_err(failed)?;
        rustix::fs::ftruncate(&file, size).map_err(failed)?;
        Ok(Self { file, directory })
    }

    /// The same as a backing, filled, so that no figure is that of holes.
    pub(super) fn backing(&self, size: u64) -> Result<Arc<FileBacking>, Failure> {
        let failed = |error| Failure::of(format!("the file in {}", self.directory.display()), &error);
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let backing = FileBacking::open(path, OpenOptions::default()).map_err(failed)?;
        let mut noise = vec![0; FILL_BYTES];
        SplitMix64::new(3).fill(&mut noise);
        for at in (0..size).step_by(FILL_BYTES) {
            let len = noise.len().min(usize::try_from(size - at).unwrap_or(usize::MAX));
            backing.write(at, &noise[..len], Durability::Cached).map_err(failed)?;
        }
        Ok(Arc::new(backing))
    }
}

/// Where the file is made.
fn directory(asked: Option<&Path>) -> Result<PathBuf, Failure> {
    let Some(path) = asked else {
        let temporary = std::env::var_os("TMPDIR").filter(|directory| !directory.is_empty());
        return Ok(temporary.map_or_else(|| PathBuf::from("."), PathBuf::from));
    };
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if files::exists(path) {
        return Err(Failure::new(
            Code::Busy,
            format!("{} exists already, and measuring would overwrite it", path.display()),
            "It was left alone. Name a directory, or something that does not exist yet: --file DIRECTORY",
        ));
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        return Err(Failure::new(
            Code::File,
            format!("cannot make {}: {} is not a directory", path.display(), parent.display()),
            "Name one that there is: --file DIRECTORY",
        ));
    }
    Ok(parent.to_owned())
}

/// A file without a name; where the filesystem has no such, one that has lost it.
fn open(directory: &Path) -> Result<OwnedFd, Errno> {
    let (flags, owner_only) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, owner_only) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            // Its name goes when this is dropped: at once.
            let named = Staged::beside(&directory.join("inlinecrypt-bench"));
            rustix::fs::open(
                named.temporary(),
                flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
                owner_only,
            )
        }
        opened => opened,
    }
}
