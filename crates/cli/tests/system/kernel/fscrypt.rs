//! Files that a kernel encrypts by fscrypt's own code or through blk-crypto, which is another way to the same bytes. The image is
//! read and verified by the command, on the host.

use super::kernels::{Kernel, can_boot};
use super::machine::Machine;
use crate::fscrypt::POLICIES;
use crate::rig::{MIB, Place, run, said};
use inlinecrypt_testkit::require_tool;
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = 160 * MIB;

/// What fscrypt and its modes need.
const MODULES: [&str; 29] = [
    "aes_generic",
    "aesni-intel",
    "xts",
    "ecb",
    "cbc",
    "cts",
    "essiv",
    "authenc",
    "hmac",
    "sha256_generic",
    "sha256-ssse3",
    "sha512_generic",
    "sha512-ssse3",
    "chacha",
    "chacha_generic",
    "chacha-x86_64",
    "nhpoly1305",
    "nhpoly1305-sse2",
    "adiantum",
    "hctr2",
    "xctr",
    "polyval-generic",
    "polyval-clmulni",
    "sm4_generic",
    "sm4-aesni-avx-x86_64",
    "sm4-aesni-avx2-x86_64",
    "ctr",
    "crc32c_generic",
    "crc32c-intel",
];

/// Mounts it, and adds the key in both forms.
const BEGIN: &str = r#"
mount -t ext4 -o "OPTIONS" /disk/NAME /mnt
identifier=$($FSCRYPT add /mnt /data/key)
$FSCRYPT add /mnt /data/key 0011223344556677 >/dev/null
"#;

/// An encrypted directory with files in it, if the kernel takes the policy. Cuts a file in the middle of a block, and makes it longer again.
const POLICY: &str = r#"
mkdir /mnt/NAME
if said=$($FSCRYPT policy /mnt/NAME NUMBERS KEY 2>&1) && said=$(touch /mnt/NAME/probe 2>&1); then
    rm /mnt/NAME/probe
    cp -r /data/tree /mnt/NAME/
    truncate -s 9999 /mnt/NAME/tree/large
    truncate -s 10001 /mnt/NAME/tree/large
    echo made NAME
else
    rm -r /mnt/NAME
    echo "refused NAME: $said: $(dmesg | tail -n 1)"
fi
"#;

/// Mounts it again, and compares what two policies give back.
const END: &str = r#"
umount /mnt
mount -t ext4 -o "OPTIONS,ro" /disk/NAME /mnt
inlinecrypt probe --json | tr -d ' \n' | grep -o '"mounted_with_inlinecrypt":[^]]*'
$FSCRYPT add /mnt /data/key >/dev/null
diff -r /mnt/xts/tree /mnt/lblk64/tree
umount /mnt
"#;

/// How the filesystem is made.
const LAYOUTS: [(&str, &[&str]); 2] = [
    ("ext4", &["-O", "encrypt,stable_inodes", "-b", "4096"]),
    ("ext4-1k", &["-O", "encrypt,stable_inodes", "-b", "1024"]),
];

#[test]
fn what_kernels_encrypt_through_blk_crypto_and_by_themselves_is_read_and_verified() {
    if !can_boot() || ["mkfs.ext4", "python3"].iter().any(|tool| require_tool(tool).is_none()) {
        return;
    }
    for kernel in Kernel::all() {
        let place = Place::new();
        let mut machine = Machine::new(&place, &kernel);
        machine.modules(&MODULES);
        machine.our_program();
        machine.file("/data/key", &fs::read(place.raw_key("key", 64, 1)).unwrap());
        super::tree(&place, &mut machine);
        let fscrypt = python(&mut machine);
        // Since 7.1 contents always go through blk-crypto; with the option they may go to hardware, too.
        let inline = kernel.has("CONFIG_FS_ENCRYPTION_INLINE_CRYPT");
        if !inline {
            eprintln!("SKIPPED: Linux {} has no fscrypt through blk-crypto", kernel.release);
        }
        let mut images = Vec::new();
        for (layout, mkfs) in LAYOUTS {
            for (suffix, options) in [("", "rw"), ("-inline", "rw,inlinecrypt")] {
                if suffix.is_empty() || inline {
                    let name = format!("{layout}{suffix}");
                    run(Command::new("mkfs.ext4")
                        .args(["-q", "-F"])
                        .args(mkfs)
                        .arg(place.sparse(&name, SIZE)));
                    machine.disk(&name, &place.path(&name), "");
                    machine.step(&name, &script(&fscrypt, &name, options));
                    images.push(name);
                }
            }
        }
        let results = machine.boot();
        for image in images {
            let said = results.of(&image).expect("all kernels do it");
            for refused in said.lines().filter_map(|line| line.strip_prefix("refused ")) {
                eprintln!("SKIPPED: on {image}, Linux {}: {refused}", kernel.release);
            }
            let made: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("made ")).collect();
            assert!(made.len() >= 5, "{}: {made:?}", kernel.release);
            let probed = said.contains("\"mounted_with_inlinecrypt\":[\"/disk/");
            assert_eq!(probed, image.ends_with("-inline"), "{}: {image}", kernel.release);
            is_good(&place, &image, &made);
        }
    }
}

fn script(fscrypt: &str, image: &str, options: &str) -> String {
    let mut script = format!("FSCRYPT='{fscrypt}'\n{BEGIN}");
    for policy in &POLICIES {
        let numbers =
            [policy.contents, policy.names, policy.flags, policy.log2].map(|number| number.to_string());
        let made = POLICY.replace("NUMBERS", &numbers.join(" "));
        script +=
            &made.replace("KEY", policy.descriptor.unwrap_or("$identifier")).replace("NAME", policy.name);
    }
    [script, END.to_owned()].concat().replace("OPTIONS", options).replace("NAME", image)
}

/// The image against the files that were copied into it, policy by policy.
fn is_good(place: &Place, image: &str, made: &[&str]) {
    let plain = place.path(&format!("plain-{image}"));
    fs::create_dir_all(plain.join("lost+found")).unwrap();
    for policy in made {
        let twin = plain.join(policy);
        fs::create_dir(&twin).unwrap();
        run(Command::new("cp").arg("-r").arg(place.path("tree")).arg(&twin));
        let cut = File::options().write(true).open(twin.join("tree/large")).unwrap();
        cut.set_len(9_999).unwrap();
        cut.set_len(10_001).unwrap();
    }
    let keys = ["--key", "raw:key", "--key", "0011223344556677=raw:key"];
    let against = plain.display().to_string();
    let verified =
        place.run([&["fscrypt", "verify", image][..], &keys, &["--json", "--against", &against]].concat());
    assert!(verified.status.success(), "{image}: {}", said(&verified));
    let report: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!(report["good"], true, "{image}: {report:#}");
    assert_eq!(report["policies"].as_array().unwrap().len(), made.len(), "{image}: {report:#}");
    assert!(report["checked"]["files"].as_u64().unwrap() >= 111 * made.len() as u64, "{image}: {report:#}");
    for policy in made {
        let path = format!("{policy}/tree/a/b/c/deep");
        let read = place.run([&["fscrypt", "cat", image][..], &keys, &[&path]].concat());
        assert!(read.stdout == fs::read(plain.join(&path)).unwrap(), "{image}: {path}: {}", said(&read));
        let listed = place.run_ok([&["fscrypt", "ls", image, &format!("{policy}/tree")][..], &keys].concat());
        assert!(listed.contains("file of 4097 bytes"), "{image}: {listed}");
    }
    fs::remove_dir_all(plain).unwrap();
}

/// Puts Python into a machine, with as much of its library as the script needs that makes fscrypt's ioctls. How to call that.
fn python(machine: &mut Machine<'_>) -> String {
    let used = "import errno, fcntl, os, struct, sys\n\
                print(sys.executable)\n\
                for module in list(sys.modules.values()):\n    \
                    if getattr(module, '__file__', None): print(module.__file__)\n";
    let files = run(Command::new("python3").args(["-I", "-S", "-c", used]));
    let files: Vec<PathBuf> = files.lines().map(PathBuf::from).collect();
    for path in &files {
        machine.program_at(path, path);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/fscrypt.py");
    machine.file("/data/fscrypt.py", &fs::read(script).unwrap());
    format!("{} -I -S /data/fscrypt.py", files[0].display())
}
