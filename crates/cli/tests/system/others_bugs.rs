//! What went wrong elsewhere. Each test names the report that it comes from.
//!
//! Others of the kind: slots of one and 64 volumes in `many_volumes`, a trim by `mkfs.ext4` on an empty image in
//! `filesystem`, a kill under load in `kill`.

use crate::load::{Habits, Load, Meeting, Until};
use crate::rig::{MIB, Place, Server, may_loop, may_mount, run, seed};
use inlinecrypt_testkit::nbd::cmd;
use inlinecrypt_testkit::undo::{LoopDevice, Mount};
use inlinecrypt_testkit::{Client, Shadow, pattern, require_tool};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

const EINVAL: u32 = 22;
const ENOTSUP: u32 = 95;

/// `ZeroFS#404`: the first thing that ever happens to a volume is a trim of all of it.
#[test]
fn a_trim_first_thing_on_an_empty_image_is_nothing_special() {
    for data_unit in ["512", "4096", "65536"] {
        let place = Place::new();
        let server = place.serve(["--create", "8MiB", "--data-unit", data_unit, "v.img"]);
        let mut client = server.client("v");
        client.trim(0, 8 << 20).unwrap();
        client.trim(512, 512).unwrap();
        assert_eq!(fs::metadata(place.path("v.img")).unwrap().len(), 8 * MIB);
        let noise = client.read(0, 1 << 16).unwrap();
        assert!(noise.iter().any(|byte| *byte != 0), "a hole in ciphertext is noise");
        let data = pattern::bytes(1, 0, 1 << 20);
        client.write(MIB, &data).unwrap();
        assert!(client.read(MIB, 1 << 20).unwrap() == data);
        client.trim(0, 8 << 20).unwrap();
        client.write(MIB, &data).unwrap();
        assert!(client.read(MIB, 1 << 20).unwrap() == data);
        server.stop();
    }
}

/// `arcbox#337`: write zeroes was acknowledged, and did nothing.
#[test]
fn zeroes_that_were_written_are_zeroes() {
    for layout in [&["--data-unit", "4096"][..], &["--data-unit", "512"], &["--mode", "Adiantum"]] {
        for discard in ["pass", "off"] {
            let place = Place::new();
            let server = place.serve([&["--create", "8MiB", "--discard", discard, "v.img"], layout].concat());
            let mut client = server.client("v");
            let block = u64::from(client.export().blocks.unwrap().0);
            for flags in 0..8 {
                let fua = if flags & 1 != 0 { cmd::FLAG_FUA } else { 0 };
                let no_hole = if flags & 2 != 0 { cmd::FLAG_NO_HOLE } else { 0 };
                let fast = if flags & 4 != 0 { cmd::FLAG_FAST_ZERO } else { 0 };
                let mut model = pattern::bytes(flags, 0, 8 << 20);
                client.write(0, &model).unwrap();
                for (offset, len) in
                    [(block, block), (5 * block, 7 * block), (MIB, MIB), (3 * MIB - block, 4 * MIB)]
                {
                    let len32 = u32::try_from(len).unwrap();
                    match client.write_zeroes(offset, len32, fua | no_hole | fast) {
                        Ok(()) => model[usize::try_from(offset).unwrap()..][..len32 as usize].fill(0),
                        // Zeroes would not be fast: then nothing has happened at all.
                        Err(error) => assert_eq!((error.errno(), fast != 0), (Some(ENOTSUP), true)),
                    }
                }
                assert!(client.read(0, 8 << 20).unwrap() == model, "{layout:?} {discard} {flags}");
            }
            server.stop();
        }
    }
}

/// Neighbours in the same data units, and all on the same range, trim while everybody writes; whoever writes after all that
/// has it right.
fn trim_and_write_side_by_side(server: &Server, seed: u64) {
    const NEIGHBOURS: usize = 6;
    let mut client = server.client("v");
    client.write(0, &vec![3; 4 << 20]).unwrap();
    let trims = Offer(client.export().flags).has(5);
    if !trims {
        eprintln!("nothing can be trimmed here");
    }
    let meeting = Meeting::of(NEIGHBOURS);
    thread::scope(|scope| {
        for number in 0..NEIGHBOURS as u64 {
            let meeting = &meeting;
            scope.spawn(move || {
                let meeting = meeting.attend();
                let mut random = seed ^ number;
                let mut client = server.client("v");
                for round in 0..150 {
                    // All are in the same few data units, which move on with the rounds.
                    let start = (round % 64) * 32 * 1024;
                    // Sectors that are this one's alone: stripes of 11 sectors, which begin and end inside units.
                    let (offset, len) = (start + number * 11 * 512, 11 * 512);
                    let data = pattern::bytes(random, 0, len);
                    meeting.wait();
                    // A trim of everybody's sectors at once, together with a write of our own.
                    if trims {
                        client.send(cmd::TRIM, 0, start, 64 << 10, &[]).unwrap();
                    }
                    client.send(cmd::WRITE, 0, offset, u32::try_from(len).unwrap(), &data).unwrap();
                    for _ in 0..1 + u8::from(trims) {
                        assert_eq!(client.receive().unwrap().errno, 0);
                    }
                    // All trims are acknowledged. What is written from here on stays.
                    meeting.wait();
                    client.write(offset, &data).unwrap();
                    // A trim of our own sectors, and then a write: in this order on one connection.
                    if pattern::splitmix64(&mut random).is_multiple_of(2) && trims {
                        client.trim(offset, u32::try_from(len).unwrap()).unwrap();
                        client.write(offset, &data).unwrap();
                    }
                    meeting.wait();
                    let read = client.read(offset, u32::try_from(len).unwrap()).unwrap();
                    assert!(read == data, "round {round}, neighbour {number}");
                }
            });
        }
    });
}

/// `cloud-hypervisor#8624`: a late discard hit what had been written meanwhile.
#[test]
fn a_late_trim_takes_nothing_that_was_written_after_it() {
    let seed = seed();
    let place = Place::new();
    place.raw_key("v.raw", 64, 1);
    place.sparse("v.img", 4 * MIB);
    for workers in [0, 2] {
        let server = place.serve_config(&format!(
            "[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\ndata_unit = 4096\nserver: workers = {workers}\n"
        ));
        trim_and_write_side_by_side(&server, seed);
        server.stop();
    }
    if !may_loop() || require_tool("losetup").is_none() {
        return;
    }
    // A disk that takes whole data units alone: what one writes, its neighbours read before and write again.
    let device = LoopDevice::new(&place.path("v.img"), &["--sector-size", "4096"]).unwrap();
    let node = device.path().to_str().unwrap();
    let server = place.serve(["--key", "raw:v.raw", "--name", "v", "--direct", node]);
    trim_and_write_side_by_side(&server, seed);
    server.stop();
    device.detach().unwrap();
}

/// `libublk-rs#49`: a buffer was given back while a write still used it. Every block of busy, overlapping memory is checked.
#[test]
fn large_and_small_requests_at_once_do_not_share_memory() {
    let seed = seed();
    let place = Place::new();
    let server = place.serve(["--create", "64MiB", "--workers", "3", "v.img"]);
    let over = Until::default();
    thread::scope(|scope| {
        for number in 0..6 {
            let (server, over) = (&server, &over);
            scope.spawn(move || {
                let mut client = server.client("v");
                let offset = number * 8 * MIB;
                let habits = Habits { len_max: 64 << 10, depth: 2, ..Habits::MIXED };
                let mut load = Load::new(seed ^ number, offset, 8 * MIB, habits);
                load.fill(&mut client);
                if number % 2 == 0 {
                    load.run(&mut client, || over.is_over()).unwrap();
                } else {
                    while !over.is_over() {
                        // Longer than any buffer, and not at the beginning of one.
                        let (version, data) = load.shadow.begin(offset + 512, 5 * MIB);
                        client.write(offset + 512, &data).unwrap();
                        load.shadow.settle(offset + 512, 5 * MIB, version);
                        let read = client.read(offset, 6 << 20).unwrap();
                        load.shadow.check(offset, &read).unwrap();
                    }
                }
                load.check_all(&mut client);
            });
        }
        let _over = over.guard();
        thread::sleep(Duration::from_secs(2));
    });
    server.stop();
}

/// `fedora-coreos#1384`, `disko#328`: a size that is not a multiple of 4096.
#[test]
fn a_size_that_is_no_multiple_of_the_data_unit_is_served_in_whole_units_and_told() {
    let place = Place::new();
    place.raw_key("v.raw", 64, 1);
    let len = 4096 * 300 + 512;
    place.sparse("v.img", len);
    let tail = pattern::bytes(4, 0, 512);
    let file = fs::File::options().write(true).open(place.path("v.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &tail, len - 512).unwrap();
    let server = place.serve(["--key", "raw:v.raw", "v.img"]);
    let mut client = server.client("v");
    assert_eq!(client.export().size, 4096 * 300);
    assert!(
        server.log().contains("v.img: its last 512 bytes are not a whole data unit of 4096"),
        "{}",
        server.log()
    );
    let data = pattern::bytes(5, 0, 8192);
    client.write(4096 * 298, &data).unwrap();
    assert!(client.read(4096 * 298, 8192).unwrap() == data);
    let enospc = Some(28);
    assert_eq!(client.write(4096 * 299, &data).unwrap_err().errno(), enospc);
    assert_eq!(client.read(4096 * 300, 512).unwrap_err().errno(), Some(EINVAL));
    server.stop();
    assert!(fs::read(place.path("v.img")).unwrap()[4096 * 300..] == tail, "the rest is not ours");

    // In units of 512 it is all served; direct I/O cannot address it, and says what to do.
    let server = place.serve(["--key", "raw:v.raw", "--data-unit", "512", "v.img"]);
    assert_eq!(server.client("v").export().size, len);
    server.stop();
}

/// Clients that address bytes, whatever block size they are told, against a plain model of the disk.
fn address_bytes(client: &mut Client<UnixStream>, size: u64, seed: u64, rounds: u32) {
    let mut random = seed;
    let mut model = client.read(0, u32::try_from(size).unwrap()).unwrap();
    for round in 0..rounds {
        let mut dice = |below: u64| pattern::splitmix64(&mut random) % below;
        let len_max = if dice(4) == 0 { 300_000 } else { 9000 };
        let offset = dice(size - 1);
        let len = (1 + dice(len_max)).min(size - offset);
        let (at, count) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        let len32 = u32::try_from(len).unwrap();
        match dice(8) {
            0..=3 => {
                let data = pattern::bytes(seed ^ u64::from(round), 0, count);
                client.write(offset, &data).unwrap();
                model[at..at + count].copy_from_slice(&data);
            }
            4 => {
                client.write_zeroes(offset, len32, cmd::FLAG_NO_HOLE).unwrap();
                model[at..at + count].fill(0);
            }
            5 => {
                client.trim(offset, len32).unwrap();
                // What it may have changed is nobody's business; what lies around it is.
                let trimmed = client.read(offset, len32).unwrap();
                model[at..at + count].copy_from_slice(&trimmed);
            }
            _ => assert!(client.read(offset, len32).unwrap() == model[at..at + count], "round {round}"),
        }
    }
    assert!(client.read(0, u32::try_from(size).unwrap()).unwrap() == model);
}

/// `fedora-coreos#1384` again, from the other side: 4096-byte units behind a 512-byte logical block, and clients that
/// heed neither.
#[test]
fn clients_that_ignore_the_block_size_get_their_bytes() {
    let seed = seed();
    for data_unit in ["4096", "65536"] {
        for direct in [&[][..], &["--direct"]] {
            let place = Place::new();
            let create = ["--create", "2MiB", "--data-unit", data_unit, "v.img"];
            let server = place.serve([&create, direct].concat());
            address_bytes(&mut server.client("v"), 2 * MIB, seed, 600);
            server.stop();
        }
    }
    // Where a torn unit would damage its neighbours, the same requests are refused, and change nothing.
    let place = Place::new();
    let server = place.serve(["--create", "1MiB", "--mode", "Adiantum", "v.img"]);
    let mut client = server.client("v");
    let data = pattern::bytes(seed, 0, 8192);
    client.write(0, &data).unwrap();
    for (offset, len) in [(512, 512), (0, 1), (4096, 4097), (4095, 1)] {
        let short = usize::try_from(len).unwrap();
        assert_eq!(client.write(offset, &data[..short]).unwrap_err().errno(), Some(EINVAL));
        assert_eq!(client.read(offset, len).unwrap_err().errno(), Some(EINVAL));
    }
    assert!(client.read(0, 8192).unwrap() == data);
    server.stop();
}

/// `disko#328`: disks with 512-byte and with 4096-byte sectors, each with units of both sizes.
#[test]
fn disks_of_either_sector_size_are_served_or_refused_with_a_reason() {
    if !may_loop() || require_tool("losetup").is_none() {
        return;
    }
    let seed = seed();
    for sector in ["512", "4096"] {
        let place = Place::new();
        place.raw_key("v.raw", 64, 1);
        place.sparse("v.img", 2 * MIB);
        let device = LoopDevice::new(&place.path("v.img"), &["--sector-size", sector]).unwrap();
        let node = device.path().to_str().unwrap();
        for data_unit in ["512", "4096"] {
            for direct in [&[][..], &["--direct"]] {
                let arguments =
                    [&["--key", "raw:v.raw", "--name", "v", "--data-unit", data_unit, node], direct].concat();
                if (sector, data_unit, direct.len()) == ("4096", "512", 1) {
                    let refused = place.run([&["serve", "--nbd", "unix:nbd.sock"], &arguments[..]].concat());
                    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
                    assert_eq!(refused.status.code(), Some(1), "{said}");
                    assert!(said.contains("4096") && said.contains("512"), "{said}");
                    continue;
                }
                let server = place.serve(arguments);
                address_bytes(&mut server.client("v"), 2 * MIB, seed, 150);
                server.stop();
            }
        }
        device.detach().unwrap();
    }
}

/// `crucible#1788`: a flipped bit was a panic. Without a tag it is 16 bytes of noise, and no harm to others.
#[test]
fn a_flipped_bit_on_the_disk_is_noise_in_one_place_and_nothing_more() {
    let place = Place::new();
    let mut server = place.serve(["--create", "1MiB", "v.img"]);
    let mut client = server.client("v");
    let data = pattern::bytes(5, 0, 1 << 20);
    client.write(0, &data).unwrap();
    client.flush().unwrap();
    let mut random = seed();
    for _ in 0..50 {
        let bit = pattern::splitmix64(&mut random) % (8 * MIB);
        let (at, mask) = (usize::try_from(bit / 8).unwrap(), 1u8 << (bit % 8));
        let flip = || {
            let mut stored = fs::read(place.path("v.img")).unwrap();
            stored[at] ^= mask;
            let file = fs::File::options().write(true).open(place.path("v.img")).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &stored[at..=at], at as u64).unwrap();
        };
        flip();
        let read = client.read(0, 1 << 20).unwrap();
        let wrong: Vec<usize> = (0..read.len()).filter(|index| read[*index] != data[*index]).collect();
        assert!(!wrong.is_empty() && wrong.iter().all(|index| index / 16 == at / 16), "{wrong:?}");
        flip();
    }
    assert!(client.read(0, 1 << 20).unwrap() == data);
    assert!(server.is_running());
    server.stop();

    // In a wrapped key, there is a tag: refused, with the code for a wrong key, whichever bit it is.
    let key = fs::read(place.path("v.img.key")).unwrap();
    for _ in 0..20 {
        let bit = usize::try_from(pattern::splitmix64(&mut random)).unwrap() % (8 * key.len());
        let mut flipped = key.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(place.path("v.img.key"), &flipped).unwrap();
        let refused = place.run(["serve", "--nbd", "unix:nbd.sock", "v.img"]);
        assert_eq!(refused.status.code(), Some(2), "bit {bit}: {}", crate::rig::said(&refused));
    }
}

/// `dm-inlinecrypt` v1: raw bytes labelled wrapped were taken, and so was the reverse.
#[test]
fn a_raw_key_called_wrapped_is_refused_and_so_is_the_reverse() {
    let place = Place::new();
    place.sparse("v.img", MIB);
    place.run_ok(["key", "generate", "--out", "wrapped"]);
    for len in [16, 32, 64] {
        let name = format!("{len}.raw");
        place.raw_key(&name, len, 1);
        let refused = place.run(["serve", "--nbd", "unix:nbd.sock", "--key", &name, "v.img"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("was given as a wrapped key, and is not one"), "{said}");
    }
    place.run_ok(["key", "prepare", "--in", "wrapped", "--out", "ephemeral"]);
    for (name, form) in [("wrapped", "long-term"), ("ephemeral", "ephemeral")] {
        let refused =
            place.run(["serve", "--nbd", "unix:nbd.sock", "--key", &format!("raw:{name}"), "v.img"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("looks like a {form} wrapped key")), "{said}");
    }
    // An ephemeral one is wrapped, and still of no use to another start of the engine.
    let refused = place.run(["serve", "--nbd", "unix:nbd.sock", "--key", "ephemeral", "v.img"]);
    assert_eq!(refused.status.code(), Some(2), "{}", crate::rig::said(&refused));
    assert!(!place.path("nbd.sock").exists());
}

/// How bytes may be written in text.
fn spellings(secret: &[u8]) -> Vec<Vec<u8>> {
    let hex = hex::encode(secret);
    let decimal: Vec<String> = secret.iter().map(u8::to_string).collect();
    vec![
        secret.to_vec(),
        hex.clone().into_bytes(),
        hex.to_uppercase().into_bytes(),
        decimal.join(", ").into_bytes(),
        decimal.join(",").into_bytes(),
        base64(secret),
    ]
}

/// Without padding, and without the last group, whose letters depend on what follows.
fn base64(bytes: &[u8]) -> Vec<u8> {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let bits = u32::from(three[0]) << 16 | u32::from(three[1]) << 8 | u32::from(three[2]);
        [18, 12, 6, 0].map(|shift| LETTERS[(bits >> shift & 63) as usize])
    };
    bytes.chunks_exact(3).flat_map(group).collect()
}

/// `dstack#556`, `dstack#886`: keys in arguments, environment, logs, JSON.
#[test]
fn no_secret_is_in_arguments_environment_log_or_status() {
    let place = Place::new();
    let key = fs::read(place.raw_key("v.raw", 64, 1)).unwrap();
    place.sparse("v.img", MIB);
    let config = "[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\n[[volume]]\npath = \"w.img\"\n";
    place.run_ok(["volume", "create", "--size", "1MiB", "w.img"]);
    let path = place.write_config(config);
    let mut command = place.command();
    command.args(["-vvv", "serve", "--config"]).arg(path);
    let server = place.start(command);
    for export in ["v", "w"] {
        let mut client = server.client(export);
        client
            .write(512, b"a secret of the client's, of some length".repeat(20).get(..512).unwrap())
            .unwrap();
        client.read(0, 4096).unwrap();
        assert!(client.read(2 * MIB, 512).is_err());
    }
    let pid = server.process.pid();
    let mut seen = vec![
        ("log", server.log().into_bytes()),
        ("output", server.out().into_bytes()),
        ("status", server.status_text(&place).into_bytes()),
        ("status for people", place.run_ok(["status", "--control", "control"]).into_bytes()),
        ("arguments", fs::read(format!("/proc/{pid}/cmdline")).unwrap()),
        ("volume info", place.run_ok(["volume", "info", "--json", "w.img"]).into_bytes()),
        ("description", fs::read(place.path("w.img.toml")).unwrap()),
    ];
    // Not for everybody to read, since the server protects itself; then nobody else can read it either.
    if let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) {
        seen.push(("environment", environment));
    }
    assert!(server.log().contains("DEBUG"), "-vvv says little: {}", server.log());
    let root = fs::read(place.path("home/root.key")).unwrap();
    let wrapped = fs::read(place.path("w.img.key")).unwrap();
    let blob_secret = &wrapped[wrapped.len() - 32..];
    let secrets: [(&str, &[u8]); 5] = [
        ("raw key", &key[..32]),
        ("second half of the raw key", &key[32..]),
        ("root", &root[root.len() - 32..]),
        ("wrapped key", blob_secret),
        ("plaintext", b"a secret of the client's, of some length"),
    ];
    for (place, text) in &seen {
        for (secret, bytes) in &secrets {
            for spelling in spellings(bytes) {
                // A quarter of it would be too much already.
                let part = &spelling[..spelling.len() / 4];
                assert!(!text.windows(part.len()).any(|window| window == part), "{secret} is in {place}");
            }
        }
    }
    server.stop();
}

/// What an export says it can, from the protocol's transmission flags.
#[derive(Clone, Copy, Debug)]
struct Offer(u16);

impl Offer {
    fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 == 1
    }
}

fn errno<T>(result: Result<T, inlinecrypt_testkit::NbdError>) -> Option<u32> {
    match result {
        Ok(_) => None,
        Err(error) => Some(error.errno().unwrap_or_else(|| panic!("{error}"))),
    }
}

/// Tries everything that is offered, and everything that is not.
fn try_offer(server: &Server, what: &str, allocated: &dyn Fn() -> Option<u64>) {
    let mut client = server.client("v");
    let offer = Offer(client.export().flags);
    assert!(offer.has(0), "{what}");
    if offer.has(1) {
        assert_eq!(errno(client.write(0, &[0; 4096])), Some(1), "{what}");
        assert!(![5, 6, 11].into_iter().any(|bit| offer.has(bit)), "{what}: {offer:?}");
        client.read(0, 4096).unwrap();
        client.flush().unwrap();
        return;
    }
    let data = pattern::bytes(1, 0, 1 << 20);
    client.write(0, &data).unwrap();
    // Flush and FUA are always there: without them nothing is safe.
    assert!(offer.has(2) && offer.has(3), "{what}: {offer:?}");
    client.flush().unwrap();
    client.request(cmd::WRITE, cmd::FLAG_FUA, 0, 4096, &data[..4096]).unwrap();
    let refused = |result| assert!(matches!(errno(result), Some(EINVAL | ENOTSUP)), "{what}");

    if offer.has(5) {
        let before = allocated();
        client.request(cmd::TRIM, cmd::FLAG_FUA, 0, 1 << 20, &[]).unwrap();
        if let (Some(before), Some(after)) = (before, allocated()) {
            assert!(after < before, "{what}: trim gave nothing back ({before} and then {after})");
        }
    } else {
        refused(client.trim(0, 1 << 20));
        assert!(client.read(0, 1 << 20).unwrap() == data, "{what}: a trim that is not offered did something");
    }
    client.write(0, &data).unwrap();
    if offer.has(6) {
        client.write_zeroes(8192, 65536, cmd::FLAG_NO_HOLE | cmd::FLAG_FUA).unwrap();
        let read = client.read(0, 1 << 20).unwrap();
        assert!(read[8192..8192 + 65536].iter().all(|byte| *byte == 0), "{what}");
        assert!(read[..8192] == data[..8192] && read[8192 + 65536..] == data[8192 + 65536..], "{what}");
    } else {
        refused(client.write_zeroes(8192, 65536, 0));
    }
    client.write(0, &data).unwrap();
    let fast = client.write_zeroes(8192, 65536, cmd::FLAG_FAST_ZERO);
    let read = client.read(8192, 65536).unwrap();
    match errno(fast) {
        None => assert!(offer.has(11) && read.iter().all(|byte| *byte == 0), "{what}"),
        Some(ENOTSUP) => assert!(offer.has(11) && read == data[8192..8192 + 65536], "{what}"),
        Some(EINVAL) => assert!(!offer.has(11) && read == data[8192..8192 + 65536], "{what}"),
        Some(other) => panic!("{what}: fast zero fails with {other}"),
    }
    if offer.has(7) {
        // A server may refuse to send more than 64 KiB in one chunk.
        let cookie = client.send(cmd::READ, cmd::FLAG_DF, 0, 64 << 10, &[]).unwrap();
        let reply = client.receive().unwrap();
        assert_eq!((reply.cookie, reply.errno, reply.data_chunks), (cookie, 0, 1), "{what}");
        assert!(reply.data == client.read(0, 64 << 10).unwrap(), "{what}");
    } else {
        refused(client.request(cmd::READ, cmd::FLAG_DF, 0, 4096, &[]).map(drop));
    }
    if offer.has(8) {
        // What one connection wrote, a flush by another covers, and a third reads.
        client.write(4096, &data[..4096]).unwrap();
        server.client("v").flush().unwrap();
        assert!(server.client("v").read(4096, 4096).unwrap() == data[..4096], "{what}");
    }
    if offer.has(10) {
        client.request(cmd::CACHE, 0, 0, 1 << 20, &[]).unwrap();
    } else {
        refused(client.request(cmd::CACHE, 0, 0, 4096, &[]).map(drop));
    }
    assert!(!offer.has(9), "{what}: resize is not ours");
    let blocks = client.block_status(0, 1 << 20, 0).unwrap();
    assert!(!blocks.is_empty() && blocks.iter().all(|block| block.flags & 2 == 0), "{what}: {blocks:?}");
}

/// `cloud-hypervisor#7817`, `arcbox#337`: what is advertised works, and what does not work is not advertised, on every
/// backing.
#[test]
fn what_is_offered_works_and_what_is_not_is_refused_on_every_backing() {
    let try_file = |place: &Place, path: &str, what: &str| {
        let whole = place.path(path);
        let allocated = || Some(fs::metadata(&whole).unwrap().blocks());
        let variants: [&[&str]; 5] =
            [&[], &["--direct"], &["--discard", "off"], &["--read-only"], &["--workers", "2"]];
        for more in variants {
            if more == ["--direct"] {
                let checked = place.run(
                    [&["serve", "--direct", "--key", "raw:v.raw", "--nbd", "unix:/nowhere/x", path][..]]
                        .concat(),
                );
                // It is only tried whether the file can be opened so: the socket cannot be made in any case.
                let said = crate::rig::said(&checked);
                if said.contains("direct I/O") {
                    assert!(said.contains("without --direct"), "{said}");
                    eprintln!("{what} has no direct I/O");
                    continue;
                }
            }
            let server = place.serve([&["--key", "raw:v.raw", path], more].concat());
            try_offer(&server, &format!("{what} {more:?}"), &allocated);
            server.stop();
        }
    };
    let place = Place::new();
    place.raw_key("v.raw", 64, 1);
    place.sparse("v.img", 4 * MIB);
    try_file(&place, "v.img", "the usual place for files");
    if !may_mount() {
        return;
    }
    fs::create_dir(place.path("tmpfs")).unwrap();
    let tmpfs = Mount::new(&place.path("tmpfs"), &["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).unwrap();
    place.sparse("tmpfs/v.img", 4 * MIB);
    try_file(&place, "tmpfs/v.img", "tmpfs");
    tmpfs.unmount().unwrap();

    let Some(mkfs) = require_tool("mkfs.ext4") else { return };
    if !may_loop() || require_tool("losetup").is_none() {
        return;
    }
    place.sparse("ext4.img", 64 * MIB);
    run(Command::new(mkfs).args(["-q", "-F"]).arg(place.path("ext4.img")));
    fs::create_dir(place.path("ext4")).unwrap();
    let ext4 =
        Mount::new(&place.path("ext4"), &["-o", "loop", place.path("ext4.img").to_str().unwrap()]).unwrap();
    place.sparse("ext4/v.img", 4 * MIB);
    try_file(&place, "ext4/v.img", "ext4");
    ext4.unmount().unwrap();

    place.sparse("device.img", 8 * MIB);
    let device = LoopDevice::new(&place.path("device.img"), &[]).unwrap();
    for more in [&[][..], &["--direct"], &["--discard", "off"], &["--read-only"]] {
        let node = device.path().to_str().unwrap();
        let server = place.serve([&["--key", "raw:v.raw", "--name", "v", node], more].concat());
        let file = place.path("device.img");
        let allocated = || (!more.is_empty()).then(|| fs::metadata(&file).unwrap().blocks());
        try_offer(&server, &format!("a block device {more:?}"), &allocated);
        server.stop();
    }
    device.detach().unwrap();
}

/// Nobody can serve a volume that is being served, nor under another of its names.
#[test]
fn one_volume_has_one_server_whatever_it_is_called() {
    let place = Place::new();
    let server = place.serve(["--create", "1MiB", "v.img"]);
    fs::hard_link(place.path("v.img"), place.path("again.img")).unwrap();
    std::os::unix::fs::symlink("v.img", place.path("link.img")).unwrap();
    for name in ["v.img", "again.img", "link.img", "./v.img"] {
        for more in [&[][..], &["--read-only"]] {
            let refused = place
                .run([&["serve", "--nbd", "unix:other.sock", "--key", "v.img.key", name], more].concat());
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert_eq!(refused.status.code(), Some(5), "{name}: {said}");
            assert!(said.contains(&format!("process {}", server.process.pid())), "{name}: {said}");
        }
    }
    let mut shadow = Shadow::new(1, 0, MIB);
    let (version, data) = shadow.begin(0, 4096);
    server.client("v").write(0, &data).unwrap();
    shadow.settle(0, 4096, version);
    server.stop();
    // Readers go together.
    let one = place.serve(["--read-only", "v.img"]);
    let second = Place::new();
    second.secret("key", &fs::read(place.path("v.img.key")).unwrap());
    let mut command = place.command();
    command.args(["serve", "--read-only", "--control", "none", "--nbd", "unix:other.sock", "v.img"]);
    command.stdout(std::process::Stdio::null());
    let mut other = inlinecrypt_testkit::ServerProcess::start_at(
        &mut command,
        &place.path("other.sock"),
        crate::rig::PATIENCE,
    )
    .unwrap();
    let stream = crate::rig::dial(&place.path("other.sock"));
    shadow.check(0, &Client::connect(stream, "v").unwrap().read(0, 4096).unwrap()).unwrap();
    shadow.check(0, &one.client("v").read(0, 4096).unwrap()).unwrap();
    other.kill().unwrap();
    one.stop();
}
