//! Containers with several passphrases get another key: each that is given keeps its LUKS keyslot, whoever begins and whoever
//! finishes.

use crate::load::{Habits, Load};
use crate::luks_reencrypt::{
    CHEAP, container, cryptsetup, info, is_finished, kill_after, long, ours, serve, theirs, theirs_goes_on,
};
use crate::rig::{MIB, Place, Server, at_a_terminal, eventually, run, said, seed};
use inlinecrypt_testkit::{pattern, require_tool};
use serde_json::Value;
use std::fs;
use std::io::Write as _;
use std::process::{Output, Stdio};
use std::thread;
use std::time::Duration;

/// The LUKS keyslots of these tests, and their passphrases.
const SLOTS: [(&str, &[u8]); 3] =
    [("0", b"passphrase zero"), ("3", b"passphrase three"), ("7", b"passphrase seven\n")];

/// What gives the passphrases besides `zero`.
const OTHERS: [&str; 4] = ["--other-passphrase-file", "three", "--other-key-file", "seven"];

/// A container with content and three passphrases: that of 0 in `zero`, of 3 in `three`, of 7, which is opened first, in the key file
/// `seven`; with a token for the first two, and one that is nobody's.
fn crowd(place: &Place, sector: &str, len: u64) -> Vec<u8> {
    let content = container(place, sector, len);
    place.secret("three", SLOTS[1].1);
    place.secret("seven", SLOTS[2].1);
    let add = ["luks", "add-key", "--passphrase-file", "zero", "--slot"];
    place.run_ok([&add[..], &["3", "--new-passphrase-file", "three"], &CHEAP, &["disk"]].concat());
    let cheap = ["--pbkdf", "pbkdf2", "--hash", "sha512", "--pbkdf-force-iterations", "1234"];
    place.run_ok([&add[..], &["7", "--new-key-file", "seven"], &cheap, &["disk"]].concat());
    if require_tool("cryptsetup").is_some() {
        run(&mut cryptsetup(place, &["config", "--key-slot", "7", "--priority", "prefer", "disk"]));
        for slots in [r#"["0", "3"]"#, "[]"] {
            fs::write(place.path("token"), format!(r#"{{"type": "somebody-elses", "keyslots": {slots}}}"#))
                .unwrap();
            run(&mut cryptsetup(place, &["token", "import", "--json-file", "token", "disk"]));
        }
    }
    content
}

/// What passphrases are kept with: of each LUKS keyslot its number, priority and cost; and the tokens.
fn kept(place: &Place) -> (Vec<(String, Value, Value)>, Value) {
    let dump: Value = serde_json::from_str(&place.run_ok(["luks", "dump", "--json", "disk"])).unwrap();
    let metadata = &dump["metadata"];
    let slots = metadata["keyslots"].as_object().unwrap().iter().map(|(number, slot)| {
        let mut kdf = slot["kdf"].clone();
        kdf["salt"] = Value::Null;
        (number.clone(), slot["priority"].clone(), kdf)
    });
    (slots.collect(), metadata["tokens"].clone())
}

/// Each passphrase opens its own LUKS keyslot, for cryptsetup and for us.
fn each_opens(place: &Place, slots: &[(&str, &[u8])]) {
    for (slot, passphrase) in slots {
        let _ = fs::remove_file(place.path("given"));
        place.secret("given", passphrase);
        let key_file = if passphrase.ends_with(b"\n") { "--key-file" } else { "--passphrase-file" };
        let said = place.run_ok(["luks", "test", "--slot", slot, key_file, "given", "disk"]);
        assert!(said.contains(&format!("LUKS keyslot {slot} opens")), "{said}");
        if require_tool("cryptsetup").is_some() {
            run(&mut cryptsetup(place, &["open", "--test-passphrase", "-S", slot, "-d", "given", "disk"]));
        }
    }
}

#[test]
fn every_passphrase_that_is_given_keeps_its_keyslot() {
    for (sector, more) in [("512", &[][..]), ("4096", &["--data-unit", "512"])] {
        let place = Place::new();
        let content = crowd(&place, sector, 3 * MIB);
        let before = kept(&place);
        assert_eq!(before.0.len(), 3);
        run(&mut ours(&place, &[&OTHERS[..], more].concat()));
        assert_eq!(kept(&place), before);
        each_opens(&place, &SLOTS);
        if require_tool("cryptsetup").is_some() {
            is_finished(&place, &content);
        }
    }
}

#[test]
fn a_keyslot_without_its_passphrase_is_refused_or_dropped() {
    let place = Place::new();
    let content = crowd(&place, "512", MIB);
    let before = fs::read(place.path("disk")).unwrap();
    let refused = |arguments: &[&str], code: i32, says: &[&str]| {
        let output = ours(&place, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(says.iter().all(|says| said(&output).contains(says)), "{says:?}: {}", said(&output));
        assert!(fs::read(place.path("disk")).unwrap() == before, "{says:?}: it was changed");
    };
    place.secret("wrong", b"passphrase wrong");
    refused(&[], 1, &["LUKS keyslots 3, 7 ", "--other-passphrase-file", "--drop-others"]);
    refused(&OTHERS[..2], 1, &["LUKS keyslots 7 "]);
    refused(&[&OTHERS[..], &["--other-passphrase-file", "wrong"]].concat(), 2, &["wrong opens none"]);
    refused(&["--other-key-file", "nothing"], 4, &["nothing"]);
    refused(&["--other-key-file", "-"], 1, &["--other-passphrase-fd 0"]);
    refused(&["--other-passphrase-file", "three", "--resume"], 1, &["cannot be used with"]);
    // What is no container has none to drop.
    place.run_ok(["volume", "create", "--size", "1MiB", "v.img"]);
    let output = place.run(["volume", "reencrypt", "--drop-others", "v.img"]);
    assert!(
        output.status.code() == Some(1) && said(&output).contains("no LUKS container"),
        "{}",
        said(&output)
    );
    // The one that opens it without a word keeps its own: 7 by its priority.
    let mut command = ours(&place, &["--drop-others", "--other-passphrase-file", "three"]);
    run(&mut command);
    each_opens(&place, &SLOTS[..2]);
    let (slots, tokens) = kept(&place);
    let numbers: Vec<&str> = slots.iter().map(|(number, ..)| number.as_str()).collect();
    assert_eq!(numbers, ["0", "3"]);
    if require_tool("cryptsetup").is_some() {
        assert_eq!(tokens["0"]["keyslots"], serde_json::json!(["0", "3"]));
        is_finished(&place, &content);
    }
}

/// One passphrase may be that of several LUKS keyslots, and be given twice.
#[test]
fn what_a_passphrase_opens_it_keeps() {
    let place = Place::new();
    crowd(&place, "4096", MIB);
    let add = ["luks", "add-key", "--passphrase-file", "zero", "--slot"];
    place.run_ok([&add[..], &["5", "--new-passphrase-file", "zero"], &CHEAP, &["disk"]].concat());
    place.run_ok([&add[..], &["9", "--new-key-file", "seven"], &CHEAP, &["disk"]].concat());
    let before = kept(&place);
    assert_eq!(before.0.len(), 5);
    run(&mut ours(&place, &[&OTHERS[..], &["--other-key-file", "zero"]].concat()));
    assert_eq!(kept(&place), before);
    each_opens(&place, &SLOTS);
    each_opens(&place, &[("5", SLOTS[0].1), ("9", SLOTS[2].1)]);
}

/// While it is half done, who was dropped hears it.
#[test]
fn a_passphrase_that_was_dropped_does_not_open_what_is_half_done() {
    let place = Place::new();
    crowd(&place, "512", 4 * MIB);
    let mut command = ours(&place, &["--drop-others", "--throttle", "1MiB"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("it is under way", || info(&place)["reencrypt"]["done_bytes"].as_u64() > Some(0));
    child.kill().unwrap();
    child.wait().unwrap();
    let output = place.run(["serve", "--passphrase-file", "three", "disk"]);
    let text = said(&output);
    assert!(output.status.code() == Some(2) && text.contains("opens the old key alone"), "{text}");
    run(&mut ours(&place, &["--resume"]));
    each_opens(&place, &SLOTS[..1]);
    assert_eq!(kept(&place).0.len(), 1);
}

/// The server reads the files, as its own passphrase's; then any of them serves it.
#[test]
fn a_server_keeps_each_keyslot_while_clients_write() {
    let place = Place::new();
    crowd(&place, "4096", 6 * MIB);
    let before = kept(&place);
    let habits = Habits { len_max: 32 << 10, depth: 4, reads: 30, trims: 0, ..Habits::MIXED };
    let mut load = Load::new(7, 0, 6 * MIB, habits);
    let server = serve(&place, &[]);
    load.fill(&mut server.client(""));
    let begin = |more: &[&str]| {
        let mut command = place.command();
        command.args(["volume", "reencrypt", "--control", "control"]).args(more).arg("disk");
        command
    };
    let output = begin(&[]).output().unwrap();
    assert!(output.status.code() == Some(1) && said(&output).contains("3, 7"), "{}", said(&output));
    let output = begin(&["--drop-others", "--other-key-file", "three\n"]).output().unwrap();
    assert!(output.status.code() == Some(4), "{}", said(&output));
    let over = crate::load::Until::default();
    let mut client = server.client("");
    thread::scope(|scope| {
        let (load, client, over) = (&mut load, &mut client, &over);
        scope.spawn(move || load.run(client, || over.is_over()).unwrap());
        let _guard = over.guard();
        // One by its file, one through a descriptor, which the command reads.
        let mut command = begin(&["--other-passphrase-fd", "0", "--other-key-file", "seven"]);
        command.stdin(fs::File::open(place.path("three")).unwrap());
        run(&mut command);
    });
    load.check_all(&mut client);
    drop(client);
    let log = server.log();
    assert!(!log.contains("passphrase three"), "{log}");
    server.stop();
    assert_eq!(kept(&place), before);
    each_opens(&place, &SLOTS);
    let server = place.serve(["--key-file", "seven", "disk"]);
    load.check_all(&mut server.client(""));
    server.stop();
}

/// cryptsetup wants each passphrase, in the order of the LUKS keyslots, and gives these other numbers.
fn theirs_begins(place: &Place, more: &[&str]) -> Output {
    let mut command = cryptsetup(place, &["reencrypt", "-q", "--force-offline-reencrypt"]);
    command.args(CHEAP).args(more).arg("disk");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut to = child.stdin.take().unwrap();
    to.write_all(b"passphrase zero\npassphrase three\npassphrase five\n").unwrap();
    drop(to);
    child.wait_with_output().unwrap()
}

/// As [`crowd`], with passphrases that can be typed, of which none comes first.
fn typed_crowd(place: &Place, sector: &str, len: u64) -> Vec<u8> {
    let content = container(place, sector, len);
    for (slot, name) in [("3", "three"), ("5", "five")] {
        place.secret(name, format!("passphrase {name}").as_bytes());
        let add =
            ["luks", "add-key", "--passphrase-file", "zero", "--new-passphrase-file", name, "--slot", slot];
        place.run_ok([&add[..], &CHEAP, &["disk"]].concat());
    }
    content
}

/// Killed again and again, and taken up by the one or the other, with any of the passphrases.
#[test]
fn either_goes_on_with_any_passphrase_where_the_other_was_killed() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let mut random = seed();
    let wanted = if long() { 120 } else { 16 };
    let place = Place::new();
    let content = typed_crowd(&place, "512", 8 * MIB);
    let names = ["zero", "three", "five"];
    let (mut kills, mut completed, mut in_a_zone) = ([0, 0], [0, 0], 0);
    let mut began = 0;
    while kills[0] + kills[1] < wanted || completed.contains(&0) {
        let mut below = |bound: u64| pattern::splitmix64(&mut random) % bound;
        let is_begun = !info(&place)["reencrypt"].is_null();
        let name = names[usize::try_from(below(3)).unwrap()];
        let who = usize::from(below(2) == 0);
        if !is_begun {
            // Each begins half of them. cryptsetup's beginning is not killed: it reads from a pipe here.
            began = who;
            if who == 1 {
                let output = theirs_begins(&place, &["--init-only"]);
                assert!(output.status.success(), "{}", said(&output));
                continue;
            }
        }
        let mut command = match (who, is_begun) {
            (0, false) => {
                let others = ["--other-passphrase-file", "three", "--other-passphrase-file", "five"];
                ours(&place, &[&["--throttle", "40MiB"], &others[..]].concat())
            }
            (0, true) => {
                let mut command = place.command();
                let resume = ["volume", "reencrypt", "--resume", "--throttle", "40MiB"];
                command.args(resume).args(["--passphrase-file", name, "disk"]);
                command
            }
            _ => {
                let mut command = cryptsetup(&place, &["reencrypt", "-q", "--force-offline-reencrypt"]);
                command.args(["--resume-only", "--hotzone-size", "512K", "-d", name, "disk"]);
                command
            }
        };
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        kills[who] += u64::from(kill_after(child, Duration::from_micros(below(250_000))));
        let now = info(&place)["reencrypt"].clone();
        in_a_zone += u64::from(now["interrupted"] == true);
        let reader = names[usize::try_from(below(3)).unwrap()];
        let server = place.serve(["--passphrase-file", reader, "--pause-reencryption", "disk"]);
        let read = server.client("disk").read(0, 8 << 20).unwrap();
        assert!(read == content, "after {kills:?} kills: {now}");
        server.stop();
        if is_begun && now.is_null() {
            completed[began] += 1;
            is_finished(&place, &content);
            assert_eq!(kept(&place).0.len(), 3);
            for name in names {
                place.run_ok(["luks", "test", "--passphrase-file", name, "disk"]);
                run(&mut cryptsetup(&place, &["open", "--test-passphrase", "-d", name, "disk"]));
            }
        }
    }
    eprintln!(
        "{kills:?} kills of ours and theirs, {in_a_zone} in a zone, {completed:?} completed by who began"
    );
    assert!(kills[0] > 0 && kills[1] > 0, "the kills hit nothing");
}

#[test]
fn what_we_began_cryptsetup_finishes_with_every_number_as_it_was() {
    if require_tool("cryptsetup").is_none() {
        return;
    }
    let place = Place::new();
    let content = crowd(&place, "512", 4 * MIB);
    let before = kept(&place);
    let mut command = ours(&place, &[&OTHERS[..], &["--throttle", "2MiB"]].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("it is under way", || info(&place)["reencrypt"]["done_bytes"].as_u64() > Some(0));
    child.kill().unwrap();
    child.wait().unwrap();
    theirs_goes_on(&place);
    is_finished(&place, &content);
    assert_eq!(kept(&place), before);
    each_opens(&place, &SLOTS);
    // And another one, of cryptsetup's beginning: -S keeps one, and the others go.
    run(&mut theirs(&place, &["--init-only", "-S", "0"]));
    run(&mut ours(&place, &["--resume"]));
    assert_eq!(kept(&place).0.len(), 1);
    is_finished(&place, &content);
}

#[test]
fn each_passphrase_is_asked_for_by_the_number_of_its_keyslot() {
    if require_tool("script").is_none() || require_tool("stty").is_none() {
        return;
    }
    let place = Place::new();
    let content = typed_crowd(&place, "512", MIB);
    let (three, five) = ("LUKS keyslot 3 of disk: ", "LUKS keyslot 5 of disk: ");
    let before = kept(&place);
    let bytes = fs::read(place.path("disk")).unwrap();
    let wrong = [("disk: ", "passphrase zero"), (three, "passphrase three"), (five, "nonsense")];
    let (code, shown) = at_a_terminal(&place, "volume reencrypt disk", &wrong);
    assert!(code == Some(2) && shown.contains("LUKS keyslot 5 does not open"), "{shown}");
    assert!(fs::read(place.path("disk")).unwrap() == bytes);
    let right = [("disk: ", "passphrase zero"), (three, "passphrase three"), (five, "passphrase five")];
    let (code, shown) = at_a_terminal(&place, "volume reencrypt disk", &right);
    assert!(code == Some(0) && shown.contains("re-encrypted disk"), "{shown}");
    assert_eq!(kept(&place), before);
    // While it is served, the server knows one, and the command asks for the others.
    let server: Server = place.serve(["--passphrase-file", "three", "disk"]);
    let of_disk = |slot| format!("LUKS keyslot {slot} of {}: ", place.path("disk").display());
    let (zero, five) = (of_disk(0), of_disk(5));
    let answers = [(&*zero, "passphrase zero"), (&*five, "passphrase five")];
    let (code, shown) = at_a_terminal(&place, "volume reencrypt --control control disk", &answers);
    assert!(code == Some(0) && shown.contains("re-encrypted disk"), "{shown}");
    assert!(!server.log().contains("passphrase five"));
    server.stop();
    assert_eq!(kept(&place), before);
    for name in ["zero", "three", "five"] {
        place.run_ok(["luks", "test", "--passphrase-file", name, "disk"]);
    }
    // Who drops the others is asked for one.
    let (code, shown) =
        at_a_terminal(&place, "volume reencrypt --drop-others disk", &[("disk: ", "passphrase zero")]);
    assert!(code == Some(0) && shown.contains("re-encrypted disk"), "{shown}");
    assert_eq!(kept(&place).0.len(), 1);
    if require_tool("cryptsetup").is_some() {
        is_finished(&place, &content);
    }
}
