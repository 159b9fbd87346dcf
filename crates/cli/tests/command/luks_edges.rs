//! Containers that are cut short, half re-encrypted, detached from their headers, or to be served as they are.

use crate::place::Place;
use std::fs;

const CHEAP: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
const MIB: u64 = 1 << 20;

/// A container `disk` of 2 MiB behind a header of 1 MiB, with the passphrase in `pass`.
fn place() -> Place {
    let place = Place::new();
    place.write("pass", b"a passphrase\n");
    let create = ["luks", "create", "--size", "2MiB", "--header-size", "1MiB", "--passphrase-file", "pass"];
    place.run([&create[..], &CHEAP, &["disk"]].concat()).done();
    place
}

fn reencrypt<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["volume", "reencrypt", "--passphrase-file", "pass"], more].concat()
}

#[test]
fn what_was_cut_off_a_container_is_not_made_anew() {
    let place = place();
    for len in [MIB, 600 << 10, 40 << 10] {
        fs::copy(place.path("disk"), place.path("cut")).unwrap();
        fs::File::options().write(true).open(place.path("cut")).unwrap().set_len(len).unwrap();
        for verb in [
            &["serve", "--passphrase-file", "pass", "cut"][..],
            &reencrypt(&["cut"]),
            &["volume", "info", "cut"],
        ] {
            let said = place.run(verb);
            said.refused(4, &["bring the whole container back"]);
            assert!(!said.err.contains("--create"), "{said}");
            // Nothing is going to happen.
            assert!(!said.err.contains("no storage"), "{said}");
        }
    }
}

#[test]
fn holes_are_told_of_when_it_begins_and_not_before() {
    let place = place();
    let said = place.run(reencrypt(&["--keep-holes", "disk"]));
    assert!(!said.refused(1, &["Leave out --keep-holes"]).err.contains("no storage"), "{said}");
    let said = place.run(["volume", "reencrypt", "--passphrase-file", "nothing", "disk"]);
    assert!(!said.refused(4, &["nothing"]).err.contains("no storage"), "{said}");
    let said = place.run(reencrypt(&["disk"]));
    assert!(said.done().err.contains("of storage") || said.err.contains("have no storage"), "{said}");
}

#[test]
fn data_without_its_header_is_told_where_to_look() {
    let place = place();
    let create = ["luks", "create", "--size", "1MiB", "--header", "head", "--passphrase-file", "pass"];
    place.run([&create[..], &CHEAP, &["data"]].concat()).done();
    place.run(reencrypt(&["data"])).refused(4, &["data has no key", "--header"]);
    let said = place.run(reencrypt(&["head"]));
    said.refused(4, &["head: its data begins at byte 0", "give this one with --header"]);
    place.run(reencrypt(&["--header", "pass", "data"])).refused(4, &["pass is no LUKS header"]);
    let info = place.run(["volume", "info", "--json", "--header", "head", "data"]).json();
    assert_eq!((&info["luks"], &info["volume_bytes"]), (&2.into(), &MIB.into()));
    place.run(reencrypt(&["--header", "head", "data"])).done();
}

#[test]
fn a_container_is_not_served_plain_for_writing_unless_its_description_says_so() {
    let place = place();
    let before = fs::read(place.path("disk")).unwrap();
    let plain = ["serve", "--plain", "disk"];
    place.run(plain).refused(1, &["it is a LUKS container", "--read-only", "disk.toml"]);
    place.write("c.toml", b"[[volume]]\npath = \"disk\"\nplain = true\n");
    place.run(["check", "c.toml"]).refused(1, &["it is a LUKS container"]);
    std::os::unix::fs::symlink("disk", place.path("link")).unwrap();
    place.run(["serve", "--plain", "link"]).refused(1, &["it is a LUKS container"]);
    // Its first header may be gone.
    fs::copy(place.path("disk"), place.path("second")).unwrap();
    let file = fs::File::options().write(true).open(place.path("second")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 4096], 0).unwrap();
    place.run(["serve", "--plain", "second"]).refused(1, &["it is a LUKS container"]);
    let server = place.serve("disk.sock", ["--plain", "--read-only", "disk"]);
    let told = server.stop();
    assert!(told.contains("is a LUKS container: plain"), "{told}");
    // For clients that open it themselves.
    place.write("disk.toml", b"[[volume]]\npath = \"disk\"\nplain = true\n");
    let server = place.serve("disk.sock", ["disk"]);
    let told = server.stop();
    assert!(told.contains("is a LUKS container: plain"), "{told}");
    assert!(fs::read(place.path("disk")).unwrap() == before);
}

#[test]
fn what_is_half_done_and_read_only_says_what_to_do() {
    let place = place();
    let mut command = place.command();
    command.args(reencrypt(&["--throttle", "256KiB", "--zone", "256KiB", "disk"]));
    let mut process = inlinecrypt_testkit::ServerProcess::start(&mut command).unwrap();
    let is_begun = || !place.run(["volume", "info", "--json", "disk"]).json()["reencrypt"].is_null();
    while !is_begun() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    process.kill().unwrap();
    for more in [&["--pause-reencryption"][..], &[]] {
        let serve = [&["serve", "--read-only", "--passphrase-file", "pass"], more, &["disk"]].concat();
        place.run(serve).refused(2, &["half re-encrypted", "--resume", "--pause-reencryption"]);
    }
    place.run(reencrypt(&["--resume", "disk"])).done();
}

/// Not only the engines that are wrong: also volumes that are, whatever their engines.
#[test]
fn check_reports_all_that_is_wrong_besides_a_wrong_engine() {
    let place = place();
    let config = "[[engine]]\nname = \"a\"\nspec = \"nonsense\"\n\
                  [[engine]]\nname = \"b\"\nspec = \"ice:other\"\n\
                  [[engine]]\nname = \"c\"\n\
                  [[volume]]\npath = \"disk\"\npassphrase_file = \"pass\"\n\
                  [[volume]]\npath = \"nothing\"\nengine = \"b\"\n\
                  [[volume]]\npath = \"elsewhere\"\nengine = \"c\"\n\
                  [[volume]]\npath = \"disk\"\nname = \"x\"\nmode = \"rot13\"\n\
                  [[volume]]\npath = \"disk\"\nname = \"y\"\nengine = \"d\"\n";
    place.write("c.toml", config.as_bytes());
    let said = place.run(["check", "c.toml"]);
    said.refused(
        1,
        &[
            "\"nonsense\"",
            "\"other\"",
            "nothing does not exist",
            "elsewhere does not exist",
            "rot13",
            "no engine \"d\"",
            "7 problems",
        ],
    );
    // The first volume is not tried with another engine than the one that was meant.
    assert!(!said.err.contains("c.toml:9: disk"), "{said}");
}
