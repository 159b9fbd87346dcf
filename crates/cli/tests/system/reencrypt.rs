//! Volumes get another key while they are served, and whoever uses them notices nothing; killed at any moment, they go on.

use crate::clients::{fio, fio_program};
use crate::load::{Habits, Load, Until};
use crate::rig::{MIB, PATIENCE, Place, Server, eventually, run, run_to_fail, said, seed};
use crate::upgrade::upgrade;
use inlinecrypt_testkit::{pattern, require_tool};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// All of it where CI has the time, else a slice.
fn long() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

fn volume(server: &Server, place: &Place) -> Value {
    server.status(place)["servers"][0]["volumes"][0].clone()
}

fn is_under_way(server: &Server, place: &Place) -> bool {
    let state = volume(server, place)["reencrypt"]["state"].clone();
    ["running", "paused", "failing"].iter().any(|under_way| state == *under_way)
}

/// `volume reencrypt`, by the server in this place.
fn reencrypt(place: &Place, more: &[&str]) -> Command {
    let mut command = place.command();
    command.args(["volume", "reencrypt", "--control", "control"]).args(more).arg("v.img");
    command
}

const LEN: u64 = 4 * MIB;

/// What is written before, during and after is there, also when the server is killed in the middle of it, again and again;
/// and each start goes on where the last one was.
#[test]
fn two_hundred_kills_during_reencryption_lose_nothing() {
    let mut random = seed();
    let place = Place::new();
    let habits = Habits { len_max: 32 << 10, depth: 4, reads: 30, trims: 0, ..Habits::MIXED };
    let mut loads: Vec<Load> =
        (0..3).map(|number| Load::new(random ^ number, number * LEN, LEN, habits)).collect();
    let mut server = place.serve(["--create", "12MiB", "v.img"]);
    for load in &mut loads {
        load.fill(&mut server.client(""));
    }
    let kills = if long() { 200 } else { 12 };
    let (mut begun, mut in_the_middle, mut answered) = (0, 0, 0);
    for kill in 0..kills {
        let wants_another = !is_under_way(&server, &place);
        let unit = if begun % 2 == 0 { "512" } else { "4096" };
        let throttle = if kill % 3 == 0 { "100MiB" } else { "40MiB" };
        // From before it begins to after it is done.
        let delay = Duration::from_micros(pattern::splitmix64(&mut random) % 350_000);
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
            let asked = wants_another.then(|| {
                let options = ["--detach", "--zone", "256KiB", "--throttle", throttle, "--data-unit", unit];
                reencrypt(&place, &options).spawn().unwrap()
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
        let info: Value = serde_json::from_str(&place.run_ok(["volume", "info", "--json", "v.img"])).unwrap();
        let done = info["reencrypt"]["done_bytes"].as_u64().unwrap_or(0);
        in_the_middle += u64::from(done > 0 && done < 3 * LEN);
        server = place.serve(["v.img"]);
        for load in &mut loads {
            load.check_all(&mut server.client(""));
        }
    }
    eprintln!(
        "{kills} kills: {begun} re-encryptions begun, {in_the_middle} cut in the middle, {answered} answers"
    );
    assert!(begun > 0 && in_the_middle > 0 && answered > 0, "the kills hit nothing");
    // The last server goes on by itself, and may be done at any moment.
    eventually("it is done", || !is_under_way(&server, &place));
    for load in &mut loads {
        load.check_all(&mut server.client(""));
    }
    server.stop();
    assert!(!place.path("v.img.reencrypt").exists());
    let mut server = place.serve(["v.img"]);
    for load in &mut loads {
        load.check_all(&mut server.client(""));
    }
    assert!(server.is_running());
    server.stop();
}

/// The command that does the work itself is killed again and again. Each time that it ends, each byte on the disk is what the
/// key and layout make of the plaintext: known by encrypting it directly.
#[test]
fn killed_offline_it_goes_on_and_ends_with_the_known_answer() {
    let mut random = seed();
    let place = Place::new();
    let plaintext = pattern::bytes(5, 0, 6 << 20);
    let layouts: [&[&str]; 2] = [
        &["--key", "raw:one.raw", "--mode", "aes-256-xts", "--iv-offset", "0"],
        &["--key", "raw:other.raw", "--mode", "adiantum", "--iv-offset", "64"],
    ];
    place.raw_key("one.raw", 64, 1);
    place.raw_key("other.raw", 32, 2);
    // Both, made directly.
    for (name, layout) in ["v.img", "w.img"].into_iter().zip(layouts) {
        place.run_ok(["volume", "create", "--size", "6MiB", name].iter().chain(layout));
        let server = place.serve([name]);
        let mut client = server.client("");
        for (at, piece) in (0..).step_by(1 << 20).zip(plaintext.chunks(1 << 20)) {
            client.write(at, piece).unwrap();
        }
        drop(client);
        server.stop();
    }
    let answers = ["v.img", "w.img"].map(|name| fs::read(place.path(name)).unwrap());
    let info =
        |name| -> Value { serde_json::from_str(&place.run_ok(["volume", "info", "--json", name])).unwrap() };
    let facts = ["v.img", "w.img"].map(info);
    let wanted = if long() { 200 } else { 15 };
    let (mut kills, mut completed, mut to) = (0, 0, 1);
    let mut is_under_way = false;
    while kills < wanted || completed == 0 {
        let mut command = place.command();
        command.args(["volume", "reencrypt", "--offline", "--throttle", "30MiB", "v.img"]);
        match is_under_way {
            false => command.args(["--zone", "256KiB"]).args(layouts[to]),
            true => command.arg("--resume"),
        };
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        thread::sleep(Duration::from_micros(pattern::splitmix64(&mut random) % 200_000));
        let _ = child.kill();
        kills += u64::from(child.wait().unwrap().code().is_none());
        let description = fs::read_to_string(place.path("v.img.toml")).unwrap();
        is_under_way = description.contains("reencrypt = ");
        let key = ["one.raw", "other.raw"][to];
        if !is_under_way && description.contains(key) {
            assert!(
                fs::read(place.path("v.img")).unwrap() == answers[to],
                "kill {kills}: not the known answer"
            );
            for fact in ["key_id", "mode", "data_unit_bytes", "block_bytes", "iv_offset_sectors", "reencrypt"]
            {
                assert_eq!(info("v.img")[fact], facts[to][fact], "{fact}");
            }
            completed += 1;
            to = 1 - to;
        }
    }
    eprintln!("{kills} kills, {completed} re-encryptions completed");
}

/// fio verifies what it writes while the key changes under it, more than once.
#[test]
fn fio_verifies_and_qemu_img_compares_during_reencryption() {
    let Some(program) = fio_program() else { return };
    let Some(qemu_img) = require_tool("qemu-img") else { return };
    let place = Place::new();
    let server = place.serve(["-v", "--create", "40MiB", "v.img"]);
    // fio has the first 24 MiB; the rest stays as it is.
    let content = pattern::bytes(9, 0, 16 << 20);
    let mut client = server.client("");
    for (at, piece) in (24 * MIB..).step_by(1 << 20).zip(content.chunks(1 << 20)) {
        client.write(at, piece).unwrap();
    }
    let rest = place.path("rest");
    fs::write(&rest, &content).unwrap();
    let compare = || {
        let part = place.path("part");
        let mut convert = Command::new(&qemu_img);
        convert.args(["dd", "-f", "raw", "-O", "raw", "bs=1M", "skip=24"]);
        run(convert.arg(format!("if={}", server.uri(""))).arg(format!("of={}", part.display())));
        let same =
            run(Command::new(&qemu_img).args(["compare", "-f", "raw", "-F", "raw"]).arg(&rest).arg(&part));
        assert!(same.contains("Images are identical."), "{same}");
        fs::remove_file(part).unwrap();
    };
    compare();
    let first = volume(&server, &place)["key_id"].clone();
    let over = Until::default();
    let mut rounds = 0;
    thread::scope(|scope| {
        let (place, server, over) = (&place, &server, &over);
        let program = &program;
        let verifying = scope.spawn(move || {
            let mut runs = 0;
            while !over.is_over() || runs == 0 {
                let said = run(&mut fio(program, place, &server.uri("v"), "512", &["--do_verify=1"]));
                assert!(said.matches("err= 0").count() == 1 && !said.contains("verify:"), "{said}");
                runs += 1;
            }
            runs
        });
        let guard = over.guard();
        for unit in ["512", "65536", "4096"] {
            let lines =
                run(&mut reencrypt(place, &["--data-unit", unit, "--throttle", "20MiB", "--progress-json"]));
            let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert!(lines.len() > 2, "{lines:?}");
            for pair in lines.windows(2) {
                let number = |line: &Value| line["device_bytes"].as_str().unwrap().parse::<u64>().unwrap();
                assert!(number(&pair[0]) <= number(&pair[1]));
            }
            assert_eq!(lines.last().unwrap()["device_bytes"], (40 * MIB).to_string());
            assert_eq!(lines.last().unwrap()["eta_ms"], "0");
            compare();
            rounds += 1;
        }
        drop(guard);
        eprintln!("{} runs of fio while {rounds} keys came", verifying.join().unwrap());
    });
    let now = volume(&server, &place);
    assert_ne!(now["key_id"], first);
    assert_eq!((&now["data_unit_bytes"], &now["counters"]["errors"]), (&4096.into(), &0.into()));
    // The keys that were left behind have left the engine, too.
    assert_eq!(server.status(&place)["servers"][0]["engines"][0]["keys_admitted"], 1);
    drop(client);
    server.stop();
}

/// Paused it stays where it is, and a signal to the command is none to the server.
#[test]
fn it_rests_when_told_and_the_command_may_go() {
    let place = Place::new();
    let server = place.serve(["--create", "16MiB", "v.img"]);
    server.client("").write(0, &vec![3; 16 << 20]).unwrap();
    let mut command = reencrypt(&place, &["--zone", "256KiB", "--throttle", "2MiB"]).spawn().unwrap();
    let done = || volume(&server, &place)["reencrypt"]["done_bytes"].as_u64().unwrap_or(0);
    eventually("it begins", || done() > 0);
    let pid = rustix::process::Pid::from_raw(command.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    assert!(!command.wait().unwrap().success());
    let at = done();
    eventually("the server goes on", || done() > at);
    run(&mut reencrypt(&place, &["--pause"]));
    eventually("it rests", || {
        let before = done();
        thread::sleep(Duration::from_millis(300));
        done() == before
    });
    assert_eq!(volume(&server, &place)["reencrypt"]["state"], "paused");
    assert_eq!(server.client("").read(0, 8 << 20).unwrap(), vec![3; 8 << 20]);
    let text = place.run_ok(["status", "--control", "control"]);
    assert!(text.contains("re-encryption paused"), "{text}");
    let again = run_to_fail(&mut reencrypt(&place, &[]));
    assert!(again.contains("being re-encrypted already") && again.contains("--resume"), "{again}");
    let refused = run_to_fail(place.command().args([
        "serve",
        "--take-over",
        "control",
        "--control",
        "control",
        "--nbd",
        "unix:nbd.sock",
        "v.img",
    ]));
    assert!(refused.contains("is being re-encrypted"), "{refused}");
    let begun = Instant::now();
    run(&mut reencrypt(&place, &["--resume", "--throttle", "0", "--progress-json"]));
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(server.client("").read(0, 16 << 20).unwrap(), vec![3; 16 << 20]);
    // Now another server may take over, by the new key.
    let mut client = server.client("");
    let server = upgrade(&place, server, &["v.img"]);
    assert_eq!(client.read(15 << 20, 1 << 20).unwrap(), vec![3; 1 << 20]);
    drop(client);
    server.stop();

    // The same without a server: a signal lets it rest, and the next serves it as it is.
    let mut command = place.command();
    command.args(["volume", "reencrypt", "--offline", "--zone", "256KiB", "--throttle", "4MiB", "v.img"]);
    let mut command = command.stderr(Stdio::null()).spawn().unwrap();
    let info =
        || -> Value { serde_json::from_str(&place.run_ok(["volume", "info", "--json", "v.img"])).unwrap() };
    eventually("it moves", || info()["reencrypt"]["done_bytes"].as_u64().unwrap_or(0) > 0);
    let pid = rustix::process::Pid::from_raw(command.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    assert_eq!(command.wait().unwrap().code(), Some(130), "as a shell says it");
    let checked = place.run_ok(["check", "v.img.toml"]);
    assert!(checked.contains("being re-encrypted"), "{checked}");
    let server = place.serve(["--pause-reencryption", "v.img"]);
    let at = done_of(&server, &place);
    assert_eq!(server.client("").read(0, 16 << 20).unwrap(), vec![3; 16 << 20]);
    assert_eq!(done_of(&server, &place), at);
    server.stop();
    let said = place.run(["volume", "reencrypt", "--resume", "--throttle", "0", "--remove-old-key", "v.img"]);
    assert_eq!(said.status.code(), Some(1), "{}", crate::rig::said(&said));
    place.run_ok(["volume", "reencrypt", "--resume", "--throttle", "0", "v.img"]);
    let server = place.serve(["v.img"]);
    assert_eq!(server.client("").read(0, 16 << 20).unwrap(), vec![3; 16 << 20]);
    server.stop();
}

fn done_of(server: &Server, place: &Place) -> u64 {
    volume(server, place)["reencrypt"]["done_bytes"].as_u64().unwrap_or(0)
}

/// Another root, and so another engine: half under each, one server has both.
#[test]
fn a_volume_between_two_roots_is_served_by_both() {
    let place = Place::new();
    place.run_ok(["volume", "create", "--size", "8MiB", "v.img"]);
    place.run_ok(["root", "create", "other.root"]);
    let server = place.serve(["v.img"]);
    server.client("").write(0, &vec![9; 8 << 20]).unwrap();
    let refused = run_to_fail(&mut reencrypt(&place, &["--new-root", "other.root"]));
    assert!(refused.contains("--offline"), "{refused}");
    server.stop();
    let mut command = place.command();
    command.args([
        "volume",
        "reencrypt",
        "--new-root",
        "other.root",
        "--throttle",
        "1MiB",
        "--zone",
        "256KiB",
        "v.img",
    ]);
    let mut command = command.spawn().unwrap();
    let info =
        || -> Value { serde_json::from_str(&place.run_ok(["volume", "info", "--json", "v.img"])).unwrap() };
    eventually("it moves", || info()["reencrypt"]["done_bytes"].as_u64().unwrap_or(0) > MIB);
    command.kill().unwrap();
    command.wait().unwrap();
    let server = place.serve(["--pause-reencryption", "v.img"]);
    assert_eq!(server.status(&place)["servers"][0]["engines"].as_array().unwrap().len(), 2);
    let mut client = server.client("");
    assert_eq!(client.read(0, 8 << 20).unwrap(), vec![9; 8 << 20]);
    client.write(MIB - 300, &vec![4; 4 << 20]).unwrap();
    run(&mut reencrypt(&place, &["--resume", "--throttle", "0", "--progress-json"]));
    let mut expected = vec![9; 8 << 20];
    expected[(1 << 20) - 300..(5 << 20) - 300].fill(4);
    assert!(client.read(0, 8 << 20).unwrap() == expected);
    client.write(5 * MIB, &[1; 512]).unwrap();
    drop(client);
    server.stop();
    let server = place.serve(["v.img"]);
    let status = server.status(&place);
    assert_eq!(status["servers"][0]["engines"].as_array().unwrap().len(), 1);
    expected[5 << 20..(5 << 20) + 512].fill(1);
    assert!(server.client("").read(0, 8 << 20).unwrap() == expected);
    server.stop();
    let text = said(&place.run(["volume", "info", "v.img"]));
    assert!(!text.contains("re-encryption"), "{text}");
}
