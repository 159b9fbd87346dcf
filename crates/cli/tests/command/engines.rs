use crate::place::{Place, assert_same};
use serde_json::json;

/// A config with a wrapped and a raw volume on one engine.
fn two_types(place: &Place, spec: &str, engine: &str, raw_volume: &str) -> std::path::PathBuf {
    place.run(["key", "generate", "--engine", spec, "--out", "wrapped.key"]).done();
    place.raw_key("raw.key", 64);
    place.sparse("w.img", 1 << 20);
    place.sparse("r.img", 1 << 20);
    let config = format!(
        "[[engine]]\nname = \"ice\"\nspec = \"{spec}\"\n{engine}\n[[volume]]\npath = \"w.img\"\nkey = \"wrapped.key\"\n[[volume]]\npath \
         = \"r.img\"\nkey = \"raw:raw.key\"\n{raw_volume}\n[listen]\nnbd = [\"unix:s.sock\"]\n"
    );
    place.write("c.toml", config.as_bytes())
}

#[test]
fn an_exclusive_engine_is_not_given_two_key_types_and_check_names_the_pair() {
    let place = Place::new();
    let config = two_types(&place, "ice:hwkm-v2", "", "");
    for verb in [&["check"][..], &["serve", "--config"]] {
        let said = place.run(verb.iter().map(AsRef::as_ref).chain([config.as_os_str()]));
        said.refused(1, &["w.img", "r.img", "cannot be together on engine ice", "Use an engine for each"]);
    }
    // With software allowed it depends on who comes first: still refused, and what helps is said.
    let place = Place::new();
    two_types(&place, "ice:hwkm-v2", "", "fallback = \"allowed\"");
    place.run(["check", "c.toml"]).refused(1, &["cannot be together", "key_type = \"wrapped\""]);
}

#[test]
fn with_the_type_declared_software_serves_the_raw_volume_and_status_says_so() {
    let place = Place::new();
    two_types(&place, "ice:hwkm-v2", "key_type = \"wrapped\"", "fallback = \"allowed\"");
    let server = place.serve("s.sock", ["--config", "c.toml"]);
    for name in ["w", "r"] {
        let mut client = server.client(name);
        client.write(0, &[7; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    }
    let status = place.run(["status", "--json"]).json();
    let volumes = &status["servers"][0]["volumes"];
    assert_eq!((&volumes[0]["served_by"], &volumes[1]["served_by"]), (&json!("engine"), &json!("fallback")));
    let engine = &status["servers"][0]["engines"][0];
    assert_eq!(
        (&engine["key_type"], &engine["decided_by"]),
        (&json!("hardware-wrapped"), &json!("a declaration"))
    );
    let text = place.run(["status"]);
    assert!(text.done().out.contains("hardware-wrapped keys only, by a declaration"), "{text}");
}

/// What the engine cannot do at all goes to software and decides nothing.
#[test]
fn a_volume_that_only_software_can_serve_does_not_stand_in_the_way() {
    for layout in ["mode = \"AES-128-CBC-ESSIV\"", "data_unit = 512\niv_offset = 8589934592"] {
        let place = Place::new();
        let raw = format!("fallback = \"allowed\"\n{layout}");
        let config = two_types(&place, "ice:hwkm-v2,dun=4", "", &raw);
        std::fs::remove_file(place.path("raw.key")).unwrap();
        place.raw_key("raw.key", if layout.starts_with("mode") { 16 } else { 64 });
        let said = place.run([std::ffi::OsStr::new("check"), config.as_os_str()]);
        let out = &said.done().out;
        assert!(out.contains("\"r\": ") && out.contains("by software fallback"), "{out}");
        assert!(out.contains("by engine ice"), "{out}");
    }
}

#[test]
fn the_next_generation_serves_both() {
    let place = Place::new();
    two_types(&place, "ice:next", "", "");
    let server = place.serve("s.sock", ["--config", "c.toml"]);
    for name in ["w", "r"] {
        let mut client = server.client(name);
        client.write(512, &[9; 512]).unwrap();
        assert_eq!(client.read(512, 512).unwrap(), [9; 512]);
    }
}

#[test]
fn pins_are_counted_at_the_door() {
    let place = Place::new();
    for name in ["a.img", "b.img"] {
        place.create(name);
    }
    let pinned = ["--engine", "software:slots=2", "--pin", "a.img", "b.img"];
    place.run(["serve"].into_iter().chain(pinned)).refused(1, &["2 volumes want a keyslot pinned, it has 2"]);
    let server =
        place.serve("a.img.sock", ["--engine", "software:slots=3", "--pin", "--priority", "high", "a.img"]);
    server.client("").write(0, &[1; 512]).unwrap();
    let status = place.run(["status", "--json"]).json();
    assert_eq!(status["servers"][0]["engines"][0]["keys_pinned"], 1);
}

#[test]
fn a_reset_engine_has_its_keys_again() {
    let place = Place::new();
    place.run(["key", "generate", "--engine", "ice:hwkm-v1", "--out", "a.img.key"]).done();
    place.sparse("a.img", 1 << 20);
    let server = place.serve("a.img.sock", ["--engine", "ice:hwkm-v1", "--control", "c.sock", "a.img"]);
    let mut client = server.client("");
    client.write(0, &[3; 4096]).unwrap();
    for round in 1..=3 {
        let said = place.run(["engine", "reset", "--control", "c.sock"]);
        assert_eq!(said.done().out, "reset default\n");
        assert_eq!(client.read(0, 4096).unwrap(), [3; 4096]);
        let status = place.run(["status", "--json", "--control", "c.sock"]).json();
        assert_eq!(status["servers"][0]["engines"][0]["keyslots"]["resets"], round);
    }
    place.run(["engine", "reset", "--control", "c.sock", "other"]).refused(1, &["there is no engine"]);
    place.run(["engine", "reset", "--control", "nowhere.sock"]).refused(4, &["no server answers"]);
}

/// A fault that nobody would notice otherwise: the ciphertext is wrong. The first such request fails, nothing reaches the
/// disk, and `status` says where it was.
#[test]
fn verify_stops_an_engine_that_encrypts_wrongly_and_status_says_so() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "1MiB", "--engine", "ice:next", "v.img"]).done();
    let engine = "ice:next,faults=wrong-ciphertext";
    let server = place.serve("v.img.sock", ["--engine", engine, "--verify", "all", "v.img"]);
    let mut client = server.client("");
    let before = std::fs::read(place.path("v.img")).unwrap();
    for _ in 0..2 {
        assert!(client.write(8192, &[3; 4096]).is_err());
    }
    assert_same(&std::fs::read(place.path("v.img")).unwrap(), &before);
    let status = place.run(["status", "--json"]).json();
    let report = &status["servers"][0]["engines"][0];
    assert_eq!(
        (&report["state"], &report["spec"]),
        (&json!("stopped"), &json!(format!("{engine},verify=all")))
    );
    assert!(report["reason"].as_str().unwrap().contains("DUN 2 in keyslot 0"), "{report}");
    assert!(place.run(["status"]).done().out.contains("stopped: verification stopped the engine ice:next"));
    drop(server);

    // A healthy one passes, wherever the flag is said.
    let config = "[[engine]]\nname = \"e\"\nspec = \"ice:next\"\n[[volume]]\npath = \"v.img\"\n[listen]\nnbd = [\"unix:c.sock\"]\n";
    place.write("c.toml", config.as_bytes());
    let server = place.serve("c.sock", ["--config", "c.toml", "--verify", "sample=2"]);
    let mut client = server.client("");
    for block in 0..8 {
        client.write(block * 4096, &[7; 4096]).unwrap();
        assert_eq!(client.read(block * 4096, 4096).unwrap(), [7; 4096]);
    }
    let report = &place.run(["status", "--json"]).json()["servers"][0]["engines"][0];
    assert_eq!((&report["state"], &report["spec"]), (&json!("ok"), &json!("ice:next,verify=2")));
}

#[test]
fn verify_takes_a_share_and_something_to_compare() {
    let place = Place::new();
    place.create("v.img");
    for (share, why) in [
        ("sample=0", "number from 1"),
        ("half", "verify \"half\": not \"all\""),
        ("", "not \"all\""),
        ("sample=1", "every engine here is software"),
    ] {
        let said = place.run(["serve", "--verify", share, "v.img"]);
        assert_eq!(said.code, Some(1), "{said}");
        assert!(said.err.contains(why), "{why}: {said}");
    }
}

/// A switch that fails refuses the volume at the start, with what can be done.
#[test]
fn a_switch_that_fails_is_told_at_the_start() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "1MiB", "--engine", "ice:hwkm-v2", "v.img"]).done();
    let ill = ["--engine", "ice:hwkm-v2,faults=commit-fail"];
    let saying = [
        "switching it to hardware-wrapped keys",
        "failed",
        "the hardware did not answer",
        "Start the engine again",
    ];
    place.run(["serve"].iter().chain(&ill).chain(&["v.img"])).refused(4, &saying);
    place
        .run(["serve"].iter().chain(&ill).chain(&["--key-type", "wrapped", "v.img"]))
        .refused(4, &["for a declaration failed", "serves nothing until it is started again"]);
}

#[test]
fn bench_measures_the_engine_here_and_in_a_process_of_its_own() {
    let place = Place::new();
    let report = place.run(["bench", "--engine", "software:slots=2", "--json"]).json();
    let engines = report["engines"].as_array().unwrap();
    let processes: Vec<_> = engines.iter().map(|figure| figure["process"].as_str().unwrap()).collect();
    assert_eq!(processes, [["in this process"; 3], ["in one of its own"; 3]].concat());
    assert!(engines.iter().all(|figure| figure["microseconds"].as_f64().unwrap() > 0.0), "{report}");
    assert_eq!(report["cipher"].as_array().unwrap().len(), 15);
}

#[test]
fn real_time_priority_is_for_a_process_of_its_own() {
    let place = Place::new();
    place.create("v.img");
    let config = |process: &str| {
        let text = format!(
            "[[engine]]\nname = \"e\"\nrealtime = true\n{process}\n[[volume]]\npath = \"v.img\"\n[listen]\nnbd = [\"unix:s.sock\"]\n"
        );
        place.write("c.toml", text.as_bytes())
    };
    let words = ["real-time priority is for a process of its own", "Leave out --engine-process none"];
    place.run(["serve", "--engine-realtime", "--engine-process", "none", "v.img"]).refused(1, &words);
    place
        .run(["serve", "--create", "1M", "--engine-realtime", "--engine-process", "none", "w.img"])
        .refused(1, &words);
    assert!(!place.path("w.img").exists() && !place.path("w.img.key").exists());
    config("process = \"none\"");
    place.run(["serve", "--config", "c.toml"]).refused(1, &[&words[..], &["engine e"]].concat());
    place.run(["check", "c.toml"]).refused(1, &words);
    config("");
    place.run(["serve", "--engine-process", "none", "--config", "c.toml"]).refused(1, &words);
}
