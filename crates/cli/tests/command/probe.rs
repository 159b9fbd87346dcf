use crate::place::Place;
use serde_json::{Value, json};
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

fn board(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/probe").join(name)
}

/// What is found on a board, with its kernel if the tree has one.
fn probe(place: &Place, name: &str) -> Value {
    let board = board(name);
    let mut command = place.command();
    command.args(["probe", "--json", "--sysfs"]).arg(board.join("sys"));
    if board.join("config").exists() {
        command.arg("--kernel-config").arg(board.join("config"));
    }
    if board.join("proc").exists() {
        command.arg("--proc").arg(board.join("proc"));
    }
    crate::place::run_command(command).json()
}

fn device<'r>(report: &'r Value, name: &str) -> &'r Value {
    let devices = report["devices"].as_array().unwrap();
    devices.iter().find(|device| device["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
}

fn means(device: &Value, text: &str) -> bool {
    device["meaning"].as_array().unwrap().iter().any(|line| line.as_str().unwrap().contains(text))
}

fn feature<'r>(report: &'r Value, name: &str) -> &'r Value {
    let features = report["kernel"]["features"].as_array().unwrap();
    &features.iter().find(|feature| feature["name"] == name).unwrap()["state"]
}

#[test]
fn boards_with_wrapped_keys_say_what_that_rules_out() {
    let report = probe(&Place::new(), "qcom-ufs-wrapped");
    let sda = device(&report, "sda");
    assert_eq!((&sda["raw_keys"], &sda["hw_wrapped_keys"]), (&json!(false), &json!(true)));
    assert_eq!((&sda["max_dun_bits"], &sda["num_keyslots"]), (&json!(64), &json!(32)));
    assert_eq!(sda["modes"], json!({ "AES-256-XTS": 0x1fe00 }));
    assert!(means(
        sda,
        "wrapped keys only: raw keys cannot be used until reboot without qcom_ice.use_wrapped_keys=1"
    ));
    assert!(means(sda, "32 keys at once") && means(sda, "IV_INO_LBLK_64 and IV_INO_LBLK_32 fit"), "{sda}");
    assert!(means(sda, "dm-inlinecrypt, which this kernel does not have"), "{sda}");
    assert!(means(device(&report, "dm-0"), "the key comes with every request"));
    let none = device(&report, "loop0");
    assert_eq!(none["inline_encryption"], false);
    assert!(means(none, "raw keys go through blk-crypto's fallback"), "{none}");
    for (name, state) in [
        ("blk-crypto", "yes"),
        ("blk-crypto-fallback", "yes"),
        ("fscrypt", "yes"),
        ("fscrypt-inline", "yes"),
        ("dm-crypt", "module"),
        ("dm-inlinecrypt", "no"),
        ("qcom-ice", "yes"),
        ("mmc-crypto", "no"),
    ] {
        assert_eq!(feature(&report, name), state, "{name}");
    }
    assert_eq!(report["kernel"]["release"], "6.18.0");
    assert_eq!(report["kernel"]["mounted_with_inlinecrypt"], json!(["/dev/sda14 on /data"]));
}

#[test]
fn other_boards_are_put_into_their_own_words() {
    let place = Place::new();
    let report = probe(&place, "qcom-ufs-raw");
    let sda = device(&report, "sda");
    assert!(means(sda, "wrapped keys cannot be used until reboot with qcom_ice.use_wrapped_keys=1"), "{sda}");
    // A tree alone says nothing of the kernel but what shows in it.
    assert_eq!(feature(&report, "blk-crypto"), "yes");
    assert_eq!(feature(&report, "fscrypt"), "unknown");
    assert_eq!(report["kernel"]["release"], json!(null));

    let report = probe(&place, "qcom-emmc");
    let disk = device(&report, "mmcblk0");
    assert!(
        means(disk, "data unit numbers of 32 bits: a key reaches 2 TiB with data units of 512 bytes"),
        "{disk}"
    );
    assert!(means(disk, "IV_INO_LBLK_64 does not"), "{disk}");

    let report = probe(&place, "exynos-ufs");
    let sda = device(&report, "sda");
    assert!(means(sda, "no keyslots") && means(sda, "raw keys only"), "{sda}");

    let sda = probe(&place, "before-key-types");
    let sda = device(&sda, "sda");
    assert_eq!((&sda["raw_keys"], &sda["hw_wrapped_keys"]), (&json!(null), &json!(null)));
    assert!(means(sda, "older than wrapped keys"), "{sda}");

    let report = probe(&place, "strange");
    let sda = device(&report, "sda");
    assert_eq!((&sda["max_dun_bits"], &sda["num_keyslots"]), (&json!(null), &json!(32)));
    let strange = &sda["strange"];
    assert_eq!(strange, &json!(["max_dun_bits: \"many\"", "modes/AES-256-XTS: \"yes\""]));
    assert!(means(sda, "not known here: ChaCha-Disk"), "{sda}");
}

/// What no kernel says is told as such, and nothing is computed from it.
#[test]
fn numbers_that_cannot_be_are_told() {
    let place = Place::new();
    let crypto = place.path("sys/block/sda/queue/crypto");
    fs::create_dir_all(crypto.join("modes")).unwrap();
    fs::write(crypto.join("raw_keys"), "supported\n").unwrap();
    fs::write(crypto.join("num_keyslots"), "32\n").unwrap();
    fs::write(crypto.join("modes/AES-256-XTS"), "0x1000\n").unwrap();
    for (bits, saying) in [
        ("4294967295", "data unit numbers of 4294967295 bits cannot be"),
        ("257", "data unit numbers of 257 bits cannot be"),
        ("0", "data unit numbers of 0 bits cannot be"),
        ("256", "every fscrypt policy fits"),
        ("1", "a key reaches 8 KiB with data units of 4096 bytes"),
    ] {
        fs::write(crypto.join("max_dun_bits"), format!("{bits}\n")).unwrap();
        let report = place.run(["probe", "--json", "--sysfs", "sys"]).json();
        assert!(means(device(&report, "sda"), saying), "{report}");
        place.run(["probe", "--sysfs", "sys"]).done();
    }
}

#[test]
fn a_person_reads_the_same() {
    let place = Place::new();
    let mut command = place.command();
    command.args(["probe", "--sysfs"]).arg(board("qcom-ufs-wrapped").join("sys"));
    let said = crate::place::run_command(command);
    for text in
        ["key types          hardware-wrapped", "0x1fe00: 512, 1024", "blk-crypto           yes", "unknown"]
    {
        assert!(said.done().out.contains(text), "{text}: {said}");
    }
    // This machine, whatever it is.
    let said = place.run(["probe"]);
    assert!(said.done().out.starts_with("kernel "), "{said}");
    place.run(["probe", "--json"]).json();
    place.run(["probe", "--sysfs", "nowhere"]).refused(4, &["nowhere", "--sysfs DIR"]);
    place.run(["probe", "--kernel-config", "nowhere"]).refused(4, &["nowhere"]);
}

#[test]
fn a_gzipped_configuration_is_one_and_a_broken_one_is_told() {
    let place = Place::new();
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped.write_all(b"CONFIG_DM_CRYPT=y\nCONFIG_DM_INLINECRYPT=m\n").unwrap();
    let zipped = zipped.finish().unwrap();
    place.write("config.gz", &zipped);
    let sysfs = board("exynos-ufs").join("sys").display().to_string();
    let report = place.run(["probe", "--json", "--sysfs", &sysfs, "--kernel-config", "config.gz"]).json();
    assert_eq!(
        (feature(&report, "dm-crypt"), feature(&report, "dm-inlinecrypt")),
        (&json!("yes"), &json!("module"))
    );
    for (name, bytes) in [("cut.gz", &zipped[..zipped.len() / 2]), ("other", b"hello\n"), ("empty", b"")] {
        place.write(name, bytes);
        place.run(["probe", "--kernel-config", name]).refused(4, &[name, "no kernel configuration"]);
    }
}
