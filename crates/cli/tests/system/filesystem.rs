//! The kernel's own filesystem on a volume: ext4 on a loop device on nbdfuse on the server.

use crate::rig::{MIB, Place, Server, may_loop, run};
use inlinecrypt_testkit::undo::{LoopDevice, Mount};
use inlinecrypt_testkit::{ServerProcess, pattern, require_tool};
use shake::{ExtendableOutput as _, Update as _, XofReader as _};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A volume as a block device of the kernel. Taken down in the order of the fields.
struct Device {
    block: LoopDevice,
    fuse: Mount,
    nbdfuse: ServerProcess,
}

impl Device {
    /// `None`, after a line that says why, where it cannot be done.
    fn attach(place: &Place, server: &Server) -> Option<Self> {
        let (Some(nbdfuse), Some(_), Some(_)) =
            (require_tool("nbdfuse"), require_tool("fusermount3"), require_tool("losetup"))
        else {
            return None;
        };
        if !Path::new("/dev/fuse").exists() || !may_loop() {
            eprintln!("SKIPPED: no FUSE, or no loop devices");
            return None;
        }
        let folder = place.path("fuse");
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("disk");
        let nbdfuse =
            ServerProcess::start(Command::new(nbdfuse).arg(&file).arg(server.uri("v")).stdin(Stdio::null()))
                .unwrap();
        let fuse = Mount::fuse(&folder);
        crate::rig::eventually("nbdfuse shows its file", || file.exists());
        let block = LoopDevice::new(&file, &[]).unwrap();
        Some(Self { block, fuse, nbdfuse })
    }

    /// Takes it down, and waits until all of it is.
    fn detach(self) {
        let Self { block, fuse, mut nbdfuse } = self;
        block.detach().unwrap();
        fuse.unmount().unwrap();
        let status = nbdfuse.wait(crate::rig::PATIENCE).unwrap();
        assert!(status.success(), "{status}");
    }
}

/// Every file below `root` with its size, mode and digest.
fn inventory(root: &Path) -> BTreeMap<PathBuf, (u64, u32, [u8; 32])> {
    let mut files = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                folders.push(path);
            } else if metadata.is_file() {
                let mut hasher = shake::Shake128::default();
                hasher.update(&fs::read(&path).unwrap());
                let mut digest = [0; 32];
                hasher.finalize_xof().read(&mut digest);
                let name = path.strip_prefix(root).unwrap().to_owned();
                files.insert(name, (metadata.len(), metadata.mode(), digest));
            }
        }
    }
    files
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&source, &target);
        } else if entry.file_type().unwrap().is_file() {
            fs::copy(source, target).unwrap();
        }
    }
}

/// Unpacks a source tree, many times over, and some large files; changes and removes some of it again.
fn use_it(root: &Path) {
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    for copy in 0..4 {
        copy_tree(&sources, &root.join(format!("tree{copy}")));
    }
    for (number, len) in [(1, 20 << 20), (2, 7 << 20), (3, 4097)] {
        fs::write(root.join(format!("large{number}")), pattern::bytes(number, 0, len)).unwrap();
    }
    // Room taken and written in part: the filesystem may leave it to the device to zero the rest.
    for number in 0..50 {
        use rustix::fs::{FallocateFlags, fallocate};
        let file = fs::File::create(root.join(format!("partly{number}"))).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, 32 << 10).unwrap();
        file.write_all_at(&pattern::bytes(number, 0, 1024), 8192).unwrap();
        file.sync_all().unwrap();
    }
    fs::remove_dir_all(root.join("tree1")).unwrap();
    fs::rename(root.join("tree2"), root.join("renamed")).unwrap();
    fs::File::options().write(true).open(root.join("large2")).unwrap().set_len(1 << 20).unwrap();
}

fn check_filesystem(device: &Path, e2fsck: &Path) {
    let said = run(Command::new(e2fsck).arg("-fn").arg(device));
    assert!(!said.contains("WARNING") && !said.contains("Fix?"), "{said}");
}

/// How a filesystem is made, and on what.
struct Trial<'a> {
    create: &'a [&'a str],
    serve: &'a [&'a str],
    mkfs: &'a [&'a str],
    mount: &'a str,
    /// Whether to wait until the kernel has zeroed all inode tables, as it does in the background.
    waits_for_zeroing: bool,
    /// Whether the volume must have been trimmed in the end.
    trims: bool,
}

/// Counter of an export, as `status` tells.
fn requests(place: &Place, server: &Server, kind: &str) -> u64 {
    let status = server.status(place);
    status["servers"][0]["volumes"][0]["counters"][kind]["requests"].as_u64().unwrap()
}

fn ext4_survives_a_restart(trial: &Trial<'_>) {
    let (Some(mkfs), Some(e2fsck), Some(dumpe2fs), Some(_)) =
        (require_tool("mkfs.ext4"), require_tool("e2fsck"), require_tool("dumpe2fs"), require_tool("mount"))
    else {
        return;
    };
    let place = Place::new();
    let server = place.serve([&["--create", "128MiB", "v.img"], trial.create, trial.serve].concat());
    // Noise of former times, so that nothing reads as zeroes by luck.
    let mut client = server.client("v");
    for at in 0..4 {
        client.write(at * 32 * MIB, &pattern::bytes(99, at, 32 << 20)).unwrap();
    }
    drop(client);
    let Some(device) = Device::attach(&place, &server) else { return };
    run(Command::new(&mkfs).args(["-q", "-F"]).args(trial.mkfs).arg(device.block.path()));
    let folder = place.path("mnt");
    fs::create_dir(&folder).unwrap();
    let node = device.block.path().to_str().unwrap().to_owned();
    let mount = Mount::new(&folder, &["-t", "ext4", "-o", trial.mount, &node]).unwrap();
    if trial.waits_for_zeroing {
        crate::rig::eventually("all inode tables are zeroed", || {
            let groups = run(Command::new(&dumpe2fs).arg(&node));
            let count = |text| groups.matches(text).count();
            count(": (Blocks ") == count("ITABLE_ZEROED")
        });
    }
    use_it(mount.path());
    let before = inventory(mount.path());
    assert!(before.len() > 300, "{} files", before.len());
    run(&mut Command::new("sync"));
    mount.unmount().unwrap();
    check_filesystem(device.block.path(), &e2fsck);
    assert_eq!(requests(&place, &server, "trim") > 0, trial.trims);
    device.detach();
    server.stop();

    // Nothing of it can be read from the disk itself.
    let stored = fs::read(place.path("v.img")).unwrap();
    let known = b"//! The kernel's own filesystem on a volume";
    assert!(!stored.windows(known.len()).any(|window| window == known));

    let server = place.serve([&["v.img"], trial.serve].concat());
    let device = Device::attach(&place, &server).expect("it was possible before");
    check_filesystem(device.block.path(), &e2fsck);
    let node = device.block.path().to_str().unwrap().to_owned();
    let mount = Mount::new(&folder, &["-t", "ext4", &node]).unwrap();
    let after = inventory(mount.path());
    assert!(before == after, "files differ after the restart");
    assert_eq!(fs::metadata(mount.path().join("large1")).unwrap().len(), 20 * MIB);
    mount.unmount().unwrap();
    device.detach();
    server.stop();
}

/// With the kernel's zeroing of inode tables in the background, which it leaves to the device if it can: through a loop
/// device and nbdfuse that arrives as a trim.
#[test]
fn ext4_on_a_volume_survives_a_restart_of_the_server() {
    ext4_survives_a_restart(&Trial {
        create: &[],
        serve: &[],
        mkfs: &[],
        mount: "init_itable=0",
        waits_for_zeroing: true,
        trims: true,
    });
}

/// The same without trim: all zeroes are written.
#[test]
fn ext4_on_a_volume_that_keeps_its_storage_survives_too() {
    ext4_survives_a_restart(&Trial {
        create: &[],
        serve: &["--discard", "off"],
        mkfs: &[],
        mount: "init_itable=0",
        waits_for_zeroing: true,
        trims: false,
    });
}

/// `ZeroFS#404`: `mkfs.ext4` begins with a trim of everything, here in data units of 512 bytes. It writes its zeroes itself.
#[test]
fn ext4_that_trims_survives_too() {
    ext4_survives_a_restart(&Trial {
        create: &["--data-unit", "512"],
        serve: &[],
        mkfs: &["-E", "discard,lazy_itable_init=0,lazy_journal_init=0"],
        mount: "discard",
        waits_for_zeroing: false,
        trims: true,
    });
}

/// On the model of a storage controller, with a wrapped key, few keyslots, programs that take their time, and every request
/// compared with software.
#[test]
fn ext4_on_a_storage_controller_with_a_wrapped_key_survives_too() {
    ext4_survives_a_restart(&Trial {
        create: &["--engine", "ice:hwkm-v2,slots=2,program-latency=50us"],
        serve: &["--verify", "all"],
        mkfs: &[],
        mount: "discard",
        waits_for_zeroing: false,
        trims: true,
    });
}
