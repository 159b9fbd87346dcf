//! What lies on an image as context, name and link: any bytes. What is accepted is written back as it was.
#![no_main]

use inlinecrypt_fscrypt::file::{FileCipher, Place};
use inlinecrypt_fscrypt::names::{NamesCipher, no_key_name, no_key_target};
use inlinecrypt_fscrypt::{Context, MasterKey};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static KEYS: LazyLock<[MasterKey; 3]> = LazyLock::new(|| {
    [
        MasterKey::raw(&[7; 64]).expect("a key of 64 bytes"),
        MasterKey::raw(&[7; 16]).expect("a key of 16 bytes"),
        MasterKey::wrapped(&[7; 32], &(0..64).collect::<Vec<u8>>()).expect("an inline key of 64 bytes"),
    ]
});

fuzz_target!(|data: &[u8]| {
    let (bytes, rest) = data.split_at(data.len().min(40));
    let parsed = Context::parse(bytes).or_else(|_| Context::parse(&bytes[..bytes.len().min(28)]));
    let Ok(context) = parsed else { return };
    assert!(data.starts_with(&context.to_bytes()));
    let place = Place { uuid: [3; 16], inode: u32::from(rest.first().copied().unwrap_or(12)) };
    for key in KEYS.iter() {
        if let Ok(cipher) = FileCipher::new(key, &context, place, 4096) {
            let unit = cipher.unit_bytes() as usize;
            let mut unit = rest.iter().copied().chain(std::iter::repeat(0)).take(unit).collect::<Vec<u8>>();
            let plain = unit.clone();
            let index = rest.len() as u64 * 0x1234_5678_9abc;
            cipher.encrypt(index, &mut unit).expect("no engine");
            cipher.decrypt(index, &mut unit).expect("no engine");
            assert_eq!(unit, plain);
        }
        let Ok(cipher) = NamesCipher::new(key, &context, place) else { continue };
        if let Ok(name) = cipher.decrypt_name(rest) {
            assert_eq!(cipher.encrypt_name(&name).expect("it was one"), rest);
        }
        if let Ok(target) = cipher.decrypt_target(rest, 1024) {
            assert_eq!(cipher.encrypt_target(&target, 1024).expect("it was one"), rest);
        }
        if !rest.contains(&0)
            && !rest.contains(&b'/')
            && rest != b"."
            && rest != b".."
            && let Ok(ciphertext) = cipher.encrypt_name(rest)
        {
            assert_eq!(cipher.decrypt_name(&ciphertext).expect("a name"), rest);
        }
    }
    let _ = (no_key_name([1, 2], rest), no_key_target(rest));
});
