//! Containers are re-encrypted wherever they lie: with a detached header, on a block device, past the page cache; volumes without a
//! header at an offset; and a new server takes over what is served.

use crate::load::{Habits, Load, Until};
use crate::luks_reencrypt::{CHEAP, DATA_AT, container, cryptsetup, ours, serve};
use crate::rig::{MIB, Place, Server, eventually, may_loop, run, run_to_fail, said};
use crate::upgrade::upgrade;
use inlinecrypt_testkit::undo::LoopDevice;
use inlinecrypt_testkit::{pattern, require_tool};
use serde_json::Value;
use std::fs;
use std::process::{Command, Stdio};
use std::thread;

const HABITS: Habits = Habits { len_max: 32 << 10, depth: 4, reads: 30, trims: 0, ..Habits::MIXED };

/// Fills a volume.
fn fill(server: &Server, export: &str, len: u64) -> Vec<u8> {
    let content = pattern::bytes(11, 0, usize::try_from(len).unwrap());
    let mut client = server.client(export);
    for (at, piece) in (0..).step_by(1 << 20).zip(content.chunks(1 << 20)) {
        client.write(at, piece).unwrap();
    }
    content
}

fn read(server: &Server, export: &str, len: u64) -> Vec<u8> {
    server.client(export).read(0, u32::try_from(len).unwrap()).unwrap()
}

fn state_of(server: &Server, place: &Place) -> Value {
    server.status(place)["servers"][0]["volumes"][0]["reencrypt"].clone()
}

fn through_server(place: &Place, more: &[&str]) -> Command {
    let mut command = place.command();
    command.args(["volume", "reencrypt", "--control", "control"]).args(more);
    command
}

/// Begins, and is killed in the middle of it.
fn begin_and_kill(place: &Place, mut command: Command, info: &[&str]) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let done = || {
        let info: Value = serde_json::from_str(&place.run_ok(info)).unwrap();
        info["reencrypt"]["done_bytes"].as_u64()
    };
    eventually("some of it is done", || done() > Some(0));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(done().is_some(), "it was killed too late");
}

#[test]
fn with_a_detached_header_offline_and_served() {
    const LEN: u64 = 6 * MIB;
    let place = Place::new();
    place.secret("zero", b"passphrase zero");
    place.secret("one", b"passphrase one");
    let create = ["luks", "create", "--size", "6MiB", "--sector-size", "512", "--header", "head"];
    place.run_ok([&create[..], &["--passphrase-file", "zero"], &CHEAP, &["data"]].concat());
    let add = ["luks", "add-key", "--passphrase-file", "zero", "--new-passphrase-file", "one"];
    place.run_ok([&add[..], &CHEAP, &["head"]].concat());
    let detached = ["--passphrase-file", "zero", "--header", "head", "data"];
    let server = place.serve(detached);
    let content = fill(&server, "data", LEN);
    server.stop();
    let before = fs::read(place.path("data")).unwrap();
    let command = |more: &[&str]| {
        let mut command = place.command();
        command.args(["volume", "reencrypt"]).args(more).args(detached);
        command
    };
    let info = ["volume", "info", "--json", "--header", "head", "data"];
    let others = ["--other-passphrase-file", "one", "--throttle", "2MiB"];
    begin_and_kill(&place, command(&others), &info);
    run(&mut command(&["--resume"]));
    let after = fs::read(place.path("data")).unwrap();
    assert!(before.len() == after.len() && before != after);
    // Somebody else has the header.
    let lock = fs::File::open(place.path("head")).unwrap();
    lock.lock().unwrap();
    let output = command(&["--drop-others"]).output().unwrap();
    assert!(output.status.code() == Some(5), "{}", said(&output));
    drop(lock);
    let server = place.serve(detached);
    assert!(read(&server, "data", LEN) == content);
    // A server does it, while clients write, and is killed; the next one goes on.
    let mut load = Load::new(3, 0, LEN, HABITS);
    load.fill(&mut server.client(""));
    run(&mut through_server(
        &place,
        &["--other-passphrase-file", "one", "--detach", "--throttle", "3MiB", "data"],
    ));
    eventually("some of it is done", || state_of(&server, &place)["done_bytes"].as_u64() > Some(0));
    let mut server = server;
    server.process.kill().unwrap();
    drop(server);
    let server =
        place.serve(["--passphrase-file", "one", "--header", "head", "--pause-reencryption", "data"]);
    load.check_all(&mut server.client(""));
    assert_eq!(state_of(&server, &place)["state"], "paused");
    let mut client = server.client("");
    let over = Until::default();
    thread::scope(|scope| {
        let (load, client, over) = (&mut load, &mut client, &over);
        scope.spawn(move || load.run(client, || over.is_over()).unwrap());
        let _guard = over.guard();
        run(&mut through_server(&place, &["--resume", "data"]));
    });
    load.check_all(&mut client);
    drop(client);
    server.stop();
    if require_tool("cryptsetup").is_none() {
        return;
    }
    // The other one with the same names: it goes on with ours.
    begin_and_kill(&place, command(&others), &info);
    if serde_json::from_str::<Value>(&place.run_ok(info)).unwrap()["reencrypt"]["interrupted"] == true {
        run(&mut cryptsetup(&place, &["repair", "-q", "-d", "zero", "--header", "head", "data"]));
    }
    let resume = ["reencrypt", "-q", "--force-offline-reencrypt", "--resume-only", "-d", "one"];
    run(&mut cryptsetup(&place, &[&resume[..], &["--header", "head", "data"]].concat()));
    let server = place.serve(detached);
    load.check_all(&mut server.client(""));
    server.stop();
}

/// Header, areas and zones past the page cache: whole blocks of the device, at aligned addresses.
#[test]
fn past_the_page_cache() {
    const LEN: u64 = 4 * MIB;
    for sector in ["4096", "512"] {
        let place = Place::new();
        container(&place, sector, LEN);
        if !place.can_direct("disk") {
            crate::rig::skip("no O_DIRECT for temporary files");
            return;
        }
        // Smaller sectors than the file's blocks are not served so.
        let mut command = place.command();
        command.args(["serve", "--direct", "--nbd", "unix:s", "--passphrase-file", "zero", "disk"]);
        if sector == "512" {
            let output = command.stdin(Stdio::null()).args(["--control", "c"]);
            let mut child = output.stderr(Stdio::piped()).spawn().unwrap();
            let is_served = || place.path("s").exists();
            while child.try_wait().unwrap().is_none() && !is_served() {
                thread::sleep(std::time::Duration::from_millis(5));
            }
            let was_served = is_served();
            let _ = child.kill();
            child.wait().unwrap();
            if !was_served {
                return;
            }
        }
        let mut load = Load::new(5, 0, LEN, HABITS);
        let server = serve(&place, &["--direct"]);
        load.fill(&mut server.client(""));
        let mut client = server.client("");
        let over = Until::default();
        thread::scope(|scope| {
            let (load, client, over) = (&mut load, &mut client, &over);
            scope.spawn(move || load.run(client, || over.is_over()).unwrap());
            let _guard = over.guard();
            run(&mut through_server(&place, &["--zone", "256KiB", "disk"]));
        });
        load.check_all(&mut client);
        // And one that a kill cuts in the middle.
        run(&mut through_server(&place, &["--detach", "--throttle", "2MiB", "disk"]));
        eventually("some of it is done", || state_of(&server, &place)["done_bytes"].as_u64() > Some(0));
        drop(client);
        let mut server = server;
        server.process.kill().unwrap();
        drop(server);
        // Else it goes on by itself, and may be done before it is told to.
        let server = serve(&place, &["--direct", "--pause-reencryption"]);
        run(&mut through_server(&place, &["--resume", "--throttle", "0", "disk"]));
        load.check_all(&mut server.client(""));
        server.stop();
        let server = serve(&place, &[]);
        load.check_all(&mut server.client(""));
        server.stop();
    }
}

#[test]
fn on_a_block_device() {
    const LEN: u64 = 4 * MIB;
    if !may_loop() || require_tool("losetup").is_none() {
        return;
    }
    for sector_size in ["512", "4096"] {
        let place = Place::new();
        let content = container(&place, "4096", LEN);
        // Detached when dropped, also if this fails.
        let device = LoopDevice::new(&place.path("disk"), &["--sector-size", sector_size]).unwrap();
        let name = device.path().to_str().unwrap().to_owned();
        let offline = |more: &[&str]| {
            let mut command = place.command();
            command.args(["volume", "reencrypt", "--passphrase-file", "zero"]).args(more).arg(&name);
            command
        };
        let info = ["volume", "info", "--json", &name];
        begin_and_kill(&place, offline(&["--throttle", "2MiB"]), &info);
        run(&mut offline(&["--resume"]));
        let export = device.path().file_stem().unwrap().to_str().unwrap().to_owned();
        let server = place.serve(["--passphrase-file", "zero", &name]);
        assert!(read(&server, &export, LEN) == content);
        run(&mut through_server(&place, &["--data-unit", "4096", &name]));
        assert!(read(&server, &export, LEN) == content);
        server.stop();
        if require_tool("cryptsetup").is_some() {
            begin_and_kill(&place, offline(&["--throttle", "2MiB"]), &info);
            if serde_json::from_str::<Value>(&place.run_ok(info)).unwrap()["reencrypt"]["interrupted"] == true
            {
                run(&mut cryptsetup(&place, &["repair", "-q", "-d", "zero", &name]));
            }
            let resume =
                ["reencrypt", "-q", "--force-offline-reencrypt", "--resume-only", "-d", "zero", &name];
            run(&mut cryptsetup(&place, &resume));
        }
        let server = place.serve(["--passphrase-file", "zero", "--direct", &name]);
        assert!(read(&server, &export, LEN) == content);
        server.stop();
        device.detach().unwrap();
    }
}

/// One container by its passphrase, one by its wrapped key: a new server takes over, then re-encrypts, and another takes over that.
#[test]
fn a_new_server_takes_over_containers_before_and_after_a_re_encryption() {
    const LEN: u64 = 4 * MIB;
    let place = Place::new();
    container(&place, "4096", LEN);
    place.run_ok(["luks", "create", "--size", "1MiB", "--wrapped", "sealed"]);
    place.secret("wrong", b"passphrase wrong");
    let arguments = ["--passphrase-file", "zero", "disk", "sealed"];
    let server = place.serve(arguments);
    let mut load = Load::new(9, 0, LEN, HABITS);
    let (mut client, mut other) = (server.client("disk"), server.client("sealed"));
    load.fill(&mut client);
    other.write(0, &[7; 4096]).unwrap();
    let server = upgrade(&place, server, &arguments);
    load.check_all(&mut client);
    assert_eq!(other.read(0, 4096).unwrap(), [7; 4096]);
    run(&mut through_server(&place, &["--detach", "--throttle", "64KiB", "disk"]));
    let taking_over = |passphrase: &str| {
        let mut command = place.command();
        command.args(["serve", "--take-over", "control", "--passphrase-file", passphrase, "disk", "sealed"]);
        command.args(["--control", "control", "--nbd", "unix:nbd.sock"]);
        command
    };
    // Half-way nobody takes over, and the server goes on.
    let text = run_to_fail(&mut taking_over("zero"));
    assert!(text.contains("re-encrypt"), "{text}");
    run(&mut through_server(&place, &["--resume", "--throttle", "0", "disk"]));
    load.check_all(&mut client);
    let text = run_to_fail(&mut taking_over("wrong"));
    assert!(text.contains("no LUKS keyslot opens"), "{text}");
    let server = upgrade(&place, server, &arguments);
    load.check_all(&mut client);
    assert_eq!(other.read(0, 4096).unwrap(), [7; 4096]);
    drop((client, other));
    server.stop();
    let server = place.serve(arguments);
    load.check_all(&mut server.client("disk"));
    server.stop();
}

/// A volume without a header behind something of somebody else's, by its description: that part alone changes.
#[test]
fn a_volume_at_an_offset_gets_another_key_and_what_lies_around_stays() {
    const LEN: u64 = 3 * MIB;
    let place = Place::new();
    let around = pattern::bytes(21, 0, 6 << 20);
    fs::write(place.path("v.img"), &around).unwrap();
    place.raw_key("old", 64, 1);
    place.raw_key("new", 64, 2);
    let description = format!(
        "[[volume]]\npath = \"v.img\"\nkey = \"raw:old\"\nmode = \"AES-256-XTS\"\ndata_unit = 512\noffset = {MIB}\nlength = {LEN}\n"
    );
    fs::write(place.path("v.img.toml"), description).unwrap();
    let server = place.serve(["v.img"]);
    let content = fill(&server, "v", LEN);
    server.stop();
    let stays = |what: &str| {
        let now = fs::read(place.path("v.img")).unwrap();
        let (begin, end) = (1 << 20, 4 << 20);
        assert!(now[..begin] == around[..begin] && now[end..] == around[end..], "{what}: others' data");
        now[begin..end].to_vec()
    };
    let first = stays("filled");
    let offline = |more: &[&str]| {
        let mut command = place.command();
        command.args(["volume", "reencrypt"]).args(more).arg("v.img");
        command
    };
    // It stays where it is.
    let text = run_to_fail(&mut offline(&["--key", "raw:new", "--offset", "4096"]));
    assert!(text.contains("Leave --offset out"), "{text}");
    begin_and_kill(
        &place,
        offline(&["--key", "raw:new", "--throttle", "2MiB", "--zone", "256KiB"]),
        &["volume", "info", "--json", "v.img"],
    );
    stays("half done");
    let server = place.serve(["--pause-reencryption", "v.img"]);
    assert!(read(&server, "v", LEN) == content);
    server.stop();
    run(&mut offline(&["--resume"]));
    let second = stays("by the command");
    assert!(first != second);
    let server = place.serve(["v.img"]);
    assert!(read(&server, "v", LEN) == content);
    run(&mut through_server(&place, &["--key", "raw:old", "--data-unit", "4096", "v.img"]));
    assert!(read(&server, "v", LEN) == content);
    server.stop();
    let third = stays("by a server");
    // What it is now is known by encrypting it.
    let key = fs::read(place.path("old")).unwrap();
    let cipher = inlinecrypt_cipher::Mode::Aes256Xts.info().expand(&key).unwrap();
    let mut expected = content.clone();
    for (number, unit) in (0_u64..).zip(expected.chunks_exact_mut(4096)) {
        cipher.encrypt(number.into(), 4096, unit);
    }
    assert!(third == expected);
}

/// The way that is advised for a container with a wrapped key.
#[test]
fn data_under_a_wrapped_key_is_copied_to_another() {
    let Some(nbdcopy) = require_tool("nbdcopy") else { return };
    const LEN: u64 = 2 * MIB;
    let place = Place::new();
    let create = |name: &str| place.run_ok(["luks", "create", "--size", "2MiB", "--wrapped", name]);
    create("old");
    let server = place.serve(["old"]);
    let content = fill(&server, "old", LEN);
    server.stop();
    let before = fs::read(place.path("old")).unwrap();
    let output = place.run(["volume", "reencrypt", "old"]);
    let text = said(&output);
    assert!(output.status.code() == Some(1) && text.contains("nbdcopy"), "{text}");
    assert!(fs::read(place.path("old")).unwrap() == before);
    // The token would be the old key's, also where a passphrase opens the same data.
    place.secret("master", &pattern::bytes(5, 0, 32));
    place.secret("recovery", b"passphrase r");
    let import =
        ["luks", "create", "--size", "1MiB", "--import", "master", "--recovery-passphrase-file", "recovery"];
    place.run_ok([&import[..], &CHEAP, &["both"]].concat());
    let server = place.serve(["--recover", "--passphrase-file", "recovery", "both"]);
    let text = run_to_fail(&mut through_server(&place, &["both"]));
    assert!(text.contains("wrapped key"), "{text}");
    server.stop();
    create("new");
    let server = place.serve(["old", "new"]);
    run(Command::new(nbdcopy).arg(server.uri("old")).arg(server.uri("new")));
    assert!(read(&server, "new", LEN) == content);
    server.stop();
    let at = usize::try_from(DATA_AT).unwrap();
    assert!(fs::read(place.path("new")).unwrap()[at..] != before[at..]);
}

/// A passphrase that came through a descriptor is not kept.
#[test]
fn a_server_that_was_started_without_a_file_says_how_it_can_be_done() {
    let place = Place::new();
    container(&place, "4096", MIB);
    let mut command = place.command();
    command
        .args(["serve", "--passphrase-fd", "0", "--nbd"])
        .arg(format!("unix:{}", place.path("nbd.sock").display()));
    command.arg("--control").arg(place.path("control")).arg("disk");
    command.stdin(fs::File::open(place.path("zero")).unwrap());
    let server = place.start(command);
    let text = run_to_fail(&mut through_server(&place, &["disk"]));
    assert!(text.contains("--offline"), "{text}");
    server.stop();
    run(&mut ours(&place, &["--offline"]));
}
