//! What a host and its engine process say to each other on the control socket.
//!
//! One order, one answer, in turn; each a datagram of at most [`MESSAGE_BYTES_MAX`] in postcard's format. The first order says
//! which version of all this the host speaks; an engine process of another version says so and goes. Descriptors travel beside a
//! message, never in it.
//!
//! What is borrowed from a message stays in the buffer that it was received in, which its owner wipes: so a key in a message is
//! in memory once.

use inlinecrypt_core::caps::{Capabilities, KeyTypes, UnitMask};
use inlinecrypt_core::config::{CryptoConfig, DataUnitSize, Hardware, KeyType, Mode};
use inlinecrypt_core::engine::SlotHold;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::KEY_IDENTIFIER_BYTES;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zeroize::Zeroizing;

/// Which language this is. Raised whenever a message or an order of a lane changes.
pub(crate) const VERSION: u32 = 4;

/// Longest message, in bytes.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4096;

/// Most descriptors beside one message.
pub(crate) const DESCRIPTORS_MAX: usize = 4;

/// What a host asks an engine process to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order<'a> {
    /// The first order, with the shared memory beside it; its place and its first field stay what they are, so that any version
    /// can be told from ours ([`Inbox::hello_version`]). The process makes its lanes, locks itself up, and says so.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// How many lanes the shared memory has.
        lanes: u32,
        /// Its length in bytes.
        shared_bytes: u64,
        /// Which start of the host's engine this is.
        generation: u64,
        /// Whether to go if anything of the cage is missing.
        require_sandbox: bool,
        /// Whether lanes shall have real-time priority; to go if they may not.
        realtime: bool,
    },
    /// Starts the engines: the second order.
    Open {
        /// The engine's spec, as people write it.
        spec: &'a str,
        /// The spec of the engine for what that one cannot serve.
        fallback: Option<&'a str>,
        /// What opens the root: kind, public bytes, secret bytes; descriptors beside the message.
        #[serde(borrow)]
        root: Option<RootParts<'a>>,
    },
    /// Takes a raw key into keeping.
    Deposit(#[serde(borrow)] Secret<'a>),
    /// Programs a keyslot.
    Program {
        engine: u8,
        slot: u32,
        #[serde(borrow)]
        key: WireKey<'a>,
    },
    /// Empties a keyslot.
    Evict { engine: u8, slot: u32 },
    /// Remembers a key, to be named by a handle from then on.
    Remember {
        engine: u8,
        #[serde(borrow)]
        key: WireKey<'a>,
    },
    /// Forgets it.
    Forget { engine: u8, handle: u32 },
    /// Wraps a raw key for storage.
    Import {
        engine: u8,
        #[serde(borrow)]
        raw: Secret<'a>,
    },
    /// Makes a key and wraps it for storage.
    Generate { engine: u8 },
    /// Wraps a stored key for this start.
    Prepare { engine: u8, blob: &'a [u8] },
    /// Says whether a blob is good.
    Check { engine: u8, blob: &'a [u8] },
    /// Derives the software secret, for who must see it.
    DeriveSecret { engine: u8, blob: &'a [u8] },
    /// Computes a wrapped key's public name.
    Identify { engine: u8, blob: &'a [u8] },
    /// Decides the key type of an exclusive engine.
    Commit { engine: u8, wrapped: bool },
    /// Asks why an engine serves nothing any more, if that is so.
    WhyStopped { engine: u8 },
    /// Resets, suspends or resumes an engine.
    Lifecycle { engine: u8, step: WireStep },
}

/// What an engine process answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer<'a> {
    /// To `Hello`: what keeps the process to itself, and what is missing for that.
    Ready {
        /// Its number.
        pid: u32,
        /// The steps, a line each, separated by line feeds.
        steps: &'a str,
        /// What is missing, likewise.
        missing: &'a str,
    },
    /// To `Open`: what the engines can do, the main one first.
    Opened {
        #[serde(borrow)]
        engine: WireEngine<'a>,
        #[serde(borrow)]
        fallback: Option<WireEngine<'a>>,
        root: Option<[u8; 8]>,
    },
    /// Done, and nothing to tell.
    Done,
    /// A key is kept, or remembered.
    Deposited { ticket: u64, has_equal_halves: bool, identifier: [u8; KEY_IDENTIFIER_BYTES] },
    /// A key is remembered.
    Remembered(u32),
    /// A wrapped key.
    Blob(&'a [u8]),
    /// A software secret.
    Secret(#[serde(borrow)] Secret<'a>),
    /// Why an engine has stopped, if it has.
    Stopped(Option<&'a str>),
    /// A public name.
    Identifier([u8; KEY_IDENTIFIER_BYTES]),
    /// It failed.
    Failed { kind: u8, op: u8, detail: Option<&'a str>, source: Option<&'a str> },
}

/// Secret bytes in a message. They do not print.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Secret<'a>(pub &'a [u8]);

impl fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

/// What opens a root ([`RootMaterial`](crate::root::RootMaterial)).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct RootParts<'a> {
    /// Which kind.
    pub kind: u8,
    /// What anybody may see.
    pub public: &'a [u8],
    /// What nobody may.
    #[serde(borrow)]
    pub secret: Secret<'a>,
}

/// A key on its way to an engine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct WireKey<'a> {
    mode: u8,
    unit_log2: u8,
    dun_bytes: u8,
    hardware: bool,
    /// In which form.
    #[serde(borrow)]
    pub form: WireForm<'a>,
}

/// The form of a key on its way.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum WireForm<'a> {
    /// A raw key that the process keeps.
    Ticket(u64),
    /// The raw key itself.
    Raw(#[serde(borrow)] Secret<'a>),
    /// A blob of this start.
    Wrapped(&'a [u8]),
}

impl<'a> WireKey<'a> {
    /// A key of `config` in `form`.
    #[must_use]
    pub(crate) fn new(config: &CryptoConfig, form: WireForm<'a>) -> Self {
        Self {
            mode: u8::try_from(config.mode().index()).expect("a handful"),
            unit_log2: config.data_unit_size().log2(),
            dun_bytes: config.dun_bytes(),
            hardware: config.hardware() == Hardware::Allowed,
            form,
        }
    }

    /// Mode, data unit size, DUN bytes and whether hardware is allowed; `None` if a number means nothing.
    #[must_use]
    pub(crate) fn config(&self) -> Option<(Mode, DataUnitSize, u8, Hardware)> {
        let mode = *Mode::ALL.get(usize::from(self.mode))?;
        let unit = DataUnitSize::from_bytes(1u32.checked_shl(self.unit_log2.into())?)?;
        let hardware = if self.hardware { Hardware::Allowed } else { Hardware::Forbidden };
        Some((mode, unit, self.dun_bytes, hardware))
    }
}

/// Something that happens to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WireStep {
    /// A controller reset.
    Reset,
    /// Suspend.
    Suspend,
    /// Resume.
    Resume,
}

/// What an engine is and can do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct WireEngine<'a> {
    /// Its name.
    pub name: &'a str,
    units: [u32; Mode::ALL.len()],
    dun_bytes_max: u8,
    raw: bool,
    wrapped: bool,
    keyslots: u32,
    whole_request: bool,
    /// Whether it serves one key type only.
    pub is_exclusive: bool,
    /// Whether it can be reset, suspended and resumed.
    pub has_lifecycle: bool,
}

impl<'a> WireEngine<'a> {
    /// Describes `engine`.
    #[must_use]
    pub(crate) fn of(engine: &'a dyn inlinecrypt_core::engine::Engine) -> Self {
        let Capabilities { units, dun_bytes_max, key_types, keyslots } = engine.capabilities();
        Self {
            name: engine.name(),
            units: units.map(UnitMask::bits),
            dun_bytes_max: *dun_bytes_max,
            raw: key_types.contains(KeyType::Raw),
            wrapped: key_types.contains(KeyType::HardwareWrapped),
            keyslots: *keyslots,
            whole_request: engine.slot_hold() == SlotHold::WholeRequest,
            is_exclusive: engine.exclusive().is_some(),
            has_lifecycle: engine.lifecycle().is_some(),
        }
    }

    /// What it can do.
    #[must_use]
    pub(crate) fn capabilities(&self) -> Capabilities {
        let key_types = match (self.raw, self.wrapped) {
            (true, true) => KeyTypes::BOTH,
            (true, false) => KeyTypes::RAW,
            (false, true) => KeyTypes::WRAPPED,
            (false, false) => KeyTypes::NONE,
        };
        Capabilities {
            units: self.units.map(UnitMask::from_bits),
            dun_bytes_max: self.dun_bytes_max,
            key_types,
            keyslots: self.keyslots,
        }
    }

    /// For how long it needs a keyslot.
    #[must_use]
    pub(crate) fn slot_hold(&self) -> SlotHold {
        if self.whole_request { SlotHold::WholeRequest } else { SlotHold::WhileComputing }
    }
}

/// An error as a number.
#[must_use]
pub(crate) fn kind_code(kind: ErrorKind) -> u8 {
    code_of(ErrorKind::ALL, kind)
}

/// The error of a number; what means nothing is a failure of the engine.
#[must_use]
pub(crate) fn kind_of(code: u8) -> ErrorKind {
    ErrorKind::ALL.get(usize::from(code)).copied().unwrap_or(ErrorKind::EngineFailed)
}

fn code_of<T: PartialEq>(all: &[T], one: T) -> u8 {
    all.iter().position(|other| *other == one).and_then(|at| u8::try_from(at).ok()).unwrap_or(u8::MAX)
}

/// The causes of `error`, one behind the other.
fn causes(error: &Error) -> String {
    let mut text = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(why) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&why.to_string());
        cause = why.source();
    }
    text
}

/// What there is to say of `error` besides its kind, in one text.
pub(crate) fn why(error: &Error) -> String {
    let mut text = error.detail_text().unwrap_or_default().to_owned();
    let causes = causes(error);
    if !text.is_empty() && !causes.is_empty() {
        text.push_str(": ");
    }
    text + &causes
}

/// Calls `with` with the answer that tells of `error`.
pub(crate) fn with_failure<T>(error: &Error, with: impl FnOnce(Answer<'_>) -> T) -> T {
    let source = causes(error);
    let cut = |text: &str| text.chars().take(1000).collect::<String>();
    let detail = error.detail_text().map(cut);
    let source = (!source.is_empty()).then(|| cut(&source));
    with(Answer::Failed {
        kind: kind_code(error.kind()),
        op: code_of(Op::ALL, error.op()),
        detail: detail.as_deref(),
        source: source.as_deref(),
    })
}

impl Answer<'_> {
    /// The error of a failure; a bug of the engine process if it answered something that was not asked.
    #[must_use]
    pub(crate) fn into_error(self, asked: Op) -> Error {
        match self {
            Answer::Failed { kind, op, detail, source } => {
                let op = Op::ALL.get(usize::from(op)).copied().unwrap_or(asked);
                let mut error = Error::new(kind_of(kind), op);
                if let Some(detail) = detail {
                    error = error.detail(detail.to_owned());
                }
                if let Some(source) = source {
                    error = error.because(source.to_owned());
                }
                error
            }
            _ => Error::new(ErrorKind::Bug, asked).detail("the engine process answered something else"),
        }
    }
}

/// Sends one message.
///
/// # Errors
///
/// What the system says. A message is sent whole or not at all.
pub(crate) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut bytes = Zeroizing::new([0; MESSAGE_BYTES_MAX]);
    let bytes = postcard::to_slice(message, &mut *bytes).map_err(|why| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("a message is too long: {why}"))
    })?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors beside a message"));
    }
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(why) => return Err(why.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// Room for one message. Wiped when dropped.
#[derive(Debug)]
pub(crate) struct Inbox(Box<Zeroizing<[u8; MESSAGE_BYTES_MAX]>>);

impl Default for Inbox {
    fn default() -> Self {
        Self(Box::new(Zeroizing::new([0; MESSAGE_BYTES_MAX])))
    }
}

impl Inbox {
    /// Receives one message and what is beside it: how long it is, 0 if the other side has gone.
    ///
    /// # Errors
    ///
    /// What the system says; [`InvalidData`](io::ErrorKind::InvalidData) for a message that is too long.
    ///
    /// # Blocking
    ///
    /// Waits for the other side.
    pub(crate) fn receive(&mut self, socket: impl AsFd) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut room = [IoSliceMut::new(&mut self.0[..])];
            match recvmsg(&socket, &mut room, &mut beside, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(why) => return Err(why.into()),
                Ok(received) => break received,
            }
        };
        let mut descriptors = Vec::new();
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        Ok((received.bytes, descriptors))
    }

    /// Which version of the language the host speaks whose hello of `len` bytes was received. `None` if it is no hello.
    pub(crate) fn hello_version(&self, len: usize) -> Option<u32> {
        hello_version(self.0.get(..len).unwrap_or_default())
    }

    /// The message of `len` bytes that was received.
    ///
    /// # Errors
    ///
    /// [`InvalidData`](io::ErrorKind::InvalidData) if it means nothing.
    pub(crate) fn parse<'a, T: Deserialize<'a>>(&'a self, len: usize) -> io::Result<T> {
        parse(self.0.get(..len).unwrap_or_default())
    }
}

/// The version in a hello, whatever follows it: of each version so far, `Hello` is the first order and its number the first field.
fn hello_version(bytes: &[u8]) -> Option<u32> {
    let ((order, version), _rest) = postcard::take_from_bytes::<(u32, u32)>(bytes).ok()?;
    (order == 0).then_some(version)
}

/// The message that `bytes` hold, all of them.
///
/// # Errors
///
/// [`InvalidData`](io::ErrorKind::InvalidData) if they mean nothing.
pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> io::Result<T> {
    let invalid =
        |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("a message means nothing: {why}"));
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(|why| invalid(&why.to_string()))?;
    if rest.is_empty() { Ok(message) } else { Err(invalid("something is behind it")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    enum FormerOrder {
        Hello { version: u32, lanes: u32, shared_bytes: u64, generation: u64, require_sandbox: bool },
    }

    /// As version 3 wrote it, which is no message of ours.
    const FORMER_HELLO: FormerOrder = FormerOrder::Hello {
        version: 3,
        lanes: 4,
        shared_bytes: 1 << 30,
        generation: 1,
        require_sandbox: false,
    };

    #[test]
    fn a_hello_of_a_former_version_tells_its_version() {
        let mut space = [0; 64];
        let bytes = &*postcard::to_slice(&FORMER_HELLO, &mut space).unwrap();
        parse::<Order<'_>>(bytes).unwrap_err();
        assert_eq!(hello_version(bytes), Some(3));
    }

    #[test]
    fn our_hello_tells_our_version_and_other_orders_none() {
        let mut space = [0; 64];
        let mut version_of =
            |order: &Order<'_>| hello_version(postcard::to_slice(order, &mut space).unwrap());
        let hello = Order::Hello {
            version: VERSION,
            lanes: 64,
            shared_bytes: 1 << 40,
            generation: 1,
            require_sandbox: true,
            realtime: true,
        };
        assert_eq!(version_of(&hello), Some(VERSION));
        assert_eq!(version_of(&Order::Evict { engine: 4, slot: VERSION + 1 }), None);
        assert_eq!(hello_version(&[]), None);
        assert_eq!(hello_version(&[0]), None);
    }

    /// To the host, by name, and not only by going.
    #[test]
    fn a_host_of_a_former_version_is_refused_by_name() {
        let (ours, its) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        send(ours.as_fd(), &FORMER_HELLO, &[]).unwrap();
        crate::isolated::process::serve_uncaged(its).unwrap();
        let mut inbox = Inbox::default();
        let (len, _) = inbox.receive(&ours).unwrap();
        let error = inbox.parse::<Answer<'_>>(len).unwrap().into_error(Op::Open);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("and the host version 3: restart both"), "{error}");
    }
}
