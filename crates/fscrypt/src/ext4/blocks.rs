//! Which blocks a file has: extents, or the older map of blocks.

use super::inode::{FileKind, Inode};
use super::{Ext4, Ext4Error, Source, crc, le16, le32};

const EXTENT_MAGIC: u16 = 0xf30a;
const DEPTH_MAX: u16 = 5;
/// Longer ones are reserved, not written: their length is above this number.
const WRITTEN_BLOCKS_MAX: u16 = 1 << 15;
/// Blocks that the map in an inode names itself.
const DIRECT: usize = 12;

/// Blocks of a file that lie one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one's number in the file.
    pub logical: u64,
    /// The first one's number on the filesystem.
    pub physical: u64,
    /// How many.
    pub blocks: u64,
    /// Reserved only: reads as zeroes, whatever lies there.
    pub is_unwritten: bool,
}

pub(super) fn runs<S: Source>(fs: &Ext4<S>, inode: &Inode) -> Result<Vec<Run>, Ext4Error> {
    if inode.has_inline_data {
        return Err(Ext4Error::Unsupported("data in the inode (inline_data)".to_owned()));
    }
    if is_fast_link(inode) || inode.kind == FileKind::Special {
        return Ok(Vec::new());
    }
    // More blocks of a map than the filesystem has are read only if some name each other.
    let budget = fs.superblock().blocks;
    let mut walk = Walk { fs, inode, runs: Vec::new(), next: 0, budget, mapped: 0 };
    if inode.has_extents {
        walk.extents(&inode.block_map, None, u64::MAX)?;
    } else {
        walk.map()?;
    }
    Ok(walk.runs)
}

/// A link whose target is in its inode.
fn is_fast_link(inode: &Inode) -> bool {
    inode.kind == FileKind::Link && !inode.has_extents && inode.size < inode.block_map.len() as u64
}

pub(super) fn link_data<S: Source>(fs: &Ext4<S>, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
    let block_bytes = fs.superblock().block_bytes;
    let len = usize::try_from(inode.size).ok().filter(|&len| len <= block_bytes as usize);
    let len = len.ok_or_else(|| Ext4Error::damaged(format_args!("the link has {} bytes", inode.size)))?;
    if is_fast_link(inode) {
        return Ok(inode.block_map[..len].to_vec());
    }
    match *runs(fs, inode)? {
        [Run { logical: 0, physical, is_unwritten: false, .. }] => {
            let mut data = fs.block(physical)?;
            data.truncate(len);
            Ok(data)
        }
        _ => Err(Ext4Error::damaged("the link has not one block")),
    }
}

struct Walk<'a, S> {
    fs: &'a Ext4<S>,
    inode: &'a Inode,
    runs: Vec<Run>,
    /// Where the next block of the file may be at the earliest.
    next: u64,
    budget: u64,
    mapped: u64,
}

impl<S: Source> Walk<'_, S> {
    fn node(&mut self, block: u64) -> Result<Vec<u8>, Ext4Error> {
        self.budget = self.budget.checked_sub(1).ok_or_else(|| Ext4Error::damaged("its map has no end"))?;
        self.fs.block(block)
    }

    fn push(&mut self, run: Run) -> Result<(), Ext4Error> {
        if run.logical < self.next {
            return Err(Ext4Error::damaged(format_args!(
                "block {} of the file is mapped twice",
                run.logical
            )));
        }
        self.fs.superblock().check_blocks(run.physical, run.blocks)?;
        self.next = run.logical + run.blocks;
        self.mapped += run.blocks;
        if self.mapped > self.fs.superblock().blocks {
            return Err(Ext4Error::damaged("it has more blocks than the filesystem"));
        }
        match self.runs.last_mut() {
            Some(last)
                if last.logical + last.blocks == run.logical
                    && last.physical + last.blocks == run.physical
                    && last.is_unwritten == run.is_unwritten =>
            {
                last.blocks += run.blocks;
            }
            _ => self.runs.push(run),
        }
        Ok(())
    }

    /// A node of the tree of extents: `depth` is what its parent says, and its blocks of the file end before `end`.
    fn extents(&mut self, node: &[u8], depth: Option<u16>, end: u64) -> Result<(), Ext4Error> {
        let header = (le16(node, 0), le16(node, 2), le16(node, 4), le16(node, 6));
        let (Some(EXTENT_MAGIC), Some(entries), Some(max), Some(own_depth)) = header else {
            return Err(Ext4Error::damaged("a node of its extents is none"));
        };
        let fits = entries <= max && usize::from(max) < node.len() / 12;
        if !fits || own_depth > DEPTH_MAX || depth.is_some_and(|depth| depth != own_depth) {
            return Err(Ext4Error::damaged(format_args!(
                "a node of its extents has {entries} of {max} entries and depth {own_depth}"
            )));
        }
        if depth.is_some() && self.fs.superblock().has_checksums {
            let at = 12 + 12 * usize::from(max);
            let sum = node.get(..at).map(|covered| crc(self.inode.checksum_seed, covered));
            if sum.is_none() || le32(node, at) != sum {
                return Err(Ext4Error::damaged("a node of its extents does not have its checksum"));
            }
        }
        let entries: Vec<&[u8]> = node[12..].chunks_exact(12).take(entries.into()).collect();
        for (index, entry) in entries.iter().enumerate() {
            let long = |at: usize| le32(entry, at).unwrap_or_default();
            let short = |at: usize| u64::from(le16(entry, at).unwrap_or_default());
            let logical = u64::from(long(0));
            if logical >= end {
                return Err(Ext4Error::damaged(format_args!(
                    "block {logical} of the file is not where its index says"
                )));
            }
            if own_depth > 0 {
                let next = entries.get(index + 1).and_then(|entry| le32(entry, 0));
                let end = next.map_or(end, |next| end.min(next.into()));
                if logical < self.next {
                    return Err(Ext4Error::damaged("the nodes of its extents are not in order"));
                }
                let child = self.node(short(8) << 32 | u64::from(long(4)))?;
                self.extents(&child, Some(own_depth - 1), end)?;
                continue;
            }
            let len = le16(entry, 4).unwrap_or_default();
            let is_unwritten = len > WRITTEN_BLOCKS_MAX;
            let blocks = u64::from(if is_unwritten { len - WRITTEN_BLOCKS_MAX } else { len });
            if blocks == 0 || logical + blocks > end {
                return Err(Ext4Error::damaged(format_args!(
                    "an extent of {blocks} blocks at block {logical}"
                )));
            }
            let physical = short(6) << 32 | u64::from(long(8));
            self.push(Run { logical, physical, blocks, is_unwritten })?;
        }
        Ok(())
    }

    /// The map of ext2 and ext3: twelve blocks, and three trees of blocks of numbers.
    fn map(&mut self) -> Result<(), Ext4Error> {
        let per_block = u64::from(self.fs.superblock().block_bytes / 4);
        let numbers: Vec<u32> =
            self.inode.block_map.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let (direct, indirect) = numbers.split_at(DIRECT);
        let mut logical = 0;
        for &block in direct {
            self.mapped(block, logical, 0, per_block)?;
            logical += 1;
        }
        for (level, &block) in (1..).zip(indirect) {
            self.mapped(block, logical, level, per_block)?;
            logical += per_block.pow(level);
        }
        Ok(())
    }

    fn mapped(&mut self, block: u32, logical: u64, level: u32, per_block: u64) -> Result<(), Ext4Error> {
        if block == 0 {
            return Ok(());
        }
        if level == 0 {
            return self.push(Run { logical, physical: block.into(), blocks: 1, is_unwritten: false });
        }
        let node = self.node(block.into())?;
        let below = per_block.pow(level - 1);
        for (index, bytes) in (0..).zip(node.as_chunks().0) {
            self.mapped(u32::from_le_bytes(*bytes), logical + index * below, level - 1, per_block)?;
        }
        Ok(())
    }
}
