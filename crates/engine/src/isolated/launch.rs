//! How an engine process comes to be.

use super::process;
use super::realtime::LanePriority;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// An engine process that was started, or found running.
#[derive(Debug)]
pub struct Launched {
    /// The host's end of its control socket.
    pub socket: OwnedFd,
    /// The process, if it is ours to wait for.
    pub child: Option<Child>,
}

/// Starts engine processes.
pub trait Launcher: fmt::Debug + Send + Sync {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// [`EngineGone`](ErrorKind::EngineGone) if it does not start.
    fn launch(&self) -> Result<Launched, Error>;
}

fn failed(what: String, why: io::Error) -> Error {
    Error::new(ErrorKind::EngineGone, Op::Open).detail(what).because(why)
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Runs a program that calls [`process::run`] with its standard input, a socket.
#[derive(Clone, Debug)]
pub struct ProcessLauncher {
    /// The program.
    pub program: PathBuf,
    /// Its arguments. Anybody may see them.
    pub arguments: Vec<OsString>,
}

impl ProcessLauncher {
    /// `program` in its other role.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arguments: vec![super::PROCESS_VERB.into()] }
    }

    /// This very program in its other role, also if the file has been replaced meanwhile.
    #[must_use]
    pub fn this_program() -> Self {
        Self::new("/proc/self/exe")
    }

    /// The same, whose engine processes have lanes of `priority`, also where their hosts do not ask for it.
    #[must_use]
    pub fn with_priority(mut self, priority: LanePriority) -> Self {
        self.arguments.extend(priority.to_arguments());
        self
    }

    /// Starts a process whose host is at the other end of `socket`. It ends when the calling thread does.
    ///
    /// # Errors
    ///
    /// [`EngineGone`](ErrorKind::EngineGone) if it does not start.
    pub fn start(&self, socket: OwnedFd) -> Result<Child, Error> {
        Command::new(&self.program)
            .args(&self.arguments)
            .env_clear()
            // Ctrl-C is for the server, which then ends the engine when it needs it no more.
            .process_group(0)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|why| {
                failed(format!("cannot start {} as the engine process", self.program.display()), why)
            })
    }
}

impl Launcher for ProcessLauncher {
    fn launch(&self) -> Result<Launched, Error> {
        let (ours, its) = pair().map_err(|why| failed("no socket for the engine process".into(), why))?;
        let child = self.start(its)?;
        Ok(Launched { socket: ours, child: Some(child) })
    }
}

/// Connects to an engine service, which starts a process for each host.
#[derive(Clone, Debug)]
pub struct SocketLauncher {
    /// Where it listens.
    pub path: PathBuf,
}

impl Launcher for SocketLauncher {
    fn launch(&self) -> Result<Launched, Error> {
        let connected = || {
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
            // It will be told keys.
            let uid = rustix::net::sockopt::socket_peercred(&socket)?.uid;
            if uid != rustix::process::geteuid() && !uid.is_root() {
                return Err(io::Error::other(format!("user {} listens there", uid.as_raw())));
            }
            Ok(socket)
        };
        let connected = connected().map_err(|why: io::Error| {
            failed(format!("no engine service answers at {}", self.path.display()), why)
        })?;
        Ok(Launched { socket: connected, child: None })
    }
}

/// Plays the engine process on a thread of this process: the same bargain without its protection, for tests and embedders.
#[derive(Clone, Copy, Debug)]
pub struct ThreadLauncher;

impl Launcher for ThreadLauncher {
    fn launch(&self) -> Result<Launched, Error> {
        let (ours, its) = pair().map_err(|why| failed("no socket for the engine thread".into(), why))?;
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || process::serve_uncaged(its))
            .map_err(|why| failed("no thread for the engine".into(), why))?;
        Ok(Launched { socket: ours, child: None })
    }
}
