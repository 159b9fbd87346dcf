//! The superblock, and where things of a block group are.

use super::{Ext4, Ext4Error, Source, crc, le16, le32};

pub(super) const OFFSET: u64 = 1024;
pub(super) const BYTES: usize = 1024;

const MAGIC: u16 = 0xef53;

const COMPAT_DIR_INDEX: u32 = 0x20;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const COMPAT_STABLE_INODES: u32 = 0x800;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const INCOMPAT_ENCRYPT: u32 = 0x1_0000;

/// Features that change what we read, and that we know: those above, file types in entries, extents, MMP, FLEX_BG, values of
/// attributes in inodes of their own, large directories, inline data, casefolding.
const INCOMPAT_KNOWN: u32 = 0x2
    | INCOMPAT_RECOVER
    | INCOMPAT_META_BG
    | 0x40
    | INCOMPAT_64BIT
    | 0x100
    | 0x200
    | 0x400
    | INCOMPAT_CSUM_SEED
    | 0x4000
    | 0x8000
    | INCOMPAT_ENCRYPT
    | 0x2_0000;

const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;

const STATE_CLEAN: u16 = 0x1;
const STATE_ERRORS: u16 = 0x2;

const FLAG_UNSIGNED_HASH: u32 = 0x2;

/// What the superblock says.
#[derive(Clone, Debug)]
pub struct Superblock {
    /// Block size in bytes: a power of two from 1024 to 65536.
    pub block_bytes: u32,
    /// Blocks of the filesystem.
    pub blocks: u64,
    /// Inodes of the filesystem; their numbers start at 1.
    pub inodes: u32,
    /// The filesystem's UUID, from which keys may be derived.
    pub uuid: [u8; 16],
    /// The feature `encrypt` is on.
    pub has_encrypt: bool,
    /// The feature `stable_inodes` is on: numbers of inodes never change, which some policies need.
    pub has_stable_inodes: bool,
    /// Linux has found errors on it, and nobody has repaired them.
    pub has_errors: bool,
    pub(super) first_data_block: u32,
    pub(super) has_checksums: bool,
    pub(super) checksum_seed: u32,
    pub(super) inode_bytes: u16,
    pub(super) has_dir_index: bool,
    pub(super) hash_seed: [u32; 4],
    pub(super) hash_version: u8,
    pub(super) hash_unsigned: bool,
    blocks_per_group: u32,
    inodes_per_group: u32,
    descriptor_bytes: u16,
    /// The first group of descriptors that lie in the groups themselves.
    first_meta_group: u32,
    backup_groups: Backups,
}

/// Which groups begin with a copy of the superblock.
#[derive(Clone, Debug)]
enum Backups {
    All,
    Sparse,
    Two([u32; 2]),
}

impl Superblock {
    pub(super) fn parse(bytes: &[u8; BYTES]) -> Result<Self, Ext4Error> {
        let short = |at: usize| le16(bytes, at).unwrap_or_default();
        let long = |at: usize| le32(bytes, at).unwrap_or_default();
        if short(0x38) != MAGIC {
            return Err(Ext4Error::NotExt4);
        }
        let (compat, incompat, ro_compat) = (long(0x5c), long(0x60), long(0x64));
        let has_checksums = ro_compat & RO_COMPAT_METADATA_CSUM != 0;
        if has_checksums && crc(!0, &bytes[..0x3fc]) != long(0x3fc) {
            return Err(Ext4Error::damaged("the superblock does not have its checksum"));
        }
        let unknown = incompat & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Ext4Error::Unsupported(format!("incompat {unknown:#x}")));
        }
        // Without a journal, the state says that it is mounted.
        if incompat & INCOMPAT_RECOVER != 0 || short(0x3a) & STATE_CLEAN == 0 {
            return Err(Ext4Error::NeedsRecovery);
        }
        let wrong = |what: &str, value: u64| {
            Err(Ext4Error::damaged(format_args!("the superblock has {what} {value}")))
        };
        let log_block = long(0x18);
        if log_block > 6 {
            return wrong("the block size 2 to the power of 10 +", log_block.into());
        }
        let block_bytes = 1024 << log_block;
        let dynamic = long(0x4c) >= 1;
        let inode_bytes = if dynamic { short(0x58) } else { 128 };
        if inode_bytes < 128 || u32::from(inode_bytes) > block_bytes || !inode_bytes.is_power_of_two() {
            return wrong("the inode size", inode_bytes.into());
        }
        let has_64bit = incompat & INCOMPAT_64BIT != 0;
        let descriptor_bytes = if has_64bit { short(0xfe) } else { 32 };
        if !(32..=1024).contains(&descriptor_bytes) || !descriptor_bytes.is_power_of_two() {
            return wrong("the descriptor size", descriptor_bytes.into());
        }
        let blocks_high = if has_64bit { long(0x150) } else { 0 };
        let (blocks_per_group, inodes_per_group) = (long(0x20), long(0x28));
        if blocks_per_group == 0 || u64::from(blocks_per_group) > 65_528 * 16 {
            return wrong("blocks per group:", blocks_per_group.into());
        }
        if inodes_per_group == 0 || inodes_per_group > block_bytes * 8 {
            return wrong("inodes per group:", inodes_per_group.into());
        }
        let first_data_block = long(0x14);
        let blocks = u64::from(blocks_high) << 32 | u64::from(long(0x04));
        if first_data_block > 1 || blocks <= u64::from(first_data_block) || blocks > 1 << 48 {
            return wrong("a number of blocks that cannot be:", blocks);
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[0x68..0x78]);
        Ok(Self {
            block_bytes,
            blocks,
            inodes: long(0),
            uuid,
            has_encrypt: incompat & INCOMPAT_ENCRYPT != 0,
            has_stable_inodes: compat & COMPAT_STABLE_INODES != 0,
            has_errors: short(0x3a) & STATE_ERRORS != 0,
            first_data_block,
            has_checksums,
            checksum_seed: if incompat & INCOMPAT_CSUM_SEED != 0 { long(0x270) } else { crc(!0, &uuid) },
            inode_bytes,
            has_dir_index: compat & COMPAT_DIR_INDEX != 0,
            hash_seed: [long(0xec), long(0xf0), long(0xf4), long(0xf8)],
            hash_version: bytes[0xfc],
            hash_unsigned: long(0x160) & FLAG_UNSIGNED_HASH != 0,
            blocks_per_group,
            inodes_per_group,
            descriptor_bytes,
            first_meta_group: if incompat & INCOMPAT_META_BG != 0 { long(0x104) } else { u32::MAX },
            backup_groups: if compat & COMPAT_SPARSE_SUPER2 != 0 {
                Backups::Two([long(0x24c), long(0x250)])
            } else if ro_compat & RO_COMPAT_SPARSE_SUPER != 0 {
                Backups::Sparse
            } else {
                Backups::All
            },
        })
    }

    /// Whether `count` blocks from `block` on lie on the filesystem.
    pub(super) fn check_blocks(&self, block: u64, count: u64) -> Result<(), Ext4Error> {
        let end = block.checked_add(count);
        if end.is_some_and(|end| end <= self.blocks) {
            return Ok(());
        }
        Err(Ext4Error::damaged(format_args!(
            "block {block} and the {count} from it on are not on the filesystem, which has {}",
            self.blocks
        )))
    }

    /// The byte where an inode lies.
    pub(super) fn inode_offset<S: Source>(&self, fs: &Ext4<S>, number: u32) -> Result<u64, Ext4Error> {
        let index = number.checked_sub(1).filter(|_| number <= self.inodes);
        let index = index.ok_or_else(|| {
            Ext4Error::damaged(format_args!("there is no such inode, the filesystem has {}", self.inodes))
        })?;
        let group = index / self.inodes_per_group;
        let table = self.inode_table(fs, group)?;
        let offset = u64::from(index % self.inodes_per_group) * u64::from(self.inode_bytes);
        self.check_blocks(table, offset / u64::from(self.block_bytes) + 1)?;
        Ok(table * u64::from(self.block_bytes) + offset)
    }

    /// The block where a group's inodes start.
    fn inode_table<S: Source>(&self, fs: &Ext4<S>, group: u32) -> Result<u64, Ext4Error> {
        let size = u32::from(self.descriptor_bytes);
        let per_block = self.block_bytes / size;
        let (meta_group, within) = (group / per_block, u64::from(group % per_block * size));
        let block = if meta_group < self.first_meta_group {
            u64::from(self.first_data_block) + 1 + u64::from(meta_group)
        } else {
            let first = meta_group * per_block;
            u64::from(self.first_data_block)
                + u64::from(first) * u64::from(self.blocks_per_group)
                + u64::from(self.begins_with_a_copy(first))
        };
        self.check_blocks(block, 1)?;
        let mut bytes = vec![0; size as usize];
        fs.read(block * u64::from(self.block_bytes) + within, &mut bytes)?;
        if self.has_checksums {
            let seed = crc(self.checksum_seed, &group.to_le_bytes());
            let sum = crc(crc(crc(seed, &bytes[..0x1e]), &[0; 2]), &bytes[0x20..]);
            if le16(&bytes, 0x1e).map(u32::from) != Some(sum & 0xffff) {
                return Err(Ext4Error::damaged(format_args!(
                    "the descriptor of group {group} does not have its checksum"
                )));
            }
        }
        let high = if size >= 64 { le32(&bytes, 0x28).unwrap_or_default() } else { 0 };
        Ok(u64::from(high) << 32 | u64::from(le32(&bytes, 8).unwrap_or_default()))
    }

    fn begins_with_a_copy(&self, group: u32) -> bool {
        let power_of = |base: u32| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        match self.backup_groups {
            Backups::All => true,
            Backups::Sparse => group <= 1 || [3, 5, 7].into_iter().any(power_of),
            Backups::Two(groups) => group == 0 || groups.contains(&group),
        }
    }
}
