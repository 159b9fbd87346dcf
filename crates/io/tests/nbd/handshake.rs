//! The handshake, option by option.

use super::{Rig, spec};
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::disk::{Disk, Geometry};
use inlinecrypt_io::export::ExportSpec;
use inlinecrypt_io::export::nbd::{NbdServer, ServerOptions};
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_testkit::Client;
use inlinecrypt_testkit::nbd::{NbdError, opt, text_field};
use std::io::{Read, Write};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

// Transmission flags, as the protocol numbers them.
const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 2;
const FLUSH_FUA: u16 = 4 | 8;
const TRIM: u16 = 32;
const ZEROES: u16 = 64 | 2048;
const DF: u16 = 128;
const MULTI_CONN: u16 = 256;
const CACHE: u16 = 1024;

#[test]
fn go_tells_size_flags_blocks_and_name() {
    let rig = Rig::new(RamDisk::new(MIB));
    let client = rig.client();
    let export = client.export();
    assert_eq!(export.size, MIB);
    assert_eq!(export.flags, HAS_FLAGS | FLUSH_FUA | TRIM | ZEROES | DF | MULTI_CONN | CACHE);
    assert_eq!(export.blocks, Some((512, 4096, 32 << 20)));
    assert_eq!(export.name.as_deref(), Some("disk"));
    assert_eq!(export.description, None);
}

#[test]
fn df_is_offered_only_after_structured_replies_were_agreed_on() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert_eq!(client.info("disk").unwrap().flags & DF, 0);
    client.structured_reply().unwrap();
    assert_eq!(client.info("disk").unwrap().flags & DF, DF);
}

#[test]
fn a_read_only_disk_says_so_and_offers_nothing_that_writes() {
    let geometry = Geometry { access: Access::ReadOnly, ..RamDisk::new(MIB).geometry() };
    let rig = Rig::new(RamDisk::with_geometry(geometry));
    let flags = rig.client().export().flags;
    assert_eq!(flags & READ_ONLY, READ_ONLY);
    assert_eq!(flags & (TRIM | ZEROES), 0);
}

#[test]
fn trim_is_offered_only_if_the_disk_can() {
    let geometry = Geometry { can_trim: false, ..RamDisk::new(MIB).geometry() };
    let rig = Rig::new(RamDisk::with_geometry(geometry));
    let mut client = rig.client();
    assert_eq!(client.export().flags & TRIM, 0);
    assert_eq!(client.trim(0, 4096).unwrap_err().errno(), Some(22));
}

#[test]
fn the_empty_name_stands_for_the_only_export() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    let export = client.go("").unwrap();
    assert_eq!((export.size, export.name.as_deref()), (MIB, Some("disk")));
}

#[test]
fn the_empty_name_stands_for_nothing_among_several_unless_one_is_called_so() {
    let disks: Vec<Arc<RamDisk>> = (1..=3).map(|n| Arc::new(RamDisk::new(n * MIB))).collect();
    let server =
        NbdServer::new([spec("one", &disks[0]), spec("two", &disks[1])], ServerOptions::default()).unwrap();
    let rig = Rig { server, disk: disks[0].clone() };
    let mut client = Client::greet(rig.dial()).unwrap();
    assert_eq!(client.info("").unwrap_err().refusal(), Some(6));
    rig.server.exports().add(spec("", &disks[2])).unwrap();
    assert_eq!(client.info("").unwrap().size, 3 * MIB);
    assert_eq!(client.info("two").unwrap().size, 2 * MIB);
}

#[test]
fn exports_are_listed_with_their_descriptions() {
    let disk = Arc::new(RamDisk::new(MIB));
    let described =
        ExportSpec { name: "größe".to_owned(), description: "a disk".to_owned(), disk: disk.clone() };
    let server = NbdServer::new([spec("plain", &disk), described], ServerOptions::default()).unwrap();
    let rig = Rig { server, disk };
    let mut client = Client::greet(rig.dial()).unwrap();
    let wanted = [("plain", ""), ("größe", "a disk")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    assert_eq!(client.list().unwrap(), wanted);
    assert_eq!(client.info("größe").unwrap().description.as_deref(), Some("a disk"));
    rig.server.exports().remove("plain").unwrap();
    assert_eq!(client.list().unwrap().len(), 1);
}

#[test]
fn names_that_no_client_could_ask_for_are_refused_at_the_start() {
    let disk = Arc::new(RamDisk::new(MIB));
    for name in ["a\0b".to_owned(), "a".repeat(4097)] {
        assert!(NbdServer::new([spec(&name, &disk)], ServerOptions::default()).is_err());
    }
    let twice = [spec("a", &disk), spec("a", &disk)];
    let error = NbdServer::new(twice, ServerOptions::default()).unwrap_err();
    assert!(error.to_string().contains("already"), "{error}");
}

#[test]
fn an_unknown_export_is_refused_and_another_can_be_asked_for() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert_eq!(client.go("nothing").unwrap_err().refusal(), Some(6));
    assert_eq!(client.go("disk").unwrap().size, MIB);
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn an_unknown_export_by_export_name_ends_the_connection() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert!(matches!(client.export_name("nothing"), Err(NbdError::Io(_))));
}

#[test]
fn old_clients_get_their_124_zeroes() {
    let rig = Rig::new(RamDisk::new(MIB));
    for flags in [0, 1, 2, 3] {
        let mut client = Client::greet_with(rig.dial(), flags).unwrap();
        assert_eq!(client.export_name("disk").unwrap().size, MIB);
        assert_eq!(client.read(512, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn a_client_that_does_not_speak_fixed_newstyle_has_one_option() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet_with(rig.dial(), 0).unwrap();
    assert!(matches!(client.list(), Err(NbdError::Io(_))));
}

#[test]
fn a_client_with_flags_that_were_not_offered_is_dropped() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet_with(rig.dial(), 4).unwrap();
    assert_eq!(client.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn unknown_options_are_unsupported_and_nothing_worse() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    for option in [4, opt::EXTENDED_HEADERS, 12, 4711, u32::MAX] {
        assert_eq!(client.option(option, b"whatever").unwrap_err().refusal(), Some(1));
    }
    client.go("disk").unwrap();
}

#[test]
fn starttls_without_a_certificate_is_unsupported() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert_eq!(client.option(opt::STARTTLS, &[]).unwrap_err().refusal(), Some(1));
    client.go("disk").unwrap();
}

#[test]
fn malformed_options_are_invalid_and_the_next_is_served() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    client.structured_reply().unwrap();
    let too_many = [text_field("disk"), u32::MAX.to_be_bytes().to_vec()].concat();
    let cases: [(u32, &[u8], u32); 8] = [
        (opt::LIST, b"x", 3),
        (opt::STRUCTURED_REPLY, b"x", 3),
        (opt::GO, b"", 3),
        (opt::GO, &[0xff, 0xff, 0xff, 0xff, 0, 0], 3),
        (opt::INFO, &[0, 0, 0, 1, 0xff, 0, 0], 3),
        (opt::SET_META_CONTEXT, b"disk", 3),
        (opt::SET_META_CONTEXT, &too_many, 9),
        (opt::LIST_META_CONTEXT, &text_field("disk"), 3),
    ];
    for (option, data, code) in cases {
        assert_eq!(client.option(option, data).unwrap_err().refusal(), Some(code), "{option} {data:?}");
    }
    client.go("disk").unwrap();
}

#[test]
fn an_option_too_long_is_skipped_and_an_absurd_one_ends_the_connection() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert_eq!(client.option(opt::GO, &vec![0; 100_000]).unwrap_err().refusal(), Some(9));
    client.list().unwrap();
    client.stream().write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").unwrap();
    assert_eq!(client.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn abort_is_acknowledged() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert!(client.option(opt::ABORT, &[]).unwrap().is_empty());
    assert_eq!(client.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn metadata_contexts_need_structured_replies() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    assert_eq!(client.list_meta_context("disk", &[]).unwrap_err().refusal(), Some(3));
    assert_eq!(client.set_meta_context("disk", &["base:allocation"]).unwrap_err().refusal(), Some(3));
}

#[test]
fn metadata_contexts_are_listed_and_chosen_by_name() {
    let rig = Rig::new(RamDisk::new(MIB));
    let mut client = Client::greet(rig.dial()).unwrap();
    client.structured_reply().unwrap();
    let allocation = vec!["base:allocation".to_owned()];
    assert_eq!(client.list_meta_context("disk", &[]).unwrap(), allocation);
    assert_eq!(client.list_meta_context("disk", &["base:"]).unwrap(), allocation);
    assert!(client.list_meta_context("disk", &["x-nothing:"]).unwrap().is_empty());
    assert_eq!(client.list_meta_context("nothing", &[]).unwrap_err().refusal(), Some(6));
    assert!(client.set_meta_context("disk", &["base:"]).unwrap().is_empty());
    assert!(client.set_meta_context("disk", &[]).unwrap().is_empty());
    assert_eq!(client.set_meta_context("disk", &["x-no:", "base:allocation"]).unwrap(), allocation);
}

#[test]
fn a_context_counts_only_for_the_export_for_which_it_was_chosen() {
    let disk = Arc::new(RamDisk::new(MIB));
    let server = NbdServer::new([spec("a", &disk), spec("b", &disk)], ServerOptions::default()).unwrap();
    let rig = Rig { server, disk };
    let mut client = Client::greet(rig.dial()).unwrap();
    client.structured_reply().unwrap();
    client.set_meta_context("a", &["base:allocation"]).unwrap();
    client.go("b").unwrap();
    assert_eq!(client.block_status(0, 4096, 0).unwrap_err().errno(), Some(22));
}
