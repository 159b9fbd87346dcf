use crate::place::{MIB, Place, assert_same};
use inlinecrypt_testkit::nbd::cmd;
use inlinecrypt_testkit::pattern;
use std::fs;

/// Options that only an encrypted volume can have, as they are written.
const OF_ENCRYPTION: [&[&str]; 22] = [
    &["--key", "k"],
    &["--create", "1M"],
    &["--mode", "adiantum"],
    &["--data-unit", "512"],
    &["--block", "512"],
    &["--iv-offset", "8"],
    &["--iv", "sectors"],
    &["--engine", "software"],
    &["--root", "r"],
    &["--key-type", "raw"],
    &["--passphrase-file", "p"],
    &["--passphrase-fd", "0"],
    &["--engine-process", "none"],
    &["--sandbox", "report"],
    &["--engine-realtime"],
    &["--verify", "all"],
    &["--fallback", "allowed"],
    &["--priority", "high"],
    &["--pin"],
    &["--header", "h"],
    &["--key-file", "f"],
    &["--recover"],
];

#[test]
fn what_is_about_keys_and_layouts_is_refused_together_with_plain() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    for options in OF_ENCRYPTION {
        let said = place.run([&["serve", "--plain", "v.img"], options].concat());
        said.refused(1, &[options[0], "--plain"]);
    }
    place.run(["serve", "--plain", "--config", "c.toml"]).refused(1, &["--plain together with --config"]);
    for line in [
        "key = \"k\"",
        "key_id = \"00112233445566778899aabbccddeeff\"",
        "mode = \"Adiantum\"",
        "data_unit = 512",
        "block = 512",
        "iv_offset = 8",
        "iv = \"sectors\"",
        "dm_table = \"0 8 crypt aes-xts-plain64 - 0 v.img 0\"",
        "fallback = \"off\"",
        "priority = \"low\"",
        "pin = true",
        "preprogram = true",
        "spill_after_us = 1",
        "header = \"h\"",
        "passphrase_file = \"p\"",
        "key_file = \"k\"",
        "recover = true",
        "reencrypt = \"r\"",
        "engine = \"e\"",
    ] {
        let engine = "[[engine]]\nname = \"e\"\n";
        let text = format!("[[volume]]\npath = \"v.img\"\nplain = true\n{line}\n{engine}");
        place.write("c.toml", text.as_bytes());
        let (name, _) = line.split_once(' ').unwrap();
        for verb in [&["check", "c.toml"][..], &["serve", "--config", "c.toml"]] {
            place.run(verb).refused(1, &["c.toml:1: plain = true together with", name]);
        }
    }
    assert_eq!(fs::read(place.path("v.img")).unwrap(), vec![0; 1 << 20], "nothing was touched");
}

#[test]
fn a_plain_volume_is_the_file_as_it_is_and_everybody_is_told() {
    let place = Place::new();
    let mut content = pattern::bytes(5, 0, 1 << 20);
    // Half a sector is nobody's.
    content.extend([9; 100]);
    place.write("v.img", &content);
    let server = place.serve("v.img.sock", ["--plain", "v.img", "--control", "control"]);
    assert!(server.greeting().contains("as \"v\": 1 MiB, PLAIN: not encrypted"), "{}", server.out());
    let mut client = server.client("v");
    assert_eq!(client.export().size, MIB);
    assert_same(&client.read(0, 1 << 20).unwrap(), &content[..1 << 20]);
    client.write(1000, &[7; 5000]).unwrap();
    client.request(cmd::WRITE, cmd::FLAG_FUA, 70_001, 3, &[1, 2, 3]).unwrap();
    client.write_zeroes(300_000, 4097, cmd::FLAG_FUA).unwrap();
    client.trim(500_000, 100_000).unwrap();
    client.flush().unwrap();
    content[1000..6000].fill(7);
    content[70_001..70_004].copy_from_slice(&[1, 2, 3]);
    content[300_000..304_097].fill(0);
    let trimmed = 123 * 4096..146 * 4096;
    let stored = fs::read(place.path("v.img")).unwrap();
    assert_same(&stored[..trimmed.start], &content[..trimmed.start]);
    assert_same(&stored[trimmed.end..], &content[trimmed.end..]);
    assert!(stored[trimmed.clone()].iter().all(|byte| *byte == 0));
    assert!(client.write(MIB - 1, &[1, 2]).is_err(), "past the end");

    let status = place.run(["status", "--json", "--control", "control"]).json();
    let volume = &status["servers"][0]["volumes"][0];
    assert_eq!(
        (&volume["plain"], &volume["mode"], &volume["key_type"], &volume["served_by"]),
        (&true.into(), &"plain".into(), &"none".into(), &"none".into()),
        "{volume}"
    );
    assert_eq!(volume["counters"]["write"]["requests"], 2, "{volume}");
    assert_eq!(status["servers"][0]["engines"], serde_json::json!([]), "none is needed");
    let text = place.run(["status", "--control", "control"]);
    assert!(text.done().out.contains("1 MiB, PLAIN: not encrypted"), "{text}");
    let told = server.stop();
    assert!(told.contains("WARNING: v.img is served plain: NOTHING of it is encrypted"), "{told}");
    assert!(told.contains("its last 100 bytes are not a whole sector"), "{told}");
    assert!(!place.path("home").exists(), "no root was made");
}

#[test]
fn holes_of_a_plain_volume_are_shown_as_such() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    let server = place.serve("s", ["--plain", "v.img", "--nbd", "unix:s"]);
    let mut client = server.client("v");
    client.write(256 << 10, &[1; 65_536]).unwrap();
    let runs: Vec<_> =
        client.block_status(0, 1 << 20, 0).unwrap().iter().map(|block| (block.len, block.flags)).collect();
    assert_eq!(runs, [(256 << 10, 1), (65_536, 0), ((1 << 20) - (320 << 10), 1)]);
    server.stop();
}

#[test]
fn a_description_says_it_too_and_cannot_be_overruled() {
    let place = Place::new();
    place.sparse("v.img", 2 * MIB);
    place.raw_key("k", 64);
    place.write(
        "v.img.toml",
        b"[[volume]]\npath = \"v.img\"\nplain = true\noffset = 4096\nlength = 1048576\n",
    );
    let server = place.serve("v.img.sock", ["v.img"]);
    let mut client = server.client("v");
    assert_eq!(client.export().size, MIB);
    client.write(0, b"in the clear").unwrap();
    let told = server.stop();
    assert!(told.contains("WARNING: v.img is served plain"), "{told}");
    assert_eq!(&fs::read(place.path("v.img")).unwrap()[4096..4108], b"in the clear");

    let said = place.run(["serve", "--key", "raw:k", "v.img"]);
    said.refused(1, &["v.img: plain = true together with key", "correct v.img.toml"]);
    let info = place.run(["volume", "info", "v.img"]);
    for text in ["NONE: it is plain", "1 MiB", "begins at        4 KiB", "v.img.toml"] {
        assert!(info.done().out.contains(text), "{text}: {info}");
    }
    let info = place.run(["volume", "info", "--json", "v.img"]).json();
    assert_eq!((&info["plain"], &info["volume_bytes"]), (&true.into(), &MIB.into()));
    assert_eq!((&info["mode"], &info["key_type"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    place.run(["volume", "info", "--dm-table", "v.img"]).refused(1, &["nothing to open"]);
    for more in [&["--offline"][..], &[]] {
        let said = place.run([&["volume", "reencrypt", "v.img"][..], more].concat());
        assert!(said.err.contains("v.img is plain") && said.code == Some(1), "{said}");
    }
    let said = place.run(["check", "v.img.toml"]);
    assert!(said.done().out.contains("\"v\": v.img, 1 MiB, PLAIN: not encrypted"), "{said}");
    // Shorter than it says.
    place.write(
        "v.img.toml",
        b"[[volume]]\npath = \"v.img\"\nplain = true\noffset = 4096\nlength = 2097152\n",
    );
    place.run(["serve", "v.img"]).refused(4, &["is to have 2 MiB from 4 KiB on"]);
    place.write("v.img.toml", b"[[volume]]\npath = \"v.img\"\nplain = true\nsize = 2097153\n");
    place.run(["serve", "v.img"]).refused(4, &["lost its end"]);
}

#[test]
fn plaintext_is_not_written_over_what_is_encrypted() {
    let place = Place::new();
    place.create("v.img");
    let server = place.serve("v.img.sock", ["v.img"]);
    server.client("v").write(0, &[1; 4096]).unwrap();
    server.stop();
    let stored = fs::read(place.path("v.img")).unwrap();
    let plain = ["serve", "--plain", "v.img"];
    place.run(plain).refused(1, &["v.img.toml describes an encrypted volume", "destroys it", "--read-only"]);
    place.write("c.toml", b"[[volume]]\npath = \"v.img\"\nplain = true\n");
    place.run(["check", "c.toml"]).refused(1, &["v.img.toml describes an encrypted volume"]);
    // By whatever name.
    std::os::unix::fs::symlink("v.img", place.path("link")).unwrap();
    let link = ["serve", "--plain", "link"];
    place.run(link).refused(1, &["v.img.toml describes what this is a link to"]);
    // Its ciphertext can be had.
    let server = place.serve("v.img.sock", ["--plain", "--read-only", "v.img"]);
    assert_same(&server.client("v").read(0, 1 << 20).unwrap(), &stored);
    assert!(server.client("v").write(0, &[1; 512]).is_err());
    assert!(server.stop().contains("clients read its ciphertext"));
    // Nor what has lost its description.
    fs::remove_file(place.path("v.img.toml")).unwrap();
    place.run(plain).refused(1, &["v.img.key is the key of an encrypted volume"]);
    place.run(link).refused(1, &["v.img.key is the key of an encrypted volume"]);
    fs::remove_file(place.path("v.img.key")).unwrap();
    place.write("v.img.reencrypt", b"half done");
    place.run(plain).refused(1, &["v.img.reencrypt is the state of its re-encryption"]);
    fs::remove_file(place.path("v.img.reencrypt")).unwrap();
    place.serve("v.img.sock", ["--plain", "v.img"]).stop();
    assert_eq!(fs::read(place.path("v.img")).unwrap(), stored);
}

#[test]
fn plain_and_encrypted_volumes_are_served_together() {
    let place = Place::new();
    place.create("a.img");
    place.sparse("b.img", MIB);
    let config = "[[volume]]\npath = \"b.img\"\nplain = true\n[[volume]]\npath = \"a.img\"\n[listen]\nnbd = [\"unix:s\"]\n\
                  [server]\ncontrol = \"control\"\n";
    place.write("c.toml", config.as_bytes());
    let said = place.run(["check", "c.toml"]);
    assert!(
        said.done().out.contains("b.img, 1 MiB, PLAIN") && said.out.contains("a.img, 1 MiB, AES"),
        "{said}"
    );
    let server = place.serve("s", ["--config", "c.toml"]);
    for name in ["a", "b"] {
        let mut client = server.client(name);
        client.write(0, &[3; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [3; 4096]);
    }
    let first = |name| fs::read(place.path(name)).unwrap()[..4096].to_vec();
    assert_ne!(first("a.img"), [3; 4096]);
    assert_eq!(first("b.img"), [3; 4096]);
    let status = place.run(["status", "--json", "--control", "control"]).json();
    let volumes = status["servers"][0]["volumes"].as_array().unwrap();
    let writes: Vec<_> = volumes
        .iter()
        .map(|volume| {
            format!("{} {} {}", volume["name"], volume["plain"], volume["counters"]["write"]["bytes"])
        })
        .collect();
    assert_eq!(writes, ["\"a\" false 4096", "\"b\" true 4096"]);
    let path = place.path("b.img");
    let said = place.run(["volume", "reencrypt", "--control", "control", path.to_str().unwrap()]);
    assert!(said.err.contains("is plain: it is not encrypted") && said.code == Some(1), "{said}");
    server.stop();

    let twice = "[[volume]]\npath = \"a.img\"\n[[volume]]\nname = \"a\"\npath = \"b.img\"\nplain = true\n";
    place.write("c.toml", twice.as_bytes());
    place.run(["check", "c.toml"]).refused(1, &["would both be export \"a\""]);
    let twice = "[[volume]]\npath = \"b.img\"\nplain = true\n[[volume]]\nname = \"x\"\npath = \"b.img\"\nplain = true\n";
    place.write("c.toml", twice.as_bytes());
    place.run(["check", "c.toml"]).refused(1, &["are one file"]);
}

#[test]
fn another_server_takes_a_plain_volume_over_as_such_and_not_otherwise() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    place.raw_key("k", 64);
    let old = place.serve("s", ["--plain", "v.img", "--nbd", "unix:s", "--control", "control"]);
    let mut client = old.client("v");
    client.write(0, &[5; 512]).unwrap();
    let take_over = ["serve", "--take-over", "control", "--control", "control", "--nbd", "unix:s", "v.img"];
    let said = place.run([&take_over[..], &["--key", "raw:k"]].concat());
    said.refused(1, &["\"v\" is plain there, and encrypted here"]);
    assert_eq!(client.read(0, 512).unwrap(), [5; 512], "the old one serves on");
    let mut command = place.command();
    command.args(take_over).arg("--plain");
    let new = place.start_over("s", command, old);
    assert_eq!(client.read(0, 512).unwrap(), [5; 512]);
    client.write(0, &[6; 512]).unwrap();
    new.stop();
    assert_eq!(fs::read(place.path("v.img")).unwrap()[..512], [6; 512]);
}

#[test]
fn what_cannot_be_served_plain_says_why() {
    let place = Place::new();
    place
        .run(["serve", "--plain", "nothing.img"])
        .refused(4, &["does not exist", "truncate -s SIZE nothing.img"]);
    place.write("small.img", &[0; 511]);
    place.run(["serve", "--plain", "small.img"]).refused(4, &["not even a sector"]);
    place.sparse("v.img", MIB);
    place.run(["serve", "--plain", "--offset", "2M", "v.img"]).refused(4, &["from 2 MiB on"]);
    place.run(["serve", "--plain"]).refused(1, &["nothing to serve"]);
}
