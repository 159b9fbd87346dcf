//! Opening a root in two halves: [gathering](RootSpec::gather), by a process that may open files, start others and ask
//! people; and [using](super::Root::from_material) what was gathered, by one that may do nothing of that.

use super::container::{self, Container, Keeper};
use super::helper::{Request, Task};
use super::spec::RootSpec;
use super::{file, parse, parse_container};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::fmt;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use zeroize::Zeroizing;

/// Where passphrases and PINs come from, and the program that talks to TPMs and tokens.
pub trait Ask {
    /// The passphrase or PIN that is asked for. May wait for a person.
    ///
    /// # Errors
    ///
    /// [`Permission`](ErrorKind::Permission) if there is nobody to ask; whatever else kept it from us.
    fn secret(&mut self, question: &Question<'_>) -> Result<Zeroizing<Vec<u8>>, Error>;

    /// A program that reads a [`Request`] from standard input, a socket, and writes its
    /// [`Answer`](super::helper::Answer) there.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](ErrorKind::Unsupported) if there is none.
    fn helper(&mut self) -> Result<Command, Error>;
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question<'a> {
    /// A passphrase, a TPM's PIN, or a token's.
    pub keeper: Keeper,
    /// The root that it is for.
    pub spec: &'a RootSpec,
    /// Whether it is chosen now, and a typing error would be for good.
    pub is_new: bool,
}

impl fmt::Display for Question<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { keeper, spec, is_new } = self;
        let new = if *is_new { "New " } else { "" };
        let what = match (keeper, is_new) {
            (Keeper::Passphrase, false) => "Passphrase",
            (Keeper::Passphrase, true) => "passphrase",
            (Keeper::Tpm2 | Keeper::Pkcs11, _) => "PIN",
        };
        write!(f, "{new}{what} of root {}", spec.path().display())
    }
}

/// Nobody to ask, and no program: for roots in files as they are.
#[derive(Clone, Copy, Debug)]
pub struct Unattended;

impl Ask for Unattended {
    fn secret(&mut self, question: &Question<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
        Err(Error::new(ErrorKind::Permission, Op::Open).detail(format!("{question}: there is nobody to ask")))
    }

    fn helper(&mut self) -> Result<Command, Error> {
        Err(Error::new(ErrorKind::Unsupported, Op::Open).detail("this program talks to no TPM and no token"))
    }
}

/// What it takes to open a root, gathered by a process that may open files and ask people; used by one that may not.
///
/// Wiped when dropped; its `Debug` shows nothing secret.
pub enum RootMaterial {
    /// The root file, open. Its secret was not read.
    File {
        /// What was gathered for.
        spec: RootSpec,
        /// At its beginning.
        file: OwnedFd,
    },
    /// A container and its passphrase.
    Passphrase {
        /// What was gathered for.
        spec: RootSpec,
        /// The file's content.
        container: Container,
        /// The passphrase.
        passphrase: Zeroizing<Vec<u8>>,
    },
    /// A container, and where its secret comes from: an [`Answer`](super::helper::Answer) of the helper, which has ended.
    Helper {
        /// What was gathered for.
        spec: RootSpec,
        /// The file's content.
        container: Container,
        /// Where the answer is read.
        answer: OwnedFd,
    },
}

/// A [`RootMaterial`] in pieces that can be sent over a socket.
pub struct RootParts {
    /// Which kind it is.
    pub kind: u8,
    /// What may be seen.
    pub plain: Vec<u8>,
    /// What may not.
    pub secret: Zeroizing<Vec<u8>>,
    /// Descriptors (`SCM_RIGHTS`).
    pub descriptors: Vec<OwnedFd>,
}

impl fmt::Debug for RootParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, plain, secret: _, descriptors } = self;
        write!(f, "RootParts(kind {kind}, {} bytes, {} descriptors)", plain.len(), descriptors.len())
    }
}

impl fmt::Debug for RootMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootMaterial({})", self.spec())
    }
}

const FILE: u8 = 1;
const PASSPHRASE: u8 = 2;
const HELPER: u8 = 3;

impl RootMaterial {
    /// What was gathered for.
    #[must_use]
    pub fn spec(&self) -> &RootSpec {
        match self {
            Self::File { spec, .. } | Self::Passphrase { spec, .. } | Self::Helper { spec, .. } => spec,
        }
    }

    /// In pieces that can be sent.
    #[must_use]
    pub fn into_parts(self) -> RootParts {
        let none = || Zeroizing::new(Vec::new());
        let plain = |spec: &RootSpec, container: &[u8]| {
            let spec = spec.to_bytes();
            let len = u32::try_from(spec.len()).expect("specs are short");
            [&len.to_le_bytes(), &spec[..], container].concat()
        };
        match self {
            Self::File { spec, file } => {
                RootParts { kind: FILE, plain: plain(&spec, &[]), secret: none(), descriptors: vec![file] }
            }
            Self::Passphrase { spec, container, passphrase } => RootParts {
                kind: PASSPHRASE,
                plain: plain(&spec, &container.to_bytes()),
                secret: passphrase,
                descriptors: Vec::new(),
            },
            Self::Helper { spec, container, answer } => RootParts {
                kind: HELPER,
                plain: plain(&spec, &container.to_bytes()),
                secret: none(),
                descriptors: vec![answer],
            },
        }
    }

    /// From the pieces that were sent.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid), [`KeyRejected`](ErrorKind::KeyRejected): they are not what
    /// [`into_parts`](Self::into_parts) gave.
    pub fn from_parts(parts: RootParts) -> Result<Self, Error> {
        let strange = || Error::new(ErrorKind::Invalid, Op::Open).detail("this is no material for a root");
        let RootParts { kind, plain, secret, mut descriptors } = parts;
        let (len, rest) = plain.split_first_chunk::<4>().ok_or_else(strange)?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_wide| strange())?;
        let (spec, bytes) = rest.split_at_checked(len).ok_or_else(strange)?;
        let spec = RootSpec::parse(spec)?;
        let container = || {
            Container::parse(bytes).map_err(|(kind, why)| file::refused(kind, Op::Open, spec.path(), &why))
        };
        match (kind, descriptors.pop(), descriptors.is_empty()) {
            (FILE, Some(file), true) => Ok(Self::File { spec, file }),
            (PASSPHRASE, None, _) => {
                Ok(Self::Passphrase { container: container()?, spec: spec.clone(), passphrase: secret })
            }
            (HELPER, Some(answer), true) => {
                Ok(Self::Helper { container: container()?, spec: spec.clone(), answer })
            }
            _ => Err(strange()),
        }
    }
}

impl RootSpec {
    /// Gathers what it takes to open this root. Secrets of files are not read, and passphrases not tried: that is for
    /// [`Root::from_material`](super::Root::from_material).
    ///
    /// # Errors
    ///
    /// - [`NotFound`](ErrorKind::NotFound): nothing has this name.
    /// - [`Permission`](ErrorKind::Permission): we may not read it, others may, it belongs to somebody else, or nobody
    ///   answered.
    /// - [`KeyRejected`](ErrorKind::KeyRejected): a container, but damaged.
    /// - [`Invalid`](ErrorKind::Invalid): no file, no root, or one that is kept in another way than the spec says.
    /// - [`EngineFailed`](ErrorKind::EngineFailed): the system failed.
    /// - What `ask` says.
    ///
    /// What a TPM or token refused comes out when the material is used.
    ///
    /// # Blocking
    ///
    /// Waits for people, and for TPMs and tokens.
    pub fn gather(&self, ask: &mut dyn Ask) -> Result<RootMaterial, Error> {
        let spec = self.clone();
        if let Self::File(path) = self {
            return Ok(RootMaterial::File { file: file::open(path)?, spec });
        }
        let container = read_container(self)?;
        let question = Question { keeper: container.keeper, spec: self, is_new: false };
        match container.keeper {
            Keeper::Passphrase => {
                Ok(RootMaterial::Passphrase { passphrase: ask.secret(&question)?, spec, container })
            }
            Keeper::Tpm2 | Keeper::Pkcs11 => {
                let pin = if container.asks { Some(self.pin(ask, question)?) } else { None };
                let request = Request { spec: self.clone(), pin, task: Task::Open(container.clone()) };
                Ok(RootMaterial::Helper { answer: ask_helper(&request, ask)?, spec, container })
            }
        }
    }

    /// Whether [`gather`](Self::gather) asks for a passphrase or PIN. If not, whoever gathered once can do so again by
    /// himself, as after an engine was started anew.
    ///
    /// What cannot be read asks nothing: gathering says why.
    #[must_use]
    pub fn needs_asking(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Pkcs11(spec) if spec.pin_source.is_some() => false,
            _ => read_container(self).is_ok_and(|container| container.asks),
        }
    }

    /// The PIN: from the file that holds it, else from whom we ask.
    pub(super) fn pin(&self, ask: &mut dyn Ask, question: Question<'_>) -> Result<Zeroizing<Vec<u8>>, Error> {
        let source = match self {
            Self::Pkcs11(spec) => spec.pin_source.as_ref(),
            _ => None,
        };
        let Some(source) = source else { return ask.secret(&question) };
        let mut bytes = Zeroizing::new(vec![0; PIN_BYTES_MAX + 2]);
        let len = read_file(source, &mut bytes)?;
        if len > PIN_BYTES_MAX {
            return Err(file::refused(
                ErrorKind::Invalid,
                Op::Open,
                source,
                "is too long for a PIN; name another file",
            ));
        }
        bytes.truncate(len);
        strip_line_feed(&mut bytes);
        Ok(bytes)
    }
}

/// Longest PIN that is taken from a file. Tokens take less.
const PIN_BYTES_MAX: usize = 1024;

/// Takes away one line feed at the end, with which editors and `echo` end a file, so that what was typed and what was
/// written into a file are the same.
pub fn strip_line_feed(bytes: &mut Vec<u8>) {
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
    }
}

fn read_file(path: &Path, bytes: &mut [u8]) -> Result<usize, Error> {
    let mut file = File::from(file::open(path)?);
    file::read_up_to(&mut file, bytes)
        .map_err(|why| file::error(ErrorKind::EngineFailed, Op::Open, path, "cannot be read").because(why))
}

/// The container that `spec` names, if it is what the spec says.
pub(super) fn read_container(spec: &RootSpec) -> Result<Container, Error> {
    let path = spec.path();
    // It may turn out to be a root file as it is: then this held a secret.
    let mut bytes = Zeroizing::new(vec![0; container::BYTES_MAX + 1]);
    let len = read_file(path, &mut bytes)?;
    let container = parse_container(&bytes[..len], spec)
        .map_err(|(kind, why)| file::refused(kind, Op::Open, path, &why))?;
    Ok(container)
}

/// Starts the helper, waits for its end, and returns where its answer can be read.
pub(super) fn ask_helper(request: &Request, ask: &mut dyn Ask) -> Result<OwnedFd, Error> {
    let failed = |what: &str, why| {
        let name = request.spec.path().display();
        Error::new(ErrorKind::EngineFailed, Op::Open)
            .detail(format!("root {name}: {what}; start again"))
            .because(why)
    };
    let mut command = ask.helper()?;
    let (mut ours, theirs) = UnixStream::pair().map_err(|why| failed("no socket for the helper", why))?;
    // Modules of others may print; what they print is no answer.
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let mut child =
        command.spawn().map_err(|why| failed("the process that talks to it cannot be started", why))?;
    // It holds a copy of the other end, which would keep the answer from ending.
    drop(command);
    // If it is gone already, its answer or its silence says more.
    let _ = request.send(&mut ours).and_then(|()| ours.shutdown(Shutdown::Write));
    // The answer is short enough to wait in the socket.
    child.wait().map_err(|why| failed("the process that talks to it cannot be waited for", why))?;
    Ok(ours.into())
}

pub(super) fn read_secret_file(file: OwnedFd, path: &Path) -> Result<super::Secret, Error> {
    // One byte more than a root file has, to see whether there is more.
    let mut bytes = Zeroizing::new([0; super::FILE_BYTES + 1]);
    let len = file::read_up_to(&mut File::from(file), &mut *bytes)
        .map_err(|why| file::error(ErrorKind::EngineFailed, Op::Open, path, "cannot be read").because(why))?;
    parse(&bytes[..len]).map_err(|(kind, why)| file::refused(kind, Op::Open, path, &why))
}
