//! An ext4 image with changes: each is three bytes of place and one of content. Reading it ends, and nothing panics.
#![no_main]

use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::image::{Image, Keyring};
use inlinecrypt_fscrypt::verify::verify;
use libfuzzer_sys::fuzz_target;
use std::io::{self, Read as _};
use std::sync::LazyLock;

/// Without checksums, so that changes get through.
static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let packed: &[u8] = include_bytes!("../../crates/fscrypt/vectors/small.img.zst");
    let mut image = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(packed)
        .expect("packed with zstd")
        .read_to_end(&mut image)
        .expect("packed with zstd");
    image
});

fuzz_target!(|data: &[u8]| {
    let mut image = SMALL.clone();
    for change in data.as_chunks::<4>().0 {
        let [low, middle, high, byte] = *change;
        let at = u32::from_le_bytes([low, middle, high, 0]) as usize % image.len();
        image[at] = byte;
    }
    let key = || MasterKey::raw(&(0..64).collect::<Vec<u8>>()).expect("a key of 64 bytes");
    let mut keys = Keyring::default();
    keys.add(key(), None);
    keys.add(key(), Some([0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]));
    let Ok(image) = Image::open(image, keys) else { return };
    let _ = verify(&image, b"/", None);
    for number in 1..=image.fs().superblock().inodes.min(64) {
        let Ok(node) = image.node(number) else { continue };
        let mut read = 0;
        let _ = image.read(&node, &mut |piece| {
            read += piece.len();
            if read < 1 << 22 { Ok(()) } else { Err(io::ErrorKind::FileTooLarge.into()) }
        });
        let _ = image.target(&node);
        let _ = image.entries(&node);
        let _ = image.first_dun(&node);
    }
});
