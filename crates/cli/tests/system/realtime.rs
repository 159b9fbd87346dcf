//! Engines whose lanes work at real-time priority: who has it, who is refused, and what ends a lane that does not stop.

use crate::clients::fio_program;
use crate::engine_service::service_with;
use crate::isolation::{busy, engine, engine_pid, serve_command};
use crate::rig::{MIB, PATIENCE, Place, Server, eventually, said};
use crate::upgrade::upgrade;
use inlinecrypt_cipher::{Dun, Mode};
use inlinecrypt_core::config::{DataUnitSize, Hardware};
use inlinecrypt_core::engine::{Direction, Engine as _, KeyRef, Piece, SlotIndex};
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_engine::isolated::{self, LanePriority, Options, PROCESS_VERB, ProcessLauncher, realtime};
use inlinecrypt_testkit::{ServerProcess, require_tool};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Whether an engine may work at real-time priority here; says so if not. Where the privilege is missing nobody can ask for
/// more, so this never fails.
fn may_be_realtime() -> bool {
    let may = realtime::check_permitted();
    if let Err(why) = &may {
        eprintln!("SKIPPED: real-time priority: {why}");
    }
    may.is_ok()
}

/// Number, and policy and real-time priority, of each thread of a process, as anybody can see them (`proc(5)`).
fn schedules(pid: u32) -> Vec<(u32, (u32, u32))> {
    let of_thread = |thread: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).unwrap();
        // The name, which ends with the last bracket, is the second field of all.
        let behind = stat.rsplit_once(')').unwrap().1;
        let field = |number: usize| behind.split_ascii_whitespace().nth(number - 3).unwrap().parse().unwrap();
        (thread, (field(41), field(40)))
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.map(|entry| of_thread(entry.unwrap().file_name().to_str().unwrap().parse().unwrap())).collect()
}

const USUAL: (u32, u32) = (0, 0);
const ROUND_ROBIN: (u32, u32) = (2, 1);

/// All lanes have it, and neither the first thread, which only waits, nor the control thread.
#[track_caller]
fn lanes_are_realtime(pid: u32) {
    let all = schedules(pid);
    let (usual, lanes): (Vec<_>, Vec<_>) = all.iter().partition(|(_, schedule)| *schedule == USUAL);
    assert_eq!(usual.len(), 2, "{all:?}");
    assert!(usual.iter().any(|(thread, _)| *thread == pid), "{all:?}");
    assert!(lanes.len() >= 4 && lanes.iter().all(|(_, schedule)| *schedule == ROUND_ROBIN), "{all:?}");
}

fn step_5(server: &Server, place: &Place) -> Option<String> {
    let engine = engine(server, place);
    let steps = engine["process"]["sandbox"].as_array().unwrap();
    steps.iter().map(|step| step.as_str().unwrap()).find(|step| step.starts_with("5 ")).map(str::to_owned)
}

#[test]
fn lanes_are_at_real_time_priority_under_load_and_after_a_kill() {
    let Some(program) = fio_program() else { return };
    if !may_be_realtime() {
        return;
    }
    let place = Place::new();
    let server = place.serve(["--engine-realtime", "--create", "24MiB", "v.img"]);
    let load = busy(&program, &place, &server);
    let first = engine_pid(&server, &place).unwrap();
    lanes_are_realtime(first);
    let host = schedules(server.process.pid());
    assert!(host.iter().all(|(_, (_, priority))| *priority == 0), "the host has none: {host:?}");
    assert!(step_5(&server, &place).unwrap().contains("real-time priority"));

    kill_process(Pid::from_raw(first.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    eventually("there is another engine process", || {
        engine_pid(&server, &place).is_some_and(|pid| pid != first)
    });
    lanes_are_realtime(engine_pid(&server, &place).unwrap());
    drop(load);
    let status = server.status(&place);
    assert_eq!(status["servers"][0]["volumes"][0]["counters"]["errors"], 0, "{status}");
    server.stop();
}

#[test]
fn nobody_has_it_who_has_not_asked_and_a_server_that_takes_over_has_what_it_asked_for() {
    let place = Place::new();
    let server = place.serve(["--create", "1MiB", "v.img"]);
    let all = schedules(engine_pid(&server, &place).unwrap());
    assert!(all.iter().all(|(_, (_, priority))| *priority == 0), "{all:?}");
    assert_eq!(step_5(&server, &place), None);
    if !may_be_realtime() {
        return;
    }
    let server = upgrade(&place, server, &["--engine-realtime", "v.img"]);
    lanes_are_realtime(engine_pid(&server, &place).unwrap());
    server.stop();
    let server =
        place.serve_config("[[engine]]\nname = \"e\"\nrealtime = true\n[[volume]]\npath = \"v.img\"\n");
    lanes_are_realtime(engine_pid(&server, &place).unwrap());
    server.stop();
}

#[test]
fn an_engine_service_lets_all_engines_have_it_or_those_whose_servers_ask() {
    if !may_be_realtime() {
        return;
    }
    for (of_service, of_server) in [(true, false), (false, true), (false, false)] {
        let (home, place) = (Place::new(), Place::new());
        let service = service_with(&home, if of_service { &["--realtime"] } else { &[] });
        let at = format!("unix:{}", home.path("engine.sock").display());
        let mut arguments = vec!["--engine-process", &at, "--create", "1MiB", "v.img"];
        arguments.extend(of_server.then_some("--engine-realtime"));
        let server = place.serve(arguments);
        let pid = engine_pid(&server, &place).unwrap();
        match of_service || of_server {
            true => lanes_are_realtime(pid),
            false => assert!(schedules(pid).iter().all(|(_, schedule)| *schedule == USUAL)),
        }
        server.stop();
        drop(service);
    }
}

/// What runs a program of ours without the right to real-time priority, in front of the program. `None`, after a line that says
/// why, where the right cannot be given up.
fn without_the_right() -> Option<Vec<String>> {
    let chrt = require_tool("chrt")?;
    let prefix = if rustix::process::geteuid().is_root() {
        let setpriv = require_tool("setpriv")?.display().to_string();
        let prlimit = require_tool("prlimit")?.display().to_string();
        // Root would have it again by executing a program.
        vec![
            prlimit,
            "--rtprio=0".into(),
            setpriv,
            "--bounding-set=-sys_nice".into(),
            "--inh-caps=-sys_nice".into(),
        ]
    } else {
        let prlimit = require_tool("prlimit")?.display().to_string();
        vec![prlimit, "--rtprio=0".into()]
    };
    let run = |program: &[&OsStr]| {
        Command::new(&prefix[0]).args(&prefix[1..]).args(program).stdin(Stdio::null()).output().unwrap()
    };
    let tried = run(&["true".as_ref()]);
    if !tried.status.success() {
        eprintln!("SKIPPED: the right to real-time priority cannot be given up here: {}", said(&tried));
        return None;
    }
    // A user whose capabilities are ambient keeps them.
    if run(&[chrt.as_ref(), "--rr".as_ref(), "1".as_ref(), "true".as_ref()]).status.success() {
        eprintln!("SKIPPED: the right to real-time priority stays, whatever is given up");
        return None;
    }
    Some(prefix)
}

/// The exit code of a command that is to be refused, and what it says. One that serves instead has no code.
fn refusal(place: &Place, command: &mut Command) -> (Option<i32>, String) {
    let said = place.path("said");
    command.stdout(Stdio::null()).stderr(File::create(&said).unwrap());
    let ended = ServerProcess::start(command).unwrap().wait(PATIENCE);
    (ended.ok().and_then(|status| status.code()), fs::read_to_string(said).unwrap())
}

#[test]
fn who_may_not_have_it_is_refused_before_anything_is_made_or_served() {
    let Some(without) = without_the_right() else { return };
    let place = Place::new();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&without[0]);
        place.prepare(&mut command);
        command.args(&without[1..]).arg(env!("CARGO_BIN_EXE_inlinecrypt")).args(arguments);
        command
    };
    place.run_ok(["key", "generate", "--root", "root", "--out", "v.img.key"]);
    place.sparse("v.img", MIB);
    let config = place.write_config(
        "[[engine]]\nname = \"e\"\nroot = \"root\"\nrealtime = true\n[[volume]]\npath = \"v.img\"\n",
    );
    let config = config.to_str().unwrap();
    let serve = ["serve", "--engine-realtime", "--root", "root", "--control", "none"];
    for arguments in [
        &[&serve[..], &["v.img"]].concat()[..],
        &[&serve[..], &["--create", "1MiB", "w.img"]].concat(),
        &["serve", "--config", config],
        &["engine", "serve", "--listen", "unix:engine.sock", "--realtime"],
    ] {
        let (code, text) = refusal(&place, &mut run(arguments));
        assert_eq!(code, Some(2), "{arguments:?}: {text}");
        for words in [
            "may not work at real-time priority",
            "CAP_SYS_NICE",
            "RLIMIT_RTPRIO",
            "LimitRTPRIO=1",
            "ulimit -r 1",
        ] {
            assert!(text.contains(words), "{arguments:?}: {words}: {text}");
        }
        for name in ["w.img", "w.img.key", "w.img.toml", "v.img.sock", "nbd.sock", "engine.sock"] {
            assert!(!place.path(name).exists(), "{arguments:?}: {name} was made");
        }
    }

    // Whoever checks need not be who serves.
    let checked = run(&["check", config]).output().unwrap();
    let (text, notes) = (said(&checked), String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success(), "{text}");
    assert!(notes.starts_with("note: if you start the server it is refused"), "{text}");
    assert!(
        notes.contains("may not work at real-time priority") && notes.contains("LimitRTPRIO=1"),
        "{text}"
    );

    // The process itself says so, too, where the host cannot know.
    let home = Place::new();
    let at = format!("unix:{}", home.path("engine.sock").display());
    let mut service = run(&["engine", "serve", "--listen", &at]);
    let _service = crate::engine_service::start(&home, &mut service);
    let (code, text) = refusal(&place, place.command().args(serve).args(["--engine-process", &at, "v.img"]));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("may not work at real-time priority") && text.contains("LimitRTPRIO=1"), "{text}");
    assert!(!place.path("v.img.sock").exists());
}

/// Before anything is made, with one message: by whom it is started, and not the engine.
#[test]
fn a_server_that_has_a_real_time_priority_itself_is_refused() {
    let Some(chrt) = require_tool("chrt") else { return };
    if !may_be_realtime() {
        return;
    }
    let place = Place::new();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&chrt);
        place.prepare(&mut command);
        command.args(["--fifo", "50", env!("CARGO_BIN_EXE_inlinecrypt")]).args(arguments);
        command
    };
    let serve = ["serve", "--engine-realtime", "--control", "none", "--create", "1MiB", "v.img"];
    for arguments in [&serve[..], &["engine", "serve", "--listen", "unix:engine.sock", "--realtime"]] {
        let (code, text) = refusal(&place, &mut run(arguments));
        assert_eq!(code, Some(2), "{arguments:?}: {text}");
        assert!(
            text.contains("has one already") && text.contains("Start it at the usual priority"),
            "{text}"
        );
        assert!(!text.contains("as soon as it was started"), "{text}");
        assert!(!place.path("v.img").exists() && !place.path("engine.sock").exists());
    }
    // Without the option nothing is asked of it, and its engine works at its priority.
    let mut command = run(&[]);
    command.args(serve_command(&place, &["--create", "1MiB", "v.img"]).get_args());
    let server = place.start(command);
    let all = schedules(engine_pid(&server, &place).unwrap());
    assert!(all.iter().all(|(_, schedule)| *schedule == (1, 50)), "{all:?}");
    server.stop();
}

/// No capability, but the limit that a unit or a shell gives.
#[test]
fn the_limit_alone_is_enough() {
    let (Some(setpriv), Some(prlimit)) = (require_tool("setpriv"), require_tool("prlimit")) else { return };
    let place = Place::new();
    let limited = || {
        let mut command = Command::new(&prlimit);
        place.prepare(&mut command);
        command.arg("--rtprio=1").arg(&setpriv).args(["--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]);
        command
    };
    let tried = limited().arg("true").output().unwrap();
    if !tried.status.success() {
        // Where the privilege is missing nobody can ask for more.
        eprintln!("SKIPPED: the limit cannot be raised here: {}", said(&tried));
        return;
    }
    let mut command = limited();
    command.arg(env!("CARGO_BIN_EXE_inlinecrypt"));
    let usual = serve_command(&place, &["--engine-realtime", "--create", "1MiB", "v.img"]);
    command.args(usual.get_args());
    let server = place.start(command);
    lanes_are_realtime(engine_pid(&server, &place).unwrap());
    server.stop();
}

/// One order that takes longer than `RLIMIT_RTTIME` allows: at real-time priority the system ends the process in the midst of it,
/// and another one is started; without, it is done. The limit is lowered, and the order is so long that the fastest CPU needs
/// several times as much; the one after it is so short that the slowest one does not.
#[test]
fn a_lane_that_computes_without_end_is_ended_if_it_is_at_real_time_priority() {
    const LEN: usize = 256 << 20;
    const SHORT: usize = 1 << 20;
    // 16 GiB: a third of a second at 50 GB/s. A slow CPU needs a minute, and is stopped long before.
    const PIECES: usize = 64;
    const LIMIT: Duration = Duration::from_millis(100);
    let Some(prlimit) = require_tool("prlimit") else { return };
    if !may_be_realtime() {
        return;
    }
    let limit = format!("--rttime={}:{}", LIMIT.as_micros(), 2 * LIMIT.as_micros());
    let launcher = Arc::new(ProcessLauncher {
        program: prlimit,
        arguments: [&limit, env!("CARGO_BIN_EXE_inlinecrypt"), PROCESS_VERB].map(Into::into).into(),
    });
    let unit = DataUnitSize::from_bytes(4096).unwrap();
    let raw: Vec<u8> = (0..64).collect();
    let key = Key::new(Mode::Aes256Xts, unit, 8, KeyForm::Raw(RawKey::new(&raw)), Hardware::Allowed).unwrap();
    for priority in [LanePriority::Usual, LanePriority::Realtime] {
        let options = Options { priority, order_bytes_max: usize::MAX, ..Options::new("software") };
        let engine = isolated::start(launcher.clone(), None, options).unwrap().engine;
        let restarts = || engine.process().unwrap().restarts;
        let mut memory = engine.memory().allocate(LEN).unwrap();
        let mut decrypt = |len, count| {
            engine.program(SlotIndex(0), &key).unwrap();
            // The same bytes again and again: nobody looks at them.
            let mut pieces = vec![Piece { first: Dun::from_limbs([0; 4]), range: 0..len }; count];
            engine.crypt(KeyRef::Slot(SlotIndex(0)), Direction::Decrypt, &mut *memory, &mut pieces)
        };
        match priority {
            LanePriority::Usual => {
                let began = Instant::now();
                decrypt(LEN, 1).unwrap();
                // As many as take four times the limit: a slow CPU would need a minute for all.
                let enough = (4 * LIMIT).as_nanos().div_ceil(began.elapsed().as_nanos());
                decrypt(LEN, usize::try_from(enough).unwrap().clamp(1, PIECES)).unwrap();
                assert_eq!(restarts(), 0);
            }
            LanePriority::Realtime => {
                assert_eq!(decrypt(LEN, PIECES).unwrap_err().kind(), ErrorKind::Interrupted);
                eventually("another was started", || restarts() == 1);
                // Which does what takes less.
                decrypt(SHORT, 1).unwrap();
                assert_eq!(restarts(), 1);
            }
        }
    }
}
