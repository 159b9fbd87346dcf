//! Where clients come in: Unix and TCP listeners, made here or handed over by the service manager.
//!
//! ```text
//!   Listen --bind--> Listener --accept--> Stream --> an export
//!   service manager --activated--^   ^--Stopper (from any thread)
//! ```
//!
//! A Unix socket appears under its name only once it is listening, with its final mode, and replaces nothing but a socket
//! that nobody listens on any more. So there is no moment at which a client is refused because we are half way, connects
//! although it may not, or loses the server that it had.

use crate::sys;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{AtFlags, CWD, Mode, RenameFlags, linkat, renameat_with, unlink};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// The port of NBD, as registered (`nbd`, 10809/tcp).
pub const PORT_DEFAULT: u16 = 10809;

/// Longest path of a Unix socket in bytes: `sun_path` of `unix(7)`, without the closing NUL.
const SUN_PATH_MAX: usize = 107;

/// How many bytes of a socket's name its first, temporary name has.
const STAGING_NAME_MAX: usize = 32;

/// Clients that may wait to be accepted: what the kernel grants at most by default (`net.core.somaxconn`). Hundreds may
/// come at once, and some give up if they cannot wait.
const BACKLOG: i32 = 4096;

/// How long a failed accept pauses, so that a server out of descriptors does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// How often we look again when others come and go under our name while we take it.
const ATTEMPTS_MAX: u32 = 5;

/// Where to listen: `unix:PATH` or `tcp:HOST[:PORT]`, an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket of this name.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address, an IPv6 address without brackets.
        host: String,
        /// The port; 0 for any that is free.
        port: u16,
    },
}

impl FromStr for Listen {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |why: &str| {
            Err(Error::new(ErrorKind::Invalid, Op::Open).detail(format!("cannot listen on '{text}': {why}")))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => invalid("the path is missing"),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let Some(place) = text.strip_prefix("tcp:") else {
            return invalid("neither unix:PATH nor tcp:HOST:PORT");
        };
        let (host, port) = if let Some(bracketed) = place.strip_prefix('[') {
            let Some((host, rest)) = bracketed.split_once(']') else {
                return invalid("the closing bracket is missing");
            };
            match (rest, rest.strip_prefix(':')) {
                ("", _) => (host, None),
                (_, Some(port)) => (host, Some(port)),
                _ => return invalid("a colon and the port belong behind the bracket"),
            }
        } else {
            match place.split_once(':') {
                None => (place, None),
                Some((_, port)) if port.contains(':') => return invalid("put the IPv6 address in brackets"),
                Some((host, port)) => (host, Some(port)),
            }
        };
        if host.is_empty() {
            return invalid("the host is missing; 127.0.0.1 is this machine, [::] is every network");
        }
        match port.map_or(Ok(PORT_DEFAULT), str::parse) {
            Ok(port) => Ok(Self::Tcp { host: host.to_owned(), port }),
            Err(_) => invalid("the port is not a number from 0 to 65535"),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// How to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// Mode of a Unix socket, whatever the umask: who may write to it may connect.
    pub unix_mode: u32,
}

impl Default for ListenOptions {
    /// Unix sockets for their owner alone.
    fn default() -> Self {
        Self { unix_mode: 0o600 }
    }
}

/// Something clients can connect to.
///
/// When dropped, a Unix socket that we made is removed, unless its name belongs to another one by now.
#[derive(Debug)]
pub struct Listener {
    /// Removed before `socket` is closed, so that the name never leads to a closed one.
    name: Option<Name>,
    socket: Socket,
    stop: Arc<OwnedFd>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl TryFrom<OwnedFd> for Socket {
    type Error = io::Error;

    /// Takes a listening stream socket for what it is.
    fn try_from(socket: OwnedFd) -> io::Result<Self> {
        use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
        if socket_type(&socket)? != SocketType::STREAM {
            return Err(io::Error::other("it is not a stream socket"));
        }
        if !socket_acceptconn(&socket)? {
            return Err(io::Error::other("it does not listen; the socket unit must say Accept=no"));
        }
        match socket_domain(&socket)? {
            AddressFamily::UNIX => Ok(Self::Unix(socket.into())),
            AddressFamily::INET | AddressFamily::INET6 => Ok(Self::Tcp(socket.into())),
            _ => Err(io::Error::other("it is neither a Unix nor a TCP socket")),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// A name in the filesystem that we gave to a socket of ours. Removed when dropped, if it still is that socket's.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    inode: Inode,
    /// Whether it is ours to remove, and not still, or already, another server's.
    claim: Claim,
}

/// The right to remove the name of a socket that another server handed over: not ours before it is claimed.
#[derive(Clone, Debug)]
pub struct Claim(Arc<AtomicBool>);

impl Claim {
    fn new(claimed: bool) -> Self {
        Self(Arc::new(AtomicBool::new(claimed)))
    }

    /// The listener is ours now.
    pub fn claim(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Where a listener that is handed over has its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedAt {
    /// The path, absolute.
    pub path: PathBuf,
    /// The device that the name is on.
    pub device: u64,
    /// Its inode there.
    pub inode: u64,
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.claim.0.load(Ordering::Acquire)
            && Inode::at(&self.path).is_ok_and(|inode| inode == self.inode)
        {
            // Somebody else may have been faster; then it is gone, as it should be.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Which file a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inode {
    device: u64,
    number: u64,
}

impl Inode {
    fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::of(&fs::symlink_metadata(path)?))
    }

    fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), number: metadata.ino() }
    }
}

/// Makes a [`Listener`] stop accepting, from any thread. Stopped is stopped for good.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<OwnedFd>);

impl Stopper {
    /// Stops the listener: every `accept` under way and to come returns `None`.
    pub fn stop(&self) {
        // Fails only if the counter is at its maximum, and then it has been stopped often enough.
        let _ = retry_on_intr(|| rustix::io::write(&*self.0, &one_event()));
    }
}

/// One, as `eventfd(2)` takes it: eight bytes in the order of this machine.
#[expect(clippy::host_endian_bytes, reason = "read by this kernel and by nobody else")]
fn one_event() -> [u8; 8] {
    1u64.to_ne_bytes()
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    ///
    /// [`Busy`](ErrorKind::Busy) if somebody listens there, with his name where it can be found;
    /// [`Invalid`](ErrorKind::Invalid) for a name that cannot be one, or is something else's: nothing but a socket that
    /// nobody listens on is ever replaced; [`NotFound`](ErrorKind::NotFound) for an unknown directory or host;
    /// [`Permission`](ErrorKind::Permission); [`Backing`](ErrorKind::Backing) else.
    pub fn bind(place: &Listen, options: ListenOptions) -> Result<Self, Error> {
        match place {
            Listen::Unix(path) => {
                let (socket, name) = bind_unix(path, SocketType::STREAM, options.unix_mode)?;
                Self::new(Socket::Unix(socket), Some(name))
            }
            Listen::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).map_err(|error| {
                    let kind = match error.kind() {
                        io::ErrorKind::AddrInUse => ErrorKind::Busy,
                        io::ErrorKind::PermissionDenied => ErrorKind::Permission,
                        io::ErrorKind::AddrNotAvailable => ErrorKind::Invalid,
                        // Names that do not resolve have no kind of their own.
                        _ if error.raw_os_error().is_none() => ErrorKind::NotFound,
                        _ => ErrorKind::Backing,
                    };
                    Error::new(kind, Op::Open).detail(format!("cannot listen on {place}")).because(error)
                })?;
                Self::new(Socket::Tcp(socket), None)
            }
        }
    }

    /// Listens at `path` for connections that keep messages whole (`SOCK_SEQPACKET` of `unix(7)`).
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind).
    pub fn bind_packets(path: &Path, options: ListenOptions) -> Result<Self, Error> {
        let (socket, name) = bind_unix(path, SocketType::SEQPACKET, options.unix_mode)?;
        Self::new(Socket::Unix(socket), Some(name))
    }

    /// The listeners that the service manager has handed over, with their names (`LISTEN_FDS`, `LISTEN_PID` and
    /// `LISTEN_FDNAMES` of `sd_listen_fds(3)`; `unknown` for one without); none if it has not. They are handed over once:
    /// a second call returns none. Call before anything else opens files.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if one is not a listening stream socket, or the variables make no sense.
    pub fn activated() -> Result<Vec<(String, Self)>, Error> {
        let given = sys::handed_over().map_err(|error| {
            Error::new(ErrorKind::Invalid, Op::Open)
                .detail("the sockets from the service manager cannot be taken over")
                .because(error)
        })?;
        let mut listeners = Vec::new();
        for (socket, name) in given {
            let socket = Socket::try_from(socket).map_err(|error| {
                Error::new(ErrorKind::Invalid, Op::Open)
                    .detail(format!("socket '{name}' from the service manager cannot be served"))
                    .because(error)
            })?;
            // Its name in the filesystem, if it has one, is the service manager's to remove.
            listeners.push((name, Self::new(socket, None)?));
        }
        Ok(listeners)
    }

    /// Another descriptor of the socket, for a server that takes it over, and where its name is if we made it.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn hand_over(&self) -> io::Result<(OwnedFd, Option<NamedAt>)> {
        let socket = self.socket.as_fd().try_clone_to_owned()?;
        let named = match &self.name {
            Some(Name { path, inode, .. }) => {
                Some(NamedAt { path: std::path::absolute(path)?, device: inode.device, inode: inode.number })
            }
            None => None,
        };
        Ok((socket, named))
    }

    /// Takes over what [`hand_over`](Self::hand_over) of another server gave. The name is removed with the listener only
    /// once it was claimed.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if it is not a listening stream socket.
    pub fn adopt(socket: OwnedFd, named: Option<NamedAt>) -> Result<(Self, Claim), Error> {
        let socket = Socket::try_from(socket).map_err(|error| {
            Error::new(ErrorKind::Invalid, Op::Open)
                .detail("a listener of the other server cannot be taken over")
                .because(error)
        })?;
        let claim = Claim::new(false);
        let name = named.map(|NamedAt { path, device, inode }| Name {
            path,
            inode: Inode { device, number: inode },
            claim: claim.clone(),
        });
        Ok((Self::new(socket, name)?, claim))
    }

    fn new(socket: Socket, name: Option<Name>) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::new(ErrorKind::Backing, Op::Open).because(error);
        // A client that gives up between poll and accept must not leave us waiting in accept.
        match &socket {
            Socket::Unix(socket) => socket.set_nonblocking(true),
            Socket::Tcp(socket) => socket.set_nonblocking(true),
        }
        .map_err(failed)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed(io::Error::from(errno)))?;
        Ok(Self { name, socket, stop: Arc::new(stop) })
    }

    /// A handle to stop it with.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Where it listens, with the port that the system chose if it was asked to.
    #[must_use]
    pub fn place(&self) -> Listen {
        match &self.socket {
            Socket::Unix(socket) => Listen::Unix(match &self.name {
                Some(name) => name.path.clone(),
                None => socket
                    .local_addr()
                    .ok()
                    .and_then(|address| address.as_pathname().map(Path::to_owned))
                    .unwrap_or_default(),
            }),
            Socket::Tcp(socket) => {
                let address = socket.local_addr().ok();
                Listen::Tcp {
                    host: address.map(|address| address.ip().to_string()).unwrap_or_default(),
                    port: address.map_or(0, |address| address.port()),
                }
            }
        }
    }

    /// The next client, or `None` once stopped.
    ///
    /// # Errors
    ///
    /// [`Backing`](ErrorKind::Backing) if the system is out of descriptors or memory. Clients stay in the queue, and a
    /// later call may succeed; it has paused already, so trying again at once does not spin.
    ///
    /// # Blocking
    ///
    /// Waits for a client, or to be stopped. Any number of threads may wait.
    pub fn accept(&self) -> Result<Option<Stream>, Error> {
        loop {
            if self.wait()? {
                return Ok(None);
            }
            if let Some(stream) = self.accept_now()? {
                return Ok(Some(stream));
            }
        }
    }

    /// A client that waits, if one does.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    pub(crate) fn accept_now(&self) -> Result<Option<Stream>, Error> {
        loop {
            let accepted = match &self.socket {
                Socket::Unix(socket) => socket.accept().map(|(stream, _)| Stream::Unix(stream)),
                Socket::Tcp(socket) => socket.accept().map(|(stream, _)| Stream::Tcp(stream)),
            };
            let error = match accepted {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) => error,
            };
            let errno = Errno::from_io_error(&error);
            if let Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) = errno {
                self.pause();
                return Err(Error::new(ErrorKind::Backing, Op::Open)
                    .detail("a client cannot be accepted for now")
                    .because(error));
            }
            if let Some(Errno::AGAIN) = errno {
                return Ok(None);
            }
            // `accept(2)`: it has gone, another thread has it, or its network failed while it waited: the next one, then.
            let Some(
                Errno::CONNABORTED
                | Errno::INTR
                | Errno::PERM
                | Errno::PROTO
                | Errno::NETDOWN
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::TIMEDOUT,
            ) = errno
            else {
                self.pause();
                return Err(Error::new(ErrorKind::Backing, Op::Open)
                    .detail("a client cannot be accepted")
                    .because(error));
            };
        }
    }

    /// Waits for a client or for being stopped; says whether stopped.
    pub(crate) fn wait(&self) -> Result<bool, Error> {
        let mut both = [
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut both, None))
            .map_err(|errno| Error::new(ErrorKind::Backing, Op::Open).because(io::Error::from(errno)))?;
        Ok(!both[0].revents().is_empty())
    }

    /// Waits for a moment, or to be stopped.
    fn pause(&self) {
        let moment = Timespec::try_from(PAUSE).expect("a tenth of a second");
        let _ = poll(&mut [PollFd::new(&*self.stop, PollFlags::IN)], Some(&moment));
    }
}

/// Puts a listening socket at `path`.
fn bind_unix(path: &Path, kind: SocketType, mode: u32) -> Result<(UnixListener, Name), Error> {
    let failed =
        |errno: Errno| refusal(path, kind_of(errno), "the system refused").because(io::Error::from(errno));

    let len = path.as_os_str().len();
    if len > SUN_PATH_MAX {
        let why = format!("the path is {len} bytes long, and the system takes {SUN_PATH_MAX} at most");
        return Err(refusal(path, ErrorKind::Invalid, &why));
    }
    let Some(file_name) = path.file_name() else {
        return Err(refusal(path, ErrorKind::Invalid, "that is not a name for a socket"));
    };
    let mut holder = look(path, kind)?;

    // Under a name of its own until it listens and has its mode.
    let staging = staging_path(path, file_name);
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).map_err(failed)?;
    let mode = mode & 0o777;
    // The name gets the mode of the socket, less the umask: never more than was asked for, not even for a moment.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode)).map_err(failed)?;
    let bound = bind_at(&socket, &staging).map_err(failed)?;
    // And now, nobody being able to connect before it listens, what the umask took away.
    fs::set_permissions(&bound.path, fs::Permissions::from_mode(mode))
        .and_then(|()| listen(&socket, BACKLOG).map_err(io::Error::from))
        .map_err(|error| refusal(path, ErrorKind::Backing, "the system refused").because(error))?;

    for _ in 0..ATTEMPTS_MAX {
        match publish(&bound, path, holder) {
            Ok(true) => {
                let name = Name { path: path.to_owned(), inode: bound.inode, claim: Claim::new(true) };
                return Ok((UnixListener::from(socket), name));
            }
            // Somebody came or went meanwhile.
            Ok(false) => holder = look(path, kind)?,
            Err(errno) => return Err(failed(errno)),
        }
    }
    Err(refusal(path, ErrorKind::Busy, "others take and leave that name all the time"))
}

fn refusal(path: &Path, kind: ErrorKind, why: &str) -> Error {
    Error::new(kind, Op::Open).detail(format!("cannot listen on unix:{}: {why}", path.display()))
}

fn kind_of(errno: Errno) -> ErrorKind {
    match errno {
        Errno::NOENT | Errno::NOTDIR => ErrorKind::NotFound,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => ErrorKind::Permission,
        Errno::INVAL | Errno::NAMETOOLONG | Errno::LOOP => ErrorKind::Invalid,
        Errno::NOSPC | Errno::DQUOT => ErrorKind::NoSpace,
        _ => ErrorKind::Backing,
    }
}

/// A name beside `path` that nobody else uses.
fn staging_path(path: &Path, file_name: &OsStr) -> PathBuf {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    // Enough of the name to recognise it by; all of it might make too long an address.
    let known_by = &file_name.as_bytes()[..file_name.len().min(STAGING_NAME_MAX)];
    let mut staging = OsString::from(".");
    staging.push(OsStr::from_bytes(known_by));
    staging.push(format!(".{}-{number}", std::process::id()));
    path.with_file_name(staging)
}

/// Binds the socket to a fresh name, which may be longer than the system takes in an address.
fn bind_at(socket: &OwnedFd, path: &Path) -> Result<Name, Errno> {
    // Left behind by a process of our number that was killed right here.
    let _ = fs::remove_file(path);
    if path.as_os_str().len() <= SUN_PATH_MAX {
        bind(socket, &SocketAddrUnix::new(path)?)?;
    } else {
        use rustix::fs::{OFlags, open};
        use std::os::fd::AsRawFd as _;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        short.push(path.file_name().ok_or(Errno::INVAL)?);
        bind(socket, &SocketAddrUnix::new(&short)?)?;
    }
    let inode = Inode::at(path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(Name { path: path.to_owned(), inode, claim: Claim::new(true) })
}

/// Gives the listening socket at `staged` its real name, if that still belongs to `holder` or, without one, to nobody.
/// Says whether it did; if not, nothing has changed.
fn publish(staged: &Name, path: &Path, holder: Option<Inode>) -> Result<bool, Errno> {
    let rename = |flags| retry_on_intr(|| renameat_with(CWD, &staged.path, CWD, path, flags));
    let Some(stale) = holder else {
        return match rename(RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(Errno::INVAL | Errno::NOSYS) => publish_by_link(staged, path, None),
            Err(errno) => Err(errno),
        };
    };
    // Swapped, not replaced: so we see what we got, and can give it back if it is not what we looked at.
    match rename(RenameFlags::EXCHANGE) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(false),
        Err(Errno::INVAL | Errno::NOSYS) => return publish_by_link(staged, path, Some(stale)),
        Err(errno) => return Err(errno),
    }
    if Inode::at(&staged.path).is_ok_and(|inode| inode == stale) {
        let _ = fs::remove_file(&staged.path);
        return Ok(true);
    }
    rename(RenameFlags::EXCHANGE)?;
    Ok(false)
}

/// [`publish`] on a filesystem whose `renameat2` knows no flags, such as some that are shared over a network. A link
/// never replaces anything. A stale socket is removed first, so for a moment nobody has the name; who takes it between
/// our last look and the removal loses it.
fn publish_by_link(staged: &Name, path: &Path, holder: Option<Inode>) -> Result<bool, Errno> {
    if let Some(stale) = holder {
        if !Inode::at(path).is_ok_and(|inode| inode == stale) {
            return Ok(false);
        }
        match retry_on_intr(|| unlink(path)) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    match retry_on_intr(|| linkat(CWD, &staged.path, CWD, path, AtFlags::empty())) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(false),
        Err(errno) => return Err(errno),
    }
    let _ = fs::remove_file(&staged.path);
    Ok(true)
}

/// Looks who has the name: nobody (`None`), or a socket that nobody listens on. Anything else is refused.
fn look(path: &Path, kind: SocketType) -> Result<Option<Inode>, Error> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            let kind = Errno::from_io_error(&error).map_or(ErrorKind::Backing, kind_of);
            return Err(refusal(path, kind, "its directory cannot be searched").because(error));
        }
    };
    if !metadata.file_type().is_socket() {
        let why = "something else has that name; it is left alone, pick another";
        return Err(refusal(path, ErrorKind::Invalid, why));
    }
    match listening_at(path, kind) {
        Ok(Some(process)) => Err(refusal(path, ErrorKind::Busy, &format!("{process} listens there"))),
        Ok(None) => Ok(Some(Inode::of(&metadata))),
        Err(errno) => Err(refusal(path, kind_of(errno), "a socket is there, and it cannot be told whose")
            .because(io::Error::from(errno))),
    }
}

/// Who listens on a Unix socket, `None` if nobody does.
fn listening_at(path: &Path, kind: SocketType) -> Result<Option<String>, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    match retry_on_intr(|| connect(&probe, &SocketAddrUnix::new(path)?)) {
        Ok(()) => Ok(Some(match sys::peer_credentials(&probe).ok().and_then(|who| who.pid) {
            Some(pid) => crate::backing::process_name(pid.get()),
            None => "a process that cannot be seen from here".to_owned(),
        })),
        // Gone meanwhile, or nobody there.
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
        // Its queue is full.
        Err(Errno::AGAIN) => Ok(Some("a busy process".to_owned())),
        // It is a socket of another kind, and somebody reads from it.
        Err(Errno::PROTOTYPE) => Ok(Some("a process with another kind of socket".to_owned())),
        Err(errno) => Err(errno),
    }
}

/// A connection to a client.
///
/// Blocking. Reading and writing go through a shared reference too, so that one thread may read while another writes.
#[derive(Debug)]
pub enum Stream {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

/// Does the same with either kind of stream.
macro_rules! either {
    ($stream:expr, $inner:ident => $action:expr) => {
        match $stream {
            Stream::Unix($inner) => $action,
            Stream::Tcp($inner) => $action,
        }
    };
}

impl Stream {
    /// Has what is written sent at once, not gathered first (`TCP_NODELAY`). Unix sockets always do.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Self::Unix(_) => Ok(()),
            Self::Tcp(stream) => stream.set_nodelay(true),
        }
    }

    /// Whether the other end is on this machine, as far as can be told.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(stream) => stream.peer_addr().is_ok_and(|peer| peer.ip().to_canonical().is_loopback()),
        }
    }

    /// Lets a unix socket hold so many bytes that the client has not read yet, as far as the system allows
    /// (`/proc/sys/net/core/wmem_max`); TCP sockets size themselves. With room for several pieces, the next is read and
    /// decrypted while the client still takes the last.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn set_send_room(&self, bytes: usize) -> io::Result<()> {
        match self {
            Self::Unix(stream) => Ok(rustix::net::sockopt::set_socket_send_buffer_size(stream, bytes)?),
            Self::Tcp(_) => Ok(()),
        }
    }

    /// Ends one direction or both; readers and writers under way return.
    ///
    /// # Errors
    ///
    /// What the system says, as when the client has gone already.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        either!(self, stream => stream.shutdown(how))
    }

    /// Another handle to the same connection.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// How long a read waits, `None` for as long as it takes.
    ///
    /// # Errors
    ///
    /// What the system says; a duration of zero is refused.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        either!(self, stream => stream.set_read_timeout(timeout))
    }

    /// How long a write waits, `None` for as long as it takes.
    ///
    /// # Errors
    ///
    /// What the system says; a duration of zero is refused.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        either!(self, stream => stream.set_write_timeout(timeout))
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> Peer {
        match self {
            Self::Unix(stream) => match sys::peer_credentials(stream) {
                Ok(who) => Peer::Unix { pid: who.pid.map(std::num::NonZeroU32::get), uid: who.uid },
                Err(_) => Peer::Unknown,
            },
            Self::Tcp(stream) => stream.peer_addr().map_or(Peer::Unknown, Peer::Tcp),
        }
    }
}

/// Who is at the other end of a connection, for logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this machine, as it was when it connected.
    Unix {
        /// Its number, unless it lives in a process namespace that we cannot see.
        pid: Option<u32>,
        /// Its user.
        uid: u32,
    },
    /// A network address.
    Tcp(SocketAddr),
    /// It has gone, or the system does not say.
    Unknown,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { pid: Some(pid), uid } => {
                write!(f, "{} of user {uid}", crate::backing::process_name(*pid))
            }
            Self::Unix { pid: None, uid } => write!(f, "a process of user {uid}"),
            Self::Tcp(address) => address.fmt(f),
            Self::Unknown => f.write_str("a client that has gone"),
        }
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        either!(stream, stream => stream.into())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, stream => stream.as_fd())
    }
}

impl Read for &Stream {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        either!(self, stream => (&*stream).read(data))
    }

    fn read_vectored(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, stream => (&*stream).read_vectored(parts))
    }
}

impl Write for &Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        either!(self, stream => (&*stream).write(data))
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, stream => (&*stream).write_vectored(parts))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        (&*self).read(data)
    }

    fn read_vectored(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self).read_vectored(parts)
    }
}

impl Write for Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        (&*self).write(data)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the service manager that we serve. Does nothing without one (`NOTIFY_SOCKET` of `sd_notify(3)`).
///
/// # Errors
///
/// [`Backing`](ErrorKind::Backing) if there is one and it cannot be reached; serving goes on all the same.
pub fn notify_ready() -> Result<(), Error> {
    notify("READY=1\n")
}

/// Tells the service manager that this process is the service now, and serves. Does nothing without one. It listens to this
/// only if the unit says `NotifyAccess=all`.
///
/// # Errors
///
/// As [`notify_ready`].
pub fn notify_taken_over() -> Result<(), Error> {
    notify(&format!("MAINPID={}\nREADY=1\n", std::process::id()))
}

/// Tells the service manager that we are stopping. Does nothing without one.
///
/// # Errors
///
/// As [`notify_ready`].
pub fn notify_stopping() -> Result<(), Error> {
    notify("STOPPING=1\n")
}

fn notify(message: &str) -> Result<(), Error> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let tell = || -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        match name.as_bytes().strip_prefix(b"@") {
            // `sd_notify(3)`: it stands for the NUL of a name in the abstract namespace.
            Some(name) => socket.connect_addr(&UnixAddr::from_abstract_name(name)?)?,
            None => socket.connect(&name)?,
        }
        socket.send(message.as_bytes()).map(drop)
    };
    tell().map_err(|error| {
        Error::new(ErrorKind::Backing, Op::Open)
            .detail("the service manager cannot be reached")
            .because(error)
    })
}

#[cfg(test)]
mod tests;
