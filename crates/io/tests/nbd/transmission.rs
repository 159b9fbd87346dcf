//! Requests, one behaviour at a time; those that do not depend on it with and without workers.

use super::{Rig, at_once, eventually};
use inlinecrypt_core::backing::Access;
use inlinecrypt_core::disk::{Disk, Geometry, Unaligned};
use inlinecrypt_core::error::ErrorKind;
use inlinecrypt_io::export::nbd::ServerOptions;
use inlinecrypt_io::export::ram::RamDisk;
use inlinecrypt_testkit::nbd::{NbdError, cmd};
use inlinecrypt_testkit::{Block, Client, pattern};
use std::collections::HashMap;
use std::io::Write;
use std::time::{Duration, Instant};

const MIB: u32 = 1 << 20;
const SIZE: u64 = 64 * MIB as u64;

const EPERM: Option<u32> = Some(1);
const EIO: Option<u32> = Some(5);
const EINVAL: Option<u32> = Some(22);
const ENOSPC: Option<u32> = Some(28);
const EOVERFLOW: Option<u32> = Some(75);
const ENOTSUP: Option<u32> = Some(95);

/// Runs with the connection's own thread, with a helper for long requests, with workers, and with workers for long requests
/// alone; each with memory to spare and without, and with memory that is lent to the client.
fn each_way(check: impl Fn(&Rig)) {
    let one_by_one = [(0, 1, 8), (0, 1, 0), (0, 8, 8), (0, 8, 1), (0, 8, 0), (3, 1, 8), (3, 1, 0)];
    let together = [(0, 1, 8), (3, 1, 8), (3, 1, 1), (3, 1, 0)];
    let ways = one_by_one.map(|way| (RamDisk::new as fn(u64) -> RamDisk, way)).into_iter();
    for (disk, (workers, cores, large_max)) in ways.chain(together.map(|way| (at_once as _, way))) {
        for zero_copy in [false, true] {
            let options =
                ServerOptions { workers: Some(workers), cores, zero_copy, ..ServerOptions::default() };
            check(&Rig::with_options(disk(SIZE).with_pool_of(large_max), options));
        }
    }
}

#[test]
fn what_was_written_is_read_whatever_its_place_and_length() {
    let spots = [
        (0, 512),
        (4096, 4096),
        (1, 1),
        (511, 2),
        (1000, 100_000),
        (262_144 - 512, 1024),
        (262_143, 2),
        (300_000, 700_001),
        (SIZE - 65_536, 65_536),
        (5 << 20, 32 << 20),
    ];
    each_way(|rig| {
        for mut client in [rig.client(), rig.simple_client()] {
            for (seed, (offset, len)) in (0u64..).zip(spots) {
                let data = pattern::bytes(seed, offset, len);
                client.write(offset, &data).unwrap();
                let read = client.read(offset, u32::try_from(len).unwrap()).unwrap();
                assert!(read == data, "{len} bytes at {offset}");
            }
            client.disconnect().unwrap();
        }
    });
}

#[test]
fn writes_change_nothing_around_them() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    let mut model = pattern::bytes(1, 0, 1 << 20);
    client.write(0, &model).unwrap();
    for (offset, len) in [(1usize, 1usize), (512, 512), (700, 100), (262_000, 300), (500_000, 300_000)] {
        let data = pattern::bytes(2, offset as u64, len);
        client.write(offset as u64, &data).unwrap();
        model[offset..offset + len].copy_from_slice(&data);
    }
    assert!(client.read(0, MIB).unwrap() == model);
}

#[test]
fn many_requests_at_once_are_all_answered_each_with_its_own_data() {
    each_way(|rig| {
        for mut client in [rig.client(), rig.simple_client()] {
            for seed in 0..500 {
                let at = seed * 4096;
                client.send(cmd::WRITE, 0, at, 4096, &pattern::bytes(seed, at, 4096)).unwrap();
                if seed >= 32 {
                    assert_eq!(client.receive().unwrap().errno, 0);
                }
            }
            for _ in 0..32 {
                assert_eq!(client.receive().unwrap().errno, 0);
            }
            let mut asked = HashMap::new();
            for seed in 0..500 {
                asked.insert(client.send_header(cmd::READ, 0, seed * 4096, 4096).unwrap(), seed);
                if seed >= 32 {
                    let reply = client.receive().unwrap();
                    let seed = asked.remove(&reply.cookie).unwrap();
                    assert!(reply.data == pattern::bytes(seed, seed * 4096, 4096));
                }
            }
            while !asked.is_empty() {
                let reply = client.receive().unwrap();
                let seed = asked.remove(&reply.cookie).unwrap();
                assert!(reply.data == pattern::bytes(seed, seed * 4096, 4096));
            }
        }
    });
}

#[test]
fn many_long_requests_at_once_are_all_answered_each_with_its_own_data() {
    const LEN: u64 = 700_000;
    each_way(|rig| {
        for mut client in [rig.client(), rig.simple_client()] {
            // Half way through there is something to read; the edges of a piece lie at another place in each request.
            let mut asked = HashMap::new();
            for seed in 0..40 {
                let at = seed * LEN;
                let data = pattern::bytes(seed, at, 700_000);
                asked.insert(client.send(cmd::WRITE, 0, at, 700_000, &data).unwrap(), None);
                while asked.len() >= 8 {
                    let reply = client.receive().unwrap();
                    assert_eq!((reply.errno, asked.remove(&reply.cookie)), (0, Some(None)));
                }
            }
            while !asked.is_empty() {
                let reply = client.receive().unwrap();
                assert_eq!((reply.errno, asked.remove(&reply.cookie)), (0, Some(None)));
            }
            for seed in 0..48 {
                if let Some(seed) = Some(seed).filter(|seed| *seed < 40) {
                    let cookie = client.send_header(cmd::READ, 0, seed * LEN, 700_000).unwrap();
                    asked.insert(cookie, Some(seed));
                }
                if seed >= 8 {
                    let reply = client.receive().unwrap();
                    let seed = asked.remove(&reply.cookie).unwrap().unwrap();
                    assert!(reply.data == pattern::bytes(seed, seed * LEN, 700_000), "{seed}");
                }
            }
            client.disconnect().unwrap();
        }
    });
}

#[test]
fn a_short_request_that_fails_fails_alone() {
    each_way(|rig| {
        rig.disk.fail_reads(20_480..24_576, ErrorKind::EngineFailed);
        rig.disk.fail_writes(20_480..24_576, ErrorKind::NoSpace);
        for mut client in [rig.client(), rig.simple_client()] {
            let mut asked = HashMap::new();
            // In one go, so that they are there together.
            for block in 0..16 {
                let cookie = match block % 2 {
                    0 => client.send_header(cmd::READ, 0, block * 4096, 4096),
                    _ => client.send(cmd::WRITE, 0, block * 4096, 4096, &[7; 4096]),
                };
                asked.insert(cookie.unwrap(), block);
                let again = client.send_header(cmd::READ, 0, block * 4096 + 512, 512);
                asked.insert(again.unwrap(), block);
            }
            while !asked.is_empty() {
                let reply = client.receive().unwrap();
                let block = asked.remove(&reply.cookie).unwrap();
                assert_eq!(reply.errno != 0, block == 5, "block {block}: {}", reply.errno);
            }
        }
    });
}

/// An answered write is seen by the next read, and an answered flush covers it, whoever did the pieces.
#[test]
fn the_last_piece_answers_after_all_others() {
    each_way(|rig| {
        rig.disk.delay(Duration::from_micros(200));
        let mut client = rig.client();
        for seed in 0..30 {
            let data = pattern::bytes(seed, 0, 2 << 20);
            client.write(0, &data).unwrap();
            assert!(client.read(0, 2 * MIB).unwrap() == data);
        }
    });
}

#[test]
fn an_error_is_told_at_its_offset_and_the_connection_goes_on() {
    each_way(|rig| {
        rig.disk.fail_reads(600_000..600_001, ErrorKind::EngineFailed);
        let mut client = rig.client();
        let cookie = client.send_header(cmd::READ, 0, 0, MIB).unwrap();
        let reply = client.receive().unwrap();
        assert_eq!((reply.cookie, reply.errno), (cookie, 5));
        // The piece that failed begins there: pieces end at multiples of 256 KiB, small ones before.
        assert!((450_000..=600_000).contains(&reply.error_offset.unwrap()));
        assert!(!reply.error_text.is_empty());
        assert_eq!(client.read(0, 4096).unwrap().len(), 4096);
        assert_eq!(client.read(600_000, 1).unwrap_err().errno(), EIO);
    });
}

#[test]
fn an_early_error_of_a_simple_read_is_told_and_a_late_one_ends_the_connection() {
    each_way(|rig| {
        rig.disk.fail_reads(600_000..600_001, ErrorKind::Backing);
        let mut client = rig.simple_client();
        assert_eq!(client.read(600_000, 4096).unwrap_err().errno(), EIO);
        assert_eq!(client.read(0, 4096).unwrap().len(), 4096);
        assert!(matches!(client.read(0, MIB), Err(NbdError::Io(_))));
        eventually("the connection is gone", || rig.server.status().connections_now == 0);
    });
}

#[test]
fn a_failed_write_keeps_the_stream_in_step() {
    each_way(|rig| {
        rig.disk.fail_writes(262_144..262_145, ErrorKind::NoSpace);
        for mut client in [rig.client(), rig.simple_client()] {
            let error = client.write(0, &pattern::bytes(1, 0, 3 << 20)).unwrap_err();
            assert_eq!(error.errno(), ENOSPC);
            client.write(8 << 20, &[7; 512]).unwrap();
            assert_eq!(client.read(8 << 20, 512).unwrap(), [7; 512]);
        }
    });
}

#[test]
fn requests_outside_of_the_disk_are_refused_and_their_payload_is_skipped() {
    each_way(|rig| {
        for mut client in [rig.client(), rig.simple_client()] {
            for offset in [SIZE, SIZE - 511, u64::MAX, u64::MAX - 511, 1 << 63] {
                assert_eq!(client.read(offset, 512).unwrap_err().errno(), EINVAL, "{offset}");
                assert_eq!(client.write(offset, &[0; 512]).unwrap_err().errno(), ENOSPC, "{offset}");
                assert_eq!(client.trim(offset, 512).unwrap_err().errno(), EINVAL, "{offset}");
                assert_eq!(client.write_zeroes(offset, 512, 0).unwrap_err().errno(), ENOSPC, "{offset}");
            }
            assert_eq!(client.read(SIZE - 512, 512).unwrap(), [0; 512]);
        }
    });
}

#[test]
fn requests_of_no_length_are_refused() {
    let mut client = Rig::new(RamDisk::new(SIZE)).client();
    for kind in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE, cmd::BLOCK_STATUS] {
        assert_eq!(client.request(kind, 0, 0, 0, &[]).unwrap_err().errno(), EINVAL, "{kind}");
    }
}

#[test]
fn unknown_commands_and_flags_are_refused_and_nothing_worse() {
    each_way(|rig| {
        let mut client = rig.client();
        for kind in [8, 9, 100, u16::MAX] {
            assert_eq!(client.request(kind, 0, 0, 512, &[]).unwrap_err().errno(), EINVAL, "{kind}");
        }
        let wrong = [
            (cmd::READ, cmd::FLAG_NO_HOLE),
            (cmd::READ, cmd::FLAG_REQ_ONE),
            (cmd::WRITE, cmd::FLAG_DF),
            (cmd::FLUSH, 1 << 15),
            (cmd::TRIM, cmd::FLAG_NO_HOLE),
            (cmd::BLOCK_STATUS, cmd::FLAG_DF),
            (cmd::WRITE, 1 << 5),
        ];
        for (kind, flags) in wrong {
            let payload: &[u8] = if kind == cmd::WRITE { &[0; 512] } else { &[] };
            let len = if kind == cmd::FLUSH { 0 } else { 512 };
            let error = client.request(kind, flags, 0, len, payload).unwrap_err();
            assert_eq!(error.errno(), EINVAL, "{kind} {flags}");
        }
        assert_eq!(client.request(cmd::FLUSH, 0, 1, 0, &[]).unwrap_err().errno(), EINVAL);
        client.flush().unwrap();
    });
}

#[test]
fn df_without_structured_replies_is_refused() {
    let mut client = Rig::new(RamDisk::new(SIZE)).simple_client();
    assert_eq!(client.request(cmd::READ, cmd::FLAG_DF, 0, 512, &[]).unwrap_err().errno(), EINVAL);
}

#[test]
fn a_df_read_comes_in_one_chunk_or_not_at_all() {
    each_way(|rig| {
        let mut client = rig.client();
        let data = pattern::bytes(5, 0, 2 << 20);
        client.write(0, &data).unwrap();
        for (offset, len) in [(0u32, 65_536u32), (262_000, 65_536), (0, 256 << 10), (1, 256 << 10)] {
            let reply = client.request(cmd::READ, cmd::FLAG_DF, offset.into(), len, &[]).unwrap();
            assert_eq!(reply.data_chunks, 1);
            assert!(reply.data == data[offset as usize..][..len as usize]);
        }
        let error = client.request(cmd::READ, cmd::FLAG_DF, 0, (256 << 10) + 1, &[]).unwrap_err();
        assert_eq!(error.errno(), EOVERFLOW);
        rig.disk.fail_reads(300_000..300_001, ErrorKind::Backing);
        let error = client.request(cmd::READ, cmd::FLAG_DF, 200_000, 200_000, &[]).unwrap_err();
        assert_eq!(error.errno(), EIO);
    });
}

#[test]
fn a_read_only_disk_refuses_every_change_and_skips_its_payload() {
    let geometry = Geometry { access: Access::ReadOnly, ..RamDisk::new(SIZE).geometry() };
    for workers in [0, 2] {
        let options = ServerOptions { workers: Some(workers), ..ServerOptions::default() };
        let rig = Rig::with_options(RamDisk::with_geometry(geometry), options);
        let mut client = rig.client();
        assert_eq!(client.write(0, &vec![1; 3 << 20]).unwrap_err().errno(), EPERM);
        assert_eq!(client.write_zeroes(0, 512, 0).unwrap_err().errno(), EPERM);
        assert_eq!(client.trim(0, 512).unwrap_err().errno(), EPERM);
        client.flush().unwrap();
        assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn unaligned_requests_are_refused_where_the_disk_refuses_them() {
    let geometry = Geometry {
        unaligned: Unaligned::Refused,
        logical_block_bytes: 4096,
        ..RamDisk::new(SIZE).geometry()
    };
    let rig = Rig::new(RamDisk::with_geometry(geometry));
    let mut client = rig.client();
    assert_eq!(client.export().blocks, Some((4096, 4096, 32 << 20)));
    for (offset, len) in [(512, 4096), (0, 512)] {
        assert_eq!(client.read(offset, len).unwrap_err().errno(), EINVAL);
        assert_eq!(client.write(offset, &vec![0; len as usize]).unwrap_err().errno(), EINVAL);
        assert_eq!(client.write_zeroes(offset, len, 0).unwrap_err().errno(), EINVAL);
    }
    client.write(4096, &[1; 4096]).unwrap();
    assert_eq!(client.read(4096, 4096).unwrap(), [1; 4096]);
}

#[test]
fn reads_and_writes_over_32_mib_are_refused() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    assert_eq!(client.read(0, 32 * MIB + 512).unwrap_err().errno(), EINVAL);
    assert_eq!(client.write(0, &vec![0; (32 << 20) + 512]).unwrap_err().errno(), EINVAL);
    assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn an_absurdly_long_write_ends_the_connection() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    client.send_header(cmd::WRITE, 0, 0, u32::MAX).unwrap();
    assert!(matches!(client.receive(), Err(NbdError::Io(_))));
}

#[test]
fn fua_makes_every_piece_durable() {
    each_way(|rig| {
        let mut client = rig.client();
        client.request(cmd::WRITE, 0, 0, 4096, &[1; 4096]).unwrap();
        assert_eq!(rig.disk.durable_writes(), 0);
        client.request(cmd::WRITE, cmd::FLAG_FUA, 0, MIB, &vec![1; MIB as usize]).unwrap();
        assert!(rig.disk.durable_writes() >= 4);
        let before = rig.disk.durable_writes();
        client.write_zeroes(0, 4096, cmd::FLAG_FUA).unwrap();
        assert_eq!(rig.disk.durable_writes(), before + 1);
        let before = rig.disk.flushes();
        client.request(cmd::TRIM, cmd::FLAG_FUA, 0, MIB, &[]).unwrap();
        assert_eq!(rig.disk.flushes(), before + 1);
        // Known clients set it where it means nothing.
        client.request(cmd::READ, cmd::FLAG_FUA, 0, 512, &[]).unwrap();
        client.request(cmd::FLUSH, cmd::FLAG_FUA, 0, 0, &[]).unwrap();
    });
}

#[test]
fn a_failed_flush_is_told() {
    each_way(|rig| {
        let mut client = rig.client();
        client.flush().unwrap();
        rig.disk.fail_flushes(ErrorKind::FlushLost);
        assert_eq!(client.flush().unwrap_err().errno(), EIO);
    });
}

#[test]
fn zeroes_are_written_and_fast_ones_refused_where_they_are_not_fast() {
    each_way(|rig| {
        let mut client = rig.client();
        client.write(0, &vec![9; 1 << 20]).unwrap();
        let fast = client.write_zeroes(0, 4096, cmd::FLAG_FAST_ZERO | cmd::FLAG_NO_HOLE).unwrap_err();
        assert_eq!(fast.errno(), ENOTSUP);
        client.write_zeroes(1, 600_000, cmd::FLAG_NO_HOLE).unwrap();
        let data = client.read(0, MIB).unwrap();
        assert_eq!((data[0], data[600_001]), (9, 9));
        assert!(data[1..600_001].iter().all(|byte| *byte == 0));
        // Longer than a write may be: there is no payload.
        client.write_zeroes(0, 64 * MIB, 0).unwrap();
    });
}

#[test]
fn the_first_request_may_be_a_trim() {
    each_way(|rig| {
        let mut client = rig.client();
        client.trim(0, 64 * MIB).unwrap();
        client.trim(0, 512).unwrap();
        assert_eq!(client.read(0, 512).unwrap(), [0; 512]);
    });
}

#[test]
fn allocation_is_told_and_a_hole_never_claims_to_be_zero() {
    each_way(|rig| {
        let mut client = rig.client();
        client.write(MIB.into(), &vec![1; 1 << 20]).unwrap();
        let (hole, data) = (1, 0);
        let wanted = [
            Block { len: MIB, flags: hole },
            Block { len: MIB, flags: data },
            Block { len: 62 * MIB, flags: hole },
        ];
        assert_eq!(client.block_status(0, 64 * MIB, 0).unwrap(), wanted);
        assert_eq!(client.block_status(0, 64 * MIB, cmd::FLAG_REQ_ONE).unwrap(), wanted[..1]);
        assert_eq!(
            client.block_status(u64::from(MIB) - 512, 1024, 0).unwrap(),
            [Block { len: 512, flags: hole }, Block { len: 512, flags: data }]
        );
        assert_eq!(client.block_status(SIZE - 512, 1024, 0).unwrap_err().errno(), EINVAL);
        client.request(cmd::CACHE, 0, 0, MIB, &[]).unwrap();
    });
}

#[test]
fn allocation_is_not_told_to_those_who_did_not_ask_in_the_handshake() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = Client::greet(rig.dial()).unwrap();
    client.structured_reply().unwrap();
    client.go("disk").unwrap();
    assert_eq!(client.block_status(0, 4096, 0).unwrap_err().errno(), EINVAL);
}

#[test]
fn goodbye_waits_for_what_is_under_way() {
    each_way(|rig| {
        rig.disk.delay(Duration::from_millis(10));
        for len in [4096, MIB] {
            let mut client = rig.client();
            for index in 0..4 {
                let data = vec![5; len as usize];
                client.send(cmd::WRITE, 0, index * u64::from(len), len, &data).unwrap();
            }
            client.send_header(cmd::DISC, 0, 0, 0).unwrap();
            for _ in 0..4 {
                assert_eq!(client.receive().unwrap().errno, 0);
            }
            assert!(matches!(client.receive(), Err(NbdError::Io(_))));
        }
    });
}

#[test]
fn workers_wait_for_a_slow_disk_together() {
    let options = ServerOptions { workers: Some(8), ..ServerOptions::default() };
    let rig = Rig::with_options(RamDisk::new(SIZE), options);
    rig.disk.delay(Duration::from_millis(100));
    let mut client = rig.client();
    let start = Instant::now();
    for index in 0..16 {
        client.send_header(cmd::READ, 0, index * 4096, 4096).unwrap();
    }
    for _ in 0..16 {
        assert_eq!(client.receive().unwrap().errno, 0);
    }
    // One after the other they would take 1.6 s.
    assert!(start.elapsed() < Duration::from_millis(1200), "{:?}", start.elapsed());
}

#[test]
fn on_a_medium_that_does_many_at_once_short_requests_wait_together_and_long_ones_in_several_threads() {
    let rig = Rig::with_options(at_once(SIZE), ServerOptions { cores: 1, ..ServerOptions::default() });
    rig.disk.delay(Duration::from_millis(100));
    let time = |client: &mut Client<_>, kind, flags, len: u32, count: u64| {
        let data = vec![7; if kind == cmd::WRITE { len as usize } else { 0 }];
        let start = Instant::now();
        for index in 0..count {
            client.send(kind, flags, index * u64::from(len), len, &data).unwrap();
        }
        for _ in 0..count {
            assert_eq!(client.receive().unwrap().errno, 0);
        }
        start.elapsed()
    };
    let mut client = rig.client();
    // One after the other they would take 3.2 s, in four threads 0.8.
    let short = time(&mut client, cmd::READ, 0, 4096, 32);
    assert!(short < Duration::from_millis(600), "{short:?}");
    // One after the other their pieces would take 1.6 s, all in one call for each request 0.4.
    let long = time(&mut client, cmd::READ, 0, MIB, 4);
    assert!(long < Duration::from_millis(1200), "{long:?}");
    // A lone one's would take 1.6 s, too.
    let lone = time(&mut client, cmd::READ, 0, 4 * MIB, 1);
    assert!(lone < Duration::from_millis(1200), "{lone:?}");
    // Durable ones wait each for itself: 1.6 s one after the other.
    let durable = time(&mut client, cmd::WRITE, cmd::FLAG_FUA, 4096, 16);
    assert!(durable < Duration::from_millis(1200), "{durable:?}");
    // A simple reply keeps the order of its pieces, but they are waited for together.
    let simple = time(&mut rig.simple_client(), cmd::READ, 0, 4 * MIB, 1);
    assert!(simple < Duration::from_millis(750), "{simple:?}");
    // Workers that went home meanwhile are made again.
    std::thread::sleep(Duration::from_millis(1300));
    let again = time(&mut client, cmd::READ, 0, 4 * MIB, 1);
    assert!(again < Duration::from_millis(1200), "{again:?}");
}

#[test]
fn requests_that_come_byte_by_byte_are_served() {
    let rig = Rig::new(RamDisk::new(SIZE));
    let mut client = rig.client();
    let mut bytes = inlinecrypt_testkit::nbd::request_header(cmd::WRITE, 0, 99, 512, 16).to_vec();
    bytes.extend([3; 16]);
    for byte in bytes {
        client.stream().write_all(&[byte]).unwrap();
    }
    let mut reply = [0; 16];
    std::io::Read::read_exact(client.stream(), &mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
    assert_eq!(client.read(512, 16).unwrap(), [3; 16]);
}

#[test]
fn what_was_done_is_counted() {
    each_way(|rig| {
        let mut client = rig.client();
        client.write(0, &vec![1; 1 << 20]).unwrap();
        client.read(0, 4096).unwrap();
        client.flush().unwrap();
        client.trim(0, 512).unwrap();
        client.write_zeroes(0, 1024, 0).unwrap();
        client.block_status(0, 2048, 0).unwrap();
        client.request(cmd::CACHE, 0, 0, 512, &[]).unwrap();
        client.read(SIZE, 1).unwrap_err();
        let status = rig.server.status();
        let counters = status.exports[0].counters;
        assert_eq!((counters.connections_now, counters.connections_total, counters.errors), (1, 1, 1));
        assert_eq!((counters.write.requests, counters.write.bytes), (1, 1 << 20));
        assert_eq!((counters.read.requests, counters.read.bytes), (1, 4096));
        assert_eq!((counters.flush.requests, counters.trim.bytes), (1, 512));
        assert_eq!((counters.write_zeroes.bytes, counters.block_status.bytes), (1024, 2048));
        assert_eq!(counters.cache.requests, 1);
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["exports"][0]["counters"]["write"]["bytes"], 1 << 20);
        client.disconnect().unwrap();
        eventually("the connection is gone", || rig.server.status().connections_now == 0);
    });
}
