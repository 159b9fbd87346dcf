//! A header in a file or on a disk.

use crate::files::shell_word;
use crate::report::{Code, Failure};
use inlinecrypt_luks::Storage;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// A file or block device with a header on it.
#[derive(Debug)]
pub(crate) struct HeaderFile {
    file: File,
    len_bytes: u64,
}

impl HeaderFile {
    /// For reading. Nobody is kept from changing it: of two copies one is always whole.
    pub(crate) fn read_only(path: &Path) -> Result<Self, Failure> {
        Self::open(path, OpenOptions::new().read(true))
    }

    /// For changing it on behalf of who has locked it.
    pub(crate) fn writable(path: &Path) -> Result<Self, Failure> {
        Self::open(path, OpenOptions::new().read(true).write(true))
    }

    /// For changing it: nobody else does so meanwhile. cryptsetup takes the same lock for its changes, and `serve` for as long as
    /// it serves.
    pub(crate) fn locked(path: &Path) -> Result<Self, Failure> {
        let opened = Self::open(path, OpenOptions::new().read(true).write(true))?;
        match flock(&opened.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // Its length may have been another before it was ours.
                let Self { file, .. } = opened;
                let len_bytes = len(&file).map_err(|error| unusable(path, &error))?;
                Ok(Self { file, len_bytes })
            }
            Err(Errno::WOULDBLOCK) => Err(Failure::new(
                Code::Busy,
                format!("{} is in use: it is served, or its header is being changed", path.display()),
                "Stop the server first (inlinecrypt status shows it), or wait for the other command.",
            )),
            Err(errno) => Err(unusable(path, &errno.into())),
        }
    }

    fn open(path: &Path, options: &mut OpenOptions) -> Result<Self, Failure> {
        let failed = |error: &io::Error| unusable(path, error);
        let file = options
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(|error| failed(&error))?;
        let kind = file.metadata().map_err(|error| failed(&error))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Failure::new(
                Code::File,
                format!("{} is neither a file nor a block device", path.display()),
                "Name the container, or its header.",
            ));
        }
        let len_bytes = len(&file).map_err(|error| failed(&error))?;
        Ok(Self { file, len_bytes })
    }

    /// Makes a regular file longer or shorter.
    pub(crate) fn set_len(&mut self, len_bytes: u64) -> io::Result<()> {
        self.file.set_len(len_bytes)?;
        self.file.sync_all()?;
        self.len_bytes = len_bytes;
        Ok(())
    }

    /// Whether its length can be set.
    pub(crate) fn is_regular(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.is_file())
    }
}

fn len(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

fn unusable(path: &Path, error: &io::Error) -> Failure {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => {
            format!("To make a container: inlinecrypt luks create --size 1GiB {}", shell_word(path))
        }
        _ => "Check the name, and who may use it.".to_owned(),
    };
    Failure::of_io(path.display(), error, advice)
}

impl Storage for HeaderFile {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(offset))?;
        self.file.read_exact(data).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(
                error.kind(),
                format!("it ends at byte {}, before its header and LUKS keyslots do", self.len_bytes),
            ),
            _ => error,
        })
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > self.len_bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.seek(SeekFrom::Start(offset))?;
        self.file.write_all(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Where cryptsetup has its locks that are of no file.
const LOCKS: &str = "/run/cryptsetup";

/// The device-mapper device that has the container with this UUID open, if any. What it reads and writes goes by the borders that
/// its table had, so nobody else may move them: and a file that a loop device has open is locked by nobody.
fn mapped_by(sysfs: &Path, uuid: &str) -> Option<String> {
    // cryptsetup's: CRYPT-LUKS2-UUID without dashes-NAME.
    let prefix = format!("CRYPT-LUKS2-{}-", uuid.replace('-', ""));
    fs::read_dir(sysfs.join("block")).ok()?.filter_map(Result::ok).find_map(|disk| {
        let its = fs::read_to_string(disk.path().join("dm/uuid")).ok()?;
        let name = its.trim_end().strip_prefix(&prefix)?;
        Some(name.to_owned())
    })
}

/// The lock by which cryptsetup keeps others from re-encrypting the same container. It locks the container itself for a moment now
/// and then only.
#[derive(Debug)]
pub(crate) struct ReencryptionLock {
    path: PathBuf,
    _file: File,
}

impl ReencryptionLock {
    /// Takes the lock of the container with this UUID. `None` where such a lock cannot be: then cryptsetup cannot be at work, either.
    pub(crate) fn take(uuid: &str, label: &str) -> Result<Option<Self>, Failure> {
        if uuid.is_empty() || !uuid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
            return Ok(None);
        }
        if let Some(name) = mapped_by(Path::new("/sys"), uuid) {
            return Err(Failure::new(
                Code::Busy,
                format!("{label} is in use by the kernel, as /dev/mapper/{name}"),
                format!("Close it there first (cryptsetup close {name}), or let cryptsetup re-encrypt it."),
            ));
        }
        let _ = DirBuilder::new().mode(0o700).create(LOCKS);
        let path = Path::new(LOCKS).join(format!("LN_LUKS2-reencryption-{uuid}"));
        loop {
            let options = OpenOptions::new().create(true).truncate(false).write(true).mode(0o700).open(&path);
            let Ok(file) = options else { return Ok(None) };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Err(Failure::new(
                    Code::Busy,
                    format!("{label} is being re-encrypted by somebody else at this moment"),
                    "Wait for the other, or end it: what it leaves can be gone on with.",
                ));
            }
            // Whoever had it removed it, perhaps, after it was opened here.
            let is_there = file.metadata().ok().zip(path.metadata().ok());
            if is_there.is_some_and(|(ours, there)| ours.ino() == there.ino() && ours.dev() == there.dev()) {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Drop for ReencryptionLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_the_kernel_has_open_is_found_by_its_uuid() {
        let sysfs = tempfile::tempdir().unwrap();
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        for (disk, its) in [
            ("sda", None),
            ("dm-0", Some("CRYPT-PLAIN-other\n")),
            ("dm-1", Some("CRYPT-LUKS2-0123456789abcdef0123456789abcdee-not\n")),
        ] {
            let folder = sysfs.path().join("block").join(disk);
            fs::create_dir_all(folder.join("dm")).unwrap();
            if let Some(its) = its {
                fs::write(folder.join("dm/uuid"), its).unwrap();
            }
        }
        assert_eq!(mapped_by(sysfs.path(), uuid), None);
        fs::write(
            sysfs.path().join("block/dm-0/dm/uuid"),
            "CRYPT-LUKS2-0123456789abcdef0123456789abcdef-home\n",
        )
        .unwrap();
        assert_eq!(mapped_by(sysfs.path(), uuid).as_deref(), Some("home"));
        assert_eq!(mapped_by(Path::new("/nowhere"), uuid), None);
    }
}
