//! LUKS containers in cryptsetup with the kernel's dm-crypt: ours and its, content and filesystems, and re-encryption that the one
//! begins and the other finishes.

use super::dm_crypt::MODULES;
use super::kernels::{Kernel, can_boot};
use super::machine::{Machine, Results};
use crate::rig::{MIB, Place, run, said};
use inlinecrypt_testkit::{pattern, require_tool};
use serde_json::Value;
use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const CHEAP: [&str; 6] = ["--pbkdf-memory", "64", "--pbkdf-parallel", "1", "--pbkdf-force-iterations", "4"];

/// What a container holds, in bytes. Room for a filesystem with a journal.
const DATA: u64 = 16 * MIB;
const HEADER: u64 = 16 * MIB;

const OURS: u64 = 51;
const THEIRS: u64 = 52;

fn content(seed: u64) -> Vec<u8> {
    pattern::bytes(seed, 0, usize::try_from(DATA).unwrap())
}

fn sha256(data: &[u8]) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(data))
}

fn fill(place: &Place, name: &str, content: &[u8]) {
    let server = place.serve(["--passphrase-file", "zero", name]);
    let mut client = server.client(name);
    for (at, piece) in (0..).step_by(1 << 20).zip(content.chunks(1 << 20)) {
        client.write(at, piece).unwrap();
    }
    client.flush().unwrap();
    server.stop();
}

fn read(place: &Place, name: &str, more: &[&str]) -> Vec<u8> {
    let server = place.serve([&["--passphrase-file", "zero"], more, &[name]].concat());
    let mut client = server.client(name);
    let size = client.export().size;
    let read = client.read(0, u32::try_from(size).unwrap()).unwrap();
    server.stop();
    read
}

fn info(place: &Place, name: &str) -> Value {
    serde_json::from_str(&place.run_ok(["volume", "info", "--json", name])).unwrap()
}

/// A container of ours with our content.
fn ours(place: &Place, name: &str, options: &[&str]) {
    let create = ["luks", "create", "--size", &DATA.to_string(), "--passphrase-file", "zero"];
    place.run_ok([&create[..], options, &CHEAP, &[name]].concat());
    fill(place, name, &content(OURS));
}

/// Reads what we wrote, and writes the whole again.
const OURS_READ: &str = r#"
trap 'cryptsetup close v 2>/dev/null || :' EXIT
cryptsetup open -d /data/zero /disk/NAME v
cmp /dev/mapper/v /data/ours
dd if=/data/theirs of=/dev/mapper/v bs=262144 conv=fsync
cryptsetup close v
"#;

/// Reads it, and then makes a filesystem of it. Prints what the whole is in the end.
const OURS_WITH_EXT4: &str = r#"
trap 'cryptsetup close v 2>/dev/null || :' EXIT
cryptsetup open -d /data/zero /disk/NAME v
cmp /dev/mapper/v /data/ours
mkfs.ext4 -q /dev/mapper/v
mount -t ext4 /dev/mapper/v /mnt
cp -r /data/tree /mnt/
umount /mnt
mount -t ext4 -o ro /dev/mapper/v /mnt
diff -r /data/tree /mnt/tree
umount /mnt
sha256sum </dev/mapper/v
cryptsetup close v
"#;

/// Makes one and fills it.
const THEIRS_MADE: &str = r#"
trap 'cryptsetup close v 2>/dev/null || :' EXIT
cryptsetup luksFormat -q FORMAT /disk/NAME /data/zero
cryptsetup open -d /data/zero /disk/NAME v
dd if=/data/theirs of=/dev/mapper/v bs=262144 conv=fsync
cryptsetup close v
"#;

const CHEAP_FORMAT: &str = "--pbkdf-memory 64 --pbkdf-parallel 1 --pbkdf-force-iterations 4";

/// Containers of ours.
const OPENED: [(&str, &[&str]); 4] = [
    ("ours512", &["--sector-size", "512"]),
    ("ours4096", &["--sector-size", "4096"]),
    ("oursadiantum", &["--mode", "Adiantum"]),
    ("oursessiv", &["--mode", "AES-128-CBC-ESSIV", "--sector-size", "512"]),
];

/// Containers that cryptsetup makes in the machine.
const MADE: [(&str, &str); 4] = [
    ("theirs1", "--type luks1 --pbkdf-force-iterations 1000"),
    ("theirs1essiv", "--type luks1 --pbkdf-force-iterations 1000 -c aes-cbc-essiv:sha256 -s 128"),
    ("theirs2", "--type luks2 --sector-size 4096 CHEAP"),
    ("theirs2xts128", "--type luks2 --sector-size 2048 -s 256 CHEAP"),
];

#[test]
fn cryptsetup_and_dm_crypt_open_ours_and_we_theirs() {
    if !can_boot() {
        return;
    }
    for kernel in Kernel::all() {
        let place = place();
        let mut machine = Machine::new(&place, &kernel);
        if !prepare(&place, &mut machine, &["cryptsetup", "mkfs.ext4"]) {
            return;
        }
        for (name, options) in OPENED {
            ours(&place, name, options);
            machine.disk(name, &place.path(name), "");
            machine.step(name, &OURS_READ.replace("NAME", name));
        }
        // One that cryptsetup makes on the host and we fill.
        if require_tool("cryptsetup").is_some() {
            place.sparse("luks1", DATA + 2 * MIB);
            let mut format = Command::new("cryptsetup");
            place.prepare(&mut format);
            run(format.args([
                "luksFormat",
                "-q",
                "--type",
                "luks1",
                "--pbkdf-force-iterations",
                "1000",
                "luks1",
                "zero",
            ]));
            fill(&place, "luks1", &content(OURS));
            machine.disk("luks1", &place.path("luks1"), "");
            machine.step("luks1", &OURS_READ.replace("NAME", "luks1"));
        }
        for (name, format) in MADE {
            // The header of LUKS1 is shorter, so there is more behind the content.
            place.sparse(name, HEADER + DATA);
            machine.disk(name, &place.path(name), "");
            let format = format.replace("CHEAP", CHEAP_FORMAT);
            machine.step(name, &THEIRS_MADE.replace("FORMAT", &format).replace("NAME", name));
        }
        ours(&place, "ext4", &[]);
        machine.disk("ext4", &place.path("ext4"), "");
        machine.step("ext4", &OURS_WITH_EXT4.replace("NAME", "ext4"));
        let results = machine.boot();

        let theirs = content(THEIRS);
        let names =
            OPENED.map(|(name, _)| name).into_iter().chain(MADE.map(|(name, _)| name)).chain(["luks1"]);
        for name in names.filter(|name| place.path(name).exists() && results.of(name).is_some()) {
            let read = read(&place, name, &[]);
            assert!(read[..theirs.len()] == theirs, "{}: {name}", kernel.release);
        }
        is_the_filesystem(&place, &results);
    }
}

/// What we read is what the kernel read when it was done, and e2fsck finds nothing.
fn is_the_filesystem(place: &Place, results: &Results) {
    let read = read(place, "ext4", &["--read-only"]);
    let sum = results.of("ext4").expect("all kernels do it").split(' ').next().unwrap();
    assert_eq!(sha256(&read), sum);
    fs::write(place.path("decrypted"), &read).unwrap();
    if let Some(e2fsck) = require_tool("e2fsck") {
        run(Command::new(e2fsck).arg("-fn").arg(place.path("decrypted")));
    }
}

fn place() -> Place {
    let place = Place::new();
    place.secret("zero", b"passphrase zero");
    place
}

fn prepare(place: &Place, machine: &mut Machine<'_>, programs: &[&str]) -> bool {
    machine.modules(&MODULES);
    machine.modules(&["algif_skcipher", "sha1_generic", "loop"]);
    machine.file("/data/zero", b"passphrase zero");
    machine.file("/data/ours", &content(OURS));
    machine.file("/data/theirs", &content(THEIRS));
    super::tree(place, machine);
    machine.programs(programs)
}

/// It is in use while it goes on with what we began; what is written meanwhile is there.
const GOES_ON: &str = r#"
trap 'cryptsetup close v 2>/dev/null || :' EXIT
cryptsetup luksDump /disk/NAME | grep online-reencrypt
cryptsetup open -d /data/zero /disk/NAME v
cmp /dev/mapper/v /data/ours
cryptsetup reencrypt -q -d /data/zero --resume-only --active-name v &
dd if=/data/theirs of=/dev/mapper/v bs=65536 count=64 conv=fsync
dd if=/data/theirs of=/dev/mapper/v bs=4096 skip=2048 seek=2048 count=64 oflag=direct
cat /dev/mapper/v >/dev/null
wait $!
if cryptsetup luksDump /disk/NAME | grep online-reencrypt; then exit 1; fi
head -c 4194304 /dev/mapper/v >begin
head -c 4194304 /data/theirs | cmp - begin
cryptsetup close v
"#;

/// It begins while the device is in use, and is killed when some of it is done. What it leaves in the kernel has the device's name
/// in its own.
const BEGINS: &str = r#"
cryptsetup luksFormat -q --type luks2 --sector-size 512 CHEAP /disk/NAME /data/zero
cryptsetup open -d /data/zero /disk/NAME NAME
dd if=/data/ours of=/dev/mapper/NAME bs=262144 conv=fsync
cryptsetup reencrypt -q -d /data/zero CHEAP --resilience RESILIENCE --hotzone-size 512K --active-name NAME &
until cryptsetup luksDump /disk/NAME | grep -q '^  3: crypt'; do sleep 0.1; done
dd if=/data/theirs of=/dev/mapper/NAME bs=65536 count=32 conv=fsync
kill -9 $!
cryptsetup luksDump /disk/NAME | grep online-reencrypt
sync
cryptsetup close NAME
"#;

const RESILIENCES: [&str; 2] = ["checksum", "journal"];

/// Half-done by us, on the host; finished by cryptsetup in the machine while the device is in use; and the other way round.
#[test]
fn re_encryption_goes_on_where_the_other_began_it_while_the_device_is_in_use() {
    if !can_boot() {
        return;
    }
    for kernel in Kernel::all() {
        let place = place();
        let mut machine = Machine::new(&place, &kernel);
        if !prepare(&place, &mut machine, &["cryptsetup"]) {
            return;
        }
        for (name, options) in
            [("half512", ["--sector-size", "512"]), ("half4096", ["--sector-size", "4096"])]
        {
            ours(&place, name, &options);
            half_done(&place, name);
            machine.disk(name, &place.path(name), "");
            machine.step(name, &GOES_ON.replace("NAME", name));
        }
        for resilience in RESILIENCES {
            place.sparse(resilience, HEADER + DATA);
            machine.slow_disk(resilience, &place.path(resilience));
            let script = BEGINS.replace("CHEAP", CHEAP_FORMAT).replace("RESILIENCE", resilience);
            machine.step(resilience, &script.replace("NAME", resilience));
        }
        let results = machine.boot();

        let (ours, theirs) = (content(OURS), content(THEIRS));
        let (first, second) = (4 << 20, 8 << 20);
        for name in ["half512", "half4096"].iter().filter(|name| results.of(name).is_some()) {
            assert!(info(&place, name)["reencrypt"].is_null(), "{name}");
            let mut expected = ours.clone();
            expected[..first].copy_from_slice(&theirs[..first]);
            expected[second..second + (256 << 10)].copy_from_slice(&theirs[second..second + (256 << 10)]);
            assert!(read(&place, name, &["--read-only"]) == expected, "{}: {name}", kernel.release);
        }
        for name in RESILIENCES.iter().filter(|name| results.of(name).is_some()) {
            let mut expected = ours.clone();
            expected[..2 << 20].copy_from_slice(&theirs[..2 << 20]);
            // While the device is in use cryptsetup writes segments of a fixed length, which has to be that of the data.
            let resume = ["volume", "reencrypt", "--passphrase-file", "zero", "--resume", name];
            let image = File::options().write(true).open(place.path(name)).unwrap();
            image.set_len(HEADER + DATA + MIB).unwrap();
            let refused = place.run(resume);
            assert!(said(&refused).contains("not what its re-encryption"), "{}", said(&refused));
            image.set_len(HEADER + DATA).unwrap();
            assert!(!info(&place, name)["reencrypt"].is_null(), "{name}");
            assert!(read(&place, name, &["--pause-reencryption"]) == expected, "{}: {name}", kernel.release);
            place.run_ok(resume);
            assert!(info(&place, name)["reencrypt"].is_null(), "{name}");
            assert!(read(&place, name, &["--read-only"]) == expected, "{}: {name}", kernel.release);
            let mut test = Command::new("cryptsetup");
            place.prepare(&mut test);
            run(test.args(["open", "--test-passphrase", "-d", "zero", name]));
        }
    }
}

/// Begins to re-encrypt a container, and kills that when some of it is done.
fn half_done(place: &Place, name: &str) {
    for _ in 0..50 {
        let begun = !info(place, name)["reencrypt"].is_null();
        let mut command = place.command();
        command.args(["volume", "reencrypt", "--passphrase-file", "zero", "--throttle", "20MiB"]);
        command.args(begun.then_some("--resume")).arg(name);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(300));
        let _ = child.kill();
        child.wait().unwrap();
        let state = info(place, name)["reencrypt"].clone();
        assert!(!begun || !state.is_null(), "it was done before it was half done");
        if state["done_bytes"].as_u64().is_some_and(|done| done > 2 * MIB) {
            return;
        }
    }
    panic!("it never comes far");
}
