use crate::place::{MIB, Place, assert_same, run_command};
use serde_json::json;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;

fn chmod(path: impl AsRef<std::path::Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A place with a volume, whose key can then be spoiled.
fn with_volume() -> Place {
    let place = Place::new();
    place.create("v.img");
    place
}

#[test]
fn spoiled_wrapped_keys_are_refused_with_their_message() {
    let place = with_volume();
    let good = fs::read(place.path("v.img.key")).unwrap();
    let mut corrupted = good.clone();
    corrupted[40] ^= 1;
    let mut version = good.clone();
    version[12] = 9;
    let mut header = good.clone();
    header[14] = 1;
    let long = [&good[..], b"\n"].concat();
    let huge = vec![0; 5000];
    let raw: Vec<u8> = (0..64).collect();
    let cases: [(&[u8], i32, &[&str]); 9] = [
        (b"", 2, &["key file v.img.key is empty"]),
        (&good[..71], 2, &["has 71 bytes instead of 72"]),
        (&long, 2, &["has 73 bytes instead of 72"]),
        (&corrupted, 2, &["does not authenticate", "Restore the key file"]),
        (&version, 2, &["version 9, this program knows 1"]),
        (&header, 2, &["header is damaged"]),
        (b"hello, world", 2, &["12 bytes do not begin as a wrapped key does"]),
        (&raw, 2, &["looks like a raw key of 64 bytes", "--key raw:v.img.key"]),
        (&huge, 4, &["longer than 4096 bytes"]),
    ];
    for (bytes, code, saying) in cases {
        place.write("v.img.key", bytes);
        place.run(["serve", "v.img"]).refused(code, saying);
    }
    fs::remove_file(place.path("v.img.key")).unwrap();
    place.run(["serve", "v.img"]).refused(4, &["v.img.key", "No such file"]);
    fs::create_dir(place.path("v.img.key")).unwrap();
    place.run(["serve", "v.img"]).refused(4, &["v.img.key is a directory"]);
    fs::remove_dir(place.path("v.img.key")).unwrap();
    // The same blob again is fine, and may be read by all.
    let path = place.write("v.img.key", &good);
    chmod(path, 0o644);
    place.serve("v.img.sock", ["v.img"]).stop();
}

#[test]
fn every_corrupted_bit_of_a_wrapped_key_is_refused() {
    let place = with_volume();
    let good = fs::read(place.path("v.img.key")).unwrap();
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 0x10;
        place.write("bad.key", &bad);
        let said = place.run(["serve", "--key", "bad.key", "v.img"]);
        assert_eq!(said.code, Some(2), "byte {byte}: {said}");
    }
}

#[test]
fn the_forms_of_key_are_not_confused() {
    let place = with_volume();
    place.run(["serve", "--key", "raw:v.img.key", "v.img"]).refused(
        2,
        &[
            "was given as a raw key, and looks like a long-term wrapped key",
            "without \"raw:\": --key v.img.key",
        ],
    );
    place.run(["key", "prepare", "--in", "v.img.key", "--out", "v.eph"]).done();
    place.run(["serve", "--key", "v.eph", "v.img"]).refused(2, &["ephemeral wrapped key", "long-term"]);
    place.run(["serve", "--key", "raw:v.eph", "v.img"]).refused(2, &["looks like a ephemeral wrapped key"]);
    place.run(["serve", "--key", "home/root.key", "v.img"]).refused(2, &["is a root, not a key"]);
    place
        .run(["serve", "--root", "v.img.key", "v.img"])
        .refused(4, &["is a long-term wrapped key, not a root"]);
    place.run(["serve", "--key", "", "v.img"]);
}

#[test]
fn raw_keys_are_checked_for_length_halves_and_who_can_read_them() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    let run = || place.run(["serve", "--key", "raw:raw", "v.img"]);
    run().refused(4, &["key file raw", "No such file"]);
    place.write("raw", b"");
    run().refused(2, &["key file raw is empty"]);
    place.raw_key("raw", 32);
    run().refused(2, &["has 32 bytes, and AES-256-XTS takes a raw key of 64"]);
    place.write("raw", &[(0..64).collect::<Vec<u8>>(), b"\n".to_vec()].concat());
    run().refused(2, &["has 65 bytes", "line feed"]);
    place.write("raw", "0123456789abcdef".repeat(8).as_bytes());
    run().refused(2, &["has 128 bytes", "xxd -r -p"]);
    place.write("raw", &[[7; 32], [7; 32]].concat());
    run().refused(2, &["two halves of the XTS key are equal"]);
    for mode in [0o640, 0o604, 0o660] {
        let path = place.raw_key("raw", 64);
        chmod(path, mode);
        run().refused(2, &[&format!("mode {mode:04o}"), "chmod 600 raw"]);
    }
    let path = place.raw_key("raw", 64);
    chmod(path, 0o400);
    place.serve("v.img.sock", ["--key", "raw:raw", "v.img"]).stop();
}

/// Who serves with a key that was given once is told what an end of the engine process means.
#[test]
fn a_key_that_cannot_be_had_again_is_told_of() {
    let place = Place::new();
    place.sparse("v.img", 1 << 20);
    let key = fs::read(place.raw_key("key", 64)).unwrap();
    let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = format!("0 2048 crypt aes-xts-plain64 {digits} 0 v.img 0\n").into_bytes();
    place.write("table", &line);
    let note = "cannot be read again: if the engine process ends";
    for (arguments, input, told) in [
        (&["--key", "raw:-", "v.img"][..], &key[..], true),
        (&["--key", "raw:-", "--engine-process", "none", "v.img"], &key[..], false),
        (&["--key", "raw:key", "v.img"], &[], false),
        (&["--dm-table-file", "-"], &line[..], true),
        (&["--dm-table-file", "/dev/stdin"], &line[..], true),
        (&["--dm-table-file", "table"], &[], false),
    ] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(input).unwrap();
        drop(writer);
        let mut command = place.command();
        command.args(["serve", "--nbd", "unix:s"]).args(arguments).stdin(reader);
        let server = place.start("s", command);
        server.greeting();
        let err = server.stop();
        assert_eq!(err.contains(note), told, "{arguments:?}: {err}");
    }
}

#[test]
fn a_raw_key_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can give files away");
        return;
    }
    let place = Place::new();
    place.sparse("v.img", MIB);
    let raw = place.raw_key("raw", 64);
    std::os::unix::fs::chown(&raw, Some(12_345), None).unwrap();
    place.run(["serve", "--key", "raw:raw", "v.img"]).refused(2, &["belongs to user 12345", "chown 0 raw"]);
}

#[test]
fn spoiled_roots_are_refused_with_their_message() {
    let place = with_volume();
    let root = place.path("home/root.key");
    let good = fs::read(&root).unwrap();
    let mut corrupted = good.clone();
    corrupted[30] ^= 1;
    let mut version = good.clone();
    version[16] = 7;
    let cases: [(&[u8], i32, &str); 5] = [
        (b"", 2, "empty"),
        (&good[..40], 2, "cut off after 40 bytes of 64"),
        (&corrupted, 2, "damaged"),
        (&version, 4, "version 7"),
        (&[3; 64], 4, "not a root file"),
    ];
    for (bytes, code, why) in cases {
        place.write("home/root.key", bytes);
        place.run(["serve", "v.img"]).refused(code, &["root", why]);
        place.run(["serve", "--create", "1M", "w.img"]).refused(code, &["root", why]);
        place.run(["key", "generate", "--out", "new.key"]).refused(code, &["root", why]);
    }
    place.write("home/root.key", &good);
    chmod(&root, 0o644);
    place.run(["serve", "v.img"]).refused(2, &["mode 0644", "hmod 600"]);
    fs::remove_file(&root).unwrap();
    place.run(["serve", "v.img"]).refused(4, &["root.key", "not there"]);
    assert!(!root.exists(), "a new root could not open the old key, so none is made");
    assert!(!place.path("w.img").exists() && !place.path("new.key").exists());
}

#[test]
fn a_key_of_another_root_is_refused_with_both_roots() {
    let place = with_volume();
    place.run(["key", "generate", "--root", "other.key", "--out", "foreign.key"]).done();
    let id = |root: &str, key: &str| {
        let info = place.run(["key", "info", "--json", "--root", root, key]).json();
        info["wrapped_by"].as_str().unwrap().to_owned()
    };
    let (ours, theirs) = (id("home/root.key", "v.img.key"), id("other.key", "foreign.key"));
    let said = place.run(["serve", "--key", "foreign.key", "v.img"]);
    said.refused(2, &[&ours, &theirs, "--root"]);
    let info = place.run(["key", "info", "foreign.key"]);
    assert!(info.done().out.contains("opens            no: "), "{info}");
}

#[test]
fn the_ladder_works_through_files_and_pipes() {
    let place = Place::new();
    let raw = (0..32).collect::<Vec<u8>>();
    let imported = place.run_with(&raw, ["key", "import"]);
    assert!(imported.status.success());
    assert_eq!(imported.stdout.len(), 72);
    assert!(!imported.stdout.windows(8).any(|window| window == &raw[..8]), "wrapped");
    place.write("raw", &raw);
    place.run(["key", "import", "--in", "raw", "--out", "imported.key"]).done();
    assert_eq!(fs::read(place.path("imported.key")).unwrap(), imported.stdout, "the same blob every time");
    assert_eq!(fs::metadata(place.path("imported.key")).unwrap().permissions().mode() & 0o777, 0o600);

    let info = place.run_with(&imported.stdout, ["key", "info", "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!((&info["form"], &info["opens"]), (&json!("long-term"), &json!("yes")));
    assert_eq!(info["key_id"].as_str().unwrap().len(), 32);

    let prepared = place.run_with(&imported.stdout, ["key", "prepare"]);
    assert_ne!(prepared.stdout, imported.stdout);
    let info = place.run_with(&prepared.stdout, ["key", "info", "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!((&info["form"], &info["opens"]), (&json!("ephemeral"), &json!("no")));

    // A volume by a key from a pipe.
    let mut command = place.command();
    command.args(["serve", "--create", "1M", "--key", "-", "p.img"]);
    command.stdin(fs::File::open(place.path("imported.key")).unwrap());
    let server = place.start("p.img.sock", command);
    server.client("").write(0, &[1; 512]).unwrap();
    server.stop();
    place.run(["serve", "p.img"]).refused(4, &["has no key"]);
    let server = place.serve("p.img.sock", ["--key", "imported.key", "p.img"]);
    assert_same(&server.client("").read(0, 512).unwrap(), &[1; 512]);
    server.stop();
}

#[test]
fn the_ladder_refuses_what_it_cannot_use() {
    let place = Place::new();
    for (bytes, why) in [
        (vec![1; 31], "has 31 bytes, the engine wraps keys of 32"),
        (vec![], "0 bytes"),
        ([vec![1; 32], b"\n".to_vec()].concat(), "line feed"),
        (b"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff".to_vec(), "hexadecimal"),
    ] {
        place.write("raw", &bytes);
        place.run(["key", "import", "--in", "raw", "--out", "k"]).refused(2, &[why]);
    }
    place.run(["key", "generate", "--out", "k"]).done();
    let before = fs::read(place.path("k")).unwrap();
    place.run(["key", "generate", "--out", "k"]).refused(5, &["k exists already and was not touched"]);
    assert_eq!(fs::read(place.path("k")).unwrap(), before);
    place.run(["key", "import", "--in", "k"]).refused(2, &["wrapped key already"]);
    place.run(["key", "info", "missing"]).refused(4, &["No such file"]);
    place.write("junk", b"junk");
    place.run(["key", "info", "junk"]).refused(2, &["not a wrapped key"]);
    place.run(["key", "prepare", "--in", "junk"]).refused(2, &["no wrapped key"]);
    let raw = place.raw_key("raw", 32);
    chmod(raw, 0o644);
    place.run(["key", "import", "--in", "raw", "--out", "k2"]).refused(2, &["mode 0644", "chmod 600"]);
    place.run(["key", "prepare", "--in", "k", "--root", "nowhere/root"]).refused(4, &["not there"]);
}

#[test]
fn keys_are_not_printed_on_terminals() {
    let place = Place::new();
    let Some(script) = inlinecrypt_testkit::require_tool("script") else { return };
    // `script` gives its command a terminal.
    let mut command = std::process::Command::new(script);
    let inner = format!("{} key generate", env!("CARGO_BIN_EXE_inlinecrypt"));
    command.args(["-qec", &inner, "/dev/null"]);
    command.env("INLINECRYPT_HOME", place.path("home")).stdin(std::process::Stdio::null());
    let said = run_command(command);
    assert_eq!(said.code, Some(1), "{said}");
    assert!(said.out.contains("standard output is a terminal"), "{said}");
}

#[test]
fn wrapped_keys_never_fall_back_to_software() {
    let place = with_volume();
    let said = place.run(["serve", "--fallback", "forced", "v.img"]);
    said.refused(1, &["a hardware-wrapped key is never served by software"]);
    let server = place.serve("v.img.sock", ["--fallback", "allowed", "v.img"]);
    assert!(server.stop().contains("software never serves it"));
}

#[test]
fn raw_keys_can_be_forced_to_software() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    place.raw_key("raw", 64);
    let server = place.serve("v.img.sock", ["--fallback", "forced", "--key", "raw:raw", "v.img"]);
    server.client("").write(0, &[0; 512]).unwrap();
    let status = place.run(["status", "--json"]).json();
    let server_status = &status["servers"][0];
    assert_eq!(server_status["volumes"][0]["served_by"], "fallback");
    let fallback = &server_status["engines"][1];
    assert_eq!(fallback["role"], "fallback");
    assert_eq!(fallback["keyslots"]["slots"].as_array().unwrap().len(), 100);
    server.stop();
}
