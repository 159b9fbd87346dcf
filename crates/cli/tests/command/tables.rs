use crate::place::{MIB, Place};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\
                   202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f";

#[test]
fn a_key_in_an_argument_or_a_config_is_refused_and_not_repeated() {
    let place = Place::new();
    place.sparse("disk", MIB);
    let line = format!("0 256 crypt aes-xts-plain64 {KEY} 0 disk 64");
    let said = place.run(["serve", "--dm-table", &line]);
    said.refused(1, &["the line has a key in it", "seen by every user", "--dm-table-file", "--key raw:FILE"]);
    assert!(!said.err.contains("00010203"), "{said}");
    place.write("c.toml", format!("[[volume]]\ndm_table = \"{line}\"\n").as_bytes());
    for verb in [["check", "c.toml"], ["serve", "--config=c.toml"]] {
        let said = place.run(verb);
        said.refused(1, &["c.toml:1: dm_table: the line has a key in it", "no place for secrets"]);
        assert!(!said.err.contains("00010203"), "{said}");
    }
    // A key in the wrong place is one all the same.
    let said = place.run(["serve", "--dm-table", &format!("0 256 crypt {KEY} - 0 disk 64")]);
    said.refused(1, &["cipher"]);
    assert!(!said.err.contains("00010203"), "{said}");
    // In a file that others can read.
    place.write("table", line.as_bytes());
    fs::set_permissions(place.path("table"), fs::Permissions::from_mode(0o644)).unwrap();
    place.run(["serve", "--dm-table-file", "table"]).refused(2, &["mode 0644", "chmod 600"]);
    // Two keys.
    fs::set_permissions(place.path("table"), fs::Permissions::from_mode(0o600)).unwrap();
    place.raw_key("key", 64);
    let said = place.run(["serve", "--dm-table-file", "table", "--key", "raw:key"]);
    said.refused(1, &["--key names another"]);
}

#[test]
fn lines_that_cannot_be_served_say_which_field_and_what_to_do() {
    let place = Place::new();
    place.sparse("disk", MIB);
    place.raw_key("key", 64);
    let said = |line: &str| place.run(["serve", "--key", "raw:key", "--dm-table", line]);
    for (line, saying) in [
        ("0 256 crypt aes-xts-plain64", &["key: it is missing", "A line is START LENGTH crypt"][..]),
        ("0 256 linear disk 0", &["target \"linear\" (character 7)", "crypt and inlinecrypt"]),
        ("0 256 crypt aes-lrw-benbi - 0 disk 0", &["cipher \"aes-lrw-benbi\"", "Served are aes-xts-plain64"]),
        ("0 256 crypt aes-xts-plain64 :64:logon:k 0 disk 0", &["keyring (logon \"k\")", "--key raw:FILE"]),
        (
            "0 256 crypt aes-xts-plain64 - 0 disk 0 1 integrity:32:aead",
            &["integrity", "Open it with the kernel"],
        ),
        ("0 255 crypt aes-xts-plain64 - 0 disk 0 1 sector_size:4096", &["length \"255\"", "multiple of 8"]),
        (
            "0 256 inlinecrypt aes-xts-plain64 - 0 disk 0 1 sector_size:4096",
            &["iv_large_sectors", "target crypt takes it without"],
        ),
        ("0 256 inlinecrypt aes-xts-plain64 - 0 disk 0 1 keytype:hw-wrapped", &["hw-wrapped", "--key FILE"]),
        ("0 256 crypt aes-xts-plain - 4294967295 disk 0", &["cannot count them all", "plain64"]),
    ] {
        said(line).refused(1, saying);
    }
    for (line, saying) in [
        ("0 256 crypt aes-xts-plain64 - 0 disk 1793", &["1 MiB", "is to have 128 KiB from"][..]),
        ("0 256 crypt aes-xts-plain64 - 0 disk 4096", &["begins at 2 MiB"]),
        ("0 256 crypt aes-xts-plain64 - 0 nowhere 0", &["nowhere does not exist"]),
        ("0 256 crypt aes-xts-plain64 - 0 259:77777 0", &["/dev/block/259:77777 does not exist"]),
    ] {
        said(line).refused(4, saying);
    }
    // The key is not the cipher's.
    let line = "0 256 crypt aes-cbc-essiv:sha256 - 0 disk 0";
    said(line).refused(2, &["64 bytes", "AES-128-CBC-ESSIV takes a raw key of 16"]);
    let line = "0 256 crypt aes-xts-plain64 - 0 disk 0";
    let contradiction = ["serve", "--key", "raw:key", "--data-unit", "4096", "--dm-table", line];
    place.run(contradiction).refused(1, &["data_unit = 512, and 4096 is asked for"]);
    let contradiction = ["serve", "--key", "raw:key", "--mode", "sm4-xts", "--dm-table", line];
    place.run(contradiction).refused(1, &["SM4-XTS is asked for", "AES-256-XTS or AES-128-XTS"]);
    // One volume in one way.
    for arguments in [&["disk"][..], &["--config", "c"], &["--create", "1M"], &["--dm-table-file", "t"]] {
        let said = place.run([&["serve", "--dm-table", line], arguments].concat());
        assert_eq!(said.code, Some(1), "{said}");
        assert!(said.err.contains("cannot be used with"), "{said}");
    }
}

#[test]
fn a_line_decides_mode_discards_and_place() {
    let place = Place::new();
    place.sparse("disk", MIB);
    place.raw_key("short", 32);
    place.raw_key("long", 64);
    for (key, mode) in [("raw:short", "AES-128-XTS"), ("raw:long", "AES-256-XTS")] {
        for (options, trims) in [("", false), ("2 no_read_workqueue allow_discards", true)] {
            let line = format!("0 256 crypt aes-xts-plain64 - 0 disk 64 {options}");
            let server = place.serve("disk.sock", ["--dm-table", &line, "--key", key]);
            let client = server.client("disk");
            assert_eq!(client.export().size, 128 << 10);
            let can_trim = client.export().flags & (1 << 5) != 0;
            assert_eq!(can_trim, trims, "{line}");
            assert!(server.greeting().contains(mode), "{}", server.out());
            drop(client);
            let err = server.stop();
            assert_eq!(err.contains("note: no_read_workqueue in the table"), trims, "{err}");
        }
    }
}

/// A pipe gives its line once, as a shell's `<(...)` does.
#[test]
fn a_line_comes_through_a_pipe() {
    let place = Place::new();
    place.sparse("disk", MIB);
    place.raw_key("key", 64);
    let bare = "0 256 crypt aes-xts-plain64 - 0 disk 64\n".to_owned();
    let with_key = bare.replace(" - ", &format!(" {KEY} "));
    for (line, more) in [(bare, &["--key", "raw:key"][..]), (with_key, &[])] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(line.as_bytes()).unwrap();
        drop(writer);
        let mut command = place.command();
        command.args(["serve", "--nbd", "unix:s", "--dm-table-file", "/dev/stdin"]).args(more).stdin(reader);
        let server = place.start("s", command);
        assert_eq!(server.client("disk").export().size, 128 << 10);
        server.stop();
    }
}

#[test]
fn volumes_of_other_layouts_are_made_described_checked_and_served_again() {
    let place = Place::new();
    place.raw_key("key", 64);
    let made = place.run([
        "volume",
        "create",
        "--size",
        "1MiB",
        "--key",
        "raw:key",
        "--data-unit",
        "512",
        "--iv",
        "upper-half",
        "--offset",
        "64k",
        "v.img",
    ]);
    made.done();
    assert_eq!(fs::metadata(place.path("v.img")).unwrap().len(), MIB + (64 << 10));
    let info = place.run(["volume", "info", "--json", "v.img"]).json();
    assert_eq!(info["iv"], "upper-half");
    assert_eq!(info["offset_bytes"], 64 << 10);
    assert_eq!((info["volume_bytes"].as_u64(), info["unused_bytes"].as_u64()), (Some(MIB), Some(0)));
    let shown = place.run(["volume", "info", "v.img"]);
    assert!(shown.out.contains("upper-half") && shown.out.contains("64 KiB"), "{shown}");
    let checked = place.run(["check", "v.img.toml"]);
    assert!(checked.done().out.contains("IV layout upper-half"), "{checked}");
    let server = place.serve("v.img.sock", ["v.img"]);
    let mut client = server.client("v");
    assert_eq!(client.export().size, MIB);
    client.write(0, &[7; 1024]).unwrap();
    drop(client);
    server.stop();
    assert!(fs::read(place.path("v.img")).unwrap()[..64 << 10].iter().all(|&byte| byte == 0));
    // The description cannot be contradicted, also where it says nothing because all is as usual.
    place.run(["serve", "--iv", "sectors", "v.img"]).refused(1, &["iv = upper-half, and sectors"]);
    place.run(["serve", "--offset", "0", "v.img"]).refused(1, &["offset = 65536, and 0"]);
    place.create("usual.img");
    place.run(["serve", "--iv", "sectors", "usual.img"]).refused(1, &["iv = data-units, and sectors"]);
    place.run(["serve", "--offset", "512", "usual.img"]).refused(1, &["offset = 0, and 512"]);
    // What cannot be.
    let said =
        place.run(["volume", "create", "--size", "1M", "--mode", "adiantum", "--iv", "upper-half", "w.img"]);
    said.refused(1, &["upper-half with Adiantum"]);
    let said = place.run(["volume", "create", "--size", "1M", "--offset", "100", "w.img"]);
    assert!(said.code == Some(1) && said.err.contains("not a multiple of 512"), "{said}");
    let said = place.run(["volume", "create", "--size", "1M", "--iv", "upper", "w.img"]);
    assert!(said.code == Some(1) && said.err.contains("data-units, sectors, upper-half"), "{said}");
}

/// What the length of the key decides is known wherever the layout is.
#[test]
fn a_description_with_a_line_is_shown_as_it_is_served() {
    let place = Place::new();
    place.sparse("disk", MIB);
    place.raw_key("short", 32);
    let line = "0 256 crypt aes-xts-plain64 - 8 disk 64 1 sector_size:4096";
    let description = format!("[[volume]]\nkey = \"raw:short\"\ndm_table = \"{line}\"\n");
    place.write("disk.toml", description.as_bytes());
    let info = place.run(["volume", "info", "--json", "disk"]).json();
    assert_eq!((&info["mode"], &info["iv"]), (&"AES-128-XTS".into(), &"sectors".into()));
    assert_eq!((&info["offset_bytes"], &info["volume_bytes"]), (&32768.into(), &131_072.into()));
    let checked = place.run(["check", "disk.toml"]);
    assert!(checked.done().out.contains("AES-128-XTS, data unit 4096"), "{checked}");
    let said = place.run(["volume", "info", "--dm-table", "disk"]);
    let path = place.path("disk").display().to_string();
    assert_eq!(said.done().out, format!("{}\n", line.replace("disk", &path)));
    fs::remove_file(place.path("short")).unwrap();
    let said = place.run(["volume", "info", "disk"]);
    assert!(said.done().err.contains("which mode the table means"), "{said}");
}

/// Hardware counts data unit numbers in eight bytes, and by ones.
#[test]
fn an_engine_that_counts_no_further_than_hardware_refuses_the_upper_half() {
    let place = Place::new();
    place.sparse("disk", MIB);
    place.raw_key("key", 64);
    let start = ["serve", "--engine", "ice:raw", "--key", "raw:key", "--data-unit", "4096", "--iv"];
    let said = place.run([&start[..], &["upper-half", "disk"]].concat());
    said.refused(1, &["data unit numbers of 9 bytes, the engine has 8", "--fallback allowed"]);
    for arguments in [&["sectors"][..], &["upper-half", "--fallback", "allowed"]] {
        let mut server = place.serve("disk.sock", [&start[1..], arguments, &["disk"]].concat());
        let mut client = server.client("disk");
        client.write(512, &[3; 20_000]).unwrap();
        assert!(client.read(512, 20_000).unwrap().iter().all(|&byte| byte == 3));
        drop(client);
        assert!(server.process.child().try_wait().unwrap().is_none());
        server.stop();
    }
}

#[test]
fn a_volume_has_a_line_if_linux_has_its_layout_and_its_key_only_if_asked() {
    let place = Place::new();
    place.raw_key("key", 64);
    let create = |name: &str, layout: &[&str]| {
        let start = ["volume", "create", "--size", "1MiB", "--key", "raw:key"];
        place.run([&start[..], layout, &[name]].concat()).done();
    };
    create("a b.img", &["--offset", "512"]);
    let said = place.run(["volume", "info", "--dm-table", "a b.img"]);
    let path = place.path("a b.img").display().to_string().replace(' ', "\\ ");
    let expected = format!(
        "0 2048 crypt aes-xts-plain64 - 0 {path} 1 3 allow_discards sector_size:4096 iv_large_sectors\n"
    );
    assert_eq!(said.done().out, expected);
    assert!(said.err.contains("- stands for the key") && said.err.contains("losetup"), "{said}");
    assert!(said.err.contains("losetup --offset 512"), "{said}");
    let said = place.run(["volume", "info", "--dm-table", "--show-key", "a b.img"]);
    let digits: String = (0..64).map(|byte: u8| format!("{:02x}", byte ^ 0xa5)).collect();
    assert_eq!(said.done().out, expected.replace(" - ", &format!(" {digits} ")));

    // As it is served: discards are passed down unless the description says otherwise.
    let description = fs::read_to_string(place.path("a b.img.toml")).unwrap();
    for (says, has) in [("", true), ("discard = \"pass\"\n", true), ("discard = \"off\"\n", false)] {
        place.write("a b.img.toml", format!("{description}{says}").as_bytes());
        let said = place.run(["volume", "info", "--dm-table", "a b.img"]);
        assert_eq!(said.done().out.contains("allow_discards"), has, "{says}: {said}");
    }

    create("aligned.img", &["--offset", "8k"]);
    let said = place.run(["volume", "info", "--dm-table", "aligned.img"]);
    assert!(said.done().out.contains("aligned.img 16 3 ") && !said.err.contains("--offset"), "{said}");
    create("large.img", &["--data-unit", "64k"]);
    let said = place.run(["volume", "info", "--dm-table", "large.img"]);
    said.refused(1, &["data units of 65536 bytes", "up to 4096"]);
    create("spdk.img", &["--data-unit", "512", "--iv", "upper-half"]);
    place.run(["volume", "info", "--dm-table", "spdk.img"]).refused(1, &["the IV layout upper-half"]);
    place.create("wrapped.img");
    let said = place.run(["volume", "info", "--dm-table", "wrapped.img"]);
    assert!(said.done().out.starts_with("0 2048 crypt aes-xts-plain64 - 0 "), "{said}");
    assert!(said.err.contains("never leaves its engine"), "{said}");
    let said = place.run(["volume", "info", "--dm-table", "--show-key", "wrapped.img"]);
    said.refused(2, &["hardware-wrapped", "--key raw:FILE"]);
    place.sparse("bare.img", MIB);
    place.run(["volume", "info", "--dm-table", "bare.img"]).refused(4, &["no description"]);
}
