//! Listeners on sockets in directories of their own and on ports of this machine that the system chooses.

use super::*;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::thread;
use std::time::Instant;
use tempfile::TempDir;

/// Set for a test that runs itself again in a process of its own.
const CHILD: &str = "INLINECRYPT_TEST_CHILD";

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory for temporary files")
}

fn bind_default(path: &Path) -> Result<Listener, Error> {
    Listener::bind(&Listen::Unix(path.to_owned()), ListenOptions::default())
}

fn files_in(directory: &TempDir) -> Vec<OsString> {
    fs::read_dir(directory.path())
        .expect("our own")
        .map(|entry| entry.expect("our own").file_name())
        .collect()
}

/// Leaves a socket behind that nobody listens on.
fn leave_stale(path: &Path) {
    let socket = UnixListener::bind(path).expect("a free name");
    // Programs that other tests start have a copy of it for a moment; that must not listen either.
    rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).expect("it listened");
}

fn accept(listener: &Listener) -> Stream {
    listener.accept().unwrap_or_else(|error| panic!("{}", error.chain())).expect("not stopped")
}

/// Sends a byte there and back.
fn talk(mut client: impl Read + Write, server: &Stream) {
    client.write_all(b"?").expect("connected");
    let mut byte = [0];
    (&*server).read_exact(&mut byte).expect("connected");
    assert_eq!(byte, *b"?");
    (&*server).write_all(b"!").expect("connected");
    client.read_exact(&mut byte).expect("connected");
    assert_eq!(byte, *b"!");
}

#[test]
fn places_are_read_and_written_the_same() {
    let tcp = |host: &str, port| Listen::Tcp { host: host.to_owned(), port };
    for (text, place, written) in [
        ("unix:/run/vol.sock", Listen::Unix("/run/vol.sock".into()), "unix:/run/vol.sock"),
        ("unix:a:b", Listen::Unix("a:b".into()), "unix:a:b"),
        ("tcp:localhost", tcp("localhost", 10809), "tcp:localhost:10809"),
        ("tcp:127.0.0.1:0", tcp("127.0.0.1", 0), "tcp:127.0.0.1:0"),
        ("tcp:[::1]", tcp("::1", 10809), "tcp:[::1]:10809"),
        ("tcp:[fe80::1]:7", tcp("fe80::1", 7), "tcp:[fe80::1]:7"),
    ] {
        let parsed: Listen = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(parsed, place);
        assert_eq!(parsed.to_string(), written);
        assert_eq!(written.parse::<Listen>().expect("what we write"), place);
    }
    for (text, hint) in [
        ("unix:", "path is missing"),
        ("/run/vol.sock", "neither"),
        ("", "neither"),
        ("tcp:", "host is missing"),
        ("tcp::10809", "host is missing"),
        ("tcp:[]:1", "host is missing"),
        ("tcp:::1", "in brackets"),
        ("tcp:[::1", "closing bracket"),
        ("tcp:[::1]10809", "behind the bracket"),
        ("tcp:host:65536", "not a number"),
        ("tcp:host:", "not a number"),
        ("tcp:host:-1", "not a number"),
    ] {
        let error = text.parse::<Listen>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
        assert!(error.to_string().contains(hint), "{text}: {error}");
    }
}

#[test]
fn a_unix_client_is_served_and_known() {
    let directory = directory();
    let path = directory.path().join("vol.sock");
    let listener = bind_default(&path).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(listener.place(), Listen::Unix(path.clone()));
    let client = UnixStream::connect(&path).expect("it listens");
    let server = accept(&listener);
    server.set_nodelay().expect("nothing to do");
    talk(&client, &server);
    talk(&client, &server.try_clone().expect("descriptors left"));

    let text = server.peer().to_string();
    assert!(text.starts_with(&format!("process {} (", std::process::id())), "{text}");
    server.shutdown(Shutdown::Both).expect("connected");
    assert_eq!((&client).read(&mut [0]).expect("the end"), 0);

    drop(listener);
    assert!(files_in(&directory).is_empty(), "removed when it stops");
}

#[test]
fn a_tcp_client_is_served_and_known() {
    let any = "tcp:127.0.0.1:0".parse().expect("valid");
    let listener = Listener::bind(&any, ListenOptions::default()).expect("a free port");
    let Listen::Tcp { host, port } = listener.place() else { panic!("{}", listener.place()) };
    assert!(host == "127.0.0.1" && port != 0);
    let client = TcpStream::connect((host.as_str(), port)).expect("it listens");
    let server = accept(&listener);
    server.set_nodelay().expect("connected");
    talk(&client, &server);
    assert_eq!(server.peer(), Peer::Tcp(client.local_addr().expect("connected")));

    let taken = Listen::Tcp { host, port };
    let error = Listener::bind(&taken, ListenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{}", error.chain());
    assert!(error.to_string().contains(&taken.to_string()), "{error}");
}

/// The mode is exact even where the umask would take bits away, as the usual 022 does.
#[test]
fn a_unix_socket_has_the_mode_that_was_asked_for() {
    let directory = directory();
    for unix_mode in [0o600, 0o660, 0o666] {
        let path = directory.path().join(format!("{unix_mode:o}"));
        let place = Listen::Unix(path.clone());
        let _listener = Listener::bind(&place, ListenOptions { unix_mode }).expect("a free name");
        let metadata = fs::symlink_metadata(&path).expect("it is there");
        assert_eq!(metadata.permissions().mode() & 0o7777, unix_mode);
    }
}

#[test]
fn everyone_who_waits_is_stopped_and_stays_so() {
    let directory = directory();
    let listener = bind_default(&directory.path().join("vol.sock")).expect("a free name");
    let stopper = listener.stopper();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| listener.accept())).collect();
        thread::sleep(Duration::from_millis(20));
        stopper.stop();
        for thread in waiting {
            assert!(thread.join().expect("no panic").expect("no error").is_none());
        }
    });
    assert!(listener.accept().expect("no error").is_none());
}

#[test]
fn each_client_is_accepted_once_however_many_wait() {
    const CLIENTS: usize = 40;
    let directory = directory();
    let path = directory.path().join("vol.sock");
    let listener = bind_default(&path).expect("a free name");
    let accepted = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(_client) = listener.accept().expect("no error") {
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let clients: Vec<_> = (0..CLIENTS).map(|_| UnixStream::connect(&path).expect("it listens")).collect();
        for mut client in clients {
            // Closed once accepted.
            assert_eq!(client.read(&mut [0]).expect("the end"), 0);
        }
        listener.stopper().stop();
    });
    assert_eq!(accepted.into_inner() as usize, CLIENTS);
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let directory = directory();
    let path = directory.path().join("vol.sock");
    leave_stale(&path);
    let stale = Inode::at(&path).expect("left behind");
    let listener = bind_default(&path).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_ne!(Inode::at(&path).expect("ours"), stale);
    talk(UnixStream::connect(&path).expect("it listens"), &accept(&listener));
    assert_eq!(files_in(&directory), ["vol.sock"], "nothing else is left");
}

#[test]
fn a_socket_that_somebody_listens_on_is_left_to_him() {
    let directory = directory();
    let path = directory.path().join("vol.sock");
    let first = bind_default(&path).expect("a free name");
    let error = bind_default(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let command = fs::read_to_string("/proc/self/comm").expect("proc");
    let who = format!("process {} ({}) listens there", std::process::id(), command.trim());
    assert!(error.to_string().contains(&who), "{error}");
    // The probe was a client that left again; the next one is served.
    drop(accept(&first));
    talk(UnixStream::connect(&path).expect("it listens"), &accept(&first));
    assert_eq!(files_in(&directory), ["vol.sock"]);
}

#[test]
fn what_is_not_a_socket_is_never_touched() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "precious").expect("our own");
    fs::create_dir(at("directory")).expect("our own");
    leave_stale(&at("socket"));
    std::os::unix::fs::symlink(at("socket"), at("link")).expect("our own");
    for name in ["file", "directory", "link"] {
        let before = Inode::at(&at(name)).expect("there");
        let error = bind_default(&at(name)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{name}");
        assert!(error.to_string().contains("left alone"), "{error}");
        assert_eq!(Inode::at(&at(name)).expect("there"), before);
    }
    assert_eq!(fs::read(at("file")).expect("our own"), b"precious");
    assert_eq!(files_in(&directory).len(), 4, "nothing of ours is left");
}

#[test]
fn a_name_that_is_somebody_elses_by_now_is_not_removed() {
    let directory = directory();
    let path = directory.path().join("vol.sock");
    let first = bind_default(&path).expect("a free name");
    fs::remove_file(&path).expect("our own");
    let second = bind_default(&path).expect("free again");
    drop(first);
    talk(UnixStream::connect(&path).expect("the second one listens"), &accept(&second));
    fs::remove_file(&path).expect("our own");
    drop(second);
    assert!(files_in(&directory).is_empty());
}

#[test]
fn a_path_may_be_as_long_as_the_system_takes_and_no_longer() {
    let directory = directory();
    let room = SUN_PATH_MAX - directory.path().as_os_str().len() - 1;
    let longest = directory.path().join("s".repeat(room));
    let listener = bind_default(&longest).unwrap_or_else(|error| panic!("{}", error.chain()));
    talk(UnixStream::connect(&longest).expect("it listens"), &accept(&listener));
    let error = bind_default(&directory.path().join("s".repeat(room + 1))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("108 bytes long"), "{error}");

    let missing = bind_default(&directory.path().join("missing/vol.sock")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{}", missing.chain());
}

/// Of many that start at once, on a stale name or on none, one gets it, and the others leave nothing.
#[test]
fn of_many_starters_one_wins() {
    const STARTERS: usize = 6;
    for round in 0..30 {
        let directory = directory();
        let path = directory.path().join("vol.sock");
        if round % 2 == 0 {
            leave_stale(&path);
        }
        let start = Barrier::new(STARTERS);
        let results: Vec<_> = thread::scope(|scope| {
            let starters: Vec<_> = (0..STARTERS)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        bind_default(&path)
                    })
                })
                .collect();
            starters.into_iter().map(|starter| starter.join().expect("no panic")).collect()
        });
        let (winners, losers): (Vec<_>, Vec<_>) = results.into_iter().partition(|result| result.is_ok());
        assert_eq!(winners.len(), 1, "{losers:?}");
        for loser in losers {
            assert_eq!(loser.unwrap_err().kind(), ErrorKind::Busy);
        }
        assert_eq!(files_in(&directory), ["vol.sock"]);
        UnixStream::connect(&path).expect("the winner listens");
    }
}

/// Runs this very test again in a process of its own, set up by a shell.
fn again(test: &str, script: &str) -> Command {
    let mut command = Command::new("sh");
    let name = format!("listen::tests::{test}");
    command.args(["-c", &format!("{script} exec \"$0\" \"$@\"")]);
    command.arg(std::env::current_exe().expect("we run")).args(["--exact", &name, "--nocapture"]);
    command.env(CHILD, "1");
    command
}

#[test]
fn sockets_of_the_service_manager_are_taken_over() {
    if std::env::var_os(CHILD).is_some() {
        let listeners = Listener::activated().unwrap_or_else(|error| panic!("{}", error.chain()));
        let [(first_name, first), (second_name, second)] = &listeners[..] else { panic!("{listeners:?}") };
        assert_eq!((first_name.as_str(), second_name.as_str()), ("disk", "net"));
        assert!(matches!(first.place(), Listen::Unix(_)) && matches!(second.place(), Listen::Tcp { .. }));
        for listener in [first, second] {
            (&accept(listener)).write_all(b"served").expect("connected");
        }
        assert!(Listener::activated().expect("once").is_empty(), "handed over once");
        return;
    }
    assert!(Listener::activated().expect("nobody handed us any").is_empty());

    let directory = directory();
    let path = directory.path().join("vol.sock");
    let unix = UnixListener::bind(&path).expect("a free name");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = tcp.local_addr().expect("bound").port();
    let test = "sockets_of_the_service_manager_are_taken_over";
    let handing_over = "exec 3<&0 4<&2 2>&1 0</dev/null; LISTEN_PID=$$; export LISTEN_PID;";
    let child = again(test, handing_over)
        .env("LISTEN_FDS", "2")
        .env("LISTEN_FDNAMES", "disk:net")
        .stdin(OwnedFd::from(unix))
        .stderr(OwnedFd::from(tcp))
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut text = String::new();
    // They wait in the queue until served.
    UnixStream::connect(&path).and_then(|mut client| client.read_to_string(&mut text)).expect("served");
    TcpStream::connect(("127.0.0.1", port))
        .and_then(|mut client| client.read_to_string(&mut text))
        .expect("served");
    assert_eq!(text, "servedserved");
    let output = child.wait_with_output().expect("ours");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(path.exists(), "not ours to remove");
}

#[test]
fn what_the_service_manager_hands_over_must_listen() {
    if std::env::var_os(CHILD).is_some() {
        let error = Listener::activated().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains("socket 'unknown'"), "{}", error.chain());
        return;
    }
    let (ours, _theirs) = UnixStream::pair().expect("descriptors left");
    let status = again(
        "what_the_service_manager_hands_over_must_listen",
        "exec 3<&0 0</dev/null; LISTEN_PID=$$; export LISTEN_PID;",
    )
    .env("LISTEN_FDS", "1")
    .stdin(OwnedFd::from(ours))
    .output()
    .expect("a shell");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
}

#[test]
fn the_service_manager_is_told() {
    if std::env::var_os(CHILD).is_some() {
        notify_ready().expect("reachable");
        notify_stopping().expect("reachable");
        return;
    }
    notify_ready().expect("nobody to tell");
    let directory = directory();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a free name");
    let output =
        again("the_service_manager_is_told", "").env("NOTIFY_SOCKET", &path).output().expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    manager.set_nonblocking(true).expect("ours");
    let told: Vec<String> = std::iter::from_fn(|| {
        let mut data = [0; 64];
        let len = manager.recv(&mut data).ok()?;
        Some(String::from_utf8_lossy(&data[..len]).trim().to_owned())
    })
    .collect();
    assert_eq!(told, ["READY=1", "STOPPING=1"]);
}

/// Out of descriptors, clients wait, and a loop that keeps trying does not spin.
#[test]
fn out_of_descriptors_clients_wait_and_nobody_spins() {
    if std::env::var_os(CHILD).is_none() {
        let test = "out_of_descriptors_clients_wait_and_nobody_spins";
        let output = again(test, "ulimit -n 64;").output().expect("a shell");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let directory = directory();
    let path = directory.path().join("vol.sock");
    let listener = bind_default(&path).expect("a free name");
    let client = UnixStream::connect(&path).expect("it listens");
    let hoard: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok()).collect();
    assert!(!hoard.is_empty());
    let start = Instant::now();
    let error = listener.accept().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Backing);
    assert!(start.elapsed() >= PAUSE, "{:?}", start.elapsed());
    drop(hoard);
    talk(&client, &accept(&listener));
}

/// Where names cannot be swapped: by a link, which replaces nothing either.
#[test]
fn without_swapping_a_socket_gets_its_name_by_a_link() {
    let directory = directory();
    let path = directory.path().join("vol.sock");
    let stage = || {
        let staging = staging_path(&path, OsStr::new("vol.sock"));
        let socket = UnixListener::bind(&staging).expect("a free name");
        (
            socket,
            Name { inode: Inode::at(&staging).expect("it is there"), path: staging, claim: Claim::new(true) },
        )
    };
    // A fresh name.
    let (socket, staged) = stage();
    assert!(publish_by_link(&staged, &path, None).expect("links"));
    assert_eq!(files_in(&directory), ["vol.sock"], "and its first name is gone");
    UnixStream::connect(&path).expect("it listens");
    // Taken meanwhile, whether it was free or another's when we looked.
    let (_other, late) = stage();
    assert!(!publish_by_link(&late, &path, None).expect("links"));
    assert!(!publish_by_link(&late, &path, Some(late.inode)).expect("links"));
    assert_eq!(Inode::at(&path).expect("it is there"), staged.inode, "left alone");
    // A socket that nobody listens on makes way.
    rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).expect("it listened");
    assert!(publish_by_link(&late, &path, Some(staged.inode)).expect("links"));
    UnixStream::connect(&path).expect("it listens");
    assert_eq!(files_in(&directory), ["vol.sock"]);
    // Or has gone by itself.
    let (_third, staged) = stage();
    fs::remove_file(&path).expect("it is there");
    assert!(!publish_by_link(&staged, &path, Some(late.inode)).expect("links"), "to be looked at again");
}
