use crate::place::{MIB, Place};
use std::fs;

/// Everything below a folder: names, lengths, times of change.
fn snapshot(place: &Place) -> Vec<String> {
    fn visit(path: &std::path::Path, all: &mut Vec<String>) {
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            all.push(format!("{:?} {} {:?}", entry.path(), metadata.len(), metadata.modified().unwrap()));
            if metadata.is_dir() {
                visit(&entry.path(), all);
            }
        }
    }
    let mut all = Vec::new();
    visit(place.folder(), &mut all);
    all.sort();
    all
}

const GOOD: &str = r#"
[[engine]]
name = "e0"
spec = "software:slots=2"

[[engine]]
name = "legacy"
spec = "software:slots=4,kdf=legacykdf"
root = "other-root.key"

[[volume]]
name = "first"
path = "a.img"

[[volume]]
path = "b.img"
engine = "legacy"
read_only = true

[[volume]]
path = "c.img"
key = "raw:c.key"
data_unit = 512
fallback = "forced"
discard = "off"

[listen]
nbd = ["unix:s", "tcp:127.0.0.1:0"]

[server]
control = "control"
workers = 1
connections_max = 10
stop_seconds = 5
"#;

fn good_place() -> Place {
    let place = Place::new();
    place.create("a.img");
    let engine = ["--engine", "software:kdf=legacykdf", "--root", "other-root.key"];
    place.run(["volume", "create", "--size", "1M", "b.img"].into_iter().chain(engine)).done();
    place.sparse("c.img", MIB);
    place.raw_key("c.key", 64);
    place.write("c.toml", GOOD.as_bytes());
    place
}

#[test]
fn a_config_serves_several_volumes_on_several_engines() {
    let place = good_place();
    let server = place.serve("s", ["--config", "c.toml"]);
    server.client("first").write(0, &[1; 4096]).unwrap();
    server.client("c").write(0, &[3; 512]).unwrap();
    assert!(server.client("b").write(0, &[2; 512]).is_err(), "read-only");
    let status = place.run(["status", "--json", "--control", "control"]).json();
    let engines: Vec<_> = status["servers"][0]["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| format!("{} {} {}", volume["name"], volume["engine"], volume["served_by"]))
        .collect();
    assert_eq!(engines, [r#""first" "e0" "engine""#, r#""b" "legacy" "engine""#, r#""c" "e0" "fallback""#]);
    server.stop();
    assert!(!place.path("control").exists() && !place.path("s").exists());
}

#[test]
fn checking_a_good_config_says_so_and_changes_nothing() {
    let place = good_place();
    let before = snapshot(&place);
    let said = place.run(["check", "c.toml"]);
    said.done();
    for text in ["c.toml can be served", "\"first\": ", "engine legacy", "software fallback"] {
        assert!(said.out.contains(text), "{text}: {said}");
    }
    assert_eq!(snapshot(&place), before);
}

#[test]
fn check_makes_no_root() {
    let place = Place::new();
    place.create("a.img");
    fs::remove_file(place.path("home/root.key")).unwrap();
    place.write("c.toml", b"[[volume]]\npath = \"a.img\"\n");
    let before = snapshot(&place);
    place.run(["check", "c.toml"]).refused(4, &["root.key"]);
    assert_eq!(snapshot(&place), before);
}

#[test]
fn unknown_keys_are_all_told_with_line_and_the_nearest_known_one() {
    let place = Place::new();
    place.write(
        "c.toml",
        b"[[volume]]\npath = \"a.img\"\nmodes = \"x\"\n[server]\nworker = 1\n[lisen]\nnbd = []\n",
    );
    for verb in [&["check", "c.toml"][..], &["serve", "--config", "c.toml"]] {
        let said = place.run(verb);
        said.refused(
            1,
            &[
                "c.toml:3: unknown key \"modes\" in [volume]\n  Did you mean \"mode\"?",
                "c.toml:5: unknown key \"worker\" in [server]\n  Did you mean \"workers\"?",
                "c.toml:6: unknown key \"lisen\"\n  Did you mean \"listen\"?",
                "3 problems",
            ],
        );
    }
}

#[test]
fn check_reports_every_problem_at_once() {
    let place = Place::new();
    place.create("a.img");
    place.create("b.img");
    place.create("d.img");
    place.write("empty.key", b"");
    place.sparse("e.img", MIB);
    place.raw_key("short", 10);
    place.write(
        "c.toml",
        br#"
[[volume]]
path = "a.img"
key = "b.img.key"

[[volume]]
path = "missing.img"

[[volume]]
path = "d.img"
key = "empty.key"

[[volume]]
path = "e.img"
key = "raw:short"

[listen]
nbd = ["unix:s", "unix:s"]
"#,
    );
    let before = snapshot(&place);
    let said = place.run(["check", "c.toml"]);
    said.refused(
        1,
        &[
            "two listeners on unix:",
            "c.toml:2: a.img: wrong key",
            "c.toml:6: missing.img does not exist",
            "c.toml:9: d.img: key file empty.key is empty",
            "c.toml:13: e.img: key file short has 10 bytes",
            "5 problems",
        ],
    );
    assert_eq!(snapshot(&place), before);
}

/// What cannot be converted hides nothing of what can.
#[test]
fn check_goes_on_behind_values_that_cannot_be() {
    let place = Place::new();
    place.create("a.img");
    place.create("b.img");
    place.write(
        "c.toml",
        br#"
[[volume]]
path = "a.img"
offset = 100
data_unit = 1000

[[volume]]
path = "b.img"
key = "a.img.key"

[[volume]]
path = "missing.img"

[listen]
nbd = ["unix:s", "unix:s"]
"#,
    );
    let before = snapshot(&place);
    let saying = [
        "c.toml:2: offset: 100 bytes are not a multiple of 512",
        "c.toml:2: data_unit: ",
        "c.toml:7: b.img: wrong key",
        "c.toml:11: missing.img does not exist",
        "two listeners on unix:",
        "5 problems",
    ];
    place.run(["check", "c.toml"]).refused(1, &saying);
    assert_eq!(snapshot(&place), before);
    // Nothing of it is served.
    place.run(["serve", "--config", "c.toml"]).refused(1, &saying[..2]);
}

#[test]
fn values_that_cannot_be_are_told_with_their_line() {
    let place = Place::new();
    place.create("a.img");
    for (text, why) in [
        ("[[volume]]\nname = \"x\"\n", "c.toml:1: [[volume]] has no path"),
        ("[[volume]]\npath = \"a.img\"\nengine = \"e9\"\n", "c.toml:1: no engine \"e9\""),
        ("[[volume]]\npath = \"a.img\"\nmode = \"ROT13\"\n", "the modes are"),
        ("[[volume]]\npath = \"a.img\"\ndata_unit = 1000\n", "data_unit: 1000 bytes are no data unit"),
        ("[[volume]]\npath = \"a.img\"\nblock = 7\n", "block: 7 is no power of two"),
        (
            "[[volume]]\npath = \"a.img\"\nfallback = \"maybe\"\n",
            "fallback: \"maybe\" is none of: off, allowed, forced",
        ),
        ("[[volume]]\npath = \"a.img\"\nkey_id = \"xyz\"\n", "key_id: \"xyz\" is not a key identifier"),
        ("[[volume]]\npath = 7\n", "c.toml:2: invalid type"),
        ("[[volume]\n", "c.toml:1: "),
        (
            "[[engine]]\nname = \"e\"\nspec = \"warp\"\n[[volume]]\npath = \"a.img\"\n",
            "c.toml:1: spec: engine \"warp\": no engine \"warp\"",
        ),
        (
            "[[engine]]\nname = \"e\"\n[[engine]]\nname = \"e\"\n[[volume]]\npath = \"a.img\"\n",
            "c.toml:3: there is an engine \"e\" already",
        ),
        (
            "[[volume]]\npath = \"a.img\"\n[listen]\nnbd = [\"somewhere\"]\n",
            "neither unix:PATH nor tcp:HOST:PORT",
        ),
        ("[[volume]]\npath = \"a.img\"\n[listen]\ntls = \"required\"\n", "TLS lacks a certificate"),
        ("[[volume]]\npath = \"a.img\"\n[listen]\ntls = \"perhaps\"\n", "none of: required, allowed, off"),
        ("[[volume]]\npath = \"a.img\"\n[server]\nworkers = 1000\n", "a number from 0 to 64"),
        ("", "there is no [[volume]]"),
    ] {
        place.write("c.toml", text.as_bytes());
        place.run(["check", "c.toml"]).refused(1, &[why]);
    }
    place.run(["check", "missing.toml"]).refused(4, &["config missing.toml", "No such file"]);
    place.write("c.toml", b"\xff\xfe");
    place.run(["check", "c.toml"]).refused(4, &["not text"]);
}

#[test]
fn two_volumes_with_one_key_are_told() {
    let place = Place::new();
    place.sparse("a.img", MIB);
    place.sparse("b.img", MIB);
    place.raw_key("raw", 64);
    place.write(
        "c.toml",
        b"[[volume]]\npath = \"a.img\"\nkey = \"raw:raw\"\n[[volume]]\npath = \"b.img\"\nkey = \"raw:raw\"\n",
    );
    let said = place.run(["check", "c.toml"]);
    assert!(said.done().err.contains("have one key"), "{said}");
}

#[test]
fn a_config_and_options_for_one_volume_exclude_each_other() {
    let place = good_place();
    for (option, value) in [("--key", "k"), ("--mode", "Adiantum"), ("--root", "r"), ("--name", "n")] {
        place.run(["serve", "--config", "c.toml", option, value]).refused(1, &[option, "--config"]);
    }
    place.run(["serve", "--config", "c.toml", "a.img"]).refused(1, &["VOLUME together with --config"]);
}

#[test]
fn tls_files_are_checked() {
    let place = Place::new();
    place.create("a.img");
    place.run(["serve", "--tls", "required", "a.img"]).refused(1, &["TLS lacks a certificate", "--tls-cert"]);
    place
        .run(["serve", "--tls-cert", "missing.pem", "--tls-key", "missing.key", "a.img"])
        .refused(4, &["TLS", "missing.pem"]);
    place.write("cert.pem", b"no certificate");
    place.write("key.pem", b"no key");
    place.run(["serve", "--tls-cert", "cert.pem", "--tls-key", "key.pem", "a.img"]).refused(4, &["cert.pem"]);
    assert_eq!(place.run(["serve", "--tls-cert", "cert.pem", "a.img"]).code, Some(1));
}

#[test]
fn check_finds_where_serve_could_not_listen_and_names_nobody_could_ask_for() {
    let place = Place::new();
    place.create("a.img");
    place.write("file", b"no socket");
    for (line, why) in [
        ("[listen]\nnbd = [\"unix:file\"]", "something else has that name"),
        ("[listen]\nnbd = [\"unix:no/where/s\"]", "no/where is not a directory"),
    ] {
        place.write("c.toml", format!("[[volume]]\npath = \"a.img\"\n{line}\n").as_bytes());
        place.run(["check", "c.toml"]).refused(4, &["cannot listen on unix:", why]);
        place.run(["serve", "--config", "c.toml"]).refused(4, &["cannot listen on unix:", why]);
    }
    for (name, why) in [("x".repeat(4097), "4097 bytes long"), ("a\\u0000b".to_owned(), "NUL")] {
        place.write("c.toml", format!("[[volume]]\npath = \"a.img\"\nname = \"{name}\"\n").as_bytes());
        place.run(["check", "c.toml"]).refused(1, &["c.toml:1: a.img: the name of its export", why]);
        place.run(["serve", "--config", "c.toml"]).refused(1, &[why]);
    }
}

#[test]
fn check_says_in_its_help_what_it_does_not_look_at() {
    let place = Place::new();
    let said = place.run(["check", "--help"]);
    for text in ["in use", "O_DIRECT"] {
        assert!(said.done().out.contains(text), "{text}: {said}");
    }
}

/// The advice is a command line that makes what the config wants.
#[test]
fn a_missing_volume_is_made_by_the_command_in_the_advice() {
    let place = Place::new();
    place.write(
        "c.toml",
        b"[[volume]]\npath = \"vm1.img\"\nkey = \"vm1.key\"\nmode = \"Adiantum\"\ndata_unit = 512\n\
          [listen]\nnbd = [\"unix:s\"]\n",
    );
    let said = place.run(["check", "c.toml"]);
    let create =
        "inlinecrypt volume create --size SIZE --key vm1.key --mode Adiantum --data-unit 512 vm1.img";
    said.refused(4, &["vm1.img does not exist", "inlinecrypt key generate --out vm1.key && ", create]);
    let advice = said.err.lines().find_map(|line| line.trim().strip_prefix("To make it: ")).unwrap();
    for command in advice.replace("SIZE", "1MiB").split(" && ") {
        place.run(command.split(' ').skip(1)).done();
    }
    place.run(["check", "c.toml"]).done();
    place.serve("s", ["--config", "c.toml"]).stop();
}
