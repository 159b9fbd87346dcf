//! The image, what is known about it, and the plaintext that it was made of.

use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::ext4::Source;
use inlinecrypt_fscrypt::image::{Image, ImageError, Keyring};
use serde::Deserialize;
use shake::digest::{ExtendableOutput, Update, XofReader};
use std::io::Read as _;
use std::path::PathBuf;

#[derive(Deserialize)]
pub(crate) struct Oracle {
    pub(crate) master_key: String,
    pub(crate) master_key_identifier: String,
    pub(crate) policies: Vec<Made>,
}

#[derive(Deserialize)]
pub(crate) struct Made {
    pub(crate) symlink: Option<Link>,
    #[serde(default)]
    pub(crate) files: Vec<MadeFile>,
    #[serde(default)]
    pub(crate) dirs: Vec<MadeDir>,
}

#[derive(Deserialize)]
pub(crate) struct Link {
    pub(crate) path: String,
    pub(crate) target: String,
    pub(crate) inode: u32,
}

#[derive(Deserialize)]
pub(crate) struct MadeFile {
    pub(crate) path: String,
    pub(crate) inode: u32,
    pub(crate) size: u64,
    pub(crate) nonce: String,
    pub(crate) extents: Vec<Extent>,
    pub(crate) holes: Vec<[u64; 2]>,
}

#[derive(Deserialize)]
pub(crate) struct Extent {
    pub(crate) logical_byte: u64,
    pub(crate) image_byte: u64,
    pub(crate) length: u64,
}

#[derive(Deserialize)]
pub(crate) struct MadeDir {
    pub(crate) path: String,
    pub(crate) inode: u32,
    pub(crate) entries: Vec<MadeEntry>,
}

#[derive(Deserialize)]
pub(crate) struct MadeEntry {
    pub(crate) inode: u32,
    pub(crate) name_on_disk: String,
}

pub(crate) fn vectors() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

pub(crate) fn oracle() -> (Oracle, Vec<u8>) {
    let text = std::fs::read(vectors().join("fscrypt-host-6.18.json")).unwrap();
    (serde_json::from_slice(&text).unwrap(), decompress("fscrypt-host-6.18.img.zst"))
}

pub(crate) fn decompress(name: &str) -> Vec<u8> {
    let file = std::fs::File::open(vectors().join(name)).unwrap();
    let mut image = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut image).unwrap();
    image
}

pub(crate) fn open<S: Source>(oracle: &Oracle, image: S) -> Image<S> {
    let mut keys = Keyring::default();
    keys.add(MasterKey::raw(&hex::decode(&oracle.master_key).unwrap()).unwrap(), None);
    Image::open(image, keys).unwrap()
}

pub(crate) fn plaintext(file: &MadeFile) -> Vec<u8> {
    let mut hasher = shake::Shake256::default();
    hasher.update(format!("fscrypt-oracle:{}", file.path).as_bytes());
    let mut out = vec![0; usize::try_from(file.size).unwrap()];
    hasher.finalize_xof().read(&mut out);
    for [start, len] in &file.holes {
        out[usize::try_from(*start).unwrap()..][..usize::try_from(*len).unwrap()].fill(0);
    }
    out
}

pub(crate) fn contents<S: Source>(image: &Image<S>, path: &str) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    image.read(&image.lookup(path.as_bytes())?, &mut |piece| {
        out.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(out)
}

pub(crate) fn plain_tree(oracle: &Oracle) -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    for made in &oracle.policies {
        for dir in &made.dirs {
            std::fs::create_dir_all(tree.path().join(&dir.path)).unwrap();
        }
        for file in &made.files {
            std::fs::write(tree.path().join(&file.path), plaintext(file)).unwrap();
        }
        if let Some(link) = &made.symlink {
            std::os::unix::fs::symlink(&link.target, tree.path().join(&link.path)).unwrap();
        }
    }
    std::fs::create_dir(tree.path().join("lost+found")).unwrap();
    tree
}
