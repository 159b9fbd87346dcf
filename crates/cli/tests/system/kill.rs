//! `kill -9` of a server that is writing. What it had acknowledged is in the kernel's hands, and must be there.

use crate::load::{Habits, Load};
use crate::rig::{MIB, PATIENCE, Place, seed};
use inlinecrypt_testkit::pattern;
use std::fs;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

const KILLS: usize = 50;
const LEN: u64 = 4 * MIB;
/// One client for each stretch of [`LEN`] bytes: volume, and the blocks that its clients write.
const CLIENTS: [(&str, u64, u64); 4] = [("x", 0, 512), ("x", LEN, 512), ("a", 0, 4096), ("a", LEN, 4096)];

/// Also nbs#2791: the server is killed under load.
#[test]
fn what_was_acknowledged_survives_fifty_kills_and_nothing_else_is_damaged() {
    let mut random = seed();
    let place = Place::new();
    // 512-byte blocks in larger data units, where a write is a read-modify-write; and a mode that changes whole units.
    for (name, key_len) in [("x", 64), ("a", 32)] {
        place.raw_key(&format!("{name}.raw"), key_len, 1);
        place.sparse(&format!("{name}.img"), 2 * LEN);
    }
    let config = "[[volume]]\npath = \"x.img\"\nkey = \"raw:x.raw\"\ndata_unit = 4096\n\
                  [[volume]]\npath = \"a.img\"\nkey = \"raw:a.raw\"\ndata_unit = 4096\nmode = \"Adiantum\"\n";
    let habits = |block| Habits { block, len_max: 32 << 10, depth: 4, ..Habits::WRITES };
    let mut loads: Vec<Load> = CLIENTS
        .iter()
        .zip(1..)
        .map(|((_, offset, block), number)| Load::new(random ^ number, *offset, LEN, habits(*block)))
        .collect();
    let mut server = place.serve_config(config);
    for (load, (volume, ..)) in loads.iter_mut().zip(CLIENTS) {
        load.fill(&mut server.client(volume));
    }
    let (mut answered, mut cut_short) = (0, 0);
    for kill in 0..KILLS {
        // From before the first write to well into them.
        let delay = Duration::from_micros(pattern::splitmix64(&mut random) % 30_000);
        let barrier = Barrier::new(CLIENTS.len() + 1);
        thread::scope(|scope| {
            for (load, (volume, ..)) in loads.iter_mut().zip(CLIENTS) {
                let mut client = server.client(volume);
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    load.run_until_killed(&mut client);
                });
            }
            barrier.wait();
            thread::sleep(delay);
            server.process.kill().unwrap();
        });
        for load in &mut loads {
            cut_short += load.give_up();
            answered += std::mem::take(&mut load.answered);
        }
        // Both are left behind, and must be no obstacle.
        assert!(place.path("nbd.sock").exists() && place.path("control").exists(), "kill {kill}");
        server = place.serve_config(config);
        for (load, (volume, ..)) in loads.iter_mut().zip(CLIENTS) {
            load.check_all(&mut server.client(volume));
        }
    }
    eprintln!("{answered} requests were answered, {cut_short} were cut short");
    assert!(answered > 0 && cut_short > 0, "the kills hit nothing");
    let names: Vec<_> =
        fs::read_dir(place.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.iter().filter(|name| name.to_string_lossy().contains(".sock.")).count(), 0, "{names:?}");
    server.stop();
}

/// While it is being written to, a second server on the same volume is refused; once it is killed, it is not.
#[test]
fn a_killed_servers_lock_is_gone_with_it() {
    let place = Place::new();
    let mut server = place.serve(["--create", "1MiB", "v.img"]);
    let second = place.run(["serve", "--nbd", "unix:other.sock", "v.img"]);
    assert_eq!(second.status.code(), Some(5));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains(&format!("process {}", server.process.pid())), "{said}");
    assert!(!place.path("other.sock").exists());
    server.process.kill().unwrap();
    let begun = Instant::now();
    place.serve(["v.img"]).stop();
    assert!(begun.elapsed() < PATIENCE);
}
