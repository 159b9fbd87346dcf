//! Keys as people name and store them: wrapped blobs, which may lie anywhere, and raw keys, which may not.

use crate::ask::Asker;
use crate::files::{self, Secrecy};
use crate::luks::token::WrappedKey;
use crate::luks::unlock::LuksKey;
use crate::report::{Code, Failure};
use inlinecrypt_core::config::Mode;
use inlinecrypt_core::engine::RawKeySource;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{KeyForm, LongTermWrappedKey, RawKey};
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_engine::{BlobError, Form, inspect, looks_like_wrapped_key};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// More is no key of any form.
const KEY_FILE_BYTES_MAX: usize = 4096;

/// Which form of key is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A long-term wrapped key.
    Wrapped,
    /// The bytes as they are.
    Raw,
}

/// Where a key is: `FILE` for a wrapped one, `raw:FILE` for a raw one, `-` for standard input.
#[derive(Clone)]
pub(crate) struct KeySource {
    pub(crate) wanted: Wanted,
    place: Place,
}

#[derive(Clone)]
enum Place {
    File(PathBuf),
    Stdin,
    /// What standard input gave.
    Given(Arc<Zeroizing<Vec<u8>>>),
    /// In a LUKS container, for whoever has the passphrase.
    Luks(LuksKey),
    /// A wrapped key in the header at this path.
    Token(PathBuf, Arc<Zeroizing<Vec<u8>>>),
    /// In the line of a dm table in this file; the key itself, if that was a pipe.
    Table(PathBuf, Option<Arc<Zeroizing<Vec<u8>>>>),
}

impl KeySource {
    /// The long-term wrapped key in a file.
    pub(crate) fn wrapped(path: PathBuf) -> Self {
        Self { wanted: Wanted::Wrapped, place: Place::File(path) }
    }

    /// The volume key of a LUKS container.
    pub(crate) fn luks(key: LuksKey) -> Self {
        Self { wanted: Wanted::Raw, place: Place::Luks(key) }
    }

    /// The wrapped key in a LUKS header.
    pub(crate) fn token(header: PathBuf, key: &WrappedKey) -> Self {
        let blob = Arc::new(Zeroizing::new(key.blob.clone()));
        Self { wanted: Wanted::Wrapped, place: Place::Token(header, blob) }
    }

    /// The same, with the passphrase that it takes, if it takes one.
    pub(crate) fn asked(&self, asker: &mut Asker) -> Result<Self, Failure> {
        match &self.place {
            Place::Luks(key) => Ok(Self::luks(key.asked(asker)?)),
            _ => Ok(self.clone()),
        }
    }

    /// What opens it, if it is the volume key of a LUKS container.
    pub(crate) fn luks_key(&self) -> Option<&LuksKey> {
        match &self.place {
            Place::Luks(key) => Some(key),
            _ => None,
        }
    }

    /// Whether a raw key can be read again without asking anybody.
    pub(crate) fn can_be_had_again(&self) -> bool {
        match &self.place {
            Place::File(_) | Place::Table(_, None) => true,
            Place::Luks(key) => key.can_be_had_again(),
            Place::Stdin | Place::Given(_) | Place::Token(..) | Place::Table(_, Some(_)) => false,
        }
    }

    /// The raw key in the line of a dm table, in a file. `kept` is what a pipe gave, which cannot be read again.
    pub(crate) fn in_table(path: PathBuf, kept: Option<Zeroizing<Vec<u8>>>) -> Self {
        Self { wanted: Wanted::Raw, place: Place::Table(path, kept.map(Arc::new)) }
    }

    /// A raw key that standard input gave.
    pub(crate) fn given_raw(key: Zeroizing<Vec<u8>>) -> Self {
        Self { wanted: Wanted::Raw, place: Place::Given(Arc::new(key)) }
    }

    /// What is written on a command line or in a config, where paths are relative to `base`.
    pub(crate) fn parse(text: &OsStr, base: &Path) -> Result<Self, String> {
        let (wanted, rest) = match text.as_bytes().strip_prefix(b"raw:") {
            Some(rest) => (Wanted::Raw, OsStr::from_bytes(rest)),
            None => (Wanted::Wrapped, text),
        };
        let place = match rest.as_bytes() {
            b"" => return Err("the file is missing: FILE, raw:FILE, or - for standard input".to_owned()),
            b"-" => Place::Stdin,
            _ => Place::File(crate::places::relative_to(base, Path::new(rest))),
        };
        Ok(Self { wanted, place })
    }

    /// How a description that lies in `directory` names it; `None` for standard input.
    pub(crate) fn described_from(&self, directory: &Path) -> Option<OsString> {
        let Place::File(path) = &self.place else { return None };
        let path = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if parent == directory => PathBuf::from(name),
            _ => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
        };
        let prefix: &[u8] = match self.wanted {
            Wanted::Wrapped => b"",
            Wanted::Raw => b"raw:",
        };
        Some(OsString::from_vec([prefix, path.as_os_str().as_bytes()].concat()))
    }

    /// As it is written on a command line.
    pub(crate) fn written(&self) -> String {
        let place = match &self.place {
            Place::File(path) => path.display().to_string(),
            Place::Stdin | Place::Given(_) => "-".to_owned(),
            Place::Luks(LuksKey { header, .. }) | Place::Token(header, _) => header.display().to_string(),
            Place::Table(path, _) => return format!("FILE, as in {}", path.display()),
        };
        match self.wanted {
            Wanted::Wrapped => place,
            Wanted::Raw => format!("raw:{place}"),
        }
    }

    /// The file, if it is one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path) => Some(path),
            Place::Stdin | Place::Given(_) | Place::Luks(_) | Place::Token(..) | Place::Table(..) => None,
        }
    }

    /// Reads standard input now, if the key is there, so that it can be looked at more than once.
    pub(crate) fn take_stdin(&mut self) -> Result<(), Failure> {
        if let Place::Stdin = self.place {
            self.place = Place::Given(Arc::new(files::read_stdin("key", KEY_FILE_BYTES_MAX)?));
        }
        Ok(())
    }

    /// Reads the key and checks that it has the form that was asked for.
    pub(crate) fn load(&self) -> Result<LoadedKey, Failure> {
        let secrecy = match self.wanted {
            Wanted::Wrapped => Secrecy::Public,
            Wanted::Raw => Secrecy::Secret,
        };
        let bytes = match &self.place {
            Place::File(path) => Arc::new(files::read(path, "key file", secrecy, KEY_FILE_BYTES_MAX)?),
            Place::Stdin => Arc::new(files::read_stdin("key", KEY_FILE_BYTES_MAX)?),
            Place::Given(bytes) | Place::Token(_, bytes) | Place::Table(_, Some(bytes)) => bytes.clone(),
            Place::Luks(key) => return key.open().map(LoadedKey::Raw),
            Place::Table(path, None) => Arc::new(crate::table::key_in(path)?),
        };
        let refused =
            |what: String, advice: String| Failure::new(Code::Refused, format!("{self} {what}"), advice);
        if bytes.is_empty() {
            return Err(refused("is empty".into(), "Restore it from a copy, or name the right file.".into()));
        }
        if bytes.starts_with(b"inlinecrypt root") {
            return Err(refused(
                "is a root, not a key".into(),
                "Name it with --root, and give the key that was wrapped under it.".into(),
            ));
        }
        match (self.wanted, looks_like_wrapped_key(&bytes)) {
            (Wanted::Raw, Some(form)) => Err(refused(
                format!("was given as a raw key, and looks like a {form} wrapped key"),
                format!("Give it without \"raw:\": --key {}", self.shown()),
            )),
            (Wanted::Raw, None) => Ok(LoadedKey::Raw(RawKey::new(&bytes))),
            (Wanted::Wrapped, None) => Err(refused(
                format!("was given as a wrapped key, and is not one: {}", looks_like(&bytes)),
                match bytes.len() {
                    // Both are possible: some modes take raw keys of this length.
                    32 => format!(
                        "Wrap it first: inlinecrypt key import --in {0} --out NEW; or use it as it is: --key raw:{0}",
                        self.shown()
                    ),
                    16 | 64 => format!("Give a raw key as --key raw:{}", self.shown()),
                    _ => "Check that it is the right file; a raw key is given as --key raw:FILE".to_owned(),
                },
            )),
            (Wanted::Wrapped, Some(Form::Ephemeral)) => Err(refused(
                "is an ephemeral wrapped key, of use only until the engine that prepared it stops".into(),
                "Give the long-term one that it was prepared from.".into(),
            )),
            (Wanted::Wrapped, Some(Form::LongTerm)) => match inspect(&bytes) {
                // Blobs of some hardware have no header to look at: its engine says whether it takes them.
                Ok(_) | Err(BlobError::NotWrapped { .. }) => {
                    Ok(LoadedKey::Wrapped(LongTermWrappedKey::new(&bytes)))
                }
                Err(why) => Err(refused(
                    format!("cannot be used: {why}"),
                    "Restore it from a copy: without it the data cannot be read.".into(),
                )),
            },
        }
    }

    fn shown(&self) -> String {
        self.path().map_or_else(|| "-".to_owned(), files::shell_word)
    }
}

/// A raw key in a file can be read again.
impl RawKeySource for KeySource {
    fn read(&self) -> Result<RawKey, Error> {
        match self.load() {
            Ok(LoadedKey::Raw(key)) => Ok(key),
            Ok(LoadedKey::Wrapped(_)) => Err(Error::new(ErrorKind::KeyRejected, Op::Open)),
            Err(failure) => Err(Error::new(ErrorKind::NotFound, Op::Open).detail(failure.what)),
        }
    }
}

/// Not a key, but where it is: may be shown.
impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::File(path) => write!(f, "key file {}", path.display()),
            Place::Stdin | Place::Given(_) => f.write_str("the key on standard input"),
            Place::Luks(key) => write!(f, "the volume key of {}", key.header.display()),
            Place::Token(header, _) => write!(f, "the wrapped key in {}", header.display()),
            Place::Table(path, _) => write!(f, "the key in table {}", path.display()),
        }
    }
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySource({:?}, {self})", self.wanted)
    }
}

/// What bytes that are no wrapped key may be. Says nothing about their values.
fn looks_like(bytes: &[u8]) -> String {
    let len = bytes.len();
    let is_hex = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_hexdigit);
    match len {
        16 | 32 | 64 => format!("it looks like a raw key of {len} bytes"),
        _ if is_hex(bytes.trim_ascii_end()) => {
            format!(
                "it looks like a raw key in hexadecimal, {} bytes of it",
                bytes.trim_ascii_end().len() / 2
            )
        }
        _ => format!("its {len} bytes do not begin as a wrapped key does"),
    }
}

/// A key as it was stored. Only its form is known to be right.
#[derive(Debug)]
pub(crate) enum LoadedKey {
    Wrapped(LongTermWrappedKey),
    Raw(RawKey),
}

impl LoadedKey {
    /// The form in which it is used for I/O: a wrapped key is opened by the engine and wrapped again for this start.
    pub(crate) fn form(&self, profile: &CryptoProfile, name: &KeySource) -> Result<KeyForm, Failure> {
        match self {
            Self::Raw(key) => {
                let again = name.can_be_had_again().then(|| Arc::new(name.clone()) as _);
                profile
                    .deposit(RawKey::new(key.expose()), again)
                    .map_err(|error| Failure::of(format!("{name} is refused"), &error))
            }
            Self::Wrapped(blob) => profile.prepare(blob).map(KeyForm::Wrapped).map_err(|error| {
                let advice = match error.kind() {
                    ErrorKind::KeyRejected if error.chain().contains("wrapped under root") => {
                        "Name the root that wrapped it with --root PATH, or give the right key."
                    }
                    ErrorKind::KeyRejected if error.chain().contains("by an ICE engine") => {
                        "Name the engine with --engine ice:VARIANT (spec = \"ice:VARIANT\" in a config)."
                    }
                    ErrorKind::KeyRejected => {
                        "Restore the key file from a copy: without it the data cannot be read."
                    }
                    ErrorKind::Unsupported => {
                        "Choose an engine that takes such keys (inlinecrypt engine info), or give a raw key."
                    }
                    _ => "The key may be good: start again, and if it stays, use another engine.",
                };
                Failure::of(format!("{name} is refused"), &error).advise(advice)
            }),
        }
    }

    /// Length of a raw key, in bytes.
    pub(crate) fn raw_len(&self) -> Option<usize> {
        match self {
            Self::Raw(key) => Some(key.expose().len()),
            Self::Wrapped(_) => None,
        }
    }

    /// Whether a raw key has the length that `mode` takes.
    pub(crate) fn check_length(&self, mode: Mode, name: &KeySource) -> Result<(), Failure> {
        let Self::Raw(key) = self else { return Ok(()) };
        let (len, wanted) = (key.expose().len(), mode.info().key_bytes);
        if len == wanted {
            return Ok(());
        }
        let hint = if len == wanted + 1 && key.expose().ends_with(b"\n") {
            "It ends in a line feed, which is not part of a key: write it without."
        } else if key.expose().trim_ascii_end().iter().all(u8::is_ascii_hexdigit) {
            "It looks like hexadecimal: write the bytes themselves (xxd -r -p)."
        } else {
            "Give a key of that length, or the mode that it is for."
        };
        Err(Failure::new(
            Code::Refused,
            format!("{name} has {len} bytes, and {mode} takes a raw key of {wanted}"),
            hint,
        ))
    }
}
