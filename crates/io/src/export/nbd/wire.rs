//! The NBD protocol's numbers, and pure functions between bytes and typed values.
//!
//! Constants keep the spelling of the NBD protocol description (`doc/proto.md` of the reference implementation), so that
//! they can be looked up there. Parsers take bytes and hand out a value or an error: they never panic, never read past
//! what they were given, and never allocate more than a small multiple of it.

// ---- Handshake ------------------------------------------------------------------------------------------------------

/// First thing that a server says: `NBDMAGIC`.
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// Second thing that a newstyle server says, and the first of every option: `IHAVEOPT`.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// First thing in the reply to an option.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag: the server speaks fixed newstyle.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out 124 zeroes.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag: the client speaks fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: leave out 124 zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Choose an export and go on, without a way to say no.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Give up.
pub const NBD_OPT_ABORT: u32 = 2;
/// List the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Change to TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Ask about an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Choose an export and go on.
pub const NBD_OPT_GO: u32 = 7;
/// Change to structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// List metadata contexts.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Choose metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Change to extended headers. Not served.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Reply: done.
pub const NBD_REP_ACK: u32 = 1;
/// Reply: an export.
pub const NBD_REP_SERVER: u32 = 2;
/// Reply: a fact about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Reply: a metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Reply: the option is not known here.
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) | 1;
/// Reply: known, but not allowed.
pub const NBD_REP_ERR_POLICY: u32 = (1 << 31) | 2;
/// Reply: malformed.
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) | 3;
/// Reply: TLS first.
pub const NBD_REP_ERR_TLS_REQD: u32 = (1 << 31) | 5;
/// Reply: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = (1 << 31) | 6;
/// Reply: the server is stopping.
pub const NBD_REP_ERR_SHUTDOWN: u32 = (1 << 31) | 7;
/// Reply: the option's data is too long.
pub const NBD_REP_ERR_TOO_BIG: u32 = (1 << 31) | 9;

/// Fact: size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Fact: the export's own name.
pub const NBD_INFO_NAME: u16 = 1;
/// Fact: a description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Fact: least, preferred and greatest block.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Longest string that the protocol allows, in bytes.
pub const STRING_BYTES_MAX: usize = 4096;
/// The one metadata context that the protocol defines.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The number by which our replies call [`BASE_ALLOCATION`].
pub const BASE_ALLOCATION_ID: u32 = 1;
/// Most queries in one metadata option. Clients send one or two.
pub const META_QUERIES_MAX: usize = 64;

// ---- Transmission ---------------------------------------------------------------------------------------------------

/// Transmission flag that is always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: cannot be written.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: serves `NBD_CMD_FLUSH`.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: serves `NBD_CMD_FLAG_FUA`.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: serves `NBD_CMD_TRIM`.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: serves `NBD_CMD_WRITE_ZEROES`.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: serves `NBD_CMD_FLAG_DF`.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush on one connection covers all.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: serves `NBD_CMD_CACHE`.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: serves `NBD_CMD_FLAG_FAST_ZERO`.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// First thing in a request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// First thing in a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First thing in a chunk of a structured reply.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Length of a request without its payload.
pub const REQUEST_BYTES: usize = 28;
/// Length of a simple reply without its payload.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Length of a chunk's header.
pub const CHUNK_HEADER_BYTES: usize = 20;

/// Read.
pub const NBD_CMD_READ: u16 = 0;
/// Write.
pub const NBD_CMD_WRITE: u16 = 1;
/// Go away in peace.
pub const NBD_CMD_DISC: u16 = 2;
/// Make stable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// No longer needed.
pub const NBD_CMD_TRIM: u16 = 4;
/// Will be read soon.
pub const NBD_CMD_CACHE: u16 = 5;
/// Make zero.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// What is allocated.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: answer when stable.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: zeroes shall be allocated.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: the reply in one chunk.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: one extent is enough.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: zeroes only if fast.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

/// Chunk flag: the last one.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: nothing more to say.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: data.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: extents.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: an error.
pub const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) | 1;
/// Chunk: an error at an offset.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) | 2;

/// Extent flag: not allocated.
pub const NBD_STATE_HOLE: u32 = 1 << 0;

// ---- Parsing --------------------------------------------------------------------------------------------------------

/// Bytes that do not follow the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// A magic number is wrong: the stream cannot be followed any further.
    Magic,
    /// Lengths within the data contradict each other, or the data ends early or late.
    Lengths,
    /// A string is longer than the protocol allows, holds NUL, or is not UTF-8.
    Text,
    /// More parts than we want to look at.
    TooMany,
}

/// What a client can do, from its first 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    /// It understands replies to options.
    pub fixed_newstyle: bool,
    /// It does not want 124 zeroes.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// The flags, or `None` if there are some that we did not offer: the connection must be dropped then.
    #[must_use]
    pub fn parse(bytes: [u8; 4]) -> Option<Self> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return None;
        }
        Some(Self {
            fixed_newstyle: flags & NBD_FLAG_C_FIXED_NEWSTYLE != 0,
            no_zeroes: flags & NBD_FLAG_C_NO_ZEROES != 0,
        })
    }
}

/// Length of an option without its data.
pub const OPTION_BYTES: usize = 16;

/// The head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// How much data follows.
    pub len: u32,
}

impl OptionHeader {
    /// Takes it apart.
    ///
    /// # Errors
    ///
    /// [`Malformed::Magic`].
    pub fn parse(bytes: &[u8; OPTION_BYTES]) -> Result<Self, Malformed> {
        let mut rest = &bytes[..];
        if take_u64(&mut rest)? != IHAVEOPT {
            return Err(Malformed::Magic);
        }
        Ok(Self { option: take_u32(&mut rest)?, len: take_u32(&mut rest)? })
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InfoQuery<'a> {
    /// Which export.
    pub export_name: &'a str,
    /// Whether `NBD_INFO_NAME` is asked for.
    pub wants_name: bool,
    /// Whether `NBD_INFO_DESCRIPTION` is asked for.
    pub wants_description: bool,
}

impl<'a> InfoQuery<'a> {
    /// Takes it apart.
    ///
    /// # Errors
    ///
    /// [`Malformed::Lengths`], [`Malformed::Text`].
    pub fn parse(mut data: &'a [u8]) -> Result<Self, Malformed> {
        let export_name = take_text(&mut data)?;
        let count = usize::from(take_u16(&mut data)?);
        if data.len() != count * 2 {
            return Err(Malformed::Lengths);
        }
        let asked = |info: u16| data.chunks_exact(2).any(|item| item == info.to_be_bytes());
        Ok(Self {
            export_name,
            wants_name: asked(NBD_INFO_NAME),
            wants_description: asked(NBD_INFO_DESCRIPTION),
        })
    }
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaQuery<'a> {
    /// Which export.
    pub export_name: &'a str,
    /// Whether there is no query at all.
    pub is_empty: bool,
    /// Whether a query names `base:allocation`.
    pub names_allocation: bool,
    /// Whether a query is `base:` alone, which in a list stands for all of that namespace.
    pub names_base: bool,
}

impl<'a> MetaQuery<'a> {
    /// Takes it apart.
    ///
    /// # Errors
    ///
    /// [`Malformed::Lengths`], [`Malformed::Text`], [`Malformed::TooMany`].
    pub fn parse(mut data: &'a [u8]) -> Result<Self, Malformed> {
        let export_name = take_text(&mut data)?;
        let count = usize::try_from(take_u32(&mut data)?).map_err(|_too_large| Malformed::TooMany)?;
        if count > META_QUERIES_MAX {
            return Err(Malformed::TooMany);
        }
        let mut query =
            Self { export_name, is_empty: count == 0, names_allocation: false, names_base: false };
        for _ in 0..count {
            let text = take_text(&mut data)?;
            query.names_allocation |= text == BASE_ALLOCATION;
            query.names_base |= text == "base:";
        }
        if data.is_empty() { Ok(query) } else { Err(Malformed::Lengths) }
    }
}

/// An export's name as the data of `NBD_OPT_EXPORT_NAME`.
///
/// # Errors
///
/// [`Malformed::Text`].
pub fn parse_export_name(data: &[u8]) -> Result<&str, Malformed> {
    text(data)
}

/// A request without its payload, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// `NBD_CMD_*`.
    pub kind: u16,
    /// The client's mark, to be sent back.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u32,
}

impl RequestHeader {
    /// Takes it apart.
    ///
    /// # Errors
    ///
    /// [`Malformed::Magic`].
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        let mut rest = &bytes[..];
        if take_u32(&mut rest)? != NBD_REQUEST_MAGIC {
            return Err(Malformed::Magic);
        }
        Ok(Self {
            flags: take_u16(&mut rest)?,
            kind: take_u16(&mut rest)?,
            cookie: take_u64(&mut rest)?,
            offset: take_u64(&mut rest)?,
            len: take_u32(&mut rest)?,
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(Malformed::Lengths)?;
    *rest = tail;
    Ok(*head)
}

fn take_u16(rest: &mut &[u8]) -> Result<u16, Malformed> {
    take(rest).map(u16::from_be_bytes)
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, Malformed> {
    take(rest).map(u32::from_be_bytes)
}

fn take_u64(rest: &mut &[u8]) -> Result<u64, Malformed> {
    take(rest).map(u64::from_be_bytes)
}

/// A string behind its length in 32 bits.
fn take_text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, Malformed> {
    let len = usize::try_from(take_u32(rest)?).map_err(|_too_large| Malformed::Lengths)?;
    let (head, tail) = rest.split_at_checked(len).ok_or(Malformed::Lengths)?;
    *rest = tail;
    text(head)
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > STRING_BYTES_MAX || bytes.contains(&0) {
        return Err(Malformed::Text);
    }
    std::str::from_utf8(bytes).map_err(|_not_utf8| Malformed::Text)
}

// ---- Building -------------------------------------------------------------------------------------------------------

/// What a server says first.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&INIT_PASSWD.to_be_bytes());
    bytes[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
    bytes[16..].copy_from_slice(&(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// Appends the reply to an option. `parts` together are its data.
///
/// # Panics
///
/// If the data is longer than 32 bits can say; our own names and texts are bounded.
pub fn push_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let len = u32::try_from(len).expect("replies are made of strings of at most STRING_BYTES_MAX");
    out.extend_from_slice(&NBD_REP_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// A simple reply's header.
#[must_use]
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// A chunk's header. `len` is that of everything behind it.
#[must_use]
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, len: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let mut bytes = [0; CHUNK_HEADER_BYTES];
    bytes[..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// Header and offset of a chunk of `data_len` bytes of data.
///
/// # Panics
///
/// If `data_len` is over 32 bits less 8; pieces are far smaller.
#[must_use]
pub fn data_chunk_header(
    flags: u16,
    cookie: u64,
    offset: u64,
    data_len: usize,
) -> [u8; CHUNK_HEADER_BYTES + 8] {
    let len = u32::try_from(data_len + 8).expect("pieces are at most a few MiB");
    let mut bytes = [0; CHUNK_HEADER_BYTES + 8];
    bytes[..CHUNK_HEADER_BYTES].copy_from_slice(&chunk_header(
        flags,
        NBD_REPLY_TYPE_OFFSET_DATA,
        cookie,
        len,
    ));
    bytes[CHUNK_HEADER_BYTES..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text_field(text: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend_from_slice(text);
        bytes
    }

    #[test]
    fn client_flags_that_were_not_offered_are_refused() {
        assert_eq!(
            ClientFlags::parse([0, 0, 0, 3]),
            Some(ClientFlags { fixed_newstyle: true, no_zeroes: true })
        );
        assert_eq!(
            ClientFlags::parse([0, 0, 0, 0]),
            Some(ClientFlags { fixed_newstyle: false, no_zeroes: false })
        );
        assert_eq!(ClientFlags::parse([0, 0, 0, 7]), None);
        assert_eq!(ClientFlags::parse([0x80, 0, 0, 3]), None);
    }

    #[test]
    fn an_option_header_needs_its_magic() {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(b"IHAVEOPT");
        bytes[11] = 7;
        bytes[15] = 9;
        assert_eq!(OptionHeader::parse(&bytes), Ok(OptionHeader { option: NBD_OPT_GO, len: 9 }));
        bytes[0] ^= 1;
        assert_eq!(OptionHeader::parse(&bytes), Err(Malformed::Magic));
    }

    #[test]
    fn an_info_query_says_what_it_asks_for() {
        let mut data = text_field(b"disk");
        data.extend_from_slice(&[0, 2, 0, 1, 0, 3]);
        let query = InfoQuery::parse(&data).unwrap();
        assert_eq!(query, InfoQuery { export_name: "disk", wants_name: true, wants_description: false });
    }

    #[test]
    fn an_info_query_of_contradicting_lengths_is_malformed() {
        let mut data = text_field(b"disk");
        data.extend_from_slice(&[0, 2, 0, 1]);
        assert_eq!(InfoQuery::parse(&data), Err(Malformed::Lengths));
        assert_eq!(InfoQuery::parse(&[0, 0, 0, 9, b'x', 0, 0]), Err(Malformed::Lengths));
        assert_eq!(InfoQuery::parse(&[0xff, 0xff, 0xff, 0xff, 0, 0]), Err(Malformed::Lengths));
        assert_eq!(InfoQuery::parse(&[]), Err(Malformed::Lengths));
    }

    #[test]
    fn names_are_utf8_without_nul_and_bounded() {
        assert_eq!(parse_export_name("größe".as_bytes()), Ok("größe"));
        assert_eq!(parse_export_name(b"a\0b"), Err(Malformed::Text));
        assert_eq!(parse_export_name(&[0xff]), Err(Malformed::Text));
        assert!(parse_export_name(&[b'a'; STRING_BYTES_MAX]).is_ok());
        assert_eq!(parse_export_name(&[b'a'; STRING_BYTES_MAX + 1]), Err(Malformed::Text));
    }

    #[test]
    fn meta_queries_are_told_apart() {
        let mut data = text_field(b"");
        data.extend_from_slice(&3u32.to_be_bytes());
        for query in [&b"base:"[..], b"x-other:thing", b"base:allocation"] {
            data.extend(text_field(query));
        }
        let query = MetaQuery::parse(&data).unwrap();
        assert!(query.names_base && query.names_allocation && !query.is_empty);
        data.push(0);
        assert_eq!(MetaQuery::parse(&data), Err(Malformed::Lengths));
    }

    #[test]
    fn more_meta_queries_than_we_want_are_refused_before_any_is_read() {
        let mut data = text_field(b"");
        data.extend_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(MetaQuery::parse(&data), Err(Malformed::TooMany));
    }

    #[test]
    fn a_request_header_is_taken_apart_in_the_order_of_the_protocol() {
        let bytes: [u8; 28] = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0,
        ];
        let header = RequestHeader {
            flags: NBD_CMD_FLAG_FUA,
            kind: NBD_CMD_WRITE_ZEROES,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            len: 0x200,
        };
        assert_eq!(RequestHeader::parse(&bytes), Ok(header));
    }

    proptest! {
        #[test]
        fn parsers_never_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = InfoQuery::parse(&data);
            let _ = MetaQuery::parse(&data);
            let _ = parse_export_name(&data);
            if let Some((head, _)) = data.split_first_chunk() { let _ = RequestHeader::parse(head); }
            if let Some((head, _)) = data.split_first_chunk() { let _ = OptionHeader::parse(head); }
        }

        #[test]
        fn names_survive(name in "\\PC{0,40}", wants in proptest::collection::vec(0u16..6, 0..8)) {
            prop_assume!(!name.contains('\0'));
            let mut data = text_field(name.as_bytes());
            data.extend_from_slice(&u16::try_from(wants.len()).unwrap().to_be_bytes());
            for want in &wants { data.extend_from_slice(&want.to_be_bytes()); }
            let query = InfoQuery::parse(&data).unwrap();
            prop_assert_eq!(query.export_name, name.as_str());
            prop_assert_eq!(query.wants_name, wants.contains(&NBD_INFO_NAME));
        }
    }
}
