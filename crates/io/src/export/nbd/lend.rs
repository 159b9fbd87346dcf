//! Payloads that a client on this machine takes from our own pages: nothing is copied on our side.
//!
//! ```text
//!   buffer --vmsplice--> pipe --splice--> Unix socket --> the client's read copies it
//!      '---------------- kept until the socket holds less than was lent since <-----'
//! ```
//!
//! Nobody says when the client has read a page. But a socket keeps order, and tells how much it holds: once that is less than
//! what was lent after a buffer, the buffer is free again.
//!
//! What holds for others:
//!
//! - Memory that was once lent stays the connection's until it goes back to the system. A client may keep pages (by `splice(2)`
//!   from the socket to a pipe of its own) and look at them later: it sees what is its own volume's.
//! - So a client, or somebody between, that splices from the socket instead of reading may see a page change after it has it.
//!   Which is why nothing is lent unless somebody who knows the clients says so.

use super::stream::GATHER_BYTES_MIN;
use crate::listen::Stream;
use crate::sys;
use inlinecrypt_core::memory::Buffer;
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use rustix::system::uname;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Buffers that a connection keeps: as many as fit the socket, and one for its thread and its helper each. With workers, who are
/// more, some are not kept, and what they hold is copied.
const KEPT_MAX: usize = 8;

/// What the socket is to hold, in bytes, as far as the system allows (`wmem_max`). It doubles this: six pieces, fewer than
/// are kept.
pub(super) const SEND_ROOM_BYTES: usize = 768 * 1024;

/// Room of the pipe: a piece and its header. A smaller one will do.
const PIPE_BYTES: usize = 512 * 1024;
/// With less, copying costs less. The system gives so little to a user who has very many pipes.
const PIPE_BYTES_MIN: usize = 64 * 1024;

/// How long a connection keeps buffers that nobody wants. Others may want them.
const KEPT_TIME: Duration = Duration::from_secs(1);

/// Linux before this version takes the client's own lock to put pages into its socket, so that a client that hangs in a read
/// keeps us as well (`unix_stream_sendpage` of `net/unix/af_unix.c`).
const LINUX_MIN: (u32, u32) = (6, 5);

/// What is lent to ourselves, to see whether it works.
const PAGE_BYTES: usize = 4096;

/// What one connection has lent.
#[derive(Debug)]
pub(super) struct Lender<'s> {
    socket: &'s Stream,
    /// Made when first needed; `None` if there is none to be had.
    pipe: OnceLock<Option<Pipe>>,
    /// How many bytes were lent in all.
    lent: AtomicU64,
    /// Locked while the outbox may be; nothing else is locked while this is held.
    kept: Mutex<Keeping>,
}

#[derive(Debug)]
struct Pipe {
    read_end: OwnedFd,
    write_end: OwnedFd,
}

#[derive(Debug, Default)]
struct Keeping {
    buffers: Vec<Kept>,
    /// Whether the socket tells when the client has been idle.
    is_timed: bool,
}

/// A buffer, and how much had been lent in all with it.
#[derive(Debug)]
struct Kept {
    until: u64,
    buffer: Buffer,
}

impl Pipe {
    fn new() -> Option<Self> {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).ok()?;
        let room = fcntl_setpipe_size(&write_end, PIPE_BYTES).or_else(|_| fcntl_getpipe_size(&write_end));
        (room.ok()? >= PIPE_BYTES_MIN).then_some(Self { read_end, write_end })
    }

    /// Sends `head` copied, and `payload` as pages.
    fn send(&self, socket: &Stream, head: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut in_pipe = 0;
        if !head.is_empty() {
            // An empty pipe has room for a page, and takes it whole.
            in_pipe = retry_on_intr(|| rustix::io::write(&self.write_end, head))?;
            assert_eq!(in_pipe, head.len(), "shorter than a page");
        }
        let mut rest = payload;
        while in_pipe > 0 || !rest.is_empty() {
            if !rest.is_empty() {
                let len = some(retry_on_intr(|| sys::put_pages(self.write_end.as_fd(), rest))?)?;
                (rest, in_pipe) = (&rest[len..], in_pipe + len);
            }
            while in_pipe > 0 {
                let flags = SpliceFlags::empty();
                let moved = retry_on_intr(|| splice(&self.read_end, None, socket, None, in_pipe, flags))?;
                in_pipe -= some(moved)?;
            }
        }
        Ok(())
    }
}

fn some(len: usize) -> io::Result<usize> {
    if len > 0 { Ok(len) } else { Err(io::ErrorKind::WriteZero.into()) }
}

impl<'s> Lender<'s> {
    /// Lends to the client at the other end of a Unix socket. `None` for other sockets, or if the system lends nothing.
    pub(super) fn new(socket: &'s Stream) -> Option<Self> {
        static IS_POSSIBLE: OnceLock<bool> = OnceLock::new();
        let Stream::Unix(_) = socket else { return None };
        let is_possible = *IS_POSSIBLE.get_or_init(|| {
            let tried = is_new_enough(&uname().release().to_string_lossy()) && try_out().unwrap_or(false);
            if !tried {
                tracing::warn!("this system cannot lend memory to clients; replies are copied");
            }
            tried
        });
        is_possible.then(|| Self::on(socket))
    }

    fn on(socket: &'s Stream) -> Self {
        Self { socket, pipe: OnceLock::new(), lent: AtomicU64::new(0), kept: Mutex::default() }
    }

    /// The client asks for `len_bytes`. To be called by the thread that receives, before anybody answers: what it waits for next
    /// ends when the client has been idle.
    pub(super) fn expect(&self, len_bytes: u32) {
        if len_bytes as usize >= GATHER_BYTES_MIN {
            let mut kept = self.lock();
            if !kept.is_timed {
                // Without it, buffers are kept until the connection ends.
                kept.is_timed = self.socket.set_read_timeout(Some(KEPT_TIME)).is_ok();
            }
        }
    }

    /// A buffer whose content the client has read, or never got.
    pub(super) fn take(&self) -> Option<Buffer> {
        let buffers = &mut self.lock().buffers;
        if buffers.is_empty() {
            return None;
        }
        // In this order: whatever is lent meanwhile makes it look less.
        let lent = self.lent.load(Ordering::SeqCst);
        let read = lent.saturating_sub(sys::unread_bytes(self.socket).ok()?);
        let free = buffers.iter().rposition(|kept| kept.until <= read)?;
        Some(buffers.swap_remove(free).buffer)
    }

    /// Whether `buffer` can be lent. It is the connection's from then on.
    pub(super) fn may_lend(&self, buffer: &mut Buffer) -> bool {
        self.pipe().is_some() && self.lock().buffers.len() < KEPT_MAX && buffer.seclude()
    }

    /// Sends `head` and then `payload`, part of a buffer that [may be lent](Self::may_lend). The buffer may be changed once
    /// [`take`](Self::take) gives it. To be called by one thread at a time. Returns how much has been lent by now, for
    /// [`keep`](Self::keep).
    ///
    /// # Errors
    ///
    /// The socket's or the pipe's. Nothing can be sent any more.
    ///
    /// # Panics
    ///
    /// If nothing may be lent.
    pub(super) fn send(&self, head: &[u8], payload: &[u8]) -> io::Result<u64> {
        self.pipe().expect("it may be lent").send(self.socket, head, payload)?;
        let len = payload.len() as u64;
        Ok(self.lent.fetch_add(len, Ordering::SeqCst) + len)
    }

    /// Keeps a buffer that was lent by the call of [`send`](Self::send) that returned `until`; 0 if it was not lent this time.
    pub(super) fn keep(&self, buffer: Buffer, until: u64) {
        self.lock().buffers.push(Kept { until, buffer });
    }

    /// The client has sent nothing for a while, or nobody will be served here: gives everything back.
    pub(super) fn rest(&self) {
        let mut kept = self.lock();
        let buffers = std::mem::take(&mut kept.buffers);
        kept.is_timed = self.socket.set_read_timeout(None).is_err();
        drop(kept);
        drop(buffers);
    }

    fn pipe(&self) -> Option<&Pipe> {
        self.pipe.get_or_init(Pipe::new).as_ref()
    }

    fn lock(&self) -> MutexGuard<'_, Keeping> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a release of Linux, such as `6.12.3-amd64`, is [`LINUX_MIN`] or later.
fn is_new_enough(release: &str) -> bool {
    let mut numbers = release.split(|other: char| !other.is_ascii_digit()).map(|number| number.parse().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) >= LINUX_MIN,
        _ => false,
    }
}

/// Lends a page to ourselves: whether it arrives, and whether it can be told when it has.
fn try_out() -> io::Result<bool> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let ours = Stream::from(ours);
    let Some(pipe) = Pipe::new() else { return Ok(false) };
    let sent = vec![7; PAGE_BYTES];
    pipe.send(&ours, &[], &sent)?;
    let before = sys::unread_bytes(&ours)?;
    let mut came = vec![0; PAGE_BYTES];
    theirs.read_exact(&mut came)?;
    Ok(came == sent && before >= PAGE_BYTES as u64 && sys::unread_bytes(&ours)? == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_core::memory::{HeapSource, MemoryPool};
    use std::io::{Read, Write};

    const LEN: usize = 200_000;
    const PATIENCE: Duration = Duration::from_secs(20);

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = Stream::from(ours);
        ours.set_send_room(SEND_ROOM_BYTES).unwrap();
        // Nobody waits for ever for who has failed.
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        (ours, theirs)
    }

    fn filled(pool: &MemoryPool, byte: u8) -> Buffer {
        let mut buffer = pool.try_large(&HeapSource).unwrap();
        buffer.bytes_mut().fill(byte);
        buffer
    }

    fn lend(lender: &Lender<'_>, mut buffer: Buffer) {
        assert!(lender.may_lend(&mut buffer));
        let until = lender.send(b"head", &buffer.bytes()[7..][..LEN]).unwrap();
        lender.keep(buffer, until);
    }

    fn expect(client: &mut UnixStream, byte: u8) {
        let mut got = vec![0; 4 + LEN];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got[..4], b"head");
        assert!(got[4..].iter().all(|found| *found == byte), "{byte}");
    }

    #[test]
    fn a_buffer_is_free_again_once_the_client_has_read_it_and_not_before() {
        let (ours, mut client) = pair();
        let lender = Lender::on(&ours);
        let pool = MemoryPool::new(256 * 1024, 8);
        lend(&lender, filled(&pool, 1));
        lend(&lender, filled(&pool, 2));
        assert!(lender.take().is_none());
        expect(&mut client, 1);
        // What the system counts besides hides the end of it until more is read.
        client.read_exact(&mut [0; 140_000]).unwrap();
        let first = lender.take().expect("read");
        assert_eq!(first.bytes()[0], 1);
        assert!(lender.take().is_none(), "the second is not read");
        drop(first);
        client.read_exact(&mut vec![0; 4 + LEN - 140_000]).unwrap();
        assert_eq!(lender.take().unwrap().bytes()[0], 2);
    }

    #[test]
    fn part_of_a_payload_that_is_not_read_keeps_it_all() {
        let (ours, mut client) = pair();
        let lender = Lender::on(&ours);
        lend(&lender, filled(&MemoryPool::new(256 * 1024, 8), 1));
        client.read_exact(&mut vec![0; 4 + LEN - 1]).unwrap();
        assert!(lender.take().is_none());
        client.read_exact(&mut [0]).unwrap();
        assert!(lender.take().is_some());
    }

    #[test]
    fn more_than_the_socket_holds_waits_for_the_client() {
        let (ours, mut client) = pair();
        let pool = MemoryPool::new(256 * 1024, 32);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let lender = Lender::on(&ours);
                for byte in 0..100 {
                    let mut buffer =
                        lender.take().unwrap_or_else(|| pool.try_large(&HeapSource).expect("one is left"));
                    buffer.bytes_mut().fill(byte);
                    if lender.may_lend(&mut buffer) {
                        lend(&lender, buffer);
                    } else {
                        (&ours).write_all(b"head").unwrap();
                        (&ours).write_all(&buffer.bytes()[..LEN]).unwrap();
                    }
                }
            });
            for byte in 0..100 {
                if byte % 16 == 0 {
                    std::thread::sleep(Duration::from_millis(3));
                }
                expect(&mut client, byte);
            }
        });
    }

    #[test]
    fn a_client_that_has_gone_is_an_error() {
        let (ours, client) = pair();
        let lender = Lender::on(&ours);
        let mut buffer = filled(&MemoryPool::new(256 * 1024, 8), 1);
        assert!(lender.may_lend(&mut buffer));
        drop(client);
        let error = lender.send(b"head", &buffer.bytes()[..LEN]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn pages_that_a_client_keeps_are_never_written_by_others() {
        let (ours, client) = pair();
        let pool = MemoryPool::new(256 * 1024, 2);
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        {
            let lender = Lender::on(&ours);
            lend(&lender, filled(&pool, 1));
            // It keeps some pages, and reads the rest.
            let len = splice(&client, None, &write_end, None, 50_000, SpliceFlags::empty()).unwrap();
            assert!(len > 10_000, "{len}");
            (&client).read_exact(&mut vec![0; 4 + LEN - len]).unwrap();
            let own = lender.take().expect("as far as can be told, all was read");
            lender.keep(own, 0);
        }
        // All that the pool has is another's now.
        let others = [filled(&pool, 2), filled(&pool, 3)];
        let mut kept = vec![0; 10_000];
        let mut got = 0;
        while got < kept.len() {
            got += rustix::io::read(&read_end, &mut kept[got..]).unwrap();
        }
        assert!(kept[4..].iter().all(|byte| *byte == 1));
        drop(others);
    }

    #[test]
    fn who_rests_keeps_nothing() {
        let (ours, mut client) = pair();
        let lender = Lender::on(&ours);
        let pool = MemoryPool::new(256 * 1024, 2);
        lender.expect(100);
        lend(&lender, filled(&pool, 1));
        let Stream::Unix(socket) = &ours else { unreachable!() };
        assert_eq!(socket.read_timeout().unwrap(), None, "that was a short one");
        lender.expect(1 << 20);
        assert_eq!(socket.read_timeout().unwrap(), Some(KEPT_TIME));
        lender.rest();
        assert_eq!(socket.read_timeout().unwrap(), None);
        let _others = [filled(&pool, 2), filled(&pool, 3)];
        expect(&mut client, 1);
        assert!(lender.take().is_none());
    }

    #[test]
    fn a_kernel_that_takes_the_clients_lock_is_not_new_enough() {
        for (release, is) in [
            ("6.5.0", true),
            ("6.18.44-fc", true),
            ("7.3.4+deb13", true),
            ("6.4.16", false),
            ("5.15", false),
            ("x", false),
        ] {
            assert_eq!(is_new_enough(release), is, "{release}");
        }
    }

    #[test]
    fn only_unix_sockets_are_lent_to() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(Lender::new(&Stream::from(stream)).is_none());
    }
}
