use crate::place::{PATIENCE, Place};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// As little as there can be: what is tested is not how fast it is.
const SHORT: [&str; 4] = ["--size", "16MiB", "--time", "0.03"];

fn figure<'v>(path: &'v Value, place: &str, what: &str, way: &str, depth: u64) -> &'v Value {
    let is = |figure: &&Value| {
        figure["place"] == place && figure["what"] == what && figure["way"] == way && figure["depth"] == depth
    };
    path["figures"]
        .as_array()
        .unwrap()
        .iter()
        .find(is)
        .unwrap_or_else(|| panic!("{place} {what} {way} {depth}"))
}

#[test]
fn the_path_has_figures_of_every_kind_and_its_limits_beside_them() {
    let place = Place::new();
    fs::create_dir(place.path("there")).unwrap();
    let report =
        place.run([&["bench", "path", "--json", "--stages", "--file", "there"], &SHORT[..]].concat()).json();
    let path = &report["path"];
    assert_eq!((&path["size_bytes"], &path["directory"]), (&(16 << 20).into(), &"there".into()));
    for way in ["read", "write"] {
        for (depth, bytes) in [(16, 1 << 20), (1, 4096), (32, 4096)] {
            for (at, whats) in [
                ("limit", &["copy", "cipher", "echo", "file", "no_disk"][..]),
                ("memory", &["plain", "in_process", "isolated"]),
                ("file", &["plain", "no_cipher", "in_process", "isolated"]),
            ] {
                for what in whats {
                    let figure = figure(path, at, what, way, depth);
                    assert_eq!(figure["bytes"], bytes);
                    let (per_s, mb) =
                        (figure["requests_per_s"].as_f64().unwrap(), figure["mb_per_s"].as_f64().unwrap());
                    assert!(per_s > 0.0 && (mb / per_s - f64::from(bytes) / 1e6).abs() < 1e-6, "{figure}");
                    assert_eq!(
                        figure["of_plain"].is_null(),
                        !["in_process", "isolated"].contains(what),
                        "{figure}"
                    );
                    let has_server = at != "limit" || ["echo", "no_disk"].contains(what);
                    assert!(has_server || figure["server_cpu_us"].is_null(), "{figure}");
                    if ["plain", "in_process"].contains(what) {
                        assert!(figure["server_cpu_us"].as_f64().unwrap() > 0.0, "{figure}");
                    }
                }
            }
        }
    }
    // What was not asked for was not measured.
    assert_eq!((&report["cipher"], &report["engines"]), (&serde_json::json!([]), &serde_json::json!([])));
    assert_eq!(fs::read_dir(place.path("there")).unwrap().count(), 0, "the file has gone");
    assert!(!place.path("home").exists(), "no root was made");
}

#[test]
fn people_get_tables() {
    let place = Place::new();
    let said = place.run([&["bench", "path", "--stages"], &SHORT[..]].concat());
    for text in [
        "limits, one thread",
        "the same bytes over a socket pair",
        "in memory",
        "in a file",
        "encrypted, engine in its own",
        " %)",
        "+ data units and keyslot",
        "+ the cipher",
        "+ hand-over to the engine process",
    ] {
        assert!(said.done().out.contains(text), "{text}: {said}");
    }
    let said = place.run([&["bench", "path"], &SHORT[..]].concat());
    assert!(!said.done().out.contains("stages") && !said.out.contains("us an order"), "{said}");
}

#[test]
fn an_engine_on_the_way_to_the_disk_is_measured_too() {
    let place = Place::new();
    let report =
        place.run([&["bench", "path", "--json", "--engine", "ice:next"], &SHORT[..]].concat()).json();
    assert!(
        report["path"]["engine"].as_str().unwrap().starts_with("ice:next"),
        "{}",
        report["path"]["engine"]
    );
}

#[test]
fn what_cannot_be_measured_says_why_and_nothing_is_left() {
    let place = Place::new();
    place.write("precious", b"data");
    let bench = |more: &[&str]| place.run([&["bench"], more].concat());
    bench(&["path", "--file", "precious"]).refused(5, &["precious exists already", "left alone"]);
    assert_eq!(fs::read(place.path("precious")).unwrap(), b"data");
    bench(&["path", "--file", "no/where"]).refused(4, &["no is not a directory"]);
    bench(&["path", "--file", ".", "--size", "16TiB"]).refused(4, &["has room for", "--size"]);
    bench(&["cipher", "--stages"]).refused(1, &["--stages is for the path"]);
    bench(&["engine", "cipher", "--file", "."]).refused(1, &["--file is for the path"]);
    let mut command = place.command();
    command.args(["bench", "path"]).env("TMPDIR", place.path("gone"));
    crate::place::run_command(command).refused(4, &["cannot make a file in", "gone"]);
    for (wrong, saying) in [
        (&["path", "--size", "1MiB"][..], "from 16 MiB"),
        (&["path", "--size", "17000001"], "multiple of 1 MiB"),
        (&["path", "--time", "0"], "0.01 to 60"),
        (&["path", "--time", "nan"], "0.01 to 60"),
        (&["speed"], "cipher, engine, path"),
    ] {
        let said = bench(wrong);
        assert!(said.code == Some(1) && said.err.contains(saying), "{saying}: {said}");
    }
    let mut left: Vec<_> =
        fs::read_dir(place.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["precious", "run"]);
}

#[test]
fn a_measurement_that_is_interrupted_leaves_no_file() {
    let place = Place::new();
    fs::create_dir(place.path("there")).unwrap();
    for signal in [Signal::INT, Signal::KILL] {
        let mut command = place.command();
        command.args(["bench", "path", "--file", "there", "--size", "16MiB", "--time", "60"]);
        let mut process =
            inlinecrypt_testkit::ServerProcess::start(command.stdout(Stdio::null()).stderr(Stdio::null()))
                .unwrap();
        let descriptors = format!("/proc/{}/fd", process.pid());
        let there = fs::canonicalize(place.path("there")).unwrap();
        let has_file = || {
            fs::read_dir(&descriptors).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|entry| fs::read_link(entry.path()).is_ok_and(|path| path.starts_with(&there)))
            })
        };
        let deadline = Instant::now() + PATIENCE;
        while !has_file() {
            assert!(Instant::now() < deadline, "it never makes its file");
            std::thread::sleep(Duration::from_millis(5));
        }
        let pid = rustix::process::Pid::from_raw(i32::try_from(process.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        assert!(!process.wait(PATIENCE).unwrap().success());
        assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    }
}
