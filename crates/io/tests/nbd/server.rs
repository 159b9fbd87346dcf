//! Listening, limits, and an orderly end.

use super::{PATIENCE, Rig, at_once, eventually, spec};
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions, Stopped};
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::listen::{Listen, ListenOptions, Listener};
use inlinecrypt_testkit::nbd::{NbdError, cmd};
use inlinecrypt_testkit::{Client, temp_dir};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 16 << 20;

#[test]
fn clients_come_in_by_unix_and_tcp_until_the_server_stops() {
    let folder = temp_dir();
    let path = folder.path().join("nbd.sock");
    let rig = Rig::new(RamDisk::new(SIZE));
    rig.server
        .listen(Listener::bind(&Listen::Unix(path.clone()), ListenOptions::default()).unwrap())
        .unwrap();
    let tcp = Listen::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
    let tcp = Listener::bind(&tcp, ListenOptions::default()).unwrap();
    let Listen::Tcp { host, port } = tcp.place() else { panic!("a TCP port was asked for") };
    rig.server.listen(tcp).unwrap();

    let mut local = Client::connect(UnixStream::connect(&path).unwrap(), "disk").unwrap();
    let mut remote = Client::connect(TcpStream::connect((host.as_str(), port)).unwrap(), "disk").unwrap();
    local.write(4096, &[5; 4096]).unwrap();
    assert_eq!(remote.read(4096, 4096).unwrap(), [5; 4096]);

    assert_eq!(rig.server.stop(PATIENCE).unwrap(), Stopped::default());
    assert!(matches!(local.receive(), Err(NbdError::Io(_))));
    assert!(matches!(remote.receive(), Err(NbdError::Io(_))));
    assert!(UnixStream::connect(&path).is_err());
    assert!(TcpStream::connect((host.as_str(), port)).is_err());
    assert!(rig.server.status().stopping);
}

#[test]
fn too_many_connections_are_closed_and_there_is_room_again_when_one_leaves() {
    let folder = temp_dir();
    let path = folder.path().join("nbd.sock");
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    rig.server
        .listen(Listener::bind(&Listen::Unix(path.clone()), ListenOptions::default()).unwrap())
        .unwrap();
    let dial = || Client::connect(UnixStream::connect(&path).unwrap(), "disk");
    let first = dial().unwrap();
    let _second = dial().unwrap();
    assert!(dial().is_err());
    eventually("the refusal is counted", || rig.server.status().connections_refused == 1);
    first.disconnect().unwrap();
    eventually("there is room", || dial().is_ok());
}

/// What clients do not read lies in the kernel's memory: much for a few, little for many.
#[test]
fn only_the_first_connections_get_large_send_buffers() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let room = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let kept = theirs.try_clone().unwrap();
        let usual = rustix::net::sockopt::socket_send_buffer_size(&kept).unwrap();
        rig.server.serve(theirs).unwrap();
        let client = Client::connect(ours, "disk").unwrap();
        (client, rustix::net::sockopt::socket_send_buffer_size(&kept).unwrap() > usual)
    };
    let (clients, large): (Vec<_>, Vec<_>) = (0..70).map(|_| room()).unzip();
    assert_eq!(large, [vec![true; 64], vec![false; 6]].concat());
    drop(clients);
    eventually("all have left", || rig.server.status().connections_now == 0);
    assert!(room().1, "few again");
}

#[test]
fn stopping_answers_what_is_under_way_and_flushes() {
    for (disk, workers, cores) in [
        (RamDisk::new(SIZE), Some(0), 1),
        (RamDisk::new(SIZE), Some(0), 8),
        (RamDisk::new(SIZE), Some(4), 1),
        (at_once(SIZE), None, 1),
    ] {
        let options = ServerOptions { workers, cores, ..ServerOptions::default() };
        let rig = Rig::with_options(disk, options);
        rig.disk.delay(Duration::from_millis(30));
        let mut client = rig.client();
        for index in 0..8 {
            client.send(cmd::WRITE, 0, index * 4096, 4096, &[9; 4096]).unwrap();
        }
        // Received by now, but not done.
        thread::sleep(Duration::from_millis(20));
        let stopped = rig.server.stop(PATIENCE).unwrap();
        assert_eq!(stopped, Stopped::default());
        for _ in 0..8 {
            assert_eq!(client.receive().unwrap().errno, 0);
        }
        assert!(matches!(client.receive(), Err(NbdError::Io(_))));
        assert_eq!(rig.disk.flushes(), 1);
    }
}

#[test]
fn a_tcp_client_that_goes_on_and_on_is_told_to_stop() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let tcp = Listen::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
    let tcp = Listener::bind(&tcp, ListenOptions::default()).unwrap();
    let Listen::Tcp { host, port } = tcp.place() else { panic!("a TCP port was asked for") };
    rig.server.listen(tcp).unwrap();
    let mut client = Client::connect(TcpStream::connect((host.as_str(), port)).unwrap(), "disk").unwrap();
    let server = rig.server.clone();
    let stopping = thread::spawn(move || server.stop(PATIENCE));
    // Either told (ESHUTDOWN), or found with nothing under way and disconnected; never served for ever.
    for _ in 0..32 {
        let _ = client.send(cmd::WRITE, 0, 0, 4096, &[1; 4096]);
    }
    let told = loop {
        if client.send(cmd::WRITE, 0, 0, 4096, &[1; 4096]).is_err() {
            break false;
        }
        match client.receive() {
            Ok(reply) if reply.errno == 108 => break true,
            Ok(_) => {}
            Err(_) => break false,
        }
    };
    drop(client);
    assert_eq!(stopping.join().unwrap().unwrap(), Stopped::default(), "told: {told}");
}

#[test]
fn stopping_does_not_wait_for_idle_clients_in_whatever_stage() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let _silent = rig.dial();
    let _greeted = Client::greet(rig.dial()).unwrap();
    let _settled = rig.client();
    let mut in_mid_write = rig.client();
    in_mid_write.send_header(cmd::WRITE, 0, 0, 1 << 20).unwrap();
    let start = Instant::now();
    assert_eq!(rig.server.stop(PATIENCE).unwrap(), Stopped::default());
    assert!(start.elapsed() < PATIENCE / 2);
}

#[test]
fn stopping_cuts_off_who_does_not_read() {
    let plain = || RamDisk::new(SIZE);
    for (disk, workers) in [(plain(), Some(0)), (plain(), Some(2)), (at_once(SIZE), None)] {
        let options = ServerOptions { workers, ..ServerOptions::default() };
        let rig = Rig::with_options(disk, options);
        let mut greedy = rig.client();
        greedy.stream().set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        while greedy.send_header(cmd::READ, 0, 0, 8 << 20).is_ok() {}
        let stopped = rig.server.stop(Duration::from_millis(100)).unwrap();
        assert_eq!(stopped, Stopped { cut_off: 1, abandoned: 0 });
    }
}

#[test]
fn stopping_tells_that_a_disk_does_not_answer() {
    let rig = Rig::new(RamDisk::new(SIZE));
    rig.disk.delay(Duration::from_secs(3));
    let mut client = rig.client();
    client.send_header(cmd::READ, 0, 0, 512).unwrap();
    thread::sleep(Duration::from_millis(50));
    let stopped = rig.server.stop(Duration::from_millis(50)).unwrap();
    assert_eq!(stopped, Stopped { cut_off: 1, abandoned: 1 });
}

#[test]
fn stopping_tells_that_the_last_flush_failed() {
    let rig = Rig::new(RamDisk::new(SIZE));
    rig.disk.fail_flushes(ErrorKind::FlushLost);
    assert_eq!(rig.server.stop(PATIENCE).unwrap_err().kind(), ErrorKind::FlushLost);
}

#[test]
fn after_stopping_nobody_is_let_in() {
    let rig = Rig::new(RamDisk::new(SIZE));
    rig.server.stop(PATIENCE).unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(rig.server.serve(theirs).is_err());
    let folder = temp_dir();
    let path = folder.path().join("late.sock");
    rig.server
        .listen(Listener::bind(&Listen::Unix(path.clone()), ListenOptions::default()).unwrap())
        .unwrap();
    eventually("the listener is gone", || !path.exists());
}

#[test]
fn stopping_while_clients_come_in_ends() {
    let folder = temp_dir();
    for round in 0..200 {
        let rig = Rig::new(RamDisk::new(SIZE));
        let path = folder.path().join(format!("{round}.sock"));
        let listener = Listener::bind(&Listen::Unix(path.clone()), ListenOptions::default()).unwrap();
        rig.server.listen(listener).unwrap();
        let clients: Vec<_> = (0..8).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let (ended, end) = mpsc::channel();
        let server = rig.server.clone();
        thread::spawn(move || ended.send(server.stop(PATIENCE).map(|_| ())));
        end.recv_timeout(PATIENCE).expect("it never stops").unwrap();
        drop(clients);
    }
}

#[test]
fn stopping_twice_is_stopping_once() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let _client = rig.client();
    let others = rig.server.clone();
    let second = thread::spawn(move || others.stop(PATIENCE).map(|stopped| stopped.cut_off));
    assert_eq!(rig.server.stop(PATIENCE).unwrap().cut_off, 0);
    assert_eq!(second.join().unwrap().unwrap(), 0);
}

#[test]
fn an_export_that_was_taken_out_serves_who_has_it_and_nobody_else() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    rig.server.exports().remove("disk").unwrap();
    client.write(0, &[1; 512]).unwrap();
    let mut late = Client::greet(rig.dial()).unwrap();
    assert_eq!(late.go("disk").unwrap_err().refusal(), Some(6));
    rig.server.exports().add(spec("disk", &Arc::new(RamDisk::new(4096)))).unwrap();
    assert_eq!(late.go("disk").unwrap().size, 4096);
    let _ = NbdServer::clone(&rig.server);
}
