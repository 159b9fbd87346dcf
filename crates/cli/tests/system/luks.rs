//! LUKS containers: cryptsetup's served and changed by us, ours opened and changed by cryptsetup; qemu and nbdkit; kill -9.

use crate::isolation::{engine, engine_pid, may_read_memory};
use crate::rig::{MIB, Place, eventually, run, run_luks_create, run_to_fail, said, seed};
use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key};
use inlinecrypt_cipher::{Dun, Mode};
use inlinecrypt_luks::luks2::Container;
use inlinecrypt_testkit::memory::{self, Search};
use inlinecrypt_testkit::{pattern, require_tool};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What cryptsetup and we are told, so that opening takes no time.
const CHEAP: [&str; 6] = ["--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4"];
const CHEAP_PBKDF2: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// How often a command is killed. More often where nobody waits for it.
fn kills() -> u64 {
    let long = std::env::var_os("CI").is_some_and(|value| value == "true")
        || std::env::var_os("INLINECRYPT_SOAK_SECONDS").is_some();
    if long { 200 } else { 40 }
}

#[derive(Deserialize)]
struct Images {
    images: Vec<Image>,
}

/// A container that cryptsetup made and Linux filled.
#[derive(Deserialize)]
struct Image {
    name: String,
    image: String,
    passphrase: String,
    volume_key: String,
    decrypted_len: u32,
    decrypted_sha256: String,
}

impl Image {
    fn bytes(&self) -> Vec<u8> {
        let file = fs::File::open(vectors().join(format!("{}.zst", self.image))).unwrap();
        let mut image = Vec::new();
        ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut image).unwrap();
        image
    }
}

fn vectors() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../luks/vectors")
}

fn images() -> Vec<Image> {
    let Images { images } =
        serde_json::from_str(&fs::read_to_string(vectors().join("luks2.json")).unwrap()).unwrap();
    assert_eq!(images.len(), 2);
    images
}

fn sha256(data: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(data))
}

/// A place with passphrases in files, `zero` to `two`.
fn place() -> Place {
    let place = Place::new();
    for name in ["zero", "one", "two"] {
        place.secret(name, format!("passphrase {name}").as_bytes());
    }
    place
}

/// cryptsetup in a place.
fn cryptsetup(place: &Place, arguments: &[&str]) -> Command {
    let mut command = Command::new("cryptsetup");
    place.prepare(&mut command);
    command.args(arguments);
    command
}

/// A new file that cryptsetup makes a container of, with the passphrase in `zero`.
fn format(place: &Place, name: &str, bytes: u64, arguments: &[&str]) {
    place.sparse(name, bytes);
    run(cryptsetup(place, &["luksFormat", "-q"]).args(arguments).args([name, "zero"]));
}

/// Which LUKS keyslot cryptsetup opens with the passphrase in `file`; `None` if none.
fn cryptsetup_opens(place: &Place, name: &str, file: &str) -> Option<u32> {
    let output = cryptsetup(place, &["open", "--test-passphrase", "-v", "-d", file, name]).output().unwrap();
    if !output.status.success() {
        // 2: no permission, or a bad passphrase.
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        return None;
    }
    let text = said(&output);
    let number = text.split("Key slot ").nth(1).and_then(|rest| rest.split(' ').next());
    Some(number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{text}")))
}

/// The same by us.
fn we_open(place: &Place, name: &str, file: &str) -> Option<u32> {
    let output = place.run(["luks", "test", "--passphrase-file", file, name]);
    if !output.status.success() {
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        return None;
    }
    let text = said(&output);
    let number = text.split("LUKS keyslot ").nth(1).and_then(|rest| rest.split(' ').next());
    Some(number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{text}")))
}

/// Both agree.
#[track_caller]
fn opens(place: &Place, name: &str, file: &str) -> Option<u32> {
    let (theirs, ours) = (cryptsetup_opens(place, name, file), we_open(place, name, file));
    assert_eq!(theirs, ours, "{name} {file}");
    ours
}

/// The volume key, as cryptsetup gives it out.
fn volume_key(place: &Place, name: &str, file: &str) -> Vec<u8> {
    let _ = fs::remove_file(place.path("vk"));
    run(&mut cryptsetup(
        place,
        &["luksDump", "-q", "--dump-volume-key", "--volume-key-file", "vk", "-d", file, name],
    ));
    fs::read(place.path("vk")).unwrap()
}

/// What dm-crypt would show of `data`, with IVs that count sectors of 512 bytes.
fn decrypted(mode: Mode, key: &[u8], sector_bytes: usize, mut data: Vec<u8>) -> Vec<u8> {
    let cipher = mode.info().expand(key).unwrap();
    for (number, sector) in data.chunks_exact_mut(sector_bytes).enumerate() {
        cipher.decrypt(Dun::from((number * sector_bytes / 512) as u64), sector_bytes, sector);
    }
    data
}

/// Writes all of the export and reads it back; what was written.
fn fill(place: &Place, arguments: &[&str], export: &str, len: usize) -> Vec<u8> {
    let server = place.serve(arguments);
    let mut client = server.client(export);
    assert_eq!(client.export().size, len as u64);
    let data = pattern::bytes(7, 0, len);
    for (index, piece) in data.chunks(1 << 20).enumerate() {
        client.write((index << 20) as u64, piece).unwrap();
    }
    client.flush().unwrap();
    let read = client.read(0, u32::try_from(len).unwrap()).unwrap();
    assert!(read == data);
    server.stop();
    data
}

#[test]
fn containers_of_linux_are_read_and_rewritten_to_the_byte() {
    for image in images() {
        let place = Place::new();
        let bytes = image.bytes();
        fs::write(place.path("disk"), &bytes).unwrap();
        place.secret("pass", image.passphrase.as_bytes());
        let server = place.serve(["--passphrase-file", "pass", "disk"]);
        let mut client = server.client("disk");
        let content = client.read(0, image.decrypted_len).unwrap();
        assert_eq!(sha256(&content), image.decrypted_sha256, "{}", image.name);
        client.write(0, &vec![0x5a; content.len()]).unwrap();
        client.flush().unwrap();
        assert!(fs::read(place.path("disk")).unwrap() != bytes);
        client.write(0, &content).unwrap();
        client.flush().unwrap();
        server.stop();
        assert!(fs::read(place.path("disk")).unwrap() == bytes, "{}", image.name);
        // And with the key as it is, from what the tables say.
        let key = hex::decode(&image.volume_key).unwrap();
        let sector = if image.name.contains("4096") { 4096 } else { 512 };
        let data = bytes[1 << 20..].to_vec();
        assert_eq!(sha256(&decrypted(Mode::Aes256Xts, &key, sector, data)), image.decrypted_sha256);
    }
}

#[test]
fn containers_of_cryptsetup_are_served() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let luks2 = |more: &'static [&'static str]| [&["--type", "luks2"], more].concat();
    let cases = [
        (Mode::Aes256Xts, 512, luks2(&["--sector-size", "512", "--pbkdf", "argon2id"])),
        (Mode::Aes256Xts, 4096, luks2(&["--sector-size", "4096", "--pbkdf", "argon2i"])),
        (Mode::Aes128Xts, 2048, luks2(&["--sector-size", "2048", "--key-size", "256"])),
        (Mode::Aes256Xts, 512, luks2(&["--sector-size", "512", "--hash", "sha512", "--pbkdf", "pbkdf2"])),
        (
            Mode::Adiantum,
            4096,
            luks2(&["--sector-size", "4096", "-c", "xchacha12,aes-adiantum-plain64", "--key-size", "256"]),
        ),
        (
            Mode::Aes128CbcEssiv,
            512,
            luks2(&["--sector-size", "512", "-c", "aes-cbc-essiv:sha256", "--key-size", "128"]),
        ),
        (Mode::Aes256Xts, 512, vec!["--type", "luks1", "--hash", "sha1"]),
        (Mode::Aes128Xts, 512, vec!["--type", "luks1", "--key-size", "256"]),
    ];
    for (index, (mode, sector, arguments)) in cases.into_iter().enumerate() {
        let place = place();
        // Where not all of it says so, cryptsetup would take its usual gigabyte.
        let is_pbkdf2 = arguments.iter().any(|argument| ["luks1", "pbkdf2"].contains(argument));
        let cost = if is_pbkdf2 { &CHEAP_PBKDF2[..] } else { &CHEAP };
        let mut made = cryptsetup(&place, &["luksFormat", "-q"]);
        place.sparse("disk", 20 * MIB);
        let output = made.args(&arguments).args(cost).args(["disk", "zero"]).output().unwrap();
        if !output.status.success() && said(&output).contains("device-mapper") {
            // cryptsetup tries ciphers that it does not know itself by the kernel's dm-crypt, which is not there.
            eprintln!("SKIPPED: {arguments:?}: {}", said(&output));
            continue;
        }
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        run(cryptsetup(&place, &["luksAddKey", "-d", "zero"]).args(cost).args(["disk", "one"]));
        assert_eq!(opens(&place, "disk", "one"), Some(1));
        assert_eq!(opens(&place, "disk", "two"), None);
        let len = usize::try_from(20 * MIB).unwrap() - offset(&place, "disk");
        let data = fill(&place, &["--passphrase-file", "one", "disk"], "disk", len);
        let key = volume_key(&place, "disk", "zero");
        let disk = fs::read(place.path("disk")).unwrap()[offset(&place, "disk")..].to_vec();
        assert!(decrypted(mode, &key, sector, disk) == data, "case {index}: {arguments:?}");
        // It is still a container.
        assert_eq!(opens(&place, "disk", "zero"), Some(0));
    }
}

/// Where the data begins, as cryptsetup says.
fn offset(place: &Place, name: &str) -> usize {
    let text = run(&mut cryptsetup(place, &["luksDump", name]));
    let after =
        |mark: &str| Some(text.split(mark).nth(1)?.split_whitespace().next()?.parse::<usize>().unwrap());
    // Of LUKS1 in sectors.
    let payload = after("Payload offset:").map(|sectors| sectors * 512);
    payload.or_else(|| after("offset:")).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn a_container_with_a_detached_header_or_without_its_first_one_is_served() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = place();
    place.sparse("data", MIB);
    run(cryptsetup(&place, &["luksFormat", "-q", "--type", "luks2", "--header", "head"])
        .args(CHEAP)
        .args(["data", "zero"]));
    let data = fill(&place, &["--passphrase-file", "zero", "--header", "head", "data"], "data", 1 << 20);
    let key = volume_key(&place, "head", "zero");
    let sector = run(&mut cryptsetup(&place, &["luksDump", "head"])).contains("sector: 4096");
    let disk = fs::read(place.path("data")).unwrap();
    assert!(decrypted(Mode::Aes256Xts, &key, if sector { 4096 } else { 512 }, disk) == data);

    // The header alone is no volume, nor is LUKS1's; its data would lie over it.
    run(cryptsetup(&place, &["luksFormat", "-q", "--type", "luks1", "--header", "head1"])
        .args(CHEAP_PBKDF2)
        .args(["data", "zero"]));
    for head in ["head", "head1"] {
        let alone = place.run(["serve", "--passphrase-file", "zero", head]);
        assert!(alone.status.code() == Some(4) && said(&alone).contains("--header"), "{}", said(&alone));
    }
    fill(&place, &["--passphrase-file", "zero", "--header", "head1", "data"], "data", 1 << 20);

    format(&place, "disk", 20 * MIB, &[&["--type", "luks2"], &CHEAP[..]].concat());
    let written = fill(&place, &["--passphrase-file", "zero", "disk"], "disk", 4 << 20);
    let mut bytes = fs::read(place.path("disk")).unwrap();
    bytes[..4096].fill(0);
    fs::write(place.path("disk"), &bytes).unwrap();
    let server = place.serve(["--passphrase-file", "zero", "disk"]);
    assert!(server.client("disk").read(0, 4 << 20).unwrap() == written);
    assert!(server.log().contains("first copy") && server.log().contains("luks repair"), "{}", server.log());
    server.stop();
    place.run_ok(["luks", "repair", "disk"]);
    assert_eq!(opens(&place, "disk", "zero"), Some(0));
    run(&mut cryptsetup(&place, &["isLuks", "disk"]));
}

#[test]
fn a_luks_keyslot_of_another_key_opens_nothing() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = place();
    format(&place, "disk", 20 * MIB, &[&["--type", "luks2", "--key-slot", "3"], &CHEAP[..]].concat());
    let unbound = ["luksAddKey", "-q", "--unbound", "--key-size", "512", "--key-slot", "0"];
    run(cryptsetup(&place, &unbound).args(CHEAP).args(["disk", "one"]));
    // Also where both have one passphrase.
    let unbound = ["luksAddKey", "-q", "--unbound", "--key-size", "512", "--key-slot", "1"];
    run(cryptsetup(&place, &unbound).args(CHEAP).args(["disk", "zero"]));
    assert_eq!(we_open(&place, "disk", "zero"), Some(3));
    assert_eq!(we_open(&place, "disk", "one"), None);
    let data = fill(&place, &["--passphrase-file", "zero", "disk"], "disk", 4 << 20);
    let key = {
        let more = ["--key-slot", "3", "--volume-key-file", "vk", "-d", "zero", "disk"];
        run(cryptsetup(&place, &["luksDump", "-q", "--dump-volume-key"]).args(more));
        fs::read(place.path("vk")).unwrap()
    };
    let begin = offset(&place, "disk");
    let sector =
        if run(&mut cryptsetup(&place, &["luksDump", "disk"])).contains("sector: 4096") { 4096 } else { 512 };
    let disk = fs::read(place.path("disk")).unwrap()[begin..].to_vec();
    assert!(decrypted(Mode::Aes256Xts, &key, sector, disk) == data);

    let refused = |arguments: &[&str], code: i32, text: &str| {
        let output = place.run([&["luks"], arguments, &["disk"]].concat());
        assert!(output.status.code() == Some(code) && said(&output).contains(text), "{}", said(&output));
    };
    refused(&["test", "--slot", "0", "--passphrase-file", "one"], 1, "unbound");
    let files = ["--passphrase-file", "one", "--new-passphrase-file", "two"];
    refused(&[&["add-key"], &files[..], &CHEAP].concat(), 2, "no LUKS keyslot opens");
    refused(&[&["change-key"], &files[..], &CHEAP].concat(), 2, "no LUKS keyslot opens");
    refused(&["remove-key", "--slot", "3"], 1, "only passphrase");
    let files = ["--passphrase-file", "zero", "--new-passphrase-file", "two"];
    place.run_ok([&["luks", "add-key"], &files[..], &CHEAP, &["disk"]].concat());
    assert_eq!(opens(&place, "disk", "two"), Some(2));
    // Those of other keys go without --force, and nothing of the data goes with them.
    place.run_ok(["luks", "remove-key", "--slot", "0", "disk"]);
    place.run_ok(["luks", "remove-key", "--slot", "1", "disk"]);
    assert_eq!(opens(&place, "disk", "zero"), Some(3));
}

#[test]
fn one_luks_keyslot_is_tried_if_one_is_named_and_key_files_may_be_standard_input() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = place();
    format(&place, "disk", 20 * MIB, &[&["--type", "luks1"], &CHEAP_PBKDF2[..]].concat());
    run(cryptsetup(&place, &["luksAddKey", "-d", "zero"]).args(CHEAP_PBKDF2).args(["disk", "one"]));
    for (slot, code) in [("0", 0), ("1", 2), ("5", 1)] {
        let output = place.run(["luks", "test", "--slot", slot, "--passphrase-file", "zero", "disk"]);
        assert_eq!(output.status.code(), Some(code), "{slot}: {}", said(&output));
    }
    for (file, code) in [("zero", 0), ("two", 2)] {
        let mut command = place.command();
        command.args(["luks", "test", "--key-file", "-", "disk"]);
        command.stdin(fs::File::open(place.path(file)).unwrap());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{file}: {}", said(&output));
    }
}

#[test]
fn what_cryptsetup_is_re_encrypting_is_not_changed() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = place();
    format(&place, "disk", 40 * MIB, &[&["--type", "luks2"], &CHEAP[..]].concat());
    place.run_ok(["luks", "header-backup", "--out", "before", "disk"]);
    let output = cryptsetup(&place, &["reencrypt", "-q", "--init-only", "--reduce-device-size", "16M"])
        .args(CHEAP)
        .args(["-d", "zero", "disk"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    place.run_ok(["luks", "header-backup", "--out", "during", "disk"]);
    let bytes = fs::read(place.path("disk")).unwrap();
    let new = ["--passphrase-file", "zero", "--new-passphrase-file", "one"];
    for arguments in [
        &[&["add-key"], &new[..], &CHEAP].concat()[..],
        &[&["change-key"], &new[..], &CHEAP].concat(),
        &["remove-key", "--slot", "0", "--force"],
        &["erase", "--force"],
    ] {
        let output = place.run([&["luks"], arguments, &["disk"]].concat());
        let text = said(&output);
        assert!(output.status.code() == Some(1) && text.contains("re-encrypted"), "{text}");
    }
    for backup in ["before", "during"] {
        let output = place.run(["luks", "header-restore", "--in", backup, "disk"]);
        let text = said(&output);
        assert!(output.status.code() == Some(1) && text.contains("--force"), "{text}");
    }
    assert!(fs::read(place.path("disk")).unwrap() == bytes);
    place.run_ok(["luks", "header-restore", "--force", "--in", "before", "disk"]);
    assert_eq!(we_open(&place, "disk", "zero"), Some(0));
}

#[test]
fn what_we_make_cryptsetup_opens_and_changes_and_the_other_way_round() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = place();
    let uuid = "0f0e0d0c-0b0a-4908-8706-050403020100";
    let create = [
        &["luks", "create", "--size", "4MiB", "--passphrase-file", "zero", "--label", "ours", "--uuid", uuid],
        &CHEAP[..],
        &["disk"],
    ];
    place.run_ok(create.concat());
    run(&mut cryptsetup(&place, &["isLuks", "disk"]));
    let dump = run(&mut cryptsetup(&place, &["luksDump", "disk"]));
    for text in [uuid, "ours", "aes-xts-plain64", "argon2id", "sector: 4096", "16777216 [bytes]"] {
        assert!(dump.contains(text), "{text}: {dump}");
    }
    assert_eq!(opens(&place, "disk", "zero"), Some(0));
    let data = fill(&place, &["--passphrase-file", "zero", "disk"], "disk", 4 << 20);
    let is_whole = |file: &str| {
        let key = volume_key(&place, "disk", file);
        let disk = fs::read(place.path("disk")).unwrap()[16 << 20..].to_vec();
        assert!(decrypted(Mode::Aes256Xts, &key, 4096, disk) == data);
    };
    is_whole("zero");

    // They add, we change; we add, they change; each removes what the other made.
    run(cryptsetup(&place, &["luksAddKey", "-d", "zero"]).args(CHEAP).args(["disk", "one"]));
    assert_eq!(opens(&place, "disk", "one"), Some(1));
    let new = |verb, old, new| {
        let files = ["luks", verb, "--passphrase-file", old, "--new-passphrase-file", new];
        place.run_ok([&files[..], &CHEAP, &["disk"]].concat())
    };
    new("change-key", "one", "two");
    assert_eq!((opens(&place, "disk", "one"), opens(&place, "disk", "two")), (None, Some(1)));
    new("add-key", "two", "one");
    assert_eq!(opens(&place, "disk", "one"), Some(2));
    run(cryptsetup(&place, &["luksChangeKey", "-d", "zero"]).args(CHEAP).args(["disk", "vk"]));
    assert_eq!(we_open(&place, "disk", "zero"), None);
    run(cryptsetup(&place, &["luksChangeKey", "-d", "vk"]).args(CHEAP).args(["disk", "zero"]));
    run(&mut cryptsetup(&place, &["luksKillSlot", "-q", "disk", "1"]));
    place.run_ok(["luks", "remove-key", "--slot", "2", "disk"]);
    assert_eq!(
        ["zero", "one", "two"].map(|file| opens(&place, "disk", file).is_some()),
        [true, false, false]
    );
    is_whole("zero");

    // A backup by each, put back by the other.
    place.run_ok(["luks", "header-backup", "--out", "ours", "disk"]);
    run(&mut cryptsetup(&place, &["luksHeaderBackup", "disk", "--header-backup-file", "theirs"]));
    place.run_ok(["luks", "erase", "--force", "disk"]);
    assert!(run(&mut cryptsetup(&place, &["luksDump", "disk"])).contains("Keyslots:\nTokens:"));
    assert_eq!(
        cryptsetup(&place, &["open", "--test-passphrase", "-d", "zero", "disk"])
            .output()
            .unwrap()
            .status
            .code(),
        Some(1)
    );
    run(&mut cryptsetup(&place, &["luksHeaderRestore", "-q", "disk", "--header-backup-file", "ours"]));
    is_whole("zero");
    run(&mut cryptsetup(&place, &["erase", "-q", "disk"]));
    let refused = place.run(["serve", "--passphrase-file", "zero", "disk"]);
    assert!(
        refused.status.code() == Some(2) && said(&refused).contains("header-restore"),
        "{}",
        said(&refused)
    );
    place.run_ok(["luks", "header-restore", "--in", "theirs", "disk"]);
    is_whole("zero");
    assert_eq!(opens(&place, "disk", "zero"), Some(0));
}

#[test]
fn a_container_is_made_longer_and_shorter() {
    let place = place();
    place.run_ok(
        [
            &["luks", "create", "--size", "1MiB", "--header-size", "1MiB", "--passphrase-file", "zero"],
            &CHEAP[..],
            &["disk"],
        ]
        .concat(),
    );
    let data = fill(&place, &["--passphrase-file", "zero", "disk"], "disk", 1 << 20);
    place.run_ok(["luks", "resize", "--size", "3MiB", "disk"]);
    let server = place.serve(["--passphrase-file", "zero", "disk"]);
    let mut client = server.client("disk");
    assert_eq!(client.export().size, 3 * MIB);
    assert!(client.read(0, 1 << 20).unwrap() == data);
    // Not while it is served.
    let busy = place.run(["luks", "resize", "--size", "1MiB", "--shrink", "disk"]);
    assert_eq!(busy.status.code(), Some(5), "{}", said(&busy));
    server.stop();
    let refused = place.run(["luks", "resize", "--size", "1MiB", "disk"]);
    assert!(refused.status.code() == Some(1) && said(&refused).contains("--shrink"), "{}", said(&refused));
    place.run_ok(["luks", "resize", "--size", "1MiB", "--shrink", "disk"]);
    let server = place.serve(["--passphrase-file", "zero", "disk"]);
    assert!(server.client("disk").read(0, 1 << 20).unwrap() == data);
    server.stop();
    assert_eq!(fs::metadata(place.path("disk")).unwrap().len(), 2 * MIB);
}

/// The key is the engine's; the header is all there is beside the data; and the passphrase opens it with cryptsetup alone.
#[test]
fn a_wrapped_key_in_a_header_is_served_and_its_recovery_passphrase_opens_the_same() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = place();
    let master = pattern::bytes(99, 0, 32);
    place.secret("master", &master);
    let create = [
        "luks",
        "create",
        "--size",
        "2MiB",
        "--root",
        "root",
        "--import",
        "master",
        "--recovery-passphrase-file",
        "two",
    ];
    place.run_ok([&create[..], &CHEAP, &["disk"]].concat());
    let data = fill(&place, &["--root", "root", "disk"], "disk", 2 << 20);
    run(&mut cryptsetup(&place, &["isLuks", "disk"]));
    assert!(run(&mut cryptsetup(&place, &["luksDump", "disk"])).contains("inlinecrypt-wrapped-key"));
    assert_eq!(opens(&place, "disk", "two"), Some(0));
    let key = volume_key(&place, "disk", "two");
    let derived = inline_encryption_key(KdfVariant::V1, master[..].try_into().unwrap(), Mode::Aes256Xts);
    assert!(key == *derived);
    let disk = fs::read(place.path("disk")).unwrap()[16 << 20..].to_vec();
    assert!(decrypted(Mode::Aes256Xts, &key, 4096, disk) == data);
    // The root is lost.
    fs::remove_file(place.path("root")).unwrap();
    let lost = place.run(["serve", "--root", "root", "disk"]);
    assert!(!lost.status.success(), "{}", said(&lost));
    let server = place.serve(["--recover", "--passphrase-file", "two", "disk"]);
    assert!(server.client("disk").read(0, 2 << 20).unwrap() == data);
    server.stop();

    // One that nobody but the engine knows: cryptsetup sees a container that it cannot open.
    place.run_ok(["luks", "create", "--size", "2MiB", "--root", "root2", "--wrapped", "secret"]);
    fill(&place, &["--root", "root2", "secret"], "secret", 2 << 20);
    run(&mut cryptsetup(&place, &["isLuks", "secret"]));
    run(&mut cryptsetup(&place, &["luksDump", "secret"]));
    run_to_fail(&mut cryptsetup(&place, &["open", "--test-passphrase", "-d", "two", "secret"]));
    // cryptsetup adds nothing to it, and another root does not open it.
    let other = place.run(["serve", "--root", "root3", "secret"]);
    assert!(!other.status.success(), "{}", said(&other));
}

#[test]
fn what_qemu_and_nbdkit_know_of_luks_is_what_we_know() {
    let (Some(qemu_img), Some(nbdkit), Some(nbdcopy)) =
        (require_tool("qemu-img"), require_tool("nbdkit"), require_tool("nbdcopy"))
    else {
        return;
    };
    let place = place();
    let tool = |program: &Path, arguments: &[&str]| {
        let mut command = Command::new(program);
        place.prepare(&mut command);
        command.args(arguments);
        command
    };
    let secret = "secret,id=s,file=zero";
    let open = |name: &str| format!("driver=luks,key-secret=s,file.driver=file,file.filename={name}");
    let len = 4_usize << 20;
    for (index, options) in
        ["cipher-alg=aes-256", "cipher-alg=aes-128", "hash-alg=sha1"].into_iter().enumerate()
    {
        let name = format!("disk{index}");
        let created = format!("key-secret=s,iter-time=10,{options}");
        run_luks_create(&mut tool(
            &qemu_img,
            &["create", "-q", "-f", "luks", "--object", secret, "-o", &created, &name, "4M"],
        ));
        // qemu writes, we read.
        fs::write(place.path("raw"), pattern::bytes(index as u64, 0, len)).unwrap();
        run(&mut tool(
            &qemu_img,
            &["convert", "-n", "--object", secret, "--target-image-opts", "-f", "raw", "raw", &open(&name)],
        ));
        let server = place.serve(["--passphrase-file", "zero", name.as_str()]);
        let mut client = server.client(&name);
        assert!(
            client.read(0, u32::try_from(len).unwrap()).unwrap() == fs::read(place.path("raw")).unwrap(),
            "{options}"
        );
        // We write, qemu and nbdkit read.
        let ours = pattern::bytes(77, 0, len);
        fs::write(place.path("ours"), &ours).unwrap();
        drop(client);
        run(&mut tool(&nbdcopy, &["--flush", "ours", &server.uri(&name)]));
        server.stop();
        run(&mut tool(
            &qemu_img,
            &["convert", "--object", secret, "--image-opts", &open(&name), "-O", "raw", "back"],
        ));
        assert!(fs::read(place.path("back")).unwrap() == ours, "{options}");
        let copy = "nbdcopy \"$uri\" back2";
        run(&mut tool(
            &nbdkit,
            &["-U", "-", "--filter=luks", "file", &name, "passphrase=+zero", "--run", copy],
        ));
        assert!(fs::read(place.path("back2")).unwrap() == ours, "{options}");
        fs::remove_file(place.path("back2")).unwrap();
    }
    // LUKS2 is for neither of them; through our server it is a disk as any.
    place.run_ok(
        [&["luks", "create", "--size", "4MiB", "--passphrase-file", "zero"], &CHEAP[..], &["two.luks"]]
            .concat(),
    );
    run_to_fail(&mut tool(&qemu_img, &["info", "--object", secret, "--image-opts", &open("two.luks")]));
    let server = place.serve(["--passphrase-file", "zero", "two.luks"]);
    run(&mut tool(&qemu_img, &["convert", "-n", "-f", "raw", "-O", "raw", "ours", &server.uri("two")]));
    run(&mut tool(&qemu_img, &["compare", "-f", "raw", "-F", "raw", "ours", &server.uri("two")]));
    server.stop();
}

/// Changes passphrases, again and again, and is killed meanwhile. Two are known: what opens is told by what was done last.
#[test]
fn a_command_that_is_killed_leaves_the_old_header_or_the_new_one() {
    let mut random = seed();
    let place = place();
    place.run_ok(
        [
            &["luks", "create", "--size", "1MiB", "--header-size", "2MiB", "--passphrase-file", "zero"],
            &CHEAP_PBKDF2[..],
            &["disk"],
        ]
        .concat(),
    );
    let opened = |place: &Place| -> Vec<u32> {
        // By the library: so many processes would take minutes.
        let mut container =
            Container::read(fs::read(place.path("disk")).unwrap()).expect("a header is whole");
        ["zero", "one"]
            .map(|name| {
                container
                    .open(format!("passphrase {name}").as_bytes(), None)
                    .ok()
                    .map(|opened| opened.keyslot)
            })
            .into_iter()
            .flatten()
            .collect()
    };
    assert_eq!(opened(&place), [0]);
    let command = |old: &str, new: &str| {
        let mut command = place.command();
        command.args(["luks", "change-key", "--passphrase-file", old, "--new-passphrase-file", new]);
        command.args(CHEAP_PBKDF2).arg("disk").stdout(Stdio::null());
        command
    };
    // How long one takes here.
    let began = Instant::now();
    run(&mut command("zero", "one"));
    let whole = began.elapsed();
    let (mut old, mut new) = ("one", "zero");
    let (mut done, mut undone, mut torn) = (0, 0, 0);
    for round in 0..kills() {
        let mut child = command(old, new).spawn().unwrap();
        let limit = u64::try_from(whole.as_micros()).unwrap() * 5 / 4;
        thread::sleep(Duration::from_micros(pattern::splitmix64(&mut random) % limit));
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        // It may have ended by itself, and is not waited for yet.
        kill_process(pid, Signal::KILL).unwrap();
        child.wait().unwrap();
        let container = Container::read(fs::read(place.path("disk")).unwrap()).unwrap();
        torn += u32::from(!container.header().is_whole());
        assert_eq!(opened(&place).len(), 1, "one passphrase opens, after kill {round}");
        if cryptsetup_knows(&place, round) {
            assert_eq!(
                cryptsetup_opens(&place, "disk", old).is_some(),
                we_open(&place, "disk", old).is_some()
            );
        }
        let has_new = Container::read(fs::read(place.path("disk")).unwrap())
            .unwrap()
            .open(format!("passphrase {new}").as_bytes(), None)
            .is_ok();
        if has_new {
            done += 1;
            (old, new) = (new, old);
        } else {
            undone += 1;
        }
    }
    eprintln!(
        "{} kills: {done} with the new passphrase, {undone} with the old, {torn} between the two copies",
        kills()
    );
    assert!(undone > 0);
    // And what was left half way is mended by the next change.
    run(&mut command(old, new));
    assert!(Container::read(fs::read(place.path("disk")).unwrap()).unwrap().header().is_whole());
}

/// Now and then cryptsetup has a look, too.
fn cryptsetup_knows(place: &Place, round: u64) -> bool {
    round.is_multiple_of(20)
        && cryptsetup(place, &["--version"]).output().is_ok_and(|output| output.status.success())
}

#[test]
fn the_serving_process_keeps_neither_passphrase_nor_volume_key() {
    if !may_read_memory() {
        return;
    }
    let place = place();
    let passphrase = pattern::bytes(0x7061_7373, 0, 48);
    place.secret("pass", &passphrase);
    place.run_ok(
        [&["luks", "create", "--size", "4MiB", "--key-file", "pass"], &CHEAP[..], &["disk"]].concat(),
    );
    let mut container = Container::read(fs::read(place.path("disk")).unwrap()).unwrap();
    let key = container.open(&passphrase, None).unwrap().key;
    let server = place.serve(["--key-file", "pass", "disk"]);
    let mut client = server.client("disk");
    client.write(0, &pattern::bytes(3, 0, 1 << 20)).unwrap();
    let search = Search::new().secret("passphrase", &passphrase).secret("volume key", &key);
    for _ in 0..3 {
        let scan = memory::scan_process(server.process.pid(), &search).unwrap();
        let found: Vec<String> =
            scan.secrets.iter().chain(&scan.schedules).map(ToString::to_string).collect();
        assert!(scan.bytes > MIB && found.is_empty(), "{found:#?}");
        client.read(0, 1 << 20).unwrap();
    }
    server.stop();
    // What is looked for is found where it is: an engine in this very process has the key.
    let server = place.serve(["--engine-process", "none", "--key-file", "pass", "disk"]);
    server.client("disk").read(0, 4096).unwrap();
    assert!(!memory::scan_process(server.process.pid(), &search).unwrap().secrets.is_empty());
    server.stop();
}

#[test]
fn an_engine_that_dies_gets_the_key_again_from_a_file_and_only_from_there() {
    let place = place();
    place.run_ok(
        [&["luks", "create", "--size", "1MiB", "--passphrase-file", "zero"], &CHEAP[..], &["disk"]].concat(),
    );
    let data = pattern::bytes(5, 0, 1 << 20);
    let server = place.serve(["--passphrase-file", "zero", "disk"]);
    let mut client = server.client("disk");
    client.write(0, &data).unwrap();
    let kill = |server: &crate::rig::Server| {
        let pid = engine_pid(server, &place).expect("it runs");
        kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
        eventually("another engine process", || engine(server, &place)["process"]["restarts"] == 1);
    };
    kill(&server);
    assert!(client.read(0, 1 << 20).unwrap() == data);
    server.stop();

    // Through a descriptor it comes once.
    let mut command = place.command();
    command.args(["serve", "--passphrase-fd", "0", "--nbd"]);
    command.arg(format!("unix:{}", place.path("nbd.sock").display()));
    command.arg("--control").arg(place.path("control")).arg("disk");
    command.stdin(fs::File::open(place.path("zero")).unwrap());
    let server = place.start(command);
    let mut client = server.client("disk");
    assert!(client.read(0, 1 << 20).unwrap() == data);
    kill(&server);
    client.read(0, 4096).expect_err("nobody is asked again");
    let volume = server.status(&place)["servers"][0]["volumes"][0].clone();
    assert_eq!(volume["state"], "no_key", "{volume}");
    server.stop();
}

/// At a terminal, which shows all that is written to it, and would show what is typed.
#[test]
fn a_passphrase_is_typed_without_being_seen() {
    let Some(script) = require_tool("script") else { return };
    let place = place();
    place.run_ok(
        [&["luks", "create", "--size", "1MiB", "--passphrase-file", "zero"], &CHEAP[..], &["disk"]].concat(),
    );
    let type_in = |arguments: &str, typed: &str| {
        let mut command = Command::new(&script);
        place.prepare(&mut command);
        let program = format!("{} {arguments}", env!("CARGO_BIN_EXE_inlinecrypt"));
        command.args(["-q", "-e", "-c", &program, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut keyboard, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut seen = Vec::new();
        for line in typed.lines() {
            // One answer for each question, and none before it.
            while !seen.ends_with(b": ") {
                let mut byte = [0];
                assert_eq!(screen.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
                seen.push(byte[0]);
            }
            seen.push(b'\n');
            // The question is asked a moment before the terminal stops showing what is typed. Nobody is that fast.
            thread::sleep(Duration::from_millis(500));
            keyboard.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        screen.read_to_end(&mut seen).unwrap();
        let seen = String::from_utf8_lossy(&seen).into_owned();
        assert!(typed.lines().all(|line| !seen.contains(line)), "{seen}");
        (child.wait().unwrap().code(), seen)
    };
    let (code, seen) = type_in("luks test disk", "passphrase zero");
    assert!(
        code == Some(0) && seen.contains("passphrase of disk: ") && seen.contains("LUKS keyslot 0 opens"),
        "{seen}"
    );
    let (code, seen) = type_in("luks test disk", "something else");
    assert!(code == Some(2) && seen.contains("no LUKS keyslot opens"), "{seen}");
    let change = format!("luks change-key {} disk", CHEAP.join(" "));
    let (code, seen) = type_in(&change, "passphrase zero\nnext one\nother one");
    assert!(code == Some(2) && seen.contains("something else was typed"), "{seen}");
    let (code, seen) = type_in(&change, "passphrase zero\nnext one\nnext one");
    assert!(code == Some(0), "{seen}");
    assert_eq!(we_open(&place, "disk", "zero"), None);
}
