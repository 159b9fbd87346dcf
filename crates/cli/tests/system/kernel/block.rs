//! Our program where real disks are: on block devices, under the kernel's own NBD client, and beside its sysfs.

use super::dm_crypt::MODULES;
use super::kernels::{Kernel, can_boot};
use super::machine::{Machine, Results};
use crate::rig::{MIB, Place, run};
use inlinecrypt_testkit::require_tool;
use serde_json::Value;
use std::fs;
use std::process::Command;

const SIZE: u64 = 64 * MIB;

/// Starts a server for a disk, with the options in `$OPTIONS`, and gives it to the kernel.
const SERVE: &str = r#"
inlinecrypt serve --key raw:/data/key --nbd unix:/run/nbd.sock --control /run/control --name v $OPTIONS "$DISK" 2>&1 &
server=$!
until [ -S /run/nbd.sock ]; do kill -0 $server; sleep 0.1; done
nbd-client -unix /run/nbd.sock -N v $CLIENT /dev/nbd0 1>&2
"#;

/// And undoes that.
const STOP: &str = r#"
nbd-client -d /dev/nbd0 1>&2
kill $server
wait $server
[ ! -e /run/nbd.sock ]
"#;

/// Makes a filesystem on it, fills it, and reads it again. Prints what the whole is in the end.
const FILESYSTEM: &str = r#"
[ "$(blockdev --getsize64 /dev/nbd0)" = "$(blockdev --getsize64 "$DISK")" ]
mkfs.ext4 -q -E "$MKFS" /dev/nbd0
mount -t ext4 -o "$MOUNT" /dev/nbd0 /mnt
cp -r /data/tree /mnt/
sync
rm -r /mnt/tree/many
cp -r /data/tree/many /mnt/tree/
umount /mnt
e2fsck -fn /dev/nbd0 1>&2
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/nbd0 /mnt
diff -r /data/tree /mnt/tree
umount /mnt
echo "sum $(sha256sum </dev/nbd0)"
echo "discards $(cat /sys/block/nbd0/queue/discard_max_bytes)"
"#;

/// Nobody else gets a disk that is served, and what somebody else has is not served.
const EXCLUSIVE: &str = r#"
code=0
inlinecrypt serve --key raw:/data/key --nbd unix:/run/2.sock --control /run/2.control "$DISK" || code=$?
[ $code = 5 ]
said=$(dmsetup create other --table "0 2048 linear $DISK 0" 2>&1) && exit 1
echo "$said" 1>&2
echo "$said" | grep -q busy
said=$(mkfs.ext4 -q -F "$DISK" 2>&1) && exit 1
echo "$said" 1>&2
echo "$said" | grep -q 'in use'
"#;

/// A disk that something is built on, and one that is mounted.
const IN_USE: &str = r#"
dmsetup create other --table "0 2048 linear /disk/used 0"
code=0
inlinecrypt serve --key raw:/data/key --nbd unix:/run/nbd.sock --control /run/control /disk/used 2>&1 || code=$?
dmsetup remove other
echo "code $code"
mkfs.ext4 -q /disk/used
mount -t ext4 /disk/used /mnt
code=0
inlinecrypt serve --key raw:/data/key --nbd unix:/run/nbd.sock --control /run/control /disk/used 2>&1 || code=$?
umount /mnt
echo "code $code"
"#;

/// Keys of a disk's hardware where there is none.
const KEYS: &str = r#"
for verb in "generate --out new.key" "import --in raw.key --out new.key" "prepare --in blob --out new.key"; do
    head -c 32 /data/key >raw.key
    head -c 68 /data/tree/large >blob
    chmod 600 raw.key blob
    code=0
    inlinecrypt key $verb --device /disk/plain 2>&1 || code=$?
    echo "code $code"
    [ ! -e new.key ]
done
"#;

/// A server of somebody who may do nothing (not with the shell's own setpriv, which cannot say so). Old kernels keep from him what they show to others of himself.
const NOBODY: &str = r#"
mkdir -m 700 /tmp/nobody
chown 65534:65534 /tmp/nobody
cd /tmp/nobody
export HOME=/tmp/nobody XDG_RUNTIME_DIR=/tmp/nobody
/prog/setpriv --reuid=65534 --regid=65534 --clear-groups inlinecrypt serve --create 1MiB v.img 2>&1 &
server=$!
until [ -S v.img.sock ]; do kill -0 $server; sleep 0.1; done
nbd-client -unix v.img.sock -N v /dev/nbd0 1>&2
head -c 65536 /data/tree/large >/dev/nbd0
sync /dev/nbd0
nbd-client -d /dev/nbd0 1>&2
kill $server
wait $server
"#;

struct Trial {
    name: &'static str,
    /// Options of the disk.
    disk: &'static str,
    serve: &'static str,
    client: &'static str,
    mkfs: &'static str,
    mount: &'static str,
    /// Whether discards arrive.
    discards: bool,
}

const TRIALS: [Trial; 3] = [
    Trial {
        name: "trims",
        disk: "",
        serve: "",
        client: "-C 2",
        mkfs: "discard",
        mount: "discard",
        discards: true,
    },
    // Nothing below can be told what is not needed.
    Trial {
        name: "plain",
        disk: "discard=off,write-zeroes=off",
        serve: "--direct --data-unit 512",
        client: "",
        mkfs: "nodiscard",
        mount: "nodiscard",
        discards: false,
    },
    Trial {
        name: "large",
        disk: "logical_block_size=4096,physical_block_size=4096",
        serve: "--direct",
        client: "-C 4 -b 4096",
        mkfs: "discard",
        mount: "discard",
        discards: true,
    },
];

#[test]
fn block_devices_are_served_to_the_kernels_own_client() {
    if !can_boot() {
        return;
    }
    for kernel in Kernel::all() {
        let place = Place::new();
        let mut machine = Machine::new(&place, &kernel);
        machine.modules(&MODULES);
        machine.modules(&["nbd"]);
        if !machine.programs(&["nbd-client", "mkfs.ext4", "e2fsck", "dmsetup", "setpriv"]) {
            return;
        }
        machine.our_program();
        machine.file("/data/key", &fs::read(place.raw_key("key", 64, 3)).unwrap());
        super::tree(&place, &mut machine);
        for trial in &TRIALS {
            let Trial { name, disk, serve, client, mkfs, mount, .. } = trial;
            place.sparse(name, SIZE);
            machine.disk(name, &place.path(name), disk);
            let settings = format!(
                "DISK=/disk/{name} OPTIONS='{serve}' CLIENT='{client}' MKFS='{mkfs}' MOUNT='{mount}'\n"
            );
            machine.step(name, &[&settings, SERVE, FILESYSTEM, EXCLUSIVE, STOP].concat());
        }
        place.sparse("used", SIZE);
        machine.disk("used", &place.path("used"), "");
        machine.step("in-use", IN_USE);
        machine.step("probe", "inlinecrypt probe >/dev/null\ninlinecrypt probe --json");
        machine.step("keys", KEYS);
        machine.step("nobody", NOBODY);
        let results = machine.boot();
        for trial in &TRIALS {
            is_what_the_kernel_saw(&place, trial, &results);
        }
        let said = results.of("in-use").expect("all kernels do it");
        assert!(said.contains("is built on it") && said.contains("it is mounted on /mnt"), "{said}");
        assert_eq!(said.matches("code ").count(), 2, "{said}");
        is_this_kernel(&kernel, results.of("probe").expect("all kernels do it"));
        let said = results.of("nobody").expect("all kernels do it");
        assert!(said.contains("v.img") && !said.contains("panicked"), "{said}");
        let said = results.of("keys").expect("all kernels do it");
        assert!(said.matches("code 1\n").count() == 3, "{said}");
        assert!(said.matches("no inline encryption").count() == 3, "{said}");
    }
}

fn is_what_the_kernel_saw(place: &Place, trial: &Trial, results: &Results) {
    use sha2::Digest as _;
    let said = results.of(trial.name).expect("all kernels do it");
    let of = |what: &str| {
        let line =
            said.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("{what}: {said}"));
        line.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(of("discards") != "0", trial.discards, "{said}");
    let mut arguments = vec!["--key", "raw:key", "--read-only"];
    arguments.extend(trial.serve.split(' ').filter(|word| !word.is_empty() && *word != "--direct"));
    arguments.push(trial.name);
    let server = place.serve(arguments);
    let mut client = server.client(trial.name);
    let pieces = (0..SIZE / MIB).map(|number| client.read(number * MIB, 1 << 20).unwrap());
    let read: Vec<u8> = pieces.flatten().collect();
    drop(client);
    server.stop();
    assert_eq!(hex::encode(sha2::Sha256::digest(&read)), of("sum"), "{said}");
    fs::write(place.path("decrypted"), &read).unwrap();
    if let Some(e2fsck) = require_tool("e2fsck") {
        run(Command::new(e2fsck).arg("-fn").arg(place.path("decrypted")));
    }
}

/// What `probe` says of a machine whose kernel and disks are known.
fn is_this_kernel(kernel: &Kernel, said: &str) {
    let report: Value = serde_json::from_str(said).unwrap();
    assert_eq!(report["kernel"]["release"], kernel.release, "{report:#}");
    let devices = report["devices"].as_array().unwrap();
    let names = ["vda", "vdb", "vdc", "nbd0"];
    for name in names {
        let device = devices.iter().find(|device| device["name"] == name);
        assert!(device.is_some_and(|device| device["inline_encryption"] == false), "{name}: {report:#}");
    }
    let features = report["kernel"]["features"].as_array().unwrap();
    for (name, option) in [
        ("blk-crypto", "CONFIG_BLK_INLINE_ENCRYPTION"),
        ("blk-crypto-fallback", "CONFIG_BLK_INLINE_ENCRYPTION_FALLBACK"),
        ("fscrypt", "CONFIG_FS_ENCRYPTION"),
        ("fscrypt-inline", "CONFIG_FS_ENCRYPTION_INLINE_CRYPT"),
        ("dm-crypt", "CONFIG_DM_CRYPT"),
        ("dm-inlinecrypt", "CONFIG_DM_INLINECRYPT"),
        ("ufs-crypto", "CONFIG_SCSI_UFS_CRYPTO"),
    ] {
        let feature = features.iter().find(|feature| feature["name"] == name).expect("in every report");
        assert_eq!(feature["state"] == "yes", kernel.has(option), "{name}: {report:#}");
    }
    assert_eq!(report["kernel"]["mounted_with_inlinecrypt"], Value::Array(Vec::new()), "{report:#}");
}
