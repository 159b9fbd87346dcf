//! Programs that people use with NBD: qemu-img, qemu-io, nbdcopy, nbdinfo, fio.

use crate::rig::{MIB, Place, Server, run, run_to_fail};
use inlinecrypt_testkit::{pattern, require_tool};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A disk image with data, zeroes and holes in it.
fn image(place: &Place, name: &str, len: u64) -> (PathBuf, Vec<u8>) {
    let mut data = pattern::bytes(77, 0, usize::try_from(len).unwrap());
    let third = data.len() / 3;
    data[third..2 * third].fill(0);
    let path = place.path(name);
    fs::write(&path, &data).unwrap();
    (path, data)
}

fn created(size: &str, more: &[&str]) -> (Place, Server) {
    let place = Place::new();
    let mut arguments = vec!["--create", size, "v.img"];
    arguments.extend(more);
    let server = place.serve(arguments);
    (place, server)
}

/// Layouts that clients see differently, a small and a large logical block; an engine on the way to the disk, which no client
/// can tell from software; and replies that are lent.
const LAYOUTS: [&[&str]; 4] = [
    &[],
    &["--data-unit", "4096", "--block", "4096"],
    &["--engine", "ice:hwkm-v2,slots=2"],
    &["--zero-copy"],
];

#[test]
fn qemu_img_converts_there_and_back_and_finds_no_difference() {
    let Some(qemu_img) = require_tool("qemu-img") else { return };
    for layout in LAYOUTS {
        let (place, server) = created("24MiB", layout);
        let (source, data) = image(&place, "in", 24 * MIB);
        // The image as a format of qemu's own, so that qemu decides what is data and what is zeroes.
        let qcow2 = place.path("in.qcow2");
        run(Command::new(&qemu_img).args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&source).arg(&qcow2));
        let uri = server.uri("v");
        run(Command::new(&qemu_img)
            .args(["convert", "-n", "-f", "qcow2", "-O", "raw"])
            .arg(&qcow2)
            .arg(&uri));
        let same =
            run(Command::new(&qemu_img).args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&qcow2).arg(&uri));
        assert!(same.contains("Images are identical."), "{same}");
        let back = place.path("back");
        run(Command::new(&qemu_img).args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&back));
        assert!(fs::read(&back).unwrap() == data);

        // And it does see a difference.
        server.client("v").write(5 * MIB, &[1; 512]).unwrap();
        let other = run_to_fail(
            Command::new(&qemu_img).args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&qcow2).arg(&uri),
        );
        assert!(other.contains("Content mismatch at offset 5242880"), "{other}");
        server.stop();
        // What lies on the disk is not what was written.
        let stored = fs::read(place.path("v.img")).unwrap();
        assert!(
            stored[..8 * 1024 * 1024]
                .chunks(512)
                .zip(data.chunks(512))
                .all(|(stored, plain)| stored != plain)
        );
    }
}

#[test]
fn qemu_io_reads_writes_discards_and_refuses_what_is_read_only() {
    let Some(qemu_io) = require_tool("qemu-io") else { return };
    let (place, server) = created("8MiB", &[]);
    let uri = server.uri("v");
    let io = |uri: &str, commands: &[&str]| {
        let mut qemu_io = Command::new(&qemu_io);
        qemu_io.args(["-f", "raw"]);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        qemu_io.arg(uri);
        qemu_io
    };
    let said = run(&mut io(
        &uri,
        &[
            "write -P 7 512 1536",
            "write -f -P 9 65536 64k",
            "write -z 1M 64k",
            "flush",
            "read -P 7 512 1536",
            "read -P 9 65536 64k",
            "read -P 0 1M 64k",
            "discard 2M 1M",
            "read 2M 1M",
        ],
    ));
    assert!(!said.contains("verification failed"), "{said}");
    let wrong = run_to_fail(&mut io(&uri, &["read -P 8 512 1536"]));
    assert!(wrong.contains("Pattern verification failed"), "{wrong}");
    server.stop();

    let server = place.serve(["--read-only", "v.img"]);
    let refused = run_to_fail(&mut io(&server.uri("v"), &["write -P 1 0 512"]));
    assert!(refused.contains("Permission denied"), "{refused}");
    let mut reader = io(&server.uri("v"), &["read -P 7 512 1536"]);
    reader.arg("-r");
    assert!(!run(&mut reader).contains("failed"));
    // A client that does not care about the flag.
    assert_eq!(server.client("v").write(0, &[1; 512]).unwrap_err().errno(), Some(1));
    server.stop();
}

#[test]
fn nbdcopy_copies_there_and_back() {
    let Some(nbdcopy) = require_tool("nbdcopy") else { return };
    for layout in LAYOUTS {
        let (place, server) = created("32MiB", layout);
        let (source, data) = image(&place, "in", 32 * MIB);
        // With all its connections and requests in flight, as is its way.
        run(Command::new(&nbdcopy).arg("--flush").arg(&source).arg(server.uri("v")));
        let back = place.path("back");
        run(Command::new(&nbdcopy).arg(server.uri("v")).arg(&back));
        assert!(fs::read(&back).unwrap() == data);
        server.stop();
        // From a volume to another one.
        let server = place.serve(["v.img"]);
        let second = Place::new();
        let other = second.serve(["--create", "32MiB", "--data-unit", "512", "w.img"]);
        run(Command::new(&nbdcopy).arg(server.uri("v")).arg(other.uri("w")));
        assert!(other.client("w").read(0, 32 << 20).unwrap() == data);
    }
}

fn nbdinfo(program: &Path, arguments: &[&str], uri: &str) -> Value {
    serde_json::from_str(&run(Command::new(program).arg("--json").args(arguments).arg(uri))).unwrap()
}

#[test]
fn nbdinfo_shows_sizes_blocks_and_what_the_server_can_do() {
    let Some(program) = require_tool("nbdinfo") else { return };
    let (place, server) = created("16MiB", &[]);
    let info = nbdinfo(&program, &[], &server.uri("v"));
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!((&info["structured"], &info["TLS"]), (&true.into(), &false.into()));
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 16 * MIB);
    let blocks = |export: &Value| {
        ["minimum", "preferred", "maximum"].map(|name| export[format!("block_size_{name}")].as_u64().unwrap())
    };
    assert_eq!(blocks(export), [512, 4096, 32 * MIB]);
    let able =
        |export: &Value, name: &str| export[name].as_bool().unwrap_or_else(|| panic!("{name}: {export}"));
    for name in [
        "can_multi_conn",
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_fast_zero",
        "can_cache",
        "can_df",
    ] {
        assert!(able(export, name), "{name}: {export}");
    }
    assert!(!able(export, "is_read_only") && !able(export, "is_rotational"), "{export}");
    assert_eq!(export["contexts"][0], "base:allocation", "{export}");
    server.stop();

    let server = place.serve(["--read-only", "v.img"]);
    let export = &nbdinfo(&program, &[], &server.uri("v"))["exports"][0];
    assert!(able(export, "is_read_only") && able(export, "can_multi_conn"), "{export}");
    for name in ["can_trim", "can_zero", "can_fast_zero"] {
        assert!(!able(export, name), "{name}: {export}");
    }
    server.stop();

    let server = place.serve(["--discard", "off", "v.img"]);
    assert!(!able(&nbdinfo(&program, &[], &server.uri("v"))["exports"][0], "can_trim"));
    server.stop();

    let (_place, server) = created("16MiB", &["--mode", "Adiantum"]);
    let export = &nbdinfo(&program, &[], &server.uri("v"))["exports"][0];
    assert_eq!(blocks(export), [4096, 4096, 32 * MIB]);
    server.stop();
}

#[test]
fn nbdinfo_maps_what_is_allocated() {
    let Some(program) = require_tool("nbdinfo") else { return };
    let (_place, server) = created("16MiB", &[]);
    server.client("v").write(4 * MIB, &vec![1; 1 << 20]).unwrap();
    let map = nbdinfo(&program, &["--map"], &server.uri("v"));
    let runs: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|run| ["offset", "length", "type"].map(|name| run[name].as_u64().unwrap()).into())
        .collect();
    // 1 is a hole that does not read as zeroes.
    assert_eq!(runs, [(0, 4 * MIB, 1), (4 * MIB, MIB, 0), (5 * MIB, 11 * MIB, 1)]);
    server.stop();
}

#[test]
fn nbdinfo_lists_all_exports_of_a_server() {
    let Some(program) = require_tool("nbdinfo") else { return };
    let place = Place::new();
    let names = ["one", "two", "dr\u{e9}i"];
    let mut config = String::new();
    for (index, name) in names.iter().enumerate() {
        let seed = index as u64;
        place.raw_key(&format!("{index}.key"), 64, seed);
        place.sparse(&format!("{index}.img"), (1 + seed) * MIB);
        config +=
            &format!("[[volume]]\nname = \"{name}\"\npath = \"{index}.img\"\nkey = \"raw:{index}.key\"\n");
    }
    let server = place.serve_config(&config);
    let list = nbdinfo(&program, &["--list"], &server.uri(""));
    let exports: Vec<(&str, u64)> = list["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| (export["export-name"].as_str().unwrap(), export["export-size"].as_u64().unwrap()))
        .collect();
    assert_eq!(exports, [("one", MIB), ("two", 2 * MIB), ("dr\u{e9}i", 3 * MIB)]);
    // Which of the three is meant by no name at all?
    let refused = run_to_fail(Command::new(&program).arg(server.uri("")));
    assert!(refused.contains("nbdinfo: "), "{refused}");
    server.stop();
}

#[test]
fn volumes_are_served_over_tcp_at_the_address_that_is_printed() {
    let Some(program) = require_tool("nbdinfo") else { return };
    let place = Place::new();
    let server = place.serve(["--create", "4MiB", "--nbd", "tcp:127.0.0.1:0", "v.img"]);
    crate::rig::eventually("it prints its addresses", || server.out().contains("try next"));
    let out = server.out();
    let uri =
        out.lines().map(str::trim).find(|line| line.starts_with("nbd://127.0.0.1:")).expect("one is TCP");
    assert_eq!(nbdinfo(&program, &[], uri)["exports"][0]["export-size"], 4 * MIB);
    server.stop();
}

/// fio with its NBD engine, two jobs of 32 requests each at random places, of random sizes.
pub(crate) fn fio(program: &Path, place: &Place, uri: &str, block: &str, more: &[&str]) -> Command {
    let mut fio = Command::new(program);
    fio.current_dir(place.path("run"))
        .args(["--name=job", "--ioengine=nbd", "--rw=randwrite", "--numjobs=2", "--iodepth=32"])
        .args([
            "--size=12m",
            "--offset_increment=12m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=11",
        ])
        .args(["--verify_state_save=0", "--group_reporting", "--thread"])
        .arg(format!("--bsrange={block}-64k"))
        .arg(format!("--uri={uri}"))
        .args(more);
    fio
}

/// fio, if it is there and speaks NBD.
pub(crate) fn fio_program() -> Option<PathBuf> {
    let program = require_tool("fio")?;
    if !run(Command::new(&program).arg("--enghelp")).contains("\tnbd") {
        crate::rig::skip("this fio has no NBD engine");
        return None;
    }
    Some(program)
}

/// A controller that is reset once a second loses its keyslots each time; nobody notices but by a pause.
#[test]
fn fio_verifies_while_the_engine_is_reset_once_a_second() {
    let Some(program) = require_tool("fio") else { return };
    let (place, server) = created("24MiB", &["--engine", "ice:hwkm-v2,slots=2,program-latency=1ms"]);
    let long = std::env::var_os("CI").is_some_and(|value| value == "true");
    let end = Instant::now() + Duration::from_secs(if long { 60 } else { 5 });
    let control = place.path("control");
    std::thread::scope(|scope| {
        let place = &place;
        scope.spawn(move || {
            while Instant::now() < end {
                std::thread::sleep(Duration::from_secs(1));
                place.run_ok([
                    OsStr::new("engine"),
                    "reset".as_ref(),
                    "--control".as_ref(),
                    control.as_os_str(),
                ]);
            }
        });
        while Instant::now() < end {
            let said =
                run(&mut fio(&program, place, &server.uri("v"), "512", &["--do_verify=1", "--rate=24m"]));
            assert!(said.matches("err= 0").count() == 1 && !said.contains("verify:"), "{said}");
        }
    });
    let status = server.status(&place);
    let engine = &status["servers"][0]["engines"][0];
    assert!(engine["keyslots"]["resets"].as_u64().unwrap() >= 3, "{engine}");
    assert_eq!(status["servers"][0]["volumes"][0]["counters"]["errors"], 0);
    server.stop();
}

#[test]
fn fio_finds_what_it_wrote_and_notices_when_it_does_not() {
    let Some(program) = fio_program() else { return };
    for (layout, block) in LAYOUTS.into_iter().zip(["512", "4k", "512", "512"]) {
        let (place, server) = created("24MiB", layout);
        let said = run(&mut fio(&program, &place, &server.uri("v"), block, &["--do_verify=1"]));
        assert_eq!(said.matches("err= 0").count(), 1, "{said}");
        assert!(!said.contains("verify:"), "{said}");
        let status = server.status(&place);
        let counters = &status["servers"][0]["volumes"][0]["counters"];
        assert_eq!(
            (&counters["read"]["bytes"], &counters["write"]["bytes"]),
            (&(24 * MIB).into(), &(24 * MIB).into())
        );
        server.stop();

        // After a restart it is all still there; after one changed sector it is not.
        let server = place.serve(["v.img"]);
        run(&mut fio(&program, &place, &server.uri("v"), block, &["--verify_only"]));
        server.client("v").write(13 * MIB, &[0x55; 4096]).unwrap();
        let said = run_to_fail(&mut fio(&program, &place, &server.uri("v"), block, &["--verify_only"]));
        assert!(said.contains("verify: bad") && said.contains("exit status: 1"), "{said}");
        server.stop();
    }
}

/// An authority, and in one folder what a server and libnbd's clients need of it.
struct Pki {
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new(place: &Place) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let pki = Self { authority };
        fs::create_dir(place.path("pki")).unwrap();
        fs::write(place.path("pki/ca-cert.pem"), pki.authority.pem()).unwrap();
        fs::create_dir(place.path("bare")).unwrap();
        fs::write(place.path("bare/ca-cert.pem"), pki.authority.pem()).unwrap();
        for who in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &pki.authority).unwrap();
            fs::write(place.path(&format!("pki/{who}-cert.pem")), certificate.pem()).unwrap();
            place.secret(&format!("pki/{who}-key.pem"), key.serialize_pem().as_bytes());
        }
        pki
    }
}

#[test]
fn tls_is_spoken_with_programs_that_others_wrote() {
    let (Some(nbdinfo), Some(nbdcopy)) = (require_tool("nbdinfo"), require_tool("nbdcopy")) else { return };
    let place = Place::new();
    let _pki = Pki::new(&place);
    let server = place.serve([
        "--create",
        "16MiB",
        "--tls-cert",
        "pki/server-cert.pem",
        "--tls-key",
        "pki/server-key.pem",
        "--tls-client-ca",
        "pki/ca-cert.pem",
        "--tls-verify-client",
        "v.img",
    ]);
    let uri = |certificates: &str| {
        format!(
            "nbds+unix:///v?socket={}&tls-certificates={}",
            server.socket.display(),
            place.path(certificates).display()
        )
    };
    let info: Value =
        serde_json::from_str(&run(Command::new(&nbdinfo).arg("--json").arg(uri("pki")))).unwrap();
    assert_eq!(info["TLS"], true);
    let (source, data) = image(&place, "in", 16 * MIB);
    run(Command::new(&nbdcopy).arg("--flush").arg(&source).arg(uri("pki")));
    let back = place.path("back");
    run(Command::new(&nbdcopy).arg(uri("pki")).arg(&back));
    assert!(fs::read(&back).unwrap() == data);

    // Neither without TLS nor without a certificate.
    let refused = run_to_fail(Command::new(&nbdinfo).arg(server.uri("v")));
    assert!(refused.contains("TLS"), "{refused}");
    run_to_fail(Command::new(&nbdinfo).arg(uri("bare")));
    server.stop();
}
