//! A disk with whatever on it, taken for LUKS1 and LUKS2.
#![no_main]

use inlinecrypt_luks::{detect, luks1, luks2};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut disk = data.to_vec();
    let _ = detect(&mut disk);
    if let Ok(header) = luks1::Header::read(&mut disk) {
        let _ = header.mode();
    }
    if let Ok(header) = luks2::Header::read(&mut disk) {
        let _ = header.metadata.data();
    }
});
