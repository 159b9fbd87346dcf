//! Holding a server, and handing its connections to another.

use super::{PATIENCE, Rig, at_once, eventually, spec};
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions};
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::listen::{Listen, ListenOptions, Listener};
use inlinecrypt_testkit::nbd::{NbdError, cmd};
use inlinecrypt_testkit::{Client, pattern, temp_dir};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const SIZE: u64 = 16 << 20;
const CLIENTS: u64 = 4;

/// Writes a stretch of its own in random pieces, several in flight, and reads it back, until told to end.
fn work(mut client: Client<UnixStream>, number: u64, done: &AtomicBool, answered: &AtomicU64) {
    let stretch = SIZE / CLIENTS;
    let mut random = number;
    while !done.load(Ordering::Relaxed) {
        let mut sent = Vec::new();
        let mut at = number * stretch;
        for _ in 0..8 {
            let long = pattern::splitmix64(&mut random).is_multiple_of(4);
            let len = 1 + pattern::splitmix64(&mut random) % if long { 300_000 } else { 5000 };
            let data = pattern::bytes(pattern::splitmix64(&mut random), 0, usize::try_from(len).unwrap());
            client.send(cmd::WRITE, 0, at, u32::try_from(len).unwrap(), &data).unwrap();
            sent.push((at, data));
            at += len;
        }
        let mut cookies: Vec<u64> = sent
            .iter()
            .map(|_| {
                let reply = client.receive().unwrap();
                assert_eq!(reply.errno, 0);
                reply.cookie
            })
            .collect();
        cookies.sort_unstable();
        cookies.dedup();
        assert_eq!(cookies.len(), sent.len(), "each is answered once");
        for (at, data) in sent {
            assert!(client.read(at, u32::try_from(data.len()).unwrap()).unwrap() == data, "{at}");
        }
        answered.fetch_add(16, Ordering::Relaxed);
    }
    client.disconnect().unwrap();
}

#[test]
fn clients_under_load_are_handed_from_server_to_server_and_notice_nothing() {
    let plain = || RamDisk::new(SIZE);
    for (disk, workers, zero_copy) in [
        (plain(), Some(0), false),
        (plain(), Some(2), false),
        (plain(), Some(0), true),
        (at_once(SIZE), None, false),
        (at_once(SIZE), None, true),
    ] {
        let options = ServerOptions { workers, cores: 2, zero_copy, ..ServerOptions::default() };
        let disk = Arc::new(disk);
        let make = || NbdServer::new([spec("disk", &disk)], options.clone()).unwrap();
        let mut server = make();
        let (done, answered) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            for number in 0..CLIENTS {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_read_timeout(Some(PATIENCE)).unwrap();
                server.serve(theirs).unwrap();
                let simple = number == 0;
                let (done, answered) = (&done, &answered);
                scope.spawn(move || {
                    let client = if simple { Client::connect_simple } else { Client::connect };
                    work(client(ours, "disk").unwrap(), number, done, answered);
                });
            }
            for round in 0..40 {
                let before = answered.load(Ordering::Relaxed);
                eventually("work is done", || answered.load(Ordering::Relaxed) > before);
                if round % 4 == 1 {
                    // Nobody takes them, twice in a row.
                    for _ in 0..2 {
                        assert_eq!(server.hold(PATIENCE).unwrap().cut_off, 0);
                        server.resume();
                    }
                    continue;
                }
                let held = server.hold(PATIENCE).unwrap();
                assert_eq!((held.connections.len() as u64, held.stay, held.cut_off), (CLIENTS, 0, 0));
                let next = make();
                if round % 2 == 0 {
                    next.hold(PATIENCE).unwrap();
                }
                for connection in held.connections {
                    next.adopt(connection).unwrap();
                }
                assert_eq!(server.close_held(), 0);
                next.resume();
                server = next;
            }
            done.store(true, Ordering::Relaxed);
        });
        let status = server.status();
        assert_eq!(status.exports[0].counters.errors, 0);
        eventually("all have said goodbye", || server.status().connections_now == 0);
    }
}

#[test]
fn who_was_lent_pages_may_pause_for_as_long_as_he_likes_here_and_elsewhere() {
    let options = ServerOptions { zero_copy: true, ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    let pause = || thread::sleep(Duration::from_millis(1300));
    let mut client = rig.client();
    let data = pattern::bytes(1, 0, 600_000);
    client.write(0, &data).unwrap();
    for _ in 0..2 {
        assert!(client.read(0, 600_000).unwrap() == data);
        pause();
    }
    assert!(client.read(0, 600_000).unwrap() == data);
    let cookie = client.send_header(cmd::WRITE, 0, 0, 600_000).unwrap();
    std::io::Write::write_all(client.stream(), &data[..100_000]).unwrap();
    pause();
    std::io::Write::write_all(client.stream(), &data[100_000..]).unwrap();
    let reply = client.receive().unwrap();
    assert_eq!((reply.cookie, reply.errno), (cookie, 0));
    assert!(client.read(0, 600_000).unwrap() == data);

    let next = NbdServer::new([spec("disk", &rig.disk)], ServerOptions::default()).unwrap();
    next.adopt(rig.server.hold(PATIENCE).unwrap().connections.pop().unwrap()).unwrap();
    rig.server.close_held();
    pause();
    assert!(client.read(0, 600_000).unwrap() == data);
}

#[test]
fn nobody_is_accepted_while_held_and_nobody_is_turned_away() {
    let folder = temp_dir();
    let path = folder.path().join("nbd.sock");
    let rig = Rig::new(RamDisk::new(SIZE));
    rig.server
        .listen(Listener::bind(&Listen::Unix(path.clone()), ListenOptions::default()).unwrap())
        .unwrap();
    assert_eq!(rig.server.hold(PATIENCE).unwrap().connections.len(), 0);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let early = std::io::Read::read(&mut stream, &mut [0]);
    assert_eq!(early.map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    rig.server.resume();
    let mut client = Client::connect(stream, "disk").unwrap();
    client.write(0, &[1; 512]).unwrap();
    // Stopping ends a hold, too.
    rig.server.hold(PATIENCE).unwrap();
    rig.server.stop(PATIENCE).unwrap();
    assert!(matches!(client.receive(), Err(NbdError::Io(_))));
}

#[test]
fn who_stops_in_mid_request_or_handshake_is_cut_off_and_the_others_go_on() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    let mut half = rig.client();
    half.send_header(cmd::WRITE, 0, 0, 4096).unwrap();
    let silent = rig.dial();
    let _shaking = Client::greet(silent).unwrap();
    // A request of which nothing was received yet would be the next server's.
    thread::sleep(Duration::from_millis(300));
    let held = rig.server.hold(Duration::from_millis(100)).unwrap();
    assert_eq!((held.connections.len(), held.cut_off), (1, 2), "{held:?}");
    rig.server.resume();
    assert!(matches!(half.receive(), Err(NbdError::Io(_))));
    client.write(0, &[1; 512]).unwrap();
}

#[test]
fn a_disk_that_does_not_answer_keeps_its_server() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let (mut waiting, mut client) = (rig.client(), rig.client());
    rig.disk.delay(Duration::from_secs(3));
    waiting.send_header(cmd::READ, 0, 0, 512).unwrap();
    // Received, most likely; if not, it is cut off before, and that is no failure of anybody.
    thread::sleep(Duration::from_millis(300));
    let error = rig.server.hold(Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    rig.disk.delay(Duration::ZERO);
    assert_eq!(client.read(0, 512).unwrap().len(), 512);
}

#[test]
fn what_makes_no_sense_is_not_adopted() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let _client = rig.client();
    let other = Arc::new(RamDisk::new(SIZE));
    let next = NbdServer::new([spec("other", &other)], ServerOptions::default()).unwrap();
    let mut held = rig.server.hold(PATIENCE).unwrap();
    let connection = held.connections.pop().unwrap();
    assert_eq!(next.adopt(connection).unwrap_err().kind(), ErrorKind::NotFound);
    rig.server.resume();
    let mut connection = rig.server.hold(PATIENCE).unwrap().connections.pop().unwrap();
    connection.unread = vec![0; 28];
    let error = rig.server.adopt(connection).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
}
