use super::state::State;
use super::*;
use crate::admission::Fallback;
use crate::backing::{Backing, Durability};
use crate::config::{DataUnitSize, Hardware};
use crate::key::{Key, KeyForm, RawKey};
use crate::keyslot::Policy;
use crate::memory::MemoryPool;
use crate::testing::{FakeEngine, MemBacking};
use crate::volume::Discard;
use proptest::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// Six chunks and a bit, so that the last zone is a short one; a multiple of every data unit.
const SIZE: usize = 6 * CHUNK_BYTES + 65536;
const ZONE: u64 = 2 * CHUNK_BYTES as u64;

pub(super) fn profile() -> Arc<CryptoProfile> {
    let engine = Arc::new(FakeEngine::with_keyslots(2));
    Arc::new(CryptoProfile::new(engine, MemoryPool::new(LARGE_BUFFER_BYTES, 4), Policy::default()).unwrap())
}

/// How a side of a re-encryption lies on its backing, and by which key.
#[derive(Clone, Copy, Debug)]
struct Shape {
    mode: Mode,
    unit: u32,
    iv_offset: u64,
    key: u8,
}

impl Shape {
    fn volume(self, profile: &Arc<CryptoProfile>, backing: Arc<dyn Backing>) -> Volume {
        let unit = DataUnitSize::from_bytes(self.unit).unwrap();
        let layout = Layout::new(self.mode, unit, None, self.iv_offset, backing.facts().len_bytes).unwrap();
        let bytes: Vec<u8> =
            (0..u8::try_from(self.mode.info().key_bytes).unwrap()).map(|byte| byte ^ self.key).collect();
        let form = KeyForm::Raw(RawKey::new(&bytes));
        let key = Key::new(self.mode, unit, layout.dun_bytes(), form, Hardware::Allowed).unwrap();
        let admission = profile.admit(key, Fallback::Off).unwrap();
        Volume::new(layout, admission, backing, Access::ReadWrite, Discard::Pass).unwrap()
    }
}

fn read(disk: &dyn Disk, offset: usize, len: usize) -> Vec<u8> {
    let mut buffer = disk.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let mut data = Vec::new();
    while data.len() < len {
        let span = disk.span((offset + data.len()) as u64, (len - data.len()) as u64, LARGE_BUFFER_BYTES);
        disk.read(span, &mut buffer).unwrap();
        data.extend_from_slice(&buffer.bytes()[span.payload()]);
    }
    data
}

fn write(disk: &dyn Disk, offset: usize, data: &[u8]) {
    let mut buffer = disk.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let mut done = 0;
    while done < data.len() {
        let span = disk.span((offset + done) as u64, (data.len() - done) as u64, LARGE_BUFFER_BYTES);
        let len = span.payload().len();
        buffer.bytes_mut()[span.payload()].copy_from_slice(&data[done..done + len]);
        disk.write(span, &mut buffer, Durability::Cached).unwrap();
        done += len;
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        })
        .collect()
}

fn state_for(size: usize) -> State {
    let medium = MemBacking::new(usize::try_from(State::medium_bytes(ZONE)).unwrap(), 1);
    State::create(Arc::new(medium), size as u64, ZONE, b"plan").unwrap()
}

fn shapes() -> impl Strategy<Value = Shape> {
    let mode = prop_oneof![
        4 => Just(Mode::Aes256Xts),
        1 => Just(Mode::Aes128CbcEssiv),
        1 => Just(Mode::Adiantum),
        1 => Just(Mode::Sm4Xts),
    ];
    (mode, 9u32..=16, 0u64..3, any::<u8>()).prop_map(|(mode, log2, iv, key)| Shape {
        mode,
        unit: 1 << log2,
        iv_offset: iv * 128,
        key,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// From any layout to any other, with reads and writes between the zones, on one engine or two: the content is what
    /// was written, and what lies on the backing in the end is what the new key and layout alone would have put there.
    #[test]
    fn any_layout_becomes_any_other(
        old in shapes(), new in shapes(), two_engines: bool,
        steps in prop::collection::vec((any::<u32>(), 1usize..200_000, any::<bool>()), 8),
    ) {
        let backing = Arc::new(MemBacking::new(SIZE, 1));
        let first = profile();
        let second = if two_engines { profile() } else { first.clone() };
        let (old, new) = (old.volume(&first, backing.clone()), new.volume(&second, backing.clone()));
        let mut content = noise(7, SIZE);
        write(&old, 0, &content);
        let live = Arc::new(LiveVolume::new(old).for_clients_of(&new));
        let grain = match live.geometry().unaligned {
            Unaligned::Served => 1,
            Unaligned::Refused => live.geometry().logical_block_bytes as usize,
        };
        let new_shape = *new.layout();
        let mut running = live.begin(new, state_for(SIZE)).unwrap();
        let mut steps = steps.into_iter();
        loop {
            for (at, len, is_write) in steps.by_ref().take(2) {
                let at = at as usize % (SIZE / grain) * grain;
                let len = len.next_multiple_of(grain).min(SIZE - at);
                if is_write {
                    let data = noise(at as u64 ^ 99, len);
                    write(&*live, at, &data);
                    content[at..at + len].copy_from_slice(&data);
                }
                prop_assert!(read(&*live, at, len) == content[at..at + len]);
            }
            if running.step().unwrap().is_complete() {
                break;
            }
        }
        prop_assert!(live.becoming().is_some());
        let became = running.finish().unwrap();
        drop(running);
        prop_assert!(live.becoming().is_none() && *live.current().layout() == new_shape);
        prop_assert!(read(&*live, 0, SIZE) == content);
        // The known answer: the same content, encrypted directly.
        let expected = Arc::new(MemBacking::new(SIZE, 1));
        let twin = became.admission().profile().admit(became.admission().key().clone(), Fallback::Off).unwrap();
        let directly =
            Volume::new(new_shape, twin, expected.clone(), Access::ReadWrite, Discard::Pass).unwrap();
        write(&directly, 0, &content);
        prop_assert!(backing.content() == expected.content());
    }
}

/// Clients in other threads, each alone in its part, before, during and after: no request fails, and none is answered
/// with another key.
#[test]
fn clients_notice_nothing() {
    let shape = |unit, key| Shape { mode: Mode::Aes256Xts, unit, iv_offset: 0, key };
    for (old_unit, new_unit) in [(512, 4096), (4096, 512), (4096, 4096)] {
        let backing = Arc::new(MemBacking::new(SIZE, 1));
        let profile = profile();
        let live = Arc::new(LiveVolume::new(shape(old_unit, 1).volume(&profile, backing.clone())));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let (live, stop) = (&live, &stop);
                scope.spawn(move || {
                    // Interleaved, and at no multiple of anything, so that neighbours are in the same data units.
                    let places: Vec<usize> = (0..SIZE / 4000 - 4)
                        .filter(|place| place % 4 == thread)
                        .map(|place| place * 4000)
                        .collect();
                    let mut last = vec![None; places.len()];
                    let mut round = 0u64;
                    while !stop.load(Ordering::Relaxed) || round < 2000 {
                        round += 1;
                        let pick = usize::try_from(round * 7919).unwrap() % places.len();
                        if let Some(before) = last[pick].replace(round) {
                            assert!(read(&**live, places[pick], 4000) == noise(before, 4000), "{round}");
                        }
                        write(&**live, places[pick], &noise(round, 4000));
                    }
                });
            }
            for (key, unit) in [(2, new_unit), (3, old_unit), (4, new_unit)] {
                let new = shape(unit, key).volume(&profile, live.current().backing().clone());
                let mut running = live.begin(new, state_for(SIZE)).unwrap();
                while !running.step().unwrap().is_complete() {}
                running.finish().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        // The keys that were left behind are evicted.
        assert_eq!(profile.status().keys, 1);
    }
}

/// The boundary of pieces: none lies on both sides of a zone's border, whatever was asked for.
#[test]
fn pieces_do_not_cross_zones() {
    proptest!(|(offset in 0u64..1 << 40, len in 1u64..1 << 22, log2 in 9u32..=16, large: bool)| {
        let room = if large { LARGE_BUFFER_BYTES } else { crate::disk::SMALL_BUFFER_BYTES };
        let span = Span::cut(1 << log2, offset, len, room);
        let chunk = CHUNK_BYTES as u64;
        prop_assert_eq!(span.range().start / chunk, (span.range().end - 1) / chunk);
        // So it is one piece for every other data unit, too.
        for other in 9..=16 {
            prop_assert_eq!(span.recut(1 << other).range(), span.range());
        }
    });
}

#[test]
fn what_clients_could_not_bear_is_refused_and_leaves_the_volume_as_it_is() {
    let backing: Arc<dyn Backing> = Arc::new(MemBacking::new(SIZE, 1));
    let profile = profile();
    let shape = |mode, unit| Shape { mode, unit, iv_offset: 0, key: 1 };
    let xts = || shape(Mode::Aes256Xts, 4096).volume(&profile, backing.clone());
    let live = Arc::new(LiveVolume::new(xts()));
    let refused = |live: &Arc<LiveVolume>, new: Volume| live.begin(new, state_for(SIZE)).unwrap_err().chain();
    let adiantum = shape(Mode::Adiantum, 4096).volume(&profile, backing.clone());
    let said = refused(&live, adiantum);
    assert!(said.contains("cannot write less than 4096"), "{said}");
    let elsewhere = shape(Mode::Aes256Xts, 4096).volume(&profile, Arc::new(MemBacking::new(SIZE, 1)));
    assert!(refused(&live, elsewhere).contains("same backing"));
    let other_state = live.begin(xts(), state_for(SIZE / 2)).unwrap_err().chain();
    assert!(other_state.contains("another size"), "{other_state}");
    let running = live.begin(xts(), state_for(SIZE)).unwrap();
    assert!(refused(&live, xts()).contains("already"));
    assert!(running.finish().unwrap_err().chain().contains("not complete"));
    let small = Arc::new(MemBacking::new(CHUNK_BYTES + 512, 1));
    let (small, large) = (
        shape(Mode::Aes256Xts, 512).volume(&profile, small.clone()),
        shape(Mode::Aes256Xts, 4096).volume(&profile, small),
    );
    let said = check_layouts(small.layout(), large.layout()).unwrap_err().chain();
    assert!(said.contains("262656 bytes") && said.contains("262144"), "{said}");
}

/// A backing whose writes fail while it is told so.
#[derive(Debug)]
struct Failing {
    inner: MemBacking,
    fails: AtomicBool,
}

impl Backing for Failing {
    fn facts(&self) -> crate::backing::BackingFacts {
        self.inner.facts()
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.inner.read(offset, data)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Backing, Op::Write));
        }
        self.inner.write(offset, data, durability)
    }
    fn flush(&self) -> Result<(), Error> {
        self.inner.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.inner.discard(offset, len)
    }
    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.inner.extents(offset, len, extents_max)
    }
    fn prefetch(&self, _: u64, _: u64) {}
}

/// A state that cannot be written costs nobody anything; a volume that cannot costs its zone, until a later step succeeds.
#[test]
fn failures_hit_the_zone_alone_and_are_made_good_by_the_next_step() {
    let profile = profile();
    let shape = |key| Shape { mode: Mode::Aes256Xts, unit: 4096, iv_offset: 0, key };
    let failing = |len| Arc::new(Failing { inner: MemBacking::new(len, 1), fails: AtomicBool::new(false) });
    let (backing, medium) = (failing(SIZE), failing(usize::try_from(State::medium_bytes(ZONE)).unwrap()));
    let content = noise(3, SIZE);
    write(&shape(1).volume(&profile, backing.clone()), 0, &content);
    let live = Arc::new(LiveVolume::new(shape(1).volume(&profile, backing.clone())));
    let new = shape(2).volume(&profile, live.current().backing().clone());
    let state = State::create(medium.clone(), SIZE as u64, ZONE, b"").unwrap();
    let mut running = live.begin(new, state).unwrap();
    running.step().unwrap();

    medium.fails.store(true, Ordering::Relaxed);
    running.step().unwrap_err();
    assert!(read(&*live, 0, SIZE) == content, "the journal failed, and nobody notices");
    medium.fails.store(false, Ordering::Relaxed);
    backing.fails.store(true, Ordering::Relaxed);
    running.step().unwrap_err();
    let zone = usize::try_from(ZONE).unwrap();
    assert!(read(&*live, 0, zone) == content[..zone]);
    assert!(read(&*live, 2 * zone, SIZE - 2 * zone) == content[2 * zone..]);
    let mut buffer = live.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let span = live.span(ZONE + 4096, 100, LARGE_BUFFER_BYTES);
    let error = live.read(span, &mut buffer).unwrap_err();
    assert!(error.kind() == ErrorKind::Backing && error.chain().contains("being re-encrypted"), "{error}");
    backing.fails.store(false, Ordering::Relaxed);
    while !running.step().unwrap().is_complete() {}
    running.finish().unwrap();
    assert!(read(&*live, 0, SIZE) == content);
}

/// The same at a new start, when the backing still fails: all but the zone is served, and a later step completes it.
#[test]
fn a_zone_that_still_cannot_be_written_costs_nothing_but_itself() {
    let profile = profile();
    let shape = |key| Shape { mode: Mode::Aes256Xts, unit: 4096, iv_offset: 0, key };
    let backing = Arc::new(Failing { inner: MemBacking::new(SIZE, 1), fails: AtomicBool::new(false) });
    let medium = Arc::new(MemBacking::new(usize::try_from(State::medium_bytes(ZONE)).unwrap(), 1));
    let content = noise(3, SIZE);
    write(&shape(1).volume(&profile, backing.clone()), 0, &content);
    let start = |state| {
        let live = Arc::new(LiveVolume::new(shape(1).volume(&profile, backing.clone())));
        let new = shape(2).volume(&profile, live.current().backing().clone());
        let running = live.begin(new, state).unwrap();
        (live, running)
    };
    let (_, mut running) = start(State::create(medium.clone(), SIZE as u64, ZONE, b"").unwrap());
    running.step().unwrap();
    backing.fails.store(true, Ordering::Relaxed);
    running.step().unwrap_err();
    drop(running);
    let (live, mut running) = start(State::open(medium).unwrap());
    assert_eq!(running.unfinished().unwrap().kind(), ErrorKind::Backing);
    let zone = usize::try_from(ZONE).unwrap();
    assert!(read(&*live, 0, zone) == content[..zone]);
    assert!(read(&*live, 2 * zone, SIZE - 2 * zone) == content[2 * zone..]);
    let mut buffer = live.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    let span = live.span(2 * ZONE - 512, 512, LARGE_BUFFER_BYTES);
    assert_eq!(live.read(span, &mut buffer).unwrap_err().kind(), ErrorKind::Backing);
    running.step().unwrap_err();
    backing.fails.store(false, Ordering::Relaxed);
    while !running.step().unwrap().is_complete() {}
    running.finish().unwrap();
    assert!(read(&*live, 0, SIZE) == content);
}

/// A header that may be on the medium or not refers to a journal that is written once more: to the same bytes, since nobody could
/// change the zone meanwhile.
#[test]
fn a_failed_header_does_not_make_the_next_journal_look_damaged() {
    let profile = profile();
    let shape = |key| Shape { mode: Mode::Aes256Xts, unit: 4096, iv_offset: 0, key };
    let backing = Arc::new(MemBacking::new(SIZE, 1));
    let content = noise(3, SIZE);
    write(&shape(1).volume(&profile, backing.clone()), 0, &content);
    let live = Arc::new(LiveVolume::new(shape(1).volume(&profile, backing.clone())));
    let new = shape(2).volume(&profile, live.current().backing().clone());
    let medium = Arc::new(Telling {
        inner: MemBacking::new(usize::try_from(State::medium_bytes(ZONE)).unwrap(), 1),
        flushes_left: AtomicU64::new(u64::MAX),
        is_found_whole: AtomicBool::new(true),
        volume: backing,
    });
    let mut running =
        live.begin(new, State::create(medium.clone(), SIZE as u64, ZONE, b"").unwrap()).unwrap();
    // The journal's is done, the header's fails although the header is there.
    medium.flushes_left.store(1, Ordering::Relaxed);
    running.step().unwrap_err();
    let mut buffer = live.private_buffer(LARGE_BUFFER_BYTES).unwrap();
    assert!(live.read(live.span(0, 512, LARGE_BUFFER_BYTES), &mut buffer).is_err(), "nobody knows");
    medium.flushes_left.store(u64::MAX, Ordering::Relaxed);
    while !running.step().unwrap().is_complete() {}
    running.finish().unwrap();
    assert!(
        medium.is_found_whole.load(Ordering::Relaxed),
        "a kill at some moment would have left it damaged"
    );
    assert!(read(&*live, 0, SIZE) == content);
}

/// A medium that fails flushes as told, and looks at each write whether a state that is opened now could be recovered.
#[derive(Debug)]
struct Telling {
    inner: MemBacking,
    flushes_left: AtomicU64,
    is_found_whole: AtomicBool,
    volume: Arc<MemBacking>,
}

impl Telling {
    fn look(&self) {
        let copy = |of: &MemBacking| {
            let content = of.content();
            let copy = MemBacking::new(content.len(), 1);
            copy.write(0, &content, Durability::Cached).unwrap();
            copy
        };
        // Before its first header it is none.
        if let Ok(mut state) = State::open(Arc::new(copy(&self.inner)))
            && state.recover(&copy(&self.volume)).is_err()
        {
            self.is_found_whole.store(false, Ordering::Relaxed);
        }
    }
}

impl Backing for Telling {
    fn facts(&self) -> crate::backing::BackingFacts {
        self.inner.facts()
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.inner.read(offset, data)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.inner.write(offset, data, durability)?;
        self.look();
        Ok(())
    }
    fn flush(&self) -> Result<(), Error> {
        let less = |left: u64| left.checked_sub(1);
        let taken = self.flushes_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.map(drop).map_err(|_none_left| Error::new(ErrorKind::FlushLost, Op::Flush))
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.inner.discard(offset, len)
    }
    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        self.inner.extents(offset, len, extents_max)
    }
    fn prefetch(&self, _: u64, _: u64) {}
}

/// Trims on both sides and over the boundary keep to the data units of the side.
#[test]
fn trims_give_back_on_both_sides() {
    let profile = profile();
    let shape = |unit, key| Shape { mode: Mode::Aes256Xts, unit, iv_offset: 0, key };
    let backing = Arc::new(MemBacking::new(SIZE, 1));
    let live = Arc::new(LiveVolume::new(shape(4096, 1).volume(&profile, backing.clone())));
    write(&*live, 0, &vec![1; SIZE]);
    let new = shape(512, 2).volume(&profile, live.current().backing().clone());
    let mut running = live.begin(new, state_for(SIZE)).unwrap();
    running.step().unwrap();
    let border = usize::try_from(ZONE).unwrap();
    let before = backing.content();
    live.trim(ZONE - 5000, 10_000).unwrap();
    let after = backing.content();
    let changed: Vec<usize> = (0..SIZE).filter(|at| before[*at] != after[*at]).collect();
    // Whole units of 512 below the border, of 4096 behind it.
    assert!(changed.iter().all(|at| (border - 4608..border + 4096).contains(at)));
    assert!(after[border - 4608..border + 4096].iter().all(|byte| *byte == 0));
}

/// Holes that are kept stay holes; everything else is moved.
#[test]
fn kept_holes_are_not_written() {
    /// Says that all but its second zone is a hole, and remembers what was written.
    #[derive(Debug)]
    struct Sparse(MemBacking, Mutex<Vec<u64>>);
    impl Backing for Sparse {
        fn facts(&self) -> crate::backing::BackingFacts {
            self.0.facts()
        }
        fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
            self.0.read(offset, data)
        }
        fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
            self.1.lock().unwrap().push(offset / ZONE);
            self.0.write(offset, data, durability)
        }
        fn flush(&self) -> Result<(), Error> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
            Ok(())
        }
        fn extents(&self, offset: u64, len: u64, _: usize) -> Result<Vec<Extent>, Error> {
            Ok(vec![Extent { offset, len, allocated: offset / ZONE == 1 }])
        }
        fn prefetch(&self, _: u64, _: u64) {}
    }
    let profile = profile();
    let shape = |key| Shape { mode: Mode::Aes256Xts, unit: 4096, iv_offset: 0, key };
    for (holes, zones) in [(Holes::Kept, vec![1]), (Holes::Rewritten, vec![0, 1, 2, 3])] {
        let backing = Arc::new(Sparse(MemBacking::new(SIZE, 1), Mutex::default()));
        let live = Arc::new(LiveVolume::new(shape(1).volume(&profile, backing.clone())));
        let new = shape(2).volume(&profile, live.current().backing().clone());
        let mut running = live.begin(new, state_for(SIZE)).unwrap().with_holes(holes);
        while !running.step().unwrap().is_complete() {}
        let mut written = backing.1.lock().unwrap().clone();
        written.dedup();
        assert_eq!(written, zones);
    }
}
