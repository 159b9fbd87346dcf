//! Live upgrade: one server takes over from another, over the control socket.
//!
//! ```text
//!   new: engines started, keys admitted
//!   new --take_over--> old                 the old one serves on
//!   new <--Volume, Door, Control, Offered-- old      locked files and listening sockets, in other descriptors
//!   new: volumes opened from them, listeners made, nothing accepted
//!   new --Prepared--> old                  the pause begins: all is answered, connections rest
//!   new <--Connection ..., All-- old
//!   new --Taken--> old                     everything that can fail has been done
//!   new <--Go-- old                        the old one touches nothing any more
//!   new --Serving--> old                   and only then the first request; the old one ends
//! ```
//!
//! - Until `Go`, whatever fails or takes too long, the old server goes on, and the new one ends.
//! - After `Go` the old server goes on only if the new one has ended without `Serving`: it has touched nothing then.
//! - At no moment do both serve.
//!
//! Messages are JSON behind their length, and what carries a descriptor carries one.

use crate::plain::PLAIN;
use crate::plan::ControlPlan;
use crate::report::{Code, Failure};
use crate::size::Size;
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::disk::Geometry;
use inlinecrypt_core::volume::{IvLayout, Layout};
use inlinecrypt_io::export::nbd::Handed;
use inlinecrypt_io::listen::{Claim, Listener, NamedAt};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Version of these messages. The request itself is one of the control socket.
pub(crate) const VERSION: u32 = 1;

/// Longest message, in bytes: names of 4 KiB, and paths, as JSON may write them.
const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// How long the new server may take to open its volumes. Nobody waits for it.
pub(crate) const PREPARE_TIME_MAX: Duration = Duration::from_secs(30);
/// How long connections have to come to rest, in the pause. More than any disk needs that works.
pub(crate) const REST_TIME_MAX: Duration = Duration::from_secs(2);
/// How long the new server may take with the connections, in the pause.
pub(crate) const TAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the new server waits for the old one: for connections to rest and for those cut off to go.
const OLD_TIME_MAX: Duration = Duration::from_secs(15);

/// What is said.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "message", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Message {
    /// A volume; with its file, which holds the lock.
    Volume(VolumeFacts),
    /// A listening socket; with it.
    Door(DoorFacts),
    /// The control socket; with it.
    Control(DoorFacts),
    /// That was all. The version of these messages.
    Offered { version: u32 },
    /// The old server goes on as it is, and here is why.
    Refused { why: String },
    /// The new server is prepared; whether it may serve connections without TLS, and takes the control socket too.
    Prepared { takes_plain: bool, takes_control: bool },
    /// A connection; with its socket.
    Connection { export: String, structured: bool, allocation: bool, unread: Vec<u8> },
    /// Those were all.
    All,
    /// The new server has everything.
    Taken,
    /// It is the new server's.
    Go,
    /// The new server begins.
    Serving,
}

/// What has to be the same for clients not to notice.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VolumeFacts {
    pub(crate) name: String,
    key_id: String,
    mode: String,
    data_unit_bytes: u32,
    iv_offset_sectors: u64,
    /// Left out by servers that know one IV layout alone, and by those that serve that, so that both understand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    offset_bytes: Option<u64>,
    size_bytes: u64,
    block_bytes: u32,
    read_only: bool,
    can_trim: bool,
}

impl VolumeFacts {
    pub(crate) fn of(
        name: &str,
        key_id: String,
        layout: &Layout,
        geometry: Geometry,
        offset_bytes: u64,
    ) -> Self {
        Self {
            name: name.to_owned(),
            key_id,
            mode: layout.mode().info().name.to_owned(),
            data_unit_bytes: layout.data_unit_size().bytes(),
            iv_offset_sectors: layout.iv_offset_sectors(),
            iv: (layout.iv() != IvLayout::default()).then(|| layout.iv().to_string()),
            offset_bytes: (offset_bytes != 0).then_some(offset_bytes),
            size_bytes: geometry.size_bytes,
            block_bytes: geometry.logical_block_bytes,
            read_only: geometry.access == Access::ReadOnly,
            can_trim: geometry.can_trim,
        }
    }

    /// The same of a volume without encryption.
    pub(crate) fn of_plain(name: &str, geometry: Geometry, offset_bytes: u64) -> Self {
        Self {
            name: name.to_owned(),
            key_id: String::new(),
            mode: PLAIN.to_owned(),
            data_unit_bytes: 0,
            iv_offset_sectors: 0,
            iv: None,
            offset_bytes: (offset_bytes != 0).then_some(offset_bytes),
            size_bytes: geometry.size_bytes,
            block_bytes: geometry.logical_block_bytes,
            read_only: geometry.access == Access::ReadOnly,
            can_trim: geometry.can_trim,
        }
    }

    /// Why a server that would serve it as `here` says cannot take it over, if it cannot.
    fn refusal(&self, here: &Self) -> Option<Failure> {
        let name = &self.name;
        if (self.mode == PLAIN) != (here.mode == PLAIN) {
            let how = |facts: &Self| if facts.mode == PLAIN { "plain" } else { "encrypted" };
            return Some(otherwise(&format!("{name:?} is {} there, and {} here", how(self), how(here))));
        }
        if self.key_id != here.key_id {
            return Some(unable(&format!("the key of {name:?} is not that of the running server")));
        }
        let mut both = self.terms().into_iter().zip(here.terms());
        let ((what, there), (_, here)) = both.find(|((_, there), (_, here))| there != here)?;
        Some(otherwise(&format!("{what} of {name:?} is {there} there, and {here} here")))
    }

    /// What clients would notice if it were another, beside the key.
    fn terms(&self) -> [(&'static str, String); 9] {
        let bytes = |bytes: u64| format!("{bytes} bytes");
        let either = |is: bool, yes: &str, no: &str| if is { yes } else { no }.to_owned();
        let iv = self.iv.clone().unwrap_or_else(|| IvLayout::default().to_string());
        [
            ("the mode", self.mode.clone()),
            ("the data unit", bytes(self.data_unit_bytes.into())),
            ("the IV offset", format!("{} sectors", self.iv_offset_sectors)),
            ("the IV layout", iv),
            ("the offset", bytes(self.offset_bytes.unwrap_or(0))),
            ("the size", Size(self.size_bytes).to_string()),
            ("the logical block", bytes(self.block_bytes.into())),
            ("access", either(self.read_only, "read-only", "read-write")),
            ("discard", either(self.can_trim, "pass", "off")),
        ]
    }
}

/// Where a listening socket has its name, if the server made it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DoorFacts {
    named: Option<Named>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
struct Named {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl From<Option<NamedAt>> for DoorFacts {
    fn from(named: Option<NamedAt>) -> Self {
        Self { named: named.map(|NamedAt { path, device, inode }| Named { path, device, inode }) }
    }
}

impl From<DoorFacts> for Option<NamedAt> {
    fn from(facts: DoorFacts) -> Self {
        facts.named.map(|Named { path, device, inode }| NamedAt { path, device, inode })
    }
}

/// Sends a message, with a descriptor if it carries one.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let len = u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let mut parts = [IoSlice::new(&len), IoSlice::new(&bytes)];
    let mut rest = &mut parts[..];
    while !rest.is_empty() {
        match retry_on_intr(|| sendmsg(socket, rest, &mut beside, SendFlags::NOSIGNAL))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            sent => IoSlice::advance_slices(&mut rest, sent),
        }
        // It has gone with the first byte.
        beside.clear();
    }
    Ok(())
}

/// Receives a message, and the descriptor that it carries, if it does.
///
/// # Errors
///
/// The system's; [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the other side has gone;
/// [`InvalidData`](io::ErrorKind::InvalidData) for what means nothing.
fn receive(socket: BorrowedFd<'_>) -> io::Result<(Message, Option<OwnedFd>)> {
    let mut descriptors = Vec::new();
    let mut len = [0; 4];
    receive_exact(socket, &mut len, &mut descriptors)?;
    let len = usize::try_from(u32::from_le_bytes(len)).map_err(io::Error::other)?;
    if len > MESSAGE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    let mut bytes = vec![0; len];
    receive_exact(socket, &mut bytes, &mut descriptors)?;
    let message = serde_json::from_slice(&bytes).map_err(|why| {
        io::Error::new(io::ErrorKind::InvalidData, format!("a message means nothing: {why}"))
    })?;
    Ok((message, descriptors.pop()))
}

fn receive_exact(socket: BorrowedFd<'_>, into: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut at = 0;
    while at < into.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let received = retry_on_intr(|| {
            let mut room = [IoSliceMut::new(&mut into[at..])];
            recvmsg(socket, &mut room, &mut beside, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += received.bytes;
    }
    Ok(())
}

/// Receives the next message within `time_max`, or whenever it comes.
pub(crate) fn expect(
    socket: BorrowedFd<'_>,
    time_max: Option<Duration>,
) -> io::Result<(Message, Option<OwnedFd>)> {
    rustix::net::sockopt::set_socket_timeout(socket, rustix::net::sockopt::Timeout::Recv, time_max)?;
    match receive(socket) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        received => received,
    }
}

/// What the new server was offered, and its line to the old one.
#[derive(Debug)]
pub(crate) struct Predecessor {
    socket: UnixStream,
    volumes: Vec<(VolumeFacts, Option<OwnedFd>)>,
    pub(crate) doors: Vec<(OwnedFd, Option<NamedAt>)>,
    pub(crate) control: Option<(OwnedFd, Option<NamedAt>)>,
}

impl Predecessor {
    /// Asks the server with the control socket at `path`.
    pub(crate) fn ask(path: &Path) -> Result<Self, Failure> {
        let connect = || {
            let mut socket = UnixStream::connect(path)?;
            let uid = rustix::net::sockopt::socket_peercred(&socket)?.uid;
            if uid != rustix::process::geteuid() {
                return Err(io::Error::other(format!("user {} serves there", uid.as_raw())));
            }
            let mut request = crate::control::take_over_request()?;
            request.push(b'\n');
            socket.set_write_timeout(Some(TAKE_TIME_MAX))?;
            socket.write_all(&request)?;
            Ok(socket)
        };
        let socket = connect().map_err(|error: io::Error| {
            let what = format!("no server can be asked at {}", path.display());
            let advice =
                "Name the control socket of a running server of this user (inlinecrypt status shows them).";
            Failure { code: Code::File, ..Failure::of_io(what, &error, advice) }
        })?;
        let mut offer = Self { socket, volumes: Vec::new(), doors: Vec::new(), control: None };
        loop {
            match offer.next(OLD_TIME_MAX)? {
                (Message::Volume(facts), Some(file)) => offer.volumes.push((facts, Some(file))),
                (Message::Door(facts), Some(socket)) => offer.doors.push((socket, facts.into())),
                (Message::Control(facts), Some(socket)) => offer.control = Some((socket, facts.into())),
                (Message::Offered { version: VERSION }, None) => return Ok(offer),
                (Message::Offered { version }, _) => {
                    return Err(unable(&format!(
                        "it hands over in another way (version {version}, and this program's is {VERSION})"
                    )));
                }
                _ => return Err(unable("it says what makes no sense here")),
            }
        }
    }

    /// The locked file of the volume called `name`, once.
    pub(crate) fn file(&mut self, name: &str) -> Option<OwnedFd> {
        self.volumes.iter_mut().find(|(facts, _)| facts.name == name).and_then(|(_, file)| file.take())
    }

    /// Refuses volumes that clients would find changed, or gone.
    pub(crate) fn check(&self, ours: &[VolumeFacts]) -> Result<(), Failure> {
        for (theirs, _) in &self.volumes {
            let Some(our) = ours.iter().find(|our| our.name == theirs.name) else {
                return Err(otherwise(&format!("it serves {:?}, and this one would not", theirs.name)));
            };
            if let Some(refusal) = theirs.refusal(our) {
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// The old server's control socket, if this one is to have its own at the same place.
    pub(crate) fn inherited_control(&mut self, plan: &ControlPlan) -> Option<(Listener, Claim)> {
        let ControlPlan::At(path) = plan else { return None };
        let wanted = std::path::absolute(path).ok()?;
        let is_theirs = |(_, named): &mut (OwnedFd, Option<NamedAt>)| {
            named.as_ref().is_some_and(|named| named.path == wanted)
        };
        let (socket, named) = self.control.take_if(is_theirs)?;
        Listener::adopt(socket, named).ok()
    }

    /// Says that all is prepared, and receives the connections, each of which `adopt` takes.
    pub(crate) fn take(
        &self,
        takes_plain: bool,
        takes_control: bool,
        mut adopt: impl FnMut(Handed) -> io::Result<()>,
    ) -> Result<usize, Failure> {
        self.say(&Message::Prepared { takes_plain, takes_control })?;
        let mut count = 0;
        loop {
            match self.next(OLD_TIME_MAX)? {
                (Message::Connection { export, structured, allocation, unread }, Some(socket)) => {
                    adopt(Handed { socket, export, structured, allocation, unread })
                        .map_err(|error| unable(&format!("a connection cannot be taken over: {error}")))?;
                    count += 1;
                }
                (Message::All, None) => break,
                _ => return Err(unable("it says what makes no sense here")),
            }
        }
        self.say(&Message::Taken)?;
        match self.next(OLD_TIME_MAX)? {
            (Message::Go, None) => Ok(count),
            _ => Err(unable("it says what makes no sense here")),
        }
    }

    /// Tells the old server that it is not needed any more.
    pub(crate) fn tell_serving(&self) {
        // One that has gone needs not be told: after `Go` it takes nothing back while this process lives.
        let _ = send(self.socket.as_fd(), &Message::Serving, None);
    }

    fn say(&self, message: &Message) -> Result<(), Failure> {
        send(self.socket.as_fd(), message, None).map_err(|error| unable(&format!("it has gone: {error}")))
    }

    fn next(&self, time_max: Duration) -> Result<(Message, Option<OwnedFd>), Failure> {
        match expect(self.socket.as_fd(), Some(time_max)) {
            Ok((Message::Refused { why }, _)) => Err(unable(&why)),
            Ok(next) => Ok(next),
            Err(error) => Err(unable(&match error.kind() {
                io::ErrorKind::UnexpectedEof => "it has gone, or is too old to hand over".to_owned(),
                io::ErrorKind::TimedOut => "it does not answer".to_owned(),
                _ => error.to_string(),
            })),
        }
    }
}

/// The old server goes on.
fn unable(why: &str) -> Failure {
    Failure::new(
        Code::Refused,
        format!("cannot take over from the running server: {}", crate::report::printable(why)),
        "It serves on as it was. Serve the same volumes with the same keys, or stop it and start anew.",
    )
}

/// The old server goes on, since this one was asked to serve otherwise.
fn otherwise(why: &str) -> Failure {
    Failure { code: Code::Wrong, ..unable(why) }
        .advise("It serves on as it was. Ask for what it serves, in the same way, or stop it and start anew.")
}
