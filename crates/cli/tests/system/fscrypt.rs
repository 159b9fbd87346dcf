//! ext4 images that the machine's own kernel encrypts: made, unmounted, and then read and verified by the command.

use crate::rig::{Place, may_loop, said};
use inlinecrypt_testkit::{
    pattern, require_tool,
    undo::{LoopDevice, Mount},
};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// How a tree is encrypted: fscrypt's numbers.
#[derive(Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) name: &'static str,
    pub(crate) contents: u8,
    pub(crate) names: u8,
    pub(crate) flags: u8,
    pub(crate) log2: u8,
    /// Of version 1, by this descriptor.
    pub(crate) descriptor: Option<&'static str>,
}

const XTS_CTS: Policy = Policy { name: "xts", contents: 1, names: 4, flags: 3, log2: 0, descriptor: None };

/// All that Linux has. A kernel need not have all: what it refuses is said, and left out.
pub(crate) const POLICIES: [Policy; 13] = [
    XTS_CTS,
    Policy { name: "pad4", flags: 0, ..XTS_CTS },
    Policy { name: "pad16", flags: 2, ..XTS_CTS },
    Policy { name: "lblk64", flags: 8 | 1, ..XTS_CTS },
    Policy { name: "lblk32", flags: 16 | 3, ..XTS_CTS },
    Policy { name: "du512", log2: 9, ..XTS_CTS },
    Policy { name: "v1", descriptor: Some("0011223344556677"), ..XTS_CTS },
    Policy { name: "hctr2", names: 10, ..XTS_CTS },
    Policy { name: "sm4", contents: 7, names: 8, ..XTS_CTS },
    Policy { name: "essiv", contents: 5, names: 6, ..XTS_CTS },
    Policy { name: "adiantum", contents: 9, names: 9, ..XTS_CTS },
    Policy { name: "adiantum-direct", contents: 9, names: 9, flags: 4, ..XTS_CTS },
    Policy {
        name: "adiantum-v1",
        contents: 9,
        names: 9,
        flags: 4,
        descriptor: Some("0011223344556677"),
        ..XTS_CTS
    },
];

struct Lab {
    place: Place,
    identifier: String,
}

impl Lab {
    /// `None` if the machine cannot.
    fn new() -> Option<Self> {
        if !may_loop() || ["mkfs.ext4", "python3"].iter().any(|tool| require_tool(tool).is_none()) {
            return None;
        }
        let place = Place::new();
        place.raw_key("key", 64, 1);
        fs::create_dir(place.path("mnt")).unwrap();
        fs::create_dir(place.path("plain")).unwrap();
        Some(Self { place, identifier: String::new() })
    }

    fn mkfs(&self, size: u64, options: &[&str]) {
        let image = self.place.path("image");
        let _ = fs::remove_file(&image);
        self.place.sparse("image", size);
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).args(options).arg(&image).output().unwrap();
        assert!(made.status.success(), "{}", said(&made));
    }

    fn mount(&self) -> Mount {
        let image = self.place.path("image");
        Mount::new(&self.place.path("mnt"), &["-o", "loop", image.to_str().unwrap()]).unwrap()
    }

    fn ioctl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/fscrypt.py");
        Command::new("python3").arg(script).args(arguments).output().unwrap()
    }

    /// Adds the key; `false` if the kernel has no fscrypt.
    fn add_key(&mut self) -> bool {
        let (mount, key) = (self.place.path("mnt"), self.place.path("key"));
        let added = self.ioctl([OsStr::new("add"), mount.as_os_str(), key.as_os_str()]);
        if added.status.code() == Some(3) {
            eprintln!("SKIPPED: no fscrypt in this kernel: {}", said(&added));
            return false;
        }
        assert!(added.status.success(), "{}", said(&added));
        self.identifier = String::from_utf8(added.stdout).unwrap().trim().to_owned();
        let v1 = self.ioctl([
            OsStr::new("add"),
            mount.as_os_str(),
            key.as_os_str(),
            OsStr::new("0011223344556677"),
        ]);
        assert!(v1.status.success(), "{}", said(&v1));
        true
    }

    /// An empty encrypted directory on the mounted filesystem, and its plaintext twin.
    fn encrypted(&self, policy: &Policy) -> Option<[PathBuf; 2]> {
        let twins = [self.place.path("mnt").join(policy.name), self.place.path("plain").join(policy.name)];
        fs::create_dir(&twins[0]).unwrap();
        let Policy { contents, names, flags, log2, descriptor, .. } = *policy;
        let key = descriptor.unwrap_or(&self.identifier).to_owned();
        let numbers = [contents, names, flags, log2].map(|number| number.to_string());
        let arguments =
            [vec!["policy".to_owned(), twins[0].display().to_string()], numbers.to_vec(), vec![key]].concat();
        let set = self.ioctl(arguments);
        let usable = set.status.success()
            && File::create(twins[0].join("probe")).is_ok_and(|file| file.write_all_at(b"x", 0).is_ok());
        if !usable {
            eprintln!("SKIPPED: {} is nothing for this kernel: {}", policy.name, said(&set));
            let _ = fs::remove_dir_all(&twins[0]);
            return None;
        }
        fs::remove_file(twins[0].join("probe")).unwrap();
        fs::create_dir(&twins[1]).unwrap();
        Some(twins)
    }

    fn verify(&self, more: &[&str]) -> serde_json::Value {
        let against = self.place.path("plain").display().to_string();
        let arguments =
            ["fscrypt", "verify", "image", "--key", "raw:key", "--key", "0011223344556677=raw:key", "--json"];
        let verified = self.place.run(arguments.iter().chain(more).copied().chain(["--against", &against]));
        assert!(verified.status.success(), "{}", said(&verified));
        serde_json::from_slice(&verified.stdout).unwrap()
    }
}

/// Files of all shapes, the same in both directories.
fn fill(twins: &[PathBuf; 2], many: usize) {
    for dir in twins {
        for (seed, size) in (0..).zip([0, 1, 511, 512, 4095, 4096, 5000, 70_000]) {
            fs::write(dir.join(format!("file of {size} bytes")), pattern::bytes(seed, 0, size)).unwrap();
        }
        let sparse = File::create(dir.join("sparse")).unwrap();
        sparse.write_all_at(&pattern::bytes(20, 0, 9000), 0).unwrap();
        sparse.write_all_at(&pattern::bytes(21, 0, 9000), 300_001).unwrap();
        sparse.set_len(500_003).unwrap();
        // Cut in the middle of a block, and grown again.
        let cut = File::create(dir.join("cut")).unwrap();
        cut.write_all_at(&pattern::bytes(22, 0, 20_000), 0).unwrap();
        cut.set_len(9_999).unwrap();
        cut.set_len(10_001).unwrap();
        // Reserved behind its end.
        let reserved = File::create(dir.join("reserved")).unwrap();
        reserved.write_all_at(&pattern::bytes(23, 0, 100), 0).unwrap();
        let _ = rustix::fs::fallocate(&reserved, rustix::fs::FallocateFlags::KEEP_SIZE, 0, 100_000);
        for len in [1, 15, 16, 17, 31, 32, 33, 100, 149, 150, 239, 240, 255] {
            fs::write(dir.join("n".repeat(len)), [7; 3]).unwrap();
        }
        fs::write(dir.join("grüße \u{1f511}"), b"text").unwrap();
        fs::write(dir.join(OsStr::from_bytes(b"latin-1: \xe9\xff")), b"bytes").unwrap();
        fs::create_dir_all(dir.join("a/b/c")).unwrap();
        fs::write(dir.join("a/b/c/deep"), pattern::bytes(24, 0, 3000)).unwrap();
        fs::hard_link(dir.join("a/b/c/deep"), dir.join("a/another name")).unwrap();
        symlink("short", dir.join("short link")).unwrap();
        symlink("x/".repeat(400), dir.join("long link")).unwrap();
        let status = Command::new("mkfifo").arg(dir.join("fifo")).status().unwrap();
        assert!(status.success());
        fs::create_dir(dir.join("many")).unwrap();
        for number in 0..many {
            fs::write(dir.join(format!("many/file number {number} of {many}")), number.to_le_bytes())
                .unwrap();
        }
    }
}

/// Names below a directory, as the system's own readers see them.
fn walk(top: &Path) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut pending = vec![top.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            found.push(entry.path().strip_prefix(top).unwrap().as_os_str().as_bytes().to_vec());
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn what_this_kernel_encrypts_is_listed_read_and_verified() {
    let layouts: [(&str, u64, &[&str]); 6] = [
        ("as mkfs makes it", 96, &["-O", "encrypt,stable_inodes"]),
        ("blocks of 1 KiB", 96, &["-O", "encrypt,stable_inodes", "-b", "1024"]),
        ("no extents, no checksums", 96, &["-O", "encrypt,stable_inodes,^extent,^metadata_csum,^64bit"]),
        ("small inodes: contexts in blocks", 96, &["-O", "encrypt,stable_inodes", "-I", "128"]),
        (
            "groups of descriptors, seed of checksums",
            96,
            &["-b", "1024", "-O", "encrypt,stable_inodes,meta_bg,^resize_inode,metadata_csum_seed"],
        ),
        (
            "no journal, another hash",
            96,
            &[
                "-O",
                "encrypt,stable_inodes,^has_journal",
                "-E",
                "hash_seed=01234567-89ab-cdef-0123-456789abcdef",
            ],
        ),
    ];
    let Some(mut lab) = Lab::new() else { return };
    for (number, (layout, mib, options)) in layouts.into_iter().enumerate() {
        lab.mkfs(mib << 20, options);
        let plain = lab.place.path("plain");
        fs::remove_dir_all(&plain).unwrap();
        fs::create_dir_all(plain.join("lost+found")).unwrap();
        let mount = lab.mount();
        if !lab.add_key() {
            return;
        }
        let mut made = 0;
        for policy in POLICIES {
            if let Some(twins) = lab.encrypted(&policy) {
                fill(&twins, if policy.name == "xts" { 400 } else { 3 });
                made += 1;
            }
        }
        assert!(made >= 5, "{layout}: {made} policies");
        mount.unmount().unwrap();

        let report = lab.verify(&[]);
        assert_eq!(report["good"], true, "{layout}: {report:#}");
        assert_eq!(report["policies"].as_array().unwrap().len(), made, "{layout}");
        assert!(report["checked"]["files"].as_u64().unwrap() >= 25 * made as u64, "{layout}: {report:#}");

        // Names and contents, one by one.
        let listed = lab.place.run([
            "fscrypt",
            "ls",
            "-R",
            "image",
            "--key",
            "raw:key",
            "--key",
            "0011223344556677=raw:key",
        ]);
        assert!(listed.status.success(), "{}", said(&listed));
        let mut ours: Vec<&[u8]> =
            listed.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).collect();
        ours.sort();
        let theirs = walk(&plain);
        assert!(ours == theirs, "{layout}");
        for path in theirs.iter().step_by(29) {
            let on_plain = plain.join(OsStr::from_bytes(path));
            if !fs::symlink_metadata(&on_plain).unwrap().is_file() {
                continue;
            }
            let arguments =
                ["fscrypt", "cat", "image", "--key", "raw:key", "--key", "0011223344556677=raw:key"];
            let mut command = lab.place.command();
            let read = command.args(arguments).arg(OsStr::from_bytes(path)).output().unwrap();
            assert!(read.status.success(), "{}", said(&read));
            assert!(read.stdout == fs::read(&on_plain).unwrap(), "{layout}: {}", on_plain.display());
        }

        // Without the key: the names that the kernel shows then. It looks in the order of hashes where there are any.
        let mount = lab.mount();
        let theirs = walk(&lab.place.path("mnt"));
        mount.unmount().unwrap();
        let listed = lab.place.run(["fscrypt", "ls", "-R", "image"]);
        let mut ours: Vec<&[u8]> =
            listed.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).collect();
        ours.sort();
        assert!(ours == theirs, "{layout}: names without a key");

        // A device is read like a file.
        if number == 0 && require_tool("losetup").is_some() {
            let device = LoopDevice::new(&lab.place.path("image"), &["--read-only"]).unwrap();
            let arguments = ["fscrypt", "ls", "-R"].map(OsStr::new);
            let listed = lab.place.run(arguments.into_iter().chain([device.path().as_os_str()]));
            let names = listed.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
            assert_eq!(names.count(), theirs.len(), "{}", said(&listed));
            device.detach().unwrap();
        }

        // And e2fsck agrees that nothing was changed.
        if number == 0 && require_tool("e2fsck").is_some() {
            let checked = Command::new("e2fsck").arg("-fn").arg(lab.place.path("image")).output().unwrap();
            assert!(checked.status.success(), "{}", said(&checked));
        }
    }
}

#[test]
fn what_is_mounted_and_what_was_pulled_out_is_refused() {
    let Some(mut lab) = Lab::new() else { return };
    lab.mkfs(32 << 20, &["-O", "encrypt"]);
    let mount = lab.mount();
    if !lab.add_key() {
        return;
    }
    fs::write(lab.place.path("mnt/file"), b"x").unwrap();
    rustix::fs::sync();
    let refused = lab.place.run(["fscrypt", "ls", "image"]);
    assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
    assert!(said(&refused).contains("journal"), "{}", said(&refused));
    mount.unmount().unwrap();
    let listed = lab.place.run(["fscrypt", "ls", "image"]);
    assert_eq!(listed.stdout, b"file\nlost+found\n", "{}", said(&listed));
}
