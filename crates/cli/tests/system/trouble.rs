//! Disks that fail, clients that misbehave, and everything that ends a server.

use crate::load::{Habits, Load, Until};
use crate::rig::{MIB, PATIENCE, Place, dial, eventually, may_loop, may_mount, seed};
use inlinecrypt_testkit::nbd::{NbdError, cmd, request_header};
use inlinecrypt_testkit::undo::{LoopDevice, Mount};
use inlinecrypt_testkit::{Client, Shadow, pattern, require_tool};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use std::fs;
use std::io::Write as _;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

const EIO: u32 = 5;
const ENOSPC: u32 = 28;

/// A small filesystem of its own in `disk`.
fn small_filesystem(place: &Place, size: &str) -> Option<Mount> {
    if !may_mount() {
        return None;
    }
    fs::create_dir(place.path("disk")).unwrap();
    let option = format!("size={size},mode=700");
    Some(Mount::new(&place.path("disk"), &["-t", "tmpfs", "-o", &option, "tmpfs"]).unwrap())
}

/// Two volumes with raw keys: `v` at `path`, and `other` on a disk that is fine.
fn two_volumes(place: &Place, path: &str, more: &str) -> String {
    place.raw_key("v.raw", 64, 1);
    place.raw_key("other.raw", 64, 2);
    place.sparse("other.img", MIB);
    format!(
        "[[volume]]\nname = \"v\"\npath = \"{path}\"\nkey = \"raw:v.raw\"\n{more}\n\
         [[volume]]\npath = \"other.img\"\nkey = \"raw:other.raw\"\n"
    )
}

/// Whether an export works as ever.
fn works(client: &mut Client<UnixStream>, seed: u64) {
    let mut load = Load::new(seed, 0, MIB, Habits::MIXED);
    load.fill(client);
    client.flush().unwrap();
    load.check_all(client);
}

#[test]
fn a_full_disk_is_told_and_once_there_is_room_writing_goes_on() {
    let place = Place::new();
    let Some(mount) = small_filesystem(&place, "8m") else { return };
    place.sparse("disk/v.img", 32 * MIB);
    fs::write(place.path("disk/other-data"), vec![1; 3 << 20]).unwrap();
    let mut server = place.serve_config(&two_volumes(&place, "disk/v.img", ""));
    let mut client = server.client("v");
    let mut shadow = Shadow::new(3, 0, 32 * MIB);
    let mut at = 0;
    let refused = loop {
        let (version, data) = shadow.begin(at, MIB);
        match client.write(at, &data) {
            Ok(()) => shadow.settle(at, MIB, version),
            Err(error) => break error,
        }
        at += MIB;
        assert!(at < 8 * MIB, "the disk is never full");
    };
    assert_eq!(refused.errno(), Some(ENOSPC));
    assert!(at >= 3 * MIB, "{at}");
    // What writes zeroes needs room, too.
    assert_eq!(client.write_zeroes(20 * MIB, 1 << 20, 0).unwrap_err().errno(), Some(ENOSPC));
    // All that was there is there, and can be changed: its room is its own.
    shadow.check(0, &client.read(0, u32::try_from(at).unwrap()).unwrap()).unwrap();
    let (version, data) = shadow.begin(0, MIB);
    client.write(0, &data).unwrap();
    shadow.settle(0, MIB, version);
    works(&mut server.client("other"), 5);

    fs::remove_file(place.path("disk/other-data")).unwrap();
    let (version, data) = shadow.begin(at, MIB);
    client.write(at, &data).unwrap();
    shadow.settle(at, MIB, version);
    client.flush().unwrap();
    shadow.check(0, &client.read(0, u32::try_from(at + MIB).unwrap()).unwrap()).unwrap();
    assert!(server.is_running());
    let status = server.status(&place);
    assert!(status["servers"][0]["volumes"][0]["backing_failures"].as_u64().unwrap() >= 2, "{status}");
    server.stop();
    mount.unmount().unwrap();
}

#[test]
fn a_disk_that_becomes_shorter_gives_errors_where_it_was_and_nowhere_else() {
    for direct in ["direct = false", "direct = true"] {
        let place = Place::new();
        let path = place.sparse("v.img", 8 * MIB);
        let config = two_volumes(&place, "v.img", direct);
        let mut server = place.serve_config(&config);
        let mut client = server.client("v");
        let mut load = Load::new(4, 0, 4 * MIB, Habits::MIXED);
        load.fill(&mut client);
        client.write(4 * MIB, &vec![7; 4 << 20]).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(4 * MIB).unwrap();

        for (offset, len) in [(4 * MIB, 512), (8 * MIB - 512, 512), (4 * MIB, 4 << 20)] {
            assert_eq!(client.read(offset, len).unwrap_err().errno(), Some(EIO), "{offset} {len} {direct}");
        }
        // Both sides of the new end: the reply says where it failed.
        let cookie = client.send(cmd::READ, 0, 3 * MIB, 2 << 20, &[]).unwrap();
        let reply = client.receive().unwrap();
        assert_eq!((reply.cookie, reply.errno), (cookie, EIO));
        assert!(reply.error_offset.is_some_and(|at| (3 * MIB..=4 * MIB).contains(&at)), "{reply:?}");
        // An old client can only be hung up on once the reply has begun; before, it gets the number.
        let mut simple = Client::connect_simple(server.dial(), "v").unwrap();
        assert_eq!(simple.read(5 * MIB, 4096).unwrap_err().errno(), Some(EIO));
        assert!(matches!(simple.read(3 * MIB, 2 << 20), Err(NbdError::Io(_) | NbdError::Errno(EIO))));
        let map = client.block_status(0, 8 << 20, 0).unwrap();
        assert!(!map.is_empty());
        load.check_all(&mut client);
        // What was cut off cannot be made stable, nor is the file made longer again: that would give noise for what was
        // acknowledged, and say nothing.
        assert_eq!(client.flush().unwrap_err().errno(), Some(EIO));
        assert_eq!(client.write(6 * MIB, &pattern::bytes(8, 0, 8192)).unwrap_err().errno(), Some(EIO));
        assert_eq!(fs::metadata(&path).unwrap().len(), 4 * MIB);
        assert_eq!(client.read(4 * MIB, 512).unwrap_err().errno(), Some(EIO));
        assert_eq!(server.status(&place)["servers"][0]["volumes"][0]["state"], "data_lost");
        works(&mut server.client("other"), 6);
        assert!(server.is_running());
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(4), "{}", server.log());
    }
}

#[test]
fn a_disk_that_cannot_be_written_is_served_read_only_or_not_at_all() {
    let place = Place::new();
    let Some(mount) = small_filesystem(&place, "4m") else { return };
    place.sparse("disk/v.img", MIB);
    place.raw_key("v.raw", 64, 1);
    let arguments = ["--key", "raw:v.raw", "disk/v.img"];
    let data = pattern::bytes(3, 0, 4096);
    let server = place.serve(arguments);
    server.client("v").write(8192, &data).unwrap();
    server.stop();
    inlinecrypt_testkit::undo::run(Command::new("mount").args(["-o", "remount,ro"]).arg(mount.path()))
        .unwrap();

    let refused = place.run([&["serve"], &arguments[..]].concat());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("disk/v.img is not writable") && said.contains("--read-only"), "{said}");

    let server = place.serve([&["--read-only"], &arguments[..]].concat());
    let mut client = server.client("v");
    assert!(client.read(8192, 4096).unwrap() == data);
    // Not permitted; or, since they were never offered, invalid.
    assert_eq!(client.write(0, &data).unwrap_err().errno(), Some(1));
    assert!(matches!(client.trim(0, 4096).unwrap_err().errno(), Some(1 | 22)));
    assert!(matches!(client.write_zeroes(0, 4096, 0).unwrap_err().errno(), Some(1 | 22)));
    assert!(client.read(8192, 4096).unwrap() == data);
    server.stop();
    mount.unmount().unwrap();
}

/// A device that takes writes and cannot keep them: a loop device over a sparse file where there is no room.
#[test]
fn a_failed_flush_is_told_and_never_forgotten() {
    let place = Place::new();
    if !may_loop() || require_tool("losetup").is_none() {
        return;
    }
    let Some(mount) = small_filesystem(&place, "2m") else { return };
    place.sparse("disk/device", 16 * MIB);
    fs::write(place.path("disk/filler"), vec![1; 1 << 20]).unwrap();
    let device = LoopDevice::new(&place.path("disk/device"), &[]).unwrap();
    let config = two_volumes(&place, device.path().to_str().unwrap(), "");
    let mut server = place.serve_config(&config);
    let mut client = server.client("v");
    for at in 0..6 {
        // The page cache takes it, unless the kernel has noticed already.
        if let Err(error) = client.write(at * MIB, &pattern::bytes(1, at * MIB, 1 << 20)) {
            assert!(matches!(error.errno(), Some(EIO | ENOSPC)), "{error}");
        }
    }
    let failed = |error: NbdError| assert!(matches!(error.errno(), Some(EIO | ENOSPC)), "{error}");
    failed(client.flush().unwrap_err());
    // Others hear of it, too, also once there is room: what was lost stays lost.
    failed(server.client("v").flush().unwrap_err());
    fs::remove_file(place.path("disk/filler")).unwrap();
    failed(client.flush().unwrap_err());
    failed(client.request(cmd::WRITE, cmd::FLAG_FUA, 0, 512, &[1; 512]).unwrap_err());
    let status = server.status(&place);
    let volumes = &status["servers"][0]["volumes"];
    assert_eq!((&volumes[0]["state"], &volumes[1]["state"]), (&"data_lost".into(), &"ok".into()), "{status}");
    works(&mut server.client("other"), 6);
    drop(client);

    server.signal(Signal::TERM);
    let status = server.wait();
    assert_eq!(status.code(), Some(4), "{}", server.log());
    assert!(server.log().contains("not all data could be made stable"), "{}", server.log());
    drop(server);
    device.detach().unwrap();
    mount.unmount().unwrap();
}

#[test]
fn a_server_that_is_told_to_stop_answers_and_flushes_what_it_took() {
    let mut random = seed();
    let place = Place::new();
    let config = {
        place.raw_key("v.raw", 64, 1);
        place.sparse("v.img", 4 * MIB);
        "[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\n"
    };
    let mut loads: Vec<Load> =
        (0..4).map(|number| Load::new(random ^ number, number * MIB, MIB, Habits::WRITES)).collect();
    let mut server = place.serve_config(config);
    for load in &mut loads {
        load.fill(&mut server.client("v"));
    }
    let mut answered = 0;
    for (round, signal) in [Signal::TERM, Signal::INT].into_iter().cycle().take(8).enumerate() {
        let config = format!("{config}server: workers = {}\n", round % 3);
        let delay = Duration::from_micros(pattern::splitmix64(&mut random) % 30_000);
        thread::scope(|scope| {
            for load in &mut loads {
                let mut client = server.client("v");
                scope.spawn(move || {
                    let ended = load.run(&mut client, || false);
                    assert!(matches!(ended, Err(NbdError::Io(_))), "{ended:?}");
                    let ended = load.finish(&mut client);
                    assert!(matches!(ended, Ok(()) | Err(NbdError::Io(_))), "{ended:?}");
                });
            }
            thread::sleep(delay);
            server.signal(signal);
            let status = server.wait();
            assert!(status.success(), "{status}: {}", server.log());
        });
        assert!(!server.socket.exists() && !place.path("control").exists());
        for load in &mut loads {
            load.give_up();
            answered += std::mem::take(&mut load.answered);
        }
        server = place.serve_config(&config);
        for load in &mut loads {
            load.check_all(&mut server.client("v"));
        }
    }
    assert!(answered > 0);
    server.stop();
}

/// Where the service manager listens for readiness.
fn notify_socket(place: &Place) -> (UnixDatagram, String) {
    let path = place.path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    (socket, path.to_str().unwrap().to_owned())
}

/// Waits for a message that has this line.
fn wait_for_message(socket: &UnixDatagram, line: &str) {
    let mut bytes = [0; 4096];
    loop {
        let len = socket.recv(&mut bytes).unwrap_or_else(|error| panic!("{line} never came: {error}"));
        if String::from_utf8_lossy(&bytes[..len]).lines().any(|told| told == line) {
            return;
        }
    }
}

#[test]
fn a_second_signal_ends_a_server_that_waits_for_its_clients() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let place = Place::new();
        let (notify, name) = notify_socket(&place);
        place.raw_key("v.raw", 64, 1);
        place.sparse("v.img", 32 * MIB);
        let path = place.write_config(
            "[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\nserver: stop_seconds = 100000\n",
        );
        let mut command = place.command();
        command.args(["serve", "--config"]).arg(path).env("NOTIFY_SOCKET", name);
        let mut server = place.start(command);
        wait_for_message(&notify, "READY=1");
        // Asks for more than a socket holds, and does not take it.
        let mut client = server.client("v");
        client.send(cmd::READ, 0, 0, 32 << 20, &[]).unwrap();
        eventually("the server is sending", || {
            rustix::io::ioctl_fionread(client.stream()).is_ok_and(|bytes| bytes > 0)
        });
        server.signal(signal);
        wait_for_message(&notify, "STOPPING=1");
        assert!(UnixStream::connect(&server.socket).is_err() || server.is_running());
        assert!(server.is_running());
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(code));
        drop(server);
        // Whatever it left behind is no obstacle.
        place.serve(["--key", "raw:v.raw", "v.img"]).stop();
    }
}

#[test]
fn a_thousand_clients_are_served_at_once() {
    const COUNT: usize = 1000;
    let limit = getrlimit(Resource::Nofile);
    let needed = COUNT as u64 + 200;
    if limit.maximum.is_some_and(|maximum| maximum < needed) {
        crate::rig::skip("the limit on open files is too low");
        return;
    }
    // Lower only if it was: other tests run at the same time.
    if limit.current.is_some_and(|current| current < needed) {
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    }
    let place = Place::new();
    let server = place.serve(["--create", "8MiB", "v.img"]);
    let mut clients: Vec<Client<UnixStream>> = (0..COUNT).map(|_| server.client("v")).collect();
    let offset = |index: usize| index as u64 * 4608;
    for (index, client) in clients.iter_mut().enumerate() {
        let data = pattern::bytes(index as u64, 0, 1024);
        client.send(cmd::WRITE, 0, offset(index), 1024, &data).unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.receive().unwrap().errno, 0);
    }
    for (index, client) in clients.iter_mut().enumerate() {
        // Everybody reads what his neighbour wrote.
        let neighbour = (index + 1) % COUNT;
        assert!(client.read(offset(neighbour), 1024).unwrap() == pattern::bytes(neighbour as u64, 0, 1024));
    }
    let status = server.status(&place);
    assert_eq!(status["servers"][0]["connections"]["now"], COUNT, "{status}");
    let (resident, most) = server.resident_kib();
    eprintln!("{resident} KiB resident with {COUNT} clients, {most} at most");

    // More than it takes: those are turned away, and nobody else notices.
    let more: Vec<Client<UnixStream>> =
        (0..100).filter_map(|_| Client::connect(dial(&server.socket), "v").ok()).collect();
    assert_eq!(more.len(), 24);
    assert!(clients[0].read(offset(0), 1024).unwrap() == pattern::bytes(0, 0, 1024));
    drop((clients, more));
    eventually("all are gone", || server.status(&place)["servers"][0]["connections"]["now"] == 0);
    works(&mut server.client("v"), 9);
    server.stop();
}

/// What clients say before they fall silent or go.
fn rude_beginnings() -> Vec<Vec<u8>> {
    let mut greeted = 3u32.to_be_bytes().to_vec();
    let options = greeted.clone();
    greeted.extend(b"IHAVEOPT");
    let mut endless_option = greeted.clone();
    endless_option.extend([0, 0, 0, 7, 0, 0, 16, 0]);
    vec![Vec::new(), vec![0], options, greeted, endless_option, b"GET / HTTP/1.1\r\n\r\n".to_vec()]
}

#[test]
fn clients_that_fall_silent_or_vanish_disturb_nobody() {
    let seed = seed();
    for workers in [0, 2] {
        let place = Place::new();
        place.raw_key("v.raw", 64, 1);
        place.sparse("v.img", 16 * MIB);
        let mut server = place.serve_config(&format!(
            "[[volume]]\npath = \"v.img\"\nkey = \"raw:v.raw\"\nserver: workers = {workers}\n"
        ));
        // The stretch of those who vanish. What they wrote in full is there, the rest is old or new.
        let mut theirs = Load::new(seed ^ 1, 8 * MIB, 8 * MIB, Habits::WRITES);
        theirs.fill(&mut server.client("v"));
        let over = Until::default();
        let mut silent = Vec::new();
        thread::scope(|scope| {
            let (place, server, over) = (&place, &server, &over);
            let good = scope.spawn(move || {
                let mut client = server.client("v");
                let mut load = Load::new(seed, 0, 8 * MIB, Habits::MIXED);
                load.fill(&mut client);
                load.run(&mut client, || over.is_over()).unwrap();
                load.check_all(&mut client);
                assert!(load.answered > 0);
            });
            let until = over.guard();
            for round in 0..20 {
                for beginning in rude_beginnings() {
                    let mut stream = server.dial();
                    stream.write_all(&beginning).unwrap();
                    if round % 2 == 0 { silent.push(stream) } else { drop(stream) }
                }
                // In the middle of a header, of a short and of a long payload; with replies on their way.
                for (len, sent) in
                    [(0, 11), (512, 28 + 100), (1 << 20, 28 + (700 << 10)), (8 << 20, 28 + (5 << 20))]
                {
                    let mut client = server.client("v");
                    let offset = 8 * MIB;
                    let mut request = request_header(cmd::WRITE, 0, 1, offset, len).to_vec();
                    request.extend(theirs.shadow.begin(offset, len.into()).1);
                    request.resize(request.len().max(sent), 0);
                    client.send(cmd::READ, 0, 8 * MIB, 1 << 16, &[]).unwrap();
                    client.stream().write_all(&request[..sent]).unwrap();
                    match round % 3 {
                        0 => silent.push(client.into_stream()),
                        1 => drop(client),
                        // Does not send any more, and still listens.
                        _ => client.stream().shutdown(Shutdown::Write).unwrap(),
                    }
                }
            }
            theirs.check_all(&mut server.client("v"));
            drop(until);
            good.join().unwrap();
            assert!(server.status(place)["servers"][0]["connections"]["now"].as_u64().unwrap() >= 40);
        });
        assert!(server.is_running());
        // Those who are silent do not keep it from stopping.
        server.stop();
        drop(silent);
    }
}

#[test]
fn sockets_and_readiness_are_those_of_the_service_manager() {
    if require_tool("sh").is_none() {
        return;
    }
    let place = Place::new();
    place.run_ok(["volume", "create", "--size", "4MiB", "v.img"]);
    let listener = UnixListener::bind(place.path("nbd.sock")).unwrap();
    // A readiness socket in the abstract namespace, as in containers.
    let name = format!("inlinecrypt-test-{}-{}", std::process::id(), place.path("x").display());
    let notify = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    // The shell keeps its number when it becomes the server.
    let mut command = Command::new("sh");
    place.prepare(&mut command);
    command
        .args(["-c", "export LISTEN_PID=$$; exec \"$@\" 3<&0 0</dev/null", "sh"])
        .args([env!("CARGO_BIN_EXE_inlinecrypt"), "serve", "--control", "control", "v.img"])
        .envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "nbd"), ("NOTIFY_SOCKET", &format!("@{name}"))])
        .stdin(OwnedFd::from(listener.try_clone().unwrap()));
    let mut server = place.start(command);
    wait_for_message(&notify, "READY=1");
    assert!(!place.path("v.img.sock").exists(), "a socket that nobody asked for");
    works(&mut server.client("v"), 3);
    server.signal(Signal::TERM);
    wait_for_message(&notify, "STOPPING=1");
    assert!(server.wait().success());
    // The name is the manager's to remove, and it still listens: the next server goes on with it.
    assert!(server.socket.exists());
    drop(server);
    let waiting = dial(&place.path("nbd.sock"));
    let mut command = Command::new("sh");
    place.prepare(&mut command);
    command
        .args(["-c", "export LISTEN_PID=$$; exec \"$@\" 3<&0 0</dev/null", "sh"])
        .args([env!("CARGO_BIN_EXE_inlinecrypt"), "serve", "--control", "control", "v.img"])
        .env("LISTEN_FDS", "1")
        .stdin(OwnedFd::from(listener));
    let server = place.start(command);
    let mut client = Client::connect(waiting, "v").unwrap();
    assert_eq!(client.export().size, 4 * MIB);
    client.read(0, 4096).unwrap();
    drop(server);
}

/// The same with the service manager's own program.
#[test]
fn systemd_socket_activate_hands_a_socket_over() {
    let program = Path::new("/usr/bin/systemd-socket-activate");
    if !program.exists() {
        eprintln!("SKIPPED: systemd-socket-activate is not installed");
        return;
    }
    let place = Place::new();
    place.run_ok(["volume", "create", "--size", "4MiB", "v.img"]);
    let mut command = Command::new(program);
    place.prepare(&mut command);
    command
        .arg("--listen")
        .arg(place.path("nbd.sock"))
        .args(["--setenv=INLINECRYPT_HOME", "--setenv=PATH"])
        .args([env!("CARGO_BIN_EXE_inlinecrypt"), "serve", "--control", "control", "v.img"]);
    let server = place.start(command);
    works(&mut server.client("v"), 3);
    drop(server);
}
