//! The handshake: fixed newstyle, as a state machine that is fed options and says what to send.
//!
//! ```text
//!   greet --> option --> option --> ... --> Transmit        [NBD_OPT_GO, NBD_OPT_EXPORT_NAME]
//!               |  ^                    \-> StartTls --> TLS handshake --> option, with nothing remembered
//!               '--'                    \-> Close           [NBD_OPT_ABORT, a violation, too many options]
//! ```
//!
//! [`Handshake::apply`] is pure; [`greet`] and [`haggle`] move the bytes. Time is bounded by the transport.

use super::stream::Inbox;
use super::wire::*;
use crate::export::{Export, Exports};
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::disk::Geometry;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Longest option data that is looked at, in bytes. Everything we know fits, with names of greatest length.
pub const OPTION_DATA_BYTES_MAX: usize = 32 * 1024;

/// Longest option data that is skipped politely; a client that sends more is cut off.
const OPTION_SKIP_BYTES_MAX: u32 = 1024 * 1024;

/// Most options in a handshake. Real clients need under ten.
pub const OPTIONS_MAX: u32 = 256;

/// Greatest length of a read or write, in bytes: what Linux's and qemu's clients assume.
pub const REQUEST_BYTES_MAX: u32 = 32 * 1024 * 1024;

/// How it stands with TLS on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsState {
    /// We have no certificate.
    Unavailable,
    /// The client may change to it.
    Offered,
    /// The client has to change to it before anything else.
    Demanded,
    /// The client has changed to it.
    Running,
}

/// What a client and we agreed on.
#[derive(Clone, Debug)]
pub struct Terms {
    /// What it uses.
    pub export: Arc<Export>,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether it may ask what is allocated.
    pub allocation: bool,
}

/// Where the handshake goes.
#[derive(Clone, Debug)]
pub enum Next {
    /// Another option.
    Option,
    /// TLS, and then other options.
    StartTls,
    /// Transmission.
    Transmit(Terms),
    /// Nowhere; here is why.
    Close(&'static str),
}

/// Sends the greeting and learns what the client can do. `None`: it left, or wants what we did not offer.
///
/// # Errors
///
/// The transport's.
pub fn greet<R: Read>(inbox: &mut Inbox<R>, writer: &mut impl Write) -> io::Result<Option<ClientFlags>> {
    writer.write_all(&greeting())?;
    Ok(inbox.take_array()?.and_then(ClientFlags::parse))
}

/// Takes options until the handshake is over or TLS begins.
///
/// # Errors
///
/// The transport's.
pub fn haggle<R: Read>(
    handshake: &mut Handshake<'_>,
    inbox: &mut Inbox<R>,
    writer: &mut impl Write,
) -> io::Result<Next> {
    let mut out = Vec::new();
    loop {
        let Some(bytes) = inbox.take_array()? else { return Ok(Next::Close("the client left")) };
        let Ok(header) = OptionHeader::parse(&bytes) else {
            return Ok(Next::Close("wrong magic in an option"));
        };
        let next = match usize::try_from(header.len) {
            Ok(len) if len <= OPTION_DATA_BYTES_MAX => {
                inbox.need(len)?;
                let next = handshake.apply(header.option, &inbox.available()[..len], &mut out);
                inbox.consume(len);
                next
            }
            Ok(len) if header.len <= OPTION_SKIP_BYTES_MAX && header.option != NBD_OPT_EXPORT_NAME => {
                inbox.discard(len)?;
                handshake.refuse_long(header.option, &mut out)
            }
            _ => Next::Close("an option is absurdly long"),
        };
        writer.write_all(&out)?;
        out.clear();
        match next {
            Next::Option => {}
            //= NBD protocol, NBD_OPT_STARTTLS: the client waits for the reply. Whatever is here already was injected.
            Next::StartTls if !inbox.available().is_empty() => {
                return Ok(Next::Close("plaintext before TLS"));
            }
            over => return Ok(over),
        }
    }
}

/// What was agreed so far.
#[derive(Debug)]
pub struct Handshake<'a> {
    exports: &'a Exports,
    stopping: &'a AtomicBool,
    client: ClientFlags,
    tls: TlsState,
    structured: bool,
    /// The export for which `base:allocation` was chosen, as the client named it.
    allocation_of: Option<String>,
    options: u32,
}

impl<'a> Handshake<'a> {
    /// Nothing agreed yet. When `stopping` becomes true, options are refused with `NBD_REP_ERR_SHUTDOWN`.
    #[must_use]
    pub fn new(exports: &'a Exports, stopping: &'a AtomicBool, client: ClientFlags, tls: TlsState) -> Self {
        Self { exports, stopping, client, tls, structured: false, allocation_of: None, options: 0 }
    }

    /// TLS runs now.
    ///
    //= NBD protocol, NBD_OPT_STARTTLS: nothing negotiated before it may have any effect (CVE-2021-3716).
    pub fn tls_is_running(&mut self) {
        self.tls = TlsState::Running;
        self.structured = false;
        self.allocation_of = None;
    }

    /// Takes an option, appends the replies to `out`, and says where it goes from there.
    pub fn apply(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Next::Close("too many options");
        }
        if !self.client.fixed_newstyle && option != NBD_OPT_EXPORT_NAME {
            return Next::Close("an option of fixed newstyle from a client that does not speak it");
        }
        let mut reply = |kind: u32, parts: &[&[u8]]| push_option_reply(out, option, kind, parts);

        if self.tls == TlsState::Demanded && !matches!(option, NBD_OPT_STARTTLS | NBD_OPT_ABORT) {
            if option == NBD_OPT_EXPORT_NAME {
                return Next::Close("an export without TLS");
            }
            reply(NBD_REP_ERR_TLS_REQD, &[b"this server demands TLS"]);
            return Next::Option;
        }
        if self.stopping.load(Ordering::Relaxed) && option != NBD_OPT_ABORT {
            if option == NBD_OPT_EXPORT_NAME {
                return Next::Close("stopping");
            }
            reply(NBD_REP_ERR_SHUTDOWN, &[b"the server is stopping"]);
            return Next::Option;
        }

        match option {
            NBD_OPT_EXPORT_NAME => return self.export_name(data, out),
            NBD_OPT_ABORT => {
                reply(NBD_REP_ACK, &[]);
                return Next::Close("the client gave up");
            }
            NBD_OPT_STARTTLS => match self.tls {
                TlsState::Unavailable => reply(NBD_REP_ERR_UNSUP, &[b"no TLS here"]),
                TlsState::Running => reply(NBD_REP_ERR_INVALID, &[b"TLS is running already"]),
                _ if !data.is_empty() => reply(NBD_REP_ERR_INVALID, &[b"no data expected"]),
                TlsState::Offered | TlsState::Demanded => {
                    reply(NBD_REP_ACK, &[]);
                    return Next::StartTls;
                }
            },
            NBD_OPT_LIST if data.is_empty() => {
                for export in self.exports.all() {
                    let name = export.name().as_bytes();
                    reply(NBD_REP_SERVER, &[&len_field(name), name, export.description().as_bytes()]);
                }
                reply(NBD_REP_ACK, &[]);
            }
            NBD_OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(NBD_REP_ACK, &[]);
            }
            NBD_OPT_LIST | NBD_OPT_STRUCTURED_REPLY => reply(NBD_REP_ERR_INVALID, &[b"no data expected"]),
            NBD_OPT_INFO | NBD_OPT_GO => return self.info(option, data, out),
            NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT => self.meta_context(option, data, out),
            // NBD_OPT_EXTENDED_HEADERS among them: requests over 4 GiB are not worth a second request format.
            _ => reply(NBD_REP_ERR_UNSUP, &[b"unknown option"]),
        }
        Next::Option
    }

    /// Answers an option whose data was too long to be looked at.
    fn refuse_long(&mut self, option: u32, out: &mut Vec<u8>) -> Next {
        let next = self.apply(u32::MAX, &[], &mut Vec::new());
        if matches!(next, Next::Option) {
            push_option_reply(out, option, NBD_REP_ERR_TOO_BIG, &[b"option data too long"]);
        }
        next
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Next {
        let Ok(name) = parse_export_name(data) else { return Next::Close("malformed export name") };
        let Some(export) = self.exports.find(name) else { return Next::Close("no such export") };
        let terms = self.terms(export, name);
        let geometry = terms.export.disk().geometry();
        out.extend_from_slice(&geometry.size_bytes.to_be_bytes());
        out.extend_from_slice(&transmission_flags(&geometry, terms.structured).to_be_bytes());
        if !self.client.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Next::Transmit(terms)
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let mut reply = |kind: u32, parts: &[&[u8]]| push_option_reply(out, option, kind, parts);
        let Ok(query) = InfoQuery::parse(data) else {
            reply(NBD_REP_ERR_INVALID, &[b"malformed query"]);
            return Next::Option;
        };
        let Some(export) = self.exports.find(query.export_name) else {
            reply(NBD_REP_ERR_UNKNOWN, &[b"no such export"]);
            return Next::Option;
        };
        let terms = self.terms(export, query.export_name);
        let geometry = terms.export.disk().geometry();
        let flags = transmission_flags(&geometry, terms.structured);
        reply(
            NBD_REP_INFO,
            &[&NBD_INFO_EXPORT.to_be_bytes(), &geometry.size_bytes.to_be_bytes(), &flags.to_be_bytes()],
        );
        if query.wants_name {
            reply(NBD_REP_INFO, &[&NBD_INFO_NAME.to_be_bytes(), terms.export.name().as_bytes()]);
        }
        if query.wants_description && !terms.export.description().is_empty() {
            reply(
                NBD_REP_INFO,
                &[&NBD_INFO_DESCRIPTION.to_be_bytes(), terms.export.description().as_bytes()],
            );
        }
        // Also to those who did not ask: the protocol allows it, and a client that keeps to it is served faster.
        reply(
            NBD_REP_INFO,
            &[
                &NBD_INFO_BLOCK_SIZE.to_be_bytes(),
                &geometry.logical_block_bytes.to_be_bytes(),
                &geometry.preferred_block_bytes.to_be_bytes(),
                &REQUEST_BYTES_MAX.to_be_bytes(),
            ],
        );
        reply(NBD_REP_ACK, &[]);
        if option == NBD_OPT_GO { Next::Transmit(terms) } else { Next::Option }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let mut reply = |kind: u32, parts: &[&[u8]]| push_option_reply(out, option, kind, parts);
        let sets = option == NBD_OPT_SET_META_CONTEXT;
        if sets {
            //= NBD protocol, NBD_OPT_SET_META_CONTEXT: replaces what was chosen before, also if it fails.
            self.allocation_of = None;
        }
        if !self.structured {
            return reply(NBD_REP_ERR_INVALID, &[b"needs structured replies"]);
        }
        let query = match MetaQuery::parse(data) {
            Ok(query) => query,
            Err(Malformed::TooMany) => return reply(NBD_REP_ERR_TOO_BIG, &[b"too many queries"]),
            Err(_) => return reply(NBD_REP_ERR_INVALID, &[b"malformed query"]),
        };
        if self.exports.find(query.export_name).is_none() {
            return reply(NBD_REP_ERR_UNKNOWN, &[b"no such export"]);
        }
        let chosen = query.names_allocation || (!sets && (query.is_empty || query.names_base));
        if chosen {
            //= NBD protocol, NBD_OPT_LIST_META_CONTEXT: the context id in a list should be 0.
            let id = if sets { BASE_ALLOCATION_ID } else { 0 };
            reply(NBD_REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()]);
        }
        if chosen && sets {
            self.allocation_of = Some(query.export_name.to_owned());
        }
        reply(NBD_REP_ACK, &[]);
    }

    fn terms(&self, export: Arc<Export>, asked_name: &str) -> Terms {
        //= NBD protocol, Metadata querying: contexts count only for the export for which they were chosen.
        let allocation = self.allocation_of.as_deref() == Some(asked_name);
        Terms { export, structured: self.structured, allocation }
    }
}

/// What we tell clients about a disk.
#[must_use]
pub fn transmission_flags(geometry: &Geometry, structured: bool) -> u16 {
    // One disk serves all connections, so a flush on any covers all.
    let mut flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE | NBD_FLAG_SEND_FLUSH;
    flags |= NBD_FLAG_SEND_FUA;
    match geometry.access {
        Access::ReadOnly => flags |= NBD_FLAG_READ_ONLY,
        Access::ReadWrite => {
            flags |= NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
            if geometry.can_trim {
                flags |= NBD_FLAG_SEND_TRIM;
            }
        }
    }
    if structured {
        flags |= NBD_FLAG_SEND_DF;
    }
    flags
}

/// The length of a string in 32 bits.
fn len_field(text: &[u8]) -> [u8; 4] {
    u32::try_from(text.len()).expect("Exports::add bounds names").to_be_bytes()
}
