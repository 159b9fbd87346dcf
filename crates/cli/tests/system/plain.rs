//! Volumes without encryption, by the programs that people move images with.

use crate::rig::{MIB, Place, run};
use inlinecrypt_testkit::{pattern, require_tool};
use std::fs;
use std::process::Command;

/// Data, zeroes and a hole; and what is not a whole data unit at the end.
fn image(place: &Place) -> Vec<u8> {
    let mut data = pattern::bytes(78, 0, 24 << 20);
    data[8 << 20..12 << 20].fill(0);
    data.extend([7; 1536]);
    fs::write(place.path("in"), &data).unwrap();
    data
}

#[test]
fn qemu_img_moves_an_image_in_and_out_and_the_file_is_that_image() {
    let Some(qemu_img) = require_tool("qemu-img") else { return };
    let place = Place::new();
    let data = image(&place);
    place.sparse("v.img", data.len() as u64);
    let server = place.serve(["--plain", "v.img"]);
    let qcow2 = place.path("in.qcow2");
    run(Command::new(&qemu_img)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(place.path("in"))
        .arg(&qcow2));
    let uri = server.uri("v");
    run(Command::new(&qemu_img).args(["convert", "-n", "-f", "qcow2", "-O", "raw"]).arg(&qcow2).arg(&uri));
    let same =
        run(Command::new(&qemu_img).args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&qcow2).arg(&uri));
    assert!(same.contains("Images are identical."), "{same}");
    let back = place.path("back");
    run(Command::new(&qemu_img).args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&back));
    server.stop();
    assert!(fs::read(&back).unwrap() == data);
    assert!(fs::read(place.path("v.img")).unwrap() == data, "what lies on the disk is what was written");
}

#[test]
fn nbdcopy_moves_an_image_from_a_plain_volume_into_an_encrypted_one() {
    let Some(nbdcopy) = require_tool("nbdcopy") else { return };
    let place = Place::new();
    let data = image(&place);
    place.run_ok(["volume", "create", "--size", "25MiB", "safe.img"]);
    let server = place.serve_config(
        "[[volume]]\npath = \"safe.img\"\n[[volume]]\npath = \"in\"\nplain = true\nname = \"old\"\n",
    );
    run(Command::new(&nbdcopy).arg("--flush").arg(server.uri("old")).arg(server.uri("safe")));
    assert!(server.client("safe").read(0, 24 << 20).unwrap() == data[..24 << 20]);
    assert_eq!(server.client("safe").read(24 * MIB, 1536).unwrap(), [7; 1536]);
    server.stop();
    let stored = fs::read(place.path("safe.img")).unwrap();
    assert!(stored.chunks(512).zip(data.chunks(512)).all(|(stored, plain)| stored != plain));
}

#[test]
fn fio_verifies_what_it_wrote_to_a_plain_volume() {
    let Some(program) = require_tool("fio") else { return };
    let place = Place::new();
    place.sparse("v.img", 24 * MIB);
    for direct in [&[][..], &["--direct"]] {
        // Some filesystems have no direct I/O.
        if !direct.is_empty() && !place.can_direct("v.img") {
            continue;
        }
        let server = place.serve([&["--plain", "v.img"], direct].concat());
        let said =
            run(&mut crate::clients::fio(&program, &place, &server.uri("v"), "512", &["--do_verify=1"]));
        assert!(said.contains("err= 0") && !said.contains("verify:"), "{said}");
        server.stop();
    }
}
