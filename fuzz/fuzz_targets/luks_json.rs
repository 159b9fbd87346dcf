//! A LUKS2 header with whatever JSON, under a right checksum: read, and changed in every way. What is written is read again.
//!
//! The input is JSON, or what is put in place of values of a good one, which is being re-encrypted if the first byte is `R`: number of
//! the value, its new value, 0xff.
#![no_main]

use inlinecrypt_luks::kdf::Kdf;
use inlinecrypt_luks::luks2::{Container, Header, Kept, NewData, Opened, Others, Resilience};
use inlinecrypt_luks::{Hash, encryption};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

const SIZE: usize = 16 << 10;
const AREAS: usize = 512 << 10;

fn disk(json: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; 2 * SIZE + AREAS];
    let copy = &mut disk[..SIZE];
    copy[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x02");
    copy[8..16].copy_from_slice(&(SIZE as u64).to_be_bytes());
    copy[72..78].copy_from_slice(b"sha256");
    let len = json.len().min(SIZE - 4096 - 1);
    copy[4096..][..len].copy_from_slice(&json[..len]);
    let sum = Sha256::digest(&*copy);
    copy[448..480].copy_from_slice(&sum);
    disk
}

/// What cryptsetup writes, but for its salts.
const GOOD: &str = r#"{"keyslots":{"0":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},
"area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},
"kdf":{"type":"argon2id","time":4,"memory":8192,"cpus":1,"salt":"X/UGotSwDWrY0HGXljRnVyVPJaKet2rdPDGagFaUF+0="}}},
"tokens":{"0":{"type":"x","keyslots":["0"]}},
"segments":{"0":{"type":"crypt","offset":"557056","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512}},
"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1000,
"salt":"Ru9Dmi0H30ULysJ1G9Get1Ro5oWXFQVBnu0XSrDM7vM=","digest":"a+HxTrvoQYCQcR83PMEEFOmkZqK2orEY+wTsmnCbGJc="}},
"config":{"json_size":"12288","keyslots_size":"524288"}}"#;

/// Calls `with` for value `number` of all in `json`.
fn nth(json: &mut Value, number: &mut usize, with: &mut dyn FnMut(&mut Value)) {
    if *number == 0 {
        with(json);
    }
    *number = number.wrapping_sub(1);
    match json {
        Value::Array(list) => list.iter_mut().for_each(|value| nth(value, number, with)),
        Value::Object(map) => map.values_mut().for_each(|value| nth(value, number, with)),
        _ => {}
    }
}

/// The same while it is re-encrypted, in the middle of a zone.
const REENCRYPTED: &str = r#"{"keyslots":{"0":{"type":"luks2","key_size":32,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},
"area":{"type":"raw","offset":"32768","size":"131072","encryption":"aes-xts-plain64","key_size":32},
"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1,"salt":"X/UGotSwDWrY0HGXljRnVyVPJaKet2rdPDGagFaUF+0="}},
"1":{"type":"reencrypt","key_size":1,"mode":"reencrypt","direction":"forward",
"area":{"type":"checksum","offset":"163840","size":"393216","hash":"sha256","sector_size":512}}},
"tokens":{},
"segments":{"0":{"type":"crypt","offset":"557056","size":"4096","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512},
"1":{"type":"crypt","offset":"561152","size":"4096","iv_tweak":"8","encryption":"aes-xts-plain64","sector_size":512,"flags":["in-reencryption"]},
"2":{"type":"crypt","offset":"565248","size":"dynamic","iv_tweak":"16","encryption":"aes-xts-plain64","sector_size":512},
"3":{"type":"crypt","offset":"557056","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512,"flags":["backup-previous"]},
"4":{"type":"crypt","offset":"557056","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512,"flags":["backup-final"]}},
"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["1","2","3"],"hash":"sha256","iterations":1000,
"salt":"Ru9Dmi0H30ULysJ1G9Get1Ro5oWXFQVBnu0XSrDM7vM=","digest":"a+HxTrvoQYCQcR83PMEEFOmkZqK2orEY+wTsmnCbGJc="},
"1":{"type":"pbkdf2","keyslots":[],"segments":["0","1","4"],"hash":"sha256","iterations":1000,
"salt":"Ru9Dmi0H30ULysJ1G9Get1Ro5oWXFQVBnu0XSrDM7vM=","digest":"a+HxTrvoQYCQcR83PMEEFOmkZqK2orEY+wTsmnCbGJc="},
"2":{"type":"pbkdf2","keyslots":["1"],"segments":[],"hash":"sha256","iterations":1000,
"salt":"Ru9Dmi0H30ULysJ1G9Get1Ro5oWXFQVBnu0XSrDM7vM=","digest":"a+HxTrvoQYCQcR83PMEEFOmkZqK2orEY+wTsmnCbGJc="}},
"config":{"json_size":"12288","keyslots_size":"524288","requirements":{"mandatory":["online-reencrypt-v2"]}}}"#;

fn json(data: &[u8]) -> Vec<u8> {
    let (good, data) = match data {
        [b'{', ..] => return data.to_vec(),
        [b'R', rest @ ..] => (REENCRYPTED, rest),
        _ => (GOOD, data),
    };
    let mut json: Value = serde_json::from_str(good).expect("it is good");
    for edit in data.split(|&byte| byte == 0xff) {
        let Some((&number, value)) = edit.split_first() else { continue };
        let text = || Value::String(String::from_utf8_lossy(value).into_owned());
        let value = serde_json::from_slice(value).unwrap_or_else(|_| text());
        nth(&mut json, &mut usize::from(number % 192), &mut |old| *old = value.clone());
    }
    serde_json::to_vec(&json).expect("it is JSON")
}

/// Changes a container, and reads what is on its disk afterwards.
fn change(disk: &[u8], change: impl FnOnce(&mut Container<Vec<u8>>) -> bool) {
    let mut container = Container::read(disk.to_vec()).expect("it was read before");
    let changed = change(&mut container);
    let mut after = container.into_storage();
    let header = Header::read(&mut after).expect("what is written can be read");
    assert!(!changed || header.is_whole());
}

fuzz_target!(|data: &[u8]| {
    let disk = disk(&json(data));
    let Ok(header) = Header::read(&mut disk.clone()) else { return };
    let metadata = &header.metadata;
    let _ = metadata.data();
    let _ = metadata.requirements();
    let _ = metadata.reencryption();
    for (number, slot) in metadata.keyslots() {
        assert!(slot.area_offset >= 2 * SIZE as u64, "LUKS keyslot {number}");
        if let Ok(kdf) = &slot.kdf {
            let _ = kdf.check();
        }
    }
    for number in metadata.segments().keys() {
        let _ = metadata.digest_of(*number);
    }
    let numbers: Vec<u32> = metadata.keyslots().keys().copied().collect();
    let mut random = |bytes: &mut [u8]| {
        bytes.fill(0xa5);
        Ok(())
    };
    change(&disk, |container| container.repair(&mut random).is_ok());
    change(&disk, |container| container.resize(Some(4096), &mut random).is_ok());
    change(&disk, |container| container.set_label(Some("label"), None, &mut random).is_ok());
    change(&disk, |container| {
        container.add_token(serde_json::json!({ "type": "x", "keyslots": [] }), &mut random).is_ok()
    });
    change(&disk, |container| container.erase("x", &mut random).is_ok());
    if let Ok(Some(re)) = metadata.reencryption() {
        assert!(re.area_offset >= 2 * SIZE as u64 && re.hot_bytes.is_none_or(|_| re.boundary.is_some()));
        for hot in [None, Some(4096), Some((1 << 20) - 4096)] {
            change(&disk, |container| container.set_boundary(4096, hot, 1 << 20, &mut random).is_ok());
        }
        change(&disk, |container| container.finish_reencryption(&mut random).is_ok());
    } else if !numbers.is_empty() {
        let opened = |number: &u32| Opened { keyslot: *number, digest: 0, key: vec![7; 64].into() };
        let resilience = Resilience::Checksum { hash: Hash::Sha256, block_bytes: 512 };
        let mode = encryption::mode("aes-xts-plain64", 64).expect("it is known");
        let (sector_bytes, zone_bytes_min) = (512, 4096);
        let new = NewData { mode, sector_bytes, key: &[3; 64], iterations: 1, resilience, zone_bytes_min };
        // What a LUKS keyslot costs is another's.
        let is_cheap = |number: &&u32| {
            matches!(metadata.keyslots()[*number].kdf, Ok(Kdf::Pbkdf2 { iterations, .. }) if iterations < 10)
        };
        let cheap: Vec<&u32> = numbers.iter().filter(is_cheap).take(3).collect();
        // One alone, and several.
        for (kept, others) in [(&cheap[..cheap.len().min(1)], Others::Dropped), (&cheap, Others::Refused)] {
            let kept: Vec<Kept> =
                kept.iter().map(|number| Kept { opened: opened(number), passphrase: b"" }).collect();
            change(&disk, |container| {
                let begun = container.begin_reencryption(&kept, others, new, &mut random).is_ok();
                assert!(!begun || container.reencryption().is_ok());
                begun
            });
        }
    }
    if !numbers.is_empty() {
        change(&disk, |container| container.remove_keyslots(&numbers[..1], &mut random).is_ok());
    }
});
