//! An ext4 image with encrypted directories, and the keys that we have: decrypted names and contents.
//!
//! What no key opens is shown as Linux shows it without one: no-key names, and no contents.
//!
//! ```text
//!   Keyring: master keys by identifier and descriptor
//!   Image:   node(inode) -> Node { inode, context, how it stands with its key }
//!              entries(node) -> names      read(node) -> contents      target(node) -> where a link leads
//! ```

use crate::ext4::{Ext4, Ext4Error, FileKind, Inode, ROOT_INODE, Run, Source};
use crate::file::{Duns, FileCipher, FileError, Place};
use crate::master::{EngineFailure, MasterKey};
use crate::names::{NameError, NamesCipher, no_key_name, no_key_target};
use crate::policy::{Context, ContextError, KeyRef};
use inlinecrypt_cipher::Dun;
use std::fmt;
use std::io;

/// How much of a file is read at once, in bytes: a multiple of all block sizes.
const CHUNK_BYTES: u64 = 1 << 20;

/// Most components of a path.
const PATH_COMPONENTS_MAX: usize = 4096;

/// Master keys.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    key: MasterKey,
    identifier: [u8; 16],
    descriptor: Option<[u8; 8]>,
}

impl Keyring {
    /// Adds a key. `descriptor` is what policies of version 1 call it; without one, it is what is usual for the key.
    pub fn add(&mut self, key: MasterKey, descriptor: Option<[u8; 8]>) {
        let name = key.name();
        self.keys.push(Entry {
            identifier: name.identifier,
            descriptor: descriptor.or(name.descriptor),
            key,
        });
    }

    /// The key that policies call so.
    #[must_use]
    pub fn find(&self, name: KeyRef) -> Option<&MasterKey> {
        let is_it = |entry: &&Entry| match name {
            KeyRef::Identifier(identifier) => entry.identifier == identifier,
            KeyRef::Descriptor(descriptor) => entry.descriptor == Some(descriptor),
        };
        self.keys.iter().find(is_it).map(|entry| &entry.key)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// What policies of version 2 call the keys, in the order in which they were added.
    pub fn identifiers(&self) -> impl Iterator<Item = [u8; 16]> + '_ {
        self.keys.iter().map(|entry| entry.identifier)
    }
}

/// Why something on an image cannot be read.
#[derive(Debug)]
pub enum ImageError {
    /// The filesystem.
    Ext4(Ext4Error),
    /// What is there is damaged, or encrypted otherwise than it says.
    Damaged(String),
    /// No key was given for its policy.
    NoKey(KeyRef),
    /// The key is none for its policy.
    WrongKey(FileError),
    /// The engine that has the key failed.
    Engine(EngineFailure),
    /// There is nothing of this name.
    NotFound,
    /// It is no regular file, no directory, no link, whatever was wanted.
    Kind(&'static str),
    /// Whoever takes the contents could not.
    Sink(io::Error),
}

impl From<Ext4Error> for ImageError {
    fn from(error: Ext4Error) -> Self {
        Self::Ext4(error)
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ext4(error) => error.fmt(f),
            Self::Damaged(what) => write!(f, "is damaged: {what}"),
            Self::NoKey(name) => write!(f, "is encrypted, and key {name} was not given"),
            Self::WrongKey(why) => write!(f, "is encrypted otherwise than its key can be used: {why}"),
            Self::Engine(_) => f.write_str("cannot be decrypted by the engine"),
            Self::NotFound => f.write_str("does not exist"),
            Self::Kind(what) => f.write_str(what),
            Self::Sink(_) => f.write_str("cannot be handed on"),
        }
    }
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Ext4(error) => Some(error),
            Self::WrongKey(error) => Some(error),
            Self::Sink(error) => Some(error),
            Self::Engine(error) => Some(&**error),
            _ => None,
        }
    }
}

/// A file, directory or link, and how it is encrypted.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its inode.
    pub inode: Inode,
    /// Its context; `None` if it is not encrypted.
    pub context: Option<Context>,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name: decrypted, as it is in a directory that is not encrypted, or the no-key name.
    pub name: Vec<u8>,
    /// As it lies in the directory.
    pub raw: Vec<u8>,
    /// The inode's number.
    pub inode: u32,
    /// What the entry says that it is, in ext4's numbers.
    pub file_type: u8,
    /// Why there is a no-key name although there is a key.
    pub wrong: Option<NameError>,
}

/// An image and keys.
#[derive(Debug)]
pub struct Image<S> {
    fs: Ext4<S>,
    keys: Keyring,
}

impl<S: Source> Image<S> {
    /// Opens an image.
    ///
    /// # Errors
    ///
    /// Those of [`Ext4::open`].
    pub fn open(source: S, keys: Keyring) -> Result<Self, Ext4Error> {
        Ok(Self { fs: Ext4::open(source)?, keys })
    }

    /// The filesystem.
    #[must_use]
    pub fn fs(&self) -> &Ext4<S> {
        &self.fs
    }

    /// The keys.
    #[must_use]
    pub fn keys(&self) -> &Keyring {
        &self.keys
    }

    /// The file, directory or link with this inode.
    ///
    /// # Errors
    ///
    /// If the inode or its context are damaged.
    pub fn node(&self, number: u32) -> Result<Node, ImageError> {
        let inode = self.fs.inode(number)?;
        let context = context(&inode).map_err(|why| ImageError::Damaged(format!("inode {number}: {why}")))?;
        Ok(Node { inode, context })
    }

    /// What a path leads to, links not being followed. Components are decrypted names or no-key names.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`], and those of what is on the way.
    pub fn lookup(&self, path: &[u8]) -> Result<Node, ImageError> {
        let mut node = self.node(ROOT_INODE)?;
        let components = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        for (depth, name) in components.enumerate() {
            if depth == PATH_COMPONENTS_MAX {
                return Err(ImageError::NotFound);
            }
            if name == b".." {
                return Err(ImageError::Kind(
                    "has \"..\" in it, which is not followed: write the path without",
                ));
            }
            let found = self.entries(&node)?.into_iter().find(|entry| entry.name == name);
            node = self.node(found.ok_or(ImageError::NotFound)?.inode)?;
        }
        Ok(node)
    }

    /// The names in a directory, without `.` and `..`, in the order in which they lie there.
    ///
    /// # Errors
    ///
    /// If it is no directory, or damaged. Names that cannot be decrypted are no error.
    pub fn entries(&self, node: &Node) -> Result<Vec<Listed>, ImageError> {
        if node.inode.kind != FileKind::Directory {
            return Err(ImageError::Kind("is not a directory"));
        }
        let cipher = self.names_cipher(node)?;
        let entries = self.fs.entries(&node.inode)?.into_iter().filter(|entry| !entry.is_dots());
        let listed = entries.map(|entry| {
            let (name, wrong) = match (&node.context, &cipher) {
                (None, _) => (entry.name.clone(), None),
                (Some(_), None) => (no_key_name(entry.hash, &entry.name).into_bytes(), None),
                (Some(_), Some(cipher)) => match cipher.decrypt_name(&entry.name) {
                    Ok(name) => (name, None),
                    Err(why) => (no_key_name(entry.hash, &entry.name).into_bytes(), Some(why)),
                },
            };
            Listed { name, raw: entry.name, inode: entry.inode, file_type: entry.file_type, wrong }
        });
        Ok(listed.collect())
    }

    /// Where a symbolic link leads; without its key, what Linux shows instead.
    ///
    /// # Errors
    ///
    /// If it is no link, or damaged.
    pub fn target(&self, node: &Node) -> Result<Vec<u8>, ImageError> {
        if node.inode.kind != FileKind::Link {
            return Err(ImageError::Kind("is not a symbolic link"));
        }
        let data = self.fs.link_data(&node.inode)?;
        match (&node.context, self.names_cipher(node)?) {
            (None, _) => Ok(data),
            (Some(_), None) => Ok(no_key_target(&data).into_bytes()),
            (Some(_), Some(cipher)) => cipher.decrypt_target(&data, self.block_bytes()).map_err(|why| {
                ImageError::Damaged(format!("inode {}: the link's target: {why}", node.inode.number))
            }),
        }
    }

    /// Hands the contents of a regular file to `sink`, piece by piece. Holes are zeroes.
    ///
    /// # Errors
    ///
    /// If it is no regular file, no key for it was given, or the image is damaged.
    pub fn read(&self, node: &Node, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), ImageError> {
        if node.inode.kind != FileKind::Regular {
            return Err(ImageError::Kind("is not a regular file"));
        }
        let cipher = match &node.context {
            None => None,
            Some(context) => Some(self.file_cipher(node)?.ok_or(ImageError::NoKey(context.policy.key()))?),
        };
        let zeroes = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(1 << 16)];
        let mut at = 0;
        for piece in self.pieces(&node.inode)? {
            write_zeroes(&zeroes, piece.offset.min(node.inode.size).saturating_sub(at), sink)?;
            let mut data = self.read_piece(&piece)?;
            if let Some(cipher) = &cipher {
                let first = piece.offset / u64::from(cipher.unit_bytes());
                cipher.decrypt(first, &mut data).map_err(ImageError::Engine)?;
            }
            let wanted = node.inode.size.saturating_sub(piece.offset).min(data.len() as u64);
            let wanted = usize::try_from(wanted).unwrap_or(data.len());
            sink(&data[..wanted]).map_err(ImageError::Sink)?;
            at = piece.offset + wanted as u64;
        }
        write_zeroes(&zeroes, node.inode.size.saturating_sub(at), sink)
    }

    /// The DUN of the first data unit of a file, or of the names in a directory or of a link's target; `None` if it is not
    /// encrypted or no key was given.
    ///
    /// # Errors
    ///
    /// If the key is none for its policy.
    pub fn first_dun(&self, node: &Node) -> Result<Option<Dun>, ImageError> {
        let Some((context, key)) = self.key_of(node) else { return Ok(None) };
        Ok(Some(Duns::new(key, context, self.place(node)).of(0)))
    }

    /// What of a file was written and is not behind its end, in pieces of whole blocks.
    pub(crate) fn pieces(&self, inode: &Inode) -> Result<Vec<Piece>, ImageError> {
        let block_bytes = u64::from(self.block_bytes());
        let blocks = inode.size.div_ceil(block_bytes);
        let per_piece = CHUNK_BYTES / block_bytes;
        let mut pieces = Vec::new();
        for run in self.fs.runs(inode)?.into_iter().filter(|run| !run.is_unwritten) {
            let Run { logical, physical, blocks: count, .. } = run;
            let end = (logical + count).min(blocks);
            let mut at = logical;
            while at < end {
                let count = per_piece.min(end - at);
                pieces.push(Piece {
                    offset: at * block_bytes,
                    block: physical + (at - logical),
                    blocks: count,
                });
                at += count;
            }
        }
        Ok(pieces)
    }

    pub(crate) fn read_piece(&self, piece: &Piece) -> Result<Vec<u8>, ImageError> {
        // A piece is at most CHUNK_BYTES long.
        let mut data = vec![0; usize::try_from(piece.blocks).unwrap_or(0) * self.block_bytes() as usize];
        self.fs.read_blocks(piece.block, &mut data)?;
        Ok(data)
    }

    pub(crate) fn block_bytes(&self) -> u32 {
        self.fs.superblock().block_bytes
    }

    fn place(&self, node: &Node) -> Place {
        Place { uuid: self.fs.superblock().uuid, inode: node.inode.number }
    }

    /// What encrypts names in a directory, or a link's target; `None` if it is not encrypted or no key was given.
    pub(crate) fn names_cipher(&self, node: &Node) -> Result<Option<NamesCipher>, ImageError> {
        let Some((context, key)) = self.key_of(node) else { return Ok(None) };
        NamesCipher::new(key, context, self.place(node)).map(Some).map_err(ImageError::WrongKey)
    }

    /// What encrypts a regular file; `None` if it is not encrypted or no key was given.
    pub(crate) fn file_cipher(&self, node: &Node) -> Result<Option<FileCipher>, ImageError> {
        let Some((context, key)) = self.key_of(node) else { return Ok(None) };
        let unit = context.policy.data_unit_bytes(self.block_bytes());
        if unit > self.block_bytes() {
            return Err(ImageError::Damaged(format!(
                "inode {}: its data units have {unit} bytes, and blocks {}",
                node.inode.number,
                self.block_bytes()
            )));
        }
        FileCipher::new(key, context, self.place(node), self.block_bytes())
            .map(Some)
            .map_err(ImageError::WrongKey)
    }

    fn key_of<'a>(&'a self, node: &'a Node) -> Option<(&'a Context, &'a MasterKey)> {
        let context = node.context.as_ref()?;
        Some((context, self.keys.find(context.policy.key())?))
    }
}

/// Written blocks of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Where it is in the file, in bytes.
    pub(crate) offset: u64,
    /// Its first block on the filesystem.
    pub(crate) block: u64,
    pub(crate) blocks: u64,
}

/// The context of an inode, if it is encrypted. One that is not and has a context, or the other way round, is damaged.
pub(crate) fn context(inode: &Inode) -> Result<Option<Context>, BadContext> {
    match (inode.is_encrypted, &inode.context) {
        (false, None) => Ok(None),
        (false, Some(_)) => Err(BadContext::NoFlag),
        (true, None) => Err(BadContext::Missing),
        (true, Some(bytes)) => Context::parse(bytes).map(Some).map_err(BadContext::Wrong),
    }
}

/// What is wrong with how an inode says that it is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadContext {
    /// It has a context, and its flag says that it is not encrypted.
    NoFlag,
    /// Its flag says that it is encrypted, and it has no context.
    Missing,
    /// The context is none.
    Wrong(ContextError),
}

impl fmt::Display for BadContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFlag => f.write_str("it has an encryption context, and is not flagged as encrypted"),
            Self::Missing => f.write_str("it is flagged as encrypted, and has no encryption context"),
            Self::Wrong(why) => why.fmt(f),
        }
    }
}

fn write_zeroes(
    zeroes: &[u8],
    mut bytes: u64,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), ImageError> {
    while bytes > 0 {
        let now = bytes.min(zeroes.len() as u64);
        sink(&zeroes[..usize::try_from(now).unwrap_or(zeroes.len())]).map_err(ImageError::Sink)?;
        bytes -= now;
    }
    Ok(())
}
