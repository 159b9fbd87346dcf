//! The root: where the key that wraps long-term keys comes from.
//!
//! Every kind of root ends in one secret of 32 random bytes. What differs is who keeps it, and what it takes to get it.
//! From the secret come the long-term wrapping key, the root's public identifier, and the key of the chip for which it
//! stands when the engine is a [model of hardware](crate::ice), all one way; the secret itself is wiped before the root is
//! handed out.
//!
//! ```text
//!   RootSpec   file:PATH        a file that only its owner reads     (here)
//!              passphrase: tpm2: pkcs11:                             (to come: one variant of RootSpec, one arm each in
//!                                                                     `Root::open` and `Root::open_or_create`)
//!                    |
//!                    v
//!           secret, 32 bytes --derive--> wrapping key (stays in this crate), identifier (public)
//! ```
//!
//! # The root file
//!
//! ```text
//!   offset  bytes
//!        0     16  magic "inlinecrypt root"
//!       16      4  version: 1, little-endian
//!       20     32  secret
//!       52     12  check value: derived from the secret, so that damage is found
//!       64
//! ```
//!
//! - Who has the file can open every key that was ever wrapped under it; who loses it, nobody can. Keep a copy where it
//!   is safe.
//! - It belongs to us or to root, and nobody else may read or write it. Access lists count: they show in the group's
//!   bits.
//! - It appears under its name complete or not at all, and never replaces another. Of two first starts at once one
//!   makes the root and both use it. A crash may leave a file `.NAME.*.tmp` behind, which nothing uses.

use crate::blob::{Form, Wrapper, WrappingKeyId};
use crate::random;
use inlinecrypt_cipher::kdf::counter_mode_cmac;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use zeroize::Zeroizing;

const MAGIC: [u8; 16] = *b"inlinecrypt root";
const VERSION: u32 = 1;
const SECRET_AT: usize = 20;
const CHECK_AT: usize = 52;
const FILE_BYTES: usize = 64;

/// Where a root is. Written `file:PATH`, or as a path alone.
///
/// ```
/// use inlinecrypt_engine::RootSpec;
///
/// let spec: RootSpec = "/var/lib/inlinecrypt/root".parse()?;
/// assert_eq!(spec.to_string(), "file:/var/lib/inlinecrypt/root");
/// # Ok::<(), inlinecrypt_core::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RootSpec {
    /// In a file.
    File(PathBuf),
}

impl RootSpec {
    /// What can be written, for help texts.
    pub const HELP: &str = "[file:]PATH";
}

impl fmt::Display for RootSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl FromStr for RootSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused =
            |why: &str| Error::new(ErrorKind::Invalid, Op::Open).detail(format!("root {text:?}: {why}"));
        let path = match text.split_once(':') {
            Some(("file", path)) => path,
            // A word and a colon is a kind of root that a later version may know, not a file.
            Some((word, _))
                if !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') =>
            {
                return Err(refused(&format!(
                    "no kind of root {word:?}; the kinds are: file (for a file of that name write file:{text})"
                )));
            }
            _ => text,
        };
        if path.is_empty() {
            return Err(refused("a path is missing; write file:PATH"));
        }
        Ok(Self::File(path.into()))
    }
}

/// What wraps long-term keys. Opened once, handed to [`open`](crate::open).
///
/// Neither copied nor printed: there is one copy of the wrapping key in the process, which the engines share.
///
/// ```compile_fail
/// fn copy(root: &inlinecrypt_engine::Root) -> inlinecrypt_engine::Root {
///     root.clone()
/// }
/// ```
pub struct Root {
    wrapper: Arc<Wrapper>,
    /// What a chip-unique key is made from, for engines that model a chip.
    chip: Box<Zeroizing<[u8; 32]>>,
    spec: RootSpec,
}

impl Root {
    /// Opens the root that `spec` names.
    ///
    /// # Errors
    ///
    /// Those of [`open_file`](Self::open_file).
    pub fn open(spec: &RootSpec) -> Result<Self, Error> {
        match spec {
            RootSpec::File(path) => Self::open_file(path),
        }
    }

    /// Opens the root that `spec` names; makes it if there is none.
    ///
    /// # Errors
    ///
    /// Those of [`open_or_create_file`](Self::open_or_create_file).
    pub fn open_or_create(spec: &RootSpec) -> Result<Self, Error> {
        match spec {
            RootSpec::File(path) => Self::open_or_create_file(path),
        }
    }

    /// Opens a root file. Symbolic links are followed.
    ///
    /// # Errors
    ///
    /// - [`NotFound`](ErrorKind::NotFound): nothing has this name.
    /// - [`Permission`](ErrorKind::Permission): we may not read it, others may, or it belongs to somebody else.
    /// - [`KeyRejected`](ErrorKind::KeyRejected): a root file, but damaged.
    /// - [`Invalid`](ErrorKind::Invalid): no root file.
    /// - [`EngineFailed`](ErrorKind::EngineFailed): the system failed to read it.
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let refused = |kind, why: String| refused(kind, Op::Open, path, &why);
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
        access.check(path).map_err(|(kind, why)| refused(kind, why))?;

        // One byte more than a root file has, to see whether there is more.
        let mut bytes = Zeroizing::new([0; FILE_BYTES + 1]);
        let len = read_up_to(&mut File::from(file), &mut *bytes)
            .map_err(|why| error(ErrorKind::EngineFailed, Op::Open, path, "cannot be read").because(why))?;
        let secret = parse(&bytes[..len]).map_err(|(kind, why)| refused(kind, why))?;
        Ok(Self::from_secret(&secret, RootSpec::File(path.into())))
    }

    /// Makes a new random root in a file that does not exist yet. Directories that are missing on the way are made,
    /// too, for their owner alone. When this returns, the file is on the disk.
    ///
    /// # Errors
    ///
    /// - [`Invalid`](ErrorKind::Invalid): something has this name already. It was not touched.
    /// - [`Permission`](ErrorKind::Permission), [`NoSpace`](ErrorKind::NoSpace),
    ///   [`EngineFailed`](ErrorKind::EngineFailed): the system refused or failed. There is no file of this name then,
    ///   unless only the last step failed, which is to make sure that the name is on the disk.
    ///
    /// # Blocking
    ///
    /// Waits for the disk twice: for the content, then for the name.
    pub fn create_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        match Self::create_unless_there(path)? {
            Some(root) => Ok(root),
            None => Err(refused(ErrorKind::Invalid, Op::Create, path, "exists already and was not touched")),
        }
    }

    /// Opens a root file, or makes one if there is none. Any number of processes may do this at once: all end with the
    /// same root.
    ///
    /// # Errors
    ///
    /// Those of [`open_file`](Self::open_file) and [`create_file`](Self::create_file).
    pub fn open_or_create_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        match Self::open_file(path) {
            Err(why) if why.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
        match Self::create_unless_there(path)? {
            Some(root) => Ok(root),
            // Somebody was faster.
            None => Self::open_file(path),
        }
    }

    /// The root's public name: the same for every start, and in every long-term blob wrapped under it.
    #[must_use]
    pub fn id(&self) -> WrappingKeyId {
        self.wrapper.id()
    }

    /// Where the root is.
    #[must_use]
    pub fn spec(&self) -> &RootSpec {
        &self.spec
    }

    pub(crate) fn wrapper(&self) -> Arc<Wrapper> {
        self.wrapper.clone()
    }

    /// The key of the chip for which this root stands.
    pub(crate) fn chip_key(&self) -> &[u8; 32] {
        &self.chip
    }

    fn from_secret(secret: &[u8; 32], spec: RootSpec) -> Self {
        let mut chip = Box::new(Zeroizing::new([0; 32]));
        // Part of the format of ICE blobs: a change makes every stored one unreadable.
        counter_mode_cmac(secret, b"inlinecrypt v1 chip-unique key\0\0\0\x01\0", &mut **chip);
        Self { wrapper: Arc::new(Wrapper::derive(secret, Form::LongTerm)), chip, spec }
    }

    /// A new root, or `None` if something has this name. What has the name is on the disk then, whoever made it.
    fn create_unless_there(path: &Path) -> Result<Option<Self>, Error> {
        let failed = |errno| failed(Op::Create, path, errno);
        let (directory, name) = split(path)
            .ok_or_else(|| refused(ErrorKind::Invalid, Op::Create, path, "does not end in a file's name"))?;
        let missing = directory.ancestors().take_while(|directory| !is_there(directory)).count();
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|why| {
            match Errno::from_io_error(&why) {
                Some(errno) => failed(errno),
                None => error(ErrorKind::EngineFailed, Op::Create, path, "no directory for it").because(why),
            }
        })?;
        let secret = random::secret(Op::Create)?;
        let temporary = Temporary::write(directory, name, &*serialize(&secret)).map_err(failed)?;
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
        Ok(linked.then(|| Self::from_secret(&secret, RootSpec::File(path.into()))))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wrapper, chip: _, spec } = self;
        write!(f, "Root({}, {spec})", wrapper.id())
    }
}

/// Who can reach a file, by its status.
struct Access {
    is_file: bool,
    permissions: u32,
    owner: u32,
    us: u32,
}

impl Access {
    /// Whether nobody but us (and root, who can do anything) reads or writes the file. Checked by hand: the system
    /// lets root open everything.
    fn check(&self, path: &Path) -> Result<(), (ErrorKind, String)> {
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
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&byte)) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// The secret in a root file's bytes.
fn parse(bytes: &[u8]) -> Result<Box<Zeroizing<[u8; 32]>>, (ErrorKind, String)> {
    let damaged = |why: String| Err((ErrorKind::KeyRejected, format!("{why}; restore it from a copy")));
    let known = bytes.len().min(MAGIC.len());
    if bytes.is_empty() {
        return damaged("is an empty file, not a root".into());
    }
    if bytes[..known] != MAGIC[..known] {
        let what = match crate::looks_like_wrapped_key(bytes) {
            Some(form) => format!("is a {form} wrapped key, not a root"),
            None => "is not a root file".into(),
        };
        return Err((ErrorKind::Invalid, format!("{what}; name the root file, or a new name to make one")));
    }
    // The version comes before the length: others may have other lengths.
    if let Some(version) = bytes.get(MAGIC.len()..SECRET_AT) {
        let version = u32::from_le_bytes(version.try_into().expect("four bytes, by the constants"));
        if version != VERSION {
            return Err((
                ErrorKind::Invalid,
                format!("is a root file of version {version}; this program knows {VERSION}"),
            ));
        }
    }
    if bytes.len() < FILE_BYTES {
        return damaged(format!("is cut off after {} bytes of {FILE_BYTES}", bytes.len()));
    }
    if bytes.len() > FILE_BYTES {
        return damaged(format!("is longer than the {FILE_BYTES} bytes of a root file"));
    }
    let mut secret = Box::new(Zeroizing::new([0; 32]));
    secret.copy_from_slice(&bytes[SECRET_AT..CHECK_AT]);
    // No need for constant time: the file's owner has the secret beside it.
    if bytes[CHECK_AT..] != check_value(&secret) {
        return damaged("is damaged: its check value is wrong".into());
    }
    Ok(secret)
}

fn serialize(secret: &[u8; 32]) -> Zeroizing<[u8; FILE_BYTES]> {
    let mut bytes = Zeroizing::new([0; FILE_BYTES]);
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()..SECRET_AT].copy_from_slice(&VERSION.to_le_bytes());
    bytes[SECRET_AT..CHECK_AT].copy_from_slice(secret);
    bytes[CHECK_AT..].copy_from_slice(&check_value(secret));
    bytes
}

fn check_value(secret: &[u8; 32]) -> [u8; FILE_BYTES - CHECK_AT] {
    let mut value = [0; FILE_BYTES - CHECK_AT];
    counter_mode_cmac(secret, b"inlinecrypt v1 root file check value\0\0\0\0\x60", &mut value);
    value
}

fn read_up_to(file: &mut File, bytes: &mut [u8]) -> std::io::Result<usize> {
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
fn split(path: &Path) -> Option<(&Path, &std::ffi::OsStr)> {
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
fn failed(op: Op, path: &Path, errno: Errno) -> Error {
    let (kind, why) = match errno {
        Errno::NOENT => (ErrorKind::NotFound, "is not there; correct the name, or make a new root"),
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

fn refused(kind: ErrorKind, op: Op, path: &Path, why: &str) -> Error {
    error(kind, op, path, why)
}

fn error(kind: ErrorKind, op: Op, path: &Path, why: &str) -> Error {
    Error::new(kind, op).detail(format!("root file {} {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::FileType;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::os::unix::net::UnixListener;
    use std::sync::Barrier;
    use tempfile::TempDir;

    fn directory() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    /// A root file as it stands, and where.
    fn root_file() -> (TempDir, PathBuf, Vec<u8>) {
        let directory = directory();
        let path = directory.path().join("root");
        Root::create_file(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        (directory, path, bytes)
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// The error of opening a root. It names the file, on one line.
    #[track_caller]
    fn refusal(path: &Path) -> (ErrorKind, String) {
        described(path, Root::open_file(path))
    }

    #[track_caller]
    fn described(path: &Path, result: Result<Root, Error>) -> (ErrorKind, String) {
        let error = result.expect_err("must be refused");
        let text = error.chain();
        assert!(text.contains(&path.display().to_string()) && text.lines().count() == 1, "{text}");
        (error.kind(), text)
    }

    fn names_in(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_new_root_is_for_its_owner_alone_and_opens_again() {
        let directory = directory();
        let path = directory.path().join("new").join("deeper").join("root");
        let created = Root::create_file(&path).unwrap();
        let opened = Root::open_file(&path).unwrap();

        assert_eq!(created.id(), opened.id());
        let status = fs::metadata(&path).unwrap();
        assert_eq!((status.mode() & 0o7777, status.len(), status.nlink()), (0o600, 64, 1));
        for parent in path.ancestors().skip(1).take(2) {
            assert_eq!(fs::metadata(parent).unwrap().mode() & 0o7777, 0o700);
        }
        assert_eq!(names_in(path.parent().unwrap()), ["root"]);
    }

    #[test]
    fn two_roots_differ() {
        let directory = directory();
        let [one, other] =
            ["one", "other"].map(|name| Root::create_file(directory.path().join(name)).unwrap());
        assert_ne!(one.id(), other.id());
    }

    #[test]
    fn creating_never_replaces_what_is_there() {
        let (directory, path, bytes) = root_file();
        assert_eq!(described(&path, Root::create_file(&path)).0, ErrorKind::Invalid);
        assert_eq!(fs::read(&path).unwrap(), bytes);

        let dangling = directory.path().join("dangling");
        symlink(directory.path().join("nowhere"), &dangling).unwrap();
        assert_eq!(described(&dangling, Root::create_file(&dangling)).0, ErrorKind::Invalid);
        assert_eq!(described(&dangling, Root::open_or_create_file(&dangling)).0, ErrorKind::NotFound);
        assert_eq!(names_in(directory.path()).len(), 2);
    }

    #[test]
    fn a_damaged_root_is_not_replaced_by_a_new_one() {
        let (_directory, path, mut bytes) = root_file();
        bytes[30] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(described(&path, Root::open_or_create_file(&path)).0, ErrorKind::KeyRejected);
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn first_starts_at_once_end_with_one_root() {
        const STARTERS: usize = 8;
        for _ in 0..20 {
            let directory = directory();
            let path = directory.path().join("made").join("root");
            let barrier = Barrier::new(STARTERS);
            let ids: Vec<_> = std::thread::scope(|scope| {
                let starters: Vec<_> = (0..STARTERS)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            Root::open_or_create_file(&path).unwrap().id()
                        })
                    })
                    .collect();
                starters.into_iter().map(|starter| starter.join().unwrap()).collect()
            });
            assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
            assert_eq!(Root::open_file(&path).unwrap().id(), ids[0]);
            assert_eq!(names_in(path.parent().unwrap()), ["root"]);
        }
    }

    #[test]
    fn creators_at_once_have_one_winner() {
        let directory = directory();
        let path = directory.path().join("root");
        let results: Vec<_> = std::thread::scope(|scope| {
            let creators: Vec<_> = (0..8).map(|_| scope.spawn(|| Root::create_file(&path))).collect();
            creators.into_iter().map(|creator| creator.join().unwrap()).collect()
        });
        let mut winners = results.iter().filter_map(|result| result.as_ref().ok());
        assert_eq!(winners.next().unwrap().id(), Root::open_file(&path).unwrap().id());
        assert!(winners.next().is_none());
    }

    #[test]
    fn any_access_for_others_is_refused_with_the_command_that_ends_it() {
        let (_directory, path, _) = root_file();
        for mode in 1..=0o077 {
            set_mode(&path, 0o600 | mode);
            let (kind, text) = refusal(&path);
            assert_eq!(kind, ErrorKind::Permission, "{mode:o}");
            assert!(text.contains(&format!("mode {:04o}", 0o600 | mode)), "{text}");
            assert!(text.contains(&format!("chmod 600 {}", path.display())), "{text}");
        }
        for mode in [0o600, 0o400, 0o700] {
            set_mode(&path, mode);
            Root::open_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_that_we_may_not_read_is_a_matter_of_permission() {
        let (_directory, path, _) = root_file();
        if rustix::process::geteuid().is_root() {
            eprintln!("skipped: root may read everything");
            return;
        }
        set_mode(&path, 0);
        assert_eq!(refusal(&path).0, ErrorKind::Permission);
        assert_eq!(described(&path, Root::open_or_create_file(&path)).0, ErrorKind::Permission);
    }

    #[test]
    fn a_file_is_trusted_if_it_is_ours_or_roots() {
        let path = Path::new("/root-file");
        let owned = |owner, us| Access { is_file: true, permissions: 0o600, owner, us }.check(path);
        assert!(owned(1000, 1000).is_ok());
        assert!(owned(0, 1000).is_ok());
        assert!(owned(0, 0).is_ok());
        for (owner, us) in [(1001, 1000), (1000, 0)] {
            let (kind, why) = owned(owner, us).unwrap_err();
            assert_eq!(kind, ErrorKind::Permission);
            assert!(why.contains(&format!("chown {us} /root-file")), "{why}");
        }
    }

    #[test]
    fn a_file_of_somebody_else_is_refused() {
        let (_directory, path, _) = root_file();
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can give a file away");
            return;
        }
        std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
        let (kind, text) = refusal(&path);
        assert_eq!(kind, ErrorKind::Permission);
        assert!(text.contains("belongs to user 12345"), "{text}");
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused_without_waiting() {
        let directory = directory();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("directory")).unwrap();
        rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        symlink(at("loop"), at("loop")).unwrap();
        symlink("/dev/null", at("null")).unwrap();
        for name in ["directory", "fifo", "socket", "loop", "null"] {
            assert_eq!(refusal(&at(name)).0, ErrorKind::Invalid, "{name}");
            assert_eq!(
                described(&at(name), Root::open_or_create_file(at(name))).0,
                ErrorKind::Invalid,
                "{name}"
            );
        }
    }

    #[test]
    fn a_symbolic_link_to_a_root_is_followed() {
        let (directory, path, _) = root_file();
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(Root::open_file(&link).unwrap().id(), Root::open_file(&path).unwrap().id());
        assert_eq!(Root::open_or_create_file(&link).unwrap().id(), Root::open_file(&path).unwrap().id());
    }

    #[test]
    fn a_missing_file_is_not_found_and_a_file_for_a_directory_invalid() {
        let (directory, path, _) = root_file();
        assert_eq!(refusal(&directory.path().join("none")).0, ErrorKind::NotFound);
        assert_eq!(refusal(&path.join("below")).0, ErrorKind::Invalid);
        assert_eq!(
            described(&path.join("below"), Root::create_file(path.join("below"))).0,
            ErrorKind::Invalid
        );
        for nameless in ["/", "", "..", "/tmp/.."] {
            assert_eq!(Root::create_file(nameless).unwrap_err().kind(), ErrorKind::Invalid, "{nameless:?}");
        }
    }

    #[test]
    fn a_path_in_a_command_can_be_pasted() {
        assert_eq!(shell_word(Path::new("/var/lib/root-1")), "/var/lib/root-1");
        assert_eq!(shell_word(Path::new("/my keys/it's")), r"'/my keys/it'\''s'");
    }

    #[test]
    fn a_name_alone_means_the_directory_we_are_in() {
        assert_eq!(split(Path::new("root")), Some((Path::new("."), "root".as_ref())));
    }

    #[test]
    fn every_flipped_bit_and_every_other_length_is_refused() {
        let (_directory, path, bytes) = root_file();
        let kind_of = |changed: &[u8]| {
            fs::write(&path, changed).unwrap();
            refusal(&path).0
        };
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // Magic and version: another kind of file. The rest: a damaged root.
            let expected = if bit / 8 < SECRET_AT { ErrorKind::Invalid } else { ErrorKind::KeyRejected };
            assert_eq!(kind_of(&changed), expected, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_eq!(kind_of(&bytes[..len]), ErrorKind::KeyRejected, "cut to {len}");
        }
        for more in [1, 64, 1 << 20] {
            let mut changed = bytes.clone();
            changed.resize(bytes.len() + more, 0);
            assert_eq!(kind_of(&changed), ErrorKind::KeyRejected, "{more} more");
        }
        fs::write(&path, &bytes).unwrap();
        Root::open_file(&path).unwrap();
    }

    #[test]
    fn each_damage_has_its_message() {
        let (_directory, path, bytes) = root_file();
        let blob = Root::open_file(&path).unwrap().wrapper().wrap(&[7; 32]);
        let long = [&bytes[..], b"\n"].concat();
        let mut version = bytes.clone();
        version[16] = 2;
        let mut secret = bytes.clone();
        secret[40] ^= 1;
        let cases: [(&[u8], &str); 7] = [
            (b"", "empty"),
            (&bytes[..63], "cut off after 63 bytes"),
            (&long, "longer than the 64 bytes"),
            (&version, "version 2; this program knows 1"),
            (&secret, "check value is wrong"),
            (&[0x17; 64], "is not a root file"),
            (&blob, "is a long-term wrapped key, not a root"),
        ];
        for (content, expected) in cases {
            fs::write(&path, content).unwrap();
            let (_, text) = refusal(&path);
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    /// Pins format and derivation: if this fails, roots of earlier versions open nothing any more. Computed by another
    /// implementation (Python's `cryptography`) from the documentation.
    #[test]
    fn the_format_of_version_1_does_not_change() {
        let secret: [u8; 32] = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let root = Root::from_secret(&secret, RootSpec::File("/r".into()));
        assert_eq!(hex::encode(&serialize(&secret)[..SECRET_AT]), "696e6c696e65637279707420726f6f7401000000");
        assert_eq!(hex::encode(check_value(&secret)), "8b534ef05075f39d32d7afdb");
        assert_eq!(root.id().to_string(), "f0448990fb0900fd");
    }

    #[test]
    fn debug_shows_the_public_name_and_the_place_only() {
        let root = Root::from_secret(&[0xb7; 32], RootSpec::File("/r".into()));
        assert_eq!(format!("{root:?}"), format!("Root({}, file:/r)", root.id()));
    }

    #[test]
    fn specs_are_paths_with_or_without_their_kind() {
        for (text, path) in [
            ("file:/var/root", "/var/root"),
            ("/var/root", "/var/root"),
            ("root", "root"),
            ("file:tpm2:x", "tpm2:x"),
            ("./tpm2:x", "./tpm2:x"),
            (":x", ":x"),
        ] {
            assert_eq!(text.parse::<RootSpec>().unwrap(), RootSpec::File(path.into()), "{text}");
        }
        for (text, expected) in [
            ("tpm2:0x81000001", "no kind of root \"tpm2\"; the kinds are: file"),
            ("pkcs11:token=x", "write file:pkcs11:token=x"),
            ("", "a path is missing"),
            ("file:", "a path is missing"),
        ] {
            let error = text.parse::<RootSpec>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), magic in any::<bool>()) {
            let bytes = if magic { [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat() } else { bytes };
            prop_assert!(parse(&bytes).is_err());
        }

        #[test]
        fn every_secret_survives_the_file(secret in prop::array::uniform32(any::<u8>())) {
            prop_assert_eq!(**parse(&*serialize(&secret)).unwrap(), secret);
        }
    }
}
