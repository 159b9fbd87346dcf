//! A client of the NBD protocol that does one thing over and over: it keeps a number of requests under way.
//!
//! Like the clients that people use (libnbd, qemu) it takes structured replies. One thread sends all requests that there is
//! room for by one system call and receives as many replies as are there by one, so that it takes as little of the machine
//! as a client can. What it reads it looks at only to find the next reply.

use super::echo::send_all;
use inlinecrypt_io::backing::testing::SplitMix64;
use inlinecrypt_io::export::nbd::wire;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Most that is received at once.
const RECEIVE_BYTES: usize = 256 * 1024;
/// How long a server may take for anything before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

impl Way {
    pub(super) const BOTH: [Self; 2] = [Self::Read, Self::Write];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Where the next request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Sequential,
    Random,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) order: Order,
    pub(super) len: u32,
    /// How many are under way.
    pub(super) depth: usize,
}

impl Shape {
    /// What is measured: bytes, one request after the other, and many small ones.
    pub(super) const ALL: [Self; 3] = [
        Self { name: "1 MiB, depth 16", order: Order::Sequential, len: 1 << 20, depth: 16 },
        Self { name: "4 KiB, depth 1", order: Order::Random, len: 4096, depth: 1 },
        Self { name: "4 KiB, depth 32", order: Order::Random, len: 4096, depth: 32 },
    ];

    /// In what its throughput is shown.
    pub(super) fn unit(&self) -> &'static str {
        match self.order {
            Order::Sequential => "MB/s",
            Order::Random => "kIOPS",
        }
    }

    /// Bytes that go to the server and come back for each request.
    pub(super) fn message_bytes(&self, way: Way) -> (usize, usize) {
        let (request, len) = (wire::REQUEST_BYTES, self.len as usize);
        match way {
            Way::Read => (request, wire::CHUNK_HEADER_BYTES + 8 + len),
            Way::Write => (request + len, wire::SIMPLE_REPLY_BYTES),
        }
    }
}

/// Where requests go, one after the other.
#[derive(Debug)]
pub(super) struct Places {
    shape: Shape,
    size: u64,
    next: u64,
    random: SplitMix64,
}

impl Places {
    /// On a disk of `size` bytes. With another seed, others: who goes where somebody else has just been finds everything in
    /// the processor's cache.
    pub(super) fn new(shape: Shape, size: u64, seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        Self { shape, size, next: random.next_u64() >> 8, random }
    }

    pub(super) fn next(&mut self) -> u64 {
        let len = u64::from(self.shape.len);
        let count = self.size / len;
        match self.shape.order {
            Order::Random => self.random.below(count) * len,
            Order::Sequential => {
                let at = self.next % count;
                self.next += 1;
                at * len
            }
        }
    }
}

/// What was done, in which time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Done {
    pub(super) requests: u64,
    pub(super) seconds: f64,
}

/// A connection in transmission.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    size: u64,
    received: Received,
    payload: Vec<u8>,
    seed: u64,
}

impl Client {
    /// Takes up the only export of the server at the other end.
    ///
    /// Clients of different seeds go to different places, and each to others every time.
    pub(super) fn connect(stream: UnixStream, seed: u64) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut stream = stream;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if greeting[..16] != wire::greeting()[..16] {
            return Err(strange("its greeting"));
        }
        let flags = wire::NBD_FLAG_C_FIXED_NEWSTYLE | wire::NBD_FLAG_C_NO_ZEROES;
        stream.write_all(&flags.to_be_bytes())?;
        option(&mut stream, wire::NBD_OPT_STRUCTURED_REPLY, &[], &mut |_, _| {})?;
        let mut size = None;
        // No name, and no question beside what comes anyway.
        option(&mut stream, wire::NBD_OPT_GO, &[0; 6], &mut |kind, data| {
            if let (wire::NBD_REP_INFO, Some((info, rest))) = (kind, data.split_first_chunk())
                && u16::from_be_bytes(*info) == wire::NBD_INFO_EXPORT
                && let Some((bytes, _)) = rest.split_first_chunk()
            {
                size = Some(u64::from_be_bytes(*bytes));
            }
        })?;
        let size = size.ok_or_else(|| strange("what it says of its export"))?;
        Ok(Self { stream, size, received: Received::default(), payload: Vec::new(), seed: seed << 32 })
    }

    /// Keeps requests under way for `time`, and waits until all are answered.
    pub(super) fn run(&mut self, shape: Shape, way: Way, time: Duration) -> io::Result<Done> {
        let began = Instant::now();
        self.seed += 1;
        let mut places = Places::new(shape, self.size, self.seed);
        let len = shape.len as usize;
        if self.payload.len() < len {
            // Noise, as data that was encrypted elsewhere.
            self.payload.resize(len, 0);
            SplitMix64::new(2).fill(&mut self.payload);
        }
        let (mut sent, mut done) = (0, 0);
        let mut headers = Vec::with_capacity(shape.depth);
        let mut is_over = false;
        loop {
            headers.clear();
            while !is_over && sent - done < shape.depth as u64 {
                headers.push(header(way, sent, places.next(), shape.len));
                sent += 1;
            }
            if sent == done {
                return Ok(Done { requests: done, seconds: began.elapsed().as_secs_f64() });
            }
            let payload = match way {
                Way::Read => &[][..],
                Way::Write => &self.payload[..len],
            };
            send(&self.stream, &headers, payload)?;
            done += self.received.take(&mut self.stream, way, shape.len, &mut |_, _| {})?;
            is_over = began.elapsed() >= time;
        }
    }

    /// Checks that what is written is read again, at some places. A server that fails this has no figures.
    pub(super) fn check(&mut self) -> io::Result<()> {
        let shape = Shape { name: "check", order: Order::Random, len: 300 * 1024, depth: 1 };
        let mut places = Places::new(shape, self.size, self.seed);
        let mut written = vec![0; shape.len as usize];
        for seed in 0..4 {
            let at = places.next();
            SplitMix64::new(seed).fill(&mut written);
            send(&self.stream, &[header(Way::Write, seed, at, shape.len)], &written)?;
            while self.received.take(&mut self.stream, Way::Write, shape.len, &mut |_, _| {})? == 0 {}
            let mut read = vec![0; written.len()];
            send(&self.stream, &[header(Way::Read, seed, at, shape.len)], &[])?;
            // The pieces of a long read come in any order.
            let mut keep = |offset: u64, bytes: &[u8]| {
                let place = offset.checked_sub(at).and_then(|place| usize::try_from(place).ok());
                if let Some(place) = place.and_then(|place| read.get_mut(place..)?.get_mut(..bytes.len())) {
                    place.copy_from_slice(bytes);
                }
            };
            while self.received.take(&mut self.stream, Way::Read, shape.len, &mut keep)? == 0 {}
            if read != written {
                return Err(io::Error::other("what was read is not what was written"));
            }
        }
        Ok(())
    }
}

/// Sends an option and tells `each` its replies but for the last, which must be an acknowledgement.
fn option(
    stream: &mut UnixStream,
    option: u32,
    data: &[u8],
    each: &mut dyn FnMut(u32, &[u8]),
) -> io::Result<()> {
    let mut bytes = wire::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).map_err(io::Error::other)?.to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)?;
    loop {
        let mut head = [0; 20];
        stream.read_exact(&mut head)?;
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (kind, len) = (word(12), word(16));
        if head[..8] != wire::NBD_REP_MAGIC.to_be_bytes() || len > 64 << 10 {
            return Err(strange("its reply to an option"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match kind {
            wire::NBD_REP_ACK => return Ok(()),
            refused if refused >> 31 == 1 => return Err(strange("its refusal of an option")),
            kind => each(kind, &data),
        }
    }
}

fn header(way: Way, cookie: u64, offset: u64, len: u32) -> [u8; wire::REQUEST_BYTES] {
    let kind = match way {
        Way::Read => wire::NBD_CMD_READ,
        Way::Write => wire::NBD_CMD_WRITE,
    };
    let mut bytes = [0; wire::REQUEST_BYTES];
    bytes[..4].copy_from_slice(&wire::NBD_REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// Sends requests, each with the same payload behind it.
fn send(stream: &UnixStream, headers: &[[u8; wire::REQUEST_BYTES]], payload: &[u8]) -> io::Result<()> {
    let parts = headers.iter().flat_map(|header| [IoSlice::new(header), IoSlice::new(payload)]);
    send_all(stream, &mut parts.collect::<Vec<_>>())
}

/// What was received and not yet taken apart.
#[derive(Debug)]
struct Received {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes of data of the chunk at hand that are still to come, where on the disk they are, and whether it is its reply's
    /// last.
    data: usize,
    offset: u64,
    is_last: bool,
}

impl Default for Received {
    fn default() -> Self {
        let bytes = vec![0; RECEIVE_BYTES].into_boxed_slice();
        Self { bytes, start: 0, end: 0, data: 0, offset: 0, is_last: false }
    }
}

impl Received {
    /// Receives once, and says how many requests are answered by that. Their data is told to `each`, piece by piece, with its
    /// offset on the disk; a simple reply does not say that, and counts from 0.
    fn take(
        &mut self,
        stream: &mut UnixStream,
        way: Way,
        len: u32,
        each: &mut dyn FnMut(u64, &[u8]),
    ) -> io::Result<u64> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let came = loop {
            match stream.read(&mut self.bytes[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                came => break came?,
            }
        };
        if came == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server has closed the connection"));
        }
        self.end += came;
        let mut answered = 0;
        loop {
            let there = self.end - self.start;
            if self.data > 0 {
                let data = self.data.min(there);
                each(self.offset, &self.bytes[self.start..][..data]);
                self.start += data;
                self.offset += data as u64;
                self.data -= data;
                if self.data > 0 {
                    return Ok(answered);
                }
            } else {
                let Some(bytes) = self.head() else { return Ok(answered) };
                let head = Head::parse(bytes, way, len)?;
                (self.data, self.offset, self.is_last) = (head.data, head.offset, head.is_last);
                self.start += head.len;
            }
            if self.data == 0 && self.is_last {
                answered += 1;
                self.is_last = false;
            }
        }
    }

    /// The head of the next reply or chunk, if all of it is there.
    fn head(&self) -> Option<&[u8]> {
        let there = &self.bytes[self.start..self.end];
        let magic: [u8; 4] = *there.first_chunk()?;
        let len = match u32::from_be_bytes(magic) {
            wire::NBD_STRUCTURED_REPLY_MAGIC => {
                let kind = there.get(6..8)?;
                let has_offset = kind == wire::NBD_REPLY_TYPE_OFFSET_DATA.to_be_bytes();
                wire::CHUNK_HEADER_BYTES + if has_offset { 8 } else { 0 }
            }
            _ => wire::SIMPLE_REPLY_BYTES,
        };
        there.get(..len)
    }
}

/// The head of a reply or chunk.
#[derive(Debug)]
struct Head {
    /// Its own length, with the offset of data.
    len: usize,
    data: usize,
    offset: u64,
    is_last: bool,
}

impl Head {
    /// Takes it apart; `bytes` are all of it. `len` is what was asked for.
    fn parse(bytes: &[u8], way: Way, len: u32) -> io::Result<Self> {
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let failed = |code: u32| Err(io::Error::other(format!("the server answers with error {code}")));
        match word(0) {
            wire::NBD_SIMPLE_REPLY_MAGIC => {
                if word(4) != 0 {
                    return failed(word(4));
                }
                let data = if way == Way::Read { len as usize } else { 0 };
                Ok(Self { len: wire::SIMPLE_REPLY_BYTES, data, offset: 0, is_last: true })
            }
            wire::NBD_STRUCTURED_REPLY_MAGIC => {
                let half = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
                let is_last = half(4) & wire::NBD_REPLY_FLAG_DONE != 0;
                let behind = word(16);
                let (data, offset) = match half(6) {
                    wire::NBD_REPLY_TYPE_NONE => (0, 0),
                    wire::NBD_REPLY_TYPE_OFFSET_DATA if (8..=len.saturating_add(8)).contains(&behind) => {
                        (behind as usize - 8, u64::from(word(20)) << 32 | u64::from(word(24)))
                    }
                    wire::NBD_REPLY_TYPE_ERROR | wire::NBD_REPLY_TYPE_ERROR_OFFSET => {
                        return Err(io::Error::other("the server answers with an error"));
                    }
                    _ => return Err(strange("a chunk of its reply")),
                };
                Ok(Self { len: bytes.len(), data, offset, is_last })
            }
            _ => Err(strange("its reply")),
        }
    }
}

fn strange(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is not of the NBD protocol"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Where on the disk the chunks' data begins. What a simple reply has begins at 0.
    const FIRST: u64 = 1 << 40;

    /// A read of 5000 bytes in two chunks and an empty last one, one in a chunk, and a simple reply with data.
    fn replies() -> (Vec<u8>, Vec<u8>) {
        let mut data = vec![0; 15_000];
        SplitMix64::new(9).fill(&mut data);
        let mut bytes = Vec::new();
        let mut chunk = |range: std::ops::Range<usize>| {
            bytes.extend(wire::data_chunk_header(0, 1, FIRST + range.start as u64, range.len()));
            bytes.extend_from_slice(&data[range]);
        };
        // In another order than on the disk.
        chunk(1000..5000);
        chunk(0..1000);
        bytes.extend(wire::chunk_header(wire::NBD_REPLY_FLAG_DONE, wire::NBD_REPLY_TYPE_NONE, 1, 0));
        bytes.extend(wire::data_chunk_header(wire::NBD_REPLY_FLAG_DONE, 2, FIRST + 5000, 5000));
        bytes.extend_from_slice(&data[5000..10_000]);
        bytes.extend(wire::simple_reply(0, 3));
        bytes.extend_from_slice(&data[10_000..]);
        (bytes, data)
    }

    #[test]
    fn replies_are_found_however_they_are_cut_on_their_way() {
        let (bytes, data) = replies();
        for step in [1, 3, 19, 20, 21, 4096, 20_000] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            let (mut answered, mut read) = (0, vec![0; data.len()]);
            thread::scope(|scope| {
                let bytes = &bytes;
                scope.spawn(move || bytes.chunks(step).for_each(|piece| (&theirs).write_all(piece).unwrap()));
                let mut received = Received::default();
                while answered < 3 {
                    let mut keep = |offset: u64, piece: &[u8]| {
                        let at = offset.checked_sub(FIRST).unwrap_or(10_000 + offset);
                        read[usize::try_from(at).unwrap()..][..piece.len()].copy_from_slice(piece);
                    };
                    answered += received.take(&mut ours, Way::Read, 5000, &mut keep).unwrap();
                }
            });
            assert_eq!(answered, 3, "{step}");
            assert!(read == data, "{step}");
        }
    }

    #[test]
    fn errors_and_nonsense_end_a_measurement() {
        let failing = wire::simple_reply(5, 1).to_vec();
        let error = wire::chunk_header(wire::NBD_REPLY_FLAG_DONE, wire::NBD_REPLY_TYPE_ERROR, 1, 6).to_vec();
        let long = wire::data_chunk_header(0, 1, 0, 5001).to_vec();
        for (bytes, saying) in [
            (failing, "error 5"),
            (error, "answers with an error"),
            (long, "not of the NBD protocol"),
            (vec![0; 40], "not of the NBD protocol"),
            (Vec::new(), "closed the connection"),
        ] {
            let (mut ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&bytes).unwrap();
            drop(theirs);
            let why = Received::default().take(&mut ours, Way::Read, 5000, &mut |_, _| {}).unwrap_err();
            assert!(why.to_string().contains(saying), "{why}");
        }
    }

    #[test]
    fn requests_go_where_they_should() {
        for shape in Shape::ALL {
            let mut places = Places::new(shape, 16 << 20, 1);
            let all: Vec<u64> = (0..20_000).map(|_| places.next()).collect();
            assert!(
                all.iter().all(|at| at % u64::from(shape.len) == 0 && at + u64::from(shape.len) <= 16 << 20)
            );
            match shape.order {
                Order::Sequential => {
                    let follows = |pair: &[u64]| pair[1] == (pair[0] + (1 << 20)) % (16 << 20);
                    assert!(all.windows(2).all(follows));
                }
                // Every place of 4096 is hit but for a few.
                Order::Random => {
                    let hit: std::collections::BTreeSet<_> = all.iter().collect();
                    assert!(hit.len() > 4000, "{}", hit.len());
                }
            }
        }
    }
}
