use super::*;
use crate::admission::Fallback;
use crate::backing::Durability;
use crate::batch::Transfer;
use crate::caps::{Capabilities, KeyTypes, UnitMask};
use crate::config::Hardware;
use crate::disk::{LARGE_BUFFER_BYTES, SIZE_BYTES_MAX, SMALL_BUFFER_BYTES, Zeroing};
use crate::engine::Engine;
use crate::key::{Key, KeyForm, RawKey};
use crate::keyslot::Policy;
use crate::memory::MemoryPool;
use crate::profile::CryptoProfile;
use crate::testing::{FakeEngine, MemBacking};
use proptest::prelude::*;

pub(crate) const SIZE: usize = 1 << 20;

fn raw_key(mode: Mode) -> Vec<u8> {
    (0..u8::try_from(mode.info().key_bytes).unwrap()).collect()
}

fn profile(engine: Arc<dyn Engine>) -> Arc<CryptoProfile> {
    let pool = MemoryPool::new(LARGE_BUFFER_BYTES, 2);
    Arc::new(CryptoProfile::new(engine, pool, Policy::default()).unwrap())
}

fn volume_on(
    profile: &Arc<CryptoProfile>,
    mode: Mode,
    unit: u32,
    block: Option<u32>,
    backing: Arc<dyn Backing>,
) -> Result<Volume, Error> {
    let unit = DataUnitSize::from_bytes(unit).unwrap();
    volume_of(profile, Layout::new(mode, unit, block, 0, backing.facts().len_bytes)?, backing)
}

fn volume_of(
    profile: &Arc<CryptoProfile>,
    layout: Layout,
    backing: Arc<dyn Backing>,
) -> Result<Volume, Error> {
    let form = KeyForm::Raw(RawKey::new(&raw_key(layout.mode())));
    let (unit, dun_bytes) = (layout.data_unit_size(), layout.dun_bytes());
    let key = Key::new(layout.mode(), unit, dun_bytes, form, Hardware::Allowed)?;
    let admission = profile.admit(key, Fallback::Off)?;
    Volume::new(layout, admission, backing, Access::ReadWrite, Discard::Pass)
}

fn volume(mode: Mode, unit: u32, block: Option<u32>, align: u32) -> (Volume, Arc<MemBacking>) {
    let backing = Arc::new(MemBacking::new(SIZE, align));
    let profile = profile(Arc::new(FakeEngine::with_keyslots(2)));
    (volume_on(&profile, mode, unit, block, backing.clone()).unwrap(), backing)
}

pub(crate) fn write(volume: &dyn Disk, offset: u64, data: &[u8], buffer: &mut Buffer) -> Result<(), Error> {
    let mut done = 0;
    while done < data.len() {
        let span = volume.span(offset + done as u64, (data.len() - done) as u64, buffer.bytes().len());
        buffer.bytes_mut()[span.payload()].copy_from_slice(&data[done..done + span.len]);
        volume.write(span, buffer, Durability::Cached)?;
        done += span.len;
    }
    Ok(())
}

pub(crate) fn read(
    volume: &dyn Disk,
    offset: u64,
    len: usize,
    buffer: &mut Buffer,
) -> Result<Vec<u8>, Error> {
    let mut data = Vec::new();
    while data.len() < len {
        let span = volume.span(offset + data.len() as u64, (len - data.len()) as u64, buffer.bytes().len());
        volume.read(span, buffer)?;
        data.extend_from_slice(&buffer.bytes()[span.payload()]);
    }
    Ok(data)
}

pub(crate) fn buffers(volume: &dyn Disk) -> [Buffer; 2] {
    [volume.try_large_buffer().unwrap(), volume.private_buffer(SMALL_BUFFER_BYTES).unwrap()]
}

/// What is on the disk, decrypted by the cipher alone: dm-crypt's layout, and nobody's code of ours but the cipher's.
fn decrypted(mode: Mode, unit: usize, backing: &MemBacking) -> Vec<u8> {
    let mut content = backing.content();
    mode.info().expand(&raw_key(mode)).unwrap().decrypt(Dun::ZERO, unit, &mut content);
    content
}

/// The same with each data unit's IV put together by hand: `iv` makes it of the number of its first sector.
fn decrypted_by(mode: Mode, unit: usize, backing: &MemBacking, iv: impl Fn(u64) -> [u8; 16]) -> Vec<u8> {
    let mut content = backing.content();
    let cipher = mode.info().expand(&raw_key(mode)).unwrap();
    for (n, data) in content.chunks_mut(unit).enumerate() {
        let iv = iv((n * unit / 512) as u64);
        let [low, high] = [0, 8].map(|at| u64::from_le_bytes(iv[at..at + 8].try_into().unwrap()));
        cipher.decrypt(Dun::from_limbs([low, high, 0, 0]), unit, data);
    }
    content
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write { offset: usize, len: usize, seed: u8 },
    Zero { offset: usize, len: usize },
    Read { offset: usize, len: usize },
    Small(bool),
}

pub(crate) fn step(block: usize) -> impl Strategy<Value = Step> {
    let range = move || {
        (0..SIZE / block, 1..300_000usize).prop_map(move |(start, len)| {
            let start = start * block;
            (start, len.next_multiple_of(block).min(SIZE - start))
        })
    };
    prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((offset, len), seed)| Step::Write { offset, len, seed }),
        1 => range().prop_map(|(offset, len)| Step::Zero { offset, len }),
        3 => range().prop_map(|(offset, len)| Step::Read { offset, len }),
        1 => any::<bool>().prop_map(Step::Small),
    ]
}

fn run(mode: Mode, unit: u32, block: Option<u32>, align: u32, steps: Vec<Step>) {
    let (volume, backing) = volume(mode, unit, block, align);
    run_on(&volume, &backing, &|backing| decrypted(mode, unit as usize, backing), steps);
}

pub(crate) fn run_on(
    volume: &dyn Disk,
    backing: &MemBacking,
    decrypted: &dyn Fn(&MemBacking) -> Vec<u8>,
    steps: Vec<Step>,
) {
    let mut buffers = buffers(volume);
    let mut which = 0;
    // A fresh volume holds noise: what zeroes decrypt to.
    let mut oracle = decrypted(backing);
    for step in steps {
        let buffer = &mut buffers[which];
        match step {
            Step::Write { offset, len, seed } => {
                let data: Vec<u8> = (0..len).map(|i| (i / 7).to_le_bytes()[0] ^ seed).collect();
                write(volume, offset as u64, &data, buffer).unwrap();
                oracle[offset..offset + len].copy_from_slice(&data);
            }
            Step::Zero { offset, len } => {
                let any = Zeroing::AnySpeed;
                volume.write_zeroes(offset as u64, len as u64, any, Durability::Cached, buffer).unwrap();
                oracle[offset..offset + len].fill(0);
            }
            Step::Read { offset, len } => {
                assert!(read(volume, offset as u64, len, buffer).unwrap() == oracle[offset..offset + len]);
            }
            Step::Small(small) => which = usize::from(small),
        }
    }
    assert!(decrypted(backing) == oracle, "the disk holds what dm-crypt would have written");
}

/// Does reads and writes (true) of a length at an offset in batches, in order, and checks what is read. What the disk holds
/// afterwards, if it held `oracle` before.
pub(crate) fn run_batches(
    volume: &dyn Disk,
    mut oracle: Vec<u8>,
    small: bool,
    pieces: Vec<(bool, usize, usize, u8)>,
) -> Vec<u8> {
    let buffer = &mut buffers(volume)[usize::from(small)];
    let (mut batch, mut seeds) = (Batch::default(), Vec::new());
    let mut todo = pieces.into_iter().peekable();
    while let Some(&(writes, offset, len, seed)) = todo.peek() {
        let span = volume.span(offset as u64, len.min(SIZE - offset) as u64, SMALL_BUFFER_BYTES);
        let transfer = if writes { Transfer::Write(Durability::Cached) } else { Transfer::Read };
        if let Some(place) = batch.push(span, transfer, buffer.bytes().len()) {
            if writes {
                buffer.bytes_mut()[place].fill(seed);
            }
            seeds.push(seed);
            todo.next();
            if todo.peek().is_some() {
                continue;
            }
        }
        assert!(!batch.is_empty());
        volume.transfer(&mut batch, buffer);
        for (item, seed) in batch.items().iter().zip(&seeds) {
            item.result().as_ref().unwrap();
            let start = usize::try_from(item.span().offset()).unwrap();
            let known = &mut oracle[start..start + item.span().len];
            match item.transfer() {
                Transfer::Read => assert!(buffer.bytes()[item.payload()] == *known),
                Transfer::Write(_) => known.fill(*seed),
            }
        }
        batch.clear();
        seeds.clear();
    }
    oracle
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any bytes at any offset, in any mode that allows it: equal to an array, and dm-crypt's bytes on the disk.
    #[test]
    fn xts_volumes_are_byte_arrays(
        unit in 9u32..=16, align in 0u32..=12, steps in proptest::collection::vec(step(1), 1..20)
    ) {
        let align = 1 << align.min(unit);
        run(Mode::Aes256Xts, 1 << unit, None, align, steps);
    }

    /// The same with many pieces at once.
    #[test]
    fn batches_leave_what_their_pieces_would_one_after_the_other(
        unit in 9u32..=16,
        align in 0u32..=12,
        small in any::<bool>(),
        pieces in proptest::collection::vec((any::<bool>(), 0..SIZE, 1..9000usize, any::<u8>()), 1..80),
    ) {
        let align = 1 << align.min(unit);
        let (volume, backing) = volume(Mode::Aes256Xts, 1 << unit, None, align);
        let oracle = decrypted(Mode::Aes256Xts, 1 << unit, &backing);
        let oracle = run_batches(&volume, oracle, small, pieces);
        prop_assert!(decrypted(Mode::Aes256Xts, 1 << unit, &backing) == oracle);
    }

    /// Other IV layouts: what dm-crypt has without iv_large_sectors, and what SPDK has.
    #[test]
    fn volumes_of_other_iv_layouts_are_byte_arrays(
        upper in any::<bool>(), unit in 9u32..=16, offset_units in 0u64..1 << 40,
        steps in proptest::collection::vec(step(1), 1..20)
    ) {
        let iv = if upper { IvLayout::UpperHalf } else { IvLayout::Sectors };
        let offset = offset_units << (unit - 9);
        let size = DataUnitSize::from_bytes(1 << unit).unwrap();
        let layout = Layout::new(Mode::Aes256Xts, size, None, offset, SIZE as u64).unwrap().with_iv(iv).unwrap();
        let backing = Arc::new(MemBacking::new(SIZE, 1));
        let volume = volume_of(&profile(Arc::new(FakeEngine::with_keyslots(2))), layout, backing.clone()).unwrap();
        let by_hand = |sector: u64| {
            let mut iv = [0; 16];
            if upper {
                iv[8..].copy_from_slice(&((offset + sector) / (1 << (unit - 9))).to_le_bytes());
            } else {
                iv[..8].copy_from_slice(&(offset + sector).to_le_bytes());
            }
            iv
        };
        run_on(&volume, &backing, &|backing| decrypted_by(Mode::Aes256Xts, 1 << unit, backing, by_hand), steps);
    }

    #[test]
    fn volumes_of_other_modes_are_arrays_of_blocks(
        which in 0usize..3, steps in proptest::collection::vec(step(4096), 1..10)
    ) {
        let mode = [Mode::Aes128CbcEssiv, Mode::Adiantum, Mode::Sm4Xts][which];
        run(mode, 4096, Some(4096), 512, steps);
    }
}

#[test]
fn rewriting_a_sector_leaves_the_bytes_of_its_neighbours_on_the_disk() {
    let (volume, backing) = volume(Mode::Aes256Xts, 4096, Some(512), 1);
    let [mut buffer, _] = buffers(&volume);
    write(&volume, 0, &[1; 8192], &mut buffer).unwrap();
    let before = backing.content();
    write(&volume, 1024, &[2; 512], &mut buffer).unwrap();
    let after = backing.content();
    for (n, (old, new)) in before.chunks(512).zip(after.chunks(512)).enumerate() {
        assert_eq!(old == new, n != 2, "sector {n}");
    }
}

#[test]
fn small_blocks_are_refused_where_a_torn_write_would_damage_neighbours() {
    let unit = DataUnitSize::DEFAULT;
    for mode in [Mode::Aes128CbcEssiv, Mode::Adiantum] {
        let error = Layout::new(mode, unit, Some(512), 0, 1 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains("would damage blocks that were not written"), "{}", error.chain());
        let (volume, _) = volume(mode, 4096, None, 512);
        assert_eq!(volume.geometry().logical_block_bytes, 4096);
        assert_eq!(volume.geometry().unaligned, Unaligned::Refused);
        let misaligned = volume.check(512, 4096, Access::ReadWrite).unwrap_err();
        assert_eq!(misaligned.kind(), ErrorKind::Misaligned);
    }
}

#[test]
fn a_partly_used_backing_loses_its_tail_only() {
    let layout = Layout::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, None, 0, 4096 * 3 + 512).unwrap();
    assert_eq!(layout.size_bytes(), 4096 * 3);
    for bytes in [4095, SIZE_BYTES_MAX + 4096, u64::MAX] {
        let none = Layout::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, None, 0, bytes).unwrap_err();
        assert_eq!(none.kind(), ErrorKind::Invalid);
    }
    let longest = Layout::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, None, 0, SIZE_BYTES_MAX).unwrap();
    assert_eq!(longest.size_bytes(), SIZE_BYTES_MAX);
}

#[test]
fn iv_offsets_count_sectors_and_never_overflow() {
    let layout = |offset| Layout::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, None, offset, 8192);
    assert_eq!(layout(0).unwrap().dun_bytes(), 1);
    assert_eq!(layout(34_359_738_360).unwrap().dun_at(4096), Dun::from(1 << 32));
    assert_eq!(layout(34_359_738_360).unwrap().dun_bytes(), 5);
    assert_eq!(layout(u64::MAX - 15).unwrap().size_bytes(), 8192);
    assert_eq!(layout(u64::MAX - 7).unwrap_err().kind(), ErrorKind::Invalid);
    // Half a data unit would be rounded away without a word.
    assert_eq!(layout(4).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn other_iv_layouts_need_as_many_dun_bytes_as_they_use() {
    let layout = |iv| {
        Layout::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, None, 0, 256 * 4096).unwrap().with_iv(iv).unwrap()
    };
    assert_eq!(layout(IvLayout::DataUnits).dun_bytes(), 1);
    assert_eq!(layout(IvLayout::Sectors).dun_bytes(), 2);
    assert_eq!(layout(IvLayout::UpperHalf).dun_bytes(), 9);
    // One thing has one name.
    let small = Layout::new(Mode::Aes256Xts, DataUnitSize::MIN_SERVED, None, 0, 4096).unwrap();
    assert_eq!(small.with_iv(IvLayout::Sectors).unwrap(), small);
    for mode in [Mode::Aes128CbcEssiv, Mode::Adiantum] {
        let layout = Layout::new(mode, DataUnitSize::DEFAULT, None, 0, 8192).unwrap();
        assert_eq!(layout.with_iv(IvLayout::UpperHalf).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(layout.with_iv(IvLayout::Sectors).unwrap().dun_at(4096), Dun::from(8));
    }
    for iv in IvLayout::ALL {
        assert_eq!(IvLayout::from_name(&iv.to_string()), Some(iv));
    }
}

#[test]
fn requests_past_the_end_are_refused_with_the_right_error() {
    let (volume, _) = volume(Mode::Aes256Xts, 4096, None, 1);
    let size = SIZE as u64;
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (0, u64::MAX)] {
        let kind = |access| volume.check(offset, len, access).unwrap_err().kind();
        assert_eq!(kind(Access::ReadOnly), ErrorKind::OutOfRange);
        assert_eq!(kind(Access::ReadWrite), ErrorKind::PastEnd);
    }
    assert!(volume.check(size, 0, Access::ReadOnly).is_ok());
}

#[test]
fn a_lost_keyslot_is_programmed_again_without_an_error() {
    let engine = Arc::new(FakeEngine::with_keyslots(1));
    let profile = profile(engine.clone());
    let backing = Arc::new(MemBacking::new(SIZE, 1));
    let volume = volume_on(&profile, Mode::Aes256Xts, 4096, None, backing).unwrap();
    let [mut buffer, _] = buffers(&volume);
    write(&volume, 0, &[7; 4096], &mut buffer).unwrap();
    engine.lose_keyslots();
    assert_eq!(read(&volume, 0, 4096, &mut buffer).unwrap(), [7; 4096]);
    engine.lose_keyslots();
    profile.reset().unwrap();
    assert_eq!(read(&volume, 0, 4096, &mut buffer).unwrap(), [7; 4096]);
}

#[test]
fn what_was_being_decrypted_when_the_engine_ended_is_read_again() {
    for engine in [FakeEngine::with_keyslots(1), FakeEngine::with_keyslots(1).on_the_way_to_the_disk()] {
        let engine = Arc::new(engine);
        let backing = Arc::new(MemBacking::new(SIZE, 1));
        let volume =
            volume_on(&profile(engine.clone()), Mode::Aes256Xts, 4096, None, backing.clone()).unwrap();
        let [mut buffer, _] = buffers(&volume);
        write(&volume, 0, &[7; 100_000], &mut buffer).unwrap();
        engine.interrupt_decryptions(2);
        assert_eq!(read(&volume, 0, 100_000, &mut buffer).unwrap(), [7; 100_000]);
        // The rest of a data unit that is written in part.
        engine.interrupt_decryptions(3);
        write(&volume, 5000, &[8; 20_000], &mut buffer).unwrap();
        let mut batch = batch_of_six(&volume);
        engine.interrupt_decryptions(1);
        volume.transfer(&mut batch, &mut buffer);
        assert!(batch.items().iter().all(|item| item.result().is_ok()));
        assert_eq!(buffer.bytes()[batch.items()[0].payload()][..4096], [7; 4096]);
        let decrypted = decrypted(Mode::Aes256Xts, 4096, &backing);
        assert!(decrypted[..5000].iter().all(|byte| *byte == 7));
        assert!(decrypted[5000..16_384].iter().all(|byte| *byte == 8));
        // Not for ever.
        engine.interrupt_decryptions(u32::MAX);
        assert_eq!(read(&volume, 0, 4096, &mut buffer).unwrap_err().kind(), ErrorKind::Interrupted);
        engine.interrupt_decryptions(0);
        assert_eq!(read(&volume, 0, 4096, &mut buffer).unwrap(), [7; 4096]);
    }
}

#[test]
fn a_failed_program_is_an_error_to_this_request_and_no_other() {
    let engine = Arc::new(FakeEngine::with_keyslots(1));
    let profile = profile(engine.clone());
    let volume =
        volume_on(&profile, Mode::Aes256Xts, 4096, None, Arc::new(MemBacking::new(SIZE, 1))).unwrap();
    let [mut buffer, _] = buffers(&volume);
    engine.fail_programs(1);
    assert!(write(&volume, 0, &[7; 4096], &mut buffer).is_ok(), "tried again");
    drop(volume);
    let volume =
        volume_on(&profile, Mode::Aes256Xts, 4096, None, Arc::new(MemBacking::new(SIZE, 1))).unwrap();
    engine.fail_programs(2);
    let error = write(&volume, 0, &[7; 4096], &mut buffer).unwrap_err();
    assert_eq!(error.chain(), "program keyslot: the engine failed: told to fail");
    assert!(write(&volume, 0, &[7; 4096], &mut buffer).is_ok());
}

/// Three reads and three writes of 4 KiB each, at multiples of 16 KiB.
fn batch_of_six(volume: &Volume) -> Batch {
    let mut batch = Batch::default();
    for index in 0..6 {
        let span = volume.span(index * 16_384, 4096, SMALL_BUFFER_BYTES);
        let transfer = if index % 2 == 0 { Transfer::Read } else { Transfer::Write(Durability::Cached) };
        batch.push(span, transfer, SMALL_BUFFER_BYTES).unwrap();
    }
    batch
}

#[test]
fn a_batch_goes_to_the_engine_once_each_way() {
    let engine = Arc::new(FakeEngine::with_keyslots(1));
    let backing = Arc::new(MemBacking::new(SIZE, 1));
    let volume = volume_on(&profile(engine.clone()), Mode::Aes256Xts, 4096, None, backing).unwrap();
    let mut batch = batch_of_six(&volume);
    volume.transfer(&mut batch, &mut buffers(&volume)[0]);
    assert!(batch.items().iter().all(|item| item.result().is_ok()));
    assert_eq!(engine.crypts(), 2);
}

#[test]
fn a_piece_that_cannot_be_done_fails_alone() {
    /// Its second 64 KiB cannot be read, its third not be written.
    #[derive(Debug)]
    struct Scratched(MemBacking);

    impl Backing for Scratched {
        fn facts(&self) -> crate::backing::BackingFacts {
            self.0.facts()
        }

        fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
            match offset >> 16 {
                1 => Err(Error::new(ErrorKind::Backing, Op::Read)),
                _ => self.0.read(offset, data),
            }
        }

        fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
            match offset >> 16 {
                2 => Err(Error::new(ErrorKind::NoSpace, Op::Write)),
                _ => self.0.write(offset, data, durability),
            }
        }

        fn flush(&self) -> Result<(), Error> {
            self.0.flush()
        }

        fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
            self.0.discard(offset, len)
        }

        fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
            self.0.extents(offset, len, extents_max)
        }

        fn prefetch(&self, offset: u64, len: u64) {
            self.0.prefetch(offset, len);
        }
    }

    let profile = profile(Arc::new(FakeEngine::with_keyslots(1)));
    let backing = Arc::new(Scratched(MemBacking::new(SIZE, 1)));
    let volume = volume_on(&profile, Mode::Aes256Xts, 4096, None, backing).unwrap();
    let buffer = &mut buffers(&volume)[0];
    let write = Transfer::Write(Durability::Cached);
    let mut batch = Batch::default();
    let pieces = [
        (0, 4096, Transfer::Read, None),
        (65_536, 4096, Transfer::Read, Some(ErrorKind::Backing)),
        // Begins inside a data unit, the rest of which would have to be read.
        (65_536 + 8192 + 1, 512, write, Some(ErrorKind::Backing)),
        (65_536 + 16_384, 4096, write, None),
        (131_072, 4096, write, Some(ErrorKind::NoSpace)),
        (131_072 + 4096, 4096, Transfer::Read, None),
        (SIZE as u64, 4096, write, Some(ErrorKind::PastEnd)),
        (196_608, 4096, write, None),
    ];
    for (offset, len, transfer, _) in pieces {
        let span = Span::cut(4096, offset, len, SMALL_BUFFER_BYTES);
        let place = batch.push(span, transfer, buffer.bytes().len()).unwrap();
        buffer.bytes_mut()[place].fill(7);
    }
    volume.transfer(&mut batch, buffer);
    let results = batch.items().iter().map(|item| item.result().as_ref().err().map(Error::kind));
    assert_eq!(results.collect::<Vec<_>>(), pieces.map(|(.., kind)| kind));
    assert_eq!(read(&volume, 196_608, 4096, buffer).unwrap(), [7; 4096]);
}

#[test]
fn dropping_the_volume_evicts_its_key() {
    let profile = profile(Arc::new(FakeEngine::with_keyslots(2)));
    let volume =
        volume_on(&profile, Mode::Aes256Xts, 4096, None, Arc::new(MemBacking::new(SIZE, 1))).unwrap();
    let [mut buffer, _] = buffers(&volume);
    write(&volume, 0, &[7; 4096], &mut buffer).unwrap();
    let held = |profile: &CryptoProfile| {
        let slots = profile.status().keyslots.unwrap().slots;
        slots.iter().filter(|slot| slot.key.is_some()).count()
    };
    assert_eq!((profile.status().keys, held(&profile)), (1, 1));
    drop(volume);
    assert_eq!((profile.status().keys, held(&profile)), (0, 0));
}

#[test]
fn more_keys_than_keyslots_under_many_threads() {
    let engines = [0, 1, 3].map(FakeEngine::with_keyslots);
    let on_the_way = [0, 1, 3].map(|keyslots| FakeEngine::with_keyslots(keyslots).on_the_way_to_the_disk());
    for engine in engines.into_iter().chain(on_the_way) {
        let profile = profile(Arc::new(engine));
        let volumes: Vec<_> = (0..16)
            .map(|_| {
                let backing = Arc::new(MemBacking::new(SIZE, 1));
                volume_on(&profile, Mode::Aes256Xts, 4096, None, backing).unwrap()
            })
            .collect();
        std::thread::scope(|scope| {
            for (n, volume) in (0u8..).zip(&volumes) {
                scope.spawn(move || {
                    let mut buffer = volume.private_buffer(SMALL_BUFFER_BYTES).unwrap();
                    for round in 0..20u8 {
                        let data = vec![n ^ round; 8192];
                        write(volume, u64::from(round) * 512, &data, &mut buffer).unwrap();
                        let back = read(volume, u64::from(round) * 512, 8192, &mut buffer).unwrap();
                        assert!(back == data);
                    }
                });
            }
        });
    }
}

#[test]
fn the_fallback_serves_raw_keys_that_the_engine_cannot_if_their_owner_allows() {
    let small = Capabilities {
        units: [UnitMask::from_bits(512); Mode::ALL.len()],
        dun_bytes_max: 8,
        key_types: KeyTypes::RAW,
        keyslots: 1,
    };
    let engine = || Arc::new(FakeEngine::with_capabilities(small.clone()));
    let pool = || MemoryPool::new(LARGE_BUFFER_BYTES, 1);
    let alone = profile(engine());
    let software = profile(Arc::new(FakeEngine::with_keyslots(4)));
    let with_fallback =
        CryptoProfile::new(engine(), pool(), Policy::default()).unwrap().with_fallback(software);
    let with_fallback = Arc::new(with_fallback);
    let key = |unit, hardware| {
        let unit = DataUnitSize::from_bytes(unit).unwrap();
        let form = KeyForm::Raw(RawKey::new(&raw_key(Mode::Aes256Xts)));
        Key::new(Mode::Aes256Xts, unit, 8, form, hardware).unwrap()
    };
    use crate::admission::ServedBy;
    let admit = |profile: &Arc<CryptoProfile>, unit, hardware, fallback| {
        profile
            .admit(key(unit, hardware), fallback)
            .map(|admission| admission.served_by())
            .map_err(Error::from)
    };
    let errno = |result: Result<ServedBy, Error>| result.unwrap_err().errno().raw();
    let (allowed, forbidden) = (Hardware::Allowed, Hardware::Forbidden);
    assert_eq!(admit(&with_fallback, 512, allowed, Fallback::Allowed).unwrap(), ServedBy::Engine);
    assert_eq!(admit(&with_fallback, 4096, allowed, Fallback::Allowed).unwrap(), ServedBy::Fallback);
    assert_eq!(admit(&with_fallback, 512, forbidden, Fallback::Allowed).unwrap(), ServedBy::Fallback);
    // ENOPKG: the fallback is off, or there is none.
    assert_eq!(errno(admit(&with_fallback, 4096, allowed, Fallback::Off)), 65);
    assert_eq!(errno(admit(&alone, 4096, allowed, Fallback::Allowed)), 65);
    // EOPNOTSUPP: nobody but the engine can open a wrapped key.
    let unit = DataUnitSize::from_bytes(512).unwrap();
    let blob = KeyForm::Wrapped(crate::key::EphemeralWrappedKey::new(&[1; 64]));
    let wrapped = Key::new(Mode::Aes256Xts, unit, 8, blob, allowed).unwrap();
    let refusal = with_fallback.admit(wrapped, Fallback::Allowed).unwrap_err();
    assert_eq!(Error::from(refusal).errno().raw(), 95);
    assert_eq!(with_fallback.status().keys, 0, "a refused or dropped admission leaves nothing");
}

/// Notes how many requests use a keyslot whenever it is asked for something.
#[derive(Debug)]
struct Watching {
    inner: MemBacking,
    profile: Arc<CryptoProfile>,
    users: std::sync::Mutex<Vec<u32>>,
}

impl Watching {
    fn note(&self) {
        let slots = self.profile.status().keyslots.unwrap().slots;
        self.users.lock().unwrap().push(slots.iter().map(|slot| slot.users).sum());
    }
}

impl Backing for Watching {
    fn facts(&self) -> crate::backing::BackingFacts {
        self.inner.facts()
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.note();
        self.inner.read(offset, data)
    }
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.note();
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
    fn prefetch(&self, offset: u64, len: u64) {
        self.inner.prefetch(offset, len);
    }
}

#[test]
fn an_engine_on_the_way_to_the_disk_has_its_keyslot_while_the_disk_works() {
    for (engine, users) in [
        (FakeEngine::with_keyslots(1), [0, 0, 0]),
        (FakeEngine::with_keyslots(1).on_the_way_to_the_disk(), [1, 1, 1]),
    ] {
        let profile = profile(Arc::new(engine));
        let inner = MemBacking::new(SIZE, 1);
        let backing =
            Arc::new(Watching { inner, profile: profile.clone(), users: std::sync::Mutex::default() });
        let volume = volume_on(&profile, Mode::Aes256Xts, 4096, None, backing.clone()).unwrap();
        let [mut buffer, _] = buffers(&volume);
        // Reads the rest of the data unit, writes, reads.
        write(&volume, 512, &[1; 512], &mut buffer).unwrap();
        read(&volume, 512, 512, &mut buffer).unwrap();
        assert_eq!(*backing.users.lock().unwrap(), users);
        assert_eq!(profile.status().keyslots.unwrap().slots[0].users, 0);
    }
}

#[derive(Debug)]
struct RealClock(std::time::Instant);

impl crate::env::Clock for RealClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap()
    }
}

#[test]
fn raw_keys_spill_to_software_when_a_keyslot_would_take_too_long_and_their_owner_allows() {
    let slow = FakeEngine::with_keyslots(1).with_program_time(std::time::Duration::from_millis(5));
    let software = profile(Arc::new(FakeEngine::with_keyslots(4)));
    let pool = MemoryPool::new(LARGE_BUFFER_BYTES, 2);
    let profile =
        CryptoProfile::new(Arc::new(slow), pool, Policy::default()).unwrap().with_fallback(software.clone());
    let profile = Arc::new(profile.with_clock(Arc::new(RealClock(std::time::Instant::now()))));
    let admit = |fallback: Fallback, spill_after_ns| {
        let form = KeyForm::Raw(RawKey::new(&raw_key(Mode::Aes256Xts)));
        let key = Key::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, 8, form, Hardware::Allowed).unwrap();
        let terms = crate::admission::Terms { spill_after_ns, ..fallback.into() };
        profile.admit(key, terms).unwrap()
    };
    let mut buffer = MemoryPool::private(&crate::memory::HeapSource, 4096).unwrap();
    let mut crypt = |admission: &Admission| {
        admission.crypt(Direction::Encrypt, Dun::ZERO, buffer.memory_mut(), 0..4096).unwrap();
    };
    let (stays, waits) = (admit(Fallback::Off, Some(1)), admit(Fallback::Allowed, Some(u64::MAX)));
    let spills = admit(Fallback::Allowed, Some(1_000_000));
    crypt(&stays);
    crypt(&waits);
    assert_eq!(profile.status().spills, 0);
    crypt(&spills);
    assert_eq!((profile.status().spills, software.status().keys), (1, 2));
    drop((stays, waits, spills));
    assert_eq!((profile.status().keys, software.status().keys), (0, 0));
}

#[test]
fn a_pinned_key_stays_and_a_preprogrammed_one_is_there_before_its_first_request() {
    let profile = profile(Arc::new(FakeEngine::with_keyslots(2)));
    let admit = |hold, preprogram| {
        let form = KeyForm::Raw(RawKey::new(&raw_key(Mode::Aes256Xts)));
        let key = Key::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, 8, form, Hardware::Allowed).unwrap();
        let terms = crate::admission::Terms { hold, preprogram, ..Fallback::Off.into() };
        profile.admit(key, terms)
    };
    use crate::admission::Hold;
    let held =
        || profile.status().keyslots.unwrap().slots.iter().filter_map(|slot| slot.key).collect::<Vec<_>>();
    let pinned = admit(Hold::Pin, true).unwrap();
    assert_eq!(held(), [pinned.key().id()]);
    let others: Vec<_> = (0..5).map(|_| admit(Hold::Register, true).unwrap()).collect();
    assert_eq!(held(), [pinned.key().id(), others[4].key().id()]);
    assert_eq!(Error::from(admit(Hold::Pin, false).unwrap_err()).errno().raw(), 16);
    drop(pinned);
    let pinned = admit(Hold::Pin, false).unwrap();
    assert_eq!(profile.status().pinned, 1);
    drop(pinned);
    assert_eq!(profile.status().pinned, 0);
}
