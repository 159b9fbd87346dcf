//! What the engine does beyond the bargain that all engines keep: modes, faults, blobs, order of steps.

use super::*;
use crate::blob::{inspect, looks_like_wrapped_key};
use crate::verify::{Sample, Verified};
use crate::{EngineSpec, open};
use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key};
use inlinecrypt_core::config::{DataUnitSize, Hardware};
use proptest::prelude::*;
use std::time::{Duration, Instant};

const MASTER: [u8; 32] = [0x5a; 32];

fn root() -> (tempfile::TempDir, Root) {
    let directory = tempfile::tempdir().unwrap();
    let root = Root::create_file(directory.path().join("root")).unwrap();
    (directory, root)
}

fn spec(text: &str) -> IceSpec {
    match text.parse().unwrap() {
        EngineSpec::Ice(spec) => spec,
        other => panic!("{other}"),
    }
}

fn engine(text: &str, root: Option<&Root>) -> IceEngine {
    IceEngine::new(spec(text), root).unwrap_or_else(|why| panic!("{text}: {}", why.chain()))
}

fn refusal(text: &str, root: Option<&Root>) -> Error {
    IceEngine::new(spec(text), root).expect_err("must not start")
}

fn key_of(form: KeyForm, unit: u32, dun_bytes: u8) -> Arc<Key> {
    let unit = DataUnitSize::from_bytes(unit).unwrap();
    Key::new(Mode::Aes256Xts, unit, dun_bytes, form, Hardware::Allowed).unwrap()
}

fn raw_bytes(seed: u8) -> Vec<u8> {
    (0..64).map(|i| (i * 3) ^ seed).collect()
}

fn raw(seed: u8) -> Arc<Key> {
    key_of(KeyForm::Raw(RawKey::new(&raw_bytes(seed))), 512, 4)
}

fn prepared(engine: &IceEngine, master: &[u8; 32]) -> EphemeralWrappedKey {
    engine.prepare(&engine.import(&RawKey::new(master)).unwrap()).unwrap()
}

fn wrapped(engine: &IceEngine) -> Arc<Key> {
    key_of(KeyForm::Wrapped(prepared(engine, &MASTER)), 512, 4)
}

fn crypt(engine: &dyn Engine, slot: u32, first: Dun, len: usize) -> Result<Vec<u8>, Error> {
    let mut memory = engine.memory().allocate(len).unwrap();
    let key = KeyRef::Slot(SlotIndex(slot));
    let result = engine.crypt_range(key, Direction::Encrypt, first, &mut *memory, 0..len);
    if result.as_ref().is_err_and(|why| why.kind() != ErrorKind::EngineFailed) {
        assert_eq!(memory.bytes(), vec![0; len], "touched");
    }
    result.map(|()| memory.bytes().to_vec())
}

fn kind(engine: &dyn Engine, slot: u32) -> ErrorKind {
    crypt(engine, slot, Dun::ZERO, 512).unwrap_err().kind()
}

fn software(key: &[u8], len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    Mode::Aes256Xts.info().expand(key).unwrap().encrypt(Dun::ZERO, 512, &mut data);
    data
}

#[test]
fn each_variant_advertises_what_its_firmware_does() {
    let (_directory, root) = root();
    for (text, with_root, exclusive) in [
        ("ice:raw", KeyTypes::RAW, false),
        ("ice:hwkm-v1", KeyTypes::BOTH, true),
        ("ice:hwkm-v2", KeyTypes::BOTH, true),
        ("ice:next", KeyTypes::BOTH, false),
    ] {
        let rooted = engine(text, Some(&root));
        assert_eq!(rooted.capabilities().key_types, with_root, "{text}");
        assert_eq!(rooted.exclusive().is_some(), exclusive, "{text}");
        assert_eq!(rooted.name(), text);
        assert_eq!(rooted.slot_hold(), SlotHold::WholeRequest);
        let rootless = engine(text, None);
        assert_eq!(rootless.capabilities().key_types, KeyTypes::RAW, "{text}");
        assert!(rootless.exclusive().is_none() && rootless.key_ladder().is_none());
        rootless.program(SlotIndex(0), &raw(1)).unwrap();
    }
    let capabilities = engine("ice:raw,slots=256,dun=4,units=512+4096", None).capabilities().clone();
    assert_eq!((capabilities.keyslots, capabilities.dun_bytes_max), (256, 4));
    assert_eq!(capabilities.units[Mode::Aes256Xts.index()].bits(), 0x1200);
    assert!(Mode::ALL[1..].iter().all(|mode| capabilities.units[mode.index()].is_empty()));
}

#[test]
fn self_tests_and_fuses_are_known_before_anything_is_advertised() {
    let (_directory, root) = root();
    let why = refusal("ice:next,faults=bist-fail", Some(&root));
    assert_eq!((why.kind(), why.op()), (ErrorKind::EngineFailed, Op::Open));
    assert!(why.chain().contains("self test") && why.chain().contains("Etimedout"), "{}", why.chain());
    let why = refusal("ice:raw,faults=fuse-blown", None);
    assert!(why.chain().contains("fuses are blown"), "{}", why.chain());
    for text in ["ice:hwkm-v1", "ice:hwkm-v2", "ice:next"] {
        let engine = engine(&format!("{text},faults=hwkm-bist-fail"), Some(&root));
        assert_eq!(engine.capabilities().key_types, KeyTypes::RAW);
        assert!(engine.key_ladder().is_none() && engine.exclusive().is_none());
        engine.program(SlotIndex(0), &raw(1)).unwrap();
    }
}

#[test]
fn the_decision_is_taken_once_and_the_other_type_refused_from_then_on() {
    let (_directory, root) = root();
    for text in ["ice:hwkm-v1", "ice:hwkm-v2"] {
        for (key_type, other) in
            [(KeyType::Raw, KeyType::HardwareWrapped), (KeyType::HardwareWrapped, KeyType::Raw)]
        {
            let engine = engine(text, Some(&root));
            let key = |of| if of == KeyType::Raw { raw(1) } else { wrapped(&engine) };
            assert_eq!(engine.committed(), None);
            engine.commit(key_type).unwrap();
            assert_eq!(engine.controller.is_in_hwkm_mode(), key_type == KeyType::HardwareWrapped);
            assert_eq!(engine.control().driver.uses_hwkm(), key_type == KeyType::HardwareWrapped);
            engine.program(SlotIndex(0), &key(key_type)).unwrap();
            let why = engine.program(SlotIndex(0), &key(other)).unwrap_err();
            assert_eq!(why.kind(), ErrorKind::Unsupported);
            assert!(why.to_string().contains("restart it"), "{why}");
            assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
            assert_eq!(engine.commit(other).unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}

/// What the framework must never see, one level down: the driver and the firmware refuse by themselves.
#[test]
fn driver_and_secure_world_refuse_the_wrong_type_themselves() {
    let (_directory, root) = root();
    let engine = engine("ice:hwkm-v2", Some(&root));
    let key = wrapped(&engine);
    let program = |key: &Key| {
        let Control { driver, secure } = &mut *engine.control();
        driver.program(&engine.controller, secure, 0, key, || {}).map_err(|why| why.errno)
    };
    assert_eq!(program(&key), Err(Errno::Einval));
    engine.commit(KeyType::HardwareWrapped).unwrap();
    assert_eq!(program(&raw(1)), Err(Errno::Einval));
    let call = |index, key: &[u8], cipher, data_unit_512s| {
        let call = scm::ScmCall::ConfigSetIceKey { index, key, cipher, data_unit_512s };
        engine.control().secure.call(&engine.controller, &call).map(|_done| ())
    };
    let KeyForm::Wrapped(blob) = key.form() else { panic!("wrapped") };
    let blob = blob.as_bytes();
    assert_eq!(call(0, &raw_bytes(1), 3, 1), Err(scm::ScmError::Einval), "raw in HWKM mode");
    assert_eq!(call(1, blob, 3, 1), Err(scm::ScmError::Einval), "half a pair");
    assert_eq!(call(64, blob, 3, 1), Err(scm::ScmError::Einval), "no such pair");
    assert_eq!(call(0, blob, 4, 1), Err(scm::ScmError::Einval), "another cipher");
    assert_eq!(call(0, blob, 3, 3), Err(scm::ScmError::Einval), "two data units");
    assert_eq!(call(0, blob, 3, 256), Err(scm::ScmError::Einval), "too large a data unit");
    assert_eq!(call(62, blob, 3, 1), Ok(()));
    // Nothing reaches the slave's slots if the driver did not open its bank.
    engine.controller.writel(0, regs::ICE_REG_HWKM_BANK0_BBAC[2]);
    assert_eq!(call(62, blob, 3, 1), Err(scm::ScmError::Eio));
    engine.suspend().unwrap();
    engine.controller.power_on(1);
    engine.controller.writel(0, regs::ICE_REG_CONTROL);
    assert_eq!(program(&key), Err(Errno::Einval), "not initialised since");
}

#[test]
fn calls_are_there_one_by_one() {
    let (_directory, root) = root();
    let available = |engine: &IceEngine| -> Vec<u8> {
        let secure = &engine.control().secure;
        (0..=255).filter(|&number| secure.is_call_available(scm::SVC_ES, number)).collect()
    };
    assert_eq!(available(&engine("ice:raw", Some(&root))), [3, 4]);
    assert_eq!(available(&engine("ice:hwkm-v2", None)), [3, 4]);
    let full = engine("ice:hwkm-v2", Some(&root));
    assert_eq!(available(&full), [3, 4, 7, 8, 9, 10]);
    assert!(!full.control().secure.is_call_available(0x11, 3));
    let raw = engine("ice:raw", Some(&root));
    let call = scm::ScmCall::GenerateIceKey { room: 128 };
    let answer = raw.control().secure.call(&raw.controller, &call).map(|_blob| ());
    assert_eq!(answer, Err(scm::ScmError::Eopnotsupp));
    let short = scm::ScmCall::GenerateIceKey { room: 99 };
    let answer = full.control().secure.call(&full.controller, &short).map(|_blob| ());
    assert_eq!(answer, Err(scm::ScmError::Einval), "no room for the blob");
}

#[test]
fn a_failed_switch_poisons_the_engine_and_the_ladder_still_works() {
    let (_directory, root) = root();
    let engine = engine("ice:hwkm-v2,faults=commit-fail", Some(&root));
    let why = engine.commit(KeyType::HardwareWrapped).unwrap_err();
    assert_eq!(why.kind(), ErrorKind::EngineFailed);
    let is_clear = |why: Error| {
        assert_eq!(why.kind(), ErrorKind::EngineFailed);
        assert!(why.to_string().contains("until it is started again"), "{why}");
    };
    is_clear(engine.commit(KeyType::HardwareWrapped).unwrap_err());
    is_clear(engine.commit(KeyType::Raw).unwrap_err());
    is_clear(engine.program(SlotIndex(0), &raw(1)).unwrap_err());
    is_clear(engine.program(SlotIndex(0), &wrapped(&engine)).unwrap_err());
    is_clear(crypt(&engine, 0, Dun::ZERO, 512).unwrap_err());
    is_clear(engine.reset().unwrap_err());
    is_clear(engine.suspend().unwrap_err());
    is_clear(engine.resume().unwrap_err());
    assert_eq!(engine.committed(), None);
    engine.evict(Some(SlotIndex(0)), &raw(1)).unwrap();
    let blob = engine.prepare(&engine.generate().unwrap()).unwrap();
    engine.derive_software_secret(&blob).unwrap();
}

#[test]
fn blobs_have_the_documented_layouts() {
    let (_directory, root) = root();
    let v1 = engine("ice:hwkm-v1", Some(&root));
    let v2 = engine("ice:next", Some(&root));
    let long = v1.import(&RawKey::new(&MASTER)).unwrap();
    let short = v1.prepare(&long).unwrap();
    assert_eq!((long.as_bytes().len(), short.as_bytes().len()), (68, 68));
    assert_eq!(hex::encode(&long.as_bytes()[48..]), "241a015203000000010000000000000000000000");
    assert_eq!(hex::encode(&short.as_bytes()[48..]), "241a015203000000110000000000000000000000");
    assert_eq!(looks_like_wrapped_key(long.as_bytes()), Some(Form::LongTerm));
    assert_eq!(looks_like_wrapped_key(short.as_bytes()), Some(Form::Ephemeral));
    assert!(inspect(long.as_bytes()).is_err());

    let long = v2.import(&RawKey::new(&MASTER)).unwrap();
    let short = v2.prepare(&long).unwrap();
    assert_eq!((long.as_bytes().len(), short.as_bytes().len()), (100, 100));
    for (blob, form) in [(long.as_bytes(), Form::LongTerm), (short.as_bytes(), Form::Ephemeral)] {
        assert_eq!(looks_like_wrapped_key(blob), Some(form));
        let info = inspect(blob).unwrap();
        assert_eq!((info.version, info.form), (2, form));
        assert_eq!(info.wrapped_by == root.id(), form == Form::LongTerm);
        assert_eq!(hex::encode(&blob[80..88]), "241a015203000000");
    }
    assert_eq!(looks_like_wrapped_key(&[0x17; 68]), None);
}

/// Pins the formats: if this fails, keys stored by earlier versions no longer open.
#[test]
fn stored_keys_of_version_1_open_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("root");
    std::fs::write(&path, ROOT_FILE).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let root = Root::open_file(&path).unwrap();
    for (text, stored) in [("ice:hwkm-v1", STORED_V1), ("ice:hwkm-v2", STORED_V2)] {
        let engine = engine(text, Some(&root));
        let imported = engine.import(&RawKey::new(&MASTER)).unwrap();
        assert_eq!(hex::encode(imported.as_bytes()), stored, "{text}");
    }
}

/// A root file whose secret is 32 times 0x42, as `root.rs` documents it.
const ROOT_FILE: [u8; 64] = {
    let mut file = *b"inlinecrypt root\x01\0\0\0BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB............";
    let check = CHECK;
    let mut i = 0;
    while i < check.len() {
        file[52 + i] = check[i];
        i += 1;
    }
    file
};
const CHECK: [u8; 12] = [0x22, 0x4f, 0x39, 0xe7, 0x5c, 0xa5, 0x84, 0x22, 0x54, 0x39, 0x4a, 0xde];
/// Computed by another implementation (Python's `cryptography`: CMAC and AESSIV) from what the modules document.
const STORED_V1: &str = "97df8eda06c2cc31022db8f76be2bcab3dd164be2cbe8c55f8f013d2d33fd3c1ae7c9d18e45362d4cb741f533df6665c241a015203000000010000000000000000000000";
const STORED_V2: &str = "696e6c696e6563727970740002010000db4a16a1a80a4c9a0000000000000000856bc8482c6e77444a33124e8eacae749111\
    71133449c63d16813277b1e48c51cee8249c8c2eace2acff92143b53ac0e241a015203000000010000000000000000000000";

#[test]
fn foreign_stale_and_swapped_blobs_are_refused_with_a_reason() {
    let (_mine, mine) = root();
    let (_theirs, theirs) = root();
    for text in ["ice:hwkm-v1", "ice:next"] {
        let (here, there) = (engine(text, Some(&mine)), engine(text, Some(&theirs)));
        let again = engine(text, Some(&mine));
        let stored = here.import(&RawKey::new(&MASTER)).unwrap();
        let foreign = there.import(&RawKey::new(&MASTER)).unwrap();
        let stale = again.prepare(&stored).unwrap();
        let message = |result: Result<(), Error>| {
            let why = result.unwrap_err();
            assert_eq!(why.kind(), ErrorKind::KeyRejected);
            why.chain()
        };
        let prepare = |blob: &[u8]| message(here.prepare(&LongTermWrappedKey::new(blob)).map(|_blob| ()));
        let derive = |blob: &[u8]| {
            message(here.derive_software_secret(&EphemeralWrappedKey::new(blob)).map(|_secret| ()))
        };
        assert!(prepare(foreign.as_bytes()).contains(&mine.id().to_string()));
        assert!(derive(stale.as_bytes()).contains("prepare it again"));
        assert!(derive(stored.as_bytes()).contains("has to be prepared"));
        let good = here.prepare(&stored).unwrap();
        assert!(prepare(good.as_bytes()).contains("give the long-term one"));
        let len = stored.as_bytes().len();
        assert!(prepare(&stored.as_bytes()[1..]).contains(&format!("this engine's have {len}")));
        // Good ones still are, and no slot of passage keeps a key that would be in the way.
        here.derive_software_secret(&good).unwrap();
    }
}

#[test]
fn engines_with_one_root_are_one_chip_and_software_is_another() {
    let (_directory, root) = root();
    let (one, other) = (engine("ice:hwkm-v1", Some(&root)), engine("ice:hwkm-v1", Some(&root)));
    let stored = one.generate().unwrap();
    let secrets = [&one, &other]
        .map(|engine| *engine.derive_software_secret(&engine.prepare(&stored).unwrap()).unwrap().expose());
    assert_eq!(secrets[0], secrets[1]);
    let software = open(&EngineSpec::default(), Some(&root)).unwrap();
    let ladder = software.key_ladder().unwrap();
    let blob = ladder.generate().unwrap();
    assert_eq!(one.prepare(&blob).unwrap_err().kind(), ErrorKind::KeyRejected);
    assert_eq!(ladder.prepare(&stored).unwrap_err().kind(), ErrorKind::KeyRejected);
    // But the key is the same: import it in both, and both encrypt alike.
    for variant in KdfVariant::ALL {
        let ice = engine(&format!("ice:next,kdf={variant}"), Some(&root));
        ice.program(SlotIndex(3), &wrapped(&ice)).unwrap();
        let derived = inline_encryption_key(variant, &MASTER, Mode::Aes256Xts);
        assert_eq!(crypt(&ice, 3, Dun::ZERO, 1024).unwrap(), crate::ice::tests::software(&derived, 1024));
    }
}

#[test]
fn a_wrapped_key_cannot_smuggle_a_raw_one_in() {
    let (_directory, root) = root();
    let engine = engine("ice:next", Some(&root));
    let smuggled = key_of(KeyForm::Wrapped(EphemeralWrappedKey::new(&raw_bytes(1))), 512, 4);
    assert_eq!(engine.program(SlotIndex(0), &smuggled).unwrap_err().kind(), ErrorKind::KeyRejected);
    assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
}

#[test]
fn duns_and_configs_beyond_the_engine_are_refused() {
    let engine = engine("ice:raw,dun=4,units=512", None);
    engine.program(SlotIndex(0), &raw(1)).unwrap();
    let last = Dun::from(u64::from(u32::MAX));
    crypt(&engine, 0, last, 512).unwrap();
    assert_eq!(crypt(&engine, 0, last, 1024).unwrap_err().kind(), ErrorKind::Invalid);
    for bad in [
        key_of(KeyForm::Raw(RawKey::new(&raw_bytes(1))), 512, 8),
        key_of(KeyForm::Raw(RawKey::new(&raw_bytes(1))), 4096, 4),
    ] {
        engine.program(SlotIndex(0), &raw(1)).unwrap();
        assert_eq!(engine.program(SlotIndex(0), &bad).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
    }
}

#[test]
fn failing_programs_leave_the_keyslot_off_and_the_next_one_works() {
    let (_directory, root) = root();
    let engine = engine("ice:next,faults=program-fail-next:2", Some(&root));
    for _ in 0..2 {
        assert_eq!(engine.program(SlotIndex(0), &raw(1)).unwrap_err().kind(), ErrorKind::EngineFailed);
        assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
    }
    engine.program(SlotIndex(0), &raw(1)).unwrap();
    assert_eq!(crypt(&engine, 0, Dun::ZERO, 512).unwrap(), software(&raw_bytes(1), 512));
    engine.program(SlotIndex(0), &wrapped(&engine)).unwrap();
}

#[test]
fn half_programmed_keyslots_are_off_and_whole_again_after_the_next_program() {
    let engine = engine("ice:raw,faults=half-program:0.5,seed=1", None);
    let mut outcomes = [0; 2];
    for n in 0..100 {
        let wanted = software(&raw_bytes(n), 512);
        match engine.program(SlotIndex(0), &raw(n)) {
            Ok(()) => {
                outcomes[0] += 1;
                assert_eq!(crypt(&engine, 0, Dun::ZERO, 512).unwrap(), wanted);
            }
            Err(why) => {
                outcomes[1] += 1;
                assert_eq!(why.kind(), ErrorKind::EngineFailed);
                assert!(engine.controller.holds_key_words(0));
                assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
            }
        }
    }
    assert!(outcomes.iter().all(|count| *count > 20), "{outcomes:?}");
}

#[test]
fn a_failing_evict_leaves_the_keyslot_off_though_the_key_stays_in_the_hardware() {
    let engine = engine("ice:raw,faults=evict-fail", None);
    engine.program(SlotIndex(0), &raw(1)).unwrap();
    let why = engine.evict(Some(SlotIndex(0)), &raw(1)).unwrap_err();
    assert_eq!((why.kind(), why.op()), (ErrorKind::EngineFailed, Op::Evict));
    assert!(engine.controller.holds_key_words(0));
    assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
    engine.program(SlotIndex(0), &raw(2)).unwrap();
    assert_eq!(crypt(&engine, 0, Dun::ZERO, 512).unwrap(), software(&raw_bytes(2), 512));
}

#[test]
fn an_evicted_key_leaves_the_hardware() {
    let (_directory, root) = root();
    let engine = engine("ice:next", Some(&root));
    for key in [raw(1), wrapped(&engine)] {
        engine.program(SlotIndex(5), &key).unwrap();
        assert!(engine.controller.holds_key_words(5));
        engine.evict(Some(SlotIndex(5)), &key).unwrap();
        assert!(!engine.controller.holds_key_words(5));
    }
}

#[test]
fn lost_keyslots_answer_no_key_and_touch_nothing() {
    let always = engine("ice:raw,faults=lose-slot", None);
    always.program(SlotIndex(0), &raw(1)).unwrap();
    assert_eq!(kind(&always, 0), ErrorKind::NoKey);
    let engine = engine("ice:raw", None);
    engine.program(SlotIndex(0), &raw(1)).unwrap();
    engine.program(SlotIndex(1), &raw(2)).unwrap();
    engine.lose_slot(SlotIndex(0)).unwrap();
    assert_eq!(kind(&engine, 0), ErrorKind::NoKey);
    crypt(&engine, 1, Dun::ZERO, 512).unwrap();
    assert_eq!(engine.lose_slot(SlotIndex(32)).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn wrong_ciphertext_is_wrong_in_one_byte_and_verification_finds_it() {
    let (_directory, root) = root();
    let engine = engine("ice:next,faults=wrong-ciphertext", Some(&root));
    engine.program(SlotIndex(0), &raw(1)).unwrap();
    let (wrong, right) = (crypt(&engine, 0, Dun::ZERO, 1024).unwrap(), software(&raw_bytes(1), 1024));
    assert_eq!(wrong.iter().zip(&right).filter(|(a, b)| a != b).count(), 1);

    let spec: EngineSpec = "ice:next,faults=wrong-ciphertext,verify=all".parse().unwrap();
    let verified = open(&spec, Some(&root)).unwrap();
    let ladder = verified.key_ladder().unwrap();
    let blob = ladder.prepare(&ladder.import(&RawKey::new(&MASTER)).unwrap()).unwrap();
    verified.program(SlotIndex(7), &key_of(KeyForm::Wrapped(blob), 512, 4)).unwrap();
    for _ in 0..2 {
        let why = crypt(&*verified, 7, Dun::from(9), 512).unwrap_err();
        assert_eq!(why.kind(), ErrorKind::EngineFailed);
        assert!(why.to_string().contains("DUN 9 in keyslot 7"), "{why}");
    }
}

#[test]
fn wrapped_keys_are_compared_only_where_the_model_can_say_what_they_are() {
    let (_directory, root) = root();
    let engine = Arc::new(engine("ice:next", Some(&root)));
    let key = wrapped(&engine);
    let knowing = Verified::with_opener(engine.clone(), Sample::ALL, engine.clone());
    let ignorant = Verified::new(engine, Sample::ALL);
    for (verified, compared) in [(knowing, 1), (ignorant, 0)] {
        verified.program(SlotIndex(0), &key).unwrap();
        crypt(&verified, 0, Dun::ZERO, 512).unwrap();
        assert_eq!(verified.compared(), compared);
    }
}

#[test]
fn refused_blobs_are_ebadmsg_at_every_step() {
    let (_directory, root) = root();
    let engine = engine("ice:next,faults=refuse-blobs", Some(&root));
    let stored = engine.generate().unwrap();
    let why = engine.prepare(&stored).unwrap_err();
    assert_eq!((why.kind(), why.errno().raw()), (ErrorKind::KeyRejected, 74));
}

#[test]
fn programs_take_the_time_that_was_asked_for() {
    let engine = engine("ice:raw,program-latency=5ms,faults=slow/5ms", None);
    let start = Instant::now();
    engine.program(SlotIndex(0), &raw(1)).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(10));
    crypt(&engine, 0, Dun::ZERO, 512).unwrap();
}

#[test]
fn an_engine_that_does_not_come_back_says_so_until_it_is_started_again() {
    for suspend in [false, true] {
        let engine = engine("ice:raw,faults=resume-fail", None);
        engine.program(SlotIndex(0), &raw(1)).unwrap();
        let why = if suspend {
            engine.suspend().unwrap();
            engine.resume().unwrap_err()
        } else {
            engine.reset().unwrap_err()
        };
        assert_eq!(why.kind(), ErrorKind::EngineFailed);
        for why in [
            crypt(&engine, 0, Dun::ZERO, 512).unwrap_err(),
            engine.program(SlotIndex(0), &raw(1)).unwrap_err(),
            engine.reset().unwrap_err(),
        ] {
            assert_eq!(why.kind(), ErrorKind::EngineFailed);
            assert!(why.to_string().contains("did not come back"), "{why}");
        }
    }
}

#[test]
fn the_key_manager_is_initialised_again_after_reset_and_resume() {
    let (_directory, root) = root();
    for text in ["ice:hwkm-v1", "ice:hwkm-v2"] {
        let engine = engine(text, Some(&root));
        engine.commit(KeyType::HardwareWrapped).unwrap();
        let key = wrapped(&engine);
        for _ in 0..2 {
            engine.suspend().unwrap();
            assert!(!engine.controller.is_in_hwkm_mode() || !engine.controller.is_bank_open());
            assert_eq!(engine.generate().unwrap_err().kind(), ErrorKind::EngineFailed);
            engine.resume().unwrap();
            assert!(engine.controller.is_in_hwkm_mode() && engine.controller.is_bank_open());
            engine.program(SlotIndex(31), &key).unwrap();
            engine.reset().unwrap();
            assert!(engine.controller.is_in_hwkm_mode() && engine.controller.is_bank_open());
            engine.program(SlotIndex(31), &key).unwrap();
        }
    }
}

#[test]
fn debug_shows_state_and_no_key() {
    let (_directory, root) = root();
    let engine = engine("ice:hwkm-v2", Some(&root));
    engine.commit(KeyType::Raw).unwrap();
    engine.program(SlotIndex(0), &raw(0xb0)).unwrap();
    let shown = format!("{engine:?}");
    assert_eq!(shown, "IceEngine { spec: \"ice:hwkm-v2\", committed: Some(Raw), state: Running, .. }");
}

#[derive(Clone, Debug)]
enum Step {
    Program(u32, u8),
    Evict(u32),
    Crypt(u32),
    Reset,
    Lose(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3_u32, any::<u8>()).prop_map(|(slot, seed)| Step::Program(slot, seed)),
        1 => (0..3_u32).prop_map(Step::Evict),
        5 => (0..3_u32).prop_map(Step::Crypt),
        1 => Just(Step::Reset),
        1 => (0..3_u32).prop_map(Step::Lose),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever fails, however often: a request is served with the key of the last good program, or with none.
    #[test]
    fn bad_hardware_never_serves_another_key(steps in prop::collection::vec(step(), 1..60), seed in any::<u64>()) {
        let text = format!(
            "ice:raw,slots=3,seed={seed},faults=program-fail:0.2+half-program:0.2+evict-fail:0.5+lose-slot:0.1"
        );
        let engine = engine(&text, None);
        let mut keys: [Option<u8>; 3] = [None; 3];
        for step in steps {
            match step {
                Step::Program(slot, seed) => {
                    let good = engine.program(SlotIndex(slot), &raw(seed)).is_ok();
                    keys[usize::try_from(slot).unwrap()] = good.then_some(seed);
                }
                Step::Evict(slot) => {
                    let _ = engine.evict(Some(SlotIndex(slot)), &raw(0));
                    keys[usize::try_from(slot).unwrap()] = None;
                }
                Step::Reset => {
                    engine.reset().unwrap();
                    keys = [None; 3];
                }
                Step::Lose(slot) => {
                    engine.lose_slot(SlotIndex(slot)).unwrap();
                    keys[usize::try_from(slot).unwrap()] = None;
                }
                Step::Crypt(slot) => {
                    let key = &mut keys[usize::try_from(slot).unwrap()];
                    match (crypt(&engine, slot, Dun::ZERO, 512), *key) {
                        (Ok(data), Some(seed)) => prop_assert_eq!(data, software(&raw_bytes(seed), 512)),
                        (Ok(_), None) => prop_assert!(false, "an empty keyslot served"),
                        (Err(why), _) => {
                            prop_assert_eq!(why.kind(), ErrorKind::NoKey);
                            *key = None;
                        }
                    }
                }
            }
        }
    }

    /// The same seed and the same calls: the same faults.
    #[test]
    fn faults_replay(seed in any::<u64>()) {
        let run = || {
            let engine = engine(&format!("ice:raw,seed={seed},faults=program-fail:0.3+wrong-ciphertext:0.3"), None);
            (0..30)
                .map(|n| engine.program(SlotIndex(0), &raw(n)).is_ok().then(|| crypt(&engine, 0, Dun::ZERO, 512).unwrap()))
                .collect::<Vec<_>>()
        };
        prop_assert_eq!(run(), run());
    }
}
