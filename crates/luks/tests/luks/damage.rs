//! Headers that are damaged, old, or made to do harm: each has its clear error, and none a panic.

use crate::common::{CHEAP, HEADER_BYTES, container, key, opens, random};
use inlinecrypt_luks::luks2::{Container, CopyState, Header};
use inlinecrypt_luks::{Error, ErrorKind, Kind, detect, luks1};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const COPY: usize = 16 << 10;

/// Writes a right checksum over a copy.
fn sum(disk: &mut [u8], copy: usize) {
    let bytes = &mut disk[copy..copy + COPY];
    bytes[448..512].fill(0);
    let digest = Sha256::digest(&*bytes);
    bytes[448..480].copy_from_slice(&digest);
}

/// Both copies with another JSON, and right checksums.
fn with_json(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json = Value::Object(Header::read(&mut container()).unwrap().metadata.json().clone());
    change(&mut json);
    with_json_of(&json)
}

/// The same with this JSON.
pub(crate) fn with_json_of(json: &Value) -> Vec<u8> {
    with_json_on(container(), json)
}

/// What is on `disk`, with this JSON.
pub(crate) fn with_json_on(mut disk: Vec<u8>, json: &Value) -> Vec<u8> {
    let text = serde_json::to_vec(json).unwrap();
    for copy in [0, COPY] {
        disk[copy + 4096..copy + COPY].fill(0);
        disk[copy + 4096..][..text.len()].copy_from_slice(&text);
        sum(&mut disk, copy);
    }
    disk
}

#[track_caller]
fn refused(mut disk: Vec<u8>, kind: ErrorKind, saying: &str) -> Error {
    let error = Header::read(&mut disk).expect_err("it is refused");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(saying), "{saying:?} is missing: {error}");
    error
}

#[test]
fn either_copy_is_enough() {
    let good = container();
    for (copy, states) in [(0, [false, true]), (COPY, [true, false])] {
        // The magic, the binary part, the JSON, what is behind it, the checksum.
        for at in [0, 20, 260, 450, 4096, 4200, COPY - 1] {
            let mut disk = good.clone();
            disk[copy + at] ^= 0x41;
            let mut found = Container::read(disk).unwrap();
            let are_good = found.header().copies.clone().map(|state| state == CopyState::Good);
            assert_eq!(are_good, states, "{copy} {at}");
            assert_eq!(opens(&mut found, &["zero", "one"]).len(), 2);
            assert!(found.repair(&mut random(9)).unwrap());
            let mended = Container::read(found.into_storage()).unwrap();
            assert!(mended.header().is_whole());
        }
    }
    let mut first_gone = good.clone();
    first_gone[..COPY].fill(0);
    assert_eq!(detect(&mut first_gone).unwrap(), Some(Kind::Luks2SecondOnly));
    assert_eq!(Header::read(&mut first_gone).unwrap().label, "test");
}

#[test]
fn the_newer_copy_counts() {
    let old = container();
    let mut newer = Container::read(old.clone()).unwrap();
    newer.set_label(Some("newer"), None, &mut random(3)).unwrap();
    let newer = newer.into_storage();
    for (first, second, states) in [
        (&newer, &old, [CopyState::Good, CopyState::Older]),
        (&old, &newer, [CopyState::Older, CopyState::Good]),
    ] {
        let mut disk = first.clone();
        disk[COPY..2 * COPY].copy_from_slice(&second[COPY..2 * COPY]);
        let header = Header::read(&mut disk).unwrap();
        assert_eq!((header.label.as_str(), &header.copies), ("newer", &states));
    }
}

#[test]
fn with_neither_copy_it_is_told_why() {
    let mut disk = container();
    disk[4200] ^= 1;
    disk[COPY + 4200] ^= 1;
    let error = refused(disk, ErrorKind::Damaged, "neither copy");
    assert!(error.to_string().matches("checksum").count() == 2 && error.advice().contains("header-restore"));
    refused(vec![0; 1 << 20], ErrorKind::NotLuks, "no LUKS2 header");
    refused(Vec::new(), ErrorKind::NotLuks, "no LUKS2 header");
    let mut version = container();
    for copy in [0, COPY] {
        version[copy + 7] = 3;
        sum(&mut version, copy);
    }
    refused(version, ErrorKind::Unsupported, "version 3");
}

#[test]
fn every_truncation_is_told_and_none_is_a_panic() {
    let whole = container();
    for len in (0..2 * COPY).step_by(509).chain([4095, 4096, COPY - 1, COPY, 2 * COPY - 1]) {
        let mut disk = whole[..len].to_vec();
        match Header::read(&mut disk) {
            // The first copy is there.
            Ok(header) => assert!(len >= COPY && !header.is_whole(), "{len}"),
            Err(error) => assert!(len < COPY, "{len}: {error}"),
        }
    }
    // Header and no areas.
    let mut container = Container::read(whole[..2 * COPY].to_vec()).unwrap();
    assert_eq!(container.open(b"zero", None).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn numbers_that_cannot_be_are_refused_though_the_checksum_is_right() {
    for (at, bytes, saying) in [
        (8, (12_345_u64).to_be_bytes(), "12345 bytes"),
        (8, u64::MAX.to_be_bytes(), "bytes, which no header has"),
        (8, (4_u64 << 20).to_be_bytes(), ""),
        (256, 7_u64.to_be_bytes(), "lie at byte 7"),
        (72, *b"nonsense", "hash"),
        (24, [0xff; 8], "label"),
    ] {
        let mut disk = container();
        for copy in [0, COPY] {
            disk[copy + at..][..8].copy_from_slice(&bytes);
            sum(&mut disk, copy);
        }
        let error = Header::read(&mut disk).expect_err(saying);
        assert!(error.to_string().contains(saying), "{error}");
    }
}

#[test]
fn json_that_cannot_be_is_refused_though_the_checksum_is_right() {
    type Change = fn(&mut Value);
    let cases: &[(Change, &str)] = &[
        (|json| *json = json!([]), "no object"),
        (|json| json["config"]["json_size"] = "99".into(), "99 bytes of room"),
        (|json| json["config"]["keyslots_size"] = "1".into(), "areas of LUKS keyslots have 1 bytes"),
        (|json| json["config"]["keyslots_size"] = "18446744073709547520".into(), "which none have"),
        (|json| drop(json.as_object_mut().unwrap().remove("segments")), "no segments"),
        (|json| json["keyslots"]["0"]["area"]["offset"] = 32768.into(), "LUKS keyslot 0"),
        (|json| json["keyslots"]["0"]["area"]["offset"] = "0".into(), "LUKS keyslot 0 lies at byte 0"),
        (
            |json| json["keyslots"]["0"]["area"]["offset"] = "18446744073709551615".into(),
            "LUKS keyslot 0 lies at",
        ),
        (
            |json| json["keyslots"]["0"]["area"]["size"] = "18446744073709551615".into(),
            "LUKS keyslot 0 lies at",
        ),
        (|json| json["keyslots"]["0"]["area"]["size"] = "512".into(), "does not fit"),
        (
            |json| json["keyslots"]["0"]["area"]["offset"] = json["keyslots"]["1"]["area"]["offset"].clone(),
            "overlap",
        ),
        (|json| json["keyslots"]["0"]["key_size"] = 0.into(), "0 bytes"),
        (|json| json["keyslots"]["0"]["key_size"] = 4_000_000_000_u32.into(), "4000000000 bytes"),
        (|json| json["keyslots"]["0"]["key_size"] = (-1).into(), "LUKS keyslot 0"),
        (|json| json["keyslots"]["0"]["af"]["stripes"] = 4_000_000_000_u32.into(), "4000000000 stripes"),
        (|json| json["keyslots"]["0"]["kdf"]["salt"] = "!".into(), "base64"),
        (|json| json["keyslots"]["32"] = json["keyslots"]["0"].clone(), "\"32\""),
        (|json| json["keyslots"]["x"] = json!({}), "\"x\""),
        (|json| json["keyslots"]["01"] = json["keyslots"]["1"].take(), "\"01\""),
        (|json| json["tokens"]["0"] = 7.into(), "among its tokens"),
        (|json| json["segments"]["0"]["offset"] = "7".into(), "whole sectors"),
        (|json| json["segments"]["0"]["size"] = "0".into(), "whole sectors"),
        (|json| json["segments"]["0"]["size"] = "all".into(), "\"all\""),
        (|json| json["segments"]["0"]["size"] = "18446744073709551104".into(), "nothing can end"),
        (|json| json["segments"]["0"]["sector_size"] = 3.into(), "sectors of 3"),
        (
            |json| drop(json["segments"]["0"].as_object_mut().unwrap().remove("encryption")),
            "how it is encrypted",
        ),
        (|json| json["digests"]["0"]["keyslots"] = json!(["9"]), "not there"),
        (|json| json["digests"]["0"]["segments"] = json!(["1"]), "not there"),
        (|json| json["digests"]["0"]["digest"] = "AAAA".into(), "3 bytes"),
    ];
    for (change, saying) in cases {
        refused(with_json(*change), ErrorKind::Damaged, saying);
    }
}

#[test]
fn what_is_not_done_here_is_said_when_the_data_is_asked_for() {
    let data = |change: fn(&mut Value)| {
        let header = Header::read(&mut with_json(change)).unwrap();
        let error = header.metadata.data().expect_err("refused");
        (error.kind(), error.to_string())
    };
    type Change = fn(&mut Value);
    let cases: &[(Change, &str)] = &[
        (
            |json| json["config"]["requirements"] = json!({ "mandatory": ["online-reencrypt-v2"] }),
            "re-encrypted",
        ),
        (|json| json["config"]["requirements"] = json!({ "mandatory": ["opal"] }), "opal"),
        (|json| json["config"]["requirements"] = json!({ "mandatory": "x" }), "unknown"),
        (|json| json["segments"]["0"]["integrity"] = json!({ "type": "hmac(sha256)" }), "integrity"),
        (|json| json["segments"]["0"]["type"] = "linear".into(), "\"linear\""),
        (|json| json["segments"]["1"] = json["segments"]["0"].clone(), "2 segments"),
    ];
    for (change, saying) in cases {
        let (kind, text) = data(*change);
        assert_eq!(kind, ErrorKind::Unsupported);
        assert!(text.contains(saying), "{text}");
    }
    assert!(Header::read(&mut container()).unwrap().metadata.data().is_ok());
}

#[test]
fn a_cost_that_is_an_attack_is_refused_at_once_and_the_others_are_tried() {
    let costly: fn(&mut Value) = |json| {
        json["keyslots"]["0"]["kdf"] = json!({ "type": "argon2id", "time": 4_000_000_000_u32, "memory": 4_000_000_000_u32, "cpus": 4, "salt": "AAAAAAAAAAAAAAAAAAAAAA==" });
    };
    let mut container = Container::read(with_json(costly)).unwrap();
    let error = container.open(b"zero", None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cost, "{error}");
    assert_eq!(container.open(b"one", None).unwrap().keyslot, 1);
    let digest: fn(&mut Value) = |json| json["digests"]["0"]["iterations"] = 4_000_000_000_u32.into();
    assert_eq!(
        Container::read(with_json(digest)).unwrap().open(b"zero", None).unwrap_err().kind(),
        ErrorKind::Cost
    );
}

#[test]
fn what_is_not_known_is_kept_as_it_is() {
    let strange: fn(&mut Value) = |json| {
        json["config"]["flags"] = json!(["allow-discards"]);
        json["config"]["more"] = json!({ "x": 1.5 });
        json["keyslots"]["0"]["more"] = "y".into();
        json["keyslots"]["5"] =
            json!({ "type": "of-tomorrow", "area": { "type": "raw", "offset": "548864", "size": "516096" } });
        json["tomorrow"] = json!([1, 2]);
    };
    let mut container = Container::read(with_json(strange)).unwrap();
    let before = container.header().metadata.json().clone();
    let added = container.add_keyslot(&key(), 0, b"two", CHEAP, None, &mut random(8)).unwrap_err();
    // Three areas are there, one of them unknown, and its place is not given away.
    assert!(added.to_string().contains("no room"), "{added}");
    container.change_keyslot(1, &key(), b"two", CHEAP, &mut random(8)).unwrap_err();
    container.remove_keyslots(&[1], &mut random(8)).unwrap();
    let after = Header::read(&mut container.into_storage()).unwrap().metadata.json().clone();
    for name in ["config", "segments", "tomorrow"] {
        assert_eq!(before[name], after[name], "{name}");
    }
    assert_eq!(before["keyslots"]["5"], after["keyslots"]["5"]);
    assert_eq!(before["keyslots"]["0"], after["keyslots"]["0"]);
    assert_eq!(after["tokens"]["0"]["secret"], json!([1, { "a": null }]));
    assert_eq!(after["tokens"]["0"]["keyslots"], json!([]));
}

#[test]
fn a_full_header_refuses_more_and_is_not_touched() {
    let mut container = Container::read(container()).unwrap();
    let before = container.header().sequence_id;
    let large = json!({ "type": "large", "keyslots": [], "text": "x".repeat(12 << 10) });
    let error = container.add_token(large, &mut random(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("bytes of JSON"), "{error}");
    assert_eq!(Container::read(container.into_storage()).unwrap().header().sequence_id, before);
}

#[test]
fn luks1_headers_that_cannot_be_are_refused() {
    let mut good = vec![0; 1 << 20];
    good[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x01");
    good[8..11].copy_from_slice(b"aes");
    good[40..51].copy_from_slice(b"xts-plain64");
    good[72..78].copy_from_slice(b"sha256");
    good[104..112].copy_from_slice(&[0, 0, 8, 0, 0, 0, 0, 64]);
    for slot in 0..8 {
        good[208 + 48 * slot..][..4].copy_from_slice(&0xdead_u32.to_be_bytes());
    }
    good[208..216].copy_from_slice(&[0, 0xac, 0x71, 0xf3, 0, 0, 0, 1]);
    good[248..256].copy_from_slice(&[0, 0, 0, 8, 0, 0, 0x0f, 0xa0]);
    assert_eq!(luks1::Header::read(&mut good).unwrap().keyslots().len(), 1);
    for (at, bytes, saying) in [
        (108, [0xff_u8; 4], "volume key"),
        (208, [1; 4], "neither on nor off"),
        (248, [0xff; 4], "lies where none can be"),
        (248, [0; 4], "lies where none can be"),
        (252, [0xff; 4], "lies where none can be"),
        (252, [0; 4], "lies where none can be"),
        (72, *b"ripe", "hash"),
        (8, [0xff; 4], "cipher"),
    ] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&bytes);
        let error = luks1::Header::read(&mut bad).expect_err(saying);
        assert!(error.to_string().contains(saying), "{error}");
    }
    for len in [0, 6, 8, 591] {
        assert!(luks1::Header::read(&mut good[..len].to_vec()).is_err());
    }
    assert_eq!(HEADER_BYTES % 4096, 0);
}

#[test]
fn a_wrong_passphrase_is_one_also_where_a_keyslot_is_of_an_unknown_cipher() {
    let strange: fn(&mut Value) =
        |json| json["keyslots"]["0"]["area"]["encryption"] = "serpent-xts-plain64".into();
    let mut container = Container::read(with_json(strange)).unwrap();
    let error = container.open(b"wrong", None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Passphrase, "{error}");
    assert!(error.to_string().contains("not tried: LUKS keyslot 0: "), "{error}");
    assert_eq!(container.open(b"one", None).unwrap().keyslot, 1);
    let error = container.open(b"zero", Some(0)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}
