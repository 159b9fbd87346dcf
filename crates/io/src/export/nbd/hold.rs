//! Holding a server: everything that was received is answered, and then its connections rest between two requests, so that
//! another server can take them over, or this one goes on as if nothing had happened.
//!
//! ```text
//!   serving --hold--> held --resume--> serving
//!                      | '--close_held--> those that cannot be handed over are closed
//!     another server: hold (with no connections yet) -> adopt each -> resume
//! ```
//!
//! A thread that waits for its client is woken by a signal that does nothing else, again and again until it has noticed: so
//! holding costs nothing while nobody holds.

use super::negotiate::Terms;
use super::session::Ended;
use super::wire::REQUEST_BYTES;
use crate::listen::Stream;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often threads are woken that have not noticed yet.
pub(super) const WAKE_INTERVAL: Duration = Duration::from_millis(1);

/// A connection as another server takes it over: between two requests, with nothing left to be answered.
pub struct Handed {
    /// The socket, in another descriptor.
    pub socket: OwnedFd,
    /// Name of the export.
    pub export: String,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether the client may ask what is allocated.
    pub allocation: bool,
    /// What was received of the next request: less than its header.
    pub unread: Vec<u8>,
}

impl fmt::Debug for Handed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What was received may be part of anything.
        f.debug_struct("Handed")
            .field("export", &self.export)
            .field("structured", &self.structured)
            .field("allocation", &self.allocation)
            .field("unread_bytes", &self.unread.len())
            .finish_non_exhaustive()
    }
}

impl Handed {
    /// The connection over `socket`; `None` if there is no descriptor left for it.
    pub(super) fn of(socket: &Stream, terms: &Terms, unread: &[u8]) -> Option<Self> {
        Some(Self {
            socket: socket.try_clone().ok()?.into(),
            export: terms.export.name().to_owned(),
            structured: terms.structured,
            allocation: terms.allocation,
            unread: unread.to_vec(),
        })
    }

    /// Its parts, if they make sense.
    pub(super) fn checked(self) -> io::Result<(Stream, Self)> {
        use rustix::net::AddressFamily;
        use rustix::net::sockopt::socket_domain;
        if self.unread.len() >= REQUEST_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more than part of a request is unread"));
        }
        let socket = self.socket.try_clone()?;
        let stream = match socket_domain(&socket)? {
            AddressFamily::UNIX => Stream::Unix(socket.into()),
            AddressFamily::INET | AddressFamily::INET6 => Stream::Tcp(socket.into()),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "neither a Unix nor a TCP socket")),
        };
        Ok((stream, self))
    }
}

/// What holding led to.
#[derive(Debug, Default)]
pub struct Held {
    /// Connections that another server can take over.
    pub connections: Vec<Handed>,
    /// Connections that rest too, but stay with this server: those with TLS.
    pub stay: usize,
    /// Connections that did not come to rest in time (a handshake, a request that was never sent whole, replies that
    /// nobody reads) and were cut off.
    pub cut_off: usize,
}

/// Whether a server is held.
#[derive(Debug, Default)]
pub(super) struct Hold {
    /// Asked by every session before it waits.
    wanted: AtomicBool,
    /// The same, for those who accept: locked while a connection is accepted and entered.
    accepting: Mutex<bool>,
    released: Condvar,
}

impl Hold {
    pub(super) fn wanted(&self) -> &AtomicBool {
        &self.wanted
    }

    /// From now on nobody is accepted, and sessions come to rest.
    pub(super) fn begin(&self) {
        *self.lock() = true;
        self.wanted.store(true, Ordering::Release);
    }

    /// Ends it, with what [`lock`](Self::lock) returned.
    pub(super) fn end(&self, mut accepting: MutexGuard<'_, bool>) {
        self.wanted.store(false, Ordering::Release);
        *accepting = false;
        self.released.notify_all();
    }

    /// Nobody is accepted meanwhile. Taken before the server's table, as those who accept do.
    pub(super) fn lock(&self) -> MutexGuard<'_, bool> {
        self.accepting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while held. Nobody begins to hold while the turn is kept.
    pub(super) fn turn_to_accept(&self) -> MutexGuard<'_, bool> {
        let held = self.lock();
        self.released.wait_while(held, |held| *held).unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a connection rests.
#[derive(Debug)]
pub(super) enum Rest {
    /// Somebody else can take it.
    Handed(Handed),
    /// Somebody else may be taking it.
    Rests,
    /// It can only go on here, or be closed.
    Stays,
    /// It is another server's: never to be touched again.
    Given,
}

/// What a resting connection does next.
#[derive(Debug)]
pub(super) enum Fate {
    GoOn,
    End(Ended),
}
