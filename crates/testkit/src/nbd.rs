//! A small NBD client, written from the protocol description alone.
//!
//! It speaks plainly: what a test wants to send wrongly, it can send wrongly. Works over any stream, so over TLS too.

use std::fmt;
use std::io::{self, Read, Write};

/// A reply to an option that says no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Its number without the error bit: 1 unknown option, 2 policy, 3 invalid, 5 TLS required, 6 unknown export, 7 shutting
    /// down, 9 too big.
    pub code: u32,
    /// What the server said to it.
    pub text: String,
}

/// What can go wrong.
#[derive(Debug)]
pub enum NbdError {
    /// The stream failed or ended.
    Io(io::Error),
    /// The server refused an option.
    Refused(Refused),
    /// The server answered a request with an error number.
    Errno(u32),
    /// The server does not follow the protocol.
    Protocol(String),
}

impl NbdError {
    /// The number with which a request was answered.
    #[must_use]
    pub fn errno(&self) -> Option<u32> {
        if let Self::Errno(errno) = self { Some(*errno) } else { None }
    }

    /// The number with which an option was refused.
    #[must_use]
    pub fn refusal(&self) -> Option<u32> {
        if let Self::Refused(refused) = self { Some(refused.code) } else { None }
    }
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "stream: {error}"),
            Self::Refused(refused) => write!(f, "option refused: {} {}", refused.code, refused.text),
            Self::Errno(errno) => write!(f, "request failed: errno {errno}"),
            Self::Protocol(what) => write!(f, "protocol: {what}"),
        }
    }
}

impl std::error::Error for NbdError {}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

type Result<T> = std::result::Result<T, NbdError>;

fn protocol<T>(what: impl Into<String>) -> Result<T> {
    Err(NbdError::Protocol(what.into()))
}

/// What a server says about an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Its size in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    /// Least, preferred and greatest block, if told.
    pub blocks: Option<(u32, u32, u32)>,
    /// Its own name, if told.
    pub name: Option<String>,
    /// Its description, if told.
    pub description: Option<String>,
}

/// A run of blocks as `NBD_CMD_BLOCK_STATUS` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its length in bytes.
    pub len: u32,
    /// Its flags: 1 hole, 2 zero.
    pub flags: u32,
}

/// The answer to one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Which request.
    pub cookie: u64,
    /// 0, or why it failed.
    pub errno: u32,
    /// Data of a read, in the order of the disk.
    pub data: Vec<u8>,
    /// In how many chunks the data came; 0 for a simple reply.
    pub data_chunks: usize,
    /// Where the error happened, if told.
    pub error_offset: Option<u64>,
    /// What the server said to the error.
    pub error_text: String,
    /// Answers to a question about allocation.
    pub blocks: Vec<Block>,
}

/// The read, write, and so on of the protocol, with the flags that they take.
pub mod cmd {
    #![expect(missing_docs, reason = "named as in the protocol")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    pub const FLAG_FUA: u16 = 1;
    pub const FLAG_NO_HOLE: u16 = 2;
    pub const FLAG_DF: u16 = 4;
    pub const FLAG_REQ_ONE: u16 = 8;
    pub const FLAG_FAST_ZERO: u16 = 16;
}

/// The options of the handshake.
pub mod opt {
    #![expect(missing_docs, reason = "named as in the protocol")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    structured: bool,
    no_zeroes: bool,
    context: Option<u32>,
    cookie: u64,
    /// What was asked with which cookie and is not answered: kind, offset, length.
    asked: Vec<(u64, u16, u64, u32)>,
    export: Export,
    open: Vec<Open>,
}

/// A structured reply whose end has not come, and which parts of its data have.
#[derive(Debug)]
struct Open {
    reply: Reply,
    covered: Vec<(u64, u64)>,
}

impl<S: Read + Write> Client<S> {
    /// Takes the greeting and answers it.
    ///
    /// # Errors
    ///
    /// The stream's, or [`NbdError::Protocol`].
    pub fn greet(stream: S) -> Result<Self> {
        Self::greet_with(stream, 3)
    }

    /// The same with other client flags.
    ///
    /// # Errors
    ///
    /// The stream's, or [`NbdError::Protocol`].
    pub fn greet_with(stream: S, client_flags: u32) -> Result<Self> {
        let mut client = Self::resume(stream);
        let mut greeting = [0; 18];
        client.stream.read_exact(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return protocol("not a newstyle server");
        }
        if greeting[16..] != [0, 3] {
            return protocol("other handshake flags than expected");
        }
        client.no_zeroes = client_flags & 2 != 0;
        client.stream.write_all(&client_flags.to_be_bytes())?;
        Ok(client)
    }

    /// Goes on with options over a stream on which the greeting is past, such as TLS.
    pub fn resume(stream: S) -> Self {
        Self {
            stream,
            structured: false,
            no_zeroes: true,
            context: None,
            cookie: 0,
            asked: Vec::new(),
            export: Export::default(),
            open: Vec::new(),
        }
    }

    /// Connects to an export in the way of today's clients: structured replies, `base:allocation`, `NBD_OPT_GO`.
    ///
    /// # Errors
    ///
    /// Any.
    pub fn connect(stream: S, name: &str) -> Result<Self> {
        let mut client = Self::greet(stream)?;
        client.structured_reply()?;
        client.set_meta_context(name, &["base:allocation"])?;
        client.go(name)?;
        Ok(client)
    }

    /// Connects to an export in the way of old clients: `NBD_OPT_EXPORT_NAME` alone.
    ///
    /// # Errors
    ///
    /// Any.
    pub fn connect_simple(stream: S, name: &str) -> Result<Self> {
        let mut client = Self::greet(stream)?;
        client.export_name(name)?;
        Ok(client)
    }

    /// The stream itself, to misbehave on.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The stream itself.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// What the server said about the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    // ---- Handshake ----

    /// Sends an option.
    ///
    /// # Errors
    ///
    /// The stream's.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&length(data.len()).to_be_bytes());
        bytes.extend_from_slice(data);
        Ok(self.stream.write_all(&bytes)?)
    }

    /// Takes one reply to an option: its kind and data.
    ///
    /// # Errors
    ///
    /// The stream's, [`NbdError::Refused`], [`NbdError::Protocol`].
    pub fn option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>)> {
        if self.u64()? != 0x0003_e889_0455_65a9 {
            return protocol("wrong magic in an option's reply");
        }
        if self.u32()? != option {
            return protocol("reply to another option");
        }
        let kind = self.u32()?;
        let len = self.u32()?;
        let data = self.bytes(len)?;
        if kind & (1 << 31) != 0 {
            let text = String::from_utf8_lossy(&data).into_owned();
            return Err(NbdError::Refused(Refused { code: kind & !(1 << 31), text }));
        }
        Ok((kind, data))
    }

    /// Sends an option and takes all replies up to the last.
    ///
    /// # Errors
    ///
    /// The stream's, [`NbdError::Refused`], [`NbdError::Protocol`].
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<(u32, Vec<u8>)>> {
        self.send_option(option, data)?;
        let mut replies = Vec::new();
        loop {
            let (kind, data) = self.option_reply(option)?;
            if kind == 1 {
                return if data.is_empty() { Ok(replies) } else { protocol("an ACK with data") };
            }
            replies.push((kind, data));
        }
    }

    /// Lists the exports: names and descriptions.
    ///
    /// # Errors
    ///
    /// Any of an option.
    pub fn list(&mut self) -> Result<Vec<(String, String)>> {
        let mut list = Vec::new();
        for (kind, data) in self.option(opt::LIST, &[])? {
            let (name, rest) = split_text(&data)?;
            if kind != 2 {
                return protocol("not NBD_REP_SERVER");
            }
            list.push((name, String::from_utf8_lossy(rest).into_owned()));
        }
        Ok(list)
    }

    /// Asks for structured replies.
    ///
    /// # Errors
    ///
    /// Any of an option.
    pub fn structured_reply(&mut self) -> Result<()> {
        self.option(opt::STRUCTURED_REPLY, &[])?;
        self.structured = true;
        Ok(())
    }

    /// Asks for metadata contexts; returns those chosen.
    ///
    /// # Errors
    ///
    /// Any of an option.
    pub fn set_meta_context(&mut self, name: &str, queries: &[&str]) -> Result<Vec<String>> {
        let chosen = self.meta_context(opt::SET_META_CONTEXT, name, queries)?;
        self.context = chosen.first().map(|(id, _)| *id);
        Ok(chosen.into_iter().map(|(_, name)| name).collect())
    }

    /// Lists metadata contexts.
    ///
    /// # Errors
    ///
    /// Any of an option.
    pub fn list_meta_context(&mut self, name: &str, queries: &[&str]) -> Result<Vec<String>> {
        let found = self.meta_context(opt::LIST_META_CONTEXT, name, queries)?;
        Ok(found.into_iter().map(|(_, name)| name).collect())
    }

    fn meta_context(&mut self, option: u32, name: &str, queries: &[&str]) -> Result<Vec<(u32, String)>> {
        let mut data = text_field(name);
        data.extend_from_slice(&length(queries.len()).to_be_bytes());
        for query in queries {
            data.extend(text_field(query));
        }
        let mut contexts = Vec::new();
        for (kind, data) in self.option(option, &data)? {
            let Some((id, name)) = data.split_first_chunk() else { return protocol("a context without id") };
            if kind != 4 {
                return protocol("not NBD_REP_META_CONTEXT");
            }
            contexts.push((u32::from_be_bytes(*id), String::from_utf8_lossy(name).into_owned()));
        }
        Ok(contexts)
    }

    /// Asks about an export.
    ///
    /// # Errors
    ///
    /// Any of an option.
    pub fn info(&mut self, name: &str) -> Result<Export> {
        self.info_or_go(opt::INFO, name)
    }

    /// Asks for an export and enters transmission.
    ///
    /// # Errors
    ///
    /// Any of an option.
    pub fn go(&mut self, name: &str) -> Result<Export> {
        self.export = self.info_or_go(opt::GO, name)?;
        Ok(self.export.clone())
    }

    fn info_or_go(&mut self, option: u32, name: &str) -> Result<Export> {
        let mut data = text_field(name);
        data.extend_from_slice(&[0, 3, 0, 1, 0, 2, 0, 3]);
        let mut export = None::<(u64, u16)>;
        let mut found = Export::default();
        for (kind, data) in self.option(option, &data)? {
            let Some((info, rest)) = data.split_first_chunk() else { return protocol("a fact without kind") };
            if kind != 3 {
                return protocol("not NBD_REP_INFO");
            }
            let text = || Some(String::from_utf8_lossy(rest).into_owned());
            match (u16::from_be_bytes(*info), rest.len()) {
                (0, 10) => {
                    let size = u64::from_be_bytes(rest[..8].try_into().expect("eight of ten"));
                    export = Some((size, u16::from_be_bytes([rest[8], rest[9]])));
                }
                (1, _) => found.name = text(),
                (2, _) => found.description = text(),
                (3, 12) => {
                    let at =
                        |index: usize| u32::from_be_bytes(rest[index..index + 4].try_into().expect("four"));
                    found.blocks = Some((at(0), at(4), at(8)));
                }
                other => return protocol(format!("unexpected fact {other:?}")),
            }
        }
        let Some((size, flags)) = export else { return protocol("no NBD_INFO_EXPORT") };
        Ok(Export { size, flags, ..found })
    }

    /// Enters transmission by `NBD_OPT_EXPORT_NAME`.
    ///
    /// # Errors
    ///
    /// The stream's: the server can only hang up.
    pub fn export_name(&mut self, name: &str) -> Result<Export> {
        self.send_option(opt::EXPORT_NAME, name.as_bytes())?;
        let size = self.u64()?;
        let flags = self.u16()?;
        if !self.no_zeroes && self.bytes(124)?.iter().any(|byte| *byte != 0) {
            return protocol("the 124 zeroes are none");
        }
        self.export = Export { size, flags, ..Export::default() };
        Ok(self.export.clone())
    }

    // ---- Transmission ----

    /// Sends a request's header, and returns its cookie.
    ///
    /// # Errors
    ///
    /// The stream's.
    pub fn send_header(&mut self, kind: u16, flags: u16, offset: u64, len: u32) -> Result<u64> {
        self.send(kind, flags, offset, len, &[])
    }

    /// Sends a request with payload, and returns its cookie. Any number may be under way.
    ///
    /// # Errors
    ///
    /// The stream's.
    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Result<u64> {
        self.cookie += 1;
        let mut bytes = request_header(kind, flags, self.cookie, offset, len).to_vec();
        bytes.extend_from_slice(payload);
        self.asked.push((self.cookie, kind, offset, len));
        self.stream.write_all(&bytes)?;
        Ok(self.cookie)
    }

    /// Takes the next complete reply, whichever request it answers.
    ///
    /// # Errors
    ///
    /// The stream's, or [`NbdError::Protocol`]. A request that failed is no error here.
    pub fn receive(&mut self) -> Result<Reply> {
        loop {
            match self.u32()? {
                0x6744_6698 => {
                    let errno = self.u32()?;
                    let cookie = self.u64()?;
                    let (kind, _, len) = self.answered(cookie)?;
                    if self.structured && kind == cmd::READ {
                        return protocol("a simple reply to a read though structured ones were agreed on");
                    }
                    let data = if kind == cmd::READ && errno == 0 { self.bytes(len)? } else { Vec::new() };
                    return Ok(Reply { cookie, errno, data, ..Reply::default() });
                }
                0x668e_33ef if self.structured => {
                    let flags = self.u16()?;
                    let kind = self.u16()?;
                    let cookie = self.u64()?;
                    let len = self.u32()?;
                    let data = self.bytes(len)?;
                    let Some(&(_, asked, offset, asked_len)) =
                        self.asked.iter().find(|asked| asked.0 == cookie)
                    else {
                        return protocol("a chunk for a request that was not made");
                    };
                    let index = match self.open.iter().position(|open| open.reply.cookie == cookie) {
                        Some(index) => index,
                        None => {
                            let zeroes = if asked == cmd::READ { asked_len as usize } else { 0 };
                            let reply = Reply { cookie, data: vec![0; zeroes], ..Reply::default() };
                            self.open.push(Open { reply, covered: Vec::new() });
                            self.open.len() - 1
                        }
                    };
                    let Open { reply, covered } = &mut self.open[index];
                    chunk(reply, covered, kind, &data, (offset, asked_len), self.context)?;
                    if flags & 1 != 0 {
                        let Open { mut reply, covered } = self.open.swap_remove(index);
                        self.answered(cookie)?;
                        let total: u64 = covered.iter().map(|(start, end)| end - start).sum();
                        if reply.errno != 0 {
                            reply.data.clear();
                        } else if asked == cmd::READ && total != u64::from(asked_len) {
                            return protocol("a read was answered in part, without an error");
                        }
                        return Ok(reply);
                    }
                }
                magic => return protocol(format!("wrong magic in a reply: {magic:#x}")),
            }
        }
    }

    fn answered(&mut self, cookie: u64) -> Result<(u16, u64, u32)> {
        let Some(index) = self.asked.iter().position(|asked| asked.0 == cookie) else {
            return protocol("a reply to a request that was not made");
        };
        let (_, kind, offset, len) = self.asked.swap_remove(index);
        Ok((kind, offset, len))
    }

    /// Sends a request and takes its reply.
    ///
    /// # Errors
    ///
    /// The stream's, [`NbdError::Errno`], [`NbdError::Protocol`].
    pub fn request(&mut self, kind: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Result<Reply> {
        let cookie = self.send(kind, flags, offset, len, payload)?;
        let reply = self.receive()?;
        if reply.cookie != cookie {
            return protocol("a reply to another request");
        }
        if reply.errno == 0 { Ok(reply) } else { Err(NbdError::Errno(reply.errno)) }
    }

    /// Reads.
    ///
    /// # Errors
    ///
    /// Any of a request.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        self.request(cmd::READ, 0, offset, len, &[]).map(|reply| reply.data)
    }

    /// Writes.
    ///
    /// # Errors
    ///
    /// Any of a request.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.request(cmd::WRITE, 0, offset, length(data.len()), data).map(drop)
    }

    /// Flushes.
    ///
    /// # Errors
    ///
    /// Any of a request.
    pub fn flush(&mut self) -> Result<()> {
        self.request(cmd::FLUSH, 0, 0, 0, &[]).map(drop)
    }

    /// Trims.
    ///
    /// # Errors
    ///
    /// Any of a request.
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<()> {
        self.request(cmd::TRIM, 0, offset, len, &[]).map(drop)
    }

    /// Writes zeroes.
    ///
    /// # Errors
    ///
    /// Any of a request.
    pub fn write_zeroes(&mut self, offset: u64, len: u32, flags: u16) -> Result<()> {
        self.request(cmd::WRITE_ZEROES, flags, offset, len, &[]).map(drop)
    }

    /// Asks what is allocated.
    ///
    /// # Errors
    ///
    /// Any of a request.
    pub fn block_status(&mut self, offset: u64, len: u32, flags: u16) -> Result<Vec<Block>> {
        self.request(cmd::BLOCK_STATUS, flags, offset, len, &[]).map(|reply| reply.blocks)
    }

    /// Says goodbye, and waits for the server to hang up.
    ///
    /// # Errors
    ///
    /// The stream's, or [`NbdError::Protocol`] if the server still says something.
    pub fn disconnect(mut self) -> Result<()> {
        self.send_header(cmd::DISC, 0, 0, 0)?;
        match self.stream.read(&mut [0; 1]) {
            Ok(0) => Ok(()),
            Ok(_) => protocol("a word after the goodbye"),
            Err(error) => Err(error.into()),
        }
    }

    fn bytes(&mut self, len: u32) -> Result<Vec<u8>> {
        const LEN_MAX: u32 = 65 << 20;
        if len > LEN_MAX {
            return protocol("an absurdly long reply");
        }
        let mut bytes = vec![0; len as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

/// Takes in one chunk.
fn chunk(
    reply: &mut Reply,
    covered: &mut Vec<(u64, u64)>,
    kind: u16,
    data: &[u8],
    (offset, len): (u64, u32),
    context: Option<u32>,
) -> Result<()> {
    match kind {
        0 if data.is_empty() => {}
        1 => {
            let Some((at, payload)) = data.split_first_chunk() else {
                return protocol("data without offset");
            };
            let start = u64::from_be_bytes(*at);
            let end = start + payload.len() as u64;
            if payload.is_empty() || start < offset || end > offset + u64::from(len) {
                return protocol("data outside of what was asked for");
            }
            if covered.iter().any(|(from, to)| start < *to && *from < end) {
                return protocol("data twice");
            }
            covered.push((start, end));
            let at = usize::try_from(start - offset).expect("within the request");
            reply.data[at..at + payload.len()].copy_from_slice(payload);
            reply.data_chunks += 1;
        }
        5 => {
            let Some((id, rest)) = data.split_first_chunk() else {
                return protocol("status without context");
            };
            if Some(u32::from_be_bytes(*id)) != context || rest.is_empty() || rest.len() % 8 != 0 {
                return protocol("malformed status");
            }
            for item in rest.chunks_exact(8) {
                let at = |index: usize| u32::from_be_bytes(item[index..index + 4].try_into().expect("four"));
                reply.blocks.push(Block { len: at(0), flags: at(4) });
            }
            let total: u64 = reply.blocks.iter().map(|block| u64::from(block.len)).sum();
            if reply.blocks.iter().any(|block| block.len == 0) || total > u64::from(len) {
                return protocol("status outside of what was asked for");
            }
        }
        0x8001 | 0x8002 if data.len() >= 6 => {
            let errno = u32::from_be_bytes(data[..4].try_into().expect("four"));
            let text_len = usize::from(u16::from_be_bytes([data[4], data[5]]));
            let Some((text, rest)) = data[6..].split_at_checked(text_len) else {
                return protocol("an error text that is longer than its chunk");
            };
            reply.error_text = String::from_utf8_lossy(text).into_owned();
            reply.errno = errno;
            match (kind, rest.len()) {
                (0x8001, 0) => {}
                (0x8002, 8) => {
                    let at = u64::from_be_bytes(rest.try_into().expect("eight"));
                    if at < offset || at >= offset + u64::from(len) {
                        return protocol("an error outside of what was asked for");
                    }
                    reply.error_offset = Some(at);
                }
                _ => return protocol("an error chunk of the wrong length"),
            }
            if errno == 0 {
                return protocol("an error chunk without an error");
            }
        }
        _ => return protocol(format!("unexpected chunk {kind}")),
    }
    Ok(())
}

/// A request's header, for those who send it themselves.
#[must_use]
pub fn request_header(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// A string behind its length in 32 bits.
#[must_use]
pub fn text_field(text: &str) -> Vec<u8> {
    let mut bytes = length(text.len()).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn split_text(data: &[u8]) -> Result<(String, &[u8])> {
    let Some((len, rest)) = data.split_first_chunk() else { return protocol("a string without length") };
    match rest.split_at_checked(u32::from_be_bytes(*len) as usize) {
        Some((text, rest)) => Ok((String::from_utf8_lossy(text).into_owned(), rest)),
        None => protocol("a string that is longer than its reply"),
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("tests send less than 4 GiB at once")
}
