//! The file of a root: opened only if nobody else can reach it, written whole or not at all.

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// Opens a file for reading that belongs to us or to root, and that nobody else can reach. Symbolic links are followed.
pub(super) fn open(path: &Path) -> Result<OwnedFd, Error> {
    let failed = |errno| failed(Op::Open, path, errno);
    // Not blocking: opening a FIFO would wait for a writer for ever.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    let status = rustix::fs::fstat(&file).map_err(failed)?;
    let access = Access {
        is_file: FileType::from_raw_mode(status.st_mode) == FileType::RegularFile,
        permissions: status.st_mode & 0o7777,
        owner: status.st_uid,
        us: rustix::process::geteuid().as_raw(),
    };
    access.check(path).map_err(|(kind, why)| refused(kind, Op::Open, path, &why))?;
    Ok(file)
}

/// Gives `bytes` the name `path`, unless something has it: `false` then. What has the name is on the disk after this,
/// whoever made it. Directories that are missing on the way are made, too, for their owner alone.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<bool, Error> {
    let failed = |errno| failed(Op::Create, path, errno);
    let (directory, name) = split(path)
        .ok_or_else(|| refused(ErrorKind::Invalid, Op::Create, path, "does not end in a file's name"))?;
    let missing = directory.ancestors().take_while(|directory| !is_there(directory)).count();
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(
        |why| match Errno::from_io_error(&why) {
            Some(errno) => failed(errno),
            None => error(ErrorKind::EngineFailed, Op::Create, path, "no directory for it").because(why),
        },
    )?;
    let temporary = Temporary::write(directory, name, bytes).map_err(failed)?;
    // Unlike a rename, a link never replaces what is there.
    let linked = match rustix::fs::linkat(CWD, &temporary.path, CWD, path, AtFlags::empty()) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(errno) => return Err(failed(errno)),
    };
    drop(temporary);
    // Keys wrapped under a root that a power cut takes away would be lost. So the names have to be on the disk: the
    // file's, and those of the directories made for it. If somebody else was faster, do not rely on him having come
    // to this step.
    for directory in directory.ancestors().take(missing + 1) {
        sync_directory(directory).map_err(failed)?;
    }
    Ok(linked)
}

/// Gives `bytes` the name `path` instead of the file that has it now. That one is as it was until all of the new one is
/// on the disk.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |errno| failed(Op::Create, path, errno);
    // The file itself, where `path` is a link to it.
    let path =
        fs::canonicalize(path).map_err(|why| failed(Errno::from_io_error(&why).unwrap_or(Errno::IO)))?;
    let (directory, name) = split(&path).expect("a file that is there has a name");
    let temporary = Temporary::write(directory, name, bytes).map_err(failed)?;
    rustix::fs::rename(&temporary.path, &path).map_err(failed)?;
    sync_directory(directory).map_err(failed)
}

/// Who can reach a file, by its status.
pub(super) struct Access {
    pub(super) is_file: bool,
    pub(super) permissions: u32,
    pub(super) owner: u32,
    pub(super) us: u32,
}

impl Access {
    /// Whether nobody but us (and root, who can do anything) reads or writes the file. Checked by hand: the system
    /// lets root open everything.
    pub(super) fn check(&self, path: &Path) -> Result<(), (ErrorKind, String)> {
        let &Self { is_file, permissions, owner, us } = self;
        let path = shell_word(path);
        if !is_file {
            return Err((ErrorKind::Invalid, "is not a regular file; a root is kept in one".into()));
        }
        if owner != us && owner != 0 {
            return Err((
                ErrorKind::Permission,
                format!(
                    "belongs to user {owner}, and we are user {us}; if it is to be trusted, run: chown {us} {path}"
                ),
            ));
        }
        if permissions & 0o077 != 0 {
            return Err((
                ErrorKind::Permission,
                format!("has mode {permissions:04o}, so others can reach it; run: chmod 600 {path}"),
            ));
        }
        Ok(())
    }
}

/// `path` as a person can paste it into a shell.
pub(super) fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&byte)) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

pub(super) fn read_up_to(file: &mut File, bytes: &mut [u8]) -> std::io::Result<usize> {
    let mut len = 0;
    while len < bytes.len() {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
    Ok(len)
}

/// A file under a name that nobody knows, complete and on the disk. Removed when dropped.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn write(directory: &Path, name: &std::ffi::OsStr, bytes: &[u8]) -> Result<Self, Errno> {
        let random = getrandom::u64().map_err(|_no_randomness| Errno::IO)?;
        let mut temporary = OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{random:016x}.tmp"));
        let path = directory.join(temporary);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let owner_only = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::open(&path, flags, owner_only)?;
        let this = Self { path };
        // The umask may have taken away the owner's own bits.
        rustix::fs::fchmod(&file, owner_only)?;
        let mut file = File::from(file);
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|why| Errno::from_io_error(&why).unwrap_or(Errno::IO))?;
        Ok(this)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing uses it if it stays.
        let _ = fs::remove_file(&self.path);
    }
}

/// The directory of `path`, and the name in it.
pub(super) fn split(path: &Path) -> Option<(&Path, &std::ffi::OsStr)> {
    let name = path.file_name()?;
    let directory = path.parent()?;
    Some((or_here(directory), name))
}

/// `directory`, or the one we are in if its name is empty: what the ancestors of a relative path end in.
fn or_here(directory: &Path) -> &Path {
    if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
}

fn is_there(directory: &Path) -> bool {
    // Not to be reached counts as there: making it will say why.
    or_here(directory).try_exists().unwrap_or(true)
}

fn sync_directory(directory: &Path) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::fsync(rustix::fs::open(or_here(directory), flags, Mode::empty())?)
}

/// The error for what the system answered.
pub(super) fn failed(op: Op, path: &Path, errno: Errno) -> Error {
    let (kind, why) = match errno {
        Errno::NOENT => (
            ErrorKind::NotFound,
            "is not there; correct the name, or make a new root: inlinecrypt root create",
        ),
        Errno::ACCESS | Errno::PERM => {
            (ErrorKind::Permission, "may not be reached by us; run as the user that it belongs to")
        }
        Errno::ROFS => (ErrorKind::Permission, "is on a read-only file system"),
        Errno::NOSPC | Errno::DQUOT => (ErrorKind::NoSpace, "has no room"),
        Errno::LOOP => (ErrorKind::Invalid, "is a loop of symbolic links; name the file itself"),
        Errno::NOTDIR | Errno::EXIST => (ErrorKind::Invalid, "has a file where a directory should be"),
        Errno::ISDIR => (ErrorKind::Invalid, "is a directory; name a file in it"),
        Errno::NAMETOOLONG => (ErrorKind::Invalid, "is too long a name"),
        // A socket; or a device without a driver.
        Errno::NXIO | Errno::NODEV => (ErrorKind::Invalid, "is not a regular file; a root is kept in one"),
        _ => (ErrorKind::EngineFailed, "cannot be used"),
    };
    error(kind, op, path, why).because(std::io::Error::from(errno))
}

pub(super) fn refused(kind: ErrorKind, op: Op, path: &Path, why: &str) -> Error {
    error(kind, op, path, why)
}

pub(super) fn error(kind: ErrorKind, op: Op, path: &Path, why: &str) -> Error {
    Error::new(kind, op).detail(format!("root file {} {why}", path.display()))
}
