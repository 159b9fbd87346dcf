use crate::place::Place;
use serde_json::json;
use std::fs;

#[test]
fn manual_pages_come_from_the_same_definitions() {
    let place = Place::new();
    place.run(["man", "pages"]).done();
    let mut names: Vec<String> = fs::read_dir(place.path("pages"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    for page in
        ["inlinecrypt.1", "inlinecrypt-serve.1", "inlinecrypt-volume-create.1", "inlinecrypt-key-info.1"]
    {
        assert!(names.iter().any(|name| name == page), "{page}: {names:?}");
    }
    let serve = fs::read_to_string(place.path("pages/inlinecrypt-serve.1")).unwrap();
    for text in ["\\-\\-create", "\\-\\-nbd", "Examples"] {
        assert!(serve.contains(text), "{text}");
    }
    let first = place.run(["man"]);
    assert!(first.done().out.contains("Exit codes"), "{first}");
}

#[test]
fn completions_know_every_verb() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let said = place.run(["completions", shell]);
        for verb in ["serve", "volume", "key", "engine", "status", "check"] {
            assert!(said.done().out.contains(verb), "{shell} {verb}");
        }
    }
    assert_eq!(place.run(["completions", "tcsh"]).code, Some(1));
}

#[test]
fn help_is_help_and_usage_errors_are_1() {
    let place = Place::new();
    let said = place.run(["--help"]);
    for text in ["Examples:", "Exit codes:", "1  wrong parameters", "5  exists already, or in use"] {
        assert!(said.done().out.contains(text), "{text}: {said}");
    }
    assert!(place.run(["--version"]).done().out.starts_with("inlinecrypt "));
    for wrong in
        [&["frobnicate"][..], &[], &["serve", "--frob"], &["serve", "--create", "1G", "--config", "x"]]
    {
        let said = place.run(wrong);
        assert_eq!(said.code, Some(1), "{said}");
        assert!(!said.err.is_empty() && said.out.is_empty(), "{said}");
    }
    place.run(["--log", "v=w=x", "status"]).refused(1, &["--log"]);
}

#[test]
fn engine_info_is_what_sysfs_would_show() {
    let place = Place::new();
    let info = place.run(["engine", "info", "--json", "--engine", "software:slots=4"]).json();
    assert_eq!(info["num_keyslots"], 4);
    assert_eq!(info["max_dun_bits"], 256);
    assert_eq!(info["modes"]["AES-256-XTS"], 0x1fe00);
    // Those of Linux, and AES-128-XTS, which is software alone.
    assert_eq!(info["modes"].as_object().unwrap().len(), 5);
    assert_eq!(
        (&info["raw_keys"], &info["hw_wrapped_keys"]),
        (&json!(true), &json!(false)),
        "there is no root yet"
    );
    assert!(!place.path("home").exists(), "and none is made for a look");
    place.run(["key", "generate", "--out", "k"]).done();
    let info = place.run(["engine", "info", "--json"]).json();
    assert_eq!(info["hw_wrapped_keys"], true);
    let text = place.run(["engine", "info"]);
    assert!(text.done().out.contains("0x1fe00: 512, 1024"), "{text}");
    place.run(["engine", "info", "--root", "missing"]).refused(4, &["missing"]);
}

#[test]
fn volume_info_says_what_is_known() {
    let place = Place::new();
    place.create("v.img");
    let info = place.run(["volume", "info", "--json", "v.img"]).json();
    for (name, expected) in [
        ("version", json!(1)),
        ("len_bytes", json!(1 << 20)),
        ("volume_bytes", json!(1 << 20)),
        ("unused_bytes", json!(0)),
        ("allocated_bytes", json!(0)),
        ("described", json!(true)),
        ("mode", json!("AES-256-XTS")),
        ("data_unit_bytes", json!(4096)),
        ("block_bytes", json!(512)),
        ("key_type", json!("hardware-wrapped")),
        ("key_file", json!("v.img.key")),
    ] {
        assert_eq!(info[name], expected, "{name}");
    }
    assert_eq!(info["root_id"].as_str().unwrap().len(), 16);
    place.run(["volume", "info", "missing"]).refused(4, &["missing does not exist"]);
}

#[test]
fn the_help_of_serve_says_what_a_description_and_a_handed_over_socket_do() {
    let said = Place::new().run(["serve", "--help"]);
    for text in ["VOLUME.toml", "may add to it", "second signal", "socket activation"] {
        assert!(said.done().out.contains(text), "{text}: {said}");
    }
}
