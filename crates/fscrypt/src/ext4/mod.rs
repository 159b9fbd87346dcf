//! A careful reader of ext4, for images and devices that nobody has mounted: just what fscrypt needs of it.
//!
//! ```text
//!   superblock -> group descriptors -> inode -> extents or block map -> runs of blocks
//!                                        |-> attribute "c" (the encryption context)
//!                                        `-> directory blocks -> entries with their bytes
//! ```
//!
//! - Nothing is written, and nothing of an image is believed: each number is checked before it is used, each loop is bounded by
//!   what an image of that size can hold.
//! - Where the filesystem has checksums (`metadata_csum`), all that is read is compared with its own.
//! - A journal that has to be replayed is refused: what lies on the disk is not what the filesystem is.
//!
//! Why not a crate: those that read ext4 refuse encrypted directories and show neither raw extents nor this attribute; `ext4-view`
//! is the oracle of our tests for all that is not encrypted.
//!
//! Source: Linux `Documentation/filesystems/ext4/` and `fs/ext4/ext4.h` for the layout.

mod blocks;
mod dir;
mod hash;
mod inode;
mod superblock;

pub use blocks::Run;
pub use dir::DirEntry;
pub use inode::{FileKind, Inode};
pub use superblock::Superblock;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Where an image is read from.
pub trait Source: fmt::Debug {
    /// Reads exactly `buffer`, from `offset` bytes on.
    ///
    /// # Errors
    ///
    /// The system's, or `UnexpectedEof` past the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Source for File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// An image in memory.
impl Source for Vec<u8> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let from = start.and_then(|start| self.get(start..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Why an image cannot be read.
#[derive(Debug)]
pub enum Ext4Error {
    /// The file or device below.
    Io(io::Error),
    /// It is something else.
    NotExt4,
    /// It has features that we do not know, by name or number.
    Unsupported(String),
    /// The journal has to be replayed first.
    NeedsRecovery,
    /// Something in it cannot be: says what, and where.
    Damaged(String),
}

impl Ext4Error {
    fn damaged(what: impl fmt::Display) -> Self {
        Self::Damaged(what.to_string())
    }

    /// The same, saying first where it was met.
    fn within(self, place: impl fmt::Display) -> Self {
        match self {
            Self::Damaged(what) => Self::Damaged(format!("{place}: {what}")),
            Self::Unsupported(what) => Self::Unsupported(format!("{place}: {what}")),
            other => other,
        }
    }
}

impl fmt::Display for Ext4Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => f.write_str("cannot be read"),
            Self::NotExt4 => f.write_str("has no ext4 superblock"),
            Self::Unsupported(what) => write!(f, "has features that are not supported here: {what}"),
            Self::NeedsRecovery => {
                f.write_str("was not unmounted: its journal may have to be replayed first")
            }
            Self::Damaged(what) => write!(f, "is damaged: {what}"),
        }
    }
}

impl std::error::Error for Ext4Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}

/// A filesystem on an image.
#[derive(Debug)]
pub struct Ext4<S> {
    source: S,
    superblock: Superblock,
}

/// The root directory's inode.
pub const ROOT_INODE: u32 = 2;

impl<S: Source> Ext4<S> {
    /// Reads the superblock.
    ///
    /// # Errors
    ///
    /// If it is no ext4, or one with features that we do not know, or not cleanly unmounted.
    pub fn open(source: S) -> Result<Self, Ext4Error> {
        let mut bytes = [0; superblock::BYTES];
        source.read_at(superblock::OFFSET, &mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Ext4Error::NotExt4,
            _ => Ext4Error::Io(error),
        })?;
        let superblock = Superblock::parse(&bytes)?;
        let fs = Self { source, superblock };
        // What the superblock says bounds all loops, so it has to be true.
        let len = fs.superblock.blocks * u64::from(fs.superblock.block_bytes);
        fs.read(len - 1, &mut [0]).map_err(|error| error.within("the filesystem is cut off"))?;
        Ok(fs)
    }

    /// What the superblock says.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Reads whole blocks from `block` on.
    ///
    /// # Errors
    ///
    /// [`Ext4Error::Damaged`] if they are not on the filesystem or behind the end of the image.
    pub fn read_blocks(&self, block: u64, buffer: &mut [u8]) -> Result<(), Ext4Error> {
        let block_bytes = u64::from(self.superblock.block_bytes);
        let blocks = (buffer.len() as u64).div_ceil(block_bytes);
        self.superblock.check_blocks(block, blocks)?;
        self.read(block * block_bytes, buffer)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Ext4Error> {
        self.source.read_at(offset, buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Ext4Error::damaged(format_args!(
                "the image ends before byte {}",
                offset + buffer.len() as u64
            )),
            _ => Ext4Error::Io(error),
        })
    }

    fn block(&self, block: u64) -> Result<Vec<u8>, Ext4Error> {
        let mut bytes = vec![0; self.superblock.block_bytes as usize];
        self.read_blocks(block, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads an inode, with its encryption context if it has one.
    ///
    /// # Errors
    ///
    /// If there is no such inode, or it is damaged.
    pub fn inode(&self, number: u32) -> Result<Inode, Ext4Error> {
        inode::read(self, number).map_err(|error| error.within(format_args!("inode {number}")))
    }

    /// Where the file's blocks are, in order of the file; what is in none of them is a hole.
    ///
    /// # Errors
    ///
    /// If the map is damaged.
    pub fn runs(&self, inode: &Inode) -> Result<Vec<Run>, Ext4Error> {
        blocks::runs(self, inode).map_err(|error| error.within(format_args!("inode {}", inode.number)))
    }

    /// The entries of a directory, `.` and `..` among them.
    ///
    /// # Errors
    ///
    /// If a block of it is damaged.
    pub fn entries(&self, inode: &Inode) -> Result<Vec<DirEntry>, Ext4Error> {
        dir::entries(self, inode)
            .map_err(|error| error.within(format_args!("directory inode {}", inode.number)))
    }

    /// What an inode holds that is small: the data of a symbolic link.
    ///
    /// # Errors
    ///
    /// If it is damaged, or longer than a block.
    pub fn link_data(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        blocks::link_data(self, inode).map_err(|error| error.within(format_args!("inode {}", inode.number)))
    }
}

/// Numbers of structures on the disk, all little-endian; `None` past the end.
fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// CRC-32C as ext4 has it: no inversion before or after.
fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
