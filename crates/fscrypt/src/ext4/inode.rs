//! Inodes, and the one attribute of them that holds the encryption context.

use super::{Ext4, Ext4Error, Source, crc, le16, le32};

const FLAG_ENCRYPT: u32 = 0x800;
const FLAG_INDEX: u32 = 0x1000;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_VERITY: u32 = 0x10_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;
const FLAG_CASEFOLD: u32 = 0x4000_0000;

const XATTR_MAGIC: u32 = 0xea02_0000;
/// `EXT4_XATTR_INDEX_ENCRYPTION` and its only name.
const XATTR_ENCRYPTION: (u8, &[u8]) = (9, b"c");
/// More is no context, of any version.
const CONTEXT_VALUE_BYTES_MAX: u32 = 1024;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, fifo or socket: never encrypted.
    Special,
}

/// An inode, as far as we need it.
#[derive(Clone, Debug)]
pub struct Inode {
    /// Its number.
    pub number: u32,
    /// What it is.
    pub kind: FileKind,
    /// Its length, in bytes.
    pub size: u64,
    /// Its flag says that it is encrypted.
    pub is_encrypted: bool,
    /// It has a tree of hashes (fs-verity) behind its end.
    pub has_verity: bool,
    /// A directory where case makes no difference.
    pub is_casefolded: bool,
    /// The value of the attribute that holds the encryption context, as it is.
    pub context: Option<Vec<u8>>,
    pub(super) has_extents: bool,
    pub(super) has_inline_data: bool,
    pub(super) is_indexed: bool,
    pub(super) block_map: [u8; 60],
    /// What checksums of this inode's blocks begin with.
    pub(super) checksum_seed: u32,
}

pub(super) fn read<S: Source>(fs: &Ext4<S>, number: u32) -> Result<Inode, Ext4Error> {
    let superblock = fs.superblock();
    let mut raw = vec![0; superblock.inode_bytes.into()];
    fs.read(superblock.inode_offset(fs, number)?, &mut raw)?;
    let short = |at: usize| le16(&raw, at).unwrap_or_default();
    let long = |at: usize| le32(&raw, at).unwrap_or_default();
    let (mode, flags) = (short(0), long(0x20));
    let extra = if raw.len() > 128 { usize::from(short(0x80)) } else { 0 };
    if extra > raw.len() - 128 || !extra.is_multiple_of(4) {
        return Err(Ext4Error::damaged(format_args!("its extra size is {extra}")));
    }
    let own = crc(superblock.checksum_seed, &number.to_le_bytes());
    let checksum_seed = crc(own, &raw[0x64..0x68]);
    if superblock.has_checksums {
        check_checksum(&raw, extra, checksum_seed)?;
    }
    let kind = match mode & 0xf000 {
        0x8000 => FileKind::Regular,
        0x4000 => FileKind::Directory,
        0xa000 => FileKind::Link,
        0x1000 | 0x2000 | 0x6000 | 0xc000 => FileKind::Special,
        _ => return Err(Ext4Error::damaged(format_args!("it is not in use, or of no kind: mode {mode:#o}"))),
    };
    let mut block_map = [0; 60];
    block_map.copy_from_slice(&raw[0x28..0x64]);
    let in_inode = raw.get(128 + extra..).unwrap_or_default();
    let mut context = match le32(in_inode, 0) {
        Some(XATTR_MAGIC) => find_context(&in_inode[4..], &in_inode[4..])?,
        _ => None,
    };
    let attributes = u64::from(short(0x76)) << 32 | u64::from(long(0x68));
    if context.is_none() && attributes != 0 {
        context = context_in_block(fs, attributes)?;
    }
    Ok(Inode {
        number,
        kind,
        size: u64::from(long(0x6c)) << 32 | u64::from(long(0x04)),
        is_encrypted: flags & FLAG_ENCRYPT != 0,
        has_verity: flags & FLAG_VERITY != 0,
        is_casefolded: flags & FLAG_CASEFOLD != 0,
        context,
        has_extents: flags & FLAG_EXTENTS != 0,
        has_inline_data: flags & FLAG_INLINE_DATA != 0,
        is_indexed: flags & FLAG_INDEX != 0,
        block_map,
        checksum_seed,
    })
}

/// The inode's own checksum: 16 bits where all have room, and 16 more in large ones.
fn check_checksum(raw: &[u8], extra: usize, seed: u32) -> Result<(), Ext4Error> {
    const LOW: usize = 0x7c;
    const HIGH: usize = 0x82;
    let mut blank = raw.to_vec();
    blank[LOW..LOW + 2].fill(0);
    let has_high = extra >= 4;
    if has_high {
        blank[HIGH..HIGH + 2].fill(0);
    }
    let sum = crc(seed, &blank);
    let low = u32::from(le16(raw, LOW).unwrap_or_default());
    let high = u32::from(le16(raw, HIGH).unwrap_or_default());
    let good = if has_high { sum == high << 16 | low } else { sum & 0xffff == low };
    if good { Ok(()) } else { Err(Ext4Error::damaged("it does not have its checksum")) }
}

fn context_in_block<S: Source>(fs: &Ext4<S>, number: u64) -> Result<Option<Vec<u8>>, Ext4Error> {
    let block = fs.block(number).map_err(|error| error.within("its attributes"))?;
    if le32(&block, 0) != Some(XATTR_MAGIC) {
        return Err(Ext4Error::damaged("the block of its attributes is none"));
    }
    if fs.superblock().has_checksums {
        let seed = crc(fs.superblock().checksum_seed, &number.to_le_bytes());
        let sum = crc(crc(crc(seed, &block[..16]), &[0; 4]), &block[20..]);
        if le32(&block, 16) != Some(sum) {
            return Err(Ext4Error::damaged("the block of its attributes does not have its checksum"));
        }
    }
    find_context(&block[32..], &block)
}

/// Looks through attributes. `values` is what the places of values count from.
fn find_context(mut entries: &[u8], values: &[u8]) -> Result<Option<Vec<u8>>, Ext4Error> {
    let cut = || Ext4Error::damaged("its attributes do not fit where they are");
    loop {
        // Four zero bytes end the list, and so does the end of their place.
        if le32(entries, 0).is_none_or(|start| start == 0) {
            return Ok(None);
        }
        let (Some(&[name_len, index]), Some(at), Some(inode), Some(len)) =
            (entries.first_chunk(), le16(entries, 2), le32(entries, 4), le32(entries, 8))
        else {
            return Err(cut());
        };
        let name = entries.get(16..16 + usize::from(name_len)).ok_or_else(cut)?;
        if (index, name) == XATTR_ENCRYPTION {
            if inode != 0 {
                return Err(Ext4Error::damaged("its encryption context is in another inode"));
            }
            if len > CONTEXT_VALUE_BYTES_MAX {
                return Err(Ext4Error::damaged(format_args!("its encryption context has {len} bytes")));
            }
            let value = values.get(usize::from(at)..).and_then(|from| from.get(..len as usize));
            return Ok(Some(value.ok_or_else(cut)?.to_vec()));
        }
        entries = entries.get((16 + usize::from(name_len)).next_multiple_of(4)..).ok_or_else(cut)?;
    }
}
