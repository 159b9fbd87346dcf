//! What headers say of re-encryptions: what cryptsetup writes is believed, what is written is read again, and what contradicts itself
//! is refused.

use crate::common::{HEADER_BYTES, KEY_BYTES, container, key, random};
use crate::damage::{with_json_of, with_json_on};
use inlinecrypt_cipher::Mode;
use inlinecrypt_luks::kdf::Kdf;
use inlinecrypt_luks::luks2::{Container, Kept, NewContainer, NewData, Others, Reencryption, Resilience};
use inlinecrypt_luks::{Error, ErrorKind, Hash, Storage};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Of the data in the containers of these tests.
const SIZE: u64 = 64 << 10;

pub(crate) fn new_key() -> [u8; KEY_BYTES] {
    key().map(|byte| byte ^ 0xa5)
}

pub(crate) fn new_data(key: &[u8], resilience: Resilience) -> NewData<'_> {
    NewData {
        mode: Mode::Aes256Xts,
        sector_bytes: 4096,
        key,
        iterations: 1,
        resilience,
        zone_bytes_min: 4096,
    }
}

/// With one LUKS keyslot alone, which `zero` opens.
pub(crate) fn alone() -> Vec<u8> {
    let mut container = Container::read(container()).unwrap();
    container.remove_keyslots(&[1], &mut random(3)).unwrap();
    container.into_storage()
}

/// Begins to re-encrypt to what `new` says, with the LUKS keyslots that these passphrases open.
pub(crate) fn begin<S: Storage>(
    container: &mut Container<S>,
    passphrases: &[&str],
    others: Others,
    new: NewData<'_>,
) -> Result<(), Error> {
    let mut kept = Vec::new();
    for passphrase in passphrases.iter().map(|passphrase| passphrase.as_bytes()) {
        kept.push(Kept { opened: container.open(passphrase, None)?, passphrase });
    }
    container.begin_reencryption(&kept, others, new, &mut random(4))
}

pub(crate) fn begun(resilience: Resilience) -> Container<Vec<u8>> {
    let mut container = Container::read(alone()).unwrap();
    begin(&mut container, &["zero"], Others::Refused, new_data(&new_key(), resilience)).unwrap();
    container
}

fn resiliences() -> [Resilience; 3] {
    [
        Resilience::Journal,
        Resilience::Checksum { hash: Hash::Sha256, block_bytes: 512 },
        Resilience::Checksum { hash: Hash::Sha512, block_bytes: 4096 },
    ]
}

#[test]
fn what_is_begun_is_found_and_opens_both_keys() {
    for resilience in resiliences() {
        let mut container = begun(resilience);
        let re = container.reencryption().unwrap();
        assert_eq!((re.resilience, re.boundary, re.hot_bytes), (resilience, Some(0), None));
        assert_eq!((re.previous.sector_bytes, re.next.sector_bytes), (512, 4096));
        assert!(re.area_bytes >= 258_048 && re.area_offset >= 32 << 10);
        let old = container.open_digest(b"zero", re.previous_digest).unwrap().key;
        let new = container.open_digest(b"zero", re.next_digest).unwrap().key;
        assert!(old[..] == key() && new[..] == new_key());
        container.check_reencryption(&old, &new).unwrap();
        for (old, new) in [(&new, &old), (&old, &old)] {
            let error = container.check_reencryption(old, new).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged);
        }
        // What else is changed while it goes on?
        assert_eq!(container.resize(Some(4096), &mut random(1)).unwrap_err().kind(), ErrorKind::Unsupported);
        let _ = container.finish_reencryption(&mut random(1)).unwrap();
        assert!(container.open(b"zero", None).unwrap().key[..] == new_key());
        let metadata = &container.header().metadata;
        assert_eq!(
            (metadata.keyslots().len(), metadata.digests().len(), metadata.segments().len()),
            (1, 1, 1)
        );
        assert_eq!(metadata.data().unwrap().1.sector_bytes, 4096);
        assert!(metadata.requirements().is_empty() && metadata.reencryption().unwrap().is_none());
    }
}

/// What cryptsetup's digest is made of.
#[test]
fn what_cryptsetup_began_is_known_to_be_whole() {
    let vector: Value = serde_json::from_str(include_str!("../../vectors/luks2-reencrypt.json")).unwrap();
    let key = |name: &str| hex::decode(vector[name].as_str().unwrap()).unwrap();
    let container = Container::read(with_json_of(&vector["metadata"])).unwrap();
    let re = container.reencryption().unwrap();
    assert_eq!((re.previous.sector_bytes, re.next.sector_bytes), (512, 4096));
    assert_eq!(re.resilience, Resilience::Checksum { hash: Hash::Sha256, block_bytes: 4096 });
    assert_eq!((re.boundary, re.hot_bytes), (Some(0), None));
    container.check_reencryption(&key("old_key"), &key("new_key")).unwrap();
    let error = container.check_reencryption(&key("new_key"), &key("old_key")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
}

/// Where cryptsetup is killed among its last steps: the old key is gone, and the header still says that there is one.
#[test]
fn what_is_complete_but_for_its_last_steps_can_be_completed() {
    let begun = begun(Resilience::Journal);
    let mut json = Value::Object(begun.header().metadata.json().clone());
    json["segments"]["0"] = json["segments"]["2"].clone();
    json["segments"]["0"].as_object_mut().unwrap().remove("flags");
    json["digests"]["0"]["keyslots"] = json!([]);
    json["digests"]["0"]["segments"] = json!(["1"]);
    json["digests"]["1"]["segments"] = json!(["0", "2"]);
    json["keyslots"].as_object_mut().unwrap().remove("1");
    let mut container = Container::read(with_json_of(&json)).unwrap();
    let re = container.reencryption().unwrap();
    assert_eq!((re.boundary, re.hot_bytes), (None, None));
    let _ = container.finish_reencryption(&mut random(5)).unwrap();
    let metadata = &container.header().metadata;
    assert_eq!((metadata.keyslots().len(), metadata.digests().len()), (1, 1));
    assert_eq!(metadata.data().unwrap().1.sector_bytes, 4096);
}

/// As cryptsetup writes segments while the device is in use.
#[test]
fn data_of_a_fixed_length_is_said_to_have_it() {
    let mut begun = begun(Resilience::Journal);
    begun.set_boundary(8192, Some(4096), SIZE, &mut random(6)).unwrap();
    assert_eq!(begun.reencryption().unwrap().fixed_bytes, None);
    let mut json = Value::Object(begun.header().metadata.json().clone());
    json["segments"]["2"]["size"] = json!((SIZE - 12_288).to_string());
    let mut fixed = Container::read(with_json_of(&json)).unwrap();
    let re = fixed.reencryption().unwrap();
    assert_eq!((re.boundary, re.hot_bytes, re.fixed_bytes), (Some(8192), Some(4096), Some(SIZE)));
    // What goes on says nothing of it: in the end the data goes to the end.
    fixed.set_boundary(12_288, None, SIZE, &mut random(7)).unwrap();
    let re = fixed.reencryption().unwrap();
    assert_eq!((re.boundary, re.hot_bytes, re.fixed_bytes), (Some(12_288), None, None));
}

#[test]
fn a_token_of_the_old_keyslot_is_one_of_the_new_as_well() {
    let mut disk = Container::read(alone()).unwrap();
    disk.add_token(json!({ "type": "x", "keyslots": ["0"] }), &mut random(2)).unwrap();
    begin(&mut disk, &["zero"], Others::Refused, new_data(&new_key(), Resilience::Journal)).unwrap();
    let of = |disk: &Container<Vec<u8>>| disk.header().metadata.tokens()[&1]["keyslots"].clone();
    assert_eq!(of(&disk), json!(["0", "1"]));
    let _ = disk.finish_reencryption(&mut random(5)).unwrap();
    assert_eq!(of(&disk), json!(["0"]));
}

/// LUKS keyslots 0, 2 and 5 with passphrases `zero`, `two` and `five`, priorities 1, 0 and 2, costs of their own, and tokens; there is
/// room for six areas, and a LUKS keyslot that holds another key.
pub(crate) fn several() -> Vec<u8> {
    let mut disk = container();
    let more = 3 * 258_048;
    let at = usize::try_from(HEADER_BYTES).unwrap();
    disk.splice(at..at, vec![0; more]);
    let mut json = Value::Object(Container::read(container()).unwrap().header().metadata.json().clone());
    json["config"]["keyslots_size"] = (7 * 258_048).to_string().into();
    json["segments"]["0"]["offset"] = (HEADER_BYTES + more as u64).to_string().into();
    let mut disk = Container::read(with_json_on(disk, &json)).unwrap();
    disk.remove_keyslots(&[1], &mut random(1)).unwrap();
    for (number, passphrase, iterations) in [(2, "two", 2), (5, "five", 3)] {
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha512, iterations };
        disk.add_keyslot(&key(), 0, passphrase.as_bytes(), kdf, Some(number), &mut random(8)).unwrap();
    }
    for keyslots in [json!(["0", "2"]), json!(["5"]), json!([])] {
        disk.add_token(json!({ "type": "x", "keyslots": keyslots }), &mut random(2)).unwrap();
    }
    let mut json = Value::Object(disk.header().metadata.json().clone());
    json["keyslots"]["2"]["priority"] = 0.into();
    json["keyslots"]["5"]["priority"] = 2.into();
    with_json_on(disk.into_storage(), &json)
}

/// What is known of each LUKS keyslot of the data: number, priority, cost; and the tokens' lists.
fn facts(disk: &Container<Vec<u8>>) -> (Vec<(u32, u32, Kdf)>, Vec<Value>) {
    let metadata = &disk.header().metadata;
    let slots = metadata.keyslots();
    let known = |number| {
        let slot: &inlinecrypt_luks::luks2::Keyslot = &slots[&number];
        (number, slot.priority, slot.kdf.clone().unwrap())
    };
    let bound = metadata.bound_keyslots().map(known).collect();
    (bound, metadata.tokens().values().map(|token| token["keyslots"].clone()).collect())
}

/// By their numbers, as whoever has been asked for each opens them.
pub(crate) fn kept<'p, S: Storage>(
    disk: &mut Container<S>,
    passphrases: &[(u32, &'p str)],
) -> Result<Vec<Kept<'p>>, Error> {
    let mut kept = Vec::new();
    for (number, passphrase) in passphrases {
        let opened = disk.open(passphrase.as_bytes(), Some(*number))?;
        kept.push(Kept { opened, passphrase: passphrase.as_bytes() });
    }
    Ok(kept)
}

#[test]
fn every_passphrase_keeps_its_keyslot_with_number_priority_cost_and_tokens() {
    let mut disk = Container::read(several()).unwrap();
    let before = facts(&disk);
    assert_eq!(before.0.len(), 3);
    let all = [(5, "five"), (0, "zero"), (2, "two")];
    let kept = kept(&mut disk, &all).unwrap();
    disk.begin_reencryption(
        &kept,
        Others::Refused,
        new_data(&new_key(), Resilience::Journal),
        &mut random(4),
    )
    .unwrap();
    let re = disk.reencryption().unwrap();
    // Whoever has any of them opens both.
    for (_, passphrase) in all.iter().filter(|(number, _)| *number != 2) {
        let old = disk.open_digest(passphrase.as_bytes(), re.previous_digest).unwrap().key;
        let new = disk.open_digest(passphrase.as_bytes(), re.next_digest).unwrap();
        assert!(old[..] == key() && new.key[..] == new_key());
        disk.check_reencryption(&old, &new.key).unwrap();
    }
    let left = disk.finish_reencryption(&mut random(5)).unwrap();
    disk.wipe_leftovers(left, &mut random(5)).unwrap();
    assert_eq!(facts(&disk), before);
    for (number, passphrase) in all {
        let opened = disk.open(passphrase.as_bytes(), Some(number)).unwrap();
        assert!(opened.key[..] == new_key(), "{number}");
    }
}

#[test]
fn a_keyslot_without_its_passphrase_is_refused_or_dropped() {
    let mut disk = Container::read(several()).unwrap();
    let before = disk.storage().clone();
    let (slots, _) = facts(&disk);
    let kept = kept(&mut disk, &[(0, "zero"), (5, "five")]).unwrap();
    let (key, mut random) = (new_key(), random(4));
    let new = new_data(&key, Resilience::Journal);
    let error = disk.begin_reencryption(&kept, Others::Refused, new, &mut random).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("(2)"), "{error}");
    assert!(*disk.storage() == before);
    disk.begin_reencryption(&kept, Others::Dropped, new, &mut random).unwrap();
    let re = disk.reencryption().unwrap();
    assert!(disk.open(b"two", Some(2)).unwrap().digest == re.previous_digest);
    let _ = disk.finish_reencryption(&mut random).unwrap();
    assert_eq!(disk.open(b"two", Some(2)).unwrap_err().kind(), ErrorKind::Invalid);
    let (now, tokens) = facts(&disk);
    assert_eq!(now, [slots[0], slots[2]]);
    assert_eq!(tokens[1..], [json!(["0"]), json!(["5"]), json!([])]);
}

/// In a header of the usual size: as many again, and one more.
#[test]
fn fifteen_passphrases_are_kept_and_sixteen_are_too_many() {
    const HEADER: u64 = 16 << 20;
    for count in [15, 16] {
        let wanted = NewContainer {
            mode: Mode::Aes256Xts,
            sector_bytes: 512,
            data_offset: HEADER,
            header_bytes: HEADER,
            uuid: "01234567-89ab-cdef-0123-456789abcdef",
            label: "",
            subsystem: "",
            key: Some((&key(), 1000)),
            tokens: Vec::new(),
        };
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1 };
        let mut disk = wanted.write(vec![0; 16 << 20], &mut random(1)).unwrap();
        let names: Vec<String> = (0..count).map(|number| format!("passphrase {number}")).collect();
        for name in &names {
            disk.add_keyslot(&key(), 0, name.as_bytes(), kdf, None, &mut random(2)).unwrap();
        }
        let all: Vec<(u32, &str)> = (0..).zip(names.iter().map(String::as_str)).collect();
        let kept = kept(&mut disk, &all).unwrap();
        let key = new_key();
        let new = NewData { zone_bytes_min: 256 << 10, ..new_data(&key, Resilience::Journal) };
        let begun = disk.begin_reencryption(&kept, Others::Refused, new, &mut random(4));
        if count == 16 {
            assert!(begun.unwrap_err().to_string().contains("no room"));
            continue;
        }
        begun.unwrap();
        let _ = disk.finish_reencryption(&mut random(5)).unwrap();
        assert_eq!(facts(&disk).0.len(), 15);
        for (number, name) in all {
            assert!(disk.open(name.as_bytes(), Some(number)).unwrap().key[..] == new_key());
        }
    }
}

/// What the header says in the middle is longer than what it says when it begins.
#[test]
fn what_begins_has_room_to_go_on() {
    const SIZE: u64 = 1 << 40;
    let (mut begun_with, mut refused) = (0, 0);
    for pad in (9_000..11_000).step_by(25) {
        let mut container = Container::read(alone()).unwrap();
        let token = serde_json::json!({ "type": "padding", "keyslots": [], "text": "x".repeat(pad) });
        if container.add_token(token, &mut random(3)).is_err() {
            refused += 1;
            continue;
        }
        let before = container.header().metadata.json().clone();
        let new = new_data(&[9; KEY_BYTES], Resilience::Journal);
        if begin(&mut container, &["zero"], Others::Refused, new).is_err() {
            assert_eq!(*container.header().metadata.json(), before);
            refused += 1;
            continue;
        }
        begun_with += 1;
        container.set_boundary(0, Some(1 << 20), SIZE, &mut random(5)).unwrap();
        container.set_boundary(SIZE - (2 << 20), Some(1 << 20), SIZE, &mut random(5)).unwrap();
    }
    assert!(begun_with > 5 && refused > 5, "{begun_with} and {refused}");
}

#[test]
fn what_cannot_begin_leaves_the_header_as_it_is() {
    let mut disk = Container::read(container()).unwrap();
    let before = disk.storage().clone();
    let key = new_key();
    let new = new_data(&key, Resilience::Journal);
    let error = begin(&mut disk, &["zero"], Others::Refused, new).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("(1)"), "{error}");
    // There is room for four areas, which both would take without one for the zones.
    let error = begin(&mut disk, &["zero", "one"], Others::Refused, new).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("no room"), "{error}");
    let error = begin(&mut disk, &["zero", "zero"], Others::Dropped, new).unwrap_err();
    assert!(error.to_string().contains("named twice"), "{error}");
    assert!(begin(&mut disk, &[], Others::Dropped, new).unwrap_err().kind() == ErrorKind::Passphrase);
    let error = begin(&mut disk, &["zero"], Others::Dropped, NewData { zone_bytes_min: 64 << 20, ..new });
    let error = error.unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    assert!(*disk.storage() == before);
    let mut fixed = Container::read(alone()).unwrap();
    fixed.resize(Some(4096), &mut random(1)).unwrap();
    let error = begin(&mut fixed, &["zero"], Others::Refused, new).unwrap_err();
    assert!(error.to_string().contains("fixed length"), "{error}");
}

proptest! {
    /// How far it is, is what was written down.
    #[test]
    fn boundaries_are_read_as_they_were_written(boundary in 0u64..16, hot in 0u64..16) {
        let (boundary, hot) = (boundary * 4096, hot * 4096);
        let hot = (hot > 0).then_some(hot.min(SIZE - boundary));
        let mut container = begun(Resilience::Journal);
        container.set_boundary(boundary, hot, SIZE, &mut random(6)).unwrap();
        let again = Container::read(container.into_storage()).unwrap();
        let Reencryption { boundary: at, hot_bytes, .. } = again.reencryption().unwrap();
        prop_assert_eq!((at, hot_bytes), (Some(boundary), hot));
        // Nothing of it is in what the digest covers.
        again.check_reencryption(&key(), &new_key()).unwrap();
    }
}

#[test]
fn what_contradicts_itself_or_is_not_known_is_refused() {
    let mut good = begun(Resilience::Checksum { hash: Hash::Sha256, block_bytes: 512 });
    good.set_boundary(8192, Some(4096), SIZE, &mut random(6)).unwrap();
    let good = Value::Object(good.header().metadata.json().clone());
    let keyslot = good["keyslots"].as_object().unwrap().iter();
    let keyslot = keyslot.filter(|(_, slot)| slot["type"] == "reencrypt").map(|(number, _)| number.clone());
    let keyslot = keyslot.collect::<Vec<_>>()[0].clone();
    type Change = Box<dyn Fn(&mut Value)>;
    let keyslot = &keyslot;
    let slot = |change: fn(&mut Value)| -> Change {
        let keyslot = keyslot.clone();
        Box::new(move |json| change(&mut json["keyslots"][&keyslot]))
    };
    let segment = |number: &'static str, field: &'static str, value: Value| -> Change {
        Box::new(move |json| json["segments"][number][field] = value.clone())
    };
    use ErrorKind::{Damaged, Unsupported};
    let changes: Vec<(Change, ErrorKind)> = vec![
        (
            Box::new(|json| json["config"]["requirements"]["mandatory"] = json!(["online-reencrypt-v3"])),
            Unsupported,
        ),
        (
            Box::new(|json| {
                json["config"]["requirements"]["mandatory"] = json!(["online-reencrypt-v2", "x"])
            }),
            Unsupported,
        ),
        (slot(|slot| slot["mode"] = json!("encrypt")), Unsupported),
        (slot(|slot| slot["direction"] = json!("backward")), Unsupported),
        (slot(|slot| slot["area"]["type"] = json!("datashift")), Unsupported),
        (slot(|slot| slot["area"]["type"] = json!("none")), Unsupported),
        (slot(|slot| slot["area"]["hash"] = json!("md5")), Unsupported),
        (slot(|slot| slot["area"]["sector_size"] = json!(0)), Damaged),
        (slot(|slot| slot["area"]["sector_size"] = json!(u64::MAX)), Damaged),
        (slot(|slot| slot["type"] = json!("other")), Damaged),
        (segment("0", "offset", json!("0")), Damaged),
        (segment("0", "size", json!("4096")), Damaged),
        (segment("0", "iv_tweak", json!("1")), Damaged),
        (segment("0", "sector_size", json!(512)), Damaged),
        (segment("1", "flags", json!([])), Damaged),
        (segment("1", "size", json!("dynamic")), Damaged),
        (segment("1", "size", json!("18446744073709547520")), Damaged),
        (segment("2", "size", json!("18446744073709547520")), Damaged),
        (segment("2", "type", json!("linear")), Damaged),
        (segment("3", "flags", json!([])), Damaged),
        (segment("4", "flags", json!(["backup-previous"])), Damaged),
        (segment("3", "offset", json!("0")), Unsupported),
        (segment("3", "iv_tweak", json!("8")), Unsupported),
        (segment("4", "size", json!("4096")), Unsupported),
        (Box::new(|json| json["digests"]["0"]["segments"] = json!(["1", "2", "3", "4"])), Damaged),
        (Box::new(|json| json["digests"]["1"]["segments"] = json!(["1", "4"])), Damaged),
    ];
    assert!(Container::read(with_json_of(&good)).unwrap().reencryption().is_ok());
    for (number, (change, kind)) in changes.iter().enumerate() {
        let mut json = good.clone();
        change(&mut json);
        assert_ne!(json, good, "{number}");
        let found = Container::read(with_json_of(&json)).and_then(|container| container.reencryption());
        let error = found.map(|re| panic!("{number}: {re:?}")).unwrap_err();
        assert_eq!(error.kind(), *kind, "{number}: {error}");
    }
    // What the digest covers, and nobody but who has both keys can change.
    for change in [
        slot(|slot| slot["area"]["hash"] = json!("sha512")),
        slot(|slot| slot["area"]["sector_size"] = json!(4096)),
        Box::new(|json: &mut Value| {
            for number in ["3", "2"] {
                json["segments"][number]["encryption"] = json!("aes-cbc-essiv:sha256");
            }
        }),
    ] {
        let mut json = good.clone();
        change(&mut json);
        let container = Container::read(with_json_of(&json)).unwrap();
        let error = container.check_reencryption(&key(), &new_key()).unwrap_err();
        assert!(error.kind() == Damaged && error.to_string().contains("without its keys"), "{error}");
    }
}
