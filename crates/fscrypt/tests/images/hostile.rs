//! Images that somebody has bent: whatever their bytes are, reading ends, and nothing panics.
//!
//! `vectors/small.img.zst`: 320 KiB that Linux 6.18 wrote, blocks of 1 KiB, no checksums, so that every change gets through;
//! policies of both versions under the key 00 01 .. 3f, and files that are not encrypted. `fuzz/` starts from it, too.

use crate::rig::decompress;
use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::image::{Image, Keyring};
use inlinecrypt_fscrypt::verify::verify;
use proptest::prelude::*;
use std::io;
use std::sync::LazyLock;

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| decompress("small.img.zst"));

fn keys() -> Keyring {
    let key = || MasterKey::raw(&(0..64).collect::<Vec<u8>>()).unwrap();
    let mut keys = Keyring::default();
    keys.add(key(), None);
    keys.add(key(), Some([0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]));
    keys
}

/// Reads all that can be read.
fn read_all(bytes: Vec<u8>) {
    let Ok(image) = Image::open(bytes, keys()) else { return };
    let _ = verify(&image, b"/", None);
    for number in 1..=image.fs().superblock().inodes.min(64) {
        let Ok(node) = image.node(number) else { continue };
        let mut read = 0;
        let _ = image.read(&node, &mut |piece| {
            read += piece.len();
            // Holes have no end worth waiting for.
            if read < 1 << 22 { Ok(()) } else { Err(io::ErrorKind::FileTooLarge.into()) }
        });
        let _ = image.target(&node);
        let _ = image.entries(&node);
        let _ = image.first_dun(&node);
    }
}

#[test]
fn the_small_image_is_good() {
    let image = Image::open(SMALL.clone(), keys()).unwrap();
    let report = verify(&image, b"/", None).unwrap();
    assert_eq!(report.problems, []);
    assert_eq!((report.policies.len(), report.checked.files), (3, 13));
    read_all(SMALL.clone());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Bytes of the superblock, the descriptors, inodes and everything else, more often at the beginning.
    #[test]
    fn any_change_is_survived(
        changes in proptest::collection::vec(
            (prop_oneof![0..4096_usize, 0..32_768_usize, 0..327_680_usize], any::<u8>()), 1..12,
        ),
        cut in prop_oneof![9 => Just(327_680_usize), 1 => 0..327_680_usize],
    ) {
        let mut bytes = SMALL.clone();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate(cut);
        read_all(bytes);
    }
}
