//! Volumes given as lines of dm tables, and layouts that are others' than ours.

use crate::dm_crypt::{Image, images, plaintext_by, vectors};
use crate::rig::{MIB, Place, run, skip};
use inlinecrypt_testkit::{require_tool, undo};
use serde::Deserialize;
use shake::{ExtendableOutput as _, Update as _, XofReader as _};
use std::fs;
use std::process::Command;

impl Image {
    /// The line that made it, with another device and key.
    fn line(&self, key: &str, device: &str) -> String {
        let mut words: Vec<&str> = self.table.split(' ').collect();
        (words[4], words[6]) = (key, device);
        words.join(" ")
    }

    /// The image with something else where its data lie.
    fn emptied(&self) -> Vec<u8> {
        let mut whole = self.whole();
        whole[self.data_byte_offset..][..self.data_len].fill(0xee);
        whole
    }
}

/// Reads all of it, and writes it into an image that has everything but the data.
fn is_read_and_rewritten(image: &Image, place: &Place, arguments: &[&str]) {
    for content in [image.whole(), image.emptied()] {
        fs::write(place.path("disk"), &content).unwrap();
        let server = place.serve(arguments);
        let mut client = server.client("disk");
        assert_eq!(client.export().size, image.data_len as u64, "{}", image.name);
        if content == image.whole() {
            let read = client.read(0, u32::try_from(image.data_len).unwrap()).unwrap();
            assert!(read == image.plaintext(), "{}", image.name);
        }
        client.write(0, &image.plaintext()).unwrap();
        client.flush().unwrap();
        server.stop();
        assert!(fs::read(place.path("disk")).unwrap() == image.whole(), "{}", image.name);
    }
}

#[test]
fn images_are_served_by_the_lines_that_made_them() {
    for image in images() {
        // As dmsetup prints it: with the key, in a file for its owner alone.
        let place = Place::new();
        place.secret("table", format!("{}\n", image.line(&image.key, "disk")).as_bytes());
        is_read_and_rewritten(&image, &place, &["--dm-table-file", "table"]);
        // As an argument, without it.
        place.secret("key", &hex::decode(&image.key).unwrap());
        let line = image.line("-", "disk");
        is_read_and_rewritten(&image, &place, &["--dm-table", &line, "--key", "raw:key"]);
        // As a description, beside it.
        let description = format!("[[volume]]\nkey = \"raw:key\"\ndm_table = \"{line}\"\n");
        fs::write(place.path("disk.toml"), description).unwrap();
        is_read_and_rewritten(&image, &place, &["disk"]);
    }
}

#[test]
fn an_image_is_served_by_a_config_with_its_line_and_the_key_on_standard_input() {
    let image = images().swap_remove(1);
    let place = Place::new();
    place.secret("key", &hex::decode(&image.key).unwrap());
    fs::write(place.path("disk"), image.whole()).unwrap();
    let line = image.line("-", "disk");
    let server = place
        .serve_config(&format!("[[volume]]\nname = \"disk\"\nkey = \"raw:key\"\ndm_table = \"{line}\"\n"));
    let read = server.client("disk").read(0, u32::try_from(image.data_len).unwrap()).unwrap();
    assert!(read == image.plaintext());
    let status = server.status(&place);
    assert_eq!(status["servers"][0]["volumes"][0]["offset_bytes"], image.data_byte_offset as u64);
    assert_eq!(status["servers"][0]["volumes"][0]["iv"], "data-units");
    server.stop();

    let mut command = place.command();
    command.args(["serve", "--dm-table-file", "-"]);
    command.arg("--nbd").arg(format!("unix:{}", place.path("nbd.sock").display()));
    command.arg("--control").arg(place.path("control"));
    let table = place.secret("table", image.line(&image.key, "disk").as_bytes());
    command.stdin(fs::File::open(table).unwrap());
    let server = place.start(command);
    let read = server.client("disk").read(0, u32::try_from(image.data_len).unwrap()).unwrap();
    assert!(read == image.plaintext());
    server.stop();
}

#[derive(Deserialize)]
struct Layouts {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    mode: String,
    iv: String,
    data_unit: u32,
    iv_offset: u64,
    key: String,
    data_len: usize,
    plaintext_rule: String,
    ciphertext_shake256: String,
}

fn shake256(bytes: &[u8]) -> String {
    let mut hasher = shake::Shake256::default();
    hasher.update(bytes);
    let mut digest = [0; 32];
    hasher.finalize_xof().read(&mut digest);
    hex::encode(digest)
}

/// SPDK's layout, dm-crypt's without iv_large_sectors, and AES-128-XTS: known answers, by offset and without.
#[test]
fn other_layouts_give_the_bytes_that_others_write() {
    let text = fs::read_to_string(vectors().join("iv-layouts.json")).unwrap();
    let Layouts { cases } = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 7);
    for (case, offset) in cases.iter().zip([0, 512, 4096, 1 << 20].into_iter().cycle()) {
        let place = Place::new();
        place.secret("key", &hex::decode(&case.key).unwrap());
        let mut file = vec![0x33; offset + case.data_len];
        fs::write(place.path("disk"), &file).unwrap();
        let (unit, iv_offset, at) =
            (case.data_unit.to_string(), case.iv_offset.to_string(), offset.to_string());
        let arguments = [
            "--key",
            "raw:key",
            "--mode",
            &case.mode,
            "--iv",
            &case.iv,
            "--data-unit",
            &unit,
            "--iv-offset",
            &iv_offset,
            "--offset",
            &at,
            "disk",
        ];
        let plaintext = plaintext_by(&case.plaintext_rule, case.data_len);
        // In pieces that suit nothing, the last first; engines in their own process, and in this one.
        for home in ["own", "none"] {
            file[offset..].fill(0xee);
            fs::write(place.path("disk"), &file).unwrap();
            let server = place.serve([&["--engine-process", home], &arguments[..]].concat());
            let mut client = server.client("disk");
            let pieces: Vec<(usize, &[u8])> = plaintext.chunks(7919).enumerate().collect();
            for (index, piece) in pieces.into_iter().rev() {
                client.write((index * 7919) as u64, piece).unwrap();
            }
            assert!(client.read(0, u32::try_from(case.data_len).unwrap()).unwrap() == plaintext);
            client.flush().unwrap();
            server.stop();
            let written = fs::read(place.path("disk")).unwrap();
            assert_eq!(shake256(&written[offset..]), case.ciphertext_shake256, "{}", case.name);
            assert!(written[..offset].iter().all(|&byte| byte == 0x33), "{}", case.name);
        }
    }
}

#[test]
fn an_offset_goes_with_direct_access() {
    let place = Place::new();
    place.raw_key("key", 64, 9);
    let arguments = |offset: &'static str| ["--key", "raw:key", "--offset", offset, "--direct", "disk"];
    place.sparse("disk", 2 * MIB);
    let server = place.serve(arguments("1MiB"));
    let mut client = server.client("disk");
    client.write(4096, &[5; 100_000]).unwrap();
    assert!(client.read(4096, 100_000).unwrap().iter().all(|&byte| byte == 5));
    server.stop();
    let written = fs::read(place.path("disk")).unwrap();
    let (before, after) = written.split_at(usize::try_from(MIB).unwrap());
    assert!(before.iter().all(|&byte| byte == 0) && after.iter().any(|&byte| byte != 0));
}

/// What we say of a volume is what opens it: here, and in the kernel, where there is dm-crypt.
#[test]
fn the_line_of_a_volume_of_ours_opens_it() {
    let layouts: [&[&str]; 6] = [
        &["--data-unit", "4096"],
        &["--data-unit", "512", "--offset", "64k"],
        &["--data-unit", "2048", "--iv", "sectors", "--iv-offset", "12"],
        &["--mode", "AES-128-XTS", "--data-unit", "1024"],
        &["--mode", "AES-128-CBC-ESSIV", "--data-unit", "4096", "--iv-offset", "8"],
        &["--mode", "Adiantum", "--offset", "4096"],
    ];
    let kernel = kernel_has_dm_crypt();
    for layout in layouts {
        let place = Place::new();
        let bytes = if layout.contains(&"AES-128-CBC-ESSIV") {
            16
        } else if layout[0] == "--mode" {
            32
        } else {
            64
        };
        place.raw_key("key", bytes, 7);
        place.run_ok(
            [&["volume", "create", "--size", "1MiB", "--key", "raw:key"], layout, &["v.img"]].concat(),
        );
        let content = plaintext_by("SHAKE-256(\"a volume of ours\")", usize::try_from(MIB).unwrap());
        let server = place.serve(["v.img"]);
        server.client("v").write(0, &content).unwrap();
        server.stop();
        let line = place.run_ok(["volume", "info", "--dm-table", "--show-key", "v.img"]);
        assert!(line.starts_with("0 2048 crypt "), "{line}");
        // Somewhere else, without the description.
        fs::rename(place.path("v.img"), place.path("w.img")).unwrap();
        let line = line.replace("v.img", "w.img");
        place.secret("table", line.as_bytes());
        let server = place.serve(["--dm-table-file", "table", "--read-only"]);
        assert!(server.client("w").read(0, u32::try_from(MIB).unwrap()).unwrap() == content, "{layout:?}");
        server.stop();
        if kernel {
            is_opened_by_the_kernel(&place, &line, &content);
        }
    }
}

fn kernel_has_dm_crypt() -> bool {
    if require_tool("dmsetup").is_none() || !crate::rig::may_loop() {
        return false;
    }
    let targets = Command::new("dmsetup").arg("targets").output().unwrap();
    let has = targets.status.success() && String::from_utf8_lossy(&targets.stdout).contains("crypt");
    if !has {
        // No privilege or package brings it, so this never fails; `kernel` brings kernels that have it.
        eprintln!("SKIPPED: the kernel has no dm-crypt");
    }
    has
}

fn is_opened_by_the_kernel(place: &Place, line: &str, content: &[u8]) {
    let path = place.path("w.img");
    let Ok(device) = undo::LoopDevice::new(&path, &[]) else { return skip("no loop device is free") };
    let name = format!("inlinecrypt-test-{}", std::process::id());
    let line = line.replace(path.to_str().unwrap(), &device.path().display().to_string());
    let mut create = Command::new("dmsetup");
    create.args(["create", &name, "--readonly", "--table", line.trim_end()]);
    if !create.status().unwrap().success() {
        return skip("the kernel refuses the table: a cipher is missing");
    }
    let read = fs::read(format!("/dev/mapper/{name}"));
    run(Command::new("dmsetup").args(["remove", "--retry", &name]));
    device.detach().unwrap();
    assert!(read.unwrap() == content, "{line}");
}
