use crate::place::{PATIENCE, Place};
use serde_json::json;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::Instant;

#[test]
fn status_finds_every_server_of_the_user_and_says_what_it_does() {
    let place = Place::new();
    let said = place.run(["status"]);
    let usual = place.path("run/inlinecrypt").display().to_string();
    for part in ["no server with a control socket in ", &usual, "--control PATH"] {
        assert!(said.done().out.contains(part), "{part}: {said}");
    }
    assert_eq!(place.run(["status", "--json"]).json()["servers"], json!([]));

    place.create("a.img");
    place.create("b.img");
    let a = place.serve("a.img.sock", ["a.img"]);
    let b = place.serve("b.img.sock", ["--engine", "software:slots=0", "b.img"]);
    a.greeting();
    b.greeting();
    let mut client = a.client("");
    client.write(0, &[0; 8192]).unwrap();
    client.read(4096, 4096).unwrap();
    client.flush().unwrap();
    assert!(client.read(1 << 20, 512).is_err());

    let status = place.run(["status", "--json"]).json();
    assert_eq!(status["version"], 1);
    let servers = status["servers"].as_array().unwrap();
    assert_eq!(servers.len(), 2);
    let server = servers.iter().find(|server| server["pid"] == a.pid()).unwrap();
    assert_eq!(server["version"], 1);
    assert_eq!(server["stopping"], false);
    assert_eq!(server["connections"]["now"], 1);
    let volume = &server["volumes"][0];
    let info = place.run(["volume", "info", "--json", "a.img"]).json();
    assert_eq!(volume["key_id"], info["key_id"]);
    for (name, expected) in [
        ("name", json!("a")),
        ("path", json!(place.path("a.img"))),
        ("size_bytes", json!(1 << 20)),
        ("mode", json!("AES-256-XTS")),
        ("data_unit_bytes", json!(4096)),
        ("block_bytes", json!(512)),
        ("iv_offset_sectors", json!(0)),
        ("read_only", json!(false)),
        ("key_type", json!("hardware-wrapped")),
        ("engine", json!("default")),
        ("served_by", json!("engine")),
        ("state", json!("ok")),
        ("reason", json!(null)),
        ("backing_failures", json!(0)),
    ] {
        assert_eq!(volume[name], expected, "{name}");
    }
    let counters = &volume["counters"];
    assert_eq!(counters["write"], json!({ "requests": 1, "bytes": 8192 }));
    assert_eq!(counters["read"], json!({ "requests": 1, "bytes": 4096 }));
    assert_eq!((&counters["flush"]["requests"], &counters["errors"]), (&json!(1), &json!(1)));
    let engine = &server["engines"][0];
    assert_eq!(engine["keys_admitted"], 1);
    let slots = engine["keyslots"]["slots"].as_array().unwrap();
    assert_eq!(slots.len(), 32);
    let used: Vec<_> = slots.iter().filter(|slot| slot["programs"] == 1).collect();
    assert_eq!(used.len(), 1);
    assert_eq!(used[0]["key_id"], volume["key_id"]);
    assert!(used[0]["hits"].as_u64().unwrap() >= 1);
    for number in ["slot", "users", "program_failures", "evictions", "waits"] {
        assert!(used[0][number].is_u64(), "{number}");
    }
    let other = servers.iter().find(|server| server["pid"] == b.pid()).unwrap();
    assert_eq!(other["engines"][0]["keyslots"], json!(null));

    let said = place.run(["status"]);
    for text in [
        &format!("server {}", a.pid()),
        "AES-256-XTS",
        info["key_id"].as_str().unwrap(),
        "31 keyslots never used",
    ] {
        assert!(said.done().out.contains(text), "{text}: {said}");
    }
    a.stop();
    b.stop();
    assert!(place.run(["status"]).done().out.contains("no server"));
}

#[test]
fn the_control_socket_is_for_its_owner_alone_and_goes_with_the_server() {
    let place = Place::new();
    place.create("a.img");
    let server = place.serve("a.img.sock", ["--control", "c", "a.img"]);
    server.greeting();
    let metadata = std::fs::symlink_metadata(place.path("c")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        place.run(["status", "--json", "--control", "c"]).json()["servers"].as_array().unwrap().len(),
        1
    );
    server.stop();
    assert!(!place.path("c").exists());
    place.run(["status", "--control", "c"]).refused(4, &["no server answers at c"]);

    let server = place.serve("a.img.sock", ["--control", "none", "a.img"]);
    server.greeting();
    assert!(place.run(["status"]).done().out.contains("no server"));
    server.stop();
    place.run(["serve", "--control", "no/where", "a.img"]).refused(4, &["control socket"]);
}

#[test]
fn rude_clients_of_the_control_socket_hold_up_nobody() {
    let place = Place::new();
    place.create("a.img");
    let server = place.serve("a.img.sock", ["--control", "c", "a.img"]);
    server.greeting();
    // One sends nothing, one sends no end of line, one sends rubbish, one goes.
    let silent = UnixStream::connect(place.path("c")).unwrap();
    let mut endless = UnixStream::connect(place.path("c")).unwrap();
    endless.write_all(&[b' '; 1024]).unwrap();
    let mut rubbish = UnixStream::connect(place.path("c")).unwrap();
    rubbish.write_all(b"{\"request\":\"reboot\"}\n").unwrap();
    drop(UnixStream::connect(place.path("c")).unwrap());
    let mut answer = String::new();
    rubbish.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("not a request"), "{answer}");
    place.run(["status", "--json", "--control", "c"]).json();
    // More of them than there are threads for: they are turned away or time out, and then there is room again.
    let crowd: Vec<_> = (0..20).map(|_| UnixStream::connect(place.path("c"))).collect();
    let deadline = Instant::now() + PATIENCE;
    while place.run(["status", "--control", "c"]).code != Some(0) {
        assert!(Instant::now() < deadline, "{}", server.err());
    }
    server.client("").read(0, 512).unwrap();
    server.stop();
    drop((silent, endless, crowd));
}

#[test]
fn a_socket_that_a_dead_server_left_is_passed_over_and_replaced() {
    let place = Place::new();
    place.create("a.img");
    let mut server = place.serve("a.img.sock", ["a.img"]);
    server.greeting();
    server.process.kill().unwrap();
    assert!(place.path("a.img.sock").exists());
    assert!(place.run(["status"]).done().out.contains("no server"));
    let server = place.serve("a.img.sock", ["a.img"]);
    server.client("").read(0, 512).unwrap();
    server.stop();
}

#[test]
fn sockets_of_killed_servers_are_removed_and_nothing_else() {
    let place = Place::new();
    place.create("v.img");
    let run = place.path("run/inlinecrypt");
    let killed = || {
        let mut server = place.serve("v.img.sock", ["v.img"]);
        server.greeting();
        let socket = run.join(format!("{}.sock", server.pid()));
        assert!(socket.exists());
        server.process.kill().unwrap();
        socket
    };
    let socket = killed();
    // Not a server's names, and not a socket.
    let other = run.join("mine.sock");
    drop(std::os::unix::net::UnixListener::bind(&other).unwrap());
    let file = place.write("run/inlinecrypt/1.sock", b"no socket");
    place.run(["status"]).done();
    assert!(!socket.exists() && other.exists() && file.exists());
    let socket = killed();
    let server = place.serve("v.img.sock", ["v.img"]);
    server.greeting();
    assert!(!socket.exists() && other.exists() && file.exists());
    assert!(run.join(format!("{}.sock", server.pid())).exists());
    server.stop();
}
