use crate::place::{Place, assert_same};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

#[test]
fn one_command_makes_everything_and_the_next_needs_no_options() {
    let place = Place::new();
    let server =
        place.serve("demo.img.sock", ["serve"; 0].into_iter().chain(["--create", "1MiB", "demo.img"]));
    let greeting = server.greeting();
    let uri = format!("nbd+unix:///?socket={}", place.path("demo.img.sock").display());
    assert!(greeting.contains(&format!("\n  {uri}\n")), "{greeting}");
    assert!(greeting.contains(&format!("\n  nbdinfo '{uri}'\n")), "{greeting}");
    let data = [7u8; 8192];
    let mut client = server.client("");
    assert_eq!(client.export().size, 1 << 20);
    client.write(4096, &data).unwrap();
    drop(client);
    assert_eq!(server.stop(), "");
    assert!(!place.path("demo.img.sock").exists(), "the socket goes with the server");

    for secret in ["home/root.key", "demo.img", "demo.img.key", "demo.img.toml"] {
        let mode = fs::metadata(place.path(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    let ciphertext = fs::read(place.path("demo.img")).unwrap();
    assert_ne!(ciphertext[4096..][..8192], data);
    assert_ne!(ciphertext[4096..8192], ciphertext[8192..][..4096], "the IV differs");

    let server = place.serve("demo.img.sock", ["demo.img"]);
    // By its own name, too.
    assert_same(&server.client("demo").read(4096, 8192).unwrap(), &data);
    assert_eq!(server.stop(), "");
}

#[test]
fn what_is_served_is_what_dm_crypt_would_read() {
    // A raw key, so that nothing of ours comes between key and data. Known answer: IEEE 1619 vector 10's construction is
    // tested in the cipher; here it is that command and cipher agree on key halves, sector numbers and offset.
    use inlinecrypt_cipher::{Dun, Mode};
    let place = Place::new();
    let raw = place.raw_key("raw", 64);
    place.sparse("plain.img", 1 << 20);
    let server = place.serve(
        "plain.img.sock",
        [
            "--key",
            &format!("raw:{}", raw.display()),
            "--data-unit",
            "512",
            "--iv-offset",
            "1000",
            "plain.img",
        ],
    );
    let data = [0x5a; 1024];
    server.client("").write(2048, &data).unwrap();
    server.stop();
    let mut expected = data;
    let cipher = Mode::Aes256Xts.info().expand(&fs::read(raw).unwrap()).unwrap();
    cipher.encrypt(Dun::from(1000 + 4), 512, &mut expected);
    assert_eq!(fs::read(place.path("plain.img")).unwrap()[2048..][..1024], expected);
}

#[test]
fn several_volumes_are_several_exports() {
    let place = Place::new();
    place.create("a.img");
    place.create("b.img");
    let server = place.serve("s", ["--nbd", "unix:s", "--nbd", "tcp:127.0.0.1:0", "a.img", "b.img"]);
    let greeting = server.greeting();
    let socket = place.path("s");
    for name in ["a", "b"] {
        assert!(greeting.contains(&format!("nbd+unix:///{name}?socket={}", socket.display())), "{greeting}");
        assert!(
            greeting.contains(&format!("/{name}\n")) && greeting.contains("nbd://127.0.0.1:"),
            "{greeting}"
        );
    }
    server.client("a").write(0, &[1; 4096]).unwrap();
    server.client("b").write(0, &[2; 4096]).unwrap();
    assert_same(&server.client("a").read(0, 4096).unwrap(), &[1; 4096]);
    assert_same(&server.client("b").read(0, 4096).unwrap(), &[2; 4096]);
    server.stop();
}

#[test]
fn read_only_is_read_only() {
    let place = Place::new();
    place.create("v.img");
    let server = place.serve("v.img.sock", ["--read-only", "v.img"]);
    let mut client = server.client("");
    assert!(client.write(0, &[0; 512]).is_err());
    client.read(0, 512).unwrap();
    assert!(server.greeting().contains("FILE\n"));
    // Readers may share.
    let other = place.serve("other", ["--read-only", "--nbd", "unix:other", "v.img"]);
    other.stop();
    server.stop();
}

#[test]
fn secrets_are_in_no_argument_output_or_log() {
    let place = Place::new();
    let raw = place.raw_key("raw", 64);
    place.sparse("v.img", 1 << 20);
    let key = format!("raw:{}", raw.display());
    let server = place.serve("v.img.sock", ["-vvv", "--key", &key, "v.img"]);
    server.client("").write(0, &[0; 4096]).unwrap();
    server.greeting();
    let status = place.run(["status", "--json"]);
    let cmdline = fs::read(format!("/proc/{}/cmdline", server.pid())).unwrap();
    let (out, pid) = (server.out(), server.pid());
    assert!(
        fs::read(format!("/proc/{pid}/environ")).is_err() || rustix::process::geteuid().is_root(),
        "the process is not dumpable, so its files belong to root"
    );
    let err = server.stop();
    let bytes = fs::read(raw).unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    for said in [&out, &err, &status.out, &String::from_utf8_lossy(&cmdline).into_owned()] {
        for piece in [&hex[..16], &hex[64..80]] {
            assert!(!said.to_lowercase().contains(piece), "{said}");
        }
        assert!(!said.as_bytes().windows(8).any(|window| bytes.windows(8).any(|key| key == window)));
        // As a Rust list of numbers.
        assert!(!said.contains("165, 164, 167"), "{said}");
    }
    assert!(err.contains("connected"), "the log was on: {err}");
}
