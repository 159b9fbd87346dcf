//! What verify notices when an image was changed: by accident, which checksums notice, and on purpose, with checksums that are
//! right again.

use crate::rig::{Oracle, open, oracle, plain_tree};
use crate::transcode::{fix_inode, inode_at};
use inlinecrypt_fscrypt::ext4::{Ext4, Source};
use inlinecrypt_fscrypt::image::ImageError;
use inlinecrypt_fscrypt::verify::{KeyState, Report, verify};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// An image with some bytes changed.
#[derive(Clone, Debug)]
struct Changed {
    image: Arc<Vec<u8>>,
    changes: Vec<(usize, Vec<u8>)>,
}

impl Source for Changed {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.image.read_at(offset, buffer)?;
        let start = usize::try_from(offset).unwrap();
        for (at, bytes) in &self.changes {
            for (at, byte) in (*at..).zip(bytes) {
                if (start..start + buffer.len()).contains(&at) {
                    buffer[at - start] = *byte;
                }
            }
        }
        Ok(())
    }
}

struct Bench {
    oracle: Oracle,
    image: Arc<Vec<u8>>,
    tree: tempfile::TempDir,
}

/// What `mkfs` chose.
const BLOCK: usize = 4096;
const INODE: usize = 256;

impl Bench {
    fn new() -> Self {
        let (oracle, image) = oracle();
        let tree = plain_tree(&oracle);
        Self { oracle, image: Arc::new(image), tree }
    }

    fn verify(&self, changes: Vec<(usize, Vec<u8>)>, path: &str, beside: bool) -> Result<Report, ImageError> {
        let changed = Changed { image: self.image.clone(), changes };
        let Ok(_) = Ext4::open(changed.clone()) else { return Err(ImageError::NotFound) };
        let against = self.tree.path().join(path);
        let against: Option<&Path> = beside.then_some(&against);
        verify(&open(&self.oracle, changed), path.as_bytes(), against)
    }

    /// Whether a change is noticed: as a problem, a key that is missing, or a path that is not there any more.
    fn notices(&self, changes: Vec<(usize, Vec<u8>)>, path: &str, beside: bool) -> bool {
        self.verify(changes, path, beside).map_or(true, |report| !report.is_good())
    }

    fn flip(&self, at: usize, bit: u8) -> (usize, Vec<u8>) {
        (at, vec![self.image[at] ^ 1 << bit])
    }

    fn inode_at(&self, number: u32) -> usize {
        inode_at(&self.image, number)
    }

    /// Changes a byte of an inode, and makes its checksum right.
    fn forge(&self, number: u32, at: usize, byte: u8) -> Vec<(usize, Vec<u8>)> {
        let start = self.inode_at(number);
        let mut image = self.image.to_vec();
        image[start + at] = byte;
        fix_inode(&mut image, number);
        vec![(start, image[start..start + INODE].to_vec())]
    }

    /// Where the context is in an inode: it is the value that begins with version and modes.
    fn context_at(&self, number: u32) -> usize {
        let start = self.inode_at(number);
        let inode = &self.image[start..start + INODE];
        inode.windows(3).rposition(|bytes| bytes == [2, 1, 4]).unwrap()
    }

    /// Number, path and size of a file in `xts_default`.
    fn file(&self, name: &str) -> (u32, u64, Vec<(usize, usize)>) {
        let path = format!("xts_default/{name}");
        let file = self.oracle.policies.iter().flat_map(|made| &made.files).find(|file| file.path == path);
        let file = file.unwrap();
        let place = |n: u64| usize::try_from(n).unwrap();
        let extents = file.extents.iter().map(|e| (place(e.image_byte), place(e.length))).collect();
        (file.inode, file.size, extents)
    }
}

#[test]
fn checksums_notice_every_bit_of_inodes_directories_and_the_superblock() {
    let bench = Bench::new();
    assert!(!bench.notices(vec![], "xts_default", true));
    // A file, the directory, the link: 12, 14 and 23. Byte by byte, another bit of each.
    for inode in [12, 14, 23] {
        let start = bench.inode_at(inode);
        for byte in 0..INODE {
            let change = bench.flip(start + byte, u8::try_from(byte % 8).unwrap());
            assert!(bench.notices(vec![change], "xts_default", false), "inode {inode}, byte {byte}");
        }
    }
    // The directory's one block.
    let fs = Ext4::open(bench.image.to_vec()).unwrap();
    let runs = fs.runs(&fs.inode(12).unwrap()).unwrap();
    let start = usize::try_from(runs[0].physical).unwrap() * BLOCK;
    for byte in (0..BLOCK).step_by(5) {
        let change = bench.flip(start + byte, u8::try_from(byte % 8).unwrap());
        assert!(bench.notices(vec![change], "xts_default", false), "directory, byte {byte}");
    }
    for byte in 0..1024 {
        let change = bench.flip(1024 + byte, u8::try_from(byte % 8).unwrap());
        assert!(bench.notices(vec![change], "xts_default", false), "superblock, byte {byte}");
    }
    // The first group's descriptor.
    for byte in 0..64 {
        let change = bench.flip(BLOCK + byte, u8::try_from(byte % 8).unwrap());
        assert!(bench.notices(vec![change], "xts_default", false), "descriptor, byte {byte}");
    }
}

#[test]
fn every_bit_of_a_policy_that_was_forged_is_noticed() {
    let bench = Bench::new();
    for inode in [12, 14, 23] {
        let at = bench.context_at(inode);
        for byte in 0..24 {
            for bit in 0..8 {
                let forged =
                    bench.forge(inode, at + byte, bench.image[bench.inode_at(inode) + at + byte] ^ 1 << bit);
                assert!(
                    bench.notices(forged, "xts_default", false),
                    "inode {inode}: bit {bit} of byte {byte}"
                );
            }
        }
    }
}

/// A nonce is in the key: with it changed, nothing decrypts any more.
#[test]
fn every_bit_of_a_nonce_that_was_forged_is_noticed() {
    let bench = Bench::new();
    for (inode, beside) in [(12, false), (14, false), (23, false), (14, true)] {
        let at = bench.context_at(inode) + 24;
        for byte in 0..16 {
            for bit in 0..8 {
                let forged =
                    bench.forge(inode, at + byte, bench.image[bench.inode_at(inode) + at + byte] ^ 1 << bit);
                let report = bench.verify(forged, "xts_default", beside).unwrap();
                assert!(!report.is_good(), "inode {inode}: bit {bit} of byte {byte}");
            }
        }
    }
}

#[test]
fn flags_context_and_kind_that_disagree_are_noticed() {
    let bench = Bench::new();
    let byte = |inode: u32, at: usize| bench.image[bench.inode_at(inode) + at];
    let says = |forged, text: &str| {
        let report = bench.verify(forged, "xts_default", false).unwrap();
        assert!(
            report.problems.iter().any(|problem| problem.what.contains(text)),
            "{text}: {:?}",
            report.problems
        );
    };
    says(bench.forge(14, 0x21, byte(14, 0x21) & !0x08), "not flagged as encrypted");
    // The attribute's name is another.
    let at = bench.image[bench.inode_at(14)..][..INODE].windows(2).position(|b| b == [1, 9]).unwrap();
    says(bench.forge(14, at + 1, 1), "has no encryption context");
    // A file of another nonce: the one of its directory.
    let at = bench.context_at(14);
    says(bench.forge(14, at, 3), "version 3");
    // A regular file that says it is a fifo.
    says(bench.forge(14, 1, byte(14, 1) & 0x0f | 0x10), "the entry says type 1");
    // Its length cut: what is behind the end is not zero then.
    says(bench.forge(15, 0x04, 0xfe), "does not decrypt to zeroes");
    // And more than blocks: written behind its end.
    says(bench.forge(18, 0x06, 0), "blocks behind its end");
}

#[test]
fn every_bit_of_contents_is_noticed_beside_the_plaintext_and_padding_without() {
    let bench = Bench::new();
    for name in ["one-byte", "b4095", "b4096", "b5000", "sparse", "sub/inner.txt"] {
        let (_, size, extents) = bench.file(name);
        let parent = if name.starts_with("sub") { "xts_default/sub" } else { "xts_default" };
        for &(start, len) in &extents {
            for byte in (0..len).step_by(len / 16 - 1) {
                let change = bench.flip(start + byte, u8::try_from(byte % 8).unwrap());
                assert!(bench.notices(vec![change], parent, true), "{name}, byte {byte}");
            }
        }
        // XTS changes the 16 bytes of a change: those that are all behind the end show without the plaintext.
        let size = usize::try_from(size).unwrap();
        if let [(start, len)] = extents[..] {
            for byte in (size.next_multiple_of(16)..len).step_by(61) {
                let change = bench.flip(start + byte, 3);
                assert!(bench.notices(vec![change], parent, false), "{name}, padding byte {byte}");
            }
        }
    }
}

#[test]
fn what_was_never_encrypted_is_noticed() {
    let bench = Bench::new();
    let (_, _, extents) = bench.file("big");
    let (start, len) = extents[0];
    let says = |bytes: Vec<u8>, text: &str| {
        let report = bench.verify(vec![(start, bytes)], "xts_default", false).unwrap();
        assert!(
            report.problems.iter().any(|problem| problem.what.contains(text)),
            "{text}: {:?}",
            report.problems
        );
    };
    says(vec![0; BLOCK], "never encrypted");
    says(b"the same line, again and again, one block and the next..........".repeat(128), "is the same");
    let text: Vec<u8> = (1_u128..)
        .flat_map(|line| {
            format!("{:032x}\n", line.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c834)).into_bytes()
        })
        .take(len)
        .collect();
    says(text, "not spread");
    // Two units exchanged: each is ciphertext, at another place. Only the plaintext tells.
    let (one, two) =
        (bench.image[start..start + BLOCK].to_vec(), bench.image[start + BLOCK..start + 2 * BLOCK].to_vec());
    let exchanged = vec![(start, [two, one].concat())];
    assert!(!bench.notices(exchanged.clone(), "xts_default", false));
    assert!(bench.notices(exchanged, "xts_default", true));
}

#[test]
fn a_key_that_was_not_given_is_no_verdict() {
    let bench = Bench::new();
    let keyless = inlinecrypt_fscrypt::image::Image::open(bench.image.to_vec(), Default::default()).unwrap();
    let report = verify(&keyless, b"xts_default", None).unwrap();
    assert_eq!(report.problems, []);
    assert!(report.lacks_keys() && !report.is_good());
    assert_eq!(report.policies[0].key, KeyState::Missing);
    assert_eq!((report.checked.files, report.without_key.files), (0, 9));
}
