//! From a header to a request that may be tried, or the error to answer instead.

use super::negotiate::{REQUEST_BYTES_MAX, Terms};
use super::status::NbdError;
use super::wire::*;
use inlinecrypt_core::backing::{Access, Durability};
use inlinecrypt_core::disk::{CHUNK_BYTES, Disk, Zeroing};

/// Longest read that is answered in one chunk on demand, in bytes: what one large buffer holds, so that a client that
/// does not take its answer binds no more than that and a copy. The protocol asks for 64 KiB at least, and has
/// `EOVERFLOW` for more than we give.
const ONE_CHUNK_BYTES_MAX: u32 = 256 * 1024;
const _: () = assert!(ONE_CHUNK_BYTES_MAX as usize == CHUNK_BYTES);

/// Most extents in one answer. A client asks on from where it ends; 1,024 are 8 KiB.
const EXTENTS_MAX: usize = 1024;

/// A request that may be tried: known, allowed, and within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64, len: u32, one_chunk: bool },
    Flush,
    Trim { offset: u64, len: u32, durability: Durability },
    WriteZeroes { offset: u64, len: u32, durability: Durability, zeroing: Zeroing },
    Cache { offset: u64, len: u32 },
    BlockStatus { offset: u64, len: u32, extents_max: usize },
}

/// What a header asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// A request without payload.
    Plain(Request),
    /// A write, whose payload follows.
    Write(WriteRequest),
    /// The end.
    Disconnect,
}

/// A write, whose payload is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WriteRequest {
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) durability: Durability,
}

/// How many bytes of payload follow a header.
pub(super) fn payload_len(header: &RequestHeader) -> u32 {
    if header.kind == NBD_CMD_WRITE { header.len } else { 0 }
}

/// What a client may ask for.
#[derive(Debug)]
pub(super) struct Rules<'a> {
    disk: &'a dyn Disk,
    structured: bool,
    allocation: bool,
    can_trim: bool,
}

impl<'a> Rules<'a> {
    pub(super) fn new(terms: &'a Terms) -> Self {
        let disk = terms.export.disk();
        let Terms { export: _, structured, allocation } = *terms;
        Self { disk, structured, allocation, can_trim: disk.geometry().can_trim }
    }

    /// The request, or what to answer instead.
    pub(super) fn admit(&self, header: &RequestHeader) -> Result<Asked, NbdError> {
        let RequestHeader { flags, kind, cookie: _, offset, len } = *header;
        //= NBD protocol, NBD_CMD_FLAG_FUA: valid for all commands; ignored where nothing is written.
        let durability = if flags & NBD_CMD_FLAG_FUA != 0 { Durability::Durable } else { Durability::Cached };
        let known_flags = NBD_CMD_FLAG_FUA
            | match kind {
                NBD_CMD_READ if self.structured => NBD_CMD_FLAG_DF,
                NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                NBD_CMD_BLOCK_STATUS => NBD_CMD_FLAG_REQ_ONE,
                _ => 0,
            };
        if kind == NBD_CMD_DISC {
            return Ok(Asked::Disconnect);
        }
        if flags & !known_flags != 0 {
            return Err(NbdError::EINVAL);
        }
        let has = |flag: u16| flags & flag != 0;
        match kind {
            NBD_CMD_READ => {
                self.check(offset, len, Access::ReadOnly)?;
                let one_chunk = has(NBD_CMD_FLAG_DF);
                if len > REQUEST_BYTES_MAX {
                    return Err(NbdError::EINVAL);
                }
                if one_chunk && len > ONE_CHUNK_BYTES_MAX {
                    return Err(NbdError::EOVERFLOW);
                }
                Ok(Asked::Plain(Request::Read { offset, len, one_chunk }))
            }
            NBD_CMD_WRITE => {
                self.check(offset, len, Access::ReadWrite)?;
                if len > REQUEST_BYTES_MAX {
                    return Err(NbdError::EINVAL);
                }
                Ok(Asked::Write(WriteRequest { offset, len, durability }))
            }
            //= NBD protocol, NBD_CMD_FLUSH: length and offset must be zero.
            NBD_CMD_FLUSH if offset == 0 && len == 0 => Ok(Asked::Plain(Request::Flush)),
            NBD_CMD_TRIM if self.can_trim => {
                // Past the end of the disk is a mistake here; no storage was asked for, so none can be lacking.
                self.check(offset, len, Access::ReadWrite).map_err(|error| match error {
                    NbdError::ENOSPC => NbdError::EINVAL,
                    other => other,
                })?;
                Ok(Asked::Plain(Request::Trim { offset, len, durability }))
            }
            NBD_CMD_WRITE_ZEROES => {
                self.check(offset, len, Access::ReadWrite)?;
                // NO_HOLE asks for what we do anyway: zeroes are stored as ciphertext.
                let zeroing =
                    if has(NBD_CMD_FLAG_FAST_ZERO) { Zeroing::OnlyIfFast } else { Zeroing::AnySpeed };
                Ok(Asked::Plain(Request::WriteZeroes { offset, len, durability, zeroing }))
            }
            NBD_CMD_CACHE => {
                self.check(offset, len, Access::ReadOnly)?;
                Ok(Asked::Plain(Request::Cache { offset, len }))
            }
            NBD_CMD_BLOCK_STATUS if self.allocation => {
                self.check(offset, len, Access::ReadOnly)?;
                let extents_max = if has(NBD_CMD_FLAG_REQ_ONE) { 1 } else { EXTENTS_MAX };
                Ok(Asked::Plain(Request::BlockStatus { offset, len, extents_max }))
            }
            _ => Err(NbdError::EINVAL),
        }
    }

    fn check(&self, offset: u64, len: u32, access: Access) -> Result<(), NbdError> {
        if len == 0 {
            return Err(NbdError::EINVAL);
        }
        if offset.checked_add(u64::from(len)).is_none() {
            return Err(match access {
                Access::ReadOnly => NbdError::EINVAL,
                Access::ReadWrite => NbdError::ENOSPC,
            });
        }
        self.disk.check(offset, u64::from(len), access).map_err(|error| NbdError::from(&error))
    }
}
