use crate::place::{MIB, PATIENCE, Place};
use serde_json::Value;
use std::fs;

fn names(place: &Place) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(place.folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.contains(".sock"))
        .collect();
    names.sort();
    names
}

/// A volume of 1 MiB that begins with `content`.
fn written(place: &Place, content: &[u8]) {
    place.create("v.img");
    let server = place.serve("v.img.sock", ["v.img"]);
    server.client("").write(0, content).unwrap();
    server.stop();
}

fn reads(place: &Place, content: &[u8]) {
    let server = place.serve("v.img.sock", ["v.img"]);
    assert_eq!(server.client("").read(0, u32::try_from(content.len()).unwrap()).unwrap(), content);
    server.stop();
}

#[test]
fn a_new_key_is_made_and_the_old_one_stays_unless_it_is_to_go() {
    let place = Place::new();
    written(&place, &[5; 4096]);
    let before = place.run(["volume", "info", "--json", "v.img"]).json();
    let old = fs::read_to_string(place.path("v.img.toml")).unwrap();
    let said = place.run(["volume", "reencrypt", "v.img"]);
    assert!(said.done().out.contains("re-encrypted v.img, to key "), "{said}");
    let after = place.run(["volume", "info", "--json", "v.img"]).json();
    assert_ne!(before["key_id"], after["key_id"]);
    let key = format!("v.img.{}.key", &after["key_id"].as_str().unwrap()[..8]);
    assert_eq!(names(&place), ["home", "run", "v.img", &key, "v.img.key", "v.img.toml"].map(str::to_owned));
    let new = fs::read_to_string(place.path("v.img.toml")).unwrap();
    assert_eq!(old.lines().next(), new.lines().next(), "what it says about itself stays");
    reads(&place, &[5; 4096]);

    place.run(["volume", "convert", "--data-unit", "64k", "--remove-old-key", "v.img"]).done();
    assert!(!place.path(&key).exists() && place.path("v.img.key").exists());
    reads(&place, &[5; 4096]);
    let info = place.run(["volume", "info", "--json", "v.img"]).json();
    assert_eq!((&info["data_unit_bytes"], &info["block_bytes"]), (&65536.into(), &512.into()));
}

/// What the description said besides key and layout, it says afterwards.
#[test]
fn the_rest_of_the_description_stays() {
    let place = Place::new();
    written(&place, &[6; 512]);
    let mut text = fs::read_to_string(place.path("v.img.toml")).unwrap();
    text += "name = \"other\"\ndiscard = \"off\"\n";
    text = format!("# Mine.\n[[engine]]\nname = \"e\"\nspec = \"software:slots=3\"\n\n{text}");
    place.write("v.img.toml", text.as_bytes());
    place.run(["volume", "reencrypt", "--data-unit", "512", "v.img"]).done();
    let new: Value = toml_of(&place, "v.img.toml");
    assert_eq!(new["volume"][0]["name"], "other");
    assert_eq!(new["volume"][0]["discard"], "off");
    assert_eq!(new["engine"][0]["spec"], "software:slots=3");
    assert!(fs::read_to_string(place.path("v.img.toml")).unwrap().starts_with("# Mine.\n"));
    reads(&place, &[6; 512]);
}

fn toml_of(place: &Place, name: &str) -> Value {
    // The tests have a JSON parser only; the few forms that a description has are easily turned into it.
    let text = fs::read_to_string(place.path(name)).unwrap();
    let mut tables = serde_json::Map::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(table) = line.strip_prefix("[[").and_then(|line| line.strip_suffix("]]")) {
            current = table.to_owned();
            let list = tables.entry(table).or_insert_with(|| Value::Array(Vec::new()));
            list.as_array_mut().unwrap().push(serde_json::json!({}));
        } else {
            let (key, value) = line.split_once(" = ").unwrap();
            let last = tables[&current].as_array_mut().unwrap().last_mut().unwrap();
            last[key] = serde_json::from_str(value).unwrap();
        }
    }
    Value::Object(tables)
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_touched() {
    let place = Place::new();
    written(&place, &[7; 4096]);
    place.raw_key("short", 12);
    place.raw_key("raw", 64);
    place.sparse("bare.img", MIB);
    let before = names(&place);
    let image = fs::read(place.path("v.img")).unwrap();
    let text = fs::read(place.path("v.img.toml")).unwrap();
    let refused = |args: &[&str], code: i32, saying: &[&str]| {
        place.run(["volume", "reencrypt"].iter().chain(args)).refused(code, saying);
        assert_eq!(names(&place), before, "{args:?}");
    };
    refused(&["--key", "raw:short", "v.img"], 2, &["12 bytes", "64"]);
    refused(&["--key", "nowhere.key", "v.img"], 4, &["nowhere.key"]);
    refused(&["--key", "-", "v.img"], 1, &["standard input"]);
    refused(&["--key", "v.img.key", "v.img"], 1, &["already, in that very layout"]);
    refused(&["--resume", "v.img"], 1, &["not being re-encrypted", "To begin"]);
    refused(&["--pause", "v.img"], 4, &["no server"]);
    refused(&["missing.img"], 4, &["missing.img does not exist"]);
    refused(&["--key", "raw:raw", "--iv-offset", "3", "v.img"], 1, &["IV offset"]);
    place.run(["volume", "reencrypt", "--zone", "300k", "v.img"]);
    assert_eq!(place.run(["volume", "reencrypt", "--zone", "300k", "v.img"]).code, Some(1));
    assert_eq!(place.run(["volume", "reencrypt", "--resume", "--key", "raw:raw", "v.img"]).code, Some(1));
    // No description, so no place for the mark; and no key.
    place.write("bare.img.key", &fs::read(place.path("v.img.key")).unwrap());
    place.run(["volume", "reencrypt", "bare.img"]).refused(4, &["no description", "bare.img.toml"]);
    fs::remove_file(place.path("bare.img.key")).unwrap();
    // A size that larger data units do not divide.
    place.run(["volume", "create", "--size", "1536", "--data-unit", "512", "odd.img"]).done();
    let said = place.run(["volume", "convert", "--data-unit", "1024", "odd.img"]);
    said.refused(1, &["1536 bytes", "would have 1024"]);
    // Somebody else has it.
    let server = place.serve("v.img.sock", ["--control", "none", "v.img"]);
    let said = place.run(["volume", "reencrypt", "v.img"]);
    said.refused(5, &["v.img is served by process", "--control"]);
    server.stop();
    assert_eq!(fs::read(place.path("v.img")).unwrap(), image);
    assert_eq!(fs::read(place.path("v.img.toml")).unwrap(), text);
}

/// An engine that serves one key type cannot serve both halves: it says so, in its words, and nothing has happened.
#[test]
fn an_exclusive_engine_is_not_asked_for_both_key_types() {
    let place = Place::new();
    place.raw_key("raw", 64);
    let create =
        ["volume", "create", "--size", "1MiB", "--engine", "ice:hwkm-v2", "--key", "raw:raw", "v.img"];
    place.run(create).done();
    place.run(["key", "generate", "--engine", "ice:hwkm-v2", "--out", "w.key"]).done();
    let before = (names(&place), fs::read(place.path("v.img.toml")).unwrap());
    let said = place.run(["volume", "reencrypt", "--key", "w.key", "v.img"]);
    said.refused(1, &["v.img", "it serves raw keys only"]);
    let server = place.serve("v.img.sock", ["v.img"]);
    let said = place.run(["volume", "reencrypt", "--key", "w.key", "v.img"]);
    said.refused(1, &["does not take hardware-wrapped keys", "--root"]);
    server.stop();
    let server = place.serve("v.img.sock", ["--engine", "ice:hwkm-v2", "--root", "home/root.key", "v.img"]);
    place
        .run(["volume", "reencrypt", "--key", "w.key", "v.img"])
        .refused(1, &["v.img", "it serves raw keys only"]);
    server.stop();
    assert_eq!((names(&place), fs::read(place.path("v.img.toml")).unwrap()), before);
    // Software is not exclusive: the way in for who has a raw key.
    let text = fs::read_to_string(place.path("v.img.toml")).unwrap().replace("ice:hwkm-v2", "software");
    place.write("v.img.toml", text.as_bytes());
    place.run(["volume", "reencrypt", "v.img"]).done();
    assert_eq!(place.run(["volume", "info", "--json", "v.img"]).json()["key_type"], "hardware-wrapped");
}

/// Clients that were told of small blocks cannot be told otherwise; without clients it can be done.
#[test]
fn a_mode_with_larger_blocks_needs_clients_that_connect_anew() {
    let place = Place::new();
    written(&place, &[8; 4096]);
    let server = place.serve("v.img.sock", ["v.img"]);
    let said = place.run(["volume", "convert", "--mode", "adiantum", "v.img"]);
    said.refused(1, &["less than 4096 bytes", "--offline"]);
    server.stop();
    place.run(["volume", "convert", "--mode", "adiantum", "v.img"]).done();
    reads(&place, &[8; 4096]);
    // The way back is free: blocks stay as large as clients know them.
    let server = place.serve("v.img.sock", ["v.img"]);
    place.run(["volume", "convert", "--mode", "aes-256-xts", "v.img"]).done();
    assert_eq!(server.client("").read(0, 4096).unwrap(), [8; 4096]);
    server.stop();
    reads(&place, &[8; 4096]);
}

/// Half re-encrypted, neither a lost state nor a lost mark is taken for a whole volume.
#[test]
fn a_lost_state_or_mark_is_noticed() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "4MiB", "v.img"]).done();
    let whole = fs::read(place.path("v.img.toml")).unwrap();
    let server = place.serve("v.img.sock", ["--control", "c", "v.img"]);
    server.client("").write(0, &vec![1; 4 << 20]).unwrap();
    let begin = [
        "volume",
        "reencrypt",
        "--control",
        "c",
        "--zone",
        "256KiB",
        "--throttle",
        "1MiB",
        "--detach",
        "v.img",
    ];
    place.run(begin).done();
    let done = || {
        place.run(["status", "--json", "--control", "c"]).json()["servers"][0]["volumes"][0]["reencrypt"]["done_bytes"].as_u64().unwrap()
    };
    while done() == 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // Alone with the config that served it before, it is not served by one key.
    server.stop();
    let marked = fs::read(place.path("v.img.toml")).unwrap();
    let state = fs::read(place.path("v.img.reencrypt")).unwrap();
    let served = |code, saying: &[&str]| {
        place.run(["serve", "v.img"]).refused(code, saying);
    };

    place.run(["serve", "--read-only", "v.img"]).refused(2, &["half re-encrypted", "--resume"]);
    place.write("v.img.toml", &whole);
    served(2, &["v.img", "are re-encrypted", "add the line: reencrypt = \"v.img.reencrypt\""]);
    fs::remove_file(place.path("v.img.toml")).unwrap();
    served(2, &["v.img", "are re-encrypted"]);
    place.write("v.img.toml", &marked);
    for (at, why) in [(0, "does not begin"), (24, "version"), (8192, "plan is damaged")] {
        let mut bent = state.clone();
        for at in [at, if at < 4096 { at + 4096 } else { at }] {
            bent[at] = bent[at].wrapping_add(1);
        }
        place.write("v.img.reencrypt", &bent);
        served(4, &["v.img.reencrypt", why, "Bring it back from a copy"]);
        place.run(["volume", "info", "v.img"]).refused(4, &[why]);
    }
    fs::remove_file(place.path("v.img.reencrypt")).unwrap();
    served(4, &["v.img.reencrypt", "Bring it back from a copy"]);
    place.write("v.img.reencrypt", &state);
    let key = place.run(["volume", "info", "--json", "v.img"]).json()["reencrypt"]["key_file"].clone();
    let key = place.path(key.as_str().unwrap());
    fs::rename(&key, place.path("gone")).unwrap();
    served(4, &["v.img", "key"]);
    fs::rename(place.path("gone"), &key).unwrap();
    place.run(["check", "v.img.toml"]).done();
    let said = place.run(["volume", "reencrypt", "--resume", "--throttle", "0", "v.img"]);
    said.done();
    let server = place.serve("v.img.sock", ["v.img"]);
    assert_eq!(server.client("").read(0, 4 << 20).unwrap(), vec![1; 4 << 20]);
    server.stop();
}

/// A file where the state is to be, and that is none, is somebody's.
#[test]
fn what_is_no_state_is_left_alone() {
    let place = Place::new();
    written(&place, &[2; 4096]);
    place.write("v.img.reencrypt", b"precious");
    reads(&place, &[2; 4096]);
    place.run(["volume", "reencrypt", "v.img"]).refused(5, &["v.img.reencrypt exists already", "no state"]);
    assert_eq!(fs::read(place.path("v.img.reencrypt")).unwrap(), b"precious");
    assert_eq!(names(&place).iter().filter(|name| name.ends_with(".key")).count(), 1, "no key was made");
    reads(&place, &[2; 4096]);
}

/// All is under the new key, and the description could not be written; then the server is killed. The next one writes it.
#[test]
fn the_last_step_is_made_again_until_it_succeeds() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "4MiB", "v.img"]).done();
    let mut server = place.serve("v.img.sock", ["--control", "c", "v.img"]);
    server.client("").write(0, &vec![1; 4 << 20]).unwrap();
    let begin = [
        "volume",
        "reencrypt",
        "--control",
        "c",
        "--throttle",
        "1MiB",
        "--detach",
        "--remove-old-key",
        "v.img",
    ];
    place.run(begin).done();
    let marked = fs::read(place.path("v.img.toml")).unwrap();
    // Something that no file takes the place of.
    fs::remove_file(place.path("v.img.toml")).unwrap();
    fs::create_dir_all(place.path("v.img.toml/in")).unwrap();
    place
        .run(["volume", "reencrypt", "--control", "c", "--resume", "--throttle", "0", "--detach", "v.img"])
        .done();
    let state = || {
        place.run(["status", "--json", "--control", "c"]).json()["servers"][0]["volumes"][0]["reencrypt"]
            .clone()
    };
    while state()["state"] != "failing" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(state()["reason"].as_str().unwrap().contains("v.img.toml"), "{}", state());
    assert_eq!(server.client("").read(0, 4 << 20).unwrap(), vec![1; 4 << 20]);
    server.signal(rustix::process::Signal::KILL);
    server.process.wait(PATIENCE).unwrap();
    fs::remove_dir_all(place.path("v.img.toml")).unwrap();
    place.write("v.img.toml", &marked);
    let info = place.run(["volume", "info", "v.img"]);
    assert!(info.done().out.contains("100 %"), "{info}");
    let server = place.serve("v.img.sock", ["--control", "c", "v.img"]);
    while state()["state"] != "done" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(server.client("").read(0, 4 << 20).unwrap(), vec![1; 4 << 20]);
    server.stop();
    let text = fs::read_to_string(place.path("v.img.toml")).unwrap();
    assert!(!text.contains("reencrypt"), "{text}");
    assert!(!place.path("v.img.key").exists() && !place.path("v.img.reencrypt").exists());
}

/// A config that names the key knows nothing of the new one: that is told when it begins, and at the next start.
#[test]
fn a_config_that_names_the_key_is_told_of() {
    let place = Place::new();
    written(&place, &[3; 512]);
    let config = "[[volume]]\npath = \"v.img\"\nkey = \"v.img.key\"\n[listen]\nnbd = [\"unix:s.sock\"]\n";
    place.write("c.toml", config.as_bytes());
    let server = place.serve("s.sock", ["--config", "c.toml"]);
    let said = place.run(["volume", "reencrypt", "v.img"]);
    assert!(
        said.done().err.contains("note: the config or command line of the server names key or layout"),
        "{said}"
    );
    server.stop();
    place.run(["serve", "--config", "c.toml"]).refused(2, &["wrong key", "v.img.toml"]);
    reads(&place, &[3; 512]);
}

/// The new key may be the old one, for another layout; whatever its file is called then, it is not removed.
#[test]
fn the_only_key_is_not_removed_as_the_old_one() {
    let place = Place::new();
    written(&place, &[4; 4096]);
    std::os::unix::fs::symlink("v.img.key", place.path("other")).unwrap();
    fs::hard_link(place.path("v.img.key"), place.path("hard")).unwrap();
    fs::copy(place.path("v.img.key"), place.path("copy")).unwrap();
    let absolute = place.path("v.img.key");
    for key in ["v.img.key", "./v.img.key", absolute.to_str().unwrap(), "other", "hard", "copy"] {
        let args = ["volume", "reencrypt", "--key", key, "--data-unit", "512", "--remove-old-key", "v.img"];
        place.run(args).refused(1, &["--remove-old-key", "the new key is that key"]);
        assert!(absolute.exists() && !place.path("v.img.reencrypt").exists(), "{key}");
    }
    place.run(["volume", "reencrypt", "--key", "./v.img.key", "--data-unit", "512", "v.img"]).done();
    reads(&place, &[4; 4096]);
}

/// Begins to re-encrypt the 4 MiB of `v.img`, all ones, and stops half-way.
fn half_way(place: &Place, name: &str) {
    let server = place.serve("s.sock", ["--control", "c", "--nbd", "unix:s.sock", name]);
    server.client("").write(0, &vec![1; 4 << 20]).unwrap();
    let begin =
        ["volume", "reencrypt", "--control", "c", "--zone", "256KiB", "--throttle", "1MiB", "--detach"];
    place.run(begin.iter().chain(&[name])).done();
    while place.run(["status", "--json", "--control", "c"]).json()["servers"][0]["volumes"][0]["reencrypt"]["done_bytes"]
        == 0
    {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    server.stop();
}

/// A link to a volume with a description of its own is another name of it: neither leads past a re-encryption by the other.
#[test]
fn another_name_of_the_volume_is_not_a_whole_volume() {
    for (begun, other) in [("v.img", "real/w.img"), ("real/w.img", "v.img")] {
        let place = Place::new();
        fs::create_dir(place.path("real")).unwrap();
        place.run(["volume", "create", "--size", "4MiB", "real/w.img"]).done();
        std::os::unix::fs::symlink("real/w.img", place.path("v.img")).unwrap();
        let text = fs::read_to_string(place.path("real/w.img.toml")).unwrap();
        let text = text.replace("path = \"w.img\"", "path = \"v.img\"");
        let text = text.replace("key = \"w.img.key\"", "key = \"real/w.img.key\"");
        place.write("v.img.toml", text.as_bytes());
        half_way(&place, begun);
        place.run(["serve", other]).refused(2, &["are re-encrypted", "under which it was begun"]);
        place.run(["volume", "reencrypt", other]).refused(2, &["are re-encrypted"]);
        place.run(["volume", "reencrypt", "--resume", "--throttle", "0", begun]).done();
        place.run(["serve", "v.img"]).refused(2, &["say different things", "v.img.toml", "w.img.toml"]);
        place.write("gone", b"");
        fs::rename(place.path(&format!("{other}.toml")), place.path("gone")).unwrap();
        let server = place.serve("s.sock", ["--nbd", "unix:s.sock", begun]);
        assert_eq!(server.client("").read(0, 4 << 20).unwrap(), vec![1; 4 << 20]);
        server.stop();
    }
}

/// A kill between the last steps leaves a state that is complete, and the old key; who comes next removes both.
#[test]
fn what_a_kill_at_the_very_end_leaves_is_removed() {
    for by_server in [true, false] {
        let place = Place::new();
        place.run(["volume", "create", "--size", "4MiB", "v.img"]).done();
        // All is under the new key, and the description cannot be written.
        let server = place.serve("s.sock", ["--control", "c", "--nbd", "unix:s.sock", "v.img"]);
        let begin = [
            "volume",
            "reencrypt",
            "--control",
            "c",
            "--throttle",
            "1MiB",
            "--detach",
            "--remove-old-key",
            "v.img",
        ];
        place.run(begin).done();
        fs::remove_file(place.path("v.img.toml")).unwrap();
        fs::create_dir_all(place.path("v.img.toml/in")).unwrap();
        place
            .run([
                "volume",
                "reencrypt",
                "--control",
                "c",
                "--resume",
                "--throttle",
                "0",
                "--detach",
                "v.img",
            ])
            .done();
        let state = || {
            place.run(["status", "--json", "--control", "c"]).json()["servers"][0]["volumes"][0]["reencrypt"]
                ["state"]
                .clone()
        };
        while state() != "failing" {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        server.signal(rustix::process::Signal::KILL);
        drop(server);
        // The description is written, and nothing else was done.
        let prefix = fs::read(place.path("v.img.reencrypt")).unwrap();
        let len = usize::try_from(u64::from_le_bytes(prefix[64..72].try_into().unwrap())).unwrap();
        let plan: Value = serde_json::from_slice(&prefix[8192..8192 + len]).unwrap();
        fs::remove_dir_all(place.path("v.img.toml")).unwrap();
        place.write("v.img.toml", plan["description"].as_str().unwrap().as_bytes());
        if by_server {
            place.serve("t.sock", ["--nbd", "unix:t.sock", "v.img"]).stop();
        } else {
            place.run(["volume", "reencrypt", "--resume", "v.img"]).done();
        }
        assert!(!place.path("v.img.key").exists() && !place.path("v.img.reencrypt").exists(), "{by_server}");
        place.serve("u.sock", ["--nbd", "unix:u.sock", "v.img"]).stop();
    }
}

/// A table could only name one of the keys.
#[test]
fn half_re_encrypted_there_is_no_dm_table() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "4MiB", "v.img"]).done();
    place.run(["volume", "info", "--dm-table", "v.img"]).done();
    half_way(&place, "v.img");
    place.run(["volume", "info", "--dm-table", "v.img"]).refused(2, &["half re-encrypted", "--resume"]);
}

/// The size that the volume had when it began is the one that both keys are for.
#[test]
fn a_volume_that_grew_half_way_is_told_how_long_it_was() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "4MiB", "v.img"]).done();
    half_way(&place, "v.img");
    let file = fs::File::options().write(true).open(place.path("v.img")).unwrap();
    file.set_len(8 << 20).unwrap();
    place.run(["serve", "v.img"]).refused(4, &["when its re-encryption began", "truncate -s 4194304 v.img"]);
    file.set_len(4 << 20).unwrap();
    place.run(["volume", "reencrypt", "--resume", "--throttle", "0", "v.img"]).done();
}

/// Its state is in its header: what only a description can say is refused, and nothing is left beside it.
#[test]
fn a_luks_container_has_all_of_it_in_its_header() {
    let place = Place::new();
    place.write("p", b"word");
    let args = ["luks", "create", "--size", "1MiB", "--pbkdf", "pbkdf2", "--passphrase-file", "p", "l.img"];
    place.run(args).done();
    let before = fs::read(place.path("l.img")).unwrap();
    let reencrypt = ["volume", "reencrypt", "--passphrase-file", "p", "l.img"];
    place.run(["volume", "reencrypt", "l.img"]).refused(2, &["l.img asks for a passphrase"]);
    place
        .run([&reencrypt[..], &["--keep-holes"]].concat())
        .refused(1, &["l.img is a LUKS container", "Leave out --keep-holes"]);
    place.run([&reencrypt[..], &["--resume"]].concat()).refused(1, &["not being re-encrypted"]);
    assert!(fs::read(place.path("l.img")).unwrap() == before);
    place.run(reencrypt).done();
    place.run(["luks", "test", "--passphrase-file", "p", "l.img"]).done();
    assert!(!place.path("l.img.reencrypt").exists() && !place.path("l.img.toml").exists());
}

/// What has no storage gets some, which is told before.
#[test]
fn that_holes_get_storage_is_told() {
    let place = Place::new();
    place.create("v.img");
    let said = place.run(["volume", "reencrypt", "v.img"]);
    assert!(said.done().err.contains("have no storage, and get it; --keep-holes"), "{said}");
    let said = place.run(["volume", "reencrypt", "v.img"]);
    assert!(!said.done().err.contains("no storage"), "{said}");
}

/// A faster throttle does not wait for what the slower one had left to wait.
#[test]
fn a_new_throttle_counts_at_once() {
    let place = Place::new();
    place.create("v.img");
    let server = place.serve("s", ["--control", "c", "--nbd", "unix:s", "v.img"]);
    // A zone an hour.
    let begin = ["--zone", "256KiB", "--throttle", "72", "--detach", "v.img"];
    place.run(["volume", "reencrypt", "--control", "c"].iter().chain(&begin)).done();
    let mut again = place.command();
    again.args(["volume", "reencrypt", "--control", "c", "--resume", "--throttle", "0", "v.img"]);
    assert_eq!(crate::place::run_command(again).code, Some(0));
    server.stop();
}

/// Each of two roots has a passphrase of its own.
#[test]
fn two_roots_have_two_passphrases() {
    let place = Place::new();
    place.write("p", b"word");
    place.write("q", b"other word");
    place.run(["root", "create", "passphrase:r", "--passphrase-file", "p"]).done();
    place.run(["root", "create", "passphrase:s", "--passphrase-file", "q"]).done();
    let old = ["--root", "passphrase:r", "--passphrase-file", "p", "v.img"];
    place.run(["volume", "create", "--size", "1MiB"].iter().chain(&old)).done();
    let change = |more: &[&str]| {
        let args = ["volume", "reencrypt", "--new-root", "passphrase:s", "--passphrase-file", "p"];
        place.run(args.iter().chain(more).chain(&["v.img"]))
    };
    place
        .run(["volume", "reencrypt", "--passphrase-file", "p", "--new-passphrase-file", "q", "v.img"])
        .refused(1, &["--new-passphrase-file", "keeps its root"]);
    assert_eq!(change(&[]).code, Some(2), "the old one is not the new root's");
    change(&["--new-passphrase-file", "q"]).done();
    place.serve("t", ["--nbd", "unix:t", "--passphrase-file", "q", "v.img"]).stop();
}
