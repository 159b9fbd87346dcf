//! New backing files, whole or not at all.

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::path::Path;

/// Creates a file of `len_bytes` to serve as backing: sparse, readable and writable for its owner alone, and stable on
/// the medium when this returns. On failure no file is left behind.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if something of that name exists, or the length is 0 or more than the filesystem takes;
/// [`ErrorKind::NotFound`] if its directory does not exist; [`ErrorKind::Permission`]; [`ErrorKind::NoSpace`];
/// [`ErrorKind::Backing`] else.
pub fn create_file(path: impl AsRef<Path>, len_bytes: u64) -> Result<(), Error> {
    let path = path.as_ref();
    let name = path.display();
    if len_bytes == 0 {
        return Err(Error::new(ErrorKind::Invalid, Op::Create).detail(format!("{name} would be empty")));
    }
    let too_large = || {
        Error::new(ErrorKind::Invalid, Op::Create).detail(format!(
            "{name} would be {len_bytes} bytes long, which is more than its filesystem takes in one file"
        ))
    };
    if i64::try_from(len_bytes).is_err() {
        return Err(too_large());
    }

    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::io::retry_on_intr(|| rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR))
        .map_err(|errno| not_created(path, errno))?;
    let half_made = HalfMade { path };
    match rustix::io::retry_on_intr(|| rustix::fs::ftruncate(&file, len_bytes)) {
        Ok(()) => {}
        // INVAL is what some filesystems say instead; the length is all that could be invalid.
        Err(errno @ (Errno::FBIG | Errno::INVAL)) => return Err(too_large().because(io::Error::from(errno))),
        Err(errno) => return Err(not_created(path, errno)),
    }
    rustix::io::retry_on_intr(|| rustix::fs::fsync(&file)).map_err(|errno| not_created(path, errno))?;
    sync_directory_of(path).map_err(|errno| not_created(path, errno))?;
    std::mem::forget(half_made);
    Ok(())
}

/// A file that is not ready yet. Removed when dropped.
struct HalfMade<'a> {
    path: &'a Path,
}

impl Drop for HalfMade<'_> {
    fn drop(&mut self) {
        // An error is on its way already; this one would not help.
        let _ = fs::remove_file(self.path);
    }
}

fn sync_directory_of(path: &Path) -> Result<(), Errno> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::io::retry_on_intr(|| rustix::fs::open(directory, flags, Mode::empty())) {
        // A directory may be writable and yet not readable. The name is then as stable as we can make it.
        Err(Errno::ACCESS) => return Ok(()),
        opened => opened?,
    };
    match rustix::io::retry_on_intr(|| rustix::fs::fsync(&directory)) {
        // Filesystems that cannot do this for directories.
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        done => done,
    }
}

fn not_created(path: &Path, errno: Errno) -> Error {
    let name = path.display();
    let (kind, detail) = match errno {
        Errno::EXIST => {
            let advice = "exists already; serve it without --create, or pick another name";
            return Error::new(ErrorKind::Invalid, Op::Create).detail(format!("{name} {advice}"));
        }
        Errno::NOENT | Errno::NOTDIR => (ErrorKind::NotFound, format!("the directory of {name}")),
        Errno::ACCESS | Errno::PERM | Errno::ROFS => {
            (ErrorKind::Permission, format!("{name} may not be created"))
        }
        Errno::NOSPC | Errno::DQUOT => (ErrorKind::NoSpace, name.to_string()),
        Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL | Errno::ISDIR => {
            (ErrorKind::Invalid, format!("{name} is not a name for a file"))
        }
        _ => (ErrorKind::Backing, name.to_string()),
    };
    Error::new(kind, Op::Create).detail(detail).because(io::Error::from(errno))
}
