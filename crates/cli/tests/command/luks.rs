//! `luks`: what it says, and how it refuses. With cryptsetup: `tests/system/luks.rs`.

use crate::place::Place;
use inlinecrypt_luks::luks2::Container;
use std::fs;

const CHEAP: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// A container `disk`, with the passphrase in `pass`; another one is in `other`.
fn place() -> Place {
    let place = Place::new();
    place.write("pass", b"a passphrase\n");
    place.write("other", b"another");
    let create = ["luks", "create", "--size", "1MiB", "--header-size", "1MiB", "--passphrase-file", "pass"];
    let said = place.run([&create[..], &CHEAP, &["--label", "some disk", "disk"]].concat());
    said.done();
    assert!(said.out.contains("inlinecrypt serve disk"), "{said}");
    place
}

#[test]
fn what_it_makes_is_shown() {
    let place = place();
    let said = place.run(["luks", "dump", "disk"]);
    said.done();
    for text in [
        "some disk",
        "aes-xts-plain64, sectors of 4096",
        "pbkdf2 sha256, 1000 iterations",
        "second copy      good",
    ] {
        assert!(said.out.contains(text), "{text}: {said}");
    }
    let json = place.run(["luks", "dump", "--json", "disk"]).json();
    assert_eq!((&json["luks"], &json["label"]), (&2.into(), &"some disk".into()));
    assert_eq!(json["metadata"]["segments"]["0"]["offset"], "1048576");
    let info = place.run(["volume", "info", "--json", "disk"]).json();
    assert_eq!(
        (&info["luks"], &info["offset_bytes"], &info["volume_bytes"]),
        (&2.into(), &(1 << 20).into(), &(1 << 20).into())
    );
    assert_eq!(info["iv"], "sectors");
    let said = place.run(["volume", "info", "disk"]);
    assert!(said.done().out.contains("LUKS2"), "{said}");
    let line = place.run(["volume", "info", "--dm-table", "disk"]);
    assert!(line.done().out.contains(" 2048 2 allow_discards sector_size:4096"), "{line}");
}

#[test]
fn a_wrong_passphrase_is_code_2_everywhere_and_changes_nothing() {
    let place = place();
    let before = fs::read(place.path("disk")).unwrap();
    for verb in [
        &["serve", "--passphrase-file", "other", "disk"][..],
        &["serve", "--key-file", "pass", "disk"],
        &["luks", "test", "--passphrase-file", "other", "disk"],
        &["luks", "add-key", "--passphrase-file", "other", "--new-passphrase-file", "pass", "disk"],
        &["luks", "change-key", "--passphrase-file", "other", "--new-passphrase-file", "pass", "disk"],
        &["luks", "remove-key", "--passphrase-file", "other", "disk"],
    ] {
        place.run(verb).refused(2, &["disk: no LUKS keyslot opens with this passphrase"]);
    }
    place.run(["serve", "disk"]).refused(2, &["no terminal", "--passphrase-fd"]);
    place.run(["serve", "--passphrase-file", "missing", "disk"]).refused(4, &["missing"]);
    fs::write(place.path("config"), "[[volume]]\npath = \"disk\"\npassphrase_file = \"other\"\n").unwrap();
    place.run(["check", "config"]).refused(2, &["config:1: disk", "no LUKS keyslot"]);
    assert!(fs::read(place.path("disk")).unwrap() == before);
    fs::write(place.path("config"), "[[volume]]\npath = \"disk\"\npassphrase_file = \"pass\"\n").unwrap();
    assert!(place.run(["check", "config"]).done().out.contains("AES-256-XTS"));
}

#[test]
fn a_header_says_what_options_may_not() {
    let place = place();
    place.raw_key("key", 64);
    for option in
        [&["--key", "raw:key"][..], &["--mode", "Adiantum"], &["--data-unit", "512"], &["--iv-offset", "8"]]
    {
        let arguments = [&["serve", "--passphrase-file", "pass"], option, &["disk"]].concat();
        place.run(arguments).refused(1, &["disk is a LUKS2 container"]);
    }
    place.sparse("plain", 1 << 20);
    place.run(["serve", "--recover", "plain"]).refused(1, &["plain is no LUKS container"]);
    place.run(["serve", "--header", "plain", "disk"]).refused(4, &["plain is no LUKS header"]);
    place.run(["luks", "dump", "plain"]).refused(4, &["there is no LUKS2 header"]);
}

#[test]
fn the_last_passphrase_and_all_of_them_go_by_force_alone() {
    let place = place();
    place.run(["luks", "remove-key", "--slot", "0", "disk"]).refused(1, &["its only passphrase", "--force"]);
    place.run(["luks", "remove-key", "--slot", "7", "disk"]).refused(1, &["no LUKS keyslot 7"]);
    place.run(["luks", "erase", "disk"]).refused(1, &["1 LUKS keyslots would be erased", "--force"]);
    place.run(["luks", "header-backup", "--out", "backup", "disk"]).done();
    place.run(["luks", "header-backup", "--out", "backup", "disk"]).refused(5, &["backup exists already"]);
    place.run(["luks", "erase", "--force", "disk"]).done();
    place
        .run(["serve", "--passphrase-file", "pass", "disk"])
        .refused(2, &["no LUKS keyslot", "header-restore"]);
    place.run(["luks", "header-restore", "--in", "backup", "disk"]).done();
    place.run(["luks", "test", "--passphrase-file", "pass", "disk"]).done();
}

#[test]
fn a_backup_goes_where_it_belongs() {
    let place = place();
    place.run(["luks", "header-backup", "--out", "backup", "disk"]).done();
    let create = ["luks", "create", "--size", "1MiB", "--header-size", "1MiB", "--passphrase-file", "other"];
    place.run([&create[..], &CHEAP, &["second"]].concat()).done();
    place.run(["luks", "header-restore", "--in", "backup", "second"]).refused(1, &["UUID", "--force"]);
    place.sparse("nothing", 2 << 20);
    place
        .run(["luks", "header-restore", "--in", "backup", "nothing"])
        .refused(1, &["no LUKS header", "--force"]);
    place.run(["luks", "header-restore", "--force", "--in", "backup", "nothing"]).done();
    place.run(["luks", "test", "--passphrase-file", "pass", "nothing"]).done();
    place.sparse("small", 4096);
    place
        .run(["luks", "header-restore", "--force", "--in", "backup", "small"])
        .refused(1, &["1048576 bytes"]);
    place.write("broken", &[b"LUKS\xba\xbe\x00\x02".as_slice(), &[0; 8192]].concat());
    place.run(["luks", "header-restore", "--in", "broken", "disk"]).refused(4, &["neither copy"]);
}

#[test]
fn what_cannot_be_made_is_refused_and_leaves_nothing() {
    let place = place();
    let create = |arguments: &[&str]| {
        let all = [&["luks", "create", "--passphrase-file", "pass"], &CHEAP[..], arguments].concat();
        place.run(all)
    };
    create(&["--size", "1MiB", "disk"]).refused(5, &["disk exists already"]);
    create(&["new"]).refused(1, &["its size is not given"]);
    create(&["--size", "1000", "new"]).refused(1, &["1000 bytes are not a multiple of the sector size"]);
    create(&["--size", "1MiB", "--uuid", "x", "new"]).refused(1, &["\"x\" is no UUID"]);
    create(&["--size", "1MiB", "--header-size", "1000", "new"]).refused(1, &["1000 bytes for the header"]);
    for size in ["36KiB", "64KiB", "129MiB", "1GiB"] {
        create(&["--size", "1MiB", "--header-size", size, "new"])
            .refused(1, &["for the header", "284 KiB", "(134250496 bytes)"]);
    }
    create(&["--size", "18446744073709551104", "--sector-size", "512", "new"])
        .refused(1, &["more than any file has"]);
    create(&["--size", "1MiB", "--header", "./new", "new"]).refused(1, &["header and data at once"]);
    create(&["--size", "1MiB", "--label", &"x".repeat(48), "new"]).refused(1, &["48 bytes"]);
    create(&["--size", "1MiB", "--hash", "md5", "new"]).refused(1, &["md5"]);
    place.write("short", b"not 32 bytes");
    create(&["--size", "1MiB", "--import", "short", "new"]).refused(2, &["12 bytes", "32"]);
    let costly = ["--pbkdf", "argon2id", "--pbkdf-force-iterations", "4294967295"];
    let all =
        [&["luks", "create", "--size", "1MiB", "--passphrase-file", "pass"], &costly[..], &["new"]].concat();
    place.run(all).refused(1, &["not sensible", "Ask for less"]);
    let left: Vec<_> =
        fs::read_dir(place.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("new")), "{left:?}");
}

#[test]
fn a_wrapped_key_needs_its_root_and_says_so() {
    let place = place();
    place.run(["luks", "create", "--size", "1MiB", "--header-size", "1MiB", "--wrapped", "sealed"]).done();
    let said = place.run(["luks", "dump", "sealed"]);
    assert!(said.done().out.contains("inlinecrypt-wrapped-key, key "), "{said}");
    let info = place.run(["volume", "info", "--json", "sealed"]).json();
    assert_eq!(info["key_type"], "hardware-wrapped");
    assert!(info["root_id"].is_string() && info["key_id"].is_string(), "{info}");
    fs::rename(place.path("home"), place.path("elsewhere")).unwrap();
    place.run(["serve", "sealed"]).refused(4, &["root"]);
    place.run(["serve", "--recover", "--passphrase-file", "pass", "sealed"]).refused(2, &["no LUKS keyslot"]);
    place.run(["luks", "erase", "sealed"]).refused(1, &["and its wrapped key"]);
}

#[test]
fn no_passphrase_is_taken_for_a_key_that_is_made_in_the_engine() {
    let place = place();
    let create = ["luks", "create", "--size", "1MiB", "--header-size", "1MiB", "--wrapped"];
    let recovery = ["--recovery-passphrase-file", "pass", "sealed"];
    place.run([&create[..], &recovery].concat()).refused(1, &["known to nobody else", "--import"]);
    place.run([&create[..], &["--recovery", "sealed"]].concat()).refused(1, &["known to nobody else"]);
    assert!(!place.path("sealed").exists());
}

#[test]
fn resizing_cuts_nothing_but_the_end_of_the_data() {
    let place = place();
    let create = ["luks", "create", "--size", "1MiB", "--header", "head", "--passphrase-file", "pass"];
    place.run([&create[..], &CHEAP, &["data"]].concat()).done();
    let head = fs::read(place.path("head")).unwrap();
    for size in ["4MiB", "64MiB"] {
        let resize = ["luks", "resize", "--shrink", "--size", size, "head"];
        place.run(resize).refused(1, &["its header ends at", "--header"]);
    }
    assert!(fs::read(place.path("head")).unwrap() == head);
    place.run(["luks", "resize", "--size", "2MiB", "--header", "head", "data"]).done();
    assert_eq!(fs::metadata(place.path("data")).unwrap().len(), 2 << 20);

    // A file that ends before its data begins.
    let disk = fs::read(place.path("disk")).unwrap();
    fs::write(place.path("short"), &disk[..(1 << 20) - 4096]).unwrap();
    place.run(["luks", "resize", "--size", "2MiB", "short"]).refused(4, &["its data begins at 1048576"]);

    // A segment of a fixed length, and something behind it.
    let mut container = Container::read(disk).unwrap();
    let mut random = |bytes: &mut [u8]| {
        bytes.fill(7);
        Ok(())
    };
    container.resize(Some(1 << 20), &mut random).unwrap();
    let mut disk = container.into_storage();
    disk.resize(3 << 20, 0x55);
    fs::write(place.path("fixed"), &disk).unwrap();
    for (size, shrink) in [("1536KiB", None), ("512KiB", Some("--shrink"))] {
        let arguments = ["luks", "resize", "--size", size].into_iter().chain(shrink).chain(["fixed"]);
        place.run(arguments).done();
        let now = fs::read(place.path("fixed")).unwrap();
        assert!(now.len() == 3 << 20 && now[2 << 20..].iter().all(|&byte| byte == 0x55), "{size}");
    }
    place.run(["luks", "resize", "--size", "3MiB", "fixed"]).done();
    assert_eq!(fs::metadata(place.path("fixed")).unwrap().len(), 4 << 20);
}

#[test]
fn a_wrapped_key_is_not_for_an_engine_that_derives_another_from_it() {
    let place = place();
    place.write("master", &[7; 32]);
    let create = ["luks", "create", "--size", "1MiB", "--header-size", "1MiB", "--import", "master"];
    let said = place.run([&create[..], &["--engine", "software:kdf=legacykdf", "sealed"]].concat());
    assert!(said.done().out.contains("inlinecrypt serve --engine software:kdf=legacykdf sealed"), "{said}");
    place.run(["serve", "sealed"]).refused(1, &["legacykdf", "derives them by v1", "--engine"]);
    fs::write(place.path("config"), "[[volume]]\npath = \"sealed\"\n").unwrap();
    place.run(["check", "config"]).refused(1, &["legacykdf"]);
    let engine = "[[engine]]\nname = \"e\"\nspec = \"software:kdf=legacykdf\"\n";
    fs::write(place.path("config"), format!("{engine}[[volume]]\npath = \"sealed\"\nengine = \"e\"\n"))
        .unwrap();
    place.run(["check", "config"]).done();
}

#[test]
fn a_container_without_its_first_header_is_not_taken_for_a_raw_volume() {
    let place = place();
    place.raw_key("key", 64);
    let mut disk = fs::read(place.path("disk")).unwrap();
    disk[..4096].fill(0);
    fs::write(place.path("disk"), &disk).unwrap();
    place.run(["serve", "--key", "raw:key", "disk"]).refused(2, &["first LUKS2 header", "luks repair disk"]);
    place.run(["luks", "repair", "disk"]).done();
    place.run(["luks", "test", "--passphrase-file", "pass", "disk"]).done();
}

#[test]
fn what_stands_in_the_way_is_said() {
    let place = place();
    // Room for one area alone.
    let create = ["luks", "create", "--size", "1MiB", "--header-size", "284KiB", "--passphrase-file", "pass"];
    place.run([&create[..], &CHEAP, &["tight"]].concat()).done();
    let files = ["--passphrase-file", "pass", "--new-passphrase-file", "other"];
    place
        .run([&["luks", "change-key"], &files[..], &CHEAP, &["tight"]].concat())
        .refused(1, &["no room for a second area", "luksChangeKey"]);
    place.run(["luks", "test", "--passphrase-file", "pass", "tight"]).done();
    let both = ["--key-file", "-", "--new-key-file", "-", "disk"];
    place.run([&["luks", "change-key"], &both[..]].concat()).refused(1, &["both passphrases"]);
    let disk = fs::read(place.path("disk")).unwrap();
    fs::write(place.path("short"), &disk[..64 << 10]).unwrap();
    place
        .run(["luks", "test", "--passphrase-file", "pass", "short"])
        .refused(4, &["it ends at byte 65536, before"]);
}
