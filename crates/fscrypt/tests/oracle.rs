//! An ext4 image that Linux's fscrypt wrote: names, contents and places of all its files, read; and written again, to the byte.

use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::ext4::{Ext4, FileKind, Source as _};
use inlinecrypt_fscrypt::image::{Image, ImageError, Keyring};
use serde::Deserialize;
use shake::digest::{ExtendableOutput, Update, XofReader};
use std::io::Read as _;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Oracle {
    master_key: String,
    master_key_identifier: String,
    policies: Vec<Made>,
}

#[derive(Deserialize)]
struct Made {
    symlink: Option<Link>,
    #[serde(default)]
    files: Vec<MadeFile>,
    #[serde(default)]
    dirs: Vec<MadeDir>,
}

#[derive(Deserialize)]
struct Link {
    path: String,
    target: String,
    inode: u32,
}

#[derive(Deserialize)]
struct MadeFile {
    path: String,
    inode: u32,
    size: u64,
    nonce: String,
    extents: Vec<Extent>,
    holes: Vec<[u64; 2]>,
}

#[derive(Deserialize)]
struct Extent {
    logical_byte: u64,
    image_byte: u64,
    length: u64,
}

#[derive(Deserialize)]
struct MadeDir {
    path: String,
    inode: u32,
    entries: Vec<MadeEntry>,
}

#[derive(Deserialize)]
struct MadeEntry {
    inode: u32,
    name_on_disk: String,
}

fn vectors() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

fn oracle() -> (Oracle, Vec<u8>) {
    let text = std::fs::read(vectors().join("fscrypt-host-6.18.json")).unwrap();
    let file = std::fs::File::open(vectors().join("fscrypt-host-6.18.img.zst")).unwrap();
    let mut image = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut image).unwrap();
    (serde_json::from_slice(&text).unwrap(), image)
}

fn open(oracle: &Oracle, image: Vec<u8>) -> Image<Vec<u8>> {
    let mut keys = Keyring::default();
    keys.add(MasterKey::raw(&hex::decode(&oracle.master_key).unwrap()).unwrap(), None);
    Image::open(image, keys).unwrap()
}

fn plaintext(file: &MadeFile) -> Vec<u8> {
    let mut hasher = shake::Shake256::default();
    hasher.update(format!("fscrypt-oracle:{}", file.path).as_bytes());
    let mut out = vec![0; usize::try_from(file.size).unwrap()];
    hasher.finalize_xof().read(&mut out);
    for [start, len] in &file.holes {
        out[usize::try_from(*start).unwrap()..][..usize::try_from(*len).unwrap()].fill(0);
    }
    out
}

fn contents(image: &Image<Vec<u8>>, path: &str) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    image.read(&image.lookup(path.as_bytes())?, &mut |piece| {
        out.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(out)
}

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
    let mut short = bytes.clone();
    short.truncate(64 << 10);
    let fs = Ext4::open(short).unwrap();
    assert!(fs.inode(12).is_err());
    let mut superblock = [0; 16];
    bytes.read_at(1024, &mut superblock).unwrap();
    assert_ne!(superblock, [0; 16]);
}
