//! Whether what lies on an image is exactly what policies and keys say.
//!
//! Encryption here authenticates nothing, so a changed ciphertext is only another plaintext. What can be found without the
//! plaintext is what has redundancy:
//!
//! | what | is checked |
//! | --- | --- |
//! | contexts | well-formed; flag and context together; allowed on this filesystem; nonce there, and nobody else's |
//! | trees | everything in an encrypted directory has its policy |
//! | names | decrypt to names that are padded by zeroes as the policy says, or at least to text; no name twice; stored hashes |
//! | links | the same of their targets |
//! | contents | zeroes behind the end; nothing written behind that; written blocks that cannot be ciphertext |
//! | the filesystem | checksums and structure of all that was read on the way |
//!
//! With the plaintext tree at hand, every byte is: it is encrypted again, and compared with what is there.

use crate::ext4::{DirEntry, FileKind, ROOT_INODE, Source};
use crate::file::FileCipher;
use crate::image::{Image, ImageError, Node, Piece};
use crate::names::{NamesCipher, dirhash, no_key_name};
use crate::policy::{Context, Derivation, KeyRef, NONCE_BYTES, Policy};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// More problems are counted only.
pub const PROBLEMS_KEPT_MAX: usize = 10_000;

/// Squares of deviations of byte counts, over their expectation, that ciphertext does not reach: 255 degrees of freedom
/// have mean 255 and standard deviation 22.6, and this is 24 of them away.
const UNEVENNESS_MAX: f64 = 800.0;

/// Too few bytes say nothing about how even they are.
const EVENNESS_BYTES_MIN: u64 = 4096;

/// So many zeroes of padding chance does not bring about.
const PROOF_ZEROES_MIN: usize = 4;

/// How many data units of one file are compared with each other: some 40 MiB of memory.
const STARTS_MAX: usize = 1 << 20;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The policies that were met, and what of each.
    pub policies: Vec<PolicyReport>,
    /// What was checked with its key.
    pub checked: Counts,
    /// What was not, since its key was not given.
    pub without_key: Counts,
    /// What is not encrypted, and so not checked.
    pub unencrypted: Counts,
    /// What is wrong, the first [`PROBLEMS_KEPT_MAX`] of it.
    pub problems: Vec<Problem>,
    /// How much is wrong.
    pub problem_count: u64,
}

/// How many of what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// Names in encrypted directories.
    pub names: u64,
    /// Bytes on the disk.
    pub bytes: u64,
}

/// A policy that was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyReport {
    /// The policy.
    pub policy: Policy,
    /// Whether there is its key.
    pub key: KeyState,
    /// Files, directories and links that have it.
    pub inodes: u64,
}

/// How it stands with a policy's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// It was given.
    Given,
    /// It was not given.
    Missing,
    /// A key was given for it by a name that anybody can choose, and it decrypts no name.
    Wrong,
}

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where: decrypted names, or no-key names.
    pub path: Vec<u8>,
    /// The inode, if it got so far.
    pub inode: Option<u32>,
    /// What.
    pub what: String,
}

impl Report {
    /// Nothing is wrong, and nothing was left out.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.problem_count == 0 && !self.lacks_keys()
    }

    /// Some policy's key is missing or wrong.
    #[must_use]
    pub fn lacks_keys(&self) -> bool {
        self.policies.iter().any(|policy| policy.key != KeyState::Given)
    }
}

/// Verifies what `path` leads to and all below it. `against` is the same tree in plaintext.
///
/// # Errors
///
/// If there is nothing at `path`, or `against` cannot be read. What is wrong on the image is in the report.
pub fn verify<S: Source>(
    image: &Image<S>,
    path: &[u8],
    against: Option<&Path>,
) -> Result<Report, ImageError> {
    let top = image.lookup(path)?;
    let mut verifier = Verifier {
        image,
        report: Report::default(),
        directories: HashSet::new(),
        seen: HashSet::new(),
        nonces: HashMap::new(),
        keys: BTreeMap::new(),
        names: HashMap::new(),
    };
    if image.fs().superblock().has_errors {
        verifier.problem(b"", None, "Linux has noted errors of the filesystem, and nobody has repaired them");
    }
    verifier.node(from_top(path), top, against)?;
    Ok(verifier.finish())
}

/// A path with the slash that it begins with, and none behind; the top's is empty.
fn from_top(path: &[u8]) -> Vec<u8> {
    let names: Vec<&[u8]> = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).collect();
    names.iter().flat_map(|name| [&b"/"[..], name]).collect::<Vec<_>>().concat()
}

struct Verifier<'a, S> {
    image: &'a Image<S>,
    report: Report,
    /// Directories that were walked into: each has one place.
    directories: HashSet<u32>,
    /// Files and links that were checked: they may have several names.
    seen: HashSet<u32>,
    nonces: HashMap<[u8; NONCE_BYTES], u32>,
    keys: BTreeMap<Vec<u8>, PolicyReport>,
    /// Names that were decrypted and names that could not be, by key.
    names: HashMap<KeyRef, [u64; 2]>,
}

/// A directory that is still to be walked through.
struct Pending {
    path: Vec<u8>,
    node: Node,
    against: Option<PathBuf>,
}

impl<S: Source> Verifier<'_, S> {
    fn problem(&mut self, path: &[u8], inode: Option<u32>, what: impl fmt::Display) {
        self.report.problem_count += 1;
        if self.report.problems.len() < PROBLEMS_KEPT_MAX {
            let path = if path.is_empty() { b"/".to_vec() } else { path.to_vec() };
            self.report.problems.push(Problem { path, inode, what: what.to_string() });
        }
    }

    /// An error met on the image is a problem; one of the world outside is the caller's.
    fn fault(&mut self, path: &[u8], inode: u32, error: ImageError) -> Result<(), ImageError> {
        let what = match &error {
            ImageError::Ext4(crate::ext4::Ext4Error::Io(_)) | ImageError::Sink(_) | ImageError::Engine(_) => {
                return Err(error);
            }
            ImageError::Ext4(crate::ext4::Ext4Error::Damaged(what)) | ImageError::Damaged(what) => {
                what.clone()
            }
            other => other.to_string(),
        };
        // It is told with its inode.
        let named = [format!("inode {inode}: "), format!("directory inode {inode}: ")];
        let what = named.iter().find_map(|name| what.strip_prefix(name)).unwrap_or(&what);
        self.problem(path, Some(inode), what);
        Ok(())
    }

    fn node(&mut self, path: Vec<u8>, node: Node, against: Option<&Path>) -> Result<(), ImageError> {
        let mut pending = vec![];
        self.visit(path, node, against.map(Path::to_owned), &mut pending)?;
        while let Some(directory) = pending.pop() {
            self.directory(directory, &mut pending)?;
        }
        Ok(())
    }

    /// Checks a file or link; puts a directory aside.
    fn visit(
        &mut self,
        path: Vec<u8>,
        node: Node,
        against: Option<PathBuf>,
        pending: &mut Vec<Pending>,
    ) -> Result<(), ImageError> {
        let inode = node.inode.number;
        if node.inode.kind == FileKind::Directory {
            if !self.directories.insert(inode) {
                self.problem(&path, Some(inode), "the directory is in more than one place");
                return Ok(());
            }
        } else if !self.seen.insert(inode) {
            // Another name of what was checked already.
            return Ok(());
        }
        let has_key = node.context.as_ref().map(|context| self.context(&path, inode, context));
        let counts = match has_key {
            None => &mut self.report.unencrypted,
            Some(false) => &mut self.report.without_key,
            Some(true) => &mut self.report.checked,
        };
        match node.inode.kind {
            FileKind::Directory => {
                counts.directories += 1;
                pending.push(Pending { path, node, against });
                return Ok(());
            }
            FileKind::Regular => counts.files += 1,
            FileKind::Link => counts.links += 1,
            FileKind::Special => return Ok(()),
        }
        let checked = match (has_key, node.inode.kind) {
            (Some(true), FileKind::Regular) => self.file(&path, &node, against.as_deref()),
            (Some(true), _) => self.link(&path, &node, against.as_deref()),
            (Some(false), FileKind::Regular) => self.file_without_key(&path, &node),
            _ => Ok(()),
        };
        checked.or_else(|error| self.fault(&path, inode, error))
    }

    /// Checks a context, and says whether its key is there.
    fn context(&mut self, path: &[u8], inode: u32, context: &Context) -> bool {
        let Context { policy, nonce } = context;
        let superblock = self.image.fs().superblock();
        if !superblock.has_encrypt {
            self.problem(
                path,
                Some(inode),
                "it is encrypted, and the filesystem has not the feature \"encrypt\"",
            );
        }
        let needs_stable = matches!(policy.derivation(), Derivation::IvInoLblk64 | Derivation::IvInoLblk32);
        if needs_stable && !superblock.has_stable_inodes {
            let what =
                format!("{} needs the filesystem's feature \"stable_inodes\"", policy.derivation().name());
            self.problem(path, Some(inode), what);
        }
        let unit = policy.data_unit_bytes(superblock.block_bytes);
        if unit > superblock.block_bytes {
            self.problem(
                path,
                Some(inode),
                format_args!("its data units have {unit} bytes, more than a block"),
            );
        }
        if *nonce == [0; NONCE_BYTES] {
            self.problem(path, Some(inode), "its nonce is zero");
        } else if let Some(other) = self.nonces.insert(*nonce, inode) {
            self.problem(path, Some(inode), format_args!("its nonce is that of inode {other}, too"));
        }
        let has_key = self.image.keys().find(policy.key()).is_some();
        let entry =
            self.keys.entry(Context { nonce: [0; 16], ..*context }.to_bytes()).or_insert(PolicyReport {
                policy: *policy,
                key: if has_key { KeyState::Given } else { KeyState::Missing },
                inodes: 0,
            });
        entry.inodes += 1;
        has_key
    }

    fn directory(&mut self, directory: Pending, pending: &mut Vec<Pending>) -> Result<(), ImageError> {
        let Pending { path, node, against } = directory;
        let number = node.inode.number;
        let entries = match self.image.fs().entries(&node.inode) {
            Ok(entries) => entries,
            Err(error) => return self.fault(&path, number, error.into()),
        };
        let cipher = match self.image.names_cipher(&node) {
            Ok(cipher) => cipher,
            Err(error) => return self.fault(&path, number, error),
        };
        if let Some(dots) = entries.iter().find(|entry| entry.name == b"." && entry.inode != number) {
            self.problem(&path, Some(number), format_args!("its \".\" is inode {}", dots.inode));
        }
        self.check_against_names(&path, &node, cipher.as_ref(), &entries, against.as_deref())?;
        let mut names = HashSet::new();
        let mut proof = Proof::default();
        for entry in entries.iter().filter(|entry| !entry.is_dots()) {
            let name = self.name(&path, &node, cipher.as_ref(), entry);
            let full = [&path[..], b"/", &name].concat();
            proof.add(&name, entry.name.len());
            if !names.insert(name.clone()) {
                self.problem(&full, Some(entry.inode), "the name is there twice");
            }
            if entry.inode == ROOT_INODE {
                self.problem(&full, Some(ROOT_INODE), "the entry leads to the root");
                continue;
            }
            let child = match self.image.node(entry.inode) {
                Ok(child) => child,
                Err(error) => {
                    self.fault(&full, entry.inode, error)?;
                    continue;
                }
            };
            if !entry.agrees_with(child.inode.kind) {
                let what = format!("the entry says type {}, and the inode is otherwise", entry.file_type);
                self.problem(&full, Some(entry.inode), what);
            }
            self.check_inherited(&full, &node, &child);
            let plain = against.as_deref().map(|against| against.join(OsStr::from_bytes(&name)));
            self.visit(full, child, plain, pending)?;
        }
        if cipher.is_some() && against.is_none() && proof.is_weak() {
            self.problem(&path, Some(number), "none of its names is text, and none has padding: they may be encrypted by another key or nonce");
        }
        Ok(())
    }

    /// What is in an encrypted directory has its policy (Linux `fs/crypto/policy.c`, `fscrypt_has_permitted_context`).
    fn check_inherited(&mut self, path: &[u8], parent: &Node, child: &Node) {
        let Some(of_parent) = &parent.context else { return };
        let inode = Some(child.inode.number);
        match &child.context {
            None if child.inode.kind == FileKind::Special => {}
            None => self.problem(path, inode, "it is not encrypted, and its directory is"),
            Some(own) if own.policy != of_parent.policy => {
                let what = format!("its policy is not its directory's: {}", own.policy);
                self.problem(path, inode, what);
            }
            Some(_) => {}
        }
    }

    /// Checks a name, and gives what it is called in paths.
    fn name(&mut self, path: &[u8], node: &Node, cipher: Option<&NamesCipher>, entry: &DirEntry) -> Vec<u8> {
        let Some(context) = &node.context else { return entry.name.clone() };
        let as_shown = || no_key_name(entry.hash, &entry.name).into_bytes();
        let Some(cipher) = cipher else {
            self.report.without_key.names += 1;
            let (len, padding) = (entry.name.len(), context.policy.padding_bytes());
            if len < 16 || !(len.is_multiple_of(padding) || len == 255) {
                let full = [path, b"/", &as_shown()].concat();
                self.problem(&full, Some(entry.inode), format_args!("{len} bytes are no encrypted name"));
            }
            return as_shown();
        };
        self.report.checked.names += 1;
        let [good, bad] = self.names.entry(context.policy.key()).or_default();
        match cipher.decrypt_name(&entry.name) {
            Ok(name) => {
                *good += 1;
                self.check_hash(path, node, entry, &name);
                name
            }
            Err(why) => {
                *bad += 1;
                let full = [path, b"/", &as_shown()].concat();
                self.problem(&full, Some(entry.inode), format_args!("its name: {why}"));
                as_shown()
            }
        }
    }

    /// Where case makes no difference, entries have a keyed hash of the name in lower case. Only ASCII is folded here.
    fn check_hash(&mut self, path: &[u8], node: &Node, entry: &DirEntry, name: &[u8]) {
        let (true, true, Some(context)) = (node.inode.is_casefolded, name.is_ascii(), &node.context) else {
            return;
        };
        let Some(key) = self.image.keys().find(context.policy.key()) else { return };
        let hash = dirhash(key, &context.nonce, &name.to_ascii_lowercase());
        let [major, minor] = [hash >> 32, hash & 0xffff_ffff];
        let stored = entry.hash.map(u64::from);
        // Zeroes where the directory has no hashes to show. The lowest bit of the major one is ext4's own.
        if stored != [0, 0] && stored != [major & !1, minor] {
            let full = [path, b"/", name].concat();
            self.problem(&full, Some(entry.inode), "the hash beside its name is another name's");
        }
    }

    /// Which names of the plaintext tree are missing on the image, and the other way round. Names are encrypted and
    /// compared as they lie there.
    fn check_against_names(
        &mut self,
        path: &[u8],
        node: &Node,
        cipher: Option<&NamesCipher>,
        entries: &[DirEntry],
        against: Option<&Path>,
    ) -> Result<(), ImageError> {
        let Some(against) = against else { return Ok(()) };
        if node.context.is_some() && cipher.is_none() {
            return Ok(());
        }
        let listed = match fs::read_dir(against) {
            Ok(listed) => listed,
            Err(error) if is_missing(&error) => {
                self.problem(path, Some(node.inode.number), "there is no such directory to compare it with");
                return Ok(());
            }
            Err(error) => return Err(ImageError::Sink(error)),
        };
        let mut there: HashSet<&[u8]> =
            entries.iter().filter(|entry| !entry.is_dots()).map(|entry| &entry.name[..]).collect();
        for entry in listed {
            let name = entry.map_err(ImageError::Sink)?.file_name();
            let raw = match cipher {
                None => name.as_bytes().to_vec(),
                Some(cipher) => cipher.encrypt_name(name.as_bytes()).unwrap_or_default(),
            };
            if !there.remove(&raw[..]) {
                let full = [path, b"/", name.as_bytes()].concat();
                self.problem(&full, None, "it is not on the image, or its name is encrypted otherwise");
            }
        }
        // What is not encrypted is nobody's plaintext: lost+found, say.
        let missing = there.into_iter().filter(|_| node.context.is_some());
        for raw in missing.map(<[u8]>::to_vec).collect::<Vec<_>>() {
            let name = cipher.and_then(|cipher| cipher.decrypt_name(&raw).ok());
            let name = name.unwrap_or_else(|| no_key_name([0, 0], &raw).into_bytes());
            let full = [path, b"/", &name].concat();
            self.problem(&full, None, "it is on the image, and there is nothing to compare it with");
        }
        Ok(())
    }

    fn link(&mut self, path: &[u8], node: &Node, against: Option<&Path>) -> Result<(), ImageError> {
        let data = self.image.fs().link_data(&node.inode)?;
        self.report.checked.bytes += data.len() as u64;
        let target = self.image.target(node)?;
        let Some(against) = against else {
            let mut proof = Proof::default();
            proof.add(&target, data.len() - 2);
            if proof.is_weak() {
                self.problem(
                    path,
                    Some(node.inode.number),
                    "its target is not text, and has no padding: it may be encrypted by another key or nonce",
                );
            }
            return Ok(());
        };
        let wanted = match fs::read_link(against) {
            Ok(wanted) => wanted,
            Err(error) if is_missing(&error) || error.kind() == io::ErrorKind::InvalidInput => {
                self.problem(path, Some(node.inode.number), "there is no such link to compare it with");
                return Ok(());
            }
            Err(error) => return Err(ImageError::Sink(error)),
        };
        let block_bytes = self.image.block_bytes();
        let cipher = self.image.names_cipher(node)?;
        let encrypted =
            cipher.and_then(|cipher| cipher.encrypt_target(wanted.as_os_str().as_bytes(), block_bytes).ok());
        if target != wanted.as_os_str().as_bytes() || encrypted.as_deref() != Some(&data[..]) {
            self.problem(path, Some(node.inode.number), "its target is not the one to compare it with");
        }
        Ok(())
    }

    /// What can be said about ciphertext alone.
    fn file_without_key(&mut self, path: &[u8], node: &Node) -> Result<(), ImageError> {
        self.check_end(path, node)?;
        let unit =
            node.context.map_or(512, |context| context.policy.data_unit_bytes(self.image.block_bytes()));
        let mut look = Look::new(unit.min(self.image.block_bytes()));
        for piece in self.image.pieces(&node.inode)? {
            let data = self.image.read_piece(&piece)?;
            look.at(piece.offset, &data);
            self.report.without_key.bytes += data.len() as u64;
        }
        self.looked(path, node, &look);
        Ok(())
    }

    fn file(&mut self, path: &[u8], node: &Node, against: Option<&Path>) -> Result<(), ImageError> {
        let Some(cipher) = self.image.file_cipher(node)? else { return Ok(()) };
        self.check_end(path, node)?;
        let mut plaintext = match against.map(open_plain).transpose() {
            Ok(plaintext) => plaintext,
            Err(error) if is_missing(&error) => {
                self.problem(path, Some(node.inode.number), "there is no such file to compare it with");
                None
            }
            Err(error) => return Err(ImageError::Sink(error)),
        };
        if let Some(Plain { size, .. }) = &plaintext
            && *size != node.inode.size
        {
            let what = format!("it has {} bytes, and what it is compared with {size}", node.inode.size);
            self.problem(path, Some(node.inode.number), what);
            plaintext = None;
        }
        let mut look = Look::new(cipher.unit_bytes());
        let mut at = 0;
        for piece in self.image.pieces(&node.inode)? {
            let data = self.image.read_piece(&piece)?;
            look.at(piece.offset, &data);
            self.report.checked.bytes += data.len() as u64;
            if let Some(plain) = &mut plaintext {
                self.check_hole(path, node, plain, at..piece.offset)?;
                self.compare(path, node, &cipher, plain, &piece, &data)?;
            }
            at = piece.offset + data.len() as u64;
            if at > node.inode.size {
                self.check_padding(path, node, &cipher, &piece, data)?;
            }
        }
        if let Some(plain) = &mut plaintext {
            self.check_hole(path, node, plain, at..node.inode.size.max(at))?;
        }
        self.looked(path, node, &look);
        Ok(())
    }

    /// Nothing is written in blocks behind the end, but for a tree of hashes.
    fn check_end(&mut self, path: &[u8], node: &Node) -> Result<(), ImageError> {
        let blocks = node.inode.size.div_ceil(self.image.block_bytes().into());
        let behind = self.image.fs().runs(&node.inode)?.into_iter();
        let written = behind.filter(|run| !run.is_unwritten && run.logical + run.blocks > blocks);
        if !node.inode.has_verity && written.count() > 0 {
            self.problem(path, Some(node.inode.number), "blocks behind its end are written");
        }
        Ok(())
    }

    /// What of the last block is behind the end is zero.
    fn check_padding(
        &mut self,
        path: &[u8],
        node: &Node,
        cipher: &FileCipher,
        piece: &Piece,
        mut data: Vec<u8>,
    ) -> Result<(), ImageError> {
        let unit = u64::from(cipher.unit_bytes());
        // From the data unit on that has the end in it.
        let first = node.inode.size / unit;
        let from = usize::try_from(first * unit - piece.offset).unwrap_or(usize::MAX).min(data.len());
        let rest = &mut data[from..];
        cipher.decrypt(first, rest).map_err(ImageError::Engine)?;
        let padding = usize::try_from(node.inode.size % unit).unwrap_or(0).min(rest.len());
        if rest[padding..].iter().any(|&byte| byte != 0) {
            self.problem(path, Some(node.inode.number), "what is behind its end does not decrypt to zeroes");
        }
        Ok(())
    }

    /// A hole reads as zeroes, so there have to be zeroes.
    fn check_hole(
        &mut self,
        path: &[u8],
        node: &Node,
        plain: &mut Plain,
        range: std::ops::Range<u64>,
    ) -> Result<(), ImageError> {
        let end = range.end.min(node.inode.size);
        let mut at = range.start;
        let mut buffer = vec![0; 1 << 16];
        while at < end {
            let now = usize::try_from(end - at).unwrap_or(buffer.len()).min(buffer.len());
            plain.fill(at, &mut buffer[..now])?;
            if buffer[..now].iter().any(|&byte| byte != 0) {
                let what =
                    format!("there is a hole at byte {at}, and what it is compared with is not zero there");
                self.problem(path, Some(node.inode.number), what);
                return Ok(());
            }
            at += now as u64;
        }
        Ok(())
    }

    /// Encrypts the plaintext and compares it with what is there.
    fn compare(
        &mut self,
        path: &[u8],
        node: &Node,
        cipher: &FileCipher,
        plain: &mut Plain,
        piece: &Piece,
        data: &[u8],
    ) -> Result<(), ImageError> {
        let mut expected = vec![0; data.len()];
        plain.fill(piece.offset, &mut expected)?;
        let unit = cipher.unit_bytes();
        let first = piece.offset / u64::from(unit);
        cipher.encrypt(first, &mut expected).map_err(ImageError::Engine)?;
        let unit = unit as usize;
        let wrong: Vec<u64> = (first..)
            .zip(data.chunks(unit).zip(expected.chunks(unit)))
            .filter(|(_, (actual, expected))| actual != expected)
            .map(|(index, _)| index)
            .collect();
        if let Some(index) = wrong.first() {
            let what =
                format!("{} data units from {index} on are not the plaintext's ciphertext", wrong.len());
            self.problem(path, Some(node.inode.number), what);
        }
        Ok(())
    }

    fn looked(&mut self, path: &[u8], node: &Node, look: &Look) {
        let inode = Some(node.inode.number);
        if let Some(at) = look.constant {
            self.problem(
                path,
                inode,
                format_args!("what lies at its byte {at} is one byte repeated: it was never encrypted"),
            );
        } else if let Some([one, other]) = look.repeated {
            let what = format!(
                "what lies at its bytes {one} and {other} is the same: it was not encrypted by this policy"
            );
            self.problem(path, inode, what);
        } else if look.is_uneven() {
            self.problem(path, inode, "its bytes on the disk are not spread as ciphertext's are");
        }
    }

    fn finish(mut self) -> Report {
        for policy in self.keys.values_mut() {
            // The name of a key of version 1 proves nothing. One that decrypts no name at all is another key.
            if let (KeyRef::Descriptor(_), Some(&[0, bad])) =
                (policy.policy.key(), self.names.get(&policy.policy.key()))
                && bad > 0
            {
                policy.key = KeyState::Wrong;
            }
        }
        self.report.policies = self.keys.into_values().collect();
        self.report
    }
}

/// What speaks for names having been encrypted by just this key. By another, they decrypt to anything: rarely to zeroes at the
/// end, hardly ever to text.
#[derive(Default)]
struct Proof {
    names: u64,
    texts: u64,
    zeroes: usize,
}

impl Proof {
    fn add(&mut self, name: &[u8], padded_bytes: usize) {
        self.names += 1;
        self.texts += u64::from(str::from_utf8(name).is_ok_and(|name| !name.contains(char::is_control)));
        self.zeroes += padded_bytes.saturating_sub(name.len());
    }

    fn is_weak(&self) -> bool {
        self.names > 0 && self.texts == 0 && self.zeroes < PROOF_ZEROES_MIN
    }
}

/// A look at ciphertext: what none ever looks like.
struct Look {
    unit_bytes: usize,
    counts: [u64; 256],
    starts: HashMap<[u8; 16], u64>,
    constant: Option<u64>,
    repeated: Option<[u64; 2]>,
}

impl Look {
    fn new(unit_bytes: u32) -> Self {
        let unit_bytes = unit_bytes as usize;
        Self { unit_bytes, counts: [0; 256], starts: HashMap::new(), constant: None, repeated: None }
    }

    fn at(&mut self, offset: u64, data: &[u8]) {
        for &byte in data {
            self.counts[usize::from(byte)] += 1;
        }
        for (at, unit) in (offset..).step_by(self.unit_bytes).zip(data.chunks(self.unit_bytes)) {
            if unit.iter().all(|byte| *byte == unit[0]) {
                self.constant.get_or_insert(at);
            }
            // Each unit has an IV of its own, so that equal plaintexts do not show.
            if self.starts.len() < STARTS_MAX
                && let Some(start) = unit.first_chunk()
                && let Some(other) = self.starts.insert(*start, at)
            {
                self.repeated.get_or_insert([other, at]);
            }
        }
    }

    fn is_uneven(&self) -> bool {
        let total: u64 = self.counts.iter().sum();
        if total < EVENNESS_BYTES_MIN {
            return false;
        }
        #[expect(clippy::cast_precision_loss, reason = "a statistic, with room to spare")]
        let (expected, counts) = (total as f64 / 256.0, self.counts.map(|count| count as f64));
        counts.iter().map(|count| (count - expected).powi(2) / expected).sum::<f64>() > UNEVENNESS_MAX
    }
}

/// A file of the plaintext tree.
struct Plain {
    file: File,
    size: u64,
}

fn open_plain(path: &Path) -> io::Result<Plain> {
    // A fifo would wait for somebody; only regular files are opened.
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    Ok(Plain { file, size })
}

impl Plain {
    /// The bytes from `offset` on, zeroes behind the end.
    fn fill(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        use std::io::{Seek as _, SeekFrom};
        let len = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(buffer.len()).min(buffer.len());
        let read =
            self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(&mut buffer[..len]));
        buffer[len..].fill(0);
        read.map_err(ImageError::Sink)
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
