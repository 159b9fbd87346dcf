//! What Linux wrote, read; and written again, to the byte.

use crate::rig::{contents, open, oracle, plain_tree, plaintext};
use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::ext4::{Ext4, FileKind};
use inlinecrypt_fscrypt::image::{Image, ImageError, Keyring};
use inlinecrypt_fscrypt::verify::verify;

#[test]
fn every_file_is_found_by_its_name_and_read() {
    let (oracle, bytes) = oracle();
    let image = open(&oracle, bytes);
    assert_eq!(hex::encode(image.keys().identifiers().next().unwrap()), oracle.master_key_identifier);
    let mut files = 0;
    for made in &oracle.policies {
        for file in &made.files {
            let node = image.lookup(file.path.as_bytes()).unwrap_or_else(|e| panic!("{}: {e}", file.path));
            assert_eq!(node.inode.number, file.inode);
            assert_eq!(hex::encode(node.context.unwrap().nonce), file.nonce);
            assert!(contents(&image, &file.path).unwrap() == plaintext(file), "{}", file.path);
            files += 1;
        }
        if let Some(link) = &made.symlink {
            let node = image.lookup(link.path.as_bytes()).unwrap();
            assert_eq!(node.inode.number, link.inode);
            assert_eq!(image.target(&node).unwrap(), link.target.as_bytes());
        }
    }
    assert_eq!(files, 54);
}

#[test]
fn files_lie_where_linux_says() {
    let (oracle, bytes) = oracle();
    let image = open(&oracle, bytes);
    for file in oracle.policies.iter().flat_map(|made| &made.files) {
        let inode = image.fs().inode(file.inode).unwrap();
        assert_eq!(inode.size, file.size);
        let runs = image.fs().runs(&inode).unwrap();
        let ours: Vec<[u64; 3]> =
            runs.iter().map(|run| [run.logical * 4096, run.physical * 4096, run.blocks * 4096]).collect();
        let theirs: Vec<[u64; 3]> =
            file.extents.iter().map(|e| [e.logical_byte, e.image_byte, e.length]).collect();
        assert_eq!(ours, theirs, "{}", file.path);
    }
    for dir in oracle.policies.iter().flat_map(|made| &made.dirs) {
        let entries = image.fs().entries(&image.fs().inode(dir.inode).unwrap()).unwrap();
        let mut ours: Vec<(u32, String)> = entries.iter().map(|e| (e.inode, hex::encode(&e.name))).collect();
        let mut theirs: Vec<(u32, String)> =
            dir.entries.iter().map(|e| (e.inode, e.name_on_disk.clone())).collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs, "{}", dir.path);
    }
}

#[test]
fn without_the_key_there_are_no_names_and_no_contents() {
    let (oracle, bytes) = oracle();
    let image = Image::open(bytes, Keyring::default()).unwrap();
    let dir = image.lookup(b"xts_default").unwrap();
    let entries = image.entries(&dir).unwrap();
    assert_eq!(entries.len(), 10);
    for entry in &entries {
        assert!(entry.wrong.is_none());
        let name = str::from_utf8(&entry.name).unwrap();
        assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)), "{name}");
        // The no-key name is a name: it finds the same inode.
        let path = format!("xts_default/{name}");
        let node = image.lookup(path.as_bytes()).unwrap();
        assert_eq!(node.inode.number, entry.inode);
        if node.inode.kind == FileKind::Regular {
            assert!(matches!(contents(&image, &path), Err(ImageError::NoKey(_))), "{path}");
        }
    }
    assert!(matches!(image.lookup(b"xts_default/big"), Err(ImageError::NotFound)));
    // Another key is as good as none.
    let mut keys = Keyring::default();
    keys.add(MasterKey::raw(&[7; 64]).unwrap(), None);
    let (_, bytes) = self::oracle();
    let other = Image::open(bytes, keys).unwrap();
    assert_eq!(other.entries(&other.lookup(b"xts_default").unwrap()).unwrap(), entries);
    drop(oracle);
}

/// What is not encrypted, as another reader of ext4 sees it.
#[test]
fn another_reader_sees_the_same_where_nothing_is_encrypted() {
    let (oracle, bytes) = oracle();
    let theirs = ext4_view::Ext4::load(Box::new(bytes.clone())).unwrap();
    let image = open(&oracle, bytes);
    assert_eq!(*theirs.uuid().as_bytes(), image.fs().superblock().uuid);
    let mut names: Vec<Vec<u8>> =
        theirs.read_dir("/").unwrap().map(|entry| entry.unwrap().file_name().as_ref().to_vec()).collect();
    names.retain(|name| name != b"." && name != b"..");
    let root = image.lookup(b"/").unwrap();
    let mut ours: Vec<Vec<u8>> = image.entries(&root).unwrap().into_iter().map(|entry| entry.name).collect();
    names.sort();
    ours.sort();
    assert_eq!(ours, names);
}

#[test]
fn what_is_no_ext4_or_cut_short_is_refused() {
    let (_, bytes) = oracle();
    assert!(Ext4::open(vec![0; 4096]).is_err());
    assert!(Ext4::open(vec![0; 10]).is_err());
    let mut short = bytes;
    short.truncate(64 << 10);
    assert!(Ext4::open(short).is_err());
}

#[test]
fn all_of_it_is_as_policy_and_key_say_and_as_the_plaintext_gives() {
    let (oracle, bytes) = oracle();
    let image = open(&oracle, bytes);
    let alone = verify(&image, b"/", None).unwrap();
    assert_eq!(alone.problems, []);
    assert!(alone.is_good());
    let tree = plain_tree(&oracle);
    let beside = verify(&image, b"/", Some(tree.path())).unwrap();
    assert_eq!(beside.problems, []);
    assert_eq!(beside, alone);
    assert_eq!((alone.checked.files, alone.checked.links), (54, 6));
    assert!(alone.checked.bytes > 2 << 20, "{alone:?}");
    assert_eq!(alone.policies.len(), 10, "{:#?}", alone.policies);
}
