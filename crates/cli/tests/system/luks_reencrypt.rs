//! LUKS2 containers get another key, also while they are served: in cryptsetup's own layout, so that it finishes what we began, and
//! we what it began; killed at any moment, either goes on.

use crate::load::{Habits, Load, Until};
use crate::rig::{MIB, Place, Server, eventually, run, run_to_fail, said, seed};
use inlinecrypt_testkit::{pattern, require_tool};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

pub(crate) const CHEAP: [&str; 6] =
    ["--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4"];
/// Where data begins.
pub(crate) const DATA_AT: u64 = 16 * MIB;

/// All of it where CI has the time, else a slice.
pub(crate) fn long() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

pub(crate) fn cryptsetup(place: &Place, arguments: &[&str]) -> Command {
    let mut command = Command::new("cryptsetup");
    place.prepare(&mut command);
    command.args(arguments);
    command
}

/// What re-encrypts: cryptsetup with these arguments, before which come all that make it cheap.
pub(crate) fn theirs(place: &Place, arguments: &[&str]) -> Command {
    // Of a file it cannot tell whether anybody else uses it.
    let mut command = cryptsetup(place, &["reencrypt", "-q", "--force-offline-reencrypt", "-d", "zero"]);
    command.args(CHEAP).args(arguments).arg("disk");
    command
}

pub(crate) fn ours(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command();
    command.args(["volume", "reencrypt", "--passphrase-file", "zero"]).args(arguments).arg("disk");
    command
}

/// cryptsetup goes on; where a zone was being written, it wants to be told that this may be repaired.
pub(crate) fn theirs_goes_on(place: &Place) {
    if info(place)["reencrypt"]["interrupted"] == true {
        run(&mut cryptsetup(place, &["repair", "-q", "-d", "zero", "disk"]));
        assert_eq!(info(place)["reencrypt"]["interrupted"], false);
    }
    run(&mut theirs(place, &["--resume-only"]));
}

/// A container of ours with content, the passphrase in `zero`.
pub(crate) fn container(place: &Place, sector: &str, len: u64) -> Vec<u8> {
    place.secret("zero", b"passphrase zero");
    let create = ["luks", "create", "--size", &len.to_string(), "--sector-size", sector];
    place.run_ok([&create[..], &["--passphrase-file", "zero"], &CHEAP, &["disk"]].concat());
    let server = serve(place, &[]);
    let content = pattern::bytes(11, 0, usize::try_from(len).unwrap());
    let mut client = server.client("disk");
    for (at, piece) in (0..).step_by(1 << 20).zip(content.chunks(1 << 20)) {
        client.write(at, piece).unwrap();
    }
    drop(client);
    server.stop();
    content
}

pub(crate) fn serve(place: &Place, more: &[&str]) -> Server {
    place.serve([&["--passphrase-file", "zero"], more, &["disk"]].concat())
}

/// Reads all of it by serving it.
pub(crate) fn served(place: &Place, len: usize) -> Vec<u8> {
    let server = serve(place, &["--pause-reencryption"]);
    let content = server.client("disk").read(0, u32::try_from(len).unwrap()).unwrap();
    server.stop();
    content
}

pub(crate) fn info(place: &Place) -> Value {
    serde_json::from_str(&place.run_ok(["volume", "info", "--json", "disk"])).unwrap()
}

pub(crate) fn volume_key(place: &Place) -> Vec<u8> {
    let _ = fs::remove_file(place.path("vk"));
    run(&mut cryptsetup(
        place,
        &["luksDump", "-q", "--dump-volume-key", "--volume-key-file", "vk", "-d", "zero", "disk"],
    ));
    fs::read(place.path("vk")).unwrap()
}

/// The container is an ordinary one again, and cryptsetup's key decrypts it to this.
pub(crate) fn is_finished(place: &Place, content: &[u8]) -> Vec<u8> {
    assert!(info(place)["reencrypt"].is_null());
    let dump: Value =
        serde_json::from_str(&run(&mut cryptsetup(place, &["luksDump", "--dump-json-metadata", "disk"])))
            .unwrap();
    // What cryptsetup leaves when it is killed before it begins is bound to nothing.
    let digests = dump["digests"].as_object().unwrap().values();
    let bound: Vec<&Value> =
        digests.filter(|digest| !digest["segments"].as_array().unwrap().is_empty()).collect();
    assert!(bound.len() == 1, "{dump}");
    let keyslots = dump["keyslots"].as_object().unwrap();
    assert!(keyslots.values().all(|slot| slot["type"] == "luks2"), "{dump}");
    assert!(dump["config"]["requirements"]["mandatory"].as_array().is_none_or(Vec::is_empty), "{dump}");
    let segment = &dump["segments"]["0"];
    let sector = usize::try_from(segment["sector_size"].as_u64().unwrap()).unwrap();
    let key = volume_key(place);
    let cipher = inlinecrypt_cipher::Mode::Aes256Xts.info().expand(&key).unwrap();
    let mut data = fs::read(place.path("disk")).unwrap()[usize::try_from(DATA_AT).unwrap()..].to_vec();
    for (number, unit) in data.chunks_exact_mut(sector).enumerate() {
        cipher.decrypt(((number * sector / 512) as u64).into(), sector, unit);
    }
    assert!(data == content, "cryptsetup's key decrypts it to something else");
    assert!(served(place, content.len()) == content);
    key
}

pub(crate) fn kill_after(mut child: Child, delay: Duration) -> bool {
    thread::sleep(delay);
    let _ = child.kill();
    child.wait().unwrap().code().is_none()
}

#[test]
fn offline_it_gets_another_key_and_cryptsetup_opens_it() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    for (sector, more) in [
        ("512", &["--progress-json"][..]),
        ("4096", &["--zone", "256KiB"]),
        ("512", &["--data-unit", "4096"]),
        ("4096", &["--data-unit", "512"]),
    ] {
        let place = Place::new();
        let content = container(&place, sector, 5 * MIB + 4096);
        let old = volume_key(&place);
        let text = run(&mut ours(&place, more));
        assert_ne!(is_finished(&place, &content), old);
        assert_eq!(place.run_ok(["luks", "dump", "disk"]).matches("LUKS keyslot 0 ").count(), 1);
        if more == ["--progress-json"] {
            let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(lines.last().unwrap()["device_bytes"], (5 * MIB + 4096).to_string(), "{text}");
        }
        // The old key's area is gone.
        run(&mut cryptsetup(&place, &["open", "--test-passphrase", "-d", "zero", "disk"]));
    }
}

#[test]
fn cryptsetup_finishes_what_we_began() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let mut random = seed();
    for (sector, resilience) in [("512", "checksum"), ("4096", "journal")] {
        let place = Place::new();
        let content = container(&place, sector, 8 * MIB);
        let old = volume_key(&place);
        let mut middle = 0;
        for _ in 0..20 {
            let resume: &[&str] = if info(&place)["reencrypt"].is_null() { &[] } else { &["--resume"] };
            let mut command = ours(&place, &[&["--throttle", "10MiB"], resume].concat());
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            kill_after(child, Duration::from_millis(150 + pattern::splitmix64(&mut random) % 300));
            let done = info(&place)["reencrypt"]["done_bytes"].as_u64();
            middle += u64::from(done.is_some_and(|done| done > 0));
            if done.is_none_or(|done| done > 3 * MIB) {
                break;
            }
        }
        assert!(middle > 0, "no kill came in the middle");
        let dump = run(&mut cryptsetup(&place, &["luksDump", "disk"]));
        assert!(dump.contains("online-reencrypt-v2") && dump.contains(resilience), "{dump}");
        theirs_goes_on(&place);
        assert_ne!(is_finished(&place, &content), old);
    }
}

#[test]
fn we_finish_what_cryptsetup_began() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    for (sector, more) in [
        ("512", &["--init-only"][..]),
        ("4096", &["--init-only", "--resilience", "journal"]),
        ("512", &["--init-only", "--sector-size", "4096"]),
        ("4096", &["--init-only", "--resilience", "checksum", "--resilience-hash", "sha512"]),
    ] {
        let place = Place::new();
        let content = container(&place, sector, 5 * MIB);
        run(&mut theirs(&place, more));
        let state = info(&place)["reencrypt"].clone();
        assert_eq!(state["done_bytes"], 0, "{state}");
        // Half of it by the old key, and by both.
        assert!(served(&place, content.len()) == content);
        // As cryptsetup holds it while it is at work; the file itself it locks now and then only.
        let uuid = run(&mut cryptsetup(&place, &["luksUUID", "disk"]));
        let lock = format!("/run/cryptsetup/LN_LUKS2-reencryption-{}", uuid.trim());
        let held = fs::File::options().create(true).truncate(false).write(true).open(&lock).unwrap();
        held.lock().unwrap();
        let output = ours(&place, &["--resume"]).output().unwrap();
        assert!(
            output.status.code() == Some(5) && said(&output).contains("somebody else"),
            "{}",
            said(&output)
        );
        drop(held);
        run(&mut ours(&place, &["--resume"]));
        assert!(!Path::new(&lock).exists());
        is_finished(&place, &content);
    }
}

/// Killed again and again, and taken up by the one or the other.
#[test]
fn either_goes_on_where_the_other_was_killed() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let mut random = seed();
    let wanted = if long() { 200 } else { 24 };
    let (mut kills, mut completed, mut in_a_zone, mut repaired) = ([0, 0], 0, 0, 0);
    let place = Place::new();
    let content = container(&place, "512", 12 * MIB);
    let mut sector = "512";
    while kills[0] + kills[1] < wanted || completed == 0 {
        let state = info(&place)["reencrypt"].clone();
        let is_begun = !state.is_null();
        let who = usize::from(pattern::splitmix64(&mut random).is_multiple_of(2));
        let mut command = match (who, is_begun) {
            (0, false) => ours(&place, &["--throttle", "40MiB", "--data-unit", sector]),
            (0, true) => ours(&place, &["--throttle", "40MiB", "--resume"]),
            (_, false) => theirs(&place, &["--hotzone-size", "512K", "--sector-size", sector]),
            (_, true) => theirs(&place, &["--resume-only", "--hotzone-size", "512K"]),
        };
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let delay = Duration::from_micros(pattern::splitmix64(&mut random) % 300_000);
        kills[who] += u64::from(kill_after(child, delay));
        let now = info(&place)["reencrypt"].clone();
        in_a_zone += u64::from(now["interrupted"] == true);
        // Else the server does it, which comes next.
        if now["interrupted"] == true && pattern::splitmix64(&mut random).is_multiple_of(2) {
            run(&mut cryptsetup(&place, &["repair", "-q", "-d", "zero", "disk"]));
            repaired += 1;
        }
        let server = serve(&place, &["--pause-reencryption"]);
        let read = server.client("disk").read(0, 12 << 20).unwrap();
        assert!(read == content, "after {kills:?} kills: {now}");
        server.stop();
        if is_begun && now.is_null() {
            completed += 1;
            is_finished(&place, &content);
            sector = if sector == "512" { "4096" } else { "512" };
        }
    }
    eprintln!(
        "{kills:?} kills of ours and theirs, {in_a_zone} in a zone, {repaired} repaired by cryptsetup, {completed} completed"
    );
    assert!(kills[0] > 0 && kills[1] > 0 && in_a_zone > 0, "the kills hit nothing");
}

const LEN: u64 = 4 * MIB;

/// What is written before, during and after is there, also when the server is killed in the middle of it, again and again;
/// and each start goes on where the last one was.
#[test]
fn served_it_gets_another_key_and_kills_lose_nothing() {
    let mut random = seed();
    let place = Place::new();
    container(&place, "512", 3 * LEN);
    let habits = Habits { len_max: 32 << 10, depth: 4, reads: 30, trims: 0, ..Habits::MIXED };
    let mut loads: Vec<Load> =
        (0..3).map(|number| Load::new(random ^ number, number * LEN, LEN, habits)).collect();
    let mut server = serve(&place, &[]);
    for load in &mut loads {
        load.fill(&mut server.client(""));
    }
    let kills = if long() { 200 } else { 12 };
    let (mut begun, mut in_the_middle, mut answered) = (0, 0, 0);
    let control = |more: &[&str]| {
        let mut command = place.command();
        command.args(["volume", "reencrypt", "--control", "control"]).args(more).arg("disk");
        command
    };
    for kill in 0..kills {
        let state = server.status(&place)["servers"][0]["volumes"][0]["reencrypt"]["state"].clone();
        let is_under_way = ["running", "paused", "failing"].iter().any(|under_way| state == *under_way);
        let unit = if begun % 2 == 0 { "512" } else { "4096" };
        let throttle = if kill % 3 == 0 { "100MiB" } else { "40MiB" };
        let delay = Duration::from_micros(pattern::splitmix64(&mut random) % 450_000);
        let barrier = Barrier::new(loads.len() + 1);
        thread::scope(|scope| {
            for load in &mut loads {
                let mut client = server.client("");
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    load.run_until_killed(&mut client);
                });
            }
            barrier.wait();
            let asked = (!is_under_way).then(|| {
                control(&["--detach", "--zone", "256KiB", "--throttle", throttle, "--data-unit", unit])
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap()
            });
            thread::sleep(delay);
            server.process.kill().unwrap();
            if let Some(mut asked) = asked {
                // It may have come too late.
                begun += u64::from(asked.wait().unwrap().success());
            }
        });
        for load in &mut loads {
            load.give_up();
            answered += std::mem::take(&mut load.answered);
        }
        let done = info(&place)["reencrypt"]["done_bytes"].as_u64().unwrap_or(0);
        in_the_middle += u64::from(done > 0 && done < 3 * LEN);
        server = serve(&place, &[]);
        for load in &mut loads {
            load.check_all(&mut server.client(""));
        }
    }
    eprintln!("{kills} kills: {begun} begun, {in_the_middle} cut in the middle, {answered} answers");
    assert!(begun > 0 && in_the_middle > 0 && answered > 0, "the kills hit nothing");
    // The last server goes on by itself, and may be done at any moment.
    eventually("it is done", || info(&place)["reencrypt"].is_null());
    for load in &mut loads {
        load.check_all(&mut server.client(""));
    }
    server.stop();
    let mut server = serve(&place, &[]);
    for load in &mut loads {
        load.check_all(&mut server.client(""));
    }
    assert!(server.is_running());
    server.stop();
}

/// Clients write while the key changes; then the server stops half-way, and cryptsetup does the rest.
#[test]
fn what_a_server_began_cryptsetup_finishes() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = Place::new();
    container(&place, "4096", 3 * LEN);
    let old = volume_key(&place);
    let habits = Habits { len_max: 32 << 10, depth: 4, reads: 30, trims: 0, ..Habits::MIXED };
    let mut load = Load::new(5, 0, 3 * LEN, habits);
    let server = serve(&place, &[]);
    let mut client = server.client("");
    load.fill(&mut client);
    let over = Until::default();
    thread::scope(|scope| {
        let (load, client, over) = (&mut load, &mut client, &over);
        scope.spawn(move || load.run(client, || over.is_over()).unwrap());
        let guard = over.guard();
        let mut command = place.command();
        command.args([
            "volume",
            "reencrypt",
            "--control",
            "control",
            "--detach",
            "--throttle",
            "8MiB",
            "disk",
        ]);
        run(&mut command);
        let report = || server.status(&place)["servers"][0]["volumes"][0]["reencrypt"].clone();
        crate::rig::eventually("some of it is done", || {
            report()["done_bytes"].as_u64().is_some_and(|done| done > 4 * MIB)
        });
        // Another is not begun meanwhile.
        let said = run_to_fail(&mut command);
        assert!(said.contains("re-encrypted already"), "{said}");
        drop(guard);
    });
    load.check_all(&mut client);
    drop(client);
    server.stop();
    assert!(info(&place)["reencrypt"]["done_bytes"].as_u64().unwrap() > 4 * MIB);
    theirs_goes_on(&place);
    assert_ne!(volume_key(&place), old);
    let server = serve(&place, &[]);
    load.check_all(&mut server.client(""));
    server.stop();
}

#[test]
fn what_is_not_re_encrypted_is_refused_with_the_reason() {
    let place = Place::new();
    container(&place, "4096", MIB);
    let before = fs::read(place.path("disk")).unwrap();
    let refused = |command: &mut Command, says: &str| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(said(&output).contains(says), "{says}: {}", said(&output));
        assert!(fs::read(place.path("disk")).unwrap() == before, "{says}: it was changed");
    };
    refused(&mut ours(&place, &["--keep-holes"]), "holes");
    refused(&mut ours(&place, &["--key", "raw:zero"]), "Leave --key out");
    refused(&mut ours(&place, &["--data-unit", "8192"]), "4096");
    refused(&mut ours(&place, &["--resume"]), "not being re-encrypted");
}
