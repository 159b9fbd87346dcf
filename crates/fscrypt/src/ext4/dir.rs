//! Directories: block after block, with the names as they lie there. The index, if there is one, looks like unused entries.

use super::inode::{FileKind, Inode};
use super::{Ext4, Ext4Error, Source, crc, le16, le32};

/// Bytes of an entry before its name.
const HEAD_BYTES: usize = 8;
/// The unused entry at a block's end that has the checksum.
const TAIL_BYTES: usize = 12;
const TAIL_KIND: u8 = 0xde;

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The inode's number.
    pub inode: u32,
    /// The name as it lies there: encrypted, if the directory is.
    pub name: Vec<u8>,
    /// What the entry says that the inode is, in ext4's numbers; 0 if it does not say.
    pub file_type: u8,
    /// The hash that readers without a key are shown, as a part of the name.
    pub hash: [u32; 2],
}

impl DirEntry {
    /// Whether it is `.` or `..`, which are never encrypted.
    #[must_use]
    pub fn is_dots(&self) -> bool {
        self.name == b"." || self.name == b".."
    }

    /// Whether what the entry says agrees with the inode.
    #[must_use]
    pub fn agrees_with(&self, kind: FileKind) -> bool {
        match self.file_type {
            0 => true,
            1 => kind == FileKind::Regular,
            2 => kind == FileKind::Directory,
            7 => kind == FileKind::Link,
            3..=6 => kind == FileKind::Special,
            _ => false,
        }
    }
}

pub(super) fn entries<S: Source>(fs: &Ext4<S>, inode: &Inode) -> Result<Vec<DirEntry>, Ext4Error> {
    let superblock = fs.superblock();
    let block_bytes = superblock.block_bytes as usize;
    if inode.kind != FileKind::Directory {
        return Err(Ext4Error::damaged("it is none"));
    }
    let blocks = inode.size / u64::from(superblock.block_bytes);
    if !inode.size.is_multiple_of(superblock.block_bytes.into()) || blocks == 0 || blocks > superblock.blocks
    {
        return Err(Ext4Error::damaged(format_args!("its size is {} bytes", inode.size)));
    }
    // Linux shows hashes of entries where it reads in the order of the index, which is where there could be one.
    let hashed = superblock.has_dir_index && (inode.is_indexed || blocks == 1);
    let mut entries = Vec::new();
    let mut next = 0;
    for run in fs.runs(inode)? {
        if run.is_unwritten || run.logical != next {
            return Err(Ext4Error::damaged(format_args!("block {next} of it is missing")));
        }
        let end = (run.logical + run.blocks).min(blocks);
        for logical in run.logical..end {
            let block = fs.block(run.physical + (logical - run.logical))?;
            let within = |error: Ext4Error| error.within(format_args!("block {logical}"));
            if superblock.has_checksums {
                check(inode, &block, logical).map_err(within)?;
            }
            parse(&block, block_bytes, |at, entry| {
                let hash = match () {
                    () if !hashed || entry.is_dots() => [0, 0],
                    () if inode.is_casefolded && inode.is_encrypted => stored_hash(&block, at, &entry.name)?,
                    () => superblock.hash_name(&entry.name),
                };
                entries.push(DirEntry { hash, ..entry });
                Ok(())
            })
            .map_err(within)?;
        }
        next = end;
    }
    if next < blocks {
        return Err(Ext4Error::damaged(format_args!("block {next} of it is missing")));
    }
    Ok(entries)
}

fn parse(
    block: &[u8],
    block_bytes: usize,
    mut visit: impl FnMut(usize, DirEntry) -> Result<(), Ext4Error>,
) -> Result<(), Ext4Error> {
    let mut at = 0;
    while at < block_bytes {
        let wrong = || Ext4Error::damaged(format_args!("the entry at byte {at} cannot be"));
        let head = block.get(at..at + HEAD_BYTES).ok_or_else(wrong)?;
        let (inode, length) = (le32(head, 0).unwrap_or_default(), record_bytes(head, block_bytes));
        let (name_len, file_type) = (usize::from(head[6]), head[7]);
        if length < HEAD_BYTES || !length.is_multiple_of(4) || length > block_bytes - at {
            return Err(wrong());
        }
        if inode != 0 {
            let name = block.get(at + HEAD_BYTES..at + HEAD_BYTES + name_len).ok_or_else(wrong)?;
            if name_len == 0 || HEAD_BYTES + name_len > length {
                return Err(wrong());
            }
            visit(at, DirEntry { inode, name: name.to_vec(), file_type, hash: [0, 0] })?;
        }
        at += length;
    }
    Ok(())
}

/// Length of an entry with what is unused behind it. Two values stand for a whole block of 64 KiB.
fn record_bytes(head: &[u8], block_bytes: usize) -> usize {
    match le16(head, 4).map(usize::from) {
        Some(0 | 0xffff) if block_bytes == 1 << 16 => block_bytes,
        Some(length) => length,
        None => 0,
    }
}

/// The hash that lies behind an encrypted name where case makes no difference: it cannot be computed without the key.
fn stored_hash(block: &[u8], at: usize, name: &[u8]) -> Result<[u32; 2], Ext4Error> {
    let at = at + (HEAD_BYTES + name.len()).next_multiple_of(4);
    match (le32(block, at), le32(block, at + 4)) {
        (Some(major), Some(minor)) => Ok([major, minor]),
        _ => Err(Ext4Error::damaged("an entry without its hash")),
    }
}

/// Compares a block with its checksum, which is at the end of entries, or of the index.
fn check(inode: &Inode, block: &[u8], logical: u64) -> Result<(), Ext4Error> {
    let (covered, tail) = block.split_at(block.len() - TAIL_BYTES);
    let is_tail =
        le32(tail, 0) == Some(0) && le16(tail, 4) == Some(12) && tail[6] == 0 && tail[7] == TAIL_KIND;
    let good = match index_entries_at(inode, block, logical) {
        Some(at) => is_index_good(inode, block, at),
        None => is_tail && le32(tail, 8) == Some(crc(inode.checksum_seed, covered)),
    };
    if good { Ok(()) } else { Err(Ext4Error::damaged("it does not have its checksum")) }
}

/// Where the entries of the index are in a block of it.
fn index_entries_at(inode: &Inode, block: &[u8], logical: u64) -> Option<usize> {
    if !inode.is_indexed {
        return None;
    }
    if logical == 0 {
        return Some(0x20);
    }
    let is_node = le32(block, 0) == Some(0) && record_bytes(block, block.len()) == block.len();
    is_node.then_some(8)
}

fn is_index_good(inode: &Inode, block: &[u8], at: usize) -> bool {
    let (Some(limit), Some(count)) = (le16(block, at), le16(block, at + 2)) else { return false };
    let tail = at + usize::from(limit) * 8;
    let (Some(covered), Some(reserved)) =
        (block.get(..at + usize::from(count) * 8), block.get(tail..tail + 4))
    else {
        return false;
    };
    let sum = crc(crc(crc(inode.checksum_seed, covered), reserved), &[0; 4]);
    count <= limit && le32(block, tail + 4) == Some(sum)
}
