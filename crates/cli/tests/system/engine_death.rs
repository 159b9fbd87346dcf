//! `kill -9` of the engine process: clients see a pause, and nothing else.

use crate::clients::fio_program;
use crate::isolation::{engine, engine_pid, serve_command};
use crate::load::{Habits, Load, Until};
use crate::rig::{MIB, PATIENCE, Place, Server, run, seed};
use inlinecrypt_testkit::nbd::NbdError;
use inlinecrypt_testkit::pattern;
use rustix::process::{Pid, Signal, kill_process};
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const EIO: u32 = 5;

/// How often the engine process is killed. More often where nobody waits for it.
fn kills() -> usize {
    let long = std::env::var_os("CI").is_some_and(|value| value == "true")
        || std::env::var_os("INLINECRYPT_SOAK_SECONDS").is_some();
    if long { 200 } else { 20 }
}

/// Kills the engine process, and waits for the next one. How long requests had to wait for it, in microseconds.
fn kill_engine(server: &Server, place: &Place) -> u64 {
    let before = engine(server, place);
    let pid = before["process"]["pid"].as_u64().expect("it is running");
    let restarts = |engine: &serde_json::Value| engine["process"]["restarts"].as_u64().unwrap();
    kill(pid);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let after = engine(server, place);
        let process = &after["process"];
        assert!(process["stopped"].is_null(), "{process}");
        let pause_us = process["last_pause_us"].as_u64().unwrap();
        if restarts(&after) == restarts(&before) + 1
            && process["pid"].is_u64()
            && server.log().matches("pause_ms").count() as u64 > restarts(&before)
        {
            return pause_us;
        }
        assert!(Instant::now() < deadline, "no new engine process: {process}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn kill(pid: u64) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
}

fn tell(mut pauses: Vec<u64>) {
    pauses.sort_unstable();
    eprintln!(
        "{} kills; pauses: median {} us, longest {} us (goal: under 100000)",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
}

/// `count` volumes with wrapped keys, and fewer keyslots.
fn serve_wrapped(place: &Place, count: usize, len: u64, slots: u32) -> Server {
    let mut config = format!(
        "[[engine]]\nname = \"e\"\nspec = \"software:slots={slots}\"\nroot = \"root\"\ndeaths_max = 1000\n"
    );
    for index in 0..count {
        let key = format!("{index}.key");
        place.run_ok(["key", "generate", "--root", "root", "--out", &key]);
        place.sparse(&format!("{index}.img"), len);
        let _ = writeln!(config, "[[volume]]\nname = \"v{index}\"\npath = \"{index}.img\"\nkey = \"{key}\"");
    }
    place.serve_config(&config)
}

fn errors(server: &Server, place: &Place) -> u64 {
    let status = server.status(place);
    let volumes = status["servers"][0]["volumes"].as_array().unwrap();
    assert!(volumes.iter().all(|volume| volume["state"] == "ok"), "{status}");
    volumes.iter().map(|volume| volume["counters"]["errors"].as_u64().unwrap()).sum()
}

/// fio writes to fifty volumes at once and compares what it reads, again and again, while the engine process is killed.
#[test]
fn fio_verifies_fifty_volumes_while_the_engine_process_is_killed() {
    const COUNT: usize = 50;
    let Some(program) = fio_program() else { return };
    let mut random = seed();
    let place = Place::new();
    let server = serve_wrapped(&place, COUNT, MIB, 32);
    let mut jobs =
        "[global]\nioengine=nbd\nrw=randwrite\niodepth=4\nsize=1m\nbsrange=512-64k\nverify=crc32c\n\
                    verify_fatal=1\ndo_verify=1\nverify_state_save=0\ngroup_reporting\nthread\n"
            .to_owned();
    for index in 0..COUNT {
        let _ = writeln!(jobs, "[v{index}]\nuri={}", server.uri(&format!("v{index}")));
    }
    fs::write(place.path("jobs"), jobs).unwrap();
    let over = Until::default();
    let pauses = thread::scope(|scope| {
        let verifying = scope.spawn(|| {
            let mut runs = 0;
            while !over.is_over() || runs == 0 {
                let mut fio = Command::new(&program);
                let said = run(fio.current_dir(place.path("run")).arg(place.path("jobs")));
                assert!(said.matches("err= 0").count() == 1 && !said.contains("verify:"), "{said}");
                runs += 1;
            }
            runs
        });
        let guard = over.guard();
        let mut pauses = Vec::new();
        while pauses.len() < kills() && !verifying.is_finished() {
            thread::sleep(Duration::from_micros(pattern::splitmix64(&mut random) % 50_000));
            pauses.push(kill_engine(&server, &place));
        }
        drop(guard);
        let runs = verifying.join().expect("fio finds what it wrote");
        eprintln!("fio verified 50 volumes {runs} times");
        pauses
    });
    assert_eq!(errors(&server, &place), 0);
    assert_eq!(engine(&server, &place)["process"]["restarts"], pauses.len());
    tell(pauses);
    server.stop();
}

/// The same with a client that knows what every byte must be, and that trims, zeroes and flushes.
#[test]
fn every_byte_is_right_while_the_engine_process_is_killed() {
    verify_while_killing(3);
}

/// Each process knows the keys by handles of its own.
#[test]
fn every_byte_is_right_while_an_engine_process_without_keyslots_is_killed() {
    verify_while_killing(0);
}

fn verify_while_killing(slots: u32) {
    const COUNT: usize = 8;
    let mut random = seed();
    let place = Place::new();
    let server = serve_wrapped(&place, COUNT, MIB, slots);
    let over = Until::default();
    let (pauses, answered) = thread::scope(|scope| {
        let clients: Vec<_> = (0..COUNT)
            .map(|index| {
                let (server, over, seed) = (&server, &over, random ^ index as u64);
                scope.spawn(move || {
                    let mut client = server.client(&format!("v{index}"));
                    let habits = Habits { len_max: 128 << 10, depth: 1, ..Habits::MIXED };
                    let mut load = Load::new(seed, 0, MIB, habits);
                    load.fill(&mut client);
                    load.run(&mut client, || over.is_over()).unwrap();
                    load.check_all(&mut client);
                    load.answered
                })
            })
            .collect();
        let guard = over.guard();
        let mut pauses = Vec::new();
        while pauses.len() < kills() && !clients.iter().any(|client| client.is_finished()) {
            thread::sleep(Duration::from_micros(pattern::splitmix64(&mut random) % 50_000));
            pauses.push(kill_engine(&server, &place));
        }
        drop(guard);
        let answered: u64 = clients.into_iter().map(|client| client.join().expect("all is right")).sum();
        (pauses, answered)
    });
    eprintln!("{answered} requests");
    assert_eq!((errors(&server, &place), pauses.len()), (0, kills()));
    tell(pauses);
    server.stop();
}

#[track_caller]
fn fails_with_eio<T: std::fmt::Debug>(done: Result<T, NbdError>) {
    match done {
        Err(error) if error.errno() == Some(EIO) => {}
        other => panic!("{other:?}"),
    }
}

/// What keeps dying is not started for ever.
#[test]
fn three_deaths_within_a_minute_are_enough() {
    let place = Place::new();
    let server = place.serve(["--create", "1MiB", "v.img"]);
    let mut client = server.client("v");
    client.write(0, &[5; 4096]).unwrap();
    for _ in 0..2 {
        kill_engine(&server, &place);
        assert!(client.read(0, 4096).unwrap() == [5; 4096]);
    }
    kill(engine_pid(&server, &place).unwrap().into());
    fails_with_eio(client.read(0, 4096));
    fails_with_eio(client.write(0, &[6; 4096]));
    let status = server.status(&place);
    let process = &status["servers"][0]["engines"][0]["process"];
    let why = process["stopped"].as_str().unwrap();
    assert!(why.contains("3 times within a minute") && why.contains("restart the server"), "{why}");
    assert!(process["pid"].is_null(), "{process}");
    let volume = &status["servers"][0]["volumes"][0];
    assert_eq!((&volume["state"], volume["reason"].as_str()), (&"no_key".into(), Some(why)));
    let shown = place.run_ok(["status", "--control", place.path("control").to_str().unwrap()]);
    assert!(shown.contains("STOPPED: ") && shown.contains("no_key: "), "{shown}");
    drop(client);
    server.stop();
    // Nothing of what had been written is lost.
    let server = place.serve(["v.img"]);
    assert!(server.client("v").read(0, 4096).unwrap() == [5; 4096]);
    server.stop();
}

/// How many deaths are too many can be said.
#[test]
fn one_death_is_enough_if_the_config_says_so() {
    let place = Place::new();
    place.raw_key("v.raw", 64, 1);
    place.sparse("v.img", MIB);
    let volume = "[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\n";
    let server = place.serve_config(&format!("[[engine]]\nname = \"e\"\ndeaths_max = 1\n{volume}"));
    kill(engine_pid(&server, &place).unwrap().into());
    fails_with_eio(server.client("v").read(0, 4096));
    assert!(engine(&server, &place)["process"]["stopped"].is_string());
    server.stop();
    let config = place.write_config(&format!("[[engine]]\nname = \"e\"\ndeaths_max = 0\n{volume}"));
    let refused = place.run(["check".as_ref(), config.as_os_str()]);
    assert!(
        !refused.status.success() && crate::rig::said(&refused).contains("deaths_max = 0"),
        "{refused:?}"
    );
}

#[test]
fn a_raw_key_comes_back_from_its_file_and_not_from_standard_input() {
    let place = Place::new();
    place.raw_key("v.raw", 64, 1);
    place.sparse("v.img", MIB);
    let serve = |key: &str| {
        let mut command = serve_command(&place, &["--key", key, "v.img"]);
        command.stdin(fs::File::open(place.path("v.raw")).unwrap());
        place.start(command)
    };
    let state = |server: &Server| {
        let volume = server.status(&place)["servers"][0]["volumes"][0].clone();
        (
            volume["state"].as_str().unwrap().to_owned(),
            volume["reason"].as_str().unwrap_or_default().to_owned(),
        )
    };

    let server = serve("raw:v.raw");
    let mut client = server.client("v");
    client.write(0, &[8; 65536]).unwrap();
    kill_engine(&server, &place);
    assert!(client.read(0, 65536).unwrap() == [8; 65536]);
    assert_eq!(state(&server), ("ok".to_owned(), String::new()));
    // The file is gone, and so is the key with the next death; until it is there again.
    fs::rename(place.path("v.raw"), place.path("away")).unwrap();
    kill_engine(&server, &place);
    fails_with_eio(client.read(0, 4096));
    let (state_now, reason) = state(&server);
    assert!(state_now == "no_key" && reason.contains("v.raw"), "{state_now}: {reason}");
    fs::rename(place.path("away"), place.path("v.raw")).unwrap();
    assert!(client.read(0, 65536).unwrap() == [8; 65536]);
    assert_eq!(state(&server).0, "ok");
    drop(client);
    server.stop();

    // Another key in the file is not this volume's: nothing is read or written with it.
    let server = serve("raw:v.raw");
    let mut client = server.client("v");
    fs::rename(place.path("v.raw"), place.path("away")).unwrap();
    place.raw_key("v.raw", 64, 2);
    kill_engine(&server, &place);
    fails_with_eio(client.read(0, 4096));
    fails_with_eio(client.write(0, &[9; 4096]));
    let (state_now, reason) = state(&server);
    assert!(state_now == "no_key" && reason.contains("another key"), "{state_now}: {reason}");
    fs::rename(place.path("away"), place.path("v.raw")).unwrap();
    assert!(client.read(0, 65536).unwrap() == [8; 65536]);
    drop(client);
    server.stop();

    let server = serve("raw:-");
    let mut client = server.client("v");
    assert!(client.read(0, 65536).unwrap() == [8; 65536]);
    assert_eq!(state(&server).0, "ok");
    kill_engine(&server, &place);
    fails_with_eio(client.read(0, 4096));
    fails_with_eio(client.write(0, &[9; 4096]));
    let (state_now, reason) = state(&server);
    assert!(
        state_now == "no_key" && reason.contains("cannot be had again without asking"),
        "{state_now}: {reason}"
    );
    drop(client);
    server.stop();
}

#[test]
fn a_root_that_is_away_for_a_moment_is_waited_for_and_another_one_is_told() {
    let place = Place::new();
    let server = place.start(serve_command(&place, &["--create", "1MiB", "v.img"]));
    let mut client = server.client("v");
    client.write(0, &[8; 65536]).unwrap();
    let (root, away) = (place.path("home/root.key"), place.path("away"));
    fs::rename(&root, &away).unwrap();
    kill(engine_pid(&server, &place).unwrap().into());
    thread::sleep(Duration::from_millis(300));
    fs::rename(&away, &root).unwrap();
    assert!(client.read(0, 65536).unwrap() == [8; 65536]);

    fs::rename(&root, &away).unwrap();
    assert!(place.run(["root", "create", "home/root.key"]).status.success());
    kill(engine_pid(&server, &place).unwrap().into());
    // Not for ever: an error, and the reason in the status.
    fails_with_eio(client.read(0, 4096));
    let stopped = engine(&server, &place)["process"]["stopped"].as_str().unwrap_or_default().to_owned();
    assert!(stopped.contains("came back as another one"), "{stopped}");
    drop(client);
    server.stop();
}

/// Child processes of a process.
fn children(pid: u32) -> Vec<u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of =
        |thread: std::io::Result<fs::DirEntry>| fs::read_to_string(thread.ok()?.path().join("children")).ok();
    let all: String = threads.filter_map(of).collect();
    all.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

#[test]
fn an_engine_process_that_is_killed_while_it_starts_is_started_again() {
    let place = Place::new();
    place.raw_key("v.raw", 64, 1);
    place.sparse("v.img", MIB);
    let server = place.serve_config(
        "[[engine]]\nname = \"e\"\ndeaths_max = 1000\n[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\n",
    );
    let mut client = server.client("v");
    client.write(0, &[8; 65536]).unwrap();
    let mut killed = engine_pid(&server, &place).unwrap().into();
    kill(killed);
    // Whatever it is doing then: its first instruction, or its last message.
    for delay_ms in [0, 0, 1, 2, 3, 5, 8, 12] {
        let deadline = Instant::now() + PATIENCE;
        let next = loop {
            if let Some(next) = children(server.process.pid()).into_iter().find(|child| *child != killed) {
                break next;
            }
            assert!(Instant::now() < deadline, "no other is started");
            thread::sleep(Duration::from_micros(200));
        };
        thread::sleep(Duration::from_millis(delay_ms));
        kill(next);
        killed = next;
    }
    assert!(client.read(0, 65536).unwrap() == [8; 65536]);
    drop(client);
    server.stop();
}
