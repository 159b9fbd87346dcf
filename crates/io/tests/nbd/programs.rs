//! Real clients: does the world accept us?

use super::Rig;
use inlinecrypt_core::disk::Disk;
use inlinecrypt_io::export::nbd::ServerOptions;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_io::listen::{Listen, ListenOptions, Listener};
use inlinecrypt_testkit::{pattern, require_tool, temp_dir};
use std::fs;
use std::path::Path;
use std::process::Command;

const SIZE: usize = 24 << 20;

/// A server that listens in a folder of its own.
fn listening(workers: usize) -> (Rig, tempfile::TempDir, String) {
    let folder = temp_dir();
    let path = folder.path().join("nbd.sock");
    let options = ServerOptions { workers: Some(workers), ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE as u64), options);
    let uri = format!("nbd+unix:///?socket={}", path.display());
    rig.server.listen(Listener::bind(&Listen::Unix(path), ListenOptions::default()).unwrap()).unwrap();
    (rig, folder, uri)
}

fn run(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program:?} {args:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn nbdinfo_reads_what_we_tell() {
    let Some(nbdinfo) = require_tool("nbdinfo") else { return };
    let (rig, _folder, uri) = listening(0);
    let text = run(&nbdinfo, &[&uri]);
    for line in ["export-size: 25165824", "can_multi_conn: true", "can_fast_zero: true", "base:allocation"] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    assert!(run(&nbdinfo, &["--list", &uri]).contains("export=\"disk\""));
    rig.client().write(1 << 20, &vec![1; 1 << 20]).unwrap();
    let map = run(&nbdinfo, &["--map", &uri]);
    let words: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words.len(), 3, "{map}");
    assert_eq!(words[1][..3], ["1048576", "1048576", "0"]);
    assert_eq!(words[0][2], "1");
}

#[test]
fn nbdcopy_copies_in_and_out() {
    let Some(nbdcopy) = require_tool("nbdcopy") else { return };
    for workers in [0, 4] {
        let (rig, folder, uri) = listening(workers);
        let (source, copy) = (folder.path().join("in"), folder.path().join("out"));
        let data = pattern::bytes(9, 0, SIZE);
        fs::write(&source, &data).unwrap();
        run(&nbdcopy, &["--flush", source.to_str().unwrap(), &uri]);
        run(&nbdcopy, &[&uri, copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == data);
        assert!(rig.disk.flushes() > 0);
    }
}

#[test]
fn qemu_img_converts_and_compares() {
    let Some(qemu_img) = require_tool("qemu-img") else { return };
    let (rig, folder, uri) = listening(0);
    assert!(run(&qemu_img, &["info", "-f", "raw", &uri]).contains("24 MiB"));
    let source = folder.path().join("in");
    let mut data = pattern::bytes(9, 0, SIZE);
    data[4 << 20..8 << 20].fill(0);
    fs::write(&source, &data).unwrap();
    let source = source.to_str().unwrap();
    run(&qemu_img, &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]);
    run(&qemu_img, &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    assert_eq!(rig.disk.geometry().size_bytes, SIZE as u64);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let Some(fio) = require_tool("fio") else { return };
    for workers in [0, 4] {
        let (_rig, folder, uri) = listening(workers);
        let output = Command::new(&fio)
            .current_dir(folder.path())
            .args([
                "--name=j",
                "--ioengine=nbd",
                "--thread=1",
                "--rw=randwrite",
                "--bsrange=512-64k",
                "--bs_unaligned=0",
            ])
            .args(["--iodepth=16", "--size=24m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"])
            .arg(format!("--uri={uri}"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if text.contains("engine nbd not loadable") || text.contains("not found") {
            eprintln!("SKIPPED: this fio has no nbd engine");
            return;
        }
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }
}
