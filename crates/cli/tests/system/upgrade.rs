//! Live upgrade: a new server takes over from the one that serves, and clients notice nothing.

use crate::clients::fio;
use crate::rig::{MIB, PATIENCE, Place, Server, run, run_to_fail};
use inlinecrypt_testkit::nbd::{cmd, request_header};
use inlinecrypt_testkit::require_tool;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What makes a server take over from the one at `control`.
fn taking_over(place: &Place, arguments: &[&str]) -> Vec<String> {
    let control = place.path("control").display().to_string();
    ["--take-over", &control].iter().chain(arguments).map(ToString::to_string).collect()
}

/// Starts a server that takes over from `old`, and waits until that has ended.
pub(crate) fn upgrade(place: &Place, mut old: Server, arguments: &[&str]) -> Server {
    let new = place.serve(taking_over(place, arguments));
    let ended = old.wait();
    assert!(ended.success(), "{ended}: {}", old.log());
    new
}

/// A server that is to take over and must not.
fn refused(place: &Place, arguments: &[&str]) -> (String, i32) {
    let mut command = place.command();
    command.arg("serve").args(taking_over(place, arguments));
    command.args(["--control", "control", "--nbd", "unix:nbd.sock"]);
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} succeeded");
    (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code().unwrap())
}

#[test]
fn fio_verifies_while_five_servers_take_over_one_after_the_other() {
    let Some(program) = require_tool("fio") else { return };
    for workers in ["0", "2"] {
        take_over_under_fio(&program, workers);
    }
}

fn take_over_under_fio(program: &Path, workers: &str) {
    let place = Place::new();
    // fio has its first 24 MiB for itself.
    let server = place.serve(["-v", "--create", "25MiB", "--workers", workers, "v.img"]);
    let uri = server.uri("v");
    let done = AtomicBool::new(false);
    let mut client = server.client("v");
    let mut half_sent = server.client("v");
    let server = thread::scope(|scope| {
        let mut server = server;
        let (place, done, uri) = (&place, &done, &uri);
        let verified = scope.spawn(move || {
            let mut runs = 0;
            while !done.load(Ordering::Relaxed) {
                let said = run(&mut fio(program, place, uri, "512", &["--do_verify=1", "--rate=12m"]));
                assert!(said.matches("err= 0").count() == 1 && !said.contains("verify:"), "{said}");
                runs += 1;
            }
            runs
        });
        for round in 0..5u8 {
            // As much of a request as any server must leave to the next.
            let header = request_header(cmd::FLUSH, 0, round.into(), 0, 0);
            half_sent.stream().write_all(&header[..11]).unwrap();
            let at = 24 * MIB + 512 * u64::from(round);
            client.write(at, &[round; 512]).unwrap();
            thread::sleep(Duration::from_millis(200));
            server = upgrade(place, server, &["-v", "--workers", workers, "v.img"]);
            half_sent.stream().write_all(&header[11..]).unwrap();
            let mut reply = [0; 16];
            half_sent.stream().read_exact(&mut reply).unwrap();
            assert_eq!((&reply[..8], reply[15]), (&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], round));
            assert_eq!(client.read(at, 512).unwrap(), [round; 512]);
            assert!(!verified.is_finished(), "fio failed");
        }
        done.store(true, Ordering::Relaxed);
        eprintln!("{} runs of fio", verified.join().unwrap());
        server
    });
    let log = server.log();
    assert_eq!(log.matches("handed over to ").count(), 5, "{log}");
    log.lines().filter(|line| line.contains("pause_us")).for_each(|line| eprintln!("{line}"));
    // Those of fio among them, at least once.
    assert!(log.contains("connections=4"), "{log}");
    assert_eq!(server.status(&place)["servers"][0]["volumes"][0]["counters"]["errors"], 0);
    // The lock came along, and so did the names of the sockets.
    let said = run_to_fail(place.command().args(["serve", "--nbd", "unix:other.sock", "v.img"]));
    assert!(said.contains("v.img is served by"), "{said}");
    drop((client, half_sent));
    server.stop();
    assert!(!place.path("control").exists());
    place.serve(["v.img"]).stop();
}

#[test]
fn a_server_that_cannot_take_over_changes_nothing() {
    let place = Place::new();
    for (name, seed) in [("a.raw", 1), ("b.raw", 2)] {
        place.raw_key(name, 64, seed);
    }
    for name in ["v.img", "w.img"] {
        place.sparse(name, 1 << 20);
    }
    let mut server = place.serve(["--key", "raw:a.raw", "v.img"]);
    let mut client = server.client("v");
    client.write(0, &[7; 4096]).unwrap();
    let line = "0 1024 crypt aes-xts-plain64 - 0 v.img 0 3 allow_discards sector_size:4096 iv_large_sectors";
    let cases: [(&[&str], i32, &str); 12] = [
        (&["--key", "raw:b.raw", "v.img"], 2, "the key of \"v\" is not that of the running server"),
        (
            &["--key", "raw:a.raw", "--data-unit", "512", "v.img"],
            1,
            "the data unit of \"v\" is 4096 bytes there",
        ),
        (
            &["--key", "raw:a.raw", "--iv-offset", "8", "v.img"],
            1,
            "the IV offset of \"v\" is 0 sectors there",
        ),
        (
            &["--key", "raw:a.raw", "--iv", "sectors", "v.img"],
            1,
            "the IV layout of \"v\" is data-units there",
        ),
        (&["--key", "raw:a.raw", "--offset", "4096", "v.img"], 1, "the offset of \"v\" is 0 bytes there"),
        (
            &["--key", "raw:a.raw", "--dm-table", line],
            1,
            "the size of \"v\" is 1 MiB there, and 512 KiB here",
        ),
        (
            &["--key", "raw:a.raw", "--block", "4096", "v.img"],
            1,
            "the logical block of \"v\" is 512 bytes there",
        ),
        (
            &["--key", "raw:a.raw", "--discard", "off", "v.img"],
            1,
            "discard of \"v\" is pass there, and off here",
        ),
        (
            &["--key", "raw:a.raw", "--read-only", "v.img"],
            1,
            "serves it for reading and writing; leave --read-only",
        ),
        (&["--key", "raw:a.raw", "--direct", "v.img"], 1, "serves it through the page cache; leave --direct"),
        (&["--key", "raw:a.raw", "--name", "v", "w.img"], 4, "another file of that name"),
        (&["--key", "raw:a.raw", "w.img"], 1, "it serves \"v\", and this one would not"),
    ];
    for (arguments, code, why) in cases {
        let (said, ended) = refused(&place, arguments);
        let said = said.replace("\n  Leave", "; leave");
        assert!(said.contains(why), "{arguments:?}: {said}");
        assert_eq!(ended, code, "{arguments:?}: {said}");
        let what = said.lines().find(|line| line.starts_with("inlinecrypt: ")).unwrap();
        assert!(what.matches(".img").count() < 2, "{said}");
        assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    }
    let said =
        run_to_fail(place.command().args(["serve", "--key", "raw:a.raw", "v.img", "--take-over", "nowhere"]));
    assert!(said.contains("no server can be asked at nowhere"), "{said}");
    assert!(server.is_running());
    assert_eq!(server.client("v").read(0, 4096).unwrap(), [7; 4096]);
    // It still has the lock, of which they had a copy.
    let busy = ["serve", "--nbd", "unix:other.sock", "--key", "raw:a.raw", "v.img"];
    let said = run_to_fail(place.command().args(busy));
    assert!(said.contains("v.img is served by"), "{said}");
    // It was none of its doing: the right one can.
    let server = upgrade(&place, server, &["--key", "raw:a.raw", "v.img"]);
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    server.stop();
}

/// A new server that is played here, and dies at some point.
struct Impostor(UnixStream);

impl Impostor {
    fn connect(place: &Place) -> Self {
        let mut stream = UnixStream::connect(place.path("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"{\"request\":\"take_over\"}\n").unwrap();
        Self(stream)
    }

    fn say(&mut self, message: &str) {
        self.0.write_all(&u32::try_from(message.len()).unwrap().to_le_bytes()).unwrap();
        self.0.write_all(message.as_bytes()).unwrap();
    }

    /// One that the server talks to, once it has noticed the end of the one before.
    fn admitted(place: &Place) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut new = Self::connect(place);
            if new.next() != "refused" {
                return new;
            }
            assert!(Instant::now() < deadline, "never admitted");
        }
    }

    /// The kind of the next message. A descriptor is lost on the way.
    fn next(&mut self) -> String {
        let mut len = [0; 4];
        self.0.read_exact(&mut len).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
        self.0.read_exact(&mut bytes).unwrap();
        let message: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        message["message"].as_str().unwrap().to_owned()
    }

    /// Reads up to a message of this kind.
    fn wait_for(&mut self, kind: &str) {
        while self.next() != kind {}
    }
}

#[test]
fn a_new_server_that_dies_before_it_serves_is_as_if_it_had_never_been() {
    let place = Place::new();
    let mut server = place.serve(["--create", "1MiB", "v.img"]);
    let mut client = server.client("v");
    let prepared = "{\"message\":\"prepared\",\"takes_plain\":true,\"takes_control\":true}";
    let taken = "{\"message\":\"taken\"}";
    // How far it comes, what it says last, and what it hears then before it dies.
    let deaths: [&[(&str, &str)]; 8] = [
        &[],
        &[("", "offered")],
        &[("", "offered"), (prepared, "connection")],
        &[("", "offered"), (prepared, "all")],
        &[("", "offered"), (prepared, "all"), (taken, "go")],
        &[("", "offered"), (prepared, "all"), ("{\"message\":\"go\"}", "refused")],
        &[("", "offered"), (taken, "refused")],
        &[("", "offered"), ("nonsense", "")],
    ];
    for (number, death) in (0u8..).zip(deaths) {
        let mut new = Impostor::admitted(&place);
        for (say, hear) in death {
            if !say.is_empty() {
                new.say(say);
            }
            if hear.is_empty() {
                assert_eq!(new.0.read(&mut [0; 16]).unwrap(), 0, "{death:?}");
            } else {
                new.wait_for(hear);
            }
        }
        if number == 4 {
            // It has everything and might serve: nobody else is let in.
            Impostor::connect(&place).wait_for("refused");
        }
        drop(new);
        let at = u64::from(number) * 512;
        client.write(at, &[number; 512]).unwrap();
        assert_eq!(server.client("v").read(at, 512).unwrap(), [number; 512]);
        assert!(server.is_running());
    }
    // A control client that has nothing to do with it is answered as ever.
    assert_eq!(server.status(&place)["servers"][0]["volumes"][0]["counters"]["errors"], 0);
    // Its volume is still locked, and a true one takes over.
    let said = run_to_fail(place.command().args(["serve", "--nbd", "unix:other.sock", "v.img"]));
    assert!(said.contains("v.img is served by"), "{said}");
    let server = upgrade(&place, server, &["v.img"]);
    assert_eq!(client.read(512, 512).unwrap(), [1; 512]);
    server.stop();
}
