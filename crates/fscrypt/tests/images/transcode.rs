//! Turns a tree of the image into one with another policy or key, as Linux would have written it: for what no kernel at hand
//! encrypts with. Contexts, names, contents and link targets change, and the checksums over them; nothing moves.

use inlinecrypt_fscrypt::ext4::{Ext4, FileKind, Inode, Source as _};
use inlinecrypt_fscrypt::file::{FileCipher, Place};
use inlinecrypt_fscrypt::master::MasterKey;
use inlinecrypt_fscrypt::names::NamesCipher;
use inlinecrypt_fscrypt::policy::{Context, Policy};

/// The image's blocks and inodes.
const BLOCK: usize = 4096;
const INODE: usize = 256;

/// Encrypts the directory `top` and all below it anew. Every policy pads to 32 bytes, so that nothing changes its length.
pub(crate) fn transcode(image: &mut Vec<u8>, top: u32, old: &MasterKey, new: &MasterKey, policy: Policy) {
    let fs = Ext4::open(image.clone()).unwrap();
    let uuid = fs.superblock().uuid;
    let mut pending = vec![top];
    while let Some(number) = pending.pop() {
        let inode = fs.inode(number).unwrap();
        let from = Context::parse(inode.context.as_ref().unwrap()).unwrap();
        let to = Context { policy, nonce: from.nonce };
        let place = Place { uuid, inode: number };
        let names = || {
            let old = NamesCipher::new(old, &from, place).unwrap();
            (old, NamesCipher::new(new, &to, place).unwrap())
        };
        match inode.kind {
            FileKind::Regular => {
                let old = FileCipher::new(old, &from, place, 4096).unwrap();
                let new = FileCipher::new(new, &to, place, 4096).unwrap();
                for (start, logical, len) in runs(&fs, &inode) {
                    let data = &mut image[start..start + len];
                    old.decrypt(logical / u64::from(old.unit_bytes()), data).unwrap();
                    new.encrypt(logical / u64::from(new.unit_bytes()), data).unwrap();
                }
            }
            FileKind::Link => {
                let (old, new) = names();
                let target = old.decrypt_target(&fs.link_data(&inode).unwrap(), 4096).unwrap();
                let data = new.encrypt_target(&target, 4096).unwrap();
                let (start, ..) = runs(&fs, &inode)[0];
                image[start..start + data.len()].copy_from_slice(&data);
            }
            FileKind::Directory => {
                let (old, new) = names();
                let (start, ..) = runs(&fs, &inode)[0];
                for entry in fs.entries(&inode).unwrap().iter().filter(|entry| !entry.is_dots()) {
                    let name = new.encrypt_name(&old.decrypt_name(&entry.name).unwrap()).unwrap();
                    assert_eq!(name.len(), entry.name.len());
                    let at =
                        image[start..start + BLOCK].windows(name.len()).position(|bytes| bytes == entry.name);
                    image[start + at.unwrap()..][..name.len()].copy_from_slice(&name);
                    pending.push(entry.inode);
                }
                let seed = own_seed(image, number);
                let sum = crc(seed, &image[start..start + BLOCK - 12]).to_le_bytes();
                image[start + BLOCK - 4..start + BLOCK].copy_from_slice(&sum);
            }
            FileKind::Special => {}
        }
        replace_context(image, number, &from.to_bytes(), &to.to_bytes());
    }
}

/// Where an inode's blocks are: byte of the image, byte of the file, length.
fn runs(fs: &Ext4<Vec<u8>>, inode: &Inode) -> Vec<(usize, u64, usize)> {
    let place = |number: u64| usize::try_from(number).unwrap() * BLOCK;
    let runs = fs.runs(inode).unwrap().into_iter();
    runs.map(|run| (place(run.physical), run.logical * 4096, place(run.blocks))).collect()
}

/// The byte of the image where an inode is: all are in the first group, whose descriptor says where.
pub(crate) fn inode_at(image: &Vec<u8>, number: u32) -> usize {
    let mut table = [0; 4];
    image.read_at(BLOCK as u64 + 8, &mut table).unwrap();
    u32::from_le_bytes(table) as usize * BLOCK + (number as usize - 1) * INODE
}

fn replace_context(image: &mut Vec<u8>, number: u32, from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len(), "a context of another version has another length");
    let start = inode_at(image, number);
    let at = image[start..start + INODE].windows(from.len()).position(|bytes| bytes == from).unwrap();
    image[start + at..][..to.len()].copy_from_slice(to);
    fix_inode(image, number);
}

/// Makes an inode's checksum right.
pub(crate) fn fix_inode(image: &mut Vec<u8>, number: u32) {
    let start = inode_at(image, number);
    image[start + 0x7c..start + 0x7e].fill(0);
    image[start + 0x82..start + 0x84].fill(0);
    let sum = crc(own_seed(image, number), &image[start..start + INODE]).to_le_bytes();
    image[start + 0x7c..start + 0x7e].copy_from_slice(&sum[..2]);
    image[start + 0x82..start + 0x84].copy_from_slice(&sum[2..]);
}

/// What checksums of an inode begin with.
fn own_seed(image: &Vec<u8>, number: u32) -> u32 {
    let start = inode_at(image, number);
    let uuid = crc(!0, &image[1024 + 0x68..1024 + 0x78]);
    crc(crc(uuid, &number.to_le_bytes()), &image[start + 0x64..start + 0x68])
}

fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
