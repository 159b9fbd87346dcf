use crate::place::{MIB, Place, assert_same, run_command};
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

#[test]
fn sizes_that_are_no_multiple_of_the_data_unit_are_refused_with_those_that_are() {
    let place = Place::new();
    let said = place.run(["serve", "--create", "1000000", "v.img"]);
    said.refused(1, &["1000000 bytes are not a multiple of the data unit, 4096", "999424 and 1003520"]);
    place.run(["volume", "create", "--size", "100", "v.img"]).refused(1, &["The least is 4096 bytes"]);
    place.run(["volume", "create", "--size", "0", "v.img"]).refused(1, &["multiple"]);
    let said = place.run(["volume", "create", "--size", "64k", "--data-unit", "65536", "v.img"]);
    said.done();
    for left in ["v.img", "v.img.toml", "v.img.key"] {
        assert!(place.path(left).exists());
    }
}

#[test]
fn a_refused_size_makes_nothing_at_all() {
    let place = Place::new();
    place.run(["serve", "--create", "1000001", "v.img"]).refused(1, &[]);
    let names: Vec<_> =
        fs::read_dir(place.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["run"], "not even a root");
}

#[test]
fn sizes_that_can_be_misread_are_refused() {
    let place = Place::new();
    for (size, why) in [("1GB", "write GiB"), ("1.5G", "no unit"), ("big", "whole number"), ("-1", "size")] {
        let said = place.run(["serve", &format!("--create={size}"), "v.img"]);
        assert_eq!(said.code, Some(1), "{said}");
        assert!(said.err.contains(why), "{said}");
    }
}

#[test]
fn nothing_that_exists_is_overwritten() {
    let place = Place::new();
    place.write("v.img", b"precious");
    place
        .run(["serve", "--create", "1MiB", "v.img"])
        .refused(5, &["v.img exists already", "without --create"]);
    assert_eq!(fs::read(place.path("v.img")).unwrap(), b"precious");
    // A link to nowhere is something, too.
    std::os::unix::fs::symlink("nowhere", place.path("w.img")).unwrap();
    place.run(["volume", "create", "--size", "1M", "w.img"]).refused(5, &["w.img exists already"]);
    // A description of something else.
    place.write(
        "x.img.toml",
        b"[[volume]]\npath = \"x.img\"\nkey_id = \"00112233445566778899aabbccddeeff\"\n",
    );
    place
        .run(["serve", "--create", "1M", "x.img"])
        .refused(5, &["x.img.toml exists already", "its key is not"]);
    place.write("y.img.toml", b"title = \"something else\"\n");
    place.run(["serve", "--create", "1M", "y.img"]).refused(5, &["y.img.toml exists already", "unknown key"]);
    assert!(!place.path("x.img").exists() && !place.path("x.img.key").exists());
    // A key that is none.
    place.write("z.img.key", b"");
    place.run(["serve", "--create", "1M", "z.img"]).refused(2, &["z.img.key is empty"]);
    assert_eq!(fs::read(place.path("z.img.key")).unwrap(), b"");
}

#[test]
fn what_a_crash_left_behind_does_not_block_the_next_attempt() {
    let place = Place::new();
    place.create("v.img");
    let before = place.run(["volume", "info", "--json", "v.img"]).json();
    // The power went after key and description, and left a temporary name.
    fs::remove_file(place.path("v.img")).unwrap();
    place.write(".v.img.77.tmp", b"");
    // What was to be longer is not this volume.
    let said = place.run(["volume", "create", "--size", "2M", "v.img"]);
    said.refused(5, &["v.img.toml exists already", "its size is 1 MiB"]);
    let said = place.run(["volume", "create", "--size", "1M", "v.img"]);
    said.done();
    assert!(said.err.contains("v.img.key exists already and is used"), "{said}");
    let after = place.run(["volume", "info", "--json", "v.img"]).json();
    assert_eq!(after["key_id"], before["key_id"]);
    assert_eq!(after["len_bytes"], MIB);
    // After the key alone.
    fs::remove_file(place.path("v.img")).unwrap();
    fs::remove_file(place.path("v.img.toml")).unwrap();
    place.run(["volume", "create", "--size", "3M", "v.img"]).done();
    place.serve("v.img.sock", ["v.img"]).stop();
}

#[test]
fn what_is_no_volume_is_refused() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    place.sparse("empty.img", 0);
    place.sparse("short.img", 100);
    let key = format!("raw:{}", place.raw_key("raw", 64).display());
    place
        .run(["serve", "missing.img"])
        .refused(4, &["missing.img does not exist", "--create 1GiB missing.img"]);
    place.run(["serve", "--key", &key, "folder"]).refused(4, &["folder is a directory"]);
    place.run(["serve", "--key", &key, "/dev/null"]).refused(4, &["/dev/null is neither"]);
    place.run(["serve", "--key", &key, "empty.img"]).refused(4, &["0 bytes", "not even one data unit"]);
    place
        .run(["serve", "--key", &key, "short.img"])
        .refused(4, &["100 bytes", "not even one data unit of 4096"]);
    place
        .run(["volume", "create", "--size", "1M", "no/where.img"])
        .refused(4, &["no is not a directory", "mkdir"]);
    place.run(["serve"]).refused(1, &["nothing to serve"]);
    place.run(["serve", "--create", "1M", "a.img", "b.img"]).refused(1, &["2 are named"]);
}

#[test]
fn a_volume_that_lost_its_end_is_refused_and_one_that_grew_is_told() {
    let place = Place::new();
    place.create("v.img");
    let description = fs::read_to_string(place.path("v.img.toml")).unwrap();
    assert!(description.contains("\nsize = 1048576\n"), "{description}");
    place.write("c.toml", b"[[volume]]\npath = \"v.img\"\n");
    let resize =
        |len| fs::File::options().write(true).open(place.path("v.img")).unwrap().set_len(len).unwrap();
    for len in [MIB / 2, 0] {
        resize(len);
        for verb in [&["serve", "v.img"][..], &["check", "c.toml"], &["volume", "info", "v.img"]] {
            place.run(verb).refused(4, &["v.img has lost its end", "1 MiB", "v.img.toml", "from a copy"]);
        }
    }
    resize(2 * MIB);
    for verb in [&["check", "c.toml"][..], &["volume", "info", "v.img"]] {
        let said = place.run(verb);
        assert!(said.done().err.contains("v.img has grown: it has 2 MiB, and had 1 MiB"), "{said}");
    }
    let server = place.serve("v.img.sock", ["v.img"]);
    assert_eq!(server.client("").export().size, 2 * MIB);
    server.stop();
    // A description of before sizes were noted.
    resize(MIB / 2);
    place.write("v.img.toml", description.replace("size = 1048576\n", "").as_bytes());
    let server = place.serve("v.img.sock", ["v.img"]);
    assert_eq!(server.client("").export().size, MIB / 2);
    server.stop();
}

#[test]
fn what_is_wrong_with_the_file_is_said_before_that_it_has_no_key() {
    let place = Place::new();
    fs::create_dir(place.path("folder")).unwrap();
    place.sparse("empty.img", 0);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    for (name, why) in [
        ("folder", "folder is a directory"),
        ("fifo", "fifo is neither"),
        ("/dev/null", "/dev/null is neither"),
        ("empty.img", "empty.img has 0 bytes"),
    ] {
        let said = place.run(["serve", name]);
        said.refused(4, &[why]);
        assert!(!said.err.contains("no key"), "{said}");
    }
}

#[test]
fn nothing_is_made_that_could_not_be_served() {
    let place = Place::new();
    let folder = "d".repeat(100);
    fs::create_dir(place.path(&folder)).unwrap();
    let deep = format!("{folder}/v.img");
    place
        .run(["serve", "--create", "1M", &deep])
        .refused(4, &["cannot listen on unix:", "111 bytes", "107 at most", "--nbd unix:/short/path"]);
    let long = "n".repeat(5000);
    place.run(["serve", "--create", "1M", "--name", &long, "v.img"]).refused(1, &["5000 bytes", "4096"]);
    let name = "v".repeat(251);
    let nbd = ["serve", "--create", "1M", "--nbd", "unix:s", &name];
    place.run(nbd).refused(1, &["251 bytes long", "250 is the most", "shorter"]);
    place.run(["volume", "create", "--size", "1M", &name]).refused(1, &["251 bytes long"]);
    let names: Vec<_> =
        fs::read_dir(place.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(fs::read_dir(place.path(&folder)).unwrap().count(), 0);
    // The same place is fine with a socket elsewhere, and so is the longest name.
    place.serve("s", ["--create", "1M", "--nbd", "unix:s", &deep]).stop();
    place.serve("s", ["--create", "1M", "--nbd", "unix:s", &name[1..]]).stop();
}

#[test]
fn an_unused_tail_is_told() {
    let place = Place::new();
    place.sparse("v.img", MIB + 100);
    let key = format!("raw:{}", place.raw_key("raw", 64).display());
    let server = place.serve("v.img.sock", ["--key", &key, "v.img"]);
    assert_eq!(server.client("").export().size, MIB);
    let err = server.stop();
    assert!(err.contains("its last 100 bytes are not a whole data unit of 4096"), "{err}");
}

#[test]
fn the_wrong_key_is_noticed_with_a_description() {
    let place = Place::new();
    place.create("a.img");
    place.create("b.img");
    let ids = ["a.img", "b.img"]
        .map(|volume| place.run(["volume", "info", "--json", volume]).json()["key_id"].clone());
    let said = place.run(["serve", "--key", "b.img.key", "a.img"]);
    said.refused(
        2,
        &["wrong key", ids[0].as_str().unwrap(), ids[1].as_str().unwrap(), "a.img.toml", "headerless"],
    );
    assert!(!place.path("a.img.sock").exists());
}

#[test]
fn without_a_description_it_is_said_what_cannot_be_known() {
    let place = Place::new();
    place.create("v.img");
    fs::remove_file(place.path("v.img.toml")).unwrap();
    let server = place.serve("v.img.sock", ["v.img"]);
    let err = server.stop();
    assert!(err.contains("no description, and the format has no header"), "{err}");
    let info = place.run(["volume", "info", "v.img"]);
    assert!(info.done().out.contains("cannot be known"), "{info}");
    let info = place.run(["volume", "info", "--json", "v.img"]).json();
    assert_eq!((&info["described"], &info["mode"]), (&json!(false), &json!(null)));
    // Neither key nor description.
    fs::remove_file(place.path("v.img.key")).unwrap();
    place.run(["serve", "v.img"]).refused(4, &["has no key", "v.img.key does not exist", "--key raw:FILE"]);
}

#[test]
fn options_cannot_contradict_a_description() {
    let place = Place::new();
    place.create("v.img");
    let said = place.run(["serve", "--mode", "adiantum", "--data-unit", "512", "--iv-offset", "8", "v.img"]);
    said.refused(
        1,
        &[
            "v.img.toml says mode = AES-256-XTS, and Adiantum is asked for",
            "data_unit = 4096, and 512",
            "iv_offset = 0, and 8",
        ],
    );
    // What a description says about something else is none.
    fs::rename(place.path("v.img"), place.path("w.img")).unwrap();
    fs::rename(place.path("v.img.toml"), place.path("w.img.toml")).unwrap();
    place.run(["serve", "w.img"]).refused(4, &["not the description of w.img"]);
}

#[test]
fn every_layout_can_be_made_and_served_again() {
    let place = Place::new();
    for (name, options) in [
        ("xts512", vec!["--data-unit", "512"]),
        ("essiv", vec!["--mode", "AES-128-CBC-ESSIV"]),
        ("adiantum", vec!["--mode", "Adiantum", "--data-unit", "64k"]),
        ("sm4", vec!["--mode", "sm4-xts", "--iv-offset", "123456784", "--block", "1k"]),
        ("kdf", vec!["--engine", "software:slots=2,kdf=legacykdf", "--root", "other.key"]),
        ("hwkm1", vec!["--engine", "ice:hwkm-v1"]),
        ("hwkm2", vec!["--engine", "ice:hwkm-v2"]),
        ("next", vec!["--engine", "ice:next", "--data-unit", "512"]),
    ] {
        let mut arguments = vec!["volume", "create", "--size", "1M", name];
        arguments.extend(options);
        place.run(arguments).done();
        let socket = format!("{name}.sock");
        let server = place.serve(&socket, [name]);
        server.client("").write(0, &[9; 65536]).unwrap();
        server.stop();
        let key = place.run(["key", "info", &format!("{name}.key")]);
        assert!(key.done().out.contains("long-term"), "{key}");
        let server = place.serve(&socket, [name]);
        assert_same(&server.client("").read(0, 65536).unwrap(), &[9; 65536]);
        server.stop();
    }
    assert!(!place.path("home/root.key").exists() || place.path("other.key").exists());
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let place = Place::new();
    for (options, why) in [
        (vec!["--data-unit", "1000"], "power of two from 512 to 65536"),
        (vec!["--data-unit", "131072"], "power of two from 512 to 65536"),
        (vec!["--data-unit", "256"], "power of two from 512 to 65536"),
        (vec!["--block", "100"], "power of two"),
        (vec!["--mode", "AES-256-GCM"], "the modes are: AES-256-XTS"),
        (vec!["--block", "8192"], "from 512 to the data unit"),
        (vec!["--mode", "Adiantum", "--block", "512"], "interrupted write would damage"),
        (vec!["--iv-offset", "18446744073709551608"], "overflow"),
        (vec!["--engine", "warp"], "the engines are: software"),
        (vec!["--engine", "software:slots=x"], "not a number"),
    ] {
        let mut arguments = vec!["volume", "create", "--size", "1M", "v.img"];
        arguments.extend(options);
        let said = place.run(arguments);
        assert_eq!(said.code, Some(1), "{said}");
        assert!(said.err.contains(why), "{why}: {said}");
    }
    assert!(!place.path("v.img").exists() && !place.path("v.img.toml").exists());
}

#[test]
fn a_second_server_on_a_volume_is_told_who_has_it() {
    let place = Place::new();
    place.create("v.img");
    let server = place.serve("v.img.sock", ["v.img"]);
    let said = place.run(["serve", "--nbd", "unix:other", "v.img"]);
    said.refused(5, &[&format!("process {}", server.pid()), "inlinecrypt"]);
    let said = place.run(["serve", "--read-only", "--nbd", "unix:other", "v.img"]);
    said.refused(5, &[&format!("process {}", server.pid())]);
    server.stop();
}

#[test]
fn places_that_are_taken_are_refused_with_who_has_them() {
    let place = Place::new();
    place.create("a.img");
    place.create("b.img");
    let server = place.serve("s", ["--nbd", "unix:s", "a.img"]);
    let said = place.run(["serve", "--nbd", "unix:s", "b.img"]);
    said.refused(5, &["cannot listen on unix:s", &format!("process {}", server.pid())]);
    server.stop();
    place.write("s", b"no socket");
    place.run(["serve", "--nbd", "unix:s", "b.img"]).refused(4, &["something else has that name"]);
    assert_eq!(fs::read(place.path("s")).unwrap(), b"no socket");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let said = place.run(["serve", "--nbd", &format!("tcp:127.0.0.1:{port}"), "b.img"]);
    said.refused(5, &[&format!("cannot listen on tcp:127.0.0.1:{port}"), "in use"]);
    let said = place.run(["serve", "--nbd", "unix:t", "--nbd", "unix:t", "b.img"]);
    said.refused(1, &["two listeners on unix:"]);
    let said = place.run(["serve", "--nbd", "here", "b.img"]);
    assert_eq!(said.code, Some(1), "{said}");
    assert!(said.err.contains("neither unix:PATH nor tcp:HOST:PORT"), "{said}");
    let long = format!("unix:{}", "x".repeat(200));
    let said = place.run(["serve", "--nbd", &long, "b.img"]);
    said.refused(4, &["cannot listen on"]);
}

#[test]
fn one_name_or_file_twice_is_refused() {
    let place = Place::new();
    place.create("v.img");
    fs::create_dir(place.path("d")).unwrap();
    place.create("d/v.img");
    place.run(["serve", "v.img", "d/v.img"]).refused(1, &["v.img and d/v.img would both be export \"v\""]);
    fs::hard_link(place.path("v.img"), place.path("w.img")).unwrap();
    fs::copy(place.path("v.img.key"), place.path("w.img.key")).unwrap();
    place.run(["serve", "v.img", "w.img"]).refused(1, &["v.img and w.img are one file"]);
    place.run(["serve", "--key", "v.img.key", "v.img", "d/v.img"]).refused(1, &["--key is for one volume"]);
}

/// The command as somebody who is not root, for what root may do anyway.
pub(crate) fn as_nobody(place: &Place, arguments: &[&str]) -> Option<Command> {
    let mut command = place.command();
    command.args(arguments);
    if rustix::process::geteuid().is_root() {
        const NOBODY: u32 = 65_534;
        for entry in [place.folder().to_owned(), place.path("run"), place.path("home")] {
            if entry.exists() {
                std::os::unix::fs::chown(entry, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        command.uid(NOBODY).gid(NOBODY);
        let mut probe = place.command();
        if probe.arg("--version").uid(NOBODY).gid(NOBODY).output().is_err() {
            eprintln!("SKIPPED: another user cannot run the program where it lies");
            return None;
        }
    }
    Some(command)
}

#[test]
fn a_file_that_may_not_be_written_can_be_served_read_only() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    let raw = place.raw_key("raw", 64);
    fs::set_permissions(place.path("v.img"), fs::Permissions::from_mode(0o444)).unwrap();
    let Some(command) = as_nobody(&place, &["serve", "--key", "raw:raw", "v.img"]) else { return };
    std::os::unix::fs::chown(raw, rustix::process::geteuid().is_root().then_some(65_534), None).unwrap();
    run_command(command).refused(2, &["v.img is not writable", "--read-only"]);
    place.write("c.toml", b"[[volume]]\npath = \"v.img\"\nkey = \"raw:raw\"\n");
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(place.path("c.toml"), Some(65_534), None).unwrap();
    }
    run_command(as_nobody(&place, &["check", "c.toml"]).unwrap()).refused(2, &["v.img is not writable"]);
    let command = as_nobody(&place, &["serve", "--read-only", "--key", "raw:raw", "v.img"]).unwrap();
    place.start("v.img.sock", command).stop();
}

#[test]
fn what_may_not_be_read_is_refused() {
    let place = Place::new();
    place.create("v.img");
    let Some(command) = as_nobody(&place, &["serve", "v.img"]) else { return };
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs files of another user");
        return;
    }
    // The root belongs to root, and its home to nobody.
    run_command(command).refused(2, &[]);
}

#[test]
fn a_description_serves_as_a_config() {
    let place = Place::new();
    place.create("v.img");
    let server = place.serve("v.img.sock", ["--config", "v.img.toml"]);
    server.client("v").read(0, 512).unwrap();
    server.stop();
    let said = place.run(["check", "v.img.toml"]);
    assert!(said.done().out.contains("can be served"), "{said}");
}

#[test]
fn names_of_every_kind_work() {
    let place = Place::new();
    for name in ["with blank.img", "quote'd.img", "-dash.img", "ümläut"] {
        let path = place.path(name);
        place
            .run(["volume".as_ref(), "create".as_ref(), "--size".as_ref(), "1M".as_ref(), path.as_os_str()])
            .done();
        let server = place.serve(&format!("{name}.sock"), [&path]);
        let greeting = server.greeting();
        assert!(greeting.contains("%") || name == "-dash.img", "{greeting}");
        server.client("").read(0, 512).unwrap();
        server.stop();
    }
}

#[test]
fn direct_with_data_units_that_are_too_small_says_what_helps() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "1M", "--data-unit", "512", "v.img"]).done();
    let mut command = place.command();
    command.args(["serve", "--direct", "v.img"]);
    // Not every filesystem asks for more than 512 bytes, or can do it at all.
    let mut process = inlinecrypt_testkit::ServerProcess::start(
        command.stderr(fs::File::create(place.path("err")).unwrap()).stdout(std::process::Stdio::null()),
    )
    .unwrap();
    if process.wait(std::time::Duration::from_secs(3)).is_ok() {
        let said = fs::read_to_string(place.path("err")).unwrap();
        assert!(said.contains("--direct"), "{said}");
        eprintln!("{said}");
    } else {
        eprintln!("SKIPPED: direct I/O takes 512 bytes here");
        process.kill().unwrap();
    }
}

/// Other derivations may have the same key identifier, and another inline encryption key.
#[test]
fn an_engine_with_another_derivation_is_refused() {
    let place = Place::new();
    let create = ["volume", "create", "--size", "1MiB", "--engine"];
    place.run(create.iter().chain(&["software:kdf=legacykdf", "kd.img"])).done();
    place.create("usual.img");
    place.run(["serve", "--engine", "software", "kd.img"]).refused(1, &["kd.img.toml", "legacykdf", "by v1"]);
    place.write("c.toml", b"[[engine]]\nname = \"e\"\n[[volume]]\npath = \"kd.img\"\n");
    place.run(["check", "c.toml"]).refused(1, &["kd.img.toml", "kdf=legacykdf"]);
    let other = ["serve", "--engine", "software:kdf=legacykdf", "usual.img"];
    place.run(other).refused(1, &["usual.img.toml", "by leaving it out", "kdf=v1"]);
    // Another number of slots: the same keys.
    place.serve("s", ["--nbd", "unix:s", "--engine", "software:slots=2,kdf=legacykdf", "kd.img"]).stop();
    place.serve("t", ["--nbd", "unix:t", "--engine", "software:slots=3", "usual.img"]).stop();
}
