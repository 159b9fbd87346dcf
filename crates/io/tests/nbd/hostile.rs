//! Clients that mean harm, or are merely broken: they hurt nobody but themselves.

use super::{PATIENCE, Rig, at_once, eventually};
use inlinecrypt_io::export::nbd::ServerOptions;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_testkit::nbd::{NbdError, cmd, opt, request_header};
use inlinecrypt_testkit::pattern::splitmix64;
use inlinecrypt_testkit::{Client, pattern};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 16 << 20;

fn nobody_is_left(rig: &Rig) {
    eventually("every connection is gone", || rig.server.status().connections_now == 0);
}

/// Somebody else is served as if nothing were.
fn others_are_served(rig: &Rig) {
    let mut client = rig.client();
    let data = pattern::bytes(1, 0, 600_000);
    client.write(0, &data).unwrap();
    assert!(client.read(0, 600_000).unwrap() == data);
    client.disconnect().unwrap();
}

#[test]
fn who_says_nothing_is_cut_off_in_time() {
    let options =
        ServerOptions { handshake_time_max: Duration::from_millis(200), ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    let start = Instant::now();
    let mut silent = rig.dial();
    let mut dawdling = Client::greet(rig.dial()).unwrap();
    let mut in_mid_option = Client::greet(rig.dial()).unwrap();
    in_mid_option.stream().write_all(b"IHAVEOPT\0\0\0").unwrap();
    let settled = rig.client();
    // Busy, but not with getting anywhere.
    while dawdling.list().is_ok() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    let mut end = Vec::new();
    silent.read_to_end(&mut end).unwrap();
    assert_eq!(end.len(), 18);
    eventually("all but one are gone", || rig.server.status().connections_now == 1);
    assert!(rig.server.status().handshakes_failed >= 2);
    // Who got through has all the time he likes.
    thread::sleep(Duration::from_millis(300));
    settled.disconnect().unwrap();
}

#[test]
fn who_does_not_read_in_the_handshake_is_cut_off_in_time() {
    let options =
        ServerOptions { handshake_time_max: Duration::from_millis(200), ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    let mut client = Client::greet(rig.dial()).unwrap();
    let name = "x".repeat(30_000);
    while client.send_option(opt::GO, name.as_bytes()).is_ok() {}
    nobody_is_left(&rig);
}

#[test]
fn who_vanishes_in_mid_write_leaves_nothing_behind() {
    for (disk, workers, cores) in [
        (RamDisk::new(SIZE), Some(0), 1),
        (RamDisk::new(SIZE), Some(0), 8),
        (RamDisk::new(SIZE), Some(2), 1),
        (at_once(SIZE), None, 1),
    ] {
        let options = ServerOptions { workers, cores, ..ServerOptions::default() };
        let rig = Rig::with_options(disk, options);
        for len in [512u32, 65_536, 1 << 20, 8 << 20] {
            for sent in [0, 1, 100, 300_000] {
                let mut client = rig.client();
                client.send_header(cmd::WRITE, 0, 0, len).unwrap();
                let sent = sent.min(len as usize - 1);
                client.stream().write_all(&vec![7; sent]).unwrap();
                drop(client);
            }
        }
        nobody_is_left(&rig);
        others_are_served(&rig);
    }
}

#[test]
fn who_stalls_in_mid_write_keeps_nobody_from_their_work() {
    let rig = Rig::new(RamDisk::new(SIZE).with_pool_of(1));
    let mut small = rig.client();
    small.send_header(cmd::WRITE, 0, 0, 4096).unwrap();
    small.stream().write_all(&[7; 100]).unwrap();
    let mut large = rig.client();
    large.send_header(cmd::WRITE, 0, 0, 1 << 20).unwrap();
    large.stream().write_all(&[7; 200_000]).unwrap();
    thread::sleep(Duration::from_millis(50));
    others_are_served(&rig);
}

#[test]
fn who_does_not_read_his_replies_keeps_nobody_from_their_work() {
    for (disk, workers, cores) in [
        (RamDisk::new(SIZE), Some(0), 1),
        (RamDisk::new(SIZE), Some(0), 8),
        (RamDisk::new(SIZE), Some(2), 1),
        (at_once(SIZE), None, 1),
    ] {
        let options = ServerOptions { workers, cores, ..ServerOptions::default() };
        let rig = Rig::with_options(disk.with_pool_of(1), options);
        let mut greedy = rig.client();
        greedy.stream().set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        while greedy.send_header(cmd::READ, 0, 0, 8 << 20).is_ok() {}
        others_are_served(&rig);
        drop(greedy);
        nobody_is_left(&rig);
    }
}

#[test]
fn garbage_instead_of_a_request_ends_the_connection() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    client.stream().write_all(&[0xa5; 4096]).unwrap();
    assert!(matches!(client.receive(), Err(NbdError::Io(_) | NbdError::Protocol(_))));
    nobody_is_left(&rig);
}

#[test]
fn garbage_instead_of_an_option_ends_the_connection() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = Client::greet(rig.dial()).unwrap();
    client.stream().write_all(&[0xa5; 16]).unwrap();
    assert_eq!(client.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn answers_before_the_garbage_still_arrive() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    let cookie = client.send(cmd::WRITE, 0, 0, 512, &[1; 512]).unwrap();
    client.stream().write_all(&[0; 28]).unwrap();
    assert_eq!(client.receive().unwrap().cookie, cookie);
}

#[test]
fn a_flood_of_options_is_stopped() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = Client::greet(rig.dial()).unwrap();
    let served = (0..10_000).take_while(|_| client.list().is_ok()).count();
    assert!((100..1000).contains(&served), "{served}");
}

#[test]
fn overlapping_requests_are_applied_whole() {
    let options = ServerOptions { workers: Some(4), ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    let mut client = rig.client();
    for fill in 1..=64u8 {
        client.send(cmd::WRITE, 0, u64::from(fill % 4) * 512, 4096, &[fill; 4096]).unwrap();
    }
    for _ in 0..64 {
        assert_eq!(client.receive().unwrap().errno, 0);
    }
    let data = client.read(3 * 512, 512 * 5).unwrap();
    assert!(data.iter().all(|byte| *byte == data[0]), "one write lies over all others");
}

#[test]
fn requests_that_share_a_cookie_are_all_answered() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.simple_client();
    for _ in 0..100 {
        client.stream().write_all(&request_header(cmd::FLUSH, 0, 42, 0, 0)).unwrap();
    }
    let mut replies = vec![0; 1600];
    client.stream().read_exact(&mut replies).unwrap();
    assert!(replies.chunks(16).all(|reply| reply[15] == 42));
}

#[test]
fn a_thousand_clients_are_served_and_one_more_than_allowed_is_closed() {
    let options = ServerOptions { connections_max: 1001, ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE).with_pool_of(4), options);
    let mut clients: Vec<_> = (0..1000).map(|_| rig.client()).collect();
    for (index, client) in (0u64..).zip(&mut clients) {
        client.send(cmd::WRITE, 0, index * 4096, 4096, &pattern::bytes(3, index * 4096, 4096)).unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.receive().unwrap().errno, 0);
    }
    let mut last = rig.client();
    assert!(last.read(0, 4_096_000).unwrap() == pattern::bytes(3, 0, 4_096_000));
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(rig.server.serve(theirs).is_err());
    assert_eq!(rig.server.status().exports[0].counters.connections_now, 1001);
    drop((clients, last));
    nobody_is_left(&rig);
}

#[test]
fn half_closed_clients_get_their_answers() {
    for (disk, workers, cores) in [
        (RamDisk::new(SIZE), Some(0), 1),
        (RamDisk::new(SIZE), Some(0), 8),
        (RamDisk::new(SIZE), Some(2), 1),
        (at_once(SIZE), None, 1),
    ] {
        let options = ServerOptions { workers, cores, ..ServerOptions::default() };
        let rig = Rig::with_options(disk, options);
        let mut client = rig.client();
        for _ in 0..10 {
            client.send_header(cmd::READ, 0, 0, 100_000).unwrap();
        }
        client.stream().shutdown(Shutdown::Write).unwrap();
        for _ in 0..10 {
            assert_eq!(client.receive().unwrap().data.len(), 100_000);
        }
        nobody_is_left(&rig);
    }
}

#[test]
fn random_bytes_at_any_stage_hurt_nobody() {
    let options = ServerOptions { handshake_time_max: Duration::from_secs(1), ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    let mut state = 0x1234;
    for round in 0..300 {
        let len = splitmix64(&mut state) % 5000;
        let noise = pattern::bytes(splitmix64(&mut state), 0, usize::try_from(len).unwrap());
        let mut stream = match round % 4 {
            0 => rig.dial(),
            1 => Client::greet(rig.dial()).unwrap().into_stream(),
            2 => rig.client().into_stream(),
            _ => {
                // Right magic, wild rest.
                let mut stream = rig.client().into_stream();
                let mut wild = Vec::new();
                for chunk in noise.chunks_exact(24).take(100) {
                    wild.extend_from_slice(&0x2560_9513u32.to_be_bytes());
                    let mut rest = chunk.to_vec();
                    rest[2] = 0;
                    rest[3] %= 9;
                    rest[20] = 0;
                    wild.extend_from_slice(&rest);
                }
                let _ = stream.write_all(&wild);
                stream
            }
        };
        let _ = stream.write_all(&noise);
        let _ = stream.shutdown(Shutdown::Both);
    }
    nobody_is_left(&rig);
    others_are_served(&rig);
}
