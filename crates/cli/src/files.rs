//! Small files: read with a bound, written whole or not at all, never over another.

use crate::report::{Code, Failure, plain};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Who may be able to read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Secrecy {
    /// Anybody.
    Public,
    /// Its owner alone, who is us or root.
    Secret,
}

/// Reads at most `len_max` bytes. `what` is how messages call the file.
pub(crate) fn read(
    path: &Path,
    what: &str,
    secrecy: Secrecy,
    len_max: usize,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    Ok(read_judged(path, what, len_max, Some(secrecy), |_| secrecy)?.0)
}

/// The same where what is in the file decides who may be able to read it. Reads it once: also says whether it can be read
/// again, which a pipe cannot.
pub(crate) fn read_by_content(
    path: &Path,
    what: &str,
    len_max: usize,
    secrecy: impl FnOnce(&[u8]) -> Secrecy,
) -> Result<(Zeroizing<Vec<u8>>, bool), Failure> {
    read_judged(path, what, len_max, None, secrecy)
}

/// With `before`, a file that others can reach is not even read.
fn read_judged(
    path: &Path,
    what: &str,
    len_max: usize,
    before: Option<Secrecy>,
    after: impl FnOnce(&[u8]) -> Secrecy,
) -> Result<(Zeroizing<Vec<u8>>, bool), Failure> {
    let name = format!("{what} {}", path.display());
    let refused = |errno: Errno| Failure::of_io(&name, &errno.into(), "Check the name.");
    // Not blocking: opening a fifo would wait for a writer. A pipe handed over as /dev/fd/N is open at both ends.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(refused)?;
    let status = rustix::fs::fstat(&file).map_err(refused)?;
    let is_regular = match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => true,
        FileType::Fifo => false,
        FileType::Directory => {
            return Err(Failure::new(Code::File, format!("{name} is a directory"), "Name a file in it."));
        }
        _ => return Err(Failure::new(Code::File, format!("{name} is not a file"), "Name a file.")),
    };
    let check = |secrecy| match secrecy {
        Secrecy::Secret if is_regular => check_secret(path, &name, status.st_mode & 0o7777, status.st_uid),
        Secrecy::Secret | Secrecy::Public => Ok(()),
    };
    before.map_or(Ok(()), check)?;
    rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(refused)?;
    let bytes = read_bounded(File::from(file), len_max)
        .map_err(|error| Failure::of_io(&name, &error, "Check the medium."))?
        .ok_or_else(|| too_long(&name, len_max))?;
    check(after(&bytes))?;
    Ok((bytes, is_regular))
}

/// Reads standard input to its end, at most `len_max` bytes.
pub(crate) fn read_stdin(what: &str, len_max: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let name = format!("{what} on standard input");
    // Not through the library's buffer, which would keep a copy.
    let descriptor = io::stdin().as_fd().try_clone_to_owned();
    descriptor
        .and_then(|descriptor| read_bounded(File::from(descriptor), len_max))
        .map_err(|error| Failure::of_io(&name, &error, "Send it through a pipe, or name a file."))?
        .ok_or_else(|| too_long(&name, len_max))
}

fn too_long(name: &str, len_max: usize) -> Failure {
    Failure::new(
        Code::File,
        format!("{name} is longer than {len_max} bytes"),
        "Check that it is the right one.",
    )
}

/// `None` if there is more.
fn read_bounded(from: impl io::Read, len_max: usize) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    // Room for all at once: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(len_max + 1));
    from.take(len_max as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= len_max).then_some(bytes))
}

/// Whether nobody but us (and root, who can do anything) can read or write the file.
fn check_secret(path: &Path, name: &str, permissions: u32, owner: u32) -> Result<(), Failure> {
    let us = rustix::process::geteuid().as_raw();
    if owner != us && owner != 0 {
        return Err(Failure::new(
            Code::Refused,
            format!("{name} belongs to user {owner}, and we are user {us}"),
            format!("If it is to be trusted, run: chown {us} {}", shell_word(path)),
        ));
    }
    if permissions & 0o077 != 0 {
        return Err(Failure::new(
            Code::Refused,
            format!("{name} has mode {permissions:04o}, so others can reach it"),
            format!("Run: chmod 600 {}", shell_word(path)),
        ));
    }
    Ok(())
}

/// `path` as a person can paste it into a shell.
pub(crate) fn shell_word(path: &Path) -> String {
    quoted(&path.display().to_string())
}

/// `text` as one word of a shell.
pub(crate) fn quoted(text: &str) -> String {
    if !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+,:@%=".contains(&byte))
    {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Whether something has this name, even a symbolic link to nowhere.
pub(crate) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// The file that `path` leads to through symbolic links. A device's own name says nothing, and lies where nothing lasts:
/// that stays as it is, as does what is not there.
pub(crate) fn itself(path: &Path) -> PathBuf {
    match path.canonicalize() {
        Ok(file) if file.is_file() => file,
        _ => path.to_owned(),
    }
}

/// Writes a new file for its owner alone: under its name it appears complete and on the disk, or not at all.
pub(crate) fn write_new(path: &Path, what: &str, bytes: &[u8]) -> Result<(), Failure> {
    let staged = Staged::beside(path);
    let write = || -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let owner_only = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::open(staged.temporary(), flags, owner_only)?;
        let mut file = File::from(file);
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| not_written(path, what, &error))?;
    staged.publish(what)
}

/// Writes a file for its owner alone over another: at every moment one of the two is there, whole.
pub(crate) fn replace(path: &Path, what: &str, bytes: &[u8]) -> Result<(), Failure> {
    let staged = Staged::beside(path);
    let write = || -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(staged.temporary(), flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(file);
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(staged.temporary(), path)?;
        Ok(sync_directory(path)?)
    };
    write().map_err(|error| not_written(path, what, &error))
}

/// Removes a file, and makes that stable. One that is not there is fine.
pub(crate) fn remove(path: &Path, what: &str) -> Result<(), Failure> {
    let removed = match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_directory(path).map_err(io::Error::from),
    };
    removed.map_err(|error| {
        Failure::of_io(
            format!("cannot remove {what} {}", path.display()),
            &error,
            "Remove it by hand: it is of no use any more.",
        )
    })
}

/// The first `len` bytes of a file, or all if it is shorter.
pub(crate) fn read_prefix(path: &Path, what: &str, len: usize) -> Result<Vec<u8>, Failure> {
    let read = || -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let mut bytes = Vec::new();
        file.take(len as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|error| Failure::of_io(format!("{what} {}", path.display()), &error, "Check the name."))
}

/// How many bytes of a file's name its temporary name has: enough to recognise it by, and short enough for NAME_MAX.
const KNOWN_BY_BYTES_MAX: usize = 200;

/// A file under a temporary name, to be given its own when it is complete. Removed if that does not happen.
#[derive(Debug)]
pub(crate) struct Staged {
    temporary: PathBuf,
    path: PathBuf,
}

impl Staged {
    /// A temporary name for `path`. Nothing is made yet.
    pub(crate) fn beside(path: &Path) -> Self {
        let file_name = path.file_name().unwrap_or_default().as_bytes();
        let known_by = &file_name[..file_name.len().min(KNOWN_BY_BYTES_MAX)];
        // Process ids are no names: another container has the same ones, and may work here at this moment.
        let random = RandomState::new().build_hasher().finish();
        let mut name = OsString::from(".");
        name.push(OsStr::from_bytes(known_by));
        name.push(format!(".{random:016x}.tmp"));
        Self { temporary: path.with_file_name(name), path: path.to_owned() }
    }

    /// Where it is to be written.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its name, unless something has it, and makes the name stable.
    pub(crate) fn publish(self, what: &str) -> Result<(), Failure> {
        let Self { temporary, path } = &self;
        let mut named = rustix::fs::renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE);
        if let Err(Errno::INVAL | Errno::NOSYS) = named {
            // A filesystem that cannot do this. A link never replaces anything either.
            named = rustix::fs::linkat(CWD, temporary, CWD, path, AtFlags::empty());
        }
        named.map_err(|errno| not_written(path, what, &errno.into()))?;
        sync_directory(path).map_err(|errno| not_written(path, what, &errno.into()))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // It has its own name by now, or nobody needs it.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

fn sync_directory(path: &Path) -> Result<(), Errno> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::empty()).and_then(rustix::fs::fsync) {
        // Writable and yet not readable, or a filesystem that cannot: as stable as we can make it.
        Err(Errno::ACCESS | Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        done => done,
    }
}

fn not_written(path: &Path, what: &str, error: &io::Error) -> Failure {
    let advice = match error.kind() {
        io::ErrorKind::AlreadyExists => {
            "It was left alone. Choose another name, or move it away first.".to_owned()
        }
        io::ErrorKind::NotFound => "Make its directory first.".to_owned(),
        io::ErrorKind::PermissionDenied => "Choose a directory that you may write in.".to_owned(),
        _ => "Make room, or choose another place.".to_owned(),
    };
    let mut failure = Failure::of_io(format!("cannot write {what} {}", path.display()), error, advice);
    if error.kind() == io::ErrorKind::AlreadyExists {
        failure.what =
            format!("cannot write {what} {}: something of that name exists already", path.display());
    }
    failure
}

/// What `path` is and how long, without opening anything for writing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Medium {
    pub(crate) len_bytes: u64,
    /// Bytes for which storage is allocated; `None` where that is no question.
    pub(crate) allocated_bytes: Option<u64>,
    /// Which file it is, whatever its names.
    pub(crate) identity: (u64, u64),
}

impl Medium {
    /// Looks at a regular file or block device.
    pub(crate) fn look(path: &Path) -> Result<Self, Failure> {
        use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
        let name = path.display();
        let wrong = |what: &str| {
            Failure::new(
                Code::File,
                format!("{name} is {what}, and a volume is a regular file or a block device"),
                "Name one of these, or make one with: inlinecrypt serve --create SIZE VOLUME",
            )
        };
        let metadata = path.metadata().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::new(
                Code::File,
                format!("{name} does not exist"),
                format!("To make it: inlinecrypt serve --create 1GiB {}", shell_word(path)),
            ),
            _ => Failure::of_io(&name, &error, "Check the name, and who may reach it."),
        })?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(wrong("a directory"));
        }
        if kind.is_file() {
            return Ok(Self {
                len_bytes: metadata.len(),
                allocated_bytes: Some(metadata.blocks() * 512),
                identity: (metadata.dev(), metadata.ino()),
            });
        }
        if !kind.is_block_device() {
            return Err(wrong("neither"));
        }
        let len = || -> Result<u64, Errno> {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let device = rustix::fs::open(path, flags, Mode::empty())?;
            rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0))
        };
        let len_bytes = len().map_err(|errno| {
            Failure::of_io(&name, &errno.into(), "Check that the device works, and who may read it.")
        })?;
        Ok(Self { len_bytes, allocated_bytes: None, identity: (u64::MAX, metadata.rdev()) })
    }
}

/// A short reason why `path` cannot be read as text, for configs.
pub(crate) fn read_text(path: &Path, what: &str) -> Result<String, Failure> {
    let bytes = read(path, what, Secrecy::Public, 1 << 20)?;
    match str::from_utf8(&bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(Failure::new(
            Code::File,
            format!("{what} {} is not text", path.display()),
            "Check that it is the right file: configs are TOML, in UTF-8.",
        )),
    }
}

/// Makes the directories above `path`, for their owner alone.
pub(crate) fn make_private_directory(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| {
        Failure::new(
            Code::File,
            format!("cannot make directory {}: {}", path.display(), plain(&error)),
            "Choose another place.",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_temporary_name_is_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        // Another process, of our number in another container, is at work.
        let theirs = directory.path().join(format!(".v.{}.tmp", std::process::id()));
        fs::write(&theirs, b"theirs").unwrap();
        let (one, other) = (Staged::beside(&path), Staged::beside(&path));
        assert_ne!(one.temporary(), other.temporary());
        fs::write(one.temporary(), b"ours").unwrap();
        one.publish("file").unwrap();
        drop(other);
        let mut names: Vec<_> =
            fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        assert_eq!(names, [theirs.clone(), path]);
        assert_eq!(fs::read(theirs).unwrap(), b"theirs");
    }

    #[test]
    fn a_file_with_the_longest_name_can_be_written() {
        let directory = tempfile::tempdir().unwrap();
        write_new(&directory.path().join("x".repeat(255)), "file", b"all").unwrap();
    }
}
