//! Replies that are lent (`--zero-copy`), while others use the same engine's memory.

use crate::rig::{MIB, Place};
use inlinecrypt_testkit::nbd::cmd;
use inlinecrypt_testkit::pattern;
use std::thread;
use std::time::Duration;

const LEN: u32 = 256 * 1024;
const COUNT: u64 = 4;

/// What a client has not read yet stays as it is, however long it waits and whatever others do meanwhile: with an engine
/// process, its memory is given back to the system page by page and lent again.
#[test]
fn what_a_client_has_not_read_is_nobody_elses() {
    for process in ["own", "none"] {
        let place = Place::new();
        let volume = |name: &str| format!("[[volume]]\npath = \"{name}.img\"\nengine = \"e\"\n");
        for name in ["a.img", "b.img"] {
            place.run_ok(["volume", "create", "--size", "16MiB", name]);
        }
        let engine = format!("[[engine]]\nname = \"e\"\nspec = \"software\"\nprocess = \"{process}\"\n");
        let server =
            place.serve_config(&[&engine, &volume("a"), &volume("b"), "server:zero_copy = true\n"].concat());
        let other_data = pattern::bytes(2, 0, 16 << 20);
        let mut other = server.client("b");
        other.write(0, &other_data).unwrap();

        let mut slow = server.client("a");
        let data = pattern::bytes(1, 0, usize::try_from(COUNT).unwrap() * LEN as usize);
        slow.write(0, &data).unwrap();
        for round in 0..3 {
            let asked: Vec<(u64, u64)> = (0..COUNT)
                .map(|piece| {
                    let offset = piece * u64::from(LEN);
                    (slow.send_header(cmd::READ, 0, offset, LEN).unwrap(), offset)
                })
                .collect();
            // Half a second, and longer than a connection keeps what it has.
            thread::sleep(Duration::from_millis(if round == 0 { 500 } else { 1500 }));
            for _ in 0..4 {
                for piece in 0..16 {
                    let at = piece * MIB;
                    let bytes = other.read(at, 1 << 20).unwrap();
                    let at = usize::try_from(at).unwrap();
                    assert!(bytes == other_data[at..][..1 << 20], "{process}, {round}: the other's");
                }
            }
            for _ in 0..COUNT {
                let reply = slow.receive().unwrap();
                assert_eq!(reply.errno, 0);
                let (_, offset) = asked.iter().find(|(cookie, _)| *cookie == reply.cookie).unwrap();
                let offset = usize::try_from(*offset).unwrap();
                assert!(reply.data == data[offset..][..LEN as usize], "{process}, {round}: {offset}");
            }
        }
        server.stop();
    }
}
