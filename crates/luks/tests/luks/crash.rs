//! Whoever changes a header is stopped after every call, and the power goes: what is on the disk is the old header or the new one,
//! whole, with LUKS keyslots that open.

use crate::common::{CHEAP, container, key, opens, random};
use crate::reencrypt::{alone, begin, begun, kept, new_data, new_key, several};
use inlinecrypt_luks::luks2::{Container, Header, Others, Resilience};
use inlinecrypt_luks::{ErrorKind, Storage};
use serde_json::json;
use std::collections::BTreeSet;
use std::io;

/// A disk whose writes stay in a cache until they are flushed, and that stops after so many calls.
#[derive(Clone)]
struct Disk {
    stable: Vec<u8>,
    /// Written and not flushed: sectors by their numbers, in order.
    cached: Vec<(usize, [u8; 512])>,
    calls_left: usize,
}

impl Disk {
    fn new(stable: Vec<u8>, calls_left: usize) -> Self {
        Self { stable, cached: Vec::new(), calls_left }
    }

    fn call(&mut self) -> io::Result<()> {
        self.calls_left =
            self.calls_left.checked_sub(1).ok_or_else(|| io::Error::other("the power is gone"))?;
        Ok(())
    }

    /// What is left when the power goes: any of the cached sectors.
    fn after_power_cut(&self, survives: impl Fn(usize) -> bool) -> Vec<u8> {
        let mut left = self.stable.clone();
        for (at, (sector, data)) in self.cached.iter().enumerate() {
            if survives(at) {
                left[sector * 512..][..512].copy_from_slice(data);
            }
        }
        left
    }
}

impl Storage for &mut Disk {
    fn len_bytes(&self) -> u64 {
        self.stable.len() as u64
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.after_power_cut(|_| true).read(offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        // The write itself is on its way when the power goes.
        assert!(offset.is_multiple_of(512) && data.len().is_multiple_of(512), "{offset} {}", data.len());
        let first = offset as usize / 512;
        let sectors = data.chunks(512).enumerate().map(|(at, data)| (first + at, data.try_into().unwrap()));
        self.cached.extend(sectors);
        self.call()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call()?;
        self.stable = self.after_power_cut(|_| true);
        self.cached.clear();
        Ok(())
    }
}

type Change = dyn Fn(&mut Container<&mut Disk>) -> Result<(), inlinecrypt_luks::Error>;

const PASSPHRASES: [&str; 4] = ["zero", "one", "two", "five"];

/// Runs `change` on `before`, stopped after every call, and checks what is left. Each header has its passphrases.
fn check(name: &str, before: &[u8], change: &Change) {
    let describe = |disk: Vec<u8>| {
        let mut container = Container::read(disk).unwrap();
        let json = serde_json::Value::Object(container.header().metadata.json().clone());
        (json.to_string(), opens(&mut container, &PASSPHRASES))
    };
    let old = describe(before.to_vec());
    let mut whole = Disk::new(before.to_vec(), usize::MAX);
    change(&mut Container::read(&mut whole).unwrap()).unwrap();
    assert!(whole.cached.is_empty(), "{name}: not all is stable at the end");
    let new = describe(whole.stable.clone());
    let calls = usize::MAX - whole.calls_left;
    let mut seen = BTreeSet::new();
    for calls_left in 0..calls {
        let mut disk = Disk::new(before.to_vec(), calls_left);
        let error = change(&mut Container::read(&mut disk).unwrap()).expect_err("it was stopped");
        assert_eq!(error.kind(), ErrorKind::Io, "{name}");
        for survives in [
            Box::new(|_: usize| false) as Box<dyn Fn(usize) -> bool>,
            Box::new(|_| true),
            Box::new(|at| at % 2 == 0),
            Box::new(|at| at % 2 == 1),
            Box::new(|at| at < 5),
            Box::new(|at| at >= 5),
            Box::new(|at| at == 0),
            Box::new(|at| at != 0),
        ] {
            let left = disk.after_power_cut(survives);
            let found = describe(left.clone());
            assert!(
                found == old || found == new,
                "{name}, after {calls_left} calls: {found:?}\nold {old:?}\nnew {new:?}"
            );
            seen.insert(found == new);
            // And it can be mended, and means the same afterwards.
            let mut container = Container::read(left).unwrap();
            container.repair(&mut random(5)).unwrap();
            assert!(container.header().is_whole());
            assert_eq!(describe(container.into_storage()), found, "{name}");
        }
    }
    assert_eq!(seen.len(), if old == new { 1 } else { 2 }, "{name}: both are met");
}

#[test]
fn every_change_is_done_or_not() {
    let disk = container();
    let changes: [(&str, Box<Change>); 8] = [
        (
            "add",
            Box::new(|container| {
                container.add_keyslot(&key(), 0, b"two", CHEAP, None, &mut random(2)).map(drop)
            }),
        ),
        ("change", Box::new(|container| container.change_keyslot(1, &key(), b"two", CHEAP, &mut random(2)))),
        ("remove", Box::new(|container| container.remove_keyslots(&[0], &mut random(2)))),
        ("remove both", Box::new(|container| container.remove_keyslots(&[0, 1], &mut random(2)))),
        (
            "token",
            Box::new(|container| {
                container.add_token(json!({ "type": "x", "keyslots": [] }), &mut random(2)).map(drop)
            }),
        ),
        ("resize", Box::new(|container| container.resize(Some(512), &mut random(2)))),
        ("label", Box::new(|container| container.set_label(Some("x"), None, &mut random(2)))),
        ("erase", Box::new(|container| container.erase("somebody-elses", &mut random(2)))),
    ];
    for (name, change) in &changes {
        check(name, &disk, change);
    }
}

/// A re-encryption begins, goes on and ends.
#[test]
fn every_change_of_a_reencryption_is_done_or_not() {
    let new = new_key();
    check("begin", &alone(), &move |container| {
        begin(container, &["zero"], Others::Refused, new_data(&new, Resilience::Journal))
    });
    check("begin, with several", &several(), &move |container| {
        let kept = kept(container, &[(0, "zero"), (2, "two"), (5, "five")])?;
        let new = new_data(&new, Resilience::Journal);
        container.begin_reencryption(&kept, Others::Refused, new, &mut random(2))
    });
    let begun = begun(Resilience::Journal).into_storage();
    const SIZE: u64 = 64 << 10;
    check("zone", &begun, &|container| container.set_boundary(0, Some(4096), SIZE, &mut random(2)));
    let mut hot = Container::read(begun).unwrap();
    hot.set_boundary(4096, Some(SIZE - 4096), SIZE, &mut random(2)).unwrap();
    let hot = hot.into_storage();
    check("behind it", &hot, &|container| container.set_boundary(4096, None, SIZE, &mut random(2)));
    check("end", &hot, &|container| {
        let left = container.finish_reencryption(&mut random(2))?;
        container.wipe_leftovers(left, &mut random(2))
    });
}

#[test]
fn a_change_of_a_header_with_one_good_copy_is_done_or_not() {
    for copy in [0_usize, 16 << 10] {
        let mut disk = container();
        disk[copy + 5000] ^= 1;
        check("change", &disk, &|container| {
            container.change_keyslot(0, &key(), b"two", CHEAP, &mut random(2))
        });
        check("remove", &disk, &|container| container.remove_keyslots(&[1], &mut random(2)));
    }
}

/// The header of before a passphrase was changed, put back over the one of afterwards.
#[test]
fn a_backup_is_put_back_or_not() {
    let backup = Container::read(container()).unwrap().backup().unwrap();
    let mut changed = Container::read(container()).unwrap();
    // Twice: the new area lies where the backup has its own.
    for _ in 0..2 {
        changed.change_keyslot(0, &key(), b"two", CHEAP, &mut random(3)).unwrap();
    }
    changed.remove_keyslots(&[1], &mut random(3)).unwrap();
    let before = changed.into_storage();
    let open = |disk: Vec<u8>| opens(&mut Container::read(disk).unwrap(), &PASSPHRASES);
    assert_eq!(open(before.clone()), ["two"]);
    let mut seen = BTreeSet::new();
    for calls_left in 0.. {
        let mut disk = Disk::new(before.clone(), calls_left);
        let done = Container::restore(&mut disk, backup.to_vec(), &mut random(4)).is_ok();
        for survives in [
            Box::new(|_: usize| false) as Box<dyn Fn(usize) -> bool>,
            Box::new(|_| true),
            Box::new(|at| at % 2 == 0),
        ] {
            let found = open(disk.after_power_cut(survives));
            assert!(found == ["two"] || found == ["zero", "one"], "{calls_left}: {found:?}");
            seen.insert(found);
        }
        if done {
            assert_eq!(open(disk.stable), ["zero", "one"]);
            break;
        }
    }
    assert_eq!(seen.len(), 2);
}

/// What was removed is gone from the disk: neither the old header nor its area can be found.
#[test]
fn what_is_removed_is_gone() {
    let disk = container();
    let mut header = Container::read(disk.clone()).unwrap();
    let slot = header.header().metadata.keyslots()[&0].clone();
    let area = usize::try_from(slot.area_offset).unwrap()
        ..usize::try_from(slot.area_offset + slot.area_bytes).unwrap();
    header.remove_keyslots(&[0], &mut random(2)).unwrap();
    let after = header.into_storage();
    let same = disk[area.clone()].iter().zip(&after[area]).filter(|(old, new)| old == new).count();
    assert!(same < 258_048 / 200, "{same} bytes are the same");
    let before = Header::read(&mut disk.clone()).unwrap();
    let salt = &before.metadata.json()["keyslots"]["0"]["kdf"]["salt"];
    assert!(!String::from_utf8_lossy(&after).contains(salt.as_str().unwrap()));
}
