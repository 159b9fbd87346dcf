//! Volumes of ours in dm-crypt, by the line that we print or the line that we are given: every byte, in both directions.

use super::kernels::{Kernel, can_boot};
use super::machine::Machine;
use crate::rig::Place;
use inlinecrypt_testkit::pattern;
use std::fs;

/// How a volume came to its layout.
enum By {
    /// It was made with these options, and says by which line Linux opens it.
    Options(&'static [&'static str]),
    /// It is served by a line, here without its first two words: cipher, IV offset, start, and options.
    Line([&'static str; 4]),
}

struct Layout {
    name: &'static str,
    key_bytes: usize,
    by: By,
}

const fn made(name: &'static str, key_bytes: usize, options: &'static [&'static str]) -> Layout {
    Layout { name, key_bytes, by: By::Options(options) }
}

const fn given(name: &'static str, key_bytes: usize, line: [&'static str; 4]) -> Layout {
    Layout { name, key_bytes, by: By::Line(line) }
}

/// All that docs/dm-crypt.md says is served, in other sizes and at other places.
const LAYOUTS: [Layout; 27] = [
    made("xts", 64, &["--data-unit", "512"]),
    made("xts-offset", 64, &["--data-unit", "512", "--offset", "64k"]),
    made("xts-4096", 64, &[]),
    // Past 2^32 sectors, so that all of plain64 counts.
    made("xts-4096-iv", 64, &["--iv-offset", "34359738360", "--offset", "4096"]),
    made("xts-half", 64, &["--data-unit", "1024", "--offset", "3k"]),
    made("xts-1024", 64, &["--data-unit", "1024"]),
    made("xts-2048-sectors", 64, &["--data-unit", "2048", "--iv", "sectors", "--iv-offset", "12"]),
    made("xts-4096-sectors", 64, &["--iv", "sectors", "--offset", "1MiB"]),
    made("xts128", 32, &["--mode", "AES-128-XTS", "--data-unit", "512", "--iv-offset", "77"]),
    made("xts128-1024", 32, &["--mode", "AES-128-XTS", "--data-unit", "1024"]),
    made("essiv", 16, &["--mode", "AES-128-CBC-ESSIV", "--data-unit", "512"]),
    made("essiv-4096", 16, &["--mode", "AES-128-CBC-ESSIV", "--iv-offset", "8"]),
    made("essiv-4096-sectors", 16, &["--mode", "AES-128-CBC-ESSIV", "--iv", "sectors"]),
    made("adiantum", 32, &["--mode", "Adiantum", "--data-unit", "512"]),
    made("adiantum-4096", 32, &["--mode", "Adiantum", "--offset", "4096", "--iv-offset", "80"]),
    made("adiantum-sectors", 32, &["--mode", "Adiantum", "--data-unit", "2048", "--iv", "sectors"]),
    made("sm4", 32, &["--mode", "SM4-XTS", "--data-unit", "512"]),
    made("sm4-4096", 32, &["--mode", "SM4-XTS"]),
    given("capi-xts", 64, ["capi:xts(aes)-plain64", "0", "8", ""]),
    given("capi-xts-large", 32, ["capi:xts(aes)-plain64", "16", "8", "2 sector_size:4096 iv_large_sectors"]),
    given("capi-cbc-essiv", 16, ["capi:cbc(aes)-essiv:sha256", "5", "0", ""]),
    given("capi-essiv", 16, ["capi:essiv(cbc(aes),sha256)-plain64", "0", "6", "1 sector_size:1024"]),
    given("capi-adiantum", 32, ["capi:adiantum(xchacha12,aes)-plain64", "0", "0", "1 sector_size:4096"]),
    given("capi-sm4", 32, ["capi:xts(sm4)-plain64", "0", "0", ""]),
    // 32 bits that just suffice.
    given("plain", 64, ["aes-xts-plain", "4294965000", "0", ""]),
    given("essiv-plain", 16, ["capi:essiv(cbc(aes),sha256)-plain", "4294965000", "0", ""]),
    given(
        "of-no-effect",
        64,
        [
            "aes-xts-plain64",
            "0",
            "0",
            "6 allow_discards same_cpu_crypt submit_from_crypt_cpus no_read_workqueue no_write_workqueue sector_size:4096",
        ],
    ),
];

/// SM4 is in no kernel of Debian's.
const MAY_BE_MISSING: [&str; 3] = ["sm4", "sm4-4096", "capi-sm4"];

/// Ciphers of the layouts, and what makes them: nobody loads modules on demand.
pub(super) const MODULES: [&str; 23] = [
    "dm-crypt",
    "aes_generic",
    "aesni-intel",
    "xts",
    "ecb",
    "cbc",
    "essiv",
    "authenc",
    "sha256_generic",
    "sha256-ssse3",
    "chacha",
    "chacha_generic",
    "chacha-x86_64",
    "nhpoly1305",
    "nhpoly1305-sse2",
    "nhpoly1305-avx2",
    "libpoly1305",
    "adiantum",
    "sm4_generic",
    "sm4-aesni-avx2-x86_64",
    "crc32c_generic",
    "crc32c-intel",
    "cryptd",
];

const SECTORS: u64 = 2048;

/// A volume whose start is no multiple of its data unit. The kernel refuses its line; with a loop device of its own it has it.
const UNALIGNED: Layout = made("unaligned", 64, &["--offset", "512"]);

/// The same by a loop device, where the line itself is refused.
const BY_LOOP: &str = r#"
trap 'dmsetup remove v 2>/dev/null || :' EXIT
if dmsetup create v --table "$(cat /tables/NAME)"; then exit 1; fi
losetup -o 512 /dev/loop0 /disk/NAME
sed 's,/disk/NAME 1 ,/dev/loop0 0 ,' /tables/NAME >line
grep -q '/dev/loop0 0 ' line
dmsetup create v --table "$(cat line)"
cmp /dev/mapper/v /data/ours
dd if=/data/theirs of=/dev/mapper/v bs=65536 conv=fsync
dmsetup remove v
losetup -d /dev/loop0
"#;

/// What we wrote, for the kernel to read, and the other way round.
const OURS: u64 = 41;
const THEIRS: u64 = 42;

fn content(seed: u64) -> Vec<u8> {
    pattern::bytes(seed, 0, usize::try_from(SECTORS * 512).unwrap())
}

impl Layout {
    fn image(&self) -> String {
        format!("{}.img", self.name)
    }

    fn key(&self) -> String {
        format!("{}.key", self.name)
    }

    /// The line for us, without the key; what `serve` takes.
    fn serve(&self) -> Vec<String> {
        match self.by {
            By::Options(_) => vec![self.image()],
            By::Line(_) => {
                ["--key", &format!("raw:{}", self.key()), "--dm-table", &self.line("-", &self.image())]
                    .map(str::to_owned)
                    .to_vec()
            }
        }
    }

    fn line(&self, key: &str, device: &str) -> String {
        let By::Line([cipher, iv_offset, start, options]) = self.by else {
            unreachable!("asked for lines only")
        };
        format!("0 {SECTORS} crypt {cipher} {key} {iv_offset} {device} {start} {options}")
            .trim_end()
            .to_owned()
    }

    /// Makes the volume. The line for the kernel, with the key.
    fn make(&self, place: &Place) -> String {
        let seed = self.name.bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
        place.raw_key(&self.key(), self.key_bytes, seed);
        let key = format!("raw:{}", self.key());
        match self.by {
            By::Options(options) => {
                let create = ["volume", "create", "--size", "1MiB", "--key", &key];
                place.run_ok([&create, options, &[&self.image()]].concat());
                let line = place.run_ok(["volume", "info", "--dm-table", "--show-key", &self.image()]);
                let device = place.path(&self.image());
                assert!(line.contains(device.to_str().unwrap()), "{line}");
                line.replace(device.to_str().unwrap(), &format!("/disk/{}", self.name))
            }
            By::Line([_, _, start, _]) => {
                place.sparse(&self.image(), (SECTORS + start.parse::<u64>().unwrap()) * 512);
                self.line(
                    &hex::encode(fs::read(place.path(&self.key())).unwrap()),
                    &format!("/disk/{}", self.name),
                )
            }
        }
    }

    fn fill(&self, place: &Place, content: &[u8]) {
        let server = place.serve(self.serve());
        let mut client = server.client(self.name);
        client.write(0, content).unwrap();
        client.flush().unwrap();
        server.stop();
    }

    fn read(&self, place: &Place) -> Vec<u8> {
        let server = place.serve([self.serve(), vec!["--read-only".to_owned()]].concat());
        let mut client = server.client(self.name);
        let size = client.export().size;
        let read = client.read(0, u32::try_from(size).unwrap()).unwrap();
        server.stop();
        read
    }
}

/// Reads what we wrote, and writes the whole again: in large pieces, past the page cache in small ones, and in pieces that suit
/// nothing.
const BOTH_WAYS: &str = r#"
trap 'dmsetup remove v 2>/dev/null || :' EXIT
if ! dmsetup create v --table "$(cat /tables/NAME)"; then
    grep -q ' NAME ' /may-be-missing && exit 77
    exit 1
fi
cmp /dev/mapper/v /data/ours
dd if=/data/theirs of=/dev/mapper/v bs=65536 count=4 conv=fsync
dd if=/data/theirs of=/dev/mapper/v bs=4096 skip=64 seek=64 count=64 oflag=direct
dd if=/data/theirs of=/dev/mapper/v bs=7168 skip=524288 seek=524288 iflag=skip_bytes oflag=seek_bytes conv=fsync
dmsetup remove v
"#;

#[test]
fn dm_crypt_reads_what_we_write_and_we_what_it_writes() {
    if !can_boot() {
        return;
    }
    for kernel in Kernel::all() {
        let place = Place::new();
        let mut machine = Machine::new(&place, &kernel);
        if !machine.programs(&["dmsetup"]) {
            return;
        }
        machine.modules(&MODULES);
        machine.modules(&["loop"]);
        let [ours, theirs] = [OURS, THEIRS].map(content);
        machine.file("/data/ours", &ours);
        machine.file("/data/theirs", &theirs);
        machine.file("/may-be-missing", format!(" {} ", MAY_BE_MISSING.join(" ")).as_bytes());
        let all = || LAYOUTS.iter().chain([&UNALIGNED]);
        for layout in all() {
            let line = layout.make(&place);
            layout.fill(&place, &ours);
            machine.file(&format!("/tables/{}", layout.name), line.as_bytes());
            machine.disk(layout.name, &place.path(&layout.image()), "");
            let script = if layout.name == UNALIGNED.name { BY_LOOP } else { BOTH_WAYS };
            machine.step(layout.name, &script.replace("NAME", layout.name));
        }
        let results = machine.boot();
        for layout in all() {
            // What it could not open is as it was.
            let expected = if results.of(layout.name).is_some() { &theirs } else { &ours };
            assert!(layout.read(&place) == *expected, "{}: {}", kernel.release, layout.name);
        }
    }
}
