//! Roots of every kind, as far as they need neither TPM nor token. Those are in `tests/system/roots.rs`.

use crate::place::Place;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

/// A place with a passphrase in `word`, another in `other`, and a root that opens with the first.
fn with_passphrase() -> Place {
    let place = Place::new();
    place.write("word", b"correct horse\n");
    place.write("other", b"battery staple");
    place.run(["root", "create", "passphrase:r", "--passphrase-file", "word"]).done();
    place
}

#[test]
fn a_passphrase_opens_what_was_wrapped_under_it_and_no_other_does() {
    let place = with_passphrase();
    let mode = fs::metadata(place.path("r")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let root = ["--root", "passphrase:r", "--passphrase-file", "word"];
    place.run([&["key", "generate", "--out", "k"][..], &root].concat()).done();
    let info = place.run([&["key", "info", "--json", "k"][..], &root].concat()).json();
    assert_eq!(info["opens"], "yes");

    place
        .run(["key", "info", "k", "--root", "passphrase:r", "--passphrase-file", "other"])
        .refused(2, &["does not open with this passphrase"]);
    let said = place.run(["key", "info", "k", "--root", "passphrase:r", "--passphrase-file", "none"]);
    said.refused(4, &["passphrase file none"]);
    fs::set_permissions(place.path("word"), fs::Permissions::from_mode(0o640)).unwrap();
    place.run([&["key", "info", "k"][..], &root].concat()).refused(2, &["word", "chmod 600"]);
}

#[test]
fn root_info_asks_nobody_and_shows_no_secret() {
    let place = with_passphrase();
    let info = place.run(["root", "info", "--json", "passphrase:r"]).json();
    assert_eq!(info["kind"], "passphrase");
    assert_eq!(info["asks"], true);
    assert_eq!(info["id"].as_str().unwrap().len(), 16);
    assert!(info["parameters"]["argon2id"].as_str().unwrap().contains("MiB"));

    place.run(["root", "create", "plain"]).done();
    let said = place.run(["root", "info", "plain"]);
    let secret = &fs::read(place.path("plain")).unwrap()[20..52];
    assert!(!said.done().out.contains(&hex::encode(secret)) && said.out.contains("identifier"), "{said}");
    // The usual one, which nobody has made yet.
    place.run(["root", "info"]).refused(4, &["root.key", "not there"]);
}

#[test]
fn a_root_is_wrapped_anew_in_place_and_keeps_its_keys() {
    let place = with_passphrase();
    let id = |spec: &str| place.run(["root", "info", "--json", spec]).json()["id"].clone();
    let before = id("passphrase:r");
    place
        .run([
            "root",
            "rewrap",
            "--from",
            "passphrase:r",
            "--passphrase-file",
            "word",
            "--to",
            "passphrase:r",
            "--new-passphrase-file",
            "other",
        ])
        .done();
    assert_eq!(id("passphrase:r"), before);
    let open = |word: &str| {
        place.run(["root", "rewrap", "--from", "passphrase:r", "--passphrase-file", word, "--to", "copy"])
    };
    open("word").refused(2, &["does not open"]);
    assert!(!place.path("copy").exists());
    let said = open("other");
    assert!(said.done().err.contains("still opens them, too"), "{said}");
    assert_eq!(id("copy"), before);
    // And nothing that is there is ever replaced by something else.
    open("other").refused(5, &["copy exists already"]);
    place.run(["root", "create", "copy"]).refused(5, &["copy exists already", "root rewrap"]);
}

#[test]
fn a_volume_is_served_with_a_passphrase_of_its_config() {
    let place = with_passphrase();
    let root = ["--root", "passphrase:r", "--passphrase-file", "word"];
    place.run([&["volume", "create", "--size", "1MiB", "v.img"][..], &root].concat()).done();
    // The description names the root, and the passphrase stays with whoever serves it.
    let description = fs::read_to_string(place.path("v.img.toml")).unwrap();
    assert!(description.contains("passphrase:/") && !description.contains("word"), "{description}");
    let server = place.serve("v.img.sock", ["v.img", "--passphrase-file", "word"]);
    server.stop();
    place.write(
        "c.toml",
        b"[[engine]]\nname = \"e\"\nroot = \"passphrase:r\"\npassphrase_file = \"word\"\n\
          [[volume]]\npath = \"v.img\"\n[listen]\nnbd = [\"unix:c.sock\"]\n",
    );
    place.run(["check", "c.toml"]).done();
    place.serve("c.sock", ["--config", "c.toml"]).stop();
    // One description, read once, is enough for making a volume and serving it.
    let mut command = place.command();
    command.args(["serve", "--create", "1MiB", "w.img", "--root", "passphrase:r", "--passphrase-fd", "0"]);
    command.stdin(fs::File::open(place.path("word")).unwrap());
    place.start("w.img.sock", command).stop();
}

#[test]
fn roots_are_not_made_by_the_way_but_for_files() {
    let place = Place::new();
    place.write("word", b"w");
    for spec in ["passphrase:r", "tpm2:r", "pkcs11:object=k?module-path=/m.so&file=r"] {
        let said = place.run(["key", "generate", "--root", spec, "--passphrase-file", "word", "--out", "k"]);
        said.refused(4, &["not there", "root create"]);
        assert!(!place.path("r").exists() && !place.path("k").exists());
    }
}

#[test]
fn what_cannot_keep_a_root_says_what_is_missing() {
    let place = Place::new();
    place.write("word", b"w");
    let create = |spec: &str| place.run(["root", "create", spec, "--passphrase-file", "word"]);
    create("tpm2:r,tcti=device:/nowhere/tpm").refused(4, &["no TPM at device:/nowhere/tpm", "tcti="]);
    create("tpm2:r,tcti=unix:sock").refused(4, &["no TPM at unix:sock"]);
    create("pkcs11:object=k?module-path=/nowhere/m.so&file=r")
        .refused(4, &["/nowhere/m.so cannot be loaded", "module-path"]);
    place.write("empty", b"\n");
    place.run(["root", "create", "passphrase:r", "--passphrase-file", "empty"]).refused(2, &["empty"]);
    assert!(!place.path("r").exists());
}

#[test]
fn specs_that_cannot_be_are_usage_errors() {
    let place = Place::new();
    for (spec, expected) in [
        ("tpm2:r,pcrs=md5:7", "no bank"),
        ("pkcs11:object=k?module-path=m&file=r&pin-value=1234", "pin-source"),
        ("vault:r", "no kind of root"),
    ] {
        let said = place.run(["root", "create", spec]);
        assert_eq!(said.code, Some(1), "{said}");
        assert!(said.err.contains(expected), "{said}");
        place.write("c.toml", format!("[[engine]]\nname = \"e\"\nroot = \"{spec}\"\n").as_bytes());
        place.run(["check", "c.toml"]).refused(1, &[expected]);
    }
    let both =
        place.run(["root", "create", "passphrase:r", "--passphrase-file", "a", "--passphrase-fd", "3"]);
    assert_eq!(both.code, Some(1), "{both}");
}

#[test]
fn the_helper_is_no_command_for_people() {
    let place = Place::new();
    assert!(!place.run(["--help"]).done().out.contains("root-helper"));
    place.run(["root-helper"]).refused(4, &["cannot answer", "nothing to do by hand"]);
}
