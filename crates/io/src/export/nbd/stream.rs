//! The two ends of a connection, buffered so that many small messages cost one system call.
//!
//! An [`Inbox`] receives as much as there is and hands it out piece by piece. An [`Outbox`] gathers replies until it is
//! full or somebody is about to wait. Both work over anything that reads and writes, so that sessions run in memory
//! just as well.

use std::io::{self, ErrorKind, IoSlice, Read, Write};

/// Room for what is received, in bytes: fifteen writes of 4 KiB, or the heads of two thousand requests.
pub const INBOX_BYTES: usize = 64 * 1024;

/// The same for one that was [enlarged](Inbox::enlarge): 35 writes, which are then done together.
const LARGE_INBOX_BYTES: usize = 144 * 1024;

/// How much is received at once while long payloads come: the head of the next request, and not much of its payload, which is
/// then received where it belongs.
const LITTLE_BYTES: usize = 4 * 1024;

/// Replies are sent at the latest when so many bytes of them have gathered.
///
/// Less than the least send buffer of Linux's sockets (208 KiB), so one system call suffices.
pub const OUTBOX_BYTES: usize = 128 * 1024;

/// Payloads from this length on are not copied into the outbox but sent from where they are.
pub(super) const GATHER_BYTES_MIN: usize = 32 * 1024;

/// What was received and not yet used.
#[derive(Debug)]
pub struct Inbox<R> {
    reader: R,
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    /// Most that is received at once, unless more is needed.
    at_once: usize,
}

impl<R: Read> Inbox<R> {
    /// An empty inbox.
    #[must_use]
    pub fn new(reader: R) -> Self {
        let bytes = vec![0; INBOX_BYTES].into_boxed_slice();
        Self { reader, bytes, start: 0, end: 0, at_once: INBOX_BYTES }
    }

    /// An inbox in which `bytes` are already.
    ///
    /// # Panics
    ///
    /// If they are more than [`INBOX_BYTES`].
    #[must_use]
    pub fn with(reader: R, bytes: &[u8]) -> Self {
        let mut inbox = Self::new(reader);
        inbox.bytes[..bytes.len()].copy_from_slice(bytes);
        inbox.end = bytes.len();
        inbox
    }

    /// What is there.
    #[must_use]
    pub fn available(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Drops the first `len` bytes of what is there.
    ///
    /// # Panics
    ///
    /// If there is less.
    pub fn consume(&mut self, len: usize) {
        assert!(len <= self.end - self.start, "consumed only what was available");
        self.start += len;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Gives it more room.
    pub fn enlarge(&mut self) {
        let mut bytes = vec![0; LARGE_INBOX_BYTES].into_boxed_slice();
        let len = self.available().len();
        bytes[..len].copy_from_slice(self.available());
        (self.bytes, self.start, self.end) = (bytes, 0, len);
        self.expect_long(false);
    }

    /// Says whether long payloads come, which are better not received here: from now on as much is received at once as there
    /// is, or little.
    pub fn expect_long(&mut self, long: bool) {
        self.at_once = if long { LITTLE_BYTES } else { self.bytes.len() };
    }

    /// Receives once. Returns how much came; 0 is the end.
    ///
    /// # Errors
    ///
    /// The reader's.
    ///
    /// # Panics
    ///
    /// If there is no room: ask for at most [`INBOX_BYTES`] before using what is there.
    pub fn fill(&mut self) -> io::Result<usize> {
        Ok(self.receive(self.at_once, || false)?.expect("nobody interrupts"))
    }

    /// The same; `None`, and nothing has changed, if `interrupted` says so before or while waiting. Whoever makes it say so
    /// must see to it that the reader reports [`Interrupted`](ErrorKind::Interrupted).
    ///
    /// # Errors
    ///
    /// As [`fill`](Self::fill).
    ///
    /// # Panics
    ///
    /// As [`fill`](Self::fill).
    pub fn fill_unless(&mut self, interrupted: impl Fn() -> bool) -> io::Result<Option<usize>> {
        self.receive(self.at_once, interrupted)
    }

    fn receive(&mut self, len_max: usize, interrupted: impl Fn() -> bool) -> io::Result<Option<usize>> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        assert!(self.end < self.bytes.len(), "never more than INBOX_BYTES are waited for");
        while !interrupted() {
            let end = self.bytes.len().min(self.end + len_max);
            match self.reader.read(&mut self.bytes[self.end..end]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                received => {
                    let len = received?;
                    self.end += len;
                    return Ok(Some(len));
                }
            }
        }
        Ok(None)
    }

    /// Receives until `len` bytes are there.
    ///
    /// # Errors
    ///
    /// The reader's; [`UnexpectedEof`](ErrorKind::UnexpectedEof).
    ///
    /// # Panics
    ///
    /// If `len` is over [`INBOX_BYTES`].
    pub fn need(&mut self, len: usize) -> io::Result<()> {
        while self.available().len() < len {
            let missing = len - self.available().len();
            if self.receive(self.at_once.max(missing), || false)? == Some(0) {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Takes as much of what is there as fits `into`, and returns how much.
    pub fn take(&mut self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.available().len());
        into[..len].copy_from_slice(&self.available()[..len]);
        self.consume(len);
        len
    }

    /// The first `N` bytes, received if need be; `None` if the end comes before the first of them.
    ///
    /// # Errors
    ///
    /// The reader's; [`UnexpectedEof`](ErrorKind::UnexpectedEof) if the end comes among them.
    pub fn take_array<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        loop {
            if let Some((head, _)) = self.available().split_first_chunk::<N>() {
                let head = *head;
                self.consume(N);
                return Ok(Some(head));
            }
            let was_empty = self.available().is_empty();
            if self.fill()? == 0 {
                return if was_empty { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Fills `into`: first from what is there, then straight from the reader.
    ///
    /// # Errors
    ///
    /// The reader's; [`UnexpectedEof`](ErrorKind::UnexpectedEof).
    pub fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        let taken = self.take(into);
        if taken < into.len() { self.reader.read_exact(&mut into[taken..]) } else { Ok(()) }
    }

    /// Receives `len` bytes and forgets them.
    ///
    /// # Errors
    ///
    /// The reader's; [`UnexpectedEof`](ErrorKind::UnexpectedEof).
    pub fn discard(&mut self, mut len: usize) -> io::Result<()> {
        loop {
            let now = len.min(self.available().len());
            self.consume(now);
            len -= now;
            if len == 0 {
                return Ok(());
            }
            if self.fill()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The reader.
    pub fn reader_mut(&mut self) -> &mut R {
        &mut self.reader
    }
}

/// Replies that were not sent yet.
#[derive(Debug)]
pub struct Outbox<W> {
    writer: W,
    bytes: Vec<u8>,
}

impl<W: Write> Outbox<W> {
    /// An empty outbox. Its memory is taken when first needed.
    #[must_use]
    pub fn new(writer: W) -> Self {
        Self { writer, bytes: Vec::new() }
    }

    /// Puts a message in, and sends if there is much.
    ///
    /// # Errors
    ///
    /// The writer's. Part of the message may have been sent then, so nothing sensible can follow.
    pub fn send(&mut self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        if payload.len() >= GATHER_BYTES_MIN {
            return self.send_gathered(head, payload);
        }
        if self.bytes.len() + head.len() + payload.len() > OUTBOX_BYTES {
            self.flush()?;
        }
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(payload);
        Ok(())
    }

    /// Sends what is there, the head and the payload with as few system calls as the writer allows, uncopied.
    fn send_gathered(&mut self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(head);
        let mut parts = [IoSlice::new(&self.bytes), IoSlice::new(payload)];
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            match self.writer.write_vectored(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(len) => IoSlice::advance_slices(&mut rest, len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        Ok(())
    }

    /// Sends what is there.
    ///
    /// # Errors
    ///
    /// The writer's.
    pub fn flush(&mut self) -> io::Result<()> {
        if !self.bytes.is_empty() {
            self.writer.write_all(&self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }

    /// The writer, without what was not sent.
    #[must_use]
    pub fn into_writer(self) -> W {
        self.writer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives or takes at most `step` bytes at a time.
    struct Slow<T>(T, usize);

    impl<T: Read> Read for Slow<T> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let len = into.len().min(self.1);
            self.0.read(&mut into[..len])
        }
    }

    impl<T: Write> Write for Slow<T> {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            self.0.write(&from[..from.len().min(self.1)])
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[test]
    fn little_is_received_while_long_payloads_come_and_never_less_than_needed() {
        let bytes = vec![7u8; INBOX_BYTES];
        let mut inbox = Inbox::new(&bytes[..]);
        inbox.expect_long(true);
        assert_eq!(inbox.fill().unwrap(), LITTLE_BYTES);
        inbox.need(10 * LITTLE_BYTES).unwrap();
        assert_eq!(inbox.available().len(), 10 * LITTLE_BYTES, "in one more go, and no further");
        inbox.consume(10 * LITTLE_BYTES);
        inbox.expect_long(false);
        assert_eq!(inbox.fill().unwrap(), INBOX_BYTES - 10 * LITTLE_BYTES);
    }

    #[test]
    fn an_enlarged_inbox_has_what_it_had_and_takes_more() {
        let bytes: Vec<u8> = (0..LARGE_INBOX_BYTES + 100).map(|at| at.to_le_bytes()[0]).collect();
        let mut inbox = Inbox::new(&bytes[..]);
        inbox.fill().unwrap();
        inbox.consume(100);
        inbox.enlarge();
        assert_eq!(inbox.available(), &bytes[100..INBOX_BYTES]);
        while inbox.available().len() < LARGE_INBOX_BYTES {
            inbox.fill().unwrap();
        }
        assert_eq!(inbox.available(), &bytes[100..]);
    }

    #[test]
    fn an_inbox_gives_what_came_in_order_however_it_came() {
        let sent: Vec<u8> = (0..200u8).collect();
        for step in [1, 3, 64, 1000] {
            let mut inbox = Inbox::new(Slow(&sent[..], step));
            assert_eq!(inbox.take_array::<4>().unwrap(), Some([0, 1, 2, 3]));
            inbox.discard(6).unwrap();
            let mut middle = [0; 150];
            inbox.read_exact(&mut middle).unwrap();
            assert_eq!(middle[..], sent[10..160]);
            assert_eq!(inbox.take_array::<40>().unwrap().unwrap()[..], sent[160..]);
            assert_eq!(inbox.take_array::<1>().unwrap(), None);
        }
    }

    #[test]
    fn the_end_among_bytes_that_belong_together_is_an_error() {
        let mut inbox = Inbox::new(&[1u8, 2, 3][..]);
        assert_eq!(inbox.take_array::<4>().unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let mut inbox = Inbox::new(&[1u8, 2, 3][..]);
        assert_eq!(inbox.discard(4).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let mut inbox = Inbox::new(&[1u8, 2, 3][..]);
        assert_eq!(inbox.read_exact(&mut [0; 4]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn an_outbox_keeps_the_order_of_small_and_large_messages() {
        for step in [7, 50_000, usize::MAX] {
            let mut outbox = Outbox::new(Slow(Vec::new(), step));
            let mut wanted = Vec::new();
            for (index, len) in [0, 1, 5000, 40_000, 31_000, 31_000, 31_000, 31_000, 31_000, 300_000, 3]
                .into_iter()
                .enumerate()
            {
                let payload = vec![u8::try_from(index).unwrap(); len];
                outbox.send(b"head", &payload).unwrap();
                wanted.extend_from_slice(b"head");
                wanted.extend_from_slice(&payload);
            }
            outbox.flush().unwrap();
            assert_eq!(outbox.into_writer().0, wanted);
        }
    }

    #[test]
    fn an_outbox_says_nothing_before_it_has_to() {
        let mut outbox = Outbox::new(Vec::new());
        outbox.send(b"head", &[0; 1000]).unwrap();
        assert!(outbox.into_writer().is_empty());
    }
}
