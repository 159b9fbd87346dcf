//! What a bad host may say to an engine process: control messages and ring descriptors, good ones with something changed and
//! arbitrary ones. Nothing crashes; nothing but the named pieces changes, and with no other key than the named one. The same
//! bodies are fuzz targets (`fuzz/`).

use inlinecrypt_engine::Root;
use inlinecrypt_engine::isolated::fuzzing::{
    self, DATA_BYTES, FLOOR, KNOWN_HANDLE, Process, RawPiece, UNIT_BYTES, lane_order, program_order,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use std::cell::RefCell;

fn root() -> Root {
    let folder = tempfile::tempdir().unwrap();
    Root::create_file(folder.path().join("root")).unwrap()
}

/// A good message, cut and changed.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let changes = vec((any::<Index>(), any::<u8>()), 0..6);
    let good = (any::<Index>(), changes, any::<Index>(), any::<bool>());
    let changed = good.prop_map(|(which, changes, len, is_cut)| {
        let mut bytes = fuzzing::orders()[which.index(fuzzing::orders().len())].clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if is_cut {
            bytes.truncate(len.index(bytes.len()));
        }
        bytes
    });
    prop_oneof![4 => changed, 1 => vec(any::<u8>(), 0..200)]
}

/// Pieces that lie where they may, nearly so, or anywhere.
fn piece() -> impl Strategy<Value = RawPiece> {
    let (floor, end) = (FLOOR as u64, (FLOOR + DATA_BYTES) as u64);
    let unit = UNIT_BYTES as u64;
    let inside = (0..DATA_BYTES as u64 / unit, 0..48u64)
        .prop_map(move |(at, units)| (floor + at * unit, units.min(DATA_BYTES as u64 / unit - at) * unit));
    // A unit or two before and behind where it becomes wrong.
    let near = (
        prop::sample::select(vec![floor, end]),
        0..5u64,
        0..4u64,
        prop::sample::select(vec![0, 0, 0, 1, 16]),
    )
        .prop_map(move |(edge, from, units, more)| (edge + from * unit - 2 * unit + more, units * unit));
    let bytes = (floor - 8..end + 8, 0..5000u64);
    let edges =
        prop::sample::select(vec![0, 1, floor - 1, floor, end - unit, end, end + 1, u64::MAX, 1 << 63]);
    let place = prop_oneof![8 => inside, 3 => near, 1 => bytes, 1 => (edges.clone(), edges)];
    (place, any::<u64>()).prop_map(|((offset, len), first)| (offset, len, first))
}

fn order() -> impl Strategy<Value = Vec<u8>> {
    let count = prop_oneof![6 => Just(None), 1 => any::<u32>().prop_map(Some)];
    let key = prop_oneof![8 => 0..2u32, 1 => 2..4u32, 1 => any::<u32>()];
    let head = (prop_oneof![6 => 0..2u8, 1 => any::<u8>()], any::<bool>(), any::<bool>(), key, count);
    let good = (head, vec(piece(), 0..4)).prop_map(|((engine, is_slot, encrypt, key, count), pieces)| {
        let all = u32::try_from(pieces.len()).unwrap();
        lane_order(engine, is_slot, encrypt, key, count.unwrap_or(all), &pieces)
    });
    let handle = prop_oneof![3 => Just(KNOWN_HANDLE), 1 => 0..9u32];
    let program =
        (0..3u8, 0..5u32, handle).prop_map(|(engine, slot, handle)| program_order(engine, slot, handle));
    prop_oneof![9 => good, 2 => program, 1 => vec(any::<u8>(), 0..2000)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn no_message_breaks_the_control_thread(messages in vec(message(), 1..40)) {
        thread_local! { static ROOT: Root = root(); }
        let mut process = ROOT.with(|root| Process::new(Some(root)));
        for message in &messages {
            process.control(message);
            let _ = fuzzing::answer(message);
        }
    }

    #[test]
    fn no_descriptor_reaches_what_it_does_not_name(orders in vec(order(), 1..20)) {
        thread_local! { static PROCESS: RefCell<Process> = RefCell::new(Process::new(None)); }
        PROCESS.with_borrow_mut(|process| orders.iter().for_each(|order| process.lane(order)));
    }
}

/// The strategies above reach what they are for.
#[test]
fn good_orders_are_taken_and_done() {
    let root = root();
    let mut process = Process::new(Some(&root));
    assert!(fuzzing::orders().iter().all(|order| process.control(order)));
    let mut process = Process::new(None);
    // `lane` itself checks that the pieces have changed as they must.
    let all = [(FLOOR as u64, DATA_BYTES as u64, 7)];
    process.lane(&lane_order(0, true, true, 0, 1, &all));
    process.lane(&lane_order(0, true, false, 1, 1, &all));
    process.lane(&lane_order(1, false, true, 0, 1, &all));
    // The first keyslot gets the second key, as `lane` then expects.
    process.lane(&program_order(0, 0, KNOWN_HANDLE));
    process.lane(&lane_order(0, true, true, 0, 1, &all));
    // What is remembered for keyslots is good for nothing else.
    process.lane(&lane_order(0, false, false, KNOWN_HANDLE, 1, &all));
    process.lane(&lane_order(0, false, false, KNOWN_HANDLE, 0, &[]));
    // No such keyslot, handle, or engine with keyslots.
    for (engine, slot, handle) in [(0, 3, KNOWN_HANDLE), (0, 0, KNOWN_HANDLE + 1), (1, 0, 0), (2, 0, 0)] {
        process.lane(&program_order(engine, slot, handle));
    }
}
