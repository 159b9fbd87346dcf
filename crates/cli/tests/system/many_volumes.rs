//! More keys than keyslots: every volume gets the right key every time, and all of them get on.

use crate::load::{Habits, Load, Until};
use crate::rig::{MIB, Place, Server, eventually, seed};
use serde_json::Value;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// How long volumes are kept busy. A minute where nobody waits for it.
fn soak() -> Duration {
    let seconds = match std::env::var("INLINECRYPT_SOAK_SECONDS") {
        Ok(text) => text.parse().expect("INLINECRYPT_SOAK_SECONDS is a number"),
        Err(_) if std::env::var_os("CI").is_some_and(|value| value == "true") => 60,
        Err(_) => 15,
    };
    Duration::from_secs(seconds)
}

/// What a volume's key is like, and what lies under it.
const KINDS: [(&str, usize, u64); 4] = [
    ("mode = \"AES-256-XTS\"\ndata_unit = 4096", 64, 512),
    ("mode = \"Adiantum\"\ndata_unit = 4096", 32, 4096),
    ("mode = \"AES-128-CBC-ESSIV\"\ndata_unit = 512", 16, 512),
    ("mode = \"AES-256-XTS\"\ndata_unit = 512", 64, 512),
];

/// A server with `count` volumes of `len` bytes and as many keys. Half of the keys are wrapped, the others raw.
fn serve_many(count: usize, len: u64, engine: &str, more: &str) -> (Place, Server, Vec<u64>) {
    let place = Place::new();
    let mut config = format!("[[engine]]\nname = \"e\"\nspec = \"{engine}\"\nroot = \"root\"\n{more}\n");
    let mut blocks = Vec::new();
    for index in 0..count {
        place.sparse(&format!("{index}.img"), len);
        let (layout, key, block) = if index % 2 == 0 {
            let key = format!("{index}.key");
            place.run_ok(["key", "generate", "--root", "root", "--out", &key]);
            ("data_unit = 4096", key, 512)
        } else {
            let (layout, key_len, block) = KINDS[index / 2 % KINDS.len()];
            let key = format!("{index}.raw");
            place.raw_key(&key, key_len, index as u64);
            (layout, format!("raw:{key}"), block)
        };
        blocks.push(block);
        let _ = writeln!(
            config,
            "[[volume]]\nname = \"v{index}\"\npath = \"{index}.img\"\nkey = \"{key}\"\n{layout}"
        );
    }
    let server = place.serve_config(&config);
    (place, server, blocks)
}

/// Keeps all volumes busy at once for a while, one client each, then looks at every byte.
fn pound(server: &Server, blocks: &[u64], len: u64, seed: u64, time: Duration) -> u64 {
    let over = Until::default();
    let (started, answered) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = blocks.len() as u64;
    thread::scope(|scope| {
        for (index, block) in blocks.iter().enumerate() {
            let (over, started, answered) = (&over, &started, &answered);
            let work = move || {
                let mut client = server.client(&format!("v{index}"));
                let habits = Habits { block: *block, ..Habits::MIXED };
                let mut load = Load::new(seed + index as u64, 0, len, habits);
                load.fill(&mut client);
                started.fetch_add(1, Ordering::Relaxed);
                load.run(&mut client, || over.is_over()).unwrap();
                load.check_all(&mut client);
                answered.fetch_add(load.answered, Ordering::Relaxed);
            };
            thread::Builder::new().stack_size(512 << 10).spawn_scoped(scope, work).unwrap();
        }
        let _over = over.guard();
        eventually("all volumes are busy", || started.load(Ordering::Relaxed) == count);
        thread::sleep(time);
    });
    answered.into_inner()
}

/// Sums of the engine's keyslots: programs, evictions, waits; and how many there are.
fn keyslots(status: &Value) -> (u64, u64, u64, usize) {
    let server = &status["servers"][0];
    let engine =
        server["engines"].as_array().unwrap().iter().find(|engine| engine["role"] == "engine").unwrap();
    let slots = engine["keyslots"]["slots"].as_array().unwrap();
    let sum = |name: &str| slots.iter().map(|slot| slot[name].as_u64().unwrap()).sum();
    assert!(slots.iter().all(|slot| slot["program_failures"] == 0));
    (sum("programs"), sum("evictions"), engine["keyslots"]["waits"].as_u64().unwrap(), slots.len())
}

fn errors(status: &Value) -> u64 {
    let volumes = status["servers"][0]["volumes"].as_array().unwrap();
    volumes.iter().map(|volume| volume["counters"]["errors"].as_u64().unwrap()).sum()
}

#[test]
fn two_hundred_volumes_with_two_hundred_keys_share_four_keyslots() {
    const COUNT: usize = 200;
    let seed = seed();
    let (place, server, blocks) = serve_many(COUNT, MIB, "software:slots=4", "");
    let answered = pound(&server, &blocks, MIB, seed, soak());
    let status = server.status(&place);
    let (programs, evictions, waits, slots) = keyslots(&status);
    let (resident, most) = server.resident_kib();
    eprintln!(
        "{answered} requests; {programs} programs, {evictions} evictions, {waits} waits; {resident} KiB resident, \
         {most} at most"
    );
    assert_eq!(slots, 4);
    let keys: std::collections::BTreeSet<&str> = status["servers"][0]["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| volume["key_id"].as_str().unwrap())
        .collect();
    assert_eq!(keys.len(), COUNT);
    assert!(programs >= COUNT as u64 && evictions > 0 && waits > 0, "{status}");
    assert_eq!(errors(&status), 0);
    assert!(most <= 96 << 10, "{most} KiB");
    server.stop();
}

#[test]
fn one_volume_under_load_stays_small() {
    let seed = seed();
    let place = Place::new();
    let server = place.serve(["--create", "64MiB", "v.img"]);
    let over = Until::default();
    thread::scope(|scope| {
        for worker in 0..4 {
            let (server, over) = (&server, &over);
            scope.spawn(move || {
                let mut client = server.client("v");
                let mut load = Load::new(seed + worker, worker * 16 * MIB, 16 * MIB, Habits::MIXED);
                load.fill(&mut client);
                load.run(&mut client, || over.is_over()).unwrap();
                load.check_all(&mut client);
                // The largest requests there are.
                let (version, data) = load.shadow.begin(worker * 16 * MIB, 16 * MIB);
                client.write(worker * 16 * MIB, &data).unwrap();
                load.shadow.settle(worker * 16 * MIB, 16 * MIB, version);
                load.check_all(&mut client);
                client.read(0, 32 << 20).unwrap();
            });
        }
        let _over = over.guard();
        thread::sleep(Duration::from_secs(3));
    });
    let (resident, most) = server.resident_kib();
    eprintln!("{resident} KiB resident, {most} at most");
    assert!(most <= 64 << 10, "{most} KiB");
    server.stop();
}

#[test]
fn eight_volumes_share_one_keyslot() {
    let seed = seed();
    // With threads of its own for each connection, and without.
    for workers in ["server: workers = 0", "server: workers = 3"] {
        let (place, server, blocks) = serve_many(8, MIB, "software:slots=1", workers);
        pound(&server, &blocks, MIB, seed, Duration::from_secs(2));
        let status = server.status(&place);
        let (programs, evictions, waits, slots) = keyslots(&status);
        assert_eq!((slots, errors(&status)), (1, 0));
        assert!(programs > 8 && evictions > 0 && waits > 0, "{status}");
        server.stop();
    }
}

/// spdk#2504, spdk#2907: pools, queues and slots of one, 64 volumes; it must finish. (One connection more than volumes is
/// for who looks whether the server is up.)
#[test]
fn sixty_four_volumes_get_on_with_one_of_everything() {
    let seed = seed();
    let (place, server, blocks) =
        serve_many(64, MIB / 2, "software:slots=1", "server: workers = 1\nserver: connections_max = 65");
    pound(&server, &blocks, MIB / 2, seed, Duration::from_secs(3));
    eventually("all clients are gone", || server.status(&place)["servers"][0]["connections"]["now"] == 0);
    let status = server.status(&place);
    assert_eq!((keyslots(&status).3, errors(&status)), (1, 0));
    server.stop();
}

/// An engine without keyslots takes the key with every request.
#[test]
fn eight_volumes_do_without_keyslots() {
    let seed = seed();
    let (place, server, blocks) = serve_many(8, MIB, "software:slots=0", "");
    pound(&server, &blocks, MIB, seed, Duration::from_secs(1));
    let status = server.status(&place);
    assert_eq!(errors(&status), 0);
    assert!(status["servers"][0]["engines"][0]["keyslots"].is_null(), "{status}");
    server.stop();
}
