//! From a passphrase to a volume key, in a process of its own.
//!
//! ```text
//!   server --socket--> helper: header's path, passphrase
//!                      argon2, area, stripes, digest
//!   server <--socket-- volume key, or why not; then the end
//! ```
//!
//! What was made of the passphrase, and the areas, are in that process's memory alone and end with it. The server gets the key,
//! hands it to its engine and wipes it. Messages are fields, each with its length before it (4 bytes, little-endian).

use super::file::HeaderFile;
use crate::ask::Asker;
use crate::files::{self, Secrecy};
use crate::report::{Code, Failure};
use inlinecrypt_core::key::RawKey;
use inlinecrypt_engine::root::strip_line_feed;
use inlinecrypt_luks::{Kind, PASSPHRASE_BYTES_MAX, VolumeKey, detect, luks1, luks2};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use zeroize::Zeroizing;

/// The subcommand that opens containers.
pub(crate) const HELPER: &str = "luks-helper";

/// Longest field of an answer: messages and keys.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Where the passphrase of a container is.
#[derive(Clone)]
pub(crate) enum Passphrase {
    /// Nobody has been asked yet. The file is what a config names for this volume.
    NotAsked(Option<PassphraseFile>),
    /// It can be read again at any time.
    File(PassphraseFile),
    /// It was typed, or came through a descriptor.
    Given(Arc<Zeroizing<Vec<u8>>>),
}

/// A file with a passphrase in it.
#[derive(Clone, Debug)]
pub(crate) struct PassphraseFile {
    pub(crate) path: PathBuf,
    /// Whether every byte counts, as in cryptsetup's key files, also a line feed at the end.
    pub(crate) whole: bool,
}

impl PassphraseFile {
    pub(crate) fn read(&self) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let mut bytes = files::read(&self.path, "passphrase file", Secrecy::Secret, PASSPHRASE_BYTES_MAX)?;
        if !self.whole {
            strip_line_feed(&mut bytes);
        }
        Ok(bytes)
    }
}

/// A volume key that a passphrase opens.
#[derive(Clone)]
pub(crate) struct LuksKey {
    pub(crate) header: PathBuf,
    pub(crate) passphrase: Passphrase,
}

impl LuksKey {
    /// The same, with its passphrase.
    pub(crate) fn asked(&self, asker: &mut Asker) -> Result<Self, Failure> {
        let Passphrase::NotAsked(file) = &self.passphrase else { return Ok(self.clone()) };
        Ok(Self { passphrase: asker.luks(&self.header, file.as_ref())?, ..self.clone() })
    }

    /// Whether it can be opened again without asking anybody.
    pub(crate) fn can_be_had_again(&self) -> bool {
        matches!(self.passphrase, Passphrase::File(_))
    }

    /// The volume key.
    pub(crate) fn open(&self) -> Result<RawKey, Failure> {
        match &self.passphrase {
            Passphrase::File(file) => volume_key(&self.header, &file.read()?),
            Passphrase::Given(given) => volume_key(&self.header, given),
            Passphrase::NotAsked(_) => Err(Failure::new(
                Code::Refused,
                format!("{}: there is no passphrase", self.header.display()),
                "Give it with --passphrase-file FILE or --passphrase-fd N.",
            )),
        }
    }
}

/// The volume key of the container with this header, from a process that has ended when this returns.
///
/// # Blocking
///
/// As long as the header's key derivation takes, for each LUKS keyslot until one opens.
pub(crate) fn volume_key(header: &Path, passphrase: &[u8]) -> Result<RawKey, Failure> {
    let broken = |error: io::Error| {
        Failure::of_io("the process that opens LUKS containers", &error, "Free memory, or start again.")
    };
    let (mut ours, theirs) = UnixStream::pair().map_err(broken)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("inlinecrypt").arg(HELPER).env_clear();
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let mut child = command.spawn().map_err(broken)?;
    // Its end of the socket is in the command.
    drop(command);
    let path = std::path::absolute(header).unwrap_or_else(|_| header.to_owned());
    let answer = send(&mut ours, path.as_os_str().as_bytes())
        .and_then(|()| send(&mut ours, passphrase))
        .and_then(|()| ours.shutdown(Shutdown::Write))
        .and_then(|()| Answer::receive(&mut ours));
    let status = child.wait().map_err(broken)?;
    match answer {
        Ok(Answer::Key(key)) => Ok(RawKey::new(&key)),
        Ok(Answer::Refused(failure)) => Err(failure),
        Err(_silence) => Err(Failure::new(
            Code::File,
            format!("{}: the process that opens it ended without an answer ({status})", header.display()),
            "Free memory: the key derivation may take more than there is. The system's log may say more.",
        )),
    }
}

enum Answer {
    Key(VolumeKey),
    Refused(Failure),
}

impl Answer {
    fn receive(from: &mut impl Read) -> io::Result<Self> {
        let (kind, field) = (receive(from, 1)?, receive(from, ANSWER_BYTES_MAX)?);
        if kind[..] == *b"k" {
            return Ok(Self::Key(field));
        }
        let code = match kind[..] {
            [2] => Code::Refused,
            [3] => Code::Memory,
            [4] => Code::File,
            [5] => Code::Busy,
            _ => Code::Wrong,
        };
        let advice = receive(from, ANSWER_BYTES_MAX)?;
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        Ok(Self::Refused(Failure::new(code, text(&field), text(&advice))))
    }

    fn send(&self, to: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Key(key) => {
                send(to, b"k")?;
                send(to, key)
            }
            Self::Refused(Failure { code, what, advice }) => {
                send(to, &[*code as u8])?;
                send(to, what.as_bytes())?;
                send(to, advice.as_bytes())
            }
        }
    }
}

/// One container from standard input, which is a socket, and its key there.
pub(crate) fn helper() -> Result<(), Failure> {
    let answer = || -> io::Result<()> {
        // Nobody waits for the answer if the server has gone.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        let mut socket: UnixStream = io::stdin().as_fd().try_clone_to_owned()?.into();
        let path = receive(&mut socket, 64 << 10)?;
        let passphrase = receive(&mut socket, PASSPHRASE_BYTES_MAX)?;
        let answer = match open(Path::new(OsStr::from_bytes(&path)), &passphrase) {
            Ok(key) => Answer::Key(key),
            Err(failure) => Answer::Refused(failure),
        };
        answer.send(&mut socket)
    };
    answer().map_err(|error| {
        Failure::of_io(
            "cannot answer",
            &error,
            "This command is for inlinecrypt itself; there is nothing to do by hand.",
        )
    })
}

/// Opens a container here.
fn open(header: &Path, passphrase: &[u8]) -> Result<VolumeKey, Failure> {
    let mut file = HeaderFile::read_only(header)?;
    let opened = match detect(&mut file) {
        Ok(Some(Kind::Luks1)) => luks1::Header::read(&mut file)
            .and_then(|header| header.open(&mut file, passphrase))
            .map(|(_, key)| key),
        Ok(_) => luks2::Container::read(file)
            .and_then(|mut container| {
                container.header().metadata.data()?;
                container.open(passphrase, None)
            })
            .map(|opened| opened.key),
        Err(error) => Err(error),
    };
    // Whoever asked says whose it is.
    opened.map_err(|error| {
        let Failure { code, what, advice } = super::failure("", &error);
        Failure::new(code, what.trim_start_matches(": "), advice)
    })
}

fn send(to: &mut impl Write, field: &[u8]) -> io::Result<()> {
    let len = u32::try_from(field.len()).map_err(|_long| io::ErrorKind::InvalidInput)?;
    to.write_all(&len.to_le_bytes())?;
    to.write_all(field)
}

fn receive(from: &mut impl Read, len_max: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = usize::try_from(u32::from_le_bytes(len)).map_err(|_long| io::ErrorKind::InvalidData)?;
    if len > len_max {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut field = Zeroizing::new(vec![0; len]);
    from.read_exact(&mut field)?;
    Ok(field)
}
