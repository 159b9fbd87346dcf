//! Which LUKS keyslots open a container's new key: those whose passphrases are given.
//!
//! The passphrase that opened the container keeps what it opens. Others are read from files and descriptors, or asked for, one LUKS
//! keyslot after the other. What no passphrase opens goes with the old key if that is said, else nothing begins.

use super::unlock::{LuksKey, Passphrase, PassphraseFile};
use super::{failure, file::HeaderFile};
use crate::cli::luks::OtherArgs;
use crate::report::{Code, Failure};
use base64ct::{Base64, Encoding as _};
use inlinecrypt_luks::luks2::{Container, Kept};
use inlinecrypt_luks::{ErrorKind, Kind, Storage, detect};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longest passphrase that is handed to a server, in bytes. Longer ones are read from files.
const GIVEN_BYTES_MAX: usize = 4096;

/// What becomes of the LUKS keyslots that the first passphrase does not open.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OtherKeyslots {
    /// What they are opened by.
    pub(crate) passphrases: Vec<OtherPassphrase>,
    /// Whether those that nothing opens go with the old key.
    pub(crate) drops_rest: bool,
}

/// A passphrase besides the first.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OtherPassphrase {
    /// The LUKS keyslot that it was asked for; any that it opens, if it was not.
    slot: Option<u32>,
    /// How messages call it.
    name: String,
    place: Place,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Place {
    /// In a file, of which every byte counts if `whole`.
    File {
        path: PathBuf,
        whole: bool,
    },
    Given(Given),
}

/// A passphrase that was typed, or came through a descriptor.
#[derive(Clone)]
struct Given(Zeroizing<Vec<u8>>);

impl OtherKeyslots {
    /// What a command line says. Descriptors are read.
    pub(crate) fn of(args: &OtherArgs) -> Result<Self, Failure> {
        let OtherArgs { other_passphrase_file, other_passphrase_fd, other_key_file, drop_others } = args;
        let file = |path: &PathBuf, whole| {
            if path == Path::new("-") {
                return Err(Failure::new(
                    Code::Wrong,
                    "the passphrase of another LUKS keyslot cannot be named -",
                    "Name a file; standard input is --other-passphrase-fd 0.",
                ));
            }
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let name = format!("the passphrase in {}", path.display());
            Ok(OtherPassphrase { slot: None, name, place: Place::File { path, whole } })
        };
        let descriptor = |number: &u32| {
            let file = PassphraseFile { path: format!("/dev/fd/{number}").into(), whole: false };
            let name = format!("the passphrase from descriptor {number}");
            Ok(OtherPassphrase { slot: None, name, place: Place::Given(Given(file.read()?)) })
        };
        let files = other_passphrase_file.iter().map(|path| file(path, false));
        let key_files = other_key_file.iter().map(|path| file(path, true));
        let passphrases = files.chain(key_files).chain(other_passphrase_fd.iter().map(descriptor));
        Ok(Self { passphrases: passphrases.collect::<Result<_, _>>()?, drops_rest: *drop_others })
    }

    /// Whether nothing was said of them.
    pub(crate) fn is_unsaid(&self) -> bool {
        self.passphrases.is_empty() && !self.drops_rest
    }

    /// Asks for the passphrases of these LUKS keyslots, one after the other.
    pub(crate) fn ask(&mut self, container: &Path, missing: &[u32]) -> Result<(), Failure> {
        for slot in missing {
            let question = format!("passphrase of LUKS keyslot {slot} of {}: ", container.display());
            let typed = rpassword::prompt_password(question).map_err(|error| {
                Failure::of_io("cannot ask for a passphrase", &error, "Give it with --other-passphrase-file.")
            })?;
            self.passphrases.push(OtherPassphrase {
                slot: Some(*slot),
                name: "the passphrase".to_owned(),
                place: Place::Given(Given(Zeroizing::new(typed.into_bytes()))),
            });
        }
        Ok(())
    }

    /// Refuses what cannot be said to a server.
    pub(crate) fn check_for_server(&self) -> Result<(), Failure> {
        for OtherPassphrase { name, place, .. } in &self.passphrases {
            let why = match place {
                Place::File { path, .. } if path.to_str().is_none() => "has a name that is not UTF-8",
                Place::Given(Given(bytes)) if bytes.len() > GIVEN_BYTES_MAX => {
                    "is too long to be handed to a server"
                }
                _ => continue,
            };
            return Err(Failure::new(
                Code::Wrong,
                format!("{name} {why}"),
                "Put it into a file with a plain name, and name that.",
            ));
        }
        Ok(())
    }

    /// The passphrases, in the order of `passphrases`.
    pub(super) fn read(&self) -> Result<Vec<Zeroizing<Vec<u8>>>, Failure> {
        let read = |other: &OtherPassphrase| match &other.place {
            Place::File { path, whole } => {
                let file = PassphraseFile { path: path.clone(), whole: *whole };
                file.read()
            }
            Place::Given(Given(bytes)) => Ok(bytes.clone()),
        };
        self.passphrases.iter().map(read).collect()
    }

    /// What a helper has to know of them, besides the passphrases.
    pub(super) fn told(&self) -> OthersTold {
        let passphrases = self.passphrases.iter().map(|other| (other.name.clone(), other.slot)).collect();
        OthersTold { passphrases, drops_rest: self.drops_rest }
    }
}

/// Whether there is somebody to be asked.
pub(crate) fn has_terminal() -> bool {
    File::options().read(true).write(true).open("/dev/tty").is_ok()
}

/// Whether the passphrase of `key` was typed, so that others can be asked for as well.
pub(crate) fn was_typed(key: &LuksKey, is_named: bool) -> bool {
    !is_named && matches!(key.passphrase, Passphrase::Given(_))
}

/// How many LUKS keyslots of the data a LUKS2 header has; none, if it cannot be read.
pub(crate) fn count(header: &Path) -> usize {
    let count = || {
        let mut file = HeaderFile::read_only(header).ok()?;
        let is_luks2 = matches!(detect(&mut file), Ok(Some(Kind::Luks2 | Kind::Luks2SecondOnly)));
        is_luks2.then(|| Container::read(file).ok())?.map(|it| it.header().metadata.bound_keyslots().count())
    };
    count().unwrap_or(0)
}

/// The same for a helper: what its passphrases are called, and which LUKS keyslots they were asked for.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct OthersTold {
    pub(super) passphrases: Vec<(String, Option<u32>)>,
    pub(super) drops_rest: bool,
}

/// The LUKS keyslots of the data that `passphrase` does not open.
///
/// # Blocking
///
/// As long as the key derivations of all take.
pub(super) fn missing<S: Storage>(
    container: &mut Container<S>,
    passphrase: &[u8],
) -> Result<Vec<u32>, inlinecrypt_luks::Error> {
    let mut missing = Vec::new();
    let slots: Vec<u32> = container.header().metadata.bound_keyslots().collect();
    for slot in slots {
        match container.open(passphrase, Some(slot)) {
            Ok(_) => {}
            Err(error) if is_no(error.kind()) => missing.push(slot),
            Err(error) => return Err(error),
        }
    }
    Ok(missing)
}

/// Whether it is no more than that this passphrase and this LUKS keyslot do not go together here.
fn is_no(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Passphrase | ErrorKind::Unsupported)
}

/// The LUKS keyslots that the first passphrase opens, and those of `others`, and how these are called. Each passphrase opens one at
/// least; where some are left, none is dropped unless that was said.
///
/// # Blocking
///
/// As long as the key derivations take: one for each, if they come in the order of the LUKS keyslots.
pub(super) fn open_each<'p, S: Storage>(
    container: &mut Container<S>,
    first: &'p [u8],
    others: &'p [Zeroizing<Vec<u8>>],
    told: &OthersTold,
) -> Result<Vec<Kept<'p>>, Failure> {
    let failed = |error: &inlinecrypt_luks::Error| failure("its LUKS keyslots", error);
    let mut left: Vec<u32> = container.header().metadata.bound_keyslots().collect();
    let mut kept: Vec<Kept<'p>> = Vec::new();
    // Of the passphrases that were asked for it is known which is whose.
    let named = others.iter().zip(&told.passphrases);
    for (passphrase, slot) in named.clone().filter_map(|(passphrase, (_, slot))| Some((passphrase, (*slot)?)))
    {
        let opened = container.open(passphrase, Some(slot)).map_err(|error| match error.kind() {
            ErrorKind::Passphrase => Failure::new(
                Code::Refused,
                format!("LUKS keyslot {slot} does not open with the passphrase that was typed for it"),
                "Try again; to give it up with the old key, leave its passphrase out and say --drop-others.",
            ),
            _ => failed(&error),
        })?;
        left.retain(|other| *other != slot);
        kept.push(Kept { opened, passphrase });
    }
    let any = named.filter(|(_, (_, slot))| slot.is_none());
    let any = any.map(|(passphrase, (name, _))| (&passphrase[..], name.as_str()));
    let mut any: Vec<(&'p [u8], &str)> =
        std::iter::once((first, "the first passphrase")).chain(any).collect();
    // One that is given twice is one.
    let mut seen: Vec<&[u8]> = Vec::new();
    any.retain(|(passphrase, _)| {
        let is_new = !seen.contains(passphrase);
        seen.push(passphrase);
        is_new
    });
    let mut tried: Vec<(u32, usize)> = Vec::new();
    let mut attempt = |container: &mut Container<S>, left: &mut Vec<u32>, slot: u32, which: usize| {
        if tried.contains(&(slot, which)) {
            return Ok(false);
        }
        tried.push((slot, which));
        match container.open(any[which].0, Some(slot)) {
            Ok(opened) => {
                left.retain(|other| *other != slot);
                kept.push(Kept { opened, passphrase: any[which].0 });
                Ok(true)
            }
            Err(error) if is_no(error.kind()) => Ok(false),
            Err(error) => Err(failed(&error)),
        }
    };
    for (which, (_, name)) in any.iter().enumerate() {
        let mut opens = false;
        for slot in left.clone() {
            opens = attempt(container, &mut left, slot, which)?;
            if opens {
                break;
            }
        }
        if !opens {
            return Err(Failure::new(
                Code::Refused,
                format!("{name} opens none of its LUKS keyslots"),
                "Leave it out, or give the right one.",
            ));
        }
    }
    // One may open several.
    for slot in left.clone() {
        for which in 0..any.len() {
            if attempt(container, &mut left, slot, which)? {
                break;
            }
        }
    }
    if left.is_empty() || told.drops_rest {
        return Ok(kept);
    }
    let list = left.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    Err(Failure::new(
        Code::Wrong,
        format!(
            "its LUKS keyslots {list} are opened by none of the passphrases, and would not open its new key"
        ),
        "Give their passphrases with --other-passphrase-file FILE, --other-passphrase-fd N or --other-key-file FILE, each as \
         often as needed; or say --drop-others, and they go with the old key.",
    ))
}

impl Serialize for Given {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&Zeroizing::new(Base64::encode_string(&self.0)))
    }
}

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // Borrowed: no copy of it is left behind.
        let text = <&str>::deserialize(from).map_err(|_shows_it| serde::de::Error::custom("no base64"))?;
        let bytes = Base64::decode_vec(text).map_err(|_why| serde::de::Error::custom("no base64"))?;
        Ok(Self(Zeroizing::new(bytes)))
    }
}

/// Shows no passphrase.
impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given(..)")
    }
}
