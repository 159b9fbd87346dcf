//! From a passphrase to a volume key, in a process of its own.
//!
//! ```text
//!   server --socket--> helper: header's path, passphrase, what to do
//!                      argon2, area, stripes, digest
//!   server <--socket-- volume key, or why not; then the end
//! ```
//!
//! What was made of the passphrase, and the areas, are in that process's memory alone and end with it. The server gets the key,
//! hands it to its engine and wipes it. The helper also writes down that a re-encryption begins, since that takes LUKS keyslots for the
//! new key, and a digest of both. Messages are fields, each with its length before it (4 bytes, little-endian).

use super::file::HeaderFile;
use super::keep::{self, OtherKeyslots, OthersTold};
use crate::ask::Asker;
use crate::files::{self, Secrecy};
use crate::report::{Code, Failure};
use inlinecrypt_cipher::Mode;
use inlinecrypt_core::key::RawKey;
use inlinecrypt_engine::root::strip_line_feed;
use inlinecrypt_luks::luks2::{NewData, Others, Resilience};
use inlinecrypt_luks::{Error, Hash, Kind, PASSPHRASE_BYTES_MAX, VolumeKey, detect, luks1, luks2};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use zeroize::Zeroizing;

/// The subcommand that opens containers.
pub(crate) const HELPER: &str = "luks-helper";

/// Of the digests of a new key. It is random, so that nobody has to be held up who guesses at it; cryptsetup has no less.
const DIGEST_ITERATIONS: u32 = 1000;

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

/// Which of the keys of a container: that whose digest has this value. Unknown as long as there is one key.
#[derive(Clone, Debug, Default)]
pub(crate) struct WhichKey(Arc<OnceLock<Vec<u8>>>);

impl WhichKey {
    pub(crate) fn of_digest(value: &[u8]) -> Self {
        let which = Self::default();
        which.is_of_digest(value);
        which
    }

    /// From now on it is known.
    fn is_of_digest(&self, value: &[u8]) {
        self.0.get_or_init(|| value.to_vec());
    }
}

/// A volume key that a passphrase opens.
#[derive(Clone)]
pub(crate) struct LuksKey {
    pub(crate) header: PathBuf,
    pub(crate) passphrase: Passphrase,
    pub(crate) which: WhichKey,
}

impl LuksKey {
    /// The same, with its passphrase.
    pub(crate) fn asked(&self, asker: &mut Asker) -> Result<Self, Failure> {
        let Passphrase::NotAsked(file) = &self.passphrase else { return Ok(self.clone()) };
        Ok(Self { passphrase: asker.luks(&self.header, file.as_ref())?, ..self.clone() })
    }

    /// The same without a passphrase that was typed or came through a descriptor.
    pub(crate) fn without_what_was_given(self) -> Self {
        match self.passphrase {
            Passphrase::Given(_) => Self { passphrase: Passphrase::NotAsked(None), ..self },
            _ => self,
        }
    }

    /// Whether its passphrase is at hand.
    pub(crate) fn is_there(&self) -> bool {
        !matches!(self.passphrase, Passphrase::NotAsked(_))
    }

    /// Whether it can be opened again without asking anybody.
    pub(crate) fn can_be_had_again(&self) -> bool {
        matches!(self.passphrase, Passphrase::File(_))
    }

    /// The volume key.
    pub(crate) fn open(&self) -> Result<RawKey, Failure> {
        let order = Order::Open { digest: self.which.0.get().cloned() };
        self.ask(&order, &[], &[]).map(|key| RawKey::new(&key))
    }

    /// Writes into the header that a re-encryption to `new_key` begins, which this passphrase opens and those of `others`; from then on
    /// `next` is that key. Whoever calls this has locked the container.
    pub(crate) fn begin_reencryption(
        &self,
        new: NewLayout,
        others: &OtherKeyslots,
        new_key: &RawKey,
        next: &WhichKey,
    ) -> Result<(), Failure> {
        let digest =
            self.ask(&Order::Begin { new, others: others.told() }, new_key.expose(), &others.read()?)?;
        next.is_of_digest(&digest);
        Ok(())
    }

    /// The LUKS keyslots of the data that this passphrase does not open.
    pub(crate) fn missing(&self) -> Result<Vec<u32>, Failure> {
        let list = self.ask(&Order::Missing, &[], &[])?;
        Ok(serde_json::from_slice(&list).expect("the helper is of this version"))
    }

    /// Has an order done by a helper.
    fn ask(
        &self,
        order: &Order,
        new_key: &[u8],
        others: &[Zeroizing<Vec<u8>>],
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let ask = |passphrase: &[u8]| ask_helper(&self.header, passphrase, order, new_key, others);
        match &self.passphrase {
            Passphrase::File(file) => ask(&file.read()?),
            Passphrase::Given(given) => ask(given),
            Passphrase::NotAsked(_) => Err(Failure::new(
                Code::Refused,
                format!("{}: there is no passphrase", self.header.display()),
                "Give it with --passphrase-file FILE or --passphrase-fd N.",
            )),
        }
    }
}

/// Shows no passphrase.
impl fmt::Debug for LuksKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LuksKey({})", self.header.display())
    }
}

/// What a helper is to do.
#[derive(Debug, Deserialize, Serialize)]
enum Order {
    /// Give the volume key, of the digest with this value; of the data, if none is said.
    Open { digest: Option<Vec<u8>> },
    /// Begin to re-encrypt to the key that follows, and give the value of its digest. The passphrases of `others` come after the key.
    Begin { new: NewLayout, others: OthersTold },
    /// Give the list of LUKS keyslots that the passphrase does not open, as JSON.
    Missing,
}

/// What a container's data is to become.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct NewLayout {
    /// As [`Mode::from_name`] takes it.
    pub(crate) mode: String,
    pub(crate) sector_bytes: u32,
    /// Length of the blocks whose checksums protect the zone at hand; a journal does, if there is none.
    pub(crate) checksum_bytes: Option<u32>,
    /// How long a zone is at least, in bytes.
    pub(crate) zone_bytes_min: u64,
}

/// What a helper gives, that has ended when this returns.
///
/// # Blocking
///
/// As long as the header's key derivation takes, for each LUKS keyslot until one opens.
fn ask_helper(
    header: &Path,
    passphrase: &[u8],
    order: &Order,
    new_key: &[u8],
    others: &[Zeroizing<Vec<u8>>],
) -> Result<Zeroizing<Vec<u8>>, Failure> {
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
        .and_then(|()| send(&mut ours, &serde_json::to_vec(order).expect("numbers and names")))
        .and_then(|()| send(&mut ours, new_key))
        .and_then(|()| others.iter().try_for_each(|other| send(&mut ours, other)))
        .and_then(|()| ours.shutdown(Shutdown::Write))
        .and_then(|()| Answer::receive(&mut ours));
    let status = child.wait().map_err(broken)?;
    match answer {
        Ok(Answer::Key(key)) => Ok(key),
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
        let order = receive(&mut socket, 64 << 10)?;
        let new_key = receive(&mut socket, 4096)?;
        let header = Path::new(OsStr::from_bytes(&path));
        let done = match serde_json::from_slice(&order)? {
            Order::Open { digest } => open(header, &passphrase, digest.as_deref()),
            Order::Begin { new, others } => {
                let receive = |_: &_| receive(&mut socket, PASSPHRASE_BYTES_MAX);
                let more = others.passphrases.iter().map(receive).collect::<io::Result<Vec<_>>>()?;
                begin(header, &passphrase, (&others, &more), &new, &new_key).map(Zeroizing::new)
            }
            Order::Missing => missing(header, &passphrase),
        };
        let answer = match done {
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
fn open(header: &Path, passphrase: &[u8], digest: Option<&[u8]>) -> Result<VolumeKey, Failure> {
    let mut file = HeaderFile::read_only(header)?;
    let opened = match detect(&mut file) {
        Ok(Some(Kind::Luks1)) => luks1::Header::read(&mut file)
            .and_then(|header| header.open(&mut file, passphrase))
            .map(|(_, key)| key),
        Ok(_) => luks2::Container::read(file)
            .and_then(|mut container| open_luks2(&mut container, passphrase, digest)),
        Err(error) => Err(error),
    };
    opened.map_err(nameless)
}

/// Opens the key of the digest with this value; that of the data, or the old one while it is re-encrypted, if none is said. If it is
/// re-encrypted, what the header says of that is checked, which takes both keys.
fn open_luks2(
    container: &mut luks2::Container<HeaderFile>,
    passphrase: &[u8],
    digest: Option<&[u8]>,
) -> Result<VolumeKey, Error> {
    let metadata = &container.header().metadata;
    let found = digest.and_then(|value| {
        let mut digests = metadata.digests().iter();
        digests.find(|(_, digest)| digest.value() == value).map(|(number, _)| *number)
    });
    let Some(re) = metadata.reencryption()? else {
        metadata.data()?;
        let opened = match found {
            Some(digest) => container.open_digest(passphrase, digest),
            // What has another digest now may still be the same key: whoever asks compares.
            None => container.open(passphrase, None),
        };
        return opened.map(|opened| opened.key);
    };
    if re.boundary.is_none() {
        // Of the old key there may be nothing left.
        return container.open_digest(passphrase, re.next_digest).map(|opened| opened.key);
    }
    let old = container.open_digest(passphrase, re.previous_digest)?.key;
    let new = container.open_digest(passphrase, re.next_digest).map_err(Error::of_old_key_alone)?.key;
    container.check_reencryption(&old, &new)?;
    Ok(if found == Some(re.next_digest) { new } else { old })
}

/// The list of LUKS keyslots that a passphrase does not open, as JSON.
fn missing(header: &Path, passphrase: &[u8]) -> Result<VolumeKey, Failure> {
    let mut container = luks2::Container::read(HeaderFile::read_only(header)?).map_err(nameless)?;
    let missing = keep::missing(&mut container, passphrase).map_err(nameless)?;
    Ok(Zeroizing::new(serde_json::to_vec(&missing).expect("numbers")))
}

/// Writes down that a re-encryption begins, with `others` beside the passphrase. Says which digest the new key has.
fn begin(
    header: &Path,
    passphrase: &[u8],
    (told, others): (&OthersTold, &[Zeroizing<Vec<u8>>]),
    new: &NewLayout,
    key: &[u8],
) -> Result<Vec<u8>, Failure> {
    let NewLayout { mode, sector_bytes, checksum_bytes, zone_bytes_min } = new;
    let Some(mode) = Mode::from_name(mode) else {
        return Err(Failure::new(Code::Wrong, format!("there is no mode {mode}"), "Report this."));
    };
    let mut container = luks2::Container::read(HeaderFile::writable(header)?).map_err(nameless)?;
    container.header().metadata.data().map_err(nameless)?;
    let kept = keep::open_each(&mut container, passphrase, others, told)?;
    let mut begin = || {
        let new = NewData {
            mode,
            sector_bytes: *sector_bytes,
            key,
            iterations: DIGEST_ITERATIONS,
            resilience: match checksum_bytes {
                Some(block_bytes) => Resilience::Checksum { hash: Hash::Sha256, block_bytes: *block_bytes },
                None => Resilience::Journal,
            },
            zone_bytes_min: *zone_bytes_min,
        };
        // That nothing is left out but what was said was looked at.
        container.begin_reencryption(&kept, Others::Dropped, new, &mut super::random)?;
        let re = container.reencryption()?;
        Ok(container.header().metadata.digests()[&re.next_digest].value().to_vec())
    };
    begin().map_err(nameless)
}

/// Whoever asked says whose it is.
fn nameless(error: Error) -> Failure {
    let Failure { code, what, advice } = super::failure("", &error);
    Failure::new(code, what.trim_start_matches(": "), advice)
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
