//! The root: where the key that wraps long-term keys comes from.
//!
//! Every kind of root ends in one secret of 32 random bytes. What differs is who keeps it, and what it takes to get it.
//! From the secret come the long-term wrapping key, the root's public identifier, and the key of the chip for which it
//! stands when the engine is a [model of hardware](crate::ice), all one way; the secret itself is wiped before the root is
//! handed out.
//!
//! ```text
//!   RootSpec   file:PATH              the secret as it is, in a file that only its owner reads
//!              passphrase:PATH        a container: wrapped by a passphrase, with argon2id
//!              tpm2:PATH,...          a container: sealed by a TPM 2.0
//!              pkcs11:...?file=PATH   a container: wrapped by a key on a token
//!         |
//!         | gather: opens files, asks people, starts the helper       in a process that may
//!         v
//!   RootMaterial   an open file | container and passphrase | container and an answer to read
//!         |
//!         | Root::from_material: reads, stretches, unwraps, compares  in a process that may nothing of that
//!         v
//!   secret, 32 bytes --derive--> wrapping key (stays in this crate), identifier (public)
//! ```
//!
//! - A kind can be changed: [`Root::rewrap`] wraps the same secret in another way. The identifier stays, and every key
//!   that was ever wrapped under the root still opens.
//! - TPMs and tokens are talked to by a short-lived process of its own (the crate `inlinecrypt-roots`, over the messages in
//!   [`helper`]), which loads what others wrote. Neither it nor they are ever where keys are.
//! - What keeps the secret cannot be told apart from the outside: all kinds give the same [`Root`].
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
//! # The container
//!
//! ```text
//!   offset  bytes   numbers are little-endian
//!        0     16   magic "inlinecrypt root"
//!       16      4   version: 2
//!       20      2   what wraps: 1 a passphrase, 2 a TPM, 3 a token
//!       22      2   1: a passphrase or PIN has to be asked for
//!       24      8   the root's public identifier
//!       32      4   n
//!       36      n   body, at most 4096 bytes: passphrase.rs here, tpm2.rs and pkcs11.rs in `inlinecrypt-roots`
//!     36+n     16   check value over all before it, so that damage is found; not secret
//! ```
//!
//! Whoever has a container learns the identifier and what wraps it. A container that opens to a secret with another
//! identifier is refused.
//!
//! # Both
//!
//! - Who has the secret can open every key that was ever wrapped under it; who loses it, nobody can. Keep a copy where it
//!   is safe: of the file, or a container of another kind.
//! - The file belongs to us or to root, and nobody else may read or write it. Access lists count: they show in the
//!   group's bits.
//! - It appears under its name complete or not at all, and replaces another only in [`Root::rewrap`], where that one is
//!   untouched until the new one is on the disk. Of two first starts at once one makes the root and both use it. A crash
//!   may leave a file `.NAME.*.tmp` behind, which nothing uses.

mod container;
mod file;
pub mod helper;
mod material;
mod passphrase;
mod spec;
#[cfg(test)]
mod tests;

pub use container::{BODY_BYTES_MAX, Container, Keeper};
pub use helper::Secret;
pub use material::{Ask, Question, RootMaterial, RootParts, Unattended, strip_line_feed};
pub use passphrase::{Cost, PASSPHRASE_BYTES_MAX};
pub use spec::{PCR_COUNT, PcrBank, Pcrs, Pkcs11Spec, RootSpec, Tcti, Tpm2Spec};

use crate::blob::{Form, Wrapper, WrappingKeyId};
use crate::random;
use helper::{Answer, Request, Task};
use inlinecrypt_cipher::kdf::counter_mode_cmac;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use material::ask_helper;
use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use zeroize::Zeroizing;

const MAGIC: [u8; 16] = *b"inlinecrypt root";
/// Version of root files that hold the secret as it is.
const VERSION: u32 = 1;
/// Magic and version, which all root files begin with.
const HEADER_BYTES: usize = 20;
const SECRET_AT: usize = HEADER_BYTES;
const CHECK_AT: usize = 52;
const FILE_BYTES: usize = 64;

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
    /// Opens the root that `spec` names, if nobody has to be asked and no TPM or token is needed: a file.
    ///
    /// # Errors
    ///
    /// Those of [`open_with`](Self::open_with).
    pub fn open(spec: &RootSpec) -> Result<Self, Error> {
        Self::open_with(spec, &mut Unattended)
    }

    /// Opens the root that `spec` names, asking where it must.
    ///
    /// # Errors
    ///
    /// Those of [`gather`](RootSpec::gather) and [`from_material`](Self::from_material).
    ///
    /// # Blocking
    ///
    /// Waits for people, TPMs and tokens.
    pub fn open_with(spec: &RootSpec, ask: &mut dyn Ask) -> Result<Self, Error> {
        Self::from_material(spec.gather(ask)?)
    }

    /// Opens a root with what was gathered for it. Opens no file, starts no process; takes a moment for a passphrase.
    ///
    /// # Errors
    ///
    /// - [`KeyRejected`](ErrorKind::KeyRejected): a wrong passphrase, damage, another TPM, a moved register.
    /// - [`Permission`](ErrorKind::Permission): a wrong PIN, or one that was wrong too often.
    /// - [`NotFound`](ErrorKind::NotFound): no TPM, module, token or key there.
    /// - [`Invalid`](ErrorKind::Invalid): no root, or one that is kept in another way than the spec says.
    /// - [`EngineFailed`](ErrorKind::EngineFailed): the system, the TPM or the token failed.
    pub fn from_material(material: RootMaterial) -> Result<Self, Error> {
        let spec = material.spec().clone();
        let secret = open_secret(material)?;
        Ok(Self::from_secret(&secret, spec))
    }

    /// Opens the root that `spec` names. A file is made if there is none; the other kinds have to be
    /// [created](Self::create), since a typing error would make one that nobody wanted.
    ///
    /// # Errors
    ///
    /// Those of [`open_with`](Self::open_with) and [`create_file`](Self::create_file).
    pub fn open_or_create(spec: &RootSpec, ask: &mut dyn Ask) -> Result<Self, Error> {
        match spec {
            RootSpec::File(path) => Self::open_or_create_file(path),
            _ => Self::open_with(spec, ask),
        }
    }

    /// Makes a new random root in a file that does not exist yet, kept as `spec` says.
    ///
    /// # Errors
    ///
    /// - Those of [`create_file`](Self::create_file).
    /// - What `ask` says, and what the TPM or the token refuses.
    ///
    /// # Blocking
    ///
    /// Waits for people, TPMs, tokens, and for the disk.
    pub fn create(spec: &RootSpec, ask: &mut dyn Ask) -> Result<Self, Error> {
        refuse_what_is_there(spec.path())?;
        let secret = random::secret(Op::Create)?;
        if !file::write_new(spec.path(), &wrap(spec, &secret, ask)?)? {
            return Err(is_there(spec.path()));
        }
        Ok(Self::from_secret(&secret, spec.clone()))
    }

    /// Wraps the secret of the root `from` as `to` says: the same root, kept by somebody else. The file of `to` is new,
    /// or that of `from`, which is then replaced: it is as it was until the new one is on the disk.
    ///
    /// In this process the secret is in memory meanwhile, so it should be one that does nothing else.
    ///
    /// # Errors
    ///
    /// Those of [`open_with`](Self::open_with) for `from`, those of [`create`](Self::create) for `to`.
    ///
    /// # Blocking
    ///
    /// Waits for people, TPMs, tokens, and for the disk.
    pub fn rewrap(
        from: &RootSpec,
        ask_from: &mut dyn Ask,
        to: &RootSpec,
        ask_to: &mut dyn Ask,
    ) -> Result<Self, Error> {
        let replaces = match (fs::canonicalize(from.path()), fs::canonicalize(to.path())) {
            (Ok(from), Ok(to)) => from == to,
            _ => false,
        };
        if !replaces {
            refuse_what_is_there(to.path())?;
        }
        let secret = open_secret(from.gather(ask_from)?)?;
        let bytes = wrap(to, &secret, ask_to)?;
        if replaces {
            file::replace(to.path(), &bytes)?;
        } else if !file::write_new(to.path(), &bytes)? {
            return Err(is_there(to.path()));
        }
        Ok(Self::from_secret(&secret, to.clone()))
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
        Self::open(&RootSpec::File(path.as_ref().into()))
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
        Self::create(&RootSpec::File(path.as_ref().into()), &mut Unattended)
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
        let secret = random::secret(Op::Create)?;
        if file::write_new(path, &*serialize(&secret))? {
            Ok(Self::from_secret(&secret, RootSpec::File(path.into())))
        } else {
            // Somebody was faster.
            Self::open_file(path)
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
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wrapper, chip: _, spec } = self;
        write!(f, "Root({}, {spec})", wrapper.id())
    }
}

/// What a root file says about itself without being opened. Proves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RootInfo {
    /// The secret as it is; the root's identifier comes from it.
    File {
        /// The root's public identifier.
        id: WrappingKeyId,
    },
    /// A container.
    Container(Container),
}

impl RootInfo {
    /// Looks at the root that `spec` names. Asks nobody, and needs neither TPM nor token.
    ///
    /// # Errors
    ///
    /// Those of [`gather`](RootSpec::gather).
    pub fn look(spec: &RootSpec) -> Result<Self, Error> {
        match spec {
            RootSpec::File(path) => Ok(Self::File { id: Root::open_file(path)?.id() }),
            _ => material::read_container(spec).map(Self::Container),
        }
    }

    /// The root's public identifier.
    #[must_use]
    pub fn id(&self) -> WrappingKeyId {
        match self {
            Self::File { id } => *id,
            Self::Container(container) => container.id,
        }
    }
}

fn open_secret(material: RootMaterial) -> Result<Secret, Error> {
    let name = material.spec().path().to_owned();
    let refused = |(kind, why): (ErrorKind, String)| file::refused(kind, Op::Open, &name, &why);
    let (secret, container) = match material {
        RootMaterial::File { spec: _, file } => return material::read_secret_file(file, &name),
        RootMaterial::Passphrase { spec: _, container, passphrase } => {
            (passphrase::unwrap(&container, &passphrase).map_err(refused)?, container)
        }
        RootMaterial::Helper { spec: _, container, answer } => {
            match Answer::receive(&mut File::from(answer), Op::Open, &called(&name))? {
                Answer::Opened(secret) => (secret, container),
                Answer::Wrapped { .. } => {
                    return Err(refused((ErrorKind::Bug, "was answered for another question".into())));
                }
            }
        }
    };
    let id = Wrapper::derive(&secret, Form::LongTerm).id();
    if id != container.id {
        let why =
            format!("opens to another root, {id}, than it says, {}; restore it from a copy", container.id);
        return Err(refused((ErrorKind::KeyRejected, why)));
    }
    Ok(secret)
}

/// The bytes of a file that keeps `secret` as `spec` says. They were opened again, or can be for certain.
fn wrap(spec: &RootSpec, secret: &Secret, ask: &mut dyn Ask) -> Result<Zeroizing<Vec<u8>>, Error> {
    let refused = |(kind, why): (ErrorKind, String)| file::refused(kind, Op::Create, spec.path(), &why);
    let id = Wrapper::derive(secret, Form::LongTerm).id();
    let keeper = match spec {
        RootSpec::File(_) => return Ok(Zeroizing::new(serialize(secret).to_vec())),
        RootSpec::Passphrase(_) => {
            let passphrase = ask.secret(&Question { keeper: Keeper::Passphrase, spec, is_new: true })?;
            let salt = random::secret(Op::Create)?;
            let container =
                passphrase::wrap(secret, id, &passphrase, &salt, Cost::DEFAULT).map_err(refused)?;
            return Ok(Zeroizing::new(container.to_bytes()));
        }
        RootSpec::Tpm2(_) => Keeper::Tpm2,
        RootSpec::Pkcs11(_) => Keeper::Pkcs11,
    };
    let pin = match spec {
        RootSpec::Tpm2(Tpm2Spec { pin: false, .. }) => None,
        // A TPM's PIN is chosen here; a token has one already.
        _ => Some(spec.pin(ask, Question { keeper, spec, is_new: keeper == Keeper::Tpm2 })?),
    };
    let request = Request { spec: spec.clone(), pin, task: Task::Wrap(secret_copy(secret)) };
    let answer = ask_helper(&request, ask)?;
    match Answer::receive(&mut File::from(answer), Op::Create, &called(spec.path()))? {
        Answer::Wrapped { asks, body } => Ok(Zeroizing::new(Container { keeper, asks, id, body }.to_bytes())),
        Answer::Opened(_) => Err(refused((ErrorKind::Bug, "was answered for another question".into()))),
    }
}

fn secret_copy(secret: &Secret) -> Secret {
    let mut copy = Box::new(Zeroizing::new([0; 32]));
    copy.copy_from_slice(&***secret);
    copy
}

/// How messages call the root at `path`.
fn called(path: &Path) -> String {
    format!("root file {}", path.display())
}

fn refuse_what_is_there(path: &Path) -> Result<(), Error> {
    if path.symlink_metadata().is_ok() { Err(is_there(path)) } else { Ok(()) }
}

fn is_there(path: &Path) -> Error {
    file::refused(ErrorKind::Invalid, Op::Create, path, "exists already and was not touched")
}

/// Checks magic and version, and returns the version.
fn parse_header(bytes: &[u8]) -> Result<u32, (ErrorKind, String)> {
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
    let Some(version) = bytes.get(MAGIC.len()..HEADER_BYTES) else {
        return damaged(format!("is cut off after {} bytes", bytes.len()));
    };
    match u32::from_le_bytes(version.try_into().expect("four bytes, by the constants")) {
        version @ (VERSION | container::VERSION) => Ok(version),
        version => Err((
            ErrorKind::Invalid,
            format!(
                "is a root file of version {version}; this program knows {VERSION} and {}",
                container::VERSION
            ),
        )),
    }
}

/// The secret in a root file's bytes.
fn parse(bytes: &[u8]) -> Result<Secret, (ErrorKind, String)> {
    let damaged = |why: String| Err((ErrorKind::KeyRejected, format!("{why}; restore it from a copy")));
    if parse_header(bytes)? == container::VERSION {
        let keeper = match bytes.get(HEADER_BYTES) {
            Some(1) => "passphrase:PATH",
            Some(2) => "tpm2:PATH",
            Some(3) => "pkcs11:URI",
            _ => "the kind that it is",
        };
        return Err((ErrorKind::Invalid, format!("is wrapped; name it as {keeper}")));
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

/// The container in a root file's bytes, if it is one of the kind that `spec` says.
fn parse_container(bytes: &[u8], spec: &RootSpec) -> Result<Container, (ErrorKind, String)> {
    if parse_header(bytes)? == VERSION {
        return Err((ErrorKind::Invalid, "is not wrapped; name it as file:PATH".into()));
    }
    let container = Container::parse(bytes)?;
    let expected = match spec {
        RootSpec::File(_) => None,
        RootSpec::Passphrase(_) => Some(Keeper::Passphrase),
        RootSpec::Tpm2(_) => Some(Keeper::Tpm2),
        RootSpec::Pkcs11(_) => Some(Keeper::Pkcs11),
    };
    if expected != Some(container.keeper) {
        let actual = container.keeper.name();
        return Err((ErrorKind::Invalid, format!("is wrapped in another way; name it as {actual}:...")));
    }
    Ok(container)
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
