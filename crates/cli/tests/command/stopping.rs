use crate::place::{PATIENCE, Place, assert_same};
use rustix::process::Signal;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};

#[test]
fn each_signal_stops_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let place = Place::new();
        place.create("v.img");
        let mut server = place.serve("v.img.sock", ["v.img"]);
        server.greeting();
        let mut client = server.client("");
        client.write(0, &[5; 4096]).unwrap();
        server.signal(signal);
        assert_eq!(server.process.wait(PATIENCE).unwrap().code(), Some(0), "{}", server.err());
        assert!(!place.path("v.img.sock").exists());
        assert!(client.read(0, 512).is_err());
        let server = place.serve("v.img.sock", ["v.img"]);
        assert_same(&server.client("").read(0, 4096).unwrap(), &[5; 4096]);
        server.stop();
    }
}

#[test]
fn requests_that_were_received_are_answered() {
    let place = Place::new();
    place.create("v.img");
    let server = place.serve("v.img.sock", ["v.img"]);
    server.greeting();
    let mut client = server.client("");
    let sent: Vec<u64> = (0..64).map(|i| client.send(1, 0, i * 4096, 4096, &[7; 4096]).unwrap()).collect();
    // Once one is answered, the rest are on their way or in the socket.
    let mut answered = vec![client.receive().unwrap()];
    server.signal(Signal::TERM);
    while let Ok(reply) = client.receive() {
        answered.push(reply);
    }
    let written: Vec<u64> =
        answered.iter().filter(|reply| reply.errno == 0).map(|reply| reply.cookie).collect();
    drop(client);
    server_ended(server);
    let server = place.serve("v.img.sock", ["v.img"]);
    let mut client = server.client("");
    for (offset, cookie) in (0..).step_by(4096).zip(&sent) {
        if written.contains(cookie) {
            assert_same(&client.read(offset, 4096).unwrap(), &[7; 4096]);
        }
    }
    server.stop();
}

fn server_ended(mut server: crate::place::Server) {
    assert_eq!(server.process.wait(PATIENCE).unwrap().code(), Some(0), "{}", server.err());
}

#[test]
fn the_second_signal_ends_it_at_once() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "64M", "v.img"]).done();
    place.write("c.toml", b"[[volume]]\npath = \"v.img\"\n[server]\nstop_seconds = 3600\n");
    let mut server = place.serve("v.img.sock", ["--config", "c.toml"]);
    server.greeting();
    // A client that asks for much and takes nothing.
    let mut client = server.client("");
    client.send_header(0, 0, 0, 32 << 20).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    server.signal(Signal::TERM);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(server.process.child().try_wait().unwrap().is_none(), "it waits for the client");
    server.signal(Signal::TERM);
    assert_eq!(server.process.wait(PATIENCE).unwrap().code(), Some(128 + 15));
    drop(client);
}

#[test]
fn a_client_that_takes_nothing_is_cut_off_in_time() {
    let place = Place::new();
    place.run(["volume", "create", "--size", "64M", "v.img"]).done();
    place.write("c.toml", b"[[volume]]\npath = \"v.img\"\n[server]\nstop_seconds = 1\n");
    let server = place.serve("v.img.sock", ["--config", "c.toml"]);
    let mut client = server.client("");
    client.send_header(0, 0, 0, 32 << 20).unwrap();
    assert!(server.stop().contains("did not end in time"));
    drop(client);
}

#[test]
fn the_service_manager_is_told() {
    let place = Place::new();
    place.create("v.img");
    let socket = UnixDatagram::bind(place.path("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = place.command();
    command.args(["serve", "v.img"]).env("NOTIFY_SOCKET", place.path("notify"));
    let server = place.start("v.img.sock", command);
    let told = || {
        let mut bytes = [0; 256];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    assert!(told().contains("READY=1"));
    server.signal(Signal::TERM);
    assert!(told().contains("STOPPING=1"));
    server_ended(server);
}

#[test]
fn sockets_of_the_service_manager_are_served_and_left_where_they_are() {
    let place = Place::new();
    place.create("v.img");
    let listener = UnixListener::bind(place.path("handed")).unwrap();
    let command = place.command();
    // The protocol wants the socket as descriptor 3, and its own process id in the environment.
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve v.img 3<&0 </dev/null"])
        .arg(env!("CARGO_BIN_EXE_inlinecrypt"))
        .env_clear()
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .current_dir(place.folder())
        .stdin(Stdio::from(OwnedFd::from(listener)));
    let server = place.start("handed", shell);
    server.client("").read(0, 512).unwrap();
    let greeting = server.greeting();
    assert!(greeting.contains("/handed\n"), "{greeting}");
    assert!(!place.path("v.img.sock").exists(), "none is made beside it");
    server.stop();
    assert!(place.path("handed").exists(), "it is the service manager's");
}

#[test]
fn a_reader_of_the_greeting_that_goes_does_not_take_the_server_along() {
    let place = Place::new();
    place.create("v.img");
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let mut command = place.command();
    command.args(["serve", "v.img"]).stdout(Stdio::from(OwnedFd::from(theirs))).stderr(Stdio::null());
    let mut server =
        inlinecrypt_testkit::ServerProcess::start_at(&mut command, &place.path("v.img.sock"), PATIENCE)
            .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(server.child().try_wait().unwrap().is_none());
    let mut hello = UnixStream::connect(place.path("v.img.sock")).unwrap();
    hello.write_all(&[0]).unwrap();
}

#[test]
fn the_limit_on_descriptors_is_raised() {
    let place = Place::new();
    place.create("v.img");
    let mut shell = Command::new("sh");
    let command = place.command();
    shell
        .args(["-c", "ulimit -Sn 64; exec \"$0\" serve v.img"])
        .arg(env!("CARGO_BIN_EXE_inlinecrypt"))
        .env_clear()
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .current_dir(place.folder());
    let server = place.start("v.img.sock", shell);
    let clients: Vec<_> = (0..100).map(|_| server.client("")).collect();
    assert_eq!(clients.len(), 100);
    drop(clients);
    server.stop();
}
