use crate::place::{Place, Said};
use inlinecrypt_cipher::Mode;
use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key, software_secret};
use inlinecrypt_cipher::names::NamesMode;
use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::policy::{ContentsMode, Derivation, KeyRef, Policy};
use std::fs;
use std::io::Read as _;
use std::path::PathBuf;

#[path = "../../../fscrypt/tests/images/transcode.rs"]
mod transcode;

const IDENTIFIER: &str = "8699c2c53707405da5aba5ae4d8583c0";

fn image() -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fscrypt/vectors/fscrypt-host-6.18.img.zst");
    let mut image = Vec::new();
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(fs::File::open(path).unwrap()).unwrap();
    decoder.read_to_end(&mut image).unwrap();
    image
}

/// The image that Linux wrote, and its key.
fn place() -> Place {
    let place = Place::new();
    fs::write(place.path("disk"), image()).unwrap();
    place.write("key", &(0..64).collect::<Vec<u8>>());
    place
}

/// Checks that it printed something, and then failed in two lines with this code.
#[track_caller]
fn failed(said: &Said, code: i32, saying: &[&str]) {
    assert_eq!(said.code, Some(code), "{said}");
    for text in saying {
        assert!(said.err.contains(text) || said.out.contains(text), "{text:?} is missing: {said}");
    }
}

#[test]
fn an_image_of_linux_is_listed_read_and_verified() {
    let place = place();
    let listed = place.run(["fscrypt", "ls", "disk", "xts_lblk32", "--key", "raw:key"]);
    let names: Vec<&str> = listed.done().out.lines().map(|name| &name[..name.len().min(8)]).collect();
    assert_eq!(
        names,
        ["b4095", "b4096", "b5000", "big", "empty", "link", "nnnnnnnn", "one-byte", "sparse", "sub"]
    );
    let long = place.run(["fscrypt", "ls", "-lR", "disk", "--key", "raw:key"]);
    assert!(long.done().out.contains("xts_du512/link -> target-of-the-link/"), "{long}");
    let json = place.run(["fscrypt", "ls", "--json", "disk", "xts_default", "--key", "raw:key"]).json();
    assert_eq!(json.as_array().unwrap().len(), 10);
    assert_eq!(json[3]["size"], 262_144);

    let read = place.run_with(b"", ["fscrypt", "cat", "disk", "xts_default/b5000", "--key", "raw:key"]);
    assert_eq!(read.stdout.len(), 5000);
    let key = fs::read(place.path("key")).unwrap();
    let from_stdin = place.run_with(&key, ["fscrypt", "cat", "disk", "xts_default/b5000", "--key", "raw:-"]);
    assert!(from_stdin.stdout == read.stdout);
    // The plaintext, encrypted again: right, and with one byte changed.
    fs::create_dir_all(place.path("plain/sub")).unwrap();
    for name in ["b4095", "b4096", "b5000", "big", "empty", "one-byte", "sparse", "sub/inner.txt"] {
        let path = format!("xts_default/{name}");
        let read = place.run_with(b"", ["fscrypt", "cat", "disk", &path, "--key", "raw:key"]);
        fs::write(place.path("plain").join(name), read.stdout).unwrap();
    }
    let long = names_of(&place);
    fs::write(
        place.path("plain").join(&long),
        place
            .run_with(b"", ["fscrypt", "cat", "disk", &format!("xts_default/{long}"), "--key", "raw:key"])
            .stdout,
    )
    .unwrap();
    std::os::unix::fs::symlink(target(&place), place.path("plain/link")).unwrap();
    let compare =
        || place.run(["fscrypt", "verify", "disk", "xts_default", "--key", "raw:key", "--against", "plain"]);
    compare().done();
    let mut changed = fs::read(place.path("plain/b5000")).unwrap();
    changed[4999] ^= 1;
    fs::write(place.path("plain/b5000"), &changed).unwrap();
    failed(
        &compare(),
        4,
        &["PROBLEM  /xts_default/b5000 (inode 17): 1 data units from 1 on", "1 problem found"],
    );
    fs::remove_file(place.path("plain/b5000")).unwrap();
    failed(&compare(), 4, &["xts_default/b5000", "nothing to compare it with"]);
}

fn names_of(place: &Place) -> String {
    let listed = place.run(["fscrypt", "ls", "disk", "xts_default", "--key", "raw:key"]);
    listed.out.lines().find(|name| name.starts_with("nnn")).unwrap().to_owned()
}

fn target(place: &Place) -> String {
    let json = place.run(["fscrypt", "ls", "--json", "disk", "xts_default", "--key", "raw:key"]).json();
    let link = json.as_array().unwrap().iter().find(|row| row["kind"] == "link").unwrap();
    link["target"].as_str().unwrap().to_owned()
}

#[test]
fn verify_says_all_is_good_also_as_json() {
    let place = place();
    let verified = place.run(["fscrypt", "verify", "disk", "--key", "raw:key"]);
    assert!(verified.done().out.ends_with("good\n"), "{verified}");
    let json = place.run(["fscrypt", "verify", "--json", "disk", "--key", "raw:key"]).json();
    assert_eq!((json["good"].as_bool(), json["problem_count"].as_u64()), (Some(true), Some(0)));
    assert_eq!(json["policies"].as_array().unwrap().len(), 10);
    assert_eq!(json["policies"][0]["key"], IDENTIFIER);
    assert_eq!(json["checked"]["files"], 54);
    // Nothing of the image was changed.
    assert!(fs::read(place.path("disk")).unwrap() == image());
}

#[test]
fn keys_that_are_missing_wrong_or_none_are_code_2() {
    let place = place();
    // Without any key, names are shown as Linux shows them.
    let listed = place.run(["fscrypt", "ls", "disk", "xts_default"]);
    assert!(listed.done().err.contains(&format!("note: key {IDENTIFIER} was not given")), "{listed}");
    let first = listed.out.lines().next().unwrap().to_owned();
    place
        .run(["fscrypt", "cat", "disk", &format!("xts_default/{first}")])
        .refused(2, &["not given", "--key"]);
    place.run(["fscrypt", "cat", "disk", "xts_default/big"]).refused(2, &[IDENTIFIER, "none was given"]);
    failed(&place.run(["fscrypt", "verify", "disk"]), 2, &["NOT GIVEN", "is needed, and none was given"]);
    place.write("other", &[9; 64]);
    let wrong = ["--key", "raw:other"];
    let run = |arguments: &[&str]| place.run(arguments.iter().chain(&wrong));
    failed(&run(&["fscrypt", "verify", "disk"]), 2, &["wrong key", IDENTIFIER, "key file other is "]);
    failed(&run(&["fscrypt", "ls", "disk", "xts_default"]), 2, &["wrong key", IDENTIFIER]);
    run(&["fscrypt", "cat", "disk", "xts_default/big"]).refused(2, &["wrong key", IDENTIFIER]);
    place.write("short", &[9; 15]);
    place.run(["fscrypt", "ls", "disk", "--key", "raw:short"]).refused(2, &["has 15 bytes", "16 to 64"]);
    place.run(["fscrypt", "ls", "disk", "--key", "raw:nothing"]).refused(4, &["key file nothing"]);
    place
        .run(["fscrypt", "ls", "disk", "--key", "key"])
        .refused(2, &["raw key of 64 bytes", "--key raw:key"]);
}

#[test]
fn what_is_not_there_or_no_image_is_code_4() {
    let place = place();
    place.run(["fscrypt", "ls", "nothing"]).refused(4, &["nothing", "No such file"]);
    place.run(["fscrypt", "ls", "."]).refused(4, &["neither a regular file nor a block device"]);
    fs::write(place.path("zeroes"), [0; 8192]).unwrap();
    place.run(["fscrypt", "ls", "zeroes"]).refused(4, &["no ext4 superblock"]);
    place
        .run(["fscrypt", "cat", "disk", "xts_default/no", "--key", "raw:key"])
        .refused(4, &["does not exist"]);
    place.run(["fscrypt", "ls", "disk", "plain.txt"]).refused(1, &["is not a directory"]);
    place.run(["fscrypt", "cat", "disk", "lost+found"]).refused(1, &["is not a regular file"]);
    place
        .run(["fscrypt", "cat", "disk", "xts_default/link", "--key", "raw:key"])
        .refused(1, &["symbolic link to target-of-the-link/"]);
    place.run(["fscrypt", "cat", "disk", "a/../b"]).refused(4, &["does not exist"]);
    place
        .run(["fscrypt", "verify", "disk", "--against", "nothing"])
        .refused(4, &["--against nothing", "no such directory"]);
}

#[test]
fn a_damaged_image_is_code_4_and_every_problem_has_its_line() {
    let place = place();
    let good = image();
    // The inode of xts_default/one-byte: its checksum is not right any more.
    let mut bad = good.clone();
    let at = transcode::inode_at(&good, 14);
    bad[at + 4] ^= 1;
    fs::write(place.path("disk"), &bad).unwrap();
    let verified = place.run(["fscrypt", "verify", "disk", "--key", "raw:key"]);
    failed(
        &verified,
        4,
        &[
            "PROBLEM  /xts_default/one-byte (inode 14): it does not have its checksum",
            "checksum",
            "NOT GOOD",
            "1 problem found",
        ],
    );
    let json = place.run(["fscrypt", "verify", "--json", "disk", "--key", "raw:key"]);
    let parsed: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(parsed["problems"][0]["inode"], 14, "{json}");
    assert_eq!(json.code, Some(4));
    place
        .run(["fscrypt", "cat", "disk", "xts_default/one-byte", "--key", "raw:key"])
        .refused(4, &["is damaged"]);
    let listed = place.run(["fscrypt", "ls", "disk", "xts_default", "--key", "raw:key"]);
    failed(&listed, 4, &["sparse\n", "one-byte\n", "/xts_default/one-byte is damaged: inode 14"]);
    let long = place.run(["fscrypt", "ls", "-l", "disk", "xts_default", "--key", "raw:key"]);
    failed(&long, 4, &["sparse\n", "/xts_default/one-byte is damaged"]);
    let row = long.out.lines().find(|line| line.contains("one-byte")).unwrap();
    assert!(row.trim_start().starts_with("14 ") && row.contains("checksum"), "{long}");
    let json = place.run(["fscrypt", "ls", "-R", "--json", "disk", "--key", "raw:key"]);
    assert_eq!(json.code, Some(4), "{json}");
    assert!(json.err.contains("/xts_default/one-byte is damaged"), "{json}");
    let rows: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    let row = |path: &str| rows.as_array().unwrap().iter().find(|row| row["path"] == path).unwrap().clone();
    let damaged = row("xts_default/one-byte");
    assert_eq!((&damaged["inode"], &damaged["size"]), (&14.into(), &serde_json::Value::Null));
    assert!(damaged["problem"].as_str().unwrap().contains("checksum"), "{damaged}");
    assert_eq!(row("xts_default/sparse")["problem"], serde_json::Value::Null);
    // A path that is given leads to the same words.
    let verified = place.run(["fscrypt", "verify", "disk", "xts_default", "--key", "raw:key"]);
    failed(&verified, 4, &["PROBLEM  /xts_default/one-byte (inode 14): it does not have its checksum"]);
    // Cut off: the superblock is there, and little else.
    fs::write(place.path("disk"), &good[..40_960]).unwrap();
    failed(&place.run(["fscrypt", "verify", "disk", "--key", "raw:key"]), 4, &["the image ends before byte"]);
    // As a mounted one with a journal looks.
    let mut dirty = good;
    dirty[1024 + 0x60] |= 4;
    let sum = (!crc32c::crc32c_append(0, &dirty[1024..1024 + 0x3fc])).to_le_bytes();
    dirty[1024 + 0x3fc..2048].copy_from_slice(&sum);
    fs::write(place.path("disk"), &dirty).unwrap();
    place.run(["fscrypt", "ls", "disk"]).refused(4, &["journal", "e2fsck -fy COPY"]);
}

#[test]
fn info_shows_how_a_file_is_encrypted_and_keys_only_on_demand() {
    let place = place();
    let info = |more: &[&str]| {
        let arguments = ["fscrypt", "info", "--json", "disk", "xts_lblk32/one-byte", "--key", "raw:key"];
        place.run(arguments.iter().chain(more)).json()
    };
    let json = info(&[]);
    assert_eq!((json["inode"].as_u64(), &json["contents_key"]), (Some(38), &serde_json::Value::Null));
    assert_eq!(json["policy"]["derivation"], "IV_INO_LBLK_32");
    assert_eq!(json["nonce"], "807ee9c01c6764da9ce4c1168fa9c9b7");
    let first_dun = json["first_dun"].as_str().unwrap();
    assert!(first_dun.starts_with("e87b52f3") && first_dun[8..].bytes().all(|digit| digit == b'0'));
    let json = info(&["--show-keys"]);
    assert_eq!(json["contents_key"].as_str().unwrap().len(), 128);
    assert_eq!(json["names_key"], serde_json::Value::Null);
}

/// A key that was imported: what hardware would derive is known here, so that an image can be made that only the wrapped key
/// opens. Contents go through the engine.
#[test]
fn a_hardware_wrapped_key_opens_its_files_through_the_engine() {
    let place = place();
    let master = [0x77; 32];
    place.write("master", &master);
    place.run(["key", "import", "--in", "master", "--out", "wrapped"]).done();
    let inline = inline_encryption_key(KdfVariant::V1, &master, Mode::Aes256Xts);
    let new = MasterKey::wrapped(&software_secret(KdfVariant::V1, &master), &inline).unwrap();
    let old = MasterKey::raw(&fs::read(place.path("key")).unwrap()).unwrap();
    let mut image = image();
    let name = KeyRef::Identifier(new.name().identifier);
    for (top, derivation, log2) in
        [(12, Derivation::IvInoLblk64, 0), (36, Derivation::IvInoLblk32, 0), (48, Derivation::IvInoLblk64, 9)]
    {
        let policy = Policy::new(ContentsMode::Aes256Xts, NamesMode::Aes256Cts, 32, derivation, log2, name);
        transcode::transcode(&mut image, top, &old, &new, policy.unwrap());
    }
    let expected =
        place.run_with(b"", ["fscrypt", "cat", "disk", "xts_default/sparse", "--key", "raw:key"]).stdout;
    fs::write(place.path("disk"), &image).unwrap();
    for home in ["own", "none"] {
        let read = place.run_with(
            b"",
            ["fscrypt", "cat", "disk", "xts_default/sparse", "--key", "wrapped", "--engine-process", home],
        );
        assert!(read.stdout == expected, "{home}: {}", String::from_utf8_lossy(&read.stderr));
    }
    place.run(["fscrypt", "verify", "disk", "xts_default", "--key", "wrapped"]).done();
    // Both keys at once open all of it.
    let all =
        place.run(["fscrypt", "verify", "--json", "disk", "--key", "wrapped", "--key", "raw:key"]).json();
    assert_eq!(all["checked"]["files"], 54);
    // The inline key is nobody's to be shown.
    let info = ["fscrypt", "info", "--json", "--show-keys", "disk", "xts_default/big", "--key", "wrapped"];
    assert_eq!(place.run(info).json()["contents_key"], serde_json::Value::Null);
    // The secret that software sees, added as a raw key, is another key.
    place.write("secret", &*software_secret(KdfVariant::V1, &master));
    place
        .run(["fscrypt", "cat", "disk", "xts_default/big", "--key", "raw:secret"])
        .refused(2, &["wrong key"]);
    // The model of hardware derives the same keys from the same key, and wraps it otherwise.
    let ice = ["--engine", "ice:hwkm-v2"];
    place.run(["key", "import", "--in", "master", "--out", "ice"].iter().chain(&ice)).done();
    let arguments = ["fscrypt", "verify", "disk", "xts_default", "--key", "ice"];
    place.run(arguments.iter().chain(&ice)).done();
    // Another root does not open it.
    place.run(["root", "create", "other.root"]).done();
    place
        .run(["fscrypt", "cat", "disk", "xts_default/big", "--key", "wrapped", "--root", "other.root"])
        .refused(2, &["wrapped under root"]);
}
