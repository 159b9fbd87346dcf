use super::*;
use crate::backing::{BackingFacts, Durability};
use crate::disk::{LARGE_BUFFER_BYTES, SMALL_BUFFER_BYTES};
use crate::testing::MemBacking;
use crate::volume::tests::{SIZE, buffers, read, run_batches, run_on, step, write};
use proptest::prelude::*;
use std::sync::Mutex;

fn pool() -> Arc<MemoryPool> {
    Arc::new(MemoryPool::new(LARGE_BUFFER_BYTES, 2))
}

fn volume_on(backing: Arc<dyn Backing>, access: Access, discard: Discard) -> Result<PlainVolume, Error> {
    let size_bytes = backing.facts().len_bytes;
    PlainVolume::new(backing, size_bytes, access, discard, pool())
}

fn volume(align: u32) -> (PlainVolume, Arc<MemBacking>) {
    let backing = Arc::new(MemBacking::new(SIZE, align));
    (volume_on(backing.clone(), Access::ReadWrite, Discard::Pass).unwrap(), backing)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// What encrypted volumes pass, with nothing to decrypt.
    #[test]
    fn plain_volumes_are_byte_arrays(align in 0u32..=12, steps in proptest::collection::vec(step(1), 1..20)) {
        let (volume, backing) = volume(1 << align);
        run_on(&volume, &backing, &MemBacking::content, steps);
    }

    #[test]
    fn batches_leave_what_their_pieces_would_one_after_the_other(
        align in 0u32..=12,
        small in any::<bool>(),
        pieces in proptest::collection::vec((any::<bool>(), 0..SIZE, 1..9000usize, any::<u8>()), 1..80),
    ) {
        let (volume, backing) = volume(1 << align);
        let oracle = run_batches(&volume, backing.content(), small, pieces);
        prop_assert!(backing.content() == oracle);
    }

    /// A trim takes nothing outside its range, and whole pages of it.
    #[test]
    fn a_trim_gives_back_the_whole_pages_of_its_range(
        align in 0u32..=12, offset in 0..SIZE, len in 0..SIZE
    ) {
        let (volume, backing) = volume(1 << align);
        let [mut buffer, _] = buffers(&volume);
        write(&volume, 0, &vec![0xaa; SIZE], &mut buffer).unwrap();
        let len = len.min(SIZE - offset);
        volume.trim(offset as u64, len as u64).unwrap();
        let mut expected = vec![0xaa; SIZE];
        let (start, end) = (offset.next_multiple_of(4096), (offset + len) / 4096 * 4096);
        if start < end {
            expected[start..end].fill(0);
        }
        prop_assert!(backing.content() == expected);
    }
}

/// Notes how it was written and flushed, and has storage for every second 8 KiB.
#[derive(Debug)]
struct Noting {
    inner: MemBacking,
    access: Access,
    can_discard: bool,
    fails_reads: bool,
    said: Mutex<Vec<String>>,
}

impl Noting {
    fn new(align: u32) -> Self {
        let inner = MemBacking::new(SIZE, align);
        Self {
            inner,
            access: Access::ReadWrite,
            can_discard: true,
            fails_reads: false,
            said: Mutex::default(),
        }
    }

    fn note(&self, text: String) {
        self.said.lock().unwrap().push(text);
    }

    fn said(&self) -> Vec<String> {
        std::mem::take(&mut *self.said.lock().unwrap())
    }
}

impl Backing for Noting {
    fn facts(&self) -> BackingFacts {
        let Self { access, can_discard, .. } = *self;
        BackingFacts { access, can_discard, ..self.inner.facts() }
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.note(format!("read {offset} {}", data.len()));
        if self.fails_reads {
            return Err(Error::new(ErrorKind::Backing, Op::Read).at(offset, data.len() as u64));
        }
        self.inner.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), Error> {
        self.note(format!("write {offset} {} {durability:?}", data.len()));
        self.inner.write(offset, data, durability)
    }

    fn flush(&self) -> Result<(), Error> {
        self.note("flush".to_owned());
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.note(format!("discard {offset} {len}"));
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, extents_max: usize) -> Result<Vec<Extent>, Error> {
        let (mut at, end) = (offset, offset + len);
        let mut extents = Vec::new();
        while at < end && extents.len() < extents_max {
            let until = ((at / 8192 + 1) * 8192).min(end);
            extents.push(Extent { offset: at, len: until - at, allocated: at / 8192 % 2 == 0 });
            at = until;
        }
        Ok(extents)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        self.note(format!("prefetch {offset} {len}"));
    }
}

#[test]
fn nothing_is_read_or_written_that_was_not_asked_for() {
    let backing = Arc::new(Noting::new(1));
    let volume = volume_on(backing.clone(), Access::ReadWrite, Discard::Pass).unwrap();
    let [mut buffer, _] = buffers(&volume);
    write(&volume, 1000, &[1; 3000], &mut buffer).unwrap();
    assert_eq!(backing.said(), ["write 1000 3000 Cached"]);
    let span = volume.span(8192, 512, SMALL_BUFFER_BYTES);
    volume.write(span, &mut buffer, Durability::Durable).unwrap();
    assert_eq!(backing.said(), ["write 8192 512 Durable"]);
    volume.flush().unwrap();
    volume.prefetch(100, 10);
    assert_eq!(backing.said(), ["flush", "prefetch 100 10"]);
    // Whole blocks of a backing that takes nothing else, of which the edges are read first.
    let backing = Arc::new(Noting::new(4096));
    let volume = volume_on(backing.clone(), Access::ReadWrite, Discard::Pass).unwrap();
    write(&volume, 1000, &[1; 8000], &mut buffer).unwrap();
    assert_eq!(backing.said(), ["read 0 4096", "read 8192 4096", "write 0 12288 Cached"]);
    read(&volume, 5000, 1, &mut buffer).unwrap();
    assert_eq!(backing.said(), ["read 4096 4096"]);
}

#[test]
fn a_write_whose_edge_cannot_be_read_fails_and_writes_nothing() {
    let backing = Arc::new(Noting { fails_reads: true, ..Noting::new(4096) });
    let volume = volume_on(backing.clone(), Access::ReadWrite, Discard::Pass).unwrap();
    let [mut buffer, _] = buffers(&volume);
    assert_eq!(write(&volume, 100, &[1; 100], &mut buffer).unwrap_err().kind(), ErrorKind::Backing);
    assert_eq!(backing.said(), ["read 0 4096"]);
    write(&volume, 4096, &[1; 4096], &mut buffer).unwrap();
}

#[test]
fn extents_are_those_of_the_backing_within_what_was_asked_for() {
    for align in [1, 512, 4096] {
        let volume = volume_on(Arc::new(Noting::new(align)), Access::ReadWrite, Discard::Pass).unwrap();
        let extents = volume.extents(1000, 20_000, 10).unwrap();
        let expected = [(1000, 7192, true), (8192, 8192, false), (16_384, 4616, true)]
            .map(|(offset, len, allocated)| Extent { offset, len, allocated });
        assert_eq!(extents, expected, "{align}");
        assert_eq!(volume.extents(1000, 20_000, 1).unwrap(), expected[..1]);
        assert_eq!(volume.extents(1000, 0, 1).unwrap(), []);
    }
}

#[test]
fn what_may_not_be_changed_is_not() {
    let backing = Arc::new(Noting::new(1));
    let volume = volume_on(backing.clone(), Access::ReadOnly, Discard::Pass).unwrap();
    let [mut buffer, _] = buffers(&volume);
    let kind = |result: Result<(), Error>| result.unwrap_err().kind();
    assert_eq!(kind(write(&volume, 0, &[1; 512], &mut buffer)), ErrorKind::ReadOnly);
    assert_eq!(kind(volume.trim(0, 4096)), ErrorKind::ReadOnly);
    volume.flush().unwrap();
    assert_eq!(backing.said(), [""; 0]);
    assert!(!volume.geometry().can_trim);
    // Nor is it trimmed where that is not offered.
    let volume = volume_on(backing.clone(), Access::ReadWrite, Discard::Off).unwrap();
    volume.trim(0, 1 << 16).unwrap();
    assert_eq!(backing.said(), [""; 0]);
    assert!(!volume.geometry().can_trim);
    let locked = Noting { access: Access::ReadOnly, ..Noting::new(1) };
    let refused = volume_on(Arc::new(locked), Access::ReadWrite, Discard::Pass).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_volume_is_whole_sectors_that_are_there() {
    let of = |size| {
        PlainVolume::new(Arc::new(MemBacking::new(4096, 1)), size, Access::ReadWrite, Discard::Pass, pool())
    };
    assert_eq!(of(4096).unwrap().geometry().size_bytes, 4096);
    assert_eq!(of(1500).unwrap().geometry().size_bytes, 1024);
    for size in [511, 4097, 8192] {
        assert_eq!(of(size).unwrap_err().kind(), ErrorKind::Invalid, "{size}");
    }
    let volume = of(1500).unwrap();
    assert_eq!(volume.check(1024, 1, Access::ReadOnly).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(volume.check(0, 1025, Access::ReadWrite).unwrap_err().kind(), ErrorKind::PastEnd);
    assert!(volume.check(1, 1, Access::ReadWrite).is_ok(), "any bytes are served");
}
