//! Keys by the hardware of a disk. There is none here: these are the refusals.

use crate::place::{Place, run_command};
use std::path::Path;

const VERBS: [&[&str]; 3] = [
    &["key", "generate", "--out", "new.key"],
    &["key", "import", "--in", "raw.key", "--out", "new.key"],
    &["key", "prepare", "--in", "disk.key", "--out", "new.key"],
];

fn place() -> Place {
    let place = Place::new();
    place.raw_key("raw.key", 32);
    place.write("disk.key", &[0x5a; 68]);
    place
}

#[test]
fn what_is_no_block_device_has_no_keys() {
    let place = place();
    place.write("file", b"not a device");
    for verb in VERBS {
        for device in ["file", "/dev/null", "."] {
            let said = place.run([verb, &["--device", device]].concat());
            said.refused(4, &[device, "no block device", "such as /dev/sda"]);
        }
        let said = place.run([verb, &["--device", "/dev/nowhere"]].concat());
        said.refused(4, &["/dev/nowhere", "No such file"]);
        assert!(!place.path("new.key").exists());
    }
    assert!(!place.path("home").exists(), "no root is made for it");
}

/// A disk without such hardware, on a kernel that may not even know the question.
#[test]
fn a_disk_without_the_hardware_says_so() {
    let Some(device) =
        ["/dev/loop0", "/dev/vda", "/dev/sda"].into_iter().find(|path| Path::new(path).exists())
    else {
        eprintln!("SKIPPED: there is no block device");
        return;
    };
    if std::fs::File::open(device).is_err() {
        eprintln!("SKIPPED: {device} cannot be opened");
        return;
    }
    let place = place();
    for verb in VERBS {
        let said = place.run([verb, &["--device", device]].concat());
        said.refused(1, &[device, "inlinecrypt probe", "no inline encryption"]);
        assert!(!place.path("new.key").exists());
    }
}

#[test]
fn keys_that_cannot_be_the_devices_are_refused_before_it_is_asked() {
    let place = place();
    place.run(["key", "generate", "--out", "ours.key"]).done();
    for verb in ["import", "prepare"] {
        let said = place.run(["key", verb, "--device", "/dev/null", "--in", "ours.key", "--out", "new.key"]);
        said.refused(2, &["an engine of ours", "Leave --device out"]);
    }
    let said = place.run(["key", "generate", "--device", "/dev/null", "--engine", "software"]);
    assert!(said.code == Some(1) && said.err.contains("cannot be used with"), "{said}");
}

#[test]
fn who_may_not_open_the_disk_is_told() {
    let Some(device) =
        ["/dev/loop0", "/dev/vda", "/dev/sda"].into_iter().find(|path| Path::new(path).exists())
    else {
        eprintln!("SKIPPED: there is no block device");
        return;
    };
    let place = place();
    let arguments = ["key", "generate", "--out", "new.key", "--device", device];
    let Some(command) = crate::volumes::as_nobody(&place, &arguments) else { return };
    run_command(command).refused(2, &[device, "Permission denied"]);
}
